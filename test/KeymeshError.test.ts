import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import * as Option from "effect/Option"
import * as Fault from "../src/Fault.js"
import * as KeymeshError from "../src/KeymeshError.js"

const entry = (
  attempt: number,
  outcome: KeymeshError.TrailEntry["outcome"] = "ServerError"
): KeymeshError.TrailEntry => ({
  attempt,
  keyId: "key_1",
  label: "one",
  at: attempt,
  waitedMillis: 0,
  durationMillis: 1,
  outcome
})
const trailOf = (n: number) =>
  Array.from({ length: n }, (_, i) => entry(i + 1)).reduce(KeymeshError.appendTrail, KeymeshError.emptyTrail)
const trail = trailOf(2)
const fault = Fault.make("ServerError", { status: 503, code: "overloaded" })

const exhausted = (more: Partial<ConstructorParameters<typeof KeymeshError.AllKeysExhausted>[0]> = {}) =>
  new KeymeshError.AllKeysExhausted({
    pool: "openai",
    at: 1_000,
    nextAvailableAt: 31_000,
    reasons: [{ keyId: "key_1", label: "one", gate: "cooldown", fault: "RateLimited", until: 31_000 }],
    reasonCounts: { RateLimited: 2, disabled: 1 },
    trail,
    ...more
  })

const errors = {
  AllKeysExhausted: exhausted(),
  BudgetExceeded: new KeymeshError.BudgetExceeded({
    of: "call",
    pool: "openai",
    budget: Duration.minutes(1),
    fault,
    trail
  }),
  DeadlineExceeded: new KeymeshError.DeadlineExceeded({ pool: "openai", deadline: Duration.seconds(5), trail }),
  PoolClosed: new KeymeshError.PoolClosed({ pool: "openai", trail }),
  ProviderError: new KeymeshError.ProviderError({
    provider: "openai",
    fault,
    status: 503,
    body: undefined,
    requestId: "req_1",
    trail,
    cause: new Error("The engine is overloaded")
  }),
  SdkError: new KeymeshError.SdkError({ provider: "openai", cause: new TypeError("x is not a function") })
}
const poolErrors = [errors.AllKeysExhausted, errors.BudgetExceeded, errors.DeadlineExceeded, errors.PoolClosed]

