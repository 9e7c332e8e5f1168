import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as Schedule from "effect/Schedule"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as RetryPolicy from "../src/RetryPolicy.js"
import * as Strategy from "../src/Strategy.js"
import * as Telemetry from "../src/Telemetry.js"
import {
  after,
  bad,
  calm,
  closedFor,
  Failed,
  idOf,
  keyOf,
  keys,
  ok,
  once,
  plain,
  report,
  test,
  trip,
  upstream
} from "./support/pooled.js"

const labelOf = (lease: KeyPool.Lease) => Effect.succeed(lease.key.label)

describe("rotation", () => {
  test("C1: after a 429 the next attempt leaves in the same instant; the key rests for as long as it was told", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("RateLimited", { wait: "2 seconds" }), ok()] })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      assert.strictEqual(yield* pool.run(provider.send), "b")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@0"])
      yield* TestClock.adjust(2_019)
      for (let i = 0; i < 4; i++) assert.strictEqual(yield* pool.run(provider.send), "b")
      yield* TestClock.adjust(1)
      const served = [yield* pool.run(provider.send), yield* pool.run(provider.send)]
      assert.deepStrictEqual(served.sort(), ["a", "b"])
    }))

  test("C1: where no other key can do better the wait binds the call", () =>
    Effect.gen(function*() {
      const limited = bad("RateLimited", { wait: "2 seconds", failover: false })
      const provider = yield* upstream({ a: [limited, ok()], b: [limited, ok()] })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(1_999)
      assert.strictEqual((yield* provider.sent).length, 1)
      yield* TestClock.adjust(1)
      assert.strictEqual((yield* provider.sent).length, 2)
      yield* TestClock.adjust("10 seconds")
      yield* Fiber.join(call)
    }))
})

