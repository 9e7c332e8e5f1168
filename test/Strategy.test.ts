import { assert, describe, it } from "@effect/vitest"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Schema from "effect/Schema"
import * as ApiKey from "../src/ApiKey.js"
import * as Strategy from "../src/Strategy.js"

type Candidate = Strategy.Candidate
type Index = Strategy.Index

const builtIn = [
  Strategy.roundRobin,
  Strategy.weighted,
  Strategy.leastUsed,
  Strategy.sequential,
  Strategy.powerOfTwoChoices,
  Strategy.cheapest,
  Strategy.headroom,
  Strategy.leastLatency
]

// ---------------------------------------------------------------------------------------------------------------------
// Histories: what a pool may do with an index
// ---------------------------------------------------------------------------------------------------------------------

type Step =
  | { readonly kind: "insert" | "update"; readonly candidate: Candidate }
  | { readonly kind: "remove"; readonly slot: number }
  | { readonly kind: "pick"; readonly excluded: ReadonlyArray<number>; rotation: boolean; random: number }

const slot = FastCheck.oneof(
  { weight: 8, arbitrary: FastCheck.integer({ min: 0, max: 5 }) },
  { weight: 2, arbitrary: FastCheck.integer({ min: 0, max: 70 }) },
  { weight: 1, arbitrary: FastCheck.constantFrom(1023, 1024, 32_768) }
)

// Strategies look at nothing of it but the tier.
const ofTier = (costTier: number) => Either.getOrThrow(ApiKey.make({ secret: "any-key", costTier }))
const anyKey = ofTier(1)
const tiers = [ofTier(0), anyKey, ofTier(2.5)]

// Few different numbers, so that ties are common. Two ids per slot: slots are used again by other keys.
const candidate = FastCheck.record({
  slot,
  generation: FastCheck.integer({ min: 0, max: 1 }),
  weight: FastCheck.constantFrom(0.1, 1, 1, 2, 3, 1000),
  order: FastCheck.integer({ min: 0, max: 3 }),
  inFlight: FastCheck.integer({ min: 0, max: 2 }),
  total: FastCheck.integer({ min: 0, max: 3 }),
  recent: FastCheck.integer({ min: 0, max: 3 }),
  lastUsed: FastCheck.constantFrom(-Infinity, 0, 1, 2),
  key: FastCheck.constantFrom(...tiers)
}).map(({ generation, ...numbers }): Candidate => ({
  ...numbers,
  id: `id-${numbers.slot}-${generation}`,
  label: `label-${numbers.slot}`
}))

const random = FastCheck.double({ min: 0, max: 1, maxExcluded: true, noNaN: true })

const step: FastCheck.Arbitrary<Step> = FastCheck.oneof(
  { weight: 3, arbitrary: FastCheck.record({ kind: FastCheck.constant("insert" as const), candidate }) },
  { weight: 2, arbitrary: FastCheck.record({ kind: FastCheck.constant("update" as const), candidate }) },
  { weight: 2, arbitrary: FastCheck.record({ kind: FastCheck.constant("remove" as const), slot }) },
  {
    weight: 5,
    arbitrary: FastCheck.record({
      kind: FastCheck.constant("pick" as const),
      excluded: FastCheck.oneof(FastCheck.constant([]), FastCheck.array(slot, { maxLength: 6 })),
      rotation: FastCheck.boolean(),
      random
    })
  }
)

const history = FastCheck.array(step, { maxLength: 120, size: "max" })

interface Question {
  readonly allowed: (slot: number) => boolean
  readonly rotation: boolean
}

/** A naive strategy: arrays, and as many walks over them as it likes. Told of a change, it sees the keys after it. */
interface Model {
  readonly changed: (keys: ReadonlyArray<Candidate>) => void
  readonly pick: (keys: ReadonlyArray<Candidate>, question: Question) => number | undefined
}

/** Runs a history over the index of a strategy; every answer is checked, then every old version is asked again. */
function replay(
  strategy: Strategy.Strategy,
  steps: ReadonlyArray<Step>,
  check: (
    answer: number | undefined,
    keys: ReadonlyArray<Candidate>,
    question: Question & { readonly random: number }
  ) => void,
  changed: (keys: ReadonlyArray<Candidate>) => void = () => undefined
): void {
  const keys = new Map<number, Candidate>()
  const sorted = () => [...keys.values()].sort((a, b) => a.slot - b.slot)
  const asked: Array<readonly [Index, Strategy.PickContext, number | undefined]> = []
  let index = strategy.empty
  for (const step of steps) {
    switch (step.kind) {
      case "insert":
        keys.set(step.candidate.slot, step.candidate)
        index = index.insert(step.candidate)
        changed(sorted())
        break
      case "update":
        if (keys.has(step.candidate.slot)) keys.set(step.candidate.slot, step.candidate)
        index = index.update(step.candidate)
        changed(sorted())
        break
      case "remove":
        keys.delete(step.slot)
        index = index.remove(step.slot)
        changed(sorted())
        break
      case "pick": {
        const context = given({ excluded: step.excluded, rotation: step.rotation, random: step.random })
        const picked = index.pick(context)
        asked.push([index, context, picked?.slot])
        const allowed = (slot: number) => !step.excluded.includes(slot)
        check(picked?.slot, sorted(), { allowed, rotation: step.rotation, random: step.random })
        index = picked?.index ?? index
      }
    }
    assert.strictEqual(index.size, keys.size)
  }
  for (const [version, context, answer] of asked) assert.strictEqual(version.pick(context)?.slot, answer)
}

function agrees(strategy: Strategy.Strategy, model: Model, steps: ReadonlyArray<Step>): void {
  replay(
    strategy,
    steps,
    (answer, keys, question) => assert.strictEqual(answer, model.pick(keys, question)),
    model.changed
  )
}

