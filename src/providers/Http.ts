/**
 * Any REST endpoint over a pool: as an `HttpClient` of `@effect/platform`, and as a `fetch`.
 *
 * @since 0.1.0
 */
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as HttpClient from "@effect/platform/HttpClient"
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import type * as Scope from "effect/Scope"
import * as ApiKey from "../ApiKey.js"
import type * as Attempt from "../http/Attempt.js"
import * as EventBody from "../http/EventBody.js"
import * as PooledFetch from "../http/PooledFetch.js"
import * as PooledHttpClient from "../http/PooledHttpClient.js"
import * as RequestBody from "../http/RequestBody.js"
import * as KeymeshError from "../KeymeshError.js"
import { ConfigurationError } from "../KeymeshError.js"
import * as KeyPool from "../KeyPool.js"
import * as PoolSettings from "../PoolSettings.js"
import type * as PoolStore from "../PoolStore.js"
import * as Checks from "../Settings.js"
import type * as Telemetry from "../Telemetry.js"
import * as Adapter from "./Adapter.js"
import * as dialects from "./dialects.js"
import { genericGrammar } from "./grammars.js"
import type * as Provider from "./Provider.js"
import * as RestClient from "./RestClient.js"
import * as SdkErrors from "./SdkErrors.js"

/**
 * Where a key goes into a request: `"bearer"` (`Authorization: Bearer …`), a header, a parameter of the query, or
 * whatever a function makes of the secret. What a function derives from the secret is not known elsewhere: only the
 * secret itself is taken out of what an upstream echoes.
 *
 * @since 0.1.0
 * @category models
 */
export type Auth =
  | "bearer"
  | { readonly header: string }
  | { readonly query: string }
  | ((secret: string) => Credentials)

/**
 * What authenticates one request; replaces what the request has under the same names.
 *
 * @since 0.1.0
 * @category models
 */
export type Credentials = Provider.Credentials

/**
 * What a provider of a REST API is made of.
 *
 * @since 0.1.0
 * @category models
 */
export interface ApiOptions {
  /** As in errors and events (default `http`). */
  readonly name?: string | undefined
  readonly auth: Auth
  /** How the API words its errors (default: what most have in common). */
  readonly errors?: Provider.ErrorDialect | undefined
  /** Whether a success may be an error by its body, so that JSON bodies are looked into (default: as `errors` says). */
  readonly peek?: boolean | undefined
  /**
   * Whether a request may be sent again after a fault that leaves open whether it was processed. Default: GET, HEAD,
   * OPTIONS, and whatever has an `Idempotency-Key`; a call's own `CallOptions.replayable` wins.
   */
  readonly replayable?: boolean | ((request: Provider.RequestShape) => boolean) | undefined
}

/**
 * The settings: those of a pool, and of the API.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings extends KeyPool.Settings, Omit<ApiOptions, "name"> {
  /** Where the API is. Keys go to its origin only. */
  readonly baseUrl: string
  /** Allows an address that is neither https nor loopback (default: false). */
  readonly allowInsecureBaseUrl?: boolean | undefined
  /** The `fetch` underneath, which really sends (default: the global one). */
  readonly fetch?: Attempt.Transport | undefined
  /** The client underneath, for `client` (default: one over `fetch`). */
  readonly httpClient?: HttpClient.HttpClient | undefined
  /** Whether `client` sends `traceparent` and `b3` to the API (default: false). */
  readonly propagateTrace?: boolean | undefined
  /** How much of an event stream may be held back before its first content (default 64 events, 256 KiB, 5 seconds). */
  readonly hold?: Partial<EventBody.Limits> | undefined
}

/**
 * A REST API over a pool. Its two ways in share the pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  /**
   * Requests are relative to the base URL; those to another origin go without a key. What the pool gives up on is a
   * `RequestError` with the pool's error as its cause (`PooledHttpClient.withPoolErrors` lifts it).
   */
  readonly client: HttpClient.HttpClient
  /** As the global `fetch`. What the pool gives up on is an answer with an honest status: 401, 429 or 503. */
  readonly fetch: Attempt.Transport
  readonly pool: KeyPool.Service
  /** The typed error behind one that came of a request: with the fault, the trail, and when a key is back. */
  readonly errorOf: (error: unknown) => KeymeshError.CallError
}

/**
 * @since 0.1.0
 * @category tags
 */
export class Http extends Context.Tag("effect-keymesh/Http")<Http, Service>() {}