describe("messages", () => {
  const includes = (message: string, ...parts: ReadonlyArray<string>) => {
    for (const part of parts) assert.include(message, part)
  }

  it("ConfigurationError names the field and the problem", () => {
    const error = new KeymeshError.ConfigurationError({ field: "keys[2].weight", problem: "must be greater than 0" })
    assert.strictEqual(error.message, "keys[2].weight: must be greater than 0")
  })

  it("AllKeysExhausted says why, when the next key comes, and what to do", () => {
    includes(errors.AllKeysExhausted.message, "\"openai\"", "2 RateLimited", "1 disabled", "30s", "wait", "budget")
  })

  it("AllKeysExhausted without a known moment asks for a key", () => {
    const { message } = exhausted({ nextAvailableAt: undefined, reasonCounts: { disabled: 2 } })
    includes(message, "2 disabled", "add a key", "enable")
    includes(exhausted({ nextAvailableAt: undefined, reasonCounts: {} }).message, "no keys")
  })

  it("AllKeysExhausted does not say that no key comes back where all are busy", () => {
    const { message } = exhausted({ nextAvailableAt: undefined, reasonCounts: { concurrency: 2 } })
    assert.notInclude(message, "No key comes back by itself")
  })

  it("AllKeysExhausted tells how long until the next key, never less than nothing", () => {
    assert.deepStrictEqual(errors.AllKeysExhausted.retryAfter, Duration.seconds(30))
    assert.deepStrictEqual(exhausted({ nextAvailableAt: 500 }).retryAfter, Duration.zero)
    assert.strictEqual(exhausted({ nextAvailableAt: undefined }).retryAfter, undefined)
  })

  it("BudgetExceeded says how large it was, how often was tried, what went wrong last, and what to do", () => {
    includes(
      errors.BudgetExceeded.message,
      "1m",
      "\"openai\"",
      "2 attempts",
      "ServerError",
      "503",
      "overloaded",
      "Raise"
    )
    const one = new KeymeshError.BudgetExceeded({
      ...errors.BudgetExceeded,
      fault: undefined,
      trail: trailOf(1)
    })
    includes(one.message, "after 1 attempt.")
  })

  it("DeadlineExceeded says which deadline, and how often was tried", () => {
    includes(errors.DeadlineExceeded.message, "\"openai\"", "5s", "2 attempts")
  })

  it("PoolClosed says what must stay open", () => {
    includes(errors.PoolClosed.message, "\"openai\"", "closed", "scope")
  })

  it("ProviderError says what the provider said", () => {
    includes(errors.ProviderError.message, "openai", "ServerError", "503", "overloaded", "2 attempts", "engine")
    const silent = new KeymeshError.ProviderError({ ...errors.ProviderError, cause: undefined })
    assert.isTrue(silent.message.endsWith("2 attempts."))
  })

  it("SdkError says what the callback threw", () => {
    includes(errors.SdkError.message, "openai", "x is not a function")
    includes(new KeymeshError.SdkError({ provider: "openai", cause: "text" }).message, "not an Error")
  })

  it("every error is an Error with a stack, its tag and its message", () => {
    for (const [tag, error] of Object.entries(errors)) {
      assert.instanceOf(error, Error)
      assert.strictEqual(error._tag, tag)
      assert.strictEqual(error.name, tag)
      assert.include(String(error), error.message)
      assert.include(Cause.pretty(Cause.fail(error)), error.message)
    }
  })
})

describe("catching", () => {
  for (const [tag, error] of Object.entries(errors)) {
    it.effect(`catchTag catches ${tag} and nothing else`, () =>
      Effect.gen(function*() {
        const failing: Effect.Effect<string, KeymeshError.CallError> = Effect.fail(error)
        const caught = failing.pipe(
          Effect.catchTag(tag as KeymeshError.CallError["_tag"], (e) => Effect.succeed(e._tag))
        )
        assert.strictEqual(yield* caught, tag)
        const other = tag === "PoolClosed" ? "SdkError" : "PoolClosed"
        const missed = failing.pipe(Effect.catchTag(other, () => Effect.succeed("caught")))
        assert.strictEqual(yield* Effect.flip(missed), error)
      }))
  }

  it.effect("an error is an effect that fails with itself", () =>
    Effect.gen(function*() {
      assert.strictEqual(yield* Effect.flip(errors.PoolClosed), errors.PoolClosed)
    }))
})

describe("isPoolError", () => {
  it("knows the pool's own errors from others", () => {
    for (const error of poolErrors) assert.isTrue(KeymeshError.isPoolError(error))
    const others = [
      errors.ProviderError,
      errors.SdkError,
      new KeymeshError.ConfigurationError({ field: "a", problem: "b" }),
      new Error("x"),
      { _tag: "PoolClosed", pool: "openai" },
      undefined,
      null,
      "PoolClosed"
    ]
    for (const other of others) assert.isFalse(KeymeshError.isPoolError(other))
  })
})

