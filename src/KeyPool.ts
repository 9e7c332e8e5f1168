/**
 * The pool: turns an effect that needs a key into one that picks a healthy key, sends, reads the answer for what it says
 * about the key, rotates or waits, and tells what happened.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as DefaultServices from "effect/DefaultServices"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberId from "effect/FiberId"
import * as FiberRef from "effect/FiberRef"
import { identity } from "effect/Function"
import * as HashMap from "effect/HashMap"
import * as Layer from "effect/Layer"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as PubSub from "effect/PubSub"
import * as Queue from "effect/Queue"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import type * as ApiKey from "./ApiKey.js"
import { CallOptions, type Settings as CallSettings } from "./CallOptions.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import type * as Fault from "./Fault.js"
import {
  AllKeysExhausted,
  appendTrail,
  attemptsIn,
  BudgetExceeded,
  type ConfigurationError,
  DeadlineExceeded,
  emptyTrail,
  isPoolError,
  PoolClosed,
  type PoolError,
  type Trail
} from "./KeymeshError.js"
import * as Keyring from "./Keyring.js"
import type * as KeyState from "./KeyState.js"
import * as OpenedStream from "./OpenedStream.js"
import * as Outcome from "./Outcome.js"
import * as PoolRecord from "./PoolRecord.js"
import * as PoolSettings from "./PoolSettings.js"
import { type PoolSnapshot, snapshotOf } from "./PoolSnapshot.js"
import * as PoolState from "./PoolState.js"
import * as PoolStore from "./PoolStore.js"
import * as RetryDecision from "./RetryDecision.js"
import * as RetryPolicy from "./RetryPolicy.js"
import * as Telemetry from "./Telemetry.js"

/**
 * The right to make one attempt with one key; while it is held, the attempt counts as in flight.
 *
 * @since 0.1.0
 * @category models
 */
export interface Lease {
  /** Unique in the pool. */
  readonly id: number
  readonly key: ApiKey.ApiKey
  /** The number of the attempt in its call, from 1. */
  readonly attempt: number
  readonly call: number
  readonly model: string | undefined
  /**
   * Says what the attempt's answer means, as soon as it is known. The first one counts; a fault after a success is
   * taken in as a late one.
   */
  readonly commit: (outcome: Outcome.Outcome) => Effect.Effect<void>
  /** Gives the key back; a lease that was never committed then counts as ignored. Later calls do nothing. */
  readonly end: Effect.Effect<void>
  /**
   * Ends the lease once its answer has gone unread for the pool's `streamIdle`; run it beside the reading. `idleSince`
   * tells since when nobody reads, in milliseconds of the pool's clock; `undefined` while a read is under way.
   */
  readonly endWhenIdle: (idleSince: () => number | undefined) => Effect.Effect<void>
}

/**
 * What `run` may be told of a call.
 *
 * @since 0.1.0
 * @category models
 */
export interface RunOptions<A, E> {
  /** What an exit means (default: `Outcome.fromExit`). Interruption alone is always ignored. */
  readonly classify?: ((exit: Exit.Exit<A, E>) => Outcome.Outcome) | undefined
  /** The model it asks for: limits and cooldowns may be per model. */
  readonly model?: string | undefined
  /**
   * Whether it may be sent again after a fault that leaves open whether it was processed (default true); `"never"`: not
   * even after a refusal, because its body can be sent only once.
   */
  readonly replayable?: boolean | "never" | undefined
  /**
   * Keeps the lease when the effect succeeds (with such a value), for answers whose body is still to come: whoever gets
   * the answer must run `lease.end`. Default false.
   */
  readonly hold?: boolean | ((a: A) => boolean) | undefined
  /** A cell for the trail of the call's attempts, for those who want it on success too. One cell for one call. */
  readonly trail?: MutableRef.MutableRef<Trail> | undefined
}

/**
 * What `stream` may be told of a call.
 *
 * @since 0.1.0
 * @category models
 */
export interface StreamOptions<A, E> {
  /** What a failure means (default: `Outcome.fromCause`). */
  readonly classify?: ((cause: Cause.Cause<E>) => Outcome.Outcome) | undefined
  /**
   * From which element on the stream belongs to the caller (default: from the first). Elements before it are held back,
   * at most 64 or for 5 seconds; a failure among them is retried with another key and never seen.
   */
  readonly commits?: ((a: A) => boolean) | undefined
  readonly model?: string | undefined
  readonly replayable?: boolean | "never" | undefined
}

/**
 * A pool of keys.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  readonly name: string
  /**
   * Runs an effect with a leased key, again with another when the attempt fails in a way that another key or a little
   * time can mend. Its own failures come back untouched; beside them, `PoolError`.
   */
  readonly run: <A, E, R>(
    use: (lease: Lease) => Effect.Effect<A, E, R>,
    options?: RunOptions<A, E>
  ) => Effect.Effect<A, E | PoolError, R>
  /**
   * As `run`, for streams: what fails before the first committing element is tried again, later failures pass. The lease
   * is held until the stream ends, is interrupted, or goes unread for `streamIdle`. A deadline is for that first element.
   */
  readonly stream: <A, E, R>(
    use: (lease: Lease) => Stream.Stream<A, E, R>,
    options?: StreamOptions<A, E>
  ) => Stream.Stream<A, E | PoolError, R>
  /** One lease, held until the scope closes; for protocols that `run` does not fit. Waits for a key as `run` does. */
  readonly lease: Effect.Effect<Lease, PoolError, Scope.Scope>
  /** The pool at this moment. */
  readonly snapshot: Effect.Effect<PoolSnapshot>
  /** The pool now, and after each change of a key's state (not after each call). */
  readonly changes: Stream.Stream<PoolSnapshot>
  /** Adds, retires and replaces keys; the next pick sees it. */
  readonly keyring: Keyring.Service
  /** The breaker of a key, over the pool's own state; none when there is no key of that id. */
  readonly breaker: (id: string) => Effect.Effect<Option.Option<CircuitBreaker.Service>>
  /** Gives a key no new attempts until `enable`. False when there is none of that id; so for the others. */
  readonly disable: (id: string) => Effect.Effect<boolean>
  readonly enable: (id: string) => Effect.Effect<boolean>
  /** Retires a key and waits until its last attempt has ended. */
  readonly drain: (id: string) => Effect.Effect<boolean>
  /** Forgets everything held against a key: its breaker, its cooldowns, and those of its group. */
  readonly reset: (id: string) => Effect.Effect<boolean>
}

