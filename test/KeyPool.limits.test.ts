/** What a pool does about limits, on the virtual clock. */
import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Ref from "effect/Ref"
import * as TestClock from "effect/TestClock"
import type * as AnnouncedLimit from "../src/AnnouncedLimit.js"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import { bad, calm, Failed, idOf, keyOf, keys, ok, plain, report, test, upstream } from "./support/pooled.js"

const patient = { ...plain, budget: "10 minutes" } as const

describe("A5: recent use", () => {
  const lab = Effect.gen(function*() {
    const provider = yield* upstream()
    const pool = yield* KeyPool.make({ keys: keys("abc"), strategy: "least-used", ...plain })
    const send = (times: number) => Effect.replicateEffect(pool.run(provider.send), times, { discard: true })
    const counts = Effect.map(
      provider.sent,
      (sent) => ["a", "b", "c", "d"].map((label) => sent.filter((one) => one.label === label).length)
    )
    return { pool, send, counts }
  })

  test("a key that joins gets its share from then on, and no more; so does one that is reset", () =>
    Effect.gen(function*() {
      const { counts, pool, send } = yield* lab
      yield* send(90)
      yield* pool.keyring.add({ secret: "secret-d", label: "d" })
      yield* send(40)
      assert.deepStrictEqual(yield* counts, [40, 40, 40, 10])
      yield* report(pool, "a", "Unauthorized")
      yield* send(90)
      const before = yield* counts
      yield* pool.reset(yield* idOf(pool, "a"))
      yield* send(40)
      assert.deepStrictEqual((yield* counts).map((count, i) => count - (before[i] ?? 0)), [10, 10, 10, 10])
    }))

  test("what was used counts half as much after a minute", () =>
    Effect.gen(function*() {
      const { counts, pool, send } = yield* lab
      const [b, c] = [yield* idOf(pool, "b"), yield* idOf(pool, "c")]
      yield* pool.disable(b)
      yield* pool.disable(c)
      yield* send(7)
      yield* TestClock.adjust("2 minutes")
      yield* pool.enable(b)
      yield* pool.disable(yield* idOf(pool, "a"))
      yield* send(1)
      yield* pool.enable(yield* idOf(pool, "a"))
      // Seven of two minutes ago weigh less than two of now, and more than one.
      yield* send(2)
      assert.deepStrictEqual(yield* counts, [8, 2, 0, 0])
    }))
})

