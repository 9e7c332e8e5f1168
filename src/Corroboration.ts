/**
 * Who is to blame for what an attempt says: the key, or the provider, as the other keys' attempts tell. Here the provider's
 * breakers (`ProviderHealth`) meet the pool's state: what they find out is given back to the keys that paid for it.
 *
 * @since 0.1.0
 */
import * as Benches from "./Benches.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CircuitEvents from "./CircuitEvents.js"
import * as CooldownEvents from "./CooldownEvents.js"
import type * as Cooldowns from "./Cooldowns.js"
import * as Fault from "./Fault.js"
import type * as KeyState from "./KeyState.js"
import type * as Outcome from "./Outcome.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as ProviderHealth from "./ProviderHealth.js"
import * as SlotMap from "./SlotMap.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * What is known after an outcome, and whether the key may be blamed for it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Heard extends PoolState.Changed {
  readonly blames: boolean
}

/**
 * Takes in what an outcome says of the provider. The key's own part is taken in afterwards, see `Settling`.
 *
 * @since 0.1.0
 * @category steps
 */
export const hear = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  lease: PoolState.LeaseRecord,
  outcome: Outcome.Outcome,
  end: boolean,
  now: number
): Heard => {
  if (!config.corroborates) return { state: before, events: PoolState.noEvents, blames: true }
  const attempt: ProviderHealth.Attempt = {
    origin: PoolState.originOf(lease.key),
    model: lease.model,
    lease: lease.id,
    slot: lease.slot,
    nth: lease.nth
  }
  const { events, state } = before.rest.health.idle
    ? { events: PoolState.noEvents, state: before }
    : decided(config, before, attempt, now)
  const heard = judged(config, state, attempt, outcome, end, now)
  return events.length === 0 ? heard : { ...heard, events: [...events, ...heard.events] }
}

/** An attempt is decided: outages that nobody has asked about for long are over with that. */
const decided = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  attempt: ProviderHealth.Attempt,
  now: number
): PoolState.Changed => {
  const { health } = state.rest
  const after = ProviderHealth.decided(health, attempt, now)
  const next = withHealth(state, after)
  const over = ProviderHealth.forgotten(health, after)
  return over.length === 0
    ? { state: next, events: PoolState.noEvents }
    : { state: moved(next), events: over.map((outage) => closedEvent(config, outage, now)) }
}

const judged = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  attempt: ProviderHealth.Attempt,
  outcome: Outcome.Outcome,
  end: boolean,
  now: number
): Heard => {
  switch (outcome._tag) {
    case "Success":
      return succeeded(config, state, attempt, now)
    case "Fault":
      return Fault.isProviderFault(outcome.fault)
        ? faulted(config, state, attempt, state.leases - state.ended - (end ? 0 : 1), now)
        : { state, events: PoolState.noEvents, blames: true }
    case "Ignored":
      return { state, events: PoolState.noEvents, blames: true }
  }
}

const succeeded = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  attempt: ProviderHealth.Attempt,
  now: number
): Heard => {
  const { closed, health } = ProviderHealth.succeeded(state.rest.health, attempt, {
    leases: state.leases,
    offered: PoolState.offered(state, now),
    waiting: state.rest.waiting > 0
  }, now)
  const next = withHealth(state, health)
  if (closed.length === 0) return { state: next, events: PoolState.noEvents, blames: true }
  return {
    state: moved(next),
    events: closed.map((outage) => closedEvent(config, outage, now)),
    blames: true
  }
}

