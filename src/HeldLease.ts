/**
 * A lease in its user's hands: what its attempt says, and when it ends.
 *
 * @since 0.1.0
 */
import type * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as MutableRef from "effect/MutableRef"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as Affinity from "./Affinity.js"
import type * as AnnouncedLimit from "./AnnouncedLimit.js"
import * as ApiKey from "./ApiKey.js"
import type * as HedgedAttempt from "./HedgedAttempt.js"
import * as Homes from "./Homes.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as Outcome from "./Outcome.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolState from "./PoolState.js"
import * as RateLimit from "./RateLimit.js"
import * as Sharing from "./Sharing.js"
import type * as Telemetry from "./Telemetry.js"

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
  /** Whether it runs beside another attempt of its call, which takes long. */
  readonly hedge: boolean
  readonly call: number
  readonly model: string | undefined
  /**
   * Says what the attempt's answer means, as soon as it is known. The first one counts; a fault after a success is
   * taken in as a late one, also when the lease has ended: a body may break off that is read later.
   */
  readonly commit: (outcome: Outcome.Outcome) => Effect.Effect<void>
  /** Tells what the answer's headers announce of limits, before `commit`: it is taken in with it. */
  readonly announced: (limits: ReadonlyArray<AnnouncedLimit.Said>) => void
  /**
   * Tells how many tokens the attempt used, before `end`: limits of tokens then count these, not the estimate. What is
   * negative or no finite number is not taken in.
   */
  readonly used: (usage: RateLimit.Usage) => void
  /**
   * Whether limits count the tokens of the attempt, so that it makes a difference what is told by `used`; `undefined`
   * where it took nothing of any limit.
   */
  readonly metered: Effect.Effect<boolean> | undefined
  /**
   * Says that the answer names these stored resources, by the provider's ids: files, batches, stored answers. Calls that
   * name one of them go to the key's group from now on (`RunOptions.resources`).
   */
  readonly remember: (resources: ReadonlyArray<string>) => Effect.Effect<void>
  /**
   * Tells how to abort the attempt, which is called once if no outcome was committed within the attempt timeout. Aborting
   * must end the attempt; the pool then takes it for a `Timeout`. Does nothing once an outcome was committed.
   */
  readonly abortWith: (abort: () => void) => void
  /** Gives the key back; a lease that was never committed then counts as ignored. Later calls do nothing. */
  readonly end: Effect.Effect<void>
  /**
   * Ends the lease once its answer has gone unread for the pool's `streamIdle`; run it beside the reading. `idleSince`
   * tells since when nobody reads, in milliseconds of the pool's clock; `undefined` while a read is under way.
   */
  readonly endWhenIdle: (idleSince: () => number | undefined) => Effect.Effect<void>
}

/**
 * A lease with what only the pool may do: take in an outcome and, in the same step, end it.
 *
 * @since 0.1.0
 * @category models
 */
export interface HeldLease extends Lease {
  /** Whether its answer belongs to the caller already. */
  isCommitted(): boolean
  /** Says that the attempt begins: one that was never sent gives back what it took of limits. */
  begin(): void
  /** Whether the attempt took too long and was aborted. */
  isOverdue(): boolean
  /** Takes in an outcome; `lost`: another attempt of the call was answered first. */
  say(outcome: Outcome.Outcome, end: boolean, lost?: boolean): Effect.Effect<void>
}

/**
 * The lease as its user sees it, and with it what only the pool may do.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  core: PoolCore.PoolCore,
  record: PoolState.LeaseRecord,
  attempt: number,
  clock: Clock.Clock,
  aborted = 0,
  side?: HedgedAttempt.Side
): HeldLease => {
  const limit = core.config.attemptTimeout
  return new Held({
    core,
    record,
    attempt,
    clock,
    phase: MutableRef.make(begun),
    told: MutableRef.make(nothingTold),
    side,
    running: limit === undefined || (limit === "learned" && record.timed === undefined)
      ? undefined
      : { lease: record, aborted, abortable: false, abort: nothingToAbort, overdue: false }
  })
}

/** What there is of a lease. */
interface Parts {
  readonly core: PoolCore.PoolCore
  readonly record: PoolState.LeaseRecord
  readonly attempt: number
  readonly clock: Clock.Clock
  readonly phase: MutableRef.MutableRef<Phase>
  readonly told: MutableRef.MutableRef<Told>
  /** The race that it is in, if another attempt of its call may run beside it. */
  readonly side: HedgedAttempt.Side | undefined
  readonly running: PoolCore.RunningAttempt | undefined
}

