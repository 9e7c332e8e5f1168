/** Providers that speak OpenAI's language, as data under the OpenAI adapter. */
import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type { Transport } from "../../src/http/Attempt.js"
import * as OpenAi from "../../src/providers/OpenAi.js"
import * as presets from "../../src/providers/presets.js"
import { a, asked, atOnce, b, chat, live, said } from "../support/openai.js"

const { azure, make: _, ...fixed } = presets
const all: ReadonlyArray<presets.Preset> = [...Object.values(fixed), azure("https://mine.openai.azure.com/")]

describe("a preset", () => {
  it("has an address that keys may go to, and a name of its own", () => {
    assert.lengthOf(all, 11)
    assert.lengthOf([...new Set(all.map(({ provider }) => provider.name))], 11)
    for (const { baseUrl } of all) assert.match(baseUrl, /^(?:https:\/\/[\w.]+|http:\/\/127\.0\.0\.1:\d+)\/[\w/]*\w$/)
  })

  for (const preset of all) {
    live(`${preset.provider.name}: the adapter goes there, and rotates`, () =>
      Effect.gen(function*() {
        const sent: Array<string> = []
        const fetch: Transport = (input, init) => {
          const headers = new Headers(init?.headers)
          sent.push(`${input} ${headers.get("authorization") ?? headers.get("api-key")}`)
          const ok = sent.length > 1
          const body = ok ? { choices: [{ message: { content: said } }] } : { error: { message: "slow down" } }
          const headersOf = { "content-type": "application/json" }
          return Promise.resolve(new Response(JSON.stringify(body), { status: ok ? 200 : 429, headers: headersOf }))
        }
        const openai = yield* OpenAi.make({ ...preset, keys: [a, b], fetch, ...atOnce(2) })
        assert.strictEqual(openai.pool.name, preset.provider.name)
        const answer = yield* openai.use((client) => chat(client))
        assert.strictEqual(answer.choices[0]?.message.content, said)
        const how = preset.provider.name === "azure" ? "" : "Bearer "
        assert.deepStrictEqual(sent, [a, b].map((key) => `${preset.baseUrl}/chat/completions ${how}${key}`))
      }))
  }

  live("H5: OpenRouter's success that is an error goes on with another key", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      yield* fake.script(a, [{
        status: 200,
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ error: { code: 502, message: "Provider returned error" } })
      }])
      const openai = yield* OpenAi.make({ ...presets.openRouter, baseUrl: fake.baseUrl, keys: [a, b], ...atOnce(2) })
      assert.strictEqual((yield* openai.use((client) => chat(client))).choices[0]?.message.content, said)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("Azure: each key goes to its own resource", () =>
    Effect.gen(function*() {
      const sent: Array<string> = []
      const fetch: Transport = (input, init) => {
        sent.push(`${input} ${new Headers(init?.headers).get("api-key")}`)
        const headers = { "content-type": "application/json" }
        return Promise.resolve(new Response(JSON.stringify({ choices: [] }), { headers }))
      }
      const other = azure("https://other.openai.azure.com")
      const openai = yield* OpenAi.make({
        ...azure("https://mine.openai.azure.com"),
        keys: [a, { secret: b, baseUrl: other.baseUrl }],
        fetch
      })
      yield* openai.use((client) => chat(client))
      yield* openai.use((client) => chat(client))
      assert.deepStrictEqual(sent, [
        `https://mine.openai.azure.com/openai/v1/chat/completions ${a}`,
        `https://other.openai.azure.com/openai/v1/chat/completions ${b}`
      ])
    }))
})
