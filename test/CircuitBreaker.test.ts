import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as Config from "effect/Config"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Deferred from "effect/Deferred"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as fc from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as CircuitBreaker from "../src/CircuitBreaker.js"

type Options = CircuitBreaker.Options
type State = CircuitBreaker.State

const plain: Options = { ...CircuitBreaker.defaultOptions, rate: undefined }

// ---------------------------------------------------------------------------------------------------------------------
// Random histories, and a model of what should happen that shares nothing with the code under test: it keeps whole
// histories in lists, and tells epochs apart by identity.
// ---------------------------------------------------------------------------------------------------------------------

type Command =
  | { readonly op: "advance"; readonly by: number }
  | { readonly op: "admit" }
  | {
    readonly op: "record"
    readonly lease: number
    readonly outcome: CircuitBreaker.Outcome
    readonly mayOpen: boolean
    readonly siblings: CircuitBreaker.Counts | undefined
  }
  | { readonly op: "isolate" }
  | { readonly op: "reset" }

const recordCommand = fc.record({
  op: fc.constant("record" as const),
  // Counted from the newest lease backwards, so that fresh and old ones both occur often.
  lease: fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, { weight: 2, arbitrary: fc.nat(12) }),
  outcome: fc.oneof(
    { weight: 5, arbitrary: fc.constant("failure" as const) },
    { weight: 4, arbitrary: fc.constant("success" as const) },
    { weight: 1, arbitrary: fc.constant("alive" as const) },
    { weight: 1, arbitrary: fc.constant("ignored" as const) }
  ),
  mayOpen: fc.oneof({ weight: 5, arbitrary: fc.constant(true) }, { weight: 1, arbitrary: fc.constant(false) }),
  siblings: fc.oneof(
    fc.constant(undefined),
    fc.tuple(fc.nat(20), fc.nat(20)).map(([a, b]) => ({ calls: a + b, faults: a }))
  )
})

const commands: fc.Arbitrary<ReadonlyArray<Command>> = fc.array(
  fc.oneof(
    { weight: 24, arbitrary: fc.constant<Command>({ op: "admit" }) },
    { weight: 28, arbitrary: recordCommand },
    { weight: 12, arbitrary: fc.record({ op: fc.constant("advance" as const), by: fc.nat(60) }) },
    { weight: 1, arbitrary: fc.constant<Command>({ op: "isolate" }) },
    { weight: 1, arbitrary: fc.constant<Command>({ op: "reset" }) }
  ),
  { maxLength: 120, size: "max" }
)

const optionsArbitrary: fc.Arbitrary<Options> = fc.record({
  threshold: fc.integer({ min: 1, max: 5 }),
  cooldownMillis: fc.nat(60),
  cooldownFactor: fc.constantFrom(1, 1.5, 2, 10),
  maxCooldownMillis: fc.integer({ min: 60, max: 300 }),
  probeTimeoutMillis: fc.integer({ min: 1, max: 60 }),
  rate: fc.option(
    fc.record({
      faults: fc.constantFrom(0.3, 0.5, 1),
      minimumCalls: fc.integer({ min: 1, max: 6 }),
      windowMillis: fc.integer({ min: 1, max: 100 }),
      siblingFactor: fc.constantFrom(0, 1, 3)
    }),
    { nil: undefined }
  )
})

interface Model {
  tag: State["_tag"]
  epoch: object
  until: number
  trips: number
  /** Counted outcomes of this epoch, oldest first. */
  log: Array<{ readonly at: number; readonly ok: boolean }>
  probe: { readonly lease: ModelLease; readonly since: number } | undefined
}

interface ModelLease {
  readonly epoch: object
}

const newModel = (): Model => ({ tag: "Closed", epoch: {}, until: 0, trips: 0, log: [], probe: undefined })

const trailing = (model: Model, ok: boolean): number => {
  let n = 0
  for (const entry of [...model.log].reverse()) {
    if (entry.ok !== ok) break
    n++
  }
  return n
}

const withinWindow = (model: Model, windowMillis: number, now: number) => {
  const half = windowMillis / 2
  return model.log.filter((entry) => Math.floor(entry.at / half) >= Math.floor(now / half) - 1)
}

const modelOpen = (options: Options, model: Model, now: number): void => {
  model.trips++
  let cooldown = options.cooldownMillis
  for (let i = 1; i < model.trips; i++) {
    cooldown = Math.min(options.maxCooldownMillis, cooldown * options.cooldownFactor)
  }
  Object.assign(model, { tag: "Open", epoch: {}, until: now + cooldown, log: [], probe: undefined })
}

const modelAdmit = (options: Options, model: Model, now: number): ModelLease | undefined => {
  if (model.tag === "Closed") return { epoch: model.epoch }
  if (model.tag === "Open" && now < model.until) return undefined
  if (model.probe !== undefined && now - model.probe.since < options.probeTimeoutMillis) return undefined
  const lease = { epoch: {} }
  Object.assign(model, { tag: "HalfOpen", epoch: lease.epoch, probe: { lease, since: now } })
  return lease
}

