/**
 * All keys of a pool together: what is known of them, who may serve now, and when somebody may again. The steps that
 * change it are rooms of their own: `Leasing`, `Settling`, `WaitingLine` and `PoolKeys`; each step is one atomic change
 * of the pool's single Ref.
 *
 * The eligible keys stand in the strategy's index, the others in order of the instant they may open; a call costs the
 * same for ten keys as for ten thousand.
 *
 * @since 0.1.0
 */
import type * as Deferred from "effect/Deferred"
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as RedBlackTree from "effect/RedBlackTree"
import * as Affinity from "./Affinity.js"
import type * as ApiKey from "./ApiKey.js"
import type * as Cooldowns from "./Cooldowns.js"
import * as Elsewhere from "./Elsewhere.js"
import * as HedgeBudget from "./HedgeBudget.js"
import type { KeyReason } from "./KeymeshError.js"
import * as KeyState from "./KeyState.js"
import * as Latency from "./Latency.js"
import * as ProviderHealth from "./ProviderHealth.js"
import * as RateLimit from "./RateLimit.js"
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
  readonly cooldowns: Cooldowns.Cooldowns
  readonly tokens: RetryPolicy.TokenOptions
  /** One call per this long goes through when only guesses hold all keys back; `undefined`: none does. */
  readonly floorMillis: number | undefined
  /** How long an attempt may take until its answer belongs to the caller; `undefined`: as long as it likes. */
  readonly attemptTimeout: "learned" | number | undefined
  /** Whether it is to be learned how long attempts take. */
  readonly times: boolean
  /** What bounds the second attempts that calls may have beside their first. */
  readonly hedging: HedgeBudget.Options
  /** Whether faults are compared across keys before one of them is blamed. */
  readonly corroborates: boolean
  readonly maxWaiters: number
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
  /** Attempts in flight with eligible keys. */
  readonly load: number
  /** Leases that have ended. */
  readonly ended: number
  readonly pace: Pace
  /** How long attempts take, if that is to be learned. */
  readonly latency: Latency.Latency
  /** The earliest instant at which a gated key may open. */
  readonly nextOpening: number
  readonly rest: Rest
}

/**
 * What had begun at a moment, and at one 5 to 10 s before it: what has come since tells how much comes.
 *
 * @since 0.1.0
 * @category models
 */
export interface Pace {
  readonly at: number
  readonly leases: number
  readonly calls: number
  readonly before: Omit<Pace, "before">
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
  readonly limits: Limits
  /** Whether some key may serve certain models only. */
  readonly restricted: boolean
  /** Counts the changes of keys that people want to hear of: not those that every call makes. */
  readonly moves: number
  /** Breakers that are open or half-open, and not by hand. */
  readonly breakersOpen: number
  /** Gated keys that an event may open at any moment, and those that one may open from some later instant on. */
  readonly earlyNow: number
  readonly earlyLater: number
  readonly floorAt: number
  /** What others take of the keys; absent while nothing is known that would hold this pool back. */
  readonly elsewhere: Elsewhere.Elsewhere | undefined
  /** How many keys have each origin, see `originOf`. */
  readonly origins: HashMap.HashMap<string, number>
  readonly health: ProviderHealth.Health
  /** Keys that had worked and were refused as unauthorised of late. */
  readonly turned: ReadonlyArray<Turned>
  readonly tokens: RetryPolicy.Tokens
  /** Calls counted into `tokens` so far. */
  readonly tokenCalls: number
  readonly hedging: HedgeBudget.HedgeBudget
  /** Who waits, by lane (model), in order of their turns. */
  readonly lanes: HashMap.HashMap<string, RedBlackTree.RedBlackTree<bigint, Waiter>>
  readonly waiting: number
  readonly line: Line
  /** Which calls belong together, and where. */
  readonly affinity: Affinity.Affinity
}

/**
 * A key that had worked and then was refused as unauthorised.
 *
 * @since 0.1.0
 * @category models
 */
export interface Turned {
  readonly id: string
  readonly at: number
  readonly target: Cooldowns.Target
  /** What else holds it until when: a wait that was told, or one from before. */
  readonly firm: number
}

/**
 * The same waiters in other orders, and what was found when somebody last looked for whom keys can serve.
 *
 * @since 0.1.0
 * @category models
 */
