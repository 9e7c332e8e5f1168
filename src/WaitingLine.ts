/**
 * Who waits for a key, in lanes by model and in order of their turns; and how they are served.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as RedBlackTree from "effect/RedBlackTree"
import type * as KeyState from "./KeyState.js"
import * as Latency from "./Latency.js"
import * as Leasing from "./Leasing.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"
import * as ProviderHealth from "./ProviderHealth.js"
import * as SlotMap from "./SlotMap.js"
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
  // Who has no time for what others find out about keys goes before those who have.
  const hurry = !served.state.rest.health.idle && wait.until < now + ProviderHealth.suspectMillis
  const lane = laneOf(request)
  const queue = HashMap.get(served.state.rest.lanes, lane)
  // Whoever waits there could not be served: no more can a newcomer. Where tokens count, the usual lanes are as one, or
  // small requests would come before a large one for ever.
  const first = queue._tag === "Some"
    ? headOf(served.state, lane, now)
    : served.state.rest.limits.metered && isUsual(served.state, lane)
    ? firstInUsual(served.state, now)
    : undefined
  const behind = first !== undefined &&
    !(hurry && Leasing.lease(config, served.state, { ...first.request, hurry }, now).lease !== undefined)
  const leased: Leasing.Leased = behind
    ? { state: served.state, lease: undefined, events: PoolState.noEvents }
    : Leasing.lease(config, served.state, hurry ? { ...request, hurry } : request, now)
  const events = served.events.length === 0 ? leased.events : [...served.events, ...leased.events]
  const answers = served.answers
  if (leased.lease !== undefined) return { state: leased.state, answers, events, outcome: leased.lease }
  const view = served.state.rest.line.view
  const call = request.call === 0 ? leased.state.calls + 1 : request.call
  const turn = PoolState.turnOf(request, call, now)
  const next = headOf(leased.state, lane, now)
  // What opens for the next in the lane does so for all behind, but for nobody before: that one may need less.
  const seen = next !== undefined && next.turn < turn && view !== undefined
    ? HashMap.get(view.lanes, lane)
    : Option.none()
  const opens = seen._tag === "Some"
    ? openingOf(config, leased.state, seen.value, now)
    : PoolState.opening(config, leased.state, request, now)
  const counted = request.call === 0 ? { ...leased.state, calls: call } : leased.state
  if (wait.until <= now || isHopeless(opens, wait.until)) return { state: counted, answers, events, outcome: "refused" }
  if (queue._tag === "Some" && comesTooLate(config, counted, request, queue.value, turn, wait.until, now)) {
    return { state: counted, answers, events, outcome: "refused" }
  }
  const last = counted.rest.waiting >= config.maxWaiters ? lastOf(counted) : undefined
  // Whoever comes before another takes that one's place in a line that is full.
  if (counted.rest.waiting >= config.maxWaiters && (last === undefined || last.turn < turn)) {
    return { state: counted, answers, events, outcome: "full" }
  }
  const left: Array<Answer> = [...answers]
  const room = last === undefined ? counted : refuse(counted, [last], left)
  const waiter: PoolState.Waiter = {
    request: { ...request, call },
    turn,
    since: now,
    until: wait.until,
    answer: wait.answer
  }
  return { state: withWaiter(room, waiter), answers: left, events, outcome: waiter }
}

/**
 * How many calls wait that come before a new one of normal priority: those of its lane.
 *
 * @since 0.1.0
 * @category getters
 */
export const ahead = (state: PoolState.PoolState, request: PoolState.Request): number =>
  Option.match(HashMap.get(state.rest.lanes, laneOf(request)), { onNone: () => 0, onSome: RedBlackTree.size })

/**
 * Serves those who wait, in order, as far as keys can serve; refuses those whose wait cannot end in time.
 *
 * Most lanes are usual ones: nothing is held against a key for their model, so that what blocks one of them blocks them
 * all, and none of the others is looked at. Of the lanes that differ it is remembered when they open, and only the keys
 * that changed since are looked at again.
 *
 * @since 0.1.0
 * @category steps
 */
