/**
 * A `fetch` over a pool: whatever SDK it is injected into is pooled, with its signatures unchanged.
 *
 * When the pool gives up it does not throw but returns an error answer in the provider's own words, so that the SDK
 * throws its native error and does not retry; the typed error behind it is found again by `failureOf`.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Random from "effect/Random"
import * as Runtime from "effect/Runtime"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as AsyncContext from "../AsyncContext.js"
import { affinityHeader, around, CallOptions, type Settings as CallSettings, withOptions } from "../CallOptions.js"
import * as Fault from "../Fault.js"
import { AllKeysExhausted, emptyTrail, isPoolError, PoolClosed, type PoolError, type Trail } from "../KeymeshError.js"
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
  /** As `within`, for callbacks that give something to iterate; each step of it belongs to the stream too. */
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
  /** The client's own timeout in milliseconds, where a request does not announce one. Asked for at each request. */
  readonly timeout?: (() => number | undefined) | undefined
  /** What really sends (default: the global `fetch`). */
  readonly transport?: Attempt.Transport | undefined
  /** How much of a stream may be held back before its first content (default 64 events, 256 KiB, 5 s). */
  readonly hold?: EventBody.Limits | undefined
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
    const runtime = yield* Effect.runtime<never>()
    const context = AsyncContext.make<Frame>()
    const failures = yield* makeFailures(pool.name)
    const closed = MutableRef.make(false)
    const calls = new Set<Fiber.RuntimeFiber<unknown, unknown>>()
    const streams = new Set<Attempt.BreakOff>()
    const poolClosed = (trail: Trail) => new PoolClosed({ pool: pool.name, trail })
    yield* Effect.addFinalizer(() =>
      Effect.suspend(() => {
        MutableRef.set(closed, true)
        for (const breakOff of streams) breakOff(poolClosed(emptyTrail))
        return Fiber.interruptAll([...calls])
      })
    )

    const start = <A, E>(frame: Frame | undefined, effect: Effect.Effect<A, E>): Fiber.RuntimeFiber<A, E> =>
      // Outside the caller's asynchronous context: the scheduler would carry it into other fibers. A client may abort
      // its request also where the effect around it may not be interrupted.
      context.outside(() =>
        around.outside(() =>
          Runtime.runFork(frame?.state === "running" ? frame.runtime : runtime)(Effect.interruptible(effect))
        )
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
        limits: options.hold ?? EventBody.defaultLimits,
        fork: (effect) => {
          const fiber = start(frame, effect)
          return () => fiber.unsafeInterruptAsFork(fiber.id())
        },
        onCollected: collected,
        onOpened: (kind, breakOff) => {
          frame?.answers.add(breakOff)
          if (kind === "stream") streams.add(breakOff)
          return () => {
            frame?.answers.delete(breakOff)
            streams.delete(breakOff)
          }
        },
        mark: [idHeader, id],
        onLate: (fault, headers, error) => {
          const failure: Failure = {
            _tag: "ProviderFailure",
            fault,
            status: fault.status,
            body: undefined,
            requestId: provider.requestId(headers),
            trail: MutableRef.get(trail)
          }
          failures.remember(id, failure)
          failures.ofThrown(error, failure)
          heard(frame, { failure, statuses: [fault.status], message: undefined })
        }
      }
    }

    const pooled = (
      request: Incoming,
      frame: Frame | undefined,
      said: CallSettings | undefined
    ): Promise<Response> => {
      const ofPool = (error: PoolError): Response => {
        const { body, response } = failures.ofPool(provider, error)
        heard(frame, { failure: error, statuses: [response.status], message: body })
        return response
      }
      if (MutableRef.get(closed)) return Promise.resolve(ofPool(poolClosed(emptyTrail)))
      const { announced, shape, signal } = request
      if (signal?.aborted === true) return Promise.reject(abortError(signal))
      const facts = provider.facts(shape)
      const stored = provider.resources?.(shape)
      const startedAt = performance.now()
      /** When the attempt that runs began, in the time of the client's own timers, and how it is ended. */
      const begunAt = MutableRef.make(startedAt)
      const expire = MutableRef.make(() => {})
      const outlived = MutableRef.make(false)
      const trail = MutableRef.make(emptyTrail)
      const env = environment(frame, trail)
      const headers = new Headers(shape.headers)
      const once: Attempt.PooledRequest = {
        url: shape.url,
        headers,
        init: request.init,
        facts,
        storing: stored?.storing === true,
        signal,
        holdMillis: announced === undefined ? undefined : Math.max(100, announced.from / 4),
        outlived: () => MutableRef.get(outlived)
      }
      const repeatable = !facts.creating || headers.has("idempotency-key")
      const call = Effect.flatMap(CallOptions, (given) =>
        pool.run((leased) => {
          const now = performance.now()
          const own = MutableRef.make(() => {})
          // What runs beside another attempt began later: the client's timer is about the first.
          if (!leased.hedge) {
            MutableRef.set(begunAt, now)
            MutableRef.set(expire, () => MutableRef.get(own)())
          }
          const attempt = Attempt.attempt(env, { ...once, expire: own }, leased)
          // The client's timer ends too early for an attempt that began later than the call.
          return announced === undefined || (!leased.hedge && now - startedAt <= timeoutSlack / 2)
            ? attempt
            : expiring(attempt, own, announced.to)
        }, {
          model: facts.model,
          streaming: facts.streaming,
          abortable: false,
          tokens: facts.tokens,
          affinity: request.affinity,
          resources: stored?.resources,
          operation: operationOf(shape, options.baseUrl()),
          replayable: request.reusable ? given.replayable ?? repeatable : "never",
          hold: (answer) => answer.holds,
          discard: Attempt.discard,
          trail,
          classify: (exit) =>
            Exit.isSuccess(exit)
              ? Attempt.outcomeOf(exit.value)
              : Cause.failureOption(exit.cause).pipe((failure) =>
                failure._tag === "Some" ? Attempt.outcomeOf(failure.value) : Outcome.ignored
              )
        }))
      const providerFailure = (fault: Fault.Fault, response: Response | undefined, body: unknown): ProviderFailure => ({
        _tag: "ProviderFailure",
        fault,
        status: response?.status,
        body,
        requestId: response === undefined ? undefined : provider.requestId(response.headers),
        trail: MutableRef.get(trail)
      })
      return new Promise((resolve, reject) => {
        const fiber = start(frame, said === undefined ? call : withOptions(call, said))
        const abort = () => {
          // A client that gives up when it said it would has run into its timeout; any other abort is the caller's. The
          // timeout is for each attempt: the client waits on, for as long as the pool tries.
          const now = performance.now()
          const isDue = (since: number): boolean =>
            announced !== undefined && now - since >= announced.from - timeoutSlack
          if (announced === undefined || !isDue(startedAt) || now - startedAt > announced.to + timeoutSlack) {
            start(frame, Fiber.interruptFork(fiber))
            return
          }
          MutableRef.set(outlived, true)
          if (isDue(MutableRef.get(begunAt))) MutableRef.get(expire)()
        }
        calls.add(fiber)
        frame?.calls.add(fiber)
        signal?.addEventListener("abort", abort, { once: true })
        fiber.addObserver((exit) => {
          calls.delete(fiber)
          frame?.calls.delete(fiber)
          signal?.removeEventListener("abort", abort)
          if (Exit.isSuccess(exit)) {
            const { body, fault, response } = exit.value
            if (fault === undefined) return resolve(response)
            const failure = providerFailure(fault, response, body)
            heard(frame, {
              failure,
              statuses: [response.status, fault.status],
              message: typeof body === "string" ? body : JSON.stringify(body)
            })
            return resolve(failures.ofAnswer(response, failure))
          }
          const failure = Cause.failureOption(exit.cause)
          if (failure._tag === "None") {
            if (!Cause.isInterruptedOnly(exit.cause)) reject(Cause.squash(exit.cause))
            else if (MutableRef.get(closed) && (signal?.aborted !== true || MutableRef.get(outlived))) {
              resolve(ofPool(poolClosed(MutableRef.get(trail))))
            } else reject(abortError(signal))
          } else if (isPoolError(failure.value)) {
            resolve(ofPool(failure.value))
          } else {
            const { error, fault } = failure.value
            if (fault === undefined) return reject(error)
            const thrown = providerFailure(fault, undefined, undefined)
            heard(frame, { failure: thrown, statuses: [undefined], message: undefined })
            reject(failures.ofThrown(error, thrown))
          }
        })
      })
    }

    // As with any `fetch`, what cannot be sent is a rejection.
    const fetch: Attempt.Transport = async (input, init) => {
      const frame = context.get()
      const address = addressOf(input)
      // Not a URL at all, or a `data:` probe of an SDK: nothing to pool.
      if (address === undefined || address.protocol === "data:") return transport(input, init)
      if (address.origin !== options.baseUrl().origin) {
        const headers = headersOf(input, init)
        for (const name of [...provider.credentialHeaders, affinityHeader]) headers.delete(name)
        return transport(input, { ...init, headers })
      }
      const said = around.get()
      return incoming(options, address, input, init, (request) => pooled(request, frame, said))
    }

    const newFrame = Effect.map(
      Effect.runtime<never>(),
      (runtime): Frame => ({ runtime, calls: new Set(), answers: new Set(), heard: [], state: "running" })
    )
    const promised = <A>(frame: Frame, f: (signal: AbortSignal) => PromiseLike<A> | A): Effect.Effect<A, unknown> =>
      Effect.tryPromise({
        try: (signal) => context.run(frame, () => Promise.resolve(f(signal))),
        catch: (error) => attributed(frame, error)
      })
    /** Many an SDK makes errors of its own that lead back to no answer: the callback knows what came to it. */
    const attributed = (frame: Frame, error: unknown): unknown => {
      const failure = failures.find(error) === undefined ? behind(error, frame.heard) : undefined
      return failure === undefined ? error : failures.ofThrown(error, failure)
    }
    /** What a callback has started ends with it, and is settled then. */
    const breakOff = (frame: Frame) =>
      Effect.suspend(() => {
        for (const stop of frame.answers) stop()
        return Fiber.interruptAll([...frame.calls])
      })
    const seal = (frame: Frame) =>
      Effect.sync(() => {
        frame.state = "sealed"
      })

    return {
      fetch,
      failureOf: failures.find,
      within: (f) =>
        Effect.flatMap(newFrame, (frame) =>
          promised(frame, f).pipe(
            Effect.onInterrupt(() => breakOff(frame)),
            Effect.ensuring(seal(frame))
          )),
      iterate: <A>(f: (signal: AbortSignal) => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>) =>
        Stream.unwrapScoped(Effect.gen(function*() {
          const frame = yield* newFrame
          const controller = new AbortController()
          const opened = MutableRef.make<AsyncIterator<A> | undefined>(undefined)
          yield* Effect.addFinalizer(() =>
            Effect.suspend(() => {
              controller.abort()
              // Not waited for: a generator answers only after the step that it is in.
              context.run(frame, async () => MutableRef.get(opened)?.return?.()).catch(() => undefined)
              return Effect.zipRight(breakOff(frame), seal(frame))
            })
          )
          const iterator = yield* promised(frame, async () => {
            const iterator = (await f(controller.signal))[Symbol.asyncIterator]()
            MutableRef.set(opened, iterator)
            return iterator
          })
          return Stream.repeatEffectOption(Effect.flatMap(
            Effect.mapError(promised(frame, () => iterator.next()), Option.some),
            (step) => step.done === true ? Effect.fail(Option.none()) : Effect.succeed(step.value)
          ))
        }))
    }
  })