export interface Line {
  /** The lane of each waiter that is next in its lane, by its turn. */
  readonly heads: RedBlackTree.RedBlackTree<bigint, string>
  /** All waiters, by the instant they give up and by call. */
  readonly ends: RedBlackTree.RedBlackTree<number, HashMap.HashMap<number, Waiter>>
  /** The lanes of those that only some keys suit. */
  readonly picky: HashMap.HashMap<string, true>
  readonly view: View | undefined
  /** The usual lanes hold nobody who gives up before this instant. */
  readonly usualFrom: number
}

/**
 * When the lanes open that differ from the others, as of a certain state of the keys.
 *
 * @since 0.1.0
 * @category models
 */
export interface View {
  readonly slots: PoolState["slots"]
  readonly groups: Rest["groups"]
  readonly models: Rest["models"]
  readonly limits: Limits
  readonly restricted: boolean
  readonly lanes: HashMap.HashMap<string, LaneView>
}

/**
 * When one lane opens: which keys are open for it, and the nearest of the others.
 *
 * @since 0.1.0
 * @category models
 */
export interface LaneView extends Nearest {
  readonly request: Wanted
  readonly open: ReadonlyArray<number>
  /** The keys of `at` and of `earliest`. */
  readonly atSlot: number
  readonly earliestSlot: number
  /** The lane holds nobody who gives up before this instant. */
  readonly from: number
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
 * The limits that are not of one key for all models.
 *
 * @since 0.1.0
 * @category models
 */
export interface Limits {
  /** Of groups, for all models. */
  readonly groups: HashMap.HashMap<string, RateLimit.RateLimit>
  /** For one model. */
  readonly models: HashMap.HashMap<string, ModelLimits>
  /** Whether some limit for all models counts tokens, so that what a request costs decides which keys may serve it. */
  readonly metered: boolean
  /** Whether of some limit it is known when what is left of it will be lost. */
  readonly dated: boolean
  /** Counts the models that came and went. */
  readonly kinds: number
}

/**
 * The limits of keys without a group, and of groups, for one model.
 *
 * @since 0.1.0
 * @category models
 */
export interface ModelLimits {
  readonly keys: HashMap.HashMap<number, RateLimit.RateLimit>
  readonly groups: HashMap.HashMap<string, RateLimit.RateLimit>
  /** Whether some of them counts tokens. */
  readonly metered: boolean
}

/**
 * What was taken of limits for an attempt: of its party's for all models, and of those for its model.
 *
 * @since 0.1.0
 * @category models
 */
export interface Reserved {
  readonly party: RateLimit.Reservation | undefined
  readonly model: RateLimit.Reservation | undefined
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
  readonly operation: string | undefined
  /** How long it takes is told of such attempts; absent: of none. */
  readonly timed?: Latency.Kind | undefined
  readonly startedAt: number
  /** The breaker's generation, and whether this is its probe. */
  readonly generation: number
  readonly probe: boolean
  /** Let through although the key is gated. */
  readonly floor: boolean
  readonly reserved: Reserved | undefined
  /** What its success is remembered for. */
  readonly affinity?: Affinity.Bond | undefined
  /** Its number in a row of the provider's faults, see `ProviderHealth.Attempt`. */
  readonly nth: number
}

/**
 * Which keys may serve a request at all.
 *
 * @since 0.1.0
 * @category models
 */
export interface Among {
  /** Absent: all. */
  readonly only: ((key: ApiKey.ApiKey) => boolean) | undefined
  /** A name for these keys: those who want the same wait in one lane. Without it each waits alone. */
  readonly lane?: string | undefined
  /** Whether the floor may serve it (default true). */
  readonly floor?: boolean | undefined
}

/**
 * What decides when a request may be served.
 *
 * @since 0.1.0
 * @category models
 */
export type Wanted = Pick<Request, "model" | "only" | "floor" | "tokens">

/**
 * What a call wants of a key.
 *
 * @since 0.1.0
 * @category models
 */
export interface Request extends Among {
  /** The call's number; 0 for a call that begins. */
  readonly call: number
  readonly model: string | undefined
  /** What is asked for, as events tell it. */
  readonly operation?: string | undefined
  /** What it is like, if how long it takes says something of other attempts, and theirs of it. */
  readonly timed?: Latency.Kind | undefined
  /** Keys to avoid if there are others, by slot: those that failed this call already. */
  readonly avoid: ReadonlyArray<number>
  /** What it will use, as far as limits of tokens must know it before. */
  readonly tokens?: RateLimit.Estimate | undefined
  /** Where it would rather be. */
  readonly affinity?: Affinity.Wish | undefined
  readonly rotation: boolean
  readonly random: number
  /** When the call began; absent: now. */
  readonly began?: number | undefined
  /** Absent: `normal`. */
  readonly priority?: Priority | undefined
  /** Whether it may not wait for what other attempts find out about keys, see `providerGate`. */
  readonly hurry?: boolean | undefined
  /** When the call's budget or deadline ends: an answer after it comes late. */
  readonly ends?: number | undefined
}

/**
 * How urgent a call is, should it have to wait: a head start over the others, which those make up by waiting.
 *
 * @since 0.1.0
 * @category models
 */
export type Priority = "high" | "normal" | "low"

/**
 * How much longer than a normal call one of each priority counts as having waited, in milliseconds.
 *
 * @since 0.1.0
 * @category constants
 */
export const headStartMillis: Readonly<Record<Priority, number>> = { high: 10_000, normal: 0, low: -10_000 }

/**
 * The place of a call in the order in which calls are served: the one that began first comes first, its head start
 * counted in, and of those that began together the one with the lower number. It never changes, so that nobody who waits
 * is overtaken for ever; and no two calls have the same.
 *
 * @since 0.1.0
 * @category getters
 */
export const turnOf = ({ began, priority }: Request, call: number, now: number): bigint => {
  const micros = Math.round(((began ?? now) - headStartMillis[priority ?? "normal"]) * 1_000)
  return BigInt(micros) * 2n ** 53n + BigInt(call)
}

/**
 * A call that waits.
 *
 * @since 0.1.0
 * @category models
 */
export interface Waiter {
  readonly request: Request
  /** Its place among all who wait, see `turnOf`. */
  readonly turn: bigint
  readonly since: number
  /** When it gives up. */
  readonly until: number
  /** Where its answer goes: a lease, or `undefined` when waiting is no use. */
  readonly answer: Deferred.Deferred<LeaseRecord | undefined>
}

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
 * What a step tells of when nothing has happened that anybody need know.
 *
 * @since 0.1.0
 * @category constants
 */
export const noEvents: ReadonlyArray<Telemetry.Unnumbered> = []

/**
 * A pool without keys.
 *
 * @since 0.1.0
 * @category constructors
 */
export const empty = (config: Config, now: number): PoolState => ({
  slots: SlotMap.empty<KeyState.KeyState>(),
  index: config.strategy.empty,
  leases: 0,
  calls: 0,
  load: 0,
  ended: 0,
  pace: { at: now, leases: 0, calls: 0, before: { at: now, leases: 0, calls: 0 } },
  latency: Latency.empty,
  nextOpening: Infinity,
  rest: {
    closed: false,
    ids: HashMap.empty(),
    free: [],
    gated: Tournament.empty(opensFirst),
    groups: HashMap.empty(),
    models: HashMap.empty(),
    limits: { groups: HashMap.empty(), models: HashMap.empty(), metered: false, dated: false, kinds: 0 },
    restricted: false,
    moves: 0,
    breakersOpen: 0,
    earlyNow: 0,
    earlyLater: 0,
    floorAt: -Infinity,
    elsewhere: undefined,
    origins: HashMap.empty(),
    health: ProviderHealth.initial,
    turned: [],
    tokens: RetryPolicy.tokens(now, config.tokens),
    tokenCalls: 0,
    hedging: HedgeBudget.initial,
    lanes: HashMap.empty(),
    waiting: 0,
    line: nobody,
    affinity: Affinity.empty
  }
})

/**
 * The line when nobody waits.
 *
 * @since 0.1.0
 * @category constants
 */
export const nobody: Line = {
  heads: RedBlackTree.empty(byTurn),
  ends: RedBlackTree.empty(byNumber),
  picky: HashMap.empty(),
  view: undefined,
  usualFrom: -Infinity
}

/**
 * Numbers upwards.
 *
 * @since 0.1.0
 * @category orders
 */
export function byNumber(a: number, b: number): -1 | 0 | 1 {
  return a < b ? -1 : a > b ? 1 : 0
}

/**
 * Turns upwards.
 *
 * @since 0.1.0
 * @category orders
 */
export function byTurn(a: bigint, b: bigint): -1 | 0 | 1 {
  return a < b ? -1 : a > b ? 1 : 0
}

const opensFirst = (a: Opening, b: Opening): boolean => a.until < b.until || (a.until === b.until && a.slot < b.slot)

// -------------------------------------------------------------------------------------------------------------- lookup

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
 * Some key of a group.
 *
 * @since 0.1.0
 * @category getters
 */
export const memberOf = (state: PoolState, group: string): KeyState.KeyState | undefined => {
  const slot = Option.getOrUndefined(HashMap.get(state.rest.groups, group))?.members[0]
  return slot === undefined ? undefined : SlotMap.get(state.slots, slot)
}

/**
 * What is held against the group of a key.
 *
 * @since 0.1.0
 * @category getters
 */
export const groupBench = (state: PoolState, key: KeyState.KeyState): KeyState.Bench | undefined =>
  key.key.quotaGroup === undefined
    ? undefined
    : Option.getOrUndefined(HashMap.get(state.rest.groups, key.key.quotaGroup))?.bench

/**
 * Whether anything is held against a key or a group for one model only.
 *
 * @since 0.1.0
 * @category getters
 */
export const hasModels = (state: PoolState): boolean => HashMap.size(state.rest.models) > 0

/**
 * Whether nothing is known that an attempt with this key could meet, or that its success could change, but for limits for
 * all models: no trouble of the key, its group or the provider, nothing that others hold back, and no limit for the model.
 *
 * @since 0.1.0
 * @category getters
 */
export const isUsual = (state: PoolState, key: KeyState.KeyState, model: string | undefined): boolean =>
  state.rest.health.idle && state.rest.elsewhere === undefined && key.gatedUntil === undefined &&
  KeyState.isWell(key) &&
  groupBench(state, key) === undefined &&
  (model === undefined || (!hasModels(state) && modelLimits(state, key, model) === undefined))

/**
 * Whether some keys that are open may still not serve such a request: for its model, or for what it costs.
 *
 * @since 0.1.0
 * @category getters
 */
export const narrowed = ({ rest }: PoolState, model: string | undefined): boolean =>
  rest.limits.metered || (model !== undefined &&
    (rest.restricted || HashMap.size(rest.models) > 0 || HashMap.size(rest.limits.models) > 0))

/**
 * Whether some limit counts tokens, for all models or for this one.
 *
 * @since 0.1.0
 * @category getters
 */
export const isMetered = ({ rest: { limits } }: PoolState, model: string | undefined): boolean =>
  limits.metered ||
  (model !== undefined && Option.exists(HashMap.get(limits.models, model), ({ metered }) => metered))

/**
 * The limits of a key's group, or of the key if it has none, for all models.
 *
 * @since 0.1.0
 * @category getters
 */
export const partyLimits = (state: PoolState, key: KeyState.KeyState): RateLimit.RateLimit | undefined =>
  key.key.quotaGroup === undefined
    ? key.limits
    : Option.getOrUndefined(HashMap.get(state.rest.limits.groups, key.key.quotaGroup))

/**
 * The limits of a key's group, or of the key if it has none, for one model.
 *
 * @since 0.1.0
 * @category getters
 */
export const modelLimits = (
  { rest }: PoolState,
  { key, slot }: KeyState.KeyState,
  model: string | undefined
): RateLimit.RateLimit | undefined => {
  if (model === undefined || HashMap.size(rest.limits.models) === 0) return undefined
  const ofModel = HashMap.get(rest.limits.models, model)
  if (ofModel._tag === "None") return undefined
  return Option.getOrUndefined(
    key.quotaGroup === undefined
      ? HashMap.get(ofModel.value.keys, slot)
      : HashMap.get(ofModel.value.groups, key.quotaGroup)
  )
}

/**
 * How much a key has left of its tightest limit for a model, as a share of it; 1 where none is known.
 *
 * @since 0.1.0
 * @category getters
 */
export const headroom = (state: PoolState, slot: number, model: string | undefined, now: number): number => {
  const key = SlotMap.get(state.slots, slot)
  if (key === undefined) return 0
  const party = partyLimits(state, key)
  const own = modelLimits(state, key, model)
  return Math.min(
    party === undefined ? 1 : RateLimit.share(party, now),
    own === undefined ? 1 : RateLimit.share(own, now)
  )
}

/**
 * Whether between two states a key came or went, or a gate opened or closed; but for those that each call may open and
 * close (concurrency, the slow return).
 *
 * @since 0.1.0
 * @category getters
 */
export const hasMoved = ({ rest: before }: PoolState, { rest: after }: PoolState): boolean =>
  before !== after && (before.moves !== after.moves || before.ids !== after.ids || before.groups !== after.groups ||
    before.models !== after.models)

// --------------------------------------------------------------------------------------------------------------- gates

/**
 * Every gate of a key, for all models: its own, its group's, and what others hold back.
 *
 * @since 0.1.0
 * @category gates
 */
export const keyGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  now: number
): KeyState.Closed | undefined => {
  const closed = KeyState.both(
    KeyState.gate(config, key, now),
    key.key.quotaGroup === undefined ? undefined : KeyState.both(
      KeyState.benchGate(config, groupBench(state, key), now),
      KeyState.limitGate(partyLimits(state, key), undefined, now)
    )
  )
  const { elsewhere } = state.rest
  return elsewhere === undefined ? closed : KeyState.both(closed, Elsewhere.gate(elsewhere, key, now))
}

