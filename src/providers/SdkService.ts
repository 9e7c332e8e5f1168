/**
 * What the adapters of all SDKs have in common: the real client over a pooled `fetch`, and the client from Effect.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as ApiKey from "../ApiKey.js"
import type * as Attempt from "../http/Attempt.js"
import type * as EventBody from "../http/EventBody.js"
import * as PooledFetch from "../http/PooledFetch.js"
import type { CallError, ConfigurationError } from "../KeymeshError.js"
import * as KeyPool from "../KeyPool.js"
import type * as PoolStore from "../PoolStore.js"
import type * as Telemetry from "../Telemetry.js"
import type { Provider } from "./Provider.js"
import * as SdkErrors from "./SdkErrors.js"

/**
 * The settings of an adapter: those of a pool, and how to make the client.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings<Client> extends KeyPool.Settings {
  /**
   * Makes the SDK client around the pooled `fetch`; for timeouts, own headers, variants of the client. Whatever it does,
   * the SDK's own retries are switched off: they would multiply those of the pool.
   */
  readonly client?: ((fetch: Attempt.Transport) => Client) | undefined
  /**
   * Whose API it is, for those that speak the language of this SDK (default: the SDK's own); see `presets`. Its name is
   * the pool's, unless that has one.
   */
  readonly provider?: Provider | undefined
  /** Where the API is (default: what the SDK takes, from its environment variable or its own). Not with `client`. */
  readonly baseUrl?: string | undefined
  /** Allows an address that is neither https nor loopback (default: false). */
  readonly allowInsecureBaseUrl?: boolean | undefined
  /** The `fetch` underneath, which really sends: for proxies, agents, tests (default: the global one). */
  readonly fetch?: Attempt.Transport | undefined
  /** How much of a stream may be held back before its first content (default 64 events, 256 KiB, 5 seconds). */
  readonly hold?: Partial<EventBody.Limits> | undefined
}

/**
 * The service of an adapter.
 *
 * @since 0.1.0
 * @category models
 */
export interface SdkService<Client> {
  /** The real SDK client, pooled underneath: a drop-in replacement. */
  readonly client: Client
  /**
   * Calls the client from Effect: interruption and settings of the effect reach the requests, and failures are typed.
   * For anything that is iterated (streams, pages), use `stream`.
   */
  readonly use: <A>(f: (client: Client, signal: AbortSignal) => PromiseLike<A> | A) => Effect.Effect<A, CallError>
  /** As `use`, for streams of the API, pages, and whatever else of the SDK can be iterated. */
  readonly stream: <A>(
    f: (client: Client, signal: AbortSignal) => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>
  ) => Stream.Stream<A, CallError>
  readonly pool: KeyPool.Service
}

/**
 * What is particular to one SDK.
 *
 * @since 0.1.0
 * @category models
 */
export interface Sdk<Client> {
  readonly provider: Provider
  /** A client with the pooled `fetch`, and no credential that matters. */
  readonly construct: (fetch: Attempt.Transport, baseUrl: string | undefined) => Client
  /** The address that a client has resolved. */
  readonly addressOf: (client: Client) => string
  /** The timeout that a client has resolved, in milliseconds, if it need not announce it. */
  readonly timeoutOf?: ((client: Client) => number) | undefined
  /** Switches the SDK's own retries off. */
  readonly withoutRetries: (client: Client) => void
  /** What of an answer must be otherwise for this SDK (default: nothing). */
  readonly answered?: ((response: Response) => Response) | undefined
}

/**
 * Makes the service of an adapter. Its pool closes with the scope.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = <Client>(
  sdk: Sdk<Client>,
  settings: Settings<Client>
): Effect.Effect<
  SdkService<Client>,
  ConfigurationError,
  Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore
> =>
  Effect.gen(function*() {
    const { allowInsecureBaseUrl, baseUrl, client: makeClient, fetch, hold, provider = sdk.provider, ...ofPool } =
      settings
    const pool = yield* KeyPool.make({ name: provider.name, ...ofPool })
    const pooled: PooledFetch.PooledFetch = yield* PooledFetch.make({
      pool,
      provider,
      baseUrl: () => new URL(sdk.addressOf(client)),
      timeout: () => sdk.timeoutOf?.(client),
      transport: fetch,
      hold
    })
    const { answered } = sdk
    const given: Attempt.Transport = answered === undefined
      ? pooled.fetch
      : (input, init) => pooled.fetch(input, init).then(answered)
    const client: Client = makeClient?.(given) ?? sdk.construct(given, baseUrl)
    sdk.withoutRetries(client)
    yield* ApiKey.baseUrlOf(sdk.addressOf(client), allowInsecureBaseUrl === true, "baseUrl")
    const failed = (error: unknown) => SdkErrors.toCallError(provider, pooled.failureOf(error), error)
    const service: SdkService<Client> = {
      client,
      pool,
      use: (f) => Effect.mapError(pooled.within((signal) => f(client, signal)), failed),
      stream: (f) => Stream.mapError(pooled.iterate((signal) => f(client, signal)), failed)
    }
    return service
  })

/**
 * SDKs want a key to be made; the pool puts the real one in its place.
 *
 * @since 0.1.0
 * @category getters
 */
export const placeholder = "pooled-by-keymesh"
