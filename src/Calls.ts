/**
 * One call: attempts with leased keys until one of them answers, or nothing is left to try.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as DefaultServices from "effect/DefaultServices"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberId from "effect/FiberId"
import * as FiberRef from "effect/FiberRef"
import * as HashMap from "effect/HashMap"
import * as MutableRef from "effect/MutableRef"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as RuntimeFlags from "effect/RuntimeFlags"
import type * as Scope from "effect/Scope"
import * as Acquisition from "./Acquisition.js"
import * as Alarms from "./Alarms.js"
import * as ApiKey from "./ApiKey.js"
import { CallOptions } from "./CallOptions.js"
import * as Claims from "./Claims.js"
import * as Corroboration from "./Corroboration.js"
import * as Explanation from "./Explanation.js"
import * as Fault from "./Fault.js"
import * as HedgedAttempt from "./HedgedAttempt.js"
import * as Hedging from "./Hedging.js"
import * as HeldLease from "./HeldLease.js"
import * as Homes from "./Homes.js"
import { appendTrail, BudgetExceeded, type PoolError, type Trail, type TrailEntry } from "./KeymeshError.js"
import * as Latency from "./Latency.js"
import * as Leasing from "./Leasing.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as OngoingCall from "./OngoingCall.js"
import * as Outcome from "./Outcome.js"
import * as PoolCore from "./PoolCore.js"
import type * as PoolSettings from "./PoolSettings.js"
import * as PoolState from "./PoolState.js"
import type * as RateLimit from "./RateLimit.js"
import * as RetryDecision from "./RetryDecision.js"
import * as RetryPolicy from "./RetryPolicy.js"
import * as Sharing from "./Sharing.js"
import type * as WaitingLine from "./WaitingLine.js"

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
  /** The tokens it will use, for keys whose limits count them. */
  readonly tokens?: RateLimit.Estimate | undefined
  /** What it asks for, as the events of its attempts tell it: such as `POST /chat/completions`. */
  readonly operation?: string | undefined
  /**
   * Whether it may be sent again after a fault that leaves open whether it was processed (default true); `"never"`: not
   * even after a refusal, because its body can be sent only once.
   */
  readonly replayable?: boolean | "never" | undefined
  /** How urgent it is, should it have to wait; as `CallOptions.priority`, and wins over it. */
  readonly priority?: PoolState.Priority | undefined
  /** Whether it asks for a stream: how long its answer takes is then compared with other streams (default false). */
  readonly streaming?: boolean | undefined
  /**
   * Whether the effect is interrupted when it exceeds the attempt timeout: it runs in a fiber of its own then. Default:
   * only where `attemptTimeout` is a duration; otherwise use `Lease.abortWith`, which needs none.
   */
  readonly abortable?: boolean | undefined
  /** A name for calls that belong together; as `CallOptions.affinity`, and wins over it. */
  readonly affinity?: string | undefined
  /**
   * The stored resources that it names, by the provider's ids. It goes to the group that is known to have the first of
   * them of which that is known, and to no other; if nothing is known, each group is asked once, as long as they answer
   * that they do not have it (`Rejected` with status 404 or `failover`). `Lease.remember` makes them known.
   */
  readonly resources?: ReadonlyArray<string> | undefined
  /**
   * Keeps the lease when the effect succeeds (with such a value), for answers whose body is still to come: whoever gets
   * the answer must run `lease.end`. Default false.
   */
  readonly hold?: boolean | ((a: A) => boolean) | undefined
  /**
   * What to do with a value that comes when another attempt of the call, which ran beside it, was answered already
   * (`hedge` in the settings): values that hold something open are closed here. Default: nothing.
   */
  readonly discard?: ((a: A) => Effect.Effect<unknown>) | undefined
  /** A cell for the trail of the call's attempts, for those who want it on success too. One cell for one call. */
  readonly trail?: MutableRef.MutableRef<Trail> | undefined
}

/**
 * One call: the first attempt on the short path; `rescue` only comes to life when that one fails.
 *
 * @since 0.1.0
 * @category calls
 */
