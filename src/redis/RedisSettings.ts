/**
 * How Redis is reached, and the numbers of sharing: what people may set, checked.
 *
 * @since 0.1.0
 */
import type * as Duration from "effect/Duration"
import * as Either from "effect/Either"
import * as Predicate from "effect/Predicate"
import * as Redacted from "effect/Redacted"
import type { Cluster, Redis } from "ioredis"
import * as Checks from "../Settings.js"

/**
 * How TLS is spoken. Certificates are texts in PEM.
 *
 * @since 0.1.0
 * @category models
 */
export interface Tls {
  /** Whom to trust (default: what Node.js does). */
  readonly ca?: string | undefined
  readonly cert?: string | undefined
  readonly key?: string | Redacted.Redacted | undefined
  /** The name on the server's certificate (default: the host's). */
  readonly servername?: string | undefined
  /** Whether a certificate that cannot be verified is refused (default: true). */
  readonly rejectUnauthorized?: boolean | undefined
}

/**
 * The settings of a store on Redis: `url` or `client`, and whatever else differs from the defaults.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings {
  /** Where Redis is: `redis://user:password@host:port/db`, or `rediss://` for TLS. */
  readonly url?: string | Redacted.Redacted | undefined
  /**
   * A client of your own instead: a `Redis` or a `Cluster` of ioredis. It stays yours, and is not closed; what others say is
   * listened to on a duplicate of it.
   */
  readonly client?: Redis | Cluster | undefined
  /** Who logs in (default: what the URL says). */
  readonly username?: string | undefined
  /** The password, if it is not in the URL. */
  readonly password?: string | Redacted.Redacted | undefined
  /** TLS: `true`, or how; on by itself for `rediss://`. */
  readonly tls?: boolean | Tls | undefined
  /** What the names of all keys begin with (default `keymesh`). */
  readonly prefix?: string | undefined
  /** The longest that an attempt waits for Redis before it begins (default 25 ms); whoever is slower counts as away. */
  readonly claimTimeout?: Duration.DurationInput | undefined
  /** The longest that anything else takes (default 1 s). */
  readonly commandTimeout?: Duration.DurationInput | undefined
  /** The longest that connecting takes (default 2 s). */
  readonly connectTimeout?: Duration.DurationInput | undefined
  /** How often a process says that it is alive (default 5 s). */
  readonly heartbeat?: Duration.DurationInput | undefined
  /** For how long it counts as alive after that (default 15 s); at least twice `heartbeat`. */
  readonly memberTimeout?: Duration.DurationInput | undefined
  /** How long a record is kept after it was last saved (default 30 days). */
  readonly recordTtl?: Duration.DurationInput | undefined
}

/**
 * The settings with their defaults; times are in milliseconds.
 *
 * @since 0.1.0
 * @category models
 */
export interface Resolved {
  readonly reach: Reach
  readonly prefix: string
  readonly claimMillis: number
  readonly commandMillis: number
  readonly connectMillis: number
  readonly heartbeatMillis: number
  readonly memberMillis: number
  readonly recordMillis: number
}

/**
 * A client of somebody's own, or the way to a server.
 *
 * @since 0.1.0
 * @category models
 */
export type Reach =
  | { readonly _tag: "Client"; readonly client: Redis | Cluster }
  | { readonly _tag: "Server"; readonly server: Server }

/**
 * @since 0.1.0
 * @category models
 */
export interface Server {
  readonly host: string
  readonly port: number
  readonly db: number
  readonly username: string | undefined
  readonly password: Redacted.Redacted | undefined
  readonly tls: Tls | undefined
}

const names = [
  "url",
  "client",
  "username",
  "password",
  "tls",
  "prefix",
  "claimTimeout",
  "commandTimeout",
  "connectTimeout",
  "heartbeat",
  "memberTimeout",
  "recordTtl"
]

/**
 * Checks settings and fills in the defaults. What is wrong is a `ConfigurationError` that names the field and shows no
 * value.
 *
 * @since 0.1.0
 * @category constructors
 */
export const resolve = (settings: Settings): Checks.Checked<Resolved> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(settings, names, "")
    const reach = yield* reachOf(settings)
    const prefix = yield* Checks.text(settings.prefix ?? "keymesh", "prefix")
    // The braces around prefix and pool are what keeps a pool in one slot of a cluster.
    if (/[{}]/.test(prefix)) return yield* Checks.refuse("prefix", "must not contain braces")
    const heartbeatMillis = yield* bounded(settings.heartbeat ?? 5_000, "heartbeat")
    const memberMillis = yield* bounded(settings.memberTimeout ?? 3 * heartbeatMillis, "memberTimeout")
    if (memberMillis < 2 * heartbeatMillis) {
      return yield* Checks.refuse("memberTimeout", "must be at least twice `heartbeat`")
    }
    return {
      reach,
      prefix,
      claimMillis: yield* bounded(settings.claimTimeout ?? 25, "claimTimeout"),
      commandMillis: yield* bounded(settings.commandTimeout ?? 1_000, "commandTimeout"),
      connectMillis: yield* bounded(settings.connectTimeout ?? 2_000, "connectTimeout"),
      heartbeatMillis,
      memberMillis,
      recordMillis: yield* bounded(settings.recordTtl ?? "30 days", "recordTtl")
    }
  })

