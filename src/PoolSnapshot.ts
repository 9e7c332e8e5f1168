/**
 * What a pool looks like at one moment: plain data without secrets, for dashboards, logs and tests.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as RedBlackTree from "effect/RedBlackTree"
import * as Schema from "effect/Schema"
import * as Fault from "./Fault.js"
import * as KeyState from "./KeyState.js"
import * as PoolState from "./PoolState.js"
import * as ProviderHealth from "./ProviderHealth.js"
import * as RateLimit from "./RateLimit.js"

const optional = <A, I>(schema: Schema.Schema<A, I>) => Schema.optionalWith(schema, { exact: true })

/**
 * Why a key (for all models, or one) is not used now. Times are milliseconds since the epoch, absent when none is known.
 *
 * @since 0.1.0
 * @category models
 */
export const ClosedGate = Schema.Struct({
  gate: Schema.String,
  fault: optional(Fault.Kind),
  until: optional(Schema.Number)
})

/**
 * What is left of a limit; of one model, if there is a `model`.
 *
 * @since 0.1.0
 * @category models
 */
export const LimitLeft = Schema.Struct({
  source: Schema.Literal("declared", "announced", "learned"),
  unit: Schema.Literal("requests", "tokens", "input", "output"),
  model: optional(Schema.String),
  limit: optional(Schema.Number),
  windowMillis: optional(Schema.Number),
  remaining: optional(Schema.Number)
})

/**
 * One key of a pool.
 *
 * @since 0.1.0
 * @category models
 */
export const KeySnapshot = Schema.Struct({
  id: Schema.String,
  label: Schema.String,
  quotaGroup: optional(Schema.String),
  weight: Schema.Number,
  enabled: Schema.Boolean,
  /** Retired: it leaves when its last attempt ends. */
  retiring: Schema.Boolean,
  breaker: Schema.Literal("closed", "open", "half-open"),
  /** When an open breaker admits its probe. */
  breakerUntil: optional(Schema.Number),
  /** Why it may not serve any model now; absent when it may. */
  closed: optional(ClosedGate),
  /** The models it may not serve now, beside. */
  closedModels: Schema.Array(Schema.Struct({ model: Schema.String, ...ClosedGate.fields })),
  /**
   * What is left of its limits, or of its group's, for all models or one: declared, announced by the provider, or learned
   * from refusals (`limit` requests in `windowMillis`, as measured).
   */
  limits: Schema.Array(LimitLeft),
  inFlight: Schema.Number,
  /** Attempts ever started with it, and how they ended. */
  total: Schema.Number,
  successes: Schema.Number,
  faults: Schema.Number,
  ignored: Schema.Number,
  lastUsed: optional(Schema.Number)
})

/**
 * @since 0.1.0
 * @category models
 */
export type KeySnapshot = typeof KeySnapshot.Type

/**
 * A pool.
 *
 * @since 0.1.0
 * @category models
 */
export const PoolSnapshot = Schema.Struct({
  pool: Schema.String,
  at: Schema.Number,
  strategy: Schema.String,
  closed: Schema.Boolean,
  keys: Schema.Array(KeySnapshot),
  /** The provider itself is taken for down: since when, and when a call tries again. */
  outages: Schema.Array(Schema.Struct({
    origin: Schema.String,
    model: optional(Schema.String),
    since: Schema.Number,
    probesAt: Schema.Number
  })),
  /** Keys that may serve now (some model at least). */
  eligible: Schema.Number,
  inFlight: Schema.Number,
  /** Calls that wait for a key. */
  waiting: Schema.Number,
  /** The same, by lane: calls that the same keys can serve stand in one lane, mostly those of one model. */
  lanes: Schema.Array(Schema.Struct({
    model: optional(Schema.String),
    waiting: Schema.Number,
    /** Since when the first of them waits. */
    since: Schema.Number,
    /** When a key may serve it; absent when no moment is known. */
    availableAt: optional(Schema.Number)
  })),
  /** Calls and attempts so far. */
  calls: Schema.Number,
  attempts: Schema.Number
})

