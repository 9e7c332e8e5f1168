/**
 * The limits of one party, which is a quota group or a key without one, for all models or for one: declared by its keys,
 * announced by the provider, learned from refusals.
 *
 * Pure steps on immutable data: `reserve` when an attempt begins, `answered` when its answer's headers came, `spent` when
 * its usage is known, `returned` when it was not sent; `gate` tells when the next request fits.
 *
 * @since 0.1.0
 */
import * as AnnouncedLimit from "./AnnouncedLimit.js"
import type * as ApiKey from "./ApiKey.js"
import * as DeclaredLimit from "./DeclaredLimit.js"
import type * as Fault from "./Fault.js"
import * as LearnedLimit from "./LearnedLimit.js"
import * as Totals from "./Totals.js"

/**
 * What a request will use, as far as that is known before: tokens of its input, and the most it may put out.
 *
 * @since 0.1.0
 * @category models
 */
export interface Estimate {
  readonly input?: number | undefined
  readonly maxOutput?: number | undefined
}

/**
 * The tokens that a request used.
 *
 * @since 0.1.0
 * @category models
 */
export interface Usage {
  readonly input: number
  readonly output: number
}

/**
 * Whether these are amounts that can be counted.
 *
 * @since 0.1.0
 * @category guards
 */
export const isUsage = ({ input, output }: Usage): boolean => isAmount(input) && isAmount(output)

const isAmount = (amount: number): boolean => amount >= 0 && amount <= mostTokens

/**
 * All that is known of the limits of a party.
 *
 * @since 0.1.0
 * @category models
 */
export interface RateLimit {
  readonly declared: ReadonlyArray<DeclaredLimit.DeclaredLimit>
  readonly announced: ReadonlyArray<AnnouncedLimit.AnnouncedLimit>
  /** Of requests. */
  readonly learned: LearnedLimit.LearnedLimit | undefined
  /** Of tokens. */
  readonly learnedTokens: LearnedLimit.LearnedLimit | undefined
  /** All that was ever leased. */
  readonly leased: Totals.Totals
  /** What 95 of 100 requests put out at most, as far as usage was seen. */
  readonly typical: Typical | undefined
  /** When it last changed. */
  readonly at: number
}

/**
 * What a request is reckoned to use, and the most that it may put out: providers count all of that until it is answered.
 *
 * @since 0.1.0
 * @category models
 */
export interface Cost extends Usage {
  readonly most: number
}

/**
 * The 95th percentile of what was seen, and how far it moves with each.
 *
 * @since 0.1.0
 * @category models
 */
export interface Typical {
  readonly output: number
  readonly step: number
}

/**
 * What was taken for one attempt: its own tokens, and all that had been leased with it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Reservation extends Cost {
  readonly leased: Totals.Totals
}

/**
 * Why the next request does not fit, and until when.
 *
 * @since 0.1.0
 * @category models
 */
export interface Closed extends DeclaredLimit.Full {
  readonly provenance: Fault.Provenance
}

/**
 * Nothing is known.
 *
 * @since 0.1.0
 * @category constructors
 */
export const empty: RateLimit = {
  declared: [],
  announced: [],
  learned: undefined,
  learnedTokens: undefined,
  leased: Totals.none,
  typical: undefined,
  at: -Infinity
}

/**
 * The limits with what is declared, each at its tightest; what is used of them stays. `undefined` when nothing is left
 * to keep.
 *
 * @since 0.1.0
 * @category steps
 */
export const declare = (
  self: RateLimit | undefined,
  declared: ReadonlyArray<ApiKey.Limits>
): RateLimit | undefined => {
  const limits = kinds.flatMap(({ name, unit, windowMillis }) => {
    const given = declared.flatMap((limits) => limits[name] ?? [])
    if (given.length === 0) return []
    const limit = Math.min(...given)
    const present = self?.declared.find((other) => other.unit === unit && other.windowMillis === windowMillis)
    return [
      present === undefined
        ? DeclaredLimit.make(unit, limit, windowMillis)
        : DeclaredLimit.resized(present, limit)
    ]
  })
  if (limits.length === 0 && (self === undefined || self.declared.length === 0)) return self
  return { ...self ?? empty, declared: limits }
}

