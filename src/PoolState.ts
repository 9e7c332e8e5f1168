/**
 * All keys of a pool together, and the pure steps that change them: `lease`, `settle`, `dispatch` and the run-time
 * controls. Each step is one atomic change of the pool's single Ref.
 *
 * The eligible keys stand in the strategy's index, the others in order of the instant they may open; a call costs the
 * same for ten keys as for ten thousand.
 *
 * @since 0.1.0
 */
import type * as Deferred from "effect/Deferred"
import { identity } from "effect/Function"
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as Order from "effect/Order"
import * as RedBlackTree from "effect/RedBlackTree"
import type * as ApiKey from "./ApiKey.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as Fault from "./Fault.js"
import type { KeyReason } from "./KeymeshError.js"
import * as KeyState from "./KeyState.js"
import type * as Outcome from "./Outcome.js"
import * as RetryPolicy from "./RetryPolicy.js"
import * as SlotMap from "./SlotMap.js"
import type * as Strategy from "./Strategy.js"
import type * as Telemetry from "./Telemetry.js"
import * as Tournament from "./Tournament.js"

/**
 * What the steps need to know of the settings; all times in milliseconds.
 *
 * @since 0.1.0
 * @category models
 */
export interface Config extends KeyState.GateSettings {
  readonly pool: string
  readonly strategy: Strategy.Strategy
  readonly cooldowns: Cooldowns
  readonly tokens: RetryPolicy.TokenOptions
  /** One call per this long goes through when only guesses hold all keys back; `undefined`: none does. */
  readonly floorMillis: number | undefined
  readonly maxWaiters: number
}

/**
 * How long each kind of fault keeps a key away when the server does not say.
 *
 * @since 0.1.0
 * @category models
 */
export interface Cooldowns {
  readonly rateLimited: Growing
  readonly quotaMillis: number
  /** A credential that the provider refused by name. */
  readonly revokedMillis: number
  /** Any other refusal of a credential: one step after another. */
  readonly unauthorizedMillis: ReadonlyArray<number>
  readonly forbidden: Growing
  /** Added to a told wait, so that the call comes after its end. */
  readonly guardMillis: number
  /** The most that is added to a guessed wait, so that keys do not come back together. */
  readonly jitterMillis: number
}

/**
 * @since 0.1.0
 * @category models
 */
export interface Growing {
  readonly firstMillis: number
  readonly factor: number
  readonly maxMillis: number
}

/**
 * @since 0.1.0
 * @category models
 */
export interface PoolState {
  readonly slots: SlotMap.SlotMap<KeyState.KeyState>
  readonly index: Strategy.Index
  /** The newest lease; leases count from 1. */
  readonly leases: number
  /** The newest call; calls count from 1. */
  readonly calls: number
  /** The earliest instant at which a gated key may open. */
  readonly nextOpening: number
  readonly rest: Rest
}

/**
 * What a usual call does not change.
 *
 * @since 0.1.0
 * @category models
 */
export interface Rest {
  readonly closed: boolean
  readonly ids: HashMap.HashMap<string, number>
  /** Slots that keys have left. */
  readonly free: ReadonlyArray<number>
  readonly gated: Tournament.Tournament<Opening>
  readonly groups: HashMap.HashMap<string, Group>
  /** Cooldowns for one model only. */
  readonly models: HashMap.HashMap<string, ModelBenches>
  /** Whether some key may serve certain models only. */
  readonly restricted: boolean
  /** Breakers that are open or half-open, and not by hand. */
  readonly breakersOpen: number
  /** Gated keys that an event may open at any moment, and those that one may open from some later instant on. */
  readonly earlyNow: number
  readonly earlyLater: number
  readonly floorAt: number
  readonly tokens: RetryPolicy.Tokens
  /** Calls counted into `tokens` so far. */
  readonly tokenCalls: number
  /** Who waits, by lane (model), in order of their calls. */
  readonly lanes: HashMap.HashMap<string, RedBlackTree.RedBlackTree<number, Waiter>>
  readonly waiting: number
}

/**
 * A gated key's place among the others: when it may open.
 *
 * @since 0.1.0
 * @category models
 */
export interface Opening {
  readonly slot: number
  readonly until: number
}

/**
 * @since 0.1.0
 * @category models
 */
export interface Group {
  readonly members: ReadonlyArray<number>
  readonly bench: KeyState.Bench | undefined
}

/**
 * @since 0.1.0
 * @category models
 */
export interface ModelBenches {
  readonly keys: HashMap.HashMap<number, KeyState.Bench>
  readonly groups: HashMap.HashMap<string, KeyState.Bench>
}

/**
 * The right to make one attempt with one key.
 *
 * @since 0.1.0
 * @category models
 */
export interface LeaseRecord {
  readonly id: number
  readonly slot: number
  readonly key: ApiKey.ApiKey
  readonly call: number
  readonly model: string | undefined
  readonly startedAt: number
  /** The breaker's generation, and whether this is its probe. */
  readonly generation: number
  readonly probe: boolean
  /** Let through although the key is gated. */
  readonly floor: boolean
}

/**
 * What a call wants of a key.
 *
 * @since 0.1.0
 * @category models
 */
export interface Request {
  /** The call's number; 0 for a call that begins. */
  readonly call: number
  readonly model: string | undefined
  /** Keys to avoid if there are others, by slot: those that failed this call already. */
  readonly avoid: ReadonlyArray<number>
  /** Which keys may serve at all; absent: all. */
  readonly only: ((key: ApiKey.ApiKey) => boolean) | undefined
  readonly rotation: boolean
  readonly random: number
}

/**
 * A call that waits.
 *
 * @since 0.1.0
 * @category models
 */
export interface Waiter {
  readonly request: Request
  readonly since: number
  /** When it gives up. */
  readonly until: number
  /** Where its answer goes: a lease, or `undefined` when waiting is no use. */
  readonly answer: Deferred.Deferred<LeaseRecord | undefined>
}

const opensFirst = (a: Opening, b: Opening): boolean => a.until < b.until || (a.until === b.until && a.slot < b.slot)
const byNumber: Order.Order<number> = (a, b) => a < b ? -1 : a > b ? 1 : 0

/**
 * A pool of these keys. Their ids must differ.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (config: Config, keys: ReadonlyArray<ApiKey.ApiKey>, now: number): PoolState =>
  keys.reduce<PoolState>((state, key) => addKey(config, state, key, now), {
    slots: SlotMap.empty<KeyState.KeyState>(),
    index: config.strategy.empty,
    leases: 0,
    calls: 0,
    nextOpening: Infinity,
    rest: {
      closed: false,
      ids: HashMap.empty(),
      free: [],
      gated: Tournament.empty(opensFirst),
      groups: HashMap.empty(),
      models: HashMap.empty(),
      restricted: false,
      breakersOpen: 0,
      earlyNow: 0,
      earlyLater: 0,
      floorAt: -Infinity,
      tokens: RetryPolicy.tokens(now, config.tokens),
      tokenCalls: 0,
      lanes: HashMap.empty(),
      waiting: 0
    }
  })

// ---------------------------------------------------------------------------------------------------------- lookup

/**
 * The key of an id.
 *
 * @since 0.1.0
 * @category getters
 */
