/**
 * What a call does after a fault: leave for another key at once, back off, or give up. Pure; the pool acts on it.
 *
 * @since 0.1.0
 */
import type * as Fault from "./Fault.js"

/**
 * What a call has spent so far.
 *
 * @since 0.1.0
 * @category models
 */
export interface Progress {
  /** Attempts that left a dead key. */
  readonly rotations: number
  /** Those of them that left a rate-limited one. */
  readonly rateLimited: number
  readonly forbidden: number
  /** Whether the one immediate change of key after an overload is used. */
  readonly overloaded: boolean
  /** Whether the one try on other keys after a fault of the request is used. */
  readonly elsewhere: boolean
  /** Attempts that took too long and were aborted. */
  readonly aborted: number
}

/**
 * A call before its first fault.
 *
 * @since 0.1.0
 * @category constructors
 */
export const initial: Progress = {
  rotations: 0,
  rateLimited: 0,
  forbidden: 0,
  overloaded: false,
  elsewhere: false,
  aborted: 0
}

/**
 * What to do next. `Rotate`: the next attempt leaves at once, with another key; `retry` tells whether it counts as a
 * retry. `Elsewhere`: one try, only with keys of another group or of a higher limit, if one is free; or with those of a
 * group that has not said yet that it does not have what the request names, which are waited for.
 *
 * @since 0.1.0
 * @category models
 */
export type Decision =
  | { readonly _tag: "Rotate"; readonly retry: boolean }
  | { readonly _tag: "BackOff" }
  | { readonly _tag: "Elsewhere"; readonly where: "other-group" | "higher-limit" | "untried-group" }
  | { readonly _tag: "Stop" }

/**
 * Whether a fault may mean that what a request names is stored with another account.
 *
 * @since 0.1.0
 * @category getters
 */
export const isNotHere = (fault: Fault.Fault): boolean =>
  fault.kind === "Rejected" && fault.code !== "model_not_found" && (fault.status === 404 || fault.failover)

/**
 * The code of a fault that the pool made itself: the attempt took too long, and was aborted.
 *
 * @since 0.1.0
 * @category constants
 */
export const attemptTimeout = "attempt_timeout"

/**
 * The decision for a fault, and what is spent with it. A call is `searching` when it names a stored resource and nobody
 * knows which group has it: then each group is asked once.
 *
 * @since 0.1.0
 * @category decisions
 */
export const decide = (
  limits: { readonly rotations: number; readonly rateLimitRotations: number },
  progress: Progress,
  fault: Fault.Fault,
  replayable: boolean | "never",
  searching = false
): readonly [Decision, Progress] => {
  if (replayable === "never") return [stop, progress]
  switch (fault.kind) {
    case "RateLimited":
      // Where another key would be refused alike, time must pass; and so when many have refused already.
      return !fault.failover || progress.rateLimited >= limits.rateLimitRotations
        ? [backOff, progress]
        : leave(limits, { ...progress, rateLimited: progress.rateLimited + 1 })
    case "QuotaExhausted":
    case "Unauthorized":
      return leave(limits, progress)
    case "Forbidden": {
      const forbidden = progress.forbidden + 1
      return !fault.failover || forbidden >= 3 ? [stop, progress] : leave(limits, { ...progress, forbidden })
    }
    case "TooLarge":
      return progress.elsewhere
        ? [stop, progress]
        : [{ _tag: "Elsewhere", where: "higher-limit" }, { ...progress, elsewhere: true }]
    case "Rejected":
      if (searching && isNotHere(fault)) return [{ _tag: "Elsewhere", where: "untried-group" }, progress]
      return fault.code !== "model_not_found" || progress.elsewhere
        ? [stop, progress]
        : [{ _tag: "Elsewhere", where: "other-group" }, { ...progress, elsewhere: true }]
    case "Overloaded":
      if (!replayable && !fault.unprocessed) return [stop, progress]
      return progress.overloaded
        ? [backOff, progress]
        : [{ _tag: "Rotate", retry: true }, { ...progress, overloaded: true }]
    case "Timeout":
      if (fault.code !== attemptTimeout) return replayable || fault.unprocessed ? [backOff, progress] : [stop, progress]
      // One key that hangs is left; where the next one is no quicker, more attempts would only add to the load.
      return replayable && progress.aborted === 0 ? [backOff, { ...progress, aborted: 1 }] : [stop, progress]
    default:
      return replayable || fault.unprocessed ? [backOff, progress] : [stop, progress]
  }
}

const stop: Decision = { _tag: "Stop" }
const backOff: Decision = { _tag: "BackOff" }

/** Leaving a dead key costs no retry; a call that has left many goes on slowly. */
const leave = (limits: { readonly rotations: number }, progress: Progress): readonly [Decision, Progress] =>
  progress.rotations >= limits.rotations
    ? [backOff, progress]
    : [{ _tag: "Rotate", retry: false }, { ...progress, rotations: progress.rotations + 1 }]
