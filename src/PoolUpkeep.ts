/**
 * What a pool does by itself: it takes up what a store kept, wakes those who wait, and saves what has changed.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import type * as Scope from "effect/Scope"
import * as Affinity from "./Affinity.js"
import * as Alarms from "./Alarms.js"
import type * as ApiKey from "./ApiKey.js"
import * as AttemptTimeout from "./AttemptTimeout.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolRecord from "./PoolRecord.js"
import * as PoolState from "./PoolState.js"
import * as PoolStore from "./PoolStore.js"
import * as Sharing from "./Sharing.js"
import type * as Telemetry from "./Telemetry.js"
import * as WaitingLine from "./WaitingLine.js"

/**
 * How a pool fits into the program around it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings {
  /** Whether a pool is only there once its record is loaded, or at once, and then its first calls wait for the record. */
  readonly loads: "before" | "behind"
  /** Lets time pass, in milliseconds, for what the pool does by itself: a program need not go on for its sake. */
  readonly pause: (millis: number) => Effect.Effect<void>
}

/**
 * How the pools that are made inside fit into the program: by default they are there once they are loaded.
 *
 * @since 0.1.0
 * @category references
 */
export class Upkeep extends Context.Reference<Upkeep>()("effect-keymesh/PoolUpkeep", {
  defaultValue: (): Settings => ({ loads: "before", pause: Effect.sleep })
}) {}

/**
 * Loads what the store knows, tells of the keys, and starts the pool's fibers; when the scope closes, the pool closes and
 * is saved once more. Gives what calls must wait for, if the record is loaded behind.
 *
 * @since 0.1.0
 * @category fibers
 */
export const start = (core: PoolCore.PoolCore): Effect.Effect<Effect.Effect<void> | undefined, never, Scope.Scope> =>
  Effect.gen(function*() {
    const { keys, duplicates } = core.settings
    const scope = yield* Effect.scope
    const keeps = core.store !== PoolStore.none
    const { loads, pause } = yield* Upkeep
    const storeWorks = yield* Ref.make(true)
    const worded = yield* Ref.make<Worded>({ ended: 0, changes: 0, resources: [] })
    const found = yield* Ref.make<Went>("late")
    const { sharing } = core
    const loading = Effect.zipRight(
      keeps ? loadInto(core, storeWorks, found, storeMillis) : Effect.void,
      sharing === undefined ? Effect.void : meet(core, sharing, storeWorks, scope)
    )
    const behind = keeps && loads === "behind" ? yield* Effect.forkIn(loading, scope) : undefined
    if (behind === undefined) yield* loading
    // However the loading ends: it tells what was wrong by itself.
    const loaded = behind === undefined ? undefined : Effect.asVoid(Fiber.await(behind))
    yield* core.telemetry.publish([
      ...keys.map((key) => joined(core, key, false)),
      ...duplicates.map((key) => joined(core, key, true))
    ])
    yield* Effect.forkIn(Effect.interruptible(waker(core)), scope)
    yield* Effect.forkIn(Effect.interruptible(Alarms.keep(core.alarms, pause)), scope)
    if (core.config.attemptTimeout !== undefined) {
      yield* Effect.forkIn(Effect.interruptible(sweeper(core, pause)), scope)
    }
    if (keeps) {
      const saving = saver(core, storeWorks, found, worded, pause)
      yield* Effect.forkIn(Effect.interruptible(Effect.zipRight(loaded ?? Effect.void, saving)), scope)
      yield* Effect.forkIn(Effect.interruptible(gatherer(core)), scope)
      yield* Effect.forkIn(Effect.interruptible(accountant(core, worded, pause)), scope)
    }
    yield* Effect.addFinalizer(() =>
      Effect.gen(function*() {
        yield* PoolCore.step(core, (before) => ({
          state: { ...before, rest: { ...before.rest, closed: true } },
          events: PoolState.noEvents
        }))
        if (!keeps) return
        const isLoading = behind !== undefined && Option.isNone(yield* Fiber.poll(behind))
        if (isLoading) yield* Fiber.await(behind)
        // A record that did not come is asked for once more: without it nothing could be saved.
        else if ((yield* Ref.get(found)) === "late") yield* loadInto(core, storeWorks, found, storeMillis)
        yield* saved(core, storeWorks, found, worded)
      })
    )
    return loaded
  })

