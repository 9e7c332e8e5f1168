import { assert, describe } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Queue from "effect/Queue"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import {
  calm,
  closedFor,
  Failed,
  keyOf,
  keys,
  named,
  once,
  plain,
  report,
  test,
  trip,
  watch
} from "./support/pooled.js"

const failed = (kind: Fault.Kind, details: Fault.Details = {}) => new Failed({ fault: Fault.make(kind, details) })
/** Elements that begin with a dot are no content. */
const commits = (element: string) => !element.startsWith(".")
const inFlight = (pool: KeyPool.Service) => Effect.map(pool.snapshot, (snapshot) => snapshot.inFlight)

/** What each key streams, and which keys were asked. */
const source = (script: Readonly<Record<string, Stream.Stream<string, Failed>>>) =>
  Effect.map(Ref.make<ReadonlyArray<string>>([]), (asked) => ({
    asked: Ref.get(asked),
    open: (lease: KeyPool.Lease) =>
      Stream.zipRight(
        Stream.fromEffect(Ref.update(asked, (all) => [...all, lease.key.label])),
        Stream.empty
      ).pipe(Stream.concat(script[lease.key.label] ?? Stream.make(lease.key.label)))
  }))

const gather = <A, E>(stream: Stream.Stream<A, E>) => Effect.map(Stream.runCollect(stream), Chunk.toReadonlyArray)

/** Reads a stream into a list that can be looked at while it runs. */
const reading = <A, E>(stream: Stream.Stream<A, E>) =>
  Effect.gen(function*() {
    const seen = yield* Ref.make<ReadonlyArray<A>>([])
    const fiber = yield* Effect.fork(Stream.runForEach(stream, (a) => Ref.update(seen, (all) => [...all, a])))
    yield* calm
    return { fiber, seen: Ref.get(seen) }
  })

describe("S1", () => {
  test("S1: a stream holds its lease until its end", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const elements = yield* Queue.unbounded<string>()
      const { fiber, seen } = yield* reading(pool.stream(() => Stream.take(Stream.fromQueue(elements), 2)))
      yield* Queue.offer(elements, "one")
      yield* calm
      assert.deepStrictEqual(yield* seen, ["one"])
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 1, successes: 1 })
      yield* Queue.offer(elements, "two")
      yield* Fiber.join(fiber)
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, successes: 1, ignored: 0, faults: 0 })
    }))

  test("S1: until it is interrupted, or its reader has enough", () =>
    Effect.gen(function*() {
      const released = yield* Ref.make(0)
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const endless = () =>
        Stream.ensuring(Stream.repeatEffect(Effect.as(Effect.sleep(10), "x")), Ref.update(released, (n) => n + 1))
      const { fiber } = yield* reading(pool.stream(endless))
      yield* TestClock.adjust(25)
      assert.strictEqual(yield* inFlight(pool), 1)
      yield* Fiber.interrupt(fiber)
      assert.strictEqual(yield* inFlight(pool), 0)
      const few = yield* Effect.fork(gather(Stream.take(pool.stream(endless), 3)))
      yield* TestClock.adjust(30)
      assert.strictEqual((yield* Fiber.join(few)).length, 3)
      assert.strictEqual(yield* inFlight(pool), 0)
      assert.strictEqual(yield* Ref.get(released), 2)
      assert.deepInclude(yield* keyOf(pool, "a"), { faults: 0, successes: 2 })
    }))

  test("S1: interrupted before anything came it says nothing of its key", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const { fiber } = yield* reading(pool.stream(() => Stream.never))
      assert.strictEqual(yield* inFlight(pool), 1)
      yield* Fiber.interrupt(fiber)
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, faults: 0, successes: 0, ignored: 1 })
    }))

  test("S1: until the scope of its reader closes", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const scope = yield* Scope.make()
      const pull = yield* Scope.extend(
        Stream.toPull(pool.stream(() => Stream.make("one", "two").pipe(Stream.rechunk(1)))),
        scope
      )
      yield* pull
      assert.strictEqual(yield* inFlight(pool), 1)
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual(yield* inFlight(pool), 0)
    }))

  test("S1: until 300 s have gone without a read; a slow read is one", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const slow = Stream.concat(
        Stream.make("one"),
        Stream.fromEffect(Effect.as(Effect.sleep("400 seconds"), "two"))
      ).pipe(Stream.concat(Stream.repeatValue("more")), Stream.rechunk(1))
      const scope = yield* Scope.make()
      const pull = yield* Scope.extend(Stream.toPull(pool.stream(() => slow)), scope)
      yield* pull
      const second = yield* Effect.fork(pull)
      yield* TestClock.adjust("400 seconds")
      yield* Fiber.join(second)
      assert.strictEqual(yield* inFlight(pool), 1, "it was read all the time")
      yield* TestClock.adjust(299_999)
      assert.strictEqual(yield* inFlight(pool), 1)
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* inFlight(pool), 0)
      assert.deepStrictEqual([...yield* pull], ["more"], "it can be read on")
      yield* Scope.close(scope, Exit.void)
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, successes: 1, ignored: 0 })
    }))

  test("S1: the idle time is a setting, and does not end a stream that has ended", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), streamIdle: "1 second" })
      const scope = yield* Scope.make()
      yield* Scope.extend(Effect.flatten(Stream.toPull(pool.stream(() => Stream.make("one")))), scope)
      yield* TestClock.adjust("1 second")
      assert.strictEqual(yield* inFlight(pool), 0)
      yield* Scope.close(scope, Exit.void)
      assert.strictEqual(yield* inFlight(pool), 0)
    }))

  test("S1: a stream whose own release fails gives its lease back all the same", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const broken = () =>
        Stream.ensuring(Stream.make("one", "two").pipe(Stream.rechunk(1)), Effect.dieMessage("release"))
      yield* Effect.exit(gather(Stream.take(pool.stream(broken), 1)))
      assert.strictEqual(yield* inFlight(pool), 0)
    }))

  test("S1: a defect in the middle gives the lease back and blames nobody", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const exit = yield* Effect.exit(gather(pool.stream(() => Stream.concat(Stream.make("one"), Stream.die("bug")))))
      assert.isTrue(Exit.isFailure(exit) && Cause.isDie(exit.cause))
      assert.deepInclude(yield* keyOf(pool, "a"), { inFlight: 0, faults: 0 })
    }))
})

