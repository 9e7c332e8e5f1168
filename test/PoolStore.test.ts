import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as ApiKey from "../src/ApiKey.js"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import type { StoredPool } from "../src/PoolRecord.js"
import * as PoolStore from "../src/PoolStore.js"
import * as PoolUpkeep from "../src/PoolUpkeep.js"
import * as Telemetry from "../src/Telemetry.js"

const idOf = (input: ApiKey.Input): string => Either.getOrThrow(ApiKey.make(input)).id
const one = idOf("sk-one")
const keys = ["sk-one", "sk-two"]

const record: StoredPool = {
  version: 1,
  savedAt: 5,
  keys: [{
    id: one,
    enabled: true,
    total: 3,
    successes: 1,
    faults: 2,
    ignored: 0,
    breaker: { _tag: "Closed", failures: 1, trips: 0 },
    bench: {
      kind: "RateLimited",
      until: 60_000,
      waitMillis: 60_000,
      provenance: "told",
      firmMillis: 60_000,
      refused: false,
      step: 1
    }
  }],
  groups: [],
  models: []
}

/** Runs a pool on a store, and hands it over with the problems that it tells of its store. */
const withPool = <A, E>(
  store: PoolStore.Service,
  use: (pool: KeyPool.Service, problems: ReadonlyArray<string>) => Effect.Effect<A, E, Scope.Scope>,
  settings: Partial<KeyPool.Settings> = {}
) =>
  Effect.scoped(Effect.gen(function*() {
    const telemetry = yield* Telemetry.Telemetry
    const problems: Array<string> = []
    yield* Effect.forkScoped(Stream.runForEach(telemetry.stream, (event) =>
      Effect.sync(() => {
        if (event._tag === "store.degraded") problems.push(event.problem)
      })))
    yield* Effect.yieldNow()
    const pool = yield* Effect.provideService(KeyPool.make({ keys, ...settings }), PoolStore.PoolStore, store)
    yield* TestClock.adjust("1 millis")
    return yield* use(pool, problems)
  })).pipe(Effect.provide(Telemetry.layer))

const limited = Fault.make("RateLimited", { wait: "1 minute" })

/** Puts the first key on a bench of a minute. */
const benchFirst = (pool: KeyPool.Service) =>
  pool.run((lease) => lease.key.id === one ? Effect.fail(limited) : Effect.void)

/** A store that counts, and can be told to fail or to hang. */
const makeFlaky = Effect.gen(function*() {
  const memory = yield* PoolStore.makeMemory
  const mode = yield* Ref.make<"works" | "fails" | "dies" | "hangs">("works")
  const saves = yield* Ref.make(0)
  const obey = <A>(effect: Effect.Effect<A, PoolStore.StoreError>): Effect.Effect<A, PoolStore.StoreError> =>
    Effect.flatMap(Ref.get(mode), (mode) => {
      switch (mode) {
        case "works":
          return effect
        case "fails":
          return new PoolStore.StoreError({ problem: "unreachable", detail: "connection refused" })
        case "dies":
          return Effect.die(new Error("a bug in the store"))
        case "hangs":
          return Effect.never
      }
    })
  const store: PoolStore.Service = {
    load: (pool) => obey(memory.load(pool)),
    save: (pool, record) => Effect.zipRight(Ref.update(saves, (n) => n + 1), obey(memory.save(pool, record)))
  }
  return { store, memory, mode, saves }
})

const cooling = (pool: KeyPool.Service) =>
  Effect.map(pool.snapshot, ({ keys }) => keys.filter((key) => key.closed?.gate === "cooldown").map((key) => key.id))

/** What an effect gives when the clock has moved on by a while; an effect that still hangs stays behind. */
const endsWithin = <A, E, R>(effect: Effect.Effect<A, E, R>, millis: number) =>
  Effect.gen(function*() {
    const fiber = yield* Effect.forkDaemon(effect)
    yield* TestClock.adjust(millis)
    const done = yield* Fiber.poll(fiber)
    return yield* Option.getOrElse(done, () => Exit.die(new Error(`it did not end within ${millis} ms`)))
  })

