/** Every way into a pool, each against the fake of its provider, as one table: what holds must hold for all of them. */
import Anthropic from "@anthropic-ai/sdk"
import * as AnthropicClient from "@effect/ai-anthropic/AnthropicClient"
import * as AnthropicLanguageModel from "@effect/ai-anthropic/AnthropicLanguageModel"
import * as GoogleClient from "@effect/ai-google/GoogleClient"
import * as GoogleLanguageModel from "@effect/ai-google/GoogleLanguageModel"
import * as OpenAiClient from "@effect/ai-openai/OpenAiClient"
import * as OpenAiLanguageModel from "@effect/ai-openai/OpenAiLanguageModel"
import * as LanguageModel from "@effect/ai/LanguageModel"
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as HttpClient from "@effect/platform/HttpClient"
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import { GoogleGenAI } from "@google/genai"
import OldestAnthropic from "anthropic-oldest"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import OpenAI from "openai"
import * as FakeAnthropic from "../../examples/support/FakeAnthropic.js"
import * as FakeGemini from "../../examples/support/FakeGemini.js"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type * as FakeProvider from "../../examples/support/FakeProvider.js"
import type { Transport } from "../../src/http/Attempt.js"
import * as PooledHttpClient from "../../src/http/PooledHttpClient.js"
import type { ConfigurationError } from "../../src/KeymeshError.js"
import * as KeyPool from "../../src/KeyPool.js"
import type * as PoolStore from "../../src/PoolStore.js"
import * as AnthropicPool from "../../src/providers/Anthropic.js"
import * as GeminiPool from "../../src/providers/Gemini.js"
import * as Http from "../../src/providers/Http.js"
import * as OpenAiPool from "../../src/providers/OpenAi.js"
import { anthropic, gemini, openAi } from "../../src/providers/Providers.js"
import type { SdkService } from "../../src/providers/SdkService.js"
import type * as Telemetry from "../../src/Telemetry.js"

/** What a way in is opened with. */
export interface Setup {
  readonly fake: FakeProvider.FakeProvider
  readonly keys: KeyPool.Settings["keys"]
  readonly settings?: Omit<Partial<KeyPool.Settings>, "keys">
  /** What really sends. */
  readonly transport?: Transport
  /** The timeout of an SDK's client, in milliseconds. */
  readonly timeout?: number
}

/** A way in that is open: a call for a whole answer, and one that reads a stream to its end. Both can be interrupted. */
export interface Open {
  readonly pool: KeyPool.Service
  readonly ask: Effect.Effect<unknown, unknown>
  readonly stream: (seen: (item: unknown) => void) => Effect.Effect<unknown, unknown>
}

/** A way into a pool. */
export interface WayIn {
  readonly name: string
  /** Whether it is a client of an SDK as plain code uses it, an effect over one, or an HTTP client. */
  readonly kind: "native" | "effect" | "http"
  readonly fake: (options: FakeProvider.Options) => Effect.Effect<FakeProvider.FakeProvider, never, Scope.Scope>
  readonly open: (setup: Setup) => Made<Open>
}

type Made<A> = Effect.Effect<A, ConfigurationError, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore>

const prompt = "good morning to you"
const messages = [{ role: "user" as const, content: prompt }]
const question = { model: "gpt-4o-mini", messages }
const claude = { model: "claude-sonnet-5", max_tokens: 100, messages }
const flash = { model: "gemini-2.5-flash", contents: prompt }

// ---------------------------------------------------------------------------------------------------------------- SDKs

/** An SDK, as plain code uses it and through the service. */
const sdk = <Client>(
  name: string,
  fake: WayIn["fake"],
  make: (setup: Setup) => Made<Omit<SdkService<Client>, "effects">>,
  ask: (client: Client, signal: AbortSignal) => PromiseLike<unknown>,
  streamed: (client: Client, signal: AbortSignal) => PromiseLike<AsyncIterable<unknown>>
): ReadonlyArray<WayIn> => [
  {
    name: `${name}, its client`,
    kind: "native",
    fake,
    open: (setup) =>
      Effect.map(make(setup), ({ client, pool }) => ({
        pool,
        ask: native((signal) => ask(client, signal)),
        stream: (seen) =>
          native(async (signal) => {
            for await (const item of await streamed(client, signal)) seen(item)
          })
      }))
  },
  {
    name: `${name}, use and stream`,
    kind: "effect",
    fake,
    open: (setup) =>
      Effect.map(make(setup), ({ pool, stream, use }) => ({
        pool,
        ask: use(ask),
        stream: (seen) => Stream.runForEach(stream(streamed), (item) => Effect.sync(() => seen(item)))
      }))
  }
]