export const find = (state: PoolState, id: string): KeyState.KeyState | undefined => {
  const slot = HashMap.get(state.rest.ids, id)
  return slot._tag === "None" ? undefined : SlotMap.get(state.slots, slot.value)
}

/**
 * All keys, retiring ones too.
 *
 * @since 0.1.0
 * @category getters
 */
export const keys = (state: PoolState): ReadonlyArray<KeyState.KeyState> => SlotMap.values(state.slots)

/**
 * Every gate of a key, for all models: its own and its group's.
 *
 * @since 0.1.0
 * @category gates
 */
export const keyGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  now: number
): KeyState.Closed | undefined =>
  KeyState.both(KeyState.gate(config, key, now), KeyState.benchGate(config, groupBench(state, key), now))

/**
 * Every gate of a key for one model.
 *
 * @since 0.1.0
 * @category gates
 */
export const requestGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  now: number
): KeyState.Closed | undefined =>
  model === undefined
    ? keyGate(config, state, key, now)
    : KeyState.both(keyGate(config, state, key, now), modelGate(config, state, key, model, now))

/**
 * The gates of a key that hold for one model only.
 *
 * @since 0.1.0
 * @category gates
 */
export const modelGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string,
  now: number
): KeyState.Closed | undefined => {
  if (key.key.models !== undefined && !key.key.models.has(model)) {
    return { gate: "model", until: Infinity, earliest: Infinity, breakableAt: Infinity, fault: undefined }
  }
  const benches = HashMap.get(state.rest.models, model)
  if (benches._tag === "None") return undefined
  return KeyState.both(
    KeyState.benchGate(config, Option.getOrUndefined(HashMap.get(benches.value.keys, key.slot)), now),
    key.key.quotaGroup === undefined
      ? undefined
      : KeyState.benchGate(
        config,
        Option.getOrUndefined(HashMap.get(benches.value.groups, key.key.quotaGroup)),
        now
      )
  )
}

const groupBench = (state: PoolState, key: KeyState.KeyState): KeyState.Bench | undefined =>
  key.key.quotaGroup === undefined
    ? undefined
    : Option.getOrUndefined(HashMap.get(state.rest.groups, key.key.quotaGroup))?.bench

/**
 * Why each key may not serve: the first 32 in full, and how many keys each reason holds back.
 *
 * @since 0.1.0
 * @category getters
 */
export const explain = (
  config: Config,
  state: PoolState,
  request: Pick<Request, "model" | "only">,
  now: number
): { readonly reasons: ReadonlyArray<KeyReason>; readonly counts: Readonly<Record<string, number>> } => {
  const reasons: Array<KeyReason> = []
  const counts: Record<string, number> = {}
  for (const key of SlotMap.values(state.slots)) {
    const closed = requestGate(config, state, key, request.model, now)
    const gate: string = closed?.fault ?? closed?.gate ?? (request.only?.(key.key) === false ? "unsuited" : "eligible")
    if (gate === "eligible") continue
    counts[gate] = (counts[gate] ?? 0) + 1
    if (reasons.length < 32) {
      reasons.push({
        keyId: key.id,
        label: key.label,
        gate: closed?.gate ?? gate,
        ...(closed?.fault === undefined ? {} : { fault: closed.fault }),
        ...(closed === undefined || !Number.isFinite(closed.until) ? {} : { until: closed.until })
      })
    }
  }
  return { reasons, counts }
}

// ----------------------------------------------------------------------------------------------------------- lease

/**
 * What a lease step gives: a lease, or the instant at which one may be had.
 *
 * @since 0.1.0
 * @category models
 */
export interface Leased {
  readonly state: PoolState
  readonly lease: LeaseRecord | undefined
  readonly events: ReadonlyArray<Telemetry.Unnumbered>
}

const noEvents: ReadonlyArray<Telemetry.Unnumbered> = []

/**
 * Picks a key and leases it, if one may serve. It does not look at who waits: see `acquire`.
 *
 * @since 0.1.0
 * @category steps
 */
export const lease = (config: Config, before: PoolState, request: Request, now: number): Leased => {
  const state = now >= before.nextOpening ? reopen(config, before, now) : before
  const barred = request.model !== undefined && narrowed(state)
    ? (slot: number) => {
      const key = SlotMap.get(state.slots, slot)
      return key === undefined || modelGate(config, state, key, request.model as string, now) !== undefined
    }
    : undefined
  const picked = pick(config, state, request, barred, now)
  if (picked !== undefined) {
    const key = SlotMap.get(state.slots, picked.slot)
    if (key !== undefined) return grant(config, { ...state, index: picked.index }, key, request, now)
  }
  return floor(config, state, request, now)
}

const pick = (
  config: Config,
  state: PoolState,
  request: Request,
  barred: ((slot: number) => boolean) | undefined,
  now: number
): Strategy.Picked | undefined => {
  const { avoid, only, random, rotation } = request
  if (state.index.size === 0) return undefined
  if (barred === undefined && only === undefined && avoid.length === 0) {
    return state.index.pick({ excluded: none, rotation, random, now })
  }
  const unsuited = (slot: number): boolean => {
    if (barred?.(slot) === true) return true
    if (only === undefined) return false
    const key = SlotMap.get(state.slots, slot)
    return key === undefined || !only(key.key)
  }
  const other = avoid.length === 0
    ? undefined
    : state.index.pick({ excluded: (slot) => avoid.includes(slot) || unsuited(slot), rotation, random, now })
  return other ?? state.index.pick({ excluded: unsuited, rotation, random, now })
}

const none = () => false

/**
 * Whether a key may serve now that the call has not tried yet.
 *
 * @since 0.1.0
 * @category getters
 */
export const hasOther = (
  config: Config,
  state: PoolState,
  model: string | undefined,
  avoid: ReadonlyArray<number>,
  now: number
): boolean =>
  SlotMap.values(state.slots).some((key) =>
    !avoid.includes(key.slot) && requestGate(config, state, key, model, now) === undefined
  )

