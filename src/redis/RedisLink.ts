/**
 * The way to Redis: one connection for commands, one to listen on. Every command is bounded, nothing queues while there is
 * no connection, nothing is sent twice, and no error says more than what kind of problem there is.
 *
 * @since 0.1.0
 */
import { sha1 } from "@noble/hashes/legacy.js"
import { bytesToHex, utf8ToBytes } from "@noble/hashes/utils.js"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as FiberId from "effect/FiberId"
import * as Predicate from "effect/Predicate"
import * as Redacted from "effect/Redacted"
import * as Runtime from "effect/Runtime"
import type * as Scope from "effect/Scope"
import type { RedisOptions } from "ioredis"
import { Cluster, Redis } from "ioredis"
import * as MonotonicTime from "../MonotonicTime.js"
import type * as RedisSettings from "./RedisSettings.js"

/**
 * A command did not get its answer. `problem` names the kind, never what the server or the client said: that may hold
 * secrets. `sent` is false when it surely did not reach the server.
 *
 * @since 0.1.0
 * @category errors
 */
export class Unreached extends Data.TaggedError("Unreached")<{ readonly problem: string; readonly sent: boolean }> {}

/**
 * A script that Redis runs as one step.
 *
 * @since 0.1.0
 * @category models
 */
export interface Script {
  readonly text: string
  readonly sha: string
}

/**
 * @since 0.1.0
 * @category constructors
 */
export const script = (text: string): Script => ({ text, sha: bytesToHex(sha1(utf8ToBytes(text))) })

/**
 * Who listens on a channel. `onState` is told when it begins to hear, and when it no longer does.
 *
 * @since 0.1.0
 * @category models
 */
export interface Listener {
  readonly onMessage: (text: string) => void
  readonly onState: (hears: boolean) => void
}

/**
 * @since 0.1.0
 * @category models
 */
export interface RedisLink {
  /** Where the keys are: the database, and what the client puts before their names. */
  readonly place: string
  /** Runs a script, within so many milliseconds. */
  readonly run: (
    script: Script,
    keys: ReadonlyArray<string>,
    args: ReadonlyArray<string>,
    millis: number
  ) => Effect.Effect<unknown, Unreached>
  readonly ping: (millis: number) => Effect.Effect<void, Unreached>
  readonly get: (key: string, millis: number) => Effect.Effect<string | undefined, Unreached>
  /** Sets a key that is forgotten after `ttlMillis`. */
  readonly set: (key: string, value: string, ttlMillis: number, millis: number) => Effect.Effect<void, Unreached>
  /** Listens for as long as the scope is open. */
  readonly listen: (channel: string, listener: Listener) => Effect.Effect<void, never, Scope.Scope>
  /** Calls back whenever commands can be sent again, or no longer. */
  readonly watch: (onState: (ready: boolean) => void) => Effect.Effect<void, never, Scope.Scope>
  readonly isReady: () => boolean
  /** Why commands cannot be sent, where they cannot. */
  readonly problem: () => string
  /** Waits until commands can be sent, for so many milliseconds at most. */
  readonly whenReady: (millis: number) => Effect.Effect<void, Unreached>
  /** Begins anew with connections that are of no use though they are there; a caller's own client is left alone. */
  readonly reset: (which: "commands" | "listening") => Effect.Effect<void>
}

