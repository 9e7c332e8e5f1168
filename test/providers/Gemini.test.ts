import { assert, describe, it } from "@effect/vitest"
import { ApiError, GoogleGenAI } from "@google/genai"
import * as Chunk from "effect/Chunk"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as FakeGemini from "../../examples/support/FakeGemini.js"
import type * as FakeProvider from "../../examples/support/FakeProvider.js"
import * as ApiKey from "../../src/ApiKey.js"
import { AllKeysExhausted, ProviderError } from "../../src/KeymeshError.js"
import * as Gemini from "../../src/providers/Gemini.js"
import { gemini } from "../../src/providers/Providers.js"
import { atOnce, drained, failure, live, once, until, watched } from "../support/openai.js"

const model = "gemini-2.5-flash"
const contents = "good morning to you"
const said = "You said: good morning to you"
const a = "AIza-test-alpha-0123456789"
const b = "AIza-test-bravo-0123456789"

const service = (fake: FakeGemini.FakeGemini, labels: string, settings: Partial<Gemini.Settings> = {}) =>
  Gemini.make({
    keys: [...labels].map((label) => ({ secret: label === "a" ? a : b, label })),
    baseUrl: fake.baseUrl,
    floor: false,
    cooldowns: { jitter: 0 },
    ...settings
  })

/** No breaker opens, so that no call waits for one. */
const patient = { breaker: { threshold: 100, rate: false } } as const

const both = (labels: string, options: FakeGemini.Options = {}, settings: Partial<Gemini.Settings> = {}) =>
  Effect.gen(function*() {
    const fake = yield* FakeGemini.make(options)
    return { fake, gemini: yield* service(fake, labels, settings) }
  })

const bare = (fake: FakeGemini.FakeGemini) =>
  new GoogleGenAI({ apiKey: a, vertexai: false, httpOptions: { baseUrl: fake.baseUrl } })

const ask = (client: GoogleGenAI) => client.models.generateContent({ model, contents })

const askStream = (client: GoogleGenAI) => client.models.generateContentStream({ model, contents })

const interact = (client: GoogleGenAI, more: { readonly store?: boolean } = {}) =>
  client.interactions.create({ model, input: contents, ...more })

/** The server refuses it: a name must be a text. */
const badTool = { functionDeclarations: [{ name: 7 as never }] }

const asked = (fake: FakeGemini.FakeGemini): Effect.Effect<string> =>
  Effect.map(fake.requests, (requests) => requests.map(({ key }) => key === a ? "a" : key === b ? "b" : "?").join(""))

const idle = ({ pool }: Gemini.Service) => until(Effect.map(pool.snapshot, ({ inFlight }) => inFlight === 0))

const told = (error: unknown): object => {
  if (!(error instanceof Error)) return { thrown: error }
  return {
    class: error.constructor.name,
    name: error.name,
    message: error.message,
    status: Reflect.get(error, "status"),
    own: Object.keys(error).sort()
  }
}

const settle = async (f: () => PromiseLike<unknown>): Promise<unknown> => {
  try {
    return { value: await f() }
  } catch (error) {
    return told(error)
  }
}

/** Servers and requests differ in ports and times. */
const timeless = (value: unknown): unknown =>
  JSON.parse(
    (JSON.stringify(value) ?? "null")
      .replace(/127\.0\.0\.1:\d+/g, "host")
      .replace(/"(?:date|server-timing|x-keymesh-id)":"[^"]*",?/g, "")
      .replace(/,\}/g, "}")
  )

