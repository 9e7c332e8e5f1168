/** The store on Redis: settings, secrecy, records, clusters, and clients of somebody's own. */
import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Config from "effect/Config"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import type * as Scope from "effect/Scope"
import { Cluster, Redis } from "ioredis"
import { execFileSync } from "node:child_process"
import { mkdtempSync, readFileSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { inspect } from "node:util"
import * as PoolStoreContract from "../../src/PoolStoreContract.js"
import * as RedisLink from "../../src/redis/RedisLink.js"
import * as RedisPoolStore from "../../src/redis/RedisPoolStore.js"
import * as RedisMember from "../support/RedisMember.js"
import * as RedisServer from "../support/RedisServer.js"

const { cooldown, ended, granted, key, limited, open, patient, places, probe, refused } = RedisMember

const test = (
  title: string,
  body: (redis: RedisServer.RedisServer) => Effect.Effect<void, unknown, Scope.Scope>,
  options: Parameters<typeof RedisServer.make>[0] = {}
) => it.scopedLive(title, () => Effect.flatMap(RedisServer.make(options), body))

const secret = "hunter2-s3cret/&%"
const encoded = encodeURIComponent(secret)

describe("K3: bad settings are refused by name, and show nothing", () => {
  const cases: ReadonlyArray<readonly [field: string, settings: object]> = [
    ["url", {}],
    ["url", { url: "" }],
    ["url", { url: secret }],
    ["url", { url: `http://:${encoded}@host` }],
    ["url", { url: `redis://:${encoded}@` }],
    ["url", { url: `redis://:${encoded}@host:99999` }],
    ["url", { url: `redis://:%zz${secret}@host` }],
    ["url", { url: `redis://:${encoded}@host/first` }],
    ["url", { url: `redis://:${encoded}@host?family=6` }],
    ["url", { url: Redacted.make(`${encoded}://x`) }],
    ["url", { url: 7 }],
    ["client", { client: {} }],
    ["url", { client: new Redis({ lazyConnect: true }), url: `redis://:${encoded}@h` }],
    ["password", { client: new Redis({ lazyConnect: true }), password: secret }],
    ["password", { url: "redis://h", password: "" }],
    ["username", { url: "redis://h", username: " " }],
    ["tls", { url: `rediss://:${encoded}@h`, tls: false }],
    ["tls", { url: "redis://h", tls: secret }],
    ["tls.kez", { url: "redis://h", tls: { kez: secret } }],
    ["tls.key", { url: "redis://h", tls: { key: "" } }],
    ["tls.rejectUnauthorized", { url: "redis://h", tls: { rejectUnauthorized: "no" } }],
    ["prefix", { url: "redis://h", prefix: "a{b}" }],
    ["prefix", { url: "redis://h", prefix: "" }],
    ["claimTimeout", { url: "redis://h", claimTimeout: 0 }],
    ["claimTimeout", { url: "redis://h", claimTimeout: "soon" }],
    ["commandTimeout", { url: "redis://h", commandTimeout: -1 }],
    ["connectTimeout", { url: "redis://h", connectTimeout: Infinity }],
    ["heartbeat", { url: "redis://h", heartbeat: NaN }],
    ["memberTimeout", { url: "redis://h", memberTimeout: 5_000 }],
    ["recordTtl", { url: "redis://h", recordTtl: Infinity }],
    ["passwort", { url: "redis://h", passwort: secret }]
  ]
  for (const [field, settings] of cases) {
    it.scopedLive(`${field}: ${inspect(settings, { depth: 0 }).slice(0, 40).replaceAll("hunter2", "…")}`, () =>
      Effect.gen(function*() {
        const exit = yield* Effect.exit(RedisPoolStore.make(settings))
        const error = Exit.isFailure(exit) ? Option.getOrUndefined(Cause.failureOption(exit.cause)) : undefined
        assert.deepInclude(error, { _tag: "ConfigurationError", field })
        for (const shown of [inspect(exit, { depth: 9 }), String(error), JSON.stringify(exit)]) {
          assert.notInclude(shown, "hunter2")
        }
      }))
  }

  it.scopedLive("settings come from Config, and what is missing there is a ConfigError", () =>
    Effect.gen(function*() {
      const layer = RedisPoolStore.layerConfig({
        url: Config.redacted("REDIS_URL"),
        password: Config.redacted("REDIS_PASSWORD"),
        claimTimeout: Config.duration("CLAIM"),
        tls: Config.all({ ca: Config.string("CA") })
      })
      const built = (map: Readonly<Record<string, string>>) =>
        Effect.exit(
          Layer.build(layer).pipe(
            Effect.withConfigProvider(ConfigProvider.fromMap(new Map(Object.entries(map))))
          )
        )
      const all = { REDIS_URL: "redis://127.0.0.1:1", REDIS_PASSWORD: secret, CLAIM: "5 millis", CA: "ca" }
      assert.isTrue(Exit.isSuccess(yield* built(all)))
      const { REDIS_URL: _, ...less } = all
      assert.include(inspect(yield* built(less), { depth: 9 }), "REDIS_URL")
      const wrong = inspect(yield* built({ ...all, REDIS_URL: secret }), { depth: 9 })
      assert.include(wrong, "ConfigurationError")
      assert.notInclude(wrong, "hunter2")
    }))
})

describe.skipIf(!RedisServer.isHere)("K1: secrecy", () => {
  test("a wrong password, and a right one, are shown by nothing", (redis) =>
    Effect.gen(function*() {
      const printed: Array<string> = []
      const { error, warn } = console
      console.error = (...words) => printed.push(inspect(words))
      console.warn = (...words) => printed.push(inspect(words))
      yield* Effect.addFinalizer(() => Effect.sync(() => Object.assign(console, { error, warn })))
      const wrong = {
        url: `redis://127.0.0.1:${redis.port}`,
        username: "default",
        password: Redacted.make("hunter2-wrong")
      }
      const a = yield* RedisMember.begin({ ...patient, ...wrong })
      const { problem } = yield* a.hears("Away")
      assert.include(problem, "WRONGPASS")
      const store = yield* RedisPoolStore.make({ ...patient, ...wrong, commandTimeout: 200 })
      const failed = yield* Effect.exit(store.load("pool"))
      assert.include(inspect(failed), "unreachable")
      const b = yield* RedisMember.make({ ...patient, url: redis.url })
      yield* granted(b, places(key("k"), 1))
      const shown = [store, failed, a, b, yield* a.heard, yield* b.heard, printed, wrong]
      for (const one of shown) {
        assert.notInclude(inspect(one, { depth: 20, showHidden: true }), "hunter2")
        assert.notInclude(JSON.stringify(one), "hunter2")
      }
      assert.notInclude(yield* redis.cli("keys", "*"), "hunter2")
    }), { password: "hunter2-right" })
})

describe.skipIf(!RedisServer.isHere)("P1, P2, P3: records", () => {
  for (const { name, run } of PoolStoreContract.checks) {
    test(name, (redis) =>
      Effect.gen(function*() {
        yield* run({
          open: RedisPoolStore.make({ ...patient, url: redis.url }),
          corrupt: (pool, text) => {
            const escaped = pool.replace(/[^A-Za-z0-9_.-]/g, (char) =>
              `%${char.charCodeAt(0).toString(16).padStart(4, "0")}`)
            return redis.put(`{keymesh:${escaped}}:record`, text)
          }
        })
      }))
  }

  test("a record is forgotten when nobody saves it for long", (redis) =>
    Effect.gen(function*() {
      const store = yield* RedisPoolStore.make({ ...patient, url: redis.url, prefix: "p", recordTtl: "2 hours" })
      yield* store.save("pool", { version: 1, savedAt: 0, keys: [], groups: [], models: [] })
      const left = Number(yield* redis.cli("pttl", "{p:pool}:record"))
      assert.isAbove(left, 7_100_000)
      assert.isAtMost(left, 7_200_000)
    }))

  test("a Redis that hangs is a StoreError in time", (redis) =>
    Effect.gen(function*() {
      const store = yield* RedisPoolStore.make({ url: redis.url, commandTimeout: 1_000 })
      assert.isTrue(Option.isNone(yield* store.load("pool")))
      yield* redis.pause
      const error = yield* Effect.flip(store.load("pool"))
      assert.strictEqual(error.message, "The pool's store is unreachable: Redis does not answer in time")
      yield* redis.resume
    }))
})

/** One round of all that the port can do. */
const everything = (settings: RedisPoolStore.Settings) =>
  Effect.gen(function*() {
    const a = yield* RedisMember.make({ ...patient, ...settings })
    const b = yield* RedisMember.make({ ...patient, ...settings, heartbeat: 50, memberTimeout: 60_000 })
    const told = yield* a.tell([
      cooldown(key("k"), 60_000),
      { _tag: "Breaker", keyId: "k", from: undefined, to: open(5) },
      { _tag: "Lifted", subject: key("l"), forMillis: 5 },
      { _tag: "Reset", keyId: "m", group: "g" },
      { _tag: "Taken", subject: key("t"), unit: "tokens", limit: 5, windowMillis: 50, amount: 1 }
    ])
    assert.strictEqual(told._tag === "Told" ? told.breakers.length : 0, 2)
    for (const tag of ["Cooldown", "Breaker", "Lifted", "Reset"] as const) yield* b.hears(tag)
    const claim = {
      ...limited(key("k"), 1, 60_000),
      concurrency: places(key("c"), 1).concurrency,
      probes: probe(key("p")).probes
    }
    const ticket = yield* granted(a, claim)
    yield* refused(b, places(key("c"), 1))
    yield* a.settle(ticket, ended)
    yield* b.hears("Freed")
    yield* granted(b, probe(key("p")))
    yield* Effect.sleep(200)
    assert.isFalse((yield* b.heard).some(({ _tag }) => _tag === "Away"))
    const store = yield* RedisPoolStore.make({ ...patient, ...settings })
    yield* store.save("pool", { version: 1, savedAt: 0, keys: [], groups: [], models: [] })
    assert.isTrue(Option.isSome(yield* store.load("pool")))
  })

describe.skipIf(!RedisServer.isHere)("P4: servers and clients of all kinds", () => {
  const cluster = { args: ["--cluster-enabled", "yes", "--cluster-announce-ip", "127.0.0.1"] }
  const meet = (redis: RedisServer.RedisServer) =>
    Effect.zipRight(
      redis.cli("cluster", "addslotsrange", "0", "16383"),
      RedisServer.until(redis.cli("cluster", "info"), (info) => info.includes("cluster_state:ok"))
    )

  test("a cluster: no script touches two slots", (redis) =>
    Effect.gen(function*() {
      yield* meet(redis)
      const crossed = yield* Effect.flip(Effect.try(() =>
        execFileSync("redis-cli", ["-e", "-p", String(redis.port), "eval", "return 1", "2", "a", "b"], {
          stdio: "pipe"
        })
      ))
      assert.include(String(crossed.error), "CROSSSLOT")
      yield* everything({ url: redis.url })
    }), cluster)

  test("a Cluster of ioredis that the caller has: used, and not closed", (redis) =>
    Effect.gen(function*() {
      yield* meet(redis)
      const client = new Cluster([{ host: "127.0.0.1", port: redis.port }])
      yield* Effect.addFinalizer(() => Effect.sync(() => client.disconnect()))
      yield* Effect.scoped(everything({ client }))
      assert.strictEqual(yield* Effect.promise(() => client.ping()), "PONG")
    }), cluster)

  test("a Redis of ioredis that the caller has, with a prefix of its own: used, and not closed", (redis) =>
    Effect.gen(function*() {
      const client = new Redis({ port: redis.port, keyPrefix: "app:", stringNumbers: true })
      yield* Effect.addFinalizer(() => Effect.sync(() => client.disconnect()))
      yield* Effect.scoped(everything({ client }))
      assert.strictEqual(client.status, "ready")
      for (const event of ["ready", "close", "error", "message"]) {
        assert.strictEqual(client.listenerCount(event), 0, event)
      }
      for (const name of (yield* redis.cli("keys", "*")).split("\n")) assert.match(name, /^app:\{keymesh:/)
      yield* RedisServer.until(redis.cli("client", "list"), (list) => !list.includes("sub=1"))
    }))

  for (
    const [what, apart] of [
      ["databases", (port: number, i: number) => new Redis({ port, db: i })],
      ["prefixes of their clients", (port: number, i: number) => new Redis({ port, keyPrefix: `app${i}:` })]
    ] as const
  ) {
    test(`P4: pools of one name in different ${what} know nothing of each other`, (redis) =>
      Effect.gen(function*() {
        const [a, b] = yield* Effect.forEach([1, 2], (i) =>
          Effect.gen(function*() {
            const client = apart(redis.port, i)
            yield* Effect.addFinalizer(() => Effect.sync(() => client.disconnect()))
            return yield* RedisMember.make({ ...patient, client })
          }))
        if (a === undefined || b === undefined) return
        yield* a.tell([RedisMember.cooldown(RedisMember.key("k"), 60_000)])
        // Long enough for it to come, if it came.
        yield* Effect.sleep(500)
        const heard = [...yield* a.heard, ...(yield* b.heard).map((news) => ({ ...news, isOther: true }))]
        for (const news of heard) {
          // Who could not listen at once reads everything once more.
          assert.strictEqual(news._tag, "Joined")
          if (news._tag !== "Joined") continue
          assert.strictEqual(news.members, 1)
          if ("isOther" in news) assert.deepStrictEqual(news.cooldowns, [])
        }
      }))
  }

  test("a server with a user, a password and a database of its own", (redis) =>
    Effect.gen(function*() {
      yield* redis.cli(
        "acl",
        "setuser",
        "keymesh",
        "on",
        `>${secret}`,
        "~{*",
        "&{*",
        "+@all",
        "-@dangerous",
        "+client|setname"
      )
      yield* everything({ url: `redis://keymesh:${encoded}@127.0.0.1:${redis.port}/3` })
      assert.strictEqual(yield* redis.cli("dbsize"), "0")
    }))

  it.scopedLive("TLS: by the URL, with a certificate of one's own; and none that cannot be verified", () =>
    Effect.gen(function*() {
      const folder = mkdtempSync(join(tmpdir(), "keymesh-tls-"))
      yield* Effect.addFinalizer(() => Effect.sync(() => rmSync(folder, { recursive: true, force: true })))
      const [cert, pem] = [join(folder, "cert.pem"), join(folder, "key.pem")]
      const words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
      const names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", pem, "-out", cert]
      execFileSync("openssl", [...words.split(" "), ...names], { stdio: "ignore" })
      const port = yield* RedisServer.freePort
      yield* RedisServer.make({
        args: ["--tls-port", String(port), "--tls-cert-file", cert, "--tls-key-file", pem, "--tls-auth-clients", "no"]
      })
      yield* everything({ url: `rediss://localhost:${port}`, tls: { ca: readFileSync(cert, "utf8") } })
      yield* everything({ url: `redis://localhost:${port}`, prefix: "two", tls: { rejectUnauthorized: false } })
      const stranger = yield* RedisMember.begin({ ...patient, connectTimeout: 200, url: `rediss://localhost:${port}` })
      assert.match((yield* stranger.hears("Away")).problem, /\(DEPTH_ZERO_SELF_SIGNED_CERT\)/)
    }))

  test("a socket that has more than one error ends no process, and its client comes back", (server) =>
    Effect.gen(function*() {
      const redis = yield* Effect.acquireRelease(
        Effect.sync(() =>
          RedisLink.connecting(new Redis({ port: server.port, lazyConnect: true, retryStrategy: () => 10 }))
        ),
        (redis) => Effect.sync(() => redis.disconnect())
      )
      const seen: Array<string> = []
      redis.on("error", ({ message }) => seen.push(message))
      const ping = Effect.promise(() => redis.ping())
      yield* ping
      for (const message of ["one", "two"]) redis.stream.emit("error", new Error(message))
      redis.stream.destroy()
      assert.strictEqual(yield* ping, "PONG")
      assert.deepStrictEqual(seen, ["one"])
    }))

  test("two connections, whatever the number of pools", (redis) =>
    Effect.gen(function*() {
      const way = yield* RedisServer.proxy(redis.port)
      const store = yield* RedisPoolStore.make({ ...patient, url: way.url })
      for (const pool of ["a", "b", "c"]) yield* store.share?.(pool) ?? Effect.void
      yield* RedisServer.until(redis.cli("pubsub", "channels"), (all) => all.split("\n").length === 3)
      assert.strictEqual(yield* way.opened, 2)
    }))
})
