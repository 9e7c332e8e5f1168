/**
 * Whether the provider itself is down: one breaker per origin and model, told from the outcomes of all keys together.
 *
 * It is pure, and it is idle while all is well: nothing is counted before the first fault of the provider. From then on a
 * `Row` gathers the evidence; enough of it makes an `Outage`, whose gate admits few probes; the first success ends that,
 * and who waits is let go at a measured pace, a `Release`.
 *
 * Keys that share a limit nobody declared are told from the outcomes of all in the same way: a `Suspicion` lets one call
 * per second try, until the limit is over or a call gets through.
 *
 * Successes take longer than refusals, and an attempt that began before the trouble says nothing of it. So attempts are
 * compared in the order in which they began: an old success ends no row, and an attempt that began between the faults
 * and is still undecided speaks against an outage.
 *
 * All times are milliseconds of the pool's clock.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as CircuitBreaker from "./CircuitBreaker.js"

/**
 * What is known of the provider: the evidence, and the gates, by `placeOf`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Health {
  /** There is nothing but the past: nothing to look at. */
  readonly idle: boolean
  readonly rows: HashMap.HashMap<string, Row>
  /** Rate limits of the last second, with no success between them. */
  readonly refusals: HashMap.HashMap<string, ReadonlyArray<Refusal>>
  readonly gates: HashMap.HashMap<string, Gate>
  /** The newest lease when the last outage ended, and when: what attempts up to it still say of faults is old news. */
  readonly past: HashMap.HashMap<string, { readonly newest: number; readonly at: number }>
}

/**
 * Faults of the provider with hardly a success between them.
 *
 * @since 0.1.0
 * @category models
 */
export interface Row {
  readonly origin: string
  readonly model: string | undefined
  readonly since: number
  /** When the last fault came. */
  readonly at: number
  /** The lease of the first fault, and the newest lease of all when it was told. */
  readonly first: number
  readonly mark: number
  /** Faults with no success between them. */
  readonly faults: number
  readonly window: CircuitBreaker.Window
  /** How many faults came by each key, by slot. */
  readonly slots: HashMap.HashMap<number, number>
  /** Attempts of this origin and model that began after `mark`, and how many of those are decided. */
  readonly begun: number
  readonly decided: number
  /** At most so many attempts that began after `first` and not after `mark` are undecided. */
  readonly older: number
}

/**
 * The provider is taken for down. `model` is absent where the whole origin is.
 *
 * @since 0.1.0
 * @category models
 */
export interface Outage {
  readonly _tag: "Outage"
  readonly origin: string
  readonly model: string | undefined
  readonly whole: boolean
  /** When its first fault came. */
  readonly since: number
  /** Only attempts that began after this lease can end it. */
  readonly first: number
  /** Probes that are undecided. */
  readonly probes: ReadonlyArray<{ readonly lease: number; readonly since: number }>
  readonly nextAt: number
  /** The turn of the call that probed last, see `PoolState.turnOf`: the next one is another's. */
  readonly prober: bigint | undefined
}

/**
 * The provider answers again: who waited goes at a measured pace, and newcomers behind.
 *
 * @since 0.1.0
 * @category models
 */
export interface Release {
  readonly _tag: "Release"
  readonly origin: string
  readonly model: string | undefined
  readonly since: number
  readonly nextAt: number
  /** The calls per millisecond that came of late. */
  readonly offered: number
}

/**
 * A rate limit that one key, or its quota group, was told.
 *
 * @since 0.1.0
 * @category models
 */
export interface Refusal {
  /** When its attempt began, and when it came. */
  readonly since: number
  readonly at: number
  readonly lease: number
  readonly keyId: string
  /** The quota group, or the key where it has none. */
  readonly group: string
  /** The provider's code. */
  readonly code: string | undefined
  /** When it is over, and whether somebody told so. */
  readonly until: number
  readonly told: boolean
}

/**
 * Several quota groups behave as one. Until it is known better, or the limit is over, one call per second tries.
 *
 * @since 0.1.0
 * @category models
 */
