import { afterEach, assert, describe, it } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Random from "effect/Random"
import * as Schedule from "effect/Schedule"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import type * as PoolSettings from "../src/PoolSettings.js"
import * as Telemetry from "../src/Telemetry.js"
import { Simulation } from "./support/pool-simulation.js"
import {
  bad,
  calm,
  closedFor,
  keyOf,
  keys,
  named,
  ok,
  once,
  plain,
  type Reply,
  report,
  type Sent,
  test,
  upstream,
  watch
} from "./support/pooled.js"

type Send = Effect.Effect.Success<ReturnType<typeof upstream>>["send"]

const second = 1_000
const minute = 60 * second

// ------------------------------------------------------------------------------------------------------------- scenarios

interface Asked {
  readonly at: number
  readonly exit: Exit.Exit<string, unknown>
  readonly millis: number
}

/** Calls come as chance has it, `perSecond` for `length`; what they got, what the provider saw, and what was told. */
const play = (
  length: number,
  perSecond: number,
  script: (sent: Sent) => Reply,
  settings: Partial<PoolSettings.Settings> = {},
  modelOf: (call: number) => string | undefined = () => undefined
) => {
  const simulation = new Simulation("outage", 1_000, 50_000_000)
  const scope = simulation.get(Scope.make())
  const begun = simulation.get(
    Effect.gen(function*() {
      const context = yield* Layer.buildWithScope(KeyPool.layerDefaults, scope)
      const provider = yield* upstream(script)
      const pool = yield* Effect.provide(KeyPool.make({ keys: keys("abcde"), ...settings }), context)
      const { stream } = yield* Effect.provide(Telemetry.Telemetry, context)
      return { provider, pool, stream }
    }).pipe(Scope.extend(scope))
  )
  const { pool, provider, stream } = begun
  const events: Array<Telemetry.Event> = []
  simulation.fork(Stream.runForEach(stream, (event) => Effect.sync(() => events.push(event))))
  const answers: Array<Asked> = []
  const calls = Effect.gen(function*() {
    for (let n = 0; (yield* Clock.currentTimeMillis) < length; n++) {
      yield* Effect.sleep(Math.ceil(-Math.log(1 - (yield* Random.next)) * 1_000 / perSecond))
      const at = yield* Clock.currentTimeMillis
      yield* Effect.forkDaemon(Effect.gen(function*() {
        const exit = yield* Effect.exit(pool.run(provider.send, { model: modelOf(n) }))
        answers.push({ at, exit, millis: (yield* Clock.currentTimeMillis) - at })
      }))
    }
  })
  simulation.fork(calls)
  simulation.runUntil(length + minute)
  const sent = simulation.get(provider.sent)
  const snapshot = simulation.get(pool.snapshot)
  simulation.get(Scope.close(scope, Exit.void))
  return { answers, sent, events, snapshot }
}

/** Long runs follow one another without a pause: whoever counts the tests must be heard between them. */
afterEach(() => new Promise<void>((resolve) => setImmediate(resolve)))

/** The most attempts in any such slice from an instant on. */
const busiest = (sent: ReadonlyArray<Sent>, from: number, slice: number): number =>
  Math.max(
    ...sent.filter(({ at }) => at >= from).map(({ at }) =>
      sent.filter((other) => other.at >= at && other.at < at + slice).length
    )
  )

/** A usual answer takes from half a second to more than one. */
const takes = ({ at, call }: Sent): number => 500 + (call * 137 + at) % 700

const within = (sent: ReadonlyArray<Sent>, from: number, to: number) => sent.filter(({ at }) => at >= from && at < to)