const bounded = (value: Duration.DurationInput, path: string): Checks.Checked<number> =>
  Either.flatMap(Checks.millis(value, path), (millis) =>
    millis >= 1 && Number.isFinite(millis)
      ? Either.right(Math.ceil(millis))
      : Checks.refuse(path, "must be at least a millisecond, and finite"))

const reachOf = (settings: Settings): Checks.Checked<Reach> =>
  Either.gen(function*() {
    const { client, url } = settings
    if (client !== undefined) {
      for (const name of ["url", "username", "password", "tls", "connectTimeout"] as const) {
        if (settings[name] !== undefined) return yield* Checks.refuse(name, "does not go with `client`")
      }
      return Predicate.hasProperty(client, "evalsha") && Predicate.hasProperty(client, "duplicate")
        ? { _tag: "Client", client }
        : yield* Checks.refuse("client", "must be a `Redis` or a `Cluster` of ioredis")
    }
    if (url === undefined) return yield* Checks.refuse("url", "must be given, or `client`")
    return { _tag: "Server", server: yield* serverOf(settings, url) }
  })

const serverOf = (settings: Settings, url: string | Redacted.Redacted): Checks.Checked<Server> =>
  Either.gen(function*() {
    const text = plain(url)
    const parsed = parse(text)
    if (parsed === undefined) {
      return yield* Checks.refuse("url", "must be like redis://user:password@host:port/db, or rediss://")
    }
    if (parsed.search !== "" || parsed.hash !== "") {
      return yield* Checks.refuse("url", "must have neither query nor fragment: there are settings for that")
    }
    const db = /^\/?$/.test(parsed.pathname) ? 0 : Number(parsed.pathname.slice(1))
    if (!Number.isSafeInteger(db) || db < 0) {
      return yield* Checks.refuse("url", "the part after the host must be the number of a database")
    }
    const username = decoded(parsed.username)
    const password = decoded(parsed.password)
    if (username === undefined || password === undefined) {
      return yield* Checks.refuse("url", "user and password must be percent-encoded")
    }
    if (settings.username !== undefined) yield* Checks.text(settings.username, "username")
    const given = settings.password
    if (given !== undefined && (typeof plain(given) !== "string" || plain(given) === "")) {
      return yield* Checks.refuse("password", "must be a text that is not empty")
    }
    const tls = yield* tlsOf(settings.tls, parsed.protocol === "rediss:")
    const secret = given === undefined ? password : plain(given)
    return {
      // As the socket wants it: without the brackets of an IPv6 address.
      host: parsed.hostname.replace(/^\[|\]$/g, ""),
      port: parsed.port === "" ? 6379 : Number(parsed.port),
      db,
      username: settings.username ?? (username === "" ? undefined : username),
      password: secret === "" ? undefined : Redacted.make(secret),
      tls
    }
  })

const plain = (secret: string | Redacted.Redacted): string =>
  Redacted.isRedacted(secret) ? Redacted.value(secret) : secret

const parse = (text: unknown): URL | undefined => {
  if (typeof text !== "string" || !/^rediss?:\/\//i.test(text) || Checks.hasControl(text)) return undefined
  try {
    const url = new URL(text)
    return url.hostname === "" ? undefined : url
  } catch {
    return undefined
  }
}

const decoded = (text: string): string | undefined => {
  try {
    return decodeURIComponent(text)
  } catch {
    return undefined
  }
}

const tlsOf = (given: boolean | Tls | undefined, named: boolean): Checks.Checked<Tls | undefined> =>
  Either.gen(function*() {
    if (given === false && named) return yield* Checks.refuse("tls", "must not be false: the URL says `rediss`")
    if (given === undefined || typeof given === "boolean") return given === true || named ? {} : undefined
    yield* Checks.refuseUnknown(given, ["ca", "cert", "key", "servername", "rejectUnauthorized"], "tls")
    const key = given.key === undefined ? undefined : plain(given.key)
    const texts = { "tls.ca": given.ca, "tls.cert": given.cert, "tls.key": key, "tls.servername": given.servername }
    for (const [path, text] of Object.entries(texts)) {
      if (text !== undefined && (typeof text !== "string" || text.trim() === "")) {
        return yield* Checks.refuse(path, "must be a text that is not blank")
      }
    }
    const strict: unknown = given.rejectUnauthorized
    if (strict !== undefined && typeof strict !== "boolean") {
      return yield* Checks.refuse("tls.rejectUnauthorized", "must be true or false")
    }
    return { ...given, ...(key === undefined ? {} : { key: Redacted.make(key) }) }
  })