export interface Suspicion {
  readonly _tag: "Suspicion"
  readonly origin: string
  readonly model: string | undefined
  /** The lease of the first refusal: the success of a later one clears it. */
  readonly first: number
  readonly keyIds: ReadonlyArray<string>
  /** How long the refusals took, at most. */
  readonly took: number
  readonly until: number
  readonly nextAt: number
  /** The turn of the call that tried last. */
  readonly prober: bigint | undefined
}

/**
 * What holds attempts back.
 *
 * @since 0.1.0
 * @category models
 */
export type Gate = Outage | Release | Suspicion

/**
 * An attempt, as far as the provider's health goes.
 *
 * @since 0.1.0
 * @category models
 */
export interface Attempt {
  readonly origin: string
  readonly model: string | undefined
  /** Leases are numbered in the order in which they begin. */
  readonly lease: number
  readonly slot: number
  /** Which of its row it was, as `began` said; 0: there was none. */
  readonly nth: number
}

/**
 * Nothing is wrong, and never was.
 *
 * @since 0.1.0
 * @category constructors
 */
export const initial: Health = {
  idle: true,
  rows: HashMap.empty(),
  refusals: HashMap.empty(),
  gates: HashMap.empty(),
  past: HashMap.empty()
}

// ------------------------------------------------------------------------------------------------------------ evidence

/**
 * What the pool knows beside, when a fault comes.
 *
 * @since 0.1.0
 * @category models
 */
export interface Circumstances {
  /** The newest lease, other attempts that run, and those that began in the last 5 to 10 s: all of the whole pool. */
  readonly leases: number
  readonly inFlight: number
  readonly recent: number
  /** Whether any key of the attempt's origin has answered an attempt that began at an instant or later. */
  readonly answeredSince: (instant: number) => boolean
}

/**
 * Takes in a fault of the provider. `blames` tells whether it may be held against the key; `opened` are the outages that
 * begin with it, and `row` what they rest on.
 *
 * @since 0.1.0
 * @category transitions
 */
export const faulted = (
  health: Health,
  attempt: Attempt,
  circumstances: Circumstances,
  now: number
): {
  readonly health: Health
  readonly blames: boolean
  readonly opened: ReadonlyArray<Outage>
  readonly row: Row | undefined
} => {
  const place = placeOf(attempt.origin, attempt.model)
  const isOld = [wholeOf(attempt.origin), place].some((at) =>
    Option.exists(HashMap.get(health.past, at), ({ newest }) => attempt.lease <= newest)
  )
  if (isOld || outageOf(health, attempt.origin, attempt.model) !== undefined) {
    return { health, blames: false, opened: [], row: undefined }
  }
  const row = withFault(Option.getOrUndefined(HashMap.get(health.rows, place)), attempt, circumstances, now)
  if (!isOutage(row, attempt, circumstances.recent, now)) {
    const rows = HashMap.set(health.rows, place, row)
    return { health: { ...health, idle: false, rows }, blames: true, opened: [], row: undefined }
  }
  const opened = open(row, now)
  const next: Health = {
    ...health,
    idle: false,
    rows: HashMap.remove(health.rows, place),
    gates: HashMap.set(health.gates, place, opened)
  }
  const others = outages(health).filter(({ model, origin }) => origin === attempt.origin && model !== attempt.model)
  const newest = Math.max(row.since, ...others.map(({ since }) => since))
  if (others.length === 0 || circumstances.answeredSince(newest)) {
    return { health: next, blames: false, opened: [opened], row }
  }
  const since = Math.min(row.since, ...others.map(({ since }) => since))
  const whole: Outage = { ...opened, model: undefined, whole: true, since, nextAt: now + spacing(now - since) }
  return {
    health: { ...next, gates: HashMap.set(next.gates, wholeOf(attempt.origin), whole) },
    blames: false,
    opened: [opened, whole],
    row
  }
}

