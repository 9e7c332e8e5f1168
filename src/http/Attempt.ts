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
import * as ErrorBody from "./ErrorBody.js"
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
  /** Where the attempt that runs puts what ends it as a `Timeout` of the client's. */
  readonly expire?: MutableRef.MutableRef<() => void> | undefined
  /** Whether it was the client's timeout that aborted the signal, and the call has outlived it. */
  readonly outlived?: (() => boolean) | undefined
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
const clientTimeout = Fault.make("Timeout", { code: "client_timeout" })

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
 * Ends an answer that nobody gets: what is left of its body is not read.
 *
 * @since 0.1.0
 * @category combinators
 */
export const discard = ({ response }: Answer): Effect.Effect<void> => cancelled(response)

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
    const end = (fault: Fault.Fault, error: DOMException): void => {
      overdue = new NoAnswer({ fault, error })
      controller.abort(error)
    }
    lease.abortWith(() => end(tooLong, new DOMException("The attempt took too long.", "TimeoutError")))
    if (request.expire !== undefined) {
      // Clients take an abort for their own timeout.
      MutableRef.set(request.expire, () => end(clientTimeout, new DOMException("The attempt timed out.", "AbortError")))
    }
    return Effect.try({
      try: () => signed(environment, request, lease, secret),
      // Credentials may be made by a function of the caller's. Nothing was sent, so nothing is known of the key.
      catch: (error) => new NoAnswer({ fault: undefined, error: Scrub.error(secret)(error) })
    }).pipe(
      Effect.flatMap((target) =>
        Effect.matchEffect(send(environment.transport, target, request.init(), controller.signal), {
          onFailure: noAnswer(secret),
          onSuccess: (response) => read(environment, request, lease, secret, response, controller)
        })
      ),
      // Whatever it failed with, it is known why.
      Effect.matchEffect({
        onFailure: (failure) => overdue ?? failure,
        onSuccess: (answer) => answer.fault === undefined ? Effect.succeed(answer) : overdue ?? Effect.succeed(answer)
      }),
      Effect.onInterrupt(() => Effect.sync(() => controller.abort()))
    )
  })

// ------------------------------------------------------------------------------------------------------------ request

/** Where a request goes with a key, and what authenticates it there. */
interface Signed {
  readonly url: URL
  readonly headers: Headers
  readonly query: Readonly<Record<string, string>>
  /** Every parameter of the query that may carry a credential. */
  readonly params: ReadonlyArray<string>
}

const signed = (
  { baseUrl, provider }: Environment,
  request: PooledRequest,
  { key }: KeyPool.Lease,
  secret: string
): Signed => {
  const { headers: own = {}, query = {} } = provider.credentials(secret, request.headers)
  const headers = new Headers(request.headers)
  for (const name of provider.credentialHeaders) headers.delete(name)
  for (const [name, value] of [...Object.entries(key.headers), ...Object.entries(own)]) headers.set(name, value)
  const url = key.baseUrl === undefined ? request.url : moved(request.url, baseUrl, new URL(key.baseUrl))
  return { url, headers, query, params: provider.credentialParams ?? [] }
}

const send = (
  transport: Transport,
  { headers, params, query, url }: Signed,
  init: RequestInit,
  signal: AbortSignal
): Effect.Effect<Response, unknown> => {
  const keyed = (url: URL): URL => {
    const target = withoutParams(url, params)
    const own = Object.entries(query)
    if (own.length === 0) return target
    const withKey = new URL(target)
    for (const [name, value] of own) withKey.searchParams.set(name, value)
    return withKey
  }
  const go = (hop: Hop, redirects: number): Effect.Effect<Response, unknown> =>
    Effect.flatMap(
      Effect.tryPromise({
        try: () => transport(keyed(hop.url).href, { ...hop.init, headers: hop.headers, signal, redirect: "manual" }),
        catch: (error) => error
      }),
      (response) => {
        const next = redirectOf(response, hop)
        // Elsewhere the answer is handed on as it is: credentials go to the provider's own origin only.
        if (next === undefined || redirects === 0) {
          return Effect.succeed(withAddress(response, Object.keys(query)))
        }
        return Effect.zipRight(cancelled(response), Effect.suspend(() => go(next, redirects - 1)))
      }
    )
  return go({ url, init, headers }, 5)
}