const native = <A>(f: (signal: AbortSignal) => PromiseLike<A>): Effect.Effect<A, unknown> =>
  Effect.tryPromise({ try: f, catch: (error) => error })

const timeoutOf = (timeout: number | undefined) => timeout === undefined ? {} : { timeout }

// The calls are the same in both ends of the range, although the classes are not.
const sdks: ReadonlyArray<WayIn> = [
  ...sdk<OpenAI>(
    "openai",
    FakeOpenAi.make,
    ({ fake, keys, settings, timeout, transport }) =>
      OpenAiPool.make({
        keys,
        ...settings,
        fetch: transport,
        client: (fetch) =>
          new OpenAI({
            apiKey: "unused",
            organization: null,
            project: null,
            baseURL: fake.baseUrl,
            fetch,
            ...timeoutOf(timeout)
          })
      }),
    (client, signal) => client.chat.completions.create(question, { signal }),
    (client, signal) => client.chat.completions.create({ ...question, stream: true }, { signal })
  ),
  ...[Anthropic, OldestAnthropic as unknown as typeof Anthropic].flatMap((Sdk) =>
    sdk<Anthropic>(
      Sdk === Anthropic ? "anthropic" : "anthropic 0.40",
      FakeAnthropic.make,
      ({ fake, keys, settings, timeout, transport }) =>
        AnthropicPool.make({
          keys,
          ...settings,
          fetch: transport,
          client: (fetch) =>
            new Sdk({ apiKey: "unused", authToken: null, baseURL: fake.baseUrl, fetch, ...timeoutOf(timeout) })
        }),
      (client, signal) => client.messages.create(claude, { signal }),
      (client, signal) => client.messages.create({ ...claude, stream: true }, { signal })
    )
  ),
  ...sdk<GoogleGenAI>(
    "gemini",
    FakeGemini.make,
    ({ fake, keys, settings, timeout, transport }) =>
      GeminiPool.make({
        keys,
        ...settings,
        fetch: transport,
        client: (fetch) =>
          new GoogleGenAI({
            apiKey: "unused",
            vertexai: false,
            httpOptions: { baseUrl: fake.baseUrl, fetch, ...timeoutOf(timeout) }
          })
      }),
    (client, signal) => client.models.generateContent({ ...flash, config: { abortSignal: signal } }),
    (client, signal) => client.models.generateContentStream({ ...flash, config: { abortSignal: signal } })
  )
]

// ---------------------------------------------------------------------------------------------------------------- HTTP

/** A refusal is an answer here: all that it shows is taken along, and what the ecosystem makes of it. */
const refused = (response: HttpClientResponse.HttpClientResponse) =>
  Effect.gen(function*() {
    const text = yield* Effect.merge(response.text)
    const filtered = yield* Effect.flip(HttpClientResponse.filterStatusOk(response))
    return yield* Effect.fail({ status: response.status, headers: response.headers, text, filtered })
  })

const isOk = ({ status }: { readonly status: number }) => status >= 200 && status < 300

const overClient = (pool: KeyPool.Service, client: HttpClient.HttpClient, path: string): Open => {
  const send = (stream: boolean) =>
    Effect.flatMap(
      client.execute(HttpClientRequest.bodyUnsafeJson(HttpClientRequest.post(path), { ...question, stream })),
      (response) => isOk(response) ? Effect.succeed(response) : refused(response)
    )
  return {
    pool,
    ask: Effect.flatMap(send(false), (response) => response.json),
    stream: (seen) =>
      Stream.runForEach(
        Stream.unwrap(Effect.map(send(true), (response) => response.stream)),
        (chunk) => Effect.sync(() => seen(chunk))
      )
  }
}

/** A client over a transport. */
const plain = (transport: Transport | undefined): Layer.Layer<HttpClient.HttpClient> =>
  transport === undefined
    ? FetchHttpClient.layer
    // `Transport` takes all that the global `fetch` takes.
    : Layer.provide(FetchHttpClient.layer, Layer.succeed(FetchHttpClient.Fetch, transport as typeof fetch))

