/**
 * The settings of a pool as plain code writes them, and those of the original, as settings of a pool.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Either from "effect/Either"
import * as Predicate from "effect/Predicate"
import * as Redacted from "effect/Redacted"
import * as Schedule from "effect/Schedule"
import type * as ApiKey from "./ApiKey.js"
import { ConfigurationError } from "./KeymeshError.js"
import type * as KeyPool from "./KeyPool.js"
import type { State } from "./PlainState.js"
import * as PoolSettings from "./PoolSettings.js"
import * as Adapter from "./providers/Adapter.js"
import * as RetryPolicy from "./RetryPolicy.js"
import * as Checks from "./Settings.js"
import * as Strategy from "./Strategy.js"

/**
 * The settings of `createKeymesh`, but for those that belong to its adapter. Beside what is named here it takes the other
 * settings of a pool: `name`, `deadline`, `maxWait`, `rotations` and so on. Only `provider` and `keys` are needed; a
 * setting that is not known is refused.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings extends Omit<KeyPool.Settings, "keys" | "strategy" | "breaker" | "retry"> {
  /** The keys; at least one. */
  readonly keys: ReadonlyArray<ApiKey.Input | KeyConfig>
  /** Which of the eligible keys serves: a name (default `"round-robin"`), a `Strategy`, or an object with `pick`. */
  readonly strategy?: Strategy.Strategy | Strategy.Name | Selector | undefined
  /** The breaker of each key. */
  readonly circuitBreaker?: Breaker | undefined
  /** How to try again after faults of the provider; or a schedule. */
  readonly retry?: Retry | NonNullable<KeyPool.Settings["retry"]> | undefined
  /** How fast the health score of a key comes back. */
  readonly health?: {
    /** The gap to 100 halves in this time, in milliseconds (default 5 minutes, more than 0). */
    readonly decayHalfLifeMs?: number | undefined
  } | undefined
  /** Whether handlers are called. */
  readonly telemetry?: {
    /** Default: true. */
    readonly enabled?: boolean | undefined
  } | undefined
  /**
   * Statuses that are tried again, and then with another key, although they are the fault of the request (default: none).
   * Those that other keys or time can mend are tried again anyway.
   */
  readonly failoverStatusCodes?: ReadonlyArray<number> | undefined
  /**
   * Where breakers, cooldowns and counters are kept: `"memory"` (the default) keeps nothing, `"file"` a file; or an
   * object with `load` and `save`, a `PoolStore`, or its layer.
   */
  readonly state?: State | undefined
  /** The path of the file (default `.keymesh-state.json`), for `state: "file"`. */
  readonly stateFile?: string | undefined
}

/**
 * A key as the original takes it: as `ApiKey.Options`, with `value` for `secret`.
 *
 * @since 0.1.0
 * @category models
 */
export interface KeyConfig extends Omit<ApiKey.Options, "secret"> {
  readonly value: string | Redacted.Redacted
}

/**
 * The breaker of each key, as plain code writes it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Breaker extends Omit<NonNullable<KeyPool.Settings["breaker"]>, "cooldown"> {
  /** How long the first opening lasts, in milliseconds (default 30,000). */
  readonly cooldownMs?: number | undefined
  /** Calls that a half-open breaker lets through at once: always 1. */
  readonly halfOpenMaxCalls?: 1 | undefined
}

/**
 * How to try again, as plain code writes it. Leaving a key that cannot serve is no retry: see `rotations`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Retry {
  /** How many retries, beside the first attempt (default 5). */
  readonly max?: number | undefined
  /** The first delay, in milliseconds, doubled each time (default 200). */
  readonly baseMs?: number | undefined
  /** The longest delay, in milliseconds (default 30,000). It does not shorten what a server asks for. */
  readonly maxMs?: number | undefined
  /** Whether a delay is drawn between 0 and its length (default), or is always as long as that. */
  readonly jitter?: boolean | undefined
  /** How long a call may keep starting attempts and waits, in milliseconds (default 60,000); as `budget`. */
  readonly totalBudgetMs?: number | undefined
}