/** An attempt that times out after so long. */
const expiring = <A, E>(
  attempt: Effect.Effect<A, E>,
  expire: MutableRef.MutableRef<() => void>,
  millis: number
): Effect.Effect<A, E> =>
  Effect.acquireUseRelease(
    Effect.fork(Effect.interruptible(Effect.delay(Effect.sync(() => MutableRef.get(expire)()), millis))),
    () => attempt,
    Fiber.interruptFork
  )

/** A callback that runs: where its requests run, which are under way, and which answers are open. */
interface Frame {
  readonly runtime: Runtime.Runtime<never>
  readonly calls: Set<Fiber.RuntimeFiber<unknown, unknown>>
  readonly answers: Set<Attempt.BreakOff>
  /** What went wrong with its requests, the last ones last. */
  readonly heard: Array<Heard>
  state: "running" | "sealed"
}

/** A failure as an SDK's error may show it: by the text of the answer, or by its status; without one, nothing came. */
interface Heard {
  readonly failure: Failure
  readonly statuses: ReadonlyArray<number | undefined>
  readonly message: string | undefined
}

/** An error shows what came last; a callback that outlives many failures need not keep them all. */
const heard = (frame: Frame | undefined, one: Heard): void => {
  if (frame === undefined) return
  frame.heard.push(one)
  if (frame.heard.length > 64) frame.heard.shift()
}

