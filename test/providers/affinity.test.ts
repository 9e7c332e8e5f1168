import Anthropic from "@anthropic-ai/sdk"
import { FetchHttpClient, HttpClient, HttpClientRequest } from "@effect/platform"
import { assert, describe, it } from "@effect/vitest"
import { GoogleGenAI } from "@google/genai"
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import OpenAI from "openai"
import * as FakeAnthropic from "../../examples/support/FakeAnthropic.js"
import * as FakeGemini from "../../examples/support/FakeGemini.js"
import type * as FakeProvider from "../../examples/support/FakeProvider.js"
import * as CallOptions from "../../src/CallOptions.js"
import * as Classifier from "../../src/http/Classifier.js"
import * as PooledHttpClient from "../../src/http/PooledHttpClient.js"
import * as KeyPool from "../../src/KeyPool.js"
import * as AnthropicPool from "../../src/providers/Anthropic.js"
import * as Gemini from "../../src/providers/Gemini.js"
import type { Provider } from "../../src/providers/Provider.js"
import * as Providers from "../../src/providers/Providers.js"
import * as RetryDecision from "../../src/RetryDecision.js"
import { a, asked, b, both, c, chat, chatStream, drained, failure, live, messages, model } from "../support/openai.js"

/** Which key each request of a path came with, of a fake whose keys are accounts of their own. */
const askedFor = (fake: FakeProvider.FakeProvider, path: RegExp): Effect.Effect<string> =>
  Effect.map(
    fake.requests,
    (requests) =>
      requests.filter((request) => path.test(request.path)).map(({ key }) =>
        ({ [a]: "a", [b]: "b", [c]: "c" })[key ?? ""]
      )
        .join("")
  )

const upload = (client: OpenAI, name: string) =>
  client.files.create({ file: new File([name], `${name}.txt`), purpose: "assistants" })

/** Turns the pool's round by one. */
const turn = (client: OpenAI) => chat(client)

