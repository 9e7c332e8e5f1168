import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import type * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import type { PoolError } from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Strategy from "../src/Strategy.js"
import * as Telemetry from "../src/Telemetry.js"
import { Simulation } from "./support/pool-simulation.js"

// ---------------------------------------------------------------------------------------------------------------------
// Programs
// ---------------------------------------------------------------------------------------------------------------------

/** What one attempt does: waits, then ends somehow. */
interface Act {
  readonly wait: number
  readonly yields: number
  readonly end: "ok" | "never" | "die" | "alien" | Fault.Fault
}

interface Caller {
  readonly how: "run" | "stream" | "lease"
  readonly start: number
  readonly model: string | undefined
  readonly deadline: number | undefined
  /** One act per attempt; the last one for all that follow. */
  readonly acts: ReadonlyArray<Act>
  /** For streams: elements before the one that commits, and how long the reader dwells on each. */
  readonly pings: number
  readonly dwell: number
  /** For streams: how many elements are read; for leases: whether the outcome is said before the scope closes. */
  readonly take: number
}

interface Program {
  readonly keys: ReadonlyArray<{ readonly concurrency: number | undefined; readonly models: boolean }>
  readonly group: boolean
  readonly strategy: Strategy.Strategy
  readonly floor: boolean
  readonly hedge: KeyPool.Settings["hedge"]
  readonly listened: boolean
  readonly ops: number
  readonly callers: ReadonlyArray<Caller>
}

const refusals = ["QuotaExhausted", "Unauthorized", "Forbidden", "Overloaded", "Rejected"] as const

const fault = FastCheck.oneof(
  { weight: 3, arbitrary: FastCheck.constantFrom(undefined, 300).map((wait) => Fault.make("RateLimited", { wait })) },
  {
    weight: 2,
    arbitrary: FastCheck.boolean().map((perModel) => Fault.make("RateLimited", { scope: "group", perModel }))
  },
  {
    weight: 4,
    arbitrary: FastCheck.constantFrom("ServerError" as const, "Network" as const).map((kind) => Fault.make(kind))
  },
  {
    weight: 2,
    arbitrary: FastCheck.constantFrom(...refusals).map((
      kind
    ) => Fault.make(kind))
  }
)

const act: FastCheck.Arbitrary<Act> = FastCheck.record({
  wait: FastCheck.constantFrom(0, 0, 1, 100, 400, 2000),
  yields: FastCheck.constantFrom(0, 0, 1, 3),
  end: FastCheck.oneof(
    { weight: 4, arbitrary: FastCheck.constant("ok" as const) },
    { weight: 5, arbitrary: fault },
    { weight: 1, arbitrary: FastCheck.constantFrom("never" as const, "die" as const, "alien" as const) }
  )
})

const caller: FastCheck.Arbitrary<Caller> = FastCheck.record({
  how: FastCheck.constantFrom("run", "run", "stream", "lease"),
  start: FastCheck.constantFrom(0, 0, 0, 1, 100, 300, 1000, 3000),
  model: FastCheck.constantFrom(undefined, undefined, "m1", "m2"),
  deadline: FastCheck.constantFrom(undefined, undefined, undefined, 100, 400, 1500),
  acts: FastCheck.array(act, { minLength: 1, maxLength: 4 }),
  pings: FastCheck.nat(2),
  dwell: FastCheck.constantFrom(0, 0, 50),
  take: FastCheck.integer({ min: 0, max: 4 })
})

const program: FastCheck.Arbitrary<Program> = FastCheck.record({
  keys: FastCheck.array(
    FastCheck.record({ concurrency: FastCheck.constantFrom(undefined, 1, 1, 2), models: FastCheck.boolean() }),
    { minLength: 1, maxLength: 3 }
  ),
  group: FastCheck.boolean(),
  strategy: FastCheck.constantFrom(Strategy.roundRobin, Strategy.leastUsed, Strategy.powerOfTwoChoices),
  floor: FastCheck.boolean(),
  // As many as there are calls, however badly it goes.
  hedge: FastCheck.constantFrom(undefined, undefined, 1, 50, 200).map((delay) =>
    delay === undefined ? undefined : { delay, share: 1, success: 0 }
  ),
  listened: FastCheck.boolean(),
  ops: FastCheck.constantFrom(24, 37, 2048),
  callers: FastCheck.array(caller, { minLength: 1, maxLength: 6 })
})