const modelRecord = (
  options: Options,
  model: Model,
  now: number,
  lease: ModelLease,
  command: Extract<Command, { op: "record" }>
): void => {
  if (lease.epoch !== model.epoch) return
  if (model.tag === "HalfOpen") {
    if (model.probe?.lease !== lease) return
    if (command.outcome === "ignored") model.probe = undefined
    else if (command.outcome === "failure") modelOpen(options, model, now)
    else Object.assign(model, { tag: "Closed", epoch: {}, log: [], probe: undefined })
    return
  }
  if (command.outcome === "success") {
    model.log.push({ at: now, ok: true })
    if (trailing(model, true) >= options.threshold) model.trips = 0
  }
  if (command.outcome === "failure") {
    model.log.push({ at: now, ok: false })
    if (command.mayOpen && modelTrips(options, model, now, command.siblings)) modelOpen(options, model, now)
  }
}

const modelTrips = (
  options: Options,
  model: Model,
  now: number,
  siblings: CircuitBreaker.Counts | undefined
): boolean => {
  if (trailing(model, false) >= options.threshold) return true
  if (options.rate === undefined) return false
  const recent = withinWindow(model, options.rate.windowMillis, now)
  const share = recent.filter((entry) => !entry.ok).length / recent.length
  if (recent.length < options.rate.minimumCalls || share < options.rate.faults) return false
  if (siblings === undefined) return true
  return siblings.calls !== 0 && share >= options.rate.siblingFactor * siblings.faults / siblings.calls
}

interface Step {
  readonly command: Command
  readonly now: number
  readonly before: State
  readonly after: State
  readonly admission: CircuitBreaker.Admission | undefined
  readonly model: Model
}

/** Runs a history on the code and on the model, and shows every step. */
const play = (options: Options, history: ReadonlyArray<Command>, check: (step: Step) => void): void => {
  const model = newModel()
  const leases: Array<{ readonly admission: CircuitBreaker.Admission; readonly model: ModelLease }> = []
  let state = CircuitBreaker.initial
  let now = 0
  for (const command of history) {
    const before = state
    let admission: CircuitBreaker.Admission | undefined
    switch (command.op) {
      case "advance":
        now += command.by
        break
      case "admit": {
        const [granted, next] = CircuitBreaker.admit(options, state, now, leases.length)
        const expected = modelAdmit(options, model, now)
        assert.strictEqual(granted !== undefined, expected !== undefined, "admitted")
        if (granted !== undefined && expected !== undefined) leases.push({ admission: granted, model: expected })
        admission = granted
        state = next
        break
      }
      case "record": {
        const lease = leases[leases.length - 1 - command.lease]
        if (lease === undefined) continue
        admission = lease.admission
        state = CircuitBreaker.record(options, state, now, lease.admission, command.outcome, command)
        modelRecord(options, model, now, lease.model, command)
        break
      }
      case "isolate":
        state = CircuitBreaker.isolate(state, now)
        if (model.until !== Infinity || model.tag !== "Open") {
          Object.assign(model, { tag: "Open", epoch: {}, until: Infinity, log: [], probe: undefined })
        }
        break
      case "reset":
        state = CircuitBreaker.reset(state)
        Object.assign(model, { tag: "Closed", epoch: {}, trips: 0, log: [], probe: undefined })
        break
    }
    check({ command, now, before, after: state, admission, model })
  }
}

const runs = { fastCheck: { numRuns: 1500 } }