/**
 * Takes in a success. `closed` are the outages that end with it; where `waiting`, a release follows, at `offered` calls
 * per millisecond. `leases` is the newest lease of the pool.
 *
 * @since 0.1.0
 * @category transitions
 */
export const succeeded = (
  health: Health,
  attempt: Attempt,
  { leases, offered, waiting }: { readonly leases: number; readonly offered: number; readonly waiting: boolean },
  now: number
): { readonly health: Health; readonly closed: ReadonlyArray<Outage> } => {
  const place = placeOf(attempt.origin, attempt.model)
  let { gates, past, refusals, rows } = health
  const row = Option.getOrUndefined(HashMap.get(rows, place))
  // What began before the first fault says nothing of what came after.
  if (row !== undefined && attempt.lease > row.first) {
    const window = CircuitBreaker.observe(row.window, now, windowMillis, false)
    const { calls, faults } = CircuitBreaker.counts(window, now, windowMillis)
    rows = calls - faults > toleratedShare * calls
      ? HashMap.remove(rows, place)
      : HashMap.set(rows, place, { ...row, window, faults: 0 })
  }
  const refused = Option.getOrUndefined(HashMap.get(refusals, place))?.[0]
  if (refused !== undefined && attempt.lease > refused.lease) refusals = HashMap.remove(refusals, place)
  const suspicion = Option.getOrUndefined(HashMap.get(gates, limitOf(place)))
  if (suspicion?._tag === "Suspicion" && attempt.lease > suspicion.first) gates = HashMap.remove(gates, limitOf(place))
  const closed: Array<Outage> = []
  for (const at of [wholeOf(attempt.origin), place]) {
    const gate = Option.getOrUndefined(HashMap.get(gates, at))
    if (gate?._tag !== "Outage" || attempt.lease <= gate.first) continue
    closed.push(gate)
    past = HashMap.set(without(past, ({ at }) => now >= at + rememberedMillis), at, { newest: leases, at: now })
    if (gate.whole) gates = asked(gates, gate.origin, now)
    gates = waiting && closed.length === 1
      ? HashMap.set(gates, at, {
        _tag: "Release",
        origin: gate.origin,
        model: gate.model,
        since: now,
        nextAt: now,
        offered
      })
      : HashMap.remove(gates, at)
  }
  return { health: simplest(health, { rows, refusals, gates, past }), closed }
}

/**
 * Takes in a rate limit; `suspected` is what begins with it, and lasts until `firstTold` at most: by then another key may
 * serve, as it was told itself.
 *
 * @since 0.1.0
 * @category transitions
 */
export const limited = (
  health: Health,
  { model, origin }: Pick<Attempt, "origin" | "model">,
  refusal: Refusal,
  firstTold: () => number = () => Infinity
): { readonly health: Health; readonly suspected: Suspicion | undefined } => {
  const place = placeOf(origin, model)
  const before = Option.getOrElse(HashMap.get(health.refusals, place), () => noRefusals)
  const alike = [
    ...before.filter(({ at, code, group }) =>
      at > refusal.at - suspectMillis && code === refusal.code && group !== refusal.group
    ),
    refusal
  ]
  const known = HashMap.has(health.gates, limitOf(place))
  if (known || alike.length < suspectGroups) {
    const refusals = HashMap.set(health.refusals, place, alike.slice(-suspectGroups))
    return { health: simplest(health, { ...health, refusals }), suspected: undefined }
  }
  const told = alike.filter(({ told }) => told)
  const suspected: Suspicion = {
    _tag: "Suspicion",
    origin,
    model,
    first: Math.min(...alike.map(({ lease }) => lease)),
    keyIds: alike.map(({ keyId }) => keyId),
    took: longest(alike),
    until: Math.min(firstTold(), ...(told.length > 0 ? told : alike).map(({ until }) => until)),
    nextAt: refusal.at,
    prober: undefined
  }
  const refusals = HashMap.remove(health.refusals, place)
  const gates = HashMap.set(health.gates, limitOf(place), suspected)
  return { health: simplest(health, { ...health, refusals, gates }), suspected }
}

