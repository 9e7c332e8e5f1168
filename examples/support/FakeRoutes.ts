/** What the routes of all fake providers have in common: the shapes of answers and events, and made-up content. */
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import type * as FakeProvider from "./FakeProvider.js"

/** The `:id` in a path that fits the pattern (empty where the pattern has none), else `undefined`. */
export const matched = (pattern: string, path: string): string | undefined => {
  const [wanted, given] = [pattern.split("/"), path.split("/")]
  if (wanted.length !== given.length) return undefined
  if (wanted.some((part, index) => part !== ":id" && part !== given[index])) return undefined
  return given[wanted.indexOf(":id")] ?? ""
}

/** A success. */
export const json = (body: unknown): FakeProvider.Answer => ({ status: 200, body: JSON.stringify(body) })

/** An event of a name. */
export const named = (name: string, value: unknown, content = false): FakeProvider.Frame => ({
  text: `event: ${name}\ndata: ${JSON.stringify(value)}\n\n`,
  content
})

/** The form in a request; `undefined` if there is none. */
export const formOf = ({ bytes, headers }: FakeProvider.Incoming): Effect.Effect<FormData | undefined> =>
  Effect.promise(() =>
    // A copy, because a body may not be memory that is shared with others.
    new Response(new Uint8Array(bytes), { headers: { "content-type": headers["content-type"] ?? "" } })
      .formData().catch(() => undefined)
  )

const SomeSchema = Schema.Struct({
  type: Schema.optional(Schema.Unknown),
  enum: Schema.optional(Schema.Array(Schema.Unknown)),
  items: Schema.optional(Schema.Unknown),
  properties: Schema.optional(Schema.Record({ key: Schema.String, value: Schema.Unknown }))
})

/** A value that matches a simple schema: a JSON schema, or Google's, whose types are in capitals. */
export const sampleOf = (schema: unknown): unknown => {
  const known = Option.getOrElse(Schema.decodeUnknownOption(SomeSchema)(schema), (): typeof SomeSchema.Type => ({}))
  if (known.enum !== undefined) return known.enum[0]
  switch (String(known.type).toLowerCase()) {
    case "string":
      return "text"
    case "number":
    case "integer":
      return 1
    case "boolean":
      return true
    case "null":
      return null
    case "array":
      return [sampleOf(known.items)]
    default:
      return Object.fromEntries(Object.entries(known.properties ?? {}).map(([name, value]) => [name, sampleOf(value)]))
  }
}

/** Words, each with the space behind it. */
export const wordsOf = (text: string): ReadonlyArray<string> => text.match(/\s*\S+\s*/g) ?? []

/** Pieces of a few characters. */
export const piecesOf = (text: string): ReadonlyArray<string> => text.match(/[^]{1,8}/g) ?? []

/** Four characters make about one token. */
export const tokensOf = (text: string): number => Math.ceil(text.length / 4)

/** Numbers in ids have four digits at least. */
export const padded = (count: number): string => `${count}`.padStart(4, "0")
