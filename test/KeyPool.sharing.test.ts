/** Several pools of one name, as several processes would be, on the virtual clock. */
import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Schedule from "effect/Schedule"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import type * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolStore from "../src/PoolStore.js"
import * as SharedPool from "../src/SharedPool.js"
import { seeded } from "./support/limited.js"
import {
  bad,
  calm,
  closedFor,
  Failed,
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

/** So many pools over one engine, with what it was asked. */
const together = (count: number, settings: KeyPool.Settings) =>
  Effect.gen(function*() {
    const engine = yield* SharedPool.makeMemory
    const asked = yield* Ref.make<ReadonlyArray<SharedPool.Claim | SharedPool.Notice>>([])
    const share = (pool: string) =>
      Effect.map(engine.share(pool), (port): SharedPool.SharedPool => ({
        ...port,
        tell: (notices) => Effect.zipRight(Ref.update(asked, (all) => [...all, ...notices]), port.tell(notices)),
        claim: (claim) => Effect.zipRight(Ref.update(asked, (all) => [...all, claim]), port.claim(claim))
      }))
    const make = KeyPool.make(settings).pipe(
      Effect.provideService(PoolStore.PoolStore, { ...PoolStore.none, share })
    )
    const pools = yield* Effect.replicateEffect(make, count)
    yield* calm
    return { engine, pools, make, asked: Ref.get(asked), forget: Ref.set(asked, []) }
  })

const pair = (settings: KeyPool.Settings) =>
  Effect.gen(function*() {
    const { pools, ...rest } = yield* together(2, settings)
    const [here, there] = pools
    if (here === undefined || there === undefined) return yield* Effect.dieMessage("no pools")
    return { here, there, ...rest }
  })

const inFlight = (pool: KeyPool.Service) =>
  Effect.map(pool.snapshot, ({ keys }) => keys.reduce((all, key) => all + key.inFlight, 0))

describe("P4: what is told", () => {
  test("P4: a told cooldown of a key holds everywhere, to the same instant", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("ab"), ...plain })
      yield* report(here, "a", "RateLimited", { wait: "10 seconds", scope: "key" })
      yield* calm
      assert.strictEqual(yield* closedFor(there, "a"), 10_020)
      assert.strictEqual(yield* closedFor(there, "b"), undefined)
    }))

  test("T4, P4: what others hold back of a key is among the reasons", () =>
    Effect.gen(function*() {
      const { pools: [here, there] } = yield* together(2, {
        keys: keys("a", { a: { limits: { requestsPerMinute: 1 } } }),
        ...plain,
        maxWait: 0
      })
      if (here === undefined || there === undefined) return assert.fail("there are two")
      yield* here.run(() => Effect.void)
      yield* Effect.flip(there.run(() => Effect.void))
      const [key] = (yield* there.explain()).keys
      assert.deepInclude(key, { verdict: "closed", gates: [{ gate: "limit", until: 60_000 }] })
    }))

  test("P4: told cooldowns merge by maximum: none is ever shortened", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("a", { a: { quotaGroup: "g" } }), ...plain })
      const held = yield* Effect.scoped(Effect.gen(function*() {
        const lease = yield* there.lease
        yield* report(here, "a", "RateLimited", { wait: "10 seconds" })
        yield* calm
        assert.strictEqual(yield* closedFor(there, "a"), 10_020)
        // What was in flight there brings a shorter one, and then a longer one.
        yield* lease.commit(Outcome.fault(Fault.make("RateLimited", { wait: "4 seconds" })))
        return yield* calm
      }))
      assert.strictEqual(held, undefined)
      assert.strictEqual(yield* closedFor(here, "a"), 10_020)
      assert.strictEqual(yield* closedFor(there, "a"), 10_020)
    }))

  test("P4: of two cooldowns that are told at the same time the longer one holds, on both sides", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({ keys: keys("ab"), ...plain })
      const limited = (pool: KeyPool.Service, label: string, seconds: number) =>
        report(pool, label, "QuotaExhausted", { reset: Duration.seconds(seconds), scope: "key" })
      yield* engine.slow(10)
      yield* limited(here, "a", 10)
      yield* limited(there, "a", 20)
      yield* TestClock.adjust(30)
      yield* limited(here, "b", 20)
      yield* limited(there, "b", 10)
      yield* TestClock.adjust(30)
      for (const pool of [here, there]) {
        assert.isAtLeast((yield* closedFor(pool, "a")) ?? 0, 19_900)
        assert.isAtLeast((yield* closedFor(pool, "b")) ?? 0, 19_900)
      }
    }))

  test("P4: what an engine was too slow to take in is told again", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({ keys: keys("a"), ...plain })
      yield* engine.slow("5 seconds")
      yield* report(here, "a", "RateLimited", { wait: "1 minute", scope: "key" })
      yield* TestClock.adjust("10 seconds")
      assert.isUndefined(yield* closedFor(there, "a"))
      yield* engine.slow(0)
      yield* TestClock.adjust("2 seconds")
      assert.strictEqual(yield* closedFor(there, "a"), 48_020)
    }))

  test("P4: cooldowns of groups and of single models hold everywhere", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({
        keys: keys("ab", { a: { quotaGroup: "g" }, b: { quotaGroup: "g" } }),
        ...plain,
        budget: "30 seconds"
      })
      const send = (pool: KeyPool.Service, model: string, outcome: Outcome.Outcome) =>
        Effect.exit(pool.run(() => Effect.succeed(1), { model, classify: () => outcome, replayable: "never" }))
      const limited = Fault.make("RateLimited", { wait: "10 seconds", perModel: true })
      yield* send(here, "large", Outcome.fault(limited))
      yield* calm
      const waiting = yield* Effect.fork(send(there, "large", Outcome.success))
      yield* calm
      assert.isTrue(Option.isNone(yield* Fiber.poll(waiting)))
      assert.isTrue(Exit.isSuccess(yield* send(there, "small", Outcome.success)))
      yield* TestClock.adjust(10_020)
      assert.isTrue(Option.isSome(yield* Fiber.poll(waiting)))
      yield* report(there, "a", "QuotaExhausted", { reset: "1 minute" })
      yield* calm
      assert.isAbove((yield* closedFor(here, "b")) ?? 0, 59_000)
    }))

  test("P4: nothing is told of a plain success, and nothing is asked", () =>
    Effect.gen(function*() {
      const { asked, forget, here, there } = yield* pair({ keys: keys("ab"), ...plain })
      yield* forget
      yield* Effect.replicateEffect(here.run(() => Effect.succeed(1)), 20)
      yield* Effect.replicateEffect(there.run(() => Effect.succeed(1)), 20)
      yield* calm
      assert.deepStrictEqual(yield* asked, [])
    }))

  test("P4: a breaker that opens is open everywhere, and one that closes is closed", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("ab"), ...plain, attribution: "per-key" })
      const events = yield* watch
      yield* trip(here, "a")
      yield* calm
      assert.strictEqual((yield* keyOf(there, "a")).breaker, "open")
      assert.strictEqual(yield* closedFor(there, "a"), 30_000)
      yield* TestClock.adjust("30 seconds")
      yield* report(there, "a", Outcome.success)
      yield* calm
      assert.strictEqual((yield* keyOf(here, "a")).breaker, "closed")
      assert.strictEqual(named(yield* events, "circuit.open").length, 2)
    }))

  test("P4: a transition that was made before another one was heard of has lost against that", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({ keys: keys("ab"), ...plain, attribution: "per-key" })
      yield* engine.slow("20 millis")
      yield* trip(here, "a")
      yield* calm
      yield* TestClock.adjust("10 millis")
      // While this is told, the other's news come, and nothing else is.
      yield* report(there, "b", "RateLimited", { wait: "1 minute" })
      yield* calm
      yield* TestClock.adjust("5 millis")
      yield* trip(there, "a")
      yield* calm
      yield* TestClock.adjust("1 second")
      assert.deepStrictEqual([yield* closedFor(here, "a"), yield* closedFor(there, "a")], [28_985, 29_015])
    }))

  test("B4, P4: outcomes of leases from before an adopted transition change statistics, never state", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("a"), ...plain, attribution: "per-key" })
      const old = yield* Effect.replicateEffect(there.lease, 3)
      yield* trip(here, "a")
      yield* calm
      yield* TestClock.adjust("30 seconds")
      yield* report(here, "a", Outcome.success)
      yield* calm
      for (const lease of old) yield* lease.commit(Outcome.fault(Fault.make("ServerError")))
      yield* calm
      const key = yield* keyOf(there, "a")
      assert.strictEqual(key.breaker, "closed")
      assert.strictEqual(key.faults, 3)
    }))

  test("P4: of two transitions made at once the first counts, and both pools end up with it", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({ keys: keys("ab"), ...plain, attribution: "per-key" })
      yield* engine.slow(10)
      yield* trip(here, "a")
      const breaker = Option.getOrThrow(yield* there.breaker(yield* idOf(there, "a")))
      yield* breaker.isolate
      yield* TestClock.adjust(100)
      yield* calm
      const [one, other] = [yield* keyOf(here, "a"), yield* keyOf(there, "a")]
      assert.deepStrictEqual(one.closed?.until, other.closed?.until)
      assert.strictEqual(one.breaker, other.breaker)
    }))

  test("P4, K5: a reset by hand holds everywhere", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("ab"), ...plain, attribution: "per-key" })
      yield* trip(here, "a")
      yield* report(there, "b", "Unauthorized", { explicit: true })
      yield* calm
      assert.isDefined(yield* closedFor(here, "b"))
      yield* there.reset(yield* idOf(there, "a"))
      yield* there.reset(yield* idOf(there, "b"))
      yield* calm
      for (const pool of [here, there]) {
        assert.deepStrictEqual((yield* pool.snapshot).keys.map(({ breaker, closed }) => [breaker, closed]), [
          ["closed", undefined],
          ["closed", undefined]
        ])
      }
      // And the others may open it again: the versions went on.
      yield* trip(here, "a")
      yield* calm
      assert.strictEqual((yield* keyOf(there, "a")).breaker, "open")
    }))

  test("F2, P4: a bench that was a mistake does not live on elsewhere", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("abc"), ...plain })
      for (const label of ["a", "b"]) yield* report(here, label, Outcome.success)
      yield* report(here, "a", "Unauthorized", { explicit: true })
      yield* calm
      assert.isAbove((yield* closedFor(there, "a")) ?? 0, 3_600_000)
      yield* TestClock.adjust("1 second")
      // The second one within a minute: both are suspected to have one cause, and rest for a minute at most.
      yield* report(here, "b", "Unauthorized", { explicit: true })
      yield* calm
      assert.isAtMost((yield* closedFor(here, "a")) ?? Infinity, 60_000)
      assert.isAtMost((yield* closedFor(there, "a")) ?? Infinity, 60_000)
      assert.isAtMost((yield* closedFor(there, "b")) ?? Infinity, 60_000)
    }))

  test("F2, P4: penalties that are refunded in an outage are refunded everywhere", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("abcd"), ...plain, strategy: "sequential-then-rotate" })
      yield* trip(here, "a")
      yield* calm
      assert.strictEqual((yield* keyOf(there, "a")).breaker, "open")
      // Five in a row of two keys: it is the provider.
      yield* report(here, "b", "ServerError")
      yield* report(here, "b", "ServerError")
      yield* calm
      assert.strictEqual((yield* keyOf(here, "a")).breaker, "closed")
      assert.strictEqual((yield* keyOf(there, "a")).breaker, "closed")
    }))

  test("P4: who joins later learns what the others know", () =>
    Effect.gen(function*() {
      const { here, make } = yield* pair({ keys: keys("ab"), ...plain, attribution: "per-key" })
      yield* trip(here, "a")
      yield* report(here, "b", "RateLimited", { wait: "10 seconds" })
      yield* TestClock.adjust("4 seconds")
      const late = yield* make
      assert.strictEqual((yield* keyOf(late, "a")).breaker, "open")
      assert.strictEqual(yield* closedFor(late, "b"), 6_020)
    }))
})