/** A pool that must be there a second later. */
const built = (store: PoolStore.Service, scope: Scope.Scope) =>
  Effect.gen(function*() {
    const telemetry = yield* Scope.extend(Telemetry.make(), yield* Scope.make())
    const make = KeyPool.make({ keys }).pipe(
      Effect.provideService(Telemetry.Telemetry, telemetry),
      Effect.provideService(PoolStore.PoolStore, store),
      Scope.extend(scope)
    )
    return { telemetry, pool: yield* endsWithin(make, 1_100) }
  })

describe("the store in memory", () => {
  it.effect("gives back what was saved last under a name, and nothing else", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      assert.isTrue(Option.isNone(yield* store.load("a")))
      yield* store.save("a", record)
      yield* store.save("b", { ...record, savedAt: 6 })
      yield* store.save("a", { ...record, savedAt: 7 })
      assert.strictEqual(Option.getOrThrow(yield* store.load("a")).savedAt, 7)
      assert.strictEqual(Option.getOrThrow(yield* store.load("b")).savedAt, 6)
      assert.isTrue(Option.isNone(yield* store.load("c")))
    }))

  it.effect("comes as a layer, one for all that share it", () =>
    Effect.gen(function*() {
      yield* Effect.flatMap(PoolStore.PoolStore, (store) => store.save("a", record))
      const found = yield* Effect.flatMap(PoolStore.PoolStore, (store) => store.load("a"))
      assert.deepStrictEqual(Option.getOrThrow(found), record)
    }).pipe(Effect.provide(PoolStore.layerMemory)))
})

describe("encoding", () => {
  it.effect("goes to JSON and back", () =>
    Effect.gen(function*() {
      const json: unknown = JSON.parse(JSON.stringify(PoolStore.encode(record)))
      assert.deepStrictEqual(yield* PoolStore.decode(json), record)
    }))

  const broken: ReadonlyArray<readonly [what: string, json: unknown, named: string]> = [
    ["no object", "garbage", ""],
    ["nothing", undefined, ""],
    ["an older version", { ...record, version: 0 }, "version"],
    ["a newer version", { ...record, version: 2 }, "version"],
    ["no keys", { ...record, keys: undefined }, "keys"],
    ["a negative counter", { ...record, keys: [{ ...record.keys[0], total: -1 }] }, "keys.0.total"],
    ["an unknown breaker", { ...record, keys: [{ ...record.keys[0], breaker: { _tag: "Ajar" } }] }, "keys.0.breaker"],
    ["a wait without end", {
      ...record,
      groups: [{ group: "g", bench: { ...record.keys[0]?.bench, waitMillis: Infinity } }]
    }, "groups.0.bench.waitMillis"]
  ]
  for (const [what, json, named] of broken) {
    it.effect(`P3: ${what} is unreadable, and the error says where`, () =>
      Effect.gen(function*() {
        const error = yield* Effect.flip(PoolStore.decode(json))
        assert.deepStrictEqual([error._tag, error.problem], ["StoreError", "unreadable"])
        assert.include(error.detail, named)
        assert.include(error.message, "unreadable")
        assert.isFalse(error.message.endsWith(": "), "the message says what is wrong")
      }))
  }

  it.effect("P3: no error shows what the record holds", () =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(PoolStore.decode({ version: "sk-live-Zq83hTm1PvKx90Lw" }))
      assert.notInclude(`${error.message} ${JSON.stringify(error)}`, "Zq83hTm1PvKx90Lw")
    }))
})

