/**
 * A make-believe OpenAI API on 127.0.0.1, for examples and tests. It answers as the real one does on the wire, so the
 * official SDK works against it unchanged:
 *
 * ```ts
 * const fake = yield* FakeOpenAi.make({ keys: { "sk-old": { refuse: "revoked" } } })
 * const client = new OpenAI({ apiKey: "sk-new", baseURL: fake.baseUrl })
 * ```
 *
 * How keys behave (revoked, limited, slow, cut off …) is described in `FakeProvider`. This file has OpenAI's words for
 * errors and limits; its routes and the shapes of their answers are in `FakeOpenAiRoutes`. Nothing is generated: it
 * says back what it was told, unless `reply` says otherwise. Ids count up, so two runs give the same ones.
 */
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import * as Routes from "./FakeOpenAiRoutes.js"
import * as FakeProvider from "./FakeProvider.js"
import { padded } from "./FakeRoutes.js"

/** A running fake; see `FakeProvider.FakeProvider`. */
export type FakeOpenAi = FakeProvider.FakeProvider

/** What a fake OpenAI can be told at its start. */
export interface Options extends FakeProvider.Options {
  /** What the model says; by default `FakeOpenAiRoutes.sayBack`. */
  readonly reply?: (ask: Routes.Ask) => Routes.Reply
}

/** Starts the server on a free port, until the scope closes. */
export const make = (options: Options = {}): Effect.Effect<FakeOpenAi, never, Scope.Scope> =>
  Effect.gen(function*() {
    const store = yield* Ref.make(Routes.emptyStore)
    return yield* FakeProvider.make(dialect({ store, reply: options.reply ?? Routes.sayBack }), options)
  })

// ---------------------------------------------------------------------------------------------------------------------
// The dialect: keys, refusals, headers
// ---------------------------------------------------------------------------------------------------------------------

const dialect = (backstage: Routes.Backstage): FakeProvider.Dialect => ({
  basePath: "/v1",
  keyOf: (headers) => /^Bearer\s+(\S.*)$/i.exec(headers["authorization"] ?? "")?.[1],
  modelOf,
  answer: (request, behaviour) =>
    Routes.answer({ ...backstage, request, models: behaviour.models ?? Routes.knownModels }),
  complain,
  render,
  renderInStream,
  headers: (request, tookMs) => ({
    "x-request-id": `req_fake${padded(request.number)}`,
    "openai-processing-ms": `${Math.round(tookMs)}`,
    "openai-version": "2020-10-01",
    "openai-organization": organizationOf(request)
  }),
  limitHeaders,
  reset: Ref.set(backstage.store, Routes.emptyStore)
})

const complain = (refusal: FakeProvider.Refusal, request: FakeProvider.Incoming): FakeProvider.Complaint => {
  switch (refusal._tag) {
    case "KeyMissing":
      return {
        status: 401,
        message: "You didn't provide an API key. You need to provide your API key in an Authorization header using " +
          "Bearer auth (i.e. Authorization: Bearer YOUR_KEY). You can obtain an API key from " +
          "https://platform.openai.com/account/api-keys.",
        type: "invalid_request_error",
        code: null,
        param: null
      }
    case "KeyRefused":
      return refusedKey(refusal.reason, request)
    case "ModelUnknown":
      return Routes.modelUnknown(refusal.model)
    case "RateLimited":
      return rateLimited(refusal, request)
    case "Outage":
      return outage(refusal.status)
  }
}

const refusedKey = (reason: FakeProvider.Reason, request: FakeProvider.Incoming): FakeProvider.Complaint => {
  switch (reason) {
    case "revoked":
      return {
        status: 401,
        message: `Incorrect API key provided: ${masked(request.key ?? "")}. You can find your API key at ` +
          "https://platform.openai.com/account/api-keys.",
        type: "invalid_request_error",
        code: "invalid_api_key",
        param: null
      }
    case "deactivated":
      return {
        status: 401,
        message: "The OpenAI account associated with this API key has been deactivated.",
        type: "invalid_request_error",
        code: "account_deactivated",
        param: null
      }
    case "quota":
      return {
        status: 429,
        message: "You exceeded your current quota, please check your plan and billing details. For more information " +
          "on this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.",
        type: "insufficient_quota",
        code: "insufficient_quota",
        param: null
      }
    case "forbidden":
      return {
        status: 403,
        message: "You are not allowed to sample from this model",
        type: "invalid_request_error",
        code: null,
        param: null
      }
    case "region":
      return {
        status: 403,
        message: "Country, region, or territory not supported",
        type: "request_forbidden",
        code: "unsupported_country_region_territory",
        param: null
      }
  }
}

