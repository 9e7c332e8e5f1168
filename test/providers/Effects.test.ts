import Sdk from "@anthropic-ai/sdk"
import { assert, describe } from "@effect/vitest"
import OldestAnthropic from "anthropic-oldest"
import * as Chunk from "effect/Chunk"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Schedule from "effect/Schedule"
import * as Stream from "effect/Stream"
import { inspect } from "node:util"
import { toFile } from "openai"
import * as FakeAnthropic from "../../examples/support/FakeAnthropic.js"
import * as FakeGemini from "../../examples/support/FakeGemini.js"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as CallOptions from "../../src/CallOptions.js"
import type * as KeyPool from "../../src/KeyPool.js"
import * as Anthropic from "../../src/providers/Anthropic.js"
import * as Effects from "../../src/providers/Effects.js"
import * as Gemini from "../../src/providers/Gemini.js"
import {
  a,
  asked,
  b,
  both,
  inFlight,
  live,
  messages,
  model,
  once,
  said,
  sdks,
  service,
  textIn,
  until
} from "../support/openai.js"

const question = { model, messages }
const settings = { floor: false, cooldowns: { jitter: 0 } } as const

const anthropicOver = (fake: FakeAnthropic.FakeAnthropic, keys: ReadonlyArray<string>, Client: typeof Sdk = Sdk) =>
  Anthropic.make({
    ...settings,
    keys,
    client: (fetch) => new Client({ apiKey: "unused", authToken: null, baseURL: fake.baseUrl, fetch })
  })

const geminiOver = (fake: FakeGemini.FakeGemini, keys: ReadonlyArray<string>) =>
  Gemini.make({ ...settings, keys, baseUrl: fake.baseUrl })

const free = ({ pool }: { readonly pool: KeyPool.Service }) =>
  Effect.map(pool.snapshot, (snapshot) => assert.strictEqual(snapshot.inFlight, 0))

describe.each(sdks)("effects: openai %s", (_, Client) => {
  const serving = (labels: string, options: FakeOpenAi.Options = {}) =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make(options)
      return { fake, openai: yield* service(fake, labels, once, Client) }
    })

  live("a call is an effect, as often as it is run", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* serving("ab")
      const call = openai.effects.chat.completions.create(question)
      assert.deepStrictEqual(yield* fake.requests, [])
      assert.strictEqual((yield* call).choices[0]?.message.content, said)
      assert.strictEqual((yield* call).choices[0]?.message.content, said)
      assert.strictEqual(yield* asked(fake), "ab")
      const { data } = yield* openai.effects.embeddings.create({ model: "text-embedding-3-small", input: ["x"] })
      assert.strictEqual(data.length, 1)
      yield* free(openai)
    }))

  live("with `stream: true` it is a stream", () =>
    Effect.gen(function*() {
      const { openai } = yield* serving("a")
      const chunks = yield* Stream.runCollect(openai.effects.chat.completions.create({ ...question, stream: true }))
      assert.strictEqual(textIn(chunks), said)
      const events = yield* Stream.runCollect(
        openai.effects.responses.create({ model, input: "good morning to you", stream: true })
      )
      assert.strictEqual(Chunk.unsafeLast(events).type, "response.completed")
      yield* free(openai)
    }))

  live("a list is a stream of its items, over all pages", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* serving("a")
      for (const name of ["1", "2", "3"]) {
        const file = yield* Effect.promise(() => toFile(new Uint8Array(1), name))
        yield* openai.effects.files.create({ file, purpose: "batch" })
      }
      const files = yield* Stream.runCollect(openai.effects.files.list({ limit: 2 }))
      assert.deepStrictEqual(Array.from(files, ({ filename }) => filename), ["3", "2", "1"])
      assert.strictEqual((yield* fake.requests).length, 5)
      const models = yield* Stream.runCollect(openai.effects.models.list())
      assert.isAbove(models.length, 0)
      yield* free(openai)
    }))

  live("C5: interruption ends the request, and frees the key", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* serving("a", { keys: { [a]: { hang: true } } })
      const fiber = yield* Effect.fork(openai.effects.chat.completions.create(question))
      yield* fake.waitForRequests(1)
      assert.strictEqual(yield* inFlight(openai), 1)
      yield* Fiber.interrupt(fiber)
      yield* free(openai)
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live("C5: interruption while a stream waits for a chunk does so, too", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* serving("a", { keys: { [a]: { stallAfter: 2 } } })
      const reading = yield* Deferred.make<void>()
      const fiber = yield* openai.effects.chat.completions.create({ ...question, stream: true }).pipe(
        Stream.runForEach((chunk) => textIn([chunk]) === "said: " ? Deferred.succeed(reading, undefined) : Effect.void),
        Effect.fork
      )
      yield* Deferred.await(reading)
      yield* Fiber.interrupt(fiber)
      yield* free(openai)
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))
})

