/** The client of `@effect/platform` over a pool, against the fake provider, in real time. */
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as HttpClient from "@effect/platform/HttpClient"
import * as HttpClientError from "@effect/platform/HttpClientError"
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import type * as Tracer from "effect/Tracer"
import { inspect } from "node:util"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as PooledHttpClient from "../../src/http/PooledHttpClient.js"
import * as KeymeshError from "../../src/KeymeshError.js"
import * as KeyPool from "../../src/KeyPool.js"
import { openAi } from "../../src/providers/Providers.js"
import { a, asked, atOnce, b, c, live, messages, model, once, said, secretOf, until } from "../support/openai.js"
import { tracing } from "../support/tracing.js"

interface Setup {
  readonly fake?: FakeOpenAi.Options
  readonly pool?: Partial<KeyPool.Settings>
  readonly options?: PooledHttpClient.Options
  /** What stands below the pool (default: a client over `fetch`). */
  readonly below?: (client: HttpClient.HttpClient) => HttpClient.HttpClient
}

const both = (labels: string, setup: Setup = {}) =>
  Effect.gen(function*() {
    const fake = yield* FakeOpenAi.make(setup.fake)
    const pool = yield* KeyPool.make({
      name: "openai",
      keys: [...labels].map((label) => ({ secret: secretOf(label), label })),
      floor: false,
      cooldowns: { jitter: 0 },
      ...setup.pool
    })
    const plain = yield* Effect.provide(HttpClient.HttpClient, FetchHttpClient.layer)
    const client = (setup.below?.(plain) ?? plain).pipe(PooledHttpClient.pooled(pool, openAi, setup.options))
    return { fake, pool, plain, client, held: Effect.map(pool.snapshot, (snapshot) => snapshot.inFlight) }
  })

const chat = (fake: FakeOpenAi.FakeOpenAi, stream = false) =>
  HttpClientRequest.post(`${fake.baseUrl}/chat/completions`).pipe(
    HttpClientRequest.bodyUnsafeJson({ model, messages, stream })
  )

const textIn = (chunks: Iterable<string>): string =>
  Array.from(chunks).join("").split("\n\n").flatMap((event) => {
    const data = event.startsWith("data: {") ? JSON.parse(event.slice(6)) : undefined
    return data?.choices?.[0]?.delta?.content ?? []
  }).join("")

const contentOf = (response: HttpClientResponse.HttpClientResponse) =>
  Effect.map(response.json, (body) =>
    // What the fake answers.
    (body as { choices: ReadonlyArray<{ message: { content: string } }> }).choices[0]?.message.content)

/** Everything that a value shows of itself, however it is printed. */
const shown = (value: unknown): string =>
  [
    String(value),
    inspect(value, { depth: 20, showHidden: true, getters: true }),
    JSON.stringify(
      value,
      (_, part) => part instanceof Error ? { ...part, text: String(part), stack: part.stack } : part
    )
  ].join("\n")

