import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as HashMap from "effect/HashMap"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Telemetry from "../src/Telemetry.js"

const base = { pool: "openai", keyId: "key_1", label: "one" }
const request = (at: number): Telemetry.Unnumbered => ({ _tag: "request.start", ...base, at, call: at, attempt: 1 })
const change = (at: number): Telemetry.Unnumbered => ({ _tag: "key.disabled", ...base, at })
const requests = (from: number, n: number) => Array.from({ length: n }, (_, i) => request(from + i))
const numbers = (events: ReadonlyArray<Telemetry.Event>) => events.map((event) => event.seq)
const upTo = (n: number, from = 1) => Array.from({ length: n - from + 1 }, (_, i) => from + i)

/** Lets every other fiber run until it waits for something. */
const settle = Effect.repeatN(Effect.yieldNow(), 50)

/** What a stream gives now, without waiting for more. */
const readerOf = (stream: Stream.Stream<Telemetry.Event>) =>
  Effect.map(Stream.toPull(stream), (pull) =>
    Effect.gen(function*() {
      const read: Array<Telemetry.Event> = []
      for (;;) {
        const fiber = yield* Effect.fork(pull)
        yield* settle
        const done = yield* Fiber.poll(fiber)
        if (Option.isNone(done)) {
          yield* Fiber.interrupt(fiber)
          return read
        }
        if (Exit.isFailure(done.value)) return read
        read.push(...done.value.value)
      }
    }))

/** Follows a stream into a list. */
const follow = (stream: Stream.Stream<Telemetry.Event>) =>
  Effect.gen(function*() {
    const seen: Array<Telemetry.Event> = []
    yield* Effect.forkScoped(Stream.runForEach(stream, (event) => Effect.sync(() => seen.push(event))))
    yield* settle
    return seen
  })

const tagOf = (member: (typeof Telemetry.Event.members)[number]): string => {
  const { ast } = member.fields._tag
  return String((ast._tag === "PropertySignatureTransformation" ? ast.to : ast).type).replaceAll("\"", "")
}

describe("T1", () => {
  it("T1: the eight events of old, by name, and ours", () => {
    assert.sameMembers(Telemetry.Event.members.map(tagOf), [
      "request.start",
      "request.success",
      "request.fail",
      "key.rotated",
      "circuit.open",
      "circuit.closed",
      "circuit.half-open",
      "all.exhausted",
      "call.end",
      "call.waiting",
      "key.cooldown",
      "key.disabled",
      "key.added",
      "key.removed",
      "provider.open",
      "provider.closed",
      "pool.floor",
      "group.suspected",
      "budget.denied",
      "store.degraded"
    ])
  })

  for (const member of Telemetry.Event.members) {
    it.prop(`T1: ${tagOf(member)} goes to JSON and back`, [member], ([event]) => {
      const encoded = Telemetry.encode(event)
      const text = JSON.stringify(encoded)
      // No outcome and no gate has this name, which records cannot hold.
      FastCheck.pre(!JSON.stringify(event).includes("__proto__"))
      assert.deepStrictEqual(Telemetry.decode(encoded), event)
      // JSON has no NaN and no infinity.
      FastCheck.pre(!text.includes(":null"))
      assert.strictEqual(JSON.stringify(Telemetry.encode(Telemetry.decode(JSON.parse(text)))), text)
    })
  }

  it("T1: an encoded fault is plain, and comes back as a fault", () => {
    const fault = Fault.make("RateLimited", { wait: "1 second", status: 429, code: "slow_down" })
    const event: Telemetry.Event = {
      _tag: "request.fail",
      ...base,
      at: 1,
      seq: 2,
      call: 3,
      attempt: 1,
      durationMillis: 4,
      fault,
      late: false
    }
    const encoded = Telemetry.encode(event)
    assert.deepStrictEqual(JSON.parse(JSON.stringify(encoded)), encoded)
    const back = Telemetry.decode(encoded)
    assert.isTrue(back._tag === "request.fail" && Fault.isFault(back.fault))
  })

  it("T1: what is no event is refused", () => {
    for (const json of [undefined, null, {}, { _tag: "request.begin" }, { _tag: "key.removed", pool: "p" }]) {
      assert.throws(() => Telemetry.decode(json))
    }
  })

  it.scoped("T1: a pool tells its attempts, in order, and numbers them", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.Telemetry
      const pool = yield* KeyPool.make({ keys: ["sk-one", "sk-two"] })
      const seen = yield* follow(telemetry.stream)
      let attempts = 0
      yield* pool.run(() => {
        attempts += 1
        return attempts === 1 ? Effect.fail(Fault.make("RateLimited", { wait: "1 minute" })) : Effect.succeed("ok")
      })
      yield* settle
      assert.deepStrictEqual(seen.map((event) => event._tag), [
        "key.added",
        "key.added",
        "request.start",
        "request.fail",
        "key.cooldown",
        "key.rotated",
        "request.start",
        "request.success",
        "call.end"
      ])
      assert.deepStrictEqual(numbers(seen), upTo(9))
      for (const event of seen) {
        assert.deepStrictEqual(Telemetry.decode(JSON.parse(JSON.stringify(Telemetry.encode(event)))), event)
      }
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("T1: every event of a pool is JSON, also of a cooldown that never ends", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.Telemetry
      const pool = yield* KeyPool.make({ keys: ["sk-one"], cooldowns: { revoked: Infinity }, maxWait: 0 })
      const seen = yield* follow(telemetry.stream)
      yield* Effect.flip(pool.run(() => Effect.fail(Fault.make("Unauthorized", { explicit: true }))))
      yield* settle
      assert.isTrue(seen.some((event) => event._tag === "key.cooldown"))
      for (const event of seen) {
        const back = Either.try(() => Telemetry.decode(JSON.parse(JSON.stringify(Telemetry.encode(event)))))
        assert.isTrue(Either.isRight(back), `${event._tag} comes back`)
      }
    }).pipe(Effect.provide(KeyPool.layerDefaults)))
})