/**
 * Whether keys have been refused for a rate limit just now, and none has answered since.
 *
 * @since 0.1.0
 * @category getters
 */
export const isLimiting = ({ refusals }: Health, now: number): boolean =>
  HashMap.size(refusals) > 0 &&
  HashMap.some(refusals, (row) => row.some(({ at }) => at > now - suspectMillis))

/**
 * Whether several groups have been refused alike just now, and nothing has been answered since: then two calls do not find
 * out the same thing of a key, see `triedUntil`.
 *
 * @since 0.1.0
 * @category getters
 */
export const isDoubtful = (health: Health, origin: string, model: string | undefined, now: number): boolean =>
  !health.idle && doubtOf(health, placeOf(origin, model), now) !== undefined

/**
 * The models for which that is so and no gate says more: all others are as if nothing were.
 *
 * @since 0.1.0
 * @category getters
 */
export const doubtedModels = ({ refusals }: Health): ReadonlyArray<string | undefined> =>
  HashMap.size(refusals) === 0 ? [] : [...refusals].flatMap(([place, row]) => {
    if (row.length < doubtedGroups) return []
    const model = place.slice(place.indexOf("\n") + 1)
    return [model === "" ? undefined : model]
  })

/**
 * Until when a key is left to the attempt that it has begun at the instant `since`, where others were refused alike just
 * now: for twice as long as that took, and no longer than it matters. `undefined`: it may be tried by others as well.
 *
 * @since 0.1.0
 * @category getters
 */
export const triedUntil = (
  health: Health,
  origin: string,
  model: string | undefined,
  since: number,
  now: number
): number | undefined => {
  const doubt = doubtOf(health, placeOf(origin, model), now)
  if (doubt === undefined) return undefined
  const until = Math.min(since + Math.min(2 * doubt.took, suspectMillis), doubt.until)
  return until > now ? until : undefined
}

/** How long the refusals took that are reason for doubt, and until when they are. */
const doubtOf = (
  { gates, refusals }: Health,
  place: string,
  now: number
): { readonly took: number; readonly until: number } | undefined => {
  const suspicion = Option.getOrUndefined(HashMap.get(gates, limitOf(place)))
  if (suspicion?._tag === "Suspicion" && now < suspicion.until) return suspicion
  const row = Option.getOrUndefined(HashMap.get(refusals, place))?.filter(({ at }) => at > now - suspectMillis) ?? []
  const last = row[row.length - doubtedGroups]
  return last === undefined ? undefined : { took: longest(row), until: last.at + suspectMillis }
}

const longest = (refusals: ReadonlyArray<Refusal>): number => Math.max(...refusals.map(({ at, since }) => at - since))

/**
 * Takes note that an attempt is decided, however; before what it said is taken in. Evidence that has come to nothing is
 * forgotten: of a model that nobody asks for any more, no success would ever tell that all is well.
 *
 * @since 0.1.0
 * @category transitions
 */
export const decided = (before: Health, attempt: Attempt, now: number): Health => {
  const health = current(before, now)
  const place = placeOf(attempt.origin, attempt.model)
  const rows = HashMap.size(health.rows) === 0 ?
    health.rows :
    HashMap.map(health.rows, (row, at) =>
      attempt.lease > row.mark
        ? at === place && attempt.nth > 0 ? { ...row, decided: row.decided + 1 } : row
        : attempt.lease > row.first && row.older > 0
        ? { ...row, older: row.older - 1 }
        : row)
  let gates = health.gates
  for (const at of [wholeOf(attempt.origin), place]) {
    const gate = Option.getOrUndefined(HashMap.get(gates, at))
    if (gate?._tag !== "Outage" || !gate.probes.some(({ lease }) => lease === attempt.lease)) continue
    gates = HashMap.set(gates, at, { ...gate, probes: gate.probes.filter(({ lease }) => lease !== attempt.lease) })
  }
  return simplest(health, { ...health, rows, gates })
}

