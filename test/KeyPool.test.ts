import { assert, describe, it } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Config from "effect/Config"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Telemetry from "../src/Telemetry.js"
import {
  after,
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

describe("making a pool", () => {
  test("K3: a setting that cannot be used is refused by name, without the secret", () =>
    Effect.gen(function*() {
      const refused = (settings: unknown) =>
        // The type would refuse these settings; programs without types must be refused alike.
        Effect.flip(KeyPool.make(settings as KeyPool.Settings)).pipe(Effect.map((error) => error.field))
      assert.strictEqual(yield* refused({ keys: [] }), "keys")
      assert.strictEqual(yield* refused({ keys: keys("a"), budgett: 1 }), "budgett")
      assert.strictEqual(yield* refused({ keys: keys("a"), strategy: "no-such" }), "strategy")
      assert.strictEqual(yield* refused({ keys: keys("a"), maxWaiters: -1 }), "maxWaiters")
      assert.strictEqual(yield* refused({ keys: keys("a"), ramp: { steps: 1 } }), "ramp.steps")
      assert.strictEqual(
        yield* refused({ keys: keys("a"), cooldowns: { forbidden: { factor: 0 } } }),
        "cooldowns.forbidden.factor"
      )
      assert.strictEqual(yield* refused({ keys: [{ secret: "secret-a", weight: -1 }] }), "keys[0].weight")
      assert.strictEqual(yield* refused({ keys: keys("a"), retry: 5 }), "retry")
      const error = yield* Effect.flip(KeyPool.make({ keys: [{ secret: "secret-\u0000" }] }))
      assert.notInclude(`${error} ${JSON.stringify(error)}`, "secret-\u0000")
    }))

  test("K3: keys given twice collapse, with an event", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: [...keys("ab"), { secret: "secret-a", label: "again" }] })
      assert.strictEqual((yield* pool.snapshot).keys.length, 2)
      assert.deepStrictEqual(
        named(yield* events, "key.added").map((event) => [event.label, event.duplicate]),
        [["a", false], ["b", false], ["again", true]]
      )
    }))

  it.scoped("layer and layerConfig give the pool as a service", () =>
    Effect.gen(function*() {
      const served = Effect.flatMap(KeyPool.KeyPool, (pool) => pool.run((lease) => Effect.succeed(lease.key.label)))
      const fixed = KeyPool.layer({ keys: keys("a") }).pipe(Layer.provide(KeyPool.layerDefaults))
      assert.strictEqual(yield* Effect.provide(served, fixed), "a")
      const configured = KeyPool.layerConfig({
        keys: ApiKey.config("KEYS"),
        budget: Config.duration("BUDGET").pipe(Config.withDefault("10 seconds"))
      }).pipe(
        Layer.provide(KeyPool.layerDefaults),
        Layer.provide(Layer.setConfigProvider(ConfigProvider.fromMap(new Map([["KEYS", "one, two"]]))))
      )
      const label = yield* Effect.provide(served, configured)
      assert.isNotEmpty(label)
      const missing = KeyPool.layerConfig({ keys: ApiKey.config("NO_KEYS") }).pipe(
        Layer.provide(KeyPool.layerDefaults),
        Layer.provide(Layer.setConfigProvider(ConfigProvider.fromMap(new Map())))
      )
      assert.isTrue(Exit.isFailure(yield* Effect.exit(Layer.build(missing))))
    }))
})

