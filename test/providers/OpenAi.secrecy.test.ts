import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import * as Stream from "effect/Stream"
import { inspect } from "node:util"
import type OpenAI from "openai"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type * as FakeProvider from "../../examples/support/FakeProvider.js"
import type { Transport } from "../../src/http/Attempt.js"
import * as Scrub from "../../src/http/Scrub.js"
import * as OpenAi from "../../src/providers/OpenAi.js"
import * as Telemetry from "../../src/Telemetry.js"
import { chat, chatStream, drained, live, messages, model, once, textIn, watched } from "../support/openai.js"

/** No pattern gives this key away, and it looks different in a URL. */
const secret = "tok/en+odd=0123456789abcdef"

/** Every way in which an error, or anything else, may be shown. */
const shown = (value: unknown): string => {
  const texts = [String(value), inspect(value, { depth: 10, showHidden: true }), json(value)]
  if (value instanceof Error) {
    texts.push(value.message, value.stack ?? "", value.name)
    if (Reflect.get(value, "headers") instanceof Headers) {
      texts.push(JSON.stringify(Array.from(Reflect.get(value, "headers"))))
    }
    if (value.cause !== undefined) texts.push(shown(value.cause))
  }
  return texts.join("\n")
}

const json = (value: unknown): string => {
  try {
    return JSON.stringify(value, (_, inner: unknown) => typeof inner === "bigint" ? String(inner) : inner) ?? ""
  } catch {
    return ""
  }
}

const assertClean = (text: string, what: string): void => {
  for (const form of Scrub.forms(secret)) assert.notInclude(text, form, what)
  // Not even half of it.
  assert.notInclude(text, secret.slice(0, 20), what)
}

/** What all the doors of the library say while a program runs: failures, events, snapshots, logs. */
const overheard = (
  calls: ReadonlyArray<(client: OpenAI) => Promise<unknown>>,
  settings: Partial<OpenAi.Settings>
) =>
  Effect.gen(function*() {
    const logs: Array<string> = []
    const logger = Logger.make(({ annotations, cause, message }) => {
      logs.push(inspect([message, Array.from(annotations)], { depth: 10 }), Cause.pretty(cause))
    })
    const events = yield* watched
    const openai = yield* OpenAi.make(
      { keys: [{ secret, label: "odd" }, "sk-other-0000"], ...settings } as OpenAi.Settings
    )
    const failures: Array<unknown> = []
    const texts: Array<string> = []
    const context = yield* Effect.context<Telemetry.Telemetry>()
    yield* Effect.gen(function*() {
      yield* Layer.build(Telemetry.layerLogger)
      for (const call of calls) {
        const plain = yield* Effect.promise(() => call(openai.client).then(() => undefined, (error: unknown) => error))
        const used = yield* Effect.exit(openai.use(call))
        if (Exit.isFailure(used)) {
          yield* Effect.logError("it failed", used.cause)
          failures.push(plain, Cause.squash(used.cause))
          texts.push(
            Cause.pretty(used.cause),
            Cause.pretty(used.cause, { renderErrorCause: true }),
            inspect(used.cause)
          )
        }
        texts.push(json(yield* openai.pool.snapshot), inspect(yield* openai.pool.snapshot, { depth: 10 }))
      }
      texts.push(inspect(openai.pool, { depth: 10, showHidden: true }))
      yield* Effect.sleep(20)
    }).pipe(
      Effect.scoped,
      Effect.provide(Layer.merge(Layer.succeedContext(context), Logger.replace(Logger.defaultLogger, logger))),
      Logger.withMinimumLogLevel(LogLevel.All)
    )
    const seen = yield* events
    texts.push(json(seen.map(Telemetry.encode)), inspect(seen, { depth: 10 }), ...seen.map(String))
    return { failures, texts: [...texts, ...failures.map(shown)], logs, events: seen }
  })

const calls = {
  chat: (client: OpenAI) => chat(client),
  bad: (client: OpenAI) => client.chat.completions.create({ messages } as never),
  missing: (client: OpenAI) => client.files.retrieve("file-nope"),
  stream: (client: OpenAI) => chatStream(client).then((stream) => drained(() => stream)).then(thrown),
  responses: (client: OpenAI) =>
    client.responses.create({ model, input: "hi", stream: true }).then((stream) => drained(() => stream)).then(thrown)
}

const thrown = ({ error }: { readonly error: unknown }) => error === undefined ? undefined : Promise.reject(error)

const html = `<html><a href="https://elsewhere.test/?key=${encodeURIComponent(secret)}">${secret}</a></html>`

