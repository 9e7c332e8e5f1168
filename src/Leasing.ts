/**
 * What a call takes from the pool: a lease of a key that may serve, or a retry token.
 *
 * @since 0.1.0
 */
import type * as Affinity from "./Affinity.js"
import * as Benches from "./Benches.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CircuitEvents from "./CircuitEvents.js"
import * as Claims from "./Claims.js"
import * as Expiring from "./Expiring.js"
import * as Homes from "./Homes.js"
import * as KeyState from "./KeyState.js"
import * as Limits from "./Limits.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as ProviderHealth from "./ProviderHealth.js"
import * as RateLimit from "./RateLimit.js"
import * as RetryPolicy from "./RetryPolicy.js"
import * as SlotMap from "./SlotMap.js"
import type * as Strategy from "./Strategy.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * What a lease step gives: a lease, if there was one to take.
 *
 * @since 0.1.0
 * @category models
 */
export interface Leased {
  readonly state: PoolState.PoolState
  readonly lease: PoolState.LeaseRecord | undefined
  /** Whether keys whose time had come were put among the eligible on the way. */
  readonly reopened?: boolean
  readonly events: ReadonlyArray<Telemetry.Unnumbered>
}

/**
 * Picks a key and leases it, if one may serve. It does not look at who waits: see `WaitingLine.acquire`.
 *
 * @since 0.1.0
 * @category steps
 */
export const lease = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  request: PoolState.Request,
  now: number
): Leased => {
  const state = now >= before.nextOpening ? Places.reopen(config, before, now) : before
  const { affinity, hurry, model, tokens } = request
  const held = PoolState.heldUntil(config, state, model, now)
  if (typeof held === "number") return { state, lease: undefined, events: PoolState.noEvents }
  const narrowed = PoolState.narrowed(state, model)
  const barred = narrowed || held !== undefined
    ? (slot: number) => {
      const key = SlotMap.get(state.slots, slot)
      return key === undefined || PoolState.providerGate(config, state, key, model, now, hurry) !== undefined ||
        (narrowed && PoolState.ownGate(config, state, key, model, now, tokens) !== undefined)
    }
    : undefined
  const seat = affinity === undefined ? undefined : Homes.seat(
    state,
    affinity,
    (key) =>
      key.gatedUntil === undefined && !request.avoid.includes(key.slot) && barred?.(key.slot) !== true &&
      request.only?.(key.key) !== false,
    now
  )
  const picked = seat?.key ?? pick(config, state, request, barred, now)
  if (picked !== undefined) {
    const first = SlotMap.get(state.slots, picked.slot)
    if (first !== undefined) {
      const index = "index" in picked ? picked.index : state.index
      const probed = probes(state, first, model)
        ? longestUnused(
          state,
          request,
          (key) =>
            !request.avoid.includes(key.slot) &&
            PoolState.fullGate(config, state, key, model, now, tokens) === undefined
        )
        : undefined
      // The probe of an outage goes where its turn is: that moves no conversation.
      const bond = probed === undefined ? seat?.bond : undefined
      const instead = probed === undefined && seat === undefined && state.rest.limits.dated && config.strategy.impartial
        ? Expiring.instead(state, request, barred, first, now)
        : undefined
      const granted = grant(config, state, index, probed ?? instead ?? first, request, now, bond)
      return state !== before && PoolState.hasMoved(before, state) ? { ...granted, reopened: true } : granted
    }
  }
  return floor(config, state, request, now, seat?.bond)
}

const pick = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Request,
  barred: ((slot: number) => boolean) | undefined,
  now: number
): Strategy.Picked | undefined => {
  const { avoid, only, random, rotation } = request
  if (state.index.size === 0) return undefined
  const left = config.strategy.wants === "headroom"
    ? (slot: number) => PoolState.headroom(state, slot, request.model, now)
    : undefined
  if (!state.rest.health.idle && ProviderHealth.isLimiting(state.rest.health, now)) {
    const idle = pickIdle(state, request, barred, left, now)
    if (idle !== undefined) return idle
  }
  if (barred === undefined && only === undefined && avoid.length === 0) {
    return state.index.pick({ excluded: none, rotation, random, now, left })
  }
  const unsuited = (slot: number): boolean => {
    if (barred?.(slot) === true) return true
    if (only === undefined) return false
    const key = SlotMap.get(state.slots, slot)
    return key === undefined || !only(key.key)
  }
  const other = avoid.length === 0
    ? undefined
    : state.index.pick({ excluded: (slot) => avoid.includes(slot) || unsuited(slot), rotation, random, now, left })
  return other ?? state.index.pick({ excluded: unsuited, rotation, random, now, left })
}

/**
 * After a rate limit, and before a success, the limit may be that of many keys: what one attempt finds out about a key is
 * not tried by two. So a key is preferred that nobody is trying; it is not looked for among too many.
 */
