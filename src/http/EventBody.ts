/**
 * The body of an event stream: read up to its first content, so that what fails before can be tried elsewhere; then
 * handed on as it arrives, watched for a late error and for its proper end.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import type * as Fault from "../Fault.js"
import * as MonotonicTime from "../MonotonicTime.js"
import type { Provider } from "../providers/Provider.js"
import * as Checks from "../Settings.js"
import * as Classifier from "./Classifier.js"
import * as Scrub from "./Scrub.js"
import * as Sse from "./Sse.js"

/**
 * A body that has been read up to its first content. `rest` reads on; `held` is what was read so far.
 *
 * @since 0.1.0
 * @category models
 */
export interface Opened {
  readonly _tag: "Opened"
  readonly held: ReadonlyArray<Uint8Array>
  readonly parser: Sse.SseState
  /** A read that is under way: its chunk comes first. */
  readonly pending: Promise<Read> | undefined
  readonly ended: boolean
}

/**
 * A body that failed before its first content; `held` is what came up to the end of the error.
 *
 * @since 0.1.0
 * @category models
 */
export interface Failed {
  readonly _tag: "Failed"
  readonly held: ReadonlyArray<Uint8Array>
  readonly fault: Fault.Fault
}

/**
 * @since 0.1.0
 * @category models
 */
export type Read = ReadableStreamReadResult<Uint8Array>

/**
 * How much may be held back: events, bytes, and milliseconds after the headers.
 *
 * @since 0.1.0
 * @category models
 */
export interface Limits {
  readonly events: number
  readonly bytes: number
  readonly millis: number
}

/**
 * 64 events, 256 KiB, 5 seconds.
 *
 * @since 0.1.0
 * @category getters
 */
export const defaultLimits: Limits = { events: 64, bytes: 256 * 1024, millis: 5_000 }

/**
 * Checks limits, and fills in the defaults; `Infinity` is none.
 *
 * @since 0.1.0
 * @category checks
 */
export const limitsOf = (limits: unknown, path: string): Checks.Checked<Limits> =>
  Either.gen(function*() {
    if (limits === undefined) return defaultLimits
    yield* Checks.refuseUnknown(limits, Object.keys(defaultLimits), path)
    const given = Object.entries(limits as object).filter(([, value]) => value !== undefined)
    for (const [name, value] of given) {
      if (typeof value !== "number" || !(value >= 0)) {
        return yield* Checks.refuse(`${path}.${name}`, "must be a number of at least 0")
      }
    }
    return { ...defaultLimits, ...Object.fromEntries(given) }
  })

/**
 * Reads up to the first content, or as much as may be held back. Fails with what `read` threw.
 *
 * @since 0.1.0
 * @category constructors
 */
export const open = Effect.fnUntraced(function*(
  provider: Provider,
  reader: ReadableStreamDefaultReader<Uint8Array>,
  headers: Headers,
  limits: Limits,
  secret: string
) {
  const started = yield* MonotonicTime.now
  const held: Array<Uint8Array> = []
  let parser = Sse.initial
  let bytes = 0
  let events = 0
  for (;;) {
    const left = limits.millis - ((yield* MonotonicTime.now) - started)
    const pending = reader.read()
    const read = yield* Effect.raceFirst(
      Effect.tryPromise({ try: () => pending, catch: (error) => error }),
      Effect.as(Effect.sleep(Math.max(0, Math.ceil(left))), undefined)
    )
    if (read === undefined) return { _tag: "Opened", held, parser, pending, ended: false } satisfies Opened
    const [completed, next] = read.done ? [lastOf(parser), parser] : Sse.feed(parser, read.value)
    parser = next
    if (!read.done) {
      held.push(read.value)
      bytes += read.value.byteLength
    }
    for (const event of completed) {
      const reading = Sse.firstContent(provider.grammar, event)
      // What its end cuts off is no content: readers drop it.
      if (reading === "lifecycle" || (reading === "content" && !event.complete)) continue
      if (reading !== "error") {
        return { _tag: "Opened", held, parser, pending: undefined, ended: read.done } satisfies Opened
      }
      return {
        _tag: "Failed",
        held: upTo(held, event.end),
        fault: yield* Effect.clockWith((clock) =>
          Effect.succeed(
            faultOf(provider, event, headers, "before-content", secret, clock.unsafeCurrentTimeMillis()) ??
              Classifier.cut
          )
        )
      } satisfies Failed
    }
    // Nothing at all, or nothing but the overture: whatever it was, it was cut.
    if (read.done) return { _tag: "Failed", held, fault: Classifier.cut } satisfies Failed
    events += completed.length
    if (events >= limits.events || bytes >= limits.bytes) {
      return { _tag: "Opened", held, parser, pending: undefined, ended: false } satisfies Opened
    }
  }
})

