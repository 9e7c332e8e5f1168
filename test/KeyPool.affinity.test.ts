import { assert, describe } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Scope from "effect/Scope"
import * as TestClock from "effect/TestClock"
import * as ApiKey from "../src/ApiKey.js"
import * as CallOptions from "../src/CallOptions.js"
import * as Fault from "../src/Fault.js"
import { AllKeysExhausted } from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolStore from "../src/PoolStore.js"
import { bad, calm, Failed, idOf, keys, ok, once, plain, report, test, upstream } from "./support/pooled.js"

const turn = CallOptions.withAffinity("conversation-42")

/** The key that serves a conversation, and the others. */
const settled = (pool: KeyPool.Service, labels: string) =>
  Effect.map(turn(pool.run((lease) => Effect.succeed(lease.key.label))), (home) => ({
    home,
    others: [...labels].filter((label) => label !== home)
  }))

const labelled = (pool: KeyPool.Service) => pool.run((lease) => Effect.succeed(lease.key.label))

/** Holds so many leases of one key until the scope closes. */
const busy = (pool: KeyPool.Service, label: string, count: number) =>
  Effect.gen(function*() {
    let held = 0
    while (held < count) {
      const scope = yield* Scope.make()
      const lease = yield* Scope.extend(pool.lease, scope)
      if (lease.key.label !== label) {
        yield* Scope.close(scope, Exit.void)
        continue
      }
      held++
      yield* Effect.addFinalizer(() => Scope.close(scope, Exit.void))
    }
  })

