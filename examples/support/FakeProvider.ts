/**
 * A make-believe API provider on 127.0.0.1, for examples and tests: the part that is the same for every provider.
 *
 * It owns the server and its sockets, the log of requests, and how each key behaves: accepted, revoked, limited, out
 * of money, unreachable, slow … What the provider's answers look like comes from a `Dialect`; `FakeOpenAi` is one.
 */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberSet from "effect/FiberSet"
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as SubscriptionRef from "effect/SubscriptionRef"
import * as Http from "node:http"
import type * as Net from "node:net"

// ---------------------------------------------------------------------------------------------------------------------
// How keys behave
// ---------------------------------------------------------------------------------------------------------------------

/**
 * How the server treats a key. Every field is optional and they combine; `{}` is a healthy key.
 *
 * When several apply, the first of this order wins: `reset`, `hang`, `redirect`, `outage`, `refuse`, `models`, `limit`.
 */
export interface Behaviour {
  /** Refuses every request, for this reason. */
  readonly refuse?: Reason
  /** Accepts so many requests only; the others are told to wait. */
  readonly limit?: Limit
  /** Accepts these models only. */
  readonly models?: ReadonlyArray<string>
  /** Fails as a provider in trouble does. */
  readonly outage?: Outage
  /** Reads the request, then resets the connection. */
  readonly reset?: boolean
  /** Reads the request, then never answers. */
  readonly hang?: boolean
  /** Sends the client to another place. */
  readonly redirect?: { readonly to: string; readonly status?: 301 | 302 | 303 | 307 | 308 }
  /** Breaks the connection after so many content events of a stream. Any other answer breaks in its middle. */
  readonly cutAfter?: number
  /** Falls silent after so many content events of a stream, with the connection open. */
  readonly stallAfter?: number
  /** Ends a stream, whose status is 200, by an error event after so many content events; 0 is before any of them. */
  readonly streamError?: { readonly after: number; readonly as?: "server" | "overloaded" | "rateLimited" | "quota" }
  /** Milliseconds before the answer begins. */
  readonly latencyMs?: number
  /** Milliseconds before each event of a stream. */
  readonly chunkDelayMs?: number
  /** Puts the key, unmasked, into body, headers and reason phrase of every error: a careless proxy, to test secrecy. */
  readonly echo?: boolean
}

/** Why a key is refused. */
export type Reason = "revoked" | "deactivated" | "quota" | "forbidden" | "region"

/** A limit on requests. Its first window starts at the first request. Refused requests do not count. */
export interface Limit {
  readonly requestsPerMinute: number
  /** Makes it a token bucket that holds so many requests, instead of a fixed window. */
  readonly burst?: number
  /** Length of the fixed window (default 60,000), which admits its share of `requestsPerMinute`, at least 1. */
  readonly windowMs?: number
  /** Counts each model on its own. */
  readonly perModel?: boolean
  /** How it is told: by headers on every answer and in the refusal (the default), in the refusal alone, or not at all. */
  readonly says?: "all" | "message" | "nothing"
}

/** An outage: while it is set, or between two instants counted from when it was set. */
export interface Outage {
  readonly status: number
  /** Milliseconds from when the behaviour was set until it begins (default 0). */
  readonly fromMs?: number
  /** Milliseconds from when the behaviour was set until it is over (default: never). */
  readonly untilMs?: number
}

/** Stands for "whatever the key" in `keys`, `set` and `script`. */
export const everyKey = "*"

// ---------------------------------------------------------------------------------------------------------------------
// Requests and answers
// ---------------------------------------------------------------------------------------------------------------------

/** A request as the server read it. */
export interface Incoming {
  /** 1 for the first request of this server. */
  readonly number: number
  readonly method: string
  /** Without the query. */
  readonly path: string
  readonly query: URLSearchParams
  /** Names in lower case. A header that was sent twice has both values, joined by ", ". */
  readonly headers: Readonly<Record<string, string>>
  readonly key: string | undefined
  /** The name of the key's group, where `groups` gives one. */
  readonly group: string | undefined
  /** Whose limits are counted and whose stored resources are seen: the group, or else the key alone. */
  readonly owner: string
  readonly bytes: Uint8Array
  readonly body: string
}