// ---------------------------------------------------------------------------------------------------------------------
// Helpers for single cases
// ---------------------------------------------------------------------------------------------------------------------

function key(slot: number, numbers: Partial<Candidate> = {}): Candidate {
  return {
    slot,
    id: `id-${slot}`,
    label: `label-${slot}`,
    weight: 1,
    order: 0,
    inFlight: 0,
    total: 0,
    recent: 0,
    lastUsed: -Infinity,
    key: anyKey,
    ...numbers
  }
}

function given(
  { excluded = [], now = 0, random = 0, rotation = false }: {
    readonly excluded?: ReadonlyArray<number>
    readonly rotation?: boolean
    readonly random?: number
    readonly now?: number
  } = {}
): Strategy.PickContext {
  return { excluded: (slot) => excluded.includes(slot), rotation, random, now }
}

function indexOf(strategy: Strategy.Strategy, keys: Iterable<Candidate>): Index {
  let index = strategy.empty
  for (const key of keys) index = index.insert(key)
  return index
}

function ofWeights(weights: ReadonlyArray<number>): Index {
  return indexOf(Strategy.weighted, weights.map((weight, slot) => key(slot, { weight })))
}

/** So many picks in a row. */
function series(index: Index, length: number, context = given()): { readonly slots: Array<number>; index: Index } {
  const slots: Array<number> = []
  for (let n = 0; n < length; n++) {
    const picked = pickFrom(index, context)
    slots.push(picked.slot)
    index = picked.index
  }
  return { slots, index }
}

function pickFrom(index: Index, context = given()): Strategy.Picked {
  const picked = index.pick(context)
  assert(picked !== undefined, "nothing was picked")
  return picked
}

function count(slots: ReadonlyArray<number>, slot: number): number {
  return slots.filter((one) => one === slot).length
}

function longestRun(slots: ReadonlyArray<number>, slot: number): number {
  let longest = 0
  let run = 0
  for (const one of slots) {
    run = one === slot ? run + 1 : 0
    longest = Math.max(longest, run)
  }
  return longest
}

/** Calls of which the ones that get the failing key (which stays eligible) rotate once: how often each key was picked. */
function callsWithFailing(index: Index, keys: number, failing: number, calls: number) {
  const first = Array.from({ length: keys }, () => 0)
  const rotated = Array.from({ length: keys }, () => 0)
  for (let n = 0; n < calls; n++) {
    let picked = pickFrom(index)
    first[picked.slot] = (first[picked.slot] ?? 0) + 1
    index = picked.index
    if (picked.slot !== failing) continue
    picked = pickFrom(index, given({ rotation: true, excluded: [failing] }))
    rotated[picked.slot] = (rotated[picked.slot] ?? 0) + 1
    index = picked.index
  }
  return { first, rotated }
}

/** Numbers in [0, 1) from a seed. */
function* uniform(seed: number): Generator<number, never> {
  let state = seed
  while (true) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    const high = state
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    yield (high + state / 2 ** 32) / 2 ** 32
  }
}

// ---------------------------------------------------------------------------------------------------------------------

describe("every built-in strategy", () => {
  for (const strategy of builtIn) {
    it.prop(`${strategy.name}: picks an eligible key that is not excluded, whenever there is one`, { history }, (
      { history }
    ) =>
      replay(strategy, history, (answer, keys, { allowed }) => {
        const possible = keys.map(({ slot }) => slot).filter(allowed)
        if (answer === undefined) assert.deepStrictEqual(possible, [])
        else assert.include(possible, answer)
      }))

    it(`${strategy.name}: passes over excluded keys without walking all of them`, () => {
      let index = indexOf(strategy, Array.from({ length: 10_000 }, (_, slot) => key(slot)))
      const barred: Array<number> = []
      for (let k = 0; k <= 16; k++) {
        let questions = 0
        const picked = index.pick({
          ...given({ random: 0.42 }),
          excluded: (slot) => {
            questions++
            return barred.includes(slot)
          }
        })
        assert(picked !== undefined)
        assert.isAtMost(questions, 15 * (k + 2))
        barred.push(picked.slot)
        index = picked.index
      }
      assert.strictEqual(new Set(barred).size, 17)
    })
  }

  it("has no key to pick from an empty index", () => {
    for (const { empty } of builtIn) {
      assert.strictEqual(empty.size, 0)
      assert.isUndefined(empty.pick(given()))
      assert.isUndefined(empty.remove(3).update(key(3)).pick(given()))
    }
  })

  it("is found by its name", () => {
    assert.deepStrictEqual(Strategy.Name.literals.map((name) => Strategy.fromName(name).name), [
      ...Strategy.Name.literals
    ])
    assert.sameMembers([...Strategy.Name.literals], builtIn.map(({ name }) => name))
    assert.isTrue(Either.isLeft(Schema.decodeUnknownEither(Strategy.Name)("random")))
  })

  it("reads `random` only when it says so", () => {
    for (const strategy of builtIn) {
      const index = indexOf(strategy, [0, 1, 2, 3, 4].map((slot) => key(slot)))
      const slots = new Set([...Array(50).keys()].map((n) => pickFrom(index, given({ random: n / 50 })).slot))
      assert.strictEqual(slots.size > 1, strategy.randomised, strategy.name)
    }
  })
})

