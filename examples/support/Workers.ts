/** Processes that run the same file as their parent, and do what it orders, one order after the other. */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import { fork } from "node:child_process"
import { fileURLToPath } from "node:url"

const mark = "example-worker"

/** Whether this process is a worker. */
export const isOne: boolean = process.argv.includes(mark)

/** What a parent says to a worker: first where it is, then what it shall do. */
type Said<Place, Order> = { readonly place: Place } | { readonly order: Order }

/**
 * Starts so many, and waits until they are ready; they end with the scope. Each is a function from an order to its answer,
 * which takes one order at a time.
 */
export const start = <Place, Order, Answer>(
  file: URL,
  count: number,
  place: Place
): Effect.Effect<ReadonlyArray<(order: Order) => Effect.Effect<Answer>>, never, Scope.Scope> =>
  Effect.forEach(Array.from({ length: count }), () => startOne(file, place), { concurrency: "unbounded" })

const startOne = <Place, Order, Answer>(
  file: URL,
  place: Place
): Effect.Effect<(order: Order) => Effect.Effect<Answer>, never, Scope.Scope> =>
  Effect.gen(function*() {
    const child = yield* Effect.acquireRelease(
      Effect.sync(() => fork(fileURLToPath(file), [mark])),
      (child) => Effect.sync(() => child.kill())
    )
    const say = (said: Said<Place, Order>) =>
      Effect.async<Answer>((resume) => {
        const ended = () => resume(Effect.dieMessage("a process ended before it had answered"))
        child.once("exit", ended)
        child.once("message", (message) => {
          child.removeListener("exit", ended)
          // Workers are this same program: what they send is what `serve` sends.
          resume(Effect.succeed(message as Answer))
        })
        child.send(said)
      })
    yield* say({ place })
    return (order) => say({ order })
  })

/** What a worker does, until its parent ends it. */
export const serve = <Place, Order, Answer, E>(
  ready: (place: Place) => Effect.Effect<(order: Order) => Effect.Effect<Answer, unknown>, E, Scope.Scope>
): Effect.Effect<never, unknown> =>
  Effect.scoped(Effect.gen(function*() {
    const first = yield* heard<Said<Place, Order>>()
    if (!("place" in first)) return yield* Effect.dieMessage("it was ordered before it knew where it is")
    const obey = yield* ready(first.place)
    process.send?.("ready")
    for (;;) {
      const next = yield* heard<Said<Place, Order>>()
      if ("order" in next) process.send?.(yield* obey(next.order))
    }
  }))

const heard = <Message>() =>
  Effect.async<Message>((resume) => {
    // Only the parent can send, and it is this same program.
    process.once("message", (message) => resume(Effect.succeed(message as Message)))
  })