/**
 * A lease as an object of few fields: one is made for each attempt, and most of what it can do is not asked of it. So its
 * functions are made when they are asked for; they need no `this`. Its parts are private, so that nothing prints them.
 */
class Held implements HeldLease {
  readonly id: number
  readonly key: ApiKey.ApiKey
  readonly attempt: number
  readonly call: number
  readonly model: string | undefined
  readonly #parts: Parts

  constructor(parts: Parts) {
    const { attempt, record } = parts
    this.id = record.id
    this.key = record.key
    this.attempt = attempt
    this.call = record.call
    this.model = record.model
    this.#parts = parts
  }

  get hedge(): boolean {
    return this.#parts.side !== undefined && this.attempt > 1
  }

  get announced() {
    const { told } = this.#parts
    return (announced: ReadonlyArray<AnnouncedLimit.Said>): void => {
      MutableRef.update(told, (before) => ({ ...before, announced }))
    }
  }

  get used() {
    const { told } = this.#parts
    return (usage: RateLimit.Usage): void => {
      // What is no amount tells nothing: the estimate counts.
      if (!RateLimit.isUsage(usage)) return
      MutableRef.update(told, (before) => ({ ...before, usage }))
    }
  }

  get metered() {
    const { core, record } = this.#parts
    const { model, party } = record.reserved ?? {}
    return takes(party) || takes(model)
      ? Effect.map(Ref.get(core.state), (state) => PoolState.isMetered(state, record.model))
      : undefined
  }

  get abortWith() {
    const { running } = this.#parts
    return (abort: () => void): void => {
      if (running === undefined) return
      running.abort = abort
      running.abortable = true
    }
  }

  get remember() {
    const parts = this.#parts
    return (resources: ReadonlyArray<string>): Effect.Effect<void> => remember(parts, resources)
  }

  get commit() {
    const parts = this.#parts
    return (outcome: Outcome.Outcome): Effect.Effect<void> =>
      Effect.uninterruptible(
        Effect.suspend(() =>
          outcome._tag === "Success" && parts.side?.claim() === false ? Effect.void : say(parts, outcome, false)
        )
      )
  }

