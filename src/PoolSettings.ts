/**
 * The settings of a pool: what people write, and what it becomes. Every number of the pool's behaviour is here, with its
 * default.
 *
 * @since 0.1.0
 */
import type * as Duration from "effect/Duration"
import * as Either from "effect/Either"
import * as Predicate from "effect/Predicate"
import * as Schedule from "effect/Schedule"
import * as Schema from "effect/Schema"
import * as ApiKey from "./ApiKey.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import type * as Cooldowns from "./Cooldowns.js"
import type * as HedgeBudget from "./HedgeBudget.js"
import type { ConfigurationError } from "./KeymeshError.js"
import type * as PoolState from "./PoolState.js"
import * as RetryPolicy from "./RetryPolicy.js"
import * as Checks from "./Settings.js"
import * as Strategy from "./Strategy.js"

/**
 * A pool's settings. Only `keys` is needed; a setting that is not known is refused.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings {
  /** The keys; at least one. */
  readonly keys: ReadonlyArray<ApiKey.Input>
  /**
   * The pool's name in events, errors and the store (default `"default"`; adapters use the provider's name). Pools of
   * the same name share one record in the store, so give each its own.
   */
  readonly name?: string | undefined
  /** Which of the eligible keys serves (default `Strategy.roundRobin`). */
  readonly strategy?: Strategy.Strategy | Strategy.Name | undefined
  /** The breaker of each key (default: 3 faults in a row, 30 s cooldown doubling up to 5 min, one probe). */
  readonly breaker?: CircuitBreaker.Settings | undefined
  /** How to back off after faults of the provider (default: that of `RetryPolicy.default`, 5 retries, full jitter). */
  readonly retry?: Schedule.Schedule<unknown, RetryPolicy.Retrying> | undefined
  /** How long a call may keep starting attempts and waits (default 60 s). It never cuts an attempt in flight. */
  readonly budget?: Duration.DurationInput | undefined
  /** When a caller must have an answer; then the call is interrupted. At most 24.8 days; `Infinity`, the default: none. */
  readonly deadline?: Duration.DurationInput | undefined
  /** How long a call may wait for a key (default: the budget; 0 fails at once). */
  readonly maxWait?: Duration.DurationInput | undefined
  /** How many calls may wait at once (default 1,000); further ones fail at once. */
  readonly maxWaiters?: number | undefined
  /** How many attempts of a call may leave a dead key at once, without back-off (default 8). */
  readonly rotations?: number | undefined
  /** How many of them may leave a rate-limited key (default 4). */
  readonly rateLimitRotations?: number | undefined
  /** Retry tokens of the pool (default 0.2 per call + 1 per second, 10 at first, at most 100); `false`: no bound. */
  readonly retryTokens?: Partial<RetryPolicy.TokenOptions> | false | undefined
  /** How long keys rest when the server does not say. */
  readonly cooldowns?: CooldownSettings | undefined
  /** How often one call goes through when only guesses hold all keys back (default 1 s, more than 0); `false`: never. */
  readonly floor?: Duration.DurationInput | false | undefined
  /**
   * Whom faults of the provider are held against. `"corroborated"` (the default): the key, until the other keys show that
   * it is the provider; then calls wait for it, and no key is blamed. `"per-key"`: always the key, and so are rate limits.
   */
  readonly attribution?: "corroborated" | "per-key" | undefined
  /** How long an undecided trial of a benched key holds it back (default 30 s, more than 0). */
  readonly trialTimeout?: Duration.DurationInput | undefined
  /**
   * How a key comes back after a guess: attempts at once double every `step` (default 500 ms, more than 0) for `length`
   * (default 3 s; 0: no ramp).
   */
  readonly ramp?: { readonly step?: Duration.DurationInput; readonly length?: Duration.DurationInput } | undefined
  /**
   * How long an attempt may take until its first byte of content, in calls that may be sent again: `"learned"` (the
   * default) from at least 20 answers of the same model, streams apart. Beyond twice the 99th percentile, and 5 s, a key
   * that answers nothing gets no new attempts; beyond five times it, and 30 s, the attempt is aborted and tried once more.
   * A duration (more than 0) aborts every attempt at that time; `false`: none.
   */
  readonly attemptTimeout?: Duration.DurationInput | "learned" | false | undefined
  /**
   * Whether a call may have a second attempt beside its first, when that takes long (default: no): with a key of another
   * quota group, before any content has come, and only if it may be sent again. The first answer counts, the other
   * attempt is interrupted and held against nobody. `true`: as `{}`.
   */
  readonly hedge?: boolean | HedgeSettings | undefined
  /** How long a stream may go unread before its lease ends (default 300 s). */
  readonly streamIdle?: Duration.DurationInput | undefined
}