describe("effects: the pool underneath", () => {
  live("C1: a limited key is left for another", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
      for (let i = 0; i < 3; i++) yield* openai.effects.chat.completions.create(question)
      // Its first answer announced that nothing is left.
      assert.strictEqual(yield* asked(fake), "abb")
      yield* Stream.runDrain(openai.effects.chat.completions.create({ ...question, stream: true }))
      assert.strictEqual(yield* asked(fake), "abbb")
    }))

  live("failures are typed", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { refuse: "revoked" } } })
      const exhausted = (error: { readonly _tag: string }) => assert.strictEqual(error._tag, "AllKeysExhausted")
      exhausted(yield* Effect.flip(openai.effects.chat.completions.create(question)))
      const streamed = openai.effects.chat.completions.create({ ...question, stream: true })
      exhausted(yield* Effect.flip(Stream.runDrain(streamed)))
      exhausted(yield* Effect.flip(Stream.runDrain(openai.effects.models.list())))

      const healthy = yield* both("a")
      const error = yield* Effect.flip(healthy.openai.effects.models.retrieve("gpt-none"))
      assert.strictEqual(error._tag, "ProviderError")
      assert.strictEqual(error._tag === "ProviderError" ? error.status : undefined, 404)
    }))

  live("settings around it reach its requests", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { hang: true } } })
      const error = yield* Effect.flip(
        openai.effects.chat.completions.create(question).pipe(CallOptions.withDeadline("50 millis"))
      )
      assert.strictEqual(error._tag, "DeadlineExceeded")
    }))

  live("two services do not mix", () =>
    Effect.gen(function*() {
      const one = yield* both("a")
      const other = yield* both("b")
      const [first, second] = [one.openai.effects.chat.completions, other.openai.effects.chat.completions]
      yield* Effect.all([first.create(question), second.create(question), first.create(question)], {
        concurrency: "unbounded"
      })
      assert.strictEqual(yield* asked(one.fake), "aa")
      assert.strictEqual(yield* asked(other.fake), "b")
    }))

  live("C5: what a helper would go on to ask for is aborted, too", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { hang: true } } })
      const { files } = openai.client.vectorStores
      const retrieve = files.retrieve.bind(files)
      const signals: Array<AbortSignal | null | undefined> = []
      files.retrieve = (id, params, options) => {
        signals.push(options?.signal)
        return retrieve(id, params, options)
      }
      yield* openai.effects.vectorStores.files.poll("vs_1", "file_1").pipe(
        Effect.raceFirst(fake.waitForRequests(1))
      )
      assert.deepStrictEqual(signals.map((signal) => signal?.aborted), [true])
    }))
})

describe("effects: the view", () => {
  live("methods keep their `this`, also when taken off, and stay the same", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const { create } = openai.effects.chat.completions
      assert.strictEqual((yield* create(question)).choices[0]?.message.content, said)
      assert.strictEqual(create, openai.effects.chat.completions.create)
      assert.strictEqual(openai.effects.chat, openai.effects.chat)
    }))

  live("a method that was replaced on the client is the one that is called", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const call = openai.effects.models.retrieve("gpt-one")
      Reflect.set(openai.client.models, "retrieve", async (id: string) => ({ id: `patched ${id}` }))
      assert.strictEqual((yield* call).id, "patched gpt-one")
      Reflect.set(openai.client.models, "retrieve", undefined)
      assert.strictEqual((yield* Effect.flip(call))._tag, "SdkError")
    }))

  live("what the client does not have, it has not either", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const untyped = openai.effects as unknown as { readonly chat: { readonly nope?: () => unknown } }
      assert.isUndefined(untyped.chat.nope)
      assert.isUndefined(Reflect.get(openai.effects, "apiKey"))
      const exit = yield* Effect.exit(Effect.sync(() => (untyped.chat.nope as () => unknown)()))
      assert.isTrue(Exit.isFailure(exit))
    }))

  live("K1: it can be printed, awaited and written as JSON, and shows nothing", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      for (const view of [openai.effects, openai.effects.chat, openai.effects.chat.completions]) {
        assert.strictEqual(inspect(view, { showHidden: true, depth: 9 }), "{}")
        assert.strictEqual(JSON.stringify(view), "{}")
        assert.strictEqual(String(view), "[object Object]")
        assert.strictEqual(yield* Effect.promise(async () => view), view)
        assert.deepStrictEqual(Object.keys(view), [])
        assert.isUndefined(Reflect.get(view, Symbol.iterator))
        assert.throws(() => Object.assign(view, { more: 1 }), TypeError)
      }
    }))

  live("a signal of the caller's own, in the options, stays", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { hang: true } } })
      const controller = new AbortController()
      const fiber = yield* Effect.fork(
        Effect.flip(openai.effects.chat.completions.create(question, { signal: controller.signal }))
      )
      yield* fake.waitForRequests(1)
      controller.abort()
      assert.strictEqual((yield* Fiber.join(fiber))._tag, "SdkError")
      yield* free(openai)
    }))
})

