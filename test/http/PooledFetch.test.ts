import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Schedule from "effect/Schedule"
import type { Transport } from "../../src/http/Attempt.js"
import * as PooledFetch from "../../src/http/PooledFetch.js"
import * as KeyPool from "../../src/KeyPool.js"
import { openAi } from "../../src/providers/Providers.js"
import { live, until } from "../support/openai.js"

const base = "https://api.test/v1"

interface Sent {
  readonly url: string
  readonly method: string
  readonly headers: Headers
  readonly body: string
}

/** A pool of two keys over a transport that notes what it is sent, and answers in turn. */
const pooled = (answers: ReadonlyArray<() => Response> = [], settings: Partial<KeyPool.Settings> = {}) =>
  Effect.gen(function*() {
    const sent: Array<Sent> = []
    const left = [...answers]
    const transport: Transport = async (input, init) => {
      const request = new Request(input, init)
      sent.push({
        url: request.url,
        method: init?.method ?? request.method,
        headers: request.headers,
        body: request.url.startsWith("data:") ? "" : await request.text()
      })
      return left.shift()?.() ?? new Response("{}", { headers: { "content-type": "application/json" } })
    }
    const pool = yield* KeyPool.make({
      keys: ["sk-one-0000000", "sk-two-0000000"],
      retry: Schedule.recurs(3),
      retryTokens: false,
      ...settings
    })
    const made = yield* PooledFetch.make({ pool, provider: openAi, baseUrl: () => new URL(base), transport })
    return { sent, pool, ...made }
  })

const refused = (status: number) => () => new Response("{\"error\":{\"message\":\"no\"}}", { status })

const get = (fetch: Transport, ...args: Parameters<Transport>) => Effect.promise(() => fetch(...args))