export const dispatch = (config: PoolState.Config, state: PoolState.PoolState, now: number): Dispatched => {
  if (state.rest.waiting === 0) return { state, answers: [], events: PoolState.noEvents }
  const answers: Array<Answer> = []
  if (state.rest.closed) {
    return { state: refuseWhile(state, () => true, answers), answers, events: PoolState.noEvents }
  }
  const events: Array<Telemetry.Unnumbered> = []
  // Too late: they do not hold up the next in line.
  let next = refuseWhile(state, (until) => until < now, answers)
  if (now >= next.nextOpening) next = Places.reopen(config, next, now)
  for (;;) {
    next = serve(config, look(config, next, now), now, answers, events)
    const before = next
    next = refuseWhile(before, (until) => until <= now, answers)
    // Whoever stood behind them may need less, and is to be seen anew.
    if (next !== before) continue
    const left = refuseHopeless(config, next, now, answers)
    next = left.state
    if (!left.again) return { state: next, answers, events }
  }
}

/** Serves those who wait, in order, as far as keys can serve. */
const serve = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  now: number,
  answers: Array<Answer>,
  events: Array<Telemetry.Unnumbered>
): PoolState.PoolState => {
  let next = state
  const blocked = new Set<string>()
  let usualBlocked = false
  while (next.rest.waiting > 0) {
    const usual = usualBlocked ? undefined : firstUsual(config, next, blocked, now)
    const own = firstOwn(config, next, blocked, now)
    const head = own === undefined || (usual !== undefined && usual.turn < own.turn) ? usual : own
    if (head === undefined) break
    const leased = Leasing.lease(config, next, head.request, now)
    if (leased.lease === undefined) {
      next = leased.state
      // What holds back one model at one origin of several says nothing of the other lanes.
      if (head === usual && PoolState.heldUntil(config, next, head.request.model, now) === undefined) {
        usualBlocked = true
      } else blocked.add(laneOf(head.request))
      continue
    }
    next = look(config, withoutWaiter(leased.state, head), now)
    answers.push({ _tag: "Granted", waiter: head, lease: leased.lease })
    events.push(...leased.events)
  }
  return next
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
  if (queue._tag === "None" || !RedBlackTree.has(queue.value, waiter.turn)) return state
  const { turn } = waiter
  const { line, waiting } = state.rest
  const left = RedBlackTree.removeFirst(queue.value, turn)
  const isLast = RedBlackTree.size(left) === 0
  let heads = line.heads
  if (RedBlackTree.has(heads, turn)) {
    heads = RedBlackTree.removeFirst(heads, turn)
    const head = RedBlackTree.first(left)
    if (head._tag === "Some") heads = RedBlackTree.insert(heads, head.value[0], lane)
  }
  return {
    ...state,
    rest: {
      ...state.rest,
      lanes: isLast ? HashMap.remove(state.rest.lanes, lane) : HashMap.set(state.rest.lanes, lane, left),
      waiting: waiting - 1,
      line: waiting === 1 ? PoolState.nobody : {
        heads,
        ends: withoutEnd(line.ends, waiter),
        picky: isLast && waiter.request.only !== undefined ? HashMap.remove(line.picky, lane) : line.picky,
        view: isLast && line.view !== undefined && HashMap.has(line.view.lanes, lane)
          ? { ...line.view, lanes: HashMap.remove(line.view.lanes, lane) }
          : line.view,
        usualFrom: line.usualFrom
      }
    }
  }
}

/**
 * Whether a waiter still stands in the queue.
 *
 * @since 0.1.0
 * @category getters
 */
export const isWaiting = (state: PoolState.PoolState, waiter: PoolState.Waiter): boolean => {
  const queue = HashMap.get(state.rest.lanes, laneOf(waiter.request))
  return queue._tag === "Some" && RedBlackTree.has(queue.value, waiter.turn)
}

/**
 * When to look at the queue next: at the first opening that serves somebody, or when the first one gives up.
 *
 * @since 0.1.0
 * @category getters
 */
export const nextWake = (config: PoolState.Config, state: PoolState.PoolState, now: number): number => {
  if (state.rest.waiting === 0) return Infinity
  const looked = look(config, state, now)
  const end = RedBlackTree.first(looked.rest.line.ends)
  let at = end._tag === "Some" ? end.value[0] : Infinity
  for (const [, lane] of viewOf(looked)) at = Math.min(at, openingOf(config, looked, lane, now).at)
  const consider = (lane: string): void => {
    const head = isUsual(looked, lane) ? headOf(looked, lane, now) : undefined
    if (head === undefined) return
    const gates = PoolState.nearest(config, looked, anyOf(head), now)
    at = Math.min(at, PoolState.withHealth(config, looked, head.request, gates, now).at)
  }
  const { health } = looked.rest
  // Where the provider is well, one of these lanes is as the other; but for those whose keys others are trying.
  const doubted = new Set(ProviderHealth.doubtedModels(health).map((model) => laneOf({ model, only: undefined })))
  for (const lane of doubted) consider(lane)
  for (const [, lane] of looked.rest.line.heads) {
    if (doubted.has(lane)) continue
    consider(lane)
    if (isUsual(looked, lane) && !ProviderHealth.isGating(health)) break
  }
  return at
}

