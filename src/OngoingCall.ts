/**
 * What the attempts of one call share: its number, its limits in time, its trail.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import type * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Tracer from "effect/Tracer"
import * as Affinity from "./Affinity.js"
import type * as CallOptions from "./CallOptions.js"
import { attemptsIn, DeadlineExceeded, emptyTrail, isPoolError, type Trail } from "./KeymeshError.js"
import type * as Latency from "./Latency.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolSettings from "./PoolSettings.js"
import type * as PoolState from "./PoolState.js"
import type * as RateLimit from "./RateLimit.js"

/**
 * @since 0.1.0
 * @category models
 */
export interface OngoingCall {
  /** Its number, once it has one. */
  readonly number: MutableRef.MutableRef<number>
  readonly clock: Clock.Clock
  readonly startedAt: number
  readonly budgetMillis: number
  readonly budgetEnd: number
  readonly maxWaitMillis: number
  /** When its caller must have an answer; `Infinity`: whenever. */
  readonly deadlineEnd: number
  readonly model: string | undefined
  readonly tokens: RateLimit.Estimate | undefined
  readonly operation: string | undefined
  readonly replayable: boolean | "never"
  readonly priority: PoolState.Priority | undefined
  /** What its attempts are like; absent for those that may not be sent again, of which no two need be alike. */
  readonly timed: Latency.Kind | undefined
  /** Whether a second attempt may run beside its first, and after how long; without that, when it is learned. */
  readonly hedge: PoolSettings.Hedge | undefined
  /** Where it would rather be; absent: anywhere. */
  readonly affinity: Affinity.Wish | undefined
  readonly trail: MutableRef.MutableRef<Trail>
  /** Whether somebody has asked for the trail, whatever becomes of the call. */
  readonly trailed: boolean
}

/**
 * A call that begins now: `own` is what it says of itself, `given` what is said around it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  { settings }: Pick<PoolCore.PoolCore, "settings">,
  given: CallOptions.Settings,
  own: {
    readonly model?: string | undefined
    readonly tokens?: RateLimit.Estimate | undefined
    readonly operation?: string | undefined
    readonly replayable?: boolean | "never" | undefined
    readonly priority?: PoolState.Priority | undefined
    readonly streaming?: boolean | undefined
    readonly affinity?: string | undefined
    readonly resources?: ReadonlyArray<string> | undefined
    readonly trail?: MutableRef.MutableRef<Trail> | undefined
  },
  clock: Clock.Clock
): OngoingCall => {
  const now = MonotonicTime.nowOf(clock)
  const budgetMillis = given.budget === undefined ? settings.budgetMillis : Duration.toMillis(given.budget)
  const model = own.model ?? given.model
  const replayable = own.replayable ?? given.replayable ?? true
  return {
    number: MutableRef.make(0),
    clock,
    startedAt: now,
    budgetMillis,
    budgetEnd: now + budgetMillis,
    maxWaitMillis: (given.maxWait === undefined ? settings.maxWaitMillis : Duration.toMillis(given.maxWait)) ??
      Infinity,
    deadlineEnd: now + (deadlineOf(settings, given) ?? Infinity),
    model,
    tokens: given.tokens ?? own.tokens,
    operation: own.operation,
    replayable,
    priority: own.priority ?? given.priority,
    timed: replayable !== true
      ? undefined
      : model === undefined && own.streaming !== true
      ? anyKind
      : { model, streaming: own.streaming === true },
    hedge: replayable === true && (own.resources ?? noResources).length === 0 ? hedgeOf(settings, given) : undefined,
    affinity: wishOf(own.affinity ?? given.affinity, own.resources ?? noResources),
    trail: own.trail ?? MutableRef.make(emptyTrail),
    trailed: own.trail !== undefined || given.trails !== undefined
  }
}

const hedgeOf = (
  { hedge }: PoolCore.PoolCore["settings"],
  { hedge: own }: CallOptions.Settings
): PoolSettings.Hedge | undefined => {
  if (own === undefined) return hedge
  if (typeof own === "boolean") return own ? hedge ?? PoolSettings.learnedHedge : undefined
  return own.delay === undefined ? PoolSettings.learnedHedge : { delayMillis: Duration.toMillis(own.delay) }
}

const wishOf = (conversation: string | undefined, resources: ReadonlyArray<string>): Affinity.Wish | undefined =>
  conversation === undefined && resources.length === 0
    ? undefined
    : {
      conversation: conversation === undefined ? undefined : Affinity.nameOf(conversation),
      resources: resources.map(Affinity.nameOf)
    }

/**
 * Attempts that name no model and ask for no stream.
 *
 * @since 0.1.0
 * @category constants
 */
