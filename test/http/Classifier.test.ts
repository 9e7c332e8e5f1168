import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import { readFileSync } from "node:fs"
import type * as Fault from "../../src/Fault.js"
import * as Classifier from "../../src/http/Classifier.js"
import * as Sse from "../../src/http/Sse.js"
import * as WaitHint from "../../src/http/WaitHint.js"
import { dialects } from "../../src/providers/dialects.js"
import { anthropicGrammar, geminiGrammar, genericGrammar, openAiGrammar } from "../../src/providers/grammars.js"
import type { ErrorDialect, StreamGrammar } from "../../src/providers/Provider.js"

interface Entry {
  readonly id: string
  readonly provider: string
  readonly status: number | null
  readonly headers: Record<string, string>
  readonly body: unknown
  readonly now?: string
  readonly thrown?: Thrown
  readonly stream?: { readonly phase: Classifier.Phase }
  readonly expected: {
    readonly category: string
    readonly scope: string
    readonly retryable: boolean
    readonly failover: boolean
    readonly retryAfterMs: number | null
    readonly retryAfterSource: string | null
    readonly perModel?: boolean
    readonly resetAtHint?: string
  }
}

interface Thrown {
  readonly name?: string
  readonly className?: string
  readonly message?: string
  readonly code?: string | number
  readonly cause?: Thrown
}

// The file is of this repository.
const corpus = JSON.parse(readFileSync(new URL("./corpus.json", import.meta.url), "utf8")) as ReadonlyArray<Entry>

const kinds: Record<string, Fault.Kind> = {
  rate_limited: "RateLimited",
  quota_exhausted: "QuotaExhausted",
  auth: "Unauthorized",
  permission: "Forbidden",
  too_large: "TooLarge",
  overloaded: "Overloaded",
  server: "ServerError",
  timeout: "Timeout",
  network: "Network",
  bad_request: "Rejected",
  not_found: "Rejected",
  content_filter: "Rejected"
}
const scopes: Record<string, Fault.Scope> = { "quota-group": "group", model: "provider" }
const names: Record<string, string> = { "azure-openai": "azure", "gemini-vertex": "vertex" }
const defaultNow = Date.UTC(2026, 10, 22, 12)

// A wait of a day from Azure means that the one request is larger than the limit: waiting never helps, and no key of
// the group is to be benched for it.
const exceptions: Record<string, Partial<Record<string, unknown>>> = {
  "azure-429-86400": { kind: "TooLarge", scope: "request", retryable: false, failover: false, perModel: false }
}

const expectedOf = (entry: Entry): object => ({
  kind: kinds[entry.expected.category],
  scope: scopes[entry.expected.scope] ?? entry.expected.scope,
  retryable: entry.expected.retryable,
  failover: entry.expected.failover,
  perModel: entry.expected.perModel ?? entry.expected.scope === "model",
  ...exceptions[entry.id]
})

const essence = (fault: Fault.Fault | undefined): object => ({
  kind: fault?.kind,
  scope: fault?.scope,
  retryable: fault?.retryable,
  failover: fault?.failover,
  perModel: fault?.perModel
})

const dialectOf = (name: string): ErrorDialect => {
  const dialect = dialects[names[name] ?? name]
  if (dialect === undefined) throw new Error(`no dialect ${name}`)
  return dialect
}

const grammarOf = (provider: string): StreamGrammar =>
  provider === "anthropic"
    ? anthropicGrammar
    : provider.startsWith("gemini")
    ? geminiGrammar
    : provider === "generic"
    ? genericGrammar
    : openAiGrammar

const nowOf = (entry: Entry) => entry.now === undefined ? defaultNow : Date.parse(entry.now)

/** An error as the runtime would throw it, its class named as given. */
const revive = (thrown: Thrown): Error => {
  const named = { [thrown.className ?? "Plain"]: class extends Error {} }[thrown.className ?? "Plain"] ?? Error
  const error = new named(thrown.message, thrown.cause === undefined ? {} : { cause: revive(thrown.cause) })
  Object.assign(error, thrown.name === undefined ? {} : { name: thrown.name })
  return Object.assign(error, thrown.code === undefined ? {} : { code: thrown.code })
}

const classify = (
  provider: string,
  status: number,
  body: unknown,
  headers: Record<string, string> = {},
  streaming?: Classifier.Phase
) => Classifier.classify(dialectOf(provider), { status, headers, body, now: defaultNow, streaming })

