/**
 * What every `share` of a store must do, as bodies of checks: `PoolStoreContract` has them as `sharedChecks`.
 *
 * They wait for what must come, and are then in no hurry: only what surely happened after something else is held against
 * it, so that a slow engine, or a busy machine, violates nothing.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as SubscriptionRef from "effect/SubscriptionRef"
import * as MonotonicTime from "./MonotonicTime.js"
import type * as PoolStore from "./PoolStore.js"
import * as SharedPool from "./SharedPool.js"

/**
 * The store whose `share` is checked.
 *
 * @since 0.1.0
 * @category models
 */
export interface Subject {
  /** Opens the store, as one more process would. */
  readonly open: Effect.Effect<PoolStore.Service, unknown, Scope.Scope>
  /** Makes what is shared unreachable for all that opened the store, and reachable again, with all that it knew. */
  readonly outage?: {
    readonly begin: Effect.Effect<unknown, unknown>
    readonly end: Effect.Effect<unknown, unknown>
  } | undefined
  /** Makes what is shared forget everything. */
  readonly loseAll?: Effect.Effect<unknown, unknown> | undefined
}

/**
 * Fails where something is not what it must be.
 *
 * @since 0.1.0
 * @category models
 */
export type Is<E> = (what: string, found: unknown, expected: unknown) => Effect.Effect<void, E>

/**
 * One thing that it must do.
 *
 * @since 0.1.0
 * @category models
 */
export interface Body {
  readonly name: string
  readonly run: <E>(subject: Subject, is: Is<E>) => Effect.Effect<void, unknown>
}

/**
 * What every `share` must do.
 *
 * @since 0.1.0
 * @category checks
 */
