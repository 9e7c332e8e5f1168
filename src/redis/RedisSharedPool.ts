/**
 * What processes share of one pool, on Redis: the port of `SharedPool`.
 *
 * One fiber, the keeper, joins, says that the process is alive, and joins again where news were missed or Redis was away;
 * another sends what became of tickets, which is kept until Redis has heard it. A process is away from the first answer
 * that does not come in time: from then on it asks for nothing until Redis answers quickly enough again.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Queue from "effect/Queue"
import * as Random from "effect/Random"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as MonotonicTime from "../MonotonicTime.js"
import type * as SharedPool from "../SharedPool.js"
import * as RedisLink from "./RedisLink.js"
import type * as RedisSettings from "./RedisSettings.js"
import * as Scripts from "./Scripts.js"
import * as Wording from "./Wording.js"

/**
 * Joins a pool, and leaves it with the scope. It does not wait for Redis.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  link: RedisLink.RedisLink,
  settings: RedisSettings.Resolved,
  pool: string
): Effect.Effect<SharedPool.SharedPool, never, Scope.Scope> =>
  Effect.gen(function*() {
    const names = Wording.namesOf(settings.prefix, pool, link.place)
    const member = newMember()
    const keepMillis = text(Math.max(leastKept, settings.memberMillis * 4))
    const standing = MutableRef.make<Standing>({
      phase: "new",
      members: 1,
      epoch: 0,
      seq: 0,
      hears: false,
      missed: false,
      behind: undefined
    })
    const set = (more: Partial<Standing>) => MutableRef.set(standing, { ...MutableRef.get(standing), ...more })
    const news = yield* Effect.acquireRelease(Queue.dropping<SharedPool.News>(mostNews), Queue.shutdown)
    const wake = yield* Queue.sliding<void>(1)
    const wakeSender = yield* Queue.sliding<void>(1)
    const tickets = new Map<string, Wording.Ticket>()
    const outbox = new Map<string, Parcel>()
    const claims = MutableRef.make(0)
    /** How many claims nobody has answered yet. */
    const asking = MutableRef.make(0)

    const missed = () => {
      set({ missed: true })
      wake.unsafeOffer(undefined)
    }
    const emit = (item: SharedPool.News) => {
      // Nobody reads: all that is known is told once more when somebody does.
      if (!news.unsafeOffer(item)) missed()
    }
    const lose = (problem: string) => {
      const { members, phase } = MutableRef.get(standing)
      if (phase === "away") return
      set({ phase: "away" })
      emit({ _tag: "Away", members, problem })
      wake.unsafeOffer(undefined)
    }
    const counted = (members: number) => {
      if (members === MutableRef.get(standing).members) return
      set({ members })
      emit({ _tag: "Members", members })
    }

    // ----------------------------------------------------------------------------------------------------------- news
    const take = (push: Wording.Push) => {
      const { behind, epoch, seq } = MutableRef.get(standing)
      if (push.e !== epoch) return missed()
      if (push.s <= seq) return
      set({ seq: push.s, behind: behind !== undefined && push.s >= behind.seq ? undefined : behind })
      for (const item of push.n) {
        if (item.t === "M") counted(item.n)
        else if (item.t === "F" || push.f !== member) emit(newsOf(item))
      }
      if (push.s > seq + 1) missed()
    }
    /** What came while the answer to a join was on its way. */
    const meanwhile = MutableRef.make<ReadonlyArray<Wording.Push> | undefined>(undefined)
    const onMessage = (text: string) => {
      const push = Option.getOrUndefined(Wording.readPush(text))
      if (push === undefined) return
      const early = MutableRef.get(meanwhile)
      if (early === undefined) {
        if (MutableRef.get(standing).phase === "joined") take(push)
      } else if (early.length < mostNews) MutableRef.set(meanwhile, [...early, push])
      else missed()
    }
    const heard = yield* Queue.sliding<void>(1)
    const onState = (hears: boolean) => {
      set({ hears })
      if (!hears) return
      heard.unsafeOffer(undefined)
      // Who was deaf for a while does not know what was said.
      if (MutableRef.get(standing).phase === "joined") missed()
    }

    // ---------------------------------------------------------------------------------------------------------- keeper
    const join = Effect.gen(function*() {
      yield* link.ping(settings.claimMillis)
      // First listen, then ask what is known: nothing is missed in between. But who cannot listen can still ask.
      if (!MutableRef.get(standing).hears) yield* Effect.raceFirst(Effect.sleep(pushMillis), Queue.take(heard))
      MutableRef.set(meanwhile, [])
      const { epoch, seq } = MutableRef.get(standing)
      set({ missed: false, behind: undefined })
      const reply = yield* link.run(
        Scripts.join,
        [names.meta, names.members, names.cooldowns, names.breakers, names.held],
        [member, names.channel, text(epoch), text(seq), text(settings.memberMillis), keepMillis],
        settings.commandMillis
      )
      const known = joinedOf(reply)
      if (known === undefined) {
        return yield* new RedisLink.Unreached({ problem: "Redis holds something else", sent: true })
      }
      const { breakers, cooldowns, kept, members, ...rest } = known
      // What nobody has read is known in part only: it begins anew.
      if (yield* Queue.isFull(news)) {
        yield* Queue.takeAll(news)
      }
      set({ phase: "joined", members, ...rest })
      emit({ _tag: "Joined", members, kept, cooldowns, breakers })
      const early = MutableRef.get(meanwhile) ?? []
      MutableRef.set(meanwhile, undefined)
      early.forEach(take)
      wakeSender.unsafeOffer(undefined)
    }).pipe(Effect.ensuring(Effect.sync(() => MutableRef.set(meanwhile, undefined))))

    const beat = Effect.gen(function*() {
      const reply = yield* link.run(
        Scripts.beat,
        [names.meta, names.members, names.cooldowns, names.breakers, names.held],
        [member, text(settings.memberMillis), keepMillis],
        settings.commandMillis
      )
      if (!Array.isArray(reply)) return
      const [epoch, seq, members] = reply.map(Number)
      const before = MutableRef.get(standing)
      if (epoch !== before.epoch || seq === undefined || seq < before.seq) return missed()
      // What was pushed may be on its way on the other connection.
      if (seq > before.seq && before.behind === undefined) set({ behind: { seq, at: yield* MonotonicTime.now } })
      if (members !== undefined) counted(members)
      const orphans = Option.getOrElse(Wording.readOrphans(reply[3]), () => [])
      if (orphans.length > 0) yield* send(orphans.map((ticket) => ({ ticket, s: "R" })))
    })

    /** Looks after being a member, for as long as nothing is wrong. */
    const stay = Effect.gen(function*() {
      let beatAt = (yield* MonotonicTime.now) + settings.heartbeatMillis * (0.8 + 0.2 * (yield* Random.next))
      for (;;) {
        const { behind, missed, phase } = MutableRef.get(standing)
        const now = yield* MonotonicTime.now
        if (phase !== "joined" || missed) return
        if (behind !== undefined && now >= behind.at + pushMillis) {
          // What has arrived while this process was busy is in time: two turns of the event loop let it be read.
          yield* Effect.repeatN(Effect.sleep(0), 1)
          if (MutableRef.get(standing).behind?.at !== behind.at) continue
          // It only seems to listen.
          if (MutableRef.get(standing).hears) yield* link.reset("listening")
          return
        }
        if (now >= beatAt) {
          yield* beat
          beatAt = now + settings.heartbeatMillis * (0.8 + 0.2 * (yield* Random.next))
        } else {
          const until = Math.min(beatAt, behind === undefined ? Infinity : behind.at + pushMillis)
          yield* Effect.raceFirst(Effect.sleep(Math.ceil(until - now)), Queue.take(wake))
        }
      }
    })

    const keeper = Effect.gen(function*() {
      yield* Effect.ignore(link.whenReady(settings.connectMillis))
      let failures = 0
      for (;;) {
        const began = yield* MonotonicTime.now
        yield* Effect.catchAll(Effect.zipRight(join, stay), ({ problem }) => Effect.sync(() => lose(problem)))
        const ended = yield* MonotonicTime.now
        if (MutableRef.get(standing).phase === "joined") {
          // News may be missed again and again; what is known is not read again more often than this.
          yield* Effect.sleep(againMillis)
          continue
        }
        failures = ended - began > steadyMillis ? 0 : failures + 1
        yield* Effect.sleep(RedisLink.pauseBefore(failures, yield* Random.next))
        // Without a connection there is nobody to ask; connecting has pauses of its own.
        yield* Effect.ignore(link.whenReady(longestPause))
      }
    })

    // ---------------------------------------------------------------------------------------------------------- sender
    const send = (parcels: ReadonlyArray<Parcel>) =>
      Effect.suspend(() => {
        const keys = [names.meta, names.held, names.members]
        const at = (name: string) => keys.push(name)
        const items = parcels.map(({ k, s, ticket }) => ({
          t: ticket.t,
          s,
          k,
          l: ticket.l.map((limit) => at(names.log(limit.k))),
          p: ticket.p.map((probe) => at(names.probe(probe.o)))
        }))
        const args = [member, names.channel, text(settings.memberMillis), keepMillis, JSON.stringify(items)]
        return link.run(Scripts.settle, keys, args, settings.commandMillis)
      })
    const flush: Effect.Effect<void, RedisLink.Unreached> = Effect.suspend(() => {
      if (outbox.size === 0) return Effect.void
      const parcels = Array.from(outbox.values()).slice(0, mostParcels)
      return Effect.zipRight(
        Effect.tap(send(parcels), () => {
          for (const parcel of parcels) {
            if (outbox.get(parcel.ticket.t) === parcel) outbox.delete(parcel.ticket.t)
          }
        }),
        flush
      )
    })
    const sender = Effect.forever(Effect.zipRight(
      Queue.take(wakeSender),
      Effect.suspend(() =>
        MutableRef.get(standing).phase === "joined"
          ? Effect.catchAll(flush, ({ problem }) => Effect.sync(() => lose(problem)))
          : Effect.void
      )
    ))
    const post = (parcel: Parcel) => {
      if (parcel.s !== "A") tickets.delete(parcel.ticket.t)
      outbox.set(parcel.ticket.t, parcel)
      wakeSender.unsafeOffer(undefined)
    }

    /** Also what it may be about to hold, and what could not be told any more. */
    const holdsSomething = () => tickets.size + outbox.size + MutableRef.get(asking) > 0

    yield* link.listen(names.channel, { onMessage, onState })
    yield* link.watch((ready) => {
      if (!ready && MutableRef.get(standing).phase === "joined") lose(link.problem())
    })
    yield* Effect.addFinalizer(() =>
      Effect.ignore(Effect.zipRight(
        flush,
        Effect.suspend(() =>
          link.run(
            Scripts.leave,
            [names.meta, names.members],
            [member, names.channel, text(settings.memberMillis), holdsSomething() ? "1" : "0"],
            settings.commandMillis
          )
        )
      ))
    )
    yield* Effect.forkScoped(Effect.interruptible(keeper))
    yield* Effect.forkScoped(Effect.interruptible(sender))

    return {
      news: Stream.fromQueue(news),
      // A process that is only busy must not give up what has come in time: see `RedisLink`.
      claimTimeout: Infinity,
      tell: (notices) =>
        Effect.suspend(() => {
          const { epoch, phase } = MutableRef.get(standing)
          if (phase !== "joined") return Effect.succeed(away)
          const tellSome = (some: ReadonlyArray<SharedPool.Notice>) => {
            const keys = [names.meta, names.cooldowns, names.breakers]
            const items = some.map((notice) => itemOf(notice, (name) => keys.push(name), names))
            const args = [member, names.channel, text(epoch), keepMillis, JSON.stringify(items)]
            return Effect.flatMap(link.run(Scripts.tell, keys, args, settings.commandMillis), (reply) => {
              const [said, stands] = Array.isArray(reply) ? reply : []
              const breakers = said === "ok" ? Option.getOrUndefined(Wording.readBreakers(stands)) : undefined
              return breakers === undefined
                ? Effect.fail(new RedisLink.Unreached({ problem: lostMemory, sent: true }))
                : Effect.succeed(breakers.map(Wording.toBreaker))
            })
          }
          // Others wait while Redis hears a long list.
          return Effect.forEach(chunks(notices), tellSome).pipe(
            Effect.map((lists): SharedPool.Told => ({ _tag: "Told", breakers: lists.flat() })),
            Effect.catchAll(({ problem }) => {
              lose(problem)
              return Effect.succeed(away)
            })
          )
        }),
      claim: (claim) =>
        Effect.suspend(() => {
          const { epoch, phase } = MutableRef.get(standing)
          if (phase !== "joined") return Effect.succeed(away)
          const id = `${member}.${MutableRef.getAndIncrement(claims)}`
          const ticket = Wording.ticket(id, member, claim)
          const giveBack = () => post({ ticket, s: "U" })
          const keys = [
            names.meta,
            names.members,
            names.held,
            names.cooldowns,
            names.breakers,
            ...ticket.l.map(({ k }) => names.log(k)),
            ...ticket.p.map(({ o }) => names.probe(o))
          ]
          const args = [member, text(epoch), keepMillis, JSON.stringify(ticket), text(settings.memberMillis)]
          MutableRef.increment(asking)
          return link.run(Scripts.claim, keys, args, settings.claimMillis).pipe(
            Effect.map((reply): SharedPool.Answer => {
              const [said, gate, index, wait, free] = Array.isArray(reply) ? reply : []
              if (said === "yes") {
                tickets.set(id, ticket)
                return { _tag: "Granted", ticket: { id } }
              }
              if (said === "gone") {
                // What this process held was given to others meanwhile: it asks again when all of it is told.
                missed()
                const first = anyOf(claim)
                if (first !== undefined) return { _tag: "Refused", ...first, forMillis: againMillis, mayFree: true }
              }
              const refused = said === "no" ? refusal(claim, String(gate), Number(index) - 1) : undefined
              if (refused === undefined) {
                lose(lostMemory)
                return away
              }
              const forMillis = Number(wait) < 0 ? Infinity : Number(wait)
              return { _tag: "Refused", ...refused, forMillis, mayFree: Number(free) === 1 }
            }),
            Effect.onInterrupt(() => Effect.sync(giveBack)),
            Effect.catchAll(({ problem, sent }) => {
              if (sent) giveBack()
              lose(problem)
              return Effect.succeed(away)
            }),
            Effect.ensuring(Effect.sync(() => MutableRef.decrement(asking)))
          )
        }),
      settle: (ticket, settled) =>
        Effect.sync(() => {
          const held = tickets.get(ticket.id)
          if (held === undefined) return
          switch (settled._tag) {
            case "Answered":
              return post({ ticket: held, s: "A" })
            case "Ended":
              return post({
                ticket: held,
                s: "E",
                ...(settled.tokens === undefined ? {} : { k: Wording.amount(settled.tokens) })
              })
            case "Unsent":
              return post({ ticket: held, s: "U" })
          }
        })
    }
  })