describe("how it may be called", () => {
  live("with a text, a URL, or a Request, whole or with more", () =>
    Effect.gen(function*() {
      const { fetch, sent } = yield* pooled()
      const init = { method: "POST", body: "{\"model\":\"m\"}", headers: { "x-own": "1" } }
      yield* get(fetch, `${base}/chat/completions`, init)
      yield* get(fetch, new URL(`${base}/chat/completions`), init)
      yield* get(fetch, new Request(`${base}/chat/completions`, init))
      yield* get(fetch, new Request(`${base}/chat/completions`, { ...init, headers: {}, body: "old" }), init)
      yield* get(fetch, `${base}/chat/completions`, { ...init, headers: [["x-own", "1"]] })
      assert.strictEqual(sent.length, 5)
      for (const { body, headers, method, url } of sent) {
        assert.deepStrictEqual({ body, method, url }, {
          body: init.body,
          method: "POST",
          url: `${base}/chat/completions`
        })
        assert.strictEqual(headers.get("x-own"), "1")
        assert.match(headers.get("authorization") ?? "", /^Bearer sk-(one|two)-0000000$/)
      }
    }))

  live(
    "A1: where limits count tokens, the lease ends with the body, which tells how many they were",
    () =>
      Effect.gen(function*() {
        const answer = { usage: { prompt_tokens: 5, completion_tokens: 7, total_tokens: 12 } }
        const { fetch, pool } = yield* pooled(
          [() => Response.json(answer), () => Response.json(answer)],
          { keys: [{ secret: "sk-one-0000000", limits: { tokensPerMinute: 1_000 } }] }
        )
        const left = Effect.map(pool.snapshot, ({ inFlight, keys }) => [inFlight, keys[0]?.limits[0]?.remaining])
        const ask = (more: object) =>
          get(fetch, `${base}/chat/completions`, { method: "POST", body: JSON.stringify({ model: "m", ...more }) })
        const response = yield* ask({ max_tokens: 500 })
        const [inFlight, remaining = 0] = yield* left
        assert.strictEqual(inFlight, 1)
        assert.isAtMost(remaining, 500)
        assert.deepStrictEqual(yield* Effect.promise(() => response.json()), answer)
        yield* Effect.sleep(1).pipe(Effect.zipRight(left), Effect.repeat({ until: ([inFlight]) => inFlight === 0 }))
        assert.deepStrictEqual(yield* left, [0, 988])
        // Nobody need read it.
        const unread = yield* ask({ max_tokens: 500 })
        yield* Effect.promise(() => unread.body?.cancel() ?? Promise.resolve())
        yield* Effect.sleep(1).pipe(Effect.zipRight(left), Effect.repeat({ until: ([inFlight]) => inFlight === 0 }))
      })
  )

  live(
    "A2: so it does where only limits of its model count them",
    () =>
      Effect.gen(function*() {
        const headers = {
          "x-ratelimit-limit-tokens": "1000",
          "x-ratelimit-remaining-tokens": "900",
          "x-ratelimit-reset-tokens": "10s"
        }
        const answer = () => Response.json({ usage: { prompt_tokens: 5, completion_tokens: 7 } }, { headers })
        const { fetch, pool } = yield* pooled([answer, answer], { keys: ["sk-one-0000000"] })
        const inFlight = Effect.map(pool.snapshot, ({ inFlight }) => inFlight)
        const ask = () =>
          get(fetch, `${base}/chat/completions`, { method: "POST", body: "{\"model\":\"m\",\"max_tokens\":50}" })
        // Nothing is known of limits yet.
        yield* ask()
        assert.strictEqual(yield* inFlight, 0)
        const response = yield* ask()
        assert.strictEqual(yield* inFlight, 1)
        yield* Effect.promise(() => response.text())
        yield* Effect.sleep(1).pipe(Effect.zipRight(inFlight), Effect.repeat({ until: (left) => left === 0 }))
      })
  )

  live("the body of a Request is copied for each attempt", () =>
    Effect.gen(function*() {
      const { fetch, sent } = yield* pooled([refused(500), refused(500)])
      const response = yield* get(
        fetch,
        new Request(`${base}/chat/completions`, { method: "POST", body: "{\"model\":\"m\"}" })
      )
      assert.strictEqual(response.status, 200)
      assert.deepStrictEqual(sent.map(({ body }) => body), Array(3).fill("{\"model\":\"m\"}"))
    }))

  live("the signal of a Request counts, too", () =>
    Effect.gen(function*() {
      const { fetch, pool, sent } = yield* pooled()
      const request = new Request(`${base}/models`, { signal: AbortSignal.abort("enough") })
      const reason = yield* Effect.flip(Effect.tryPromise({ try: () => fetch(request), catch: (error) => error }))
      assert.strictEqual(reason, "enough")
      assert.strictEqual((yield* pool.snapshot).attempts, 0)
      assert.strictEqual(sent.length, 0)
    }))

  live("H1: another origin gets what it was sent, without credentials", () =>
    Effect.gen(function*() {
      const { fetch, pool, sent } = yield* pooled()
      const headers = { authorization: "Bearer mine", "api-key": "mine", "x-own": "1" }
      const foreign = [
        "https://api.test.evil/v1/models",
        "http://api.test/v1/models",
        "https://api.test:444/v1/models"
      ]
      for (const url of foreign) yield* get(fetch, url, { headers })
      yield* get(fetch, new Request("https://evil.test/v1", { method: "POST", body: "hi", headers }))
      assert.strictEqual(sent.length, 4)
      for (const one of sent) {
        assert.isNull(one.headers.get("authorization"))
        assert.isNull(one.headers.get("api-key"))
        assert.strictEqual(one.headers.get("x-own"), "1")
      }
      assert.deepInclude(sent[3], { method: "POST", body: "hi" })
      assert.strictEqual((yield* pool.snapshot).attempts, 0)
    }))

  live("H3: a data: address passes", () =>
    Effect.gen(function*() {
      const { fetch, pool, sent } = yield* pooled()
      yield* get(fetch, "data:,")
      assert.strictEqual(sent.length, 1)
      assert.isNull(sent[0]?.headers.get("authorization"))
      assert.strictEqual((yield* pool.snapshot).attempts, 0)
    }))
})

