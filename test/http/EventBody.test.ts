import { assert, describe, it } from "@effect/vitest"
import type * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as TestClock from "effect/TestClock"
import type * as Fault from "../../src/Fault.js"
import * as EventBody from "../../src/http/EventBody.js"
import { openAi } from "../../src/providers/Providers.js"

const secret = "sk-to/ken+0123456789"

const data = (value: unknown): string => `data: ${JSON.stringify(value)}\n\n`
const role = data({ choices: [{ delta: { role: "assistant", content: "" } }] })
const words = (text: string): string => data({ choices: [{ delta: { content: text } }] })
const failed = data({ error: { message: "gone", type: "server_error", code: null } })
const ping = ": ping\n\n"
const done = "data: [DONE]\n\n"

const encode = (text: string): Uint8Array => new TextEncoder().encode(text)

/** A reader of given chunks, each asked for; an `Error` among them is thrown, `undefined` never comes. */
const reading = (chunks: ReadonlyArray<Uint8Array | Error | undefined>) => {
  const queue = [...chunks]
  const log = { pulled: 0, cancelled: false }
  const body = new ReadableStream<Uint8Array>({
    pull: (controller) => {
      if (queue.length === 0) return controller.close()
      log.pulled++
      const next = queue.shift()
      if (next === undefined) return new Promise(() => {})
      if (next instanceof Error) throw next
      controller.enqueue(next)
      return undefined
    },
    cancel: () => {
      log.cancelled = true
    }
  }, { highWaterMark: 0 })
  return { reader: body.getReader(), log }
}

/** A text in pieces, cut at these fractions of it, also inside characters. */
const pieces = (text: string, cuts: ReadonlyArray<number>): ReadonlyArray<Uint8Array> => {
  const bytes = encode(text)
  const edges = [0, ...cuts.map((cut) => Math.floor(cut * bytes.length)).sort((a, b) => a - b), bytes.length]
  return edges.slice(1).flatMap((edge, index) => {
    const piece = bytes.slice(edges[index], edge)
    return piece.length === 0 ? [] : [piece]
  })
}

const cuts = FastCheck.array(FastCheck.double({ min: 0, max: 1, noNaN: true }), { maxLength: 12 })

const open = (
  chunks: ReadonlyArray<Uint8Array | Error | undefined>,
  limits: Partial<EventBody.Limits> = {}
) => {
  const { log, reader } = reading(chunks)
  return Effect.map(
    EventBody.open(openAi, reader, new Headers(), { ...EventBody.defaultLimits, ...limits }, secret),
    (opened) => ({ opened, log, reader })
  )
}

/** Opens a body and hands it on; notes what its listener hears. */
const handedOn = (chunks: ReadonlyArray<Uint8Array | Error | undefined>, limits?: Partial<EventBody.Limits>) =>
  Effect.map(open(chunks, limits), ({ log, opened, reader }) => {
    if (opened._tag === "Failed") throw new Error(`it failed: ${opened.fault.kind}`)
    const heard = {
      late: new Array<Fault.Fault>(),
      errors: new Array<unknown>(),
      ended: 0,
      reading: new Array<boolean>()
    }
    const body = EventBody.rest(openAi, reader, new Headers(), opened, secret, () => 0, {
      late: (fault, error) => {
        heard.late.push(fault)
        heard.errors.push(error)
      },
      ended: () => {
        heard.ended++
      },
      reading: (active) => heard.reading.push(active)
    })
    return { body, heard, log }
  })

const all = (body: ReadableStream<Uint8Array>) =>
  Effect.tryPromise({ try: () => new Response(body).text(), catch: (error) => error })

const heldText = (held: ReadonlyArray<Uint8Array>): string =>
  new TextDecoder().decode(Buffer.concat(held.map((chunk) => Buffer.from(chunk))))

const kinds = (faults: ReadonlyArray<Fault.Fault>) => faults.map(({ kind }) => kind)