/** Which of the failures an SDK's error is about. What is no error of an SDK is the callback's own. */
const behind = (error: unknown, heard: ReadonlyArray<Heard>): Failure | undefined => {
  if (!(error instanceof Error)) return undefined
  const status: unknown = Reflect.get(error, "status")
  const last = typeof status === "number"
    ? heard.findLast(({ message }) => message === error.message) ??
      heard.findLast(({ statuses }) => statuses.includes(status))
    : aborted.test(`${error.name} ${error.constructor.name}`)
    ? heard.findLast(({ failure }) => failure._tag === "ProviderFailure" && failure.fault.kind === "Timeout")
    : isOfConnection(error)
    ? heard.at(-1)
    : undefined
  return last?.failure
}

/**
 * Whether an error is what an SDK throws for a request that got no answer.
 *
 * @since 0.1.0
 * @category guards
 */
export const isOfConnection = (error: Error): boolean => /^APIConnection(?:Timeout)?Error$/.test(error.constructor.name)

/** A client that ran into its own timeout says so, or that it aborted. */
const aborted = /Timeout|Abort/

// ----------------------------------------------------------------------------------------------------------- requests

/** A request as it came in, in one form for all the ways in which `fetch` can be called. */
interface Incoming {
  readonly shape: RequestShape
  readonly init: () => RequestInit
  readonly signal: AbortSignal | undefined
  readonly reusable: boolean
  readonly affinity: string | undefined
  /** Between which times, in milliseconds, the client's timeout is: where it announces one, in whole seconds. */
  readonly announced: { readonly from: number; readonly to: number } | undefined
}

