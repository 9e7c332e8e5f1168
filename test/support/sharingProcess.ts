/** One process of a pool that several share: it calls a provider as it is told, and tells what became of its calls. */
import * as Cause from "effect/Cause"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Fault from "../../src/Fault.js"
import * as KeyPool from "../../src/KeyPool.js"
import * as RedisPoolStore from "../../src/redis/RedisPoolStore.js"
import * as Telemetry from "../../src/Telemetry.js"

class Refused extends Data.TaggedError("Refused")<{ readonly fault: Fault.Fault }> {}

export interface Orders {
  readonly redis: RedisPoolStore.Settings
  readonly provider: string
  readonly pool: Pick<
    KeyPool.Settings,
    "keys" | "breaker" | "floor" | "budget" | "maxWait" | "strategy" | "attribution" | "retryTokens"
  >
  /** Calls at a time, how many in all of each, and the pause between two. */
  readonly lanes: number
  readonly calls: number
  readonly pauseMillis: number
}

export interface Report {
  readonly served: number
  readonly failed: ReadonlyArray<string>
}

const orders: Orders = JSON.parse(process.env["ORDERS"] ?? "")

const program = Effect.gen(function*() {
  const pool = yield* KeyPool.make({ name: "shared", ...orders.pool })
  const call = pool.run(({ key }) =>
    Effect.gen(function*() {
      const { headers, status } = yield* Effect.tryPromise({
        try: async (signal) => {
          const response = await fetch(`${orders.provider}/${key.label}`, { signal })
          await response.text()
          return response
        },
        catch: () => new Refused({ fault: Fault.make("Network") })
      })
      const wait = headers.get("retry-after")
      const fault = Fault.fromStatus(status, wait === null ? {} : { wait: Number(wait) * 1_000 })
      if (fault !== undefined) return yield* new Refused({ fault })
    })
  )
  process.send?.("ready")
  yield* Effect.async<void>((resume) => {
    process.once("message", () => resume(Effect.void))
  })
  const exits = yield* Effect.forEach(
    Array.from({ length: orders.lanes }),
    () =>
      Effect.forEach(
        Array.from({ length: orders.calls }),
        () => Effect.zipLeft(Effect.exit(call), Effect.sleep(orders.pauseMillis))
      ),
    { concurrency: "unbounded" }
  )
  const all = exits.flat()
  const report: Report = {
    served: all.filter(Exit.isSuccess).length,
    failed: all.flatMap((exit) =>
      Exit.isSuccess(exit) ? [] : [Option.match(Cause.failureOption(exit.cause), { onNone: () => "?", onSome: String })]
    )
  }
  yield* Effect.async<void>((resume) => {
    process.send?.(report, () => resume(Effect.void))
  })
})

Effect.runPromise(Effect.scoped(Effect.provide(
  program,
  Layer.merge(RedisPoolStore.layer(orders.redis), Telemetry.layer)
))).then(() => process.exit(0), (error) => {
  console.error(error)
  process.exit(1)
})
