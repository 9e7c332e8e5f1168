import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import { AsyncLocalStorage } from "node:async_hooks"
import { setTimeout } from "node:timers/promises"
import * as AsyncContext from "../src/AsyncContext.js"

describe("where the platform has asynchronous contexts", () => {
  it("the value is seen inside, by what is started inside, and nowhere else", async () => {
    const context = AsyncContext.make<string>()
    assert.strictEqual(context.get(), undefined)
    const later = context.run("one", async () => {
      assert.strictEqual(context.get(), "one")
      await setTimeout(1)
      return context.get()
    })
    assert.strictEqual(context.get(), undefined)
    assert.strictEqual(await later, "one")
  })

  it("two at once do not meet", async () => {
    const context = AsyncContext.make<number>()
    const values = [1, 2, 3, 4, 5]
    const seen = await Promise.all(values.map((value) =>
      context.run(value, async () => {
        await setTimeout(6 - value)
        return context.get()
      })
    ))
    assert.deepStrictEqual(seen, values)
  })

  it("outside is outside, also for what is started there; afterwards one is inside again", async () => {
    const context = AsyncContext.make<string>()
    await context.run("one", async () => {
      const later = context.outside(async () => {
        assert.strictEqual(context.get(), undefined)
        await setTimeout(1)
        return context.get()
      })
      assert.strictEqual(context.get(), "one")
      assert.strictEqual(await later, undefined)
    })
  })

  it("two contexts do not see each other", () => {
    const [one, two] = [AsyncContext.make<string>(), AsyncContext.make<string>()]
    one.run("one", () => {
      assert.strictEqual(two.get(), undefined)
      two.run("two", () => {
        assert.deepStrictEqual([one.get(), two.get()], ["one", "two"])
        two.outside(() => assert.deepStrictEqual([one.get(), two.get()], ["one", undefined]))
        one.outside(() => assert.deepStrictEqual([one.get(), two.get()], [undefined, "two"]))
      })
    })
  })

  it("what it runs may throw, and gives its value", () => {
    const context = AsyncContext.make<string>()
    assert.throws(() =>
      context.run("one", () => {
        throw new Error("mine")
      }), "mine")
    assert.strictEqual(context.run("one", () => 7), 7)
    assert.strictEqual(context.get(), undefined)
  })
})

/** Contexts made where the platform's modules are what they are said to be. */
const madeWhere = (builtin: unknown, many: number) =>
  Effect.acquireUseRelease(
    Effect.sync(() => {
      const original = process.getBuiltinModule
      Reflect.set(process, "getBuiltinModule", builtin)
      return original
    }),
    () => Effect.sync(() => Array.from({ length: many }, () => AsyncContext.make<string>())),
    (original) => Effect.sync(() => Reflect.set(process, "getBuiltinModule", original))
  )

it.effect("however many contexts there are, the platform has one storage more: each makes all promises dearer", () =>
  Effect.gen(function*() {
    let storages = 0
    class Counted<A> extends AsyncLocalStorage<A> {
      constructor() {
        super()
        storages++
      }
    }
    const contexts = yield* madeWhere(() => ({ AsyncLocalStorage: Counted }), 100)
    for (const [i, context] of contexts.entries()) {
      assert.strictEqual(context.run(`${i}`, () => context.get()), `${i}`)
    }
    assert.strictEqual(storages, 1)
  }))

describe("where it has none", () => {
  for (const builtin of [undefined, () => undefined, () => ({})]) {
    it.effect(`it runs what it is given, and knows nothing (${builtin})`, () =>
      Effect.gen(function*() {
        const [context] = yield* madeWhere(builtin, 1)
        assert.isDefined(context)
        assert.strictEqual(context.run("one", () => context.get() ?? "nothing"), "nothing")
        assert.strictEqual(context.outside(() => 7), 7)
      }))
  }
})
