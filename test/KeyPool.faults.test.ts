import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Random from "effect/Random"
import * as TestClock from "effect/TestClock"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import {
  bad,
  calm,
  closedFor,
  idOf,
  keyOf,
  keys,
  named,
  ok,
  once,
  plain,
  report,
  test,
  trip,
  upstream,
  watch
} from "./support/pooled.js"

const second = 1_000
const minute = 60 * second
const hour = 60 * minute

/** How long a key is closed after each of so many faults, each one the trial at the end of the one before. */
const ladder = (pool: KeyPool.Service, times: number, kind: Fault.Kind, details: Fault.Details = {}) =>
  Effect.gen(function*() {
    const waits: Array<number | undefined> = []
    for (let i = 0; i < times; i++) {
      yield* report(pool, "a", kind, details)
      const wait = yield* closedFor(pool, "a")
      waits.push(wait)
      yield* TestClock.adjust(wait ?? 0)
    }
    return waits
  })

/** Each key's faults are its own, so that all may be open at once. */
const alone = { attribution: "per-key" } as const
const inGroup = { quotaGroup: "g" }
const closedLabels = (pool: KeyPool.Service) =>
  Effect.map(
    pool.snapshot,
    (snapshot) => snapshot.keys.filter((key) => key.closed !== undefined).map((key) => key.label)
  )

describe("A4: keys that are benched together", () => {
  test("after guesses they come back at instants of their own, none of them early, and told ends are met", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abcdef"), floor: false, attribution: "per-key" })
      const leases = yield* Effect.replicateEffect(pool.lease, 6)
      yield* Effect.forEach(leases, ({ commit, key }) =>
        commit(Outcome.fault(
          Fault.make("RateLimited", key.label < "e" ? {} : { wait: 2_000 })
        )))
      const until = yield* Effect.forEach("abcdef", (label) => closedFor(pool, label))
      const guessed = until.slice(0, 4).map((millis) => millis ?? 0)
      assert.strictEqual(new Set(guessed).size, 4)
      for (const millis of guessed) {
        assert.isAtLeast(millis, 1_000)
        assert.isAtMost(millis, 1_250)
      }
      assert.deepStrictEqual(until.slice(4), [2_020, 2_020])
    }))
})