/** An answer, spelled out. Common headers (content type, request id) are added where it does not give them. */
export interface Answer {
  readonly status: number
  /** The reason phrase; by default the usual one of the status. */
  readonly statusText?: string
  /** `undefined` takes a common header away. */
  readonly headers?: Readonly<Record<string, string | undefined>>
  readonly body?: string | Uint8Array | AsyncIterable<Uint8Array> | Frames
  /** Milliseconds before the answer begins. */
  readonly delayMs?: number
}

/** The events of a stream: written one by one, so that a `Behaviour` can slow them, cut them, or fail between them. */
export interface Frames {
  readonly frames: ReadonlyArray<Frame>
}

/** One event of a stream. `content` marks those that carry text (or anything else) that was generated. */
export interface Frame {
  readonly text: string
  readonly content?: boolean
}

/** What the log keeps of a request. Times are milliseconds since the server started. */
export interface LoggedRequest {
  readonly number: number
  readonly at: number
  readonly method: string
  readonly path: string
  readonly query: string
  readonly headers: Readonly<Record<string, string>>
  readonly key: string | undefined
  readonly body: string
  /** Of the answer, from when its headers are sent. */
  readonly status: number | undefined
  /** When the answer was sent completely, or given up. */
  readonly endedAt: number | undefined
  /** Whether the client hung up before the end. */
  readonly aborted: boolean
}

// ---------------------------------------------------------------------------------------------------------------------
// What a provider adds
// ---------------------------------------------------------------------------------------------------------------------

/** Why the server itself refuses a request, before any route has seen it. */
export type Refusal =
  | { readonly _tag: "KeyMissing" }
  | { readonly _tag: "KeyRefused"; readonly reason: Reason }
  | { readonly _tag: "ModelUnknown"; readonly model: string }
  | { readonly _tag: "RateLimited"; readonly limit: Limit; readonly quota: Quota }
  | { readonly _tag: "Outage"; readonly status: number }

/** A refusal in the words of a provider. */
export interface Complaint {
  readonly status: number
  readonly message: string
  readonly type: string
  readonly code: string | null
  readonly param: string | null
  readonly headers?: Readonly<Record<string, string>>
}

/** Where a limit stands after a request. */
export interface Quota {
  readonly accepted: boolean
  readonly limit: number
  readonly remaining: number
  /** Milliseconds until one more request fits; 0 when one fits now. */
  readonly waitMs: number
  /** Milliseconds until the limit is as if nothing had been sent. */
  readonly resetMs: number
}

/** The language of one provider: its routes, the words of its refusals, and where it looks for the key. */
export interface Dialect {
  /** What an SDK's base URL ends with, such as `/v1`. */
  readonly basePath: string
  readonly keyOf: (headers: Readonly<Record<string, string>>) => string | undefined
  readonly modelOf: (request: Incoming) => string | undefined
  /** The answer to a request that is not refused for its key; to fail with a complaint is to answer with it. */
  readonly answer: (request: Incoming, behaviour: Behaviour) => Effect.Effect<Answer, Complaint>
  readonly complain: (refusal: Refusal, request: Incoming) => Complaint
  readonly render: (complaint: Complaint) => Answer
  /** An error in the middle of an answer that has already begun with 200. */
  readonly renderInStream: (complaint: Complaint, request: Incoming) => ReadonlyArray<Frame>
  /** Headers of every answer. */
  readonly headers: (request: Incoming, tookMs: number) => Readonly<Record<string, string>>
  readonly limitHeaders: (quota: Quota) => Readonly<Record<string, string>>
  /** Forgets stored resources and starts the ids again. */
  readonly reset: Effect.Effect<void>
}