/** The same address without these parameters; the same value, if it has none of them. */
const withoutParams = (url: URL, names: ReadonlyArray<string>): URL => {
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

/**
 * The path of an address below a base; all of it, if it is not below.
 *
 * @since 0.1.0
 * @category getters
 */
export const pathBelow = (base: URL, { pathname }: URL): string => {
  const above = base.pathname.replace(/\/+$/, "")
  return pathname.startsWith(`${above}/`) ? pathname.slice(above.length) : pathname
}

/** The same address, below another base. */
const moved = (url: URL, from: URL, to: URL): URL => {
  const target = new URL(to.href)
  target.pathname = to.pathname.replace(/\/+$/, "") + pathBelow(from, url)
  target.search = url.search
  return target
}

/** A request on its way, as redirects may change it. */
interface Hop {
  readonly url: URL
  readonly init: RequestInit
  readonly headers: Headers
}

/** Where a redirect within the origin leads, and how the request goes on: as `fetch` does it. */
const redirectOf = (response: Response, { headers, init, url: from }: Hop): Hop | undefined => {
  const { status } = response
  if (status !== 301 && status !== 302 && status !== 303 && status !== 307 && status !== 308) return undefined
  const location = response.headers.get("location")
  if (location === null || !URL.canParse(location, from)) return undefined
  const url = new URL(location, from)
  if (url.origin !== from.origin) return undefined
  const method = (init.method ?? "GET").toUpperCase()
  const isGet = status === 303 ? method !== "HEAD" : status < 303 && method === "POST"
  if (!isGet) return { url, init, headers }
  const { body: _, ...rest } = init
  const bodiless = new Headers(headers)
  for (const name of ofBody) bodiless.delete(name)
  return { url, init: { ...rest, method: "GET" }, headers: bodiless }
}

const ofBody = ["content-encoding", "content-language", "content-length", "content-location", "content-type"]

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
  const type = (response.headers.get("content-type") ?? "").toLowerCase()
  if (response.status >= 400) return refusal(environment, secret, response, controller)
  if (response.body !== null && type.includes("text/event-stream")) {
    return stream(environment, request, lease, secret, response, controller)
  }
  // Not lines of JSON: those are a stream.
  const json = /[/+]json\s*(?:;|$)/.test(type)
  const learn = learning(environment, request, lease, secret, response)
  const handedOn = (begun?: PlainBody.Begun): Effect.Effect<Answer> =>
    Effect.zipRight(
      // Headers may tell enough.
      learn?.("") ?? Effect.void,
      plain(environment, request, lease, secret, response, controller, json ? learn : undefined, begun, json)
    )
  if (json && (request.facts.streaming || environment.provider.dialect.okBody === "peek")) {
    const begun = Effect.tryPromise({
      try: () => PlainBody.begin(response, ErrorBody.maxParsed),
      catch: (error) => error
    })
    return Effect.flatMap(Effect.mapError(begun, noAnswer(secret)), (begun) => {
      // No error is as long as that.
      if (!begun.ended) return handedOn(begun)
      const body = decoder.decode(joined(begun.chunks))
      return Effect.tap(
        judged(environment, secret, response, body, request.facts.streaming ? "before-content" : undefined),
        ({ fault }) => fault === undefined ? learn?.(body) ?? Effect.void : Effect.void
      )
    })
  }
  // To whoever did not ask for redirects to be shown, this is an error too.
  if (response.status >= 300 && response.status !== 304) return refusal(environment, secret, response, controller)
  return handedOn()
}

/** An answer that belongs to the caller from its headers on. Its lease has ended when its body is read, or ends then. */
const plain = (
  environment: Environment,
  request: PooledRequest,
  lease: KeyPool.Lease,
  secret: string,
  response: Response,
  controller: AbortController,
  learn: Learning | undefined,
  begun: PlainBody.Begun | undefined,
  json: boolean
): Effect.Effect<Answer> =>
  Effect.suspend(() => {
    const { fork, onCollected, onLate, onOpened } = environment
    /** Where tokens are counted, the lease ends with the body, which tells how many they were: so `holds`. */
    const handedOn = (holds: boolean, unwatch: () => void): Answer => {
      let uncollect = () => {}
      let close = () => {}
      const headers = Scrub.values(secret)(response.headers)
      const unlink = link(request, (reason) => {
        controller.abort(reason)
        if (holds) fork(lease.end)
      })
      const ended = () => {
        unlink()
        uncollect()
        close()
        unwatch()
        if (holds) fork(lease.end)
      }
      const body = PlainBody.watched(response, secret, {
        broken: (fault, error) => {
          if (controller.signal.aborted) return
          onLate(fault, headers, error)
          fork(lease.commit(Outcome.fault(fault)))
        },
        ended,
        heard: learn === undefined && !holds ? undefined : (text) => {
          const usage = holds && Usage.mentions(text) ? Usage.read(text) : undefined
          if (usage !== undefined) lease.used(usage)
          const learnt = learn?.(text)
          if (learnt !== undefined) fork(learnt)
        }
      }, begun)
      const answer = withBody(response, headers, body, secret)
      if (body === null) unlink()
      else {
        // Neither of these may hold the body, or it would never be collected.
        uncollect = onCollected(body, ended)
        close = onOpened("body", (reason) => controller.abort(reason))
      }
      return { response: answer, fault: undefined, holds }
    }
    const metered = json && response.body !== null ? lease.metered : undefined
    if (metered === undefined) return Effect.succeed(handedOn(false, () => {}))
    return Effect.zipWith(metered, Effect.clock, (holds, clock) => {
      const arrivedAt = MonotonicTime.nowOf(clock)
      return handedOn(holds, holds ? fork(lease.endWhenIdle(() => arrivedAt)) : () => {})
    })
  })

