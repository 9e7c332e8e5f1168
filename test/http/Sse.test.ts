import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as Sse from "../../src/http/Sse.js"
import { anthropicGrammar, geminiGrammar, genericGrammar, openAiGrammar } from "../../src/providers/grammars.js"
import type { StreamGrammar, StreamReading } from "../../src/providers/Provider.js"

const encode = (text: string) => new TextEncoder().encode(text)

/** Feeds bytes cut at the given places. */
const run = (bytes: Uint8Array, cuts: ReadonlyArray<number> = [], start: Sse.SseState = Sse.initial) => {
  const places = [0, ...[...cuts].sort((a, b) => a - b), bytes.length]
  let state = start
  const events: Array<Sse.SseEvent> = []
  for (let i = 1; i < places.length; i++) {
    const [more, next] = Sse.feed(state, bytes.slice(places[i - 1], places[i]))
    events.push(...more)
    state = next
  }
  return { events, last: Sse.finish(state), state }
}
const said = (events: ReadonlyArray<Sse.SseEvent>) =>
  events.map(({ data, event, oversized }) => ({ data, event, oversized }))
const datas = (text: string) => run(encode(text)).events.map((event) => event.data)

describe("Sse", () => {
  it("reads names, data of several lines, and optional spaces", () => {
    const { events, last } = run(
      encode("event: a\ndata: one\ndata:two\ndata\ndata:  x\nid: 7\nretry: 9\n\ndata: b\n\n")
    )
    assert.deepStrictEqual(said(events), [
      { event: "a", data: "one\ntwo\n\n x", oversized: false },
      { event: undefined, data: "b", oversized: false }
    ])
    assert.isUndefined(last)
  })

  it("takes CRLF, CR and LF as line ends, mixed too", () => {
    assert.deepStrictEqual(datas("data: a\r\n\r\ndata: b\r\rdata: c\n\ndata: d\r\n\ndata: e\n\r\n"), [
      "a",
      "b",
      "c",
      "d",
      "e"
    ])
  })

  it("drops a byte order mark at the start, and only there", () => {
    assert.deepStrictEqual(datas("\uFEFFdata: a\n\ndata: \uFEFFb\n\n"), ["a", "\uFEFFb"])
    assert.deepStrictEqual(datas("\n\uFEFFdata: a\n\n"), [undefined])
  })

  it("gives comments as events without data, with their bytes", () => {
    const { events } = run(encode(": ping\n\ndata: a\n\n"))
    assert.deepStrictEqual(events.map(({ data, end, start }) => ({ data, start, end })), [
      { data: undefined, start: 0, end: 8 },
      { data: "a", start: 8, end: 17 }
    ])
  })

  it("keeps an event that has no end for finish", () => {
    const { events, last } = run(encode("data: a\n\nevent: error\ndata: {\"x\":1}"))
    assert.strictEqual(events.length, 1)
    assert.deepStrictEqual(last, {
      event: "error",
      data: "{\"x\":1}",
      oversized: false,
      complete: false,
      start: 9,
      end: 35
    })
  })

  it("gives an event as soon as its blank line is there, also when the LF of a CRLF is still under way", () => {
    const [events, state] = Sse.feed(Sse.initial, "data: a\r\n\r")
    assert.deepStrictEqual(said(events), [{ event: undefined, data: "a", oversized: false }])
    const [more] = Sse.feed(state, "\ndata: b\r\n\r\n")
    assert.deepStrictEqual(said(more), [{ event: undefined, data: "b", oversized: false }])
  })

  it("flags an event over the limit, keeps nothing of it but its name, and reads on", () => {
    const big = `event: big\ndata: ${"x".repeat(100)}\n\nevent: late\ndata: ${"y".repeat(40)}\ndata: ${
      "z".repeat(40)
    }\n\n`
    const bytes = encode(`${big}: ${"c".repeat(5000)}\n\ndata: small\n\n`)
    const expected = [
      { event: "big", data: undefined, oversized: true },
      { event: "late", data: undefined, oversized: true },
      { event: undefined, data: undefined, oversized: false },
      { event: undefined, data: "small", oversized: false }
    ]
    assert.deepStrictEqual(said(run(bytes, [], Sse.make(64)).events), expected)
    const everywhere = Array.from(bytes, (_, i) => i)
    assert.deepStrictEqual(said(run(bytes, everywhere, Sse.make(64)).events), expected)
  })

  it("keeps no more than the limit while a line never ends", () => {
    let state = Sse.make(1024)
    for (let i = 0; i < 200; i++) state = Sse.feed(state, "x".repeat(1000))[1]
    assert.isUndefined(state.line)
    assert.isTrue(state.oversized)
    assert.strictEqual(state.offset, 200_000)
  })

  it("does not hold on to the caller's chunk", () => {
    const chunk = encode("data: a")
    const [, state] = Sse.feed(Sse.initial, chunk)
    chunk.fill(0)
    assert.deepStrictEqual(said(Sse.feed(state, "\n\n")[0]), [{ event: undefined, data: "a", oversized: false }])
  })

  it("reads a large event that comes byte by byte in reasonable time", () => {
    const bytes = encode(`data: ${"x".repeat(200_000)}\n\n`)
    let state = Sse.initial
    let events: ReadonlyArray<Sse.SseEvent> = []
    for (let i = 0; i < bytes.length; i++) [events, state] = Sse.feed(state, bytes.subarray(i, i + 1))
    assert.strictEqual(events[0]?.data?.length, 200_000)
  })

  it("keeps a line that comes byte by byte in few pieces, each copied few times", () => {
    let state = Sse.initial
    for (let i = 0; i < 1023; i++) state = Sse.feed(state, "x")[1]
    const sizes: Array<number> = []
    for (let piece = state.line; piece !== undefined; piece = piece.before) sizes.push(piece.bytes.length)
    assert.deepStrictEqual(sizes, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
  })

  const piece = FastCheck.constantFrom(
    "\r\n",
    "\n",
    "\r",
    "\n\n",
    "\r\n\r\n",
    "data: ",
    "data:é€😀",
    "data",
    "event: error",
    ": ping",
    "\uFEFF",
    "{\"a\":1}",
    " ",
    "id: 1",
    "data: " + "x".repeat(80)
  )
  const stream = FastCheck.array(FastCheck.oneof(piece, FastCheck.string({ maxLength: 5 })), { maxLength: 40 }).map((
    parts
  ) => encode(parts.join("")))
  const cuts = FastCheck.array(FastCheck.nat(), { maxLength: 30 })

  it.prop(
    "S4: however the bytes are cut, the events are those of the whole, and their ranges partition the stream",
    [stream, cuts, FastCheck.constantFrom(64, 1024)],
    ([bytes, places, limit]) => {
      const whole = run(bytes, [], Sse.make(limit))
      const cut = run(bytes, places.map((place) => place % (bytes.length + 1)), Sse.make(limit))
      assert.deepStrictEqual(said(cut.events), said(whole.events))
      const tail = ({ last }: typeof whole) => last === undefined ? [] : [last]
      for (const read of [whole, cut]) {
        let at = 0
        for (const event of [...read.events, ...tail(read)]) {
          assert.strictEqual(event.start, at)
          assert.isAbove(event.end, at)
          at = event.end
        }
        assert.strictEqual(at, bytes.length)
      }
      // The only byte that may change hands is the LF of a CRLF that was cut.
      whole.events.forEach((event, i) => {
        const end = cut.events[i]?.end ?? -1
        assert.isTrue(end === event.end || (end === event.end - 1 && bytes[end] === 10), `${end} ${event.end}`)
      })
    },
    { fastCheck: { numRuns: 2000 } }
  )

  it.prop(
    "agrees with a reader of the whole text",
    [FastCheck.array(
      FastCheck.tuple(FastCheck.constantFrom("a", "error", ""), FastCheck.array(FastCheck.string(), { minLength: 1 }))
    )],
    ([messages]) => {
      const clean = messages.map(([name, lines]) => ({
        event: name === "" ? undefined : name,
        lines: lines.map((line) => line.replace(/[\r\n]/g, ""))
      }))
      const text = clean.map(({ event, lines }) =>
        `${event === undefined ? "" : `event:${event}\n`}${lines.map((line) => `data: ${line}\n`).join("")}\n`
      ).join("")
      assert.deepStrictEqual(
        said(run(encode(text)).events),
        clean.map(({ event, lines }) => ({
          event,
          data: new TextDecoder("utf-8", { ignoreBOM: true }).decode(encode(lines.join("\n"))),
          oversized: false
        }))
      )
    }
  )
})

describe("Sse.firstContent", () => {
  const chunk = (choice: object, more: object = {}) => ({ object: "chat.completion.chunk", choices: [choice], ...more })
  const delta = (fields: object) => chunk({ index: 0, delta: fields, finish_reason: null })
  const cases: ReadonlyArray<readonly [StreamGrammar, StreamReading, ReadonlyArray<unknown>]> = [
    [openAiGrammar, "lifecycle", [
      delta({ role: "assistant" }),
      delta({ role: "assistant", content: "", refusal: null }),
      { object: "chat.completion.chunk", choices: [], prompt_filter_results: [{}] },
      { choices: [{ text: "", index: 0, finish_reason: null }] },
      delta({ role: "assistant", content: "" }),
      { ...delta({ role: "assistant" }), error: null },
      { type: "response.created", response: { error: null } },
      { type: "response.queued" },
      { type: "response.in_progress" },
      { type: "response.output_item.added", item: { type: "message" } },
      { type: "response.content_part.added", part: { type: "output_text", text: "" } }
    ]],
    [openAiGrammar, "content", [
      delta({ content: "Hi" }),
      delta({ reasoning: "hm" }),
      delta({ reasoning_content: "hm" }),
      delta({ refusal: "no" }),
      delta({ tool_calls: [{ index: 0 }] }),
      delta({ function_call: { name: "f" } }),
      delta({ audio: { id: "a" } }),
      chunk({ delta: {}, finish_reason: "stop" }),
      { choices: [{ text: "Hi", index: 0 }] },
      { object: "chat.completion.chunk", choices: [], usage: { total_tokens: 1 } },
      { type: "response.output_text.delta", delta: "x" },
      { type: "response.output_item.done" },
      { type: "response.function_call_arguments.delta" },
      { type: "response.mcp_call.failed" },
      { type: "response.completed" },
      { type: "response.incomplete" },
      { type: "transcript.text.delta", delta: "x" },
      { anything: "else" },
      "text",
      7,
      null
    ]],
    [openAiGrammar, "error", [
      { error: { message: "no" } },
      { error: "no" },
      { type: "error", code: "x", message: "m" },
      { type: "error", error: { code: "x" } },
      { type: "response.failed", response: { status: "failed", error: { code: "x" } } },
      chunk({ delta: { content: "" }, finish_reason: "error" }),
      chunk({ delta: {} }, { error: { code: 502 } }),
      chunk({ delta: {} }, { x_groq: { error: "over capacity" } })
    ]],
    [anthropicGrammar, "lifecycle", [
      { type: "ping" },
      { type: "message_start", message: { content: [] } },
      { type: "content_block_start", index: 0, content_block: { type: "text", text: "" } },
      { type: "content_block_start", index: 0, content_block: { type: "thinking", thinking: "", signature: "" } }
    ]],
    [anthropicGrammar, "content", [
      { type: "content_block_delta", delta: { type: "text_delta", text: "Hi" } },
      { type: "content_block_delta", delta: { type: "input_json_delta", partial_json: "{" } },
      { type: "content_block_start", index: 0, content_block: { type: "tool_use", id: "t", name: "f", input: {} } },
      { type: "content_block_start", index: 0, content_block: { type: "text", text: "Hi" } },
      { type: "content_block_start", index: 0, content_block: { type: "redacted_thinking", data: "x" } },
      { type: "message_delta", delta: { stop_reason: "end_turn" } },
      { type: "something_new" }
    ]],
    [anthropicGrammar, "error", [{ type: "error", error: { type: "overloaded_error" } }]],
    [anthropicGrammar, "done", [{ type: "message_stop" }]],
    [geminiGrammar, "content", [
      { candidates: [{ content: { parts: [{ text: "Hi" }] } }] },
      { promptFeedback: { blockReason: "SAFETY" } },
      [{ candidates: [] }],
      { event_type: "content.delta" },
      { other: 1 }
    ]],
    [geminiGrammar, "lifecycle", [{ event_type: "interaction.start" }, { event_type: "content.start" }]],
    [geminiGrammar, "error", [{ error: { code: 503 } }, [{ error: { code: 503 } }], { event_type: "error" }]],
    [genericGrammar, "content", [{ anything: 1 }, [1], "x", { error: null }]],
    [genericGrammar, "lifecycle", [{ type: "ping" }]],
    [genericGrammar, "error", [{ error: { message: "x" } }, { type: "error" }]]
  ]
  for (const [grammar, reading, datas] of cases) {
    it(`S2: ${grammar.name}, ${reading}`, () => {
      for (const data of datas) {
        assert.strictEqual(
          Sse.firstContent(grammar, { event: undefined, data: JSON.stringify(data) }),
          reading,
          JSON.stringify(data)
        )
      }
    })
  }

  it("S2: pings and comments are no content, [DONE] is the end, an event named error is one", () => {
    const read = (event: string | undefined, data: string | undefined) =>
      Sse.firstContent(openAiGrammar, { event, data })
    assert.strictEqual(read(undefined, undefined), "lifecycle")
    assert.strictEqual(read(undefined, ""), "lifecycle")
    assert.strictEqual(read("ping", "not json"), "lifecycle")
    assert.strictEqual(read(undefined, " [DONE] "), "done")
    assert.strictEqual(read("error", undefined), "error")
    assert.strictEqual(read("error", "upstream went away"), "error")
    assert.strictEqual(read(undefined, "no json"), "content")
    assert.strictEqual(
      Sse.firstContent(openAiGrammar, { event: undefined, data: undefined, oversized: true }),
      "content"
    )
  })

  it.prop("S2: never throws, whatever the event", [
    FastCheck.constantFrom(openAiGrammar, anthropicGrammar, geminiGrammar, genericGrammar),
    FastCheck.option(FastCheck.string(), { nil: undefined }),
    FastCheck.oneof(FastCheck.json(), FastCheck.string())
  ], ([grammar, event, data]) => {
    assert.include(["content", "error", "lifecycle", "done"], Sse.firstContent(grammar, { event, data }))
  })
})