describe("T2", () => {
  it.scoped("T2: a subscriber that never reads neither blocks the publisher nor starves one that reads", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ capacity: 16, changes: 4 })
      const stuck = yield* telemetry.subscribe
      const seen = yield* follow(telemetry.stream)
      for (let n = 0; n < 5_000; n++) {
        yield* telemetry.publish([n % 100 === 0 ? change(n) : request(n)])
        yield* Effect.repeatN(Effect.yieldNow(), 4)
      }
      yield* settle
      assert.strictEqual(seen.length, 5_000)
      assert.deepStrictEqual(numbers(seen), upTo(5_000))
      const read = yield* yield* readerOf(stuck)
      assert.isBelow(read.length, 16 + 4 + 1)
      assert.strictEqual(read[read.length - 1]?.seq, 5_000)
    }))

  it.scoped("T2: ten thousand events that nobody reads in time do not hold up the publisher", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make()
      const stuck = yield* telemetry.subscribe
      yield* telemetry.publish([change(0)])
      yield* Effect.forEach(requests(1, 10_000), (event) => telemetry.publish([event]), { discard: true })
      const read = yield* yield* readerOf(stuck)
      assert.deepStrictEqual(numbers(read), [1, ...upTo(10_001, 10_001 - 4_095)])
    }))

  it.effect("T2: publishing after the end is harmless, and does not interrupt the publisher", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const telemetry = yield* Scope.extend(Telemetry.make(), scope)
      yield* telemetry.publish([change(1)])
      yield* Scope.close(scope, Exit.void)
      const exit = yield* Effect.exit(Effect.as(telemetry.publish([change(2), request(3)]), "still here"))
      assert.strictEqual(Exit.isSuccess(exit) ? exit.value : String(exit), "still here")
      const read = yield* telemetry.stream.pipe(Stream.runCollect, Effect.exit)
      assert.isTrue(Exit.isSuccess(read) || Exit.isInterrupted(read))
    }))

  it.effect("T2: the end of the service ends every stream, without a failure", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const telemetry = yield* Scope.extend(Telemetry.make(), scope)
      const reading = yield* Effect.fork(Stream.runCollect(telemetry.stream))
      yield* settle
      yield* telemetry.publish([change(1), request(2)])
      yield* settle
      yield* Scope.close(scope, Exit.void)
      yield* settle
      const done = yield* Fiber.poll(reading)
      assert.isTrue(Option.isSome(done))
      const exit = Option.getOrThrow(done)
      assert.deepStrictEqual(Exit.isSuccess(exit) ? numbers(Chunk.toReadonlyArray(exit.value)) : exit, [1, 2])
    }))

  it.effect("T2: a call that outlives the telemetry ends as it would", () =>
    Effect.gen(function*() {
      const scope = yield* Scope.make()
      const telemetry = yield* Scope.extend(Telemetry.make(), scope)
      const store = yield* PoolStore.makeMemory
      const result = yield* Effect.scoped(Effect.gen(function*() {
        const pool = yield* KeyPool.make({ keys: ["sk-one", "sk-two"] })
        void (yield* telemetry.subscribe)
        let attempts = 0
        return yield* pool.run(() =>
          Effect.gen(function*() {
            attempts += 1
            yield* Scope.close(scope, Exit.void)
            return yield* attempts === 1 ? Effect.fail(Fault.make("RateLimited")) : Effect.succeed("an answer")
          })
        )
      })).pipe(
        Effect.provideService(Telemetry.Telemetry, telemetry),
        Effect.provideService(PoolStore.PoolStore, store)
      )
      assert.strictEqual(result, "an answer")
    }))

  it.scoped("T2: changes of state survive a flood of requests for a slow subscriber", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ capacity: 8 })
      const slow = yield* telemetry.subscribe
      const published: Array<number> = []
      for (let n = 0; n < 20; n++) {
        yield* telemetry.publish(requests(0, 500))
        yield* telemetry.publish([change(n)])
        published.push((n + 1) * 501)
      }
      yield* telemetry.publish(requests(0, 500))
      const read = yield* yield* readerOf(slow)
      const changes = read.filter((event) => event._tag === "key.disabled")
      assert.deepStrictEqual(numbers(changes), published)
      assert.deepStrictEqual(numbers(read).slice(-8), upTo(20 * 501 + 500, 20 * 501 + 493))
      assert.deepStrictEqual(numbers(read), [...numbers(read)].sort((a, b) => a - b))
    }))

  it.scoped("T2: a subscriber sees by the numbers what it missed", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ capacity: 3 })
      const read = yield* readerOf(yield* telemetry.subscribe)
      yield* telemetry.publish(requests(1, 2))
      assert.deepStrictEqual(numbers(yield* read), [1, 2])
      yield* telemetry.publish(requests(3, 10))
      const rest = numbers(yield* read)
      assert.isBelow(rest.length, 10)
      assert.deepStrictEqual(rest.slice(-2), [11, 12])
    }))

  const exhausted = (at: number): Telemetry.Unnumbered => ({
    _tag: "all.exhausted",
    pool: "openai",
    at,
    call: at,
    reasons: [],
    reasonCounts: {}
  })

  it.scoped("T2: calls that find no key push no change of state out, neither of the replay nor of a slow reader", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ capacity: 8 })
      const slow = yield* telemetry.subscribe
      yield* telemetry.publish([{
        _tag: "key.cooldown",
        ...base,
        at: 1,
        scope: "key",
        kind: "RateLimited",
        provenance: "told",
        until: 2
      }])
      yield* Effect.forEach(upTo(2_000), (at) => telemetry.publish([exhausted(at)]), { discard: true })
      const late = yield* yield* readerOf(telemetry.stream)
      assert.deepStrictEqual(late.map((event) => event._tag), ["key.cooldown"])
      const read = yield* yield* readerOf(slow)
      assert.deepStrictEqual(numbers(read), [1, ...upTo(2_001, 1_994)])
    }))

  const changes = [
    "circuit.open",
    "circuit.closed",
    "circuit.half-open",
    "key.cooldown",
    "key.disabled",
    "key.added",
    "key.removed",
    "provider.open",
    "provider.closed",
    "group.suspected",
    "store.degraded"
  ]
  for (const member of Telemetry.Event.members) {
    const tag = tagOf(member)
    const kept = changes.includes(tag)
    it.scoped.prop(
      `T2: ${tag} ${kept ? "is kept" : "is not kept"} for late subscribers`,
      [member],
      ([event]) =>
        Effect.gen(function*() {
          const telemetry = yield* Telemetry.make({ replay: 1 })
          yield* telemetry.publish([change(1), event])
          const [first] = yield* yield* readerOf(telemetry.stream)
          assert.strictEqual(first?.seq, kept ? 2 : 1)
        }),
      { fastCheck: { numRuns: 3 } }
    )
  }

  it.scoped("T2: a late subscriber gets the latest changes of state first, and no past requests", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ replay: 3 })
      for (let n = 1; n <= 5; n++) yield* telemetry.publish([change(n), request(n)])
      const read = yield* readerOf(telemetry.stream)
      assert.deepStrictEqual(numbers(yield* read), [5, 7, 9])
      yield* telemetry.publish([request(6), change(6)])
      assert.deepStrictEqual(numbers(yield* read), [11, 12])
    }))

  it.scoped("T2: a subscriber that comes after the pool hears what construction said", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.Telemetry
      yield* KeyPool.make({ keys: ["sk-one", "sk-two", "sk-one"] })
      const events = yield* yield* readerOf(telemetry.stream)
      assert.deepStrictEqual(
        events.map((event) => event._tag === "key.added" && event.duplicate),
        [false, false, true]
      )
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("T2: what happens between subscribing and the first read is all there", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make()
      yield* telemetry.publish([change(1)])
      const events = yield* telemetry.subscribe
      yield* telemetry.publish([request(2), change(3), request(4), change(5)])
      assert.deepStrictEqual(numbers(yield* yield* readerOf(events)), [1, 2, 3, 4, 5])
    }))

  it.scoped("T2: each run of the stream is a subscription of its own", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make()
      const first = yield* follow(telemetry.stream)
      const second = yield* follow(telemetry.stream)
      yield* telemetry.publish([request(1), change(2)])
      yield* settle
      assert.deepStrictEqual([numbers(first), numbers(second)], [[1, 2], [1, 2]])
    }))

  type Step = readonly ["change" | "request", number] | readonly ["read", number]
  const step: FastCheck.Arbitrary<Step> = FastCheck.oneof(
    FastCheck.tuple(
      FastCheck.constantFrom("change" as const, "request" as const),
      FastCheck.integer({ min: 1, max: 12 })
    ),
    FastCheck.constant(["read", 0] as const)
  )

  it.scoped.prop(
    "T2: no event comes twice or out of order, no change is lost, and without lag nothing is",
    [
      FastCheck.array(step, { maxLength: 25 }),
      FastCheck.array(step, { maxLength: 4 }),
      FastCheck.constantFrom(4, 16, 4_096)
    ],
    ([steps, before, capacity]) =>
      Effect.gen(function*() {
        const telemetry = yield* Telemetry.make({ capacity })
        let seq = 0
        const changes: Array<number> = []
        const perform = ([what, n]: Step) =>
          Effect.suspend(() => {
            const make = what === "change" ? change : request
            if (what === "change") { for (let i = 1; i <= n; i++) changes.push(seq + i) }
            seq += n
            return telemetry.publish(Array.from({ length: n }, (_, i) => make(i)))
          })
        for (const step of before) yield* perform(step)
        const start = seq
        const read = yield* readerOf(yield* telemetry.subscribe)
        const seen: Array<number> = []
        let unread = 0
        let lagged = false
        for (const step of [...steps, ["read", 0] as const]) {
          if (step[0] === "read") {
            seen.push(...numbers(yield* read))
            unread = 0
          } else {
            yield* perform(step)
            unread += step[1]
            lagged = lagged || unread > capacity
          }
        }
        assert.deepStrictEqual(seen, [...new Set(seen)].sort((a, b) => a - b))
        assert.includeMembers(seen, changes.slice(-64))
        assert.includeMembers(seen, changes.filter((change) => change > start))
        if (!lagged) assert.deepStrictEqual(seen.filter((number) => number > start), upTo(seq, start + 1))
      })
  )

  it.scoped("T2: events of many publishers are neither lost nor reordered where nobody lags", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ capacity: 100_000 })
      const seen = yield* follow(telemetry.stream)
      const publisher = Effect.forEach(requests(0, 3_000), (event) => telemetry.publish([event]), { discard: true })
      yield* Effect.all([publisher, publisher, publisher], { concurrency: "unbounded" })
      yield* settle
      assert.deepStrictEqual(numbers(seen), upTo(9_000))
    }))

  it.scoped("T2: no event is built for nobody: it knows whether anybody listens", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make()
      assert.isFalse(telemetry.listened())
      yield* Effect.scoped(Effect.gen(function*() {
        void (yield* telemetry.subscribe)
        assert.isTrue(telemetry.listened())
      }))
      assert.isFalse(telemetry.listened())
      const reading = yield* Effect.fork(Stream.runDrain(telemetry.stream))
      yield* settle
      assert.isTrue(telemetry.listened())
      yield* Fiber.interrupt(reading)
      assert.isFalse(telemetry.listened())
    }))

  it.scoped("T2: numbers go on while nobody listens", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ replay: 1 })
      yield* telemetry.publish(requests(1, 5))
      yield* telemetry.publish([])
      const read = yield* readerOf(yield* telemetry.subscribe)
      yield* telemetry.publish([request(6)])
      assert.deepStrictEqual(numbers(yield* read), [6])
    }))
})

