/**
 * A pool and the others of its name, in other processes: it tells them what happens here, takes in what they tell, and asks
 * for what all share, in one round trip before an attempt begins. Who shares nothing, or has nobody to ask, pays nothing.
 *
 * @since 0.1.0
 */
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import { identity } from "effect/Function"
import * as HashMap from "effect/HashMap"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import * as Stream from "effect/Stream"
import * as Claims from "./Claims.js"
import type * as Limits from "./Limits.js"
import * as MonotonicTime from "./MonotonicTime.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolKeys from "./PoolKeys.js"
import * as PoolState from "./PoolState.js"
import * as SharedPool from "./SharedPool.js"
import * as SharedState from "./SharedState.js"

// -------------------------------------------------------------------------------------------------------------- claims

/**
 * Asks for what a lease needs of what all share; false when it was refused, and has gone back. The wait for the answer is
 * interruptible: then it has gone back as well.
 *
 * @since 0.1.0
 * @category claims
 */
export const claim = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  restore: <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>,
  record: PoolState.LeaseRecord
): Effect.Effect<boolean> =>
  Effect.flatMap(Ref.get(core.state), (state) => {
    const claim = Claims.concerns(state, record) ? Claims.claimOf(core.config, state, record) : undefined
    if (claim === undefined) return isAsking(state) ? goOn(core, record, false) : granted
    return Effect.flatMap(Ref.get(sharing.link), ({ joined, members }) => {
      if (!joined) return decideAlone(core, sharing, record, claim, members)
      return Effect.gen(function*() {
        const { count } = yield* Ref.get(sharing.freed)
        const asking = yield* Effect.forkDaemon(sharing.port.claim(claim))
        const answer = yield* restore(Fiber.join(asking)).pipe(
          Effect.onInterrupt(() =>
            Effect.zipRight(
              Effect.forkDaemon(Effect.flatMap(Fiber.join(asking), (answer) => giveUp(sharing, answer))),
              PoolCore.step(core, (before, now) => Claims.unsent(core.config, before, record, now))
            )
          )
        )
        yield* noteAnswer(sharing, answer._tag !== "Away")
        switch (answer._tag) {
          case "Granted":
            sharing.leases.set(record.id, { claim, ticket: answer.ticket, answered: false })
            return yield* goOn(core, record, true)
          case "Refused": {
            const { last } = yield* Ref.get(sharing.freed)
            const since = Option.getOrElse(HashMap.get(last, SharedPool.nameOf(answer.subject)), () => 0)
            // What was given back while the answer was on its way may do.
            const refusal = since > count ? { ...answer, forMillis: 0 } : answer
            yield* PoolCore.step(core, (before, now) => Claims.refused(core.config, before, record, refusal, now))
            return false
          }
          case "Away":
            return yield* decideAlone(core, sharing, record, claim, members)
        }
      })
    })
  })

/** That nobody answers is told, whether the engine says so itself or not. */
const noteAnswer = ({ answering, answers }: PoolCore.Sharing, isAnswered: boolean): Effect.Effect<void> =>
  Effect.flatMap(
    Ref.getAndSet(answers, isAnswered),
    (before) => before === isAnswered ? Effect.void : Queue.offer(answering, isAnswered)
  )

const granted: Effect.Effect<boolean> = Effect.succeed(true)

const isAsking = ({ rest }: PoolState.PoolState): boolean => rest.elsewhere !== undefined

const goOn = (core: PoolCore.PoolCore, record: PoolState.LeaseRecord, isGranted: boolean): Effect.Effect<boolean> =>
  Effect.as(
    PoolCore.step(core, (before, now) => {
      const state = Claims.answered(core.config, before, record, isGranted, now)
      return state === undefined ? undefined : { state, events: PoolState.noEvents }
    }),
    true
  )

const giveUp = ({ port }: PoolCore.Sharing, answer: SharedPool.Answer): Effect.Effect<void> =>
  answer._tag === "Granted" ? port.settle(answer.ticket, { _tag: "Unsent" }) : Effect.void