const pickIdle = (
  state: PoolState.PoolState,
  { avoid, only, random, rotation }: PoolState.Request,
  barred: ((slot: number) => boolean) | undefined,
  left: Strategy.PickContext["left"],
  now: number
): Strategy.Picked | undefined => {
  let looked = 0
  const unsuited = (slot: number): boolean => {
    if (looked++ >= mostBusy) return false
    const key = SlotMap.get(state.slots, slot)
    return key === undefined || key.inFlight > 0 || avoid.includes(slot) || barred?.(slot) === true ||
      only?.(key.key) === false
  }
  const picked = state.index.pick({ excluded: unsuited, rotation, random, now, left })
  return looked > mostBusy ? undefined : picked
}

const mostBusy = 32

const none = () => false

/** Whether a lease tries for all whether the trouble is over: those go round all keys, whatever the strategy. */
const probes = ({ rest: { health } }: PoolState.PoolState, { key }: KeyState.KeyState, model: string | undefined) =>
  ProviderHealth.isGating(health) && ProviderHealth.trialOf(health, PoolState.originOf(key), model) !== undefined

/** Leases a key that may serve: takes the probe of its breaker, and the trial of any bench that has ended. */
const grant = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  index: PoolState.PoolState["index"],
  free: KeyState.KeyState,
  request: PoolState.Request,
  now: number,
  affinity: Affinity.Bond | undefined,
  floor = false
): Leased => {
  const usual = !floor && PoolState.isUsual(before, free, request.model)
    ? grantUsual(config, before, index, free, request, now, affinity)
    : undefined
  return usual ?? asking(
    config,
    grantWatched(config, index === before.index ? before : { ...before, index }, free, request, now, affinity, floor),
    now
  )
}

/** Where others had taken all there was, few ask at a time whether something is left. */
const asking = (config: PoolState.Config, leased: Leased, now: number): Leased =>
  leased.state.rest.elsewhere === undefined || leased.lease === undefined
    ? leased
    : { ...leased, state: Claims.asks(config, leased.state, leased.lease, now) }

/** A lease that changes numbers only: the usual one, with one copy of the key and one of the pool. Else `undefined`. */
const grantUsual = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  index: PoolState.PoolState["index"],
  key: KeyState.KeyState,
  request: PoolState.Request,
  now: number,
  affinity: Affinity.Bond | undefined
): Leased | undefined => {
  const group = key.key.quotaGroup
  const limits = PoolState.partyLimits(state, key)
  const reserved = limits === undefined ? undefined : RateLimit.reserve(limits, request.tokens ?? noTokens, now)
  // The last that fits the whole group's limits closes all its keys.
  if (group !== undefined && reserved !== undefined && RateLimit.gate(reserved[0], undefined, now) !== undefined) {
    return undefined
  }
  const id = state.leases + 1
  const calls = request.call === 0 ? state.calls + 1 : state.calls
  const leased = KeyState.numbered(
    key,
    key.inFlight + 1,
    key.total + 1,
    KeyState.used(key.recent, now),
    now,
    key.successes,
    key.answeredAt,
    key.answeredFrom,
    key.inFlight === 0 ? now : key.quietSince,
    key.breaker,
    group === undefined ? reserved?.[0] : key.limits
  )
  const lease: PoolState.LeaseRecord = {
    id,
    slot: key.slot,
    key: key.key,
    call: request.call === 0 ? calls : request.call,
    model: request.model,
    operation: request.operation,
    timed: request.timed,
    startedAt: now,
    generation: key.breaker.generation,
    probe: false,
    floor: false,
    reserved: reserved === undefined ? undefined : { party: reserved[1], model: undefined },
    affinity,
    nth: 0
  }
  const pace = PoolState.paced(state.pace, state.leases, state.calls, now)
  const rest = group === undefined || reserved === undefined
    ? state.rest
    : Limits.ofGroup(state.rest, group, reserved[0])
  const counted = Places.leased(state, index, leased, id, calls, pace, rest)
  // The last that fits: the key waits then.
  const placed = KeyState.isPlain(key) || KeyState.isWithinLimits(leased, now)
    ? counted
    : Places.place(config, counted, leased, now)
  return { state: placed, lease, events: PoolState.noEvents }
}

const noTokens: RateLimit.Estimate = {}

