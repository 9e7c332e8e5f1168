import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as Clock from "effect/Clock"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Schedule from "effect/Schedule"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import { getEventListeners } from "node:events"
import { setTimeout } from "node:timers/promises"
import OpenAI, { toFile } from "openai"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import * as CallOptions from "../../src/CallOptions.js"
import * as KeymeshError from "../../src/KeymeshError.js"
import type * as OpenAi from "../../src/providers/OpenAi.js"
import * as Telemetry from "../../src/Telemetry.js"
import {
  a,
  asked,
  atOnce,
  b,
  both,
  chat,
  chatStream,
  drained,
  inFlight,
  live,
  messages,
  model,
  once,
  said,
  service,
  textIn,
  until
} from "../support/openai.js"

const ask = (openai: OpenAi.Service, options?: OpenAI.RequestOptions) => openai.use((client) => chat(client, options))

const flipped = <A, E, R>(effect: Effect.Effect<A, E, R>) => Effect.flip(effect)

const outcomes = (trail: KeymeshError.Trail) => trail.entries.map(({ label, outcome }) => `${label} ${outcome}`)

/** Fails unless the error has this tag; then it is of that type. */
const tagged = <E extends { readonly _tag: string }, Tag extends E["_tag"]>(error: E, tag: Tag) => {
  assert.strictEqual(error._tag, tag, String(error))
  return error as Extract<E, { readonly _tag: Tag }>
}

