/**
 * From an answer, or from what was thrown in its place, to a fault. One classifier for every provider: what differs
 * between them is data (`ErrorDialect`).
 *
 * @since 0.1.0
 */
import * as Predicate from "effect/Predicate"
import * as Fault from "../Fault.js"
import type { ErrorDialect, ErrorRule, Verdict } from "../providers/Provider.js"
import * as ErrorBody from "./ErrorBody.js"
import * as WaitHint from "./WaitHint.js"

/**
 * An answer as far as it has been read.
 *
 * @since 0.1.0
 * @category models
 */
export interface Answer {
  readonly status: number
  readonly headers: WaitHint.HeadersInput
  /** Text, bytes or parsed JSON; leave it out when it was not read. */
  readonly body?: unknown
  /** When the answer arrived, in milliseconds since the epoch; its `date` header goes before. */
  readonly now: number
  /** For a stream: whether content had been seen. */
  readonly streaming?: Phase | undefined
}

/**
 * How far a stream had come.
 *
 * @since 0.1.0
 * @category models
 */
export type Phase = "before-content" | "after-content"

/**
 * The fault that an answer shows, `undefined` for a success. A success whose body was not given returns at once; one
 * whose body was given is a fault when the body is an error and nothing else, where the dialect says so, or where the
 * answer should have been a stream.
 *
 * Never throws: what it cannot read leaves the decision to the status.
 *
 * @example
 * ```ts
 * import * as Classifier from "effect-keymesh/Classifier"
 * import * as Providers from "effect-keymesh/Providers"
 *
 * const fault = Classifier.classify(Providers.openAi.dialect, {
 *   status: 429,
 *   headers: { "retry-after": "2" },
 *   body: { error: { code: "rate_limit_exceeded" } },
 *   now: 0
 * })
 * // RateLimited, scope "group", perModel, waitMillis 2000, told
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const classify = (dialect: ErrorDialect, answer: Answer): Fault.Fault | undefined => {
  if (answer.status >= 400) return judge(dialect, answer, ErrorBody.read(answer.body), answer.status)
  if (answer.body === undefined || answer.body === null) return undefined
  if (dialect.okBody === "ignore" && answer.streaming === undefined) return undefined
  const body = ErrorBody.read(answer.body)
  return body.isError ? judge(dialect, answer, body, body.status) : undefined
}

/**
 * The fault that an event of a stream shows, `undefined` when it is no error. The status comes from inside the event.
 *
 * @since 0.1.0
 * @category constructors
 */
export const classifyEvent = (
  dialect: ErrorDialect,
  event: { readonly event?: string | undefined; readonly data?: unknown },
  stream: Pick<Answer, "headers" | "now"> & { readonly streaming: Phase }
): Fault.Fault | undefined => {
  const body = ErrorBody.read(event.data)
  return body.hasError || event.event === "error" || event.event === "response.failed"
    ? judge(dialect, stream, body, body.status)
    : undefined
}

/**
 * What was thrown in place of an answer: by `fetch`, by undici, by an SDK, by Effect. `"cancelled"` is an abort, which
 * is nobody's fault; whether the caller aborted or a timer of one's own did, only the signal tells. An abort whose
 * cause is a timeout is a `Timeout`. What is not known is a `Network` fault that may have been processed.
 *
 * @example
 * ```ts
 * import * as Classifier from "effect-keymesh/Classifier"
 *
 * const fault = Classifier.classifyThrown(Object.assign(new Error("connect"), { code: "ECONNREFUSED" }))
 * // Network, unprocessed
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const classifyThrown = (error: unknown): Fault.Fault | "cancelled" => {
  if (property(error, "_tag") === "Fault" && Fault.isFault(error)) return error
  const chain = causes(error)
  const status = chain.map((cause) => cause.status).find(Predicate.isNotUndefined)
  const answered = status === undefined ? undefined : Fault.fromStatus(status)
  if (answered !== undefined) return answered
  const codes = chain.map((cause) => cause.code)
  const connect = codes.find((code) => unreachable.test(code))
  if (connect !== undefined) return Fault.make("Network", { unprocessed: true, explicit: true, code: connect })
  const slow = chain.find(isTimeout)
  if (slow !== undefined) {
    // Undici and the system time the connection; timers of callers and SDKs time the request.
    const wire = slow.code !== ""
    return Fault.make("Timeout", {
      scope: wire ? "provider" : "request",
      unprocessed: slow.code === "UND_ERR_CONNECT_TIMEOUT",
      ...(wire ? { code: slow.code, explicit: true } : {})
    })
  }
  if (chain.some(isAbort)) return "cancelled"
  const refused = chain.find((cause) => unsendable.test(cause.code) || unsendableWords.test(cause.message))
  if (refused !== undefined) return Fault.make("Rejected", refused.code === "" ? {} : { code: refused.code })
  const code = codes.findLast((code) => code !== "")
  const never = chain.some((cause) => unreachableWords.test(cause.message))
  return Fault.make("Network", { unprocessed: never, ...(code === undefined ? {} : { code, explicit: true }) })
}

/**
 * An answer that ended before its proper end.
 *
 * @since 0.1.0
 * @category constructors
 */
