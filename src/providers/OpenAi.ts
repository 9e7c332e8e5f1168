/**
 * The official `openai` SDK over a pool: its client is the real one, with every signature unchanged; underneath, each
 * request goes through the pool.
 *
 * @since 0.1.0
 */
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import OpenAI, { type ClientOptions } from "openai"
import type { ExtractParsedContentFromParams } from "openai/lib/parser"
import type {
  ExtractParsedContentFromParams as ExtractParsedResponse,
  ResponseCreateParamsWithTools
} from "openai/lib/ResponsesParser"
import type { ChatCompletionParseParams, ParsedChatCompletion } from "openai/resources/chat/completions"
import type { ParsedResponse } from "openai/resources/responses/responses"
import type { CallError, ConfigurationError } from "../KeymeshError.js"
import type * as PoolStore from "../PoolStore.js"
import type * as Telemetry from "../Telemetry.js"
import type { Adapter } from "./Adapter.js"
import * as Effects from "./Effects.js"
import { openAi } from "./Providers.js"
import * as SdkService from "./SdkService.js"

/**
 * The settings: those of a pool, and how to make the client. Without `client`, it is `new OpenAI({ fetch })` with no
 * organization and no project, because they belong to a key (`headers` of the key); for Azure, timeouts and own headers
 * give `client`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings extends SdkService.Settings<OpenAI> {}

/**
 * The service.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service extends SdkService.SdkService<OpenAI, Effects.Effects<OpenAI> & Parsing> {}

/**
 * The methods that parse answers by a format or tools of yours: with type parameters of their own, they cannot be read
 * off the client.
 *
 * @since 0.1.0
 * @category models
 */
export interface Parsing {
  readonly chat: {
    readonly completions: {
      readonly parse: <Params extends ChatCompletionParseParams, Parsed = ExtractParsedContentFromParams<Params>>(
        body: Params,
        options?: OpenAI.RequestOptions
      ) => Effect.Effect<Identified<ParsedChatCompletion<Parsed>>, CallError>
    }
  }
  readonly responses: {
    readonly parse: <Params extends ResponseCreateParamsWithTools, Parsed = ExtractParsedResponse<Params>>(
      body: Params,
      options?: OpenAI.RequestOptions
    ) => Effect.Effect<Identified<ParsedResponse<Parsed>>, CallError>
  }
}

/**
 * OpenAI over a pool.
 *
 * @since 0.1.0
 * @category tags
 */
export class OpenAi extends Context.Tag("effect-keymesh/OpenAi")<OpenAi, Service>() {}

/**
 * Makes the service. Its pool closes with the scope.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 *
 * const program = Effect.gen(function*() {
 *   const openai = yield* OpenAi.make({ keys: ["sk-one", "sk-two"] })
 *   const answer = yield* openai.use((client) =>
 *     client.chat.completions.create({ model: "gpt-5-mini", messages: [{ role: "user", content: "Hello" }] })
 *   )
 *   return answer.choices[0]?.message.content
 * }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: Settings
): Effect.Effect<Service, ConfigurationError, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore> =>
  // At run time every method is in the view; `Parsing` only adds the types of two.
  SdkService.make(sdk, settings) as Effect.Effect<
    Service,
    ConfigurationError,
    Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore
  >

/**
 * @since 0.1.0
 * @category layers
 */
export const layer = (
  settings: Settings
): Layer.Layer<OpenAi, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(OpenAi, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @example
 * ```ts
 * import { Config, Layer } from "effect"
 * import * as ApiKey from "effect-keymesh/ApiKey"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const Live = OpenAi.layerConfig({
 *   keys: ApiKey.config("OPENAI_API_KEYS"),
 *   strategy: Config.succeed(Strategy.leastUsed)
 * }).pipe(Layer.provideMerge(KeyPool.layerDefaults))
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<OpenAi, ConfigError | ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(OpenAi, Effect.flatMap(Config.unwrap(config), make))

/**
 * A second pool of the same provider, under a tag of your own.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerAs = <Self>(
  tag: Context.Tag<Self, Service>,
  settings: Settings
): Layer.Layer<Self, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> => Layer.scoped(tag, make(settings))

/** The SDK puts the id of the request on what it gives. */
type Identified<A> = A & { _request_id?: string | null }

/**
 * What the constructor of the client takes, but for its credentials and its retries.
 *
 * @since 0.1.0
 * @category models
 */
export type Options = Omit<ClientOptions, "apiKey" | "adminAPIKey" | "maxRetries">

const sdk: SdkService.Sdk<OpenAI, Options> = {
  provider: openAi,
  construct: (fetch, baseUrl, options) =>
    new OpenAI({
      organization: null,
      project: null,
      ...options,
      apiKey: SdkService.placeholder,
      fetch,
      ...(baseUrl === undefined ? {} : { baseURL: baseUrl })
    }),
  given: (options) =>
    Either.map(SdkService.refuseOptions(options, ["apiKey", "adminAPIKey"]), () => ({
      baseUrl: options.baseURL ?? undefined,
      fetch: options.fetch
    })),
  addressOf: (client) => client.baseURL,
  timeoutOf: (client) => client.timeout,
  withoutRetries: (client) => {
    client.maxRetries = 0
  },
  passSignal: Effects.inLastOptions
}

/**
 * OpenAI for `createKeymesh`.
 *
 * @example
 * ```ts
 * import { createKeymesh } from "effect-keymesh/Keymesh"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 *
 * const client = createKeymesh({ provider: OpenAi.adapter, keys: ["sk-one", "sk-two"] })
 * ```
 *
 * @since 0.1.0
 * @category adapters
 */
export const adapter: Adapter<OpenAI, SdkService.Own<OpenAI, Options>> = SdkService.adapter(sdk, make)