/**
 * Every gate of a key for a request.
 *
 * @since 0.1.0
 * @category gates
 */
export const requestGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  now: number,
  tokens?: RateLimit.Estimate
): KeyState.Closed | undefined =>
  KeyState.both(keyGate(config, state, key, now), ownGate(config, state, key, model, now, tokens))

/**
 * The gates of a key that hold for its model, or for what it costs; beside those for all requests.
 *
 * @since 0.1.0
 * @category gates
 */
export const ownGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  now: number,
  tokens: RateLimit.Estimate = unknownTokens
): KeyState.Closed | undefined =>
  KeyState.both(
    state.rest.limits.metered ? KeyState.limitGate(partyLimits(state, key), tokens, now) : undefined,
    model === undefined ? undefined : modelGate(config, state, key, model, now, tokens)
  )

const unknownTokens: RateLimit.Estimate = {}

/**
 * The gates of a key that hold for one model only; without `tokens`, those that hold for every request.
 *
 * @since 0.1.0
 * @category gates
 */
export const modelGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string,
  now: number,
  tokens?: RateLimit.Estimate
): KeyState.Closed | undefined => {
  if (key.key.models !== undefined && !key.key.models.has(model)) return unserved
  const limit = KeyState.limitGate(modelLimits(state, key, model), tokens, now)
  return hasModels(state)
    ? KeyState.both(limit, modelBenchGates(config, state, key, model, now).reduce(KeyState.both, undefined))
    : limit
}

