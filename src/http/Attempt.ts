/**
 * One HTTP attempt with a leased key: its credentials go on, to its own origin only; the answer is read for what it says,
 * and committed as soon as it belongs to the caller.
 *
 * @since 0.1.0
 */
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as MutableRef from "effect/MutableRef"
import * as Redacted from "effect/Redacted"
import type * as Fault from "../Fault.js"
import type * as KeyPool from "../KeyPool.js"
import * as Outcome from "../Outcome.js"
import type { Provider, RequestFacts } from "../providers/Provider.js"
import * as Classifier from "./Classifier.js"
import * as EventBody from "./EventBody.js"
import * as Scrub from "./Scrub.js"

/**
 * The function underneath that really sends; the shape of `fetch`.
 *
 * @since 0.1.0
 * @category models
 */
export type Transport = (input: string | URL | Request, init?: RequestInit) => Promise<Response>

/**
 * A request as the pool sends it, once per attempt.
 *
 * @since 0.1.0
 * @category models
 */
export interface PooledRequest {
  readonly url: URL
  readonly headers: Headers
  /** Everything else of the request; asked for once per attempt, because some bodies must be copied. */
  readonly init: () => RequestInit
  readonly facts: RequestFacts
  /** The caller's signal. */
  readonly signal: AbortSignal | undefined
  /** How long the caller's client said that it would wait, in milliseconds. */
  readonly timeoutMillis: number | undefined
}

/**
 * What an attempt needs beside its request.
 *
 * @since 0.1.0
 * @category models
 */
export interface Environment {
  readonly provider: Provider
  /** Where the provider is, as the client resolved it. */
  readonly baseUrl: URL
  readonly transport: Transport
  readonly limits: EventBody.Limits
  /** Runs what the reading of a body tells, outside the reader's own context; returns how to stop it. */
  readonly fork: (effect: Effect.Effect<unknown>) => () => void
  /** Calls back when an object is collected that nobody reads any more; returns how to cancel that. */
  readonly onCollected: (object: object, f: () => void) => () => void
  /** The header, and the id, by which a stream that fails late is recognised. */
  readonly mark: readonly [header: string, id: string]
  readonly onLate: (fault: Fault.Fault, headers: Headers) => void
}

/**
 * An answer. With a `fault` it is a refusal, already clean of the secret; without, it belongs to the caller, and if it
 * `holds`, its lease ends with its body.
 *
 * @since 0.1.0
 * @category models
 */
export interface Answer {
  readonly response: Response
  readonly fault: Fault.Fault | undefined
  readonly holds: boolean
  /** What a refusal says, clean of the secret: parsed if it is JSON. */
  readonly body?: unknown
}

/**
 * No answer: `error` is what the transport threw, clean of the secret.
 *
 * @since 0.1.0
 * @category errors
 */
export class NoAnswer extends Data.TaggedError("NoAnswer")<{
  readonly fault: Fault.Fault | undefined
  readonly error: unknown
}> {}

/**
 * What an attempt's exit means for the pool.
 *
 * @since 0.1.0
 * @category getters
 */
export const outcomeOf = (result: Answer | NoAnswer): Outcome.Outcome =>
  result.fault !== undefined
    ? Outcome.fault(result.fault)
    : result instanceof NoAnswer
    ? Outcome.ignored
    : Outcome.success

/**
 * Makes one attempt.
 *
 * @since 0.1.0
 * @category constructors
 */
export const attempt = (
  environment: Environment,
  request: PooledRequest,
  lease: KeyPool.Lease
): Effect.Effect<Answer, NoAnswer> =>
  Effect.suspend(() => {
    const secret = Redacted.value(lease.key.secret)
    const controller = new AbortController()
    return Effect.matchEffect(send(environment, request, lease, secret, controller.signal), {
      onFailure: (error) => {
        const fault = Classifier.classifyThrown(error)
        return new NoAnswer({ fault: fault === "cancelled" ? undefined : fault, error: Scrub.error(secret)(error) })
      },
      onSuccess: (response) => read(environment, request, lease, secret, response, controller)
    }).pipe(Effect.onInterrupt(() => Effect.sync(() => controller.abort())))
  })

// ------------------------------------------------------------------------------------------------------------ request

