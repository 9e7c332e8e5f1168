/**
 * Where each key stands: among the eligible, in the strategy's index, or among the gated, in order of the instant they
 * may open. Whoever changes something that closes or opens a gate puts the key where it then belongs.
 *
 * @since 0.1.0
 */
import { identity } from "effect/Function"
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as KeyState from "./KeyState.js"
import type * as Latency from "./Latency.js"
import * as PoolState from "./PoolState.js"
import * as SlotMap from "./SlotMap.js"
import * as Tournament from "./Tournament.js"

/**
 * Replaces a key whose gates have not changed. What else an attempt changes of the pool may be given: one copy does for
 * all.
 *
 * @since 0.1.0
 * @category steps
 */
export const touch = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  ended: number = state.ended,
  latency: Latency.Latency = state.latency,
  rest: PoolState.Rest = state.rest
): PoolState.PoolState => ({
  slots: SlotMap.set(state.slots, key.slot, key),
  index: state.index.update(key),
  leases: state.leases,
  calls: state.calls,
  load: state.load + loadOf(key) - loadOf(SlotMap.get(state.slots, key.slot)),
  ended,
  pace: state.pace,
  latency,
  nextOpening: state.nextOpening,
  rest
})

/**
 * Counts a lease of an eligible key whose gates have not changed: `index` is the strategy's after its pick.
 *
 * @since 0.1.0
 * @category steps
 */
export const leased = (
  state: PoolState.PoolState,
  index: PoolState.PoolState["index"],
  key: KeyState.KeyState,
  leases: number,
  calls: number,
  pace: PoolState.Pace,
  rest: PoolState.Rest = state.rest
): PoolState.PoolState => ({
  slots: SlotMap.set(state.slots, key.slot, key),
  index: index.update(key),
  leases,
  calls,
  load: state.load + 1,
  ended: state.ended,
  pace,
  latency: state.latency,
  nextOpening: state.nextOpening,
  rest
})

/**
 * Replaces a key and puts it where its gates say: among the eligible, or among the gated at its opening time.
 *
 * @since 0.1.0
 * @category steps
 */
export const place = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  now: number
): PoolState.PoolState => {
  const old = SlotMap.get(state.slots, key.slot)
  const closed = PoolState.keyGate(config, state, key, now)
  const gatedUntil = closed?.until
  const gatedEarliest = closed?.earliest
  const gatedBy = closed?.gate
  const placed: KeyState.KeyState =
    key.gatedUntil === gatedUntil && key.gatedEarliest === gatedEarliest && key.gatedBy === gatedBy
      ? key
      : { ...key, gatedUntil, gatedEarliest, gatedBy }
  const wasOpen = old !== undefined && isOpenByGuess(old) ? 1 : 0
  const isOpen = isOpenByGuess(placed) ? 1 : 0
  const oldUntil = old?.gatedUntil
  let gated = state.rest.gated
  if (oldUntil !== gatedUntil) {
    gated = gatedUntil === undefined
      ? Tournament.remove(gated, key.slot)
      : Tournament.set(gated, { slot: key.slot, until: gatedUntil })
  }
  const early = countEarly(placed)
  const wasEarly = countEarly(old)
  const moved = hasMoved(old, placed)
  const rest = gated === state.rest.gated && wasOpen === isOpen && wasEarly === early && !moved ? state.rest : {
    ...state.rest,
    gated,
    moves: moved ? state.rest.moves + 1 : state.rest.moves,
    breakersOpen: state.rest.breakersOpen + isOpen - wasOpen,
    earlyNow: state.rest.earlyNow + early.now - wasEarly.now,
    earlyLater: state.rest.earlyLater + early.later - wasEarly.later
  }
  return {
    slots: SlotMap.set(state.slots, key.slot, placed),
    index: gatedUntil === undefined ? state.index.insert(placed) : state.index.remove(key.slot),
    leases: state.leases,
    calls: state.calls,
    load: state.load + loadOf(placed) - loadOf(old),
    ended: state.ended,
    pace: state.pace,
    latency: state.latency,
    nextOpening: gated === state.rest.gated ? state.nextOpening : earliest(gated),
    rest
  }
}

