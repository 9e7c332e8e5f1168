/**
 * Reads what the body of a failed answer says, whatever shape the provider gave it.
 *
 * @since 0.1.0
 */
import * as Predicate from "effect/Predicate"
import * as Sse from "./Sse.js"

/**
 * What there is to know of an error body. It may hold what the provider echoed, so it is not for logs.
 *
 * @since 0.1.0
 * @category models
 */
export interface ErrorBody {
  /** The object that describes the error, out of its wrapping; absent when the body is no JSON object. */
  readonly error: Fields | undefined
  /** The codes and types of the error, the most telling first. Those that only repeat a status are left out. */
  readonly codes: ReadonlyArray<string>
  /** Ids of the quotas that were violated (Google). */
  readonly quotas: ReadonlyArray<string>
  /** Everything said in words, cut at 8 KiB; the body itself when it is no JSON. */
  readonly message: string
  /** The error's `details` (Google), where they are a list. */
  readonly details: ReadonlyArray<Fields>
  /** The error's `metadata` (OpenRouter), or an empty object. */
  readonly metadata: Fields
  /** A status inside the body. */
  readonly status: number | undefined
  /** Whether it is a page for people. */
  readonly html: boolean
  /** Whether an error is named, maybe beside a result. */
  readonly hasError: boolean
  /** Whether this is an error and nothing else: what a success must be to count as a failure. */
  readonly isError: boolean
}

/**
 * An object out of JSON.
 *
 * @since 0.1.0
 * @category models
 */
export interface Fields {
  readonly [name: string]: unknown
}

/**
 * The largest body that is parsed, in characters; of a larger one only the beginning is looked at, as text.
 *
 * @since 0.1.0
 * @category constants
 */
export const maxParsed = 256 * 1024

/**
 * Reads a body: text (JSON, server-sent events, HTML, anything), bytes, or what a JSON parser already made of it. Never
 * throws.
 *
 * @since 0.1.0
 * @category constructors
 */
export const read = (body: unknown): ErrorBody => {
  try {
    if (body instanceof Uint8Array) return read(new TextDecoder().decode(body.subarray(0, maxParsed)))
    if (typeof body === "string") return ofText(body)
    return ofJson(body) ?? nothing
  } catch {
    // An exotic object (a getter or a proxy that throws) says nothing.
    return nothing
  }
}

const maxMessage = 8 * 1024
const maxList = 32
const maxDepth = 4

const nothing: ErrorBody = {
  error: undefined,
  codes: [],
  quotas: [],
  message: "",
  details: [],
  metadata: {},
  status: undefined,
  html: false,
  hasError: false,
  isError: false
}

const ofText = (text: string): ErrorBody => {
  const parsed = parse(text)
  const read = parsed === undefined ? ofEvents(text) : ofJson(parsed)
  if (read !== undefined) return read
  const head = text.slice(0, maxMessage)
  return { ...nothing, message: head, html: /<(?:!doctype\s+html|html|head|body)\b/i.test(head.slice(0, 1024)) }
}