describe("an outage of the provider", () => {
  for (
    const [name, fault, refusing] of [
      ["503", bad("Overloaded"), 20],
      ["connection resets", bad("Network"), 5],
      ["answers of 500 after 2 s", bad("ServerError"), 2_000]
    ] as const
  ) {
    it(`F2: every call survives 15 s of ${name}, few are sent meanwhile, and then they go at a measured pace`, () => {
      const [from, to] = [20 * second, 35 * second]
      const { answers, events, sent, snapshot } = play(
        60 * second,
        30,
        (sent) => sent.at >= from && sent.at < to ? { ...fault, takes: refusing } : ok(takes(sent))
      )
      assert.isAbove(answers.length, 1_500)
      assert.deepStrictEqual(answers.filter(({ exit }) => Exit.isFailure(exit)), [])
      assert.isBelow(Math.max(...answers.map(({ millis }) => millis)), 60 * second)
      // Before the first fault is told nobody can know.
      assert.isAtMost(within(sent, from + refusing, to).length, 60 + 30 * refusing / second)
      const first = within(sent, to, Infinity)[0]?.at ?? Infinity
      assert.isBelow(first, to + second, "a probe gets through within a second")
      const closed = named(events, "provider.closed").at(-1)?.at ?? Infinity
      assert.isAbove(within(sent, closed, closed + second).length, 20, "traffic is back within a second of that")
      assert.isAtMost(busiest(sent, to, 200), 3 * 30 / 5, "nobody is trampled on")
      assert.lengthOf(named(events, "provider.open"), 1)
      assert.lengthOf(named(events, "provider.closed"), 1)
      assert.deepStrictEqual(snapshot.keys.map(({ breaker }) => breaker), Array(5).fill("closed"))
      assert.deepStrictEqual(snapshot.outages, [])
      const probing = within(sent, (named(events, "provider.open")[0]?.at ?? 0) + 1, to)
      assert.sameMembers([...new Set(probing.map(({ label }) => label))], [..."abcde"], "all keys take turns")
      assert.strictEqual(new Set(probing.map(({ call }) => call)).size, probing.length, "and so do the calls")
    }, 60_000)
  }

  for (const seed of [1, 2, 3]) {
    it(`F2: a brownout of 25 % opens nothing and fails nobody (${seed})`, () => {
      const { answers, events } = play(
        40 * second,
        30,
        (sent) =>
          (sent.call * 7_919 + sent.at * seed * 104_729 + sent.attempt * 31) % 4 === 0
            ? bad("Overloaded", {}, 10)
            : ok(takes(sent)),
        { retryTokens: false }
      )
      assert.lengthOf(named(events, "provider.open"), 0)
      assert.isAtMost(answers.filter(({ exit }) => Exit.isFailure(exit)).length, 2)
    }, 60_000)
  }

  it("F2: a burst into a brownout, whose faults come at once and whose answers take long, opens nothing", () => {
    const { events } = play(
      2 * second,
      200,
      (sent) =>
        (sent.call * 7_919 + sent.at * 31 + sent.attempt) % 4 === 0 ? bad("Overloaded", {}, 10) : ok(10 * second)
    )
    assert.lengthOf(named(events, "provider.open"), 0)
  }, 60_000)

  it("F2: one bad key among several is blamed alone", () => {
    const { answers, events, snapshot } = play(
      20 * second,
      30,
      (sent) => sent.label === "b" ? bad("ServerError", {}, 20) : ok(takes(sent))
    )
    assert.deepStrictEqual(answers.filter(({ exit }) => Exit.isFailure(exit)), [])
    assert.lengthOf(named(events, "provider.open"), 0)
    assert.isAbove(named(events, "circuit.open").length, 0)
    assert.deepStrictEqual([...new Set(named(events, "circuit.open").map(({ label }) => label))], ["b"])
    assert.strictEqual(snapshot.keys.find(({ label }) => label === "a")?.faults, 0)
  }, 60_000)

  it("F2: an outage of one model leaves the others alone; of two, it is the origin's", () => {
    const models = ["m1", "m2", "m3"]
    const broken = (sent: Sent, ...down: ReadonlyArray<string>) =>
      sent.at >= 10 * second && sent.at < 20 * second && down.includes(sent.model ?? "")
        ? bad("Overloaded", {}, 20)
        : ok(takes(sent))
    const one = play(40 * second, 60, (sent) => broken(sent, "m1"), {}, (n) => models[n % 3])
    assert.deepStrictEqual(named(one.events, "provider.open").map(({ model }) => model), ["m1"])
    assert.deepStrictEqual(one.answers.filter(({ exit }) => Exit.isFailure(exit)), [])
    const others = within(one.sent, 11 * second, 20 * second).filter(({ model }) => model !== "m1")
    assert.isAbove(others.length, 9 * 40 * 0.8, "the other models go on")
    const all = play(40 * second, 60, (sent) => broken(sent, ...models), {}, (n) => models[n % 3])
    assert.deepStrictEqual(all.answers.filter(({ exit }) => Exit.isFailure(exit)), [])
    const opened = named(all.events, "provider.open")
    assert.strictEqual(opened[2]?.model, undefined, "two models open mean the origin")
    assert.isAtMost(within(all.sent, 11 * second, 20 * second).length, 30, "its models share their probes")
    assert.strictEqual(opened.length, named(all.events, "provider.closed").length)
  }, 60_000)

  it("F2: `attribution: \"per-key\"` counts as the original did, rate limits included", () => {
    const { events } = play(20 * second, 30, () => bad("Overloaded", {}, 20), { attribution: "per-key" })
    assert.lengthOf(named(events, "provider.open"), 0)
    assert.isAbove(named(events, "circuit.open").length, 0)
    const refuse = (sent: Sent) => sent.at < 2 * second ? bad("RateLimited", { wait: 100 }, 20) : ok()
    const limited = play(second, 30, refuse, { attribution: "per-key" })
    assert.isAbove(named(limited.events, "circuit.open").length, 0)
    assert.lengthOf(named(limited.events, "group.suspected"), 0)
    const usual = play(second, 30, refuse)
    assert.lengthOf(named(usual.events, "circuit.open"), 0)
    assert.isAbove(named(usual.events, "group.suspected").length, 0)
  }, 60_000)
})