describe("open", () => {
  it.effect("S2: reads up to the chunk with the first content, and no further", () =>
    Effect.gen(function*() {
      const { log, opened } = yield* open([encode(role), encode(ping), encode(words("a")), encode(words("b"))])
      assert.strictEqual(opened._tag, "Opened")
      assert.strictEqual(heldText(opened.held), role + ping + words("a"))
      assert.strictEqual(log.pulled, 3)
    }))

  it.effect.prop(
    "S2: an error before content fails, however its chunks are cut; after content it does not",
    [cuts, FastCheck.boolean(), FastCheck.boolean()],
    ([at, pinged, after]) =>
      Effect.gen(function*() {
        const text = (pinged ? ping : "") + role + (after ? words("ü") : "") + failed
        const { opened } = yield* open(pieces(text, at))
        assert.strictEqual(opened._tag, after ? "Opened" : "Failed")
        if (opened._tag === "Failed") assert.strictEqual(opened.fault.kind, "ServerError")
      }),
    { timeout: 60_000 }
  )

  it.effect("S2: a named error event, and a failed response, are errors; so is a response that fails at once", () =>
    Effect.gen(function*() {
      const faults: Array<string> = []
      for (
        const text of [
          `event: error\n${data({ type: "error", code: "rate_limit_exceeded", message: "slow" })}`,
          `event: response.created\n${data({ type: "response.created", response: { error: null } })}` +
          `event: response.failed\n${
            data({ type: "response.failed", response: { error: { code: "server_error", message: "x" } } })
          }`
        ]
      ) {
        const { opened } = yield* open([encode(text)])
        if (opened._tag === "Failed") faults.push(opened.fault.kind)
      }
      assert.deepStrictEqual(faults, ["RateLimited", "ServerError"])
    }))

  it.effect("S2: a body without content is a cut one", () =>
    Effect.gen(function*() {
      for (const chunks of [[], [encode(ping)], [encode(role)], [encode(words("a").slice(0, 20))]]) {
        const { opened } = yield* open(chunks)
        assert.deepInclude(opened, { _tag: "Failed" })
        if (opened._tag === "Failed") assert.deepInclude(opened.fault, { kind: "Network", code: "stream_cut" })
      }
      const { opened } = yield* open([encode(done)])
      assert.strictEqual(opened._tag, "Opened")
    }))

  it.effect("S2: at most 64 events are held back", () =>
    Effect.gen(function*() {
      const { log, opened } = yield* open(Array.from({ length: 100 }, () => encode(ping)))
      assert.strictEqual(opened._tag, "Opened")
      assert.strictEqual(log.pulled, 64)
      const fewer = yield* open(Array.from({ length: 100 }, () => encode(ping)), { events: 3 })
      assert.strictEqual(fewer.log.pulled, 3)
    }))

  it.effect("S2: at most 256 KiB are held back", () =>
    Effect.gen(function*() {
      const large = encode(`: ${"x".repeat(64 * 1024)}`)
      const { log, opened } = yield* open(Array.from({ length: 10 }, () => large))
      assert.strictEqual(opened._tag, "Opened")
      assert.strictEqual(log.pulled, 4)
    }))

  it.effect("S2: and for 5 seconds, whether pings come or nothing does; the read under way is not lost", () =>
    Effect.gen(function*() {
      for (const [millis, limits] of [[5_000, {}], [700, { millis: 700 }]] as const) {
        const fiber = yield* Effect.fork(open([encode(ping), undefined], limits))
        yield* TestClock.adjust(Duration.millis(millis - 1))
        // Reads are promises of the platform: they need a turn of its own loop.
        yield* turn
        yield* TestClock.adjust(0)
        assert.strictEqual((yield* Fiber.poll(fiber))._tag, "None", `too early for ${millis}`)
        yield* TestClock.adjust(1)
        yield* turn
        const { opened } = yield* Fiber.join(fiber)
        assert.deepInclude(opened, { _tag: "Opened", ended: false })
        if (opened._tag === "Opened") assert.instanceOf(opened.pending, Promise)
      }
    }))

  it.effect("F3: the 5 seconds are not stretched by a wall clock that is set back", () =>
    Effect.gen(function*() {
      const clock = yield* Effect.clock
      let looks = 0
      const setBack: Clock.Clock = Object.assign(Object.create(clock), {
        unsafeCurrentTimeMillis: () => -60_000 * ++looks,
        unsafeCurrentTimeNanos: () => clock.unsafeCurrentTimeNanos()
      })
      const fiber = yield* Effect.fork(Effect.withClock(open([encode(ping), undefined]), setBack))
      yield* turn
      yield* TestClock.adjust("5 seconds")
      yield* turn
      assert.strictEqual((yield* Fiber.poll(fiber))._tag, "Some")
    }))

  it.effect("what the reader throws is the failure", () =>
    Effect.gen(function*() {
      const broken = new Error("terminated")
      const exit = yield* Effect.exit(open([encode(ping), broken]))
      assert.deepStrictEqual(exit, Exit.fail(broken))
    }))
})

