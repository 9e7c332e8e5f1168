import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Fiber from "effect/Fiber"
import * as TestClock from "effect/TestClock"
import { inspect } from "node:util"
import * as CallOptions from "../src/CallOptions.js"
import { ConfigurationError } from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"

const given = CallOptions.CallOptions

describe("CallOptions", () => {
  it.effect("says nothing by default", () => Effect.map(given, (settings) => assert.deepStrictEqual(settings, {})))

  it.effect("settings given further out hold where the inner ones say nothing", () =>
    Effect.gen(function*() {
      const settings = yield* given.pipe(
        CallOptions.withOptions({ budget: "2 seconds", model: "inner" }),
        CallOptions.withOptions({ model: "outer", maxWait: 0, replayable: false })
      )
      assert.deepStrictEqual(settings, { budget: "2 seconds", model: "inner", maxWait: 0, replayable: false })
    }))

  it.effect("a setting that is undefined says nothing", () =>
    Effect.gen(function*() {
      const settings = yield* given.pipe(
        CallOptions.withOptions({ model: undefined, deadline: undefined }),
        CallOptions.withOptions({ model: "outer", deadline: "1 second" })
      )
      assert.deepInclude(settings, { model: "outer", deadline: "1 second" })
    }))

  it.effect("withDeadline is that one setting; both combinators take the effect first or last", () =>
    Effect.gen(function*() {
      assert.deepStrictEqual(yield* CallOptions.withDeadline(given, "1 second"), { deadline: "1 second" })
      assert.deepStrictEqual(yield* given.pipe(CallOptions.withDeadline(5)), { deadline: 5 })
      assert.deepStrictEqual(yield* CallOptions.withOptions(given, { model: "large" }), { model: "large" })
    }))

  it.effect("holds inside only, in the fibers started there too", () =>
    Effect.gen(function*() {
      const inside = yield* Effect.flatMap(Effect.fork(given), Fiber.join).pipe(
        CallOptions.withOptions({ model: "large" })
      )
      assert.deepStrictEqual(inside, { model: "large" })
      assert.deepStrictEqual(yield* given, {})
    }))
})

const noDuration: ReadonlyArray<unknown> = [Number.NaN, -1, "soon", "-1 second", true, null, {}, [], Duration]
const beyondTimers: ReadonlyArray<unknown> = ["25 days", 2 ** 31, Duration.days(100)]

const wrong: Readonly<Record<string, ReadonlyArray<unknown>>> = {
  deadline: [...noDuration, ...beyondTimers],
  budget: noDuration,
  maxWait: noDuration,
  model: [5, "", "  ", "a\nb", null, {}],
  replayable: ["never", 1, null],
  priority: ["urgent", "", 1, null, "toString"],
  hedge: [5, "yes", null, []],
  dedline: ["1 second"]
}

/** Runs an effect under settings that the types may forbid; which field was refused, and whether it had begun. */
const refusal = (over: (effect: Effect.Effect<void>) => Effect.Effect<void>) =>
  Effect.gen(function*() {
    let begun = false
    const cause = yield* Effect.flip(Effect.sandbox(over(Effect.sync(() => void (begun = true)))))
    assert.isTrue(Cause.isDieType(cause))
    const defect = Cause.squash(cause)
    assert.instanceOf(defect, ConfigurationError)
    return { field: defect.field, begun }
  })

describe("refusals", () => {
  for (const [field, values] of Object.entries(wrong)) {
    it.effect(`K3: ${field} is refused when it is wrong, as a defect, before anything runs`, () =>
      Effect.forEach(values, (value) =>
        Effect.gen(function*() {
          const settings = { [field]: value } as CallOptions.Settings
          const refused = yield* refusal(CallOptions.withOptions(settings)).pipe(
            Effect.catchAllDefect(() => Effect.dieMessage(`${inspect(value)} was taken for ${field}`))
          )
          assert.deepStrictEqual(refused, { field, begun: false }, inspect(value))
        })))
  }

  it.effect("K3: withDeadline refuses what is no duration", () =>
    Effect.forEach([...noDuration, ...beyondTimers, undefined], (value) =>
      Effect.gen(function*() {
        const refused = yield* refusal(CallOptions.withDeadline(value as Duration.DurationInput))
        assert.deepStrictEqual(refused, { field: "deadline", begun: false }, inspect(value))
      })))

  it.effect("K3: what is no record of settings is refused", () =>
    Effect.forEach([undefined, null, 5, "fast", ["1 second"]], (value) =>
      Effect.gen(function*() {
        const refused = yield* refusal(CallOptions.withOptions(value as unknown as CallOptions.Settings))
        assert.deepStrictEqual(refused, { field: "options", begun: false }, inspect(value))
      })))

  it.effect("every setting of the right kind is taken as it is", () =>
    Effect.gen(function*() {
      const settings = {
        deadline: "24 days",
        budget: Infinity,
        maxWait: 0,
        model: "large",
        replayable: true,
        priority: "high"
      } as const
      assert.deepStrictEqual(yield* CallOptions.withOptions(given, settings), settings)
    }))

  it.effect("K3: a pool makes no attempt under settings that cannot be used", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one"] })
      const { begun, field } = yield* refusal((effect) =>
        pool.run(() => effect).pipe(
          CallOptions.withOptions({ budget: "later" as Duration.DurationInput }),
          Effect.orDie
        )
      )
      assert.deepStrictEqual([field, begun], ["budget", false])
    }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))

  it.effect("C4: a deadline of Infinity lifts that of the pool", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one"], deadline: "1 second" })
      const call = pool.run(() => Effect.delay(Effect.succeed("an answer"), "1 minute"))
      const [lifted, held] = yield* Effect.all([CallOptions.withDeadline(call, Infinity), call].map(Effect.either), {
        concurrency: 2
      }).pipe(Effect.fork, Effect.tap(TestClock.adjust("1 minute")), Effect.flatMap(Fiber.join))
      assert.deepStrictEqual(lifted, Either.right("an answer"))
      assert.isTrue(held !== undefined && Either.isLeft(held) && held.left._tag === "DeadlineExceeded")
    }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
})