export const all: ReadonlyArray<Body> = [
  body("who joins learns how many there are, and all that is known", ({ is, join, only }) =>
    Effect.gen(function*() {
      const a = yield* join
      yield* is("members for the first", (yield* a.hears("Joined")).members, 1)
      yield* a.tell([
        cooldown(key("told"), longMillis),
        cooldown(key("told", "model"), longMillis, { kind: "QuotaExhausted", refused: true, step: 2 }),
        cooldown(group("group"), longMillis, { provenance: "guessed", firmMillis: undefined }),
        { _tag: "Breaker", keyId: "open", from: undefined, to: open(longMillis, 3) },
        { _tag: "Breaker", keyId: "isolated", from: undefined, to: { _tag: "Isolated", trips: 1 } },
        { _tag: "Breaker", keyId: "closed", from: undefined, to: { _tag: "Closed", trips: 2 } }
      ])
      const b = yield* join
      const joined = yield* b.hears("Joined")
      yield* is("members for the second", joined.members, 2)
      yield* a.hears("Members", ({ members }) => members === 2)
      const cooldowns = joined.cooldowns.map(({ subject }) => SharedPool.nameOf(subject)).sort()
      yield* is(
        "the cooldowns",
        cooldowns,
        [
          SharedPool.nameOf(key("told")),
          SharedPool.nameOf(key("told", "model")),
          SharedPool.nameOf(group("group"))
        ].sort()
      )
      for (const found of joined.cooldowns) {
        yield* only(`what remains of ${SharedPool.nameOf(found.subject)}`, found.forMillis, longMillis)
        yield* is("its whole length", found.waitMillis, longMillis)
        const isModel = found.subject.model !== undefined
        yield* is("the rest of it", [found.kind, found.refused, found.step, found.provenance], [
          isModel ? "QuotaExhausted" : "RateLimited",
          isModel,
          isModel ? 2 : 0,
          found.subject.scope === "group" ? "guessed" : "told"
        ])
        if (found.subject.scope === "group") yield* is("nothing of it is firm", (found.firmMillis ?? 0) <= 0, true)
        else yield* only("what of it is firm", found.firmMillis ?? -1, longMillis)
      }
      const stands = joined.breakers.map(({ keyId, state: { _tag, trips } }) => `${keyId} ${_tag} ${trips}`).sort()
      yield* is("the breakers", stands, ["closed Closed 2", "isolated Isolated 1", "open Open 3"])
      for (const { state } of joined.breakers) {
        if (state._tag === "Open") yield* only("what remains of the open one", state.forMillis, longMillis)
      }
      yield* b.leave
      yield* a.forget
      const c = yield* join
      yield* is("members when one has left", (yield* c.hears("Joined")).members, 2)
    })),
  body("what one tells the others hear, and he himself does not", ({ is, only, two }) =>
    Effect.gen(function*() {
      const [a, b] = yield* two
      const subject = key("one }{ | / ключ 🔑 %0041", "a/b")
      yield* is("the answer", yield* a.tell([cooldown(subject, longMillis, { step: 1 })]), told([]))
      const { cooldown: heard } = yield* b.hears("Cooldown")
      yield* is("whose it is", heard.subject, subject)
      yield* only("what remains", heard.forMillis, longMillis)
      yield* is("its kind and step", [heard.kind, heard.step, heard.provenance], ["RateLimited", 1, "told"])
      yield* a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: open(longMillis) }])
      yield* is("whose breaker", (yield* b.hears("Breaker")).breaker.keyId, "k")
      yield* a.tell([{ _tag: "Lifted", subject, forMillis: longMillis }])
      yield* is("what was lifted", (yield* b.hears("Lifted")).subject, subject)
      yield* a.tell([{ _tag: "Reset", keyId: "k", group: "g" }])
      const { group: of, keyId } = yield* b.hears("Reset")
      yield* is("what was reset", [keyId, of], ["k", "g"])
      yield* b.tell([cooldown(key("last"), longMillis)])
      yield* a.hears("Cooldown", ({ cooldown }) => cooldown.subject.of === "last")
      yield* is("how much the first has heard", (yield* a.heard).filter(isTold).length, 1)
      yield* is("how much the second has heard", (yield* b.heard).filter(isTold).length, 4)
    })),
  body("cooldowns of one subject merge by the maximum of their ends", ({ is, join, two }) =>
    Effect.gen(function*() {
      const [a, b] = yield* two
      yield* a.tell([cooldown(key("k"), longMillis, { refused: true })])
      yield* b.tell([cooldown(key("k"), longMillis / 2)])
      yield* b.tell([cooldown(key("k"), longMillis * 2, { provenance: "guessed", firmMillis: undefined })])
      yield* b.tell([cooldown(key("k"), longMillis / 2)])
      const c = yield* join
      const [found, ...others] = (yield* c.hears("Joined")).cooldowns
      yield* is("one cooldown", [found?.subject, others.length], [key("k"), 0])
      yield* is("the longer one", (found?.forMillis ?? 0) > longMillis && found?.waitMillis === longMillis * 2, true)
      const firm = found?.firmMillis ?? 0
      yield* is("the firm part of the shorter one", firm > longMillis / 2 && firm <= longMillis, true)
      yield* is("what was refused stays", found?.refused, true)
      const { cooldown: heard } = yield* a.hears("Cooldown", ({ cooldown }) => cooldown.forMillis > longMillis)
      yield* is("that it was heard as it is for all", [heard.subject, heard.refused], [key("k"), true])
    })),
  body(
    "a lifted cooldown is over for all, and one that lasts longer than was known stays",
    ({ is, join, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        yield* a.tell([cooldown(key("long"), longMillis), cooldown(key("short"), longMillis / 10)])
        yield* b.tell([
          { _tag: "Lifted", subject: key("long"), forMillis: longMillis / 10 },
          { _tag: "Lifted", subject: key("short"), forMillis: longMillis / 10 }
        ])
        yield* is("what the others hear of", (yield* a.hears("Lifted")).subject, key("short"))
        const c = yield* join
        const { cooldowns } = yield* c.hears("Joined")
        yield* is("what is left", cooldowns.map(({ subject }) => subject.of), ["long"])
      })
  ),
  body(
    "of transitions that were made on one version one counts, and all learn the same",
    ({ is, join }) =>
      Effect.gen(function*() {
        const all = yield* Effect.all([join, join, join])
        let from: SharedPool.Version | undefined
        for (let round = 0; round < 5; round++) {
          const answers = yield* Effect.forEach(
            all,
            (member, i) => member.tell([{ _tag: "Breaker", keyId: "k", from, to: open(longMillis + i, round) }]),
            { concurrency: "unbounded" }
          )
          const stands = answers.flatMap(breakersOf)
          yield* is("a breaker in each answer", stands.length, all.length)
          const [first] = stands
          // A breaker of which nothing is known takes any, one after the other.
          if (round > 0) {
            yield* is("one winner", new Set(stands.map(({ version }) => versionText(version))).size, 1)
            yield* is(
              "a later version",
              first !== undefined && from !== undefined && isLater(first.version, from),
              true
            )
          }
          const last = stands.reduce((a, b) => isLater(b.version, a.version) ? b : a)
          const winner = last.state._tag === "Open" ? last.state.waitMillis - longMillis : -1
          for (const [i, member] of all.entries()) {
            if (i === winner) continue
            const { breaker } = yield* member.hears("Breaker", ({ breaker }) =>
              sameVersion(breaker.version, last.version))
            yield* is("how long it is open", waitOf(breaker.state), longMillis + winner)
          }
          from = last.version
        }
      })
  ),
  body(
    "a reset forgets what is held against a key and its group, and outdates what was told before",
    ({ is, join, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const [tripped] = breakersOf(
          yield* a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: open(longMillis) }])
        )
        yield* a.tell([
          cooldown(key("k"), longMillis),
          cooldown(key("k", "m"), longMillis),
          cooldown(group("g"), longMillis),
          cooldown(group("g", "m"), longMillis),
          cooldown(key("kk"), longMillis)
        ])
        const [closed] = breakersOf(yield* b.tell([{ _tag: "Reset", keyId: "k", group: "g" }]))
        yield* is("a closed breaker", closed?.state, { _tag: "Closed", trips: 0 })
        const { version } = yield* a.hears("Reset")
        yield* is("its version", version, closed?.version)
        const late = yield* a.tell([{ _tag: "Breaker", keyId: "k", from: tripped?.version, to: open(longMillis) }])
        yield* is("that what was made before does not count", breakersOf(late), [closed])
        const c = yield* join
        const { breakers, cooldowns } = yield* c.hears("Joined")
        yield* is("what is left", cooldowns.map(({ subject }) => subject), [key("kk")])
        yield* is("the breaker", breakers, [closed])
      })
  ),
  body("pools of different names share nothing", ({ grant, is, joinPool, only }) =>
    Effect.gen(function*() {
      const all = yield* Effect.forEach(["contract", "Contract", "contract:2", "*"], joinPool)
      for (const member of all) {
        const { cooldowns, members } = yield* member.hears("Joined")
        yield* is("nobody and nothing else", [members, cooldowns.length], [1, 0])
        yield* member.forget
      }
      for (const member of all) yield* grant(member, places(key("k"), 1))
      for (const member of all) yield* grant(member, limited(key("k"), 1, longMillis))
      const [a, b] = all
      if (a === undefined || b === undefined) return
      yield* a.tell([cooldown(key("k"), longMillis)])
      yield* b.tell([cooldown(key("other"), longMillis)])
      const again = yield* joinPool("contract")
      const { cooldowns } = yield* again.hears("Joined")
      yield* is("its own cooldown only", cooldowns.map(({ subject }) => subject.of), ["k"])
      yield* only("what remains of it", cooldowns[0]?.forMillis ?? -1, longMillis)
      yield* is("what the other has heard", (yield* b.heard).filter(isTold).length, 0)
    })),
  body(
    "a declared limit admits exactly, over all members, from each answer on",
    ({ grant, is, join, refuse }) =>
      Effect.gen(function*() {
        const limit = 5
        const windowMillis = 250
        const all = yield* Effect.all([join, join, join])
        for (let i = 0; i < limit; i++) {
          const member = all[i % 2]
          if (member !== undefined) yield* grant(member, limited(key("full"), limit, longMillis))
        }
        for (const member of all) yield* refuse(member, limited(key("full"), limit, longMillis))
        const admitted: Array<Admitted> = []
        const wrong: Array<SharedPool.Answer> = []
        const asks = (member: Member, times: number) =>
          Effect.gen(function*() {
            for (let i = 0; i < times;) {
              const asked = yield* MonotonicTime.now
              const answer = yield* member.claim(limited(key("k"), limit, windowMillis))
              if (answer._tag === "Granted") {
                i++
                const one: Admitted = { asked, granted: yield* MonotonicTime.now, free: Infinity }
                admitted.push(one)
                yield* Effect.sleep(5)
                const ends = yield* MonotonicTime.now
                one.free = i % 3 === 0 ? ends : ends + windowMillis
                yield* member.settle(answer.ticket, i % 3 === 0 ? unsent : i % 3 === 1 ? ended : answered)
                if (i % 3 === 2) yield* member.settle(answer.ticket, ended)
              } else if (answer._tag === "Refused" && answer.gate === "limit" && answer.forMillis <= windowMillis) {
                yield* Effect.sleep(Math.min(answer.forMillis, 20) + 1)
              } else {
                wrong.push(answer)
                return
              }
            }
          })
        yield* Effect.forEach(all.flatMap((member) => [member, member]), (member) => asks(member, 6), {
          concurrency: "unbounded"
        }).pipe(Effect.timeout(patience))
        yield* is("refusals that say when it may fit", wrong, [])
        yield* is("all of them in the end", admitted.length, 36)
        // What surely counted when another was granted must have left room for it.
        const most = admitted.map((one) =>
          1 + admitted.filter((other) => other !== one && other.granted < one.asked && one.granted < other.free).length
        )
        yield* is("no more in a window than the limit", Math.max(...most) <= limit, true)
      })
  ),
  body(
    "tokens are held until their use is known, and then count as what was used",
    ({ eventually, grant, is, refuse, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const tokens = (amount: number) => limited(group("g"), 1_000, longMillis, { unit: "tokens", amount })
        const first = yield* grant(a, tokens(800))
        const { forMillis, gate, mayFree, subject } = yield* refuse(b, tokens(300))
        yield* is("whose limit it was, and that it may free", [gate, subject, mayFree], ["limit", group("g"), true])
        yield* is("when it may fit", forMillis > 0 && forMillis <= longMillis, true)
        yield* a.settle(first, answered)
        yield* refuse(b, tokens(300))
        yield* a.settle(first, { _tag: "Ended", tokens: 500 })
        yield* b.freed("g")
        const second = yield* eventually(b, tokens(300))
        yield* refuse(a, tokens(201))
        yield* b.settle(second, { _tag: "Ended", tokens: undefined })
        // 800 of 1,000 are used.
        yield* a.settle(yield* eventually(a, tokens(200)), unsent)
        yield* refuse(b, tokens(201))
        yield* eventually(b, tokens(200))
      })
  ),
  body(
    "what is more than a limit fits when nothing is taken",
    ({ eventually, grant, refuse, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const tokens = (amount: number) => limited(key("k"), 100, longMillis, { unit: "tokens", amount })
        const huge = yield* grant(a, tokens(5_000))
        yield* refuse(b, tokens(1))
        yield* a.settle(huge, unsent)
        const small = yield* eventually(b, tokens(1))
        yield* refuse(a, tokens(5_000))
        yield* b.settle(small, unsent)
        yield* eventually(a, tokens(5_000))
      })
  ),
  body(
    "concurrency is exact over all members, and who was refused hears when there is room",
    ({ is, join }) =>
      Effect.gen(function*() {
        const all = yield* Effect.all([join, join, join])
        const seen = { now: 0, most: 0, done: 0 }
        const wrong: Array<SharedPool.Answer> = []
        const works = (member: Member): Effect.Effect<void, unknown> =>
          Effect.gen(function*() {
            for (let i = 0; i < 10;) {
              yield* member.forget
              const answer = yield* member.claim(places(key("k"), 2))
              if (answer._tag === "Granted") {
                i++
                seen.most = Math.max(seen.most, ++seen.now)
                yield* Effect.sleep(1)
                seen.now--
                seen.done++
                yield* member.settle(answer.ticket, i % 2 === 0 ? ended : unsent)
              } else if (answer._tag === "Refused" && answer.forMillis === Infinity && answer.mayFree) {
                // Nobody polls.
                yield* member.freed("k")
              } else {
                wrong.push(answer)
                return
              }
            }
          })
        yield* Effect.forEach(all, works, { concurrency: "unbounded" })
        yield* is("refusals that do not end by themselves", wrong, [])
        yield* is("how many at once, and in all", [seen.most, seen.done], [2, 30])
      })
  ),
  body("a claim gets all it asks for, or nothing", ({ grant, is, refuse, two }) =>
    Effect.gen(function*() {
      const [a, b] = yield* two
      yield* grant(a, places(group("g"), 1))
      const rest = { ...limited(key("k"), 1, longMillis), probes: probe(key("k")).probes }
      const both: SharedPool.Claim = {
        ...rest,
        concurrency: [...places(key("k"), 1).concurrency, ...places(group("g"), 1).concurrency]
      }
      for (let i = 0; i < 3; i++) {
        const { gate, subject } = yield* refuse(b, both)
        yield* is("for want of what", [gate, subject], ["concurrency", group("g")])
      }
      yield* grant(b, { ...rest, concurrency: places(key("k"), 1).concurrency })
    })),
  body(
    "one has a probe, however many ask, until it ends or its time is over",
    ({ eventually, is, join }) =>
      Effect.gen(function*() {
        const all = yield* Effect.all([join, join, join])
        for (let round = 0; round < 4; round++) {
          const subject = key(`k${round}`)
          yield* Effect.forEach(all, ({ forget }) => forget)
          const answers = yield* Effect.forEach(
            all.flatMap((member) => [member, member, member]),
            (member) => Effect.map(member.claim(probe(subject)), (answer) => ({ member, answer })),
            { concurrency: "unbounded" }
          )
          const [won, ...more] = answers.flatMap(({ answer, member }) =>
            answer._tag === "Granted" ? [{ member, ticket: answer.ticket }] : []
          )
          yield* is("one winner", [won !== undefined, more.length], [true, 0])
          for (const { answer } of answers) {
            if (answer._tag === "Granted") continue
            const { gate, subject: of } = answer._tag === "Refused" ? answer : {}
            yield* is("the gate", [answer._tag, gate, of], ["Refused", "probing", subject])
          }
          yield* won === undefined ? Effect.void : won.member.settle(won.ticket, round % 2 === 0 ? ended : unsent)
          const other = all.find((member) => member !== won?.member)
          if (other === undefined) return
          yield* other.freed(subject.of)
          yield* eventually(other, probe(subject))
        }
        const [a, b] = all
        if (a === undefined || b === undefined) return
        yield* is("a probe of a model", (yield* a.claim(probe(key("k", "m"), 200)))._tag, "Granted")
        yield* eventually(b, probe(key("k", "m"), longMillis))
        yield* is("the next one", (yield* a.claim(probe(key("k", "m"))))._tag, "Refused")
      })
  ),
  body("what is told of a subject ends its probe", ({ grant, refuse, two }) =>
    Effect.gen(function*() {
      const [a, b] = yield* two
      yield* grant(a, probe(key("k")))
      yield* refuse(b, probe(key("k")))
      yield* a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: { _tag: "Closed", trips: 0 } }])
      yield* grant(b, probe(key("k")))
      yield* grant(a, probe(group("g")))
      yield* a.tell([{ _tag: "Lifted", subject: group("g"), forMillis: 0 }])
      yield* grant(b, probe(group("g")))
    })),
  body(
    "no probe while the breaker or the cooldown lasts that it would end",
    ({ eventually, grant, is, refuse, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const ticket = yield* grant(a, probe(key("k")))
        const before = yield* MonotonicTime.now
        yield* a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: open(400) }])
        yield* a.settle(ticket, ended)
        // It has surely not lasted that long when the answer is here.
        const answer = yield* b.claim(probe(key("k")))
        if ((yield* MonotonicTime.now) < before + 400) yield* is("the answer at once", answer._tag, "Refused")
        if (answer._tag === "Refused") yield* eventually(b, probe(key("k")))
        yield* a.tell([cooldown(group("g", "m"), longMillis)])
        const { forMillis, gate } = yield* refuse(b, probe(group("g", "m")))
        // Who is ahead of what it tells asks again soon.
        yield* is("when to ask again", [gate, forMillis > 0 && forMillis <= 1_000], ["probing", true])
        yield* refuse(a, probe(group("g", "m")))
        yield* grant(a, probe(group("g")))
        yield* grant(b, probe(key("other")))
      })
  ),
  body(
    "what is under way already, or was taken elsewhere, counts whatever there is",
    ({ eventually, grant, is, refuse, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const claim = { ...limited(key("k"), 1, longMillis), concurrency: places(key("k"), 1).concurrency }
        const first = yield* grant(a, claim)
        const second = yield* grant(b, { ...claim, probes: probe(key("k")).probes, held: true })
        yield* a.settle(first, unsent)
        yield* refuse(a, claim)
        yield* b.settle(second, unsent)
        yield* eventually(a, claim)
        const limit = { subject: key("l"), unit: "requests", limit: 5, windowMillis: longMillis } as const
        yield* a.tell([{ _tag: "Taken", ...limit, amount: 5 }])
        const { forMillis, mayFree } = yield* refuse(b, limited(key("l"), 5, longMillis))
        yield* is("nothing that may free", mayFree, false)
        yield* is("for one window", forMillis > longMillis / 2 && forMillis <= longMillis, true)
      })
  ),
  body(
    "what is settled twice, or is not known, changes nothing",
    ({ eventually, grant, refuse, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const claim = { ...limited(key("k"), 3, longMillis), concurrency: places(key("k"), 2).concurrency }
        const first = yield* grant(a, claim)
        for (const settled of [answered, answered, ended, ended, unsent]) yield* a.settle(first, settled)
        yield* a.settle({ id: "never heard of" }, ended)
        const second = yield* eventually(b, claim)
        const third = yield* eventually(a, claim)
        yield* refuse(b, claim)
        yield* a.settle(third, answered)
        yield* a.settle(third, unsent)
        // Two are answered, and one is in flight.
        yield* refuse(a, limited(key("k"), 3, longMillis))
        yield* b.settle(second, unsent)
        yield* eventually(a, claim)
      })
  ),
  body("a claim that is interrupted is given back", ({ eventually, two }) =>
    Effect.gen(function*() {
      const [a, b] = yield* two
      for (let yields = 0; yields < 12; yields++) {
        const claiming = yield* Effect.fork(a.claim(places(key("k"), 1)))
        yield* Effect.repeatN(Effect.yieldNow(), yields)
        const exit = yield* Fiber.interrupt(claiming)
        if (Exit.isSuccess(exit) && exit.value._tag === "Granted") yield* a.settle(exit.value.ticket, unsent)
        yield* b.settle(yield* eventually(b, places(key("k"), 1)), unsent)
      }
    })),
  body(
    "who leaves gives back what it held, and what it may have sent counts",
    ({ eventually, grant, is, refuse, two }) =>
      Effect.gen(function*() {
        const [a, b] = yield* two
        const held = { ...limited(key("k"), 1, longMillis), concurrency: places(key("c"), 1).concurrency }
        yield* grant(a, { ...held, probes: probe(key("p"), longMillis).probes })
        const settled = yield* grant(a, places(key("d"), 1))
        // What was said right before is not lost.
        yield* a.settle(settled, ended)
        yield* a.leave
        yield* b.hears("Members", ({ members }) => members === 1)
        yield* eventually(b, places(key("d"), 1))
        yield* eventually(b, places(key("c"), 1))
        yield* eventually(b, probe(key("p")))
        const { forMillis, gate, mayFree } = yield* refuse(b, limited(key("k"), 1, longMillis))
        yield* is("the limit, for a window at most", [gate, forMillis <= longMillis], ["limit", true])
        yield* is("nothing that may free", mayFree, false)
      })
  ),
  body(
    "while it cannot be reached all is answered in time, and nothing is lost by it",
    ({ eventually, grant, is, join, subject, two }) =>
      subject.outage === undefined ? Effect.void : Effect.gen(function*() {
        const { begin, end } = subject.outage ?? { begin: Effect.void, end: Effect.void }
        const [a, b] = yield* two
        const first = yield* grant(a, places(key("c"), 1))
        yield* a.tell([cooldown(key("k"), longMillis)])
        yield* b.hears("Cooldown")
        yield* Effect.forEach([a, b], ({ forget }) => forget)
        yield* begin
        const inTime = Effect.timeoutOption(a.claim(places(key("d"), 1)), patience)
        yield* is("an answer to a claim", Option.map(yield* inTime, ({ _tag }) => _tag), Option.some("Away"))
        const telling = Effect.timeoutOption(a.tell([cooldown(key("lost"), longMillis)]), patience)
        yield* is("an answer to a notice", Option.map(yield* telling, ({ _tag }) => _tag), Option.some("Away"))
        yield* is("how many there were", (yield* a.hears("Away")).members, 2)
        yield* b.hears("Away")
        yield* a.settle(first, ended)
        yield* end
        const joined = yield* a.hears("Joined")
        yield* is("what is kept", [joined.kept, joined.cooldowns.map(({ subject }) => subject.of)], [true, ["k"]])
        yield* is("that it was told once", (yield* a.heard).filter(({ _tag }) => _tag === "Away").length, 1)
        yield* b.hears("Joined")
        // What became of tickets meanwhile, and of the claim that nobody answered.
        yield* eventually(b, places(key("c"), 1))
        yield* eventually(b, places(key("d"), 1))
        const c = yield* join
        yield* c.tell([cooldown(key("again"), longMillis)])
        yield* a.hears("Cooldown", ({ cooldown }) => cooldown.subject.of === "again")
      })
  ),
  body(
    "when it lost everything all are told so, and old versions do not hold against new ones",
    ({ eventually, grant, is, subject, two }) =>
      subject.loseAll === undefined ? Effect.void : Effect.gen(function*() {
        const [a, b] = yield* two
        const opens = (from: SharedPool.Version | undefined) =>
          Effect.map(
            a.tell([{ _tag: "Breaker", keyId: "k", from, to: open(longMillis) }]),
            (told) => breakersOf(told)[0]
          )
        const before = yield* opens(undefined)
        yield* grant(a, places(key("c"), 1))
        yield* b.hears("Breaker")
        yield* Effect.forEach([a, b], ({ forget }) => forget)
        yield* subject.loseAll ?? Effect.void
        for (const member of [a, b]) {
          const { breakers, cooldowns } = yield* member.hears("Joined", ({ kept }) => !kept)
          yield* is("nothing", [breakers.length, cooldowns.length], [0, 0])
        }
        yield* eventually(b, places(key("c"), 1))
        const after = yield* opens(before?.version)
        yield* is("a larger epoch", (after?.version.epoch ?? 0) > (before?.version.epoch ?? Infinity), true)
        yield* is("that the old version is nobody's", (yield* opens(before?.version))?.version, after?.version)
      })
  )
]