/** Whole answers, headers included. */
const calls: Readonly<Record<string, (client: GoogleGenAI) => Promise<unknown>>> = {
  "models.generateContent": async (client) => {
    const answer = await ask(client)
    return { answer, text: answer.text }
  },
  "models.generateContentStream": (client) => drained(() => askStream(client)),
  "functions": async (client) =>
    (await client.models.generateContent({
      model,
      contents,
      config: { tools: [{ functionDeclarations: [{ name: "weather", parametersJsonSchema: { type: "object" } }] }] }
    })).functionCalls,
  "chats.sendMessage": async (client) => {
    const chat = client.chats.create({ model })
    const first = (await chat.sendMessage({ message: "one" })).text
    return { first, second: (await chat.sendMessage({ message: "two" })).text, history: chat.getHistory() }
  },
  "chats.sendMessageStream": async (client) => {
    const chat = client.chats.create({ model })
    const chunks = await drained(() => chat.sendMessageStream({ message: "one" }))
    return { chunks, history: chat.getHistory() }
  },
  "models.embedContent": (client) =>
    client.models.embedContent({ model: "gemini-embedding-001", contents: ["a", "b"] }),
  "models.countTokens": (client) => client.models.countTokens({ model, contents }),
  "models.list, page by page": async (client) => drained(() => client.models.list({ config: { pageSize: 2 } })),
  "models.get": (client) => client.models.get({ model }),
  "files": async (client) => {
    const names: Array<string | undefined> = []
    for (const text of ["one", "two", "three"]) {
      const file = await client.files.upload({
        file: new Blob([text], { type: "text/plain" }),
        config: { mimeType: "text/plain", displayName: text }
      })
      names.push(file.name)
    }
    const listed: Array<string | undefined> = []
    for await (const file of await client.files.list({ config: { pageSize: 2 } })) listed.push(file.displayName)
    const one = await client.files.get({ name: names[0] ?? "" })
    return { names, listed, one, gone: await client.files.delete({ name: names[0] ?? "" }) }
  },
  "interactions.create": async (client) => (await interact(client)).output_text,
  "interactions.create, get, delete": async (client) => {
    const { id } = await interact(client)
    return { again: await client.interactions.get(id ?? ""), gone: await client.interactions.delete(id ?? "") }
  },
  "interactions.create as a stream": async (client) =>
    drained(() => client.interactions.create({ model, input: contents, stream: true })),
  "a bad request": (client) => client.models.generateContent({ model, contents, config: { tools: [badTool] } }),
  "an unknown file": (client) => client.files.get({ name: "files/nope" }),
  "an unknown model": (client) => client.models.get({ model: "gemini-nope" }),
  "an unknown interaction": (client) => client.interactions.get("nope"),
  "an abort before the answer": async (client) => {
    const controller = new AbortController()
    const answer = client.models.generateContent({ model, contents, config: { abortSignal: controller.signal } })
    controller.abort()
    return answer
  },
  "an abort within a stream": async (client) => {
    const controller = new AbortController()
    const stream = await client.models.generateContentStream({
      model,
      contents,
      config: { abortSignal: controller.signal }
    })
    const { error } = await drained(async function*() {
      for await (const chunk of stream) {
        controller.abort()
        yield chunk.text
      }
    })
    return told(error)
  },
  "a stream that is left": async (client) => {
    for await (const chunk of await askStream(client)) return chunk.text
  }
}

const refusals: Readonly<Record<string, FakeProvider.Behaviour>> = {
  "400": { refuse: "region" },
  "401": { outage: { status: 401 } },
  "403": { refuse: "forbidden" },
  "404": { models: ["gemini-2.5-pro"] },
  "429": { refuse: "quota" },
  "500": { outage: { status: 500 } },
  "503": { outage: { status: 503 } },
  "504": { outage: { status: 504 } },
  "a stream that fails after content": { streamError: { after: 2 } },
  "a stream that fails before content": { streamError: { after: 0 } },
  "a reset": { reset: true },
  "a cut": { cutAfter: 2, chunkDelayMs: 20 }
}