/** What every fake provider can be told at its start. */
export interface Options {
  /** How the keys behave, by key; `"*"` is laid over all of them. */
  readonly keys?: Readonly<Record<string, Behaviour>>
  /** Whether keys that were never named are refused as revoked (default: they are healthy). */
  readonly strict?: boolean
  /** Keys with the same group name share their limits and their stored resources, as in one organization. */
  readonly groups?: Readonly<Record<string, string>>
  /** Asked first, whatever the key; `undefined` leaves the request to the rest. */
  readonly handler?: (request: Incoming) => Answer | undefined
}

/** A running fake provider. */
export interface FakeProvider {
  /** `http://127.0.0.1:PORT` */
  readonly origin: string
  /** What to give an SDK as its base URL. */
  readonly baseUrl: string
  /** From now on the key behaves so; its former behaviour is forgotten. */
  readonly set: (key: string, behaviour: Behaviour) => Effect.Effect<void>
  /** The next requests of the key get these, each used once; then it behaves as it is set to. */
  readonly script: (key: string, answers: ReadonlyArray<Answer | Behaviour>) => Effect.Effect<void>
  /** Back to the start: the behaviours of `Options.keys`, an empty log, no scripts, no used limits, nothing stored. */
  readonly reset: Effect.Effect<void>
  /** Everything received so far, in order of arrival. */
  readonly requests: Effect.Effect<ReadonlyArray<LoggedRequest>>
  /** How many requests are being answered. */
  readonly inFlight: Effect.Effect<number>
  /** Waits until none is. */
  readonly idle: Effect.Effect<void>
  /** Waits until the log satisfies the predicate. */
  readonly waitUntil: (holds: (requests: ReadonlyArray<LoggedRequest>) => boolean) => Effect.Effect<void>
  /** Waits until so many requests have arrived. */
  readonly waitForRequests: (count: number) => Effect.Effect<void>
  /** Stops now, and drops every connection. The end of the scope does the same. */
  readonly close: Effect.Effect<void>
}

// ---------------------------------------------------------------------------------------------------------------------
// The server
// ---------------------------------------------------------------------------------------------------------------------