// -------------------------------------------------------------------------------------------------------- step by step

/** Five attempts that fail, with two keys in turn: an outage, where little goes on. */
const down = (pool: KeyPool.Service) =>
  Effect.gen(function*() {
    for (let i = 0; i < 5; i++) yield* fault(pool, "ServerError")
  })

const failed = (lease: KeyPool.Lease) => Effect.zipRight(lease.commit(Outcome.fault(Fault.make("Timeout"))), lease.end)

const fault = (pool: KeyPool.Service, kind: Fault.Kind, details: Fault.Details = {}) =>
  Effect.scoped(Effect.flatMap(pool.lease, (lease) => lease.commit(Outcome.fault(Fault.make(kind, details)))))

describe("where little goes on", () => {
  test("F2: 5 faults in a row over 2 keys are an outage; the keys get back what it cost them", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, breaker: { threshold: 2, rate: false } })
      for (let i = 0; i < 4; i++) yield* fault(pool, "ServerError")
      assert.deepStrictEqual((yield* pool.snapshot).keys.map(({ breaker }) => breaker), ["open", "open"])
      yield* TestClock.adjust(30 * second)
      yield* fault(pool, "ServerError")
      const { keys: after, outages } = yield* pool.snapshot
      assert.deepStrictEqual(after.map(({ breaker }) => breaker), ["closed", "closed"])
      assert.strictEqual(outages.length, 1)
      assert.deepStrictEqual(after.map(({ closed }) => closed?.gate), ["provider", "provider"])
      assert.lengthOf(named(yield* events, "provider.open"), 1)
      assert.strictEqual(named(yield* events, "circuit.closed").length, 2)
    }))

  test("F2: a success between, or one key alone, is no outage", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, breaker: { threshold: 100, rate: false } })
      for (let i = 0; i < 8; i++) {
        if (i === 4) yield* report(pool, "a", Outcome.success)
        yield* fault(pool, "ServerError")
      }
      const single = yield* KeyPool.make({
        keys: keys("a"),
        ...plain,
        name: "single",
        breaker: { threshold: 100, rate: false }
      })
      for (let i = 0; i < 20; i++) yield* fault(single, "ServerError")
      assert.lengthOf(named(yield* events, "provider.open"), 0)
    }))

  test("F2: a success of an attempt from before the outage does not end it", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const old = yield* pool.lease
      yield* down(pool)
      yield* old.commit(Outcome.success)
      assert.lengthOf(named(yield* events, "provider.closed"), 0)
      yield* TestClock.adjust(500)
      yield* Effect.scoped(Effect.flatMap(pool.lease, (probe) => probe.commit(Outcome.success)))
      assert.lengthOf(named(yield* events, "provider.closed"), 1)
    }))

  test("F2: a success of an attempt from before the first fault speaks for nobody", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const old = yield* pool.lease
      for (let i = 0; i < 4; i++) yield* fault(pool, "ServerError")
      yield* old.commit(Outcome.success)
      yield* fault(pool, "ServerError")
      assert.lengthOf((yield* pool.snapshot).outages, 1)
    }))

  test("F2: what attempts of the outage say after its end is held against nobody", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, breaker: { threshold: 100, rate: false } })
      const late = yield* Effect.all(Array.from({ length: 9 }, () => pool.lease))
      yield* Effect.forEach(late.slice(0, 2), (lease) => failed(lease))
      for (const lease of late.slice(2, 5)) yield* failed(lease)
      assert.lengthOf((yield* pool.snapshot).outages, 1)
      yield* TestClock.adjust(500)
      yield* Effect.scoped(Effect.flatMap(pool.lease, (probe) => probe.commit(Outcome.success)))
      yield* Effect.forEach(late.slice(5), (lease) => failed(lease))
      // With them, this would be the fifth in a row, and little has gone on of late.
      yield* TestClock.adjust(11 * second)
      yield* fault(pool, "ServerError")
      assert.lengthOf((yield* pool.snapshot).outages, 0)
    }))

  test("F2: at most 4 probes are in flight, half a second apart; an interrupted one gives its place back", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      yield* down(pool)
      const calls = yield* Effect.all(Array.from({ length: 8 }, () => Effect.fork(pool.run(() => Effect.never))))
      yield* calm
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
      for (const running of [1, 2, 3, 4, 4, 4]) {
        yield* TestClock.adjust(500)
        assert.strictEqual((yield* pool.snapshot).inFlight, running)
      }
      const first = calls[0]
      if (first !== undefined) yield* Fiber.interrupt(first)
      yield* TestClock.adjust(500)
      const { inFlight, waiting } = yield* pool.snapshot
      assert.deepStrictEqual([inFlight, waiting], [4, 3])
      yield* Fiber.interruptAll(calls)
    }))

  test("F2: waiting at the gate costs no retry and no token", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const isDown = (at: number) => at < 40 * second || (at >= 60 * second && at < 80 * second)
      const provider = yield* upstream((sent) => isDown(sent.at) ? bad("Overloaded") : ok())
      const pool = yield* KeyPool.make({
        keys: keys("abc"),
        ...plain,
        retryTokens: { burst: 6, perCall: 0, perSecond: 0 }
      })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(50 * second)
      assert.include(["a", "b", "c"], yield* Fiber.join(call))
      assert.isAbove((yield* provider.sent).length, 20)
      // The tokens spent before it was known are there again.
      yield* TestClock.adjust(10 * second)
      const again = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(30 * second)
      assert.include(["a", "b", "c"], yield* Fiber.join(again))
      assert.lengthOf(named(yield* events, "budget.denied"), 0)
    }))

  test("F2: a call that may not be sent again does not wait at the gate", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("ServerError"))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, ...once })
      for (let i = 0; i < 4; i++) yield* fault(pool, "ServerError")
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send)))._tag, "Failed")
      assert.lengthOf((yield* pool.snapshot).outages, 1)
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust(500)
      assert.strictEqual((yield* Fiber.join(call))._tag, "Failed")
    }))

  test("C2, F2: nobody is refused because of an outage before his time, and the reasons name it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, budget: "3 seconds" })
      yield* down(pool)
      const provider = yield* upstream(() => bad("ServerError"))
      const calls = yield* Effect.forkAll(
        Array.from({ length: 20 }, () => Effect.flip(pool.run(provider.send)))
      )
      yield* TestClock.adjust(2_999)
      assert.strictEqual((yield* pool.snapshot).waiting, 20)
      yield* TestClock.adjust(1)
      const tags = (yield* Fiber.join(calls)).map((error) => error._tag)
      assert.deepStrictEqual(new Set(tags), new Set(["BudgetExceeded", "AllKeysExhausted"]))
      const none = yield* KeyPool.make({ keys: keys("ab"), ...plain, name: "none", maxWait: 0 })
      yield* down(none)
      const exhausted = yield* Effect.flip(none.run(provider.send))
      assert.strictEqual(exhausted._tag, "AllKeysExhausted")
      if (exhausted._tag === "AllKeysExhausted") {
        assert.deepStrictEqual(exhausted.reasons.map(({ gate }) => gate), ["provider", "provider"])
      }
    }))

  test("F2: keys of another origin are not concerned", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const there = { baseUrl: "https://there.example" }
      const provider = yield* upstream({ a: bad("ServerError"), b: bad("ServerError"), c: ok(), d: ok() })
      const pool = yield* KeyPool.make({
        keys: keys("abcd", { c: there, d: there }),
        ...plain,
        ...once,
        breaker: { threshold: 100, rate: false }
      })
      for (let i = 0; i < 30; i++) yield* Effect.exit(pool.run(provider.send))
      const opened = named(yield* events, "provider.open")
      assert.deepStrictEqual(opened.map(({ origin }) => origin), ["default"])
      const labels = (yield* provider.sent).slice(-8).map(({ label }) => label)
      assert.sameMembers([...new Set(labels)], ["c", "d"], "the others serve at once")
    }))

  test("F2: an outage of a model that nobody asks for any more is forgotten after ten minutes, and told to be over", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream((sent) => sent.model === "gone" ? bad("ServerError") : ok())
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, ...once })
      for (let i = 0; i < 5; i++) yield* Effect.exit(pool.run(provider.send, { model: "gone" }))
      assert.deepStrictEqual((yield* pool.snapshot).outages.map(({ model }) => model), ["gone"])
      yield* TestClock.adjust(11 * minute)
      yield* pool.run(provider.send, { model: "other" })
      assert.deepStrictEqual((yield* pool.snapshot).outages, [])
      assert.deepStrictEqual(named(yield* events, "provider.closed").map(({ model }) => model), ["gone"])
    }))

  test("F2: the provider's breaker lets no floor through beside its probes", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream(() => bad("ServerError"))
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      yield* down(pool)
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(10 * second)
      assert.lengthOf(named(yield* events, "pool.floor"), 0)
      assert.strictEqual((yield* provider.sent).length, 20)
      yield* Fiber.interrupt(call)
    }))
})

