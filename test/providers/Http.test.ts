/** Any REST endpoint over a pool, against a fake with keys in unusual places. */
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import { inspect } from "node:util"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type * as FakeProvider from "../../examples/support/FakeProvider.js"
import * as CallOptions from "../../src/CallOptions.js"
import * as PooledHttpClient from "../../src/http/PooledHttpClient.js"
import * as Http from "../../src/providers/Http.js"
import { a, atOnce, b, live } from "../support/openai.js"

const Forecast = Schema.Struct({ city: Schema.String })

/** How the fake answers each key: `a` as told, all others with a forecast. */
const both = (
  auth: Http.Auth,
  keyOf: (request: FakeProvider.Incoming) => string | undefined,
  first: (request: FakeProvider.Incoming) => FakeProvider.Answer,
  settings: Partial<Http.Settings> = {}
) =>
  Effect.gen(function*() {
    const keys: Array<string> = []
    const fake = yield* FakeOpenAi.make({
      handler: (request) => {
        const key = keyOf(request) ?? "none"
        keys.push(key === a ? "a" : key === b ? "b" : key)
        const type = { "content-type": "application/json" }
        return key === a
          ? { ...first(request), headers: { ...type, ...first(request).headers } }
          : { status: 200, headers: type, body: "{\"city\":\"Vienna\"}" }
      }
    })
    const http = yield* Http.make({
      baseUrl: `${fake.origin}/v2`,
      auth,
      keys: [a, b],
      floor: false,
      cooldowns: { jitter: 0 },
      ...atOnce(3),
      ...settings
    })
    return { fake, keys, http }
  })

const refuse = (status: number): FakeProvider.Answer => ({ status, body: "{\"error\":{\"message\":\"no\"}}" })

const auths: ReadonlyArray<readonly [string, Http.Auth, (request: FakeProvider.Incoming) => string | undefined]> = [
  ["a bearer token", "bearer", ({ headers }) => headers["authorization"]?.slice(7)],
  ["a header", { header: "X-Weather-Key" }, ({ headers }) => headers["x-weather-key"]],
  ["a parameter of the query", { query: "key" }, ({ query }) => query.getAll("key").join()],
  [
    "whatever a function makes of it",
    (secret) => ({ headers: { "x-user": "me", authorization: `Token ${secret}` }, query: { v: "1" } }),
    ({ headers, query }) => query.get("v") === "1" ? headers["authorization"]?.slice(6) : undefined
  ]
]

for (const [name, auth, keyOf] of auths) {
  describe(`with keys as ${name}`, () => {
    live("the client rotates, decodes by a schema, and the base URL is put before", () =>
      Effect.gen(function*() {
        const { fake, http, keys } = yield* both(auth, keyOf, () => refuse(429))
        const request = http.client.get("/forecast", { urlParams: { city: "Vienna" } })
        const forecast = yield* Effect.flatMap(request, HttpClientResponse.schemaBodyJson(Forecast))
        assert.deepStrictEqual(forecast, { city: "Vienna" })
        assert.deepStrictEqual(keys, ["a", "b"])
        for (const { headers, path, query } of yield* fake.requests) {
          assert.strictEqual(path, "/v2/forecast")
          assert.include(query, "city=Vienna")
          assert.isUndefined(headers["x-keymesh-credential"])
        }
      }))

    live("so does its fetch", () =>
      Effect.gen(function*() {
        const { fake, http, keys } = yield* both(auth, keyOf, () => refuse(429))
        const response = yield* Effect.promise(() => http.fetch(`${fake.origin}/v2/forecast?city=Vienna`))
        assert.deepStrictEqual(yield* Effect.promise(() => response.json()), { city: "Vienna" })
        assert.strictEqual(response.url, `${fake.origin}/v2/forecast?city=Vienna`)
        assert.deepStrictEqual(keys, ["a", "b"])
      }))

    live("K1: what the endpoint echoes shows no key", () =>
      Effect.gen(function*() {
        const echo = ({ headers, path, query }: FakeProvider.Incoming) => ({
          status: 400,
          headers: { "x-echo": `${path}?${query} ${JSON.stringify(headers)}` },
          body: JSON.stringify({ error: { message: `${path}?${query}`, headers } })
        })
        const { fake, http } = yield* both(auth, keyOf, echo, { keys: [a] })
        const response = yield* http.client.get("/forecast")
        const fetched = yield* Effect.promise(() => http.fetch(`${fake.origin}/v2/forecast`))
        const error = yield* Effect.flip(HttpClientResponse.filterStatusOk(response))
        const text = [
          yield* response.text,
          yield* Effect.promise(() => fetched.text()),
          JSON.stringify([...fetched.headers]),
          fetched.url,
          inspect(error, { depth: 20, getters: true })
        ].join("\n")
        assert.include(text, "[redacted]")
        assert.notInclude(text, a)
      }))

    live("H1: another origin gets no key", () =>
      Effect.gen(function*() {
        const { http, keys } = yield* both(auth, keyOf, () => refuse(429))
        const other = yield* FakeOpenAi.make({ handler: () => ({ status: 200, body: "{}" }) })
        yield* http.client.get(`${other.origin}/v2/forecast`)
        yield* Effect.promise(() => http.fetch(`${other.origin}/v2/forecast`))
        assert.deepStrictEqual(keys, [])
        const requests = yield* other.requests
        assert.lengthOf(requests, 2)
        assert.notInclude(JSON.stringify(requests), a)
      }))
  })
}

