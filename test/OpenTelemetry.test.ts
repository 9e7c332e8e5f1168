import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Metric from "effect/Metric"
import * as MetricKeyType from "effect/MetricKeyType"
import * as MetricState from "effect/MetricState"
import * as TestClock from "effect/TestClock"
import * as Tracer from "effect/Tracer"
import * as KeyPool from "../src/KeyPool.js"
import * as OpenTelemetry from "../src/OpenTelemetry.js"
import { bad, calm, keyOf, keys, ok, once, plain, test, upstream } from "./support/pooled.js"
import { tracing } from "./support/tracing.js"

// The registry of metrics is one for the process: each test has a pool of its own name.

/** What the registry has of a pool: name and attributes of each metric, with its count, and the sum of a histogram. */
const metricsOf = (pool: string) =>
  Effect.map(Metric.snapshot, (all) =>
    all.flatMap(({ metricKey, metricState }) => {
      const tags = Object.fromEntries(metricKey.tags.map(({ key, value }) => [key, value]))
      if (tags["keymesh.pool"] !== pool) return []
      return MetricState.isHistogramState(metricState)
        ? [{ name: metricKey.name, tags, count: metricState.count, sum: metricState.sum }]
        : MetricState.isCounterState(metricState)
        ? [{ name: metricKey.name, tags, count: Number(metricState.count), sum: 0 }]
        : []
    }))

const named = <A extends { readonly name: string }>(all: ReadonlyArray<A>, name: string) =>
  all.filter((metric) => metric.name === name)

const settings = { ...plain, ...once, strategy: "sequential-then-rotate" } as const
const chat = { model: "gpt-x", operation: "POST /chat/completions" } as const

