import { inspect } from "node:util"

/**
 * All the text that can be got out of a value, however it is printed or looked into: as text, as JSON, by `inspect`,
 * and by walking it, with properties that are not enumerable, getters, symbols, causes, collections and bytes.
 */
export const everything = (value: unknown): string => {
  const texts: Array<string> = [
    attempt(() => String(value)),
    attempt(() => inspect(value, { depth: Infinity, showHidden: true, getters: true })),
    attempt(() => JSON.stringify(value) ?? "")
  ]
  const seen = new Set<object>()
  const walk = (value: unknown): void => {
    if (typeof value === "string") texts.push(value)
    if ((typeof value !== "object" && typeof value !== "function") || value === null || seen.has(value)) return
    if (seen.size > 50_000) throw new Error("too much to look through")
    seen.add(value)
    if (value instanceof Error) texts.push(attempt(() => String(value)), value.stack ?? "")
    if (ArrayBuffer.isView(value)) {
      texts.push(new TextDecoder().decode(value))
      return
    }
    if (value instanceof Map || value instanceof Set || value instanceof Headers || value instanceof URLSearchParams) {
      for (const item of value) walk(item)
    }
    for (const key of Reflect.ownKeys(value)) {
      if (typeof key === "string") texts.push(key)
      walk(read(value, key))
    }
    // Getters of classes (`Response.statusText`, `URL.href`, the messages of tagged errors).
    for (let at = Object.getPrototypeOf(value); isOwnClass(at); at = Object.getPrototypeOf(at)) {
      for (const key of Reflect.ownKeys(at)) {
        if (Object.getOwnPropertyDescriptor(at, key)?.get !== undefined) walk(read(value, key))
      }
    }
  }
  walk(value)
  return texts.join("\n")
}

const isOwnClass = (prototype: unknown): prototype is object =>
  typeof prototype === "object" && prototype !== null && prototype !== Object.prototype

const attempt = (f: () => string): string => {
  try {
    return f()
  } catch {
    return ""
  }
}

const read = (value: object, key: PropertyKey): unknown => {
  try {
    return Reflect.get(value, key)
  } catch {
    return undefined
  }
}
