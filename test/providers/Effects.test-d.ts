import type Anthropic from "@anthropic-ai/sdk"
import type * as genai from "@google/genai"
import type OldestAnthropic from "anthropic-oldest"
import type * as Effect from "effect/Effect"
import type * as Stream from "effect/Stream"
import type OpenAI from "openai"
import type OldestOpenAI from "openai-oldest"
import { makeParseableResponseFormat } from "openai/lib/parser"
import { describe, expectTypeOf, test } from "vitest"
import type { CallError } from "../../src/KeymeshError.js"
import type * as AnthropicAdapter from "../../src/providers/Anthropic.js"
import type { Effects } from "../../src/providers/Effects.js"
import type * as Gemini from "../../src/providers/Gemini.js"
import type * as OpenAi from "../../src/providers/OpenAi.js"

declare const openai: OpenAi.Service
declare const oldestOpenai: Effects<OldestOpenAI>
declare const anthropic: AnthropicAdapter.Service
declare const oldestAnthropic: Effects<OldestAnthropic>
declare const gemini: Gemini.Service

/** What the SDKs promise, as `use` gives it. */
type Given<A> = A & { _request_id?: string | null }
type GivenByAnthropic<A> = A & { _request_id?: string | null; _workspace_id?: string | null }

const chat = { model: "gpt-5-mini", messages: [{ role: "user" as const, content: "Hello" }] }
const message = { model: "claude-sonnet-5", max_tokens: 64, messages: [{ role: "user" as const, content: "Hello" }] }