describe("A1: declared limits", () => {
  test(
    "100 fibers at 10 per minute: exactly 10 in each window, and none refused upstream",
    () =>
      Effect.gen(function*() {
        const provider = yield* upstream(() => ok(700))
        const pool = yield* KeyPool.make({
          keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
          ...patient,
          budget: "1 hour"
        })
        const all = yield* Effect.fork(
          Effect.all(Array.from({ length: 100 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
        )
        yield* TestClock.adjust("20 minutes")
        assert.strictEqual((yield* Fiber.join(all)).length, 100)
        const instants = (yield* provider.sent).map(({ at }) => at)
        for (const from of instants) {
          // Whenever the provider's window begins.
          assert.isAtMost(instants.filter((at) => at >= from && at < from + 60_000).length, 10)
        }
        // Each slot is taken again at the very instant it is free.
        assert.deepStrictEqual([...new Set(instants)], Array.from({ length: 10 }, (_, i) => i * 60_700))
      })
  )

  test("keys of one group share it; another group is not held up", () =>
    Effect.gen(function*() {
      const limits = { requestsPerMinute: 2 }
      const provider = yield* upstream()
      const pool = yield* KeyPool.make({
        keys: keys("abc", {
          a: { quotaGroup: "g", limits },
          b: { quotaGroup: "g", limits: { requestsPerMinute: 3 } },
          c: { quotaGroup: "h", limits }
        }),
        ...plain,
        maxWait: 0
      })
      const send = Effect.option(pool.run(provider.send))
      yield* Effect.replicateEffect(send, 20)
      const labels = (yield* provider.sent).map(({ label }) => label)
      assert.strictEqual(labels.filter((label) => label !== "c").length, 2)
      assert.strictEqual(labels.filter((label) => label === "c").length, 2)
      const { closed, limits: left } = yield* keyOf(pool, "b")
      assert.deepStrictEqual(closed, { gate: "limit", until: (yield* Clock.currentTimeMillis) + 60_000 })
      assert.deepStrictEqual(left, [
        { source: "declared", unit: "requests", limit: 2, windowMillis: 60_000, remaining: 0 }
      ])
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* keyOf(pool, "b")).closed, undefined)
    }))

  test("C3: whose answer would come after its budget lets others go first, and is served when there are none", () =>
    Effect.gen(function*() {
      const began = yield* Clock.currentTimeMillis
      const provider = yield* upstream(() => ok(5_000))
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { concurrency: 1 } } }),
        ...plain,
        budget: "2 minutes"
      })
      // Answers take 5 seconds, as is known after 20.
      for (let i = 0; i < 20; i++) {
        const known = yield* Effect.fork(pool.run(provider.send))
        yield* TestClock.adjust("5 seconds")
        yield* Fiber.join(known)
      }
      const run = (budget: Duration.DurationInput) =>
        Effect.fork(
          pool.run(provider.send).pipe(
            Effect.zipRight(Clock.currentTimeMillis),
            Effect.map((at) => at - began - 100_000),
            CallOptions.withOptions({ budget })
          )
        )
      const busy = yield* run("1 minute")
      const late = yield* run("7 seconds")
      const timely = yield* run("1 minute")
      yield* TestClock.adjust("20 seconds")
      assert.strictEqual(yield* Fiber.join(busy), 5_000)
      assert.strictEqual(yield* Fiber.join(timely), 10_000)
      assert.strictEqual((yield* Effect.flip(Fiber.join(late)))._tag, "AllKeysExhausted")
      // With nobody behind, it is served all the same.
      const again = yield* run("1 minute")
      const alone = yield* run("7 seconds")
      yield* TestClock.adjust("20 seconds")
      assert.strictEqual(yield* Fiber.join(again), 25_000)
      assert.strictEqual(yield* Fiber.join(alone), 30_000)
    }))

  test("tokens: a large request at the head is not passed by small ones behind it", () =>
    Effect.gen(function*() {
      const provider = yield* upstream()
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { tokensPerMinute: 1_000 } } }),
        ...patient
      })
      const send = (model: string, input: number) => pool.run(provider.send, { model, tokens: { input, maxOutput: 0 } })
      yield* send("first", 600)
      const large = yield* Effect.fork(send("large", 900))
      yield* calm
      const small = yield* Effect.fork(send("small", 100))
      yield* calm
      assert.strictEqual((yield* provider.sent).length, 1)
      yield* TestClock.adjust("1 minute")
      yield* Fiber.join(large)
      yield* Fiber.join(small)
      assert.deepStrictEqual((yield* provider.sent).map(({ model }) => model), ["first", "large", "small"])
    }))

  const limited = { limits: { tokensPerMinute: 1_000 } }
  for (const model of [undefined, "model"]) {
    const title = `C1, C2: tokens: who has become hopeless takes nobody along who needs less${
      model === undefined ? "" : ", of one model"
    }`
    test(title, () =>
      Effect.gen(function*() {
        const provider = yield* upstream()
        const pool = yield* KeyPool.make({ keys: keys("ab", { a: limited, b: limited }), ...patient })
        const send = (input: number, budget: Duration.DurationInput = "10 minutes") =>
          CallOptions.withOptions(
            pool.run(provider.send, { tokens: { input, maxOutput: 0 }, ...(model === undefined ? {} : { model }) }),
            { budget }
          )
        yield* send(900)
        yield* TestClock.adjust("20 seconds")
        yield* send(900)
        // The one that comes back first is not there when the time has come, the other too late for a large request.
        const large = yield* Effect.fork(Effect.flip(send(500, "50 seconds")))
        yield* calm
        const small = yield* Effect.fork(send(50, "50 seconds"))
        yield* calm
        const larger = yield* Effect.fork(Effect.flip(send(600, "50 seconds")))
        yield* calm
        assert.strictEqual((yield* pool.snapshot).waiting, 3)
        yield* pool.disable(yield* idOf(pool, "a"))
        yield* calm
        for (const lost of [large, larger]) assert.strictEqual((yield* Fiber.join(lost))._tag, "AllKeysExhausted")
        yield* Fiber.join(small)
        assert.lengthOf(yield* provider.sent, 3)
      }))
  }

  test("tokens: what was used counts, not what was estimated", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { tokensPerMinute: 1_000 } } }),
        ...plain,
        maxWait: 0
      })
      const run = (used: number, input = 800) =>
        pool.run((lease) => Effect.sync(() => lease.used({ input: used, output: 0 })), {
          tokens: { input, maxOutput: 200 }
        })
      yield* run(0)
      yield* run(1)
      const { limits } = yield* keyOf(pool, "a")
      assert.strictEqual(limits[0]?.remaining, 999)
      assert.strictEqual((yield* Effect.flip(run(0, 1_000)))._tag, "AllKeysExhausted")
    }))

  test("what was not sent is given back, what was sent is not", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { requestsPerMinute: 5 } } }),
        ...patient
      })
      const left = Effect.map(keyOf(pool, "a"), ({ limits }) => limits[0]?.remaining)
      const sent = yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      assert.strictEqual(yield* left, 4)
      yield* Fiber.interrupt(sent)
      assert.strictEqual(yield* left, 4)
      yield* Effect.scoped(pool.lease)
      assert.strictEqual(yield* left, 3)
    }))

  test("a wait that would be too long fails at once", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { requestsPerMinute: 1 } } }),
        ...plain,
        budget: "59 seconds"
      })
      yield* pool.run(() => Effect.void)
      const failed = yield* Effect.flip(pool.run(() => Effect.void))
      if (failed._tag !== "AllKeysExhausted") return assert.fail(failed._tag)
      assert.deepStrictEqual(failed.reasons.map(({ gate }) => gate), ["limit"])
      assert.strictEqual(failed.nextAvailableAt, (yield* Clock.currentTimeMillis) + 60_000)
    }))
})

