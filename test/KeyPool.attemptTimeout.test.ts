import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Ref from "effect/Ref"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import { BudgetExceeded } from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"
import {
  after,
  bad,
  calm,
  Failed,
  keyOf,
  keys,
  named,
  ok,
  plain,
  type Sent,
  test,
  type Upstream,
  upstream,
  watch
} from "./support/pooled.js"

const second = 1_000
const never = ok(1e12)

/** As many calls one after the other, so that what is usual is known. */
const learn = (
  pool: KeyPool.Service,
  provider: Upstream,
  count = 20,
  options: KeyPool.RunOptions<string, Failed> = {}
) =>
  Effect.gen(function*() {
    for (let n = 0; n < count; n++) {
      const call = yield* Effect.fork(pool.run(provider.send, options))
      yield* TestClock.adjust(second)
      yield* Fiber.join(call)
    }
  })

/** A call that can be aborted, and when and how it ended. */
const asked = (
  pool: KeyPool.Service,
  provider: Upstream,
  options: KeyPool.RunOptions<string, Failed> = {}
) => {
  const timed = Effect.gen(function*() {
    const from = yield* Clock.currentTimeMillis
    const exit = yield* Effect.exit(pool.run(provider.send, { abortable: true, ...options }))
    return { exit, millis: (yield* Clock.currentTimeMillis) - from }
  })
  return Effect.fork(timed)
}

/** Answers in half a second until `from`; then the named key does not. */
const hangs = (label: string, from: number) => (sent: Sent) => sent.label === label && sent.at >= from ? never : ok(500)

