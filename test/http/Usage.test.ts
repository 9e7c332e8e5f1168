import { assert, describe, it } from "@effect/vitest"
import * as Classifier from "../../src/http/Classifier.js"
import * as Usage from "../../src/http/Usage.js"
import * as WaitHint from "../../src/http/WaitHint.js"
import { openAi } from "../../src/providers/Providers.js"
import * as RateLimit from "../../src/RateLimit.js"

describe("Usage", () => {
  it("A1: is read in the words of each provider, the last one counts", () => {
    assert.deepStrictEqual(Usage.read(`{"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}}`), {
      input: 7,
      output: 5
    })
    const begun = Usage.read(`{"message":{"usage":{"input_tokens":31,"output_tokens":1}}}`)
    assert.deepStrictEqual(Usage.read(`{"type":"message_delta","usage":{"output_tokens": 20}}`, begun), {
      input: 31,
      output: 20
    })
    assert.deepStrictEqual(Usage.read(`{"usageMetadata":{"promptTokenCount":3,"candidatesTokenCount":9}}`), {
      input: 3,
      output: 9
    })
  })

  it("A1: what a content says of usage is no usage", () => {
    const content = JSON.stringify({ content: JSON.stringify({ usage: { prompt_tokens: 1e6, completion_tokens: 1 } }) })
    assert.isUndefined(Usage.read(content))
    assert.isFalse(Usage.mentions(JSON.stringify({ content: "hello" })))
  })
})

describe("announced", () => {
  const now = Date.parse("2026-11-22T12:00:00Z")
  /** Until when a key rests whose answer had these headers. */
  const until = (headers: Record<string, string>, tokens: RateLimit.Estimate = { input: 100, maxOutput: 0 }) => {
    const [limits, { leased }] = RateLimit.reserve(RateLimit.empty, tokens, 0)
    const map = WaitHint.headerMap(headers)
    const said = WaitHint.readLimits(map, WaitHint.baseTime(map, now))
    return RateLimit.gate(RateLimit.announced(limits, leased, said, 0), tokens, 0)?.until
  }

  it("A2: each format that says when it opens closes until then", () => {
    const openAiOf = (remaining: string) => ({
      "x-ratelimit-limit-requests": "60",
      "x-ratelimit-remaining-requests": remaining,
      "x-ratelimit-reset-requests": "6m0.5s"
    })
    assert.strictEqual(until(openAiOf("0")), 360_500)
    assert.isUndefined(until(openAiOf("1")))
    const tokens = (remaining: string) => ({
      "x-ratelimit-limit-tokens": "1000",
      "x-ratelimit-remaining-tokens": remaining,
      "x-ratelimit-reset-tokens": "17"
    })
    assert.strictEqual(until(tokens("99")), 17_000)
    assert.isUndefined(until(tokens("100")))
    const anthropic = (dimension: string, remaining: string) => ({
      [`anthropic-ratelimit-${dimension}-limit`]: "1000",
      [`anthropic-ratelimit-${dimension}-remaining`]: remaining,
      [`anthropic-ratelimit-${dimension}-reset`]: "2026-11-22T12:00:41Z",
      date: "Sun, 22 Nov 2026 12:00:01 GMT"
    })
    assert.strictEqual(until(anthropic("requests", "0")), 40_000)
    assert.strictEqual(until(anthropic("input-tokens", "50")), 40_000)
    assert.isUndefined(until(anthropic("output-tokens", "50")))
    assert.strictEqual(
      until({ "x-ratelimit-limit": "10", "x-ratelimit-remaining": "0", "x-ratelimit-reset": `${now / 1000 + 9}` }),
      9_000
    )
    assert.strictEqual(until({ "ratelimit-limit": "10", "ratelimit-remaining": "0", "ratelimit-reset": "5" }), 5_000)
    // Without a reset nobody would know when to come again.
    assert.isUndefined(until({ "x-ratelimit-remaining-req-minute": "0" }))
  })
})

describe("what a refusal counts", () => {
  const unitOf = (error: object) =>
    Classifier.classify(openAi.dialect, { status: 429, headers: {}, body: { error }, now: 0 })?.unit

  it("A3: tokens, days and load are told from requests", () => {
    const said = (message: string) => ({ code: "rate_limit_exceeded", message })
    assert.isUndefined(unitOf(said("Rate limit reached for m on requests per min (RPM): Limit 3, Used 3.")))
    assert.strictEqual(unitOf({ ...said("Slower, please."), type: "tokens" }), "tokens")
    assert.strictEqual(unitOf(said("Rate limit reached for m on tokens per min (TPM): Limit 10000.")), "tokens")
    assert.strictEqual(unitOf(said("Rate limit reached for m on requests per day (RPD): Limit 200.")), "other")
    assert.strictEqual(unitOf({ code: "slow_down", message: "Slow down." }), "other")
    assert.strictEqual(unitOf(said("Too many concurrent requests.")), "concurrency")
    assert.strictEqual(unitOf(said("You have too many requests in flight.")), "concurrency")
  })
})