// --------------------------------------------------------------------------------------------------------------- lanes

/** The waiters of a lane want the same keys, so that what blocks its head blocks it whole. */
const laneOf = ({ call, lane, model, only }: LaneRequest): string =>
  (only === undefined ? "" : lane === undefined ? `${call}` : JSON.stringify(lane)) +
  (model === undefined ? "" : `\n${model}`)

type LaneRequest = Pick<PoolState.Request, "model" | "only" | "lane"> & { readonly call?: number }

const withWaiter = (state: PoolState.PoolState, waiter: PoolState.Waiter): PoolState.PoolState => {
  const { request, turn, until } = waiter
  const { line } = state.rest
  const lane = laneOf(request)
  const queue = Option.getOrElse(
    HashMap.get(state.rest.lanes, lane),
    () => RedBlackTree.empty<bigint, PoolState.Waiter>(PoolState.byTurn)
  )
  const before = Option.getOrUndefined(RedBlackTree.first(queue))?.[0]
  let heads = line.heads
  if (before === undefined || turn < before) {
    if (before !== undefined) heads = RedBlackTree.removeFirst(heads, before)
    heads = RedBlackTree.insert(heads, turn, lane)
  }
  const own = line.view === undefined ? undefined : Option.getOrUndefined(HashMap.get(line.view.lanes, lane))
  return {
    ...state,
    rest: {
      ...state.rest,
      lanes: HashMap.set(state.rest.lanes, lane, RedBlackTree.insert(queue, turn, waiter)),
      waiting: state.rest.waiting + 1,
      line: {
        heads,
        ends: withEnd(line.ends, waiter),
        picky: request.only === undefined ? line.picky : HashMap.set(line.picky, lane, true),
        view: line.view !== undefined && own !== undefined && until < own.from
          ? { ...line.view, lanes: HashMap.set(line.view.lanes, lane, { ...own, from: until }) }
          : line.view,
        usualFrom: Math.min(line.usualFrom, until)
      }
    }
  }
}

type Ends = PoolState.Line["ends"]

const endsAt = (ends: Ends, until: number) =>
  Option.getOrElse(RedBlackTree.findFirst(ends, until), () => HashMap.empty<number, PoolState.Waiter>())

const withEnd = (ends: Ends, waiter: PoolState.Waiter): Ends =>
  RedBlackTree.insert(
    RedBlackTree.removeFirst(ends, waiter.until),
    waiter.until,
    HashMap.set(endsAt(ends, waiter.until), waiter.request.call, waiter)
  )

const withoutEnd = (ends: Ends, waiter: PoolState.Waiter): Ends => {
  const others = HashMap.remove(endsAt(ends, waiter.until), waiter.request.call)
  const without = RedBlackTree.removeFirst(ends, waiter.until)
  return HashMap.size(others) === 0 ? without : RedBlackTree.insert(without, waiter.until, others)
}

/** Of the lanes that are like any other and not held back by the provider's breakers, the waiter whose turn it is. */
const firstUsual = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  blocked: ReadonlySet<string>,
  now: number
): PoolState.Waiter | undefined => {
  let first: PoolState.Waiter | undefined
  for (const [, lane] of state.rest.line.heads) {
    if (blocked.has(lane) || !isUsual(state, lane)) continue
    const head = headOf(state, lane, now)
    if (!ProviderHealth.isGating(state.rest.health)) return head
    if (head === undefined || typeof PoolState.heldUntil(config, state, head.request.model, now) === "number") continue
    first = sooner(state, first, head)
  }
  return first
}

