/**
 * One credential with its attributes, and how keys are read from configuration.
 *
 * @since 0.1.0
 */
import { hmac } from "@noble/hashes/hmac.js"
import { sha256 } from "@noble/hashes/sha2.js"
import { bytesToHex, utf8ToBytes } from "@noble/hashes/utils.js"
import * as Config from "effect/Config"
import * as ConfigError from "effect/ConfigError"
import * as Either from "effect/Either"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Redacted from "effect/Redacted"
import type { ConfigurationError } from "./KeymeshError.js"
import {
  below,
  type Checked,
  finite,
  hasControl,
  integer,
  nonNegative,
  positive,
  refuse,
  refuseUnknown,
  text
} from "./Settings.js"

/**
 * What a key is declared to be allowed. Each is absent when not declared.
 *
 * @since 0.1.0
 * @category models
 */
export interface Limits {
  readonly requestsPerMinute?: number | undefined
  readonly requestsPerDay?: number | undefined
  readonly tokensPerMinute?: number | undefined
  readonly tokensPerDay?: number | undefined
  /** Attempts in flight at once. */
  readonly concurrency?: number | undefined
}

/**
 * A key of a pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface ApiKey {
  /** Stable across processes and safe to show: derived from the secret by a one-way function. */
  readonly id: string
  /** A name for people; defaults to the id. */
  readonly label: string
  readonly secret: Redacted.Redacted
  /** Relative share for the `weighted` strategy (default 1). */
  readonly weight: number
  /** Position for `sequential-then-rotate` (default: as given). */
  readonly order: number
  /** Keys with the same group share one limit at the provider. */
  readonly quotaGroup: string | undefined
  readonly limits: Limits
  /** Headers that travel with the key, such as `OpenAI-Organization`; lower-case names. */
  readonly headers: Readonly<Record<string, string>>
  /** Where this key is valid, when not at the provider's usual address (Azure). */
  readonly baseUrl: string | undefined
  /** The models it may serve; absent: all. */
  readonly models: ReadonlySet<string> | undefined
  /** Relative price of using it (default 1; 0: free). */
  readonly costTier: number
}

/**
 * The quota group of a key; a key without one is a group by itself, under its id.
 *
 * @since 0.1.0
 * @category getters
 */
export const groupOf = (key: ApiKey): string => key.quotaGroup ?? key.id

/**
 * How a key is given.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options {
  readonly secret: string | Redacted.Redacted
  readonly label?: string | undefined
  readonly weight?: number | undefined
  readonly order?: number | undefined
  readonly quotaGroup?: string | undefined
  readonly limits?: Limits | undefined
  readonly headers?: Readonly<Record<string, string>> | undefined
  readonly baseUrl?: string | undefined
  readonly models?: ReadonlyArray<string> | undefined
  readonly costTier?: number | undefined
  /** Allows a `baseUrl` that is neither https nor loopback; the secret then travels in the clear. Default: false. */
  readonly allowInsecureBaseUrl?: boolean | undefined
}

/**
 * A key as the constructors take it: the secret alone, or with attributes.
 *
 * @since 0.1.0
 * @category models
 */
export type Input = string | Redacted.Redacted | Options

