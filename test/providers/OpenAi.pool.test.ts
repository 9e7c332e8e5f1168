import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as FastCheck from "effect/FastCheck"
import OpenAI, { toFile } from "openai"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as CallOptions from "../../src/CallOptions.js"
import * as Fault from "../../src/Fault.js"
import * as Outcome from "../../src/Outcome.js"
import {
  a,
  asked,
  atOnce,
  b,
  both,
  chat,
  failure,
  inFlight,
  live,
  model,
  once,
  said,
  secretOf,
  service,
  until
} from "../support/openai.js"

const limited = (seconds: number) => ({
  status: 429,
  headers: { "retry-after": `${seconds}`, "content-type": "application/json" },
  body: JSON.stringify({ error: { message: "slow", type: "requests", code: "rate_limit_exceeded", param: null } })
})

const field = (error: unknown, name: string): unknown => Reflect.get(Object(error), name)

const headerOf = (error: unknown, name: string): string | null => {
  const headers = field(error, "headers")
  return headers instanceof Headers ? headers.get(name) : null
}

describe("rotation", () => {
  live(
    "C1: a 429 with Retry-After on one key is answered by another, and rests that key",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab")
        yield* fake.script(a, [limited(60)])
        assert.strictEqual((yield* openai.use((client) => chat(client))).choices[0]?.message.content, said)
        for (let i = 0; i < 3; i++) yield* openai.use((client) => chat(client))
        assert.strictEqual(yield* asked(fake), "abbbb")
        const [first, second] = yield* fake.requests
        assert.isBelow((second?.at ?? 0) - (first?.at ?? 0), 60_000)
        const { at, keys } = yield* openai.pool.snapshot
        assert.deepInclude(keys[0]?.closedModels[0], { model, fault: "RateLimited" })
        assert.isAtMost((keys[0]?.closedModels[0]?.until ?? Infinity) - at, 60_021)
      })
  )

  live("C2: a wait that does not fit into the budget fails at once", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", {}, { budget: 1_000 })
      yield* fake.script(a, [limited(60)])
      const error = yield* failure(() => chat(openai.client))
      assert.instanceOf(error, OpenAI.RateLimitError)
      const failed = yield* Effect.flip(openai.use((client) => chat(client)))
      assert.strictEqual(failed._tag, "AllKeysExhausted")
      if (failed._tag !== "AllKeysExhausted") return
      // Nobody has waited: nearly all of the wait is still to come.
      assert.isAbove((failed.nextAvailableAt ?? 0) - failed.at, 30_000)
      assert.strictEqual((yield* fake.requests).length, 1)
    }))

  for (
    const [name, behaviour] of [
      ["a revoked key", { refuse: "revoked" }],
      ["a spent quota", { refuse: "quota" }],
      ["a forbidden key", { refuse: "forbidden" }],
      ["a refused connection", { reset: true }],
      ["an overloaded provider", { outage: { status: 503 } }],
      ["a server error", { outage: { status: 500 } }],
      ["a page of the gateway", { outage: { status: 502 } }]
    ] as const
  ) {
    live(`${name} is left for a healthy one`, () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
        const answer = yield* Effect.promise(() => chat(openai.client))
        assert.strictEqual(answer.choices[0]?.message.content, said)
        assert.strictEqual(yield* asked(fake), "ab")
        assert.strictEqual(yield* inFlight(openai), 0)
      }))
  }

  live(
    "C8: what never reached the server may be sent again, even if it creates something",
    () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make()
        const gone = yield* Effect.scoped(Effect.map(FakeOpenAi.make(), ({ baseUrl }) => baseUrl))
        const openai = yield* service(fake, "", {
          keys: [{ secret: a, baseUrl: gone }, { secret: b, baseUrl: fake.baseUrl }],
          ...atOnce(3)
        })
        const file = yield* openai.use(async (client) =>
          client.files.create({ file: await toFile(new Uint8Array(4), "x"), purpose: "batch" })
        )
        assert.strictEqual(file.bytes, 4)
        assert.strictEqual(yield* asked(fake), "b")
      })
  )

  live("a key's own base URL is used, path and query kept", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make()
      const other = yield* FakeOpenAi.make()
      const openai = yield* service(fake, "", { keys: [{ secret: a, baseUrl: `${other.origin}/v1` }] })
      yield* Effect.promise(() => openai.client.files.list({ limit: 2 }))
      assert.deepStrictEqual(yield* fake.requests, [])
      assert.deepInclude((yield* other.requests)[0], { path: "/v1/files", query: "limit=2", key: a })
    }))
})

