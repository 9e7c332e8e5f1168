import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import { setTimeout } from "node:timers/promises"
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import type OpenAI from "openai"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type * as OpenAi from "../../src/providers/OpenAi.js"
import {
  a,
  asked,
  atOnce,
  b,
  bare,
  both,
  chat,
  chatStream,
  drained,
  inFlight,
  live,
  model,
  once,
  said,
  service,
  textIn,
  until
} from "../support/openai.js"

setFlagsFromString("--expose-gc")
const gc: () => void = runInNewContext("gc")

const free = (openai: OpenAi.Service) => until(Effect.map(inFlight(openai), (count) => count === 0))

const sse = (body: string | AsyncIterable<Uint8Array>) => ({
  status: 200,
  headers: { "content-type": "text/event-stream" },
  body
})

const delta = (content: string): string =>
  `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content }, finish_reason: null }] })}\n\n`

const bytes = (text: string) => new TextEncoder().encode(text)

const next = (iterator: AsyncIterator<OpenAI.ChatCompletionChunk>) => Effect.promise(() => iterator.next())

describe("S1: the lease of a stream", () => {
  live("S1: it is held until the end", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { chunkDelayMs: 5 } } })
      const seen: Array<number> = []
      yield* Effect.promise(async () => {
        for await (const _ of await chatStream(openai.client)) seen.push(await Effect.runPromise(inFlight(openai)))
      })
      // The terminator that follows the last chunk has not been read when that is seen.
      assert.deepStrictEqual(seen, seen.map(() => 1))
      assert.strictEqual(yield* inFlight(openai), 0)
      assert.deepInclude((yield* openai.pool.snapshot).keys[0], { successes: 1, faults: 0, ignored: 0 })
    }))

  live("S1: its body is cancelled", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { stallAfter: 2 } } })
      const response = yield* Effect.promise(() => chatStream(openai.client).asResponse())
      assert.strictEqual(yield* inFlight(openai), 1)
      yield* Effect.promise(async () => response.body?.cancel())
      assert.strictEqual(yield* inFlight(openai), 0)
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live("S1: nobody has it any more", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { stallAfter: 2 } } })
      yield* Effect.promise(() => chatStream(openai.client).then(() => undefined))
      assert.strictEqual(yield* inFlight(openai), 1)
      yield* until(Effect.sync(gc).pipe(Effect.zipRight(inFlight(openai)), Effect.map((count) => count === 0)))
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live(
    "S1: somebody who has it and reads it is not robbed of it by the garbage collector",
    () =>
      Effect.gen(function*() {
        const { openai } = yield* both("a", { keys: { [a]: { chunkDelayMs: 10 } } })
        const { error, items } = yield* Effect.promise(() =>
          drained(async function*() {
            for await (const chunk of await chatStream(openai.client)) {
              gc()
              await setTimeout(0)
              yield chunk
            }
          })
        )
        assert.strictEqual(error, undefined)
        assert.strictEqual(textIn(items), said)
      })
  )

  live("S1: it goes unread for too long; what is left can still be read", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", {}, { streamIdle: 50 })
      const stream = yield* Effect.promise(() => chatStream(openai.client))
      assert.strictEqual(yield* inFlight(openai), 1)
      yield* free(openai)
      const { error, items } = yield* Effect.promise(() => drained(() => stream))
      assert.strictEqual(error, undefined)
      assert.strictEqual(textIn(items), said)
      assert.strictEqual(yield* inFlight(openai), 0)
    }))

  live("S1: a reader that waits for the upstream is not idle", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { chunkDelayMs: 150 } } }, { streamIdle: 100 })
      const held: Array<number> = []
      yield* Effect.promise(async () => {
        for await (const chunk of await chatStream(openai.client)) {
          held.push(await Effect.runPromise(inFlight(openai)))
          if (textIn([chunk]) === "good ") break
        }
      })
      assert.deepStrictEqual(held, [1, 1, 1, 1])
    }))

  live("S1: an answer that is no stream frees it at its headers, read or not", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const response = yield* Effect.promise(() => chat(openai.client).asResponse())
      assert.strictEqual(yield* inFlight(openai), 0)
      assert.isFalse(response.bodyUsed)
    }))
})