/**
 * @since 0.1.0
 * @category models
 */
export type PoolSnapshot = typeof PoolSnapshot.Type

/**
 * The snapshot of a state.
 *
 * @since 0.1.0
 * @category constructors
 */
export const snapshotOf = (config: PoolState.Config, state: PoolState.PoolState, now: number): PoolSnapshot => {
  const gates = ProviderHealth.gates(state.rest.health)
  const limited = [...HashMap.keys(state.rest.limits.models)]
  const models = new Set([
    ...HashMap.keys(state.rest.models),
    ...gates.flatMap(({ model }) => model ?? []),
    ...limited
  ])
  const keys = PoolState.keys(state).map((key): KeySnapshot => {
    // A call that names no model meets just these.
    const closed = PoolState.fullGate(config, state, key, undefined, now)
    const { breaker } = key
    return {
      id: key.id,
      label: key.label,
      ...(key.key.quotaGroup === undefined ? {} : { quotaGroup: key.key.quotaGroup }),
      weight: key.weight,
      enabled: key.enabled,
      retiring: key.retiring,
      breaker: breaker._tag === "Closed" ? "closed" : breaker._tag === "Open" ? "open" : "half-open",
      ...(breaker._tag === "Open" && Number.isFinite(breaker.until) ? { breakerUntil: breaker.until } : {}),
      ...(closed === undefined ? {} : { closed: gateOf(closed) }),
      closedModels: [...models].flatMap((model) => {
        const gate = KeyState.both(
          PoolState.modelGate(config, state, key, model, now),
          PoolState.providerGate(config, state, key, model, now)
        )
        return gate === undefined ? [] : [{ model, ...gateOf(gate) }]
      }),
      limits: [undefined, ...limited].flatMap((model) => {
        const limits = model === undefined
          ? PoolState.partyLimits(state, key)
          : PoolState.modelLimits(state, key, model)
        const left = limits === undefined ? [] : RateLimit.left(limits, now)
        return left.map((each) => model === undefined ? each : { ...each, model })
      }),
      inFlight: key.inFlight,
      total: key.total,
      successes: key.successes,
      faults: key.faults,
      ignored: key.ignored,
      ...(Number.isFinite(key.lastUsed) ? { lastUsed: key.lastUsed } : {})
    }
  })
  return {
    pool: config.pool,
    at: now,
    strategy: config.strategy.name,
    closed: state.rest.closed,
    keys,
    outages: gates.flatMap((gate) =>
      gate._tag !== "Outage" ? [] : [{
        origin: gate.origin === "" ? config.pool : gate.origin,
        ...(gate.model === undefined ? {} : { model: gate.model }),
        since: gate.since,
        probesAt: gate.nextAt
      }]
    ),
    eligible: keys.filter((key) => key.closed === undefined).length,
    inFlight: keys.reduce((sum, key) => sum + key.inFlight, 0),
    waiting: state.rest.waiting,
    lanes: [...HashMap.values(state.rest.lanes)].flatMap((lane) =>
      Option.match(RedBlackTree.first(lane), {
        onNone: () => [],
        onSome: ([, { request, since }]) => {
          const { at } = PoolState.opening(config, state, request, now)
          return [{
            ...(request.model === undefined ? {} : { model: request.model }),
            waiting: RedBlackTree.size(lane),
            since,
            ...(Number.isFinite(at) ? { availableAt: at } : {})
          }]
        }
      })
    ),
    calls: state.calls,
    attempts: state.leases
  }
}

/**
 * A gate as people see it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const gateOf = (closed: KeyState.Closed): typeof ClosedGate.Type => ({
  gate: closed.gate,
  ...(closed.fault === undefined ? {} : { fault: closed.fault }),
  ...(Number.isFinite(closed.until) ? { until: closed.until } : {})
})
