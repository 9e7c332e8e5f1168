/** A program without Effect: `npx tsx examples/keymesh.ts` */
import { adapter as httpAdapter } from "effect-keymesh/Http"
import { createKeymesh, errorOf, withOptions } from "effect-keymesh/Keymesh"
import { adapter as openaiAdapter } from "effect-keymesh/OpenAi"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Scope from "effect/Scope"
import * as FakeOpenAi from "./support/FakeOpenAi.js"

// Only the fake is made with Effect.
const scope = Effect.runSync(Scope.make())
const fakes = Effect.all([
  FakeOpenAi.make({ keys: { "sk-fake-revoked-51c8": { refuse: "revoked" } } }),
  FakeOpenAi.make({
    handler: ({ key }) => ({
      status: 200,
      body: JSON.stringify({ city: "Vienna", celsius: key === undefined ? 0 : 24 })
    })
  })
])
const [openAi, weatherApi] = await Effect.runPromise(Scope.extend(fakes, scope))

const client = createKeymesh({
  provider: openaiAdapter,
  keys: [{ value: "sk-fake-revoked-51c8", label: "revoked" }, { value: "sk-fake-healthy-62d9", label: "healthy" }],
  strategy: "round-robin",
  circuitBreaker: { threshold: 3, cooldownMs: 30_000 },
  retry: { max: 5, baseMs: 200, jitter: true },
  providerOptions: { baseURL: openAi.baseUrl, timeout: 20_000 }
})

const labels = new Map(client.inspect().keys.map(({ id, label }) => [id, label]))
client.on("key.rotated", ({ from, reason, to }) => {
  console.log(`rotated: ${labels.get(from)} -> ${labels.get(to)}: ${reason}`)
})

const model = "gpt-4o-mini"
const messages = [{ role: "user" as const, content: "hello" }]
const answer = await client.chat.completions.create({ model, messages })
console.log("create: ", answer.choices[0]?.message.content)

process.stdout.write("stream:  ")
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "")
}
console.log()

// The other key is revoked as well; nobody is to wait for a third.
await Effect.runPromise(openAi.set("sk-fake-healthy-62d9", { refuse: "revoked" }))
try {
  await withOptions({ maxWait: 0 }, () => client.chat.completions.create({ model, messages }))
} catch (error) {
  console.log("failed: ", String(error).slice(0, 60), "\n        ", errorOf(client, error)?._tag)
}
for (const { circuitState, failureCount, label } of client.inspect().keys) {
  console.log(`key:      ${label.padEnd(8)} ${circuitState}  ${failureCount} failed`)
}

const weather = createKeymesh({
  provider: httpAdapter({
    baseUrl: weatherApi.baseUrl,
    authHeader: (key) => ({ authorization: `Bearer ${key}` }),
    timeoutMs: 15_000
  }),
  keys: ["sk-fake-weather-73ea"]
})
const { celsius, city } = await weather.get<{ city: string; celsius: number }>("/weather/vienna")
console.log(`http:     ${city}: ${celsius} °C`)

await Promise.all([client.close(), weather.close()])
await Effect.runPromise(Scope.close(scope, Exit.void))
