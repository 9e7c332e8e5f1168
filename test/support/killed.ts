/**
 * A process that is to be killed: `writer` saves records of several pools as fast as it can; `pool` makes calls and keeps
 * its state as a program does. It says on its output what is saved for certain.
 */
import * as NodeFileSystem from "@effect/platform-node/NodeFileSystem"
import * as Path from "@effect/platform/Path"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Stream from "effect/Stream"
import { writeSync } from "node:fs"
import type { StoredPool } from "../../src/PoolRecord.js"
import * as PoolStore from "../../src/PoolStore.js"
import * as Http from "../../src/providers/Http.js"
import * as Telemetry from "../../src/Telemetry.js"

const [role, directory = "", pools = "", baseUrl = ""] = process.argv.slice(2)

/** At once, so that nothing that was said is lost with the process. */
const say = (line: string) => Effect.sync(() => writeSync(1, `${line}\n`))

const store = PoolStore.makeFile({ directory }).pipe(Effect.provide(Layer.merge(NodeFileSystem.layer, Path.layer)))

/** A record that shows if a part of it is of another. */
const recordOf = (n: number): StoredPool => ({
  version: 1,
  savedAt: n,
  keys: Array.from({ length: 1 + (n * 37) % 300 }, (_, i) => ({
    id: `key_${i}`,
    enabled: true,
    total: n,
    successes: 0,
    faults: 0,
    ignored: 0,
    breaker: { _tag: "Closed", failures: 0, trips: 0 }
  })),
  groups: [],
  models: []
})

/** Each pool has a store of its own: nobody takes turns. */
const writer = (pool: string) =>
  Effect.gen(function*() {
    const { load, save } = yield* store
    const found = yield* load(pool)
    let n = found._tag === "Some" ? found.value.savedAt : 0
    for (;;) {
      n++
      yield* save(pool, recordOf(n))
      yield* say(`${pool} ${n}`)
    }
  })

const pool = (name: string) =>
  Effect.scoped(Effect.gen(function*() {
    const telemetry = yield* Telemetry.Telemetry
    yield* Effect.forkScoped(Stream.runForEach(telemetry.stream, (event) =>
      event._tag === "store.degraded" ? say(`degraded ${event.problem}`) : Effect.void))
    const files = yield* store
    const saying: PoolStore.Service = {
      ...files,
      save: (pool, record) =>
        Effect.zipRight(
          files.save(pool, record),
          say(`saved ${record.savedAt} ${
            record.keys.reduce((sum, key) => sum + key.successes, 0)
          }`)
        )
    }
    const http = yield* Effect.provideService(
      Http.make({
        name,
        baseUrl,
        auth: { header: "x-api-key" },
        keys: ["key-one", "key-two", { secret: "key-three", limits: { requestsPerDay: 1_000_000 } }]
      }),
      PoolStore.PoolStore,
      saying
    )
    const { keys } = yield* http.pool.snapshot
    yield* say(`loaded ${keys.reduce((sum, key) => sum + key.successes, 0)}`)
    const call = Effect.ignore(Effect.scoped(Effect.flatMap(http.client.get("/"), (answer) => answer.text))).pipe(
      Effect.delay(2)
    )
    yield* Effect.all(Array.from({ length: 4 }, () => Effect.forever(call)), { concurrency: "unbounded" })
  })).pipe(Effect.provide(Telemetry.layer))

Effect.runFork(
  role === "writer"
    ? Effect.forEach(pools.split(","), writer, { concurrency: "unbounded", discard: true })
    : pool(pools)
)
