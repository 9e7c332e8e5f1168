/**
 * What processes share of one pool: the port. Behind it is an engine that all of them reach; where it cannot be reached,
 * each goes on with what it knows.
 *
 * No instant crosses the port, only durations from the moment of crossing, so that the clocks of two processes are never
 * compared: between processes the engine's own clock measures.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import { identity } from "effect/Function"
import * as HashMap from "effect/HashMap"
import * as HashSet from "effect/HashSet"
import * as Option from "effect/Option"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as DeclaredLimit from "./DeclaredLimit.js"
import type * as Fault from "./Fault.js"
import * as MonotonicTime from "./MonotonicTime.js"

/**
 * Of whom something is told: of a key or of a quota group, for one model or for all.
 *
 * @since 0.1.0
 * @category models
 */
export interface Subject {
  readonly scope: "key" | "group"
  /** A key's id, or a group's name. */
  readonly of: string
  readonly model?: string | undefined
}

/**
 * A cooldown as processes tell each other of it. Two of one subject merge by the maximum of their ends, firm and not, and
 * `refused` stays.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedCooldown {
  readonly subject: Subject
  readonly kind: Fault.Kind
  /** How much longer it lasts. 0 is worth telling: after a guess the way back is one trial. */
  readonly forMillis: number
  /** Its whole length. */
  readonly waitMillis: number
  /** How much of what remains is more than a guess; absent: nothing. */
  readonly firmMillis?: number | undefined
  readonly provenance: Fault.Provenance
  readonly refused: boolean
  readonly step: number
}

/**
 * Orders the transitions of a key's breaker, whoever made them: by `epoch`, then by `generation`. An engine that lost what
 * it knew begins a larger epoch.
 *
 * @since 0.1.0
 * @category models
 */
export interface Version {
  readonly epoch: number
  readonly generation: number
}

/**
 * Where a breaker stands, as processes tell each other of it. Half-open it is to nobody: who has the probe has claimed it.
 *
 * @since 0.1.0
 * @category models
 */
export type BreakerState =
  | { readonly _tag: "Closed"; readonly trips: number }
  | { readonly _tag: "Open"; readonly forMillis: number; readonly waitMillis: number; readonly trips: number }
  | { readonly _tag: "Isolated"; readonly trips: number }

/**
 * A key's breaker as it stands for all.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedBreaker {
  readonly keyId: string
  readonly version: Version
  readonly state: BreakerState
}

/**
 * What a process tells the others.
 *
 * - `Cooldown`: one was imposed here.
 * - `Lifted`: the cooldown of the subject is over, or was a mistake. It had at most `forMillis` left (negative: it ended so
 *   long ago); one that lasts longer than that by more than a second is another, of which was not known here: it stays.
 * - `Breaker`: a transition that was made here, on the version that was known here (`undefined`: none). It counts only if
 *   no other was made on that version before; a breaker of which the engine knows nothing takes any.
 * - `Reset`: by hand; everything held against the key, and its group, is forgotten everywhere. The breaker is closed with
 *   a new version.
 * - `Taken`: so much of a limit was taken here while the engine was away, or before it lost what it knew; it counts from
 *   now on for one window.
 *
 * @since 0.1.0
 * @category models
 */
export type Notice =
  | { readonly _tag: "Cooldown"; readonly cooldown: SharedCooldown }
  | { readonly _tag: "Lifted"; readonly subject: Subject; readonly forMillis: number }
  | {
    readonly _tag: "Breaker"
    readonly keyId: string
    readonly from: Version | undefined
    readonly to: BreakerState
  }
  | { readonly _tag: "Reset"; readonly keyId: string; readonly group?: string | undefined }
  | {
    readonly _tag: "Taken"
    readonly subject: Subject
    readonly unit: "requests" | "tokens"
    readonly limit: number
    readonly windowMillis: number
    readonly amount: number
  }

/**
 * What a process hears; nobody hears what he told himself.
 *
 * - `Joined`: the engine answers (again). `members` counts the processes that it hears of, this one included; the rest is
 *   all that it knows. `kept` is false when it had lost what it knew, or no longer knows what this process holds, because it
 *   counted it as gone: then the process tells again what it knows, and claims again what it holds.
 * - `Away`: the engine does not answer, once per outage. `members` is how many there were last. `problem` shows no secret.
 * - `Members`: how many there are now.
 * - `Cooldown`, `Lifted`, `Breaker`, `Reset`: what another has told, as far as the engine took it in.
 * - `Freed`: something was given back that another was refused for want of.
 *
 * @since 0.1.0
 * @category models
 */
