import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Stream from "effect/Stream"
import { inspect } from "node:util"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type { Transport } from "../../src/http/Attempt.js"
import * as Scrub from "../../src/http/Scrub.js"
import * as OpenAi from "../../src/providers/OpenAi.js"
import { chat, chatStream, live, once, textIn } from "../support/openai.js"

/** No pattern gives this key away, and it looks different in a URL. */
const secret = "tok/en+odd=0123456789abcdef"

const assertClean = (text: string, what: string): void => {
  for (const form of Scrub.forms(secret)) assert.notInclude(text, form, what)
  // Not even half of it.
  assert.notInclude(text, secret.slice(0, 20), what)
}

describe("K1", () => {
  const contents = "data: {\"choices\":[{\"delta\":{\"content\":\"Grüße\"}}]}\n\n"

  /** A transport that answers with these bytes, cut at each of the places. */
  const inPieces = (text: string, ...cuts: ReadonlyArray<number>): Transport => () => {
    const bytes = new TextEncoder().encode(text)
    const edges = [0, ...cuts, bytes.length]
    const body = new ReadableStream<Uint8Array>({
      pull: (controller) => {
        const from = edges.shift() ?? 0
        if (edges.length === 0) return controller.close()
        controller.enqueue(bytes.slice(from, edges[0]))
      }
    }, { highWaterMark: 0 })
    return Promise.resolve(new Response(body, { headers: { "content-type": "text/event-stream" } }))
  }

  live(
    "K1: an error of a stream is clean wherever its chunks are cut, and else as it was",
    () =>
      Effect.gen(function*() {
        const error = `data: {"error":{"message":"schlüssel ${secret} — ${encodeURIComponent(secret)}","code":"x"}}\n\n`
        const length = new TextEncoder().encode(contents + error).length
        for (let cut = 1; cut < length; cut++) {
          const fetch = inPieces(contents + error, cut)
          const openai = yield* OpenAi.make({ keys: [secret], fetch, ...once })
          const bytes = yield* Effect.promise(() => chatStream(openai.client).asResponse().then((all) => all.text()))
          const clean = bytes.startsWith(contents) ? bytes.slice(contents.length) : bytes
          assert.strictEqual(
            clean,
            `data: {"error":{"message":"schlüssel [redacted] — [redacted]","code":"x"}}\n\n`,
            `cut at ${cut}`
          )
          const exit = yield* Effect.exit(Stream.runDrain(openai.stream((client) => chatStream(client))))
          assert.isTrue(Exit.isFailure(exit))
          assertClean(inspect(exit, { depth: 10, showHidden: true }), `cut at ${cut}`)
        }
      }).pipe(Effect.scoped)
  )

  live("K1: content that holds the key is not altered, wherever its chunks are cut", () =>
    Effect.gen(function*() {
      const text = contents +
        `data: {"choices":[{"delta":{"content":"your key is ${secret}, says \\"error\\""}}]}\n\n` +
        `data: {"choices":[{"delta":{"content":" ${secret.slice(0, 9)}"}}]}\n\ndata: [DONE]\n\n`
      const length = new TextEncoder().encode(text).length
      for (let cut = 1; cut < length; cut++) {
        const openai = yield* OpenAi.make({ keys: [secret], fetch: inPieces(text, cut, Math.min(length, cut + 3)) })
        const bytes = yield* Effect.promise(() => chatStream(openai.client).asResponse().then((all) => all.text()))
        assert.strictEqual(bytes, text, `cut at ${cut}`)
      }
    }).pipe(Effect.scoped))

  live("K1: an answer whose content holds the key is not altered", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ reply: () => `the key is ${secret} !` })
      const openai = yield* OpenAi.make({ keys: [secret], baseUrl: fake.baseUrl })
      const answer = yield* openai.use((client) => chat(client))
      assert.strictEqual(answer.choices[0]?.message.content, `the key is ${secret} !`)
      const chunks = yield* Stream.runCollect(openai.stream((client) => chatStream(client)))
      assert.strictEqual(textIn(chunks), `the key is ${secret} !`)
    }))
})
