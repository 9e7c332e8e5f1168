/**
 * Checks of settings that people write: every refusal names the field, and none shows a value that could be a secret.
 *
 * @since 0.1.0
 */
import * as Duration from "effect/Duration"
import * as Either from "effect/Either"
import * as Predicate from "effect/Predicate"
import { ConfigurationError } from "./KeymeshError.js"

/**
 * The outcome of a check.
 *
 * @since 0.1.0
 * @category models
 */
export type Checked<A> = Either.Either<A, ConfigurationError>

/**
 * Refuses a field.
 *
 * @since 0.1.0
 * @category constructors
 */
export const refuse = (field: string, problem: string): Checked<never> =>
  Either.left(new ConfigurationError({ field, problem }))

/**
 * Refuses anything but a record, and every field that is not in the list: a misspelt setting must not be ignored.
 *
 * @since 0.1.0
 * @category checks
 */
export const refuseUnknown = (options: unknown, known: ReadonlyArray<string>, path: string): Checked<void> => {
  if (!Predicate.isRecord(options)) return refuse(path, "must be an object")
  for (const name of Object.keys(options)) {
    if (!known.includes(name)) return refuse(below(path, name), `unknown setting; known are ${known.join(", ")}`)
  }
  return Either.void
}

/**
 * The path of a field. A name that does not look like one is left out: it may be a secret in the wrong place.
 *
 * @since 0.1.0
 * @category getters
 */
export const below = (path: string, name: string): string => {
  const shown = /^[a-zA-Z-]{1,32}$/.test(name) ? name : "?"
  return path === "" ? shown : `${path}.${shown}`
}

/**
 * A finite number greater than 0.
 *
 * @since 0.1.0
 * @category checks
 */
export const positive = (value: unknown, path: string): Checked<number> =>
  typeof value === "number" && Number.isFinite(value) && value > 0
    ? Either.right(value)
    : refuse(path, `must be a finite number greater than 0${shown(value)}`)

/**
 * A finite number of at least 0.
 *
 * @since 0.1.0
 * @category checks
 */
export const nonNegative = (value: unknown, path: string): Checked<number> =>
  typeof value === "number" && Number.isFinite(value) && value >= 0
    ? Either.right(value)
    : refuse(path, `must be a finite number of at least 0${shown(value)}`)

/**
 * A finite number.
 *
 * @since 0.1.0
 * @category checks
 */
export const finite = (value: unknown, path: string): Checked<number> =>
  typeof value === "number" && Number.isFinite(value)
    ? Either.right(value)
    : refuse(path, `must be a finite number${shown(value)}`)

/**
 * A whole number of at least `least`.
 *
 * @since 0.1.0
 * @category checks
 */
export const integer = (value: unknown, path: string, least = 0): Checked<number> =>
  typeof value === "number" && Number.isSafeInteger(value) && value >= least
    ? Either.right(value)
    : refuse(path, `must be a whole number of at least ${least}${shown(value)}`)

/**
 * A number from 0 to 1.
 *
 * @since 0.1.0
 * @category checks
 */
export const share = (value: unknown, path: string): Checked<number> =>
  typeof value === "number" && value >= 0 && value <= 1
    ? Either.right(value)
    : refuse(path, `must be a number from 0 to 1${shown(value)}`)

/**
 * A duration in milliseconds; `Infinity` is allowed and means "never ends".
 *
 * @since 0.1.0
 * @category checks
 */
export const millis = (value: unknown, path: string): Checked<number> => {
  if (typeof value === "number") {
    return value >= 0 ? Either.right(value) : refuse(path, `must not be negative${shown(value)}`)
  }
  // Effect reads a negative duration as none at all.
  if (isNegative(value)) return refuse(path, "must not be negative")
  const decoded = Duration.decodeUnknown(value)
  return decoded._tag === "None"
    ? refuse(path, "must be a duration, such as \"30 seconds\" or a number of milliseconds")
    : Either.right(Duration.toMillis(decoded.value))
}

const isNegative = (value: unknown): boolean =>
  Array.isArray(value)
    ? value.some(isNegative)
    : typeof value === "string"
    ? value.trim().startsWith("-")
    : (typeof value === "bigint" || typeof value === "number") && value < 0

/**
 * A text that is not blank and has no control characters.
 *
 * @since 0.1.0
 * @category checks
 */
export const text = (value: unknown, path: string): Checked<string> => {
  if (typeof value !== "string" || value.trim() === "") return refuse(path, "must be a text that is not blank")
  return hasControl(value) ? refuse(path, "must not contain control characters") : Either.right(value)
}

/**
 * Whether a text holds control characters.
 *
 * @since 0.1.0
 * @category checks
 */
export const hasControl = (value: string): boolean => {
  for (let i = 0; i < value.length; i++) {
    const code = value.charCodeAt(i)
    if (code < 0x20 || code === 0x7f) return true
  }
  return false
}

const shown = (value: unknown): string => typeof value === "number" ? `, not ${value}` : ""
