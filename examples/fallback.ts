/** When one provider's pool has no key left, another provider's takes over: `npx tsx examples/fallback.ts` */
import * as OpenAiClient from "@effect/ai-openai/OpenAiClient"
import * as OpenAiLanguageModel from "@effect/ai-openai/OpenAiLanguageModel"
import * as LanguageModel from "@effect/ai/LanguageModel"
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as KeymeshError from "effect-keymesh/KeymeshError"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as PooledHttpClient from "effect-keymesh/PooledHttpClient"
import * as presets from "effect-keymesh/presets"
import * as Providers from "effect-keymesh/Providers"
import * as Effect from "effect/Effect"
import * as ExecutionPlan from "effect/ExecutionPlan"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import { main, say } from "./support/Print.js"

const [first, second, other] = ["sk-fake-first-0a91", "sk-fake-second-3d27", "sk-fake-other-77f0"]

/** A pool and the model over it. Built once: a layer in a plan would be built again for each attempt. */
const modelOf = (provider: typeof Providers.openAi, model: string, baseUrl: string, keys: ReadonlyArray<string>) =>
  Effect.gen(function*() {
    const pool = yield* KeyPool.make({ name: provider.name, keys })
    return yield* Layer.build(
      OpenAiLanguageModel.layer({ model }).pipe(
        Layer.provide(OpenAiClient.layer({
          apiUrl: baseUrl,
          transformClient: PooledHttpClient.pooled(pool, provider, { baseUrl })
        })),
        Layer.provide(FetchHttpClient.layer)
      )
    )
  })

const program = Effect.gen(function*() {
  const openAi = yield* FakeOpenAi.make({ reply: () => "OpenAI here." })
  const groq = yield* FakeOpenAi.make({ reply: () => "Groq here." })

  const plan = ExecutionPlan.make(
    {
      provide: yield* modelOf(Providers.openAi, "gpt-5-mini", openAi.baseUrl, [first, second]),
      // Only when the pool has given up: a bad request would be one elsewhere, too.
      while: (error) => Option.isSome(KeymeshError.find(error))
    },
    { provide: yield* modelOf(presets.groq.provider, "gpt-oss-20b", groq.baseUrl, [other]) }
  )
  const ask = LanguageModel.generateText({ prompt: "Who is there?" }).pipe(
    Effect.withExecutionPlan(plan),
    Effect.map(({ text }) => text)
  )

  yield* say(yield* ask)
  yield* openAi.set(first, { refuse: "revoked" })
  yield* say(`one key revoked: ${yield* ask}`)
  yield* openAi.set(second, { refuse: "quota" })
  yield* say(`no key left:     ${yield* ask}`)
})

main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