/** Whose turn it is: the first in order, but probes of the provider go round all calls. */
const sooner = (
  state: PoolState.PoolState,
  a: PoolState.Waiter | undefined,
  b: PoolState.Waiter
): PoolState.Waiter => {
  if (a === undefined) return b
  const hadTurn = ({ request, turn }: PoolState.Waiter) => {
    const trial = PoolState.trialOf(state, request.model)
    return trial?.prober !== undefined && turn <= trial.prober
  }
  const [isLater, isLaterToo] = [hadTurn(a), hadTurn(b)]
  return isLater === isLaterToo ? a.turn < b.turn ? a : b : isLater ? b : a
}

/** Of the lanes that are like any other, the waiter who is next. */
const firstInUsual = (state: PoolState.PoolState, now: number): PoolState.Waiter | undefined => {
  for (const [, lane] of state.rest.line.heads) if (isUsual(state, lane)) return headOf(state, lane, now)
  return undefined
}

/** Who comes last of all. */
const lastOf = (state: PoolState.PoolState): PoolState.Waiter | undefined => {
  let last: PoolState.Waiter | undefined
  for (const [, queue] of state.rest.lanes) {
    const waiter = Option.getOrUndefined(RedBlackTree.last(queue))?.[1]
    if (waiter !== undefined && (last === undefined || last.turn < waiter.turn)) last = waiter
  }
  return last
}

const isUsual = (state: PoolState.PoolState, lane: string): boolean => {
  const own = state.rest.line.view?.lanes
  return own === undefined || !HashMap.has(own, lane)
}

/** Of the lanes that differ and may be open, the waiter who is next. */
const firstOwn = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  blocked: ReadonlySet<string>,
  now: number
): PoolState.Waiter | undefined => {
  let first: PoolState.Waiter | undefined
  for (const [lane, view] of viewOf(state)) {
    if (blocked.has(lane) || openingOf(config, state, view, now).at > now) continue
    const head = headOf(state, lane, now)
    if (head !== undefined) first = sooner(state, first, head)
  }
  return first
}

/**
 * Who is next in a lane: the first in order, or after a probe of the provider the one behind that. Those whose answer
 * would come too late, as answers usually take, let others go first who can still be answered in time.
 */
const headOf = (state: PoolState.PoolState, lane: string, now: number): PoolState.Waiter | undefined => {
  const queue = HashMap.get(state.rest.lanes, lane)
  if (queue._tag === "None") return undefined
  const first = Option.getOrUndefined(RedBlackTree.first(queue.value))?.[1]
  const trial = first === undefined ? undefined : PoolState.trialOf(state, first.request.model)
  if (trial?.prober === undefined) {
    return first === undefined || now <= lastStart(state, first.request)
      ? first
      : inTime(state, queue.value, now) ?? first
  }
  for (const [, next] of RedBlackTree.greaterThan(queue.value, trial.prober)) return next
  return first
}

/** The first in a lane who can be answered in time; not looked for among too many who cannot. */
const inTime = (
  state: PoolState.PoolState,
  queue: RedBlackTree.RedBlackTree<bigint, PoolState.Waiter>,
  now: number
): PoolState.Waiter | undefined => {
  let passed = 0
  for (const [, waiter] of queue) {
    if (now <= lastStart(state, waiter.request)) return waiter
    if (++passed >= mostPassed) return undefined
  }
  return undefined
}

const mostPassed = 256

/** When the attempt of a call must begin to be answered before its budget or deadline ends, as most are. */
const lastStart = (state: PoolState.PoolState, { ends, timed }: PoolState.Request): number =>
  ends === undefined || timed === undefined || state.latency.length === 0
    ? Infinity
    : ends - (Latency.quantile(state.latency, timed, mostAnswered) ?? 0)

const mostAnswered = 0.9

// ------------------------------------------------------------------------------------------------------------ refusals

const refuse = (
  state: PoolState.PoolState,
  waiters: Iterable<PoolState.Waiter>,
  answers: Array<Answer>
): PoolState.PoolState => {
  let next = state
  for (const waiter of waiters) {
    next = withoutWaiter(next, waiter)
    answers.push({ _tag: "Refused", waiter })
  }
  return next
}

/** Refuses those who give up first, as long as their end `isOver`. */
const refuseWhile = (
  state: PoolState.PoolState,
  isOver: (until: number) => boolean,
  answers: Array<Answer>
): PoolState.PoolState => {
  let next = state
  for (const [until, waiters] of state.rest.line.ends) {
    if (!isOver(until)) break
    next = refuse(next, HashMap.values(waiters), answers)
  }
  return next
}

