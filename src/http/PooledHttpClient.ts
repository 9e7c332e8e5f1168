/**
 * An `HttpClient` of `@effect/platform` over a pool: every program on it is pooled, with nothing else of it changed.
 *
 * The key is set below everything the caller can see: requests, answers, errors and spans carry the caller's request,
 * which has no key.
 *
 * @since 0.1.0
 */
import * as Cookies from "@effect/platform/Cookies"
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as PlatformHeaders from "@effect/platform/Headers"
import * as HttpBody from "@effect/platform/HttpBody"
import * as HttpClient from "@effect/platform/HttpClient"
import * as HttpClientError from "@effect/platform/HttpClientError"
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import * as Cause from "effect/Cause"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import * as Runtime from "effect/Runtime"
import * as Stream from "effect/Stream"
import * as ApiKey from "../ApiKey.js"
import { affinityHeader, CallOptions } from "../CallOptions.js"
import { type ConfigurationError, isPoolError, type PoolError } from "../KeymeshError.js"
import * as KeyPool from "../KeyPool.js"
import * as Outcome from "../Outcome.js"
import type { Provider, RequestShape } from "../providers/Provider.js"
import * as Attempt from "./Attempt.js"
import * as EventBody from "./EventBody.js"
import * as RequestBody from "./RequestBody.js"
import * as Scrub from "./Scrub.js"

/**
 * What a pooled client may be told.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options {
  /**
   * Where the provider is. Requests to another origin pass without a key; and keys with an address of their own are
   * served below it. Default: wherever a request goes, so give it unless the client talks to this provider only.
   */
  readonly baseUrl?: string | undefined
  /** Allows keys to travel to an address that is neither https nor loopback (default: false). */
  readonly allowInsecureBaseUrl?: boolean | undefined
  /** Whether `traceparent` and `b3` are sent to the provider (default: false). */
  readonly propagateTrace?: boolean | undefined
  /**
   * For a client over `fetch`: its `RequestInit` (dispatchers and the like). One that was given to the layer of that
   * client is not seen, because redirects must be seen here.
   */
  readonly requestInit?: RequestInit | undefined
  /** How much of a stream may be held back before its first content (default 64 events, 256 KiB, 5 seconds). */
  readonly hold?: Partial<EventBody.Limits> | undefined
}

/**
 * Puts a pool under a client. What the pool gives up on comes back as the provider's last answer, or as a
 * `RequestError` of reason `Transport` with the pool's error as its cause: `KeymeshError.find` digs it out of whatever
 * is made of it, and `withPoolErrors` lifts it into the error type.
 *
 * What the client maps of its requests (addresses, headers) is done first; the key comes last, in place of any other.
 * The client below should not retry, and not follow redirects: do either above. Its spans are replaced by one per
 * call, of the caller's own request; what the attempts did is told by the pool's telemetry.
 *
 * @example
 * ```ts
 * import { FetchHttpClient, HttpClient } from "@effect/platform"
 * import { Effect } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as PooledHttpClient from "effect-keymesh/PooledHttpClient"
 * import * as Providers from "effect-keymesh/Providers"
 *
 * const program = Effect.gen(function*() {
 *   const pool = yield* KeyPool.make({ keys: ["sk-one", "sk-two"] })
 *   const client = (yield* HttpClient.HttpClient).pipe(PooledHttpClient.pooled(pool, Providers.openAi))
 *   const response = yield* client.get("https://api.openai.com/v1/models")
 *   return yield* response.json
 * }).pipe(Effect.scoped, Effect.provide([KeyPool.layerDefaults, FetchHttpClient.layer]))
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const pooled =
  (pool: KeyPool.Service, provider: Provider, options: Options = {}) =>
  (client: HttpClient.HttpClient): HttpClient.HttpClient => {
    const insecure = options.allowInsecureBaseUrl === true
    const base = options.baseUrl === undefined ? undefined : ApiKey.baseUrlOf(options.baseUrl, insecure, "baseUrl")
    const elsewhere = exact(HttpClient.withTracerDisabledWhen(client, () => true))
    const below = (request: HttpClientRequest.HttpClientRequest) => manual(elsewhere(request), options.requestInit)
    const leaf = HttpClient.make((request, url, signal) => {
      const from = base ?? ApiKey.baseUrlOf(url.origin, insecure, "baseUrl")
      if (Either.isLeft(from)) {
        const { left } = from
        const { message } = left
        return new HttpClientError.RequestError({ request, reason: "InvalidUrl", cause: left, description: message })
      }
      const baseUrl = new URL(from.right)
      return url.origin === baseUrl.origin
        ? call({ pool, provider, below, baseUrl, hold: options.hold }, request, url, signal)
        : elsewhere(keyless(request, provider))
    }).pipe(
      HttpClient.withTracerPropagation(options.propagateTrace === true),
      HttpClient.transformResponse(
        Effect.locallyWith(PlatformHeaders.currentRedactedNames, (names) => [...names, ...provider.credentialHeaders])
      )
    )
    // What the client makes of requests (their address, mostly) is done before the pool sees them.
    return HttpClient.transform(client, (_, request) => leaf.execute(request))
  }

/**
 * Lifts the pool's own errors into the error type, so that they can be caught by their tags.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withPoolErrors = <E, R>(self: HttpClient.HttpClient.With<E, R>): HttpClient.HttpClient.With<
  E | PoolError,
  R
> =>
  HttpClient.transformResponse(
    self,
    Effect.mapError((error) =>
      error instanceof HttpClientError.RequestError && isPoolError(error.cause) ? error.cause : error
    )
  )

/**
 * The `HttpClient` of a program over its `KeyPool`. Everything in the program that talks HTTP goes through it, so the
 * address of the provider is required: whatever goes elsewhere goes without a key.
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = (
  provider: Provider,
  options: Options & { readonly baseUrl: string }
): Layer.Layer<HttpClient.HttpClient, ConfigurationError, HttpClient.HttpClient | KeyPool.KeyPool> =>
  Layer.effect(
    HttpClient.HttpClient,
    Effect.gen(function*() {
      const baseUrl = yield* ApiKey.baseUrlOf(options.baseUrl, options.allowInsecureBaseUrl === true, "baseUrl")
      const hold = yield* EventBody.limitsOf(options.hold, "hold")
      const pool = yield* KeyPool.KeyPool
      return pooled(pool, provider, { ...options, baseUrl, hold })(yield* HttpClient.HttpClient)
    })
  )

// --------------------------------------------------------------------------------------------------------------- calls

/** Sends a request as it is. */
type Send = (
  request: HttpClientRequest.HttpClientRequest
) => Effect.Effect<HttpClientResponse.HttpClientResponse, HttpClientError.HttpClientError>

