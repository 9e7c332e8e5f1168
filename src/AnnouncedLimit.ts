/**
 * A limit that a provider announces with its answers: how much there is, how much is left, when it is there again.
 *
 * Each answer tells what the provider knew when it counted that request; what was sent later is subtracted, and what
 * requests did not use is added where answers show that the provider gives it back. Providers mean one of two things by
 * their reset: the end of a window, when all is there again at once, or the moment when a bucket that fills all the time
 * will be full. The first stands still while requests go through, the second moves away; until this is known, a limit that
 * is used up is taken for a window.
 *
 * @since 0.1.0
 */
import type { Full, Unit } from "./DeclaredLimit.js"
import * as Totals from "./Totals.js"

/**
 * What an answer says about one limit; see `WaitHint.readLimits`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Said {
  readonly name: string
  readonly limit: number | undefined
  readonly remaining: number | undefined
  readonly resetMillis: number | undefined
}

/**
 * What is known of an announced limit.
 *
 * @since 0.1.0
 * @category models
 */
export interface AnnouncedLimit {
  readonly name: string
  readonly unit: Unit
  readonly limit: number | undefined
  readonly remaining: number
  /** The most that was ever there, before the request that told of it: a bucket may hold less than its limit. */
  readonly most: number | undefined
  /** When it was said, and what had been leased in all, and not used of it, when the request that brought it was. */
  readonly at: number
  readonly total: number
  readonly unused: number
  /** How much of what was leased since was never sent; below 0 what a process before this one took. */
  readonly unsent: number
  /** What had been leased in all when the window began. */
  readonly began: number
  /** Above 0 what speaks for a provider that gives back what a request did not use, below for one that keeps it. */
  readonly gives: number
  readonly resetAt: number
  /**
   * When all will be there again, as several answers say together: a reset counts from when the provider looked, and
   * answers come later than that, some much later.
   */
  readonly fullAt: number
  /** When the window may be over: no answer counts its reset from before its request was sent. */
  readonly endsAt: number
  /** How long the newest answer that told took. */
  readonly took: number
  /** Above 0 what speaks for resets that count from when a request came, below from when it was answered. */
  readonly prompt: number
  /** Whether an answer told so; or else it is reckoned. */
  readonly told: boolean
  /** The longest reset seen: about the length of a window. */
  readonly longest: number
  /** How much comes back per millisecond, if it is a bucket. */
  readonly fill: number | undefined
  /** Above 0 what speaks for a bucket, below for a window. */
  readonly votes: number
}

/**
 * What a limit of that name counts; `undefined` when that is not known.
 *
 * @since 0.1.0
 * @category getters
 */
export const unitOf = (name: string): Unit | undefined =>
  /token/.test(name)
    ? /input|prompt/.test(name) ? "input" : /output|completion/.test(name) ? "output" : "tokens"
    : name === "" || /req/.test(name)
    ? "requests"
    : undefined

/**
 * Takes in what an answer says, whose request was sent at `sentAt`. `totals` is what had been leased in all when the
 * attempt was that got it. `undefined` when it says nothing of use.
 *
 * @since 0.1.0
 * @category steps
 */
export const learn = (
  before: AnnouncedLimit | undefined,
  said: Said,
  totals: Totals.Totals,
  now: number,
  sentAt = now
): AnnouncedLimit | undefined => {
  const unit = unitOf(said.name)
  const limit = usable(said.limit)
  const remaining = usable(said.remaining)
  const resetMillis = usable(said.resetMillis)
  // Without a reset nobody would know when it opens again.
  if (unit === undefined || remaining === undefined || resetMillis === undefined) return before
  const most = mostOf(before?.most, remaining, unit)
  const total = Totals.leased(unit, totals)
  // An answer to an earlier request knows less, but for how much there was then.
  if (before !== undefined && total < before.total) return most === before.most ? before : { ...before, most }
  const stated = limit === undefined || limit <= 0 ? undefined : limit
  const all = allOf({ limit: stated, most })
  const resetAt = now + resetMillis
  const next: AnnouncedLimit = {
    name: said.name,
    unit,
    limit: stated,
    remaining,
    most,
    at: now,
    total,
    unused: Totals.unused(unit, totals),
    unsent: 0,
    began: before?.began ?? -Infinity,
    gives: before?.gives ?? 0,
    resetAt,
    fullAt: resetAt,
    endsAt: sentAt + resetMillis,
    took: now - sentAt,
    prompt: before?.prompt ?? 0,
    told: true,
    longest: Math.max(before?.longest ?? 0, resetMillis),
    // What is left is rounded down: less was used than it seems.
    fill: all === undefined || all - remaining < 2 || resetMillis === 0
      ? before?.fill
      : fillOf(all, remaining, resetMillis, stated),
    votes: before?.votes ?? 0
  }
  if (before === undefined) return { ...next, fullAt: earliest(next) }
  if (now >= before.resetAt) return { ...next, began: total, fullAt: earliest(next) }
  const learned = {
    ...next,
    prompt: bounded(before.prompt + promptness(before, next)),
    gives: bounded(before.gives + giving(before, next))
  }
  const fullAt = together(before, learned)
  const known = { ...learned, fullAt, endsAt: Math.min(fullAt, Math.max(before.endsAt, next.endsAt)) }
  if (remaining > before.remaining) return known
  return { ...known, votes: bounded(known.votes + vote(before, next)) }
}

