import { assert, describe, it } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as FastCheck from "effect/FastCheck"
import * as FiberId from "effect/FiberId"
import * as HashMap from "effect/HashMap"
import * as Affinity from "../src/Affinity.js"
import * as Homes from "../src/Homes.js"
import * as Leasing from "../src/Leasing.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolKeys from "../src/PoolKeys.js"
import * as PoolState from "../src/PoolState.js"
import * as Settling from "../src/Settling.js"
import * as WaitingLine from "../src/WaitingLine.js"
import { baseConfig, makeKey } from "./support/pool-model.js"

const day = 24 * 3_600_000

const keyOf = (n: number, group?: string) => makeKey(n, { group, concurrency: undefined, models: undefined })

describe("the book", () => {
  it("H4: keeps the most recent names and who holds them, and agrees with a slow account of it", () => {
    const names = ["a", "b", "c", "d", "e", "f", "g"]
    const uses = FastCheck.array(
      FastCheck.record({
        name: FastCheck.constantFrom(...names),
        holder: FastCheck.constantFrom("x", "y"),
        wait: FastCheck.constantFrom(0, 1, Affinity.limits.oneUseMillis, 20 * day),
        forget: FastCheck.integer({ min: 0, max: 7 }).map((n) => n === 0)
      }),
      { maxLength: 40 }
    )
    FastCheck.assert(FastCheck.property(uses, (uses) => {
      let book = Affinity.emptyBook
      let slow: ReadonlyArray<{ readonly name: string; readonly holder: string; readonly at: number }> = []
      let now = 0
      for (const { forget, holder, name, wait } of uses) {
        now += wait
        const before = slow.find((entry) => entry.name === name)
        const others = slow.filter((entry) => entry.name !== name)
        if (forget) {
          book = Affinity.forget(book, [name])
          slow = others
        } else {
          book = Affinity.remember(book, [name], holder, now, 4)
          if (before?.holder !== holder || now >= before.at + Affinity.limits.oneUseMillis) {
            slow = [...others, { name, holder, at: now }].slice(-4)
          }
        }
        assert.isAtMost(Affinity.size(book), 4)
        for (const name of names) {
          const known = slow.find((entry) => entry.name === name && now < entry.at + 30 * day)
          assert.strictEqual(Affinity.holderOf(book, name, now), known?.holder)
        }
      }
    }))
  })

  it("H4: forgets after 30 days without use, and makes room for 100,000", () => {
    const book = Affinity.remember(Affinity.emptyBook, ["old"], "x", 0)
    assert.strictEqual(Affinity.holderOf(book, "old", 30 * day - 1), "x")
    assert.isUndefined(Affinity.holderOf(book, "old", 30 * day))
    // What is over makes room by and by, also where there is room.
    assert.strictEqual(Affinity.size(Affinity.remember(book, ["new"], "x", 31 * day)), 1)
    assert.deepStrictEqual([Affinity.limits.names, Affinity.limits.millis], [100_000, 30 * day])
  })

  it("P1: counts only the changes of who holds what, so that mere uses are not kept anew", () => {
    const once = Affinity.remember(Affinity.emptyBook, ["a"], "x", 0)
    const again = Affinity.remember(once, ["a"], "x", day)
    assert.strictEqual(again.changes, once.changes)
    assert.notStrictEqual(again, once)
    assert.notStrictEqual(Affinity.remember(again, ["a"], "y", day).changes, again.changes)
    assert.notStrictEqual(Affinity.forget(again, ["a"]).changes, again.changes)
    assert.strictEqual(Affinity.forget(again, ["b"]), again)
  })

  it("H4: a name of any length is kept short, and told apart", () => {
    const long = "conversation ".repeat(1_000)
    assert.strictEqual(Affinity.nameOf("short"), "short")
    assert.isBelow(Affinity.nameOf(long).length, 230)
    assert.notStrictEqual(Affinity.nameOf(`${long}1`), Affinity.nameOf(`${long}2`))
  })
})

