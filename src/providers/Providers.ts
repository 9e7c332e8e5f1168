/**
 * The providers that are known, as data: without their SDKs, for whoever speaks their APIs.
 *
 * @since 0.1.0
 */
import * as RequestBody from "../http/RequestBody.js"
import { anthropic as anthropicDialect, gemini as geminiDialect, openai as dialect } from "./dialects.js"
import { anthropicGrammar, geminiGrammar, openAiGrammar } from "./grammars.js"
import type { Provider, RequestFacts, RequestShape } from "./Provider.js"

/**
 * OpenAI's API, and those that speak it: chat completions, responses, embeddings, files and the rest.
 *
 * @since 0.1.0
 * @category providers
 */
export const openAi: Provider = {
  name: "openai",
  dialect,
  grammar: openAiGrammar,
  credential: (secret) => ["authorization", `Bearer ${secret}`],
  credentialHeaders: ["authorization", "api-key"],
  facts: (request) => factsOf(request),
  ends: (event, data) =>
    data.trim() === "[DONE]" || event === "response.completed" || event === "response.incomplete" ||
    event === "response.failed",
  requestId: (headers) => headers.get("x-request-id") ?? undefined,
  renderError: ({ code, id, message, status }) => ({
    error: {
      message,
      type: status === 401 ? "authentication_error" : "keymesh_error",
      param: null,
      code,
      keymesh_id: id
    }
  })
}

const factsOf = ({ form, method, text, url }: RequestShape): RequestFacts => {
  const fields = text === undefined
    ? {}
    : RequestBody.topLevel(text, ["model", "stream", "background", ...RequestBody.outputFields])
  const model = fields["model"] ?? form?.get("model") ?? deployment.exec(url.pathname)?.[1]
  return {
    model: typeof model === "string" ? model : undefined,
    streaming: fields["stream"] === true || form?.get("stream") === "true",
    creating: method !== "GET" && method !== "HEAD" &&
      (!stateless.test(url.pathname) || fields["background"] === true),
    tokens: RequestBody.tokensOf(text, fields)
  }
}

/** Azure names the model in the path. */
const deployment = /\/openai\/deployments\/([^/]+)/

/** Inference that leaves nothing behind that a second one would double. */
const stateless = new RegExp(
  "/(?:chat/completions|completions|responses|responses/(?:input_tokens|compact)|embeddings|moderations|rerank" +
    "|audio/(?:speech|transcriptions|translations)|images/(?:generations|edits|variations)" +
    "|messages|messages/count_tokens)/?$"
)

/**
 * Anthropic's API: messages, batches, files and the rest. Keys go into the header that the SDK has chosen.
 *
 * @since 0.1.0
 * @category providers
 */