export type News =
  | {
    readonly _tag: "Joined"
    readonly members: number
    readonly kept: boolean
    readonly cooldowns: ReadonlyArray<SharedCooldown>
    readonly breakers: ReadonlyArray<SharedBreaker>
  }
  | { readonly _tag: "Away"; readonly members: number; readonly problem: string }
  | { readonly _tag: "Members"; readonly members: number }
  | { readonly _tag: "Cooldown"; readonly cooldown: SharedCooldown }
  | { readonly _tag: "Lifted"; readonly subject: Subject; readonly forMillis: number }
  | { readonly _tag: "Breaker"; readonly breaker: SharedBreaker }
  | {
    readonly _tag: "Reset"
    readonly keyId: string
    readonly group?: string | undefined
    readonly version: Version
  }
  | { readonly _tag: "Freed"; readonly subject: Subject }

/**
 * One limit that an attempt must fit into, over all processes. What is more than the limit fits when nothing is taken.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedLimit {
  readonly subject: Subject
  readonly unit: "requests" | "tokens"
  readonly limit: number
  readonly windowMillis: number
  /** How much this attempt takes: 1 request, or so many tokens. */
  readonly amount: number
}

/**
 * What an attempt needs of what all processes share. It gets all of it or nothing.
 *
 * @since 0.1.0
 * @category models
 */
export interface Claim {
  readonly limits: ReadonlyArray<SharedLimit>
  readonly concurrency: ReadonlyArray<{ readonly subject: Subject; readonly most: number }>
  /**
   * The one probe of a half-open breaker, or the one trial after a cooldown: nobody else has it for so long. Nobody gets it
   * while the breaker (of a key without a model), or the cooldown, that the engine knows of the subject still lasts: who
   * asks has not heard of that yet, or is ahead of what it tells, and may ask again after a second at most.
   */
  readonly probes: ReadonlyArray<{ readonly subject: Subject; readonly forMillis: number }>
  /** The attempt is under way already, since before the engine answered: all of it is taken, whatever there is. */
  readonly held?: boolean | undefined
}

/**
 * What becomes of a claim.
 *
 * - `Refused`: nothing was taken. `subject` is whose limit, concurrency or probe it was; it does not fit before `forMillis`
 *   are over unless something is given back, of which `Freed` tells. `mayFree` says whether that can be: something is in
 *   flight. Of a limit, what is in flight and not answered yet is free again after one window at the earliest; of
 *   concurrency, `forMillis` is `Infinity`; a probe is over after its own `forMillis`.
 * - `Away`: the engine did not answer in time: local knowledge decides.
 *
 * @since 0.1.0
 * @category models
 */
export type Answer =
  | { readonly _tag: "Granted"; readonly ticket: Ticket }
  | {
    readonly _tag: "Refused"
    readonly gate: "limit" | "concurrency" | "probing"
    readonly subject: Subject
    readonly forMillis: number
    readonly mayFree: boolean
  }
  | { readonly _tag: "Away" }

/**
 * Names a claim that was granted.
 *
 * @since 0.1.0
 * @category models
 */
export interface Ticket {
  readonly id: string
}

/**
 * What became of an attempt with a ticket. `Answered`, at the headers or when it ended without any: its request counts for
 * one window from now. `Ended`: so many tokens count for one window from now (`undefined`: as many as were claimed),
 * concurrency and probes are free. `Unsent`: all is given back. `Ended` without `Answered` before is both. Who has a probe
 * tells its outcome before it ends; what is told of a subject (a transition, a cooldown, a lifted one) ends its probe.
 *
 * @since 0.1.0
 * @category models
 */
export type Settled =
  | { readonly _tag: "Answered" }
  | { readonly _tag: "Ended"; readonly tokens: number | undefined }
  | { readonly _tag: "Unsent" }

/**
 * What became of notices. `breakers` are, for each `Breaker` and `Reset` among them, how the key's breaker stands for all
 * now: as was told, or as another told before.
 *
 * @since 0.1.0
 * @category models
 */
export type Told =
  | { readonly _tag: "Told"; readonly breakers: ReadonlyArray<SharedBreaker> }
  | { readonly _tag: "Away" }

