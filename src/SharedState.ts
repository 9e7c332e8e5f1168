/**
 * What pools tell each other of their keys: what of one pool's changes is news to the others, and what their news changes
 * here. Pure steps.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as Benches from "./Benches.js"
import * as CircuitBreaker from "./CircuitBreaker.js"
import * as CooldownEvents from "./CooldownEvents.js"
import type * as Cooldowns from "./Cooldowns.js"
import * as KeyState from "./KeyState.js"
import * as Places from "./Places.js"
import * as PoolKeys from "./PoolKeys.js"
import * as PoolState from "./PoolState.js"
import * as SharedPool from "./SharedPool.js"
import * as SlotMap from "./SlotMap.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * Which transition of each key's breaker is known here, by the key's id.
 *
 * @since 0.1.0
 * @category models
 */
export type Versions = HashMap.HashMap<string, SharedPool.Version>

/**
 * Whether a version comes after the one that is known.
 *
 * @since 0.1.0
 * @category getters
 */
export const isNewer = (version: SharedPool.Version, known: SharedPool.Version | undefined): boolean =>
  known === undefined || version.epoch > known.epoch ||
  (version.epoch === known.epoch && version.generation > known.generation)

// ------------------------------------------------------------------------------------------------------------- telling

/**
 * What has happened between two states of a pool that others must hear of: cooldowns that began or grew, or that are over
 * before their end or were guesses; and breakers that opened or closed. Without a state before, all that is known.
 *
 * @since 0.1.0
 * @category getters
 */
export const notices = (
  before: PoolState.PoolState | undefined,
  after: PoolState.PoolState,
  versions: Versions,
  now: number
): ReadonlyArray<SharedPool.Notice> => {
  const found: Array<SharedPool.Notice> = []
  const benched = (
    subject: SharedPool.Subject,
    was: KeyState.Bench | undefined,
    is: KeyState.Bench | undefined
  ): void => {
    if (was === is) return
    const shorter = was !== undefined && (is === undefined || is.until < was.until)
    // That a told wait is over, everybody knows.
    if (shorter && (was.until > now || KeyState.needsTrial(was))) {
      found.push({ _tag: "Lifted", subject, forMillis: was.until - now })
    }
    if (is === undefined || is.until <= now) return
    if (was === undefined || shorter || is.until > was.until || is.firm > was.firm || is.refused !== was.refused) {
      found.push({ _tag: "Cooldown", cooldown: cooldownOf(subject, is, now) })
    }
  }
  const slots = before === undefined ? undefined : SlotMap.changes(before.slots, after.slots)
  const keys = slots === undefined
    ? PoolState.keys(after)
    : slots.flatMap((slot) => SlotMap.get(after.slots, slot) ?? [])
  for (const key of keys) {
    const old = before === undefined ? undefined : PoolState.find(before, key.id)
    benched({ scope: "key", of: key.id }, old?.bench, key.bench)
    const to = transition(old?.breaker ?? CircuitBreaker.initial, key.breaker, now)
    if (to !== undefined) {
      found.push({ _tag: "Breaker", keyId: key.id, from: Option.getOrUndefined(HashMap.get(versions, key.id)), to })
    }
  }
  if (before?.rest.groups !== after.rest.groups) {
    for (const [of, { bench }] of after.rest.groups) {
      const was = before === undefined ? undefined : Option.getOrUndefined(HashMap.get(before.rest.groups, of))?.bench
      benched({ scope: "group", of }, was, bench)
    }
  }
  if (before?.rest.models !== after.rest.models) {
    for (const { is, subject, was } of modelBenches(before, after).values()) {
      // A key that has left takes along what was held against it here only.
      if (keyOf(after, subject) !== undefined) benched(subject, was, is)
    }
  }
  return found
}

/** What is, or was, held against keys and groups for single models. */
const modelBenches = (before: PoolState.PoolState | undefined, after: PoolState.PoolState) => {
  const all = new Map<string, {
    readonly subject: SharedPool.Subject
    readonly was?: KeyState.Bench | undefined
    readonly is?: KeyState.Bench | undefined
  }>()
  const look = (state: PoolState.PoolState, as: "was" | "is") => {
    for (const [model, { groups, keys }] of state.rest.models) {
      const add = (subject: SharedPool.Subject, bench: KeyState.Bench) => {
        const name = SharedPool.nameOf(subject)
        all.set(name, { ...all.get(name), subject, [as]: bench })
      }
      for (const [slot, bench] of keys) {
        const id = SlotMap.get(state.slots, slot)?.id
        if (id !== undefined) add({ scope: "key", of: id, model }, bench)
      }
      for (const [of, bench] of groups) add({ scope: "group", of, model }, bench)
    }
  }
  if (before !== undefined) look(before, "was")
  look(after, "is")
  return all
}

