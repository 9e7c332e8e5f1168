/**
 * K1 over every way in: whatever an upstream echoes of a key, and wherever, it is shown nowhere. What a provider
 * generated is never altered: that is told by `OpenAi.secrecy.test.ts`.
 */
import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import * as Metric from "effect/Metric"
import { inspect } from "node:util"
import type * as FakeProvider from "../examples/support/FakeProvider.js"
import type { Transport } from "../src/http/Attempt.js"
import * as Scrub from "../src/http/Scrub.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Telemetry from "../src/Telemetry.js"
import { everything } from "./support/everything.js"
import { live, once, watched } from "./support/openai.js"
import { tracing } from "./support/tracing.js"
import { type WayIn, waysIn } from "./support/waysIn.js"

/** No pattern gives this key away, and it looks different in a URL, in JSON and on a page. */
const secret = "tok/en+odd=0123456789abcdef&xyz"

/** Whole, encoded in any way, or as much of it as could be guessed from. */
const assertClean = (text: string, what: string): void => {
  for (const form of Scrub.forms(secret)) {
    for (const part of [form, form.slice(0, 18), form.slice(-18)]) {
      const at = text.indexOf(part)
      if (at >= 0) assert.fail(`${what} shows the key: ${text.slice(Math.max(0, at - 200), at + 60)}`)
    }
  }
}

// ------------------------------------------------------------------------------------------------------ the upstream

/** What goes wrong at an upstream that echoes the key: a behaviour of the key, or an answer in no provider's words. */
const troubles: Readonly<Record<string, FakeProvider.Behaviour | FakeProvider.Answer>> = {
  "a refused key": { echo: true, refuse: "revoked" },
  "a suspended key": { echo: true, refuse: "deactivated" },
  "a spent quota": { echo: true, refuse: "quota" },
  "an error": { echo: true, outage: { status: 500 } },
  "an overload": { echo: true, outage: { status: 503 } },
  "a stream that fails before content": { echo: true, streamError: { after: 0, as: "overloaded" } },
  "a stream that fails after content": { echo: true, streamError: { after: 2, as: "overloaded" } },
  "a redirect": {
    status: 307,
    headers: { location: `https://elsewhere.test/?key=${encodeURIComponent(secret)}`, "x-from": secret },
    body: `moved ${secret}`
  },
  "a page": {
    status: 502,
    statusText: `Bad Gateway ${secret}`,
    headers: { "content-type": "text/html" },
    body: `<a href="/?key=${encodeURIComponent(secret)}">${Scrub.forms(secret).join("</a><a>")}</a>`
  },
  "plain text": { status: 418, headers: { "content-type": "text/plain" }, body: Scrub.forms(secret).join(" ") },
  "every field of JSON": {
    status: 400,
    headers: { "content-type": "application/json", "www-authenticate": `Bearer error="${secret}"`, "x-seen": secret },
    body: JSON.stringify({
      type: "error",
      request_id: secret,
      error: {
        type: secret,
        code: secret,
        status: secret,
        param: secret,
        message: `no ${secret} ${encodeURIComponent(secret)}`,
        details: [{ "@type": secret, reason: secret, metadata: { [secret]: secret } }]
      }
    })
  },
  "JSON that escapes slashes": {
    status: 400,
    headers: { "content-type": "application/json" },
    body: `{"type":"error","error":{"type":"x","message":"no ${secret.replaceAll("/", "\\/")}"}}`
  }
}

/** How the bytes of an answer arrive. */
const passages: Readonly<Record<string, (response: Response) => Promise<ReadableStream<Uint8Array>>>> = {
  "in pieces": async (response) => {
    const bytes = new Uint8Array(await response.arrayBuffer())
    return streamOf(Array.from({ length: Math.ceil(bytes.length / 16) }, (_, i) => bytes.slice(16 * i, 16 * i + 16)))
  },
  "cut in the middle of the key": async (response) =>
    streamOf(
      [cut(await response.text())],
      Object.assign(new TypeError(`terminated ${secret}`, { cause: new Error(secret) }), { request: { secret } })
    ),
  "ended in the middle of the key": async (response) => streamOf([cut(await response.text())])
}

const cut = (text: string): Uint8Array => {
  const at = text.lastIndexOf(secret)
  return new TextEncoder().encode(text.slice(0, at < 0 ? Math.floor(text.length / 2) : at + secret.length - 4))
}

const streamOf = (chunks: ReadonlyArray<Uint8Array>, error?: Error): ReadableStream<Uint8Array> => {
  const left = [...chunks]
  return new ReadableStream<Uint8Array>({
    pull: (controller) => {
      const next = left.shift()
      if (next !== undefined) controller.enqueue(next)
      else if (error === undefined) controller.close()
      else controller.error(error)
    }
  }, { highWaterMark: 0 })
}

/** A careless proxy: it names the key in headers and reason phrase of every answer, and hands its bytes on in its way. */
const careless = (passage: (typeof passages)[string] | undefined): Transport => async (input, init) => {
  const response = await globalThis.fetch(input, init)
  const headers = new Headers(response.headers)
  headers.set("x-proxy-saw", `Bearer ${secret}`)
  headers.append("set-cookie", `key=${encodeURIComponent(secret)}`)
  headers.delete("content-length")
  return new Response(passage === undefined ? response.body : await passage(response), {
    status: response.status,
    statusText: `${response.statusText} ${secret}`,
    headers
  })
}

// ---------------------------------------------------------------------------------------------------- all that shows