/** The same, each by itself. */
const modelGates = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string,
  now: number,
  tokens: RateLimit.Estimate
): ReadonlyArray<KeyState.Closed | undefined> => [
  key.key.models !== undefined && !key.key.models.has(model) ? unserved : undefined,
  ...modelBenchGates(config, state, key, model, now),
  KeyState.limitGate(modelLimits(state, key, model), tokens, now)
]

const modelBenchGates = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string,
  now: number
): ReadonlyArray<KeyState.Closed | undefined> => {
  const benches = Option.getOrUndefined(HashMap.get(state.rest.models, model))
  if (benches === undefined) return []
  const group = key.key.quotaGroup
  return [
    KeyState.benchGate(config, Option.getOrUndefined(HashMap.get(benches.keys, key.slot)), now),
    group === undefined
      ? undefined
      : KeyState.benchGate(config, Option.getOrUndefined(HashMap.get(benches.groups, group)), now)
  ]
}

const unserved: KeyState.Closed = {
  gate: "model",
  until: Infinity,
  earliest: Infinity,
  breakableAt: Infinity,
  fault: undefined
}

/**
 * Where a key's attempts go, if not where the pool's go.
 *
 * @since 0.1.0
 * @category getters
 */
export const originOf = (key: ApiKey.ApiKey): string => key.baseUrl ?? ""

