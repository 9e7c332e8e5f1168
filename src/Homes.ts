/**
 * Where calls that belong together go: the key that a conversation stays with, as long as it may serve and has no more
 * than its share; the group that has a stored resource.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Affinity from "./Affinity.js"
import * as ApiKey from "./ApiKey.js"
import type * as KeyState from "./KeyState.js"
import * as PoolState from "./PoolState.js"
import * as SlotMap from "./SlotMap.js"

/**
 * How long a call waits for the key of its conversation before it moves to another: 2 seconds.
 *
 * @since 0.1.0
 * @category constants
 */
export const patienceMillis = 2_000

// --------------------------------------------------------------------------------------------------------- resources

/**
 * The keys that can serve a call at all, where that is known of the resources that it names: those of one group.
 *
 * @since 0.1.0
 * @category getters
 */
export const within = (
  state: PoolState.PoolState,
  resources: ReadonlyArray<string>,
  now: number
): PoolState.Among | undefined => {
  const group = groupWith(state, resources, now)
  return group === undefined
    ? undefined
    : { only: (key) => ApiKey.groupOf(key) === group, lane: `group ${group}` }
}

/**
 * The group that has the first of these resources of which that is known; `undefined` when nothing is known, or when the
 * pool has no key of that group (any more).
 *
 * @since 0.1.0
 * @category getters
 */
export const groupWith = (
  state: PoolState.PoolState,
  resources: ReadonlyArray<string>,
  now: number
): string | undefined => {
  for (const resource of resources) {
    const group = Affinity.holderOf(state.rest.affinity.resources, resource, now)
    if (group !== undefined && hasKeyOf(state, group)) return group
  }
  return undefined
}

const hasKeyOf = (state: PoolState.PoolState, group: string): boolean => {
  const members = HashMap.get(state.rest.groups, group)
  const isOf = (key: KeyState.KeyState | undefined): boolean =>
    key !== undefined && !key.retiring && ApiKey.groupOf(key.key) === group
  return (members._tag === "Some" && members.value.members.some((slot) => isOf(SlotMap.get(state.slots, slot)))) ||
    isOf(PoolState.find(state, group))
}

/**
 * Remembers which group has these resources.
 *
 * @since 0.1.0
 * @category steps
 */
export const learn = (
  state: PoolState.PoolState,
  resources: ReadonlyArray<string>,
  group: string,
  now: number
): PoolState.PoolState =>
  withAffinity(state, {
    ...state.rest.affinity,
    resources: Affinity.remember(state.rest.affinity.resources, resources, group, now)
  })

/**
 * Forgets where resources are: who was thought to have them does not.
 *
 * @since 0.1.0
 * @category steps
 */
export const unlearn = (state: PoolState.PoolState, resources: ReadonlyArray<string>): PoolState.PoolState =>
  withAffinity(state, {
    ...state.rest.affinity,
    resources: Affinity.forget(state.rest.affinity.resources, resources)
  })

const withAffinity = (state: PoolState.PoolState, affinity: Affinity.Affinity): PoolState.PoolState => ({
  ...state,
  rest: { ...state.rest, affinity }
})

// ----------------------------------------------------------------------------------------------------- conversations

/**
 * Where a call sits: the key that should serve it, if there is one, and what its success is remembered for.
 *
 * @since 0.1.0
 * @category models
 */
export interface Seat {
  readonly key: KeyState.KeyState | undefined
  readonly bond: Affinity.Bond
}

/**
 * The seat of a call among the keys that may serve it: its conversation's own key, unless that has its share already;
 * then, and for a new conversation, the one that suits its name best. Only a conversation whose key may not serve moves:
 * beside a busy one its calls are guests.
 *
 * @since 0.1.0
 * @category getters
 */
export const seat = (
  state: PoolState.PoolState,
  { conversation, resources }: Affinity.Wish,
  mayServe: (key: KeyState.KeyState) => boolean,
  now: number
): Seat => {
  if (conversation === undefined) return { key: undefined, bond: { conversation, resources, from: undefined } }
  const bound = loadBound(state)
  const from = Affinity.holderOf(state.rest.affinity.conversations, conversation, now)
  const home = from === undefined ? undefined : PoolState.find(state, from)
  const isOpen = home !== undefined && mayServe(home)
  const bond = { conversation, resources, from }
  if (isOpen && home.inFlight < bound) return { key: home, bond }
  let best: KeyState.KeyState | undefined
  let bestScore = -Infinity
  SlotMap.find(state.slots, (key) => {
    if (key === home || key.inFlight >= bound || !mayServe(key)) return false
    const score = Affinity.score(conversation, key.id, key.weight)
    if (score > bestScore) {
      best = key
      bestScore = score
    }
    return false
  })
  return { key: best, bond: isOpen ? { ...bond, conversation: undefined } : bond }
}

/**
 * How many attempts a key may have in flight and still get a conversation's next call: 1.25 times the mean of the
 * eligible keys, and at least 2.
 *
 * @since 0.1.0
 * @category getters
 */
export const loadBound = (state: PoolState.PoolState): number =>
  Math.max(2, Math.ceil(1.25 * state.load / Math.max(1, state.index.size)))

/**
 * The key that is worth waiting for: that of the call's conversation, when it may not serve now but soon will, or may.
 * What is only a guess is not waited for, nor broken: there may be other keys.
 *
 * @since 0.1.0
 * @category getters
 */
export const awaited = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Request,
  now: number
): PoolState.Among | undefined => {
  const conversation = request.affinity?.conversation
  if (conversation === undefined) return undefined
  const id = Affinity.holderOf(state.rest.affinity.conversations, conversation, now)
  const home = id === undefined ? undefined : PoolState.find(state, id)
  if (home === undefined || request.only?.(home.key) === false) return undefined
  const closed = PoolState.requestGate(config, state, home, request.model, now, request.tokens)
  const latest = now + patienceMillis
  return closed !== undefined && Math.min(closed.until, closed.earliest) <= latest &&
      closed.breakableAt >= Math.min(closed.until, latest)
    ? {
      only: (key) => key.id === home.id && request.only?.(key) !== false,
      lane: `key ${home.id}, ${request.lane ?? "any"}`,
      floor: false
    }
    : undefined
}

/**
 * What the success of a lease leaves: its conversation is where it was served, and so are the resources it named.
 *
 * @since 0.1.0
 * @category steps
 */
export const follow = (
  state: PoolState.PoolState,
  { conversation, from, resources }: Affinity.Bond,
  key: ApiKey.ApiKey,
  now: number
): PoolState.PoolState => {
  let { affinity } = state.rest
  if (conversation !== undefined) {
    const current = Affinity.holderOf(affinity.conversations, conversation, now)
    if (current === from || current === key.id) {
      const conversations = Affinity.remember(affinity.conversations, [conversation], key.id, now)
      affinity = { ...affinity, conversations }
    }
  }
  if (resources.length > 0) {
    const known = Affinity.remember(affinity.resources, resources, ApiKey.groupOf(key), now)
    affinity = { ...affinity, resources: known }
  }
  return affinity === state.rest.affinity ? state : withAffinity(state, affinity)
}
