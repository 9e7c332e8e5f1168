/**
 * A make-believe Gemini API on 127.0.0.1, for examples and tests. It answers as the real one does on the wire, so the
 * official SDK works against it unchanged:
 *
 * ```ts
 * const fake = yield* FakeGemini.make({ keys: { "AIza-old": { refuse: "revoked" } } })
 * const client = new GoogleGenAI({ apiKey: "AIza-new", httpOptions: { baseUrl: fake.baseUrl } })
 * ```
 *
 * How keys behave (revoked, limited, slow, cut off …) is described in `FakeProvider`. This file has Google's words for
 * errors; the routes and the shapes of their answers are in `FakeGeminiRoutes`. As the real one, it never says in a
 * header how long to wait: that stands in the body.
 */
import * as Effect from "effect/Effect"
import * as Ref from "effect/Ref"
import type * as Scope from "effect/Scope"
import * as Routes from "./FakeGeminiRoutes.js"
import * as FakeProvider from "./FakeProvider.js"

/** A running fake; see `FakeProvider.FakeProvider`. */
export type FakeGemini = FakeProvider.FakeProvider

/** What a fake Gemini can be told at its start. */
export interface Options extends FakeProvider.Options {
  /** What the model says; by default `FakeGeminiRoutes.sayBack`. */
  readonly reply?: (ask: Routes.Ask) => Routes.Reply
}

/** Starts the server on a free port, until the scope closes. */
export const make = (options: Options = {}): Effect.Effect<FakeGemini, never, Scope.Scope> =>
  Effect.gen(function*() {
    const store = yield* Ref.make(Routes.emptyStore)
    return yield* FakeProvider.make(dialect({ store, reply: options.reply ?? Routes.sayBack }), options)
  })

/** An answer that refuses for a violated quota, and says how long to wait; for `script` and `handler`. */
export const exceeded = (quota: {
  readonly model?: string
  readonly per: "Minute" | "Day"
  readonly limit?: number
  readonly waitSeconds?: number
}): FakeProvider.Answer => render(quotaExceeded(quota))

// ---------------------------------------------------------------------------------------------------------------------
// The dialect: keys and refusals
// ---------------------------------------------------------------------------------------------------------------------

const dialect = (backstage: Routes.Backstage): FakeProvider.Dialect => ({
  // The SDK puts the version of the API behind it.
  basePath: "",
  keyOf: (headers) => headers["x-goog-api-key"],
  modelOf,
  answer: (request, behaviour) =>
    Routes.answer({ ...backstage, request, models: behaviour.models ?? Routes.knownModels }),
  complain,
  render,
  renderInStream: (complaint) => [{ text: `data: ${JSON.stringify(bodyOf(complaint))}\r\n\r\n` }],
  headers: (_, tookMs) => ({
    "server-timing": `gfet4t7; dur=${Math.round(tookMs)}`,
    server: "scaffolding on HTTPServer2"
  }),
  limitHeaders: () => ({}),
  reset: Ref.set(backstage.store, Routes.emptyStore)
})

const complain = (refusal: FakeProvider.Refusal, request: FakeProvider.Incoming): Routes.Complaint => {
  switch (refusal._tag) {
    case "KeyMissing":
      return Routes.complaint(
        403,
        "PERMISSION_DENIED",
        "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or " +
          "other form of API consumer identity to call this API."
      )
    case "KeyRefused":
      return refusedKey(refusal.reason, request)
    case "ModelUnknown":
      return Routes.modelUnknown(refusal.model)
    case "RateLimited": {
      const { limit, quota } = refusal
      return quotaExceeded({
        model: modelOf(request) ?? "gemini-2.5-flash",
        per: "Minute",
        limit: quota.limit,
        ...(limit.says === "nothing" ? {} : { waitSeconds: quota.waitMs / 1_000 })
      })
    }
    case "Outage":
      return outage(refusal.status)
  }
}