describe("drop-in", () => {
  for (const [name, call] of Object.entries(calls)) {
    live(name, () =>
      Effect.gen(function*() {
        const options = { keys: { [a]: { chunkDelayMs: 2 } } }
        const plain = yield* FakeGemini.make(options)
        const { fake, gemini } = yield* both("a", options, once)
        const expected = yield* Effect.promise(() => settle(() => call(bare(plain))))
        const actual = yield* Effect.promise(() => settle(() => call(gemini.client)))
        assert.deepStrictEqual(timeless(actual), timeless(expected))
        assert.strictEqual(yield* asked(fake), yield* asked(plain))
        yield* idle(gemini)
      }))
  }

  for (const [name, behaviour] of Object.entries(refusals)) {
    live(`refused: ${name}`, () =>
      Effect.gen(function*() {
        const options = { keys: { [a]: behaviour } }
        for (
          const call of [
            ask,
            (client: GoogleGenAI) => drained(() => askStream(client)).then(({ error, items }) => [items, told(error)]),
            (client: GoogleGenAI) => client.files.list()
          ]
        ) {
          // Of a key that rests, the pool would speak itself: a pool for each call, and one attempt only.
          const plain = yield* FakeGemini.make(options)
          const { gemini } = yield* both("a", options, { ...once, rotations: 0 })
          const expected = yield* Effect.promise(() => settle(() => call(bare(plain))))
          const actual = yield* Effect.promise(() => settle(() => call(gemini.client)))
          assert.deepStrictEqual(timeless(actual), timeless(expected))
          yield* idle(gemini)
        }
      }))
  }

  live("the client is the SDK's own, its errors are those of the SDK", () =>
    Effect.gen(function*() {
      const { gemini } = yield* both("a", { keys: { [a]: { refuse: "region" } } }, once)
      assert.instanceOf(gemini.client, GoogleGenAI)
      const error = yield* failure(() => ask(gemini.client))
      assert.instanceOf(error, ApiError)
    }))
})

