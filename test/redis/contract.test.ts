/** The contract of what stores share, over real servers. */
import { describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as PoolStoreContract from "../../src/PoolStoreContract.js"
import * as RedisPoolStore from "../../src/redis/RedisPoolStore.js"
import * as RedisMember from "../support/RedisMember.js"
import * as RedisServer from "../support/RedisServer.js"

describe.skipIf(!RedisServer.isHere)("what is shared on Redis", () => {
  for (const check of PoolStoreContract.sharedChecks) {
    it.scopedLive(`P4: ${check.name}`, () =>
      Effect.gen(function*() {
        const redis = yield* RedisServer.make()
        const way = yield* RedisServer.proxy(redis.port)
        yield* check.run({
          open: RedisPoolStore.make({ ...RedisMember.patient, url: way.url, heartbeat: 1_000, memberTimeout: 60_000 }),
          outage: {
            begin: Effect.zipRight(way.refuse(() => true), way.cut()),
            end: way.refuse(undefined)
          },
          loseAll: redis.cli("flushall")
        })
      }))
  }
})
