/**
 * The shell around a pool's one Ref: the clock of its steps, and what becomes of what a step says. The rooms above turn
 * calls, streams, controls and the store into steps on it.
 *
 * @since 0.1.0
 */
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import { identity } from "effect/Function"
import * as HashMap from "effect/HashMap"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as PubSub from "effect/PubSub"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as Alarms from "./Alarms.js"
import type * as AttemptTimeout from "./AttemptTimeout.js"
import * as CircuitEvents from "./CircuitEvents.js"
import type * as Limits from "./Limits.js"
import * as MonotonicTime from "./MonotonicTime.js"
import type * as Outcome from "./Outcome.js"
import * as PoolKeys from "./PoolKeys.js"
import type * as PoolSettings from "./PoolSettings.js"
import * as PoolState from "./PoolState.js"
import * as PoolStore from "./PoolStore.js"
import type * as RateLimit from "./RateLimit.js"
import * as Settling from "./Settling.js"
import type * as SharedPool from "./SharedPool.js"
import type * as SharedState from "./SharedState.js"
import * as Telemetry from "./Telemetry.js"
import * as WaitingLine from "./WaitingLine.js"

/**
 * What all parts of a running pool share; made once per pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface PoolCore {
  readonly settings: PoolSettings.Resolved
  /** That of `settings`: what the steps need to know. */
  readonly config: PoolState.Config
  readonly telemetry: Telemetry.Service
  readonly store: PoolStore.Service
  readonly state: Ref.Ref<PoolState.PoolState>
  readonly startedAt: number
  /** Says that what a snapshot shows has changed. */
  readonly ticks: PubSub.PubSub<void>
  readonly circuits: PubSub.PubSub<CircuitEvents.CircuitEvent>
  /** Says that somebody waits, or that who waits may be served at another instant than before. */
  readonly wake: Queue.Queue<void>
  /** Says that there is something to save. */
  readonly dirty: Queue.Queue<void>
  /** Says that it became known where some resource is stored. */
  readonly learned: Queue.Queue<void>
  /** Whether nothing has ended since uses were looked at; then what ends next says so through `used`. */
  readonly unused: MutableRef.MutableRef<boolean>
  readonly used: Queue.Queue<void>
  /** What calls wait for, where the pool is there before its record is. */
  readonly loaded?: Effect.Effect<void> | undefined
  /** The attempts whose answers belong to nobody yet, by lease, as far as their time is limited; each of them comes and goes. */
  readonly running: Map<number, RunningAttempt>
  /** Whether nobody looks after these; then the next one says so through `begun`. */
  readonly unwatched: MutableRef.MutableRef<boolean>
  readonly begun: Queue.Queue<void>
  /** When the calls that are not answered by then get a second attempt beside their first. */
  readonly alarms: Alarms.Alarms
  /** Who waits until a retired key has left, by its id. */
  readonly drains: Ref.Ref<HashMap.HashMap<string, Deferred.Deferred<void>>>
  /** What the pool has in common with others; absent where it is alone. */
  readonly sharing: Sharing | undefined
}

/**
 * What a pool has in common with others.
 *
 * @since 0.1.0
 * @category models
 */
export interface Sharing {
  readonly port: SharedPool.SharedPool
  readonly link: Ref.Ref<Link>
  /** Done once it is known whether the others can be reached. */
  readonly met: Deferred.Deferred<void>
  /** Says that something may have happened of which the others must hear. */
  readonly changed: Queue.Queue<void>
  /** What was done by hand, and whose probes have ended: told, in this order, with what has changed. */
  readonly resets: Ref.Ref<ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Reset" }>>>
  readonly endings: Ref.Ref<ReadonlyArray<SharedLease>>
  /** The leases that take of what is shared, by id; each of them comes and goes. */
  readonly leases: Map<number, SharedLease>
  /** What others must hear of that was taken while this pool joined them; absent while it does not. */
  readonly late: MutableRef.MutableRef<
    ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Taken" }>> | undefined
  >
  /** How often something was given back, and of each subject when last. */
  readonly freed: Ref.Ref<{ readonly count: number; readonly last: HashMap.HashMap<string, number> }>
  /** Whether the last claim got its answer, and where a change of that is told. */
  readonly answers: Ref.Ref<boolean>
  readonly answering: Queue.Queue<boolean>
}