// -------------------------------------------------------------------------------------------------------------- members

/** One that shares the pool, and what it has heard since it forgot. */
interface Member extends SharedPool.SharedPool {
  readonly heard: Effect.Effect<ReadonlyArray<SharedPool.News>>
  readonly hears: <Tag extends SharedPool.News["_tag"]>(
    tag: Tag,
    is?: (news: Extract<SharedPool.News, { readonly _tag: Tag }>) => boolean
  ) => Effect.Effect<Extract<SharedPool.News, { readonly _tag: Tag }>, unknown>
  /** Hears that something was given back; who may have missed that joins again instead, and has to ask. */
  readonly freed: (of: string) => Effect.Effect<void, unknown>
  readonly forget: Effect.Effect<void>
  readonly leave: Effect.Effect<void>
}

/** What a check works with. */
interface Tools {
  readonly subject: Subject
  readonly is: Is<unknown>
  /** That a time is one that began with so much. */
  readonly only: (what: string, millis: number, whole: number) => Effect.Effect<void, unknown>
  readonly join: Effect.Effect<Member, unknown, Scope.Scope>
  readonly joinPool: (pool: string) => Effect.Effect<Member, unknown, Scope.Scope>
  /** Two that know of each other, and have heard nothing else. */
  readonly two: Effect.Effect<readonly [Member, Member], unknown, Scope.Scope>
  readonly grant: (member: Member, claim: SharedPool.Claim) => Effect.Effect<SharedPool.Ticket, unknown>
  /** Asks until it is granted. */
  readonly eventually: (member: Member, claim: SharedPool.Claim) => Effect.Effect<SharedPool.Ticket, unknown>
  readonly refuse: (
    member: Member,
    claim: SharedPool.Claim
  ) => Effect.Effect<Extract<SharedPool.Answer, { readonly _tag: "Refused" }>, unknown>
}