describe("calls", () => {
  live(
    "rotate: a key that announced that nothing is left is passed over, and the answers are the caller's",
    () =>
      Effect.gen(function*() {
        const { client, fake, held } = yield* both("ab", {
          fake: { keys: { [a]: { limit: { requestsPerMinute: 1, burst: 1 } } } }
        })
        const request = chat(fake)
        const answers = yield* Effect.forEach([1, 2, 3, 4], () => client.execute(request))
        assert.deepStrictEqual(yield* Effect.forEach(answers, contentOf), [said, said, said, said])
        assert.strictEqual(yield* asked(fake), "abbb")
        for (const answer of answers) {
          assert.strictEqual(answer.status, 200)
          assert.isUndefined(answer.request.headers["authorization"])
        }
        assert.strictEqual(yield* held, 0)
      })
  )

  live("the last answer of the provider comes back as an answer, clean of the key", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("a", {
        fake: { keys: { [a]: { outage: { status: 503 }, echo: true } } },
        pool: once
      })
      const response = yield* client.execute(chat(fake))
      assert.strictEqual(response.status, 503)
      const body = yield* response.text
      assert.include(body, "overloaded")
      assert.notInclude(body + JSON.stringify(response.headers), a)
    }))

  live("a bad request comes back as the provider put it, after one attempt", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("ab")
      const response = yield* client.execute(
        HttpClientRequest.post(`${fake.baseUrl}/chat/completions`).pipe(
          HttpClientRequest.bodyUnsafeJson({ messages: 1 })
        )
      )
      assert.strictEqual(response.status, 400)
      assert.strictEqual(yield* asked(fake), "a")
    }))

  live(
    "what the pool gives up on is a RequestError, inside of which its own error is found",
    () =>
      Effect.gen(function*() {
        const { client, fake } = yield* both("ab", {
          fake: { keys: { [a]: { refuse: "revoked" }, [b]: { refuse: "quota" } } }
        })
        const request = chat(fake)
        const error = yield* Effect.flip(client.execute(request))
        assert.instanceOf(error, HttpClientError.RequestError)
        assert.strictEqual(error.request.url, request.url)
        assert.instanceOf(Option.getOrUndefined(KeymeshError.find(error)), KeymeshError.AllKeysExhausted)
        assert.instanceOf(
          Option.getOrUndefined(KeymeshError.find(new Error("outer", { cause: error }))),
          KeymeshError.AllKeysExhausted
        )

        const tagged = yield* PooledHttpClient.withPoolErrors(client).execute(request).pipe(
          Effect.catchTag("AllKeysExhausted", ({ reasonCounts }) => Effect.succeed(reasonCounts))
        )
        assert.deepStrictEqual(tagged, { Unauthorized: 1, QuotaExhausted: 1 })
      })
  )

  live(
    "C8: what creates something is not repeated after an ambiguous fault; refused, it goes on",
    () =>
      Effect.gen(function*() {
        const { client, fake } = yield* both("ab", {
          fake: { keys: { [a]: { outage: { status: 500 } } } },
          pool: atOnce(3)
        })
        const file = HttpClientRequest.post(`${fake.baseUrl}/batches`).pipe(HttpClientRequest.bodyUnsafeJson({}))
        assert.strictEqual((yield* client.execute(file)).status, 500)
        assert.strictEqual(yield* asked(fake), "a")
        yield* fake.set(b, { refuse: "revoked" })
        yield* fake.set(a, {})
        assert.strictEqual((yield* client.execute(file)).status, 400)
        assert.strictEqual(yield* asked(fake), "aba")
      })
  )

  live("C8: a body that is a stream is sent once, even when refused", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("ab", { fake: { keys: { [a]: { refuse: "revoked" } } } })
      const json = new TextEncoder().encode(JSON.stringify({ model, messages }))
      const request = HttpClientRequest.post(`${fake.baseUrl}/chat/completions`).pipe(
        HttpClientRequest.bodyStream(Stream.make(json), { contentType: "application/json" })
      )
      assert.strictEqual((yield* client.execute(request)).status, 401)
      assert.strictEqual(yield* contentOf(yield* client.execute(request)), said)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("a form is sent again", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("ab", { fake: { keys: { [a]: { refuse: "revoked" } } } })
      const form = new FormData()
      form.set("file", new File(["words"], "words.wav"))
      form.set("model", "whisper-1")
      const request = HttpClientRequest.post(`${fake.baseUrl}/audio/transcriptions`).pipe(
        HttpClientRequest.bodyFormData(form)
      )
      assert.strictEqual((yield* client.execute(request)).status, 200)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("a connection that breaks is retried with another key", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("ab", { fake: { keys: { [a]: { reset: true } } }, pool: atOnce(2) })
      assert.strictEqual(yield* contentOf(yield* client.execute(chat(fake))), said)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("a client below that filters by status changes nothing", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("ab", {
        fake: { keys: { [a]: { refuse: "revoked" } } },
        below: HttpClient.filterStatusOk
      })
      assert.strictEqual(yield* contentOf(yield* client.execute(chat(fake))), said)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("a request that cannot be sent says nothing of the key", () =>
    Effect.gen(function*() {
      const { client, fake, pool } = yield* both("ab", {
        below: HttpClient.transform((_, request) =>
          new HttpClientError.RequestError({
            request,
            reason: "Encode",
            description: `no ${request.headers["authorization"]}`
          })
        )
      })
      const error = yield* Effect.flip(client.execute(chat(fake)))
      assert.deepStrictEqual([error._tag, error.reason], ["RequestError", "Encode"])
      assert.notInclude(shown(error), a)
      const { attempts, keys } = yield* pool.snapshot
      assert.strictEqual(attempts, 1)
      assert.isTrue(keys.every((key) => key.faults === 0))
    }))

  live("a defect below stays one, and frees the key", () =>
    Effect.gen(function*() {
      const { client, fake, held } = yield* both("ab", {
        below: HttpClient.transformResponse(() => Effect.die(new Error("bug")))
      })
      const exit = yield* Effect.exit(client.execute(chat(fake)))
      assert.isTrue(Exit.isFailure(exit) && Cause.isDie(exit.cause))
      assert.strictEqual(yield* held, 0)
    }))

  live("C5: interruption aborts the request and frees the key", () =>
    Effect.gen(function*() {
      const { client, fake, held, pool } = yield* both("a", { fake: { keys: { [a]: { hang: true } } } })
      const fiber = yield* Effect.fork(client.execute(chat(fake)))
      yield* fake.waitForRequests(1)
      assert.strictEqual(yield* held, 1)
      yield* Fiber.interrupt(fiber)
      yield* fake.idle
      assert.strictEqual(yield* held, 0)
      assert.isTrue((yield* fake.requests)[0]?.aborted)
      assert.strictEqual((yield* pool.snapshot).keys[0]?.faults, 0)
    }))
})

describe("streams", () => {
  live("S2: an error before the first content goes on with another key, unseen", () =>
    Effect.gen(function*() {
      const { client, fake, held } = yield* both("ab", {
        fake: { keys: { [a]: { streamError: { after: 0, as: "overloaded" } } } },
        pool: atOnce(2)
      })
      const response = yield* client.execute(chat(fake, true))
      assert.isUndefined(response.headers["x-keymesh-id"])
      assert.strictEqual(yield* held, 1)
      const chunks = yield* response.stream.pipe(Stream.decodeText(), Stream.runCollect)
      assert.strictEqual(textIn(chunks), said)
      assert.strictEqual(yield* asked(fake), "ab")
      yield* until(Effect.map(held, (n) => n === 0))
    }))

  live(
    "S4: chunks pass as they arrive; S1: the lease ends with the body, also when it is left early",
    () =>
      Effect.gen(function*() {
        const { client, fake, held } = yield* both("a", { fake: { keys: { [a]: { chunkDelayMs: 20 } } } })
        const chunks = yield* HttpClientResponse.stream(client.execute(chat(fake, true))).pipe(
          Stream.mapEffect((chunk) => Effect.map(held, (n) => [chunk.byteLength > 0, n])),
          Stream.runCollect
        )
        assert.isAbove(Chunk.size(chunks), 3)
        assert.isTrue(Chunk.every(chunks, ([, n]) => n === 1))
        yield* until(Effect.map(held, (n) => n === 0))

        yield* HttpClientResponse.stream(client.execute(chat(fake, true))).pipe(Stream.take(1), Stream.runDrain)
        yield* until(Effect.map(held, (n) => n === 0))
        yield* fake.idle
        assert.isTrue((yield* fake.requests)[1]?.aborted)
      })
  )

  live("S1: a stream that was never read ends with its scope", () =>
    Effect.gen(function*() {
      const { client, fake, held } = yield* both("a", { fake: { keys: { [a]: { stallAfter: 1 } } } })
      yield* Effect.scoped(Effect.zipRight(
        HttpClient.withScope(client).execute(chat(fake, true)),
        Effect.flatMap(held, (n) => Effect.sync(() => assert.strictEqual(n, 1)))
      ))
      yield* until(Effect.map(held, (n) => n === 0))
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live("C5: interrupting the reader of a stalled stream aborts it", () =>
    Effect.gen(function*() {
      const { client, fake, held } = yield* both("a", { fake: { keys: { [a]: { stallAfter: 1 } } } })
      const fiber = yield* Effect.fork(Stream.runDrain(HttpClientResponse.stream(client.execute(chat(fake, true)))))
      yield* fake.waitForRequests(1)
      yield* until(Effect.map(held, (n) => n === 1))
      yield* Fiber.interrupt(fiber)
      yield* until(Effect.map(held, (n) => n === 0))
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live(
    "S3: a stream cut in the middle fails as it would without a pool, and the pool learns of it",
    () =>
      Effect.gen(function*() {
        const { client, fake, held, plain, pool } = yield* both("a", { fake: { keys: { [a]: { cutAfter: 2 } } } })
        const read = (client: HttpClient.HttpClient) =>
          Effect.exit(Stream.runDrain(HttpClientResponse.stream(client.execute(chat(fake, true)))))
        const bare = yield* read(HttpClient.mapRequest(plain, HttpClientRequest.bearerToken(a)))
        const over = yield* read(client)
        const tagOf = (exit: Exit.Exit<void, HttpClientError.HttpClientError>) =>
          Exit.isFailure(exit)
            ? Option.map(Cause.failureOption(exit.cause), ({ _tag, reason }) => [_tag, reason])
            : "ended"
        assert.deepStrictEqual(tagOf(over), tagOf(bare))
        assert.notInclude(shown(over), a)
        yield* until(Effect.map(held, (n) => n === 0))
        yield* until(Effect.map(pool.snapshot, ({ keys }) => keys[0]?.faults === 1))
      })
  )
})

describe("where keys go", () => {
  live("H1: not to another origin, where the request passes without any", () =>
    Effect.gen(function*() {
      const other = yield* FakeOpenAi.make()
      const { client, fake } = yield* both("a", { options: { baseUrl: "https://api.openai.com/v1" } })
      const response = yield* client.execute(HttpClientRequest.bearerToken(chat(other), "sk-own-secret"))
      assert.strictEqual(response.status, 401)
      assert.isUndefined((yield* other.requests)[0]?.key)
      assert.lengthOf(yield* fake.requests, 0)
    }))

  live("H1: not with a redirect to another origin; within the origin it is followed", () =>
    Effect.gen(function*() {
      const other = yield* FakeOpenAi.make()
      const { client, fake } = yield* both("a")
      yield* fake.set(a, { redirect: { to: `${other.baseUrl}/models`, status: 307 } })
      assert.strictEqual((yield* client.get(`${fake.baseUrl}/models`)).status, 307)
      assert.lengthOf(yield* other.requests, 0)
      yield* fake.reset
      yield* fake.script(a, [{ redirect: { to: `${fake.baseUrl}/models/gpt-4o-mini`, status: 302 } }])
      assert.strictEqual((yield* client.get(`${fake.baseUrl}/models`)).status, 200)
    }))

  live("H1: not in the clear", () =>
    Effect.gen(function*() {
      const { client } = yield* both("a")
      const error = yield* Effect.flip(client.get("http://api.example.com/v1/models"))
      assert.deepStrictEqual([error._tag, error.reason], ["RequestError", "InvalidUrl"])
    }))

  live("H2: the credential that the request has is replaced", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("a")
      const request = chat(fake).pipe(
        HttpClientRequest.bearerToken("placeholder"),
        HttpClientRequest.setHeader("api-key", "placeholder")
      )
      yield* client.execute(request)
      const headers = (yield* fake.requests)[0]?.headers ?? {}
      assert.strictEqual(headers["authorization"], `Bearer ${a}`)
      assert.isUndefined(headers["api-key"])
    }))

  live("a key with an address of its own is served there", () =>
    Effect.gen(function*() {
      const other = yield* FakeOpenAi.make()
      const { client } = yield* both("a", {
        pool: { keys: [{ secret: a, baseUrl: other.baseUrl }] },
        options: { baseUrl: "https://api.openai.com/v1" }
      })
      const response = yield* client.get("https://api.openai.com/v1/models?limit=3")
      assert.strictEqual(response.status, 200)
      assert.deepStrictEqual((yield* other.requests).map(({ path, query }) => [path, query]), [[
        "/v1/models",
        "limit=3"
      ]])
    }))
})

describe("K1: the key", () => {
  const spansOf = <A, E, R>(effect: Effect.Effect<A, E, R>) => {
    const { begun: spans, tracer } = tracing()
    return Effect.map(
      Effect.exit(effect.pipe(Effect.withSpan("outer"), Effect.withTracer(tracer))),
      (exit) => ({ exit, spans })
    )
  }
  const attributes = (spans: ReadonlyArray<Tracer.Span>) =>
    spans.map(({ attributes, name }) => `${name} ${JSON.stringify([...attributes])}`).join("\n")

  live(
    "is in no span, though the answer echoes it; one span is the call, and nothing of it goes to the provider",
    () =>
      Effect.gen(function*() {
        const { client, fake } = yield* both("ab", {
          fake: { keys: { [a]: { refuse: "revoked", echo: true }, [b]: { echo: true } } }
        })
        const { spans } = yield* spansOf(
          client.execute(HttpClientRequest.setHeader(chat(fake), "api-key", "sk-own-secret"))
        )
        assert.deepStrictEqual(spans.map(({ name }) => name), ["outer", "http.client POST"])
        const text = attributes(spans)
        for (const secret of [a, b, "sk-own-secret"]) assert.notInclude(text, secret)
        assert.include(text, "http.response.status_code")
        for (const { headers } of yield* fake.requests) {
          assert.isUndefined(headers["traceparent"])
          assert.isUndefined(headers["b3"])
        }
      })
  )

  live("the trace goes to the provider when it is asked for", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("a", { options: { propagateTrace: true } })
      yield* spansOf(client.execute(chat(fake)))
      assert.isDefined((yield* fake.requests)[0]?.headers["traceparent"])
    }))

  live("is in no error, whatever went wrong", () =>
    Effect.gen(function*() {
      const { client, fake } = yield* both("abc", {
        fake: {
          keys: { [a]: { refuse: "revoked", echo: true }, [b]: { reset: true }, [c]: { cutAfter: 1, echo: true } }
        },
        pool: once
      })
      for (let i = 0; i < 4; i++) {
        const exit = yield* Effect.exit(
          client.execute(chat(fake, i % 2 === 1)).pipe(
            Effect.flatMap(HttpClientResponse.filterStatusOk),
            Effect.flatMap((response) => response.text)
          )
        )
        if (Exit.isFailure(exit)) {
          const text = shown(exit) + shown(exit.cause) + Cause.pretty(exit.cause, { renderErrorCause: true })
          for (const secret of [a, b, c]) assert.notInclude(text, secret)
        }
      }
      assert.strictEqual(yield* Effect.map(fake.requests, (requests) => requests.length > 3), true)
    }))
})

describe("the layer", () => {
  live("pools the client of a program", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { [a]: { refuse: "revoked" } } })
      const Live = PooledHttpClient.layer(openAi, { baseUrl: fake.baseUrl }).pipe(
        Layer.provide([KeyPool.layer({ keys: [a, b] }), FetchHttpClient.layer])
      )
      const client = Context.get(yield* Layer.build(Live), HttpClient.HttpClient)
      assert.strictEqual(yield* contentOf(yield* client.execute(chat(fake))), said)
    }))

  live("K3: refuses an address in the clear", () =>
    Effect.gen(function*() {
      const Live = PooledHttpClient.layer(openAi, { baseUrl: "http://api.example.com/v1" }).pipe(
        Layer.provide([KeyPool.layer({ keys: [a] }), FetchHttpClient.layer])
      )
      assert.strictEqual((yield* Effect.flip(Layer.build(Live))).field, "baseUrl")
    }))
})
