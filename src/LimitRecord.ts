/**
 * Limits as they are kept across processes, and back: what is used of those that are declared, and what was announced
 * or learned. A party that is told anew after a restart would pay with refusals for it.
 *
 * @since 0.1.0
 */
import * as Schema from "effect/Schema"
import * as AnnouncedLimit from "./AnnouncedLimit.js"
import * as DeclaredLimit from "./DeclaredLimit.js"
import type * as LearnedLimit from "./LearnedLimit.js"
import * as RateLimit from "./RateLimit.js"
import * as Totals from "./Totals.js"

const finite = Schema.Number.pipe(Schema.finite())
const amount = Schema.Number.pipe(Schema.finite(), Schema.nonNegative())
const optional = { exact: true } as const

/**
 * What is used of a declared limit. There may be much of it, so it is plain text: for each moment its age when it was
 * saved, in milliseconds, and `*` how much was used then, if it was not 1; both in base 36.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredUse = Schema.Struct({
  unit: Schema.Literal("requests", "tokens"),
  windowMillis: amount,
  used: Schema.String
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredUse = typeof StoredUse.Type

/**
 * A limit that was announced. Instants are milliseconds since the epoch.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredAnnounced = Schema.Struct({
  name: Schema.String,
  limit: Schema.optionalWith(finite, optional),
  /** What was left when it was said, and what came back since beyond what was taken. Absent: nobody knows how much. */
  remaining: Schema.optionalWith(finite, optional),
  /** What was taken since; below 0 what came back. */
  since: Schema.optionalWith(finite, optional),
  most: Schema.optionalWith(finite, optional),
  at: finite,
  resetAt: finite,
  fullAt: finite,
  told: Schema.Boolean,
  longest: amount,
  fill: Schema.optionalWith(amount, optional),
  votes: finite
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredAnnounced = typeof StoredAnnounced.Type

/**
 * A limit that was learned, see `LearnedLimit`. Instants are milliseconds since the epoch.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredLearned = Schema.Struct({
  /** How much was leased since the newest refusal. */
  since: amount,
  size: amount,
  cost: amount,
  end: finite,
  told: Schema.Boolean,
  barren: amount,
  doubts: Schema.optionalWith(amount, optional),
  owes: amount,
  usual: amount,
  leased: amount,
  accepted: finite,
  refused: finite,
  measured: Schema.optionalWith(
    Schema.Struct({
      shape: Schema.Literal("window", "bucket"),
      count: Schema.Number.pipe(Schema.finite(), Schema.positive()),
      since: finite,
      millis: Schema.Number.pipe(Schema.finite(), Schema.positive())
    }),
    optional
  ),
  due: finite,
  window: Schema.Struct({ since: finite, leased: amount, accepted: amount }),
  leasedAt: finite,
  idle: amount,
  steady: amount,
  at: finite
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredLearned = typeof StoredLearned.Type

/**
 * The limits of one party.
 *
 * @since 0.1.0
 * @category models
 */
export const StoredLimits = Schema.Struct({
  declared: Schema.optionalWith(Schema.Array(StoredUse), optional),
  announced: Schema.optionalWith(Schema.Array(StoredAnnounced), optional),
  learned: Schema.optionalWith(StoredLearned, optional),
  learnedTokens: Schema.optionalWith(StoredLearned, optional),
  /** What 95 of 100 requests put out at most, and how far that moves with each. */
  typical: Schema.optionalWith(Schema.Struct({ output: amount, step: amount }), optional)
})

/**
 * @since 0.1.0
 * @category models
 */
export type StoredLimits = typeof StoredLimits.Type

/**
 * What to keep of a party's limits; `undefined`: nothing. `most` bounds how many moments of use are told apart for each
 * limit: of those that are not, the last counts for all.
 *
 * @since 0.1.0
 * @category encoding
 */
export const fromLimits = (
  limits: RateLimit.RateLimit,
  now: number,
  wallOffset: number,
  most: number
): StoredLimits | undefined => {
  const declared = limits.declared.flatMap((limit): ReadonlyArray<StoredUse> => {
    const uses = coarse(DeclaredLimit.uses(limit, now), most)
    return uses.length === 0
      ? []
      : [{ unit: limit.unit, windowMillis: limit.windowMillis, used: uses.map(wordOf(now)).join(" ") }]
  })
  const announced = limits.announced.flatMap((limit): ReadonlyArray<StoredAnnounced> => {
    const { at, fill, fullAt, limit: stated, longest, most, name, remaining, resetAt, told, votes } = limit
    const since = AnnouncedLimit.taken(limit, limits.leased, now)
    return isForgotten(limit, now) ? [] : [{
      name,
      at: at + wallOffset,
      resetAt: resetAt + wallOffset,
      fullAt: fullAt + wallOffset,
      told,
      longest,
      votes,
      ...(Number.isFinite(remaining) ? { remaining } : {}),
      ...(since === 0 ? {} : { since }),
      ...(stated === undefined ? {} : { limit: stated }),
      ...(most === undefined ? {} : { most }),
      ...(fill === undefined ? {} : { fill })
    }]
  })
  const learned = learnedOf(limits.learned, "requests", limits.leased, wallOffset)
  const learnedTokens = learnedOf(limits.learnedTokens, "tokens", limits.leased, wallOffset)
  const { typical } = limits
  if (
    declared.length + announced.length === 0 && learned === undefined && learnedTokens === undefined &&
    typical === undefined
  ) return undefined
  return {
    ...(declared.length === 0 ? {} : { declared }),
    ...(announced.length === 0 ? {} : { announced }),
    ...(learned === undefined ? {} : { learned }),
    ...(learnedTokens === undefined ? {} : { learnedTokens }),
    ...(typical === undefined ? {} : { typical })
  }
}