interface Admitted {
  readonly asked: number
  readonly granted: number
  free: number
}

// A hoisted function, because `all` needs it.
function body(name: string, run: (tools: Tools) => Effect.Effect<void, unknown, Scope.Scope>): Body {
  return { name, run: (subject, is) => Effect.scoped(run(toolsOf(subject, is))) }
}

const toolsOf = (subject: Subject, is: Is<unknown>): Tools => {
  const joinPool = (pool: string) => memberOf(subject, is, pool)
  const join = Effect.tap(joinPool("contract"), (member) => member.hears("Joined"))
  const unlike = (what: string, answer: SharedPool.Answer) =>
    Effect.zipRight(is("the answer to a claim", answer, what), Effect.dieMessage(what))
  return {
    subject,
    is,
    only: (what, millis, whole) => is(what, millis > whole / 2 && millis <= whole ? "as told" : millis, "as told"),
    join,
    joinPool,
    two: Effect.gen(function*() {
      const a = yield* join
      const b = yield* join
      yield* a.hears("Members", ({ members }) => members === 2)
      yield* Effect.zipRight(a.forget, b.forget)
      return [a, b] as const
    }),
    grant: (member, claim) =>
      Effect.flatMap(
        member.claim(claim),
        (answer) => answer._tag === "Granted" ? Effect.succeed(answer.ticket) : unlike("Granted", answer)
      ),
    eventually: (member, claim) =>
      Effect.gen(function*() {
        const until = (yield* MonotonicTime.now) + patienceMillis
        for (let pause = 5;; pause = Math.min(250, pause * 2)) {
          const answer = yield* member.claim(claim)
          if (answer._tag === "Granted") return answer.ticket
          if ((yield* MonotonicTime.now) > until) return yield* unlike("Granted in the end", answer)
          yield* Effect.sleep(pause)
        }
      }),
    refuse: (member, claim) =>
      Effect.flatMap(
        member.claim(claim),
        (answer) => answer._tag === "Refused" ? Effect.succeed(answer) : unlike("Refused", answer)
      )
  }
}