describe("roundRobin", () => {
  it.prop("agrees with the model", { history }, ({ history }) => {
    const last = { first: -1, rotation: -1 }
    agrees(Strategy.roundRobin, {
      changed: () => undefined,
      pick: (keys, { allowed, rotation }) => {
        const cursor = rotation ? "rotation" : "first"
        const possible = keys.map(({ slot }) => slot).filter(allowed)
        const chosen = possible.find((slot) => slot > last[cursor]) ?? possible[0]
        if (chosen !== undefined) last[cursor] = chosen
        return chosen
      }
    }, history)
  }, { fastCheck: { numRuns: 200 } })

  it("goes round by slot, over keys that come and go", () => {
    let index = indexOf(Strategy.roundRobin, [0, 1, 2].map((slot) => key(slot)))
    let part = series(index, 4)
    assert.deepStrictEqual(part.slots, [0, 1, 2, 0])
    index = part.index.remove(1)
    part = series(index, 2)
    assert.deepStrictEqual(part.slots, [2, 0])
    part = series(part.index.insert(key(1, { id: "another" })).insert(key(3)), 4)
    assert.deepStrictEqual(part.slots, [1, 2, 3, 0])
  })

  it("neighbours of a failing key carry no more than the others", () => {
    const index = indexOf(Strategy.roundRobin, [0, 1, 2, 3, 4].map((slot) => key(slot)))
    const { first, rotated } = callsWithFailing(index, 5, 2, 2000)
    assert.deepStrictEqual(first, [400, 400, 400, 400, 400])
    assert.deepStrictEqual(rotated, [100, 100, 0, 100, 100])
  })
})

describe("weighted", () => {
  it.prop("agrees with the model", { history }, ({ history }) => {
    interface Share {
      readonly id: string
      readonly weight: number
      pass: number
    }
    const schedules = [false, true].map((rotation) => ({ rotation, time: 0, shares: new Map<number, Share>() }))
    let present: ReadonlySet<number> = new Set()
    agrees(Strategy.weighted, {
      changed: (keys) => {
        const before = present
        present = new Set(keys.map(({ slot }) => slot))
        for (const { shares, time } of schedules) {
          for (const { id, slot, weight } of keys) {
            const known = shares.get(slot)
            if (known?.id === id && !before.has(slot)) known.pass = Math.max(known.pass, time)
            if (known === undefined || known.id !== id) {
              const phase = (slot * (Math.sqrt(5) - 1) / 2) % 1
              shares.set(slot, { id, weight, pass: time + phase / weight })
            } else if (known.weight !== weight) {
              const wait = Math.max(known.pass - time, 0) * known.weight / weight
              shares.set(slot, { id, weight, pass: time + wait })
            }
          }
        }
      },
      pick: (keys, { allowed, rotation }) => {
        const schedule = schedules.find((one) => one.rotation === rotation)
        assert(schedule !== undefined)
        const due = keys.flatMap(({ slot }) => {
          const share = schedule.shares.get(slot)
          return share !== undefined && allowed(slot) ? [{ slot, share }] : []
        }).sort((a, b) => a.share.pass - b.share.pass || a.slot - b.slot)[0]
        if (due === undefined) return undefined
        schedule.time = Math.max(schedule.time, due.share.pass)
        due.share.pass = schedule.time + 1 / due.share.weight
        return due.slot
      }
    }, history)
  }, { fastCheck: { numRuns: 200 } })

  it.prop("gives every key its weight in any window of as many picks as the weights sum up to", {
    weights: FastCheck.array(FastCheck.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 8 }),
    unrest: FastCheck.array(FastCheck.tuple(FastCheck.nat(7), FastCheck.boolean(), FastCheck.boolean()), {
      maxLength: 40,
      size: "max"
    })
  }, ({ unrest, weights }) => {
    let index = ofWeights(weights)
    // Some keys are barred, others leave for a moment; then all are there again, and whoever is overdue serves once.
    for (const [slot, gone, rotation] of unrest) {
      if (gone) index = index.remove(slot)
      index = index.pick(given({ excluded: [slot], rotation }))?.index ?? index
      if (gone && slot < weights.length) index = index.insert(key(slot, { weight: weights[slot] ?? 1 }))
    }
    const settled = series(index, weights.length).index
    const sum = weights.reduce((a, b) => a + b)
    const { slots } = series(settled, 3 * sum)
    for (let start = 0; start <= 2 * sum; start++) {
      const window = slots.slice(start, start + sum)
      for (const [slot, weight] of weights.entries()) {
        assert.isAtMost(Math.abs(count(window, slot) - weight), 1, `key ${slot} of ${weights} in ${window}`)
      }
    }
    for (const [slot, weight] of weights.entries()) {
      const heaviest = Math.max(0, ...weights.filter((_, other) => other !== slot))
      if (heaviest > 0) assert.isAtMost(longestRun(slots, slot), Math.floor(weight / heaviest) + 1)
    }
  }, { fastCheck: { numRuns: 200 } })

  it("does not let a heavy key run because many light ones are due at the same time", () => {
    const { slots } = series(ofWeights([50, ...Array.from({ length: 50 }, () => 1)]), 1000)
    assert.strictEqual(count(slots, 0), 500)
    assert.isAtMost(longestRun(slots, 0), 3)
  })

  it("a key that is added late gets its share from now on, not the past", () => {
    const before = series(ofWeights([1, 2]), 3000).index
    const { slots } = series(before.insert(key(2, { weight: 3 })), 6)
    assert.isAtMost(Math.abs(count(slots, 2) - 3), 1)
  })

  it("a key that was away does not catch up", () => {
    const before = series(ofWeights([1, 1, 1]).remove(1), 3000).index
    const { slots } = series(before.insert(key(1)), 9)
    assert.closeTo(count(slots, 1), 3, 1)
  })

  it("to be away for a moment neither pays nor costs", () => {
    let index = ofWeights([1, 1, 1, 1])
    let served = 0
    for (let n = 0; n < 400; n++) {
      const picked = pickFrom(index)
      if (picked.slot === 2) served++
      index = picked.index.remove(2).insert(key(2))
    }
    assert.strictEqual(served, 100)
  })

  it("another key in the slot of one that is gone starts afresh", () => {
    const weights = { weight: 0.01 }
    const used = series(indexOf(Strategy.weighted, [key(0, weights), key(1)]), 1).index
    const again = used.remove(0).insert(key(0, weights))
    const another = used.remove(0).insert(key(0, { ...weights, id: "another" }))
    assert.strictEqual(count(series(again, 99).slots, 0), 0)
    assert.strictEqual(count(series(another, 99).slots, 0), 1)
  })

  it("a key that was barred for long does not catch up in a burst", () => {
    const { index } = series(ofWeights([1, 1, 1]), 3000, given({ excluded: [1] }))
    assert.isAtMost(count(series(index, 9).slots, 1), 4)
  })

  it("follows a changed weight at once, also up from next to nothing", () => {
    const light = series(ofWeights([1, 1e-6]), 10, given({ excluded: [0] })).index
    assert.strictEqual(count(series(light, 10).slots, 1), 0)
    assert.closeTo(count(series(light.update(key(1, { weight: 3 })), 40).slots, 1), 30, 1)
  })

  it("rotations neither disturb the shares of first picks nor load one neighbour", () => {
    const { first, rotated } = callsWithFailing(ofWeights([1, 2, 3, 4]), 4, 1, 2000)
    assert.deepStrictEqual(first, [200, 400, 600, 800])
    for (const [slot, share] of [1 / 8, 0, 3 / 8, 4 / 8].entries()) {
      assert.closeTo(rotated[slot] ?? NaN, 400 * share, 1)
    }
  })

  it("stays exact for weights of very different size", () => {
    const weary = series(indexOf(Strategy.weighted, [key(0, { weight: 1e-9 })]), 2000).index
    const away = weary.insert(key(3, { weight: 1e6 })).remove(3)
    const { index, slots } = series(away.insert(key(1, { weight: 1e6 })).insert(key(2, { weight: 2e6 })), 300)
    assert.isAtMost(Math.abs(count(slots, 1) - 100), 1)
    assert.isAtMost(Math.abs(count(slots, 2) - 200), 1)
    assert.closeTo(count(series(index.insert(key(3, { weight: 1e6 })), 400).slots, 3), 100, 1)
  })

  it("goes on when a weight makes no sense", () => {
    for (const weight of [0, -1, NaN, Infinity]) {
      const { slots } = series(ofWeights([weight, weight]), 10)
      assert.strictEqual(count(slots, 0), 5, String(weight))
    }
  })
})