const grantWatched = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  free: KeyState.KeyState,
  request: PoolState.Request,
  now: number,
  affinity: Affinity.Bond | undefined,
  floor: boolean
): Leased => {
  const { key, reserved, state } = Limits.reserve(config, before, free, request, now)
  const id = state.leases + 1
  const call = request.call === 0 ? state.calls + 1 : request.call
  const calls = request.call === 0 ? call : state.calls
  const probes = !floor && key.breaker._tag !== "Closed"
  const health = state.rest.health.idle ? undefined : ProviderHealth.began(
    state.rest.health,
    {
      origin: PoolState.originOf(key.key),
      model: request.model,
      lease: id,
      slot: key.slot,
      turn: PoolState.turnOf(request, call, now)
    },
    config.trialMillis,
    now
  )
  const breaker = probes ? CircuitBreaker.takeProbe(key.breaker, now, id) : key.breaker
  const group = PoolState.groupBench(state, key)
  const benched = key.bench !== undefined || group !== undefined
  const leased: KeyState.KeyState = {
    ...key,
    inFlight: key.inFlight + 1,
    total: key.total + 1,
    recent: KeyState.used(key.recent, now),
    lastUsed: now,
    quietSince: key.inFlight === 0 ? now : key.quietSince,
    stall: key.stall === undefined ? undefined : { since: now, tries: key.stall.tries + 1 },
    breaker,
    bench: key.bench === undefined ? undefined : KeyState.takeTrial(key.bench, id, now)
  }
  const record: PoolState.LeaseRecord = {
    id,
    slot: key.slot,
    key: key.key,
    call,
    model: request.model,
    operation: request.operation,
    timed: request.timed,
    startedAt: now,
    generation: breaker.generation,
    probe: probes,
    floor,
    reserved,
    affinity,
    nth: health?.nth ?? 0
  }
  const counted: PoolState.PoolState = {
    ...state,
    leases: id,
    calls,
    pace: PoolState.paced(state.pace, state.leases, state.calls, now),
    rest: health === undefined ? state.rest : { ...state.rest, health: health.health }
  }
  if (!probes && !benched && KeyState.isPlain(leased) && (request.model === undefined || !PoolState.hasModels(state))) {
    return { state: Places.touch(counted, leased), lease: record, events: PoolState.noEvents }
  }
  let next = Benches.withGroup(counted, key, group === undefined ? undefined : KeyState.takeTrial(group, id, now))
  next = Benches.mapModel(next, leased, request.model, (bench) => KeyState.takeTrial(bench, id, now))
  next = group !== undefined && KeyState.needsTrial(group)
    ? Places.placeGroup(config, Places.place(config, next, leased, now), key.key.quotaGroup, now)
    : Places.place(config, next, leased, now)
  return { state: next, lease: record, events: CircuitEvents.between(config.pool, key, leased, now) }
}

/** When only guesses hold every key back, one call per interval goes through, to another key each time. */
const floor = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Request,
  now: number,
  affinity: Affinity.Bond | undefined
): Leased => {
  const refused: Leased = { state, lease: undefined, events: PoolState.noEvents }
  if (request.floor === false || config.floorMillis === undefined) return refused
  if (now < state.rest.floorAt + config.floorMillis) return refused
  const key = floorKey(config, state, request, now)
  if (key === undefined) return refused
  const granted = grant(
    config,
    { ...state, rest: { ...state.rest, floorAt: now } },
    state.index,
    key,
    request,
    now,
    affinity,
    true
  )
  return {
    ...granted,
    events: [...granted.events, { _tag: "pool.floor", pool: config.pool, at: now, keyId: key.id, label: key.label }]
  }
}

/** The key that the floor would use: the one longest unused, if the nearest gate of all is only guessed. */
const floorKey = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Wanted,
  now: number
): KeyState.KeyState | undefined => {
  const first = PoolState.nearest(config, state, request, now)
  // An attempt that runs may open its key at any moment: nothing is nearer than that.
  if (first.breakableAt > now || first.earliest <= now) return undefined
  return longestUnused(state, request, (key) => {
    const closed = PoolState.requestGate(config, state, key, request.model, now, request.tokens)
    return closed !== undefined && closed.breakableAt <= now &&
      PoolState.providerGate(config, state, key, request.model, now) === undefined
  })
}

const longestUnused = (
  state: PoolState.PoolState,
  { only }: Pick<PoolState.Request, "only">,
  suits: (key: KeyState.KeyState) => boolean
): KeyState.KeyState | undefined => {
  let oldest: KeyState.KeyState | undefined
  for (const key of SlotMap.values(state.slots)) {
    if (only?.(key.key) === false || (oldest !== undefined && key.lastUsed >= oldest.lastUsed)) continue
    if (suits(key)) oldest = key
  }
  return oldest
}

/**
 * Takes a retry token, if there is one before `until`: `waitMillis` is how long until it may be used. It is taken at once,
 * so that those who wait for tokens get them in the order they came; `Infinity`: none, and nothing is taken.
 *
 * @since 0.1.0
 * @category steps
 */
export const spendToken = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  now: number,
  until: number
): { readonly state: PoolState.PoolState; readonly waitMillis: number } => {
  const earned = RetryPolicy.earn(state.rest.tokens, now, config.tokens, state.calls - state.rest.tokenCalls)
  const { tokens, wait } = RetryPolicy.reserve(earned, now, config.tokens)
  const inTime = Number.isFinite(wait) && now + wait <= until
  return {
    state: { ...state, rest: { ...state.rest, tokens: inTime ? tokens : earned, tokenCalls: state.calls } },
    waitMillis: inTime ? wait : Infinity
  }
}

/**
 * Gives back retry tokens that were not used, or not on the caller's account.
 *
 * @since 0.1.0
 * @category steps
 */
export const returnTokens = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  count: number
): PoolState.PoolState => ({
  ...state,
  rest: { ...state.rest, tokens: RetryPolicy.refund(state.rest.tokens, config.tokens, count) }
})