describe("S2", () => {
  test("S2: an error before the first content fails over silently; what was held is thrown away", () =>
    Effect.gen(function*() {
      const { asked, open } = yield* source({
        a: Stream.concat(Stream.make(".start", ".ping"), Stream.fail(failed("Overloaded"))),
        b: Stream.make(".start", "hello", "world")
      })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.deepStrictEqual(yield* gather(pool.stream(open, { commits })), [".start", "hello", "world"])
      assert.deepStrictEqual(yield* asked, ["a", "b"])
      assert.deepInclude(yield* keyOf(pool, "a"), { faults: 1, successes: 0, inFlight: 0 })
    }))

  test("S2: without `commits` the first element is content", () =>
    Effect.gen(function*() {
      const { asked, open } = yield* source({
        a: Stream.fail(failed("RateLimited", { wait: "2 seconds" })),
        b: Stream.make("hello")
      })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.deepStrictEqual(yield* gather(pool.stream(open)), ["hello"])
      assert.deepStrictEqual(yield* asked, ["a", "b"])
      assert.strictEqual(yield* closedFor(pool, "a"), 2_020)
    }))

  test("S2: what a failed attempt had open is closed before the next one starts", () =>
    Effect.gen(function*() {
      const log = yield* Ref.make<ReadonlyArray<string>>([])
      const note = (line: string) => Ref.update(log, (all) => [...all, line])
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      yield* gather(pool.stream((lease) =>
        Stream.flatMap(
          Stream.acquireRelease(note(`open ${lease.key.label}`), () => note(`close ${lease.key.label}`)),
          () => lease.key.label === "a" ? Stream.fail(failed("QuotaExhausted")) : Stream.make("hello")
        )
      ))
      assert.deepStrictEqual(yield* Ref.get(log), ["open a", "close a", "open b", "close b"])
    }))

  test("S2: nothing is handed on before the first content, and then everything in order", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const elements = yield* Queue.unbounded<string>()
      const { fiber, seen } = yield* reading(pool.stream(() => Stream.fromQueue(elements), { commits }))
      yield* Queue.offer(elements, ".start")
      yield* TestClock.adjust(100)
      yield* Queue.offer(elements, ".ping")
      yield* TestClock.adjust(100)
      assert.deepStrictEqual(yield* seen, [])
      assert.strictEqual((yield* keyOf(pool, "a")).successes, 0, "nothing is decided")
      yield* Queue.offer(elements, "hello")
      yield* calm
      assert.deepStrictEqual(yield* seen, [".start", ".ping", "hello"])
      assert.strictEqual((yield* keyOf(pool, "a")).successes, 1)
      yield* Queue.offer(elements, "world")
      yield* calm
      assert.deepStrictEqual(yield* seen, [".start", ".ping", "hello", "world"])
      yield* Fiber.interrupt(fiber)
    }))

  test("S2: held for 5 s at most", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const elements = yield* Queue.unbounded<string>()
      const { fiber, seen } = yield* reading(pool.stream(() => Stream.fromQueue(elements), { commits }))
      yield* Queue.offer(elements, ".start")
      yield* TestClock.adjust(4_999)
      assert.deepStrictEqual(yield* seen, [])
      yield* TestClock.adjust(1)
      assert.deepStrictEqual(yield* seen, [".start"])
      yield* Queue.offer(elements, ".ping")
      yield* Queue.offer(elements, "hello")
      yield* calm
      assert.deepStrictEqual(yield* seen, [".start", ".ping", "hello"], "nothing is lost on the way")
      yield* Fiber.interrupt(fiber)
    }))

  test("S2: the 5 s begin with the first element, however long that took", () =>
    Effect.gen(function*() {
      const { asked, open } = yield* source({
        a: Stream.concat(
          Stream.fromEffect(Effect.as(Effect.sleep("6 seconds"), ".start")),
          Stream.fromEffect(Effect.zipRight(Effect.sleep("1 second"), failed("Overloaded")))
        ),
        b: Stream.make("hello")
      })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const call = yield* Effect.fork(Effect.either(gather(pool.stream(open, { commits }))))
      yield* TestClock.adjust("20 seconds")
      const answer = yield* Fiber.join(call)
      assert.deepStrictEqual(answer._tag === "Right" ? answer.right : answer.left, ["hello"])
      assert.deepStrictEqual(yield* asked, ["a", "b"])
    }))

  test("S2: held are 64 elements at most", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const elements = yield* Queue.unbounded<string>()
      const { fiber, seen } = yield* reading(
        pool.stream(() => Stream.fromQueue(elements, { maxChunkSize: 1 }), { commits })
      )
      yield* Queue.offerAll(elements, Array.from({ length: 63 }, (_, i) => `.${i}`))
      yield* calm
      assert.strictEqual((yield* seen).length, 0)
      yield* Queue.offer(elements, ".63")
      yield* calm
      assert.strictEqual((yield* seen).length, 64)
      yield* Fiber.interrupt(fiber)
    }))

  test("S2: an error after the hold ran out passes, as after content", () =>
    Effect.gen(function*() {
      const { asked, open } = yield* source({
        a: Stream.concat(
          Stream.make(".start"),
          Stream.fromEffect(Effect.zipRight(Effect.sleep("8 seconds"), failed("Overloaded")))
        )
      })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const call = yield* Effect.fork(Effect.flip(gather(pool.stream(open, { commits }))))
      yield* TestClock.adjust("8 seconds")
      assert.strictEqual((yield* Fiber.join(call))._tag, "Failed")
      assert.deepStrictEqual(yield* asked, ["a"])
      assert.deepInclude(yield* keyOf(pool, "a"), { faults: 1, inFlight: 0 })
    }))

  test("S2: a stream that ends without content is a success, its elements are handed on", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      assert.deepStrictEqual(yield* gather(pool.stream(() => Stream.make(".only"), { commits })), [".only"])
      assert.deepStrictEqual(yield* gather(pool.stream(() => Stream.empty)), [])
      assert.deepInclude(yield* keyOf(pool, "a"), { successes: 2, inFlight: 0, faults: 0 })
    }))

  test("S2: the probe is decided at the first content", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain })
      yield* trip(pool, "a")
      yield* TestClock.adjust("30 seconds")
      const elements = yield* Queue.unbounded<string>()
      const { fiber } = yield* reading(pool.stream(() => Stream.fromQueue(elements), { commits }))
      yield* Queue.offer(elements, ".start")
      yield* calm
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "half-open")
      yield* Queue.offer(elements, "hello")
      yield* calm
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "closed")
      yield* Fiber.interrupt(fiber)
    }))

  test("S2: errors before the content that no other key can mend are the call's", () =>
    Effect.gen(function*() {
      const { asked, open } = yield* source({ a: Stream.fail(failed("Rejected")) })
      const pool = yield* KeyPool.make({ keys: keys("ab") })
      assert.strictEqual((yield* Effect.flip(gather(pool.stream(open))))._tag, "Failed")
      assert.deepStrictEqual(yield* asked, ["a"])
      const own = yield* Effect.flip(gather(pool.stream(() => Stream.fail("own"))))
      assert.strictEqual(own, "own")
    }))
})