describe("a conversation", () => {
  test("H4: stays with its key, whatever the strategy; without a name calls go round", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain })
      const { home } = yield* settled(pool, "abcd")
      for (let i = 0; i < 9; i++) assert.strictEqual(yield* turn(labelled(pool)), home)
      const round = yield* Effect.all(Array.from({ length: 4 }, () => labelled(pool)))
      assert.deepStrictEqual([...round].sort(), ["a", "b", "c", "d"])
      // A name of the call itself wins over the one around it.
      const own = Effect.all(Array.from({ length: 8 }, (_, i) =>
        turn(pool.run((lease) =>
          Effect.succeed(lease.key.label), { affinity: `other-${i}` }))))
      assert.isAbove(new Set(yield* own).size, 1)
    }))

  test("H4: pools of the same keys agree on its key without a word", () =>
    Effect.gen(function*() {
      const one = yield* KeyPool.make({ keys: keys("abcd"), name: "one", ...plain })
      const two = yield* KeyPool.make({ keys: keys("dcba"), name: "two", strategy: "least-used", ...plain })
      for (let i = 0; i < 20; i++) {
        const name = CallOptions.withAffinity(`conversation-${i}`)
        assert.strictEqual(yield* name(labelled(one)), yield* name(labelled(two)))
      }
    }))

  test("H4: a told wait of its key that ends within 2 seconds is waited for", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const { home } = yield* settled(pool, "ab")
      yield* report(pool, home, "RateLimited", { wait: 1_900 })
      const call = yield* Effect.fork(turn(labelled(pool)))
      yield* TestClock.adjust(1_919)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(call), home)
    }))

  test("H4: a longer one is not: the call moves at once, and the conversation stays where it went", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      const { home } = yield* settled(pool, "abc")
      yield* report(pool, home, "RateLimited", { wait: 2_500 })
      const next = yield* turn(labelled(pool))
      assert.notStrictEqual(next, home)
      yield* TestClock.adjust(60_000)
      for (let i = 0; i < 5; i++) assert.strictEqual(yield* turn(labelled(pool)), next)
    }))

  test("H4: what is only guessed is not waited for", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const { home } = yield* settled(pool, "ab")
      yield* report(pool, home, "RateLimited")
      assert.notStrictEqual(yield* turn(labelled(pool)), home)
    }))

  test("H4, F5: while its key is waited for, no guess about it is broken: there are other keys", () =>
    Effect.gen(function*() {
      const one = { limits: { concurrency: 1 } }
      const pool = yield* KeyPool.make({
        keys: keys("ab", { a: one, b: one }),
        cooldowns: { jitter: 0 },
        breaker: { threshold: 1 }
      })
      const { home, others } = yield* settled(pool, "ab")
      const attempt = yield* Effect.fork(
        Effect.flip(turn(pool.run(() => Effect.delay(new Failed({ fault: Fault.make("Rejected") }), 100), {
          classify: () => Outcome.fault(Fault.make("ServerError", { failover: false })),
          replayable: false
        })))
      )
      yield* calm
      const call = yield* Effect.fork(turn(labelled(pool)))
      yield* TestClock.adjust(99)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)), home)
      // What ran there fails: now it is only guessed when the key is back.
      yield* TestClock.adjust(1)
      yield* Fiber.join(attempt)
      assert.isTrue(Option.isSome(yield* Fiber.poll(call)))
      assert.strictEqual(yield* Fiber.join(call), others[0])
    }))

  test("H4: a busy key is waited for, 2 seconds at most; then the call moves, and its number stays", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("ab", { a: { limits: { concurrency: 1 } }, b: { limits: { concurrency: 1 } } }),
        ...plain
      })
      const { home, others } = yield* settled(pool, "ab")
      const before = (yield* pool.snapshot).calls
      const blocking = yield* Scope.make()
      yield* Scope.extend(busy(pool, home, 1), blocking)
      const asked = (yield* pool.snapshot).calls
      const call = yield* Effect.fork(turn(labelled(pool)))
      yield* TestClock.adjust(1_999)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(call), others[0])
      assert.isAbove(asked, before)
      assert.strictEqual((yield* pool.snapshot).calls, asked + 1)
      yield* Scope.close(blocking, Exit.void)
      assert.strictEqual(yield* turn(labelled(pool)), others[0])
      // And one that is given back in time is taken.
      const again = yield* Scope.make()
      yield* Scope.extend(busy(pool, others[0] ?? "", 1), again)
      const second = yield* Effect.fork(turn(labelled(pool)))
      yield* TestClock.adjust(1_000)
      yield* Scope.close(again, Exit.void)
      yield* calm
      assert.strictEqual(yield* Fiber.join(second), others[0])
    }))

  test("H4: a call that may not wait moves at once", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const { home, others } = yield* settled(pool, "ab")
      yield* report(pool, home, "RateLimited", { wait: 1_000 })
      const call = turn(labelled(pool)).pipe(CallOptions.withOptions({ maxWait: 0 }))
      assert.strictEqual(yield* call, others[0])
    }))

  test("H4: a call that fails over takes its conversation along", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      const { home } = yield* settled(pool, "abc")
      const up = yield* upstream({ [home]: bad("QuotaExhausted") })
      const next = yield* turn(pool.run(up.send, { classify: classified }))
      assert.notStrictEqual(next, home)
      assert.deepStrictEqual((yield* up.sent).map(({ label }) => label), [home, next])
      assert.strictEqual(yield* turn(labelled(pool)), next)
    }))

  test("H4: beside a key that has its share calls are guests, and the conversation stays", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain })
      const { home } = yield* settled(pool, "abcd")
      const up = yield* upstream(() => ok(1_000))
      const calls = yield* Effect.fork(
        Effect.all(Array.from({ length: 8 }, () => turn(pool.run(up.send))), { concurrency: "unbounded" })
      )
      yield* calm
      const count = (yield* up.sent).filter(({ label }) => label === home).length
      // 8 in flight over 4 keys: 1.25 times the mean is 2.5, so that the third may come when all have two.
      assert.isAtLeast(count, 2)
      assert.isAtMost(count, 3)
      yield* TestClock.adjust(1_000)
      yield* Fiber.join(calls)
      assert.strictEqual(yield* turn(labelled(pool)), home)
    }))

  test("H4: a key that has left is missed by nobody", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      const { home } = yield* settled(pool, "abc")
      yield* pool.drain(yield* idOf(pool, home))
      const next = yield* turn(labelled(pool))
      assert.notStrictEqual(next, home)
      assert.strictEqual(yield* turn(labelled(pool)), next)
    }))

  test("H4: its call may be the probe of its key's breaker", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const { home } = yield* settled(pool, "ab")
      yield* Effect.repeatN(report(pool, home, "ServerError"), 2)
      yield* TestClock.adjust("31 seconds")
      assert.strictEqual(yield* turn(labelled(pool)), home)
      assert.strictEqual((yield* pool.snapshot).keys.find(({ label }) => label === home)?.breaker, "closed")
    }))

  test("H4: a single lease belongs to it too", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abcd"), ...plain })
      const { home } = yield* settled(pool, "abcd")
      for (let i = 0; i < 4; i++) {
        const lease = yield* Effect.scoped(turn(pool.lease))
        assert.strictEqual(lease.key.label, home)
      }
    }))
})

