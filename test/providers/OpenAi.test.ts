import { assert, describe, it } from "@effect/vitest"
import * as Config from "effect/Config"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Redacted from "effect/Redacted"
import OpenAI, { toFile } from "openai"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as ApiKey from "../../src/ApiKey.js"
import * as KeyPool from "../../src/KeyPool.js"
import * as OpenAi from "../../src/providers/OpenAi.js"
import {
  a,
  asked,
  atOnce,
  b,
  bare,
  both,
  chat,
  chatStream,
  drained,
  failure,
  inFlight,
  live,
  messages,
  model,
  once,
  said,
  sdks,
  service,
  spied,
  textIn,
  until
} from "../support/openai.js"

const tool = {
  name: "weather",
  description: "The weather of a city",
  parameters: { type: "object", properties: { city: { type: "string" } } }
}

const schema = {
  type: "json_schema" as const,
  json_schema: { name: "point", schema: { type: "object", properties: { x: { type: "integer" } } } }
}

const file = () => toFile(new TextEncoder().encode("one line\n"), "lines.jsonl")

/** What can be compared of an error: who it is, and what it says. */
const told = (error: unknown): object => {
  if (!(error instanceof Error)) return { thrown: error }
  const of = (name: string): unknown => Reflect.get(error, name)
  const classes: Array<string> = []
  for (let at: unknown = Object.getPrototypeOf(error); at instanceof Object; at = Object.getPrototypeOf(at)) {
    classes.push(at.constructor.name)
  }
  const headers: unknown = of("headers")
  return {
    classes,
    name: error.name,
    message: error.message,
    status: of("status"),
    code: of("code"),
    type: of("type"),
    param: of("param"),
    requestID: of("requestID"),
    body: of("error"),
    requestId: headers instanceof Headers ? headers.get("x-request-id") : headers,
    cause: error.cause instanceof Error ? [error.cause.name, error.cause.message] : error.cause
  }
}

const settle = async (f: () => PromiseLike<unknown>): Promise<unknown> => {
  try {
    return { value: await f() }
  } catch (error) {
    return told(error)
  }
}