const strikes = FastCheck.array(
  FastCheck.record({ caller: FastCheck.nat(5), share: FastCheck.double({ min: 0, max: 1, noNaN: true }) }),
  { minLength: 1, maxLength: 5 }
)

// ---------------------------------------------------------------------------------------------------------------------
// One run
// ---------------------------------------------------------------------------------------------------------------------

/** Longer than any budget and cooldown of these pools, and much shorter than probes and trials may stay undecided. */
const horizon = 60_000
const hour = 3_600_000

interface Run {
  readonly steps: number
  /** After how many steps the last caller had ended. */
  readonly ended: number
  readonly exits: ReadonlyArray<Exit.Exit<unknown, unknown>>
}

/** Buffers as large as a program needs, not a server: they are made thousands of times here. */
const services = Layer.merge(Layer.orDie(Telemetry.layerWith({ capacity: 64, changes: 64 })), PoolStore.layerMemory)

const play = (
  { callers, floor, group, hedge, keys, listened, ops, strategy }: Program,
  disturb: (
    simulation: Simulation,
    fibers: ReadonlyArray<Fiber.RuntimeFiber<unknown, unknown>>,
    close: () => void,
    pool: KeyPool.Service
  ) => void
): Run => {
  const simulation = new Simulation("programs", ops)
  const scope = simulation.get(Scope.make())
  const { pool, telemetry } = simulation.get(
    Effect.gen(function*() {
      const context = yield* Layer.buildWithScope(services, scope)
      const telemetry = yield* Effect.provide(Telemetry.Telemetry, context)
      const pool = yield* KeyPool.make({
        keys: keys.map(({ concurrency, models }, n) => ({
          secret: `secret-${n}`,
          label: `key-${n}`,
          quotaGroup: group ? "group" : undefined,
          limits: { concurrency },
          models: models ? ["m1"] : undefined
        })),
        strategy,
        floor: floor ? "1 second" : false,
        hedge,
        budget: "20 seconds",
        retryTokens: false,
        // A probe or trial that is not given back then shows.
        breaker: { threshold: 2, cooldown: 1000, maxCooldown: 4000, probeTimeout: hour },
        trialTimeout: hour,
        cooldowns: {
          rateLimited: { first: 300, max: 2000 },
          quotaExhausted: 2000,
          revoked: 3000,
          unauthorized: [500, 2000],
          forbidden: { first: 500, max: 2000 }
        },
        streamIdle: hour
      }).pipe(Effect.provide(context), Scope.extend(scope))
      return { pool, telemetry }
    })
  )
  if (listened) simulation.fork(Stream.runDrain(telemetry.stream))
  simulation.settle()
  const started = simulation.steps
  const fibers = callers.map((caller) => simulation.fork(callOf(pool, caller)))
  let ended = 0
  for (const fiber of fibers) fiber.addObserver(() => ended = simulation.steps - started)
  let waitingAtClose = 0
  disturb(simulation, fibers, () => {
    waitingAtClose = -1
    const closing = simulation.fork(
      Effect.zipRight(
        Effect.tap(pool.snapshot, ({ waiting }) =>
          Effect.sync(() => {
            waitingAtClose = waiting
          })),
        Scope.close(scope, Exit.void)
      )
    )
    closing.addObserver((exit) => assert.isTrue(Exit.isSuccess(exit), "the pool closes"))
  }, pool)
  simulation.runUntil(horizon)
  const steps = simulation.steps - started
  for (const [i, fiber] of fibers.entries()) {
    const stuck = fiber.unsafePoll() === null && !mayStay(callers[i])
    assert.isFalse(stuck, `caller ${i} hangs`)
    simulation.interrupt(fiber)
  }
  simulation.settle()
  const exits = fibers.map((fiber, i) => fiber.unsafePoll() ?? assert.fail(`caller ${i} cannot be interrupted`))
  const after = simulation.get(pool.snapshot)
  assert.strictEqual(after.waiting, 0, "nobody waits")
  assert.deepStrictEqual(after.keys.map((key) => key.inFlight), after.keys.map(() => 0), "C6: nothing in flight")
  for (const key of after.keys) {
    assert.notStrictEqual(key.closed?.gate, "probing", `${key.label} is still tried by nobody`)
  }
  // By then what was learned of limits is forgotten.
  simulation.runUntil(2 * horizon + 600_000)
  const late = simulation.get(pool.snapshot)
  assert.deepStrictEqual(
    late.keys.map((key) => key.closed),
    late.keys.map(() => undefined),
    "every key may serve again"
  )
  for (const { closedModels, label } of late.keys) {
    assert.deepStrictEqual(
      closedModels.filter(({ gate }) => gate !== "model"),
      [],
      `${label} may serve every model again`
    )
  }
  if (waitingAtClose === 0 && !late.closed) {
    // Fresh calls: one decides the trial of a group, if there is one; then one on each key, all at once.
    simulation.get(pool.run(() => Effect.void))
    const ids = simulation.get(Effect.scoped(
      Effect.map(Effect.all(late.keys.map(() => pool.lease)), (leases) => leases.map((lease) => lease.id))
    ))
    assert.lengthOf(ids, late.keys.length)
    for (const model of ["m1", undefined]) simulation.get(pool.run(() => Effect.void, { model }))
    assert.strictEqual(simulation.get(pool.snapshot).inFlight, 0)
  } else {
    assert.isTrue(late.closed)
    const refused = exits.filter((exit) =>
      Exit.isFailure(exit) && Cause.failures(exit.cause).pipe((errors) => [...errors].some(isClosed))
    )
    assert.isAtLeast(refused.length, waitingAtClose, "everybody who waited is told that the pool is closed")
  }
  return { steps, ended, exits }
}

