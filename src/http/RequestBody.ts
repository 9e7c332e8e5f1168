/**
 * The body of a request: whether it can be sent again, and what its top level says, without parsing all of it.
 *
 * @since 0.1.0
 */

import type * as RateLimit from "../RateLimit.js"

/**
 * Whether a body can be sent more than once. Streams and iterators are used up by the first attempt.
 *
 * @since 0.1.0
 * @category getters
 */
export const isReusable = (body: unknown): boolean =>
  body === null || body === undefined || typeof body === "string" || body instanceof ArrayBuffer ||
  ArrayBuffer.isView(body) || body instanceof URLSearchParams || body instanceof FormData || body instanceof Blob

/**
 * The plain values (texts, numbers, true, false, null) of these fields at the top level of a JSON object. Nested values
 * are skipped, not parsed, so that a long prompt costs little; what is no JSON object has no fields.
 *
 * @since 0.1.0
 * @category getters
 */
export const topLevel = (json: string, names: ReadonlyArray<string>): Readonly<Record<string, unknown>> => {
  const found: Record<string, unknown> = {}
  let at = skipSpace(json, 0)
  if (json[at] !== "{") return found
  at = skipSpace(json, at + 1)
  while (json[at] === "\"") {
    const nameEnd = endOfString(json, at)
    if (nameEnd < 0) return found
    const name = json.slice(at + 1, nameEnd)
    const colon = skipSpace(json, nameEnd + 1)
    if (json[colon] !== ":") return found
    const from = skipSpace(json, colon + 1)
    const to = endOfValue(json, from)
    if (to < 0) return found
    if (names.includes(name) && json[from] !== "{" && json[from] !== "[") {
      try {
        found[name] = JSON.parse(json.slice(from, to))
      } catch {
        return found
      }
    }
    const comma = skipSpace(json, to)
    if (json[comma] !== ",") return found
    at = skipSpace(json, comma + 1)
  }
  return found
}

/**
 * The tokens that a request will use: about one for 4 characters of its text, and as many more as it lets the answer
 * have, by whichever of these fields says so.
 *
 * @since 0.1.0
 * @category getters
 */
export const tokensOf = (
  text: string | undefined,
  fields: Readonly<Record<string, unknown>>
): RateLimit.Estimate | undefined => {
  if (text === undefined) return undefined
  const input = Math.ceil(text.length / 4)
  for (const name of outputFields) {
    const most = fields[name]
    if (typeof most === "number" && most >= 0) return { input, maxOutput: most }
  }
  return { input }
}

/**
 * The fields by which a request bounds its output.
 *
 * @since 0.1.0
 * @category constants
 */
export const outputFields = ["max_tokens", "max_completion_tokens", "max_output_tokens", "maxTokens"] as const

const skipSpace = (json: string, from: number): number => {
  let at = from
  while (at < json.length && json.charCodeAt(at) <= 32) at++
  return at
}

/** Where the string that starts at `from` has its closing quote. */
const endOfString = (json: string, from: number): number => {
  for (let at = json.indexOf("\"", from + 1); at >= 0; at = json.indexOf("\"", at + 1)) {
    let escapes = 0
    while (json[at - 1 - escapes] === "\\") escapes++
    if (escapes % 2 === 0) return at
  }
  return -1
}

/** The offset after the value that starts at `from`. */
const endOfValue = (json: string, from: number): number => {
  if (json[from] === "\"") {
    const end = endOfString(json, from)
    return end < 0 ? -1 : end + 1
  }
  let depth = 0
  for (let at = from; at < json.length; at++) {
    switch (json[at]) {
      case "\"": {
        const end = endOfString(json, at)
        if (end < 0) return -1
        at = end
        break
      }
      case "{":
      case "[":
        depth++
        break
      case "}":
      case "]":
        if (depth === 0) return at
        depth--
        if (depth === 0) return at + 1
        break
      case ",":
        if (depth === 0) return at
    }
  }
  return -1
}
