/**
 * Every way a server says "wait": headers of a dozen families, fields of bodies, phrases of messages.
 *
 * @since 0.1.0
 */
import * as Predicate from "effect/Predicate"
import * as ErrorBody from "./ErrorBody.js"

/**
 * Where a wait was found.
 *
 * @since 0.1.0
 * @category models
 */
export type Source =
  | "header:retry-after-ms"
  | "header:retry-after"
  | "body:RetryInfo"
  | "body:metadata.headers"
  | "body:retry_after"
  | "message"
  | "header:ratelimit"
  | "header:reset"

/**
 * How long the server asks to wait: whole milliseconds, rounded up, never negative, before any clamp.
 *
 * @since 0.1.0
 * @category models
 */
export interface WaitHint {
  readonly waitMillis: number
  readonly source: Source
}

/**
 * What an answer announces about one limit, for instance `requests` or `input-tokens`. `resetMillis` counts from the
 * answer.
 *
 * @since 0.1.0
 * @category models
 */
export interface Announced {
  /** The provider's name for what is limited; empty when the headers name nothing. */
  readonly name: string
  readonly limit: number | undefined
  readonly remaining: number | undefined
  readonly resetMillis: number | undefined
  /** Whether the server says that nothing is left; `undefined` when it does not say. */
  readonly exhausted: boolean | undefined
}

/**
 * Headers as they come: the standard object, or a plain one in any case.
 *
 * @since 0.1.0
 * @category models
 */
export type HeadersInput = Headers | { readonly [name: string]: unknown }

/**
 * Response headers by lower-case name.
 *
 * @since 0.1.0
 * @category models
 */
export type HeaderMap = ReadonlyMap<string, string>

/**
 * The wait that an answer asks for. Sources in the order of trust: `retry-after-ms`, `retry-after`, Google's
 * `RetryInfo`, headers repeated in the body, `retry_after` fields of the body, the message, the IETF `RateLimit`
 * header, the latest reset among the exhausted limits. What is malformed, negative or absurd is passed over; an instant
 * in the past is a wait of 0. Absolute times count from the answer's own `date`, else from `now` (milliseconds since
 * the epoch).
 *
 * @example
 * ```ts
 * import * as WaitHint from "effect-keymesh/WaitHint"
 *
 * const hint = WaitHint.fromAnswer({ status: 429, headers: { "Retry-After": "0.75" }, body: "", now: 0 })
 * // { waitMillis: 750, source: "header:retry-after" }
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const fromAnswer = (answer: {
  readonly headers: HeadersInput
  readonly body?: unknown
  readonly now: number
  readonly status?: number | undefined
}): WaitHint | undefined => {
  const headers = headerMap(answer.headers)
  return fromParts(headers, ErrorBody.read(answer.body), baseTime(headers, answer.now), answer.status)
}

/**
 * `fromAnswer` for a caller who has read the parts already. `base` is the instant from which absolute times count.
 *
 * @since 0.1.0
 * @category constructors
 */
export const fromParts = (
  headers: HeaderMap,
  body: ErrorBody.ErrorBody,
  base: number,
  status: number | undefined
): WaitHint | undefined =>
  hint("header:retry-after-ms", retryAfterMillis(headers)) ??
    hint("header:retry-after", retryAfter(headers.get("retry-after"), base)) ??
    hint("body:RetryInfo", retryInfo(body)) ??
    hint("body:metadata.headers", repeatedHeaders(body, base)) ??
    hint("body:retry_after", retryFields(body)) ??
    hint("message", fromMessage(body.message)) ??
    hint("header:ratelimit", ietf(headers)) ??
    hint("header:reset", lastReset(readLimits(headers, base), status))

/**
 * Headers by lower-case name, for one look-up after another.
 *
 * @since 0.1.0
 * @category constructors
 */
export const headerMap = (headers: HeadersInput): HeaderMap => {
  const map = new Map<string, string>()
  const put = (value: unknown, name: string) => {
    const text = Array.isArray(value) ? value.filter(Predicate.isString).join(", ") : value
    if (typeof text === "string" || typeof text === "number") map.set(name.toLowerCase(), String(text).trim())
  }
  if (isHeaders(headers)) headers.forEach(put)
  else for (const name of Object.keys(headers)) put(headers[name], name)
  return map
}

