/**
 * Who waits for a key, in lanes by model and in order of their calls; and how they are served.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as Order from "effect/Order"
import * as RedBlackTree from "effect/RedBlackTree"
import * as Leasing from "./Leasing.js"
import * as PoolState from "./PoolState.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * What a waiter gets: a lease, or the news that waiting is no use.
 *
 * @since 0.1.0
 * @category models
 */
export type Answer =
  | { readonly _tag: "Granted"; readonly waiter: PoolState.Waiter; readonly lease: PoolState.LeaseRecord }
  | { readonly _tag: "Refused"; readonly waiter: PoolState.Waiter }

/**
 * @since 0.1.0
 * @category models
 */
export interface Dispatched {
  readonly state: PoolState.PoolState
  readonly answers: ReadonlyArray<Answer>
  readonly events: ReadonlyArray<Telemetry.Unnumbered>
}

/**
 * A lease for a call, or a place in the queue. Those who wait already come first.
 *
 * @since 0.1.0
 * @category steps
 */
export const acquire = (
  config: PoolState.Config,
  before: PoolState.PoolState,
  request: PoolState.Request,
  wait: Pick<PoolState.Waiter, "until" | "answer">,
  now: number
): Dispatched & {
  readonly outcome: PoolState.LeaseRecord | PoolState.Waiter | "refused" | "full" | "closed"
} => {
  if (before.rest.closed) return { state: before, answers: [], events: PoolState.noEvents, outcome: "closed" }
  const served = dispatch(config, before, now)
  const leased = Leasing.lease(config, served.state, request, now)
  const events = served.events.length === 0 ? leased.events : [...served.events, ...leased.events]
  const answers = served.answers
  if (leased.lease !== undefined) return { state: leased.state, answers, events, outcome: leased.lease }
  const opens = PoolState.opening(config, leased.state, request, now)
  const call = request.call === 0 ? leased.state.calls + 1 : request.call
  const counted = request.call === 0 ? { ...leased.state, calls: call } : leased.state
  if (wait.until <= now || isHopeless(opens, wait.until)) return { state: counted, answers, events, outcome: "refused" }
  if (counted.rest.waiting >= config.maxWaiters) return { state: counted, answers, events, outcome: "full" }
  const waiter: PoolState.Waiter = { request: { ...request, call }, since: now, until: wait.until, answer: wait.answer }
  const lane = laneOf(waiter.request)
  const queue = Option.getOrElse(
    HashMap.get(counted.rest.lanes, lane),
    () => RedBlackTree.empty<number, PoolState.Waiter>(byNumber)
  )
  const rest: PoolState.Rest = {
    ...counted.rest,
    lanes: HashMap.set(counted.rest.lanes, lane, RedBlackTree.insert(queue, call, waiter)),
    waiting: counted.rest.waiting + 1
  }
  return { state: { ...counted, rest }, answers, events, outcome: waiter }
}

/**
 * Serves those who wait, in order, as far as keys can serve; refuses those whose wait cannot end in time.
 *
 * @since 0.1.0
 * @category steps
 */
export const dispatch = (config: PoolState.Config, state: PoolState.PoolState, now: number): Dispatched => {
  if (state.rest.waiting === 0) return { state, answers: [], events: PoolState.noEvents }
  const answers: Array<Answer> = []
  const events: Array<Telemetry.Unnumbered> = []
  const blocked = new Set<string>()
  let next = state
  for (let head = firstWaiter(next, blocked); head !== undefined; head = firstWaiter(next, blocked)) {
    const { lane, waiter } = head
    // Too late: it does not hold up the next in line.
    if (next.rest.closed || now > waiter.until) {
      next = withoutWaiter(next, waiter)
      answers.push({ _tag: "Refused", waiter })
      continue
    }
    const leased = Leasing.lease(config, next, waiter.request, now)
    next = leased.state
    if (leased.lease !== undefined) {
      next = withoutWaiter(next, waiter)
      answers.push({ _tag: "Granted", waiter, lease: leased.lease })
      events.push(...leased.events)
      continue
    }
    blocked.add(lane)
    const opens = PoolState.opening(config, next, waiter.request, now)
    for (const other of waitersOf(next, lane)) {
      if (now < other.until && !isHopeless(opens, other.until)) continue
      next = withoutWaiter(next, other)
      answers.push({ _tag: "Refused", waiter: other })
    }
  }
  return { state: next, answers, events }
}

