/**
 * Attempts that take far longer than others of their kind: a key that answers nothing gets no new leases, and what may be
 * aborted is. Pure; the pool's sweeper acts on it.
 *
 * @since 0.1.0
 */
import * as Latency from "./Latency.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as SlotMap from "./SlotMap.js"

/**
 * An attempt whose answer belongs to nobody yet.
 *
 * @since 0.1.0
 * @category models
 */
export interface Running {
  readonly lease: PoolState.LeaseRecord
  /** How many attempts of its call were aborted before it: each one doubles how long the next may take. */
  readonly aborted: number
  /** Whether it can be aborted, and was not yet. */
  readonly abortable: boolean
}

/**
 * What is to be done now, and when to look again.
 *
 * @since 0.1.0
 * @category models
 */
export interface Swept<A extends Running> {
  /** Attempts that outlast what a key may be quiet for. */
  readonly quiet: ReadonlyArray<{ readonly running: A; readonly limitMillis: number }>
  readonly overdue: ReadonlyArray<A>
  /** `Infinity`: not before another attempt begins. */
  readonly nextAt: number
}

/**
 * Looks through the attempts that run.
 *
 * @since 0.1.0
 * @category getters
 */
export const sweep = <A extends Running>(
  { attemptTimeout }: Pick<PoolState.Config, "attemptTimeout">,
  { latency }: Pick<PoolState.PoolState, "latency">,
  all: Iterable<A>,
  now: number
): Swept<A> => {
  const quiet: Array<Swept<A>["quiet"][number]> = []
  const overdue: Array<A> = []
  let nextAt = Infinity
  const due = (at: number): boolean => {
    if (at > now) nextAt = Math.min(nextAt, at)
    return at <= now
  }
  for (const running of all) {
    const { abortable, aborted, lease } = running
    if (attemptTimeout !== "learned") {
      if (abortable && due(lease.startedAt + (attemptTimeout ?? Infinity))) overdue.push(running)
      continue
    }
    const usual = lease.timed === undefined ? undefined : Latency.quantile(latency, lease.timed, 0.99)
    // Those in flight may teach it: then it counts for what began with them as well.
    if (usual === undefined) {
      if (lease.timed !== undefined && now < lease.startedAt + learningMillis) {
        nextAt = Math.min(nextAt, now + quietMillis)
      }
      continue
    }
    const limitMillis = Math.max(quietMillis, 2 * usual)
    if (due(lease.startedAt + limitMillis)) quiet.push({ running, limitMillis })
    if (abortable && due(lease.startedAt + Math.max(abortMillis, 5 * usual) * 2 ** aborted)) overdue.push(running)
  }
  return { quiet, overdue, nextAt }
}

/**
 * Closes the keys that have answered nothing for too long, although attempts are in flight; `undefined` when there is
 * none.
 *
 * @since 0.1.0
 * @category steps
 */
export const stall = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  quiet: Swept<Running>["quiet"],
  now: number
): PoolState.Changed | undefined => {
  let next = state
  for (const { limitMillis, running: { lease } } of quiet) {
    const key = SlotMap.get(next.slots, lease.slot)
    if (key === undefined || key.id !== lease.key.id || key.stall !== undefined) continue
    if (key.inFlight > 0 && now >= key.quietSince + limitMillis) {
      next = Places.place(config, next, { ...key, stall: { since: now, tries: 0 } }, now)
    }
  }
  return next === state ? undefined : { state: next, events: PoolState.noEvents }
}

/**
 * The least that a key may be quiet for: nothing that begins is due before. 5 seconds.
 *
 * @since 0.1.0
 * @category constants
 */
export const quietMillis = 5_000

/** So long after an attempt has begun, those that began with it will hardly teach any more what is usual. */
const learningMillis = 600_000
/** The least that an attempt may take. */
const abortMillis = 30_000
