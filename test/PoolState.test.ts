import { assert, describe, it } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as FastCheck from "effect/FastCheck"
import * as FiberId from "effect/FiberId"
import * as HashMap from "effect/HashMap"
import type * as Cooldowns from "../src/Cooldowns.js"
import * as Fault from "../src/Fault.js"
import * as Leasing from "../src/Leasing.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolKeys from "../src/PoolKeys.js"
import * as PoolState from "../src/PoolState.js"
import * as Settling from "../src/Settling.js"
import * as Strategy from "../src/Strategy.js"
import * as WaitingLine from "../src/WaitingLine.js"
import { baseConfig, type Command, type KeySpec, makeKey, plain, type Setup, World } from "./support/pool-model.js"

// ---------------------------------------------------------------------------------------------------------------------
// Histories
// ---------------------------------------------------------------------------------------------------------------------

const setup: FastCheck.Arbitrary<Setup> = FastCheck.record({
  strategy: FastCheck.constantFrom(
    Strategy.roundRobin,
    Strategy.weighted,
    Strategy.leastUsed,
    Strategy.sequential,
    Strategy.powerOfTwoChoices,
    Strategy.custom("last", (candidates) => candidates[candidates.length - 1])
  ),
  keys: FastCheck.array(
    FastCheck.record({
      group: FastCheck.constantFrom(undefined, undefined, "a", "b"),
      concurrency: FastCheck.constantFrom(undefined, undefined, 1, 2),
      models: FastCheck.constantFrom(undefined, undefined, undefined, ["m1"], ["m1", "m2"])
    }),
    { minLength: 1, maxLength: 12 }
  ),
  joined: FastCheck.integer({ min: 1, max: 12 }),
  floor: FastCheck.boolean()
})

const model = FastCheck.constantFrom(undefined, undefined, "m1", "m2")
const nth = FastCheck.nat(11)
/** None; or what the call belongs to. */
const affinity = FastCheck.oneof(
  { weight: 3, arbitrary: FastCheck.constant(0) },
  { weight: 2, arbitrary: FastCheck.integer({ min: 1, max: 6 }) }
)
const random = FastCheck.constantFrom(0, 0.3, 0.7, 0.999)

const fault: FastCheck.Arbitrary<Fault.Fault> = FastCheck.record({
  kind: FastCheck.oneof(
    { weight: 3, arbitrary: FastCheck.constant("RateLimited" as const) },
    { weight: 3, arbitrary: FastCheck.constantFrom("ServerError" as const, "Network" as const) },
    { weight: 4, arbitrary: FastCheck.constantFrom(...Fault.Kind.literals) }
  ),
  scope: FastCheck.constantFrom(undefined, undefined, ...Fault.Scope.literals),
  perModel: FastCheck.boolean(),
  wait: FastCheck.constantFrom(undefined, undefined, 0, 1, 480, 2000, 7000),
  provenance: FastCheck.constantFrom(undefined, undefined, undefined, "measured" as const, "guessed" as const),
  reset: FastCheck.constantFrom(undefined, 5000),
  explicit: FastCheck.boolean(),
  failover: FastCheck.constantFrom(undefined, undefined, undefined, true, false)
}).map(({ kind, ...details }) => Fault.make(kind, details))

const outcome = FastCheck.oneof(
  { weight: 5, arbitrary: fault.map(Outcome.fault) },
  { weight: 4, arbitrary: FastCheck.constant(Outcome.success) },
  { weight: 1, arbitrary: FastCheck.constant(Outcome.ignored) }
)

