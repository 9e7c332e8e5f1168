import { assert, describe, it } from "@effect/vitest"
import * as Chunk from "effect/Chunk"
import * as Clock from "effect/Clock"
import * as Context from "effect/Context"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as Schedule from "effect/Schedule"
import * as ScheduleDecision from "effect/ScheduleDecision"
import * as ScheduleInterval from "effect/ScheduleInterval"
import * as TestClock from "effect/TestClock"
import * as Fault from "../src/Fault.js"
import * as RetryPolicy from "../src/RetryPolicy.js"

/** The delays a policy gives, in milliseconds, when every attempt fails at once with the given inputs. */
const delaysOf = <In>(policy: Schedule.Schedule<unknown, In>, inputs: Iterable<In>) =>
  Effect.map(
    Schedule.run(Schedule.delays(policy), 0, inputs),
    (delays) => Chunk.toReadonlyArray(delays).map(Duration.toMillis)
  )

const times = (n: number): ReadonlyArray<number> => Array.from({ length: n }, (_, i) => i)

/** The `n`-th delays of many runs of a policy. */
const samplesOf = (policy: Schedule.Schedule<unknown>, steps: number, runs: number) =>
  Effect.map(
    Effect.forEach(times(runs), () => delaysOf(policy, times(steps))),
    (all) => times(steps).map((n) => all.map((delays) => delays[n] ?? Number.NaN))
  )

/** Kolmogorov-Smirnov: the largest distance between the samples' distribution and the uniform one on [low, high). */
const distance = (samples: ReadonlyArray<number>, low: number, high: number): number => {
  const sorted = [...samples].sort((a, b) => a - b)
  return sorted.reduce((worst, sample, i) => {
    // a whole millisecond stands for the interval that begins with it
    const below = (sample - low) / (high - low)
    const above = (sample + 1 - low) / (high - low)
    return Math.max(worst, below - (i + 1) / sorted.length, i / sorted.length - above)
  }, 0)
}

/** What `distance` exceeds once in a thousand when the samples are uniform. */
const critical = (n: number): number => 1.95 / Math.sqrt(n)

/** Runs an attempt that always fails under a policy; gives the instants at which attempts began. */
const startsUnder = <E>(
  policy: Schedule.Schedule<unknown, E>,
  attempt: (n: number, startedAt: number) => { readonly millis: number; readonly error: E }
) =>
  Effect.gen(function*() {
    const starts = yield* Ref.make<ReadonlyArray<number>>([])
    const startedAt = yield* Clock.currentTimeMillis
    const failing = Effect.gen(function*() {
      const now = yield* Clock.currentTimeMillis
      const n = (yield* Ref.getAndUpdate(starts, (all) => [...all, now - startedAt])).length
      const { error, millis } = attempt(n, startedAt)
      yield* Effect.sleep(millis)
      return yield* Effect.fail(error)
    })
    const fiber = yield* Effect.fork(Effect.retry(failing, policy))
    yield* TestClock.adjust("1 day")
    // a schedule that goes on for ever must not hang the test
    assert.isTrue(Exit.isFailure(yield* Fiber.await(fiber)))
    return yield* Ref.get(starts)
  })

const at = <A>(values: ReadonlyArray<A>, n: number, otherwise: A): A => values[n % values.length] ?? otherwise

const milliseconds = (max: number) => FastCheck.integer({ min: 0, max })

