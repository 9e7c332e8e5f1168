/**
 * A limit that nobody declares or announces, of requests or of tokens: learned from refusals alone.
 *
 * What a refusal tells is the instant when the next request fits. Between two such instants the provider let through as
 * many requests as were accepted, neither more nor fewer: that is its rate, exactly, whether it counts in windows or by
 * a bucket that fills all the time. The two differ in shape. What nobody asked for says
 * nothing, so that only times of steady demand are measured. After a window's end all of it is there at once, and after
 * its last request there is nothing for the rest of it, however long. A bucket gives one request at a time: its wait is
 * never worth more than about one.
 *
 * Amounts are what the limit counts: 1 for each request, or its tokens. Tokens are as the pool estimates them, and what an
 * answer did not use is taken off; what providers count may be another measure of the same.
 *
 * @since 0.1.0
 */
import type { Full } from "./DeclaredLimit.js"

/**
 * What has been learned. What is leased is counted from the first lease of the limit on; see `RateLimit`.
 *
 * @since 0.1.0
 * @category models
 */
export interface LearnedLimit {
  /** All that was leased before the newest refusal came: refusals of earlier leases are old news. */
  readonly stamp: number
  /** What a request takes on average. */
  readonly size: number
  /** What the request takes for which `end` was told; 0 where nobody knows. */
  readonly cost: number
  /** When requests fit again, as told; without being told, when the refusal came. */
  readonly end: number
  readonly told: boolean
  /** How many instants were told in a row of which nothing came: who came then was refused. */
  readonly barren: number
  /** Above 0 after instants of which nothing came, until one was right at the first try. */
  readonly doubts: number
  /** How much longer than told it is until the next request fits: what the refusal itself took must come back. */
  readonly owes: number
  /** About how long it took from one accepted request to the next before the first refusal, if there were many. */
  readonly usual: number
  /** Leased since `end`, and what became of it. */
  readonly leased: number
  readonly accepted: number
  /** Not taken in the end: refused, not sent, not used. */
  readonly refused: number
  readonly measured: Measured | undefined
  /** When the next request is due by the pace. */
  readonly due: number
  /** Where the present window began, if it is windows: told, or reckoned from the last that was. */
  readonly window: { readonly since: number; readonly leased: number; readonly accepted: number }
  /** The last lease, and the longest time since `end` for which one could have begun and none did. */
  readonly leasedAt: number
  readonly idle: number
  /** How many requests were accepted since the last refusal. */
  readonly steady: number
  /** When it last had to do with anything. */
  readonly at: number
}

/**
 * What was let through between two instants at which a request just fitted.
 *
 * @since 0.1.0
 * @category models
 */
export interface Measured {
  readonly shape: "window" | "bucket"
  readonly count: number
  readonly since: number
  readonly millis: number
}

/**
 * What an attempt takes, and all that had been leased with it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Taken {
  readonly cost: number
  readonly leased: number
}

/**
 * A request was refused. `newest` is all that was leased until now; `usual` is about how long it took from one accepted
 * request to the next, if there were many.
 *
 * @since 0.1.0
 * @category steps
 */
export const refused = (
  before: LearnedLimit | undefined,
  { cost, leased }: Taken,
  newest: number,
  waitMillis: number | undefined,
  usual: number,
  now: number
): LearnedLimit => {
  const told = waitMillis !== undefined
  const self = before === undefined || isForgotten(before, now) ? undefined : before
  const toldEnd = now + (waitMillis ?? 0)
  if (self !== undefined && leased <= self.stamp) return again(self, cost, toldEnd + self.owes, told, now)
  // Those that were leased before it are accepted, or will be.
  const count = self === undefined ? 0 : leased - self.stamp - cost - self.refused
  const met = self !== undefined && told && self.told && self.leasedAt <= self.end + promptMillis
  const barren = met && count < 1 ? self.barren + 1 : 0
  const owes = self === undefined || !told || !self.told ? 0 : owed(self, barren, waitMillis, toldEnd)
  const end = toldEnd + owes
  const measured = self === undefined || count < 1 || self.told !== told
    ? self?.measured
    : measure(self, count + taken(owes, self), cost, end, waitMillis, now)
  const size = self?.size ?? cost
  return {
    stamp: newest,
    size,
    cost,
    end,
    told,
    barren,
    doubts: barren > 0 ? 2 : Math.max(0, (self?.doubts ?? 0) - (count > 0 ? 1 : 0)),
    owes,
    usual: self?.usual ?? usual,
    leased: 0,
    accepted: 0,
    refused: 0,
    measured,
    due: dueAt(measured, end, size, cost),
    window: { since: end, leased: 0, accepted: 0 },
    leasedAt: end,
    idle: 0,
    steady: 0,
    at: now
  }
}

