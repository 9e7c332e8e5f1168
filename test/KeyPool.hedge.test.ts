import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as FiberRef from "effect/FiberRef"
import * as Ref from "effect/Ref"
import * as Stream from "effect/Stream"
import * as Supervisor from "effect/Supervisor"
import * as TestClock from "effect/TestClock"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import * as HedgeBudget from "../src/HedgeBudget.js"
import { AllKeysExhausted } from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as Strategy from "../src/Strategy.js"
import {
  bad,
  calm,
  Failed,
  keyOf,
  keys,
  named,
  ok,
  once,
  plain,
  report,
  type Sent,
  test,
  trip,
  type Upstream,
  upstream,
  watch
} from "./support/pooled.js"

/** After 100 ms, for every call. */
const hedge = { delay: 100, share: 1 } as const
const settings = { ...plain, ...once, strategy: "sequential-then-rotate", hedge } as const

const byLabel = Strategy.custom("by label", (candidates) => candidates[0])

/** A call that runs, and how it ends when so much time has passed. */
const asked = (
  pool: KeyPool.Service,
  provider: Upstream,
  options: KeyPool.RunOptions<string, Failed> = {}
) =>
  Effect.fork(Effect.gen(function*() {
    const from = yield* Clock.currentTimeMillis
    const exit = yield* Effect.exit(pool.run(provider.send, options))
    return { exit, millis: (yield* Clock.currentTimeMillis) - from }
  }))

/** What became of a call that began now, if nothing takes longer than 10 s. */
const outcome = (
  pool: KeyPool.Service,
  provider: Upstream,
  options: KeyPool.RunOptions<string, Failed> = {}
) =>
  Effect.gen(function*() {
    const call = yield* asked(pool, provider, options)
    yield* TestClock.adjust(10_000)
    return yield* Fiber.join(call)
  })

const inFlight = (pool: KeyPool.Service) => Effect.map(pool.snapshot, (snapshot) => snapshot.inFlight)
const counts = (pool: KeyPool.Service, label: string) =>
  Effect.map(keyOf(pool, label), ({ faults, ignored, inFlight, successes }) => ({
    faults,
    ignored,
    inFlight,
    successes
  }))

/** Many quick calls, so that what is usual is known: 100 ms. */
const learn = (pool: KeyPool.Service, provider: Upstream, count = 20) =>
  Effect.repeatN(
    Effect.gen(function*() {
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(100)
      yield* Fiber.join(call)
    }),
    count - 1
  )