describe("use: errors", () => {
  live("a value is a value", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      assert.strictEqual((yield* ask(openai)).choices[0]?.message.content, said)
      assert.strictEqual(yield* openai.use(() => 7), 7)
    }))

  live("a rejected request is a ProviderError with all that the provider said", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("ab")
      const error = tagged(
        yield* flipped(openai.use((client) => client.chat.completions.create({ messages } as never))),
        "ProviderError"
      )
      assert.deepInclude(error, { provider: "openai", status: 400, requestId: "req_fake0001" })
      assert.deepInclude(error.fault, { kind: "Rejected", status: 400, code: "missing_required_parameter" })
      assert.deepStrictEqual(error.body, {
        error: {
          message: "Missing required parameter: 'model'.",
          type: "invalid_request_error",
          param: "model",
          code: "missing_required_parameter"
        }
      })
      assert.deepStrictEqual(outcomes(error.trail), ["a Rejected"])
      assert.instanceOf(error.cause, OpenAI.BadRequestError)
      assert.include(error.message, "Missing required parameter")
      assert.deepStrictEqual(Option.getOrUndefined(KeymeshError.find(new Error("outer", { cause: error }))), error)
    }))

  live(
    "when the retries are spent, it is the last attempt's ProviderError, with the trail",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { "*": { outage: { status: 500 } } } }, atOnce(2))
        const error = tagged(yield* flipped(ask(openai)), "ProviderError")
        assert.deepInclude(error, { status: 500, requestId: "req_fake0003" })
        assert.strictEqual(error.fault.kind, "ServerError")
        assert.deepStrictEqual(outcomes(error.trail), ["a ServerError", "b ServerError", "a ServerError"])
        assert.instanceOf(error.cause, OpenAI.InternalServerError)
        assert.strictEqual(yield* asked(fake), "aba")
      })
  )

  live("no answer at all is a ProviderError without a status", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { reset: true } } }, once)
      const error = tagged(yield* flipped(ask(openai)), "ProviderError")
      assert.deepInclude(error, { status: undefined, body: undefined, requestId: undefined })
      assert.strictEqual(error.fault.kind, "Network")
      assert.deepStrictEqual(outcomes(error.trail), ["a Network"])
      assert.instanceOf(error.cause, OpenAI.APIConnectionError)
    }))

  live("the timeout of the SDK is a ProviderError, with the trail", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { hang: true } } }, once)
      const error = tagged(yield* flipped(ask(openai, { timeout: 200 })), "ProviderError")
      assert.strictEqual(error.fault.kind, "Timeout")
      assert.strictEqual(error.trail.entries.length, 1)
      assert.instanceOf(error.cause, OpenAI.APIConnectionTimeoutError)
    }))

  live("C10: keys that are all unauthorized are AllKeysExhausted", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("ab", { keys: { "*": { refuse: "revoked" } } })
      const error = tagged(yield* flipped(ask(openai)), "AllKeysExhausted")
      assert.deepStrictEqual(error.reasonCounts, { Unauthorized: 2 })
      assert.deepStrictEqual(outcomes(error.trail), ["a Unauthorized", "b Unauthorized"])
    }))

  live("C3: a back-off that does not fit into the budget is BudgetExceeded", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { outage: { status: 500 } } } }, {
        retry: Schedule.spaced(60_000),
        budget: 10_000
      })
      const error = tagged(yield* flipped(ask(openai)), "BudgetExceeded")
      assert.deepStrictEqual(outcomes(error.trail), ["a ServerError"])
    }))

  live("C3: a deadline set around it ends the request, upstream too", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { hang: true } } })
      const error = tagged(yield* flipped(CallOptions.withDeadline(ask(openai), 1_000)), "DeadlineExceeded")
      assert.deepStrictEqual(outcomes(error.trail), ["a ignored"])
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live("a closed pool is PoolClosed, for calls under way and later ones", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true } } })
      const scope = yield* Scope.make()
      const openai = yield* Scope.extend(service(fake, "a"), scope)
      const running = yield* Effect.fork(flipped(ask(openai)))
      yield* fake.waitForRequests(1)
      yield* Scope.close(scope, Exit.void)
      tagged(yield* Fiber.join(running), "PoolClosed")
      tagged(yield* flipped(ask(openai)), "PoolClosed")
    }))

  live("what the callback itself throws is SdkError, as it was thrown", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const mine = new TypeError("a bug of mine")
      const thrown = [
        openai.use(() => {
          throw mine
        }),
        openai.use(() => Promise.reject(mine)),
        openai.use((client) => chat(client).then(() => Promise.reject(mine))),
        openai.use(async (client) => {
          // Its own throw counts, whatever else went wrong before it.
          await client.models.retrieve("gpt-nope").catch(() => undefined)
          throw mine
        })
      ]
      for (const effect of thrown) assert.strictEqual(tagged(yield* flipped(effect), "SdkError").cause, mine)
      assert.strictEqual(
        tagged(yield* flipped(openai.use(() => Promise.reject("no error"))), "SdkError").cause,
        "no error"
      )
      const ofSdk = new OpenAI.OpenAIError("says nothing of the provider")
      assert.strictEqual(tagged(yield* flipped(openai.use(() => Promise.reject(ofSdk))), "SdkError").cause, ofSdk)
    }))

  live("a provider's error that the callback wraps is found", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const wrapped = openai.use((client) =>
        client.models.retrieve("gpt-nope").catch((cause: unknown) => Promise.reject(new Error("mine", { cause })))
      )
      const error = tagged(yield* flipped(wrapped), "ProviderError")
      assert.strictEqual(error.status, 404)
      assert.propertyVal(error.cause, "message", "mine")
    }))

  live("errors of two pools of one name are not confused", () =>
    Effect.gen(function*() {
      const one = yield* both("a", { keys: { [a]: { refuse: "revoked" } } })
      const two = yield* both("a", { keys: { [a]: { outage: { status: 500 } } } }, once)
      tagged(yield* flipped(ask(one.openai)), "AllKeysExhausted")
      const error = tagged(yield* flipped(one.openai.use(() => chat(two.openai.client))), "ProviderError")
      assert.strictEqual(error.status, 500)
    }))
})