/**
 * What a pool has of an engine. None of it fails: what cannot be reached is `Away`.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedPool {
  /** Begins with `Joined` or `Away`. Read by one reader; nothing told by others since `Joined` is missing, or `Joined` comes again. */
  readonly news: Stream.Stream<News>
  /**
   * Tells the others, in this order, in at most one round trip and a bounded time. After `Away` nothing of it is kept: who
   * told it tells it again after `Joined`, if it is still so.
   */
  readonly tell: (notices: ReadonlyArray<Notice>) => Effect.Effect<Told>
  /** At most one round trip, and a bounded time (25 ms by default). A claim that is interrupted, or answered too late, is given back. */
  readonly claim: (claim: Claim) => Effect.Effect<Answer>
  /**
   * After how long a pool gives up a claim that the engine has not answered (default 25 ms), so that none can hold up a
   * call; what is granted later is given back, for a second nothing is claimed, and after a minute the claim is
   * interrupted. `Infinity`: the engine sees to it.
   */
  readonly claimTimeout?: Duration.DurationInput | undefined
  /**
   * Does not wait for the engine. While that is away, what became of each ticket is kept, and told before `Joined`: else it
   * would be held for ever. Tickets that the engine does not know (any more) change nothing.
   */
  readonly settle: (ticket: Ticket, settled: Settled) => Effect.Effect<void>
}

/**
 * A subject as one text, the same for the same subject and no other.
 *
 * @since 0.1.0
 * @category getters
 */
export const nameOf = ({ model, of, scope }: Subject): string => JSON.stringify([scope, of, model ?? null])

// --------------------------------------------------------------------------------------------------------------- memory

/**
 * An engine in memory, for pools of one program, and what can happen to it. Members are numbered from 0 in the order in
 * which pools joined it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Memory {
  /** What `PoolStore.Service` takes as `share`. */
  readonly share: (pool: string) => Effect.Effect<SharedPool, never, Scope.Scope>
  /** A member (default: every one) does not reach the engine any more; after 15 s the others do not count it. */
  readonly cutOff: (member?: number) => Effect.Effect<void>
  /** A member (default: every one) reaches it again. */
  readonly restore: (member?: number) => Effect.Effect<void>
  /** Every answer takes so long; a claim that would be answered after more than 25 ms is answered by `Away`. */
  readonly slow: (delay: Duration.DurationInput) => Effect.Effect<void>
  /** It forgets everything. */
  readonly loseAll: Effect.Effect<void>
}

/**
 * An engine in memory: pools of one program that have the same name share as processes do. All its times are of Effect's
 * clock.
 *
 * @example
 * ```ts
 * import { Effect, Layer } from "effect"
 * import * as PoolStore from "effect-keymesh/PoolStore"
 * import * as SharedPool from "effect-keymesh/SharedPool"
 *
 * const layerShared = Layer.effect(
 *   PoolStore.PoolStore,
 *   Effect.map(SharedPool.makeMemory, ({ share }) => ({ ...PoolStore.none, share }))
 * )
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeMemory: Effect.Effect<Memory> = Effect.map(Ref.make<World>(emptyWorld()), (ref): Memory => {
  const modify = <A>(f: (world: World, now: number) => readonly [A, World, ReadonlyArray<Delivery>]) =>
    Effect.uninterruptible(Effect.clockWith((clock) =>
      Effect.flatMap(
        Ref.modify(ref, (before) => {
          const now = MonotonicTime.nowOf(clock)
          const [expired, left] = expire(before, now)
          const [result, after, deliveries] = f(left, now)
          const told = deliver(after, [...expired, ...deliveries])
          return [Effect.as(told, result), after]
        }),
        identity
      )
    ))
  const update = (f: (world: World, now: number) => readonly [World, ReadonlyArray<Delivery>]) =>
    modify((world, now) => [undefined, ...f(world, now)])

  /** Lets the answer take its time; `Away` where it cannot come, or not within `most`. */
  const reach = <A>(
    member: number,
    most: number,
    f: (world: World, now: number) => readonly [A, World, ReadonlyArray<Delivery>]
  ): Effect.Effect<A | { readonly _tag: "Away" }> =>
    Effect.flatMap(Ref.get(ref), ({ delayMillis }) =>
      delayMillis > most
        ? Effect.as(Effect.sleep(most), away)
        : Effect.zipRight(
          delayMillis === 0 ? Effect.void : Effect.sleep(delayMillis),
          modify((world, now): readonly [A | typeof away, World, ReadonlyArray<Delivery>] =>
            isReached(world, member) ? f(world, now) : [away, world, []]
          )
        ))

  return {
    share: (pool) =>
      Effect.gen(function*() {
        const queue = yield* Effect.acquireRelease(Queue.unbounded<News>(), Queue.shutdown)
        const member = yield* Effect.acquireRelease(
          modify((world, now) => join(world, pool, queue, now)),
          (member) => update((world, now) => leave(world, member, now))
        )
        return {
          news: Stream.fromQueue(queue),
          claimTimeout: Infinity,
          tell: (notices) =>
            reach(member, tellMillis, (world, now): readonly [Told, World, ReadonlyArray<Delivery>] => {
              const [breakers, engine, news] = hear(engineOf(world, pool), notices, now)
              return [{ _tag: "Told", breakers }, withEngine(world, pool, engine), toOthers(world, pool, member, news)]
            }),
          claim: (claim) =>
            reach(member, claimMillis, (world, now): readonly [Answer, World, ReadonlyArray<Delivery>] => {
              const [answer, engine] = take(engineOf(world, pool), claim, member, now)
              return [answer, withEngine(world, pool, engine), []]
            }),
          settle: (ticket, settled) =>
            update((world, now) => {
              return isReached(world, member)
                ? settleAll(world, pool, [[ticket.id, settled]], now)
                : [keepSettled(world, member, [ticket.id, settled]), []]
            })
        } satisfies SharedPool
      }),
    cutOff: (member) => update((world, now) => cut(world, member, now)),
    restore: (member) => update((world, now) => rejoin(world, member, now)),
    slow: (delay) => Ref.update(ref, (world) => ({ ...world, delayMillis: Duration.toMillis(delay) })),
    loseAll: update((world, now) => lose(world, now))
  }
})