describe("OpenAI", () => {
  live("H4: files go back to the account that has them: content, retrieval, deletion", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("abc")
      yield* openai.use(async (client) => {
        const one = await upload(client, "one")
        const two = await upload(client, "two")
        for (const file of [one, two, one, two]) {
          assert.strictEqual((await client.files.retrieve(file.id)).id, file.id)
        }
        assert.strictEqual(await (await client.files.content(one.id)).text(), "one")
        await client.files.delete(two.id)
      })
      assert.strictEqual(yield* asked(fake), "ab" + "abab" + "a" + "b")
    }))

  live("H4: a batch goes where its file is, and so do its results", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("abc")
      yield* openai.use(async (client) => {
        await turn(client)
        const file = await upload(client, "requests")
        const batch = await client.batches.create({
          input_file_id: file.id,
          endpoint: "/v1/chat/completions",
          completion_window: "24h"
        })
        await turn(client)
        for (let i = 0; i < 3; i++) await client.batches.retrieve(batch.id)
      })
      assert.strictEqual(yield* asked(fake), "ab" + "b" + "c" + "bbb")
    }))

  live(
    "H4: a response is gone on with where it is stored, whether it was streamed or not",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("abc")
        const ids = yield* openai.use(async (client) => {
          const first = await client.responses.create({ model, input: "one" })
          await client.responses.create({ model, input: "two", previous_response_id: first.id })
          await turn(client)
          let streamed = ""
          for await (const event of await client.responses.create({ model, input: "three", stream: true })) {
            if (event.type === "response.created") streamed = event.response.id
          }
          return { first: first.id, streamed }
        })
        yield* openai.use(async (client) => {
          await turn(client)
          for (const previous_response_id of [ids.streamed, ids.first, ids.streamed]) {
            await client.responses.create({ model, input: "four", previous_response_id })
          }
          await client.responses.create({ model, input: "five", previous_response_id: ids.streamed, stream: true })
            .then(
              (stream) => drained(() => stream)
            )
        })
        assert.strictEqual(yield* askedFor(fake, /responses$/), "aa" + "c" + "cac" + "c")
      })
  )

  live(
    "H4: the id of a stream is known while it is still read, and when it is left early",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab")
        yield* openai.use(async (client) => {
          for await (const event of await client.responses.create({ model, input: "one", stream: true })) {
            if (event.type !== "response.created") continue
            await client.responses.create({ model, input: "two", previous_response_id: event.response.id })
            break
          }
        })
        assert.strictEqual(yield* asked(fake), "aa")
      })
  )

  live("H4: nothing is remembered of what is not stored", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab")
      yield* openai.use(async (client) => {
        const first = await client.responses.create({ model, input: "one", store: false })
        await failure(() => client.responses.create({ model, input: "two", previous_response_id: first.id })).pipe(
          Effect.runPromise
        )
      })
      assert.strictEqual(yield* asked(fake), "aba")
    }))

  live("H4: the pages of a list come from one account", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab")
      const listed = yield* openai.use(async (client) => {
        for (const name of ["one", "two", "three", "four", "five", "six"]) await upload(client, name)
        const names: Array<string> = []
        for await (const file of client.files.list({ limit: 1 })) names.push(file.filename)
        return names
      })
      assert.deepStrictEqual(listed, ["five.txt", "three.txt", "one.txt"])
      assert.strictEqual((yield* asked(fake)).slice(6), "aaa")
    }))

  live("H4: an unknown id that answers 404 is tried once per group, and is known then", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("abc", { groups: { [a]: "one", [b]: "one" } }, {
        keys: [
          { secret: a, label: "a", quotaGroup: "one" },
          { secret: b, label: "b", quotaGroup: "one" },
          { secret: c, label: "c" }
        ]
      })
      const file = yield* Effect.promise(() =>
        upload(new OpenAI({ apiKey: c, baseURL: fake.baseUrl, organization: null, project: null }), "elsewhere")
      )
      const response = yield* Effect.promise(() =>
        new OpenAI({ apiKey: c, baseURL: fake.baseUrl, organization: null, project: null }).responses.create({
          model,
          input: "one"
        })
      )
      yield* openai.use(async (client) => {
        await client.files.retrieve(file.id)
        await client.files.retrieve(file.id)
        await client.files.retrieve(file.id)
        // OpenAI says 400, with a code.
        await client.responses.create({ model, input: "two", previous_response_id: response.id })
      })
      assert.strictEqual((yield* asked(fake)).slice(2), "ac" + "cc" + "ac")
      const error = yield* Effect.flip(openai.use((client) => client.files.retrieve("file-nowhere")))
      assert.strictEqual(error._tag, "ProviderError")
      if (error._tag === "ProviderError") assert.strictEqual(error.status, 404)
      assert.strictEqual((yield* asked(fake)).length, 2 + 2 + 2 + 2 + 2)
    }))

  live(
    "H4: a conversation keeps its key, by a header or in Effect, and the header stays here",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("abc")
        const headers = { [CallOptions.affinityHeader]: "conversation-1" }
        const plain = openai.client
        yield* Effect.promise(async () => {
          for (let i = 0; i < 5; i++) {
            await chat(plain, { headers })
            await turn(plain)
          }
          await drained(() => chatStream(plain, { headers }))
        })
        const all = yield* asked(fake)
        const [home = "?"] = all
        const [own, others] = [[...all].filter((_, i) => i % 2 === 0), [...all].filter((_, i) => i % 2 === 1)]
        assert.deepStrictEqual(new Set(own), new Set([home]))
        assert.isAbove(new Set(others).size, 1)
        yield* openai.use((client) => chat(client)).pipe(CallOptions.withAffinity("conversation-1"))
        yield* Stream.runDrain(openai.stream((client) => chatStream(client))).pipe(
          CallOptions.withAffinity("conversation-1")
        )
        // The header of a request wins over what is said around it.
        yield* openai.use((client) => chat(client, { headers })).pipe(CallOptions.withAffinity("conversation-2"))
        assert.strictEqual((yield* asked(fake)).slice(-3), home.repeat(3))
        for (const request of yield* fake.requests) assert.notProperty(request.headers, CallOptions.affinityHeader)
      })
  )

  live("H4: neither does the header go to another origin", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const other = yield* FakeAnthropic.make()
      const headers = { [CallOptions.affinityHeader]: "conversation-1" }
      yield* openai.use((client) => client.get(`${other.baseUrl}/v1/models`, { headers }).catch(() => undefined))
      const [request] = yield* other.requests
      assert.isDefined(request)
      assert.notProperty(request?.headers ?? {}, CallOptions.affinityHeader)
    }))
})