describe("find", () => {
  const inner = errors.AllKeysExhausted

  it("finds an error that is one already", () => {
    for (const error of Object.values(errors)) {
      assert.strictEqual(Option.getOrUndefined(KeymeshError.find(error)), error)
    }
  })

  const wrappers: Readonly<Record<string, (error: unknown) => unknown>> = {
    "a cause": (error) => new Error("outer", { cause: error }),
    "an error": (error) => ({ error }),
    "a reason": (error) => ({ _tag: "HttpError", reason: error }),
    "an Effect cause": (error) => Cause.fail(error),
    "an exit": (error) => Exit.fail(error)
  }
  for (const [name, wrap] of Object.entries(wrappers)) {
    it(`finds an error inside ${name}`, () => {
      assert.strictEqual(Option.getOrUndefined(KeymeshError.find(wrap(inner))), inner)
    })
  }

  it.prop(
    "finds an error through any mixture of a few levels",
    [FastCheck.array(FastCheck.constantFrom(...Object.values(wrappers).slice(0, 3)), { maxLength: 8 })],
    ([wraps]) => {
      const outer = wraps.reduce<unknown>((error, wrap) => wrap(error), inner)
      assert.strictEqual(Option.getOrUndefined(KeymeshError.find(outer)), inner)
    }
  )

  it.effect("finds the error of a program that ran outside of Effect", () =>
    Effect.gen(function*() {
      const rejected: unknown = yield* Effect.promise(() =>
        Effect.runPromise(Effect.fail(inner)).then(() => undefined, (error: unknown) => error)
      )
      assert.strictEqual(Option.getOrUndefined(KeymeshError.find(rejected)), inner)
    }))

  it("prefers the cause, and looks behind a blind alley", () => {
    const both = { cause: errors.PoolClosed, error: inner }
    assert.strictEqual(Option.getOrUndefined(KeymeshError.find(both)), errors.PoolClosed)
    const alley = { cause: new Error("a", { cause: new Error("b") }), reason: { error: inner } }
    assert.strictEqual(Option.getOrUndefined(KeymeshError.find(alley)), inner)
  })

  it("ends where causes form a ring, and still finds what hangs on it", () => {
    const ring: Record<string, unknown> = {}
    ring["cause"] = ring
    ring["error"] = ring
    ring["reason"] = ring
    assert.isTrue(Option.isNone(KeymeshError.find(ring)))
    const a = new Error("a")
    const b = new Error("b", { cause: a })
    a.cause = b
    assert.isTrue(Option.isNone(KeymeshError.find(a)))
    Object.assign(b, { error: inner })
    assert.strictEqual(Option.getOrUndefined(KeymeshError.find(a)), inner)
  })

  it("finds nothing in what holds none", () => {
    for (const value of [undefined, null, 5, "text", {}, [], new Error("x"), () => inner, { other: inner }]) {
      assert.isTrue(Option.isNone(KeymeshError.find(value)))
    }
  })
})

describe("trail", () => {
  it("T4: tells 32 attempts in full and counts the others by outcome", () => {
    assert.strictEqual(KeymeshError.trailLimit, 32)
    const full = trailOf(32)
    assert.strictEqual(full.entries.length, 32)
    assert.deepStrictEqual(full.more, {})
    const more = [entry(33), entry(34, "RateLimited"), entry(35), entry(36, "success"), entry(37, "ignored")].reduce(
      KeymeshError.appendTrail,
      full
    )
    assert.deepStrictEqual(more.entries, full.entries)
    assert.deepStrictEqual(more.more, { ServerError: 2, RateLimited: 1, success: 1, ignored: 1 })
    assert.strictEqual(KeymeshError.attemptsIn(more), 37)
    assert.include(
      new KeymeshError.DeadlineExceeded({ ...errors.DeadlineExceeded, trail: more }).message,
      "37 attempts"
    )
  })

  it.prop("T4: no attempt is lost, whatever their number", [FastCheck.nat({ max: 100 })], ([n]) => {
    const all = trailOf(n)
    assert.strictEqual(KeymeshError.attemptsIn(all), n)
    assert.strictEqual(all.entries.length, Math.min(n, 32))
    assert.deepStrictEqual(
      all.entries.map((entry) => entry.attempt),
      Array.from({ length: Math.min(n, 32) }, (_, i) => i + 1)
    )
  })

  it("T4: appending leaves the old trail as it was", () => {
    const before = trailOf(1)
    KeymeshError.appendTrail(before, entry(2))
    assert.strictEqual(before.entries.length, 1)
    assert.deepStrictEqual(KeymeshError.emptyTrail, { entries: [], more: {} })
  })
})