const away = { _tag: "Away" } as const

/** How long a claim and a notice may take, and after how long a member that is not heard of is gone. */
const claimMillis = 25
const tellMillis = 1_000
const memberMillis = 15_000
/** How long a guess is remembered after its end: the way back is one trial. */
const rememberedMillis = 86_400_000
/** Who is refused a probe because of what it does not know asks again after so long at most. */
const againMillis = 1_000
/** Instants that came to two processes by different ways differ by less. */
const sameMillis = 1_000

interface World {
  readonly engines: HashMap.HashMap<string, Engine>
  readonly members: HashMap.HashMap<number, Member>
  readonly joined: number
  readonly delayMillis: number
}

interface Member {
  readonly pool: string
  readonly queue: Queue.Queue<News>
  /** Since when it does not reach the engine. */
  readonly cutSince: number | undefined
  /** Whether it is counted. */
  readonly counted: boolean
  /** The epoch that it has heard all of. */
  readonly epoch: number
  /** What became of its tickets while it was cut off. */
  readonly unsettled: ReadonlyArray<readonly [ticket: string, settled: Settled]>
}

/** What the engine knows of one pool. */
interface Engine {
  readonly epoch: number
  readonly cooldowns: HashMap.HashMap<string, KnownCooldown>
  readonly breakers: HashMap.HashMap<string, KnownBreaker>
  readonly probes: HashMap.HashMap<string, { readonly ticket: string; readonly until: number }>
  /** What of each limit is taken. */
  readonly limits: HashMap.HashMap<string, DeclaredLimit.DeclaredLimit>
  /** The tickets that hold some of the concurrency of a subject. */
  readonly concurrency: HashMap.HashMap<string, HashSet.HashSet<string>>
  readonly tickets: HashMap.HashMap<string, Held>
  readonly granted: number
  /** Who was refused for want of what a subject has too little of. */
  readonly wanting: HashMap.HashMap<string, HashSet.HashSet<number>>
}

interface KnownCooldown {
  readonly cooldown: SharedCooldown
  readonly until: number
  readonly firm: number
}

interface KnownBreaker {
  readonly version: Version
  readonly state: BreakerState
  readonly until: number
}

interface Held {
  readonly member: number
  readonly claim: Claim
  /** Whether its requests count already. */
  readonly answered: boolean
}

type Delivery = readonly [member: number, news: News]

function emptyWorld(): World {
  return { engines: HashMap.empty(), members: HashMap.empty(), joined: 0, delayMillis: 0 }
}

const emptyEngine = (epoch: number): Engine => ({
  epoch,
  cooldowns: HashMap.empty(),
  breakers: HashMap.empty(),
  probes: HashMap.empty(),
  limits: HashMap.empty(),
  concurrency: HashMap.empty(),
  tickets: HashMap.empty(),
  granted: 0,
  wanting: HashMap.empty()
})

const engineOf = (world: World, pool: string): Engine =>
  Option.getOrElse(HashMap.get(world.engines, pool), () => emptyEngine(1))

const withEngine = (world: World, pool: string, engine: Engine): World => ({
  ...world,
  engines: HashMap.set(world.engines, pool, engine)
})

const withMember = (world: World, number: number, member: Member): World => ({
  ...world,
  members: HashMap.set(world.members, number, member)
})

// ------------------------------------------------------------------------------------------------------------- members

const isReached = ({ members }: World, member: number): boolean => {
  const found = HashMap.get(members, member)
  return found._tag === "Some" && found.value.cutSince === undefined
}

