/**
 * When to try again, as ordinary Effect schedules: full jitter, told waits, attempts and a time budget. They compose
 * with each other, with everything in `effect/Schedule`, and with any `Effect.retry`; a pool drives the same
 * schedules itself, through `start` and `step`.
 *
 * Order matters as in every pipeline: each combinator bounds or lengthens what stands before it, so `withBudget` goes
 * last.
 *
 * The retry tokens at the end of the module limit the retries of a whole pool, as pure functions.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Random from "effect/Random"
import * as Schedule from "effect/Schedule"
import * as ScheduleDecision from "effect/ScheduleDecision"
import * as ScheduleInterval from "effect/ScheduleInterval"
import * as ScheduleIntervals from "effect/ScheduleIntervals"
import type * as Fault from "./Fault.js"

/** No drawn delay is longer than this. */
const longestDelay = 24 * 60 * 60 * 1000

/** The longest sleep that a timer of JavaScript can hold; Effect never wakes from a longer one. */
const longestTimer = 2 ** 31 - 1

/**
 * What a pool feeds into its policy after a failed attempt.
 *
 * @since 0.1.0
 * @category models
 */
export interface Retrying {
  /**
   * When the call began, in milliseconds of the clock that steps the schedule. `Infinity` lifts the budget for this
   * step.
   */
  readonly startedAt: number
  /**
   * How long the server asks to wait, in milliseconds from now; `undefined` when it said nothing, and when the wait binds
   * its key only.
   */
  readonly waitMillis: number | undefined
  /** What failed, if the pool asks: a schedule may depend on it. */
  readonly fault?: Fault.Fault | undefined
}

/**
 * Exponential back-off with full jitter: the n-th delay (from 0) is uniform in [0, min(max, base · factor^n)), in
 * whole milliseconds, drawn from `Random`. It goes on for ever; limit it with `attempts` and `withBudget`.
 *
 * - `base`: the ceiling of the first delay, default 200 ms.
 * - `max`: the highest ceiling, default 30 s, at most 24 h.
 * - `factor`: how fast the ceiling grows, default 2, at least 1.
 *
 * Throws a `RangeError` that names the option when one is not usable.
 *
 * See "Exponential Backoff And Jitter", AWS Architecture Blog: of the usual ways to jitter it needs the fewest calls
 * to get a crowd of clients served.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 * import * as Effect from "effect/Effect"
 *
 * const policy = RetryPolicy.fullJitter({ base: "100 millis", max: "5 seconds" }).pipe(RetryPolicy.attempts(4))
 * const program = Effect.retry(Effect.fail("unavailable"), policy)
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const fullJitter = (options: {
  readonly base?: Duration.DurationInput | undefined
  readonly max?: Duration.DurationInput | undefined
  readonly factor?: number | undefined
} = {}): Schedule.Schedule<Duration.Duration> => {
  const base = millisOf("fullJitter: base", options.base ?? "200 millis")
  const max = Math.min(longestDelay, millisOf("fullJitter: max", options.max ?? "30 seconds"))
  const factor = options.factor ?? 2
  if (!(factor >= 1 && Number.isFinite(factor))) {
    throw new RangeError(`RetryPolicy.fullJitter: factor must be a finite number of at least 1, got ${factor}`)
  }
  // the ceiling itself is the state: it cannot overflow, however many steps there are
  return Schedule.makeWithState(Math.min(max, base), (now, _: unknown, ceiling) =>
    Effect.map(Random.next, (random) => {
      const delay = Math.floor(random * ceiling)
      return [
        Math.min(max, ceiling * factor),
        Duration.millis(delay),
        ScheduleDecision.continueWith(ScheduleInterval.after(now + delay))
      ] as const
    }))
}

/**
 * Back-off with decorrelated jitter: each delay is uniform in [base, 3 · the previous delay], cut at `max`, in whole
 * milliseconds, drawn from `Random`. The first "previous delay" is `base`. It goes on for ever.
 *
 * - `base`: the shortest delay, default 200 ms.
 * - `max`: the longest delay, default 30 s, at most 24 h.
 *
 * Throws a `RangeError` that names the option when one is not usable. From the same article as `fullJitter`; prefer it
 * where an immediate retry is never wanted.
 *
 * @since 0.1.0
 * @category constructors
 */