/** Leases a key that may serve: takes the probe of its breaker, and the trial of any bench that has ended. */
const grant = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  request: Request,
  now: number,
  floor = false
): Leased => {
  const id = state.leases + 1
  const call = request.call === 0 ? state.calls + 1 : request.call
  const calls = request.call === 0 ? call : state.calls
  const probes = !floor && key.breaker._tag !== "Closed"
  const breaker = probes ? CircuitBreaker.takeProbe(key.breaker, now, id) : key.breaker
  const group = groupBench(state, key)
  const benched = key.bench !== undefined || group !== undefined
  const leased: KeyState.KeyState = {
    ...key,
    inFlight: key.inFlight + 1,
    total: key.total + 1,
    lastUsed: now,
    breaker,
    bench: key.bench === undefined ? undefined : KeyState.takeTrial(key.bench, id, now)
  }
  const record: LeaseRecord = {
    id,
    slot: key.slot,
    key: key.key,
    call,
    model: request.model,
    startedAt: now,
    generation: breaker.generation,
    probe: probes,
    floor
  }
  const counted: PoolState = { ...state, leases: id, calls }
  if (!probes && !benched && KeyState.isPlain(leased) && (request.model === undefined || !hasModels(state))) {
    return { state: touch(counted, leased), lease: record, events: noEvents }
  }
  let next = withGroupBench(counted, key, group === undefined ? undefined : KeyState.takeTrial(group, id, now))
  next = mapModelBenches(next, leased, request.model, (bench) => KeyState.takeTrial(bench, id, now))
  next = group !== undefined && KeyState.needsTrial(group)
    ? placeGroup(config, place(config, next, leased, now), key.key.quotaGroup, now)
    : place(config, next, leased, now)
  return { state: next, lease: record, events: transitions(config, key, leased, now) }
}

const hasModels = (state: PoolState): boolean => HashMap.size(state.rest.models) > 0

/** When only guesses hold every key back, one call per interval goes through, to another key each time. */
const floor = (config: Config, state: PoolState, request: Request, now: number): Leased => {
  const refused: Leased = { state, lease: undefined, events: noEvents }
  if (config.floorMillis === undefined || now < state.rest.floorAt + config.floorMillis) return refused
  const key = floorKey(config, state, request, now)
  if (key === undefined) return refused
  const granted = grant(
    config,
    { ...state, rest: { ...state.rest, floorAt: now } },
    key,
    request,
    now,
    true
  )
  return {
    ...granted,
    events: [...granted.events, { _tag: "pool.floor", pool: config.pool, at: now, keyId: key.id, label: key.label }]
  }
}

/** The key that the floor would use: the one longest unused, if the nearest gate of all is only guessed. */
const floorKey = (
  config: Config,
  state: PoolState,
  request: Pick<Request, "model" | "only">,
  now: number
): KeyState.KeyState | undefined => {
  const first = nearest(config, state, request, now)
  // An attempt that runs may open its key at any moment: nothing is nearer than that.
  if (first.breakableAt > now || first.earliest <= now) return undefined
  let oldest: KeyState.KeyState | undefined
  for (const key of SlotMap.values(state.slots)) {
    if (request.only?.(key.key) === false || (oldest !== undefined && key.lastUsed >= oldest.lastUsed)) continue
    const closed = requestGate(config, state, key, request.model, now)
    if (closed !== undefined && closed.breakableAt <= now) oldest = key
  }
  return oldest
}

/**
 * When a key may serve a request, if no key may now: by itself `at` that instant, and through some event not before
 * `earliest`. `Infinity`: never.
 *
 * @since 0.1.0
 * @category getters
 */
export interface OpeningTime {
  readonly at: number
  readonly earliest: number
}

/**
 * @since 0.1.0
 * @category getters
 */
export const opening = (
  config: Config,
  state: PoolState,
  request: Pick<Request, "model" | "only">,
  now: number
): OpeningTime => {
  const { at, breakableAt, earliest } = nearest(config, state, request, now)
  if (config.floorMillis === undefined || breakableAt >= at || earliest <= now) return { at, earliest }
  const floorAt = Math.max(now, breakableAt, state.rest.floorAt + config.floorMillis)
  return { at: Math.min(at, floorAt), earliest: Math.min(earliest, floorAt) }
}

/** Whether a wait until then cannot end well. */
const isHopeless = ({ earliest }: OpeningTime, until: number): boolean => earliest > until || earliest === Infinity

/** The gate that opens first by itself, and the earliest instant at which an event may open any. */
const nearest = (
  config: Config,
  state: PoolState,
  request: Pick<Request, "model" | "only">,
  now: number
): OpeningTime & { readonly breakableAt: number } => {
  const plain = request.only === undefined && (request.model === undefined || !narrowed(state))
  if (plain && state.rest.earlyLater === 0) {
    if (state.index.size > 0) return { at: now, earliest: now, breakableAt: Infinity }
    const first = Tournament.best(state.rest.gated)
    const key = first === undefined ? undefined : SlotMap.get(state.slots, first.slot)
    if (key === undefined) return { at: Infinity, earliest: Infinity, breakableAt: Infinity }
    const closed = keyGate(config, state, key, now)
    const at = closed?.until ?? now
    return {
      at,
      earliest: state.rest.earlyNow > 0 ? -Infinity : at,
      breakableAt: closed?.breakableAt ?? Infinity
    }
  }
  let at = Infinity
  let earliest = Infinity
  let breakableAt = Infinity
  for (const key of SlotMap.values(state.slots)) {
    if (request.only?.(key.key) === false) continue
    const closed = requestGate(config, state, key, request.model, now)
    if (closed === undefined) return { at: now, earliest: now, breakableAt: Infinity }
    earliest = Math.min(earliest, closed.earliest)
    if (closed.until < at) {
      at = closed.until
      breakableAt = closed.breakableAt
    }
  }
  return { at, earliest, breakableAt }
}

/** Whether some keys may serve some models only, for now or for good. */
const narrowed = (state: PoolState): boolean => state.rest.restricted || hasModels(state)

// ---------------------------------------------------------------------------------------------------------- settle

/**
 * What a step gives that only changes the state.
 *
 * @since 0.1.0
 * @category models
 */
export interface Changed {
  readonly state: PoolState
  readonly events: ReadonlyArray<Telemetry.Unnumbered>
}

/**
 * Takes in what a lease's attempt said (`outcome`), and gives the key back (`end`). `random` is a uniform number in
 * [0, 1), for the jitter of guessed waits.
 *
 * @since 0.1.0
 * @category steps
 */
export const settle = (
  config: Config,
  state: PoolState,
  lease: LeaseRecord,
  outcome: Outcome.Outcome | undefined,
  end: boolean,
  now: number,
  random: number
): Changed => {
  const key = SlotMap.get(state.slots, lease.slot)
  // Nothing of a lease outlives its key, whoever has the slot now.
  if (key === undefined || key.id !== lease.key.id) return { state, events: noEvents }
  const given = end ? { ...key, inFlight: key.inFlight - 1 } : key
  switch (outcome?._tag) {
    case undefined: {
      const eligible = KeyState.isPlain(given) && given.gatedUntil === undefined
      return leaving(config, eligible ? touch(state, given) : place(config, state, given, now), given, now, noEvents)
    }
    case "Success":
      return succeeded(config, state, key, given, lease, now)
    case "Ignored":
      return ignored(config, state, key, given, lease, now)
    case "Fault":
      return faulted(config, state, key, given, lease, outcome.fault, now, random)
  }
}

