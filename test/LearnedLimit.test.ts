import { describe, expect, it } from "@effect/vitest"
import * as LearnedLimit from "../src/LearnedLimit.js"

describe("A3: learned limits", () => {
  it("a window of which somebody tells who was wrong of late comes slowly, and at once when he was right again", () => {
    /** Twenty are accepted from the end of the wait on, and then one is refused and told to wait for 30 s. */
    const window = (self: LearnedLimit.LearnedLimit | undefined) => {
      let next = self
      const from = self?.end ?? 0
      const before = self?.stamp ?? 0
      for (let i = 1; i <= 20; i++) {
        next = next && LearnedLimit.leased(next, 1, from + i)
        next = next && LearnedLimit.accepted(next, { cost: 1, leased: before + i }, from + i)
      }
      return LearnedLimit.refused(next, { cost: 1, leased: before + 21 }, before + 21, 30_000, 0, from + 15_000)
    }
    const let2 = (self: LearnedLimit.LearnedLimit) =>
      [1, 2].reduce<LearnedLimit.LearnedLimit>((self) => LearnedLimit.leased(self, 1, self.end) ?? self, self)
    const told = window(undefined)
    const met = LearnedLimit.leased(told, 1, told.end)
    const wrong = LearnedLimit.refused(met, { cost: 1, leased: 22 }, 22, 15_000, 0, told.end + 40)
    const doubted = window(wrong)
    expect(doubted.measured?.shape).toBe("window")
    expect(LearnedLimit.gate(let2(doubted), 1, doubted.end)).toEqual({
      until: doubted.end + 1_000,
      earliest: -Infinity
    })
    const right = window(doubted)
    expect(right.measured?.shape).toBe("window")
    expect(LearnedLimit.gate(let2(right), 1, right.end)).toBeUndefined()
  })
})