describe("pure transitions", () => {
  it("agree with the model over any history, and the histories reach every transition", () => {
    const seen = new Set<string>()
    fc.assert(
      fc.property(
        optionsArbitrary,
        commands,
        (options, history) =>
          play(options, history, ({ after, before, command, model, now }) => {
            assert.strictEqual(after._tag, model.tag)
            assert.strictEqual(after.trips, model.trips)
            if (after._tag === "Open") assert.strictEqual(after.until, model.until)
            if (after._tag === "HalfOpen") assert.strictEqual(after.probe?.since, model.probe?.since)
            if (after._tag === "Closed") {
              assert.strictEqual(after.failures, trailing(model, false))
              if (options.rate !== undefined) {
                const recent = withinWindow(model, options.rate.windowMillis, now)
                assert.deepStrictEqual(CircuitBreaker.counts(after, now, options.rate.windowMillis), {
                  calls: recent.length,
                  faults: recent.filter((entry) => !entry.ok).length
                })
              }
            }
            const event = CircuitBreaker.transition(before, after, now)
            if (event !== undefined) {
              const byRate = event.to === "Open" && before._tag === "Closed" && command.op === "record" &&
                before.failures + 1 < options.threshold
              seen.add(`${event.from} ${event.to} by ${byRate ? "rate" : command.op}`)
            } else if (before._tag === "HalfOpen" && before !== after && command.op === "admit") {
              seen.add(before.probe === undefined ? "freed place taken" : "timed-out place taken")
            }
          })
      ),
      { numRuns: 3000 }
    )
    assert.includeMembers([...seen], [
      "Closed Open by record",
      "Closed Open by rate",
      "Open HalfOpen by admit",
      "HalfOpen Closed by record",
      "HalfOpen Open by record",
      "Closed Open by isolate",
      "Open Closed by reset",
      "freed place taken",
      "timed-out place taken"
    ])
  })

  it.prop("B2: at most one probe is live, whatever happens", [optionsArbitrary, commands], ([options, history]) => {
    let live: { readonly admission: CircuitBreaker.Admission; readonly since: number } | undefined
    play(options, history, ({ admission, after, before, command, now }) => {
      if (command.op === "admit" && admission !== undefined && after._tag !== "Closed") {
        assert.isTrue(admission.probe)
        assert.isTrue(live === undefined || now - live.since >= options.probeTimeoutMillis, "a second live probe")
        live = { admission, since: now }
      }
      if (command.op === "record" && live !== undefined && admission === live.admission) live = undefined
      if (before !== after && (command.op === "isolate" || command.op === "reset")) live = undefined
    })
  }, runs)

  it.prop(
    "B4: an outcome of an earlier generation changes nothing, neither way",
    [optionsArbitrary, commands],
    ([options, history]) =>
      play(options, history, ({ admission, after, before, command }) => {
        if (command.op === "record" && admission?.generation !== before.generation) assert.strictEqual(after, before)
      }),
    runs
  )

  it.prop(
    "B4: generations grow with every transition and every probe, and never otherwise",
    [optionsArbitrary, commands],
    ([options, history]) =>
      play(options, history, ({ admission, after, before, command, now }) => {
        const probed = command.op === "admit" && admission?.probe === true
        const moved = CircuitBreaker.transition(before, after, now) !== undefined
        const told = command.op === "reset" || (command.op === "isolate" && before !== after)
        assert.strictEqual(after.generation, before.generation + (probed || moved || told ? 1 : 0))
      }),
    runs
  )

  it.prop(
    "B1: an open circuit admits nobody before its time, and the time is always told",
    [optionsArbitrary, commands, fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true })],
    ([options, history, fraction]) =>
      play(options, history, ({ after, now }) => {
        if (after._tag === "Closed") {
          assert.strictEqual(CircuitBreaker.admits(options, after, now), "yes")
          return
        }
        const verdict = CircuitBreaker.admits(options, after, now)
        if (verdict === "probe" || verdict === "yes") {
          assert.strictEqual(verdict, "probe")
          assert.isTrue(after._tag !== "Open" || now >= after.until)
          return
        }
        assert.isAbove(verdict.until, now)
        assert.strictEqual(verdict.until, CircuitBreaker.opensAt(options, after))
        if (verdict.until === Infinity) {
          assert.isObject(CircuitBreaker.admits(options, after, Number.MAX_VALUE))
          return
        }
        const earlier = now + (verdict.until - now) * fraction
        if (earlier < verdict.until) assert.isObject(CircuitBreaker.admits(options, after, earlier))
        assert.strictEqual(CircuitBreaker.admits(options, after, verdict.until), "probe")
      }),
    runs
  )

  it.prop(
    "B1: the cooldown grows by the factor up to the cap, and stays with factor 1",
    [optionsArbitrary, fc.integer({ min: 1, max: 400 })],
    ([options, trips]) => {
      const cooldown = CircuitBreaker.cooldownMillis(options, trips)
      if (options.cooldownFactor === 1 || trips === 1) assert.strictEqual(cooldown, options.cooldownMillis)
      else {
        const shorter = CircuitBreaker.cooldownMillis(options, trips - 1)
        assert.approximately(cooldown, Math.min(options.maxCooldownMillis, shorter * options.cooldownFactor), 1e-6)
      }
    },
    runs
  )

  it.prop(
    "B5: answers that blame the caller leave a closed circuit as it is",
    [optionsArbitrary, commands, fc.constantFrom("alive" as const, "ignored" as const)],
    ([options, history, outcome]) =>
      play(options, history, ({ after, now }) => {
        if (after._tag !== "Closed") return
        const admission = { generation: after.generation, leaseId: -1, probe: false }
        assert.strictEqual(CircuitBreaker.record(options, after, now, admission, outcome), after)
      }),
    runs
  )

  const fail = (options: Options, state: State, now: number, evidence?: CircuitBreaker.Evidence): State => {
    const [admission, admitted] = CircuitBreaker.admit(options, state, now, 1)
    if (admission === undefined) throw new Error("not admitted")
    return CircuitBreaker.record(options, admitted, now, admission, "failure", evidence)
  }
  const succeed = (options: Options, state: State, now: number): State => {
    const [admission, admitted] = CircuitBreaker.admit(options, state, now, 1)
    if (admission === undefined) throw new Error("not admitted")
    return CircuitBreaker.record(options, admitted, now, admission, "success")
  }

  it("a success that changes nothing makes no new state", () => {
    assert.strictEqual(succeed(plain, CircuitBreaker.initial, 5), CircuitBreaker.initial)
  })

  it("B1: the defaults open at 3 failures for 30 s, then 60, 120, 240, 300, 300 s", () => {
    let state = CircuitBreaker.initial
    state = fail(plain, fail(plain, state, 0), 0)
    assert.strictEqual(state._tag, "Closed")
    let now = 1000
    state = fail(plain, state, now)
    const lengths: Array<number> = []
    for (let i = 0; i < 6; i++) {
      if (state._tag !== "Open") throw new Error(`not open but ${state._tag}`)
      lengths.push(state.until - now)
      now = state.until
      state = fail(plain, state, now)
    }
    assert.deepStrictEqual(lengths, [30_000, 60_000, 120_000, 240_000, 300_000, 300_000])
  })

  it("B1: a good probe closes it, but only `threshold` successes in a row reset the growth", () => {
    const closedAgain = succeed(plain, fail({ ...plain, threshold: 1 }, CircuitBreaker.initial, 0), 30_000)
    assert.strictEqual(closedAgain._tag, "Closed")
    const openFor = (state: State) => {
      const open = [1, 2, 3].reduce((s) => fail(plain, s, 40_000), state)
      return open._tag === "Open" ? open.until - 40_000 : undefined
    }
    assert.strictEqual(openFor(closedAgain), 60_000)
    const almost = succeed(plain, succeed(plain, closedAgain, 40_000), 40_000)
    assert.strictEqual(openFor(almost), 60_000)
    assert.strictEqual(openFor(succeed(plain, fail(plain, almost, 40_000), 40_000)), 60_000)
    assert.strictEqual(openFor(succeed(plain, almost, 40_000)), 30_000)
  })

  it("B1: the rate trip wants 10 outcomes, half of them faults, and thrice the siblings' share", () => {
    const options = { ...CircuitBreaker.defaultOptions, threshold: 100 }
    const mixed = (calls: number, faults: number): State => {
      let state = CircuitBreaker.initial
      for (let i = 0; i < calls; i++) state = i < calls - faults ? succeed(options, state, i) : fail(options, state, i)
      return state
    }
    const tagAfter = (calls: number, faults: number, siblings?: CircuitBreaker.Counts) =>
      fail(options, mixed(calls, faults), 20, { siblings })._tag
    assert.strictEqual(tagAfter(9, 4), "Open")
    assert.strictEqual(tagAfter(8, 7), "Closed")
    assert.strictEqual(tagAfter(10, 4), "Closed")
    assert.strictEqual(tagAfter(9, 4, { calls: 60, faults: 10 }), "Open")
    assert.strictEqual(tagAfter(9, 4, { calls: 60, faults: 11 }), "Closed")
    assert.strictEqual(tagAfter(9, 4, { calls: 0, faults: 0 }), "Closed")
    // Half a window later the outcomes still count, a whole one later they do not.
    assert.strictEqual(fail(options, mixed(9, 4), 29_999)._tag, "Open")
    assert.strictEqual(fail(options, mixed(9, 4), 30_000)._tag, "Closed")
  })

  it("a circuit that may not open opens at the next failure for which it may", () => {
    let state = CircuitBreaker.initial
    for (let i = 0; i < 10; i++) state = fail(plain, state, i, { mayOpen: false })
    assert.strictEqual(state._tag, "Closed")
    assert.strictEqual(fail(plain, state, 10)._tag, "Open")
    assert.strictEqual(fail(plain, succeed(plain, state, 10), 10)._tag, "Closed")
  })

  it("B3: an undecided probe gives up its place, and then decides nothing any more", () => {
    const options = { ...plain, threshold: 1 }
    const open = fail(options, CircuitBreaker.initial, 0)
    const [first, taken] = CircuitBreaker.admit(options, open, 30_000, 1)
    assert.deepStrictEqual(CircuitBreaker.admits(options, taken, 59_999), { until: 60_000 })
    const [second, retaken] = CircuitBreaker.admit(options, taken, 60_000, 2)
    if (first === undefined || second === undefined) throw new Error("not admitted")
    for (const outcome of ["success", "failure", "alive", "ignored"] as const) {
      assert.strictEqual(CircuitBreaker.record(options, retaken, 60_001, first, outcome), retaken)
    }
    // Nobody took the place: then it is never too late.
    assert.strictEqual(CircuitBreaker.record(options, taken, 99_000, first, "success")._tag, "Closed")
    assert.strictEqual(CircuitBreaker.record(options, retaken, 60_001, second, "success")._tag, "Closed")
  })

  it("B2: only the holder of the probe decides, even if generations coincide", () => {
    const taken = CircuitBreaker.takeProbe(fail({ ...plain, threshold: 1 }, CircuitBreaker.initial, 0), 0, 7)
    const { generation } = taken
    const told = (admission: CircuitBreaker.Admission) => CircuitBreaker.record(plain, taken, 1, admission, "success")
    assert.strictEqual(told({ generation, leaseId: 8, probe: true }), taken)
    assert.strictEqual(told({ generation, leaseId: 7, probe: false }), taken)
    assert.strictEqual(told({ generation, leaseId: 7, probe: true })._tag, "Closed")
  })

  it("an outcome that is told twice counts once where it decides", () => {
    const options = { ...plain, threshold: 1 }
    const [admission, taken] = CircuitBreaker.admit(options, fail(options, CircuitBreaker.initial, 0), 30_000, 1)
    if (admission === undefined) throw new Error("not admitted")
    const freed = CircuitBreaker.record(options, taken, 30_000, admission, "ignored")
    assert.strictEqual(CircuitBreaker.record(options, freed, 30_000, admission, "success"), freed)
    const [, retaken] = CircuitBreaker.admit(options, freed, 30_000, 1)
    assert.strictEqual(CircuitBreaker.record(options, retaken, 30_000, admission, "success"), retaken)
  })

  it.prop(
    "windows on one grid can be added and subtracted",
    [fc.array(fc.tuple(fc.nat(40), fc.boolean(), fc.boolean())), fc.integer({ min: 1, max: 60 })],
    ([outcomes, windowMillis]) => {
      let now = 0
      let [own, others, all] = [CircuitBreaker.emptyWindow, CircuitBreaker.emptyWindow, CircuitBreaker.emptyWindow]
      for (const [by, mine, fault] of outcomes) {
        now += by
        if (mine) own = CircuitBreaker.observe(own, now, windowMillis, fault)
        else others = CircuitBreaker.observe(others, now, windowMillis, fault)
        all = CircuitBreaker.observe(all, now, windowMillis, fault)
        const [a, b, sum] = [own, others, all].map((window) => CircuitBreaker.counts(window, now, windowMillis))
        assert.strictEqual((a?.calls ?? NaN) + (b?.calls ?? NaN), sum?.calls)
        assert.strictEqual((a?.faults ?? NaN) + (b?.faults ?? NaN), sum?.faults)
      }
    }
  )
})

