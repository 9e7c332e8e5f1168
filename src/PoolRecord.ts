/**
 * A pool as it is kept across processes, and back: absolute times of the wall clock, no secrets, nothing in flight.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import * as Affinity from "./Affinity.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as Fault from "./Fault.js"
import type * as KeyState from "./KeyState.js"
import * as LimitRecord from "./LimitRecord.js"
import * as Limits from "./Limits.js"
import * as Places from "./Places.js"
import * as PoolKeys from "./PoolKeys.js"
import * as PoolState from "./PoolState.js"
import type * as RateLimit from "./RateLimit.js"

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
  /** When it answered last; absent: never. */
  answeredAt: Schema.optionalWith(instant, { exact: true }),
  breaker: CircuitBreaker.Stored,
  bench: Schema.optionalWith(StoredBench, { exact: true })
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredKey = typeof StoredKey.Type

/**
 * The limits of a key (by id) or of a group, for one model or for all.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredPartyLimits = Schema.Struct({
  scope: Schema.Literal("key", "group"),
  of: Schema.String,
  model: Schema.optionalWith(Schema.String, { exact: true }),
  limits: LimitRecord.StoredLimits
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredPartyLimits = typeof StoredPartyLimits.Type

/**
 * The stored resources of one group, as they are kept: one per line, with the last use in seconds since the epoch (base
 * 36). There may be many, so they are plain text and no structure.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredResources = Schema.Struct({ group: Schema.String, names: Schema.String })

/**
 * @since 0.1.0
 * @category models
 */
export type StoredResources = typeof StoredResources.Type

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
  ),
  /** What is used and known of the limits of keys (by id) and groups, for all models or one. */
  limits: Schema.optionalWith(Schema.Array(StoredPartyLimits), { exact: true }),
  /** Which group has which stored resource. */
  resources: Schema.optionalWith(Schema.Array(StoredResources), { exact: true })
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredPool = typeof StoredPool.Type

/**
 * What to keep of a pool. `wallOffset` is what must be added to the pool's clock to get milliseconds since the epoch;
 * `resources` are its stored resources, where they have been put into words before.
 *
 * @since 0.1.0
 * @category encoding
 */
export const fromState = (
  state: PoolState.PoolState,
  now: number,
  wallOffset: number,
  resources: ReadonlyArray<StoredResources> = resourcesOf(state, now, wallOffset)
): StoredPool => {
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
  const limits = limitsOf(state, keys, now, wallOffset)
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
      ...(Number.isFinite(key.answeredAt) ? { answeredAt: key.answeredAt + wallOffset } : {}),
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
    ]),
    ...(limits.length === 0 ? {} : { limits }),
    ...(resources.length === 0 ? {} : { resources })
  }
}

/** What is used and known of limits. The more parties there are, the less of each: a record has its bounds. */
const limitsOf = (
  state: PoolState.PoolState,
  keys: ReadonlyArray<KeyState.KeyState>,
  now: number,
  wallOffset: number
): ReadonlyArray<StoredPartyLimits> => {
  const parties: Array<Omit<StoredPartyLimits, "limits"> & { readonly limits: RateLimit.RateLimit }> = []
  const bySlot = new Map(keys.map((key) => [key.slot, key]))
  for (const key of keys) {
    if (key.limits !== undefined && !key.retiring) parties.push({ scope: "key", of: key.id, limits: key.limits })
  }
  for (const [of, limits] of state.rest.limits.groups) parties.push({ scope: "group", of, limits })
  for (const [model, { groups, keys }] of state.rest.limits.models) {
    for (const [slot, limits] of keys) {
      const key = bySlot.get(slot)
      if (key !== undefined && !key.retiring) parties.push({ scope: "key", of: key.id, model, limits })
    }
    for (const [of, limits] of groups) parties.push({ scope: "group", of, model, limits })
  }
  const most = Math.min(256, Math.max(16, Math.floor(40_000 / Math.max(1, parties.length))))
  return parties.flatMap((party) => {
    const limits = LimitRecord.fromLimits(party.limits, now, wallOffset, most)
    return limits === undefined ? [] : [{ ...party, limits }]
  })
}

/**
 * The stored resources of a pool, as they are kept.
 *
 * @since 0.1.0
 * @category encoding
 */