export const cut: Fault.Fault = Fault.make("Network", { code: "stream_cut" })

// --- answers ---------------------------------------------------------------------------------------------------------

interface Found {
  readonly verdict: Verdict
  /** Whether more than the status said so. */
  readonly named: boolean
  readonly code?: string
}

interface Evidence {
  readonly body: ErrorBody.ErrorBody
  readonly codes: ReadonlyArray<string>
  readonly headers: WaitHint.HeaderMap
  readonly status: number | undefined
  readonly wait: WaitHint.WaitHint | undefined
}

const judge = (
  dialect: ErrorDialect,
  answer: Pick<Answer, "headers" | "now" | "streaming">,
  body: ErrorBody.ErrorBody,
  status: number | undefined
): Fault.Fault => {
  const headers = WaitHint.headerMap(answer.headers)
  const base = WaitHint.baseTime(headers, answer.now)
  const wait = WaitHint.fromParts(headers, body, base, status)
  const challenge = /\berror="([\w.-]{1,64})"/.exec(headers.get("www-authenticate") ?? "")?.[1]
  const codes = challenge === undefined ? body.codes : [...body.codes, challenge]
  const found = decide(dialect, { body, codes, headers, status, wait })
  const { code, named } = found
  const verdict = status !== undefined && dialect.failover?.includes(status) === true && isFinal(found.verdict)
    ? triedAgain
    : found.verdict
  const limited = verdict.kind === "RateLimited" ? dialect.limitScope : undefined
  const reset = verdict.kind === "QuotaExhausted" ? resetMillis(verdict, body, base) : undefined
  return Fault.make(verdict.kind, {
    scope: verdict.scope ?? limited,
    perModel: verdict.perModel,
    wait: wait?.waitMillis,
    retryable: verdict.retryable,
    failover: verdict.failover,
    explicit: verdict.explicit ?? named,
    // After content, work was done whatever the error says.
    unprocessed: answer.streaming === "after-content" ? false : verdict.unprocessed,
    status,
    code: printable(verdict.code ?? code ?? codes[0]),
    reset,
    unit: verdict.kind === "RateLimited" ? unitOf([...codes, ...body.quotas, body.message].join(" ")) : undefined
  })
}

/** What the limit counts that was hit, by what is said of it. */
const unitOf = (said: string): Fault.Fault["unit"] =>
  /concurren|simultaneous|\brequests? in.flight|parallel requests/i.test(said)
    ? "concurrency"
    : /slow_down|ramp_limit|per.?day|daily|\b[RT]PD\b|in.flight/i.test(said)
    ? "other"
    : /\btokens?\b|[a-z_]tokens?\b|\bTPM\b|Tokens?Per/i.test(said)
    ? "tokens"
    : undefined

/** Whether the call would end here. */
const isFinal = ({ failover, kind }: Verdict): boolean =>
  kind === "Rejected" || kind === "TooLarge" || (kind === "Forbidden" && failover === false)

/** Whoever wants such a status to be tried again says that it does no harm. */
const triedAgain: Verdict = { kind: "ServerError", unprocessed: true }

const decide = (dialect: ErrorDialect, evidence: Evidence): Found => {
  for (const code of evidence.codes) {
    const verdict = lookup(dialect.codes, code)
    if (verdict !== undefined) return { verdict, named: true, code }
  }
  const rule = dialect.rules.find((rule) => holds(rule, evidence))
  if (rule !== undefined) return { verdict: rule.verdict, named: true }
  const byStatus = evidence.status === undefined ? undefined : ofStatus(dialect, evidence.status)
  for (const code of evidence.codes) {
    const verdict = lookup(dialect.words, code)
    if (verdict !== undefined && (byStatus === undefined || byStatus.kind === verdict.kind)) {
      return { verdict, named: true }
    }
  }
  return { verdict: byStatus ?? { kind: "ServerError" }, named: false }
}