/**
 * Opens the connections, and closes those that it opened with the scope. It does not wait for them.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: RedisSettings.Resolved,
  scripts: ReadonlyArray<Script>
): Effect.Effect<RedisLink, never, Scope.Scope> =>
  Effect.gen(function*() {
    const runtime = yield* Effect.runtime<never>()
    const random = yield* Effect.random
    const now = () => Runtime.runSync(runtime)(MonotonicTime.now)
    const { reach } = settings
    const own = reach._tag === "Server"
    const knowsPassword = own && reach.server.password !== undefined
    const jitter = () => Runtime.runSync(runtime)(random.next)
    const open = () =>
      reach._tag === "Client" ? reach.client : connected(optionsOf(reach.server, settings), now, jitter)
    const commands = yield* client(open, own)
    const listening = yield* client(() => reach._tag === "Client" ? duplicate(reach.client) : open(), true)
    const state: State = { problem: "there is no connection to Redis yet", underWay: 0, silentSince: undefined }

    // -------------------------------------------------------------------------------------------------------- commands
    const watchers = new Set<(ready: boolean) => void>()
    const watching = (ready: boolean) => () => {
      if (ready) {
        state.silentSince = undefined
        state.problem = "the connection to Redis broke"
        // So that the first of each need not be sent twice.
        for (const { text } of scripts) commands.script("LOAD", text).catch(ignore)
      }
      for (const watcher of watchers) watcher(ready)
    }
    const isReady = () => commands.status === "ready"
    yield* on(commands, "ready", watching(true))
    yield* on(commands, "close", watching(false))
    yield* on(commands, "error", (error) => {
      state.problem = describe(error)
    })
    if (isReady()) watching(true)()

    const reset = (which: Redis | Cluster) => {
      // What is about to connect need not be hurried.
      if (own && which instanceof Redis && (which.status === "ready" || which.status === "connect")) {
        which.disconnect(true)
      }
    }

    /** What calls back, or else the problem after so many milliseconds; also where nothing can be interrupted. */
    const within = <A>(
      millis: number,
      tooLate: () => Unreached,
      start: (done: (result: Effect.Effect<A, Unreached>) => void) => () => void
    ): Effect.Effect<A, Unreached> =>
      Effect.async((resume) => {
        const end = () => {
          timer.unsafeInterruptAsFork(FiberId.none)
          stop()
        }
        const timer = Runtime.runFork(runtime)(
          Effect.sleep(millis).pipe(
            // What has arrived while this process was busy is in time: two turns of the event loop let it be read.
            Effect.zipRight(Effect.sleep(0)),
            Effect.zipRight(Effect.sleep(0)),
            Effect.zipRight(Effect.sync(() => {
              stop()
              resume(Effect.fail(tooLate()))
            }))
          )
        )
        const stop = start((result) => {
          timer.unsafeInterruptAsFork(FiberId.none)
          stop()
          resume(result)
        })
        return Effect.sync(end)
      })

    const command = <A>(send: (isLate: () => boolean) => Promise<A>, millis: number): Effect.Effect<A, Unreached> =>
      Effect.suspend(() => {
        if (!isReady()) return Effect.fail(new Unreached({ problem: state.problem, sent: false }))
        if (state.underWay >= mostUnderWay) {
          return Effect.fail(new Unreached({ problem: "Redis does not keep up", sent: false }))
        }
        const tooLate = () => {
          const at = now()
          state.silentSince ??= at - millis
          if (at - state.silentSince >= longestSilence) {
            state.silentSince = undefined
            reset(commands)
          }
          return new Unreached({ problem: "Redis does not answer in time", sent: true })
        }
        return within<A>(millis, tooLate, (done) => {
          let late = false
          state.underWay++
          const answered = () => {
            state.underWay--
            state.silentSince = undefined
          }
          send(() => late).then(
            (value) => {
              answered()
              done(Effect.succeed(value))
            },
            (error) => {
              answered()
              const told = describe(error)
              // Commands are answered so while the password that was sent is being refused.
              const problem = told === problems["NOAUTH"] && knowsPassword ? problems["WRONGPASS"] ?? told : told
              // A replica that takes no writes was the primary before: its name may lead to another by now.
              if (problem === problems["READONLY"]) reset(commands)
              done(Effect.fail(new Unreached({ problem, sent: true })))
            }
          )
          return () => {
            late = true
          }
        })
      })

    // ------------------------------------------------------------------------------------------------------- listening
    const listeners = new Map<string, Set<Listener>>()
    const tell = (channel: string, hears: boolean) => {
      for (const listener of listeners.get(channel) ?? []) listener.onState(hears)
    }
    const subscribe = (channel: string) => {
      if (listening.status !== "ready") return
      listening.subscribe(channel).then(() => tell(channel, true), () => tell(channel, false))
    }
    yield* on(listening, "ready", () => {
      for (const channel of listeners.keys()) subscribe(channel)
    })
    yield* on(listening, "close", () => {
      for (const channel of listeners.keys()) tell(channel, false)
    })
    yield* on(listening, "error", ignore)
    yield* on(listening, "message", (channel, text) => {
      for (const listener of listeners.get(String(channel)) ?? []) listener.onMessage(String(text))
    })

    // Whoever still uses it hears of the end at once; what follows of the clients nobody listens to any more.
    yield* Effect.addFinalizer(() =>
      Effect.sync(() => {
        state.problem = "its store was closed"
        for (const watcher of watchers) watcher(false)
      })
    )

    return {
      place: placeOf(reach),
      run: (script, keys, args, millis) =>
        command(async (isLate) => {
          try {
            return await commands.evalsha(script.sha, keys.length, ...keys, ...args)
          } catch (error) {
            // What nobody waits for any more has been given up.
            if (codeOf(error) !== "NOSCRIPT" || isLate()) throw error
            return await commands.eval(script.text, keys.length, ...keys, ...args)
          }
        }, millis),
      ping: (millis) => Effect.asVoid(command(() => commands.ping(), millis)),
      get: (key, millis) => Effect.map(command(() => commands.get(key), millis), (value) => value ?? undefined),
      set: (key, value, ttlMillis, millis) =>
        Effect.asVoid(command(() => commands.set(key, value, "PX", ttlMillis), millis)),
      listen: (channel, listener) =>
        Effect.acquireRelease(
          Effect.sync(() => {
            const present = listeners.get(channel)
            if (present === undefined) listeners.set(channel, new Set([listener]))
            else present.add(listener)
            subscribe(channel)
          }),
          () =>
            Effect.sync(() => {
              const present = listeners.get(channel)
              present?.delete(listener)
              if (present?.size === 0) {
                listeners.delete(channel)
                if (listening.status === "ready") listening.unsubscribe(channel).catch(ignore)
              }
            })
        ),
      watch: (watcher) =>
        Effect.asVoid(Effect.acquireRelease(
          Effect.sync(() => watchers.add(watcher)),
          () => Effect.sync(() => watchers.delete(watcher))
        )),
      isReady,
      problem: () => state.problem,
      whenReady: (millis) =>
        Effect.suspend(() => {
          if (isReady()) return Effect.void
          const tooLate = () => new Unreached({ problem: state.problem, sent: false })
          return within<void>(millis, tooLate, (done) => {
            const watcher = (ready: boolean) => {
              if (ready) done(Effect.void)
            }
            watchers.add(watcher)
            return () => watchers.delete(watcher)
          })
        }),
      reset: (which) => Effect.sync(() => reset(which === "commands" ? commands : listening))
    }
  })

