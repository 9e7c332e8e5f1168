/**
 * Where the limits of each party are kept, and what attempts do to them: of a key in its `KeyState`, of a group, and of
 * either for one model, in the pool's state.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as AnnouncedLimit from "./AnnouncedLimit.js"
import * as Cooldowns from "./Cooldowns.js"
import type * as Fault from "./Fault.js"
import * as KeyState from "./KeyState.js"
import * as LearnedConcurrency from "./LearnedConcurrency.js"
import type * as Outcome from "./Outcome.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as RateLimit from "./RateLimit.js"
import * as SlotMap from "./SlotMap.js"

/**
 * What is known of an attempt beside its outcome.
 *
 * @since 0.1.0
 * @category models
 */
export interface Heard {
  /** Whether it is answered now, or ends without an answer; told once. */
  readonly answered: boolean
  /** Whether it was sent at all. */
  readonly sent: boolean
  readonly announced: ReadonlyArray<AnnouncedLimit.Said>
  readonly usage: RateLimit.Usage | undefined
  /** Whether it was interrupted because another attempt of its call was answered first: it lasted at least as long. */
  readonly lost?: boolean
}

/**
 * A state, and the key as it is in it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Changed {
  readonly state: PoolState.PoolState
  readonly key: KeyState.KeyState
}

/**
 * Takes what an attempt needs that begins now. The key's own place is the caller's to mend, others' are mended.
 *
 * @since 0.1.0
 * @category steps
 */
export const reserve = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  key: KeyState.KeyState,
  request: Pick<PoolState.Request, "model" | "tokens">,
  now: number
): Changed & { readonly reserved: PoolState.Reserved | undefined } => {
  const party = PoolState.partyLimits(before, key)
  const model = PoolState.modelLimits(before, key, request.model)
  const tokens = request.tokens ?? {}
  if (party === undefined && model === undefined) return { state: before, key, reserved: undefined }
  let next: Changed = { state: before, key }
  let ofParty: RateLimit.Reservation | undefined
  let ofModel: RateLimit.Reservation | undefined
  if (party !== undefined) {
    const [limits, reservation] = RateLimit.reserve(party, tokens, now)
    ofParty = reservation
    next = withParty(config, next, party, limits, now)
  }
  if (model !== undefined && request.model !== undefined) {
    const [limits, reservation] = RateLimit.reserve(model, tokens, now)
    ofModel = reservation
    next = { ...next, state: withModel(next.state, key, request.model, limits, now) }
  }
  return { ...next, reserved: { party: ofParty, model: ofModel } }
}

/**
 * Takes in what is heard of an attempt. The key's own place is the caller's to mend, others' are mended.
 *
 * @since 0.1.0
 * @category steps
 */
export const settle = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  key: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  outcome: Outcome.Outcome | undefined,
  heard: Heard,
  end: boolean,
  now: number
): Changed => {
  // What was taken of a group is of that group, wherever the key is now.
  const stayed = lease.key.quotaGroup === key.key.quotaGroup
  const reserved = stayed ? lease.reserved : undefined
  const state = stayed ? before : settleLeft(config, before, lease, heard, end, now)
  const refusal = heard.answered && outcome?._tag === "Fault"
    ? lessonOf(key, lease.model, outcome.fault, now)
    : undefined
  const accepts = heard.answered && outcome !== undefined && (outcome._tag === "Success" ||
    (outcome._tag === "Fault" && isAnswer(outcome.fault)))
  const hear = (
    before: RateLimit.RateLimit | undefined,
    reservation: RateLimit.Reservation | undefined,
    announced: boolean,
    refused: boolean
  ): RateLimit.RateLimit | undefined => {
    if (before === undefined && !announced && !refused) return undefined
    let limits = before ?? RateLimit.empty
    if (reservation !== undefined && isUnsent(heard, end)) return RateLimit.returned(limits, reservation, now)
    if (heard.answered && reservation !== undefined) limits = RateLimit.answered(limits, now)
    if (announced) {
      const { startedAt } = lease
      limits = RateLimit.announced(limits, reservation?.leased, heard.announced, now, key.inFlight, startedAt)
    }
    if (refused && refusal !== undefined) {
      const { fault, unit } = refusal
      limits = RateLimit.refused(limits, unit, reservation, fault.waitMillis, now, KeyState.usualMillis(key, now))
    }
    if (accepts) limits = RateLimit.accepted(limits, reservation, now)
    if (end && reservation !== undefined) limits = RateLimit.spent(limits, reservation, heard.usage, now)
    return limits
  }
  const announces = heard.announced.length > 0
  // What is of one key of a group is none of the group's, and the key has no limits of its own.
  const teachesParty = refusal?.target?.scope === (key.key.quotaGroup === undefined ? "key" : "group")
  const forModel = refusal?.target?.model !== undefined
  const party = PoolState.partyLimits(state, key)
  const partyAfter = hear(
    party,
    reserved?.party,
    announces && lease.model === undefined,
    teachesParty && !forModel
  )
  let next: Changed = { state, key }
  if (partyAfter !== undefined && partyAfter !== party) next = withParty(config, next, party, partyAfter, now)
  if (lease.model === undefined) return next
  const model = PoolState.modelLimits(state, key, lease.model)
  const modelAfter = hear(model, reserved?.model, announces, teachesParty && forModel)
  return modelAfter === undefined || modelAfter === model
    ? next
    : { ...next, state: withModel(next.state, key, lease.model, modelAfter, now) }
}