/**
 * Limits with what was kept of them; what has become known meanwhile stays. `backAt` gives the instant of the pool's clock
 * for one that was kept: never a later one, measured from now, than it was when it was saved. What is no longer declared
 * is left out.
 *
 * @since 0.1.0
 * @category decoding
 */
export const restore = (
  self: RateLimit.RateLimit,
  stored: StoredLimits,
  savedAt: number,
  backAt: (instant: number) => number,
  now: number
): RateLimit.RateLimit => {
  const known = new Set(self.announced.map(({ name }) => name))
  return {
    ...self,
    declared: self.declared.map((limit) => {
      const kept = stored.declared?.find(({ unit, windowMillis }) =>
        unit === limit.unit && windowMillis === limit.windowMillis
      )
      return kept === undefined ? limit : DeclaredLimit.withUses(limit, usesOf(kept.used, backAt(savedAt), now), now)
    }),
    announced: [
      ...self.announced,
      ...(stored.announced ?? []).flatMap((kept) => known.has(kept.name) ? [] : announcedOf(kept, backAt))
    ].slice(0, RateLimit.mostAnnounced),
    learned: self.learned ?? learnedFrom(stored.learned, backAt),
    learnedTokens: self.learnedTokens ?? learnedFrom(stored.learnedTokens, backAt),
    typical: self.typical ?? stored.typical,
    at: Math.max(self.at, backAt(savedAt))
  }
}

// -------------------------------------------------------------------------------------------------------------- declared

/** At most so many: neighbours become one, as of the later. */
const coarse = (uses: ReadonlyArray<DeclaredLimit.Use>, most: number): ReadonlyArray<DeclaredLimit.Use> => {
  const size = Math.ceil(uses.length / most)
  if (size <= 1) return uses
  const joined: Array<DeclaredLimit.Use> = []
  for (let i = 0; i < uses.length; i += size) {
    const some = uses.slice(i, i + size)
    joined.push({ at: Math.max(...some.map(({ at }) => at)), amount: some.reduce((sum, use) => sum + use.amount, 0) })
  }
  return joined
}

/** Rounded to what counts longer, and to what counts more. */
const wordOf = (now: number) => ({ amount, at }: DeclaredLimit.Use): string => {
  const age = Math.max(0, Math.floor(now - at)).toString(36)
  const much = Math.ceil(amount)
  return much === 1 ? age : `${age}*${much.toString(36)}`
}

/** Words that make no sense are left out. */
const usesOf = (words: string, savedAt: number, now: number): ReadonlyArray<DeclaredLimit.Use> =>
  words.split(" ").flatMap((word) => {
    const [, age, amount = "1"] = /^([0-9a-z]{1,9})(?:\*([0-9a-z]{1,9}))?$/.exec(word) ?? []
    return age === undefined ? [] : [{ at: Math.min(now, savedAt - parseInt(age, 36)), amount: parseInt(amount, 36) }]
  })

// ------------------------------------------------------------------------------------------------- announced and learned

/** Whether it was over long ago: what comes next will be told anew. */
const isForgotten = ({ at, resetAt }: AnnouncedLimit.AnnouncedLimit, now: number): boolean =>
  now >= Math.max(at, resetAt) + memoryMillis
const memoryMillis = 600_000

/** Whatever is leased in this process was leased after it was said. */
const announcedOf = (
  { at, fill, fullAt, limit, longest, most, name, remaining = Infinity, resetAt, since = 0, told, votes }:
    StoredAnnounced,
  backAt: (instant: number) => number
): ReadonlyArray<AnnouncedLimit.AnnouncedLimit> => {
  const unit = AnnouncedLimit.unitOf(name)
  return unit === undefined
    ? []
    : [{
      name,
      unit,
      limit,
      remaining,
      most,
      at: backAt(at),
      // Leases count anew in this process. What was taken before stays taken, as the opposite of what comes back.
      total: 0,
      unused: 0,
      unsent: -since,
      began: -Infinity,
      gives: 0,
      resetAt: backAt(resetAt),
      fullAt: backAt(fullAt),
      endsAt: backAt(fullAt),
      took: 0,
      prompt: 0,
      told,
      longest,
      fill,
      votes
    }]
}

const learnedOf = (
  learned: LearnedLimit.LearnedLimit | undefined,
  unit: "requests" | "tokens",
  leased: Totals.Totals,
  wallOffset: number
): StoredLearned | undefined => {
  if (learned === undefined) return undefined
  const { measured, stamp, window, ...rest } = learned
  return {
    ...rest,
    since: Math.max(0, Totals.leased(unit, leased) - stamp),
    end: rest.end + wallOffset,
    due: rest.due + wallOffset,
    leasedAt: rest.leasedAt + wallOffset,
    at: rest.at + wallOffset,
    window: { ...window, since: window.since + wallOffset },
    ...(measured === undefined ? {} : { measured: { ...measured, since: measured.since + wallOffset } })
  }
}

/** Leases count anew in this process: those before were before its first. */
const learnedFrom = (
  stored: StoredLearned | undefined,
  backAt: (instant: number) => number
): LearnedLimit.LearnedLimit | undefined => {
  if (stored === undefined) return undefined
  const { measured, since, window, ...rest } = stored
  return {
    ...rest,
    doubts: rest.doubts ?? 0,
    stamp: -since,
    end: backAt(rest.end),
    due: backAt(rest.due),
    leasedAt: backAt(rest.leasedAt),
    at: backAt(rest.at),
    window: { ...window, since: backAt(window.since) },
    measured: measured === undefined ? undefined : { ...measured, since: backAt(measured.since) }
  }
}