export const run = <A, E, R>(
  core: PoolCore.PoolCore,
  use: (lease: HeldLease.HeldLease) => Effect.Effect<A, E, R>,
  options: RunOptions<A, E>
): Effect.Effect<A, E | PoolError, R> =>
  Effect.withFiberRuntime((fiber, { runtimeFlags }) => {
    const context = fiber.getFiberRef(FiberRef.currentContext)
    const given = Context.get(context, CallOptions)
    const clock = Context.get(fiber.getFiberRef(DefaultServices.currentServices), Clock.Clock)
    const call = OngoingCall.make(core, given, options, clock)
    const running = onceLoaded(
      core,
      call,
      (call) =>
        Effect.uninterruptibleMask((restore) => {
          // Of two attempts one is interrupted, and where the caller is not to be interrupted, neither are they.
          const hedge = call.hedge !== undefined && RuntimeFlags.interruptible(runtimeFlags) ? call.hedge : undefined
          return first(core, call, { restore, use, options, hedge })
        })
    )
    const timed = OngoingCall.withDeadline(core, running, call, given)
    const told = core.telemetry.listened()
      ? Effect.onExit(timed, (exit) => OngoingCall.ended(core, call, exit, context))
      : timed
    const { trails } = given
    return trails === undefined ? told : Effect.ensuring(
      told,
      Effect.sync(() => MutableRef.update(trails, (ended) => [...ended, MutableRef.get(call.trail)]))
    )
  })

/**
 * One lease as a call of its own, held until the scope closes.
 *
 * @since 0.1.0
 * @category calls
 */
export const lease = (core: PoolCore.PoolCore): Effect.Effect<HeldLease.HeldLease, PoolError, Scope.Scope> =>
  Effect.gen(function*() {
    const clock = yield* Effect.clock
    const given = yield* CallOptions
    const call = OngoingCall.make(core, given, {}, clock)
    const random = core.config.strategy.randomised ? yield* Random.next : 0
    const waiting = onceLoaded(core, call, (call) =>
      Effect.uninterruptibleMask((restore) =>
        Effect.gen(function*() {
          const acquired = yield* start(core, restore, call, random, undefined)
          if ("_tag" in acquired) return yield* Acquisition.refusal(core, call, acquired)
          const lease = HeldLease.make(core, acquired, 1, clock)
          // What is done with it nobody knows.
          lease.begin()
          yield* Effect.addFinalizer(() => lease.end)
          yield* core.telemetry.publish(HeldLease.startEvents(core, acquired, 1))
          return lease
        })
      ))
    return yield* OngoingCall.withDeadline(core, waiting, call, given)
  })

/** What a call does once the pool's record is loaded: it picks no key before it is known what was held against each. */
const onceLoaded = <A, E, R>(
  { loaded }: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  f: (call: OngoingCall.OngoingCall) => Effect.Effect<A, E, R>
): Effect.Effect<A, E, R> =>
  loaded === undefined
    ? f(call)
    : Effect.flatMap(loaded, () => f({ ...call, startedAt: MonotonicTime.nowOf(call.clock) }))

// ------------------------------------------------------------------------------------------------------------ attempts

/** What a call does in each of its attempts. */
interface Work<A, E, R> {
  readonly restore: Acquisition.Restore
  readonly use: (lease: HeldLease.HeldLease) => Effect.Effect<A, E, R>
  readonly options: RunOptions<A, E>
  readonly hedge: PoolSettings.Hedge | undefined
}

/** A failed attempt after which the call may try again. */
class Again<A, E> {
  readonly record: PoolState.LeaseRecord
  readonly attempt: number
  readonly fault: Fault.Fault
  readonly exit: Exit.Exit<A, E | PoolError>
  /** The key, by slot, that failed beside it. */
  readonly beside: number | undefined
  constructor(
    record: PoolState.LeaseRecord,
    attempt: number,
    fault: Fault.Fault,
    exit: Exit.Exit<A, E | PoolError>,
    beside?: number
  ) {
    this.record = record
    this.attempt = attempt
    this.fault = fault
    this.exit = exit
    this.beside = beside
  }
}

