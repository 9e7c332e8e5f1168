import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as RequestBody from "../../src/http/RequestBody.js"

describe("isReusable", () => {
  it("texts, bytes, forms and blobs can be sent again; streams and iterators cannot", () => {
    const reusable = [
      undefined,
      null,
      "",
      "text",
      new ArrayBuffer(2),
      new Uint8Array(2),
      new DataView(new ArrayBuffer(2)),
      Buffer.from("x"),
      new URLSearchParams("a=1"),
      new FormData(),
      new Blob(["x"])
    ]
    const once = [
      new ReadableStream(),
      (async function*() {})(),
      [new Uint8Array(1)][Symbol.iterator](),
      { [Symbol.asyncIterator]: () => ({}) },
      {}
    ]
    assert.deepStrictEqual(reusable.map(RequestBody.isReusable), reusable.map(() => true))
    assert.deepStrictEqual(once.map(RequestBody.isReusable), once.map(() => false))
  })
})

const names = ["model", "stream", "background"]

const plain = FastCheck.oneof(
  FastCheck.string({ unit: "binary" }),
  FastCheck.constantFrom("\\", "\"", "\\\"", "}", "{\"model\":\"inner\"}", "a,b", ""),
  FastCheck.double({ noNaN: true, noDefaultInfinity: true }),
  FastCheck.boolean(),
  FastCheck.constant(null)
)

/** Objects that have some of the names, at the top level and below. */
const objects = FastCheck.array(
  FastCheck.tuple(
    FastCheck.oneof(FastCheck.constantFrom(...names), FastCheck.string()),
    FastCheck.oneof(plain, FastCheck.jsonValue(), FastCheck.record({ model: plain, stream: plain }))
  ),
  { maxLength: 8 }
).map((entries) => Object.fromEntries(entries))

describe("topLevel", () => {
  it.prop("it reads what JSON.parse reads, with any spaces", [objects, FastCheck.constantFrom(undefined, 1, "\t")], (
    [object, space]
  ) => {
    const json = JSON.stringify(object, undefined, space)
    const parsed: Record<string, unknown> = JSON.parse(json)
    const expected = Object.fromEntries(
      names.flatMap((name) =>
        Object.hasOwn(parsed, name) && (typeof parsed[name] !== "object" || parsed[name] === null)
          ? [[name, parsed[name]]]
          : []
      )
    )
    assert.deepStrictEqual(RequestBody.topLevel(json, names), expected)
  }, { fastCheck: { numRuns: 500 }, timeout: 60_000 })

  it.prop("whatever the text, it neither throws nor hangs", [FastCheck.string({ unit: "binary" }), objects], (
    [text, object]
  ) => {
    const json = JSON.stringify(object)
    const cut = text.length % (json.length + 1)
    for (const input of [text, json.slice(0, cut) + text, text + json, json.slice(0, cut)]) {
      assert.isObject(RequestBody.topLevel(input, names))
    }
  }, { fastCheck: { numRuns: 500 }, timeout: 60_000 })

  it("the last of two fields of one name counts, as in JSON.parse; what is no object has none", () => {
    assert.deepStrictEqual(RequestBody.topLevel("{\"model\":\"a\",\"model\":\"b\"}", names), { model: "b" })
    for (const json of ["", "[]", "[{\"model\":\"a\"}]", "\"model\"", "null", "{", "{\"model\"", "{\"model\":", "{1"]) {
      assert.deepStrictEqual(RequestBody.topLevel(json, names), {}, json)
    }
    assert.deepStrictEqual(RequestBody.topLevel("{\"model\":nope,\"stream\":true}", names), {})
  })

  it("only the names that were asked for are read", () => {
    assert.deepStrictEqual(RequestBody.topLevel("{\"model\":\"a\",\"user\":\"b\"}", ["user"]), { user: "b" })
  })
})