describe("waiting", () => {
  const limitedFor = (settings: Partial<KeyPool.Settings>, wait: number) =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, ...settings })
      yield* report(pool, "a", "RateLimited", { wait })
      return pool
    })

  test("C2: callers wait for the exact instant, first come first served", () =>
    Effect.gen(function*() {
      const order = yield* Ref.make<ReadonlyArray<string>>([])
      const pool = yield* limitedFor({}, 2_000)
      const call = (name: string) =>
        Effect.fork(pool.run(() =>
          Effect.flatMap(Clock.currentTimeMillis, (now) => Ref.update(order, (all) => [...all, `${name}@${now}`]))
        ))
      for (const name of ["one", "two", "three"]) {
        yield* call(name)
        yield* TestClock.adjust(100)
      }
      yield* TestClock.adjust(1_719)
      assert.isEmpty(yield* Ref.get(order))
      yield* TestClock.adjust(1)
      assert.deepStrictEqual(yield* Ref.get(order), ["one@2020", "two@2020", "three@2020"])
      assert.strictEqual((yield* pool.snapshot).waiting, 0)
    }))

  test("C2: newcomers stand behind those who wait", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      const calls = yield* Effect.forEach([1, 2, 3, 4], () =>
        Effect.zipLeft(Effect.fork(pool.run(provider.send)), TestClock.adjust(30)))
      yield* TestClock.adjust("1 second")
      yield* Fiber.joinAll(calls)
      assert.deepStrictEqual((yield* provider.sent).map(({ at, call }) => [call, at]), [[1, 0], [2, 100], [3, 200], [
        4,
        300
      ]])
    }))

  test("C2: also one who comes at the very instant a key opens", () =>
    Effect.gen(function*() {
      const order = yield* Ref.make<ReadonlyArray<string>>([])
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: 2_000 })
      const call = (name: string) =>
        pool.run(() => Effect.zipRight(Ref.update(order, (all) => [...all, name]), Effect.sleep(10)))
      // Timers of one instant go off in some order: one newcomer's is set before the pool's own, one's after.
      const arriving = (name: string) =>
        Effect.zipLeft(Effect.fork(Effect.zipRight(Effect.sleep(2_020), call(name))), calm)
      const early = yield* arriving("early")
      const waiting = yield* Effect.zipLeft(Effect.fork(call("waiting")), calm)
      const late = yield* arriving("late")
      yield* TestClock.adjust("3 seconds")
      yield* Fiber.joinAll([early, waiting, late])
      assert.strictEqual((yield* Ref.get(order))[0], "waiting")
    }))

  test("C2: no more wake than can be served", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100), b: ok(100) })
      const concurrency = { limits: { concurrency: 2 } }
      const pool = yield* KeyPool.make({ keys: keys("ab", { a: concurrency, b: concurrency }), ...plain })
      const calls = yield* Effect.fork(
        Effect.all(Array.from({ length: 10 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
      )
      yield* calm
      assert.strictEqual(yield* provider.running, 4)
      assert.strictEqual((yield* pool.snapshot).waiting, 6)
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* provider.running, 4)
      assert.strictEqual((yield* pool.snapshot).waiting, 2)
      yield* TestClock.adjust(200)
      assert.strictEqual((yield* Fiber.join(calls)).length, 10)
    }))

  test("C2: a blocked model blocks no other", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent, index) =>
        index === 0 ? bad("RateLimited", { perModel: true, wait: "5 seconds" }) : ok()
      )
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const large = yield* Effect.fork(pool.run(provider.send, { model: "large" }))
      yield* calm
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      assert.strictEqual(yield* pool.run(provider.send, { model: "small" }), "a")
      assert.strictEqual(yield* pool.run(provider.send), "a")
      yield* TestClock.adjust(5_020)
      assert.strictEqual(yield* Fiber.join(large), "a")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "a@0", "a@0", "a@5020"])
    }))

  test("C2: keys that may serve certain models only", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab", { b: { models: ["large"] } }), ...plain, maxWait: 0 })
      yield* pool.disable(yield* idOf(pool, "a"))
      assert.strictEqual(yield* pool.run(labelOf, { model: "large" }), "b")
      const error = yield* Effect.flip(pool.run(labelOf, { model: "small" }))
      assert.strictEqual(error._tag, "AllKeysExhausted")
      assert.deepStrictEqual(
        error._tag === "AllKeysExhausted" ? error.reasons.map(({ gate, label }) => [label, gate]) : [],
        [["a", "disabled"], ["b", "model"]]
      )
    }))

  test("C2: a told instant past the budget or maxWait fails at once", () =>
    Effect.gen(function*() {
      const budget = yield* limitedFor({ budget: "10 seconds" }, 10_000)
      const error = yield* Effect.flip(budget.run(() => Effect.void))
      assert.strictEqual(error._tag, "AllKeysExhausted")
      assert.strictEqual(error._tag === "AllKeysExhausted" ? error.nextAvailableAt : 0, 10_020)
      const maxWait = yield* limitedFor({ name: "maxWait", maxWait: "1 second" }, 1_000)
      assert.strictEqual((yield* Effect.flip(maxWait.run(() => Effect.void)))._tag, "AllKeysExhausted")
      const none = yield* limitedFor({ name: "none", maxWait: 0 }, 1)
      assert.strictEqual((yield* Effect.flip(none.run(() => Effect.void)))._tag, "AllKeysExhausted")
      assert.strictEqual(yield* Clock.currentTimeMillis, 0)
    }))

  test("C2: an instant exactly at the end of the budget is waited for", () =>
    Effect.gen(function*() {
      const pool = yield* limitedFor({ maxWait: 1_020 }, 1_000)
      const call = yield* Effect.fork(pool.run(labelOf))
      yield* TestClock.adjust(1_020)
      assert.strictEqual(yield* Fiber.join(call), "a")
    }))

  test("C2: maxWait 0 fails at once while an attempt holds the only slot", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), maxWait: 0 })
      yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      assert.strictEqual((yield* Effect.flip(pool.run(labelOf)))._tag, "AllKeysExhausted")
    }))

  test("C2: who waits gives up when maxWait or the budget is over", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { concurrency: 1 } } }),
        maxWait: "3 seconds",
        budget: "20 seconds"
      })
      yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      const call = yield* Effect.fork(Effect.flip(pool.run(labelOf)))
      yield* TestClock.adjust(2_999)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual((yield* Fiber.join(call))._tag, "AllKeysExhausted")
      assert.strictEqual((yield* pool.snapshot).waiting, 0)
    }))

  test("C2: those who wait are sent away as soon as their wait cannot end in time", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { concurrency: 1 } } }),
        ...plain,
        maxWait: "5 seconds"
      })
      const limited = yield* Effect.fork(
        Effect.exit(pool.run(() => Effect.zipRight(Effect.sleep(1_000), bad("RateLimited", { wait: "1 minute" }).exit)))
      )
      yield* calm
      const waiting = yield* Effect.fork(Effect.flip(pool.run(labelOf)))
      yield* TestClock.adjust(1_000)
      assert.strictEqual((yield* Fiber.join(waiting))._tag, "AllKeysExhausted")
      yield* Fiber.join(limited)
    }))

  test("C2: at most maxWaiters wait", () =>
    Effect.gen(function*() {
      const pool = yield* limitedFor({ maxWaiters: 2 }, 5_000)
      const calls = yield* Effect.forEach([1, 2, 3], () =>
        Effect.zipLeft(Effect.fork(Effect.either(pool.run(labelOf))), calm))
      assert.strictEqual((yield* pool.snapshot).waiting, 2)
      const third = calls[2]
      assert.isTrue(third !== undefined && Option.isSome(yield* Fiber.poll(third)))
      yield* TestClock.adjust(5_020)
      const answers = yield* Effect.forEach(calls, Fiber.join)
      assert.deepStrictEqual(
        answers.map((answer) =>
          answer._tag
        ),
        ["Right", "Right", "Left"]
      )
    }))

  test("C2: 1,000 may wait, and are served", () =>
    Effect.gen(function*() {
      const pool = yield* limitedFor({}, 5_000)
      const calls = yield* Effect.fork(
        Effect.all(Array.from({ length: 1_001 }, () => Effect.either(pool.run(labelOf))), { concurrency: "unbounded" })
      )
      yield* calm
      assert.strictEqual((yield* pool.snapshot).waiting, 1_000)
      yield* TestClock.adjust(5_020)
      const answers = yield* Fiber.join(calls)
      assert.strictEqual(answers.filter((answer) => answer._tag === "Right").length, 1_000)
    }))

  test("C2: one who leaves the queue costs the others nothing", () =>
    Effect.gen(function*() {
      const pool = yield* limitedFor({}, 2_000)
      const calls = yield* Effect.forEach([1, 2, 3], () => Effect.fork(pool.run(() => Clock.currentTimeMillis)))
      yield* calm
      const [first] = calls
      if (first !== undefined) yield* Fiber.interrupt(first)
      assert.strictEqual((yield* pool.snapshot).waiting, 2)
      yield* TestClock.adjust(2_020)
      assert.deepStrictEqual(yield* Effect.forEach(calls.slice(1), Fiber.join), [2_020, 2_020])
    }))

  test("C2: pool.lease waits in the same queue", () =>
    Effect.gen(function*() {
      const pool = yield* limitedFor({}, 2_000)
      const lease = yield* Effect.fork(Effect.scoped(Effect.zipRight(pool.lease, Clock.currentTimeMillis)))
      yield* TestClock.adjust(2_020)
      assert.strictEqual(yield* Fiber.join(lease), 2_020)
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))
})

