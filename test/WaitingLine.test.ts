import { assert, describe, it } from "@effect/vitest"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as FiberId from "effect/FiberId"
import * as HashMap from "effect/HashMap"
import * as RedBlackTree from "effect/RedBlackTree"
import * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Leasing from "../src/Leasing.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolKeys from "../src/PoolKeys.js"
import * as PoolState from "../src/PoolState.js"
import * as Settling from "../src/Settling.js"
import * as SlotMap from "../src/SlotMap.js"
import * as WaitingLine from "../src/WaitingLine.js"
import { baseConfig, type KeySpec, makeKey, plain } from "./support/pool-model.js"

describe("WaitingLine", () => {
  it("C2: who waits for 500 models is served in order, and each end of a call looks at a few gates only", () => {
    const { key, looks } = counted(0, { concurrency: 1 })
    const { held, state } = queued([key], 501, (i) => `m${i}`)
    let next = state
    let lease = first(held)
    for (let i = 1; i <= 500; i++) {
      const before = looks()
      const served = end(next, lease, 2)
      WaitingLine.nextWake(config, served.state, 2)
      assert.isAtMost(looks() - before, 60, `at waiter ${i}`)
      assert.deepStrictEqual(served.answers.map((a) => [a._tag, a.waiter.request.model]), [["Granted", `m${i}`]])
      lease = granted(served)
      next = served.state
    }
    assert.strictEqual(next.rest.waiting, 0)
  })

  it("C2: where keys serve certain models only, each end of a call looks again at the key that is free only", () => {
    const spec = (n: number) => ({ concurrency: 1, models: [`m${n % 20}`, `m${(n * 7 + 1) % 20}`] })
    const pool = Array.from({ length: 200 }, (_, n) => counted(n, spec(n)))
    const looks = () => pool.reduce((sum, { looks }) => sum + looks(), 0)
    const { held, state } = queued(pool.map(({ key }) => key), 700, (i) => `m${i % 20}`)
    let next = WaitingLine.dispatch(config, state, 1).state
    const leases = [...held]
    const order = new Map<string, number>()
    for (let lease = leases.shift(); lease !== undefined; lease = leases.shift()) {
      const before = looks()
      const served = end(next, lease, 2)
      WaitingLine.nextWake(config, served.state, 2)
      if (served.state.rest.waiting > 0) assert.isAtMost(looks() - before, 400)
      for (const answer of served.answers) {
        if (answer._tag === "Refused") return assert.fail("refused")
        const { call, model = "" } = answer.waiter.request
        assert.isAbove(call, order.get(model) ?? 0)
        order.set(model, call)
        leases.push(answer.lease)
      }
      next = served.state
    }
    assert.strictEqual(next.rest.waiting, 0)
  })

  it("C2: what is not held against a waiting model costs its waiters no look at the keys", () => {
    const pool = Array.from({ length: 100 }, (_, n) => counted(n, {}))
    let state = PoolKeys.make(config, pool.map(({ key }) => key), 0)
    const told = Outcome.fault(Fault.make("RateLimited", { wait: 5000, perModel: true }))
    const held: Array<PoolState.LeaseRecord> = []
    for (let i = 0; i < 100; i++) {
      const leased = Leasing.lease(config, state, { ...plain, model: "slow" }, 0)
      if (leased.lease === undefined) return assert.fail("no lease")
      state = leased.state
      held.push(leased.lease)
    }
    for (const lease of held) state = Settling.settle(config, state, lease, told, true, 0, 0).state
    for (let i = 0; i < 50; i++) state = ask(state, 0, 60_000, { model: "slow" }).state
    state = WaitingLine.dispatch(config, state, 0).state
    assert.strictEqual(state.rest.waiting, 50)
    for (let i = 0; i < 200; i++) {
      const leased = Leasing.lease(config, state, { ...plain, model: "quick" }, 1)
      if (leased.lease === undefined) return assert.fail("no lease")
      const before = pool.reduce((sum, { looks }) => sum + looks(), 0)
      const served = end(leased.state, leased.lease, 1)
      assert.strictEqual(WaitingLine.nextWake(config, served.state, 1), 5020)
      assert.isAtMost(pool.reduce((sum, { looks }) => sum + looks(), 0) - before, 20)
      state = served.state
    }
    assert.lengthOf(WaitingLine.dispatch(config, state, 5019).answers, 0)
    assert.lengthOf(WaitingLine.dispatch(config, state, 5020).answers, 50)
  })

  it("C2: a model that is held back while its callers wait blocks nobody else, also those behind them", () => {
    const busy = queued([makeKey(0, spec({ concurrency: 2 }))], 2, () => "a")
    let state = busy.state
    for (const model of ["a", "b", "a", "c"]) state = ask(state, 1, 60_000, { model }).state
    const told = Outcome.fault(Fault.make("RateLimited", { wait: 5000, perModel: true }))
    const one = WaitingLine.thenDispatch(
      config,
      Settling.settle(config, state, first(busy.held), told, true, 2, 0),
      2
    )
    assert.deepStrictEqual(models(one), ["Granted b"])
    const two = end(one.state, granted(one), 3)
    assert.deepStrictEqual(models(two), ["Granted c"])
    const three = end(two.state, granted(two), 4)
    assert.deepStrictEqual(models(three), [])
    assert.strictEqual(WaitingLine.nextWake(config, three.state, 4), 5022)
    const four = WaitingLine.dispatch(config, three.state, 5022)
    assert.deepStrictEqual(models(four), ["Granted a"])
  })

  it("C2: the oldest call comes first, also among those that only some keys suit and those that any does", () => {
    const busy = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
    let state = busy.state
    for (const [model, only] of [["a", undefined], ["b", () => true], ["c", undefined], ["d", () => true]] as const) {
      state = ask(state, 1, 60_000, { model, only }).state
    }
    assert.deepStrictEqual(drained(state, first(busy.held)), ["Granted a", "Granted b", "Granted c", "Granted d"])
  })

  it("C2: who waits in vain is told so when the wait becomes hopeless, and once there is no key for ever", () => {
    const key = makeKey(0, spec({ concurrency: 1 }))
    const busy = queued([key], 1, () => "a")
    let state = busy.state
    for (const [model, until] of [["a", 1000], ["b", 9000], ["c", Infinity]] as const) {
      state = ask(state, 1, until, { model }).state
    }
    const told = Outcome.fault(Fault.make("RateLimited", { wait: 5000 }))
    const one = WaitingLine.thenDispatch(config, Settling.settle(config, state, first(busy.held), told, true, 2, 0), 2)
    assert.deepStrictEqual(models(one), ["Refused a"])
    assert.strictEqual(WaitingLine.nextWake(config, one.state, 2), 5022)
    const off = PoolKeys.updateKey(config, one.state, key.id, (key) => ({ ...key, enabled: false }), 3)
    if (off === undefined) return assert.fail("no such key")
    assert.deepStrictEqual(models(WaitingLine.thenDispatch(config, off, 3)), ["Refused b", "Refused c"])
  })

  it("C2: expired waiters anywhere in the line are refused, and they wake nobody after that", () => {
    const busy = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
    let state = busy.state
    for (const [i, until] of [900, 100, 500, 100, 700].entries()) {
      state = ask(state, 1, until, { model: `m${i % 2}` }).state
    }
    const seen: Array<number> = []
    for (let at = WaitingLine.nextWake(config, state, 1); at < Infinity; at = WaitingLine.nextWake(config, state, at)) {
      const served = WaitingLine.dispatch(config, state, at)
      seen.push(at, served.answers.length)
      state = served.state
    }
    assert.deepStrictEqual(seen, [100, 2, 500, 1, 700, 1, 900, 1])
  })

  it("C2: the more urgent come first, in their lane and among the lanes, and first come, first served among equals", () => {
    const busy = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
    let state = busy.state
    for (
      const [model, priority] of [["a", "low"], ["b", undefined], ["c", "normal"], ["a", "high"], [
        "d",
        "high"
      ]] as const
    ) state = ask(state, 1, 60_000, { model, priority }).state
    assert.deepStrictEqual(drained(state, first(busy.held)), [
      "Granted a",
      "Granted d",
      "Granted b",
      "Granted c",
      "Granted a"
    ])
  })

  it("C2: priorities age: a head start of 10 s, after which who came first is first", () => {
    const busy = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
    const order = (priority: PoolState.Priority, came: number, other: PoolState.Priority) => {
      const waiting = ask(busy.state, 1, 90_000, { model: "first", priority }).state
      const { state } = ask(waiting, came, 90_000, { model: "second", priority: other })
      return drained(state, first(busy.held), came)[0]
    }
    assert.deepStrictEqual(
      [
        order("normal", 10_000, "high"),
        order("normal", 10_001, "high"),
        order("normal", 10_002, "high"),
        order("low", 20_000, "high"),
        order("low", 20_001, "high"),
        order("low", 10_000, "normal"),
        order("low", 10_002, "normal")
      ],
      ["second", "first", "first", "second", "first", "second", "first"].map((model) => `Granted ${model}`)
    )
  })

  it("C2: a call that waits again keeps its place, as of when it began", () => {
    const busy = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
    const waiting = ask(busy.state, 5, 60_000, { model: "new" }).state
    const { state } = ask(waiting, 9, 60_000, { call: 1, began: 2, model: "again" })
    assert.deepStrictEqual(drained(state, first(busy.held), 9), ["Granted again", "Granted new"])
  })

  it("C2: in a line that is full, who is more urgent takes the place of the last, who is refused", () => {
    const full: PoolState.Config = { ...config, maxWaiters: 2 }
    const busy = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
    let state = busy.state
    for (const model of ["a", "b"]) state = ask(state, 1, 60_000, { model }, full).state
    assert.strictEqual(ask(state, 2, 60_000, { model: "c" }, full).outcome, "full")
    assert.strictEqual(ask(state, 2, 60_000, { model: "c", priority: "low" }, full).outcome, "full")
    const urgent = ask(state, 2, 60_000, { model: "c", priority: "high" }, full)
    assert.deepStrictEqual(models(urgent), ["Refused b"])
    assert.deepStrictEqual(drained(urgent.state, first(busy.held)), ["Granted c", "Granted a"])
  })

  it("C2: a small urgent request is not refused because the large one before which it comes would not fit in time", () => {
    const tokens = (input: number) => ({ input, maxOutput: 0 })
    const key = Either.getOrThrow(ApiKey.make({ secret: "metered", models: ["m"], limits: { tokensPerMinute: 100 } }))
    let state = PoolKeys.make(config, [key], 0)
    for (const [at, input] of [[0, 50], [30_000, 50]] as const) {
      const held = ask(state, at, 90_000, { model: "m", tokens: tokens(input) })
      if (typeof held.outcome !== "object" || "since" in held.outcome) return assert.fail("no lease")
      state = end(held.state, held.outcome, at).state
    }
    state =
      WaitingLine.dispatch(config, ask(state, 30_000, 200_000, { model: "m", tokens: tokens(100) }).state, 30_000).state
    const small = { tokens: tokens(10), priority: "high", model: "m" } as const
    assert.strictEqual(ask(state, 30_000, 59_000, small).outcome, "refused")
    const waiting = ask(state, 30_000, 70_000, small)
    assert.isObject(waiting.outcome)
    assert.deepStrictEqual(WaitingLine.dispatch(config, waiting.state, 60_000).answers.map((a) => a._tag), ["Granted"])
  })

  it("C2: whose time is over takes nobody along who needs less and stands behind, of one model or of none", () => {
    for (const wanted of [{ model: "m" }, {}]) {
      const tokens = (input: number) => ({ ...wanted, tokens: { input, maxOutput: 0 } })
      const told = (remaining: number, now: number) => ({
        answered: true,
        sent: true,
        announced: [{ name: "tokens", limit: 1_000, remaining, resetMillis: 50_000 - now }],
        usage: undefined
      })
      const settle = (state: PoolState.PoolState, lease: PoolState.LeaseRecord, remaining: number, now: number) =>
        Settling.settle(config, state, lease, Outcome.success, true, now, 0, told(remaining, now))
      const lease = (state: PoolState.PoolState) => {
        const leased = Leasing.lease(config, state, { ...plain, ...tokens(10) }, 0)
        return { state: leased.state, lease: leased.lease ?? assert.fail("no lease") }
      }
      const one = lease(PoolKeys.make(config, [makeKey(0, spec({}))], 0))
      const two = lease(settle(one.state, one.lease, 100, 0).state)
      let state = two.state
      // Until the answer is there that is under way, nobody knows when the first of them may be served.
      state = ask(state, 1, 1_000, tokens(500)).state
      state = ask(state, 1, 20_000, tokens(50)).state
      assert.strictEqual(state.rest.waiting, 2)
      const served = WaitingLine.thenDispatch(config, settle(state, two.lease, 80, 1_000), 1_000)
      assert.deepStrictEqual(
        served.answers.map(({ _tag, waiter }) => [_tag, waiter.request.tokens?.input]),
        [["Refused", 500], ["Granted", 50]]
      )
    }
  })

  it("C2: many who become hopeless at once, each in need of other tokens, cost a few looks at the keys each", () => {
    const sizes = [(i: number) => 20 + i * 37 % 70, (i: number) => 600 - i]
    const cases = [{ model: "m" }, {}].flatMap((wanted) => sizes.map((sizeOf) => ({ wanted, sizeOf })))
    for (const { sizeOf, wanted } of cases) {
      const pool = Array.from({ length: 50 }, (_, n) => counted(n, {}))
      const looks = () => pool.reduce((sum, { looks }) => sum + looks(), 0)
      const told = (remaining: number, now: number) => ({
        answered: true,
        sent: true,
        announced: [{ name: "tokens", limit: 1_000, remaining, resetMillis: 50_000 - now }],
        usage: undefined
      })
      let state = PoolKeys.make(config, pool.map(({ key }) => key), 0)
      const held: Array<PoolState.LeaseRecord> = []
      const lease = (input: number): PoolState.LeaseRecord => {
        const leased = Leasing.lease(config, state, { ...plain, ...wanted, tokens: { input, maxOutput: 0 } }, 0)
        state = leased.state
        return leased.lease ?? assert.fail("no lease")
      }
      const settle = (lease: PoolState.LeaseRecord, remaining: number, now: number) =>
        Settling.settle(config, state, lease, Outcome.success, true, now, 0, told(remaining, now)).state
      for (const _ of pool) state = settle(lease(10), 100, 0)
      for (const _ of pool) held.push(lease(90))
      for (let i = 0; i < 500; i++) {
        state = ask(state, 1, 40_000, { ...wanted, tokens: { input: sizeOf(i), maxOutput: 0 } }).state
      }
      assert.strictEqual(state.rest.waiting, 500)
      const last = held.pop() ?? assert.fail("no lease")
      for (const lease of held) state = WaitingLine.dispatch(config, settle(lease, 0, 2), 2).state
      const before = looks()
      const served = WaitingLine.dispatch(config, settle(last, 0, 2), 2)
      assert.strictEqual(served.state.rest.waiting, 0)
      assert.strictEqual(served.answers.length, 500)
      assert.isAtMost(looks() - before, 10 * 500)
    }
  })

  it("C2: many lanes that become hopeless at once are looked at a few times each, also where tokens count", () => {
    let looks = 0
    const looked = Object.defineProperty({ ...config }, "floorMillis", {
      get: () => {
        looks++
        return config.floorMillis
      }
    })
    let state = PoolKeys.make(looked, [makeKey(0, spec({ concurrency: 1 }))], 0)
    const leased = Leasing.lease(looked, state, { ...plain, tokens: { input: 10, maxOutput: 0 } }, 0)
    const lease = leased.lease ?? assert.fail("no lease")
    state = Settling.settle(looked, leased.state, lease, undefined, false, 0, 0, {
      answered: true,
      sent: true,
      announced: [{ name: "tokens", limit: 1_000, remaining: 900, resetMillis: 50_000 }],
      usage: undefined
    }).state
    for (let i = 0; i < 200; i++) {
      state = ask(state, 1, 40_000, { only: () => true, tokens: { input: i, maxOutput: 0 } }, looked).state
    }
    assert.strictEqual(state.rest.waiting, 200)
    const before = looks
    const told = Outcome.fault(Fault.make("RateLimited", { wait: "1 hour" }))
    const changed = Settling.settle(looked, state, lease, told, true, 2, 0)
    assert.lengthOf(WaitingLine.thenDispatch(looked, changed, 2).answers, 200)
    assert.isAtMost(looks - before, 10 * 200)
  })

  it("C2: who is told by a declared limit that the queue before it is too long is refused at once, and nobody else", () => {
    const limits = { requestsPerMinute: 2 }
    const keyWith = (n: number, given: ApiKey.Limits, group?: string) =>
      Either.getOrThrow(ApiKey.make({ secret: `limited-${n}`, limits: given, quotaGroup: group }))
    /** A pool that has used up two of its requests at 0, and whose waiters, if any, wait until these instants. */
    const used = (keys: ReadonlyArray<ApiKey.ApiKey>, waiting: ReadonlyArray<number>) => {
      let state = PoolKeys.make(config, keys, 0)
      for (let i = 0; i < 2; i++) {
        const { outcome, state: leased } = ask(state, 0, 90_000)
        if (typeof outcome !== "object" || "since" in outcome) return assert.fail("no lease")
        state = end(leased, outcome, 0).state
      }
      for (const until of waiting) {
        const asked = ask(state, 1_000, until)
        assert.isObject(asked.outcome)
        state = asked.state
      }
      return state
    }
    const outcome = (state: PoolState.PoolState, until: number, request: Partial<PoolState.Request> = {}) => {
      const { outcome } = ask(state, 1_000, until, request)
      return typeof outcome === "object" ? "since" in outcome ? "waits" : "leased" : outcome
    }
    const one = [keyWith(0, limits)]
    const full = used(one, [61_000, 61_000])
    assert.strictEqual(outcome(used(one, [61_000]), 61_000), "waits")
    assert.strictEqual(outcome(full, 61_000), "refused")
    assert.strictEqual(outcome(full, 119_999), "refused")
    // From then on the two that were taken a minute before are free again.
    assert.strictEqual(outcome(full, 120_000), "waits")
    assert.strictEqual(outcome(full, 61_000, { priority: "high" }), "waits")
    // Who may be served later takes nothing from one who is before.
    assert.strictEqual(outcome(used(one, [130_000, 130_000]), 61_000), "refused")
    assert.strictEqual(outcome(used(one, [130_000, 130_000]), 61_000, { model: "another" }), "waits")
    // The keys of a group share what there is.
    const group = [keyWith(0, limits, "g"), keyWith(1, limits, "g")]
    assert.strictEqual(outcome(used(group, [61_000, 61_000]), 61_000), "refused")
    // The tightest of several limits counts.
    const daily = [keyWith(0, { requestsPerMinute: 2, requestsPerDay: 3 })]
    assert.strictEqual(outcome(used(daily, [61_000]), 300_000), "refused")
    const loose = [keyWith(0, { requestsPerMinute: 2, requestsPerDay: 100 })]
    assert.strictEqual(outcome(used(loose, [61_000, 61_000]), 61_000), "refused")
  })

  it("C2: nobody is refused for a queue of which nothing is known for certain", () => {
    const make = (n: number, limits: ApiKey.Limits) => Either.getOrThrow(ApiKey.make({ secret: `free-${n}`, limits }))
    const keys = [make(0, { requestsPerMinute: 1 }), make(1, { concurrency: 1 })]
    let state = PoolKeys.make(config, keys, 0)
    for (let i = 0; i < 2; i++) state = ask(state, 0, 90_000).state
    for (let i = 0; i < 20; i++) {
      const asked = ask(state, 1_000, 30_000)
      assert.isTrue(typeof asked.outcome === "object" && "since" in asked.outcome, `caller ${i}`)
      state = asked.state
    }
    assert.strictEqual(state.rest.waiting, 20)
  })

  it("C2: what is in flight may not have been sent: it counts as free", () => {
    const key = Either.getOrThrow(ApiKey.make({ secret: "held", limits: { requestsPerMinute: 2 } }))
    let state = PoolKeys.make(config, [key], 0)
    for (let i = 0; i < 2; i++) state = ask(state, 0, 90_000).state
    for (const expected of ["object", "object", "string"]) {
      const asked = ask(state, 1_000, 30_000)
      assert.strictEqual(typeof asked.outcome, expected)
      state = asked.state
    }
  })

  it("the line stands in the same order everywhere, and nobody is left in it at its end", () => {
    const arbitrary = FastCheck.array(
      FastCheck.record({
        model: FastCheck.constantFrom("a", "b", "c"),
        until: FastCheck.integer({ min: 2, max: 6 }),
        priority: FastCheck.constantFrom<Array<PoolState.Priority | undefined>>(undefined, "high", "low")
      }),
      { maxLength: 20 }
    )
    FastCheck.assert(
      FastCheck.property(arbitrary, FastCheck.infiniteStream(FastCheck.nat(30)), (asked, leaves) => {
        let { state } = queued([makeKey(0, spec({ concurrency: 1 }))], 1, () => "a")
        const waiters: Array<PoolState.Waiter> = []
        for (const { model, priority, until } of asked) {
          const acquired = ask(state, 1, until, { model, priority })
          if (typeof acquired.outcome === "object" && "since" in acquired.outcome) waiters.push(acquired.outcome)
          state = acquired.state
        }
        while (waiters.length > 0) {
          const heads = [...state.rest.line.heads].map(([turn]) => turn)
          const expected = [...state.rest.lanes].map(([, queue]) => [...RedBlackTree.keys(queue)][0] ?? 0n)
          assert.deepStrictEqual(heads, expected.sort(PoolState.byTurn))
          const ends = [...state.rest.line.ends].flatMap(([, calls]) => [...HashMap.keys(calls)])
          assert.sameMembers(ends, waiters.map(({ request }) => request.call))
          assert.strictEqual(WaitingLine.nextWake(config, state, 1), Math.min(...waiters.map(({ until }) => until)))
          const [left] = waiters.splice((leaves.next().value ?? 0) % waiters.length, 1)
          if (left !== undefined) state = WaitingLine.withoutWaiter(state, left)
        }
        assert.strictEqual(state.rest.line, PoolState.nobody)
      }),
      { numRuns: 50 }
    )
  })

  it.effect("C2: 1,000 callers that wait for 1,000 models are all served, in order", () =>
    Effect.scoped(Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: [{ secret: "one", limits: { concurrency: 1 } }] })
      const served: Array<number> = []
      yield* Effect.forEach(
        Array.from({ length: 1000 }, (_, i) => i),
        (i) =>
          pool.run(() => Effect.zipRight(Effect.sync(() => served.push(i)), Effect.yieldNow()), { model: `m${i}` }),
        { concurrency: "unbounded", discard: true }
      )
      assert.deepStrictEqual(served, Array.from({ length: 1000 }, (_, i) => i))
      // No clock has moved: nobody was served by a timer.
    })).pipe(Effect.provide(KeyPool.layerDefaults)))
})