/** At `end` just what the refused request takes has gathered. */
const dueAt = (measured: Measured | undefined, end: number, size: number, cost: number): number =>
  measured?.shape === "bucket"
    ? end + slackOf(measured, size) + (size - (cost || size)) * measured.millis / measured.count
    : end

/**
 * Some buckets lose by refusals too, and tell how long it would have been without: who comes exactly then is refused
 * again, and for ever. What a refusal takes comes back in the time of one request: as long as from one instant that
 * was told to the next, when nothing was accepted between. What is told is met exactly until it is clear that it is so:
 * waits for about one request at a time were of no use, or any waits many times.
 */
const owed = (self: LearnedLimit, barren: number, waitMillis: number, toldEnd: number): number => {
  const { end, measured, owes, size } = self
  if (measured?.shape === "window") return 0
  const interval = measured === undefined ? self.usual : size * measured.millis / measured.count
  if (barren === 0) return owes > 0 && measured !== undefined ? Math.min(longestOwed, interval) : owes
  if (owes === 0 && barren < (waitMillis <= 2 * interval ? fewBarren : manyBarren)) return 0
  return Math.min(longestOwed, Math.max(2 * owes, owes > 0 ? 0 : toldEnd - end, 1))
}

/** How much a refusal counts for. */
const taken = (owes: number, { size }: LearnedLimit): number => owes > 0 ? size : 0

/** One more refusal of the same moment: the latest word counts. */
const again = (self: LearnedLimit, cost: number, end: number, told: boolean, now: number): LearnedLimit => {
  if (!told || end <= self.end || self.leased > 0) return { ...self, at: now }
  const { measured } = self
  const more = measured?.shape === "bucket" ? taken(self.owes, self) + grown(self, cost) : 0
  const later = measured === undefined || measured.since + measured.millis !== self.end || measured.count + more <= 0
    ? measured
    : { ...measured, count: measured.count + more, millis: end - measured.since }
  return {
    ...self,
    cost,
    end,
    told,
    measured: later,
    due: dueAt(later, end, self.size, cost),
    window: { ...self.window, since: end },
    leasedAt: end,
    at: now
  }
}

const measure = (
  self: LearnedLimit,
  count: number,
  cost: number,
  end: number,
  waitMillis: number | undefined,
  now: number
): Measured | undefined => {
  const millis = Math.max(1, end - self.end)
  // Servers that tell whole seconds round up.
  const wait = waitMillis === undefined ? 0 : waitMillis % 1000 === 0 ? Math.max(0, waitMillis - 1000) : waitMillis
  // What fits first after a wait may be less than what fitted first after the last: a bucket did not give the difference.
  const filled = count + grown(self, cost)
  const last = self.measured
  const shape = filled * wait / millis > cost + self.size
    ? "window"
    : last?.shape === "window" && now < end
    ? keptShape(last, millis)
    : "bucket"
  // A bucket that was left alone may have run over: nobody knows what it would have let through.
  if (shape === "bucket" && (filled <= 0 || Math.max(self.idle, now - self.leasedAt) > longestIdle)) return last
  const passed = shape === "bucket" ? filled : count
  const fresh: Measured = { shape, count: passed, since: self.end, millis }
  if (last === undefined || last.shape !== shape) return fresh
  const rounding = waitMillis !== undefined && waitMillis % 1000 === 0 ? 1000 : 0
  const exactness = agreement + self.size / passed + rounding / millis
  if (Math.abs(passed / millis * (last.millis / last.count) - 1) > exactness) return fresh
  // Several windows may have passed without a refusal.
  const windows = shape === "window" ? Math.max(1, Math.round(millis / last.millis)) : 1
  if (windows > 1) return { ...fresh, count: Math.ceil(count / windows), millis: millis / windows }
  // A window may have had more left than was let through, but less than what was refused.
  if (shape === "window") return { ...fresh, count: Math.max(count, Math.min(last.count, count + cost - 1)) }
  // Of a bucket, a longer time tells the rate more exactly.
  return last.since + last.millis !== self.end || last.count > longMeasure * self.size
    ? fresh
    : { shape, count: last.count + passed, since: last.since, millis: last.millis + millis }
}