describe("how many attempts", () => {
  const clients = {
    "a client with retries": { maxRetries: 2 },
    "a client without": { maxRetries: 0 }
  }
  for (const [name, { maxRetries }] of Object.entries(clients)) {
    for (
      const [status, labels, expected] of [
        // No retries are granted: one attempt, and one for each key that is left.
        [500, "abc", "a"],
        [503, "abc", "a"],
        [429, "abc", "abc"],
        [401, "abc", "abc"],
        [400, "abc", "a"],
        [404, "abc", "a"],
        [408, "abc", "a"],
        [409, "abc", "a"]
      ] as const
    ) {
      live(`C7: ${status} with ${name} makes the attempts that the policy says`, () =>
        Effect.gen(function*() {
          const fake = yield* FakeOpenAi.make({
            handler: () => ({
              status,
              headers: { "x-should-retry": "true", "retry-after": "3600" },
              body: JSON.stringify({ error: { message: "no", code: null } })
            })
          })
          const openai = yield* service(fake, labels, {
            client: (fetch) => new OpenAI({ apiKey: "x", baseURL: fake.baseUrl, maxRetries, fetch }),
            ...once
          })
          assert.strictEqual(openai.client.maxRetries, 0)
          const error = yield* failure(() => chat(openai.client))
          assert.instanceOf(error, OpenAI.APIError)
          assert.strictEqual(yield* asked(fake), expected)
        }))
    }
  }

  live(
    "C7: retries that a single call asks of the SDK do not multiply those of the pool",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { "*": { outage: { status: 500 } } } }, atOnce(2))
        yield* failure(() => chat(openai.client, { maxRetries: 3 }))
        assert.strictEqual((yield* fake.requests).length, 3)
        const exhausted = yield* both("ab", { keys: { "*": { refuse: "revoked" } } })
        yield* failure(() => chat(exhausted.openai.client, { maxRetries: 3 }))
        assert.strictEqual((yield* exhausted.fake.requests).length, 2)
      })
  )

  live("C7: so it is for streams", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("abc", { keys: { "*": { streamError: { after: 0 } } } }, atOnce(2))
      const stream = yield* Effect.promise(() =>
        openai.client.chat.completions.create({ model, messages: [{ role: "user", content: "hi" }], stream: true })
      )
      yield* failure(async () => {
        for await (const _ of stream);
      })
      assert.strictEqual(yield* asked(fake), "abc")
    }))

  live("C4: a single key is retried, too", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", {}, atOnce(3))
      yield* fake.script(a, [{ outage: { status: 500 } }, { reset: true }])
      yield* openai.use((client) => chat(client))
      assert.strictEqual(yield* asked(fake), "aaa")
    }))
})