describe("effects: where the signal goes", () => {
  const { signal } = new AbortController()
  const owner = {}
  const passed = (method: (...args: ReadonlyArray<never>) => unknown, ...args: ReadonlyArray<unknown>) =>
    Effects.inLastOptions({ owner, declared: method.length, args }, signal)

  live("into the options, wherever a method has them", () =>
    Effect.sync(() => {
      const body = { model }
      assert.deepStrictEqual(passed((_body, _options) => 0, body), [body, { signal }])
      assert.deepStrictEqual(passed((_body, _options) => 0, body, { timeout: 5 }), [body, { signal, timeout: 5 }])
      assert.deepStrictEqual(passed((_options) => 0), [{ signal }])
      assert.deepStrictEqual(passed((_id, _params, _options) => 0, "id", body), ["id", body, { signal }])
      assert.deepStrictEqual(passed((_query = {}, _options) => 0), [undefined, { signal }])
      assert.deepStrictEqual(passed((_query = {}, _options) => 0, body), [body, { signal }])
      assert.deepStrictEqual(passed((_id, _query = {}, _options) => 0, "id"), ["id", undefined, { signal }])
      assert.deepStrictEqual(passed((_id, _query = {}, _options) => 0, "id", body), ["id", body, { signal }])
      // Not into what is no plain object, and not over a signal that is there.
      const headers = new Headers()
      assert.deepStrictEqual(passed((_payload, _headers) => 0, "text", headers), ["text", headers])
      const own = new AbortController().signal
      assert.deepStrictEqual(passed((_body, _options) => 0, body, { signal: own }), [body, { signal: own }])
    }))
})

describe("effects: a platform without asynchronous contexts", () => {
  /** What is made here was made where the platform has none. */
  const without = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    Effect.acquireUseRelease(
      Effect.sync(() => {
        const original = process.getBuiltinModule
        Reflect.set(process, "getBuiltinModule", undefined)
        return original
      }),
      () => effect,
      (original) => Effect.sync(() => Reflect.set(process, "getBuiltinModule", original))
    )
  const ended = (fake: { readonly requests: Effect.Effect<ReadonlyArray<{ readonly aborted: boolean }>> }) =>
    Effect.map(fake.requests, ([request]) => assert.isTrue(request?.aborted))
  const interrupted = <E>(
    fake: { readonly waitForRequests: (count: number) => Effect.Effect<unknown>; readonly idle: Effect.Effect<void> },
    call: Effect.Effect<unknown, E>
  ) =>
    Effect.gen(function*() {
      const fiber = yield* Effect.fork(call)
      yield* fake.waitForRequests(1)
      yield* Fiber.interrupt(fiber)
      yield* fake.idle
    })

  live("C5: interruption ends the requests all the same", () =>
    Effect.gen(function*() {
      for (const [, Client] of sdks) {
        const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
        const openai = yield* without(service(fake, "a", {}, Client))
        yield* interrupted(fake, openai.effects.chat.completions.create(question))
        yield* ended(fake)

        const listing = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
        const lister = yield* without(service(listing, "a", {}, Client))
        yield* interrupted(listing, Stream.runDrain(lister.effects.files.list()))
        yield* ended(listing)
      }
      const claude = yield* FakeAnthropic.make({ keys: { [a]: { hang: true } } })
      const anthropic = yield* without(anthropicOver(claude, [a]))
      yield* interrupted(claude, anthropic.effects.models.retrieve("claude-sonnet-5"))
      yield* ended(claude)

      for (const index of [0, 1, 2]) {
        const google = yield* FakeGemini.make({ keys: { [a]: { hang: true } } })
        const { effects } = yield* without(geminiOver(google, [a]))
        const calls = [
          effects.models.generateContent({ model: "gemini-2.5-flash", contents: "x" }),
          Stream.runDrain(effects.models.list()),
          effects.interactions.create({ model: "gemini-2.5-flash", input: "x" })
        ]
        yield* interrupted(google, calls[index] ?? Effect.dieMessage("no such call"))
        yield* ended(google)
      }
    }))
})

