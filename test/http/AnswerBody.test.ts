import { assert, describe, it } from "@effect/vitest"
import * as AnswerBody from "../../src/http/AnswerBody.js"

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

describe("a body that is overheard", () => {
  it("S4: passes chunk by chunk, only when asked, and is told before its reader knows the end", async () => {
    const text = "{\"id\":\"größe\"}"
    const bytes = encoder.encode(text)
    // Cut inside a character.
    const chunks = [bytes.slice(0, 9), bytes.slice(9)]
    const { seen, stream } = body(chunks)
    const told: Array<string> = []
    const reader = AnswerBody.overheard(stream, (text) => told.push(text)).getReader()
    assert.strictEqual(seen.pulled, 0)
    assert.deepStrictEqual((await reader.read()).value, chunks[0])
    assert.strictEqual(seen.pulled, 1)
    assert.deepStrictEqual((await reader.read()).value, chunks[1])
    assert.deepStrictEqual(told, [])
    assert.isTrue((await reader.read()).done)
    assert.deepStrictEqual(told, [text])
  })

  it("is told once of a long one, as far as it was kept, and all of it passes", async () => {
    const chunks = Array.from({ length: 10 }, (_, i) => encoder.encode(String(i).repeat(10)))
    const { stream } = body(chunks)
    const told: Array<string> = []
    const all = await new Response(AnswerBody.overheard(stream, (text) => told.push(text), 25)).text()
    assert.strictEqual(all, chunks.map((chunk) => decoder.decode(chunk)).join(""))
    assert.deepStrictEqual(told.map((text) => text.length), [30])
  })

  it("is told of one that is left, which is let go of", async () => {
    const { seen, stream } = body([encoder.encode("one"), encoder.encode("two")])
    const told: Array<string> = []
    const reader = AnswerBody.overheard(stream, (text) => told.push(text)).getReader()
    await reader.read()
    await reader.cancel()
    assert.isTrue(seen.cancelled)
    assert.deepStrictEqual(told, ["one"])
  })

  it("fails as the body does", async () => {
    const failing = new ReadableStream<Uint8Array>({ pull: (controller) => controller.error(new Error("cut")) })
    const overheard = AnswerBody.overheard(failing, () => assert.fail("nothing to tell"))
    const error = await new Response(overheard).text().catch((error: unknown) => error)
    assert.include(String(error), "cut")
  })
})