describe("Classifier, corpus", () => {
  for (const entry of corpus.filter((entry) => entry.status !== null && entry.stream === undefined)) {
    it(`F3: ${entry.id}`, () => {
      const now = nowOf(entry)
      const answer = { status: entry.status ?? 0, headers: entry.headers, body: entry.body, now }
      const hint = WaitHint.fromAnswer(answer)
      assert.deepStrictEqual(
        { waitMillis: hint?.waitMillis ?? null, source: hint?.source ?? null },
        { waitMillis: entry.expected.retryAfterMs, source: entry.expected.retryAfterSource }
      )
      const text = typeof entry.body === "string" ? entry.body : JSON.stringify(entry.body)
      for (const body of [entry.body, text, new TextEncoder().encode(text)]) {
        const fault = Classifier.classify(dialectOf(entry.provider), { ...answer, body })
        assert.deepStrictEqual(essence(fault), expectedOf(entry))
        assert.strictEqual(fault?.waitMillis ?? null, entry.expected.retryAfterMs)
        assert.strictEqual(fault?.provenance, entry.expected.retryAfterMs === null ? "guessed" : "told")
        const reset = entry.expected.resetAtHint
        if (reset !== undefined) assert.strictEqual(fault?.resetMillis, Date.parse(reset) - now)
      }
    })
  }

  for (const entry of corpus.filter((entry) => entry.stream !== undefined)) {
    it(`S2: ${entry.id}`, () => {
      const [events] = Sse.feed(Sse.initial, String(entry.body))
      let phase: Classifier.Phase = "before-content"
      let fault: Fault.Fault | undefined
      for (const event of events) {
        const reading = Sse.firstContent(grammarOf(entry.provider), event)
        if (reading === "content") phase = "after-content"
        if (reading === "error") {
          fault = Classifier.classifyEvent(dialectOf(entry.provider), event, {
            headers: entry.headers,
            now: nowOf(entry),
            streaming: phase
          })
        }
      }
      assert.strictEqual(phase, entry.stream?.phase)
      assert.deepStrictEqual(essence(fault), expectedOf(entry))
      assert.strictEqual(fault?.waitMillis ?? null, entry.expected.retryAfterMs)
      if (phase === "after-content") assert.isFalse(fault?.unprocessed)
      // A stream that was read as a whole.
      const whole = classify(entry.provider, 200, entry.body, entry.headers, entry.stream?.phase)
      assert.deepStrictEqual(essence(whole), expectedOf(entry))
    })
  }

  for (const entry of corpus.filter((entry) => entry.thrown !== undefined)) {
    it(`F3: ${entry.id}`, () => {
      const fault = Classifier.classifyThrown(revive(entry.thrown ?? {}))
      if (entry.expected.category === "cancelled") assert.strictEqual(fault, "cancelled")
      else assert.deepStrictEqual(essence(fault === "cancelled" ? undefined : fault), expectedOf(entry))
    })
  }
})

