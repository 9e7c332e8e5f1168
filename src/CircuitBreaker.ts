/**
 * The circuit breaker: a state machine as pure functions, and a service that holds it in a `Ref`.
 *
 * - `Closed`: calls run. It opens after `threshold` failures in a row, or when failures prevail in the recent window.
 * - `Open`: calls are refused until the cooldown is over. Nothing happens by itself at that moment: the state stays
 *   `Open` until the next call asks.
 * - `HalfOpen`: one call, the probe, runs; the others are refused. A good answer closes the circuit, a bad one opens it
 *   again for longer. A probe that is interrupted, or undecided for too long, frees its place for the next call.
 *
 * Every admission carries the generation of the state that gave it. The generation grows with each transition and each
 * probe, and an outcome from an earlier generation changes nothing: neither does a late success close a circuit, nor a
 * late failure open one.
 *
 * The cooldown grows with every opening in a row. A good probe alone does not reset it: the circuit must then see
 * `threshold` successes in a row while it stays closed. So a dependency that flaps is left alone for longer and longer.
 *
 * The pure functions take `now` in milliseconds of any clock that does not run backwards, always the same one; every
 * time in a state is of that clock.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Data from "effect/Data"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as PubSub from "effect/PubSub"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import type { ConfigurationError } from "./KeymeshError.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as Checks from "./Settings.js"

/**
 * When failures trip the circuit although they do not come in a row.
 *
 * @since 0.1.0
 * @category models
 */
export interface RateOptions {
  /** The share of failures that trips, in (0, 1]. */
  readonly faults: number
  /** How many outcomes the window must hold before the share means anything. */
  readonly minimumCalls: number
  /** How far back outcomes count, in milliseconds; see `Window` for how exactly. */
  readonly windowMillis: number
  /** How many times the siblings' share of failures it must be, where siblings are given. */
  readonly siblingFactor: number
}

/**
 * The checked settings of a breaker, in milliseconds. `settings` makes them.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options {
  /** How many failures in a row trip; also how many successes in a row reset the growth of the cooldown. */
  readonly threshold: number
  /** How long the first opening lasts. */
  readonly cooldownMillis: number
  /** By how much each further opening in a row lasts longer; 1 keeps the cooldown as it is. */
  readonly cooldownFactor: number
  /** The longest an opening lasts. */
  readonly maxCooldownMillis: number
  /** After how long an undecided probe gives up its place. */
  readonly probeTimeoutMillis: number
  /** The trip by rate; `undefined` when there is none. */
  readonly rate: RateOptions | undefined
}

const defaultRate: RateOptions = { faults: 0.5, minimumCalls: 10, windowMillis: 30_000, siblingFactor: 3 }

/**
 * The defaults: 3 failures in a row, a cooldown of 30 seconds that doubles up to 5 minutes, 30 seconds for a probe, and
 * a trip at 50 % failures of at least 10 outcomes in 30 seconds, if that is 3 times the siblings' share.
 *
 * @since 0.1.0
 * @category constructors
 */
export const defaultOptions: Options = {
  threshold: 3,
  cooldownMillis: 30_000,
  cooldownFactor: 2,
  maxCooldownMillis: 300_000,
  probeTimeoutMillis: 30_000,
  rate: defaultRate
}

/**
 * What people write; everything left out gets its default.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings {
  /** How many failures in a row trip (default 3, at least 1). */
  readonly threshold?: number | undefined
  /** How long the first opening lasts (default 30 seconds). */
  readonly cooldown?: Duration.DurationInput | undefined
  /** By how much each further opening lasts longer (default 2, at least 1; 1 keeps the cooldown fixed). */
  readonly cooldownFactor?: number | undefined
  /** The longest an opening lasts (default 5 minutes, or `cooldown` if that is longer). */
  readonly maxCooldown?: Duration.DurationInput | undefined
  /** After how long an undecided probe gives up its place (default 30 seconds). */
  readonly probeTimeout?: Duration.DurationInput | undefined
  /** The trip by rate; `false` turns it off. */
  readonly rate?: RateSettings | false | undefined
}

/**
 * The trip by rate, as people write it; everything left out gets its default.
 *
 * @since 0.1.0
 * @category models
 */