const turn = Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))

describe("rest", () => {
  const texts = FastCheck.array(
    FastCheck.oneof(
      FastCheck.constantFrom(
        ping,
        role,
        "event: x\r\ndata: {}\r\n\r\n",
        "data: no json\n\n",
        words(`it is ${secret}`),
        words(`\\"error\\" ${encodeURIComponent(secret)} ${secret.slice(0, 5)}`),
        data({ type: "response.output_text.delta", delta: `it is ${secret}`, error: null }),
        words("grüße 𝄞")
      ),
      FastCheck.string().map(words)
    ),
    { maxLength: 8 }
  ).map((events) => words("first") + events.join("") + done)

  it.effect.prop(
    "K1, S4: content passes unchanged, byte by byte, however its chunks are cut",
    [texts, cuts],
    ([text, at]) =>
      Effect.gen(function*() {
        const { body, heard } = yield* handedOn(pieces(text, at))
        assert.strictEqual(yield* all(body), text)
        assert.deepStrictEqual(kinds(heard.late), [])
        assert.strictEqual(heard.ended, 1)
      }),
    { fastCheck: { numRuns: 200 }, timeout: 60_000 }
  )

  const forms = [secret, encodeURIComponent(secret)]

  it.effect.prop(
    "K1: the secret is taken out of errors, however their chunks are cut; all else passes",
    [cuts, FastCheck.array(FastCheck.oneof(FastCheck.constantFrom(...forms, "schlüssel", "𝄞"), FastCheck.string()))],
    ([at, parts]) =>
      Effect.gen(function*() {
        const before = words(`mine is ${secret}`)
        const error = data({ error: { message: parts.join(" "), code: secret } })
        const { body, heard } = yield* handedOn(pieces(before + error, at))
        const text = yield* all(body)
        assert.isTrue(text.startsWith(before))
        const rest = text.slice(before.length)
        for (const form of forms) assert.notInclude(rest, form)
        assert.strictEqual(rest, forms.reduce((clean, form) => clean.replaceAll(form, "[redacted]"), error))
        assert.deepStrictEqual(kinds(heard.late), ["ServerError"])
        assert.notInclude(JSON.stringify(heard.late), secret)
        assert.strictEqual(heard.ended, 1)
      }),
    { fastCheck: { numRuns: 200 }, timeout: 60_000 }
  )

  it.effect("S4: chunks are asked for one by one, when the consumer reads", () =>
    Effect.gen(function*() {
      const { body, heard, log } = yield* handedOn([words("a"), words("b"), words("c"), done].map(encode))
      assert.strictEqual(log.pulled, 1)
      const reader = body.getReader()
      for (const pulled of [1, 2, 3]) {
        yield* Effect.promise(() => reader.read())
        yield* turn
        assert.strictEqual(log.pulled, pulled)
      }
      assert.deepStrictEqual(heard.reading, [true, false, true, false, true, false])
      assert.strictEqual(heard.ended, 0)
    }))

  it.effect("S1: cancelling ends it, once, and cancels what is underneath", () =>
    Effect.gen(function*() {
      const { body, heard, log } = yield* handedOn([words("a"), words("b")].map(encode))
      yield* Effect.promise(() => body.cancel())
      assert.isTrue(log.cancelled)
      assert.strictEqual(heard.ended, 1)
      assert.deepStrictEqual(kinds(heard.late), [])
    }))

  it.effect("S3: without its terminator it was cut: a fault for the pool, an end for the consumer", () =>
    Effect.gen(function*() {
      const tails: ReadonlyArray<readonly [string, ReadonlyArray<Fault.Kind>]> = [
        ["", ["Network"]],
        ["data: [DO", ["Network"]],
        [done, []],
        ["data: [DONE]", []],
        ["data: [DONE]\n", []]
      ]
      for (const [tail, expected] of tails) {
        const { body, heard } = yield* handedOn([encode(words("a") + tail)])
        assert.strictEqual(yield* all(body), words("a") + tail)
        assert.deepStrictEqual(kinds(heard.late), [...expected], tail)
        assert.strictEqual(heard.ended, 1)
      }
      const completed = `event: response.completed\n${data({ type: "response.completed" })}`
      const { heard, body } = yield* handedOn([encode(words("a") + completed)])
      yield* all(body)
      assert.deepStrictEqual(kinds(heard.late), [])
    }))

  it.effect("S3: what breaks it reaches the consumer, clean of the secret", () =>
    Effect.gen(function*() {
      const { body, heard } = yield* handedOn([encode(words("a")), new TypeError(`terminated ${secret}`)])
      const error = yield* Effect.flip(all(body))
      assert.instanceOf(error, TypeError)
      assert.propertyVal(error, "message", "terminated [redacted]")
      assert.deepStrictEqual(kinds(heard.late), ["Network"])
      assert.deepStrictEqual(heard.errors, [error])
      assert.strictEqual(heard.ended, 1)
    }))

  it.effect("C5: an abort is nobody's fault", () =>
    Effect.gen(function*() {
      const abort = new DOMException("This operation was aborted", "AbortError")
      const { body, heard } = yield* handedOn([encode(words("a")), abort])
      assert.propertyVal(yield* Effect.flip(all(body)), "name", "AbortError")
      assert.deepStrictEqual(kinds(heard.late), [])
      assert.strictEqual(heard.ended, 1)
    }))

  it.effect("a body that was handed on while a read was under way loses nothing", () =>
    Effect.gen(function*() {
      const { body } = yield* handedOn([ping, ping, words("a"), done].map(encode), { events: 1 })
      assert.strictEqual(yield* all(body), ping + ping + words("a") + done)
      let release: (chunk: Uint8Array) => void = () => {}
      const late = new Promise<Uint8Array>((resolve) => {
        release = resolve
      })
      const stream = new ReadableStream<Uint8Array>({
        start: async (controller) => {
          controller.enqueue(await late)
          controller.close()
        }
      })
      const reader = stream.getReader()
      const limits = { ...EventBody.defaultLimits, millis: 0 }
      const fiber = yield* Effect.fork(EventBody.open(openAi, reader, new Headers(), limits, secret))
      yield* TestClock.adjust(1)
      const opened = yield* Fiber.join(fiber)
      if (opened._tag !== "Opened") return assert.fail("it failed")
      const rest = EventBody.rest(openAi, reader, new Headers(), opened, secret, () => 0, {
        late: () => {},
        ended: () => {},
        reading: () => {}
      })
      release(encode(words("late") + done))
      assert.strictEqual(yield* all(rest), words("late") + done)
    }))

  it.effect("K1: of an event that the end cuts off, only what may be an error is scrubbed", () =>
    Effect.gen(function*() {
      const error = failed.replace("gone", `gone ${secret}`).trimEnd()
      const { body } = yield* handedOn([encode(words("a")), encode(error)])
      assert.strictEqual(yield* all(body), words("a") + error.replace(secret, "[redacted]"))
      const content = words(`the key is ${secret}`).trimEnd()
      const other = yield* handedOn([encode(words("a")), encode(content)])
      assert.strictEqual(yield* all(other.body), words("a") + content)
    }))

  it.effect("an event that goes on and on is not kept: it passes", () =>
    Effect.gen(function*() {
      const long = `data: {"choices":[{"delta":{"content":"${secret}${"x".repeat(300_000)}"}}]}\n\n`
      const { body } = yield* handedOn(pieces(words("a") + long + done, [0.2, 0.4, 0.9]))
      assert.strictEqual(yield* all(body), words("a") + long + done)
    }))
})
