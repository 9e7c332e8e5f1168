import { assert, describe, it } from "@effect/vitest"
import * as Duration from "effect/Duration"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import { inspect } from "node:util"
import * as Settings from "../src/Settings.js"

/** What a check says: the value, or the field and nothing else. */
const verdict = <A>(checked: Settings.Checked<A>) =>
  Either.match(checked, {
    onLeft: (error) => ({ refused: error.field }),
    onRight: (value) => ({ taken: value })
  })

const checks: Readonly<Record<string, (value: unknown, path: string) => Settings.Checked<unknown>>> = {
  positive: Settings.positive,
  nonNegative: Settings.nonNegative,
  finite: Settings.finite,
  integer: (value, path) => Settings.integer(value, path),
  share: Settings.share,
  millis: Settings.millis,
  text: Settings.text
}

const table: Readonly<
  Record<string, { readonly taken: ReadonlyArray<unknown>; readonly refused: ReadonlyArray<unknown> }>
> = {
  positive: { taken: [1, 0.5, Number.MIN_VALUE], refused: [0, -0, -1, Number.NaN, Infinity, "1", null, undefined, 1n] },
  nonNegative: { taken: [0, 1, 0.5], refused: [-1, -Number.MIN_VALUE, Number.NaN, Infinity, "1", null] },
  finite: { taken: [0, -1.5, 1e300], refused: [Number.NaN, Infinity, -Infinity, "1", null, [1]] },
  integer: { taken: [0, 1, 2 ** 53 - 1], refused: [-1, 1.5, 2 ** 53, Number.NaN, Infinity, "1", null] },
  share: { taken: [0, 0.5, 1], refused: [-0.1, 1.1, Number.NaN, "0.5", null] },
  text: { taken: ["a", " a ", "\u00e9"], refused: ["", "  ", "a\n", "\u0000", "a\u007f", 5, null, undefined, ["a"]] }
}

describe("checks", () => {
  for (const [name, { refused, taken }] of Object.entries(table)) {
    const check = checks[name] ?? (() => Settings.refuse("none", "no check"))
    it(`${name} takes what it says, as it is`, () => {
      for (const value of taken) assert.deepStrictEqual<unknown>(verdict(check(value, "a.b")), { taken: value })
    })
    it(`K3: ${name} refuses anything else, under its field`, () => {
      for (const value of refused) {
        assert.deepStrictEqual<unknown>(verdict(check(value, "a.b")), { refused: "a.b" }, inspect(value))
      }
    })
  }

  it("an integer may have a least value", () => {
    assert.isTrue(Either.isLeft(Settings.integer(0, "n", 1)))
    assert.isTrue(Either.isRight(Settings.integer(1, "n", 1)))
  })

  it("millis takes every form of a duration", () => {
    const forms: ReadonlyArray<readonly [value: unknown, millis: number]> = [
      [0, 0],
      [250, 250],
      [0.5, 0.5],
      ["30 seconds", 30_000],
      ["1 minute", 60_000],
      [Duration.hours(1), 3_600_000],
      [2_000_000n, 2],
      [[1, 500_000_000], 1_500],
      [Infinity, Infinity],
      [Duration.infinity, Infinity]
    ]
    for (const [value, millis] of forms) {
      assert.deepStrictEqual<unknown>(verdict(Settings.millis(value, "wait")), { taken: millis }, inspect(value))
    }
  })

  const noDurations: ReadonlyArray<unknown> = [Number.NaN, "soon", "", "5", true, null, undefined, {}, [], [1, 2, 3]]
  const negative: ReadonlyArray<unknown> = [-1, -Infinity, "-5 seconds", " -5 seconds", -1n, [-1, 0], [0, -5]]
  for (const value of [...noDurations, ...negative]) {
    it(`K3: millis refuses ${inspect(value)}`, () => {
      assert.deepStrictEqual<unknown>(verdict(Settings.millis(value, "wait")), { refused: "wait" })
    })
  }

  it("K3: an unknown setting is refused at its own path, with the known ones", () => {
    const error = Either.getOrThrow(Either.flip(Settings.refuseUnknown({ a: 1, c: 2 }, ["a", "b"], "breaker")))
    assert.strictEqual(error.field, "breaker.c")
    assert.include(error.problem, "a, b")
    assert.deepStrictEqual(verdict(Settings.refuseUnknown({ c: 1 }, ["a"], "")), { refused: "c" })
    assert.deepStrictEqual(verdict(Settings.refuseUnknown({}, ["a"], "x")), { taken: undefined })
    for (const value of [undefined, null, 5, "a", [], () => 1]) {
      assert.deepStrictEqual(verdict(Settings.refuseUnknown(value, ["a"], "x")), { refused: "x" }, inspect(value))
    }
  })

  it.prop("K1: no check shows a value that is not a number", [FastCheck.string({ minLength: 8 })], ([value]) => {
    const wrong = [value, Redacted.make(value), [value], { value }, Option.some(value)]
    for (const [name, check] of Object.entries(checks)) {
      for (const input of name === "text" ? wrong.slice(1) : wrong) {
        const checked = check(input, "field")
        if (Either.isLeft(checked)) assert.notInclude(checked.left.message, value)
      }
    }
  })

  it.prop("control characters are those below a space, and delete", [FastCheck.string()], ([value]) => {
    // eslint-disable-next-line no-control-regex
    assert.strictEqual(Settings.hasControl(value), /[\u0000-\u001f\u007f]/.test(value))
  })
})