describe("limits of a call", () => {
  const lasting = { breaker: { threshold: 1_000, rate: false }, retryTokens: false } as const

  test("C3: 5 retries on faults of the provider", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("ServerError") })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...lasting })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* Fiber.join(call))._tag, "Failed")
      assert.strictEqual((yield* provider.sent).length, 6)
    }))

  test("C3: no wait and no attempt begins past the budget", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("ServerError", {}, 300))
      const pool = yield* KeyPool.make({
        keys: keys("ab"),
        ...lasting,
        budget: "5 seconds",
        retry: Schedule.spaced("400 millis")
      })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust("1 minute")
      const error = yield* Fiber.join(call)
      assert.strictEqual(error._tag, "BudgetExceeded")
      const last = (yield* provider.sent).at(-1)?.at ?? Infinity
      assert.isAtMost(last, 5_000)
      assert.isAbove(last, 4_000)
    }))

  test("F3: no timer is longer than 24 h, in a back-off and in the queue", () =>
    Effect.gen(function*() {
      const live = yield* Effect.clock
      const slept: Array<number> = []
      // The test's own clock, that notes how long it is asked to sleep.
      const clock: Clock.Clock = Object.assign(Object.create(live), {
        sleep: (duration: Duration.Duration) => {
          slept.push(Duration.toMillis(duration))
          return live.sleep(duration)
        }
      })
      const day = 86_400_000
      const run = Effect.gen(function*() {
        const provider = yield* upstream({ a: [bad("ServerError"), ok()] })
        const pool = yield* KeyPool.make({
          keys: keys("a"),
          ...plain,
          budget: Infinity,
          retry: Schedule.spaced("3 days")
        })
        const backing = yield* Effect.fork(pool.run(provider.send))
        yield* TestClock.adjust("5 days")
        assert.strictEqual(yield* Fiber.join(backing), "a")
        assert.include(slept, day, "the back-off")
        slept.length = 0
        yield* report(pool, "a", "RateLimited", { wait: "3 days" })
        const waiting = yield* Effect.fork(pool.run(() => Effect.succeed("served")))
        for (let i = 0; i < 5; i++) yield* TestClock.adjust("1 day")
        assert.strictEqual(yield* Fiber.join(waiting), "served")
        assert.include(slept, day, "the queue")
        assert.isAtMost(Math.max(...slept), day)
      })
      yield* Effect.withClock(run, clock)
    }))

  test("C1: a call that fails on key after key does not come back to one that it has tried", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("ServerError"), b: bad("ServerError"), c: ok() })
      const first = Strategy.custom("first", (candidates) => candidates[0])
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain, strategy: first })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(yield* Fiber.join(call), "c")
      assert.deepStrictEqual((yield* provider.sent).map(({ label }) => label), ["a", "b", "c"])
    }))

  test("C3: BudgetExceeded says whose budget was spent, the call's or the policy's own", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("ServerError") })
      const retry = Schedule.spaced("1 second").pipe(RetryPolicy.withBudget("2500 millis"))
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, breaker: { threshold: 100 }, retry })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust("10 seconds")
      const error = yield* Fiber.join(call)
      assert(error._tag === "BudgetExceeded")
      assert.strictEqual(error.of, "policy")
      assert.include(error.message, "The retry policy's own budget, after 2s,")
      const short = yield* KeyPool.make({ keys: keys("a"), ...plain, name: "short", budget: "500 millis", retry })
      const other = yield* Effect.fork(Effect.flip(short.run(provider.send)))
      yield* TestClock.adjust("10 seconds")
      const second = yield* Fiber.join(other)
      assert.strictEqual(second._tag === "BudgetExceeded" && second.of, "call")
    }))

  test("C3: the budget never interrupts an attempt in flight", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(120_000) })
      const pool = yield* KeyPool.make({ keys: keys("a"), budget: "1 second" })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("2 minutes")
      assert.strictEqual(yield* Fiber.join(call), "a")
    }))

  test("C3: a fault after an attempt longer than 30 s still earns one more, and only one", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Timeout", {}, 70_000), b: bad("Timeout", {}, 70_000) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust("10 minutes")
      assert.strictEqual((yield* Fiber.join(call))._tag, "BudgetExceeded")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@70000"])
    }))

  test("C3: so does one that ends just before the budget", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Timeout", {}, 59_990), b: ok() })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("10 minutes")
      assert.strictEqual(yield* Fiber.join(call), "b")
    }), { random: Random.fixed([0.9]) })

  test("C3: a fault after a shorter attempt does not", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Timeout", {}, 20_000), b: ok() })
      const pool = yield* KeyPool.make({ keys: keys("ab"), budget: "15 seconds" })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* Fiber.join(call))._tag, "BudgetExceeded")
      assert.deepStrictEqual(yield* provider.trace, ["a@0"])
    }))

  test("C3: the deadline interrupts to the tick, while an attempt runs, in a back-off, in the queue", () =>
    Effect.gen(function*() {
      const ends = <A, E>(pool: KeyPool.Service, use: (lease: KeyPool.Lease) => Effect.Effect<A, E>) =>
        Effect.gen(function*() {
          const from = yield* Clock.currentTimeMillis
          const { inFlight } = yield* pool.snapshot
          const call = yield* Effect.fork(
            Effect.flip(pool.run(use)).pipe(
              Effect.flatMap((error) => Effect.map(Clock.currentTimeMillis, (now) => [error, now - from] as const)),
              CallOptions.withDeadline(1_234)
            )
          )
          yield* TestClock.adjust("1 minute")
          const [error, elapsed] = yield* Fiber.join(call)
          assert.propertyVal(error, "_tag", "DeadlineExceeded")
          assert.strictEqual(elapsed, 1_234)
          assert.strictEqual((yield* pool.snapshot).inFlight, inFlight)
          assert.strictEqual((yield* pool.snapshot).waiting, 0)
        })
      const limited = keys("a", { a: { limits: { concurrency: 1 } } })
      const pool = yield* KeyPool.make({ keys: limited, ...lasting, ...plain, retry: Schedule.spaced("1 second") })
      yield* ends(pool, () => Effect.never)
      yield* ends(pool, () => bad("ServerError").exit)
      yield* pool.lease
      yield* ends(pool, labelOf)
    }))

  test("C2: a call whose deadline comes before any key is refused at once; else the deadline says so itself", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: "5 seconds" })
      const call = pool.run(() => Effect.void)
      const now = yield* Clock.currentTimeMillis
      const refused = yield* Effect.flip(CallOptions.withDeadline(call, "4 seconds"))
      assert.strictEqual(refused._tag, "AllKeysExhausted")
      assert.strictEqual(yield* Clock.currentTimeMillis, now)
      const busy = yield* KeyPool.make({ keys: keys("b", { b: { limits: { concurrency: 1 } } }), ...plain })
      yield* Effect.fork(busy.run(() => Effect.never))
      yield* calm
      const late = yield* Effect.fork(Effect.flip(CallOptions.withDeadline(busy.run(() => Effect.void), "4 seconds")))
      yield* TestClock.adjust("4 seconds")
      assert.strictEqual((yield* Fiber.join(late))._tag, "DeadlineExceeded")
    }))

  test("C2: calls that wait are served by priority, given around the call or with it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      const order: Array<string> = []
      yield* Effect.fork(pool.run(() => Effect.sleep("1 second")))
      yield* calm
      const note = (name: string, priority?: CallOptions.Priority) =>
        Effect.fork(pool.run(() => Effect.sync(() => order.push(name)), { priority }))
      yield* note("low", "low")
      yield* note("normal")
      yield* note("high", "high")
      yield* note("around").pipe(CallOptions.withOptions({ priority: "high" }))
      yield* note("own", "low").pipe(CallOptions.withOptions({ priority: "high" }))
      yield* Effect.fork(
        Stream.runDrain(pool.stream(() => Stream.sync(() => order.push("stream")), { priority: "high" }))
      )
      yield* TestClock.adjust("1 second")
      assert.deepStrictEqual(order, ["high", "around", "stream", "normal", "low", "own"])
    }))

  test("C3: the deadline says so itself, though its timer be late", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => ok(1_000))
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      const first = yield* Effect.fork(pool.run(provider.send))
      yield* calm
      const clock = yield* Effect.clock
      // In a busy process: the pool's own timers come in time, the call's do not.
      const sleep: Clock.Clock["sleep"] = (duration) => clock.sleep(Duration.sum(duration, "20 millis"))
      const late = yield* pool.run(provider.send).pipe(
        CallOptions.withOptions({ deadline: 30 }),
        Effect.withClock(Object.create(clock, { sleep: { value: sleep } })),
        Effect.flip,
        Effect.fork
      )
      yield* TestClock.adjust(50)
      assert.strictEqual((yield* Fiber.join(late))._tag, "DeadlineExceeded")
      yield* Fiber.interrupt(first)
    }))

  test("C3: the deadline holds for pool.lease too", () =>
    Effect.gen(function*() {
      const limited = keys("a", { a: { limits: { concurrency: 1 } } })
      const pool = yield* KeyPool.make({ keys: limited, deadline: "1 second" })
      yield* pool.lease
      const lease = yield* Effect.fork(Effect.flip(Effect.scoped(pool.lease)))
      yield* TestClock.adjust("1 second")
      assert.isTrue(Option.isSome(yield* Fiber.poll(lease)))
      assert.strictEqual((yield* Fiber.join(lease))._tag, "DeadlineExceeded")
    }))

  test("C3: rotations are at most 8, those from rate limits 4; then the call backs off", () =>
    Effect.gen(function*() {
      const labels = "abcdefghijklmno"
      const atOnce = (kind: Fault.Kind, details: Fault.Details) =>
        Effect.gen(function*() {
          const provider = yield* upstream(() => bad(kind, details))
          const pool = yield* KeyPool.make({
            keys: keys(labels),
            ...lasting,
            ...plain,
            attribution: "per-key",
            name: kind
          })
          const call = yield* Effect.fork(Effect.exit(pool.run(provider.send)))
          yield* calm
          const sent = (yield* provider.sent).length
          yield* TestClock.adjust("2 minutes")
          yield* Fiber.join(call)
          return [sent, (yield* provider.sent).length]
        })
      assert.deepStrictEqual(yield* atOnce("Unauthorized", {}), [9, 14])
      assert.deepStrictEqual(yield* atOnce("RateLimited", { wait: "1 hour" }), [5, 10])
    }), { random: Random.fixed([0.5]) })

  test("C3: rotations and rate-limit rotations are settings", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("Unauthorized"))
      const pool = yield* KeyPool.make({ keys: keys("abcde"), ...plain, ...once, rotations: 2 })
      assert.strictEqual((yield* Effect.flip(pool.run(provider.send)))._tag, "Failed")
      assert.strictEqual((yield* provider.sent).length, 3)
    }))

  test("C3: retry tokens bound the load when everything fails", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(() => bad("ServerError"))
      const pool = yield* KeyPool.make({
        keys: keys("ab"),
        attribution: "per-key",
        breaker: { threshold: 100_000, rate: false },
        budget: "5 seconds"
      })
      const calls = 200
      const seconds = 10
      for (let i = 0; i < seconds; i++) {
        for (let j = 0; j < calls / seconds; j++) yield* Effect.fork(Effect.exit(pool.run(provider.send)))
        yield* TestClock.adjust("1 second")
      }
      const sent = (yield* provider.sent).length
      assert.isAtMost(sent, calls + 0.2 * calls + 10 + seconds)
      assert.isAbove(sent, calls + 10, "tokens are there to be used")
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("C3: a call without a token waits for it inside its budget", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: [bad("ServerError"), ok()] })
      const pool = yield* KeyPool.make({
        keys: keys("a"),
        retry: Schedule.spaced(0),
        retryTokens: { burst: 0, perCall: 0, perSecond: 0.5 }
      })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(yield* Fiber.join(call), "a")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "a@2000"])
    }))

  test("C4: a pool of one key retries, and waits for its own key inside the budget", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({
        a: [bad("ServerError"), bad("RateLimited", { wait: "5 seconds" }), bad("Overloaded"), ok()]
      })
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(yield* Fiber.join(call), "a")
      const [, second, third] = yield* provider.sent
      assert.strictEqual((third?.at ?? 0) - (second?.at ?? 0), 5_020)
    }))

  test("C5: interruption aborts the request, frees the lease, counts as nothing against the key", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(1_000) })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      for (let i = 0; i < 5; i++) {
        const call = yield* Effect.fork(pool.run(provider.send))
        yield* TestClock.adjust(10)
        assert.strictEqual(yield* provider.running, 1)
        yield* Fiber.interrupt(call)
        assert.strictEqual(yield* provider.running, 0)
      }
      const key = yield* keyOf(pool, "a")
      assert.deepInclude(key, { inFlight: 0, faults: 0, successes: 0, ignored: 5, breaker: "closed" })
      assert.isUndefined(key.closed)
      assert.strictEqual((yield* provider.sent).length, 5, "nothing was sent again")
    }))

  test("C5: a classify is not asked about interruption", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const call = yield* Effect.fork(
        pool.run(() => Effect.never, { classify: () => Outcome.fault(Fault.make("ServerError")) })
      )
      yield* calm
      yield* Fiber.interrupt(call)
      assert.strictEqual((yield* keyOf(pool, "a")).faults, 0)
    }))

  test(
    "C6: in flight is 0 after any mix of success, failure, interruption and abandoned streams",
    () =>
      Effect.gen(function*() {
        const pool = yield* KeyPool.make({
          keys: keys("abc", { a: { limits: { concurrency: 2 } }, b: { quotaGroup: "g" }, c: { quotaGroup: "g" } }),
          budget: "20 seconds",
          maxWaiters: 20
        })
        const kinds: ReadonlyArray<Fault.Kind> = Fault.Kind.literals
        const low = yield* Ref.make(0)
        const watchful = Effect.flatMap(
          pool.snapshot,
          (snapshot) => Ref.update(low, (n) => Math.min(n, ...snapshot.keys.map((key) => key.inFlight)))
        )
        const use = (lease: KeyPool.Lease) =>
          Effect.gen(function*() {
            yield* watchful
            yield* Effect.sleep(yield* Random.nextIntBetween(0, 3_000))
            const dice = yield* Random.nextIntBetween(0, 10)
            const kind = kinds[yield* Random.nextIntBetween(0, kinds.length)] ?? "ServerError"
            if (dice < 3) yield* new Failed({ fault: Fault.make(kind) })
            if (dice < 5) {
              yield* new Failed({ fault: Fault.make(kind, { wait: 500, scope: "group", perModel: dice === 4 }) })
            }
            if (dice === 5) return yield* Effect.die("bug")
            if (dice === 6) yield* lease.commit(Outcome.success)
            if (dice === 7) yield* lease.end
            return lease.key.label
          })
        const one = (i: number) =>
          Effect.gen(function*() {
            yield* Effect.sleep(yield* Random.nextIntBetween(0, 10_000))
            const model = i % 3 === 0 ? { model: "large" } : {}
            const call: Effect.Effect<unknown, unknown> = i % 5 === 0
              ? Stream.runDrain(Stream.take(pool.stream((lease) => Stream.repeatEffect(use(lease)), model), 2))
              : i % 7 === 0
              ? Effect.scoped(Effect.zipRight(pool.lease, Effect.sleep(200)))
              : pool.run(use, model)
            const fiber = yield* Effect.fork(Effect.exit(call))
            if (i % 4 === 0) {
              yield* Effect.sleep(yield* Random.nextIntBetween(0, 2_000))
              yield* Fiber.interrupt(fiber)
            }
            return yield* Fiber.await(fiber)
          })
        const all = yield* Effect.fork(
          Effect.all(Array.from({ length: 120 }, (_, i) => one(i)), { concurrency: "unbounded" })
        )
        yield* TestClock.adjust("5 minutes")
        assert.isTrue(Option.isSome(yield* Fiber.poll(all)), "every call has an answer")
        assert.strictEqual((yield* Fiber.join(all)).length, 120)
        const snapshot = yield* pool.snapshot
        assert.strictEqual(snapshot.inFlight, 0)
        assert.strictEqual(snapshot.waiting, 0)
        assert.strictEqual(yield* Ref.get(low), 0)
        for (const key of snapshot.keys) {
          assert.isAtLeast(key.total, key.successes + key.ignored)
        }
      }),
    { timeout: 120_000 }
  )

  /** A pool that lets other fibers run whenever it says something: so there are many moments to be interrupted at. */
  const halting = (settings: KeyPool.Settings) =>
    Effect.flatMap(
      Telemetry.Telemetry,
      (telemetry) =>
        Effect.provideService(KeyPool.make(settings), Telemetry.Telemetry, {
          ...telemetry,
          listened: () => true,
          publish: (events) => Effect.zipRight(Effect.yieldNow(), telemetry.publish(events))
        })
    )

  /** Interrupts an effect after each number of its halts, until it is done before the interruption comes. */
  const everywhere = <A, E>(effect: Effect.Effect<A, E>, check: (step: number) => Effect.Effect<void>) =>
    Effect.gen(function*() {
      for (let step = 0; step < 200; step++) {
        const fiber = yield* Effect.fork(effect)
        for (let i = 0; i < step; i++) yield* Effect.yieldNow()
        const exit = yield* Fiber.interrupt(fiber)
        yield* Effect.repeatN(Effect.yieldNow(), 20)
        yield* check(step)
        if (Exit.isSuccess(exit)) return step
      }
      return yield* Effect.dieMessage("it never ended")
    })

  const idle = (pool: KeyPool.Service) => (step: number) =>
    Effect.map(pool.snapshot, ({ inFlight, waiting }) => {
      assert.strictEqual(inFlight, 0, `in flight after an interruption at step ${step}`)
      assert.strictEqual(waiting, 0, `waiting after an interruption at step ${step}`)
    })

  test("C6: run leaks nothing wherever it is interrupted", () =>
    Effect.gen(function*() {
      const pool = yield* halting({ keys: keys("ab"), retryTokens: false, cooldowns: { jitter: 0 } })
      const use = (lease: KeyPool.Lease): Effect.Effect<number | void, Failed> =>
        lease.attempt === 1 ? bad("QuotaExhausted").exit : Effect.zipRight(Effect.yieldNow(), Effect.succeed(1))
      const ids = yield* Effect.forEach(["a", "b"], (label) => idOf(pool, label))
      const steps = yield* everywhere(
        Effect.zipRight(Effect.forEach(ids, pool.reset), pool.run(use)),
        idle(pool)
      )
      assert.isAbove(steps, 5)
    }))

  test("C6: pool.lease leaks nothing wherever it is interrupted", () =>
    Effect.gen(function*() {
      const pool = yield* halting({ keys: keys("ab") })
      const steps = yield* everywhere(
        Effect.scoped(Effect.flatMap(pool.lease, (lease) => lease.commit(Outcome.success))),
        idle(pool)
      )
      assert.isAbove(steps, 2)
    }))

  test("C6: stream leaks neither a lease nor a resource wherever it is interrupted", () =>
    Effect.gen(function*() {
      const pool = yield* halting({ keys: keys("ab") })
      const open = yield* Ref.make(0)
      const source = Stream.flatMap(
        Stream.acquireRelease(Ref.update(open, (n) => n + 1), () => Ref.update(open, (n) => n - 1)),
        () => Stream.tap(Stream.make(1, 2, 3), () => Effect.yieldNow())
      )
      const leaked: Array<number> = []
      const before = { resources: 0 }
      const steps = yield* everywhere(Stream.runDrain(pool.stream(() => source)), (step) =>
        Effect.gen(function*() {
          const { inFlight } = yield* pool.snapshot
          const resources = yield* Ref.get(open)
          if (inFlight > leaked.length || resources > before.resources) leaked.push(step)
          before.resources = resources
        }))
      assert.deepStrictEqual(leaked, [], "steps at which an interruption leaks")
      assert.isAbove(steps, 5)
    }))

  test("C6: one who waits leaks nothing wherever he is interrupted", () =>
    Effect.gen(function*() {
      const pool = yield* halting({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      for (let step = 0; step < 20; step++) {
        const held = yield* Deferred.make<void>()
        const holder = yield* Effect.fork(pool.run(() => Deferred.await(held)))
        yield* Effect.repeatN(Effect.yieldNow(), 20)
        const [first, second] = yield* Effect.all([
          Effect.fork(pool.run(() => Effect.yieldNow())),
          Effect.fork(pool.run(labelOf))
        ])
        yield* Effect.repeatN(Effect.yieldNow(), 20)
        assert.strictEqual((yield* pool.snapshot).waiting, 2)
        yield* Deferred.succeed(held, undefined)
        for (let i = 0; i < step; i++) yield* Effect.yieldNow()
        yield* Fiber.interrupt(first)
        yield* Fiber.join(holder)
        yield* calm
        assert.isTrue(Option.isSome(yield* Fiber.poll(second)), `the next one is served, step ${step}`)
        yield* idle(pool)(step)
      }
    }))

  test("C6: a classify that throws leaks no lease", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const broken = (): never => {
        throw new Error("a bug in classify")
      }
      const good = yield* Effect.exit(pool.run(() => Effect.succeed(1), { classify: broken }))
      assert.isTrue(Exit.isFailure(good))
      assert.strictEqual((yield* pool.snapshot).inFlight, 0, "after a success")
      const failed = yield* Effect.exit(pool.run(() => Effect.fail("mine"), { classify: broken }))
      assert.isTrue(Exit.isFailure(failed))
      assert.strictEqual((yield* pool.snapshot).inFlight, 0, "after a failure")
    }))

  test("C6: a use that throws leaks no lease", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      yield* Effect.exit(pool.run((): Effect.Effect<never> => {
        throw new Error("a bug in use")
      }))
      yield* Effect.exit(Stream.runDrain(pool.stream((): Stream.Stream<never> => {
        throw new Error("a bug in use")
      })))
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("C6: ending a lease twice, or committing after the end, changes nothing", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      yield* Effect.scoped(Effect.gen(function*() {
        const lease = yield* pool.lease
        yield* lease.end
        yield* lease.end
        yield* lease.commit(Outcome.fault(Fault.make("Unauthorized")))
        assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, ignored: 1, faults: 0 })
      }))
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, ignored: 1, faults: 0 })
    }))

  test("C6: the first outcome of a lease counts; a fault after a success is a late one", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* Effect.scoped(Effect.gen(function*() {
        const lease = yield* pool.lease
        yield* lease.commit(Outcome.success)
        yield* lease.commit(Outcome.success)
        yield* lease.commit(Outcome.fault(Fault.make("Network")))
        yield* lease.commit(Outcome.fault(Fault.make("Network")))
      }))
      assert.deepInclude(yield* keyOf(pool, "a"), { successes: 1, faults: 1, ignored: 0, inFlight: 0 })
    }))

  test("C6: hold keeps the lease of a success until it is ended", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const lease = yield* pool.run(Effect.succeed<KeyPool.Lease>, { hold: true })
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 1, successes: 1 })
      yield* lease.end
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, successes: 1, ignored: 0 })
      yield* Effect.exit(pool.run(() => Effect.fail("mine"), { hold: true }))
      assert.strictEqual((yield* keyOf(pool, "a")).inFlight, 0)
    }))

  test("C7: one call over N failing keys makes exactly the attempts that the policy says", () =>
    Effect.gen(function*() {
      for (const n of [1, 2, 3, 5]) {
        const provider = yield* upstream(() => bad("ServerError"))
        const pool = yield* KeyPool.make({
          keys: keys("abcde".slice(0, n)),
          ...lasting,
          name: `${n} keys`,
          retry: Schedule.recurs(2)
        })
        const call = yield* Effect.fork(Effect.exit(pool.run(provider.send)))
        yield* TestClock.adjust("1 minute")
        yield* Fiber.join(call)
        assert.strictEqual((yield* provider.sent).length, 3)
        const spent = yield* upstream(() => bad("QuotaExhausted"))
        const quota = yield* KeyPool.make({
          keys: keys("abcde".slice(0, n)),
          ...lasting,
          name: `quota ${n}`,
          maxWait: 0
        })
        yield* Effect.exit(quota.run(spent.send))
        assert.strictEqual((yield* spent.sent).length, n)
      }
    }))

  test("C8: after an ambiguous fault only what may be replayed is; refusals always", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({
        a: bad("RateLimited", { wait: 100 }),
        b: bad("Overloaded"),
        c: bad("Timeout")
      })
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send, { replayable: false })))
      yield* TestClock.adjust("10 seconds")
      const error = yield* Fiber.join(call)
      assert.strictEqual(error._tag === "Failed" ? error.fault.kind : error._tag, "Timeout")
      assert.deepStrictEqual((yield* provider.sent).map((sent) => sent.label), ["a", "b", "c"])
      const never = yield* Effect.flip(pool.run(provider.send, { replayable: "never" }))
      assert.strictEqual(never._tag, "Failed")
    }))

  test("the settings of one call win over those of the pool", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: "5 seconds" })
      const error = yield* Effect.flip(CallOptions.withOptions(pool.run(labelOf), { maxWait: 0 }))
      assert.strictEqual(error._tag, "AllKeysExhausted")
      const short = yield* Effect.flip(CallOptions.withOptions(pool.run(labelOf), { budget: "1 second" }))
      assert.strictEqual(short._tag, "AllKeysExhausted")
      assert.strictEqual(yield* closedFor(pool, "a"), 5_020)
      yield* TestClock.adjust(5_020)
      const provider = yield* upstream((sent) => sent.model === "large" ? bad("Rejected") : ok())
      assert.strictEqual(
        (yield* Effect.flip(CallOptions.withOptions(pool.run(provider.send), { model: "large" })))._tag,
        "Failed"
      )
      assert.strictEqual(
        yield* CallOptions.withOptions(pool.run(provider.send, { model: "small" }), { model: "large" }),
        "a",
        "what the call itself says wins"
      )
    }))

  test("an exit that a classify takes for a fault is tried again; the last one is the call's", () =>
    Effect.gen(function*() {
      const seen = yield* Ref.make<ReadonlyArray<string>>([])
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, maxWait: 0 })
      const answer = yield* pool.run(
        (lease) =>
          Effect.as(Ref.update(seen, (all) => [...all, lease.key.label]), { status: lease.attempt === 1 ? 429 : 200 }),
        {
          classify: (exit) =>
            Exit.isSuccess(exit) && exit.value.status === 429
              ? Outcome.fault(Fault.make("RateLimited"))
              : Outcome.fromExit(exit)
        }
      )
      assert.deepStrictEqual(answer, { status: 200 })
      assert.deepStrictEqual(yield* Ref.get(seen), ["a", "b"])
      yield* trip(pool, "b").pipe(Effect.ignore)
    }))

  test("one attempt at a time per call, with its number", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((_, index) => index < 2 ? after(50, bad("QuotaExhausted")) : ok(50))
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      const call = yield* Effect.fork(pool.run(provider.send))
      for (let i = 0; i < 3; i++) {
        yield* calm
        assert.strictEqual(yield* provider.running, 1)
        yield* TestClock.adjust(50)
      }
      yield* Fiber.join(call)
      assert.deepStrictEqual((yield* provider.sent).map(({ attempt, call }) => [call, attempt]), [[1, 1], [1, 2], [
        1,
        3
      ]])
    }))
})
