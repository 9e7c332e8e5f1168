/**
 * A running pool as people see and steer it: snapshots, the keyring, breakers, and what is done to single keys.
 *
 * @since 0.1.0
 */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as PubSub from "effect/PubSub"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as Stream from "effect/Stream"
import type * as ApiKey from "./ApiKey.js"
import { CallOptions } from "./CallOptions.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CircuitEvents from "./CircuitEvents.js"
import * as Explanation from "./Explanation.js"
import * as Homes from "./Homes.js"
import * as Keyring from "./Keyring.js"
import type * as KeyState from "./KeyState.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as OngoingCall from "./OngoingCall.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolKeys from "./PoolKeys.js"
import { type PoolSnapshot, snapshotOf } from "./PoolSnapshot.js"
import * as PoolState from "./PoolState.js"
import type * as RateLimit from "./RateLimit.js"
import * as Sharing from "./Sharing.js"
import type * as Telemetry from "./Telemetry.js"

// --------------------------------------------------------------------------------------------------------------- views

/**
 * The pool at this moment.
 *
 * @since 0.1.0
 * @category views
 */
export const snapshot = ({ config, state }: PoolCore.PoolCore): Effect.Effect<PoolSnapshot> =>
  Effect.flatMap(MonotonicTime.now, (now) => Effect.map(Ref.get(state), (current) => snapshotOf(config, current, now)))

/**
 * What `explain` may be told of a call, beside what `CallOptions` around it say.
 *
 * @since 0.1.0
 * @category models
 */
export interface ExplainOptions {
  readonly model?: string | undefined
  readonly tokens?: RateLimit.Estimate | undefined
  readonly affinity?: string | undefined
  readonly resources?: ReadonlyArray<string> | undefined
}

/**
 * What a call would meet that began now. Nothing is leased, and nothing changes.
 *
 * @since 0.1.0
 * @category views
 */
export const explain = (
  { config, settings, state }: PoolCore.PoolCore,
  options: ExplainOptions
): Effect.Effect<Explanation.Explanation> =>
  Effect.gen(function*() {
    const given = yield* CallOptions
    const clock = yield* Effect.clock
    const current = yield* Ref.get(state)
    const random = config.strategy.randomised ? yield* Random.next : 0
    const call = OngoingCall.make({ settings }, given, options, clock)
    const request: PoolState.Request = {
      call: 0,
      model: call.model,
      tokens: call.tokens,
      avoid: [],
      only: undefined,
      ...Homes.within(current, call.affinity?.resources ?? [], call.startedAt),
      affinity: call.affinity,
      rotation: false,
      random,
      priority: call.priority
    }
    // A conversation whose own key soon may serve waits for it.
    const home = Homes.awaited(config, current, request, call.startedAt)
    return Explanation.of(config, current, { ...request, ...home }, call.startedAt)
  })

/**
 * The pool now, and after each change of a key's state.
 *
 * @since 0.1.0
 * @category views
 */
export const changes = (core: PoolCore.PoolCore): Stream.Stream<PoolSnapshot> =>
  Stream.mapEffect(moments(core), () => snapshot(core))

/**
 * The keys of the pool as a keyring: what it changes, the pool's next pick sees.
 *
 * @since 0.1.0
 * @category views
 */
