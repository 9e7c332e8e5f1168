/**
 * A limit that a key declares: so many requests or tokens in any window of so long.
 *
 * Nobody knows when the provider counts, nor where its windows begin. It counts before its answer comes: what is in
 * flight is held, and is free again one window after the answer. So no window holds more than the limit, whatever its
 * phase.
 *
 * @since 0.1.0
 */
import * as SlotMap from "./SlotMap.js"

/**
 * What is counted: requests, or tokens of some kind.
 *
 * @since 0.1.0
 * @category models
 */
export type Unit = "requests" | "tokens" | "input" | "output"

/**
 * What of a declared limit is taken.
 *
 * @since 0.1.0
 * @category models
 */
export interface DeclaredLimit {
  readonly unit: "requests" | "tokens"
  /** What holds now, and what was declared: while others take of it unseen, only a part of it holds. */
  readonly limit: number
  readonly whole: number
  readonly windowMillis: number
  /** Taken by what is in flight: it is not yet known from when on it counts. */
  readonly held: number
  /** What was answered and still counts, in order of time; a ring. */
  readonly log: SlotMap.SlotMap<Entry>
  readonly first: number
  readonly next: number
  /** All that ever went through the log, and what of it has left. */
  readonly sum: number
  readonly left: number
}

/**
 * Answers of about one moment: `at` is that of the last of them.
 *
 * @since 0.1.0
 * @category models
 */
export interface Entry {
  readonly since: number
  readonly at: number
  /** All that had gone through the log when this had. */
  readonly sum: number
}

/**
 * When something fits that does not fit now: by itself at `until`, and through what attempts in flight say not before
 * `earliest`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Full {
  readonly until: number
  readonly earliest: number
}

/**
 * @since 0.1.0
 * @category constructors
 */
export const make = (unit: "requests" | "tokens", limit: number, windowMillis: number): DeclaredLimit => ({
  unit,
  limit,
  whole: limit,
  windowMillis,
  held: 0,
  log: SlotMap.empty(),
  first: 0,
  next: 0,
  sum: 0,
  left: 0
})

/**
 * Whether an amount fits now; what is more than the limit fits when nothing is taken.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (self: DeclaredLimit, amount: number, now: number): Full | undefined => {
  const past = now - self.windowMillis
  const gone = firstAfter(self, (entry) => entry.at > past)
  const left = gone === self.first ? self.left : sumBefore(self, gone)
  const missing = Math.min(amount, self.limit) - (self.limit - self.held - (self.sum - left))
  if (missing <= 0) return undefined
  const opens = firstAfter(self, (entry) => entry.sum - left >= missing)
  const entry = entryAt(self, opens)
  const until = entry === undefined ? Infinity : entry.at + self.windowMillis
  // What is in flight may still turn out not to have been sent.
  return { until, earliest: self.held > 0 ? -Infinity : until }
}

/**
 * How much is left now.
 *
 * @since 0.1.0
 * @category getters
 */
export const remaining = (self: DeclaredLimit, now: number): number => {
  const past = now - self.windowMillis
  const gone = firstAfter(self, (entry) => entry.at > past)
  return Math.max(0, self.limit - self.held - (self.sum - (gone === self.first ? self.left : sumBefore(self, gone))))
}

/**
 * How much of what counts now has been counted since an instant.
 *
 * @since 0.1.0
 * @category getters
 */
export const countedSince = (self: DeclaredLimit, since: number, now: number): number => {
  const past = now - self.windowMillis
  const first = firstAfter(self, (entry) => entry.at > past && entry.at >= since)
  return self.sum - (first === self.first ? self.left : sumBefore(self, first))
}

/**
 * The earliest instants at which the next requests can begin, up to `until` and `most` of them, if each is answered at
 * once and what is in flight turns out not to have been sent: no more can, whatever happens.
 *
 * @since 0.1.0
 * @category getters
 */
export const openings = (self: DeclaredLimit, now: number, until: number, most: number): ReadonlyArray<number> => {
  const times: Array<number> = []
  const add = (count: number, at: number) => {
    for (let i = 0; i < count && times.length < most && at <= until; i++) times.push(at)
  }
  const first = firstAfter(self, (entry) => entry.at > now - self.windowMillis)
  let gone = first === self.first ? self.left : sumBefore(self, first)
  add(self.limit - (self.sum - gone), now)
  for (let at = first; at < self.next; at++) {
    const entry = entryAt(self, at)
    if (entry === undefined) continue
    add(entry.sum - gone, entry.at + self.windowMillis)
    gone = entry.sum
  }
  // Each that is taken is free again a window later.
  for (let taken = 0; taken < times.length && times.length < most; taken++) {
    add(1, (times[taken] ?? until) + self.windowMillis)
  }
  return times
}

/**
 * Takes an amount for an attempt that begins.
 *
 * @since 0.1.0
 * @category steps
 */
export const hold = (self: DeclaredLimit, amount: number): DeclaredLimit =>
  changed(self, self.held + amount, self.log, self.next, self.sum)

/**
 * Gives back what was taken for an attempt that was not sent.
 *
 * @since 0.1.0
 * @category steps
 */