describe("requests", () => {
  live("H2: one credential, the key's own, in the header and not in the URL", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("a")
      yield* Effect.promise(() =>
        gemini.client.models.generateContent({
          model,
          contents,
          config: { httpOptions: { headers: { "x-goog-api-key": "AIza-of-the-call", Authorization: "Bearer other" } } }
        })
      )
      yield* Effect.promise(() => interact(gemini.client))
      for (const { headers } of yield* fake.requests) {
        assert.strictEqual(headers["x-goog-api-key"], a)
        assert.notProperty(headers, "authorization")
      }
    }))

  live("H2: a key in the URL is taken out, whatever else stands there", () =>
    Effect.gen(function*() {
      const fake = yield* FakeGemini.make()
      const gemini = yield* service(fake, "a", {
        client: (fetch) =>
          new GoogleGenAI({
            apiKey: "unused",
            httpOptions: {
              baseUrl: fake.baseUrl,
              fetch: (input, init) => fetch(`${String(input)}${String(input).includes("?") ? "&" : "?"}key=other`, init)
            }
          })
      })
      yield* Effect.promise(() => ask(gemini.client))
      yield* Effect.promise(() => drained(() => askStream(gemini.client)))
      assert.deepStrictEqual((yield* fake.requests).map(({ query }) => query), ["", "alt=sse"])
      assert.strictEqual(yield* asked(fake), "aa")
    }))

  live(
    "the address is what the SDK resolved: its own, that of the environment, that of the settings",
    () =>
      Effect.gen(function*() {
        const seen: Array<string> = []
        const fetch = (input: string | URL | Request): Promise<Response> => {
          seen.push(new URL(input instanceof Request ? input.url : input).origin)
          return Promise.resolve(Response.json({ candidates: [] }))
        }
        const go = (settings: Partial<Gemini.Settings>) =>
          Effect.gen(function*() {
            const gemini = yield* Gemini.make({ keys: [a], fetch, ...settings } as Gemini.Settings)
            yield* Effect.promise(() => ask(gemini.client))
            assert.strictEqual((yield* gemini.pool.snapshot).attempts, 1)
          })
        yield* go({})
        yield* environment("GOOGLE_GEMINI_BASE_URL", "https://gateway.test/gemini", go({}))
        yield* environment("GOOGLE_GENAI_USE_VERTEXAI", "true", go({}))
        yield* go({ baseUrl: "https://settings.test" })
        assert.deepStrictEqual(seen, [
          "https://generativelanguage.googleapis.com",
          "https://gateway.test",
          "https://generativelanguage.googleapis.com",
          "https://settings.test"
        ])
        const insecure = yield* Effect.flip(Gemini.make({ keys: [a], baseUrl: "http://settings.test" }))
        assert.strictEqual(insecure.field, "baseUrl")
      })
  )

  it("facts: the model, from the path or the body; what streams; what creates", () => {
    const all = (method: string, address: string, body?: object) =>
      gemini.facts({
        method,
        url: new URL(`https://generativelanguage.googleapis.com/v1beta/${address}`),
        headers: new Headers(),
        text: body === undefined ? undefined : JSON.stringify(body),
        form: undefined
      })
    const facts = (method: string, address: string, body?: object) => {
      const { tokens: _, ...rest } = all(method, address, body)
      return rest
    }
    const bounded = { generationConfig: { maxOutputTokens: 77 }, contents: "\"maxOutputTokens\":5" }
    assert.deepStrictEqual(all("POST", "models/m:generateContent", bounded).tokens, {
      input: Math.ceil(JSON.stringify(bounded).length / 4),
      maxOutput: 77
    })
    assert.deepStrictEqual(all("POST", "models/m:generateContent", {}).tokens, { input: 1 })
    assert.isUndefined(all("GET", "files").tokens)
    const of = (model: string | undefined, streaming: boolean, creating: boolean) => ({ model, streaming, creating })
    assert.deepStrictEqual(facts("POST", "models/m:generateContent", { model: "x" }), of("m", false, false))
    assert.deepStrictEqual(facts("POST", "tunedModels/t-1:generateContent", {}), of("t-1", false, false))
    assert.deepStrictEqual(facts("POST", "models/m:streamGenerateContent?alt=sse", {}), of("m", true, false))
    assert.deepStrictEqual(facts("POST", "models/m:batchEmbedContents", {}), of("m", false, false))
    assert.deepStrictEqual(facts("POST", "models/m:batchGenerateContent", {}), of("m", false, true))
    assert.deepStrictEqual(facts("POST", "models/m:predictLongRunning", {}), of("m", false, true))
    assert.deepStrictEqual(facts("POST", "interactions", { model: "m" }), of("m", false, true))
    assert.deepStrictEqual(facts("POST", "interactions", { model: "m", store: false }), of("m", false, false))
    assert.deepStrictEqual(facts("POST", "interactions", { agent: "g", stream: true }), of("g", true, true))
    assert.deepStrictEqual(facts("POST", "cachedContents", { model: "models/m" }), of("m", false, true))
    for (const path of ["files", "batches", "tunedModels"]) {
      assert.deepStrictEqual(facts("POST", path, {}), of(undefined, false, true))
    }
    assert.deepStrictEqual(facts("GET", "files?pageSize=2"), of(undefined, false, false))
    assert.deepStrictEqual(facts("GET", "interactions/i?stream=true"), of(undefined, true, false))
  })
})