/**
 * The instant of an answer in milliseconds since the epoch: its `date` header, else `now`.
 *
 * @since 0.1.0
 * @category getters
 */
export const baseTime = (headers: HeaderMap, now: number): number => {
  const here = Number.isFinite(now) ? now : 0
  const date = headers.get("date")
  return (date === undefined ? undefined : parseHttpDate(date, here)) ?? here
}

/**
 * What the headers announce about limits: OpenAI, Azure, Groq, Mistral, Together (`x-ratelimit-remaining-tokens`),
 * Anthropic (`anthropic-ratelimit-tokens-remaining`, `…-unified-5h-status`), GitHub and the IETF's third draft. `base`
 * is what `baseTime` gives.
 *
 * @since 0.1.0
 * @category constructors
 */
export const readLimits = (headers: HeaderMap, base: number): ReadonlyArray<Announced> => {
  const found = new Map<string, Partial<Record<LimitField, string>>>()
  for (const [header, value] of headers) {
    const match = limitPatterns.map((pattern) => pattern.exec(header)?.groups).find(Predicate.isNotUndefined)
    if (match === undefined) continue
    const name = match.name ?? ""
    // The patterns admit no other field.
    const field = (match.field ?? "reset") as LimitField
    found.set(name, { ...found.get(name), [field]: value })
  }
  return [...found].filter(([name]) => !name.endsWith("overage")).map(([name, said]) => {
    const limit = count(said.limit)
    const remaining = count(said.remaining)
    const reset = parseReset(said["reset-after"] ?? said.reset ?? "", base)
    return { name, limit, remaining, resetMillis: reset, exhausted: exhausted(said, remaining) }
  })
}

/**
 * Parses an HTTP date in any of its three forms (all are GMT) to milliseconds since the epoch. A year of two digits is
 * read as the one nearest to `now`, at most 50 years ahead.
 *
 * @since 0.1.0
 * @category parsing
 */
export const parseHttpDate = (text: string, now: number): number | undefined => {
  const match = imfDate.exec(text) ?? rfc850Date.exec(text) ?? asctimeDate.exec(text)
  const part = match?.groups
  if (part === undefined) return undefined
  const month = months.indexOf((part.month ?? "").toLowerCase())
  const short = Number(part.year)
  const year = part.year?.length === 2 ? nearYear(short, now) : short
  return instant(year, month + 1, Number(part.day), Number(part.h), Number(part.m), Number(part.s))
}

/**
 * Parses an RFC 3339 instant (`2026-11-22T12:00:41Z`) to milliseconds since the epoch.
 *
 * @since 0.1.0
 * @category parsing
 */
export const parseInstant = (text: string): number | undefined => {
  const part = rfc3339.exec(text.trim())?.groups
  if (part === undefined) return undefined
  const at = instant(
    Number(part.year),
    Number(part.month),
    Number(part.day),
    Number(part.h),
    Number(part.m),
    Number(part.s ?? 0)
  )
  if (at === undefined) return undefined
  const fraction = part.fraction === undefined ? 0 : Math.ceil(Number(`0.${part.fraction}`) * 1000)
  const offset = (Number(part.oh ?? 0) * 60 + Number(part.om ?? 0)) * 60_000
  return at + fraction - (part.sign === "-" ? -offset : offset)
}

/**
 * Parses a duration with units (`1h2m3s`, `17ms`, `59.176s`, `6 minutes 30 seconds`) to whole milliseconds, rounded up.
 *
 * @since 0.1.0
 * @category parsing
 */
export const parseDuration = (text: string): number | undefined => {
  const trimmed = text.trim()
  return wholeDuration.test(trimmed) ? sumDuration(trimmed) : undefined
}

type LimitField = "limit" | "remaining" | "reset" | "reset-after" | "status" | "utilization"

