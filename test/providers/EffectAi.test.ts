/** `@effect/ai` over pools: its clients take a pooled `HttpClient`, and know nothing of it. */
import * as AnthropicClient from "@effect/ai-anthropic/AnthropicClient"
import * as AnthropicLanguageModel from "@effect/ai-anthropic/AnthropicLanguageModel"
import * as GoogleClient from "@effect/ai-google/GoogleClient"
import * as GoogleLanguageModel from "@effect/ai-google/GoogleLanguageModel"
import * as OpenAiClient from "@effect/ai-openai/OpenAiClient"
import * as OpenAiLanguageModel from "@effect/ai-openai/OpenAiLanguageModel"
import * as AiError from "@effect/ai/AiError"
import * as LanguageModel from "@effect/ai/LanguageModel"
import * as Tool from "@effect/ai/Tool"
import * as Toolkit from "@effect/ai/Toolkit"
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as HttpClient from "@effect/platform/HttpClient"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import { assert, describe } from "@effect/vitest"
import * as Chunk from "effect/Chunk"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Redacted from "effect/Redacted"
import * as Schema from "effect/Schema"
import * as Stream from "effect/Stream"
import { inspect } from "node:util"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as PooledHttpClient from "../../src/http/PooledHttpClient.js"
import * as KeymeshError from "../../src/KeymeshError.js"
import * as KeyPool from "../../src/KeyPool.js"
import { anthropic, gemini, openAi } from "../../src/providers/Providers.js"
import { a, asked, atOnce, b, live, model, secretOf, until } from "../support/openai.js"

const poolOf = (labels: string, settings: Partial<KeyPool.Settings> = {}) =>
  KeyPool.make({
    keys: [...labels].map((label) => ({ secret: secretOf(label), label })),
    floor: false,
    cooldowns: { jitter: 0 },
    ...settings
  })

const both = (labels: string, options: FakeOpenAi.Options = {}, settings: Partial<KeyPool.Settings> = {}) =>
  Effect.gen(function*() {
    const fake = yield* FakeOpenAi.make(options)
    const pool = yield* poolOf(labels, settings)
    const Live = OpenAiLanguageModel.layer({ model }).pipe(
      Layer.provide(OpenAiClient.layer({
        apiUrl: fake.baseUrl,
        // Whoever has one in the settings may leave it there.
        apiKey: Redacted.make("sk-placeholder"),
        transformClient: PooledHttpClient.pooled(pool, openAi)
      })),
      Layer.provide(plain)
    )
    return { fake, pool, Live, held: Effect.map(pool.snapshot, ({ inFlight }) => inFlight) }
  })

/** Answers of the fake repeat tools and formats with no more of them than it reads itself; the real ones repeat all. */
const plain = Layer.map(
  FetchHttpClient.layer,
  (context) =>
    Context.make(
      HttpClient.HttpClient,
      HttpClient.transformResponse(
        Context.get(context, HttpClient.HttpClient),
        Effect.flatMap((response) => {
          if (!(response.headers["content-type"] ?? "").includes("json")) return Effect.succeed(response)
          return Effect.map(response.json, (body) => {
            const whole = Predicate.isRecord(body) && body["object"] === "response"
              ? { ...body, tools: [], text: {} }
              : body
            return HttpClientResponse.fromWeb(
              response.request,
              new Response(JSON.stringify(whole), { status: response.status, headers: response.headers })
            )
          })
        })
      )
    )
)

const limited = { keys: { [a]: { limit: { requestsPerMinute: 1, burst: 1 } } } }