export interface RateSettings {
  /** The share of failures that trips, in (0, 1] (default 0.5). */
  readonly faults?: number | undefined
  /** How many outcomes the window must hold (default 10, at least 1). */
  readonly minimumCalls?: number | undefined
  /** How far back outcomes count (default 30 seconds). */
  readonly window?: Duration.DurationInput | undefined
  /** How many times the siblings' share it must be (default 3; 0 does not compare). */
  readonly siblingFactor?: number | undefined
}

/**
 * Checks settings and fills in the defaults. A wrong value, or a field that does not exist, is refused by name; `path`
 * goes before the name when the settings are part of larger ones.
 *
 * @example
 * ```ts
 * import * as CircuitBreaker from "effect-keymesh/CircuitBreaker"
 *
 * CircuitBreaker.settings({ cooldown: "10 seconds", rate: false }) // Either.right(...)
 * CircuitBreaker.settings({ threshold: 0 }) // Either.left(ConfigurationError { field: "threshold", ... })
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const settings = (input: Settings = {}, path = ""): Either.Either<Options, ConfigurationError> =>
  Either.gen(function*() {
    const at = (field: string) => path === "" ? field : `${path}.${field}`
    yield* Checks.refuseUnknown(input, settingNames, path)
    const threshold = yield* Checks.integer(input.threshold ?? defaultOptions.threshold, at("threshold"), 1)
    const cooldownMillis = yield* finiteMillis(input.cooldown ?? defaultOptions.cooldownMillis, at("cooldown"))
    const cooldownFactor = yield* Checks.finite(
      input.cooldownFactor ?? defaultOptions.cooldownFactor,
      at("cooldownFactor")
    )
    if (cooldownFactor < 1) return yield* Checks.refuse(at("cooldownFactor"), "must be at least 1")
    const maxCooldownMillis = yield* finiteMillis(
      input.maxCooldown ?? Math.max(defaultOptions.maxCooldownMillis, cooldownMillis),
      at("maxCooldown")
    )
    if (maxCooldownMillis < cooldownMillis) {
      return yield* Checks.refuse(at("maxCooldown"), "must not be less than `cooldown`")
    }
    const probeTimeoutMillis = yield* positiveMillis(
      input.probeTimeout ?? defaultOptions.probeTimeoutMillis,
      at("probeTimeout")
    )
    const rate = input.rate === false ? undefined : yield* rateOf(input.rate ?? {}, at("rate"))
    return { threshold, cooldownMillis, cooldownFactor, maxCooldownMillis, probeTimeoutMillis, rate }
  })

/**
 * How many outcomes counted, and how many of them were failures.
 *
 * @since 0.1.0
 * @category models
 */
export interface Counts {
  readonly calls: number
  readonly faults: number
}

/**
 * The outcomes of the recent past, in two buckets of half a window each: the one that fills now and the one before. It
 * thus looks back at least half a window and never further than a whole one, for the price of four numbers. The buckets
 * lie on a fixed grid of the clock, so windows of the same length can be added and subtracted.
 *
 * @since 0.1.0
 * @category models
 */
export interface Window {
  /** Which half-window of the clock fills now. */
  readonly bucket: number
  readonly calls: number
  readonly faults: number
  readonly previousCalls: number
  readonly previousFaults: number
}

/**
 * A window without outcomes.
 *
 * @since 0.1.0
 * @category constructors
 */
export const emptyWindow: Window = { bucket: 0, calls: 0, faults: 0, previousCalls: 0, previousFaults: 0 }

/**
 * Adds one outcome to a window.
 *
 * @since 0.1.0
 * @category combinators
 */
export const observe = (window: Window, now: number, windowMillis: number, fault: boolean): Window => {
  const bucket = bucketAt(now, windowMillis)
  const turned = bucket - window.bucket
  return {
    bucket: turned > 0 ? bucket : window.bucket,
    calls: filling(turned, window.calls) + 1,
    faults: filling(turned, window.faults) + (fault ? 1 : 0),
    previousCalls: previous(turned, window.calls, window.previousCalls),
    previousFaults: previous(turned, window.faults, window.previousFaults)
  }
}

/**
 * What a window holds at a moment.
 *
 * @since 0.1.0
 * @category getters
 */
export const counts = (window: Window, now: number, windowMillis: number): Counts => {
  const turned = bucketAt(now, windowMillis) - window.bucket
  return {
    calls: filling(turned, window.calls) + previous(turned, window.calls, window.previousCalls),
    faults: filling(turned, window.faults) + previous(turned, window.faults, window.previousFaults)
  }
}

