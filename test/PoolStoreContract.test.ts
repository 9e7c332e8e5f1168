/** The contract of stores over each of them; and over broken ones, which it must find out. */
import { FileSystem, KeyValueStore, Path } from "@effect/platform"
import { NodeContext } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import type * as Scope from "effect/Scope"
import * as Struct from "effect/Struct"
import * as PoolStore from "../src/PoolStore.js"
import * as PoolStoreContract from "../src/PoolStoreContract.js"

type Platform = FileSystem.FileSystem | Path.Path | Scope.Scope

const directory = Effect.flatMap(FileSystem.FileSystem, (fs) => fs.makeTempDirectoryScoped({ prefix: "keymesh-" }))

/** Each check has a place of its own. */
const subjects: Readonly<Record<string, Effect.Effect<PoolStoreContract.Subject, unknown, Platform>>> = {
  "in memory": Effect.map(PoolStore.makeMemory, (store) => ({ open: Effect.succeed(store), durable: false })),
  "files": Effect.gen(function*() {
    const home = yield* directory
    const fs = yield* FileSystem.FileSystem
    const platform = yield* Effect.context<FileSystem.FileSystem | Path.Path>()
    return {
      open: Effect.provide(PoolStore.makeFile({ directory: `${home}/below/it` }), platform),
      corrupt: (pool, text) => fs.writeFileString(`${home}/below/it/${pool}.json`, text)
    }
  }),
  "a KeyValueStore in memory": Effect.gen(function*() {
    const values = Context.get(yield* Layer.build(KeyValueStore.layerMemory), KeyValueStore.KeyValueStore)
    return {
      open: Effect.provideService(PoolStore.makeKeyValueStore, KeyValueStore.KeyValueStore, values),
      corrupt: (pool, text) => values.set(`keymesh-${pool}`, text)
    }
  }),
  "a KeyValueStore of files": Effect.gen(function*() {
    const layer = KeyValueStore.layerFileSystem(yield* directory).pipe(Layer.provide(NodeContext.layer))
    const values = Context.get(yield* Layer.build(layer), KeyValueStore.KeyValueStore)
    return {
      open: Effect.map(
        Layer.build(Layer.provide(PoolStore.layerKeyValueStore, layer)),
        (context) => Context.get(context, PoolStore.PoolStore)
      ),
      corrupt: (pool, text) => values.set(`keymesh-${pool}`, text)
    }
  })
}
/** It promises less: see `makeKeyValueStore`. */
const tears = (subject: string, check: string) =>
  subject === "a KeyValueStore of files" && /same time|interrupted/.test(check)

for (const [subject, made] of Object.entries(subjects)) {
  describe(`a store ${subject}`, () => {
    for (const check of PoolStoreContract.checks) {
      if (tears(subject, check.name)) continue
      it.scoped(`P1, P3: ${check.name}`, () =>
        Effect.flatMap(made, (subject) => check.run(subject)).pipe(Effect.provide(NodeContext.layer)))
    }
  })
}

describe("the contract", () => {
  const sound = subjects["files"] ?? Effect.die("gone")
  type Spoilt = (store: PoolStore.Service) => PoolStore.Service
  const first = (name: string) => name.slice(0, 3)
  const spoilt: Readonly<Record<string, Spoilt>> = {
    "forgets what it was given": (store) => ({ ...store, save: () => Effect.void }),
    "keeps the first record": (store) => ({
      ...store,
      save: (pool, record) =>
        Effect.flatMap(store.load(pool), (found) => Option.isSome(found) ? Effect.void : store.save(pool, record))
    }),
    "makes one pool of several": (store) => ({
      load: (pool) => store.load(first(pool)),
      save: (pool, record) => store.save(first(pool), record)
    }),
    "makes one pool of those that differ in case": (store) => ({
      load: (pool) => store.load(pool.toLowerCase()),
      save: (pool, record) => store.save(pool.toLowerCase(), record)
    }),
    "leaves a field out": (store) => ({
      ...store,
      save: (pool, record) => store.save(pool, Struct.omit(record, "limits"))
    }),
    "rounds": (store) => ({
      ...store,
      save: (pool, record) => store.save(pool, { ...record, savedAt: Math.round(record.savedAt) })
    }),
    "fails": () => ({
      load: () => Effect.succeedNone,
      save: () => new PoolStore.StoreError({ problem: "unreachable", detail: "no" })
    }),
    "dies": (store) => ({ ...store, load: () => Effect.die(new Error("a bug")) }),
    "says nothing of what it cannot read": (store) => ({
      ...store,
      load: (pool) => Effect.orElseSucceed(store.load(pool), () => Option.none())
    }),
    "merges keys into what was there": (store) => ({
      ...store,
      save: (pool, record) =>
        Effect.flatMap(
          store.load(pool),
          (found) =>
            store.save(pool, {
              ...record,
              keys: [
                ...Option.match(found, {
                  onNone: () => [],
                  onSome: (old) => old.keys
                }),
                ...record.keys
              ]
            })
        )
    })
  }
  for (const [what, spoil] of Object.entries(spoilt)) {
    it.scoped(`finds out a store that ${what}`, () =>
      Effect.gen(function*() {
        const exits = yield* Effect.forEach(PoolStoreContract.checks, (check) =>
          Effect.flatMap(sound, (subject) =>
            Effect.exit(check.run({ ...subject, open: Effect.map(subject.open, spoil) }))))
        const violations = exits.flatMap((exit) =>
          Exit.isFailure(exit) && exit.cause._tag === "Fail" ? [exit.cause.error] : []
        )
        assert.isNotEmpty(violations)
        for (const error of violations) {
          assert.instanceOf(error, PoolStoreContract.Violation)
          assert.match(String(error), /^Violation: .+: expected .+, found .+/s)
        }
      }).pipe(Effect.provide(NodeContext.layer)))
  }
})