const membersOf = (world: World, pool: string): ReadonlyArray<readonly [number, Member]> =>
  HashMap.toEntries(world.members).filter(([, member]) => member.pool === pool && member.counted)

const deliver = (world: World, deliveries: ReadonlyArray<Delivery>): Effect.Effect<void> =>
  Effect.forEach(deliveries, ([number, news]) => {
    const member = HashMap.get(world.members, number)
    if (member._tag === "None") return Effect.void
    // Who is cut off hears that, and nothing else.
    return member.value.cutSince !== undefined && news._tag !== "Away"
      ? Effect.void
      : Queue.offer(member.value.queue, news)
  }, { discard: true })

const toOthers = (world: World, pool: string, member: number, news: ReadonlyArray<News>): ReadonlyArray<Delivery> =>
  membersOf(world, pool).flatMap(([other]) => other === member ? [] : news.map((each): Delivery => [other, each]))

const countTold = (world: World, pool: string, except: number): ReadonlyArray<Delivery> =>
  toOthers(world, pool, except, [{ _tag: "Members", members: membersOf(world, pool).length }])

const join = (
  world: World,
  pool: string,
  queue: Queue.Queue<News>,
  now: number
): readonly [number, World, ReadonlyArray<Delivery>] => {
  const number = world.joined
  const engine = engineOf(world, pool)
  const member: Member = { pool, queue, cutSince: undefined, counted: true, epoch: engine.epoch, unsettled: [] }
  const after = withEngine(
    withMember({ ...world, joined: number + 1 }, number, member),
    pool,
    engine
  )
  return [number, after, [[number, allKnown(after, pool, true, now)], ...countTold(after, pool, number)]]
}

const leave = (world: World, number: number, now: number): readonly [World, ReadonlyArray<Delivery>] => {
  const member = HashMap.get(world.members, number)
  if (member._tag === "None") return [world, []]
  const left = { ...world, members: HashMap.remove(world.members, number) }
  const { pool } = member.value
  const [engine, freed] = reclaim(engineOf(left, pool), number, now)
  return [withEngine(left, pool, engine), [...freed, ...countTold(left, pool, number)]]
}

/** What a member held that is gone counts as answered now: nobody knows better. */
const reclaim = (engine: Engine, member: number, now: number): readonly [Engine, ReadonlyArray<Delivery>] => {
  let next = engine
  const deliveries: Array<Delivery> = []
  for (const [id, held] of engine.tickets) {
    if (held.member !== member) continue
    const [after, freed] = settleOne(next, id, { _tag: "Ended", tokens: undefined }, now)
    next = after
    deliveries.push(...freed)
  }
  return [next, deliveries]
}

/** Members that have not been heard of for so long are gone. */
const expire = (world: World, now: number): readonly [ReadonlyArray<Delivery>, World] => {
  let next = world
  const deliveries: Array<Delivery> = []
  for (const [number, member] of world.members) {
    if (!member.counted || member.cutSince === undefined || now < member.cutSince + memberMillis) continue
    const [engine, freed] = reclaim(engineOf(next, member.pool), number, now)
    next = withMember(withEngine(next, member.pool, engine), number, { ...member, counted: false })
    deliveries.push(...freed, ...countTold(next, member.pool, number))
  }
  return [deliveries, next]
}

const cut = (world: World, which: number | undefined, now: number): readonly [World, ReadonlyArray<Delivery>] => {
  let next = world
  const deliveries: Array<Delivery> = []
  for (const [number, member] of world.members) {
    if ((which !== undefined && which !== number) || member.cutSince !== undefined) continue
    next = withMember(next, number, { ...member, cutSince: now })
    deliveries.push([number, { _tag: "Away", members: membersOf(world, member.pool).length, problem: "it is cut off" }])
  }
  return [next, deliveries]
}

const rejoin = (world: World, which: number | undefined, now: number): readonly [World, ReadonlyArray<Delivery>] => {
  let next = world
  const joined: Array<readonly [number, Member, boolean]> = []
  const deliveries: Array<Delivery> = []
  for (const [number, member] of world.members) {
    if ((which !== undefined && which !== number) || member.cutSince === undefined) continue
    const { epoch } = engineOf(world, member.pool)
    const [settled, freed] = settleAll(next, member.pool, member.unsettled, now)
    deliveries.push(...freed)
    next = withMember(settled, number, { ...member, cutSince: undefined, counted: true, epoch, unsettled: [] })
    joined.push([number, member, member.counted && member.epoch === epoch])
  }
  return [
    next,
    [
      ...deliveries,
      ...joined.flatMap(([number, { counted, pool }, kept]) => [
        [number, allKnown(next, pool, kept, now)] as const,
        ...(counted ? [] : countTold(next, pool, number))
      ])
    ]
  ]
}