describe("a second attempt beside the first", () => {
  test("A6: off by default: a call that takes long has one attempt", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(5_000) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings, hedge: undefined })
      const { exit, millis } = yield* outcome(pool, provider)
      assert.deepStrictEqual([exit, millis], [Exit.succeed("a"), 5_000])
      assert.deepStrictEqual(yield* provider.trace, ["a@0"])
    }))

  test("A6: after the delay a key of another group is asked; who answers first has the call, the other is interrupted", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(5_000), b: ok(300) })
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...settings })
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(99)
      assert.deepStrictEqual(yield* provider.trace, ["a@0"])
      yield* TestClock.adjust(1)
      assert.deepStrictEqual([yield* provider.trace, yield* inFlight(pool)], [["a@0", "b@100"], 2])
      yield* TestClock.adjust(300)
      const { exit, millis } = yield* Fiber.join(call)
      assert.deepStrictEqual([exit, millis], [Exit.succeed("b"), 400])
      yield* calm
      assert.strictEqual(yield* provider.running, 0)
      assert.deepStrictEqual(yield* counts(pool, "a"), { faults: 0, ignored: 1, inFlight: 0, successes: 0 })
      assert.deepStrictEqual(yield* counts(pool, "b"), { faults: 0, ignored: 0, inFlight: 0, successes: 1 })
      yield* TestClock.adjust(10_000)
      assert.strictEqual((yield* provider.sent).length, 2)
    }))

  test("A6: when the first attempt is answered after all, the second one is interrupted and counts as nothing", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(250), b: ok(300) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const { exit, millis } = yield* outcome(pool, provider)
      assert.deepStrictEqual([exit, millis], [Exit.succeed("a"), 250])
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@100"])
      assert.deepStrictEqual(yield* counts(pool, "b"), { faults: 0, ignored: 1, inFlight: 0, successes: 0 })
      assert.strictEqual(yield* provider.running, 0)
    }))

  test("A6: a call that is answered before the delay has no second attempt", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(99) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      assert.deepStrictEqual((yield* outcome(pool, provider)).exit, Exit.succeed("a"))
      assert.deepStrictEqual(yield* provider.trace, ["a@0"])
    }))

  test("A6: of two answers of one instant one has the call, and exactly one success is counted", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(300), b: ok(200) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const seen = yield* watch
      const { exit } = yield* outcome(pool, provider)
      assert.isTrue(Exit.isSuccess(exit))
      const [a, b] = [yield* counts(pool, "a"), yield* counts(pool, "b")]
      assert.deepStrictEqual([a.successes + b.successes, a.ignored + b.ignored], [1, 1])
      assert.strictEqual(named(yield* seen, "request.success").length, 1)
      assert.strictEqual(yield* inFlight(pool), 0)
    }))

  test("A6, C6: nobody waits for an attempt that lost and cannot be interrupted; it is in flight until it ends", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const use = ({ attempt }: KeyPool.Lease) =>
        Effect.uninterruptible(Effect.as(Effect.sleep(attempt === 1 ? 500 : 100), attempt))
      const call = yield* Effect.fork(pool.run(use))
      yield* TestClock.adjust(200)
      assert.deepStrictEqual([yield* Fiber.join(call), yield* inFlight(pool)], [2, 1])
      yield* TestClock.adjust(300)
      assert.deepStrictEqual(yield* counts(pool, "a"), { faults: 0, ignored: 1, inFlight: 0, successes: 0 })
    }))

  test("A6: the value of an answer that came too late is discarded", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const discarded = yield* Ref.make<ReadonlyArray<number>>([])
      const leases: Array<KeyPool.Lease> = []
      const call = yield* Effect.fork(pool.run(
        (lease) =>
          Effect.as(Effect.sync(() => leases.push(lease)).pipe(Effect.zipRight(Effect.sleep(200))), lease.attempt),
        {
          // While the first is looked at, the second one is answered.
          classify: (exit) => {
            const [, second] = leases
            if (second !== undefined) Effect.runSync(second.commit(Outcome.success))
            return Outcome.fromExit(exit)
          },
          discard: (value) => Ref.update(discarded, (all) => [...all, value])
        }
      ))
      yield* TestClock.adjust(200)
      assert.deepStrictEqual(yield* Ref.get(discarded), [1])
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* Fiber.join(call), 2)
      assert.deepStrictEqual(yield* counts(pool, "a"), { faults: 0, ignored: 1, inFlight: 0, successes: 0 })
      assert.deepStrictEqual(yield* counts(pool, "b"), { faults: 0, ignored: 0, inFlight: 0, successes: 1 })
    }))

  test("A6: an answer that was committed belongs to the caller: nothing is asked beside it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const asked = yield* Ref.make("")
      const use = (lease: KeyPool.Lease) =>
        Ref.update(asked, (all) => all + lease.key.label).pipe(
          Effect.zipRight(lease.commit(Outcome.success)),
          Effect.zipRight(Effect.sleep(5_000))
        )
      const call = yield* Effect.fork(pool.run(use))
      yield* TestClock.adjust(5_000)
      yield* Fiber.join(call)
      assert.strictEqual(yield* Ref.get(asked), "a")
    }))

  test("A6: what the attempt that is answered changes in its fiber is seen by the caller", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const ref = FiberRef.unsafeMake("nobody")
      const call = yield* Effect.fork(Effect.zipRight(
        pool.run(({ attempt, key }) =>
          Effect.zipRight(FiberRef.set(ref, key.label), Effect.sleep(attempt === 1 ? 5_000 : 50))
        ),
        FiberRef.get(ref)
      ))
      yield* TestClock.adjust(200)
      assert.strictEqual(yield* Fiber.join(call), "b")
    }))
})