describe("refund", () => {
  const options = CircuitBreaker.defaultOptions
  const failing = (times: number, now = 0): CircuitBreaker.State => {
    let state = CircuitBreaker.initial
    for (let i = 0; i < times; i++) {
      const [admission, admitted] = CircuitBreaker.admit(options, state, now, i)
      state = admission === undefined
        ? admitted
        : CircuitBreaker.record(options, admitted, now, admission, "failure", { mayOpen: times === 3 })
    }
    return state
  }

  it("F2: takes back failures that count, and the opening they led to, but no isolation", () => {
    const two = CircuitBreaker.refund(failing(2), 1, 0)
    assert.isTrue(two._tag === "Closed" && two.failures === 1 && two.calls === 1 && two.faults === 1)
    const none = CircuitBreaker.refund(failing(2), 9, 0)
    assert.isTrue(none._tag === "Closed" && none.failures === 0 && none.calls === 0 && none.faults === 0)
    const open = failing(3, 10)
    assert.strictEqual(open._tag, "Open")
    const closed = CircuitBreaker.refund(open, 3, 10)
    assert.isTrue(closed._tag === "Closed" && closed.trips === 0 && closed.generation > open.generation)
    assert.strictEqual(CircuitBreaker.refund(open, 3, 11), open, "it opened for what came before")
    const isolated = CircuitBreaker.isolate(open, 20)
    assert.strictEqual(CircuitBreaker.refund(isolated, 3, 0), isolated)
    const probing = CircuitBreaker.takeProbe(open, 60_000, 1)
    assert.strictEqual(CircuitBreaker.refund(probing, 0, 0), probing)
    assert.strictEqual(CircuitBreaker.refund(probing, 2, 0)._tag, "Closed")
  })
})