describe("metrics", () => {
  test("T3: how long calls take, by the names of the GenAI conventions, in seconds and with their buckets", () =>
    Effect.gen(function*() {
      yield* Layer.build(OpenTelemetry.layerMetrics)
      const provider = yield* upstream({ a: [ok(300), bad("RateLimited", { wait: 60_000 }, 100)], b: ok(200) })
      const pool = yield* KeyPool.make({ name: "openai", keys: keys("ab"), ...settings })
      for (let n = 0; n < 2; n++) {
        const call = yield* Effect.fork(pool.run(provider.send, chat))
        yield* TestClock.adjust(1_000)
        yield* Fiber.join(call)
      }
      const all = yield* metricsOf("openai")
      assert.deepStrictEqual(named(all, "gen_ai.client.operation.duration"), [{
        name: "gen_ai.client.operation.duration",
        tags: {
          "gen_ai.operation.name": "chat",
          "gen_ai.provider.name": "openai",
          "gen_ai.request.model": "gpt-x",
          "keymesh.pool": "openai",
          unit: "s"
        },
        count: 2,
        sum: 0.6
      }])
      const of = (name: string) =>
        named(all, name).map(({ count, tags }) =>
          `${tags["keymesh.key.label"] ?? tags["event.name"]} ${tags["error.type"] ?? ""} ${count}`
        ).sort()
      assert.deepStrictEqual(of("keymesh.attempt.duration"), ["a  1", "a RateLimited 1", "b  1"])
      assert.deepStrictEqual(of("keymesh.events"), [
        "call.end  2",
        "key.added  2",
        "key.cooldown  1",
        "key.rotated  1",
        "request.fail  1",
        "request.start  3",
        "request.success  2"
      ])
      const key = (yield* Metric.snapshot).map(({ metricKey }) => metricKey).find(({ name, tags }) =>
        name === "gen_ai.client.operation.duration" && tags.some(({ value }) => value === "openai")
      )
      assert(key !== undefined && MetricKeyType.isHistogramKey(key.keyType))
      const { values } = key.keyType.boundaries
      assert.deepStrictEqual(
        values.filter(Number.isFinite),
        [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
      )
    }))

  test("T3: a call that fails has an `error.type` of few words: the fault's kind, the pool's error, or `_OTHER`", () =>
    Effect.gen(function*() {
      yield* Layer.build(OpenTelemetry.layerMetrics)
      const provider = yield* upstream({
        a: [bad("Rejected", { code: "some_code" }), bad("RateLimited", { wait: 9e5 })]
      })
      const pool = yield* KeyPool.make({ name: "failing", keys: keys("a"), ...settings })
      yield* Effect.exit(pool.run(provider.send))
      yield* Effect.exit(pool.run(provider.send))
      yield* Effect.exit(pool.run(provider.send))
      const other = yield* KeyPool.make({ name: "failing", keys: keys("a"), ...settings })
      yield* Effect.flatMap(
        Effect.fork(other.run(() => Effect.never)),
        (call) => Effect.zipRight(calm, Fiber.interrupt(call))
      )
      yield* calm
      const types = named(yield* metricsOf("failing"), "gen_ai.client.operation.duration")
        .map(({ count, tags }) => `${tags["error.type"]} ${count}`)
      assert.deepStrictEqual(types.sort(), ["AllKeysExhausted 2", "Rejected 1", "_OTHER 1"])
    }))

  test("T3: operations and providers have the words of the conventions where these have any", () =>
    Effect.gen(function*() {
      yield* Layer.build(OpenTelemetry.layerMetrics)
      const gemini = yield* KeyPool.make({ name: "gemini", keys: keys("a"), ...settings })
      const operations = {
        "POST /responses": "chat",
        "POST /v1/messages": "chat",
        "POST /completions": "text_completion",
        "POST /embeddings": "embeddings",
        "POST /v1beta/models/gemini-x:embedContent": "embeddings",
        "POST /v1beta/models/gemini-x:generateContent": "generate_content",
        "POST /v1beta/models/gemini-x:streamGenerateContent": "generate_content",
        "GET /files/file-abc": "request"
      }
      for (const operation of Object.keys(operations)) {
        yield* gemini.run(() => Effect.void, { model: operation, operation })
      }
      yield* gemini.run(() => Effect.void, { model: "none" })
      yield* calm
      const told = named(yield* metricsOf("gemini"), "gen_ai.client.operation.duration")
      assert.deepStrictEqual(
        Object.fromEntries(told.map(({ tags }) => [tags["gen_ai.request.model"], tags["gen_ai.operation.name"]])),
        { ...operations, none: "request" }
      )
      assert.deepStrictEqual([...new Set(told.map(({ tags }) => tags["gen_ai.provider.name"]))], ["gcp.gemini"])
    }))

  test("T3: whose pools have names of their own says of which provider they are", () =>
    Effect.gen(function*() {
      const names = Layer.succeed(OpenTelemetry.ProviderName, (pool) => pool === "mine" ? "anthropic" : pool)
      yield* Layer.build(Layer.provide(OpenTelemetry.layer, names))
      const pool = yield* KeyPool.make({ name: "mine", keys: keys("a"), ...settings })
      yield* pool.run(() => Effect.void)
      yield* calm
      const [told] = named(yield* metricsOf("mine"), "gen_ai.client.operation.duration")
      assert.strictEqual(told?.tags["gen_ai.provider.name"], "anthropic")
    }))
})

describe("spans", () => {
  test("T3: a call is a span below the caller's, named by operation and model, and each attempt one below it", () =>
    Effect.gen(function*() {
      const { ended, tracer } = tracing()
      yield* Layer.build(Layer.provide(OpenTelemetry.layerSpans, Layer.setTracer(tracer)))
      const provider = yield* upstream({ a: bad("RateLimited", { wait: 60_000, status: 429 }, 100), b: ok(200) })
      const pool = yield* KeyPool.make({ name: "spans", keys: keys("ab"), ...settings })
      yield* TestClock.adjust(1_000)
      const call = yield* Effect.fork(
        Effect.withTracer(Effect.withSpan(pool.run(provider.send, chat), "question"), tracer)
      )
      yield* TestClock.adjust(300)
      yield* Fiber.join(call)
      yield* calm
      const idOf = (label: string) => Effect.map(keyOf(pool, label), ({ id }) => id)
      const of = { "gen_ai.operation.name": "chat", "gen_ai.provider.name": "spans", "gen_ai.request.model": "gpt-x" }
      const attempt = { "keymesh.pool": "spans", "keymesh.waited": 0 }
      assert.deepStrictEqual(ended.filter(({ name }) => name !== "question"), [
        {
          name: "attempt",
          kind: "client",
          attributes: {
            ...attempt,
            "keymesh.attempt": 1,
            "keymesh.key.id": yield* idOf("a"),
            "keymesh.key.label": "a",
            "http.response.status_code": 429,
            "error.type": "RateLimited"
          },
          from: 1_000,
          to: 1_100,
          ok: false,
          parent: "span-2"
        },
        {
          name: "attempt",
          kind: "client",
          attributes: {
            ...attempt,
            "keymesh.attempt": 2,
            "keymesh.key.id": yield* idOf("b"),
            "keymesh.key.label": "b"
          },
          from: 1_100,
          to: 1_300,
          ok: true,
          parent: "span-2"
        },
        {
          name: "chat gpt-x",
          kind: "client",
          attributes: { ...of, "keymesh.pool": "spans", "keymesh.call": 1, "keymesh.attempts": 2 },
          from: 1_000,
          to: 1_300,
          ok: true,
          parent: "span-1"
        }
      ])
    }))

  test("T3: without a span around it a call is the root; one that is not to be told of is passed over", () =>
    Effect.gen(function*() {
      const { ended, tracer } = tracing()
      yield* Layer.build(Layer.provide(OpenTelemetry.layerSpans, Layer.setTracer(tracer)))
      const pool = yield* KeyPool.make({ name: "roots", keys: keys("a"), ...settings })
      yield* pool.run(() => Effect.void)
      const unseen = Effect.withTracerEnabled(Effect.withSpan(pool.run(() => Effect.void), "unseen"), false)
      const seen = yield* Effect.zipLeft(Effect.currentSpan, unseen).pipe(
        Effect.withSpan("seen"),
        Effect.withTracer(tracer)
      )
      yield* calm
      const calls = ended.filter(({ name }) => name === "request")
      assert.deepStrictEqual(calls.map(({ parent }) => parent), [undefined, seen.spanId])
    }))

  test("T3, T2: off the path: what is wrong with a tracer costs a call nothing, and the next call has its span", () =>
    Effect.gen(function*() {
      const { ended, tracer } = tracing()
      let broken = true
      let asked = 0
      const failing = Tracer.make({
        ...tracer,
        span: (...given) => {
          asked++
          if (broken) throw new Error("no exporter")
          return tracer.span(...given)
        }
      })
      yield* Layer.build(Layer.provide(OpenTelemetry.layerSpans, Layer.setTracer(failing)))
      const pool = yield* KeyPool.make({ name: "off the path", keys: keys("a"), ...settings })
      // Nothing of it has run when the call is answered.
      assert.strictEqual(yield* pool.run(() => Clock.currentTimeMillis), 0)
      assert.strictEqual(asked, 0)
      yield* calm
      assert.strictEqual(asked, 1, "it has failed then")
      broken = false
      yield* pool.run(() => Effect.void)
      assert.strictEqual(asked, 1)
      yield* calm
      assert.deepStrictEqual(ended.map(({ name }) => name), ["attempt", "request"])
    }))
})