describe("S2: before the first content", () => {
  for (const as of ["server", "overloaded", "rateLimited", "quota"] as const) {
    live(
      `S2: an error (${as}) is failed over silently; the consumer sees one clean stream`,
      () =>
        Effect.gen(function*() {
          const plain = yield* FakeOpenAi.make()
          // The ids of the second answer, as the second of a server.
          yield* Effect.promise(() => drained(() => chatStream(bare(plain))))
          const expected = yield* Effect.promise(() => drained(() => chatStream(bare(plain))))
          const { fake, openai } = yield* both("ab", { keys: { [a]: { streamError: { after: 0, as } } } }, atOnce(3))
          const actual = yield* Effect.promise(() => drained(() => chatStream(openai.client)))
          const timeless = ({ items }: typeof actual) => items.map((chunk) => ({ ...chunk, created: 0 }))
          assert.deepStrictEqual(timeless(actual), timeless(expected))
          assert.strictEqual(actual.error, undefined)
          assert.strictEqual(yield* asked(fake), "ab")
          assert.strictEqual(yield* inFlight(openai), 0)
          yield* fake.idle

          const responses = yield* both("ab", { keys: { [a]: { streamError: { after: 0, as } } } }, atOnce(3))
          const events = yield* Effect.promise(() =>
            drained(async () => responses.openai.client.responses.create({ model, input: "hi", stream: true }))
          )
          assert.deepStrictEqual(
            events.items.map(({ type }) => type).filter((type) => /created|failed|error|completed/.test(type)),
            ["response.created", "response.completed"]
          )
          assert.strictEqual(yield* asked(responses.fake), "ab")
        })
    )
  }

  live(
    "S2: so are an answer that is an error although its status is 200, an empty one, and a broken one",
    () =>
      Effect.gen(function*() {
        const error = JSON.stringify({ error: { message: "busy", type: "server_error", code: null, param: null } })
        const answers = [
          { status: 200, headers: { "content-type": "application/json" }, body: error },
          sse(""),
          sse(": ping\n\n"),
          { cutAfter: 0 },
          { status: 500, headers: { "content-type": "text/event-stream" }, body: `data: ${error}\n\n` }
        ]
        for (const answer of answers) {
          const { fake, openai } = yield* both("ab", {}, atOnce(3))
          yield* fake.script(a, [answer])
          const { items } = yield* Effect.promise(() => drained(() => chatStream(openai.client)))
          assert.strictEqual(textIn(items), said)
          assert.strictEqual(yield* asked(fake), "ab")
        }
      })
  )

  live("S2: an answer in JSON to a request for a stream passes as it is", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab")
      const body = JSON.stringify({ choices: [], error: null })
      yield* fake.script(a, [{ status: 200, headers: { "content-type": "application/json" }, body }])
      const response = yield* Effect.promise(() => chatStream(openai.client).asResponse())
      assert.strictEqual(yield* Effect.promise(() => response.text()), body)
    }))

  live(
    "S2: what comes before the content is held back for a quarter of the announced timeout at most",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", {}, { hold: { millis: 3_600_000, events: Infinity } })
        const body = async function*() {
          for (;;) {
            yield bytes(": ping\n\n")
            await setTimeout(50)
          }
        }
        yield* fake.script(a, [sse(body())])
        const response = yield* Effect.promise(() => chatStream(openai.client, { timeout: 2_000 }).asResponse())
        const reader = response.body?.getReader()
        const first = yield* Effect.promise(async () => reader?.read())
        assert.match(new TextDecoder().decode(first?.value), /^: ping/)
        yield* Effect.promise(async () => reader?.cancel())
        yield* fake.idle
        assert.strictEqual(yield* asked(fake), "a")
      })
  )
})

describe("S3: after the first content", () => {
  live("S3: a stream that lacks its terminator ends, and the pool knows that it was cut", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", {}, once)
      yield* fake.script(a, [sse(delta("one ") + delta("two"))])
      const { error, items } = yield* Effect.promise(() => drained(() => chatStream(openai.client)))
      assert.strictEqual(error, undefined)
      assert.strictEqual(textIn(items), "one two")
      assert.deepInclude((yield* openai.pool.snapshot).keys[0], { successes: 1, faults: 1, inFlight: 0 })
    }))

  live("S3: an error costs its key as any other does, and none is sent again", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both(
        "ab",
        { keys: { [a]: { streamError: { after: 1, as: "quota" } } } },
        atOnce(3)
      )
      const { error, items } = yield* Effect.promise(() => drained(() => chatStream(openai.client)))
      assert.strictEqual(textIn(items), "You ")
      assert.strictEqual(Reflect.get(Object(error), "code"), "insufficient_quota")
      const { keys } = yield* openai.pool.snapshot
      assert.deepInclude(keys[0]?.closed, { fault: "QuotaExhausted" })
      yield* openai.use((client) => chat(client))
      yield* openai.use((client) => chat(client))
      assert.strictEqual(yield* asked(fake), "abb")
    }))

  live("S3: a Responses stream that fails is one for the pool, too", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", {}, once)
      const event = (type: string, more: object) => `event: ${type}\ndata: ${JSON.stringify({ type, ...more })}\n\n`
      const failed = { status: "failed", error: { code: "server_error", message: "The server had an error" } }
      yield* fake.script(a, [sse(
        event("response.output_text.delta", { delta: "one" }) +
          event("response.failed", { response: failed })
      )])
      const { items } = yield* Effect.promise(() =>
        drained(async () => openai.client.responses.create({ model, input: "one two", stream: true }))
      )
      assert.strictEqual(items.at(-1)?.type, "response.failed")
      const { keys } = yield* openai.pool.snapshot
      assert.deepInclude(keys[0], { successes: 1, faults: 1, inFlight: 0 })
    }))
})