describe("when there is none", () => {
  // Pools of one name share what a store knows.
  let pools = 0

  /** What was asked in a call of which the first attempt takes 5 s. */
  const askedOf = (
    more: Partial<KeyPool.Settings>,
    call: (pool: KeyPool.Service, provider: Upstream) => Effect.Effect<unknown, unknown> = outcome
  ) =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.attempt === 1 ? ok(5_000) : ok(50))
      const pool = yield* KeyPool.make({ keys: keys("ab"), name: `pool ${++pools}`, ...settings, ...more })
      yield* call(pool, provider)
      return yield* provider.trace
    })

  test("A6: another key of the same group is not asked", () =>
    Effect.gen(function*() {
      const grouped = keys("abc", { a: { quotaGroup: "one" }, b: { quotaGroup: "one" } })
      assert.deepStrictEqual(yield* askedOf({ keys: grouped.slice(0, 2) }), ["a@0"])
      assert.deepStrictEqual(yield* askedOf({ keys: grouped }), ["a@10000", "c@10100"])
    }))

  test("C8, A6: a call that may not be sent again is not sent twice", () =>
    Effect.gen(function*() {
      for (const replayable of [false, "never"] as const) {
        assert.lengthOf(yield* askedOf({}, (pool, provider) => outcome(pool, provider, { replayable })), 1)
      }
      assert.lengthOf(yield* askedOf({}, (pool, provider) => outcome(pool, provider, { replayable: true })), 2)
    }))

  test("H4, A6: a call that names stored resources never goes to two groups; one of a conversation may, and stays", () =>
    Effect.gen(function*() {
      assert.lengthOf(yield* askedOf({}, (pool, provider) => outcome(pool, provider, { resources: ["file-1"] })), 1)
      const provider = yield* upstream((_, index) => index === 1 ? ok(5_000) : ok(50))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      for (let n = 0; n < 3; n++) yield* outcome(pool, provider, { affinity: "a talk" })
      const [first = "", slow, second = "", third] = (yield* provider.sent).map(({ label }) => label)
      assert.deepStrictEqual([slow, third, second === first], [first, first, false])
    }))

  test("A6: a pool with one key asks it once", () =>
    Effect.map(askedOf({ keys: keys("a") }), (trace) => assert.lengthOf(trace, 1)))

  test("A6: no key with anything held against it is asked: neither limited, nor open, nor on trial", () =>
    Effect.gen(function*() {
      const trial = (kind: Fault.Kind, wait: number) => (pool: KeyPool.Service, provider: Upstream) =>
        Effect.gen(function*() {
          yield* pool.disable((yield* keyOf(pool, "a")).id)
          yield* kind === "ServerError" ? trip(pool, "b") : report(pool, "b", kind)
          yield* pool.enable((yield* keyOf(pool, "a")).id)
          yield* TestClock.adjust(wait)
          yield* outcome(pool, provider)
        })
      const strategy = byLabel
      for (const wait of [0, 35_000]) {
        const perKey = { strategy, attribution: "per-key" } as const
        assert.lengthOf(yield* askedOf(perKey, trial("ServerError", wait)), 1)
        assert.lengthOf(yield* askedOf({ strategy }, trial("RateLimited", wait)), 1)
        assert.lengthOf(yield* askedOf({ strategy }, trial("Rejected", wait)), 2)
      }
    }))

  test("A6: while callers wait, nobody gets two keys", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(1_000), b: ok(50) })
      const only = { a: { limits: { concurrency: 1 } }, b: { models: ["other"] } }
      const pool = yield* KeyPool.make({ keys: keys("ab", only), ...settings })
      const first = yield* asked(pool, provider)
      // No key but the one that is in use can serve it.
      const second = yield* asked(pool, provider, { model: "m" })
      yield* TestClock.adjust(2_000)
      yield* Fiber.joinAll([first, second])
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "a@1000"])
      yield* outcome(pool, provider)
      assert.deepStrictEqual((yield* provider.sent).map(({ label }) => label), ["a", "a", "a", "b"])
    }))

  test("A6: none in an outage of the provider", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.at < 100 ? bad("ServerError") : ok(5_000))
      const pool = yield* KeyPool.make({
        keys: keys("abc"),
        ...settings,
        strategy: "round-robin",
        hedge: { delay: 3_000, share: 1, success: 0 }
      })
      yield* Effect.forEach(Array.from({ length: 5 }), () => Effect.exit(pool.run(provider.send)))
      assert.lengthOf((yield* pool.snapshot).outages, 1)
      yield* TestClock.adjust(1_000)
      const { exit } = yield* outcome(pool, provider)
      assert.isTrue(Exit.isSuccess(exit))
      assert.strictEqual((yield* provider.sent).length, 6)
    }))

  test("C3, A6: none begins past the budget, and the deadline interrupts both", () =>
    Effect.gen(function*() {
      assert.lengthOf(yield* askedOf({ budget: 100 }), 1)
      assert.lengthOf(yield* askedOf({ budget: 101 }), 2)
      const provider = yield* upstream(() => ok(5_000))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings, deadline: 300 })
      const { exit, millis } = yield* outcome(pool, provider)
      assert.isTrue(Exit.isFailure(exit))
      assert.deepStrictEqual([millis, yield* provider.running, yield* inFlight(pool)], [300, 0, 0])
      assert.strictEqual((yield* provider.sent).length, 2)
    }))

  test("A6: none for a caller that is not to be interrupted", () =>
    Effect.map(
      askedOf({}, (pool, provider) => Effect.uninterruptible(outcome(pool, provider))),
      (trace) => assert.lengthOf(trace, 1)
    ))

  test("A6: a call can say that it wants one, when, and that it wants none", () =>
    Effect.gen(function*() {
      const with_ = (hedge: CallOptions.Settings["hedge"]) => (pool: KeyPool.Service, provider: Upstream) =>
        CallOptions.withOptions(outcome(pool, provider), { hedge })
      const instants = (trace: ReadonlyArray<string>) => trace.map((at) => Number(at.split("@")[1]) % 10_000)
      assert.deepStrictEqual(instants(yield* askedOf({}, with_(false))), [0])
      assert.deepStrictEqual(instants(yield* askedOf({}, with_(true))), [0, 100])
      assert.deepStrictEqual(instants(yield* askedOf({}, with_({ delay: "1 second" }))), [0, 1_000])
      // The pool's share holds: one of 20.
      const off = { hedge: undefined }
      const twenty = (pool: KeyPool.Service, provider: Upstream) =>
        Effect.zipRight(
          Effect.repeatN(pool.run(() => Effect.void), 18),
          CallOptions.withOptions(outcome(pool, provider), { hedge: { delay: 200 } })
        )
      assert.deepStrictEqual(instants(yield* askedOf(off, twenty)), [0, 200])
      assert.deepStrictEqual(instants(yield* askedOf(off, with_({ delay: 200 }))), [0])
    }))
})

