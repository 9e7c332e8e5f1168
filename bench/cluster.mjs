/**
 * What sharing a pool on Redis costs: `npm run bench:cluster`. How long until another process knows of a cooldown, and how
 * long a claim takes that an attempt waits for. It starts a `redis-server` of its own, or uses REDIS_URL.
 */
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import { fork, spawn } from "node:child_process"
import { mkdtempSync, rmSync } from "node:fs"
import { createServer } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import * as RedisPoolStore from "../dist/redis/RedisPoolStore.js"

const rounds = 1_000
const pool = `bench-${process.env.BENCH_POOL ?? process.pid}`
const now = () => Number(process.hrtime.bigint()) / 1e6

/** Joins, and calls back with what it hears. */
const member = (url, onNews) =>
  Effect.gen(function*() {
    const store = yield* RedisPoolStore.make({ url, claimTimeout: "1 second" })
    const shared = yield* store.share(pool)
    yield* Effect.forkScoped(Stream.runForEach(shared.news, (news) => Effect.sync(() => onNews(news))))
    return shared
  })

const listen = (url) =>
  Effect.zipRight(
    member(url, (news) => {
      if (news._tag === "Joined") process.send("joined")
      if (news._tag === "Cooldown") process.send({ of: news.cooldown.subject.of, at: now() })
    }),
    Effect.never
  )

const measure = (url) =>
  Effect.gen(function*() {
    const joined = Promise.withResolvers?.() ?? resolvers()
    const other = Promise.withResolvers?.() ?? resolvers()
    const shared = yield* member(url, (news) => news._tag === "Joined" && joined.resolve())
    const child = fork(fileURLToPath(import.meta.url), ["listen"], {
      env: { ...process.env, BENCH_URL: url, BENCH_POOL: String(process.pid) }
    })
    yield* Effect.addFinalizer(() => Effect.sync(() => child.kill()))
    const told = new Map()
    const seen = []
    child.on("message", (message) => {
      if (message === "joined") other.resolve()
      else seen.push(message.at - told.get(message.of))
    })
    yield* Effect.promise(() => Promise.all([joined.promise, other.promise]))

    for (let i = 0; i < rounds; i++) {
      told.set(`key-${i}`, now())
      yield* shared.tell([{
        _tag: "Cooldown",
        cooldown: {
          subject: { scope: "key", of: `key-${i}` },
          kind: "RateLimited",
          forMillis: 1_000,
          waitMillis: 1_000,
          provenance: "told",
          refused: false,
          step: 0
        }
      }])
      yield* Effect.sleep(1)
    }
    while (seen.length < rounds) yield* Effect.sleep(5)
    report("a cooldown, until another process knows", seen)

    const claims = {
      "a claim of one limit": { limits: [limit("requests", 1)], concurrency: [], probes: [] },
      "a claim of two limits and concurrency": {
        limits: [limit("requests", 1), limit("tokens", 1_500)],
        concurrency: [{ subject: { scope: "key", of: "k" }, most: 100 }],
        probes: []
      }
    }
    for (const [name, claim] of Object.entries(claims)) {
      const took = []
      for (let i = 0; i < rounds; i++) {
        const from = now()
        const answer = yield* shared.claim(claim)
        took.push(now() - from)
        if (answer._tag !== "Granted") throw new Error(JSON.stringify(answer))
        yield* shared.settle(answer.ticket, { _tag: "Ended", tokens: 1_000 })
      }
      report(name, took)
    }
  })

const limit = (unit, amount) => ({
  subject: { scope: "group", of: "g" },
  unit,
  limit: 1e9,
  windowMillis: 60_000,
  amount
})

const resolvers = () => {
  let resolve
  const promise = new Promise((done) => {
    resolve = done
  })
  return { promise, resolve }
}

const report = (name, millis) => {
  const sorted = millis.toSorted((a, b) => a - b)
  const at = (share) => sorted[Math.floor((sorted.length - 1) * share)].toFixed(2)
  console.log(`${name.padEnd(42)} median ${at(0.5)} ms, p99 ${at(0.99)} ms`)
}

/** A server of our own, where none is given. */
const server = Effect.gen(function*() {
  if (process.env.REDIS_URL !== undefined) return process.env.REDIS_URL
  const folder = mkdtempSync(join(tmpdir(), "keymesh-bench-"))
  const port = yield* Effect.promise(() =>
    new Promise((resolve) => {
      const probe = createServer().listen(0, "127.0.0.1", () => {
        const { port } = probe.address()
        probe.close(() => resolve(port))
      })
    })
  )
  const child = spawn("redis-server", ["--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", folder], {
    stdio: "ignore"
  })
  child.on("error", () => {
    console.error("There is no redis-server on PATH; give one by REDIS_URL.")
    process.exit(1)
  })
  yield* Effect.addFinalizer(() =>
    Effect.sync(() => {
      child.kill()
      rmSync(folder, { recursive: true, force: true })
    })
  )
  return `redis://127.0.0.1:${port}`
})

const program = process.argv[2] === "listen" ? listen(process.env.BENCH_URL) : Effect.flatMap(server, measure)
await Effect.runPromise(Effect.scoped(program))
process.exit(0)