/**
 * Makes the service. Its pool closes with the scope.
 *
 * @example
 * ```ts
 * import { HttpClientResponse } from "@effect/platform"
 * import { Effect, Schema } from "effect"
 * import * as Http from "effect-keymesh/Http"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * const Forecast = Schema.Struct({ city: Schema.String, celsius: Schema.Number })
 *
 * const program = Effect.gen(function*() {
 *   const weather = yield* Http.make({
 *     baseUrl: "https://weather.example/v2",
 *     auth: { header: "x-api-key" },
 *     keys: ["key-one", "key-two"]
 *   })
 *   return yield* weather.client.get("/forecast", { urlParams: { city: "Vienna" } }).pipe(
 *     Effect.flatMap(HttpClientResponse.schemaBodyJson(Forecast))
 *   )
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
    const {
      allowInsecureBaseUrl,
      auth,
      baseUrl: at,
      errors,
      fetch: given,
      hold,
      httpClient,
      peek,
      propagateTrace,
      replayable,
      ...ofPool
    } = settings
    const baseUrl = yield* ApiKey.baseUrlOf(at, allowInsecureBaseUrl === true, "baseUrl")
    yield* checked(auth)
    const limits = yield* EventBody.limitsOf(hold, "hold")
    const pool = yield* KeyPool.make({ name: "http", ...ofPool })
    const api = provider({ name: pool.name, auth, errors, peek, replayable })
    const transport: Attempt.Transport = given ?? ((input, init) => globalThis.fetch(input, init))
    const { failureOf, fetch } = yield* PooledFetch.make({
      pool,
      provider: api,
      baseUrl: () => new URL(baseUrl),
      transport,
      hold: limits
    })
    const plain = httpClient ?? (yield* Effect.provide(HttpClient.HttpClient, FetchHttpClient.layer)).pipe(
      HttpClient.transformResponse(Effect.provideService(FetchHttpClient.Fetch, transport))
    )
    const client = plain.pipe(
      PooledHttpClient.pooled(pool, api, { baseUrl, allowInsecureBaseUrl, propagateTrace, hold: limits }),
      HttpClient.mapRequest((request) =>
        URL.canParse(request.url) ? request : HttpClientRequest.prependUrl(request, baseUrl)
      )
    )
    return {
      client,
      fetch,
      pool,
      errorOf: (error) =>
        Option.getOrElse(KeymeshError.find(error), () => SdkErrors.toCallError(api, failureOf(error), error))
    }
  })

/**
 * @since 0.1.0
 * @category layers
 */