describe("A2: announced limits", () => {
  for (
    const [order, takes] of [
      ["the order they were sent", (remaining: number) => 100 - remaining],
      ["reverse order", (remaining: number) => 10 * remaining]
    ] as const
  ) {
    test(`A2: what was in flight before anything was known is counted once, answered in ${order}`, () =>
      Effect.gen(function*() {
        for (const limit of [2, 10]) {
          const pool = yield* KeyPool.make({ name: `${limit}`, keys: keys("a"), ...plain, maxWait: 0 })
          let left = limit
          const call = pool.run((lease) =>
            Effect.gen(function*() {
              const remaining = --left
              assert.isAtLeast(remaining, 0, "no more than there are")
              yield* Effect.sleep(takes(remaining))
              lease.announced([{ name: "requests", limit, remaining, resetMillis: 60_000 }])
            })
          )
          const calls = yield* Effect.fork(Effect.replicateEffect(call, limit / 2, { concurrency: "unbounded" }))
          yield* TestClock.adjust("1 second")
          yield* Fiber.join(calls)
          assert.deepInclude((yield* keyOf(pool, "a")).limits?.[0], { remaining: limit / 2 })
          const others = yield* Effect.fork(
            Effect.replicateEffect(Effect.exit(call), limit, { concurrency: "unbounded" })
          )
          yield* TestClock.adjust("1 second")
          const ends = yield* Fiber.join(others)
          assert.strictEqual(ends.filter(Exit.isSuccess).length, limit / 2, "all that is left, and no more")
        }
      }))
  }

  const said = (remaining: number, resetMillis: number): ReadonlyArray<AnnouncedLimit.Said> => [
    { name: "requests", limit: 10, remaining, resetMillis }
  ]

  test("nothing left closes the key for that model until the reset, and not a moment longer", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...patient })
      const run = (model: string | undefined, limits: ReadonlyArray<AnnouncedLimit.Said> = []) =>
        pool.run((lease) => Effect.as(Effect.sync(() => lease.announced(limits)), lease.key.label), { model })
      assert.strictEqual(yield* run("m", said(0, 9_000)), "a")
      const now = yield* Clock.currentTimeMillis
      assert.deepStrictEqual((yield* keyOf(pool, "a")).closedModels, [{
        model: "m",
        gate: "limit",
        until: now + 9_000
      }])
      assert.strictEqual(yield* run("m"), "b")
      assert.strictEqual(yield* run("m", said(0, 9_500)), "b")
      assert.strictEqual(yield* run("other"), "a")
      const waiting = yield* Effect.fork(Effect.zip(run("m"), Clock.currentTimeMillis))
      yield* TestClock.adjust(8_999)
      assert.isNull(waiting.unsafePoll())
      yield* TestClock.adjust(1)
      assert.deepStrictEqual(yield* Fiber.join(waiting), ["a", now + 9_000])
    }))

  for (const spec of [{}, { quotaGroup: "g" }]) {
    const title = `A2, K5: what a call tells of a model that was under way at a reset holds${
      "quotaGroup" in spec ? ", of a group" : ""
    }`
    test(title, () =>
      Effect.gen(function*() {
        const pool = yield* KeyPool.make({ keys: keys("a", { a: spec }), ...plain, maxWait: 0 })
        const run = (limits: ReadonlyArray<AnnouncedLimit.Said>, takes: Duration.DurationInput = 0) =>
          pool.run(
            (lease) => Effect.zipRight(Effect.sleep(takes), Effect.sync(() => lease.announced(limits))),
            { model: "m" }
          )
        yield* Effect.replicateEffect(run(said(9, 60_000)), 9)
        const last = yield* Effect.fork(run(said(3, 50_000), "1 second"))
        yield* calm
        yield* pool.reset(yield* idOf(pool, "a"))
        yield* TestClock.adjust("1 second")
        yield* Fiber.join(last)
        const ends = yield* Effect.replicateEffect(Effect.exit(run([])), 20)
        assert.strictEqual(ends.filter(Exit.isSuccess).length, 3)
      }))
  }

  test("where more is asked for than limits let through, the key whose window ends first is used; else all in turn", () =>
    Effect.gen(function*() {
      const used = (perSecond: number, endOfB: number) =>
        Effect.gen(function*() {
          const pool = yield* KeyPool.make({ keys: keys("abc"), ...patient })
          const ends: Readonly<Record<string, number>> = { a: 50_000, b: endOfB, c: 40_000 }
          const left: Record<string, number> = { a: 60, b: 60, c: 60 }
          const began = yield* Clock.currentTimeMillis
          const run = pool.run((lease) =>
            Effect.map(Clock.currentTimeMillis, (now) => {
              const { label } = lease.key
              const remaining = (left[label] ?? 0) - 1
              left[label] = remaining
              lease.announced([{
                name: "requests",
                limit: 60,
                remaining,
                resetMillis: began + (ends[label] ?? 0) - now
              }])
              return label
            })
          )
          let labels = ""
          for (let i = 0; i < 5 * perSecond; i++) {
            labels += yield* run
            yield* TestClock.adjust(1_000 / perSecond)
          }
          return labels
        })
      // Once each of them has told of its limit.
      assert.strictEqual(yield* used(5, 20_000), "abc" + "b".repeat(22))
      assert.strictEqual(yield* used(1, 20_000), "abcab")
      // Nobody needs to know the third while something of the second will be lost in any case.
      assert.strictEqual(yield* used(5, 8_000), "a" + "b".repeat(24))
    }))

  test("those that waited are served one by one as a bucket fills", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...patient })
      const run = (limits: ReadonlyArray<AnnouncedLimit.Said>) =>
        pool.run((lease) => Effect.zipRight(Effect.sync(() => lease.announced(limits)), Clock.currentTimeMillis))
      // One comes back per second.
      const began = yield* run(said(9, 1_000))
      for (let used = 2; used <= 10; used++) yield* run(said(10 - used, used * 1_000))
      const served = yield* Effect.fork(Effect.all([run([]), run([])], { concurrency: "unbounded" }))
      yield* TestClock.adjust("10 seconds")
      assert.deepStrictEqual((yield* Fiber.join(served)).map((at) => at - began), [1_112, 2_223])
    }))
})