const poolOf = ({ keys, settings }: Setup, name: string) => KeyPool.make({ keys, name, ...settings })

const http = (name: string, auth: Http.Auth): ReadonlyArray<WayIn> => {
  const make = ({ fake, keys, settings, transport }: Setup) =>
    Http.make({ keys, ...settings, baseUrl: fake.baseUrl, auth, fetch: transport, replayable: true })
  return [
    {
      name: `http with ${name}, its client`,
      kind: "http",
      fake: FakeOpenAi.make,
      open: (setup) => Effect.map(make(setup), ({ client, pool }) => overClient(pool, client, "/chat/completions"))
    },
    {
      name: `http with ${name}, its fetch`,
      kind: "native",
      fake: FakeOpenAi.make,
      open: (setup) =>
        Effect.map(make(setup), ({ fetch, pool }) => {
          const send = async (signal: AbortSignal, stream: boolean): Promise<Response> => {
            const response = await fetch(`${setup.fake.baseUrl}/chat/completions`, {
              method: "POST",
              headers: { "content-type": "application/json" },
              body: JSON.stringify({ ...question, stream }),
              signal
            })
            if (response.ok) return response
            const { headers, status, statusText, url } = response
            throw { status, statusText, url, headers, text: await response.text() }
          }
          return {
            pool,
            ask: native((signal) => send(signal, false).then((response) => response.json())),
            stream: (seen) =>
              native(async (signal) => {
                const reader = (await send(signal, true)).body?.getReader()
                for (;;) {
                  const read = await reader?.read()
                  if (read === undefined || read.done) return
                  seen(read.value)
                }
              })
          }
        })
    }
  ]
}

const pooledClient: WayIn = {
  name: "an HttpClient",
  kind: "http",
  fake: FakeOpenAi.make,
  open: (setup) =>
    Effect.gen(function*() {
      const pool = yield* poolOf(setup, "openai")
      const below = yield* Effect.provide(HttpClient.HttpClient, plain(setup.transport))
      return overClient(
        pool,
        PooledHttpClient.pooled(pool, openAi)(below),
        `${setup.fake.baseUrl}/chat/completions`
      )
    })
}

// ---------------------------------------------------------------------------------------------------------- @effect/ai

const effectAi = (
  name: string,
  fake: WayIn["fake"],
  model: (
    address: string,
    pooled: (client: HttpClient.HttpClient) => HttpClient.HttpClient
  ) => Layer.Layer<LanguageModel.LanguageModel, never, HttpClient.HttpClient>,
  provider: Parameters<typeof PooledHttpClient.pooled>[1]
): WayIn => ({
  name: `@effect/ai over ${name}`,
  kind: "http",
  fake,
  open: (setup) =>
    Effect.gen(function*() {
      const pool = yield* poolOf(setup, name)
      const Live = Layer.provide(
        model(setup.fake.baseUrl, PooledHttpClient.pooled(pool, provider)),
        plain(setup.transport)
      )
      return {
        pool,
        ask: Effect.provide(LanguageModel.generateText({ prompt }), Live),
        stream: (seen) =>
          Effect.provide(
            Stream.runForEach(LanguageModel.streamText({ prompt }), (part) => Effect.sync(() => seen(part))),
            Live
          )
      }
    })
})

const effectAis: ReadonlyArray<WayIn> = [
  effectAi("openai", FakeOpenAi.make, (apiUrl, transformClient) =>
    Layer.provide(
      OpenAiLanguageModel.layer({ model: "gpt-4o-mini" }),
      OpenAiClient.layer({ apiUrl, transformClient })
    ), openAi),
  effectAi("anthropic", FakeAnthropic.make, (apiUrl, transformClient) =>
    Layer.provide(
      AnthropicLanguageModel.layer({ model: "claude-sonnet-5" }),
      AnthropicClient.layer({ apiUrl, transformClient })
    ), anthropic),
  effectAi("gemini", FakeGemini.make, (apiUrl, transformClient) =>
    Layer.provide(
      GoogleLanguageModel.layer({ model: "gemini-2.5-flash" }),
      GoogleClient.layer({ apiUrl, transformClient })
    ), gemini)
]

/** All of them. */
export const waysIn: ReadonlyArray<WayIn> = [
  ...sdks,
  ...http("a bearer token", "bearer"),
  pooledClient,
  ...effectAis
]