/** Such as `POST /chat/completions`: nothing of the query, which may hold anything. */
const operationOf = ({ method, url }: RequestShape, baseUrl: URL): string =>
  `${method} ${Attempt.pathBelow(baseUrl, url)}`

const addressOf = (input: string | URL | Request): URL | undefined => {
  const address = typeof input === "string" ? input : input instanceof URL ? input.href : input.url
  return URL.canParse(address) ? new URL(address) : undefined
}

const headersOf = (input: string | URL | Request, init: RequestInit | undefined): Headers =>
  new Headers(init?.headers ?? (input instanceof Request ? input.headers : undefined))

/** Reads a request, and goes on with it: at once, unless its body is that of a `Request`, which is read here. */
const incoming = <A>(
  { provider, timeout }: Options,
  url: URL,
  input: string | URL | Request,
  init: RequestInit | undefined,
  go: (request: Incoming) => Promise<A>
): Promise<A> => {
  const given = input instanceof Request ? input : undefined
  const headers = headersOf(input, init)
  const affinity = headers.get(affinityHeader) ?? ""
  headers.delete(affinityHeader)
  const method = init?.method ?? given?.method ?? "GET"
  const read = (body: RequestInit["body"]) =>
    go({
      shape: {
        method: method.toUpperCase(),
        url,
        headers,
        text: typeof body === "string" ? body : undefined,
        form: body instanceof FormData ? body : undefined
      },
      init: () => ({ ...init, method, ...(body === undefined ? {} : { body }) }),
      signal: init?.signal ?? given?.signal,
      affinity: affinity === "" ? undefined : affinity,
      reusable: RequestBody.isReusable(body),
      announced: announcedBy(provider, headers) ?? exactly(timeout?.())
    })
  if (init?.body !== undefined || given === undefined || given.body === null) return read(init?.body)
  // It is a stream: nobody could look into it, or send it again.
  return (headers.get("content-type")?.includes("json") === true ? given.text() : given.arrayBuffer()).then(read)
}