describe("P1", () => {
  it.effect("P1: a pool of the same name, built later, knows the cooldowns of the first", () =>
    Effect.gen(function*() {
      const first = yield* Layer.build(KeyPool.layer({ keys, name: "openai" })).pipe(
        Effect.flatMap((context) => Effect.provide(Effect.flatMap(KeyPool.KeyPool, benchFirst), context)),
        Effect.scoped,
        Effect.exit
      )
      assert.isTrue(Exit.isSuccess(first))
      yield* TestClock.adjust("10 seconds")
      yield* Effect.scoped(Effect.gen(function*() {
        const second = yield* KeyPool.make({ keys, name: "openai" })
        assert.deepStrictEqual(yield* cooling(second), [one])
        const used = new Set<string>()
        yield* Effect.repeatN(second.run((lease) => Effect.sync(() => used.add(lease.key.id))), 5)
        assert.isFalse(used.has(one))
        yield* TestClock.adjust("49 seconds")
        assert.deepStrictEqual(yield* cooling(second), [one])
        yield* TestClock.adjust("1100 millis")
        assert.deepStrictEqual(yield* cooling(second), [])
        const stranger = yield* KeyPool.make({ keys, name: "anthropic" })
        assert.deepStrictEqual(yield* cooling(stranger), [])
      }))
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.effect("P1: what was learned is saved soon, not only at the end, and a storm of changes is one record", () =>
    Effect.gen(function*() {
      const { memory, saves, store } = yield* makeFlaky
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          yield* TestClock.adjust("5 seconds")
          const before = yield* Ref.get(saves)
          yield* benchFirst(pool)
          for (let n = 0; n < 50; n++) yield* Effect.zipRight(pool.disable(idOf("sk-two")), pool.enable(idOf("sk-two")))
          yield* TestClock.adjust("2 seconds")
          const saved = Option.getOrThrow(yield* memory.load("default"))
          assert.strictEqual(saved.keys.find((key) => key.id === one)?.bench?.kind, "RateLimited")
          assert.isAtMost((yield* Ref.get(saves)) - before, 2)
        }))
    }))

  it.effect("P1: the counters are saved when the pool closes, without secrets, and nothing in flight", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          yield* Effect.repeatN(pool.run(() => Effect.void), 5)
          yield* Effect.forkScoped(pool.run(() => Effect.never))
          yield* TestClock.adjust("1 millis")
        }))
      const saved = Option.getOrThrow(yield* store.load("default"))
      assert.deepStrictEqual(saved.keys.map((key) => [key.id, key.successes]), [[one, 3], [idOf("sk-two"), 3]])
      assert.notInclude(JSON.stringify(PoolStore.encode(saved)), "sk-")
      assert.notInclude(JSON.stringify(PoolStore.encode(saved)), "inFlight")
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          const { inFlight, keys } = yield* pool.snapshot
          assert.strictEqual(inFlight, 0)
          assert.deepStrictEqual(keys.map((key) => key.successes), [3, 3])
        }))
    }))

  it.effect("P1: a breaker that was open is open again, and admits its probe in time", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      const settings: Partial<KeyPool.Settings> = { keys: ["sk-one"], maxWait: 0, floor: false }
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          const breaker = Option.getOrThrow(yield* pool.breaker(one))
          for (let n = 0; n < 3; n++) yield* Effect.flip(breaker.execute(Effect.fail({ status: 500 })))
          assert.strictEqual((yield* pool.snapshot).keys[0]?.breaker, "open")
        }), settings)
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          assert.strictEqual((yield* pool.snapshot).keys[0]?.breaker, "open")
          assert.strictEqual((yield* Effect.flip(pool.run(() => Effect.void)))._tag, "AllKeysExhausted")
          yield* TestClock.adjust("30 seconds")
          yield* pool.run(() => Effect.void)
          assert.strictEqual((yield* pool.snapshot).keys[0]?.breaker, "closed")
        }), settings)
    }))

  it.effect("A1, P1: declared limits do not start from zero after a restart: of keys, of groups, per minute and per day", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      const settings: Partial<KeyPool.Settings> = {
        keys: [
          { secret: "sk-one", limits: { requestsPerMinute: 5, requestsPerDay: 12 } },
          { secret: "sk-two", quotaGroup: "org", limits: { requestsPerMinute: 3 } },
          { secret: "sk-three", quotaGroup: "org" }
        ],
        maxWait: 0
      }
      const served = (pool: KeyPool.Service, times: number) =>
        Effect.map(
          Effect.replicateEffect(Effect.exit(pool.run(() => Effect.void)), times),
          (exits) => exits.filter(Exit.isSuccess).length
        )
      const turn = (times: number) => withPool(store, (pool) => served(pool, times), settings)
      assert.strictEqual(yield* turn(4), 4)
      assert.strictEqual(yield* turn(20), 4, "5 and 3 in all")
      yield* TestClock.adjust("30 seconds")
      assert.strictEqual(yield* turn(20), 0)
      yield* TestClock.adjust("31 seconds")
      assert.strictEqual(yield* turn(20), 8)
      yield* TestClock.adjust("61 seconds")
      assert.strictEqual(yield* turn(20), 5, "2 of the day are left, and 3")
      yield* TestClock.adjust("23 hours")
      assert.strictEqual(yield* turn(20), 3)
      yield* TestClock.adjust("1 hour")
      assert.strictEqual(yield* turn(20), 8)
    }))

  it.effect("A2, P1: what was announced is known after a restart", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      const settings: Partial<KeyPool.Settings> = { keys: ["sk-one"], maxWait: 0 }
      yield* withPool(store, (pool) =>
        pool.run((lease) =>
          Effect.sync(() =>
            lease.announced([{ name: "requests", limit: 100, remaining: 0, resetMillis: 40_000 }])
          ), { model: "small" }), settings)
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          const run = Effect.exit(pool.run(() =>
            Effect.void, { model: "small" }))
          assert.isTrue(Exit.isFailure(yield* run))
          yield* TestClock.adjust("40 seconds")
          assert.isTrue(Exit.isSuccess(yield* run))
        }), settings)
    }))

  it.effect("P1: mere uses are saved within seconds, also of a pool in which nothing else happens; an idle one saves nothing", () =>
    Effect.gen(function*() {
      const { memory, saves, store } = yield* makeFlaky
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          yield* TestClock.adjust("1 minute")
          const before = yield* Ref.get(saves)
          yield* TestClock.adjust("1 hour")
          assert.strictEqual(yield* Ref.get(saves), before)
          for (let round = 1; round <= 3; round++) {
            yield* Effect.repeatN(pool.run(() => Effect.void), 9)
            yield* TestClock.adjust("6 seconds")
            const [saved] = Option.getOrThrow(yield* memory.load("default")).keys
            assert.strictEqual(saved?.successes, 10 * round)
          }
          assert.strictEqual((yield* Ref.get(saves)) - before, 3)
          yield* TestClock.adjust("1 hour")
          assert.strictEqual((yield* Ref.get(saves)) - before, 3)
        }), { keys: [{ secret: "sk-one", limits: { requestsPerDay: 1_000 } }] })
    }))

  it.effect("B4, P1: a breaker's generation never goes back", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      const generations: Array<number> = []
      for (let run = 0; run < 3; run++) {
        yield* withPool(store, (pool) =>
          Effect.gen(function*() {
            const breaker = Option.getOrThrow(yield* pool.breaker(one))
            generations.push((yield* breaker.state).generation)
            yield* breaker.isolate
            yield* breaker.reset
            generations.push((yield* breaker.state).generation)
          }))
      }
      assert.deepStrictEqual(generations, [...generations].sort((a, b) => a - b))
      assert.isAtLeast(generations.at(-1) ?? 0, 6)
    }))

  it.effect("P1: a key that was disabled stays so; one that is new, or gone, is no trouble", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      yield* withPool(store, (pool) => pool.disable(one))
      yield* withPool(store, (pool) =>
        Effect.gen(function*() {
          const { keys } = yield* pool.snapshot
          assert.deepStrictEqual(keys.map((key) => [key.id, key.enabled]), [[idOf("sk-new"), true], [one, false]])
        }), { keys: ["sk-new", "sk-one"] })
    }))
})

