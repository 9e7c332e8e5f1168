import { assert, describe, it } from "@effect/vitest"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as Scope from "effect/Scope"
import * as Http from "node:http"
import OpenAI from "openai"
import OldestOpenAI from "openai-oldest"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as FakeProvider from "../../examples/support/FakeProvider.js"

const messages = [{ role: "user" as const, content: "good morning to you" }]
const said = "You said: good morning to you"
const model = "gpt-4o-mini"

const clientOf = (fake: FakeOpenAi.FakeOpenAi, apiKey = "sk-test-alpha", options: { timeout?: number } = {}) =>
  new OpenAI({ apiKey, baseURL: fake.baseUrl, maxRetries: 0, organization: null, project: null, ...options })

const chat = (client: OpenAI) => client.chat.completions.create({ model, messages })

const failure = (promise: () => PromiseLike<unknown>): Effect.Effect<unknown> =>
  Effect.flip(Effect.tryPromise({ try: promise, catch: (error) => error })).pipe(
    Effect.catchAll((value) => Effect.dieMessage(`expected a failure, got ${JSON.stringify(value)}`))
  )

const apiFailure = (promise: () => PromiseLike<unknown>) =>
  Effect.map(failure(promise), (error) => {
    if (error instanceof OpenAI.APIError) return error
    throw error
  })

/** Everything an iterable gives until it ends or throws. */
const drain = <A>(open: () => PromiseLike<AsyncIterable<A>>) =>
  Effect.promise(async () => {
    const items: Array<A> = []
    try {
      for await (const item of await open()) items.push(item)
      return { items, error: undefined }
    } catch (error) {
      return { items, error }
    }
  })

const streamed = (client: OpenAI) => drain(() => client.chat.completions.create({ model, messages, stream: true }))

const textIn = (chunks: ReadonlyArray<OpenAI.ChatCompletionChunk>) =>
  chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("")

const send = (fake: FakeOpenAi.FakeOpenAi, path: string, init: RequestInit = {}) =>
  Effect.promise(() =>
    fetch(`${fake.origin}${path}`, { redirect: "manual", ...init, headers: { authorization: "Bearer sk-test-alpha" } })
  )

const bodyOf = (response: Response) => Effect.promise(() => response.text())