/** The outages of an origin's models are there when its own ends: with its probes, they were asked about until now. */
const asked = (gates: Health["gates"], origin: string, now: number): Health["gates"] =>
  HashMap.map(
    gates,
    (gate) => gate._tag === "Outage" && gate.origin === origin ? { ...gate, nextAt: Math.max(gate.nextAt, now) } : gate
  )

/**
 * Without faults of long ago, refusals that are alike to none, gates that hold nobody back any more, and outages that
 * nobody has asked about for long: of a model that is gone no success would ever tell.
 */
const current = (health: Health, now: number): Health =>
  simplest(health, {
    past: health.past,
    rows: without(health.rows, ({ at }) => now >= at + rememberedMillis),
    refusals: without(health.refusals, (row) => row.every(({ at }) => now >= at + suspectMillis)),
    gates: without(health.gates, (gate) =>
      gate._tag === "Release"
        ? isOver(gate, now)
        : gate._tag === "Suspicion"
        ? now >= gate.until
        : now >= askedAbout(health, gate) + rememberedMillis)
  })

/** When somebody last asked about an outage, or might have next; probes of the whole origin are those of its models. */
const askedAbout = ({ gates }: Health, { nextAt, origin }: Outage): number => {
  const whole = Option.getOrUndefined(HashMap.get(gates, wholeOf(origin)))
  return whole?._tag === "Outage" ? Math.max(nextAt, whole.nextAt) : nextAt
}

const without = <A>(map: HashMap.HashMap<string, A>, isOver: (a: A) => boolean): HashMap.HashMap<string, A> =>
  HashMap.some(map, isOver) ? HashMap.filter(map, (a) => !isOver(a)) : map

/**
 * The outages that were forgotten between one moment and the next.
 *
 * @since 0.1.0
 * @category getters
 */
export const forgotten = (before: Health, after: Health): ReadonlyArray<Outage> =>
  before.gates === after.gates ?
    [] :
    [...before.gates].flatMap(([at, gate]) => gate._tag === "Outage" && !HashMap.has(after.gates, at) ? [gate] : [])

/**
 * How many faults came with no success between.
 *
 * @since 0.1.0
 * @category getters
 */
export const faultsInRow = (health: Health, origin: string, model: string | undefined): number =>
  Option.match(HashMap.get(health.rows, placeOf(origin, model)), { onNone: () => 0, onSome: ({ faults }) => faults })

/**
 * Forgets the evidence of an origin and model: it was somebody else's fault.
 *
 * @since 0.1.0
 * @category transitions
 */
export const acquit = (health: Health, origin: string, model: string | undefined): Health =>
  simplest(health, { ...health, rows: HashMap.remove(health.rows, placeOf(origin, model)) })

const withFault = (
  row: Row | undefined,
  { lease, model, origin, slot }: Attempt,
  { inFlight, leases }: Circumstances,
  now: number
): Row => ({
  origin,
  model,
  since: row?.since ?? now,
  at: now,
  first: row?.first ?? lease,
  mark: row?.mark ?? leases,
  faults: (row?.faults ?? 0) + 1,
  window: CircuitBreaker.observe(row?.window ?? CircuitBreaker.emptyWindow, now, windowMillis, true),
  slots: HashMap.modifyAt(row?.slots ?? HashMap.empty(), slot, (n) => Option.some(Option.getOrElse(n, () => 0) + 1)),
  begun: row?.begun ?? 0,
  decided: row?.decided ?? 0,
  older: row?.older ?? Math.max(0, Math.min(inFlight, leases - lease))
})

/** Whether a row is an outage, at the fault of an attempt. */
const isOutage = (row: Row, attempt: Attempt, recent: number, now: number): boolean => {
  // One key alone is its own breaker's affair.
  if (HashMap.size(row.slots) < 2) return false
  const { calls, faults } = CircuitBreaker.counts(row.window, now, windowMillis)
  const open = undecided(row, attempt)
  if (calls >= manyCalls) return calls - faults + open <= toleratedShare * (calls + open)
  return row.faults >= fewFaults && open === 0 && recent < manyCalls
}

