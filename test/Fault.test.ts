import { assert, describe, it } from "@effect/vitest"
import * as Duration from "effect/Duration"
import * as Equal from "effect/Equal"
import * as FastCheck from "effect/FastCheck"
import * as Schema from "effect/Schema"
import * as Fault from "../src/Fault.js"

type Prior = Pick<Fault.Fault, "scope" | "retryable" | "failover" | "unprocessed">

const priors: Readonly<Record<Fault.Kind, Prior>> = {
  RateLimited: { scope: "group", retryable: true, failover: true, unprocessed: true },
  QuotaExhausted: { scope: "group", retryable: false, failover: true, unprocessed: true },
  Unauthorized: { scope: "key", retryable: false, failover: true, unprocessed: true },
  Forbidden: { scope: "key", retryable: false, failover: true, unprocessed: true },
  TooLarge: { scope: "request", retryable: false, failover: false, unprocessed: true },
  Overloaded: { scope: "provider", retryable: true, failover: false, unprocessed: true },
  ServerError: { scope: "provider", retryable: true, failover: false, unprocessed: false },
  Timeout: { scope: "provider", retryable: true, failover: false, unprocessed: false },
  Network: { scope: "provider", retryable: true, failover: false, unprocessed: false },
  Rejected: { scope: "request", retryable: false, failover: false, unprocessed: true }
}

describe("make", () => {
  it("every kind has the prior of its row in the table", () => {
    assert.sameMembers([...Fault.Kind.literals], Object.keys(priors))
    for (const kind of Fault.Kind.literals) {
      const { failover, retryable, scope, unprocessed } = Fault.make(kind)
      assert.deepStrictEqual({ scope, retryable, failover, unprocessed }, priors[kind], kind)
    }
  })

  it("what is not said is absent", () => {
    const fault = Fault.make("RateLimited")
    assert.deepStrictEqual(Object.keys(Schema.encodeSync(Fault.Fault)(fault)).sort(), [
      "_tag",
      "explicit",
      "failover",
      "kind",
      "perModel",
      "provenance",
      "retryable",
      "scope",
      "unprocessed"
    ])
    assert.deepStrictEqual([fault.provenance, fault.perModel, fault.explicit], ["guessed", false, false])
  })

  it("details win over the prior", () => {
    const details = {
      scope: "provider",
      perModel: true,
      provenance: "measured",
      retryable: false,
      failover: false,
      explicit: true,
      unprocessed: false,
      status: 418,
      code: "teapot"
    } as const
    const fault = Fault.make("RateLimited", { ...details, wait: "2 seconds", reset: "1 minute" })
    assert.deepStrictEqual({ ...fault }, {
      _tag: "Fault",
      kind: "RateLimited",
      ...details,
      waitMillis: 2_000,
      resetMillis: 60_000
    })
  })

  it("F1: a wait is told unless its provenance is said", () => {
    assert.strictEqual(Fault.make("RateLimited", { wait: 0 }).provenance, "told")
    assert.strictEqual(Fault.make("RateLimited", { wait: 5, provenance: "guessed" }).provenance, "guessed")
  })

  it("F3: negative, infinite and meaningless waits are dropped", () => {
    for (const wait of [-1, Number.NaN, Infinity, -Infinity, Duration.infinity]) {
      const fault = Fault.make("RateLimited", { wait, reset: wait })
      assert.deepStrictEqual([fault.waitMillis, fault.resetMillis, fault.provenance], [undefined, undefined, "guessed"])
    }
  })

  it.prop("F3: no number crashes it, and a usable one stays as it is", [FastCheck.double()], ([wait]) => {
    const { waitMillis } = Fault.make("RateLimited", { wait })
    if (!(wait >= 0) || !Number.isFinite(wait)) return assert.strictEqual(waitMillis, undefined)
    // Durations count whole nanoseconds.
    assert.approximately(waitMillis ?? Number.NaN, wait, Math.max(1e-6, wait * 1e-12))
  })
})

describe("fromStatus", () => {
  const rows: ReadonlyArray<readonly [kind: Fault.Kind | undefined, statuses: ReadonlyArray<number>]> = [
    [undefined, [100, 200, 204, 301, 304, 399, 0, -1, Number.NaN]],
    ["Unauthorized", [401]],
    ["QuotaExhausted", [402]],
    ["Forbidden", [403]],
    ["Timeout", [408, 504, 522, 524]],
    ["ServerError", [409, 425, 500, 501, 502, 505, 520, 521, 599]],
    ["TooLarge", [413]],
    ["RateLimited", [429]],
    ["Overloaded", [503, 529]],
    ["Rejected", [400, 404, 405, 415, 422, 451]]
  ]
  for (const [kind, statuses] of rows) {
    it(`${statuses.join(", ")}: ${kind ?? "no fault"}`, () => {
      for (const status of statuses) assert.strictEqual(Fault.fromStatus(status)?.kind, kind)
    })
  }

  it("keeps the status and the details", () => {
    const fault = Fault.fromStatus(429, { wait: "3 seconds", code: "slow_down" })
    assert.deepStrictEqual([fault?.status, fault?.waitMillis, fault?.code], [429, 3_000, "slow_down"])
  })
})

describe("a fault", () => {
  it("is known from others, and equal by content", () => {
    const fault = Fault.make("Timeout", { status: 504 })
    assert.isTrue(Fault.isFault(fault))
    assert.isTrue(Equal.equals(fault, Fault.make("Timeout", { status: 504 })))
    assert.isFalse(Equal.equals(fault, Fault.make("Timeout")))
    for (const other of [undefined, null, "Fault", {}, { ...fault }, { _tag: "Fault" }, new Error("x")]) {
      assert.isFalse(Fault.isFault(other))
    }
  })

  it.prop("goes to JSON and back", [Fault.Fault], ([fault]) => {
    const text = JSON.stringify(Schema.encodeSync(Fault.Fault)(fault))
    // JSON has no NaN and no infinity.
    FastCheck.pre(!text.includes(":null"))
    const back = Schema.decodeUnknownSync(Fault.Fault)(JSON.parse(text))
    assert.isTrue(Fault.isFault(back))
    assert.strictEqual(JSON.stringify(back), JSON.stringify(fault))
  })

  it("speaks about the provider's side for four kinds", () => {
    const provider = Fault.Kind.literals.filter((kind) => Fault.isProviderFault(Fault.make(kind)))
    assert.sameMembers(provider, ["Overloaded", "ServerError", "Timeout", "Network"])
  })
})
