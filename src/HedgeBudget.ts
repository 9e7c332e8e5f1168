/**
 * How many calls may get a second attempt beside their first: a small share of all, and none while attempts fail more
 * than a little.
 *
 * Pure, and free where nobody hedges: calls and ended attempts are counted anyway, so that only faults are counted here,
 * and the share is reckoned when somebody asks.
 *
 * @since 0.1.0
 */

/**
 * What is left of the share, and the faults of late.
 *
 * @since 0.1.0
 * @category models
 */
export interface HedgeBudget {
  /** Second attempts that may begin, and the calls counted into them so far. */
  readonly tokens: number
  readonly calls: number
  /** Faults so far, but for those of requests that are wrong themselves. */
  readonly faults: number
  /** Two moments after which faults came, at least a quarter of a minute apart, or the same; absent: there were none. */
  readonly marks: { readonly older: Mark; readonly newer: Mark } | undefined
}

/**
 * How many attempts had ended at a moment, and how many of them with a fault.
 *
 * @since 0.1.0
 * @category models
 */
export interface Mark {
  readonly at: number
  readonly ended: number
  readonly faults: number
}

/**
 * What bounds second attempts: their share of the calls, and the least share of attempts that must succeed.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options {
  readonly share: number
  readonly success: number
}

/**
 * No calls yet, and so nothing to spend: never are there more second attempts than the share of the calls.
 *
 * @since 0.1.0
 * @category constructors
 */
export const initial: HedgeBudget = { tokens: 0, calls: 0, faults: 0, marks: undefined }

/**
 * An attempt has failed; `ended` is how many had ended before.
 *
 * @since 0.1.0
 * @category steps
 */
export const faulted = (self: HedgeBudget, ended: number, now: number): HedgeBudget => {
  const mark: Mark = { at: now, ended, faults: self.faults }
  const { marks } = self
  const faults = self.faults + 1
  if (marks === undefined || now >= marks.newer.at + 2 * halfMillis) {
    return { ...self, faults, marks: { older: mark, newer: mark } }
  }
  return now < marks.newer.at + halfMillis
    ? { ...self, faults }
    : { ...self, faults, marks: { older: marks.newer, newer: mark } }
}

/**
 * The share of attempts that did not fail since the first fault of the last 15 to 45 seconds; 1 while there was none.
 * `ended` is how many attempts have ended by now.
 *
 * @since 0.1.0
 * @category getters
 */
export const successOf = ({ faults, marks }: HedgeBudget, ended: number, now: number): number => {
  if (marks === undefined || now >= marks.newer.at + 2 * halfMillis) return 1
  const failed = faults - marks.older.faults
  return 1 - failed / Math.max(failed, ended - marks.older.ended)
}

/**
 * Takes one second attempt, when `calls` have begun in all and `ended` attempts have ended; `undefined` if there is none
 * to take.
 *
 * @since 0.1.0
 * @category steps
 */
export const spend = (
  self: HedgeBudget,
  { share, success }: Options,
  { calls, ended }: { readonly calls: number; readonly ended: number },
  now: number
): HedgeBudget | undefined => {
  if (successOf(self, ended, now) < success) return undefined
  // What lacks a hair in floating point is there.
  const tokens = Math.min(mostTokens, self.tokens + share * (calls - self.calls)) + 1e-9
  return tokens < 1 ? undefined : { ...self, tokens: tokens - 1, calls }
}

/** No more than so many at once, however long nobody needed any. */
const mostTokens = 10
const halfMillis = 15_000
