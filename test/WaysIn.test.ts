/**
 * Every way in, in every trouble: what the caller gets, what the pool learns of which key, and that nothing is left
 * behind. What an answer is worth without a pool is compared in the tests of each adapter.
 */
import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Supervisor from "effect/Supervisor"
import type * as FakeProvider from "../examples/support/FakeProvider.js"
import * as CallOptions from "../src/CallOptions.js"
import * as KeymeshError from "../src/KeymeshError.js"
import { a, b, live, once, until, watched } from "./support/openai.js"
import { type WayIn, waysIn } from "./support/waysIn.js"

interface Trouble {
  /** How the fake treats the first key; the second one is healthy. */
  readonly first: FakeProvider.Behaviour
  readonly call: "ask" | "stream"
  /** Whether the caller breaks off: when the request has arrived, or when something of the answer has. */
  readonly abort?: "before" | "middle" | "both"
  /** Whether whoever can set one has a timeout or a deadline, in milliseconds. */
  readonly timeout?: number
  /** The pool's attempt timeout, in milliseconds. */
  readonly attemptTimeout?: (way: WayIn) => number
  /** After how many milliseconds a second attempt runs beside the first. */
  readonly hedge?: number
  /** Which ways in never get there. */
  readonly skip?: (way: WayIn) => boolean
  /** What the caller gets, by the kind of way in. */
  readonly got: (way: WayIn) => string
  /** Faults of the first key: their kind, and whether they came late. */
  readonly learned: (way: WayIn) => ReadonlyArray<string>
  /** What the first key's attempts came to: successes, faults, ignored. */
  readonly counted: (way: WayIn) => readonly [number, number, number]
  /** The keys that are asked. */
  readonly asked: (way: WayIn) => string
}

const always = <A>(value: A) => () => value

/** By its kind; and of the clients of SDKs, which throw what they throw without a pool, by its name. */
const by = (
  got: Readonly<Record<"effect" | "http" | "fetch" | "openai" | "anthropic" | "gemini", string>>
) =>
({ kind, name }: WayIn): string =>
  kind === "native"
    ? name.startsWith("openai")
      ? got.openai
      : name.startsWith("anthropic")
      ? got.anthropic
      : name.startsWith("gemini")
      ? got.gemini
      : got.fetch
    : name.startsWith("@")
    ? got.http.replace(/^Re(quest|sponse)Error/, "HttpRe$1Error")
    : got[kind]

const broken = by({
  effect: "ProviderError Network",
  http: "ResponseError Decode",
  openai: "TypeError",
  anthropic: "TypeError",
  gemini: "TypeError",
  fetch: "TypeError"
})

/** Whose events the grammar does not know: of its streams, the first event is content. */
const isPlain = ({ name }: WayIn): boolean => name.startsWith("http with")

