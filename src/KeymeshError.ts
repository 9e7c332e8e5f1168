/**
 * The typed errors of the library, each with a message that tells a person what to do. None holds a secret.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Data from "effect/Data"
import * as Duration from "effect/Duration"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Runtime from "effect/Runtime"
import type * as Fault from "./Fault.js"

/**
 * A setting that cannot be used; `field` is its path, such as `keys[2].weight`. The offending value is never shown when
 * it could be a secret.
 *
 * @since 0.1.0
 * @category errors
 */
export class ConfigurationError extends Data.TaggedError("ConfigurationError")<{
  readonly field: string
  readonly problem: string
}> {
  override get message(): string {
    return `${this.field}: ${this.problem}`
  }
}

/**
 * One attempt of a call, as the trail of an error or of `call.end` tells it. Times are milliseconds.
 *
 * @since 0.1.0
 * @category models
 */
export interface TrailEntry {
  readonly attempt: number
  readonly keyId: string
  readonly label: string
  readonly at: number
  /** How long the call waited for this key before the attempt. */
  readonly waitedMillis: number
  readonly durationMillis: number
  readonly outcome: "success" | "ignored" | Fault.Kind
  readonly status?: number | undefined
  readonly code?: string | undefined
  /** Why other keys were not chosen: how many keys each gate held back when this one was picked. */
  readonly passedOver?: Readonly<Record<string, number>> | undefined
  /** Interrupted because another attempt, which ran beside it, was answered first; see `hedge` in the settings. */
  readonly lost?: boolean | undefined
  /**
   * On request (`CallOptions.withTrails`, `RunOptions.trail`): the same key by key, the first 32. Those that might have
   * served as well are `eligible`: the strategy preferred the one that was picked.
   */
  readonly others?: ReadonlyArray<KeyReason> | undefined
}

/**
 * The attempts of a call: the first 32 in full, the rest counted by outcome.
 *
 * @since 0.1.0
 * @category models
 */
export interface Trail {
  readonly entries: ReadonlyArray<TrailEntry>
  readonly more: Readonly<Record<string, number>>
}

/**
 * A trail with no attempts.
 *
 * @since 0.1.0
 * @category models
 */
export const emptyTrail: Trail = { entries: [], more: {} }

/**
 * How many attempts a trail tells in full.
 *
 * @since 0.1.0
 * @category models
 */
export const trailLimit = 32

/**
 * Adds an attempt to a trail.
 *
 * @since 0.1.0
 * @category combinators
 */
export const appendTrail = (trail: Trail, entry: TrailEntry): Trail =>
  trail.entries.length < trailLimit
    ? { entries: [...trail.entries, entry], more: trail.more }
    : { entries: trail.entries, more: { ...trail.more, [entry.outcome]: (trail.more[entry.outcome] ?? 0) + 1 } }

/**
 * Why one key could not serve, and until when (milliseconds since the epoch; absent when no time is known).
 *
 * @since 0.1.0
 * @category models
 */
export interface KeyReason {
  readonly keyId: string
  readonly label: string
  readonly gate: string
  readonly fault?: Fault.Kind | undefined
  readonly until?: number | undefined
}

/**
 * No key can serve the call inside its budget. `nextAvailableAt` is the earliest moment one may (milliseconds since the
 * epoch), absent when none is known; `reasons` tells why for each key (the first 32; `reasonCounts` counts all).
 *
 * @since 0.1.0
 * @category errors
 */
export class AllKeysExhausted extends Data.TaggedError("AllKeysExhausted")<{
  readonly pool: string
  readonly at: number
  readonly nextAvailableAt: number | undefined
  readonly reasons: ReadonlyArray<KeyReason>
  readonly reasonCounts: Readonly<Record<string, number>>
  readonly trail: Trail
}> {
  /** How long until a key may serve; absent when no moment is known. */
  get retryAfter(): Duration.Duration | undefined {
    return this.nextAvailableAt === undefined
      ? undefined
      : Duration.millis(Math.ceil(Math.max(0, this.nextAvailableAt - this.at)))
  }
  override get message(): string {
    const counts = Object.entries(this.reasonCounts).map(([reason, count]) => `${count} ${reason}`).join(", ")
    const busy = busyGates.some((gate) => this.reasonCounts[gate] !== undefined)
    const next = this.retryAfter === undefined
      ? busy
        ? "Keys are busy, and free again when their calls end: wait longer (`maxWait`), or add keys."
        : "No key comes back by itself: add a key, or enable one."
      : `The next key may serve in ${rounded(this.retryAfter)}: wait that long, raise the budget, or add keys ` +
        "of another quota group."
    return `No key of pool "${this.pool}" can serve this call (${counts === "" ? "it has no keys" : counts}). ${next}`
  }
}

/** Gates that open when a running attempt ends. */
const busyGates = ["concurrency", "probing", "ramp", "stalled"]

/**
 * The next back-off would end past the budget: that of the call (`budget`), or one that the retry policy has of its own
 * (`of` is `policy`; `budget` is then how long the call had taken). `fault` is what the last attempt said.
 *
 * @since 0.1.0
 * @category errors
 */
