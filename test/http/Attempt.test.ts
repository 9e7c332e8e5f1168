import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as TestClock from "effect/TestClock"
import * as Attempt from "../../src/http/Attempt.js"
import * as EventBody from "../../src/http/EventBody.js"
import * as KeyPool from "../../src/KeyPool.js"
import type { Provider } from "../../src/providers/Provider.js"
import { openAi } from "../../src/providers/Providers.js"
import { test } from "../support/pooled.js"

const secret = "sk-one-0123456789"

interface Given {
  readonly transport: Attempt.Transport
  readonly streaming?: boolean
  readonly url?: string
  readonly init?: RequestInit
  readonly holdMillis?: number
  readonly provider?: Provider
  readonly secret?: string
  readonly key?: { readonly headers?: Record<string, string>; readonly baseUrl?: string }
  readonly signal?: AbortSignal
}

/** One attempt with a key of its own. */
const attempted = (given: Given) =>
  Effect.gen(function*() {
    const pool = yield* KeyPool.make({ keys: [{ secret: given.secret ?? secret, ...given.key }] })
    const lease = yield* pool.lease
    const environment: Attempt.Environment = {
      provider: given.provider ?? openAi,
      baseUrl: new URL("https://api.test/v1"),
      transport: given.transport,
      limits: EventBody.defaultLimits,
      fork: (effect) => {
        const fiber = Effect.runFork(effect)
        return () => fiber.unsafeInterruptAsFork(fiber.id())
      },
      onCollected: () => () => {},
      onOpened: () => () => {},
      mark: ["x-mark", "7"],
      onLate: () => {}
    }
    return yield* Attempt.attempt(environment, {
      url: new URL(given.url ?? "https://api.test/v1/chat/completions"),
      headers: new Headers(given.init?.headers),
      init: () => given.init ?? { method: "POST", body: "{}" },
      facts: { model: "m", streaming: given.streaming ?? false, creating: false },
      signal: given.signal,
      holdMillis: given.holdMillis
    }, lease)
  })

const never = new Promise<never>(() => {})

/** A body whose chunks come when they are let; the last never, if it is not closed. */
const slowly = (parts: ReadonlyArray<string>, after: Promise<unknown>, end: "close" | "break" | "hang") =>
  new ReadableStream<Uint8Array>({
    start: async (controller) => {
      for (const part of parts) controller.enqueue(new TextEncoder().encode(part))
      await after
      if (end === "close") controller.close()
      if (end === "break") controller.error(new TypeError("terminated"))
    }
  })

const answering = (body: BodyInit | null, init: ResponseInit = {}): Attempt.Transport => () =>
  Promise.resolve(new Response(body, init))

const json = { headers: { "content-type": "application/json" } }

const turn = Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))

const textOf = (answer: Attempt.Answer) => Effect.promise(() => answer.response.text())