/** Two servers may be asked in two different seconds. */
const timeless = (value: unknown): unknown =>
  JSON.parse((JSON.stringify(value) ?? "null").replace(/(created(?:_at)?\\*":)\d+/g, (_, name) => `${name}0`))

const wire = (response: Response) => ({
  status: response.status,
  statusText: response.statusText,
  ok: response.ok,
  path: new URL(response.url).pathname,
  redirected: response.redirected,
  type: response.headers.get("content-type"),
  id: response.headers.get("x-request-id"),
  version: response.headers.get("openai-version"),
  length: response.headers.get("content-length")
})

/** Calls of every kind, and all that can be seen of them. */
const calls: Readonly<Record<string, (client: OpenAI) => Promise<unknown>>> = {
  "chat.completions.create": async (client) => {
    const completion = await chat(client)
    return { completion, id: completion._request_id }
  },
  "a chat stream": async (client) => drained(() => chatStream(client)),
  "a chat stream with usage": async (client) =>
    drained(() =>
      client.chat.completions.create({ model, messages, stream: true, stream_options: { include_usage: true } })
    ),
  "tools in a stream": async (client) =>
    drained(() =>
      client.chat.completions.create({
        model,
        messages,
        stream: true,
        tools: [{ type: "function", function: tool }]
      })
    ),
  "responses.create": async (client) => client.responses.create({ model, input: "good morning" }),
  "a stream of responses": async (client) =>
    drained(async () => client.responses.create({ model, input: "good morning", stream: true })),
  "responses.stream": async (client) => {
    const stream = client.responses.stream({ model, input: "good morning" })
    const { error, items } = await drained(() => stream)
    return { types: items.map(({ type }) => type), error, final: (await stream.finalResponse()).output_text }
  },
  "responses.parse": async (client) =>
    (await client.responses.parse({
      model,
      input: "a point",
      text: {
        format: {
          type: "json_schema",
          name: "point",
          schema: { type: "object", properties: { x: { type: "integer" } } }
        }
      }
    })).output_parsed,
  "embeddings.create": async (client) =>
    client.embeddings.create({ model: "text-embedding-3-small", input: ["a", "b"] }),
  "moderations.create": async (client) => client.moderations.create({ input: "good morning" }),
  "completions.create": async (client) => client.completions.create({ model, prompt: "good morning" }),
  "a stream of completions": async (client) =>
    drained(() => client.completions.create({ model, prompt: "good morning", stream: true })),
  ".withResponse()": async (client) => {
    const { data, request_id, response } = await chat(client).withResponse()
    return { data, request_id, wire: wire(response) }
  },
  ".withResponse() of a stream": async (client) => {
    const { data, request_id, response } = await chatStream(client).withResponse()
    return { chunks: await drained(() => data), request_id, wire: wire(response) }
  },
  ".asResponse()": async (client) => {
    const response = await chat(client).asResponse()
    return { wire: wire(response), body: await response.json() }
  },
  ".asResponse() of a stream, as bytes": async (client) => {
    const response = await chatStream(client).asResponse()
    return { wire: wire(response), body: await response.text() }
  },
  "chat.completions.parse": async (client) =>
    (await client.chat.completions.parse({ model, messages, response_format: schema })).choices[0]?.message,
  "chat.completions.stream": async (client) => {
    const seen: Array<unknown> = []
    const stream = client.chat.completions.stream({ model, messages })
    stream.on("connect", () => seen.push("connect"))
    stream.on("content", (delta, snapshot) => seen.push(["content", delta, snapshot]))
    stream.on("content.done", (event) => seen.push(["done", event]))
    stream.on("finalMessage", (message) => seen.push(["message", message.content]))
    stream.on("end", () => seen.push("end"))
    const chunks = await drained(() => stream)
    const final = await stream.finalMessage()
    await stream.done()
    return { seen, chunks, final, usage: await stream.finalChatCompletion() }
  },
  "tee() of a stream": async (client) => {
    const [left, right] = (await chatStream(client)).tee()
    return [await drained(() => left), await drained(() => right)]
  },
  "toReadableStream() of a stream": async (client) =>
    new Response((await chatStream(client)).toReadableStream()).text(),
  "chat.completions.runTools": async (client) => {
    const asked: Array<unknown> = []
    const runner = client.chat.completions.runTools({
      model,
      messages,
      tools: [{
        type: "function",
        function: {
          ...tool,
          parse: JSON.parse,
          function: (args: unknown) => {
            asked.push(args)
            return "sunny"
          }
        }
      }]
    })
    return { final: await runner.finalContent(), asked, roles: runner.messages.map(({ role }) => role) }
  },
  "files.create, retrieve, content, delete": async (client) => {
    const created = await client.files.create({ file: await file(), purpose: "batch" })
    const content = await (await client.files.content(created.id)).text()
    return {
      created,
      again: await client.files.retrieve(created.id),
      content,
      gone: await client.files.delete(created.id)
    }
  },
  "audio.transcriptions.create": async (client) =>
    client.audio.transcriptions.create({ file: await toFile(new Uint8Array(8), "voice.wav"), model: "whisper-1" }),
  "audio.transcriptions.create as text": async (client) =>
    client.audio.transcriptions.create({
      file: await toFile(new Uint8Array(8), "voice.wav"),
      model: "whisper-1",
      response_format: "text"
    }),
  "models.list, not awaited, and models.retrieve": async (client) => {
    const models = await drained(() => client.models.list())
    return { models, one: await client.models.retrieve(model) }
  },
  "pages of files": async (client) => {
    for (const name of ["1", "2", "3"]) {
      await client.files.create({ file: await toFile(new Uint8Array(1), name), purpose: "batch" })
    }
    const names: Array<string> = []
    for await (const { filename } of client.files.list({ limit: 2 })) names.push(filename)
    const first = await client.files.list({ limit: 2 })
    const next = first.hasNextPage() ? await first.getNextPage() : undefined
    return { names, first: first.data.length, next: next?.data.length }
  },
  "a plain get and post": async (client) => ({
    models: await client.get("/models"),
    chat: await client.post("/chat/completions", { body: { model, messages } })
  }),
  "a bad request": (client) => client.chat.completions.create({ model, messages: "none" as never }),
  "a missing parameter": (client) => client.chat.completions.create({ messages } as never),
  "an unknown file": (client) => client.files.retrieve("file-nope"),
  "an unknown route": (client) => client.get("/nothing"),
  "an unknown model": (client) => client.models.retrieve("gpt-nope"),
  "a stream that is refused": (client) =>
    client.chat.completions.create({ model, messages: "none" as never, stream: true }),
  "abort before the answer": async (client) => {
    const controller = new AbortController()
    const answer = chat(client, { signal: controller.signal })
    controller.abort()
    return answer
  },
  "abort by an aborted signal": async (client) => chat(client, { signal: AbortSignal.abort() }),
  "a stream that is aborted by its controller": async (client) => {
    const stream = await chatStream(client)
    const seen: Array<string> = []
    for await (const chunk of stream) {
      seen.push(chunk.choices[0]?.delta.content ?? "")
      if (seen.length === 2) stream.controller.abort()
    }
    return seen.length < 8
  },
  "a stream that is aborted by the caller's signal": async (client) => {
    const controller = new AbortController()
    const seen: Array<string> = []
    for await (const chunk of await chatStream(client, { signal: controller.signal })) {
      seen.push(chunk.choices[0]?.delta.content ?? "")
      if (seen.length === 2) controller.abort()
    }
    return seen.length < 8
  },
  "a stream that is left": async (client) => {
    for await (const chunk of await chatStream(client)) return chunk.choices[0]?.delta.role
  }
}

/** The same calls, where the server itself is in trouble. */
const troubles: Readonly<Record<string, readonly [FakeOpenAi.Options["keys"], (client: OpenAI) => Promise<unknown>]>> =
  {
    "500": [{ [a]: { outage: { status: 500 } } }, chat],
    "503": [{ [a]: { outage: { status: 503 } } }, chat],
    "a page of the gateway": [{ [a]: { outage: { status: 502 } } }, chat],
    "403 for the region": [{ [a]: { refuse: "region" } }, chat],
    "404 for the model": [{ [a]: { models: ["gpt-4o"] } }, chat],
    "500 for a stream": [{ [a]: { outage: { status: 500 } } }, chatStream],
    "a reset connection": [{ [a]: { reset: true } }, chat],
    "a body that is cut": [{ [a]: { cutAfter: 1 } }, chat],
    "a stream that is cut after content": [
      { [a]: { cutAfter: 2, chunkDelayMs: 20 } },
      (client) => drained(() => chatStream(client)).then(({ error, items }) => ({ items, error: told(error) }))
    ],
    "a chat stream that fails after content": [
      { [a]: { streamError: { after: 2 } } },
      (client) => drained(() => chatStream(client)).then(({ error, items }) => ({ items, error: told(error) }))
    ],
    "a responses stream that fails after content": [
      { [a]: { streamError: { after: 2, as: "overloaded" } } },
      (client) =>
        drained(async () => client.responses.create({ model, input: "good morning", stream: true }))
          .then(({ error, items }) => ({ items, error: told(error) }))
    ],
    "the .stream() helper, failing after content": [
      { [a]: { streamError: { after: 2 } } },
      (client) => client.chat.completions.stream({ model, messages }).finalMessage()
    ],
    "a chat stream that fails before content": [
      { [a]: { streamError: { after: 0 } } },
      (client) => drained(() => chatStream(client)).then(({ error, items }) => ({ items, error: told(error) }))
    ]
  }

for (const [version, Sdk] of sdks) {
  describe(`drop-in, openai ${version}`, () => {
    for (const [name, call] of Object.entries(calls)) {
      live(name, () =>
        Effect.gen(function*() {
          const plain = yield* FakeOpenAi.make({ keys: { [a]: { chunkDelayMs: 2 } } })
          const fake = yield* FakeOpenAi.make({ keys: { [a]: { chunkDelayMs: 2 } } })
          const openai = yield* service(fake, "a", once, Sdk)
          const expected = yield* Effect.promise(() => settle(() => call(bare(plain, Sdk))))
          const actual = yield* Effect.promise(() => settle(() => call(openai.client)))
          assert.deepStrictEqual(timeless(actual), timeless(expected))
          assert.strictEqual(yield* asked(fake), yield* asked(plain))
          yield* until(Effect.map(inFlight(openai), (count) => count === 0))
        }))
    }

    for (const [name, [keys, call]] of Object.entries(troubles)) {
      live(`in trouble: ${name}`, () =>
        Effect.gen(function*() {
          const plain = yield* FakeOpenAi.make(keys === undefined ? {} : { keys })
          const fake = yield* FakeOpenAi.make(keys === undefined ? {} : { keys })
          const openai = yield* service(fake, "a", once, Sdk)
          const expected = yield* Effect.promise(() => settle(() => call(bare(plain, Sdk))))
          const actual = yield* Effect.promise(() => settle(() => call(openai.client)))
          assert.deepStrictEqual(timeless(actual), timeless(expected))
          yield* until(Effect.map(inFlight(openai), (count) => count === 0))
        }))
    }

    for (const [status, refuse] of [[401, "revoked"], [429, "quota"]] as const) {
      live(`in trouble: ${status} of all keys has the class that it has without a pool`, () =>
        Effect.gen(function*() {
          const plain = yield* FakeOpenAi.make({ keys: { [a]: { refuse } } })
          const fake = yield* FakeOpenAi.make({ keys: { [a]: { refuse } } })
          const openai = yield* service(fake, "a", { budget: 1_000 }, Sdk)
          const expected = yield* failure(() => chat(bare(plain, Sdk)))
          const actual = yield* failure(() => chat(openai.client))
          assert.instanceOf(actual, Sdk.APIError)
          assert.deepInclude(told(actual), { status, name: Object(told(expected)).name })
          assert.strictEqual(Object.getPrototypeOf(actual), Object.getPrototypeOf(expected))
        }))
    }

    live("an SDK timeout is what it is without a pool, and the pool learns of it", () =>
      Effect.gen(function*() {
        const plain = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
        const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
        const openai = yield* service(fake, "a", once, Sdk)
        // The SDK announces whole seconds, cut off: 300 ms is "0".
        yield* Effect.forEach([300, 1_000, 1_400], (timeout) =>
          Effect.gen(function*() {
            const [expected, actual] = yield* Effect.all([
              failure(() => chat(bare(plain, Sdk, { timeout }))),
              failure(() => chat(openai.client, { timeout }))
            ], { concurrency: "unbounded" })
            assert.instanceOf(actual, Sdk.APIConnectionTimeoutError)
            assert.deepStrictEqual(told(actual), told(expected))
          }), { concurrency: "unbounded" })
        yield* fake.idle
        const { inFlight, keys } = yield* openai.pool.snapshot
        assert.strictEqual(inFlight, 0)
        assert.deepInclude(keys[0], { faults: 3, ignored: 0 })
      }))

    live(
      "C3: an SDK's timeout is for each attempt: the call goes on elsewhere, and the SDK waits",
      () =>
        Effect.gen(function*() {
          const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true }, [b]: { latencyMs: 300 } } })
          const openai = yield* service(fake, "ab", { ...atOnce(3), strategy: "sequential-then-rotate" }, Sdk)
          // Together they take longer than the timeout, the second by itself does not.
          const answer = yield* Effect.promise(() => chat(openai.client, { timeout: 2_000 }))
          assert.strictEqual(answer.object, "chat.completion")
          assert.strictEqual(yield* asked(fake), "ab")
          assert.deepStrictEqual(
            (yield* openai.pool.snapshot).keys.map(({ faults, inFlight, successes }) => ({
              faults,
              inFlight,
              successes
            })),
            [{ faults: 1, inFlight: 0, successes: 0 }, { faults: 0, inFlight: 0, successes: 1 }]
          )
          yield* fake.idle
          assert.deepStrictEqual((yield* fake.requests).map(({ aborted }) => aborted), [true, false])
        })
    )

    live("C3, C7: each attempt that times out counts; the last one is the SDK's timeout", () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make({ keys: { "*": { hang: true } } })
        const openai = yield* service(fake, "ab", atOnce(2), Sdk)
        assert.instanceOf(yield* failure(() => chat(openai.client, { timeout: 300 })), Sdk.APIConnectionTimeoutError)
        assert.strictEqual(yield* asked(fake), "aba")
        yield* fake.idle
        assert.deepStrictEqual((yield* fake.requests).map(({ aborted }) => aborted), [true, true, true])
      }))

    live("C8: what creates something is not asked for again after a timeout", () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make({ keys: { "*": { hang: true } } })
        const openai = yield* service(fake, "ab", {}, Sdk)
        const create = () =>
          openai.client.batches.create(
            { completion_window: "24h", endpoint: "/v1/chat/completions", input_file_id: "file-1" },
            { timeout: 300 }
          )
        assert.instanceOf(yield* failure(create), Sdk.APIConnectionTimeoutError)
        assert.strictEqual(yield* asked(fake), "a")
      }))

    live("an abort of the caller is no timeout, and nobody's fault", () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
        const openai = yield* service(fake, "a", {}, Sdk)
        const controller = new AbortController()
        const answer = failure(() => chat(openai.client, { signal: controller.signal, timeout: 60_000 }))
        yield* Effect.zipRight(fake.waitForRequests(1), Effect.sync(() => controller.abort())).pipe(Effect.fork)
        assert.instanceOf(yield* answer, Sdk.APIUserAbortError)
        yield* fake.idle
        const { keys } = yield* openai.pool.snapshot
        assert.deepInclude(keys[0], { faults: 0, ignored: 1, inFlight: 0 })
        assert.isTrue((yield* fake.requests)[0]?.aborted)
      }))

    live("break out of a stream ends the request upstream, and frees the lease", () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make({ keys: { [a]: { stallAfter: 2 } } })
        const openai = yield* service(fake, "a", {}, Sdk)
        yield* Effect.promise(async () => {
          for await (const chunk of await chatStream(openai.client)) if (textIn([chunk]) !== "") break
        })
        yield* fake.idle
        assert.isTrue((yield* fake.requests)[0]?.aborted)
        yield* until(Effect.map(inFlight(openai), (count) => count === 0))
        assert.deepInclude((yield* openai.pool.snapshot).keys[0], { faults: 0, successes: 1 })
      }))
  })
}