/**
 * Who is told what becomes of a body that is handed on.
 *
 * @since 0.1.0
 * @category models
 */
export interface Listener {
  /** It failed after its beginning had been handed on; `error` is what its reader gets, if that is thrown. */
  readonly late: (fault: Fault.Fault, error?: unknown) => void
  /** It is over: read to its end, failed, or cancelled. Told once. */
  readonly ended: () => void
  /** The data of each event, before it is handed on; absent: nobody asks. */
  readonly heard?: ((data: string) => void) | undefined
  /** A read begins, or is over. */
  readonly reading: (active: boolean) => void
}

/**
 * The rest of an opened body as a stream: chunks pass as they arrive, when they are asked for. Of an event that is an
 * error, the secret is taken out; nothing else is changed.
 *
 * @since 0.1.0
 * @category constructors
 */
export const rest = (
  provider: Provider,
  reader: ReadableStreamDefaultReader<Uint8Array>,
  headers: Headers,
  opened: Opened,
  secret: string,
  clock: () => number,
  listener: Listener
): ReadableStream<Uint8Array> => {
  const scrubError = Scrub.error(secret)
  let watch = watchFrom(secret)
  let pending = opened.pending
  let over = false
  const queue = [...opened.held]
  const end = () => {
    if (over) return
    over = true
    listener.ended()
  }
  const take = (chunk: Uint8Array): ReadonlyArray<Uint8Array> => {
    const step = feed(provider, watch, chunk, listener.heard)
    watch = step.watch
    for (const event of step.errors) {
      const fault = faultOf(provider, event, headers, "after-content", secret, clock())
      if (fault !== undefined) listener.late(fault)
    }
    return step.out
  }
  return new ReadableStream<Uint8Array>({
    pull: async (controller) => {
      listener.reading(true)
      try {
        for (;;) {
          const held = queue.shift()
          const read: Read = held !== undefined
            ? { done: false, value: held }
            : opened.ended
            ? { done: true, value: undefined }
            : await (pending ?? reader.read())
          if (held === undefined) pending = undefined
          // Cancelled meanwhile: that ends a read, and cuts nothing.
          if (over) return
          if (read.done) {
            const [last] = lastOf(watch.parser)
            const left = flush(watch, last)
            if (left !== undefined) controller.enqueue(left)
            // Some leave out the blank line behind the terminator.
            const terminated = watch.terminated ||
              (last?.data !== undefined && provider.ends(last.event, last.data))
            if (!terminated && !watch.failed) listener.late(Classifier.cut)
            end()
            controller.close()
            return
          }
          const out = take(read.value)
          for (const chunk of out) controller.enqueue(chunk)
          if (out.length > 0) return
        }
      } catch (error) {
        if (over) return
        const fault = Classifier.classifyThrown(error)
        const clean = scrubError(error)
        if (fault !== "cancelled") listener.late(fault, clean)
        end()
        controller.error(clean)
      } finally {
        listener.reading(false)
      }
    },
    cancel: (reason) => {
      end()
      return reader.cancel(reason)
    }
  }, { highWaterMark: 0 })
}

/** What is known of a body between two chunks. `held` are bytes that may show the secret inside an error. */
interface Watch {
  readonly parser: Sse.SseState
  readonly held: Uint8Array
  readonly secrets: ReadonlyArray<Uint8Array>
  readonly scrub: (bytes: Uint8Array) => Uint8Array
  readonly scrubCut: (bytes: Uint8Array) => Uint8Array
  readonly terminated: boolean
  readonly failed: boolean
}

const watchFrom = (secret: string): Watch => ({
  parser: Sse.initial,
  held: none,
  secrets: Scrub.forms(secret).map((form) => encoder.encode(form)),
  scrub: Scrub.bytes(secret),
  scrubCut: (bytes) => encoder.encode(Scrub.cutText(secret)(decoder.decode(bytes))),
  terminated: false,
  failed: false
})

interface Fed {
  readonly watch: Watch
  readonly out: ReadonlyArray<Uint8Array>
  readonly errors: ReadonlyArray<Sse.SseEvent>
}