describe("leastUsed", () => {
  it.prop("agrees with the model", { history }, ({ history }) =>
    agrees(Strategy.leastUsed, {
      changed: () => undefined,
      pick: (keys, { allowed }) => {
        const possible = keys.filter(({ slot }) => allowed(slot))
        const inFlight = Math.min(...possible.map((key) => key.inFlight))
        const idle = possible.filter((key) => key.inFlight === inFlight)
        const recent = Math.min(...idle.map((key) => key.recent))
        const fresh = idle.filter((key) => key.recent === recent)
        const lastUsed = Math.min(...fresh.map((key) => key.lastUsed))
        return fresh.find((key) => key.lastUsed === lastUsed)?.slot
      }
    }, history), { fastCheck: { numRuns: 200 } })

  it("levels what is in flight, then what was served", () => {
    const keys = [key(0, { recent: 7 }), key(1, { inFlight: 2 }), key(2, { inFlight: 1 })]
    let index = indexOf(Strategy.leastUsed, keys)
    const slots: Array<number> = []
    for (let now = 0; now < 6; now++) {
      const { slot } = pickFrom(index, given({ now }))
      slots.push(slot)
      const old = keys[slot]
      assert(old !== undefined)
      keys[slot] = { ...old, inFlight: old.inFlight + 1, recent: old.recent + 1, lastUsed: now }
      index = index.update(keys[slot])
    }
    assert.deepStrictEqual(slots, [0, 2, 0, 1, 2, 0])
    assert.deepStrictEqual(keys.map(({ inFlight }) => inFlight), [3, 3, 3])
  })
})

describe("sequential", () => {
  it.prop("agrees with the model", { history }, ({ history }) => {
    let current: { readonly id: string; readonly order: number; readonly slot: number } | undefined
    agrees(Strategy.sequential, {
      changed: () => undefined,
      pick: (keys, { allowed }) => {
        const possible = keys.filter(({ slot }) => allowed(slot)).sort((a, b) => a.order - b.order || a.slot - b.slot)
        const place = current
        const stay = possible.find(({ id, slot }) => slot === place?.slot && id === place.id)
        if (stay !== undefined) return stay.slot
        const chosen = possible.find(({ order, slot }) =>
          place === undefined || order > place.order || (order === place.order && slot >= place.slot)
        ) ?? possible[0]
        if (chosen !== undefined) {
          current = { id: chosen.id, order: chosen.order, slot: chosen.slot }
        }
        return chosen?.slot
      }
    }, history)
  }, { fastCheck: { numRuns: 200 } })

  it("stays on a key until a call may not have it, then on the next one, and comes round", () => {
    const keys = [key(0, { order: 3 }), key(1, { order: 1 }), key(2, { order: 2 })]
    let part = series(indexOf(Strategy.sequential, keys), 50)
    assert.strictEqual(count(part.slots, 1), 50)
    // Many calls leave the same key at the same time: the sequence moves on once.
    part = series(part.index, 50, given({ rotation: true, excluded: [1] }))
    assert.strictEqual(count(part.slots, 2), 50)
    // The first one is back, and waits for its turn.
    part = series(part.index.remove(1).insert(key(1, { order: 1 })), 50)
    assert.strictEqual(count(part.slots, 2), 50)
    part = series(part.index.remove(2), 50)
    assert.strictEqual(count(part.slots, 0), 50)
    part = series(part.index.insert(key(2, { order: 2 })), 50, given({ excluded: [0] }))
    assert.strictEqual(count(part.slots, 1), 50)
  })

  it("a changed order does not move the current key", () => {
    const index = series(indexOf(Strategy.sequential, [key(0, { order: 1 }), key(1, { order: 2 })]), 1).index
    const part = series(index.update(key(0, { order: 3 })), 5)
    assert.deepStrictEqual(part.slots, [0, 0, 0, 0, 0])
    assert.strictEqual(pickFrom(part.index, given({ excluded: [0] })).slot, 1)
  })
})