describe("breaker", () => {
  test("B1: three faults in a row open it for 30 s; a success between starts the row again", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "ServerError")
      yield* report(pool, "a", "Timeout")
      yield* report(pool, "a", Outcome.success)
      yield* report(pool, "a", "Network")
      yield* report(pool, "a", "ServerError")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      yield* report(pool, "a", "ServerError")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open")
      assert.strictEqual(yield* closedFor(pool, "a"), 30_000)
    }))

  test("B1: a good probe closes it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      assert.strictEqual(yield* pool.run(() => Effect.succeed("served")), "served")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("B1: a bad probe opens it again for twice as long, up to 5 min", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      const waits: Array<number | undefined> = []
      for (let i = 0; i < 6; i++) {
        const wait = yield* closedFor(pool, "a")
        waits.push(wait)
        yield* TestClock.adjust(wait ?? 0)
        yield* report(pool, "a", "ServerError")
      }
      assert.deepStrictEqual(waits, [30_000, 60_000, 120_000, 240_000, 300_000, 300_000])
    }))

  test("B1: with a factor of 1 the cooldown stays as it is; the threshold is a setting", () =>
    Effect.gen(function*() {
      const breaker = { threshold: 1, cooldown: "5 seconds", cooldownFactor: 1 } as const
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, breaker })
      for (let i = 0; i < 3; i++) {
        yield* report(pool, "a", "ServerError")
        assert.strictEqual(yield* closedFor(pool, "a"), 5_000)
        yield* TestClock.adjust("5 seconds")
      }
    }))

  const flap = (pool: KeyPool.Service, label: string) =>
    Effect.gen(function*() {
      for (let i = 0; i < 5; i++) {
        yield* report(pool, label, Outcome.success)
        yield* report(pool, label, "ServerError")
      }
    })

  test("B1: a key that flaps while its siblings are well is opened by its rate", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      for (let i = 0; i < 10; i++) yield* report(pool, "b", Outcome.success)
      yield* flap(pool, "a")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open")
      assert.strictEqual((yield* keyOf(pool, "b")).breaker, "closed")
    }))

  test("B1: a key that flaps as its siblings do stays closed", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      for (let i = 0; i < 5; i++) {
        yield* report(pool, "a", Outcome.success)
        yield* report(pool, "b", Outcome.success)
        yield* report(pool, "a", "ServerError")
        yield* report(pool, "b", "ServerError")
      }
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      assert.strictEqual((yield* keyOf(pool, "b")).breaker, "closed")
    }))

  test("B1: fewer than 10 outcomes, or outcomes that are too old, do not trip by rate", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      for (let i = 0; i < 10; i++) yield* report(pool, "b", Outcome.success)
      for (let i = 0; i < 4; i++) {
        yield* report(pool, "a", Outcome.success)
        yield* report(pool, "a", "ServerError")
      }
      yield* TestClock.adjust("31 seconds")
      yield* report(pool, "b", Outcome.success)
      yield* report(pool, "a", Outcome.success)
      yield* report(pool, "a", "ServerError")
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("B2: 50 callers at half-open make exactly one probe, and are not released as a herd", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      const callers = yield* Effect.fork(
        Effect.all(Array.from({ length: 50 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
      )
      yield* calm
      assert.strictEqual((yield* provider.sent).length, 1)
      assert.strictEqual((yield* pool.snapshot).waiting, 49)
      yield* TestClock.adjust(99)
      assert.strictEqual((yield* provider.sent).length, 1)
      yield* TestClock.adjust(1)
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      assert.strictEqual(yield* provider.running, 1, "the first step of the way back takes one attempt")
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* provider.running, 2, "and the second one two")
      yield* TestClock.adjust("5 seconds")
      assert.strictEqual((yield* Fiber.join(callers)).length, 50)
      assert.strictEqual((yield* provider.sent).length, 50)
    }))

  test("B2: while the probe runs the others use the siblings", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100), b: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      const callers = yield* Effect.fork(
        Effect.all(Array.from({ length: 50 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
      )
      yield* calm
      const labels = (yield* provider.sent).map((sent) => sent.label)
      assert.strictEqual(labels.filter((label) => label === "a").length, 1)
      assert.strictEqual(labels.filter((label) => label === "b").length, 49)
      yield* TestClock.adjust(100)
      yield* Fiber.join(callers)
    }))

  test("B2: a bad probe sends the others away at once when the next one lies past their budget", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("ServerError", {}, 100) })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, ...once, budget: "20 seconds" })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      const callers = yield* Effect.fork(
        Effect.all(Array.from({ length: 5 }, () => Effect.flip(pool.run(provider.send))), { concurrency: "unbounded" })
      )
      yield* TestClock.adjust(100)
      const errors = yield* Fiber.join(callers)
      assert.deepStrictEqual(
        errors.map((error) => error._tag).sort(),
        ["AllKeysExhausted", "AllKeysExhausted", "AllKeysExhausted", "AllKeysExhausted", "Failed"]
      )
      assert.strictEqual((yield* provider.sent).length, 1)
    }))

  const halfOpenAs = (name: string) =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), name, ...plain, ...once })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      return pool
    })
  const halfOpen = halfOpenAs("first")

  test("B2: a fault during the slow return begins it anew, it lets nobody out", () =>
    Effect.gen(function*() {
      const running = yield* Ref.make(0)
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, ...once })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      const answers = yield* Ref.make(0)
      const slow = pool.run(() =>
        Effect.flatMap(Ref.updateAndGet(answers, (n) => n + 1), (n) =>
          Effect.acquireUseRelease(
            Ref.update(running, (n) => n + 1),
            () => Effect.zipRight(Effect.sleep(50), n === 2 ? bad("ServerError").exit : Effect.void),
            () => Ref.update(running, (n) => n - 1)
          ))
      )
      yield* Effect.forEach(Array.from({ length: 50 }), () => Effect.fork(Effect.exit(slow)))
      yield* TestClock.adjust(50)
      assert.strictEqual(yield* Ref.get(answers), 2, "after the probe one may run")
      yield* TestClock.adjust(50)
      assert.strictEqual(yield* Ref.get(running), 1, "the fault has let nobody out")
    }))

  test("B3: the probe is decided at commit, not at the end", () =>
    Effect.gen(function*() {
      const pool = yield* halfOpen
      yield* Effect.scoped(Effect.gen(function*() {
        const lease = yield* pool.lease
        assert.strictEqual((yield* keyOf(pool, "a")).breaker, "half-open")
        yield* lease.commit(Outcome.success)
        const key = yield* keyOf(pool, "a")
        assert.strictEqual(key.breaker, "closed")
        assert.strictEqual(key.inFlight, 1)
      }))
    }))

  test("B3: RateLimited and Rejected close it; the 429 then sets its cooldown", () =>
    Effect.gen(function*() {
      const limited = yield* halfOpen
      yield* report(limited, "a", "RateLimited", { wait: "7 seconds" })
      const key = yield* keyOf(limited, "a")
      assert.strictEqual(key.breaker, "closed")
      assert.strictEqual(key.closed?.gate, "cooldown")
      assert.strictEqual(yield* closedFor(limited, "a"), 7_020)
      const rejected = yield* halfOpenAs("second")
      yield* report(rejected, "a", "Rejected")
      assert.strictEqual((yield* keyOf(rejected, "a")).breaker, "closed")
    }))

  test("B3: an interrupted probe frees its slot at once", () =>
    Effect.gen(function*() {
      const pool = yield* halfOpen
      const probe = yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      const next = yield* Effect.fork(pool.run(() => Effect.succeed("served")))
      yield* calm
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      yield* Fiber.interrupt(probe)
      assert.strictEqual(yield* Fiber.join(next), "served")
      assert.strictEqual(yield* Clock.currentTimeMillis, 30_000)
    }))

  test("B3: a probe undecided after 30 s frees its slot", () =>
    Effect.gen(function*() {
      const pool = yield* halfOpen
      yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      const next = yield* Effect.fork(pool.run(() => Clock.currentTimeMillis))
      yield* TestClock.adjust(29_999)
      assert.isTrue(Option.isNone(yield* Fiber.poll(next)))
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(next), 60_000)
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
    }))

  test("B4: outcomes from before the last transition change statistics, never state", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const old = yield* Effect.all(Array.from({ length: 5 }, () => pool.lease))
      yield* trip(pool, "a")
      const [first, ...others] = old
      yield* first?.commit(Outcome.success) ?? Effect.void
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open", "a late success does not close it")
      yield* TestClock.adjust("30 seconds")
      yield* report(pool, "a", Outcome.success)
      const before = yield* keyOf(pool, "a")
      yield* Effect.forEach(others, (lease) => lease.commit(Outcome.fault(Fault.make("ServerError"))))
      const key = yield* keyOf(pool, "a")
      assert.strictEqual(key.breaker, "closed", "late faults do not open it")
      assert.strictEqual(key.faults - before.faults, 4)
    }))

  test("B5: a caller's bad request never counts", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("Rejected", { status: 400 }) })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      for (let i = 0; i < 12; i++) yield* Effect.flip(pool.run(provider.send))
      const key = yield* keyOf(pool, "a")
      assert.strictEqual(key.breaker, "closed")
      assert.isUndefined(key.closed)
      assert.strictEqual((yield* provider.sent).length, 12)
    }))

  const reentry = (kind: Fault.Kind, details: Fault.Details, wait: number) =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100) })
      const name = `${kind} ${wait}`
      const pool = yield* KeyPool.make({ keys: keys("a"), name, ...plain })
      yield* report(pool, "a", kind, details)
      assert.strictEqual(yield* closedFor(pool, "a"), wait)
      yield* TestClock.adjust(wait)
      yield* Effect.fork(
        Effect.all(Array.from({ length: 10 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
      )
      yield* calm
      return yield* provider.running
    })

  test("B5: the way back from a spent quota, a refused credential or a guess is one probe", () =>
    Effect.gen(function*() {
      assert.strictEqual(yield* reentry("QuotaExhausted", {}, 3_600_000), 1)
      assert.strictEqual(yield* reentry("QuotaExhausted", { reset: "10 seconds" }, 10_020), 1)
      assert.strictEqual(yield* reentry("Unauthorized", {}, 60_000), 1)
      assert.strictEqual(yield* reentry("Forbidden", {}, 600_000), 1)
      assert.strictEqual(yield* reentry("RateLimited", {}, 1_000), 1)
    }))

  test("B5: the end of a told rate limit is not", () =>
    Effect.gen(function*() {
      // Not one probe, but no herd either: nobody knows yet whether one request fits then or many.
      assert.strictEqual(yield* reentry("RateLimited", { wait: "2 seconds" }, 2_020), 2)
    }))

  test("B5: the probe of a whole group is one", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100), b: ok(100) })
      const pool = yield* KeyPool.make({
        keys: keys("ab", { a: { quotaGroup: "g" }, b: { quotaGroup: "g" } }),
        ...plain
      })
      yield* report(pool, "a", "QuotaExhausted")
      yield* TestClock.adjust("1 hour")
      const callers = yield* Effect.fork(
        Effect.all(Array.from({ length: 10 }, () => pool.run(provider.send)), { concurrency: "unbounded" })
      )
      yield* calm
      assert.strictEqual(yield* provider.running, 1)
      yield* TestClock.adjust("5 seconds")
      assert.strictEqual((yield* Fiber.join(callers)).length, 10)
    }))

  test("B5: an interrupted probe of a group frees the group", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("ab", { a: { quotaGroup: "g" }, b: { quotaGroup: "g" } }),
        ...plain
      })
      yield* report(pool, "a", "QuotaExhausted")
      yield* TestClock.adjust("1 hour")
      const probe = yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      const next = yield* Effect.fork(pool.run(() => Effect.succeed("served")))
      yield* calm
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      yield* Fiber.interrupt(probe)
      assert.strictEqual(yield* Fiber.join(next), "served")
    }))

  test("the breaker of a key is a view of the pool's own", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const id = yield* idOf(pool, "a")
      assert.isTrue(Option.isNone(yield* pool.breaker("no such key")))
      const breaker = Option.getOrThrow(yield* pool.breaker(id))
      const transitions = yield* Effect.fork(Stream.runCollect(Stream.take(breaker.transitions, 2)))
      yield* calm
      yield* breaker.isolate
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open")
      for (let i = 0; i < 4; i++) {
        assert.strictEqual(yield* pool.run((lease) => Effect.succeed(lease.key.label)), "b")
      }
      yield* breaker.reset
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      assert.deepStrictEqual([...yield* Fiber.join(transitions)].map(({ from, to }) => [from, to]), [
        ["Closed", "Open"],
        ["Open", "Closed"]
      ])
    }))

  test("the transitions of a pool's breaker end with the pool", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const pool = yield* Scope.extend(KeyPool.make({ keys: keys("a") }), scope)
      const breaker = Option.getOrThrow(yield* pool.breaker(yield* idOf(pool, "a")))
      const reader = yield* Effect.fork(Stream.runDrain(breaker.transitions))
      yield* calm
      yield* Scope.close(scope, Exit.void)
      yield* calm
      assert.isTrue(Option.isSome(yield* Fiber.poll(reader)))
    }))
})

