/**
 * What an attempt says: success, a fault, or nothing about the key.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Data from "effect/Data"
import * as Duration from "effect/Duration"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Fault from "./Fault.js"
import { isPoolError, ProviderError } from "./KeymeshError.js"

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
 * Reads an error by its shape: a `fault` that it carries; an HTTP `status` (its own, or that of its `response`) with the
 * wait beside it (`retryAfter` as a Duration or milliseconds, `waitMillis`, or the headers `retry-after-ms` and
 * `retry-after` in seconds or as a date); Effect's `TimeoutException`; a request that could not be sent. Any other error
 * is ignored, and so are errors of a pool inside: the call fails with it at once.
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
  // Another pool has done what could be done; its keys are not this pool's.
  if (!Predicate.isRecord(error) || isPoolError(error) || error instanceof ProviderError) return ignored
  if (Fault.isFault(error["fault"])) return fault(error["fault"])
  if (error["_tag"] === "TimeoutException") return fault(Fault.make("Timeout"))
  if (error["_tag"] === "RequestError" && error["reason"] === "Transport") return fault(Fault.make("Network"))
  const response = error["response"]
  const status = typeof error["status"] === "number"
    ? error["status"]
    : Predicate.isRecord(response) && typeof response["status"] === "number"
    ? response["status"]
    : undefined
  const read = status === undefined ? undefined : Fault.fromStatus(status, { wait: waitBeside(error, response) })
  return read === undefined ? ignored : fault(read)
}

/** How long an error asks to wait; `Fault.make` drops what is no usable duration. */
const waitBeside = (
  error: { readonly [name: string]: unknown },
  response: unknown
): Duration.DurationInput | undefined => {
  for (const said of [error["waitMillis"], error["retryAfter"]]) {
    if (typeof said === "number" || Duration.isDuration(said)) return said
  }
  const headers = headersOf(error["headers"]) ??
    (Predicate.isRecord(response) ? headersOf(response["headers"]) : undefined)
  if (headers === undefined) return undefined
  const millis = Number.parseFloat(headers("retry-after-ms") ?? "")
  if (Number.isFinite(millis)) return millis
  const after = headers("retry-after")?.trim() ?? ""
  if (/^\d+(\.\d+)?$/.test(after)) return Number.parseFloat(after) * 1_000
  // A date counts from the moment that the server itself names.
  const wait = Date.parse(after) - Date.parse(headers("date") ?? "")
  return Number.isFinite(wait) ? Math.max(0, wait) : undefined
}

const headersOf = (headers: unknown): ((name: string) => string | undefined) | undefined => {
  if (headers instanceof Headers) return (name) => headers.get(name) ?? undefined
  if (!Predicate.isRecord(headers)) return undefined
  return (name) => {
    const value = headers[name]
    return typeof value === "string" ? value : undefined
  }
}