const lookup = (table: Readonly<Record<string, Verdict>>, code: string): Verdict | undefined => {
  const name = code.toLowerCase()
  return Object.hasOwn(table, name) ? table[name] : undefined
}

const ofStatus = (dialect: ErrorDialect, status: number): Verdict | undefined => {
  if (Object.hasOwn(dialect.statuses, status)) return dialect.statuses[status]
  const fault = Fault.fromStatus(status)
  return fault === undefined ? undefined : { kind: fault.kind }
}

const holds = (rule: ErrorRule, { body, codes, headers, status, wait }: Evidence): boolean =>
  (rule.statuses === undefined || status === undefined || rule.statuses.includes(status)) &&
  (rule.html === undefined || rule.html === body.html) &&
  (rule.waitMillis === undefined || rule.waitMillis === wait?.waitMillis) &&
  (rule.field === undefined || hasField(body, rule.field)) &&
  (rule.header === undefined || rule.header[1].test(headers.get(rule.header[0]) ?? "")) &&
  (rule.code === undefined || codes.some((code) => rule.code?.test(code))) &&
  (rule.quota === undefined || body.quotas.some((quota) => rule.quota?.test(quota))) &&
  (rule.message === undefined || rule.message.test(body.message))

const hasField = (body: ErrorBody.ErrorBody, name: string): boolean =>
  [body.error, body.metadata].some((object) => {
    const value = object?.[name]
    return value !== undefined && value !== null && value !== "" && value !== false
  })

/** Cut and free of control characters; what looks like a credential that was echoed is dropped. */
const printable = (code: string | undefined): string | undefined => {
  const text = code?.replace(/[^\x20-\x7e]/g, "").trim().slice(0, 64) ?? ""
  return text === "" || /(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}|\b(?:sk|pk|gsk|xai)-|AIza/.test(text) ? undefined : text
}

/** When a spent quota comes back; an instant that has passed says nothing, for the quota is still spent. */
const resetMillis = (verdict: Verdict, body: ErrorBody.ErrorBody, base: number): number | undefined => {
  const told = regained.exec(body.message)?.groups
  const said = body.metadata.resets_at ?? body.error?.resets_at ?? (told && `${told.day}T${told.time ?? "00:00"}Z`)
  const at = typeof said === "string"
    ? WaitHint.parseInstant(said)
    : typeof said === "number"
    ? said >= 1e11 ? said : said * 1000
    : undefined
  const reset = at ?? (verdict.reset === undefined ? undefined : schedules[verdict.reset](base))
  return reset === undefined || !(reset > base) || !Number.isSafeInteger(reset) ? undefined : reset - base
}

const regained = new RegExp(
  "(?:regain access|resets?|available again|try again|renews?) (?:on|at|after) (?<day>\\d{4}-\\d{2}-\\d{2})" +
    "(?:(?:T| at | )(?<time>\\d{2}:\\d{2}(?::\\d{2})?))?",
  "i"
)

const hour = 3_600_000
const day = 24 * hour

const schedules: Record<NonNullable<Verdict["reset"]>, (base: number) => number> = {
  "midnight-utc": (base) => (Math.floor(base / day) + 1) * day,
  "month-utc": (base) => {
    const date = new Date(base)
    return Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 1)
  },
  "midnight-pacific": (base) => {
    const midnight = (Math.floor((base + pacificOffset(base)) / day) + 1) * day
    // The offset is that of the midnight itself: the clock may change before it.
    return midnight - pacificOffset(midnight - pacificOffset(base))
  }
}

/** Daylight saving time in the USA: from the second Sunday of March to the first of November, 2 o'clock. */
const pacificOffset = (at: number): number => {
  const year = new Date(at).getUTCFullYear()
  const begins = sunday(year, 2, 8) + 10 * hour
  const ends = sunday(year, 10, 1) + 9 * hour
  return (at >= begins && at < ends ? -7 : -8) * hour
}

/** Midnight (UTC) of the first Sunday on or after a day. */
const sunday = (year: number, month: number, date: number): number => {
  const from = Date.UTC(year, month, date)
  return from + (7 - new Date(from).getUTCDay()) % 7 * day
}

// --- what was thrown -------------------------------------------------------------------------------------------------

