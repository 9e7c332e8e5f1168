/**
 * All the pool remembers of one key, and the gates that this alone can close.
 *
 * @since 0.1.0
 */
import type * as ApiKey from "./ApiKey.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as Fault from "./Fault.js"
import * as LearnedConcurrency from "./LearnedConcurrency.js"
import * as RateLimit from "./RateLimit.js"
import type * as Strategy from "./Strategy.js"

/**
 * What the pool remembers of one key. It is a `Strategy.Candidate`, so that strategies read it as it is.
 *
 * @since 0.1.0
 * @category models
 */
export interface KeyState extends Strategy.Candidate {
  readonly key: ApiKey.ApiKey
  readonly enabled: boolean
  /** Retired: it gets no new leases and leaves when its last one ends. */
  readonly retiring: boolean
  readonly successes: number
  readonly faults: number
  readonly ignored: number
  /** When it answered last, and when that attempt began. */
  readonly answeredAt: number
  readonly answeredFrom: number
  readonly breaker: CircuitBreaker.State
  readonly bench: Bench | undefined
  readonly ramp: Ramp | undefined
  /** Since when it has answered nothing: when its first attempt of those in flight began, or its last answer came. */
  readonly quietSince: number
  readonly stall: Stall | undefined
  /** How many attempts it lets run at once, as far as that was learned. */
  readonly concurrency: LearnedConcurrency.LearnedConcurrency | undefined
  /** Its limits for all models, if it is in no group. */
  readonly limits: RateLimit.RateLimit | undefined
  /** Where it stands among the gated keys: the instant it may open. `undefined` while it is eligible. */
  readonly gatedUntil: number | undefined
  /** The instant before which no event can open it: `-Infinity` if one may at any moment. */
  readonly gatedEarliest: number | undefined
  /** By which gate; `undefined` while it is eligible. */
  readonly gatedBy: GateName | undefined
}

/**
 * A key as it joins.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (key: ApiKey.ApiKey, slot: number): KeyState => ({
  slot,
  id: key.id,
  label: key.label,
  weight: key.weight,
  order: key.order,
  inFlight: 0,
  total: 0,
  recent: -Infinity,
  lastUsed: -Infinity,
  key,
  enabled: true,
  retiring: false,
  successes: 0,
  faults: 0,
  ignored: 0,
  answeredAt: -Infinity,
  answeredFrom: -Infinity,
  breaker: CircuitBreaker.initial,
  bench: undefined,
  ramp: undefined,
  quietSince: -Infinity,
  stall: undefined,
  concurrency: undefined,
  limits: key.quotaGroup === undefined ? RateLimit.declare(undefined, [key.limits]) : undefined,
  gatedUntil: undefined,
  gatedEarliest: undefined,
  gatedBy: undefined
})

/**
 * A key with other numbers, and the same in all else: each attempt makes two of these, and written out they cost a third
 * of a spread.
 *
 * @since 0.1.0
 * @category transitions
 */
export const numbered = (
  key: KeyState,
  inFlight: number,
  total: number,
  recent: number,
  lastUsed: number,
  successes: number,
  answeredAt: number,
  answeredFrom: number,
  quietSince: number,
  breaker: CircuitBreaker.State,
  limits: RateLimit.RateLimit | undefined
): KeyState => ({
  slot: key.slot,
  id: key.id,
  label: key.label,
  weight: key.weight,
  order: key.order,
  inFlight,
  total,
  recent,
  lastUsed,
  key: key.key,
  enabled: key.enabled,
  retiring: key.retiring,
  successes,
  faults: key.faults,
  ignored: key.ignored,
  answeredAt,
  answeredFrom,
  breaker,
  bench: key.bench,
  ramp: key.ramp,
  quietSince,
  stall: key.stall,
  concurrency: key.concurrency,
  limits,
  gatedUntil: key.gatedUntil,
  gatedEarliest: key.gatedEarliest,
  gatedBy: key.gatedBy
})