/**
 * Makes one key. Fails with a `ConfigurationError` that names the field and never shows the secret.
 *
 * @example
 * ```ts
 * import * as ApiKey from "effect-keymesh/ApiKey"
 *
 * const key = ApiKey.make({ secret: "sk-one", label: "team-a", weight: 2, quotaGroup: "org-a" })
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (input: Input, position = 0, path = "key"): Either.Either<ApiKey, ConfigurationError> => {
  const options: Options = typeof input === "string" || Redacted.isRedacted(input) ? { secret: input } : input
  return Either.gen(function*() {
    yield* refuseUnknown(options, optionNames, path)
    if (options.allowInsecureBaseUrl !== undefined && typeof options.allowInsecureBaseUrl !== "boolean") {
      return yield* refuse(`${path}.allowInsecureBaseUrl`, "must be true or false")
    }
    const secret = yield* secretOf(options.secret, `${path}.secret`)
    const baseUrl = options.baseUrl === undefined
      ? undefined
      : yield* baseUrlOf(options.baseUrl, options.allowInsecureBaseUrl === true, `${path}.baseUrl`)
    const id = identify(secret, baseUrl)
    return {
      id,
      label: options.label === undefined ? id : yield* text(options.label, `${path}.label`),
      secret: Redacted.make(secret),
      weight: yield* positive(options.weight ?? 1, `${path}.weight`),
      order: yield* finite(options.order ?? position, `${path}.order`),
      quotaGroup: options.quotaGroup === undefined ? undefined : yield* text(options.quotaGroup, `${path}.quotaGroup`),
      limits: yield* limitsOf(options.limits ?? {}, `${path}.limits`),
      headers: yield* headersOf(options.headers ?? {}, `${path}.headers`),
      baseUrl,
      models: options.models === undefined ? undefined : yield* modelsOf(options.models, `${path}.models`),
      costTier: yield* nonNegative(options.costTier ?? 1, `${path}.costTier`)
    }
  })
}

/**
 * Makes all keys of a pool. Duplicates (same secret and base URL) collapse into the first; they are reported, not an
 * error. No keys at all is a `ConfigurationError`.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeAll = (
  inputs: ReadonlyArray<Input>,
  path = "keys"
): Either.Either<
  { readonly keys: ReadonlyArray<ApiKey>; readonly duplicates: ReadonlyArray<ApiKey> },
  ConfigurationError
> =>
  Either.gen(function*() {
    if (!Array.isArray(inputs) || inputs.length === 0) {
      return yield* refuse(path, "a pool needs at least one key")
    }
    const keys = new Map<string, ApiKey>()
    const duplicates: Array<ApiKey> = []
    for (const [position, input] of inputs.entries()) {
      const key = yield* make(input, position, `${path}[${position}]`)
      if (keys.has(key.id)) duplicates.push(key)
      else keys.set(key.id, key)
    }
    return { keys: [...keys.values()], duplicates }
  })

/**
 * Reads keys from configuration under one name. Three forms are understood:
 *
 * - comma-separated: `OPENAI_API_KEYS="sk-one, sk-two"`
 * - structured, as JSON: `OPENAI_API_KEYS='[{"secret":"sk-one","weight":2,"quotaGroup":"org-a"},"sk-two"]'`
 * - structured, as a nested list of a `ConfigProvider`: `OPENAI_API_KEYS[0].secret`, `OPENAI_API_KEYS[0].label`, …
 *
 * Secrets are `Redacted` from the moment they are read, and no error shows the value.
 *
 * @example
 * ```ts
 * import * as ApiKey from "effect-keymesh/ApiKey"
 *
 * const keys = ApiKey.config("OPENAI_API_KEYS")
 * ```
 *
 * @since 0.1.0
 * @category configuration
 */
export const config = (name: string): Config.Config<ReadonlyArray<Input>> =>
  Config.redacted(name).pipe(
    Config.mapOrFail((value) => parse(Redacted.value(value), name)),
    Config.orElseIf({ if: ConfigError.isMissingDataOnly, orElse: () => structured(name) })
  )

/** A list of records under a name, as nested configuration. */
const structured = (name: string): Config.Config<ReadonlyArray<Input>> =>
  Config.array(
    Config.all({
      secret: Config.redacted("secret"),
      label: optional(Config.string("label")),
      weight: optional(Config.number("weight")),
      order: optional(Config.number("order")),
      quotaGroup: optional(Config.string("quotaGroup")),
      baseUrl: optional(Config.string("baseUrl")),
      models: optional(Config.array(Config.string(), "models")),
      headers: optional(Config.map(Config.hashMap(Config.string(), "headers"), (map) => Object.fromEntries(map))),
      costTier: optional(Config.number("costTier")),
      limits: optional(
        Config.all({
          requestsPerMinute: optional(Config.integer("requestsPerMinute")),
          requestsPerDay: optional(Config.integer("requestsPerDay")),
          tokensPerMinute: optional(Config.integer("tokensPerMinute")),
          tokensPerDay: optional(Config.integer("tokensPerDay")),
          concurrency: optional(Config.integer("concurrency"))
        }).pipe(Config.nested("limits"))
      )
    }),
    name
  )

const optional = <A>(config: Config.Config<A>): Config.Config<A | undefined> =>
  Config.map(Config.option(config), Option.getOrUndefined)

