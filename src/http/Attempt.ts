/**
 * One HTTP attempt with a leased key: its credentials go on, to its own origin only; the answer is read for what it
 * says, and committed as soon as it belongs to the caller.
 *
 * @since 0.1.0
 */
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as MutableRef from "effect/MutableRef"
import * as Redacted from "effect/Redacted"
import * as Fault from "../Fault.js"
import type * as KeyPool from "../KeyPool.js"
import * as MonotonicTime from "../MonotonicTime.js"
import * as Outcome from "../Outcome.js"
import type { Provider, RequestFacts } from "../providers/Provider.js"
import * as RetryDecision from "../RetryDecision.js"
import * as Classifier from "./Classifier.js"
import * as EventBody from "./EventBody.js"
import * as PlainBody from "./PlainBody.js"
import * as Scrub from "./Scrub.js"
import * as Usage from "./Usage.js"
import * as WaitHint from "./WaitHint.js"

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
  /** Whether its answer may tell of stored resources (default: no). */
  readonly storing?: boolean | undefined
  /** The caller's signal. */
  readonly signal: AbortSignal | undefined
  /** How long a stream may be held back, in milliseconds, if less than the environment's limit. */
  readonly holdMillis: number | undefined
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
  /**
   * Tells of an answer that is handed on, and how to break it off; returns how to take that back, once its body is
   * over. Of a `body` that is no `stream` nobody knows whether it will be read.
   */
  readonly onOpened: (kind: "stream" | "body", breakOff: BreakOff) => () => void
  /** The header, and the id, by which a stream that fails late is recognised. */
  readonly mark: readonly [header: string, id: string]
  /** `error` is what the reader gets, where that is thrown. */
  readonly onLate: (fault: Fault.Fault, headers: Headers, error: unknown) => void
}

/**
 * Breaks an answer off: its request is aborted, its lease ends, and its reader gets the reason.
 *
 * @since 0.1.0
 * @category models
 */
export type BreakOff = (reason?: unknown) => void

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

const tooLong = Fault.make("Timeout", { code: RetryDecision.attemptTimeout })

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
    let overdue: NoAnswer | undefined
    lease.abortWith(() => {
      const error = new DOMException("The attempt took too long.", "TimeoutError")
      overdue = new NoAnswer({ fault: tooLong, error })
      controller.abort(error)
    })
    return Effect.matchEffect(send(environment, request, lease, secret, controller.signal), {
      onFailure: noAnswer(secret),
      onSuccess: (response) => read(environment, request, lease, secret, response, controller)
    }).pipe(
      // Whatever it failed with, it is known why.
      Effect.matchEffect({
        onFailure: (failure) => overdue ?? failure,
        onSuccess: (answer) => answer.fault === undefined ? Effect.succeed(answer) : overdue ?? Effect.succeed(answer)
      }),
      Effect.onInterrupt(() => Effect.sync(() => controller.abort()))
    )
  })

// ------------------------------------------------------------------------------------------------------------ request

const send = (
  { baseUrl, provider, transport }: Environment,
  request: PooledRequest,
  { key }: KeyPool.Lease,
  secret: string,
  signal: AbortSignal
): Effect.Effect<Response, unknown> => {
  const credentials = provider.credentials(secret, request.headers)
  const headers = new Headers(request.headers)
  for (const name of provider.credentialHeaders) headers.delete(name)
  for (const [name, value] of Object.entries(key.headers)) headers.set(name, value)
  for (const [name, value] of Object.entries(credentials.headers ?? {})) headers.set(name, value)
  const keyed = (url: URL): URL => {
    const target = withoutParams(url, provider.credentialParams)
    const query = Object.entries(credentials.query ?? {})
    if (query.length === 0) return target
    const withKey = new URL(target)
    for (const [name, value] of query) withKey.searchParams.set(name, value)
    return withKey
  }
  const url = key.baseUrl === undefined ? request.url : moved(request.url, baseUrl, new URL(key.baseUrl))
  const go = (url: URL, init: RequestInit, redirects: number): Effect.Effect<Response, unknown> =>
    Effect.flatMap(
      Effect.tryPromise({
        try: () => transport(keyed(url).href, { ...init, headers, signal, redirect: "manual" }),
        catch: (error) => error
      }),
      (response) => {
        const next = redirectOf(response, url, init)
        // Elsewhere the answer is handed on as it is: credentials go to the provider's own origin only.
        if (next === undefined || redirects === 0) {
          return Effect.succeed(withAddress(response, Object.keys(credentials.query ?? {})))
        }
        return Effect.zipRight(discard(response), Effect.suspend(() => go(next.url, next.init, redirects - 1)))
      }
    )
  return Effect.suspend(() => go(url, request.init(), 5))
}