describe("C8: replay", () => {
  const upload = async (client: OpenAI, options?: OpenAI.RequestOptions) =>
    client.files.create({ file: await toFile(new TextEncoder().encode("text"), "x"), purpose: "batch" }, options)

  const batch = (client: OpenAI) =>
    client.batches.create({ input_file_id: "file-x", endpoint: "/v1/responses", completion_window: "24h" })

  const background = (client: OpenAI) => client.responses.create({ model, input: "hi", background: true })

  const faults = {
    "500": { outage: { status: 500 } },
    "a reset": { reset: true },
    "504": { outage: { status: 504 } }
  }
  const refusals = {
    "401": { refuse: "revoked" },
    "429": { refuse: "quota" },
    "503": { outage: { status: 503 } }
  } as const

  for (const [name, behaviour] of Object.entries(faults)) {
    for (
      const [what, call] of Object.entries({
        upload,
        batch,
        background,
        remove: (c: OpenAI) => c.files.delete("f")
      })
    ) {
      live(`${what} is not sent again after ${name}`, () =>
        Effect.gen(function*() {
          const { fake, openai } = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
          yield* failure(async () => call(openai.client))
          assert.strictEqual(yield* asked(fake), "a")
        }))
    }

    live(`chat, and a read, are sent again after ${name}`, () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
        yield* Effect.promise(() => chat(openai.client))
        yield* openai.pool.reset((yield* openai.pool.snapshot).keys[0]?.id ?? "")
        yield* until(Effect.map(inFlight(openai), (count) => count === 0))
        yield* Effect.promise(() => openai.client.models.list())
        assert.match(yield* asked(fake), /^ab(ab|b)$/)
      }))

    live(
      `an upload is sent again after ${name} when it carries an idempotency key, or the caller says so`,
      () =>
        Effect.gen(function*() {
          const one = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
          yield* Effect.promise(() => upload(one.openai.client, { headers: { "Idempotency-Key": "1" } }))
          assert.strictEqual(yield* asked(one.fake), "ab")
          const two = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
          yield* two.openai.use((client) => upload(client)).pipe(CallOptions.withOptions({ replayable: true }))
          assert.strictEqual(yield* asked(two.fake), "ab")
        })
    )

    live(`chat is not sent again after ${name} when the caller says so`, () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
        yield* Effect.flip(openai.use((client) => chat(client)).pipe(CallOptions.withOptions({ replayable: false })))
        assert.strictEqual(yield* asked(fake), "a")
      }))
  }

  for (const [name, behaviour] of Object.entries(refusals)) {
    live(`an upload goes elsewhere after ${name}, whole`, () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
        const file = yield* Effect.promise(() => upload(openai.client))
        assert.strictEqual(file.bytes, 4)
        assert.strictEqual(yield* asked(fake), "ab")
      }))

    live(`a body that can be read only once is never sent again, also after ${name}`, () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { [a]: behaviour } }, atOnce(3))
        const body = new ReadableStream<Uint8Array>({
          start: (controller) => {
            controller.enqueue(new TextEncoder().encode("{}"))
            controller.close()
          }
        })
        const error = yield* failure(() => openai.client.post("/chat/completions", { body }))
        assert.instanceOf(error, OpenAI.APIError)
        assert.strictEqual(yield* asked(fake), "a")
      }))
  }
})