describe("fault table", () => {
  test("RateLimited: a told wait is met exactly, with its guard, and never opens the breaker", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      assert.deepStrictEqual(yield* ladder(pool, 5, "RateLimited", { wait: 2 * second }), [
        2_020,
        2_020,
        2_020,
        2_020,
        2_020
      ])
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("RateLimited: a measured wait as a told one", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: 3 * second, provenance: "measured" })
      assert.strictEqual(yield* closedFor(pool, "a"), 3_020)
    }))

  test("RateLimited: guesses double from 1 s to 60 s, and start again after a success", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, breaker: { threshold: 100, rate: false } })
      assert.deepStrictEqual(yield* ladder(pool, 8, "RateLimited"), [
        1 * second,
        2 * second,
        4 * second,
        8 * second,
        16 * second,
        32 * second,
        60 * second,
        60 * second
      ])
      yield* report(pool, "a", Outcome.success)
      assert.deepStrictEqual(yield* ladder(pool, 2, "RateLimited"), [1 * second, 2 * second])
    }))

  test("RateLimited: several calls in flight that bring the same news make one guess", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("RateLimited", {}, 100), bad("RateLimited", {}, 200), ok()] })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* Effect.fork(Effect.all([pool.run(provider.send), pool.run(provider.send)], { concurrency: "unbounded" }))
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* closedFor(pool, "a"), 1 * second)
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* closedFor(pool, "a"), 1 * second, "the second guess is as long as the first")
    }))

  test("RateLimited: late news of a cooldown that is over make no longer guess", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const [first, late] = yield* Effect.all([pool.lease, pool.lease])
      const limited = Outcome.fault(Fault.make("RateLimited"))
      yield* first.commit(limited)
      yield* TestClock.adjust(1_500)
      yield* late.commit(limited)
      assert.strictEqual(yield* closedFor(pool, "a"), 1 * second)
    }))

  test("RateLimited: a limit told to one key holds for its group, whatever said so", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc", { a: inGroup, b: inGroup }), ...plain, ...once })
      const answer = yield* pool.run((lease) =>
        lease.key.label === "c" ? Effect.succeed("c") : Effect.fail({ status: 429, retryAfter: 5_000 })
      )
      assert.strictEqual(answer, "c")
      assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b"])
      assert.strictEqual(yield* closedFor(pool, "b"), 5_020)
    }))

  test("RateLimited: a guess counts once on the breaker, however many answers bring it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const leases = yield* Effect.all(Array.from({ length: 5 }, () => pool.lease))
      yield* Effect.forEach(leases, (lease) => lease.commit(Outcome.fault(Fault.make("RateLimited"))))
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      yield* TestClock.adjust(second)
      yield* ladder(pool, 1, "RateLimited")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      yield* report(pool, "a", "RateLimited")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open", "the third guess in a row")
    }))

  test("RateLimited: the group is closed where there is one, else the key", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc", { a: inGroup, b: inGroup }), ...plain })
      yield* report(pool, "a", "RateLimited", { scope: "group", wait: 5 * second })
      assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b"])
      yield* report(pool, "c", "RateLimited", { scope: "group", wait: 4 * second })
      assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b", "c"])
      yield* TestClock.adjust(4_020)
      assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b"])
      yield* TestClock.adjust(1_000)
      assert.deepStrictEqual(yield* closedLabels(pool), [])
    }))

  test("RateLimited: key scope spares the rest of the group", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab", { a: inGroup, b: inGroup }), ...plain })
      yield* report(pool, "a", "RateLimited", { scope: "key", wait: 5 * second })
      assert.deepStrictEqual(yield* closedLabels(pool), ["a"])
    }))

  test("RateLimited: per model, other models go on with the same key", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) =>
        sent.model === "large" && sent.label !== "c"
          ? bad("RateLimited", { scope: "group", perModel: true, wait: 5 * second })
          : ok()
      )
      const pool = yield* KeyPool.make({ keys: keys("abc", { a: inGroup, b: inGroup }), ...plain })
      assert.strictEqual(yield* pool.run(provider.send, { model: "large" }), "c")
      assert.deepStrictEqual(
        (yield* keyOf(pool, "b")).closedModels.map(({ gate, model, until }) => [model, gate, until]),
        [
          ["large", "cooldown", 5_020]
        ]
      )
      assert.deepStrictEqual(yield* closedLabels(pool), [])
      const served = (model: string) =>
        Effect.map(
          Effect.all(Array.from({ length: 6 }, () => pool.run(provider.send, { model }))),
          (all) => [...new Set(all)].sort()
        )
      assert.deepStrictEqual(yield* served("large"), ["c"])
      assert.deepStrictEqual(yield* served("small"), ["a", "b", "c"])
    }))

  test("QuotaExhausted: until the known reset, else 1 h; the whole group; not the breaker", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc", { a: inGroup, b: inGroup }), ...plain })
      yield* report(pool, "c", "QuotaExhausted", { reset: 10 * minute })
      assert.strictEqual(yield* closedFor(pool, "c"), 10 * minute + 20)
      yield* pool.disable(yield* idOf(pool, "c"))
      const spent = Outcome.fault(Fault.make("QuotaExhausted"))
      for (let i = 0; i < 3; i++) {
        yield* TestClock.adjust(hour)
        yield* Effect.scoped(Effect.flatMap(pool.lease, (lease) => lease.commit(spent)))
        assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b", "c"])
        assert.strictEqual(yield* closedFor(pool, "b"), hour)
      }
      assert.strictEqual(yield* closedFor(pool, "a"), hour)
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("QuotaExhausted: the call rotates at once", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("QuotaExhausted"), b: bad("QuotaExhausted") })
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      assert.strictEqual(yield* pool.run(provider.send), "c")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@0", "c@0"])
    }))

  test("Unauthorized: by name 24 h, at once", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "Unauthorized", { explicit: true, code: "invalid_api_key" })
      assert.strictEqual(yield* closedFor(pool, "a"), 24 * hour)
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("Unauthorized: any other 401 climbs 60 s, 5 min, 1 h, 24 h; one probe each; not the breaker", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      assert.deepStrictEqual(yield* ladder(pool, 5, "Unauthorized"), [
        minute,
        5 * minute,
        hour,
        24 * hour,
        24 * hour
      ])
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      yield* report(pool, "a", Outcome.success)
      assert.deepStrictEqual(yield* ladder(pool, 1, "Unauthorized"), [minute])
    }))

  test("Unauthorized: the call rotates at once, without retries", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({
        a: bad("Unauthorized"),
        b: bad("Unauthorized"),
        c: bad("Unauthorized"),
        d: bad("Unauthorized")
      })
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...plain, ...once })
      assert.strictEqual(yield* pool.run(provider.send), "e")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@0", "c@0", "d@0", "e@0"])
    }))

  test("Forbidden: the key for that model, 10 min doubling to 6 h; other models go on; not the breaker", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.model === "large" ? bad("Forbidden") : ok())
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, maxWait: 0 })
      const waits: Array<number> = []
      for (let i = 0; i < 8; i++) {
        yield* Effect.flip(pool.run(provider.send, { model: "large" }))
        const until = (yield* keyOf(pool, "a")).closedModels[0]?.until ?? 0
        const wait = until - (yield* Clock.currentTimeMillis)
        waits.push(wait / minute)
        assert.strictEqual(yield* pool.run(provider.send, { model: "small" }), "a")
        yield* TestClock.adjust(wait)
      }
      assert.deepStrictEqual(waits, [10, 20, 40, 80, 160, 320, 360, 360])
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("Forbidden: fails with the caller's own error after 3 keys alike", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("Forbidden"))
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...plain })
      const error = yield* Effect.flip(pool.run(provider.send, { model: "large" }))
      assert.strictEqual(error._tag, "Failed")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@0", "c@0"])
    }))

  test("Forbidden: a region fails at once and keeps no key away", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("Forbidden", { failover: false }))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send, { model: "large" })))._tag, "Failed")
      assert.strictEqual((yield* provider.sent).length, 1)
      assert.deepStrictEqual(yield* closedLabels(pool), [])
      assert.isEmpty((yield* keyOf(pool, "a")).closedModels)
    }))

  test("TooLarge: one try where the limit is higher, if there is such a key; nobody is blamed", () =>
    Effect.gen(function*() {
      const limits = (tokensPerMinute: number) => ({ limits: { tokensPerMinute } })
      const provider = yield* upstream((sent) => sent.label === "d" ? ok() : bad("TooLarge"))
      const pool = yield* KeyPool.make({
        keys: keys("abcd", { a: limits(100), b: limits(100), c: limits(50), d: limits(500) }),
        ...plain
      })
      assert.strictEqual(yield* pool.run(provider.send), "d")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "d@0"])
      yield* pool.disable(yield* idOf(pool, "d"))
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send)))._tag, "Failed")
      assert.strictEqual((yield* provider.sent).length, 3, "no other key has a higher limit")
      for (let i = 0; i < 9; i++) yield* Effect.flip(pool.run(provider.send))
      assert.deepStrictEqual(yield* closedLabels(pool), ["d"])
    }))

  test("TooLarge: at most one such try", () =>
    Effect.gen(function*() {
      const limits = (tokensPerMinute: number) => ({ limits: { tokensPerMinute } })
      const provider = yield* upstream(() => bad("TooLarge"))
      const pool = yield* KeyPool.make({ keys: keys("abc", { b: limits(10), c: limits(20) }), ...plain })
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send)))._tag, "Failed")
      assert.strictEqual((yield* provider.sent).length, 2)
    }))

  test("Overloaded: another key at once the first time, then full jitter", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Overloaded"), b: [bad("Overloaded"), ok()], c: ok() })
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* calm
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@0"])
      yield* TestClock.adjust("1 second")
      assert.strictEqual(yield* Fiber.join(call), "c")
      // The first change of key is the first retry, so this delay is the second: below 400 ms.
      const third = (yield* provider.sent)[2]
      assert.isTrue(third !== undefined && third.at > 0 && third.at < 400)
    }))

  test("Overloaded: with no other key the first retry backs off too", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("Overloaded"), ok()] })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("1 second")
      assert.isAbove((yield* provider.sent)[1]?.at ?? 0, 0)
    }), { random: Random.fixed([0.9]) })

  test("Overloaded: a told wait binds the answering key; it counts on its breaker", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      yield* report(pool, "a", "Overloaded", { wait: 5 * second })
      assert.strictEqual(yield* closedFor(pool, "a"), 5_020)
      assert.deepStrictEqual(yield* closedLabels(pool), ["a"])
      for (let i = 0; i < 3; i++) yield* report(pool, "b", "Overloaded")
      assert.strictEqual((yield* keyOf(pool, "b")).breaker, "open")
    }))

  for (const kind of ["ServerError", "Timeout", "Network"] as const) {
    test(`${kind}: full jitter, another key preferred, no cooldown; counts on the breaker`, () =>
      Effect.gen(function*() {
        const provider = yield* upstream({ a: bad(kind) })
        const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
        const call = yield* Effect.fork(pool.run(provider.send))
        yield* calm
        assert.strictEqual((yield* provider.sent).length, 1, "it waits first")
        assert.deepStrictEqual(yield* closedLabels(pool), [])
        yield* TestClock.adjust(200)
        assert.strictEqual(yield* Fiber.join(call), "b")
        yield* report(pool, "a", kind)
        yield* report(pool, "a", kind)
        assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open")
      }))

    test(`${kind}: not replayed when the call may not be`, () =>
      Effect.gen(function*() {
        const provider = yield* upstream({ a: bad(kind) })
        const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
        const error = yield* Effect.flip(pool.run(provider.send, { replayable: false }))
        assert.strictEqual(error._tag, "Failed")
        assert.strictEqual((yield* provider.sent).length, 1)
      }))
  }

  test("Rejected: fails at once with the provider's own error, nobody is blamed", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("Rejected", { status: 400 }))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send)))._tag, "Failed")
      assert.deepStrictEqual(yield* provider.trace, ["a@0"])
      assert.deepStrictEqual(yield* closedLabels(pool), [])
    }))

  test("Rejected: model_not_found is tried once on another group", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("Rejected", { status: 404, code: "model_not_found" }))
      const pool = yield* KeyPool.make({ keys: keys("abcd", { a: inGroup, b: inGroup }), ...plain })
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send)))._tag, "Failed")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "c@0"])
      const alone = yield* KeyPool.make({ keys: keys("ab", { a: inGroup, b: inGroup }), ...plain, name: "alone" })
      assert.strictEqual((yield* Effect.flip(alone.run(provider.send)))._tag, "Failed")
      assert.strictEqual((yield* provider.sent).length, 3)
    }))
})

