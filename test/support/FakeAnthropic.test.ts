import Anthropic from "@anthropic-ai/sdk"
import { assert, describe, it } from "@effect/vitest"
import OldestAnthropic from "anthropic-oldest"
import * as Effect from "effect/Effect"
import * as FakeAnthropic from "../../examples/support/FakeAnthropic.js"
import { drained, failure } from "./openai.js"

const model = "claude-sonnet-5"
const question = { model, max_tokens: 100, messages: [{ role: "user" as const, content: "good morning" }] }

const clientOf = (fake: FakeAnthropic.FakeAnthropic, apiKey = "sk-ant-alpha") =>
  new Anthropic({ apiKey, baseURL: fake.baseUrl, maxRetries: 0 })

const send = (fake: FakeAnthropic.FakeAnthropic, headers: Record<string, string>, stream = false) =>
  Effect.promise(async () => {
    const body = JSON.stringify({ ...question, stream })
    const response = await fetch(`${fake.origin}/v1/messages`, { method: "POST", headers, body })
    return { status: response.status, headers: response.headers, body: await response.text() }
  })

const version = { "anthropic-version": "2023-06-01" }

describe("a fake Anthropic", () => {
  it.scopedLive("reads keys from either header, and wants a version", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make({ strict: true, keys: { one: {} } })
      const answers = [
        yield* send(fake, { ...version, "x-api-key": "one" }),
        yield* send(fake, { ...version, authorization: "Bearer one" }),
        yield* send(fake, { ...version, "x-api-key": "two" }),
        yield* send(fake, version),
        yield* send(fake, { "x-api-key": "one" })
      ]
      assert.deepStrictEqual(answers.map(({ status }) => status), [200, 200, 401, 401, 400])
      assert.deepStrictEqual(JSON.parse(answers[2]?.body ?? ""), {
        type: "error",
        error: { details: null, type: "authentication_error", message: "invalid x-api-key" }
      })
      assert.strictEqual(answers[0]?.headers.get("request-id"), "req_fake0001")
    }))

  it.scopedLive("streams as the real one does: start, block, ping, deltas, stop", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make()
      const { body, headers } = yield* send(fake, { ...version, "x-api-key": "one" }, true)
      assert.strictEqual(headers.get("content-type"), "text/event-stream; charset=utf-8")
      assert.deepStrictEqual(Array.from(body.matchAll(/^event: (.*)$/gm), ([, name]) => name), [
        "message_start",
        "content_block_start",
        "ping",
        ...Array<string>(4).fill("content_block_delta"),
        "content_block_stop",
        "message_delta",
        "message_stop"
      ])
    }))

  for (const [name, Sdk] of [["1.12", Anthropic], ["0.40", OldestAnthropic]] as const) {
    it.scopedLive(`answers the SDK ${name}`, () =>
      Effect.gen(function*() {
        const fake = yield* FakeAnthropic.make()
        // The calls made here are the same in both versions, although their classes are not.
        const client = new Sdk({ apiKey: "sk-ant-alpha", baseURL: fake.baseUrl }) as Anthropic
        const message = yield* Effect.promise(() => client.messages.create(question))
        assert.strictEqual(message.content[0]?.type === "text" ? message.content[0].text : "", "You said: good morning")
        assert.deepInclude(message.usage, { input_tokens: 3, output_tokens: 6 })
        const text = yield* Effect.promise(() => client.messages.stream(question).finalText())
        assert.strictEqual(text, "You said: good morning")
        const tools = [{
          name: "weather",
          input_schema: { type: "object" as const, properties: { city: { type: "string" } } }
        }]
        const called = yield* Effect.promise(() => client.messages.stream({ ...question, tools }).finalMessage())
        assert.deepInclude(called.content[0], { type: "tool_use", name: "weather", input: { city: "text" } })
        assert.strictEqual(called.stop_reason, "tool_use")
      }))
  }

  it.scopedLive("limits say when they reset, in headers and in refusals", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make({ keys: { one: { limit: { requestsPerMinute: 1 } } } })
      const [first, second] = [
        yield* send(fake, { ...version, "x-api-key": "one" }),
        yield* send(fake, { ...version, "x-api-key": "one" })
      ]
      assert.strictEqual(first?.headers.get("anthropic-ratelimit-requests-remaining"), "0")
      const reset = first?.headers.get("anthropic-ratelimit-requests-reset") ?? ""
      assert.match(reset, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$/)
      assert.closeTo(Date.parse(reset) - Date.now(), 60_000, 5_000)
      assert.strictEqual(second?.status, 429)
      assert.closeTo(Number(second?.headers.get("retry-after")), 60, 5)
    }))

  it.scopedLive("what is stored stays with its owner, and reset forgets it", () =>
    Effect.gen(function*() {
      const fake = yield* FakeAnthropic.make({ groups: { "sk-ant-alpha": "acme", "sk-ant-bravo": "acme" } })
      const { batches } = clientOf(fake).messages
      const { id } = yield* Effect.promise(() => batches.create({ requests: [{ custom_id: "one", params: question }] }))
      const other = clientOf(fake, "sk-ant-bravo").messages.batches
      assert.strictEqual((yield* Effect.promise(() => other.retrieve(id))).request_counts.succeeded, 1)
      const { items } = yield* Effect.promise(() => drained(() => other.results(id)))
      assert.deepStrictEqual(items.map(({ custom_id }) => custom_id), ["one"])
      const stranger = clientOf(fake, "sk-ant-carol").messages.batches
      assert.instanceOf(yield* failure(() => stranger.retrieve(id)), Anthropic.NotFoundError)
      yield* fake.reset
      assert.instanceOf(yield* failure(() => batches.retrieve(id)), Anthropic.NotFoundError)
    }))
})