/** Nobody could decide in time: the lease stays if it fits into this pool's own part; else it may ask again a little later. */
const decideAlone = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  record: PoolState.LeaseRecord,
  claim: SharedPool.Claim,
  members: number
): Effect.Effect<boolean> =>
  Effect.flatMap(
    PoolCore.modify(core, (before, now): readonly [boolean, PoolState.Changed | undefined] => {
      if (Claims.fitsPart(before, record, members, now)) return [true, undefined]
      const [limit, most] = [claim.limits[0], claim.concurrency[0]]
      const short = limit === undefined ? most : limit
      if (short === undefined) return [true, undefined]
      return [
        false,
        Claims.refused(core.config, before, record, {
          _tag: "Refused",
          gate: limit === undefined ? "concurrency" : "limit",
          subject: short.subject,
          forMillis: againMillis,
          mayFree: true
        }, now)
      ]
    }),
    (stays) => {
      if (!stays) return Effect.succeed(false)
      sharing.leases.set(record.id, { claim, ticket: undefined, answered: false })
      return goOn(core, record, false)
    }
  )

const againMillis = 1_000

/**
 * Tells what became of a lease, as far as it took of what is shared. Does not wait.
 *
 * @since 0.1.0
 * @category claims
 */
export const settled = (
  sharing: PoolCore.Sharing,
  lease: number,
  { answered, sent, usage }: Limits.Heard,
  end: boolean
): Effect.Effect<void> => {
  const held = sharing.leases.get(lease)
  if (held === undefined) return Effect.void
  const { claim, ticket } = held
  if (!end) {
    if (held.answered || !answered) return Effect.void
    sharing.leases.set(lease, { ...held, answered: true })
    noteLate(sharing, held, true, false, undefined)
    return ticket === undefined ? Effect.void : sharing.port.settle(ticket, { _tag: "Answered" })
  }
  sharing.leases.delete(lease)
  if (ticket === undefined) {
    if (sent) noteLate(sharing, held, !held.answered, true, usage)
    return Effect.void
  }
  if (!sent) return sharing.port.settle(ticket, { _tag: "Unsent" })
  const ended = { ...held, usage }
  // The others must know how a probe went before they may try again.
  return claim.probes.length === 0
    ? settle(sharing, ended)
    : Effect.zipRight(Ref.update(sharing.endings, (all) => [...all, ended]), Queue.offer(sharing.changed, undefined))
}

/**
 * While a pool joins the others, what it had taken before is told already, and what is under way is claimed only then:
 * nobody else would hear of what is answered in between.
 */
const noteLate = (
  { late }: PoolCore.Sharing,
  { claim, ticket }: PoolCore.SharedLease,
  requests: boolean,
  tokens: boolean,
  usage: PoolCore.SharedLease["usage"]
): void => {
  const before = MutableRef.get(late)
  if (before === undefined || ticket !== undefined) return
  const taken = claim.limits.flatMap(({ amount, ...limit }) => {
    if (limit.unit === "requests") return requests ? [{ _tag: "Taken" as const, ...limit, amount }] : []
    const used = usage === undefined ? amount : usage.input + usage.output
    return tokens ? [{ _tag: "Taken" as const, ...limit, amount: used }] : []
  })
  MutableRef.set(late, [...before, ...taken])
}

const settle = ({ port }: PoolCore.Sharing, { ticket, usage }: PoolCore.SharedLease): Effect.Effect<void> =>
  ticket === undefined
    ? Effect.void
    : port.settle(ticket, { _tag: "Ended", tokens: usage === undefined ? undefined : usage.input + usage.output })

/**
 * Tells the others that everything held against a key, and its group, was forgotten by hand.
 *
 * @since 0.1.0
 * @category controls
 */
export const reset = (core: PoolCore.PoolCore, sharing: PoolCore.Sharing, keyId: string): Effect.Effect<void> =>
  Effect.gen(function*() {
    const group = PoolState.find(yield* Ref.get(core.state), keyId)?.key.quotaGroup
    yield* Ref.update(sharing.resets, (all) => [
      ...all.filter((other) => other.keyId !== keyId),
      { _tag: "Reset" as const, keyId, group }
    ])
    yield* Queue.offer(sharing.changed, undefined)
  })

// ---------------------------------------------------------------------------------------------------------------- news

/**
 * Whom the pool tells how it stands with the others.
 *
 * @since 0.1.0
 * @category models
 */
export interface Watcher {
  readonly away: (problem: string) => Effect.Effect<void>
  readonly joined: Effect.Effect<void>
}

/**
 * Keeps the pool and the others of one mind, for ever.
 *
 * @since 0.1.0
 * @category fibers
 */
export const keep = (core: PoolCore.PoolCore, sharing: PoolCore.Sharing, watcher: Watcher): Effect.Effect<void> =>
  Stream.concat(
    Stream.map(sharing.port.news, (news) => hear(core, sharing, watcher, news)),
    Stream.sync(() => end(core, sharing, watcher))
  ).pipe(
    Stream.merge(Stream.map(Stream.fromQueue(sharing.changed), () => tellChanges(core, sharing))),
    Stream.merge(Stream.map(
      Stream.fromQueue(sharing.answering),
      (answers) => answers ? watcher.joined : watcher.away("a claim got no answer")
    )),
    Stream.runForEach(identity)
  )

