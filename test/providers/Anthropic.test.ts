import Anthropic, { toFile } from "@anthropic-ai/sdk"
import { assert, describe, it } from "@effect/vitest"
import OldestAnthropic from "anthropic-oldest"
import * as Config from "effect/Config"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as FakeAnthropic from "../../examples/support/FakeAnthropic.js"
import * as ApiKey from "../../src/ApiKey.js"
import * as AnthropicPool from "../../src/providers/Anthropic.js"
import { anthropic as provider } from "../../src/providers/Providers.js"
import { a, asked, atOnce, b, drained, failure, live, once, secretOf, spied, until } from "../support/openai.js"

const model = "claude-sonnet-5"
const messages = [{ role: "user" as const, content: "good morning to you" }]
const said = "You said: good morning to you"
const question = { model, max_tokens: 100, messages }

/** The two ends of the range of SDKs. The calls made in tests are the same in both, although their classes are not. */
const sdks: ReadonlyArray<readonly [version: string, Sdk: typeof Anthropic]> = [
  ["1.12", Anthropic],
  ["0.40", OldestAnthropic as unknown as typeof Anthropic]
]

/** The service over the keys a, b, c … as many as are named, labelled by their letter. */
const service = (
  fake: FakeAnthropic.FakeAnthropic,
  labels: string,
  settings: Partial<AnthropicPool.Settings> = {},
  Sdk: typeof Anthropic = Anthropic
) =>
  AnthropicPool.make({
    keys: [...labels].map((label) => ({ secret: secretOf(label), label })),
    client: (fetch) => new Sdk({ apiKey: "unused", authToken: null, baseURL: fake.baseUrl, fetch }),
    floor: false,
    cooldowns: { jitter: 0 },
    ...settings
  })

const both = (
  labels: string,
  options: FakeAnthropic.Options = {},
  settings: Partial<AnthropicPool.Settings> = {},
  Sdk: typeof Anthropic = Anthropic
) =>
  Effect.gen(function*() {
    const fake = yield* FakeAnthropic.make(options)
    return { fake, anthropic: yield* service(fake, labels, settings, Sdk) }
  })

const bare = (fake: FakeAnthropic.FakeAnthropic, Sdk: typeof Anthropic = Anthropic) =>
  new Sdk({ apiKey: a, authToken: null, baseURL: fake.baseUrl, maxRetries: 0 })

const ask = (client: Anthropic, options?: Anthropic.RequestOptions) => client.messages.create(question, options)

const askStream = (client: Anthropic, options?: Anthropic.RequestOptions) =>
  client.messages.create({ ...question, stream: true }, options)

const textIn = (events: Iterable<Anthropic.RawMessageStreamEvent>): string =>
  Array.from(
    events,
    (event) => event.type === "content_block_delta" && event.delta.type === "text_delta" ? event.delta.text : ""
  ).join("")

const inFlight = ({ pool }: AnthropicPool.Service) => Effect.map(pool.snapshot, (snapshot) => snapshot.inFlight)

const free = (anthropic: AnthropicPool.Service) => until(Effect.map(inFlight(anthropic), (count) => count === 0))

const tagged = <E extends { readonly _tag: string }, Tag extends E["_tag"]>(error: E, tag: Tag) => {
  assert.strictEqual(error._tag, tag, String(error))
  return error as Extract<E, { readonly _tag: Tag }>
}