/**
 * A change, and then `dispatch`.
 *
 * @since 0.1.0
 * @category steps
 */
export const thenDispatch = (config: PoolState.Config, changed: PoolState.Changed, now: number): Dispatched => {
  const served = dispatch(config, changed.state, now)
  return changed.events.length === 0 ? served : { ...served, events: [...changed.events, ...served.events] }
}

/**
 * Starts no more attempts, and refuses everybody who waits.
 *
 * @since 0.1.0
 * @category steps
 */
export const close = (config: PoolState.Config, state: PoolState.PoolState, now: number): Dispatched =>
  dispatch(config, { ...state, rest: { ...state.rest, closed: true } }, now)

/**
 * Takes a waiter out of the queue; the same state when it is not there (any more).
 *
 * @since 0.1.0
 * @category steps
 */
export const withoutWaiter = (state: PoolState.PoolState, waiter: PoolState.Waiter): PoolState.PoolState => {
  const lane = laneOf(waiter.request)
  const queue = HashMap.get(state.rest.lanes, lane)
  if (queue._tag === "None" || !RedBlackTree.has(queue.value, waiter.request.call)) return state
  const left = RedBlackTree.removeFirst(queue.value, waiter.request.call)
  const lanes = RedBlackTree.size(left) === 0
    ? HashMap.remove(state.rest.lanes, lane)
    : HashMap.set(state.rest.lanes, lane, left)
  return { ...state, rest: { ...state.rest, lanes, waiting: state.rest.waiting - 1 } }
}

/**
 * Whether a waiter still stands in the queue.
 *
 * @since 0.1.0
 * @category getters
 */
export const isWaiting = (state: PoolState.PoolState, waiter: PoolState.Waiter): boolean => {
  const queue = HashMap.get(state.rest.lanes, laneOf(waiter.request))
  return queue._tag === "Some" && RedBlackTree.has(queue.value, waiter.request.call)
}

/**
 * When to look at the queue next: at the first opening that serves somebody, or when the first one gives up.
 *
 * @since 0.1.0
 * @category getters
 */
export const nextWake = (config: PoolState.Config, state: PoolState.PoolState, now: number): number => {
  if (state.rest.waiting === 0) return Infinity
  let at = Infinity
  for (const [, queue] of state.rest.lanes) {
    const head = RedBlackTree.first(queue)
    if (head._tag === "Some") at = Math.min(at, PoolState.opening(config, state, head.value[1].request, now).at)
    for (const waiter of RedBlackTree.values(queue)) at = Math.min(at, waiter.until)
  }
  return at
}

/** Whether a wait until then cannot end well. */
const isHopeless = ({ earliest }: PoolState.OpeningTime, until: number): boolean =>
  earliest > until || earliest === Infinity

/** The waiters of a lane want the same PoolState.keys, so that what blocks its head blocks it whole. */
const laneOf = (request: PoolState.Request): string =>
  `${request.only === undefined ? "" : request.call}\n${request.model ?? ""}`

const waitersOf = (state: PoolState.PoolState, lane: string): ReadonlyArray<PoolState.Waiter> => {
  const queue = HashMap.get(state.rest.lanes, lane)
  return queue._tag === "None" ? [] : [...RedBlackTree.values(queue.value)]
}

/** The waiter of the oldest call among the lanes that are not blocked. */
const firstWaiter = (
  state: PoolState.PoolState,
  blocked: ReadonlySet<string>
): { readonly lane: string; readonly waiter: PoolState.Waiter } | undefined => {
  let first: { readonly lane: string; readonly waiter: PoolState.Waiter } | undefined
  for (const [lane, queue] of state.rest.lanes) {
    if (blocked.has(lane)) continue
    const head = RedBlackTree.first(queue)
    if (head._tag === "Some" && (first === undefined || head.value[0] < first.waiter.request.call)) {
      first = { lane, waiter: head.value[1] }
    }
  }
  return first
}

const byNumber: Order.Order<number> = (a, b) => a < b ? -1 : a > b ? 1 : 0
