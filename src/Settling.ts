/**
 * What the pool takes in of an attempt: its outcome, and the end of its lease.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Benches from "./Benches.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CircuitEvents from "./CircuitEvents.js"
import * as CooldownEvents from "./CooldownEvents.js"
import * as Cooldowns from "./Cooldowns.js"
import * as Corroboration from "./Corroboration.js"
import * as Fault from "./Fault.js"
import * as HedgeBudget from "./HedgeBudget.js"
import * as Homes from "./Homes.js"
import * as KeyState from "./KeyState.js"
import * as Latency from "./Latency.js"
import * as LearnedConcurrency from "./LearnedConcurrency.js"
import * as Limits from "./Limits.js"
import type * as Outcome from "./Outcome.js"
import * as Places from "./Places.js"
import * as PoolKeys from "./PoolKeys.js"
import * as PoolState from "./PoolState.js"
import * as RateLimit from "./RateLimit.js"
import * as SlotMap from "./SlotMap.js"
import type * as Telemetry from "./Telemetry.js"

/** An attempt that was sent, and of which nothing but its outcome is known. */
const nothingHeard: Limits.Heard = { answered: true, sent: true, announced: [], usage: undefined }

/**
 * Takes in what a lease's attempt said (`outcome`), and gives the key back (`end`). `random` is a uniform number in
 * [0, 1), for the jitter of guessed waits.
 *
 * @since 0.1.0
 * @category steps
 */
export const settle = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  lease: PoolState.LeaseRecord,
  outcome: Outcome.Outcome | undefined,
  end: boolean,
  now: number,
  random: number,
  heard: Limits.Heard = nothingHeard
): PoolState.Changed => {
  const observed = config.strategy.wants === "latency" ? observe(before, lease, outcome, now) : before
  const usual = outcome?._tag === "Success" ? usually(config, observed, lease, heard, end, now) : undefined
  if (usual !== undefined) return usual
  const counted = taken(config, observed, lease, outcome, end, now, heard.lost === true)
  const present = SlotMap.get(counted.slots, lease.slot)
  // Nothing of a lease outlives its key, whoever has the slot now.
  if (present === undefined || present.id !== lease.key.id) return { state: counted, events: PoolState.noEvents }
  const limited = Limits.settle(config, counted, present, lease, outcome, heard, end, now)
  if (outcome === undefined || (counted.rest.health.idle && outcome._tag !== "Fault")) {
    return attributed(config, limited.state, limited.key, lease, outcome, end, true, now, random)
  }
  const placed = limited.key === present ? limited.state : Places.place(config, limited.state, limited.key, now)
  const blamed = Corroboration.hear(config, placed, lease, outcome, end, now)
  const key = SlotMap.get(blamed.state.slots, lease.slot) ?? limited.key
  const settled = attributed(config, blamed.state, key, lease, outcome, end, blamed.blames, now, random)
  return blamed.events.length === 0 ? settled : { ...settled, events: [...blamed.events, ...settled.events] }
}

/** Tells the strategy how long an attempt took. */
const observe = (
  state: PoolState.PoolState,
  { key, slot, startedAt, timed }: PoolState.LeaseRecord,
  outcome: Outcome.Outcome | undefined,
  now: number
): PoolState.PoolState => {
  const index = state.index.observe?.({
    slot,
    id: key.id,
    millis: timed === undefined || outcome === undefined ? undefined : now - startedAt,
    answered: outcome?._tag === "Success",
    kind: timed === undefined ? "" : `${timed.streaming ? "stream" : "answer"} ${timed.model ?? ""}`,
    now
  })
  return index === undefined ? state : { ...state, index }
}