describe("retries", () => {
  for (const [name, call] of Object.entries({ ask, interact })) {
    for (const [status, behaviour] of Object.entries(refusals).slice(0, 8)) {
      live(`C7: ${name}, ${status}: the policy's one attempt, and none of the SDK`, () =>
        Effect.gen(function*() {
          const { fake, gemini } = yield* both("a", { keys: { [a]: behaviour } }, { ...once, rotations: 0 })
          yield* failure(() => call(gemini.client))
          assert.strictEqual(yield* asked(fake), "a")
        }))
    }

    live(`C7: ${name}: three attempts, if the policy says so`, () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("a", { keys: { [a]: { outage: { status: 503 } } } }, atOnce(2))
        yield* failure(() => call(gemini.client))
        assert.strictEqual(yield* asked(fake), "aaa")
      }))

    live(`C7: ${name}: a lost connection is not tried again by the SDK`, () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("a", { keys: { [a]: { reset: true } } }, once)
        yield* failure(() => call(gemini.client))
        assert.strictEqual(yield* asked(fake), "a")
      }))
  }

  live(
    "C7: also with another API version, as a stream, and with retries in a client of one's own",
    () =>
      Effect.gen(function*() {
        const fake = yield* FakeGemini.make({ keys: { [a]: { outage: { status: 503 } } } })
        const gemini = yield* service(fake, "a", {
          ...once,
          ...patient,
          client: (fetch) =>
            new GoogleGenAI({
              apiKey: "unused",
              httpOptions: { baseUrl: fake.baseUrl, fetch, retryOptions: { attempts: 3, initialDelay: 0.01 } }
            })
        })
        yield* failure(() => ask(gemini.client))
        yield* failure(() => gemini.client.interactions.create({ model, input: contents, api_version: "v1alpha" }))
        yield* failure(() => gemini.client.interactions.create({ model, input: contents, stream: true }))
        yield* failure(() => gemini.client.webhooks.list())
        const requests = yield* fake.requests
        assert.deepStrictEqual(requests.map(({ path }) => path), [
          `/v1beta/models/${model}:generateContent`,
          "/v1alpha/interactions",
          "/v1beta/interactions",
          "/v1beta/webhooks"
        ])
      })
  )

  live("C8: the body of an interaction goes again, whole, and its model is known", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("ab", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
      const events = yield* watched
      for (let i = 0; i < 4; i++) yield* Effect.promise(() => interact(gemini.client))
      const requests = yield* fake.requests
      assert.include(requests.map(({ status }) => status), 429)
      for (const { body } of requests) assert.deepStrictEqual(JSON.parse(body), { model, input: contents })
      for (const event of yield* events) if (event._tag === "request.start") assert.strictEqual(event.model, model)
    }))

  live(
    "C8: an interaction that may have been stored is not made twice; one that is not stored may be",
    () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("a", { keys: { [a]: { outage: { status: 500 } } } }, {
          ...atOnce(2),
          ...patient
        })
        yield* failure(() => interact(gemini.client))
        assert.strictEqual(yield* asked(fake), "a")
        yield* failure(() => interact(gemini.client, { store: false }))
        assert.strictEqual(yield* asked(fake), "aaaa")
      })
  )
})

