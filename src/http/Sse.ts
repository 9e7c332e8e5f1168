/**
 * Server-sent events: an incremental parser, as a pure state machine over bytes.
 *
 * It works on bytes, so that chunks may be cut anywhere (inside a character, inside a line end), and it tells for each
 * event which bytes it came from, so that a caller who holds bytes back can hand on exactly those.
 *
 * @since 0.1.0
 */
import type { StreamGrammar, StreamReading } from "../providers/Provider.js"

/**
 * One event, or one block of comments (a ping).
 *
 * @since 0.1.0
 * @category models
 */
export interface SseEvent {
  /** The `event:` line; absent when there was none. */
  readonly event: string | undefined
  /** The `data:` lines, joined by a line feed; absent when there was none, or when the event is oversized. */
  readonly data: string | undefined
  /** Whether the event is larger than the limit, so that its data was not kept. */
  readonly oversized: boolean
  /** Whether its closing blank line arrived; false only for what `finish` gives. */
  readonly complete: boolean
  /** Offset of its first byte in the stream. Each event starts where the one before ended. */
  readonly start: number
  /** Offset after its last byte. */
  readonly end: number
}

/**
 * The parser between two chunks.
 *
 * @since 0.1.0
 * @category models
 */
export interface SseState {
  /** Bytes that an event may keep. */
  readonly limit: number
  /** Bytes seen so far. */
  readonly offset: number
  /** Where the current event starts. */
  readonly start: number
  /** Pieces of the line that has no end yet, the latest first. */
  readonly line: Pieces | undefined
  /** Length of that line so far, whether kept or not. */
  readonly lineLength: number
  /** Whether that line is a comment, of which nothing is kept. */
  readonly comment: boolean
  /** Whether that line is the first of the stream, which may begin with a byte order mark. */
  readonly first: boolean
  /** Whether the last byte was a CR, so that a LF now belongs to it. */
  readonly afterCr: boolean
  /** Whether the current block has any line. */
  readonly begun: boolean
  readonly event: string | undefined
  readonly data: string | undefined
  /** Bytes kept of the current event. */
  readonly kept: number
  readonly oversized: boolean
}

/**
 * The largest event whose data is kept, in bytes: 256 KiB.
 *
 * @since 0.1.0
 * @category constants
 */
export const defaultLimit = 256 * 1024

/**
 * A parser at the start of a stream that keeps at most `limit` bytes of an event.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (limit: number): SseState => ({
  limit,
  offset: 0,
  start: 0,
  line: undefined,
  lineLength: 0,
  comment: false,
  first: true,
  afterCr: false,
  begun: false,
  event: undefined,
  data: undefined,
  kept: 0,
  oversized: false
})

/**
 * A parser at the start of a stream, with the default limit.
 *
 * @since 0.1.0
 * @category constructors
 */
export const initial: SseState = make(defaultLimit)

/**
 * Takes the next chunk and gives the events that it completes. Text counts as its UTF-8 bytes; cut text only between
 * characters.
 *
 * Line ends may be CRLF, CR or LF. When a chunk ends between the CR and the LF of an event's blank line, the event is
 * given at once and the LF counts to the next one.
 *
 * @since 0.1.0
 * @category combinators
 */
export const feed = (state: SseState, chunk: Uint8Array | string): readonly [ReadonlyArray<SseEvent>, SseState] => {
  const bytes = typeof chunk === "string" ? encoder.encode(chunk) : chunk
  const events: Array<SseEvent> = []
  let current = state
  let from = 0
  let i = 0
  if (current.afterCr && bytes.length > 0) {
    if (bytes[0] === LF) {
      from = 1
      i = 1
    }
    current = { ...current, afterCr: false }
  }
  for (; i < bytes.length; i++) {
    const byte = bytes[i]
    if (byte !== LF && byte !== CR) continue
    const [next, blank] = endLine(current, bytes.subarray(from, i))
    const afterCr = byte === CR && i + 1 === bytes.length
    if (byte === CR && bytes[i + 1] === LF) i++
    from = i + 1
    current = afterCr ? { ...next, afterCr } : next
    if (blank && next.begun) {
      const end = state.offset + from
      events.push(eventOf(next, end, true))
      current = { ...make(state.limit), first: false, start: end, afterCr }
    }
  }
  return [events, { ...grow(current, bytes.subarray(from)), offset: state.offset + bytes.length }]
}

/**
 * What is left when the stream ends: an event whose closing blank line never came, or bytes that belong to no event.
 * Readers that follow the standard drop it; an error may still be read from it.
 *
 * @since 0.1.0
 * @category getters
 */
