/** `@effect/ai` over a pool: its client takes a pooled `HttpClient`: `npx tsx examples/effect-ai.ts` */
import * as OpenAiClient from "@effect/ai-openai/OpenAiClient"
import * as OpenAiLanguageModel from "@effect/ai-openai/OpenAiLanguageModel"
import * as LanguageModel from "@effect/ai/LanguageModel"
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as PooledHttpClient from "effect-keymesh/PooledHttpClient"
import * as Providers from "effect-keymesh/Providers"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import { main, say, write } from "./support/Print.js"

const [limited, healthy] = ["sk-fake-limited-1c44", "sk-fake-healthy-5b90"]

/** Knows of models, not of keys. */
const talk = Effect.gen(function*() {
  for (const word of ["one", "two", "three"]) {
    const { text } = yield* LanguageModel.generateText({ prompt: word })
    yield* say(text)
  }
  yield* LanguageModel.streamText({ prompt: "word by word" }).pipe(
    Stream.runForEach((part) => part.type === "text-delta" ? write(part.delta) : Effect.void)
  )
  yield* say("")
})

const program = Effect.gen(function*() {
  const fake = yield* FakeOpenAi.make({ keys: { [limited]: { limit: { requestsPerMinute: 1, burst: 1 } } } })
  const pool = yield* KeyPool.make({
    name: "openai",
    keys: [{ secret: limited, label: "limited" }, { secret: healthy, label: "healthy" }]
  })
  const Model = OpenAiLanguageModel.layer({ model: "gpt-5-mini" }).pipe(
    Layer.provide(OpenAiClient.layer({
      apiUrl: fake.baseUrl,
      transformClient: PooledHttpClient.pooled(pool, Providers.openAi, { baseUrl: fake.baseUrl })
    })),
    Layer.provide(FetchHttpClient.layer)
  )
  yield* talk.pipe(Effect.provide(Model))
  for (const { faults, label, successes } of (yield* pool.snapshot).keys) {
    yield* say(`${label}: ${successes} served, ${faults} ${faults === 1 ? "fault" : "faults"}`)
  }
})

main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