const classified = (exit: Exit.Exit<string, Failed>): Outcome.Outcome =>
  Exit.isSuccess(exit)
    ? Outcome.success
    : exit.cause._tag === "Fail"
    ? Outcome.fault(exit.cause.error.fault)
    : Outcome.ignored

/** Keeps a resource with the key that serves, and tells which that was. */
const made = (pool: KeyPool.Service, ...resources: ReadonlyArray<string>) =>
  pool.run((lease) => Effect.as(lease.remember(resources), lease.key.label))

const asking = (pool: KeyPool.Service, ...resources: ReadonlyArray<string>) =>
  pool.run((lease) => Effect.succeed(lease.key.label), { resources })

const notFound = { status: 404 } as const

describe("a stored resource", () => {
  test("H4: goes back to the group that made it, by any of its keys", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("abcd", { a: { quotaGroup: "one" }, b: { quotaGroup: "one" } }),
        ...plain
      })
      const [first, second, third] = yield* Effect.all([
        made(pool, "file-1"),
        made(pool, "file-2"),
        made(pool, "file-3")
      ])
      assert.deepStrictEqual([first, second, third], ["a", "b", "c"])
      const served = yield* Effect.all(Array.from({ length: 6 }, () => asking(pool, "file-1")))
      assert.deepStrictEqual(new Set(served), new Set(["a", "b"]))
      assert.deepStrictEqual(yield* Effect.all(Array.from({ length: 4 }, () => asking(pool, "file-3"))), [
        "c",
        "c",
        "c",
        "c"
      ])
      // The first of several of which something is known decides.
      assert.strictEqual(yield* asking(pool, "file-0", "file-3", "file-1"), "c")
    }))

  test("H4: its group is waited for inside the budget; other keys do not help", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual(yield* made(pool, "file-1"), "a")
      yield* report(pool, "a", "RateLimited", { wait: "10 seconds" })
      const call = yield* Effect.fork(asking(pool, "file-1"))
      yield* TestClock.adjust(10_019)
      assert.isTrue(Option.isNone(yield* Fiber.poll(call)))
      yield* TestClock.adjust(1)
      assert.strictEqual(yield* Fiber.join(call), "a")
    }))

  test("H4: a group that cannot serve in time ends the call, and the error says why", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("abc"), ...plain })
      assert.strictEqual(yield* made(pool, "file-1"), "a")
      yield* report(pool, "a", "QuotaExhausted")
      const error = yield* Effect.flip(asking(pool, "file-1"))
      assert.instanceOf(error, AllKeysExhausted)
      if (!(error instanceof AllKeysExhausted)) return
      assert.deepStrictEqual({ ...error.reasonCounts }, { QuotaExhausted: 1, affinity: 2 })
      assert.isDefined(error.nextAvailableAt)
      // So it is when the key fails in the call itself.
      const other = yield* KeyPool.make({ keys: keys("ab"), name: "other", ...plain })
      yield* made(other, "file-1")
      const up = yield* upstream({ a: bad("Unauthorized", { explicit: true }) })
      const failed = yield* Effect.flip(other.run(up.send, { classify: classified, resources: ["file-1"] }))
      assert.strictEqual(failed._tag, "AllKeysExhausted")
      assert.deepStrictEqual(yield* up.trace, ["a@0"])
    }))

  test("H4: when its keys have left, nothing is known of it", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual(yield* made(pool, "file-1"), "a")
      yield* pool.drain(yield* idOf(pool, "a"))
      assert.strictEqual(yield* asking(pool, "file-1"), "b")
    }))

  test("H4: an unknown one that is not found is asked for once per group, and known then", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("abcd", { a: { quotaGroup: "one" }, b: { quotaGroup: "one" } }),
        ...plain,
        ...once
      })
      const up = yield* upstream((sent) => sent.label === "d" ? ok() : bad("Rejected", notFound))
      const ask = pool.run(up.send, { classify: classified, resources: ["file-9"] })
      assert.strictEqual(yield* ask, "d")
      assert.deepStrictEqual((yield* up.sent).map(({ label }) => label), ["a", "c", "d"])
      assert.strictEqual(yield* ask, "d")
      assert.strictEqual((yield* up.sent).length, 4)
    }))

  test("H4: one that nobody has fails with the provider's own error, after one attempt per group", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("abcd", { a: { quotaGroup: "one" }, b: { quotaGroup: "one" } }),
        ...plain
      })
      const up = yield* upstream(() => bad("Rejected", notFound))
      const error = yield* Effect.flip(pool.run(up.send, { classify: classified, resources: ["file-9"] }))
      assert.strictEqual(error._tag, "Failed")
      assert.strictEqual((yield* up.sent).length, 3)
      // Without a name there is nothing to look for.
      yield* Effect.flip(pool.run(up.send, { classify: classified }))
      assert.strictEqual((yield* up.sent).length, 4)
    }))

  test("H4: on the way, a limited group is waited for: only it may have what the others have not", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      const up = yield* upstream({
        a: bad("Rejected", notFound),
        b: [bad("RateLimited", { wait: "5 seconds" }), ok()]
      })
      const call = yield* Effect.fork(pool.run(up.send, { classify: classified, resources: ["file-9"] }))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(yield* Fiber.join(call), "b")
      assert.deepStrictEqual((yield* up.sent).map(({ label }) => label), ["a", "b", "b"])
    }))

  test("H4: so is one that is limited before it is asked: it may have what the others have not", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      yield* report(pool, "b", "RateLimited", { wait: "5 seconds" })
      const up = yield* upstream({ a: bad("Rejected", notFound) })
      const call = yield* Effect.fork(pool.run(up.send, { classify: classified, resources: ["file-9"] }))
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(yield* Fiber.join(call), "b")
      assert.deepStrictEqual(yield* up.trace, ["a@0", "b@5020"])
      // One that cannot serve in time says nothing: then it is as the others say.
      yield* report(pool, "b", "QuotaExhausted")
      const error = yield* Effect.flip(pool.run(up.send, { classify: classified, resources: ["file-8"] }))
      assert.strictEqual(error._tag, "Failed")
    }))

  test("H4: no other group is \"another key\" after an overload: its own is tried again only after a pause", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual(yield* made(pool, "file-1"), "a")
      const up = yield* upstream({ a: [bad("Overloaded"), ok()] })
      const call = yield* Effect.fork(pool.run(up.send, { classify: classified, resources: ["file-1"] }))
      yield* calm
      assert.deepStrictEqual(yield* up.trace, ["a@0"])
      yield* TestClock.adjust("30 seconds")
      assert.strictEqual(yield* Fiber.join(call), "a")
    }))

  test("H4, K5: what a key makes belongs to the group that it is of by then", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: keys("abc", { a: { quotaGroup: "one" }, b: { quotaGroup: "one" }, c: { quotaGroup: "two" } }),
        ...plain
      })
      const regroup = Effect.asVoid(pool.keyring.add({ secret: "secret-a", label: "a", quotaGroup: "two" }))
      const label = yield* pool.run(
        (lease) => Effect.zipRight(regroup, Effect.as(lease.remember(["file-1"]), lease.key.label)),
        { resources: ["file-2"] }
      )
      assert.strictEqual(label, "a")
      for (const file of ["file-1", "file-2"]) {
        const served = yield* Effect.all(Array.from({ length: 4 }, () => asking(pool, file)))
        assert.deepStrictEqual(new Set(served), new Set(["a", "c"]), file)
      }
    }))

  test("C2, H4: who waits for the same group is served in order, also behind those who came meanwhile", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab", { a: { limits: { concurrency: 1 } } }), ...plain })
      assert.strictEqual(yield* made(pool, "file-1"), "a")
      const up = yield* upstream(() => ok(10))
      const order: Array<number> = []
      const ask = (n: number) =>
        Effect.tap(pool.run(up.send, { resources: ["file-1"] }), () => Effect.sync(() => order.push(n)))
      const calls: Array<Fiber.RuntimeFiber<unknown, unknown>> = []
      for (let n = 0; n < 5; n++) calls.push(yield* Effect.fork(ask(n)))
      yield* TestClock.adjust(5)
      yield* Fiber.interrupt(Option.getOrThrow(Option.fromNullable(calls[2])))
      for (let n = 5; n < 8; n++) calls.push(yield* Effect.fork(ask(n)))
      yield* TestClock.adjust("1 second")
      assert.deepStrictEqual(order, [0, 1, 3, 4, 5, 6, 7])
      assert.strictEqual((yield* pool.snapshot).inFlight, 0)
    }))

  test("H4: a group that was thought to have it, and has not, is not believed twice", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain })
      assert.strictEqual(yield* made(pool, "file-1"), "a")
      const up = yield* upstream({ a: bad("Rejected", notFound) })
      const ask = pool.run(up.send, { classify: classified, resources: ["file-1"] })
      assert.strictEqual((yield* Effect.flip(ask))._tag, "Failed")
      assert.deepStrictEqual((yield* up.sent).map(({ label }) => label), ["a"])
      assert.strictEqual(yield* ask, "b")
    }))

  test("P1, H4: what is known of stored resources outlives the pool", () =>
    Effect.gen(function*() {
      const store = yield* PoolStore.makeMemory
      const living = <A, E>(use: (pool: KeyPool.Service) => Effect.Effect<A, E, Scope.Scope>, labels = "abc") =>
        Effect.scoped(Effect.flatMap(KeyPool.make({ keys: keys(labels), ...plain }), use)).pipe(
          Effect.provideService(PoolStore.PoolStore, store)
        )
      yield* living((pool) => Effect.zipRight(made(pool, "file-1"), made(pool, "file-2")))
      yield* TestClock.adjust("29 days")
      const served = yield* living(
        (pool) => Effect.all([asking(pool, "file-2"), asking(pool, "file-2"), asking(pool, "file-1")]),
        "cba"
      )
      assert.deepStrictEqual(served, ["b", "b", "a"])
      // Both were used again; now nobody asks for one of them.
      yield* TestClock.adjust("20 days")
      assert.strictEqual(yield* living((pool) => asking(pool, "file-1"), "cba"), "a")
      yield* TestClock.adjust("11 days")
      const [one, two] = yield* living((pool) => Effect.all([asking(pool, "file-1"), asking(pool, "file-2")]), "cba")
      assert.strictEqual(one, "a")
      assert.notStrictEqual(two, "b")
    }))

  test("P1: stored resources alone make the pool save, once they have gathered", () =>
    Effect.gen(function*() {
      const memory = yield* PoolStore.makeMemory
      let saves = 0
      const store: PoolStore.Service = {
        ...memory,
        save: (name, record) => Effect.zipRight(Effect.sync(() => saves++), memory.save(name, record))
      }
      const pool = yield* KeyPool.make({ keys: keys("ab"), ...plain }).pipe(
        Effect.provideService(PoolStore.PoolStore, store)
      )
      yield* TestClock.adjust("5 seconds")
      const before = saves
      yield* made(pool, "file-1")
      yield* TestClock.adjust("5 seconds")
      assert.strictEqual(saves, before + 1)
      const record = Option.getOrThrow(yield* memory.load("default"))
      const { id } = Option.getOrThrow(Option.fromNullable((yield* pool.snapshot).keys[0]))
      assert.deepStrictEqual(record.resources?.map(({ group }) => group), [id])
      // Its use is worth a record no more than any other call, of which some gather.
      yield* TestClock.adjust("5 seconds")
      assert.strictEqual(saves, before + 1)
      yield* Effect.replicateEffect(asking(pool, "file-1"), 5)
      yield* TestClock.adjust("10 seconds")
      assert.strictEqual(saves, before + 2)
      yield* made(pool, ...Array.from({ length: 10_000 }, (_, i) => `file-${i}`))
      yield* TestClock.adjust("3 seconds")
      yield* made(pool, "file-x")
      yield* TestClock.adjust("5 seconds")
      assert.isAtMost(saves, before + 4)
    }))
})

describe("settings", () => {
  test("an affinity that is no name is refused, and nothing has begun", () =>
    Effect.gen(function*() {
      const exit = yield* Effect.exit(CallOptions.withAffinity(Effect.succeed(1), ""))
      assert.isTrue(Exit.isFailure(exit))
      assert.strictEqual(yield* CallOptions.withAffinity(Effect.succeed(1), "x"), 1)
    }))

  test("the group of a key is its quota group, or the key alone", () =>
    Effect.gen(function*() {
      const [one, two] = yield* ApiKey.makeAll([{ secret: "s1", quotaGroup: "g" }, { secret: "s2" }]).pipe(
        Effect.map((all) => all.keys)
      )
      assert.strictEqual(one === undefined ? "" : ApiKey.groupOf(one), "g")
      assert.strictEqual(two === undefined ? "" : ApiKey.groupOf(two), two?.id)
    }))
})