describe("P4: what is claimed", () => {
  test("P4, A1: a declared limit is exact over all pools, and none is refused upstream", () =>
    Effect.gen(function*() {
      const { pools } = yield* together(3, {
        keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
        ...plain,
        budget: "1 hour"
      })
      const provider = yield* upstream(() => ok(700))
      const all = yield* Effect.fork(Effect.all(
        pools.flatMap((pool) => Array.from({ length: 20 }, () => pool.run(provider.send))),
        { concurrency: "unbounded" }
      ))
      yield* TestClock.adjust("6 minutes")
      assert.strictEqual((yield* Fiber.join(all)).length, 60)
      const instants = (yield* provider.sent).map(({ at }) => at)
      for (const from of instants) {
        assert.isAtMost(instants.filter((at) => at >= from && at < from + 60_000).length, 10)
      }
    }))

  test("P4, C2: who is refused waits for the instant it fits, and few ask for it", () =>
    Effect.gen(function*() {
      const { asked, pools } = yield* together(2, {
        keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
        ...plain,
        budget: "1 hour"
      })
      const provider = yield* upstream(() => ok(700))
      const all = yield* Effect.fork(Effect.all(
        pools.flatMap((pool) => Array.from({ length: 100 }, () => pool.run(provider.send))),
        { concurrency: "unbounded" }
      ))
      yield* TestClock.adjust("30 minutes")
      assert.strictEqual((yield* Fiber.join(all)).length, 200)
      const claims = (yield* asked).filter((one) => !("_tag" in one))
      // One each, and for each that opens one of the other pool: no herd.
      assert.isAtMost(claims.length, 450)
    }))

  test("P4: a limit of a group is one limit for its keys everywhere; tokens are settled by what was used", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({
        keys: keys("ab", {
          a: { quotaGroup: "g", limits: { tokensPerMinute: 1_000 } },
          b: { quotaGroup: "g", limits: { tokensPerMinute: 1_000 } }
        }),
        ...plain,
        maxWait: 0
      })
      const send = (pool: KeyPool.Service, used: number) =>
        Effect.either(pool.run((lease) => Effect.sync(() => lease.used({ input: used, output: 0 })), {
          tokens: { input: 600, maxOutput: 0 }
        }))
      assert.isTrue(Either.isRight(yield* send(here, 300)))
      yield* calm
      // 300 are used, so that 600 fit, and then no more.
      assert.isTrue(Either.isRight(yield* send(there, 600)))
      yield* calm
      assert.isTrue(Either.isLeft(yield* send(here, 600)))
      yield* TestClock.adjust("1 minute")
      assert.isTrue(Either.isRight(yield* send(here, 600)))
    }))

  test("P4: concurrency is exact over all pools, and nobody waits longer than need be", () =>
    Effect.gen(function*() {
      const { pools } = yield* together(3, {
        keys: keys("a", { a: { limits: { concurrency: 2 } } }),
        ...plain,
        budget: "1 hour"
      })
      const provider = yield* upstream(() => ok(1_000))
      const most = yield* Ref.make(0)
      const send = (lease: KeyPool.Lease) =>
        Effect.zipRight(
          Effect.flatMap(provider.running, (running) => Ref.update(most, (n) => Math.max(n, running + 1))),
          provider.send(lease)
        )
      const all = yield* Effect.fork(Effect.all(
        pools.flatMap((pool) => Array.from({ length: 4 }, () => pool.run(send))),
        { concurrency: "unbounded" }
      ))
      yield* TestClock.adjust("6 seconds")
      assert.strictEqual((yield* Fiber.join(all)).length, 12)
      assert.strictEqual(yield* Ref.get(most), 2)
    }))

  test("P4, C1: who is refused goes to another key at once", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({
        keys: keys("ab", { a: { limits: { requestsPerMinute: 1 } } }),
        ...plain,
        strategy: "sequential-then-rotate"
      })
      const provider = yield* upstream()
      assert.strictEqual(yield* here.run(provider.send), "a")
      assert.strictEqual(yield* there.run(provider.send), "b")
      assert.deepStrictEqual(yield* provider.trace, ["a@0", "b@0"])
      const key = yield* keyOf(there, "a")
      assert.strictEqual(key.closed?.gate, "limit")
      assert.strictEqual(key.total, 0)
      assert.strictEqual(key.inFlight, 0)
    }))

  test("P4, C2: what does not fit in time fails at once", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({
        keys: keys("a", { a: { limits: { requestsPerDay: 1 } } }),
        ...plain
      })
      yield* here.run(() => Effect.void)
      const refused = yield* Effect.flip(there.run(() => Effect.void))
      assert.strictEqual(refused._tag, "AllKeysExhausted")
    }))

  test("P4, B2: 20 callers in each of 3 pools at half-open make exactly one probe", () =>
    Effect.gen(function*() {
      const { pools } = yield* together(3, { keys: keys("a"), ...plain, attribution: "per-key", budget: "5 minutes" })
      const provider = yield* upstream(() => ok(5_000))
      for (const pool of pools.slice(0, 1)) yield* trip(pool, "a")
      yield* calm
      const all = yield* Effect.fork(Effect.all(
        pools.flatMap((pool) => Array.from({ length: 20 }, () => pool.run(provider.send))),
        { concurrency: "unbounded" }
      ))
      yield* TestClock.adjust("34 seconds")
      assert.deepStrictEqual(yield* provider.trace, ["a@30000"])
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* Fiber.join(all)).length, 60)
    }))

  test("P4, B2: a probe that fails is told before anybody may try again", () =>
    Effect.gen(function*() {
      const { pools } = yield* together(3, {
        keys: keys("a"),
        ...plain,
        ...once,
        attribution: "per-key",
        budget: "10 minutes"
      })
      const provider = yield* upstream((_, index) => index === 0 ? bad("ServerError", {}, 1_000) : ok(1_000))
      for (const pool of pools.slice(0, 1)) yield* trip(pool, "a")
      yield* calm
      const all = yield* Effect.fork(Effect.all(
        pools.map((pool) => Effect.exit(pool.run(provider.send))),
        { concurrency: "unbounded" }
      ))
      yield* TestClock.adjust("32 seconds")
      assert.deepStrictEqual(yield* provider.trace, ["a@30000"])
      // Opened for twice as long: the next probe is one again.
      yield* TestClock.adjust("59500 millis")
      assert.deepStrictEqual(yield* provider.trace, ["a@30000", "a@91000"])
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* Fiber.join(all)).filter(Exit.isSuccess).length, 2)
    }))

  test("P4, B5: the way back from a spent quota is one trial over all pools, of a group too", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({
        keys: keys("ab", { a: { quotaGroup: "g" }, b: { quotaGroup: "g" } }),
        ...plain,
        budget: "3 hours"
      })
      const provider = yield* upstream(() => ok(3_000))
      yield* report(here, "a", "QuotaExhausted")
      yield* calm
      const all = yield* Effect.fork(Effect.all(
        [here, there].flatMap((pool) => Array.from({ length: 3 }, () => pool.run(provider.send))),
        { concurrency: "unbounded" }
      ))
      yield* TestClock.adjust("1 hour")
      yield* TestClock.adjust("2 seconds")
      assert.strictEqual((yield* provider.sent).length, 1)
      yield* TestClock.adjust("1 minute")
      assert.strictEqual((yield* Fiber.join(all)).length, 6)
    }))

  test("P4, C5: a probe that is interrupted is another's at once, in another pool too", () =>
    Effect.gen(function*() {
      const { here, there } = yield* pair({ keys: keys("a"), ...plain, attribution: "per-key", budget: "5 minutes" })
      const provider = yield* upstream((_, index) => index === 0 ? ok(60_000) : ok(10))
      yield* trip(here, "a")
      yield* TestClock.adjust("30 seconds")
      const probe = yield* Effect.fork(here.run(provider.send))
      yield* calm
      const other = yield* Effect.fork(there.run(provider.send))
      yield* TestClock.adjust("5 seconds")
      assert.strictEqual((yield* provider.sent).length, 1)
      yield* Fiber.interrupt(probe)
      yield* TestClock.adjust(10)
      assert.strictEqual(yield* Fiber.join(other), "a")
      assert.deepStrictEqual(yield* provider.trace, ["a@30000", "a@35000"])
    }))

  test("P4, C5, C6: who is interrupted while it asks leaves nothing taken", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({
        keys: keys("a", { a: { limits: { requestsPerMinute: 1 } } }),
        ...plain,
        maxWait: 0
      })
      yield* engine.slow(20)
      const asking = yield* Effect.fork(here.run(() => Effect.void))
      yield* TestClock.adjust(10)
      yield* Fiber.interrupt(asking)
      assert.strictEqual(yield* inFlight(here), 0)
      yield* TestClock.adjust(100)
      yield* engine.slow(0)
      assert.isTrue(Exit.isSuccess(yield* Effect.exit(there.run(() => Effect.void))))
    }))
})