/**
 * A strategy as the original takes it: `pick` gets the keys that may serve and all keys, and gives one of the former.
 * Where it gives none, or throws, the first one serves.
 *
 * @since 0.1.0
 * @category models
 */
export interface Selector {
  readonly name: string
  // A method, so that it may be a class's own, and may ask for less of a key than there is.
  pick(eligible: Array<KeyView>, all: Array<KeyView>): { readonly id: string } | null | undefined
}

/**
 * A key as `inspect` and a strategy see it. Times are milliseconds since the epoch, 0 where there is none.
 *
 * @since 0.1.0
 * @category models
 */
export interface KeyView {
  readonly id: string
  readonly label: string
  readonly circuitState: "closed" | "open" | "half-open"
  /** From 0 to 100; as in `Health`. */
  readonly healthScore: number
  readonly inFlight: number
  readonly successCount: number
  readonly failureCount: number
  readonly consecutiveFailures: number
  /** Until when it may not serve. */
  readonly cooldownUntil: number
  readonly lastUsedAt: number
  /** What it was declared to be, but for the secret. */
  readonly config: { readonly label: string; readonly weight: number; readonly costTier: number }
}

/**
 * The settings as the parts of a pool use them.
 *
 * @since 0.1.0
 * @category models
 */
export interface Resolved {
  readonly pool: KeyPool.Settings
  readonly failover: ReadonlyArray<number>
  readonly enabled: boolean
  readonly halfLifeMillis: number
}

/**
 * Checks settings and fills in the defaults. `own` are the names that belong to the adapter; `views` gives all keys as
 * they are, once there is a pool. What the pool itself checks is left to it, under the names that it has there; see
 * `renamed`.
 *
 * @since 0.1.0
 * @category constructors
 */
export const resolve = (
  settings: Settings,
  own: ReadonlyArray<string>,
  views: () => ReadonlyArray<KeyView>
): Checks.Checked<Resolved> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(settings, [...names, ...own], "")
    const telemetry = settings.telemetry ?? {}
    yield* Checks.refuseUnknown(telemetry, ["enabled"], "telemetry")
    const enabled = yield* flag(telemetry.enabled ?? true, "telemetry.enabled")
    const health = settings.health ?? {}
    yield* Checks.refuseUnknown(health, ["decayHalfLifeMs"], "health")
    const halfLifeMillis = yield* Checks.positive(health.decayHalfLifeMs ?? 300_000, "health.decayHalfLifeMs")
    const failover = yield* Adapter.failoverStatuses(settings.failoverStatusCodes ?? [], "failoverStatusCodes")
    const others = Object.fromEntries(
      Object.entries(settings).filter(([name, value]) => passed.has(name) && value !== undefined)
    )
    const pool: KeyPool.Settings = {
      ...others,
      keys: Array.isArray(settings.keys) ? settings.keys.map(inputOf) : [],
      strategy: strategyOf(settings.strategy, views),
      breaker: yield* breakerOf(settings.circuitBreaker ?? {}),
      ...yield* retryOf(settings.retry ?? {}, settings.budget)
    }
    return { pool, failover, enabled, halfLifeMillis }
  })

/** Settings of a pool that are taken as they are. */
const passed: ReadonlySet<string> = new Set(
  PoolSettings.names.filter((name) => !["keys", "strategy", "breaker", "retry"].includes(name))
)

const names: ReadonlyArray<string> = [
  "provider",
  "keys",
  "strategy",
  "circuitBreaker",
  "retry",
  "health",
  "telemetry",
  "failoverStatusCodes",
  "state",
  "stateFile",
  ...passed
]

/**
 * What a pool refuses, under the name that it has in plain code.
 *
 * @since 0.1.0
 * @category getters
 */
export const renamed = (settings: Settings) => ({ field, problem }: ConfigurationError): ConfigurationError => {
  const [, at] = /^keys\[(\d+)\]\.secret$/.exec(field) ?? []
  const key: unknown = at === undefined ? undefined : settings.keys[Number(at)]
  return new ConfigurationError({
    field: Predicate.hasProperty(key, "value")
      ? field.replace(/secret$/, "value")
      : field.replace(/^breaker\.cooldown$/, "circuitBreaker.cooldownMs").replace(/^breaker\b/, "circuitBreaker"),
    problem
  })
}