describe("requests", () => {
  live("H2: one credential header, the key's own, and none of the SDK's", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const openai = yield* service(fake, "a", {
        client: (fetch) =>
          new OpenAI({
            apiKey: "sk-of-the-sdk",
            baseURL: fake.baseUrl,
            fetch,
            defaultHeaders: { "api-key": "sk-of-azure" }
          })
      })
      yield* Effect.promise(() => chat(openai.client))
      yield* Effect.promise(() => chat(openai.client, { headers: { Authorization: "Bearer sk-of-the-call" } }))
      for (const { headers } of yield* fake.requests) {
        assert.strictEqual(headers["authorization"], `Bearer ${a}`)
        assert.notProperty(headers, "api-key")
      }
    }))

  live("H2: headers that belong to a key travel with it, and only with it", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const openai = yield* service(fake, "", {
        keys: [{ secret: a, headers: { "OpenAI-Organization": "org-a" } }, "sk-plain-000"]
      })
      yield* Effect.promise(() => chat(openai.client))
      yield* Effect.promise(() => chat(openai.client))
      const sent = (yield* fake.requests).map((
        { headers }
      ) => [headers["authorization"], headers["openai-organization"]])
      assert.sameDeepMembers(sent, [[`Bearer ${a}`, "org-a"], ["Bearer sk-plain-000", undefined]])
    }))

  live("H1: an absolute URL of another origin gets no key, and leases none", () =>
    Effect.gen(function*() {
      const foreign = yield* FakeOpenAi.make()
      const fake = yield* FakeOpenAi.make()
      const openai = yield* service(fake, "a")
      const error = yield* failure(() => openai.client.get(`${foreign.origin}/v1/models`))
      assert.instanceOf(error, OpenAI.AuthenticationError)
      const requests = yield* foreign.requests
      assert.strictEqual(requests.length, 1)
      assert.notProperty(requests[0]?.headers, "authorization")
      assert.notInclude(JSON.stringify(requests), a)
      assert.strictEqual((yield* openai.pool.snapshot).attempts, 0)
    }))

  for (const status of [301, 302, 303, 307, 308] as const) {
    live(
      `H1: a redirect (${status}) to another origin is not followed, one within the origin is`,
      () =>
        Effect.gen(function*() {
          const foreign = yield* FakeOpenAi.make()
          const fake = yield* FakeOpenAi.make({
            keys: { [a]: { redirect: { to: `${foreign.baseUrl}/models`, status } } }
          })
          const openai = yield* service(fake, "a", once)
          const error = yield* failure(() => chat(openai.client))
          assert.instanceOf(error, OpenAI.APIError)
          assert.strictEqual(Reflect.get(Object(error), "status"), status)
          assert.deepStrictEqual(yield* foreign.requests, [])

          yield* fake.set(a, {})
          yield* fake.script(a, [{ status, headers: { location: "/v1/models" } }])
          const moved = openai.client.post("/somewhere", { body: { model } })
          const keeps = status === 307 || status === 308
          if (keeps) assert.instanceOf(yield* failure(() => moved), OpenAI.NotFoundError)
          else assert.propertyVal(yield* Effect.promise(() => moved), "object", "list")
          const last = (yield* fake.requests).at(-1)
          assert.deepInclude(last, { path: "/v1/models", method: keeps ? "POST" : "GET", key: a })
          assert.strictEqual(last?.body, keeps ? JSON.stringify({ model }) : "")
        })
    )
  }

  live("H1: redirects within the origin end after five", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { redirect: { to: "/v1/round" } } } }, once)
      const error = yield* failure(() => openai.client.get("/models"))
      assert.deepInclude(told(error), { status: 307 })
      assert.strictEqual((yield* fake.requests).length, 6)
    }))

  live("H3: the SDK's data: probe passes, and spends nothing", () =>
    Effect.gen(function*() {
      const urls: Array<string> = []
      const { fake, openai } = yield* both("a", {}, { fetch: spied((url) => urls.push(url)) })
      yield* Effect.promise(async () => openai.client.files.create({ file: await file(), purpose: "batch" }))
      assert.strictEqual((yield* openai.pool.snapshot).attempts, 1)
      assert.strictEqual((yield* fake.requests).length, 1)
      assert.deepStrictEqual(urls.map((url) => url.replace(/:.*/, "")), ["data", "http"])
    }))

  live("an answer that echoes the key in a header is clean, and otherwise unchanged", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a")
      const answer = { status: 200, headers: { "x-seen": `key ${a}`, etag: "\"1\"" }, body: JSON.stringify({ ok: a }) }
      yield* fake.script(a, [answer])
      const { data, response } = yield* Effect.promise(() => openai.client.get<{ ok: string }>("/any").withResponse())
      assert.strictEqual(response.headers.get("x-seen"), "key [redacted]")
      assert.strictEqual(response.headers.get("etag"), "\"1\"")
      assert.strictEqual(data.ok, a)
    }))
})

