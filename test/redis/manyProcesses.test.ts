/** Real processes with real pools on one Redis, and one provider on loopback that counts. */
import { afterAll, assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import type * as Scope from "effect/Scope"
import { type ChildProcess, spawn } from "node:child_process"
import { createServer } from "node:http"
import { performance } from "node:perf_hooks"
import * as Bundle from "../support/bundle.js"
import * as RedisServer from "../support/RedisServer.js"
import type { Orders, Report } from "../support/sharingProcess.js"

const count = 8
/** How long members are killed and stopped at random, in seconds. */
const chaosSeconds = Number(process.env["KEYMESH_CHAOS_SECONDS"] ?? 8)

interface Seen {
  readonly label: string
  readonly at: number
  readonly status: number
}

/** A provider that answers per key as it is told, after a few milliseconds. */
const provider = (answer: (label: string, at: number) => { readonly status: number; readonly retryAfter?: number }) =>
  Effect.map(
    Effect.acquireRelease(
      Effect.async<{ readonly port: number; readonly seen: Array<Seen>; readonly close: () => void }>((resume) => {
        const seen: Array<Seen> = []
        const server = createServer((request, response) => {
          const label = (request.url ?? "").slice(1)
          const { retryAfter, status } = answer(label, performance.now())
          seen.push({ label, at: performance.now(), status })
          setTimeout(() => {
            response.writeHead(status, retryAfter === undefined ? {} : { "retry-after": String(retryAfter) }).end("x")
          }, 5)
        }).listen(0, "127.0.0.1", () => {
          const address = server.address()
          const port = typeof address === "object" && address !== null ? address.port : 0
          const close = () => {
            server.closeAllConnections()
            server.close()
          }
          resume(Effect.succeed({ port, seen, close }))
        })
      }),
      ({ close }) => Effect.sync(close)
    ),
    ({ port, seen }) => ({ url: `http://127.0.0.1:${port}`, seen })
  )

interface Member {
  readonly child: ChildProcess
  /** Lets it begin. */
  readonly go: Effect.Effect<void>
  readonly report: Effect.Effect<Report | undefined>
}

const member = (file: string, orders: Orders): Effect.Effect<Member, never, Scope.Scope> =>
  Effect.gen(function*() {
    const child = spawn(process.execPath, [file], {
      env: { ORDERS: JSON.stringify(orders) },
      stdio: ["ignore", "inherit", "inherit", "ipc"]
    })
    yield* Effect.addFinalizer(() => Effect.sync(() => child.kill("SIGKILL")))
    let report: Report | undefined
    let ended = false
    child.once("exit", () => {
      ended = true
    })
    yield* Effect.async<void>((resume) => {
      // Whoever ends before it began will never be ready.
      child.once("exit", (code) => resume(Effect.dieMessage(`a member ended with ${code} before it began`)))
      child.on("message", (message) => {
        if (message === "ready") resume(Effect.void)
        else report = message as Report
      })
    })
    return {
      child,
      go: Effect.sync(() => void child.send("go")),
      report: Effect.map(RedisServer.until(Effect.sync(() => ended), (is) => is), () => report)
    }
  })

const members = (file: string, many: number, orders: Orders) =>
  Effect.forEach(Array.from({ length: many }), () => member(file, orders), { concurrency: "unbounded" })

/** Starts them all at once; what they report. */
const together = (all: ReadonlyArray<Member>) =>
  Effect.gen(function*() {
    yield* Effect.forEach(all, ({ go }) => go)
    const reports = yield* Effect.forEach(all, ({ report }) => report, { concurrency: "unbounded" })
    return reports.flatMap((report) => report === undefined ? [] : [report])
  })

const sum = (numbers: ReadonlyArray<number>): number => numbers.reduce((all, one) => all + one, 0)

const orders = (redis: RedisServer.RedisServer, url: string, more: Partial<Orders>): Orders => ({
  // Eight processes on two cores: who does not get to run for a while is not away.
  redis: { url: redis.url, claimTimeout: 5_000, commandTimeout: 10_000 },
  provider: url,
  pool: { keys: ["a", "b"] },
  lanes: 1,
  calls: 10,
  pauseMillis: 0,
  ...more
})

const keyOf = (label: string, more: object = {}) => ({ secret: `sk-fake-${label}`, label, ...more })

describe.skipIf(!RedisServer.isHere)(`P4: ${count} processes, one pool`, () => {
  const program = RedisServer.isHere ? Bundle.make("sharingProcess") : undefined
  const file = program?.file ?? ""
  afterAll(() => program?.remove())

  it.scopedLive("never more than the declared limit, and all of it", () =>
    Effect.gen(function*() {
      const redis = yield* RedisServer.make()
      const { seen, url } = yield* provider(() => ({ status: 200 }))
      const keys = ["a", "b"].map((label) => keyOf(label, { limits: { requestsPerMinute: 30 } }))
      const all = yield* members(
        file,
        count,
        orders(redis, url, { pool: { keys, budget: 3_000, maxWait: 3_000 }, lanes: 4, calls: 5 })
      )
      const reports = yield* together(all)
      assert.strictEqual(reports.length, count)
      assert.strictEqual(sum(reports.map(({ served }) => served)), 60)
      assert.deepStrictEqual(["a", "b"].map((label) => seen.filter((one) => one.label === label).length), [30, 30])
    }), 120_000)

  it.scopedLive("never more than that while members are killed and stopped", () =>
    Effect.gen(function*() {
      const redis = yield* RedisServer.make()
      const { seen, url } = yield* provider(() => ({ status: 200 }))
      const keys = ["a", "b"].map((label) => keyOf(label, { limits: { requestsPerMinute: 60 } }))
      const all = yield* members(
        file,
        count,
        orders(redis, url, {
          redis: { url: redis.url, claimTimeout: 2_000, commandTimeout: 4_000, heartbeat: 200, memberTimeout: 1_000 },
          pool: { keys, budget: 4_000, maxWait: 4_000 },
          lanes: 4,
          calls: 8,
          pauseMillis: 40
        })
      )
      const working = yield* Effect.fork(together(all))
      yield* RedisServer.until(Effect.sync(() => seen.length), (many) => many > 20)
      const children = all.map(({ child }) => child)
      for (const [i, child] of children.slice(0, 5).entries()) {
        child.kill(i < 3 ? "SIGKILL" : "SIGSTOP")
        yield* Effect.sleep(60)
      }
      // Longer than members count: what they held is reclaimed before they go on.
      yield* Effect.sleep(1_500)
      for (const child of children.slice(3, 5)) child.kill("SIGCONT")
      assert.strictEqual((yield* Fiber.join(working)).length, count - 3)
      for (const label of ["a", "b"]) {
        const many = seen.filter((one) => one.label === label).length
        assert.isAtMost(many, 60)
        // Nothing is lost but what those had who were killed.
        assert.isAtLeast(many, 60 - 3 * 4)
      }
    }), 120_000)

  it.scopedLive("as many refusals as one process gets that sends as much", () =>
    Effect.gen(function*() {
      const perWindow = 40
      const refusals = (many: number, lanes: number) =>
        Effect.scoped(Effect.gen(function*() {
          const redis = yield* RedisServer.make()
          const windows = new Map<string, { readonly since: number; count: number }>()
          const { seen, url } = yield* provider((label, at) => {
            const before = windows.get(label)
            const window = before === undefined || at >= before.since + 1_000 ? { since: at, count: 0 } : before
            windows.set(label, window)
            window.count++
            return window.count > perWindow ? { status: 429, retryAfter: 1 } : { status: 200 }
          })
          const all = yield* members(file, many, orders(redis, url, { lanes, calls: 40 }))
          const reports = yield* together(all)
          assert.deepStrictEqual(reports.flatMap(({ failed }) => failed), [])
          assert.strictEqual(sum(reports.map(({ served }) => served)), many * lanes * 40)
          return seen.filter(({ status }) => status === 429).length
        }))
      const [one, eight] = [yield* refusals(1, 2 * count), yield* refusals(count, 2)]
      // What is on its way when the first is refused is refused as well, in one process or in eight.
      assert.isAtLeast(one, 1)
      assert.isAtMost(eight, 2 * one + count)
    }), 120_000)

  it.scopedLive("exactly one probe of a half-open key, whoever makes it", () =>
    Effect.gen(function*() {
      const redis = yield* RedisServer.make()
      const { seen, url } = yield* provider((label) => ({ status: label === "bad" ? 500 : 200 }))
      const all = yield* members(
        file,
        count,
        orders(redis, url, {
          pool: {
            keys: [keyOf("bad"), keyOf("good")],
            strategy: "round-robin",
            breaker: { threshold: 3, cooldown: 1_000, cooldownFactor: 1, rate: false },
            attribution: "per-key",
            floor: false,
            retryTokens: false
          },
          lanes: 2,
          calls: 120,
          pauseMillis: 50
        })
      )
      const reports = yield* together(all)
      assert.deepStrictEqual(reports.flatMap(({ failed }) => failed), [])
      assert.strictEqual(sum(reports.map(({ served }) => served)), count * 2 * 120)
      const bad = seen.filter(({ label }) => label === "bad").map(({ at }) => at)
      const pauses = bad.slice(1).map((at, i) => at - (bad[i] ?? 0))
      // What was on its way when the breaker opened comes first; from the first long pause on there is one probe for each
      // second.
      const burst = pauses.findIndex((pause) => pause > 950) + 1
      assert.isAtLeast(burst, 1)
      assert.isBelow(burst, 3 * count * 2)
      const probes = pauses.slice(burst)
      assert.isAtLeast(probes.length, 2)
      for (const pause of probes) assert.isAbove(pause, 950)
    }), 120_000)

  it.scopedLive("a told wait that one process heard keeps all others away", () =>
    Effect.gen(function*() {
      const redis = yield* RedisServer.make()
      let refusing = true
      const { seen, url } = yield* provider((label) =>
        label === "limited" && refusing ? { status: 429, retryAfter: 120 } : { status: 200 }
      )
      const base = orders(redis, url, {
        pool: { keys: [keyOf("limited"), keyOf("free")], strategy: "sequential-then-rotate" },
        calls: 20
      })
      const [first, ...others] = yield* members(file, count, base)
      yield* first?.go ?? Effect.void
      yield* RedisServer.until(redis.cli("hlen", "{keymesh:shared}:cooldowns"), (fields) => fields === "1")
      const before = seen.filter(({ status }) => status === 429).length
      // Far longer than news take.
      yield* Effect.sleep(2_000)
      const reports = yield* together(others)
      refusing = false
      assert.strictEqual(before, 1)
      assert.strictEqual(seen.filter(({ status }) => status === 429).length, 1)
      assert.deepStrictEqual(reports.flatMap(({ failed }) => failed), [])
    }), 120_000)

  it.scopedLive(
    "members are killed and stopped, Redis hangs: no call is lost, and no key is locked out for ever",
    () =>
      Effect.gen(function*() {
        const redis = yield* RedisServer.make()
        const { seen, url } = yield* provider(() => ({ status: 200 }))
        const keys = [
          keyOf("one", { limits: { concurrency: 1 } }),
          keyOf("two", { limits: { concurrency: 2 } }),
          keyOf("free")
        ]
        const chaotic = orders(redis, url, {
          redis: { url: redis.url, claimTimeout: 100, commandTimeout: 500, heartbeat: 200, memberTimeout: 1_000 },
          pool: { keys },
          lanes: 3,
          calls: 10_000,
          pauseMillis: 20
        })
        const victims = yield* members(file, 4, chaotic)
        const survivors = yield* members(file, 3, { ...chaotic, calls: Math.ceil(chaosSeconds * 25) })
        yield* Effect.forEach(victims, ({ go }) => go)
        const surviving = yield* Effect.fork(together(survivors))
        const end = performance.now() + chaosSeconds * 1_000
        for (let round = 0; performance.now() < end; round++) {
          const victim = victims[round % victims.length]?.child
          victim?.kill("SIGSTOP")
          yield* Effect.sleep(300)
          victim?.kill("SIGCONT")
          if (round % 3 === 1) {
            yield* redis.pause
            yield* Effect.sleep(700)
            yield* redis.resume
          }
          if (round % 5 === 4) victims[round % victims.length]?.child.kill("SIGKILL")
          yield* Effect.sleep(300)
        }
        for (const { child } of victims) child.kill("SIGKILL")
        const reports = yield* Fiber.join(surviving)
        assert.strictEqual(reports.length, survivors.length)
        assert.deepStrictEqual(reports.flatMap(({ failed }) => failed), [])
        // Those who come afterwards get every key.
        seen.length = 0
        const [late] = yield* members(file, 1, { ...chaotic, calls: 150 })
        const [after] = yield* together(late === undefined ? [] : [late])
        assert.deepStrictEqual(after?.failed, [])
        assert.deepStrictEqual(new Set(seen.map(({ label }) => label)), new Set(["one", "two", "free"]))
        yield* RedisServer.until(
          redis.cli("hkeys", "{keymesh:shared}:held"),
          (fields) => !fields.split("\n").some((field) => field.startsWith("c|"))
        )
      }),
    60_000 + chaosSeconds * 4_000
  )
})