const memberOf = (
  { open }: Subject,
  is: Is<unknown>,
  pool: string
): Effect.Effect<Member, unknown, Scope.Scope> =>
  Effect.gen(function*() {
    const scope = yield* Effect.flatMap(Effect.scope, (outer) => Scope.fork(outer, { _tag: "Sequential" }))
    const store = yield* Scope.extend(open, scope)
    if (store.share === undefined) {
      yield* is("a store with `share`", "one without", "one with it")
      return yield* Effect.dieMessage("it shares nothing")
    }
    const port = yield* Scope.extend(store.share(pool), scope)
    const log = yield* SubscriptionRef.make<ReadonlyArray<SharedPool.News>>([])
    const reading = Stream.runForEach(port.news, (news) => SubscriptionRef.update(log, (all) => [...all, news]))
    yield* Effect.forkIn(Effect.interruptible(reading), scope)
    const first = <A extends SharedPool.News>(tag: string, isWanted: (news: SharedPool.News) => news is A) =>
      log.changes.pipe(
        Stream.filterMap((all) => Option.fromNullable(all.find(isWanted))),
        Stream.runHead,
        Effect.timeout(patience),
        Effect.orElseSucceed(() => Option.none<A>()),
        Effect.flatMap((found) =>
          Option.isSome(found)
            ? Effect.succeed(found.value)
            : Effect.zipRight(
              Effect.flatMap(SubscriptionRef.get(log), (all) => is(`news of ${tag}`, all.map(({ _tag }) => _tag), tag)),
              Effect.dieMessage(tag)
            )
        )
      )
    const hears: Member["hears"] = (tag, matches = () => true) => {
      type Wanted = Extract<SharedPool.News, { readonly _tag: typeof tag }>
      // The tag has been looked at: it is one of those.
      return first(tag, (news): news is Wanted => news._tag === tag && matches(news as Wanted))
    }
    const freed: Member["freed"] = (of) =>
      first("Freed", (news): news is Extract<SharedPool.News, { readonly _tag: "Freed" | "Joined" }> =>
        news._tag === "Joined" || (news._tag === "Freed" && news.subject.of === of))
    return {
      ...port,
      heard: SubscriptionRef.get(log),
      hears,
      freed,
      forget: SubscriptionRef.set(log, []),
      leave: Scope.close(scope, Exit.void)
    }
  })

