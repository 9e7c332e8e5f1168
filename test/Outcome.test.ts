import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Duration from "effect/Duration"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import * as FiberId from "effect/FiberId"
import * as Fault from "../src/Fault.js"
import * as KeymeshError from "../src/KeymeshError.js"
import * as Outcome from "../src/Outcome.js"

const kindOf = (error: unknown) => {
  const outcome = Outcome.fromError(error)
  return outcome._tag === "Fault" ? outcome.fault.kind : outcome._tag
}

describe("Outcome", () => {
  it("fromExit: success is success; interruption and defects are ignored", () => {
    assert.strictEqual(Outcome.fromExit(Exit.succeed(1))._tag, "Success")
    assert.strictEqual(Outcome.fromExit(Exit.interrupt(FiberId.none))._tag, "Ignored")
    assert.strictEqual(Outcome.fromExit(Exit.die({ status: 500 }))._tag, "Ignored")
    assert.strictEqual(Outcome.fromExit(Exit.fail("own"))._tag, "Ignored")
    assert.strictEqual(Outcome.fromExit(Exit.fail({ status: 500 }))._tag, "Fault")
  })

  it("fromCause: a failure counts, whatever came beside it", () => {
    const cause = Cause.parallel(Cause.interrupt(FiberId.none), Cause.fail({ status: 429 }))
    assert.deepStrictEqual(Outcome.fromCause(cause), Outcome.fault(Fault.make("RateLimited", { status: 429 })))
    assert.strictEqual(Outcome.fromCause(Cause.empty)._tag, "Ignored")
  })

  it("fromError: a fault, or one that an error carries, is taken as it is", () => {
    const fault = Fault.make("QuotaExhausted", { reset: "1 hour", code: "insufficient_quota" })
    assert.deepStrictEqual(Outcome.fromError(fault), Outcome.fault(fault))
    assert.deepStrictEqual(Outcome.fromError({ fault, status: 500 }), Outcome.fault(fault))
    assert.deepStrictEqual(Outcome.fromError(Object.assign(new Error("own"), { fault })), Outcome.fault(fault))
  })

  it("fromError: an HTTP status, of the error or of its response", () => {
    const kinds: ReadonlyArray<readonly [number, string]> = [
      [400, "Rejected"],
      [401, "Unauthorized"],
      [402, "QuotaExhausted"],
      [403, "Forbidden"],
      [404, "Rejected"],
      [408, "Timeout"],
      [413, "TooLarge"],
      [422, "Rejected"],
      [429, "RateLimited"],
      [500, "ServerError"],
      [502, "ServerError"],
      [503, "Overloaded"],
      [504, "Timeout"],
      [529, "Overloaded"]
    ]
    for (const [status, kind] of kinds) {
      assert.strictEqual(kindOf({ status }), kind)
      assert.strictEqual(kindOf({ _tag: "ResponseError", response: { status } }), kind)
      assert.strictEqual(kindOf(Object.assign(new Error("own"), { status })), kind)
    }
    assert.strictEqual(kindOf({ status: 200 }), "Ignored")
    assert.strictEqual(kindOf({ status: "429" }), "Ignored")
    assert.strictEqual(kindOf({ response: null }), "Ignored")
  })

  it("fromError: a timeout of Effect, and a request that could not be sent", () => {
    assert.strictEqual(kindOf(new Cause.TimeoutException()), "Timeout")
    assert.strictEqual(kindOf({ _tag: "RequestError", reason: "Transport" }), "Network")
    assert.strictEqual(kindOf({ _tag: "RequestError", reason: "InvalidUrl" }), "Ignored")
  })

  it.prop("fromError never throws", [FastCheck.anything()], ([error]) => {
    assert.include(["Fault", "Ignored"], Outcome.fromError(error)._tag)
  })

  it("F3: the wait beside a status is read, in every place in which errors carry it", () => {
    const headers = { "retry-after": "2" }
    const dates = { date: "Sun, 22 Nov 2026 12:00:00 GMT", "retry-after": "Sun, 22 Nov 2026 12:00:30 GMT" }
    const waits: ReadonlyArray<readonly [unknown, number | undefined]> = [
      [{ status: 429, waitMillis: 700 }, 700],
      [{ status: 429, retryAfter: 30_000 }, 30_000],
      [{ status: 429, retryAfter: Duration.seconds(3) }, 3_000],
      [{ status: 429, headers }, 2_000],
      [{ status: 429, headers: new Headers(headers) }, 2_000],
      [{ response: { status: 429, headers } }, 2_000],
      [{ status: 429, headers: { ...headers, "retry-after-ms": "1500" } }, 1_500],
      [{ status: 429, headers: dates }, 30_000],
      [{ status: 429, headers: { "retry-after": "soon" } }, undefined],
      [{ status: 429, retryAfter: -1 }, undefined],
      [{ status: 429 }, undefined]
    ]
    for (const [error, wait] of waits) {
      const outcome = Outcome.fromError(error)
      assert.strictEqual(outcome._tag === "Fault" ? outcome.fault.waitMillis : -1, wait)
    }
  })

  it("C7: an error of a pool inside says nothing of this pool's keys", () => {
    const inner = new KeymeshError.PoolClosed({ pool: "inner", trail: KeymeshError.emptyTrail })
    assert.strictEqual(Outcome.fromError(inner)._tag, "Ignored")
  })
})