/**
 * The limits with one of so many parts of what is declared; what is used of them stays.
 *
 * @since 0.1.0
 * @category steps
 */
export const divided = (self: RateLimit, parts: number): RateLimit =>
  self.declared.length === 0
    ? self
    : { ...self, declared: self.declared.map((limit) => DeclaredLimit.divided(limit, parts)) }

const minute = 60_000
const day = 86_400_000
const kinds = [
  { name: "requestsPerMinute", unit: "requests", windowMillis: minute },
  { name: "requestsPerDay", unit: "requests", windowMillis: day },
  { name: "tokensPerMinute", unit: "tokens", windowMillis: minute },
  { name: "tokensPerDay", unit: "tokens", windowMillis: day }
] as const

/**
 * What is to be reserved for a request: its input, and what it may put out, or what such requests usually put out if
 * that is less.
 *
 * @since 0.1.0
 * @category getters
 */
export const costOf = (self: RateLimit, { input, maxOutput }: Estimate): Cost => {
  // Of what nobody tells, nothing is counted.
  const most = maxOutput ?? self.typical?.output ?? 0
  return {
    input: usable(input),
    output: usable(Math.min(most, self.typical?.output ?? most)),
    most: usable(most)
  }
}

/** No amount, whatever a request says, leaves sums that are no numbers. */
const usable = (amount: number | undefined): number =>
  amount !== undefined && amount > 0 ? Math.min(amount, mostTokens) : 0

/** Far more than any request has, and sums of it are still exact. */
const mostTokens = 1e12

/**
 * Whether what a request costs decides when it fits: some limit counts tokens.
 *
 * @since 0.1.0
 * @category getters
 */
export const countsTokens = (self: RateLimit): boolean =>
  self.learnedTokens !== undefined || self.declared.some(({ unit }) => unit !== "requests") ||
  self.announced.some(({ unit }) => unit !== "requests")

/**
 * Why a request does not fit now; `undefined` when it does. Without an estimate, only limits of requests count.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (self: RateLimit, estimate: Estimate | undefined, now: number): Closed | undefined => {
  const cost = estimate === undefined ? undefined : costOf(self, estimate)
  let closed: Closed | undefined
  for (const limit of self.declared) {
    if (limit.unit === "requests") closed = later(closed, DeclaredLimit.gate(limit, 1, now), "measured")
    else if (cost !== undefined) {
      closed = later(closed, DeclaredLimit.gate(limit, amount("tokens", cost), now), "measured")
    }
  }
  for (const limit of self.announced) {
    const needs = limit.unit === "requests" ? 1 : cost === undefined ? undefined : mostOf(limit.unit, cost)
    if (needs === undefined) continue
    closed = later(closed, AnnouncedLimit.gate(limit, needs, self.leased, now), "told")
  }
  if (self.learned !== undefined) {
    const { told } = self.learned
    closed = later(closed, LearnedLimit.gate(self.learned, 1, now), told ? "told" : "measured")
  }
  if (self.learnedTokens !== undefined && cost !== undefined) {
    const { told } = self.learnedTokens
    const full = LearnedLimit.gate(self.learnedTokens, mostOf("tokens", cost), now)
    closed = later(closed, full, told ? "told" : "measured")
  }
  return closed
}

/**
 * The earliest instants at which the next requests can begin, up to `until` and `most` of them, by the limits of requests
 * that are declared; `undefined` where there are none. What is announced or learned changes with each answer.
 *
 * @since 0.1.0
 * @category gates
 */
export const openings = (
  self: RateLimit,
  now: number,
  until: number,
  most: number
): ReadonlyArray<number> | undefined => {
  let times: ReadonlyArray<number> | undefined
  for (const limit of self.declared) {
    if (limit.unit !== "requests") continue
    const own = DeclaredLimit.openings(limit, now, until, most)
    times = times?.flatMap((at, i) => own[i] === undefined ? [] : [Math.max(at, own[i])]) ?? own
  }
  return times
}

/**
 * Whether it is known when what is left will be lost.
 *
 * @since 0.1.0
 * @category getters
 */