const cooldownOf = (subject: SharedPool.Subject, bench: KeyState.Bench, now: number): SharedPool.SharedCooldown => ({
  subject,
  kind: bench.kind,
  forMillis: bench.until - now,
  waitMillis: Math.max(0, bench.until - bench.since),
  ...(bench.firm > now ? { firmMillis: bench.firm - now } : {}),
  provenance: bench.provenance,
  refused: bench.refused,
  step: bench.step
})

/** What a change of a breaker is to others, to whom it is never half-open; `undefined`: nothing. */
const transition = (
  was: CircuitBreaker.State,
  is: CircuitBreaker.State,
  now: number
): SharedPool.BreakerState | undefined => {
  if (was._tag === is._tag && (is._tag !== "Open" || (was._tag === "Open" && is.until === was.until))) return undefined
  switch (is._tag) {
    case "Closed":
      return { _tag: "Closed", trips: is.trips }
    case "HalfOpen":
      // It opened meanwhile, and its time is over already.
      return was._tag === "Closed" ? { _tag: "Open", forMillis: 0, waitMillis: 0, trips: is.trips } : undefined
    case "Open":
      return is.until === Infinity
        ? { _tag: "Isolated", trips: is.trips }
        : {
          _tag: "Open",
          forMillis: Math.max(0, is.until - now),
          waitMillis: Math.max(0, is.until - is.openedAt),
          trips: is.trips
        }
  }
}

// ------------------------------------------------------------------------------------------------------------- hearing

/**
 * Takes in a cooldown that others were told: the longer one holds.
 *
 * @since 0.1.0
 * @category steps
 */
export const cooled = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  cooldown: SharedPool.SharedCooldown,
  now: number
): PoolState.Changed => {
  const { subject } = cooldown
  const key = keyOf(state, subject)
  if (key === undefined) return unchanged(state)
  const target = targetOf(subject)
  const own = Benches.at(state, key, target)
  const bench = merged(own, cooldown, state.leases, now)
  if (bench === own) return unchanged(state)
  const next = subject.model === undefined
    ? Benches.withBench(config, state, key, subject.scope, bench, now)
    : moved(Benches.imposeOnModel(state, key, subject.scope, subject.model, bench, now))
  return {
    state: bench.provenance === "guessed" ? { ...next, rest: { ...next.rest, floorAt: now } } : next,
    events: bench.until > now ? [CooldownEvents.of(config.pool, key, target, bench, now)] : PoolState.noEvents
  }
}

const merged = (
  own: KeyState.Bench | undefined,
  cooldown: SharedPool.SharedCooldown,
  stamp: number,
  now: number
): KeyState.Bench => {
  const { firmMillis, forMillis, kind, provenance, refused, step, waitMillis } = cooldown
  const until = Math.ceil(now + forMillis)
  const firm = firmMillis === undefined ? -Infinity : Math.ceil(now + firmMillis)
  const told = { kind, since: until - waitMillis, until, provenance, firm, refused, step, stamp, trial: undefined }
  if (own === undefined) return told
  if (until <= own.until && firm <= own.firm && (own.refused || !refused)) return own
  const longer = until > own.until ? told : own
  return {
    ...longer,
    firm: Math.max(firm, own.firm),
    refused: own.refused || refused,
    step: own.kind === kind ? Math.max(own.step, step) : longer.step,
    stamp,
    trial: undefined
  }
}

/**
 * Takes in that the cooldown of a subject is over, unless what is known here lasts longer than what was lifted.
 *
 * @since 0.1.0
 * @category steps
 */
export const lifted = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  subject: SharedPool.Subject,
  forMillis: number,
  now: number
): PoolState.Changed => {
  const key = keyOf(state, subject)
  const own = key === undefined ? undefined : Benches.at(state, key, targetOf(subject))
  if (key === undefined || own === undefined || own.until - now > forMillis + sameMillis) return unchanged(state)
  const { model, of, scope } = subject
  if (model !== undefined) {
    const next = Benches.mapOne(state, key, { scope, model }, () => undefined)
    return { state: moved(next), events: PoolState.noEvents }
  }
  // Whoever comes back from a guess does so slowly, here too.
  const ramp = KeyState.needsTrial(own) ? { since: now, successes: 0 } : undefined
  const slowly = (key: KeyState.KeyState): KeyState.KeyState => ramp === undefined ? key : { ...key, ramp }
  return {
    state: scope === "key"
      ? Places.place(config, state, slowly({ ...key, bench: undefined }), now)
      : Places.placeGroup(config, Benches.withGroup(state, key, undefined), of, now, slowly),
    events: PoolState.noEvents
  }
}