const troubles: Readonly<Record<string, Trouble>> = {
  "C3: a key that hangs, with an attempt timeout": {
    first: { hang: true },
    call: "ask",
    attemptTimeout: always(1_000),
    got: always("an end"),
    learned: always(["Timeout"]),
    counted: always([0, 1, 0]),
    asked: always("ab")
  },
  "C3: a key that hangs, asked for a stream, with an attempt timeout": {
    first: { hang: true },
    call: "stream",
    attemptTimeout: always(1_000),
    got: always("an end"),
    learned: always(["Timeout"]),
    counted: always([0, 1, 0]),
    asked: always("ab")
  },
  "A6: a key that hangs, and a second attempt beside it": {
    first: { hang: true },
    call: "ask",
    hedge: 100,
    got: always("an end"),
    learned: always([]),
    counted: always([0, 0, 1]),
    asked: always("ab")
  },
  "A6: a key that hangs, asked for a stream, and a second attempt beside it": {
    first: { hang: true },
    call: "stream",
    hedge: 100,
    got: always("an end"),
    learned: always([]),
    counted: always([0, 0, 1]),
    asked: always("ab")
  },
  "A6: a stream whose content does not come, and a second attempt beside it": {
    first: { stallAfter: 0 },
    call: "stream",
    hedge: 100,
    // The caller's already, with its first event, and it stays silent.
    skip: isPlain,
    got: always("an end"),
    learned: always([]),
    counted: always([0, 0, 1]),
    asked: always("ab")
  },
  "A6: a caller that leaves while two attempts run": {
    first: { hang: true },
    call: "ask",
    hedge: 50,
    abort: "both",
    got: always("an interruption"),
    learned: always([]),
    counted: always([0, 0, 1]),
    asked: always("ab")
  },
  "A6: a client that waits no longer while two attempts run: the first is to blame": {
    first: { hang: true },
    call: "ask",
    hedge: 100,
    timeout: 500,
    got: by({
      effect: "ProviderError Timeout",
      http: "RequestError Transport (DeadlineExceeded)",
      openai: "APIConnectionTimeoutError",
      anthropic: "APIConnectionTimeoutError",
      gemini: "AbortError",
      fetch: "a timeout of its own"
    }),
    learned: ({ kind }) => kind === "http" ? [] : ["Timeout"],
    counted: ({ kind }) => kind === "http" ? [0, 0, 1] : [0, 1, 0],
    asked: always("ab")
  },
  "C3: a stream that goes on for longer than that after its first content is not touched by an attempt timeout": {
    first: { chunkDelayMs: 400 },
    call: "stream",
    // Well after the first content, and well before the end: how many events are before it and behind it differs.
    attemptTimeout: ({ name }) => name.includes("gemini") ? 1_200 : name === "@effect/ai over openai" ? 3_200 : 2_400,
    got: always("an end"),
    learned: always([]),
    counted: always([1, 0, 0]),
    asked: always("a")
  },
  "a stream that is cut in the middle": {
    first: { cutAfter: 2, chunkDelayMs: 10 },
    call: "stream",
    got: broken,
    learned: always(["Network, late"]),
    counted: always([1, 1, 0]),
    asked: always("a")
  },
  "a stream that fails after content": {
    first: { streamError: { after: 2, as: "overloaded" } },
    call: "stream",
    // An HTTP client gets the events as they are, the error too.
    got: (way) =>
      way.name === "anthropic 0.40, its client" ? "APIConnectionError" : by({
        effect: "ProviderError Overloaded",
        http: "an end",
        openai: "APIError",
        anthropic: "APIError",
        gemini: "ApiError",
        fetch: "an end"
      })(way),
    learned: always(["Overloaded, late"]),
    counted: always([1, 1, 0]),
    asked: always("a")
  },
  "a stream that is refused by its status": {
    first: { outage: { status: 503 } },
    call: "stream",
    got: always("an end"),
    learned: always(["Overloaded"]),
    counted: always([0, 1, 0]),
    asked: always("ab")
  },
  "a stream that is refused inside a 200": {
    first: { streamError: { after: 0, as: "overloaded" } },
    call: "stream",
    got: always("an end"),
    learned: (way) => isPlain(way) ? ["Overloaded, late"] : ["Overloaded"],
    counted: (way) => isPlain(way) ? [1, 1, 0] : [0, 1, 0],
    asked: (way) => isPlain(way) ? "a" : "ab"
  },
  "an answer that is cut in the middle": {
    first: { cutAfter: 1 },
    call: "ask",
    got: broken,
    learned: always(["Network, late"]),
    counted: always([1, 1, 0]),
    asked: always("a")
  },
  "a server that hangs, and a timeout": {
    first: { hang: true },
    call: "ask",
    timeout: 300,
    got: by({
      effect: "ProviderError Timeout",
      http: "RequestError Transport (DeadlineExceeded)",
      openai: "APIConnectionTimeoutError",
      anthropic: "APIConnectionTimeoutError",
      gemini: "AbortError",
      fetch: "a timeout of its own"
    }),
    // A deadline is the caller's will.
    learned: ({ kind }) => kind === "http" ? [] : ["Timeout"],
    counted: ({ kind }) => kind === "http" ? [0, 0, 1] : [0, 1, 0],
    asked: always("a")
  },
  "a caller that leaves before the headers": {
    first: { hang: true },
    call: "stream",
    abort: "before",
    got: always("an interruption"),
    learned: always([]),
    counted: always([0, 0, 1]),
    asked: always("a")
  },
  "a caller that leaves in the middle": {
    first: { stallAfter: 2 },
    call: "stream",
    abort: "middle",
    got: always("an interruption"),
    learned: always([]),
    counted: always([1, 0, 0]),
    asked: always("a")
  }
}

