/**
 * Sums over all requests that a party was ever leased: what announced and learned limits compare with what they were told.
 *
 * @since 0.1.0
 */
import type { Unit } from "./DeclaredLimit.js"

/**
 * How many requests, the tokens of their input, the most that they may put out, as providers count them, and how much of
 * that those that have ended did not, as far as that may be given back.
 *
 * @since 0.1.0
 * @category models
 */
export interface Totals {
  readonly requests: number
  readonly input: number
  readonly output: number
  readonly unused: number
}

/**
 * Nothing was leased yet.
 *
 * @since 0.1.0
 * @category constants
 */
export const none: Totals = { requests: 0, input: 0, output: 0, unused: 0 }

/**
 * How much was leased of what a limit counts.
 *
 * @since 0.1.0
 * @category getters
 */
export const leased = (unit: Unit, { input, output, requests }: Totals): number =>
  unit === "requests" ? requests : unit === "input" ? input : unit === "output" ? output : input + output

/**
 * Whether what a request did not use counts.
 *
 * @since 0.1.0
 * @category guards
 */
export const countsOutput = (unit: Unit): boolean => unit === "output" || unit === "tokens"

/**
 * How much of that was not used.
 *
 * @since 0.1.0
 * @category getters
 */
export const unused = (unit: Unit, totals: Totals): number => countsOutput(unit) ? totals.unused : 0
