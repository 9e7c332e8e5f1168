/**
 * What the attempts of a pool take of what it shares with others: which of them must be claimed, and what becomes of those
 * that are refused. Pure steps; the round trips are `Sharing`'s.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as Benches from "./Benches.js"
import * as DeclaredLimit from "./DeclaredLimit.js"
import * as Elsewhere from "./Elsewhere.js"
import * as KeyState from "./KeyState.js"
import * as Limits from "./Limits.js"
import * as Outcome from "./Outcome.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as RateLimit from "./RateLimit.js"
import * as Settling from "./Settling.js"
import type * as SharedPool from "./SharedPool.js"
import * as SlotMap from "./SlotMap.js"

/**
 * Whether a lease may need anything of what all share: not so that of a key without limits, against which nothing is known.
 *
 * @since 0.1.0
 * @category getters
 */
export const concerns = (state: PoolState.PoolState, { model, reserved, slot }: PoolState.LeaseRecord): boolean => {
  if (reserved !== undefined) return true
  const key = SlotMap.get(state.slots, slot)
  return key === undefined || key.key.limits.concurrency !== undefined || !PoolState.isUsual(state, key, model)
}

/**
 * What an attempt needs of what all share; `undefined`: nothing.
 *
 * @since 0.1.0
 * @category getters
 */
export const claimOf = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  record: PoolState.LeaseRecord
): SharedPool.Claim | undefined => {
  const key = SlotMap.get(state.slots, record.slot)
  if (key === undefined || key.id !== record.key.id) return undefined
  const own: SharedPool.Subject = { scope: "key", of: key.id }
  const most = key.key.limits.concurrency
  const claim: SharedPool.Claim = {
    limits: limitsOf(state, key, record.reserved?.party),
    concurrency: most === undefined ? [] : [{ subject: own, most }],
    probes: trialsOf(config, state, key, record)
  }
  return claim.limits.length + claim.concurrency.length + claim.probes.length === 0 ? undefined : claim
}

const limitsOf = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  reservation: RateLimit.Reservation | undefined
): SharedPool.Claim["limits"] => {
  const party = reservation === undefined ? undefined : PoolState.partyLimits(state, key)
  if (party === undefined || reservation === undefined) return []
  const subject = partyOf(key)
  return party.declared.map(({ unit, whole, windowMillis }) => ({
    subject,
    unit,
    limit: whole,
    windowMillis,
    amount: unit === "requests" ? 1 : reservation.input + reservation.output
  }))
}

/** Who has the limits of a key. */
const partyOf = ({ id, key }: KeyState.KeyState): SharedPool.Subject =>
  key.quotaGroup === undefined ? { scope: "key", of: id } : { scope: "group", of: key.quotaGroup }

/** The probe and the trials that an attempt is. */
const trialsOf = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  { id, model, probe }: PoolState.LeaseRecord
): SharedPool.Claim["probes"] => {
  const own: SharedPool.Subject = { scope: "key", of: key.id }
  const probes: Array<SharedPool.Claim["probes"][number]> = []
  const tries = (bench: KeyState.Bench | undefined) => bench?.trial?.lease === id
  if (probe) probes.push({ subject: own, forMillis: config.breaker.probeTimeoutMillis })
  else if (tries(key.bench)) probes.push({ subject: own, forMillis: config.trialMillis })
  const group = key.key.quotaGroup
  if (group !== undefined && tries(PoolState.groupBench(state, key))) {
    probes.push({ subject: { scope: "group", of: group }, forMillis: config.trialMillis })
  }
  if (model === undefined || !PoolState.hasModels(state)) return probes
  if (tries(Benches.at(state, key, { scope: "key", model }))) {
    probes.push({ subject: { ...own, model }, forMillis: config.trialMillis })
  }
  if (group !== undefined && tries(Benches.at(state, key, { scope: "group", model }))) {
    probes.push({ subject: { scope: "group", of: group, model }, forMillis: config.trialMillis })
  }
  return probes
}

/**
 * Whether an attempt that nobody could decide fits into this pool's own part of what is shared.
 *
 * @since 0.1.0
 * @category getters
 */