describe("use: interruption", () => {
  live(
    "C5: it aborts the request upstream, and the lease is free when the interrupting fiber goes on",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("a", { keys: { [a]: { hang: true } } })
        const fiber = yield* Effect.fork(ask(openai))
        yield* fake.waitForRequests(1)
        assert.strictEqual(yield* inFlight(openai), 1)
        const exit = yield* Fiber.interrupt(fiber)
        assert.deepInclude((yield* openai.pool.snapshot).keys[0], { inFlight: 0, ignored: 1, faults: 0 })
        assert.isTrue(Exit.isInterrupted(exit))
        yield* fake.idle
        assert.isTrue((yield* fake.requests)[0]?.aborted)
      })
  )

  live("C5: all requests of the callback end with it", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", { keys: { "*": { hang: true } } })
      const fiber = yield* Effect.fork(openai.use((client) => Promise.all([chat(client), chat(client), chat(client)])))
      yield* fake.waitForRequests(3)
      yield* Fiber.interrupt(fiber)
      assert.strictEqual(yield* inFlight(openai), 0)
      yield* fake.idle
      assert.isTrue((yield* fake.requests).every(({ aborted }) => aborted))
    }))

  live("C5: of two concurrent calls only the interrupted one ends", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", { keys: { [a]: { hang: true }, [b]: { latencyMs: 100 } } })
      const one = yield* Effect.fork(ask(openai))
      yield* fake.waitForRequests(1)
      const two = yield* Effect.fork(ask(openai))
      yield* fake.waitForRequests(2)
      yield* Fiber.interrupt(one)
      assert.strictEqual(yield* inFlight(openai), 1)
      assert.strictEqual((yield* Fiber.join(two)).choices[0]?.message.content, said)
      yield* fake.idle
      assert.deepStrictEqual((yield* fake.requests).map(({ aborted }) => aborted), [true, false])
    }))

  live("C5: a call that waits for a key leaves the queue", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } }, {
        budget: 120_000
      })
      yield* ask(openai)
      const fiber = yield* Effect.fork(ask(openai))
      yield* until(Effect.map(openai.pool.snapshot, ({ waiting }) => waiting === 1))
      yield* Fiber.interrupt(fiber)
      assert.strictEqual((yield* openai.pool.snapshot).waiting, 0)
      assert.strictEqual(yield* inFlight(openai), 0)
      // The first answer announced that nothing is left: nobody asks again.
      assert.strictEqual((yield* fake.requests).length, 1)
    }))

  live(
    "C5: a stream that the callback reads is aborted, although it did not pass the signal on",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("a", { keys: { [a]: { stallAfter: 2 } } })
        const reading = yield* Deferred.make<void>()
        const fiber = yield* Effect.fork(openai.use(async (client) => {
          for await (const chunk of await chatStream(client)) {
            if (textIn([chunk]) === "said: ") Deferred.unsafeDone(reading, Effect.void)
          }
        }))
        yield* Deferred.await(reading)
        assert.strictEqual(yield* inFlight(openai), 1)
        yield* Fiber.interrupt(fiber)
        assert.strictEqual(yield* inFlight(openai), 0)
        yield* fake.idle
        assert.isTrue((yield* fake.requests)[0]?.aborted)
      })
  )

  live("C5: a body that comes slowly is aborted, too", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a")
      const body = async function*() {
        for (;;) {
          yield new TextEncoder().encode(" ")
          await setTimeout(10)
        }
      }
      yield* fake.script(a, [{ status: 200, headers: { "content-type": "application/json" }, body: body() }])
      const fiber = yield* Effect.fork(ask(openai))
      yield* until(Effect.map(fake.requests, ([request]) => request?.status === 200))
      yield* until(Effect.map(inFlight(openai), (count) => count === 0))
      yield* Fiber.interrupt(fiber)
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live("the SDK's timeout works where the effect may not be interrupted", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { hang: true } } }, once)
      const error = yield* flipped(Effect.uninterruptible(ask(openai, { timeout: 100 })))
      assert.strictEqual(tagged(error, "ProviderError").fault.kind, "Timeout")
    }))
})

/** A clock that stands still. */
const stopped = (millis: number): Clock.Clock => ({
  ...Clock.make(),
  [Clock.ClockTypeId]: Clock.ClockTypeId,
  unsafeCurrentTimeMillis: () => millis,
  unsafeCurrentTimeNanos: () => BigInt(millis) * 1_000_000n,
  currentTimeMillis: Effect.succeed(millis),
  currentTimeNanos: Effect.succeed(BigInt(millis) * 1_000_000n),
  sleep: () => Effect.never
})