describe("fullJitter", () => {
  it.effect("C3: each delay is uniform between 0 and its ceiling", () =>
    Effect.gen(function*() {
      const runs = 4_000
      const samples = yield* samplesOf(RetryPolicy.fullJitter({ base: 200, max: 5_000 }), 8, runs)
      const ceilings = [200, 400, 800, 1_600, 3_200, 5_000, 5_000, 5_000]
      ceilings.forEach((ceiling, n) => {
        const delays = samples[n] ?? []
        assert.strictEqual(delays.length, runs)
        assert.isTrue(delays.every((delay) => Number.isInteger(delay) && delay >= 0 && delay < ceiling))
        assert.isBelow(distance(delays, 0, ceiling), critical(runs), `delay ${n}`)
      })
      // the yardstick tells other kinds of jitter apart
      const others = yield* samplesOf(Schedule.jittered(Schedule.spaced(200)), 1, runs)
      assert.isAbove(distance(others[0] ?? [], 0, 240), critical(runs))
    }).pipe(Effect.withRandom(Random.make("full jitter"))))

  it.effect("C3: delays of one run do not depend on each other", () =>
    Effect.gen(function*() {
      const runs = 4_000
      const [first = [], second = []] = yield* samplesOf(RetryPolicy.fullJitter({ base: 400, factor: 1 }), 2, runs)
      const centred = (xs: ReadonlyArray<number>) => xs.map((x) => x - 199.5)
      const product = (xs: ReadonlyArray<number>, ys: ReadonlyArray<number>) =>
        xs.reduce((sum, x, i) => sum + x * (ys[i] ?? Number.NaN), 0)
      const [x, y] = [centred(first), centred(second)]
      const correlation = product(x, y) / Math.sqrt(product(x, x) * product(y, y))
      assert.isBelow(Math.abs(correlation), 3.3 / Math.sqrt(runs))
    }).pipe(Effect.withRandom(Random.make("independence"))))

  it.effect("C3: the ceiling doubles from 200 ms to 30 s, and stays there for ever", () =>
    Effect.gen(function*() {
      // just below 1, a draw shows its ceiling
      const delays = yield* delaysOf(RetryPolicy.fullJitter(), times(3_000))
      assert.deepStrictEqual(delays.slice(0, 9), [199, 399, 799, 1599, 3199, 6399, 12799, 25599, 29999])
      assert.isTrue(delays.slice(9).every((delay) => delay === 29_999))
    }).pipe(Effect.withRandom(Random.fixed([0.999999]))))

  it.effect("no base, factor or max makes a delay overflow, or longer than a day", () =>
    Effect.gen(function*() {
      for (
        const options of [
          { base: 0 },
          { base: "1 hour", max: Duration.infinity, factor: 1e9 },
          { base: Duration.infinity, max: Duration.infinity },
          { base: "500 micros", max: "1 second" },
          { base: 40, max: 10 }
        ] as const
      ) {
        const delays = yield* delaysOf(RetryPolicy.fullJitter(options), times(1_200))
        assert.isTrue(delays.every((delay) => Number.isInteger(delay) && delay >= 0 && delay < 86_400_000))
      }
      assert.deepStrictEqual(yield* delaysOf(RetryPolicy.fullJitter({ base: 40, max: 10 }), times(2)), [9, 9])
    }).pipe(Effect.withRandom(Random.fixed([0.999]))))

  it.effect("gives the delay as its output", () =>
    Effect.gen(function*() {
      const outputs = yield* Schedule.run(RetryPolicy.fullJitter({ base: 100 }), 0, times(3))
      assert.deepStrictEqual(Chunk.toReadonlyArray(outputs).map(Duration.toMillis), [50, 100, 200])
    }).pipe(Effect.withRandom(Random.fixed([0.5]))))

  it("names the option that is not usable", () => {
    assert.throws(() => RetryPolicy.fullJitter({ base: -1 }), RangeError, /fullJitter: base/)
    assert.throws(() => RetryPolicy.fullJitter({ max: Number.NaN }), RangeError, /fullJitter: max/)
    for (const factor of [0, 0.5, -2, Number.NaN, Number.POSITIVE_INFINITY]) {
      assert.throws(() => RetryPolicy.fullJitter({ factor }), RangeError, /fullJitter: factor/)
    }
    assert.throws(() => RetryPolicy.decorrelatedJitter({ base: Number.NaN }), RangeError, /decorrelatedJitter: base/)
    assert.throws(() => RetryPolicy.decorrelatedJitter({ max: -1n }), RangeError, /decorrelatedJitter: max/)
    assert.throws(() => RetryPolicy.withBudget(-1), RangeError, /withBudget: budget/)
  })
})

describe("decorrelatedJitter", () => {
  it.effect("C3: each delay lies between the base and three times the one before, cut at the maximum", () =>
    Effect.gen(function*() {
      const runs = 4_000
      const samples = yield* samplesOf(RetryPolicy.decorrelatedJitter({ base: 100, max: 2_000 }), 12, runs)
      times(runs).forEach((run) => {
        let previous = 100
        for (const column of samples) {
          const delay = column[run] ?? Number.NaN
          assert.isTrue(Number.isInteger(delay) && delay >= 100 && delay <= Math.min(2_000, 3 * previous))
          previous = delay
        }
      })
      assert.isBelow(distance(samples[0] ?? [], 100, 301), critical(runs) + 1 / 200)
      assert.isTrue(samples[11]?.includes(2_000))
    }).pipe(Effect.withRandom(Random.make("decorrelated"))))

  it.effect("a maximum below the base wins; endless settings are cut at a day", () =>
    Effect.gen(function*() {
      const delays = yield* delaysOf(RetryPolicy.decorrelatedJitter({ base: 100, max: 10 }), times(5))
      assert.deepStrictEqual(delays, [10, 10, 10, 10, 10])
      const endless = RetryPolicy.decorrelatedJitter({ base: Duration.infinity, max: Duration.infinity })
      assert.deepStrictEqual(yield* delaysOf(endless, times(3)), [86_400_000, 86_400_000, 86_400_000])
      assert.deepStrictEqual(yield* delaysOf(RetryPolicy.decorrelatedJitter({ base: 0 }), times(2)), [0, 0])
    }))
})

