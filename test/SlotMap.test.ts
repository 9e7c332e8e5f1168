import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import * as SlotMap from "../src/SlotMap.js"

const slot = FastCheck.oneof(
  { weight: 4, arbitrary: FastCheck.integer({ min: 0, max: 70 }) },
  { weight: 1, arbitrary: FastCheck.constantFrom(1023, 1024, 1055, 32_767, 32_768, 1_048_576, 33_554_431) }
)

const change = FastCheck.record({ slot, removal: FastCheck.boolean() })

const probe = FastCheck.oneof(slot, FastCheck.constantFrom(-1, NaN, 40_000_000))

describe("SlotMap", () => {
  it.prop("agrees with a sorted array", {
    changes: FastCheck.array(change, { maxLength: 200, size: "max" }),
    probes: FastCheck.array(probe, { maxLength: 20 })
  }, ({ changes, probes }) => {
    const model = new Map<number, string>()
    const versions: Array<readonly [SlotMap.SlotMap<string>, ReadonlyArray<string>]> = []
    let map = SlotMap.empty<string>()
    for (const [n, { removal, slot }] of changes.entries()) {
      if (removal) {
        const before = map
        map = SlotMap.remove(map, slot)
        assert.strictEqual(map === before, !model.delete(slot))
      } else {
        map = SlotMap.set(map, slot, `${slot}#${n}`)
        model.set(slot, `${slot}#${n}`)
      }
      const sorted = [...model].sort(([a], [b]) => a - b)
      versions.push([map, sorted.map(([, entry]) => entry)])
      assert.strictEqual(map.size, model.size)
      for (const at of [...probes, slot, slot + 1]) {
        assert.strictEqual(SlotMap.get(map, at), model.get(at))
        if (Number.isNaN(at)) continue
        assert.strictEqual(SlotMap.next(map, at), sorted.find(([slot]) => slot >= at)?.[1])
      }
    }
    // Older versions are as they were.
    for (const [version, entries] of versions) {
      assert.deepStrictEqual(SlotMap.values(version), entries)
      assert.deepStrictEqual(entries.map((_, rank) => SlotMap.nth(version, rank)), [...entries])
      assert.isUndefined(SlotMap.nth(version, entries.length))
    }
  })

  it("holds ten thousand entries in order, and shrinks again", () => {
    let map = SlotMap.empty<number>()
    for (let slot = 9_999; slot >= 0; slot--) map = SlotMap.set(map, slot, slot)
    assert.deepStrictEqual(SlotMap.values(map), Array.from({ length: 10_000 }, (_, slot) => slot))
    assert.strictEqual(SlotMap.nth(map, 7_654), 7_654)
    for (let slot = 3; slot < 10_000; slot++) map = SlotMap.remove(map, slot)
    assert.deepStrictEqual(SlotMap.values(map), [0, 1, 2])
    assert.strictEqual(map.shift, 0)
  })
})