describe("C8: a request that may change something", () => {
  const keyOf = ({ headers }: FakeProvider.Incoming) => headers["x-api-key"]
  const post = HttpClientRequest.post("/orders")
  const auth = { header: "x-api-key" }
  const status = (effect: Effect.Effect<HttpClientResponse.HttpClientResponse, unknown>) =>
    Effect.map(Effect.orDie(effect), (response) => response.status)

  live("is not repeated after an ambiguous fault; one that only reads is", () =>
    Effect.gen(function*() {
      const { http, keys } = yield* both(auth, keyOf, () => refuse(500), { strategy: "sequential-then-rotate" })
      assert.strictEqual(yield* status(http.client.execute(post)), 500)
      assert.deepStrictEqual(keys, ["a"])
      assert.strictEqual(yield* status(http.client.get("/orders")), 200)
      assert.deepStrictEqual(keys, ["a", "a", "b"])
    }))

  live(
    "goes on when it was refused, or carries an idempotency key, or the call or the settings say so",
    () =>
      Effect.gen(function*() {
        const tried = (
          request: HttpClientRequest.HttpClientRequest,
          code: number,
          settings: Partial<Http.Settings> = {},
          said?: boolean
        ) =>
          Effect.gen(function*() {
            const { http, keys } = yield* both(auth, keyOf, () => refuse(code), settings)
            yield* status(CallOptions.withOptions(http.client.execute(request), { replayable: said }))
            return keys.join("")
          })
        assert.strictEqual(yield* tried(post, 429), "ab")
        assert.strictEqual(yield* tried(post, 401), "ab")
        assert.strictEqual(yield* tried(HttpClientRequest.setHeader(post, "Idempotency-Key", "1"), 500), "ab")
        assert.strictEqual(yield* tried(post, 500, {}, true), "ab")
        assert.strictEqual(yield* tried(post, 500, { replayable: true }), "ab")
        assert.strictEqual(yield* tried(post, 500, { replayable: ({ url }) => url.pathname.endsWith("/orders") }), "ab")
        assert.strictEqual(yield* tried(post, 500, { replayable: true }, false), "a")
      })
  )
})

describe("what is given up on", () => {
  const keyOf = ({ headers }: FakeProvider.Incoming) => headers["x-api-key"]

  for (const [status, honest] of [[401, 401], [429, 429]] as const) {
    live(
      `C10: keys that all answered ${status} make an answer of ${honest}, and a typed error`,
      () =>
        Effect.gen(function*() {
          const { fake, http } = yield* both({ header: "x-api-key" }, keyOf, () => ({
            ...refuse(status),
            headers: { "retry-after": "120" }
          }), { keys: [a], budget: "1 second" })
          const response = yield* Effect.promise(() => http.fetch(`${fake.origin}/v2/x`))
          assert.strictEqual(response.status, honest)
          if (honest === 429) assert.isAbove(Number(response.headers.get("retry-after")), 100)
          const error = yield* Effect.flip(PooledHttpClient.withPoolErrors(http.client).get("/x"))
          assert.strictEqual(error._tag, "AllKeysExhausted")
        })
    )
  }

  live("H5: a success whose body is an error is one where the settings say so", () =>
    Effect.gen(function*() {
      const hidden = () => ({ status: 200, body: "{\"error\":{\"code\":429,\"message\":\"Rate limit exceeded\"}}" })
      const peeking = yield* both({ header: "x-api-key" }, keyOf, hidden, { peek: true })
      const forecast = yield* Effect.flatMap(peeking.http.client.get("/x"), HttpClientResponse.schemaBodyJson(Forecast))
      assert.deepStrictEqual([forecast.city, ...peeking.keys], ["Vienna", "a", "b"])
      const trusting = yield* both({ header: "x-api-key" }, keyOf, hidden)
      assert.strictEqual((yield* trusting.http.client.get("/x")).status, 200)
      assert.deepStrictEqual(trusting.keys, ["a"])
    }))

  live("K3: settings that cannot be meant are refused by name", () =>
    Effect.gen(function*() {
      const field = (settings: Partial<Http.Settings>) =>
        Effect.map(
          Effect.flip(Http.make({ baseUrl: "https://api.example.com", auth: "bearer", keys: [a], ...settings })),
          (error) => error.field
        )
      assert.strictEqual(yield* field({ baseUrl: "http://api.example.com" }), "baseUrl")
      assert.strictEqual(yield* field({ auth: { header: "no name" } }), "auth.header")
      assert.strictEqual(yield* field({ auth: { query: "" } }), "auth.query")
      // A program without types may say anything.
      assert.strictEqual(yield* field({ auth: "basic" as "bearer" }), "auth")
      assert.strictEqual(yield* field({ keys: [] }), "keys")
    }))
})