describe("attempts", () => {
  it.effect.prop(
    "C3: attempts(n) makes exactly n attempts",
    [FastCheck.integer({ min: 1, max: 30 })],
    ([n]) =>
      Effect.gen(function*() {
        const made = yield* Ref.make(0)
        const failing = Effect.zipRight(Ref.update(made, (m) => m + 1), Effect.fail("no"))
        const policy = RetryPolicy.fullJitter({ base: 0 }).pipe(RetryPolicy.attempts(n))
        assert.strictEqual(yield* Effect.flip(Effect.retry(failing, policy)), "no")
        assert.strictEqual(yield* Ref.get(made), n)
      })
  )

  it.effect("ends when the schedule itself ends sooner", () =>
    Effect.gen(function*() {
      const delays = yield* delaysOf(Schedule.recurs(2).pipe(RetryPolicy.attempts(9)), times(20))
      assert.strictEqual(delays.length, 3)
    }))

  it("refuses a number of attempts that makes no sense", () => {
    for (const n of [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY]) {
      assert.throws(() => RetryPolicy.attempts(n), RangeError, /attempts: n must be/)
    }
  })
})

describe("withBudget", () => {
  const Calls = FastCheck.record({
    budget: milliseconds(20_000),
    delays: FastCheck.array(milliseconds(6_000), { minLength: 1, maxLength: 8 }),
    lengths: FastCheck.array(milliseconds(6_000), { minLength: 1, maxLength: 8 })
  })

  it.effect.prop(
    "C3: no attempt begins past the budget, and none that fits is left out, measured from the start of the call",
    [Calls],
    ([{ budget, delays: [first = 0, ...rest], lengths }]) =>
      Effect.gen(function*() {
        const policy = Schedule.fromDelays(first, ...rest).pipe(RetryPolicy.withBudget(budget))
        const starts = yield* startsUnder(policy, (n, startedAt) => ({
          millis: at(lengths, n, 0),
          error: { startedAt }
        }))
        const model = [first, ...rest].reduce<{ readonly starts: ReadonlyArray<number>; readonly open: boolean }>(
          ({ open, starts }, delay, n) => {
            const next = at(starts, n, 0) + at(lengths, n, 0) + delay
            return open && next <= budget ? { starts: [...starts, next], open } : { starts, open: false }
          },
          { starts: [0], open: true }
        )
        assert.deepStrictEqual(starts, model.starts)
        assert.isTrue(starts.every((start) => start <= budget))
      }),
    { fastCheck: { numRuns: 40 } }
  )

  it.effect.prop(
    "C3: no attempt begins past the budget after the first failure when the error tells no start",
    [Calls, FastCheck.integer()],
    ([{ budget, lengths }, seed]) =>
      Effect.gen(function*() {
        const policy = RetryPolicy.fullJitter({ base: 2_000, max: 6_000 }).pipe(
          RetryPolicy.attempts(9),
          RetryPolicy.withBudget(budget)
        )
        const starts = yield* startsUnder(policy, (n) => ({ millis: at(lengths, n, 0), error: "no" }))
        assert.isTrue(starts.every((start) => start <= at(lengths, 0, 0) + budget))
      }).pipe(Effect.withRandom(Random.make(seed))),
    { fastCheck: { numRuns: 30 } }
  )

  it.effect("C3: told waits and jitter together do not overrun it, where upTo would", () =>
    Effect.gen(function*() {
      const failing = (_: number, startedAt: number) => ({ millis: 400, error: { startedAt, waitMillis: 900 } })
      const told = Schedule.spaced(0).pipe(RetryPolicy.respectRetryAfter())
      assert.deepStrictEqual(yield* startsUnder(told.pipe(RetryPolicy.withBudget(3_000)), failing), [0, 1300, 2600])
      assert.deepStrictEqual(yield* startsUnder(told.pipe(RetryPolicy.withBudget(3_900)), failing), [
        0,
        1300,
        2600,
        3900
      ])
      const upTo = yield* startsUnder(told.pipe(Schedule.upTo(3_000)), failing)
      assert.isAbove(Math.max(...upTo), 3_000)
    }))

  it.effect("C3: a retry at once, too, is refused after the budget", () =>
    Effect.gen(function*() {
      const starts = yield* startsUnder(Schedule.forever.pipe(RetryPolicy.withBudget(1_000)), (_, startedAt) => ({
        millis: 600,
        error: { startedAt }
      }))
      assert.deepStrictEqual(starts, [0, 600])
    }))

  it.effect("an infinite budget sets no limit", () =>
    Effect.gen(function*() {
      const policy = Schedule.spaced("1 hour").pipe(RetryPolicy.attempts(5), RetryPolicy.withBudget(Duration.infinity))
      const starts = yield* startsUnder(policy, (_, startedAt) => ({ millis: 0, error: { startedAt } }))
      assert.strictEqual(starts.length, 5)
    }))
})