describe("Classifier, facts about providers", () => {
  type Expected = Partial<
    Pick<
      Fault.Fault,
      "kind" | "scope" | "perModel" | "explicit" | "failover" | "code" | "unprocessed" | "waitMillis" | "resetMillis"
    >
  >
  const openAiError = (code: string | null, message = "x", type = "invalid_request_error") => ({
    error: { message, type, param: null, code }
  })
  const google = (code: number, status: string, message: string, details?: unknown) => ({
    error: { code, message, status, ...(details === undefined ? {} : { details }) }
  })
  const violation = (...quotaIds: ReadonlyArray<string>) => [{
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    violations: quotaIds.map((quotaId) => ({ quotaId }))
  }]
  const reason = (reason: string) => [{ "@type": "type.googleapis.com/google.rpc.ErrorInfo", reason }]
  const claude = (type: string, message: string, details?: unknown) => ({
    type: "error",
    error: { type, message, ...(details === undefined ? {} : { details }) }
  })
  const router = (code: number, message: string, metadata?: unknown) => ({ error: { code, message, metadata } })
  const html = "<!DOCTYPE html><html><body>blocked</body></html>"

  const facts: ReadonlyArray<readonly [string, number, unknown, Expected, Record<string, string>?]> = [
    ["openai", 429, openAiError("project_spend_limit_exceeded", "x", "insufficient_quota"), { kind: "QuotaExhausted" }],
    ["openai", 429, openAiError("organization_spend_limit_exceeded"), { kind: "QuotaExhausted", scope: "group" }],
    ["openai", 429, openAiError(null, "x", "insufficient_quota"), { kind: "QuotaExhausted" }],
    ["openai", 400, openAiError("billing_hard_limit_reached"), {
      kind: "QuotaExhausted",
      code: "billing_hard_limit_reached"
    }],
    ["openai", 401, openAiError("mismatched_organization"), { kind: "Forbidden", scope: "key" }],
    ["openai", 401, openAiError("no_organization"), { kind: "Forbidden" }],
    [
      "openai",
      401,
      openAiError(null, "You have insufficient permissions for this operation. Missing scopes: model.request"),
      {
        kind: "Forbidden",
        scope: "key"
      }
    ],
    ["openai", 401, openAiError(null, "You didn't provide an API key."), { kind: "Unauthorized", explicit: false }],
    ["openai", 401, "", { kind: "Unauthorized", explicit: false, unprocessed: true }],
    ["openai", 403, openAiError("model_not_found", "Project `p` does not have access to model `m`"), {
      kind: "Rejected",
      code: "model_not_found",
      perModel: true,
      scope: "provider"
    }],
    ["openai", 404, openAiError(null, "The model `gpt-4.1-x` does not exist"), {
      kind: "Rejected",
      code: "model_not_found"
    }],
    ["openai", 404, openAiError(null, "No file found with id 'f'"), {
      kind: "Rejected",
      scope: "request",
      perModel: false
    }],
    ["openai", 400, openAiError("moderation_blocked"), { kind: "Rejected", scope: "request" }],
    ["openai", 400, openAiError("x", "max_tokens must be less than or equal to 8192"), { kind: "Rejected" }],
    ["openai", 503, openAiError("slow_down", "x", "rate_limit_error"), { kind: "RateLimited", scope: "group" }],
    ["openai", 500, "{\"error\":{\"message\":\"The ser", { kind: "ServerError", unprocessed: false, failover: false }],
    ["openai", 403, html, { kind: "Forbidden", scope: "provider", failover: false }, { server: "cloudflare" }],
    ["openai", 524, html, { kind: "Timeout", scope: "provider", unprocessed: false }, { server: "cloudflare" }],
    ["openai", 530, html, { kind: "ServerError", scope: "provider" }],
    ["openai", 425, "", { kind: "ServerError", scope: "request" }],
    ["generic", 429, { cloudflare_error: true, error_code: 1015, retry_after: 30 }, {
      kind: "RateLimited",
      scope: "provider",
      failover: false,
      waitMillis: 30_000
    }],
    ["azure", 404, { error: { code: "DeploymentNotFound", message: "The API deployment does not exist." } }, {
      kind: "Rejected",
      code: "model_not_found",
      perModel: true
    }],
    ["azure", 404, { error: { code: "404", message: "Resource not found" } }, { kind: "Rejected", perModel: false }],
    ["azure", 401, { error: { code: "PermissionDenied", message: "The principal lacks the required data action" } }, {
      kind: "Forbidden"
    }],
    ["azure", 429, "", { kind: "RateLimited", scope: "group", perModel: true }],
    ["azure", 429, { error: { code: "429", message: "Rate limit" } }, { kind: "TooLarge", scope: "request" }, {
      "retry-after": "86400"
    }],
    ["azure", 429, { error: { code: "429", message: "Rate limit" } }, { kind: "RateLimited", waitMillis: 86_399_000 }, {
      "retry-after": "86399"
    }],
    ["anthropic", 429, claude("rate_limit_error", "x", { error_code: "contract_spend_limit_reached" }), {
      kind: "QuotaExhausted",
      code: "contract_spend_limit_reached"
    }],
    ["anthropic", 429, claude("rate_limit_error", "x", { error_code: "enforced_spend_limit_reached" }), {
      kind: "QuotaExhausted",
      resetMillis: Date.UTC(2026, 11, 1) - defaultNow
    }],
    ["anthropic", 429, claude("rate_limit_error", "x", null), { kind: "RateLimited", scope: "group", perModel: true }],
    ["anthropic", 400, claude("invalid_request_error", "On hold.", { error_code: "organization_on_hold" }), {
      kind: "Unauthorized",
      scope: "group",
      explicit: true
    }],
    ["anthropic", 400, claude("invalid_request_error", "This organization has been disabled."), {
      kind: "Unauthorized",
      scope: "group"
    }],
    ["anthropic", 400, claude("invalid_request_error", "You have reached your specified API usage limits."), {
      kind: "QuotaExhausted"
    }],
    ["anthropic", 400, claude("invalid_request_error", "max_tokens: 100000 > 8192, which is the maximum allowed"), {
      kind: "Rejected"
    }],
    [
      "anthropic",
      400,
      claude("invalid_request_error", "input length and `max_tokens` exceed context limit: 2 + 2 > 3"),
      {
        kind: "TooLarge"
      }
    ],
    ["anthropic", 409, claude("conflict_error", "x"), { kind: "ServerError", scope: "request" }],
    ["anthropic", 413, html, { kind: "TooLarge", scope: "request" }],
    ["anthropic", 404, claude("not_found_error", "File not found"), { kind: "Rejected", perModel: false }],
    ["anthropic", 401, claude("authentication_error", "Authentication failed"), {
      kind: "Unauthorized",
      explicit: false
    }],
    ["anthropic", 500, claude("overloaded_error", "Overloaded"), { kind: "Overloaded" }],
    ["anthropic", 529, "", { kind: "Overloaded", scope: "provider", unprocessed: true }],
    [
      "gemini",
      429,
      google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", violation("APerMinute", "BPerDay-FreeTier")),
      {
        kind: "QuotaExhausted",
        perModel: true,
        resetMillis: 20 * 3_600_000
      }
    ],
    ["gemini", 429, google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, limit: 0, model: m"), {
      kind: "QuotaExhausted",
      perModel: true
    }],
    ["gemini", 429, google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota, limit: 20"), {
      kind: "RateLimited"
    }],
    ["gemini", 429, [google(429, "RESOURCE_EXHAUSTED", "x", [{ retryDelay: "3s" }])], {
      kind: "RateLimited",
      waitMillis: 3000
    }],
    ["gemini", 429, {
      error: { message: JSON.stringify(google(429, "RESOURCE_EXHAUSTED", "x", violation("XPerDay"))) }
    }, {
      kind: "QuotaExhausted"
    }],
    [
      "gemini",
      400,
      google(400, "INVALID_ARGUMENT", "API key expired. Please renew the API key.", reason("API_KEY_INVALID")),
      {
        kind: "Unauthorized",
        explicit: true,
        code: "API_KEY_INVALID"
      }
    ],
    ["gemini", 400, google(400, "FAILED_PRECONDITION", "The free tier is not available in your country."), {
      kind: "Forbidden",
      scope: "provider",
      failover: false
    }],
    ["gemini", 403, google(403, "PERMISSION_DENIED", "x", reason("API_KEY_SERVICE_BLOCKED")), {
      kind: "Forbidden",
      scope: "key"
    }],
    ["gemini", 403, google(403, "PERMISSION_DENIED", "Your project has been denied access. Contact support."), {
      kind: "Forbidden",
      scope: "group"
    }],
    ["gemini", 403, google(403, "PERMISSION_DENIED", "API has not been used in project 1 before or it is disabled."), {
      kind: "Forbidden",
      scope: "group"
    }],
    ["gemini", 499, google(499, "CANCELLED", "The operation was cancelled."), { kind: "Rejected", scope: "request" }],
    ["gemini", 429, { error: { code: "payment_required", message: "x" } }, { kind: "QuotaExhausted" }],
    ["vertex", 429, google(429, "RESOURCE_EXHAUSTED", "Quota exceeded for online_prediction_requests"), {
      kind: "RateLimited",
      scope: "group"
    }],
    ["openrouter", 402, router(402, "x"), { kind: "RateLimited" }, { "retry-after": "3" }],
    ["openrouter", 402, router(402, "Insufficient credits"), { kind: "QuotaExhausted", scope: "group" }],
    [
      "openrouter",
      403,
      router(403, "Budget", { limit_source: "openrouter_workspace_budget", resets_at: "2026-11-22T13:00:00Z" }),
      {
        kind: "QuotaExhausted",
        scope: "group",
        resetMillis: 3_600_000
      }
    ],
    [
      "openrouter",
      403,
      router(403, "Input was flagged", { reasons: ["violence"], flagged_input: "x", provider_name: "H" }),
      {
        kind: "Rejected",
        scope: "request"
      }
    ],
    ["openrouter", 403, router(403, "Not allowed"), { kind: "Forbidden", scope: "key" }],
    ["openrouter", 429, router(429, "Rate limit exceeded: free-models-per-min"), {
      kind: "RateLimited",
      scope: "group"
    }],
    ["openrouter", 400, router(400, "m/x is not a valid model ID"), { kind: "Rejected", code: "model_not_found" }],
    ["openrouter", 200, { id: "g", choices: [{ finish_reason: "error", error: { code: 502, message: "Down" } }] }, {
      kind: "ServerError",
      perModel: true
    }],
    ["groq", 498, openAiError("capacity_exceeded"), { kind: "Overloaded" }],
    ["groq", 498, "", { kind: "Overloaded" }],
    ["mistral", 422, {
      object: "error",
      message: { detail: [{ loc: ["body"], msg: "field required" }] },
      type: "invalid"
    }, {
      kind: "Rejected"
    }],
    ["mistral", 429, { object: "error", message: "x", type: "service_tier_capacity_exceeded", code: "3505" }, {
      kind: "Overloaded",
      perModel: true
    }],
    ["mistral", 400, { object: "error", message: "Invalid model: m", type: "invalid_model", code: "1500" }, {
      kind: "Rejected",
      code: "model_not_found"
    }],
    ["deepseek", 401, openAiError("invalid_request_error", "Authentication Fails, Your api key: ****1 is invalid"), {
      kind: "Unauthorized",
      explicit: true
    }],
    ["together", 429, { error: { message: "Credit limit exceeded", type: "credit_limit" } }, {
      kind: "QuotaExhausted"
    }],
    ["deepseek", 503, openAiError(null, "Server busy"), { kind: "Overloaded" }],
    ["deepseek", 400, openAiError("invalid_request_error", "Model Not Exist"), {
      kind: "Rejected",
      code: "model_not_found"
    }],
    ["together", 422, openAiError(null, "`inputs` tokens + `max_new_tokens` must be <= 4097"), { kind: "TooLarge" }],
    ["cohere", 400, { message: "too many tokens: size limit exceeded by 10" }, { kind: "TooLarge" }],
    ["cohere", 429, "", { kind: "RateLimited", scope: "key" }],
    ["xai", 400, { code: "Client specified an invalid argument", error: "Incorrect API key provided: xa***x." }, {
      kind: "Unauthorized",
      scope: "key",
      explicit: true
    }],
    ["xai", 403, { code: "x", error: "Your newly created team doesn't have any credits yet." }, {
      kind: "QuotaExhausted"
    }],
    ["xai", 403, { code: "x", error: "Content violates usage guidelines." }, { kind: "Rejected", scope: "request" }],
    ["generic", 503, "reset reason: connection termination", { kind: "Overloaded", unprocessed: false }],
    ["generic", 401, { error: "invalid_token", error_description: "x" }, {
      kind: "Unauthorized",
      code: "invalid_token"
    }],
    ["generic", 403, "", { kind: "Forbidden", scope: "key", failover: true }],
    ["generic", 400, { code: "__proto__" }, { kind: "Rejected" }],
    ["generic", 400, { code: "constructor", type: "toString" }, { kind: "Rejected", code: "constructor" }]
  ]
  for (const [provider, status, body, expected, headers] of facts) {
    it(`F3: ${provider} ${status} ${JSON.stringify({ body, headers }).slice(8, 160)}`, () => {
      const fault = classify(provider, status, body, headers)
      assert.isDefined(fault)
      for (const [field, value] of Object.entries(expected)) {
        assert.strictEqual(fault === undefined ? undefined : Reflect.get(fault, field), value, field)
      }
      if (status >= 400) assert.strictEqual(fault?.status, status)
    })
  }

  it("F3: Gemini's day ends at midnight Pacific, in summer, in winter, and when the clock changes", () => {
    const reset = (now: string) => {
      const fault = Classifier.classify(dialectOf("gemini"), {
        status: 429,
        headers: { date: new Date(now).toUTCString() },
        body: { error: { code: "quota_exceeded" } },
        now: 0
      })
      return new Date(Date.parse(now) + (fault?.resetMillis ?? Number.NaN)).toISOString()
    }
    assert.deepStrictEqual(
      [
        "2026-11-22T12:00:00Z",
        "2026-07-01T06:59:59Z",
        "2026-07-01T07:00:00Z",
        "2026-03-08T09:00:00Z",
        "2026-03-08T11:00:00Z",
        "2026-11-01T08:30:00Z",
        "2026-11-01T10:00:00Z"
      ].map(reset),
      [
        "2026-11-23T08:00:00.000Z",
        "2026-07-01T07:00:00.000Z",
        "2026-07-02T07:00:00.000Z",
        "2026-03-09T07:00:00.000Z",
        "2026-03-09T07:00:00.000Z",
        "2026-11-02T08:00:00.000Z",
        "2026-11-02T08:00:00.000Z"
      ]
    )
  })

  it("F3: a reset that has passed, or is no instant, is none", () => {
    for (const resets_at of ["2026-11-22T11:00:00Z", "2026-11-22T12:00:00Z", "soon", -1, {}]) {
      const fault = classify("openrouter", 403, router(403, "x", { limit_source: "l", resets_at }))
      assert.strictEqual(fault?.kind, "QuotaExhausted")
      assert.isUndefined(fault?.resetMillis)
    }
  })
})