/**
 * A pool as a service.
 *
 * @since 0.1.0
 * @category tags
 */
export class KeyPool extends Context.Tag("effect-keymesh/KeyPool")<KeyPool, Service>() {}

/**
 * The settings of a pool.
 *
 * @since 0.1.0
 * @category models
 */
export type Settings = PoolSettings.Settings

/**
 * Makes a pool; it closes with its scope. Fails with `ConfigurationError`, which names the field, when a setting cannot
 * be used.
 *
 * @example
 * ```ts
 * import { Effect, Redacted } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * declare const fetchReport: (secret: string) => Effect.Effect<string, { readonly status: number }>
 *
 * const program = Effect.gen(function*() {
 *   const pool = yield* KeyPool.make({ keys: ["key-one", "key-two"], strategy: "least-used" })
 *   return yield* pool.run((lease) => fetchReport(Redacted.value(lease.key.secret)))
 * }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: Settings
): Effect.Effect<Service, ConfigurationError, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore> =>
  Effect.flatMap(PoolSettings.resolve(settings), fromResolved)

/**
 * @since 0.1.0
 * @category layers
 */
export const layer = (
  settings: Settings
): Layer.Layer<KeyPool, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(KeyPool, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<KeyPool, ConfigError | ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(KeyPool, Effect.flatMap(Config.unwrap(config), make))

/**
 * What pools need, with its defaults: one telemetry, and a store in memory.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerDefaults: Layer.Layer<Telemetry.Telemetry | PoolStore.PoolStore> = Layer.merge(
  Telemetry.layer,
  PoolStore.layerMemory
)

/** The pool's clock: milliseconds that never run backwards, near to those since the epoch. */
const nowOf = (clock: Clock.Clock): number => Number(clock.unsafeCurrentTimeNanos()) / 1e6

const fromResolved = Effect.fnUntraced(function*(resolved: PoolSettings.Resolved) {
  const { config } = resolved
  const telemetry = yield* Telemetry.Telemetry
  const store = yield* PoolStore.PoolStore
  const scope = yield* Effect.scope
  const clockNow = Effect.clockWith((clock) => Effect.succeed(nowOf(clock)))
  const wallOffset = Effect.clockWith((clock) => Effect.succeed(clock.unsafeCurrentTimeMillis() - nowOf(clock)))
  const started = yield* clockNow
  const state = yield* Ref.make(PoolState.make(config, resolved.keys, started))
  const ticks = yield* Effect.acquireRelease(PubSub.sliding<void>(1), PubSub.shutdown)
  const circuits = yield* Effect.acquireRelease(PubSub.sliding<CircuitEvent>(256), PubSub.shutdown)
  const wake = yield* Queue.sliding<void>(1)
  const dirty = yield* Queue.sliding<void>(1)
  const drains = yield* Ref.make(HashMap.empty<string, Deferred.Deferred<void>>())

  // ------------------------------------------------------------------------------------------------- what steps say

  /**
   * Publishes what a step says, answers those it served, and wakes whoever must look again. `before` is the state before
   * the step; without it something has changed.
   */
  const announce = (
    before: PoolState.PoolState | undefined,
    { answers, events, state: after }: PoolState.Dispatched
  ): Effect.Effect<void> => {
    let effect: Effect.Effect<void> = Effect.void
    for (const answer of answers) {
      const lease = answer._tag === "Granted" ? answer.lease : undefined
      effect = Effect.zipRight(effect, Deferred.succeed(answer.waiter.answer, lease))
    }
    if (events.length > 0) effect = Effect.zipRight(effect, telemetry.publish(events))
    for (const event of events) {
      if (event._tag === "circuit.open" || event._tag === "circuit.closed" || event._tag === "circuit.half-open") {
        effect = Effect.zipRight(effect, tell(circuits, event))
      }
      if (event._tag === "key.removed") effect = Effect.zipRight(effect, drained(event.keyId))
    }
    if (
      before === undefined || PoolState.hasMoved(before, after) || events.some((event) => event._tag === "key.added")
    ) {
      effect = Effect.zipRight(effect, Effect.zipRight(tell(ticks, undefined), Queue.offer(dirty, undefined)))
    }
    return after.rest.waiting > 0 ? Effect.zipRight(effect, Queue.offer(wake, undefined)) : effect
  }

  const drained = (id: string) =>
    Effect.flatMap(
      Ref.modify(drains, (map) => [HashMap.get(map, id), HashMap.remove(map, id)] as const),
      Option.match({ onNone: () => Effect.void, onSome: (done) => Effect.asVoid(Deferred.succeed(done, undefined)) })
    )

  /** Makes a step that only changes the state, and serves whoever can be served after it; false if there was none. */
  const step = (f: (state: PoolState.PoolState, now: number) => PoolState.Changed | undefined) =>
    Effect.uninterruptible(Effect.clockWith((clock) => {
      const now = nowOf(clock)
      return Effect.flatMap(
        Ref.modify(state, (before): readonly [Effect.Effect<boolean>, PoolState.PoolState] => {
          const changed = f(before, now)
          if (changed === undefined) return [Effect.succeed(false), before]
          const served = PoolState.thenDispatch(config, changed, now)
          return [Effect.as(announce(before, served), true), served.state]
        }),
        identity
      )
    }))

  // --------------------------------------------------------------------------------------------------------- leases

  /** Takes in what a lease's attempt said; `extra` are the events of the attempt itself, which come first. */
  const settle = (
    record: PoolState.LeaseRecord,
    clock: Clock.Clock,
    outcome: Outcome.Outcome | undefined,
    end: boolean,
    random: number,
    extra: (now: number) => ReadonlyArray<Telemetry.Unnumbered>
  ): Effect.Effect<void> => {
    const now = nowOf(clock)
    return Effect.flatMap(
      Ref.modify(state, (before): readonly [Effect.Effect<void> | undefined, PoolState.PoolState] => {
        const changed = PoolState.settle(config, before, record, outcome, end, now, random)
        // Nothing but the key's own numbers: the usual case.
        if (changed.state.rest === before.rest && before.rest.waiting === 0 && changed.events.length === 0) {
          return [undefined, changed.state]
        }
        const served = PoolState.thenDispatch(config, changed, now)
        return [
          Effect.suspend(() => announce(before, { ...served, events: [...extra(now), ...served.events] })),
          served.state
        ]
      }),
      (announced) => {
        if (announced !== undefined) return announced
        const events = extra(now)
        return events.length === 0 ? Effect.void : telemetry.publish(events)
      }
    )
  }

  const attemptOf = (record: PoolState.LeaseRecord, attempt: number, at: number) => ({
    pool: config.pool,
    at,
    keyId: record.key.id,
    label: record.key.label,
    call: record.call,
    attempt,
    ...(record.model === undefined ? {} : { model: record.model })
  })

  const startEvents = (record: PoolState.LeaseRecord, attempt: number): ReadonlyArray<Telemetry.Unnumbered> =>
    telemetry.listened() ? [{ _tag: "request.start", ...attemptOf(record, attempt, record.startedAt) }] : noEvents

  const outcomeEvents = (
    record: PoolState.LeaseRecord,
    attempt: number,
    outcome: Outcome.Outcome,
    late: boolean,
    now: number
  ): ReadonlyArray<Telemetry.Unnumbered> => {
    if (!telemetry.listened() || outcome._tag === "Ignored") return noEvents
    const base = { ...attemptOf(record, attempt, now), durationMillis: now - record.startedAt }
    return outcome._tag === "Success"
      ? [{ _tag: "request.success", ...base }]
      : [{ _tag: "request.fail", ...base, fault: outcome.fault, late }]
  }

  /** How a call ended, once per call. */
  const callEnd = (call: Call, clock: Clock.Clock, exit: Exit.Exit<unknown, unknown>): Effect.Effect<void> => {
    const trail = MutableRef.get(call.trail)
    const now = nowOf(clock)
    return telemetry.publish([{
      _tag: "call.end",
      pool: config.pool,
      at: now,
      call: MutableRef.get(call.number),
      ...(call.model === undefined ? {} : { model: call.model }),
      outcome: endOf(exit, trail),
      attempts: attemptsIn(trail),
      durationMillis: now - call.startedAt,
      trail
    }])
  }

  /** The lease as its user sees it, and with it what only the pool may do. */
  const leaseOf = (record: PoolState.LeaseRecord, attempt: number, clock: Clock.Clock): Held => {
    const phase = MutableRef.make<Phase>("open")
    /** Takes in what is said, if it still counts, and ends the lease if `end`. */
    const say = (outcome: Outcome.Outcome, end: boolean): Effect.Effect<void> =>
      Effect.suspend(() => {
        const before = MutableRef.get(phase)
        if (before === "ended") return Effect.void
        const late = before === "succeeded" && outcome._tag === "Fault"
        const counted = before === "open" || late ? outcome : undefined
        if (counted === undefined && !end) return Effect.void
        MutableRef.set(phase, end ? "ended" : counted?._tag === "Success" ? "succeeded" : "decided")
        const taken = (random: number) =>
          settle(
            record,
            clock,
            counted,
            end,
            random,
            (now) => counted === undefined ? noEvents : outcomeEvents(record, attempt, counted, late, now)
          )
        return counted?._tag === "Fault" ? Effect.flatMap(Random.next, taken) : taken(0)
      })
    const end = Effect.uninterruptible(say(Outcome.ignored, true))
    return {
      id: record.id,
      key: record.key,
      attempt,
      call: record.call,
      model: record.model,
      commit: (outcome) => Effect.uninterruptible(say(outcome, false)),
      end,
      isCommitted: () => MutableRef.get(phase) === "succeeded",
      endWhenIdle: (idleSince) => endWhenIdle(end, idleSince, resolved.streamIdleMillis),
      say
    }
  }

  /**
   * A key for the next attempt of a call: at once, or after waiting until `until` at most. Runs uninterruptibly but for
   * the wait.
   */
  const acquire = (
    restore: Restore,
    call: Call,
    request: PoolState.Request,
    until: number,
    clock: Clock.Clock
  ): Effect.Effect<PoolState.LeaseRecord | Refused> => {
    const now = nowOf(clock)
    const answer = Deferred.unsafeMake<PoolState.LeaseRecord | undefined>(FiberId.none)
    return Effect.flatMap(
      Ref.modify(state, (before) => {
        const acquired = PoolState.acquire(config, before, request, { until, answer }, now)
        return [{ before, acquired }, acquired.state]
      }),
      ({ acquired, before }): Effect.Effect<PoolState.LeaseRecord | Refused> => {
        const { outcome, state: after } = acquired
        const told = announce(before, acquired)
        if (outcome === "closed") return Effect.as(told, { _tag: "Refused", call: request.call, closed: true })
        if (outcome === "refused" || outcome === "full") {
          return Effect.as(told, {
            _tag: "Refused",
            call: request.call === 0 ? after.calls : request.call,
            closed: false
          })
        }
        if ("slot" in outcome) return Effect.as(told, outcome)
        MutableRef.set(call.number, outcome.request.call)
        return told.pipe(
          Effect.zipRight(waitingEvents(outcome, after, now)),
          Effect.zipRight(Queue.offer(wake, undefined)),
          Effect.zipRight(Effect.onInterrupt(restore(Deferred.await(answer)), () => abandon(outcome, clock))),
          Effect.flatMap((record): Effect.Effect<PoolState.LeaseRecord | Refused> =>
            record !== undefined
              ? Effect.succeed(record)
              : Effect.map(Ref.get(state), ({ rest }): Refused => ({
                _tag: "Refused",
                call: outcome.request.call,
                closed: rest.closed
              }))
          )
        )
      }
    )
  }

  const waitingEvents = (waiter: PoolState.Waiter, after: PoolState.PoolState, now: number): Effect.Effect<void> => {
    if (!telemetry.listened()) return Effect.void
    const { at } = PoolState.opening(config, after, waiter.request, now)
    return telemetry.publish([{
      _tag: "call.waiting",
      pool: config.pool,
      at: now,
      call: waiter.request.call,
      waiting: after.rest.waiting,
      ...(waiter.request.model === undefined ? {} : { model: waiter.request.model }),
      ...(Number.isFinite(at) ? { until: at } : {})
    }])
  }

  /** A waiter that was interrupted leaves the queue; a key that it was given meanwhile goes to the next one. */
  const abandon = (waiter: PoolState.Waiter, clock: Clock.Clock): Effect.Effect<void> =>
    Effect.flatMap(
      Ref.modify(state, (before) => [PoolState.isWaiting(before, waiter), PoolState.withoutWaiter(before, waiter)]),
      (waiting) =>
        waiting ?
          Effect.void :
          Effect.flatMap(
            Deferred.await(waiter.answer),
            (record) =>
              record === undefined ? Effect.void : settle(record, clock, Outcome.ignored, true, 0, () => noEvents)
          )
    )

  /** Why a call got no key, as its error. */
  const refusal = (
    refused: Refused,
    call: Call,
    only: PoolState.Request["only"],
    clock: Clock.Clock
  ): Effect.Effect<never, AllKeysExhausted | PoolClosed> =>
    Effect.flatMap(Ref.get(state), (current): Effect.Effect<never, AllKeysExhausted | PoolClosed> => {
      const now = nowOf(clock)
      MutableRef.set(call.number, refused.call)
      const trail = MutableRef.get(call.trail)
      if (refused.closed) return new PoolClosed({ pool: config.pool, trail })
      const request = { model: call.model, only }
      const { counts, reasons } = PoolState.explain(config, current, request, now)
      const { at } = PoolState.opening(config, current, request, now)
      const nextAvailableAt = Number.isFinite(at) ? at : undefined
      return Effect.zipRight(
        telemetry.publish([{
          _tag: "all.exhausted",
          pool: config.pool,
          at: now,
          call: refused.call,
          reasons,
          reasonCounts: counts,
          ...(call.model === undefined ? {} : { model: call.model }),
          ...(nextAvailableAt === undefined ? {} : { nextAvailableAt })
        }]),
        new AllKeysExhausted({ pool: config.pool, at: now, nextAvailableAt, reasons, reasonCounts: counts, trail })
      )
    })

  // ---------------------------------------------------------------------------------------------------------- calls

  const callOf = (
    given: CallSettings,
    options: Pick<RunOptions<never, never>, "model" | "replayable" | "trail">,
    now: number
  ): Call => {
    const budgetMillis = given.budget === undefined ? resolved.budgetMillis : Duration.toMillis(given.budget)
    return {
      number: MutableRef.make(0),
      startedAt: now,
      budgetMillis,
      budgetEnd: now + budgetMillis,
      maxWaitMillis: (given.maxWait === undefined ? resolved.maxWaitMillis : Duration.toMillis(given.maxWait)) ??
        Infinity,
      model: options.model ?? given.model,
      replayable: options.replayable ?? given.replayable ?? true,
      trail: options.trail ?? MutableRef.make(emptyTrail)
    }
  }

  const withDeadline = <A, E, R>(
    effect: Effect.Effect<A, E, R>,
    call: Call,
    given: CallSettings
  ): Effect.Effect<A, E | DeadlineExceeded, R> => {
    const deadline = given.deadline === undefined ? resolved.deadlineMillis : Duration.toMillis(given.deadline)
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

  /** One call: the first attempt on the short path; `rescue` only comes to life when that one fails. */
  const call = <A, E, R>(
    use: (lease: Held) => Effect.Effect<A, E, R>,
    options: RunOptions<A, E>
  ): Effect.Effect<A, E | PoolError, R> =>
    Effect.withFiberRuntime((fiber) => {
      const given = Context.get(fiber.getFiberRef(FiberRef.currentContext), CallOptions)
      const clock = Context.get(fiber.getFiberRef(DefaultServices.currentServices), Clock.Clock)
      const now = nowOf(clock)
      const call = callOf(given, options, now)
      const running = Effect.uninterruptibleMask((restore) => first(restore, use, options, call, clock))
      const timed = withDeadline(running, call, given)
      return telemetry.listened() ? Effect.onExit(timed, (exit) => callEnd(call, clock, exit)) : timed
    })

  const first = <A, E, R>(
    restore: Restore,
    use: (lease: Held) => Effect.Effect<A, E, R>,
    options: RunOptions<A, E>,
    call: Call,
    clock: Clock.Clock
  ): Effect.Effect<A, E | PoolError, R> => {
    const begin = (random: number): Effect.Effect<A, E | PoolError, R> => {
      const request = random === 0 && call.model === undefined
        ? firstRequest
        : { ...firstRequest, model: call.model, random }
      const go = (record: PoolState.LeaseRecord) =>
        Effect.flatMap(
          attempt(restore, use, options, call, clock, record, 1, call.startedAt),
          (result): Effect.Effect<A, E | PoolError, R> =>
            result instanceof Again
              ? rescue(restore, use, options, call, clock, result)
              : Effect.succeed(result)
        )
      return Effect.flatMap(
        Ref.modify(state, (before): readonly [PoolState.Leased | undefined, PoolState.PoolState] => {
          // Somebody waits, or nothing may start any more: `acquire` sorts that out.
          if (before.rest.waiting > 0 || before.rest.closed) return [undefined, before]
          const leased = PoolState.lease(config, before, request, call.startedAt)
          return leased.lease === undefined ? [undefined, before] : [leased, leased.state]
        }),
        (leased) => {
          if (leased?.lease !== undefined) {
            const { events, lease } = leased
            return events.length === 0
              ? go(lease)
              : Effect.zipRight(announce(undefined, { events, state: leased.state, answers: noAnswers }), go(lease))
          }
          return Effect.flatMap(
            acquire(restore, call, request, waitUntil(call, call.startedAt), clock),
            (acquired) => "_tag" in acquired ? refusal(acquired, call, undefined, clock) : go(acquired)
          )
        }
      )
    }
    return config.strategy.randomised ? Effect.flatMap(Random.next, begin) : begin(0)
  }

  /** Until when a call may wait for a key. */
  const waitUntil = (call: Call, now: number): number => Math.min(call.budgetEnd, now + call.maxWaitMillis)

  /** One attempt with a leased key: its value, or a fault after which the call may try again. */
  const attempt = <A, E, R>(
    restore: Restore,
    use: (lease: Held) => Effect.Effect<A, E, R>,
    options: RunOptions<A, E>,
    call: Call,
    clock: Clock.Clock,
    record: PoolState.LeaseRecord,
    number: number,
    waitingSince: number,
    passedOver?: Readonly<Record<string, number>>
  ): Effect.Effect<A | Again<A, E>, E, R> => {
    const lease = leaseOf(record, number, clock)
    MutableRef.set(call.number, record.call)
    const note = (outcome: Outcome.Outcome): void => {
      const fault = outcome._tag === "Fault" ? outcome.fault : undefined
      MutableRef.update(call.trail, (trail) =>
        appendTrail(trail, {
          attempt: number,
          keyId: record.key.id,
          label: record.key.label,
          at: record.startedAt,
          waitedMillis: record.startedAt - waitingSince,
          durationMillis: nowOf(clock) - record.startedAt,
          outcome: fault === undefined ? outcome._tag === "Success" ? "success" : "ignored" : fault.kind,
          ...(fault?.status === undefined ? {} : { status: fault.status }),
          ...(fault?.code === undefined ? {} : { code: fault.code }),
          ...(passedOver === undefined ? {} : { passedOver })
        }))
    }
    const failing = (outcome: Outcome.Outcome, exit: Exit.Exit<A, E>): Effect.Effect<A | Again<A, E>, E> => {
      note(outcome)
      const committed = lease.isCommitted()
      const settled = lease.say(outcome, true)
      return outcome._tag === "Fault" && !committed
        ? Effect.as(settled, new Again(record, number, outcome.fault, exit))
        : Effect.zipRight(settled, exit)
    }
    // A `classify` that throws says nothing of the key, and must not keep it.
    const judged = (exit: Exit.Exit<A, E>): Outcome.Outcome | Effect.Effect<never> => {
      if (options.classify === undefined) return Outcome.fromExit(exit)
      try {
        return options.classify(exit)
      } catch (defect) {
        return Effect.zipRight(lease.say(Outcome.ignored, true), Effect.die(defect))
      }
    }
    const running = Effect.matchCauseEffect(restore(Effect.suspend(() => use(lease))), {
      onSuccess: (a): Effect.Effect<A | Again<A, E>, E> => {
        const outcome = options.classify === undefined ? Outcome.success : judged(Exit.succeed(a))
        if (Effect.isEffect(outcome)) return outcome
        if (outcome._tag === "Fault") return failing(outcome, Exit.succeed(a))
        const holds = typeof options.hold === "function" ? options.hold(a) : options.hold === true
        const settled = lease.say(outcome, !holds)
        if (!telemetry.listened() && options.trail === undefined) return Effect.as(settled, a)
        note(outcome)
        return Effect.as(settled, a)
      },
      onFailure: (cause) => {
        const exit = Exit.failCause(cause)
        const outcome = Cause.isInterruptedOnly(cause) ? Outcome.ignored : judged(exit)
        return Effect.isEffect(outcome) ? outcome : failing(outcome, exit)
      }
    })
    return telemetry.listened()
      ? Effect.zipRight(
        telemetry.publish([{ _tag: "request.start", ...attemptOf(record, number, record.startedAt) }]),
        running
      )
      : running
  }

  /** What follows a failed attempt: rotate, back off, or give up. */
  const rescue = Effect.fnUntraced(function*<A, E, R>(
    restore: Restore,
    use: (lease: Held) => Effect.Effect<A, E, R>,
    options: RunOptions<A, E>,
    call: Call,
    clock: Clock.Clock,
    first: Again<A, E>
  ) {
    const number = first.record.call
    let tried = first
    let progress = RetryDecision.initial
    let stepper = RetryPolicy.start(resolved.retry)
    let avoid: ReadonlyArray<number> = []
    let graced = false

    const denied = (reason: "time" | "tokens") =>
      telemetry.publish([{ _tag: "budget.denied", pool: config.pool, at: nowOf(clock), call: number, reason }])
    const outOfBudget = () =>
      Effect.zipRight(
        denied("time"),
        new BudgetExceeded({
          pool: config.pool,
          budget: Duration.millis(call.budgetMillis),
          fault: tried.fault,
          trail: MutableRef.get(call.trail),
          cause: Exit.isFailure(tried.exit) ? Cause.squash(tried.exit.cause) : undefined
        })
      )

    for (;;) {
      const now = nowOf(clock)
      const [decision, spent] = RetryDecision.decide(resolved, progress, tried.fault, call.replayable)
      progress = spent
      if (decision._tag === "Stop") return yield* tried.exit
      // An attempt that ran for long may have used up the budget by itself: its fault still earns one more, at once.
      const long = !graced && now - tried.record.startedAt > graceMillis
      let spentBudget: boolean = now >= call.budgetEnd
      avoid = avoid.includes(tried.record.slot) ? avoid : [...avoid, tried.record.slot]
      const isRetry = decision._tag === "BackOff" || (decision._tag === "Rotate" && decision.retry)
      if (isRetry && !spentBudget) {
        for (;;) {
          const at = nowOf(clock)
          const wait = yield* Ref.modify(state, (before) => {
            const spent = PoolState.spendToken(config, before, at)
            return [spent.waitMillis, spent.state]
          })
          if (wait === 0) break
          yield* denied("tokens")
          if (at + wait > call.budgetEnd) return yield* tried.exit
          yield* restore(Effect.sleep(Math.ceil(wait)))
        }
        const at = nowOf(clock)
        const next = yield* RetryPolicy.step(stepper, at, {
          startedAt: call.startedAt,
          // A wait binds the key that was told it. Only where no other key can do better, it binds the call.
          waitMillis: tried.fault.kind === "RateLimited" && !tried.fault.failover ? tried.fault.waitMillis : undefined
        })
        if (next._tag === "Done") return yield* next.outOfBudget ? outOfBudget() : tried.exit
        stepper = next.stepper
        const atOnce = decision._tag === "Rotate" &&
          PoolState.hasOther(config, yield* Ref.get(state), call.model, avoid, at)
        spentBudget = !atOnce && next.at > call.budgetEnd
        if (!atOnce && !spentBudget && next.at > at) {
          yield* restore(Effect.sleep(Math.min(Math.ceil(next.at - at), longestSleep)))
        }
      }
      if (spentBudget && !long) return yield* outOfBudget()
      graced = graced || spentBudget
      const only = decision._tag === "Elsewhere" ? suited(decision.where, tried.record.key) : undefined
      const random = config.strategy.randomised ? yield* Random.next : 0
      const waitingSince = nowOf(clock)
      const acquired = yield* acquire(
        restore,
        call,
        { call: number, model: call.model, avoid, only, rotation: true, random },
        only !== undefined || spentBudget ? waitingSince : waitUntil(call, waitingSince),
        clock
      )
      if ("_tag" in acquired) {
        return yield* only === undefined ? refusal(acquired, call, undefined, clock) : tried.exit
      }
      if (acquired.slot !== tried.record.slot && telemetry.listened()) {
        yield* telemetry.publish([{
          _tag: "key.rotated",
          ...attemptOf(acquired, tried.attempt + 1, acquired.startedAt),
          fromKeyId: tried.record.key.id,
          reason: tried.fault.kind
        }])
      }
      const passedOver = PoolState.explain(
        config,
        yield* Ref.get(state),
        { model: call.model, only },
        waitingSince
      ).counts
      const result = yield* attempt(
        restore,
        use,
        options,
        call,
        clock,
        acquired,
        tried.attempt + 1,
        waitingSince,
        passedOver
      )
      if (!(result instanceof Again)) return result
      tried = result
    }
  })

  // -------------------------------------------------------------------------------------------------------- streams

  const stream = <A, E, R>(
    use: (lease: Lease) => Stream.Stream<A, E, R>,
    options: StreamOptions<A, E> = {}
  ): Stream.Stream<A, E | PoolError, R> => {
    const classify = options.classify ?? Outcome.fromCause
    return Stream.unwrapScoped(Effect.gen(function*() {
      // Before the call: whenever it is interrupted, what it has opened is closed.
      const kept = MutableRef.make<Opened<A, E, R> | undefined>(undefined)
      yield* Effect.addFinalizer((exit) =>
        Effect.suspend(() => {
          const opened = MutableRef.get(kept)
          return opened === undefined
            ? Effect.void
            : Effect.ensuring(Scope.close(opened.scope, exit), opened.lease.end)
        })
      )
      const open = (lease: Held) =>
        Effect.map(
          OpenedStream.open(
            use(lease),
            options.commits ?? always,
            holdLimits,
            (opened) => MutableRef.set(kept, { ...opened, lease })
          ),
          (opened): Opened<A, E, R> => ({ ...opened, lease })
        )
      const opened = yield* call(open, {
        hold: true,
        model: options.model,
        replayable: options.replayable,
        classify: (exit) =>
          Exit.isSuccess(exit) ? Outcome.success : Cause.isInterruptedOnly(exit.cause)
            ? Outcome.ignored
            : classify(exit.cause)
      })
      const idleSince = MutableRef.make<number | undefined>(yield* clockNow)
      yield* Effect.forkScoped(opened.lease.endWhenIdle(() => MutableRef.get(idleSince)))
      const pull = Effect.suspend(() => {
        MutableRef.set(idleSince, undefined)
        return opened.pull.pipe(
          Effect.tapErrorCause((cause) =>
            Option.match(Cause.failureOption(cause), {
              onNone: () => Effect.void,
              onSome: Option.match({
                onNone: () => opened.lease.end,
                onSome: (error) => Effect.uninterruptible(opened.lease.say(classify(Cause.fail(error)), true))
              })
            })
          ),
          Effect.ensuring(Effect.map(clockNow, (now) => MutableRef.set(idleSince, now)))
        )
      })
      return Stream.concat(Stream.fromChunk(opened.held), Stream.fromPull(Effect.succeed(pull)))
    }))
  }

  // ------------------------------------------------------------------------------------------------------- controls

  const change = (id: string, f: (key: KeyState.KeyState) => KeyState.KeyState, event?: "key.added" | "key.disabled") =>
    step((before, now) => {
      const changed = PoolState.updateKey(config, before, id, f, now)
      const key = PoolState.find(before, id)
      if (changed === undefined || key === undefined || event === undefined) return changed
      const base = { pool: config.pool, at: now, keyId: key.id, label: key.label }
      return {
        state: changed.state,
        events: [
          ...changed.events,
          event === "key.added" ? { _tag: event, ...base, duplicate: false } : { _tag: event, ...base }
        ]
      }
    })

  /** Now, and each moment at which something has changed; what changes while the first is looked at is not missed. */
  const moments = Stream.unwrapScoped(Effect.map(
    PubSub.subscribe(ticks),
    (changes) => Stream.concat(Stream.succeed(undefined), Stream.fromQueue(changes))
  ))

  const retired = (key: KeyState.KeyState): KeyState.KeyState => ({ ...key, retiring: true })

  const keyring = Keyring.makeWith({
    keys: Effect.map(Ref.get(state), activeKeys),
    change: (add, retire) =>
      step((before, now) => {
        const added = add === undefined ? before : PoolState.addKey(config, before, add, now)
        const events: ReadonlyArray<Telemetry.Unnumbered> = add === undefined ? noEvents : [{
          _tag: "key.added",
          pool: config.pool,
          at: now,
          keyId: add.id,
          label: add.label,
          duplicate: false
        }]
        if (retire === undefined) return { state: added, events }
        if (PoolState.find(before, retire) === undefined) return undefined
        if (retire === add?.id) return { state: added, events }
        const left = PoolState.updateKey(config, added, retire, retired, now)
        return left === undefined ? undefined : { state: left.state, events: [...events, ...left.events] }
      }).pipe(
        // A key that is there again will not leave: nobody need wait for it.
        Effect.tap((found) => found && add !== undefined ? drained(add.id) : Effect.void)
      ),
    changes: Stream.changesWith(
      Stream.mapEffect(moments, () => Effect.map(Ref.get(state), activeKeys)),
      Keyring.same
    )
  })

  const breaker = (id: string): CircuitBreaker.Service =>
    CircuitBreaker.makeWith({
      options: config.breaker,
      modify: (f) =>
        Effect.uninterruptible(Effect.clockWith((clock) => {
          const now = nowOf(clock)
          return Effect.flatMap(
            Ref.modify(state, (before): readonly [Effect.Effect<ReturnType<typeof f>[0]>, PoolState.PoolState] => {
              const key = PoolState.find(before, id)
              const [result, after] = f(key?.breaker ?? CircuitBreaker.initial, now)
              const changed = key === undefined || after === key.breaker
                ? undefined
                : PoolState.updateKey(config, before, id, (key) => ({ ...key, breaker: after }), now)
              if (changed === undefined) return [Effect.succeed(result), before]
              const served = PoolState.thenDispatch(config, changed, now)
              return [Effect.as(announce(before, served), result), served.state]
            }),
            identity
          )
        })),
      transitions: Stream.filterMap(
        Stream.fromPubSub(circuits),
        (event) => event.keyId === id ? Option.some(transitionOf(event)) : Option.none()
      )
    })

  const snapshot = Effect.flatMap(clockNow, (now) => Effect.map(Ref.get(state), (s) => snapshotOf(config, s, now)))

  // --------------------------------------------------------------------------------------------------- store, fibers

  const storeWorks = yield* Ref.make(true)
  /** Told once, until it works again. */
  const degraded = (problem: string) =>
    Effect.flatMap(Ref.getAndSet(storeWorks, false), (worked) =>
      worked
        ? Effect.flatMap(clockNow, (at) =>
          telemetry.publish([{ _tag: "store.degraded", pool: config.pool, at, problem }]))
        : Effect.void)

  const load = Effect.gen(function*() {
    const found = yield* store.load(config.pool)
    if (Option.isNone(found)) return
    const now = yield* clockNow
    const offset = yield* wallOffset
    yield* Ref.update(state, (before) => PoolRecord.restore(config, before, found.value, now, offset))
  })

  const save = Effect.gen(function*() {
    const now = yield* clockNow
    const offset = yield* wallOffset
    yield* store.save(config.pool, PoolRecord.fromState(yield* Ref.get(state), now, offset))
  })

  /** The store never fails nor holds up the pool: what goes wrong there is told, and the pool goes on. */
  const tolerate = (effect: Effect.Effect<void, PoolStore.StoreError>): Effect.Effect<boolean> =>
    effect.pipe(
      // Also where nothing else is interruptible, at the pool's end.
      Effect.interruptible,
      Effect.disconnect,
      Effect.interruptible,
      Effect.timeoutFail({ duration: storeMillis, onTimeout: () => tooSlow }),
      Effect.zipRight(Ref.set(storeWorks, true)),
      Effect.as(true),
      Effect.catchAllCause((cause) => {
        const error = Option.getOrUndefined(Cause.failureOption(cause))
        return Effect.as(degraded(error === undefined ? "it failed unexpectedly" : error.message), false)
      })
    )

  const saver = Effect.forever(Effect.gen(function*() {
    yield* Queue.take(dirty)
    // Changes gather for a moment, so that a storm of them is one record.
    yield* Effect.sleep(saveMillis)
    while (!(yield* tolerate(save))) yield* Effect.sleep(saveAgainMillis)
  }))

  /** Looks at the queue again at each instant at which somebody in it may be served, or gives up. */
  const waker = Effect.forever(Effect.gen(function*() {
    const now = yield* clockNow
    const at = PoolState.nextWake(config, yield* Ref.get(state), now)
    if (at === Infinity) return yield* Queue.take(wake)
    const due = Effect.as(Effect.sleep(Math.min(Math.max(1, Math.ceil(at - now)), longestSleep)), true)
    const slept = yield* Effect.raceFirst(due, Effect.as(Queue.take(wake), false))
    if (slept) yield* step((state) => ({ state, events: noEvents }))
  }))

  yield* tolerate(load)
  const joined = (key: ApiKey.ApiKey, duplicate: boolean): Telemetry.Unnumbered => ({
    _tag: "key.added",
    pool: config.pool,
    at: started,
    keyId: key.id,
    label: key.label,
    duplicate
  })
  yield* telemetry.publish([
    ...resolved.keys.map((key) => joined(key, false)),
    ...resolved.duplicates.map((key) => joined(key, true))
  ])
  yield* Effect.forkIn(Effect.interruptible(waker), scope)
  yield* Effect.forkIn(Effect.interruptible(saver), scope)
  yield* Effect.addFinalizer(() =>
    Effect.zipRight(
      step((before) => ({ state: { ...before, rest: { ...before.rest, closed: true } }, events: noEvents })),
      tolerate(save)
    )
  )

  const leased = Effect.gen(function*() {
    const clock = yield* Effect.clock
    const given = yield* CallOptions
    const now = nowOf(clock)
    const call = callOf(given, {}, now)
    const random = config.strategy.randomised ? yield* Random.next : 0
    const request = { ...firstRequest, model: call.model, random }
    const waiting = Effect.uninterruptibleMask((restore) =>
      Effect.gen(function*() {
        const acquired = yield* acquire(restore, call, request, waitUntil(call, now), clock)
        if ("_tag" in acquired) return yield* refusal(acquired, call, undefined, clock)
        const lease = leaseOf(acquired, 1, clock)
        yield* Effect.addFinalizer(() => lease.end)
        yield* telemetry.publish(startEvents(acquired, 1))
        return lease
      })
    )
    return yield* withDeadline(waiting, call, given)
  })

  const pool: Service = {
    name: config.pool,
    run: (use, options) => call(use, options ?? {}),
    stream,
    lease: leased,
    snapshot,
    changes: Stream.mapEffect(moments, () => snapshot),
    keyring,
    breaker: (id) =>
      Effect.map(
        Ref.get(state),
        (current) => PoolState.find(current, id) === undefined ? Option.none() : Option.some(breaker(id))
      ),
    disable: (id) => change(id, (key) => ({ ...key, enabled: false }), "key.disabled"),
    enable: (id) => change(id, (key) => ({ ...key, enabled: true }), "key.added"),
    drain: (id) =>
      Effect.gen(function*() {
        const done = yield* Deferred.make<void>()
        const first = yield* Ref.modify(drains, (map) => {
          const known = HashMap.get(map, id)
          return Option.isSome(known) ? [known.value, map] : [done, HashMap.set(map, id, done)]
        })
        const found = yield* change(id, retired)
        if (found) yield* Deferred.await(first)
        else yield* Ref.update(drains, HashMap.remove(id))
        return found
      }),
    reset: (id) => step((before, now) => PoolState.resetKey(config, before, id, now))
  }
  return pool
})

type Restore = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>

/** What an attempt knows of its call. */
interface Call {
  /** Its number, once it has one. */
  readonly number: MutableRef.MutableRef<number>
  readonly startedAt: number
  readonly budgetMillis: number
  readonly budgetEnd: number
  readonly maxWaitMillis: number
  readonly model: string | undefined
  readonly replayable: boolean | "never"
  readonly trail: MutableRef.MutableRef<Trail>
}

/** A lease with what only the pool may do: take in an outcome and, in the same step, end it. */
interface Held extends Lease {
  /** Whether its answer belongs to the caller already. */
  readonly isCommitted: () => boolean
  readonly say: (outcome: Outcome.Outcome, end: boolean) => Effect.Effect<void>
}

type Phase = "open" | "succeeded" | "decided" | "ended"

/** No lease: why is found out when the error is made. */
interface Refused {
  readonly _tag: "Refused"
  readonly call: number
  readonly closed: boolean
}

/** Ends a lease once nobody has read for `idleMillis`. */
const endWhenIdle = Effect.fnUntraced(function*(
  end: Effect.Effect<void>,
  idleSince: () => number | undefined,
  idleMillis: number
) {
  for (;;) {
    const now = yield* Effect.clockWith((clock) => Effect.succeed(nowOf(clock)))
    const idle = now - (idleSince() ?? now)
    if (idle >= idleMillis) return yield* end
    yield* Effect.sleep(Math.min(longestSleep, Math.max(1, Math.ceil(idleMillis - idle))))
  }
})

/** A failed attempt after which the call may try again. */
class Again<A, E> {
  readonly record: PoolState.LeaseRecord
  readonly attempt: number
  readonly fault: Fault.Fault
  readonly exit: Exit.Exit<A, E>
  constructor(record: PoolState.LeaseRecord, attempt: number, fault: Fault.Fault, exit: Exit.Exit<A, E>) {
    this.record = record
    this.attempt = attempt
    this.fault = fault
    this.exit = exit
  }
}

/** An opened stream and its lease. */
interface Opened<A, E, R> extends OpenedStream.OpenedStream<A, E, R> {
  readonly lease: Held
}

type CircuitEvent = Extract<
  Telemetry.Unnumbered,
  { readonly _tag: "circuit.open" | "circuit.closed" | "circuit.half-open" }
>

const transitionOf = (event: CircuitEvent): CircuitBreaker.Transition => ({
  from: event.from,
  to: event._tag === "circuit.open" ? "Open" : event._tag === "circuit.closed" ? "Closed" : "HalfOpen",
  at: event.at,
  generation: event.generation,
  trips: event.trips,
  until: event._tag === "circuit.open" ? event.until ?? Infinity : undefined
})

/** Publishes, unless nobody can be told any more: a PubSub that is shut down would interrupt whoever publishes. */
const tell = <A>(hub: PubSub.PubSub<A>, message: A): Effect.Effect<void> =>
  Effect.flatMap(PubSub.isShutdown(hub), (down) => down ? Effect.void : Effect.asVoid(PubSub.publish(hub, message)))

/** How a call ended, in one word. */
const endOf = (exit: Exit.Exit<unknown, unknown>, trail: Trail): string => {
  if (Exit.isSuccess(exit)) return "success"
  const error = Option.getOrUndefined(Cause.failureOption(exit.cause))
  if (isPoolError(error)) return error._tag
  return error === undefined ? "ignored" : trail.entries[trail.entries.length - 1]?.outcome ?? "ignored"
}

const activeKeys = (state: PoolState.PoolState): ReadonlyArray<ApiKey.ApiKey> =>
  PoolState.keys(state).filter((key) => !key.retiring).map((key) => key.key)

/** Which keys may serve a request that this one could not. */
const suited = (where: "other-group" | "higher-limit", failed: ApiKey.ApiKey) => (key: ApiKey.ApiKey): boolean => {
  const group = (key: ApiKey.ApiKey) => key.quotaGroup ?? key.id
  if (where === "other-group") return group(key) !== group(failed)
  return (key.limits.tokensPerMinute ?? 0) > (failed.limits.tokensPerMinute ?? 0)
}

const firstRequest: PoolState.Request = {
  call: 0,
  model: undefined,
  avoid: [],
  only: undefined,
  rotation: false,
  random: 0
}

const noEvents: ReadonlyArray<Telemetry.Unnumbered> = []
const noAnswers: ReadonlyArray<PoolState.Answer> = []
const always = () => true
const tooSlow = new PoolStore.StoreError({ problem: "unreachable", detail: "it did not answer in time" })

/** How long the store may take for one record, and how long changes gather before they are saved. */
const storeMillis = 1_000
const saveMillis = 1_000
/** How long after a failure it is tried again. */
const saveAgainMillis = 10_000
/** An attempt longer than this earns one more when it used up the budget. */
const graceMillis = 30_000
/** How much of a stream is held back before its first committing element. */
const holdLimits: OpenedStream.Limits = { elements: 64, millis: 5_000 }
/** Timers of the platform overflow after 24.8 days. */
const longestSleep = 86_400_000
