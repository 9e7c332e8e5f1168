/**
 * What can go wrong with an attempt, typed: a failure that has been understood.
 *
 * A `Fault` is the *prior*: what the answer alone says. What the pool makes of it, knowing the other keys, is its
 * attribution, and happens in the pool.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Predicate from "effect/Predicate"
import * as Schema from "effect/Schema"

/**
 * Every kind of fault the pool tells apart.
 *
 * - `RateLimited`: too many requests or tokens for now; the key is fine.
 * - `QuotaExhausted`: money or a daily quota is spent; waiting a little does not help.
 * - `Unauthorized`: the provider does not accept the credential.
 * - `Forbidden`: the credential is known but may not do this.
 * - `TooLarge`: the request can never fit the limits of this key.
 * - `Overloaded`: the provider has no capacity at the moment.
 * - `ServerError`: the provider failed.
 * - `Timeout`, `Network`: no (complete) answer arrived.
 * - `Rejected`: the request itself is wrong; no key can serve it.
 *
 * @since 0.1.0
 * @category models
 */
export const Kind = Schema.Literal(
  "RateLimited",
  "QuotaExhausted",
  "Unauthorized",
  "Forbidden",
  "TooLarge",
  "Overloaded",
  "ServerError",
  "Timeout",
  "Network",
  "Rejected"
)

/**
 * @since 0.1.0
 * @category models
 */
export type Kind = typeof Kind.Type

/**
 * What else a fault affects: this request alone, the key, every key of its quota group, or the whole provider. Each may
 * be narrowed to one model, see `perModel`.
 *
 * @since 0.1.0
 * @category models
 */
export const Scope = Schema.Literal("request", "key", "group", "provider")

/**
 * @since 0.1.0
 * @category models
 */
export type Scope = typeof Scope.Type

/**
 * Where a waiting time comes from: the server said it, the pool measured it, or the pool guesses. Told waits are never
 * shortened nor probed early.
 *
 * @since 0.1.0
 * @category models
 */
export const Provenance = Schema.Literal("told", "measured", "guessed")

/**
 * @since 0.1.0
 * @category models
 */
export type Provenance = typeof Provenance.Type

/**
 * A classified failure. It never holds a secret, nor the body of an answer.
 *
 * @since 0.1.0
 * @category models
 */
export class Fault extends Schema.TaggedClass<Fault>()("Fault", {
  /** What went wrong. */
  kind: Kind,
  /** What else it affects. */
  scope: Scope,
  /** Whether only one model is affected. */
  perModel: Schema.Boolean,
  /** How long the server asks to wait, in milliseconds; absent when it said nothing usable. */
  waitMillis: Schema.optionalWith(Schema.Number.pipe(Schema.finite(), Schema.nonNegative()), { exact: true }),
  /** Where `waitMillis` comes from; `guessed` when there is none. */
  provenance: Provenance,
  /** Whether the same request on the same key can succeed after waiting, without anybody doing anything. */
  retryable: Schema.Boolean,
  /** Whether the same request on a key outside the scope can succeed now. */
  failover: Schema.Boolean,
  /** Whether the provider named the cause with a code of its own (not only a status). */
  explicit: Schema.Boolean,
  /** Whether the provider refused before doing any work, so that sending again cannot do the work twice. */
  unprocessed: Schema.Boolean,
  /** HTTP status, where there was an answer. */
  status: Schema.optionalWith(Schema.Number, { exact: true }),
  /** The provider's code for the cause, such as `insufficient_quota`. */
  code: Schema.optionalWith(Schema.String, { exact: true }),
  /**
   * What the limit counts that was hit, where the answer says so: `concurrency` is what runs at once; `other` for days,
   * for load, and the like. Refusals of anything but requests teach nothing of how many requests may come.
   */
  unit: Schema.optionalWith(Schema.Literal("requests", "tokens", "concurrency", "other"), { exact: true }),
  /** When a spent quota is known to come back, as milliseconds from the answer. */
  resetMillis: Schema.optionalWith(Schema.Number.pipe(Schema.finite(), Schema.nonNegative()), { exact: true })
}) {}