describe("respectRetryAfter", () => {
  const Waits = FastCheck.double({ min: 0, max: 100_000, noNaN: true })

  it.effect.prop(
    "F1: a told wait is never shortened nor jittered downward; without one the delay stays",
    [FastCheck.integer(), FastCheck.array(FastCheck.option(Waits, { nil: undefined }), { minLength: 1 })],
    ([seed, waits]) =>
      Effect.gen(function*() {
        const policy = RetryPolicy.fullJitter({ base: 20_000, max: 60_000 })
        const inputs = waits.map((waitMillis) => ({ startedAt: 0, waitMillis }))
        const told = yield* Effect.withRandom(
          delaysOf(policy.pipe(RetryPolicy.respectRetryAfter()), inputs),
          Random.make(seed)
        )
        const own = yield* Effect.withRandom(delaysOf(policy, inputs), Random.make(seed))
        waits.forEach((wait, n) => {
          assert.strictEqual(told[n], Math.max(own[n] ?? Number.NaN, Math.ceil(wait ?? 0)))
        })
        assert.strictEqual(told.length, waits.length)
      })
  )

  it.effect("F1: under Effect.retry the next attempt begins when the told wait ends", () =>
    Effect.gen(function*() {
      const policy = RetryPolicy.fullJitter().pipe(RetryPolicy.attempts(3), RetryPolicy.respectRetryAfter())
      const starts = yield* startsUnder(policy, () => ({
        millis: 100,
        error: Fault.make("RateLimited", { wait: "7 seconds" })
      }))
      assert.deepStrictEqual(starts, [0, 7_100, 14_200])
    }))

  it.effect("F1: finds the wait in every shape it may have", () =>
    Effect.gen(function*() {
      const inputs = [
        { waitMillis: 1_500 },
        { fault: Fault.make("RateLimited", { wait: "1500 millis" }) },
        { waitMillis: undefined, fault: Fault.make("Overloaded", { wait: 1_500 }) },
        { fault: Fault.make("RateLimited"), retryAfter: 1_500 },
        { retryAfter: Duration.seconds(1.5) },
        { waitMillis: 1_499.2 },
        { waitMillis: 1_499.0000001 }
      ]
      for (const input of inputs) {
        assert.deepStrictEqual(
          yield* delaysOf(Schedule.spaced(10).pipe(RetryPolicy.respectRetryAfter()), [input]),
          [1_500]
        )
      }
    }))

  it.effect("F3: what is no wait changes nothing", () =>
    Effect.gen(function*() {
      const inputs = [
        undefined,
        null,
        "no",
        7,
        new Error("no"),
        { waitMillis: Number.NaN },
        { waitMillis: -5 },
        { waitMillis: Number.NEGATIVE_INFINITY },
        { waitMillis: "9" },
        { fault: null },
        { fault: { waitMillis: null } },
        { retryAfter: "tomorrow" },
        { retryAfter: new Date(9_000) }
      ]
      const policy: Schedule.Schedule<number> = Schedule.spaced(10).pipe(RetryPolicy.respectRetryAfter())
      assert.deepStrictEqual(yield* delaysOf(policy, inputs), inputs.map(() => 10))
    }))

  it.effect("F3: a wait that no timer can hold ends the schedule instead of hanging the call", () =>
    Effect.gen(function*() {
      for (const retryAfter of [2 ** 31, 1e300, Number.POSITIVE_INFINITY, Duration.infinity]) {
        const starts = yield* startsUnder(
          Schedule.spaced(10).pipe(RetryPolicy.respectRetryAfter()),
          () => ({ millis: 0, error: { retryAfter } })
        )
        assert.deepStrictEqual(starts, [0])
      }
      const longest = yield* delaysOf(
        Schedule.spaced(10).pipe(RetryPolicy.respectRetryAfter()),
        [{ retryAfter: 2 ** 31 - 1 }]
      )
      assert.deepStrictEqual(longest, [2 ** 31 - 1])
    }))

  it.effect("a function of the user reads the wait", () =>
    Effect.gen(function*() {
      const policy = Schedule.spaced(10).pipe(
        RetryPolicy.respectRetryAfter((error: { readonly header: string | null }) =>
          error.header === null ? undefined : Number(error.header) * 1000
        )
      )
      const inputs = [{ header: "2" }, { header: null }, { header: "soon" }, { header: "0.001" }]
      assert.deepStrictEqual(yield* delaysOf(policy, inputs), [2_000, 10, 10, 10])
    }))
})