describe("routes, as the SDK reads them", () => {
  for (const [version, Client] of [["6.49", OpenAI], ["5.0", OldestOpenAI]] as const) {
    it.scopedLive(`openai ${version}: chat, stream, responses, embeddings, models`, () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make()
        // The calls made here are the same in both versions, although their classes are not.
        const client = new Client({ apiKey: "sk-test-alpha", baseURL: fake.baseUrl, maxRetries: 0 }) as OpenAI
        const completion = yield* Effect.promise(() => client.chat.completions.create({ model, messages }))
        assert.strictEqual(completion.choices[0]?.message.content, said)
        assert.strictEqual(completion.choices[0]?.finish_reason, "stop")
        assert.strictEqual(completion._request_id, "req_fake0001")
        const { error, items } = yield* drain<OpenAI.ChatCompletionChunk>(() =>
          client.chat.completions.create({ model, messages, stream: true })
        )
        assert.strictEqual(error, undefined)
        assert.strictEqual(textIn(items), said)
        const response = yield* Effect.promise(() => client.responses.create({ model, input: "good morning to you" }))
        assert.strictEqual(response.output_text, said)
        const events = yield* drain<{ readonly type: string }>(() =>
          client.responses.create({ model, input: "one two", stream: true })
        )
        assert.strictEqual(events.items.at(-1)?.type, "response.completed")
        const embedded = yield* Effect.promise(() =>
          client.embeddings.create({ model: "text-embedding-3-small", input: ["a", "b"] })
        )
        assert.deepStrictEqual(embedded.data.map(({ embedding }) => embedding.length), [8, 8])
        assert.closeTo(Math.hypot(...(embedded.data[0]?.embedding ?? [])), 1, 1e-6)
        const models = yield* drain(async () => client.models.list())
        assert.isTrue(models.items.some(({ id }) => id === model))
      }))
  }

  it.scopedLive("a chat stream is a role, words, a finish reason, the usage if asked for", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const { items } = yield* drain(() =>
        clientOf(fake).chat.completions.create({
          model,
          messages,
          stream: true,
          stream_options: { include_usage: true }
        })
      )
      const deltas = items.map((chunk) => chunk.choices[0]?.delta)
      assert.strictEqual(deltas[0]?.role, "assistant")
      assert.strictEqual(deltas[0]?.content, "")
      assert.deepStrictEqual(
        deltas.slice(1, 7).map((delta) => delta?.content),
        ["You ", "said: ", "good ", "morning ", "to ", "you"]
      )
      assert.deepStrictEqual(items.map((chunk) => chunk.choices[0]?.finish_reason).slice(6), [null, "stop", undefined])
      assert.deepStrictEqual(items.map((chunk) => chunk.usage?.total_tokens).slice(-2), [undefined, 13])
      const raw = yield* send(fake, "/v1/chat/completions", {
        method: "POST",
        body: JSON.stringify({ model, messages, stream: true })
      })
      assert.strictEqual(raw.headers.get("content-type"), "text/event-stream; charset=utf-8")
      assert.isTrue((yield* bodyOf(raw)).endsWith("\n\ndata: [DONE]\n\n"))
    }))

  const tool = {
    name: "weather",
    parameters: { type: "object", properties: { city: { type: "string" }, days: { type: "integer" } } }
  }

  it.scopedLive("tools are called, whole and streamed, and their results are answered", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const client = clientOf(fake)
      const tools = [{ type: "function" as const, function: tool }]
      const { choices } = yield* Effect.promise(() => client.chat.completions.create({ model, messages, tools }))
      const call = choices[0]?.message.tool_calls?.[0]
      assert.strictEqual(choices[0]?.finish_reason, "tool_calls")
      assert.deepInclude(call, { function: { name: "weather", arguments: "{\"city\":\"text\",\"days\":1}" } })
      const final = yield* Effect.promise(() =>
        client.chat.completions.stream({ model, messages, tools }).finalChatCompletion()
      )
      assert.deepStrictEqual(
        final.choices[0]?.message.tool_calls?.map((call) => call.type === "function" && call.function.arguments),
        ["{\"city\":\"text\",\"days\":1}"]
      )
      const answered = yield* Effect.promise(() =>
        client.chat.completions.create({
          model,
          tools,
          messages: [...messages, { role: "tool", tool_call_id: call?.id ?? "", content: "sunny" }]
        })
      )
      assert.strictEqual(answered.choices[0]?.message.content, said)
      const forbidden = yield* Effect.promise(() =>
        client.chat.completions.create({ model, messages, tools, tool_choice: "none" })
      )
      assert.strictEqual(forbidden.choices[0]?.message.content, said)
      const response = yield* Effect.promise(() =>
        client.responses.stream({ model, input: "hi", tools: [{ type: "function", strict: false, ...tool }] })
          .finalResponse()
      )
      assert.deepInclude(response.output[0], { type: "function_call", name: "weather" })
    }))

  it.scopedLive("`parse` helpers get an object of the schema that they sent", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const schema = {
        type: "object",
        properties: {
          name: { type: "string" },
          tags: { type: "array", items: { enum: ["x"] } },
          ok: { type: "boolean" }
        }
      }
      const expected = { name: "text", tags: ["x"], ok: true }
      const chat = yield* Effect.promise(() =>
        clientOf(fake).chat.completions.parse({
          model,
          messages,
          response_format: { type: "json_schema", json_schema: { name: "thing", schema } }
        })
      )
      assert.deepStrictEqual(JSON.parse(chat.choices[0]?.message.content ?? ""), expected)
      const response = yield* Effect.promise(() =>
        clientOf(fake).responses.parse({
          model,
          input: "hi",
          text: { format: { type: "json_schema", name: "thing", schema } }
        })
      )
      assert.deepStrictEqual(JSON.parse(response.output_text), expected)
    }))

  it.scopedLive("a responses stream has the events of the real one, in order", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ reply: () => "two words" })
      const { items } = yield* drain(() => clientOf(fake).responses.create({ model, input: "hi", stream: true }))
      assert.deepStrictEqual(items.map(({ type }) => type), [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed"
      ])
      assert.deepStrictEqual(items.map(({ sequence_number }) => sequence_number), items.map((_, index) => index))
      const final = yield* Effect.promise(() => clientOf(fake).responses.stream({ model, input: "hi" }).finalResponse())
      assert.strictEqual(final.output_text, "two words")
    }))

  it.scopedLive("legacy completions, moderations, transcriptions", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const client = clientOf(fake)
      const completion = yield* Effect.promise(() => client.completions.create({ model, prompt: "one two" }))
      assert.strictEqual(completion.choices[0]?.text, "You said: one two")
      const { items } = yield* drain(() => client.completions.create({ model, prompt: "one two", stream: true }))
      assert.strictEqual(items.map((chunk) => chunk.choices[0]?.text).join(""), "You said: one two")
      const moderation = yield* Effect.promise(() => client.moderations.create({ input: ["a", "b"] }))
      assert.deepStrictEqual(moderation.results.map(({ flagged }) => flagged), [false, false])
      const file = new File(["RIFF"], "speech.wav")
      const spoken = yield* Effect.promise(() => client.audio.transcriptions.create({ file, model: "whisper-1" }))
      assert.strictEqual(spoken.text, "You said: speech.wav")
      const plain = yield* Effect.promise(() =>
        client.audio.transcriptions.create({ file, model: "whisper-1", response_format: "text" })
      )
      assert.strictEqual(String(plain), "You said: speech.wav\n")
    }))

  it.scopedLive("files are uploaded, paged through, read and deleted", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const { files } = clientOf(fake)
      for (const name of ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl", "e.jsonl"]) {
        yield* Effect.promise(() => files.create({ file: new File([name, "\u0000ÿ"], name), purpose: "batch" }))
      }
      const uploads = yield* fake.requests
      const names = Effect.map(drain(async () => files.list({ limit: 2 })), ({ items }) => items.map((f) => f.filename))
      assert.deepStrictEqual(yield* names, ["e.jsonl", "d.jsonl", "c.jsonl", "b.jsonl", "a.jsonl"])
      const pages = (yield* fake.requests).slice(uploads.length)
      assert.deepStrictEqual(
        pages.map(({ query }) => query),
        ["limit=2", "limit=2&after=file-fake0004", "limit=2&after=file-fake0002"]
      )
      const file = yield* Effect.promise(() => files.retrieve("file-fake0001"))
      assert.deepInclude(file, { filename: "a.jsonl", bytes: 10, purpose: "batch" })
      const content = yield* Effect.promise(() => files.content(file.id).then((response) => response.text()))
      assert.strictEqual(content, "a.jsonl\u0000ÿ")
      assert.isTrue((yield* Effect.promise(() => files.delete(file.id))).deleted)
      assert.strictEqual((yield* apiFailure(() => files.retrieve(file.id))).status, 404)
    }))

  it.scopedLive("what a key stores is seen by its own group only", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ groups: { "sk-one": "acme", "sk-two": "acme" } })
      const [one, two, other] = ["sk-one", "sk-two", "sk-other"].map((key) => clientOf(fake, key))
      assert(one !== undefined && two !== undefined && other !== undefined)
      const file = yield* Effect.promise(() => one.files.create({ file: new File(["x"], "x"), purpose: "batch" }))
      yield* Effect.promise(() => two.files.retrieve(file.id))
      assert.instanceOf(yield* failure(() => other.files.retrieve(file.id)), OpenAI.NotFoundError)
      assert.instanceOf(yield* failure(() => other.files.list({ after: file.id })), OpenAI.NotFoundError)
      const batch = yield* Effect.promise(() =>
        two.batches.create({ input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h" })
      )
      assert.strictEqual(batch.status, "validating")
      assert.strictEqual((yield* Effect.promise(() => one.batches.retrieve(batch.id))).status, "completed")
      assert.instanceOf(yield* failure(() => other.batches.retrieve(batch.id)), OpenAI.NotFoundError)
      const response = yield* Effect.promise(() => one.responses.create({ model, input: "hi" }))
      const followUp = (client: OpenAI) =>
        client.responses.create({ model, input: "and", previous_response_id: response.id })
      assert.strictEqual((yield* Effect.promise(() => followUp(two))).previous_response_id, response.id)
      assert.strictEqual((yield* apiFailure(() => followUp(other))).code, "previous_response_not_found")
      assert.strictEqual((yield* Effect.promise(() => two.responses.retrieve(response.id))).output_text, "You said: hi")
    }))

  it.scopedLive("wrong requests are refused in OpenAI's shape", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-narrow": { models: ["gpt-4o"] } } })
      const unknown = yield* apiFailure(() => clientOf(fake).get("/nowhere"))
      assert.instanceOf(unknown, OpenAI.NotFoundError)
      assert.deepStrictEqual(unknown.error, {
        message: "Invalid URL (GET /v1/nowhere)",
        type: "invalid_request_error",
        param: null,
        code: null
      })
      const noMessages = yield* apiFailure(() => clientOf(fake).post("/chat/completions", { body: { model } }))
      assert.instanceOf(noMessages, OpenAI.BadRequestError)
      assert.strictEqual(noMessages.param, "messages")
      assert.strictEqual((yield* apiFailure(() => chat(clientOf(fake, "sk-narrow")))).code, "model_not_found")
      const noKey = yield* Effect.promise(() => fetch(`${fake.baseUrl}/models`))
      assert.strictEqual(noKey.status, 401)
      const badJson = yield* send(fake, "/v1/embeddings", { method: "POST", body: "{" })
      assert.strictEqual(badJson.status, 400)
    }))
})

