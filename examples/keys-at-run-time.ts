/** Keys come and go while calls run: `npx tsx examples/keys-at-run-time.ts` */
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Print from "./support/Print.js"

const program = Effect.gen(function*() {
  const pool = yield* KeyPool.make({ keys: [{ secret: "sk-fake-first-90b5", label: "first" }] })

  const call = pool.run((lease) => Effect.as(Effect.sleep("30 millis"), lease.key.label))
  const show = (what: string) =>
    Effect.gen(function*() {
      const served = yield* Effect.replicateEffect(call, 6, { concurrency: 2 })
      yield* Print.say(`${what.padEnd(34)} ${served.join(" ")}`)
    })
  yield* show("one key")

  const second = yield* pool.keyring.add({ secret: "sk-fake-second-a1c6", label: "second" })
  yield* show("a second one added")

  yield* pool.disable(second.id)
  yield* show("switched off")
  yield* pool.enable(second.id)
  yield* show("switched on")

  // One step: no call finds the pool without either of them. What runs with the old key may finish.
  const third = yield* pool.keyring.replace(second.id, { secret: "sk-fake-third-b2d7", label: "third" })
  yield* show("replaced by a third")

  // Drained: no new calls, and it waits for those that run.
  const running = yield* Effect.fork(Effect.replicateEffect(call, 4, { concurrency: 4 }))
  yield* Effect.yieldNow()
  yield* pool.drain(third.id)
  yield* Fiber.join(running)
  yield* show("the third one drained")

  // Nothing is held against a key any more: breaker, cooldowns and those of its group are forgotten.
  const [first] = yield* pool.keyring.keys
  if (first !== undefined) yield* pool.reset(first.id)

  yield* Effect.flatMap(
    Effect.flip(pool.keyring.add({ secret: "sk-fake-wrong-c3e8", weight: -1 })),
    (error) => Print.say(`${error._tag}: ${error.message}`)
  )
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