/** Counts an attempt of a key that has left the group since it began, or would hold what it took of it for ever. */
const settleLeft = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  { key: { quotaGroup: group }, model, reserved }: PoolState.LeaseRecord,
  heard: Heard,
  end: boolean,
  now: number
): PoolState.PoolState => {
  // A key's own limits went with it.
  if (group === undefined) return before
  const counted = (limits: RateLimit.RateLimit, reservation: RateLimit.Reservation) => {
    if (isUnsent(heard, end)) return RateLimit.returned(limits, reservation, now)
    const answered = heard.answered ? RateLimit.answered(limits, now) : limits
    return end ? RateLimit.spent(answered, reservation, heard.usage, now) : answered
  }
  const ofGroup = Option.getOrUndefined(HashMap.get(before.rest.limits.groups, group))
  const state = ofGroup === undefined || reserved?.party === undefined
    ? before
    : Places.placeGroup(config, withGroup(before, group, counted(ofGroup, reserved.party)), group, now)
  const ofModel = model === undefined
    ? undefined
    : Option.getOrUndefined(HashMap.get(state.rest.limits.models, model))
  const limits = ofModel === undefined ? undefined : Option.getOrUndefined(HashMap.get(ofModel.groups, group))
  if (model === undefined || ofModel === undefined || limits === undefined || reserved?.model === undefined) {
    return state
  }
  const groups = HashMap.set(ofModel.groups, group, counted(limits, reserved.model))
  const models = HashMap.set(state.rest.limits.models, model, { ...ofModel, groups })
  return withLimits(state, { ...state.rest.limits, models })
}

/** Whether an attempt ends that was not sent: it gives back what it took. */
const isUnsent = ({ sent }: Heard, end: boolean): boolean => !sent && end

/** Whether a fault is an answer that was not refused for a limit. */
const isAnswer = ({ kind }: Fault.Fault): boolean =>
  kind !== "RateLimited" && kind !== "QuotaExhausted" && kind !== "Network" && kind !== "Timeout"

/** What a refusal says of how many requests or tokens may come, and of whom; those of days, of load say nothing. */
const lessonOf = (key: KeyState.KeyState, model: string | undefined, fault: Fault.Fault, now: number) => {
  const { unit = "requests" } = fault
  if (fault.kind !== "RateLimited" || unit === "other" || unit === "concurrency") return undefined
  // What a key lets run at once explains a refusal of which nothing is said.
  if (LearnedConcurrency.explains(key.concurrency, fault, key.inFlight - 1, now)) return undefined
  return { fault, unit, target: Cooldowns.targetOf(key, model, fault) }
}

/**
 * What the keys of a party declare now: of a key, or of the members of its group together.
 *
 * @since 0.1.0
 * @category steps
 */
export const declare = (state: PoolState.PoolState, group: string): PoolState.PoolState => {
  const members = Option.getOrUndefined(HashMap.get(state.rest.groups, group))?.members ?? []
  const declared = members.flatMap((slot) => SlotMap.get(state.slots, slot)?.key.limits ?? [])
  const before = Option.getOrUndefined(HashMap.get(state.rest.limits.groups, group))
  const limits = RateLimit.declare(before, declared)
  return limits === before || limits === undefined ? state : withGroup(state, group, limits)
}

/**
 * Notes that a key's limits count tokens, if they do.
 *
 * @since 0.1.0
 * @category steps
 */
export const meter = (state: PoolState.PoolState, id: string): PoolState.PoolState => {
  const limits = PoolState.find(state, id)?.limits
  return state.rest.limits.metered || limits === undefined || !RateLimit.countsTokens(limits)
    ? state
    : withLimits(state, { ...state.rest.limits, metered: true })
}

/**
 * What is known of the limits of a key or its group, for one model or for all (`undefined`), as a store knows it. The
 * key's own place is the caller's to mend.
 *
 * @since 0.1.0
 * @category steps
 */
export const restore = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  f: (limits: RateLimit.RateLimit) => RateLimit.RateLimit,
  now: number
): Changed => {
  if (model !== undefined) {
    const before = PoolState.modelLimits(state, key, model) ?? RateLimit.empty
    return { state: withModel(state, key, model, f(before), now), key }
  }
  const before = PoolState.partyLimits(state, key)
  return withParty(config, { state, key }, before, f(before ?? RateLimit.empty), now)
}

/**
 * Forgets what was announced to a key and its group, and what was learned of them, for all models and for single ones.
 *
 * @since 0.1.0
 * @category steps
 */