/** Everything that a way in shows of calls that go wrong, by where it shows it. */
const shownBy = (way: WayIn, trouble: FakeProvider.Behaviour | FakeProvider.Answer, transport: Transport) =>
  Effect.gen(function*() {
    const fake = yield* way.fake({})
    const records: Array<unknown> = []
    const memory = yield* PoolStore.makeMemory
    const store: PoolStore.Service = {
      ...memory,
      save: (pool, record) => {
        records.push(pool, record, PoolStore.encode(record))
        return memory.save(pool, record)
      }
    }
    const logs: Array<unknown> = []
    const logger = Logger.make(({ annotations, cause, message }) => {
      logs.push(message, annotations, Cause.pretty(cause, { renderErrorCause: true }))
    })
    const spans = tracing()
    const causes: Array<Cause.Cause<unknown>> = []
    const handed: Array<unknown> = []
    const states: Array<unknown> = []
    const events = yield* watched
    const telemetry = yield* Effect.context<Telemetry.Telemetry>()
    yield* Effect.gen(function*() {
      yield* Layer.build(Telemetry.layerLogger)
      const { ask, pool, stream } = yield* way.open({
        fake,
        keys: [{ secret, label: "odd" }],
        settings: { strategy: "sequential-then-rotate", rotations: 0, maxWait: 0, floor: false, ...once },
        transport
      })
      for (const call of [ask, stream((item) => handed.push(item))]) {
        for (const { id } of (yield* pool.snapshot).keys) yield* pool.reset(id)
        if ("status" in trouble) yield* fake.script("*", [trouble])
        else yield* fake.set("*", trouble)
        const exit = yield* Effect.exit(Effect.withSpan(call, "the call"))
        if (Exit.isFailure(exit)) {
          yield* Effect.logError("it failed", exit.cause)
          causes.push(exit.cause)
        } else handed.push(exit.value)
        states.push(yield* pool.snapshot)
      }
      states.push(inspect(pool, { depth: 10, showHidden: true }))
    }).pipe(
      Effect.scoped,
      Effect.provide(Layer.merge(
        Layer.mergeAll(Layer.succeedContext(telemetry), Logger.replace(Logger.defaultLogger, logger)),
        Layer.succeed(PoolStore.PoolStore, store)
      )),
      Effect.withTracer(spans.tracer),
      Logger.withMinimumLogLevel(LogLevel.All)
    )
    const sent = (yield* fake.requests).map(({ headers }) => headers)
    const seen = yield* events
    return {
      failures: causes.length,
      sent,
      shown: {
        "an error": everything(causes.map(Cause.squash)),
        "a cause": [
          ...causes.map((cause) => Cause.pretty(cause, { renderErrorCause: true })),
          everything(causes)
        ].join("\n"),
        // Also what an exporter makes an exception record of.
        "a span": everything([spans.said, spans.said.filter(Exit.isExit).flatMap(exceptions)]),
        "a log": everything(logs),
        "an event": everything([seen, seen.map(Telemetry.encode)]),
        "a snapshot": everything(states),
        "a metric": everything(Metric.unsafeSnapshot()),
        "the store": everything(records),
        "an answer": everything(handed)
      }
    }
  })

const exceptions = (exit: Exit.Exit<unknown, unknown>) => Exit.isFailure(exit) ? Cause.prettyErrors(exit.cause) : []

/** What a transport may throw that names the key. */
const throwers: Readonly<Record<string, () => unknown>> = {
  "an Error": () => Object.assign(new Error(`cannot send ${secret}`), { request: { headers: { secret } } }),
  "a chain of causes": () => new TypeError("fetch failed", { cause: new Error("x", { cause: new Error(secret) }) }),
  "several at once": () => new AggregateError([new Error(secret), new Error("b")], `all of ${secret}`),
  "a DOMException": () => new DOMException(`bad ${secret}`, "NetworkError"),
  "a text": () => `cannot send ${secret}`,
  "an object": () => ({ message: secret, secret })
}

for (const way of waysIn) {
  describe(way.name, () => {
    for (const [name, trouble] of Object.entries(troubles)) {
      for (const [how, passage] of [["as it is", undefined] as const, ...Object.entries(passages)]) {
        live(`K1: ${name} that echoes the key, ${how}, shows it nowhere`, () =>
          Effect.gen(function*() {
            const { failures, sent, shown } = yield* shownBy(way, trouble, careless(passage))
            // An HTTP client hands on the events of a stream, errors too: it need not fail.
            assert.isTrue(failures > 0 || way.kind === "http" || way.name.endsWith("fetch"), "it must fail")
            if (how === "as it is") assert.include(Object.values(shown).join(), Scrub.placeholder, "it must be echoed")
            for (const [where, text] of Object.entries(shown)) {
              assert.isAbove(text.length, where === "an answer" ? -1 : 10, `nothing was captured of ${where}`)
              assertClean(text, where)
            }
            for (const headers of sent) {
              assert.include(Object.values(headers).join(), secret, "the key must have been sent")
              assert.notProperty(headers, "traceparent")
              assert.notProperty(headers, "b3")
            }
          }))
      }
    }

    for (const [name, make] of Object.entries(throwers)) {
      live(`K1: ${name} that the transport throws shows the key nowhere`, () =>
        Effect.gen(function*() {
          const { failures, shown } = yield* shownBy(way, {}, () => Promise.reject(make()))
          assert.strictEqual(failures, 2)
          for (const [where, text] of Object.entries(shown)) assertClean(text, where)
        }))
    }
  })
}