describe("Classifier, successes", () => {
  it("a success that was not read is one, and costs nothing", () => {
    const headers = new Proxy({}, {
      ownKeys: () => assert.fail("the headers of a success are not read")
    })
    assert.isUndefined(Classifier.classify(dialectOf("openrouter"), { status: 200, headers, now: 0 }))
    assert.isUndefined(
      Classifier.classify(dialectOf("generic"), { status: 200, headers, body: { error: "x" }, now: 0 })
    )
    assert.isUndefined(Classifier.classify(dialectOf("openai"), { status: 302, headers, now: 0 }))
  })

  it("H5: a success with an answer in it stays one, whatever it says beside it", () => {
    for (
      const body of [
        { choices: [{ message: { content: "Hi" }, finish_reason: "stop" }], error: null },
        { object: "response", status: "failed", error: { code: "server_error" } },
        { object: "list", data: [] },
        { error: null },
        "error",
        "",
        []
      ]
    ) assert.isUndefined(classify("openrouter", 200, body), JSON.stringify(body))
  })

  it("H5: a stream that was answered with a JSON error is a fault", () => {
    const body = { error: { message: "x", type: "server_error", code: null } }
    assert.strictEqual(classify("openai", 200, body, {}, "before-content")?.kind, "ServerError")
    assert.strictEqual(classify("generic", 200, body, {}, "before-content")?.kind, "ServerError")
    assert.isUndefined(classify("generic", 200, body))
  })
})