describe("rules of faults", () => {
  test("F1: waits merge by maximum; none is ever shortened", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const leases = yield* Effect.all(Array.from({ length: 4 }, () => pool.lease))
      const say = (i: number, kind: Fault.Kind, details: Fault.Details = {}) =>
        leases[i]?.commit(Outcome.fault(Fault.make(kind, details))) ?? Effect.void
      yield* say(0, "RateLimited", { wait: 10 * second })
      yield* say(1, "RateLimited", { wait: 2 * second })
      assert.strictEqual(yield* closedFor(pool, "a"), 10_020)
      yield* say(2, "RateLimited")
      assert.strictEqual(yield* closedFor(pool, "a"), 10_020)
      yield* say(3, "RateLimited", { wait: 20 * second })
      assert.strictEqual(yield* closedFor(pool, "a"), 20_020)
    }))

  test("F1: guessed waits get up to 250 ms more, told ones nothing", () =>
    Effect.gen(function*() {
      const labels = "abcdefgh"
      const pool = yield* KeyPool.make({ keys: keys(labels), ...alone, floor: false })
      for (const label of labels) yield* report(pool, label, "RateLimited")
      const waits = yield* Effect.forEach([...labels], (label) => closedFor(pool, label))
      for (const wait of waits) assert.isTrue(wait !== undefined && wait >= second && wait < second + 250, `${wait}`)
      assert.isAbove(new Set(waits).size, 4, "they come back at distinct instants")
      const told = yield* KeyPool.make({ keys: keys(labels), ...alone, floor: false, name: "told" })
      for (const label of labels) yield* report(told, label, "RateLimited", { wait: 3 * second })
      assert.deepStrictEqual(
        new Set(yield* Effect.forEach([...labels], (label) => closedFor(told, label))),
        new Set([3_020])
      )
    }))

  test("F1: the end of a told wait is met to the millisecond", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      yield* report(pool, "a", "RateLimited", { wait: 2 * second })
      const call = yield* Effect.fork(pool.run(() => Clock.currentTimeMillis))
      yield* TestClock.adjust(2_019)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(call), 2_020)
    }))

  test("F3: absurd waits hang no call", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: 1e15 })
      yield* report(pool, "b", "RateLimited", { wait: Number.NaN })
      yield* report(pool, "c", "RateLimited", { wait: -5 })
      assert.strictEqual(yield* closedFor(pool, "b"), second)
      assert.strictEqual(yield* closedFor(pool, "c"), second)
      const alone = yield* KeyPool.make({ keys: keys("a"), ...plain, name: "alone" })
      yield* report(alone, "a", "RateLimited", { wait: 1e15 })
      assert.strictEqual((yield* Effect.flip(alone.run(() => Effect.void)))._tag, "AllKeysExhausted")
    }))

  test("F4: a late success erases neither a cooldown nor a refusal that came after it began", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a", { a: inGroup }), ...plain })
      const early = yield* Effect.all(Array.from({ length: 4 }, () => pool.lease))
      yield* report(pool, "a", "Unauthorized", { explicit: true })
      yield* early[0]?.commit(Outcome.success) ?? Effect.void
      assert.strictEqual(yield* closedFor(pool, "a"), 24 * hour)
      yield* early[1]?.commit(Outcome.fault(Fault.make("QuotaExhausted", { reset: 48 * hour }))) ?? Effect.void
      yield* early[2]?.commit(Outcome.success) ?? Effect.void
      assert.strictEqual(yield* closedFor(pool, "a"), 48 * hour + 20)
      // Even after its end: what began before says nothing of the key now.
      yield* TestClock.adjust(48 * hour + 20)
      yield* early[3]?.commit(Outcome.success) ?? Effect.void
      yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      const held = (yield* keyOf(pool, "a")).closed
      assert.strictEqual(held?.gate, "probing", "the way back is still one probe")
    }))

  test("F5: when only guesses hold all keys, one call per second goes through, to another key each time", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream({ a: bad("ServerError"), b: bad("ServerError") })
      const pool = yield* KeyPool.make({
        keys: keys("ab"),
        ...alone,
        ...once,
        cooldowns: { jitter: 0 },
        budget: "20 seconds"
      })
      yield* trip(pool, "a")
      yield* trip(pool, "b")
      assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b"])
      yield* TestClock.adjust("10 seconds")
      const calls = yield* Effect.fork(
        Effect.all(Array.from({ length: 5 }, () => Effect.exit(pool.run(provider.send))), { concurrency: "unbounded" })
      )
      yield* TestClock.adjust("4 seconds")
      yield* Fiber.join(calls)
      const [first = "", ...rest] = yield* provider.trace
      assert.deepStrictEqual(
        [first, ...rest].map((sent) => sent.slice(1)),
        ["@10000", "@11000", "@12000", "@13000", "@14000"]
      )
      const other = first.startsWith("a") ? "b" : "a"
      assert.deepStrictEqual(rest.map((sent) => sent[0]), [other, first[0], other, first[0]])
      assert.strictEqual(named(yield* events, "pool.floor").length, 5)
      assert.deepStrictEqual(yield* closedLabels(pool), ["a", "b"], "failures of the floor change nothing")
    }))

  test("F5: a success of the floor brings its key back", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), cooldowns: { jitter: 0 } })
      yield* trip(pool, "a")
      yield* TestClock.adjust("1 second")
      yield* pool.run(() => Effect.void)
      assert.deepStrictEqual(yield* closedLabels(pool), [])
      yield* TestClock.adjust("10 seconds")
      for (let i = 0; i < 2; i++) {
        yield* report(pool, "a", "RateLimited")
        yield* TestClock.adjust("1 second")
      }
      yield* pool.run(() => Effect.void)
      assert.deepStrictEqual(yield* closedLabels(pool), [])
    }))

  test("F5: a guess is not broken in the moment it is made, but a second later", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("RateLimited"), bad("RateLimited"), ok()] })
      const pool = yield* KeyPool.make({
        keys: keys("a"),
        cooldowns: { rateLimited: { first: "30 seconds" }, jitter: 0 }
      })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(yield* Fiber.join(call), "a")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "a@1000", "a@2000"])
    }))

  test("F5: told and measured waits, quota and auth are never broken", () =>
    Effect.gen(function*() {
      const cases: ReadonlyArray<readonly [Fault.Kind, Fault.Details]> = [
        ["RateLimited", { wait: 30 * second }],
        ["RateLimited", { wait: 30 * second, provenance: "measured" }],
        ["QuotaExhausted", {}],
        ["QuotaExhausted", { reset: minute }],
        ["Unauthorized", {}],
        ["Unauthorized", { explicit: true }],
        ["Forbidden", {}]
      ]
      for (const [i, [kind, details]] of cases.entries()) {
        const pool = yield* KeyPool.make({ keys: keys("a"), name: `case ${i}`, maxWait: "20 seconds" })
        yield* report(pool, "a", kind, details)
        const error = yield* Effect.flip(pool.run(() => Effect.void))
        assert.strictEqual(error._tag, "AllKeysExhausted", kind)
      }
    }))

  test("F5: a guess is not broken when a told wait ends sooner, nor a told wait beside a guess", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      yield* trip(pool, "a")
      yield* report(pool, "b", "RateLimited", { wait: 5 * second })
      const call = yield* Effect.fork(pool.run((lease) => Effect.succeed(lease.key.label)))
      yield* TestClock.adjust(5_019)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(call), "b")
      const both = yield* KeyPool.make({ keys: keys("a"), name: "both", maxWait: "1 second" })
      yield* trip(both, "a")
      yield* TestClock.adjust("1 second")
      const held = yield* Effect.scoped(
        Effect.flatMap(
          both.lease,
          (lease) =>
            Effect.as(lease.commit(Outcome.fault(Fault.make("RateLimited", { wait: 10 * second }))), lease.key.label)
        )
      )
      assert.strictEqual(held, "a")
      const error = yield* Effect.flip(both.run(() => Effect.void))
      assert.strictEqual(error._tag, "AllKeysExhausted")
    }))

  test("F5: from 4 keys on at most half may be open by guess", () =>
    Effect.gen(function*() {
      const opened = (labels: string) =>
        Effect.gen(function*() {
          const pool = yield* KeyPool.make({
            keys: keys(labels),
            ...plain,
            ...alone,
            name: labels,
            breaker: { rate: false }
          })
          for (const label of labels) {
            if ((yield* pool.snapshot).eligible > 0) yield* trip(pool, label)
          }
          return (yield* pool.snapshot).keys.filter((key) => key.breaker === "open").length
        })
      assert.strictEqual(yield* opened("abc"), 3)
      assert.strictEqual(yield* opened("abcd"), 2)
      assert.strictEqual(yield* opened("abcde"), 2)
      assert.strictEqual(yield* opened("abcdef"), 3)
    }))

  test("F5: the floor can be switched off", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), floor: false, maxWait: "10 seconds" })
      yield* trip(pool, "a")
      const error = yield* Effect.flip(pool.run(() => Effect.void))
      assert.strictEqual(error._tag, "AllKeysExhausted")
    }))
})