const echoes: Readonly<Record<string, readonly [FakeProvider.Behaviour | FakeProvider.Answer, keyof typeof calls]>> = {
  "400": [{ echo: true }, "bad"],
  "401": [{ echo: true, refuse: "revoked" }, "chat"],
  "403": [{ echo: true, refuse: "region" }, "chat"],
  "404": [{ echo: true }, "missing"],
  "429": [{ echo: true, refuse: "quota" }, "chat"],
  "500": [{ echo: true, outage: { status: 500 } }, "chat"],
  "503": [{ echo: true, outage: { status: 503 } }, "chat"],
  "a page": [{ echo: true, outage: { status: 502 } }, "chat"],
  "an error of a stream before content": [{ echo: true, streamError: { after: 0 } }, "stream"],
  "an error of a stream after content": [{ echo: true, streamError: { after: 2 } }, "stream"],
  "an error of a responses stream after content": [{ echo: true, streamError: { after: 2 } }, "responses"],
  "a redirect": [{
    status: 307,
    headers: { location: `https://elsewhere.test/?key=${encodeURIComponent(secret)}`, "content-type": "text/html" },
    body: html
  }, "chat"],
  "codes": [{
    status: 400,
    headers: { "www-authenticate": `Bearer error="${secret}"`, [`x-${"seen"}`]: secret },
    body: JSON.stringify({ error: { message: `no ${secret}`, code: secret, type: secret, param: secret } })
  }, "chat"],
  "every form of it": [{
    status: 418,
    statusText: `teapot ${secret}`,
    body: `${Scrub.forms(secret).join(" ")} GET /v1?key=${encodeURIComponent(secret)}&x=1`
  }, "chat"],
  "a stream whose headers show it": [{
    status: 200,
    headers: { "content-type": "text/event-stream", "x-seen": `Bearer ${secret}` },
    body: [
      "data: {\"choices\":[{\"delta\":{\"content\":\"Hi\"}}]}\n\n",
      `data: {"error":{"message":"gone ${secret}","code":"${secret}"}}\n\n`
    ].join("")
  }, "stream"]
}

describe("K1", () => {
  for (const [name, [behaviour, call]] of Object.entries(echoes)) {
    live(`K1: the key is nowhere when the upstream echoes it: ${name}`, () =>
      Effect.gen(function*() {
        const fake = yield* FakeOpenAi.make()
        if ("status" in behaviour) yield* fake.script("*", Array<FakeProvider.Answer>(4).fill(behaviour))
        else yield* fake.set("*", behaviour)
        // The first refusal is the last: its own words are what the caller sees.
        const heard = yield* overheard([calls[call]], {
          baseUrl: fake.baseUrl,
          strategy: "sequential-then-rotate",
          rotations: 0,
          ...once
        })
        assert.isAbove((yield* fake.requests).filter(({ key }) => key === secret).length, 0)
        assert.isAbove(heard.failures.length, 0, "it must fail")
        assert.isTrue(heard.failures.every((failure) => failure instanceof Error))
        assert.include(heard.texts.join(), Scrub.placeholder, "it must have been echoed")
        assert.isAbove(heard.events.length, 2)
        assert.isAbove(heard.logs.length, 2)
        for (const text of [...heard.texts, ...heard.logs]) assertClean(text, name)
      }))
  }

  const throwers: Readonly<Record<string, () => unknown>> = {
    "an Error": () => Object.assign(new Error(`cannot send ${secret}`), { request: { headers: { secret } } }),
    "a chain of causes": () => new TypeError("fetch failed", { cause: new Error("x", { cause: new Error(secret) }) }),
    "several at once": () => new AggregateError([new Error(secret), new Error("b")], `all of ${secret}`),
    "a DOMException": () => new DOMException(`bad ${secret}`, "NetworkError"),
    "a text": () => `cannot send ${secret}`,
    "an object": () => ({ message: secret, secret })
  }
  for (const [name, make] of Object.entries(throwers)) {
    live(`K1: the key is nowhere when the transport throws it: ${name}`, () =>
      Effect.gen(function*() {
        const fetch: Transport = () => Promise.reject(make())
        const heard = yield* overheard([calls.chat], { keys: [secret], fetch, ...once })
        assert.isAbove(heard.failures.length, 0)
        for (const text of [...heard.texts, ...heard.logs]) assertClean(text, name)
      }))
  }

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
      }).pipe(Effect.scoped),
    60_000
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
    }).pipe(Effect.scoped), 60_000)

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