const first = <A, E, R>(
  core: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  work: Work<A, E, R>
): Effect.Effect<A, E | PoolError, R> => {
  const go = (record: PoolState.LeaseRecord, within?: PoolState.Among) =>
    Effect.flatMap(
      call.trailed
        ? Effect.flatMap(
          passedOver(core, call, record, within?.only),
          (passed) =>
            work.hedge === undefined
              ? attempt(core, call, work, record, 1, call.startedAt, 0, passed)
              : hedged(core, call, work, work.hedge, record, passed)
        )
        : work.hedge === undefined
        ? attempt(core, call, work, record, 1, call.startedAt)
        : hedged(core, call, work, work.hedge, record),
      (result): Effect.Effect<A, E | PoolError, R> =>
        result instanceof Again ? rescue(core, call, work, result, within) : Effect.succeed(result)
    )
  const begin = (random: number): Effect.Effect<A, E | PoolError, R> => {
    const { affinity } = call
    if (affinity !== undefined) {
      return Effect.flatMap(Ref.get(core.state), (state) => {
        const within = Homes.within(state, affinity.resources, call.startedAt)
        return Effect.flatMap(
          start(core, work.restore, call, random, within),
          (acquired) =>
            "_tag" in acquired ? Acquisition.refusal(core, call, acquired, within?.only) : go(acquired, within)
        )
      })
    }
    const request =
      random === 0 && call.timed === OngoingCall.anyKind && call.model === undefined && call.operation === undefined &&
        call.tokens === undefined
        ? firstRequest
        : {
          ...firstRequest,
          model: call.model,
          operation: call.operation,
          timed: call.timed,
          tokens: call.tokens,
          random
        }
    const orRefuse = (
      acquiring: Effect.Effect<PoolState.LeaseRecord | Acquisition.Refused>
    ): Effect.Effect<A, E | PoolError, R> =>
      Effect.flatMap(
        acquiring,
        (acquired) => "_tag" in acquired ? Acquisition.refusal(core, call, acquired) : go(acquired)
      )
    return Effect.flatMap(
      Ref.modify(core.state, (before): readonly [Leasing.Leased | undefined, PoolState.PoolState] => {
        // Somebody waits, or nothing may start any more: `acquire` sorts that out.
        if (before.rest.waiting > 0 || before.rest.closed) return [undefined, before]
        const leased = Leasing.lease(core.config, before, request, call.startedAt)
        return leased.lease === undefined ? [undefined, before] : [leased, leased.state]
      }),
      (leased) => {
        if (leased?.lease !== undefined) {
          const { events, lease, reopened, state } = leased
          const going = core.sharing === undefined || !Claims.concerns(state, lease)
            ? go(lease)
            : orRefuse(
              Acquisition.claimed(
                core,
                core.sharing,
                work.restore,
                call,
                request,
                OngoingCall.waitUntil(call, call.startedAt),
                lease
              )
            )
          return events.length === 0 && reopened !== true
            ? going
            : Effect.zipRight(PoolCore.announce(core, undefined, { events, state, answers: noAnswers }), going)
        }
        return orRefuse(
          Acquisition.acquire(core, work.restore, call, request, OngoingCall.waitUntil(call, call.startedAt))
        )
      }
    )
  }
  return core.config.strategy.randomised ? Effect.flatMap(Random.next, begin) : begin(0)
}

/** A key for the first attempt of a call, off the short path. */
const start = (
  core: PoolCore.PoolCore,
  restore: Acquisition.Restore,
  call: OngoingCall.OngoingCall,
  random: number,
  within: PoolState.Among | undefined
): Effect.Effect<PoolState.LeaseRecord | Acquisition.Refused> => {
  const { affinity, model, operation, timed, tokens } = call
  const request: PoolState.Request = { ...firstRequest, ...within, model, operation, timed, tokens, random, affinity }
  return affinity?.conversation === undefined
    ? Acquisition.acquire(core, restore, call, request, OngoingCall.waitUntil(call, call.startedAt))
    : Acquisition.acquireTogether(core, restore, call, request)
}