/**
 * The recent use of a key, see `Strategy.Candidate`, after one more attempt.
 *
 * @since 0.1.0
 * @category transitions
 */
export const used = (recent: number, now: number): number => {
  const attempt = now / halfLifeMillis
  const [less, more] = recent < attempt ? [recent, attempt] : [attempt, recent]
  return more + Math.log2(1 + 2 ** (less - more))
}

/**
 * About how long it took of late from one attempt to the next, in milliseconds; 0 if there were few.
 *
 * @since 0.1.0
 * @category getters
 */
export const usualMillis = ({ recent }: KeyState, now: number): number => {
  const attempts = 2 ** (recent - now / halfLifeMillis)
  return attempts < fewAttempts ? 0 : halfLifeMillis / Math.LN2 / attempts
}

const fewAttempts = 20

/** After so long, an attempt counts half as much among the recent ones. */
const halfLifeMillis = 60_000

/**
 * A cooldown of a key or a group, for all models or one. After a guessed one, a spent quota or a refused credential the
 * way back is one trial: nobody else gets the key until it is decided.
 *
 * @since 0.1.0
 * @category models
 */
export interface Bench {
  readonly kind: Fault.Kind
  readonly since: number
  readonly until: number
  readonly provenance: Fault.Provenance
  /** Until when more than a guess holds it: a told or measured wait, a spent quota, a refused credential. */
  readonly firm: number
  /** Whether a refusal that no wait mends (of the credential, of the permission, for lack of quota) is part of it. */
  readonly refused: boolean
  /** How many guessed cooldowns of this kind came in a row. */
  readonly step: number
  /** The newest lease when it was imposed: only the success of a later one lifts it. */
  readonly stamp: number
  readonly trial: { readonly lease: number; readonly since: number } | undefined
}

/**
 * The slow return of a key after a guess: it takes 1, 2, 4 … attempts at once, doubling with each success or step.
 *
 * @since 0.1.0
 * @category models
 */
export interface Ramp {
  readonly since: number
  readonly successes: number
}

/**
 * A key that has attempts in flight and answers nothing. An answer ends it; until then it gets one attempt at a time, when
 * none is in flight, or after a wait that doubles with each.
 *
 * @since 0.1.0
 * @category models
 */
export interface Stall {
  /** When it began, or its last attempt did. */
  readonly since: number
  /** The attempts that it got meanwhile. */
  readonly tries: number
}

/**
 * Why a key may not serve now.
 *
 * @since 0.1.0
 * @category models
 */
export type GateName =
  | "retired"
  | "disabled"
  | "concurrency"
  | "breaker"
  | "cooldown"
  | "probing"
  | "ramp"
  | "stalled"
  | "limit"
  | "model"
  | "provider"
  | "group"

/**
 * A gate that is closed.
 *
 * @since 0.1.0
 * @category models
 */
export interface Closed {
  readonly gate: GateName
  /** When it opens by itself; `Infinity` when it does not. */
  readonly until: number
  /** Before when no event (an attempt that ends, a probe that is decided) can open it. */
  readonly earliest: number
  /** From when on only a guess holds it, so that the floor may break it; `Infinity`: never. */
  readonly breakableAt: number
  readonly fault: Fault.Kind | undefined
}

/**
 * Two gates that must both open.
 *
 * @since 0.1.0
 * @category combinators
 */
export const both = (a: Closed | undefined, b: Closed | undefined): Closed | undefined => {
  if (a === undefined) return b
  if (b === undefined) return a
  const { fault, gate, until } = b.until > a.until ? b : a
  return {
    gate,
    fault,
    until,
    earliest: Math.max(a.earliest, b.earliest),
    breakableAt: Math.max(a.breakableAt, b.breakableAt)
  }
}

/**
 * A gate that is closed until an instant.
 *
 * @since 0.1.0
 * @category constructors
 */
export const closed = (
  gate: GateName,
  until: number,
  marks: { readonly earliest?: number; readonly breakableAt?: number; readonly fault?: Fault.Kind } = {}
): Closed => ({
  gate,
  until,
  earliest: marks.earliest ?? until,
  breakableAt: marks.breakableAt ?? Infinity,
  fault: marks.fault
})

