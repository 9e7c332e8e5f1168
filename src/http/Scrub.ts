/**
 * Takes a secret out of what an upstream says, in every form in which it could be echoed.
 *
 * @since 0.1.0
 */

/**
 * What stands in the place of a secret.
 *
 * @since 0.1.0
 * @category getters
 */
export const placeholder = "[redacted]"

/**
 * The forms of a secret: plain, and as in a URL.
 *
 * @since 0.1.0
 * @category getters
 */
export const forms = (secret: string): ReadonlyArray<string> => [
  ...new Set([secret, encodeURIComponent(secret), new URLSearchParams({ "": secret }).toString().slice(1)])
]

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
    if (!(value instanceof Error)) return typeof value === "object" && value !== null ? undefined : value
    if (levels === 0) return undefined
    // A copy of the same kind, so that SDKs recognise it; only what is known to be harmless is taken over.
    const clean: Error = Object.create(Object.getPrototypeOf(value))
    const define = (name: string, content: unknown) =>
      Object.defineProperty(clean, name, { value: content, enumerable: false, configurable: true, writable: true })
    define("message", scrub(value.message))
    define("stack", scrub(value.stack ?? ""))
    for (const name of ["name", "code", "errno", "syscall"] as const) {
      const content: unknown = Object.getOwnPropertyDescriptor(value, name)?.value
      if (typeof content === "string") define(name, scrub(content))
      else if (typeof content === "number") define(name, content)
    }
    if (value.cause !== undefined) define("cause", copy(value.cause, levels - 1))
    return clean
  }
  return (value: unknown): unknown => copy(value, 6)
}