describe("persistence", () => {
  it.prop(
    "P1: what is loaded waits what was left, and never longer than the whole cooldown",
    [optionsArbitrary, commands, fc.integer({ min: -500, max: 500 }), fc.integer({ min: -500, max: 500 })],
    ([options, history, passed, skew]) =>
      play(options, history, ({ after, now }) => {
        const offset = 1.7e12
        const encoded = JSON.parse(JSON.stringify(
          Schema.encodeSync(CircuitBreaker.Stored)(CircuitBreaker.toStored(after, now, offset))
        ))
        const decoded = Schema.decodeUnknownSync(CircuitBreaker.Stored)(encoded)
        // Another process: its clock starts anew, the wall clock goes on, or was changed.
        const loaded = CircuitBreaker.fromStored(decoded, 7, offset + now + passed + skew - 7, 42)
        assert.strictEqual(loaded.generation, 42)
        assert.strictEqual(loaded.trips, after.trips)
        if (after._tag === "Closed") {
          assert.strictEqual(loaded._tag === "Closed" ? loaded.failures : undefined, after.failures)
        } else if (after._tag === "HalfOpen") {
          assert.strictEqual(CircuitBreaker.admits(options, loaded, 7), "probe")
        } else if (after.until === Infinity) {
          assert.deepStrictEqual(CircuitBreaker.admits(options, loaded, 7), { until: Infinity })
        } else {
          const wait = CircuitBreaker.opensAt(options, loaded) - 7
          const left = Math.max(0, after.until - now - passed - skew)
          assert.approximately(wait, Math.min(left, after.until - after.openedAt), 0.01)
        }
      }),
    { fastCheck: { numRuns: 200 } }
  )
})

