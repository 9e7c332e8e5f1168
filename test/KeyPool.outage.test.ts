import { assert, describe } from "@effect/vitest"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Random from "effect/Random"
import * as TestClock from "effect/TestClock"
import type * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import type * as PoolSettings from "../src/PoolSettings.js"
import { bad, keys, named, ok, type Reply, type Sent, test, upstream, watch } from "./support/pooled.js"

const second = 1_000

/** Calls at 30 per second, as chance has it, for so long; what they got, and what the provider saw. */
const load = (
  length: number,
  script: (sent: Sent) => Reply,
  settings: Partial<PoolSettings.Settings> = {}
) =>
  Effect.gen(function*() {
    const provider = yield* upstream(script)
    const pool = yield* KeyPool.make({ keys: keys("abcde"), ...settings })
    const events = yield* watch
    const begin = yield* Clock.currentTimeMillis
    const call = Effect.gen(function*() {
      const at = yield* Clock.currentTimeMillis
      const exit = yield* Effect.exit(pool.run(provider.send))
      return { exit, millis: (yield* Clock.currentTimeMillis) - at }
    })
    const calling: Array<Fiber.Fiber<Effect.Effect.Success<typeof call>>> = []
    for (let at = 0; at < length;) {
      const pause = Math.ceil(-Math.log(1 - (yield* Random.next)) * 1_000 / 30)
      yield* TestClock.adjust(pause)
      calling.push(yield* Effect.fork(call))
      at += pause
    }
    yield* TestClock.adjust(120 * second)
    const answers = yield* Fiber.join(Fiber.all(calling))
    const sent = (yield* provider.sent).map((sent) => ({ ...sent, at: sent.at - begin }))
    return { answers, sent, events: yield* events, pool }
  })

const busiest = (sent: ReadonlyArray<Sent>, from: number, length: number): number =>
  sent.filter(({ at }) => at >= from).reduce(
    (most, { at: slice }) => Math.max(most, sent.filter(({ at }) => at >= slice && at < slice + length).length),
    0
  )

const takes = (sent: Sent): number => 500 + sent.call * 137 % 700

const outage = (kind: Fault.Kind) => (sent: Sent): Reply =>
  sent.at >= 20 * second && sent.at < 35 * second ? bad(kind, {}, 20) : ok(takes(sent))

describe("provider outage", () => {
  for (const kind of ["Overloaded", "Network"] as const) {
    test(
      `F2: every call survives 15 s of ${kind}, few are sent meanwhile, and they are let go at a measured pace`,
      () =>
        Effect.gen(function*() {
          const { answers, events, sent } = yield* load(60 * second, outage(kind))
          console.log(
            kind,
            answers.length,
            answers.filter(({ exit }) => exit._tag === "Failure").length,
            sent.length,
            sent.filter(({ at }) => at >= 20_000 && at < 35_000).length,
            sent.filter(({ at }) => at >= 20_000 && at < 35_000).map((x) => x.at).join(" "),
            "first",
            sent.find(({ at }) => at >= 35_000)?.at,
            busiest(sent, 35_000, 200),
            Math.max(...answers.map((a) => a.millis))
          )
          console.log(
            events.filter((e) => e._tag.startsWith("provider") || e._tag.startsWith("circuit")).map((e) =>
              `${e._tag}@${e.at}`
            ).join(" ")
          )
        }),
      { timeout: 60_000 }
    )
  }
})