describe("S4: as it arrives", () => {
  live("S4: the first chunk is there before the last is sent", () =>
    Effect.gen(function*() {
      let release = () => {}
      const released = new Promise<void>((resolve) => {
        release = resolve
      })
      const body = async function*() {
        yield bytes(delta("one "))
        await released
        yield bytes(delta("two") + "data: [DONE]\n\n")
      }
      const { fake, openai } = yield* both("a")
      yield* fake.script(a, [sse(body())])
      const stream = yield* Effect.promise(() => chatStream(openai.client))
      const iterator = stream[Symbol.asyncIterator]()
      assert.strictEqual((yield* next(iterator)).value?.choices[0]?.delta.content, "one ")
      const second = yield* Effect.fork(next(iterator))
      yield* Effect.sleep(10)
      assert.isTrue((yield* Fiber.poll(second))._tag === "None")
      release()
      assert.strictEqual((yield* Fiber.join(second)).value?.choices[0]?.delta.content, "two")
      assert.isTrue((yield* next(iterator)).done)
    }))

  live("S4: part of an event passes, too", () =>
    Effect.gen(function*() {
      let release = () => {}
      const released = new Promise<void>((resolve) => {
        release = resolve
      })
      const body = async function*() {
        yield bytes(delta("one ") + "data: {\"choi")
        await released
        yield bytes("ces\":[]}\n\ndata: [DONE]\n\n")
      }
      const { fake, openai } = yield* both("a")
      yield* fake.script(a, [sse(body())])
      const response = yield* Effect.promise(() => chatStream(openai.client).asResponse())
      const reader = response.body?.getReader()
      const first = yield* Effect.promise(async () => reader?.read())
      assert.strictEqual(new TextDecoder().decode(first?.value), delta("one ") + "data: {\"choi")
      release()
      yield* Effect.promise(async () => reader?.cancel())
    }))

  live("S4: a server whose consumer does not read is not drained", () =>
    Effect.gen(function*() {
      let sent = 0
      const total = 2_000
      const large = bytes(delta("x".repeat(64 * 1024)))
      const body = async function*() {
        while (sent < total) {
          sent++
          yield large
        }
        yield bytes("data: [DONE]\n\n")
      }
      const { fake, openai } = yield* both("a")
      yield* fake.script(a, [sse(body())])
      const stream = yield* Effect.promise(() => chatStream(openai.client))
      const iterator = stream[Symbol.asyncIterator]()
      yield* next(iterator)
      const still = Effect.gen(function*() {
        const before = sent
        yield* Effect.sleep(150)
        return sent === before
      })
      yield* until(still)
      assert.isBelow(sent, total / 2)
      for (let step = yield* next(iterator); step.done !== true;) step = yield* next(iterator)
      assert.strictEqual(sent, total)
      yield* free(openai)
    }))

  live("S4: two streams at once do not hold each other up", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("ab", { keys: { [a]: { stallAfter: 1 }, [b]: {} } })
      const stalled = yield* Effect.promise(() => chatStream(openai.client))
      const { items } = yield* Effect.promise(() => drained(() => chatStream(openai.client)))
      assert.strictEqual(textIn(items), said)
      assert.strictEqual(yield* inFlight(openai), 1)
      stalled.controller.abort()
      yield* Effect.promise(() => drained(() => stalled))
      yield* free(openai)
    }))
})

describe("a service that is made twice", () => {
  live("each has its own pool", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const [one, two] = [yield* service(fake, "a"), yield* service(fake, "b")]
      yield* Effect.promise(() => drained(() => chatStream(one.client)))
      assert.strictEqual((yield* one.pool.snapshot).attempts, 1)
      assert.strictEqual((yield* two.pool.snapshot).attempts, 0)
    }))
})
