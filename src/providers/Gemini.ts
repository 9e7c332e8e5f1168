/**
 * The official `@google/genai` SDK over a pool: its client is the real one, with every signature unchanged; underneath,
 * each request goes through the pool. Not pooled is what is no HTTP: `live` opens a WebSocket with a key of its own.
 *
 * @since 0.1.0
 */
import { GoogleGenAI, type GoogleGenAIOptions, type HttpOptions } from "@google/genai"
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Layer from "effect/Layer"
import * as Predicate from "effect/Predicate"
import type * as Scope from "effect/Scope"
import type { ConfigurationError } from "../KeymeshError.js"
import type * as PoolStore from "../PoolStore.js"
import * as Checks from "../Settings.js"
import type * as Telemetry from "../Telemetry.js"
import type { Adapter } from "./Adapter.js"
import * as Effects from "./Effects.js"
import { gemini } from "./Providers.js"
import * as SdkService from "./SdkService.js"

/**
 * The settings: those of a pool, and how to make the client. Without `client`, it is a `GoogleGenAI` for the Gemini API
 * (not Vertex AI) with `httpOptions: { fetch }`; for timeouts, own headers and API versions give `client`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings extends SdkService.Settings<GoogleGenAI> {}

/**
 * The service. Its `effects` are without `live`, which is not pooled.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service extends SdkService.SdkService<GoogleGenAI, Effects.Effects<Omit<GoogleGenAI, "live">>> {}

/**
 * Gemini over a pool.
 *
 * @since 0.1.0
 * @category tags
 */
export class Gemini extends Context.Tag("effect-keymesh/Gemini")<Gemini, Service>() {}

/**
 * Makes the service. Its pool closes with the scope.
 *
 * The SDK's own retries are off, those of `interactions` and its kin too, unless one call asks for them.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as Gemini from "effect-keymesh/Gemini"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * const program = Effect.gen(function*() {
 *   const gemini = yield* Gemini.make({ keys: ["AIza-one", "AIza-two"] })
 *   const answer = yield* gemini.use((client) =>
 *     client.models.generateContent({ model: "gemini-2.5-flash", contents: "Hello" })
 *   )
 *   return answer.text
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
): Layer.Layer<Gemini, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(Gemini, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @example
 * ```ts
 * import { Layer } from "effect"
 * import * as ApiKey from "effect-keymesh/ApiKey"
 * import * as Gemini from "effect-keymesh/Gemini"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * const Live = Gemini.layerConfig({ keys: ApiKey.config("GEMINI_API_KEYS") }).pipe(
 *   Layer.provideMerge(KeyPool.layerDefaults)
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<Gemini, ConfigError | ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(Gemini, Effect.flatMap(Config.unwrap(config), make))

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
 * What the constructor of the client takes, but for its credentials, its retries and Vertex AI.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options extends Pick<GoogleGenAIOptions, "apiVersion"> {
  readonly httpOptions?: Omit<HttpOptions, "retryOptions">
}

const sdk: SdkService.Sdk<GoogleGenAI, Options> = {
  provider: gemini,
  construct: (fetch, baseUrl, options) =>
    new GoogleGenAI({
      ...options,
      apiKey: SdkService.placeholder,
      // Or the environment could turn it into a client of Vertex AI.
      vertexai: false,
      httpOptions: { ...options?.httpOptions, fetch, ...(baseUrl === undefined ? {} : { baseUrl }) }
    }),
  given: (options) =>
    Either.gen(function*() {
      const { httpOptions = {}, ...own } = options
      yield* SdkService.refuseOptions(own, ["apiKey", "googleAuthOptions"])
      yield* Checks.refuseUnknown(own, ["apiVersion"], "providerOptions")
      if (!Predicate.isRecord(httpOptions)) {
        return yield* Checks.refuse("providerOptions.httpOptions", "must be an object")
      }
      if ("retryOptions" in httpOptions) {
        return yield* Checks.refuse("providerOptions.httpOptions.retryOptions", "must be left out: see `retry`")
      }
      return { baseUrl: httpOptions.baseUrl, fetch: httpOptions.fetch }
    }),
  addressOf: (client) => {
    const api = apiOf(client)
    const address: unknown = Predicate.isFunction(api["getBaseUrl"]) ? api["getBaseUrl"]() : undefined
    return typeof address === "string" ? address : "https://generativelanguage.googleapis.com"
  },
  withoutRetries: (client) => {
    const options = field(field(apiOf(client), "clientOptions"), "httpOptions")
    if (Predicate.isObject(options)) Reflect.deleteProperty(options, "retryOptions")
    withoutInnerRetries(client)
  },
  answered: (response) => endsWhenLeft(response),
  // Two kinds of services: those around an inner client take options, the others a `config` among the parameters.
  passSignal: (call, abortSignal) => {
    if ("getClient" in call.owner) return Effects.inLastOptions(call, abortSignal)
    const [parameters = {}, ...rest] = call.args
    if (!Effects.isPlain(parameters)) return call.args
    const { config = {} } = parameters
    return [{ ...parameters, config: Effects.isPlain(config) ? { abortSignal, ...config } : config }, ...rest]
  }
}

/**
 * Gemini for `createKeymesh`.
 *
 * @example
 * ```ts
 * import * as Gemini from "effect-keymesh/Gemini"
 * import { createKeymesh } from "effect-keymesh/Keymesh"
 *
 * const client = createKeymesh({ provider: Gemini.adapter, keys: ["AIza-one", "AIza-two"] })
 * ```
 *
 * @since 0.1.0
 * @category adapters
 */