const hear = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  watcher: Watcher,
  news: SharedPool.News
): Effect.Effect<void> => {
  const { config } = core
  switch (news._tag) {
    case "Joined":
      return join(core, sharing, watcher, news)
    case "Away":
      return Effect.gen(function*() {
        const now = yield* MonotonicTime.now
        const parts = Math.max(1, news.members)
        yield* Ref.update(sharing.link, (link) => ({
          ...link,
          joined: false,
          members: parts,
          awaySince: link.joined ? now : link.awaySince
        }))
        yield* divide(core, parts)
        yield* Deferred.succeed(sharing.met, undefined)
        yield* watcher.away(news.problem)
      })
    case "Members":
      return Ref.update(sharing.link, (link) => ({ ...link, members: Math.max(1, news.members) }))
    case "Cooldown":
      return exchange(core, sharing, (state, now) => SharedState.cooled(config, state, news.cooldown, now))
    case "Lifted":
      return exchange(
        core,
        sharing,
        (state, now, pending) =>
          pending.some((notice) => notice._tag === "Cooldown" && isOf(notice.cooldown.subject, news.subject))
            ? unchanged(state)
            : SharedState.lifted(config, state, news.subject, news.forMillis, now)
      )
    case "Breaker":
      return transit(core, sharing, news.breaker)
    case "Reset":
      return Effect.zipRight(
        exchange(core, sharing, (state, now) => PoolKeys.resetKey(config, state, news.keyId, now) ?? unchanged(state)),
        remember(sharing, [{ keyId: news.keyId, version: news.version }])
      )
    case "Freed":
      return Effect.zipRight(
        Ref.update(sharing.freed, ({ count, last }) => ({
          count: count + 1,
          last: HashMap.set(last, SharedPool.nameOf(news.subject), count + 1)
        })),
        exchange(core, sharing, (state, now) => ({
          state: Claims.freed(config, state, news.subject, now),
          events: PoolState.noEvents
        }))
      )
  }
}

/** Where there never were any news, the pool is alone. Else its store was closed, and from now on nobody is heard of. */
const end = (core: PoolCore.PoolCore, sharing: PoolCore.Sharing, watcher: Watcher): Effect.Effect<void> =>
  Effect.flatMap(Ref.get(sharing.link), ({ joined, members }) =>
    joined
      ? hear(core, sharing, watcher, { _tag: "Away", members, problem: "its store was closed" })
      : Effect.asVoid(Deferred.succeed(sharing.met, undefined)))

const isOf = (a: SharedPool.Subject, b: SharedPool.Subject): boolean => SharedPool.nameOf(a) === SharedPool.nameOf(b)

const unchanged = (state: PoolState.PoolState): PoolState.Changed => ({ state, events: PoolState.noEvents })

const transit = (core: PoolCore.PoolCore, sharing: PoolCore.Sharing, breaker: SharedPool.SharedBreaker) =>
  Effect.gen(function*() {
    const { versions } = yield* Ref.get(sharing.link)
    if (!SharedState.isNewer(breaker.version, Option.getOrUndefined(HashMap.get(versions, breaker.keyId)))) return
    yield* remember(sharing, [breaker])
    yield* exchange(
      core,
      sharing,
      (state, now) => SharedState.transited(core.config, state, breaker.keyId, breaker.state, now),
      breaker.keyId
    )
  })

const remember = (
  sharing: PoolCore.Sharing,
  known: ReadonlyArray<Pick<SharedPool.SharedBreaker, "keyId" | "version">>
): Effect.Effect<void> =>
  Ref.update(sharing.link, (link) => ({
    ...link,
    versions: known.reduce((all, { keyId, version }) => HashMap.set(all, keyId, version), link.versions)
  }))

// ------------------------------------------------------------------------------------------------------------- telling

const tellChanges = (core: PoolCore.PoolCore, sharing: PoolCore.Sharing): Effect.Effect<void> =>
  Effect.gen(function*() {
    const { joined, members } = yield* Ref.get(sharing.link)
    if (joined) {
      // Those that have ended by now: what they said is in the state.
      const endings = yield* Ref.getAndSet(sharing.endings, [])
      yield* exchange(core, sharing, undefined)
      return yield* settleAll(sharing, endings)
    }
    // Keys may have come, or been given other limits.
    if (members > 1) yield* divide(core, members)
  })