export const finish = (state: SseState): SseEvent | undefined => {
  if (state.start === state.offset) return undefined
  const last = state.lineLength === 0 ? state : endLine(state, empty)[0]
  return eventOf(last, state.offset, false)
}

/**
 * What an event means to somebody who waits for the first content. Pings and comments are `lifecycle`; events too large
 * to keep, and events that are no JSON, are `content`: they belong to the caller.
 *
 * @since 0.1.0
 * @category getters
 */
export const firstContent = (
  grammar: StreamGrammar,
  event: Pick<SseEvent, "event" | "data"> & { readonly oversized?: boolean }
): StreamReading => {
  if (event.event === "error") return "error"
  if (event.oversized === true) return "content"
  const data = event.data?.trim()
  if (data === undefined || data === "") return "lifecycle"
  if (data === "[DONE]") return "done"
  let parsed: unknown
  try {
    parsed = JSON.parse(data)
  } catch {
    return event.event === "ping" ? "lifecycle" : "content"
  }
  return grammar.read(event.event, parsed)
}

interface Pieces {
  readonly bytes: Uint8Array
  readonly before: Pieces | undefined
}

const LF = 10
const CR = 13
const COLON = 58
const empty = new Uint8Array(0)
const encoder = new TextEncoder()
// A byte order mark is dropped by hand: only the first of the stream is one.
const decoder = new TextDecoder("utf-8", { ignoreBOM: true })

const eventOf = (state: SseState, end: number, complete: boolean): SseEvent => ({
  event: state.event,
  data: state.data,
  oversized: state.oversized,
  complete,
  start: state.start,
  end
})

/** Adds the beginning of a line that is not complete yet; what would pass the limit is counted, not kept. */
const grow = (state: SseState, bytes: Uint8Array): SseState => {
  if (bytes.length === 0) return state
  const comment = state.lineLength === 0 ? bytes[0] === COLON : state.comment
  const lineLength = state.lineLength + bytes.length
  const begun = { ...state, comment, lineLength }
  if (comment) return begun
  const sized = fits(state, lineLength) ? begun : dropData(begun)
  if (sized.oversized && lineLength > maxName) return { ...sized, line: undefined }
  // Copied, because the chunk belongs to the caller.
  return { ...sized, line: push(state.line, bytes.slice()) }
}

const fits = (state: SseState, lineLength: number): boolean =>
  !state.oversized && state.kept + lineLength <= state.limit

const dropData = (state: SseState): SseState => ({ ...state, oversized: true, data: undefined, kept: 0 })

/** Joins pieces of like size as they come, so that many tiny chunks cost neither square time nor an object per byte. */
const push = (pieces: Pieces | undefined, bytes: Uint8Array): Pieces => {
  let last = bytes
  let before = pieces
  while (before !== undefined && before.bytes.length <= last.length) {
    last = concat(before.bytes, last)
    before = before.before
  }
  return { bytes: last, before }
}

const concat = (a: Uint8Array, b: Uint8Array): Uint8Array => {
  const out = new Uint8Array(a.length + b.length)
  out.set(a)
  out.set(b, a.length)
  return out
}

const join = (pieces: Pieces | undefined, tail: Uint8Array): Uint8Array => {
  let out = tail
  for (let piece = pieces; piece !== undefined; piece = piece.before) out = concat(piece.bytes, out)
  return out
}

/** Takes in the line that ends here, and tells whether it is blank. */
const endLine = (state: SseState, tail: Uint8Array): readonly [SseState, boolean] => {
  const length = state.lineLength + tail.length
  const done = { ...state, line: undefined, lineLength: 0, comment: false, first: false }
  if (length === 0) return [done, true]
  const comment = state.lineLength === 0 ? tail[0] === COLON : state.comment
  if (comment) return [{ ...done, begun: true }, false]
  const sized = fits(state, length) ? { ...done, begun: true } : dropData({ ...done, begun: true })
  // An event that is too large still gets its name: that line is short.
  if (sized.oversized && length > maxName) return [sized, false]
  const text = decoder.decode(join(state.line, tail))
  const line = state.first && text.startsWith("\uFEFF") ? text.slice(1) : text
  if (line === "") return [done, true]
  const colon = line.indexOf(":")
  const field = colon < 0 ? line : line.slice(0, colon)
  const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1)
  if (field === "event") return [{ ...sized, event: value.slice(0, maxName) }, false]
  if (field !== "data" || sized.oversized) return [sized, false]
  const data = state.data === undefined ? value : `${state.data}\n${value}`
  return [{ ...sized, data, kept: state.kept + length }, false]
}

/** How long the line with the name of an oversized event may be, and the name of any event, in bytes. */
const maxName = 256
