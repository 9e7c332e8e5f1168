/** Google's own SDK over a pool, in plain code and from Effect: `npx tsx examples/gemini.ts` */
import { ApiError } from "@google/genai"
import * as Gemini from "effect-keymesh/Gemini"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Effect from "effect/Effect"
import * as Stream from "effect/Stream"
import * as FakeGemini from "./support/FakeGemini.js"
import * as Print from "./support/Print.js"

const [revoked, limited, healthy] = ["sk-fake-revoked-9b54", "sk-fake-limited-ac65", "sk-fake-healthy-bd76"]
const model = "gemini-2.5-flash"

const program = Effect.gen(function*() {
  const fake = yield* FakeGemini.make({ keys: { [revoked]: { refuse: "revoked" }, [healthy]: { chunkDelayMs: 20 } } })
  yield* fake.script(limited, [FakeGemini.exceeded({ per: "Minute", waitSeconds: 38, model })])
  // Without `baseUrl` it is the real API.
  const gemini = yield* Gemini.make({
    keys: [
      { secret: revoked, label: "revoked" },
      { secret: limited, label: "limited" },
      { secret: healthy, label: "healthy" }
    ],
    baseUrl: fake.baseUrl
  })

  yield* Print.title("One key is revoked, which Google says with a 400; the next must rest for 38 seconds")
  const answer = yield* gemini.use((client) => client.models.generateContent({ model, contents: "good morning" }))
  yield* Print.say(answer.text ?? "")

  yield* Print.title("A stream, and a chat of the SDK")
  yield* gemini.stream((client) => client.models.generateContentStream({ model, contents: "word by word" })).pipe(
    Stream.runForEach((chunk) => Print.write(chunk.text ?? ""))
  )
  const chat = gemini.client.chats.create({ model })
  const reply = yield* gemini.use(() => chat.sendMessage({ message: "still there?" }))
  yield* Print.say(`\n${reply.text}`)

  yield* Print.title("The errors are the SDK's own")
  const error = yield* Effect.promise(() =>
    gemini.client.models.get({ model: "gemini-nope" }).then(() => undefined, (error: unknown) => error)
  )
  if (error instanceof ApiError) yield* Print.say(`${error.name} ${error.status}`)

  const { at, keys } = yield* gemini.pool.snapshot
  const rows = keys.map(({ closed, faults, label, successes }) => [
    label,
    successes,
    faults,
    closed?.until === undefined ? "ready" : `${closed.fault}, ${Print.howLong(closed.until - at)} left`
  ])
  yield* Print.say(`\n${Print.table(["key", "served", "faults", "state"], rows)}`)
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
