import { assert, describe, it } from "@effect/vitest"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Schema from "effect/Schema"
import * as Affinity from "../src/Affinity.js"
import type * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as Homes from "../src/Homes.js"
import * as Leasing from "../src/Leasing.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolKeys from "../src/PoolKeys.js"
import * as PoolRecord from "../src/PoolRecord.js"
import * as PoolSettings from "../src/PoolSettings.js"
import * as PoolState from "../src/PoolState.js"
import * as Settling from "../src/Settling.js"

const inputs: ReadonlyArray<ApiKey.Input> = [
  { secret: "sk-one", label: "one", quotaGroup: "org" },
  { secret: "sk-two", label: "two", quotaGroup: "org" },
  { secret: "sk-three", label: "three" },
  { secret: "sk-four", label: "four" }
]

const resolvedOf = (keys: ReadonlyArray<ApiKey.Input>, more: Partial<PoolSettings.Settings> = {}) =>
  Either.getOrThrow(PoolSettings.resolve({ keys, ...more }))
const { config, keys } = resolvedOf(inputs)
const fresh = PoolKeys.make(config, keys, 0)
const models = ["small", "large"]

/** One attempt with whatever key may serve: what it was told of, and when. */
interface Attempt {
  readonly model: string | undefined
  readonly outcome: Outcome.Outcome
  readonly after: number
}

const attempt = (state: PoolState.PoolState, { model, outcome }: Attempt, now: number): PoolState.PoolState => {
  const request = { call: 0, model, avoid: [], only: undefined, rotation: false, random: 0 }
  const leased = Leasing.lease(config, state, request, now)
  return leased.lease === undefined
    ? leased.state
    : Settling.settle(config, leased.state, leased.lease, outcome, true, now, 0.5).state
}

const lived = (attempts: ReadonlyArray<Attempt>, start = 0) =>
  attempts.reduce(
    ({ now, state }, next) => ({ now: now + next.after, state: attempt(state, next, now + next.after) }),
    { now: start, state: fresh }
  )

const outcomes: FastCheck.Arbitrary<Outcome.Outcome> = FastCheck.oneof(
  FastCheck.constant(Outcome.success),
  FastCheck.constant(Outcome.ignored),
  FastCheck.record({
    kind: FastCheck.constantFrom(...Fault.Kind.literals),
    details: FastCheck.record({
      scope: FastCheck.constantFrom(undefined, "key" as const, "group" as const),
      perModel: FastCheck.boolean(),
      wait: FastCheck.option(FastCheck.nat({ max: 600_000 }), { nil: undefined }),
      explicit: FastCheck.boolean()
    })
  }).map(({ details, kind }) => Outcome.fault(Fault.make(kind, details)))
)
const attempts = FastCheck.array(
  FastCheck.record({
    model: FastCheck.constantFrom(undefined, ...models),
    outcome: outcomes,
    after: FastCheck.nat({ max: 20_000 })
  }),
  { maxLength: 40 }
)

/** Through JSON, as a store keeps it. */
const kept = (record: PoolRecord.StoredPool): PoolRecord.StoredPool =>
  Schema.decodeUnknownSync(PoolRecord.StoredPool)(
    JSON.parse(JSON.stringify(Schema.encodeSync(PoolRecord.StoredPool)(record)))
  )

const counters = (state: PoolState.PoolState) =>
  PoolState.keys(state).map(({ enabled, faults, id, ignored, successes, total }) => ({
    id,
    enabled,
    total,
    successes,
    faults,
    ignored
  }))

/** How long each key stays away, for each model: 0 when it may serve; undefined when no instant is known. */
const waits = (state: PoolState.PoolState, now: number) =>
  PoolState.keys(state).flatMap((key) =>
    [undefined, ...models].map((model) => {
      const gate = PoolState.requestGate(config, state, key, model, now)
      // An undecided trial or a ramp is of this process alone.
      return gate === undefined || gate.gate === "probing" || gate.gate === "ramp" ? 0 : gate.until - now
    })
  )

const maybeServes = (state: PoolState.PoolState, model: string | undefined, now: number) =>
  Leasing.lease(
    config,
    state,
    { call: 0, model, avoid: [], only: undefined, rotation: false, random: 0 },
    now
  ).lease !== undefined

const about = (a: number, b: number) => Math.abs(a - b) < 1e-3