describe.each<readonly [string, typeof Sdk]>([
  ["1.12", Sdk],
  // The calls made here are the same in both.
  ["0.40", OldestAnthropic as unknown as typeof Sdk]
])("effects: anthropic %s", (_, Client) => {
  const claude = { model: "claude-sonnet-5", max_tokens: 100, messages }
  const texts = (event: Sdk.RawMessageStreamEvent): string =>
    event.type === "content_block_delta" && event.delta.type === "text_delta" ? event.delta.text : ""

  live("messages, their events, lists and results", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make({ keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
      const anthropic = yield* anthropicOver(fake, [a, b], Client)
      const { effects } = anthropic
      const { content } = yield* effects.messages.create(claude)
      assert.deepInclude(content[0], { type: "text", text: said })
      const text = yield* Stream.mkString(Stream.map(effects.messages.create({ ...claude, stream: true }), texts))
      assert.strictEqual(text, said)
      assert.isAbove((yield* Stream.runCollect(effects.models.list({ limit: 1 }))).length, 1)
      const { id } = yield* effects.messages.batches.create({
        requests: ["x", "y"].map((custom_id) => ({ custom_id, params: claude }))
      })
      yield* effects.messages.batches.retrieve(id).pipe(
        Effect.repeat({ until: (batch) => batch.processing_status === "ended", schedule: Schedule.spaced(5) })
      )
      const results = yield* Stream.runCollect(effects.messages.batches.results(id))
      assert.deepStrictEqual(Array.from(results, ({ custom_id }) => custom_id), ["x", "y"])
      const error = yield* Effect.flip(effects.messages.create({ ...claude, max_tokens: 0 }))
      assert.strictEqual(error._tag === "ProviderError" && error.status, 400)
      yield* free(anthropic)
    }))
})

describe("effects: gemini", () => {
  const gemini = { model: "gemini-2.5-flash", contents: "good morning to you" }

  live(
    "contents, streams by the method's name, pages, and interactions by the arguments",
    () =>
      Effect.gen(function*() {
        const fake = yield* FakeGemini.make({ keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
        const service = yield* geminiOver(fake, [a, b])
        const { effects } = service
        assert.strictEqual((yield* effects.models.generateContent(gemini)).text, said)
        const streamed = Stream.map(effects.models.generateContentStream(gemini), ({ text }) => text ?? "")
        assert.strictEqual(yield* Stream.mkString(streamed), said)
        const models = yield* Stream.runCollect(effects.models.list({ config: { pageSize: 1 } }))
        assert.isAbove(models.length, 1)
        const { embeddings } = yield* effects.models.embedContent({ model: "gemini-embedding-001", contents: "x" })
        assert.strictEqual(embeddings?.length, 1)
        const ask = { model: gemini.model, input: gemini.contents }
        assert.strictEqual((yield* effects.interactions.create(ask)).status, "completed")
        const events = yield* Stream.runCollect(effects.interactions.create({ ...ask, stream: true }))
        assert.isAbove(events.length, 1)
        const error = yield* Effect.flip(effects.models.get({ model: "gemini-none" }))
        assert.strictEqual(error._tag === "ProviderError" && error.status, 404)
        // The SDK's own error leads nowhere: only what this adapter knows of its calls does.
        assert.strictEqual(error._tag === "ProviderError" && error.trail.entries.length, 1)
        yield* until(Effect.map(service.pool.snapshot, ({ inFlight }) => inFlight === 0))
      })
  )

  live("C5: interruption ends the request, and frees the key", () =>
    Effect.gen(function*() {
      const fake = yield* FakeGemini.make({ keys: { [a]: { hang: true } } })
      const service = yield* geminiOver(fake, [a])
      const fiber = yield* Effect.fork(service.effects.models.generateContent(gemini))
      yield* fake.waitForRequests(1)
      yield* Fiber.interrupt(fiber)
      yield* free(service)
      yield* fake.idle
    }))
})
