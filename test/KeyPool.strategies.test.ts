import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as TestClock from "effect/TestClock"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as Strategy from "../src/Strategy.js"
import { keys, ok, once, plain, type Sent, test, type Upstream, upstream } from "./support/pooled.js"

const perMinute = (requestsPerMinute: number) => ({ limits: { requestsPerMinute } })

/** So many calls, each at its own instant; which keys they got. */
const served = (
  pool: KeyPool.Service,
  provider: Upstream,
  count: number,
  { every = 10, model }: { readonly every?: number; readonly model?: string } = {}
) =>
  Effect.gen(function*() {
    const before = (yield* provider.sent).length
    for (let n = 0; n < count; n++) {
      yield* Effect.fork(pool.run(provider.send, { model }))
      yield* TestClock.adjust(every)
    }
    return (yield* provider.sent).slice(before).map(({ label }) => label).join("")
  })

const shares = (labels: string) => {
  const counts: Record<string, number> = {}
  for (const label of labels) counts[label] = (counts[label] ?? 0) + 1
  return counts
}

describe("headroom", () => {
  const settings = { ...plain, ...once, strategy: "headroom" } as const

  test("A5: limits of different size are used in proportion, and keys with none come first", () =>
    Effect.gen(function*() {
      const provider = yield* upstream()
      const pool = yield* KeyPool.make({
        ...settings,
        keys: keys("abc", { a: perMinute(20), b: perMinute(60), c: perMinute(40) })
      })
      assert.deepStrictEqual(shares(yield* served(pool, provider, 60)), { a: 10, b: 30, c: 20 })
      const free = yield* KeyPool.make({ ...settings, name: "free", keys: keys("ab", { a: perMinute(20) }) })
      const labels = yield* served(free, provider, 20)
      assert.isAtMost(shares(labels)["a"] ?? 0, 1)
    }))

  test("A5: keys of one group have what the group has left", () =>
    Effect.gen(function*() {
      const provider = yield* upstream()
      const one = { quotaGroup: "one", limits: { requestsPerMinute: 60 } }
      const pool = yield* KeyPool.make({
        ...settings,
        keys: keys("abcd", { a: one, b: one, c: one, d: perMinute(60) })
      })
      const { a = 0, b = 0, c = 0, d = 0 } = shares(yield* served(pool, provider, 80))
      assert.deepStrictEqual([a + b + c, d], [40, 40])
    }))

  test("A5: what comes back with time counts", () =>
    Effect.gen(function*() {
      const provider = yield* upstream()
      const pool = yield* KeyPool.make({ ...settings, keys: keys("ab", { a: perMinute(20), b: perMinute(20) }) })
      const [b] = (yield* pool.snapshot).keys.filter(({ label }) => label === "b")
      yield* pool.disable(b?.id ?? "")
      assert.strictEqual(yield* served(pool, provider, 15), "a".repeat(15))
      yield* pool.enable(b?.id ?? "")
      assert.strictEqual(yield* served(pool, provider, 10), "b".repeat(10))
      yield* TestClock.adjust("1 minute")
      assert.deepStrictEqual(shares(yield* served(pool, provider, 10)), { a: 5, b: 5 })
    }))

  test("A5: announced limits count, for the model that they were announced for", () =>
    Effect.gen(function*() {
      const provider = yield* upstream()
      const left: Readonly<Record<string, number>> = { a: 10, b: 90 }
      const send = (lease: KeyPool.Lease) =>
        Effect.zipRight(
          Effect.sync(() => {
            const remaining = left[lease.key.label]
            lease.announced([{ name: "requests", limit: 100, remaining, resetMillis: 60_000 }])
          }),
          provider.send(lease)
        )
      const pool = yield* KeyPool.make({ ...settings, keys: keys("ab") })
      for (let n = 0; n < 2; n++) yield* pool.run(send, { model: "m" })
      assert.strictEqual(yield* served(pool, provider, 20, { model: "m" }), "b".repeat(20))
      // Of the other model both have all; `b` was used more of late.
      assert.strictEqual(yield* served(pool, provider, 19, { model: "other" }), "a".repeat(19))
    }))

  test("A5: learned limits count", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ ...settings, keys: keys("ab") })
      const provider = yield* upstream()
      // A window of 20 on `a`, measured between two refusals.
      const [b] = (yield* pool.snapshot).keys.filter(({ label }) => label === "b")
      yield* pool.disable(b?.id ?? "")
      const refused = Outcome.fault(Fault.make("RateLimited", { wait: 50_000 }))
      const refuse = Effect.scoped(Effect.flatMap(pool.lease, (lease) => lease.commit(refused)))
      yield* refuse
      yield* TestClock.adjust(50_100)
      yield* served(pool, provider, 20)
      yield* refuse
      yield* TestClock.adjust(50_100)
      yield* served(pool, provider, 10)
      yield* pool.enable(b?.id ?? "")
      const labels = yield* served(pool, provider, 8)
      assert.strictEqual(labels, "b".repeat(8))
    }))
})

describe("leastLatency", () => {
  const settings = { ...plain, ...once, strategy: "least-latency" } as const
  const slow = ({ label }: Sent) => label === "b" ? ok(1_000) : ok(100)

  test("A5: a key that is ten times as slow gets few calls", () =>
    Effect.gen(function*() {
      const provider = yield* upstream(slow)
      const pool = yield* KeyPool.make({ ...settings, keys: keys("abc") })
      const { b = 0, ...others } = shares(yield* served(pool, provider, 200, { every: 100 }))
      assert.isTrue(b >= 1 && b <= 4, String(b))
      assert.isTrue(Math.abs((others["a"] ?? 0) - (others["c"] ?? 0)) <= 10)
    }))

  test("A5: a key that hangs is left, also by calls that give up", () =>
    Effect.gen(function*() {
      const provider = yield* upstream((sent) => sent.label === "b" && sent.at >= 1_000 ? ok(1e9) : ok(100))
      const pool = yield* KeyPool.make({ ...settings, keys: keys("abc"), deadline: 2_000 })
      yield* served(pool, provider, 10, { every: 100 })
      const { b = 0 } = shares(yield* served(pool, provider, 100, { every: 100 }))
      assert.isAtMost(b, 3)
    }))

  test("A5: nothing is measured for other strategies", () =>
    Effect.gen(function*() {
      let told = 0
      const { empty } = Strategy.leastLatency
      const spy: Strategy.Index = {
        size: 0,
        insert: (candidate) => counting(empty.insert(candidate)),
        remove: () => spy,
        update: () => spy,
        pick: () => undefined
      }
      const counting = (index: Strategy.Index): Strategy.Index => ({
        size: index.size,
        insert: (candidate) => counting(index.insert(candidate)),
        remove: (slot) => counting(index.remove(slot)),
        update: (candidate) => counting(index.update(candidate)),
        pick: (context) => {
          if (context.left !== undefined) told++
          const picked = index.pick(context)
          return picked === undefined ? undefined : { slot: picked.slot, index: counting(picked.index) }
        },
        observe: () => {
          told++
          return counting(index)
        }
      })
      const of = (wants: Strategy.Strategy["wants"]) =>
        Effect.gen(function*() {
          told = 0
          const strategy: Strategy.Strategy = { name: "spy", randomised: false, wants, empty: spy }
          const pool = yield* KeyPool.make({ ...plain, ...once, name: `${wants}`, keys: keys("a"), strategy })
          yield* pool.run(() => Effect.void)
          return told
        })
      assert.deepStrictEqual([yield* of(undefined), yield* of("latency"), yield* of("headroom")], [0, 1, 1])
    }))
})