class Sink extends Context.Tag("test/Sink")<Sink, { readonly events: Array<Telemetry.Event> }>() {}

describe("layers", () => {
  it.effect("layerForEach is subscribed before it is ready, and runs with its requirements", () =>
    Effect.gen(function*() {
      const events: Array<Telemetry.Event> = []
      const layer = Telemetry.layerForEach((event) => Effect.map(Sink, (sink) => void sink.events.push(event))).pipe(
        Layer.provideMerge(Telemetry.layer),
        Layer.provide(Layer.succeed(Sink, { events }))
      )
      yield* Effect.gen(function*() {
        const telemetry = yield* Telemetry.Telemetry
        assert.isTrue(telemetry.listened())
        yield* telemetry.publish([request(1), change(2), request(3)])
        yield* TestClock.adjust("1 millis")
        assert.deepStrictEqual(numbers(events), [1, 2, 3])
      }).pipe(Effect.provide(layer))
    }))

  it.effect("layerForEach takes one event after the other", () =>
    Effect.gen(function*() {
      const log: Array<string> = []
      const layer = Telemetry.layerForEach((event) =>
        Effect.zipRight(
          Effect.zipRight(Effect.sync(() => log.push(`begin ${event.seq}`)), Effect.sleep("1 second")),
          Effect.sync(() => void log.push(`end ${event.seq}`))
        )
      ).pipe(Layer.provideMerge(Telemetry.layer))
      yield* Effect.gen(function*() {
        const telemetry = yield* Telemetry.Telemetry
        yield* telemetry.publish([request(1), request(2)])
        yield* TestClock.adjust("5 seconds")
      }).pipe(Effect.provide(layer))
      assert.deepStrictEqual(log, ["begin 1", "end 1", "begin 2", "end 2"])
    }))

  /** What is logged while an effect runs. */
  const logged = <A, E, R>(effect: Effect.Effect<A, E, R>) =>
    Effect.suspend(() => {
      const logs: Array<string> = []
      const logger = Logger.make(({ annotations, cause, logLevel, message }) => {
        const { seq } = Object.fromEntries(HashMap.toEntries(annotations))
        const died = Cause.isEmpty(cause) ? "" : ` ${String(Cause.squash(cause))}`
        logs.push(`${logLevel._tag} ${String(message)} ${String(seq)}${died}`)
      })
      return effect.pipe(
        Effect.as(logs),
        Effect.provide(Logger.replace(Logger.defaultLogger, logger)),
        Logger.withMinimumLogLevel(LogLevel.All)
      )
    })

  const deaths: Readonly<Record<string, () => Effect.Effect<void>>> = {
    "dies": () => Effect.die("broken"),
    "throws": () => {
      throw "broken"
    },
    "is interrupted": () => Effect.interrupt
  }
  for (const [how, death] of Object.entries(deaths)) {
    it.effect(`T2: layerForEach goes on after an effect that ${how}, and logs it as an error`, () =>
      Effect.gen(function*() {
        const seen: Array<number> = []
        const layer = Telemetry.layerForEach((event) =>
          event.seq === 2 ? death() : Effect.sync(() => void seen.push(event.seq))
        ).pipe(Layer.provideMerge(Telemetry.layer))
        const logs = yield* logged(
          Effect.gen(function*() {
            const telemetry = yield* Telemetry.Telemetry
            yield* telemetry.publish([request(1), change(2), request(3)])
            yield* TestClock.adjust("1 millis")
            yield* telemetry.publish([request(4)])
            yield* TestClock.adjust("1 millis")
          }).pipe(Effect.provide(layer))
        )
        assert.deepStrictEqual(seen, [1, 3, 4])
        assert.strictEqual(logs.length, 1)
        assert.match(logs[0] ?? "", /^Error .*key\.disabled.* 2 /)
        if (how !== "is interrupted") assert.include(logs[0], "broken")
      }))
  }

  it.effect("T2: layerLogger goes on after a logger that throws", () =>
    Effect.gen(function*() {
      const logs: Array<string> = []
      const logger = Logger.make(({ logLevel, message }) => {
        if (logLevel._tag === "Info" || logLevel._tag === "Error") throw new Error("the disk is full")
        logs.push(String(message))
      })
      yield* Effect.gen(function*() {
        const telemetry = yield* Telemetry.Telemetry
        yield* telemetry.publish([request(1), { _tag: "key.added", ...base, at: 2, duplicate: false }, change(3)])
        yield* TestClock.adjust("1 millis")
      }).pipe(
        Effect.provide(Telemetry.layerLogger.pipe(Layer.provideMerge(Telemetry.layer))),
        Effect.provide(Logger.replace(Logger.defaultLogger, logger)),
        Logger.withMinimumLogLevel(LogLevel.All)
      )
      assert.deepStrictEqual(logs, ["request.start", "key.disabled"])
    }))

  it.effect("the end of the layer interrupts the effect that runs, and logs nothing", () =>
    Effect.gen(function*() {
      const layer = Telemetry.layerForEach(() => Effect.never).pipe(Layer.provideMerge(Telemetry.layer))
      const logs = yield* logged(
        Effect.gen(function*() {
          yield* (yield* Telemetry.Telemetry).publish([request(1)])
          yield* TestClock.adjust("1 millis")
        }).pipe(Effect.provide(layer))
      )
      assert.deepStrictEqual(logs, [])
    }))

  it.effect("layerLogger warns of calls without a key, and mentions those let through or denied a retry", () =>
    Effect.gen(function*() {
      const logs = yield* logged(
        Effect.gen(function*() {
          const telemetry = yield* Telemetry.Telemetry
          yield* telemetry.publish([
            { _tag: "all.exhausted", pool: "openai", at: 1, call: 1, reasons: [], reasonCounts: {} },
            { _tag: "pool.floor", ...base, at: 2 },
            { _tag: "budget.denied", pool: "openai", at: 3, call: 1, reason: "time" },
            { _tag: "call.waiting", pool: "openai", at: 4, call: 1, waiting: 1 }
          ])
          yield* TestClock.adjust("1 millis")
        }).pipe(Effect.provide(Telemetry.layerLogger.pipe(Layer.provideMerge(Telemetry.layer))))
      )
      assert.deepStrictEqual(logs, [
        "Warning all.exhausted 1",
        "Info pool.floor 2",
        "Info budget.denied 3",
        "Debug call.waiting 4"
      ])
    }))

  const wrong: Readonly<Record<string, ReadonlyArray<unknown>>> = {
    capacity: [0, -1, 1.5, Number.NaN, Infinity, "8", true],
    changes: [0, -1, 1.5, Number.NaN, Infinity, "8", true],
    replay: [-1, 1.5, Number.NaN, Infinity, "8", true],
    capasity: [8]
  }
  for (const [field, values] of Object.entries(wrong)) {
    it.effect(`K3: ${field} is refused when it is wrong, by make and layerWith`, () =>
      Effect.forEach(values, (value) =>
        Effect.gen(function*() {
          // What the types forbid.
          const options = { [field]: value } as Telemetry.Options
          const error = yield* Effect.flip(Effect.scoped(Telemetry.make(options)))
          assert.deepStrictEqual([error._tag, error.field], ["ConfigurationError", field])
          const layered = yield* Effect.flip(Effect.provide(Telemetry.Telemetry, Telemetry.layerWith(options)))
          assert.strictEqual(layered.field, field)
        })))
  }

  it.scoped("no past changes are given where replay is 0", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.make({ capacity: 1, changes: 1, replay: 0 })
      yield* telemetry.publish([change(1)])
      const read = yield* readerOf(yield* telemetry.subscribe)
      yield* telemetry.publish([change(2)])
      assert.deepStrictEqual(numbers(yield* read), [2])
    }))

  it.effect("layerLogger logs failures as warnings, changes at info and requests at debug, without a secret", () =>
    Effect.gen(function*() {
      const secret = "sk-live-Zq83hTm1PvKx90Lw"
      const logs: Array<{ readonly level: string; readonly message: unknown; readonly fields: object }> = []
      const logger = Logger.make(({ annotations, logLevel, message }) => {
        logs.push({ level: logLevel._tag, message, fields: Object.fromEntries(HashMap.toEntries(annotations)) })
      })
      yield* Effect.gen(function*() {
        const pool = yield* KeyPool.KeyPool
        yield* TestClock.adjust("1 millis")
        let attempts = 0
        yield* pool.run(() => {
          attempts += 1
          return attempts === 1 ? Effect.fail({ status: 429 }) : Effect.void
        })
        yield* pool.disable(Either.getOrThrow(ApiKey.make(secret)).id)
        yield* TestClock.adjust("1 millis")
      }).pipe(
        Effect.provide(
          Layer.merge(Telemetry.layerLogger, KeyPool.layer({ keys: [secret, "sk-two"] })).pipe(
            Layer.provide(KeyPool.layerDefaults)
          )
        ),
        Effect.provide(Logger.replace(Logger.defaultLogger, logger)),
        Logger.withMinimumLogLevel(LogLevel.All)
      )
      assert.deepStrictEqual(logs.map(({ level, message }) => `${level} ${String(message)}`), [
        "Info key.added",
        "Info key.added",
        "Debug request.start",
        "Warning request.fail",
        "Info key.cooldown",
        "Debug key.rotated",
        "Debug request.start",
        "Debug request.success",
        "Debug call.end",
        "Warning key.disabled"
      ])
      const [, , , failed] = logs
      assert.containsSubset(failed?.fields, {
        pool: "default",
        attempt: 1,
        fault: { kind: "RateLimited", status: 429 }
      })
      assert.notProperty(failed?.fields ?? {}, "_tag")
      assert.notInclude(JSON.stringify(logs), secret)
    }))

  it.effect("layerWith takes capacity, changes and replay", () =>
    Effect.scoped(Effect.gen(function*() {
      const telemetry = yield* Telemetry.Telemetry
      for (let n = 1; n <= 5; n++) yield* telemetry.publish([change(n)])
      const read = yield* readerOf(yield* telemetry.subscribe)
      for (let n = 6; n <= 10; n++) yield* telemetry.publish([change(n)])
      yield* telemetry.publish(requests(11, 10))
      const events = numbers(yield* read)
      assert.deepStrictEqual(events.slice(-5), [9, 10, 18, 19, 20])
      // What it may lag behind, and what it gets first.
      assert.isAtMost(events.length, 2 + 3 + 1)
    })).pipe(Effect.provide(Telemetry.layerWith({ capacity: 3, changes: 2, replay: 1 }))))

  it.effect("the stream of the module is that of the service", () =>
    Effect.gen(function*() {
      const telemetry = yield* Telemetry.Telemetry
      const reading = yield* Telemetry.stream.pipe(Stream.take(2), Stream.runCollect, Effect.fork)
      yield* settle
      yield* telemetry.publish([request(1), change(2)])
      assert.deepStrictEqual(numbers(Chunk.toReadonlyArray(yield* Fiber.join(reading))), [1, 2])
    }).pipe(Effect.provide(Telemetry.layer)))

  it.effect("pools that are given the same layer share one telemetry", () =>
    Effect.gen(function*() {
      const pool = KeyPool.layer({ keys: ["sk-one"], name: "a" })
      class Second extends Context.Tag("test/Second")<Second, KeyPool.Service>() {}
      const second = KeyPool.layerAs(Second, { keys: ["sk-two"], name: "b" })
      yield* Effect.gen(function*() {
        const seen = yield* readerOf((yield* Telemetry.Telemetry).stream)
        assert.deepStrictEqual((yield* seen).map((event) => event.pool).sort(), ["a", "b"])
        assert.deepStrictEqual([(yield* KeyPool.KeyPool).name, (yield* Second).name], ["a", "b"])
      }).pipe(
        Effect.scoped,
        Effect.provide(Layer.merge(pool, second).pipe(Layer.provideMerge(KeyPool.layerDefaults)))
      )
    }))
})