describe("when it is time", () => {
  test("A6: without a delay, at what 95 of 100 attempts take; with fewer than 20 there is none", () =>
    Effect.gen(function*() {
      const slow = (from: number) => (sent: Sent, index: number) => index === from ? ok(5_000) : ok(100)
      for (const count of [19, 20]) {
        const provider = yield* upstream(slow(count))
        const pool = yield* KeyPool.make({ keys: keys("ab"), name: `${count}`, ...settings, hedge: { share: 1 } })
        yield* learn(pool, provider, count)
        const { exit, millis } = yield* outcome(pool, provider)
        // A histogram: 100 ms are told to within a fifth.
        if (count < 20) assert.deepStrictEqual([exit, millis], [Exit.succeed("a"), 5_000])
        else {
          assert.deepStrictEqual(exit, Exit.succeed("b"))
          assert.isTrue(millis >= 200 && millis < 240, String(millis))
        }
      }
    }))

  test("A6: it is learned also where attempts may take as long as they like", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((_, index) => index === 20 ? ok(5_000) : ok(100))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings, hedge: { share: 1 }, attemptTimeout: false })
      yield* learn(pool, provider)
      assert.deepStrictEqual((yield* outcome(pool, provider)).exit, Exit.succeed("b"))
    }))

  test("A6, C3: how long the one that lost had lasted is learned, or the slow ones would drop out of what is known", () =>
    Effect.gen(function*() {
      let n = 0
      const provider = yield* upstream((sent) => sent.attempt === 1 && ++n > 20 && n % 4 === 0 ? ok(5_000) : ok(100))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings, hedge: { share: 1 } })
      const slow: Array<number> = []
      for (let i = 0; i < 60; i++) {
        const { millis } = yield* outcome(pool, provider)
        if (millis > 100) slow.push(millis)
      }
      assert.lengthOf(slow, 10)
      // 220 ms at first. Soon more than 5 of 100 have lasted longer than that, so that it is no longer unusual.
      assert.isBelow(slow[0] ?? Infinity, 240)
      assert.isAbove(slow.at(-1) ?? 0, 300)
    }))
})