const succeeded = (
  config: Config,
  state: PoolState,
  before: KeyState.KeyState,
  key: KeyState.KeyState,
  lease: LeaseRecord,
  now: number
): Changed => {
  const breaker = record(config, key.breaker, lease, "success", now)
  const group = groupBench(state, key)
  const successes = key.successes + 1
  const model = lease.model !== undefined && hasModels(state)
  if (KeyState.isPlain(key) && group === undefined && breaker._tag === "Closed" && !model) {
    return { state: touch(state, { ...key, successes, breaker }), events: noEvents }
  }
  const bench = KeyState.lift(key.bench, lease, now)
  const lifted = KeyState.lift(group, lease, now)
  const closes = key.breaker._tag !== "Closed" && breaker._tag === "Closed"
  const groupBack = isGuessLifted(group, lifted)
  const ofModel = lease.model === undefined ? [] : modelBenchesOf(state, key, lease.model)
  const modelBack = ofModel.some((bench) => isGuessLifted(bench, KeyState.lift(bench, lease, now)))
  const ramp = closes || groupBack || modelBack || isGuessLifted(key.bench, bench)
    ? { since: now, successes: 0 }
    : key.ramp === undefined || now >= key.ramp.since + config.rampMillis
    ? undefined
    : { ...key.ramp, successes: key.ramp.successes + 1 }
  const after: KeyState.KeyState = { ...key, successes, breaker, bench, ramp }
  let next = withGroupBench(state, key, lifted)
  next = mapModelBenches(next, key, lease.model, (bench) => KeyState.lift(bench, lease, now))
  next = place(config, next, after, now)
  if (lifted !== group) {
    // The whole group comes back: each of its keys slowly, or they were a herd together.
    const slowly = (key: KeyState.KeyState) => groupBack ? { ...key, ramp: { since: now, successes: 0 } } : key
    next = placeGroup(config, next, key.key.quotaGroup, now, slowly)
  }
  return leaving(config, next, after, now, transitions(config, before, after, now))
}

/** Whether a guess about a key has just turned out to be over. */
const isGuessLifted = (before: KeyState.Bench | undefined, after: KeyState.Bench | undefined): boolean =>
  before !== undefined && after === undefined && KeyState.needsTrial(before)

/** What is held against a key and its group for a model. */
const modelBenchesOf = (
  state: PoolState,
  key: KeyState.KeyState,
  model: string
): ReadonlyArray<KeyState.Bench | undefined> => [
  benchAt(state, key, { scope: "key", model }),
  benchAt(state, key, { scope: "group", model })
]

const ignored = (
  config: Config,
  state: PoolState,
  before: KeyState.KeyState,
  key: KeyState.KeyState,
  lease: LeaseRecord,
  now: number
): Changed => {
  const after: KeyState.KeyState = {
    ...key,
    ignored: key.ignored + 1,
    breaker: record(config, key.breaker, lease, "ignored", now),
    bench: KeyState.freeTrial(key.bench, lease.id)
  }
  const group = groupBench(state, key)
  const freed = KeyState.freeTrial(group, lease.id)
  let next = withGroupBench(state, key, freed)
  next = mapModelBenches(next, key, lease.model, (bench) => KeyState.freeTrial(bench, lease.id))
  next = place(config, next, after, now)
  if (freed !== group) next = placeGroup(config, next, key.key.quotaGroup, now)
  return leaving(config, next, after, now, noEvents)
}

const faulted = (
  config: Config,
  state: PoolState,
  before: KeyState.KeyState,
  key: KeyState.KeyState,
  lease: LeaseRecord,
  fault: Fault.Fault,
  now: number,
  random: number
): Changed => {
  const target = cooldownTarget(key, lease, fault)
  const current = target === undefined ? undefined : benchAt(state, key, target)
  const imposed = target === undefined
    ? undefined
    : cooldown(config, current, fault, { stamp: state.leases, lease: lease.id, random, now })
  // Calls that were in flight when the cooldown began bring old news.
  const fresh = current === undefined || lease.id > current.stamp
  const counts = countsOnBreaker(fault) || (fault.kind === "RateLimited" && imposed?.provenance === "guessed" && fresh)
  const alive = fault.kind !== "ServerError" && fault.kind !== "Timeout" && fault.kind !== "Network" &&
    fault.kind !== "Overloaded"
  const outcome = lease.probe && alive ? "alive" : counts ? "failure" : "alive"
  const breaker = record(config, key.breaker, lease, outcome, now, () => evidence(config, state, key, now))
  let after: KeyState.KeyState = {
    ...key,
    faults: key.faults + 1,
    breaker,
    bench: KeyState.freeTrial(key.bench, lease.id),
    // A request that is wrong by itself says nothing against the key's slow return.
    ramp: imposed === undefined && outcome === "alive" ? key.ramp : undefined
  }
  if (target?.scope === "key" && target.model === undefined && imposed !== undefined) {
    after = { ...after, bench: imposed }
  }
  const group = groupBench(state, key)
  const groupAfter = target?.scope === "group" && target.model === undefined && imposed !== undefined
    ? imposed
    : KeyState.freeTrial(group, lease.id)
  let next = withGroupBench(state, key, groupAfter)
  next = mapModelBenches(next, key, lease.model, (bench) => KeyState.freeTrial(bench, lease.id))
  if (target?.model !== undefined && imposed !== undefined) {
    next = imposeOnModel(next, key, target.scope, target.model, imposed, now)
  }
  next = place(config, next, after, now)
  if (groupAfter !== group) next = placeGroup(config, next, key.key.quotaGroup, now)
  // The floor goes by what is known: a guess of this moment is not broken in the next.
  const opened = before.breaker._tag !== "Open" && after.breaker._tag === "Open"
  if (opened || imposed?.provenance === "guessed") next = { ...next, rest: { ...next.rest, floorAt: now } }
  const events: Array<Telemetry.Unnumbered> = [...transitions(config, before, after, now)]
  if (target !== undefined && imposed !== undefined) {
    events.push({
      _tag: "key.cooldown",
      pool: config.pool,
      at: now,
      keyId: key.id,
      label: key.label,
      scope: target.scope,
      kind: fault.kind,
      provenance: imposed.provenance,
      until: imposed.until,
      ...(target.model === undefined ? {} : { model: target.model }),
      ...(target.scope === "group" && key.key.quotaGroup !== undefined ? { group: key.key.quotaGroup } : {})
    })
  }
  return leaving(config, next, after, now, events)
}

/** Provider faults count against the key as long as nothing says that its siblings have them too. */
const countsOnBreaker = Fault.isProviderFault

/** After an attempt: a retired key whose last attempt has ended leaves. */
const leaving = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  now: number,
  events: ReadonlyArray<Telemetry.Unnumbered>
): Changed =>
  key.retiring && key.inFlight === 0
    ? {
      state: removeKey(state, key),
      events: [...events, { _tag: "key.removed", pool: config.pool, at: now, keyId: key.id, label: key.label }]
    }
    : { state, events }