describe("powerOfTwoChoices", () => {
  it.prop(
    "never picks the worse one of two, nor the worst one of several",
    { history },
    ({ history }) =>
      replay(Strategy.powerOfTwoChoices, history, (answer, keys, { allowed }) => {
        const ranking = keys.filter(({ slot }) => allowed(slot)).sort((a, b) =>
          a.inFlight - b.inFlight || a.recent - b.recent || (a.lastUsed === b.lastUsed ? 0 : a.lastUsed - b.lastUsed)
        )
        const [last, nextToLast] = ranking.toReversed()
        const alike = last?.inFlight === nextToLast?.inFlight && last?.recent === nextToLast?.recent &&
          last?.lastUsed === nextToLast?.lastUsed
        if (nextToLast !== undefined && !alike) assert.notStrictEqual(answer, last?.slot)
      }),
    { fastCheck: { numRuns: 200 } }
  )

  it("loads equal keys evenly, excluded ones or not", () => {
    const index = indexOf(Strategy.powerOfTwoChoices, Array.from({ length: 40 }, (_, slot) => key(slot)))
    for (const excluded of [[], Array.from({ length: 33 }, (_, n) => n < 20 ? n : n + 3)]) {
      const numbers = uniform(7)
      const picks = Array.from({ length: 40 }, () => 0)
      const possible = 40 - excluded.length
      const rounds = 2000 * possible
      for (let n = 0; n < rounds; n++) {
        const { slot } = pickFrom(index, given({ excluded, random: numbers.next().value }))
        picks[slot] = (picks[slot] ?? 0) + 1
      }
      for (const [slot, times] of picks.entries()) {
        if (excluded.includes(slot)) assert.strictEqual(times, 0)
        // Five standard deviations.
        else assert.closeTo(times, 2000, 5 * Math.sqrt(2000))
      }
    }
  })

  it("draws two different keys, every pair equally often", () => {
    // With all loads different, of n keys the one with r better ones wins 2 (n - 1 - r) of n (n - 1) pairs.
    const loads = [3, 0, 5, 1, 9, 4, 2]
    const index = indexOf(Strategy.powerOfTwoChoices, loads.map((inFlight, slot) => key(slot, { inFlight })))
    for (const excluded of [[], [1, 4]]) {
      const numbers = uniform(11)
      const slots = Array.from(
        { length: 20_000 },
        () => pickFrom(index, given({ excluded, random: numbers.next().value })).slot
      )
      const ranking = [...loads.keys()].filter((slot) => !excluded.includes(slot))
        .sort((a, b) => (loads[a] ?? 0) - (loads[b] ?? 0))
      const n = ranking.length
      for (const [rank, slot] of ranking.entries()) {
        const share = 2 * (n - 1 - rank) / (n * (n - 1))
        assert.closeTo(count(slots, slot) / slots.length, share, 5 * Math.sqrt(share / slots.length))
      }
    }
  })

  it("uses every bit of the random number", () => {
    const index = indexOf(Strategy.powerOfTwoChoices, Array.from({ length: 10 }, (_, slot) => key(slot)))
    const spread = (numbers: ReadonlyArray<number>) =>
      new Set(numbers.map((random) => pickFrom(index, given({ random })).slot)).size
    assert.strictEqual(spread([...Array(200).keys()].map((n) => n / 200)), 10)
    assert.strictEqual(spread([...Array(200).keys()].map((n) => 0.5 + n * 2 ** -53)), 10)
  })

  it("the same random number gives the same key", () => {
    const index = indexOf(Strategy.powerOfTwoChoices, Array.from({ length: 100 }, (_, slot) => key(slot)))
    const run = (seed: number) => {
      const numbers = uniform(seed)
      return Array.from({ length: 200 }, () => pickFrom(index, given({ random: numbers.next().value })).slot)
    }
    assert.deepStrictEqual(run(1), run(1))
    assert.notDeepEqual(run(1), run(2))
  })
})

describe("custom", () => {
  it.prop("is offered the keys that the call may have, by slot, and decides", { history }, ({ history }) => {
    let offered: ReadonlyArray<Candidate> = []
    let context: Strategy.ChooseContext | undefined
    const strategy = Strategy.custom("last", (candidates, given) => {
      offered = candidates
      context = given
      return candidates.at(-1)
    })
    replay(strategy, history, (answer, keys, { allowed, random, rotation }) => {
      const may = keys.filter(({ slot }) => allowed(slot))
      assert.strictEqual(answer, may.at(-1)?.slot)
      if (may.length === 0) return
      assert.deepStrictEqual(offered, may)
      assert.deepStrictEqual(context, { now: 0, random, rotation })
    })
  })

  it("has its name, and draws a random number", () => {
    const strategy = Strategy.custom("mine", () => undefined)
    assert.strictEqual(strategy.name, "mine")
    assert.isTrue(strategy.randomised)
  })

  it("the first candidate serves when it chooses nothing, or something it was not offered", () => {
    const keys = [key(0), key(1), key(2)]
    const choices = [undefined, key(1), key(7), key(0, { id: "another" }), key(0.5, { id: "id-0" }), key(NaN)]
    for (const choice of choices) {
      const index = indexOf(Strategy.custom("wrong", () => choice), keys)
      assert.strictEqual(index.pick(given({ excluded: [1] }))?.slot, 0, JSON.stringify(choice))
      assert.isUndefined(index.pick(given({ excluded: [0, 1, 2] })))
    }
    const copy = indexOf(Strategy.custom("copy", () => key(1)), keys)
    assert.strictEqual(copy.pick(given())?.slot, 1)
  })

  it("cannot change what the pool holds", () => {
    const own = key(0)
    const index = indexOf(
      Strategy.custom("vandal", (candidates) => {
        const [first] = candidates
        assert(first !== undefined)
        assert.throws(() => Object.assign(first, { inFlight: 99 }))
        if (Array.isArray(candidates)) candidates.length = 0
        return first
      }),
      [own, key(1)]
    )
    for (let n = 0; n < 2; n++) assert.strictEqual(pickFrom(index).slot, 0)
    assert.strictEqual(index.size, 2)
    assert.strictEqual(own.inFlight, 0)
    assert.isFalse(Object.isFrozen(own))
  })

  it("the first candidate serves when it throws", () => {
    const index = indexOf(
      Strategy.custom("broken", () => {
        throw new Error("not total")
      }),
      [key(0), key(1)]
    )
    assert.strictEqual(index.pick(given({ excluded: [0] }))?.slot, 1)
  })
})

