import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as Fault from "../src/Fault.js"
import * as RetryDecision from "../src/RetryDecision.js"

const limits = { rotations: 8, rateLimitRotations: 4 }

/** What a call decides on one fault after the other, in short. */
const decisions = (faults: ReadonlyArray<Fault.Fault>, replayable: boolean | "never" = true, within = limits) => {
  let progress = RetryDecision.initial
  return faults.map((fault) => {
    const [decision, spent] = RetryDecision.decide(within, progress, fault, replayable)
    progress = spent
    switch (decision._tag) {
      case "Rotate":
        return decision.retry ? "rotate as a retry" : "rotate"
      case "Elsewhere":
        return decision.where
      default:
        return decision._tag === "Stop" ? "stop" : "back off"
    }
  })
}
const times = (n: number, kind: Fault.Kind, details: Fault.Details = {}) =>
  Array.from({ length: n }, () => Fault.make(kind, details))
const repeat = (n: number, word: string) => Array.from({ length: n }, () => word)

describe("RetryDecision", () => {
  it("C3: rate limits rotate 4 times, then back off; where no key can do better they back off at once", () => {
    assert.deepStrictEqual(decisions(times(6, "RateLimited")), [...repeat(4, "rotate"), ...repeat(2, "back off")])
    assert.deepStrictEqual(decisions(times(2, "RateLimited", { failover: false })), repeat(2, "back off"))
  })

  it("C3: spent quotas and refused credentials rotate 8 times, then back off", () => {
    for (const kind of ["QuotaExhausted", "Unauthorized"] as const) {
      assert.deepStrictEqual(decisions(times(10, kind)), [...repeat(8, "rotate"), ...repeat(2, "back off")])
    }
  })

  it("C3: all rotations count together", () => {
    assert.deepStrictEqual(
      decisions([...times(4, "RateLimited"), ...times(6, "Unauthorized")]),
      [...repeat(8, "rotate"), ...repeat(2, "back off")]
    )
    assert.deepStrictEqual(decisions(times(1, "Unauthorized"), true, { rotations: 0, rateLimitRotations: 4 }), [
      "back off"
    ])
    assert.deepStrictEqual(decisions(times(1, "RateLimited"), true, { rotations: 8, rateLimitRotations: 0 }), [
      "back off"
    ])
  })

  it("Forbidden: rotates, stops at the third; at once where no key can do better", () => {
    assert.deepStrictEqual(decisions(times(3, "Forbidden")), ["rotate", "rotate", "stop"])
    assert.deepStrictEqual(decisions(times(1, "Forbidden", { failover: false })), ["stop"])
  })

  it("TooLarge: one try where the limit is higher; Rejected: only model_not_found, on another group", () => {
    assert.deepStrictEqual(decisions(times(2, "TooLarge")), ["higher-limit", "stop"])
    assert.deepStrictEqual(decisions(times(2, "Rejected", { code: "model_not_found" })), ["other-group", "stop"])
    assert.deepStrictEqual(decisions(times(1, "Rejected")), ["stop"])
  })

  it("Overloaded: another key the first time, as a retry, then back-off", () => {
    assert.deepStrictEqual(decisions(times(3, "Overloaded")), ["rotate as a retry", "back off", "back off"])
  })

  it("ServerError, Timeout, Network back off", () => {
    for (const kind of ["ServerError", "Timeout", "Network"] as const) {
      assert.deepStrictEqual(decisions(times(2, kind)), ["back off", "back off"])
    }
  })

  it("C8: ambiguous faults stop a call that may not be replayed, refusals do not", () => {
    for (const kind of ["ServerError", "Timeout", "Network"] as const) {
      assert.deepStrictEqual(decisions(times(1, kind), false), ["stop"])
      assert.deepStrictEqual(decisions(times(1, kind, { unprocessed: true }), false), ["back off"])
    }
    assert.deepStrictEqual(decisions(times(1, "Overloaded", { unprocessed: false }), false), ["stop"])
    assert.deepStrictEqual(decisions(times(1, "Overloaded"), false), ["rotate as a retry"])
    assert.deepStrictEqual(decisions(times(1, "RateLimited"), false), ["rotate"])
    assert.deepStrictEqual(decisions(times(1, "Unauthorized"), false), ["rotate"])
  })

  it("C8: what can be sent only once is never sent again", () => {
    for (const kind of Fault.Kind.literals) assert.deepStrictEqual(decisions(times(1, kind), "never"), ["stop"])
  })

  it.prop(
    "C3: no sequence of faults rotates for nothing more often than the limits say",
    [FastCheck.array(FastCheck.constantFrom(...Fault.Kind.literals), { maxLength: 60 })],
    ([kinds]) => {
      const made = decisions(kinds.map((kind) => Fault.make(kind)))
      const free = kinds.filter((_, i) => made[i] === "rotate")
      assert.isAtMost(free.length, limits.rotations)
      assert.isAtMost(free.filter((kind) => kind === "RateLimited").length, limits.rateLimitRotations)
      assert.isAtMost(made.filter((word) => word === "rotate as a retry").length, 1)
      assert.isAtMost(made.filter((word) => word === "other-group" || word === "higher-limit").length, 1)
    }
  )
})