const record = (
  config: Config,
  breaker: CircuitBreaker.State,
  lease: LeaseRecord,
  outcome: CircuitBreaker.Outcome,
  now: number,
  evidence?: () => CircuitBreaker.Evidence
): CircuitBreaker.State => {
  // The floor broke an open breaker on purpose: its success is as good as a probe's, its failure says nothing new.
  if (lease.floor && breaker._tag === "Open" && breaker.generation === lease.generation) {
    return outcome === "success" && Number.isFinite(breaker.until) ? CircuitBreaker.reset(breaker) : breaker
  }
  const admission = { generation: lease.generation, leaseId: lease.id, probe: lease.probe }
  return CircuitBreaker.record(config.breaker, breaker, now, admission, outcome, evidence?.())
}

/** What the other keys say about a failure of this one. */
const evidence = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  now: number
): CircuitBreaker.Evidence => {
  const size = HashMap.size(state.rest.ids)
  // From 4 keys on, guesses may take out at most half of them.
  const mayOpen = size < 4 || state.rest.breakersOpen + 1 <= size / 2
  const rate = config.breaker.rate
  if (rate === undefined || key.breaker._tag !== "Closed") return { mayOpen }
  const own = CircuitBreaker.counts(key.breaker, now, rate.windowMillis)
  // The siblings are only asked when the key's own outcomes would trip it.
  if (own.calls + 1 < rate.minimumCalls || (own.faults + 1) < rate.faults * (own.calls + 1)) {
    return { mayOpen, siblings: { calls: 0, faults: 0 } }
  }
  let calls = 0
  let faults = 0
  for (const sibling of SlotMap.values(state.slots)) {
    if (sibling.slot === key.slot || sibling.breaker._tag !== "Closed") continue
    const counts = CircuitBreaker.counts(sibling.breaker, now, rate.windowMillis)
    calls += counts.calls
    faults += counts.faults
  }
  return { mayOpen, siblings: { calls, faults } }
}

/** Which memory a fault goes into; `undefined` when it keeps nobody away. */
const cooldownTarget = (
  key: KeyState.KeyState,
  lease: LeaseRecord,
  fault: Fault.Fault
): { readonly scope: "key" | "group"; readonly model: string | undefined } | undefined => {
  const model = fault.perModel ? lease.model : undefined
  const shared = fault.scope === "group" && key.key.quotaGroup !== undefined ? "group" : "key"
  switch (fault.kind) {
    case "RateLimited":
    case "QuotaExhausted":
      return { scope: shared, model }
    case "Unauthorized":
      return { scope: shared, model: undefined }
    case "Forbidden":
      return fault.failover ? { scope: shared, model: lease.model } : undefined
    case "Overloaded":
      return fault.waitMillis === undefined ? undefined : { scope: "key", model }
    default:
      return undefined
  }
}

const benchAt = (
  state: PoolState,
  key: KeyState.KeyState,
  target: { readonly scope: "key" | "group"; readonly model: string | undefined }
): KeyState.Bench | undefined => {
  if (target.model === undefined) return target.scope === "key" ? key.bench : groupBench(state, key)
  const benches = HashMap.get(state.rest.models, target.model)
  if (benches._tag === "None") return undefined
  return Option.getOrUndefined(
    target.scope === "key"
      ? HashMap.get(benches.value.keys, key.slot)
      : HashMap.get(benches.value.groups, key.key.quotaGroup ?? "")
  )
}

/** The cooldown that a fault imposes, on top of the one there is. */
const cooldown = (
  config: Config,
  current: KeyState.Bench | undefined,
  fault: Fault.Fault,
  { lease, now, random, stamp }: {
    readonly now: number
    readonly random: number
    readonly stamp: number
    readonly lease: number
  }
): KeyState.Bench => {
  const { cooldowns } = config
  const again = current !== undefined && current.kind === fault.kind
  const isTold = fault.waitMillis !== undefined && !countsSteps(fault.kind)
  // Several calls in flight may bring the same news: only one that was let in since makes the next cooldown longer.
  const step = isTold
    ? again ? current.step : 0
    : !again
    ? 1
    : lease > current.stamp
    ? current.step + 1
    : current.step
  const guessedJitter = random * cooldowns.jitterMillis
  const told = fault.waitMillis === undefined ? undefined : fault.waitMillis + cooldowns.guardMillis
  const bench = (wait: number, provenance: Fault.Provenance) =>
    KeyState.impose(current, {
      kind: fault.kind,
      since: now,
      until: now + Math.min(wait, longestWait),
      provenance,
      step,
      stamp
    })
  switch (fault.kind) {
    case "QuotaExhausted":
      return fault.resetMillis !== undefined
        ? bench(Math.max(fault.resetMillis, told ?? 0) + cooldowns.guardMillis, "told")
        : bench(Math.max(cooldowns.quotaMillis, told ?? 0) + guessedJitter, "guessed")
    case "Unauthorized": {
      const ladder = cooldowns.unauthorizedMillis
      const wait = fault.explicit ? cooldowns.revokedMillis : ladder[Math.min(step, ladder.length) - 1] ?? 0
      return bench(Math.max(wait, told ?? 0) + guessedJitter, "guessed")
    }
    case "Forbidden":
      return bench(Math.max(grown(cooldowns.forbidden, step), told ?? 0) + guessedJitter, "guessed")
    default:
      return told === undefined
        ? bench(grown(cooldowns.rateLimited, step) + guessedJitter, "guessed")
        : bench(told, fault.provenance)
  }
}

/** The ladders that go on whatever wait was told; of the others, only guesses count. */
const countsSteps = (kind: Fault.Kind): boolean => kind === "Unauthorized" || kind === "Forbidden"

/** A hundred years: for ever, but a number that stores and logs can keep. */
const longestWait = 100 * 365 * 86_400_000

const grown = ({ factor, firstMillis, maxMillis }: Growing, step: number): number =>
  Math.min(maxMillis, firstMillis * factor ** (step - 1))

// ----------------------------------------------------------------------------------------------- retries and waiting

/**
 * Takes a retry token, or tells how long until there is one.
 *
 * @since 0.1.0
 * @category steps
 */
export const spendToken = (
  config: Config,
  state: PoolState,
  now: number
): { readonly state: PoolState; readonly waitMillis: number } => {
  const earned = RetryPolicy.earn(state.rest.tokens, now, config.tokens, state.calls - state.rest.tokenCalls)
  const spent = RetryPolicy.spend(earned, now, config.tokens)
  const tokens = "wait" in spent ? earned : spent
  return {
    state: { ...state, rest: { ...state.rest, tokens, tokenCalls: state.calls } },
    waitMillis: "wait" in spent ? spent.wait : 0
  }
}

/**
 * What a waiter gets: a lease, or the news that waiting is no use.
 *
 * @since 0.1.0
 * @category models
 */
export type Answer =
  | { readonly _tag: "Granted"; readonly waiter: Waiter; readonly lease: LeaseRecord }
  | { readonly _tag: "Refused"; readonly waiter: Waiter }

/**
 * @since 0.1.0
 * @category models
 */
export interface Dispatched {
  readonly state: PoolState
  readonly answers: ReadonlyArray<Answer>
  readonly events: ReadonlyArray<Telemetry.Unnumbered>
}