const refusedKey = (reason: FakeProvider.Reason, request: FakeProvider.Incoming): Routes.Complaint => {
  switch (reason) {
    case "revoked":
      return Routes.complaint(
        400,
        "INVALID_ARGUMENT",
        "API key not valid. Please pass a valid API key.",
        "API_KEY_INVALID"
      )
    case "deactivated":
      // The real one echoes the key, here and in the metadata.
      return Routes.complaint(
        403,
        "PERMISSION_DENIED",
        `Permission denied: Consumer 'api_key:${request.key}' has been suspended.`,
        "CONSUMER_SUSPENDED",
        [reasonOf("CONSUMER_SUSPENDED", { containerInfo: `api_key:${request.key}`, consumer: "projects/1" })]
      )
    case "quota":
      return quotaExceeded({ model: modelOf(request) ?? "gemini-2.5-flash", per: "Day", limit: 250, waitSeconds: 36 })
    case "forbidden":
      return Routes.complaint(
        403,
        "PERMISSION_DENIED",
        "Requests to this API generativelanguage.googleapis.com method are blocked.",
        "API_KEY_SERVICE_BLOCKED"
      )
    case "region":
      return Routes.complaint(
        400,
        "FAILED_PRECONDITION",
        "User location is not supported for the API use."
      )
  }
}

const quotaExceeded = (
  { limit = 10, model = "gemini-2.5-flash", per, waitSeconds }: Parameters<typeof exceeded>[0]
): Routes.Complaint => {
  const metric = "generativelanguage.googleapis.com/generate_content_free_tier_requests"
  const hint = waitSeconds === undefined ? "" : `\nPlease retry in ${waitSeconds}s.`
  return Routes.complaint(
    429,
    "RESOURCE_EXHAUSTED",
    "You exceeded your current quota, please check your plan and billing details. For more information on this " +
      "error, head to: https://ai.google.dev/gemini-api/docs/rate-limits.\n" +
      `* Quota exceeded for metric: ${metric}, limit: ${limit}, model: ${model}${hint}`,
    null,
    [
      {
        "@type": "type.googleapis.com/google.rpc.QuotaFailure",
        violations: [{
          quotaMetric: metric,
          quotaId: `GenerateRequestsPer${per}PerProjectPerModel-FreeTier`,
          quotaDimensions: { location: "global", model },
          quotaValue: `${limit}`
        }]
      },
      ...(waitSeconds === undefined
        ? []
        : [{ "@type": "type.googleapis.com/google.rpc.RetryInfo", retryDelay: `${waitSeconds}s` }])
    ]
  )
}

const outage = (status: number): Routes.Complaint => {
  switch (status) {
    case 503:
      return Routes.complaint(status, "UNAVAILABLE", "The model is overloaded. Please try again later.")
    case 504:
      return Routes.complaint(status, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete.")
    case 401:
      return Routes.complaint(status, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
    default:
      return Routes.complaint(
        status,
        "INTERNAL",
        "An internal error has occurred. Please retry or report in " +
          "https://developers.generativeai.google/guide/troubleshooting"
      )
  }
}

const render = (complaint: FakeProvider.Complaint): FakeProvider.Answer => ({
  status: complaint.status,
  headers: { "content-type": "application/json; charset=UTF-8", ...complaint.headers },
  body: JSON.stringify(bodyOf(complaint), null, 2)
})

const bodyOf = (complaint: FakeProvider.Complaint | Routes.Complaint): object => {
  const { code, message, status, type } = complaint
  const given = "details" in complaint ? complaint.details ?? [] : []
  const details = given.length > 0 || code === null ? given : [reasonOf(code, {})]
  return { error: { code: status, message, status: type, ...(details.length > 0 ? { details } : {}) } }
}

const reasonOf = (reason: string, metadata: object) => ({
  "@type": "type.googleapis.com/google.rpc.ErrorInfo",
  reason,
  domain: "googleapis.com",
  metadata: { service: "generativelanguage.googleapis.com", ...metadata }
})

const modelOf = (request: FakeProvider.Incoming): string | undefined =>
  /\/models\/([^/:]+):/.exec(request.path)?.[1] ?? /"(?:model|agent)"\s*:\s*"([^"]+)"/.exec(request.body)?.[1]
