/**
 * A `fetch` over a pool: whatever SDK it is injected into is pooled, with its signatures unchanged.
 *
 * When the pool gives up it does not throw but returns an error answer in the provider's own words, so that the SDK
 * throws its native error and does not retry; the typed error behind it is found again by `failureOf`.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Runtime from "effect/Runtime"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as AsyncContext from "../AsyncContext.js"
import * as Fault from "../Fault.js"
import { AllKeysExhausted, emptyTrail, isPoolError, type PoolError, type Trail } from "../KeymeshError.js"
import type * as KeyPool from "../KeyPool.js"
import * as Outcome from "../Outcome.js"
import type { Provider, RequestShape } from "../providers/Provider.js"
import * as Attempt from "./Attempt.js"
import * as EventBody from "./EventBody.js"
import * as RequestBody from "./RequestBody.js"

/**
 * What stands behind an error that an SDK threw: the pool's own error, or what the provider said last.
 *
 * @since 0.1.0
 * @category models
 */
export type Failure = PoolError | ProviderFailure

/**
 * @since 0.1.0
 * @category models
 */
export interface ProviderFailure {
  readonly _tag: "ProviderFailure"
  readonly fault: Fault.Fault
  readonly status: number | undefined
  readonly body: unknown
  readonly requestId: string | undefined
  readonly trail: Trail
}

/**
 * A pooled `fetch` and what belongs to it.
 *
 * @since 0.1.0
 * @category models
 */
export interface PooledFetch {
  readonly fetch: Attempt.Transport
  /** What stands behind an error that an SDK threw, if it came from this `fetch`. */
  readonly failureOf: (error: unknown) => Failure | undefined
  /**
   * Runs a callback so that the requests it makes belong to the effect: they see its services and settings, and are
   * interrupted with it, wherever the platform has asynchronous contexts; elsewhere the signal is all they have.
   */
  readonly within: <A>(
    f: (signal: AbortSignal) => PromiseLike<A> | A
  ) => Effect.Effect<A, unknown>
  /** As `within`, for callbacks that give something to iterate; each step of the iteration belongs to the stream too. */
  readonly iterate: <A>(
    f: (signal: AbortSignal) => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>
  ) => Stream.Stream<A, unknown>
}

/**
 * What a pooled `fetch` is made of.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options {
  readonly pool: KeyPool.Service
  readonly provider: Provider
  /** Where the provider is: requests to another origin pass without a key. Asked for at each request. */
  readonly baseUrl: () => URL
  /** What really sends (default: the global `fetch`). */
  readonly transport?: Attempt.Transport | undefined
  /** How much of a stream may be held back before its first content (default 64 events, 256 KiB, 5 s). */
  readonly hold?: Partial<EventBody.Limits> | undefined
}