describe("P2, P4: an engine that is away", () => {
  test("P4: each pool keeps to its part of the limits, and they are whole again afterwards", () =>
    Effect.gen(function*() {
      const { engine, pools } = yield* together(3, {
        keys: keys("a", { a: { limits: { requestsPerMinute: 10, concurrency: 7 } } }),
        ...plain,
        maxWait: 0
      })
      const send = (pool: KeyPool.Service | undefined) =>
        pool === undefined
          ? Effect.succeed(0)
          : Effect.map(Effect.replicateEffect(Effect.either(pool.run(() => Effect.void)), 12), (all) =>
            all.filter(Either.isRight).length)
      yield* engine.cutOff()
      yield* calm
      assert.deepStrictEqual(yield* Effect.forEach(pools, send), [3, 3, 3])
      const held = yield* Effect.scoped(Effect.exit(Effect.replicateEffect(
        Effect.flatMap(Effect.succeed(pools[0]), (pool) => pool?.lease ?? Effect.never),
        1
      )))
      assert.isTrue(Exit.isFailure(held))
      yield* TestClock.adjust("61 seconds")
      yield* engine.restore()
      yield* calm
      assert.deepStrictEqual(yield* Effect.forEach(pools, send), [10, 0, 0])
    }))

  test("P4: concurrency is divided too, and what was begun meanwhile counts when the engine is back", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({
        keys: keys("a", { a: { limits: { concurrency: 4 } } }),
        ...plain,
        maxWait: 0
      })
      yield* engine.cutOff()
      yield* calm
      const scope = yield* Scope.make()
      const lease = (pool: KeyPool.Service) => Effect.either(Scope.extend(pool.lease, scope))
      const begun = yield* Effect.forEach([here, here, here, there, there, there], lease)
      assert.deepStrictEqual(begun.map(Either.isRight), [true, true, false, true, true, false])
      yield* engine.restore()
      yield* calm
      assert.isTrue(Either.isLeft(yield* lease(here)))
      yield* Scope.close(scope, Exit.void)
      yield* calm
      const again = yield* Scope.make()
      const all = yield* Effect.replicateEffect(Effect.either(Scope.extend(here.lease, again)), 5)
      assert.strictEqual(all.filter(Either.isRight).length, 4)
      yield* Scope.close(again, Exit.void)
    }))

  test("P2: it is told once per outage, and no call is slower for it", () =>
    Effect.gen(function*() {
      const { engine, here } = yield* pair({ keys: keys("ab"), ...plain })
      const events = yield* watch
      yield* engine.cutOff(0)
      yield* report(here, "a", "RateLimited", { wait: "10 seconds" })
      yield* Effect.replicateEffect(here.run(() => Effect.void), 5)
      yield* calm
      const told = named(yield* events, "store.degraded")
      assert.strictEqual(told.length, 1)
      yield* engine.restore(0)
      yield* calm
      yield* engine.cutOff(0)
      yield* calm
      assert.strictEqual(named(yield* events, "store.degraded").length, 2)
      assert.strictEqual(yield* Clock.currentTimeMillis, 0)
    }))

  test("P4: what happened on both sides meanwhile is known on both sides when it is back", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({ keys: keys("abcdef"), ...plain, attribution: "per-key" })
      yield* report(here, "c", "Unauthorized", { explicit: true })
      yield* calm
      yield* engine.cutOff(0)
      yield* report(here, "a", "RateLimited", { wait: "10 seconds" })
      yield* trip(here, "d")
      yield* report(there, "b", "RateLimited", { wait: "20 seconds" })
      yield* trip(there, "e")
      yield* there.reset(yield* idOf(there, "c"))
      yield* calm
      assert.isUndefined(yield* closedFor(there, "a"))
      yield* engine.restore(0)
      yield* calm
      for (const pool of [here, there]) {
        const { keys } = yield* pool.snapshot
        assert.deepStrictEqual(keys.map(({ closed }) => closed?.until), [
          10_020,
          20_020,
          undefined,
          30_000,
          30_000,
          undefined
        ])
      }
    }))

  test("P4: an engine that lost everything learns it again, and old versions do not hold against new ones", () =>
    Effect.gen(function*() {
      const { engine, here, make, there } = yield* pair({ keys: keys("abcd"), ...plain, attribution: "per-key" })
      yield* report(here, "a", "RateLimited", { wait: "10 seconds" })
      yield* trip(there, "b")
      yield* calm
      yield* engine.loseAll
      yield* calm
      const late = yield* make
      for (const pool of [here, there, late]) {
        assert.strictEqual(yield* closedFor(pool, "a"), 10_020)
        assert.strictEqual((yield* keyOf(pool, "b")).breaker, "open")
      }
      yield* TestClock.adjust("30 seconds")
      yield* report(late, "b", Outcome.success)
      yield* calm
      for (const pool of [here, there, late]) assert.strictEqual((yield* keyOf(pool, "b")).breaker, "closed")
    }))

  test("P4: what was taken of a limit counts after the engine lost everything, or was away", () =>
    Effect.gen(function*() {
      const settings = {
        keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
        ...plain,
        maxWait: 0
      } as const
      const { engine, here, there } = yield* pair(settings)
      const send = (pool: KeyPool.Service, times: number) =>
        Effect.map(
          Effect.replicateEffect(Effect.either(pool.run(() => Effect.void)), times),
          (all) => all.filter(Either.isRight).length
        )
      assert.strictEqual(yield* send(here, 4), 4)
      yield* engine.loseAll
      yield* calm
      assert.strictEqual(yield* send(there, 4), 4)
      yield* TestClock.adjust("1 second")
      yield* engine.cutOff()
      yield* calm
      assert.strictEqual(yield* send(here, 9), 1)
      yield* engine.restore()
      yield* calm
      assert.strictEqual(yield* send(there, 9), 1)
    }))

  test("P2, P4: an engine that answers too late is not waited for: each keeps to its part", () =>
    Effect.gen(function*() {
      const { engine, here } = yield* pair({
        keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
        ...plain,
        maxWait: 0
      })
      yield* engine.slow(Duration.seconds(3))
      const first = yield* Effect.fork(here.run(() => Effect.void))
      yield* TestClock.adjust(25)
      assert.isTrue(Exit.isSuccess(yield* Fiber.await(first)))
      const all = yield* Effect.fork(Effect.replicateEffect(Effect.either(here.run(() => Effect.void)), 9))
      yield* TestClock.adjust("1 second")
      assert.strictEqual((yield* Fiber.join(all)).filter(Either.isRight).length, 4)
    }))

  test("P4: while a pool reads everything again, limits stay those of all", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({
        keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
        ...plain,
        maxWait: 0
      })
      const send = (pool: KeyPool.Service, times: number) =>
        Effect.map(
          Effect.replicateEffect(Effect.either(pool.run(() => Effect.void)), times),
          (all) => all.filter(Either.isRight).length
        )
      assert.deepStrictEqual([yield* send(here, 6), yield* send(there, 3)], [6, 3])
      // Both have something to tell, which takes its time.
      yield* engine.slow(20)
      yield* engine.loseAll
      yield* calm
      const more = [yield* send(here, 9), yield* send(there, 9)]
      // No more than its half of the limit has each: one of them has used that up already.
      assert.deepStrictEqual(more, [0, 2])
      yield* TestClock.adjust("1 second")
      yield* engine.slow(0)
      yield* TestClock.adjust("2 seconds")
      assert.deepStrictEqual([yield* send(here, 9), yield* send(there, 9)], [0, 0])
    }))

  test("A1, P4: what is more than a pool's part of a limit passes when nothing is taken", () =>
    Effect.gen(function*() {
      const { engine, here } = yield* pair({
        keys: keys("a", { a: { limits: { tokensPerMinute: 1_000 } } }),
        ...plain,
        maxWait: 0
      })
      yield* engine.cutOff()
      yield* calm
      const large = Effect.either(here.run(() => Effect.void, { tokens: { input: 800, maxOutput: 0 } }))
      assert.deepStrictEqual([Either.isRight(yield* large), Either.isRight(yield* large)], [true, false])
    }))

  test("A1, P4: what is answered while a pool comes back counts for all", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({
        keys: keys("a", { a: { limits: { requestsPerMinute: 10, tokensPerMinute: 1_000 } } }),
        ...plain,
        maxWait: 0
      })
      const send = (pool: KeyPool.Service, times: number) =>
        Effect.map(
          Effect.replicateEffect(
            Effect.either(pool.run(() => Effect.void, { tokens: { input: 1, maxOutput: 0 } })),
            times
          ),
          (all) => all.filter(Either.isRight).length
        )
      yield* engine.cutOff()
      yield* calm
      assert.strictEqual(yield* send(here, 1), 1)
      yield* engine.slow(20)
      yield* engine.restore()
      yield* calm
      assert.strictEqual(yield* send(here, 9), 4)
      yield* TestClock.adjust("1 second")
      yield* engine.slow(0)
      assert.strictEqual(yield* send(there, 10), 5)
    }))

  test("P4: however much is begun meanwhile, claims are decided together again", () =>
    Effect.gen(function*() {
      const { asked, engine, forget, here } = yield* pair({
        keys: keys("a", { a: { limits: { concurrency: 100_000 } } }),
        ...plain
      })
      yield* engine.cutOff()
      yield* calm
      // More begin, and last for a while, than can be told of one after the other.
      yield* Effect.forkScoped(Effect.forever(Effect.zipRight(
        Effect.replicateEffect(Effect.forkScoped(here.run(() => Effect.sleep("5 seconds"))), 40),
        Effect.sleep(100)
      )))
      yield* TestClock.adjust(150)
      yield* engine.slow(24)
      yield* engine.restore()
      yield* TestClock.adjust(1_200)
      yield* forget
      yield* TestClock.adjust(200)
      const claims = (yield* asked).filter((one): one is SharedPool.Claim => !("_tag" in one))
      assert.strictEqual(claims.length, 80)
      assert.isTrue(claims.every(({ held }) => held !== true))
    }))

  test("P2, C6: an engine that is broken fails no call, and holds up none", () =>
    Effect.gen(function*() {
      const broken = Effect.die(new Error("a bug"))
      const engine = yield* SharedPool.makeMemory
      const settings = { keys: keys("ab", { a: { limits: { concurrency: 1 } } }), ...plain, maxWait: 0 } as const
      const events = yield* watch
      for (const part of ["claim", "tell", "settle", "news"] as const) {
        const share = (pool: string) =>
          Effect.map(engine.share(`${pool} ${part}`), (port): SharedPool.SharedPool => ({
            ...port,
            claim: part === "claim" ? () => broken : port.claim,
            tell: part === "tell" ? () => broken : port.tell,
            settle: part === "settle" ? () => broken : port.settle,
            news: part === "news" ? Stream.concat(Stream.take(port.news, 1), Stream.die(new Error("a bug"))) : port.news
          }))
        const pool = yield* KeyPool.make({ ...settings, name: part }).pipe(
          Effect.provideService(PoolStore.PoolStore, { ...PoolStore.none, share })
        )
        yield* report(pool, "a", "RateLimited", { wait: "1 second", scope: "key" })
        yield* TestClock.adjust("2 seconds")
        const all = yield* Effect.forEach([1, 2, 3, 4], () => Effect.exit(pool.run(() => Effect.void)))
        assert.deepStrictEqual(all.map(Exit.isSuccess), [true, true, true, true], part)
        assert.strictEqual(yield* inFlight(pool), 0, part)
      }
      const told = named(yield* events, "store.degraded")
      assert.deepStrictEqual(told.map(({ pool }) => pool), ["claim", "news"])
    }))

  test("P2: a claim that nobody answers holds up no call for more than 25 ms, is told, and is given back", () =>
    Effect.gen(function*() {
      const engine = yield* SharedPool.makeMemory
      const answers = yield* Effect.makeLatch(false)
      const given = yield* Ref.make(0)
      const share = (pool: string) =>
        Effect.map(engine.share(pool), (port): SharedPool.SharedPool => ({
          ...port,
          claimTimeout: undefined,
          claim: (claim) => Effect.uninterruptible(Effect.zipRight(answers.await, port.claim(claim))),
          settle: (ticket, settled) =>
            Effect.zipRight(
              Ref.update(given, (n) => settled._tag === "Unsent" ? n + 1 : n),
              port.settle(ticket, settled)
            )
        }))
      const events = yield* watch
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }),
        ...plain,
        maxWait: 0
      }).pipe(Effect.provideService(PoolStore.PoolStore, { ...PoolStore.none, share }))
      yield* calm
      const first = yield* Effect.fork(pool.run(() => Effect.void))
      yield* TestClock.adjust(24)
      assert.isTrue(Option.isNone(yield* Fiber.poll(first)))
      yield* TestClock.adjust(1)
      assert.isTrue(Option.isSome(yield* Fiber.poll(first)))
      // And then none is held up at all for a while.
      yield* Effect.replicateEffect(pool.run(() => Effect.void), 5)
      assert.strictEqual(yield* Clock.currentTimeMillis, 25)
      const told = named(yield* events, "store.degraded")
      assert.deepStrictEqual(told.map(({ problem }) => problem), [
        "what is shared cannot be reached: a claim got no answer"
      ])
      yield* answers.open
      yield* TestClock.adjust("1 second")
      assert.strictEqual(yield* Ref.get(given), 1)
      yield* pool.run(() => Effect.void)
      assert.strictEqual(yield* inFlight(pool), 0)
      assert.strictEqual(named(yield* events, "store.degraded").length, 1)
    }))

  test("P2: claims that are never answered do not pile up", () =>
    Effect.gen(function*() {
      const engine = yield* SharedPool.makeMemory
      const asking = yield* Ref.make(0)
      const asked = yield* Ref.make(0)
      const share = (pool: string) =>
        Effect.map(engine.share(pool), (port): SharedPool.SharedPool => ({
          ...port,
          claimTimeout: undefined,
          claim: () =>
            Effect.acquireUseRelease(
              Effect.zipRight(Ref.update(asked, (n) => n + 1), Ref.update(asking, (n) => n + 1)),
              () => Effect.never,
              () => Ref.update(asking, (n) => n - 1)
            )
        }))
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { limits: { requestsPerMinute: 1_000 } } }),
        ...plain
      }).pipe(Effect.provideService(PoolStore.PoolStore, { ...PoolStore.none, share }))
      yield* calm
      for (let n = 0; n < 100; n++) {
        yield* Effect.fork(pool.run(() => Effect.void))
        yield* TestClock.adjust("2 seconds")
      }
      assert.strictEqual(yield* Ref.get(asked), 100)
      assert.isAtMost(yield* Ref.get(asking), 30)
      yield* TestClock.adjust("1 minute")
      assert.strictEqual(yield* Ref.get(asking), 0)
    }))

  test("P2: a store that is closed under a pool is told of, and each keeps to its part of the limits", () =>
    Effect.gen(function*() {
      const engine = yield* SharedPool.makeMemory
      const store = yield* Scope.make()
      const events = yield* watch
      const settings = { keys: keys("a", { a: { limits: { requestsPerMinute: 10 } } }), ...plain, maxWait: 0 } as const
      const make = (share: PoolStore.Service["share"]) =>
        KeyPool.make(settings).pipe(Effect.provideService(PoolStore.PoolStore, { ...PoolStore.none, share }))
      yield* make(engine.share)
      const pool = yield* make((pool) => Scope.extend(engine.share(pool), store))
      yield* calm
      yield* Scope.close(store, Exit.void)
      yield* calm
      assert.deepStrictEqual(named(yield* events, "store.degraded").map(({ problem }) => problem), [
        "what is shared cannot be reached: its store was closed"
      ])
      const all = yield* Effect.replicateEffect(Effect.either(pool.run(() => Effect.void)), 12)
      assert.strictEqual(all.filter(Either.isRight).length, 5)
    }))

  test("P4: a pool that is gone holds nothing for ever", () =>
    Effect.gen(function*() {
      const { engine, here, there } = yield* pair({
        keys: keys("a", { a: { limits: { concurrency: 1 } } }),
        ...plain,
        budget: "5 minutes"
      })
      yield* Effect.forkScoped(here.run(() => Effect.never))
      yield* calm
      yield* engine.cutOff(0)
      const waiting = yield* Effect.fork(there.run(() => Effect.succeed("served")))
      yield* TestClock.adjust("10 seconds")
      assert.isTrue(Option.isNone(yield* Fiber.poll(waiting)))
      yield* TestClock.adjust("15 seconds")
      assert.strictEqual(yield* Fiber.join(waiting), "served")
    }))
})