// ---------------------------------------------------------------------------------------------------------------------

describe("cheapest", () => {
  /** When each key had its turn last, by slot; whoever comes, or changes its tier, as the latest. */
  const model = (): Model => {
    const turns = new Map<number, { readonly id: string; readonly tier: number; readonly turn: number }>()
    let picks = 0
    return {
      changed: (keys) => {
        for (const slot of turns.keys()) if (!keys.some((key) => key.slot === slot)) turns.delete(slot)
        for (const { id, key: { costTier: tier }, slot } of keys) {
          const known = turns.get(slot)
          if (known?.id !== id || known.tier !== tier) turns.set(slot, { id, tier, turn: picks })
        }
      },
      pick: (keys, { allowed }) => {
        const able = keys.filter(({ slot }) => allowed(slot))
        const tier = Math.min(...able.map(({ key }) => key.costTier))
        const turnOf = (slot: number) => turns.get(slot)?.turn ?? 0
        const [first] = able.filter(({ key }) => key.costTier === tier)
          .sort((a, b) => turnOf(a.slot) - turnOf(b.slot) || a.slot - b.slot)
        const known = first === undefined ? undefined : turns.get(first.slot)
        if (first !== undefined && known !== undefined) turns.set(first.slot, { ...known, turn: ++picks })
        return first?.slot
      }
    }
  }

  it.prop("agrees with a walk over all keys", [history], ([steps]) => agrees(Strategy.cheapest, model(), steps))

  it("K4: dearer keys serve only while no cheaper one can", () => {
    const index = indexOf(Strategy.cheapest, [0, 1, 2, 3].map((slot) => key(slot, { key: ofTier(slot < 2 ? 3 : 1) })))
    assert.deepStrictEqual(series(index, 4).slots, [2, 3, 2, 3])
    assert.deepStrictEqual(series(index, 4, given({ excluded: [2, 3] })).slots, [0, 1, 0, 1])
  })

  it("a key that comes back waits its turn: it does not catch up", () => {
    const { index } = series(indexOf(Strategy.cheapest, [key(0), key(1)]).remove(0), 10)
    assert.strictEqual(count(series(index.insert(key(0)), 10).slots, 0), 5)
  })
})

describe("headroom", () => {
  const lefts = FastCheck.array(FastCheck.constantFrom(0, 0.25, 0.5, 0.75, 1), { minLength: 6, maxLength: 6 })
  type Look = { readonly lefts: ReadonlyArray<number>; readonly step: Step }

  /** Among the allowed: the most left, then the least used of late. */
  const model = (keys: ReadonlyArray<Candidate>, allowed: (slot: number) => boolean, left: (slot: number) => number) =>
    keys.filter(({ slot }) => allowed(slot)).sort((a, b) =>
      left(b.slot) - left(a.slot) || a.recent - b.recent ||
      (a.lastUsed === b.lastUsed ? a.slot - b.slot : a.lastUsed < b.lastUsed ? -1 : 1)
    )[0]?.slot

  const follow = (looks: ReadonlyArray<Look>, slots: number, leftAt: (now: number, slot: number) => number) => {
    let index = Strategy.headroom.empty
    const keys = new Map<number, Candidate>()
    for (const [now, { step }] of looks.entries()) {
      if (step.kind === "remove") {
        keys.delete(step.slot % slots)
        index = index.remove(step.slot % slots)
      } else if (step.kind === "pick") {
        const left = (slot: number) => leftAt(now, slot)
        const picked = index.pick({ ...given({ excluded: step.excluded }), left })
        const allowed = (slot: number) => !step.excluded.includes(slot)
        assert.strictEqual(picked?.slot, model([...keys.values()], allowed, left))
        index = picked?.index ?? index
      } else {
        const candidate = { ...step.candidate, slot: step.candidate.slot % slots }
        if (step.kind === "insert" || keys.has(candidate.slot)) keys.set(candidate.slot, candidate)
        index = index[step.kind](candidate)
      }
    }
  }
  const looks = FastCheck.array(FastCheck.record({ lefts, step }), { maxLength: 80, size: "max" })

  it.prop("A5: of 4 keys it is always the one with the most left, however that changes; ties by recent use", [looks], ([
    looks
  ]) => follow(looks, 4, (now, slot) => looks[now]?.lefts[slot] ?? 1))

  it.prop(
    "A5: of more keys too, while nothing comes back",
    [looks, lefts],
    ([looks, lefts]) => follow(looks, 12, (now, slot) => Math.max(0, 1 - now * (lefts[slot % 6] ?? 0) / 40))
  )

  it("A5: what comes back is seen after a quarter as many picks as there are keys", () => {
    const spent = indexOf(Strategy.headroom, Array.from({ length: 40 }, (_, slot) => key(slot)))
    const { index } = series(spent, 40, { ...given(), left: (slot) => 0.1 + slot / 1_000 })
    for (const back of [0, 7, 39]) {
      const left = (slot: number) => slot === back ? 1 : 0.1
      const { slots } = series(index, 10, { ...given(), left })
      assert.strictEqual(slots.at(-1), back)
    }
  })

  it("A5: a pick looks at few keys, however many there are", () => {
    const many = indexOf(Strategy.headroom, Array.from({ length: 10_000 }, (_, slot) => key(slot)))
    let asked = 0
    pickFrom(many, { ...given(), left: () => 1 / ++asked })
    assert.isAtMost(asked, 12)
  })
})