export const anyKind: Latency.Kind = { model: undefined, streaming: false }

const noResources: ReadonlyArray<string> = []

/**
 * Until when a call may wait for a key, if it begins to wait at `now`.
 *
 * @since 0.1.0
 * @category getters
 */
export const waitUntil = (call: OngoingCall, now: number): number =>
  // At its end a deadline speaks for itself, and not as a wait that is over.
  Math.min(call.budgetEnd, now + call.maxWaitMillis, call.deadlineEnd + 1)

const deadlineOf = (settings: PoolCore.PoolCore["settings"], given: CallOptions.Settings): number | undefined =>
  given.deadline === undefined ? settings.deadlineMillis : Duration.toMillis(given.deadline)

/**
 * Interrupts what runs for a call when its caller must have an answer.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withDeadline = <A, E, R>(
  { config, settings }: PoolCore.PoolCore,
  effect: Effect.Effect<A, E, R>,
  call: OngoingCall,
  given: CallOptions.Settings
): Effect.Effect<A, E | DeadlineExceeded, R> => {
  const deadline = deadlineOf(settings, given)
  return deadline === undefined ? effect : Effect.timeoutFail(effect, {
    duration: deadline,
    onTimeout: () =>
      new DeadlineExceeded({
        pool: config.pool,
        deadline: Duration.millis(deadline),
        trail: MutableRef.get(call.trail)
      })
  })
}

/**
 * Tells how a call ended, once per call; `context` is that of its caller.
 *
 * @since 0.1.0
 * @category events
 */
export const ended = (
  { config, telemetry }: PoolCore.PoolCore,
  call: OngoingCall,
  exit: Exit.Exit<unknown, unknown>,
  context: Context.Context<never>
): Effect.Effect<void> => {
  const parent = spanOf(context)
  const trail = MutableRef.get(call.trail)
  const now = MonotonicTime.nowOf(call.clock)
  return telemetry.publish([{
    _tag: "call.end",
    pool: config.pool,
    at: now,
    call: MutableRef.get(call.number),
    ...(call.model === undefined ? {} : { model: call.model }),
    ...(call.operation === undefined ? {} : { operation: call.operation }),
    outcome: endOf(exit, trail),
    attempts: attemptsIn(trail),
    durationMillis: now - call.startedAt,
    trail,
    ...(parent === undefined ? {} : { parent })
  }])
}

/** The span around a call, as plain data; one that is not to be told of stands for the one around it. */
const spanOf = (
  context: Context.Context<never>
): { readonly traceId: string; readonly spanId: string; readonly sampled: boolean } | undefined => {
  let span = Option.getOrUndefined(Context.getOption(context, Tracer.ParentSpan))
  while (span !== undefined && Context.get(span.context, Tracer.DisablePropagation)) {
    span = span._tag === "Span" ? Option.getOrUndefined(span.parent) : undefined
  }
  return span === undefined ? undefined : { traceId: span.traceId, spanId: span.spanId, sampled: span.sampled }
}

/** How a call ended, in one word. */
const endOf = (exit: Exit.Exit<unknown, unknown>, trail: Trail): string => {
  // What is a value to the caller may be a fault to the pool.
  const last = trail.entries[trail.entries.length - 1]?.outcome
  if (Exit.isSuccess(exit)) return last ?? "success"
  const error = Option.getOrUndefined(Cause.failureOption(exit.cause))
  if (isPoolError(error)) return error._tag
  return error === undefined ? "ignored" : last ?? "ignored"
}