interface Cause {
  readonly names: ReadonlyArray<string>
  readonly code: string
  readonly message: string
  readonly status: number | undefined
}

/** Nothing was sent: no address, no route, no listener, no handshake. */
const unreachable = new RegExp(
  "^(?:ECONNREFUSED|ConnectionRefused|ENOTFOUND|EAI_\\w+|EHOSTUNREACH|ENETUNREACH|EHOSTDOWN|ENETDOWN|EADDRNOTAVAIL|" +
    "CERT_\\w+|ERR_TLS_CERT\\w*|DEPTH_ZERO_SELF_SIGNED_CERT|SELF_SIGNED_CERT_IN_CHAIN|UNABLE_TO_\\w+)$"
)
const unreachableWords = /connection refused|dns error|unable to connect|getaddrinfo/i
const timeoutCodes = /^(?:ETIMEDOUT|ESOCKETTIMEDOUT|ERR_HTTP_REQUEST_TIMEOUT|UND_ERR_(?:CONNECT|HEADERS|BODY)_TIMEOUT)$/
const timeoutNames = /^(?:(?:Connect|Headers|Body|APIConnection)?TimeoutError|TimeoutException)$/
const abortNames = /^(?:AbortError|APIUserAbortError|InterruptedException|RequestAbortedError)$/
const abortCodes = /^(?:ABORT_ERR|UND_ERR_ABORTED|ERR_CANCELED)$/
const unsendable =
  /^(?:ERR_INVALID_(?:URL|CHAR|HTTP_TOKEN|ARG_TYPE|ARG_VALUE|PROTOCOL)|UND_ERR_INVALID_ARG|UND_ERR_NOT_SUPPORTED)$/
const unsendableWords = new RegExp(
  "failed to parse url|invalid url|unknown scheme|invalid header (?:value|name)|cannot have body|HTTP method" +
    "|disturbed or locked|^Request(?:Init| constructor)\\b",
  "i"
)

const isTimeout = (cause: Cause): boolean =>
  timeoutCodes.test(cause.code) || cause.names.some((name) => timeoutNames.test(name)) ||
  (/\btimed? ?out\b/i.test(cause.message) && !cause.names.some((name) => abortNames.test(name)))

const isAbort = (cause: Cause): boolean =>
  abortCodes.test(cause.code) || cause.names.some((name) => abortNames.test(name)) ||
  cause.message === "Request was aborted."

/** An error, its cause, the cause of that …, and the parts of an aggregate; at most 16, for they may go round. */
const causes = (error: unknown): ReadonlyArray<Cause> => {
  const found: Array<Cause> = []
  let waiting: ReadonlyArray<unknown> = [error]
  while (waiting.length > 0 && found.length < 16) {
    const [next, ...rest] = waiting
    waiting = rest
    if (next === undefined || next === null) continue
    const [cause, inner] = look(next)
    found.push(cause)
    waiting = [...rest, ...inner]
  }
  return found
}

const look = (error: unknown): readonly [Cause, ReadonlyArray<unknown>] => {
  try {
    return lookInside(error)
  } catch {
    return [nothing, []]
  }
}

const lookInside = (error: unknown): readonly [Cause, ReadonlyArray<unknown>] => {
  if (typeof error === "string") return [{ names: [], code: "", message: error.slice(0, 1024), status: undefined }, []]
  if (!Predicate.isObject(error)) return [nothing, []]
  const code = property(error, "code")
  const constructed = property(error, "constructor")
  const status = property(error, "status") ?? property(error, "statusCode") ??
    property(property(error, "response"), "status")
  const errors = property(error, "errors")
  const message = property(error, "message")
  return [{
    names: [
      property(error, "name"),
      property(error, "_tag"),
      property(error, "className"),
      typeof constructed === "function" ? property(constructed, "name") : undefined
    ].filter(Predicate.isString),
    code: typeof code === "string" ? printable(code) ?? "" : "",
    message: Predicate.isString(message) ? message.slice(0, 1024) : "",
    status: typeof status === "number" && status >= 400 && status < 600 ? status : undefined
  }, [property(error, "cause"), ...(Array.isArray(errors) ? errors.slice(0, 8) : [])]]
}

const nothing: Cause = { names: [], code: "", message: "", status: undefined }

const property = (value: unknown, name: string): unknown => {
  try {
    return Predicate.isObject(value) ? Reflect.get(value, name) : undefined
  } catch {
    // A getter or a proxy that throws has nothing to tell.
    return undefined
  }
}