/** JSON.parse for text that looks like JSON; text inside text is what the Gemini SDK makes of some errors. */
const parse = (text: string): unknown => {
  if (text.length > maxParsed) return undefined
  const trimmed = text.trim().replace(/^\uFEFF/, "")
  if (!/^[{["]/.test(trimmed)) return undefined
  try {
    return JSON.parse(trimmed)
  } catch {
    return undefined
  }
}

/** The first error among server-sent events, for a stream that was read as a whole. */
const ofEvents = (text: string): ErrorBody | undefined => {
  if (!/^(?:data|event):/m.test(text.slice(0, maxMessage))) return undefined
  const [events, state] = Sse.feed(Sse.initial, text.slice(0, maxParsed))
  const last = Sse.finish(state)
  for (const event of last === undefined ? events : [...events, last]) {
    const parsed = event.data === undefined ? undefined : parse(event.data)
    const body = parsed === undefined ? undefined : ofJson(parsed)
    if (body !== undefined && (body.hasError || event.event === "error")) return { ...body, isError: true }
  }
  return undefined
}

const ofJson = (json: unknown): ErrorBody | undefined => {
  const root = unwrap(json, 0)
  if (root === undefined) {
    return typeof json === "string"
      ? { ...nothing, message: json.slice(0, maxMessage) }
      : undefined
  }
  const found = locate(root, 0)
  const error = found ?? root
  const details = list(error.details)
  const metadata = fields(error.metadata) ?? {}
  const violations = details.flatMap((detail) => list(detail.violations))
  return {
    error,
    details,
    metadata,
    codes: codesOf(root, error, details, metadata),
    quotas: [
      ...violations.flatMap((violation) => texts([violation.quotaId, violation.quotaMetric])),
      ...violations.flatMap((violation) => violation.quotaValue === "0" ? ["limit:0"] : []),
      ...details.flatMap((detail) => texts([fields(detail.metadata)?.quota_limit]))
    ],
    message: messageOf(root, error, metadata),
    status: statusOf(error) ?? statusOf(root),
    html: false,
    hasError: isMarked(root) || isNamed(root, found),
    isError: isMarked(root) || (isNamed(root, found) && !hasResult(root))
  }
}

/** Arrays of errors (Gemini) and JSON inside a string. */
const unwrap = (json: unknown, depth: number): Fields | undefined => {
  if (depth > maxDepth) return undefined
  if (Array.isArray(json)) {
    const objects = list(json)
    return objects.find((item) => locate(item, 0) !== undefined) ?? objects[0] ?? unwrap(json[0], depth + 1)
  }
  if (typeof json === "string") {
    const inner = parse(json)
    return inner === undefined ? undefined : unwrap(inner, depth + 1)
  }
  return fields(json)
}

/** The object that describes the error, when it is wrapped in another. */
const locate = (root: Fields, depth: number): Fields | undefined => {
  const choice = list(root.choices)[0]
  const wrapped = fields(root.error) ??
    fields(fields(root.response)?.error) ??
    list(root.errors)[0] ??
    fields(choice?.error) ??
    fields(groqError(root)) ??
    fields(root.fault)
  if (wrapped === undefined) return undefined
  // The error of an error: JSON text in the message, or one more wrapping.
  const inner = typeof wrapped.message === "string" ? unwrapObject(wrapped.message) : undefined
  const deeper = depth < maxDepth && inner !== undefined ? locate(inner, depth + 1) ?? inner : undefined
  return deeper ?? wrapped
}

const unwrapObject = (text: string): Fields | undefined => /^\s*[{[]/.test(text) ? unwrap(parse(text), 1) : undefined

const codesOf = (
  root: Fields,
  error: Fields,
  details: ReadonlyArray<Fields>,
  metadata: Fields
): ReadonlyArray<string> => {
  const named = [
    fields(error.details)?.error_code,
    ...details.map((detail) => detail.reason),
    metadata.limit_source,
    metadata.error_type,
    error.error_code,
    error.code,
    fields(error.innererror)?.code,
    error.status,
    error.type,
    ...(root === error ? [] : [root.error_code, root.code, root.type]),
    // OAuth, xAI and others: the error is one word.
    wordOf(error.error),
    wordOf(root.error)
  ]
  return texts(named).filter((code) => !/^[1-5]\d\d$/.test(code) && code !== "error" && code !== "response.failed")
}

const wordOf = (value: unknown): unknown =>
  typeof value === "string" && /^[\w.-]{1,64}$/.test(value) ? value : undefined

const messageOf = (root: Fields, error: Fields, metadata: Fields): string => {
  const said = [
    ...wordsOf(error, 0),
    ...(root === error ? [] : wordsOf(root, 0)),
    metadata.raw,
    groqError(root)
  ]
  return texts(said).join("\n").slice(0, maxMessage)
}

const wordsOf = (value: unknown, depth: number): ReadonlyArray<unknown> => {
  if (depth > maxDepth) return []
  if (typeof value === "string") return [value]
  if (Array.isArray(value)) return value.slice(0, maxList).flatMap((item) => wordsOf(item, depth + 1))
  const object = fields(value)
  if (object === undefined) return []
  const own = [object.message, object.detail, object.msg, object.title, object.error_description]
  const words = own.flatMap((item) => wordsOf(item, depth + 1))
  return typeof object.error === "string" ? [...words, object.error] : words
}

const statusOf = (object: Fields): number | undefined => {
  for (const value of [object.code, object.status, object.status_code, object.statusCode, object.raw_status_code]) {
    const status = typeof value === "string" && /^\d{3}$/.test(value) ? Number(value) : value
    if (typeof status === "number" && Number.isInteger(status) && status >= 400 && status < 600) return status
  }
  return undefined
}

/** Says by itself that it is an error, or holds a choice that is one. */
const isMarked = (root: Fields): boolean =>
  root.type === "error" || root.object === "error" || root.type === "response.failed" || isSaid(groqError(root)) ||
  list(root.choices).some((choice) => fields(choice.error) !== undefined || choice.finish_reason === "error")

const isNamed = (root: Fields, found: Fields | undefined): boolean => found !== undefined || isSaid(root.error)

const isSaid = (value: unknown): boolean => fields(value) !== undefined || (typeof value === "string" && value !== "")

const groqError = (root: Fields): unknown => fields(root.x_groq)?.error

/** An answer that holds a result beside an error (a stored response that failed, a batch) is a result. */
const hasResult = (root: Fields): boolean => results.some((name) => root[name] !== undefined && root[name] !== null)

const results = ["choices", "candidates", "content", "output", "data", "object", "embeddings", "message_id"]

const fields = (value: unknown): Fields | undefined => Predicate.isRecord(value) ? value : undefined

const list = (value: unknown): ReadonlyArray<Fields> =>
  Array.isArray(value) ? value.slice(0, maxList).filter(Predicate.isRecord) : []

const texts = (values: ReadonlyArray<unknown>): ReadonlyArray<string> =>
  values.flatMap((value) =>
    typeof value === "string" && value.trim() !== ""
      ? [value]
      : typeof value === "number" && Number.isFinite(value)
      ? [String(value)]
      : []
  )