/**
 * How a pool and the others stand.
 *
 * @since 0.1.0
 * @category models
 */
export interface Link {
  /** Whether claims are decided where all meet. */
  readonly joined: boolean
  readonly members: number
  /** Since when it has been on its own. */
  readonly awaySince: number
  readonly versions: SharedState.Versions
  /** Whether what could not be told is about to be told again. */
  readonly retelling: boolean
  /** The pool as far as the others know of it; nothing of it before they have met. */
  readonly told: PoolState.PoolState | undefined
}

/**
 * A lease that takes of what is shared. Without a ticket it was given while nobody could decide.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedLease {
  readonly claim: SharedPool.Claim
  readonly ticket: SharedPool.Ticket | undefined
  readonly answered: boolean
  readonly usage?: RateLimit.Usage | undefined
}

/**
 * An attempt that runs, and how to abort it where that can be done.
 *
 * @since 0.1.0
 * @category models
 */
export interface RunningAttempt extends AttemptTimeout.Running {
  abortable: boolean
  abort: () => void
  /** Whether it took too long and was aborted. */
  overdue: boolean
}

/**
 * The core of a pool with these settings; nothing runs yet.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: PoolSettings.Resolved
): Effect.Effect<PoolCore, never, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore> =>
  Effect.gen(function*() {
    const { config } = settings
    const telemetry = yield* Telemetry.Telemetry
    const store = yield* PoolStore.PoolStore
    const startedAt = yield* MonotonicTime.now
    const state = yield* Ref.make(PoolKeys.make(config, settings.keys, startedAt))
    const ticks = yield* Effect.acquireRelease(PubSub.sliding<void>(1), PubSub.shutdown)
    const circuits = yield* Effect.acquireRelease(
      PubSub.sliding<CircuitEvents.CircuitEvent>(256),
      PubSub.shutdown
    )
    const wake = yield* Queue.sliding<void>(1)
    const dirty = yield* Queue.sliding<void>(1)
    const learned = yield* Queue.sliding<void>(1)
    const begun = yield* Queue.sliding<void>(1)
    const used = yield* Queue.sliding<void>(1)
    const alarms = yield* Alarms.make
    const drains = yield* Ref.make(HashMap.empty<string, Deferred.Deferred<void>>())
    const sharing = store.share === undefined
      ? undefined
      : yield* Effect.flatMap(store.share(config.pool), (port) => makeSharing(port, startedAt))
    return {
      settings,
      config,
      telemetry,
      store,
      state,
      startedAt,
      ticks,
      circuits,
      wake,
      dirty,
      learned,
      unused: MutableRef.make(false),
      used,
      running: new Map(),
      unwatched: MutableRef.make(true),
      begun,
      alarms,
      drains,
      sharing
    }
  })

const makeSharing = (port: SharedPool.SharedPool, now: number): Effect.Effect<Sharing> =>
  Effect.gen(function*() {
    const link = yield* Ref.make<Link>({
      joined: false,
      members: 1,
      awaySince: now,
      versions: HashMap.empty(),
      retelling: false,
      told: undefined
    })
    return {
      port: tolerant(yield* bounded(port), link),
      link,
      met: yield* Deferred.make<void>(),
      changed: yield* Queue.sliding<void>(1),
      resets: yield* Ref.make<ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Reset" }>>>([]),
      endings: yield* Ref.make<ReadonlyArray<SharedLease>>([]),
      leases: new Map(),
      late: MutableRef.make<ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Taken" }>> | undefined>(
        undefined
      ),
      freed: yield* Ref.make({ count: 0, last: HashMap.empty<string, number>() }),
      answers: yield* Ref.make(true),
      answering: yield* Queue.sliding<boolean>(1)
    }
  })

/**
 * The same port, of which no claim can hold up a call for longer than it says.
 *
 * @since 0.1.0
 * @category constructors
 */