const settleAll = (sharing: PoolCore.Sharing, endings: ReadonlyArray<PoolCore.SharedLease>): Effect.Effect<void> =>
  Effect.forEach(endings, (ended) => settle(sharing, ended), { discard: true })

/**
 * Takes news into the state, and tells what has happened here since the last time: not what the others told. A transition
 * of the key whose breaker is `decided` was made on an older version than the one that is known now: it has lost.
 */
const exchange = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  hears:
    | ((
      state: PoolState.PoolState,
      now: number,
      pending: ReadonlyArray<SharedPool.Notice>
    ) => PoolState.Changed)
    | undefined,
  decided?: string
): Effect.Effect<void> =>
  Effect.gen(function*() {
    const link = yield* Ref.get(sharing.link)
    const resets = yield* Ref.getAndSet(sharing.resets, [])
    const [pending, told] = yield* PoolCore.modify(core, (before, now) => {
      const pending = SharedState.notices(link.told, before, link.versions, now)
      const changed = hears?.(before, now, pending)
      const isChanged = changed !== undefined && changed.state !== before
      return [[pending, changed?.state ?? before] as const, isChanged ? changed : undefined]
    })
    yield* Ref.update(sharing.link, (link) => ({ ...link, told }))
    const counts = pending.filter((notice) => notice._tag !== "Breaker" || notice.keyId !== decided)
    yield* tell(core, sharing, resets, counts, link.told)
  })

/** Tells notices; what was lost on the way is told again once the others are there. */
const tell = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  resets: ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Reset" }>>,
  pending: ReadonlyArray<SharedPool.Notice>,
  before: PoolState.PoolState | undefined
): Effect.Effect<void> =>
  Effect.gen(function*() {
    const isReset = ({ of, scope }: SharedPool.Subject): boolean =>
      resets.some(({ group, keyId }) => scope === "key" ? of === keyId : of === group)
    const rest = pending.filter((notice) =>
      notice._tag === "Lifted"
        ? !isReset(notice.subject)
        : notice._tag !== "Breaker" || !isReset({ scope: "key", of: notice.keyId })
    )
    const notices = [...resets, ...rest]
    if (notices.length === 0) return
    const answer = yield* sharing.port.tell(notices)
    if (answer._tag === "Away") {
      yield* Ref.update(sharing.resets, (later) => [...resets, ...later])
      const waits = yield* Ref.modify(
        sharing.link,
        (link) => [link.retelling, { ...link, told: before, retelling: true }]
      )
      return yield* waits ? Effect.void : Effect.forkDaemon(retell(sharing))
    }
    yield* remember(sharing, answer.breakers)
    for (const { keyId, state: stands } of answer.breakers) {
      const own = notices.find((notice) => notice._tag === "Breaker" && notice.keyId === keyId)
      if (own?._tag !== "Breaker" || SharedState.standsAs(own.to, stands)) continue
      // Somebody else was first.
      yield* exchange(
        core,
        sharing,
        (state, now) => SharedState.transited(core.config, state, keyId, stands, now),
        keyId
      )
    }
  })

/** The engine may be slow only: then nobody else says that it is time to tell. */
const retell = ({ changed, link }: PoolCore.Sharing): Effect.Effect<void> =>
  Effect.gen(function*() {
    yield* Effect.sleep(againMillis)
    yield* Ref.update(link, (link) => ({ ...link, retelling: false }))
    yield* Queue.offer(changed, undefined)
  })

// ------------------------------------------------------------------------------------------------------------- joining