describe("leastLatency", () => {
  const slots = 5
  type Move =
    | { readonly kind: "join" | "gate" | "open" | "start"; readonly slot: number; readonly after: number }
    | { readonly kind: "pick"; readonly excluded: ReadonlyArray<number>; readonly after: number }
    | {
      readonly kind: "end"
      readonly slot: number
      readonly after: number
      readonly millis: number | undefined
      readonly answered: boolean
      readonly of: string
    }
  const after = FastCheck.constantFrom(0, 0, 10, 300, 2_000, 25_000)
  const which = FastCheck.nat(slots - 1)
  const move: FastCheck.Arbitrary<Move> = FastCheck.oneof(
    {
      weight: 2,
      arbitrary: FastCheck.record({
        kind: FastCheck.constantFrom("join" as const, "gate" as const, "open" as const),
        slot: which,
        after
      })
    },
    { weight: 4, arbitrary: FastCheck.record({ kind: FastCheck.constant("start" as const), slot: which, after }) },
    {
      weight: 4,
      arbitrary: FastCheck.record({
        kind: FastCheck.constant("end" as const),
        slot: which,
        after,
        millis: FastCheck.option(FastCheck.constantFrom(0, 50, 100, 900, 8_000), { nil: undefined }),
        answered: FastCheck.boolean(),
        of: FastCheck.constantFrom("small", "large")
      })
    },
    {
      weight: 4,
      arbitrary: FastCheck.record({
        kind: FastCheck.constant("pick" as const),
        excluded: FastCheck.array(which, { maxLength: 2 }),
        after
      })
    }
  )
  const moves = FastCheck.array(move, { maxLength: 100, size: "max" })

  interface Known {
    id: string
    open: boolean
    inFlight: number
    lastUsed: number
    cost: number | undefined
    at: number
  }

  it.prop("A5: agrees with a walk over all keys", [moves], ([moves]) => {
    let index = Strategy.leastLatency.empty
    let now = 0
    let joined = 0
    const keys = new Map<number, Known>()
    const usual = new Map<string, number>()
    const decay = (millis: number) => 2 ** (-millis / 10_000)
    const cost = ({ at, cost, inFlight }: Known) => inFlight > 0 ? cost ?? 0 : (cost ?? 0) * decay(now - at)
    const told = (slot: number, { id, inFlight, lastUsed }: Known) => key(slot, { id, inFlight, lastUsed })
    for (const move of moves) {
      now += move.after
      if (move.kind === "pick") {
        const allowed = [...keys].filter(([slot, { open }]) => open && !move.excluded.includes(slot))
        const known = allowed.filter(([, key]) => key.cost !== undefined)
        const untold = allowed.filter(([, key]) => key.cost === undefined)
        const picked = index.pick(given({ excluded: move.excluded, now }))
        const chosen = picked === undefined ? undefined : keys.get(picked.slot)
        assert.strictEqual(picked === undefined, allowed.length === 0)
        index = picked?.index ?? index
        if (chosen === undefined || picked === undefined) continue
        assert.include(allowed.map(([slot]) => slot), picked.slot)
        const fewest = Math.min(...untold.map(([, key]) => key.inFlight))
        const first = untold.filter(([, key]) => key.inFlight === fewest)
          .sort(([i, a], [j, b]) => a.lastUsed === b.lastUsed ? i - j : a.lastUsed < b.lastUsed ? -1 : 1)[0]
        if (known.length === 0 || first?.[1].lastUsed === -Infinity) {
          assert.strictEqual(picked.slot, first?.[0])
          continue
        }
        const load = (key: Known) => cost(key) * (key.inFlight + 1)
        const least = Math.min(...known.map(([, key]) => load(key)))
        if (chosen.cost !== undefined) assert.isAtMost(load(chosen), least * (1 + 1e-9))
        // One that has not answered yet counts as good as the best that is idle or the least loaded one.
        if (first !== undefined) {
          const winners = [
            known.filter(([, key]) => key.inFlight === 0).sort(([, a], [, b]) => load(a) - load(b))[0],
            known.filter(([, key]) => key.inFlight > 0).sort(([, a], [, b]) => load(a) - load(b))[0]
          ].flatMap((entry) => entry === undefined ? [] : [cost(entry[1])])
          const asBest = (first[1].inFlight + 1) * Math.min(...winners)
          if (chosen.cost === undefined) assert.isAtMost(asBest, least * (1 + 1e-9))
          else if (winners.length === 1) assert.isAtLeast(asBest, least * (1 - 1e-9))
        }
        continue
      }
      const known = keys.get(move.slot)
      if (move.kind === "join") {
        const fresh: Known = {
          id: `id-${++joined}`,
          open: true,
          inFlight: 0,
          lastUsed: -Infinity,
          cost: undefined,
          at: -Infinity
        }
        if (known?.open === true) index = index.remove(move.slot)
        keys.set(move.slot, fresh)
        index = index.insert(told(move.slot, fresh))
      } else if (known === undefined) continue
      else if (move.kind === "gate") {
        known.open = false
        index = index.remove(move.slot)
      } else if (move.kind === "open") {
        known.open = true
        index = index.insert(told(move.slot, known))
      } else if (move.kind === "start") {
        if (!known.open) continue
        if (known.inFlight === 0 && known.cost !== undefined) {
          known.cost = cost(known)
          known.at = now
        }
        known.inFlight++
        known.lastUsed = now
        index = index.update(told(move.slot, known))
      } else if (move.kind === "end" && known.inFlight > 0 && known.open) {
        const { answered, millis, of } = move
        const before = usual.get(of)
        const took = millis === undefined || (before === undefined && !answered)
          ? undefined
          : millis / (before ?? Math.max(1, millis))
        if (took !== undefined) {
          if (answered) {
            known.cost = known.cost === undefined || took >= known.cost
              ? took
              : took + (known.cost - took) * decay(now - known.at)
          } else if (known.cost !== undefined) known.cost = Math.max(known.cost, took)
          else if (took > 1) known.cost = took
        }
        known.at = now
        if (answered && millis !== undefined) {
          usual.set(of, Math.max(1, before === undefined ? millis : before + (millis - before) / 32))
        }
        const [observe, id] = [index.observe, known.id]
        assert(observe !== undefined)
        index = index.observe?.({ slot: move.slot, id, millis, answered, kind: of, now }) ?? index
        known.inFlight--
        index = index.update(told(move.slot, known))
      }
      assert.strictEqual(index.size, [...keys.values()].filter(({ open }) => open).length)
    }
  })

  /** A key that answers in so long, so often, one attempt after the other. */
  const answering = (index: Index, slot: number, millis: number, now: number): Index => {
    const busy = index.update(key(slot, { inFlight: 1, lastUsed: now - millis }))
    const seen = busy.observe?.({ slot, id: `id-${slot}`, millis, answered: true, kind: "any", now }) ?? busy
    return seen.update(key(slot, { lastUsed: now - millis }))
  }

  it("A5: a slow answer counts at once; a slow key is tried again when it has been idle for long", () => {
    let index = indexOf(Strategy.leastLatency, [key(0), key(1)])
    index = answering(answering(index, 0, 100, 1_000), 1, 100, 1_001)
    index = answering(index, 0, 1_000, 3_000)
    let tried = 0
    for (let now = 3_000; now < 100_000; now += 1_000) {
      const { slot } = pickFrom(index, given({ now }))
      if (slot === 0) {
        tried = now
        break
      }
      index = answering(index, 1, 100, now + 100)
    }
    // Ten times as slow: some 3 half-lives.
    assert.isTrue(tried > 33_000 && tried < 42_000, String(tried))
  })

  it("A5: one slow answer counts in full: the quick key gets ten times as many at once", () => {
    let index = indexOf(Strategy.leastLatency, [key(0), key(1)])
    for (let now = 1_000; now < 3_000; now += 100) index = answering(answering(index, 0, 100, now), 1, 100, now)
    index = answering(index, 0, 1_000, 3_000)
    const inFlight = [0, 0]
    for (let slot = 1; slot === 1; slot = pickFrom(index, given({ now: 3_000 })).slot) {
      inFlight[slot] = (inFlight[slot] ?? 0) + 1
      index = index.update(key(slot, { inFlight: inFlight[slot] ?? 0, lastUsed: 3_000 }))
    }
    assert.isTrue((inFlight[1] ?? 0) >= 9 && (inFlight[1] ?? 0) <= 11, String(inFlight))
  })

  it("A5: attempts in flight count, so that a key that is twice as quick gets twice as many", () => {
    let index = indexOf(Strategy.leastLatency, [key(0), key(1)])
    index = answering(answering(index, 0, 100, 1_000), 1, 200, 1_000)
    const inFlight = [0, 0]
    for (let n = 0; n < 30; n++) {
      const { slot } = pickFrom(index, given({ now: 1_000 }))
      inFlight[slot] = (inFlight[slot] ?? 0) + 1
      index = index.update(key(slot, { inFlight: inFlight[slot] ?? 0, lastUsed: 1_000 }))
    }
    assert.deepStrictEqual(inFlight, [20, 10])
  })

  it("A5: a newcomer is asked once, and gets no more than its share until it has answered", () => {
    let index = indexOf(Strategy.leastLatency, [key(0), key(1)])
    for (const slot of [0, 1]) index = answering(index, slot, 100, 1_000)
    index = index.insert(key(2))
    const inFlight = [0, 0, 0]
    for (let n = 0; n < 30; n++) {
      const { slot } = pickFrom(index, given({ now: 1_000 }))
      if (n === 0) assert.strictEqual(slot, 2)
      inFlight[slot] = (inFlight[slot] ?? 0) + 1
      index = index.update(key(slot, { inFlight: inFlight[slot] ?? 0, lastUsed: 1_000 + n }))
    }
    for (const count of inFlight) assert.isTrue(count >= 9 && count <= 11, String(inFlight))
  })

  it("A5: a key that is asked for what takes long is not slow for that", () => {
    let index = indexOf(Strategy.leastLatency, [key(0), key(1)])
    const seen = (slot: number, kind: string, millis: number, now: number) => {
      index = index.observe?.({ slot, id: `id-${slot}`, millis, answered: true, kind, now }) ?? index
    }
    for (let now = 0; now < 100; now++) {
      seen(0, "long", 20_000, now)
      seen(1, "short", 200, now)
    }
    seen(1, "short", 300, 100)
    assert.strictEqual(pickFrom(index, given({ now: 100 })).slot, 0)
  })

  it("A5: an attempt that was not answered is taken to last at least as long as it did; one that failed at once is not quick", () => {
    let index = indexOf(Strategy.leastLatency, [key(0), key(1)])
    for (const slot of [0, 1]) index = answering(index, slot, 100, 1_000)
    const ended = (slot: number, millis: number) => {
      const next = index.observe?.({ slot, id: `id-${slot}`, millis, answered: false, kind: "any", now: 1_000 })
      return pickFrom(next ?? index, given({ now: 1_000 })).slot
    }
    assert.deepStrictEqual([ended(0, 30_000), ended(1, 30_000)], [1, 0])
    assert.strictEqual(ended(0, 1), ended(1, 1))
  })
})