describe("P2", () => {
  for (const mode of ["fails", "dies", "hangs"] as const) {
    it.effect(`P2: a store that ${mode} delays construction by its bound at most, and the pool says so`, () =>
      Effect.scoped(Effect.gen(function*() {
        const flaky = yield* makeFlaky
        yield* Ref.set(flaky.mode, mode)
        const { pool, telemetry } = yield* built(flaky.store, yield* Effect.scope)
        assert.strictEqual(yield* pool.run(() => Effect.succeed("answer")), "answer")
        const first = Option.getOrThrow(yield* Stream.runHead(telemetry.stream))
        assert.isTrue(first._tag === "store.degraded" && first.problem !== "")
        yield* Ref.set(flaky.mode, "works")
      })))

    it.effect(`P2: a store that ${mode} while the pool runs neither fails nor slows a call`, () =>
      Effect.gen(function*() {
        const flaky = yield* makeFlaky
        const problems = yield* withPool(flaky.store, (pool, problems) =>
          Effect.gen(function*() {
            yield* Ref.set(flaky.mode, mode)
            for (let n = 0; n < 4; n++) {
              const fiber = yield* Effect.fork(n % 2 === 0 ? benchFirst(pool) : pool.run(() => Effect.void))
              yield* Effect.repeatN(Effect.yieldNow(), 20)
              const done = yield* Fiber.poll(fiber)
              assert.isTrue(Option.isSome(done) && Exit.isSuccess(done.value), `call ${n}`)
              yield* TestClock.adjust("61 seconds")
            }
            yield* Ref.set(flaky.mode, "works")
            return problems
          }))
        assert.isNotEmpty(problems)
      }))

    it.effect(`P2: a store that ${mode} does not keep the pool from closing`, () =>
      Effect.gen(function*() {
        const flaky = yield* makeFlaky
        const scope = yield* Scope.make()
        const { pool } = yield* built(flaky.store, scope)
        yield* Ref.set(flaky.mode, mode)
        yield* endsWithin(Scope.close(scope, Exit.void), 1_100)
        assert.strictEqual((yield* Effect.flip(pool.run(() => Effect.void)))._tag, "PoolClosed")
      }))
  }

  it.effect("P2: a store that cannot be interrupted delays construction no longer either", () =>
    Effect.gen(function*() {
      const memory = yield* PoolStore.makeMemory
      const stubborn: PoolStore.Service = { ...memory, load: () => Effect.uninterruptible(Effect.never) }
      const { pool } = yield* built(stubborn, yield* Scope.make())
      assert.strictEqual(yield* pool.run(() => Effect.succeed("answer")), "answer")
    }))

  /** A pool that is there before its record, which takes so long. */
  const loadingBehind = (store: PoolStore.Service, millis: number, scope: Scope.Scope) =>
    Effect.gen(function*() {
      const slow = { ...store, load: (name: string) => Effect.delay(store.load(name), millis) }
      return yield* KeyPool.make({ keys }).pipe(
        Effect.provideService(PoolStore.PoolStore, slow),
        Effect.provideService(PoolUpkeep.Upkeep, { loads: "behind", pause: Effect.sleep }),
        Effect.provide(Telemetry.layer),
        Scope.extend(scope)
      )
    })
  const faultsKept = (store: PoolStore.Service) =>
    Effect.map(store.load("default"), (saved) => Option.getOrThrow(saved).keys.find((key) => key.id === one)?.faults)

  for (const millis of [500, 5_000]) {
    it.effect(`P1: a pool that closes while its record is loading (${millis} ms) does not replace it`, () =>
      Effect.gen(function*() {
        const memory = yield* PoolStore.makeMemory
        yield* withPool(memory, benchFirst)
        assert.strictEqual(yield* faultsKept(memory), 1)
        const scope = yield* Scope.make()
        yield* loadingBehind(memory, millis, scope)
        yield* endsWithin(Scope.close(scope, Exit.void), 1_100)
        assert.strictEqual(yield* faultsKept(memory), 1)
      }))
  }

  it.effect("K5: what is done to a key while the record is loading stays done", () =>
    Effect.scoped(Effect.gen(function*() {
      const memory = yield* PoolStore.makeMemory
      yield* withPool(memory, benchFirst)
      const pool = yield* loadingBehind(memory, 500, yield* Effect.scope)
      yield* pool.disable(idOf("sk-two"))
      yield* TestClock.adjust(500)
      assert.deepStrictEqual((yield* pool.snapshot).keys.map((key) => [key.enabled, key.faults]), [[true, 1], [
        false,
        0
      ]])
    })))

  it.effect("C3: a deadline counts from the start of the call, also while the record is loading", () =>
    Effect.scoped(Effect.gen(function*() {
      const memory = yield* PoolStore.makeMemory
      const pool = yield* loadingBehind(memory, 800, yield* Effect.scope)
      const call = yield* Effect.fork(Effect.flip(CallOptions.withDeadline(pool.run(() => Effect.void), 300)))
      yield* TestClock.adjust(299)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual((yield* Fiber.join(call))._tag, "DeadlineExceeded")
      yield* TestClock.adjust("1 second")
    })))

  for (const mode of ["fails", "hangs"] as const) {
    it.effect(`P2: a record that was not there because the store ${mode} is taken up when it is back`, () =>
      Effect.scoped(Effect.gen(function*() {
        const flaky = yield* makeFlaky
        yield* withPool(flaky.store, (pool) =>
          Effect.gen(function*() {
            yield* benchFirst(pool)
            yield* pool.run((lease) => lease.remember(["file-1"]))
          }))
        yield* Ref.set(flaky.mode, mode)
        const { pool } = yield* built(flaky.store, yield* Effect.scope)
        assert.deepStrictEqual(yield* cooling(pool), [])
        // Something to save; and something of its own beside what was kept.
        yield* pool.disable(idOf("sk-two"))
        yield* pool.run((lease) => lease.remember(["file-2"]))
        yield* TestClock.adjust("5 seconds")
        yield* Ref.set(flaky.mode, "works")
        yield* TestClock.adjust("35 seconds")
        assert.deepStrictEqual(yield* cooling(pool), [one])
        const saved = Option.getOrThrow(yield* flaky.memory.load("default"))
        assert.deepStrictEqual(saved.keys.map((key) => [key.enabled, key.faults]), [[true, 1], [false, 0]])
        const names = (saved.resources ?? []).flatMap(({ names }) =>
          names.split("\n").map((line) => line.split(" ")[0])
        )
        assert.deepStrictEqual(new Set(names), new Set(["file-1", "file-2"]))
      })))
  }

  it.effect("P2: what was not saved while the store was away is saved when it is back", () =>
    Effect.gen(function*() {
      const flaky = yield* makeFlaky
      yield* withPool(flaky.store, (pool) =>
        Effect.gen(function*() {
          yield* TestClock.adjust("5 seconds")
          yield* Ref.set(flaky.mode, "fails")
          yield* benchFirst(pool)
          yield* TestClock.adjust("10 seconds")
          yield* Ref.set(flaky.mode, "works")
          yield* TestClock.adjust("5 minutes")
          const saved = Option.getOrThrow(yield* flaky.memory.load("default"))
          assert.strictEqual(saved.keys.find((key) => key.id === one)?.faults, 1)
        }))
    }))
})

