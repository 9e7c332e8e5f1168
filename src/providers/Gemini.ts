/**
 * The official `@google/genai` SDK over a pool: its client is the real one, with every signature unchanged; underneath,
 * each request goes through the pool. Not pooled is what is no HTTP: `live` opens a WebSocket with a key of its own.
 *
 * @since 0.1.0
 */
import { GoogleGenAI } from "@google/genai"
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Predicate from "effect/Predicate"
import type * as Scope from "effect/Scope"
import * as AsyncContext from "../AsyncContext.js"
import type * as Attempt from "../http/Attempt.js"
import type { ConfigurationError } from "../KeymeshError.js"
import type * as PoolStore from "../PoolStore.js"
import type * as Telemetry from "../Telemetry.js"
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
  Effect.suspend(() => {
    const frames = AsyncContext.make<Frame>()
    const { client, fetch = (input, init) => globalThis.fetch(input, init) } = settings
    const above = (pooled: Attempt.Transport) => spelledOut(pooled, frames)
    return SdkService.make(
      {
        ...sdk,
        construct: (pooled, baseUrl) => sdk.construct(above(pooled), baseUrl),
        around: (calls) => attributed(calls, frames)
      },
      {
        ...settings,
        fetch: withoutKeyInUrl(fetch),
        client: client === undefined ? undefined : (pooled) => client(above(pooled))
      }
    )
  })

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

const sdk: SdkService.Sdk<GoogleGenAI> = {
  provider: gemini,
  construct: (fetch, baseUrl) =>
    new GoogleGenAI({
      apiKey: SdkService.placeholder,
      // Or the environment could turn it into a client of Vertex AI.
      vertexai: false,
      httpOptions: { fetch, ...(baseUrl === undefined ? {} : { baseUrl }) }
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
  // Two kinds of services: those around an inner client take options, the others a `config` among the parameters.
  passSignal: (call, abortSignal) => {
    if ("getClient" in call.owner) return Effects.inLastOptions(call, abortSignal)
    const [parameters = {}, ...rest] = call.args
    if (!Effects.isPlain(parameters)) return call.args
    const { config = {} } = parameters
    return [{ ...parameters, config: Effects.isPlain(config) ? { abortSignal, ...config } : config }, ...rest]
  }
}

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

// -------------------------------------------------------------------------------------------------------- the requests

/** A key in the URL would stand beside the pool's own. */
const withoutKeyInUrl = (fetch: Attempt.Transport): Attempt.Transport => (input, init) => {
  // Only what the pool has put a key on; requests to other origins are none of its business.
  if (typeof input !== "string" || !(init?.headers instanceof Headers) || !init.headers.has("x-goog-api-key")) {
    return fetch(input, init)
  }
  const url = new URL(input)
  if (!url.searchParams.has("key")) return fetch(input, init)
  url.searchParams.delete("key")
  return fetch(url.href, init)
}

/** Takes requests as this SDK makes them, and gives answers that it can do no harm to. */
const spelledOut =
  (fetch: Attempt.Transport, frames: AsyncContext.AsyncContext<Frame>): Attempt.Transport => async (input, init) => {
    const frame = frames.get()
    const [url, given] = input instanceof Request && init === undefined ? await taken(input) : [input, init]
    // Outside, because the pool's own fibers are nobody's.
    const response = await frames.outside(() => fetch(url, given))
    const id = response.headers.get(idHeader)
    if (frame !== undefined && id !== null) {
      const text = response.ok ? undefined : await response.clone().text()
      frame.push({ id, status: response.status, message: text === undefined ? undefined : asMessage(text) })
    }
    return endsWhenLeft(response)
  }

/** `interactions` and its kin send a `Request`, whose body is a stream: nobody could read it and send it again. */
const taken = async (request: Request): Promise<readonly [url: string, init: RequestInit]> => {
  const { headers, method, signal } = request
  const body = request.body === null
    ? undefined
    : headers.get("content-type")?.includes("json") === true
    ? await request.text()
    : await request.arrayBuffer()
  return [request.url, { method, headers, signal, ...(body === undefined ? {} : { body }) }]
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

// ---------------------------------------------------------------------------------------------------------- the errors

/** What came back in one callback, as far as it may be asked for by an error. */
type Frame = Array<{
  readonly id: string
  readonly status: number
  /** Of a refusal: the message that the SDK makes of it. */
  readonly message: string | undefined
}>

const idHeader = "x-keymesh-id"

const asMessage = (text: string): string => {
  try {
    return JSON.stringify(JSON.parse(text))
  } catch {
    return text
  }
}

/** The SDK's errors have no headers, so nothing of them leads to what the pool knows; here they are told apart. */
const attributed = (
  calls: Effects.Calls<GoogleGenAI>,
  frames: AsyncContext.AsyncContext<Frame>
): Effects.Calls<GoogleGenAI> => {
  const tracked = async <A>(frame: Frame, f: () => PromiseLike<A> | A): Promise<A> => {
    try {
      return await frames.run(frame, f)
    } catch (error) {
      throw marked(frame, error)
    }
  }
  return {
    client: calls.client,
    use: (f) => calls.use((client, signal) => tracked([], () => f(client, signal))),
    stream: (f) =>
      calls.stream(async (client, signal) => {
        const frame: Frame = []
        const opened = await tracked(frame, () => f(client, signal))
        return {
          [Symbol.asyncIterator]: () => {
            const iterator = opened[Symbol.asyncIterator]()
            return {
              next: () => tracked(frame, () => iterator.next()),
              return: async () => await iterator.return?.() ?? { done: true, value: undefined }
            }
          }
        }
      })
  }
}

/** An error with the id of its answer, where the pool looks for it. */
const marked = (frame: Frame, error: unknown): unknown => {
  if (!(error instanceof Error) || "headers" in error || !("status" in error)) return error
  const answer = frame.findLast(({ message }) => message === error.message) ??
    frame.findLast(({ status }) => status === error.status) ??
    // An error inside a stream, whose answer was a success.
    frame.findLast(({ status }) => status < 300)
  if (answer !== undefined) Object.defineProperty(error, "headers", { value: new Headers([[idHeader, answer.id]]) })
  return error
}
