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
  { avoid, model, only }: PoolState.Request,
  barred: ((slot: number) => boolean) | undefined,
  picked: KeyState.KeyState,
  now: number
): KeyState.KeyState | undefined => {
  // Whoever was tried already is the last resort: there is no other.
  if (avoid.includes(picked.slot)) return undefined
  let best = picked
  let lost = Infinity
  let known = 0
  let pace = 0
  let from = picked.slot
  for (let looked = Math.min(mostLooked, state.slots.size); looked > 0; looked--) {
    const key = SlotMap.next(state.slots, from) ?? SlotMap.next(state.slots, 0)
    if (key === undefined) break
    from = key.slot + 1
    const party = PoolState.partyLimits(state, key)
    const ofModel = PoolState.modelLimits(state, key, model)
    const most = Math.min(paceOf(party), paceOf(ofModel))
    if (most < Infinity) {
      known++
      pace += most / membersOf(state, key)
    }
    const at = Math.min(lostAt(party, now), lostAt(ofModel, now))
    // A key of which nothing is known has its turn: it may tell.
    if (key === picked && at === Infinity) return undefined
    if (at >= lost || key.gatedUntil !== undefined || avoid.includes(key.slot)) continue
    if (key !== picked && (only?.(key.key) === false || barred?.(key.slot) === true)) continue
    best = key
    lost = at
  }
  if (best === picked) return undefined
  const scarce = state.rest.waiting > 0 ||
    PoolState.offered(state, now) >= scarcity * pace / known * state.slots.size
  return scarce ? best : undefined
}

const paceOf = (limits: RateLimit.RateLimit | undefined): number =>
  limits === undefined ? Infinity : RateLimit.pace(limits)

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