const faulted = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  attempt: ProviderHealth.Attempt,
  inFlight: number,
  now: number
): Heard => {
  const { blames, health, opened, row } = ProviderHealth.faulted(state.rest.health, attempt, {
    leases: state.leases,
    inFlight,
    recent: state.leases - state.pace.before.leases,
    answeredSince: (instant) =>
      PoolState.keys(state).some((key) => PoolState.originOf(key.key) === attempt.origin && key.answeredFrom >= instant)
  }, now)
  const next = withHealth(state, health)
  if (row === undefined) return { state: next, events: PoolState.noEvents, blames }
  const events: Array<Telemetry.Unnumbered> = opened.map((outage) => ({
    _tag: "provider.open",
    ...told(config, outage, now)
  }))
  let refunded = moved(next)
  for (const [slot, faults] of row.slots) {
    const key = SlotMap.get(refunded.slots, slot)
    if (key === undefined) continue
    // This very fault has not been held against its key.
    const after = refund(key, slot === attempt.slot ? faults - 1 : faults, row.since)
    refunded = Places.place(config, refunded, after, now)
    events.push(...CircuitEvents.between(config.pool, key, after, now))
  }
  return { state: refunded, events, blames }
}

/** A key without the penalties for faults that were not its own. */
const refund = (key: KeyState.KeyState, faults: number, since: number): KeyState.KeyState => {
  const { bench, ramp } = key
  const isGuess = bench?.kind === "Overloaded" && bench.provenance === "guessed" && bench.since >= since
  return {
    ...key,
    breaker: CircuitBreaker.refund(key.breaker, faults, since),
    bench: isGuess && bench.firm <= bench.since ? undefined : bench,
    ramp: ramp !== undefined && ramp.since >= since ? undefined : ramp
  }
}

// ------------------------------------------------------------------------------------------------ the request's own fault

/**
 * Takes back what was held against keys that failed one request alike, if they answer all others: it was the request.
 * `undefined` when they do not. `slots` are the keys; `since` is when the request began.
 *
 * @since 0.1.0
 * @category steps
 */
export const acquit = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  slots: ReadonlyArray<number>,
  model: string | undefined,
  since: number,
  now: number
): PoolState.Changed | undefined => {
  if (!config.corroborates || slots.length < manyKeys) return undefined
  if (PoolState.trialOf(state, model)?._tag === "Outage") return undefined
  const keys = slots.flatMap((slot) => SlotMap.get(state.slots, slot) ?? [])
  if (keys.length < slots.length || keys.some(({ answeredAt }) => answeredAt < now - answeringMillis)) return undefined
  // Where other requests fail too, it is not this one: neither since the last success, nor of late.
  const { health } = state.rest
  if (keys.some(({ key }) => ProviderHealth.faultsInRow(health, PoolState.originOf(key), model) > slots.length)) {
    return undefined
  }
  let calls = 0
  let others = 0
  for (const { breaker } of keys) {
    if (breaker._tag !== "Closed") return undefined
    const counts = CircuitBreaker.counts(breaker, now, config.breaker.rate?.windowMillis ?? Infinity)
    calls += counts.calls
    others += counts.faults - 1
  }
  if (others > toleratedShare * calls) return undefined
  const events: Array<Telemetry.Unnumbered> = []
  let next = state
  for (const key of keys) {
    const after = refund(key, 1, since)
    next = Places.place(config, next, after, now)
    events.push(...CircuitEvents.between(config.pool, key, after, now))
    next = withHealth(next, ProviderHealth.acquit(next.rest.health, PoolState.originOf(key.key), model))
  }
  return { state: next, events }
}

// --------------------------------------------------------------------------------------------------------- shared causes

/**
 * Takes in a rate limit: several quota groups that are refused alike may share a limit that nobody declared.
 *
 * @since 0.1.0
 * @category steps
 */
export const limited = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  { id, key }: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  fault: Fault.Fault,
  bench: KeyState.Bench,
  now: number
): PoolState.Changed => {
  if (!config.corroborates) return { state, events: PoolState.noEvents }
  const { health, suspected } = ProviderHealth.limited(
    state.rest.health,
    { origin: PoolState.originOf(key), model: lease.model },
    {
      since: lease.startedAt,
      at: now,
      lease: lease.id,
      keyId: id,
      group: key.quotaGroup ?? id,
      code: fault.code,
      until: bench.until,
      told: bench.provenance !== "guessed"
    },
    () => firstTold(config, state, PoolState.originOf(key), lease.model, now)
  )
  const next = withHealth(state, health)
  return suspected === undefined ? { state: next, events: PoolState.noEvents } : {
    state: moved(next),
    events: [{
      _tag: "group.suspected",
      pool: config.pool,
      at: now,
      keyIds: suspected.keyIds,
      ...(lease.model === undefined ? {} : { model: lease.model })
    }]
  }
}