interface Pooled {
  readonly pool: KeyPool.Service
  readonly provider: Provider
  readonly below: Send
  readonly baseUrl: URL
  readonly hold: Partial<EventBody.Limits> | undefined
}

const call = (
  { baseUrl, below, hold, pool, provider }: Pooled,
  request: HttpClientRequest.HttpClientRequest,
  url: URL,
  signal: AbortSignal
): Effect.Effect<HttpClientResponse.HttpClientResponse, HttpClientError.HttpClientError> =>
  Effect.gen(function*() {
    const headers = yield* Effect.try({
      try: () => new Headers(request.headers),
      catch: (cause) => new HttpClientError.RequestError({ request, reason: "Encode", cause })
    })
    const affinity = headers.get(affinityHeader) ?? undefined
    headers.delete(affinityHeader)
    const shape = shapeOf(request, url, headers)
    const facts = provider.facts(shape)
    const stored = provider.resources?.(shape)
    const given = yield* CallOptions
    // The caller may stand where it cannot be interrupted; what is run here may always be.
    const runtime = yield* Effect.interruptible(Effect.runtime<never>())
    const environment = (unheard: MutableRef.MutableRef<Unheard>): Attempt.Environment => ({
      provider,
      baseUrl,
      transport: transportOf(below, request, runtime, unheard),
      limits: { ...EventBody.defaultLimits, ...hold },
      fork: (effect) => {
        const fiber = Runtime.runFork(runtime)(effect)
        return () => fiber.unsafeInterruptAsFork(fiber.id())
      },
      onCollected,
      // The signal of the request says it all.
      onOpened: () => () => {},
      mark,
      onLate: () => {}
    })
    const once: Attempt.PooledRequest = {
      url,
      headers,
      // The body itself is sent as it is; this only says whether there is one, since redirects may drop it.
      init: () => ({ method: request.method, ...(request.body._tag === "Empty" ? {} : { body: "" }) }),
      facts,
      storing: stored?.storing === true,
      signal,
      holdMillis: undefined
    }
    const repeatable = !facts.creating || headers.has("idempotency-key")
    const answer = yield* pool.run(
      (lease) => {
        const unheard = MutableRef.make<Unheard>({ died: false })
        return Effect.mapError(
          Attempt.attempt(environment(unheard), once, lease),
          (failure) => ({ ...MutableRef.get(unheard), failure, scrub: Scrub.text(Redacted.value(lease.key.secret)) })
        )
      },
      {
        model: facts.model,
        streaming: facts.streaming,
        abortable: false,
        tokens: facts.tokens,
        affinity: affinity === "" ? undefined : affinity,
        resources: stored?.resources,
        replayable: isReusable(request.body) ? given.replayable ?? repeatable : "never",
        hold: ({ holds }) => holds,
        discard: Attempt.discard,
        classify: (exit) => {
          if (Exit.isSuccess(exit)) return Attempt.outcomeOf(exit.value)
          const failed = Option.getOrUndefined(Cause.failureOption(exit.cause))
          return failed === undefined || failed.died || isLocal(failed.error)
            ? Outcome.ignored
            : Attempt.outcomeOf(failed.failure)
        }
      }
    ).pipe(
      Effect.catchAll((failed) => {
        if (isPoolError(failed)) {
          const { message } = failed
          return new HttpClientError.RequestError({ request, reason: "Transport", cause: failed, description: message })
        }
        const { died, error, failure, scrub } = failed
        if (died) return Effect.die(failure.error)
        const description = error?.description
        return new HttpClientError.RequestError({
          request,
          reason: error?.reason ?? "Transport",
          cause: failure.error,
          ...(description === undefined ? {} : { description: scrub(description) })
        })
      })
    )
    answer.response.headers.delete(mark[0])
    return HttpClientResponse.fromWeb(request, answer.response)
  })

