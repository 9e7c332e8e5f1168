import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as CallOptions from "../src/CallOptions.js"

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