describe("S3", () => {
  test("S3: after content the reader gets the typed error, and the pool learns from it", () =>
    Effect.gen(function*() {
      const events = yield* watch
      const { asked, open } = yield* source({
        a: Stream.concat(Stream.make("hello"), Stream.fail(failed("RateLimited", { wait: "5 seconds" })))
      })
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const seen = yield* Ref.make<ReadonlyArray<string>>([])
      const error = yield* Effect.flip(
        Stream.runForEach(pool.stream(open), (a) => Ref.update(seen, (all) => [...all, a]))
      )
      assert.strictEqual(error._tag, "Failed")
      assert.deepStrictEqual(yield* Ref.get(seen), ["hello"])
      assert.deepStrictEqual(yield* asked, ["a"], "it is not started again")
      assert.deepInclude(yield* keyOf(pool, "a"), { successes: 1, faults: 1, inFlight: 0 })
      assert.strictEqual(yield* closedFor(pool, "a"), 5_020)
      const fails = named(yield* events, "request.fail")
      assert.deepStrictEqual(fails.map(({ late, label }) => [label, late]), [["a", true]])
    }))

  test("S3: late faults count on the breaker", () =>
    Effect.gen(function*() {
      const { open } = yield* source({ a: Stream.concat(Stream.make("hello"), Stream.fail(failed("Network"))) })
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, breaker: { threshold: 1 } })
      yield* Effect.flip(gather(pool.stream(open)))
      assert.strictEqual((yield* keyOf(pool, "a")).breaker, "open")
    }))

  test("S3: an error of one's own after content blames nobody", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const error = yield* Effect.flip(gather(pool.stream(() => Stream.concat(Stream.make(1), Stream.fail("own")))))
      assert.strictEqual(error, "own")
      assert.deepInclude(yield* keyOf(pool, "a"), { successes: 1, faults: 0, inFlight: 0 })
    }))

  test("S3: classify says what failures mean, early and late", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const classify = (cause: Cause.Cause<string>) =>
        Option.match(Cause.failureOption(cause), {
          onNone: () => Outcome.ignored,
          onSome: (code) => Outcome.fault(Fault.make(code === "quota" ? "QuotaExhausted" : "Network"))
        })
      const answer = yield* Effect.either(gather(pool.stream(
        (lease) => lease.key.label === "a" ? Stream.fail("quota") : Stream.concat(Stream.make(1), Stream.fail("cut")),
        { classify }
      )))
      assert.strictEqual(answer._tag === "Left" ? answer.left : answer.right, "cut")
      assert.strictEqual((yield* keyOf(pool, "a")).closed?.fault, "QuotaExhausted")
      assert.strictEqual((yield* keyOf(pool, "b")).faults, 1)
    }))

  test("a stream waits for a key as run does, and its errors are the pool's", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("a"), ...plain, ...once, maxWait: "5 seconds" })
      yield* report(pool, "a", "RateLimited", { wait: "2 seconds" })
      const call = yield* Effect.fork(gather(pool.stream(() => Stream.fromEffect(Clock.currentTimeMillis))))
      yield* TestClock.adjust(2_020)
      assert.deepStrictEqual(yield* Fiber.join(call), [2_020])
      yield* report(pool, "a", "RateLimited", { wait: "1 minute" })
      const caught = yield* gather(
        pool.stream(() => Stream.make("served")).pipe(
          Stream.catchTag("AllKeysExhausted", (error) => Stream.make(error._tag))
        )
      )
      assert.deepStrictEqual(caught, ["AllKeysExhausted"])
    }))

  test("S4: elements pass as they arrive, and no faster than they are read", () =>
    Effect.gen(function*() {
      const made = yield* Ref.make(0)
      const pool = yield* KeyPool.make({ keys: keys("a") })
      const scope = yield* Scope.make()
      const pull = yield* Scope.extend(
        Stream.toPull(pool.stream(() => Stream.repeatEffect(Ref.updateAndGet(made, (n) => n + 1)))),
        scope
      )
      for (let i = 0; i < 5; i++) yield* pull
      assert.isAtMost(yield* Ref.get(made), 6)
      yield* Scope.close(scope, Exit.void)
    }))
})