describe("HttpClient", () => {
  live("H4: the pooled client knows affinity and stored resources too", () =>
    Effect.gen(function*() {
      const { fake } = yield* both("a")
      const pool = yield* KeyPool.make({ keys: [a, b, c] })
      const client = (yield* HttpClient.HttpClient).pipe(
        PooledHttpClient.pooled(pool, Providers.openAi, { baseUrl: fake.origin })
      )
      const post = (path: string, body: object) =>
        HttpClientRequest.post(`${fake.baseUrl}${path}`).pipe(HttpClientRequest.bodyUnsafeJson(body))
      const respond = (more: object) =>
        Effect.flatMap(client.execute(post("/responses", { model, input: "one", ...more })), ({ json }) => json)
      const first = yield* respond({})
      const id = typeof first === "object" && first !== null && "id" in first ? first.id : undefined
      for (let i = 0; i < 3; i++) yield* respond({ previous_response_id: id })
      assert.strictEqual(yield* asked(fake), "aaaa")
      const turn = post("/chat/completions", { model, messages }).pipe(
        HttpClientRequest.setHeader(CallOptions.affinityHeader, "conversation-1")
      )
      for (let i = 0; i < 4; i++) yield* Effect.flatMap(client.execute(turn), ({ json }) => json)
      assert.strictEqual(new Set((yield* asked(fake)).slice(4)).size, 1)
      for (const request of yield* fake.requests) assert.notProperty(request.headers, CallOptions.affinityHeader)
    }).pipe(Effect.provide(FetchHttpClient.layer)))
})

describe("Anthropic", () => {
  live("H4: files, batches and pages go back to the account that has them", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make()
      const anthropic = yield* AnthropicPool.make({
        keys: [a, b, c].map((secret) => ({ secret })),
        client: (fetch) => new Anthropic({ apiKey: "unused", authToken: null, baseURL: fake.baseUrl, fetch })
      })
      const ask = { model: "claude-sonnet-5", max_tokens: 10, messages }
      const listed = yield* anthropic.use(async (client) => {
        const one = await client.beta.files.upload({ file: new File(["one"], "one.txt") })
        await client.messages.create(ask)
        const batch = await client.messages.batches.create({ requests: [{ custom_id: "x", params: ask }] })
        await client.messages.create(ask)
        for (let i = 0; i < 2; i++) {
          await client.beta.files.retrieveMetadata(one.id)
          await client.messages.batches.retrieve(batch.id)
        }
        for (const name of ["two", "three", "four", "five", "six", "seven", "eight", "nine"]) {
          await client.beta.files.upload({ file: new File([name], `${name}.txt`) })
        }
        const names: Array<string> = []
        for await (const file of client.beta.files.list({ limit: 1 })) names.push(file.filename)
        return names
      })
      assert.strictEqual(yield* askedFor(fake, /batches/), "ccc")
      const requests = yield* fake.requests
      const own = requests.filter(({ method, path }) => method === "GET" && /files\/./.test(path))
      assert.deepStrictEqual(new Set(own.map(({ key }) => key)), new Set([a]))
      const pages = requests.filter(({ method, path }) => method === "GET" && path.endsWith("/files"))
      assert.isAbove(pages.length, 1)
      assert.strictEqual(new Set(pages.map(({ key }) => key)).size, 1)
      assert.strictEqual(listed.length, new Set(listed).size)
    }))
})