const command: FastCheck.Arbitrary<Command> = FastCheck.oneof(
  {
    weight: 10,
    arbitrary: FastCheck.record({
      _tag: FastCheck.constant("lease" as const),
      model,
      avoid: FastCheck.oneof(FastCheck.constant([]), FastCheck.array(nth, { maxLength: 3 })),
      only: FastCheck.integer({ min: 0, max: 9 }).map((n) => n === 9),
      affinity,
      random
    })
  },
  {
    weight: 12,
    arbitrary: FastCheck.record({
      _tag: FastCheck.constant("settle" as const),
      nth,
      outcome,
      end: FastCheck.integer({ min: 0, max: 3 }).map((n) => n !== 3),
      random
    })
  },
  {
    weight: 6,
    arbitrary: FastCheck.record({
      _tag: FastCheck.constant("time" as const),
      millis: FastCheck.constantFrom(1, 20, 250, 499, 500, 1000, 1000, 2000, 3000, 3500, 8000, 60_000)
    })
  },
  {
    weight: 3,
    arbitrary: FastCheck.record({
      _tag: FastCheck.constantFrom(...(["add", "readd", "retire", "disable", "enable", "enable", "reset"] as const)),
      key: nth
    })
  },
  {
    weight: 5,
    arbitrary: FastCheck.record({
      _tag: FastCheck.constant("acquire" as const),
      model,
      patience: FastCheck.constantFrom(0, 500, 1500, 5000, 60_000),
      only: FastCheck.integer({ min: 0, max: 9 }).map((n) => n === 9),
      affinity,
      random,
      priority: FastCheck.constantFrom<Array<PoolState.Priority | undefined>>(undefined, "high", "normal", "low")
    })
  },
  { weight: 1, arbitrary: FastCheck.record({ _tag: FastCheck.constant("abandon" as const), nth }) },
  { weight: 3, arbitrary: FastCheck.constant({ _tag: "dispatch" as const }) }
)

const history = FastCheck.tuple(
  setup,
  FastCheck.array(command, { maxLength: 80, size: "max" }),
  FastCheck.boolean()
)

