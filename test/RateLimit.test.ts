import { describe, expect, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as DeclaredLimit from "../src/DeclaredLimit.js"
import * as RateLimit from "../src/RateLimit.js"
import * as Totals from "../src/Totals.js"
import { bucket, fixedWindow, type Provider, seeded, simulate, slidingWindow } from "./support/limited.js"

const declared = (limits: Parameters<typeof RateLimit.declare>[1][number]): RateLimit.RateLimit => {
  const made = RateLimit.declare(undefined, [limits])
  if (made === undefined) throw new Error("nothing is declared")
  return made
}

/** Leases, if it fits. */
const take = (limits: RateLimit.RateLimit, estimate: RateLimit.Estimate, now: number) =>
  RateLimit.gate(limits, estimate, now) === undefined ? RateLimit.reserve(limits, estimate, now) : undefined

/** Leases, whether it fits or not. */
const taken = (limits: RateLimit.RateLimit, estimate: RateLimit.Estimate = {}, now = 0) =>
  RateLimit.reserve(limits, estimate, now)

const until = (limits: RateLimit.RateLimit, now: number, estimate: RateLimit.Estimate = {}) =>
  RateLimit.gate(limits, estimate, now)?.until

describe("declared limits", () => {
  it.prop(
    "an answer that came whole is taken in in one step as in three",
    [
      FastCheck.array(FastCheck.tuple(FastCheck.nat(400), FastCheck.nat(90), FastCheck.option(FastCheck.nat(200))), {
        maxLength: 40
      })
    ],
    ([answers]) => {
      let limits = declared({ requestsPerMinute: 1_000, tokensPerMinute: 5_000, tokensPerDay: 20_000 })
      let now = 0
      for (const [waits, input, output] of answers) {
        now += waits * 100
        const [leased, reservation] = RateLimit.reserve(limits, { input, maxOutput: 50 }, now)
        const usage = output === null ? undefined : { input, output }
        const three = RateLimit.accepted(RateLimit.answered(leased, now + 5), reservation, now + 5)
        limits = RateLimit.settled(leased, reservation, usage, now + 5)
        expect(limits).toEqual(RateLimit.spent(three, reservation, usage, now + 5))
      }
    }
  )

  it("A1: of 100 at once, 10 per minute let exactly 10 through, and the next one window after the first answer", () => {
    let limits = declared({ requestsPerMinute: 10 })
    let passed = 0
    for (let i = 0; i < 100; i++) {
      const next = take(limits, {}, 0)
      if (next === undefined) continue
      passed++
      limits = next[0]
    }
    expect(passed).toBe(10)
    // In flight: from when on they count is not known yet.
    expect(RateLimit.gate(limits, {}, 0)).toEqual({ until: Infinity, earliest: -Infinity, provenance: "measured" })
    for (let i = 0; i < 10; i++) limits = RateLimit.answered(limits, 700 + i)
    expect(RateLimit.gate(limits, {}, 800)).toEqual({ until: 60_700, earliest: 60_700, provenance: "measured" })
    expect(take(limits, {}, 60_699)).toBeUndefined()
    expect(take(limits, {}, 60_700)).toBeDefined()
  })

  it("A1: whatever happens, it is as a naive model says, and no provider's window ever holds more", () => {
    const step = FastCheck.record({ gap: FastCheck.nat(20_000), lasts: FastCheck.nat(30_000), sent: FastCheck.nat(9) })
    FastCheck.assert(
      FastCheck.property(
        FastCheck.integer({ min: 1, max: 12 }),
        FastCheck.array(step, { maxLength: 120 }),
        (limit, steps) => {
          let limits = declared({ requestsPerMinute: limit })
          /** The naive model: all attempts, with the instants of their lease and their answer. */
          let attempts: ReadonlyArray<{ readonly from: number; readonly to: number; readonly sent: boolean }> = []
          let now = 0
          const answerUpTo = (instant: number) => {
            const due = attempts.filter(({ from, to }) => from <= instant && to <= instant && to > answeredTo)
            for (const { sent, to } of [...due].sort((a, b) => a.to - b.to)) {
              limits = sent
                ? RateLimit.answered(limits, to)
                : RateLimit.returned(limits, { input: 0, output: 0, most: 0, leased: limits.leased }, to)
            }
            answeredTo = instant
          }
          let answeredTo = -1
          for (const { gap, lasts, sent } of steps) {
            now += gap
            answerUpTo(now)
            const counted = attempts.filter((a) => a.to > now || (a.sent && a.to + 60_000 > now)).length
            const next = take(limits, {}, now)
            expect(next !== undefined).toBe(counted < limit)
            if (next === undefined) continue
            limits = next[0]
            attempts = [...attempts, { from: now, to: now + lasts + 1, sent: sent > 0 }]
          }
          // The provider counts at some instant before its answer; take the earliest and the latest.
          for (const at of ["from", "to"] as const) {
            const instants = attempts.filter(({ sent }) => sent).map((attempt) => attempt[at])
            for (const start of instants) {
              expect(instants.filter((i) => i >= start && i < start + 60_000).length).toBeLessThanOrEqual(limit)
            }
          }
        }
      )
    )
  })

  it("A1: a large limit keeps few instants, and none is free too early", () => {
    let limit = DeclaredLimit.make("requests", 5_000, 60_000)
    const answers: Array<number> = []
    const random = seeded(7)
    let now = 0
    let refusals = 0
    for (let i = 0; i < 12_000; i++) {
      now += Math.floor(random() * 15)
      const naive = answers.filter((at) => at + 60_000 > now).length
      if (DeclaredLimit.gate(limit, 1, now) === undefined) {
        expect(naive).toBeLessThan(5_000)
        limit = DeclaredLimit.count(DeclaredLimit.hold(limit, 1), 1, 1, now)
        answers.push(now)
        if (answers.length > 6_000) answers.shift()
      } else {
        refusals++
        // Later than need be by the width of one cell at most.
        expect(answers.filter((at) => at + 60_000 > now - 235).length).toBeGreaterThanOrEqual(5_000)
      }
      expect(limit.log.size).toBeLessThanOrEqual(300)
    }
    expect(refusals).toBeGreaterThan(0)
  })

  it("A1: at any provider of such a limit, nobody is refused", () => {
    const providers: ReadonlyArray<(seed: number) => Provider> = [
      (seed) => fixedWindow(30, seeded(seed)() * 60_000),
      () => slidingWindow(30)
    ]
    for (const provider of providers) {
      for (let seed = 1; seed <= 5; seed++) {
        const report = simulate({
          providers: [provider(seed), provider(seed + 100)],
          limits: declared({ requestsPerMinute: 30 }),
          announces: false,
          tells: "millis",
          perMinute: 75,
          seconds: 240,
          seed
        })
        expect(report.refused).toBe(0)
        expect(report.offered).toBeGreaterThan(250)
      }
    }
  })

  it("A1: tokens are reserved by estimate, settled by usage, and returned only if unsent", () => {
    const limits = declared({ tokensPerMinute: 1_000 })
    const [first, reservation] = taken(limits, { input: 400, maxOutput: 300 })
    expect(reservation).toMatchObject({ input: 400, output: 300 })
    expect(take(first, { input: 300, maxOutput: 1 }, 0)).toBeUndefined()
    expect(take(first, { input: 300, maxOutput: 0 }, 0)).toBeDefined()
    // It used less: the rest is there at once, what it used one window after its end.
    const settled = RateLimit.spent(RateLimit.answered(first, 100), reservation, { input: 400, output: 50 }, 5_000)
    expect(until(settled, 5_000, { input: 550, maxOutput: 0 })).toBeUndefined()
    expect(until(settled, 5_000, { input: 551, maxOutput: 0 })).toBe(65_000)
    // Nobody says what it used: the estimate stands.
    const unknown = RateLimit.spent(first, reservation, undefined, 5_000)
    expect(until(unknown, 5_000, { input: 301, maxOutput: 0 })).toBe(65_000)
    expect(until(RateLimit.returned(first, reservation, 0), 0, { input: 1_000, maxOutput: 0 })).toBeUndefined()
  })

  it("A1: what is more than the limit passes when nothing is taken", () => {
    const limits = declared({ tokensPerMinute: 1_000 })
    const huge = { input: 5_000, maxOutput: 0 }
    expect(until(limits, 0, huge)).toBeUndefined()
    const [one, reservation] = taken(limits, { input: 1, maxOutput: 0 })
    const settled = RateLimit.spent(one, reservation, undefined, 10)
    expect(until(settled, 10, huge)).toBe(60_010)
  })

  it("A1: the output is reserved as such requests put out usually, once that was seen", () => {
    let limits = declared({ tokensPerMinute: 1e9 })
    const random = seeded(3)
    expect(RateLimit.costOf(limits, { input: 1, maxOutput: 4_000 }).output).toBe(4_000)
    for (let i = 0; i < 2_000; i++) {
      const [next, reservation] = taken(limits, { input: 1 }, i)
      limits = RateLimit.spent(next, reservation, { input: 1, output: Math.floor(random() * 1_000) }, i)
    }
    const { output } = RateLimit.costOf(limits, { input: 1, maxOutput: 4_000 })
    expect(output).toBeGreaterThan(880)
    expect(output).toBeLessThan(1_010)
    expect(RateLimit.costOf(limits, { input: 1, maxOutput: 20 }).output).toBe(20)
  })

  it("A1: minute and day bind both, each at the tightest that was declared", () => {
    const made = RateLimit.declare(undefined, [{ requestsPerMinute: 5, requestsPerDay: 8 }, { requestsPerMinute: 2 }])
    if (made === undefined) throw new Error("nothing is declared")
    let limits = made
    let now = 0
    let passed = 0
    for (; now < 300_000; now += 1_000) {
      const next = take(limits, {}, now)
      if (next === undefined) continue
      passed++
      limits = RateLimit.answered(next[0], now)
    }
    expect(passed).toBe(8)
    expect(until(limits, now)).toBe(86_400_000)
  })
})

describe("announced limits", () => {
  const says = (
    limits: RateLimit.RateLimit,
    leased: Totals.Totals,
    remaining: number,
    resetMillis: number,
    now: number
  ) => RateLimit.announced(limits, leased, [{ name: "requests", limit: 100, remaining, resetMillis }], now)

  it("A2: nothing left closes until the reset; what was sent since is subtracted", () => {
    const [one, first] = taken(RateLimit.empty)
    const [two, second] = taken(one)
    const [three] = taken(two)
    const seen = says(three, first.leased, 3, 10_000, 50)
    expect(until(seen, 50)).toBeUndefined()
    expect(until(taken(seen, {}, 60)[0], 60)).toBe(10_050)
    // The answer to a later request knows of more.
    const later = says(taken(seen, {}, 60)[0], second.leased, 3, 9_940, 110)
    expect(until(later, 110)).toBeUndefined()
    expect(until(says(later, second.leased, 0, 9_900, 150), 150)).toBe(10_050)
    // The answer to an earlier one knows less.
    expect(until(says(says(later, second.leased, 0, 9_900, 150), first.leased, 99, 1, 160), 160)).toBe(10_050)
    expect(until(says(later, second.leased, 0, 9_900, 150), 10_050)).toBeUndefined()
  })

  it("A2: what was never sent is there again, and once only", () => {
    const [one, first] = taken(RateLimit.empty)
    let limits = says(one, first.leased, 2, 10_000, 0)
    for (let i = 0; i < 5; i++) {
      const [two, second] = taken(limits)
      const [three, third] = taken(two)
      expect(until(three, 0)).toBe(10_000)
      limits = RateLimit.returned(RateLimit.returned(three, third, 0), second, 0)
      expect(until(limits, 0)).toBeUndefined()
    }
    // Who is answered does not know of those that were not sent, whether they began before or after.
    const [two, second] = taken(limits)
    const [three, third] = taken(two)
    const [four, fourth] = taken(three)
    const told = says(RateLimit.returned(four, fourth, 0), third.leased, 0, 9_900, 100)
    expect(until(RateLimit.returned(told, second, 100), 100)).toBe(10_000)
  })

  it("A2: after its reset a window holds what it holds, though nobody says so", () => {
    const [one, first] = taken(RateLimit.empty)
    let limits = says(one, first.leased, 0, 10_000, 0)
    for (let i = 0; i < 100; i++) {
      expect(until(limits, 10_000)).toBeUndefined()
      limits = taken(limits, {}, 10_000)[0]
    }
    expect(until(limits, 10_000)).toBe(20_000)
  })

  it("A2: more that was in flight before anything was known than a bucket holds does not close it for ever", () => {
    // 60 were leased before their limits were kept: no answer says which of them it has counted.
    let limits: RateLimit.RateLimit = { ...RateLimit.empty, leased: { requests: 60, input: 0, output: 0, unused: 0 } }
    limits = says(limits, Totals.none, 19, 500, 0)
    limits = says(limits, Totals.none, 0, 10_000, 40)
    expect(until(limits, 40)).toBe(10_040)
    expect(until(limits, 10_040)).toBeUndefined()
    // The same where it is known to be a bucket.
    limits = says(
      says(says(limits, Totals.none, 19, 500, 800), Totals.none, 17, 1_500, 801),
      Totals.none,
      9,
      5_500,
      802
    )
    expect(until(limits, 802)).toBeDefined()
    expect(until(limits, 60_000)).toBeUndefined()
  })

  it("A2: a bucket is told from a window by its reset, and opens for one as soon as one fits", () => {
    const ask = bucket(120, 20)
    let limits = RateLimit.empty
    let passed = 0
    let waits: ReadonlyArray<number> = []
    for (let now = 0; now < 20_000; now += 100) {
      const next = take(limits, {}, now)
      if (next === undefined) {
        waits = [...waits, (until(limits, now) ?? now) - now]
        continue
      }
      passed++
      const answer = ask(now)
      expect(answer.ok).toBe(true)
      limits = RateLimit.announced(next[0], next[1].leased, [{ name: "requests", ...answer }], now)
    }
    // 20 at first, and 2 per second.
    expect(passed).toBeGreaterThan(55)
    expect(waits.length).toBeGreaterThan(0)
    expect(Math.max(...waits)).toBeLessThan(700)
  })

  it("A2: whether resets count from the request or from its answer is learned, and the gate opens just then", () => {
    /** Eight answers, the second ones after longer, and the last leaves nothing. */
    const opens = (resetOf: (sentAt: number, answeredAt: number) => number) => {
      let limits = RateLimit.empty
      for (let i = 0; i < 8; i++) {
        const sentAt = 1_000 + i * 3_000
        const answeredAt = sentAt + (i % 2 === 0 ? 400 : 1_900)
        const [next, own] = taken(limits, {}, sentAt)
        const said = { name: "requests", limit: 100, remaining: 7 - i, resetMillis: resetOf(sentAt, answeredAt) }
        limits = RateLimit.announced(next, own.leased, [said], answeredAt, 1, sentAt)
      }
      return until(limits, 30_000)
    }
    // It ends at 60 s. Requests take 5 ms to the provider.
    expect(opens((sentAt) => 60_000 - sentAt - 5)).toBe(60_015)
    expect(opens((_, answeredAt) => 60_000 - answeredAt + 5)).toBe(60_005)
  })

  it("A2: a refusal that says to come again long before all is there shows a bucket, its pace and its size", () => {
    const refusal = (waitMillis: number, resetMillis: number) => {
      const [one, own] = taken(RateLimit.empty)
      const said = says(one, own.leased, 0, resetMillis, 0)
      return RateLimit.refused(said, "requests", own, waitMillis, 0)
    }
    // 100 per minute: one in 600 ms; 12 s until it is full: it holds 20.
    const bucket = refusal(600, 12_000)
    expect(Math.abs((until(bucket, 599) ?? 0) - 600)).toBeLessThanOrEqual(1)
    const [first] = taken(bucket, {}, 600)
    expect(Math.abs((until(first, 600) ?? 0) - 1_200)).toBeLessThanOrEqual(1)
    let later = bucket
    for (let i = 0; i < 20; i++) {
      expect(until(later, 30_000)).toBeUndefined()
      later = taken(later, {}, 30_000)[0]
    }
    expect(Math.abs((until(later, 30_000) ?? 0) - 30_600)).toBeLessThanOrEqual(1)
    // In whole seconds, too.
    expect(Math.abs((until(taken(refusal(1_000, 12_000), {}, 600)[0], 600) ?? 0) - 1_200)).toBeLessThanOrEqual(1)
    // To come again when all is there says nothing of how it comes.
    expect(until(refusal(11_500, 12_000), 11_999)).toBe(12_000)
    // Such a pace is no minute's limit: only that it comes little by little is known.
    expect(refusal(5_000, 60_000).announced).toMatchObject([{ votes: 2, most: undefined }])
  })

  it("A2: what answers showed to be a window is closed until its reset, whatever a refusal tells beside it", () => {
    /** So many answers of a window of 100; then others take the rest of it, and a refusal at 20 s tells one second. */
    const refusedAfter = (answers: number) => {
      let limits = RateLimit.empty
      for (let i = 0; i < answers; i++) {
        const [next, own] = taken(limits, {}, i * 1_000)
        limits = says(next, own.leased, 99 - i, 60_000 - i * 1_000, i * 1_000)
      }
      const [next, own] = taken(limits, {}, 20_000)
      return RateLimit.refused(says(next, own.leased, 0, 40_000, 20_040), "requests", own, 1_000, 20_040)
    }
    expect(until(refusedAfter(12), 20_040)).toBeGreaterThan(59_900)
    // One answer shows nothing; but a hundred were there, which do not come in 40 s at 100 a minute: nothing is left now.
    expect(until(refusedAfter(1), 20_040)).toBeGreaterThan(20_040)
  })

  it("A2: who was sent before anything was known tells how much there may be, though others were counted since", () => {
    let limits = RateLimit.empty
    const early = (remaining: number, resetMillis: number, now: number, inFlight: number) => {
      const said = [{ name: "requests", limit: 100, remaining, resetMillis }]
      limits = RateLimit.announced(limits, undefined, said, now, inFlight)
    }
    early(0, 10_000, 40, 3)
    early(18, 900, 300, 2)
    expect(until(limits, 300)).toBe(10_040)
    let later = limits
    for (let i = 0; i < 19; i++) later = taken(later, {}, 10_040)[0]
    expect(until(later, 10_040)).toBeGreaterThan(10_040)
  })

  it("A2: windows and buckets that announce themselves are used up, and nobody is refused", () => {
    const all: ReadonlyArray<readonly [Provider, Provider]> = [
      [fixedWindow(60, 13_000), fixedWindow(60, 41_000)],
      [bucket(60, 15), bucket(60, 15)]
    ]
    for (const providers of all) {
      const report = simulate({
        providers,
        limits: RateLimit.empty,
        announces: true,
        tells: "millis",
        perMinute: 140,
        seconds: 120,
        seed: 5
      })
      expect(report.refused).toBe(0)
      expect(report.inTime).toBe(report.offered)
    }
  })

  it("A2: a window is over when the earliest of its answers says so: a reset counts from when the provider looked", () => {
    let limits = RateLimit.empty
    for (const [i, tookMillis] of [900, 400, 800, 700, 600, 500, 150, 600, 900].entries()) {
      const [next, own] = taken(limits, {}, i * 1_000)
      const said = { name: "requests", limit: 9, remaining: 8 - i, resetMillis: 20_000 - i * 1_000 }
      limits = RateLimit.announced(next, own.leased, [said], i * 1_000 + tookMillis)
    }
    const end = until(limits, 8_900) ?? 0
    expect(end).toBeGreaterThanOrEqual(20_000)
    // The last answer alone would say 20,900.
    expect(end).toBeLessThanOrEqual(20_400)
    // What was reckoned, and not told, binds no answer.
    const [rolled, own] = taken(limits, {}, end)
    const later = RateLimit.announced(
      rolled,
      own.leased,
      [{ name: "requests", limit: 9, remaining: 0, resetMillis: 60_000 }],
      end + 10
    )
    expect(until(later, end + 10)).toBe(end + 60_010)
  })

  it("A2: when what is left will be lost is known of windows and of buckets", () => {
    const [one, own] = taken(RateLimit.empty)
    expect(RateLimit.lostAt(one, 0)).toBe(Infinity)
    expect(RateLimit.pace(one)).toBe(Infinity)
    const window = RateLimit.announced(
      one,
      own.leased,
      [{ name: "requests", limit: 60, remaining: 50, resetMillis: 7_000 }],
      1_000
    )
    expect(RateLimit.lostAt(window, 1_000)).toBe(8_000)
    expect(RateLimit.pace(window)).toBe(60 / 60_000)
    const [two, second] = taken(window, { input: 30 }, 2_000)
    const tokens = RateLimit.announced(
      two,
      second.leased,
      [{ name: "tokens", limit: 600, remaining: 500, resetMillis: 3_000 }],
      2_000
    )
    expect(RateLimit.lostAt(tokens, 2_000)).toBe(5_000)
    // Fifteen tokens for each, on average.
    expect(RateLimit.pace(tokens)).toBe(600 / 60_000 / 15)
  })

  it("A2: what is left may be lost before the answer's own time says so; it opens no sooner for that", () => {
    const heard = (remaining: number, resetMillis: number) => {
      const [one, { leased }] = taken(RateLimit.empty)
      const said = { name: "requests", limit: 60, remaining, resetMillis }
      return RateLimit.announced(one, leased, [said], 1_000, 1, 200)
    }
    const window = heard(59, 7_000)
    expect(RateLimit.lostAt(window, 1_000)).toBe(7_200)
    expect(until(heard(0, 7_000), 7_500)).toBe(8_000)
    // The next window is a minute long, though less was seen of the first; what may be a bucket is soon full again.
    expect(RateLimit.lostAt(window, 7_300)).toBe(67_200)
    expect(RateLimit.lostAt(heard(58, 2_000), 2_300)).toBe(4_200)
    // A later answer of the same window, to a request that was sent closer to it, knows better.
    const [next, { leased }] = taken(window, {}, 3_000)
    const said = { name: "requests", limit: 60, remaining: 58, resetMillis: 4_290 }
    expect(RateLimit.lostAt(RateLimit.announced(next, leased, [said], 4_500, 1, 3_000), 4_500)).toBe(7_290)
  })

  it("A2: before a request was counted, one like the next is what tokens are enough for", () => {
    const said = { name: "tokens", limit: 600, remaining: 500, resetMillis: 3_000 }
    const limits = RateLimit.announced(RateLimit.empty, undefined, [said], 0)
    expect(RateLimit.room(limits, 0, { input: 40, maxOutput: 10 })).toBe(10)
    expect(RateLimit.pace(limits, { input: 40, maxOutput: 10 })).toBe(600 / 60_000 / 50)
    expect(RateLimit.room(RateLimit.empty, 0)).toBe(Infinity)
  })

  it("A2: of whole seconds the earliest end counts that any answer tells, until one tells of the next window", () => {
    // Dates in whole seconds on both sides: the window ends at 30 s.
    const ends = [30_910, 30_640, 30_700, 30_330, 30_800, 30_950, 30_480, 30_720]
    let limits = RateLimit.empty
    for (const [i, end] of ends.entries()) {
      const sentAt = i * 2_000
      const [next, own] = taken(limits, {}, sentAt)
      const resetMillis = 30_000 - Math.floor(sentAt / 1_000) * 1_000
      const said = { name: "requests", limit: 50, remaining: 40 - i, resetMillis }
      limits = RateLimit.announced(next, own.leased, [said], end - resetMillis, 1, sentAt)
    }
    const closed = (remaining: number, resetMillis: number, now: number) => {
      const [next, own] = taken(limits, {}, now - 300)
      return until(
        RateLimit.announced(
          next,
          own.leased,
          [{ name: "requests", limit: 50, remaining, resetMillis }],
          now,
          1,
          now - 300
        ),
        now
      )
    }
    expect(closed(0, 16_000, 14_700)).toBe(30_330)
    expect(closed(0, 75_000, 14_700)).toBe(89_700)
  })

  it("A2: what requests did not use is there again where the provider gives it back, and not where it keeps it", () => {
    for (const gives of [true, false]) {
      let limits = RateLimit.empty
      let left = 10_000
      for (let i = 0; i < 12; i++) {
        const sentAt = i * 1_000
        const [next, own] = taken(limits, { input: 10, maxOutput: 90 }, sentAt)
        left -= 100
        const said = { name: "tokens", limit: 10_000, remaining: left, resetMillis: 60_000 - sentAt }
        limits = RateLimit.announced(next, own.leased, [said], sentAt + 500, 1, sentAt)
        limits = RateLimit.spent(limits, own, { input: 10, output: 30 }, sentAt + 500)
        if (gives) left += 60
      }
      expect(left).toBe(gives ? 9_520 : 8_800)
      // Of the last it is not known to a hair when it was counted.
      const [{ remaining = NaN } = { remaining: NaN }] = RateLimit.left(limits, 21_500)
      expect(remaining).toBeLessThanOrEqual(left)
      expect(remaining).toBeGreaterThanOrEqual(left - 1)
    }
  })

  /** After a while with a provider that gives back what requests did not use, in windows of a minute. */
  const generous = (): RateLimit.RateLimit => {
    let limits = RateLimit.empty
    for (let i = 0; i < 12; i++) {
      const sentAt = i * 1_000
      const [next, own] = taken(limits, { input: 10, maxOutput: 90 }, sentAt)
      const said = { name: "tokens", limit: 10_000, remaining: 9_900 - i * 40, resetMillis: 60_000 - sentAt }
      limits = RateLimit.announced(next, own.leased, [said], sentAt + 500, 1, sentAt)
      limits = RateLimit.spent(limits, own, { input: 10, output: 30 }, sentAt + 500)
    }
    return limits
  }

  it("A2: what requests of the window before did not use adds nothing to this one", () => {
    let limits = generous()
    const before: Array<RateLimit.Reservation> = []
    for (let i = 0; i < 5; i++) {
      const [next, own] = taken(limits, { input: 10, maxOutput: 990 }, 50_000)
      limits = next
      before.push(own)
    }
    limits = taken(limits, { input: 10, maxOutput: 90 }, 61_000)[0]
    for (const own of before) limits = RateLimit.spent(limits, own, { input: 10, output: 10 }, 61_500)
    const [{ remaining = NaN } = { remaining: NaN }] = RateLimit.left(limits, 75_000)
    expect(remaining).toBe(9_900)
    // What one of them used beyond what it might is taken now.
    const [first = expect.fail("nothing was leased")] = before
    const [more] = RateLimit.left(RateLimit.spent(limits, first, { input: 10, output: 1_990 }, 75_000), 75_000)
    expect(more?.remaining).toBe(8_900)
  })

  it("A2: what was never sent does not look as if the provider gave back what was not used", () => {
    let limits = RateLimit.empty
    for (let i = 0; i < 12; i++) {
      const sentAt = i * 1_000
      const [one, unsent] = taken(limits, { input: 10, maxOutput: 90 }, sentAt)
      const [two, own] = taken(RateLimit.returned(one, unsent, sentAt), { input: 10, maxOutput: 90 }, sentAt)
      const said = { name: "tokens", limit: 10_000, remaining: 9_900 - i * 100, resetMillis: 60_000 - sentAt }
      limits = RateLimit.announced(two, own.leased, [said], sentAt + 500, 1, sentAt)
      limits = RateLimit.spent(limits, own, { input: 10, output: 10 }, sentAt + 500)
    }
    const [{ remaining } = { remaining: NaN }] = RateLimit.left(limits, 21_500)
    expect(remaining).toBe(8_800)
  })

  it("A2: a bucket of tokens is as full as its provider says, whether it gives back or keeps", () => {
    for (const gives of [true, false]) {
      const perMilli = 0.1
      let limits = RateLimit.empty
      let level = 6_000
      let at = 0
      const fill = (now: number) => {
        level = Math.min(6_000, level + (now - at) * perMilli)
        at = now
      }
      for (let i = 0; i < 20; i++) {
        const sentAt = i * 1_600
        fill(sentAt)
        const [next, own] = taken(limits, { input: 10, maxOutput: 390 }, sentAt)
        level -= 400
        const said = {
          name: "tokens",
          limit: 6_000,
          remaining: Math.floor(level),
          resetMillis: Math.ceil((6_000 - level) / perMilli)
        }
        fill(sentAt + 500)
        limits = RateLimit.announced(next, own.leased, [said], sentAt + 500, 1, sentAt)
        limits = RateLimit.spent(limits, own, { input: 10, output: 230 }, sentAt + 500)
        if (gives) level += 160
      }
      for (const now of [31_000, 34_000, 40_000]) {
        fill(now)
        const [{ remaining = NaN } = { remaining: NaN }] = RateLimit.left(limits, now)
        expect(remaining - level).toBeLessThanOrEqual(51)
        expect(level - remaining).toBeLessThanOrEqual(gives ? 160 : 51)
      }
    }
  })

  it("A2: a limit of tokens counts tokens, of input or of output where it says so", () => {
    const [one, first] = taken(RateLimit.empty)
    const said = (name: string) =>
      RateLimit.announced(one, first.leased, [{ name, limit: 1_000, remaining: 100, resetMillis: 5_000 }], 0)
    const request = { input: 90, maxOutput: 20 }
    expect(until(said("tokens"), 0, request)).toBe(5_000)
    expect(until(said("input-tokens"), 0, request)).toBeUndefined()
    expect(until(said("input-tokens"), 0, { input: 101, maxOutput: 0 })).toBe(5_000)
    expect(until(said("output-tokens"), 0, request)).toBeUndefined()
    expect(until(said("output-tokens"), 0, { input: 0, maxOutput: 101 })).toBe(5_000)
    expect(until(said("tokens_usage_based"), 0, request)).toBe(5_000)
    expect(until(said("images"), 0, request)).toBeUndefined()
  })
})

describe("learned limits", () => {
  const phases = [7_000, 19_000, 33_000, 46_000, 58_000]
  const kinds: Readonly<Record<string, (rate: number) => ReadonlyArray<Provider>>> = {
    "fixed windows": (rate) => phases.map((phase) => fixedWindow(rate, phase)),
    "buckets": (rate) => phases.map(() => bucket(rate, 20)),
    "buckets from which refusals take": (rate) => phases.map(() => bucket(rate, 20, true)),
    "buckets that forget their refusals when they tell a wait": (rate) =>
      phases.map(() => bucket(rate, 20, "forgetful"))
  }
  for (const [name, providers] of Object.entries(kinds)) {
    for (const tells of ["millis", "seconds"] as const) {
      it(`A3: ${name} that tell ${tells} are learned with few refusals, and used up`, () => {
        for (let seed = 1; seed <= 3; seed++) {
          const report = simulate({
            providers: providers(120),
            limits: RateLimit.empty,
            announces: false,
            tells,
            perMinute: 720,
            seconds: 150,
            seed
          })
          expect(report.inTime).toBeGreaterThanOrEqual(report.offered * 0.98)
          // What was told is met exactly until it is clear that it is of no use: two more for each key.
          const met = name.includes("forget") ? 10 : 0
          expect(report.refused).toBeLessThanOrEqual(report.offered * 0.02 + 5 + met)
        }
      })
    }
  }

  it("A3: what a window holds is there at once when it begins, and no more until its end", () => {
    const [one, first] = taken(RateLimit.empty)
    let limits = RateLimit.refused(one, "requests", first, 5_000, 0)
    // 20 are accepted in 20 seconds, then none for 40.
    for (let i = 0; i < 20; i++) {
      const [next, own] = taken(limits, {}, 5_000 + i * 1_000)
      limits = RateLimit.accepted(next, own, 5_500 + i * 1_000)
    }
    const [last, own] = taken(limits, {}, 25_000)
    limits = RateLimit.refused(last, "requests", own, 39_999, 25_001)
    expect(until(limits, 64_999)).toBe(65_000)
    for (let i = 0; i < 20; i++) {
      expect(until(limits, 65_000)).toBeUndefined()
      limits = taken(limits, {}, 65_000)[0]
    }
    expect(until(limits, 65_000)).toBe(125_000)
  })

  describe("of tokens", () => {
    const cost = (input: number, maxOutput = 0) => ({ input, maxOutput })
    /** Refused at this instant, and told to wait so long. */
    const refuse = (limits: RateLimit.RateLimit, input: number, waitMillis: number, now: number) => {
      const [next, own] = taken(limits, cost(input), now)
      return RateLimit.refused(next, "tokens", own, waitMillis, now)
    }
    const accept = (limits: RateLimit.RateLimit, input: number, now: number) => {
      const [next, own] = taken(limits, cost(input), now)
      return RateLimit.spent(RateLimit.accepted(next, own, now), own, { input, output: 0 }, now)
    }

    it("A3: what a window holds is there at once when it begins, whatever the requests take, and no more", () => {
      let limits = refuse(RateLimit.empty, 700, 5_000, 0)
      // 9,000 tokens are accepted in 20 seconds, then none for 40.
      for (let i = 0; i < 20; i++) limits = accept(limits, i % 2 === 0 ? 100 : 800, 5_000 + i * 1_000)
      limits = refuse(limits, 500, 39_999, 25_001)
      expect(until(limits, 64_999, cost(100))).toBe(65_000)
      for (const input of [2_000, 4_000, 1_500, 1_000]) {
        expect(until(limits, 65_000, cost(input))).toBeUndefined()
        limits = accept(limits, input, 65_000)
      }
      expect(until(limits, 65_000, cost(501))).toBe(125_000)
      expect(until(limits, 65_000, cost(500))).toBeUndefined()
      // Whoever takes more than all of it passes when nothing else was.
      expect(until(limits, 125_000, cost(20_000))).toBeUndefined()
    })

    it("A3: what a bucket lets through is measured exactly, whatever the requests take that are refused", () => {
      // Ten tokens per second; it tells when what is refused would fit.
      let limits = refuse(RateLimit.empty, 50, 5_000, 0)
      // At 5 s there are 50.
      limits = accept(limits, 50, 5_000)
      limits = accept(limits, 10, 6_000)
      limits = accept(limits, 20, 8_000)
      // At 9 s there are 10.
      limits = refuse(limits, 100, 9_000, 9_000)
      expect(limits.learnedTokens?.measured).toMatchObject({ shape: "bucket", count: 130, millis: 13_000 })
      // At 18 s there are 100.
      limits = accept(limits, 100, 18_000)
      limits = accept(limits, 25, 20_500)
      limits = refuse(limits, 20, 1_500, 21_000)
      expect(limits.learnedTokens?.measured).toMatchObject({ shape: "bucket", count: 175, millis: 17_500 })
    })

    it("A3: what an answer did not use, or was not sent, is there again", () => {
      const measured = () => {
        let limits = refuse(RateLimit.empty, 100, 1_000, 0)
        for (let i = 0; i < 10; i++) limits = accept(limits, 100, 1_000 + i * 1_000)
        return refuse(limits, 100, 40_000, 21_000)
      }
      const [one, first] = taken(measured(), cost(400, 500), 61_000)
      const [two, second] = taken(one, cost(100), 61_000)
      expect(until(two, 61_000, cost(100))).toBe(121_000)
      const answered = RateLimit.accepted(two, first, 61_500)
      const used = RateLimit.spent(answered, first, { input: 400, output: 150 }, 61_500)
      expect(until(used, 61_500, cost(350))).toBeUndefined()
      expect(until(used, 61_500, cost(351))).toBe(121_000)
      expect(until(RateLimit.returned(used, second, 61_500), 61_500, cost(450))).toBeUndefined()
      expect(until(RateLimit.returned(used, second, 61_500), 61_500, cost(451))).toBe(121_000)
    })

    it("A3: the most that may be put out counts, not what is usual: providers count it until the answer", () => {
      let limits = refuse(RateLimit.empty, 100, 1_000, 0)
      for (let i = 0; i < 10; i++) {
        const [next, own] = taken(limits, cost(10, 90), 1_000 + i * 1_000)
        limits = RateLimit.spent(
          RateLimit.accepted(next, own, 1_000),
          own,
          { input: 10, output: 40 },
          1_500 + i * 1_000
        )
      }
      expect(RateLimit.costOf(limits, cost(10, 90)).output).toBeLessThan(50)
      limits = refuse(limits, 100, 40_000, 21_000)
      const [full] = taken(limits, cost(10, 90), 61_000)
      expect(until(full, 61_000, cost(10, 390))).toBeUndefined()
      expect(until(full, 61_000, cost(10, 391))).toBe(121_000)
    })

    it("A3: they teach nothing of requests, nor those of tokens", () => {
      const tokens = refuse(RateLimit.empty, 100, 5_000, 0)
      expect(tokens.learned).toBeUndefined()
      expect(until(tokens, 100)).toBe(5_000)
      expect(RateLimit.gate(tokens, undefined, 100)).toBeUndefined()
      const [one, own] = taken(RateLimit.empty)
      expect(RateLimit.refused(one, "requests", own, 5_000, 0).learnedTokens).toBeUndefined()
    })

    it("A2, A3: what is announced of tokens need not be learned", () => {
      const refused = refuse(RateLimit.empty, 100, 5_000, 0)
      const said = (name: string) =>
        RateLimit.announced(refused, undefined, [{ name, limit: 10, remaining: 5, resetMillis: 1_000 }], 0)
      expect(said("requests").learnedTokens).toBeDefined()
      expect(said("tokens").learnedTokens).toBeUndefined()
      expect(refuse(said("tokens"), 100, 5_000, 10).learnedTokens).toBeUndefined()
    })
  })

  it("A3: several windows in a row without a refusal are not taken for one long window", () => {
    let limits = RateLimit.empty
    /** As many as are given are accepted, evenly over a minute; then one is refused, until its end. */
    const minute = (from: number, accepted: number, refuses: boolean) => {
      for (let i = 0; i < accepted; i++) {
        const [next, own] = taken(limits, {}, from + i * 1_000)
        limits = RateLimit.accepted(next, own, from + i * 1_000)
      }
      if (!refuses) return
      const [next, own] = taken(limits, {}, from + 30_000)
      limits = RateLimit.refused(next, "requests", own, 30_000, from + 30_000)
    }
    for (const [at, refuses] of [true, true, false, false, true].entries()) minute(at * 60_000, 20, refuses)
    expect(limits.learned?.measured).toMatchObject({ shape: "window", count: 20, millis: 60_000 })
  })

  it("F1: waits that are told in vain are met exactly five times, and by one alone after the first", () => {
    let limits = RateLimit.empty
    let now = 0
    for (let nth = 1; nth <= 7; nth++) {
      const [next, own] = taken(limits, {}, now)
      limits = RateLimit.refused(next, "requests", own, 2_000, now + 40)
      const end = until(limits, now + 40) ?? now
      expect(end - now - 40).toBe(nth <= 6 ? 2_000 : 4_040)
      now = end
      if (nth > 1) expect(until(taken(limits, {}, now)[0], now)).toBeGreaterThan(now)
    }
  })

  it("A3: a limit that has grown is found out", () => {
    const [small, large] = [bucket(60, 5), bucket(240, 5)]
    const ask: Provider = (now) => now < 120_000 ? small(now) : large(now)
    const report = simulate({
      providers: [ask],
      limits: RateLimit.empty,
      announces: false,
      tells: "millis",
      perMinute: 90,
      seconds: 400,
      seed: 1
    })
    expect(report.inTime).toBeGreaterThan(report.offered * 0.75)
    expect(report.refused).toBeLessThanOrEqual(report.offered * 0.02 + 1)
  })

  it("A3: after ten minutes without use it is forgotten", () => {
    const [one, first] = taken(RateLimit.empty)
    const limits = RateLimit.refused(one, "requests", first, 5_000, 0)
    expect(until(limits, 4_999)).toBe(5_000)
    // Two at once, and the next one after a second, or when one was accepted.
    const [two] = taken(taken(limits, {}, 5_000)[0], {}, 5_000)
    expect(until(two, 5_000)).toBe(6_000)
    expect(until(two, 605_000)).toBeUndefined()
    let later = two
    for (let i = 0; i < 10; i++) {
      expect(until(later, 605_000)).toBeUndefined()
      later = taken(later, {}, 605_000)[0]
    }
    expect(RateLimit.isIdle(two, 604_999)).toBe(false)
    expect(RateLimit.isIdle(two, 605_000)).toBe(true)
  })

  it("A3: refusals of requests that were sent before the first one came back are old news", () => {
    const [one, first] = taken(RateLimit.empty)
    const [two, second] = taken(one)
    const limits = RateLimit.refused(
      RateLimit.refused(two, "requests", first, 3_000, 100),
      "requests",
      second,
      2_000,
      120
    )
    expect(until(limits, 200)).toBe(3_100)
    expect(limits.learned?.measured).toBeUndefined()
    expect(until(RateLimit.refused(limits, "requests", second, 9_000, 130), 200)).toBe(9_130)
  })
})