/**
 * What the provider's breaker holds back of a key; and where others were refused alike just now, what another attempt is
 * finding out about it: but not from a request in a `hurry`.
 *
 * @since 0.1.0
 * @category gates
 */
export const providerGate = (
  config: Config,
  { rest: { health }, slots }: PoolState,
  { answeredAt, inFlight, key, lastUsed }: KeyState.KeyState,
  model: string | undefined,
  now: number,
  hurry = false
): KeyState.Closed | undefined => {
  if (health.idle) return undefined
  const held = ProviderHealth.isGating(health)
    ? ProviderHealth.heldBack(health, originOf(key), model, config.trialMillis, now)
    : undefined
  if (held !== undefined) return KeyState.closed(held.by, held.until, { earliest: -Infinity })
  // One that answered of late will do so again. Among many keys there is another.
  if (hurry || inFlight === 0 || answeredAt > now - answeringMillis || slots.size > mostDoubted) return undefined
  const until = ProviderHealth.triedUntil(health, originOf(key), model, lastUsed, now)
  return until === undefined ? undefined : KeyState.closed("group", until, { earliest: -Infinity })
}

const answeringMillis = 10_000
const mostDoubted = 32

/**
 * Every gate of a key for one model, and what the provider's breaker holds back.
 *
 * @since 0.1.0
 * @category gates
 */