describe("P4: whatever happens", () => {
  /** What an attempt was, as the provider saw it. */
  interface Attempted {
    readonly label: string
    readonly from: number
    to: number | undefined
    readonly probe: boolean
  }

  const limits: Readonly<Record<string, ApiKey.Limits>> = {
    a: { requestsPerMinute: 6 },
    b: { concurrency: 2 },
    c: { requestsPerMinute: 8, concurrency: 3 }
  }
  const settings: KeyPool.Settings = {
    keys: ["a", "b", "c"].map((label) => ({ secret: `secret-${label}`, label, limits: limits[label] })),
    ...plain,
    attribution: "per-key",
    budget: "3 hours",
    maxWaiters: 10_000,
    retryTokens: false,
    retry: Schedule.recurs(1_000)
  }

  /** Plays a history; says what went wrong, if something did. */
  const play = (seed: number) =>
    Effect.gen(function*() {
      const chance = seeded(seed)
      const pick = (n: number) => Math.floor(chance() * n)
      const { engine, pools } = yield* together(3, settings)
      const attempts: Array<Attempted> = []
      const wrong: Array<string> = []
      const cut = new Set<number>()
      /** When something last happened to the engine. */
      let disturbed = 0
      let broken = false
      const check = (attempt: Attempted, now: number) => {
        // While somebody is away, or not yet heard, nobody knows.
        if (cut.size > 0 || now <= disturbed) return
        const { label } = attempt
        const own = attempts.filter((other) => other.label === label)
        const { concurrency = Infinity, requestsPerMinute = Infinity } = limits[label] ?? {}
        const counting = own.filter(({ to }) => to === undefined || now < to + 60_000)
        if (counting.length > requestsPerMinute) wrong.push(`${counting.length} of ${label} in a window at ${now}`)
        const running = own.filter(({ to }) => to === undefined)
        if (running.length > concurrency) wrong.push(`${running.length} of ${label} at once at ${now}`)
        const probes = running.filter(({ from, probe }) => probe && from > disturbed)
        if (probes.length > 1) wrong.push(`${probes.length} probes of ${label} at ${now}`)
      }
      const send = (pool: KeyPool.Service) => (lease: KeyPool.Lease) =>
        Effect.gen(function*() {
          const { label } = lease.key
          const now = yield* Clock.currentTimeMillis
          const { breaker } = yield* keyOf(pool, label)
          const attempt: Attempted = { label, from: now, to: undefined, probe: breaker === "half-open" }
          attempts.push(attempt)
          check(attempt, now)
          const takes = 1 + pick(4_000)
          yield* Effect.ensuring(
            Effect.sleep(takes),
            Effect.map(Clock.currentTimeMillis, (at) => {
              attempt.to = at
            })
          )
          if (label === "b" && broken) return yield* new Failed({ fault: Fault.make("ServerError") })
          return label
        })
      const calls: Array<Fiber.RuntimeFiber<string, unknown>> = []
      const interrupted = new Set<number>()
      for (let step = 0; step < 120; step++) {
        const which = pick(3)
        const pool = pools[which]
        if (pool === undefined) continue
        const what = pick(100)
        const now = yield* Clock.currentTimeMillis
        if (what < 45) calls.push(yield* Effect.fork(pool.run(send(pool))))
        else if (what < 80) yield* TestClock.adjust(pick(8_000))
        else if (what < 85 && calls.length > 0) {
          const at = pick(calls.length)
          const call = calls[at]
          if (call !== undefined && Option.isNone(yield* Fiber.poll(call))) {
            interrupted.add(at)
            yield* Fiber.interrupt(call)
          }
        } else if (what < 89) {
          cut.add(which)
          yield* engine.cutOff(which)
        } else if (what < 94) {
          if (cut.delete(which)) disturbed = now
          yield* engine.restore(which)
        } else if (what < 96) {
          disturbed = now
          yield* engine.loseAll
        } else broken = !broken
      }
      yield* engine.restore()
      cut.clear()
      broken = false
      disturbed = yield* Clock.currentTimeMillis
      yield* TestClock.adjust("40 minutes")
      for (const [at, call] of calls.entries()) {
        const exit = yield* Fiber.poll(call)
        if (interrupted.has(at)) continue
        if (Option.isNone(exit)) wrong.push(`call ${at} was not served`)
        else if (Exit.isFailure(exit.value)) wrong.push(`call ${at}: ${exit.value.cause}`)
      }
      for (const [n, pool] of pools.entries()) {
        if ((yield* inFlight(pool)) !== 0) wrong.push(`${yield* inFlight(pool)} in flight in ${n}`)
        const served = yield* Effect.fork(Effect.all(
          Array.from({ length: 3 }, () => pool.run((lease) => Effect.as(Effect.sleep(1), lease.key.label)))
        ))
        yield* TestClock.adjust("1 second")
        const labels = yield* Fiber.poll(served)
        const found = Option.isSome(labels) && Exit.isSuccess(labels.value) ? labels.value.value : []
        if (new Set(found).size !== 3) {
          wrong.push(`pool ${n} is served by ${found.join()} only`)
        }
        yield* TestClock.adjust("2 minutes")
      }
      return wrong
    })

  test(
    "P4, C2, C6: no limit is exceeded, no probe is two, nobody is lost and no key locked out",
    () =>
      Effect.gen(function*() {
        for (let seed = 1; seed <= histories; seed++) {
          const wrong = yield* Effect.scoped(play(seed))
          assert.deepStrictEqual([seed, wrong], [seed, []])
        }
      }),
    { timeout: 300_000 }
  )
})

/** How many histories are played. */
const histories = Number(process.env["KEYMESH_SHARING_HISTORIES"] ?? 10)