/**
 * Calls run. It is also the window of its generation, in one object because every success makes a new one.
 *
 * @since 0.1.0
 * @category models
 */
export interface Closed extends Window {
  readonly _tag: "Closed"
  /** Failures in a row. */
  readonly failures: number
  /** Successes in a row since it closed, as long as `trips` is not back at 0. */
  readonly successes: number
  /** Grows with every transition and every probe. */
  readonly generation: number
  /** Openings in a row that the next one adds to; 0 once it has proven itself. */
  readonly trips: number
}

/**
 * Calls are refused until `until`; `Infinity` when it is isolated.
 *
 * @since 0.1.0
 * @category models
 */
export interface Open {
  readonly _tag: "Open"
  readonly until: number
  readonly openedAt: number
  readonly generation: number
  /** Openings in a row, this one included. */
  readonly trips: number
}

/**
 * One call at a time is tried. Without a `probe` the next call becomes it.
 *
 * @since 0.1.0
 * @category models
 */
export interface HalfOpen {
  readonly _tag: "HalfOpen"
  readonly probe: Probe | undefined
  readonly generation: number
  readonly trips: number
}

/**
 * Who has the probe, and since when.
 *
 * @since 0.1.0
 * @category models
 */
export interface Probe {
  readonly id: number
  readonly since: number
}

/**
 * Where a breaker stands, told apart by `_tag`.
 *
 * @since 0.1.0
 * @category models
 */
export type State = Closed | Open | HalfOpen

/**
 * Closed, and nothing known.
 *
 * @since 0.1.0
 * @category constructors
 */
export const initial: State = closed(0, 0, 0)

/**
 * What a call says about the dependency.
 *
 * - `success`: it works.
 * - `failure`: it does not.
 * - `alive`: it refused this call, but it answers (a rate limit, a bad request). That closes the circuit when the probe
 *   hears it, and otherwise neither counts as a failure nor ends a row of them.
 * - `ignored`: the call says nothing, because it was interrupted. If it was the probe, the next call may be it at once.
 *
 * @since 0.1.0
 * @category models
 */
export type Outcome = "success" | "failure" | "alive" | "ignored"

/**
 * The right to make one call; `record` wants it back with the outcome.
 *
 * @since 0.1.0
 * @category models
 */
export interface Admission {
  readonly generation: number
  readonly leaseId: number
  readonly probe: boolean
}

/**
 * No admission before `until`: the end of the cooldown, or the latest moment at which the running probe gives up its
 * place. `Infinity` when the circuit is isolated.
 *
 * @since 0.1.0
 * @category models
 */
export interface Refusal {
  readonly until: number
}

/**
 * From when on a call is admitted: `-Infinity` when that is already so, whatever the time.
 *
 * @since 0.1.0
 * @category getters
 */
export const opensAt = (options: Options, state: State): number => {
  switch (state._tag) {
    case "Closed":
      return -Infinity
    case "Open":
      return state.until
    case "HalfOpen":
      return state.probe === undefined ? -Infinity : state.probe.since + options.probeTimeoutMillis
  }
}

/**
 * Whether a call would be admitted, as a usual call or as the probe, or until when not. Changes nothing.
 *
 * @since 0.1.0
 * @category getters
 */
export const admits = (options: Options, state: State, now: number): "yes" | "probe" | Refusal => {
  if (state._tag === "Closed") return "yes"
  const until = opensAt(options, state)
  return now >= until ? "probe" : { until }
}

/**
 * Admits a call if `admits` says so. `leaseId` names the call; it need only differ among calls that run at the same
 * time.
 *
 * @example
 * ```ts
 * import * as CircuitBreaker from "effect-keymesh/CircuitBreaker"
 *
 * const options = CircuitBreaker.defaultOptions
 * const [admission, admitted] = CircuitBreaker.admit(options, CircuitBreaker.initial, 0, 1)
 * const next = admission === undefined
 *   ? admitted
 *   : CircuitBreaker.record(options, admitted, 250, admission, "success")
 * ```
 *
 * @since 0.1.0
 * @category transitions
 */
export const admit = (
  options: Options,
  state: State,
  now: number,
  leaseId: number
): readonly [Admission | undefined, State] => {
  switch (admits(options, state, now)) {
    case "yes":
      return [{ generation: state.generation, leaseId, probe: false }, state]
    case "probe": {
      const taken = takeProbe(state, now, leaseId)
      return [{ generation: taken.generation, leaseId, probe: true }, taken]
    }
    default:
      return [undefined, state]
  }
}

