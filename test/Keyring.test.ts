import { assert, describe, it } from "@effect/vitest"
import * as Chunk from "effect/Chunk"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import * as Ref from "effect/Ref"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Keyring from "../src/Keyring.js"

const idOf = (input: ApiKey.Input): string => Either.getOrThrow(ApiKey.make(input)).id
const secrets = (keys: ReadonlyArray<ApiKey.ApiKey>): ReadonlyArray<string> =>
  keys.map((key) => Redacted.value(key.secret))
const secretsOf = (keyring: Keyring.Service) => Effect.map(keyring.keys, secrets)

/** Follows `changes` into a list, for as long as the scope lives. */
const watch = (keyring: Keyring.Service) =>
  Effect.gen(function*() {
    const seen = yield* Ref.make<ReadonlyArray<ReadonlyArray<string>>>([])
    yield* Effect.forkScoped(
      Stream.runForEach(keyring.changes, (keys) => Ref.update(seen, (all) => [...all, secrets(keys)]))
    )
    yield* TestClock.adjust("1 millis")
    return Effect.zipRight(TestClock.adjust("1 millis"), Ref.get(seen))
  })

const alone = Keyring.make({ keys: ["sk-one", "sk-two"] })
const ofPool = Effect.map(
  Effect.provide(KeyPool.make({ keys: ["sk-one", "sk-two"] }), KeyPool.layerDefaults),
  (pool) => pool.keyring
)

for (const [name, keyringOf] of [["alone", alone], ["of a pool", ofPool]] as const) {
  describe(`a keyring ${name}`, () => {
    it.scoped("K5: has the keys that it was given, in order, and finds them by id", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-one", "sk-two"])
        const found = yield* keyring.get(idOf("sk-two"))
        assert.strictEqual(Redacted.value(Option.getOrThrow(found).secret), "sk-two")
        assert.isTrue(Option.isNone(yield* keyring.get("key_none")))
      }))

    it.scoped("K5: adds a key at the end", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        const added = yield* keyring.add({ secret: "sk-three", label: "three" })
        assert.deepStrictEqual([added.id, added.label], [idOf("sk-three"), "three"])
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-one", "sk-two", "sk-three"])
      }))

    it.scoped("K5: a key that is there already stays in its place, with the new attributes", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        yield* keyring.add({ secret: "sk-one", label: "renamed", weight: 5 })
        const keys = yield* keyring.keys
        assert.deepStrictEqual(secrets(keys), ["sk-one", "sk-two"])
        assert.deepStrictEqual([keys[0]?.label, keys[0]?.weight], ["renamed", 5])
      }))

    it.scoped("K5: retires a key, once", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        assert.isTrue(yield* keyring.retire(idOf("sk-one")))
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-two"])
        assert.isFalse(yield* keyring.retire(idOf("sk-one")))
        assert.isFalse(yield* keyring.retire("key_none"))
        assert.isTrue(Option.isNone(yield* keyring.get(idOf("sk-one"))))
        assert.isTrue(yield* keyring.retire(idOf("sk-two")))
        assert.deepStrictEqual(yield* secretsOf(keyring), [])
      }))

    it.scoped("K5: replaces a key by another in one step", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        const seen = yield* watch(keyring)
        const key = yield* keyring.replace(idOf("sk-one"), { secret: "sk-three", label: "fresh" })
        assert.strictEqual(key.label, "fresh")
        assert.deepStrictEqual(yield* secretsOf(keyring).pipe(Effect.map((all) => [...all].sort())), [
          "sk-three",
          "sk-two"
        ])
        for (const keys of yield* seen) assert.strictEqual(keys.length, 2)
      }))

    it.scoped("K5: a key that replaces itself gets the new attributes", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        yield* keyring.replace(idOf("sk-one"), { secret: "sk-one", label: "renamed" })
        assert.deepStrictEqual((yield* keyring.keys).map((key) => key.label), ["renamed", idOf("sk-two")])
      }))

    it.scoped("K5: a key that is there already can take the place of another", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        yield* keyring.replace(idOf("sk-one"), "sk-two")
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-two"])
      }))

    it.scoped("K5: there must be a key to replace", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        const error = yield* Effect.flip(keyring.replace("key_none", "sk-three"))
        assert.deepStrictEqual([error._tag, error.field], ["ConfigurationError", "id"])
        assert.include(error.message, "key_none")
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-one", "sk-two"])
      }))

    it.scoped("K5: a key that is not there cannot replace itself", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        const result = yield* Effect.either(keyring.replace(idOf("sk-three"), "sk-three"))
        assert.isTrue(Either.isLeft(result))
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-one", "sk-two"])
      }))

    it.scoped("K3: refuses a wrong key, and changes nothing", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        assert.strictEqual((yield* Effect.flip(keyring.add({ secret: "sk", weight: Number.NaN }))).field, "key.weight")
        assert.strictEqual((yield* Effect.flip(keyring.replace(idOf("sk-one"), " "))).field, "key.secret")
        assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-one", "sk-two"])
      }))

    it.scoped("K5: tells the keys now, and after each change, to each that listens", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        const early = yield* watch(keyring)
        yield* keyring.add("sk-three")
        yield* TestClock.adjust("1 millis")
        const late = yield* watch(keyring)
        yield* keyring.retire(idOf("sk-one"))
        assert.deepStrictEqual(yield* early, [
          ["sk-one", "sk-two"],
          ["sk-one", "sk-two", "sk-three"],
          ["sk-two", "sk-three"]
        ])
        assert.deepStrictEqual(yield* late, [["sk-one", "sk-two", "sk-three"], ["sk-two", "sk-three"]])
      }))

    it.scoped("K5: what changes nothing is no change", () =>
      Effect.gen(function*() {
        const keyring = yield* keyringOf
        const seen = yield* watch(keyring)
        yield* keyring.retire("key_none")
        yield* Effect.flip(keyring.replace("key_none", "sk-three"))
        assert.deepStrictEqual(yield* seen, [["sk-one", "sk-two"]])
      }))

    it.scoped.prop(
      "K5: any history of changes leaves the keys that a plain list has",
      [FastCheck.array(
        FastCheck.tuple(FastCheck.constantFrom("add", "retire"), FastCheck.integer({ min: 0, max: 5 })),
        { maxLength: 30 }
      )],
      ([history]) =>
        Effect.gen(function*() {
          const keyring = yield* keyringOf
          let expected: ReadonlyArray<string> = ["sk-one", "sk-two"]
          const names = ["sk-one", "sk-two", "sk-three", "sk-four", "sk-five", "sk-six"]
          for (const [what, i] of history) {
            const name = names[i] ?? ""
            const known = expected.includes(name)
            if (what === "add") {
              yield* keyring.add(name)
              if (!known) expected = [...expected, name]
            } else {
              assert.strictEqual(yield* keyring.retire(idOf(name)), known)
              expected = expected.filter((other) => other !== name)
            }
            assert.sameMembers([...(yield* secretsOf(keyring))], [...expected])
          }
        })
    )
  })
}