describe("PoolState, of many keys", () => {
  it("whether another key may serve is known without a look at the keys", () => {
    const pool = Array.from({ length: 200 }, (_, n) => counted(n, { concurrency: 1 }))
    let state = PoolKeys.make(config, pool.map(({ key }) => key), 0)
    const looks = () => pool.reduce((sum, { looks }) => sum + looks(), 0)
    for (let i = 0; i < 198; i++) state = Leasing.lease(config, state, plain, 0).state
    const open = PoolState.keys(state).filter((key) => key.gatedUntil === undefined).map((key) => key.slot)
    const before = looks()
    const [one = -1, two = -1] = open
    assert.isTrue(PoolState.hasOther(config, state, { model: "m", only: undefined }, [], 0))
    assert.isTrue(PoolState.hasOther(config, state, { model: "m", only: undefined }, [one, one, 5, 999], 0))
    assert.isFalse(PoolState.hasOther(config, state, { model: "m", only: undefined }, [one, two], 0))
    assert.strictEqual(looks(), before)
  })

  it("why keys cannot serve is told of a thousand; the others are counted, and the one left out is not", () => {
    const length = 1200
    let state = PoolKeys.make(config, Array.from({ length }, (_, n) => makeKey(n, spec({ concurrency: 1 }))), 0)
    for (let i = 0; i < length; i++) state = Leasing.lease(config, state, plain, 0).state
    const counts = (except?: number) => PoolState.explain(config, state, plain, 0, except).counts
    assert.deepStrictEqual(counts(), { concurrency: 1000, others: 200 })
    assert.deepStrictEqual(counts(3), { concurrency: 999, others: 200 })
    assert.deepStrictEqual(counts(1100), { concurrency: 1000, others: 199 })
    assert.deepStrictEqual(counts(5000), { concurrency: 1000, others: 200 })
  })

  it("changes of a map are the slots whose entries differ, whatever its size", () => {
    const entries = FastCheck.array(FastCheck.tuple(FastCheck.nat(3000), FastCheck.nat(2)), { maxLength: 60 })
    const build = (from: SlotMap.SlotMap<number>, all: ReadonlyArray<readonly [number, number]>) =>
      all.reduce((map, [slot, n]) => n === 0 ? SlotMap.remove(map, slot) : SlotMap.set(map, slot, n), from)
    FastCheck.assert(FastCheck.property(entries, entries, (first, then) => {
      const before = build(SlotMap.empty(), first)
      const after = build(before, then)
      const slots = [...new Set([...first, ...then].map(([slot]) => slot))].sort((a, b) => a - b)
      const differ = slots.filter((slot) => SlotMap.get(before, slot) !== SlotMap.get(after, slot))
      assert.deepStrictEqual(SlotMap.changes(before, after), differ)
      assert.deepStrictEqual(SlotMap.changes(after, before), differ)
      assert.strictEqual(SlotMap.find(after, (n) => n === 2), SlotMap.values(after).find((n) => n === 2))
    }))
  })
})