export const decorrelatedJitter = (options: {
  readonly base?: Duration.DurationInput | undefined
  readonly max?: Duration.DurationInput | undefined
} = {}): Schedule.Schedule<Duration.Duration> => {
  const base = Math.ceil(Math.min(longestDelay, millisOf("decorrelatedJitter: base", options.base ?? "200 millis")))
  const max = Math.floor(Math.min(longestDelay, millisOf("decorrelatedJitter: max", options.max ?? "30 seconds")))
  return Schedule.makeWithState(base, (now, _: unknown, previous) =>
    Effect.map(Random.next, (random) => {
      const delay = Math.min(max, Math.round(base + random * (3 * previous - base)))
      return [
        delay,
        Duration.millis(delay),
        ScheduleDecision.continueWith(ScheduleInterval.after(now + delay))
      ] as const
    }))
}

/**
 * At most `n` attempts altogether, the first one included: `n` − 1 retries. Throws a `RangeError` unless `n` is an
 * integer of at least 1.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 * import * as Schedule from "effect/Schedule"
 *
 * const policy = Schedule.spaced("1 second").pipe(RetryPolicy.attempts(3))
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const attempts = (n: number): <Out, In, R>(
  self: Schedule.Schedule<Out, In, R>
) => Schedule.Schedule<Out, In, R> => {
  if (!(Number.isSafeInteger(n) && n >= 1)) {
    throw new RangeError(`RetryPolicy.attempts: n must be an integer of at least 1, got ${n}`)
  }
  const retries = Schedule.recurs(n - 1)
  return (self) => Schedule.map(Schedule.intersect(self, retries), ([out]) => out)
}

/**
 * Never retries before the wait that a server asked for has passed: a told wait is neither shortened nor jittered, it
 * only lengthens the delay of the schedule. The output of the schedule stays as it was.
 *
 * `waitOf` reads the wait from the input, the error under `Effect.retry`. By default that is `waitMillis`,
 * `fault.waitMillis` or `retryAfter` (a `Duration`, or milliseconds) of the input, the first that is there. Negative,
 * `NaN` and malformed waits count as none. A wait that no timer can hold (above 24.8 days) ends the schedule, because
 * Effect would never wake from it.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 * import * as Effect from "effect/Effect"
 *
 * interface Refused {
 *   readonly headers: Headers
 * }
 *
 * const policy = RetryPolicy.backoff.pipe(
 *   RetryPolicy.respectRetryAfter((error: Refused) => {
 *     const seconds = error.headers.get("retry-after")
 *     return seconds === null ? undefined : Number(seconds) * 1000
 *   })
 * )
 * const persistent = (send: Effect.Effect<string, Refused>) => Effect.retry(send, policy)
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const respectRetryAfter = <In2 = unknown>(
  waitOf: (input: In2) => Duration.DurationInput | undefined = waitOfAnything
): <Out, In, R>(self: Schedule.Schedule<Out, In, R>) => Schedule.Schedule<Out, In & In2, R> =>
<Out, In, R>(self: Schedule.Schedule<Out, In, R>) =>
  Schedule.makeWithState<unknown, In & In2, Out, R>(
    self.initial,
    (now, input, state) =>
      Effect.map(self.step(now, input, state), ([next, out, decision]) => {
        const wait = usableMillis(waitOf(input))
        if (wait === undefined || ScheduleDecision.isDone(decision)) return [next, out, decision] as const
        if (wait > longestTimer) return [next, out, ScheduleDecision.done] as const
        const at = now + Math.ceil(wait)
        return at <= ScheduleIntervals.start(decision.intervals)
          ? [next, out, decision] as const
          : [next, out, ScheduleDecision.continueWith(ScheduleInterval.after(at))] as const
      })
  )

/**
 * Ends the schedule as soon as the next retry would begin later than `budget` after the start, so that the budget is
 * not overrun by the last wait either. A retry that begins exactly at its end still takes place; an attempt that runs
 * is never interrupted. `Duration.infinity` sets no limit. Throws a `RangeError` for a budget that is no duration.
 *
 * The start is `startedAt` of the input, in milliseconds, when the input carries a number there (it should be the
 * same in every input of a call), else the first step of the schedule: under `Effect.retry` that is the *first
 * failure*. Use `Schedule.mapInput` to measure from the very start. `Schedule.upTo` differs: it looks at the time
 * before the wait only.
 *
 * Apply it last: it cannot see what lengthens the delay after it.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 * import * as Clock from "effect/Clock"
 * import * as Effect from "effect/Effect"
 * import * as Schedule from "effect/Schedule"
 *
 * const policy = RetryPolicy.backoff.pipe(RetryPolicy.withBudget("10 seconds"))
 *
 * const persistent = (send: Effect.Effect<string, Error>) =>
 *   Effect.flatMap(
 *     Clock.currentTimeMillis,
 *     (startedAt) => Effect.retry(send, Schedule.mapInput(policy, (_: Error) => ({ startedAt })))
 *   )
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const withBudget = (budget: Duration.DurationInput): <Out, In, R>(
  self: Schedule.Schedule<Out, In, R>
) => Schedule.Schedule<Out, In, R> => {
  const limit = Math.floor(millisOf("withBudget: budget", budget))
  return <Out, In, R>(self: Schedule.Schedule<Out, In, R>) =>
    Schedule.makeWithState<Budgeted, In, Out, R>(
      { inner: self.initial, since: undefined },
      (now, input, state) =>
        Effect.map(self.step(now, input, state.inner), ([inner, out, decision]) => {
          const since = state.since ?? now
          const within = ScheduleDecision.isContinue(decision) &&
            opening(decision, now) - (startOf(input) ?? since) <= limit
          return [{ inner, since }, out, within ? decision : ScheduleDecision.done] as const
        })
    )
}

interface Budgeted {
  readonly inner: unknown
  /** When the schedule was stepped first. */
  readonly since: number | undefined
}