/**
 * When a call gets a second attempt beside its first, and how many of them may.
 *
 * @since 0.1.0
 * @category models
 */
export interface HedgeSettings {
  /**
   * After how long (more than 0; default: what 95 of 100 attempts of the same model take at most, streams apart, once
   * there were 20).
   */
  readonly delay?: Duration.DurationInput | undefined
  /** The most of all calls that may get one: more than 0, at most 1 (default 0.05). */
  readonly share?: number | undefined
  /** The least of all recent attempts that must not have failed: from 0 to 1 (default 0.9). */
  readonly success?: number | undefined
}

/**
 * How long keys rest when the server does not say.
 *
 * @since 0.1.0
 * @category models
 */
export interface CooldownSettings {
  /** After a 429 without a wait: the first (1 s), doubled each time in a row, at most (60 s). */
  readonly rateLimited?: GrowingSettings | undefined
  /** After a spent quota whose reset is not known (default 1 h). */
  readonly quotaExhausted?: Duration.DurationInput | undefined
  /** After a credential was refused by name (default 24 h). */
  readonly revoked?: Duration.DurationInput | undefined
  /** After any other 401, one after the other (default 60 s, 5 min, 1 h, 24 h). */
  readonly unauthorized?: ReadonlyArray<Duration.DurationInput> | undefined
  /** After a 403 (default 10 min, doubled, at most 6 h). */
  readonly forbidden?: GrowingSettings | undefined
  /** Added to a told wait (default 20 ms). */
  readonly guard?: Duration.DurationInput | undefined
  /** The most that is added to a guessed wait (default 250 ms). */
  readonly jitter?: Duration.DurationInput | undefined
}

/**
 * A rest that grows with each fault of the same kind in a row. `CooldownSettings` says what `first` and `max` are where
 * they are left out.
 *
 * @since 0.1.0
 * @category models
 */
export interface GrowingSettings {
  /** How long the first rest is. */
  readonly first?: Duration.DurationInput | undefined
  /** By how much each further rest is longer (default 2, at least 1; 1 keeps it as it is). */
  readonly factor?: number | undefined
  /** The longest rest; not less than `first`, which it is at least when it is left out. */
  readonly max?: Duration.DurationInput | undefined
}

/**
 * The settings as the pool uses them; times in milliseconds.
 *
 * @since 0.1.0
 * @category models
 */
export interface Resolved {
  readonly keys: ReadonlyArray<ApiKey.ApiKey>
  readonly duplicates: ReadonlyArray<ApiKey.ApiKey>
  readonly config: PoolState.Config
  readonly retry: Schedule.Schedule<unknown, RetryPolicy.Retrying>
  readonly budgetMillis: number
  readonly deadlineMillis: number | undefined
  readonly maxWaitMillis: number | undefined
  readonly rotations: number
  readonly rateLimitRotations: number
  /** Absent: calls get no second attempt beside their first. */
  readonly hedge: Hedge | undefined
  readonly streamIdleMillis: number
}

/**
 * After how long a call may get a second attempt beside its first; without `delayMillis` that is learned.
 *
 * @since 0.1.0
 * @category models
 */
export interface Hedge {
  readonly delayMillis: number | undefined
}

/**
 * The second attempt comes when the first takes longer than usual.
 *
 * @since 0.1.0
 * @category constants
 */
export const learnedHedge: Hedge = { delayMillis: undefined }

/**
 * The names of all settings.
 *
 * @since 0.1.0
 * @category getters
 */
export const names: ReadonlyArray<keyof Settings> = [
  "keys",
  "name",
  "strategy",
  "breaker",
  "retry",
  "budget",
  "deadline",
  "maxWait",
  "maxWaiters",
  "rotations",
  "rateLimitRotations",
  "retryTokens",
  "cooldowns",
  "floor",
  "attribution",
  "trialTimeout",
  "ramp",
  "attemptTimeout",
  "hedge",
  "streamIdle"
]

/**
 * Checks settings and fills in the defaults.
 *
 * @since 0.1.0
 * @category constructors
 */