export const resourcesOf = (
  state: PoolState.PoolState,
  now: number,
  wallOffset: number
): ReadonlyArray<StoredResources> => {
  const lines = new Map<string, Array<string>>()
  for (const [name, { at, holder }] of state.rest.affinity.resources.entries) {
    if (now >= at + Affinity.limits.millis || name.includes("\n")) continue
    const line = `${name} ${Math.floor((at + wallOffset) / 1_000).toString(36)}`
    const group = lines.get(holder)
    if (group === undefined) lines.set(holder, [line])
    else group.push(line)
  }
  return Array.from(lines, ([group, names]) => ({ group, names: names.join("\n") }))
}

/** Stored resources, the ones longest unused first. Lines that make no sense are left out. */
const resourcesFrom = (
  stored: ReadonlyArray<StoredResources>,
  now: number,
  wallOffset: number
): Affinity.Book => {
  const found: Array<{ readonly name: string; readonly group: string; readonly at: number }> = []
  for (const { group, names } of stored) {
    for (const line of names.split("\n")) {
      const space = line.lastIndexOf(" ")
      const at = Math.min(now, parseInt(line.slice(space + 1), 36) * 1_000 - wallOffset)
      if (space > 0 && now < at + Affinity.limits.millis) found.push({ name: line.slice(0, space), group, at })
    }
  }
  found.sort((a, b) => a.at - b.at)
  return found.slice(-Affinity.limits.names).reduce(
    (book, { at, group, name }) => Affinity.remember(book, [name], group, at),
    Affinity.emptyBook
  )
}

/**
 * A pool with what was kept of it. What remains of a wait is never longer than the whole of it was; keys that the pool
 * no longer has are left out. What the pool has learned meanwhile stays: counters add up, waits merge by maximum.
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
  const later = (own: KeyState.Bench | undefined, stored: StoredBench): KeyState.Bench => {
    const kept = bench(stored)
    return own !== undefined && own.until > kept.until ? own : kept
  }
  // How long ago it was saved; a clock that went back since makes nothing later than it was.
  const passed = Math.max(0, now + wallOffset - record.savedAt)
  const backAt = (instant: number) => now - passed - (record.savedAt - instant)
  // What is restored is known as of now: the floor does not break it in this moment.
  let next: PoolState.PoolState = { ...state, rest: { ...state.rest, floorAt: now } }
  for (const stored of record.keys) {
    next = PoolKeys.updateKey(config, next, stored.id, (key) => ({
      ...key,
      enabled: key.enabled && stored.enabled,
      total: key.total + stored.total,
      successes: key.successes + stored.successes,
      faults: key.faults + stored.faults,
      ignored: key.ignored + stored.ignored,
      answeredAt: Math.max(
        key.answeredAt,
        stored.answeredAt === undefined ? -Infinity : Math.min(now, backAt(stored.answeredAt))
      ),
      // A key that has been tried here is known better here.
      breaker: key.successes + key.faults > 0
        ? key.breaker
        : CircuitBreaker.fromStored(stored.breaker, now, wallOffset, key.breaker.generation + 1),
      bench: stored.bench === undefined ? key.bench : later(key.bench, stored.bench)
    }), now)?.state ?? next
  }
  for (const { bench: stored, group } of record.groups) {
    const own = Option.getOrUndefined(HashMap.get(next.rest.groups, group))?.bench
    next = PoolKeys.benchGroup(config, next, group, later(own, stored), now)
  }
  for (const { bench: stored, model, of, scope } of record.models) {
    next = PoolKeys.benchModel(next, scope, of, model, (own) => later(own, stored), now)
  }
  for (const { limits, model, of, scope } of record.limits ?? []) {
    const key = PoolKeys.memberOf(next, scope, of)
    // A key that has joined a group since has no limits of its own.
    if (key === undefined || (scope === "key") !== (key.key.quotaGroup === undefined)) continue
    const restored = Limits.restore(
      config,
      next,
      key,
      model,
      (known) => LimitRecord.restore(known, limits, record.savedAt, backAt, now),
      now
    )
    next = scope === "key" && model === undefined
      ? Places.place(config, restored.state, restored.key, now)
      : restored.state
  }
  if (record.resources !== undefined) {
    const resources = Affinity.merged(resourcesFrom(record.resources, now, wallOffset), next.rest.affinity.resources)
    next = { ...next, rest: { ...next.rest, affinity: { ...next.rest.affinity, resources } } }
  }
  return next
}