export const layer = (
  settings: Settings
): Layer.Layer<Http, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(Http, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<Http, ConfigError | ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(Http, Effect.flatMap(Config.unwrap(config), make))

/**
 * Another API, under a tag of your own.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerAs = <Self>(
  tag: Context.Tag<Self, Service>,
  settings: Settings
): Layer.Layer<Self, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> => Layer.scoped(tag, make(settings))

/**
 * A REST API as provider data.
 *
 * @since 0.1.0
 * @category providers
 */
export const provider = (
  { auth, errors = dialects.generic, name = "http", peek, replayable }: ApiOptions
): Provider.Provider => ({
  name,
  dialect: peek === undefined ? errors : { ...errors, okBody: peek ? "peek" : "ignore" },
  grammar: genericGrammar,
  credentials: (secret) => credentialsOf(auth, secret),
  credentialHeaders: [...new Set([...usualHeaders, ...Object.keys(named(auth).headers ?? {})])],
  credentialParams: Object.keys(named(auth).query ?? {}),
  facts: (request) => factsOf(request, replayable),
  // Streams in general have no mark of their end.
  ends: () => true,
  requestId: (headers) => headers.get("x-request-id") ?? headers.get("request-id") ?? undefined,
  renderError: ({ code, id, message }) => ({ error: { message, code, keymesh_id: id } })
})

// ----------------------------------------------------------------------------------------------------------- adapter

/**
 * What `adapter` takes: the settings of the API as `make` takes them, and those of the original's HTTP adapter.
 *
 * @since 0.1.0
 * @category models
 */
export interface AdapterOptions
  extends Omit<ApiOptions, "auth">, Pick<Settings, "baseUrl" | "allowInsecureBaseUrl" | "fetch" | "hold">
{
  /** Where a key goes (default `"bearer"`). Not with `authHeader`. */
  readonly auth?: Auth | undefined
  /** The headers that a key makes; as `auth` with a function. */
  readonly authHeader?: ((key: string) => Readonly<Record<string, string>>) | undefined
  /** Headers of every request, below its own. */
  readonly defaultHeaders?: Readonly<Record<string, string>> | undefined
  /** How long one attempt may take, its body included, in milliseconds, at most 24.8 days (default, and 0: no bound). */
  readonly timeoutMs?: number | undefined
  /** Statuses that are tried again although they are the fault of the request; as `failoverStatusCodes`. */
  readonly extraTransientStatuses?: ReadonlyArray<number> | undefined
}

/**
 * Any HTTP endpoint for `createKeymesh`, as a small client of JSON, and as a `fetch`.
 *
 * @example
 * ```ts
 * import * as Http from "effect-keymesh/Http"
 * import { createKeymesh } from "effect-keymesh/Keymesh"
 *
 * const search = createKeymesh({
 *   provider: Http.adapter({
 *     baseUrl: "https://search.example",
 *     authHeader: (key) => ({ authorization: `Bearer ${key}` })
 *   }),
 *   keys: ["key-one", "key-two"]
 * })
 * ```
 *
 * @since 0.1.0
 * @category adapters
 */
export const adapter = (options: AdapterOptions): Adapter.Adapter<RestClient.RestClient, {}> => ({
  name: options?.name ?? "http",
  settings: [],
  make: (pool, _, failover) =>
    Effect.gen(function*() {
      yield* Checks.refuseUnknown(options, optionNames, "provider")
      const { auth, authHeader, defaultHeaders = {}, extraTransientStatuses = [], name, timeoutMs = 0, ...api } =
        options
      if (auth !== undefined && authHeader !== undefined) {
        return yield* Checks.refuse("provider.authHeader", "cannot be used with `auth`")
      }
      if (authHeader !== undefined && typeof authHeader !== "function") {
        return yield* Checks.refuse("provider.authHeader", "must be a function from a key to headers")
      }
      if ((yield* Checks.integer(timeoutMs, "provider.timeoutMs")) > PoolSettings.longestTimer) {
        return yield* Checks.refuse("provider.timeoutMs", "must be at most 24.8 days")
      }
      yield* Either.mapLeft(
        Either.try(() => new Headers(defaultHeaders)),
        () =>
          new ConfigurationError({ field: "provider.defaultHeaders", problem: "must be names and values of headers" })
      )
      const statuses = yield* Adapter.failoverStatuses(extraTransientStatuses, "provider.extraTransientStatuses")
      const transport = api.fetch ?? ((input, init) => globalThis.fetch(input, init))
      const service = yield* make({
        ...pool,
        ...api,
        name: pool.name ?? name ?? "http",
        auth: authHeader === undefined ? auth ?? "bearer" : (secret) => ({ headers: authHeader(secret) }),
        errors: Adapter.dialectWithFailover(api.errors ?? dialects.generic, [...failover, ...statuses]),
        fetch: timeoutMs === 0 ? transport : withTimeout(transport, timeoutMs)
      })
      return {
        client: RestClient.make(service.fetch, api.baseUrl, defaultHeaders),
        pool: service.pool,
        errorOf: service.errorOf
      }
    })
})

const optionNames: ReadonlyArray<keyof AdapterOptions> = [
  "name",
  "auth",
  "authHeader",
  "baseUrl",
  "allowInsecureBaseUrl",
  "fetch",
  "hold",
  "errors",
  "peek",
  "replayable",
  "defaultHeaders",
  "timeoutMs",
  "extraTransientStatuses"
]

/** Each attempt has its own time, to the end of its body. Signals are linked by hand: `AbortSignal.any` leaks. */
const withTimeout = (transport: Attempt.Transport, millis: number): Attempt.Transport => (input, init) => {
  const controller = new AbortController()
  const given = init?.signal ?? undefined
  const abort = () => controller.abort(given?.reason)
  if (given?.aborted === true) abort()
  given?.addEventListener("abort", abort, { once: true })
  // It is not cleared, for the body may still come; nobody waits for it.
  const timer = AbortSignal.timeout(millis)
  timer.addEventListener("abort", () => controller.abort(timer.reason), { once: true })
  return transport(input, { ...init, signal: controller.signal })
}

// -------------------------------------------------------------------------------------------------------------- auth

const credentialsOf = (auth: Auth, secret: string): Credentials => {
  if (auth === "bearer") return { headers: { authorization: `Bearer ${secret}` } }
  if (typeof auth === "function") return auth(secret)
  return "header" in auth ? { headers: { [auth.header.toLowerCase()]: secret } } : { query: { [auth.query]: secret } }
}

/** Where credentials go, as far as that is known without a secret: functions are asked for real ones only. */
const named = (auth: Auth): Credentials => typeof auth === "function" ? {} : credentialsOf(auth, "")

const checked = (auth: Auth): Effect.Effect<void, ConfigurationError> => {
  if (auth === "bearer" || typeof auth === "function") return Effect.void
  const given: unknown = auth
  const [field, name] = Predicate.isRecord(given) ? Object.entries(given)[0] ?? [] : []
  if (field !== "header" && field !== "query") {
    return Effect.fail(
      new ConfigurationError({
        field: "auth",
        problem: "must be \"bearer\", a header, a query parameter or a function"
      })
    )
  }
  return typeof name === "string" && /^[\w!#$%&'*+.^`|~-]+$/.test(name)
    ? Effect.void
    : Effect.fail(new ConfigurationError({ field: `auth.${field}`, problem: "must be a name" }))
}

const usualHeaders = ["authorization", "x-api-key", "api-key", "x-goog-api-key"]

// ------------------------------------------------------------------------------------------------------------- facts

const factsOf = (request: Provider.RequestShape, replayable: ApiOptions["replayable"]): Provider.RequestFacts => {
  const { model, stream } = request.text === undefined ? {} : RequestBody.topLevel(request.text, ["model", "stream"])
  const may = typeof replayable === "function" ? replayable(request) : replayable
  return {
    model: typeof model === "string" ? model : undefined,
    streaming: stream === true || request.headers.get("accept")?.includes("text/event-stream") === true,
    creating: !(may ?? /^(?:GET|HEAD|OPTIONS|TRACE)$/.test(request.method))
  }
}
