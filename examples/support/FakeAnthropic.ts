/**
 * A make-believe Anthropic API on 127.0.0.1, for examples and tests. It answers as the real one does on the wire, so the
 * official SDK works against it unchanged:
 *
 * ```ts
 * const fake = yield* FakeAnthropic.make({ keys: { "sk-ant-old": { refuse: "revoked" } } })
 * const client = new Anthropic({ apiKey: "sk-ant-new", baseURL: fake.baseUrl })
 * ```
 *
 * How keys behave (revoked, limited, slow, cut off …) is described in `FakeProvider`. This file has Anthropic's words
 * for errors and limits; its routes and the shapes of their answers are in `FakeAnthropicRoutes`. A key is read from
 * `x-api-key` or as a bearer token, whichever the SDK sends. An outage of 503 or 529 is an overload.
 */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import * as Routes from "./FakeAnthropicRoutes.js"
import * as FakeProvider from "./FakeProvider.js"
import { padded } from "./FakeRoutes.js"

/** A running fake; see `FakeProvider.FakeProvider`. */
export type FakeAnthropic = FakeProvider.FakeProvider

/** What a fake Anthropic can be told at its start. */
export interface Options extends FakeProvider.Options {
  /** What the model says; by default `FakeAnthropicRoutes.sayBack`. */
  readonly reply?: (ask: Routes.Ask) => Routes.Reply
}

/** Starts the server on a free port, until the scope closes. */
export const make = (options: Options = {}): Effect.Effect<FakeAnthropic, never, Scope.Scope> =>
  Effect.gen(function*() {
    const store = yield* Ref.make(Routes.emptyStore)
    return yield* FakeProvider.make(dialect({ store, reply: options.reply ?? Routes.sayBack }), options)
  })

// ---------------------------------------------------------------------------------------------------------------------
// The dialect: keys, refusals, headers
// ---------------------------------------------------------------------------------------------------------------------

const dialect = (backstage: Routes.Backstage): FakeProvider.Dialect => ({
  basePath: "",
  keyOf: (headers) => headers["x-api-key"] ?? /^Bearer\s+(\S.*)$/i.exec(headers["authorization"] ?? "")?.[1],
  modelOf,
  answer: (request, behaviour) =>
    Routes.answer({ ...backstage, request, models: behaviour.models ?? Routes.knownModels }),
  complain,
  render,
  renderInStream: (complaint, request) => [Routes.event({ ...bodyOf(complaint), request_id: requestIdOf(request) })],
  headers: (request) => ({
    "request-id": requestIdOf(request),
    "anthropic-organization-id": `org-${request.group ?? "fake"}`
  }),
  limitHeaders,
  reset: Ref.set(backstage.store, Routes.emptyStore)
})

const complain = (refusal: FakeProvider.Refusal, request: FakeProvider.Incoming): FakeProvider.Complaint => {
  switch (refusal._tag) {
    case "KeyMissing":
      return complaint(401, "authentication_error", "x-api-key header is required")
    case "KeyRefused":
      return refusedKey(refusal.reason)
    case "ModelUnknown":
      return Routes.notFound(`model: ${refusal.model}`)
    case "RateLimited":
      return rateLimited(refusal, request)
    case "Outage":
      return outage(refusal.status)
  }
}

const complaint = (status: number, type: string, message: string): FakeProvider.Complaint => ({
  status,
  type,
  message,
  code: null,
  param: null
})

const refusedKey = (reason: FakeProvider.Reason): FakeProvider.Complaint => {
  switch (reason) {
    case "revoked":
      return complaint(401, "authentication_error", "invalid x-api-key")
    case "deactivated":
      return complaint(400, "invalid_request_error", "This organization has been disabled.")
    case "quota":
      return complaint(
        400,
        "invalid_request_error",
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or " +
          "purchase credits."
      )
    case "forbidden":
      return complaint(
        403,
        "permission_error",
        "Your API key does not have permission to use the specified resource."
      )
    case "region":
      return complaint(403, "forbidden", "Request not allowed")
  }
}

const rateLimited = (
  { limit, quota }: FakeProvider.Refusal & { readonly _tag: "RateLimited" },
  request: FakeProvider.Incoming
): FakeProvider.Complaint => ({
  ...complaint(
    429,
    "rate_limit_error",
    `This request would exceed the rate limit for your organization (org-${request.group ?? "fake"}) of ` +
      `${quota.limit} requests per minute. For details, refer to: https://docs.claude.com/en/api/rate-limits.`
  ),
  headers: limit.says === undefined || limit.says === "all"
    ? { ...limitHeaders(quota), "retry-after": `${Math.ceil(quota.waitMs / 1000)}`, "x-should-retry": "true" }
    : {}
})

const outage = (status: number): FakeProvider.Complaint => {
  switch (status) {
    case 503:
    case 529:
      return { ...complaint(status, "overloaded_error", "Overloaded"), headers: { "x-should-retry": "true" } }
    case 504:
      return complaint(status, "timeout_error", "Request timed out while processing.")
    case 413:
      return complaint(status, "request_too_large", "Request exceeds the maximum size")
    case 402:
      return complaint(status, "billing_error", "There is a problem with your payment information.")
  }
  return { ...complaint(status, "api_error", "Internal server error"), headers: { "x-should-retry": "true" } }
}

/** Statuses that the gateway in front of the API gives, as pages for people. */
const gatewayStatuses: ReadonlyArray<number> = [502, 520, 521, 522, 523, 524]

const bodyOf = ({ code, message, type }: FakeProvider.Complaint) => ({
  type: "error",
  error: { details: code === null ? null : { error_code: code }, type, message }
})

/** The real body names the request, too; this one leaves that to the header. */
const render = (complaint: FakeProvider.Complaint): FakeProvider.Answer => {
  const { headers = {}, message, status } = complaint
  return gatewayStatuses.includes(status)
    ? {
      status,
      headers: { "content-type": "text/html", server: "cloudflare", ...headers },
      body: `<html><head><title>${status}</title></head><body><h1>Error ${status}</h1><p>${message}</p></body></html>`
    }
    : { status, headers, body: JSON.stringify(bodyOf(complaint)) }
}

/** Resets are instants, in whole seconds. */
const limitHeaders = (quota: FakeProvider.Quota): Record<string, string> => ({
  "anthropic-ratelimit-requests-limit": `${quota.limit}`,
  "anthropic-ratelimit-requests-remaining": `${quota.remaining}`,
  "anthropic-ratelimit-requests-reset": Routes.instant(clock.unsafeCurrentTimeMillis() + quota.resetMs + 999)
})

/** A real server needs real time, also in a test whose own clock is virtual. */
const clock = Clock.make()

const requestIdOf = (request: FakeProvider.Incoming): string => `req_fake${padded(request.number)}`

const modelOf = (request: FakeProvider.Incoming): string | undefined =>
  Option.getOrUndefined(
    Schema.decodeUnknownOption(Schema.parseJson(Schema.Struct({ model: Schema.String })))(request.body)
  )?.model