export class BudgetExceeded extends Data.TaggedError("BudgetExceeded")<{
  readonly pool: string
  readonly of: "call" | "policy"
  readonly budget: Duration.Duration
  readonly fault: Fault.Fault | undefined
  readonly trail: Trail
  readonly cause?: unknown
}> {
  override get message(): string {
    const last = this.fault === undefined ? "" : ` The last attempt failed with ${describeFault(this.fault)}.`
    const whose = this.of === "call"
      ? `The budget of ${Duration.format(this.budget)}`
      : `The retry policy's own budget, after ${Duration.format(this.budget)},`
    return `${whose} leaves no room for another attempt in pool "${this.pool}" after ${
      attemptsOf(this.trail)
    }.${last} ` +
      "Raise it, or look at the provider's status."
  }
}

/**
 * The caller's deadline passed before there was an answer; the attempt in flight was interrupted.
 *
 * @since 0.1.0
 * @category errors
 */
export class DeadlineExceeded extends Data.TaggedError("DeadlineExceeded")<{
  readonly pool: string
  readonly deadline: Duration.Duration
  readonly trail: Trail
}> {
  override get message(): string {
    return `No answer from pool "${this.pool}" within the deadline of ${Duration.format(this.deadline)}, ` +
      `after ${attemptsOf(this.trail)}.`
  }
}

/**
 * The pool's scope is closed: it starts no more attempts.
 *
 * @since 0.1.0
 * @category errors
 */
export class PoolClosed extends Data.TaggedError("PoolClosed")<{
  readonly pool: string
  readonly trail: Trail
}> {
  override get message(): string {
    return `Pool "${this.pool}" is closed. Keep its scope (or Layer) open for as long as calls are made.`
  }
}

/**
 * The provider's own refusal or failure, from the last attempt of a call. `cause` is the SDK's error as it threw it,
 * made from an answer that was scrubbed of secrets.
 *
 * @since 0.1.0
 * @category errors
 */
export class ProviderError extends Data.TaggedError("ProviderError")<{
  readonly provider: string
  readonly fault: Fault.Fault
  readonly status: number | undefined
  readonly body: unknown
  readonly requestId: string | undefined
  readonly trail: Trail
  readonly cause: unknown
}> {
  override get message(): string {
    const said = this.cause instanceof Error && this.cause.message !== "" ? `: ${this.cause.message}` : "."
    return `${this.provider} answered with ${describeFault(this.fault)} after ${attemptsOf(this.trail)}${said}`
  }
}

/**
 * Whatever else the callback given to `use` threw: a bug in it, or an error of the SDK that says nothing of the provider.
 *
 * @since 0.1.0
 * @category errors
 */
export class SdkError extends Data.TaggedError("SdkError")<{
  readonly provider: string
  readonly cause: unknown
}> {
  override get message(): string {
    return this.cause instanceof Error
      ? `The ${this.provider} callback failed: ${this.cause.message}`
      : `The ${this.provider} callback failed with something that is not an Error.`
  }
}

/**
 * What the pool itself can fail with.
 *
 * @since 0.1.0
 * @category errors
 */
export type PoolError = AllKeysExhausted | BudgetExceeded | DeadlineExceeded | PoolClosed

/**
 * What a pooled SDK call can fail with.
 *
 * @since 0.1.0
 * @category errors
 */
export type CallError = PoolError | ProviderError | SdkError

/**
 * Whether a value is one of the pool's own errors.
 *
 * @since 0.1.0
 * @category guards
 */
export const isPoolError = (u: unknown): u is PoolError =>
  u instanceof AllKeysExhausted || u instanceof BudgetExceeded || u instanceof DeadlineExceeded ||
  u instanceof PoolClosed

/**
 * Finds an error of this library inside another library's error: it follows `cause`, `error` and `reason` a few levels.
 *
 * @example
 * ```ts
 * import * as KeymeshError from "effect-keymesh/KeymeshError"
 *
 * const inner = new KeymeshError.PoolClosed({ pool: "openai", trail: KeymeshError.emptyTrail })
 * KeymeshError.find(new Error("outer", { cause: inner })) // Option.some(inner)
 * ```
 *
 * @since 0.1.0
 * @category getters
 */
export const find = (error: unknown): Option.Option<CallError> => findWithin(error, 8)

function findWithin(error: unknown, levels: number): Option.Option<CallError> {
  if (isPoolError(error) || error instanceof ProviderError || error instanceof SdkError) return Option.some(error)
  if (levels === 0 || !Predicate.isRecord(error)) return Option.none()
  // What `Effect.runPromise` rejects with.
  if (Runtime.isFiberFailure(error)) return findWithin(Cause.squash(error[Runtime.FiberFailureCauseId]), levels - 1)
  for (const part of [error["cause"], error["error"], error["reason"]]) {
    const found = findWithin(part, levels - 1)
    if (Option.isSome(found)) return found
  }
  return Option.none()
}

/**
 * How many attempts a trail tells of.
 *
 * @since 0.1.0
 * @category getters
 */
export const attemptsIn = (trail: Trail): number =>
  Object.values(trail.more).reduce((sum, n) => sum + n, trail.entries.length)

const attemptsOf = (trail: Trail): string => {
  const count = attemptsIn(trail)
  return count === 1 ? "1 attempt" : `${count} attempts`
}

/** For people: above a second, whole seconds. */
const rounded = (wait: Duration.Duration): string => {
  const millis = Duration.toMillis(wait)
  return Duration.format(millis > 1_000 ? Duration.seconds(Math.ceil(millis / 1_000)) : wait)
}

const describeFault = (fault: Fault.Fault): string =>
  [fault.kind, fault.status === undefined ? "" : `(HTTP ${fault.status})`, fault.code ?? ""].filter((s) => s !== "")
    .join(" ")