describe("what the provider says", () => {
  live(
    "rivals 16: RetryInfo of 38 s in the body rests that key for 38 s, and a sibling answers at once",
    () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("ab")
        yield* fake.script(a, [FakeGemini.exceeded({ per: "Minute", waitSeconds: 38, model })])
        const before = performance.now()
        const answer = yield* Effect.promise(() => ask(gemini.client))
        assert.strictEqual(answer.text, said)
        assert.isBelow(performance.now() - before, 38_000)
        assert.strictEqual(yield* asked(fake), "ab")
        yield* assertRests(gemini, 38_000)
      })
  )

  live("RetryInfo counts for its model only", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("a", {}, { budget: 1_000 })
      yield* fake.script(a, [FakeGemini.exceeded({ per: "Minute", waitSeconds: 38, model })])
      yield* failure(() => gemini.client.models.generateContent({ model, contents }))
      const other = yield* Effect.promise(() =>
        gemini.client.models.generateContent({ model: "gemini-2.5-pro", contents })
      )
      assert.strictEqual(other.text, said)
    }))

  live(
    "a quota per day rests until midnight in California, whatever the short wait in the answer",
    () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("ab")
        yield* fake.script(a, [FakeGemini.exceeded({ per: "Day", waitSeconds: 36, model })])
        yield* Effect.promise(() => ask(gemini.client))
        assert.strictEqual(yield* asked(fake), "ab")
        const { at, keys } = yield* gemini.pool.snapshot
        const until = restOf(keys[0])?.until ?? 0
        const hour = new Intl.DateTimeFormat("en-GB", {
          timeZone: "America/Los_Angeles",
          hour: "2-digit",
          minute: "2-digit"
        }).format(until + 1_000)
        assert.isAbove(until - at, 36_000)
        assert.strictEqual(hour, "00:00")
      })
  )

  live(
    "a bad key is a 400: the call goes on with another, and the key is not asked again",
    () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("ab", { keys: { [a]: { refuse: "revoked" } } })
        for (let i = 0; i < 3; i++) yield* Effect.promise(() => ask(gemini.client))
        assert.strictEqual(yield* asked(fake), "abbb")
      })
  )

  live("a bad request is nobody's fault", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("ab")
      yield* failure(() => gemini.client.models.generateContent({ model, contents, config: { tools: [badTool] } }))
      assert.strictEqual(yield* asked(fake), "a")
      const { eligible, inFlight, keys } = yield* gemini.pool.snapshot
      assert.deepStrictEqual({ eligible, inFlight, closed: keys[0]?.closedModels }, {
        eligible: 2,
        inFlight: 0,
        closed: []
      })
    }))

  live("C10: all keys limited is an ApiError of 429 in Google's words, typed for `use`", () =>
    Effect.gen(function*() {
      const { gemini } = yield* both("ab", { keys: { "*": { refuse: "quota" } } }, { budget: 1_000 })
      const plain = yield* failure(() => ask(gemini.client))
      assert.instanceOf(plain, ApiError)
      assert.strictEqual(plain.status, 429)
      const { error } = JSON.parse(plain.message)
      assert.deepInclude(error, { code: 429, status: "RESOURCE_EXHAUSTED" })
      assert.deepInclude(error.details[0], { reason: "KEYMESH_ALL_KEYS_LIMITED", domain: "effect-keymesh" })
      assert.strictEqual(error.details[1]["@type"], "type.googleapis.com/google.rpc.RetryInfo")
      assert.match(error.details[1].retryDelay, /^\d+(\.\d+)?s$/)
      assert.isAbove(parseFloat(error.details[1].retryDelay), 1)
      assert.instanceOf(yield* Effect.flip(gemini.use(ask)), AllKeysExhausted)
      assert.instanceOf(yield* Effect.flip(gemini.use((client) => interact(client))), AllKeysExhausted)
    }))
})

describe("streams", () => {
  live("S2: a stream that fails before its content goes to another key, unseen", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("ab", { keys: { [a]: { streamError: { after: 0, as: "overloaded" } } } })
      const { error, items } = yield* Effect.promise(() => drained(() => askStream(gemini.client)))
      assert.strictEqual(error, undefined)
      assert.strictEqual(items.map(({ text }) => text).join(""), said)
      assert.strictEqual(yield* asked(fake), "ab")
      yield* idle(gemini)
    }))

  live("S3: a clean end is an end, also without a finishReason; a cut is the key's", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("a", {}, once)
      const chunk = "data: {\"candidates\":[{\"content\":{\"parts\":[{\"text\":\"Hi\"}]}}]}\r\n\r\n"
      yield* fake.script(a, [{ status: 200, body: { frames: [{ text: chunk }] } }])
      yield* Effect.promise(() => drained(() => askStream(gemini.client)))
      yield* Effect.promise(() => drained(() => askStream(gemini.client)))
      yield* Effect.promise(() =>
        drained(() => gemini.client.interactions.create({ model, input: "hi", stream: true }))
      )
      yield* idle(gemini)
      assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { successes: 3, faults: 0 })
      yield* fake.set(a, { cutAfter: 2, chunkDelayMs: 20 })
      yield* Effect.promise(() => drained(() => askStream(gemini.client)))
      yield* idle(gemini)
      assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { faults: 1 })
    }))

  live("S3: a stream of an interaction that ends without its last event was cut", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("a", {}, once)
      const event = (type: string, more: object) =>
        `event: ${type}\ndata: ${JSON.stringify({ event_type: type, ...more })}\n\n`
      const frames = [{ text: event("step.delta", { index: 0, delta: { type: "text", text: "Hi" } }) }]
      yield* fake.script(a, [{ status: 200, body: { frames } }])
      yield* Effect.promise(() =>
        drained(() => gemini.client.interactions.create({ model, input: "hi", stream: true }))
      )
      yield* idle(gemini)
      assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { faults: 1 })
    }))

  for (
    const [name, open] of Object.entries({
      generateContentStream: async (client: GoogleGenAI): Promise<AsyncIterable<unknown>> => askStream(client),
      "interactions.create": async (client: GoogleGenAI): Promise<AsyncIterable<unknown>> =>
        client.interactions.create({ model, input: contents, stream: true })
    })
  ) {
    live(`C6: whoever leaves ${name} ends its request, and frees the key`, () =>
      Effect.gen(function*() {
        const { fake, gemini } = yield* both("a", { keys: { [a]: { stallAfter: 2 } } })
        yield* Effect.promise(async () => {
          for await (const _ of await open(gemini.client)) break
        })
        yield* fake.idle
        assert.isTrue((yield* fake.requests)[0]?.aborted)
        yield* idle(gemini)
        assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { faults: 0, successes: 1 })
        // The same through `stream`.
        const taken = yield* Stream.runCollect(Stream.take(gemini.stream(open), 1))
        assert.strictEqual(Chunk.size(taken), 1)
        yield* fake.idle
        yield* idle(gemini)
      }))
  }
})