/** What the client underneath said beside the error that it gave: whether that is one, and what kind. */
interface Unheard {
  readonly died: boolean
  readonly error?: Pick<HttpClientError.RequestError, "reason" | "description">
}

/** Nothing was sent, so nothing is known of the key or the provider. */
const isLocal = (error: Unheard["error"]): boolean => error !== undefined && error.reason !== "Transport"

/** The client underneath as a `fetch`. Whatever it throws is without the request, which has the key. */
const transportOf = (
  below: Send,
  request: HttpClientRequest.HttpClientRequest,
  runtime: Runtime.Runtime<never>,
  unheard: MutableRef.MutableRef<Unheard>
): Attempt.Transport =>
async (input, init = {}) => {
  const headers = new Headers(init.headers)
  const signal = init.signal ?? new AbortController().signal
  const dropped = init.body === undefined || init.body === null
  const keyed = HttpClientRequest.make(init.method === "GET" ? "GET" : request.method)(String(input)).pipe(
    HttpClientRequest.setBody(dropped ? HttpBody.empty : request.body),
    HttpClientRequest.setHeaders(headers)
  )
  MutableRef.set(unheard, { died: false })
  // Its exit is a value: of a fiber that fails, the cause is logged, and this one has the request with the key.
  const ran = await Runtime.runPromiseExit(runtime)(Effect.exit(below(keyed)), { signal })
  const exit = Exit.flatten(ran)
  if (Exit.isSuccess(exit)) return webOf(exit.value, signal, runtime)
  const error = Option.getOrUndefined(Cause.failureOption(exit.cause))
  if (error === undefined) {
    if (Cause.isInterruptedOnly(exit.cause)) throw new DOMException("This operation was aborted", "AbortError")
    MutableRef.set(unheard, { died: true })
    throw Cause.squash(exit.cause)
  }
  // Whoever filters by status below the pool has its answers judged all the same.
  if (error._tag === "ResponseError" && error.reason === "StatusCode") return webOf(error.response, signal, runtime)
  if (error._tag === "RequestError") MutableRef.set(unheard, { died: false, error })
  throw error.cause ?? new Error(error.description ?? error.reason)
}

const webOf = (
  response: HttpClientResponse.HttpClientResponse,
  signal: AbortSignal,
  runtime: Runtime.Runtime<never>
): Response => {
  const headers = new Headers()
  for (const [name, value] of Object.entries(response.headers)) if (name !== "set-cookie") headers.set(name, value)
  for (const cookie of Cookies.toSetCookieHeaders(response.cookies)) headers.append("set-cookie", cookie)
  return Attempt.madeOf(bodyOf(response, signal, runtime), { status: response.status, headers })
}