export const fitsPart = (
  state: PoolState.PoolState,
  record: PoolState.LeaseRecord,
  parts: number,
  now: number
): boolean => {
  const key = SlotMap.get(state.slots, record.slot)
  if (key === undefined || key.id !== record.key.id) return true
  if (key.inFlight > DeclaredLimit.partOf(key.key.limits.concurrency ?? Infinity, parts)) return false
  const declared = PoolState.partyLimits(state, key)?.declared ?? []
  const { input = 0, output = 0 } = record.reserved?.party ?? {}
  return declared.every((limit) => {
    const own = limit.unit === "requests" ? 1 : input + output
    // As if it were asked for now: what is more than a part fits when nothing else is taken.
    return DeclaredLimit.gate(DeclaredLimit.release(DeclaredLimit.divided(limit, parts), own), own, now) === undefined
  })
}

// --------------------------------------------------------------------------------------------------------------- steps

/**
 * Notes that a lease of a key asks, where others had taken all there was.
 *
 * @since 0.1.0
 * @category steps
 */
export const asks = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  { id, key: { id: keyId, quotaGroup }, slot }: PoolState.LeaseRecord,
  now: number
): PoolState.PoolState => {
  const { elsewhere } = state.rest
  if (elsewhere === undefined) return state
  const asked = (closure: Elsewhere.Closure): Elsewhere.Closure => ({
    ...closure,
    asking: now >= closure.askedAt + 1_000 ? [id] : [...closure.asking, id],
    askedAt: closure.asking.length === 0 || now >= closure.askedAt + 1_000 ? now : closure.askedAt
  })
  const keys = HashMap.modify(elsewhere.keys, keyId, asked)
  const groups = quotaGroup === undefined ? elsewhere.groups : HashMap.modify(elsewhere.groups, quotaGroup, asked)
  if (keys === elsewhere.keys && groups === elsewhere.groups) return state
  return placed(config, withElsewhere(state, { ...elsewhere, keys, groups }), slot, quotaGroup, now)
}

/**
 * Takes in that a lease that asked may go on, or did not get an answer; `undefined` when nothing changes.
 *
 * @since 0.1.0
 * @category steps
 */
export const answered = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  { id, key: { id: keyId, quotaGroup }, slot }: PoolState.LeaseRecord,
  granted: boolean,
  now: number
): PoolState.PoolState | undefined => {
  const { elsewhere } = state.rest
  if (elsewhere === undefined) return undefined
  const settle = (closure: Option.Option<Elsewhere.Closure>): Option.Option<Elsewhere.Closure> => {
    if (closure._tag === "None" || !closure.value.asking.includes(id)) return closure
    const most = granted ? closure.value.most * 2 : closure.value.most
    return most > enough
      ? Option.none()
      : Option.some({ ...closure.value, most, asking: closure.value.asking.filter((other) => other !== id) })
  }
  const closure = HashMap.get(elsewhere.keys, keyId)
  const ofGroup = quotaGroup === undefined ? Option.none() : HashMap.get(elsewhere.groups, quotaGroup)
  const [settled, settledGroup] = [settle(closure), settle(ofGroup)]
  if (settled === closure && settledGroup === ofGroup) return undefined
  const next = withElsewhere(state, {
    ...elsewhere,
    keys: HashMap.modifyAt(elsewhere.keys, keyId, () => settled),
    groups: quotaGroup === undefined
      ? elsewhere.groups
      : HashMap.modifyAt(elsewhere.groups, quotaGroup, () => settledGroup)
  })
  return placed(config, next, slot, quotaGroup, now)
}

/** When so many may ask at once, the key is open again as any. */
const enough = 32

/**
 * A lease goes back as if it had not been: its attempt was not sent, and counts nowhere.
 *
 * @since 0.1.0
 * @category steps
 */
export const unsent = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  record: PoolState.LeaseRecord,
  now: number
): PoolState.Changed => {
  const asked = answered(config, before, record, false, now) ?? before
  const settled = Settling.settle(config, asked, record, Outcome.ignored, true, now, 0, notSent)
  const key = SlotMap.get(settled.state.slots, record.slot)
  if (key === undefined || key.id !== record.key.id) return settled
  const uncounted = { ...key, total: key.total - 1, ignored: key.ignored - 1 }
  return { ...settled, state: Places.place(config, settled.state, uncounted, now) }
}

