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
import type { ConfigurationError } from "../KeymeshError.js"
import * as KeyPool from "../KeyPool.js"
import type * as PoolStore from "../PoolStore.js"
import type * as Telemetry from "../Telemetry.js"
import * as Effects from "./Effects.js"
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
 * The service of an adapter. `View` is its `effects`, where more or less can be said of them than of the client.
 *
 * @since 0.1.0
 * @category models
 */
export interface SdkService<Client, View = Effects.Effects<Client>> extends Effects.Calls<Client> {
  /**
   * The client's methods as effects: `yield* service.effects.a.b(…)` is `use` with `client.a.b(…)`, and a `Stream` where
   * `stream` would have to be taken. See `Effects` for which is which, and what is left out.
   */
  readonly effects: View
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
  /** Switches the SDK's own retries off. */
  readonly withoutRetries: (client: Client) => void
  /** Where a method takes the signal that ends its requests. */
  readonly passSignal: Effects.PassSignal
  /** Other ways to call the client than those of the pooled `fetch`. */
  readonly around?: ((calls: Effects.Calls<Client>) => Effects.Calls<Client>) | undefined
}

/**
 * Makes the service of an adapter. Its pool closes with the scope.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = <Client extends object>(
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
      transport: fetch,
      hold
    })
    const client: Client = makeClient?.(pooled.fetch) ?? sdk.construct(pooled.fetch, baseUrl)
    sdk.withoutRetries(client)
    yield* ApiKey.baseUrlOf(sdk.addressOf(client), allowInsecureBaseUrl === true, "baseUrl")
    const failed = (error: unknown) => SdkErrors.toCallError(provider, pooled.failureOf(error), error)
    const within: Effects.Calls<Client> = {
      client,
      use: (f) => Effect.mapError(pooled.within((signal) => f(client, signal)), failed),
      stream: (f) => Stream.mapError(pooled.iterate((signal) => f(client, signal)), failed)
    }
    const calls = sdk.around?.(within) ?? within
    return { ...calls, effects: Effects.make(calls, sdk.passSignal), pool }
  })

/**
 * SDKs want a key to be made; the pool puts the real one in its place.
 *
 * @since 0.1.0
 * @category getters
 */
export const placeholder = "pooled-by-keymesh"