describe("keys", () => {
  it.scopedLive("revoked, out of quota, forbidden: the SDK throws its own classes", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({
        keys: { "sk-revoked-abcd": { refuse: "revoked" }, "sk-broke": { refuse: "quota" }, "sk-limbo": {} },
        strict: true
      })
      const revoked = yield* apiFailure(() => chat(clientOf(fake, "sk-revoked-abcd")))
      assert.instanceOf(revoked, OpenAI.AuthenticationError)
      assert.strictEqual(revoked.code, "invalid_api_key")
      assert.include(revoked.message, "Incorrect API key provided: sk-...abcd.")
      assert.notInclude(JSON.stringify(revoked.error), "sk-revoked-abcd")
      assert.strictEqual(revoked.requestID, "req_fake0001")
      const broke = yield* apiFailure(() => chat(clientOf(fake, "sk-broke")))
      assert.instanceOf(broke, OpenAI.RateLimitError)
      assert.deepInclude(broke, { code: "insufficient_quota", type: "insufficient_quota" })
      yield* Effect.promise(() => chat(clientOf(fake, "sk-limbo")))
      yield* fake.set("sk-limbo", { refuse: "forbidden" })
      assert.instanceOf(yield* failure(() => chat(clientOf(fake, "sk-limbo"))), OpenAI.PermissionDeniedError)
      yield* fake.set("sk-limbo", { refuse: "region" })
      const region = yield* apiFailure(() => chat(clientOf(fake, "sk-limbo")))
      assert.strictEqual(region.code, "unsupported_country_region_territory")
      yield* fake.set("sk-limbo", { refuse: "deactivated" })
      assert.strictEqual((yield* apiFailure(() => chat(clientOf(fake, "sk-limbo")))).code, "account_deactivated")
      assert.strictEqual((yield* apiFailure(() => chat(clientOf(fake, "sk-stranger")))).code, "invalid_api_key")
      yield* fake.reset
      yield* Effect.promise(() => chat(clientOf(fake, "sk-limbo")))
      assert.lengthOf(yield* fake.requests, 1)
    }))

  it.scopedLive("a limit admits what it says, then tells how long to wait", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-limited": { limit: { requestsPerMinute: 2 } } } })
      const client = clientOf(fake, "sk-limited")
      const first = yield* Effect.promise(() => chat(client).withResponse())
      assert.strictEqual(first.response.headers.get("x-ratelimit-limit-requests"), "2")
      assert.strictEqual(first.response.headers.get("x-ratelimit-remaining-requests"), "1")
      assert.strictEqual(first.response.headers.get("x-ratelimit-reset-requests"), "1m0s")
      yield* Effect.promise(() => chat(client))
      const refused = yield* apiFailure(() => chat(client))
      assert.instanceOf(refused, OpenAI.RateLimitError)
      assert.deepInclude(refused, { code: "rate_limit_exceeded", type: "requests" })
      const waitMs = Number(refused.headers?.get("retry-after-ms"))
      assert.isTrue(waitMs > 0 && waitMs <= 60_000, `${waitMs}`)
      assert.strictEqual(refused.headers?.get("retry-after"), `${Math.ceil(waitMs / 1000)}`)
      assert.strictEqual(refused.headers?.get("x-ratelimit-remaining-requests"), "0")
      assert.match(refused.message, /Limit 2, Used 2, Requested 1\. Please try again in [\d.]+s\./)
      yield* Effect.promise(() => chat(clientOf(fake, "sk-other")))
    }))

  it.scopedLive("a bucket refills; who waits as told is admitted", () =>
    Effect.gen(function*() {
      const limit = { requestsPerMinute: 60, burst: 1 }
      const fake = yield* FakeOpenAi.make({ keys: { "sk-bucket": { limit } } })
      const client = clientOf(fake, "sk-bucket")
      yield* Effect.promise(() => chat(client))
      const refused = yield* apiFailure(() => chat(client))
      yield* Effect.sleep(Number(refused.headers?.get("retry-after-ms")))
      yield* Effect.promise(() => chat(client))
    }))

  it.scopedLive("a limit can be shared by a group, be counted by model, and keep silent about waiting", () =>
    Effect.gen(function*() {
      const limit = { requestsPerMinute: 1, perModel: true, says: "nothing" } as const
      const fake = yield* FakeOpenAi.make({
        keys: { [FakeProvider.everyKey]: { limit } },
        groups: { "sk-one": "acme", "sk-two": "acme" }
      })
      const accepted = yield* Effect.promise(() => chat(clientOf(fake, "sk-one")).withResponse())
      assert.isNull(accepted.response.headers.get("x-ratelimit-limit-requests"))
      const refused = yield* apiFailure(() => chat(clientOf(fake, "sk-two")))
      assert.strictEqual(refused.status, 429)
      assert.isNull(refused.headers?.get("retry-after"))
      assert.isNull(refused.headers?.get("x-ratelimit-limit-requests"))
      assert.notInclude(refused.message, "try again")
      yield* Effect.promise(() => clientOf(fake, "sk-two").chat.completions.create({ model: "gpt-4o", messages }))
    }))

  it.prop(
    "any limit: never more than it admits in a window, and a told wait is exact",
    [
      FastCheck.record({
        requestsPerMinute: FastCheck.integer({ min: 1, max: 6000 }),
        burst: FastCheck.option(FastCheck.integer({ min: 1, max: 20 }), { nil: undefined })
      }),
      FastCheck.array(FastCheck.double({ min: 0, max: 20_000, noNaN: true }), { minLength: 1, maxLength: 60 })
    ],
    ([{ burst, requestsPerMinute }, gaps]) => {
      const limit = burst === undefined ? { requestsPerMinute } : { requestsPerMinute, burst }
      const start = 500
      let [now, bucket]: [number, Parameters<typeof FakeProvider.take>[1]] = [start, undefined]
      let accepted = 0
      for (const gap of [0, ...gaps]) {
        now += gap
        const [quota, next] = FakeProvider.take(limit, bucket, now)
        bucket = next
        if (quota.accepted) accepted++
        else assert.isTrue(FakeProvider.take(limit, next, now + quota.waitMs)[0].accepted, JSON.stringify(quota))
        const windows = Math.floor((now - start) / 60_000) + 1
        const most = burst === undefined
          ? requestsPerMinute * windows
          : burst + (now - start) * requestsPerMinute / 60_000 + 1e-3
        assert.isAtMost(accepted, most)
      }
    }
  )

  it.scopedLive("an outage is for one key or all, by switch or by time", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* fake.set("sk-a", { outage: { status: 500 } })
      const failed = yield* apiFailure(() => chat(clientOf(fake, "sk-a")))
      assert.instanceOf(failed, OpenAI.InternalServerError)
      assert.strictEqual(failed.type, "server_error")
      yield* Effect.promise(() => chat(clientOf(fake, "sk-b")))
      yield* fake.set(FakeProvider.everyKey, { outage: { status: 503 } })
      const overloaded = yield* apiFailure(() => chat(clientOf(fake, "sk-b")))
      assert.strictEqual(overloaded.code, "server_is_overloaded")
      yield* fake.set(FakeProvider.everyKey, { outage: { status: 502 } })
      const gateway = yield* send(fake, "/v1/models")
      assert.strictEqual(gateway.headers.get("content-type"), "text/html")
      yield* fake.set(FakeProvider.everyKey, { outage: { status: 503, fromMs: 60_000 } })
      yield* Effect.promise(() => chat(clientOf(fake, "sk-b")))
      // Its instants count from now, not from the start of the server.
      yield* Effect.sleep(1_000)
      yield* fake.set(FakeProvider.everyKey, { outage: { status: 503, untilMs: 1_000 } })
      assert.strictEqual((yield* send(fake, "/v1/models")).status, 503)
      yield* Effect.sleep(1_000)
      assert.strictEqual((yield* send(fake, "/v1/models")).status, 200)
    }))

  it.scopedLive("scripted answers and behaviours are used once each", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* fake.script("sk-a", [{ refuse: "quota" }, { status: 418, headers: { "x-own": "1" }, body: "{}" }])
      const client = clientOf(fake, "sk-a")
      assert.strictEqual((yield* apiFailure(() => chat(client))).code, "insufficient_quota")
      yield* Effect.promise(() => chat(clientOf(fake, "sk-b")))
      const teapot = yield* apiFailure(() => chat(client))
      assert.strictEqual(teapot.status, 418)
      assert.strictEqual(teapot.headers?.get("x-own"), "1")
      assert.strictEqual(teapot.requestID, "req_fake0003")
      yield* Effect.promise(() => chat(client))
      assert.deepStrictEqual((yield* fake.requests).map(({ status }) => status), [429, 200, 418, 200])
      yield* fake.script(FakeProvider.everyKey, [{ refuse: "revoked" }])
      assert.instanceOf(yield* failure(() => chat(clientOf(fake, "sk-b"))), OpenAI.AuthenticationError)
      yield* Effect.promise(() => chat(client))
    }))

  it.scopedLive("a handler answers before anything else, with any body", () =>
    Effect.gen(function*() {
      const pieces = async function*() {
        yield new TextEncoder().encode("one,")
        yield new TextEncoder().encode("two")
      }
      const bodies: Readonly<Record<string, FakeProvider.Answer["body"]>> = {
        "/text": "text",
        "/bytes": new Uint8Array([255, 0]),
        "/pieces": pieces()
      }
      const fake = yield* FakeOpenAi.make({
        handler: ({ path }) =>
          bodies[path] === undefined
            ? undefined
            : { status: 200, headers: { "openai-version": undefined }, body: bodies[path] }
      })
      const text = yield* send(fake, "/text")
      assert.isNull(text.headers.get("openai-version"))
      assert.strictEqual(yield* bodyOf(text), "text")
      const bytes = yield* Effect.promise(async () => (await fetch(`${fake.origin}/bytes`)).arrayBuffer())
      assert.deepStrictEqual(Array.from(new Uint8Array(bytes)), [255, 0])
      assert.strictEqual(yield* bodyOf(yield* send(fake, "/pieces")), "one,two")
      assert.strictEqual((yield* send(fake, "/v1/models")).status, 200)
    }))

  it.scopedLive("echo puts the key into every part of an error, and into errors only", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { echo: true, refuse: "revoked" } } })
      const sent = "Bearer sk-test-alpha"
      const response = yield* send(fake, "/v1/models")
      assert.include(response.statusText, sent)
      assert.strictEqual(response.headers.get("x-received-authorization"), sent)
      assert.include(yield* bodyOf(response), sent)
      yield* fake.set("sk-test-alpha", { echo: true })
      assert.include(yield* bodyOf(yield* send(fake, "/v1/nowhere")), sent)
      const fine = yield* send(fake, "/v1/models")
      assert.isNull(fine.headers.get("x-received-authorization"))
      yield* fake.set("sk-test-alpha", { echo: true, streamError: { after: 1 } })
      const { error } = yield* streamed(clientOf(fake))
      assert.include(String(error), sent)
    }))

  it.scopedLive("a redirect names the place it was given", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* fake.set("sk-test-alpha", { redirect: { to: "http://127.0.0.1:9/elsewhere" } })
      const response = yield* send(fake, "/v1/models")
      assert.strictEqual(response.status, 307)
      assert.strictEqual(response.headers.get("location"), "http://127.0.0.1:9/elsewhere")
      yield* fake.set("sk-test-alpha", { redirect: { to: "/v1/files", status: 302 } })
      assert.strictEqual((yield* send(fake, "/v1/models")).status, 302)
    }))
})