describe("aborts", () => {
  live("C5: config.abortSignal ends the request upstream, and is nobody's fault", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("ab", { keys: { "*": { hang: true } } })
      const controller = new AbortController()
      const call = yield* Effect.fork(failure(() =>
        gemini.client.models.generateContent({ model, contents, config: { abortSignal: controller.signal } })
      ))
      yield* fake.waitForRequests(1)
      controller.abort()
      assert.strictEqual(Object(yield* call).name, "AbortError")
      yield* fake.idle
      assert.strictEqual(yield* asked(fake), "a")
      assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { faults: 0, ignored: 1, inFlight: 0 })
    }))

  live("C3: the SDK's timeout is for each attempt", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("ab", { keys: { [a]: { hang: true } } })
      yield* gemini.use((client) =>
        client.models.generateContent({ model, contents, config: { httpOptions: { timeout: 1_000 } } })
      )
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("C5: the signal of an interaction, and an interrupted `use`, too", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("a", { keys: { "*": { hang: true } } })
      const controller = new AbortController()
      const call = yield* Effect.fork(
        failure(() => gemini.client.interactions.create({ model, input: contents }, { signal: controller.signal }))
      )
      yield* fake.waitForRequests(1)
      controller.abort()
      yield* call
      yield* fake.idle
      yield* Effect.raceFirst(gemini.use(ask), fake.waitForRequests(2))
      yield* Effect.raceFirst(gemini.use((client) => interact(client)), fake.waitForRequests(3))
      yield* fake.idle
      assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { faults: 0, ignored: 3, inFlight: 0 })
    }))
})

