/** The contract of stores over each of them; and over broken ones, which it must find out. */
import { FileSystem, KeyValueStore, Path } from "@effect/platform"
import { NodeContext } from "@effect/platform-node"
import { assert, describe, it } from "@effect/vitest"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as Struct from "effect/Struct"
import * as TestClock from "effect/TestClock"
import * as PoolStore from "../src/PoolStore.js"
import * as PoolStoreContract from "../src/PoolStoreContract.js"
import * as SharedPool from "../src/SharedPool.js"

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

/** The engine in memory; `spoil` is what is wrong with the ports that it gives. */
const memory = (spoil: (port: SharedPool.SharedPool) => SharedPool.SharedPool = (port) => port) =>
  Effect.map(SharedPool.makeMemory, ({ cutOff, loseAll, restore, share }): PoolStoreContract.Subject => ({
    open: Effect.succeed({ ...PoolStore.none, share: (pool) => Effect.map(share(pool), spoil) }),
    outage: { begin: cutOff(), end: restore() },
    loseAll
  }))

describe("what is shared in memory", () => {
  for (const check of PoolStoreContract.sharedChecks) {
    it.live(`P4: ${check.name}`, () => Effect.flatMap(memory(), check.run))
  }
})

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

  const granted = { _tag: "Granted", ticket: { id: "any" } } as const
  type SpoiltPort = (port: SharedPool.SharedPool) => SharedPool.SharedPool
  const claimOf = (change: (claim: SharedPool.Claim) => SharedPool.Claim): SpoiltPort => (port) => ({
    ...port,
    claim: (claim) => port.claim(change(claim))
  })
  const newsOf = (change: (news: SharedPool.News) => SharedPool.News | undefined): SpoiltPort => (port) => ({
    ...port,
    news: Stream.filterMap(port.news, (news) => Option.fromNullable(change(news)))
  })
  const spoiltPorts: Readonly<Record<string, readonly [foundBy: string, SpoiltPort]>> = {
    "lets all pass": ["a declared limit", (port) => ({ ...port, claim: () => Effect.succeed(granted) })],
    "forgets limits": ["a declared limit", claimOf((claim) => ({ ...claim, limits: [] }))],
    "forgets concurrency": ["concurrency is exact", claimOf((claim) => ({ ...claim, concurrency: [] }))],
    "forgets probes": ["one has a probe", claimOf((claim) => ({ ...claim, probes: [] }))],
    "takes nothing that is under way": ["under way already", claimOf((claim) => ({ ...claim, held: undefined }))],
    "lets one more pass": [
      "a declared limit",
      claimOf((claim) => ({
        ...claim,
        limits: claim.limits.map((limit) => ({ ...limit, limit: limit.limit + 1 }))
      }))
    ],
    "counts for half a window": [
      "a declared limit",
      claimOf((claim) => ({
        ...claim,
        limits: claim.limits.map((limit) => ({ ...limit, windowMillis: limit.windowMillis / 2 }))
      }))
    ],
    "keeps what is given back": ["concurrency is exact", (port) => ({ ...port, settle: () => Effect.void })],
    "counts what was not sent": ["more than a limit", (port) => ({
      ...port,
      settle: (ticket, settled) =>
        port.settle(ticket, settled._tag === "Unsent" ? { _tag: "Ended", tokens: undefined } : settled)
    })],
    "counts tokens as they were claimed": ["tokens are held", (port) => ({
      ...port,
      settle: (ticket, settled) =>
        port.settle(ticket, settled._tag === "Ended" ? { _tag: "Ended", tokens: undefined } : settled)
    })],
    "tells nobody": [
      "the others hear",
      (port) => ({ ...port, tell: () => Effect.succeed({ _tag: "Told", breakers: [] }) })
    ],
    "tells nothing of breakers": ["of transitions", (port) => ({
      ...port,
      tell: (notices) => port.tell(notices.filter(({ _tag }) => _tag !== "Breaker"))
    })],
    "takes any transition": ["of transitions", (port) => ({
      ...port,
      tell: (notices) =>
        port.tell(notices.flatMap((notice): ReadonlyArray<SharedPool.Notice> =>
          notice._tag === "Breaker"
            ? [{ _tag: "Reset", keyId: notice.keyId }, { ...notice, from: undefined }]
            : [notice]
        ))
    })],
    "hears itself": ["the others hear", (port) => {
      const own: Array<SharedPool.News> = []
      return {
        ...port,
        tell: (notices) => {
          for (const notice of notices) if (notice._tag === "Cooldown") own.push(notice)
          return port.tell(notices)
        },
        news: Stream.flatMap(port.news, (news) => Stream.fromIterable([...own.splice(0), news]))
      }
    }],
    "does not tell what is free again": [
      "concurrency is exact",
      newsOf((news) => news._tag === "Freed" ? undefined : news)
    ],
    "does not count those that leave": [
      "who leaves",
      newsOf((news) => news._tag === "Members" ? { ...news, members: Math.max(2, news.members) } : news)
    ],
    "says nothing of outages": ["cannot be reached", newsOf((news) => news._tag === "Away" ? undefined : news)],
    "never says that it lost everything": [
      "lost everything",
      newsOf((news) => news._tag === "Joined" ? { ...news, kept: true } : news)
    ],
    "does not know what was told before": [
      "who joins",
      newsOf((news) => news._tag === "Joined" ? { ...news, cooldowns: [], breakers: [] } : news)
    ],
    "makes cooldowns shorter": [
      "who joins",
      newsOf((news) =>
        news._tag === "Joined"
          ? { ...news, cooldowns: news.cooldowns.map((one) => ({ ...one, forMillis: one.forMillis / 2 - 1 })) }
          : news
      )
    ],
    "dies": ["all it asks for", (port) => ({ ...port, claim: () => Effect.die(new Error("a bug")) })],
    "never answers in an outage": ["cannot be reached", (port) => ({
      ...port,
      claim: (claim) =>
        Effect.flatMap(port.claim(claim), (answer) => answer._tag === "Away" ? Effect.never : Effect.succeed(answer))
    })]
  }
  for (const [what, [foundBy, spoil]] of Object.entries(spoiltPorts)) {
    it.effect(`finds out what is shared by a store that ${what}`, () =>
      Effect.gen(function*() {
        const check = PoolStoreContract.sharedChecks.find(({ name }) => name.includes(foundBy))
        if (check === undefined) return assert.fail(foundBy)
        const checking = yield* Effect.fork(Effect.flip(Effect.flatMap(memory(spoil), check.run)))
        // What never comes need not be waited for in real time.
        yield* TestClock.adjust("45 seconds")
        const error = yield* Fiber.join(checking)
        assert.instanceOf(error, PoolStoreContract.Violation)
        assert.match(String(error), /^Violation: .+: expected .+, found .+/s)
      }))
  }
  it.effect("finds out a store that shares nothing", () =>
    Effect.gen(function*() {
      for (const check of PoolStoreContract.sharedChecks) {
        const error = yield* Effect.flip(check.run({
          open: PoolStore.makeMemory,
          outage: { begin: Effect.void, end: Effect.void },
          loseAll: Effect.void
        }))
        assert.include(error.message, "a store with `share`")
      }
    }))
})