// ---------------------------------------------------------------------------------------------------------------------

const config: PoolState.Config = { ...baseConfig, maxWaiters: 1000 }

const spec = (given: Partial<KeySpec>): KeySpec => ({
  group: undefined,
  concurrency: undefined,
  models: undefined,
  ...given
})

/** A key that counts how often its gates are looked at. */
const counted = (n: number, given: Partial<KeySpec>): { readonly key: ApiKey.ApiKey; readonly looks: () => number } => {
  const made = makeKey(n, spec(given))
  const { limits } = made
  let looks = 0
  const key = Object.defineProperty(
    Object.create(Object.getPrototypeOf(made), Object.getOwnPropertyDescriptors(made)),
    "limits",
    {
      get: () => {
        looks++
        return limits
      }
    }
  )
  return { key, looks: () => looks }
}

const ask = (
  state: PoolState.PoolState,
  now: number,
  until: number,
  request: Partial<PoolState.Request> = {},
  settings = config
) =>
  WaitingLine.acquire(
    settings,
    state,
    { ...plain, ...request },
    { until, answer: Deferred.unsafeMake<PoolState.LeaseRecord | undefined>(FiberId.none) },
    now
  )

/** A pool of these keys after so many calls asked for one: some have it, the others wait. */
const queued = (keys: ReadonlyArray<ApiKey.ApiKey>, calls: number, model: (i: number) => string) => {
  let state = PoolKeys.make(config, keys, 0)
  const held: Array<PoolState.LeaseRecord> = []
  for (let i = 0; i < calls; i++) {
    const acquired = ask(state, 1, 60_000 + i, { model: model(i) })
    if (typeof acquired.outcome === "object" && "slot" in acquired.outcome) held.push(acquired.outcome)
    state = acquired.state
  }
  return { state, held }
}

const end = (state: PoolState.PoolState, lease: PoolState.LeaseRecord, now: number): WaitingLine.Dispatched =>
  WaitingLine.thenDispatch(config, Settling.settle(config, state, lease, Outcome.success, true, now, 0), now)

/** Who is served, in order, when one attempt after the other ends. */
const drained = (state: PoolState.PoolState, lease: PoolState.LeaseRecord, now = 2): ReadonlyArray<string> => {
  const order: Array<string> = []
  let served = end(state, lease, now)
  while (served.answers.length > 0) {
    order.push(...models(served))
    served = end(served.state, granted(served), now)
  }
  return order
}

const first = (leases: ReadonlyArray<PoolState.LeaseRecord>): PoolState.LeaseRecord =>
  leases[0] ?? assert.fail("nobody has a key")

const granted = ({ answers: [answer] }: WaitingLine.Dispatched): PoolState.LeaseRecord =>
  answer?._tag === "Granted" ? answer.lease : assert.fail("nobody was served")

const models = ({ answers }: WaitingLine.Dispatched): ReadonlyArray<string> =>
  answers.map(({ _tag, waiter }) => `${_tag} ${waiter.request.model}`)