describe("answers", () => {
  test("a success is handed on as it is, and opened only when it is read", () =>
    Effect.gen(function*() {
      const body = new ReadableStream<Uint8Array>({ pull: (controller) => controller.enqueue(Uint8Array.of(123)) })
      const response = new Response(body, json)
      const answer = yield* attempted({ transport: () => Promise.resolve(response) })
      assert.deepInclude(answer, { fault: undefined, holds: false })
      assert.deepStrictEqual([...answer.response.headers], [...response.headers])
      assert.isFalse(body.locked)
      const first = yield* Effect.promise(async () => answer.response.body?.getReader().read())
      assert.deepStrictEqual(first, { done: false, value: Uint8Array.of(123) })
    }))

  test("an answer without a body stays without one", () =>
    Effect.gen(function*() {
      for (const status of [204, 205, 304]) {
        const { response } = yield* attempted({
          transport: answering(null, { status, headers: { "x-seen": secret } })
        })
        assert.deepInclude({ status: response.status, body: response.body }, { status, body: null })
        assert.strictEqual(response.headers.get("x-seen"), "[redacted]")
      }
    }))

  test("a refusal has the address of its answer, and tells SDKs not to try again", () =>
    Effect.gen(function*() {
      const refused = new Response("{\"error\":{\"message\":\"no\"}}", {
        ...json,
        status: 500,
        statusText: "No",
        headers: { "x-should-retry": "true" }
      })
      Object.defineProperty(refused, "url", { value: "https://api.test/v1/other" })
      const { body, fault, response } = yield* attempted({ transport: () => Promise.resolve(refused) })
      assert.strictEqual(response.url, "https://api.test/v1/other")
      assert.strictEqual(response.statusText, "No")
      assert.strictEqual(response.headers.get("x-should-retry"), "false")
      assert.strictEqual(fault?.kind, "ServerError")
      assert.deepStrictEqual(body, { error: { message: "no" } })
    }))

  test("K1: a refusal is clean in its reason phrase, and its fault where a code is looked for", () =>
    Effect.gen(function*() {
      const odd = "odd-secret-7"
      const { body, fault, response } = yield* attempted({
        secret: odd,
        transport: answering(JSON.stringify({ error: { message: odd, code: odd } }), {
          status: 418,
          statusText: `teapot of ${odd}`,
          headers: { "www-authenticate": `Bearer error="${odd}"` }
        })
      })
      assert.strictEqual(response.statusText, "teapot of [redacted]")
      assert.notInclude(JSON.stringify([body, fault]), odd)
      const challenged = yield* attempted({
        secret: odd,
        transport: answering("", { status: 401, headers: { "www-authenticate": `Bearer error="${odd}"` } })
      })
      assert.notInclude(JSON.stringify(challenged.fault), odd)
    }))

  test("a refusal whose body never comes is one after 5 seconds, and its request is let go", () =>
    Effect.gen(function*() {
      const signals: Array<AbortSignal | null | undefined> = []
      const fiber = yield* Effect.fork(attempted({
        transport: (_, init) => {
          signals.push(init?.signal)
          return Promise.resolve(new Response(slowly(["{\"er"], never, "hang"), { ...json, status: 429 }))
        }
      }))
      yield* turn
      yield* TestClock.adjust("4999 millis")
      yield* turn
      assert.strictEqual((yield* Fiber.poll(fiber))._tag, "None")
      yield* TestClock.adjust(1)
      yield* turn
      const { fault } = yield* Fiber.join(fiber)
      assert.strictEqual(fault?.kind, "RateLimited")
      assert.isTrue(signals[0]?.aborted)
    }))

  test("a refusal whose body breaks is one all the same", () =>
    Effect.gen(function*() {
      const { fault } = yield* attempted({
        transport: answering(slowly(["{"], Promise.resolve(), "break"), { ...json, status: 401 })
      })
      assert.strictEqual(fault?.kind, "Unauthorized")
    }))

  test("H5: a success in JSON whose body is looked at may take its time, and is not cut short", () =>
    Effect.gen(function*() {
      let release = () => {}
      const later = new Promise<void>((resolve) => {
        release = resolve
      })
      const peeking: Provider = { ...openAi, dialect: { ...openAi.dialect, okBody: "peek" } }
      const fiber = yield* Effect.fork(attempted({
        provider: peeking,
        transport: answering(slowly(["{\"ok\":", "true}"], later, "close"), json)
      }))
      yield* turn
      yield* TestClock.adjust("1 minute")
      yield* turn
      assert.strictEqual((yield* Fiber.poll(fiber))._tag, "None")
      release()
      const answer = yield* Fiber.join(fiber)
      assert.strictEqual(yield* textOf(answer), "{\"ok\":true}")
      assert.strictEqual(answer.fault, undefined)
    }))

  test("H5: of a long one no more is looked at than an error may have; the rest passes as it comes", () =>
    Effect.gen(function*() {
      const peeking: Provider = { ...openAi, dialect: { ...openAi.dialect, okBody: "peek" } }
      const parts = ["{\"ok\":\"", "x".repeat(300_000), "y"]
      const { fault, response } = yield* attempted({
        provider: peeking,
        transport: answering(slowly(parts, never, "hang"), json)
      })
      assert.isUndefined(fault)
      const read = yield* Effect.promise(async () => {
        const reader = response.body?.getReader()
        return [await reader?.read(), await reader?.read(), await reader?.read()]
      })
      assert.deepStrictEqual(read.map((one) => new TextDecoder().decode(one?.value)), parts)
    }))

  test("S4: lines of JSON pass as they come, also where a stream of events was asked for", () =>
    Effect.gen(function*() {
      for (const type of ["application/x-ndjson", "application/jsonl", "application/json-seq"]) {
        const { response } = yield* attempted({
          streaming: true,
          transport: answering(slowly(["{}\n"], never, "hang"), { headers: { "content-type": type } })
        })
        const first = yield* Effect.promise(async () => response.body?.getReader().read())
        assert.strictEqual(new TextDecoder().decode(first?.value), "{}\n")
      }
    }))

  test("F3: a status that no Response can be made with is handed on all the same", () =>
    Effect.gen(function*() {
      const odd = Object.defineProperty(new Response("no", { status: 599 }), "status", { value: 999 })
      const { fault, response } = yield* attempted({ transport: () => Promise.resolve(odd) })
      assert.deepInclude({ status: response.status, ok: response.ok }, { status: 999, ok: false })
      assert.isDefined(fault)
      assert.strictEqual(yield* Effect.promise(() => response.text()), "no")
    }))

  test("H5: one that breaks is a Network fault, not an empty success", () =>
    Effect.gen(function*() {
      const exit = yield* Effect.exit(attempted({
        streaming: true,
        transport: answering(slowly(["{\"ok\":"], Promise.resolve(), "break"), json)
      }))
      const failure = Exit.isFailure(exit) && exit.cause._tag === "Fail" ? exit.cause.error : undefined
      assert.instanceOf(failure, Attempt.NoAnswer)
      if (failure instanceof Attempt.NoAnswer) assert.strictEqual(failure.fault?.kind, "Network")
    }))

  test("S2: a stream is held back no longer than its request says", () =>
    Effect.gen(function*() {
      const fiber = yield* Effect.fork(attempted({
        streaming: true,
        holdMillis: 250,
        transport: answering(slowly([": ping\n\n"], never, "hang"), {
          headers: { "content-type": "text/event-stream" }
        })
      }))
      yield* turn
      yield* TestClock.adjust(249)
      yield* turn
      assert.strictEqual((yield* Fiber.poll(fiber))._tag, "None")
      yield* TestClock.adjust(1)
      yield* turn
      const { holds, response } = yield* Fiber.join(fiber)
      assert.isTrue(holds)
      assert.strictEqual(response.headers.get("x-mark"), "7")
    }))

  test("C5: interruption aborts the request", () =>
    Effect.gen(function*() {
      const signals: Array<AbortSignal | null | undefined> = []
      const fiber = yield* Effect.fork(attempted({
        transport: (_, init) => {
          signals.push(init?.signal)
          return never
        }
      }))
      yield* turn
      yield* Fiber.interrupt(fiber)
      assert.deepStrictEqual(signals.map((signal) => signal?.aborted), [true])
    }))

  test("S1: the caller's signal reaches the body of an answer that was handed on", () =>
    Effect.gen(function*() {
      const controller = new AbortController()
      const signals: Array<AbortSignal | null | undefined> = []
      yield* attempted({
        signal: controller.signal,
        transport: (_, init) => {
          signals.push(init?.signal)
          return Promise.resolve(new Response("{}", json))
        }
      })
      controller.abort("enough")
      assert.deepStrictEqual(signals.map((signal) => signal?.reason), ["enough"])
    }))
})