/**
 * Serves those who wait, in order, as far as keys can serve; refuses those whose wait cannot end in time.
 *
 * @since 0.1.0
 * @category steps
 */
export const dispatch = (config: Config, state: PoolState, now: number): Dispatched => {
  if (state.rest.waiting === 0) return { state, answers: [], events: noEvents }
  const answers: Array<Answer> = []
  const events: Array<Telemetry.Unnumbered> = []
  const blocked = new Set<string>()
  let next = state
  for (let head = firstWaiter(next, blocked); head !== undefined; head = firstWaiter(next, blocked)) {
    const { lane, waiter } = head
    // Too late: it does not hold up the next in line.
    if (next.rest.closed || now > waiter.until) {
      next = withoutWaiter(next, waiter)
      answers.push({ _tag: "Refused", waiter })
      continue
    }
    const leased = lease(config, next, waiter.request, now)
    next = leased.state
    if (leased.lease !== undefined) {
      next = withoutWaiter(next, waiter)
      answers.push({ _tag: "Granted", waiter, lease: leased.lease })
      events.push(...leased.events)
      continue
    }
    blocked.add(lane)
    const opens = opening(config, next, waiter.request, now)
    for (const other of waitersOf(next, lane)) {
      if (now < other.until && !isHopeless(opens, other.until)) continue
      next = withoutWaiter(next, other)
      answers.push({ _tag: "Refused", waiter: other })
    }
  }
  return { state: next, answers, events }
}

/**
 * A change, and then `dispatch`.
 *
 * @since 0.1.0
 * @category steps
 */
export const thenDispatch = (config: Config, changed: Changed, now: number): Dispatched => {
  const served = dispatch(config, changed.state, now)
  return changed.events.length === 0 ? served : { ...served, events: [...changed.events, ...served.events] }
}

/**
 * Whether between two states a key came or went, or a gate opened or closed.
 *
 * @since 0.1.0
 * @category getters
 */
export const hasMoved = ({ rest: before }: PoolState, { rest: after }: PoolState): boolean =>
  before !== after && (before.gated !== after.gated || before.ids !== after.ids || before.groups !== after.groups ||
    before.models !== after.models || before.breakersOpen !== after.breakersOpen)

/**
 * A lease for a call, or a place in the queue. Those who wait already come first.
 *
 * @since 0.1.0
 * @category steps
 */
export const acquire = (
  config: Config,
  before: PoolState,
  request: Request,
  wait: Pick<Waiter, "until" | "answer">,
  now: number
): Dispatched & {
  readonly outcome: LeaseRecord | Waiter | "refused" | "full" | "closed"
} => {
  if (before.rest.closed) return { state: before, answers: [], events: noEvents, outcome: "closed" }
  const served = dispatch(config, before, now)
  const leased = lease(config, served.state, request, now)
  const events = served.events.length === 0 ? leased.events : [...served.events, ...leased.events]
  const answers = served.answers
  if (leased.lease !== undefined) return { state: leased.state, answers, events, outcome: leased.lease }
  const opens = opening(config, leased.state, request, now)
  const call = request.call === 0 ? leased.state.calls + 1 : request.call
  const counted = request.call === 0 ? { ...leased.state, calls: call } : leased.state
  if (wait.until <= now || isHopeless(opens, wait.until)) return { state: counted, answers, events, outcome: "refused" }
  if (counted.rest.waiting >= config.maxWaiters) return { state: counted, answers, events, outcome: "full" }
  const waiter: Waiter = { request: { ...request, call }, since: now, until: wait.until, answer: wait.answer }
  const lane = laneOf(waiter.request)
  const queue = Option.getOrElse(
    HashMap.get(counted.rest.lanes, lane),
    () => RedBlackTree.empty<number, Waiter>(byNumber)
  )
  const rest: Rest = {
    ...counted.rest,
    lanes: HashMap.set(counted.rest.lanes, lane, RedBlackTree.insert(queue, call, waiter)),
    waiting: counted.rest.waiting + 1
  }
  return { state: { ...counted, rest }, answers, events, outcome: waiter }
}

/**
 * Takes a waiter out of the queue; the same state when it is not there (any more).
 *
 * @since 0.1.0
 * @category steps
 */
export const withoutWaiter = (state: PoolState, waiter: Waiter): PoolState => {
  const lane = laneOf(waiter.request)
  const queue = HashMap.get(state.rest.lanes, lane)
  if (queue._tag === "None" || !RedBlackTree.has(queue.value, waiter.request.call)) return state
  const left = RedBlackTree.removeFirst(queue.value, waiter.request.call)
  const lanes = RedBlackTree.size(left) === 0
    ? HashMap.remove(state.rest.lanes, lane)
    : HashMap.set(state.rest.lanes, lane, left)
  return { ...state, rest: { ...state.rest, lanes, waiting: state.rest.waiting - 1 } }
}

/**
 * Whether a waiter still stands in the queue.
 *
 * @since 0.1.0
 * @category getters
 */
export const isWaiting = (state: PoolState, waiter: Waiter): boolean => {
  const queue = HashMap.get(state.rest.lanes, laneOf(waiter.request))
  return queue._tag === "Some" && RedBlackTree.has(queue.value, waiter.request.call)
}

/**
 * When to look at the queue next: at the first opening that serves somebody, or when the first one gives up.
 *
 * @since 0.1.0
 * @category getters
 */
export const nextWake = (config: Config, state: PoolState, now: number): number => {
  if (state.rest.waiting === 0) return Infinity
  let at = Infinity
  for (const [, queue] of state.rest.lanes) {
    const head = RedBlackTree.first(queue)
    if (head._tag === "Some") at = Math.min(at, opening(config, state, head.value[1].request, now).at)
    for (const waiter of RedBlackTree.values(queue)) at = Math.min(at, waiter.until)
  }
  return at
}

/** The waiters of a lane want the same keys, so that what blocks its head blocks it whole. */
const laneOf = (request: Request): string => `${request.only === undefined ? "" : request.call}\n${request.model ?? ""}`

const waitersOf = (state: PoolState, lane: string): ReadonlyArray<Waiter> => {
  const queue = HashMap.get(state.rest.lanes, lane)
  return queue._tag === "None" ? [] : [...RedBlackTree.values(queue.value)]
}

/** The waiter of the oldest call among the lanes that are not blocked. */
const firstWaiter = (
  state: PoolState,
  blocked: ReadonlySet<string>
): { readonly lane: string; readonly waiter: Waiter } | undefined => {
  let first: { readonly lane: string; readonly waiter: Waiter } | undefined
  for (const [lane, queue] of state.rest.lanes) {
    if (blocked.has(lane)) continue
    const head = RedBlackTree.first(queue)
    if (head._tag === "Some" && (first === undefined || head.value[0] < first.waiter.request.call)) {
      first = { lane, waiter: head.value[1] }
    }
  }
  return first
}

// ----------------------------------------------------------------------------------------------- run-time controls

/**
 * Adds a key; one that is there already gets the new attributes, keeps what is remembered of it, and is no longer
 * retired.
 *
 * @since 0.1.0
 * @category steps
 */