/** The same address without these parameters; the same value, if it has none of them. */
const withoutParams = (url: URL, names: ReadonlyArray<string> = []): URL => {
  if (!names.some((name) => url.searchParams.has(name))) return url
  const plain = new URL(url)
  for (const name of names) plain.searchParams.delete(name)
  return plain
}

/** An answer tells where it came from; what authenticated the request is no part of that. */
const withAddress = (response: Response, params: ReadonlyArray<string>): Response => {
  if (params.length === 0 || !URL.canParse(response.url)) return response
  const { href } = withoutParams(new URL(response.url), params)
  return Object.defineProperty(response, "url", { value: href, configurable: true })
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
  const headers = WaitHint.headerMap(response.headers)
  if (announces(headers)) {
    return Effect.zipRight(
      Effect.clockWith((clock) => {
        const base = WaitHint.baseTime(headers, clock.unsafeCurrentTimeMillis())
        return Effect.sync(() => lease.announced(WaitHint.readLimits(headers, base)))
      }),
      answered(environment, request, lease, secret, response, controller)
    )
  }
  return answered(environment, request, lease, secret, response, controller)
}

/** Most answers of most servers announce nothing. */
const announces = (headers: WaitHint.HeaderMap): boolean => {
  for (const name of headers.keys()) if (name.includes("ratelimit")) return true
  return false
}

const answered = (
  environment: Environment,
  request: PooledRequest,
  lease: KeyPool.Lease,
  secret: string,
  response: Response,
  controller: AbortController
): Effect.Effect<Answer, NoAnswer> => {
  const type = response.headers.get("content-type") ?? ""
  if (response.status >= 400) return refusal(environment, secret, response, controller)
  if (response.body !== null && type.includes("text/event-stream")) {
    return stream(environment, request, lease, secret, response, controller)
  }
  const json = type.includes("json")
  const learn = learning(environment, request, lease, response)
  if (json && (request.facts.streaming || environment.provider.dialect.okBody === "peek")) {
    return Effect.flatMap(
      Effect.mapError(text(response), noAnswer(secret)),
      (body) =>
        Effect.tap(
          judged(environment, secret, response, body, request.facts.streaming ? "before-content" : undefined),
          ({ fault }) => fault === undefined ? learn?.(body) ?? Effect.void : Effect.void
        )
    )
  }
  // To whoever did not ask for redirects to be shown, this is an error too.
  if (response.status >= 300 && response.status !== 304) return refusal(environment, secret, response, controller)
  return Effect.zipRight(
    // Headers may tell enough.
    learn?.("") ?? Effect.void,
    plain(environment, request, lease, secret, response, controller, json ? learn : undefined)
  )
}

/** An answer that belongs to the caller from its headers on. Its lease has ended when its body is read. */
const plain = (
  environment: Environment,
  request: PooledRequest,
  lease: KeyPool.Lease,
  secret: string,
  response: Response,
  controller: AbortController,
  learn: ((text: string) => Effect.Effect<void>) | undefined
): Effect.Effect<Answer> =>
  Effect.sync(() => {
    const { fork, onCollected, onLate, onOpened } = environment
    let uncollect = () => {}
    let close = () => {}
    const unlink = link(request.signal, controller)
    const ended = () => {
      unlink()
      uncollect()
      close()
    }
    const body = PlainBody.watched(response, secret, {
      broken: (fault, error) => {
        if (controller.signal.aborted) return
        onLate(fault, response.headers, error)
        fork(lease.commit(Outcome.fault(fault)))
      },
      ended,
      heard: learn === undefined ? undefined : (text) => fork(learn(text))
    })
    const answer = withBody(response, Scrub.values(secret)(response.headers), body, secret)
    if (body === null) unlink()
    else {
      // Neither of these may hold the body, or it would never be collected.
      uncollect = onCollected(body, ended)
      close = onOpened("body", (reason) => controller.abort(reason))
    }
    return { response: answer, fault: undefined, holds: false }
  })

/** Remembers, by the key of the attempt, what an answer tells of stored resources; `undefined` if it tells nothing. */
const learning = (
  { provider }: Environment,
  { storing }: PooledRequest,
  lease: KeyPool.Lease,
  { headers }: Response
): ((text: string) => Effect.Effect<void>) | undefined => {
  const { stored } = provider
  return storing === true && stored !== undefined
    ? (text) => Effect.suspend(() => lease.remember(stored({ headers, text })))
    : undefined
}

const text = (response: Response): Effect.Effect<string, unknown> =>
  Effect.tryPromise({ try: () => response.text(), catch: (error) => error })