export const fullGate = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  now: number,
  tokens?: RateLimit.Estimate
): KeyState.Closed | undefined =>
  KeyState.both(requestGate(config, state, key, model, now, tokens), providerGate(config, state, key, model, now))

/**
 * All the gates that hold a key back from a request, each by itself.
 *
 * @since 0.1.0
 * @category gates
 */
export const closedGates = (
  config: Config,
  state: PoolState,
  key: KeyState.KeyState,
  { model, tokens = unknownTokens }: Wanted,
  now: number
): ReadonlyArray<KeyState.Closed> =>
  [
    ...KeyState.gates.map((look) => look(config, key, now)),
    KeyState.benchGate(config, groupBench(state, key), now),
    // What is told above of a key's own limits need not be told again, unless tokens make the difference.
    KeyState.limitGate(key.limits, undefined, now) === undefined
      ? KeyState.limitGate(partyLimits(state, key), tokens, now)
      : undefined,
    ...(model === undefined ? [] : modelGates(config, state, key, model, now, tokens)),
    providerGate(config, state, key, model, now),
    state.rest.elsewhere === undefined ? undefined : Elsewhere.gate(state.rest.elsewhere, key, now)
  ].filter((closed) => closed !== undefined)

/**
 * Until when the provider's breakers hold attempts for a model back: `undefined` if they do not, `"some"` if they do
 * so for some of several origins, or each key must be asked.
 *
 * @since 0.1.0
 * @category gates
 */
export const heldUntil = (
  config: Config,
  { rest: { health, origins }, slots }: PoolState,
  model: string | undefined,
  now: number
): number | "some" | undefined => {
  if (health.idle) return undefined
  let first = Infinity
  let held = 0
  for (const origin of HashMap.keys(origins)) {
    const gate = ProviderHealth.heldBack(health, origin, model, config.trialMillis, now)
    if (gate === undefined) continue
    first = Math.min(first, gate.until)
    held++
  }
  if (held > 0) return held < HashMap.size(origins) ? "some" : first
  const doubted = slots.size <= mostDoubted &&
    HashMap.some(origins, (_, origin) => ProviderHealth.isDoubtful(health, origin, model, now))
  return doubted ? "some" : undefined
}

/**
 * The outage, or the suspicion, that every attempt for a model would meet.
 *
 * @since 0.1.0
 * @category getters
 */
export const trialOf = (
  { rest: { health, origins } }: PoolState,
  model: string | undefined
): ReturnType<typeof ProviderHealth.trialOf> => {
  if (!ProviderHealth.isGating(health)) return undefined
  let found: ReturnType<typeof ProviderHealth.trialOf>
  for (const origin of HashMap.keys(origins)) {
    found = ProviderHealth.trialOf(health, origin, model)
    if (found === undefined) return undefined
  }
  return found
}

/**
 * The pace, a moment later.
 *
 * @since 0.1.0
 * @category steps
 */
export const paced = (pace: Pace, leases: number, calls: number, now: number): Pace => {
  if (now - pace.at < paceMillis) return pace
  const at = { at: now, leases, calls }
  // Nothing has come for long: what was before tells nothing of what comes.
  return { ...at, before: now - pace.at < 2 * paceMillis ? pace : at }
}

/**
 * The calls that have come of late, per millisecond.
 *
 * @since 0.1.0
 * @category getters
 */
export const offered = ({ calls, pace: { before } }: PoolState, now: number): number =>
  (calls - before.calls) / Math.max(1_000, now - before.at)

/**
 * As many calls as may well come, per millisecond, by those that have come of late: of few calls it is by chance how many
 * they are.
 *
 * @since 0.1.0
 * @category getters
 */
export const offeredAtMost = ({ calls, pace: { before } }: PoolState, now: number): number => {
  const come = calls - before.calls
  return (come + Math.sqrt(come)) / Math.max(1_000, now - before.at)
}