export const addKey = (config: Config, state: PoolState, key: ApiKey.ApiKey, now: number): PoolState => {
  const present = find(state, key.id)
  if (present !== undefined) {
    const { label, order, weight } = key
    const left = present.key.quotaGroup === key.quotaGroup ? state : leaveGroup(state, present)
    const joined = present.key.quotaGroup === key.quotaGroup ? left : joinGroup(left, key, present.slot)
    return place(config, restrict(joined, key), { ...present, key, label, order, weight, retiring: false }, now)
  }
  const slot = state.rest.free[state.rest.free.length - 1] ?? state.slots.size
  const rest: Rest = {
    ...state.rest,
    ids: HashMap.set(state.rest.ids, key.id, slot),
    free: state.rest.free.slice(0, -1)
  }
  return place(config, restrict(joinGroup({ ...state, rest }, key, slot), key), KeyState.make(key, slot), now)
}

const restrict = (state: PoolState, key: ApiKey.ApiKey): PoolState =>
  key.models === undefined || state.rest.restricted ? state : { ...state, rest: { ...state.rest, restricted: true } }

const joinGroup = (state: PoolState, key: ApiKey.ApiKey, slot: number): PoolState => {
  if (key.quotaGroup === undefined) return state
  const group = HashMap.get(state.rest.groups, key.quotaGroup)
  const joined: Group = group._tag === "None"
    ? { members: [slot], bench: undefined }
    : { ...group.value, members: [...group.value.members, slot] }
  return { ...state, rest: { ...state.rest, groups: HashMap.set(state.rest.groups, key.quotaGroup, joined) } }
}

const leaveGroup = (state: PoolState, key: KeyState.KeyState): PoolState => {
  const name = key.key.quotaGroup
  const group = name === undefined ? undefined : HashMap.get(state.rest.groups, name)
  if (name === undefined || group?._tag !== "Some") return state
  const members = group.value.members.filter((slot) => slot !== key.slot)
  // What is known of a group outlives its keys: one of them may come back.
  const groups = members.length === 0 && group.value.bench === undefined
    ? HashMap.remove(state.rest.groups, name)
    : HashMap.set(state.rest.groups, name, { ...group.value, members })
  return { ...state, rest: { ...state.rest, groups } }
}

/**
 * Changes one key by hand; `undefined` when there is none of that id.
 *
 * @since 0.1.0
 * @category steps
 */
export const updateKey = (
  config: Config,
  state: PoolState,
  id: string,
  f: (key: KeyState.KeyState) => KeyState.KeyState,
  now: number
): Changed | undefined => {
  const key = find(state, id)
  if (key === undefined) return undefined
  const after = f(key)
  const placed = after === key ? state : place(config, state, after, now)
  return leaving(config, placed, after, now, transitions(config, key, after, now))
}

/**
 * Forgets everything that is held against a key: its breaker, its cooldowns, and those of its group.
 *
 * @since 0.1.0
 * @category steps
 */
export const resetKey = (config: Config, state: PoolState, id: string, now: number): Changed | undefined => {
  const key = find(state, id)
  if (key === undefined) return undefined
  const after: KeyState.KeyState = {
    ...key,
    breaker: CircuitBreaker.reset(key.breaker),
    bench: undefined,
    ramp: undefined
  }
  let next = withGroupBench(state, key, undefined)
  for (const model of HashMap.keys(state.rest.models)) next = mapModelBenches(next, key, model, () => undefined)
  next = placeGroup(config, place(config, next, after, now), key.key.quotaGroup, now)
  return { state: next, events: transitions(config, key, after, now) }
}

/**
 * Puts a group on the bench; nothing when no key is of it.
 *
 * @since 0.1.0
 * @category steps
 */
export const benchGroup = (
  config: Config,
  state: PoolState,
  group: string,
  bench: KeyState.Bench,
  now: number
): PoolState => {
  const found = HashMap.get(state.rest.groups, group)
  if (found._tag === "None") return state
  const groups = HashMap.set(state.rest.groups, group, { ...found.value, bench })
  return placeGroup(config, { ...state, rest: { ...state.rest, groups } }, group, now)
}

/**
 * Puts a key (by id) or a group on the bench for one model; nothing when it is not in the pool.
 *
 * @since 0.1.0
 * @category steps
 */
export const benchModel = (
  state: PoolState,
  scope: "key" | "group",
  of: string,
  model: string,
  bench: KeyState.Bench,
  now: number
): PoolState => {
  const key = scope === "key" ? find(state, of) : keys(state).find((key) => key.key.quotaGroup === of)
  return key === undefined ? state : imposeOnModel(state, key, scope, model, bench, now)
}

/**
 * Starts no more attempts, and refuses everybody who waits.
 *
 * @since 0.1.0
 * @category steps
 */
export const close = (config: Config, state: PoolState, now: number): Dispatched =>
  dispatch(config, { ...state, rest: { ...state.rest, closed: true } }, now)

// ----------------------------------------------------------------------------------------------------------- places

/** Replaces a key whose gates have not changed. */
const touch = (state: PoolState, key: KeyState.KeyState): PoolState => ({
  slots: SlotMap.set(state.slots, key.slot, key),
  index: state.index.update(key),
  leases: state.leases,
  calls: state.calls,
  nextOpening: state.nextOpening,
  rest: state.rest
})

/** Replaces a key and puts it where its gates say: among the eligible, or among the gated at its opening time. */
const place = (config: Config, state: PoolState, key: KeyState.KeyState, now: number): PoolState => {
  const old = SlotMap.get(state.slots, key.slot)
  const closed = keyGate(config, state, key, now)
  const gatedUntil = closed?.until
  const gatedEarliest = closed?.earliest
  const placed: KeyState.KeyState = key.gatedUntil === gatedUntil && key.gatedEarliest === gatedEarliest
    ? key
    : { ...key, gatedUntil, gatedEarliest }
  const wasOpen = old !== undefined && isOpenByGuess(old) ? 1 : 0
  const isOpen = isOpenByGuess(placed) ? 1 : 0
  const oldUntil = old?.gatedUntil
  let gated = state.rest.gated
  if (oldUntil !== gatedUntil) {
    gated = gatedUntil === undefined
      ? Tournament.remove(gated, key.slot)
      : Tournament.set(gated, { slot: key.slot, until: gatedUntil })
  }
  const early = countEarly(placed)
  const wasEarly = countEarly(old)
  const rest = gated === state.rest.gated && wasOpen === isOpen && wasEarly === early ? state.rest : {
    ...state.rest,
    gated,
    breakersOpen: state.rest.breakersOpen + isOpen - wasOpen,
    earlyNow: state.rest.earlyNow + early.now - wasEarly.now,
    earlyLater: state.rest.earlyLater + early.later - wasEarly.later
  }
  return {
    slots: SlotMap.set(state.slots, key.slot, placed),
    index: gatedUntil === undefined ? state.index.insert(placed) : state.index.remove(key.slot),
    leases: state.leases,
    calls: state.calls,
    nextOpening: gated === state.rest.gated ? state.nextOpening : earliest(gated),
    rest
  }
}