/** Whether a wait until then cannot end well. */
const isHopeless = ({ earliest }: PoolState.OpeningTime, until: number): boolean =>
  earliest > until || earliest === Infinity

/** Whether so many come before in the lane that a call's turn comes after its end, by what is known for certain. */
const comesTooLate = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  request: PoolState.Request,
  queue: RedBlackTree.RedBlackTree<bigint, PoolState.Waiter>,
  turn: bigint,
  until: number,
  now: number
): boolean => {
  const last = lastStart(state, request)
  // Who would be late in any case comes too late only when nothing may begin any more.
  const end = last > now ? Math.min(until, last) : until
  const opens = PoolState.openings(config, state, request, now, end, RedBlackTree.size(queue) + 1)
  if (opens === undefined) return false
  let taken = 0
  for (const [other, waiter] of queue) {
    if (other > turn) break
    // Who gives up before the next key opens takes none, nor does who lets others go first.
    const gives = end < until ? Math.min(waiter.until, lastStart(state, waiter.request)) : waiter.until
    if ((opens[taken] ?? Infinity) <= gives) taken++
  }
  return taken >= opens.length
}

/**
 * Refuses those whose wait cannot end well; looks at them only where that may have become so since the last time. Where
 * tokens count, what is too late for the first of a lane may not be for one behind, who needs less: then only those go
 * who need as much, and it is to be seen `again` who can be served.
 */
const refuseHopeless = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  now: number,
  answers: Array<Answer>
): { readonly state: PoolState.PoolState; readonly again: boolean } => {
  if (state.rest.waiting === 0) return { state, again: false }
  let next = state
  let again = false
  const own = state.rest.line.view?.lanes
  for (const [lane, view] of viewOf(state)) {
    const opens = openingOf(config, state, view, now)
    if (opens.earliest > view.from) {
      const queue = HashMap.get(next.rest.lanes, lane)
      const waiters = queue._tag === "None" ? [] : [...RedBlackTree.values(queue.value)]
      const hopeless = waiters.filter(({ until }) => isHopeless(opens, until))
      const head = PoolState.isMetered(state, view.request.model) ? headOf(next, lane, now) : undefined
      if (head !== undefined && isHopeless(opens, head.until)) {
        next = refuse(next, goneWith(config, next, head, view.request, hopeless, now), answers)
        again = true
        continue
      }
      next = refuse(next, hopeless, answers)
    }
    // An opening that is not ahead makes nobody's wait hopeless, whichever it was.
    if (view.from > now || opens.earliest > now) next = withLane(next, lane, opens.earliest)
  }
  const first = firstInUsual(next, now)
  const opens = PoolState.opening(config, next, anyOf(first), now)
  if (opens.earliest > next.rest.line.usualFrom) {
    const hopeless: Array<PoolState.Waiter> = []
    for (const [until, waiters] of next.rest.line.ends) {
      if (!isHopeless(opens, until)) break
      for (const waiter of HashMap.values(waiters)) {
        if (own === undefined || !HashMap.has(own, laneOf(waiter.request))) hopeless.push(waiter)
      }
    }
    if (first !== undefined && next.rest.limits.metered && isHopeless(opens, first.until)) {
      return { state: refuse(next, goneWith(config, next, first, anyOf(first), hopeless, now), answers), again: true }
    }
    next = refuse(next, hopeless, answers)
  }
  return {
    state: opens.earliest === next.rest.line.usualFrom
      ? next
      : { ...next, rest: { ...next.rest, line: { ...next.rest.line, usualFrom: opens.earliest } } },
    again
  }
}

/** Of those for whom what the first needs is there too late, who needs as much, or has no time for the least of it all. */
const goneWith = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  first: PoolState.Waiter,
  wanted: PoolState.Wanted,
  waiters: ReadonlyArray<PoolState.Waiter>,
  now: number
): ReadonlyArray<PoolState.Waiter> => {
  const least = waiters.reduce(
    ({ input, maxOutput }, { request: { tokens } }) => ({
      input: Math.min(input, tokens?.input ?? 0),
      maxOutput: Math.min(maxOutput, tokens?.maxOutput ?? 0)
    }),
    { input: Infinity, maxOutput: Infinity }
  )
  const opens = PoolState.opening(config, state, { ...wanted, tokens: least }, now)
  const needsAsMuch = needsAsMuchAs(first)
  return waiters.filter((waiter) => needsAsMuch(waiter) || isHopeless(opens, waiter.until))
}