describe("composition", () => {
  it.effect("C3, F1: a policy of the user's own, with combinators of both sides", () =>
    Effect.gen(function*() {
      const seen = yield* Ref.make<ReadonlyArray<number>>([])
      interface Refused {
        readonly status: number
        readonly retryAfter?: Duration.Duration
      }
      const policy = RetryPolicy.fullJitter({ base: "1 second", max: "4 seconds" }).pipe(
        RetryPolicy.respectRetryAfter(),
        Schedule.tapOutput((delay) => Ref.update(seen, (all) => [...all, Duration.toMillis(delay)])),
        Schedule.intersect(Schedule.spaced("300 millis")),
        Schedule.whileInput((error: Refused) => error.status !== 400),
        RetryPolicy.attempts(10),
        RetryPolicy.withBudget("30 seconds")
      )
      const errors: ReadonlyArray<Refused> = [
        { status: 500 },
        { status: 429, retryAfter: Duration.seconds(9) },
        { status: 503 },
        { status: 400 },
        { status: 500 }
      ]
      const starts = yield* startsUnder(policy, (n) => ({ millis: 0, error: at(errors, n, { status: 500 }) }))
      assert.deepStrictEqual(starts, [0, 500, 9_500, 11_500])
      assert.deepStrictEqual(yield* Ref.get(seen), [500, 1_000, 2_000, 2_000])
    }).pipe(Effect.withRandom(Random.fixed([0.5]))))

  it.effect("intersects with a schedule that opens later", () =>
    Effect.gen(function*() {
      const policy = RetryPolicy.defaultPolicy.pipe(Schedule.intersect(Schedule.spaced("40 seconds")))
      assert.deepStrictEqual(yield* delaysOf(policy, [{ waitMillis: 50_000 }, {}]), [50_000, 40_000])
    }))

  it.effect("C3: the default makes 5 retries inside 60 s, and respects told waits", () =>
    Effect.gen(function*() {
      assert.strictEqual(RetryPolicy.default, RetryPolicy.defaultPolicy)
      const plain = yield* startsUnder(RetryPolicy.default, () => ({ millis: 10, error: "no" }))
      assert.strictEqual(plain.length, 6)
      const told = yield* startsUnder(RetryPolicy.default, (_, startedAt) => ({
        millis: 0,
        error: { startedAt, waitMillis: 25_000 }
      }))
      assert.deepStrictEqual(told, [0, 25_000, 50_000])
      assert.strictEqual((yield* startsUnder(RetryPolicy.backoff, () => ({ millis: 0, error: "no" }))).length, 6)
    }).pipe(Effect.withRandom(Random.make("default"))))
})