describe("C10: what the pool itself has to say", () => {
  live("C10: 401 when all keys are unauthorized", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("ab", { keys: { "*": { refuse: "revoked" } } })
      const error = yield* failure(() => chat(openai.client))
      assert.instanceOf(error, OpenAI.AuthenticationError)
      assert.strictEqual(field(error, "code"), "keymesh_all_keys_unauthorized")
      assert.strictEqual(headerOf(error, "x-should-retry"), "false")
      assert.strictEqual(field(field(error, "error"), "keymesh_id"), headerOf(error, "x-keymesh-id"))
    }))

  live("C10: 401 when all keys that could serve are unauthorized", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { refuse: "revoked" } } }, {
        keys: [a, { secret: b, models: ["another-model"] }]
      })
      assert.instanceOf(yield* failure(() => chat(openai.client)), OpenAI.AuthenticationError)
    }))

  live("C10: 429 with Retry-After when any is limited", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", { keys: { [a]: { refuse: "revoked" } } }, { budget: 10_000 })
      yield* fake.script(b, [limited(60)])
      const error = yield* failure(() => chat(openai.client))
      assert.instanceOf(error, OpenAI.RateLimitError)
      assert.strictEqual(field(error, "code"), "keymesh_all_keys_limited")
      const millis = Number(headerOf(error, "retry-after-ms"))
      assert.strictEqual(headerOf(error, "retry-after"), String(Math.ceil(millis / 1_000)))
      assert.isAtMost(millis, 60_021)
      assert.isAbove(millis, 30_000)
    }))

  live("C10: 503 otherwise", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", {}, { maxWait: 0, floor: false })
      const [key] = (yield* openai.pool.snapshot).keys
      yield* openai.pool.disable(key?.id ?? "")
      const error = yield* failure(() => chat(openai.client))
      assert.instanceOf(error, OpenAI.InternalServerError)
      assert.deepInclude(Object(error), { status: 503, code: "keymesh_all_keys_exhausted" })
      const late = yield* failure(() =>
        Effect.runPromise(openai.use((client) => chat(client)).pipe(CallOptions.withDeadline(0)))
      )
      assert.match(String(late), /No key of pool|deadline/)
    }))

  live("C10: 503 for a deadline and for a budget", () =>
    Effect.gen(function*() {
      const slow = yield* both("a", { keys: { [a]: { hang: true } } }, { deadline: 50 })
      assert.deepInclude(Object(yield* failure(() => chat(slow.openai.client))), {
        status: 503,
        code: "keymesh_deadline_exceeded"
      })
      const down = yield* both("a", { keys: { [a]: { outage: { status: 500 } } } }, { budget: 0 })
      assert.deepInclude(Object(yield* failure(() => chat(down.openai.client))), {
        status: 503,
        code: "keymesh_budget_exceeded"
      })
    }))
})

describe("many at once", () => {
  live(
    "C6: in flight is 0 after any mix of answers, failures, aborts and streams that were left",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("abc", {}, { ...atOnce(2), breaker: { threshold: 1_000 } })
        const behaviours = FastCheck.sample(
          FastCheck.constantFrom<Parameters<typeof fake.set>[1]>(
            {},
            {},
            { outage: { status: 500 } },
            { reset: true },
            { streamError: { after: 0 } },
            { streamError: { after: 2 } },
            { cutAfter: 2 },
            { stallAfter: 2 }
          ),
          { numRuns: 90, seed: 7 }
        )
        yield* Effect.forEach(
          ["a", "b", "c"],
          (label, index) => fake.script(secretOf(label), behaviours.slice(index * 30, index * 30 + 30))
        )
        yield* Effect.forEach(
          Array.from({ length: 40 }, (_, index) => index),
          (index) =>
            Effect.promise(async () => {
              const controller = new AbortController()
              setTimeout(() => controller.abort(), index % 5 === 0 ? index : 500)
              const messages = [{ role: "user" as const, content: "one two three four" }]
              try {
                if (index % 2 === 0) return await chat(openai.client, { signal: controller.signal, timeout: 1_000 })
                const stream = await openai.client.chat.completions.create(
                  { model, messages, stream: true },
                  { signal: controller.signal }
                )
                let left = index % 3 === 0 ? 1 : 3
                for await (const _ of stream) if (left-- === 0) break
              } catch {
                // Any failure will do.
              }
              return undefined
            }),
          { concurrency: 8 }
        )
        yield* until(Effect.map(inFlight(openai), (count) => count === 0))
        yield* fake.idle
        const { keys } = yield* openai.pool.snapshot
        assert.isTrue(keys.every(({ inFlight }) => inFlight === 0))
      })
  )

  live("a key that a program knows to be bad is left at once", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab")
      yield* Effect.scoped(
        Effect.flatMap(openai.pool.lease, (lease) => lease.commit(Outcome.fault(Fault.make("Unauthorized"))))
      )
      yield* Effect.promise(() => chat(openai.client))
      yield* Effect.promise(() => chat(openai.client))
      assert.strictEqual(yield* asked(fake), "bb")
    }))
})
