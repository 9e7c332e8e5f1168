import { assert, describe, it } from "@effect/vitest"
import { ApiError, GoogleGenAI } from "@google/genai"
import * as Effect from "effect/Effect"
import * as FakeGemini from "../../examples/support/FakeGemini.js"

const model = "gemini-2.5-flash"
const contents = "good morning to you"
const key = "AIza-test-alpha"

const clientOf = (fake: FakeGemini.FakeGemini, apiKey = key) =>
  new GoogleGenAI({ apiKey, vertexai: false, httpOptions: { baseUrl: fake.baseUrl } })

const refusal = (client: GoogleGenAI) =>
  Effect.promise(async () => {
    try {
      await client.models.generateContent({ model, contents })
    } catch (error) {
      if (error instanceof ApiError) return JSON.parse(error.message).error
      throw error
    }
    throw new Error("not refused")
  })

describe("the fake Gemini, as the SDK reads it", () => {
  it.scopedLive("says back what it was told, whole and in words", () =>
    Effect.gen(function*() {
      const fake = yield* FakeGemini.make()
      const { models } = clientOf(fake)
      const whole = yield* Effect.promise(() => models.generateContent({ model, contents }))
      assert.strictEqual(whole.text, "You said: good morning to you")
      assert.strictEqual(whole.usageMetadata?.promptTokenCount, 5)
      const words: Array<string | undefined> = []
      yield* Effect.promise(async () => {
        for await (const chunk of await models.generateContentStream({ model, contents })) words.push(chunk.text)
      })
      assert.deepStrictEqual(words, ["You ", "said: ", "good ", "morning ", "to ", "you"])
    }))

  it.scopedLive("calls functions, reads their results, and fills in schemas", () =>
    Effect.gen(function*() {
      const { models } = clientOf(yield* FakeGemini.make())
      const schema = { type: "OBJECT", properties: { x: { type: "INTEGER" }, y: { type: "string" } } }
      const tools = [{ functionDeclarations: [{ name: "weather", parametersJsonSchema: schema }] }]
      const called = yield* Effect.promise(() => models.generateContent({ model, contents, config: { tools } }))
      assert.deepInclude(called.functionCalls?.[0], { name: "weather", args: { x: 1, y: "text" } })
      const result = { role: "user", parts: [{ functionResponse: { name: "weather", response: { output: "sunny" } } }] }
      const told = yield* Effect.promise(() => models.generateContent({ model, contents: [result], config: { tools } }))
      assert.strictEqual(told.functionCalls, undefined)
      const config = { responseMimeType: "application/json", responseJsonSchema: schema }
      const filled = yield* Effect.promise(() => models.generateContent({ model, contents, config }))
      assert.deepStrictEqual(JSON.parse(filled.text ?? ""), { x: 1, y: "text" })
    }))

  it.scopedLive("refuses in Google's words", () =>
    Effect.gen(function*() {
      const fake = yield* FakeGemini.make()
      const client = clientOf(fake)
      yield* fake.set(key, { refuse: "revoked" })
      assert.deepNestedInclude(yield* refusal(client), {
        code: 400,
        status: "INVALID_ARGUMENT",
        "details[0].reason": "API_KEY_INVALID"
      })
      yield* fake.set(key, { refuse: "quota" })
      assert.match(JSON.stringify(yield* refusal(client)), /"quotaId":"GenerateRequestsPerDayPerProject.*"retryDelay"/)
      yield* fake.set(key, { limit: { requestsPerMinute: 1 } })
      yield* Effect.promise(() => client.models.generateContent({ model, contents }))
      const limited = yield* refusal(client)
      assert.deepInclude(limited, { code: 429, status: "RESOURCE_EXHAUSTED" })
      assert.match(JSON.stringify(limited), /"quotaId":"GenerateRequestsPerMinutePer.*"retryDelay":"[\d.]+s"/)
      yield* fake.set(key, { refuse: "deactivated" })
      assert.include((yield* refusal(client)).message, key)
    }))

  it.scopedLive("keeps files and interactions for those who made them", () =>
    Effect.gen(function*() {
      const fake = yield* FakeGemini.make()
      const [mine, other] = [clientOf(fake), clientOf(fake, "AIza-test-bravo")]
      const file = yield* Effect.promise(() =>
        mine.files.upload({ file: new Blob(["one"]), config: { mimeType: "text/plain" } })
      )
      const name = file.name ?? ""
      const { mimeType, sizeBytes, state } = file
      assert.deepStrictEqual([sizeBytes, mimeType, `${state}`], ["3", "text/plain", "ACTIVE"])
      assert.strictEqual((yield* Effect.promise(() => mine.files.get({ name }))).name, name)
      const error: unknown = yield* Effect.promise(() => other.files.get({ name }).catch((error: unknown) => error))
      assert.instanceOf(error, ApiError)
      assert.strictEqual(error.status, 403)
      const { id, output_text } = yield* Effect.promise(() => mine.interactions.create({ model, input: contents }))
      assert.strictEqual(output_text, "You said: good morning to you")
      assert.strictEqual((yield* Effect.promise(() => mine.interactions.get(id ?? ""))).id, id)
    }))
})