describe("PoolState", () => {
  it("C2, C6, B2, F1, F4, F5, K5: any history agrees with a slow and simple account of it", () => {
    FastCheck.assert(
      FastCheck.property(history, ([setup, commands, close]) => {
        const world = new World(setup)
        for (const command of commands) world.run(command)
        if (close) world.run({ _tag: "close" })
        world.finish()
      }),
      { numRuns: 400 }
    )
  })

  // What the histories found, or reach too seldom, one by one.

  it("F1: a key comes back at the very end of a told wait", () => {
    const limited = fault1(pool(1), "RateLimited", { wait: 2000 }, 0)
    assert.strictEqual(limited.nextOpening, 2020)
    assert.isUndefined(lease(limited, 2019).lease)
    const back = lease(limited, 2020)
    assert.isDefined(back.lease)
    assert.strictEqual(back.state.nextOpening, Infinity)
  })

  it("C2: thousands of keys that are gated and open again, in any order, all come back", () => {
    let state = pool(40)
    for (let round = 0; round < 50; round++) {
      const now = round * 100_000
      const leases: Array<PoolState.LeaseRecord> = []
      for (let i = 0; i < 40; i++) {
        const leased = lease(state, now)
        state = leased.state
        if (leased.lease !== undefined) leases.push(leased.lease)
      }
      for (const [i, leased] of leases.entries()) {
        const wait = ((i * 7919 + round * 104_729) % 40) * 100
        state = settle(state, leased, Outcome.fault(Fault.make("RateLimited", { wait })), now)
      }
      assert.isUndefined(lease(state, now, { random: 0.1 }).lease)
      for (let i = 0; i < 40; i++) {
        const leased = lease(state, now + 20 + i * 100)
        if (leased.lease === undefined) return assert.fail(`a key is lost in round ${round}`)
        state = settle(leased.state, leased.lease, Outcome.success, now + 20 + i * 100)
      }
      const after = lease(state, now + 50_000).state
      assert.strictEqual(after.index.size, 40)
    }
  })

  it("F5: a guess on top of a told wait does not let the floor break the told one", () => {
    const guess = { ...config, cooldowns: { ...config.cooldowns, rateLimited: slow } }
    const first = Leasing.lease(guess, pool(1), plain, 0)
    const second = Leasing.lease(guess, first.state, plain, 0)
    if (first.lease === undefined || second.lease === undefined) return assert.fail("no lease")
    const told = Outcome.fault(Fault.make("RateLimited", { wait: 5000 }))
    const guessed = Outcome.fault(Fault.make("RateLimited"))
    const one = Settling.settle(guess, second.state, first.lease, told, true, 0, 0).state
    const both = Settling.settle(guess, one, second.lease, guessed, true, 0, 0).state
    assert.isUndefined(Leasing.lease(guess, both, plain, 4999).lease)
    assert.isTrue(Leasing.lease(guess, both, plain, 5020).lease?.floor)
  })

  it("F5: a guess on top of a refused credential does not let the floor use the key", () => {
    const guess = { ...config, cooldowns: { ...config.cooldowns, rateLimited: slow } }
    const first = Leasing.lease(guess, pool(1), plain, 0)
    const second = Leasing.lease(guess, first.state, plain, 0)
    if (first.lease === undefined || second.lease === undefined) return assert.fail("no lease")
    const refused = Outcome.fault(Fault.make("Unauthorized"))
    const guessed = Outcome.fault(Fault.make("RateLimited"))
    const one = Settling.settle(guess, second.state, first.lease, refused, true, 0, 0).state
    const both = Settling.settle(guess, one, second.lease, guessed, true, 0, 0).state
    assert.isUndefined(Leasing.lease(guess, both, plain, 2999).lease)
  })

  it("C2: a call waits for a key that is at its limit and cooling down too, if both end in time", () => {
    const state = pool(1, { concurrency: 1 })
    const { lease: held, state: busy } = lease(state, 0)
    if (held === undefined) return assert.fail("no lease")
    const committed = Settling.settle(config, busy, held, Outcome.success, false, 0, 0).state
    const told = Outcome.fault(Fault.make("RateLimited", { wait: 1000 }))
    const late = Settling.settle(config, committed, held, told, false, 10, 0).state
    const waiting = acquire(late, 20, 30_000)
    assert.isTrue(typeof waiting.outcome === "object", String(waiting.outcome))
    const ended = Settling.settle(config, waiting.state, held, undefined, true, 500, 0).state
    assert.lengthOf(WaitingLine.dispatch(config, ended, 1029).answers, 0)
    assert.deepStrictEqual(WaitingLine.dispatch(config, ended, 1030).answers.map((a) => a._tag), ["Granted"])
  })

  it("C2: who has waited too long does not hold up the next in line", () => {
    const { lease: held, state } = lease(pool(1, { concurrency: 1 }), 0)
    if (held === undefined) return assert.fail("no lease")
    const first = acquire(state, 0, 100)
    const second = acquire(first.state, 1, 10_000)
    const ended = Settling.settle(config, second.state, held, Outcome.success, true, 200, 0).state
    const { answers } = WaitingLine.dispatch(config, ended, 200)
    assert.deepStrictEqual(answers.map((a) => [a._tag, a.waiter.until]), [["Refused", 100], ["Granted", 10_000]])
  })

  it("C2: a waiter that only some keys suit is served once and leaves the queue", () => {
    const { lease: held, state } = lease(pool(1, { concurrency: 1 }), 0)
    if (held === undefined) return assert.fail("no lease")
    const waiting = acquire(state, 0, 10_000, { only: () => true })
    const ended = Settling.settle(config, waiting.state, held, Outcome.success, true, 5, 0).state
    const served = WaitingLine.dispatch(config, ended, 5)
    assert.deepStrictEqual(served.answers.map((a) => a._tag), ["Granted"])
    assert.strictEqual(served.state.rest.waiting, 0)
  })

  it("closing refuses everybody, also who would wait for ever", () => {
    const { state } = lease(pool(1, { concurrency: 1 }), 0)
    const waiting = acquire(state, 0, Infinity)
    const closed = WaitingLine.close(config, waiting.state, 1)
    assert.deepStrictEqual(closed.answers.map((a) => a._tag), ["Refused"])
    assert.strictEqual(closed.state.rest.waiting, 0)
  })

  it("K5: a key that is added again gets its new attributes, all of them", () => {
    const state = PoolKeys.addKey(config, pool(1), { ...key(0, { group: "a", models: ["m1"] }), weight: 9 }, 0)
    assert.isUndefined(lease(state, 0, { model: "m2" }).lease)
    assert.isDefined(lease(state, 0, { model: "m1" }).lease)
    assert.strictEqual(PoolState.keys(state)[0]?.weight, 9)
    const limited = fault1(state, "RateLimited", { scope: "group", wait: 1000 }, 0)
    assert.isUndefined(lease(limited, 1000).lease)
  })

  it("F1: a told wait of a group holds although its last key was retired and comes back", () => {
    const only = key(0, { group: "a" })
    const limited = fault1(PoolKeys.make(config, [only], 0), "RateLimited", { scope: "group", wait: 5000 }, 0)
    const left = PoolKeys.updateKey(config, limited, only.id, (key) => ({ ...key, retiring: true }), 0)
    if (left === undefined) return assert.fail("no such key")
    assert.lengthOf(PoolState.keys(left.state), 0)
    const back = PoolKeys.addKey(config, left.state, key(1, { group: "a" }), 10)
    assert.isUndefined(lease(back, 5000).lease)
    assert.isDefined(lease(back, 5020).lease)
  })

  for (const wait of [1000, undefined]) {
    const how = wait === undefined ? "guessed" : "told"
    it(`what is remembered of single models does not pile up: ${how} waits`, () => {
      let state = pool(1)
      for (let i = 0; i < 300; i++) {
        // Two days apart: longer than any cooldown for a model lasts.
        const now = i * 2 * 86_400_000
        state = fault1(state, "RateLimited", { wait, perModel: true }, now, { model: `model-${i}` })
      }
      assert.isAtMost(HashMap.size(state.rest.models), 10)
    })
  }

  it("of a thousand models that callers name at once, the one that is free again first is forgotten", () => {
    let state = pool(1)
    for (let i = 0; i < 1_100; i++) {
      const wait = i === 7 ? 60_000 : 600_000 + i
      state = fault1(state, "RateLimited", { wait, perModel: true }, 0, { model: `model-${i}` })
    }
    assert.strictEqual(HashMap.size(state.rest.models), 1_000)
    assert.isFalse(HashMap.has(state.rest.models, "model-7"))
    for (const i of [0, 99, 1_099]) assert.strictEqual(HashMap.has(state.rest.models, `model-${i}`), i > 99)
  })

  it("B5: a caller's bad request does not end the slow return of a key", () => {
    const limited = fault1(pool(1), "RateLimited", {}, 0)
    const trial = lease(limited, 5000)
    if (trial.lease === undefined) return assert.fail("no trial")
    const back = settle(trial.state, trial.lease, Outcome.success, 5000)
    const rejected = fault1(back, "Rejected", {}, 5001)
    const one = lease(rejected, 5002)
    assert.isDefined(one.lease)
    assert.isUndefined(lease(one.state, 5002).lease)
  })
})