describe("connections and streams in trouble", () => {
  it.scopedLive("reset: the SDK sees a connection error", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { reset: true } } })
      const error = yield* failure(() => chat(clientOf(fake)))
      assert.instanceOf(error, OpenAI.APIConnectionError)
      yield* fake.waitUntil(([request]) => request?.endedAt !== undefined)
      const [request] = yield* fake.requests
      assert.deepInclude(request, { key: "sk-test-alpha", status: undefined, aborted: false })
    }))

  it.scopedLive("hang: nothing comes until the client gives up, which is logged", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { hang: true } } })
      const error = yield* failure(() => chat(clientOf(fake, "sk-test-alpha", { timeout: 100 })))
      assert.instanceOf(error, OpenAI.APIConnectionTimeoutError)
      yield* fake.waitUntil(([request]) => request?.aborted === true)
      assert.strictEqual(yield* fake.inFlight, 0)
    }))

  it.scopedLive("cut: so many words arrive, then the connection breaks", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { cutAfter: 2 } } })
      const { error, items } = yield* streamed(clientOf(fake))
      assert.strictEqual(textIn(items), "You said: ")
      assert.instanceOf(error, TypeError)
      assert.instanceOf(yield* failure(() => chat(clientOf(fake))), TypeError)
      yield* fake.set("sk-test-alpha", { cutAfter: 0 })
      const none = yield* streamed(clientOf(fake))
      assert.strictEqual(textIn(none.items), "")
      assert.lengthOf(none.items, 1)
      yield* fake.idle
      assert.isFalse((yield* fake.requests).some(({ aborted }) => aborted))
    }))

  it.scopedLive("streamError: the SDK throws in the midst of a 200", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { streamError: { after: 3 } } } })
      const mid = yield* streamed(clientOf(fake))
      assert.strictEqual(textIn(mid.items), "You said: good ")
      assert.instanceOf(mid.error, OpenAI.APIError)
      assert.deepInclude(mid.error, { status: undefined, type: "server_error" })
      yield* fake.set("sk-test-alpha", { streamError: { after: 0, as: "rateLimited" } })
      const first = yield* streamed(clientOf(fake))
      assert.strictEqual(textIn(first.items), "")
      assert.deepInclude(first.error, { code: "rate_limit_exceeded" })
      const response = yield* drain(() => clientOf(fake).responses.create({ model, input: "hi", stream: true }))
      assert.isFalse(response.items.some(({ type }) => type.endsWith(".delta")))
      assert.deepInclude(response.error, { code: "rate_limit_exceeded" })
    }))

  it.scopedLive("stall: words arrive, then silence, and the connection stays open", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { stallAfter: 1 } } })
      const stream = yield* Effect.promise(() =>
        clientOf(fake).chat.completions.create({ model, messages, stream: true })
      )
      const chunks = stream[Symbol.asyncIterator]()
      yield* Effect.promise(() => chunks.next())
      yield* Effect.promise(() => chunks.next())
      const third = yield* Effect.fork(Effect.promise(() => chunks.next()))
      assert.isTrue((yield* Effect.timeoutOption(Fiber.await(third), "50 millis"))._tag === "None")
      assert.strictEqual(yield* fake.inFlight, 1)
      stream.controller.abort()
      yield* fake.waitUntil(([request]) => request?.aborted === true)
      yield* Fiber.join(third)
    }))

  it.scopedLive("a client that leaves a stream is logged as aborted, one that reads to the end is not", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { chunkDelayMs: 5 } } })
      const stream = yield* Effect.promise(() =>
        clientOf(fake).chat.completions.create({ model, messages, stream: true })
      )
      yield* Effect.promise(async () => {
        for await (const _ of stream) break
      })
      yield* fake.waitUntil(([request]) => request?.endedAt !== undefined)
      assert.isTrue((yield* fake.requests)[0]?.aborted)
      const { items } = yield* streamed(clientOf(fake))
      assert.strictEqual(textIn(items), said)
      yield* fake.waitUntil((requests) => requests[1]?.endedAt !== undefined)
      const log = yield* fake.requests
      assert.deepInclude(log[1], { aborted: false, status: 200 })
      const took = (log[1]?.endedAt ?? 0) - (log[1]?.at ?? 0)
      assert.isAtLeast(took, 9 * 5)
    }))

  it.scopedLive("latency delays the answer, whatever it is", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { latencyMs: 60, refuse: "quota" } } })
      const [took] = yield* Effect.timed(failure(() => chat(clientOf(fake))))
      assert.isAtLeast(Duration.toMillis(took), 59)
    }))
})