export const resolve = (input: Settings): Either.Either<Resolved, ConfigurationError> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(input, names, "")
    const { duplicates, keys } = yield* ApiKey.makeAll(input.keys)
    const ramp = input.ramp ?? {}
    yield* Checks.refuseUnknown(ramp, ["step", "length"], "ramp")
    const hedge = yield* hedgeOf(input.hedge)
    const attemptTimeout = yield* attemptTimeoutOf(input.attemptTimeout)
    const config: PoolState.Config = {
      pool: input.name === undefined ? "default" : yield* Checks.text(input.name, "name"),
      strategy: yield* strategyOf(input.strategy),
      breaker: yield* CircuitBreaker.settings(input.breaker ?? {}, "breaker"),
      cooldowns: yield* cooldownsOf(input.cooldowns ?? {}),
      tokens: yield* tokensOf(input.retryTokens),
      floorMillis: input.floor === false ? undefined : yield* pause(input.floor ?? 1_000, "floor"),
      attemptTimeout,
      times: attemptTimeout === "learned" || (hedge.hedge !== undefined && hedge.hedge.delayMillis === undefined),
      hedging: hedge.bounds,
      corroborates: (yield* attributionOf(input.attribution)) === "corroborated",
      maxWaiters: yield* Checks.integer(input.maxWaiters ?? 1_000, "maxWaiters"),
      trialMillis: yield* pause(input.trialTimeout ?? 30_000, "trialTimeout"),
      rampStepMillis: Math.max(1, yield* pause(ramp.step ?? 500, "ramp.step")),
      rampMillis: yield* Either.flatMap(Checks.millis(ramp.length ?? 3_000, "ramp.length"), (millis) =>
        Checks.nonNegative(millis, "ramp.length"))
    }
    if (input.retry !== undefined && !Schedule.isSchedule(input.retry)) {
      return yield* Checks.refuse("retry", "must be a Schedule, such as those of RetryPolicy")
    }
    return {
      keys,
      duplicates,
      config,
      // The pool keeps the budget itself, so that it can tell a spent budget from spent retries.
      retry: input.retry ?? backoff,
      budgetMillis: yield* Checks.millis(input.budget ?? 60_000, "budget"),
      deadlineMillis: input.deadline === undefined ? undefined : yield* deadline(input.deadline, "deadline"),
      maxWaitMillis: input.maxWait === undefined ? undefined : yield* Checks.millis(input.maxWait, "maxWait"),
      rotations: yield* Checks.integer(input.rotations ?? 8, "rotations"),
      rateLimitRotations: yield* Checks.integer(input.rateLimitRotations ?? 4, "rateLimitRotations"),
      hedge: hedge.hedge,
      streamIdleMillis: yield* Checks.millis(input.streamIdle ?? 300_000, "streamIdle")
    }
  })

/**
 * Checks a deadline, in milliseconds; `undefined` when it is `Infinity`, which is none. A finite one beyond the longest
 * timer of the platform is refused: it would never come.
 *
 * @since 0.1.0
 * @category constructors
 */
export const deadline = (value: unknown, path: string): Checks.Checked<number | undefined> =>
  Either.flatMap(Checks.millis(value, path), (millis): Checks.Checked<number | undefined> =>
    millis === Infinity
      ? Either.right(undefined)
      : millis > longestTimer
      ? Checks.refuse(path, "must be at most 24.8 days, or Infinity for none")
      : Either.right(millis))

/**
 * The longest timer that platforms have, in milliseconds; a longer one would go off at once.
 *
 * @since 0.1.0
 * @category constants
 */
export const longestTimer = 2 ** 31 - 1

/** What never, or always at once, would switch off a rule of the pool: there must be some time, and an end to it. */
const pause = (value: unknown, path: string): Checks.Checked<number> =>
  Either.flatMap(Checks.millis(value, path), (millis) => Checks.positive(millis, path))

const attemptTimeoutOf = (input: Settings["attemptTimeout"]): Checks.Checked<PoolState.Config["attemptTimeout"]> =>
  input === false
    ? Either.right(undefined)
    : input === undefined || input === "learned"
    ? Either.right("learned")
    : pause(input, "attemptTimeout")

const hedgeOf = (
  input: Settings["hedge"]
): Checks.Checked<{ readonly hedge: Hedge | undefined; readonly bounds: HedgeBudget.Options }> =>
  Either.gen(function*() {
    const given = input === undefined || typeof input === "boolean" ? {} : input
    yield* Checks.refuseUnknown(given, ["delay", "share", "success"], "hedge")
    const share = yield* Checks.positive(given.share ?? 0.05, "hedge.share")
    if (share > 1) return yield* Checks.refuse("hedge.share", "must be at most 1")
    const success = yield* Checks.nonNegative(given.success ?? 0.9, "hedge.success")
    if (success > 1) return yield* Checks.refuse("hedge.success", "must be at most 1")
    const hedge = given.delay === undefined ? learnedHedge : { delayMillis: yield* pause(given.delay, "hedge.delay") }
    return { hedge: input === undefined || input === false ? undefined : hedge, bounds: { share, success } }
  })

/**
 * Checks whether, and after how long, one call gets a second attempt beside its first.
 *
 * @since 0.1.0
 * @category constructors
 */
