/**
 * The official `@anthropic-ai/sdk` over a pool: its client is the real one, with every signature unchanged; underneath,
 * each request goes through the pool.
 *
 * @since 0.1.0
 */
import Sdk, { type ClientOptions } from "@anthropic-ai/sdk"
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import type { ConfigurationError } from "../KeymeshError.js"
import type * as PoolStore from "../PoolStore.js"
import type * as Telemetry from "../Telemetry.js"
import type { Adapter } from "./Adapter.js"
import * as Effects from "./Effects.js"
import { anthropic } from "./Providers.js"
import * as SdkService from "./SdkService.js"

/**
 * The settings: those of a pool, and how to make the client. Without `client`, it is `new Anthropic({ fetch })` that
 * reads no credential from the environment or from profile files; for timeouts and own headers give `client`. With
 * `apiKey` the keys travel as the SDK sends its API keys, with `authToken` as bearer tokens; pass `null` for the other
 * one, or older SDKs read it from the environment.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings extends SdkService.Settings<Sdk> {}

/**
 * The service.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service extends SdkService.SdkService<Sdk> {}

/**
 * Anthropic over a pool.
 *
 * @since 0.1.0
 * @category tags
 */
export class Anthropic extends Context.Tag("effect-keymesh/Anthropic")<Anthropic, Service>() {}

/**
 * Makes the service. Its pool closes with the scope.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as Anthropic from "effect-keymesh/Anthropic"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * const program = Effect.gen(function*() {
 *   const anthropic = yield* Anthropic.make({ keys: ["sk-ant-one", "sk-ant-two"] })
 *   const message = yield* anthropic.use((client) =>
 *     client.messages.create({
 *       model: "claude-sonnet-5",
 *       max_tokens: 1024,
 *       messages: [{ role: "user", content: "Hello" }]
 *     })
 *   )
 *   return message.content
 * }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: Settings
): Effect.Effect<Service, ConfigurationError, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore> =>
  SdkService.make(sdk, settings)

/**
 * @since 0.1.0
 * @category layers
 */
export const layer = (
  settings: Settings
): Layer.Layer<Anthropic, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(Anthropic, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @example
 * ```ts
 * import { Config, Layer } from "effect"
 * import * as Anthropic from "effect-keymesh/Anthropic"
 * import * as ApiKey from "effect-keymesh/ApiKey"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const Live = Anthropic.layerConfig({
 *   keys: ApiKey.config("ANTHROPIC_API_KEYS"),
 *   strategy: Config.succeed(Strategy.leastUsed)
 * }).pipe(Layer.provideMerge(KeyPool.layerDefaults))
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<Anthropic, ConfigError | ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(Anthropic, Effect.flatMap(Config.unwrap(config), make))

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

/**
 * What the constructor of the client takes, but for its credentials and its retries.
 *
 * @since 0.1.0
 * @category models
 */
export type Options = Omit<ClientOptions, (typeof credentials)[number] | "maxRetries">

const credentials = ["apiKey", "authToken", "credentials", "config", "profile"] as const

const sdk: SdkService.Sdk<Sdk, Options> = {
  provider: anthropic,
  construct: (fetch, baseUrl, options) =>
    new Sdk({
      ...options,
      // More than one credential is refused, and none is looked for as soon as there is one; older SDKs look for both.
      apiKey: SdkService.placeholder,
      authToken: null,
      maxRetries: 0,
      fetch,
      ...(baseUrl === undefined ? {} : { baseURL: baseUrl })
    }),
  given: (options) =>
    Either.map(SdkService.refuseOptions(options, credentials), () => ({
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
 * Anthropic for `createKeymesh`.
 *
 * @example
 * ```ts
 * import * as Anthropic from "effect-keymesh/Anthropic"
 * import { createKeymesh } from "effect-keymesh/Keymesh"
 *
 * const client = createKeymesh({ provider: Anthropic.adapter, keys: ["sk-ant-one", "sk-ant-two"] })
 * ```
 *
 * @since 0.1.0
 * @category adapters
 */
export const adapter: Adapter<Sdk, SdkService.Own<Sdk, Options>> = SdkService.adapter(sdk, make)