export const bounded = (port: SharedPool.SharedPool): Effect.Effect<SharedPool.SharedPool> =>
  Effect.map(Ref.make(-Infinity), (restsUntil) => {
    const most = Duration.toMillis(port.claimTimeout ?? claimMillis)
    if (most === Infinity) return port
    const ask = (claim: SharedPool.Claim): Effect.Effect<SharedPool.Answer> =>
      Effect.flatMap(Effect.forkDaemon(Effect.interruptible(Effect.suspend(() => port.claim(claim)))), (asking) => {
        // Nobody waits for it any more; one that is never answered must not stay.
        const giveBack = Effect.forkDaemon(
          Effect.timeoutOption(Effect.interruptible(Fiber.await(asking)), lostMillis).pipe(
            Effect.flatMap(Option.match({ onNone: () => Fiber.interrupt(asking), onSome: Effect.succeed })),
            Effect.flatMap((exit) =>
              Exit.isSuccess(exit) && exit.value._tag === "Granted"
                ? port.settle(exit.value.ticket, { _tag: "Unsent" })
                : Effect.void
            )
          )
        )
        const rest = Effect.flatMap(MonotonicTime.now, (now) => Ref.set(restsUntil, now + restMillis))
        return Effect.interruptible(Effect.timeoutOption(Fiber.join(asking), most)).pipe(
          Effect.onInterrupt(() => giveBack),
          Effect.flatMap(Option.match({
            onNone: () => Effect.as(Effect.zipRight(giveBack, rest), away),
            onSome: (answer) => Effect.succeed(answer)
          }))
        )
      })
    return {
      ...port,
      claim: (claim) =>
        Effect.flatMap(
          Effect.zip(Ref.get(restsUntil), MonotonicTime.now),
          ([until, now]) => now < until ? Effect.succeed(away) : ask(claim)
        )
    }
  })

/** How long a claim may take, and after how long one is asked again that was not answered; who is that late never answers. */
const claimMillis = 25
const restMillis = 1_000
const lostMillis = 60_000

/** An engine that is broken, and not only away, fails no call either. */
const tolerant = (port: SharedPool.SharedPool, link: Ref.Ref<Link>): SharedPool.SharedPool => ({
  news: Stream.catchAllCause(port.news, () =>
    Stream.fromEffect(
      Effect.map(Ref.get(link), ({ members }): SharedPool.News => ({
        _tag: "Away",
        members,
        problem: "it failed unexpectedly"
      }))
    )),
  tell: (notices) => Effect.catchAllCause(Effect.suspend(() => port.tell(notices)), () => Effect.succeed(away)),
  claim: (claim) => Effect.catchAllCause(Effect.suspend(() => port.claim(claim)), () => Effect.succeed(away)),
  settle: (ticket, settled) =>
    Effect.catchAllCause(Effect.suspend(() => port.settle(ticket, settled)), () => Effect.void)
})

const away = { _tag: "Away" } as const

// --------------------------------------------------------------------------------------------------------------- steps

/**
 * Makes a step that may change the state and tells something beside, and serves whoever can be served after it.
 *
 * @since 0.1.0
 * @category steps
 */
export const modify = <A>(
  core: PoolCore,
  f: (state: PoolState.PoolState, now: number) => readonly [A, PoolState.Changed | undefined]
): Effect.Effect<A> =>
  Effect.uninterruptible(Effect.clockWith((clock) => {
    const now = MonotonicTime.nowOf(clock)
    return Effect.flatMap(
      Ref.modify(core.state, (before): readonly [Effect.Effect<A>, PoolState.PoolState] => {
        const [result, changed] = f(before, now)
        if (changed === undefined) return [Effect.succeed(result), before]
        const served = WaitingLine.thenDispatch(core.config, changed, now)
        return [Effect.as(announce(core, before, served), result), served.state]
      }),
      identity
    )
  }))

/**
 * As `modify`, for a step that only changes the state; false if there was none.
 *
 * @since 0.1.0
 * @category steps
 */
export const step = (
  core: PoolCore,
  f: (state: PoolState.PoolState, now: number) => PoolState.Changed | undefined
): Effect.Effect<boolean> =>
  modify(core, (before, now) => {
    const changed = f(before, now)
    return [changed !== undefined, changed]
  })

/**
 * Takes in what a lease's attempt said; `extra` are the events of the attempt itself, which come first.
 *
 * @since 0.1.0
 * @category steps
 */