const lose = (world: World, now: number): readonly [World, ReadonlyArray<Delivery>] => {
  let next: World = world
  const deliveries: Array<Delivery> = []
  for (const [pool, { epoch, granted }] of world.engines) {
    next = withEngine(next, pool, { ...emptyEngine(epoch + 1), granted })
  }
  for (const [number, member] of world.members) {
    if (member.cutSince !== undefined) continue
    next = withMember(next, number, { ...member, epoch: engineOf(next, member.pool).epoch })
    deliveries.push([number, allKnown(next, member.pool, false, now)])
  }
  return [next, deliveries]
}

/** All that the engine knows of a pool, for a member that joins. */
const allKnown = (world: World, pool: string, kept: boolean, now: number): News => {
  const { breakers, cooldowns } = engineOf(world, pool)
  return {
    _tag: "Joined",
    members: membersOf(world, pool).length,
    kept,
    cooldowns: [...HashMap.values(cooldowns)].filter((known) => !isForgotten(known, now)).map((known) =>
      cooldownAt(known, now)
    ),
    breakers: HashMap.toEntries(breakers).map(([keyId, known]) => breakerAt(keyId, known, now))
  }
}

// ------------------------------------------------------------------------------------------------------------- notices

const hear = (
  engine: Engine,
  notices: ReadonlyArray<Notice>,
  now: number
): readonly [ReadonlyArray<SharedBreaker>, Engine, ReadonlyArray<News>] => {
  let next = engine
  const breakers: Array<SharedBreaker> = []
  const news: Array<News> = []
  const transit = (keyId: string, state: BreakerState) => {
    const before = Option.getOrUndefined(HashMap.get(next.breakers, keyId))
    const version = { epoch: next.epoch, generation: (before?.version.generation ?? 0) + 1 }
    const until = state._tag === "Open" ? now + state.forMillis : -Infinity
    next = withoutProbe(
      { ...next, breakers: HashMap.set(next.breakers, keyId, { version, state, until }) },
      { scope: "key", of: keyId }
    )
    return version
  }
  const current = (keyId: string) => {
    const known = HashMap.get(next.breakers, keyId)
    if (known._tag === "Some") breakers.push(breakerAt(keyId, known.value, now))
  }
  for (const notice of notices) {
    switch (notice._tag) {
      case "Cooldown": {
        const { subject } = notice.cooldown
        const name = nameOf(subject)
        const before = Option.getOrUndefined(HashMap.get(next.cooldowns, name))
        const after = merge(before, notice.cooldown, now)
        next = withoutProbe(next, subject)
        if (after === before) break
        next = { ...next, cooldowns: HashMap.set(next.cooldowns, name, after) }
        news.push({ _tag: "Cooldown", cooldown: cooldownAt(after, now) })
        break
      }
      case "Lifted": {
        const name = nameOf(notice.subject)
        const known = Option.getOrUndefined(HashMap.get(next.cooldowns, name))
        if (known !== undefined && known.until - now > notice.forMillis + sameMillis) break
        next = withoutProbe({ ...next, cooldowns: HashMap.remove(next.cooldowns, name) }, notice.subject)
        news.push(notice)
        break
      }
      case "Breaker": {
        const { from, keyId, to } = notice
        const known = HashMap.get(next.breakers, keyId)
        if (known._tag === "None" || isSame(known.value.version, from)) {
          news.push({ _tag: "Breaker", breaker: { keyId, version: transit(keyId, to), state: to } })
        }
        current(keyId)
        break
      }
      case "Reset": {
        const { group, keyId } = notice
        const version = transit(keyId, { _tag: "Closed", trips: 0 })
        const isOfBoth = ({ of, scope }: Subject) => scope === "key" ? of === keyId : of === group
        next = { ...next, cooldowns: HashMap.filter(next.cooldowns, ({ cooldown }) => !isOfBoth(cooldown.subject)) }
        news.push({ _tag: "Reset", keyId, group, version })
        current(keyId)
        break
      }
      case "Taken": {
        next = withLimit(next, notice, counted(limitOf(next, notice), 0, notice.amount, now))
        break
      }
    }
  }
  return [breakers, next, news]
}

const isSame = (a: Version, b: Version | undefined): boolean => a.epoch === b?.epoch && a.generation === b.generation