const paceMillis = 5_000

/**
 * Whether a key may serve now that the call has not tried yet.
 *
 * @since 0.1.0
 * @category getters
 */
export const hasOther = (
  config: Config,
  state: PoolState,
  { model, only, tokens }: Pick<Request, "model" | "only" | "tokens">,
  avoid: ReadonlyArray<number>,
  now: number
): boolean => {
  if (state.index.size === 0 && now < state.nextOpening) return false
  const held = heldUntil(config, state, model, now)
  if (typeof held === "number") return false
  if (held === undefined && now < state.nextOpening && only === undefined && !narrowed(state, model)) {
    let avoided = 0
    for (const slot of new Set(avoid)) {
      const key = SlotMap.get(state.slots, slot)
      if (key !== undefined && key.gatedUntil === undefined) avoided++
    }
    return state.index.size > avoided
  }
  return SlotMap.find(
    state.slots,
    (key) =>
      !avoid.includes(key.slot) && only?.(key.key) !== false &&
      fullGate(config, state, key, model, now, tokens) === undefined
  ) !== undefined
}

/**
 * Why each key may not serve: the first 32 in full, and how many keys each reason holds back. Looks at 1,000 keys;
 * those beyond are counted as `others`. The key at the slot `except` is left out. Keys that the request does not want are
 * counted as `unsuited`, whatever holds them back; `affinity` where they have not what it needs.
 *
 * @since 0.1.0
 * @category getters
 */
export const explain = (
  config: Config,
  state: PoolState,
  request: Wanted,
  now: number,
  except?: number,
  unsuited: "unsuited" | "affinity" = "unsuited"
): { readonly reasons: ReadonlyArray<KeyReason>; readonly counts: Readonly<Record<string, number>> } => {
  const reasons: Array<KeyReason> = []
  const counts: Record<string, number> = {}
  let looked = 0
  SlotMap.find(state.slots, (key) => {
    looked++
    if (key.slot === except) return false
    const isSuited = request.only?.(key.key) !== false
    const closed = isSuited ? fullGate(config, state, key, request.model, now, request.tokens) : undefined
    const gate: string = isSuited ? closed?.fault ?? closed?.gate ?? "eligible" : unsuited
    if (gate === "eligible") return looked === explained
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
    return looked === explained
  })
  // A key left out beyond these is none of the others.
  const beyond = state.slots.size - looked - (except !== undefined && isBeyond(state, except, looked) ? 1 : 0)
  if (beyond > 0) counts["others"] = beyond
  return { reasons, counts }
}

/** How many keys an explanation looks at. */
const explained = 1000

const isBeyond = (state: PoolState, slot: number, looked: number): boolean => {
  const last = SlotMap.nth(state.slots, looked - 1)
  return last !== undefined && slot > last.slot && SlotMap.get(state.slots, slot) !== undefined
}

// ------------------------------------------------------------------------------------------------------- opening times

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
 * When a key may serve a request; from the floor on, one that only guesses hold back may. What the provider's breakers
 * hold back comes later; but nobody knows how long an outage lasts, so `earliest` is as if there were none.
 *
 * @since 0.1.0
 * @category getters
 */
export const opening = (
  config: Config,
  state: PoolState,
  request: Wanted,
  now: number
): OpeningTime => withHealth(config, state, request, nearest(config, state, request, now), now)

/**
 * The opening time of the gates, with the floor and what the provider's breakers hold back.
 *
 * @since 0.1.0
 * @category getters
 */
export const withHealth = (
  config: Config,
  state: PoolState,
  request: Wanted,
  gates: Nearest,
  now: number
): OpeningTime => {
  const opens = withFloor(config, state, request, gates, now)
  const held = heldUntil(config, state, request.model, now)
  if (held === undefined) return opens
  if (held !== "some") return held <= opens.at ? opens : { ...opens, at: held }
  const isFloor = opens.at < gates.at
  let at = Infinity
  for (const key of SlotMap.values(state.slots)) {
    if (request.only?.(key.key) === false) continue
    const closed = requestGate(config, state, key, request.model, now, request.tokens)
    const { breakableAt, until } = closed ?? { breakableAt: Infinity, until: now }
    const own = isFloor ? Math.min(until, Math.max(opens.at, breakableAt)) : until
    at = Math.min(at, Math.max(own, providerGate(config, state, key, request.model, now)?.until ?? now))
  }
  return { ...opens, at: Math.max(at, opens.at) }
}