describe("placement", () => {
  const names = Array.from({ length: 4_000 }, (_, i) => `conversation-${i}`)
  const bestOf = (weights: Readonly<Record<string, number>>) => (name: string): string => {
    const scored = Object.entries(weights).map(([id, weight]) => [Affinity.score(name, id, weight), id] as const)
    return scored.reduce((best, other) => other[0] > best[0] ? other : best)[1]
  }

  it("H4: names spread over the keys by their weights", () => {
    const best = bestOf({ "key-1": 1, "key-2": 1, "key-3": 2 })
    const count = (id: string) => names.filter((name) => best(name) === id).length / names.length
    assert.approximately(count("key-1"), 0.25, 0.04)
    assert.approximately(count("key-2"), 0.25, 0.04)
    assert.approximately(count("key-3"), 0.5, 0.04)
  })

  it("H4: a key that leaves moves its own names only", () => {
    const before = bestOf({ "key-1": 1, "key-2": 1, "key-3": 1 })
    const after = bestOf({ "key-1": 1, "key-3": 1 })
    for (const name of names) if (before(name) !== "key-2") assert.strictEqual(after(name), before(name))
    const moved = names.filter((name) => before(name) === "key-2")
    assert.approximately(moved.filter((name) => after(name) === "key-1").length / moved.length, 0.5, 0.08)
  })
})

