/**
 * Two attempts of one call side by side: the first that is answered has the call, the other is interrupted.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as FiberId from "effect/FiberId"

/**
 * What an attempt knows of the other one.
 *
 * @since 0.1.0
 * @category models
 */
export interface Side {
  /** Takes the call for this attempt, and interrupts the other one: true, unless that has taken it. */
  readonly claim: () => boolean
  /** Whether the other one has taken the call. */
  readonly isLost: () => boolean
  /** Says what is to be done when the other one takes the call while this one runs. */
  readonly whenLost: (f: () => void) => void
}

/**
 * How a race ended: with the result of the attempt that took the call, or that was the last to fail, and what the other
 * one had ended with, if it had.
 *
 * @since 0.1.0
 * @category models
 */
export interface Ended<A> {
  readonly result: A
  readonly other: A | typeof none
}

/**
 * What an attempt ends with that did not begin.
 *
 * @since 0.1.0
 * @category constants
 */
export const none: unique symbol = Symbol("effect-keymesh/HedgedAttempt/none")

/**
 * Runs `first`, and beside it `second` when its time has come: `whenDue` is told what to do then, and gives what calls
 * that off. `second` asks `begins` whether it may begin, and ends with `none` if it does not, or cannot after all. A
 * result that is `open` is a failure after which the other attempt may still succeed; whatever else `first` ends with ends
 * the race, and so does what `second` is answered.
 *
 * Runs uninterruptibly but for the wait; interrupted, it interrupts both and waits for them, and a result that nobody gets
 * any more goes to `discard`. An attempt that lost is not waited for.
 *
 * Hardly any `second` ever begins, so that nothing is made for it before: no fiber, and no timer.
 *
 * @since 0.1.0
 * @category combinators
 */
export const race = <A, E, R>(
  restore: <B, E2, R2>(effect: Effect.Effect<B, E2, R2>) => Effect.Effect<B, E2, R2>,
  { discard, first, isOpen, second, whenDue }: {
    readonly first: (side: Side) => Effect.Effect<A, E, R>
    readonly second: (side: Side, begins: () => boolean) => Effect.Effect<A | typeof none, E, R>
    readonly whenDue: (ring: () => void) => () => void
    readonly isOpen: (result: A) => boolean
    readonly discard: (result: A) => Effect.Effect<void>
  }
): Effect.Effect<Ended<A>, E, R> =>
  Effect.suspend(() => {
    let winner: Name | "nobody" | undefined
    let over: Name | undefined
    let due = false
    let begun = false
    let wake = (): void => {}
    const callOff = whenDue(() => {
      due = true
      wake()
    })
    const lanes: Record<Name, Lane<A, E>> = { first: newLane(), second: newLane() }
    const take = (name: Name): boolean => {
      if (winner !== undefined) return winner === name
      winner = name
      callOff()
      const other = lanes[beside[name]]
      if (other.exit !== undefined) return true
      other.lost()
      other.fiber?.unsafeInterruptAsFork(FiberId.none)
      return true
    }
    const side = (name: Name): Side => ({
      claim: () => take(name),
      isLost: () => winner === beside[name],
      whenLost: (f) => {
        lanes[name].lost = f
      }
    })
    const begins = (): boolean => {
      begun = begun || (winner === undefined && lanes.first.exit === undefined)
      return begun
    }
    const ended = (name: Name, exit: Exit.Exit<A | typeof none, E>): void => {
      lanes[name].exit = exit
      if (winner === undefined) {
        const mayWait = name === "first"
          ? begun && lanes.second.exit === undefined && Exit.isSuccess(exit) && exit.value !== none &&
            isOpen(exit.value)
          // Nobody had asked for it: what goes wrong with it costs the call nothing while the first one runs.
          : lanes.first.exit === undefined
        if (mayWait) return
        // The second had begun, and got no key after all: what the first had ended with stands.
        take(Exit.isSuccess(exit) && exit.value === none ? "first" : name)
      }
      if (winner === undefined || winner === "nobody" || lanes[winner].exit === undefined) return
      over = winner
      wake()
    }
    const start = (name: Name, effect: Effect.Effect<A | typeof none, E, R>): Effect.Effect<void, never, R> =>
      // Its failure is a value: that of a fiber is logged.
      Effect.map(Effect.forkDaemon(Effect.exit(effect)), (fiber) => {
        lanes[name].fiber = fiber
        fiber.addObserver((exit) => ended(name, Exit.flatten(exit)))
      })
    const abandoned = Effect.suspend(() => {
      winner = winner ?? "nobody"
      callOff()
      return Effect.zipRight(
        Fiber.interruptAll([...fiberOf(lanes.first), ...fiberOf(lanes.second)]),
        Effect.suspend(() => {
          const exit = winner === undefined || winner === "nobody" ? undefined : lanes[winner].exit
          return exit !== undefined && Exit.isSuccess(exit) && exit.value !== none
            ? discard(exit.value)
            : Effect.void
        })
      )
    })
    /** Until one has the call; the second begins in the fiber of the call, with what that has in its `FiberRef`s. */
    const awaited: Effect.Effect<Name, never, R> = Effect.suspend(() => {
      if (over !== undefined) return Effect.succeed(over)
      if (due) {
        due = false
        if (winner === undefined) return Effect.zipRight(start("second", second(side("second"), begins)), awaited)
      }
      return Effect.matchCauseEffect(restore(woken), {
        onFailure: (cause) => Effect.zipRight(abandoned, Effect.failCause(cause)),
        onSuccess: () => awaited
      })
    })
    const woken = Effect.async<void>((resume) => {
      wake = () => resume(Effect.void)
      // It may have happened since it was looked at: a fiber may give way to others between any two steps.
      if (over !== undefined || due) wake()
    })
    return start("first", first(side("first"))).pipe(
      Effect.zipRight(awaited),
      Effect.flatMap((name) => {
        const { exit, fiber } = lanes[name]
        const other = lanes[beside[name]].exit
        return Effect.zipRight(
          fiber === undefined ? Effect.void : Fiber.inheritAll(fiber),
          Effect.flatMap(exit ?? Effect.never, (result): Effect.Effect<Ended<A>> =>
            result === none ? Effect.never : Effect.succeed({
              result,
              other: other !== undefined && Exit.isSuccess(other) ? other.value : none
            }))
        )
      })
    )
  })

type Name = "first" | "second"

const beside = { first: "second", second: "first" } as const

/** One of the two, as far as it has got. */
interface Lane<A, E> {
  fiber: Fiber.RuntimeFiber<Exit.Exit<A | typeof none, E>> | undefined
  exit: Exit.Exit<A | typeof none, E> | undefined
  lost: () => void
}

const newLane = <A, E>(): Lane<A, E> => ({ fiber: undefined, exit: undefined, lost: () => {} })

const fiberOf = <A, E>({ fiber }: Lane<A, E>) => fiber === undefined ? [] : [fiber]
