/** What can be asked of a pool about its decisions. */
import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as MutableRef from "effect/MutableRef"
import * as Redacted from "effect/Redacted"
import * as Schema from "effect/Schema"
import * as TestClock from "effect/TestClock"
import * as CallOptions from "../src/CallOptions.js"
import * as Explanation from "../src/Explanation.js"
import { emptyTrail, type Trail } from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"
import * as PoolSnapshot from "../src/PoolSnapshot.js"
import { bad, calm, idOf, keys, ok, plain, report, test, upstream } from "./support/pooled.js"

const verdicts = (explained: Explanation.Explanation) =>
  Object.fromEntries(explained.keys.map(({ gates, label, verdict }) => [
    label,
    gates.length === 0 ? verdict : `${verdict}: ${gates.map(({ fault, gate }) => fault ?? gate).join(", ")}`
  ]))

describe("explain", () => {
  test("T4: of each key whether a call would get it, might have, or what holds it back, and until when", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("abcdef", {
          c: { limits: { requestsPerMinute: 1 } },
          d: { models: ["small"] },
          e: { limits: { concurrency: 1 } }
        }),
        strategy: "sequential-then-rotate",
        ...plain
      })
      const provider = yield* upstream({ e: ok(60_000) })
      yield* report(pool, "a", "RateLimited", { wait: 5_000 })
      for (const label of "abdef") yield* pool.disable(yield* idOf(pool, label))
      yield* pool.run(provider.send)
      yield* pool.enable(yield* idOf(pool, "e"))
      const held = yield* Effect.fork(pool.run(provider.send))
      yield* calm
      for (const label of "abd") yield* pool.enable(yield* idOf(pool, label))
      const explained = yield* pool.explain({ model: "large" })
      assert.deepStrictEqual(verdicts(explained), {
        a: "closed: RateLimited, limit",
        b: "chosen",
        c: "closed: limit",
        d: "closed: model",
        e: "closed: concurrency",
        f: "closed: disabled"
      })
      assert.strictEqual(explained.chosen, yield* idOf(pool, "b"))
      assert.deepStrictEqual(explained.keys[0]?.gates, [
        { gate: "cooldown", fault: "RateLimited", until: 5_020 },
        // The refusal taught that no more would be let through until then.
        { gate: "limit", until: 5_000 }
      ])
      assert.deepStrictEqual(explained.keys[2]?.gates, [{ gate: "limit", until: 60_000 }])
      // What is asked changes nothing: the next call gets just that key.
      const before = yield* pool.snapshot
      yield* pool.explain()
      assert.deepStrictEqual(yield* pool.snapshot, before)
      assert.strictEqual(yield* pool.run(provider.send, { model: "large" }), "b")
      assert.strictEqual(verdicts(yield* pool.explain({ model: "small" }))["d"], "eligible")
      assert.isTrue(Schema.is(Explanation.Explanation)(explained))
      assert.notInclude(JSON.stringify(explained), "secret")
      yield* Fiber.interrupt(held)
    }))

  test("T4: several gates of one key are all told", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("a", { a: { quotaGroup: "g", limits: { requestsPerMinute: 1 }, models: ["m"] } }),
        ...plain
      })
      yield* report(pool, "a", "RateLimited", { wait: 5_000 })
      const id = yield* idOf(pool, "a")
      yield* pool.disable(id)
      const explained = yield* pool.explain({ model: "n" })
      assert.deepStrictEqual(verdicts(explained), { a: "closed: disabled, RateLimited, limit, model" })
      assert.isUndefined(explained.availableAt)
      yield* pool.enable(id)
      assert.strictEqual((yield* pool.explain({ model: "m" })).availableAt, 60_000)
    }))

  test("a call that would wait is told behind how many; the snapshot tells it by lane", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a", { a: { limits: { concurrency: 1 } } }), ...plain })
      const provider = yield* upstream({ a: ok(1_000) })
      const send = (model: string) => Effect.fork(pool.run(provider.send, { model }))
      const first = yield* send("m")
      yield* calm
      yield* TestClock.adjust(100)
      const second = yield* send("m")
      yield* calm
      yield* TestClock.adjust(100)
      const others = [yield* send("m"), yield* send("n")]
      yield* calm
      const explained = yield* pool.explain({ model: "m" })
      assert.deepStrictEqual(
        { waiting: explained.waiting, chosen: explained.chosen, keys: verdicts(explained) },
        { waiting: 2, chosen: undefined, keys: { a: "closed: concurrency" } }
      )
      const { lanes } = yield* pool.snapshot
      assert.sameDeepMembers([...lanes], [
        { model: "m", waiting: 2, since: 100 },
        { model: "n", waiting: 1, since: 200 }
      ])
      assert.isTrue(Schema.is(PoolSnapshot.PoolSnapshot)(yield* pool.snapshot))
      yield* Fiber.interruptAll([first, second, ...others])
    }))

  test("what CallOptions say around it counts: H4 keys that have not what the call names are unsuited", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), strategy: "round-robin", ...plain })
      const provider = yield* upstream()
      yield* pool.disable(yield* idOf(pool, "a"))
      yield* pool.run((lease) => Effect.zipRight(lease.remember(["file-1"]), provider.send(lease)))
      yield* pool.enable(yield* idOf(pool, "a"))
      assert.deepStrictEqual(verdicts(yield* pool.explain()), { a: "chosen", b: "eligible" })
      assert.deepStrictEqual(verdicts(yield* pool.explain({ resources: ["file-1"] })), { a: "unsuited", b: "chosen" })
      const talk = CallOptions.withAffinity("talk")
      yield* pool.disable(yield* idOf(pool, "a"))
      yield* talk(pool.run(provider.send))
      yield* pool.enable(yield* idOf(pool, "a"))
      assert.deepStrictEqual(verdicts(yield* pool.explain()), { a: "chosen", b: "eligible" })
      assert.deepStrictEqual(verdicts(yield* talk(pool.explain())), { a: "eligible", b: "chosen" })
    }))
})