describe("start and step", () => {
  const retrying = (startedAt: number, waitMillis?: number): RetryPolicy.Retrying => ({ startedAt, waitMillis })

  /** Fails, waits and tries again as the policy says; gives the instants and how it ended. */
  const drive = (
    policy: Schedule.Schedule<unknown, RetryPolicy.Retrying>,
    failures: ReadonlyArray<{
      readonly millis: number
      readonly wait: number | undefined
    }>
  ) =>
    Effect.gen(function*() {
      let stepper = RetryPolicy.start(policy)
      let now = 0
      const starts = [now]
      for (const { millis, wait } of failures) {
        now += millis
        const next = yield* RetryPolicy.step(stepper, now, retrying(0, wait))
        if (next._tag === "Done") return { starts, end: next }
        assert.isTrue(Number.isInteger(next.at) && next.at >= now + (wait ?? 0))
        stepper = next.stepper
        now = next.at
        starts.push(now)
      }
      return { starts, end: undefined }
    })

  it.effect.prop(
    "C3: tells whether the budget or the attempts ended a call, and never begins past the budget",
    [
      FastCheck.integer(),
      FastCheck.array(
        FastCheck.record({
          millis: milliseconds(15_000),
          wait: FastCheck.option(milliseconds(90_000), { nil: undefined, freq: 3 })
        }),
        { minLength: 6, maxLength: 6 }
      )
    ],
    ([seed, failures]) =>
      Effect.gen(function*() {
        const { end, starts } = yield* drive(RetryPolicy.default, failures)
        assert.isTrue(starts.every((start) => start <= 60_000))
        // only a spent budget can end it before the sixth attempt, only spent attempts after it
        assert.deepStrictEqual(end, { _tag: "Done", outOfBudget: starts.length < 6 })
      }).pipe(Effect.withRandom(Random.make(seed)))
  )

  it.effect("C3: the budget is the reason when a wait does not fit into what is left, or into the whole of it", () =>
    Effect.gen(function*() {
      const stepper = RetryPolicy.start(RetryPolicy.default)
      const end = { _tag: "Done", outOfBudget: true } as const
      assert.deepStrictEqual(yield* RetryPolicy.step(stepper, 58_001, retrying(0, 2_000)), end)
      assert.deepStrictEqual(yield* RetryPolicy.step(stepper, 0, retrying(0, 120_000)), end)
      assert.deepStrictEqual(yield* RetryPolicy.step(stepper, 60_001, retrying(0)), end)
      const fits = yield* RetryPolicy.step(stepper, 58_000, retrying(0, 2_000))
      assert.strictEqual(fits._tag === "Continue" ? fits.at : undefined, 60_000)
      const composed = RetryPolicy.start(RetryPolicy.default.pipe(Schedule.intersect(Schedule.recurs(3))))
      assert.deepStrictEqual(yield* RetryPolicy.step(composed, 0, retrying(0, 120_000)), end)
    }))

  it.effect("C3: the budget is not the reason when the policy would have ended without it", () =>
    Effect.gen(function*() {
      const end = { _tag: "Done", outOfBudget: false } as const
      const spent = RetryPolicy.start(RetryPolicy.default.pipe(Schedule.intersect(Schedule.recurs(0))))
      assert.deepStrictEqual(yield* RetryPolicy.step(spent, 0, retrying(0)), end)
      assert.deepStrictEqual(yield* RetryPolicy.step(spent, 99_000, retrying(0)), end)
      const never = RetryPolicy.start(Schedule.stop)
      assert.deepStrictEqual(yield* RetryPolicy.step(never, 0, retrying(0)), end)
    }))

  it.effect("C3: an infinite start lifts the budget for a step", () =>
    Effect.gen(function*() {
      const next = yield* RetryPolicy.step(
        RetryPolicy.start(RetryPolicy.default),
        99_000,
        retrying(Number.POSITIVE_INFINITY, 120_000)
      )
      assert.strictEqual(next._tag === "Continue" ? next.at : undefined, 219_000)
    }))

  it.effect("gives whole milliseconds, and ends where a schedule would never open", () =>
    Effect.gen(function*() {
      const fraction = yield* RetryPolicy.step(RetryPolicy.start(Schedule.spaced("1500 micros")), 7, retrying(0))
      assert.strictEqual(fraction._tag === "Continue" ? fraction.at : undefined, 9)
      const never = yield* RetryPolicy.step(RetryPolicy.start(Schedule.spaced(Duration.infinity)), 7, retrying(0))
      assert.deepStrictEqual(never, { _tag: "Done", outOfBudget: false })
    }))

  it.effect("C3: an interval that is open already means now, for the budget too", () =>
    Effect.gen(function*() {
      const open = Schedule.makeWithState(0, (_now, _input: unknown, n: number) =>
        Effect.succeed([n, n, ScheduleDecision.continueWith(ScheduleInterval.make(10, 5_000))] as const))
      const ask = (now: number) =>
        RetryPolicy.step(RetryPolicy.start(open.pipe(RetryPolicy.withBudget(1_000))), now, retrying(0))
      const within = yield* ask(900)
      assert.strictEqual(within._tag === "Continue" ? within.at : undefined, 900)
      assert.deepStrictEqual(yield* ask(1_001), { _tag: "Done", outOfBudget: true })
    }))

  it.effect("a stepper is a value: the same step from it gives the same answer", () =>
    Effect.gen(function*() {
      const first = yield* RetryPolicy.step(RetryPolicy.start(RetryPolicy.default), 0, retrying(0))
      if (first._tag === "Done") return assert.fail("a fresh policy goes on")
      const again = () => Effect.withRandom(RetryPolicy.step(first.stepper, 500, retrying(0)), Random.make("same"))
      const one = yield* again()
      const other = yield* again()
      assert.deepStrictEqual(other, one)
    }))

  it.effect("a policy may need a service, and see more than the pool promises", () =>
    Effect.gen(function*() {
      class Longest extends Context.Tag("test/Longest")<Longest, number>() {}
      const policy = Schedule.spaced(100).pipe(
        Schedule.modifyDelayEffect(() => Effect.map(Longest, Duration.millis)),
        Schedule.whileInput((input: RetryPolicy.Retrying & { readonly kind: string }) => input.kind === "again"),
        RetryPolicy.withBudget(1_000)
      )
      const answer = (kind: string, now: number) =>
        Effect.provideService(
          RetryPolicy.step(RetryPolicy.start(policy), now, { ...retrying(0), kind }),
          Longest,
          700
        )
      const next = yield* answer("again", 10)
      assert.strictEqual(next._tag === "Continue" ? next.at : undefined, 710)
      assert.deepStrictEqual(yield* answer("again", 301), { _tag: "Done", outOfBudget: true })
      assert.deepStrictEqual(yield* answer("never", 301), { _tag: "Done", outOfBudget: false })
    }))
})