/** Lets the pool and others of its name know of each other, and waits a little until they do. */
const meet = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  storeWorks: Ref.Ref<boolean>,
  scope: Scope.Scope
): Effect.Effect<void> =>
  Effect.zipRight(
    Effect.forkIn(
      Effect.interruptible(Sharing.keep(core, sharing, {
        away: (problem) => degraded(core, storeWorks, `what is shared cannot be reached: ${problem}`),
        joined: Ref.set(storeWorks, true)
      })),
      scope
    ),
    Effect.asVoid(Effect.timeoutOption(Effect.interruptible(Deferred.await(sharing.met)), storeMillis))
  )

const joined = (core: PoolCore.PoolCore, key: ApiKey.ApiKey, duplicate: boolean): Telemetry.Unnumbered => ({
  _tag: "key.added",
  pool: core.config.pool,
  at: core.startedAt,
  keyId: key.id,
  label: key.label,
  duplicate
})

/** Looks at the queue again at each instant at which somebody in it may be served, or gives up. */
const waker = (core: PoolCore.PoolCore) =>
  Effect.forever(Effect.gen(function*() {
    const now = yield* MonotonicTime.now
    const at = WaitingLine.nextWake(core.config, yield* Ref.get(core.state), now)
    if (at === Infinity) return yield* Queue.take(core.wake)
    const due = Effect.as(Effect.sleep(Math.min(Math.max(1, Math.ceil(at - now)), MonotonicTime.longestSleep)), true)
    const slept = yield* Effect.raceFirst(due, Effect.as(Queue.take(core.wake), false))
    if (slept) yield* PoolCore.step(core, (state) => ({ state, events: PoolState.noEvents }))
  }))

/** Looks at the attempts that run, for as long as there are any, whenever one of them may have taken too long. */
const sweeper = (core: PoolCore.PoolCore, pause: Settings["pause"]) =>
  Effect.forever(Effect.gen(function*() {
    // Before it looks: what begins from now on says so.
    MutableRef.set(core.unwatched, true)
    const now = yield* MonotonicTime.now
    const swept = AttemptTimeout.sweep(core.config, yield* Ref.get(core.state), core.running.values(), now)
    if (swept.quiet.length > 0) {
      yield* PoolCore.step(core, (state, at) => AttemptTimeout.stall(core.config, state, swept.quiet, at))
    }
    for (const running of swept.overdue) {
      running.abortable = false
      running.overdue = true
      yield* Effect.ignore(Effect.try(running.abort))
    }
    if (swept.nextAt === Infinity) return yield* Queue.take(core.begun)
    // What begins meanwhile may be due before.
    const { attemptTimeout } = core.config
    const soonest = typeof attemptTimeout === "number" ? attemptTimeout : AttemptTimeout.quietMillis
    yield* pause(Math.max(1, Math.ceil(Math.min(swept.nextAt - now, soonest, MonotonicTime.longestSleep))))
  }))

// --------------------------------------------------------------------------------------------------------------- store

const saver = (
  core: PoolCore.PoolCore,
  storeWorks: Ref.Ref<boolean>,
  found: Ref.Ref<Went>,
  worded: Ref.Ref<Worded>,
  pause: Settings["pause"]
) =>
  Effect.forever(Effect.gen(function*() {
    yield* Queue.take(core.dirty)
    // Changes gather for a moment, so that a storm of them is one record.
    yield* Effect.sleep(saveMillis)
    for (;;) {
      // What could not be read before may be there now; it would be lost else.
      if ((yield* Ref.get(found)) !== "well") yield* loadInto(core, storeWorks, found, loadAgainMillis)
      if ((yield* saved(core, storeWorks, found, worded)) === "well") break
      yield* pause(saveAgainMillis)
    }
    // What is there now is the pool's own: to take it up again would count it twice.
    yield* Ref.set(found, "well")
  }))

/** Lets stored resources gather, the longer the more there are already, before the pool is saved because of them. */
const gatherer = (core: PoolCore.PoolCore) =>
  Effect.forever(Effect.gen(function*() {
    yield* Queue.take(core.learned)
    const { rest } = yield* Ref.get(core.state)
    yield* Effect.sleep(Affinity.size(rest.affinity.resources) * gatherMillis)
    yield* Queue.offer(core.dirty, undefined)
  }))

/** Lets mere uses gather, which count against limits, before the pool is saved because of them alone. */
const accountant = (core: PoolCore.PoolCore, worded: Ref.Ref<Worded>, pause: Settings["pause"]) =>
  Effect.forever(Effect.gen(function*() {
    MutableRef.set(core.unused, true)
    yield* Queue.take(core.used)
    const { rest, slots } = yield* Ref.get(core.state)
    yield* pause(useMillis + slots.size * useMillisPerKey + Affinity.size(rest.affinity.resources) * gatherMillis)
    const { ended } = yield* Ref.get(core.state)
    if (ended !== (yield* Ref.get(worded)).ended) yield* Queue.offer(core.dirty, undefined)
  }))

