/** What processes share on Redis, as long as it answers: on a real server. */
import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Queue from "effect/Queue"
import * as Random from "effect/Random"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { performance } from "node:perf_hooks"
import * as RedisPoolStore from "../../src/redis/RedisPoolStore.js"
import type * as SharedPool from "../../src/SharedPool.js"
import * as RedisMember from "../support/RedisMember.js"
import * as RedisServer from "../support/RedisServer.js"

const { answered, cooldown, ended, granted, group, key, limited, open, patient, places, probe, refused, unsent } =
  RedisMember

const server = RedisServer.make()

/** So many members of a pool on a server. */
const members = (redis: RedisServer.RedisServer, count: number, more: object = {}) =>
  Effect.tap(
    Effect.forEach(Array.from({ length: count }), () => RedisMember.make({ ...patient, url: redis.url, ...more })),
    (all) =>
      Effect.forEach(all, ({ forget, hears }, i) =>
        i === count - 1 ? forget : Effect.zipRight(
          hears("Members", ({ members }) => members === count),
          forget
        ))
  )

const test = (
  title: string,
  body: (redis: RedisServer.RedisServer) => Effect.Effect<void, unknown, import("effect/Scope").Scope>
) => it.scopedLive(title, () => Effect.flatMap(server, body))

describe.skipIf(!RedisServer.isHere)("P4: news", () => {
  test("a cooldown told here is heard there, as it is, and by nobody who told it", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      assert.deepStrictEqual(
        yield* a.tell([cooldown(key("k"), 5_000, { kind: "QuotaExhausted", step: 2, refused: true })]),
        {
          _tag: "Told",
          breakers: []
        }
      )
      const { cooldown: heard } = yield* b.hears("Cooldown")
      assert.deepStrictEqual(heard, {
        subject: key("k"),
        kind: "QuotaExhausted",
        forMillis: 5_000,
        waitMillis: 5_000,
        firmMillis: 5_000,
        provenance: "told",
        refused: true,
        step: 2
      })
      yield* b.tell([cooldown(key("other"), 1)])
      yield* a.hears("Cooldown")
      assert.deepStrictEqual((yield* a.heard).map(({ _tag }) => _tag), ["Cooldown"])
    }))

  test("cooldowns merge by maximum, also the firm part, and the shorter one is no news", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      yield* a.tell([cooldown(key("k"), 600_000)])
      yield* b.tell([
        cooldown(key("k"), 300_000, { provenance: "guessed" }),
        cooldown(key("k"), 900_000, { firmMillis: undefined, provenance: "guessed" })
      ])
      const { cooldown: merged } = yield* a.hears("Cooldown")
      assert.strictEqual((yield* a.heard).length, 1)
      assert.strictEqual(merged.waitMillis, 900_000)
      assert.strictEqual(merged.provenance, "guessed")
      assert.isAbove(merged.firmMillis ?? 0, 500_000)
      assert.isAtMost(merged.firmMillis ?? 0, 600_000)
      const c = yield* RedisMember.make({ ...patient, url: redis.url })
      const { cooldowns } = yield* c.hears("Joined")
      assert.strictEqual(cooldowns.length, 1)
      assert.isAbove(cooldowns[0]?.forMillis ?? 0, 700_000)
    }))

  test("a lifted cooldown is over for all; one that lasts much longer than was known stays", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      yield* a.tell([cooldown(key("k"), 600_000), cooldown(key("k", "m"), 60_000)])
      yield* b.tell([
        { _tag: "Lifted", subject: key("k"), forMillis: 60_000 },
        { _tag: "Lifted", subject: key("k", "m"), forMillis: 60_000 }
      ])
      assert.deepStrictEqual(yield* a.hears("Lifted"), { _tag: "Lifted", subject: key("k", "m"), forMillis: 60_000 })
      const c = yield* RedisMember.make({ ...patient, url: redis.url })
      assert.deepStrictEqual((yield* c.hears("Joined")).cooldowns.map(({ subject }) => subject), [key("k")])
    }))

  test("of many that trip one breaker exactly one wins, and all learn the same", (redis) =>
    Effect.gen(function*() {
      const all = yield* members(redis, 6)
      let from: SharedPool.Version | undefined
      for (let round = 1; round <= 20; round++) {
        const told = yield* Effect.forEach(
          all,
          (member, i) => member.tell([{ _tag: "Breaker", keyId: "k", from, to: open(1_000_000 + i, round) }]),
          { concurrency: "unbounded" }
        )
        const stands = told.flatMap((one) => one._tag === "Told" ? one.breakers : [])
        assert.strictEqual(stands.length, all.length)
        const waits = stands.map(({ state }) => state._tag === "Open" ? state.waitMillis : 0)
        assert.strictEqual(new Set(waits).size, 1, "one winner")
        const winner = (waits[0] ?? 0) - 1_000_000
        // An unknown breaker takes any: there every transition counts, one after the other.
        if (round > 1) assert.strictEqual(stands[0]?.version.generation, (from?.generation ?? 0) + 1)
        for (const [i, member] of all.entries()) {
          if (i === winner) continue
          const { breaker } = yield* member.hears("Breaker", ({ breaker }) =>
            breaker.version.generation === stands[0]?.version.generation)
          assert.deepStrictEqual(breaker.version, stands[0]?.version)
        }
        from = stands[0]?.version
      }
    }))

  test("a reset forgets all that is held against a key and its group, and fences what was told before", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const [tripped] = yield* breakers(a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: open(1e6) }]))
      yield* a.tell([
        cooldown(key("k"), 1e6),
        cooldown(key("k", "m"), 1e6),
        cooldown(group("g"), 1e6),
        cooldown(key("kk"), 1e6)
      ])
      const [closed] = yield* breakers(b.tell([{ _tag: "Reset", keyId: "k", group: "g" }]))
      assert.deepStrictEqual(closed?.state, { _tag: "Closed", trips: 0 })
      const { group: of, keyId, version } = yield* a.hears("Reset")
      assert.deepStrictEqual({ of, keyId, version }, { of: "g", keyId: "k", version: closed?.version })
      const late = yield* breakers(a.tell([{ _tag: "Breaker", keyId: "k", from: tripped?.version, to: open(5) }]))
      assert.deepStrictEqual<unknown>(late, [closed])
      const c = yield* RedisMember.make({ ...patient, url: redis.url })
      const { breakers: known, cooldowns } = yield* c.hears("Joined")
      assert.deepStrictEqual(cooldowns.map(({ subject }) => subject), [key("kk")])
      assert.deepStrictEqual<unknown>(known, [closed])
    }))

  test("members are counted as they come, go, and vanish", (redis) =>
    Effect.gen(function*() {
      const quick = { ...patient, commandTimeout: 1_000, url: redis.url, heartbeat: 50, memberTimeout: 500 }
      const a = yield* RedisMember.make(quick)
      assert.strictEqual((yield* a.hears("Joined")).members, 1)
      // However busy the machine is, who has joined before is not gone for it.
      const b = yield* RedisMember.make({ ...quick, memberTimeout: 60_000 })
      assert.strictEqual((yield* b.hears("Joined")).members, 2)
      yield* a.hears("Members", ({ members }) => members === 2)
      yield* a.forget
      yield* b.leave
      yield* a.hears("Members", ({ members }) => members === 1)
      const way = yield* RedisServer.proxy(redis.port)
      const c = yield* RedisMember.make({ ...quick, url: way.url })
      yield* a.hears("Members", ({ members }) => members === 2)
      yield* a.forget
      yield* way.swallow(true)
      yield* a.hears("Members", ({ members }) => members === 1)
      yield* way.swallow(false)
      yield* c.hears("Away")
    }))

  test("what was pushed while nobody could listen is noticed at the heartbeat", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const a = yield* RedisMember.make({ ...patient, url: redis.url })
      const b = yield* RedisMember.make({ ...patient, url: way.url, heartbeat: 50, memberTimeout: 60_000 })
      yield* way.refuse((sent) => sent.includes("subscribe"))
      assert.strictEqual(yield* way.cut((sent) => sent.includes("subscribe")), 1)
      yield* b.forget
      yield* a.tell([cooldown(key("k"), 60_000)])
      const joined = yield* b.hears("Joined", ({ cooldowns }) => cooldowns.length === 1)
      assert.isTrue(joined.kept)
      assert.isFalse((yield* b.heard).some(({ _tag }) => _tag === "Away"), "commands work")
      // And when it can listen again, it hears.
      yield* way.refuse(undefined)
      yield* RedisServer.until(redis.cli("pubsub", "numsub", "{keymesh:test}:news:0:"), (said) => said.endsWith("2"))
      yield* a.tell([cooldown(key("l"), 60_000)])
      yield* b.hears("Cooldown", ({ cooldown }) => cooldown.subject.of === "l")
    }))

  test("a gap in the numbers of what is pushed makes a process read everything again", (redis) =>
    Effect.gen(function*() {
      // No heartbeat comes in time to notice it.
      const slow = { ...patient, url: redis.url, heartbeat: 60_000, memberTimeout: 240_000 }
      const a = yield* RedisMember.make(slow)
      const b = yield* RedisMember.make(slow)
      yield* a.hears("Members", ({ members }) => members === 2)
      yield* a.tell([cooldown(key("before"), 600_000)])
      yield* b.hears("Cooldown")
      yield* b.forget
      // What was told in between changed what is known, and its push was lost.
      const lost = { k: "RateLimited", u: Date.now() + 600_000, w: 600_000, p: "told", x: false, s: 0 }
      yield* redis.cli("hset", "{keymesh:test}:cooldowns", "k/lost", JSON.stringify(lost))
      yield* redis.cli("hincrby", "{keymesh:test}:meta", "seq", "1")
      yield* a.tell([cooldown(key("after"), 600_000)])
      yield* b.hears("Cooldown", ({ cooldown }) => cooldown.subject.of === "after")
      const { cooldowns, kept } = yield* b.hears("Joined")
      assert.isTrue(kept)
      assert.deepStrictEqual(cooldowns.map(({ subject }) => subject.of).sort(), ["after", "before", "lost"])
    }))

  test("P2: a store that is closed under who shares it says so at once", (redis) =>
    Effect.gen(function*() {
      const opened = yield* Scope.make()
      // No heartbeat comes in time to notice it.
      const settings = { ...patient, url: redis.url, heartbeat: 60_000, memberTimeout: 240_000 }
      const store = yield* Scope.extend(RedisPoolStore.make(settings), opened)
      const port = yield* store.share?.("test") ?? Effect.dieMessage("it shares nothing")
      const heard = yield* Queue.unbounded<SharedPool.News>()
      yield* Effect.forkScoped(Stream.runForEach(port.news, (news) => Queue.offer(heard, news)))
      assert.strictEqual((yield* Queue.take(heard))._tag, "Joined")
      yield* Scope.close(opened, Exit.void)
      assert.deepStrictEqual(yield* Queue.take(heard), {
        _tag: "Away",
        members: 1,
        problem: "its store was closed"
      })
      assert.deepStrictEqual(yield* port.claim(places(key("k"), 1)), { _tag: "Away" })
    }))

  test("a listener that hears nothing, though it is connected, is replaced", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const a = yield* RedisMember.make({ ...patient, url: redis.url })
      const b = yield* RedisMember.make({ ...patient, url: way.url, heartbeat: 50, memberTimeout: 60_000 })
      yield* way.deafen((sent) => sent.includes("subscribe"))
      yield* b.forget
      yield* a.tell([cooldown(key("k"), 60_000)])
      yield* b.hears("Joined", ({ cooldowns }) => cooldowns.length === 1)
      yield* RedisServer.until(way.opened, (opened) => opened >= 3)
      yield* RedisServer.until(
        Effect.zipRight(a.tell([cooldown(key("l"), Math.random() * 1e6 + 1e6)]), b.heard),
        (heard) => heard.some(({ _tag }) => _tag === "Cooldown")
      )
    }))

  test("nothing of a pool is kept for ever, and all of it is in one slot", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      yield* a.tell([cooldown(key("k"), 1_000), { _tag: "Breaker", keyId: "k", from: undefined, to: open(5) }])
      const claim = {
        ...limited(group("g"), 5, 60_000),
        concurrency: places(key("k"), 3).concurrency,
        probes: probe(key("p")).probes
      }
      const ticket = yield* granted(a, claim)
      yield* b.tell([{ _tag: "Taken", subject: group("h"), unit: "tokens", limit: 5, windowMillis: 1_000, amount: 2 }])
      yield* a.settle(ticket, answered)
      const names = (yield* RedisServer.until(redis.cli("keys", "*"), (all) => all.split("\n").length >= 8)).split("\n")
      for (const name of names) {
        assert.match(name, /^\{keymesh:test\}:/)
        assert.isAbove(Number(yield* redis.cli("pttl", name)), 0, name)
      }
    }))
})