describe("use: the caller's context", () => {
  live("settings around it reach its requests: maxWait, budget, model", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
      yield* ask(openai)
      yield* flipped(ask(openai).pipe(CallOptions.withOptions({ budget: 100 })))
      const error = yield* flipped(ask(openai).pipe(CallOptions.withOptions({ maxWait: 0 })))
      tagged(error, "AllKeysExhausted")
      assert.strictEqual((yield* fake.requests).length, 1)

      // A model of which the request itself says nothing.
      const other = yield* both("a", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
      const listing = other.openai.use((client) => client.models.list()).pipe(
        CallOptions.withOptions({ model: "gpt-one", maxWait: 0 })
      )
      yield* listing
      yield* flipped(listing)
      const { keys } = yield* other.openai.pool.snapshot
      assert.deepStrictEqual(keys[0]?.closedModels.map(({ model }) => model), ["gpt-one"])
    }))

  live("its services are seen inside: requests run on the caller's clock", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { outage: { status: 500 } } } }, once)
      const error = tagged(yield* flipped(Effect.withClock(ask(openai), stopped(12_345))), "ProviderError")
      assert.deepInclude(error.trail.entries[0], { at: 12_345, durationMillis: 0 })
    }))

  live("several calls at once each have their own", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const bad = openai.use((client) => client.chat.completions.create({ messages } as never))
      const times = Array.from({ length: 20 }, (_, index) => 1_000 * (index + 1))
      const trails = yield* Effect.forEach(
        times,
        (millis) =>
          Effect.map(
            flipped(Effect.withClock(bad, stopped(millis))),
            (error) => tagged(error, "ProviderError").trail.entries[0]?.at
          ),
        { concurrency: "unbounded" }
      )
      assert.deepStrictEqual(trails, times)
    }))

  live("it does not leak into other fibers that the scheduler runs meanwhile", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("ab", { keys: { [a]: { hang: true }, [b]: { latencyMs: 1_500 } } })
      const telemetry = yield* Telemetry.Telemetry
      const events = yield* telemetry.subscribe
      // A fiber that is woken from inside a request, and calls the client directly: the deadline is not for it.
      const outsider = yield* events.pipe(
        Stream.filter((event) => event._tag === "request.start" && event.label === "a"),
        Stream.take(1),
        Stream.mapEffect(() => Effect.promise(() => chat(openai.client))),
        Stream.runHead,
        Effect.fork
      )
      yield* Effect.sleep(20)
      const error = yield* flipped(CallOptions.withDeadline(ask(openai), 1_000))
      tagged(error, "DeadlineExceeded")
      const answer = Option.getOrUndefined(yield* Fiber.join(outsider))
      assert.strictEqual(answer?.choices[0]?.message.content, said)
      assert.strictEqual(yield* asked(fake), "ab")
    }))

  live("a request that stray code starts after its end does not run in its frame", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { latencyMs: 600 } } })
      const go = yield* Deferred.make<void>()
      const stray: Array<Promise<unknown>> = []
      yield* openai.use((client) => {
        stray.push(Effect.runPromise(Deferred.await(go)).then(() => chat(client)))
      }).pipe(CallOptions.withDeadline(300))
      yield* Deferred.succeed(go, undefined)
      const [answer] = yield* Effect.promise(() => Promise.all(stray))
      assert.property(answer, "choices")
      assert.strictEqual(yield* asked(fake), "a")
    }))

  live("no listener stays on the signal of a stream that is over", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const { signal } = new AbortController()
      const count = () => getEventListeners(signal, "abort").length
      const given = (client: OpenAI) =>
        client.withOptions({ fetch: (url, init) => plain(client)(url, { ...init, signal }) })
      for (let i = 0; i < 3; i++) yield* Effect.promise(() => drained(() => chatStream(given(openai.client))))
      yield* until(Effect.sync(() => count() === 0))
    }))
})

/** The `fetch` that a client was made with. */
const plain = (client: OpenAI): typeof globalThis.fetch => Reflect.get(client, "fetch")