const announcedBy = ({ timeoutHeader }: Provider, headers: Headers): Incoming["announced"] => {
  const seconds = timeoutHeader === undefined ? "" : headers.get(timeoutHeader.name) ?? ""
  if (timeoutHeader === undefined || !/^\d{1,9}$/.test(seconds)) return undefined
  const from = Number(seconds) - (timeoutHeader.rounded === "up" ? 1 : 0)
  return { from: from * 1_000, to: (from + 1) * 1_000 }
}

const exactly = (millis: number | undefined): Incoming["announced"] =>
  millis === undefined ? undefined : { from: millis, to: millis }

/** How far from the announced timeout an abort is one, in milliseconds. */
const timeoutSlack = 250

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
  // Two pools of one name are told apart: an error of the one may be shown to the other.
  Effect.map(Random.nextIntBetween(0, 0x1000000), (instance) => {
    const byId = new Map<string, Failure>()
    const byError = new WeakMap<object, Failure>()
    let count = 0
    const nextId = () => `${pool}-${instance.toString(36)}-${++count}`
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
    const ofPool = (provider: Provider, error: PoolError): { readonly response: Response; readonly body: string } => {
      const { code, status } = honest(error)
      const id = nextId()
      remember(id, error)
      const headers = new Headers({ "content-type": "application/json", "x-should-retry": "false", [idHeader]: id })
      const wait = status === 429 && error instanceof AllKeysExhausted ? error.retryAfter : undefined
      const waitMillis = wait === undefined ? undefined : Duration.toMillis(wait)
      if (waitMillis !== undefined) {
        headers.set("retry-after", String(Math.ceil(waitMillis / 1_000)))
        headers.set("retry-after-ms", String(waitMillis))
      }
      const body = JSON.stringify(provider.renderError({ status, code, message: error.message, id, waitMillis }))
      return { body, response: new Response(body, { status, headers }) }
    }
    const ofThrown = (error: unknown, failure: Failure): unknown => {
      if (Predicate.isObject(error)) byError.set(error, failure)
      return error
    }
    const find = (error: unknown, levels = 6): Failure | undefined => {
      if (!Predicate.isObject(error) || levels === 0) return undefined
      if (isPoolError(error)) return error
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
  // Keys that could not serve such a call at all say nothing about it.
  const reasons = Object.keys(error.reasonCounts).filter((reason) => !unsuited.includes(reason))
  if (reasons.length > 0 && reasons.every((reason) => reason === "Unauthorized")) {
    return { status: 401, code: "keymesh_all_keys_unauthorized" }
  }
  return reasons.some((reason) => reason === "RateLimited" || reason === "QuotaExhausted" || reason === "limit")
    ? { status: 429, code: "keymesh_all_keys_limited" }
    : { status: 503, code: "keymesh_all_keys_exhausted" }
}

const unsuited: ReadonlyArray<string> = ["affinity", "unsuited", "model"]

const snake = (tag: string): string => tag.replace(/(?<=[a-z])[A-Z]/g, (letter) => `_${letter}`).toLowerCase()