/**
 * What gates need to know of the settings.
 *
 * @since 0.1.0
 * @category models
 */
export interface GateSettings {
  readonly breaker: CircuitBreaker.Options
  /** How long an undecided trial holds a key back. */
  readonly trialMillis: number
  readonly rampStepMillis: number
  readonly rampMillis: number
}

/**
 * The gates of the key itself, in order: each looks at one reason. The list is open at its end for more reasons.
 *
 * @since 0.1.0
 * @category gates
 */
export const gates: ReadonlyArray<(settings: GateSettings, key: KeyState, now: number) => Closed | undefined> = [
  (_, key) => key.retiring ? closed("retired", Infinity) : key.enabled ? undefined : closed("disabled", Infinity),
  (_, key) => isRoomy(key) ? undefined : closed("concurrency", Infinity, { earliest: -Infinity }),
  (_, { concurrency, inFlight }, now) =>
    concurrency === undefined || inFlight < LearnedConcurrency.most(concurrency, now)
      ? undefined
      : closed("concurrency", LearnedConcurrency.forgottenAt(concurrency), { earliest: -Infinity }),
  (settings, key, now) => breakerGate(settings.breaker, key.breaker, now),
  (settings, key, now) => benchGate(settings, key.bench, now),
  (settings, key, now) => rampGate(settings, key, now),
  (settings, key, now) => stallGate(settings, key, now),
  (_, key, now) => limitGate(key.limits, undefined, now)
]

/**
 * All gates of the key itself; `undefined` when it may serve.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (settings: GateSettings, key: KeyState, now: number): Closed | undefined =>
  isPlain(key) ? undefined : gates.reduce<Closed | undefined>(
    (closedBy, look) => both(closedBy, look(settings, key, now)),
    undefined
  )

/**
 * Whether nothing at all is remembered against the key: the usual case, decided without looking at each gate.
 *
 * @since 0.1.0
 * @category gates
 */
export const isPlain = (key: KeyState): boolean =>
  isWell(key) && key.key.limits.concurrency === undefined && key.limits === undefined

/**
 * Whether nothing at all is remembered against the key, but for limits that it may have.
 *
 * @since 0.1.0
 * @category gates
 */
export const isWell = (key: KeyState): boolean =>
  key.bench === undefined && key.ramp === undefined && key.stall === undefined && key.breaker._tag === "Closed" &&
  key.enabled && !key.retiring && key.concurrency === undefined

/**
 * Whether the limits of a key that is well let it serve.
 *
 * @since 0.1.0
 * @category gates
 */
export const isWithinLimits = (key: KeyState, now: number): boolean =>
  isRoomy(key) && (key.limits === undefined || RateLimit.gate(key.limits, undefined, now) === undefined)

/** Whether fewer attempts are in flight than may be. */
const isRoomy = (key: KeyState): boolean => key.inFlight < (key.key.limits.concurrency ?? Infinity)

const breakerGate = (options: CircuitBreaker.Options, state: CircuitBreaker.State, now: number): Closed | undefined => {
  if (state._tag === "Closed") return undefined
  const admits = CircuitBreaker.admits(options, state, now)
  if (typeof admits === "string") return undefined
  return state._tag === "HalfOpen"
    ? closed("probing", admits.until, { earliest: -Infinity })
    : closed("breaker", admits.until, { breakableAt: Number.isFinite(admits.until) ? -Infinity : Infinity })
}

/**
 * What a bench holds back.
 *
 * @since 0.1.0
 * @category gates
 */
export const benchGate = (
  settings: { readonly trialMillis: number },
  bench: Bench | undefined,
  now: number
): Closed | undefined => {
  if (bench === undefined) return undefined
  if (now < bench.until) {
    const breakableAt = bench.firm < bench.until ? bench.firm : Infinity
    return closed("cooldown", bench.until, { breakableAt, fault: bench.kind })
  }
  return bench.trial === undefined || now >= bench.trial.since + settings.trialMillis
    ? undefined
    : closed("probing", bench.trial.since + settings.trialMillis, { earliest: -Infinity, fault: bench.kind })
}

