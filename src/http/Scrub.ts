/**
 * Takes a secret out of what an upstream says, in every form in which it could be echoed.
 *
 * @since 0.1.0
 */

import { isPoolError } from "../KeymeshError.js"

/**
 * What stands in the place of a secret.
 *
 * @since 0.1.0
 * @category getters
 */
export const placeholder = "[redacted]"

/**
 * The forms of a secret: plain, as in a URL, as in JSON (some escape slashes), and as on a page.
 *
 * @since 0.1.0
 * @category getters
 */
export const forms = (secret: string): ReadonlyArray<string> => [
  ...new Set([
    secret,
    ...[encodeURIComponent(secret), new URLSearchParams({ "": secret }).toString().slice(1)].flatMap((text) => [
      text,
      // Some write the digits small.
      text.replace(/%[\dA-F]{2}/g, (code) => code.toLowerCase())
    ]),
    ...[JSON.stringify(secret).slice(1, -1)].flatMap((text) => [text, text.replaceAll("/", "\\/")]),
    secret.replace(/[&<>"']/g, (mark) => entities[mark] ?? mark)
  ])
]

const entities: Readonly<Record<string, string>> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  "\"": "&quot;",
  "'": "&#39;"
}

/**
 * A text without the secret.
 *
 * @since 0.1.0
 * @category combinators
 */
export const text = (secret: string) => {
  const all = forms(secret)
  return (value: string): string => all.reduce((clean, form) => clean.replaceAll(form, placeholder), value)
}

/**
 * A text that may have been cut off, without the secret, and without the beginning of one at its end.
 *
 * @since 0.1.0
 * @category combinators
 */
export const cutText = (secret: string) => {
  const scrub = text(secret)
  const all = forms(secret)
  return (value: string): string => {
    const clean = scrub(value)
    const lengths = all.map((form) => {
      for (let length = form.length - 1; length >= fewest; length--) {
        if (clean.endsWith(form.slice(0, length))) return length
      }
      return 0
    })
    const length = Math.max(...lengths)
    return length === 0 ? clean : clean.slice(0, -length) + placeholder
  }
}

/** So few characters of a secret tell nothing: it begins as all of its kind do. */
const fewest = 6

/**
 * Bytes without the secret; the same bytes, if it is not in them.
 *
 * @since 0.1.0
 * @category combinators
 */
export const bytes = (secret: string) => {
  const encoder = new TextEncoder()
  const all = forms(secret).map((form) => encoder.encode(form))
  const instead = encoder.encode(placeholder)
  return (value: Uint8Array): Uint8Array => {
    const parts: Array<Uint8Array> = []
    let from = 0
    let at = 0
    while (at < value.byteLength) {
      const found = all.find((form) => startsWith(value, at, form))
      if (found === undefined) {
        at++
        continue
      }
      parts.push(value.subarray(from, at), instead)
      at += found.byteLength
      from = at
    }
    if (parts.length === 0) return value
    parts.push(value.subarray(from))
    const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0))
    parts.reduce((offset, part) => (joined.set(part, offset), offset + part.byteLength), 0)
    return joined
  }
}

const startsWith = (value: Uint8Array, at: number, form: Uint8Array): boolean => {
  if (at + form.byteLength > value.byteLength) return false
  for (let i = 0; i < form.byteLength; i++) if (value[at + i] !== form[i]) return false
  return true
}

/**
 * The headers of an answer whose body stays as it is, with values clean of the secret; the same headers, if they are.
 *
 * @since 0.1.0
 * @category combinators
 */
export const values = (secret: string) => {
  const scrub = text(secret)
  return (headers: Headers): Headers => {
    const echoes: Array<readonly [string, string]> = []
    headers.forEach((value, name) => {
      const clean = scrub(value)
      if (clean !== value) echoes.push([name, clean])
    })
    if (echoes.length === 0) return headers
    const copy = new Headers(headers)
    for (const [name, value] of echoes) copy.set(name, value)
    return copy
  }
}

/**
 * Headers without the secret, in names and values, and without those that describe a body that was rewritten.
 *
 * @since 0.1.0
 * @category combinators
 */
export const headers = (secret: string) => {
  const scrub = text(secret)
  return (headers: Headers): Headers => {
    const clean = new Headers()
    headers.forEach((value, name) => {
      if (ofBody.has(name) || scrub(name) !== name) return
      clean.append(name, scrub(value))
    })
    return clean
  }
}

const ofBody: ReadonlySet<string> = new Set(["content-length", "content-encoding", "transfer-encoding"])

/**
 * A value without the secret, and without anything that could hold it unseen: errors and records are copied down to
 * a few levels, their texts scrubbed.
 *
 * @since 0.1.0
 * @category combinators
 */
export const error = (secret: string) => {
  const scrub = text(secret)
  const copy = (value: unknown, levels: number): unknown => {
    if (typeof value === "string") return scrub(value)
    if (isPoolError(value)) return value
    if (!(value instanceof Error)) return typeof value === "object" && value !== null ? undefined : value
    if (levels === 0) return undefined
    // A copy of the same kind, so that SDKs recognise it; only what is known to be harmless is taken over.
    const clean: Error = Object.create(Object.getPrototypeOf(value))
    const define = (name: string, content: unknown) =>
      Object.defineProperty(clean, name, { value: content, enumerable: false, configurable: true, writable: true })
    define("message", scrub(value.message))
    define("stack", scrub(value.stack ?? ""))
    // Read from the value itself: the getters of some prototypes (`DOMException`) refuse a copy.
    for (const name of ["name", "code", "errno", "syscall"]) {
      const content: unknown = Reflect.get(value, name)
      if (typeof content === "string") define(name, scrub(content))
      else if (typeof content === "number") define(name, content)
    }
    if (value.cause !== undefined) define("cause", copy(value.cause, levels - 1))
    if (value instanceof AggregateError) define("errors", value.errors.map((one) => copy(one, levels - 1)))
    return clean
  }
  return (value: unknown): unknown => copy(value, 6)
}