/**
 * Takes in what an answer says whose attempt began before anything was known of the limit. Of several such nobody knows
 * which one the provider counted last: the least that any of them leaves is what is left, and there is one less that is
 * not counted yet.
 *
 * @since 0.1.0
 * @category steps
 */
export const learnEarly = (
  before: AnnouncedLimit,
  said: Said,
  now: number,
  sentAt = now
): AnnouncedLimit | undefined => {
  const total = Math.min(0, before.total + 1)
  const isOld = now < before.resetAt && (usable(said.remaining) ?? 0) > before.remaining
  if (!isOld || total <= before.total) return learn(before, said, { ...Totals.none, requests: total }, now, sentAt)
  // How much there was when it was the first to be counted is still of use.
  const most = mostOf(before.most, usable(said.remaining) ?? 0, before.unit)
  return { ...before, total, most }
}

/** What is no amount says nothing: with it nobody would know when the limit opens, and it never would. */
const usable = (amount: number | undefined): number | undefined =>
  amount !== undefined && amount >= 0 && amount <= Number.MAX_SAFE_INTEGER ? amount : undefined

/** How fast a bucket fills. What is left is rounded down: that much less was used, unless the limit is the very rate. */
const fillOf = (all: number, remaining: number, resetMillis: number, limit: number | undefined): number => {
  const least = (all - remaining - 1) / resetMillis
  const perMinute = (limit ?? 0) / usualWindow
  return perMinute >= least && perMinute <= (all - remaining) / resetMillis ? perMinute : least
}

/**
 * When all will be there again, after one more answer. A window ends no later than any answer says that counts from when
 * it came, however roughly; a bucket that others use too is full later: then the later word counts, little by little.
 */
const together = (before: AnnouncedLimit, next: AnnouncedLimit): number => {
  const least = earliest(next)
  if (!before.told || isPrompt(before) !== isPrompt(next)) return least
  const isBucket = isExactBucket(next)
  if (!isBucket && (next.votes > -bucketVotes || next.remaining > before.remaining)) return least
  const expected = before.fullAt + comeSince(before, next)
  // It was full meanwhile.
  if (expected <= next.at) return least
  // No request comes before it was sent: then the latest word counts.
  if (isPrompt(next)) return Math.max(least, expected - (expected - least) / memory)
  // No answer is there before it was given; one that tells of the next window is another matter.
  return isBucket
    ? Math.min(least, expected + (least - expected) / memory)
    : least - expected > next.longest / 2
    ? least
    : Math.min(least, expected)
}

/** How much later a bucket is full for what was taken between two answers. */
const comeSince = (before: AnnouncedLimit, next: AnnouncedLimit): number =>
  isExactBucket(next) ? takenBetween(before, next) / (next.fill ?? Infinity) : 0

/** The reset that an answer tells, from the earliest moment from which it may count. */
const earliest = (self: AnnouncedLimit): number =>
  isPrompt(self) ? self.resetAt - Math.max(0, self.took - guardMillis) : self.resetAt

const isPrompt = ({ prompt }: AnnouncedLimit): boolean => prompt >= promptVotes

/**
 * From which moment resets count makes no difference between answers that take equally long. Otherwise one explains more;
 * but whole seconds are too rough for that.
 */