describe("retry tokens", () => {
  const Operations = FastCheck.array(
    FastCheck.record({
      // clocks may be set back
      elapsed: FastCheck.oneof(milliseconds(50), milliseconds(60_000), FastCheck.integer({ min: -5_000, max: 0 })),
      calls: FastCheck.integer({ min: 0, max: 30 }),
      retries: FastCheck.integer({ min: 0, max: 30 })
    }),
    { maxLength: 40 }
  )

  it.prop(
    "C3: nothing is made or lost: tokens follow an exact account in thousandths",
    [Operations],
    ([operations]) => {
      let bucket = RetryPolicy.tokens(0)
      let [account, now, latest] = [10_000, 0, 0]
      for (const { calls, elapsed, retries } of operations) {
        now += elapsed
        const settle = (earned: number, spent: number) => {
          account = Math.min(100_000, account + Math.max(0, now - latest) + earned) - spent
          latest = Math.max(latest, now)
        }
        for (let i = 0; i < calls; i++) {
          bucket = RetryPolicy.earn(bucket, now)
          settle(200, 0)
        }
        for (let i = 0; i < retries; i++) {
          const spent = RetryPolicy.spend(bucket, now)
          const available = Math.min(100_000, account + Math.max(0, now - latest))
          assert.strictEqual("wait" in spent, available < 1_000)
          if ("wait" in spent) {
            assert.strictEqual(now + spent.wait, Math.max(latest, now) + 1_000 - available)
          } else {
            bucket = spent
            settle(0, 1_000)
          }
        }
        assert.isTrue(bucket.level >= 0 && bucket.level <= 100)
        assert.approximately(bucket.level * 1_000, account, 1e-3)
        assert.strictEqual(bucket.at, latest)
      }
    }
  )

  it.prop(
    "C3: when everything fails, retries stay within 0.2 per call + 1 per second + 10",
    [FastCheck.array(milliseconds(4_000), { minLength: 1, maxLength: 200 }), FastCheck.integer({ min: 1, max: 20 })],
    ([gaps, greed]) => {
      let bucket = RetryPolicy.tokens(0)
      let [now, calls, retries] = [0, 0, 0]
      for (const gap of gaps) {
        now += gap
        calls += 1
        bucket = RetryPolicy.earn(bucket, now)
        for (let i = 0; i < greed; i++) {
          const spent = RetryPolicy.spend(bucket, now)
          if ("wait" in spent) break
          bucket = spent
          retries += 1
        }
        assert.isAtMost(retries, 0.2 * calls + now / 1_000 + 10 + 1e-6)
      }
    }
  )

  it("C3: a pool that begins has 10 tokens; an idle one gathers 100", () => {
    const drain = (bucket: RetryPolicy.Tokens, now: number, taken = 0): number => {
      const spent = RetryPolicy.spend(bucket, now)
      return "wait" in spent ? taken : drain(spent, now, taken + 1)
    }
    assert.strictEqual(drain(RetryPolicy.tokens(0), 0), 10)
    assert.strictEqual(drain(RetryPolicy.tokens(0), 60_000), 70)
    assert.strictEqual(drain(RetryPolicy.tokens(0), 86_400_000), 100)
    const busy = times(5_000).reduce((bucket) => RetryPolicy.earn(bucket, 0), RetryPolicy.tokens(0))
    assert.strictEqual(drain(busy, 0), 100)
  })

  it("C3: five calls bring a token", () => {
    const empty: RetryPolicy.Tokens = { level: 0, at: 0 }
    const four = times(4).reduce((bucket) => RetryPolicy.earn(bucket, 0), empty)
    assert.deepStrictEqual(RetryPolicy.spend(four, 0), { wait: 200 })
    assert.deepStrictEqual(RetryPolicy.spend(RetryPolicy.earn(four, 0), 0), { level: 0, at: 0 })
  })

  it.prop(
    "C3: calls may earn one by one or together",
    [FastCheck.array(milliseconds(20_000), { maxLength: 40 }), FastCheck.integer({ min: 0, max: 100 })],
    ([gaps, level]) => {
      const start: RetryPolicy.Tokens = { level, at: 0 }
      const one = gaps.reduce((bucket, gap) => RetryPolicy.earn(bucket, bucket.at + gap), start)
      const all = RetryPolicy.earn(start, one.at, RetryPolicy.tokenDefaults, gaps.length)
      assert.approximately(all.level, one.level, 1e-9)
      assert.strictEqual(all.at, one.at)
    }
  )

  it.prop(
    "C3: the wait is exact: there is a token after it, and none a millisecond before",
    [
      FastCheck.double({ min: 0, max: 0.99, noNaN: true }),
      FastCheck.double({ min: 0.01, max: 5, noNaN: true }),
      FastCheck.integer({ min: 0, max: 2_000_000_000_000 })
    ],
    ([level, perSecond, now]) => {
      const options = RetryPolicy.tokenOptions({ perSecond })
      const bucket: RetryPolicy.Tokens = { level, at: now }
      const spent = RetryPolicy.spend(bucket, now, options)
      if (!("wait" in spent)) return assert.fail("less than one token cannot be spent")
      assert.isTrue(Number.isInteger(spent.wait) && spent.wait > 0)
      assert.notProperty(RetryPolicy.spend(bucket, now + spent.wait, options), "wait")
      assert.property(RetryPolicy.spend(bucket, now + spent.wait - 1.001, options), "wait")
    }
  )

  it("C3: settings change it", () => {
    const options = RetryPolicy.tokenOptions({ perCall: 1, perSecond: 0, burst: 500, cap: 3 })
    assert.strictEqual(RetryPolicy.tokens(0, options).level, 3)
    const none: RetryPolicy.Tokens = { level: 0, at: 0 }
    assert.deepStrictEqual(RetryPolicy.spend(none, 9_000, options), { wait: Number.POSITIVE_INFINITY })
    assert.strictEqual(RetryPolicy.earn(none, 9_000, options).level, 1)
    const unlimited = RetryPolicy.tokenOptions({ burst: Number.POSITIVE_INFINITY, cap: Number.POSITIVE_INFINITY })
    assert.deepStrictEqual(RetryPolicy.spend(RetryPolicy.tokens(0, unlimited), 5, unlimited), {
      level: Number.POSITIVE_INFINITY,
      at: 5
    })
    assert.deepStrictEqual(RetryPolicy.tokenOptions(), RetryPolicy.tokenDefaults)
  })

  it("names the setting that is not usable", () => {
    assert.throws(() => RetryPolicy.tokenOptions({ perCall: -1 }), RangeError, /perCall/)
    assert.throws(() => RetryPolicy.tokenOptions({ perSecond: Number.POSITIVE_INFINITY }), RangeError, /perSecond/)
    assert.throws(() => RetryPolicy.tokenOptions({ burst: Number.NaN }), RangeError, /burst/)
    assert.throws(() => RetryPolicy.tokenOptions({ cap: 0.5 }), RangeError, /cap/)
  })
})
