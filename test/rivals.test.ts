/** What the original got wrong, one test for each defect that concerns the core. */
import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as TestClock from "effect/TestClock"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import { bad, calm, keyOf, keys, ok, plain, report, test, trip, upstream } from "./support/pooled.js"

describe("rivals", () => {
  test("rivals 1: a 429 with Retry-After on one key moves the call to the other at once, and rests that key", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("RateLimited", { wait: "2 seconds" }), ok()] })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      assert.strictEqual(yield* pool.run(provider.send), "b")
      assert.strictEqual(yield* Clock.currentTimeMillis, 0)
      assert.strictEqual((yield* keyOf(pool, "a")).closed?.until, 2_020)
    }))

  test("rivals 2: a pool of one key retries", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("Overloaded", { status: 503 }), ok()] })
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("1 second")
      assert.strictEqual(yield* Fiber.join(call), "a")
      assert.strictEqual((yield* provider.sent).length, 2)
    }))

  test("rivals 3: three bad requests of a caller leave the breaker closed", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Rejected", { status: 400 }) })
      const pool = yield* KeyPool.make({ keys: keys("a") })
      for (let i = 0; i < 3; i++) yield* Effect.flip(pool.run(provider.send))
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      assert.isUndefined((yield* keyOf(pool, "a")).closed)
    }))

  test("rivals 4: 50 callers at half-open make one probe", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(1_000) })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      yield* Effect.forEach(Array.from({ length: 50 }), () => Effect.fork(pool.run(provider.send)))
      yield* TestClock.adjust(999)
      assert.strictEqual((yield* provider.sent).length, 1)
    }))

  test("rivals 5: a 401 on one key moves the call to the other", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Unauthorized", { status: 401 }) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      assert.strictEqual(yield* pool.run(provider.send), "b")
      assert.strictEqual((yield* keyOf(pool, "a")).closed?.fault, "Unauthorized")
    }))

  test("rivals 6: a late success does not erase the bench of a refused credential", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      yield* Effect.scoped(Effect.gen(function*() {
        const late = yield* pool.lease
        yield* report(pool, "a", "Unauthorized", { explicit: true })
        const before = (yield* keyOf(pool, "a")).closed
        yield* late.commit(Outcome.success)
        assert.deepStrictEqual((yield* keyOf(pool, "a")).closed, before)
        assert.strictEqual(before?.gate, "cooldown")
      }))
    }))

  test("rivals 7: an abort of the caller is sent once and counts against no key", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => ok(10_000))
      const pool = yield* KeyPool.make({ keys: keys("abc") })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(10)
      yield* Fiber.interrupt(call)
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* provider.sent).length, 1)
      assert.deepStrictEqual((yield* pool.snapshot).keys.map((key) => key.faults), [0, 0, 0])
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("rivals 9: a Retry-After past the budget is not waited for", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("RateLimited", { wait: "5 seconds" }, 10) })
      const pool = yield* KeyPool.make({ keys: keys("a"), budget: "1 second" })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust(10)
      const error = yield* Fiber.join(call)
      assert.strictEqual(error._tag, "AllKeysExhausted")
      assert.strictEqual(yield* Clock.currentTimeMillis, 10)
      const bound = yield* KeyPool.make({ keys: keys("a"), budget: "1 second", name: "bound" })
      const limited = Fault.make("RateLimited", { wait: "5 seconds", failover: false })
      const other = yield* Effect.flip(bound.run(() => Effect.fail({ fault: limited })))
      assert.strictEqual("_tag" in other ? other._tag : "own", "BudgetExceeded")
    }))

  test("rivals 11: when all keys rest the call waits, or fails with the instant at which one is back", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      yield* report(pool, "a", "RateLimited", { wait: 50 })
      yield* report(pool, "b", "RateLimited", { wait: 80 })
      const error = yield* Effect.flip(
        CallOptions.withOptions(pool.run(() => Effect.succeed("served")), { maxWait: 0 })
      )
      assert.strictEqual(error._tag, "AllKeysExhausted")
      if (error._tag !== "AllKeysExhausted") return
      assert.strictEqual(error.nextAvailableAt, 70)
      assert.strictEqual(Duration.toMillis(error.retryAfter ?? 0), 70)
      const call = yield* Effect.fork(pool.run((lease) => Effect.succeed(lease.key.label)))
      yield* TestClock.adjust(69)
      yield* calm
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(call), "a")
    }))

  test("rivals 15: a refused connection is tried again on another key", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const call = yield* Effect.fork(pool.run((lease) =>
        lease.key.label === "a"
          ? Effect.fail({ _tag: "RequestError" as const, reason: "Transport" })
          : Effect.succeed(lease.key.label)
      ))
      yield* TestClock.adjust("1 second")
      assert.strictEqual(yield* Fiber.join(call), "b")
      assert.deepStrictEqual((yield* pool.snapshot).keys.map((key) => key.faults), [1, 0])
    }))
})