const promptness = (before: AnnouncedLimit, next: AnnouncedLimit): number => {
  if (!before.told || isWhole(next.resetAt - next.at)) return 0
  const asAnswered = next.resetAt - before.resetAt - comeSince(before, next)
  const asSent = Math.abs(asAnswered - (next.took - before.took))
  return better(asSent, Math.abs(asAnswered))
}

/**
 * Whether more is left than there would be if the provider kept all that requests might have used. What came back by
 * itself is known only where it is known how.
 */
const giving = (before: AnnouncedLimit, next: AnnouncedLimit): number => {
  const unused = next.unused - before.unused
  if (!before.told || Math.abs(next.votes) < bucketVotes || Math.abs(unused) < 1) return 0
  const perMilli = rate(next)
  // A window that began meanwhile gives all back.
  if (perMilli === undefined && next.resetAt - before.resetAt > next.longest / 2) return 0
  const came = (perMilli ?? 0) * ((next.at - next.took) - (before.at - before.took))
  const more = next.remaining - (before.remaining - sentBetween(before, next)) - came
  return better(Math.abs(more - unused), Math.abs(more))
}

/** What was taken, for good as far as that is known, between the requests that brought two answers. */
const takenBetween = (before: AnnouncedLimit, next: Pick<AnnouncedLimit, "total" | "unused" | "gives">): number =>
  sentBetween(before, next) - (next.gives >= givesVotes ? next.unused - before.unused : 0)

const sentBetween = (before: AnnouncedLimit, next: Pick<AnnouncedLimit, "total">): number =>
  next.total - before.total - before.unsent

/**
 * Whether a provider may give back here what a request did not use, which had been leased as the last of so much. Where
 * there are windows, what it took of one that is over is nothing of this one.
 *
 * @since 0.1.0
 * @category guards
 */
export const mayGive = (self: AnnouncedLimit, leased: Totals.Totals): boolean =>
  Totals.countsOutput(self.unit) && (rate(self) !== undefined || Totals.leased(self.unit, leased) > self.began)

/** Whether it is a number of whole seconds, but for what floating point makes of it. */
const isWhole = (millis: number): boolean => Math.abs(millis - Math.round(millis / 1_000) * 1_000) < 1e-3

/** Which of two explanations leaves clearly less unexplained: the first, above 0, or the other. */
const better = (first: number, other: number): number => first < other / 2 ? 1 : other < first / 2 ? -1 : 0

const bounded = (votes: number): number => Math.max(-8, Math.min(8, votes))

/** Where nothing is left, nobody sees how much there may be. */
const mostOf = (before: number | undefined, remaining: number, unit: Unit): number | undefined =>
  remaining <= 0 ? before : Math.max(before ?? 0, unit === "requests" ? remaining + 1 : remaining)

/**
 * How much there is when all is there. A limit is often a rate, of which a much smaller bucket holds the burst: as long
 * as only a part was ever seen, no more than that is counted on.
 */
const allOf = ({ limit, most }: Pick<AnnouncedLimit, "limit" | "most">): number | undefined =>
  limit === undefined || most === undefined || most >= nearly * limit ? limit : most

/** Which of the two meanings explains better what two answers say. */
const vote = (a: AnnouncedLimit, b: AnnouncedLimit): number => {
  const all = allOf(b) ?? 0
  const used = all - a.remaining
  const usedNow = all - b.remaining
  if (used <= 0 || usedNow <= used) return 0
  const asWindow = Math.abs(b.resetAt - a.resetAt)
  const asBucket = Math.abs((b.resetAt - b.at) - (a.resetAt - a.at) / used * usedNow)
  return better(asBucket, asWindow)
}

/**
 * How much was taken since it was said, when `totals` has been leased in all. What came back while the request was under
 * way is counted in what was said: nobody knows how much that was, but about how much came in so short a time.
 *
 * @since 0.1.0
 * @category getters
 */
export const taken = (self: AnnouncedLimit, totals: Totals.Totals, now: number): number => {
  const unused = Totals.unused(self.unit, totals)
  const underWay = Math.min(1, underWayMillis / Math.max(1, now - self.at + self.took))
  return takenBetween(self, {
    total: Totals.leased(self.unit, totals),
    unused: unused - Math.max(0, unused - self.unused) * underWay,
    gives: self.gives
  })
}