/** The first attempt of a call, and a second one beside it if it takes longer than it should. */
const hedged = <A, E, R>(
  core: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  work: Work<A, E, R>,
  { delayMillis }: PoolSettings.Hedge,
  record: PoolState.LeaseRecord,
  passed?: Pick<TrailEntry, "passedOver" | "others">
): Effect.Effect<A | Again<A, E>, E, R> =>
  Effect.flatMap(Ref.get(core.state), ({ latency, rest }) => {
    const usual = delayMillis ??
      (record.timed === undefined ? undefined : Latency.quantile(latency, record.timed, hedgedFrom))
    const alone = attempt(core, call, work, record, 1, call.startedAt, 0, passed)
    if (usual === undefined || HashMap.size(rest.ids) < 2) return alone
    const at = record.startedAt + usual
    // Past the budget no attempt begins.
    if (at >= Math.min(call.budgetEnd, call.deadlineEnd)) return alone
    const { model, operation, timed, tokens } = call
    const second = (side: HedgedAttempt.Side, begins: () => boolean, random: number) =>
      Effect.flatMap(
        Ref.modify(core.state, (before): readonly [Leasing.Leased | undefined, PoolState.PoolState] => {
          const now = MonotonicTime.nowOf(call.clock)
          const leased = now >= call.budgetEnd
            ? undefined
            : Hedging.lease(core.config, before, record, { model, operation, timed, tokens, random }, now)
          return leased === undefined || !begins() ? [undefined, before] : [leased, leased.state]
        }),
        (leased): Effect.Effect<A | Again<A, E> | typeof HedgedAttempt.none, E, R> => {
          if (leased?.lease === undefined) return Effect.succeed(HedgedAttempt.none)
          const { events, lease, reopened, state } = leased
          const own: Effect.Effect<A | Again<A, E> | typeof HedgedAttempt.none, E, R> = call.trailed
            ? Effect.flatMap(
              passedOver(core, call, lease, Hedging.others(state, record)),
              (passed) => attempt(core, call, work, lease, 2, lease.startedAt, 0, passed, side)
            )
            : attempt(core, call, work, lease, 2, lease.startedAt, 0, undefined, side)
          const { sharing } = core
          const claimed = sharing === undefined
            ? own
            : Effect.flatMap(
              Sharing.claim(core, sharing, work.restore, lease),
              (granted) => granted ? own : Effect.succeed(HedgedAttempt.none)
            )
          return events.length === 0 && reopened !== true
            ? claimed
            : Effect.zipRight(PoolCore.announce(core, undefined, { events, state, answers: noAnswers }), claimed)
        }
      )
    return Effect.map(
      HedgedAttempt.race<A | Again<A, E>, E, R>(work.restore, {
        first: (side) => attempt(core, call, work, record, 1, call.startedAt, 0, passed, side),
        second: (side, begins) =>
          core.config.strategy.randomised
            ? Effect.flatMap(Random.next, (random) => second(side, begins, random))
            : second(side, begins, 0),
        whenDue: (ring) => {
          const alarm: Alarms.Alarm = { at, ring }
          Alarms.set(core.alarms, alarm)
          return () => Alarms.callOff(core.alarms, alarm)
        },
        isOpen: (result) =>
          result instanceof Again &&
          RetryDecision.decide(core.settings, RetryDecision.initial, result.fault, call.replayable)[0]._tag !== "Stop",
        discard: (result) => result instanceof Again ? Effect.void : discarded(work.options, result)
      }),
      ({ other, result }) =>
        result instanceof Again && other instanceof Again
          ? new Again(result.record, 2, result.fault, result.exit, other.record.slot)
          : result
    )
  })

/** An attempt that takes longer than this share of all takes long. */
const hedgedFrom = 0.95

