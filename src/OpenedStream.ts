/**
 * A stream read up to its first committing element: what fails before can be tried elsewhere, what comes after belongs
 * to the reader.
 *
 * @since 0.1.0
 */
import * as Chunk from "effect/Chunk"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as MonotonicTime from "./MonotonicTime.js"

/**
 * What has been read (`held`), how to read on (`pull`), and what to close in the end.
 *
 * @since 0.1.0
 * @category models
 */
export interface OpenedStream<A, E, R> {
  readonly scope: Scope.CloseableScope
  readonly held: Chunk.Chunk<A>
  readonly pull: Effect.Effect<Chunk.Chunk<A>, Option.Option<E>, R>
}

/**
 * How much may be held back: elements, and milliseconds after the first one.
 *
 * @since 0.1.0
 * @category models
 */
export interface Limits {
  readonly elements: number
  readonly millis: number
}

/**
 * Opens a stream. When it fails, or is interrupted, everything of it is closed; when it succeeds, the opened stream has
 * been given to `keep` first, so that no interruption can lose it, and what that makes of it is the result.
 *
 * @since 0.1.0
 * @category constructors
 */
export const open = <A, E, R, B>(
  stream: Stream.Stream<A, E, R>,
  commits: (a: A) => boolean,
  limits: Limits,
  keep: (opened: OpenedStream<A, E, R>) => B
): Effect.Effect<B, E, R> =>
  Effect.uninterruptibleMask((restore) =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const opened = yield* restore(read(stream, commits, limits, scope)).pipe(
        Effect.onError((cause) => Scope.close(scope, Exit.failCause(cause)))
      )
      return keep(opened)
    })
  )

const read = <A, E, R>(
  stream: Stream.Stream<A, E, R>,
  commits: (a: A) => boolean,
  limits: Limits,
  scope: Scope.CloseableScope
): Effect.Effect<OpenedStream<A, E, R>, E, R> =>
  Effect.gen(function*() {
    const pull = yield* Scope.extend(Stream.toPull(stream), scope)
    let held = Chunk.empty<A>()
    let started = yield* MonotonicTime.now
    for (;;) {
      const left = limits.millis - ((yield* MonotonicTime.now) - started)
      const begun = held.length === 0 ? undefined : yield* begin(pull, scope)
      if (begun !== undefined && !(yield* isDoneWithin(begun, left, scope))) {
        return { scope, held, pull: firstOf(Deferred.await(begun.answer), pull) }
      }
      const next = yield* Effect.either(begun === undefined ? pull : Deferred.await(begun.answer))
      if (Either.isLeft(next)) {
        if (Option.isSome(next.left)) return yield* Effect.fail(next.left.value)
        // The end of a stream that never committed is a success all the same: it has said all it had to say.
        return { scope, held, pull: Effect.fail(Option.none()) }
      }
      if (held.length === 0) started = yield* MonotonicTime.now
      held = Chunk.appendAll(held, next.right)
      if (held.length >= limits.elements || Chunk.some(next.right, commits)) return { scope, held, pull }
    }
  })

/** A read that has begun and goes on by itself; `turn` is done when it is, or when its time is up. */
interface Begun<A, E> {
  readonly answer: Deferred.Deferred<Chunk.Chunk<A>, Option.Option<E>>
  readonly turn: Deferred.Deferred<void>
}

const begin = <A, E, R>(
  pull: OpenedStream<A, E, R>["pull"],
  scope: Scope.Scope
): Effect.Effect<Begun<A, E>, never, R> =>
  Effect.gen(function*() {
    const answer = yield* Deferred.make<Chunk.Chunk<A>, Option.Option<E>>()
    const turn = yield* Deferred.make<void>()
    yield* Effect.forkIn(Effect.ensuring(Effect.intoDeferred(pull, answer), Deferred.succeed(turn, undefined)), scope)
    return { answer, turn }
  })

const isDoneWithin = <A, E>(
  { answer, turn }: Begun<A, E>,
  millis: number,
  scope: Scope.Scope
): Effect.Effect<boolean> =>
  Effect.gen(function*() {
    const timer = yield* Effect.forkIn(
      Effect.zipRight(Effect.sleep(Math.max(0, Math.ceil(millis))), Deferred.succeed(turn, undefined)),
      scope
    )
    yield* Deferred.await(turn)
    yield* Fiber.interruptFork(timer)
    return yield* Deferred.isDone(answer)
  })

/** Gives the read that is under way first, then reads on. */
const firstOf = <A, E, R>(
  pending: OpenedStream<A, E, R>["pull"],
  pull: OpenedStream<A, E, R>["pull"]
): OpenedStream<A, E, R>["pull"] => {
  const given = MutableRef.make(false)
  return Effect.suspend(() => MutableRef.getAndSet(given, true) ? pull : pending)
}