/**
 * Full jitter with the default ceilings, and at most 5 retries.
 *
 * @since 0.1.0
 * @category policies
 */
export const backoff: Schedule.Schedule<Duration.Duration> = fullJitter().pipe(attempts(6))

/**
 * What a pool uses when nothing else is said: `backoff`, told waits respected, 60 s of budget. Also exported as
 * `default`, so that `RetryPolicy.default` reads well.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 * import * as Console from "effect/Console"
 * import * as Schedule from "effect/Schedule"
 *
 * const policy = RetryPolicy.default.pipe(Schedule.tapOutput((delay) => Console.log("again in", delay)))
 * ```
 *
 * @since 0.1.0
 * @category policies
 */
export const defaultPolicy: Schedule.Schedule<Duration.Duration> = backoff.pipe(
  respectRetryAfter(),
  withBudget("60 seconds")
)

export {
  /**
   * The same as `defaultPolicy`.
   *
   * @since 0.1.0
   * @category policies
   */
  defaultPolicy as default
}

/**
 * A policy on its way: the schedule and its state after the steps so far. An immutable value.
 *
 * @since 0.1.0
 * @category stepping
 */
export interface Stepper<in In extends Retrying = Retrying, out R = never> {
  readonly policy: Schedule.Schedule<unknown, In, R>
  readonly state: unknown
}

/**
 * Try again at the instant `at`, in milliseconds of the clock that was given to `step`, never before that `now`.
 *
 * @since 0.1.0
 * @category stepping
 */
export interface Continue<in In extends Retrying = Retrying, out R = never> {
  readonly _tag: "Continue"
  readonly at: number
  readonly stepper: Stepper<In, R>
}

/**
 * Do not try again. `outOfBudget` tells whether it was for the budget of the policy alone.
 *
 * @since 0.1.0
 * @category stepping
 */
export interface Done {
  readonly _tag: "Done"
  readonly outOfBudget: boolean
}

/**
 * Begins a policy for one call.
 *
 * @since 0.1.0
 * @category stepping
 */
export const start = <In extends Retrying, R>(policy: Schedule.Schedule<unknown, In, R>): Stepper<In, R> => ({
  policy,
  state: policy.initial
})

/**
 * Asks the policy what to do after a failed attempt; it does not sleep.
 *
 * When the policy says no, it is asked once more with the budget lifted (`startedAt: Infinity`): if it would go on
 * then, the budget was the reason. So effects attached to the policy (`Schedule.tapOutput`) run twice at the end of a
 * call. The input is copied for that: give a plain record. Time limits other than `withBudget` do not count as
 * budget.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 * import * as Effect from "effect/Effect"
 *
 * const program = Effect.gen(function*() {
 *   const next = yield* RetryPolicy.step(RetryPolicy.start(RetryPolicy.default), 1_000, {
 *     startedAt: 0,
 *     waitMillis: undefined
 *   })
 *   return next._tag === "Continue" ? `again at ${next.at}` : next.outOfBudget ? "no time left" : "gave up"
 * })
 * ```
 *
 * @since 0.1.0
 * @category stepping
 */