describe("settings", () => {
  it("fills in the defaults", () => {
    assert.deepStrictEqual(CircuitBreaker.settings(), Either.right(CircuitBreaker.defaultOptions))
    assert.deepStrictEqual(CircuitBreaker.settings({ rate: undefined }), Either.right(CircuitBreaker.defaultOptions))
  })

  it("reads durations, and lets a long cooldown raise the cap that was not set", () => {
    assert.deepStrictEqual(
      CircuitBreaker.settings({
        threshold: 5,
        cooldown: "10 minutes",
        cooldownFactor: 1,
        probeTimeout: Duration.seconds(5),
        rate: { faults: 1, window: 1000 }
      }),
      Either.right({
        threshold: 5,
        cooldownMillis: 600_000,
        cooldownFactor: 1,
        maxCooldownMillis: 600_000,
        probeTimeoutMillis: 5000,
        rate: { faults: 1, minimumCalls: 10, windowMillis: 1000, siblingFactor: 3 }
      })
    )
    assert.deepStrictEqual(CircuitBreaker.settings({ rate: false }), Either.right(plain))
  })

  const wrong: ReadonlyArray<readonly [field: string, input: unknown]> = [
    ["threshold", { threshold: 0 }],
    ["threshold", { threshold: 1.5 }],
    ["threshold", { threshold: NaN }],
    ["threshold", { threshold: "3" }],
    ["cooldown", { cooldown: -1 }],
    ["cooldown", { cooldown: NaN }],
    ["cooldown", { cooldown: Infinity }],
    ["cooldown", { cooldown: "-5 seconds" }],
    ["cooldown", { cooldown: -5n }],
    ["cooldown", { cooldown: [-1, 0] }],
    ["cooldown", { cooldown: "soon" }],
    ["cooldownFactor", { cooldownFactor: 0.5 }],
    ["cooldownFactor", { cooldownFactor: Infinity }],
    ["maxCooldown", { maxCooldown: "1 second" }],
    ["maxCooldown", { maxCooldown: Duration.infinity }],
    ["probeTimeout", { probeTimeout: 0 }],
    ["rate", { rate: true }],
    ["rate.faults", { rate: { faults: 0 } }],
    ["rate.faults", { rate: { faults: 1.1 } }],
    ["rate.minimumCalls", { rate: { minimumCalls: 0 } }],
    ["rate.window", { rate: { window: 0 } }],
    ["rate.siblingFactor", { rate: { siblingFactor: -1 } }],
    ["rate.fault", { rate: { fault: 0.5 } }],
    ["cooldownMs", { cooldownMs: 5 }],
    ["halfOpenMaxCalls", { halfOpenMaxCalls: 1 }]
  ]
  it.each(wrong)("K3: refuses %s in %o", (field, input) => {
    // Any value may come from JavaScript.
    const settings = input as CircuitBreaker.Settings
    const fieldOf = (path?: string) =>
      Either.match(CircuitBreaker.settings(settings, path), { onLeft: (e) => e.field, onRight: () => "accepted" })
    assert.strictEqual(fieldOf(), field)
    assert.strictEqual(fieldOf("circuitBreaker"), `circuitBreaker.${field}`)
  })

  it.scoped("make fails with the ConfigurationError", () =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(CircuitBreaker.make({ threshold: -1 }))
      assert.strictEqual(error._tag, "ConfigurationError")
      assert.strictEqual(error.field, "threshold")
    }))
})

// ---------------------------------------------------------------------------------------------------------------------
// The service
// ---------------------------------------------------------------------------------------------------------------------

const boom = Effect.fail("boom")

const tagOf = (breaker: CircuitBreaker.Service) => Effect.map(breaker.state, (state) => state._tag)

const trip = (breaker: CircuitBreaker.Service) => Effect.replicateEffect(Effect.exit(breaker.execute(boom)), 3)

/** A call that runs until it is told how to end. */
const pending = (breaker: CircuitBreaker.Service) =>
  Effect.gen(function*() {
    const started = yield* Deferred.make<void>()
    const ending = yield* Deferred.make<string, string>()
    const fiber = yield* Effect.fork(
      breaker.execute(Effect.zipRight(Deferred.succeed(started, undefined), Deferred.await(ending)))
    )
    yield* Deferred.await(started)
    return { fiber, ending }
  })

