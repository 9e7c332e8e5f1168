import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as CircuitBreaker from "../src/CircuitBreaker.js"
import * as Fault from "../src/Fault.js"
import * as KeyState from "../src/KeyState.js"
import { baseConfig, makeKey } from "./support/pool-model.js"

const instant = FastCheck.integer({ min: 0, max: 60 }).map((n) => n * 100)

const imposed = FastCheck.record({
  kind: FastCheck.constantFrom(...Fault.Kind.literals),
  since: FastCheck.constant(0),
  until: instant,
  provenance: FastCheck.constantFrom(...Fault.Provenance.literals),
  step: FastCheck.integer({ min: 1, max: 5 }),
  stamp: FastCheck.nat(9)
})

const key = KeyState.make(makeKey(0, { group: undefined, concurrency: undefined, models: undefined }), 0)

const opensAt = (bench: KeyState.Bench | undefined, now: number): number =>
  KeyState.benchGate(baseConfig, bench, now)?.until ?? now

describe("KeyState", () => {
  it("F1: waits merge by maximum, in whatever order they come", () => {
    FastCheck.assert(
      FastCheck.property(FastCheck.array(imposed, { minLength: 1, maxLength: 6 }), instant, (waits, now) => {
        const bench = waits.reduce<KeyState.Bench | undefined>((bench, wait) => KeyState.impose(bench, wait), undefined)
        assert.strictEqual(opensAt(bench, now), Math.max(now, ...waits.map((wait) => wait.until)))
        assert.strictEqual(bench?.stamp, waits[waits.length - 1]?.stamp)
      })
    )
  })

  it("F5: as long as one wait is told, or of quota or credentials, what holds the key is no guess", () => {
    const hard = (wait: typeof imposed extends FastCheck.Arbitrary<infer A> ? A : never): boolean =>
      wait.provenance !== "guessed" || ["QuotaExhausted", "Unauthorized", "Forbidden"].includes(wait.kind)
    FastCheck.assert(
      FastCheck.property(FastCheck.array(imposed, { minLength: 1, maxLength: 6 }), instant, (waits, now) => {
        const bench = waits.reduce<KeyState.Bench | undefined>((bench, wait) => KeyState.impose(bench, wait), undefined)
        const gate = KeyState.benchGate(baseConfig, bench, now)
        if (gate === undefined) return
        assert.strictEqual(gate.breakableAt <= now, !waits.some((wait) => hard(wait) && now < wait.until))
      })
    )
  })

  it("F4: only a later lease lifts a cooldown, and only one that is over or was broken on purpose", () => {
    FastCheck.assert(
      FastCheck.property(imposed, FastCheck.nat(9), FastCheck.boolean(), instant, (wait, id, floor, now) => {
        const bench = KeyState.impose(undefined, wait)
        const lifted = KeyState.lift(bench, { id, floor }, now) === undefined
        assert.strictEqual(lifted, id > wait.stamp && (now >= wait.until || floor))
      })
    )
  })

  it("B5: a guessed, quota or credential cooldown is left by one trial, a told one by anybody", () => {
    FastCheck.assert(
      FastCheck.property(imposed, FastCheck.nat(9), (wait, lease) => {
        const bench = KeyState.impose(undefined, wait)
        const tried = KeyState.takeTrial(bench, lease, wait.until)
        const single = KeyState.needsTrial(bench)
        assert.strictEqual(
          single,
          wait.provenance === "guessed" || ["QuotaExhausted", "Unauthorized", "Forbidden"].includes(wait.kind)
        )
        assert.strictEqual(opensAt(tried, wait.until) > wait.until, single)
        assert.strictEqual(opensAt(KeyState.freeTrial(tried, lease), wait.until), wait.until)
        assert.strictEqual(opensAt(KeyState.freeTrial(tried, lease + 1), wait.until) > wait.until, single)
        assert.strictEqual(opensAt(tried, wait.until + baseConfig.trialMillis), wait.until + baseConfig.trialMillis)
      })
    )
  })

  it("A4: a key comes back with 1, 2, 4 … attempts at once, and without a limit in the end", () => {
    const admitted = (now: number, successes: number): number => {
      let inFlight = 0
      const ramp = { since: 1000, successes }
      while (inFlight < 1000 && KeyState.gate(baseConfig, { ...key, inFlight, ramp }, now) === undefined) inFlight++
      return inFlight
    }
    assert.deepStrictEqual([1000, 1499, 1500, 2000, 3999].map((now) => admitted(now, 0)), [1, 1, 2, 4, 32])
    assert.deepStrictEqual([0, 1, 2].map((successes) => admitted(1000, successes)), [1, 2, 4])
    assert.strictEqual(admitted(4000, 0), 1000)
  })

  it("two gates open when both do", () => {
    FastCheck.assert(
      FastCheck.property(imposed, imposed, instant, (a, b, now) => {
        const one = KeyState.benchGate(baseConfig, KeyState.impose(undefined, a), now)
        const other = KeyState.benchGate(baseConfig, KeyState.impose(undefined, b), now)
        const gate = KeyState.both(one, other)
        assert.strictEqual(gate === undefined, one === undefined && other === undefined)
        assert.strictEqual(gate?.until ?? now, Math.max(now, one?.until ?? now, other?.until ?? now))
        if (gate !== undefined) {
          assert.strictEqual(
            gate.breakableAt <= now,
            (one === undefined || one.breakableAt <= now) && (other === undefined || other.breakableAt <= now)
          )
        }
      })
    )
  })

  it("what a key has against it closes it, and nothing else", () => {
    assert.isTrue(KeyState.isPlain(key))
    const gateOf = (changes: Partial<KeyState.KeyState>) => KeyState.gate(baseConfig, { ...key, ...changes }, 100)?.gate
    assert.isUndefined(gateOf({}))
    assert.isUndefined(gateOf({ inFlight: 1000 }))
    assert.strictEqual(gateOf({ enabled: false }), "disabled")
    assert.strictEqual(gateOf({ retiring: true }), "retired")
    const open = CircuitBreaker.isolate(CircuitBreaker.initial, 0)
    assert.strictEqual(gateOf({ breaker: open }), "breaker")
    assert.strictEqual(gateOf({ breaker: CircuitBreaker.takeProbe(open, 0, 1) }), "probing")
    assert.isUndefined(gateOf({ breaker: { ...CircuitBreaker.takeProbe(open, 0, 1), probe: undefined } }))
    const limited = makeKey(0, { group: undefined, concurrency: 2, models: undefined })
    assert.isUndefined(gateOf({ key: limited, inFlight: 1 }))
    assert.strictEqual(gateOf({ key: limited, inFlight: 2 }), "concurrency")
  })

  it("a key with other numbers is the same key in all else", () => {
    const numbers = {
      inFlight: 1,
      total: 2,
      recent: 3,
      lastUsed: 4,
      successes: 5,
      answeredAt: 6,
      answeredFrom: 7,
      quietSince: 8,
      breaker: CircuitBreaker.isolate(CircuitBreaker.initial, 0)
    }
    const others: KeyState.KeyState = {
      ...key,
      weight: 9,
      order: 10,
      enabled: false,
      retiring: true,
      faults: 11,
      ignored: 12,
      ramp: { since: 13, successes: 14 },
      stall: { since: 15, tries: 16 },
      limits: undefined,
      gatedUntil: 17,
      gatedEarliest: 18,
      gatedBy: "ramp"
    }
    const bench = KeyState.impose(undefined, {
      kind: "Timeout",
      since: 0,
      until: 1,
      provenance: "told",
      step: 1,
      stamp: 1
    })
    const after = KeyState.numbered({ ...others, bench }, 1, 2, 3, 4, 5, 6, 7, 8, numbers.breaker, undefined)
    assert.deepStrictEqual(after, { ...others, bench, ...numbers })
  })
})