/** Two cooldowns of one subject: the same as before if the new one adds nothing. */
const merge = (before: KnownCooldown | undefined, cooldown: SharedCooldown, now: number): KnownCooldown => {
  const until = now + cooldown.forMillis
  const firm = cooldown.firmMillis === undefined ? -Infinity : now + cooldown.firmMillis
  if (before === undefined) return { cooldown, until, firm }
  const refused = before.cooldown.refused || cooldown.refused
  const [longer, end] = until > before.until ? [cooldown, until] : [before.cooldown, before.until]
  const step = before.cooldown.kind === cooldown.kind ? Math.max(before.cooldown.step, cooldown.step) : longer.step
  return end === before.until && firm <= before.firm && refused === before.cooldown.refused &&
      step === before.cooldown.step
    ? before
    : { cooldown: { ...longer, refused, step }, until: end, firm: Math.max(firm, before.firm) }
}

const cooldownAt = ({ cooldown, firm, until }: KnownCooldown, now: number): SharedCooldown => ({
  ...cooldown,
  forMillis: until - now,
  firmMillis: firm === -Infinity ? undefined : firm - now
})

const isForgotten = ({ cooldown, until }: KnownCooldown, now: number): boolean =>
  now >= until + (cooldown.refused || cooldown.provenance === "guessed" ? rememberedMillis : 0)

const breakerAt = (keyId: string, { state, until, version }: KnownBreaker, now: number): SharedBreaker => ({
  keyId,
  version,
  state: state._tag === "Open" ? { ...state, forMillis: Math.max(0, until - now) } : state
})

const withoutProbe = (engine: Engine, subject: Subject): Engine => ({
  ...engine,
  probes: HashMap.remove(engine.probes, nameOf(subject))
})

// -------------------------------------------------------------------------------------------------------------- claims

const take = (
  engine: Engine,
  claim: Claim,
  member: number,
  now: number
): readonly [Answer, Engine] => {
  const refusal = refuse(engine, claim, now)
  if (refusal !== undefined) {
    const name = nameOf(refusal.subject)
    const others = Option.getOrElse(HashMap.get(engine.wanting, name), () => HashSet.empty<number>())
    return [
      { _tag: "Refused", ...refusal },
      { ...engine, wanting: HashMap.set(engine.wanting, name, HashSet.add(others, member)) }
    ]
  }
  const granted = engine.granted + 1
  const id = `${member}:${granted}`
  const { limits } = claim.limits.reduce(
    (next, limit) => withLimit(next, limit, DeclaredLimit.hold(limitOf(next, limit), limit.amount)),
    engine
  )
  let { concurrency, probes } = engine
  for (const { subject } of claim.concurrency) {
    const name = nameOf(subject)
    const others = Option.getOrElse(HashMap.get(concurrency, name), () => HashSet.empty<string>())
    concurrency = HashMap.set(concurrency, name, HashSet.add(others, id))
  }
  for (const { forMillis, subject } of claim.probes) {
    probes = HashMap.set(probes, nameOf(subject), { ticket: id, until: now + forMillis })
  }
  const tickets = HashMap.set(engine.tickets, id, { member, claim, answered: false })
  return [{ _tag: "Granted", ticket: { id } }, { ...engine, limits, concurrency, probes, tickets, granted }]
}

type Refusal = Omit<Extract<Answer, { readonly _tag: "Refused" }>, "_tag">

/** Of all that does not fit, what fits last. */
const refuse = (engine: Engine, claim: Claim, now: number): Refusal | undefined => {
  if (claim.held === true) return undefined
  const refusals: Array<Refusal> = []
  for (const { subject } of claim.probes) {
    const probe = HashMap.get(engine.probes, nameOf(subject))
    if (probe._tag === "Some" && probe.value.until > now) {
      refusals.push({ gate: "probing", subject, forMillis: probe.value.until - now, mayFree: true })
    }
    const lasts = lastsFor(engine, subject, now)
    if (lasts > 0) {
      refusals.push({ gate: "probing", subject, forMillis: Math.min(againMillis, lasts), mayFree: true })
    }
  }
  for (const { most, subject } of claim.concurrency) {
    const held = HashMap.get(engine.concurrency, nameOf(subject))
    if (held._tag === "None" || HashSet.size(held.value) < most) continue
    refusals.push({ gate: "concurrency", subject, forMillis: Infinity, mayFree: true })
  }
  for (const limit of claim.limits) {
    const known = limitOf(engine, limit)
    const full = DeclaredLimit.gate(known, limit.amount, now)
    if (full === undefined) continue
    // What is in flight is free again after one window at the earliest.
    const forMillis = Math.min(full.until - now, limit.windowMillis)
    refusals.push({ gate: "limit", subject: limit.subject, forMillis, mayFree: known.held > 0 })
  }
  return refusals.reduce<Refusal | undefined>(
    (last, refusal) => last === undefined || refusal.forMillis > last.forMillis ? refusal : last,
    undefined
  )
}