export const step = <In extends Retrying, R>(
  stepper: Stepper<In, R>,
  now: number,
  input: In
): Effect.Effect<Continue<In, R> | Done, never, R> =>
  Effect.flatMap(
    next(stepper, now, input),
    (answer): Effect.Effect<Continue<In, R> | Done, never, R> =>
      answer !== undefined ? Effect.succeed(answer) : Effect.map(
        next(stepper, now, { ...input, startedAt: Number.POSITIVE_INFINITY }),
        (unlimited): Done => ({ _tag: "Done", outOfBudget: unlimited !== undefined })
      )
  )

const next = <In extends Retrying, R>(
  { policy, state }: Stepper<In, R>,
  now: number,
  input: In
): Effect.Effect<Continue<In, R> | undefined, never, R> =>
  Effect.map(Effect.suspend(() => policy.step(now, input, state)), ([state, , decision]) => {
    if (ScheduleDecision.isDone(decision)) return undefined
    const at = Math.ceil(opening(decision, now))
    // an exponential schedule without a cap reaches Infinity: nobody can wait for that
    return Number.isFinite(at) ? { _tag: "Continue", at, stepper: { policy, state } } : undefined
  })

/** When a decision lets the next attempt begin: an interval that is open already begins now. */
const opening = (decision: ScheduleDecision.Continue, now: number): number =>
  Math.max(now, ScheduleIntervals.start(decision.intervals))

/**
 * The retry tokens of a pool: a bucket that calls and time fill and retries empty, so that retries stay a small part
 * of the load when everything fails. An immutable value.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export interface Tokens {
  /** Tokens in the bucket at the instant `at`; never above the cap, below 0 by those that are reserved in advance. */
  readonly level: number
  /** In milliseconds. */
  readonly at: number
}

/**
 * How retry tokens come.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export interface TokenOptions {
  /** Tokens that each call brings, whether it fails or not. */
  readonly perCall: number
  /** Tokens that each second brings. */
  readonly perSecond: number
  /** Tokens at the beginning. */
  readonly burst: number
  /** The most tokens that can gather. */
  readonly cap: number
}

/**
 * 0.2 tokens per call and 1 per second, 10 at the beginning, at most 100.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const tokenDefaults: TokenOptions = { perCall: 0.2, perSecond: 1, burst: 10, cap: 100 }

/**
 * Complete options from some of them, the rest from `tokenDefaults`. Throws a `RangeError` that names the field:
 * `perCall` and `perSecond` are finite and not negative, `burst` is not negative, `cap` is at least 1; with `burst`
 * and `cap` both `Infinity` tokens never run out.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const tokenOptions = (
  options: { readonly [K in keyof TokenOptions]?: TokenOptions[K] | undefined } = {}
): TokenOptions => ({
  perCall: inRange("perCall", options.perCall ?? tokenDefaults.perCall, 0, Number.MAX_VALUE),
  perSecond: inRange("perSecond", options.perSecond ?? tokenDefaults.perSecond, 0, Number.MAX_VALUE),
  burst: inRange("burst", options.burst ?? tokenDefaults.burst, 0, Number.POSITIVE_INFINITY),
  cap: inRange("cap", options.cap ?? tokenDefaults.cap, 1, Number.POSITIVE_INFINITY)
})

const inRange = (field: string, value: number, min: number, max: number): number => {
  if (value >= min && value <= max) return value
  const range = max === Number.POSITIVE_INFINITY ? `a number of at least ${min}` : `a finite number of at least ${min}`
  throw new RangeError(`RetryPolicy.tokenOptions: ${field} must be ${range}, got ${value}`)
}

/**
 * A bucket that begins now, with `burst` tokens.
 *
 * @example
 * ```ts
 * import * as RetryPolicy from "effect-keymesh/RetryPolicy"
 *
 * const afterCall = RetryPolicy.earn(RetryPolicy.tokens(0), 0)
 * const spent = RetryPolicy.spend(afterCall, 0)
 * const answer = "wait" in spent ? `a token comes in ${spent.wait} ms` : `${spent.level} tokens left`
 * ```
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const tokens = (now: number, options: TokenOptions = tokenDefaults): Tokens => ({
  level: Math.min(options.cap, options.burst),
  at: now
})

/**
 * A call begins (or several): it brings its share. Time that goes backwards brings nothing.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const earn = (self: Tokens, now: number, options: TokenOptions = tokenDefaults, calls = 1): Tokens => ({
  level: levelAt(self, now, options, options.perCall * calls),
  at: now > self.at ? now : self.at
})

/**
 * Takes one token for a retry: the bucket without it, or, when there is less than one, the milliseconds until time
 * alone has brought it (`Infinity` when `perSecond` is 0). Calls may bring it sooner, and other retries may take it
 * first: ask again then.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const spend = (
  self: Tokens,
  now: number,
  options: TokenOptions = tokenDefaults
): Tokens | { readonly wait: number } => {
  const level = levelAt(self, now, options, 0)
  const at = now > self.at ? now : self.at
  if (level >= 1 - rounding) return { level: level > 1 ? level - 1 : 0, at }
  return { wait: at + Math.ceil((1 - rounding / 2 - level) * 1000 / options.perSecond) - now }
}

/** Five times 0.2 need not be exactly 1; it is a token all the same. */
const rounding = 1e-9

