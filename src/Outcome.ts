/**
 * What an attempt says: success, a fault, or nothing about the key.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Data from "effect/Data"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Fault from "./Fault.js"

/**
 * `Ignored` is for attempts that were interrupted, and for failures that say nothing about the key or the provider.
 *
 * @since 0.1.0
 * @category models
 */
export type Outcome = Data.TaggedEnum<{
  readonly Success: {}
  readonly Fault: { readonly fault: Fault.Fault }
  readonly Ignored: {}
}>

const constructors = Data.taggedEnum<Outcome>()

/**
 * The attempt served its call.
 *
 * @since 0.1.0
 * @category constructors
 */
export const success: Outcome = constructors.Success()

/**
 * The attempt says nothing about its key.
 *
 * @since 0.1.0
 * @category constructors
 */
export const ignored: Outcome = constructors.Ignored()

/**
 * The attempt failed in a way that is understood.
 *
 * @since 0.1.0
 * @category constructors
 */
export const fault = (fault: Fault.Fault): Outcome => constructors.Fault({ fault })

/**
 * How the pool reads an exit when it is given no `classify`: interruption and defects are ignored; a failure is read by
 * `fromError`.
 *
 * @since 0.1.0
 * @category constructors
 */
export const fromExit = (exit: Exit.Exit<unknown, unknown>): Outcome =>
  Exit.isSuccess(exit) ? success : fromCause(exit.cause)

/**
 * As `fromExit`, of a cause.
 *
 * @since 0.1.0
 * @category constructors
 */
export const fromCause = (cause: Cause.Cause<unknown>): Outcome =>
  Option.match(Cause.failureOption(cause), { onNone: () => ignored, onSome: fromError })

/**
 * Reads an error by its shape: a `fault` that it carries, an HTTP `status` (its own, or that of its `response`), Effect's
 * `TimeoutException`, and a request that could not be sent. Any other error is ignored: the call fails with it at once.
 *
 * @example
 * ```ts
 * import * as Outcome from "effect-keymesh/Outcome"
 *
 * Outcome.fromError({ status: 429 }) // a RateLimited fault
 * Outcome.fromError(new Error("my own bug")) // ignored
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const fromError = (error: unknown): Outcome => {
  if (Fault.isFault(error)) return fault(error)
  if (!Predicate.isRecord(error)) return ignored
  if (Fault.isFault(error["fault"])) return fault(error["fault"])
  if (error["_tag"] === "TimeoutException") return fault(Fault.make("Timeout"))
  if (error["_tag"] === "RequestError" && error["reason"] === "Transport") return fault(Fault.make("Network"))
  const response = error["response"]
  const status = typeof error["status"] === "number"
    ? error["status"]
    : Predicate.isRecord(response) && typeof response["status"] === "number"
    ? response["status"]
    : undefined
  const read = status === undefined ? undefined : Fault.fromStatus(status)
  return read === undefined ? ignored : fault(read)
}