/** Nobody gets the value any more. */
const discarded = <A, E>({ discard }: RunOptions<A, E>, value: A): Effect.Effect<void> =>
  discard === undefined ? Effect.void : Effect.catchAllCause(Effect.asVoid(discard(value)), () => Effect.void)

/** One attempt with a leased key: its value, or a fault after which the call may try again. */
const attempt = <A, E, R>(
  core: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  { options, restore, use }: Work<A, E, R>,
  record: PoolState.LeaseRecord,
  number: number,
  waitingSince: number,
  aborted = 0,
  passed?: Pick<TrailEntry, "passedOver" | "others">,
  side?: HedgedAttempt.Side
): Effect.Effect<A | Again<A, E>, E, R> => {
  const lease = HeldLease.make(core, record, number, call.clock, aborted, side)
  MutableRef.set(call.number, record.call)
  let noted = false
  const note = (outcome: Outcome.Outcome): void => {
    // Whoever was answered first has written it down already.
    if (noted) return
    noted = true
    const fault = outcome._tag === "Fault" ? outcome.fault : undefined
    MutableRef.update(call.trail, (trail) =>
      appendTrail(trail, {
        attempt: number,
        keyId: record.key.id,
        label: record.key.label,
        at: record.startedAt,
        waitedMillis: record.startedAt - waitingSince,
        durationMillis: MonotonicTime.nowOf(call.clock) - record.startedAt,
        outcome: fault === undefined ? outcome._tag === "Success" ? "success" : "ignored" : fault.kind,
        ...(fault?.status === undefined ? {} : { status: fault.status }),
        ...(fault?.code === undefined ? {} : { code: fault.code }),
        ...passed,
        ...(side?.isLost() === true ? { lost: true } : {})
      }))
  }
  side?.whenLost(() => note(Outcome.ignored))
  const failing = (outcome: Outcome.Outcome, exit: Exit.Exit<A, E>): Effect.Effect<A | Again<A, E>, E> => {
    note(outcome)
    const committed = lease.isCommitted()
    const settled = lease.say(outcome, true, side?.isLost())
    return outcome._tag === "Fault" && !committed
      ? Effect.map(
        settled,
        () => new Again(record, number, outcome.fault, outcome.fault === tooLong ? spent(core, call, exit) : exit)
      )
      : Effect.zipRight(settled, exit)
  }
  const abortable = options.abortable ?? typeof core.config.attemptTimeout === "number"
  /** What took too long says so, unless its answer came all the same. */
  const timely = (outcome: Outcome.Outcome): Outcome.Outcome =>
    lease.isOverdue() && outcome._tag !== "Success" ? Outcome.fault(tooLong) : outcome
  // A `classify` that throws says nothing of the key, and must not keep it.
  const judged = (exit: Exit.Exit<A, E>): Outcome.Outcome | Effect.Effect<never> => {
    if (options.classify === undefined) return Outcome.fromExit(exit)
    try {
      return options.classify(exit)
    } catch (defect) {
      return Effect.zipRight(lease.say(Outcome.ignored, true), Effect.die(defect))
    }
  }
  const running = Effect.matchCauseEffect(
    restore(Effect.suspend(() => {
      lease.begin()
      return abortable ? untilAborted(lease, use(lease)) : use(lease)
    })),
    {
      onSuccess: (a): Effect.Effect<A | Again<A, E>, E> => {
        const outcome = options.classify === undefined ? Outcome.success : judged(Exit.succeed(a))
        if (Effect.isEffect(outcome)) return outcome
        if (outcome._tag === "Fault") return failing(outcome, Exit.succeed(a))
        if (side !== undefined && !side.claim()) {
          const late = Effect.zipRight(discarded(options, a), lease.say(Outcome.ignored, true, side.isLost()))
          return Effect.zipRight(late, Effect.interrupt)
        }
        const holds = typeof options.hold === "function" ? options.hold(a) : options.hold === true
        const settled = lease.say(outcome, !holds)
        if (!core.telemetry.listened() && !call.trailed) return Effect.as(settled, a)
        note(outcome)
        return Effect.as(settled, a)
      },
      onFailure: (cause) => {
        const exit = Exit.failCause(cause)
        const outcome = Cause.isInterruptedOnly(cause) ? Outcome.ignored : judged(exit)
        return Effect.isEffect(outcome) ? outcome : failing(timely(outcome), exit)
      }
    }
  )
  const starts = HeldLease.startEvents(core, record, number)
  return starts.length === 0 ? running : Effect.zipRight(core.telemetry.publish(starts), running)
}