describe("A3: learned limits", () => {
  test("after the end of a told wait no herd, and what is measured is the pace", () =>
    Effect.gen(function*() {
      // One fits every 2 seconds; refusals tell the wait to the millisecond.
      let free = 0
      const provider = yield* upstream(({ at }) => {
        if (at < free) return bad("RateLimited", { wait: free - at, scope: "key" })
        free = at + 2_000
        return ok()
      })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...patient, rateLimitRotations: 100, rotations: 100 })
      const calls = yield* Effect.fork(
        Effect.all(Array.from({ length: 30 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
      )
      yield* TestClock.adjust("5 minutes")
      yield* Fiber.join(calls)
      const sent = yield* provider.sent
      assert.isAtLeast(sent.length, 31)
      // Those of the first moment, and some while it is learned.
      assert.isAtMost(sent.length, 30 + 29 + 6)
    }))

  test("refusals of tokens, and of a key within its group, teach nothing of requests", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("ab", { a: { quotaGroup: "g" }, b: { quotaGroup: "g" } }),
        ...patient
      })
      const now = yield* Clock.currentTimeMillis
      yield* report(pool, "a", Outcome.fault(Fault.make("RateLimited", { wait: "2 seconds", unit: "tokens" })))
      assert.deepStrictEqual((yield* keyOf(pool, "b")).closed, {
        gate: "cooldown",
        fault: "RateLimited",
        until: now + 2_020
      })
      yield* TestClock.adjust(2_020)
      for (let i = 0; i < 5; i++) yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      assert.strictEqual((yield* pool.snapshot).inFlight, 5)
    }))

  test("after refusals of tokens, a window is not asked for more than it let through", () =>
    Effect.gen(function*() {
      // 1,000 tokens in each minute, of which the first began 30 s ago.
      let used = 0
      let window = 0
      const provider = yield* upstream(({ at }) => {
        const current = Math.floor((at + 30_000) / 60_000)
        if (current !== window) used = 0
        window = current
        used += 50
        const wait = (current + 1) * 60_000 - 30_000 - at
        return used > 1_000 ? bad("RateLimited", { wait, scope: "key", unit: "tokens" }) : ok()
      })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...patient, rateLimitRotations: 100, rotations: 100 })
      const send = pool.run(provider.send, { tokens: { input: 40, maxOutput: 10 } })
      const calls = yield* Effect.fork(
        Effect.all(Array.from({ length: 90 }, () => Effect.delay(send, 100)), { concurrency: "unbounded" })
      )
      yield* TestClock.adjust("9 minutes")
      yield* Fiber.join(calls)
      const at = yield* Effect.map(provider.sent, (sent) => sent.map(({ at }) => at))
      // After two windows it is known how much one holds.
      assert.deepStrictEqual(
        [90_020, 150_000].map((from) => at.filter((at) => at >= from && at < from + 30_000).length),
        [20, 20]
      )
    }))

  test("after a rate limit, and before a success, what one attempt finds out about a key is not tried by two", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(({ label }) =>
        label === "e" ? ok() : bad("RateLimited", { wait: "20 seconds" }, 40)
      )
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...patient })
      const first = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(45)
      // The first is with its second key by now, whose turn it would be.
      const second = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(1_000)
      yield* Fiber.join(first)
      yield* Fiber.join(second)
      const sent = (yield* provider.sent).map(({ label }) => label)
      assert.strictEqual(
        new Set(sent.filter((label) => label !== "e")).size,
        sent.filter((label) => label !== "e").length
      )
    }))

  test("F1: a told end is met exactly, also when it was told twice and nothing was accepted between", () =>
    Effect.gen(function*() {
      const told = bad("RateLimited", { wait: "2 seconds" })
      const provider = yield* upstream({ a: [told, told, ok()] })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...patient })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("5 seconds")
      yield* Fiber.join(call)
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "a@2020", "a@4040"])
    }))

  for (const [where, quotaGroup] of [["to another group", "h"], ["out of all groups", undefined]] as const) {
    test(`A1, K5: what an attempt took of a group is that group's, though its key goes over ${where} meanwhile`, () =>
      Effect.gen(function*() {
        const limits = { requestsPerMinute: 2 }
        const remaining = (pool: KeyPool.Service, label: string) =>
          Effect.map(keyOf(pool, label), (key) => key.limits?.map(({ remaining }) => remaining))
        const provider = yield* upstream(() => ok(1_000))
        const pool = yield* KeyPool.make({
          keys: keys("ab", { a: { quotaGroup: "g", limits }, b: { quotaGroup: "g", limits } }),
          strategy: "sequential-then-rotate",
          ...plain
        })
        const call = yield* Effect.fork(pool.run(provider.send))
        yield* calm
        yield* pool.keyring.add({ secret: "secret-a", label: "a", quotaGroup, limits })
        yield* TestClock.adjust("1 second")
        assert.strictEqual(yield* Fiber.join(call), "a")
        assert.deepStrictEqual([yield* remaining(pool, "a"), yield* remaining(pool, "b")], [[2], [1]])
        yield* TestClock.adjust("1 minute")
        assert.deepStrictEqual([yield* remaining(pool, "a"), yield* remaining(pool, "b")], [[2], [2]])
      }))
  }

  test("F3: amounts that are no numbers, or no amounts, close no key and open none", () =>
    Effect.gen(function*() {
      const limits = { tokensPerMinute: 100 }
      for (const amount of [Number.NaN, Infinity, -1e9, 1e300]) {
        const settings = { ...plain, maxWait: 0 }
        const asked = yield* KeyPool.make({
          name: `asked ${amount}`,
          keys: keys("ab", { a: { limits }, b: { limits } }),
          ...settings
        })
        yield* asked.run(() => Effect.void, { tokens: { input: amount } })
        yield* asked.run(() => Effect.void, { tokens: { maxOutput: amount } })
        const used = yield* KeyPool.make({ name: `used ${amount}`, keys: keys("a", { a: { limits } }), ...settings })
        yield* used.run((lease) => Effect.sync(() => lease.used({ input: amount, output: 1 })), {
          tokens: { input: 7 }
        })
        assert.deepStrictEqual((yield* keyOf(used, "a")).limits?.map(({ remaining }) => remaining), [93])
        const told = yield* KeyPool.make({ name: `told ${amount}`, keys: keys("a"), ...settings })
        for (const said of [{ resetMillis: amount }, { remaining: amount }, { limit: amount, remaining: 1 }]) {
          const one = { name: "requests", limit: 10, remaining: 0, resetMillis: 1_000, ...said }
          yield* told.run((lease) => Effect.sync(() => lease.announced([one])))
          yield* TestClock.adjust("2 minutes")
        }
        for (const label of ["a", "b"]) {
          const [left] = (yield* keyOf(asked, label)).limits ?? []
          assert.strictEqual(left?.remaining, 100)
        }
        yield* asked.run(() => Effect.void, { tokens: { input: 90 } })
        yield* used.run(() => Effect.void, { tokens: { input: 90 } })
        yield* told.run(() => Effect.void)
      }
    }))
})

