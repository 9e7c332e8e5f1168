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
import type * as HttpClient from "@effect/platform/HttpClient"
import { assert, describe } from "@effect/vitest"
import * as Chunk from "effect/Chunk"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { inspect } from "node:util"
import * as FakeAnthropic from "../../examples/support/FakeAnthropic.js"
import * as FakeGemini from "../../examples/support/FakeGemini.js"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type * as FakeProvider from "../../examples/support/FakeProvider.js"
import * as PooledHttpClient from "../../src/http/PooledHttpClient.js"
import * as KeymeshError from "../../src/KeymeshError.js"
import * as KeyPool from "../../src/KeyPool.js"
import type { Provider } from "../../src/providers/Provider.js"
import { anthropic, gemini, openAi } from "../../src/providers/Providers.js"
import { a, asked, atOnce, b, live, model, secretOf, until } from "../support/openai.js"

const poolOf = (labels: string, settings: Partial<KeyPool.Settings> = {}) =>
  KeyPool.make({
    keys: [...labels].map((label) => ({ secret: secretOf(label), label })),
    floor: false,
    cooldowns: { jitter: 0 },
    ...settings
  })

interface Way {
  readonly name: string
  readonly fake: (options: FakeProvider.Options) => Effect.Effect<FakeProvider.FakeProvider, never, Scope.Scope>
  readonly model: (
    apiUrl: string,
    transformClient: (client: HttpClient.HttpClient) => HttpClient.HttpClient
  ) => Layer.Layer<LanguageModel.LanguageModel, never, HttpClient.HttpClient>
  readonly provider: Provider
}

const overOpenAi: Way = {
  name: "OpenAI",
  fake: FakeOpenAi.make,
  model: (apiUrl, transformClient) =>
    Layer.provide(
      OpenAiLanguageModel.layer({ model }),
      // Whoever has a key in the settings may leave it there.
      OpenAiClient.layer({ apiUrl, transformClient, apiKey: Redacted.make("sk-placeholder") })
    ),
  provider: openAi
}

const ways: ReadonlyArray<Way> = [overOpenAi, {
  name: "Anthropic",
  fake: FakeAnthropic.make,
  model: (apiUrl, transformClient) =>
    Layer.provide(
      AnthropicLanguageModel.layer({ model: "claude-sonnet-5" }),
      AnthropicClient.layer({ apiUrl, transformClient })
    ),
  provider: anthropic
}, {
  name: "Google",
  fake: FakeGemini.make,
  model: (apiUrl, transformClient) =>
    Layer.provide(
      GoogleLanguageModel.layer({ model: "gemini-2.5-flash" }),
      GoogleClient.layer({ apiUrl, transformClient })
    ),
  provider: gemini
}]

const both = (
  labels: string,
  options: FakeProvider.Options = {},
  settings: Partial<KeyPool.Settings> = {},
  way: Way = overOpenAi
) =>
  Effect.gen(function*() {
    const fake = yield* way.fake(options)
    const pool = yield* poolOf(labels, settings)
    const Live = Layer.provide(
      way.model(fake.baseUrl, PooledHttpClient.pooled(pool, way.provider)),
      FetchHttpClient.layer
    )
    return { fake, pool, Live, held: Effect.map(pool.snapshot, ({ inFlight }) => inFlight) }
  })

const limited = { keys: { [a]: { limit: { requestsPerMinute: 1, burst: 1 } } } }

for (const way of ways) {
  describe(way.name, () => {
    live("generateText goes on with another key when one is limited", () =>
      Effect.gen(function*() {
        const { Live, fake, held } = yield* both("ab", limited, {}, way)
        const texts = yield* Effect.forEach([1, 2, 3], () => LanguageModel.generateText({ prompt: "good morning" }))
          .pipe(
            Effect.provide(Live)
          )
        assert.deepStrictEqual(texts.map(({ text }) => text), Array(3).fill("You said: good morning"))
        // Where its first answer announces that nothing is left, it is not asked again.
        assert.strictEqual(yield* asked(fake), way.name === "Google" ? "abab" : "abb")
        assert.strictEqual(yield* held, 0)
      }))

    live(
      "streamText goes on before the first content, and frees the key at its end or when it is left",
      () =>
        Effect.gen(function*() {
          const { Live, fake, held } = yield* both(
            "ab",
            { keys: { [a]: { streamError: { after: 0, as: "overloaded" } }, [b]: { chunkDelayMs: 5 } } },
            atOnce(2),
            way
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
        const { Live, fake } = yield* both("ab", { keys: { [a]: { refuse: "revoked" } } }, {}, way)
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
        const { Live, fake } = yield* both("ab", limited, {}, way)
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
        // Where its first answer announces that nothing is left, it is not asked again.
        assert.strictEqual(yield* asked(fake), way.name === "Google" ? "abab" : "abb")
      }))
  })
}

describe("errors", () => {
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