/** Why an attempt does not use the other keys: how many of them each reason holds back, and on request each by itself. */
const passedOver = (
  { config, state }: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  { slot, startedAt }: PoolState.LeaseRecord,
  only: PoolState.Among["only"]
): Effect.Effect<Pick<TrailEntry, "passedOver" | "others">> =>
  Effect.map(Ref.get(state), (current) => {
    const request = { model: call.model, only, tokens: call.tokens }
    const { counts } = PoolState.explain(config, current, request, startedAt, slot)
    return call.trailed
      ? { passedOver: counts, others: Explanation.others(config, current, request, slot, startedAt) }
      : { passedOver: counts }
  })

const tooLong = Fault.make("Timeout", { code: RetryDecision.attemptTimeout })

/** An attempt that the pool has interrupted has no failure of its own for the caller. */
const spent = <A, E>(
  { config }: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  exit: Exit.Exit<A, E>
): Exit.Exit<A, E | BudgetExceeded> =>
  Exit.isSuccess(exit) || !Cause.isInterruptedOnly(exit.cause) ? exit : Exit.fail(
    new BudgetExceeded({
      pool: config.pool,
      of: "policy",
      budget: Duration.millis(MonotonicTime.nowOf(call.clock) - call.startedAt),
      fault: tooLong,
      trail: MutableRef.get(call.trail)
    })
  )