/**
 * Takes one token at once, even one that is still to come: `wait` tells in how many milliseconds it does (`Infinity`:
 * never). Those who reserve are thereby served in order; `refund` gives back what is not used.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const reserve = (
  self: Tokens,
  now: number,
  options: TokenOptions = tokenDefaults
): { readonly tokens: Tokens; readonly wait: number } => {
  const level = levelAt(self, now, options, 0) - 1
  const at = now > self.at ? now : self.at
  // five times a fifth is not always a whole
  const missing = level < -1e-9 ? -level : 0
  const wait = missing === 0 ? 0 : options.perSecond === 0 ? Infinity : Math.ceil(missing * 1_000 / options.perSecond)
  return { tokens: { level, at }, wait }
}

/**
 * Gives back tokens (one, if nothing else is said) that were reserved and are not needed.
 *
 * @since 0.1.0
 * @category retry tokens
 */
export const refund = (self: Tokens, options: TokenOptions = tokenDefaults, count = 1): Tokens => ({
  level: Math.min(options.cap, self.level + count),
  at: self.at
})

const levelAt = (self: Tokens, now: number, options: TokenOptions, extra: number): number => {
  const elapsed = now > self.at ? now - self.at : 0
  // nothing flows for ever: 0 per second over an infinite time is still 0
  const flowed = options.perSecond === 0 ? 0 : elapsed * options.perSecond / 1000
  return Math.min(options.cap, self.level + flowed + extra)
}

function millisOf(field: string, input: Duration.DurationInput): number {
  const millis = usableMillis(input)
  if (millis === undefined) {
    throw new RangeError(`RetryPolicy.${field} must be a duration that is not negative, got ${String(input)}`)
  }
  return millis
}

/** Milliseconds of anything that is a duration; `undefined` for what is none, is negative or `NaN`. */
function usableMillis(input: Duration.DurationInput | undefined): number | undefined {
  // `Duration` takes negative numbers and NaN for zero, and rounds fractions to nanoseconds
  if (typeof input === "number") return input >= 0 ? input : undefined
  if (typeof input === "bigint" && input < 0n) return undefined
  return Option.match(Duration.decodeUnknown(input), { onNone: () => undefined, onSome: Duration.toMillis })
}

function waitOfAnything(input: unknown): Duration.DurationInput | undefined {
  if (!Predicate.isObject(input)) return undefined
  // A pool says itself what binds the call; the fault beside it may speak of its key only.
  if ("waitMillis" in input && typeof input.waitMillis === "number") return input.waitMillis
  if ("waitMillis" in input && "startedAt" in input) return undefined
  if (
    "fault" in input && Predicate.hasProperty(input.fault, "waitMillis") && typeof input.fault.waitMillis === "number"
  ) {
    return input.fault.waitMillis
  }
  if (!("retryAfter" in input)) return undefined
  const { retryAfter } = input
  return typeof retryAfter === "number" || Duration.isDuration(retryAfter) ? retryAfter : undefined
}

function startOf(input: unknown): number | undefined {
  return Predicate.hasProperty(input, "startedAt") && typeof input.startedAt === "number" &&
      !Number.isNaN(input.startedAt)
    ? input.startedAt
    : undefined
}
