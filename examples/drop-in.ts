/** The SDK's own client, pooled underneath, in a program of plain promises: `npx tsx examples/drop-in.ts` */
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as ManagedRuntime from "effect/ManagedRuntime"
import OpenAI from "openai"
import * as FakeOpenAi from "./support/FakeOpenAi.js"

const [revoked, healthy] = ["sk-fake-revoked-7f32", "sk-fake-healthy-8a43"]

const Live = Layer.unwrapScoped(Effect.map(
  FakeOpenAi.make({ keys: { [revoked]: { refuse: "revoked" }, [healthy]: { models: ["gpt-5-mini"] } } }),
  ({ baseUrl }) => OpenAi.layer({ keys: [revoked, healthy], baseUrl })
)).pipe(Layer.provide(KeyPool.layerDefaults))

// The pool lives as long as the runtime.
const runtime = ManagedRuntime.make(Live)
const { client, pool } = await runtime.runPromise(OpenAi.OpenAi)

const model = "gpt-5-mini"
const messages = [{ role: "user" as const, content: "hello" }]

// From here on nothing is of this library: it is the client of the official SDK, whose code need not change.
const answer = await client.chat.completions.create({ model, messages })
console.log("create:      ", answer.choices[0]?.message.content)

const { response } = await client.chat.completions.create({ model, messages }).withResponse()
console.log("withResponse:", response.status, response.headers.get("x-request-id"))

process.stdout.write("stream:       ")
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "")
}

const ids: Array<string> = []
for await (const { id } of client.models.list()) ids.push(id)
console.log(`\nmodels.list:  ${ids.length} models`)

try {
  await client.chat.completions.create({ model: "no-such-model", messages })
} catch (error) {
  if (error instanceof OpenAI.NotFoundError) console.log("its errors:  ", error.constructor.name, error.code)
}

const { attempts, calls } = await runtime.runPromise(pool.snapshot)
console.log(`the pool:     ${calls} calls, ${attempts} attempts`)
await runtime.dispose()