describe("Gemini", () => {
  live(
    "H4: uploads, files, cached contents and interactions go back to the account that has them",
    () =>
      Effect.gen(function*() {
        const fake = yield* FakeGemini.make()
        const gemini = yield* Gemini.make({ keys: [a, b, c].map((secret) => ({ secret })), baseUrl: fake.baseUrl })
        const ask = (client: GoogleGenAI, more: object = {}) =>
          client.models.generateContent({ model: "gemini-2.5-flash", contents: "hello", ...more })
        yield* gemini.use(async (client) => {
          const file = await client.files.upload({ file: new Blob(["one"]), config: { mimeType: "text/plain" } })
          await ask(client)
          await client.files.get({ name: file.name ?? "" })
          await ask(client, {
            contents: [{ role: "user", parts: [{ fileData: { fileUri: file.uri, mimeType: "text/plain" } }] }]
          })
          const cache = await client.caches.create({ model: "gemini-2.5-flash", config: { contents: "much" } })
          await ask(client)
          for (let i = 0; i < 2; i++) await ask(client, { config: { cachedContent: cache.name } })
          await client.caches.get({ name: cache.name ?? "" })
          const first = await client.interactions.create({ model: "gemini-2.5-flash", input: "one" })
          await ask(client)
          await client.interactions.get(first.id)
          await client.interactions.create({
            model: "gemini-2.5-flash",
            input: "two",
            previous_interaction_id: first.id
          })
        })
        const refused = (yield* fake.requests).filter(({ status = 0 }) => status >= 400)
        assert.deepStrictEqual(refused.map(({ path, status }) => [path, status]), [])
        assert.match(yield* askedFor(fake, /files/), /^(.)\1*$/)
        assert.match(yield* askedFor(fake, /interactions/), /^(.)\1*$/)
        assert.isAbove(new Set(yield* askedFor(fake, /generateContent/)).size, 1)
      })
  )

  live(
    "H4: a file of another account, which Google forbids, is looked for as one that is not found",
    () =>
      Effect.gen(function*() {
        const fake = yield* FakeGemini.make()
        const gemini = yield* Gemini.make({ keys: [a, b].map((secret) => ({ secret })), baseUrl: fake.baseUrl })
        const bare = new GoogleGenAI({ apiKey: b, vertexai: false, httpOptions: { baseUrl: fake.baseUrl } })
        const file = yield* Effect.promise(() =>
          bare.files.upload({ file: new Blob(["one"]), config: { mimeType: "text/plain" } })
        )
        const before = (yield* fake.requests).length
        for (let i = 0; i < 2; i++) yield* gemini.use((client) => client.files.get({ name: file.name ?? "" }))
        assert.deepStrictEqual((yield* fake.requests).slice(before).map(({ key }) => key), [a, b, b])
      })
  )
})