const parse = (value: string, name: string): Either.Either<ReadonlyArray<Input>, ConfigError.ConfigError> => {
  const invalid = (problem: string) => Either.left(ConfigError.InvalidData([name], `${name} ${problem}`))
  const trimmed = value.trim()
  if (/^[{"]/.test(trimmed)) return invalid("must be a JSON array of keys, or keys separated by commas")
  if (!trimmed.startsWith("[")) {
    const secrets = trimmed.split(",").map((part) => part.trim()).filter((part) => part !== "")
    return secrets.length === 0
      ? invalid("must hold at least one key: separate several by commas")
      : Either.right(secrets.map((secret) => Redacted.make(secret)))
  }
  const items = Either.try((): unknown => JSON.parse(trimmed))
  if (Either.isLeft(items) || !Array.isArray(items.right)) {
    return invalid("must be a JSON array of keys, or keys separated by commas")
  }
  const inputs: Array<Input> = []
  for (const [position, item] of items.right.entries()) {
    const input: unknown = Predicate.isRecord(item) && typeof item["secret"] === "string"
      ? { ...item, secret: Redacted.make(item["secret"]) }
      : typeof item === "string"
      ? Redacted.make(item)
      : undefined
    if (input === undefined) return invalid(`item ${position} must be a key, or an object with a "secret"`)
    // `make` checks every field, so a wrong one is refused here under its path and what passes is an `Input`.
    const checked = make(input as Input, position, `${name}[${position}]`)
    if (Either.isLeft(checked)) return Either.left(ConfigError.InvalidData([name], checked.left.message))
    inputs.push(input as Input)
  }
  return Either.right(inputs)
}

/** The id of a credential: domain-separated, one-way, 96 bits; needs nothing but the secret and its base URL. */
const identify = (secret: string, baseUrl: string | undefined): string => {
  const digest = hmac(sha256, idDomain, utf8ToBytes(baseUrl === undefined ? secret : `${secret}\n${baseUrl}`))
  return `key_${bytesToHex(digest.subarray(0, 12))}`
}
const idDomain = utf8ToBytes("effect-keymesh/ApiKey/id/1")

const optionNames: ReadonlyArray<keyof Options> = [
  "secret",
  "label",
  "weight",
  "order",
  "quotaGroup",
  "limits",
  "headers",
  "baseUrl",
  "models",
  "costTier",
  "allowInsecureBaseUrl"
]

const limitNames: ReadonlyArray<keyof Limits> = [
  "requestsPerMinute",
  "requestsPerDay",
  "tokensPerMinute",
  "tokensPerDay",
  "concurrency"
]

const secretOf = (value: unknown, path: string): Checked<string> => {
  const secret = Redacted.isRedacted(value) ? Redacted.value(value) : value
  if (typeof secret !== "string" || secret.trim() === "") return refuse(path, "must be a secret that is not blank")
  const trimmed = secret.trim()
  // A header value: anything else would fail at the first request, and show the secret in the error.
  return /^[\x21-\x7e]+$/.test(trimmed)
    ? Either.right(trimmed)
    : refuse(path, "must be printable ASCII without spaces or control characters")
}

/**
 * Checks the address of a provider: an http(s) URL without credentials, and https unless it is loopback or insecure
 * addresses are allowed.
 *
 * @since 0.1.0
 * @category checks
 */
export const baseUrlOf = (value: unknown, allowInsecure: boolean, path: string): Checked<string> => {
  const url = typeof value === "string" ? Either.getOrUndefined(Either.try(() => new URL(value))) : undefined
  if (url === undefined || (url.protocol !== "https:" && url.protocol !== "http:")) {
    return refuse(path, "must be an http or https URL")
  }
  if (url.username !== "" || url.password !== "" || url.search !== "" || url.hash !== "") {
    return refuse(path, "must not hold credentials, a query or a fragment")
  }
  if (url.protocol === "http:" && !isLoopback(url.hostname) && !allowInsecure) {
    return refuse(path, "would send the secret in the clear: use https, or set allowInsecureBaseUrl")
  }
  return Either.right(url.href.replace(/\/+$/, ""))
}

const isLoopback = (hostname: string): boolean =>
  hostname === "localhost" || hostname.endsWith(".localhost") || hostname === "[::1]" ||
  /^127(\.\d{1,3}){3}$/.test(hostname)

const limitsOf = (limits: Limits, path: string): Checked<Limits> =>
  Either.gen(function*() {
    yield* refuseUnknown(limits, limitNames, path)
    for (const name of limitNames) {
      if (limits[name] !== undefined) yield* integer(limits[name], `${path}.${name}`, 1)
    }
    return { ...limits }
  })

const credentialHeaders = [
  "authorization",
  "proxy-authorization",
  "cookie",
  "api-key",
  "x-api-key",
  "x-goog-api-key"
]

const headersOf = (
  headers: unknown,
  path: string
): Checked<Readonly<Record<string, string>>> => {
  const entries: Array<readonly [string, string]> = []
  if (!Predicate.isRecord(headers) || ![Object.prototype, null].includes(Object.getPrototypeOf(headers))) {
    return refuse(path, "must be a plain object of header names and values")
  }
  for (const [name, value] of Object.entries(headers)) {
    if (!/^[\w!#$%&'*+.^`|~-]+$/.test(name)) return refuse(path, "must have header names")
    if (credentialHeaders.includes(name.toLowerCase())) {
      return refuse(below(path, name), "must not carry a credential: that is what `secret` is for")
    }
    if (typeof value !== "string" || hasControl(value)) {
      return refuse(below(path, name), "must be a text without control characters")
    }
    entries.push([name.toLowerCase(), value])
  }
  return Either.right(Object.fromEntries(entries))
}

const modelsOf = (models: ReadonlyArray<string>, path: string): Checked<ReadonlySet<string>> =>
  Array.isArray(models) && models.length > 0 &&
    models.every((model) => typeof model === "string" && model.trim() !== "")
    ? Either.right(new Set(models))
    : refuse(path, "must be a list of at least one model name")
