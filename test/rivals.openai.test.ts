/** What others get wrong, or do not do at all; the numbers are those of a list of defects that were measured. */
import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import OpenAI from "openai"
import * as FakeOpenAi from "../examples/support/FakeOpenAi.js"
import { a, asked, both, chat, failure, live, messages, model, once, said, service, until } from "./support/openai.js"

describe("rivals", () => {
  live(
    "rivals 7: an abort of the user is not tried on every key, and counts against none",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("abc", { keys: { "*": { hang: true } } }, once)
        const controller = new AbortController()
        const answer = yield* Effect.fork(
          failure(() => chat(openai.client, { signal: controller.signal, timeout: 60_000 }))
        )
        yield* fake.waitForRequests(1)
        controller.abort()
        assert.instanceOf(yield* answer, OpenAI.APIUserAbortError)
        yield* fake.idle
        const { attempts, keys } = yield* openai.pool.snapshot
        assert.deepStrictEqual(keys.map(({ faults }) => faults), [0, 0, 0])
        assert.deepInclude(keys[0], { ignored: 1, inFlight: 0 })
        assert.strictEqual(attempts, 1)
        assert.strictEqual(yield* asked(fake), "a")
        // And a signal does not switch the timeout off.
        const late = yield* failure(() => chat(openai.client, { signal: new AbortController().signal, timeout: 100 }))
        assert.instanceOf(late, OpenAI.APIConnectionTimeoutError)
      })
  )

  live(
    "rivals 8: an absolute URL given as a path does not carry a key to another origin",
    () =>
      Effect.gen(function*() {
        const foreign = yield* FakeOpenAi.make()
        const { fake, openai } = yield* both("a")
        yield* failure(() => openai.client.post(`${foreign.origin}/v1/chat/completions`, { body: { model, messages } }))
        assert.strictEqual((yield* foreign.requests).length, 1)
        assert.notInclude(JSON.stringify(yield* foreign.requests), a)
        assert.deepStrictEqual(yield* fake.requests, [])
      })
  )

  live("rivals 12: a key that the upstream echoes is in no error and no event", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { echo: true, refuse: "region" } } })
      const plain = yield* failure(() => chat(openai.client))
      const typed = yield* Effect.flip(openai.use((client) => chat(client)))
      assert.instanceOf(plain, OpenAI.PermissionDeniedError)
      for (const error of [plain, typed]) {
        assert.include(`${JSON.stringify(error)} ${String(error)}`, "[redacted]")
        assert.notInclude(`${JSON.stringify(error)} ${String(error)} ${error instanceof Error ? error.stack : ""}`, a)
      }
    }))

  live("rivals 13: the SDK's methods stay what they are", () =>
    Effect.gen(function*() {
      const { openai: { client } } = yield* both("a")
      const stream = client.chat.completions.stream({ model, messages })
      assert.notInstanceOf(stream, Promise)
      assert.strictEqual(yield* Effect.promise(() => stream.finalContent()), said)
      const answer = chat(client)
      assert.isFunction(answer.withResponse)
      assert.strictEqual((yield* Effect.promise(() => answer.withResponse())).response.status, 200)
      const ids: Array<string> = []
      yield* Effect.promise(async () => {
        for await (const { id } of client.models.list()) ids.push(id)
      })
      assert.include(ids, model)
      assert.instanceOf(client, OpenAI)
    }))

  live(
    "rivals 14: two keys without quota are two requests, whatever the SDK's own retries are set to",
    () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make({ keys: { "*": { refuse: "quota" } } })
        const openai = yield* service(fake, "ab", {
          client: (fetch) => new OpenAI({ apiKey: "unused", baseURL: fake.baseUrl, maxRetries: 2, fetch }),
          budget: 1_000
        })
        assert.instanceOf(yield* failure(() => chat(openai.client)), OpenAI.RateLimitError)
        assert.strictEqual(yield* asked(fake), "ab")
      })
  )

  live("rivals 15: a refused connection is left for another key", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const gone = yield* Effect.scoped(Effect.map(FakeOpenAi.make(), ({ baseUrl }) => baseUrl))
      const openai = yield* service(fake, "", {
        keys: [{ secret: a, baseUrl: gone }, { secret: "sk-healthy-000", baseUrl: fake.baseUrl }]
      })
      assert.strictEqual((yield* Effect.promise(() => chat(openai.client))).choices[0]?.message.content, said)
      yield* until(Effect.map(openai.pool.snapshot, ({ inFlight }) => inFlight === 0))
      assert.deepStrictEqual((yield* openai.pool.snapshot).keys.map(({ faults, successes }) => [faults, successes]), [
        [1, 0],
        [0, 1]
      ])
    }))
})