/**
 * Whether an amount fits now, when `totals` has been leased in all; what is more than the limit fits when all is there.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (
  self: AnnouncedLimit,
  amount: number,
  totals: Totals.Totals,
  now: number
): Full | undefined => {
  const perMilli = rate(self)
  // Before a window ends, what is left may be little of what there is.
  const all = perMilli !== undefined || now >= fullAt(self, totals, now) ? allOf(self) : self.limit
  // Whole amounts fit: what lacks a hair in floating point is there.
  const missing = Math.min(amount, all ?? Infinity) - available(self, totals, now)
  if (missing <= 1e-6) return undefined
  const until = perMilli === undefined
    ? self.fullAt
    : Math.ceil(Math.max(now + 1, Math.min(now + missing / perMilli, fullAt(self, totals, now))))
  // The next answer may tell more.
  return { until, earliest: Totals.leased(self.unit, totals) > self.total ? -Infinity : until }
}

/**
 * How much is left now, when `totals` has been leased in all.
 *
 * @since 0.1.0
 * @category getters
 */
export const remaining = (self: AnnouncedLimit, totals: Totals.Totals, now: number): number =>
  Math.max(0, Math.floor(Math.min(available(self, totals, now), Number.MAX_SAFE_INTEGER)))

/**
 * How much is left now, as a share of the limit; 1 where it is not known, and when all is there again.
 *
 * @since 0.1.0
 * @category getters
 */
export const share = (self: AnnouncedLimit, totals: Totals.Totals, now: number): number =>
  self.limit === undefined || now >= fullAt(self, totals, now)
    ? 1
    : Math.max(0, Math.min(1, available(self, totals, now) / self.limit))

const available = (self: AnnouncedLimit, totals: Totals.Totals, now: number): number => {
  const all = allOf(self)
  const perMilli = rate(self)
  const gone = taken(self, totals, now)
  const full = perMilli === undefined ? self.fullAt : self.fullAt + gone / perMilli
  if (now >= full) return all ?? Infinity
  // What requests from before the window did not use does not come on top of all that there is.
  if (perMilli === undefined) return Math.min(self.limit ?? Infinity, self.remaining - gone)
  return all !== undefined && isExactBucket(self)
    ? Math.min(
      all - (full - now) * perMilli,
      // No more than was left, which was rounded down, and came since.
      self.remaining + 1 + (now - self.at + self.took) * perMilli - gone
    )
    : Math.min(all ?? Infinity, self.remaining + (now - self.at) * perMilli) - gone
}

/** Whether it is a bucket of which is known to a hair how fast it fills: at its limit, per minute. */
const isExactBucket = (self: AnnouncedLimit): boolean => {
  const perMilli = rate(self)
  return perMilli !== undefined && perMilli === (self.limit ?? 0) / usualWindow
}

/**
 * Whether it is a window, as far as that can be seen: no bucket that fills in a minute takes as long as that for what
 * lacks.
 *
 * @since 0.1.0
 * @category guards
 */
export const isWindow = ({ at, limit, remaining, resetAt, votes }: AnnouncedLimit): boolean =>
  votes < 0 ||
  (votes === 0 && limit !== undefined && resetAt - at <= usualWindow &&
    remaining + (resetAt - at) * limit / usualWindow > limit + 1)

/**
 * When some of what is left now will be lost if nobody uses it: at the end of the window, or when the bucket is full.
 *
 * @since 0.1.0
 * @category getters
 */
export const lostAt = (self: AnnouncedLimit, totals: Totals.Totals, now: number): number => {
  if (rate(self) !== undefined) return fullAt(self, totals, now)
  // The window after the one that ended ends one window later.
  return now < self.endsAt ? self.endsAt : nextEnd(self, now)
}

/**
 * How much comes back per millisecond; `Infinity` where nobody knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const pace = (self: AnnouncedLimit): number =>
  rate(self) ?? (self.limit === undefined ? Infinity : self.limit / Math.max(self.longest, usualWindow))

/**
 * When all is there again, whatever was leased before: what is leased after it counts anew, see `roll`.
 *
 * @since 0.1.0
 * @category getters
 */
export const fullAt = (self: AnnouncedLimit, totals: Totals.Totals, now: number): number => {
  const perMilli = rate(self)
  return perMilli === undefined ? self.fullAt : self.fullAt + taken(self, totals, now) / perMilli
}

/** How fast a bucket fills, per millisecond; `undefined` unless it is known to be one. */
const rate = ({ fill, votes }: AnnouncedLimit): number | undefined => votes < bucketVotes ? undefined : fill