/** Starts a server that speaks the dialect, on a free port of 127.0.0.1, until its scope closes. */
export const make = (dialect: Dialect, options: Options = {}): Effect.Effect<FakeProvider, never, Scope.Scope> =>
  Effect.gen(function*() {
    // A real server needs real time, also in a test whose own clock is virtual.
    const clock = Clock.make()
    const startedAt = yield* clock.currentTimeNanos
    const now = Effect.map(clock.currentTimeNanos, (nanos) => Number(nanos - startedAt) / 1e6)

    const log = yield* SubscriptionRef.make(emptyLog)
    const behaviours = yield* Ref.make(initialBehaviours(options))
    const scripts = yield* Ref.make(HashMap.empty<string, ReadonlyArray<Answer | Behaviour>>())
    const buckets = yield* Ref.make(HashMap.empty<string, Bucket>())

    // A scope of its own lets `close` stop the server before the caller's scope ends.
    const scope = yield* Effect.acquireRelease(Scope.make(), Scope.close)
    const server = yield* Scope.extend(listen, scope)
    const run = yield* Scope.extend(FiberSet.makeRuntime<never>(), scope)
    server.on("request", (request, response) => {
      run(Effect.withClock(exchange(request, response), clock))
    })

    /** One request and its answer, from the first byte to the last. */
    const exchange = (request: Http.IncomingMessage, response: Http.ServerResponse): Effect.Effect<void> =>
      Effect.gen(function*() {
        const at = yield* now
        const upload = yield* readBody(request)
        const number = yield* SubscriptionRef.modify(log, (state) => [state.next, { ...state, next: state.next + 1 }])
        const incoming = describe(request, upload.bytes, number)
        yield* SubscriptionRef.update(log, opened(incoming, at))
        const connection = { response, ours: false }
        const serve = Effect.raceFirst(
          Effect.as(upload.complete ? answer(incoming, at, connection) : Effect.void, !upload.complete),
          Effect.as(hungUp(connection), true)
        )
        yield* Effect.onExit(serve, (exit) => finish(number, Exit.isSuccess(exit) && exit.value))
      }).pipe(
        Effect.catchAllCause((cause) =>
          Effect.zipRight(Effect.logError("The fake provider failed to answer", cause), drop(response))
        )
      )

    const finish = (number: number, aborted: boolean) =>
      Effect.flatMap(now, (endedAt) => SubscriptionRef.update(log, closed(number, { endedAt, aborted })))

    const describe = (request: Http.IncomingMessage, bytes: Uint8Array, number: number): Incoming => {
      const url = new URL(request.url ?? "/", "http://fake")
      const headers = joinHeaders(request.rawHeaders)
      const key = dialect.keyOf(headers)
      const group = key === undefined ? undefined : options.groups?.[key]
      return {
        number,
        method: request.method ?? "GET",
        path: url.pathname,
        query: url.searchParams,
        headers,
        key,
        group,
        owner: group === undefined ? `key ${key}` : `group ${group}`,
        bytes,
        body: new TextDecoder().decode(bytes)
      }
    }

    const answer = (request: Incoming, at: number, connection: Connection) =>
      Effect.gen(function*() {
        const move = yield* decide(request)
        const delayMs = (move.behaviour.latencyMs ?? 0) + (move.answer?.delayMs ?? 0)
        if (delayMs > 0) yield* Effect.sleep(delayMs)
        if (move.behaviour.reset === true) return yield* reset(connection)
        if (move.answer === undefined) return yield* Effect.never
        const common = dialect.headers(request, (yield* now) - at)
        yield* SubscriptionRef.update(log, answered(request.number, move.answer.status))
        yield* send(connection, withHeaders(move.answer, common), move.behaviour)
      })

    /** Which answer it will be. Limits are counted here, on arrival, not when a slow answer leaves. */
    const decide = (request: Incoming): Effect.Effect<Move> =>
      Effect.gen(function*() {
        const custom = options.handler?.(request)
        if (custom !== undefined) return { answer: custom, behaviour: {} }
        const scripted = yield* Ref.modify(scripts, takeScripted(request.key))
        if (scripted !== undefined && "status" in scripted) return { answer: scripted, behaviour: {} }
        const time = yield* now
        const installed = yield* Ref.get(behaviours)
        const given = scripted === undefined
          ? behaviourOf(installed, options, request.key)
          : { behaviour: scripted, outages: [{ outage: scripted.outage, since: time }] }
        const { behaviour } = given
        if (behaviour.reset === true || behaviour.hang === true) return { answer: undefined, behaviour }
        if (behaviour.redirect !== undefined) return { answer: redirection(behaviour.redirect), behaviour }
        const refusal = refusalOf(given, request, dialect.modelOf(request), time)
        if (refusal !== undefined) return { answer: refuse(refusal, request, behaviour), behaviour }
        const quota = yield* spend(behaviour.limit, request, time)
        if (behaviour.limit !== undefined && quota?.accepted === false) {
          const limited = { _tag: "RateLimited", limit: behaviour.limit, quota } as const
          return { answer: refuse(limited, request, behaviour), behaviour }
        }
        const normal = yield* Effect.catchAll(
          dialect.answer(request, behaviour),
          (plain) => Effect.succeed(dialect.render(loud(plain, request, behaviour)))
        )
        const told = quota === undefined || (behaviour.limit?.says ?? "all") !== "all"
          ? normal
          : withHeaders(normal, dialect.limitHeaders(quota))
        return { answer: troubled(echoed(told, request, behaviour), request, behaviour), behaviour }
      })

    const spend = (limit: Limit | undefined, request: Incoming, time: number): Effect.Effect<Quota | undefined> => {
      if (limit === undefined) return Effect.succeed(undefined)
      const bucket = limit.perModel === true ? `${request.owner} ${dialect.modelOf(request)}` : request.owner
      return Ref.modify(buckets, (all) => {
        const [quota, next] = take(limit, Option.getOrUndefined(HashMap.get(all, bucket)), time)
        return [quota, HashMap.set(all, bucket, next)]
      })
    }

    const refuse = (refusal: Refusal, request: Incoming, behaviour: Behaviour): Answer =>
      echoed(dialect.render(loud(dialect.complain(refusal, request), request, behaviour)), request, behaviour)

    /** The answer as a behaviour that harms streams leaves it. */
    const troubled = (answer: Answer, request: Incoming, behaviour: Behaviour): Answer => {
      if (!hasFrames(answer.body) || behaviour.streamError === undefined) return answer
      const { after, as = "server" } = behaviour.streamError
      const error = dialect.renderInStream(
        loud(dialect.complain(streamRefusals[as], request), request, behaviour),
        request
      )
      const { frames } = answer.body
      return { ...answer, body: { frames: [...frames.slice(0, positionAfter(frames, after)), ...error] } }
    }

    const requests = Effect.map(SubscriptionRef.get(log), entries)
    const wait = (holds: (state: Log) => boolean) =>
      log.changes.pipe(Stream.filter(holds), Stream.take(1), Stream.runDrain)
    const origin = `http://127.0.0.1:${portOf(server)}`

    return {
      origin,
      baseUrl: `${origin}${dialect.basePath}`,
      set: (key, behaviour) =>
        Effect.flatMap(now, (since) => Ref.update(behaviours, HashMap.set(key, { behaviour, since }))),
      script: (key, answers) => Ref.update(scripts, HashMap.set(key, answers)),
      reset: Effect.gen(function*() {
        const since = yield* now
        yield* Ref.set(behaviours, HashMap.map(initialBehaviours(options), ({ behaviour }) => ({ behaviour, since })))
        yield* Ref.set(scripts, HashMap.empty())
        yield* Ref.set(buckets, HashMap.empty())
        yield* dialect.reset
        yield* SubscriptionRef.update(log, (state) => ({ ...state, entries: HashMap.empty() }))
      }),
      requests,
      inFlight: Effect.map(SubscriptionRef.get(log), (state) => state.open),
      idle: wait((state) => state.open === 0),
      waitUntil: (holds) => wait((state) => holds(entries(state))),
      waitForRequests: (count) => wait((state) => HashMap.size(state.entries) >= count),
      close: Scope.close(scope, Exit.void)
    }
  })