describe("openai", () => {
  const { effects } = openai

  test("a completion is an Effect, and keeps its type", () => {
    const answer = effects.chat.completions.create(chat)
    expectTypeOf(answer).toEqualTypeOf<Effect.Effect<Given<OpenAI.ChatCompletion>, CallError>>()
    expectTypeOf<Effect.Effect.Success<typeof answer>["choices"]>().toEqualTypeOf<Array<OpenAI.ChatCompletion.Choice>>()
    expectTypeOf<Effect.Effect.Success<typeof answer>>().not.toBeAny()
    expectTypeOf(effects.chat.completions.create({ ...chat, stream: false })).toEqualTypeOf<typeof answer>()
    expectTypeOf(effects.chat.completions.create({ ...chat, stream: null }, { timeout: 5 })).toEqualTypeOf<
      typeof answer
    >()
    expectTypeOf(effects.responses.create({ model: "gpt-5-mini", input: "Hello" })).toEqualTypeOf<
      Effect.Effect<Given<OpenAI.Responses.Response>, CallError>
    >()
    expectTypeOf(effects.embeddings.create({ model: "text-embedding-3-small", input: "Hello" })).toEqualTypeOf<
      Effect.Effect<Given<OpenAI.CreateEmbeddingResponse>, CallError>
    >()
    expectTypeOf(effects.files.delete("file-1")).toEqualTypeOf<Effect.Effect<Given<OpenAI.FileDeleted>, CallError>>()
  })

  test("with `stream: true` it is a Stream of chunks", () => {
    const chunks = effects.chat.completions.create({ ...chat, stream: true })
    expectTypeOf(chunks).toEqualTypeOf<Stream.Stream<OpenAI.ChatCompletionChunk, CallError>>()
    expectTypeOf<Stream.Stream.Success<typeof chunks>>().not.toBeAny()
    expectTypeOf(effects.responses.create({ model: "gpt-5-mini", input: "Hello", stream: true })).toEqualTypeOf<
      Stream.Stream<OpenAI.Responses.ResponseStreamEvent, CallError>
    >()
    // Not the first argument, but the first object.
    expectTypeOf(effects.responses.retrieve("resp_1", { stream: true })).toEqualTypeOf<
      Stream.Stream<OpenAI.Responses.ResponseStreamEvent, CallError>
    >()
    expectTypeOf(effects.responses.retrieve("resp_1")).toEqualTypeOf<
      Effect.Effect<Given<OpenAI.Responses.Response>, CallError>
    >()
  })

  test("each overload keeps its own", () => {
    const file = new File([], "a.mp3")
    const model = "whisper-1"
    expectTypeOf(effects.audio.transcriptions.create({ file, model, response_format: "text" })).toEqualTypeOf<
      Effect.Effect<string, CallError>
    >()
    expectTypeOf(effects.audio.transcriptions.create({ file, model, response_format: "verbose_json" })).toEqualTypeOf<
      Effect.Effect<Given<OpenAI.Audio.TranscriptionVerbose>, CallError>
    >()
    expectTypeOf(effects.audio.transcriptions.create({ file, model })).toEqualTypeOf<
      Effect.Effect<Given<OpenAI.Audio.Transcription>, CallError>
    >()
    expectTypeOf(effects.audio.transcriptions.create({ file, model, stream: true })).toEqualTypeOf<
      Stream.Stream<OpenAI.Audio.TranscriptionStreamEvent, CallError>
    >()
  })

  test("lists are Streams of their items", () => {
    expectTypeOf(effects.models.list()).toEqualTypeOf<Stream.Stream<OpenAI.Model, CallError>>()
    expectTypeOf(effects.files.list({ limit: 2 })).toEqualTypeOf<Stream.Stream<OpenAI.FileObject, CallError>>()
    expectTypeOf(effects.fineTuning.jobs.listEvents("job")).toEqualTypeOf<
      Stream.Stream<OpenAI.FineTuning.FineTuningJobEvent, CallError>
    >()
    expectTypeOf(effects.vectorStores.search("vs", { query: "q" })).toEqualTypeOf<
      Stream.Stream<OpenAI.VectorStoreSearchResponse, CallError>
    >()
  })

  test("parse keeps what the format says", () => {
    const response_format = makeParseableResponseFormat(
      { type: "json_schema", json_schema: { name: "answer", schema: {} } },
      (content): { readonly answer: number } => JSON.parse(content)
    )
    const answer = effects.chat.completions.parse({ ...chat, response_format })
    type Parsed = NonNullable<Effect.Effect.Success<typeof answer>["choices"][number]["message"]["parsed"]>
    expectTypeOf<Parsed>().toEqualTypeOf<{ readonly answer: number }>()
    const used = openai.use((client) => client.chat.completions.parse({ ...chat, response_format }))
    expectTypeOf(answer).toEqualTypeOf(used)
    expectTypeOf(effects.responses.parse({ model: "gpt-5-mini", input: "Hello" })).toExtend<
      Effect.Effect<OpenAI.Responses.Response, CallError>
    >()
  })

  test("arguments are checked as the SDK does", () => {
    // @ts-expect-error no messages
    void effects.chat.completions.create({ model: "gpt-5-mini" })
    // @ts-expect-error nobody knows what comes
    void effects.chat.completions.create({ ...chat, stream: chat.model === "" })
    // @ts-expect-error no such option
    void effects.models.list({ tiemout: 5 })
  })

  test("what cannot be typed without loss is left out", () => {
    type Absent<Key extends string, In> = Key extends keyof In ? true : false
    type Completions = typeof effects.chat.completions
    // Helpers that give no promise, methods with type parameters, settings, and what they have within.
    expectTypeOf<Absent<"stream" | "runTools", Completions>>().toEqualTypeOf<false>()
    type Root =
      | "get"
      | "post"
      | "request"
      | "withOptions"
      | "baseURL"
      | "apiKey"
      | "fetchOptions"
      | "logger"
      | "timeout"
    expectTypeOf<Absent<Root, typeof effects>>().toEqualTypeOf<false>()
    expectTypeOf<Absent<"content", typeof effects.vectorStores.files>>().toEqualTypeOf<false>()
    // @ts-expect-error it says so to whoever calls it, too
    void effects.chat.completions.stream
  })
})

describe("openai, the oldest", () => {
  test("is read off as well", () => {
    expectTypeOf(oldestOpenai.chat.completions.create(chat)).toEqualTypeOf<
      Effect.Effect<Given<OldestOpenAI.ChatCompletion>, CallError>
    >()
    expectTypeOf(oldestOpenai.chat.completions.create({ ...chat, stream: true })).toEqualTypeOf<
      Stream.Stream<OldestOpenAI.ChatCompletionChunk, CallError>
    >()
    expectTypeOf(oldestOpenai.models.list()).toEqualTypeOf<Stream.Stream<OldestOpenAI.Model, CallError>>()
  })
})