/** How much more the refused request takes than the one for which the last wait was told, if that is known. */
const grown = (self: LearnedLimit, cost: number): number => self.cost === 0 ? 0 : cost - self.cost

/** A window whose last moments saw the refusal is still one. */
const keptShape = (last: Measured, millis: number): Measured["shape"] =>
  Math.abs(millis / last.millis - 1) <= agreement ? "window" : "bucket"

/**
 * A lease begins. What has had nothing to do with any for ten minutes is forgotten.
 *
 * @since 0.1.0
 * @category steps
 */
export const leased = (self: LearnedLimit, cost: number, now: number): LearnedLimit | undefined => {
  if (isForgotten(self, now)) return undefined
  const { measured } = self
  const window = windowAt(self, now)
  const size = self.size === 0 ? cost : self.size + (cost - self.size) / sizes
  const since = Math.max(self.leasedAt, measured?.shape === "bucket" ? self.due - slackOf(measured, size) : self.end)
  return {
    ...self,
    size,
    leasedAt: now,
    idle: Math.max(self.idle, now - since),
    leased: self.leased + cost,
    due: measured?.shape === "bucket" ? Math.max(self.due, now) + cost * millisOf(self, measured) : self.due,
    window: { ...window, leased: window.leased + cost },
    at: now
  }
}

/**
 * An attempt was answered, and not refused.
 *
 * @since 0.1.0
 * @category steps
 */
export const accepted = (self: LearnedLimit, { cost, leased }: Taken, now: number): LearnedLimit => {
  if (leased <= self.stamp) return self
  const window = windowAt(self, now)
  return {
    ...self,
    accepted: self.accepted + cost,
    barren: 0,
    steady: self.steady + 1,
    window: { ...window, accepted: window.accepted + cost },
    at: now
  }
}

/**
 * So much of what a lease took was not used: nothing was sent, or less than was thought of. `accepted` tells whether it
 * was accepted before.
 *
 * @since 0.1.0
 * @category steps
 */
export const returned = (self: LearnedLimit, { cost, leased }: Taken, accepted: boolean, now: number): LearnedLimit => {
  if (leased <= self.stamp) return self
  const { measured } = self
  const window = windowAt(self, now)
  return {
    ...self,
    accepted: self.accepted - (accepted ? cost : 0),
    refused: self.refused + cost,
    due: measured?.shape === "bucket" ? self.due - cost * millisOf(self, measured) : self.due,
    window: {
      ...window,
      leased: Math.max(0, window.leased - cost),
      accepted: Math.max(0, window.accepted - (accepted ? cost : 0))
    }
  }
}

/**
 * Whether a request that takes so much fits now.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (self: LearnedLimit, cost: number, now: number): Full | undefined => {
  if (isForgotten(self, now)) return undefined
  if (now < self.end) return { until: self.end, earliest: self.end }
  const { measured } = self
  const size = self.size || cost || 1
  // After a guessed wait the pool returns slowly by itself.
  if (measured === undefined) {
    if (!self.told) return undefined
    // Where nothing came of it before, one tries alone.
    return slowly(self.leased / size + (self.barren > 0 ? 1 : 0), self.accepted / size, self.end, now)
  }
  if (measured.shape === "bucket") {
    // What takes more than ever gathers needs all that there is.
    const missing = (cost - size) * measured.millis / measured.count
    const until = Math.ceil(self.due - Math.max(0, slackOf(measured, size) - missing))
    return now >= until ? undefined : { until, earliest: until }
  }
  const window = windowAt(self, now)
  // Now and then one more than the last time: the limit may have grown. It is not tried by many at once.
  const more = self.steady < patience ? 0 : size + 2 * Math.max(0, window.accepted - measured.count)
  if (window.leased > 0 && window.leased + cost > measured.count + more) {
    return {
      until: Math.ceil(window.since + measured.millis),
      earliest: more > 0 ? -Infinity : window.since + measured.millis
    }
  }
  // A window that was told to begin now is there at once; one that was reckoned may not have begun, nor one that is told
  // by somebody who was wrong of late.
  return window.since === self.end && self.doubts === 0
    ? undefined
    : slowly(window.leased / size, window.accepted / size, window.since, now)
}

/**
 * How much is left of what fits at once, as a share of it: of a window, or of how far requests may come ahead of the
 * pace. 1 while nothing was measured.
 *
 * @since 0.1.0
 * @category getters
 */