/**
 * Makes a pooled `fetch`; what it starts ends with the scope.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (options: Options): Effect.Effect<PooledFetch, never, Scope.Scope> =>
  Effect.gen(function*() {
    const { pool, provider } = options
    const transport = options.transport ?? ((input, init) => globalThis.fetch(input, init))
    const scope = yield* Effect.scope
    const runtime = yield* Effect.runtime<never>()
    const context = AsyncContext.make<Frame>()
    const failures = yield* makeFailures(pool.name)

    const start = <A, E>(frame: Frame | undefined, effect: Effect.Effect<A, E>): Fiber.RuntimeFiber<A, E> =>
      // Outside the caller's asynchronous context: the scheduler would carry it into other fibers.
      context.outside(() =>
        Runtime.runFork(frame === undefined || MutableRef.get(frame.sealed) ? runtime : frame.runtime)(effect, {
          scope
        })
      )

    const collected = collector()
    const environment = (
      frame: Frame | undefined,
      trail: MutableRef.MutableRef<Trail>
    ): Attempt.Environment => {
      const id = failures.nextId()
      return {
        provider,
        baseUrl: options.baseUrl(),
        transport,
        limits: { ...EventBody.defaultLimits, ...options.hold },
        fork: (effect) => {
          const fiber = start(frame, effect)
          return () => fiber.unsafeInterruptAsFork(fiber.id())
        },
        onCollected: collected,
        mark: [idHeader, id],
        onLate: (fault, headers) =>
          failures.remember(id, {
            _tag: "ProviderFailure",
            fault,
            status: fault.status,
            body: undefined,
            requestId: provider.requestId(headers),
            trail: MutableRef.get(trail)
          })
      }
    }

    const pooled = (request: Incoming, frame: Frame | undefined): Promise<Response> => {
      const { shape, signal } = request
      const facts = provider.facts(shape)
      const lease = MutableRef.make<KeyPool.Lease | undefined>(undefined)
      const trail = MutableRef.make(emptyTrail)
      const env = environment(frame, trail)
      const headers = new Headers(shape.headers)
      const once: Attempt.PooledRequest = {
        url: shape.url,
        headers,
        init: request.init,
        facts,
        signal,
        timeoutMillis: request.timeoutMillis
      }
      const repeatable = !facts.creating || headers.has("idempotency-key")
      const call = pool.run((leased) => {
        MutableRef.set(lease, leased)
        return Attempt.attempt(env, once, leased)
      }, {
        model: facts.model,
        replayable: request.reusable ? repeatable ? undefined : false : "never",
        hold: (answer) => answer.holds,
        trail,
        classify: (exit) =>
          Exit.isSuccess(exit)
            ? Attempt.outcomeOf(exit.value)
            : Cause.failureOption(exit.cause).pipe((failure) =>
              failure._tag === "Some" ? Attempt.outcomeOf(failure.value) : Outcome.ignored
            )
      })
      return new Promise((resolve, reject) => {
        const startedAt = performance.now()
        const fiber = start(frame, call)
        const abort = () => {
          // A client that gives up when it said it would has run into its timeout; any other abort is the caller's will.
          const timedOut = request.timeoutMillis !== undefined &&
            Math.abs(performance.now() - startedAt - request.timeoutMillis) <= 250
          const held = MutableRef.get(lease)
          const said = timedOut && held !== undefined
            ? held.commit(Outcome.fault(Fault.make("Timeout", { code: "client_timeout" })))
            : Effect.void
          start(frame, Effect.zipRight(said, Fiber.interruptFork(fiber)))
        }
        frame?.fibers.add(fiber)
        if (signal?.aborted === true) abort()
        else signal?.addEventListener("abort", abort, { once: true })
        fiber.addObserver((exit) => {
          frame?.fibers.delete(fiber)
          signal?.removeEventListener("abort", abort)
          if (Exit.isSuccess(exit)) {
            const { body, fault, response } = exit.value
            resolve(
              fault === undefined
                ? response
                : failures.ofAnswer(response, {
                  _tag: "ProviderFailure",
                  fault,
                  status: response.status,
                  body,
                  requestId: provider.requestId(response.headers),
                  trail: MutableRef.get(trail)
                })
            )
            return
          }
          const failure = Cause.failureOption(exit.cause)
          if (failure._tag === "None") {
            reject(Cause.isInterruptedOnly(exit.cause) ? abortError(signal) : Cause.squash(exit.cause))
          } else if (isPoolError(failure.value)) {
            resolve(failures.ofPool(provider, failure.value))
          } else {
            const { error, fault } = failure.value
            reject(
              fault === undefined ? error : failures.ofThrown(error, {
                _tag: "ProviderFailure",
                fault,
                status: undefined,
                body: undefined,
                requestId: undefined,
                trail: MutableRef.get(trail)
              })
            )
          }
        })
      })
    }

    const fetch: Attempt.Transport = (input, init) => {
      const frame = context.get()
      const address = addressOf(input)
      // Not a URL at all, or a `data:` probe of an SDK: nothing to pool.
      if (address === undefined || address.protocol === "data:") return transport(input, init)
      const request = incoming(address, input, init)
      if (address.origin !== options.baseUrl().origin) {
        const headers = new Headers(request.shape.headers)
        for (const name of provider.credentialHeaders) headers.delete(name)
        return transport(input, { ...init, headers })
      }
      return pooled(request, frame)
    }

    const newFrame = Effect.map(
      Effect.runtime<never>(),
      (runtime): Frame => ({ runtime, fibers: new Set(), sealed: MutableRef.make(false) })
    )
    const promised = <A>(frame: Frame, f: (signal: AbortSignal) => PromiseLike<A> | A): Effect.Effect<A, unknown> =>
      Effect.tryPromise({
        try: (signal) => context.run(frame, () => Promise.resolve(f(signal))),
        catch: (error) => error
      }).pipe(Effect.onInterrupt(() => settled(frame)))
    // What a callback has started ends with it, and is settled then.
    const settled = (frame: Frame) => Effect.suspend(() => Fiber.interruptAll([...frame.fibers]))
    const seal = (frame: Frame) => Effect.sync(() => MutableRef.set(frame.sealed, true))

    return {
      fetch,
      failureOf: failures.find,
      within: (f) => Effect.flatMap(newFrame, (frame) => Effect.ensuring(promised(frame, f), seal(frame))),
      iterate: <A>(f: (signal: AbortSignal) => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>) =>
        Stream.unwrapScoped(Effect.gen(function*() {
          const frame = yield* newFrame
          const controller = new AbortController()
          yield* Effect.addFinalizer(() => Effect.zipRight(settled(frame), seal(frame)))
          const iterable = yield* promised(frame, () => f(controller.signal))
          const iterator = iterable[Symbol.asyncIterator]()
          yield* Effect.addFinalizer(() =>
            Effect.sync(() => {
              controller.abort()
              // Not waited for: a generator answers only after the step it is in.
              context.run(frame, () => iterator.return?.())?.catch(() => undefined)
            })
          )
          return Stream.repeatEffectOption(Effect.flatMap(
            Effect.mapError(promised(frame, () => iterator.next()), Option.some),
            (step) => step.done === true ? Effect.fail(Option.none()) : Effect.succeed(step.value)
          ))
        }))
    }
  })

/** A callback that runs: where its requests run, and which are under way. */
interface Frame {
  readonly runtime: Runtime.Runtime<never>
  readonly fibers: Set<Fiber.RuntimeFiber<unknown, unknown>>
  readonly sealed: MutableRef.MutableRef<boolean>
}