describe("what requests name, and what answers tell", () => {
  const named = (provider: Provider, method: string, path: string, body?: object) =>
    provider.resources?.({
      method,
      url: new URL(path, "https://api.example"),
      headers: new Headers(),
      text: body === undefined ? undefined : JSON.stringify(body),
      form: undefined
    })
  const told = (provider: Provider, body: object, headers: Record<string, string> = {}) =>
    provider.stored?.({ headers: new Headers(headers), text: JSON.stringify(body) })

  it("OpenAI: paths, fields at any depth, cursors; inference without an id names nothing and stores nothing", () => {
    const of = (method: string, path: string, body?: object) => named(Providers.openAi, method, path, body)
    assert.deepStrictEqual(of("POST", "/v1/chat/completions", { model, messages }), { resources: [], storing: false })
    assert.deepStrictEqual(of("POST", "/v1/embeddings", { model, input: "file_id" }), { resources: [], storing: false })
    assert.deepStrictEqual(of("POST", "/v1/responses", { model, input: "x" }), { resources: [], storing: true })
    assert.deepStrictEqual(of("POST", "/v1/responses", { store: false }), { resources: [], storing: false })
    assert.deepStrictEqual(of("POST", "/v1/chat/completions", { store: true }), { resources: [], storing: true })
    assert.deepStrictEqual(of("GET", "/v1/files/file-1/content"), { resources: ["file-1"], storing: false })
    assert.deepStrictEqual(of("DELETE", "/v1/files/file-1"), { resources: ["file-1"], storing: false })
    assert.deepStrictEqual(of("GET", "/v1/files?after=file-1"), { resources: ["cursor:file-1"], storing: true })
    assert.deepStrictEqual(of("GET", "/v1/vector_stores/vs_1/files/file-1")?.resources, ["vs_1", "file-1"])
    assert.deepStrictEqual(of("POST", "/v1/responses/input_tokens", {})?.resources, [])
    assert.deepStrictEqual(of("POST", "/openai/v1/fine_tuning/jobs/ftjob-1/cancel")?.resources, ["ftjob-1"])
    assert.deepStrictEqual(
      of("POST", "/v1/responses", {
        previous_response_id: "resp_1",
        conversation: { id: "conv_1" },
        input: [{ role: "user", content: [{ type: "input_file", file_id: "file-1" }] }],
        tools: [{ type: "file_search", vector_store_ids: ["vs_1", "vs_2"] }]
      })?.resources,
      ["resp_1", "conv_1", "file-1", "vs_1", "vs_2"]
    )
    // What others have too is no resource of an account.
    const skill = { type: "skill_reference", skill_id: "openai-spreadsheets" }
    assert.deepStrictEqual(
      of("POST", "/v1/responses", {
        metadata: { thread_id: "T-1", conversation: "chat 7", container: "main" },
        tools: [{ type: "shell", environment: { skills: [skill] } }]
      })?.resources,
      []
    )
    // What somebody says is no field.
    const content = JSON.stringify({ file_id: "file-9", previous_response_id: "resp_9" })
    assert.deepStrictEqual(of("POST", "/v1/responses", { input: [{ role: "user", content }] })?.resources, [])
  })

  it("H4: OpenAI's own code for a response that is not there sends a search on, however it is worded", () => {
    const error = { message: "gone", type: "invalid_request_error", code: "previous_response_not_found" }
    const fault = Classifier.classify(Providers.openAi.dialect, {
      status: 400,
      headers: new Headers(),
      body: JSON.stringify({ error }),
      now: 0
    })
    assert.isTrue(fault !== undefined && RetryDecision.isNotHere(fault))
  })

  it("OpenAI: ids, the files of a batch, the ends of a page; of a stream, its first event", () => {
    const of = (body: object) => told(Providers.openAi, body)
    assert.deepStrictEqual(of({ id: "file-1", object: "file" }), ["file-1"])
    assert.deepStrictEqual(of({ id: "batch_1", output_file_id: "file-2", error_file_id: null }), ["batch_1", "file-2"])
    assert.deepStrictEqual(
      of({ object: "list", data: [{ id: "job-1" }, { id: "job-2" }], has_more: true }),
      ["cursor:job-1", "cursor:job-2", "job-1", "job-2"]
    )
    assert.deepStrictEqual(of({ type: "response.created", response: { object: "response", id: "resp_1" } }), ["resp_1"])
    assert.deepStrictEqual(of({ type: "response.output_text.delta", item_id: "msg_1", delta: "x" }), [])
    assert.deepStrictEqual(of({ error: { message: "no" } }), [])
    assert.deepStrictEqual(Providers.openAi.stored?.({ headers: new Headers(), text: "{\"id\":\"file-1\",\"cut" }), [
      "file-1"
    ])
    const long = { object: "list", data: Array.from({ length: 1_000 }, (_, i) => ({ id: `file-${i}` })) }
    assert.isAtMost(of(long)?.length ?? 0, 110)
  })

  it("Anthropic: paths, files in messages, containers, cursors", () => {
    const of = (method: string, path: string, body?: object) => named(Providers.anthropic, method, path, body)
    assert.deepStrictEqual(of("POST", "/v1/messages", { model, messages }), { resources: [], storing: false })
    assert.deepStrictEqual(of("GET", "/v1/messages/batches/msgbatch_1/results"), {
      resources: ["msgbatch_1"],
      storing: false
    })
    assert.deepStrictEqual(of("GET", "/v1/files?after_id=file_1"), { resources: ["cursor:file_1"], storing: true })
    const content = [{ type: "document", source: { type: "file", file_id: "file_1" } }]
    assert.deepStrictEqual(
      of("POST", "/v1/messages", { container: { id: "container_1" }, messages: [{ role: "user", content }] }),
      { resources: ["container_1", "file_1"], storing: true }
    )
    // What others have too is no resource of an account: skills of Anthropic's own, and what a tool is asked for.
    const input = { file_id: "report.pdf", container: "main", skill_id: "7" }
    assert.deepStrictEqual(
      of("POST", "/v1/messages", {
        container: { skills: [{ type: "anthropic", skill_id: "pptx" }, { type: "custom", skill_id: "skill_1" }] },
        messages: [{ role: "assistant", content: [{ type: "tool_use", id: "toolu_1", name: "read", input }] }]
      })?.resources,
      ["skill_1"]
    )
    const answers = (body: object) => told(Providers.anthropic, body)
    assert.deepStrictEqual(answers({ id: "file_1", type: "file" }), ["file_1"])
    assert.deepStrictEqual(answers({ id: "msgbatch_1", type: "message_batch" }), ["msgbatch_1"])
    assert.deepStrictEqual(
      answers({ id: "msg_1", type: "message", container: { id: "container_1", expires_at: "x" } }),
      ["container_1"]
    )
    assert.deepStrictEqual(
      answers({ type: "message_delta", delta: { container: { id: "container_1" } } }),
      ["container_1"]
    )
    assert.deepStrictEqual(
      answers({ data: [{ id: "file_1" }], has_more: true, first_id: "file_1", last_id: "file_1" }),
      ["cursor:file_1", "file_1"]
    )
  })

  it("Gemini: names wherever they stand, uploads, interactions, page tokens", () => {
    const of = (method: string, path: string, body?: object) => named(Providers.gemini, method, path, body)
    assert.deepStrictEqual(of("POST", "/v1beta/models/m:generateContent", { contents: [{ parts: [{ text: "x" }] }] }), {
      resources: [],
      storing: false
    })
    assert.deepStrictEqual(
      of("POST", "/v1beta/models/m:generateContent", {
        cachedContent: "cachedContents/c1",
        contents: [{ parts: [{ fileData: { fileUri: "https://host.example/v1beta/files/f1" } }] }]
      })?.resources,
      ["cachedContents/c1", "files/f1"]
    )
    // A file of somebody else's is where it is.
    for (const fileUri of ["https://host.example/files/f1", "gs://bucket/files/f1"]) {
      const parts = [{ fileData: { fileUri } }]
      assert.deepStrictEqual(of("POST", "/v1beta/models/m:generateContent", { contents: [{ parts }] })?.resources, [])
    }
    assert.deepStrictEqual(of("GET", "/v1beta/files/f1")?.resources, ["files/f1"])
    assert.deepStrictEqual(of("GET", "/v1beta/models/veo/operations/op1")?.resources, ["operations/op1"])
    assert.deepStrictEqual(of("POST", "/upload/v1beta/files?upload_id=u1")?.resources, ["upload:u1"])
    assert.deepStrictEqual(of("GET", "/v1beta/files?pageToken=t1")?.resources, ["cursor:t1"])
    assert.deepStrictEqual(of("POST", "/v1beta/interactions", { previous_interaction_id: "i1" }), {
      resources: ["interactions/i1"],
      storing: true
    })
    assert.deepStrictEqual(of("POST", "/v1beta/interactions", { store: false })?.storing, false)
    const answers = (body: object, headers = {}) => told(Providers.gemini, body, headers)
    const address = "https://host.example/upload/v1beta/files?upload_id=u1&upload_protocol=resumable"
    assert.deepStrictEqual(answers({}, { "x-goog-upload-url": address }), ["upload:u1"])
    assert.deepStrictEqual(answers({ file: { name: "files/f1", uri: "x" } }), ["files/f1"])
    assert.deepStrictEqual(answers({ name: "models/veo/operations/op1" }), ["operations/op1"])
    assert.deepStrictEqual(answers({ id: "i1", object: "interaction" }), ["interactions/i1"])
    assert.deepStrictEqual(answers({ event_type: "interaction.created", interaction: { id: "i1" } }), [
      "interactions/i1"
    ])
    assert.deepStrictEqual(
      answers({ files: [{ name: "files/f1" }, { name: "files/f2" }], nextPageToken: "t1" }),
      ["cursor:t1", "files/f1", "files/f2"]
    )
  })
})