describe("a keyring alone", () => {
  it.effect("keeps the order in which keys joined", () =>
    Effect.gen(function*() {
      const keyring = yield* alone
      yield* keyring.retire(idOf("sk-one"))
      yield* keyring.add("sk-three")
      yield* keyring.add("sk-one")
      assert.deepStrictEqual(yield* secretsOf(keyring), ["sk-two", "sk-three", "sk-one"])
    }))

  it.effect("K3: needs keys, and collapses duplicates", () =>
    Effect.gen(function*() {
      assert.strictEqual((yield* Effect.flip(Keyring.make({ keys: [] }))).field, "keys")
      assert.deepStrictEqual(yield* secretsOf(yield* Keyring.make({ keys: ["a", "b", "a"] })), ["a", "b"])
    }))

  it.effect("comes as a layer", () =>
    Effect.gen(function*() {
      assert.deepStrictEqual(yield* secretsOf(yield* Keyring.Keyring), ["sk-one"])
    }).pipe(Effect.provide(Keyring.layer({ keys: ["sk-one"] }))))

  it.effect("comes as a layer from configuration", () =>
    Effect.gen(function*() {
      assert.deepStrictEqual(yield* secretsOf(yield* Keyring.Keyring), ["sk-one", "sk-two"])
    }).pipe(
      Effect.provide(Keyring.layerConfig({ keys: ApiKey.config("KEYS") })),
      Effect.withConfigProvider(ConfigProvider.fromMap(new Map([["KEYS", "sk-one, sk-two"]])))
    ))

  it.effect("K3: a layer with wrong keys fails under the field", () =>
    Effect.gen(function*() {
      const direct = yield* Effect.flip(Effect.scoped(Layer.build(Keyring.layer({ keys: ["a", " "] }))))
      assert.strictEqual(direct.field, "keys[1].secret")
      const configured = yield* Effect.flip(
        Effect.scoped(Layer.build(Keyring.layerConfig({ keys: ApiKey.config("KEYS") })))
      ).pipe(
        Effect.withConfigProvider(ConfigProvider.fromMap(new Map([["KEYS", "[{\"secret\":\"a\",\"weight\":0}]"]])))
      )
      assert.include(String(configured), "KEYS[0].weight")
    }))
})