const rateLimited = (
  { limit, quota }: FakeProvider.Refusal & { readonly _tag: "RateLimited" },
  request: FakeProvider.Incoming
): FakeProvider.Complaint => {
  const { says = "all" } = limit
  const hint = says === "nothing" ? "" : ` Please try again in ${goDuration(quota.waitMs)}.`
  const waitMs = Math.ceil(quota.waitMs)
  return {
    status: 429,
    message:
      `Rate limit reached for ${modelOf(request) ?? "this route"} in organization ${
        organizationOf(request)
      } on requests per ` +
      `min (RPM): Limit ${quota.limit}, Used ${quota.limit}, Requested 1.${hint} ` +
      "Visit https://platform.openai.com/account/rate-limits to learn more.",
    type: "requests",
    code: "rate_limit_exceeded",
    param: null,
    headers: says === "all"
      ? { ...limitHeaders(quota), "retry-after": `${Math.ceil(waitMs / 1000)}`, "retry-after-ms": `${waitMs}` }
      : {}
  }
}

const outage = (status: number): FakeProvider.Complaint =>
  status === 503
    ? {
      status,
      message: "The engine is currently overloaded, please try again later",
      type: "service_unavailable_error",
      code: "server_is_overloaded",
      param: null
    }
    : {
      status,
      message: "The server had an error while processing your request. Sorry about that!",
      type: "server_error",
      code: null,
      param: null
    }

/** Statuses that the gateway in front of the API gives, as pages for people. */
const gatewayStatuses: ReadonlyArray<number> = [502, 504, 520, 521, 522, 523, 524]

const render = ({ code, headers = {}, message, param, status, type }: FakeProvider.Complaint): FakeProvider.Answer =>
  gatewayStatuses.includes(status)
    ? {
      status,
      headers: { "content-type": "text/html", server: "cloudflare", ...headers },
      body: `<html><head><title>${status}</title></head><body><h1>Error ${status}</h1><p>${message}</p></body></html>`
    }
    : { status, headers, body: JSON.stringify({ error: { message, type, param, code } }) }

/** Chat streams carry an error as one more `data:`; Responses have an event for it, and say that they failed. */
const renderInStream = (
  { code, message, param, type }: FakeProvider.Complaint,
  request: FakeProvider.Incoming
): ReadonlyArray<FakeProvider.Frame> =>
  request.path === "/v1/responses"
    ? [
      Routes.event({ type: "error", sequence_number: 3, error: { type, code, message, param } }),
      Routes.event({
        type: "response.failed",
        sequence_number: 4,
        response: { object: "response", status: "failed", output: [], error: { code: code ?? type, message } }
      })
    ]
    : [Routes.data({ error: { message, type, param, code } })]

const limitHeaders = (quota: FakeProvider.Quota): Record<string, string> => ({
  "x-ratelimit-limit-requests": `${quota.limit}`,
  "x-ratelimit-remaining-requests": `${quota.remaining}`,
  "x-ratelimit-reset-requests": goDuration(quota.resetMs)
})

const organizationOf = (request: FakeProvider.Incoming): string => `org-${request.group ?? "fake"}`

const modelOf = (request: FakeProvider.Incoming): string | undefined =>
  Option.getOrUndefined(
    Schema.decodeUnknownOption(Schema.parseJson(Schema.Struct({ model: Schema.String })))(request.body)
  )?.model

/** Short keys would be readable with both ends shown. */
const masked = (key: string): string => `${key.slice(0, 3)}...${key.length < 12 ? "" : key.slice(-4)}`

/** A duration as Go prints it and OpenAI sends it: `17ms`, `1.2s`, `6m0s`, `1h2m3s`. */
const goDuration = (millis: number): string => {
  const whole = Math.ceil(millis)
  if (whole < 1000) return `${whole}ms`
  const hours = Math.floor(whole / 3_600_000)
  const minutes = Math.floor(whole / 60_000) % 60
  const seconds = `${(whole % 60_000) / 1000}s`
  return hours > 0 ? `${hours}h${minutes}m${seconds}` : minutes > 0 ? `${minutes}m${seconds}` : seconds
}