/** The success of a key against which nothing is known: it changes numbers only, in one copy of each. */
const usually = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  lease: PoolState.LeaseRecord,
  heard: Limits.Heard,
  end: boolean,
  now: number
): PoolState.Changed | undefined => {
  const key = SlotMap.get(state.slots, lease.slot)
  if (
    key === undefined || key.id !== lease.key.id || key.key.quotaGroup !== lease.key.quotaGroup ||
    lease.affinity !== undefined || heard.announced.length > 0 ||
    !PoolState.isUsual(state, key, lease.model)
  ) return undefined
  const limits = limitsAfter(PoolState.partyLimits(state, key), lease, heard, end, now)
  const group = key.key.quotaGroup
  const breaker = record(config, key.breaker, lease, "success", now)
  if (limits === "unusual" || breaker._tag !== "Closed") return undefined
  const answered = KeyState.numbered(
    key,
    end ? key.inFlight - 1 : key.inFlight,
    key.total,
    key.recent,
    key.lastUsed,
    key.successes + 1,
    now,
    lease.startedAt,
    now,
    breaker,
    group === undefined ? limits : key.limits
  )
  // What it used may be more than it was thought to.
  if (limits !== undefined && RateLimit.gate(limits, undefined, now) !== undefined) return undefined
  const ended = end ? state.ended + 1 : state.ended
  const rest = group === undefined || limits === undefined ? state.rest : Limits.ofGroup(state.rest, group, limits)
  return {
    state: Places.touch(state, answered, ended, timed(config, state, lease, now), rest),
    events: PoolState.noEvents
  }
}

/** The limits of a key or its group after an answer, if no more happened to them than that; `unusual`: more may have. */
const limitsAfter = (
  limits: RateLimit.RateLimit | undefined,
  { reserved }: PoolState.LeaseRecord,
  { answered, sent, usage }: Limits.Heard,
  end: boolean,
  now: number
): RateLimit.RateLimit | undefined | "unusual" => {
  if (limits === undefined) return reserved === undefined ? undefined : "unusual"
  return reserved?.party !== undefined && reserved.model === undefined && end && answered && sent &&
      RateLimit.isDeclaredOnly(limits)
    ? RateLimit.settled(limits, reserved.party, usage, now)
    : "unusual"
}

/** How long attempts take, with the success of one more. */
const timed = (
  config: PoolState.Config,
  { latency }: PoolState.PoolState,
  { id, startedAt, timed }: PoolState.LeaseRecord,
  now: number
): Latency.Latency =>
  timed === undefined || !config.times || !Latency.wants(latency, timed, id)
    ? latency
    : Latency.add(latency, timed, now - startedAt, now)

/** What an attempt adds to the numbers of the pool. */
const taken = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  lease: PoolState.LeaseRecord,
  outcome: Outcome.Outcome | undefined,
  end: boolean,
  now: number,
  lost: boolean
): PoolState.PoolState => {
  const ended = end ? before.ended + 1 : before.ended
  // What was left had lasted at least so long: without it, the slow ones would drop out of what is known.
  const timely = outcome?._tag === "Success" || (lost && outcome?._tag === "Ignored")
  const latency = timely ? timed(config, before, lease, now) : before.latency
  return end || latency !== before.latency ? { ...before, ended, latency } : before
}

/** Takes in an outcome, once it is known whether the key is to blame for it. */
const attributed = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  outcome: Outcome.Outcome | undefined,
  end: boolean,
  blames: boolean,
  now: number,
  random: number
): PoolState.Changed => {
  const given = end ? { ...key, inFlight: key.inFlight - 1 } : key
  switch (outcome?._tag) {
    case undefined: {
      const eligible = KeyState.isPlain(given) && given.gatedUntil === undefined
      return PoolKeys.leaving(
        config,
        eligible ? Places.touch(state, given) : Places.place(config, state, given, now),
        given,
        now,
        PoolState.noEvents
      )
    }
    case "Success": {
      const changed = succeeded(config, state, key, given, lease, now)
      return lease.affinity === undefined
        ? changed
        : { ...changed, state: Homes.follow(changed.state, lease.affinity, key.key, now) }
    }
    case "Ignored":
      return ignored(config, state, given, lease, now)
    case "Fault":
      return faulted(config, state, key, given, lease, outcome.fault, blames, now, random)
  }
}

