/**
 * A limit of requests that nobody declares or announces: learned from refusals alone.
 *
 * What a refusal tells is the instant when the next request fits. Between two such instants the provider let through as
 * many requests as were accepted, neither more nor fewer: that is its rate, exactly, whether it counts in windows or by
 * a bucket that fills all the time. The two differ in shape. What nobody asked for says
 * nothing, so that only times of steady demand are measured. After a window's end all of it is there at once, and after
 * its last request there is nothing for the rest of it, however long. A bucket gives one request at a time: its wait is
 * never worth more than about one.
 *
 * @since 0.1.0
 */
import type { Full } from "./DeclaredLimit.js"

/**
 * What has been learned. Leases are counted from the first of the limit on; see `RateLimit`.
 *
 * @since 0.1.0
 * @category models
 */
export interface LearnedLimit {
  /** The last lease before the newest refusal: refusals of earlier ones are old news. */
  readonly stamp: number
  /** When requests fit again, as told; without being told, when the refusal came. */
  readonly end: number
  readonly told: boolean
  /** How many instants were told in a row of which nothing came: who came then was refused. */
  readonly barren: number
  /** How much longer than told it is until the next request fits: what the refusal itself took must come back. */
  readonly owes: number
  /** About how long it took from one accepted request to the next before the first refusal, if there were many. */
  readonly usual: number
  /** Leases since `end`, and what became of them. */
  readonly leased: number
  readonly accepted: number
  /** Refused since, or with the refusal that told `end`. */
  readonly refused: number
  readonly measured: Measured | undefined
  /** When the next request is due by the pace. */
  readonly due: number
  /** Where the present window began, if it is windows: told, or reckoned from the last that was. */
  readonly window: { readonly since: number; readonly leased: number; readonly accepted: number }
  /** The last lease, and the longest time since `end` for which one could have begun and none did. */
  readonly leasedAt: number
  readonly idle: number
  /** Accepted since the last refusal. */
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
 * A request was refused. `lease` is its number, `newest` that of the last lease of all; `usual` is about how long it took
 * from one accepted request to the next, if there were many.
 *
 * @since 0.1.0
 * @category steps
 */
export const refused = (
  before: LearnedLimit | undefined,
  lease: number,
  newest: number,
  waitMillis: number | undefined,
  usual: number,
  now: number
): LearnedLimit => {
  const told = waitMillis !== undefined
  const self = before === undefined || isForgotten(before, now) ? undefined : before
  const toldEnd = now + (waitMillis ?? 0)
  if (self !== undefined && lease <= self.stamp) return again(self, toldEnd + self.owes, told, now)
  // Those that were leased before it are accepted, or will be.
  const count = self === undefined ? 0 : lease - self.stamp - 1 - self.refused
  const met = self !== undefined && told && self.told && self.leasedAt <= self.end + promptMillis
  const barren = met && count < 1 ? self.barren + 1 : 0
  const owes = self === undefined || !told || !self.told ? 0 : owed(self, barren, waitMillis, toldEnd)
  const end = toldEnd + owes
  const measured = self === undefined || count < 1 || self.told !== told
    ? self?.measured
    : measure(self, count + taken(owes), end, waitMillis, now)
  return {
    stamp: newest,
    end,
    told,
    barren,
    owes,
    usual: self?.usual ?? usual,
    leased: 0,
    accepted: 0,
    refused: 0,
    measured,
    due: end + slackOf(measured),
    window: { since: end, leased: 0, accepted: 0 },
    leasedAt: end,
    idle: 0,
    steady: 0,
    at: now
  }
}

/**
 * Some buckets lose by refusals too, and tell how long it would have been without: who comes exactly then is refused
 * again, and for ever. What a refusal takes comes back in the time of one request: as long as from one instant that
 * was told to the next, when nothing was accepted between. What is told is met exactly until it is clear that it is so:
 * waits for about one request at a time were of no use, or any waits many times.
 */
const owed = (self: LearnedLimit, barren: number, waitMillis: number, toldEnd: number): number => {
  const { end, measured, owes } = self
  if (measured?.shape === "window") return 0
  const interval = measured === undefined ? self.usual : measured.millis / measured.count
  if (barren === 0) return owes > 0 && measured !== undefined ? Math.min(longestOwed, interval) : owes
  if (owes === 0 && barren < (waitMillis <= 2 * interval ? fewBarren : manyBarren)) return 0
  return Math.min(longestOwed, Math.max(2 * owes, owes > 0 ? 0 : toldEnd - end, 1))
}

/** How many requests a refusal counts for. */
const taken = (owes: number): number => owes > 0 ? 1 : 0

/** One more refusal of the same moment: the latest word counts. */
const again = (self: LearnedLimit, end: number, told: boolean, now: number): LearnedLimit => {
  if (!told || end <= self.end || self.leased > 0) return { ...self, at: now }
  const { measured } = self
  const later = measured === undefined || measured.since + measured.millis !== self.end
    ? measured
    : { ...measured, count: measured.count + taken(self.owes), millis: end - measured.since }
  return {
    ...self,
    end,
    told,
    measured: later,
    due: end + slackOf(later),
    window: { ...self.window, since: end },
    leasedAt: end,
    at: now
  }
}

const measure = (
  self: LearnedLimit,
  count: number,
  end: number,
  waitMillis: number | undefined,
  now: number
): Measured | undefined => {
  const millis = Math.max(1, end - self.end)
  // Servers that tell whole seconds round up.
  const wait = waitMillis === undefined ? 0 : waitMillis % 1000 === 0 ? Math.max(0, waitMillis - 1000) : waitMillis
  const refusals = self.refused + 1
  const worth = count * wait / millis
  const last = self.measured
  const shape = worth > refusals + 1
    ? "window"
    : last?.shape === "window" && now < end
    ? keptShape(last, millis)
    : "bucket"
  // A bucket that was left alone may have run over: nobody knows what it would have let through.
  if (shape === "bucket" && Math.max(self.idle, now - self.leasedAt) > longestIdle) return last
  const fresh: Measured = { shape, count, since: self.end, millis }
  if (last === undefined || last.shape !== shape) return fresh
  const rounding = waitMillis !== undefined && waitMillis % 1000 === 0 ? 1000 : 0
  const agrees = Math.abs(count / millis * (last.millis / last.count) - 1) <= agreement + 1 / count + rounding / millis
  if (!agrees) return fresh
  // Several windows may have passed without a refusal.
  const windows = shape === "window" ? Math.max(1, Math.round(millis / last.millis)) : 1
  if (windows > 1) return { ...fresh, count: Math.ceil(count / windows), millis: millis / windows }
  // Of a bucket, a longer time tells the rate more exactly; windows begin anew.
  return shape === "window" || last.since + last.millis !== self.end || last.count > longMeasure
    ? fresh
    : { shape, count: last.count + count, since: last.since, millis: last.millis + millis }
}

/** A window whose last moments saw the refusal is still one. */
const keptShape = (last: Measured, millis: number): Measured["shape"] =>
  Math.abs(millis / last.millis - 1) <= agreement ? "window" : "bucket"

/**
 * A lease begins. What has had nothing to do with any for ten minutes is forgotten.
 *
 * @since 0.1.0
 * @category steps
 */
export const leased = (self: LearnedLimit, now: number): LearnedLimit | undefined => {
  if (isForgotten(self, now)) return undefined
  const { measured } = self
  const window = windowAt(self, now)
  const since = Math.max(self.leasedAt, measured?.shape === "bucket" ? self.due - slackOf(measured) : self.end)
  return {
    ...self,
    leasedAt: now,
    idle: Math.max(self.idle, now - since),
    leased: self.leased + 1,
    due: measured?.shape === "bucket" ? Math.max(self.due, now) + intervalOf(self, measured) : self.due,
    window: { ...window, leased: window.leased + 1 },
    at: now
  }
}

/**
 * An attempt was answered, and not refused.
 *
 * @since 0.1.0
 * @category steps
 */
export const accepted = (self: LearnedLimit, lease: number, now: number): LearnedLimit => {
  if (lease <= self.stamp) return self
  const window = windowAt(self, now)
  return {
    ...self,
    accepted: self.accepted + 1,
    barren: 0,
    steady: self.steady + 1,
    window: { ...window, accepted: window.accepted + 1 },
    at: now
  }
}

/**
 * A lease was not used: nothing was sent.
 *
 * @since 0.1.0
 * @category steps
 */
export const returned = (self: LearnedLimit, lease: number): LearnedLimit =>
  lease <= self.stamp ? self : { ...self, refused: self.refused + 1 }

/**
 * Whether a request fits now.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (self: LearnedLimit, now: number): Full | undefined => {
  if (isForgotten(self, now)) return undefined
  if (now < self.end) return { until: self.end, earliest: self.end }
  const { measured } = self
  // After a guessed wait the pool returns slowly by itself.
  if (measured === undefined) {
    if (!self.told) return undefined
    // Where nothing came of it before, one tries alone.
    return slowly(self.barren > 0 ? self.leased + 1 : self.leased, self.accepted, self.end, now)
  }
  if (measured.shape === "bucket") {
    const until = Math.ceil(self.due - slackOf(measured))
    return now >= until ? undefined : { until, earliest: until }
  }
  const window = windowAt(self, now)
  // Now and then one more than the last time: the limit may have grown. It is not tried by many at once.
  const more = self.steady < patience ? 0 : 1 + 2 * Math.max(0, window.accepted - measured.count)
  if (window.leased >= measured.count + more) {
    return {
      until: Math.ceil(window.since + measured.millis),
      earliest: more > 0 ? -Infinity : window.since + measured.millis
    }
  }
  // A window that was told to begin now is there at once; one that was reckoned may not have begun.
  return window.since === self.end ? undefined : slowly(window.leased, window.accepted, window.since, now)
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
    : 1 - (self.due - now) / slackOf(measured)
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
 * How many requests per millisecond get through; `Infinity` where nobody knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const pace = ({ measured }: LearnedLimit): number =>
  measured === undefined ? Infinity : measured.count / measured.millis

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
  const flat = Math.min(patience, Math.max(leastFlat, measured.count))
  return 1 + caution * ((self.steady - flat) / flat) ** 3
}

const intervalOf = (self: LearnedLimit, measured: Measured): number =>
  measured.millis / measured.count / boldness(self, measured)

/** How far ahead of the pace requests may come after a while without any. */
const slackOf = (measured: Measured | undefined): number =>
  measured?.shape === "bucket"
    ? Math.max(burstMillis, burst * measured.millis / measured.count / (1 - caution))
    : 0

/** Whether it has had to do with nothing for so long that it counts no longer. */
const isForgotten = (self: LearnedLimit, now: number): boolean => now >= Math.max(self.at, self.end) + memoryMillis

/** How much slower than what was measured the pace begins. */
const caution = 0.03
/** How many must be accepted before more is tried: each try may cost a refusal. */
const patience = 100
const leastFlat = 4
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