// --------------------------------------------------------------------------------------------------------------- words

/** So long nothing lasts that is awaited. */
const longMillis = 600_000
/** So long is waited for what must come. */
const patienceMillis = 20_000
const patience = "20 seconds"

/**
 * A key, or a model of it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const key = (of: string, model?: string): SharedPool.Subject => ({ scope: "key", of, ...modelOf(model) })

/**
 * A group, or a model of it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const group = (of: string, model?: string): SharedPool.Subject => ({ scope: "group", of, ...modelOf(model) })

const modelOf = (model: string | undefined) => model === undefined ? {} : { model }

/**
 * That a subject rests for so long, as it was told.
 *
 * @since 0.1.0
 * @category constructors
 */
export const cooldown = (
  subject: SharedPool.Subject,
  forMillis: number,
  more: Partial<SharedPool.SharedCooldown> = {}
): SharedPool.Notice => ({
  _tag: "Cooldown",
  cooldown: {
    subject,
    kind: "RateLimited",
    forMillis,
    waitMillis: forMillis,
    firmMillis: forMillis,
    provenance: "told",
    refused: false,
    step: 0,
    ...more
  }
})

/**
 * A breaker that is open for so long.
 *
 * @since 0.1.0
 * @category constructors
 */
export const open = (forMillis: number, trips = 1): SharedPool.BreakerState => ({
  _tag: "Open",
  forMillis,
  waitMillis: forMillis,
  trips
})

