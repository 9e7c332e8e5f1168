/**
 * The providers that are known, as data: without their SDKs, for whoever speaks their APIs.
 *
 * @since 0.1.0
 */
import * as RequestBody from "../http/RequestBody.js"
import { openai as dialect } from "./dialects.js"
import { openAiGrammar } from "./grammars.js"
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
  const fields = text === undefined ? {} : RequestBody.topLevel(text, ["model", "stream", "background"])
  const model = fields["model"] ?? form?.get("model") ?? deployment.exec(url.pathname)?.[1]
  return {
    model: typeof model === "string" ? model : undefined,
    streaming: fields["stream"] === true || form?.get("stream") === "true",
    creating: method !== "GET" && method !== "HEAD" &&
      (!stateless.test(url.pathname) || fields["background"] === true)
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