describe("keys at run time", () => {
  const labelOf = (lease: KeyPool.Lease) => Effect.succeed(lease.key.label)
  const labels = (pool: KeyPool.Service, n: number) =>
    Effect.map(Effect.all(Array.from({ length: n }, () => pool.run(labelOf))), (all) => [...new Set(all)].sort())

  test("K5: an added key is used by the next pick, and serves those who wait", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: "30 seconds" })
      const waiting = yield* Effect.fork(pool.run(labelOf))
      yield* calm
      yield* pool.keyring.add({ secret: "secret-b", label: "b" })
      assert.strictEqual(yield* Fiber.join(waiting), "b")
      assert.strictEqual(yield* Clock.currentTimeMillis, 0)
    }))

  test("K5: a retired key finishes what it has in flight, gets nothing new, and leaves", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream({ a: ok(100), b: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const id = yield* idOf(pool, "a")
      const running = yield* Effect.fork(pool.run(provider.send))
      yield* calm
      assert.isTrue(yield* pool.keyring.retire(id))
      assert.deepStrictEqual((yield* pool.keyring.keys).map((key) => key.label), ["b"])
      assert.isTrue((yield* keyOf(pool, "a")).retiring)
      assert.deepStrictEqual(yield* labels(pool, 4), ["b"])
      assert.isEmpty(named(yield* events, "key.removed"))
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* Fiber.join(running), "a")
      assert.deepStrictEqual((yield* pool.snapshot).keys.map((key) => key.label), ["b"])
      assert.deepStrictEqual(named(yield* events, "key.removed").map((event) => event.keyId), [id])
      assert.isFalse(yield* pool.keyring.retire(id))
    }))

  test("K5: a key is replaced in one step; unknown ids are refused and change nothing", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const id = yield* idOf(pool, "a")
      const error = yield* Effect.flip(pool.keyring.replace("nobody", { secret: "secret-x" }))
      assert.strictEqual(error._tag, "ConfigurationError")
      assert.strictEqual((yield* pool.snapshot).keys.length, 1)
      yield* pool.keyring.replace(id, { secret: "secret-b", label: "b" })
      assert.deepStrictEqual(yield* labels(pool, 2), ["b"])
      assert.deepStrictEqual((yield* pool.snapshot).keys.map((key) => key.label), ["b"])
    }))

  test("K5: a key that is added again gets its new attributes", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), strategy: "weighted" })
      yield* pool.keyring.add({ secret: "secret-a", label: "renamed", weight: 9 })
      const snapshot = yield* pool.snapshot
      assert.deepStrictEqual(snapshot.keys.map((key) => [key.label, key.weight]), [["renamed", 9], ["b", 1]])
      const served = yield* Effect.all(Array.from({ length: 20 }, () => pool.run(labelOf)))
      assert.strictEqual(served.filter((label) => label === "renamed").length, 18)
    }))

  test("K5: the models of a key that is added again hold from then on", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      yield* pool.keyring.add({ secret: "secret-a", label: "a", models: ["small"] })
      const served = yield* Effect.all(Array.from({ length: 4 }, () => pool.run(labelOf, { model: "large" })))
      assert.deepStrictEqual([...new Set(served)], ["b"])
    }))

  test("K5: a key that is added again with another quota group shares that group's limits", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("bca", { b: { quotaGroup: "g" } }), ...plain })
      yield* pool.keyring.add({ secret: "secret-a", label: "a", quotaGroup: "g" })
      yield* report(pool, "b", "RateLimited", { scope: "group", wait: "5 seconds" })
      assert.deepStrictEqual(yield* labels(pool, 6), ["c"])
      yield* TestClock.adjust(5_020)
      assert.deepStrictEqual(yield* labels(pool, 6), ["a", "b", "c"])
    }))

  test("K5: a key that joins later comes last in a sequence", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), strategy: "sequential-then-rotate" })
      yield* pool.keyring.add({ secret: "secret-c", label: "c" })
      yield* pool.disable(yield* idOf(pool, "a"))
      assert.strictEqual(yield* pool.run(labelOf), "b")
    }))

  test("K5: a slot that is used again starts with a clean key", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("RateLimited", { wait: "1 hour", perModel: true }) })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual(yield* pool.run(provider.send, { model: "large" }), "b")
      yield* report(pool, "a", "RateLimited", { wait: "1 hour" })
      yield* pool.keyring.retire(yield* idOf(pool, "a"))
      yield* pool.keyring.add({ secret: "secret-c", label: "c" })
      const served = yield* Effect.all(Array.from({ length: 4 }, () => pool.run(labelOf, { model: "large" })))
      assert.deepStrictEqual([...new Set(served)].sort(), ["b", "c"])
    }))

  test("K5: disable and enable while calls run", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream({ a: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const id = yield* idOf(pool, "a")
      const running = yield* Effect.fork(pool.run(provider.send))
      yield* calm
      assert.isTrue(yield* pool.disable(id))
      assert.deepStrictEqual(yield* labels(pool, 4), ["b"])
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* Fiber.join(running), "a", "what runs may finish")
      assert.strictEqual((yield* keyOf(pool, "a")).closed?.gate, "disabled")
      assert.isTrue(yield* pool.enable(id))
      assert.deepStrictEqual(yield* labels(pool, 4), ["a", "b"])
      assert.isFalse(yield* pool.disable("nobody"))
      assert.isFalse(yield* pool.enable("nobody"))
      assert.isFalse(yield* pool.reset("nobody"))
      const said = yield* events
      assert.deepStrictEqual(named(said, "key.disabled").map((event) => event.keyId), [id])
      assert.deepStrictEqual(named(said, "key.added").map((event) => event.label), ["a", "b", "a"])
    }))

  test("K5: disabling the last key sends those who wait away at once", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* report(pool, "a", "RateLimited", { wait: "30 seconds" })
      const waiting = yield* Effect.fork(Effect.flip(pool.run(labelOf)))
      yield* calm
      yield* pool.disable(yield* idOf(pool, "a"))
      const error = yield* Fiber.join(waiting)
      assert.strictEqual(error._tag, "AllKeysExhausted")
      assert.isUndefined(error._tag === "AllKeysExhausted" ? error.nextAvailableAt : 0)
      assert.strictEqual(yield* Clock.currentTimeMillis, 0)
    }))

  test("K5: drain waits for the last attempt; all who drain are told", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const id = yield* idOf(pool, "a")
      yield* Effect.fork(pool.run(provider.send))
      yield* calm
      const first = yield* Effect.fork(pool.drain(id))
      const second = yield* Effect.fork(pool.drain(id))
      yield* TestClock.adjust(99)
      assert.isTrue(Option.isNone(yield* Fiber.poll(first)))
      yield* TestClock.adjust(1)
      assert.isTrue(yield* Fiber.join(first))
      assert.isTrue(yield* Fiber.join(second))
      assert.isFalse(yield* pool.drain(id))
    }))

  test("K5: a drain ends when its key is added again", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const id = yield* idOf(pool, "a")
      yield* Effect.fork(pool.run(provider.send))
      yield* calm
      const draining = yield* Effect.fork(pool.drain(id))
      yield* calm
      yield* pool.keyring.add({ secret: "secret-a", label: "a" })
      yield* TestClock.adjust(200)
      assert.isTrue(Option.isSome(yield* Fiber.poll(draining)))
    }))

  test("K5: reset forgets the breaker, the cooldowns of key, group and models, and serves those who wait", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { quotaGroup: "g" } }), ...plain })
      const id = yield* idOf(pool, "a")
      const fail = (model: string | undefined, kind: Fault.Kind, details: Fault.Details) =>
        pool.run(() => Effect.fail({ fault: Fault.make(kind, details) }), model === undefined ? {} : { model }).pipe(
          Effect.exit
        )
      yield* Effect.fork(fail("large", "RateLimited", { wait: "1 minute", perModel: true, scope: "group" }))
      yield* calm
      yield* Effect.fork(fail(undefined, "RateLimited", { wait: "30 seconds", scope: "group" }))
      yield* calm
      assert.deepStrictEqual((yield* keyOf(pool, "a")).closedModels.map(({ model }) => model), ["large"])
      const waiting = yield* Effect.fork(pool.run(labelOf, { model: "other" }))
      yield* calm
      assert.isTrue(yield* pool.reset(id))
      assert.strictEqual(yield* Fiber.join(waiting), "a")
      yield* calm
    }))

  test("K5: reset closes an open breaker", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      yield* pool.reset(yield* idOf(pool, "a"))
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      assert.deepStrictEqual(yield* labels(pool, 1), ["a"])
    }))

  const seen = <A>(stream: Stream.Stream<A>) =>
    Effect.gen(function*() {
      const all = yield* Ref.make<ReadonlyArray<A>>([])
      yield* Effect.forkScoped(Stream.runForEach(stream, (a) => Ref.update(all, (seen) => [...seen, a])))
      yield* calm
      return Effect.zipRight(calm, Ref.get(all))
    })

  test("changes: the pool now, and after each change of a key", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const id = yield* idOf(pool, "a")
      const snapshots = yield* seen(pool.changes)
      yield* pool.run(labelOf)
      assert.strictEqual((yield* snapshots).length, 1, "a call is no change")
      yield* pool.disable(id)
      assert.deepStrictEqual((yield* snapshots).map((snapshot) => snapshot.keys[0]?.enabled), [true, false])
      yield* pool.enable(id)
      yield* calm
      yield* report(pool, "a", "RateLimited", { wait: "5 seconds" })
      assert.strictEqual((yield* snapshots).at(-1)?.keys[0]?.closed?.gate, "cooldown")
      yield* pool.reset(id)
      const last = (yield* snapshots).at(-1)
      assert.isUndefined(last?.keys[0]?.closed, "a reset is a change")
    }))

  test("changes: a key that came back by time is told of, calls at the limit are not", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      const snapshots = yield* seen(pool.changes)
      yield* pool.run(labelOf)
      yield* pool.run(labelOf)
      assert.strictEqual((yield* snapshots).length, 1)
      yield* report(pool, "a", "RateLimited", { wait: "5 seconds" })
      assert.strictEqual((yield* snapshots).at(-1)?.keys[0]?.closed?.gate, "cooldown")
      yield* TestClock.adjust("6 seconds")
      yield* pool.run(labelOf)
      assert.isUndefined((yield* snapshots).at(-1)?.keys[0]?.closed)
    }))

  test("changes: what happens while the first snapshot is read is not lost", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const id = yield* idOf(pool, "a")
      const reader = yield* Effect.fork(
        pool.changes.pipe(
          Stream.zipWithIndex,
          Stream.mapEffect(([snapshot, i]) =>
            i === 0 ? Effect.as(pool.disable(id), snapshot) : Effect.succeed(snapshot)
          ),
          Stream.take(2),
          Stream.runLast
        )
      )
      yield* calm
      assert.isTrue(Option.isSome(yield* Fiber.poll(reader)), "the second snapshot never came")
      const last = Option.getOrThrow(yield* Fiber.join(reader))
      assert.strictEqual(last.keys[0]?.enabled, false)
    }))

  test("keyring.changes: the keys now, and after each change, a retirement too", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: ok(100) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const rings = yield* seen(Stream.map(pool.keyring.changes, (keys) => keys.map((key) => key.label).join("")))
      yield* Effect.fork(pool.run(provider.send))
      yield* calm
      yield* pool.keyring.add({ secret: "secret-c", label: "c" })
      yield* calm
      yield* pool.keyring.retire(yield* idOf(pool, "a"))
      assert.deepStrictEqual(yield* rings, ["ab", "abc", "bc"])
    }))

  test("a reset outlives the process as a cooldown does", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      const scope = yield* Scope.make()
      const settings = { keys: keys("a"), ...plain }
      const first = yield* Scope.extend(KeyPool.make(settings), scope).pipe(
        Effect.provideService(PoolStore.PoolStore, store)
      )
      yield* report(first, "a", "Unauthorized", { explicit: true })
      yield* TestClock.adjust("2 seconds")
      yield* first.reset(yield* idOf(first, "a"))
      yield* TestClock.adjust("2 seconds")
      // As after a crash: nothing was saved at the end.
      const second = yield* KeyPool.make(settings).pipe(Effect.provideService(PoolStore.PoolStore, store))
      assert.isUndefined((yield* keyOf(second, "a")).closed)
      yield* Scope.close(scope, Exit.void)
    }))
})