export const release = (self: DeclaredLimit, held: number): DeclaredLimit => ({
  ...self,
  held: Math.max(0, self.held - held)
})

/**
 * An attempt for which `held` was taken is answered: `amount` counts for one window from now.
 *
 * @since 0.1.0
 * @category steps
 */
export const count = (before: DeclaredLimit, held: number, amount: number, now: number): DeclaredLimit => {
  const self = forget(before, now)
  const sum = self.sum + amount
  const last = entryAt(self, self.next - 1)
  const cell = self.limit <= cells ? 0 : self.windowMillis / cells
  // The last of the moment counts for all of them: later than need be, never earlier.
  const joins = last !== undefined && self.next > self.first &&
    (now - last.since < cell || self.next - self.first >= ring)
  const at = joins ? self.next - 1 : self.next
  const log = SlotMap.set(self.log, at % ring, { since: joins ? last.since : now, at: now, sum })
  return changed(self, Math.max(0, self.held - held), log, at + 1, sum)
}

// Written out: each attempt makes two of these, and a spread costs three times as much.
const changed = (
  self: DeclaredLimit,
  held: number,
  log: DeclaredLimit["log"],
  next: number,
  sum: number
): DeclaredLimit => ({
  unit: self.unit,
  limit: self.limit,
  whole: self.whole,
  windowMillis: self.windowMillis,
  held,
  log,
  first: self.first,
  next,
  sum,
  left: self.left
})

/**
 * The same use of another limit: a key's attributes may change.
 *
 * @since 0.1.0
 * @category steps
 */
export const resized = (self: DeclaredLimit, limit: number): DeclaredLimit =>
  self.whole === limit ? self : { ...self, limit, whole: limit }

/**
 * The same use of one of so many parts of the limit, which is at least 1; 1: of all of it.
 *
 * @since 0.1.0
 * @category steps
 */
export const divided = (self: DeclaredLimit, parts: number): DeclaredLimit => {
  const limit = partOf(self.whole, parts)
  return self.limit === limit ? self : { ...self, limit }
}

/**
 * One of so many parts of a limit, at least 1.
 *
 * @since 0.1.0
 * @category getters
 */
export const partOf = (whole: number, parts: number): number =>
  parts <= 1 ? whole : Math.max(1, Math.floor(whole / parts))

/**
 * What of a limit was taken, and from when on it counts.
 *
 * @since 0.1.0
 * @category models
 */
export interface Use {
  readonly at: number
  readonly amount: number
}

/**
 * What is taken now, in order of time. Of what is in flight nobody knows when it will be answered: it counts from now.
 *
 * @since 0.1.0
 * @category persistence
 */
export const uses = (self: DeclaredLimit, now: number): ReadonlyArray<Use> => {
  const past = now - self.windowMillis
  const taken: Array<Use> = []
  for (let at = firstAfter(self, (entry) => entry.at > past); at < self.next; at++) {
    const entry = entryAt(self, at)
    if (entry !== undefined) taken.push({ at: entry.at, amount: entry.sum - sumBefore(self, at) })
  }
  if (self.held > 0) taken.push({ at: now, amount: self.held })
  return taken
}

/**
 * With what else was taken, by somebody before.
 *
 * @since 0.1.0
 * @category persistence
 */
export const withUses = (self: DeclaredLimit, others: ReadonlyArray<Use>, now: number): DeclaredLimit => {
  const past = now - self.windowMillis
  const own = uses({ ...self, held: 0 }, now)
  const all = [...own, ...others].filter(({ at }) => at > past).sort((a, b) => a.at - b.at)
  const empty = { ...make(self.unit, self.limit, self.windowMillis), whole: self.whole, held: self.held }
  return all.reduce((next, { amount, at }) => count(next, 0, amount, at), empty)
}

/** Drops what no longer counts. */
const forget = (self: DeclaredLimit, now: number): DeclaredLimit => {
  const past = now - self.windowMillis
  const gone = firstAfter(self, (entry) => entry.at > past)
  if (gone === self.first) return self
  let log = self.log
  for (let at = self.first; at < gone; at++) log = SlotMap.remove(log, at % ring)
  return { ...self, log, first: gone, left: sumBefore(self, gone) }
}

/** The first entry of which `holds` is true; it is of all that follow. */
const firstAfter = (self: DeclaredLimit, holds: (entry: Entry) => boolean): number => {
  let low = self.first
  let high = self.next
  while (low < high) {
    const middle = (low + high) >>> 1
    const entry = entryAt(self, middle)
    if (entry === undefined || holds(entry)) high = middle
    else low = middle + 1
  }
  return low
}

const entryAt = (self: DeclaredLimit, at: number): Entry | undefined =>
  at < self.first || at >= self.next ? undefined : SlotMap.get(self.log, at % ring)

const sumBefore = (self: DeclaredLimit, at: number): number => entryAt(self, at - 1)?.sum ?? self.left

/** Up to so many moments are told apart in a window. */
const cells = 256
/** Room for one window, and for what has just left it. */
const ring = 512