/** What was put into words last: how many leases had ended, and the stored resources; of many, that is most of the work. */
interface Worded {
  readonly ended: number
  readonly changes: number
  readonly resources: ReadonlyArray<PoolRecord.StoredResources>
}

/** Saves, but replaces no record that may still be on its way by one that knows nothing of it. */
const saved = (
  core: PoolCore.PoolCore,
  storeWorks: Ref.Ref<boolean>,
  found: Ref.Ref<Went>,
  worded: Ref.Ref<Worded>
) =>
  Effect.flatMap(Ref.get(found), (went) =>
    went === "late"
      ? Effect.succeed<Went>("late")
      : tolerate(core, storeWorks, save(core, worded), storeMillis))

/** Loads the record, and says how it went. */
const loadInto = (core: PoolCore.PoolCore, storeWorks: Ref.Ref<boolean>, found: Ref.Ref<Went>, millis: number) =>
  Effect.flatMap(tolerate(core, storeWorks, load(core), millis), (went) => Ref.set(found, went))

const load = ({ config, state, store }: PoolCore.PoolCore) =>
  Effect.gen(function*() {
    const found = yield* store.load(config.pool)
    if (Option.isNone(found)) return
    const now = yield* MonotonicTime.now
    const offset = yield* wallOffset
    yield* Ref.update(state, (before) => PoolRecord.restore(config, before, found.value, now, offset))
  })

const save = ({ config, state, store }: PoolCore.PoolCore, worded: Ref.Ref<Worded>) =>
  Effect.gen(function*() {
    const now = yield* MonotonicTime.now
    const offset = yield* wallOffset
    const current = yield* Ref.get(state)
    const { changes } = current.rest.affinity.resources
    const before = yield* Ref.get(worded)
    const resources = before.changes === changes && !current.rest.closed
      ? before.resources
      : PoolRecord.resourcesOf(current, now, offset)
    yield* Ref.set(worded, { ended: current.ended, changes, resources })
    yield* store.save(config.pool, PoolRecord.fromState(current, now, offset, resources))
  })

const wallOffset = Effect.clockWith((clock) =>
  Effect.succeed(clock.unsafeCurrentTimeMillis() - MonotonicTime.nowOf(clock))
)

/** How something went that the store was asked for: `late` while, or because, it has not answered. */
type Went = "well" | "badly" | "late"

/** The store never fails nor holds up the pool: what goes wrong there is told, and the pool goes on. */
const tolerate = (
  core: PoolCore.PoolCore,
  storeWorks: Ref.Ref<boolean>,
  effect: Effect.Effect<void, PoolStore.StoreError>,
  millis: number
): Effect.Effect<Went> =>
  effect.pipe(
    // Also where nothing else is interruptible, at the pool's end.
    Effect.interruptible,
    Effect.disconnect,
    Effect.interruptible,
    Effect.timeoutFail({ duration: millis, onTimeout: () => tooSlow }),
    Effect.zipRight(Ref.set(storeWorks, true)),
    Effect.as<Went>("well"),
    Effect.catchAllCause((cause) => {
      const error = Option.getOrUndefined(Cause.failureOption(cause))
      const went: Went = error === tooSlow ? "late" : "badly"
      return Effect.as(
        degraded(core, storeWorks, error === undefined ? "it failed unexpectedly" : error.message),
        went
      )
    })
  )

/** Told once, until it works again. */
const degraded = ({ config, telemetry }: PoolCore.PoolCore, storeWorks: Ref.Ref<boolean>, problem: string) =>
  Effect.flatMap(Ref.getAndSet(storeWorks, false), (worked) =>
    worked
      ? Effect.flatMap(MonotonicTime.now, (at) =>
        telemetry.publish([{ _tag: "store.degraded", pool: config.pool, at, problem }]))
      : Effect.void)

const tooSlow = new PoolStore.StoreError({ problem: "unreachable", detail: "it did not answer in time" })

/** How long the store may take for one record, and how long changes gather before they are saved. */
const storeMillis = 1_000
const saveMillis = 1_000
/** How much longer they gather for each stored resource: half a minute for 100,000. */
const gatherMillis = 0.3
/** How long uses gather, and how much longer for each key: a record of many takes its time. */
const useMillis = 4_000
const useMillisPerKey = 1
/** How long it may take for a record that was not there in time, while the pool runs. */
const loadAgainMillis = 10_000
/** How long after a failure it is tried again. */
const saveAgainMillis = 10_000