/** The body of an answer, read as it is asked for; until then nothing is opened. */
const bodyOf = (
  response: HttpClientResponse.HttpClientResponse,
  signal: AbortSignal,
  runtime: Runtime.Runtime<never>
): ReadableStream<Uint8Array> => {
  const chunks = Stream.suspend(() => response.stream).pipe(
    Stream.map(Either.right),
    // As values too. The error itself has the request; what caused it is for whoever reads to take the key out of.
    Stream.catchAllCause((cause) => {
      const error = Option.getOrUndefined(Cause.failureOption(cause))
      return error?.reason === "EmptyBody"
        ? Stream.empty
        : Stream.succeed(
          Either.left(error === undefined ? Cause.squash(cause) : error.cause ?? new Error(error.reason))
        )
    })
  )
  const reader = MutableRef.make<
    ReadableStreamDefaultReader<Either.Either<Uint8Array, unknown>> | undefined
  >(undefined)
  const opened = () => {
    const before = MutableRef.get(reader)
    if (before !== undefined) return before
    const made = Stream.toReadableStreamRuntime(chunks, runtime, { strategy: { highWaterMark: 0 } }).getReader()
    MutableRef.set(reader, made)
    return made
  }
  return new ReadableStream<Uint8Array>({
    start: (controller) => {
      signal.addEventListener("abort", () => {
        controller.error(signal.reason)
        MutableRef.get(reader)?.cancel().catch(() => undefined)
      }, { once: true })
    },
    pull: async (controller) => {
      const { done, value } = await opened().read()
      if (done) controller.close()
      else if (Either.isRight(value)) controller.enqueue(value.right)
      else controller.error(value.left)
    },
    cancel: async () => {
      const open = MutableRef.get(reader)
      // To be closed, a body must have been opened.
      if (open === undefined) Runtime.runFork(runtime)(Effect.ignore(Stream.runDrain(Stream.take(chunks, 1))))
      else await open.cancel()
    }
  }, { highWaterMark: 0 })
}

/** The request to be sent in place of what a client makes of it. */
class Exact extends Context.Tag("effect-keymesh/PooledHttpClient/Exact")<
  Exact,
  HttpClientRequest.HttpClientRequest
>() {}

/** What a client does to requests was done above the pool; a second time, it would take the key out again. */
const exact = (client: HttpClient.HttpClient): Send => {
  const replacing = HttpClient.mapRequestEffect(
    client,
    (request) => Effect.map(Effect.serviceOption(Exact), Option.getOrElse(() => request))
  )
  return (request) => Effect.provideService(replacing.execute(request), Exact, request)
}

/** Redirects are seen here: the key must not follow them to another origin. */
const manual = <A, E>(effect: Effect.Effect<A, E>, requestInit: RequestInit | undefined): Effect.Effect<A, E> =>
  Effect.flatMap(
    Effect.serviceOption(FetchHttpClient.RequestInit),
    (given) =>
      Effect.provideService(effect, FetchHttpClient.RequestInit, {
        ...Option.getOrUndefined(given),
        ...requestInit,
        redirect: "manual"
      })
  )

const keyless = (
  request: HttpClientRequest.HttpClientRequest,
  { credentialHeaders }: Provider
): HttpClientRequest.HttpClientRequest =>
  HttpClientRequest.make(request.method)(request.url, { urlParams: request.urlParams }).pipe(
    HttpClientRequest.setBody(request.body),
    HttpClientRequest.setHeaders(PlatformHeaders.remove(request.headers, [...credentialHeaders, affinityHeader]))
  )

// ------------------------------------------------------------------------------------------------------------ requests

const shapeOf = (request: HttpClientRequest.HttpClientRequest, url: URL, headers: Headers): RequestShape => ({
  method: request.method,
  url,
  headers,
  text: textOf(request.body),
  form: request.body._tag === "FormData" ? request.body.formData : undefined
})

const textOf = (body: HttpBody.HttpBody): string | undefined => {
  if (body._tag === "Raw") return typeof body.body === "string" ? body.body : undefined
  return body._tag === "Uint8Array" && body.contentType.includes("json") ? decoder.decode(body.body) : undefined
}

const isReusable = (body: HttpBody.HttpBody): boolean =>
  body._tag === "Raw" ? RequestBody.isReusable(body.body) : body._tag !== "Stream"

/** Calls back for bodies that were collected unread. */
const onCollected: Attempt.Environment["onCollected"] = (object, f) => {
  const token = {}
  registry?.register(object, f, token)
  return () => registry?.unregister(token)
}

const registry = typeof FinalizationRegistry === "undefined"
  ? undefined
  : new FinalizationRegistry<() => void>((f) => f())

/** Nobody asks for a late failure by its id here: the header is taken out again. */
const mark = ["x-keymesh-id", "late"] as const
const decoder = new TextDecoder()