export const isDated = (self: RateLimit): boolean =>
  self.announced.length > 0 || self.learned?.measured !== undefined || self.learnedTokens?.measured !== undefined

/**
 * When some of what is left now will be lost if nobody uses it: a window ends, or a bucket is full. `Infinity` where nobody
 * knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const lostAt = (self: RateLimit, now: number): number => {
  let at = Infinity
  for (const learned of learnedOf(self)) at = Math.min(at, LearnedLimit.lostAt(learned, now))
  for (const limit of self.announced) at = Math.min(at, AnnouncedLimit.lostAt(limit, self.leased, now))
  return at
}

/**
 * How many requests per millisecond get through for good, as they are usually, or like the one that is estimated;
 * `Infinity` where nobody knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const pace = (self: RateLimit, estimate: Estimate = {}): number => {
  let most = Infinity
  for (const learned of learnedOf(self)) most = Math.min(most, LearnedLimit.pace(learned))
  for (const { limit, unit, windowMillis } of self.declared) {
    most = Math.min(most, limit / windowMillis / usual(unit, self.leased, estimate))
  }
  for (const limit of self.announced) {
    most = Math.min(most, AnnouncedLimit.pace(limit) / usual(limit.unit, self.leased, estimate))
  }
  return most
}

/**
 * Whether there is a window among what was announced.
 *
 * @since 0.1.0
 * @category guards
 */
export const hasWindow = (self: RateLimit): boolean => self.announced.some(AnnouncedLimit.isWindow)

/**
 * For how many requests, as they are usually, what was announced leaves room now; `Infinity` where nothing was.
 *
 * @since 0.1.0
 * @category getters
 */
export const room = (self: RateLimit, now: number, estimate: Estimate = {}): number => {
  let least = Infinity
  for (const limit of self.announced) {
    const { unit } = limit
    least = Math.min(
      least,
      AnnouncedLimit.remaining(limit, self.leased, now) / usual(unit, self.leased, estimate)
    )
  }
  return least
}

const learnedOf = ({ learned, learnedTokens }: RateLimit): ReadonlyArray<LearnedLimit.LearnedLimit> =>
  learned === undefined
    ? learnedTokens === undefined ? nothingLearned : [learnedTokens]
    : learnedTokens === undefined
    ? [learned]
    : [learned, learnedTokens]

const nothingLearned: ReadonlyArray<LearnedLimit.LearnedLimit> = []

/** What a request took on average, or takes that is estimated, where none was counted yet. */
const usual = (unit: DeclaredLimit.Unit, totals: Totals.Totals, { input, maxOutput }: Estimate): number =>
  Math.max(
    1,
    totals.requests === 0
      ? amount(unit, { input: usable(input), output: usable(maxOutput) })
      : Totals.leased(unit, totals) / totals.requests
  )

const later = (
  closed: Closed | undefined,
  full: DeclaredLimit.Full | undefined,
  provenance: Fault.Provenance
): Closed | undefined =>
  full === undefined ? closed : closed === undefined ? { ...full, provenance } : {
    until: Math.max(closed.until, full.until),
    earliest: Math.max(closed.earliest, full.earliest),
    provenance: full.until > closed.until ? provenance : closed.provenance
  }

const amount = (unit: DeclaredLimit.Unit, { input, output }: Usage): number =>
  unit === "requests" ? 1 : unit === "input" ? input : unit === "output" ? output : input + output

/** The most that a request may take. */
const mostOf = (unit: DeclaredLimit.Unit, { input, most }: Cost): number => amount(unit, { input, output: most })

/**
 * Takes what an attempt needs that begins now.
 *
 * @since 0.1.0
 * @category steps
 */