describe("Classifier, events", () => {
  const stream = { headers: {}, now: defaultNow, streaming: "before-content" } as const
  const read = (
    provider: string,
    event: string | undefined,
    data: unknown,
    streaming: Classifier.Phase = "before-content"
  ) => Classifier.classifyEvent(dialectOf(provider), { event, data }, { ...stream, streaming })

  it("S2: understands the flat errors of responses, and errors without words", () => {
    const flat = read("openai", "error", {
      type: "error",
      code: "rate_limit_exceeded",
      message: "Please try again in 2s."
    })
    assert.deepInclude({ ...flat }, { kind: "RateLimited", scope: "group", perModel: true, waitMillis: 2000 })
    assert.isUndefined(flat?.status)
    const beside = { choices: [{ delta: { content: "" } }], error: { code: 429, message: "x" } }
    assert.strictEqual(read("openrouter", undefined, beside)?.kind, "RateLimited")
    assert.strictEqual(read("openai", "error", "upstream went away")?.kind, "ServerError")
    assert.strictEqual(read("openai", "error", undefined)?.kind, "ServerError")
    assert.strictEqual(read("openai", "error", { type: "error", code: "invalid_prompt" })?.kind, "Rejected")
    assert.strictEqual(read("gemini", undefined, [{ error: { code: 429, status: "RESOURCE_EXHAUSTED" } }])?.status, 429)
    assert.strictEqual(
      read("groq", undefined, { choices: [], x_groq: { error: "Over capacity" } })?.kind,
      "ServerError"
    )
  })

  it("an event that is no error is no fault", () => {
    assert.isUndefined(read("openai", undefined, { choices: [{ delta: { content: "error" } }] }))
    assert.isUndefined(read("anthropic", "ping", { type: "ping" }))
    assert.isUndefined(read("gemini", undefined, "[DONE]"))
  })

  it("C8: a refusal before content was not processed, after content everything was", () => {
    const data = { type: "error", error: { type: "overloaded_error", message: "Overloaded" } }
    assert.isTrue(read("anthropic", "error", data)?.unprocessed)
    assert.isFalse(read("anthropic", "error", data, "after-content")?.unprocessed)
  })
})

