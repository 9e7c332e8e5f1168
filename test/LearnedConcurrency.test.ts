import { describe, expect, it } from "@effect/vitest"
import * as Fault from "../src/Fault.js"
import * as LearnedConcurrency from "../src/LearnedConcurrency.js"

const named = Fault.make("RateLimited", { unit: "concurrency", wait: "1 second" })
const silent = Fault.make("RateLimited")
const { most, refused, succeeded } = LearnedConcurrency

/** Succeeds so many times while so many run; each began after all before. */
const steadily = (self: LearnedConcurrency.LearnedConcurrency | undefined, times: number, inFlight: number) =>
  Array.from({ length: times }, (_, i) => (self?.stamp ?? 0) + 1 + i).reduce<typeof self>(
    (self, lease) => succeeded(self, lease, inFlight, lease, 0),
    self
  )

describe("A3: what runs at once", () => {
  it("named: as many as ran beside the one that was refused; of several refused at once, the last tells", () => {
    const first = refused(undefined, named, 10, 21, 22, 0)
    expect(most(first, 0)).toBe(10)
    expect(most(refused(first, named, 8, 22, 22, 0), 0)).toBe(8)
    expect(most(refused(first, named, 12, 22, 22, 0), 0)).toBe(10)
    expect(most(refused(undefined, named, 0, 1, 1, 0), 0)).toBe(1)
  })

  it("named: one more is tried after a hundred that succeeded while all ran, and not before", () => {
    const first = refused(undefined, named, 8, 9, 9, 0)
    expect(most(steadily(first, 500, 7), 0)).toBe(8)
    expect(most(steadily(first, 99, 8), 0)).toBe(8)
    const more = steadily(first, 100, 8)
    expect(most(more, 0)).toBe(9)
    expect(most(refused(more, named, 8, 3_000, 3_000, 0), 0)).toBe(8)
    expect(most(steadily(refused(steadily(first, 99, 8), named, 8, 3_000, 3_000, 0), 99, 8), 0)).toBe(8)
  })

  it("while nothing is refused, twice as many more are tried each time: a part that others took comes back", () => {
    const first = refused(undefined, named, 1, 9, 9, 0)
    const tried = Array.from({ length: 6 }).reduce<ReadonlyArray<typeof first>>(
      (all) => [...all, steadily(all.at(-1), all.length === 1 ? 100 : 3, most(all.at(-1), 0))],
      [first]
    )
    expect(tried.map((self) => most(self, 0))).toEqual([1, 2, 4, 8, 16, 32, 64])
    // Refused beside fewer than were tried: so many may run.
    expect(most(refused(tried[5], named, 20, 9_000, 9_000, 0), 0)).toBe(20)
  })

  it("one that began before more were tried is no proof", () => {
    const more = steadily(refused(undefined, named, 8, 9, 9, 0), 100, 8)
    const old = Array.from({ length: 9 }).reduce<typeof more>((self) => succeeded(self, 50, 9, 1_200, 0), more)
    expect(most(old, 0)).toBe(9)
  })

  it("without a word: refused beside clearly fewer than before, it is something else", () => {
    const sure = refused(refused(undefined, silent, 20, 9, 9, 0), silent, 20, 20, 20, 0)
    expect(most(sure, 0)).toBe(20)
    expect(most(refused(sure, silent, 18, 30, 30, 0), 0)).toBe(18)
    expect(most(refused(sure, silent, 10, 30, 30, 0), 0)).toBe(11)
    expect(refused(sure, silent, 0, 30, 30, 0)).toBeUndefined()
    // All of a burst were refused: nothing of it ran.
    const burst = Array.from({ length: 20 }, (_, i) => 19 - i)
    expect(burst.reduce<typeof sure>((self, others) => refused(self, silent, others, 30, 50, 0), sure)).toBeUndefined()
  })

  it("what it explains teaches nothing of how many requests may come, and what it does not does", () => {
    const { explains } = LearnedConcurrency
    const once = refused(undefined, silent, 20, 9, 9, 0)
    const sure = refused(once, silent, 20, 20, 20, 0)
    expect([17, 16, 0].map((others) => explains(sure, silent, others, 0))).toEqual([true, false, false])
    expect(explains(once, silent, 20, 0)).toBe(false)
    expect(explains(sure, silent, 20, 600_000)).toBe(false)
    expect(explains(sure, Fault.make("RateLimited", { wait: "1 second" }), 20, 0)).toBe(false)
  })

  it("named: a refusal beside fewer of which nothing is said changes nothing", () => {
    const first = refused(undefined, named, 8, 9, 9, 0)
    expect(refused(first, silent, 2, 20, 20, 0)).toBe(first)
    expect(most(refused(first, silent, 8, 20, 20, 0), 0)).toBe(8)
  })

  it("without a word: one more than ran, until the same comes again", () => {
    const first = refused(undefined, silent, 8, 9, 9, 0)
    expect(most(first, 0)).toBe(9)
    expect(most(refused(first, silent, 8, 20, 20, 0), 0)).toBe(8)
    // About the same: the lower of the two is safe.
    expect(most(refused(first, silent, 9, 20, 20, 0), 0)).toBe(8)
    expect(most(refused(first, silent, 20, 30, 30, 0), 0)).toBe(21)
  })

  it("without a word: three that succeed while more run show that it was something else", () => {
    const first = refused(undefined, silent, 8, 9, 9, 0)
    expect(most(steadily(first, 2, 9), 0)).toBe(9)
    expect(most(steadily(first, 3, 9), 0)).toBe(Infinity)
    expect(most(steadily(first, 300, 8), 0)).toBe(9)
  })

  it("nothing is made of a wait that was told, of tokens or days, or of few that ran", () => {
    expect(refused(undefined, Fault.make("RateLimited", { wait: "1 second" }), 8, 9, 9, 0)).toBeUndefined()
    expect(refused(undefined, Fault.make("RateLimited", { unit: "tokens" }), 8, 9, 9, 0)).toBeUndefined()
    expect(refused(undefined, silent, 3, 9, 9, 0)).toBeUndefined()
  })

  it("is forgotten after ten minutes without any", () => {
    const first = refused(undefined, named, 8, 9, 9, 0)
    expect(most(first, 599_999)).toBe(8)
    expect(most(first, 600_000)).toBe(Infinity)
    expect(first && LearnedConcurrency.forgottenAt(first)).toBe(600_000)
    expect(succeeded(first, 10, 1, 10, 600_000)).toBeUndefined()
    expect(most(refused(first, silent, 8, 10, 10, 600_000), 600_000)).toBe(9)
    const used = succeeded(first, 10, 8, 10, 1)
    expect(used && LearnedConcurrency.forgottenAt(used)).toBe(600_001)
  })
})
