/**
 * A stream as one call: until it commits, what fails is tried again; from then on it belongs to the caller.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as Calls from "./Calls.js"
import type { HeldLease, Lease } from "./HeldLease.js"
import type { PoolError } from "./KeymeshError.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as OpenedStream from "./OpenedStream.js"
import * as Outcome from "./Outcome.js"
import * as PoolCore from "./PoolCore.js"
import type * as PoolState from "./PoolState.js"
import type * as RateLimit from "./RateLimit.js"

/**
 * What `stream` may be told of a call.
 *
 * @since 0.1.0
 * @category models
 */
export interface StreamOptions<A, E> {
  /** What a failure means (default: `Outcome.fromCause`). */
  readonly classify?: ((cause: Cause.Cause<E>) => Outcome.Outcome) | undefined
  /**
   * From which element on the stream belongs to the caller (default: from the first). Elements before it are held back,
   * at most 64 of them and for at most 5 seconds, counted from the arrival of the first one: the wait for that one is
   * bounded by the deadline alone. A failure until then is retried with another key and never seen; what was held back
   * of the stream that lasts is given first, the elements that do not commit included.
   */
  readonly commits?: ((a: A) => boolean) | undefined
  readonly model?: string | undefined
  /** The tokens it will use, for keys whose limits count them. */
  readonly tokens?: RateLimit.Estimate | undefined
  readonly replayable?: boolean | "never" | undefined
  readonly priority?: PoolState.Priority | undefined
  readonly affinity?: string | undefined
  readonly resources?: ReadonlyArray<string> | undefined
}

/**
 * One call that gives a stream; its lease is held until the stream ends, is interrupted, or goes unread for too long.
 *
 * @since 0.1.0
 * @category calls
 */
export const stream = <A, E, R>(
  core: PoolCore.PoolCore,
  use: (lease: Lease) => Stream.Stream<A, E, R>,
  options: StreamOptions<A, E>
): Stream.Stream<A, E | PoolError, R> => {
  const classify = options.classify ?? Outcome.fromCause
  return Stream.unwrapScoped(Effect.gen(function*() {
    // Before the call: whenever it is interrupted, what it has opened is closed.
    const kept = new Set<Opened<A, E, R>>()
    const close = (opened: Opened<A, E, R>, exit: Exit.Exit<unknown, unknown>) =>
      Effect.suspend(() => {
        kept.delete(opened)
        return Effect.ensuring(Scope.close(opened.scope, exit), opened.lease.end)
      })
    yield* Effect.addFinalizer((exit) => Effect.forEach([...kept], (opened) => close(opened, exit), { discard: true }))
    const open = (lease: HeldLease) =>
      Effect.onInterrupt(
        OpenedStream.open(use(lease), options.commits ?? always, holdLimits, (opened) => {
          const own: Opened<A, E, R> = { ...opened, lease }
          kept.add(own)
          return own
        }),
        // Opened in the moment in which another attempt was answered: nobody reads it.
        () => Effect.forEach([...kept].filter((own) => own.lease === lease), (own) => close(own, Exit.void))
      )
    const opened = yield* Calls.run(core, open, {
      hold: true,
      discard: (opened) => close(opened, Exit.void),
      abortable: true,
      streaming: true,
      model: options.model,
      tokens: options.tokens,
      replayable: options.replayable,
      priority: options.priority,
      affinity: options.affinity,
      resources: options.resources,
      classify: (exit) =>
        Exit.isSuccess(exit) ? Outcome.success : Cause.isInterruptedOnly(exit.cause)
          ? Outcome.ignored
          : classify(exit.cause)
    })
    const idleSince = MutableRef.make<number | undefined>(yield* MonotonicTime.now)
    yield* Effect.forkScoped(opened.lease.endWhenIdle(() => MutableRef.get(idleSince)))
    const pull = Effect.suspend(() => {
      MutableRef.set(idleSince, undefined)
      return opened.pull.pipe(
        Effect.tapErrorCause((cause) =>
          Option.match(Cause.failureOption(cause), {
            onNone: () => Effect.void,
            onSome: Option.match({
              onNone: () => opened.lease.end,
              onSome: (error) => Effect.uninterruptible(opened.lease.say(classify(Cause.fail(error)), true))
            })
          })
        ),
        Effect.ensuring(Effect.map(MonotonicTime.now, (now) => MutableRef.set(idleSince, now)))
      )
    })
    return Stream.concat(Stream.fromChunk(opened.held), Stream.fromPull(Effect.succeed(pull)))
  }))
}

/** An opened stream and its lease. */
interface Opened<A, E, R> extends OpenedStream.OpenedStream<A, E, R> {
  readonly lease: HeldLease
}

const always = () => true

/** How much of a stream is held back before its first committing element. */
const holdLimits: OpenedStream.Limits = { elements: 64, millis: 5_000 }