export const reserve = (
  self: RateLimit,
  estimate: Estimate,
  now: number
): readonly [RateLimit, Reservation] => {
  const cost = costOf(self, estimate)
  const before = self.leased
  const leased: Totals.Totals = {
    requests: before.requests + 1,
    input: before.input + cost.input,
    output: before.output + cost.most,
    unused: before.unused
  }
  return [{
    declared: self.declared.map((limit) => DeclaredLimit.hold(limit, amount(limit.unit, cost))),
    announced: self.announced.length === 0
      ? self.announced
      : self.announced.map((limit) => AnnouncedLimit.roll(limit, before, now)),
    learned: self.learned === undefined ? undefined : LearnedLimit.leased(self.learned, 1, now),
    learnedTokens: self.learnedTokens === undefined
      ? undefined
      : LearnedLimit.leased(self.learnedTokens, mostOf("tokens", cost), now),
    leased,
    typical: self.typical,
    at: now
  }, { input: cost.input, output: cost.output, most: cost.most, leased }]
}

/**
 * The headers of an attempt's answer came: from now on its request counts for one window. Refused ones count as well:
 * most providers count them.
 *
 * @since 0.1.0
 * @category steps
 */
export const answered = (self: RateLimit, now: number): RateLimit =>
  self.declared.length === 0 ? self : {
    ...self,
    declared: self.declared.map((limit) => limit.unit === "requests" ? DeclaredLimit.count(limit, 1, 1, now) : limit),
    at: now
  }

/**
 * An attempt is over: what it used counts for one window from now, as it was estimated if nobody knows better.
 *
 * @since 0.1.0
 * @category steps
 */
export const spent = (
  self: RateLimit,
  reservation: Reservation,
  usage: Usage | undefined,
  now: number
): RateLimit => {
  if (usage === undefined && self.declared.length === 0) return self
  const used = usage ?? reservation
  return {
    ...self,
    leased: unusedOf(self, reservation, usage),
    learnedTokens: usage === undefined ? self.learnedTokens : unlearned(
      self,
      { ...takenOf("tokens", reservation), cost: mostOf("tokens", reservation) - amount("tokens", usage) },
      true,
      now
    ),
    declared: self.declared.map((limit) =>
      limit.unit === "requests"
        ? limit
        : DeclaredLimit.count(limit, amount(limit.unit, reservation), amount(limit.unit, used), now)
    ),
    typical: usage === undefined ? self.typical : seen(self.typical, usage.output),
    at: now
  }
}

/** What an attempt took and did not use is there again. */
const unlearned = (
  { learnedTokens }: RateLimit,
  unused: LearnedLimit.Taken,
  accepted: boolean,
  now: number
): LearnedLimit.LearnedLimit | undefined =>
  learnedTokens === undefined ? undefined : LearnedLimit.returned(learnedTokens, unused, accepted, now)

/**
 * Whether nothing but declared limits is known.
 *
 * @since 0.1.0
 * @category getters
 */
export const isDeclaredOnly = (self: RateLimit): boolean =>
  self.announced.length === 0 && self.learned === undefined && self.learnedTokens === undefined

/**
 * `answered`, `accepted` and `spent` in one step, for an attempt whose answer came whole, where only limits are known that
 * were declared.
 *
 * @since 0.1.0
 * @category steps
 */
export const settled = (
  self: RateLimit,
  reservation: Reservation,
  usage: Usage | undefined,
  now: number
): RateLimit => ({
  declared: self.declared.map((limit) =>
    limit.unit === "requests"
      ? DeclaredLimit.count(limit, 1, 1, now)
      : DeclaredLimit.count(limit, amount(limit.unit, reservation), amount(limit.unit, usage ?? reservation), now)
  ),
  announced: self.announced,
  learned: self.learned,
  learnedTokens: self.learnedTokens,
  leased: self.leased,
  typical: usage === undefined ? self.typical : seen(self.typical, usage.output),
  at: now
})

/** What was leased, and not used of it as far as a provider that announces how much is left may give it back. */
const unusedOf = (
  { announced, leased }: RateLimit,
  reservation: Reservation,
  usage: Usage | undefined
): Totals.Totals => {
  if (usage === undefined) return leased
  const unused = reservation.most - usage.output
  // What it used beyond that is taken now, whenever it began.
  const began = unused < 0 ? leased : reservation.leased
  return announced.some((limit) => AnnouncedLimit.mayGive(limit, began))
    ? { ...leased, unused: leased.unused + unused }
    : leased
}