describe("anthropic", () => {
  const { effects } = anthropic

  test("a message is an Effect, its events a Stream", () => {
    expectTypeOf(effects.messages.create(message)).toEqualTypeOf<
      Effect.Effect<GivenByAnthropic<Anthropic.Message>, CallError>
    >()
    expectTypeOf(effects.messages.create({ ...message, stream: true })).toEqualTypeOf<
      Stream.Stream<Anthropic.RawMessageStreamEvent, CallError>
    >()
    expectTypeOf(effects.messages.countTokens({ model: message.model, messages: message.messages })).toEqualTypeOf<
      Effect.Effect<GivenByAnthropic<Anthropic.MessageTokensCount>, CallError>
    >()
  })

  test("lists and results are Streams of their items", () => {
    expectTypeOf(effects.models.list()).toEqualTypeOf<Stream.Stream<Anthropic.ModelInfo, CallError>>()
    expectTypeOf(effects.messages.batches.results("batch")).toEqualTypeOf<
      Stream.Stream<Anthropic.Messages.MessageBatchIndividualResponse, CallError>
    >()
  })

  test("what cannot be typed without loss is left out", () => {
    // @ts-expect-error gives no promise
    void effects.messages.stream
    // @ts-expect-error has type parameters
    void effects.messages.parse
    // @ts-expect-error a tool of the client's own, no call
    void effects.withOptions
  })

  test("the oldest is read off as well, with overloads that leave the query out", () => {
    expectTypeOf(oldestAnthropic.messages.create(message)).toEqualTypeOf<
      Effect.Effect<OldestAnthropic.Message & { _request_id?: string | null }, CallError>
    >()
    expectTypeOf(oldestAnthropic.messages.create({ ...message, stream: true })).toEqualTypeOf<
      Stream.Stream<OldestAnthropic.RawMessageStreamEvent, CallError>
    >()
    expectTypeOf(oldestAnthropic.models.list({ limit: 2 })).toEqualTypeOf<
      Stream.Stream<OldestAnthropic.ModelInfo, CallError>
    >()
    expectTypeOf(oldestAnthropic.models.list({ timeout: 2 })).toEqualTypeOf<
      Stream.Stream<OldestAnthropic.ModelInfo, CallError>
    >()
  })
})

describe("gemini", () => {
  const { effects } = gemini
  const question = { model: "gemini-2.5-flash", contents: "Hello" }

  test("a method's name says which it is", () => {
    expectTypeOf(effects.models.generateContent(question)).toEqualTypeOf<
      Effect.Effect<genai.GenerateContentResponse, CallError>
    >()
    expectTypeOf(effects.models.generateContentStream(question)).toEqualTypeOf<
      Stream.Stream<genai.GenerateContentResponse, CallError>
    >()
    expectTypeOf(effects.models.embedContent(question)).toEqualTypeOf<
      Effect.Effect<genai.EmbedContentResponse, CallError>
    >()
    expectTypeOf(effects.models.list()).toEqualTypeOf<Stream.Stream<genai.Model, CallError>>()
    expectTypeOf(effects.files.list()).toEqualTypeOf<Stream.Stream<genai.File, CallError>>()
  })

  test("interactions are told by their arguments", () => {
    const model = "gemini-2.5-flash"
    const answer = effects.interactions.create({ model, input: "Hello" })
    expectTypeOf(answer).toExtend<Effect.Effect<{ readonly id: string }, CallError>>()
    const events = effects.interactions.create({ model, input: "Hello", stream: true })
    expectTypeOf(events).toExtend<Stream.Stream<{ readonly event_type: string }, CallError>>()
    expectTypeOf<Stream.Stream.Success<typeof events>>().not.toBeAny()
  })

  test("what is not pooled, or cannot be typed without loss, is left out", () => {
    // @ts-expect-error a WebSocket with a key of its own
    void effects.live
    // @ts-expect-error makes a chat, and calls nobody
    void effects.chats
    // @ts-expect-error has type parameters
    void effects.operations.get
    // @ts-expect-error says `unknown`
    void effects.interactions.delete
  })
})