describe("how many", () => {
  test("A6: at most 5 of 100 calls", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.attempt === 1 ? ok(200) : ok(10))
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...settings, hedge: { delay: 100 } })
      for (let n = 1; n <= 300; n++) {
        const call = yield* asked(pool, provider)
        yield* TestClock.adjust(200)
        yield* Fiber.join(call)
        const besides = (yield* provider.sent).length - n
        assert.isAtMost(besides, n * 0.05)
      }
      assert.strictEqual((yield* provider.sent).length, 315)
    }))

  test("A6: after many calls that needed none, at most 10 at once", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.attempt === 1 ? ok(sent.at < 1_000 ? 0 : 500) : ok(10))
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...settings, hedge: { delay: 100 } })
      yield* Effect.repeatN(pool.run(provider.send), 999)
      yield* TestClock.adjust(1_000)
      const calls = yield* Effect.forEach(Array.from({ length: 100 }), () => asked(pool, provider))
      yield* TestClock.adjust(500)
      yield* Fiber.joinAll(calls)
      assert.strictEqual((yield* provider.sent).length, 1_110)
    }))

  test("A6: none below 90 % success of late; the caller's own mistakes do not count", () =>
    Effect.gen(function*() {
      const run = (kind: Fault.Kind, failing: number) =>
        Effect.gen(function*() {
          const provider = yield* upstream((sent, index) =>
            index < 20 ? index < failing ? bad(kind) : ok() : sent.attempt === 1 ? ok(5_000) : ok(10)
          )
          const many = Array.from({ length: 40 }, (_, n) => ({ secret: `secret-${n}`, label: `key-${n}` }))
          const pool = yield* KeyPool.make({
            ...settings,
            name: `${kind} ${failing}`,
            keys: many,
            strategy: "round-robin",
            attribution: "per-key"
          })
          yield* Effect.forEach(Array.from({ length: 20 }), () => Effect.exit(pool.run(provider.send)))
          yield* outcome(pool, provider)
          return (yield* provider.sent).length - 21
        })
      assert.strictEqual(yield* run("ServerError", 2), 1)
      assert.strictEqual(yield* run("ServerError", 3), 0)
      assert.strictEqual(yield* run("Rejected", 3), 1)
    }))

  it("A6: what failed half a minute ago, or more, is forgotten", () => {
    let budget = HedgeBudget.initial
    for (let n = 0; n < 5; n++) budget = HedgeBudget.faulted(budget, n, 1_000)
    assert.strictEqual(HedgeBudget.successOf(budget, 5, 1_000), 0)
    assert.strictEqual(HedgeBudget.successOf(budget, 50, 30_999), 0.9)
    assert.strictEqual(HedgeBudget.successOf(budget, 50, 31_000), 1)
    // Trouble that goes on is not.
    for (let at = 2_000; at <= 120_000; at += 1_000) {
      budget = HedgeBudget.faulted(budget, 100 * at, at)
      assert.isAtMost(HedgeBudget.successOf(budget, 100 * at + 1, at), 1 - 1 / 4_500_000)
    }
  })
})