/** One more output: the percentile goes up by 19 steps or down by one, and so comes to rest where 1 of 20 is above it. */
const seen = (typical: Typical | undefined, output: number): Typical => {
  if (typical === undefined) return { output, step: output / 100 }
  const above = output > typical.output
  const moved = above ? Math.min(output, typical.output + 19 * typical.step) : typical.output - typical.step
  return {
    output: Math.max(0, moved),
    // The step is in keeping with how far they lie apart.
    step: Math.max(1, 0.95 * typical.step + 0.05 * Math.abs(output - typical.output) / 100)
  }
}

/**
 * An attempt was not sent: all it took is given back.
 *
 * @since 0.1.0
 * @category steps
 */
export const returned = (self: RateLimit, reservation: Reservation, now: number): RateLimit => ({
  ...self,
  declared: self.declared.map((limit) => DeclaredLimit.release(limit, amount(limit.unit, reservation))),
  announced: self.announced.map((limit) =>
    AnnouncedLimit.returned(limit, mostOf(limit.unit, reservation), reservation.leased)
  ),
  learned: self.learned === undefined
    ? undefined
    : LearnedLimit.returned(self.learned, takenOf("requests", reservation), false, now),
  learnedTokens: unlearned(self, takenOf("tokens", reservation), false, now)
})

/** What an attempt took of what a limit counts; one that began before anything was counted took nothing. */
const takenOf = (unit: "requests" | "tokens", reservation: Reservation = unreserved): LearnedLimit.Taken => ({
  cost: mostOf(unit, reservation),
  leased: Totals.leased(unit, reservation.leased)
})

const unreserved: Reservation = { input: 0, output: 0, most: 0, leased: Totals.none }

/**
 * Takes in what an answer announces. Without `leased` its attempt began before anything was known: then others may have,
 * of the `inFlight` that run, it among them, and each of them that is answered is one less that nobody has counted.
 *
 * @since 0.1.0
 * @category steps
 */
export const announced = (
  self: RateLimit,
  leased: Totals.Totals | undefined,
  said: ReadonlyArray<AnnouncedLimit.Said>,
  now: number,
  inFlight = 1,
  sentAt = now
): RateLimit => {
  let limits = self.announced
  for (const each of said.slice(0, mostAnnounced)) {
    const unit = AnnouncedLimit.unitOf(each.name)
    if (unit === undefined) continue
    const before = limits.find(({ name }) => name === each.name)
    const isEarly = leased === undefined && unit === "requests"
    const after = isEarly && before !== undefined
      ? AnnouncedLimit.learnEarly(before, each, now, sentAt)
      : AnnouncedLimit.learn(
        before,
        each,
        isEarly
          ? { ...Totals.none, requests: self.leased.requests - Math.max(0, inFlight - 1) }
          : leased ?? Totals.none,
        now,
        sentAt
      )
    if (after === undefined || after === before) continue
    limits = before === undefined
      ? [...limits, after].slice(-mostAnnounced)
      : limits.map((limit) => limit === before ? after : limit)
  }
  // What is announced need not be learned.
  return limits === self.announced ? self : {
    ...self,
    announced: limits,
    learned: announces(limits, "requests") ? undefined : self.learned,
    learnedTokens: announces(limits, "tokens") ? undefined : self.learnedTokens,
    at: now
  }
}

/** Whether there is a limit of requests, or of tokens of whatever kind. */
const announces = (limits: ReadonlyArray<AnnouncedLimit.AnnouncedLimit>, unit: "requests" | "tokens"): boolean =>
  limits.some((limit) => (limit.unit === "requests") === (unit === "requests"))

/**
 * Of more announced limits than this, the oldest are forgotten.
 *
 * @since 0.1.0
 * @category constants
 */
export const mostAnnounced = 8

/**
 * An attempt was refused for too many requests or tokens, and told to wait, or not. `usual` is about how long it took from
 * one accepted request to the next, if there were many; 0 if not.
 *
 * @since 0.1.0
 * @category steps
 */