// ---------------------------------------------------------------------------------------------------------------------

const config: PoolState.Config = { ...baseConfig, floorMillis: 1000 }
const slow: Cooldowns.Growing = { firstMillis: 60_000, factor: 2, maxMillis: 60_000 }

const key = (n: number, spec: Partial<KeySpec> = {}) =>
  makeKey(n, { group: undefined, concurrency: undefined, models: undefined, ...spec })

const pool = (size: number, spec: Partial<KeySpec> = {}): PoolState.PoolState =>
  PoolKeys.make(config, Array.from({ length: size }, (_, n) => key(n, spec)), 0)

const lease = (state: PoolState.PoolState, now: number, request: Partial<PoolState.Request> = {}): Leasing.Leased =>
  Leasing.lease(config, state, { ...plain, ...request }, now)

const settle = (
  state: PoolState.PoolState,
  record: PoolState.LeaseRecord,
  outcome: Outcome.Outcome,
  now: number
): PoolState.PoolState => Settling.settle(config, state, record, outcome, true, now, 0).state

/** One attempt that fails at once. */
const fault1 = (
  state: PoolState.PoolState,
  kind: Fault.Kind,
  details: Fault.Details,
  now: number,
  request: Partial<PoolState.Request> = {}
): PoolState.PoolState => {
  const leased = lease(state, now, request)
  return leased.lease === undefined
    ? assert.fail("no key can serve")
    : settle(leased.state, leased.lease, Outcome.fault(Fault.make(kind, details)), now)
}

const acquire = (state: PoolState.PoolState, now: number, until: number, request: Partial<PoolState.Request> = {}) =>
  WaitingLine.acquire(
    config,
    state,
    { ...plain, ...request },
    { until, answer: Deferred.unsafeMake<PoolState.LeaseRecord | undefined>(FiberId.none) },
    now
  )