export const share = (self: LearnedLimit, now: number): number => {
  if (isForgotten(self, now)) return 1
  if (now < self.end) return 0
  const { measured } = self
  if (measured === undefined) return 1
  const left = measured.shape === "window"
    ? 1 - windowAt(self, now).leased / measured.count
    : 1 - (self.due - now) / slackOf(measured, self.size)
  return Math.max(0, Math.min(1, left))
}

/**
 * When some of what is left now will be lost if nobody uses it: at the end of the window, or when so much as may come
 * ahead of the pace has gathered. `Infinity` where nobody knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const lostAt = (self: LearnedLimit, now: number): number => {
  const { measured } = self
  if (measured === undefined || isForgotten(self, now)) return Infinity
  return measured.shape === "bucket" ? self.due : windowAt(self, now).since + measured.millis
}

/**
 * How many requests of the usual size get through per millisecond; `Infinity` where nobody knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const pace = ({ measured, size }: LearnedLimit): number =>
  measured === undefined ? Infinity : measured.count / measured.millis / size

/** Two, and as many again as were accepted, or as seconds pass: nothing is known, or not for certain. */
const slowly = (leased: number, accepted: number, since: number, now: number): Full | undefined => {
  const steps = Math.floor((now - since) / stepMillis)
  return steps >= lastStep || leased < 2 ** (steps + 1) + 2 * accepted
    ? undefined
    : { until: since + (steps + 1) * stepMillis, earliest: -Infinity }
}

/** The window of this moment. */
const windowAt = ({ measured, window }: LearnedLimit, now: number): LearnedLimit["window"] => {
  if (measured?.shape !== "window") return window
  const { millis } = measured
  const passed = Math.floor((now - window.since) / millis)
  return passed < 1 ? window : { since: window.since + passed * millis, leased: 0, accepted: 0 }
}

/**
 * The pace as a multiple of what was measured: below it at first, then flat for as long as it seems right, then ever
 * faster, so that a limit that has grown is found out.
 */
const boldness = (self: LearnedLimit, measured: Measured): number => {
  // What was measured over few requests is not known well: what is wrong about it is found out soon.
  const flat = Math.min(patience, Math.max(leastFlat, measured.count / self.size))
  return 1 + caution * ((self.steady - flat) / flat) ** 3
}

/** How long until one more of what the limit counts is there, by the pace. */
const millisOf = (self: LearnedLimit, measured: Measured): number =>
  measured.millis / measured.count / boldness(self, measured)

/** How far ahead of the pace requests may come after a while without any. */
const slackOf = ({ count, millis }: Measured, size: number): number =>
  Math.max(burstMillis, burst * size * millis / count / (1 - caution))

/** Whether it has had to do with nothing for so long that it counts no longer. */
const isForgotten = (self: LearnedLimit, now: number): boolean => now >= Math.max(self.at, self.end) + memoryMillis

/** How much slower than what was measured the pace begins. */
const caution = 0.03
/** How many must be accepted before more is tried: each try may cost a refusal. */
const patience = 100
const leastFlat = 4
/** Over about so many leases their usual size is known. */
const sizes = 16
/** Measurements that differ by less say the same. */
const agreement = 0.1
/** Long enough to know a rate. */
const longMeasure = 1_000
const stepMillis = 1_000
const lastStep = 10
const burstMillis = 2_000
/** With whatever pace, so many intervals. */
const burst = 3.5
const longestIdle = 3_000
const longestOwed = 10_000
/** Whoever comes so soon after the end of a wait met it. */
const promptMillis = 250
/** So many told waits of no use show that refusals count, if each was for about one request; so many if they were not. */
const fewBarren = 2
const manyBarren = 6
const memoryMillis = 600_000