/** Who an error is: its tag and its fault or reason, or its class; and the pool's own error inside of a client's. */
const named = (error: unknown): string => {
  if (typeof error !== "object" || error === null) return String(error)
  if (error instanceof KeymeshError.ProviderError) return `${error._tag} ${error.fault.kind}`
  const [tag, reason]: ReadonlyArray<unknown> = [Reflect.get(error, "_tag"), Reflect.get(error, "reason")]
  if (typeof tag !== "string") return error instanceof DOMException ? error.name : error.constructor.name
  const inside = Option.match(KeymeshError.find(error), { onNone: () => "", onSome: ({ _tag }) => ` (${_tag})` })
  return `${tag} ${String(reason)}${inside}`
}

const gotOf = (exit: Exit.Exit<unknown, unknown>): string =>
  Exit.isSuccess(exit)
    ? "an end"
    : Cause.isInterruptedOnly(exit.cause)
    ? "an interruption"
    : named(Cause.squash(exit.cause))

for (const way of waysIn) {
  // Most of their time they wait, each for a provider of its own.
  describe.concurrent(way.name, () => {
    for (const [name, trouble] of Object.entries(troubles)) {
      // A `fetch` has no timeout but its caller's signal.
      if (trouble.timeout !== undefined && way.name.endsWith("its fetch")) continue
      if (trouble.skip?.(way) === true) continue
      live(name, () =>
        Effect.gen(function*() {
          const second = trouble.abort === "both" || (trouble.hedge !== undefined && trouble.timeout !== undefined)
            ? trouble.first
            : {}
          const fake = yield* way.fake({ keys: { [a]: trouble.first, [b]: second } })
          const supervisor = yield* Supervisor.track
          const events = yield* watched
          const running = Effect.map(supervisor.value, (fibers) => fibers.length)
          const seen: Array<unknown> = []
          const open = yield* Effect.supervised(
            way.open({
              fake,
              keys: [{ secret: a, label: "a" }, { secret: b, label: "b" }],
              settings: {
                strategy: "sequential-then-rotate",
                floor: false,
                cooldowns: { jitter: 0 },
                attemptTimeout: trouble.attemptTimeout?.(way),
                hedge: trouble.hedge === undefined ? false : { delay: trouble.hedge, share: 1 },
                ...(trouble.asked(way) === "a" || trouble.timeout !== undefined ? once : { retryTokens: false })
              },
              ...(trouble.timeout === undefined ? {} : { timeout: trouble.timeout })
            }),
            supervisor
          )
          const before = yield* running
          const call = trouble.call === "ask" ? open.ask : open.stream((item) => seen.push(item))
          const timed = trouble.timeout === undefined || way.kind !== "http"
            ? call
            : CallOptions.withOptions(call, { deadline: trouble.timeout })
          const fiber = yield* Effect.fork(Effect.supervised(timed, supervisor))
          if (trouble.abort !== undefined) {
            yield* fake.waitForRequests(trouble.abort === "both" ? 2 : 1)
            if (trouble.abort === "middle") yield* until(Effect.sync(() => seen.length > 0))
            yield* Fiber.interrupt(fiber)
          }
          const exit = yield* Fiber.await(fiber)
          // Nothing is left behind: no request, no lease, no fiber with its timers.
          yield* fake.idle
          yield* until(Effect.map(open.pool.snapshot, ({ inFlight }) => inFlight === 0))
          yield* until(Effect.map(running, (count) => count <= before))
          const [first] = (yield* open.pool.snapshot).keys
          const faults = (yield* events).flatMap((event) =>
            event._tag === "request.fail" && event.label === "a"
              ? [`${event.fault.kind}${event.late ? ", late" : ""}`]
              : []
          )
          assert.deepStrictEqual({
            got: gotOf(exit),
            learned: faults,
            counted: [first?.successes, first?.faults, first?.ignored],
            asked: (yield* fake.requests).map(({ key }) => key === a ? "a" : "b").join("")
          }, {
            got: trouble.got(way),
            learned: trouble.learned(way),
            counted: [...trouble.counted(way)],
            asked: trouble.asked(way)
          })
        }))
    }
  })
}
