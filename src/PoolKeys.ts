/**
 * Which keys are in the pool, and what is done to them by hand: join, change, reset, leave.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as ApiKey from "./ApiKey.js"
import * as Benches from "./Benches.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CircuitEvents from "./CircuitEvents.js"
import * as KeyState from "./KeyState.js"
import * as Limits from "./Limits.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as RateLimit from "./RateLimit.js"
import * as SlotMap from "./SlotMap.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * A pool of these keys. Their ids must differ.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (config: PoolState.Config, keys: ReadonlyArray<ApiKey.ApiKey>, now: number): PoolState.PoolState =>
  keys.reduce((state, key) => addKey(config, state, key, now), PoolState.empty(config, now))

/**
 * Adds a key; one that is there already gets the new attributes, keeps what is remembered of it, and is no longer
 * retired.
 *
 * @since 0.1.0
 * @category steps
 */
export const addKey = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: ApiKey.ApiKey,
  now: number
): PoolState.PoolState => {
  const present = PoolState.find(state, key.id)
  if (present !== undefined) {
    const { label, order, weight } = key
    const left = present.key.quotaGroup === key.quotaGroup ? state : leaveGroup(state, present)
    const joined = present.key.quotaGroup === key.quotaGroup ? left : joinGroup(left, key, present.slot)
    const limits = key.quotaGroup === undefined ? RateLimit.declare(present.limits, [key.limits]) : undefined
    const changed = { ...present, key, label, order, weight, limits, retiring: false }
    return declare(config, Places.place(config, restrict(joined, key), changed, now), present.key, key, now)
  }
  const slot = state.rest.free[state.rest.free.length - 1] ?? state.slots.size
  const rest: PoolState.Rest = {
    ...state.rest,
    ids: HashMap.set(state.rest.ids, key.id, slot),
    free: state.rest.free.slice(0, -1),
    origins: countOrigin(state.rest.origins, key, 1)
  }
  const joined = restrict(joinGroup({ ...state, rest }, key, slot), key)
  const newcomer: KeyState.KeyState = { ...KeyState.make(key, slot), recent: medianUse(state, key.id) }
  return declare(config, Places.place(config, joined, newcomer, now), undefined, key, now)
}

/** What the groups of a key declare, after it has come, changed or gone over from one to another. */
const declare = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  before: ApiKey.ApiKey | undefined,
  after: ApiKey.ApiKey,
  now: number
): PoolState.PoolState => {
  let next = PoolState.find(state, after.id)?.limits === undefined ? state : Limits.meter(state, after.id)
  for (const group of new Set([before?.quotaGroup, after.quotaGroup])) {
    if (group === undefined) continue
    const declared = Limits.declare(next, group)
    next = declared === next ? next : Places.placeGroup(config, declared, group, now)
  }
  return next
}

const countOrigin = (origins: PoolState.Rest["origins"], key: ApiKey.ApiKey, by: 1 | -1): typeof origins =>
  HashMap.modifyAt(origins, PoolState.originOf(key), (count) => {
    const left = Option.getOrElse(count, () => 0) + by
    return left === 0 ? Option.none() : Option.some(left)
  })

const restrict = (state: PoolState.PoolState, key: ApiKey.ApiKey): PoolState.PoolState =>
  key.models === undefined || state.rest.restricted ? state : { ...state, rest: { ...state.rest, restricted: true } }

const joinGroup = (state: PoolState.PoolState, key: ApiKey.ApiKey, slot: number): PoolState.PoolState => {
  if (key.quotaGroup === undefined) return state
  const group = HashMap.get(state.rest.groups, key.quotaGroup)
  const joined: PoolState.Group = group._tag === "None"
    ? { members: [slot], bench: undefined }
    : { ...group.value, members: [...group.value.members, slot] }
  return { ...state, rest: { ...state.rest, groups: HashMap.set(state.rest.groups, key.quotaGroup, joined) } }
}

/**
 * Changes one key by hand; `undefined` when there is none of that id.
 *
 * @since 0.1.0
 * @category steps
 */
export const updateKey = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  id: string,
  f: (key: KeyState.KeyState) => KeyState.KeyState,
  now: number
): PoolState.Changed | undefined => {
  const key = PoolState.find(state, id)
  if (key === undefined) return undefined
  const after = f(key)
  const placed = after === key ? state : Places.place(config, state, after, now)
  return leaving(config, placed, after, now, CircuitEvents.between(config.pool, key, after, now))
}

/**
 * Forgets everything that is held against a key: its breaker, its cooldowns, and those of its group.
 *
 * @since 0.1.0
 * @category steps
 */