/** What can be compared of an error: who it is, and what it says. */
const told = (error: unknown): Record<string, unknown> => {
  if (!(error instanceof Error)) return { thrown: error }
  const classes: Array<string> = []
  for (let at: unknown = Object.getPrototypeOf(error); at instanceof Object; at = Object.getPrototypeOf(at)) {
    classes.push(at.constructor.name)
  }
  const named = ["status", "type", "errorCode", "details", "apiMessage", "requestID", "request_id", "error"]
  return {
    classes,
    name: error.name,
    message: error.message,
    ...Object.fromEntries(named.map((name): [string, unknown] => [name, Reflect.get(error, name)])),
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

/** Two servers have two ports, and may be asked in two different seconds. */
const timeless = (value: unknown): unknown =>
  JSON.parse(
    (JSON.stringify(value) ?? "null")
      .replace(/((?:created|ended|expires)_at\\*":\\*")[^"\\]+/g, "$1then")
      .replace(/127\.0\.0\.1:\d+/g, "here")
  )

const wire = (response: Response) => ({
  status: response.status,
  statusText: response.statusText,
  path: new URL(response.url).pathname,
  type: response.headers.get("content-type"),
  id: response.headers.get("request-id"),
  organization: response.headers.get("anthropic-organization-id")
})

const requests = ["one", "two"].map((custom_id) => ({ custom_id, params: question }))

const tool = {
  name: "weather",
  input_schema: { type: "object" as const, properties: { city: { type: "string" } } }
}

const file = () => toFile(new TextEncoder().encode("one line\n"), "lines.txt", { type: "text/plain" })

const outcomeOf = ({ error, items }: { readonly error: unknown; readonly items: ReadonlyArray<unknown> }) => ({
  items,
  error: error === undefined ? undefined : told(error)
})

/** Calls of every kind, and all that can be seen of them. */
const calls: Readonly<Record<string, (client: Anthropic) => Promise<unknown>>> = {
  "messages.create": async (client) => {
    const message = await ask(client)
    return { message, id: message._request_id }
  },
  "messages.create with stream: true": async (client) => drained(() => askStream(client)),
  "tools": async (client) => client.messages.create({ ...question, tools: [tool] }),
  "tools in a stream": async (client) =>
    drained(() => client.messages.create({ ...question, tools: [tool], stream: true })),
  "messages.stream, its events and its final message": async (client) => {
    const seen: Array<unknown> = []
    const stream = client.messages.stream(question)
    stream.on("connect", () => seen.push("connect"))
    stream.on("text", (delta, snapshot) => seen.push(["text", delta, snapshot]))
    stream.on("finalMessage", ({ content }) => seen.push(["message", content]))
    stream.on("end", () => seen.push("end"))
    const events = await drained(() => stream)
    return { seen, events, final: await stream.finalMessage(), text: await stream.finalText() }
  },
  "messages.stream with tools": async (client) =>
    (await client.messages.stream({ ...question, tools: [tool] }).finalMessage()).content,
  "messages.countTokens": async (client) => client.messages.countTokens({ model, messages }),
  "messages.batches: create, retrieve, results, pages, delete": async (client) => {
    const { batches } = client.messages
    const created = [
      await batches.create({ requests }),
      await batches.create({ requests }),
      await batches.create({ requests })
    ]
    const id = created[0]?.id ?? ""
    const ids: Array<string> = []
    for await (const batch of batches.list({ limit: 2 })) ids.push(batch.id)
    return {
      created,
      ids,
      done: await batches.retrieve(id),
      results: await drained(async () => batches.results(id)),
      gone: await batches.delete(id)
    }
  },
  "models": async (client) => ({
    all: await drained(() => client.models.list({ limit: 2 })),
    one: await client.models.retrieve(model)
  }),
  ".withResponse()": async (client) => {
    const { data, response } = await ask(client).withResponse()
    return { data, wire: wire(response) }
  },
  ".withResponse() of a stream": async (client) => {
    const { data, response } = await askStream(client).withResponse()
    return { events: await drained(() => data), wire: wire(response) }
  },
  ".asResponse() of a stream, as text": async (client) => {
    const response = await askStream(client).asResponse()
    return { wire: wire(response), body: await response.text() }
  },
  "a stream, teed": async (client) => {
    const [left, right] = (await askStream(client)).tee()
    return [await drained(() => left), await drained(() => right)]
  },
  "a plain get and post": async (client) => ({
    models: await client.get("/v1/models"),
    message: await client.post("/v1/messages", { body: question })
  }),
  "beta.messages.create": async (client) => client.beta.messages.create(question),
  "400": async (client) => client.messages.create({ model, messages } as never),
  "400 for a stream": async (client) => client.messages.create({ model, messages, stream: true } as never),
  "404 for a batch": async (client) => client.messages.batches.retrieve("msgbatch_nope"),
  "404 for a route": async (client) => client.get("/v1/nothing"),
  "abort before the answer": async (client) => {
    const controller = new AbortController()
    const answer = ask(client, { signal: controller.signal })
    controller.abort()
    return answer
  },
  "a stream that is aborted by its controller": async (client) => {
    const stream = await askStream(client)
    const seen: Array<string> = []
    for await (const event of stream) {
      seen.push(textIn([event]))
      if (seen.join("") !== "") stream.controller.abort()
    }
    return seen.length < 10
  },
  "a stream that is left": async (client) => {
    for await (const event of await askStream(client)) return event.type
  },
  "messages.stream that is aborted": async (client) => {
    const stream = client.messages.stream(question)
    stream.on("text", () => stream.abort())
    return stream.finalMessage()
  }
}

/** What only newer SDKs have. */
const newer: typeof calls = {
  "files: upload, metadata, list, download, delete": async (client) => {
    const created = await client.files.upload({ file: await file() })
    await client.files.upload({ file: await file() })
    await client.files.upload({ file: await file() })
    const names: Array<string> = []
    for await (const { id } of client.files.list({ limit: 2 })) names.push(id)
    return {
      created,
      names,
      content: await (await client.files.download(created.id)).text(),
      gone: await client.files.delete(created.id)
    }
  },
  "messages.parse": async (client) => (await client.messages.parse(question)).content,
  "beta.messages.toolRunner": async (client) => {
    const asked: Array<unknown> = []
    const runner = client.beta.messages.toolRunner({
      ...question,
      tools: [{
        type: "custom",
        ...tool,
        run: (input: unknown) => {
          asked.push(input)
          return "sunny"
        },
        parse: (input: unknown) => input
      }]
    })
    return { final: (await runner).content, asked }
  }
}

/** The same calls, where the server itself is in trouble. */
const troubles: Readonly<
  Record<string, readonly [FakeAnthropic.Options["keys"], (client: Anthropic) => Promise<unknown>]>
> = {
  "403 for the region": [{ [a]: { refuse: "region" } }, ask],
  "404 for the model": [{ [a]: { models: ["claude-haiku-5-5"] } }, ask],
  "413": [{ [a]: { outage: { status: 413 } } }, ask],
  "500": [{ [a]: { outage: { status: 500 } } }, ask],
  "502, a page of the gateway": [{ [a]: { outage: { status: 502 } } }, ask],
  "503": [{ [a]: { outage: { status: 503 } } }, ask],
  "504": [{ [a]: { outage: { status: 504 } } }, ask],
  "529": [{ [a]: { outage: { status: 529 } } }, ask],
  "529 for a stream": [{ [a]: { outage: { status: 529 } } }, askStream],
  "529 for messages.stream": [
    { [a]: { outage: { status: 529 } } },
    (client) => client.messages.stream(question).finalMessage()
  ],
  "a reset connection": [{ [a]: { reset: true } }, async (client) => {
    // The message of what stands behind it is of the transport, and they may use another.
    const { cause: _, ...rest } = told(await ask(client).then(() => undefined, (error: unknown) => error))
    return rest
  }],
  "a stream that fails before content": [
    { [a]: { streamError: { after: 0, as: "overloaded" } } },
    (client) =>
      drained(() => askStream(client)).then(({ error }) => {
        // What comes before is held back, so a refusal is an answer that never began.
        const { classes, error: body, message, status, type } = told(error)
        return { classes, body, message, status, type }
      })
  ],
  "a stream that fails after content": [
    { [a]: { streamError: { after: 2, as: "overloaded" } } },
    (client) => drained(() => askStream(client)).then(outcomeOf)
  ],
  "messages.stream that fails after content": [
    { [a]: { streamError: { after: 2, as: "overloaded" } } },
    (client) => client.messages.stream(question).finalMessage()
  ],
  "a stream that is cut after content": [
    { [a]: { cutAfter: 2, chunkDelayMs: 20 } },
    (client) => drained(() => askStream(client)).then(({ items }) => ({ items }))
  ]
}

for (const [version, Sdk] of sdks) {
  describe(`drop-in, @anthropic-ai/sdk ${version}`, () => {
    for (const [name, call] of Object.entries(Sdk === Anthropic ? { ...calls, ...newer } : calls)) {
      live(name, () =>
        Effect.gen(function*() {
          const plain = yield* FakeAnthropic.make({ keys: { [a]: { chunkDelayMs: 2 } } })
          const { anthropic, fake } = yield* both("a", { keys: { [a]: { chunkDelayMs: 2 } } }, once, Sdk)
          const expected = yield* Effect.promise(() => settle(() => call(bare(plain, Sdk))))
          const actual = yield* Effect.promise(() => settle(() => call(anthropic.client)))
          assert.deepStrictEqual(timeless(actual), timeless(expected))
          assert.strictEqual(yield* asked(fake), yield* asked(plain))
          yield* free(anthropic)
        }))
    }

    for (const [name, [keys, call]] of Object.entries(troubles)) {
      live(`in trouble: ${name}`, () =>
        Effect.gen(function*() {
          const plain = yield* FakeAnthropic.make(keys === undefined ? {} : { keys })
          const { anthropic, fake } = yield* both("a", keys === undefined ? {} : { keys }, once, Sdk)
          const expected = yield* Effect.promise(() => settle(() => call(bare(plain, Sdk))))
          const actual = yield* Effect.promise(() => settle(() => call(anthropic.client)))
          assert.deepStrictEqual(timeless(actual), timeless(expected))
          assert.strictEqual((yield* fake.requests).length, 1)
          yield* free(anthropic)
        }))
    }

    const limited = { limit: { requestsPerMinute: 1 } }
    for (const [status, behaviour] of [[401, { refuse: "revoked" }], [429, limited]] as const) {
      live(
        `in trouble: ${status} of all keys has the class and the type that it has without a pool`,
        () =>
          Effect.gen(function*() {
            const plain = yield* FakeAnthropic.make({ keys: { [a]: behaviour } })
            const { anthropic } = yield* both("a", { keys: { [a]: behaviour } }, { maxWait: 0 }, Sdk)
            for (const client of status === 429 ? [bare(plain, Sdk), anthropic.client] : []) {
              yield* Effect.promise(() => ask(client))
            }
            const expected = yield* failure(() => ask(bare(plain, Sdk)))
            const actual = yield* failure(() => ask(anthropic.client))
            assert.strictEqual(Object.getPrototypeOf(actual), Object.getPrototypeOf(expected))
            assert.deepInclude(told(actual), { status, type: told(expected)["type"], name: told(expected)["name"] })
            assert.deepInclude(told(actual)["error"], { type: "error" })
          })
      )
    }
  })
}

describe("the credential", () => {
  const credentialsOf = (headers: Readonly<Record<string, string>>) =>
    Object.entries(headers).filter(([name]) => name === "authorization" || name === "x-api-key")

  for (const [version, Sdk] of sdks) {
    const own = (secret: string) => Sdk === Anthropic ? ["authorization", `Bearer ${secret}`] : ["x-api-key", secret]

    live(`H2: it goes into the one header that the SDK has chosen (${version})`, () =>
      Effect.gen(function*() {
        const { anthropic, fake } = yield* both("ab", {}, {}, Sdk)
        yield* Effect.promise(async () => {
          await ask(anthropic.client)
          await drained(() => askStream(anthropic.client))
          await anthropic.client.messages.countTokens({ model, messages })
          await anthropic.client.messages.batches.create({ requests })
        })
        const sent = (yield* fake.requests).map(({ headers }) => credentialsOf(headers))
        assert.deepStrictEqual(sent, [[own(a)], [own(b)], [own(a)], [own(b)]])
      }))

    live(`H2: a token is a bearer token (${version})`, () =>
      Effect.gen(function*() {
        const fake = yield* FakeAnthropic.make()
        const anthropic = yield* service(fake, "a", {
          client: (fetch) => new Sdk({ authToken: "unused", apiKey: null, baseURL: fake.baseUrl, fetch })
        })
        yield* Effect.promise(() => ask(anthropic.client))
        assert.deepStrictEqual(credentialsOf((yield* fake.requests)[0]?.headers ?? {}), [
          ["authorization", `Bearer ${a}`]
        ])
      }))

    live(`H2: of two there remains one (${version})`, () =>
      Effect.gen(function*() {
        const fake = yield* FakeAnthropic.make()
        const anthropic = yield* service(fake, "a", {
          client: (fetch) =>
            new Sdk({
              apiKey: "sk-of-the-sdk",
              authToken: null,
              baseURL: fake.baseUrl,
              fetch,
              defaultHeaders: { "x-api-key": "sk-of-the-client", authorization: "Bearer sk-of-the-client" }
            })
        })
        yield* Effect.promise(() => ask(anthropic.client))
        yield* Effect.promise(() => ask(anthropic.client, { headers: { "X-Api-Key": "sk-of-the-call" } }))
        for (const { headers } of yield* fake.requests) assert.deepStrictEqual(credentialsOf(headers), [own(a)])
      }))

    live(`H1: another origin gets none (${version})`, () =>
      Effect.gen(function*() {
        const foreign = yield* FakeAnthropic.make()
        const { anthropic } = yield* both("a", {}, {}, Sdk)
        yield* failure(() => anthropic.client.get(`${foreign.origin}/v1/models`))
        const [request] = yield* foreign.requests
        assert.deepStrictEqual(credentialsOf(request?.headers ?? { authorization: "was not asked" }), [])
        assert.strictEqual((yield* anthropic.pool.snapshot).attempts, 0)
      }))
  }

  live("what the environment and profiles offer is not used", () =>
    Effect.gen(function*() {
      const names = ["ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE", "ANTHROPIC_CUSTOM_HEADERS"]
      yield* Effect.acquireRelease(
        Effect.sync(() => {
          const before = names.map((name) => [name, process.env[name]] as const)
          for (const name of names) process.env[name] = "sk-of-the-environment"
          process.env["ANTHROPIC_CUSTOM_HEADERS"] = "x-api-key: sk-of-the-environment"
          return before
        }),
        (before) =>
          Effect.sync(() => {
            for (const [name, value] of before) {
              if (value === undefined) delete process.env[name]
              else process.env[name] = value
            }
          })
      )
      const fake = yield* FakeAnthropic.make()
      const anthropic = yield* AnthropicPool.make({ keys: [a], baseUrl: fake.baseUrl })
      yield* Effect.promise(() => ask(anthropic.client))
      const [request] = yield* fake.requests
      assert.deepStrictEqual(credentialsOf(request?.headers ?? {}), [["authorization", `Bearer ${a}`]])
      assert.notInclude(JSON.stringify(request), "sk-of-the-environment")
      assert.strictEqual(anthropic.client.maxRetries, 0)
    }))

  live("H3: the SDK's data: probe passes, and spends nothing", () =>
    Effect.gen(function*() {
      const urls: Array<string> = []
      const { anthropic, fake } = yield* both("a", {}, { fetch: spied((url) => urls.push(url)) })
      yield* Effect.promise(async () => anthropic.client.files.upload({ file: await file() }))
      assert.strictEqual((yield* anthropic.pool.snapshot).attempts, 1)
      assert.strictEqual((yield* fake.requests).length, 1)
      assert.deepStrictEqual(urls.map((url) => url.replace(/:.*/, "")), ["data", "http"])
    }))
})

for (const [version, Sdk] of sdks) {
  describe(`failing over, @anthropic-ai/sdk ${version}`, () => {
    live("C1: a limited key rests as long as it was told, and the call goes to another", () =>
      Effect.gen(function*() {
        const limited = { limit: { requestsPerMinute: 1 } }
        const { anthropic, fake } = yield* both("ab", { keys: { [a]: limited } }, once, Sdk)
        const ask3 = Effect.promise(async () => {
          for (let i = 0; i < 3; i++) await ask(anthropic.client)
        })
        yield* ask3
        // Its first answer announced that nothing is left.
        assert.strictEqual(yield* asked(fake), "abb")
        const [first] = (yield* anthropic.pool.snapshot).keys
        const closed = first?.closed ?? first?.closedModels[0]
        assert.deepInclude(closed, { gate: "limit" })
        assert.isAbove((closed?.until ?? 0) - Date.now(), 50_000)
        yield* ask3
        assert.strictEqual(yield* asked(fake), "abbbbb")
      }))

    live("a dead key and one without credit are left, at once and for good", () =>
      Effect.gen(function*() {
        const { anthropic, fake } = yield* both(
          "abc",
          { keys: { [a]: { refuse: "revoked" }, [b]: { refuse: "quota" } } },
          once,
          Sdk
        )
        yield* Effect.promise(() => ask(anthropic.client))
        yield* Effect.promise(() => ask(anthropic.client))
        assert.strictEqual(yield* asked(fake), "abcc")
        const closed = (yield* anthropic.pool.snapshot).keys.map((key) => key.closed?.fault)
        assert.deepStrictEqual(closed, ["Unauthorized", "QuotaExhausted", undefined])
      }))

    live("529: another key answers, and the caller sees nothing of it", () =>
      Effect.gen(function*() {
        const { anthropic, fake } = yield* both("ab", { keys: { [a]: { outage: { status: 529 } } } }, atOnce(2), Sdk)
        const message = yield* Effect.promise(() => ask(anthropic.client))
        assert.deepStrictEqual(message.content, [{ type: "text", text: said, citations: null }] as never)
        assert.strictEqual(yield* asked(fake), "ab")
      }))

    for (const as of ["overloaded", "server", "rateLimited", "quota"] as const) {
      live(
        `S2: an error (${as}) inside a 200 before the first content is failed over silently`,
        () =>
          Effect.gen(function*() {
            const plain = yield* FakeAnthropic.make()
            // The ids of the second answer, as the second of a server.
            yield* Effect.promise(() => drained(() => askStream(bare(plain, Sdk))))
            const expected = yield* Effect.promise(() => drained(() => askStream(bare(plain, Sdk))))
            const keys = { [a]: { streamError: { after: 0, as } } }
            const { anthropic, fake } = yield* both("ab", { keys }, atOnce(3), Sdk)
            const actual = yield* Effect.promise(() => drained(() => askStream(anthropic.client)))
            assert.deepStrictEqual(actual, expected)
            assert.strictEqual(actual.error, undefined)
            assert.strictEqual(yield* asked(fake), "ab")
            const helped = yield* both("ab", { keys }, atOnce(3), Sdk)
            const text = yield* Effect.promise(() => helped.anthropic.client.messages.stream(question).finalText())
            assert.strictEqual(text, said)
            assert.strictEqual(yield* asked(helped.fake), "ab")
            yield* free(anthropic)
            yield* fake.idle
          })
      )
    }

    live(
      "S3: the same after content is the SDK's error, and costs the key what any other does",
      () =>
        Effect.gen(function*() {
          const keys = { [a]: { streamError: { after: 2, as: "quota" as const } } }
          const { anthropic, fake } = yield* both("ab", { keys }, atOnce(3), Sdk)
          const { error, items } = yield* Effect.promise(() => drained(() => askStream(anthropic.client)))
          assert.strictEqual(textIn(items), "You said: ")
          assert.instanceOf(error, Sdk.APIError)
          assert.deepInclude((yield* anthropic.pool.snapshot).keys[0]?.closed, { fault: "QuotaExhausted" })
          assert.strictEqual(yield* asked(fake), "a")
          yield* free(anthropic)
        })
    )

    live("C6: nothing is in flight after a stream is left, aborted, or interrupted", () =>
      Effect.gen(function*() {
        const { anthropic, fake } = yield* both("a", { keys: { [a]: { stallAfter: 2 } } }, {}, Sdk)
        yield* Effect.promise(async () => {
          for await (const event of await askStream(anthropic.client)) if (textIn([event]) !== "") break
        })
        yield* free(anthropic)
        const helper = anthropic.client.messages.stream(question)
        helper.on("text", () => helper.abort())
        yield* failure(() => helper.finalMessage())
        yield* free(anthropic)
        yield* Stream.runHead(Stream.filter(
          anthropic.stream((client) => askStream(client)),
          (event) => textIn([event]) !== ""
        ))
        assert.strictEqual(yield* inFlight(anthropic), 0)
        const fiber = yield* Effect.fork(anthropic.use(async (client) => drained(() => askStream(client))))
        yield* fake.waitForRequests(4)
        yield* until(Effect.map(fake.requests, (all) => all[3]?.status === 200))
        yield* Fiber.interrupt(fiber)
        assert.strictEqual(yield* inFlight(anthropic), 0)
        yield* fake.idle
        assert.isTrue((yield* fake.requests).every(({ aborted }) => aborted))
        assert.deepInclude((yield* anthropic.pool.snapshot).keys[0], { faults: 0 })
      }))
  })
}

describe("streams", () => {
  live(
    "S2: what comes before the content is held back until there is some, then handed on as it was",
    () =>
      Effect.gen(function*() {
        const { anthropic, fake } = yield* both("a")
        const frame = (type: string, more: object = {}) =>
          `event: ${type}\ndata: ${JSON.stringify({ type, ...more })}\n\n`
        const overture = frame("message_start", { message: { id: "msg_1", usage: {} } }) + frame("ping") +
          frame("content_block_start", { index: 0, content_block: { type: "text", text: "" } })
        const rest = frame("content_block_delta", { index: 0, delta: { type: "text_delta", text: "Hi" } }) +
          frame("content_block_stop", { index: 0 }) + frame("message_stop")
        let release = () => {}
        const released = new Promise<void>((resolve) => {
          release = resolve
        })
        const body = async function*() {
          yield new TextEncoder().encode(overture)
          await released
          yield new TextEncoder().encode(rest)
        }
        yield* fake.script(a, [{ status: 200, headers: { "content-type": "text/event-stream" }, body: body() }])
        const answer = yield* Effect.fork(Effect.promise(() => askStream(anthropic.client).asResponse()))
        yield* until(Effect.map(fake.requests, ([request]) => request?.status === 200))
        yield* Effect.sleep(50)
        assert.isNull(yield* Effect.map(Fiber.poll(answer), (exit) => exit._tag === "None" ? null : exit))
        release()
        const response = yield* Fiber.join(answer)
        assert.strictEqual(yield* Effect.promise(() => response.text()), overture + rest)
        assert.deepInclude((yield* anthropic.pool.snapshot).keys[0], { successes: 1, faults: 0 })
      })
  )

  live("S3: a stream without message_stop ends, and the pool knows that it was cut", () =>
    Effect.gen(function*() {
      const { anthropic, fake } = yield* both("a", {}, once)
      const delta = { type: "content_block_delta", index: 0, delta: { type: "text_delta", text: "one" } }
      const text = `event: content_block_delta\ndata: ${JSON.stringify(delta)}\n\n`
      yield* fake.script(a, [{ status: 200, headers: { "content-type": "text/event-stream" }, body: text }])
      const { error, items } = yield* Effect.promise(() => drained(() => askStream(anthropic.client)))
      assert.strictEqual(error, undefined)
      assert.strictEqual(textIn(items), "one")
      assert.deepInclude((yield* anthropic.pool.snapshot).keys[0], { successes: 1, faults: 1, inFlight: 0 })
    }))

  live("the text completions of old end as they should, too", () =>
    Effect.gen(function*() {
      const { anthropic } = yield* both("a", {}, {}, OldestAnthropic as unknown as typeof Anthropic)
      const response = yield* Effect.promise(() =>
        anthropic.client.post("/v1/complete", { body: { model, prompt: "hi", stream: true }, stream: true })
          .asResponse()
      )
      assert.include(yield* Effect.promise(() => response.text()), "\"stop_reason\":\"stop_sequence\"")
      assert.deepInclude((yield* anthropic.pool.snapshot).keys[0], { successes: 1, faults: 0, inFlight: 0 })
    }))
})

describe("use and stream: typed errors", () => {
  live("values are values", () =>
    Effect.gen(function*() {
      const { anthropic } = yield* both("a")
      assert.strictEqual((yield* anthropic.use((client) => ask(client))).stop_reason, "end_turn")
      const events = yield* Stream.runCollect(anthropic.stream((client) => askStream(client)))
      assert.strictEqual(textIn(events), said)
      const helped = yield* Stream.runCollect(anthropic.stream((client) => client.messages.stream(question)))
      assert.strictEqual(textIn(helped), said)
      const models = yield* Stream.runCollect(anthropic.stream((client) => client.models.list({ limit: 1 })))
      assert.strictEqual(models.length, 3)
    }))

  for (const [version, Sdk] of sdks) {
    live(
      `a rejected request is a ProviderError with all that the provider said (${version})`,
      () =>
        Effect.gen(function*() {
          const { anthropic } = yield* both("ab", {}, {}, Sdk)
          const error = tagged(
            yield* Effect.flip(anthropic.use((client) => client.messages.create({ model, messages } as never))),
            "ProviderError"
          )
          assert.deepInclude(error, { provider: "anthropic", status: 400, requestId: "req_fake0001" })
          assert.deepInclude(error.fault, { kind: "Rejected", status: 400 })
          assert.deepStrictEqual(error.body, {
            type: "error",
            error: { details: null, type: "invalid_request_error", message: "max_tokens: Field required" }
          })
          assert.instanceOf(error.cause, Sdk.BadRequestError)
          assert.include(error.message, "max_tokens: Field required")
        })
    )

    live(`529 everywhere is the last ProviderError, with the trail (${version})`, () =>
      Effect.gen(function*() {
        const { anthropic } = yield* both("ab", { keys: { "*": { outage: { status: 529 } } } }, atOnce(1), Sdk)
        const error = tagged(yield* Effect.flip(anthropic.use((client) => ask(client))), "ProviderError")
        assert.deepInclude(error, { status: 529, requestId: "req_fake0002" })
        assert.strictEqual(error.fault.kind, "Overloaded")
        assert.deepStrictEqual(error.trail.entries.map(({ outcome }) => outcome), ["Overloaded", "Overloaded"])
      }))

    live(`keys that are all refused are AllKeysExhausted (${version})`, () =>
      Effect.gen(function*() {
        const { anthropic } = yield* both("ab", { keys: { "*": { refuse: "revoked" } } }, {}, Sdk)
        const error = tagged(yield* Effect.flip(anthropic.use((client) => ask(client))), "AllKeysExhausted")
        assert.deepStrictEqual(error.reasonCounts, { Unauthorized: 2 })
        const streamed = Stream.runDrain(anthropic.stream((client) => askStream(client)))
        tagged(yield* Effect.flip(streamed), "AllKeysExhausted")
      }))

    live(`what the callback itself throws is SdkError (${version})`, () =>
      Effect.gen(function*() {
        const { anthropic } = yield* both("a", {}, {}, Sdk)
        const mine = new TypeError("a bug of mine")
        const error = yield* Effect.flip(anthropic.use((client) => ask(client).then(() => Promise.reject(mine))))
        assert.strictEqual(tagged(error, "SdkError").cause, mine)
      }))
  }

  live(
    "a stream that fails after content is a ProviderError of its fault, with the trail",
    () =>
      Effect.gen(function*() {
        const keys = { [a]: { streamError: { after: 2, as: "overloaded" as const } } }
        for (const open of [askStream, (client: Anthropic) => client.messages.stream(question)]) {
          const { anthropic } = yield* both("ab", { keys }, atOnce(3))
          const seen: Array<Anthropic.RawMessageStreamEvent> = []
          const error = tagged(
            yield* Effect.flip(Stream.runForEach(
              anthropic.stream<Anthropic.RawMessageStreamEvent>((client) => open(client)),
              (event) => Effect.sync(() => seen.push(event))
            )),
            "ProviderError"
          )
          assert.strictEqual(textIn(seen), "You said: ")
          assert.deepInclude(error, { provider: "anthropic", requestId: "req_fake0001" })
          assert.deepInclude(error.fault, { kind: "Overloaded" })
          assert.strictEqual(error.trail.entries.length, 1)
          assert.strictEqual(Reflect.get(Object(error.cause), "type"), "overloaded_error")
          assert.strictEqual(yield* inFlight(anthropic), 0)
        }
      })
  )

  live("C3: the SDK's timeout is for each attempt", () =>
    Effect.gen(function*() {
      const { anthropic, fake } = yield* both("ab", { keys: { [a]: { hang: true } } })
      const ask = { model, max_tokens: 64, messages: [{ role: "user" as const, content: "hi" }] }
      yield* anthropic.use((client) => client.messages.create(ask, { timeout: 1_000 }))
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("C5: interruption aborts the request upstream, and frees the lease", () =>
    Effect.gen(function*() {
      const { anthropic, fake } = yield* both("a", { keys: { [a]: { hang: true } } })
      const fiber = yield* Effect.fork(anthropic.use((client) => ask(client)))
      yield* fake.waitForRequests(1)
      yield* Fiber.interrupt(fiber)
      assert.deepInclude((yield* anthropic.pool.snapshot).keys[0], { inFlight: 0, ignored: 1, faults: 0 })
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))
})

describe("what the pool knows of a request", () => {
  const factsOf = (method: string, path: string, body?: unknown) =>
    provider.facts({
      method,
      url: new URL(`https://api.anthropic.com${path}`),
      headers: new Headers(),
      text: body === undefined ? undefined : JSON.stringify(body),
      form: undefined
    })

  it("model and streaming are read from the body", () => {
    assert.deepStrictEqual(factsOf("POST", "/v1/messages?beta=true", { model, max_tokens: 64, stream: true }), {
      model,
      streaming: true,
      creating: false,
      tokens: { input: Math.ceil(JSON.stringify({ model, max_tokens: 64, stream: true }).length / 4), maxOutput: 64 }
    })
    assert.deepStrictEqual(factsOf("POST", "/v1/messages/batches", { requests }), {
      model: undefined,
      streaming: false,
      creating: true,
      tokens: { input: Math.ceil(JSON.stringify({ requests }).length / 4) }
    })
  })

  it("C8: what creates something is told from what does not", () => {
    for (const path of ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/count_tokens?beta=true"]) {
      assert.isFalse(factsOf("POST", path, question).creating, path)
    }
    const creating = [
      "/v1/messages/batches",
      "/v1/messages/batches/x/cancel",
      "/v1/files",
      "/v1/skills",
      "/v1/sessions"
    ]
    for (const path of creating) {
      assert.isTrue(factsOf("POST", path).creating, path)
      assert.isFalse(factsOf("GET", path).creating, path)
    }
    assert.isTrue(factsOf("DELETE", "/v1/files/x").creating)
  })

  live(
    "C8: a batch that may have been created is not created again; a message is asked for again",
    () =>
      Effect.gen(function*() {
        const { anthropic, fake } = yield* both("ab", { keys: { "*": { outage: { status: 500 } } } }, atOnce(3))
        yield* failure(() => anthropic.client.messages.batches.create({ requests }))
        assert.strictEqual((yield* fake.requests).length, 1)
        yield* failure(() => ask(anthropic.client))
        assert.strictEqual((yield* fake.requests).length, 5)
      })
  )

  it("C10: what the pool says is worded as the provider words its own", () => {
    const typeOf = (status: number) => provider.renderError({ status, code: "keymesh_x", message: "m", id: "i" })
    const types = [[401, "authentication_error"], [429, "rate_limit_error"], [503, "overloaded_error"]] as const
    for (const [status, type] of [...types, [500, "api_error"]] as const) {
      assert.deepStrictEqual(typeOf(status), {
        type: "error",
        error: { type, message: "m", details: { error_code: "keymesh_x", keymesh_id: "i" } }
      })
    }
  })

  live("C10: the pool's own error reaches the SDK with its code, and a wait", () =>
    Effect.gen(function*() {
      const { anthropic } = yield* both("a", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } }, { maxWait: 0 })
      yield* Effect.promise(() => ask(anthropic.client))
      const error = yield* failure(() => ask(anthropic.client))
      assert.instanceOf(error, Anthropic.RateLimitError)
      assert.strictEqual(error.errorCode, "keymesh_all_keys_limited")
      assert.isAbove(Number(error.headers.get("retry-after")), 50)
    }))
})

describe("making it", () => {
  live("as layers: its own tag, from Config, and twice", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make()
      const asking = Effect.flatMap(AnthropicPool.Anthropic, (anthropic) => anthropic.use((client) => ask(client)))
      const configured = AnthropicPool.layerConfig({
        keys: ApiKey.config("ANTHROPIC_API_KEYS"),
        baseUrl: Config.succeed(fake.baseUrl)
      })
      yield* Effect.provide(asking, configured).pipe(
        Effect.withConfigProvider(ConfigProvider.fromMap(new Map([["ANTHROPIC_API_KEYS", a]])))
      )
      const Second = Context.GenericTag<"Second", AnthropicPool.Service>("Second")
      const two = Layer.merge(
        AnthropicPool.layer({ keys: [a], baseUrl: fake.baseUrl }),
        AnthropicPool.layerAs(Second, { keys: ["sk-second-000"], baseUrl: fake.baseUrl, name: "second" })
      )
      const names = yield* Effect.provide(
        Effect.gen(function*() {
          const second = yield* Second
          yield* second.use((client) => ask(client))
          yield* asking
          return [(yield* AnthropicPool.Anthropic).pool.name, second.pool.name]
        }),
        two
      )
      assert.deepStrictEqual(names, ["anthropic", "second"])
      assert.deepStrictEqual((yield* fake.requests).map(({ key }) => key), [a, "sk-second-000", a])
    }))

  live(
    "K3: settings are checked at once, and the retries of a client of one's own are off",
    () =>
      Effect.gen(function*() {
        const refused = (settings: AnthropicPool.Settings) => Effect.flip(AnthropicPool.make(settings))
        assert.strictEqual((yield* refused({ keys: [] })).field, "keys")
        assert.strictEqual((yield* refused({ keys: [a], baseUrl: "http://example.com" })).field, "baseUrl")
        const client = (fetch: NonNullable<ConstructorParameters<typeof Anthropic>[0]>["fetch"]) =>
          new Anthropic({ apiKey: "unused", maxRetries: 5, ...(fetch === undefined ? {} : { fetch }) })
        assert.strictEqual((yield* AnthropicPool.make({ keys: [a], client })).client.maxRetries, 0)
      })
  )
})