describe("what becomes of a request", () => {
  const content = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n"
  const events = (breaks?: Promise<unknown>) => () =>
    new Response(
      new ReadableStream<Uint8Array>({
        start: async (controller) => {
          controller.enqueue(new TextEncoder().encode(content))
          await (breaks ?? new Promise(() => {}))
          controller.error(new TypeError("terminated"))
        }
      }),
      { headers: { "content-type": "text/event-stream", "x-request-id": "seen sk-one-0000000" } }
    )
  const streaming = { method: "POST", body: "{\"stream\":true}" }

  live("C5: a stream that nobody reads gives its key back when its request is aborted", () =>
    Effect.gen(function*() {
      const { fetch, pool } = yield* pooled([events()])
      const controller = new AbortController()
      yield* get(fetch, `${base}/chat/completions`, { ...streaming, signal: controller.signal })
      assert.strictEqual((yield* pool.snapshot).inFlight, 1)
      controller.abort()
      yield* until(Effect.map(pool.snapshot, ({ inFlight }) => inFlight === 0))
      const { faults, successes } = yield* Effect.map(pool.snapshot, ({ keys }) => ({
        faults: keys.reduce((sum, key) => sum + key.faults, 0),
        successes: keys.reduce((sum, key) => sum + key.successes, 0)
      }))
      assert.deepStrictEqual({ faults, successes }, { faults: 0, successes: 1 })
    }))

  live("K1: a stream that breaks late does not show the key in the id of its request", () =>
    Effect.gen(function*() {
      let release = () => {}
      const breaks = new Promise<void>((resolve) => {
        release = resolve
      })
      const { failureOf, fetch } = yield* pooled([events(breaks)])
      const response = yield* get(fetch, `${base}/chat/completions`, streaming)
      release()
      const error = yield* Effect.flip(Effect.tryPromise({ try: () => response.text(), catch: (error) => error }))
      const failure = failureOf(error)
      assert.strictEqual(failure?._tag, "ProviderFailure")
      assert.strictEqual(failure?._tag === "ProviderFailure" ? failure.requestId : "", "seen [redacted]")
    }))

  live("what cannot be sent is a rejection, as with any fetch", () =>
    Effect.gen(function*() {
      const { fetch, pool } = yield* pooled()
      const given = { headers: { "no name": "x" } }
      const promise = yield* Effect.try(() => fetch(`${base}/models`, given))
      const error = yield* Effect.flip(Effect.tryPromise({ try: () => promise, catch: (error) => error }))
      assert.instanceOf(error, TypeError)
      assert.strictEqual((yield* pool.snapshot).attempts, 0)
    }))
})

describe("what stands behind an error", () => {
  const errorOf = (response: Response) => ({ headers: response.headers })

  live(
    "is found by the headers of the answer, as Headers or as a record, and through causes",
    () =>
      Effect.gen(function*() {
        const { failureOf, fetch } = yield* pooled([refused(404)])
        const response = yield* get(fetch, `${base}/models/x`)
        const failure = failureOf(errorOf(response))
        assert.deepInclude(failure, { _tag: "ProviderFailure", status: 404, body: { error: { message: "no" } } })
        assert.strictEqual(failureOf({ headers: Object.fromEntries(response.headers) }), failure)
        assert.strictEqual(failureOf(new Error("outer", { cause: errorOf(response) })), failure)
      })
  )

  live("is nothing where there is nothing", () =>
    Effect.gen(function*() {
      const { failureOf } = yield* pooled()
      const circle: { cause?: unknown } = {}
      circle.cause = circle
      for (
        const error of [undefined, null, 7, "x", {}, new Error("x"), { headers: { "x-keymesh-id": "nope" } }, circle]
      ) {
        assert.strictEqual(failureOf(error), undefined)
      }
    }))

  live("is kept for the latest thousand", () =>
    Effect.gen(function*() {
      const { failureOf, fetch } = yield* pooled(Array.from({ length: 1_002 }, () => refused(404)))
      const responses: Array<Response> = []
      for (let i = 0; i < 1_002; i++) responses.push(yield* get(fetch, `${base}/models/x`))
      const known = responses.map((response) => failureOf(errorOf(response)) !== undefined)
      assert.deepStrictEqual(known.map((found, index) => found ? -1 : index).filter((index) => index >= 0), [0, 1])
    }))

  live("a connection that failed is found by the error itself", () =>
    Effect.gen(function*() {
      const { failureOf, fetch } = yield* pooled([() => {
        throw new TypeError("fetch failed")
      }], { retry: Schedule.stop })
      const error = yield* Effect.flip(
        Effect.tryPromise({ try: () => fetch(`${base}/models`), catch: (error) => error })
      )
      assert.instanceOf(error, TypeError)
      assert.deepInclude(failureOf(new Error("outer", { cause: error })), {
        _tag: "ProviderFailure",
        status: undefined
      })
    }))
})

describe("the end", () => {
  live("after its scope closed it starts nothing, although the pool is open", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one-0000000"] })
      const sent: Array<string> = []
      const transport: Transport = (input) => {
        sent.push(String(input))
        return Promise.resolve(new Response("{}"))
      }
      const { fetch } = yield* Effect.scoped(
        PooledFetch.make({ pool, provider: openAi, baseUrl: () => new URL(base), transport })
      )
      const response = yield* get(fetch, `${base}/models`)
      assert.strictEqual(response.status, 503)
      assert.strictEqual(response.headers.get("x-should-retry"), "false")
      assert.deepStrictEqual(sent, [])
    }))
})