export const resetKey = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  id: string,
  now: number
): PoolState.Changed | undefined => {
  const key = PoolState.find(state, id)
  if (key === undefined) return undefined
  const free = Limits.reset(config, state, key, now)
  const after: KeyState.KeyState = {
    ...free.key,
    recent: medianUse(state, id),
    breaker: CircuitBreaker.reset(key.breaker),
    bench: undefined,
    ramp: undefined,
    stall: undefined,
    concurrency: undefined
  }
  let next = Benches.withGroup(free.state, key, undefined)
  for (const model of HashMap.keys(state.rest.models)) next = Benches.mapModel(next, key, model, () => undefined)
  next = Places.placeGroup(config, Places.place(config, next, after, now), key.key.quotaGroup, now)
  return { state: next, events: CircuitEvents.between(config.pool, key, after, now) }
}

/**
 * Puts a group on the bench; nothing when no key is of it.
 *
 * @since 0.1.0
 * @category steps
 */
export const benchGroup = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  group: string,
  bench: KeyState.Bench,
  now: number
): PoolState.PoolState => {
  const found = HashMap.get(state.rest.groups, group)
  if (found._tag === "None") return state
  const groups = HashMap.set(state.rest.groups, group, { ...found.value, bench })
  return Places.placeGroup(config, { ...state, rest: { ...state.rest, groups } }, group, now)
}

/**
 * Puts a key (by id) or a group on the bench for one model, knowing what is held against it already; nothing when it is
 * not in the pool.
 *
 * @since 0.1.0
 * @category steps
 */
export const benchModel = (
  state: PoolState.PoolState,
  scope: "key" | "group",
  of: string,
  model: string,
  bench: (own: KeyState.Bench | undefined) => KeyState.Bench,
  now: number
): PoolState.PoolState => {
  const key = memberOf(state, scope, of)
  return key === undefined
    ? state
    : Benches.imposeOnModel(state, key, scope, model, bench(Benches.at(state, key, { scope, model })), now)
}

/**
 * A key by its id, or one of a group.
 *
 * @since 0.1.0
 * @category getters
 */
export const memberOf = (
  state: PoolState.PoolState,
  scope: "key" | "group",
  of: string
): KeyState.KeyState | undefined => {
  if (scope === "key") return PoolState.find(state, of)
  const [slot] = Option.getOrUndefined(HashMap.get(state.rest.groups, of))?.members ?? []
  return slot === undefined ? undefined : SlotMap.get(state.slots, slot)
}

/**
 * Ends a step that may have been a key's last: a retired key without an attempt in flight leaves.
 *
 * @since 0.1.0
 * @category steps
 */
export const leaving = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  now: number,
  events: ReadonlyArray<Telemetry.Unnumbered>
): PoolState.Changed =>
  key.retiring && key.inFlight === 0
    ? {
      state: removeKey(state, key),
      events: [...events, { _tag: "key.removed", pool: config.pool, at: now, keyId: key.id, label: key.label }]
    }
    : { state, events }

/** Takes a key out for good; its slot may be used again. */
const removeKey = (before: PoolState.PoolState, key: KeyState.KeyState): PoolState.PoolState => {
  const state = Limits.forgetKey(
    Benches.forgetKey(Places.remove(leaveGroup(before, key), key.slot), key.slot),
    key.slot
  )
  return {
    ...state,
    rest: {
      ...state.rest,
      ids: HashMap.remove(state.rest.ids, key.id),
      free: [...state.rest.free, key.slot],
      origins: countOrigin(state.rest.origins, key.key, -1)
    }
  }
}

const leaveGroup = (state: PoolState.PoolState, key: KeyState.KeyState): PoolState.PoolState => {
  const name = key.key.quotaGroup
  const group = name === undefined ? undefined : HashMap.get(state.rest.groups, name)
  if (name === undefined || group?._tag !== "Some") return state
  const members = group.value.members.filter((slot) => slot !== key.slot)
  // What is known of a group outlives its keys: one of them may come back.
  const groups = members.length === 0 && group.value.bench === undefined
    ? HashMap.remove(state.rest.groups, name)
    : HashMap.set(state.rest.groups, name, { ...group.value, members })
  return { ...state, rest: { ...state.rest, groups } }
}

/** How much the other keys were used of late: what half of them were not used more than. */
const medianUse = (state: PoolState.PoolState, id: string): number => {
  if (state.leases === 0) return -Infinity
  const uses = PoolState.keys(state).filter((key) => key.id !== id).map(({ recent }) => recent).sort(PoolState.byNumber)
  return uses[Math.floor(uses.length / 2)] ?? -Infinity
}