/** When the first key is there again that was told when; `Infinity` if none was. */
const firstTold = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  origin: string,
  model: string | undefined,
  now: number
): number => {
  let first = Infinity
  for (const key of SlotMap.values(state.slots)) {
    if (PoolState.originOf(key.key) !== origin) continue
    const closed = PoolState.requestGate(config, state, key, model, now)
    const isTold = closed?.gate === "cooldown" && closed.fault === "RateLimited" && closed.breakableAt === Infinity
    if (isTold) first = Math.min(first, closed.until)
  }
  return first
}

/**
 * Takes in a refused credential. Two keys that worked and are refused shortly after one another have a cause in common,
 * whatever the provider calls it: both rest for `mostMillis` at most, as guesses go. If they are refused for good, that
 * costs one trial a minute, until they have not worked for ten.
 *
 * @since 0.1.0
 * @category steps
 */
export const turned = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  target: Cooldowns.Target,
  fault: Fault.Fault,
  current: KeyState.Bench | undefined,
  now: number
): PoolState.Changed & { readonly mostMillis: number | undefined } => {
  if (!config.corroborates || key.answeredAt < now - workedMillis) {
    return { state, events: PoolState.noEvents, mostMillis: undefined }
  }
  const others = state.rest.turned.filter(({ at, id }) => at > now - blipMillis && id !== key.id)
  const told = fault.waitMillis === undefined ? now : now + fault.waitMillis + config.cooldowns.guardMillis
  const own: PoolState.Turned = { id: key.id, at: now, target, firm: Math.max(told, current?.until ?? now) }
  let next: PoolState.PoolState = { ...state, rest: { ...state.rest, turned: [...others, own] } }
  const events: Array<Telemetry.Unnumbered> = []
  for (const { at, firm, id, target } of others) {
    const other = PoolState.find(next, id)
    const bench = other === undefined ? undefined : Benches.at(next, other, target)
    const until = Math.max(at + blipMillis, firm)
    if (other === undefined || bench?.kind !== "Unauthorized" || bench.since !== at || bench.until <= until) continue
    const shorter = { ...bench, until, firm: until }
    next = Benches.withBench(config, next, other, target.scope, shorter, now)
    events.push(CooldownEvents.of(config.pool, other, target, shorter, now))
  }
  return { state: next, events, mostMillis: others.length === 0 ? undefined : blipMillis }
}

/** A request that fails alike with so many keys, all of which answered others so recently, is wrong itself. */
const manyKeys = 3
const answeringMillis = 10_000
const toleratedShare = 0.1
/** Keys that worked so recently, and are refused within so long, are refused for one reason. */
const workedMillis = 600_000
const blipMillis = 60_000

const told = ({ pool }: PoolState.Config, { model, origin }: ProviderHealth.Outage, at: number) => ({
  pool,
  at,
  origin: origin === "" ? pool : origin,
  ...(model === undefined ? {} : { model })
})

const closedEvent = (config: PoolState.Config, outage: ProviderHealth.Outage, now: number): Telemetry.Unnumbered => ({
  _tag: "provider.closed",
  ...told(config, outage, now)
})

const withHealth = (state: PoolState.PoolState, health: ProviderHealth.Health): PoolState.PoolState =>
  health === state.rest.health ? state : { ...state, rest: { ...state.rest, health } }

/** What people want to hear of has changed. */
const moved = (state: PoolState.PoolState): PoolState.PoolState => ({
  ...state,
  rest: { ...state.rest, moves: state.rest.moves + 1 }
})
