import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as HashMap from "effect/HashMap"
import * as ProviderHealth from "../src/ProviderHealth.js"

const probeMillis = 30_000

/** A provider beside which every attempt is known: what it did, and when. */
interface Seen {
  readonly attempt: ProviderHealth.Attempt
  readonly at: number
}

const command = FastCheck.record({
  pause: FastCheck.constantFrom(0, 0, 10, 100, 600, 5_000, 31_000),
  act: FastCheck.constantFrom("begin", "begin", "begin", "fault", "fault", "fault", "success", "ignored", "limited"),
  model: FastCheck.constantFrom(undefined, "m1", "m2"),
  nth: FastCheck.nat(5),
  slot: FastCheck.nat(3),
  waiting: FastCheck.boolean()
})

const origin = ""

describe("ProviderHealth", () => {
  it.prop(
    "F2, C9: any history keeps to the rules of the gates, and success ends everything",
    [FastCheck.array(command, { maxLength: 150 })],
    ([commands]) => {
      let health = ProviderHealth.initial
      let now = 0
      let leases = 0
      let running: ReadonlyArray<Seen> = []
      for (const { act, model, nth, pause, slot, waiting } of commands) {
        now += pause
        const held = ProviderHealth.heldBack(health, origin, model, probeMillis, now)
        const outage = ProviderHealth.outageOf(health, origin, model)
        if (act === "begin") {
          if (held !== undefined) {
            assert.isAbove(held.until, now)
            continue
          }
          const began = ProviderHealth.began(
            health,
            { origin, model, lease: ++leases, slot, turn: BigInt(leases) },
            probeMillis,
            now
          )
          health = began.health
          running = [...running, {
            attempt: { origin, model, lease: leases, slot, nth: began.nth },
            at: now
          }]
          const after = ProviderHealth.outageOf(health, origin, model)
          if (outage !== undefined && after !== undefined) {
            assert.isAtMost(after.probes.length, 4)
            assert.isAtLeast(after.nextAt - now, 500)
            assert.isAtMost(after.nextAt - now, 5_000)
            assert.strictEqual(after.prober, BigInt(leases))
          }
          continue
        }
        const seen = running[nth % Math.max(1, running.length)]
        if (seen === undefined) continue
        running = running.filter((other) => other !== seen)
        const { attempt } = seen
        health = ProviderHealth.decided(health, attempt, now)
        const before = ProviderHealth.outageOf(health, origin, attempt.model)
        if (act === "success") {
          const said = ProviderHealth.succeeded(health, attempt, { leases, offered: 0.01, waiting }, now)
          health = said.health
          const ends = before !== undefined && attempt.lease > before.first
          assert.strictEqual(said.closed.length > 0, ends, "any success of later than the first fault ends an outage")
        } else if (act === "fault") {
          const said = ProviderHealth.faulted(health, attempt, {
            leases,
            inFlight: running.length,
            recent: 0,
            answeredSince: () => false
          }, now)
          health = said.health
          if (before !== undefined) assert.deepStrictEqual([said.blames, said.opened.length], [false, 0])
          if (said.opened.length > 0) {
            assert.isAtLeast(HashMap.size(said.row?.slots ?? HashMap.empty()), 2, "one key is no provider")
            assert.isFalse(said.blames)
          }
        } else if (act === "limited") {
          const said = ProviderHealth.limited(health, attempt, {
            since: now,
            at: now,
            lease: attempt.lease,
            keyId: `${slot}`,
            group: `${slot}`,
            code: undefined,
            until: now + 3_000,
            told: true
          })
          health = said.health
          if (said.suspected !== undefined) assert.strictEqual(new Set(said.suspected.keyIds).size, 3)
        }
        assert.strictEqual(
          health.idle,
          HashMap.size(health.rows) + HashMap.size(health.gates) + HashMap.size(health.refusals) === 0
        )
      }
      // Some time later one success per model is the end of it all.
      for (const model of [undefined, "m1", "m2"]) {
        now += 60_000
        assert.isUndefined(ProviderHealth.heldBack(health, origin, model, probeMillis, now))
        const one = { origin, model, lease: ++leases, slot: 0, turn: BigInt(leases) }
        const { health: begun, nth } = ProviderHealth.began(health, one, probeMillis, now)
        const attempt = { ...one, nth }
        const answered = ProviderHealth.succeeded(
          ProviderHealth.decided(begun, attempt, now),
          attempt,
          { leases, offered: 0.01, waiting: false },
          now
        )
        health = answered.health
      }
      assert.deepStrictEqual(ProviderHealth.gates(health).filter(({ _tag }) => _tag !== "Release"), [])
    },
    { fastCheck: { numRuns: 300 } }
  )

  it("F2: a release begins at the pace of what comes, then goes at twice that, and ends when nobody wants more", () => {
    const attempt = (lease: number, slot: number): ProviderHealth.Attempt & { readonly turn: bigint } => ({
      origin,
      model: undefined,
      lease,
      slot,
      turn: BigInt(lease),
      nth: 0
    })
    let health = ProviderHealth.initial
    for (let lease = 1; lease <= 5; lease++) {
      health = ProviderHealth.faulted(health, attempt(lease, lease % 2), {
        leases: lease,
        inFlight: 0,
        recent: 0,
        answeredSince: () => false
      }, 0).health
    }
    health = ProviderHealth.succeeded(health, attempt(6, 0), { leases: 6, offered: 0.02, waiting: true }, 500).health
    const sent: Array<number> = []
    let now = 500
    for (let lease = 7; now < 2_500; lease++) {
      const held = ProviderHealth.heldBack(health, origin, undefined, probeMillis, now)
      if (held !== undefined) now = held.until
      sent.push(now)
      health = ProviderHealth.began(health, attempt(lease, 0), probeMillis, now).health
    }
    const count = (from: number, to: number) => sent.filter((at) => at >= from && at < to).length
    assert.approximately(count(500, 1_500), 20, 1)
    assert.approximately(count(1_500, 2_500), 40, 1)
    health = ProviderHealth.began(health, attempt(1_000, 0), probeMillis, now + 1_000).health
    assert.isTrue(health.idle)
  })

  it("C9: a key is left to whoever tries it for as long as the doubt lasts, and no longer", () => {
    const refusal = (group: string): ProviderHealth.Refusal => ({
      since: 0,
      at: 600,
      lease: 1,
      keyId: group,
      group,
      code: undefined,
      until: 60_000,
      told: true
    })
    const one = ProviderHealth.limited(ProviderHealth.initial, { origin, model: undefined }, refusal("a")).health
    assert.isUndefined(ProviderHealth.triedUntil(one, origin, undefined, 1_500, 1_501))
    const two = ProviderHealth.limited(one, { origin, model: undefined }, refusal("b")).health
    assert.strictEqual(ProviderHealth.triedUntil(two, origin, undefined, 500, 700), 1_500)
    assert.strictEqual(ProviderHealth.triedUntil(two, origin, undefined, 1_500, 1_501), 1_600)
    assert.isUndefined(ProviderHealth.triedUntil(two, origin, undefined, 1_500, 1_600))
  })

  it("F2, C9: what nobody asks for any more is forgotten, and all is idle again", () => {
    const of = (lease: number, model: string): ProviderHealth.Attempt => ({ origin, model, lease, slot: lease, nth: 0 })
    const around = { leases: 1, inFlight: 0, recent: 0, answeredSince: () => true }
    const refusal = { since: 0, at: 0, keyId: "a", group: "a", code: undefined, until: 60_000, told: true }
    const { health: faulted } = ProviderHealth.faulted(ProviderHealth.initial, of(1, "gone"), around, 0)
    const { health: refused } = ProviderHealth.limited(faulted, of(2, "too"), { ...refusal, lease: 2 })
    const other = of(3, "other")
    const soon = ProviderHealth.decided(refused, other, 600_000 - 1)
    assert.strictEqual(ProviderHealth.faultsInRow(soon, origin, "gone"), 1)
    assert.strictEqual(HashMap.size(soon.refusals), 0)
    assert.isFalse(soon.idle)
    assert.isTrue(ProviderHealth.decided(soon, other, 600_000).idle)

    let limited = ProviderHealth.initial
    for (const group of ["a", "b", "c"]) {
      limited = ProviderHealth.limited(limited, of(1, "gone"), { ...refusal, keyId: group, group, lease: 1 }).health
    }
    assert.strictEqual(ProviderHealth.decided(limited, other, 60_000 - 1), limited)
    assert.isTrue(ProviderHealth.isGating(limited))
    assert.isTrue(ProviderHealth.decided(limited, other, 60_000).idle)
  })

  /** Five faults of two keys: where little goes on, an outage. */
  const down = (before: ProviderHealth.Health, model: string, first: number, at: number): ProviderHealth.Health => {
    let health = before
    for (let i = 0; i < 5; i++) {
      const attempt: ProviderHealth.Attempt = { origin, model, lease: first + i, slot: i % 2, nth: 0 }
      const around = { leases: first + i, inFlight: 0, recent: 0, answeredSince: () => false }
      health = ProviderHealth.faulted(health, attempt, around, at).health
    }
    return health
  }

  it("F2: an outage that nobody has asked about for ten minutes is forgotten, and all is idle again", () => {
    const other: ProviderHealth.Attempt = { origin, model: "other", lease: 100, slot: 0, nth: 0 }
    const probe = { origin, model: "gone", lease: 50, slot: 0, turn: 50n }
    const open = down(ProviderHealth.initial, "gone", 1, 0)
    assert.isDefined(ProviderHealth.outageOf(open, origin, "gone"))
    // Whoever asks in vain asks: that is what it is there for.
    const asked = ProviderHealth.began(open, probe, probeMillis, 550_000).health
    const soon = ProviderHealth.decided(asked, other, 1_000_000)
    assert.isDefined(ProviderHealth.outageOf(soon, origin, "gone"))
    const later = ProviderHealth.decided(soon, other, 550_000 + 5_000 + 600_000)
    assert.isUndefined(ProviderHealth.outageOf(later, origin, "gone"))
    assert.isTrue(later.idle)
    assert.deepStrictEqual(ProviderHealth.outages(soon).length, 1)
    assert.deepStrictEqual(ProviderHealth.outages(later), [])
  })

  it("F2: as long as the origin is asked about, so are its models", () => {
    const two = down(down(ProviderHealth.initial, "m1", 1, 0), "m2", 11, 1_000)
    assert.deepStrictEqual(ProviderHealth.outages(two).map(({ whole }) => whole).sort(), [false, false, true])
    const probe = { origin, model: "m1", lease: 50, slot: 0, turn: 50n }
    const asked = ProviderHealth.began(two, probe, probeMillis, 650_000).health
    const fault: ProviderHealth.Attempt = { ...probe, nth: 0 }
    const still = ProviderHealth.decided(asked, fault, 660_000)
    assert.lengthOf(ProviderHealth.outages(still), 3)
    const again = ProviderHealth.began(still, { ...probe, lease: 51 }, probeMillis, 700_000).health
    const success: ProviderHealth.Attempt = { ...fault, lease: 51 }
    const ended = ProviderHealth.succeeded(
      ProviderHealth.decided(again, success, 700_500),
      success,
      { leases: 51, offered: 0, waiting: false },
      700_500
    ).health
    const after = ProviderHealth.decided(ended, { ...success, lease: 52 }, 701_000)
    assert.deepStrictEqual(ProviderHealth.outages(after).map(({ model }) => model), ["m2"], "it may be asked for now")
  })

  it("F2: of models that come and go nothing piles up", () => {
    let health = ProviderHealth.initial
    for (let i = 0; i < 100; i++) {
      const now = i * 60_000
      health = down(health, `m${i}`, 10 * i + 1, now)
      const attempt: ProviderHealth.Attempt = { origin, model: `m${i}`, lease: 10 * i + 9, slot: 0, nth: 0 }
      const around = { leases: 10 * i + 9, offered: 0, waiting: false }
      const began = ProviderHealth.began(health, { ...attempt, turn: 1n }, probeMillis, now + 1_000).health
      health =
        ProviderHealth.succeeded(ProviderHealth.decided(began, attempt, now + 2_000), attempt, around, now + 2_000)
          .health
    }
    assert.isAtMost(HashMap.size(health.past), 12)
  })
})
