/**
 * A breaker's change as an event of telemetry, and back.
 *
 * @since 0.1.0
 */
import * as CircuitBreaker from "./CircuitBreaker.js"
import type * as KeyState from "./KeyState.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * @since 0.1.0
 * @category models
 */
export type CircuitEvent = Extract<
  Telemetry.Unnumbered,
  { readonly _tag: "circuit.open" | "circuit.closed" | "circuit.half-open" }
>

/**
 * The events of what has happened to a key's breaker: one or none.
 *
 * @since 0.1.0
 * @category constructors
 */
export const between = (
  pool: string,
  before: KeyState.KeyState,
  after: KeyState.KeyState,
  now: number
): ReadonlyArray<CircuitEvent> => {
  const change = CircuitBreaker.transition(before.breaker, after.breaker, now)
  if (change === undefined) return none
  const base = {
    pool,
    at: now,
    keyId: after.id,
    label: after.label,
    from: change.from,
    generation: change.generation,
    trips: change.trips
  }
  switch (change.to) {
    case "Open":
      return [{
        _tag: "circuit.open",
        ...base,
        failures: before.breaker._tag === "Closed" ? before.breaker.failures + 1 : 1,
        ...(change.until === undefined || !Number.isFinite(change.until) ? {} : { until: change.until })
      }]
    case "HalfOpen":
      return [{ _tag: "circuit.half-open", ...base }]
    case "Closed":
      return [{ _tag: "circuit.closed", ...base }]
  }
}

/**
 * Whether an event tells of a breaker.
 *
 * @since 0.1.0
 * @category guards
 */
export const isCircuitEvent = (event: Telemetry.Unnumbered): event is CircuitEvent =>
  event._tag === "circuit.open" || event._tag === "circuit.closed" || event._tag === "circuit.half-open"

/**
 * The change that an event tells of.
 *
 * @since 0.1.0
 * @category getters
 */
export const transitionOf = (event: CircuitEvent): CircuitBreaker.Transition => ({
  from: event.from,
  to: event._tag === "circuit.open" ? "Open" : event._tag === "circuit.closed" ? "Closed" : "HalfOpen",
  at: event.at,
  generation: event.generation,
  trips: event.trips,
  until: event._tag === "circuit.open" ? event.until ?? Infinity : undefined
})

const none: ReadonlyArray<CircuitEvent> = []
