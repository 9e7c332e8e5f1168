/**
 * A key for the next attempt of a call, at once or after a wait; or the error that says why there is none.
 *
 * @since 0.1.0
 */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as FiberId from "effect/FiberId"
import * as MutableRef from "effect/MutableRef"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import * as Claims from "./Claims.js"
import * as Homes from "./Homes.js"
import { AllKeysExhausted, PoolClosed } from "./KeymeshError.js"
import type * as Limits from "./Limits.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as OngoingCall from "./OngoingCall.js"
import * as Outcome from "./Outcome.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolState from "./PoolState.js"
import * as Sharing from "./Sharing.js"
import * as WaitingLine from "./WaitingLine.js"

/**
 * Makes interruptible again what may be, as `Effect.uninterruptibleMask` gives it.
 *
 * @since 0.1.0
 * @category models
 */
export type Restore = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>

/**
 * No lease: why is found out when the error is made.
 *
 * @since 0.1.0
 * @category models
 */
export interface Refused {
  readonly _tag: "Refused"
  readonly call: number
  readonly closed: boolean
}

/**
 * A key for the first attempt of a call that belongs with others: its conversation's own is waited for a little, if that
 * is of use; then any may serve.
 *
 * @since 0.1.0
 * @category steps
 */
export const acquireTogether = (
  core: PoolCore.PoolCore,
  restore: Restore,
  call: OngoingCall.OngoingCall,
  request: PoolState.Request
): Effect.Effect<PoolState.LeaseRecord | Refused> =>
  Effect.flatMap(Ref.get(core.state), (state) => {
    const until = OngoingCall.waitUntil(call, call.startedAt)
    const home = Homes.awaited(core.config, state, request, call.startedAt)
    if (home === undefined) return acquire(core, restore, call, request, until)
    return Effect.flatMap(
      acquire(core, restore, call, { ...request, ...home }, Math.min(until, call.startedAt + Homes.patienceMillis)),
      (acquired) =>
        "_tag" in acquired && !acquired.closed
          ? acquire(core, restore, call, { ...request, call: acquired.call }, until)
          : Effect.succeed(acquired)
    )
  })

/**
 * A key for the next attempt of a call: at once, or after waiting until `until` at most. Runs uninterruptibly but for
 * the wait.
 *
 * @since 0.1.0
 * @category steps
 */
export const acquire = (
  core: PoolCore.PoolCore,
  restore: Restore,
  call: OngoingCall.OngoingCall,
  request: PoolState.Request,
  until: number
): Effect.Effect<PoolState.LeaseRecord | Refused> => {
  const { sharing } = core
  const acquired = acquireHere(core, restore, call, request, until)
  return sharing === undefined
    ? acquired
    : Effect.flatMap(
      acquired,
      (acquired) =>
        "_tag" in acquired
          ? Effect.succeed(acquired)
          : claimed(core, sharing, restore, call, request, until, acquired)
    )
}

/**
 * A lease with what it needs of what all share; another, if it was refused that.
 *
 * @since 0.1.0
 * @category steps
 */
export const claimed = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  restore: Restore,
  call: OngoingCall.OngoingCall,
  request: PoolState.Request,
  until: number,
  record: PoolState.LeaseRecord
): Effect.Effect<PoolState.LeaseRecord | Refused> =>
  Effect.flatMap(
    Sharing.claim(core, sharing, restore, record),
    (granted) =>
      granted ? Effect.succeed(record) : acquire(core, restore, call, { ...request, call: record.call }, until)
  )