// ----------------------------------------------------------------------------------------------------------- requests

/** A request as it came in, in one form for all the ways in which `fetch` can be called. */
interface Incoming {
  readonly shape: RequestShape
  readonly init: () => RequestInit
  readonly signal: AbortSignal | undefined
  readonly reusable: boolean
  readonly timeoutMillis: number | undefined
}

const addressOf = (input: string | URL | Request): URL | undefined => {
  const address = typeof input === "string" ? input : input instanceof URL ? input.href : input.url
  return URL.canParse(address) ? new URL(address) : undefined
}

const incoming = (url: URL, input: string | URL | Request, init: RequestInit | undefined): Incoming => {
  const given = input instanceof Request ? input : undefined
  const headers = new Headers(init?.headers ?? given?.headers)
  const body = init?.body
  const ownBody = body === undefined && given?.body !== null && given?.body !== undefined
  const seconds = Number(headers.get("x-stainless-timeout") ?? undefined)
  return {
    shape: {
      method: (init?.method ?? given?.method ?? "GET").toUpperCase(),
      url,
      headers,
      text: typeof body === "string" ? body : undefined,
      form: body instanceof FormData ? body : undefined
    },
    init: () => ({
      ...init,
      method: init?.method ?? given?.method ?? "GET",
      // A `Request` is copied for each attempt: reading its body uses it up.
      ...(ownBody ? { body: given.clone().body, duplex: "half" } : body === undefined ? {} : { body })
    }),
    signal: init?.signal ?? given?.signal,
    reusable: ownBody || RequestBody.isReusable(body),
    timeoutMillis: Number.isFinite(seconds) && seconds > 0 ? seconds * 1_000 : undefined
  }
}

