/** Limits as a store keeps them: what comes back behaves as what was saved would have. */
import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as Schema from "effect/Schema"
import * as DeclaredLimit from "../src/DeclaredLimit.js"
import * as LimitRecord from "../src/LimitRecord.js"
import * as RateLimit from "../src/RateLimit.js"
import * as Totals from "../src/Totals.js"

type Declared = Parameters<typeof RateLimit.declare>[1][number]
const declared = (limits: Declared): RateLimit.RateLimit => RateLimit.declare(undefined, [limits]) ?? RateLimit.empty

/** Through JSON, and back into limits of which nothing is known but what is declared. */
const restarted = (
  limits: RateLimit.RateLimit,
  fresh: RateLimit.RateLimit,
  at: { readonly saved: number; readonly restored: number; readonly moved?: number; readonly most?: number }
): RateLimit.RateLimit => {
  const { moved = 0, most = 256, restored, saved } = at
  const stored = LimitRecord.fromLimits(limits, saved, wall, most)
  if (stored === undefined) return fresh
  const read = Schema.decodeUnknownSync(LimitRecord.StoredLimits)(
    JSON.parse(JSON.stringify(Schema.encodeSync(LimitRecord.StoredLimits)(stored)))
  )
  const savedAt = saved + wall
  const passed = Math.max(0, restored + wall + moved - savedAt)
  return LimitRecord.restore(fresh, read, savedAt, (instant) => restored - passed - (savedAt - instant), restored)
}
const wall = 1_700_000_000_000

const untilOf = (limits: RateLimit.RateLimit, tokens: RateLimit.Estimate, now: number) =>
  RateLimit.gate(limits, tokens, now)?.until ?? now

/** One attempt: when it begins after the one before, how long it takes, and what becomes of it. */
const attempts = FastCheck.array(
  FastCheck.record({
    gap: FastCheck.nat(8_000),
    lasts: FastCheck.nat(2_000),
    input: FastCheck.nat(400),
    sent: FastCheck.boolean(),
    ends: FastCheck.boolean()
  }),
  { maxLength: 60 }
)
type Attempts = typeof attempts extends FastCheck.Arbitrary<infer A> ? A : never

const used = (fresh: RateLimit.RateLimit, history: Attempts, start = 0) =>
  history.reduce(({ limits, now }, { ends, gap, input, lasts, sent }) => {
    const from = now + gap
    const [taken, reservation] = RateLimit.reserve(limits, { input }, from)
    if (!ends) return { limits: taken, now: from }
    const to = from + lasts
    return {
      limits: sent
        ? RateLimit.spent(RateLimit.answered(taken, to), reservation, { input, output: 0 }, to)
        : RateLimit.returned(taken, reservation, to),
      now: to
    }
  }, { limits: fresh, now: start })

/** As if all that is in flight were answered now. */
const answered = (limits: RateLimit.RateLimit, now: number): RateLimit.RateLimit => ({
  ...limits,
  declared: limits.declared.map((limit) => DeclaredLimit.count(limit, limit.held, limit.held, now))
})