describe("making it", () => {
  live("K3: settings are checked at once, and secrets not shown", () =>
    Effect.gen(function*() {
      const refused = (settings: OpenAi.Settings) => Effect.flip(Effect.asVoid(OpenAi.make(settings)))
      const problems = yield* Effect.all([
        refused({ keys: [] }),
        refused({ keys: ["sk-\u0000secret"] }),
        refused({ keys: [a], baseUrl: "http://example.com/v1" }),
        refused({ keys: [a], baseUrl: "not a url" }),
        refused({ keys: [a], colour: "blue" } as OpenAi.Settings)
      ])
      assert.deepStrictEqual(problems.map(({ _tag }) => _tag), Array(5).fill("ConfigurationError"))
      assert.deepStrictEqual(problems.map(({ field }) => field), [
        "keys",
        "keys[0].secret",
        "baseUrl",
        "baseUrl",
        "colour"
      ])
      assert.notInclude(JSON.stringify(problems.map(String)), "\u0000")
      yield* OpenAi.make({ keys: [a], baseUrl: "http://example.com/v1", allowInsecureBaseUrl: true })
    }))

  live("without a client of one's own, it asks the address that it was given", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      // An organization and a project of the environment belong to some key, not to all.
      const openai = yield* Effect.acquireUseRelease(
        Effect.sync(() => Object.assign(process.env, { OPENAI_ORG_ID: "org-env", OPENAI_PROJECT_ID: "proj-env" })),
        () => OpenAi.make({ keys: [Redacted.make(a)], baseUrl: fake.baseUrl }),
        (env) =>
          Effect.sync(() => {
            Reflect.deleteProperty(env, "OPENAI_ORG_ID")
            Reflect.deleteProperty(env, "OPENAI_PROJECT_ID")
          })
      )
      assert.strictEqual((yield* openai.use((client) => chat(client))).choices[0]?.message.content, said)
      assert.strictEqual(openai.client.maxRetries, 0)
      const [request] = yield* fake.requests
      assert.notProperty(request?.headers, "openai-organization")
      assert.notProperty(request?.headers, "openai-project")
    }))

  live("as layers: its own tag, from Config, and twice", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const ask = Effect.flatMap(OpenAi.OpenAi, (openai) => openai.use((client) => chat(client)))
      const configured = OpenAi.layerConfig({
        keys: ApiKey.config("OPENAI_API_KEYS"),
        baseUrl: Config.succeed(fake.baseUrl)
      })
      yield* Effect.provide(ask, configured).pipe(
        Effect.withConfigProvider(ConfigProvider.fromMap(new Map([["OPENAI_API_KEYS", a]])))
      )
      const Second = Context.GenericTag<"Second", OpenAi.Service>("Second")
      const two = Layer.merge(
        OpenAi.layer({ keys: [a], baseUrl: fake.baseUrl }),
        OpenAi.layerAs(Second, { keys: ["sk-second-000"], baseUrl: fake.baseUrl, name: "second" })
      )
      const names = yield* Effect.provide(
        Effect.gen(function*() {
          const second = yield* Second
          yield* second.use((client) => chat(client))
          yield* ask
          return [(yield* OpenAi.OpenAi).pool.name, second.pool.name]
        }),
        two
      )
      assert.deepStrictEqual(names, ["openai", "second"])
      assert.deepStrictEqual((yield* fake.requests).map(({ key }) => key), [a, "sk-second-000", a])
    }))

  it.scopedLive("after its scope has closed, calls and waiters get an answer that says so", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
      const { client, hanging } = yield* Effect.scoped(Effect.gen(function*() {
        const openai = yield* service(fake, "a", atOnce(3))
        const hanging = chat(openai.client).then(() => "answered", (error: unknown) => error)
        yield* fake.waitForRequests(1)
        return { client: openai.client, hanging }
      }))
      for (const error of [yield* Effect.promise(() => hanging), yield* failure(() => chat(client))]) {
        assert.instanceOf(error, OpenAI.InternalServerError)
        assert.deepInclude(told(error), { status: 503, code: "keymesh_pool_closed" })
      }
      yield* fake.idle
      assert.strictEqual((yield* fake.requests).length, 1)
      assert.isTrue(Exit.isSuccess(yield* Effect.exit(fake.idle)))
    }).pipe(Effect.provide(KeyPool.layerDefaults)))
})