// ---------------------------------------------------------------------------------------------------------------------
// Behaviours
// ---------------------------------------------------------------------------------------------------------------------

/** What to do about a request; no answer means silence, or a reset if the behaviour says so. */
interface Move {
  readonly answer: Answer | undefined
  readonly behaviour: Behaviour
}

interface Installed {
  readonly behaviour: Behaviour
  readonly since: number
}

/** The behaviour of a request. Outages of the key and of every key count from different instants: they stay apart. */
interface Given {
  readonly behaviour: Behaviour
  readonly outages: ReadonlyArray<{ readonly outage: Outage | undefined; readonly since: number }>
}

const initialBehaviours = (options: Options): HashMap.HashMap<string, Installed> =>
  HashMap.map(HashMap.fromIterable(Object.entries(options.keys ?? {})), (behaviour) => ({ behaviour, since: 0 }))

const behaviourOf = (
  installed: HashMap.HashMap<string, Installed>,
  options: Options,
  key: string | undefined
): Given => {
  const unknown: Installed = { behaviour: options.strict === true ? { refuse: "revoked" } : {}, since: 0 }
  const own = Option.getOrElse(HashMap.get(installed, key ?? ""), () => unknown)
  const shared = Option.getOrElse(HashMap.get(installed, everyKey), (): Installed => ({ behaviour: {}, since: 0 }))
  return {
    behaviour: { ...own.behaviour, ...shared.behaviour },
    outages: [own, shared].map(({ behaviour, since }) => ({ outage: behaviour.outage, since }))
  }
}