describe("what is not the key's own", () => {
  test("F2: a request that fails alike on 3 keys that answer others is wrong itself, and costs them nothing", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.model === "poison" ? bad("ServerError") : ok())
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain, retry: Schedule.recurs(5), retryTokens: false })
      for (let i = 0; i < 8; i++) yield* pool.run(provider.send)
      for (let i = 0; i < 10; i++) {
        const before = (yield* provider.sent).length
        assert.strictEqual((yield* Effect.flip(pool.run(provider.send, { model: "poison" })))._tag, "Failed")
        assert.strictEqual((yield* provider.sent).length - before, 3)
      }
      const { keys: after, outages } = yield* pool.snapshot
      assert.deepStrictEqual([outages, after.map(({ breaker }) => breaker)], [[], Array(4).fill("closed")])
      yield* TestClock.adjust(11 * second)
      const before = (yield* provider.sent).length
      const call = yield* Effect.fork(Effect.exit(pool.run(provider.send, { model: "poison" })))
      yield* TestClock.adjust(5 * second)
      assert.isAbove((yield* provider.sent).length - before, 3, "keys that have not answered for long prove nothing")
      yield* Fiber.interrupt(call)
    }))

  test("F2: two keys that worked and are refused within a minute have a cause in common", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain })
      for (const label of "abc") yield* report(pool, label, Outcome.success)
      const revoked = { explicit: true, code: "invalid_api_key" }
      yield* report(pool, "a", "Unauthorized", revoked)
      assert.strictEqual(yield* closedFor(pool, "a"), 24 * 60 * minute)
      yield* report(pool, "d", "Unauthorized", revoked)
      assert.strictEqual(yield* closedFor(pool, "a"), 24 * 60 * minute, "a key that never worked says nothing")
      yield* TestClock.adjust(59 * second)
      yield* report(pool, "b", "Unauthorized", revoked)
      assert.strictEqual(yield* closedFor(pool, "a"), second)
      assert.strictEqual(yield* closedFor(pool, "b"), minute)
      yield* TestClock.adjust(minute)
      yield* report(pool, "c", "Unauthorized", revoked)
      assert.strictEqual(yield* closedFor(pool, "c"), 24 * 60 * minute, "a minute later it is another matter")
    }))

  test("F1, F2: a shared cause never shortens a told wait", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      for (const label of "ab") yield* report(pool, label, Outcome.success)
      yield* report(pool, "a", "Unauthorized", { wait: 5 * minute })
      yield* report(pool, "b", "Unauthorized", { wait: 5 * minute })
      assert.deepStrictEqual([yield* closedFor(pool, "a"), yield* closedFor(pool, "b")], [300_020, 300_020])
    }))

  test("C9: three keys refused alike are suspected to be one: one call per second tries until the limit is over", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream((sent) =>
        sent.at < 20 * second ? bad("RateLimited", { wait: 20 * second - sent.at }) : ok()
      )
      const pool = yield* KeyPool.make({ keys: keys("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"), ...plain })
      const calls = yield* Effect.forkAll(Array.from({ length: 10 }, () => pool.run(provider.send)))
      yield* TestClock.adjust(19_999)
      assert.deepStrictEqual(
        named(yield* events, "group.suspected").map(({ keyIds }) => keyIds.length),
        [3]
      )
      const sent = (yield* provider.sent).map(({ at }) => at)
      assert.isAtMost(sent.filter((at) => at === 0).length, 13, "three, those that left with them, and a canary")
      assert.isAtMost(sent.filter((at) => at > 0).length, 19)
      yield* TestClock.adjust(2 * second)
      yield* Fiber.join(calls)
    }))

  /** Calls `every` so many milliseconds, and what the provider saw of each. */
  const arriving = (pool: KeyPool.Service, provider: { readonly send: Send }, count: number, every: number) =>
    Effect.gen(function*() {
      for (let i = 0; i < count; i++) {
        yield* Effect.forkScoped(Effect.exit(pool.run(provider.send)))
        yield* TestClock.adjust(every)
      }
    })

  test("C9: once two keys were refused alike, a key of which nothing is known is not tried by two calls", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => bad("RateLimited", { wait: 45 * second - sent.at }, 40))
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...plain })
      yield* arriving(pool, provider, 40, 25)
      yield* TestClock.adjust(40 * second)
      const labels = (yield* provider.sent).map(({ label }) => label)
      assert.deepStrictEqual(labels.sort(), [..."abcde"])
    }))

  test("C9: nobody waits longer for what another call finds out than twice as long as the refusals took", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) =>
        "ab".includes(sent.label) ? bad("RateLimited", { wait: minute }, 40) : ok(5 * second)
      )
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      yield* arriving(pool, provider, 10, 0)
      const ofC = Effect.map(provider.sent, (sent) => sent.filter(({ label }) => label === "c").map(({ at }) => at))
      const before = (yield* ofC).length
      assert.strictEqual(before, 3, "they left before anybody was refused")
      yield* TestClock.adjust(79)
      assert.strictEqual((yield* ofC).length, before)
      yield* TestClock.adjust(second)
      const later = (yield* ofC).slice(before)
      assert.strictEqual(later.length, 7)
      assert.strictEqual(later[0], 80)
    }))

  test("C1, C9: keys that have answered of late are not held back by the refusals of two others", () =>
    Effect.gen(function*() {
      const refused = new Set<string>()
      const provider = yield* upstream((sent) =>
        refused.has(sent.label) ? bad("RateLimited", { wait: minute }, 40) : ok(300)
      )
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      yield* arriving(pool, provider, 3, 0)
      yield* TestClock.adjust(second)
      refused.add("a").add("b")
      yield* arriving(pool, provider, 9, 0)
      yield* TestClock.adjust(40)
      const { inFlight, waiting } = yield* pool.snapshot
      assert.deepStrictEqual([inFlight, waiting], [9, 0])
    }))

  test("C2, C9: who may not wait as long as a doubt lasts is not held up by it", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) =>
        "ab".includes(sent.label) ? bad("RateLimited", { wait: minute }, 40) : ok(5 * second)
      )
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      yield* arriving(pool, provider, 3, 0)
      yield* TestClock.adjust(40)
      const before = (yield* provider.sent).length
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      for (const options of [{ maxWait: 0 }, { maxWait: 30 }, { budget: 900 }]) {
        yield* Effect.forkScoped(pool.run(provider.send).pipe(CallOptions.withOptions(options)))
        yield* calm
      }
      assert.deepStrictEqual((yield* provider.trace).slice(before), ["c@40", "c@40", "c@40"])
      yield* Effect.forkScoped(pool.run(provider.send))
      yield* calm
      assert.strictEqual((yield* pool.snapshot).waiting, 2, "one that was refused, and who has time")
    }))

  test("F5, C9: a doubt puts off no call that the floor lets through", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("RateLimited", {}, 10))
      const pool = yield* KeyPool.make({
        keys: keys("ab"),
        cooldowns: { rateLimited: { first: "20 seconds" }, jitter: 0 }
      })
      yield* arriving(pool, provider, 1, 0)
      yield* TestClock.adjust(5 * second)
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@10", "a@1020", "b@2030", "a@3040", "b@4050"])
    }))

  test("C9: a canary's success clears the suspicion; another group, code or model raises none", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const wait = { wait: minute }
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...plain })
      for (const label of "abc") yield* report(pool, label, "RateLimited", wait)
      assert.lengthOf(named(yield* events, "group.suspected"), 1)
      // The first canary leaves at once, the next a second later.
      const canary = yield* pool.lease
      const next = yield* Effect.fork(Effect.scoped(pool.lease))
      yield* TestClock.adjust(999)
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      yield* canary.commit(Outcome.success)
      yield* Fiber.join(next)
      assert.strictEqual((yield* keyOf(pool, "e")).closed, undefined)
      const grouped = yield* KeyPool.make({
        keys: keys("abcde", { a: { quotaGroup: "g" }, b: { quotaGroup: "g" } }),
        ...plain,
        name: "grouped"
      })
      const leases = yield* Effect.all(Array.from({ length: 5 }, () => grouped.lease))
      for (const lease of leases.filter(({ key }) => "abc".includes(key.label))) {
        yield* lease.commit(Outcome.fault(Fault.make("RateLimited", wait)))
      }
      for (const lease of leases.filter(({ key }) => "d".includes(key.label))) {
        yield* lease.commit(Outcome.fault(Fault.make("RateLimited", { ...wait, code: "other" })))
      }
      assert.lengthOf(named(yield* events, "group.suspected"), 1)
    }))

  test("C9: a suspicion lasts no longer than until the first key is there again that was told when", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain, name: "told" })
      const leases = yield* Effect.all(Array.from({ length: 4 }, () => pool.lease))
      const waits: Record<string, number> = { a: 5, b: 20, c: 20, d: 20 }
      for (const lease of leases.toSorted((x, y) => x.key.label.localeCompare(y.key.label))) {
        // Long ago enough to be no reason for the suspicion.
        if (lease.key.label === "b") yield* TestClock.adjust(2 * second)
        yield* lease.commit(
          Outcome.fault(Fault.make("RateLimited", { wait: (waits[lease.key.label] ?? 0) * second }))
        )
      }
      yield* TestClock.adjust(2_999)
      const calls = yield* Effect.forkAll(
        Array.from({ length: 2 }, () => Effect.scoped(Effect.zipRight(pool.lease, Effect.never)))
      )
      yield* TestClock.adjust(20)
      assert.strictEqual((yield* pool.snapshot).waiting, 2)
      yield* TestClock.adjust(1)
      assert.strictEqual((yield* pool.snapshot).waiting, 0)
      yield* Fiber.interrupt(calls)
    }))
})