/** A key by what is known here. */
const acquireHere = (
  core: PoolCore.PoolCore,
  restore: Restore,
  call: OngoingCall.OngoingCall,
  request: PoolState.Request,
  until: number
): Effect.Effect<PoolState.LeaseRecord | Refused> => {
  const now = MonotonicTime.nowOf(call.clock)
  const wanted: PoolState.Request = {
    ...request,
    began: call.startedAt,
    priority: call.priority,
    ends: Math.min(call.budgetEnd, call.deadlineEnd)
  }
  const answer = Deferred.unsafeMake<PoolState.LeaseRecord | undefined>(FiberId.none)
  return Effect.flatMap(
    Ref.modify(core.state, (before) => {
      const acquired = WaitingLine.acquire(core.config, before, wanted, { until, answer }, now)
      return [{ before, acquired }, acquired.state]
    }),
    ({ acquired, before }): Effect.Effect<PoolState.LeaseRecord | Refused> => {
      const { outcome, state: after } = acquired
      const told = PoolCore.announce(core, before, acquired)
      if (outcome === "closed") return Effect.as(told, { _tag: "Refused", call: request.call, closed: true })
      if (outcome === "refused" || outcome === "full") {
        const number = request.call === 0 ? after.calls : request.call
        return Effect.zipRight(told, refused(restore, call, { _tag: "Refused", call: number, closed: false }))
      }
      if ("slot" in outcome) return Effect.as(told, outcome)
      MutableRef.set(call.number, outcome.request.call)
      return told.pipe(
        Effect.zipRight(tellWaiting(core, outcome, after, now)),
        Effect.zipRight(Queue.offer(core.wake, undefined)),
        Effect.zipRight(Effect.onInterrupt(restore(Deferred.await(answer)), () => abandon(core, call, outcome))),
        Effect.flatMap((record): Effect.Effect<PoolState.LeaseRecord | Refused> =>
          record !== undefined
            ? Effect.succeed(record)
            : Effect.flatMap(Ref.get(core.state), ({ rest }) =>
              refused(restore, call, { _tag: "Refused", call: outcome.request.call, closed: rest.closed }))
        )
      )
    }
  )
}

/** At its end a deadline speaks for itself, though its timer be late: it is given a little time for that. */
const refused = (restore: Restore, { clock, deadlineEnd }: OngoingCall.OngoingCall, refused: Refused) =>
  refused.closed || MonotonicTime.nowOf(clock) < deadlineEnd
    ? Effect.succeed(refused)
    : Effect.as(restore(Effect.sleep(lateMillis)), refused)

/** How late timers are at most in a process that is busy, but alive. */
const lateMillis = 1_000

/**
 * Why a call got no key, as its error; `only` are the keys that could serve it at all, absent: all.
 *
 * @since 0.1.0
 * @category errors
 */
export const refusal = (
  { config, state, telemetry }: PoolCore.PoolCore,
  call: OngoingCall.OngoingCall,
  refused: Refused,
  only?: PoolState.Request["only"]
): Effect.Effect<never, AllKeysExhausted | PoolClosed> =>
  Effect.flatMap(Ref.get(state), (current): Effect.Effect<never, AllKeysExhausted | PoolClosed> => {
    const now = MonotonicTime.nowOf(call.clock)
    MutableRef.set(call.number, refused.call)
    const trail = MutableRef.get(call.trail)
    if (refused.closed) return new PoolClosed({ pool: config.pool, trail })
    const request = { model: call.model, only, tokens: call.tokens }
    const { counts, reasons } = PoolState.explain(config, current, request, now, undefined, "affinity")
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

const tellWaiting = (
  { config, telemetry }: PoolCore.PoolCore,
  { request }: PoolState.Waiter,
  after: PoolState.PoolState,
  now: number
): Effect.Effect<void> => {
  if (!telemetry.listened()) return Effect.void
  const { at } = PoolState.opening(config, after, request, now)
  return telemetry.publish([{
    _tag: "call.waiting",
    pool: config.pool,
    at: now,
    call: request.call,
    waiting: after.rest.waiting,
    ...(request.model === undefined ? {} : { model: request.model }),
    ...(Number.isFinite(at) ? { until: at } : {})
  }])
}

/** What was never sent takes nothing of a limit. */
const unsent: Limits.Heard = { answered: true, sent: false, announced: [], usage: undefined }

/** A waiter that was interrupted leaves the queue; a key that it was given meanwhile goes to the next one. */
const abandon = (
  core: PoolCore.PoolCore,
  { clock }: OngoingCall.OngoingCall,
  waiter: PoolState.Waiter
): Effect.Effect<unknown> =>
  Effect.flatMap(
    Ref.modify(core.state, (before) => [
      WaitingLine.isWaiting(before, waiter),
      WaitingLine.withoutWaiter(before, waiter)
    ]),
    (waiting): Effect.Effect<unknown> =>
      waiting ? Effect.void : Effect.flatMap(
        Deferred.await(waiter.answer),
        (record): Effect.Effect<unknown> =>
          record === undefined
            ? Effect.void
            : core.sharing === undefined
            ? PoolCore.settle(core, record, clock, Outcome.ignored, true, 0, () => PoolState.noEvents, unsent)
            : PoolCore.step(core, (before, now) => Claims.unsent(core.config, before, record, now))
      )
  )