const isClosed = (error: unknown): boolean =>
  typeof error === "object" && error !== null && "_tag" in error && error._tag === "PoolClosed"

function usually(caller: Partial<Caller>): Caller {
  return {
    how: "run",
    start: 0,
    model: undefined,
    deadline: undefined,
    acts: [{ wait: 100, yields: 0, end: "ok" }],
    pings: 0,
    dwell: 0,
    take: 4,
    ...caller
  }
}

/** Whether an attempt may hold its caller for ever. */
const mayStay = (caller: Caller | undefined): boolean => caller?.acts.some((act) => act.end === "never") === true

const callOf = (pool: KeyPool.Service, caller: Caller): Effect.Effect<unknown, unknown> => {
  const { acts, deadline, dwell, how, model, pings, start, take } = caller
  const answer = (attempt: number): Effect.Effect<string, Fault.Fault | "alien"> => {
    const act = acts[Math.min(attempt, acts.length) - 1] ?? { wait: 0, yields: 0, end: "ok" }
    const { end } = act
    const ended: Effect.Effect<string, Fault.Fault | "alien"> = end === "ok"
      ? Effect.succeed("answer")
      : end === "never"
      ? Effect.never
      : end === "die"
      ? Effect.die("dies")
      : Effect.fail(end)
    return Effect.sleep(act.wait).pipe(
      Effect.when(() => act.wait > 0),
      Effect.zipRight(Effect.repeatN(Effect.yieldNow(), act.yields)),
      Effect.zipRight(ended)
    )
  }
  const call: Effect.Effect<unknown, PoolError | Fault.Fault | "alien"> = how === "run"
    ? pool.run((lease) => answer(lease.attempt), { model })
    : how === "stream"
    ? pool.stream(
      (lease) =>
        Stream.fromIterable(Array.from({ length: pings }, () => "ping")).pipe(
          Stream.rechunk(1),
          Stream.concat(Stream.fromEffect(answer(lease.attempt))),
          Stream.concat(Stream.fromIterable(["more", "more", "more"]).pipe(Stream.rechunk(1))),
          Stream.concat(Stream.drain(Stream.fromEffect(answer(lease.attempt + 1))))
        ),
      { model, commits: (element) => element !== "ping" }
    ).pipe(
      Stream.tap(() => dwell > 0 ? Effect.sleep(dwell) : Effect.void),
      Stream.take(take),
      Stream.runDrain
    )
    : Effect.scoped(Effect.flatMap(pool.lease, (lease) =>
      Effect.flatMap(Effect.exit(answer(1)), (exit) => {
        const outcome = Exit.isSuccess(exit) ? Outcome.success : Outcome.fromExit(exit)
        const said = take > 0 ? lease.commit(outcome) : Effect.void
        return Effect.zipRight(said, Effect.zipRight(Effect.exit(answer(2)), take > 2 ? lease.end : Effect.void))
      })))
  return Effect.sleep(start).pipe(
    Effect.zipRight(deadline === undefined ? call : CallOptions.withDeadline(call, deadline))
  )
}