describe("A3: how much may run at once, learned from refusals", () => {
  /** Each key runs four at once, each for 4 seconds, and refuses the fifth after 40 ms. */
  const lab = (fault: Fault.Fault) =>
    Effect.gen(function*() {
      const running = yield* Ref.make<Readonly<Record<string, number>>>({})
      const refused = yield* Ref.make(0)
      const add = (label: string, n: number) =>
        Ref.update(running, (all) => ({ ...all, [label]: (all[label] ?? 0) + n }))
      const send = ({ key: { label } }: KeyPool.Lease) =>
        Effect.gen(function*() {
          if (((yield* Ref.get(running))[label] ?? 0) >= 4) {
            yield* Ref.update(refused, (n) => n + 1)
            yield* Effect.sleep(40)
            return yield* new Failed({ fault })
          }
          yield* Effect.acquireUseRelease(add(label, 1), () => Effect.sleep(4_000), () => add(label, -1))
        })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...patient })
      // A tenth more than both keys can serve.
      const all = yield* Effect.fork(
        Effect.forEach(
          Array.from({ length: 100 }, (_, i) => Effect.delay(pool.run(send), i * 455)),
          (call) => Effect.exit(call),
          { concurrency: "unbounded" }
        )
      )
      yield* TestClock.adjust("3 minutes")
      const exits = yield* Fiber.join(all)
      return { answered: exits.filter(Exit.isSuccess).length, refused: yield* Ref.get(refused) }
    })

  test(
    "a provider that names it is not asked for more than ran beside what it refused, whatever wait it tells",
    () =>
      Effect.gen(function*() {
        const { answered, refused } = yield* lab(Fault.make("RateLimited", { unit: "concurrency", wait: "1 second" }))
        assert.strictEqual(answered, 100)
        assert.isAtMost(refused, 6)
      })
  )

  test(
    "a provider that says nothing is believed the second time, and is not asked by a herd meanwhile",
    () =>
      Effect.gen(function*() {
        const { answered, refused } = yield* lab(Fault.make("RateLimited"))
        assert.strictEqual(answered, 100)
        assert.isAtMost(refused, 8)
      })
  )

  test(
    "a provider that counts requests and says nothing is not taken for one that counts what runs",
    () =>
      Effect.gen(function*() {
        const taken: Record<number, number> = {}
        // Twenty in each minute, each for 20 seconds: all run while the next are refused.
        const send = () =>
          Effect.gen(function*() {
            const window = Math.floor((yield* Clock.currentTimeMillis) / 60_000)
            const used = taken[window] ?? 0
            if (used >= 20) {
              yield* Effect.sleep(40)
              return yield* new Failed({ fault: Fault.make("RateLimited") })
            }
            taken[window] = used + 1
            yield* Effect.sleep(20_000)
          })
        const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, budget: "60 seconds" })
        const all = yield* Effect.fork(
          Effect.forEach(
            Array.from({ length: 150 }, (_, i) => Effect.delay(pool.run(send), i * 2_000)),
            (call) => Effect.exit(call),
            { concurrency: "unbounded" }
          )
        )
        yield* TestClock.adjust("7 minutes")
        yield* Fiber.join(all)
        assert.deepStrictEqual(Object.values(taken).slice(0, 5), [20, 20, 20, 20, 20])
      })
  )
})