export const hedgeOfCall = (value: unknown, path: string): Checks.Checked<unknown> =>
  Either.gen(function*() {
    if (typeof value === "boolean") return value
    if (!Predicate.isRecord(value)) return yield* Checks.refuse(path, "must be true, false or an object")
    yield* Checks.refuseUnknown(value, ["delay"], path)
    return value["delay"] === undefined ? undefined : yield* pause(value["delay"], `${path}.delay`)
  })

const attributionOf = (input: Settings["attribution"]): Checks.Checked<string> =>
  input === undefined || input === "corroborated" || input === "per-key"
    ? Either.right(input ?? "corroborated")
    : Checks.refuse("attribution", "must be \"corroborated\" or \"per-key\"")

const backoff = RetryPolicy.backoff.pipe(RetryPolicy.respectRetryAfter())

const strategyOf = (input: Strategy.Strategy | Strategy.Name | undefined): Checks.Checked<Strategy.Strategy> => {
  if (input === undefined) return Either.right(Strategy.roundRobin)
  if (typeof input === "string") {
    return isStrategyName(input)
      ? Either.right(Strategy.fromName(input))
      : Checks.refuse("strategy", `unknown strategy; known are ${Strategy.Name.literals.join(", ")}`)
  }
  return typeof input === "object" && input !== null && typeof input.empty === "object"
    ? Either.right(input)
    : Checks.refuse("strategy", "must be a strategy, or the name of one")
}

const isStrategyName = Schema.is(Strategy.Name)

const tokensOf = (
  input: Partial<RetryPolicy.TokenOptions> | false | undefined
): Checks.Checked<RetryPolicy.TokenOptions> =>
  Either.gen(function*() {
    if (input === false) return { perCall: 0, perSecond: 0, burst: Infinity, cap: Infinity }
    const given = input ?? {}
    const known = ["perCall", "perSecond", "burst", "cap"] as const
    yield* Checks.refuseUnknown(given, known, "retryTokens")
    for (const name of known) {
      if (given[name] !== undefined) yield* Checks.nonNegative(given[name], `retryTokens.${name}`)
    }
    if (given.cap !== undefined && given.cap < 1) return yield* Checks.refuse("retryTokens.cap", "must be at least 1")
    return RetryPolicy.tokenOptions(given)
  })

const cooldownsOf = (input: CooldownSettings): Checks.Checked<Cooldowns.Cooldowns> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(input, cooldownNames, "cooldowns")
    const ladder = input.unauthorized ?? ["60 seconds", "5 minutes", "1 hour", "24 hours"]
    if (!Array.isArray(ladder) || ladder.length === 0) {
      return yield* Checks.refuse("cooldowns.unauthorized", "must be a list of at least one duration")
    }
    const unauthorizedMillis: Array<number> = []
    for (const [i, wait] of ladder.entries()) {
      unauthorizedMillis.push(yield* Checks.millis(wait, `cooldowns.unauthorized[${i}]`))
    }
    const hour = 3_600_000
    return {
      rateLimited: yield* growingOf(input.rateLimited ?? {}, 1_000, 60_000, "cooldowns.rateLimited"),
      quotaMillis: yield* Checks.millis(input.quotaExhausted ?? hour, "cooldowns.quotaExhausted"),
      revokedMillis: yield* Checks.millis(input.revoked ?? 24 * hour, "cooldowns.revoked"),
      unauthorizedMillis,
      forbidden: yield* growingOf(input.forbidden ?? {}, hour / 6, 6 * hour, "cooldowns.forbidden"),
      guardMillis: yield* Checks.millis(input.guard ?? 20, "cooldowns.guard"),
      jitterMillis: yield* Checks.millis(input.jitter ?? 250, "cooldowns.jitter")
    }
  })

const cooldownNames: ReadonlyArray<keyof CooldownSettings> = [
  "rateLimited",
  "quotaExhausted",
  "revoked",
  "unauthorized",
  "forbidden",
  "guard",
  "jitter"
]

const growingOf = (
  input: GrowingSettings,
  first: number,
  max: number,
  path: string
): Checks.Checked<Cooldowns.Growing> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(input, ["first", "factor", "max"], path)
    const factor = yield* Checks.finite(input.factor ?? 2, `${path}.factor`)
    if (factor < 1) return yield* Checks.refuse(`${path}.factor`, "must be at least 1")
    const firstMillis = yield* Checks.millis(input.first ?? first, `${path}.first`)
    const maxMillis = yield* Checks.millis(input.max ?? Math.max(max, firstMillis), `${path}.max`)
    if (maxMillis < firstMillis) return yield* Checks.refuse(`${path}.max`, "must not be less than `first`")
    return { firstMillis, factor, maxMillis }
  })