describe("declared limits", () => {
  it.prop(
    "A1, P1: what was used counts on after a restart, to the millisecond; what was in flight counts from the record on",
    [attempts, FastCheck.nat(90_000), FastCheck.nat(90_000)],
    ([history, downtime, later]) => {
      const fresh = declared({ requestsPerMinute: 8, tokensPerMinute: 2_000 })
      const { limits, now } = used(fresh, history)
      const restored = now + downtime
      const back = restarted(limits, fresh, { saved: now, restored })
      const on = answered(limits, now)
      for (const at of [restored, restored + later]) {
        for (const tokens of [{}, { input: 500 }]) {
          const [is, was] = [untilOf(back, tokens, at), untilOf(on, tokens, at)]
          assert.isAtLeast(is, was)
          assert.isAtMost(is, Math.max(at, was + 1))
        }
      }
      assert.deepStrictEqual(back.declared.map(({ held }) => held), [0, 0], "nothing is in flight")
    }
  )

  it.prop(
    "P1: it is never longer until a request fits than it was when the record was written, however the clock moved",
    [attempts, FastCheck.integer({ min: -1e10, max: 1e10 })],
    ([history, moved]) => {
      const fresh = declared({ requestsPerMinute: 5 })
      const { limits, now } = used(fresh, history)
      const wait = untilOf(answered(limits, now), {}, now) - now
      const back = restarted(limits, fresh, { saved: now, restored: 3, moved })
      assert.isAtMost(untilOf(back, {}, 3) - 3, wait + 1)
    }
  )

  it.prop(
    "A1: a record with fewer moments lets nothing through earlier, and little later",
    [FastCheck.array(FastCheck.nat(1_500), { minLength: 20, maxLength: 30 }), FastCheck.integer({ min: 1, max: 16 })],
    ([gaps, most]) => {
      const fresh = declared({ requestsPerMinute: 20 })
      const { limits, now } = used(fresh, gaps.map((gap) => ({ gap, lasts: 0, input: 0, sent: true, ends: true })))
      const exact = restarted(limits, fresh, { saved: now, restored: now })
      const coarse = restarted(limits, fresh, { saved: now, restored: now, most })
      assert.strictEqual(RateLimit.left(coarse, now)[0]?.remaining, RateLimit.left(exact, now)[0]?.remaining)
      for (let at = now; at < now + 61_000; at += 1_000) {
        assert.isAtLeast(untilOf(coarse, {}, at), untilOf(exact, {}, at))
      }
      const words = LimitRecord.fromLimits(limits, now, wall, most)?.declared?.[0]?.used.split(" ") ?? []
      assert.isAtMost(words.length, most)
      assert.strictEqual(untilOf(coarse, {}, now + 60_000), now + 60_000, "a window later all of it is free")
    }
  )

  it("A1: a day's use survives a restart hours later, whatever the limit is then; a limit that is gone is left out", () => {
    const hour = 3_600_000
    const fresh = declared({ requestsPerDay: 10, tokensPerDay: 5_000 })
    const history = Array.from({ length: 7 }, () => ({ gap: 0, lasts: 10, input: 100, sent: true, ends: true }))
    const { limits, now } = used(fresh, history)
    const remaining = (limits: RateLimit.RateLimit, at: number) =>
      RateLimit.left(limits, at).map((left) => left.remaining)
    const at = now + 5 * hour
    const back = (given: Declared) => restarted(limits, declared(given), { saved: now, restored: at })
    assert.deepStrictEqual(remaining(back({ requestsPerDay: 10, tokensPerDay: 5_000 }), at), [3, 4_300])
    assert.deepStrictEqual(remaining(back({ requestsPerDay: 8 }), at), [1])
    assert.deepStrictEqual(remaining(back({ requestsPerDay: 4 }), at), [0])
    assert.deepStrictEqual(remaining(back({ requestsPerMinute: 4 }), at), [4])
    assert.deepStrictEqual(remaining(back({ requestsPerDay: 10 }), now + 25 * hour), [10])
  })

  it("A1: a record that comes late adds to what was used meanwhile", () => {
    const fresh = declared({ requestsPerMinute: 10 })
    const once = { gap: 1_000, lasts: 0, input: 0, sent: true, ends: true }
    const before = used(fresh, [once, once, once])
    const own = used(fresh, [once, { ...once, ends: false }], 10_000)
    const both = restarted(before.limits, own.limits, { saved: before.now, restored: own.now })
    const remaining = (at: number) => RateLimit.left(both, at)[0]?.remaining
    assert.strictEqual(remaining(own.now), 5)
    assert.strictEqual(remaining(61_000), 6, "the first of before")
    assert.strictEqual(remaining(63_000), 8)
    assert.strictEqual(remaining(71_000), 9, "its own; one is in flight")
  })

  it("P3: words that make no sense are left out", () => {
    const fresh = declared({ requestsPerMinute: 10 })
    const stored = {
      declared: [{ unit: "requests" as const, windowMillis: 60_000, used: " 1* x*y*z -5 0*2 ?? rs NaN!" }]
    }
    const back = LimitRecord.restore(fresh, stored, 5_000, (instant) => instant, 5_000)
    // 0*2, and rs: a second before.
    assert.strictEqual(RateLimit.left(back, 5_000)[0]?.remaining, 7)
  })
})

/** What a provider says, and what is made of it. */
const heard = FastCheck.array(
  FastCheck.record({
    gap: FastCheck.nat(20_000),
    says: FastCheck.oneof(
      FastCheck.record({
        _tag: FastCheck.constant("Announces" as const),
        limit: FastCheck.option(FastCheck.nat(40), { nil: undefined }),
        remaining: FastCheck.nat(40),
        resetMillis: FastCheck.nat(60_000)
      }),
      FastCheck.record({
        _tag: FastCheck.constant("Refuses" as const),
        wait: FastCheck.option(FastCheck.nat(60_000), { nil: undefined })
      }),
      FastCheck.record({ _tag: FastCheck.constant("Accepts" as const) })
    )
  }),
  { maxLength: 40 }
)
type Heard = typeof heard extends FastCheck.Arbitrary<infer A> ? A : never

const hear = (limits: RateLimit.RateLimit, says: Heard[number]["says"], now: number): RateLimit.RateLimit => {
  const [taken, own] = RateLimit.reserve(limits, {}, now)
  switch (says._tag) {
    case "Announces":
      return RateLimit.announced(taken, own.leased, [{ name: "requests", ...says }], now)
    case "Refuses":
      return RateLimit.refused(taken, "requests", own, says.wait, now)
    case "Accepts":
      return RateLimit.accepted(taken, own, now)
  }
}