const send = (
  { baseUrl, provider, transport }: Environment,
  request: PooledRequest,
  { key }: KeyPool.Lease,
  secret: string,
  signal: AbortSignal
): Effect.Effect<Response, unknown> => {
  const headers = new Headers(request.headers)
  for (const name of provider.credentialHeaders) headers.delete(name)
  for (const [name, value] of Object.entries(key.headers)) headers.set(name, value)
  headers.set(...provider.credential(secret))
  const url = key.baseUrl === undefined ? request.url : moved(request.url, baseUrl, new URL(key.baseUrl))
  const go = (url: URL, init: RequestInit, redirects: number): Effect.Effect<Response, unknown> =>
    Effect.flatMap(
      Effect.tryPromise({
        try: () => transport(url.href, { ...init, headers, signal, redirect: "manual" }),
        catch: (error) => error
      }),
      (response) => {
        const next = redirectOf(response, url, init)
        // Elsewhere the answer is handed on as it is: credentials go to the provider's own origin only.
        if (next === undefined || redirects === 0) return Effect.succeed(response)
        return Effect.zipRight(discard(response), Effect.suspend(() => go(next.url, next.init, redirects - 1)))
      }
    )
  return Effect.suspend(() => go(url, request.init(), 5))
}

/** The same address, below another base. */
const moved = (url: URL, from: URL, to: URL): URL => {
  const base = from.pathname.replace(/\/+$/, "")
  const path = url.pathname.startsWith(base) ? url.pathname.slice(base.length) : url.pathname
  const target = new URL(to.href)
  target.pathname = to.pathname.replace(/\/+$/, "") + path
  target.search = url.search
  return target
}

/** Where a redirect within the origin leads, and how the request goes on. */
const redirectOf = (
  response: Response,
  from: URL,
  init: RequestInit
): { readonly url: URL; readonly init: RequestInit } | undefined => {
  const { status } = response
  if (status !== 301 && status !== 302 && status !== 303 && status !== 307 && status !== 308) return undefined
  const location = response.headers.get("location")
  if (location === null || !URL.canParse(location, from)) return undefined
  const url = new URL(location, from)
  if (url.origin !== from.origin) return undefined
  const method = (init.method ?? "GET").toUpperCase()
  if (status === 307 || status === 308 || method === "GET" || method === "HEAD") return { url, init }
  const { body: _, ...rest } = init
  return { url, init: { ...rest, method: "GET" } }
}

// ------------------------------------------------------------------------------------------------------------- answer

const read = (
  environment: Environment,
  request: PooledRequest,
  lease: KeyPool.Lease,
  secret: string,
  response: Response,
  controller: AbortController
): Effect.Effect<Answer, NoAnswer> => {
  const type = response.headers.get("content-type") ?? ""
  if (response.status >= 400) return refusal(environment, secret, response, undefined)
  if (response.body !== null && type.includes("text/event-stream")) {
    return stream(environment, request, lease, secret, response, controller)
  }
  const json = type.includes("json")
  if (json && (request.facts.streaming || environment.provider.dialect.okBody === "peek")) {
    return refusal(environment, secret, response, request.facts.streaming ? "before-content" : undefined)
  }
  if (response.status >= 300 && response.status !== 304) {
    return Effect.succeed({ response: clean(response, secret, response.body), fault: undefined, holds: false })
  }
  return Effect.sync(() => {
    link(request.signal, controller, (unlink) => environment.onCollected(response, unlink))
    return { response, fault: undefined, holds: false }
  })
}

/** An answer whose body decides: a refusal, or a success that may be an error after all. */
const refusal = (
  { provider }: Environment,
  secret: string,
  response: Response,
  streaming: Classifier.Phase | undefined
): Effect.Effect<Answer> =>
  Effect.map(
    Effect.zip(
      // A refusal whose body does not come is a refusal all the same.
      Effect.promise(() => response.text().catch(() => "")).pipe(
        Effect.timeoutTo({ duration: bodyMillis, onSuccess: (text) => text, onTimeout: () => "" })
      ),
      Effect.clockWith((clock) => Effect.succeed(clock.unsafeCurrentTimeMillis()))
    ),
    ([body, now]) => {
      const fault = Classifier.classify(provider.dialect, {
        status: response.status,
        headers: response.headers,
        body,
        now,
        ...(streaming === undefined ? {} : { streaming })
      })
      const text = fault === undefined ? body : Scrub.text(secret)(body)
      return { response: clean(response, secret, text), fault, holds: false, body: parsed(text) }
    }
  )

const parsed = (text: string): unknown => {
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}

