/** Anthropic's own client over a pool, in promises and in Effect: `npx tsx examples/anthropic.ts` */
import Sdk from "@anthropic-ai/sdk"
import * as Anthropic from "effect-keymesh/Anthropic"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import * as FakeAnthropic from "./support/FakeAnthropic.js"
import * as Print from "./support/Print.js"

const [limited, overloaded, healthy] = ["sk-fake-limited-2c61", "sk-fake-overloaded-5d08", "sk-fake-healthy-9e47"]

const Live = Layer.unwrapScoped(Effect.map(
  FakeAnthropic.make({
    keys: {
      [limited]: { limit: { requestsPerMinute: 1 } },
      // Its streams begin with 200, and break off with an `overloaded_error` before they have said anything.
      [overloaded]: { streamError: { after: 0, as: "overloaded" } }
    }
  }),
  ({ baseUrl }) =>
    Anthropic.layer({
      keys: [
        { secret: limited, label: "limited" },
        { secret: overloaded, label: "overloaded" },
        { secret: healthy, label: "healthy" }
      ],
      baseUrl
    })
)).pipe(Layer.provideMerge(KeyPool.layerDefaults))

const question = {
  model: "claude-sonnet-5",
  max_tokens: 1024,
  messages: [{ role: "user" as const, content: "hello" }]
}

/** Nothing here is of this library: it is the client of the official SDK, whose code need not change. */
const inPromises = async (client: Sdk) => {
  const message = await client.messages.create(question)
  console.log("create:     ", message.content.map((block) => block.type === "text" ? block.text : "").join(""))
  console.log("stream:     ", await client.messages.stream(question).finalText())
  const { input_tokens } = await client.messages.countTokens(question)
  console.log("countTokens:", input_tokens)
  try {
    await client.messages.batches.retrieve("msgbatch_unknown")
  } catch (error) {
    if (error instanceof Sdk.NotFoundError) console.log("its errors: ", error.constructor.name, error.requestID)
  }
}

const program = Effect.gen(function*() {
  const anthropic = yield* Anthropic.Anthropic
  yield* Effect.promise(() => inPromises(anthropic.client))

  // From Effect: streams are `Stream`s, failures are typed, interruption reaches the server.
  const text = yield* anthropic.stream((client) => client.messages.stream(question)).pipe(
    Stream.map((event) =>
      event.type === "content_block_delta" && event.delta.type === "text_delta" ? event.delta.text : ""
    ),
    Stream.mkString
  )
  console.log("as Stream:  ", text)
  yield* anthropic.use((client) => client.messages.create({ ...question, max_tokens: 0 })).pipe(
    Effect.catchTag("ProviderError", (error) => Effect.sync(() => console.log("catchTag:   ", error.message)))
  )

  const { attempts, calls, keys } = yield* anthropic.pool.snapshot
  console.log(`the pool:    ${calls} calls, ${attempts} attempts`)
  for (const { faults, label, successes } of keys) {
    console.log(`             ${label.padEnd(10)}  ${successes} served, ${faults} refused`)
  }
})

Print.main(Effect.provide(program, Live))