/**
 * Gives the probe to a call, whatever the state and the time: for callers that asked `admits` themselves, or that mean
 * to try a circuit early. Its admission is `{ generation: state.generation, leaseId, probe: true }` of the new state.
 *
 * @since 0.1.0
 * @category transitions
 */
export const takeProbe = (state: State, now: number, leaseId: number): HalfOpen => ({
  _tag: "HalfOpen",
  probe: { id: leaseId, since: now },
  // A new generation for each probe: what an earlier probe still says is then as late as any other old outcome.
  generation: state.generation + 1,
  trips: state.trips
})

/**
 * What `record` may know beside the outcome. Only failures read it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Evidence {
  /**
   * The outcomes of the other keys in the same window. The trip by rate needs a share of failures well above theirs; it
   * does not happen when they have no outcomes. Left out, the share alone decides.
   */
  readonly siblings?: Counts | undefined
  /**
   * Whether a closed circuit may open (default `true`). If not, failures go on counting, and it opens at the next one
   * for which it may. A failed probe always opens it again.
   */
  readonly mayOpen?: boolean | undefined
}

/**
 * Takes in the outcome of an admitted call. Returns the very same state when nothing changes; compare with `transition`
 * to see whether the circuit opened or closed.
 *
 * @since 0.1.0
 * @category transitions
 */
export const record = (
  options: Options,
  state: State,
  now: number,
  admission: Admission,
  outcome: Outcome,
  evidence?: Evidence
): State => {
  if (admission.generation !== state.generation) return state
  switch (state._tag) {
    case "Closed":
      switch (outcome) {
        case "success":
          return succeeded(options, state, now)
        case "failure":
          return failed(options, state, now, evidence)
        default:
          return state
      }
    case "HalfOpen":
      return state.probe !== undefined && admission.probe && state.probe.id === admission.leaseId
        ? probed(options, state, now, outcome)
        : state
    case "Open":
      return state
  }
}

/**
 * Opens the circuit until `reset`, without a probe; what runs may end, and changes nothing.
 *
 * @since 0.1.0
 * @category transitions
 */
export const isolate = (state: State, now: number): State =>
  state._tag === "Open" && state.until === Infinity
    ? state
    : { _tag: "Open", until: Infinity, openedAt: now, generation: state.generation + 1, trips: state.trips }

/**
 * Closes the circuit and forgets its failures and openings. What runs changes nothing any more.
 *
 * @since 0.1.0
 * @category transitions
 */
export const reset = (state: State): State => closed(state.generation + 1, 0, 0)

/**
 * Takes back `faults` failures that turned out to be somebody else's: as far as they still count, and the opening that
 * they led to, if the circuit opened at `since` or later. Isolated circuits stay so.
 *
 * @since 0.1.0
 * @category transitions
 */
export const refund = (state: State, faults: number, since: number): State => {
  switch (state._tag) {
    case "Closed": {
      const recent = Math.min(faults, state.faults)
      const older = Math.min(faults - recent, state.previousFaults)
      return {
        ...state,
        failures: Math.max(0, state.failures - faults),
        calls: state.calls - recent,
        faults: state.faults - recent,
        previousCalls: state.previousCalls - older,
        previousFaults: state.previousFaults - older
      }
    }
    case "Open":
      return state.openedAt >= since && state.until !== Infinity
        ? closed(state.generation + 1, 0, state.trips - 1)
        : state
    case "HalfOpen":
      return faults > 0 ? closed(state.generation + 1, 0, Math.max(0, state.trips - 1)) : state
  }
}

/**
 * How long an opening lasts, in milliseconds, when it is the `trips`-th in a row.
 *
 * @since 0.1.0
 * @category getters
 */
export const cooldownMillis = (options: Options, trips: number): number =>
  // 0 × Infinity is NaN, hence the first case.
  options.cooldownMillis === 0
    ? 0
    : Math.min(options.maxCooldownMillis, options.cooldownMillis * Math.pow(options.cooldownFactor, trips - 1))

/**
 * A change of the state's tag. `generation` grows strictly from one transition of a circuit to the next.
 *
 * @since 0.1.0
 * @category models
 */