/** How many attempts, at least, began after the row's first fault and before this one's attempt and are undecided. */
const undecided = (row: Row, { lease, nth }: Attempt): number => {
  const later = nth > 0 ? row.begun - nth : row.begun
  const older = row.older - Math.max(0, row.mark - lease)
  return Math.max(0, row.begun - row.decided - later) + Math.max(0, older)
}

const open = ({ first, model, origin, since }: Row, now: number): Outage => ({
  _tag: "Outage",
  origin,
  model,
  whole: false,
  since,
  first,
  probes: [],
  nextAt: now + spacing(now - since),
  prober: undefined
})

// --------------------------------------------------------------------------------------------------------------- gates

/**
 * Whether anything may be held back at all.
 *
 * @since 0.1.0
 * @category getters
 */
export const isGating = ({ gates }: Health): boolean => HashMap.size(gates) > 0

/**
 * Until when attempts at an origin and model are held back, and whether by the provider's health or as one quota group;
 * `undefined`: they are not. An outage that has its fill of probes holds them until `probeMillis` after the oldest.
 *
 * @since 0.1.0
 * @category getters
 */
export const heldBack = (
  health: Health,
  origin: string,
  model: string | undefined,
  probeMillis: number,
  now: number
): { readonly until: number; readonly by: "provider" | "group" } | undefined => {
  let until = now
  let by: "provider" | "group" = "provider"
  for (const gate of gatesOf(health, origin, model)) {
    const at = gate._tag === "Outage"
      ? probesAt(gate, probeMillis, now)
      : gate._tag === "Release"
      ? gate.nextAt
      : Math.min(gate.nextAt, gate.until)
    if (at <= until) continue
    until = at
    by = gate._tag === "Suspicion" ? "group" : "provider"
  }
  return until > now ? { until, by } : undefined
}

/**
 * The outage that holds back attempts at an origin and model.
 *
 * @since 0.1.0
 * @category getters
 */
export const outageOf = (health: Health, origin: string, model: string | undefined): Outage | undefined => {
  for (const gate of gatesOf(health, origin, model)) if (gate._tag === "Outage") return gate
  return undefined
}

/**
 * What lets single attempts at an origin and model try whether it is over: calls take turns at that.
 *
 * @since 0.1.0
 * @category getters
 */
export const trialOf = (health: Health, origin: string, model: string | undefined): Outage | Suspicion | undefined => {
  for (const gate of gatesOf(health, origin, model)) if (gate._tag !== "Release") return gate
  return undefined
}

/**
 * All outages.
 *
 * @since 0.1.0
 * @category getters
 */
export const outages = (health: Health): ReadonlyArray<Outage> =>
  gates(health).filter((gate): gate is Outage => gate._tag === "Outage")

/**
 * All gates.
 *
 * @since 0.1.0
 * @category getters
 */
export const gates = (health: Health): ReadonlyArray<Gate> => [...HashMap.values(health.gates)]

/**
 * Takes note that an attempt begins; `nth` is to be remembered with it. Gates through which it goes are set for the next.
 *
 * @since 0.1.0
 * @category transitions
 */
export const began = (
  health: Health,
  { lease, model, origin, turn }: Omit<Attempt, "nth"> & { readonly turn: bigint },
  probeMillis: number,
  now: number
): { readonly health: Health; readonly nth: number } => {
  const place = placeOf(origin, model)
  let { gates, rows } = health
  const row = Option.getOrUndefined(HashMap.get(rows, place))
  if (row !== undefined) rows = HashMap.set(rows, place, { ...row, begun: row.begun + 1 })
  const whole = Option.getOrUndefined(HashMap.get(gates, wholeOf(origin)))
  for (
    const at of whole?._tag === "Outage"
      ? [wholeOf(origin), limitOf(place)]
      : [wholeOf(origin), place, limitOf(place)]
  ) {
    const gate = Option.getOrUndefined(HashMap.get(gates, at))
    if (gate === undefined) continue
    if (gate._tag === "Release") {
      const nextAt = Math.max(gate.nextAt, now) + interval(gate, now)
      gates = isOver(gate, now) ? HashMap.remove(gates, at) : HashMap.set(gates, at, { ...gate, nextAt })
    } else if (gate._tag === "Suspicion") {
      gates = now >= gate.until
        ? HashMap.remove(gates, at)
        : HashMap.set(gates, at, { ...gate, nextAt: now + canaryMillis, prober: turn })
    } else {
      const probes = gate.probes.filter(({ since }) => now < since + probeMillis)
      gates = HashMap.set(gates, at, {
        ...gate,
        probes: [...probes, { lease, since: now }],
        nextAt: now + spacing(now - gate.since),
        prober: turn
      })
    }
  }
  return { health: simplest(health, { ...health, rows, gates }), nth: row === undefined ? 0 : row.begun + 1 }
}

