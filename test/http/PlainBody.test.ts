import { assert, describe, it } from "@effect/vitest"
import * as PlainBody from "../../src/http/PlainBody.js"

const encoder = new TextEncoder()
const decoder = new TextDecoder()

/** A body that gives these chunks as they are asked for, and tells how many were. */
const body = (chunks: ReadonlyArray<Uint8Array>) => {
  const seen = { pulled: 0, cancelled: false }
  const stream = new ReadableStream<Uint8Array>({
    pull: (controller) => {
      const chunk = chunks[seen.pulled++]
      if (chunk === undefined) controller.close()
      else controller.enqueue(chunk)
    },
    cancel: () => {
      seen.cancelled = true
    }
  }, { highWaterMark: 0 })
  return { stream, seen }
}

/** The body watched, and what was told of it. */
const watched = (stream: ReadableStream<Uint8Array>, mostHeard?: number) => {
  const told: Array<string> = []
  const rest = PlainBody.watched(new Response(stream), "secret-a", {
    broken: (fault) => told.push(`broken ${fault.kind}`),
    ended: () => told.push("ended"),
    heard: (text) => told.push(`heard ${text}`),
    mostHeard
  })
  assert.isNotNull(rest)
  return { told, rest }
}

describe("a plain body that is overheard", () => {
  it("S4: passes chunk by chunk, only when asked, and is told before its reader knows the end", async () => {
    const text = "{\"id\":\"größe\"}"
    const bytes = encoder.encode(text)
    // Cut inside a character.
    const chunks = [bytes.slice(0, 9), bytes.slice(9)]
    const { seen, stream } = body(chunks)
    const { rest, told } = watched(stream)
    const reader = rest.getReader()
    assert.strictEqual(seen.pulled, 0)
    assert.deepStrictEqual((await reader.read()).value, chunks[0])
    assert.strictEqual(seen.pulled, 1)
    assert.deepStrictEqual((await reader.read()).value, chunks[1])
    assert.deepStrictEqual(told, [])
    assert.isTrue((await reader.read()).done)
    assert.deepStrictEqual(told, [`heard ${text}`, "ended"])
  })

  it("is told once of a long one, as far as it was kept, and all of it passes", async () => {
    const chunks = Array.from({ length: 10 }, (_, i) => encoder.encode(String(i).repeat(10)))
    const { rest, told } = watched(body(chunks).stream, 25)
    assert.strictEqual(await new Response(rest).text(), chunks.map((chunk) => decoder.decode(chunk)).join(""))
    assert.deepStrictEqual(told.map((text) => text.length), ["heard ".length + 30, "ended".length])
  })

  it("is told of one that is left, which is let go of", async () => {
    const { seen, stream } = body([encoder.encode("one"), encoder.encode("two")])
    const { rest, told } = watched(stream)
    const reader = rest.getReader()
    await reader.read()
    await reader.cancel()
    assert.isTrue(seen.cancelled)
    assert.deepStrictEqual(told, ["heard one", "ended"])
  })

  it("breaks off as the body does, clean of the secret, and nothing of it is told", async () => {
    const failing = new ReadableStream<Uint8Array>({
      pull: (controller) => controller.error(new TypeError("secret-a was cut"))
    })
    const { rest, told } = watched(failing)
    const error = await new Response(rest).text().catch((error: unknown) => error)
    assert.include(String(error), "was cut")
    assert.notInclude(String(error), "secret-a")
    assert.deepStrictEqual(told, ["broken Network", "ended"])
  })
})