/** Remembers, by the key of the attempt, what an answer tells of stored resources; `undefined` if it tells nothing. */
const learning = (
  { provider }: Environment,
  { storing }: PooledRequest,
  lease: KeyPool.Lease,
  secret: string,
  { headers }: Response
): Learning | undefined => {
  const { stored } = provider
  if (storing !== true || stored === undefined) return undefined
  const scrub = Scrub.text(secret)
  // What is remembered is saved: an upstream may echo the key as an id.
  return (text) => {
    const names = stored({ headers, text }).filter((name) => scrub(name) === name)
    return names.length === 0 ? undefined : lease.remember(names)
  }
}

/** What is to be remembered of a text, if anything is. */
type Learning = (text: string) => Effect.Effect<void> | undefined

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
          const unwatch = fork(lease.endWhenIdle(() => MutableRef.get(idleSince)))
          let usage: Usage.Usage | undefined
          const clean = Scrub.values(secret)(response.headers)
          let unlink = () => {}
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
          const learn = learning(environment, request, lease, secret, response)
          const body = EventBody.rest(provider, reader, response.headers, opened, secret, wall, {
            late: (fault, error) => {
              if (controller.signal.aborted) return
              environment.onLate(fault, clean, error)
              fork(lease.commit(Outcome.fault(fault)))
            },
            ended: end,
            heard: (data) => {
              if (Usage.mentions(data)) {
                usage = Usage.read(data, usage)
                if (usage !== undefined) lease.used(usage)
              }
              const learnt = learn?.(data)
              if (learnt !== undefined) fork(learnt)
            },
            reading: (active) => MutableRef.set(idleSince, active ? undefined : now())
          })
          // Neither of these may hold the body, or it would never be collected.
          uncollect = onCollected(body, breakOff)
          close = environment.onOpened("stream", breakOff)
          // Nobody need read on for the lease to end.
          unlink = link(request, breakOff)
          const headers = new Headers(clean)
          headers.set(...environment.mark)
          return { response: withBody(response, headers, body, secret), fault: undefined, holds: true }
        })
      }
    )
  })

/** Calls back when the caller's signal is aborted, until unlinked. `AbortSignal.any` would leak on Node.js 20. */
const link = ({ outlived, signal }: PooledRequest, aborted: BreakOff): () => void => {
  if (signal === undefined || outlived?.() === true) return () => {}
  const abort = () => aborted(signal.reason)
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
  const copy = madeOf(body, { status, statusText: Scrub.text(secret)(response.statusText), headers })
  // A made-up `Response` has no address; SDKs and their users read it.
  Object.defineProperty(copy, "url", { value: url })
  return copy
}

/**
 * A `Response` of any status that a server may send: some have no body, and some no `Response` can be made with.
 *
 * @since 0.1.0
 * @category constructors
 */
export const madeOf = (
  body: string | ReadableStream<Uint8Array> | null,
  { headers, status, statusText = "" }: {
    readonly status: number
    readonly statusText?: string
    readonly headers: Headers
  }
): Response => {
  const bare = status === 204 || status === 205 || status === 304
  const usual = status >= 200 && status <= 599
  const made = new Response(bare ? null : body, { status: usual ? status : 599, statusText, headers })
  return usual ? made : Object.defineProperty(made, "status", { value: status })
}

const cancelled = (response: Response): Effect.Effect<void> =>
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