/**
 * Takes a chunk and says what of it may pass. Everything passes at once, but for bytes that look like the secret: those
 * wait until their event is complete, so that its kind is known.
 */
const feed = (provider: Provider, watch: Watch, chunk: Uint8Array, heard: Listener["heard"]): Fed => {
  const [events, parser] = Sse.feed(watch.parser, chunk)
  const bytes = watch.held.byteLength === 0 ? chunk : concat(watch.held, chunk)
  // The offset in the stream of the first byte that has not passed.
  const offset = parser.offset - bytes.byteLength
  const out: Array<Uint8Array> = []
  const errors: Array<Sse.SseEvent> = []
  let passed = 0
  let terminated = watch.terminated
  for (const event of events) {
    if (heard !== undefined && event.data !== undefined) heard(event.data)
    if (event.data !== undefined && provider.ends(event.event, event.data)) terminated = true
    if (!looksLikeError(event) || Sse.firstContent(provider.grammar, event) !== "error") continue
    errors.push(event)
    const from = Math.max(0, event.start - offset)
    const to = event.end - offset
    if (from > passed) out.push(bytes.subarray(passed, from))
    out.push(watch.scrub(bytes.subarray(from, to)))
    passed = to
  }
  const open = Math.max(passed, parser.start - offset)
  const suspect = firstSuspect(bytes, open, watch.secrets)
  const held = suspect < 0 || bytes.byteLength - suspect > maxHeld ? none : bytes.slice(suspect)
  const until = bytes.byteLength - held.byteLength
  if (until > passed) out.push(bytes.subarray(passed, until))
  return {
    watch: { ...watch, parser, held, terminated, failed: watch.failed || errors.length > 0 },
    out,
    errors
  }
}

/** What was held when the body ended: part of an event, which may be content as well as an error. */
const flush = (watch: Watch, last: Sse.SseEvent | undefined): Uint8Array | undefined => {
  if (watch.held.byteLength === 0) return undefined
  return last !== undefined && looksLikeError(last) ? watch.scrubCut(watch.held) : watch.held
}

/** Parsing each event would cost more than all the rest; an error names itself. */
const looksLikeError = (event: Sse.SseEvent): boolean =>
  event.event === "error" || (event.data !== undefined &&
    (event.data.includes("\"error\"") || event.data.includes("\"response.failed\"")))

/** Where, from `from` on, a secret starts, or may start at the end of the bytes. */
const firstSuspect = (bytes: Uint8Array, from: number, secrets: ReadonlyArray<Uint8Array>): number => {
  for (let at = from; at < bytes.byteLength; at++) {
    for (const secret of secrets) {
      if (bytes[at] !== secret[0]) continue
      const length = Math.min(secret.byteLength, bytes.byteLength - at)
      let same = 1
      while (same < length && bytes[at + same] === secret[same]) same++
      if (same === length) return at
    }
  }
  return -1
}

const lastOf = (parser: Sse.SseState): ReadonlyArray<Sse.SseEvent> => {
  const last = Sse.finish(parser)
  return last === undefined ? [] : [last]
}

/** Scrubbed first: what was echoed may stand where a code is looked for. */
const faultOf = (
  provider: Provider,
  event: Sse.SseEvent,
  headers: Headers,
  streaming: Classifier.Phase,
  secret: string,
  now: number
): Fault.Fault | undefined =>
  Classifier.classifyEvent(
    provider.dialect,
    { event: event.event, data: event.data === undefined ? undefined : Scrub.text(secret)(event.data) },
    { headers: Scrub.values(secret)(headers), now, streaming }
  )

/** The first so many bytes of all chunks. */
const upTo = (chunks: ReadonlyArray<Uint8Array>, end: number): ReadonlyArray<Uint8Array> => {
  let before = 0
  return chunks.flatMap((chunk) => {
    const taken = chunk.subarray(0, Math.max(0, end - before))
    before += chunk.byteLength
    return taken.byteLength === 0 ? [] : [taken]
  })
}

const concat = (a: Uint8Array, b: Uint8Array): Uint8Array => {
  const joined = new Uint8Array(a.byteLength + b.byteLength)
  joined.set(a)
  joined.set(b, a.byteLength)
  return joined
}

const none = new Uint8Array(0)
const encoder = new TextEncoder()
const decoder = new TextDecoder()
/** An event that goes on and on is not waited for: it passes. */
const maxHeld = 256 * 1024