/** Whether what is too late for one is so for another as well; it is for itself. */
const needsAsMuchAs = ({ request: { tokens } }: PoolState.Waiter) => ({ request }: PoolState.Waiter): boolean =>
  request.tokens === tokens ||
  (isAtLeast(request.tokens?.input, tokens?.input) && isAtLeast(request.tokens?.maxOutput, tokens?.maxOutput))

/** Of what is not told nobody knows whether it is less. */
const isAtLeast = (amount: number | undefined, other: number | undefined): boolean =>
  amount === other || (amount !== undefined && other !== undefined && amount >= other)

/** Remembers that a lane holds nobody any more who gives up before `from`. */
const withLane = (state: PoolState.PoolState, lane: string, from: number): PoolState.PoolState => {
  const { line } = state.rest
  const found = line.view === undefined ? Option.none() : HashMap.get(line.view.lanes, lane)
  if (line.view === undefined || found._tag === "None" || found.value.from === from) return state
  const view = { ...line.view, lanes: HashMap.set(line.view.lanes, lane, { ...found.value, from }) }
  return { ...state, rest: { ...state.rest, line: { ...line, view } } }
}

// ---------------------------------------------------------------------------------------------------------------- view

/** The lanes that differ from the others. */
const ownLanes = (state: PoolState.PoolState, now: number): ReadonlyArray<string> => {
  const { lanes, limits, line: { picky }, models, restricted } = state.rest
  const size = HashMap.size(models) + HashMap.size(limits.models)
  if (!restricted && size === 0) return [...HashMap.keys(picky)]
  if (restricted) return [...HashMap.keys(lanes)].filter((lane) => lane !== laneOf(anyModel))
  const differing = HashMap.size(lanes) <= size
    ? [...HashMap.keys(lanes)].filter((lane) => {
      const request = headOf(state, lane, now)?.request
      return request?.only === undefined && request?.model !== undefined &&
        (HashMap.has(models, request.model) || HashMap.has(limits.models, request.model))
    })
    : [...new Set([...HashMap.keys(models), ...HashMap.keys(limits.models)])].map((model) =>
      laneOf({ model, only: undefined })
    ).filter((lane) => HashMap.has(lanes, lane))
  return [...HashMap.keys(picky), ...differing]
}

/** Brings up to date what is known of the lanes that differ. */
const look = (config: PoolState.Config, state: PoolState.PoolState, now: number): PoolState.PoolState => {
  const { line, waiting } = state.rest
  const { view } = line
  const own = waiting === 0 ? [] : ownLanes(state, now)
  if (own.length === 0) {
    return view === undefined
      ? state
      : { ...state, rest: { ...state.rest, line: { ...line, view: undefined, usualFrom: -Infinity } } }
  }
  const { groups, limits, models, restricted } = state.rest
  // What a key's own limits do shows in the key.
  const isSame = view !== undefined && view.restricted === restricted && view.groups === groups &&
    (!limits.metered || view.limits.groups === limits.groups)
  const changed = view === undefined ? [] : SlotMap.changes(view.slots, state.slots)
  const isSameKind = view !== undefined && view.restricted === restricted && view.models === models &&
    view.limits.kinds === limits.kinds
  let lanes: PoolState.View["lanes"] = HashMap.empty()
  if (view !== undefined) {
    lanes = view.lanes
    // Who no longer differs is one of the usual.
    if (!isSameKind) {
      const current = new Set(own)
      for (const lane of HashMap.keys(lanes)) if (!current.has(lane)) lanes = HashMap.remove(lanes, lane)
    }
  }
  for (const lane of own) {
    const known = Option.getOrUndefined(HashMap.get(lanes, lane))
    const ofModel = limitsOf(limits, known?.request.model)
    const costs = PoolState.isMetered(state, known?.request.model)
    const request = (costs ? undefined : known?.request) ?? headOf(state, lane, now)?.request
    if (request === undefined) continue
    const stays = known !== undefined && isSame && now < known.at && changed.length <= manyChanges &&
      (!costs || known.request.tokens === request.tokens) && (request.model === undefined ||
        (benchesOf(view.models, request.model) === benchesOf(models, request.model) &&
          limitsOf(view.limits, request.model)?.groups === ofModel?.groups))
    const seen = stays ? recall(config, state, known, changed, now) : undefined
    const after = seen ?? survey(config, state, request, known?.from ?? -Infinity, now)
    if (after !== known) lanes = HashMap.set(lanes, lane, after)
  }
  return {
    ...state,
    rest: {
      ...state.rest,
      line: {
        ...line,
        view: { slots: state.slots, groups, models, limits, restricted, lanes },
        usualFrom: isSameKind ? line.usualFrom : -Infinity
      }
    }
  }
}