describe("trails on request", () => {
  test("T4: every call tells of each attempt which key, why not the others, how long; success or not", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("abc"),
        strategy: "sequential-then-rotate",
        ...plain
      })
      const provider = yield* upstream({ a: bad("RateLimited", { wait: 5_000 }, 70), b: ok(30), c: ok() })
      yield* report(pool, "a", "Rejected")
      yield* pool.disable(yield* idOf(pool, "c"))
      const [ids, running] = [
        Object.fromEntries((yield* pool.snapshot).keys.map(({ id, label }) => [label, id])),
        yield* Effect.fork(CallOptions.withTrails(Effect.zip(
          pool.run(provider.send),
          Effect.either(pool.run(() => Effect.fail("of its own"), { classify: () => ({ _tag: "Ignored" }) }))
        )))
      ]
      yield* TestClock.adjust(1_000)
      const [[answer], trails] = yield* Fiber.join(running)
      assert.strictEqual(answer, "b")
      const reason = (label: string, gate: string, more: object = {}) => ({
        keyId: ids[label] ?? "",
        label,
        gate,
        ...more
      })
      const limited = { fault: "RateLimited", until: 5_090 }
      assert.deepStrictEqual(
        trails.map(({ entries }) =>
          entries.map(({ durationMillis, label, others, outcome }) => ({ durationMillis, label, others, outcome }))
        ),
        [
          [
            {
              durationMillis: 70,
              label: "a",
              others: [reason("b", "eligible"), reason("c", "disabled")],
              outcome: "RateLimited"
            },
            {
              durationMillis: 30,
              label: "b",
              others: [reason("a", "cooldown", limited), reason("c", "disabled")],
              outcome: "success"
            }
          ],
          [{
            durationMillis: 0,
            label: "b",
            others: [reason("a", "cooldown", limited), reason("c", "disabled")],
            outcome: "ignored"
          }]
        ]
      )
      assert.deepStrictEqual(trails[0]?.entries.map(({ passedOver }) => passedOver), [
        { disabled: 1 },
        { RateLimited: 1, disabled: 1 }
      ])
    }))

  test("T4: a cell of one call gets the same; who asks for nothing gets nothing", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const trail = MutableRef.make<Trail>(emptyTrail)
      yield* pool.run(({ key }) => Effect.succeed(Redacted.value(key.secret)), { trail })
      assert.deepStrictEqual(MutableRef.get(trail).entries.map(({ label, others }) => [label, others?.[0]?.gate]), [
        ["a", "eligible"]
      ])
      const [, none] = yield* CallOptions.withTrails(Effect.void)
      assert.deepStrictEqual(none, [])
    }))

  test("a setting `trails` that is no cell is refused by name", () =>
    Effect.gen(function*() {
      // @ts-expect-error a list is no cell
      const refused = yield* Effect.exit(CallOptions.withOptions(Effect.void, { trails: [] }))
      assert.include(
        Exit.isFailure(refused) ? Cause.pretty(refused.cause) : "",
        "trails: must be a MutableRef of trails"
      )
    }))
})
