/**
 * A pool as it is kept across processes, and back: absolute times of the wall clock, no secrets, nothing in flight.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Schema from "effect/Schema"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as Fault from "./Fault.js"
import type * as KeyState from "./KeyState.js"
import * as PoolKeys from "./PoolKeys.js"
import * as PoolState from "./PoolState.js"

const count = Schema.Number.pipe(Schema.int(), Schema.nonNegative())
const instant = Schema.Number.pipe(Schema.finite())

/**
 * A cooldown as it is kept. Times are of the wall clock, in milliseconds since the epoch; `waitMillis` is its whole
 * length, so that a clock that moved cannot make it longer.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredBench = Schema.Struct({
  kind: Fault.Kind,
  until: instant,
  waitMillis: Schema.Number.pipe(Schema.finite(), Schema.nonNegative()),
  provenance: Fault.Provenance,
  /** How much of it is more than a guess, in milliseconds from its beginning; absent: nothing. */
  firmMillis: Schema.optionalWith(Schema.Number.pipe(Schema.finite(), Schema.nonNegative()), { exact: true }),
  /** Whether a refusal that no wait mends is part of it. */
  refused: Schema.optionalWith(Schema.Boolean, { default: () => false }),
  step: count
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredBench = typeof StoredBench.Type

/**
 * A key as it is kept.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredKey = Schema.Struct({
  id: Schema.String,
  enabled: Schema.Boolean,
  total: count,
  successes: count,
  faults: count,
  ignored: count,
  breaker: CircuitBreaker.Stored,
  bench: Schema.optionalWith(StoredBench, { exact: true })
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredKey = typeof StoredKey.Type

/**
 * A pool as it is kept: `version` tells how to read it.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredPool = Schema.Struct({
  version: Schema.Literal(1),
  savedAt: instant,
  keys: Schema.Array(StoredKey),
  /** Cooldowns of quota groups. */
  groups: Schema.Array(Schema.Struct({ group: Schema.String, bench: StoredBench })),
  /** Cooldowns for one model, of a key (by id) or of a group. */
  models: Schema.Array(
    Schema.Struct({
      model: Schema.String,
      scope: Schema.Literal("key", "group"),
      of: Schema.String,
      bench: StoredBench
    })
  )
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredPool = typeof StoredPool.Type

/**
 * What to keep of a pool. `wallOffset` is what must be added to the pool's clock to get milliseconds since the epoch.
 *
 * @since 0.1.0
 * @category encoding
 */
export const fromState = (state: PoolState.PoolState, now: number, wallOffset: number): StoredPool => {
  const bench = (bench: KeyState.Bench): StoredBench => ({
    kind: bench.kind,
    until: bench.until + wallOffset,
    waitMillis: Math.max(0, bench.until - bench.since),
    provenance: bench.provenance,
    refused: bench.refused,
    step: bench.step,
    ...(Number.isFinite(bench.firm) ? { firmMillis: Math.max(0, bench.firm - bench.since) } : {})
  })
  const keys = PoolState.keys(state)
  const ids = new Map(keys.map((key) => [key.slot, key.id]))
  return {
    version: 1,
    savedAt: now + wallOffset,
    keys: keys.filter((key) => !key.retiring).map((key) => ({
      id: key.id,
      enabled: key.enabled,
      total: key.total,
      successes: key.successes,
      faults: key.faults,
      ignored: key.ignored,
      breaker: CircuitBreaker.toStored(key.breaker, now, wallOffset),
      ...(key.bench === undefined ? {} : { bench: bench(key.bench) })
    })),
    groups: HashMap.toEntries(state.rest.groups).flatMap(([group, { bench: held }]) =>
      held === undefined ? [] : [{ group, bench: bench(held) }]
    ),
    models: HashMap.toEntries(state.rest.models).flatMap(([model, { groups, keys }]) => [
      ...HashMap.toEntries(keys).flatMap(([slot, held]) => {
        const id = ids.get(slot)
        return id === undefined ? [] : [{ model, scope: "key" as const, of: id, bench: bench(held) }]
      }),
      ...HashMap.toEntries(groups).map(([group, held]) => ({
        model,
        scope: "group" as const,
        of: group,
        bench: bench(held)
      }))
    ])
  }
}

/**
 * A pool with what was kept of it. What remains of a wait is never longer than the whole of it was; keys that the pool
 * no longer has are left out.
 *
 * @since 0.1.0
 * @category decoding
 */
export const restore = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  record: StoredPool,
  now: number,
  wallOffset: number
): PoolState.PoolState => {
  const bench = (stored: StoredBench): KeyState.Bench => {
    const remaining = Math.min(Math.max(0, stored.until - wallOffset - now), stored.waitMillis)
    const { firmMillis, kind, provenance, refused, step } = stored
    const since = now + remaining - stored.waitMillis
    return {
      kind,
      provenance,
      refused,
      step,
      since,
      until: now + remaining,
      firm: firmMillis === undefined ? -Infinity : since + firmMillis,
      stamp: 0,
      trial: undefined
    }
  }
  // What is restored is known as of now: the floor does not break it in this moment.
  let next: PoolState.PoolState = { ...state, rest: { ...state.rest, floorAt: now } }
  for (const stored of record.keys) {
    next = PoolKeys.updateKey(config, next, stored.id, (key) => ({
      ...key,
      enabled: stored.enabled,
      total: stored.total,
      successes: stored.successes,
      faults: stored.faults,
      ignored: stored.ignored,
      breaker: CircuitBreaker.fromStored(stored.breaker, now, wallOffset, key.breaker.generation + 1),
      bench: stored.bench === undefined ? key.bench : bench(stored.bench)
    }), now)?.state ?? next
  }
  for (const stored of record.groups) next = PoolKeys.benchGroup(config, next, stored.group, bench(stored.bench), now)
  for (const stored of record.models) {
    next = PoolKeys.benchModel(next, stored.scope, stored.of, stored.model, bench(stored.bench), now)
  }
  return next
}