/** A stream of events: nothing of it commits before its first content. */
const stream = (
  environment: Environment,
  request: PooledRequest,
  lease: KeyPool.Lease,
  secret: string,
  response: Response,
  controller: AbortController
): Effect.Effect<Answer, NoAnswer> =>
  Effect.suspend(() => {
    const { fork, limits, onCollected, provider } = environment
    // The caller checked that there is a body.
    const reader = (response.body as ReadableStream<Uint8Array>).getReader()
    const millis = Math.min(limits.millis, (request.timeoutMillis ?? Infinity) / 4)
    return Effect.flatMap(
      Effect.mapError(
        EventBody.open(provider, reader, response.headers, { ...limits, millis }),
        (error) => {
          const fault = Classifier.classifyThrown(error)
          return new NoAnswer({ fault: fault === "cancelled" ? undefined : fault, error: Scrub.error(secret)(error) })
        }
      ),
      (opened): Effect.Effect<Answer, NoAnswer> => {
        if (opened._tag === "Failed") {
          const held = Scrub.text(secret)(decoder.decode(joined(opened.held)))
          return Effect.as(
            Effect.sync(() => {
              reader.cancel().catch(() => undefined)
              controller.abort()
            }),
            { response: clean(response, secret, held), fault: opened.fault, holds: false }
          )
        }
        return Effect.map(Effect.clock, (clock) => {
          const idleSince = MutableRef.make<number | undefined>(undefined)
          const now = () => Number(clock.unsafeCurrentTimeNanos()) / 1e6
          const wall = () => clock.unsafeCurrentTimeMillis()
          MutableRef.set(idleSince, now())
          const unlink = link(request.signal, controller, () => {})
          const unwatch = fork(lease.endWhenIdle(() => MutableRef.get(idleSince)))
          let uncollect = () => {}
          const end = () => {
            unlink()
            unwatch()
            uncollect()
            fork(lease.end)
          }
          const body = EventBody.rest(provider, reader, response.headers, opened, secret, wall, {
            late: (fault) => {
              environment.onLate(fault, response.headers)
              fork(lease.commit(Outcome.fault(fault)))
            },
            ended: end,
            reading: (active) => MutableRef.set(idleSince, active ? undefined : now())
          })
          uncollect = onCollected(body, () => {
            controller.abort()
            end()
          })
          const headers = new Headers(response.headers)
          headers.set(...environment.mark)
          return { response: withBody(response, headers, body), fault: undefined, holds: true }
        })
      }
    )
  })

/** Aborts the attempt with the caller's signal, until unlinked. `AbortSignal.any` would leak on Node.js 20. */
const link = (
  signal: AbortSignal | undefined,
  controller: AbortController,
  keep: (unlink: () => void) => void
): () => void => {
  if (signal === undefined) return () => {}
  const abort = () => controller.abort(signal.reason)
  const unlink = () => signal.removeEventListener("abort", abort)
  if (signal.aborted) abort()
  else signal.addEventListener("abort", abort, { once: true })
  keep(unlink)
  return unlink
}

/** The answer without the secret, and without anything that makes an SDK try again by itself. */
const clean = (response: Response, secret: string, body: string | ReadableStream<Uint8Array> | null): Response => {
  const headers = Scrub.headers(secret)(response.headers)
  if (response.status >= 400) headers.set("x-should-retry", "false")
  return withBody(response, headers, body, Scrub.text(secret)(response.statusText))
}

const withBody = (
  response: Response,
  headers: Headers,
  body: string | ReadableStream<Uint8Array> | null,
  statusText = response.statusText
): Response => {
  const { status, url } = response
  const bare = status === 204 || status === 205 || status === 304
  const copy = new Response(bare ? null : body, { status, statusText, headers })
  // A made-up `Response` has no address; SDKs and their users read it.
  Object.defineProperty(copy, "url", { value: url })
  return copy
}

const discard = (response: Response): Effect.Effect<void> =>
  Effect.promise(() => response.body?.cancel().catch(() => undefined) ?? Promise.resolve())

const joined = (chunks: ReadonlyArray<Uint8Array>): Uint8Array => {
  const all = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.byteLength, 0))
  let at = 0
  for (const chunk of chunks) {
    all.set(chunk, at)
    at += chunk.byteLength
  }
  return all
}

const decoder = new TextDecoder()
/** How long the body of a refusal may take. */
const bodyMillis = 5_000
