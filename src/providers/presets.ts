/**
 * Providers and gateways that speak OpenAI's API, as data: how each words its errors, and where it is. They go into the
 * settings of the OpenAI adapter, or under an `HttpClient`:
 *
 * ```ts
 * OpenAi.layer({ ...presets.groq, keys })
 * PooledHttpClient.pooled(pool, presets.groq.provider, { baseUrl: presets.groq.baseUrl })
 * ```
 *
 * @since 0.1.0
 */
import * as dialects from "./dialects.js"
import type { ErrorDialect, Provider } from "./Provider.js"
import { openAi } from "./Providers.js"

/**
 * A provider and where it is.
 *
 * @since 0.1.0
 * @category models
 */
export interface Preset {
  readonly provider: Provider
  readonly baseUrl: string
}

/**
 * Makes a preset of any other API that speaks OpenAI's language. Keys travel as bearer tokens unless `provider` says
 * otherwise.
 *
 * @example
 * ```ts
 * import * as OpenAi from "effect-keymesh/OpenAi"
 * import * as presets from "effect-keymesh/presets"
 *
 * const vllm = presets.make("vllm", "http://127.0.0.1:8000/v1")
 * const Live = OpenAi.layer({ ...vllm, keys: ["token-one", "token-two"] })
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  name: string,
  baseUrl: string,
  dialect: ErrorDialect = dialects.openai,
  provider: Partial<Provider> = {}
): Preset => ({ provider: { ...openAi, ...provider, name, dialect }, baseUrl })

// ----------------------------------------------------------------------------------------------------------- providers

/**
 * OpenRouter. A success may hold an error: each is looked into.
 *
 * @since 0.1.0
 * @category presets
 */
export const openRouter: Preset = make("openrouter", "https://openrouter.ai/api/v1", dialects.openrouter)

/**
 * @since 0.1.0
 * @category presets
 */
export const groq: Preset = make("groq", "https://api.groq.com/openai/v1", dialects.groq)

/**
 * @since 0.1.0
 * @category presets
 */
export const mistral: Preset = make("mistral", "https://api.mistral.ai/v1", dialects.mistral)

/**
 * @since 0.1.0
 * @category presets
 */
export const deepSeek: Preset = make("deepseek", "https://api.deepseek.com/v1", dialects.deepseek)

/**
 * @since 0.1.0
 * @category presets
 */
export const together: Preset = make("together", "https://api.together.xyz/v1", dialects.together)

/**
 * @since 0.1.0
 * @category presets
 */
export const xai: Preset = make("xai", "https://api.x.ai/v1", dialects.xai)

/**
 * Azure OpenAI, for the resource at an endpoint such as `https://mine.openai.azure.com`. Keys of other resources have
 * their own address: `{ secret, baseUrl: presets.azure("https://other.openai.azure.com").baseUrl }`.
 *
 * This is the API without versions in the address; for the older one give the adapter a `client` of the SDK's
 * `AzureOpenAI`, and keys a `baseUrl` that ends in `/openai`.
 *
 * @since 0.1.0
 * @category presets
 */
export const azure = (endpoint: string): Preset =>
  make("azure", `${endpoint.replace(/\/+$/, "")}/openai/v1`, dialects.azure, {
    credentials: (secret) => ({ headers: { "api-key": secret } }),
    requestId: (headers) => headers.get("apim-request-id") ?? headers.get("x-request-id") ?? undefined
  })

// ------------------------------------------------------------------------------------------------------------ gateways

/**
 * A LiteLLM proxy, at its usual address on this machine; give `baseUrl` for another.
 *
 * @since 0.1.0
 * @category gateways
 */
export const liteLlm: Preset = make("litellm", "http://127.0.0.1:4000/v1")

/**
 * A Portkey gateway, at its usual address on this machine. Keys are those of the provider behind it, which the header
 * `x-portkey-provider` of each key names.
 *
 * @since 0.1.0
 * @category gateways
 */
export const portkey: Preset = make("portkey", "http://127.0.0.1:8787/v1")

/**
 * A Helicone gateway, at its usual address on this machine.
 *
 * @since 0.1.0
 * @category gateways
 */
export const helicone: Preset = make("helicone", "http://127.0.0.1:8080/ai")

/**
 * A Bifrost gateway, at its usual address on this machine.
 *
 * @since 0.1.0
 * @category gateways
 */
export const bifrost: Preset = make("bifrost", "http://127.0.0.1:8080/openai")