const gatesOf = (health: Health, origin: string, model: string | undefined): ReadonlyArray<Gate> => {
  if (HashMap.size(health.gates) === 0) return none
  const place = placeOf(origin, model)
  const whole = Option.getOrUndefined(HashMap.get(health.gates, wholeOf(origin)))
  const found: Array<Gate> = []
  if (whole !== undefined) found.push(whole)
  // The probes of the whole origin are those of its models.
  for (const at of whole?._tag === "Outage" ? [limitOf(place)] : [place, limitOf(place)]) {
    const gate = HashMap.get(health.gates, at)
    if (gate._tag === "Some") found.push(gate.value)
  }
  return found
}
const none: ReadonlyArray<Gate> = []
const noRefusals: ReadonlyArray<Refusal> = []

const probesAt = ({ nextAt, probes }: Outage, probeMillis: number, now: number): number => {
  const running = probes.filter(({ since }) => now < since + probeMillis)
  const oldest = running[0]
  return running.length < mostProbes || oldest === undefined ? nextAt : Math.max(nextAt, oldest.since + probeMillis)
}

const spacing = (age: number): number => Math.min(longestSpacing, Math.max(shortestSpacing, age / 20))

/** At the pace of what comes at first, and at twice that after a second; but never slower than four in a second. */
const interval = ({ offered, since }: Release, now: number): number =>
  1 / Math.max(slowestRelease, offered * (now - since < rampMillis ? 1 : 2))

/** Nobody has wanted to go for a while: whoever comes now need not be held up. */
const isOver = (gate: Release, now: number): boolean => now >= gate.nextAt + Math.max(250, 2 * interval(gate, now))

const simplest = (before: Health, { gates, past, refusals, rows }: Omit<Health, "idle">): Health =>
  rows === before.rows && refusals === before.refusals && gates === before.gates && past === before.past ? before : {
    idle: HashMap.size(gates) === 0 && HashMap.size(rows) === 0 && HashMap.size(refusals) === 0,
    rows,
    refusals,
    gates,
    past
  }

const wholeOf = (origin: string): string => origin
const limitOf = (place: string): string => `${place}\nlimit`
const placeOf = (origin: string, model: string | undefined): string => `${origin}\n${model ?? ""}`

/** At most this share of many outcomes in this time succeeds in an outage. */
const toleratedShare = 0.1
const manyCalls = 10
const windowMillis = 10_000
/** So long after the last of some faults, they were not the beginning of an outage; after the last probe, nobody asks. */
const rememberedMillis = 600_000
/** Where there are not many outcomes, so many faults in a row are an outage. */
const fewFaults = 5
/** So many groups refused alike within this time are suspected to be one. */
const suspectGroups = 3
/** So many, and what is found out about the others is not found out twice. */
const doubtedGroups = 2
/**
 * Refusals within this time are compared. No call waits longer for what another one finds out about a key.
 *
 * @since 0.1.0
 * @category constants
 */
export const suspectMillis = 1_000
const canaryMillis = 1_000
const shortestSpacing = 500
const longestSpacing = 5_000
const mostProbes = 4
const rampMillis = 1_000
const slowestRelease = 4 / 1_000