describe("telemetry", () => {
  test("T1: an attempt that succeeds", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream({ a: ok(40) })
      const pool = yield* KeyPool.make({ keys: keys("a"), name: "main" })
      const keyId = yield* idOf(pool, "a")
      const call = yield* Effect.fork(pool.run(provider.send, { model: "large" }))
      yield* TestClock.adjust(40)
      yield* Fiber.join(call)
      const said = yield* events
      assert.deepStrictEqual(said.map((event) => event._tag), [
        "key.added",
        "request.start",
        "request.success",
        "call.end"
      ])
      const base = { pool: "main", keyId, label: "a", call: 1, attempt: 1, model: "large" }
      assert.deepInclude(said[1], { ...base, at: 0 })
      assert.deepInclude(said[2], { ...base, at: 40, durationMillis: 40 })
      assert.deepInclude(said[3], {
        pool: "main",
        call: 1,
        model: "large",
        outcome: "success",
        attempts: 1,
        durationMillis: 40,
        trail: {
          entries: [{ attempt: 1, keyId, label: "a", at: 0, waitedMillis: 0, durationMillis: 40, outcome: "success" }],
          more: {}
        }
      })
      assert.deepStrictEqual(said.map((event) => event.seq), [1, 2, 3, 4])
    }))

  test("T1: an attempt that fails, its cooldown, the rotation", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream({ a: bad("RateLimited", { status: 429, wait: "2 seconds" }, 10) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const [a, b] = [yield* idOf(pool, "a"), yield* idOf(pool, "b")]
      const call = yield* Effect.fork(pool.run(provider.send))
      yield* TestClock.adjust(10)
      yield* Fiber.join(call)
      const said = yield* events
      assert.deepStrictEqual(said.map((event) => event._tag), [
        "key.added",
        "key.added",
        "request.start",
        "request.fail",
        "key.cooldown",
        "key.rotated",
        "request.start",
        "request.success",
        "call.end"
      ])
      const fail = named(said, "request.fail")[0]
      assert.deepInclude(fail, { keyId: a, call: 1, attempt: 1, durationMillis: 10, late: false })
      assert.deepInclude(fail?.fault, { kind: "RateLimited", status: 429, waitMillis: 2_000 })
      assert.deepInclude(named(said, "key.cooldown")[0], {
        keyId: a,
        label: "a",
        scope: "key",
        kind: "RateLimited",
        provenance: "told",
        until: 2_030
      })
      assert.deepInclude(named(said, "key.rotated")[0], {
        keyId: b,
        fromKeyId: a,
        reason: "RateLimited",
        call: 1,
        attempt: 2
      })
    }))

  test("T1: the breaker's three events", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      yield* pool.run(() => Effect.void)
      const said = yield* events
      const base = { keyId: yield* idOf(pool, "a"), label: "a", trips: 1 }
      assert.deepInclude(named(said, "circuit.open")[0], { ...base, from: "Closed", failures: 3, until: 30_000, at: 0 })
      assert.deepInclude(named(said, "circuit.half-open")[0], { ...base, from: "Open", at: 30_000 })
      assert.deepInclude(named(said, "circuit.closed")[0], { ...base, from: "HalfOpen", at: 30_000 })
      const generations = said.flatMap((event) => "generation" in event ? [event.generation] : [])
      assert.deepStrictEqual(generations, [...generations].sort((x, y) => x - y))
      assert.strictEqual(new Set(generations).size, 3)
    }))

  test("T1: all.exhausted once per call, with a reason per key; call.waiting before", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain, budget: "10 seconds" })
      yield* report(pool, "a", "RateLimited", { wait: "5 seconds" })
      yield* report(pool, "b", "RateLimited", { wait: "7 seconds" })
      const waiting = yield* Effect.fork(pool.run(() => Effect.void, { model: "large" }))
      yield* calm
      assert.deepInclude(named(yield* events, "call.waiting")[0], { waiting: 1, until: 5_020, model: "large" })
      yield* Fiber.interrupt(waiting)
      yield* report(pool, "a", "RateLimited", { wait: "50 seconds" }).pipe(Effect.fork)
      yield* TestClock.adjust(5_020)
      yield* report(pool, "b", "RateLimited", { wait: "60 seconds" }).pipe(Effect.fork)
      yield* TestClock.adjust(2_000)
      yield* Effect.flip(pool.run(() => Effect.void, { model: "large" }))
      const exhausted = named(yield* events, "all.exhausted")
      assert.strictEqual(exhausted.length, 1)
      assert.deepInclude(exhausted[0], { model: "large", nextAvailableAt: 55_040, reasonCounts: { RateLimited: 2 } })
      assert.deepStrictEqual(
        exhausted[0]?.reasons.map(({ fault, gate, label, until }) => [label, gate, fault, until]),
        [["a", "cooldown", "RateLimited", 55_040], ["b", "cooldown", "RateLimited", 67_040]]
      )
      assert.strictEqual(named(yield* events, "call.end").at(-1)?.outcome, "AllKeysExhausted")
    }))

  test("T1: budget.denied, for time and for tokens", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const provider = yield* upstream({ a: bad("ServerError", {}, 1_000) })
      const pool = yield* KeyPool.make({ keys: keys("a"), budget: "1 second" })
      const call = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust("1 second")
      assert.strictEqual((yield* Fiber.join(call))._tag, "BudgetExceeded")
      assert.deepInclude(named(yield* events, "budget.denied")[0], { reason: "time", call: 1 })
      const poor = yield* KeyPool.make({
        keys: keys("a"),
        retryTokens: { burst: 0, perCall: 0, perSecond: 0 },
        name: "poor"
      })
      assert.strictEqual((yield* Effect.flip(poor.run(() => Effect.fail(bad("ServerError").exit))))._tag, "Failure")
      yield* Effect.flip(poor.run(() => bad("ServerError").exit))
      assert.deepInclude(named(yield* events, "budget.denied").at(-1), { reason: "tokens", pool: "poor" })
    }))

  test("T1: pool.floor, key.disabled, key.removed, group cooldowns with their group and model", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { quotaGroup: "g" } }), cooldowns: { jitter: 0 } })
      const keyId = yield* idOf(pool, "a")
      yield* trip(pool, "a")
      yield* TestClock.adjust("1 second")
      yield* pool.run(() => Effect.void)
      assert.deepInclude(named(yield* events, "pool.floor")[0], { keyId, label: "a" })
      yield* pool.run(() => bad("RateLimited", { wait: 500, scope: "group", perModel: true }).exit, {
        model: "large"
      }).pipe(Effect.exit, Effect.fork)
      assert.deepInclude(named(yield* events, "key.cooldown").at(-1), {
        keyId,
        scope: "group",
        group: "g",
        model: "large",
        until: 1_520
      })
      yield* pool.disable(keyId)
      yield* pool.keyring.retire(keyId)
      assert.deepInclude(named(yield* events, "key.disabled")[0], { keyId, label: "a" })
      assert.deepInclude(named(yield* events, "key.removed")[0], { keyId, label: "a" })
    }))

  test("T1: call.end tells every end of a call once: success, own failure, error of the pool, interruption", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, budget: "10 seconds" })
      yield* pool.run(() => Effect.void)
      yield* Effect.exit(pool.run(() => bad("Rejected").exit))
      yield* Effect.exit(pool.run(() => Effect.fail("own")))
      const running = yield* Effect.fork(pool.run(() => Effect.never))
      yield* calm
      yield* Fiber.interrupt(running)
      assert.deepStrictEqual(
        named(yield* events, "call.end").map(({ call, outcome }) => [call, outcome]),
        [[1, "success"], [2, "Rejected"], [3, "ignored"], [4, "ignored"]]
      )
    }))

  test("T1: a call that is interrupted while it waits or backs off ends in call.end too", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      const failing = yield* Effect.fork(pool.run(() => bad("ServerError").exit))
      yield* calm
      yield* Fiber.interrupt(failing)
      assert.strictEqual(named(yield* events, "call.end").length, 1, "during the back-off")
      yield* report(pool, "a", "RateLimited", { wait: "10 seconds" })
      const waiting = yield* Effect.fork(pool.run(() => Effect.void))
      yield* calm
      yield* Fiber.interrupt(waiting)
      const said = yield* events
      assert.strictEqual(named(said, "call.end").length, 2, "while waiting for a key")
      assert.strictEqual(named(said, "call.end")[1]?.call, named(said, "call.waiting")[0]?.call)
    }))

  test("T1: a call that meets its deadline ends as DeadlineExceeded", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const pool = yield* KeyPool.make({ keys: keys("a"), deadline: "1 second" })
      const call = yield* Effect.fork(Effect.flip(pool.run(() => Effect.never)))
      yield* TestClock.adjust("1 second")
      yield* Fiber.join(call)
      assert.deepStrictEqual(named(yield* events, "call.end").map((event) => event.outcome), ["DeadlineExceeded"])
    }))

  test("T1: nobody listens: calls go on without events", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      assert.strictEqual(yield* pool.run(() => Effect.succeed(1)), 1)
      assert.isFalse((yield* Telemetry.Telemetry).listened())
    }))

  test("T4: a failure carries its trail: which key, why not the others, how long", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({
        a: bad("RateLimited", { status: 429, code: "slow", wait: "50 seconds" }, 10),
        b: bad("Unauthorized", { status: 401 }, 20),
        c: bad("Rejected", { status: 400 }, 30)
      })
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain, budget: "5 seconds", maxWait: 0 })
      const call = yield* Effect.fork(
        Effect.flip(
          pool.run((lease) => lease.key.label === "c" ? Effect.fail(new Error("mine")) : provider.send(lease))
        )
      )
      yield* TestClock.adjust(30)
      yield* Fiber.join(call)
      yield* pool.disable(yield* idOf(pool, "c"))
      yield* pool.reset(yield* idOf(pool, "a"))
      yield* pool.reset(yield* idOf(pool, "b"))
      const second = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* TestClock.adjust(30)
      const error = yield* Fiber.join(second)
      assert.strictEqual(error._tag, "AllKeysExhausted")
      if (error._tag !== "AllKeysExhausted") return
      const [first, next] = error.trail.entries
      const entries = [first, next].map((
        entry
      ) => [entry?.label, entry?.outcome, entry?.durationMillis, entry?.attempt])
      assert.includeDeepMembers(
        [[["a", "RateLimited", 10, 1], ["b", "Unauthorized", 20, 2]], [["b", "Unauthorized", 20, 1], [
          "a",
          "RateLimited",
          10,
          2
        ]]],
        [entries]
      )
      assert.isTrue([first?.status, next?.status].includes(429))
      assert.strictEqual(next?.passedOver?.["disabled"], 1)
    }))

  test("T4: 32 attempts in full, the rest counted by outcome", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const many = Array.from({ length: 40 }, (_, i) => ({ secret: `secret-${i}`, label: `${i}` }))
      const provider = yield* upstream(() => bad("Unauthorized"))
      const pool = yield* KeyPool.make({ keys: many, ...plain, rotations: 50, budget: "10 seconds" })
      const error = yield* Effect.flip(pool.run(provider.send))
      assert.strictEqual(error._tag, "AllKeysExhausted")
      if (error._tag !== "AllKeysExhausted") return
      assert.strictEqual(error.trail.entries.length, 32)
      assert.deepStrictEqual(error.trail.more, { Unauthorized: 8 })
      assert.strictEqual(error.reasons.length, 32)
      assert.deepStrictEqual(error.reasonCounts, { Unauthorized: 40 })
      assert.strictEqual(named(yield* events, "call.end")[0]?.attempts, 40)
    }))
})