const succeeded = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  before: KeyState.KeyState,
  key: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  now: number
): PoolState.Changed => {
  const breaker = record(config, key.breaker, lease, "success", now)
  const group = PoolState.groupBench(state, key)
  const successes = key.successes + 1
  const model = lease.model !== undefined && PoolState.hasModels(state)
  if (KeyState.isPlain(key) && group === undefined && breaker._tag === "Closed" && !model) {
    const answered = { ...key, successes, answeredAt: now, answeredFrom: lease.startedAt, quietSince: now, breaker }
    return { state: Places.touch(state, answered), events: PoolState.noEvents }
  }
  const bench = KeyState.lift(key.bench, lease, now)
  const lifted = KeyState.lift(group, lease, now)
  const closes = key.breaker._tag !== "Closed" && breaker._tag === "Closed"
  const groupBack = isGuessLifted(group, lifted)
  const ofModel = lease.model === undefined ? [] : Benches.ofModel(state, key, lease.model)
  const modelBack = ofModel.some((bench) => isGuessLifted(bench, KeyState.lift(bench, lease, now)))
  const ramp = closes || groupBack || modelBack || isGuessLifted(key.bench, bench)
    ? { since: now, successes: 0 }
    : key.ramp === undefined || now >= key.ramp.since + config.rampMillis
    ? undefined
    : { ...key.ramp, successes: key.ramp.successes + 1 }
  const after: KeyState.KeyState = {
    ...key,
    successes,
    answeredAt: now,
    answeredFrom: lease.startedAt,
    quietSince: now,
    stall: undefined,
    breaker,
    bench,
    ramp,
    concurrency: LearnedConcurrency.succeeded(before.concurrency, lease.id, before.inFlight, state.leases, now)
  }
  let next = Benches.withGroup(state, key, lifted)
  next = Benches.mapModel(next, key, lease.model, (bench) => KeyState.lift(bench, lease, now))
  next = Places.place(config, next, after, now)
  if (lifted !== group) {
    // The whole group comes back: each of its keys slowly, or they were a herd together.
    const slowly = (key: KeyState.KeyState) => groupBack ? { ...key, ramp: { since: now, successes: 0 } } : key
    next = Places.placeGroup(config, next, key.key.quotaGroup, now, slowly)
  }
  return PoolKeys.leaving(config, next, after, now, CircuitEvents.between(config.pool, before, after, now))
}

/** Whether a guess about a key has just turned out to be over. */
const isGuessLifted = (before: KeyState.Bench | undefined, after: KeyState.Bench | undefined): boolean =>
  before !== undefined && after === undefined && KeyState.needsTrial(before)

const ignored = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  now: number
): PoolState.Changed => {
  const after: KeyState.KeyState = {
    ...key,
    ignored: key.ignored + 1,
    breaker: record(config, key.breaker, lease, "ignored", now),
    bench: KeyState.freeTrial(key.bench, lease.id)
  }
  const group = PoolState.groupBench(state, key)
  const freed = KeyState.freeTrial(group, lease.id)
  let next = Benches.withGroup(state, key, freed)
  next = Benches.mapModel(next, key, lease.model, (bench) => KeyState.freeTrial(bench, lease.id))
  next = Places.place(config, next, after, now)
  if (freed !== group) next = Places.placeGroup(config, next, key.key.quotaGroup, now)
  return PoolKeys.leaving(config, next, after, now, PoolState.noEvents)
}