/** What a link remembers of its commands; only the link itself sees it. */
interface State {
  problem: string
  underWay: number
  silentSince: number | undefined
}

const ignore = () => {}

const client = (open: () => Redis | Cluster, closes: boolean) =>
  Effect.acquireRelease(
    Effect.sync(open),
    (client) =>
      Effect.sync(() => {
        // What comes after the end is of no interest; unheard, it would be printed.
        client.on("error", ignore)
        if (closes) client.disconnect()
        else client.off("error", ignore)
      })
  )

const on = (client: Redis | Cluster, event: string, listener: (...args: ReadonlyArray<unknown>) => void) =>
  Effect.acquireRelease(
    Effect.sync(() => client.on(event, listener)),
    () => Effect.sync(() => client.off(event, listener))
  )

const placeOf = (reach: RedisSettings.Reach): string => {
  if (reach._tag === "Server") return `${reach.server.db}:`
  const { options } = reach.client
  return `${"db" in options ? options.db ?? 0 : 0}:${options.keyPrefix ?? ""}`
}

const duplicate = (client: Redis | Cluster): Redis | Cluster => {
  // Channels have no prefix: what scripts publish has none.
  const more = { keyPrefix: "", autoResubscribe: false }
  return client instanceof Cluster
    ? client.duplicate([], { ...more, lazyConnect: false })
    : connecting(client.duplicate({ ...more, lazyConnect: true }))
}

/**
 * Begins to connect a client that has not yet. ioredis listens for one error of a socket, and a socket may have two (TLS:
 * what the client has against the server, and what the server says when it is left): the second would end the process.
 *
 * @since 0.1.0
 * @category constructors
 */
export const connecting = (redis: Redis): Redis => {
  const connector: unknown = Reflect.get(redis, "connector")
  const connect: unknown = Predicate.isObject(connector) ? Reflect.get(connector, "connect") : undefined
  if (Predicate.isObject(connector) && Predicate.isFunction(connect)) {
    Reflect.set(connector, "connect", async (...args: ReadonlyArray<unknown>): Promise<unknown> => {
      const socket: unknown = await Reflect.apply(connect, connector, args)
      if (Predicate.hasProperty(socket, "on") && Predicate.isFunction(socket.on)) socket.on("error", ignore)
      return socket
    })
  }
  redis.connect().catch(ignore)
  return redis
}

