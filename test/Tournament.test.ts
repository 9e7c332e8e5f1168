import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as Tournament from "../src/Tournament.js"

interface Runner {
  readonly slot: number
  readonly time: number
}

const before = (a: Runner, b: Runner) => a.time === b.time ? a.slot < b.slot : a.time < b.time

const slot = FastCheck.oneof(
  { weight: 4, arbitrary: FastCheck.integer({ min: 0, max: 40 }) },
  { weight: 1, arbitrary: FastCheck.constantFrom(1023, 1024, 65_536, 33_554_431) }
)

const change = FastCheck.record({ slot, time: FastCheck.option(FastCheck.integer({ min: 0, max: 9 })) })

describe("Tournament", () => {
  it.prop("agrees with a sorted array", {
    changes: FastCheck.array(change, { maxLength: 150, size: "max" }),
    excluded: FastCheck.uniqueArray(slot, { maxLength: 30, size: "max" })
  }, ({ changes, excluded }) => {
    const model = new Map<number, Runner>()
    const versions: Array<readonly [Tournament.Tournament<Runner>, ReadonlyArray<Runner>]> = []
    let tournament = Tournament.empty(before)
    for (const { slot, time } of changes) {
      if (time === null) {
        const old = tournament
        tournament = Tournament.remove(tournament, slot)
        assert.strictEqual(tournament === old, !model.delete(slot))
      } else {
        tournament = Tournament.set(tournament, { slot, time })
        model.set(slot, { slot, time })
      }
      assert.strictEqual(tournament.size, model.size)
      versions.push([tournament, [...model.values()].sort((a, b) => before(a, b) ? -1 : 1)])
      for (const at of [slot, slot + 1, -1]) assert.deepStrictEqual(Tournament.get(tournament, at), model.get(at))
    }
    const barred = new Set(excluded)
    for (const [version, ranking] of versions) {
      assert.deepStrictEqual(Tournament.best(version), ranking[0])
      const allowed = ranking.find(({ slot }) => !barred.has(slot))
      assert.deepStrictEqual(Tournament.bestExcept(version, (slot) => barred.has(slot)), allowed)
      const reversed = Tournament.map(version, ({ slot, time }) => ({ slot, time: -time }))
      const last = ranking.map(({ slot, time }) => ({ slot, time: -time })).sort((a, b) => before(a, b) ? -1 : 1)[0]
      assert.deepStrictEqual(Tournament.best(reversed), last)
      assert.strictEqual(reversed.size, version.size)
    }
  })
})