export const keyring = (core: PoolCore.PoolCore): Keyring.Service => {
  const { config, state } = core
  return Keyring.makeWith({
    keys: Effect.map(Ref.get(state), activeKeys),
    change: (add, retire) =>
      PoolCore.step(core, (before, now) => {
        const added = add === undefined ? before : PoolKeys.addKey(config, before, add, now)
        const events: ReadonlyArray<Telemetry.Unnumbered> = add === undefined ? PoolState.noEvents : [{
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
        const left = PoolKeys.updateKey(config, added, retire, retired, now)
        return left === undefined ? undefined : { state: left.state, events: [...events, ...left.events] }
      }).pipe(
        // A key that is there again will not leave: nobody need wait for it.
        Effect.tap((found) => found && add !== undefined ? PoolCore.drained(core, add.id) : Effect.void)
      ),
    changes: Stream.changesWith(
      Stream.mapEffect(moments(core), () => Effect.map(Ref.get(state), activeKeys)),
      Keyring.same
    )
  })
}

/**
 * The breaker of a key, over the pool's own state; none when there is no key of that id.
 *
 * @since 0.1.0
 * @category views
 */
export const breaker = (core: PoolCore.PoolCore, id: string): Effect.Effect<Option.Option<CircuitBreaker.Service>> =>
  Effect.map(
    Ref.get(core.state),
    (current) => PoolState.find(current, id) === undefined ? Option.none() : Option.some(breakerOf(core, id))
  )

const breakerOf = (core: PoolCore.PoolCore, id: string): CircuitBreaker.Service =>
  CircuitBreaker.makeWith({
    options: core.config.breaker,
    modify: (f) =>
      PoolCore.modify(core, (before, now) => {
        const key = PoolState.find(before, id)
        const [result, after] = f(key?.breaker ?? CircuitBreaker.initial, now)
        const changed = key === undefined || after === key.breaker
          ? undefined
          : PoolKeys.updateKey(core.config, before, id, (key) => ({ ...key, breaker: after }), now)
        return [result, changed]
      }),
    transitions: Stream.filterMap(
      Stream.fromPubSub(core.circuits),
      (event) => event.keyId === id ? Option.some(CircuitEvents.transitionOf(event)) : Option.none()
    )
  })

/** Now, and each moment at which something has changed; what changes while the first is looked at is not missed. */
const moments = (core: PoolCore.PoolCore): Stream.Stream<void> =>
  Stream.unwrapScoped(Effect.map(
    PubSub.subscribe(core.ticks),
    (ticks) => Stream.concat(Stream.succeed(undefined), Stream.fromQueue(ticks))
  ))

const activeKeys = (state: PoolState.PoolState): ReadonlyArray<ApiKey.ApiKey> =>
  PoolState.keys(state).filter((key) => !key.retiring).map((key) => key.key)

// ------------------------------------------------------------------------------------------------------------ controls

/**
 * Gives a key no new attempts until `enable`. False when there is none of that id; so for the others.
 *
 * @since 0.1.0
 * @category controls
 */
export const disable = (core: PoolCore.PoolCore, id: string): Effect.Effect<boolean> =>
  change(core, id, (key) => ({ ...key, enabled: false }), "key.disabled")

/**
 * @since 0.1.0
 * @category controls
 */
export const enable = (core: PoolCore.PoolCore, id: string): Effect.Effect<boolean> =>
  change(core, id, (key) => ({ ...key, enabled: true }), "key.added")

/**
 * Retires a key and waits until its last attempt has ended.
 *
 * @since 0.1.0
 * @category controls
 */
export const drain = (core: PoolCore.PoolCore, id: string): Effect.Effect<boolean> =>
  Effect.gen(function*() {
    const done = yield* Deferred.make<void>()
    const first = yield* Ref.modify(core.drains, (map) => {
      const known = HashMap.get(map, id)
      return Option.isSome(known) ? [known.value, map] : [done, HashMap.set(map, id, done)]
    })
    const found = yield* change(core, id, retired)
    if (found) yield* Deferred.await(first)
    else yield* Ref.update(core.drains, HashMap.remove(id))
    return found
  })

/**
 * Forgets everything held against a key: its breaker, its cooldowns, and those of its group.
 *
 * @since 0.1.0
 * @category controls
 */
export const reset = (core: PoolCore.PoolCore, id: string): Effect.Effect<boolean> =>
  Effect.tap(
    PoolCore.step(core, (before, now) => PoolKeys.resetKey(core.config, before, id, now)),
    (found) => found && core.sharing !== undefined ? Sharing.reset(core, core.sharing, id) : Effect.void
  )

const change = (
  core: PoolCore.PoolCore,
  id: string,
  f: (key: KeyState.KeyState) => KeyState.KeyState,
  event?: "key.added" | "key.disabled"
) =>
  PoolCore.step(core, (before, now) => {
    const changed = PoolKeys.updateKey(core.config, before, id, f, now)
    const key = PoolState.find(before, id)
    if (changed === undefined || key === undefined || event === undefined) return changed
    const base = { pool: core.config.pool, at: now, keyId: key.id, label: key.label }
    return {
      state: changed.state,
      events: [
        ...changed.events,
        event === "key.added" ? { _tag: event, ...base, duplicate: false } : { _tag: event, ...base }
      ]
    }
  })

const retired = (key: KeyState.KeyState): KeyState.KeyState => ({ ...key, retiring: true })