/** For how long what a probe of the subject would end still lasts. */
const lastsFor = ({ breakers, cooldowns }: Engine, subject: Subject, now: number): number => {
  const cooldown = Option.getOrUndefined(HashMap.get(cooldowns, nameOf(subject)))?.until ?? now
  if (subject.scope !== "key" || subject.model !== undefined) return cooldown - now
  const breaker = Option.getOrUndefined(HashMap.get(breakers, subject.of))?.until ?? now
  return Math.max(cooldown, breaker) - now
}

type LimitName = Pick<SharedLimit, "subject" | "unit" | "windowMillis">

const limitName = ({ subject, unit, windowMillis }: LimitName): string => `${nameOf(subject)} ${unit} ${windowMillis}`

/** What is taken of a limit, however large it is by now: keys may be given others. */
const limitOf = (engine: Engine, limit: LimitName & Pick<SharedLimit, "limit">): DeclaredLimit.DeclaredLimit =>
  Option.match(HashMap.get(engine.limits, limitName(limit)), {
    onNone: () => DeclaredLimit.make(limit.unit, limit.limit, limit.windowMillis),
    onSome: (known) => DeclaredLimit.resized(known, limit.limit)
  })

const withLimit = (engine: Engine, name: LimitName, limit: DeclaredLimit.DeclaredLimit): Engine => ({
  ...engine,
  limits: HashMap.set(engine.limits, limitName(name), limit)
})

/** So much that was held counts as `amount` from now on. */
const counted = (limit: DeclaredLimit.DeclaredLimit, held: number, amount: number, now: number) =>
  amount > 0 ? DeclaredLimit.count(limit, held, amount, now) : DeclaredLimit.release(limit, held)

const keepSettled = (world: World, number: number, settled: Member["unsettled"][number]): World => {
  const member = HashMap.get(world.members, number)
  return member._tag === "None"
    ? world
    : withMember(world, number, { ...member.value, unsettled: [...member.value.unsettled, settled] })
}

const settleAll = (
  world: World,
  pool: string,
  all: Member["unsettled"],
  now: number
): readonly [World, ReadonlyArray<Delivery>] => {
  let engine = engineOf(world, pool)
  const deliveries: Array<Delivery> = []
  for (const [ticket, settled] of all) {
    const [next, freed] = settleOne(engine, ticket, settled, now)
    engine = next
    deliveries.push(...freed)
  }
  return [withEngine(world, pool, engine), deliveries]
}

const settleOne = (
  engine: Engine,
  id: string,
  settled: Settled,
  now: number
): readonly [Engine, ReadonlyArray<Delivery>] => {
  const ticket = HashMap.get(engine.tickets, id)
  if (ticket._tag === "None") return [engine, []]
  const { answered, claim } = ticket.value
  let next = engine
  const freed: Array<Subject> = []
  for (const limit of claim.limits) {
    // Tokens count at the end, requests with their answer.
    if (limit.unit === "tokens" ? settled._tag === "Answered" : answered) continue
    const counts = settled._tag === "Unsent"
      ? 0
      : settled._tag === "Ended" && limit.unit === "tokens"
      ? settled.tokens ?? limit.amount
      : limit.amount
    if (counts < limit.amount) freed.push(limit.subject)
    next = withLimit(next, limit, counted(limitOf(next, limit), limit.amount, counts, now))
  }
  if (settled._tag === "Answered") {
    return [{ ...next, tickets: HashMap.set(next.tickets, id, { ...ticket.value, answered: true }) }, []]
  }
  for (const { subject } of claim.concurrency) {
    freed.push(subject)
    const concurrency = HashMap.modify(next.concurrency, nameOf(subject), HashSet.remove(id))
    next = { ...next, concurrency }
  }
  for (const { subject } of claim.probes) {
    const probe = HashMap.get(next.probes, nameOf(subject))
    if (probe._tag === "None" || probe.value.ticket !== id) continue
    freed.push(subject)
    next = withoutProbe(next, subject)
  }
  const deliveries: Array<Delivery> = []
  for (const subject of freed) {
    const name = nameOf(subject)
    const wanting = HashMap.get(next.wanting, name)
    if (wanting._tag === "None") continue
    for (const member of wanting.value) deliveries.push([member, { _tag: "Freed", subject }])
    next = { ...next, wanting: HashMap.remove(next.wanting, name) }
  }
  return [{ ...next, tickets: HashMap.remove(next.tickets, id) }, deliveries]
}