const notSent: Limits.Heard = { answered: true, sent: false, announced: [], usage: undefined }

/**
 * A lease goes back that was refused where all meet, and what was short is closed until it may fit.
 *
 * @since 0.1.0
 * @category steps
 */
export const refused = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  record: PoolState.LeaseRecord,
  refusal: Extract<SharedPool.Answer, { readonly _tag: "Refused" }>,
  now: number
): PoolState.Changed => {
  const given = unsent(config, before, record, now)
  const { subject } = refusal
  const key = SlotMap.get(given.state.slots, record.slot)
  if (key === undefined || key.id !== record.key.id) return given
  const tried = refusal.gate === "probing"
    ? triedElsewhere(config, given.state, key, record, subject, now + Math.max(1, refusal.forMillis), now)
    : given.state
  // Where there is no such probe here (any more), it need not be asked for again at once.
  return tried !== given.state ? { ...given, state: tried } : {
    ...given,
    state: closed(config, given.state, key, refusal.gate, subject, {
      until: now + Math.max(1, Math.min(Math.ceil(refusal.forMillis), netMillis[refusal.gate])),
      mayFree: refusal.mayFree
    }, now)
  }
}

/** After so long it is asked for once more, should nobody tell that it is free. */
const netMillis = { limit: Infinity, concurrency: 5_000, probing: 50 }

const closed = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  gate: Elsewhere.Closure["gate"],
  { scope }: SharedPool.Subject,
  { mayFree, until }: { readonly until: number; readonly mayFree: boolean },
  now: number
): PoolState.PoolState => {
  const elsewhere = state.rest.elsewhere ?? Elsewhere.nothing
  const group = scope === "group" ? key.key.quotaGroup : undefined
  const close = (found: Option.Option<Elsewhere.Closure>): Option.Option<Elsewhere.Closure> => {
    const before = Option.getOrUndefined(found)
    const longer = before !== undefined && before.until > until ? before : { gate, until }
    const frees = mayFree || (before !== undefined && now < before.until && before.earliest === -Infinity)
    return Option.some({
      gate: longer.gate,
      until: longer.until,
      earliest: frees ? -Infinity : longer.until,
      asking: before?.asking ?? [],
      askedAt: before?.askedAt ?? -Infinity,
      most: 1
    })
  }
  const next = withElsewhere(state, {
    ...elsewhere,
    keys: group === undefined ? HashMap.modifyAt(elsewhere.keys, key.id, close) : elsewhere.keys,
    groups: group === undefined ? elsewhere.groups : HashMap.modifyAt(elsewhere.groups, group, close)
  })
  return placed(config, next, key.slot, group, now)
}

/** Somebody else has the probe, or the trial: until it is decided, or for as long as that one has it. */
const triedElsewhere = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  record: PoolState.LeaseRecord,
  { model, scope }: SharedPool.Subject,
  until: number,
  now: number
): PoolState.PoolState => {
  const tried = (bench: KeyState.Bench): KeyState.Bench =>
    bench.trial === undefined && KeyState.needsTrial(bench)
      ? { ...bench, trial: { lease: byOthers, since: until - config.trialMillis } }
      : bench
  if (model !== undefined) return Benches.mapOne(state, key, { scope, model }, tried)
  if (scope === "group") {
    const bench = PoolState.groupBench(state, key)
    const after = bench === undefined ? undefined : tried(bench)
    return after === undefined || after === bench ? state : Benches.withBench(config, state, key, "group", after, now)
  }
  const { breaker } = key
  // What was told meanwhile is known better.
  const isStill = record.probe && breaker._tag === "HalfOpen" && breaker.probe === undefined &&
    breaker.generation === record.generation
  const probe = { id: byOthers, since: until - config.breaker.probeTimeoutMillis }
  const bench = key.bench === undefined || record.probe ? key.bench : tried(key.bench)
  return !isStill && bench === key.bench
    ? state
    : Places.place(config, state, { ...key, breaker: isStill ? { ...breaker, probe } : breaker, bench }, now)
}

/** The name of the lease that another pool has. */
const byOthers = -1