const waitOf = (state: SharedPool.BreakerState) => state._tag === "Open" ? state.waitMillis : 0

const told = (breakers: ReadonlyArray<SharedPool.SharedBreaker>): SharedPool.Told => ({ _tag: "Told", breakers })
const breakersOf = (told: SharedPool.Told) => told._tag === "Told" ? told.breakers : []

const versionText = ({ epoch, generation }: SharedPool.Version) => `${epoch}.${generation}`
const sameVersion = (a: SharedPool.Version, b: SharedPool.Version) => versionText(a) === versionText(b)
const isLater = (a: SharedPool.Version, b: SharedPool.Version) =>
  a.epoch > b.epoch || (a.epoch === b.epoch && a.generation > b.generation)

/** News that somebody told. */
const isTold = ({ _tag }: SharedPool.News) =>
  _tag === "Cooldown" || _tag === "Lifted" || _tag === "Breaker" || _tag === "Reset"

/**
 * A claim that asks for nothing.
 *
 * @since 0.1.0
 * @category constants
 */
export const nothing: SharedPool.Claim = { limits: [], concurrency: [], probes: [] }

/**
 * A claim of one request of a limit.
 *
 * @since 0.1.0
 * @category constructors
 */
export const limited = (
  subject: SharedPool.Subject,
  limit: number,
  windowMillis: number,
  more: Partial<SharedPool.SharedLimit> = {}
): SharedPool.Claim => ({
  ...nothing,
  limits: [{ subject, unit: "requests", limit, windowMillis, amount: 1, ...more }]
})

/**
 * A claim of one place of so many at once.
 *
 * @since 0.1.0
 * @category constructors
 */
export const places = (subject: SharedPool.Subject, most: number): SharedPool.Claim => ({
  ...nothing,
  concurrency: [{ subject, most }]
})

/**
 * A claim of a probe.
 *
 * @since 0.1.0
 * @category constructors
 */
export const probe = (subject: SharedPool.Subject, forMillis = 60_000): SharedPool.Claim => ({
  ...nothing,
  probes: [{ subject, forMillis }]
})

/**
 * The answer has begun.
 *
 * @since 0.1.0
 * @category constants
 */
export const answered = { _tag: "Answered" } as const

/**
 * It is over, and nobody knows how many tokens it used.
 *
 * @since 0.1.0
 * @category constants
 */
export const ended = { _tag: "Ended", tokens: undefined } as const

/**
 * It was never sent.
 *
 * @since 0.1.0
 * @category constants
 */
export const unsent = { _tag: "Unsent" } as const