/** How a process stands to the others. */
interface Standing {
  readonly phase: "new" | "joined" | "away"
  readonly members: number
  /** The epoch of what is known, and the number of the last news. */
  readonly epoch: number
  readonly seq: number
  readonly hears: boolean
  /** Whether news were missed, so that all must be read again. */
  readonly missed: boolean
  /** News that exist, but have not come yet. */
  readonly behind: { readonly seq: number; readonly at: number } | undefined
}

/** What became of a ticket, to be told. */
interface Parcel {
  readonly ticket: {
    readonly t: string
    readonly l: ReadonlyArray<{ readonly k: string }>
    readonly p: ReadonlyArray<{ readonly o: string }>
  }
  readonly s: "A" | "E" | "U" | "R"
  readonly k?: number
}

/** Two processes must never have the same name, whatever their seeds are. */
const newMember = (): string =>
  Array.from(globalThis.crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join(
    ""
  )

const away = { _tag: "Away" } as const
const lostMemory = "Redis had forgotten what it knew"

const text = (number: number): string => String(Math.ceil(number))

const chunks = <A>(list: ReadonlyArray<A>): ReadonlyArray<ReadonlyArray<A>> =>
  list.length === 0 ? [] : [list.slice(0, mostNotices), ...chunks(list.slice(mostNotices))]

const joinedOf = (reply: unknown) => {
  if (!Array.isArray(reply)) return undefined
  const [epoch, seq, members, kept] = reply.map(Number)
  const cooldowns = Option.getOrUndefined(Wording.readCooldowns(reply[4]))
  const breakers = Option.getOrUndefined(Wording.readBreakers(reply[5]))
  if (epoch === undefined || seq === undefined || members === undefined) return undefined
  if (cooldowns === undefined || breakers === undefined) return undefined
  return {
    epoch,
    seq,
    members,
    kept: kept === 1,
    cooldowns: cooldowns.map(Wording.toCooldown),
    breakers: breakers.map(Wording.toBreaker)
  }
}

const newsOf = (item: Exclude<Wording.Item, { readonly t: "M" }>): SharedPool.News => {
  switch (item.t) {
    case "C":
      return { _tag: "Cooldown", cooldown: Wording.toCooldown(item.c) }
    case "L":
      return { _tag: "Lifted", subject: Wording.toSubject(item.o), forMillis: item.r }
    case "B":
      return { _tag: "Breaker", breaker: Wording.toBreaker(item.b) }
    case "R":
      return { _tag: "Reset", keyId: item.k, group: item.q, version: { epoch: item.e, generation: item.g } }
    case "F":
      return { _tag: "Freed", subject: Wording.toSubject(item.o) }
  }
}

/** A notice as the script reads it; `at` says where among its keys one is. */
const itemOf = (notice: SharedPool.Notice, at: (name: string) => number, names: Wording.Names) => {
  const probe = (subject: SharedPool.Subject) => at(names.probe(Wording.subject(subject)))
  switch (notice._tag) {
    case "Cooldown":
      return { t: "C", i: probe(notice.cooldown.subject), c: Wording.cooldown(notice.cooldown) }
    case "Lifted":
      return {
        t: "L",
        i: probe(notice.subject),
        o: Wording.subject(notice.subject),
        r: Wording.cut(notice.forMillis)
      }
    case "Breaker":
      return {
        t: "B",
        i: probe({ scope: "key", of: notice.keyId }),
        k: notice.keyId,
        to: Wording.breakerState(notice.to),
        ...(notice.from === undefined ? {} : { e: notice.from.epoch, g: notice.from.generation })
      }
    case "Reset":
      return {
        t: "R",
        i: probe({ scope: "key", of: notice.keyId }),
        k: notice.keyId,
        ...(notice.group === undefined ? {} : { q: notice.group }),
        o: [
          Wording.subject({ scope: "key", of: notice.keyId }),
          ...(notice.group === undefined ? [] : [Wording.subject({ scope: "group", of: notice.group })])
        ]
      }
    case "Taken":
      return {
        t: "T",
        i: at(names.log(Wording.limitName(notice))),
        n: notice.limit,
        w: Math.max(1, Wording.cut(notice.windowMillis)),
        a: Wording.amount(notice.amount)
      }
  }
}

/** Something that a claim asks for. */
const anyOf = (claim: SharedPool.Claim) =>
  refusal(claim, "limit", 0) ?? refusal(claim, "concurrency", 0) ?? refusal(claim, "probing", 0)

const refusal = (claim: SharedPool.Claim, gate: string, index: number) => {
  switch (gate) {
    case "limit": {
      const limit = claim.limits[index]
      return limit === undefined ? undefined : { gate: "limit" as const, subject: limit.subject }
    }
    case "concurrency": {
      const place = claim.concurrency[index]
      return place === undefined ? undefined : { gate: "concurrency" as const, subject: place.subject }
    }
    case "probing": {
      const probe = claim.probes[index]
      return probe === undefined ? undefined : { gate: "probing" as const, subject: probe.subject }
    }
  }
  return undefined
}

/** So much news may be unread. */
const mostNews = 4_096
/** So many notices, and so many tickets, go to Redis in one step. */
const mostNotices = 200
const mostParcels = 100
/** What nobody touches is forgotten after two days. */
const leastKept = 172_800_000
/** How long news may take that are on their way. */
const pushMillis = 250
/** How often all that is known is read again at most. */
const againMillis = 50
/** Who was a member for so long did not fail at once. */
const steadyMillis = 5_000
const longestPause = 2_000