describe("when attempts fail", () => {
  test("A6: a fault of the first one is not the call's while the second one runs", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: { ...bad("ServerError"), takes: 150 }, b: ok(300) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const { exit, millis } = yield* outcome(pool, provider)
      assert.deepStrictEqual([exit, millis], [Exit.succeed("b"), 400])
      assert.deepStrictEqual((yield* counts(pool, "a")).faults, 1)
    }))

  test("A6: nor is one of the second; what is wrong with it costs the call nothing", () =>
    Effect.gen(function*() {
      for (const kind of ["ServerError", "RateLimited", "Rejected"] as const) {
        const provider = yield* upstream({ a: ok(500), b: { ...bad(kind), takes: 50 } })
        const pool = yield* KeyPool.make({ keys: keys("abc"), name: kind, ...settings })
        const { exit, millis } = yield* outcome(pool, provider)
        assert.deepStrictEqual([exit, millis], [Exit.succeed("a"), 500])
        assert.deepStrictEqual((yield* counts(pool, "b")).faults, 1)
        assert.strictEqual((yield* provider.sent).length, 2)
      }
    }))

  test("A6: when both fail, it is one failure: the call goes on with a key that has not failed it", () =>
    Effect.gen(function*() {
      for (const takes of [150, 350]) {
        const provider = yield* upstream({
          a: { ...bad("RateLimited", { wait: 60_000 }), takes },
          b: { ...bad("RateLimited", { wait: 60_000 }), takes: 100 }
        })
        const pool = yield* KeyPool.make({ keys: keys("abc"), name: `${takes}`, ...settings, rateLimitRotations: 1 })
        const seen = yield* watch
        const { exit } = yield* outcome(pool, provider)
        assert.deepStrictEqual(exit, Exit.succeed("c"))
        assert.deepStrictEqual((yield* provider.sent).map(({ attempt, label }) => label + attempt), ["a1", "b2", "c3"])
        const [end] = named(yield* seen, "call.end")
        const order = takes === 150 ? ["a", "b", "c"] : ["b", "a", "c"]
        assert.deepStrictEqual(end?.trail.entries.map(({ label, outcome }) => `${label} ${outcome}`), [
          `${order[0]} RateLimited`,
          `${order[1]} RateLimited`,
          "c success"
        ])
      }
    }))

  test("A6: the next attempt avoids both keys, although either may serve", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({
        a: { ...bad("ServerError"), takes: 150 },
        b: { ...bad("ServerError"), takes: 100 }
      })
      const pool = yield* KeyPool.make({ ...plain, keys: keys("abc"), strategy: byLabel, hedge })
      assert.deepStrictEqual((yield* outcome(pool, provider)).exit, Exit.succeed("c"))
      assert.deepStrictEqual((yield* provider.sent).map(({ attempt, label }) => label + attempt), ["a1", "b2", "c3"])
    }))

  test("A6: when both fail and nothing is left to try, the error shows both", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({
        a: { ...bad("RateLimited", { wait: 600_000 }), takes: 150 },
        b: { ...bad("RateLimited", { wait: 600_000 }), takes: 100 }
      })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const { exit } = yield* outcome(pool, provider)
      assert(Exit.isFailure(exit))
      const error = Cause.squash(exit.cause)
      assert(error instanceof AllKeysExhausted)
      assert.deepStrictEqual(error.trail.entries.map(({ label }) => label), ["a", "b"])
    }))

  test("A6: a request that is wrong ends the call at once, and the other attempt with it", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: { ...bad("Rejected", { status: 400 }), takes: 150 }, b: ok(5_000) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const { exit, millis } = yield* outcome(pool, provider)
      assert.isTrue(Exit.isFailure(exit))
      assert.deepStrictEqual([millis, yield* provider.running, yield* inFlight(pool)], [150, 0, 0])
    }))

  test("A6: a failure of the caller's own ends the call at once, and the other attempt with it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const call = yield* Effect.fork(Effect.exit(
        pool.run(({ attempt }) =>
          attempt === 1 ? Effect.zipRight(Effect.sleep(150), Effect.fail("mine")) : Effect.never
        )
      ))
      yield* TestClock.adjust(150)
      assert.deepStrictEqual(yield* Fiber.join(call), Exit.fail("mine"))
      yield* calm
      assert.strictEqual(yield* inFlight(pool), 0)
    }))
})