const refusalOf = (
  { behaviour, outages }: Given,
  request: Incoming,
  model: string | undefined,
  now: number
): Refusal | undefined => {
  for (const { outage, since } of outages) {
    if (outage !== undefined && now - since >= (outage.fromMs ?? 0) && now - since < (outage.untilMs ?? Infinity)) {
      return { _tag: "Outage", status: outage.status }
    }
  }
  if (request.key === undefined) return { _tag: "KeyMissing" }
  if (behaviour.refuse !== undefined) return { _tag: "KeyRefused", reason: behaviour.refuse }
  if (behaviour.models !== undefined && model !== undefined && !behaviour.models.includes(model)) {
    return { _tag: "ModelUnknown", model }
  }
  return undefined
}

/** What the errors inside streams are refusals for. */
const streamRefusals: Record<NonNullable<NonNullable<Behaviour["streamError"]>["as"]>, Refusal> = {
  server: { _tag: "Outage", status: 500 },
  overloaded: { _tag: "Outage", status: 503 },
  quota: { _tag: "KeyRefused", reason: "quota" },
  rateLimited: {
    _tag: "RateLimited",
    limit: { requestsPerMinute: 60 },
    quota: { accepted: false, limit: 60, remaining: 0, waitMs: 1000, resetMs: 60_000 }
  }
}

const redirection = ({ status = 307, to }: NonNullable<Behaviour["redirect"]>): Answer => ({
  status,
  headers: { location: to },
  body: ""
})

const takeScripted =
  (key: string | undefined) =>
  (scripts: HashMap.HashMap<string, ReadonlyArray<Answer | Behaviour>>): readonly [
    Answer | Behaviour | undefined,
    HashMap.HashMap<string, ReadonlyArray<Answer | Behaviour>>
  ] => {
    for (const name of [key ?? "", everyKey]) {
      const [first, ...rest] = Option.getOrElse(HashMap.get(scripts, name), (): ReadonlyArray<Answer | Behaviour> => [])
      if (first !== undefined) return [first, HashMap.set(scripts, name, rest)]
    }
    return [undefined, scripts]
  }

const credential = (request: Incoming): string => request.headers["authorization"] ?? request.key ?? "no credential"

/** A complaint that tells the key, where the behaviour wants that. */
const loud = (complaint: Complaint, request: Incoming, behaviour: Behaviour): Complaint =>
  behaviour.echo === true ? { ...complaint, message: `${complaint.message} (sent: ${credential(request)})` } : complaint

const echoed = (answer: Answer, request: Incoming, behaviour: Behaviour): Answer =>
  behaviour.echo !== true || answer.status < 400 ? answer : {
    ...answer,
    statusText: `${Http.STATUS_CODES[answer.status] ?? "Error"} (${credential(request)})`,
    headers: { ...answer.headers, "x-received-authorization": credential(request) }
  }

// ---------------------------------------------------------------------------------------------------------------------
// Limits
// ---------------------------------------------------------------------------------------------------------------------

/** A window that began at `at`, or a bucket as it was at `at`, with room for `free` more requests. */
interface Bucket {
  readonly at: number
  readonly free: number
}

/** Tries to take one request out of a limit. `bucket` is `undefined` before the first. */
export const take = (limit: Limit, bucket: Bucket | undefined, now: number): readonly [Quota, Bucket] => {
  const perMs = limit.requestsPerMinute / 60_000
  const windowMs = limit.windowMs ?? 60_000
  const capacity = limit.burst ?? Math.max(1, Math.floor(perMs * windowMs))
  const before = limit.burst === undefined
    ? bucket === undefined || now - bucket.at >= windowMs ? { at: now, free: capacity } : bucket
    : { at: now, free: bucket === undefined ? capacity : Math.min(capacity, bucket.free + (now - bucket.at) * perMs) }
  // A client that waited exactly as told must not fail by a rounding error.
  const accepted = before.free >= 1 - 1e-6
  const after = { at: before.at, free: accepted ? Math.max(0, before.free - 1) : before.free }
  const windowLeftMs = after.at + windowMs - now
  const remaining = Math.floor(after.free + 1e-6)
  return [{
    accepted,
    limit: limit.requestsPerMinute,
    remaining,
    waitMs: remaining > 0 ? 0 : limit.burst === undefined ? windowLeftMs : (1 - after.free) / perMs,
    resetMs: limit.burst === undefined ? windowLeftMs : (capacity - after.free) / perMs
  }, after]
}