  get end(): Effect.Effect<void> {
    return Effect.uninterruptible(say(this.#parts, Outcome.ignored, true))
  }

  get endWhenIdle() {
    const { end } = this
    const { settings } = this.#parts.core
    return (idleSince: () => number | undefined): Effect.Effect<void> =>
      endWhenIdle(end, idleSince, settings.streamIdleMillis)
  }

  isCommitted(): boolean {
    const { ended, said } = MutableRef.get(this.#parts.phase)
    return said === "success" && !ended
  }

  isOverdue(): boolean {
    return this.#parts.running?.overdue === true
  }

  begin(): void {
    const { core, record, running, told } = this.#parts
    MutableRef.set(told, begunOnly)
    if (running === undefined) return
    core.running.set(record.id, running)
    if (!MutableRef.get(core.unwatched)) return
    MutableRef.set(core.unwatched, false)
    core.begun.unsafeOffer(undefined)
  }

  say(outcome: Outcome.Outcome, end: boolean, lost = false): Effect.Effect<void> {
    return say(this.#parts, outcome, end, lost)
  }
}

/** Whether what was taken of a limit has tokens in it. */
const takes = (taken: RateLimit.Reservation | undefined): boolean => taken !== undefined && taken.input + taken.most > 0

/** Takes in what is said, if it still counts, and ends the lease if `end`. */
const say = (
  { attempt, clock, core, phase, record, running, told }: Parts,
  outcome: Outcome.Outcome,
  end: boolean,
  lost = false
): Effect.Effect<void> =>
  Effect.suspend(() => {
    const { ended, said } = MutableRef.get(phase)
    const late = said === "success" && outcome._tag === "Fault"
    const counted = late || (said === "nothing" && !ended) ? outcome : undefined
    const ends = end && !ended
    if (counted === undefined && !ends) return Effect.void
    if (running !== undefined) core.running.delete(record.id)
    const { announced, begun, usage } = MutableRef.getAndSet(told, begunOnly)
    const heard = { answered: said === "nothing" && !ended, sent: begun, announced, usage, lost: lost && begun }
    MutableRef.set(phase, {
      ended: ended || ends,
      said: counted === undefined ? said : counted._tag === "Success" ? "success" : "else"
    })
    const taken = (random: number) =>
      PoolCore.settle(
        core,
        record,
        clock,
        counted,
        ends,
        random,
        (now) => counted === undefined ? PoolState.noEvents : outcomeEvents(core, record, attempt, counted, late, now),
        heard
      )
    const settled = counted?._tag === "Fault" ? Effect.flatMap(Random.next, taken) : taken(0)
    return core.sharing?.leases.has(record.id) === true
      ? Effect.zipRight(settled, Sharing.settled(core.sharing, record.id, heard, ends))
      : settled
  })

const remember = ({ core, record }: Parts, resources: ReadonlyArray<string>): Effect.Effect<void> =>
  resources.length === 0 ? Effect.void : Effect.asVoid(
    PoolCore.step(core, (state, now) => ({
      state: Homes.learn(
        state,
        resources.map(Affinity.nameOf),
        // The key may have been given a group meanwhile.
        ApiKey.groupOf(PoolState.find(state, record.key.id)?.key ?? record.key),
        now
      ),
      events: PoolState.noEvents
    }))
  )

const nothingToAbort = () => {}

/** What was told of an attempt, and is not taken in yet. */
interface Told {
  readonly begun: boolean
  readonly announced: ReadonlyArray<AnnouncedLimit.Said>
  readonly usage: RateLimit.Usage | undefined
}

const nothingTold: Told = { begun: false, announced: [], usage: undefined }
const begunOnly: Told = { begun: true, announced: [], usage: undefined }

interface Phase {
  readonly said: "nothing" | "success" | "else"
  readonly ended: boolean
}

const begun: Phase = { said: "nothing", ended: false }

/** Ends a lease once nobody has read for `idleMillis`. */
const endWhenIdle = Effect.fnUntraced(function*(
  end: Effect.Effect<void>,
  idleSince: () => number | undefined,
  idleMillis: number
) {
  for (;;) {
    const now = yield* MonotonicTime.now
    const idle = now - (idleSince() ?? now)
    if (idle >= idleMillis) return yield* end
    yield* Effect.sleep(Math.min(MonotonicTime.longestSleep, Math.max(1, Math.ceil(idleMillis - idle))))
  }
})

// -------------------------------------------------------------------------------------------------------------- events

/**
 * What every event of an attempt tells.
 *
 * @since 0.1.0
 * @category events
 */
export const attemptOf = (core: PoolCore.PoolCore, record: PoolState.LeaseRecord, attempt: number, at: number) => ({
  pool: core.config.pool,
  at,
  keyId: record.key.id,
  label: record.key.label,
  call: record.call,
  attempt,
  ...(record.model === undefined ? {} : { model: record.model }),
  ...(record.operation === undefined ? {} : { operation: record.operation })
})

/**
 * That an attempt begins; nothing while nobody listens.
 *
 * @since 0.1.0
 * @category events
 */
export const startEvents = (
  core: PoolCore.PoolCore,
  record: PoolState.LeaseRecord,
  attempt: number
): ReadonlyArray<Telemetry.Unnumbered> =>
  core.telemetry.listened()
    ? [{ _tag: "request.start", ...attemptOf(core, record, attempt, record.startedAt) }]
    : PoolState.noEvents

const outcomeEvents = (
  core: PoolCore.PoolCore,
  record: PoolState.LeaseRecord,
  attempt: number,
  outcome: Outcome.Outcome,
  late: boolean,
  now: number
): ReadonlyArray<Telemetry.Unnumbered> => {
  if (!core.telemetry.listened() || outcome._tag === "Ignored") return PoolState.noEvents
  const base = { ...attemptOf(core, record, attempt, now), durationMillis: now - record.startedAt }
  return outcome._tag === "Success"
    ? [{ _tag: "request.success", ...base }]
    : [{ _tag: "request.fail", ...base, fault: outcome.fault, late }]
}
