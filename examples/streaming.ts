/** Streams fail over before their first word, and stop when nobody listens: `npx tsx examples/streaming.ts` */
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Chunk from "effect/Chunk"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import * as Print from "./support/Print.js"

const [limited, healthy] = ["sk-fake-limited-5d10", "sk-fake-healthy-6e21"]

const program = Effect.gen(function*() {
  const fake = yield* FakeOpenAi.make({
    keys: {
      // A stream that answers 200, and then has an error in place of its first word.
      [limited]: { streamError: { after: 0, as: "rateLimited" } },
      [healthy]: { chunkDelayMs: 20 }
    },
    reply: () => "One two three four five six seven eight nine ten."
  })
  const openai = yield* OpenAi.make({
    keys: [{ secret: limited, label: "limited" }, { secret: healthy, label: "healthy" }],
    baseUrl: fake.baseUrl
  })
  const words = openai.stream((client) =>
    client.chat.completions.create({
      model: "gpt-5-mini",
      messages: [{ role: "user", content: "Count to ten." }],
      stream: true
    })
  ).pipe(Stream.map((chunk) => chunk.choices[0]?.delta.content ?? ""), Stream.filter((word) => word !== ""))

  yield* Print.title("Chat completions, word by word: the first key fails unseen")
  yield* Stream.runForEach(words, Print.write)

  yield* Print.title("\nThree words are enough: the request is cancelled, and its key is free again")
  const three = yield* Stream.runCollect(Stream.take(words, 3))
  yield* Print.say(Chunk.join(three, ""))

  yield* Print.title("The Responses API, by the SDK's own helper")
  const deltas = openai.stream((client) => client.responses.stream({ model: "gpt-5-mini", input: "Count to ten." }))
    .pipe(
      Stream.filterMap((event) =>
        event.type === "response.output_text.delta" ? Option.some(event.delta) : Option.none()
      )
    )
  yield* Stream.runForEach(deltas, Print.write)

  yield* fake.idle
  const { inFlight, keys } = yield* openai.pool.snapshot
  yield* Print.say(`\n\n${Print.table(["key", "served", "faults"], keys.map((k) => [k.label, k.successes, k.faults]))}`)
  yield* Print.say(`  ${inFlight} in flight`)
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
