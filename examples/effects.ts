/** The methods of an SDK as effects and streams, at the paths of its client: `npx tsx examples/effects.ts` */
import * as Anthropic from "effect-keymesh/Anthropic"
import * as Gemini from "effect-keymesh/Gemini"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import * as FakeAnthropic from "./support/FakeAnthropic.js"
import * as FakeGemini from "./support/FakeGemini.js"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import * as Print from "./support/Print.js"

const [revoked, healthy] = ["sk-fake-revoked-7a19", "sk-fake-healthy-8b20"]
const keys = [{ secret: revoked, label: "revoked" }, { secret: healthy, label: "healthy" }]
const behaviour = { keys: { [revoked]: { refuse: "revoked" } } } as const
const messages = [{ role: "user" as const, content: "hello" }]

const program = Effect.gen(function*() {
  const openai = yield* OpenAi.make({ keys, baseUrl: (yield* FakeOpenAi.make(behaviour)).baseUrl })
  const anthropic = yield* Anthropic.make({ keys, baseUrl: (yield* FakeAnthropic.make(behaviour)).baseUrl })
  const gemini = yield* Gemini.make({ keys, baseUrl: (yield* FakeGemini.make(behaviour)).baseUrl })

  yield* Print.title("A method is an Effect: three providers at once, each with a key that is revoked")
  const [chat, message, content] = yield* Effect.all([
    openai.effects.chat.completions.create({ model: "gpt-5-mini", messages }),
    anthropic.effects.messages.create({ model: "claude-sonnet-5", max_tokens: 64, messages }),
    gemini.effects.models.generateContent({ model: "gemini-2.5-flash", contents: "hello" })
  ], { concurrency: "unbounded" })
  yield* Print.say(`openai:    ${chat.choices[0]?.message.content}`)
  yield* Print.say(`anthropic: ${message.content.map((block) => block.type === "text" ? block.text : "").join("")}`)
  yield* Print.say(`gemini:    ${content.text}`)

  yield* Print.title("With `stream: true`, and by its name at Gemini, it is a Stream; so is a list, over all its pages")
  const chunks = openai.effects.chat.completions.create({ model: "gpt-5-mini", messages, stream: true })
  yield* Stream.runForEach(chunks, (chunk) => Print.write(chunk.choices[0]?.delta.content ?? ""))
  yield* Print.say("")
  const parts = gemini.effects.models.generateContentStream({ model: "gemini-2.5-flash", contents: "hello" })
  yield* Stream.runForEach(parts, (part) => Print.write(part.text ?? ""))
  const models = yield* openai.effects.models.list().pipe(Stream.map(({ id }) => id), Stream.runCollect)
  yield* Print.say(`\n${models.length} models`)

  yield* Print.title("Errors are typed")
  yield* openai.effects.models.retrieve("gpt-nope").pipe(
    Effect.catchTag(
      "ProviderError",
      (error) => Print.say(`${error.fault.kind}: ${error.status} from ${error.provider}`)
    )
  )
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