const limitPatterns = [
  /^(?:x-)?rate-?limit(?:bysize)?-(?<field>limit|remaining|reset-after|reset)(?:-(?<name>[\w.-]{1,64}))?$/,
  /^anthropic-ratelimit-(?<name>[\w.-]{1,64}?)-(?<field>limit|remaining|reset|status|utilization)$/,
  /^x-ratelimit-(?<name>[\w.-]{1,64}?)-(?<field>limit|remaining|reset)$/
]

const hint = (source: Source, waitMillis: number | undefined): WaitHint | undefined =>
  waitMillis === undefined ? undefined : { waitMillis, source }

const isHeaders = (headers: HeadersInput): headers is Headers =>
  typeof headers.forEach === "function" && typeof headers.get === "function"

/** Whole milliseconds, rounded up; `undefined` for what is no time at all. */
const millis = (value: number): number | undefined => {
  if (!(value >= 0) || value > Number.MAX_SAFE_INTEGER) return undefined
  // 1.1 s are 1100 ms, though 1.1 * 1000 is a little more: nanoseconds first.
  return Number.isInteger(value) ? value : Math.ceil(Math.round(value * 1e6) / 1e6)
}

const decimal = /^\d{1,32}(?:\.\d{0,32})?$/

const number = (text: string): number | undefined => decimal.test(text) ? Number(text) : undefined

const until = (at: number | undefined, base: number): number | undefined =>
  at === undefined ? undefined : millis(Math.max(0, at - base))

// Headers that came twice are joined by a comma; waits merge by maximum.
const eachNumber = (text: string | undefined, unit: number): number | undefined => {
  if (text === undefined) return undefined
  const values = text.split(",").slice(0, 16).map((part) => number(part.trim()))
  return values.every(Predicate.isNotUndefined) ? millis(Math.max(...values) * unit) : undefined
}

const retryAfterMillis = (headers: HeaderMap): number | undefined =>
  eachNumber(headers.get("retry-after-ms"), 1) ?? eachNumber(headers.get("x-ms-retry-after-ms"), 1)

const retryAfter = (text: string | undefined, base: number): number | undefined =>
  text === undefined
    ? undefined
    : eachNumber(text, 1000) ?? until(parseHttpDate(text, base) ?? parseInstant(text), base) ?? parseDuration(text)

/** google.rpc.RetryInfo, also without its `@type`; the delay is a string, in some clients an object. */
const retryInfo = (body: ErrorBody.ErrorBody): number | undefined => {
  const waits = body.details.flatMap((detail) => {
    const delay = detail.retryDelay ?? detail.retry_delay
    const wait = Predicate.isRecord(delay)
      ? millis(numeric(delay.seconds) * 1000 + numeric(delay.nanos) / 1e6)
      : typeof delay === "string"
      ? parseDuration(delay)
      : undefined
    return wait === undefined ? [] : [wait]
  })
  return max(waits)
}

const numeric = (value: unknown): number =>
  typeof value === "number" ? value : typeof value === "string" ? Number(value) : value === undefined ? 0 : Number.NaN

const repeatedHeaders = (body: ErrorBody.ErrorBody, base: number): number | undefined => {
  if (!Predicate.isRecord(body.metadata.headers)) return undefined
  const headers = headerMap(body.metadata.headers)
  return retryAfterMillis(headers) ?? retryAfter(headers.get("retry-after"), base) ??
    lastReset(readLimits(headers, base), 429)
}

/** `{"retry_after": 64.57}` in seconds, as Cloudflare and others put it beside the message. */
const retryFields = (body: ErrorBody.ErrorBody): number | undefined => {
  const read = (object: ErrorBody.Fields, names: ReadonlyArray<string>, unit: number) =>
    names.map((name) => object[name]).map((value) =>
      typeof value === "number" ? millis(value * unit) : typeof value === "string" ? eachNumber(value, unit) : undefined
    ).find(Predicate.isNotUndefined)
  for (const object of [body.error, body.metadata]) {
    if (object === undefined) continue
    const wait = read(object, ["retry_after_ms", "retryAfterMs"], 1) ??
      read(object, ["retry_after", "retryAfter", "retry_after_seconds", "retryAfterSeconds"], 1000)
    if (wait !== undefined) return wait
  }
  return undefined
}