describe("the keyring of a pool", () => {
  const use = (pool: KeyPool.Service) => pool.run((lease) => Effect.succeed(Redacted.value(lease.key.secret)))

  it.scoped("K5: the next pick sees a key that was added, and none that was retired", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one"], maxWait: 0 })
      yield* pool.keyring.add("sk-two")
      const used = new Set([yield* use(pool), yield* use(pool)])
      assert.deepStrictEqual(used, new Set(["sk-one", "sk-two"]))
      yield* pool.keyring.retire(idOf("sk-one"))
      assert.deepStrictEqual([yield* use(pool), yield* use(pool)], ["sk-two", "sk-two"])
      yield* pool.keyring.retire(idOf("sk-two"))
      assert.strictEqual((yield* Effect.flip(use(pool)))._tag, "AllKeysExhausted")
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("K5: a call that waits gets the key that is added", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: [{ secret: "sk-one", limits: { concurrency: 1 } }] })
      const held = yield* Effect.fork(pool.run(() => Effect.never))
      yield* TestClock.adjust("1 millis")
      const waiting = yield* Effect.fork(use(pool))
      yield* TestClock.adjust("1 millis")
      assert.strictEqual((yield* pool.snapshot).waiting, 1)
      yield* pool.keyring.add("sk-two")
      assert.strictEqual(yield* Fiber.join(waiting), "sk-two")
      yield* Fiber.interrupt(held)
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("K5: an attempt with a retired key may finish; then the key is gone", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one", "sk-two"] })
      const done = yield* Deferred.make<void>()
      const held = yield* Effect.fork(
        pool.run((lease) => Effect.as(Deferred.await(done), Redacted.value(lease.key.secret)))
      )
      yield* TestClock.adjust("1 millis")
      assert.isTrue(yield* pool.keyring.retire(idOf("sk-one")))
      assert.deepStrictEqual(yield* secretsOf(pool.keyring), ["sk-two"])
      assert.deepStrictEqual(
        (yield* pool.snapshot).keys.map((key) => [key.id, key.retiring]),
        [[idOf("sk-one"), true], [idOf("sk-two"), false]]
      )
      yield* Deferred.succeed(done, undefined)
      assert.strictEqual(yield* Fiber.join(held), "sk-one")
      assert.deepStrictEqual((yield* pool.snapshot).keys.map((key) => key.id), [idOf("sk-two")])
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("K4: new attributes of a key hold from the next pick on", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one", "sk-two"], maxWait: 0, strategy: "sequential-then-rotate" })
      yield* pool.keyring.add({ secret: "sk-one", label: "renamed", weight: 5, order: 9, models: ["small"] })
      const [one] = (yield* pool.snapshot).keys
      assert.deepStrictEqual([one?.label, one?.weight], ["renamed", 5])
      const used = yield* pool.run((lease) => Effect.succeed(Redacted.value(lease.key.secret)), { model: "large" })
      assert.strictEqual(used, "sk-two")
      assert.strictEqual(yield* use(pool), "sk-two")
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("K4: a key that gets a quota group shares its limit from then on", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: [{ secret: "sk-one", quotaGroup: "org" }, "sk-two"], maxWait: 0 })
      yield* pool.keyring.add({ secret: "sk-two", quotaGroup: "org" })
      const limited = Fault.make("RateLimited", { scope: "group", wait: "1 minute" })
      const error = yield* Effect.flip(pool.run(() => Effect.fail(limited)))
      assert.strictEqual(error._tag, "AllKeysExhausted")
      const { attempts, eligible } = yield* pool.snapshot
      assert.deepStrictEqual([attempts, eligible], [1, 0])
    }).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.scoped("K5: the pool tells a change after a key joined, and after one left", () =>
    Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: ["sk-one"] })
      const changes = yield* Effect.fork(pool.changes.pipe(Stream.take(3), Stream.runCollect))
      yield* TestClock.adjust("1 millis")
      yield* pool.keyring.add("sk-two")
      yield* TestClock.adjust("1 millis")
      yield* pool.keyring.retire(idOf("sk-one"))
      const sizes = Chunk.toReadonlyArray(yield* Fiber.join(changes)).map((snapshot) => snapshot.keys.length)
      assert.deepStrictEqual(sizes, [1, 2, 1])
    }).pipe(Effect.provide(KeyPool.layerDefaults)))
})