describe("Classifier.classifyThrown", () => {
  const coded = (code: string, name = "Error") => Object.assign(new Error("x"), { code, name })
  const thrown: ReadonlyArray<readonly [string, unknown, Fault.Kind | "cancelled", boolean]> = [
    ["DNS", new TypeError("fetch failed", { cause: coded("ENOTFOUND") }), "Network", true],
    [
      "refused on every address",
      new TypeError("fetch failed", {
        cause: new AggregateError([coded("ECONNREFUSED"), coded("ECONNREFUSED")])
      }),
      "Network",
      true
    ],
    ["a certificate", coded("CERT_HAS_EXPIRED"), "Network", true],
    ["a reset", new TypeError("fetch failed", { cause: coded("ECONNRESET") }), "Network", false],
    ["a broken pipe", coded("EPIPE"), "Network", false],
    ["a browser", new TypeError("Failed to fetch"), "Network", false],
    ["no error at all", undefined, "Network", false],
    ["text", "connection refused", "Network", true],
    [
      "a silent server",
      new TypeError("fetch failed", { cause: coded("UND_ERR_HEADERS_TIMEOUT", "HeadersTimeoutError") }),
      "Timeout",
      false
    ],
    ["a stalled body", coded("UND_ERR_BODY_TIMEOUT"), "Timeout", false],
    ["no connection in time", coded("UND_ERR_CONNECT_TIMEOUT"), "Timeout", true],
    ["the system's timeout", coded("ETIMEDOUT"), "Timeout", false],
    ["Effect's timeout", { _tag: "TimeoutException" }, "Timeout", false],
    [
      "an abort for a timeout",
      Object.assign(new Error("aborted", { cause: new DOMException("x", "TimeoutError") }), {
        name: "AbortError"
      }),
      "Timeout",
      false
    ],
    ["an abort", new DOMException("This operation was aborted", "AbortError"), "cancelled", false],
    [
      "an abort inside",
      new TypeError("fetch failed", { cause: new DOMException("x", "AbortError") }),
      "cancelled",
      false
    ],
    ["an SDK's abort", new Error("Request was aborted."), "cancelled", false],
    [
      "a bad URL",
      Object.assign(new TypeError("Failed to parse URL from x"), { code: "ERR_INVALID_URL" }),
      "Rejected",
      true
    ],
    ["an SDK's refusal", Object.assign(new Error("429 x"), { status: 429 }), "RateLimited", true],
    ["a response inside", { _tag: "ResponseError", response: { status: 503 } }, "Overloaded", true]
  ]
  it.each(thrown)("F3: %s", (_name, error, kind, unprocessed) => {
    const fault = Classifier.classifyThrown(error)
    if (fault === "cancelled") assert.strictEqual(kind, "cancelled")
    else assert.deepStrictEqual({ kind: fault.kind, unprocessed: fault.unprocessed }, { kind, unprocessed })
  })

  it("B5: what this platform's fetch refuses to send is the caller's fault", async () => {
    const locked = new ReadableStream()
    locked.getReader()
    const refused: ReadonlyArray<object> = [
      { method: "POST", body: new ReadableStream() },
      { method: "POST", body: locked, duplex: "half" },
      { method: "GET", body: "x" },
      { method: "CONNECT" },
      { method: "no method" },
      { mode: "navigate" },
      { headers: { "no name": "x" } },
      { referrer: "::::" }
    ]
    for (const init of refused) {
      const error = await fetch("http://127.0.0.1:1", init).then(() => undefined, (error: unknown) => error)
      const fault = Classifier.classifyThrown(error)
      assert.strictEqual(fault === "cancelled" ? fault : fault.kind, "Rejected", String(error))
    }
  })

  it("F3: survives errors that cause themselves, and exotic objects", () => {
    const loop: { cause?: unknown } = {}
    loop.cause = { cause: loop }
    const { proxy, revoke } = Proxy.revocable({}, {})
    revoke()
    const nasty = {
      get name() {
        throw new Error("no")
      },
      get _tag() {
        throw new Error("no")
      },
      errors: proxy
    }
    for (const error of [loop, proxy, nasty, Symbol("x"), 1n, () => 1]) {
      const fault = Classifier.classifyThrown(error)
      assert.strictEqual(fault === "cancelled" ? fault : fault.kind, "Network")
    }
  })

  it.prop("F3: never throws", [FastCheck.anything()], ([error]) => {
    assert.isDefined(Classifier.classifyThrown(error))
  })
})

