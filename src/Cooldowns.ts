/**
 * Which wait a fault imposes, and on whom: on a key or its group, for all models or for one.
 *
 * @since 0.1.0
 */
import type * as Fault from "./Fault.js"
import * as KeyState from "./KeyState.js"

/**
 * How long each kind of fault keeps a key away when the server does not say.
 *
 * @since 0.1.0
 * @category models
 */
export interface Cooldowns {
  readonly rateLimited: Growing
  readonly quotaMillis: number
  /** A credential that the provider refused by name. */
  readonly revokedMillis: number
  /** Any other refusal of a credential: one step after another. */
  readonly unauthorizedMillis: ReadonlyArray<number>
  readonly forbidden: Growing
  /** Added to a told wait, so that the call comes after its end. */
  readonly guardMillis: number
  /** The most that is added to a guessed wait, so that keys do not come back together. */
  readonly jitterMillis: number
}

/**
 * @since 0.1.0
 * @category models
 */
export interface Growing {
  readonly firstMillis: number
  readonly factor: number
  readonly maxMillis: number
}

/**
 * Whom a cooldown keeps away.
 *
 * @since 0.1.0
 * @category models
 */
export interface Target {
  readonly scope: "key" | "group"
  readonly model: string | undefined
}

/**
 * Whom a fault of an attempt that asked for the model `asked` keeps away; `undefined`: nobody.
 *
 * @since 0.1.0
 * @category getters
 */
export const targetOf = (
  key: KeyState.KeyState,
  asked: string | undefined,
  fault: Fault.Fault
): Target | undefined => {
  const model = fault.perModel ? asked : undefined
  const shared = fault.scope === "group" && key.key.quotaGroup !== undefined ? "group" : "key"
  switch (fault.kind) {
    case "RateLimited":
    case "QuotaExhausted":
      return { scope: shared, model }
    case "Unauthorized":
      return { scope: shared, model: undefined }
    case "Forbidden":
      return fault.failover ? { scope: shared, model: asked } : undefined
    case "Overloaded":
      return fault.waitMillis === undefined ? undefined : { scope: "key", model }
    default:
      return undefined
  }
}

/**
 * The cooldown that a fault imposes, on top of the one there is. `random` is a uniform number in [0, 1), for jitter;
 * `lease` brought the fault, and `stamp` is the newest lease of the pool.
 *
 * @since 0.1.0
 * @category steps
 */
export const impose = (
  cooldowns: Cooldowns,
  current: KeyState.Bench | undefined,
  fault: Fault.Fault,
  { lease, mostMillis, now, random, stamp }: {
    /** The longest guess, where a shared cause is suspected. */
    readonly mostMillis?: number | undefined
    readonly now: number
    readonly random: number
    readonly stamp: number
    readonly lease: number
  }
): KeyState.Bench => {
  const again = current !== undefined && current.kind === fault.kind
  const isTold = fault.waitMillis !== undefined && !countsSteps(fault.kind)
  // Several calls in flight may bring the same news: only one that was let in since makes the next cooldown longer.
  const step = isTold
    ? again ? current.step : 0
    : !again
    ? 1
    : lease > current.stamp
    ? current.step + 1
    : Math.max(1, current.step)
  const guessedJitter = Math.round(random * cooldowns.jitterMillis)
  const told = fault.waitMillis === undefined ? undefined : fault.waitMillis + cooldowns.guardMillis
  const bench = (wait: number, provenance: Fault.Provenance) =>
    KeyState.impose(current, {
      kind: fault.kind,
      since: now,
      until: Math.ceil(now + Math.min(wait, longestWait)),
      provenance,
      step,
      stamp
    })
  switch (fault.kind) {
    case "QuotaExhausted":
      return fault.resetMillis !== undefined
        ? bench(Math.max(fault.resetMillis, told ?? 0) + cooldowns.guardMillis, "told")
        : bench(Math.max(cooldowns.quotaMillis, told ?? 0) + guessedJitter, "guessed")
    case "Unauthorized": {
      const ladder = cooldowns.unauthorizedMillis
      const wait = fault.explicit ? cooldowns.revokedMillis : ladder[Math.min(step, ladder.length) - 1] ?? 0
      const guessed = Math.min(Math.max(wait, told ?? 0) + guessedJitter, mostMillis ?? Infinity)
      return bench(Math.max(guessed, told ?? 0), "guessed")
    }
    case "Forbidden":
      return bench(Math.max(grown(cooldowns.forbidden, step), told ?? 0) + guessedJitter, "guessed")
    default:
      return told === undefined
        ? bench(grown(cooldowns.rateLimited, step) + guessedJitter, "guessed")
        : bench(told, fault.provenance)
  }
}

/** The ladders that go on whatever wait was told; of the others, only guesses count. */
const countsSteps = (kind: Fault.Kind): boolean => kind === "Unauthorized" || kind === "Forbidden"

/** A hundred years: for ever, but a number that stores and logs can keep. */
const longestWait = 100 * 365 * 86_400_000

const grown = ({ factor, firstMillis, maxMillis }: Growing, step: number): number =>
  // 0 × Infinity is NaN.
  firstMillis === 0 ? 0 : Math.min(maxMillis, firstMillis * factor ** (step - 1))