describe("P1", () => {
  it.prop(
    "P1: what was kept comes back: counters, breakers, and the cooldowns of keys, groups and models",
    [attempts, FastCheck.nat({ max: 2_000_000_000 })],
    ([history, wallOffset]) => {
      const { now, state } = lived(history)
      const record = kept(PoolRecord.fromState(state, now, wallOffset))
      const back = PoolRecord.restore(config, fresh, record, now, wallOffset)
      assert.deepStrictEqual(counters(back), counters(state))
      const expected = waits(state, now)
      waits(back, now).forEach((wait, i) => assert.isTrue(about(wait, expected[i] ?? Number.NaN), `${i}: ${wait}`))
      PoolState.keys(back).forEach((key, i) => {
        const before = PoolState.keys(state)[i]?.breaker
        assert.strictEqual(key.breaker.trips, before?.trips)
        assert.strictEqual(key.breaker._tag === "Closed", before?._tag === "Closed")
        if (key.breaker._tag === "Closed" && before?._tag === "Closed") {
          assert.strictEqual(key.breaker.failures, before.failures)
        }
        assert.strictEqual(key.inFlight, 0)
      })
    }
  )

  it.prop(
    "P1: keeping it once more keeps the same",
    [attempts],
    ([history]) => {
      const { now, state } = lived(history)
      const once = PoolRecord.fromState(state, now, 0)
      const twice = PoolRecord.fromState(PoolRecord.restore(config, fresh, kept(once), now, 0), now, 0)
      const benches = (record: PoolRecord.StoredPool) =>
        [
          ...record.keys.map(({ bench, breaker, id }) => [id, bench?.kind, bench?.step, breaker._tag, breaker.trips]),
          ...record.groups.map(({ bench, group }) => [group, bench.kind, bench.step]),
          ...record.models.map(({ bench, model, of }) => [model, of, bench.kind, bench.step])
        ].map((entry) => entry.join(" "))
      assert.includeMembers(benches(once), benches(twice))
      assert.deepStrictEqual(benches(twice).slice(0, keys.length), benches(once).slice(0, keys.length))
      assert.strictEqual(twice.groups.length, once.groups.length)
    }
  )

  it.prop(
    "P1: a remaining wait is never longer than the original, however the wall clock moved",
    [attempts, FastCheck.integer({ min: -1e12, max: 1e12 }), FastCheck.nat({ max: 1e9 })],
    ([history, moved, later]) => {
      const { now, state } = lived(history)
      const wallOffset = 1_700_000_000_000
      const record = kept(PoolRecord.fromState(state, now, wallOffset))
      const at = later
      const back = PoolRecord.restore(config, fresh, record, at, wallOffset + moved)
      const longest = (id: string): number =>
        Math.max(
          0,
          ...record.keys.filter((key) => key.id === id).flatMap(({ bench, breaker }) => [
            bench?.waitMillis ?? 0,
            breaker._tag === "Open" ? breaker.waitMillis : 0
          ]),
          ...record.groups.map(({ bench }) => bench.waitMillis),
          ...record.models.map(({ bench }) => bench.waitMillis)
        )
      for (const key of PoolState.keys(back)) {
        for (const model of [undefined, ...models]) {
          const gate = PoolState.requestGate(config, back, key, model, at)
          if (gate !== undefined) assert.isAtMost(gate.until - at, longest(key.id) + 1e-3)
        }
      }
    }
  )

  it("P1: the wall clock of the store counts: time that passed meanwhile has passed", () => {
    const { state } = lived([{
      model: undefined,
      outcome: Outcome.fault(Fault.make("RateLimited", { scope: "key", wait: "1 minute" })),
      after: 0
    }])
    const record = kept(PoolRecord.fromState(state, 0, 1_000_000))
    const [key] = PoolState.keys(state).filter((key) => key.bench !== undefined)
    const waitOf = (now: number, wallOffset: number) => {
      const back = PoolRecord.restore(config, fresh, record, now, wallOffset)
      const restored = PoolState.keys(back).find(({ id }) => id === key?.id)
      const gate = restored === undefined ? undefined : PoolState.keyGate(config, back, restored, now)
      return gate === undefined ? 0 : gate.until - now
    }
    // Another process has another clock of its own; the wall clock went on by 20 s, stood still, went back, flew ahead.
    assert.strictEqual(waitOf(7, 1_020_000 - 7), 40_020)
    assert.strictEqual(waitOf(7, 1_000_000 - 7), 60_020)
    assert.strictEqual(waitOf(7, 0), 60_020)
    assert.strictEqual(waitOf(7, 9_000_000), 0)
  })

  it("F5, P1: what made a wait firm is kept: the floor breaks neither it, nor a guess in the moment it is restored", () => {
    const { config, keys } = resolvedOf(["sk-one"], { cooldowns: { rateLimited: { first: "60 seconds" }, jitter: 0 } })
    const empty = PoolKeys.make(config, keys, 0)
    const told = Outcome.fault(Fault.make("RateLimited", { scope: "key", wait: "30 seconds" }))
    const guessed = Outcome.fault(Fault.make("RateLimited", { scope: "key" }))
    const request = { call: 0, model: undefined, avoid: [], only: undefined, rotation: false, random: 0 }
    const first = Leasing.lease(config, empty, request, 0)
    const second = Leasing.lease(config, first.state, request, 0)
    assert(first.lease !== undefined && second.lease !== undefined)
    const one = Settling.settle(config, second.state, first.lease, told, true, 0, 0).state
    const both = Settling.settle(config, one, second.lease, guessed, true, 0, 0).state
    const back = PoolRecord.restore(config, empty, kept(PoolRecord.fromState(both, 10_000, 0)), 10_000, 0)
    assert.isUndefined(Leasing.lease(config, back, request, 20_000).lease, "told until 30.02 s")
    assert.isTrue(Leasing.lease(config, back, request, 30_020).lease?.floor)
    const guess = Settling.settle(config, first.state, first.lease, guessed, true, 0, 0).state
    const later = PoolRecord.restore(config, empty, kept(PoolRecord.fromState(guess, 10_000, 0)), 10_000, 0)
    assert.isUndefined(Leasing.lease(config, later, request, 10_000).lease)
    assert.isTrue(Leasing.lease(config, later, request, 11_000).lease?.floor)
  })

  it("P1: a key serves again when its wait is over, and not before", () => {
    const limited = Outcome.fault(Fault.make("RateLimited", { scope: "group", wait: 5_000 }))
    const { config, keys } = resolvedOf([{ secret: "sk-one", quotaGroup: "org" }], { floor: false })
    const empty = PoolKeys.make(config, keys, 0)
    const state = attempt(empty, { model: undefined, outcome: limited, after: 0 }, 0)
    const back = PoolRecord.restore(config, empty, kept(PoolRecord.fromState(state, 1_000, 0)), 1_000, 0)
    assert.isFalse(maybeServes(back, undefined, 5_019))
    assert.isTrue(maybeServes(back, undefined, 5_020))
  })

  it("P1: a cooldown for one model holds for that model only", () => {
    const state = lived([{
      model: "small",
      outcome: Outcome.fault(Fault.make("RateLimited", { scope: "group", perModel: true, wait: "1 minute" })),
      after: 0
    }]).state
    const record = kept(PoolRecord.fromState(state, 0, 0))
    assert.deepStrictEqual(record.models.map(({ model, of, scope }) => [model, scope, of]), [["small", "group", "org"]])
    const { config: own, keys: members } = resolvedOf(inputs.slice(0, 2), { floor: false })
    const back = PoolRecord.restore(own, PoolKeys.make(own, members, 0), record, 0, 0)
    const serves = (model: string) =>
      Leasing.lease(own, back, { call: 0, model, avoid: [], only: undefined, rotation: false, random: 0 }, 1)
        .lease !==
        undefined
    assert.deepStrictEqual([serves("small"), serves("large")], [false, true])
  })

  it("P1: a breaker that was isolated by hand stays so", () => {
    const [first] = PoolState.keys(fresh)
    const isolated = PoolKeys.updateKey(config, fresh, first?.id ?? "", (key) => ({
      ...key,
      breaker: { _tag: "Open", until: Infinity, openedAt: 0, generation: 1, trips: 1 }
    }), 0)?.state ?? fresh
    const back = PoolRecord.restore(config, fresh, kept(PoolRecord.fromState(isolated, 5, 0)), 1e9, 0)
    const [restored] = PoolState.keys(back)
    assert.strictEqual(restored?.breaker._tag === "Open" && restored.breaker.until, Infinity)
  })

  it("P1: a cooldown that never ends can be kept", () => {
    const endless = resolvedOf(["sk-one"], { cooldowns: { revoked: Infinity } })
    const empty = PoolKeys.make(endless.config, endless.keys, 0)
    const request = { call: 0, model: undefined, avoid: [], only: undefined, rotation: false, random: 0 }
    const leased = Leasing.lease(endless.config, empty, request, 0)
    const revoked = Outcome.fault(Fault.make("Unauthorized", { explicit: true }))
    const state = leased.lease === undefined
      ? leased.state
      : Settling.settle(endless.config, leased.state, leased.lease, revoked, true, 0, 0.5).state
    const back = PoolRecord.restore(endless.config, empty, kept(PoolRecord.fromState(state, 0, 0)), 1e12, 0)
    const [key] = PoolState.keys(back)
    const until = key === undefined ? 0 : PoolState.keyGate(endless.config, back, key, 1e12)?.until ?? 0
    assert.isAbove(until, 99 * 365 * 86_400_000, "a hundred years, so that it stays a number")
  })

  it("P1: keys that the pool no longer has are left out, new ones are fresh, and retiring ones are not kept", () => {
    const { now, state } = lived(Array.from({ length: 8 }, () => ({
      model: undefined,
      outcome: Outcome.success,
      after: 1
    })))
    const [first] = PoolState.keys(state)
    const busy = PoolKeys.updateKey(
      config,
      state,
      first?.id ?? "",
      (key) => ({ ...key, retiring: true, inFlight: 1 }),
      now
    )?.state ?? state
    assert.strictEqual(PoolRecord.fromState(busy, now, 0).keys.length, inputs.length - 1)
    const other = resolvedOf(["sk-two", "sk-new"].map((secret) => ({ secret })))
    const record = kept(PoolRecord.fromState(state, now, 0))
    const back = PoolRecord.restore(config, PoolKeys.make(other.config, other.keys, 0), record, now, 0)
    assert.deepStrictEqual(PoolState.keys(back).map((key) => key.successes), [2, 0])
  })

  it.prop("P1: a record of any content restores without a crash", [PoolRecord.StoredPool], ([record]) => {
    const ids = PoolState.keys(fresh).map((key) => key.id)
    const aimed: PoolRecord.StoredPool = {
      ...record,
      keys: record.keys.map((key, i) => ({ ...key, id: ids[i % ids.length] ?? key.id })),
      groups: record.groups.map((group) => ({ ...group, group: "org" }))
    }
    const back = PoolRecord.restore(config, fresh, aimed, 1_000, 0)
    assert.strictEqual(PoolState.keys(back).length, inputs.length)
    for (const key of PoolState.keys(back)) {
      const gate = PoolState.keyGate(config, back, key, 1_000)
      assert.isFalse(Number.isNaN(gate?.until ?? 0))
    }
  })

  it("K1: a record names keys by their ids", () => {
    const { now, state } = lived([{ model: "small", outcome: Outcome.success, after: 0 }])
    assert.notInclude(JSON.stringify(PoolRecord.fromState(state, now, 0)), "sk-")
  })
})