/** Open or half-open, and not by hand. */
const isOpenByGuess = ({ breaker }: KeyState.KeyState): boolean =>
  breaker._tag === "HalfOpen" || (breaker._tag === "Open" && breaker.until !== Infinity)

/** How a key counts among those that an event may open. */
const countEarly = (key: KeyState.KeyState | undefined): { readonly now: number; readonly later: number } =>
  key?.gatedEarliest === undefined || key.gatedEarliest === key.gatedUntil
    ? notEarly
    : key.gatedEarliest === -Infinity
    ? earlyNow
    : earlyLater
const notEarly = { now: 0, later: 0 }
const earlyNow = { now: 1, later: 0 }
const earlyLater = { now: 0, later: 1 }

const earliest = (gated: Rest["gated"]): number => Tournament.best(gated)?.until ?? Infinity

/** Puts every key of a group where it belongs now. */
const placeGroup = (
  config: Config,
  state: PoolState,
  group: string | undefined,
  now: number,
  change: (key: KeyState.KeyState) => KeyState.KeyState = identity
): PoolState => {
  if (group === undefined) return state
  const members = Option.getOrUndefined(HashMap.get(state.rest.groups, group))?.members ?? []
  return members.reduce((next, slot) => {
    const key = SlotMap.get(next.slots, slot)
    return key === undefined ? next : place(config, next, change(key), now)
  }, state)
}

/** Moves the keys whose time has come to the eligible ones. */
const reopen = (config: Config, state: PoolState, now: number): PoolState => {
  let next = state
  while (next.nextOpening <= now) {
    const first = Tournament.best(next.rest.gated)
    const key = first === undefined ? undefined : SlotMap.get(next.slots, first.slot)
    if (key === undefined) break
    const placed = place(config, next, key, now)
    // Its gate would still not let it go: it stands there again, and nothing else can open before it.
    if (placed.nextOpening === next.nextOpening && placed.rest.gated === next.rest.gated) break
    next = placed
  }
  return next
}

const withGroupBench = (state: PoolState, key: KeyState.KeyState, bench: KeyState.Bench | undefined): PoolState => {
  const group = key.key.quotaGroup
  if (group === undefined) return state
  const found = HashMap.get(state.rest.groups, group)
  if (found._tag === "None" || found.value.bench === bench) return state
  return {
    ...state,
    rest: { ...state.rest, groups: HashMap.set(state.rest.groups, group, { ...found.value, bench }) }
  }
}

/** Changes what is held against a key and its group for one model. */
const mapModelBenches = (
  state: PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  f: (bench: KeyState.Bench) => KeyState.Bench | undefined
): PoolState => {
  if (model === undefined) return state
  const found = HashMap.get(state.rest.models, model)
  if (found._tag === "None") return state
  const keys = mapEntry(found.value.keys, key.slot, f)
  const groups = key.key.quotaGroup === undefined
    ? found.value.groups
    : mapEntry(found.value.groups, key.key.quotaGroup, f)
  return keys === found.value.keys && groups === found.value.groups
    ? state
    : withModel(state, model, { keys, groups })
}

const mapEntry = <K>(
  map: HashMap.HashMap<K, KeyState.Bench>,
  at: K,
  f: (bench: KeyState.Bench) => KeyState.Bench | undefined
): HashMap.HashMap<K, KeyState.Bench> => {
  const found = HashMap.get(map, at)
  if (found._tag === "None") return map
  const next = f(found.value)
  return next === undefined ? HashMap.remove(map, at) : next === found.value ? map : HashMap.set(map, at, next)
}

const imposeOnModel = (
  state: PoolState,
  key: KeyState.KeyState,
  scope: "key" | "group",
  model: string,
  bench: KeyState.Bench,
  now: number
): PoolState => {
  const pruned = forgetModels(state, now)
  const found = Option.getOrElse(
    HashMap.get(pruned.rest.models, model),
    (): ModelBenches => ({ keys: HashMap.empty(), groups: HashMap.empty() })
  )
  return withModel(
    pruned,
    model,
    scope === "key"
      ? { ...found, keys: HashMap.set(found.keys, key.slot, bench) }
      : { ...found, groups: HashMap.set(found.groups, key.key.quotaGroup ?? "", bench) }
  )
}

const withModel = (state: PoolState, model: string, benches: ModelBenches): PoolState => ({
  ...state,
  rest: {
    ...state.rest,
    models: HashMap.size(benches.keys) === 0 && HashMap.size(benches.groups) === 0
      ? HashMap.remove(state.rest.models, model)
      : HashMap.set(state.rest.models, model, benches)
  }
})

/** Drops the models of which nothing is to be remembered: told waits that are over, guesses that are long over. */
const forgetModels = (state: PoolState, now: number): PoolState => {
  const over = (bench: KeyState.Bench) => now >= bench.until + (KeyState.needsTrial(bench) ? rememberedMillis : 0)
  const models = HashMap.filter(
    state.rest.models,
    ({ groups, keys }) => !HashMap.every(keys, over) || !HashMap.every(groups, over)
  )
  return HashMap.size(models) === HashMap.size(state.rest.models)
    ? state
    : { ...state, rest: { ...state.rest, models } }
}

/** How long the end of a guessed wait for one model is remembered, if nobody asks for the model. */
const rememberedMillis = 600_000

/** Takes a key out for good; its slot may be used again. */
const removeKey = (before: PoolState, key: KeyState.KeyState): PoolState => {
  const state = leaveGroup(before, key)
  const current = SlotMap.get(state.slots, key.slot)
  const gated = Tournament.remove(state.rest.gated, key.slot)
  return {
    ...state,
    slots: SlotMap.remove(state.slots, key.slot),
    index: state.index.remove(key.slot),
    nextOpening: earliest(gated),
    rest: {
      ...state.rest,
      ids: HashMap.remove(state.rest.ids, key.id),
      free: [...state.rest.free, key.slot],
      gated,
      breakersOpen: state.rest.breakersOpen - (current !== undefined && isOpenByGuess(current) ? 1 : 0),
      earlyNow: state.rest.earlyNow - countEarly(current).now,
      earlyLater: state.rest.earlyLater - countEarly(current).later,
      models: HashMap.filterMap(state.rest.models, ({ groups, keys }) => {
        const left = HashMap.remove(keys, key.slot)
        return HashMap.size(left) === 0 && HashMap.size(groups) === 0
          ? Option.none()
          : Option.some({ groups, keys: left })
      })
    }
  }
}

/** The events of a breaker's change. */
const transitions = (
  config: Config,
  before: KeyState.KeyState,
  after: KeyState.KeyState,
  now: number
): ReadonlyArray<Telemetry.Unnumbered> => {
  const change = CircuitBreaker.transition(before.breaker, after.breaker, now)
  if (change === undefined) return noEvents
  const base = {
    pool: config.pool,
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