export const settle = (
  core: PoolCore,
  record: PoolState.LeaseRecord,
  clock: Clock.Clock,
  outcome: Outcome.Outcome | undefined,
  end: boolean,
  random: number,
  extra: (now: number) => ReadonlyArray<Telemetry.Unnumbered>,
  heard?: Limits.Heard
): Effect.Effect<void> => {
  const now = MonotonicTime.nowOf(clock)
  if (end && MutableRef.get(core.unused)) {
    MutableRef.set(core.unused, false)
    core.used.unsafeOffer(undefined)
  }
  return Effect.flatMap(
    Ref.modify(core.state, (before): readonly [Effect.Effect<void> | undefined, PoolState.PoolState] => {
      const changed = Settling.settle(core.config, before, record, outcome, end, now, random, heard)
      // Nothing but the key's own numbers, or those of its limits: the usual case.
      if (!PoolState.hasMoved(before, changed.state) && before.rest.waiting === 0 && changed.events.length === 0) {
        return [undefined, changed.state]
      }
      const served = WaitingLine.thenDispatch(core.config, changed, now)
      return [
        Effect.suspend(() => announce(core, before, { ...served, events: [...extra(now), ...served.events] })),
        served.state
      ]
    }),
    (announced) => {
      if (announced !== undefined) return announced
      const events = extra(now)
      return events.length === 0 ? Effect.void : core.telemetry.publish(events)
    }
  )
}

// ------------------------------------------------------------------------------------------------------ what they say

/**
 * Publishes what a step says, answers those it served, and wakes whoever must look again. `before` is the state before
 * the step; without it something has changed.
 *
 * @since 0.1.0
 * @category steps
 */
export const announce = (
  core: PoolCore,
  before: PoolState.PoolState | undefined,
  { answers, events, state: after }: WaitingLine.Dispatched
): Effect.Effect<void> => {
  let effect: Effect.Effect<void> = Effect.void
  for (const answer of answers) {
    const lease = answer._tag === "Granted" ? answer.lease : undefined
    effect = Effect.zipRight(effect, Deferred.succeed(answer.waiter.answer, lease))
  }
  if (events.length > 0) effect = Effect.zipRight(effect, core.telemetry.publish(events))
  for (const event of events) {
    if (CircuitEvents.isCircuitEvent(event)) effect = Effect.zipRight(effect, tell(core.circuits, event))
    if (event._tag === "key.removed") effect = Effect.zipRight(effect, drained(core, event.keyId))
  }
  if (before === undefined || PoolState.hasMoved(before, after) || events.some((event) => event._tag === "key.added")) {
    effect = Effect.zipRight(effect, Effect.zipRight(tell(core.ticks, undefined), Queue.offer(core.dirty, undefined)))
  }
  if (core.sharing !== undefined && (events.length > 0 || before === undefined || PoolState.hasMoved(before, after))) {
    effect = Effect.zipRight(effect, Queue.offer(core.sharing.changed, undefined))
  }
  if (before !== undefined && hasLearned(before, after)) {
    effect = Effect.zipRight(effect, Queue.offer(core.learned, undefined))
  }
  return after.rest.waiting > 0 ? Effect.zipRight(effect, Queue.offer(core.wake, undefined)) : effect
}

const hasLearned = ({ rest: before }: PoolState.PoolState, { rest: after }: PoolState.PoolState): boolean =>
  before.affinity.resources.changes !== after.affinity.resources.changes

/**
 * Tells those who wait for a key's end that they need wait no longer.
 *
 * @since 0.1.0
 * @category steps
 */
export const drained = (core: PoolCore, id: string): Effect.Effect<void> =>
  Effect.flatMap(
    Ref.modify(core.drains, (map) => [HashMap.get(map, id), HashMap.remove(map, id)] as const),
    Option.match({ onNone: () => Effect.void, onSome: (done) => Effect.asVoid(Deferred.succeed(done, undefined)) })
  )

/** Publishes, unless nobody can be told any more: a PubSub that is shut down would interrupt whoever publishes. */
const tell = <A>(hub: PubSub.PubSub<A>, message: A): Effect.Effect<void> =>
  Effect.flatMap(PubSub.isShutdown(hub), (down) => down ? Effect.void : Effect.asVoid(PubSub.publish(hub, message)))
