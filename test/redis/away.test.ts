/** Redis is away, in every way: pools hear of it once, are never held up, lose nothing, and find together again. */
import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Random from "effect/Random"
import type * as Scope from "effect/Scope"
import * as RedisLink from "../../src/redis/RedisLink.js"
import * as Scripts from "../../src/redis/Scripts.js"
import type * as SharedPool from "../../src/SharedPool.js"
import * as RedisMember from "../support/RedisMember.js"
import * as RedisServer from "../support/RedisServer.js"

const { cooldown, ended, granted, key, limited, open, patient, places, refused } = RedisMember

/** Quick to notice, and patient otherwise. */
const settings = { ...patient, commandTimeout: 1_000, claimTimeout: 1_000, heartbeat: 100, memberTimeout: 60_000 }

interface Case {
  readonly title: string
  readonly problem: RegExp
  readonly millis?: number
  readonly leave: (redis: RedisServer.RedisServer, way: RedisServer.Proxy) => Effect.Effect<unknown>
  readonly back: (redis: RedisServer.RedisServer, way: RedisServer.Proxy) => Effect.Effect<unknown>
  /** Whether it forgets what it knew. */
  readonly forgets?: true
}

const cases: ReadonlyArray<Case> = [
  {
    title: "killed, and started again empty",
    problem: /connection to Redis/,
    leave: ({ kill }) => kill,
    back: ({ start }) => start,
    forgets: true
  },
  {
    title: "hanging",
    problem: /does not answer in time/,
    leave: ({ pause }) => pause,
    back: ({ resume }) => resume
  },
  {
    title: "unreachable, with connections that seem to be there",
    problem: /does not answer in time/,
    // Long enough for the connections to be given up: what was swallowed does not come again, as it would on a real way.
    millis: 5_000,
    leave: (_, way) => way.swallow(true),
    back: (_, way) => way.swallow(false)
  },
  {
    title: "slow by seconds",
    problem: /does not answer in time/,
    leave: (_, way) => way.delay(2_000),
    back: (_, way) => way.delay(0)
  },
  {
    title: "refusing connections, and cutting those it has",
    problem: /connection to Redis/,
    leave: (_, way) => Effect.zipRight(way.refuse(() => true), way.cut()),
    back: (_, way) => way.refuse(undefined)
  },
  {
    title: "a replica after a failover",
    problem: /READONLY/,
    leave: ({ cli }) => cli("replicaof", "127.0.0.1", "1"),
    back: ({ cli }) => cli("replicaof", "no", "one")
  },
  {
    title: "out of memory",
    problem: /OOM/,
    leave: ({ cli }) => cli("config", "set", "maxmemory", "1"),
    back: ({ cli }) => cli("config", "set", "maxmemory", "0")
  },
  {
    title: "asking for another password",
    problem: /connection to Redis|NOAUTH/,
    leave: ({ cli }, way) => Effect.zipRight(cli("config", "set", "requirepass", "hunter2-other"), way.cut()),
    back: ({ port }) =>
      Effect.promise(async () => {
        const { execFileSync } = await import("node:child_process")
        execFileSync("redis-cli", [
          "-p",
          String(port),
          "-a",
          "hunter2-other",
          "--no-auth-warning",
          "config",
          "set",
          "requirepass",
          ""
        ])
      })
  }
]

const isGranted = (answer: SharedPool.Answer): answer is Extract<SharedPool.Answer, { readonly _tag: "Granted" }> =>
  answer._tag === "Granted"

const test = (title: string, body: (redis: RedisServer.RedisServer) => Effect.Effect<void, unknown, Scope.Scope>) =>
  it.scopedLive(title, () => Effect.flatMap(RedisServer.make(), body))