const targetOf = ({ model, scope }: SharedPool.Subject): Cooldowns.Target => ({ scope, model })

/** Instants that came here by different ways differ by less. */
const sameMillis = 1_000

/**
 * Takes in how a key's breaker stands for all. What was leased before says nothing any more of how it stands.
 *
 * @since 0.1.0
 * @category steps
 */
export const transited = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  keyId: string,
  to: SharedPool.BreakerState,
  now: number
): PoolState.Changed => {
  const changed = PoolKeys.updateKey(config, state, keyId, (key) => {
    const breaker = breakerOf(to, key.breaker.generation + 1, now)
    const closes = breaker._tag === "Closed" && key.breaker._tag !== "Closed"
    return {
      ...key,
      breaker,
      ramp: breaker._tag !== "Closed" ? undefined : closes ? { since: now, successes: 0 } : key.ramp
    }
  }, now)
  if (changed === undefined) return unchanged(state)
  return to._tag === "Open"
    ? { ...changed, state: { ...changed.state, rest: { ...changed.state.rest, floorAt: now } } }
    : changed
}

const breakerOf = (to: SharedPool.BreakerState, generation: number, now: number): CircuitBreaker.State =>
  CircuitBreaker.fromStored(
    to._tag === "Open"
      ? { ...to, until: now + to.forMillis }
      : to._tag === "Closed"
      ? { ...to, failures: 0 }
      : to,
    now,
    0,
    generation
  )

/**
 * Whether a breaker stands as was told.
 *
 * @since 0.1.0
 * @category getters
 */
export const standsAs = (a: SharedPool.BreakerState, b: SharedPool.BreakerState): boolean =>
  a._tag === b._tag && a.trips === b.trips &&
  (a._tag !== "Open" || b._tag !== "Open" || Math.abs(a.forMillis - b.forMillis) < sameMillis)

/**
 * Takes in all that is known where all meet. `before` is what was known there when this pool was there last: of that, what
 * is not known there any more has been lifted since; without it, nothing was.
 *
 * @since 0.1.0
 * @category steps
 */
export const joined = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  before: PoolState.PoolState | undefined,
  news: Extract<SharedPool.News, { readonly _tag: "Joined" }>,
  versions: Versions,
  now: number
): PoolState.Changed => {
  const events: Array<Telemetry.Unnumbered> = []
  let next = state
  const take = (changed: PoolState.Changed) => {
    next = changed.state
    events.push(...changed.events)
  }
  if (before !== undefined) {
    const known = new Set(news.cooldowns.map(({ subject }) => SharedPool.nameOf(subject)))
    for (const [subject, bench] of allBenches(before)) {
      const key = keyOf(next, subject)
      if (key === undefined || known.has(SharedPool.nameOf(subject)) || !KeyState.needsTrial(bench)) continue
      // What changed here meanwhile is known better here.
      if (isSame(Benches.at(next, key, targetOf(subject)), bench)) {
        take(lifted(config, next, subject, bench.until - now, now))
      }
    }
  }
  for (const cooldown of news.cooldowns) take(cooled(config, next, cooldown, now))
  for (const { keyId, state: to, version } of news.breakers) {
    if (isNewer(version, Option.getOrUndefined(HashMap.get(versions, keyId)))) {
      take(transited(config, next, keyId, to, now))
    }
  }
  return { state: next, events }
}

const isSame = (own: KeyState.Bench | undefined, bench: KeyState.Bench): boolean =>
  own !== undefined && own.until === bench.until && own.stamp === bench.stamp

const allBenches = (state: PoolState.PoolState): ReadonlyArray<readonly [SharedPool.Subject, KeyState.Bench]> => {
  const found: Array<readonly [SharedPool.Subject, KeyState.Bench]> = []
  for (const { bench, id } of PoolState.keys(state)) {
    if (bench !== undefined) found.push([{ scope: "key", of: id }, bench])
  }
  for (const [of, { bench }] of state.rest.groups) if (bench !== undefined) found.push([{ scope: "group", of }, bench])
  for (const { is, subject } of modelBenches(undefined, state).values()) if (is !== undefined) found.push([subject, is])
  return found
}

/** The key that a subject is, or some key of the group that it is. */
const keyOf = (state: PoolState.PoolState, { of, scope }: SharedPool.Subject): KeyState.KeyState | undefined =>
  scope === "key" ? PoolState.find(state, of) : PoolState.memberOf(state, of)

const unchanged = (state: PoolState.PoolState): PoolState.Changed => ({ state, events: PoolState.noEvents })

/** What people want to hear of has changed. */
const moved = (state: PoolState.PoolState): PoolState.PoolState => ({
  ...state,
  rest: { ...state.rest, moves: state.rest.moves + 1 }
})