export const adapter: Adapter<GoogleGenAI, SdkService.Own<GoogleGenAI, Options>> = SdkService.adapter(sdk, make)

// ------------------------------------------------------------------------------------------------ the SDK from inside

// The SDK shows neither its address nor the settings of its inner clients; what is missing in some version is left.

const field = (value: unknown, name: string): unknown =>
  Predicate.isObject(value) ? Reflect.get(value, name) : undefined

const apiOf = (client: GoogleGenAI): Record<PropertyKey, unknown> => {
  const api = field(client, "apiClient")
  // Methods are called on it, so it is not copied; that it is an object is all that a record of unknowns needs.
  return Predicate.isObject(api) ? api as Record<PropertyKey, unknown> : {}
}

/**
 * `interactions`, `agents`, `webhooks` and so on retry by themselves, four times, whatever the settings of the client.
 * Each is a getter, because its first use may warn; each makes inner clients, one per API version, which can be told.
 */
const withoutInnerRetries = (client: GoogleGenAI): void => {
  const seen = new WeakSet<object>()
  for (const [name, get] of gettersOf(client)) {
    Object.defineProperty(client, name, {
      configurable: true,
      enumerable: false,
      get: () => {
        const service: unknown = get.call(client)
        if (!Predicate.isObject(service) || seen.has(service)) return service
        const getClient = field(service, "getClient")
        if (!Predicate.isFunction(getClient)) return service
        seen.add(service)
        Object.defineProperty(service, "getClient", {
          configurable: true,
          writable: true,
          value: (...args: ReadonlyArray<unknown>) => {
            const inner: unknown = Reflect.apply(getClient, service, args)
            const options = field(inner, "_options")
            if (Predicate.isObject(options)) Reflect.set(options, "retry_config", { strategy: "none" })
            return inner
          }
        })
        return service
      }
    })
  }
}

const gettersOf = (client: object): ReadonlyMap<string, () => unknown> => {
  const getters = new Map<string, () => unknown>()
  for (
    let at: unknown = Object.getPrototypeOf(client);
    Predicate.isObject(at) && at !== Object.prototype;
    at = Object.getPrototypeOf(at)
  ) {
    for (const [name, { get }] of Object.entries(Object.getOwnPropertyDescriptors(at))) {
      if (get !== undefined && !getters.has(name)) getters.set(name, get)
    }
  }
  return getters
}

/** Whoever leaves a stream of this SDK only lets go of the body; the request would go on, and hold its key. */
const endsWhenLeft = (response: Response): Response => {
  const { body } = response
  if (body === null || !response.ok || response.headers.get("content-type")?.includes("event-stream") !== true) {
    return response
  }
  const getReader = body.getReader.bind(body)
  Object.defineProperty(body, "getReader", {
    configurable: true,
    value: () => {
      const reader = getReader()
      const release = reader.releaseLock.bind(reader)
      reader.releaseLock = () => {
        reader.cancel().catch(() => undefined)
        release()
      }
      return reader
    }
  })
  return response
}