export const reset = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  now: number
): Changed => {
  const group = key.key.quotaGroup
  const party = PoolState.partyLimits(state, key)
  const next = party === undefined
    ? { state, key }
    : withParty(config, { state, key }, party, RateLimit.reset(party), now)
  return HashMap.size(next.state.rest.limits.models) === 0 ? next : {
    ...next,
    state: withLimits(next.state, {
      ...next.state.rest.limits,
      models: HashMap.map(next.state.rest.limits.models, (ofModel) => ({
        ...ofModel,
        // What was leased stays counted: answers that are still to come tell of it.
        keys: HashMap.modify(ofModel.keys, key.slot, RateLimit.reset),
        groups: group === undefined ? ofModel.groups : HashMap.modify(ofModel.groups, group, RateLimit.reset)
      }))
    })
  }
}

/**
 * Forgets what is known of a key for single models.
 *
 * @since 0.1.0
 * @category steps
 */
export const forgetKey = (state: PoolState.PoolState, slot: number): PoolState.PoolState =>
  HashMap.size(state.rest.limits.models) === 0 ? state : withLimits(state, {
    ...state.rest.limits,
    models: HashMap.map(state.rest.limits.models, (ofModel) => ({
      ...ofModel,
      keys: HashMap.remove(ofModel.keys, slot)
    }))
  })

/**
 * The limits of a group that are others now, where they let as many through as before: no key's place changes.
 *
 * @since 0.1.0
 * @category steps
 */
export const ofGroup = (rest: PoolState.Rest, group: string, limits: RateLimit.RateLimit): PoolState.Rest => ({
  ...rest,
  limits: {
    groups: HashMap.set(rest.limits.groups, group, limits),
    models: rest.limits.models,
    metered: rest.limits.metered || RateLimit.countsTokens(limits),
    dated: rest.limits.dated || RateLimit.isDated(limits),
    kinds: rest.limits.kinds
  }
})

const withLimits = (state: PoolState.PoolState, limits: PoolState.Limits): PoolState.PoolState => ({
  ...state,
  rest: { ...state.rest, limits }
})

const withGroup = (state: PoolState.PoolState, group: string, limits: RateLimit.RateLimit): PoolState.PoolState => ({
  ...state,
  rest: ofGroup(state.rest, group, limits)
})

const withParty = (
  config: PoolState.Config,
  { key, state }: Changed,
  before: RateLimit.RateLimit | undefined,
  limits: RateLimit.RateLimit,
  now: number
): Changed => {
  const group = key.key.quotaGroup
  if (group === undefined) {
    const { dated, metered } = state.rest.limits
    const noted = (metered || !RateLimit.countsTokens(limits)) && (dated || !RateLimit.isDated(limits)) ?
      state :
      withLimits(state, {
        ...state.rest.limits,
        metered: metered || RateLimit.countsTokens(limits),
        dated: dated || RateLimit.isDated(limits)
      })
    return {
      state: noted,
      key: { ...key, limits }
    }
  }
  const after = withGroup(state, group, limits)
  const was = before === undefined ? undefined : RateLimit.gate(before, undefined, now)
  const is = RateLimit.gate(limits, undefined, now)
  if (was?.until === is?.until && was?.earliest === is?.earliest) return { state: after, key }
  const placed = Places.placeGroup(config, after, group, now)
  const { gatedBy, gatedEarliest, gatedUntil } = SlotMap.get(placed.slots, key.slot) ?? key
  return { state: placed, key: { ...key, gatedBy, gatedEarliest, gatedUntil } }
}

const withModel = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  model: string,
  limits: RateLimit.RateLimit,
  now: number
): PoolState.PoolState => {
  const known = HashMap.get(state.rest.limits.models, model)
  const pruned = known._tag === "Some" ? state.rest.limits : forgetModels(state.rest.limits, now)
  if (known._tag === "None" && HashMap.size(pruned.models) >= mostModels) return withLimits(state, pruned)
  const ofModel: PoolState.ModelLimits = known._tag === "Some"
    ? known.value
    : { keys: HashMap.empty(), groups: HashMap.empty(), metered: false }
  const group = key.key.quotaGroup
  return withLimits(state, {
    ...pruned,
    kinds: known._tag === "Some" ? pruned.kinds : pruned.kinds + 1,
    dated: pruned.dated || RateLimit.isDated(limits),
    models: HashMap.set(pruned.models, model, {
      keys: group === undefined ? HashMap.set(ofModel.keys, key.slot, limits) : ofModel.keys,
      groups: group === undefined ? ofModel.groups : HashMap.set(ofModel.groups, group, limits),
      metered: ofModel.metered || RateLimit.countsTokens(limits)
    })
  })
}

/** Drops the models that nobody has asked for lately. */
const forgetModels = (limits: PoolState.Limits, now: number): PoolState.Limits => {
  const idle = (ofOne: RateLimit.RateLimit) => RateLimit.isIdle(ofOne, now)
  const models = HashMap.filter(
    limits.models,
    ({ groups, keys }) => !HashMap.every(keys, idle) || !HashMap.every(groups, idle)
  )
  return HashMap.size(models) === HashMap.size(limits.models) ? limits : { ...limits, models, kinds: limits.kinds + 1 }
}

/** Of more models than this, the limits of the newest are not kept. */
const mostModels = 1_000