export const refused = (
  self: RateLimit,
  unit: "requests" | "tokens",
  reservation: Reservation | undefined,
  waitMillis: number | undefined,
  now: number,
  usual = 0
): RateLimit => {
  const taken = takenOf(unit, reservation)
  if (!announces(self.announced, unit)) {
    const kind = unit === "requests" ? "learned" : "learnedTokens"
    return {
      ...self,
      [kind]: LearnedLimit.refused(self[kind], taken, Totals.leased(unit, self.leased), waitMillis, usual, now),
      at: now
    }
  }
  return unit === "tokens" || waitMillis === undefined ? self : {
    ...self,
    announced: self.announced.map((limit) =>
      limit.unit !== "requests"
        ? limit
        : AnnouncedLimit.gate(limit, 1, (reservation ?? unreserved).leased, now) === undefined
        ? AnnouncedLimit.exhaust(limit, self.leased, now + waitMillis, now)
        : AnnouncedLimit.refused(limit, waitMillis, now)
    ),
    at: now
  }
}

/**
 * An attempt was answered, and not refused for a limit.
 *
 * @since 0.1.0
 * @category steps
 */
export const accepted = (self: RateLimit, reservation: Reservation | undefined, now: number): RateLimit =>
  self.learned === undefined && self.learnedTokens === undefined ? self : {
    ...self,
    learned: self.learned === undefined
      ? undefined
      : LearnedLimit.accepted(self.learned, takenOf("requests", reservation), now),
    learnedTokens: self.learnedTokens === undefined
      ? undefined
      : LearnedLimit.accepted(self.learnedTokens, takenOf("tokens", reservation), now),
    at: now
  }

/**
 * A limit as people see it: what is left of it now. What was learned has no number of its own.
 *
 * @since 0.1.0
 * @category models
 */
export interface Left {
  readonly source: "declared" | "announced" | "learned"
  readonly unit: DeclaredLimit.Unit
  readonly limit?: number
  readonly windowMillis?: number
  readonly remaining?: number
}

/**
 * What is left of each limit.
 *
 * @since 0.1.0
 * @category getters
 */
export const left = (self: RateLimit, now: number): ReadonlyArray<Left> => [
  ...self.declared.map((limit): Left => ({
    source: "declared",
    unit: limit.unit,
    limit: limit.limit,
    windowMillis: limit.windowMillis,
    remaining: DeclaredLimit.remaining(limit, now)
  })),
  ...self.announced.map((limit): Left => ({
    source: "announced",
    unit: limit.unit,
    ...(limit.limit === undefined ? {} : { limit: limit.limit }),
    remaining: AnnouncedLimit.remaining(limit, self.leased, now)
  })),
  ...leftOf("requests", self.learned),
  ...leftOf("tokens", self.learnedTokens)
]

const leftOf = (
  unit: "requests" | "tokens",
  learned: LearnedLimit.LearnedLimit | undefined
): ReadonlyArray<Left> =>
  learned?.measured === undefined
    ? []
    : [{ source: "learned", unit, limit: learned.measured.count, windowMillis: learned.measured.millis }]

/**
 * How much is left of the tightest limit, as a share of it, from 0 to 1.
 *
 * @since 0.1.0
 * @category getters
 */
export const share = (self: RateLimit, now: number): number => {
  let least = 1
  for (const limit of self.declared) {
    if (limit.limit > 0) least = Math.min(least, DeclaredLimit.remaining(limit, now) / limit.limit)
  }
  for (const limit of self.announced) least = Math.min(least, AnnouncedLimit.share(limit, self.leased, now))
  for (const learned of learnedOf(self)) least = Math.min(least, LearnedLimit.share(learned, now))
  return least
}

/**
 * The limits without what was announced or learned: what is used of those that are declared is used.
 *
 * @since 0.1.0
 * @category steps
 */
export const reset = (self: RateLimit): RateLimit => ({
  ...self,
  announced: [],
  learned: undefined,
  learnedTokens: undefined
})

/**
 * Whether nothing would be lost by forgetting it: nothing is declared, and it has not been asked about for ten minutes.
 *
 * @since 0.1.0
 * @category getters
 */
export const isIdle = (self: RateLimit, now: number): boolean =>
  self.declared.length === 0 && now >= self.at + idleMillis

const idleMillis = 600_000