const succeeding: Act = { wait: 10, yields: 0, end: "ok" }
const failing = (kind: Fault.Kind): Act => ({ wait: 10, yields: 0, end: Fault.make(kind) })

const plain: Program = {
  keys: [{ concurrency: undefined, models: false }],
  group: false,
  strategy: Strategy.roundRobin,
  floor: false,
  hedge: undefined,
  listened: false,
  ops: 2048,
  callers: []
}

const usual: Record<string, Caller> = {
  "a call": usually({ how: "run" }),
  "a call that fails over": usually({ how: "run", acts: [failing("RateLimited"), succeeding] }),
  "a call that backs off": usually({ how: "run", acts: [failing("ServerError"), failing("ServerError"), succeeding] }),
  "a call with a deadline": usually({ how: "run", deadline: 100, acts: [{ ...succeeding, wait: 100 }] }),
  "a stream": usually({ how: "stream" }),
  "a stream with pings": usually({ how: "stream", pings: 2, dwell: 50 }),
  "a stream that fails over": usually({ how: "stream", pings: 1, acts: [failing("RateLimited"), succeeding] }),
  "a stream with a deadline": usually({ how: "stream", deadline: 100, acts: [{ ...succeeding, wait: 100 }] }),
  "a lease": usually({ how: "lease" })
}