describe("use and stream", () => {
  live("give what the SDK gives", () =>
    Effect.gen(function*() {
      const { gemini } = yield* both("ab")
      assert.strictEqual((yield* gemini.use(ask)).text, said)
      const chunks = yield* Stream.runCollect(gemini.stream(askStream))
      assert.strictEqual(Chunk.toReadonlyArray(chunks).map(({ text }) => text).join(""), said)
      const models = yield* Stream.runCollect(
        gemini.stream((client) => client.models.list({ config: { pageSize: 1 } }))
      )
      assert.strictEqual(Chunk.size(models), 3)
    }))

  live("fail with the provider's own error and what the pool knows of it", () =>
    Effect.gen(function*() {
      const { gemini } = yield* both("a", { keys: { [a]: { outage: { status: 503 } } } }, { ...atOnce(1), ...patient })
      for (const call of [ask, interact]) {
        const error = yield* Effect.flip(gemini.use<unknown>((client) => call(client)))
        assert.instanceOf(error, ProviderError)
        assert.deepInclude(error, { provider: "gemini", status: 503 })
        assert.strictEqual(error.fault.kind, "Overloaded")
        assert.strictEqual(error.trail.entries.length, 2)
      }
    }))

  live("tell the errors of calls apart that run at once", () =>
    Effect.gen(function*() {
      const { fake, gemini } = yield* both("a", {}, once)
      const refused = (name: string) => ({
        status: 400,
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ error: { code: 400, message: name, status: "INVALID_ARGUMENT" } })
      })
      yield* fake.script(a, [refused("one"), refused("two")])
      const error = yield* Effect.flip(gemini.use(async (client) => {
        const [first] = await Promise.allSettled([ask(client), ask(client)])
        if (first.status === "rejected") throw first.reason
      }))
      assert.instanceOf(error, ProviderError)
      assert.strictEqual(JSON.stringify(error.body), Object(error.cause).message)
    }))

  live("S3: a stream that fails after content fails typed, with its trail", () =>
    Effect.gen(function*() {
      const { gemini } = yield* both("a", { keys: { [a]: { streamError: { after: 2, as: "overloaded" } } } }, once)
      const error = yield* Effect.flip(Stream.runDrain(gemini.stream(askStream)))
      assert.instanceOf(error, ProviderError)
      assert.strictEqual(error.fault.kind, "Overloaded")
      assert.strictEqual(error.trail.entries.length, 1)
      yield* idle(gemini)
      assert.deepInclude((yield* gemini.pool.snapshot).keys[0], { faults: 1 })
    }))
})

describe("layers", () => {
  live("layer, layerAs and layerConfig", () =>
    Effect.gen(function*() {
      const fake = yield* FakeGemini.make()
      class Second extends Context.Tag("Second")<Second, Gemini.Service>() {}
      const first = yield* Effect.provide(
        Effect.flatMap(Gemini.Gemini, ({ use }) => use(ask)),
        Gemini.layer({ keys: [a], baseUrl: fake.baseUrl })
      )
      const second = yield* Effect.provide(
        Effect.flatMap(Second, ({ use }) => use(ask)),
        Gemini.layerAs(Second, { keys: [b], baseUrl: fake.baseUrl })
      )
      assert.deepStrictEqual([first.text, second.text], [said, said])
      const configured = yield* Effect.provide(
        Effect.flatMap(Gemini.Gemini, ({ pool }) => pool.snapshot),
        Layer.provide(
          Gemini.layerConfig({ keys: ApiKey.config("GEMINI_API_KEYS") }),
          Layer.setConfigProvider(ConfigProvider.fromMap(new Map([["GEMINI_API_KEYS", `${a},${b}`]])))
        )
      )
      assert.strictEqual(configured.keys.length, 2)
      assert.strictEqual(yield* asked(fake), "ab")
    }))
})

/** Of a key's gates, the one that counts: its own, or that of its group or model. */
const restOf = (key: object | undefined): { readonly until?: number } | undefined => {
  const found: Array<{ readonly until: number }> = []
  const look = (value: unknown): void => {
    if (typeof value !== "object" || value === null) return
    const until: unknown = Reflect.get(value, "until")
    if (typeof until === "number") found.push({ until })
    for (const inner of Object.values(value)) look(inner)
  }
  look(key)
  return found[0]
}

const assertRests = ({ pool }: Gemini.Service, millis: number) =>
  Effect.map(pool.snapshot, ({ at, keys }) => {
    const left = (restOf(keys[0])?.until ?? 0) - at
    assert.isAbove(left, millis / 2)
    assert.isAtMost(left, millis + 1_000)
  })

const environment = <A, E, R>(name: string, value: string, effect: Effect.Effect<A, E, R>): Effect.Effect<A, E, R> =>
  Effect.acquireUseRelease(
    Effect.sync(() => {
      const before = process.env[name]
      process.env[name] = value
      return before
    }),
    () => effect,
    (before) =>
      Effect.sync(() => {
        if (before === undefined) delete process.env[name]
        else process.env[name] = before
      })
  )