const limitsOf = (limits: PoolState.Limits, model: string | undefined) =>
  model === undefined ? undefined : Option.getOrUndefined(HashMap.get(limits.models, model))

const benchesOf = (models: PoolState.Rest["models"], model: string) => Option.getOrUndefined(HashMap.get(models, model))

const viewOf = (state: PoolState.PoolState): Iterable<readonly [string, PoolState.LaneView]> =>
  state.rest.line.view?.lanes ?? []

/** When a lane opens, by what is known of it. */
const openingOf = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  view: PoolState.LaneView,
  now: number
): PoolState.OpeningTime =>
  PoolState.withHealth(
    config,
    state,
    view.request,
    view.open.length > 0 ? { at: now, earliest: now, breakableAt: Infinity } : view,
    now
  )

/** All keys, looked at for one lane. */
const survey = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  { floor, model, only, tokens }: PoolState.Wanted,
  from: number,
  now: number
): PoolState.LaneView => {
  const open: Array<number> = []
  let nearest: Omit<PoolState.LaneView, "request" | "open" | "from"> = {
    at: Infinity,
    earliest: Infinity,
    breakableAt: Infinity,
    atSlot: -1,
    earliestSlot: -1
  }
  SlotMap.find(state.slots, (key) => {
    if (only?.(key.key) === false) return false
    const closed = PoolState.requestGate(config, state, key, model, now, tokens)
    if (closed === undefined) open.push(key.slot)
    else nearest = nearer(nearest, closed, key.slot)
    return false
  })
  return { ...nearest, request: { floor, model, only, tokens }, open, from }
}

/** A lane after some keys changed; `undefined` when the nearest of them went away, so that all must be looked at. */
const recall = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  known: PoolState.LaneView,
  changed: ReadonlyArray<number>,
  now: number
): PoolState.LaneView | undefined => {
  const { model, only, tokens } = known.request
  let view = known
  for (const slot of changed) {
    const key = SlotMap.get(state.slots, slot)
    const suits = key !== undefined && only?.(key.key) !== false
    const closed = suits ? PoolState.requestGate(config, state, key, model, now, tokens) : never
    const wasOpen = view.open.includes(slot)
    if (closed === undefined) {
      if (!wasOpen) view = { ...view, open: [...view.open, slot] }
      continue
    }
    if (wasOpen) view = { ...view, open: view.open.filter((other) => other !== slot) }
    if (slot === view.atSlot && (closed.until !== view.at || closed.breakableAt !== view.breakableAt)) return undefined
    if (slot === view.earliestSlot && closed.earliest > view.earliest) return undefined
    view = nearer(view, closed, slot)
  }
  return view
}

const nearer = <A extends Omit<PoolState.LaneView, "request" | "open" | "from">>(
  view: A,
  { breakableAt, earliest, until }: Pick<KeyState.Closed, "until" | "earliest" | "breakableAt">,
  slot: number
): A => {
  // Of keys that open at the same time the first counts.
  const isFirst = until < view.at || (until === view.at && until !== Infinity && slot < view.atSlot)
  const isEarlier = earliest < view.earliest
  return !isFirst && !isEarlier ? view : {
    ...view,
    ...(isFirst ? { at: until, breakableAt, atSlot: slot } : {}),
    ...(isEarlier ? { earliest, earliestSlot: slot } : {})
  }
}

const never = { until: Infinity, earliest: Infinity, breakableAt: Infinity }

/** With more changes than this it is quicker to look at all keys. */
const manyChanges = 64

const anyModel: PoolState.Wanted = { model: undefined, only: undefined }

/** What keys must offer that serve one of the usual lanes: what the first of them costs. */
const anyOf = (first: PoolState.Waiter | undefined): PoolState.Wanted =>
  first === undefined ? anyModel : { ...anyModel, tokens: first.request.tokens }