describe("announced and learned limits", () => {
  it.prop(
    "A2, A3, P1: after a restart a pool knows as much as one that went on, and learns the same from what comes",
    [heard, FastCheck.nat(30_000), heard],
    ([before, downtime, after]) => {
      let now = 0
      let on = RateLimit.empty
      for (const { gap, says } of before) on = hear(on, says, now += gap)
      const saved = now
      now += downtime
      let back = restarted(on, RateLimit.empty, { saved, restored: now })
      const about = (what: string) => {
        for (const at of [now, now + 500, now + 20_000]) {
          assert.closeTo(untilOf(back, {}, at), untilOf(on, {}, at), 1, what)
        }
        assert.deepStrictEqual(back.learned?.measured?.count, on.learned?.measured?.count, what)
      }
      about("restarted")
      for (const { gap, says } of after) {
        now += gap
        on = hear(on, says, now)
        back = hear(back, says, now)
        about("later")
      }
    },
    { fastCheck: { numRuns: 500 } }
  )

  it.prop(
    "P1: no wait is longer than it was when the record was written, however the clock moved",
    [heard, FastCheck.integer({ min: -1e10, max: 1e10 })],
    ([before, moved]) => {
      let now = 0
      let limits = RateLimit.empty
      for (const { gap, says } of before) limits = hear(limits, says, now += gap)
      const back = restarted(limits, RateLimit.empty, { saved: now, restored: 77, moved })
      assert.isAtMost(untilOf(back, {}, 77) - 77, untilOf(limits, {}, now) - now + 1)
    }
  )

  it("A2, P1: where more came back than was taken since, a restart neither forgets it nor is deaf to what is told next", () => {
    const one = { input: 10, maxOutput: 90 }
    const large = { input: 10, maxOutput: 990 }
    const said = (remaining: number, now: number) => [
      { name: "tokens", limit: 10_000, remaining, resetMillis: 60_000 - now }
    ]
    let limits = RateLimit.empty
    for (let i = 0; i < 12; i++) {
      const [next, own] = RateLimit.reserve(limits, one, i * 1_000)
      limits = RateLimit.announced(next, own.leased, said(9_900 - i * 40, i * 1_000), i * 1_000)
      limits = RateLimit.spent(limits, own, { input: 10, output: 30 }, i * 1_000)
    }
    const held: Array<RateLimit.Reservation> = []
    for (let i = 0; i < 5; i++) {
      const [next, own] = RateLimit.reserve(limits, large, 12_000)
      limits = next
      held.push(own)
    }
    const leased = held[4]?.leased
    limits = RateLimit.announced(limits, leased, said(4_000, 13_000), 13_000, 5, 12_000)
    for (const own of held) limits = RateLimit.spent(limits, own, { input: 10, output: 10 }, 14_000)
    const remaining = (limits: RateLimit.RateLimit, now: number) => RateLimit.left(limits, now)[0]?.remaining ?? NaN
    assert.isAbove(remaining(limits, 15_000), 8_000)
    const back = restarted(limits, RateLimit.empty, { saved: 15_000, restored: 15_000 })
    assert.strictEqual(remaining(back, 15_000), remaining(limits, 15_000))
    const [next, own] = RateLimit.reserve(back, one, 16_000)
    assert.strictEqual(remaining(RateLimit.announced(next, own.leased, said(0, 17_000), 17_000), 17_000), 0)
  })

  it("what is known here stays, what is not is taken up; what was over long ago is not kept", () => {
    const say = (name: string, remaining: number, now: number, limits = RateLimit.empty) =>
      RateLimit.announced(limits, Totals.none, [{ name, limit: 10, remaining, resetMillis: 5_000 }], now)
    const both = say("tokens", 1, 0, say("requests", 1, 0))
    const merged = restarted(both, say("requests", 7, 100), { saved: 0, restored: 100 })
    assert.deepStrictEqual(merged.announced.map(({ name, remaining }) => [name, remaining]), [["requests", 7], [
      "tokens",
      1
    ]])
    assert.isUndefined(LimitRecord.fromLimits(both, 605_000, wall, 16))
    assert.isDefined(LimitRecord.fromLimits(both, 604_999, wall, 16))
  })

  it("how much requests usually put out is known again", () => {
    const [taken, reservation] = RateLimit.reserve(
      declared({ tokensPerMinute: 1_000 }),
      { input: 1, maxOutput: 900 },
      0
    )
    const limits = RateLimit.spent(taken, reservation, { input: 1, output: 50 }, 10)
    const back = restarted(limits, declared({ tokensPerMinute: 1_000 }), { saved: 10, restored: 20 })
    assert.strictEqual(RateLimit.costOf(back, { input: 1, maxOutput: 900 }).output, 50)
  })

  it.prop("P1: whatever is in a record, nothing crashes and nothing is NaN", [LimitRecord.StoredLimits], ([stored]) => {
    const fresh = declared({ requestsPerMinute: 10, tokensPerDay: 5 })
    const back = LimitRecord.restore(fresh, stored, 0, (instant) => instant, 1_000)
    for (const at of [1_000, 1e9]) assert.isFalse(Number.isNaN(untilOf(back, { input: 5 }, at)))
  })
})