describe("stored resources", () => {
  const org = "org"
  const day = 24 * 3_600_000
  const knowing = Homes.learn(
    Homes.learn(fresh, ["file-1", "an id with spaces"], org, 5_000),
    ["file-2"],
    "other",
    9_000
  )
  const holderIn = (state: PoolState.PoolState, name: string, now: number) =>
    Affinity.holderOf(state.rest.affinity.resources, name, now)

  it("P1, H4: come back with their group and their last use, by the wall clock", () => {
    const record = PoolRecord.fromState(knowing, 10_000, 1_000_000)
    const encoded: unknown = JSON.parse(JSON.stringify(Schema.encodeSync(PoolRecord.StoredPool)(record)))
    const read = Schema.decodeUnknownSync(PoolRecord.StoredPool)(encoded)
    // A pool whose clock begins anew, an hour later.
    const back = PoolRecord.restore(config, fresh, read, 0, 1_010_000 + 3_600_000)
    for (const name of ["file-1", "an id with spaces"]) assert.strictEqual(holderIn(back, name, 0), org)
    assert.strictEqual(holderIn(back, "file-2", 0), "other")
    assert.isUndefined(holderIn(back, "file-3", 0))
    const over = 30 * day - 3_605_000
    assert.strictEqual(holderIn(back, "file-1", over - 1), org)
    assert.isUndefined(holderIn(back, "file-1", over))
    assert.strictEqual(holderIn(back, "file-2", over), "other")
  })

  it("P3: an older record has none, lines that make no sense are left out, and nothing is newer than now", () => {
    const { resources: _, ...older } = PoolRecord.fromState(knowing, 10_000, 0)
    const plain = PoolRecord.restore(config, fresh, Schema.decodeUnknownSync(PoolRecord.StoredPool)(older), 0, 0)
    assert.strictEqual(Affinity.size(plain.rest.affinity.resources), 0)
    assert.notProperty(PoolRecord.fromState(fresh, 0, 0), "resources")
    const odd = { ...older, resources: [{ group: org, names: "\nnothing\n 5\nfile-9 !\nfile-1 zzzzzz\nfile-2 0" }] }
    const now = 31 * day
    const back = PoolRecord.restore(config, fresh, Schema.decodeUnknownSync(PoolRecord.StoredPool)(odd), now, 0)
    assert.strictEqual(Affinity.size(back.rest.affinity.resources), 1)
    assert.strictEqual(holderIn(back, "file-1", now + 30 * day - 1), org)
    assert.isUndefined(holderIn(back, "file-1", now + 30 * day))
  })

  it("P1: a name that would break a line is not kept", () => {
    const state = Homes.learn(fresh, ["file-1", "file\n-2"], org, 0)
    const [kept] = PoolRecord.resourcesOf(state, 0, 0)
    assert.deepStrictEqual(kept, { group: org, names: "file-1 0" })
  })
})