/**
 * What limits hold back: of requests, and if the tokens of a request are given, of tokens.
 *
 * @since 0.1.0
 * @category gates
 */
export const limitGate = (
  limits: RateLimit.RateLimit | undefined,
  tokens: RateLimit.Estimate | undefined,
  now: number
): Closed | undefined => {
  const full = limits === undefined ? undefined : RateLimit.gate(limits, tokens, now)
  return full === undefined ? undefined : closed("limit", full.until, { earliest: full.earliest })
}

/** No guess: the floor lets no call through to a key without quota, or one that is refused. */
const neverBroken: Partial<Record<Fault.Kind, true>> = { QuotaExhausted: true, Unauthorized: true, Forbidden: true }

/**
 * Whether the way back from a bench is a single trial: always, except after a wait that the server told.
 *
 * @since 0.1.0
 * @category gates
 */
export const needsTrial = (bench: Bench): boolean => bench.provenance === "guessed" || bench.refused

/**
 * Takes the trial of a bench that has ended, if it needs one.
 *
 * @since 0.1.0
 * @category transitions
 */
export const takeTrial = (bench: Bench | undefined, lease: number, now: number): Bench | undefined =>
  bench === undefined || !needsTrial(bench) ? bench : { ...bench, trial: { lease, since: now } }

/**
 * Gives back the trial that a lease held, undecided.
 *
 * @since 0.1.0
 * @category transitions
 */
export const freeTrial = (bench: Bench | undefined, lease: number): Bench | undefined =>
  bench?.trial?.lease === lease ? { ...bench, trial: undefined } : bench

/**
 * A new cooldown on top of what there is: waits merge by maximum, so that none is ever shortened.
 *
 * @since 0.1.0
 * @category transitions
 */
export const impose = (bench: Bench | undefined, next: Omit<Bench, "trial" | "firm" | "refused">): Bench => {
  const refuses = next.kind in neverBroken
  const refused = refuses || bench?.refused === true
  const isFirm = next.provenance !== "guessed" || refuses
  const firm = Math.max(bench?.firm ?? -Infinity, isFirm ? next.until : -Infinity)
  if (bench === undefined || bench.until <= next.until) return { ...next, firm, refused, trial: undefined }
  const step = bench.kind === next.kind ? Math.max(bench.step, next.step) : bench.step
  return { ...bench, firm, refused, step, stamp: next.stamp, trial: undefined }
}

/**
 * What the success of a lease leaves of a bench: nothing, if the lease was admitted after it was imposed and the bench
 * is over (or the lease broke it on purpose, as the floor does).
 *
 * @since 0.1.0
 * @category transitions
 */
export const lift = (
  bench: Bench | undefined,
  lease: { readonly id: number; readonly floor: boolean },
  now: number
): Bench | undefined =>
  bench !== undefined && lease.id > bench.stamp && (now >= bench.until || lease.floor) ? undefined : bench

const rampGate = (settings: GateSettings, key: KeyState, now: number): Closed | undefined => {
  const ramp = key.ramp
  if (ramp === undefined || now >= ramp.since + settings.rampMillis) return undefined
  const steps = Math.floor((now - ramp.since) / settings.rampStepMillis)
  return key.inFlight < 2 ** (ramp.successes + steps)
    ? undefined
    : closed("ramp", Math.min(ramp.since + (steps + 1) * settings.rampStepMillis, ramp.since + settings.rampMillis), {
      earliest: -Infinity
    })
}

const stallGate = ({ trialMillis }: GateSettings, { inFlight, stall }: KeyState, now: number): Closed | undefined => {
  if (stall === undefined || inFlight === 0) return undefined
  const until = stall.since + trialMillis * 2 ** Math.min(stall.tries, 4)
  return now >= until ? undefined : closed("stalled", until, { earliest: -Infinity })
}
