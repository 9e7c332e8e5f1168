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
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import OpenAI from "openai"
import * as ApiKey from "../ApiKey.js"
import * as Attempt from "../http/Attempt.js"
import type * as EventBody from "../http/EventBody.js"
import * as PooledFetch from "../http/PooledFetch.js"
import type { CallError, ConfigurationError } from "../KeymeshError.js"
import * as KeyPool from "../KeyPool.js"
import type * as PoolStore from "../PoolStore.js"
import type * as Telemetry from "../Telemetry.js"
import { openAi } from "./Providers.js"
import * as SdkErrors from "./SdkErrors.js"

/**
 * The settings: those of a pool, and how to make the client.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings extends KeyPool.Settings {
  /**
   * Makes the SDK client around the pooled `fetch`; for Azure, timeouts, own headers. Default: `new OpenAI({ fetch })`
   * with no organization and no project, because they belong to a key (`headers` of the key). Whatever it does, the
   * SDK's own retries are switched off: they would multiply those of the pool.
   */
  readonly client?: ((fetch: Attempt.Transport) => OpenAI) | undefined
  /** Where the API is (default: what the SDK takes, `OPENAI_BASE_URL` or OpenAI's own). Not with `client`. */
  readonly baseUrl?: string | undefined
  /** Allows an address that is neither https nor loopback (default: false). */
  readonly allowInsecureBaseUrl?: boolean | undefined
  /** The `fetch` underneath, which really sends: for proxies, agents, tests (default: the global one). */
  readonly fetch?: Attempt.Transport | undefined
  /** How much of a stream may be held back before its first content (default 64 events, 256 KiB, 5 seconds). */
  readonly hold?: Partial<EventBody.Limits> | undefined
}

/**
 * The service.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  /** The real SDK client, pooled underneath: a drop-in replacement. */
  readonly client: OpenAI
  /**
   * Calls the client from Effect: interruption and settings of the effect reach the requests, and failures are typed.
   * For anything that is iterated (streams, pages), use `stream`.
   */
  readonly use: <A>(f: (client: OpenAI, signal: AbortSignal) => PromiseLike<A> | A) => Effect.Effect<A, CallError>
  /** As `use`, for streams of the API, pages, and the SDK's `.stream()` helpers. */
  readonly stream: <A>(
    f: (client: OpenAI, signal: AbortSignal) => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>
  ) => Stream.Stream<A, CallError>
  readonly pool: KeyPool.Service
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
  Effect.gen(function*() {
    const { allowInsecureBaseUrl, baseUrl, client: makeClient, fetch, hold, ...ofPool } = settings
    const pool = yield* KeyPool.make({ name: openAi.name, ...ofPool })
    const pooled: PooledFetch.PooledFetch = yield* PooledFetch.make({
      pool,
      provider: openAi,
      baseUrl: () => new URL(client.baseURL),
      transport: fetch,
      hold
    })
    const client: OpenAI = makeClient?.(pooled.fetch) ?? new OpenAI({
      apiKey: placeholder,
      organization: null,
      project: null,
      fetch: pooled.fetch,
      ...(baseUrl === undefined ? {} : { baseURL: baseUrl })
    })
    client.maxRetries = 0
    yield* ApiKey.baseUrlOf(client.baseURL, allowInsecureBaseUrl === true, "baseUrl")
    const failed = (error: unknown) => SdkErrors.toCallError(openAi, pooled.failureOf(error), error)
    const service: Service = {
      client,
      pool,
      use: (f) => Effect.mapError(pooled.within((signal) => f(client, signal)), failed),
      stream: (f) => Stream.mapError(pooled.iterate((signal) => f(client, signal)), failed)
    }
    return service
  })

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

/** The SDK wants a key to be made; the pool puts the real one in its place. */
const placeholder = "pooled-by-keymesh"