export interface Transition {
  readonly from: State["_tag"]
  readonly to: State["_tag"]
  /** When, in milliseconds of the breaker's clock. */
  readonly at: number
  readonly generation: number
  /** Openings in a row. */
  readonly trips: number
  /** Until when it refuses calls, if it opened; `Infinity` when it was isolated. */
  readonly until: number | undefined
}

/**
 * The transition between a state and the one made from it, if its tag changed.
 *
 * @since 0.1.0
 * @category getters
 */
export const transition = (before: State, after: State, now: number): Transition | undefined =>
  before._tag === after._tag ? undefined : {
    from: before._tag,
    to: after._tag,
    at: now,
    generation: after.generation,
    trips: after.trips,
    until: after._tag === "Open" ? after.until : undefined
  }

const count = Schema.Number.pipe(Schema.int(), Schema.nonNegative())
/** That it never goes back tells an older transition from a newer one; absent: 0. */
const generation = Schema.optionalWith(count, { exact: true })

/**
 * What outlives a process. Times are of the wall clock, in milliseconds since the epoch; probe and window belong to the
 * process and are not kept.
 *
 * @since 0.1.0
 * @category persistence
 */
export const Stored = Schema.Union(
  Schema.TaggedStruct("Closed", { failures: count, trips: count, generation }),
  Schema.TaggedStruct("Open", {
    until: Schema.Number.pipe(Schema.finite()),
    /** How long the opening was meant to last, from its beginning. */
    waitMillis: Schema.Number.pipe(Schema.finite(), Schema.nonNegative()),
    trips: count,
    generation
  }),
  Schema.TaggedStruct("Isolated", { trips: count, generation })
)

/**
 * @since 0.1.0
 * @category persistence
 */
export type Stored = typeof Stored.Type

/**
 * What to keep of a state. `wallOffset` is what must be added to the breaker's clock to get milliseconds since the
 * epoch. A half-open circuit is kept as one whose cooldown is over: whoever loads it starts with a probe.
 *
 * @since 0.1.0
 * @category persistence
 */
export const toStored = (state: State, now: number, wallOffset: number): Stored => {
  const { generation, trips } = state
  switch (state._tag) {
    case "Closed":
      return { _tag: "Closed", failures: state.failures, trips, generation }
    case "HalfOpen":
      return { _tag: "Open", until: now + wallOffset, waitMillis: 0, trips, generation }
    case "Open":
      return state.until === Infinity
        ? { _tag: "Isolated", trips, generation }
        : {
          _tag: "Open",
          until: state.until + wallOffset,
          waitMillis: Math.max(0, state.until - state.openedAt),
          trips,
          generation
        }
  }
}

/**
 * The state that was kept. What remains of a cooldown is never longer than the whole of it was, however the wall clock
 * was changed in between. `before` must be greater than the generation of any state it replaces.
 *
 * @since 0.1.0
 * @category persistence
 */
export const fromStored = (stored: Stored, now: number, wallOffset: number, before = 0): State => {
  const generation = Math.max(before, stored.generation ?? 0)
  switch (stored._tag) {
    case "Closed":
      return closed(generation, stored.failures, stored.trips)
    case "Isolated":
      return { _tag: "Open", until: Infinity, openedAt: now, generation, trips: stored.trips }
    case "Open": {
      const remaining = Math.min(Math.max(0, stored.until - wallOffset - now), stored.waitMillis)
      const until = now + remaining
      return { _tag: "Open", until, openedAt: until - stored.waitMillis, generation, trips: stored.trips }
    }
  }
}

/**
 * The circuit refuses the call. `until` is when it may admit one again, in milliseconds of the breaker's clock, and
 * `retryAfter` how long that is from now: at the latest, because a running probe may close the circuit at any moment.
 * Both are infinite when the circuit is isolated.
 *
 * @since 0.1.0
 * @category errors
 */
export class CircuitOpen extends Data.TaggedError("CircuitOpen")<{
  readonly until: number
  readonly retryAfter: Duration.Duration
}> {
  override get message(): string {
    return this.until === Infinity
      ? "The circuit is isolated: it admits no call until it is reset."
      : `The circuit is open: it may admit a call in ${Duration.format(this.retryAfter)}.`
  }
}