export const anthropic: Provider = {
  name: "anthropic",
  dialect: anthropicDialect,
  grammar: anthropicGrammar,
  credential: (secret, sent) => isBearer(sent) ? ["authorization", `Bearer ${secret}`] : ["x-api-key", secret],
  credentialHeaders: ["authorization", "x-api-key"],
  facts: (request) => anthropicFactsOf(request),
  // The events of the text completions before messages have no end of their own: the last one has the reason.
  ends: (event, data) => event === "message_stop" || (event === "completion" && /"stop_reason":\s*"/.test(data)),
  requestId: (headers) => headers.get("request-id") ?? undefined,
  renderError: ({ code, id, message, status }) => ({
    type: "error",
    error: {
      type: anthropicErrorTypes[status] ?? "api_error",
      message,
      details: { error_code: code, keymesh_id: id }
    }
  })
}

/**
 * SDKs since 1.0 send a bearer token, older ones `x-api-key`. Where there are both, one was added by hand or comes from
 * the environment: under the older version of the API it is `x-api-key` that is sure to take a key.
 */
const isBearer = (sent: Headers): boolean =>
  sent.has("authorization") && !(sent.has("x-api-key") && sent.get("anthropic-version") === "2023-06-01")

const anthropicFactsOf = ({ method, text, url }: RequestShape): RequestFacts => {
  const fields = text === undefined ? {} : RequestBody.topLevel(text, ["model", "stream", ...RequestBody.outputFields])
  return {
    model: typeof fields["model"] === "string" ? fields["model"] : undefined,
    streaming: fields["stream"] === true,
    creating: method !== "GET" && method !== "HEAD" && !anthropicStateless.test(url.pathname),
    tokens: RequestBody.tokensOf(text, fields)
  }
}

/** A turn of a thread, too: it is told from which answer it goes on. */
const anthropicStateless = /\/(?:messages|messages\/count_tokens|complete)\/?$/

const anthropicErrorTypes: Readonly<Record<number, string>> = {
  401: "authentication_error",
  403: "permission_error",
  429: "rate_limit_error",
  503: "overloaded_error",
  504: "timeout_error",
  529: "overloaded_error"
}

/**
 * The Gemini API of Google's AI Studio: models, files, caches, batches, interactions and the rest.
 *
 * @since 0.1.0
 * @category providers
 */
export const gemini: Provider = {
  name: "gemini",
  dialect: geminiDialect,
  grammar: geminiGrammar,
  credential: (secret) => ["x-goog-api-key", secret],
  credentialHeaders: ["x-goog-api-key", "authorization"],
  facts: (request) => geminiFactsOf(request),
  // Streams of content have no terminator: whatever came, its end is the end. Those of interactions have one.
  ends: (event, data) => !isInteractionEvent(event, data) || /"interaction\.complete/.test(data),
  requestId: (headers) => headers.get("x-goog-request-id") ?? headers.get("x-request-id") ?? undefined,
  renderError: ({ code, id, message, status }) => ({
    error: {
      code: status,
      message,
      status: googleStatuses[status] ?? "UNKNOWN",
      details: [{
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        reason: code.toUpperCase(),
        domain: "effect-keymesh",
        metadata: { keymesh_id: id }
      }]
    }
  })
}

const geminiFactsOf = ({ method, text, url }: RequestShape): RequestFacts => {
  const [, name, verb] = geminiModel.exec(url.pathname) ?? []
  const fields = text === undefined || name !== undefined
    ? {}
    : RequestBody.topLevel(text, ["model", "agent", "stream", "store", "background"])
  const model = name ?? fields["model"] ?? fields["agent"]
  const repeatable = verb === undefined
    ? /\/interactions\/?$/.test(url.pathname) && fields["store"] === false && fields["background"] !== true
    : geminiStateless.test(verb)
  return {
    model: typeof model === "string" ? model.replace(/^models\//, "") : undefined,
    streaming: url.searchParams.get("alt") === "sse" || url.searchParams.get("stream") === "true" ||
      fields["stream"] === true,
    creating: method !== "GET" && method !== "HEAD" && !repeatable,
    tokens: RequestBody.tokensOf(text, { maxTokens: Number(geminiMost.exec(text ?? "")?.[1] ?? Number.NaN) })
  }
}

/** Deep in `generationConfig`; in a text, its quotes are escaped. */
const geminiMost = /"(?:maxOutputTokens|max_output_tokens)"\s{0,4}:\s{0,4}(\d{1,12})/

/** `/v1beta/models/NAME:method` */
const geminiModel = /\/(?:models|tunedModels)\/([^/:]+):(\w+)\/?$/

/** Methods of a model that leave nothing behind; others start a batch or a long operation. */
const geminiStateless =
  /^(?:generateContent|streamGenerateContent|countTokens|computeTokens|embedContent|batchEmbedContents|predict)$/

const isInteractionEvent = (event: string | undefined, data: string): boolean =>
  event === undefined
    ? data.includes("\"event_type\"") && !data.includes("\"candidates\"")
    : /^(?:interaction|step|content)\./.test(event)

const googleStatuses: Readonly<Record<number, string>> = {
  401: "UNAUTHENTICATED",
  429: "RESOURCE_EXHAUSTED",
  503: "UNAVAILABLE"
}