describe("seats", () => {
  const stateOf = (count: number) => PoolKeys.make(baseConfig, Array.from({ length: count }, (_, i) => keyOf(i)), 0)
  const lease = (state: PoolState.PoolState, conversation: string, now: number) =>
    Leasing.lease(baseConfig, state, {
      call: 0,
      model: undefined,
      avoid: [],
      only: undefined,
      affinity: { conversation, resources: [] },
      rotation: false,
      random: 0
    }, now)

  it("H4: no key gets a conversation's call beyond 1.25 times the mean in flight, nor is any refused below 2", () => {
    const steps = FastCheck.array(
      FastCheck.oneof(
        { weight: 3, arbitrary: FastCheck.record({ name: FastCheck.constantFrom("a", "b", "c", "d") }) },
        { weight: 2, arbitrary: FastCheck.record({ end: FastCheck.nat(30) }) }
      ),
      { maxLength: 120 }
    )
    FastCheck.assert(FastCheck.property(FastCheck.integer({ min: 1, max: 6 }), steps, (count, steps) => {
      let state = stateOf(count)
      let open: ReadonlyArray<PoolState.LeaseRecord> = []
      const homes = new Map<string, string>()
      for (const [now, step] of steps.entries()) {
        if ("name" in step) {
          const keys = PoolState.keys(state)
          const mean = keys.reduce((sum, key) => sum + key.inFlight, 0) / keys.length
          const bound = Math.max(2, Math.ceil(1.25 * mean))
          const home = keys.find(({ id }) => id === homes.get(step.name))
          const { lease: given, state: next } = lease(state, step.name, now)
          assert.isDefined(given)
          if (given === undefined) return
          const before = keys.find(({ id }) => id === given.key.id)
          assert.isBelow(before?.inFlight ?? Infinity, bound)
          if (home !== undefined && home.inFlight < bound) assert.strictEqual(given.key.id, home.id)
          state = next
          open = [...open, given]
        } else {
          const given = open[step.end % Math.max(1, open.length)]
          if (given === undefined) continue
          state = Settling.settle(baseConfig, state, given, Outcome.success, true, now, 0).state
          open = open.filter((other) => other !== given)
          const name = given.affinity?.conversation
          if (name !== undefined && !homes.has(name)) homes.set(name, given.key.id)
        }
        const inFlight = PoolState.keys(state).reduce((sum, key) => sum + key.inFlight, 0)
        assert.strictEqual(state.load, inFlight)
        // A busy key's guests do not move the conversation.
        for (const [name, home] of homes) {
          assert.strictEqual(Affinity.holderOf(state.rest.affinity.conversations, name, now), home)
        }
      }
    }))
  })

  it("H4: a late success on a key that the conversation has left does not bring it back", () => {
    const key = (state: PoolState.PoolState) => PoolState.keys(state).map(({ key }) => key)
    const state = stateOf(2)
    const [first, second] = key(state)
    if (first === undefined || second === undefined) return assert.fail("two keys")
    const bond = { conversation: "c", resources: [], from: undefined }
    const moved = Homes.follow(Homes.follow(state, bond, first, 0), { ...bond, from: first.id }, second, 1)
    assert.strictEqual(Affinity.holderOf(moved.rest.affinity.conversations, "c", 1), second.id)
    const late = Homes.follow(moved, { ...bond, from: undefined }, first, 2)
    assert.strictEqual(Affinity.holderOf(late.rest.affinity.conversations, "c", 2), second.id)
  })

  it("C2, H4: all who want the same keys wait in one lane, which is looked at once for all of them", () => {
    const keys = [makeKey(0, { group: undefined, concurrency: 1, models: undefined }), keyOf(1)]
    const config = { ...baseConfig, maxWaiters: 1_000 }
    const own = keys[0]?.id ?? ""
    const known = Homes.learn(PoolKeys.make(config, keys, 0), ["file-1", "file-2"], own, 0)
    const busy = lease(known, "c", 0)
    const homed = Homes.follow(
      PoolKeys.updateKey(config, busy.state, own, (key) => ({ ...key, inFlight: 1 }), 0)?.state ?? busy.state,
      { conversation: "c", resources: [], from: undefined },
      keys[0] ?? keyOf(0),
      0
    )
    let state = homed
    for (let i = 0; i < 300; i++) {
      const resources = [i % 2 === 0 ? "file-1" : "file-2"]
      const conversation = i % 3 === 0 ? "c" : undefined
      const request: PoolState.Request = {
        call: 0,
        model: undefined,
        avoid: [],
        only: undefined,
        ...Homes.within(state, resources, 0),
        affinity: { conversation, resources },
        rotation: false,
        random: 0
      }
      const wanted = { ...request, ...Homes.awaited(config, state, request, 0) }
      const answer = Deferred.unsafeMake<PoolState.LeaseRecord | undefined>(FiberId.none)
      const acquired = WaitingLine.acquire(config, state, wanted, { until: 2_000, answer }, 0)
      assert.isTrue(typeof acquired.outcome === "object", String(acquired.outcome))
      state = acquired.state
    }
    assert.strictEqual(state.rest.waiting, 300)
    assert.strictEqual(HashMap.size(state.rest.lanes), 2)
  })

  it("H4: the owner of a resource is its group, as long as the pool has a key of it", () => {
    const keys = [keyOf(0, "org"), keyOf(1, "org"), keyOf(2)]
    let state = Homes.learn(PoolKeys.make(baseConfig, keys, 0), ["file-1"], "org", 0)
    const alone = keys[2]?.id ?? ""
    state = Homes.learn(state, ["file-2"], alone, 0)
    assert.strictEqual(Homes.groupWith(state, ["unknown", "file-1", "file-2"], 1), "org")
    assert.strictEqual(Homes.groupWith(state, ["file-2"], 1), alone)
    assert.isUndefined(Homes.groupWith(Homes.learn(state, ["file-3"], "gone", 0), ["file-3"], 1))
    const retire = (id: string | undefined) => {
      state =
        PoolKeys.updateKey(baseConfig, state, id ?? "", (key) => ({ ...key, retiring: true, inFlight: 1 }), 1)?.state ??
          state
    }
    retire(keys[0]?.id)
    assert.strictEqual(Homes.groupWith(state, ["file-1"], 1), "org")
    retire(keys[1]?.id)
    assert.isUndefined(Homes.groupWith(state, ["file-1"], 1))
    assert.isUndefined(Homes.groupWith(Homes.unlearn(state, ["file-2"]), ["file-2"], 1))
  })
})