describe("KeyPool", () => {
  it("C5, C6, B2: whoever is interrupted, whenever, nothing is left held and nobody is lost", () => {
    FastCheck.assert(
      FastCheck.property(program, strikes, (program, strikes) => {
        const { steps } = play(program, () => {})
        play(program, (simulation, fibers) => {
          for (const { caller, share } of strikes) {
            const fiber = fibers[caller % fibers.length]
            if (fiber !== undefined) {
              simulation.strike(simulation.steps + Math.round(share * steps), () => simulation.interrupt(fiber))
            }
          }
        })
      }),
      { numRuns: 60 }
    )
  })

  it("A6, C5, C6: nor when two attempts of a call run side by side, whoever fails, is answered or interrupted", () => {
    const two = FastCheck.array(
      FastCheck.record({ concurrency: FastCheck.constantFrom(undefined, 1, 2), models: FastCheck.constant(false) }),
      { minLength: 2, maxLength: 3 }
    )
    const hedged = FastCheck.record({
      delay: FastCheck.constantFrom(1, 50, 100, 400),
      share: FastCheck.constant(1),
      success: FastCheck.constantFrom(0, 0.5)
    })
    FastCheck.assert(
      FastCheck.property(program, two, hedged, strikes, (program, keys, hedge, strikes) => {
        const mixed = { ...program, keys, hedge, group: false }
        const { steps } = play(mixed, () => {})
        play(mixed, (simulation, fibers) => {
          for (const { caller, share } of strikes) {
            const fiber = fibers[caller % fibers.length]
            if (fiber !== undefined) {
              simulation.strike(simulation.steps + Math.round(share * steps), () => simulation.interrupt(fiber))
            }
          }
        })
      }),
      { numRuns: 60 }
    )
  })

  for (const [what, caller] of Object.entries(usual)) {
    it(`C5, C6: nothing is left held when ${what} is interrupted, wherever it is`, () => {
      // Streams run in a fiber of their own: only where that gives way can an interruption of the reader overtake it.
      for (const ops of caller.how === "stream" ? [24, 29, 2048] : [2048]) {
        const program = { ...plain, ops, callers: [caller] }
        const { ended } = play(program, () => {})
        const stride = Math.max(1, Math.floor(ended / 120))
        for (let step = 0; step <= ended; step += stride) {
          play(program, (simulation, [fiber]) => {
            if (fiber !== undefined) simulation.strike(simulation.steps + step, () => simulation.interrupt(fiber))
          })
        }
      }
    })
  }

  const raced: Record<string, Caller> = {
    "is answered by its second attempt": usually({ acts: [{ ...succeeding, wait: 400 }, succeeding] }),
    "is answered by its first attempt after all": usually({ acts: [succeeding, { ...succeeding, wait: 400 }] }),
    "has two attempts that are answered at once": usually({ acts: [{ ...succeeding, wait: 60 }, succeeding] }),
    "has two attempts that fail": usually({
      acts: [{ ...failing("ServerError"), wait: 80 }, failing("RateLimited"), succeeding]
    }),
    "is a stream of its second attempt": usually({
      how: "stream",
      pings: 1,
      acts: [{ ...succeeding, wait: 400 }, succeeding]
    }),
    "has two streams that commit at once": usually({
      how: "stream",
      acts: [{ ...succeeding, wait: 60 }, succeeding]
    }),
    "has a deadline": usually({ deadline: 70, acts: [{ ...succeeding, wait: 400 }, { ...succeeding, wait: 400 }] })
  }
  for (const [what, caller] of Object.entries(raced)) {
    it(`A6, C5, C6: nothing is left held when a hedged call that ${what} is interrupted, wherever it is`, () => {
      const keys = [...plain.keys, ...plain.keys, ...plain.keys]
      const program = { ...plain, keys, ops: 24, hedge: { delay: 50, share: 1, success: 0 }, callers: [caller] }
      const { ended } = play(program, () => {})
      const stride = Math.max(1, Math.floor(ended / 100))
      for (let step = 0; step <= ended; step += stride) {
        play(program, (simulation, [fiber]) => {
          if (fiber !== undefined) simulation.strike(simulation.steps + step, () => simulation.interrupt(fiber))
        })
      }
    })
  }

  it("C6: a `classify` that throws leaves nothing in flight", () => {
    const thrown = (exit: "ok" | Fault.Fault) =>
      play(plain, (simulation, _fibers, _close, pool) => {
        const attempt = exit === "ok" ? Effect.void : Effect.fail(exit)
        const options = {
          classify: () => {
            throw new Error("a bug of the caller")
          }
        }
        simulation.fork(Effect.exit(pool.run(() => attempt, options)))
        simulation.fork(
          Effect.exit(Stream.runDrain(pool.stream(() => Stream.fromEffect(attempt), options)))
        )
      })
    thrown("ok")
    thrown(Fault.make("ServerError"))
  })

  it("S2: an empty chunk among what is held back commits nothing", () => {
    const failed = Stream.concat(Stream.make("ping", "nothing", "ping"), Stream.fail(Fault.make("RateLimited")))
    play({ ...plain, keys: [...plain.keys, ...plain.keys] }, (simulation, _fibers, _close, pool) => {
      const read = simulation.get(Stream.runCollect(
        pool.stream(
          (lease) =>
            (lease.attempt === 1 ? failed : Stream.make("content")).pipe(
              Stream.rechunk(1),
              Stream.filter((element) => element !== "nothing")
            ),
          { commits: (element) => element === "content" }
        )
      ))
      assert.deepStrictEqual([...read], ["content"])
    })
  })

  it("C5: a key that is given to a waiter in the instant of its interruption goes to the next one", () => {
    const keys = [{ concurrency: 1, models: false }]
    play({ ...plain, keys }, (simulation, _fibers, _close, pool) => {
      const scope = simulation.get(Scope.make())
      const held = simulation.get(Scope.extend(pool.lease, scope))
      const first = simulation.fork(pool.run(() => Effect.succeed("first")))
      const second = simulation.fork(pool.run(() => Effect.succeed("second")))
      simulation.settle()
      assert.strictEqual(simulation.get(pool.snapshot).waiting, 2)
      // In one go: the waiter has its answer before it can look, and is interrupted then.
      simulation.get(Effect.zipRight(held.end, Effect.sync(() => simulation.interrupt(first))))
      const exit = first.unsafePoll()
      assert.isTrue(exit !== null && Exit.isInterrupted(exit))
      assert.deepStrictEqual(second.unsafePoll(), Exit.succeed("second"))
      simulation.get(Scope.close(scope, Exit.void))
    })
  })

  it("closing the pool at any moment refuses everybody who waits, and nobody hangs", () => {
    FastCheck.assert(
      FastCheck.property(program, FastCheck.double({ min: 0, max: 1, noNaN: true }), (program, share) => {
        const { steps } = play(program, () => {})
        play(program, (simulation, _fibers, close) => {
          simulation.strike(simulation.steps + Math.round(share * steps), close)
        })
      }),
      { numRuns: 60 }
    )
  })
})