describe("service", () => {
  it.scoped("B1: 3 faults open it, 30 s later a good probe closes it", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* breaker.execute(boom).pipe(Effect.ignore)
      yield* breaker.execute(boom).pipe(Effect.ignore)
      assert.strictEqual(yield* tagOf(breaker), "Closed")
      yield* breaker.execute(boom).pipe(Effect.ignore)
      assert.strictEqual(yield* tagOf(breaker), "Open")

      yield* TestClock.adjust("10 seconds")
      const refused = yield* Effect.flip(breaker.execute(boom))
      if (typeof refused === "string") throw new Error("the call ran")
      assert.strictEqual(refused._tag, "CircuitOpen")
      assert.strictEqual(refused.until, 30_000)
      assert.strictEqual(Duration.toMillis(refused.retryAfter), 20_000)

      yield* TestClock.adjust("19999 millis")
      assert.isTrue(Exit.isFailure(yield* Effect.exit(breaker.execute(Effect.succeed("early")))))
      yield* TestClock.adjust("1 millis")
      assert.strictEqual(yield* breaker.execute(Effect.succeed("good")), "good")
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("B1: a bad probe opens it for twice as long", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      assert.strictEqual(yield* Effect.flip(breaker.execute(boom)), "boom")
      const state = yield* breaker.state
      assert.strictEqual(state._tag === "Open" ? state.until : undefined, 90_000)
    }))

  it.scoped("B1: with factor 1 the cooldown stays", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make({ cooldownFactor: 1 })
      yield* trip(breaker)
      for (const until of [60_000, 90_000, 120_000]) {
        yield* TestClock.adjust("30 seconds")
        yield* Effect.flip(breaker.execute(boom))
        const state = yield* breaker.state
        assert.strictEqual(state._tag === "Open" ? state.until : undefined, until)
      }
    }))

  it.scoped("B2: of 50 concurrent callers exactly one probes", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      const started = yield* Ref.make(0)
      const call = breaker.execute(
        Effect.zipRight(Ref.update(started, (n) => n + 1), Effect.delay(Effect.succeed("ok"), "1 second"))
      )
      const fiber = yield* Effect.fork(Effect.all(Effect.replicate(Effect.either(call), 50), { concurrency: 50 }))
      yield* TestClock.adjust("1 second")
      const results = yield* Fiber.join(fiber)
      assert.strictEqual(yield* Ref.get(started), 1)
      assert.lengthOf(results.filter(Either.isRight), 1)
      for (const result of results) {
        if (Either.isLeft(result)) assert.strictEqual(Duration.toMillis(result.left.retryAfter), 30_000)
      }
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("B3: an answer that shows life closes it, although the call failed", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      assert.strictEqual(yield* Effect.flip(breaker.execute(boom, { classify: () => "alive" })), "boom")
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("B3: an interrupted probe frees its place at once", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      const probe = yield* pending(breaker)
      assert.isTrue(Either.isLeft(yield* Effect.either(breaker.execute(Effect.void))))
      yield* Fiber.interrupt(probe.fiber)
      assert.strictEqual(yield* tagOf(breaker), "HalfOpen")
      yield* breaker.execute(Effect.void)
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("B3: a probe undecided after 30 s frees its place, and its late failure changes nothing", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      const slow = yield* pending(breaker)
      yield* TestClock.adjust("29999 millis")
      assert.isTrue(Either.isLeft(yield* Effect.either(breaker.execute(Effect.void))))
      yield* TestClock.adjust("1 millis")
      const second = yield* pending(breaker)
      yield* Deferred.fail(slow.ending, "late")
      yield* Fiber.await(slow.fiber)
      assert.strictEqual(yield* tagOf(breaker), "HalfOpen")
      yield* Deferred.succeed(second.ending, "good")
      yield* Fiber.await(second.fiber)
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("B4: a late success of an older call does not close it, a late failure does not open it again", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      const older = yield* Effect.all(Array.from({ length: 6 }, () => pending(breaker)))
      yield* trip(breaker)
      const [success, ...failures] = older
      if (success === undefined) throw new Error("no calls")
      yield* Deferred.succeed(success.ending, "late")
      assert.strictEqual(yield* Fiber.join(success.fiber), "late")
      assert.strictEqual(yield* tagOf(breaker), "Open")
      yield* TestClock.adjust("30 seconds")
      yield* breaker.execute(Effect.void)
      const before = yield* breaker.state
      for (const call of failures) {
        yield* Deferred.fail(call.ending, "late")
        yield* Fiber.await(call.fiber)
      }
      assert.strictEqual(yield* breaker.state, before)
      assert.strictEqual(before._tag, "Closed")
    }))

  it.scoped("B5: a caller's bad requests never open it", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make({ threshold: 1, rate: { minimumCalls: 1 } })
      yield* Effect.replicateEffect(Effect.flip(breaker.execute(boom, { classify: () => "alive" })), 20)
      yield* Effect.replicateEffect(Effect.flip(breaker.execute(boom, { classify: () => "ignored" })), 20)
      assert.deepStrictEqual(yield* breaker.state, CircuitBreaker.initial)
    }))

  it.scoped("C5: interruption counts as nothing, also with a classify that knows better", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make({ threshold: 1 })
      const call = yield* pending(breaker)
      yield* Fiber.interrupt(call.fiber)
      const exit = yield* Effect.exit(breaker.execute(Effect.interrupt, { classify: () => "failure" }))
      assert.isTrue(Exit.isInterrupted(exit))
      assert.deepStrictEqual(yield* breaker.state, CircuitBreaker.initial)
    }))

  it.scoped("a defect is a failure, and comes out as it was", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make({ threshold: 1 })
      const exit = yield* Effect.exit(breaker.execute(Effect.die("bug")))
      assert.deepStrictEqual(exit, Exit.die("bug"))
      assert.strictEqual(yield* tagOf(breaker), "Open")
    }))

  it.scoped("a classify that throws keeps no probe's place, and both errors are told", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      const classify = (): CircuitBreaker.Outcome => {
        throw new Error("bug")
      }
      const cause = yield* Effect.sandbox(breaker.execute(boom, { classify })).pipe(Effect.flip)
      assert.deepStrictEqual([...Cause.failures(cause)], ["boom"])
      assert.strictEqual(Chunk.size(Cause.defects(cause)), 1)
      yield* breaker.execute(Effect.void)
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("isolate refuses until reset, and what ran before decides nothing", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      const call = yield* pending(breaker)
      yield* breaker.isolate
      yield* TestClock.adjust("1000 days")
      const refused = yield* Effect.flip(breaker.execute(Effect.void))
      assert.strictEqual(refused.until, Infinity)
      assert.isFalse(Duration.isFinite(refused.retryAfter))
      assert.include(refused.message, "isolated")
      yield* Deferred.succeed(call.ending, "done")
      yield* Fiber.await(call.fiber)
      assert.strictEqual(yield* tagOf(breaker), "Open")
      yield* breaker.reset
      yield* breaker.execute(Effect.void)
      assert.strictEqual(yield* tagOf(breaker), "Closed")
    }))

  it.scoped("admit and record do by hand what execute does", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      for (let i = 0; i < 3; i++) yield* breaker.record(yield* breaker.admit, "failure")
      const refused = yield* Effect.flip(breaker.admit)
      assert.strictEqual(Duration.toMillis(refused.retryAfter), 30_000)
      yield* TestClock.adjust("30 seconds")
      const probe = yield* breaker.admit
      assert.isTrue(probe.probe)
      yield* Effect.flip(breaker.admit)
      yield* breaker.record(probe, "success")
      assert.strictEqual(yield* tagOf(breaker), "Closed")
      yield* breaker.record(probe, "failure")
      assert.deepInclude(yield* breaker.state, { _tag: "Closed", failures: 0 })
    }))

  it.scoped("transitions tell closed, open, half-open, closed, and end with the scope", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const breaker = yield* Scope.extend(CircuitBreaker.make(), scope)
      const events = yield* Effect.fork(Stream.runCollect(breaker.transitions))
      yield* TestClock.adjust("1 millis")
      yield* trip(breaker)
      yield* TestClock.adjust("30 seconds")
      yield* breaker.execute(Effect.void)
      yield* TestClock.adjust("1 millis")
      yield* Scope.close(scope, Exit.void)
      const seen = Chunk.toReadonlyArray(yield* Fiber.join(events))
      assert.deepStrictEqual(seen, [
        { from: "Closed", to: "Open", at: 1, generation: 1, trips: 1, until: 30_001 },
        { from: "Open", to: "HalfOpen", at: 30_001, generation: 2, trips: 1, until: undefined },
        { from: "HalfOpen", to: "Closed", at: 30_001, generation: 3, trips: 1, until: undefined }
      ])
      // Calls that end after the scope notice nothing, and who comes to look finds an end.
      for (let i = 0; i < 3; i++) assert.strictEqual(yield* Effect.flip(breaker.execute(boom)), "boom")
      assert.strictEqual(yield* tagOf(breaker), "Open")
      assert.isTrue(Chunk.isEmpty(yield* Stream.runCollect(breaker.transitions)))
    }))

  it.scoped("T2: a stuck subscriber neither slows calls nor starves another", () =>
    Effect.gen(function*() {
      const breaker = yield* CircuitBreaker.make()
      yield* Effect.fork(Stream.runForEach(breaker.transitions, () => Effect.never))
      const read = yield* Queue.unbounded<CircuitBreaker.Transition>()
      yield* Effect.fork(Stream.runForEach(breaker.transitions, (event) => Queue.offer(read, event)))
      yield* TestClock.adjust("1 millis")
      for (let i = 0; i < 500; i++) {
        yield* breaker.isolate
        yield* breaker.reset
        if (i % 50 === 0) yield* TestClock.adjust("1 millis")
      }
      yield* TestClock.adjust("1 millis")
      const generations = [...yield* Queue.takeAll(read)].map((event) => event.generation)
      assert.deepStrictEqual(generations, Array.from({ length: 1000 }, (_, i) => i + 1))
    }))

  it.effect("layer and layerConfig provide it", () =>
    Effect.gen(function*() {
      const tripped = Effect.gen(function*() {
        const breaker = yield* CircuitBreaker.CircuitBreaker
        yield* breaker.execute(boom).pipe(Effect.ignore)
        const state = yield* breaker.state
        return state._tag === "Open" ? state.until - state.openedAt : undefined
      })
      const fromConfig = CircuitBreaker.layerConfig({
        threshold: Config.integer("THRESHOLD"),
        cooldown: Config.duration("COOLDOWN")
      })
      const provider = ConfigProvider.fromMap(new Map([["THRESHOLD", "1"], ["COOLDOWN", "7 seconds"]]))
      assert.strictEqual(
        yield* tripped.pipe(Effect.provide(CircuitBreaker.layer({ threshold: 1, cooldown: 5 }))),
        5
      )
      assert.strictEqual(
        yield* tripped.pipe(Effect.provide(fromConfig), Effect.withConfigProvider(provider)),
        7000
      )
      assert.strictEqual(
        (yield* Effect.flip(Effect.provide(tripped, CircuitBreaker.layer({ threshold: NaN })))).field,
        "threshold"
      )
    }))

  it.effect("makeWith works over a part of a larger state", () =>
    Effect.gen(function*() {
      const ref = yield* Ref.make({ other: "untouched", breaker: CircuitBreaker.initial })
      const breaker = CircuitBreaker.makeWith({
        options: plain,
        modify: (f) =>
          Effect.clockWith((clock) =>
            Ref.modify(ref, (all) => {
              const [value, next] = f(all.breaker, clock.unsafeCurrentTimeMillis())
              return [value, { ...all, breaker: next }]
            })
          ),
        transitions: Stream.empty
      })
      yield* trip(breaker)
      const all = yield* Ref.get(ref)
      assert.strictEqual(all.breaker._tag, "Open")
      assert.strictEqual(all.other, "untouched")
      assert.strictEqual(yield* breaker.state, all.breaker)
    }))
})