describe("requests", () => {
  const sent = (given: Omit<Given, "transport">) =>
    Effect.gen(function*() {
      const seen: Array<readonly [string, Headers, RequestInit]> = []
      yield* attempted({
        ...given,
        transport: (input, init = {}) => {
          seen.push([String(input), new Headers(init.headers), init])
          return Promise.resolve(new Response("{}", json))
        }
      })
      const [first] = seen
      return first ?? (yield* Effect.dieMessage("nothing was sent"))
    })

  /** What is sent when each request is redirected once, as `method path body type`. */
  const redirected = (status: number, method: string, body?: string) =>
    Effect.gen(function*() {
      const seen: Array<string> = []
      yield* attempted({
        init: { method, headers: { "content-type": "text/own" }, ...(body === undefined ? {} : { body }) },
        transport: (input, init = {}) => {
          const type = new Headers(init.headers).get("content-type")
          seen.push([init.method, new URL(String(input)).pathname, init.body, type].join(" "))
          const location = { location: "/v1/there" }
          return Promise.resolve(
            seen.length === 1 ? new Response(null, { status, headers: location }) : new Response("{}", json)
          )
        }
      })
      return seen[1]
    })

  test("H1: a redirect within the origin is followed as fetch does it", () =>
    Effect.gen(function*() {
      for (const status of [301, 302, 303]) {
        // Without the body, and without what describes it.
        assert.strictEqual(yield* redirected(status, "POST", "b"), "GET /v1/there  ")
        assert.strictEqual(yield* redirected(status, "HEAD"), "HEAD /v1/there  text/own")
      }
      assert.strictEqual(yield* redirected(303, "DELETE"), "GET /v1/there  ")
      for (const status of [301, 302]) {
        assert.strictEqual(yield* redirected(status, "PUT", "b"), "PUT /v1/there b text/own")
        assert.strictEqual(yield* redirected(status, "DELETE"), "DELETE /v1/there  text/own")
      }
      for (const status of [307, 308]) {
        assert.strictEqual(yield* redirected(status, "POST", "b"), "POST /v1/there b text/own")
      }
    }))

  test("K1: credentials that cannot be made fail the attempt, say nothing of the key, and do not show it", () =>
    Effect.gen(function*() {
      const credentials: ReadonlyArray<Provider["credentials"]> = [
        (key) => {
          throw new Error(`cannot sign with ${key}`)
        },
        (key) => ({ headers: { authorization: `${key}\nx` } })
      ]
      for (const made of credentials) {
        const exit = yield* Effect.exit(attempted({
          provider: { ...openAi, credentials: made },
          transport: answering("{}", json)
        }))
        const failure = Exit.isFailure(exit) && exit.cause._tag === "Fail" ? exit.cause.error : undefined
        assert.instanceOf(failure, Attempt.NoAnswer)
        if (!(failure instanceof Attempt.NoAnswer) || !(failure.error instanceof Error)) continue
        assert.isUndefined(failure.fault)
        assert.include(failure.error.message, "[redacted]")
        assert.notInclude(`${failure.error.message} ${failure.error.stack}`, secret)
      }
    }))

  test("H2: every credential header is taken out, the key's put in; redirects are shown", () =>
    Effect.gen(function*() {
      const [, headers, init] = yield* sent({
        init: { headers: { Authorization: "Bearer x", "API-Key": "y", "x-own": "z" } },
        key: { headers: { "OpenAI-Project": "p", "x-own": "of the key" } }
      })
      assert.deepStrictEqual(Object.fromEntries(headers), {
        authorization: `Bearer ${secret}`,
        "openai-project": "p",
        "x-own": "of the key"
      })
      assert.strictEqual(init.redirect, "manual")
    }))

  test("a key's base URL takes the place of the client's, below which the path and the query stay", () =>
    Effect.gen(function*() {
      const to = (baseUrl: string, url: string) => Effect.map(sent({ key: { baseUrl }, url }), ([address]) => address)
      assert.strictEqual(
        yield* to("https://eu.test/openai/", "https://api.test/v1/files?a=1"),
        "https://eu.test/openai/files?a=1"
      )
      assert.strictEqual(yield* to("https://eu.test", "https://api.test/v1/files"), "https://eu.test/files")
      assert.strictEqual(yield* to("https://eu.test/v2", "https://api.test/other"), "https://eu.test/v2/other")
      assert.strictEqual(yield* to("https://eu.test/v2", "https://api.test/v1beta/x"), "https://eu.test/v2/v1beta/x")
    }))
})
