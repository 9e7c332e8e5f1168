import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as TestClock from "effect/TestClock"
import * as Alarms from "../src/Alarms.js"

/** Alarms that are kept, what has rung, and how often a timer was set. */
const kept = Effect.gen(function*() {
  const alarms = yield* Alarms.make
  const rung: Array<string> = []
  const pauses: Array<number> = []
  yield* Effect.forkScoped(Alarms.keep(alarms, (millis) => {
    pauses.push(millis)
    return Effect.sleep(millis)
  }))
  // It waits for the first one.
  yield* TestClock.adjust(0)
  const set = (name: string, at: number): Alarms.Alarm => {
    const alarm = { at, ring: () => void rung.push(name) }
    Alarms.set(alarms, alarm)
    return alarm
  }
  const callOff = (alarm: Alarms.Alarm) => Alarms.callOff(alarms, alarm)
  return { callOff, pauses, rung, set }
})

describe("alarms", () => {
  it.scoped("A6: each one rings when it is due, in whatever order they are set", () =>
    Effect.gen(function*() {
      const { rung, set } = yield* kept
      set("c", 300)
      yield* TestClock.adjust(50)
      set("b", 200)
      set("a", 100)
      yield* TestClock.adjust(49)
      assert.deepStrictEqual(rung, [])
      for (const expected of ["a", "ab", "abc"]) {
        yield* TestClock.adjust(1)
        assert.strictEqual(rung.join(""), expected)
        yield* TestClock.adjust(99)
      }
      set("past", 0)
      yield* TestClock.adjust(0)
      assert.strictEqual(rung.join(""), "abcpast")
    }))

  it.scoped("A6: one that is called off does not ring", () =>
    Effect.gen(function*() {
      const { callOff, rung, set } = yield* kept
      const alarm = set("a", 100)
      set("b", 100)
      yield* TestClock.adjust(99)
      callOff(alarm)
      yield* TestClock.adjust(1)
      assert.deepStrictEqual(rung, ["b"])
      callOff(alarm)
    }))

  it.scoped("A6: many that come and go share one timer, and none is left when they are gone", () =>
    Effect.gen(function*() {
      const { callOff, pauses, set } = yield* kept
      for (let n = 0; n < 900; n++) {
        callOff(set("a", n / 10 + 100))
        if (n % 100 === 0) yield* TestClock.adjust(10)
      }
      // The first ones were due at 100; what is set later makes no difference to the timer that runs.
      assert.deepStrictEqual(pauses, [100])
      yield* TestClock.adjust(1_000)
      assert.deepStrictEqual(pauses, [100])
    }))
})