/** The opening time with the floor, if it is nearer than the gates are. */
const withFloor = (
  config: Config,
  state: PoolState,
  { floor = true }: Wanted,
  { at, breakableAt, earliest }: Nearest,
  now: number
): OpeningTime => {
  if (!floor || config.floorMillis === undefined || breakableAt >= at || earliest <= now) return { at, earliest }
  const floorAt = Math.max(now, breakableAt, state.rest.floorAt + config.floorMillis)
  return { at: Math.min(at, floorAt), earliest: Math.min(earliest, floorAt) }
}

/**
 * The opening times of the gates alone, and from when on the one that opens first is only guessed.
 *
 * @since 0.1.0
 * @category models
 */
export interface Nearest extends OpeningTime {
  readonly breakableAt: number
}

/**
 * The earliest instants at which the next requests of a kind can begin, in order, up to `until` and `most` of them, as far
 * as limits tell that are known for certain; `undefined` where they do not, or there are more.
 *
 * @since 0.1.0
 * @category getters
 */
export const openings = (
  config: Config,
  state: PoolState,
  { model, only, tokens }: Wanted,
  now: number,
  until: number,
  most: number
): ReadonlyArray<number> | undefined => {
  /** When the first key of each party can serve at all. */
  const parties = new Map<string | number, { readonly key: KeyState.KeyState; readonly from: number }>()
  SlotMap.find(state.slots, (key) => {
    if (only?.(key.key) === false) return false
    const closed = requestGate(config, state, key, model, now, tokens)
    // What only a guess holds, the floor may break.
    const from = closed === undefined ? now : Math.max(now, Math.min(closed.earliest, closed.breakableAt))
    const party = key.key.quotaGroup ?? key.slot
    if (from <= until && from < (parties.get(party)?.from ?? Infinity)) parties.set(party, { key, from })
    // Where a key has no limits, nobody knows how many it can serve.
    return from <= until && partyLimits(state, key) === undefined
  })
  const times: Array<number> = []
  for (const { from, key } of parties.values()) {
    const limits = partyLimits(state, key)
    const own = limits === undefined ? undefined : RateLimit.openings(limits, now, until, most - times.length)
    if (own === undefined) return undefined
    for (const at of own) times.push(Math.max(at, from))
    if (times.length >= most) return undefined
  }
  return times.sort(byNumber)
}

/**
 * The gate that opens first by itself, and the earliest instant at which an event may open any.
 *
 * @since 0.1.0
 * @category getters
 */
export const nearest = (
  config: Config,
  state: PoolState,
  request: Wanted,
  now: number
): Nearest => {
  if (request.only === undefined && !narrowed(state, request.model)) {
    if (state.index.size > 0) return { at: now, earliest: now, breakableAt: Infinity }
    const first = Tournament.best(state.rest.gated)
    const key = first === undefined ? undefined : SlotMap.get(state.slots, first.slot)
    if (key === undefined) return { at: Infinity, earliest: Infinity, breakableAt: Infinity }
    const closed = keyGate(config, state, key, now)
    const at = closed?.until ?? now
    return {
      at,
      earliest: state.rest.earlyNow > 0 ? -Infinity : state.rest.earlyLater === 0 ? at : Math.min(at, earlier(state)),
      breakableAt: closed?.breakableAt ?? Infinity
    }
  }
  let at = Infinity
  let earliest = Infinity
  let breakableAt = Infinity
  const open = SlotMap.find(state.slots, (key) => {
    if (request.only?.(key.key) === false) return false
    const closed = requestGate(config, state, key, request.model, now, request.tokens)
    if (closed === undefined) return true
    earliest = Math.min(earliest, closed.earliest)
    if (closed.until < at) {
      at = closed.until
      breakableAt = closed.breakableAt
    }
    return false
  })
  return open === undefined ? { at, earliest, breakableAt } : { at: now, earliest: now, breakableAt: Infinity }
}

/** The earliest instant at which an event may open a key, as its place says: gates that end meanwhile end before it. */
const earlier = (state: PoolState): number => {
  let earliest = Infinity
  SlotMap.find(state.slots, (key) => {
    if (key.gatedEarliest !== undefined && key.gatedEarliest < earliest) earliest = key.gatedEarliest
    return false
  })
  return earliest
}