describe("what is told", () => {
  test("A6, T4: each attempt has its `request.start`, and the trail says which one lost", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(5_000), b: ok(300) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const seen = yield* watch
      yield* outcome(pool, provider)
      const events = yield* seen
      assert.deepStrictEqual(
        named(events, "request.start").map(({ at, attempt, call, label }) => ({ at, attempt, call, label })),
        [{ at: 0, attempt: 1, call: 1, label: "a" }, { at: 100, attempt: 2, call: 1, label: "b" }]
      )
      assert.deepStrictEqual(named(events, "key.rotated"), [])
      assert.deepStrictEqual(named(events, "request.fail"), [])
      assert.deepStrictEqual(named(events, "request.success").map(({ attempt }) => attempt), [2])
      const [end, ...others] = named(events, "call.end")
      assert.deepStrictEqual([end?.outcome, end?.attempts, others], ["success", 2, []])
      assert.deepStrictEqual(
        end?.trail.entries.map(({ attempt, durationMillis, lost, outcome }) => ({
          attempt,
          durationMillis,
          lost,
          outcome
        })),
        [
          { attempt: 1, durationMillis: 400, lost: true, outcome: "ignored" },
          { attempt: 2, durationMillis: 300, lost: undefined, outcome: "success" }
        ]
      )
    }))

  test("A6: an attempt knows that it runs beside another one", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const known = yield* Ref.make<ReadonlyArray<boolean>>([])
      const call = yield* Effect.fork(pool.run(({ attempt, hedge }) =>
        Effect.zipRight(Ref.update(known, (all) => [...all, hedge]), Effect.sleep(attempt === 1 ? 5_000 : 10))
      ))
      yield* TestClock.adjust(200)
      yield* Fiber.join(call)
      assert.deepStrictEqual(yield* Ref.get(known), [false, true])
    }))

  test("C5, A6: a caller that leaves interrupts both, and nothing is learned of either", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => ok(5_000))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const seen = yield* watch
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(200)
      assert.strictEqual(yield* provider.running, 2)
      yield* Fiber.interrupt(call)
      assert.deepStrictEqual([yield* provider.running, yield* inFlight(pool)], [0, 0])
      for (const label of "ab") {
        assert.deepStrictEqual(yield* counts(pool, label), { faults: 0, ignored: 1, inFlight: 0, successes: 0 })
      }
      const [end] = named(yield* seen, "call.end")
      assert.deepStrictEqual(end?.trail.entries.map(({ lost, outcome }) => [outcome, lost]), [
        ["ignored", undefined],
        ["ignored", undefined]
      ])
    }))
})