/** Whether a key's place has changed, beyond what calls that begin and end change all the time. */
const hasMoved = (old: KeyState.KeyState | undefined, key: KeyState.KeyState): boolean =>
  old === undefined || old.breaker._tag !== key.breaker._tag || old.enabled !== key.enabled ||
  old.retiring !== key.retiring || lastingGate(old) !== lastingGate(key) ||
  (lastingGate(key) !== undefined && old.gatedUntil !== key.gatedUntil)

const lastingGate = ({ gatedBy }: KeyState.KeyState): KeyState.GateName | undefined =>
  gatedBy === "concurrency" || gatedBy === "ramp" || gatedBy === "limit" ? undefined : gatedBy

/**
 * Puts every key of a group where it belongs now.
 *
 * @since 0.1.0
 * @category steps
 */
export const placeGroup = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  group: string | undefined,
  now: number,
  change: (key: KeyState.KeyState) => KeyState.KeyState = identity
): PoolState.PoolState => {
  if (group === undefined) return state
  const members = Option.getOrUndefined(HashMap.get(state.rest.groups, group))?.members ?? []
  return members.reduce((next, slot) => {
    const key = SlotMap.get(next.slots, slot)
    return key === undefined ? next : place(config, next, change(key), now)
  }, state)
}

/**
 * Moves the keys whose time has come to the eligible ones.
 *
 * @since 0.1.0
 * @category steps
 */
export const reopen = (config: PoolState.Config, state: PoolState.PoolState, now: number): PoolState.PoolState => {
  let next = state
  while (next.nextOpening <= now) {
    const first = Tournament.best(next.rest.gated)
    const key = first === undefined ? undefined : SlotMap.get(next.slots, first.slot)
    if (key === undefined) break
    const placed = place(config, next, key, now)
    // Its gate would still not let it go: it stands there again, and nothing else can open before it.
    if (placed.nextOpening === next.nextOpening && placed.rest.gated === next.rest.gated) break
    next = placed
  }
  return next
}

/**
 * Takes a key away from where it stands; its slot is empty then.
 *
 * @since 0.1.0
 * @category steps
 */
export const remove = (state: PoolState.PoolState, slot: number): PoolState.PoolState => {
  const key = SlotMap.get(state.slots, slot)
  const gated = Tournament.remove(state.rest.gated, slot)
  const early = countEarly(key)
  return {
    ...state,
    slots: SlotMap.remove(state.slots, slot),
    index: state.index.remove(slot),
    load: state.load - loadOf(key),
    nextOpening: earliest(gated),
    rest: {
      ...state.rest,
      gated,
      breakersOpen: state.rest.breakersOpen - (key !== undefined && isOpenByGuess(key) ? 1 : 0),
      earlyNow: state.rest.earlyNow - early.now,
      earlyLater: state.rest.earlyLater - early.later
    }
  }
}

/** What a key adds to the load of the eligible ones. */
const loadOf = (key: KeyState.KeyState | undefined): number =>
  key === undefined || key.gatedUntil !== undefined ? 0 : key.inFlight

/** Open or half-open, and not by hand. */
const isOpenByGuess = ({ breaker }: KeyState.KeyState): boolean =>
  breaker._tag === "HalfOpen" || (breaker._tag === "Open" && breaker.until !== Infinity)

/** How a key counts among those that an event may open. */
const countEarly = (key: KeyState.KeyState | undefined): { readonly now: number; readonly later: number } =>
  key?.gatedEarliest === undefined || key.gatedEarliest === key.gatedUntil
    ? notEarly
    : key.gatedEarliest === -Infinity
    ? earlyNow
    : earlyLater
const notEarly = { now: 0, later: 0 }
const earlyNow = { now: 1, later: 0 }
const earlyLater = { now: 0, later: 1 }

const earliest = (gated: PoolState.Rest["gated"]): number => Tournament.best(gated)?.until ?? Infinity