describe("attempts that take too long", () => {
  test("C3: with fewer than 20 samples nothing is aborted, and no key is closed", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(hangs("a", 19 * second))
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* learn(pool, provider, 19)
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(1_000 * second)
      assert.isNull(yield* Fiber.poll(call).pipe(Effect.map((exit) => exit._tag === "None" ? null : exit.value)))
      assert.isUndefined((yield* keyOf(pool, "a")).closed)
      yield* Fiber.interrupt(call)
    }))

  test("C3: past 5 s without an answer a key gets no new leases; its next answer opens it", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) =>
        sent.at === 20 * second && sent.label === "a" ? ok(9 * second) : ok(500)
      )
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      yield* learn(pool, provider)
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(4_999)
      assert.isUndefined((yield* keyOf(pool, "a")).closed)
      yield* TestClock.adjust(1)
      assert.deepStrictEqual((yield* keyOf(pool, "a")).closed?.gate, "stalled")
      yield* learn(pool, provider, 3)
      const later = (yield* provider.sent).slice(21).map(({ label }) => label)
      assert.deepStrictEqual(later, ["b", "b", "b"])
      yield* TestClock.adjust(second)
      assert.isTrue(Exit.isSuccess((yield* Fiber.join(call)).exit))
      assert.isUndefined((yield* keyOf(pool, "a")).closed)
    }))

  test("C3: a key that answers other calls is not quiet, however long one of them takes", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((_, index) => index === 20 ? ok(25 * second) : ok(500))
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* learn(pool, provider)
      const call = yield* asked(pool, provider)
      yield* calm
      for (let n = 0; n < 20; n++) {
        yield* learn(pool, provider, 1)
        assert.isUndefined((yield* keyOf(pool, "a")).closed)
      }
      yield* TestClock.adjust(5 * second)
      assert.deepStrictEqual((yield* Fiber.join(call)).exit, Exit.succeed("a"))
    }))

  test("C3: an attempt is aborted at 30 s as a Timeout, and tried once more elsewhere", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(hangs("a", 20 * second))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const seen = yield* watch
      yield* learn(pool, provider)
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(30 * second - 1)
      assert.strictEqual(yield* provider.running, 1)
      yield* TestClock.adjust(1)
      assert.strictEqual((yield* keyOf(pool, "a")).inFlight, 0)
      yield* TestClock.adjust(2 * second)
      assert.deepStrictEqual((yield* Fiber.join(call)).exit, Exit.succeed("b"))
      const faults = named(yield* seen, "request.fail").map((
        { durationMillis, fault }
      ) => [fault.kind, fault.code, durationMillis])
      assert.deepStrictEqual(faults, [["Timeout", "attempt_timeout", 30 * second]])
      assert.strictEqual(yield* provider.running, 0)
    }))

  test("C3: five times what is usual may pass: 3 minutes where 40 s are", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.at === 0 ? ok(40 * second) : ok(180 * second))
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const first = yield* Effect.forEach(Array.from({ length: 20 }), () => asked(pool, provider))
      yield* TestClock.adjust(40 * second)
      yield* Fiber.joinAll(first)
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(180 * second)
      const { exit, millis } = yield* Fiber.join(call)
      assert.deepStrictEqual([exit, millis], [Exit.succeed("a"), 180 * second])
    }))

  test("C3: the second attempt may take twice as long; when it is aborted too, the call ends", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.at >= 20 * second ? never : ok(500))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, cooldowns: { jitter: 0 } })
      yield* learn(pool, provider)
      const call = yield* asked(pool, provider)
      yield* TestClock.adjust(200 * second)
      const { exit, millis } = yield* Fiber.join(call)
      const error = Exit.isFailure(exit) && exit.cause._tag === "Fail" ? exit.cause.error : undefined
      assert.instanceOf(error, BudgetExceeded)
      assert.strictEqual(error instanceof BudgetExceeded ? error.fault?.code : "", "attempt_timeout")
      assert.strictEqual((yield* provider.sent).length, 22)
      assert.isAtLeast(millis, 90 * second)
      assert.isBelow(millis, 92 * second)
      assert.strictEqual(yield* provider.running, 0)
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("C8: what may not be sent again is not aborted by what was learned", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.at >= 20 * second ? ok(100 * second) : ok(500))
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* learn(pool, provider)
      const call = yield* asked(pool, provider, { replayable: false })
      yield* TestClock.adjust(100 * second)
      assert.deepStrictEqual((yield* Fiber.join(call)).exit, Exit.succeed("a"))
    }))

  test("C3: models are told apart, and so are streams", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.at >= 20 * second ? ok(100 * second) : ok(500))
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* learn(pool, provider, 20, { model: "quick" })
      const slow = yield* asked(pool, provider, { model: "slow" })
      const stream = yield* asked(pool, provider, { model: "quick", streaming: true })
      yield* TestClock.adjust(100 * second)
      for (const call of [slow, stream]) assert.deepStrictEqual((yield* Fiber.join(call)).exit, Exit.succeed("a"))
    }))

  test("C3: a fixed timeout aborts any effect, also the first one; `false` none", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: never })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, attemptTimeout: "2 seconds" })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(1_999)
      assert.strictEqual(yield* provider.running, 1)
      yield* TestClock.adjust(2 * second)
      assert.strictEqual(yield* Fiber.join(call), "b")
      const none = yield* KeyPool.make({ name: "none", keys: keys("ab"), ...plain, attemptTimeout: false })
      yield* learn(none, yield* upstream(), 20)
      const hanging = yield* asked(none, provider)
      yield* TestClock.adjust(1_000 * second)
      assert.strictEqual(yield* provider.running, 1)
      yield* Fiber.interrupt(hanging)
    }))

  test("C3: a stream is aborted before its first element only", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, attemptTimeout: "2 seconds" })
      const opened = yield* Ref.make<ReadonlyArray<string>>([])
      const reading = yield* Effect.fork(Stream.runCollect(pool.stream((lease) =>
        Stream.unwrap(
          Ref.update(opened, (all) => [...all, lease.key.label]).pipe(
            Effect.zipRight(lease.key.label === "a" ? Effect.never : Effect.void),
            Effect.as(Stream.concat(Stream.make(1), Stream.fromEffect(Effect.as(Effect.sleep("1 minute"), 2))))
          )
        )
      )))
      yield* TestClock.adjust("2 minutes")
      assert.deepStrictEqual([...(yield* Fiber.join(reading))], [1, 2])
      assert.deepStrictEqual(yield* Ref.get(opened), ["a", "b"])
    }))

  test("C5: an interruption is no Timeout, and its attempt is forgotten", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: never })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, attemptTimeout: "2 seconds" })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(second)
      yield* Fiber.interrupt(call)
      yield* TestClock.adjust(10 * second)
      const { faults, ignored, inFlight } = yield* keyOf(pool, "a")
      assert.deepStrictEqual([faults, ignored, inFlight], [0, 1, 0])
    }))

  test("C3: one key that hangs: every call is answered, and few are ever stuck with it", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(hangs("c", 30 * second))
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...plain })
      const calls: Array<Fiber.Fiber<{ readonly exit: Exit.Exit<string, unknown>; readonly millis: number }>> = []
      let most = 0
      // Five per second, for a minute and a half: two and a half are in flight at a time.
      for (let n = 0; n < 450; n++) {
        calls.push(yield* asked(pool, provider))
        yield* TestClock.adjust(200)
        most = Math.max(most, (yield* keyOf(pool, "c")).inFlight)
      }
      yield* TestClock.adjust(120 * second)
      const ends = yield* Effect.forEach(calls, Fiber.join)
      assert.deepStrictEqual(ends.filter(({ exit }) => Exit.isFailure(exit)), [])
      assert.isAtMost(most, 6)
      const slow = ends.filter(({ millis }) => millis > 5 * second)
      assert.isAtMost(slow.length, 12)
    }))

  test(
    "C3: a stalled key that may not be aborted gets an attempt now and then, ever more rarely",
    () =>
      Effect.gen(function*() {
        const provider = yield* upstream(hangs("a", 20 * second))
        const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
        yield* learn(pool, provider)
        const calls: Array<Fiber.Fiber<unknown, unknown>> = []
        for (let n = 0; n < 360; n++) {
          calls.push(yield* Effect.fork(pool.run(provider.send)))
          yield* TestClock.adjust(10 * second)
        }
        const stuck = (yield* keyOf(pool, "a")).inFlight
        assert.isAbove(stuck, 3)
        assert.isAtMost(stuck, 16)
        yield* Fiber.interruptAll(calls)
        assert.strictEqual((yield* pool.snapshot).inFlight, 0)
      })
  )

  test("C3: refusals are answers too", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((_, index) =>
        index === 20 ? ok(20 * second) : index > 20 ? after(500, bad("Rejected")) : ok(500)
      )
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* learn(pool, provider)
      const call = yield* asked(pool, provider)
      yield* calm
      for (let n = 0; n < 10; n++) {
        const refused = yield* Effect.fork(Effect.exit(pool.run(provider.send)))
        yield* TestClock.adjust(second)
        yield* Fiber.join(refused)
        assert.isUndefined((yield* keyOf(pool, "a")).closed)
      }
      yield* Fiber.interrupt(call)
    }))

  test("C3: an attempt that hangs is aborted also where those that began with it teach what is usual", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((_, index) => index === 0 ? never : ok(500))
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const calls = yield* Effect.replicateEffect(asked(pool, provider), 25)
      // Nothing else begins meanwhile.
      yield* TestClock.adjust(40 * second)
      const ended = yield* Effect.forEach(calls, (call) => Fiber.poll(call))
      assert.strictEqual(ended.filter(({ _tag }) => _tag === "Some").length, 25)
      assert.strictEqual((yield* provider.sent).length, 26)
    }))
})