/**
 * A breaker for the calls to one dependency.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  /**
   * Runs an effect if the circuit admits it, else fails with `CircuitOpen` at once; it never waits. `classify` says
   * what the exit means (default: success is `success`, any failure or defect is `failure`). Interruption alone is
   * always `ignored`. Retries and timeouts of the effect belong inside, so that the circuit sees one outcome.
   */
  readonly execute: <A, E, R>(
    effect: Effect.Effect<A, E, R>,
    options?: { readonly classify?: ((exit: Exit.Exit<A, E>) => Outcome) | undefined }
  ) => Effect.Effect<A, E | CircuitOpen, R>
  /**
   * Admits a call by hand. Every admission needs its `record`, on interruption too: else a probe holds its place until
   * the probe timeout.
   */
  readonly admit: Effect.Effect<Admission, CircuitOpen>
  /** Takes in the outcome of a call that was admitted by hand. */
  readonly record: (admission: Admission, outcome: Outcome) => Effect.Effect<void>
  /** The state now. It stays `Open` after the cooldown, until a call becomes the probe. */
  readonly state: Effect.Effect<State>
  /** Refuses all calls until `reset`. */
  readonly isolate: Effect.Effect<void>
  /** Closes the circuit and forgets its failures and openings. */
  readonly reset: Effect.Effect<void>
  /**
   * The transitions from the moment the stream runs, until the breaker's scope closes. A slow reader loses the oldest
   * of more than 256, and slows nobody down.
   */
  readonly transitions: Stream.Stream<Transition>
}

/**
 * A circuit breaker as a service.
 *
 * @example
 * ```ts
 * import * as Effect from "effect/Effect"
 * import * as CircuitBreaker from "effect-keymesh/CircuitBreaker"
 *
 * const program = Effect.gen(function*() {
 *   const breaker = yield* CircuitBreaker.CircuitBreaker
 *   return yield* breaker.execute(Effect.succeed("answer"))
 * }).pipe(
 *   Effect.catchTag("CircuitOpen", (open) => Effect.succeed(`not now: ${open.message}`)),
 *   Effect.provide(CircuitBreaker.layer({ threshold: 5, cooldown: "10 seconds" }))
 * )
 * ```
 *
 * @since 0.1.0
 * @category tags
 */
export class CircuitBreaker extends Context.Tag("effect-keymesh/CircuitBreaker")<CircuitBreaker, Service>() {}

/**
 * Where a breaker keeps its state, for breakers over a state that is part of a larger one.
 *
 * @since 0.1.0
 * @category models
 */
export interface Port {
  readonly options: Options
  /**
   * Replaces the state in one step, and reports the `transition` if there is one. `now` is of a clock that does not run
   * backwards.
   */
  readonly modify: <A>(f: (state: State, now: number) => readonly [A, State]) => Effect.Effect<A>
  /** What `modify` reports. */
  readonly transitions: Stream.Stream<Transition>
}

