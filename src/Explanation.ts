/**
 * Why a pool would give a call the key that it would give it now: for each key, whether it is the one, might have been, or
 * what holds it back. Plain data without secrets.
 *
 * @since 0.1.0
 */
import * as Schema from "effect/Schema"
import type { KeyReason } from "./KeymeshError.js"
import type * as KeyState from "./KeyState.js"
import * as Leasing from "./Leasing.js"
import { ClosedGate, gateOf } from "./PoolSnapshot.js"
import * as PoolState from "./PoolState.js"
import * as SlotMap from "./SlotMap.js"
import * as WaitingLine from "./WaitingLine.js"

const optional = <A, I>(schema: Schema.Schema<A, I>) => Schema.optionalWith(schema, { exact: true })

/**
 * One key, as the call would find it:
 *
 * - `chosen`: the call would get it;
 * - `eligible`: it may serve, but the strategy, or the call's affinity, prefers another;
 * - `closed`: all the gates that hold it back, each with its reason and, where one is known, its end;
 * - `unsuited`: it is not of the group that has what the call names.
 *
 * @since 0.1.0
 * @category models
 */
export const KeyVerdict = Schema.Struct({
  keyId: Schema.String,
  label: Schema.String,
  verdict: Schema.Literal("chosen", "eligible", "closed", "unsuited"),
  gates: Schema.Array(ClosedGate),
  inFlight: Schema.Number
})

/**
 * @since 0.1.0
 * @category models
 */
export type KeyVerdict = typeof KeyVerdict.Type

/**
 * What a call would meet. Times are milliseconds since the epoch.
 *
 * @since 0.1.0
 * @category models
 */
export const Explanation = Schema.Struct({
  pool: Schema.String,
  at: Schema.Number,
  strategy: Schema.String,
  model: optional(Schema.String),
  /** The id of the key that the call would get at once; absent: it would wait, or be refused. */
  chosen: optional(Schema.String),
  /** How many calls wait in the same lane, all before it. */
  waiting: Schema.Number,
  /** When a key may serve, if none may now; absent when no moment is known. */
  availableAt: optional(Schema.Number),
  /** The keys, up to 1,000 of them. */
  keys: Schema.Array(KeyVerdict)
})

/**
 * @since 0.1.0
 * @category models
 */
export type Explanation = typeof Explanation.Type

/**
 * What a request would meet: nothing is leased for it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const of = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Request,
  now: number
): Explanation => {
  const waiting = WaitingLine.ahead(state, request)
  const lease = waiting > 0 || state.rest.closed ? undefined : Leasing.lease(config, state, request, now).lease
  const { at } = PoolState.opening(config, state, request, now)
  return {
    pool: config.pool,
    at: now,
    strategy: config.strategy.name,
    ...(request.model === undefined ? {} : { model: request.model }),
    ...(lease === undefined ? {} : { chosen: lease.key.id }),
    waiting,
    ...(lease !== undefined || !Number.isFinite(at) ? {} : { availableAt: Math.max(now, at) }),
    keys: SlotMap.values(state.slots).slice(0, mostKeys).map((key): KeyVerdict => {
      const gates = PoolState.closedGates(config, state, key, request, now)
      return {
        keyId: key.id,
        label: key.label,
        // The floor gives a key although it is closed.
        verdict: lease?.slot === key.slot ? "chosen" : verdictOf(key, request, gates),
        gates: gates.map(gateOf),
        inFlight: key.inFlight
      }
    })
  }
}

/**
 * What of the other keys an attempt's trail tells on request: the first 32, with the gate that opens last; `eligible` are
 * those that might have served as well.
 *
 * @since 0.1.0
 * @category getters
 */
export const others = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Wanted,
  chosen: number,
  now: number
): ReadonlyArray<KeyReason> => {
  const reasons: Array<KeyReason> = []
  SlotMap.find(state.slots, (key) => {
    if (key.slot === chosen) return false
    const isSuited = request.only?.(key.key) !== false
    const closed = isSuited
      ? PoolState.fullGate(config, state, key, request.model, now, request.tokens)
      : undefined
    reasons.push({
      keyId: key.id,
      label: key.label,
      ...(closed === undefined ? { gate: isSuited ? "eligible" : "unsuited" } : gateOf(closed))
    })
    return reasons.length === mostOthers
  })
  return reasons
}

const verdictOf = (
  key: KeyState.KeyState,
  { only }: PoolState.Request,
  gates: ReadonlyArray<KeyState.Closed>
): KeyVerdict["verdict"] => only?.(key.key) === false ? "unsuited" : gates.length > 0 ? "closed" : "eligible"

const mostKeys = 1_000
const mostOthers = 32