/** A client that comes back after pauses that grow, unless it was well for a while. */
const connected = (options: RedisOptions, now: () => number, jitter: () => number): Redis => {
  let failures = 0
  let readyAt = Infinity
  const redis = new Redis({
    ...options,
    lazyConnect: true,
    retryStrategy: () => {
      failures = now() >= readyAt + steadyMillis ? 1 : failures + 1
      readyAt = Infinity
      return pauseBefore(failures, jitter())
    }
  })
  redis.on("ready", () => {
    readyAt = now()
    redis.client("SETNAME", "keymesh").catch(ignore)
  })
  return connecting(redis)
}

/**
 * How long to wait before another try, in milliseconds: full jitter, so that processes that lost the same server do not
 * come back together.
 *
 * @since 0.1.0
 * @category getters
 */
export const pauseBefore = (failures: number, random: number): number =>
  Math.ceil(random * Math.min(longestPause, 50 * 2 ** Math.min(failures, 10)))

const optionsOf = (server: RedisSettings.Server, { connectMillis }: RedisSettings.Resolved): RedisOptions => ({
  host: server.host,
  port: server.port,
  db: server.db,
  ...(server.username === undefined ? {} : { username: server.username }),
  ...(server.password === undefined ? {} : { password: Redacted.value(server.password) }),
  ...(server.tls === undefined ? {} : { tls: tlsOf(server.tls, server.host) }),
  // What ioredis asks before a connection is ready may be answered when it is closed already; it would take it for ready
  // then, and never connect again.
  disableClientInfo: true,
  connectTimeout: connectMillis,
  keepAlive: 10_000,
  // Whoever waits has a bound of its own, and nothing is sent twice.
  enableOfflineQueue: false,
  maxRetriesPerRequest: 0,
  autoResendUnfulfilledCommands: false,
  autoResubscribe: false,
  // It would wait for ever on a server that hangs.
  enableReadyCheck: false
})

const tlsOf = ({ ca, cert, key, rejectUnauthorized, servername }: RedisSettings.Tls, host: string) => ({
  ...(ca === undefined ? {} : { ca }),
  ...(cert === undefined ? {} : { cert }),
  ...(key === undefined ? {} : { key: typeof key === "string" ? key : Redacted.value(key) }),
  ...(rejectUnauthorized === undefined ? {} : { rejectUnauthorized }),
  // An address is no name.
  ...(servername !== undefined ? { servername } : /^[\d.]+$|:/.test(host) ? {} : { servername: host })
})

/** What an answer of the server begins with. */
const codeOf = (error: unknown): string | undefined =>
  Predicate.hasProperty(error, "message") && typeof error.message === "string"
    ? /^-?([A-Z]+)\b/.exec(error.message)?.[1]
    : undefined

/** The kind of a problem in our own words. */
const describe = (error: unknown): string => {
  const code = codeOf(error)
  const known = code === undefined ? undefined : problems[code]
  if (known !== undefined) return known
  const system = Predicate.hasProperty(error, "code") ? error.code : undefined
  return typeof system === "string" && /^[A-Z][A-Z0-9_]{2,40}$/.test(system)
    ? `there is no connection to Redis (${system})`
    : "the connection to Redis broke"
}

const problems: Readonly<Record<string, string>> = {
  BUSY: "Redis is busy with a script (BUSY)",
  CLUSTERDOWN: "the Redis cluster is down (CLUSTERDOWN)",
  CROSSSLOT: "Redis refused a command (CROSSSLOT)",
  ERR: "Redis refused a command (ERR)",
  LOADING: "Redis is still loading (LOADING)",
  MASTERDOWN: "the primary of this Redis is down (MASTERDOWN)",
  MISCONF: "Redis takes no writes (MISCONF)",
  MOVED: "this Redis has other keys: give a Cluster as `client` (MOVED)",
  NOAUTH: "Redis asks for a password (NOAUTH)",
  NOPERM: "the Redis user may not do that (NOPERM)",
  NOREPLICAS: "Redis takes no writes (NOREPLICAS)",
  NOSCRIPT: "Redis does not know the script (NOSCRIPT)",
  OOM: "Redis is out of memory (OOM)",
  READONLY: "this Redis is a replica and takes no writes (READONLY)",
  WRONGPASS: "Redis does not accept the user or the password (WRONGPASS)",
  WRONGTYPE: "Redis holds something else under our key (WRONGTYPE)"
}

/** The longest pause between two attempts to connect. */
const longestPause = 2_000
/** A connection that held for so long was well. */
const steadyMillis = 5_000
/** How long a connection may be silent, though it was asked something, before it is given up. */
const longestSilence = 3_000
/** So many commands may be under way; a pool asks for few at a time, so more of them means that nobody answers. */
const mostUnderWay = 4_096