// The longer names first: "m" would match "ms".
const unit = "(?:milliseconds?|millis|msecs?|ms|microseconds?|us|µs|μs|nanoseconds?|ns|" +
  "seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)"
const piece = `\\d{1,32}(?:\\.\\d{1,32})?\\s{0,3}${unit}(?![a-z])`
const durationText = `${piece}(?:\\s{0,3},?\\s{0,3}(?:and\\s{1,3})?${piece}){0,7}`
const wholeDuration = new RegExp(`^${durationText}$`, "i")
const pieces = new RegExp(`(\\d{1,32}(?:\\.\\d{1,32})?)\\s{0,3}(${unit})`, "gi")
const request = "(?: (?:your|the|this) request)?"
const phrase = new RegExp(
  `(?:try${request} again|retry(?:ing)?${request}|retry[-_ ]after|wait|back off|resets?|available again)[:=]?\\s{0,3}` +
    `(?:(?:in|after|for)\\s{1,3})?(?:(?:about|approximately|at least|another)\\s{1,3})?(${durationText})`,
  "i"
)

const fromMessage = (message: string): number | undefined => {
  const said = phrase.exec(message)?.[1]
  return said === undefined ? undefined : sumDuration(said)
}

const sumDuration = (text: string): number | undefined => {
  let sum = 0
  for (const [, value, name] of text.matchAll(pieces)) sum += Number(value) * unitMillis(name ?? "")
  return millis(sum)
}

const unitMillis = (name: string): number => {
  const unit = name.toLowerCase()
  if (unit.startsWith("ms") || unit.startsWith("milli")) return 1
  if (unit.startsWith("micro") || /^[uµμ]s$/.test(unit)) return 1e-3
  if (unit.startsWith("n")) return 1e-6
  if (unit.startsWith("s")) return 1000
  if (unit.startsWith("m")) return 60_000
  return unit.startsWith("h") ? 3_600_000 : 86_400_000
}

/** `"name";r=0;t=30` (draft 10), `limit=100, remaining=0, reset=17` (draft 7), `RateLimit-Remaining` (draft 3). */
const ietf = (headers: HeaderMap): number | undefined => {
  const field = headers.get("ratelimit")
  const waits = field === undefined ? [] : splitList(field.slice(0, 4096)).flatMap((item) => {
    const parameters = parametersOf(item)
    return exhaustedWait(parameters.get("r"), parameters.get("t"))
  })
  const dictionary = field === undefined ? undefined : parametersOf(field.slice(0, 4096).replaceAll(",", ";"))
  const legacy = exhaustedWait(headers.get("ratelimit-remaining"), headers.get("ratelimit-reset"))
  return max(waits) ?? max(exhaustedWait(dictionary?.get("remaining"), dictionary?.get("reset"))) ?? max(legacy)
}

const exhaustedWait = (remaining: string | undefined, seconds: string | undefined): ReadonlyArray<number> => {
  // Draft 3 is defined in seconds; an epoch there is left to the reset headers, which tell the two apart.
  const reset = seconds === undefined ? undefined : number(seconds)
  const wait = remaining === undefined || Number(remaining) !== 0 || reset === undefined || reset >= oldestEpoch
    ? undefined
    : millis(reset * 1000)
  return wait === undefined ? [] : [wait]
}

/** Splits at commas outside quotes. */
const splitList = (text: string): ReadonlyArray<string> => text.match(/(?:"(?:[^"\\]|\\.)*"|[^",]|")+/g) ?? []

const parametersOf = (item: string): ReadonlyMap<string, string> => {
  const unquoted = item.replace(/"(?:[^"\\]|\\.)*"/g, "")
  return new Map(
    unquoted.split(";").flatMap((part) => {
      const [name, value] = part.split("=")
      return name === undefined || value === undefined ? [] : [[name.trim().toLowerCase(), value.trim()] as const]
    })
  )
}

