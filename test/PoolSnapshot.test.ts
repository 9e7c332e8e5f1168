import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import * as TestClock from "effect/TestClock"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import { PoolSnapshot } from "../src/PoolSnapshot.js"

const pooled = (settings: KeyPool.Settings) => KeyPool.make(settings)

/** What of a key's snapshot is not its identity. */
const stateOf = (key: PoolSnapshot["keys"][number] | undefined) => {
  const { closed, closedModels, enabled, inFlight, retiring } = key ?? {}
  return { closed, closedModels, enabled, inFlight, retiring }
}

describe("a snapshot", () => {
  it.scoped("of a pool that has done nothing", () =>
    Effect.gen(function*() {
      yield* TestClock.adjust("5 seconds")
      const pool = yield* pooled({
        keys: [{ secret: "sk-one", label: "one", quotaGroup: "org", weight: 2 }, "sk-two"],
        name: "openai",
        strategy: "weighted"
      })
      const snapshot = yield* pool.snapshot
      const { keys, ...rest } = snapshot
      assert.deepStrictEqual(rest, {
        pool: "openai",
        at: 5_000,
        strategy: "weighted",
        closed: false,
        eligible: 2,
        inFlight: 0,
        waiting: 0,
        lanes: [],
        outages: [],
        calls: 0,
        attempts: 0
      })
      const { id, ...one } = keys[0] ?? { id: "" }
      assert.match(id, /^key_/)
      assert.deepStrictEqual<unknown>(one, {
        label: "one",
        quotaGroup: "org",
        weight: 2,
        enabled: true,
        retiring: false,
        breaker: "closed",
        closedModels: [],
        limits: [],
        inFlight: 0,
        total: 0,
        successes: 0,
        faults: 0,
        ignored: 0
      })
      assert.notProperty(keys[1], "quotaGroup")
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("counts calls, attempts and how they ended", () =>
    Effect.gen(function*() {
      const pool = yield* pooled({ keys: ["sk-one"] })
      yield* pool.run(() => Effect.void)
      yield* Effect.exit(pool.run(() => Effect.fail({ status: 400 })))
      yield* Effect.exit(pool.run(() => Effect.fail(new Error("my own bug"))))
      const held = yield* Effect.fork(pool.run(() => Effect.never))
      yield* TestClock.adjust("10 millis")
      const during = yield* pool.snapshot
      assert.deepStrictEqual([during.inFlight, during.calls, during.attempts], [1, 4, 4])
      yield* Fiber.interrupt(held)
      const { inFlight, keys: [key] } = yield* pool.snapshot
      assert.deepStrictEqual([inFlight, key?.total, key?.successes, key?.faults, key?.ignored], [0, 4, 1, 1, 2])
      assert.strictEqual(key?.lastUsed, 0)
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("says why a key may not serve, and until when", () =>
    Effect.gen(function*() {
      const pool = yield* pooled({
        keys: ["sk-one", "sk-two", "sk-three"],
        maxWait: 0,
        strategy: "sequential-then-rotate"
      })
      let attempts = 0
      yield* pool.run(() => {
        attempts += 1
        return attempts === 1 ? Effect.fail(Fault.make("RateLimited", { wait: "1 minute" })) : Effect.void
      })
      const [one, two, three] = (yield* pool.snapshot).keys
      assert.deepStrictEqual<unknown>(stateOf(one), {
        closed: { gate: "cooldown", fault: "RateLimited", until: 60_020 },
        closedModels: [],
        enabled: true,
        inFlight: 0,
        retiring: false
      })
      yield* pool.disable(two?.id ?? "")
      assert.deepStrictEqual((yield* pool.snapshot).keys[1]?.closed, { gate: "disabled" })
      const breaker = Option.getOrThrow(yield* pool.breaker(three?.id ?? ""))
      yield* breaker.isolate
      const isolated = (yield* pool.snapshot).keys[2]
      assert.deepStrictEqual([isolated?.breaker, isolated?.closed], ["open", { gate: "breaker" }])
      assert.notProperty(isolated, "breakerUntil")
      assert.strictEqual((yield* pool.snapshot).eligible, 0)
      yield* TestClock.adjust("61 seconds")
      assert.strictEqual((yield* pool.snapshot).eligible, 1)
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("tells the models that a key may not serve", () =>
    Effect.gen(function*() {
      const pool = yield* pooled({ keys: ["sk-one"], maxWait: 0 })
      const limited = Fault.make("RateLimited", { perModel: true, wait: "1 minute" })
      yield* Effect.exit(pool.run(() => Effect.fail(limited), { model: "small" }))
      const { eligible, keys: [key] } = yield* pool.snapshot
      assert.strictEqual(eligible, 1)
      assert.deepStrictEqual<unknown>(key?.closedModels, [
        { model: "small", gate: "cooldown", fault: "RateLimited", until: 60_020 }
      ])
      assert.isUndefined(key?.closed)
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("tells a breaker that is open, and when it admits its probe", () =>
    Effect.gen(function*() {
      const pool = yield* pooled({ keys: ["sk-one"], maxWait: 0, breaker: { threshold: 1 } })
      const [{ id = "" } = {}] = (yield* pool.snapshot).keys
      const breaker = Option.getOrThrow(yield* pool.breaker(id))
      yield* Effect.flip(breaker.execute(Effect.fail("down")))
      const [open] = (yield* pool.snapshot).keys
      assert.deepStrictEqual([open?.breaker, open?.breakerUntil], ["open", 30_000])
      assert.deepStrictEqual(open?.closed, { gate: "breaker", until: 30_000 })
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.effect("of a pool whose scope is closed says so", () =>
    Effect.gen(function*() {
      const pool = yield* Effect.scoped(pooled({ keys: ["sk-one"] }))
      assert.isTrue((yield* pool.snapshot).closed)
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("K1: is plain JSON without secrets, and comes back", () =>
    Effect.gen(function*() {
      const pool = yield* pooled({ keys: [{ secret: "sk-live-Zq83hTm1PvKx90Lw", headers: { a: "b" } }, "sk-two"] })
      yield* pool.run((lease) => lease.attempt === 1 ? Effect.fail({ status: 429 }) : Effect.void)
      const snapshot = yield* pool.snapshot
      const text = JSON.stringify(Schema.encodeSync(PoolSnapshot)(snapshot))
      assert.notInclude(text, "Zq83hTm1PvKx90Lw")
      assert.deepStrictEqual(Schema.decodeUnknownSync(PoolSnapshot)(JSON.parse(text)), snapshot)
      assert.isTrue(snapshot.keys.some((key) => key.closed?.gate === "cooldown"))
    }).pipe(Effect.provide(KeyPool.layerDefaults)))
})