// ---------------------------------------------------------------------------------------------------------------------
// The log
// ---------------------------------------------------------------------------------------------------------------------

interface Log {
  readonly next: number
  readonly open: number
  readonly entries: HashMap.HashMap<number, LoggedRequest>
}

const emptyLog: Log = { next: 1, open: 0, entries: HashMap.empty() }

const entries = (log: Log): ReadonlyArray<LoggedRequest> =>
  Array.from(HashMap.values(log.entries)).sort((one, other) => one.number - other.number)

const opened = (request: Incoming, at: number) => (log: Log): Log => ({
  ...log,
  open: log.open + 1,
  entries: HashMap.set(log.entries, request.number, {
    number: request.number,
    at,
    method: request.method,
    path: request.path,
    query: request.query.toString(),
    headers: request.headers,
    key: request.key,
    body: request.body,
    status: undefined,
    endedAt: undefined,
    aborted: false
  })
})

const answered = (number: number, status: number) => (log: Log): Log => ({
  ...log,
  entries: HashMap.modify(log.entries, number, (entry) => ({ ...entry, status }))
})

const closed = (number: number, end: Pick<LoggedRequest, "endedAt" | "aborted">) => (log: Log): Log => ({
  ...log,
  open: log.open - 1,
  entries: HashMap.modify(log.entries, number, (entry) => ({ ...entry, ...end }))
})

// ---------------------------------------------------------------------------------------------------------------------
// Sockets
// ---------------------------------------------------------------------------------------------------------------------

/** `ours` tells a connection that the server broke from one that the client left. */
interface Connection {
  readonly response: Http.ServerResponse
  ours: boolean
}

const listen: Effect.Effect<Http.Server, never, Scope.Scope> = Effect.acquireRelease(
  Effect.async<Http.Server>((resume) => {
    // Without this, a client that reuses an idle connection may meet its end, and see a reset nobody asked for.
    const server = Http.createServer({ keepAliveTimeout: 0, requestTimeout: 0 })
    server.listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
    server.once("error", (error) => resume(Effect.die(error)))
  }),
  (server) =>
    Effect.async<void>((resume) => {
      server.close(() => resume(Effect.void))
      server.closeAllConnections()
    })
)

const portOf = (server: Http.Server): number => {
  // A server that listens on TCP has an `AddressInfo`; the other types are of pipes and of closed servers.
  const address = server.address() as Net.AddressInfo
  return address.port
}

const readBody = (request: Http.IncomingMessage): Effect.Effect<{ bytes: Uint8Array; complete: boolean }> =>
  Effect.async((resume) => {
    const chunks: Array<Uint8Array> = []
    const finish = () => resume(Effect.succeed({ bytes: Buffer.concat(chunks), complete: request.complete }))
    request.on("data", (chunk: Uint8Array) => chunks.push(chunk))
    request.once("end", finish)
    request.once("close", finish)
    request.once("error", finish)
  })

const joinHeaders = (raw: ReadonlyArray<string>): Record<string, string> => {
  const headers: Record<string, string> = {}
  for (let index = 0; index + 1 < raw.length; index += 2) {
    const name = `${raw[index]}`.toLowerCase()
    headers[name] = headers[name] === undefined ? `${raw[index + 1]}` : `${headers[name]}, ${raw[index + 1]}`
  }
  return headers
}

/** Ends when the client has left before the answer was complete. */
const hungUp = (connection: Connection): Effect.Effect<void> =>
  Effect.async((resume) => {
    const left = () => {
      if (!connection.ours && !connection.response.writableFinished) resume(Effect.void)
    }
    if (connection.response.destroyed) return left()
    connection.response.once("close", left)
    return Effect.sync(() => connection.response.off("close", left))
  })

