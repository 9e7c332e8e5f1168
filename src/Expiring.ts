/**
 * Where more is asked for than limits let through, no capacity should be lost: of the keys that may serve, the one whose
 * window ends first, or whose bucket is full first, is the one to use.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as KeyState from "./KeyState.js"
import * as PoolState from "./PoolState.js"
import * as RateLimit from "./RateLimit.js"
import * as SlotMap from "./SlotMap.js"

/**
 * The key to use instead of the one that was picked, because what is left of it is lost sooner; `undefined`: none is
 * better, or there is enough for all. Few keys are looked at, those after the one picked.
 *
 * @since 0.1.0
 * @category getters
 */
export const instead = (
  state: PoolState.PoolState,
  { avoid, model, only, tokens }: PoolState.Request,
  barred: ((slot: number) => boolean) | undefined,
  picked: KeyState.KeyState,
  now: number
): KeyState.KeyState | undefined => {
  // Whoever was tried already is the last resort: there is no other.
  if (avoid.includes(picked.slot)) return undefined
  let best = picked
  let bestRoom = 0
  let lost = Infinity
  let pickedAt = Infinity
  let known = 0
  let pace = 0
  let windows = false
  let from = picked.slot
  for (let looked = Math.min(mostLooked, state.slots.size); looked > 0; looked--) {
    const key = SlotMap.next(state.slots, from) ?? SlotMap.next(state.slots, 0)
    if (key === undefined) break
    from = key.slot + 1
    const party = PoolState.partyLimits(state, key)
    const ofModel = PoolState.modelLimits(state, key, model)
    const most = Math.min(paceOf(party, tokens), paceOf(ofModel, tokens))
    if (most < Infinity) {
      known++
      pace += most / membersOf(state, key)
    }
    windows ||= hasWindow(party) || hasWindow(ofModel)
    const at = Math.min(lostAt(party, now), lostAt(ofModel, now))
    if (key === picked) pickedAt = at
    if (at >= lost || key.gatedUntil !== undefined || avoid.includes(key.slot)) continue
    if (key !== picked && (only?.(key.key) === false || barred?.(key.slot) === true)) continue
    best = key
    bestRoom = Math.min(roomOf(party, now, tokens), roomOf(ofModel, now, tokens))
    lost = at
  }
  if (best === picked) return undefined
  const offered = PoolState.offeredAtMost(state, now)
  if (state.rest.waiting === 0 && (known === 0 || offered < scarcity * pace / known * state.slots.size)) {
    return undefined
  }
  // A key of which nothing is known has its turn: it may tell, and a bucket that is full loses all the time. Of windows the
  // best is used instead while it is asked for the first time, or while some of the best will be lost in any case.
  return pickedAt < Infinity || (windows && (picked.inFlight > 0 || isPlenty(bestRoom, offered * (lost - now))))
    ? best
    : undefined
}

/** Whether there is more than will be used; of what nobody knows, nothing is said. */
const isPlenty = (room: number, used: number): boolean => room < Infinity && room > used

const hasWindow = (limits: RateLimit.RateLimit | undefined): boolean =>
  limits !== undefined && RateLimit.hasWindow(limits)

const roomOf = (limits: RateLimit.RateLimit | undefined, now: number, tokens: RateLimit.Estimate | undefined): number =>
  limits === undefined ? Infinity : RateLimit.room(limits, now, tokens)

const paceOf = (limits: RateLimit.RateLimit | undefined, tokens: RateLimit.Estimate | undefined): number =>
  limits === undefined ? Infinity : RateLimit.pace(limits, tokens)

const lostAt = (limits: RateLimit.RateLimit | undefined, now: number): number =>
  limits === undefined ? Infinity : RateLimit.lostAt(limits, now)

/** How many keys share a limit. */
const membersOf = (state: PoolState.PoolState, { key }: KeyState.KeyState): number =>
  key.quotaGroup === undefined
    ? 1
    : Option.getOrUndefined(HashMap.get(state.rest.groups, key.quotaGroup))?.members.length ?? 1

/** Among so many keys the best is about as good as among all. */
const mostLooked = 16
/** From this share of what limits let through on, nothing should be lost. */
const scarcity = 0.85