describe.skipIf(!RedisServer.isHere)("P4: claims", () => {
  test("one probe per key over all processes, however many ask", (redis) =>
    Effect.gen(function*() {
      const all = yield* members(redis, 8)
      for (let round = 0; round < 10; round++) {
        const answers = yield* Effect.forEach(
          all.flatMap((member) => Array.from({ length: 5 }, () => member)),
          (member) => Effect.map(member.claim(probe(key("k"))), (answer) => ({ member, answer })),
          { concurrency: "unbounded" }
        )
        const won = answers.filter(({ answer }) => answer._tag === "Granted")
        assert.strictEqual(won.length, 1)
        for (const { answer } of answers) {
          if (answer._tag === "Granted") continue
          assert.deepInclude(answer, { _tag: "Refused", gate: "probing", subject: key("k"), mayFree: true })
        }
        const other = all.find((member) => member !== won[0]?.member)
        const ticket = won[0]?.answer._tag === "Granted" ? won[0].answer.ticket : { id: "" }
        yield* Effect.forEach(all, ({ forget }) => forget)
        yield* won[0]?.member.settle(ticket, round % 2 === 0 ? ended : unsent) ?? Effect.void
        yield* other?.hears("Freed", ({ subject }) => subject.of === "k") ?? Effect.void
      }
    }))

  test("a probe is free when its time is over, and when its outcome is told", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      yield* granted(a, probe(key("k"), 2_000))
      const { forMillis } = yield* refused(b, probe(key("k")))
      assert.isAtMost(forMillis, 2_000)
      yield* RedisServer.until(b.claim(probe(key("k"))), ({ _tag }) => _tag === "Granted")
      yield* refused(a, probe(key("k")))
      yield* b.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: { _tag: "Closed", trips: 0 } }])
      yield* granted(a, probe(key("k")))
      yield* granted(a, probe(group("g")))
      yield* a.tell([{ _tag: "Lifted", subject: group("g"), forMillis: 0 }])
      yield* granted(b, probe(group("g")))
    }))

  test("no probe for who has not heard yet that the last one went wrong", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const ticket = yield* granted(a, probe(key("k")))
      yield* a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: open(2_000) }])
      yield* a.settle(ticket, ended)
      assert.isAtMost((yield* refused(b, probe(key("k")))).forMillis, 1_000)
      yield* RedisServer.until(b.claim(probe(key("k"))), ({ _tag }) => _tag === "Granted")
      yield* b.tell([cooldown(group("g"), 600_000)])
      assert.deepInclude(yield* refused(a, probe(group("g"))), {
        gate: "probing",
        subject: group("g"),
        forMillis: 1_000
      })
      yield* granted(a, probe(key("l")))
    }))

  test("concurrency is exact over all processes, and who was refused hears when there is room", (redis) =>
    Effect.gen(function*() {
      const all = yield* members(redis, 4)
      const running = { now: 0, most: 0, done: 0 }
      yield* Effect.forEach(all, (member) =>
        Effect.forEach(Array.from({ length: 25 }), () =>
          Effect.gen(function*() {
            for (;;) {
              yield* member.forget
              const answer = yield* member.claim(places(key("k"), 3))
              if (answer._tag === "Granted") {
                running.most = Math.max(running.most, ++running.now)
                yield* Effect.sleep(2)
                running.now--
                running.done++
                return yield* member.settle(answer.ticket, ended)
              }
              assert.deepInclude(answer, { _tag: "Refused", gate: "concurrency", forMillis: Infinity, mayFree: true })
              // Nobody polls: if this were not told, the test would hang.
              yield* member.hears("Freed")
            }
          })), { concurrency: "unbounded" })
      assert.deepStrictEqual({ most: running.most, done: running.done }, { most: 3, done: 100 })
    }))

  test("a limit admits exactly: in any window no more than it says, from each answer on", (redis) =>
    Effect.gen(function*() {
      const windowMillis = 400
      const limit = 7
      const all = yield* members(redis, 4)
      const admitted: Array<{ readonly asked: number; readonly granted: number; answered: number; unsent: boolean }> =
        []
      yield* Effect.forEach(all, (member) =>
        Effect.forEach(Array.from({ length: 4 }), () =>
          Effect.gen(function*() {
            for (let i = 0; i < 6;) {
              const asked = performance.now()
              const answer = yield* member.claim(limited(key("k"), limit, windowMillis))
              if (answer._tag === "Granted") {
                i++
                const one = { asked, granted: performance.now(), answered: Infinity, unsent: false }
                admitted.push(one)
                yield* Effect.sleep((yield* Random.next) * 30)
                if ((yield* Random.next) < 0.2) {
                  one.unsent = true
                  one.answered = performance.now()
                  yield* member.settle(answer.ticket, unsent)
                } else {
                  one.answered = performance.now()
                  yield* member.settle(answer.ticket, answered)
                  yield* member.settle(answer.ticket, ended)
                }
              } else if (answer._tag === "Refused") {
                assert.strictEqual(answer.gate, "limit")
                yield* Effect.sleep(Math.min(answer.forMillis, 50) + 1)
              }
            }
          }), { concurrency: "unbounded" }), { concurrency: "unbounded" })
      assert.strictEqual(admitted.length, 96)
      // Redis heard each answer after it was given here, and granted each claim before it was known here: what surely counts
      // when another is granted, must leave room for it.
      for (const one of admitted) {
        const counting = admitted.filter((other) =>
          other !== one && other.granted < one.asked &&
          one.granted < (other.unsent ? other.answered : other.answered + windowMillis)
        )
        assert.isBelow(counting.length, limit)
      }
    }))

  test("tokens are held until the usage is known, and then count as what was used", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const tokens = (amount: number) => limited(group("g"), 1_000, 60_000, { unit: "tokens", amount })
      const first = yield* granted(a, tokens(800))
      assert.deepInclude(yield* refused(b, tokens(300)), {
        gate: "limit",
        subject: group("g"),
        forMillis: 60_000,
        mayFree: true
      })
      yield* a.settle(first, answered)
      yield* refused(b, tokens(300))
      yield* b.forget
      yield* a.settle(first, { _tag: "Ended", tokens: 500 })
      yield* b.hears("Freed")
      const second = yield* granted(b, tokens(300))
      yield* b.settle(second, { _tag: "Ended", tokens: 450 })
      // 950 of 1,000.
      yield* RedisServer.until(redis.cli("hkeys", "{keymesh:test}:held"), (fields) => !fields.includes("h|"))
      assert.isFalse((yield* refused(a, tokens(51))).mayFree)
      const third = yield* granted(a, tokens(50))
      yield* a.settle(third, unsent)
      yield* RedisServer.until(b.claim(tokens(50)), ({ _tag }) => _tag === "Granted")
    }))

  test("what is more than a limit passes when nothing is taken", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const huge = limited(key("k"), 100, 60_000, { unit: "tokens", amount: 5_000 })
      const ticket = yield* granted(a, huge)
      yield* refused(b, limited(key("k"), 100, 60_000, { unit: "tokens", amount: 1 }))
      yield* a.settle(ticket, unsent)
      const small = yield* until(b.claim(limited(key("k"), 100, 60_000, { unit: "tokens", amount: 1 })))
      yield* refused(a, huge)
      yield* b.settle(small, unsent)
      yield* until(a.claim(huge))
    }))

  test("a claim gets all or nothing", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      yield* granted(a, places(group("g"), 1))
      const all: SharedPool.Claim = {
        limits: limited(key("k"), 1, 60_000).limits,
        concurrency: [...places(key("k"), 1).concurrency, ...places(group("g"), 1).concurrency],
        probes: probe(key("k")).probes
      }
      for (let i = 0; i < 3; i++) {
        assert.deepInclude(yield* refused(b, all), { gate: "concurrency", subject: group("g"), forMillis: Infinity })
      }
      yield* granted(b, { ...all, concurrency: places(key("k"), 1).concurrency })
    }))

  test("what is under way already is taken whatever there is", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const claim = { ...limited(key("k"), 1, 60_000), concurrency: places(key("k"), 1).concurrency }
      const first = yield* granted(a, claim)
      const second = yield* granted(b, { ...claim, held: true })
      yield* a.settle(first, unsent)
      yield* refused(a, claim)
      yield* b.settle(second, unsent)
      yield* until(a.claim(claim))
    }))

  test("what was taken elsewhere counts from when it is told", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const { limits: [limit] } = limited(key("k"), 5, 60_000)
      if (limit === undefined) return
      yield* a.tell([{ _tag: "Taken", ...limit, amount: 5 }])
      const { forMillis } = yield* refused(b, limited(key("k"), 5, 60_000))
      assert.isAbove(forMillis, 50_000)
    }))

  test("a claim that is interrupted is given back", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const a = yield* RedisMember.make({ ...patient, url: way.url })
      const b = yield* RedisMember.make({ ...patient, url: redis.url })
      // As if somebody had been refused it: all hear when it is given back, and only if it had been granted.
      yield* redis.cli("hset", "{keymesh:test}:held", "w|k/k", "1")
      yield* way.delay(1_500)
      const claiming = yield* Effect.fork(a.claim(places(key("k"), 1)))
      yield* Effect.sleep(20)
      yield* Fiber.interrupt(claiming)
      assert.deepStrictEqual((yield* b.hears("Freed")).subject, key("k"))
      yield* granted(b, places(key("k"), 1))
    }))

  test("a claim whose answer comes too late is given back, even if it comes after that", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const a = yield* RedisMember.make({ url: way.url, claimTimeout: 100 })
      yield* way.delay(300)
      assert.deepStrictEqual(yield* a.claim(places(key("k"), 1)), { _tag: "Away" })
      assert.include((yield* a.hears("Away")).problem, "does not answer in time")
      yield* way.delay(0)
      yield* a.forget
      yield* a.hears("Joined")
      const b = yield* RedisMember.make({ ...patient, url: redis.url })
      yield* until(b.claim(places(key("k"), 1)))
      // The other way round: what gives it back comes first.
      const held = "{keymesh:test}:held"
      yield* redis.cli("hset", held, "x|late.1", "1")
      const epoch = yield* redis.cli("hget", "{keymesh:test}:meta", "epoch")
      const ticket = JSON.stringify({ t: "late.1", m: "m", l: [], c: [{ o: "k/z", n: 1 }], p: [] })
      const Scripts = yield* Effect.promise(() => import("../../src/redis/Scripts.js"))
      const keys = ["meta", "members", "held", "cooldowns", "breakers"].map((name) => `{keymesh:test}:${name}`)
      assert.strictEqual(
        yield* redis.cli("eval", Scripts.claim.text, "5", ...keys, "m", epoch, "1000", ticket, "15000"),
        "late"
      )
      yield* granted(b, places(key("z"), 1))
    }))

  test("a process that is busy is not away for it", (redis) =>
    Effect.gen(function*() {
      const a = yield* RedisMember.make({ ...patient, url: redis.url, claimTimeout: 150 })
      const claiming = yield* Effect.fork(a.claim(places(key("k"), 1)))
      yield* Effect.yieldNow()
      // Far longer than the claim may take, and long enough for Redis to answer it.
      const end = performance.now() + 2_000
      while (performance.now() < end);
      assert.strictEqual((yield* Fiber.join(claiming))._tag, "Granted")
    }))

  test("what a crashed process held is free again, and what it may have sent counts", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const quick = { ...patient, commandTimeout: 1_000, heartbeat: 500, memberTimeout: 2_000 }
      const crashing = yield* RedisMember.make({ ...quick, url: way.url })
      const b = yield* RedisMember.make({ ...quick, url: redis.url })
      const claim = {
        ...limited(key("k"), 1, 60_000),
        concurrency: places(key("c"), 1).concurrency,
        probes: probe(key("p")).probes
      }
      const ticket = yield* granted(crashing, claim)
      yield* way.swallow(true)
      yield* refused(b, places(key("c"), 1))
      yield* b.hears("Freed")
      const place = yield* granted(b, places(key("c"), 1))
      yield* granted(b, probe(key("p")))
      const { forMillis } = yield* refused(b, limited(key("k"), 1, 60_000))
      assert.isAbove(forMillis, 55_000)
      assert.isAtMost(forMillis, 60_000)
      // It was not gone after all: what it says then takes nothing from others, and counts from then.
      yield* way.swallow(false)
      yield* crashing.forget
      yield* crashing.hears("Joined")
      yield* crashing.settle(ticket, ended)
      yield* RedisServer.until(redis.cli("hkeys", "{keymesh:test}:held"), (fields) => !fields.includes(ticket.id))
      yield* refused(crashing, places(key("c"), 1))
      yield* b.settle(place, ended)
      yield* until(crashing.claim(places(key("c"), 1)))
    }))

  test("C6, P4: who was only taken for gone has what it holds again when it is back, and no longer than it holds it", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const quick = { ...patient, commandTimeout: 1_000, heartbeat: 500, memberTimeout: 2_000 }
      const a = yield* RedisMember.make({ ...quick, url: way.url })
      const b = yield* RedisMember.make({ ...quick, url: redis.url })
      const ticket = yield* granted(a, places(key("c"), 2))
      const given = yield* granted(a, places(key("c"), 2))
      for (let round = 0; round < 2; round++) {
        yield* way.swallow(true)
        const places2 = [yield* until(b.claim(places(key("c"), 2))), yield* until(b.claim(places(key("c"), 2)))]
        for (const place of places2) yield* b.settle(place, ended)
        yield* RedisServer.until(redis.cli("hget", "{keymesh:test}:held", "c|k/c"), (taken) => taken === "")
        yield* a.forget
        yield* way.swallow(false)
        assert.isTrue((yield* a.hears("Joined")).kept)
        assert.strictEqual(yield* redis.cli("hget", "{keymesh:test}:held", "c|k/c"), "2")
        yield* refused(b, places(key("c"), 2))
      }
      yield* b.forget
      yield* a.settle(ticket, ended)
      yield* b.hears("Freed")
      yield* granted(b, places(key("c"), 2))
      yield* refused(b, places(key("c"), 2))
      yield* a.settle(given, unsent)
      yield* until(b.claim(places(key("c"), 2)))
    }))

  test("C6: a process that leaves while it is being answered leaves nothing behind", (redis) =>
    Effect.gen(function*() {
      const quick = { ...patient, url: redis.url, heartbeat: 50, memberTimeout: 400 }
      const a = yield* RedisMember.make(quick)
      const b = yield* RedisMember.make(quick)
      const claiming = yield* Effect.fork(a.claim(places(key("c"), 1)))
      yield* Effect.yieldNow()
      yield* a.leave
      yield* Fiber.await(claiming)
      yield* until(b.claim(places(key("c"), 1)))
    }))

  test("what is under way already is taken, also where another has the probe or its outcome is told", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const claim = { ...probe(key("k")), concurrency: places(key("k"), 1).concurrency }
      yield* granted(a, probe(key("k")))
      yield* granted(b, { ...claim, held: true })
      yield* a.tell([cooldown(key("k"), 60_000)])
      yield* granted(b, { ...claim, held: true })
      assert.strictEqual(yield* redis.cli("hget", "{keymesh:test}:held", "c|k/k"), "2")
    }))

  test("amounts beyond all sense take nothing by half", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const all: SharedPool.Claim = {
        ...places(key("k"), 1),
        limits: [
          ...limited(key("k"), 1, 60_000).limits,
          ...limited(key("k"), 1_000, 60_000, { unit: "tokens", amount: 1e25 }).limits
        ]
      }
      const ticket = yield* granted(a, all)
      yield* a.settle(ticket, unsent)
      yield* until(b.claim(all))
    }))

  test("a process that leaves gives back what it held at once", (redis) =>
    Effect.gen(function*() {
      const quick = { ...patient, url: redis.url, heartbeat: 50, memberTimeout: 60_000 }
      const a = yield* RedisMember.make(quick)
      const b = yield* RedisMember.make(quick)
      yield* granted(a, places(key("c"), 1))
      const ticket = yield* granted(a, places(key("d"), 1))
      yield* refused(b, places(key("c"), 1))
      // What was settled just before is not lost.
      yield* a.settle(ticket, ended)
      yield* a.leave
      yield* granted(b, places(key("d"), 1))
      yield* until(b.claim(places(key("c"), 1)))
    }))

  test("a clock of Redis that was set back makes nobody wait longer than a window", (redis) =>
    Effect.gen(function*() {
      const [a] = yield* two(redis)
      const later = String(Date.now() + 3_600_000)
      yield* redis.cli(
        "eval",
        "local at = tonumber(ARGV[1]) redis.call('SET', KEYS[1], cmsgpack.pack({ at, at, 1 }))",
        "1",
        "{keymesh:test}:log:k/k:requests:60000",
        later
      )
      const { forMillis } = yield* refused(a, limited(key("k"), 1, 60_000))
      assert.isAtMost(forMillis, 60_000)
    }))

  test("names of keys, groups and models may be anything", (redis) =>
    Effect.gen(function*() {
      const [a, b] = yield* two(redis)
      const odd = ["}{", "a/b", "a|b", "ключ 🔑", "%0041", "", "\ud800"]
      const subjects = odd.flatMap((of) => odd.map((model) => key(of, model)))
      for (const subject of subjects) yield* granted(a, places(subject, 1))
      for (const subject of subjects) {
        assert.deepStrictEqual((yield* refused(b, places(subject, 1))).subject, subject)
      }
      yield* a.tell(subjects.map((subject) => cooldown(subject, 60_000)))
      const c = yield* RedisMember.make({ ...patient, url: redis.url })
      const { cooldowns } = yield* c.hears("Joined")
      const words = (list: ReadonlyArray<SharedPool.Subject>) => list.map((one) => JSON.stringify(one)).sort()
      assert.deepStrictEqual(words(cooldowns.map(({ subject }) => subject)), words(subjects))
    }))
})

const two = (redis: RedisServer.RedisServer) =>
  Effect.map(members(redis, 2), ([a, b]) => {
    if (a === undefined || b === undefined) throw new Error("two")
    return [a, b] as const
  })

const breakers = (told: Effect.Effect<SharedPool.Told>) =>
  Effect.map(told, (one) => one._tag === "Told" ? one.breakers : [])

/** Asks until it is granted. */
const until = (claim: Effect.Effect<SharedPool.Answer>) =>
  Effect.map(
    RedisServer.until(claim, ({ _tag }) => _tag === "Granted"),
    (answer) => answer._tag === "Granted" ? answer.ticket : { id: "" }
  )
