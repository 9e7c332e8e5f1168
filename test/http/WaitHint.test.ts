import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as WaitHint from "../../src/http/WaitHint.js"

const now = Date.UTC(2026, 10, 22, 12)
const wait = (headers: Record<string, unknown>, body: unknown = "", status = 429) =>
  WaitHint.fromAnswer({ status, headers, body, now })
const millis = (headers: Record<string, unknown>, body: unknown = "", status = 429) =>
  wait(headers, body, status)?.waitMillis

describe("WaitHint", () => {
  const retryAfter: ReadonlyArray<readonly [string, number | undefined]> = [
    ["120", 120_000],
    ["0", 0],
    ["0.75", 750],
    ["16.1", 16_100],
    ["0.0001", 1],
    [" 5 ", 5000],
    ["3, 7", 7000],
    ["99999999", 99_999_999_000],
    ["Sun, 22 Nov 2026 12:01:30 GMT", 90_000],
    ["Sunday, 22-Nov-26 12:01:30 GMT", 90_000],
    ["Sun Nov 22 12:01:30 2026", 90_000],
    ["Tue Dec  1 12:00:00 2026", 9 * 86_400_000],
    ["2026-11-22T12:00:30Z", 30_000],
    ["2026-11-22T14:00:30.5+02:00", 30_500],
    ["Wed, 21 Oct 2015 07:28:00 GMT", 0],
    ["Saturday, 22-Nov-75 12:00:00 GMT", Date.UTC(2075, 10, 22, 12) - now],
    ["Saturday, 22-Nov-99 12:00:00 GMT", 0],
    ["-5", undefined],
    ["soon", undefined],
    ["", undefined],
    ["NaN", undefined],
    ["Infinity", undefined],
    ["1e9", undefined],
    ["0x10", undefined],
    ["9".repeat(30), undefined],
    ["9".repeat(5000), undefined],
    ["Sun, 32 Nov 2026 12:01:30 GMT", undefined],
    ["Mon, 30 Feb 2026 12:01:30 GMT", undefined],
    ["Sun, 22 Nov 2026 25:01:30 GMT", undefined],
    ["Sun, 22 Foo 2026 12:01:30 GMT", undefined],
    ["Sun, 22 Nov 2026 12:01:30 PST", undefined]
  ]
  it.each(retryAfter)("F3: retry-after %j is %s ms", (text, expected) => {
    assert.strictEqual(millis({ "retry-after": text }), expected)
  })

  it("F3: an HTTP date in asctime form is GMT in every time zone", () => {
    const zone = process.env.TZ
    process.env.TZ = "Asia/Tokyo"
    try {
      assert.strictEqual(WaitHint.parseHttpDate("Sun Nov 22 12:01:30 2026", now), now + 90_000)
    } finally {
      if (zone === undefined) delete process.env.TZ
      else process.env.TZ = zone
    }
  })

  it("F3: absolute times count from the Date of the answer, not from the clock here", () => {
    const headers = {
      date: "Sun, 22 Nov 2026 09:00:00 GMT",
      "retry-after": "Sun, 22 Nov 2026 09:01:00 GMT"
    }
    assert.strictEqual(millis(headers), 60_000)
    assert.strictEqual(millis({ ...headers, date: "nonsense", "retry-after": "Sun, 22 Nov 2026 12:00:10 GMT" }), 10_000)
    const reset = { "x-ratelimit-remaining": "0", "x-ratelimit-reset": String(Date.UTC(2026, 10, 22, 9, 0, 7) / 1000) }
    assert.strictEqual(millis({ date: headers.date, ...reset }), 7000)
  })

  it("F3: the most exact source wins, and one that says nothing usable gives way to the next", () => {
    const body = {
      error: {
        message: "Please try again in 4s.",
        details: [{ retryDelay: "2s" }],
        metadata: { headers: { "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": String(now + 3000) } }
      }
    }
    const limits = {
      "ratelimit": "\"a\";r=0;t=5",
      "x-ratelimit-remaining-tokens": "0",
      "x-ratelimit-reset-tokens": "6s"
    }
    const steps: Array<Record<string, unknown>> = [
      { "retry-after-ms": "900", "retry-after": "1", ...limits },
      { "retry-after-ms": "-1", "retry-after": "1", ...limits },
      { "retry-after-ms": "junk", "retry-after": "-1", ...limits }
    ]
    assert.deepStrictEqual(steps.map((headers) => wait(headers, body)), [
      { waitMillis: 900, source: "header:retry-after-ms" },
      { waitMillis: 1000, source: "header:retry-after" },
      { waitMillis: 2000, source: "body:RetryInfo" }
    ])
    const { details: _details, ...noInfo } = body.error
    const { metadata: _metadata, ...onlyMessage } = noInfo
    assert.deepStrictEqual([
      wait(limits, { error: noInfo }),
      wait(limits, { error: { ...onlyMessage, retry_after: 3.5 } }),
      wait(limits, { error: onlyMessage }),
      wait(limits, { error: { message: "No." } }),
      wait({ ...limits, ratelimit: "\"a\";r=1;t=5" }, { error: { message: "No." } })
    ], [
      { waitMillis: 3000, source: "body:metadata.headers" },
      { waitMillis: 3500, source: "body:retry_after" },
      { waitMillis: 4000, source: "message" },
      { waitMillis: 5000, source: "header:ratelimit" },
      { waitMillis: 6000, source: "header:reset" }
    ])
  })

  const details: ReadonlyArray<readonly [unknown, number | undefined]> = [
    [{ "@type": "type.googleapis.com/google.rpc.RetryInfo", retryDelay: "34.074824224s" }, 34_075],
    [{ retryDelay: "0s" }, 0],
    [{ retryDelay: { seconds: "34", nanos: 74_824_224 } }, 34_075],
    [{ retryDelay: { seconds: 2 } }, 2000],
    [{ retryDelay: "-3s" }, undefined],
    [{ retryDelay: "" }, undefined],
    [{ retryDelay: 5 }, undefined],
    [{ retryDelay: { seconds: -2 } }, undefined],
    [{ retryDelay: { seconds: {}, nanos: [] } }, undefined],
    ["3s", undefined]
  ]
  it.each(details)("F3: a RetryInfo of %j is %s ms", (detail, expected) => {
    assert.strictEqual(millis({}, { error: { code: 429, details: [detail] } }), expected)
    assert.strictEqual(millis({}, JSON.stringify([{ error: { code: 429, details: [detail] } }])), expected)
  })

  const messages: ReadonlyArray<readonly [string, number | undefined]> = [
    ["Please try again in 1.2s.", 1200],
    ["Please try again in 6m0s.", 360_000],
    ["Please try again in 20ms. Visit the dashboard.", 20],
    ["Please try again in 1h2m3s", 3_723_000],
    ["Please try again in 1m26.4s. Need more tokens?", 86_400],
    ["Please retry in 45.837906927s.", 45_838],
    ["Please retry after 26 seconds.", 26_000],
    ["Rate limited; retry after 1 second", 1000],
    ["Please wait 30 seconds before retrying", 30_000],
    ["please wait at least 2 minutes", 120_000],
    ["Try again in about 5 minutes", 300_000],
    ["Your quota will reset after 18h31m10s.", 66_670_000],
    ["Retry your request after 6 minutes and 30 seconds", 390_000],
    ["Retry-After: 10 seconds", 10_000],
    ["try again in 2 days", 172_800_000],
    ["please wait and try again later", undefined],
    ["limited to 1000 API calls / month", undefined],
    ["Your rate limit is 60 queries per minute", undefined],
    ["Please try again in a moment", undefined],
    ["Please try again in -5s", undefined],
    ["Please try again in " + "9".repeat(400) + "s", undefined],
    ["You will regain access on 2026-12-01 at 00:00 UTC", undefined],
    ["Limit 30000, Used 28770, Requested 1872", undefined]
  ]
  it.each(messages)("F3: the message %j says %s ms", (message, expected) => {
    assert.strictEqual(millis({}, { error: { message } }), expected)
    assert.strictEqual(millis({}, { type: "error", error: { type: "x", message }, request_id: "r" }), expected)
  })

  it("F3: a message is read from a body that does not parse, and from JSON inside a string", () => {
    assert.strictEqual(millis({}, "{\"error\":{\"message\":\"Please try again in 3s. Li"), 3000)
    assert.strictEqual(millis({}, "Too many requests, retry after 3 seconds"), 3000)
    assert.strictEqual(
      millis({}, { error: { message: JSON.stringify({ error: { message: "Please retry in 3s." } }) } }),
      3000
    )
    assert.strictEqual(millis({}, new TextEncoder().encode("{\"message\":\"retry in 3s\"}")), 3000)
  })

  const headers: ReadonlyArray<readonly [string, Record<string, string>, number | undefined]> = [
    ["draft 10", { ratelimit: "\"default\";r=0;t=30" }, 30_000],
    ["draft 10, several", { ratelimit: "\"a\";r=0;t=10, \"b, c;r=0;t=99\";r=0;t=20, \"d\";r=5;t=60" }, 20_000],
    ["draft 10, with a partition key", { ratelimit: "\"u\";r=0;t=7;pk=:dHJpYWwx:" }, 7000],
    ["draft 10, something left", { ratelimit: "\"a\";r=3;t=30" }, undefined],
    ["draft 10, no time", { ratelimit: "\"a\";r=0" }, undefined],
    ["draft 10, negative", { ratelimit: "\"a\";r=0;t=-4" }, undefined],
    ["draft 7", { ratelimit: "limit=100, remaining=0, reset=17" }, 17_000],
    ["draft 7, something left", { ratelimit: "limit=100, remaining=1, reset=17" }, undefined],
    ["draft 3", { "ratelimit-limit": "100", "ratelimit-remaining": "0", "ratelimit-reset": "50" }, 50_000],
    ["Go durations", { "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s" }, 360_000],
    ["the later of two", {
      "x-ratelimit-remaining-requests": "0",
      "x-ratelimit-reset-requests": "1s",
      "x-ratelimit-remaining-tokens": "0",
      "x-ratelimit-reset-tokens": "59.176s"
    }, 59_176],
    ["only the exhausted", {
      "x-ratelimit-remaining-requests": "0",
      "x-ratelimit-reset-requests": "17ms",
      "x-ratelimit-remaining-tokens": "9",
      "x-ratelimit-reset-tokens": "59s"
    }, 17],
    ["a family of its own", {
      "x-ratelimit-remaining-tokens_usage_based": "0",
      "x-ratelimit-reset-tokens_usage_based": "1h2m3s"
    }, 3_723_000],
    ["integer seconds", { "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "10" }, 10_000],
    ["sentinels", {
      "x-ratelimit-limit-tokens": "-1",
      "x-ratelimit-remaining-tokens": "-1",
      "x-ratelimit-reset-tokens": "0"
    }, undefined],
    ["a limit of -1", {
      "x-ratelimit-limit-tokens": "-1",
      "x-ratelimit-remaining-tokens": "0",
      "x-ratelimit-reset-tokens": "5"
    }, undefined],
    ["Mistral names no reset", { "x-ratelimit-remaining-req-minute": "0" }, undefined],
    ["unix seconds", { "x-ratelimit-remaining": "0", "x-ratelimit-reset": String(now / 1000 + 60) }, 60_000],
    ["unix milliseconds", { "x-ratelimit-remaining": "0", "x-ratelimit-reset": String(now + 61) }, 61],
    ["an instant in the past", { "x-ratelimit-remaining": "0", "x-ratelimit-reset": "1700000000" }, 0],
    ["a reset alone", { "x-rate-limit-reset": "45" }, 45_000],
    ["no instant at all", { "x-ratelimit-remaining": "0", "x-ratelimit-reset": "999999999999999999" }, undefined],
    ["Anthropic", {
      "anthropic-ratelimit-requests-remaining": "4",
      "anthropic-ratelimit-requests-reset": "2026-11-22T13:00:00Z",
      "anthropic-ratelimit-input-tokens-remaining": "0",
      "anthropic-ratelimit-input-tokens-reset": "2026-11-22T12:00:41Z"
    }, 41_000],
    ["Anthropic's subscriptions", {
      "anthropic-ratelimit-unified-status": "rejected",
      "anthropic-ratelimit-unified-5h-status": "rejected",
      "anthropic-ratelimit-unified-5h-reset": String(now / 1000 + 3600),
      "anthropic-ratelimit-unified-7d-status": "allowed",
      "anthropic-ratelimit-unified-7d-reset": String(now / 1000 + 86_400),
      "anthropic-ratelimit-unified-overage-status": "rejected",
      "anthropic-ratelimit-unified-overage-reset": String(now / 1000 + 999_999)
    }, 3_600_000],
    ["Anthropic's single reset", { "anthropic-ratelimit-unified-reset": String(now / 1000 + 5) }, 5000]
  ]
  it.each(headers)("F3: limit headers, %s", (_name, headers, expected) => {
    assert.strictEqual(millis(headers), expected)
    const upper = Object.fromEntries(Object.entries(headers).map(([name, value]) => [name.toUpperCase(), value]))
    assert.strictEqual(millis(upper), expected)
    assert.strictEqual(WaitHint.fromAnswer({ status: 429, headers: new Headers(headers), now })?.waitMillis, expected)
  })

  it("F3: a reset without a count means nothing on an answer that is no refusal", () => {
    assert.strictEqual(millis({ "x-ratelimit-reset": "45" }, "", 500), undefined)
    assert.strictEqual(millis({ "x-ratelimit-reset-tokens": "45s" }), undefined)
  })

  it("reads what limits are announced", () => {
    const map = WaitHint.headerMap({
      "X-RateLimit-Limit-Requests": "500",
      "X-RateLimit-Remaining-Requests": "499",
      "X-RateLimit-Reset-Requests": "120ms"
    })
    assert.deepStrictEqual(WaitHint.readLimits(map, now), [
      { name: "requests", limit: 500, remaining: 499, resetMillis: 120, exhausted: false }
    ])
  })

  const names = [
    "retry-after-ms",
    "retry-after",
    "date",
    "ratelimit",
    "ratelimit-remaining",
    "ratelimit-reset",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "anthropic-ratelimit-tokens-remaining",
    "anthropic-ratelimit-tokens-reset",
    "anthropic-ratelimit-unified-reset"
  ]
  const value = FastCheck.oneof(
    FastCheck.string(),
    FastCheck.constantFrom(
      "0",
      "-1",
      "",
      "NaN",
      "Infinity",
      "1e999",
      "9".repeat(400),
      "\"a\";r=0;t=9",
      "1s1s",
      "remaining=0"
    ),
    FastCheck.double().map(String),
    FastCheck.bigInt().map(String),
    FastCheck.date().map((date) => date.toUTCString()),
    FastCheck.date().map((date) => `${Number.isNaN(date.getTime()) ? "?" : date.toISOString()}`),
    FastCheck.tuple(FastCheck.double(), FastCheck.constantFrom("s", "ms", "m", "h", "d", " seconds")).map(([n, u]) =>
      `${n}${u}`
    )
  )
  it.prop(
    "F3: whatever headers and bodies say, a wait is a whole number of milliseconds, never negative",
    [
      FastCheck.dictionary(FastCheck.constantFrom(...names), value),
      FastCheck.oneof(
        FastCheck.anything(),
        FastCheck.json(),
        value.map((text) => ({ error: { message: `try again in ${text}`, details: [{ retryDelay: text }] } })),
        FastCheck.anything().map((reset) => ({
          error: { retry_after: reset, metadata: { headers: { "retry-after": reset } } }
        }))
      ),
      FastCheck.oneof(FastCheck.constant(now), FastCheck.double())
    ],
    ([headers, body, clock]) => {
      const hint = WaitHint.fromAnswer({ status: 429, headers, body, now: clock })
      assert.isTrue(
        hint === undefined || (Number.isSafeInteger(hint.waitMillis) && hint.waitMillis >= 0),
        JSON.stringify(hint)
      )
    },
    { fastCheck: { numRuns: 1000 } }
  )
})