const defaults: Record<Kind, Pick<Fault, "scope" | "retryable" | "failover" | "unprocessed">> = {
  RateLimited: { scope: "group", retryable: true, failover: true, unprocessed: true },
  QuotaExhausted: { scope: "group", retryable: false, failover: true, unprocessed: true },
  Unauthorized: { scope: "key", retryable: false, failover: true, unprocessed: true },
  Forbidden: { scope: "key", retryable: false, failover: true, unprocessed: true },
  TooLarge: { scope: "request", retryable: false, failover: false, unprocessed: true },
  Overloaded: { scope: "provider", retryable: true, failover: false, unprocessed: true },
  ServerError: { scope: "provider", retryable: true, failover: false, unprocessed: false },
  Timeout: { scope: "provider", retryable: true, failover: false, unprocessed: false },
  Network: { scope: "provider", retryable: true, failover: false, unprocessed: false },
  Rejected: { scope: "request", retryable: false, failover: false, unprocessed: true }
}

/**
 * What `make` takes beside the kind; everything left out gets the default of the kind.
 *
 * @since 0.1.0
 * @category models
 */
export interface Details {
  readonly scope?: Scope | undefined
  readonly perModel?: boolean | undefined
  /** How long to wait; negative, `NaN` and infinite waits are dropped. */
  readonly wait?: Duration.DurationInput | undefined
  readonly provenance?: Provenance | undefined
  readonly retryable?: boolean | undefined
  readonly failover?: boolean | undefined
  readonly explicit?: boolean | undefined
  readonly unprocessed?: boolean | undefined
  readonly status?: number | undefined
  readonly code?: string | undefined
  readonly reset?: Duration.DurationInput | undefined
  /** What the limit counts that was hit. */
  readonly unit?: "requests" | "tokens" | "concurrency" | "other" | undefined
}

/**
 * Makes a fault of a kind, for a `classify` function of your own.
 *
 * @example
 * ```ts
 * import * as Fault from "effect-keymesh/Fault"
 *
 * const limited = Fault.make("RateLimited", { wait: "2 seconds" })
 * const revoked = Fault.make("Unauthorized", { explicit: true, code: "invalid_api_key" })
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (kind: Kind, details: Details = {}): Fault => {
  const base = defaults[kind]
  const waitMillis = usableMillis(details.wait)
  const resetMillis = usableMillis(details.reset)
  return new Fault({
    kind,
    scope: details.scope ?? base.scope,
    perModel: details.perModel ?? false,
    provenance: details.provenance ?? (waitMillis === undefined ? "guessed" : "told"),
    retryable: details.retryable ?? base.retryable,
    failover: details.failover ?? base.failover,
    explicit: details.explicit ?? false,
    unprocessed: details.unprocessed ?? base.unprocessed,
    ...(waitMillis === undefined ? {} : { waitMillis }),
    ...(details.status === undefined ? {} : { status: details.status }),
    ...(details.code === undefined ? {} : { code: details.code }),
    ...(details.unit === undefined ? {} : { unit: details.unit }),
    ...(resetMillis === undefined ? {} : { resetMillis })
  })
}

const usableMillis = (wait: Duration.DurationInput | undefined): number | undefined => {
  if (wait === undefined) return undefined
  if (typeof wait === "number" && !(wait >= 0)) return undefined
  const millis = Duration.toMillis(wait)
  return Number.isFinite(millis) && millis >= 0 ? millis : undefined
}

/**
 * What a status alone says, when nothing more is known of the answer. `undefined` for a status that is no failure.
 *
 * @since 0.1.0
 * @category constructors
 */
export const fromStatus = (status: number, details: Omit<Details, "status"> = {}): Fault | undefined => {
  const kind = kindOfStatus(status)
  return kind === undefined ? undefined : make(kind, { ...details, status })
}

const kindOfStatus = (status: number): Kind | undefined => {
  if (!(status >= 400)) return undefined
  switch (status) {
    case 401:
      return "Unauthorized"
    case 402:
      return "QuotaExhausted"
    case 403:
      return "Forbidden"
    case 408:
      return "Timeout"
    case 409:
    case 425:
      return "ServerError"
    case 413:
      return "TooLarge"
    case 429:
      return "RateLimited"
    case 503:
    case 529:
      return "Overloaded"
    case 504:
    case 522:
    case 524:
      return "Timeout"
  }
  return status >= 500 ? "ServerError" : "Rejected"
}

/**
 * Whether a value is a fault.
 *
 * @since 0.1.0
 * @category guards
 */
export const isFault = (u: unknown): u is Fault => Predicate.isTagged(u, "Fault") && u instanceof Fault

/**
 * Whether a fault of this kind speaks about the provider's side rather than about the key or the request.
 *
 * @since 0.1.0
 * @category getters
 */
export const isProviderFault = (fault: Fault): boolean =>
  fault.kind === "Overloaded" || fault.kind === "ServerError" || fault.kind === "Timeout" || fault.kind === "Network"