describe("typed errors", () => {
  test("AllKeysExhausted: when the next key may serve, and why none does now", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain, maxWait: 0, name: "main" })
      yield* report(pool, "a", "RateLimited", { wait: "2 seconds" })
      yield* report(pool, "b", "Unauthorized")
      yield* pool.disable(yield* idOf(pool, "c"))
      const caught = yield* pool.run(() => Effect.succeed("none")).pipe(
        Effect.catchTag("AllKeysExhausted", (error) => Effect.succeed(error))
      )
      assert.notStrictEqual(caught, "none")
      if (typeof caught === "string") return
      assert.strictEqual(caught.nextAvailableAt, 2_020)
      assert.deepStrictEqual(
        caught.reasons.map(({ fault, gate, label, until }) => ({ label, gate, fault, until })),
        [
          { label: "a", gate: "cooldown", fault: "RateLimited", until: 2_020 },
          { label: "b", gate: "cooldown", fault: "Unauthorized", until: 60_000 },
          { label: "c", gate: "disabled", fault: undefined, until: undefined }
        ]
      )
      assert.include(caught.message, "main")
    }))

  test("BudgetExceeded: a back-off that does not fit", () =>
    Effect.gen(function*() {
      const provider = yield* upstream({ a: bad("ServerError", { status: 500 }, 900) })
      const pool = yield* KeyPool.make({ keys: keys("a"), budget: "1 second" })
      const call = yield* Effect.fork(
        pool.run(provider.send).pipe(Effect.catchTag("BudgetExceeded", (error) => Effect.succeed(error)))
      )
      yield* TestClock.adjust("10 seconds")
      const error = yield* Fiber.join(call)
      if (typeof error === "string") return assert.fail("it succeeded")
      assert.strictEqual(error.fault?.kind, "ServerError")
      assert.strictEqual(error.trail.entries.length, (yield* provider.sent).length)
    }))

  test("DeadlineExceeded: with the trail of what was interrupted", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), deadline: "1 second" })
      const call = yield* Effect.fork(
        pool.run(() => Effect.never).pipe(Effect.catchTag("DeadlineExceeded", (error) => Effect.succeed(error)))
      )
      yield* TestClock.adjust(999)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      const error = yield* Fiber.join(call)
      assert.deepStrictEqual(error.trail.entries.map((entry) => [entry.label, entry.outcome, entry.durationMillis]), [
        ["a", "ignored", 1_000]
      ])
      assert.strictEqual((yield* keyOf(pool, "a")).inFlight, 0)
    }))

  const closing = (settings: Partial<KeyPool.Settings>) =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const pool = yield* Scope.extend(KeyPool.make({ keys: keys("a"), ...plain, ...settings }), scope)
      return { pool, close: Scope.close(scope, Exit.void) }
    })

  test("PoolClosed: new calls, and all who wait", () =>
    Effect.gen(function*() {
      const { close, pool } = yield* closing({})
      yield* report(pool, "a", "RateLimited", { wait: "30 seconds" })
      const caught = yield* Effect.fork(
        Effect.all(
          Array.from({ length: 5 }, (_, i) =>
            pool.run(() =>
              Effect.succeed("served"), i % 2 === 0 ? {} : { model: "large" }).pipe(
                Effect.catchTag("PoolClosed", (error) => Effect.succeed(error.pool))
              )),
          { concurrency: "unbounded" }
        )
      )
      const leased = yield* Effect.fork(Effect.flip(Effect.scoped(pool.lease)))
      yield* calm
      yield* close
      assert.deepStrictEqual(
        yield* Fiber.join(caught),
        Array.from({ length: 5 }, () =>
          "default")
      )
      assert.strictEqual((yield* Fiber.join(leased))._tag, "PoolClosed")
      assert.strictEqual((yield* Effect.flip(pool.run(() => Effect.void)))._tag, "PoolClosed")
      assert.strictEqual((yield* Effect.flip(Stream.runDrain(pool.stream(() => Stream.empty))))._tag, "PoolClosed")
    }))

  test("PoolClosed: those who wait without a budget are answered too", () =>
    Effect.gen(function*() {
      const { close, pool } = yield* closing({ budget: Infinity })
      yield* report(pool, "a", "RateLimited", { wait: "30 seconds" })
      const waiting = yield* Effect.fork(Effect.flip(pool.run(() => Effect.void)))
      yield* calm
      yield* close
      yield* calm
      assert.isTrue(Option.isSome(yield* Fiber.poll(waiting)), "nobody answered")
      assert.strictEqual((yield* Fiber.join(waiting))._tag, "PoolClosed")
    }))

  test("PoolClosed: an attempt in flight may finish, its failure starts no other", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((_, index) => after(100, index === 0 ? ok() : bad("RateLimited")))
      const { close, pool } = yield* closing({})
      const good = yield* Effect.fork(pool.run(provider.send))
      yield* calm
      const failing = yield* Effect.fork(Effect.flip(pool.run(provider.send)))
      yield* calm
      yield* close
      yield* TestClock.adjust(100)
      assert.strictEqual(yield* Fiber.join(good), "a")
      assert.strictEqual((yield* Fiber.join(failing))._tag, "PoolClosed")
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("a store that never answers does not hold up the pool's end", () =>
    Effect.gen(function*() {
      const store: PoolStore.Service = { load: () => Effect.succeed(Option.none()), save: () => Effect.never }
      const scope = yield* Scope.make()
      yield* Scope.extend(KeyPool.make({ keys: keys("a") }), scope).pipe(
        Effect.provideService(PoolStore.PoolStore, store)
      )
      const closing = yield* Effect.forkDaemon(Scope.close(scope, Exit.void))
      yield* TestClock.adjust("10 seconds")
      assert.isTrue(Option.isSome(yield* Fiber.poll(closing)))
    }))

  test("the caller's own error comes back as it was, and at once when it says nothing of a key", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      const mine = { kind: "mine" }
      const attempts = yield* Ref.make(0)
      const error = yield* Effect.flip(
        pool.run(() => Effect.zipRight(Ref.update(attempts, (n) => n + 1), Effect.fail(mine)))
      )
      assert.strictEqual(error, mine)
      assert.strictEqual(yield* Ref.get(attempts), 1)
      const rejected = { status: 422 }
      assert.strictEqual(yield* Effect.flip(pool.run(() => Effect.fail(rejected))), rejected)
      const defect = yield* Effect.exit(pool.run(() => Effect.die(mine)))
      assert.deepStrictEqual(defect, Exit.die(mine))
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("attempts spent, or tokens: the caller's own error of the last attempt", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, breaker: { threshold: 100 } })
      const attempts = yield* Ref.make(0)
      const call = yield* Effect.fork(Effect.flip(pool.run(() =>
        Effect.flatMap(Ref.updateAndGet(attempts, (n) => n + 1), (n) => Effect.fail({ status: 500, n }))
      )))
      yield* TestClock.adjust("60 seconds")
      assert.deepStrictEqual(yield* Fiber.join(call), { status: 500, n: 6 })
      const poor = yield* KeyPool.make({ keys: keys("a"), retryTokens: { burst: 0, perCall: 0, perSecond: 0 } })
      assert.deepStrictEqual(
        yield* Effect.flip(poor.run(() =>
          Effect.fail({ status: 500 })
        )),
        { status: 500 }
      )
    }))
})
