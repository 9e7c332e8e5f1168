/**
 * Who is to blame for what an attempt says: the key, or the provider, as the other keys' attempts tell. Here the provider's
 * breakers (`ProviderHealth`) meet the pool's state: what they find out is given back to the keys that paid for it.
 *
 * @since 0.1.0
 */
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CircuitEvents from "./CircuitEvents.js"
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
  now: number
): Heard => {
  if (!config.corroborates) return { state: before, events: PoolState.noEvents, blames: true }
  const attempt: ProviderHealth.Attempt = {
    origin: PoolState.originOf(lease.key),
    model: lease.model,
    lease: lease.id,
    slot: lease.slot,
    call: lease.call,
    nth: lease.nth
  }
  const state = before.rest.health.idle
    ? before
    : withHealth(before, ProviderHealth.decided(before.rest.health, attempt))
  switch (outcome._tag) {
    case "Success":
      return succeeded(config, state, attempt, now)
    case "Fault":
      return Fault.isProviderFault(outcome.fault)
        ? faulted(config, state, attempt, now)
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
    events: closed.map((outage) => ({ _tag: "provider.closed", ...told(config, outage, now) })),
    blames: true
  }
}

const faulted = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  attempt: ProviderHealth.Attempt,
  now: number
): Heard => {
  const { blames, health, opened, row } = ProviderHealth.faulted(state.rest.health, attempt, {
    leases: state.leases,
    inFlight: state.leases - state.ended,
    recent: state.leases - state.pace.before.leases,
    answeredSince: (instant) =>
      PoolState.keys(state).some((key) =>
        PoolState.originOf(key.key) === attempt.origin && key.answeredAt >= instant
      )
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

const told = ({ pool }: PoolState.Config, { model, origin }: ProviderHealth.Outage, at: number) => ({
  pool,
  at,
  origin: origin === "" ? pool : origin,
  ...(model === undefined ? {} : { model })
})

const withHealth = (state: PoolState.PoolState, health: ProviderHealth.Health): PoolState.PoolState =>
  health === state.rest.health ? state : { ...state, rest: { ...state.rest, health } }

/** What people want to hear of has changed. */
const moved = (state: PoolState.PoolState): PoolState.PoolState => ({
  ...state,
  rest: { ...state.rest, moves: state.rest.moves + 1 }
})