const noAnswer = (secret: string) => (error: unknown): NoAnswer => {
  const fault = Classifier.classifyThrown(error)
  return new NoAnswer({ fault: fault === "cancelled" ? undefined : fault, error: Scrub.error(secret)(error) })
}

/** An answer that is no success; if its body does not come, it is one all the same. */
const refusal = (
  environment: Environment,
  secret: string,
  response: Response,
  controller: AbortController
): Effect.Effect<Answer> =>
  text(response).pipe(
    Effect.orElseSucceed(() => ""),
    Effect.timeoutTo({
      duration: bodyMillis,
      onSuccess: (body) => body,
      onTimeout: () => {
        controller.abort()
        return ""
      }
    }),
    Effect.flatMap((body) => judged(environment, secret, response, body, undefined))
  )

/** An answer whose body decides: a refusal, or a success that may be an error after all. */
const judged = (
  { provider }: Environment,
  secret: string,
  response: Response,
  body: string,
  streaming: Classifier.Phase | undefined
): Effect.Effect<Answer> =>
  Effect.clockWith((clock) => {
    // Scrubbed first: what was echoed may stand where a code is looked for.
    const scrubbed = Scrub.cutText(secret)(body)
    const fault = Classifier.classify(provider.dialect, {
      status: response.status,
      headers: Scrub.values(secret)(response.headers),
      body: scrubbed,
      now: clock.unsafeCurrentTimeMillis(),
      ...(streaming === undefined ? {} : { streaming })
    })
    const text = fault === undefined && response.ok ? body : scrubbed
    return Effect.succeed({ response: clean(response, secret, text), fault, holds: false, body: parsed(text) })
  })

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
    const millis = Math.min(limits.millis, request.holdMillis ?? Infinity)
    return Effect.flatMap(
      Effect.mapError(
        EventBody.open(provider, reader, response.headers, { ...limits, millis }, secret),
        noAnswer(secret)
      ),
      (opened): Effect.Effect<Answer, NoAnswer> => {
        if (opened._tag === "Failed") {
          const held = Scrub.cutText(secret)(decoder.decode(joined(opened.held)))
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
          const now = () => MonotonicTime.nowOf(clock)
          const wall = () => clock.unsafeCurrentTimeMillis()
          MutableRef.set(idleSince, now())
          const unlink = link(request.signal, controller)
          const unwatch = fork(lease.endWhenIdle(() => MutableRef.get(idleSince)))
          let usage: Usage.Usage | undefined
          let uncollect = () => {}
          let close = () => {}
          const end = () => {
            unlink()
            unwatch()
            uncollect()
            close()
            fork(lease.end)
          }
          const breakOff: BreakOff = (reason) => {
            controller.abort(reason)
            end()
          }
          const learn = learning(environment, request, lease, response)
          const body = EventBody.rest(provider, reader, response.headers, opened, secret, wall, {
            late: (fault, error) => {
              if (controller.signal.aborted) return
              environment.onLate(fault, response.headers, error)
              fork(lease.commit(Outcome.fault(fault)))
            },
            ended: end,
            event: (data) => {
              usage = Usage.read(data, usage)
              if (usage !== undefined) lease.used(usage)
            },
            heard: learn === undefined ? undefined : (data) => fork(learn(data)),
            reading: (active) => MutableRef.set(idleSince, active ? undefined : now())
          })
          // Neither of these may hold the body, or it would never be collected.
          uncollect = onCollected(body, breakOff)
          close = environment.onOpened("stream", breakOff)
          const headers = new Headers(Scrub.values(secret)(response.headers))
          headers.set(...environment.mark)
          return { response: withBody(response, headers, body, secret), fault: undefined, holds: true }
        })
      }
    )
  })

/** Aborts the attempt with the caller's signal, until unlinked. `AbortSignal.any` would leak on Node.js 20. */
const link = (
  signal: AbortSignal | undefined,
  controller: AbortController
): () => void => {
  if (signal === undefined) return () => {}
  const abort = () => controller.abort(signal.reason)
  const unlink = () => signal.removeEventListener("abort", abort)
  if (signal.aborted) abort()
  else signal.addEventListener("abort", abort, { once: true })
  return unlink
}

/** The answer without the secret, and without anything that makes an SDK try again by itself. */
const clean = (response: Response, secret: string, body: string): Response => {
  const headers = Scrub.headers(secret)(response.headers)
  if (response.status >= 400) headers.set("x-should-retry", "false")
  return withBody(response, headers, body, secret)
}

const withBody = (
  response: Response,
  headers: Headers,
  body: string | ReadableStream<Uint8Array> | null,
  secret: string
): Response => {
  const { status, url } = response
  const statusText = Scrub.text(secret)(response.statusText)
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