describe("the log and the end", () => {
  it.scopedLive("says which key sent what, when, and how many are in flight", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-slow": { hang: true } } })
      const slow = yield* Effect.fork(Effect.promise((signal) =>
        clientOf(fake, "sk-slow").chat.completions.create({ model, messages }, { signal }).catch(() => "gone")
      ))
      yield* fake.waitForRequests(1)
      assert.strictEqual(yield* fake.inFlight, 1)
      yield* Effect.promise(() =>
        chat(clientOf(fake, "sk-quick"))
      )
      const [one, two] = yield* fake.requests
      assert(one !== undefined && two !== undefined)
      assert.deepStrictEqual([one.key, two.key], ["sk-slow", "sk-quick"])
      assert.isAtMost(one.at, two.at)
      assert.deepInclude(two, { method: "POST", path: "/v1/chat/completions", query: "", status: 200, aborted: false })
      assert.deepStrictEqual(JSON.parse(two.body), { model, messages })
      assert.strictEqual(two.headers["authorization"], "Bearer sk-quick")
      yield* Fiber.interrupt(slow)
      yield* fake.waitUntil((requests) => requests[0]?.aborted === true)
      assert.strictEqual(yield* fake.inFlight, 0)
    }))

  it.scopedLive("keeps what arrived of an upload that the client gave up", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* Effect.async<void>((resume) => {
        const request = Http.request(`${fake.baseUrl}/files`, { method: "POST", headers: { "content-length": 100 } })
        request.on("error", () => {})
        request.write("half", () => resume(Effect.sync(() => request.destroy())))
      })
      yield* fake.waitUntil(([request]) => request?.endedAt !== undefined)
      assert.deepInclude((yield* fake.requests)[0], { body: "half", aborted: true, status: undefined })
    }))

  it.scopedLive("shows a header that was sent twice", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* Effect.async<void>((resume) => {
        const headers = { "x-twice": ["one", "two"], authorization: "Bearer sk-a" }
        Http.get(`${fake.baseUrl}/models`, { headers }, (response) => {
          response.resume().once("end", () => resume(Effect.void))
        })
      })
      assert.strictEqual((yield* fake.requests)[0]?.headers["x-twice"], "one, two")
    }))

  it.live("stops, with requests open, when its scope closes", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const fake = yield* Scope.extend(FakeOpenAi.make({ keys: { "sk-test-alpha": { hang: true } } }), scope)
      const open = yield* Effect.fork(failure(() => chat(clientOf(fake))))
      yield* fake.waitForRequests(1)
      // The request that is open would never end by itself.
      yield* Scope.close(scope, Exit.void)
      assert.instanceOf(yield* Fiber.join(open), OpenAI.APIConnectionError)
      assert.isFalse((yield* fake.requests)[0]?.aborted)
      assert.instanceOf(yield* failure(() => chat(clientOf(fake))), OpenAI.APIConnectionError)
    }))

  it.scopedLive("can be stopped by hand, more than once", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* fake.close
      yield* fake.close
      assert.instanceOf(yield* failure(() => chat(clientOf(fake))), OpenAI.APIConnectionError)
    }))

  it.scoped("runs in real time also where the clock is virtual", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { "sk-test-alpha": { latencyMs: 1, chunkDelayMs: 1 } } })
      const { items } = yield* streamed(clientOf(fake))
      assert.strictEqual(textIn(items), said)
    }))
})