describe("OpenAI", () => {
  live("generateText goes on with another key when one is limited", () =>
    Effect.gen(function*() {
      const { Live, fake, held } = yield* both("ab", limited)
      const texts = yield* Effect.forEach([1, 2, 3], () => LanguageModel.generateText({ prompt: "good morning" })).pipe(
        Effect.provide(Live)
      )
      assert.deepStrictEqual(texts.map(({ text }) => text), Array(3).fill("You said: good morning"))
      assert.strictEqual(yield* asked(fake), "abb")
      assert.strictEqual(yield* held, 0)
    }))

  live(
    "streamText goes on before the first content, and frees the key at its end or when it is left",
    () =>
      Effect.gen(function*() {
        const { Live, fake, held } = yield* both(
          "ab",
          { keys: { [a]: { streamError: { after: 0, as: "overloaded" } }, [b]: { chunkDelayMs: 5 } } },
          atOnce(2)
        )
        const parts = yield* LanguageModel.streamText({ prompt: "good morning" }).pipe(
          Stream.runCollect,
          Effect.provide(Live)
        )
        const text = Chunk.toReadonlyArray(parts).map((part) => part.type === "text-delta" ? part.delta : "").join("")
        assert.strictEqual(text, "You said: good morning")
        assert.strictEqual(yield* asked(fake), "ab")
        yield* until(Effect.map(held, (n) => n === 0))

        yield* fake.set(a, {})
        yield* LanguageModel.streamText({ prompt: "good morning" }).pipe(
          Stream.take(1),
          Stream.runDrain,
          Effect.provide(Live)
        )
        yield* until(Effect.map(held, (n) => n === 0))
      })
  )

  live("generateObject is decoded by its schema", () =>
    Effect.gen(function*() {
      const { Live, fake } = yield* both("ab", { keys: { [a]: { refuse: "revoked" } } })
      const { value } = yield* LanguageModel.generateObject({
        prompt: "one city",
        schema: Schema.Struct({ city: Schema.String, celsius: Schema.Number })
      }).pipe(Effect.provide(Live))
      assert.isString(value.city)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("tools are called, across keys", () =>
    Effect.gen(function*() {
      const Weather = Tool.make("Weather", { parameters: { city: Schema.String }, success: Schema.String })
      const tools = Toolkit.make(Weather)
      const { Live, fake } = yield* both("ab", limited)
      const answers = yield* Effect.forEach(
        [1, 2, 3],
        () => LanguageModel.generateText({ prompt: "the weather?", toolkit: tools })
      ).pipe(
        Effect.provide(Layer.merge(Live, tools.toLayer({ Weather: ({ city }) => Effect.succeed(`sun in ${city}`) })))
      )
      for (const { toolResults } of answers) {
        assert.deepStrictEqual(toolResults.map(({ name }) => name), ["Weather"])
        assert.match(String(toolResults[0]?.result), /^sun in /)
      }
      assert.strictEqual(yield* asked(fake), "abb")
    }))

  live(
    "what the pool gives up on is found in the error of @effect/ai, which shows no key",
    () =>
      Effect.gen(function*() {
        const { Live } = yield* both("ab", {
          keys: { [a]: { refuse: "revoked", echo: true }, [b]: { refuse: "revoked", echo: true } }
        })
        const error = yield* Effect.flip(LanguageModel.generateText({ prompt: "hello" })).pipe(Effect.provide(Live))
        assert.isTrue(AiError.isAiError(error))
        assert.instanceOf(Option.getOrUndefined(KeymeshError.find(error)), KeymeshError.AllKeysExhausted)
        const text = inspect(error, { depth: 20, getters: true }) + JSON.stringify(error) + String(error)
        for (const secret of [a, b]) assert.notInclude(text, secret)
      })
  )

  live("the provider's own refusal is its error, which shows no key", () =>
    Effect.gen(function*() {
      const { Live, fake } = yield* both("ab", {
        keys: { [a]: { models: [], echo: true }, [b]: { models: [], echo: true } }
      })
      const error = yield* Effect.flip(LanguageModel.generateText({ prompt: "hello" })).pipe(Effect.provide(Live))
      assert.strictEqual(error._tag, "HttpResponseError")
      assert.notInclude(inspect(error, { depth: 20, getters: true }) + JSON.stringify(error), a)
      assert.isAtMost((yield* fake.requests).length, 2)
    }))
})

describe("Anthropic", () => {
  live("generateText goes on with another key when one is limited", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({
        handler: ({ headers, path }) => {
          if (path !== "/v1/messages") return undefined
          return headers["x-api-key"] === a
            ? {
              status: 429,
              headers: { "content-type": "application/json", "retry-after": "30" },
              body: JSON.stringify({ type: "error", error: { type: "rate_limit_error", message: "slow down" } })
            }
            : {
              status: 200,
              headers: { "content-type": "application/json" },
              body: JSON.stringify({
                id: "msg_1",
                type: "message",
                role: "assistant",
                model: "claude",
                content: [{ type: "text", text: "hello", citations: null }],
                stop_reason: "end_turn",
                stop_sequence: null,
                container: null,
                context_management: null,
                usage: {
                  input_tokens: 1,
                  output_tokens: 1,
                  cache_creation: null,
                  cache_creation_input_tokens: 0,
                  cache_read_input_tokens: 0,
                  server_tool_use: null,
                  service_tier: "standard"
                }
              })
            }
        }
      })
      const pool = yield* poolOf("ab")
      const Live = AnthropicLanguageModel.layer({ model: "claude-sonnet-4-5" }).pipe(
        Layer.provide(AnthropicClient.layer({
          apiUrl: fake.origin,
          transformClient: PooledHttpClient.pooled(pool, anthropic)
        })),
        Layer.provide(FetchHttpClient.layer)
      )
      const { text } = yield* LanguageModel.generateText({ prompt: "hello" }).pipe(Effect.provide(Live))
      assert.strictEqual(text, "hello")
      assert.deepStrictEqual((yield* fake.requests).map(({ status }) => status), [429, 200])
    }))
})

describe("Google", () => {
  live("generateText goes on with another key when one is limited", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({
        handler: ({ headers, path }) => {
          if (!path.endsWith(":generateContent")) return undefined
          const type = { "content-type": "application/json" }
          return headers["x-goog-api-key"] === a
            ? {
              status: 429,
              headers: type,
              body: JSON.stringify({ error: { code: 429, status: "RESOURCE_EXHAUSTED", message: "slow down" } })
            }
            : {
              status: 200,
              headers: type,
              body: JSON.stringify({
                candidates: [{
                  index: 0,
                  content: { role: "model", parts: [{ text: "hello" }] },
                  finishReason: "STOP"
                }],
                usageMetadata: { promptTokenCount: 1, candidatesTokenCount: 1, totalTokenCount: 2 },
                modelVersion: "gemini-2.5-flash",
                responseId: "r1"
              })
            }
        }
      })
      const pool = yield* poolOf("ab")
      const Live = GoogleLanguageModel.layer({ model: "gemini-2.5-flash" }).pipe(
        Layer.provide(GoogleClient.layer({
          apiUrl: fake.origin,
          transformClient: PooledHttpClient.pooled(pool, gemini)
        })),
        Layer.provide(FetchHttpClient.layer)
      )
      const { text } = yield* LanguageModel.generateText({ prompt: "hello" }).pipe(Effect.provide(Live))
      assert.strictEqual(text, "hello")
      assert.deepStrictEqual((yield* fake.requests).map(({ status }) => status), [429, 200])
    }))
})