describe("use: a platform without asynchronous contexts", () => {
  /** A service that was made where the platform has none. */
  const without = (fake: FakeOpenAi.FakeOpenAi) =>
    Effect.acquireUseRelease(
      Effect.sync(() => {
        const original = process.getBuiltinModule
        Reflect.set(process, "getBuiltinModule", undefined)
        return original
      }),
      () => service(fake, "ab"),
      (original) => Effect.sync(() => Reflect.set(process, "getBuiltinModule", original))
    )

  live("the signal carries on: interruption still ends the requests that were given it", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { [a]: { hang: true }, [b]: { stallAfter: 2 } } })
      const openai = yield* without(fake)
      const fiber = yield* Effect.fork(openai.use((client, signal) => chat(client, { signal })))
      yield* fake.waitForRequests(1)
      yield* Fiber.interrupt(fiber)
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)

      const first = yield* openai.stream((client, signal) => chatStream(client, { signal })).pipe(
        Stream.take(2),
        Stream.runCollect
      )
      assert.strictEqual(first.length, 2)
      yield* fake.idle
      yield* until(Effect.map(inFlight(openai), (count) => count === 0))
    }))
})

describe("stream", () => {
  live("gives every chunk, and frees the lease at the end", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      const chunks = yield* Stream.runCollect(openai.stream((client) => chatStream(client)))
      assert.strictEqual(textIn(chunks), said)
      assert.strictEqual(yield* inFlight(openai), 0)
    }))

  live("takes pages, helpers, and iterables that were not awaited", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a")
      for (const name of ["1", "2", "3"]) {
        yield* openai.use(async (client) =>
          client.files.create({ file: await toFile(new Uint8Array(1), name), purpose: "batch" })
        )
      }
      const files = yield* Stream.runCollect(openai.stream((client) => client.files.list({ limit: 2 })))
      assert.deepStrictEqual(Array.from(files, ({ filename }) => filename), ["3", "2", "1"])
      const helper = yield* Stream.runCollect(
        openai.stream((client) => client.chat.completions.stream({ model, messages }))
      )
      assert.strictEqual(textIn(helper), said)
      const own = openai.stream(async function*(client) {
        yield (await chat(client)).choices[0]?.message.content
        yield "end"
      })
      assert.deepStrictEqual(Chunk.toReadonlyArray(yield* Stream.runCollect(own)), [said, "end"])
    }))

  live("errors before it begins are those of use", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("a", { keys: { [a]: { refuse: "revoked" } } })
      const error = yield* flipped(Stream.runDrain(openai.stream((client) => chatStream(client))))
      tagged(error, "AllKeysExhausted")
      const mine = new Error("mine")
      const own = yield* flipped(Stream.runDrain(openai.stream(() => {
        throw mine
      })))
      assert.strictEqual(tagged(own, "SdkError").cause, mine)
      const later = openai.stream(async function*() {
        yield 1
        throw mine
      })
      const items: Array<number> = []
      const exit = yield* Effect.exit(Stream.runForEach(later, (item) => Effect.sync(() => items.push(item))))
      assert.deepStrictEqual(items, [1])
      assert.strictEqual(Exit.isFailure(exit) && Cause.squash(exit.cause) instanceof KeymeshError.SdkError, true)
    }))

  live(
    "S3: an error after content is a ProviderError, with request id, body and trail; the pool learns of it",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("ab", { keys: { [a]: { streamError: { after: 2 } } } })
        const seen: Array<OpenAI.ChatCompletionChunk> = []
        const error = tagged(
          yield* flipped(Stream.runForEach(
            openai.stream((client) => chatStream(client)),
            (chunk) => Effect.sync(() => seen.push(chunk))
          )),
          "ProviderError"
        )
        assert.strictEqual(textIn(seen), "You said: ")
        assert.deepInclude(error, { requestId: "req_fake0001" })
        assert.strictEqual(error.fault.kind, "ServerError")
        assert.strictEqual(error.trail.entries.length, 1)
        assert.instanceOf(error.cause, OpenAI.APIError)
        assert.nestedPropertyVal(error.body, "error.type", "server_error")
        assert.strictEqual(yield* asked(fake), "a")
        const { keys } = yield* openai.pool.snapshot
        assert.deepInclude(keys[0], { successes: 1, faults: 1, inFlight: 0 })
      })
  )

  live("S3: a connection that breaks after content is a ProviderError, too", () =>
    Effect.gen(function*() {
      const { openai } = yield* both("ab", { keys: { [a]: { cutAfter: 2, chunkDelayMs: 20 } } })
      const error = tagged(
        yield* flipped(Stream.runDrain(openai.stream((client) => chatStream(client)))),
        "ProviderError"
      )
      assert.strictEqual(error.fault.kind, "Network")
      assert.deepInclude(error, { requestId: "req_fake0001", status: undefined })
      assert.deepInclude((yield* openai.pool.snapshot).keys[0], { successes: 1, faults: 1, inFlight: 0 })
    }))

  live(
    "C5: interruption while it waits for a chunk ends the request, although the signal was not passed on",
    () =>
      Effect.gen(function*() {
        const { fake, openai } = yield* both("a", { keys: { [a]: { stallAfter: 2 } } })
        const reading = yield* Deferred.make<void>()
        const fiber = yield* openai.stream((client) => chatStream(client)).pipe(
          Stream.runForEach((chunk) =>
            textIn([chunk]) === "said: " ? Deferred.succeed(reading, undefined) : Effect.void
          ),
          Effect.fork
        )
        yield* Deferred.await(reading)
        yield* Effect.sleep(20)
        yield* Fiber.interrupt(fiber)
        assert.strictEqual(yield* inFlight(openai), 0)
        yield* fake.idle
        assert.isTrue((yield* fake.requests)[0]?.aborted)
      })
  )

  live("C5: interruption while it opens ends the request, and the callback's signal", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { hang: true } } })
      const signals: Array<AbortSignal> = []
      const fiber = yield* openai.stream((client, signal) => {
        signals.push(signal)
        return chatStream(client)
      }).pipe(Stream.runDrain, Effect.fork)
      yield* fake.waitForRequests(1)
      yield* Fiber.interrupt(fiber)
      assert.strictEqual(yield* inFlight(openai), 0)
      assert.deepStrictEqual(signals.map(({ aborted }) => aborted), [true])
      yield* fake.idle
    }))

  live("S1: who takes only the beginning ends the request upstream", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { stallAfter: 3 } } })
      const chunks = yield* openai.stream((client) => chatStream(client)).pipe(Stream.take(2), Stream.runCollect)
      assert.strictEqual(chunks.length, 2)
      assert.strictEqual(yield* inFlight(openai), 0)
      yield* fake.idle
      assert.isTrue((yield* fake.requests)[0]?.aborted)
    }))

  live("S1: the pool's end breaks it off, with PoolClosed", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ keys: { [a]: { stallAfter: 2 } } })
      const scope = yield* Scope.make()
      const openai = yield* Scope.extend(service(fake, "a"), scope)
      const reading = yield* Deferred.make<void>()
      const fiber = yield* openai.stream((client) => chatStream(client)).pipe(
        Stream.runForEach((chunk) => textIn([chunk]) === "said: " ? Deferred.succeed(reading, undefined) : Effect.void),
        Effect.flip,
        Effect.fork
      )
      yield* Deferred.await(reading)
      yield* Scope.close(scope, Exit.void)
      tagged(yield* Fiber.join(fiber), "PoolClosed")
      assert.strictEqual(yield* inFlight(openai), 0)
      yield* fake.idle
    }))

  live("settings around it reach the requests of every step", () =>
    Effect.gen(function*() {
      const { fake, openai } = yield* both("a", { keys: { [a]: { limit: { requestsPerMinute: 1 } } } })
      const pages = openai.stream(async function*(client) {
        yield await chat(client)
        yield await chat(client)
      })
      const error = yield* flipped(Stream.runDrain(pages).pipe(CallOptions.withOptions({ maxWait: 0 })))
      tagged(error, "AllKeysExhausted")
      assert.strictEqual((yield* fake.requests).length, 1)
    }))
})