describe("streams", () => {
  /** A stream that says something before its content, and when it was closed. */
  const spoken = (closed: Ref.Ref<string>, before: Readonly<Record<string, number>>) => ({ key }: KeyPool.Lease) =>
    Stream.acquireRelease(Effect.void, () => Ref.update(closed, (all) => all + key.label)).pipe(
      Stream.flatMap(() =>
        Stream.make(".", ".").pipe(
          Stream.concat(Stream.fromEffect(Effect.as(Effect.sleep(before[key.label] ?? 0), key.label))),
          Stream.concat(Stream.fromEffect(Effect.as(Effect.sleep(1_000), key.label.toUpperCase())))
        )
      )
    )
  const commits = (element: string) => element !== "."

  test("A6, S2: the race is until the first content; what lost is closed, unseen", () =>
    Effect.gen(function*() {
      const closed = yield* Ref.make("")
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const seen = yield* Ref.make("")
      const call = yield* Effect.fork(
        Stream.runForEach(
          pool.stream(spoken(closed, { a: 3_000, b: 200 }), { commits }),
          (element) => Ref.update(seen, (all) => all + element)
        )
      )
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* inFlight(pool), 2)
      yield* TestClock.adjust(200)
      assert.deepStrictEqual([yield* Ref.get(closed), yield* inFlight(pool), yield* Ref.get(seen)], ["a", 1, "..b"])
      yield* TestClock.adjust(1_000)
      yield* Fiber.join(call)
      assert.deepStrictEqual([yield* Ref.get(closed), yield* inFlight(pool), yield* Ref.get(seen)], ["ab", 0, "..bB"])
    }))

  test("A6, S2: after content nothing is asked beside a stream, however slow it is", () =>
    Effect.gen(function*() {
      const closed = yield* Ref.make("")
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const call = yield* Effect.fork(Stream.runDrain(pool.stream(spoken(closed, { a: 50 }), { commits })))
      yield* TestClock.adjust(2_000)
      yield* Fiber.join(call)
      assert.strictEqual(yield* Ref.get(closed), "a")
      assert.strictEqual((yield* pool.snapshot).attempts, 1)
    }))

  test("A6, C6: of two streams that commit in one instant, one is read and the other closed", () =>
    Effect.gen(function*() {
      const closed = yield* Ref.make("")
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      const call = yield* Effect.fork(Stream.runCollect(pool.stream(spoken(closed, { a: 300, b: 200 }), { commits })))
      yield* TestClock.adjust(300)
      assert.deepStrictEqual([(yield* Ref.get(closed)).length, yield* inFlight(pool)], [1, 1])
      yield* TestClock.adjust(1_000)
      assert.strictEqual([...(yield* Fiber.join(call))].length, 4)
      assert.deepStrictEqual([(yield* Ref.get(closed)).length, yield* inFlight(pool)], [2, 0])
    }))
})

describe("what it costs", () => {
  test("A6: where it is off, a call starts no fiber and no timer", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings, hedge: undefined })
      const own = yield* Effect.fiberId
      assert.deepStrictEqual(yield* pool.run(() => Effect.fiberId), own)
      const on = yield* KeyPool.make({ keys: keys("ab"), ...settings })
      assert.notDeepEqual(yield* on.run(() => Effect.fiberId), own)
    }))

  test("A6: until its time has come a call has one fiber more, and no timer; answered, it leaves none behind", () =>
    Effect.gen(function*() {
      const supervisor = yield* Supervisor.track
      const running = Effect.map(supervisor.value, (fibers) => fibers.length)
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...settings, hedge: { delay: "30 seconds" } })
      const gate = yield* Deferred.make<void>()
      const call = yield* Effect.fork(Effect.supervised(pool.run(() => Deferred.await(gate)), supervisor))
      yield* calm
      assert.strictEqual(yield* running, 1)
      yield* Deferred.succeed(gate, undefined)
      yield* Fiber.join(call)
      yield* calm
      assert.strictEqual(yield* running, 0)
    }))
})
