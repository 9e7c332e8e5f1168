/**
 * How many attempts of a key a provider lets run at once, where nobody declares it: learned from refusals alone.
 *
 * A provider that counts what runs does not refuse for a time, but until something ends: whatever wait it names is a guess,
 * and after it all would come at once and be refused again. What tells is how many ran beside the one that was refused.
 *
 * @since 0.1.0
 */
import type * as Fault from "./Fault.js"

/**
 * What has been learned.
 *
 * @since 0.1.0
 * @category models
 */
export interface LearnedConcurrency {
  /** So many ran beside one that was refused: so many may run. */
  readonly most: number
  /** So many more are tried. */
  readonly more: number
  /** What the refusals of the moment before told. */
  readonly earlier: number | undefined
  /** Whether the provider named the cause. */
  readonly named: boolean
  /** Whether that is the cause: it was named, or it was so again. */
  readonly sure: boolean
  /** The newest lease when this began to hold: refusals of earlier ones are part of it, their successes are no proof. */
  readonly stamp: number
  /** How many succeeded since then while all ran that may. */
  readonly steady: number
  /** When it last had to do with anything. */
  readonly at: number
}

/**
 * An attempt was refused beside which `others` ran; `lease` is its number, `newest` that of the last of all. Some providers
 * name the cause. Where nothing at all is said, it is taken for this if it is refused beside the same number again; and
 * beside clearly fewer, it never was: who counts requests refuses also when little runs.
 *
 * @since 0.1.0
 * @category steps
 */
export const refused = (
  before: LearnedConcurrency | undefined,
  fault: Fault.Fault,
  others: number,
  lease: number,
  newest: number,
  now: number
): LearnedConcurrency | undefined => {
  const self = before === undefined || isForgotten(before, now) ? undefined : before
  const named = fault.unit === "concurrency"
  if (!named && !isSilent(fault)) return self
  // Of several refused at once the last sees how many ran that were not.
  const isSame = self !== undefined && lease <= self.stamp
  const bound = self === undefined ? Infinity : isSame ? self.most : self.sure ? self.most + self.more : Infinity
  const most = Math.max(1, Math.min(others, bound))
  const earlier = isSame ? self.earlier : self?.most
  const again = earlier !== undefined && most >= least(earlier) &&
    (self?.sure === true || earlier >= least(most))
  if (!named && !again) {
    if (self?.named === true) return self
    if (others < fewest) return undefined
  }
  const sure = named || again
  return {
    // Of two that say the same the lower is safe.
    most: again && self?.sure !== true ? Math.min(most, earlier) : most,
    more: sure ? 0 : 1,
    earlier,
    named: named || self?.named === true,
    sure,
    stamp: isSame ? self.stamp : newest,
    steady: 0,
    at: now
  }
}

/**
 * Whether it is the reason of a refusal beside which `others` ran, so that it tells nothing of how many requests may come.
 *
 * @since 0.1.0
 * @category guards
 */
export const explains = (
  self: LearnedConcurrency | undefined,
  fault: Fault.Fault,
  others: number,
  now: number
): boolean =>
  self !== undefined && self.sure && isSilent(fault) && others >= least(self.most) && !isForgotten(self, now)

const isSilent = ({ unit, waitMillis }: Fault.Fault): boolean => unit === undefined && waitMillis === undefined

/** From so many on it is about as many: meanwhile one or the other may have ended. */
const least = (most: number): number => most - Math.max(1, agreement * most)

/**
 * An attempt succeeded, while so many ran, it among them; `newest` is the number of the last of all. Where more ran than
 * may, that was not the cause. When all that may run has run long enough, one more is tried, and as long as nothing is
 * refused, twice as many more each time: somebody else may have taken the rest, or it was not the cause.
 *
 * @since 0.1.0
 * @category steps
 */
export const succeeded = (
  self: LearnedConcurrency | undefined,
  lease: number,
  inFlight: number,
  newest: number,
  now: number
): LearnedConcurrency | undefined => {
  if (self === undefined || isForgotten(self, now)) return undefined
  const { more, most, sure } = self
  // One that began before may have run beside fewer.
  if (inFlight < most + more || (more > 0 && lease <= self.stamp)) return self
  const steady = self.steady + 1
  // One alone may come before the refusal of another.
  if (steady < (more > 0 ? proof : patience)) return sure ? { ...self, steady, at: now } : { ...self, steady }
  if (!sure) return undefined
  return { ...self, most: most + more, more: Math.max(1, 2 * more), stamp: newest, steady: 0, at: now }
}

/**
 * How many may run at once; `Infinity` while nobody knows.
 *
 * @since 0.1.0
 * @category getters
 */
export const most = (self: LearnedConcurrency | undefined, now: number): number =>
  self === undefined || isForgotten(self, now) ? Infinity : self.most + self.more

/**
 * When nobody knows any more, if nothing comes of it until then.
 *
 * @since 0.1.0
 * @category getters
 */
export const forgottenAt = ({ at }: LearnedConcurrency): number => at + memoryMillis

const isForgotten = (self: LearnedConcurrency, now: number): boolean => now >= forgottenAt(self)

/** Where fewer run, the same number again may be chance: a slow caller's are always few. */
const fewest = 4
const agreement = 0.15
/** So many that succeed while more run than may show that more may. */
const proof = 3
/** How many must succeed before one more is tried: each try may cost a refusal. */
const patience = 100
const memoryMillis = 600_000