/** When the last of the exhausted limits opens. A reset without a count, on a refusal, is that of the refusal. */
const lastReset = (limits: ReadonlyArray<Announced>, status: number | undefined): number | undefined =>
  max(limits.flatMap(({ exhausted, name, resetMillis }) => {
    const counts = exhausted ?? (status === 429 && (name === "" || name === "unified"))
    return counts && resetMillis !== undefined ? [resetMillis] : []
  }))

const exhausted = (
  said: Partial<Record<LimitField, string>>,
  remaining: number | undefined
): boolean | undefined => {
  if (said.status !== undefined) return /^(?:rejected|exhausted|blocked|exceeded)$/i.test(said.status)
  if (said.utilization !== undefined) return Number(said.utilization) >= 1
  // -1 means "does not apply".
  if (said.remaining !== undefined) return remaining === 0 && !(said.limit ?? "").startsWith("-")
  return undefined
}

const count = (text: string | undefined): number | undefined => {
  const value = text === undefined ? undefined : number(text)
  return value === undefined || !Number.isFinite(value) ? undefined : value
}

// A number of seconds from here on is an instant (2001), one of milliseconds is (1973), beyond is neither.
const oldestEpoch = 1e9
const oldestEpochMillis = 1e11
const latestEpochMillis = 1e14

/** A reset in any form: Go duration, seconds, unix seconds or milliseconds, RFC 3339, HTTP date. */
const parseReset = (text: string, base: number): number | undefined => {
  const value = number(text)
  if (value === undefined) return parseDuration(text) ?? until(parseInstant(text) ?? parseHttpDate(text, base), base)
  if (value < oldestEpoch) return millis(value * 1000)
  if (value >= latestEpochMillis) return undefined
  return until(value >= oldestEpochMillis ? value : value * 1000, base)
}

const max = (values: ReadonlyArray<number>): number | undefined =>
  values.length === 0 ? undefined : values.reduce((a, b) => Math.max(a, b))

const months = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
const time = "(?<h>\\d{2}):(?<m>\\d{2}):(?<s>\\d{2})"
const zone = "(?:GMT|UTC|Z|[+-]0000)"
const imfDate = new RegExp(
  `^\\s*(?:[a-z]{3},\\s*)?(?<day>\\d{1,2}) (?<month>[a-z]{3}) (?<year>\\d{4}) ${time} ${zone}\\s*$`,
  "i"
)
const rfc850Date = new RegExp(
  `^\\s*[a-z]{3,9},\\s*(?<day>\\d{1,2})-(?<month>[a-z]{3})-(?<year>\\d{4}|\\d{2}) ${time} ${zone}\\s*$`,
  "i"
)
const asctimeDate = new RegExp(
  `^\\s*[a-z]{3} (?<month>[a-z]{3}) {1,2}(?<day>\\d{1,2}) ${time} (?:GMT )?(?<year>\\d{4})\\s*$`,
  "i"
)
const rfc3339 = new RegExp(
  "^(?<year>\\d{4})-(?<month>\\d{2})-(?<day>\\d{2})[Tt ](?<h>\\d{2}):(?<m>\\d{2})" +
    "(?::(?<s>\\d{2})(?:\\.(?<fraction>\\d{1,12}))?)?" +
    "(?:[Zz]|(?<sign>[+-])(?<oh>\\d{2}):?(?<om>\\d{2}))$"
)

/** Refuses what is no date (32 January, hour 25); a leap second is the second after. */
const instant = (year: number, month: number, day: number, h: number, m: number, s: number): number | undefined => {
  if (month < 1 || month > 12 || day < 1 || h > 23 || m > 59 || s > 60) return undefined
  const midnight = new Date(0)
  midnight.setUTCFullYear(year, month - 1, day)
  return midnight.getUTCDate() === day ? midnight.getTime() + ((h * 60 + m) * 60 + s) * 1000 : undefined
}

const nearYear = (short: number, now: number): number => {
  const thisYear = new Date(now).getUTCFullYear()
  const year = (Number.isFinite(thisYear) ? thisYear - thisYear % 100 : 2000) + short
  return year > thisYear + 50 ? year - 100 : year < thisYear - 50 ? year + 100 : year
}