const faulted = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  before: KeyState.KeyState,
  key: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  fault: Fault.Fault,
  blames: boolean,
  now: number,
  random: number
): PoolState.Changed => {
  const target = Cooldowns.targetOf(key, lease.model, fault)
  const current = target === undefined ? undefined : Benches.at(state, key, target)
  const shared = target !== undefined && fault.kind === "Unauthorized"
    ? Corroboration.turned(config, state, key, target, fault, current, now)
    : undefined
  const imposed = target === undefined ? undefined : Cooldowns.impose(config.cooldowns, current, fault, {
    stamp: state.leases,
    lease: lease.id,
    mostMillis: shared?.mostMillis,
    random,
    now
  })
  // Calls that were in flight when the cooldown began bring old news.
  const fresh = current === undefined || lease.id > current.stamp
  const counts = countsOnBreaker(fault) || (fault.kind === "RateLimited" &&
    (!config.corroborates || (imposed?.provenance === "guessed" && fresh)))
  const alive = fault.kind !== "ServerError" && fault.kind !== "Timeout" && fault.kind !== "Network" &&
    fault.kind !== "Overloaded"
  const outcome = !blames ? "ignored" : lease.probe && alive ? "alive" : counts ? "failure" : "alive"
  const breaker = record(config, key.breaker, lease, outcome, now, () => evidence(config, state, key, now))
  let after: KeyState.KeyState = {
    ...key,
    faults: key.faults + 1,
    ...(fault.kind === "Timeout" ? {} : { quietSince: now, stall: undefined }),
    breaker,
    bench: KeyState.freeTrial(key.bench, lease.id),
    // A refused attempt that still holds its lease counts as one that runs: then nobody knows how many do.
    concurrency: fault.kind === "RateLimited" && key.inFlight < before.inFlight
      ? LearnedConcurrency.refused(before.concurrency, fault, before.inFlight - 1, lease.id, state.leases, now)
      : key.concurrency,
    ramp: breaker._tag === "Closed" ? rampAfter(config, key, lease, outcome, now) : undefined
  }
  if (target?.scope === "key" && target.model === undefined && imposed !== undefined) {
    after = { ...after, bench: imposed }
  }
  const group = PoolState.groupBench(state, key)
  const groupAfter = target?.scope === "group" && target.model === undefined && imposed !== undefined
    ? imposed
    : KeyState.freeTrial(group, lease.id)
  let next = Benches.withGroup(shared?.state ?? state, key, groupAfter)
  next = Benches.mapModel(next, key, lease.model, (bench) => KeyState.freeTrial(bench, lease.id))
  if (target?.model !== undefined && imposed !== undefined) {
    next = Benches.imposeOnModel(next, key, target.scope, target.model, imposed, now)
  }
  next = Places.place(config, next, after, now)
  if (groupAfter !== group) next = Places.placeGroup(config, next, key.key.quotaGroup, now)
  // The floor goes by what is known: a guess of this moment is not broken in the next.
  const opened = before.breaker._tag !== "Open" && after.breaker._tag === "Open"
  if (opened || imposed?.provenance === "guessed") next = { ...next, rest: { ...next.rest, floorAt: now } }
  if (fault.kind !== "Rejected" && fault.kind !== "TooLarge") {
    const hedging = HedgeBudget.faulted(next.rest.hedging, state.ended - 1, now)
    next = { ...next, rest: { ...next.rest, hedging } }
  }
  const events: Array<Telemetry.Unnumbered> = [
    ...CircuitEvents.between(config.pool, before, after, now),
    ...shared?.events ?? []
  ]
  if (target !== undefined && imposed !== undefined) {
    events.push(CooldownEvents.of(config.pool, key, target, imposed, now))
    if (fault.kind === "RateLimited") {
      const limited = Corroboration.limited(config, next, key, lease, fault, imposed, now)
      next = limited.state
      events.push(...limited.events)
    }
  }
  return PoolKeys.leaving(config, next, after, now, events)
}

/**
 * What a fault leaves of a key's slow return: one that counts begins it anew; a request that is wrong by itself, and old
 * news, change nothing.
 */
const rampAfter = (
  config: PoolState.Config,
  key: KeyState.KeyState,
  lease: PoolState.LeaseRecord,
  outcome: CircuitBreaker.Outcome,
  now: number
): KeyState.Ramp | undefined => {
  if (key.ramp === undefined || now >= key.ramp.since + config.rampMillis) return undefined
  const isNews = outcome === "failure" && lease.generation === key.breaker.generation
  return isNews ? { since: now, successes: 0 } : key.ramp
}

/** Provider faults count against the key, unless it is known that its siblings have them too. */
const countsOnBreaker = Fault.isProviderFault

const record = (
  config: PoolState.Config,
  breaker: CircuitBreaker.State,
  lease: PoolState.LeaseRecord,
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
  config: PoolState.Config,
  state: PoolState.PoolState,
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