/** The effect, interrupted when its lease is aborted. */
const untilAborted = <A, E, R>(lease: HeldLease.HeldLease, effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.suspend(() => {
    const aborted = Deferred.unsafeMake<never>(FiberId.none)
    lease.abortWith(() => Deferred.unsafeDone(aborted, Effect.interrupt))
    return Effect.raceFirst(effect, Deferred.await(aborted))
  })

const firstRequest: PoolState.Request = {
  call: 0,
  model: undefined,
  timed: OngoingCall.anyKind,
  avoid: [],
  only: undefined,
  tokens: undefined,
  rotation: false,
  random: 0
}

const noAnswers: ReadonlyArray<WaitingLine.Answer> = []

// -------------------------------------------------------------------------------------------------------------- rescue

/** What follows a failed attempt: rotate, back off, or give up. */
const rescue = Effect.fnUntraced(function*<A, E, R>(
  core: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  work: Work<A, E, R>,
  first: Again<A, E>,
  within: PoolState.Among | undefined
) {
  const { config, settings, state, telemetry } = core
  const { clock } = call
  const number = first.record.call
  let tried = first
  let progress = RetryDecision.initial
  let stepper = RetryPolicy.start(settings.retry)
  let avoid: ReadonlyArray<number> = first.beside === undefined ? [] : [first.beside]
  let graced = false
  const resources = call.affinity?.resources ?? noResources
  const searching = resources.length > 0 && within === undefined
  /** The groups that do not have what the call names. */
  const without = new Set<string>()
  const mayHave = (key: ApiKey.ApiKey): boolean => !without.has(ApiKey.groupOf(key))
  /** Keys that failed the call alike, one after the other. */
  let alike: ReadonlyArray<number> = []
  let failure = ""
  /** Retry tokens that the call has used. */
  let used = 0
  /** The keys that can serve it, as far as that is known by now. */
  const among = (): PoolState.Among => without.size > 0 ? { only: mayHave } : within ?? anyKey

  const denied = (reason: "time" | "tokens") =>
    telemetry.publish([{
      _tag: "budget.denied",
      pool: config.pool,
      at: MonotonicTime.nowOf(clock),
      call: number,
      reason
    }])
  /** The budget of the call is spent, or one that the retry policy has of its own. */
  const outOfBudget = (of: "call" | "policy") =>
    Effect.zipRight(
      denied("time"),
      new BudgetExceeded({
        pool: config.pool,
        of,
        budget: Duration.millis(of === "call" ? call.budgetMillis : MonotonicTime.nowOf(clock) - call.startedAt),
        fault: tried.fault,
        trail: MutableRef.get(call.trail),
        cause: Exit.isFailure(tried.exit) ? Cause.squash(tried.exit.cause) : undefined
      })
    )

  for (;;) {
    const now = MonotonicTime.nowOf(clock)
    const [decision, spent] = RetryDecision.decide(settings, progress, tried.fault, call.replayable, searching)
    const before = progress
    progress = spent
    if (decision._tag === "Stop") {
      // It was known to be there, and is not: next time it is looked for.
      if (within !== undefined && RetryDecision.isNotHere(tried.fault)) {
        yield* PoolCore.step(core, (state) => ({
          state: Homes.unlearn(state, resources),
          events: PoolState.noEvents
        }))
      }
      return yield* tried.exit
    }
    // An overload is never of one request's making.
    if (Fault.isProviderFault(tried.fault) && tried.fault.kind !== "Overloaded") {
      const same = `${tried.fault.kind} ${tried.fault.status} ${tried.fault.code}`
      const { slot } = tried.record
      alike = same === failure ? [...alike.filter((other) => other !== slot), slot] : [slot]
      failure = same
      const isItsOwn = alike.length > 2 &&
        (yield* PoolCore.step(
          core,
          (before, at) => Corroboration.acquit(config, before, alike, call.model, call.startedAt, at)
        ))
      if (isItsOwn) return yield* tried.exit
    }
    // An attempt that ran for long may have used up the budget by itself: its fault still earns one more, at once.
    const long = !graced && now - tried.record.startedAt > graceMillis
    let spentBudget: boolean = now >= call.budgetEnd
    avoid = avoid.includes(tried.record.slot) ? avoid : [...avoid, tried.record.slot]
    const isRetry = decision._tag === "BackOff" || (decision._tag === "Rotate" && decision.retry)
    // While the pool tries whether the trouble is over, the call waits its turn, which costs nothing; in an outage it gets
    // back what it had paid.
    const trial = PoolState.trialOf(yield* Ref.get(state), call.model)
    const parks = trial !== undefined &&
      (trial._tag === "Outage" ? Fault.isProviderFault(tried.fault) : tried.fault.kind === "RateLimited")
    if (parks) avoid = []
    if (parks && trial._tag === "Suspicion") progress = before
    if (parks && trial._tag === "Outage") {
      const returned = used
      used = 0
      stepper = RetryPolicy.start(settings.retry)
      progress = RetryDecision.initial
      yield* Ref.update(state, (current) => Leasing.returnTokens(config, current, returned))
    }
    if (isRetry && parks && !spentBudget) {
      const retrying = { startedAt: call.startedAt, waitMillis: undefined, fault: tried.fault }
      const next = yield* RetryPolicy.step(stepper, MonotonicTime.nowOf(clock), retrying)
      // Who may not be sent again at all need not wait.
      if (next._tag === "Done") return yield* next.outOfBudget ? outOfBudget("policy") : tried.exit
    } else if (isRetry && !spentBudget) {
      const began = MonotonicTime.nowOf(clock)
      const wait = yield* Ref.modify(state, (before) => {
        const spent = Leasing.spendToken(config, before, began, call.budgetEnd)
        return [spent.waitMillis, spent.state]
      })
      if (wait > 0) yield* denied("tokens")
      if (wait > MonotonicTime.longestSleep) return yield* tried.exit
      if (wait > 0) {
        yield* work.restore(Effect.sleep(wait)).pipe(
          Effect.onInterrupt(() => Ref.update(state, (before) => Leasing.returnTokens(config, before, 1)))
        )
      }
      used++
      const at = MonotonicTime.nowOf(clock)
      const retrying: RetryPolicy.Retrying = {
        startedAt: call.startedAt,
        // A wait binds the key that was told it. Only where no other key can do better, it binds the call.
        waitMillis: tried.fault.kind === "RateLimited" && !tried.fault.failover ? tried.fault.waitMillis : undefined,
        fault: tried.fault
      }
      const next = yield* RetryPolicy.step(stepper, at, retrying)
      if (next._tag === "Done") return yield* next.outOfBudget ? outOfBudget("policy") : tried.exit
      stepper = next.stepper
      const atOnce = decision._tag === "Rotate" &&
        PoolState.hasOther(
          config,
          yield* Ref.get(state),
          { model: call.model, only: among().only, tokens: call.tokens },
          avoid,
          at
        )
      spentBudget = !atOnce && next.at > call.budgetEnd
      if (!atOnce && !spentBudget && next.at > at) {
        yield* work.restore(Effect.sleep(Math.min(Math.ceil(next.at - at), MonotonicTime.longestSleep)))
      }
    }
    if (spentBudget && !long) return yield* outOfBudget("call")
    graced = graced || spentBudget
    const isElsewhere = decision._tag === "Elsewhere"
    if (isElsewhere && decision.where === "untried-group") without.add(ApiKey.groupOf(tried.record.key))
    const elsewhere = isElsewhere && decision.where !== "untried-group" ? decision.where : undefined
    const wanted = elsewhere === undefined
      ? among()
      : { only: both(among().only, suited(elsewhere, tried.record.key)) }
    const { only } = wanted
    const random = config.strategy.randomised ? yield* Random.next : 0
    const waitingSince = MonotonicTime.nowOf(clock)
    const acquired = yield* Acquisition.acquire(
      core,
      work.restore,
      call,
      {
        call: number,
        model: call.model,
        operation: call.operation,
        timed: call.timed,
        tokens: call.tokens,
        avoid,
        ...wanted,
        affinity: call.affinity,
        rotation: true,
        random
      },
      elsewhere !== undefined || spentBudget ? waitingSince : OngoingCall.waitUntil(call, waitingSince)
    )
    if ("_tag" in acquired) {
      if (parks && !acquired.closed && MonotonicTime.nowOf(clock) >= call.budgetEnd) return yield* outOfBudget("call")
      return yield* isElsewhere ? tried.exit : Acquisition.refusal(core, call, acquired, only)
    }
    if (acquired.slot !== tried.record.slot && telemetry.listened()) {
      yield* telemetry.publish([{
        _tag: "key.rotated",
        ...HeldLease.attemptOf(core, acquired, tried.attempt + 1, acquired.startedAt),
        fromKeyId: tried.record.key.id,
        reason: tried.fault.kind
      }])
    }
    const result = yield* attempt(
      core,
      call,
      work,
      acquired,
      tried.attempt + 1,
      waitingSince,
      progress.aborted,
      yield* passedOver(core, call, acquired, only)
    )
    if (!(result instanceof Again)) return result
    tried = result
  }
})

/** Which keys may serve a request that this one could not. */
const suited = (where: "other-group" | "higher-limit", failed: ApiKey.ApiKey) => (key: ApiKey.ApiKey): boolean => {
  if (where === "other-group") return ApiKey.groupOf(key) !== ApiKey.groupOf(failed)
  return (key.limits.tokensPerMinute ?? 0) > (failed.limits.tokensPerMinute ?? 0)
}

const both = (a: PoolState.Among["only"], b: (key: ApiKey.ApiKey) => boolean): PoolState.Among["only"] =>
  a === undefined ? b : (key) => a(key) && b(key)

const anyKey: PoolState.Among = { only: undefined }

const noResources: ReadonlyArray<string> = []

/** An attempt longer than this earns one more when it used up the budget. */
const graceMillis = 30_000