/**
 * Takes in that something was given back of what a subject had too little of, or that its probe is free.
 *
 * @since 0.1.0
 * @category steps
 */
export const freed = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  { model, of, scope }: SharedPool.Subject,
  now: number
): PoolState.PoolState => {
  const key = scope === "key" ? PoolState.find(state, of) : PoolState.memberOf(state, of)
  if (key === undefined) return state
  const free = (bench: KeyState.Bench): KeyState.Bench => KeyState.freeTrial(bench, byOthers) ?? bench
  if (model !== undefined) return Benches.mapOne(state, key, { scope, model }, free)
  const { elsewhere } = state.rest
  const opened = (closure: Elsewhere.Closure): Elsewhere.Closure =>
    closure.until <= now ? closure : { ...closure, until: now, earliest: now }
  const next = elsewhere === undefined ? state : withElsewhere(
    state,
    scope === "key"
      ? { ...elsewhere, keys: HashMap.modify(elsewhere.keys, of, opened) }
      : { ...elsewhere, groups: HashMap.modify(elsewhere.groups, of, opened) }
  )
  if (scope === "group") {
    const bench = PoolState.groupBench(next, key)
    const after = bench === undefined ? next : Benches.withGroup(next, key, free(bench))
    return Places.placeGroup(config, after, of, now)
  }
  const { breaker } = key
  const isElsewhere = breaker._tag === "HalfOpen" && breaker.probe?.id === byOthers
  return Places.place(config, next, {
    ...key,
    breaker: isElsewhere ? { ...breaker, probe: undefined } : breaker,
    bench: key.bench === undefined ? undefined : free(key.bench)
  }, now)
}

/**
 * Makes one of so many parts of all declared limits and of all concurrency this pool's own; 1: they are whole again, and
 * nothing is closed that others closed.
 *
 * @since 0.1.0
 * @category steps
 */
export const divided = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  parts: number,
  now: number
): PoolState.PoolState => {
  const groups = HashMap.map(before.rest.limits.groups, (limits) => RateLimit.divided(limits, parts))
  let next = withElsewhere(
    { ...before, rest: { ...before.rest, limits: { ...before.rest.limits, groups } } },
    { ...Elsewhere.nothing, parts }
  )
  for (const key of PoolState.keys(next)) {
    const limits = key.limits === undefined ? undefined : RateLimit.divided(key.limits, parts)
    next = Places.place(config, next, limits === key.limits ? key : { ...key, limits }, now)
  }
  return next
}

/**
 * What was counted here of declared limits since an instant.
 *
 * @since 0.1.0
 * @category getters
 */
export const takenSince = (
  state: PoolState.PoolState,
  since: number,
  now: number
): ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Taken" }>> => {
  const taken = (subject: SharedPool.Subject, { declared }: RateLimit.RateLimit) =>
    declared.flatMap((limit) => {
      const amount = DeclaredLimit.countedSince(limit, since, now)
      const { unit, whole, windowMillis } = limit
      return amount === 0 ? [] : [{ _tag: "Taken" as const, subject, unit, limit: whole, windowMillis, amount }]
    })
  return [
    ...PoolState.keys(state).flatMap((key) =>
      key.limits === undefined ? [] : taken({ scope: "key", of: key.id }, key.limits)
    ),
    ...HashMap.toEntries(state.rest.limits.groups).flatMap(([of, limits]) => taken({ scope: "group", of }, limits))
  ]
}

/** Where nothing is known of others any more, nothing is looked at. */
const withElsewhere = (state: PoolState.PoolState, elsewhere: Elsewhere.Elsewhere): PoolState.PoolState => ({
  ...state,
  rest: {
    ...state.rest,
    elsewhere: elsewhere.parts === 1 && HashMap.size(elsewhere.keys) === 0 && HashMap.size(elsewhere.groups) === 0
      ? undefined
      : elsewhere
  }
})

const placed = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  slot: number,
  group: string | undefined,
  now: number
): PoolState.PoolState => {
  const key = SlotMap.get(state.slots, slot)
  const next = key === undefined ? state : Places.place(config, state, key, now)
  return Places.placeGroup(config, next, group, now)
}