/**
 * The window that has ended is over: what comes counts anew, until an answer says more.
 *
 * @since 0.1.0
 * @category steps
 */
export const roll = (self: AnnouncedLimit, totals: Totals.Totals, now: number): AnnouncedLimit => {
  if (now < fullAt(self, totals, now)) return self
  const full = { ...self, ...saidNow(self, totals, now), remaining: allOf(self) ?? Infinity }
  return rate(self) === undefined
    ? { ...full, ...untilAll(now + Math.max(1, self.longest)), endsAt: nextEnd(self, now), began: full.total }
    // What is taken comes back from now on.
    : { ...full, ...untilAll(now) }
}

/**
 * An attempt was not sent: what it took is there again, unless what is left was told to one that was leased later.
 *
 * @since 0.1.0
 * @category steps
 */
export const returned = (self: AnnouncedLimit, amount: number, leased: Totals.Totals): AnnouncedLimit =>
  Totals.leased(self.unit, leased) > self.total ? { ...self, unsent: self.unsent + amount } : self

/**
 * Refused, though something seemed to be left, and told no more than when to come again: nothing is left until then.
 *
 * @since 0.1.0
 * @category steps
 */
export const exhaust = (
  self: AnnouncedLimit,
  totals: Totals.Totals,
  until: number,
  now: number
): AnnouncedLimit => {
  const perMilli = rate(self)
  return perMilli === undefined
    ? { ...self, ...saidNow(self, totals, now), remaining: 0, ...untilAll(Math.max(self.resetAt, until)) }
    // By then one request fits.
    : {
      ...self,
      ...saidNow(self, totals, now),
      remaining: Math.min(0, 1 - (until - now) * perMilli),
      ...untilAll(until + ((allOf(self) ?? 1) - 1) / perMilli)
    }
}

/**
 * Refused, and told to come again long before all is there: it is a bucket, which gives one request after the other.
 *
 * @since 0.1.0
 * @category steps
 */
export const refused = (self: AnnouncedLimit, waitMillis: number, now: number): AnnouncedLimit => {
  const resetMillis = self.resetAt - now
  if (!self.told || self.remaining >= 1 || waitMillis === 0 || waitMillis + roundingMillis >= resetMillis) return self
  // Many answers know better than one wait, which may be the same whatever is left.
  if (self.votes <= -bucketVotes) return self
  const votes = Math.max(self.votes, bucketVotes)
  const perMilli = (self.limit ?? 0) / usualWindow
  const size = Math.round(resetMillis * perMilli)
  // It fills by its limit each minute: then its size is what fills until it is full, and no more was ever there.
  return size >= 1 && waitMillis <= 1 / perMilli + roundingMillis &&
      (self.most ?? 0) <= 1 + (resetMillis + roundingMillis) * perMilli
    ? { ...self, votes, fill: perMilli, most: Math.max(self.most ?? 0, size) }
    : { ...self, votes }
}

/** As if it were said now, of all that was leased. */
const saidNow = ({ unit }: AnnouncedLimit, totals: Totals.Totals, now: number) => ({
  at: now,
  total: Totals.leased(unit, totals),
  unused: Totals.unused(unit, totals),
  unsent: 0
})

/** When the window ends that comes after the one that is over; how long it is, only the next answer may tell. */
const nextEnd = (self: AnnouncedLimit, now: number): number => {
  const { endsAt, longest } = self
  const millis = isWindow(self) ? Math.max(longest, usualWindow) : longest
  return now < endsAt + millis ? endsAt + millis : now + millis
}

const untilAll = (at: number) => ({ resetAt: at, fullAt: at, endsAt: at, told: false })

/** The share of a limit from which on it counts as seen whole: what the request itself took is not always known. */
const nearly = 0.9
/** Until more is known of its length, a window is taken for one of a minute. */
const usualWindow = 60_000
/** So long after a reset that was counted from when a request came the next one is sent. */
const guardMillis = 20
/** How many more answers must speak for resets that count from when a request came. */
const promptVotes = 4
/** How many more answers must speak for a provider that gives back. */
const givesVotes = 4
/** About how long requests are under way to where they are counted. */
const underWayMillis = 50
/** Of so many answers the earliest counts, about. */
const memory = 8
/** Servers that tell whole seconds round up. */
const roundingMillis = 1_000
/** How many more answers must speak for a bucket than for a window. */
const bucketVotes = 2