const send = (connection: Connection, answer: Answer, behaviour: Behaviour): Effect.Effect<void> => {
  const { response } = connection
  const { body = "" } = answer
  const start = (headers: Answer["headers"]) =>
    Effect.sync(() => {
      response.writeHead(answer.status, answer.statusText ?? Http.STATUS_CODES[answer.status], present(headers))
      response.flushHeaders()
    })

  if (hasFrames(body)) {
    return start({ "content-type": "text/event-stream; charset=utf-8", ...answer.headers }).pipe(
      Effect.zipRight(sendFrames(connection, body.frames, behaviour))
    )
  }
  if (typeof body === "string" || body instanceof Uint8Array) {
    const bytes = typeof body === "string" ? new TextEncoder().encode(body) : body
    const type = typeof body === "string" ? "application/json" : "application/octet-stream"
    const head = start({ "content-type": type, "content-length": `${bytes.length}`, ...answer.headers })
    return behaviour.cutAfter === undefined
      ? Effect.zipRight(head, end(response, bytes))
      : Effect.all([head, write(response, bytes.subarray(0, bytes.length / 2)), cut(connection)], { discard: true })
  }
  return Effect.all([
    start({ "content-type": "text/event-stream; charset=utf-8", ...answer.headers }),
    Stream.runForEach(Stream.fromAsyncIterable(body, (error) => error), (chunk) => write(response, chunk)).pipe(
      // An iterable that throws breaks the connection, as a provider's process that dies would.
      Effect.matchEffect({ onFailure: () => cut(connection), onSuccess: () => end(response) })
    )
  ], { discard: true })
}

const sendFrames = (connection: Connection, frames: ReadonlyArray<Frame>, behaviour: Behaviour) =>
  Effect.gen(function*() {
    const stop = behaviour.cutAfter ?? behaviour.stallAfter
    const sent = stop === undefined ? frames : frames.slice(0, positionAfter(frames, stop))
    for (const frame of sent) {
      if (behaviour.chunkDelayMs !== undefined) yield* Effect.sleep(behaviour.chunkDelayMs)
      yield* write(connection.response, frame.text)
    }
    if (behaviour.cutAfter !== undefined) return yield* cut(connection)
    if (behaviour.stallAfter !== undefined) return yield* Effect.never
    yield* end(connection.response)
  })

/** Where to stop so that so many content frames are sent: right after the last of them, or before the first. */
const positionAfter = (frames: ReadonlyArray<Frame>, contents: number): number => {
  const positions = frames.flatMap((frame, index) => frame.content === true ? [index] : [])
  const last = positions[Math.min(contents, positions.length) - 1]
  return last === undefined ? positions[0] ?? frames.length : last + 1
}

/** Resumes when the bytes are handed to the system, so a slow reader slows the writer. */
const write = (response: Http.ServerResponse, chunk: string | Uint8Array): Effect.Effect<void> =>
  Effect.async((resume) => {
    response.write(chunk, () => resume(Effect.void))
  })

const end = (response: Http.ServerResponse, last?: Uint8Array): Effect.Effect<void> =>
  Effect.async((resume) => {
    response.end(last, () => resume(Effect.void))
  })

const cut = (connection: Connection): Effect.Effect<void> =>
  Effect.sync(() => {
    connection.ours = true
    connection.response.destroy()
  })

const reset = (connection: Connection): Effect.Effect<void> =>
  Effect.sync(() => {
    connection.ours = true
    connection.response.socket?.resetAndDestroy()
  })

const drop = (response: Http.ServerResponse): Effect.Effect<void> => Effect.sync(() => response.destroy())

const hasFrames = (body: Answer["body"]): body is Frames => typeof body === "object" && "frames" in body

const withHeaders = (answer: Answer, common: Readonly<Record<string, string>>): Answer => ({
  ...answer,
  headers: { ...common, ...answer.headers }
})

const present = (headers: Answer["headers"] = {}): Record<string, string> =>
  Object.fromEntries(
    Object.entries(headers).flatMap(([name, value]) => value === undefined ? [] : [[name, value]])
  )