const join = (
  core: PoolCore.PoolCore,
  sharing: PoolCore.Sharing,
  watcher: Watcher,
  news: Extract<SharedPool.News, { readonly _tag: "Joined" }>
): Effect.Effect<void> =>
  Effect.gen(function*() {
    const link = yield* Ref.get(sharing.link)
    const isKept = news.kept && link.told !== undefined
    const known = isKept ? link.versions : HashMap.empty<string, SharedPool.Version>()
    const before = isKept ? link.told : undefined
    const newer = news.breakers.filter(({ keyId, version }) =>
      SharedState.isNewer(version, Option.getOrUndefined(HashMap.get(known, keyId)))
    )
    const versions = newer.reduce((all, { keyId, version }) => HashMap.set(all, keyId, version), known)
    const endings = yield* Ref.getAndSet(sharing.endings, [])
    const resets = yield* Ref.getAndSet(sharing.resets, [])
    const [pending, told] = yield* PoolCore.modify(core, (state, now) => {
      const pending = SharedState.notices(before, state, known, now)
      const changed = SharedState.joined(core.config, state, before, news, known, now)
      return [[pending, changed.state] as const, changed]
    })
    // What it knows of others' use, or of its own before it began, is not its to tell: all who loaded it would.
    const since = isKept ? link.awaySince : core.startedAt
    // What is only read again was decided together all the time. Else each keeps to its part until all is told; who was
    // there before an engine lost what it knew may still have to come back.
    yield* Ref.set(sharing.link, {
      ...link,
      joined: link.joined && isKept,
      members: Math.max(1, news.members, isKept ? 1 : link.members),
      awaySince: link.joined ? yield* MonotonicTime.now : link.awaySince,
      versions,
      told
    })
    const decided = new Set(newer.map(({ keyId }) => keyId))
    const now = yield* MonotonicTime.now
    MutableRef.set(sharing.late, [])
    const taken = Claims.takenSince(yield* Ref.get(core.state), since, now)
    yield* tell(
      core,
      sharing,
      resets,
      [...pending.filter((notice) => notice._tag !== "Breaker" || !decided.has(notice.keyId)), ...taken],
      before
    )
    if (!isKept) {
      for (const [id, held] of sharing.leases) {
        sharing.leases.set(id, { ...held, ticket: undefined })
        // One that was given since is known; it is taken anew with the others.
        if (held.ticket !== undefined) yield* sharing.port.settle(held.ticket, { _tag: "Unsent" })
      }
    }
    yield* settleAll(sharing, endings)
    yield* declareHeld(sharing)
    const late = MutableRef.get(sharing.late) ?? []
    MutableRef.set(sharing.late, undefined)
    if (late.length > 0) yield* sharing.port.tell(together(late))
    yield* Ref.update(sharing.link, (link) => ({ ...link, joined: true, members: Math.max(1, news.members) }))
    yield* divide(core, 1)
    yield* watcher.joined
    yield* Deferred.succeed(sharing.met, undefined)
  })

/** As few notices as there are limits. */
const together = (
  taken: ReadonlyArray<Extract<SharedPool.Notice, { readonly _tag: "Taken" }>>
): ReadonlyArray<SharedPool.Notice> => {
  const all = new Map<string, Extract<SharedPool.Notice, { readonly _tag: "Taken" }>>()
  for (const one of taken) {
    const name = `${SharedPool.nameOf(one.subject)} ${one.unit} ${one.windowMillis}`
    all.set(name, { ...one, amount: one.amount + (all.get(name)?.amount ?? 0) })
  }
  return [...all.values()]
}

/** What was begun while nobody could decide is taken now, whatever is left. */
const declareHeld = (sharing: PoolCore.Sharing, most = Infinity): Effect.Effect<void> =>
  Effect.gen(function*() {
    const unknown = [...sharing.leases].filter(([, { ticket }]) => ticket === undefined)
    if (unknown.length === 0) return
    // More begin meanwhile than can be told of: from now on each asks for itself, or this would never end.
    if (unknown.length >= most) yield* Ref.update(sharing.link, (link) => ({ ...link, joined: true }))
    const answers = yield* Effect.forEach(
      unknown,
      ([id, { answered, claim }]) =>
        Effect.flatMap(
          sharing.port.claim({
            ...claim,
            // Its request was counted with its answer.
            limits: answered ? claim.limits.filter(({ unit }) => unit === "tokens") : claim.limits,
            probes: answered ? [] : claim.probes,
            held: true
          }),
          (answer) => {
            const held = sharing.leases.get(id)
            if (answer._tag !== "Granted") return Effect.succeed(false)
            // It has ended meanwhile.
            if (held === undefined) return Effect.as(settle(sharing, { ...noLease, ticket: answer.ticket }), true)
            sharing.leases.set(id, { ...held, ticket: answer.ticket })
            return Effect.succeed(true)
          }
        ),
      { concurrency: 8 }
    )
    if (answers.every((known) => known)) yield* declareHeld(sharing, unknown.length)
  })

const noLease: PoolCore.SharedLease = {
  claim: { limits: [], concurrency: [], probes: [] },
  ticket: undefined,
  answered: true
}

const divide = (core: PoolCore.PoolCore, parts: number): Effect.Effect<void> =>
  Effect.asVoid(PoolCore.step(core, (state, now) => ({
    state: Claims.divided(core.config, state, parts, now),
    events: PoolState.noEvents
  })))