describe.skipIf(!RedisServer.isHere)("P2, P4: Redis is away", () => {
  for (const { back, forgets, leave, millis = 1_500, problem, title } of cases) {
    test(title, (redis) =>
      Effect.gen(function*() {
        const way = yield* RedisServer.proxy(redis.port)
        const a = yield* RedisMember.make({ ...settings, url: way.url })
        const b = yield* RedisMember.make({ ...settings, url: way.url })
        yield* a.hears("Members", ({ members }) => members === 2)
        const ticket = yield* granted(a, places(key("c"), 1))
        yield* a.tell([cooldown(key("k"), 600_000)])
        yield* b.hears("Cooldown")
        yield* Effect.forEach([a, b], ({ forget }) => forget)

        yield* leave(redis, way)
        const away = yield* a.hears("Away")
        assert.match(away.problem, problem)
        assert.strictEqual(away.members, 2)
        yield* b.hears("Away")
        assert.deepStrictEqual(yield* a.claim(places(key("d"), 1)), { _tag: "Away" })
        assert.deepStrictEqual(yield* a.tell([cooldown(key("lost"), 600_000)]), { _tag: "Away" })
        // What became of a ticket is not lost.
        yield* a.settle(ticket, ended)
        yield* Effect.sleep(millis)
        for (const member of [a, b]) {
          assert.deepStrictEqual((yield* member.heard).map(({ _tag }) => _tag), ["Away"], "once per outage")
        }

        yield* back(redis, way)
        const joined = yield* a.hears("Joined")
        assert.strictEqual(joined.kept, forgets !== true)
        assert.deepStrictEqual(joined.cooldowns.map(({ subject }) => subject.of), forgets === true ? [] : ["k"])
        const { kept } = yield* b.hears("Joined")
        assert.strictEqual(kept, forgets !== true)
        yield* RedisServer.until(b.claim(places(key("c"), 1)), ({ _tag }) => _tag === "Granted")
        yield* b.tell([cooldown(key("again"), 600_000)])
        // By push or by reading all.
        yield* RedisServer.until(a.heard, (heard) =>
          heard.some((news) =>
            (news._tag === "Cooldown" && news.cooldown.subject.of === "again") ||
            (news._tag === "Joined" && news.cooldowns.some(({ subject }) =>
              subject.of === "again"
            ))
          ))
      }))
  }

  test("never there at first: pools begin without it, and join when it comes", (redis) =>
    Effect.gen(function*() {
      yield* redis.kill
      const a = yield* RedisMember.begin({ ...settings, connectTimeout: 200, url: redis.url })
      const { members, problem } = yield* a.hears("Away")
      assert.deepStrictEqual({ members, problem }, {
        members: 1,
        problem: "there is no connection to Redis (ECONNREFUSED)"
      })
      yield* redis.start
      yield* a.hears("Joined")
      assert.deepStrictEqual((yield* a.heard).map(({ _tag }) => _tag), ["Away", "Joined"])
    }))

  test("a password that nobody gave: it says so", (redis) =>
    Effect.gen(function*() {
      yield* redis.cli("config", "set", "requirepass", "hunter2")
      const a = yield* RedisMember.begin({ ...settings, url: redis.url })
      assert.strictEqual((yield* a.hears("Away")).problem, "Redis asks for a password (NOAUTH)")
    }))

  test("FLUSHALL: the epoch is larger afterwards, and what was told before it loses", (redis) =>
    Effect.gen(function*() {
      const a = yield* RedisMember.make({ ...settings, url: redis.url })
      const b = yield* RedisMember.make({ ...settings, url: redis.url })
      const tell = (from: object | undefined) =>
        Effect.map(
          a.tell([{ _tag: "Breaker", keyId: "k", from: from as never, to: open(1e6) }]),
          (told) => told._tag === "Told" ? told.breakers[0]?.version : undefined
        )
      const before = yield* tell(undefined)
      yield* b.hears("Breaker")
      yield* Effect.forEach([a, b], ({ forget }) => forget)
      yield* redis.cli("flushall")
      for (const member of [a, b]) yield* member.hears("Joined", ({ kept }) => !kept)
      const after = yield* tell(before)
      assert.isAbove(after?.epoch ?? 0, before?.epoch ?? Infinity)
      // The others know it by the new epoch: the old version is nobody's any more.
      assert.deepStrictEqual(yield* tell(before), after)
      const { breaker } = yield* b.hears("Breaker")
      assert.deepStrictEqual<unknown>(breaker.version, after)
    }))

  test("FLUSHALL right before a claim or a notice: neither counts as if nothing had happened", (redis) =>
    Effect.gen(function*() {
      const slow = { ...settings, heartbeat: 20_000, url: redis.url }
      const a = yield* RedisMember.make(slow)
      yield* a.forget
      yield* redis.cli("flushall")
      assert.deepStrictEqual(yield* a.claim(limited(key("k"), 1, 60_000)), { _tag: "Away" })
      yield* a.hears("Joined", ({ kept }) => !kept)
      yield* granted(a, limited(key("k"), 1, 60_000))
      yield* a.forget
      yield* redis.cli("flushall")
      assert.deepStrictEqual(yield* a.tell([cooldown(key("k"), 5)]), { _tag: "Away" })
      yield* a.hears("Joined", ({ kept }) => !kept)
    }))

  test("a failover to a replica that knew less: the epoch is larger, and all tell again", (redis) =>
    Effect.gen(function*() {
      const a = yield* RedisMember.make({ ...settings, url: redis.url })
      yield* a.tell([{ _tag: "Breaker", keyId: "k", from: undefined, to: open(1e6) }])
      yield* a.forget
      yield* redis.cli("hset", "{keymesh:test}:meta", "seq", "0")
      const { breakers } = yield* a.hears("Joined", ({ kept }) => !kept)
      const [known] = breakers
      const told = yield* a.tell([{ _tag: "Breaker", keyId: "k", from: known?.version, to: open(5) }])
      assert.strictEqual(told._tag === "Told" ? told.breakers[0]?.version.generation : 0, 2)
    }))

  test("SCRIPT FLUSH: nobody notices", (redis) =>
    Effect.gen(function*() {
      const a = yield* RedisMember.make({ ...patient, heartbeat: 100, memberTimeout: 60_000, url: redis.url })
      yield* a.forget
      for (let i = 0; i < 3; i++) {
        yield* redis.cli("script", "flush")
        yield* granted(a, places(key(`c${i}`), 1))
        yield* redis.cli("script", "flush")
        assert.strictEqual((yield* a.tell([cooldown(key("k"), 5)]))._tag, "Told")
      }
      yield* Effect.sleep(300)
      assert.deepStrictEqual(yield* a.heard, [])
    }))

  test("cut off in the middle of commands, again and again: nothing is held by nobody", (redis) =>
    // By such a chance pauses have no length: that it is cut off so often must not make them grow.
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const a = yield* RedisMember.make({ ...patient, heartbeat: 100, memberTimeout: 60_000, url: way.url })
      const { claim, settle, join, beat } = Scripts
      const rounds = RedisServer.moments.flatMap((moment) =>
        [claim, settle, join, beat].flatMap((script) => Array.from({ length: 3 }, () => ({ moment, script })))
      )
      const place = (round: number) => places(key(`c${round}`), 1)
      for (const [round, { moment, script }] of rounds.entries()) {
        // Once it is there again, one is surely held.
        const held = yield* RedisServer.until(a.claim(places(key("c"), 1)), isGranted)
        yield* way.cutAt(script.sha, moment)
        if (isGranted(held)) yield* a.settle(held.ticket, ended)
        if (script === join) yield* way.cut()
        yield* RedisServer.until(
          Effect.zipRight(
            Effect.tap(
              a.claim(place(round)),
              (answer) => isGranted(answer) ? a.settle(answer.ticket, ended) : Effect.void
            ),
            way.isDue
          ),
          (isDue) => !isDue
        )
      }
      const b = yield* RedisMember.make({ ...patient, url: redis.url })
      for (const claim of [places(key("c"), 1), ...rounds.map((_, round) => place(round))]) {
        yield* RedisServer.until(b.claim(claim), isGranted)
        yield* refused(b, claim)
      }
    }).pipe(Effect.withRandom(Random.fixed([0]))))

  test("C6, P4: what became of a ticket counts once, also when Redis has heard it and the answer was lost", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const a = yield* RedisMember.make({ ...patient, url: way.url })
      const b = yield* RedisMember.make({ ...patient, url: redis.url })
      const ticket = yield* granted(a, {
        ...limited(key("k"), 2, 600_000),
        concurrency: places(key("c"), 1).concurrency
      })
      const other = yield* granted(a, places(key("d"), 1))
      yield* a.forget
      yield* way.cutAt(Scripts.settle.sha, "answered")
      yield* a.settle(ticket, ended)
      yield* RedisServer.until(b.claim(places(key("c"), 1)), isGranted)
      yield* a.hears("Joined")
      // What is told after it has come: so has what is told again.
      yield* a.settle(other, ended)
      yield* RedisServer.until(b.claim(places(key("d"), 1)), isGranted)
      yield* refused(a, places(key("c"), 1))
      yield* granted(a, limited(key("k"), 2, 600_000))
      yield* refused(a, limited(key("k"), 2, 600_000))
    }))

  test("while it is away, pools do not hurry it: pauses grow, and no two are alike", () =>
    Effect.sync(() => {
      const pauses = [1, 2, 3, 4, 5, 6, 7, 1_000].map((failures) => RedisLink.pauseBefore(failures, 0.5))
      assert.deepStrictEqual(pauses, [50, 100, 200, 400, 800, 1_000, 1_000, 1_000])
      assert.strictEqual(RedisLink.pauseBefore(3, 0), 0)
      assert.isAtMost(RedisLink.pauseBefore(1e9, 1), 2_000)
    }))

  test("a server that takes connections and drops them is not hammered", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      yield* way.refuse(() => true)
      yield* RedisMember.begin({ ...settings, url: way.url })
      yield* Effect.sleep(3_000)
      // Two connections, each with pauses that grow from 100 ms to 2 s: some eight tries each.
      assert.isBelow(yield* way.opened, 40)
    }))
})