/**
 * The service over a state that somebody else keeps.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeWith = (port: Port): Service => {
  const admitOne = Effect.flatMap(
    port.modify((state, now) => {
      // No two probes share a generation, so it serves as the name of the call.
      const [admission, after] = admit(port.options, state, now, state.generation + 1)
      return [admission ?? refused(port.options, state, now), after]
    }),
    (result) => result instanceof CircuitOpen ? Effect.fail(result) : Effect.succeed(result)
  )

  const recordOne = (admission: Admission, outcome: Outcome): Effect.Effect<void> =>
    port.modify((state, now) => [undefined, record(port.options, state, now, admission, outcome)])

  const execute: Service["execute"] = (effect, options) =>
    Effect.uninterruptibleMask((restore) =>
      Effect.flatMap(admitOne, (admission) =>
        Effect.flatMap(Effect.exit(restore(effect)), (exit) => {
          const outcome = outcomeOf(exit, options?.classify)
          if (Exit.isSuccess(outcome)) return Effect.zipRight(recordOne(admission, outcome.value), exit)
          // A `classify` that throws must not keep the probe's place.
          const cause = Exit.isFailure(exit) ? Cause.sequential(exit.cause, outcome.cause) : outcome.cause
          return Effect.zipRight(recordOne(admission, "ignored"), Effect.failCause(cause))
        }))
    )

  return {
    execute,
    admit: Effect.uninterruptible(admitOne),
    record: (admission, outcome) => Effect.uninterruptible(recordOne(admission, outcome)),
    state: port.modify((state) => [state, state]),
    isolate: Effect.uninterruptible(port.modify((state, now) => [undefined, isolate(state, now)])),
    reset: Effect.uninterruptible(port.modify((state) => [undefined, reset(state)])),
    transitions: port.transitions
  }
}

/**
 * A breaker with a state of its own. Its clock is the monotonic one of `Clock`, in milliseconds; `transitions` ends
 * with the scope. Fails with `ConfigurationError`, which names the field, when a setting cannot be used.
 *
 * @example
 * ```ts
 * import * as Effect from "effect/Effect"
 * import * as CircuitBreaker from "effect-keymesh/CircuitBreaker"
 *
 * const program = Effect.scoped(Effect.gen(function*() {
 *   const breaker = yield* CircuitBreaker.make({ cooldown: "10 seconds", rate: false })
 *   yield* breaker.execute(Effect.fail("boom")).pipe(Effect.ignore)
 *   return yield* breaker.state
 * }))
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (options: Settings = {}): Effect.Effect<Service, ConfigurationError, Scope.Scope> =>
  Effect.flatMap(settings(options), makeChecked)

/**
 * Provides a breaker, see `make`.
 *
 * @example
 * ```ts
 * import * as CircuitBreaker from "effect-keymesh/CircuitBreaker"
 *
 * const Live = CircuitBreaker.layer({ threshold: 5 })
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = (options: Settings = {}): Layer.Layer<CircuitBreaker, ConfigurationError> =>
  Layer.scoped(CircuitBreaker, make(options))

/**
 * Provides a breaker whose settings are read from the configuration.
 *
 * @example
 * ```ts
 * import * as Config from "effect/Config"
 * import * as CircuitBreaker from "effect-keymesh/CircuitBreaker"
 *
 * const Live = CircuitBreaker.layerConfig({
 *   threshold: Config.integer("BREAKER_THRESHOLD").pipe(Config.withDefault(3)),
 *   cooldown: Config.duration("BREAKER_COOLDOWN")
 * })
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<CircuitBreaker, ConfigError | ConfigurationError> =>
  Layer.scoped(CircuitBreaker, Effect.flatMap(Config.unwrap(config), make))

const makeChecked = Effect.fnUntraced(function*(options: Options) {
  const ref = yield* Ref.make<State>(initial)
  const pubsub = yield* Effect.acquireRelease(PubSub.sliding<Transition>(256), PubSub.shutdown)

  // Publishing to a PubSub that was shut down interrupts; a call that ends after the scope must not notice.
  const publish = (event: Transition) => Effect.catchAllCause(PubSub.publish(pubsub, event), () => Effect.void)

  const modify: Port["modify"] = (f) =>
    Effect.clockWith((clock) => {
      const now = MonotonicTime.nowOf(clock)
      return Effect.flatMap(
        Ref.modify(ref, (before) => {
          const [value, after] = f(before, now)
          return [{ value, event: transition(before, after, now) }, after]
        }),
        ({ event, value }) => event === undefined ? Effect.succeed(value) : Effect.as(publish(event), value)
      )
    })

  return makeWith({ options, modify, transitions: Stream.fromPubSub(pubsub) })
})

const outcomeOf = <A, E>(
  exit: Exit.Exit<A, E>,
  classify: ((exit: Exit.Exit<A, E>) => Outcome) | undefined
): Exit.Exit<Outcome> => {
  if (Exit.isFailure(exit) && Cause.isInterruptedOnly(exit.cause)) return Exit.succeed("ignored")
  if (classify === undefined) return Exit.succeed(Exit.isSuccess(exit) ? "success" : "failure")
  try {
    return Exit.succeed(classify(exit))
  } catch (defect) {
    return Exit.die(defect)
  }
}

const refused = (options: Options, state: State, now: number): CircuitOpen => {
  const until = opensAt(options, state)
  // Rounded up: who waits exactly that long must not come too early.
  const retryAfter = until === Infinity ? Duration.infinity : Duration.millis(Math.ceil(until - now))
  return new CircuitOpen({ until, retryAfter })
}

// A hoisted function, because `initial` needs it.
function closed(generation: number, failures: number, trips: number): Closed {
  return {
    _tag: "Closed",
    failures,
    successes: 0,
    generation,
    trips,
    bucket: 0,
    calls: 0,
    faults: 0,
    previousCalls: 0,
    previousFaults: 0
  }
}

const opened = (options: Options, state: State, now: number): Open => {
  const trips = state.trips + 1
  return {
    _tag: "Open",
    until: now + cooldownMillis(options, trips),
    openedAt: now,
    generation: state.generation + 1,
    trips
  }
}

const succeeded = (options: Options, state: Closed, now: number): Closed => {
  if (state.trips === 0) {
    return options.rate === undefined && state.failures === 0 ? state : counted(options, state, now, 0, 0, 0, 0)
  }
  const successes = state.successes + 1
  return successes >= options.threshold
    ? counted(options, state, now, 0, 0, 0, 0)
    : counted(options, state, now, 0, 0, successes, state.trips)
}

const failed = (options: Options, state: Closed, now: number, evidence: Evidence | undefined): State => {
  const after = counted(options, state, now, 1, state.failures + 1, 0, state.trips)
  if (evidence?.mayOpen === false) return after
  return after.failures >= options.threshold || failuresPrevail(options, after, evidence?.siblings)
    ? opened(options, state, now)
    : after
}

const probed = (options: Options, state: HalfOpen, now: number, outcome: Outcome): State => {
  switch (outcome) {
    case "success":
    case "alive":
      return closed(state.generation + 1, 0, state.trips)
    case "failure":
      return opened(options, state, now)
    default:
      return { _tag: "HalfOpen", probe: undefined, generation: state.generation, trips: state.trips }
  }
}

const failuresPrevail = (options: Options, state: Closed, siblings: Counts | undefined): boolean => {
  const rate = options.rate
  if (rate === undefined) return false
  const calls = state.calls + state.previousCalls
  if (calls < rate.minimumCalls) return false
  const share = (state.faults + state.previousFaults) / calls
  if (share < rate.faults) return false
  if (siblings === undefined) return true
  return siblings.calls > 0 && share >= rate.siblingFactor * siblings.faults / siblings.calls
}

// A closed state with one more outcome in its window. One object, made field by field: this runs on every success.
const counted = (
  options: Options,
  state: Closed,
  now: number,
  fault: 0 | 1,
  failures: number,
  successes: number,
  trips: number
): Closed => {
  const bucket = options.rate === undefined ? state.bucket : bucketAt(now, options.rate.windowMillis)
  const turned = bucket - state.bucket
  return {
    _tag: "Closed",
    failures,
    successes,
    generation: state.generation,
    trips,
    bucket: turned > 0 ? bucket : state.bucket,
    calls: filling(turned, state.calls) + 1,
    faults: filling(turned, state.faults) + fault,
    previousCalls: previous(turned, state.calls, state.previousCalls),
    previousFaults: previous(turned, state.faults, state.previousFaults)
  }
}

const bucketAt = (now: number, windowMillis: number): number => Math.floor(now / (windowMillis / 2))

// What the two buckets hold once the grid has moved on by `turned`; a clock that ran backwards moves nothing.
const filling = (turned: number, current: number): number => turned <= 0 ? current : 0
const previous = (turned: number, current: number, before: number): number =>
  turned <= 0 ? before : turned === 1 ? current : 0

const settingNames = ["threshold", "cooldown", "cooldownFactor", "maxCooldown", "probeTimeout", "rate"]
const rateNames = ["faults", "minimumCalls", "window", "siblingFactor"]

const rateOf = (input: RateSettings, path: string): Checks.Checked<RateOptions> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(input, rateNames, path)
    const faults = yield* Checks.share(input.faults ?? defaultRate.faults, `${path}.faults`)
    if (faults === 0) return yield* Checks.refuse(`${path}.faults`, "must be greater than 0")
    return {
      faults,
      minimumCalls: yield* Checks.integer(input.minimumCalls ?? defaultRate.minimumCalls, `${path}.minimumCalls`, 1),
      windowMillis: yield* positiveMillis(input.window ?? defaultRate.windowMillis, `${path}.window`),
      siblingFactor: yield* Checks.nonNegative(
        input.siblingFactor ?? defaultRate.siblingFactor,
        `${path}.siblingFactor`
      )
    }
  })

const finiteMillis = (value: unknown, path: string): Checks.Checked<number> =>
  Either.flatMap(Checks.millis(value, path), (millis) => Checks.nonNegative(millis, path))

const positiveMillis = (value: unknown, path: string): Checks.Checked<number> =>
  Either.flatMap(finiteMillis(value, path), (millis) => Checks.positive(millis, path))