describe("Classifier, hostile answers", () => {
  it("K1: a code is printable and short, and no credential that was echoed", () => {
    const code = (code: string) => classify("openai", 400, { error: { code, message: "x" } })?.code
    assert.strictEqual(code("a\u0000b\u001b[31m\u00e9c"), "ab[31mc")
    assert.strictEqual(code("x".repeat(500))?.length, 64)
    assert.isUndefined(code("sk-proj-x"))
    assert.isUndefined(code("A1b2C3d4E5f6G7h8I9j0K1l2"))
    const fault = classify("gemini", 403, {
      error: {
        message: "Consumer 'api_key:FAKE-KEY-ECHOED-HERE' has been suspended.",
        details: [{ reason: "CONSUMER_SUSPENDED", metadata: { containerInfo: "api_key:FAKE-KEY-ECHOED-HERE" } }]
      }
    })
    assert.notInclude(JSON.stringify(fault), "FAKE-KEY")
  })

  it("F3: large and deep bodies leave the decision to the status, quickly", () => {
    const bodies = [
      "[".repeat(250_000),
      "[".repeat(125_000) + "]".repeat(125_000),
      "{\"error\":".repeat(20_000) + "1" + "}".repeat(20_000),
      "\"".repeat(250_000),
      `{"error":{"message":"${"wait ".repeat(50_000)}"}}`,
      `{"error":{"message":"${"model ".repeat(40_000)}"}}`,
      `{"error":{"message":"${"try again in 1s".repeat(16_000)}x"}}`,
      "x".repeat(5_000_000),
      "data: {\"a\":1}\n\n".repeat(50_000)
    ]
    // What takes more than a moment takes minutes at such sizes: then the test's time is over.
    for (const body of bodies) assert.strictEqual(classify("openai", 429, body)?.kind, "RateLimited")
    const header = "\"".repeat(50_000)
    assert.strictEqual(classify("openai", 429, "", { ratelimit: header, "retry-after": header })?.kind, "RateLimited")
  })

  it("F3: a body past the limit is not parsed", () => {
    const body = (padding: number) => `{"error":{"code":"insufficient_quota","padding":"${"x".repeat(padding)}"}}`
    assert.strictEqual(classify("openai", 429, body(1000))?.kind, "QuotaExhausted")
    assert.strictEqual(classify("openai", 429, body(300_000))?.kind, "RateLimited")
  })

  const text = FastCheck.oneof(
    FastCheck.string(),
    FastCheck.json(),
    FastCheck.constantFrom("<html>", "{\"error\":", "[[[[", "data: {", "\uFEFF{}", "null", "[DONE]", "1e999")
  )
  const leaf = FastCheck.oneof(
    FastCheck.anything(),
    text,
    FastCheck.constantFrom("429", 429, -1, "PerDay", "9".repeat(400))
  )
  const error = FastCheck.dictionary(
    FastCheck.constantFrom("message", "code", "type", "status", "details", "metadata", "error", "detail", "errors"),
    leaf
  )
  const body = FastCheck.oneof(
    FastCheck.anything(),
    text,
    FastCheck.uint8Array(),
    error,
    error.map((error) => ({ error })),
    error.map((metadata) => ({ error: { metadata, details: [metadata] } })),
    error.map((error) => ({ choices: [{ error }], response: { error } }))
  )
  it.prop(
    "F3: whatever a server answers, there is a fault for a failure, and its waits are sound",
    [
      FastCheck.constantFrom(...Object.values(dialects)),
      FastCheck.oneof(
        FastCheck.integer({ min: 200, max: 599 }),
        FastCheck.double(),
        FastCheck.constantFrom(401, 403, 429, 503)
      ),
      FastCheck.dictionary(
        FastCheck.constantFrom("retry-after", "date", "ratelimit", "www-authenticate", "server"),
        text
      ),
      body,
      FastCheck.oneof(FastCheck.constant(defaultNow), FastCheck.double()),
      FastCheck.constantFrom<Classifier.Phase | undefined>(undefined, "before-content", "after-content")
    ],
    ([dialect, status, headers, body, now, streaming]) => {
      const faults = [
        Classifier.classify(dialect, { status, headers, body, now, streaming }),
        Classifier.classifyEvent(dialect, { event: "error", data: body }, {
          headers,
          now,
          streaming: streaming ?? "before-content"
        })
      ]
      assert.isTrue(!(status >= 400) || faults[0] !== undefined)
      assert.isDefined(faults[1])
      for (const fault of faults) {
        for (const millis of [fault?.waitMillis, fault?.resetMillis]) {
          assert.isTrue(millis === undefined || (Number.isSafeInteger(millis) && millis >= 0), String(millis))
        }
        assert.match(fault?.code ?? "x", /^[\x20-\x7e]{1,64}$/)
      }
    },
    { fastCheck: { numRuns: 1000 } }
  )
})