const inputOf = (key: ApiKey.Input | KeyConfig): ApiKey.Input => {
  if (!isKeyConfig(key)) return key
  const { value, ...attributes } = key
  return { ...attributes, secret: value }
}

/** With both names for a secret it is none: `value` is then refused as unknown. */
const isKeyConfig = (key: ApiKey.Input | KeyConfig): key is KeyConfig =>
  Predicate.hasProperty(key, "value") && !Redacted.isRedacted(key) && !("secret" in key)

const strategyOf = (
  strategy: Settings["strategy"],
  views: () => ReadonlyArray<KeyView>
): KeyPool.Settings["strategy"] => {
  if (!isSelector(strategy)) return strategy
  return Strategy.custom(typeof strategy.name === "string" ? strategy.name : "custom", (candidates) => {
    const all = views()
    const eligible = all.filter(({ id }) => candidates.some((candidate) => candidate.id === id))
    const picked = strategy.pick(eligible, [...all])
    return candidates.find(({ id }) => id === picked?.id)
  })
}

const isSelector = (value: unknown): value is Selector =>
  Predicate.hasProperty(value, "pick") && Predicate.isFunction(value.pick) && !("empty" in value)

const breakerOf = (breaker: Breaker): Checks.Checked<NonNullable<KeyPool.Settings["breaker"]>> =>
  Either.gen(function*() {
    const known = [
      "threshold",
      "cooldownMs",
      "halfOpenMaxCalls",
      "cooldownFactor",
      "maxCooldown",
      "probeTimeout",
      "rate"
    ]
    yield* Checks.refuseUnknown(breaker, known, "circuitBreaker")
    const { cooldownMs, halfOpenMaxCalls = 1, ...others } = breaker
    if (halfOpenMaxCalls !== 1) {
      return yield* Checks.refuse(
        "circuitBreaker.halfOpenMaxCalls",
        "must be 1: the first good probe closes the breaker, so that more of them would only burden a sick key"
      )
    }
    if (cooldownMs === undefined) return others
    return { ...others, cooldown: yield* Checks.nonNegative(cooldownMs, "circuitBreaker.cooldownMs") }
  })

const retryOf = (
  retry: NonNullable<Settings["retry"]>,
  budget: Settings["budget"]
): Checks.Checked<Pick<KeyPool.Settings, "retry" | "budget">> =>
  Either.gen(function*() {
    if (Schedule.isSchedule(retry)) return { retry }
    yield* Checks.refuseUnknown(retry, ["max", "baseMs", "maxMs", "jitter", "totalBudgetMs"], "retry")
    const max = yield* Checks.integer(retry.max ?? 5, "retry.max")
    const base = yield* Checks.nonNegative(retry.baseMs ?? 200, "retry.baseMs")
    const longest = yield* Checks.nonNegative(retry.maxMs ?? 30_000, "retry.maxMs")
    const jitter = yield* flag(retry.jitter ?? true, "retry.jitter")
    const delays: Schedule.Schedule<unknown, RetryPolicy.Retrying> = jitter
      ? RetryPolicy.fullJitter({ base, max: longest })
      : Schedule.modifyDelay(Schedule.exponential(base, 2), (_, delay) => Duration.min(delay, longest))
    const policy = delays.pipe(RetryPolicy.attempts(max + 1), RetryPolicy.respectRetryAfter())
    if (retry.totalBudgetMs === undefined) return { retry: policy }
    if (budget !== undefined) return yield* Checks.refuse("retry.totalBudgetMs", "is the same as `budget`: give one")
    return { retry: policy, budget: yield* Checks.nonNegative(retry.totalBudgetMs, "retry.totalBudgetMs") }
  })

const flag = (value: unknown, path: string): Checks.Checked<boolean> =>
  typeof value === "boolean" ? Either.right(value) : Checks.refuse(path, "must be true or false")
