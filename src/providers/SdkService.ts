/**
 * What the adapters of all SDKs have in common: the real client over a pooled `fetch`, and the client from Effect.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Predicate from "effect/Predicate"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as ApiKey from "../ApiKey.js"
import type * as Attempt from "../http/Attempt.js"
import * as EventBody from "../http/EventBody.js"
import * as PooledFetch from "../http/PooledFetch.js"
import type { CallError, ConfigurationError } from "../KeymeshError.js"
import * as KeyPool from "../KeyPool.js"
import type * as PoolStore from "../PoolStore.js"
import * as Checks from "../Settings.js"
import type * as Telemetry from "../Telemetry.js"
import * as Adapter from "./Adapter.js"
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
  /** The typed error behind one that the plain client threw: with the fault, the trail, and when a key is back. */
  readonly errorOf: (error: unknown) => CallError
}

/**
 * What is particular to one SDK.
 *
 * @since 0.1.0
 * @category models
 */
export interface Sdk<Client, in Options = never> {
  readonly provider: Provider
  /** A client with the pooled `fetch`, and no credential that matters; `options` are those of its own constructor. */
  readonly construct: (fetch: Attempt.Transport, baseUrl: string | undefined, options?: Options) => Client
  /** What the constructor's options say of the transport; or what of them cannot be used. */
  readonly given: (
    options: Options
  ) => Checks.Checked<{ readonly baseUrl?: string | undefined; readonly fetch?: Attempt.Transport | undefined }>
  /** The address that a client has resolved. */
  readonly addressOf: (client: Client) => string
  /** The timeout that a client has resolved, in milliseconds, if it need not announce it. */
  readonly timeoutOf?: ((client: Client) => number) | undefined
  /** Switches the SDK's own retries off. */
  readonly withoutRetries: (client: Client) => void
  /** What of an answer must be otherwise for this SDK (default: nothing). */
  readonly answered?: ((response: Response) => Response) | undefined
  /** Where a method takes the signal that ends its requests. */
  readonly passSignal: Effects.PassSignal
}

/**
 * Makes the service of an adapter. Its pool closes with the scope.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = <Client extends object>(
  sdk: Omit<Sdk<Client>, "given">,
  settings: Settings<Client>
): Effect.Effect<
  SdkService<Client>,
  ConfigurationError,
  Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore
> =>
  Effect.gen(function*() {
    const { allowInsecureBaseUrl, baseUrl, client: makeClient, fetch, hold, provider = sdk.provider, ...ofPool } =
      settings
    const limits = yield* EventBody.limitsOf(hold, "hold")
    const pool = yield* KeyPool.make({ name: provider.name, ...ofPool })
    const pooled: PooledFetch.PooledFetch = yield* PooledFetch.make({
      pool,
      provider,
      baseUrl: () => new URL(sdk.addressOf(client)),
      timeout: () => sdk.timeoutOf?.(client),
      transport: fetch,
      hold: limits
    })
    const { answered } = sdk
    const given: Attempt.Transport = answered === undefined
      ? pooled.fetch
      : (input, init) => pooled.fetch(input, init).then(answered)
    const client: Client = makeClient?.(given) ?? sdk.construct(given, baseUrl)
    sdk.withoutRetries(client)
    yield* ApiKey.baseUrlOf(sdk.addressOf(client), allowInsecureBaseUrl === true, "baseUrl")
    const failed = (error: unknown) => SdkErrors.toCallError(provider, pooled.failureOf(error), error)
    const calls: Effects.Calls<Client> = {
      client,
      use: (f) => Effect.mapError(pooled.within((signal) => f(client, signal)), failed),
      stream: (f) => Stream.mapError(pooled.iterate((signal) => f(client, signal)), failed)
    }
    return { ...calls, effects: Effects.make(calls, sdk.passSignal), pool, errorOf: failed }
  })

/**
 * The settings of an adapter value, beside those of a pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface Own<Client, Options> extends Omit<Settings<Client>, keyof KeyPool.Settings | "provider"> {
  /** Whose API it is, for those that speak the language of this SDK (default: the SDK's own); see `presets`. */
  readonly api?: Provider | undefined
  /**
   * What else the constructor of the client takes: timeouts, own headers, the address. Its `fetch` is the one underneath.
   * Credentials and retries are the pool's business: they are refused. Not with `client`.
   */
  readonly providerOptions?: Options | undefined
}

/**
 * The adapter of an SDK as a value: `make` is that of its service.
 *
 * @since 0.1.0
 * @category constructors
 */
export const adapter = <Client extends object, Options extends object>(
  sdk: Sdk<Client, Options>,
  make: (settings: Settings<Client>) => Effect.Effect<
    Omit<SdkService<Client>, "effects">,
    ConfigurationError,
    Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore
  >
): Adapter.Adapter<Client, Own<Client, Options>> => ({
  name: sdk.provider.name,
  settings: ["client", "baseUrl", "allowInsecureBaseUrl", "fetch", "hold", "api", "providerOptions"],
  make: (pool, { api = sdk.provider, providerOptions, ...own }, failover) =>
    Effect.gen(function*() {
      const settings = { ...pool, ...own, provider: Adapter.withFailover(api, failover) }
      if (providerOptions === undefined) return yield* make(settings)
      if (!Predicate.isRecord(providerOptions)) return yield* Checks.refuse("providerOptions", "must be an object")
      if (own.client !== undefined) return yield* Checks.refuse("providerOptions", "cannot be used with `client`")
      const { baseUrl, fetch } = yield* sdk.given(providerOptions)
      return yield* make({
        ...settings,
        fetch: own.fetch ?? fetch,
        client: (pooled) => sdk.construct(pooled, own.baseUrl ?? baseUrl, providerOptions)
      })
    })
})

/**
 * Refuses options of a client that would work against the pool: its own credentials, and its own retries.
 *
 * @since 0.1.0
 * @category checks
 */
export const refuseOptions = (
  options: object,
  credentials: ReadonlyArray<string>,
  path = "providerOptions"
): Checks.Checked<void> => {
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === null) continue
    if (credentials.includes(name)) {
      return Checks.refuse(`${path}.${name}`, "must be left out: `keys` has the credentials of the pool")
    }
    if (name === "maxRetries" && value !== 0) {
      return Checks.refuse(`${path}.maxRetries`, "must be left out: the pool retries, as `retry` says")
    }
  }
  return Either.void
}

/**
 * SDKs want a key to be made; the pool puts the real one in its place.
 *
 * @since 0.1.0
 * @category getters
 */
export const placeholder = "pooled-by-keymesh"