const abortError = (signal: AbortSignal | undefined): unknown =>
  signal?.aborted === true && signal.reason !== undefined
    ? signal.reason
    : new DOMException("This operation was aborted", "AbortError")

/** Calls back for objects that were collected. */
const collector = (): Attempt.Environment["onCollected"] => {
  if (typeof FinalizationRegistry === "undefined") return () => () => {}
  const registry = new FinalizationRegistry<() => void>((f) => f())
  return (object, f) => {
    const token = {}
    registry.register(object, f, token)
    return () => registry.unregister(token)
  }
}

// ----------------------------------------------------------------------------------------------------------- failures

const idHeader = "x-keymesh-id"

/** The failures that callers may still ask for: by the id in the answer, or by the error that was thrown. */
const makeFailures = (pool: string) =>
  Effect.sync(() => {
    const byId = new Map<string, Failure>()
    const byError = new WeakMap<object, Failure>()
    let count = 0
    const nextId = () => `${pool}-${++count}`
    const remember = (id: string, failure: Failure): void => {
      byId.set(id, failure)
      // Few are ever asked for late: those nobody asks for make room.
      const [oldest] = byId.size > 1_000 ? byId.keys() : []
      if (oldest !== undefined) byId.delete(oldest)
    }
    const ofAnswer = (response: Response, failure: Failure): Response => {
      const id = nextId()
      remember(id, failure)
      response.headers.set(idHeader, id)
      return response
    }
    const ofPool = (provider: Provider, error: PoolError): Response => {
      const { code, status } = honest(error)
      const id = nextId()
      remember(id, error)
      const headers = new Headers({ "content-type": "application/json", "x-should-retry": "false", [idHeader]: id })
      if (status === 429 && error instanceof AllKeysExhausted && error.nextAvailableAt !== undefined) {
        const millis = Math.max(0, error.nextAvailableAt - error.at)
        headers.set("retry-after", String(Math.ceil(millis / 1_000)))
        headers.set("retry-after-ms", String(Math.ceil(millis)))
      }
      const body = provider.renderError({ status, code, message: error.message, id })
      return new Response(JSON.stringify(body), { status, headers })
    }
    const ofThrown = (error: unknown, failure: Failure): unknown => {
      if (Predicate.isObject(error)) byError.set(error, failure)
      return error
    }
    const find = (error: unknown, levels = 6): Failure | undefined => {
      if (!Predicate.isObject(error) || levels === 0) return undefined
      const thrown = byError.get(error)
      if (thrown !== undefined) return thrown
      const id = headerOf(error, idHeader)
      if (id !== undefined) return byId.get(id)
      return "cause" in error ? find(error.cause, levels - 1) : undefined
    }
    return { nextId, remember, ofAnswer, ofPool, ofThrown, find: (error: unknown) => find(error) }
  })

/** A header of the answer that an SDK's error carries, as `Headers` or as a plain record. */
const headerOf = (error: object, name: string): string | undefined => {
  const headers: unknown = "headers" in error ? error.headers : undefined
  const value: unknown = headers instanceof Headers
    ? headers.get(name)
    : Predicate.isRecord(headers)
    ? headers[name]
    : undefined
  return typeof value === "string" ? value : undefined
}

/** The status that says what is the matter. */
const honest = (error: PoolError): { readonly status: number; readonly code: string } => {
  if (!(error instanceof AllKeysExhausted)) return { status: 503, code: `keymesh_${snake(error._tag)}` }
  const reasons = Object.keys(error.reasonCounts)
  if (reasons.length > 0 && reasons.every((reason) => reason === "Unauthorized")) {
    return { status: 401, code: "keymesh_all_keys_unauthorized" }
  }
  return reasons.some((reason) => reason === "RateLimited" || reason === "QuotaExhausted")
    ? { status: 429, code: "keymesh_all_keys_limited" }
    : { status: 503, code: "keymesh_all_keys_exhausted" }
}

const snake = (tag: string): string => tag.replace(/(?<=[a-z])[A-Z]/g, (letter) => `_${letter}`).toLowerCase()
