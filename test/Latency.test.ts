import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as Latency from "../src/Latency.js"

const plain: Latency.Kind = { model: "m", streaming: false }
const all = (samples: ReadonlyArray<number>, kind = plain): Latency.Latency =>
  samples.reduce<Latency.Latency>((seen, millis, i) => Latency.add(seen, kind, millis, i), Latency.empty)
const many = (count: number, millis: number) => Array.from({ length: count }, () => millis)

describe("Latency", () => {
  it("C3: fewer than 20 samples say nothing", () => {
    assert.strictEqual(Latency.quantile(all(many(19, 100)), plain, 0.99), undefined)
    assert.isDefined(Latency.quantile(all(many(20, 100)), plain, 0.99))
  })

  it.prop(
    "a quantile is that of the sorted samples, to within a bucket upward",
    [FastCheck.array(FastCheck.integer({ min: 1, max: 3_000_000 }), { minLength: 20, maxLength: 200 })],
    ([samples]) => {
      const sorted = [...samples].sort((a, b) => a - b)
      for (const share of [0.5, 0.95, 0.99]) {
        const exact = sorted[Math.ceil(share * samples.length - 1e-9) - 1] ?? 0
        const found = Latency.quantile(all(samples), plain, share) ?? 0
        assert.isAtLeast(found, exact * (1 - 1e-9))
        assert.isAtMost(found, exact * 2 ** 0.25 * (1 + 1e-9))
      }
    }
  )

  it("C3: streams and other answers, and models, are apart", () => {
    const streaming = { ...plain, streaming: true }
    const other = { ...plain, model: "n" }
    const seen = all(many(20, 4_000))
    for (const kind of [streaming, other]) assert.strictEqual(Latency.quantile(seen, kind, 0.99), undefined)
  })

  it("what came long before is forgotten", () => {
    const seen = all([...many(1_000, 60_000), ...many(6_000, 1_000)])
    assert.strictEqual(Latency.quantile(seen, plain, 0.99), 1_024)
  })

  it("the first 100 attempts of a kind are all taken, then about one of eight, of kinds that take turns too", () => {
    const numbers = Array.from({ length: 8_000 }, (_, n) => n)
    assert.isTrue(numbers.every((n) => Latency.wants(all(many(99, 5)), plain, n)))
    const seen = all(many(100, 5))
    for (const  of of[1, 2, 3, 8]) {
      const taken = numbers.filter((n) => n % of === 0).filter((n) => Latency.wants(seen, plain, n)).length
      assert.approximately(taken * of / numbers.length, 1 / 8, 0.02)
    }
    assert.isTrue(Latency.wants(seen, { ...plain, model: "n" }, 1))
  })

  it("at most 64 kinds are kept: those seen last", () => {
    let seen = Latency.empty
    for (let n = 0; n < 100; n++) seen = Latency.add(seen, { model: `m${n}`, streaming: false }, 5, n)
    assert.deepStrictEqual(seen.map(({ model }) => model).sort(), Array.from({ length: 64 }, (_, n) => `m${n + 36}`))
  })
})