describe("P3", () => {
  const holding = (json: unknown): PoolStore.Service => ({
    load: () => Effect.map(PoolStore.decode(json), Option.some),
    save: () => Effect.void
  })

  for (
    const [what, json] of [
      ["garbage", "garbage"],
      ["an older version", { ...record, version: 0 }],
      ["half a record", { version: 1, savedAt: 5, keys: [{ id: one }] }]
    ] as const
  ) {
    it.effect(`P3: a pool that finds ${what} starts fresh, and says so`, () =>
      withPool(holding(json), (pool, problems) =>
        Effect.gen(function*() {
          const { eligible, keys } = yield* pool.snapshot
          assert.strictEqual(eligible, 2)
          assert.deepStrictEqual(keys.map((key) => key.total), [0, 0])
          yield* pool.run(() => Effect.void)
          assert.strictEqual(problems.length, 1)
          assert.include(problems[0] ?? "", "unreadable")
        })))
  }

  it.effect("P3: what was unreadable and has been replaced is not taken up again: nothing counts twice", () =>
    Effect.gen(function*() {
      const memory = yield* PoolStore.makeMemory
      const store: PoolStore.Service = {
        ...memory,
        load: (pool) =>
          Effect.flatMap(
            memory.load(pool),
            (found) => Option.isSome(found) ? Effect.succeed(found) : Effect.asSome(PoolStore.decode("garbage"))
          )
      }
      yield* withPool(store, (pool, problems) =>
        Effect.gen(function*() {
          let attempts = 0
          for (let round = 0; round < 4; round++) {
            yield* pool.run(() => Effect.sync(() => attempts++))
            yield* TestClock.adjust("1 minute")
          }
          assert.strictEqual(problems.length, 1)
          const successes = (yield* pool.snapshot).keys.reduce((sum, key) => sum + key.successes, 0)
          assert.deepStrictEqual([successes, attempts], [4, 4])
        }))
    }))

  it.effect("P3: a good record is no reason to complain", () =>
    withPool(holding(record), (pool, problems) =>
      Effect.gen(function*() {
        assert.deepStrictEqual(yield* cooling(pool), [one])
        assert.deepStrictEqual(problems, [])
      })))

  it.effect("P3: late subscribers hear that the store was degraded", () =>
    Effect.scoped(Effect.gen(function*() {
      yield* Effect.provideService(KeyPool.make({ keys }), PoolStore.PoolStore, holding("garbage"))
      const first = yield* Stream.runHead(Telemetry.stream)
      assert.strictEqual(Option.getOrThrow(first)._tag, "store.degraded")
    })).pipe(Effect.provide(Telemetry.layer)))
})

it("a StoreError says what is wrong", () => {
  const error = new PoolStore.StoreError({ problem: "unreachable", detail: "connection refused" })
  assert.strictEqual(error.message, "The pool's store is unreachable: connection refused")
})
