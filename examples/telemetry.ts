/** What happens in a pool, as a Stream and as logs: `npx tsx examples/telemetry.ts` */
import * as Fault from "effect-keymesh/Fault"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Telemetry from "effect-keymesh/Telemetry"
import * as Console from "effect/Console"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import * as Stream from "effect/Stream"
import * as Print from "./support/Print.js"

const settings: KeyPool.Settings = {
  name: "demo",
  keys: [{ secret: "sk-fake-one-4b2a", label: "one" }, { secret: "sk-fake-two-8c1d", label: "two" }]
}

/** A call that key "one" always refuses, as if its rate limit were spent. */
const call = Effect.flatMap(
  KeyPool.KeyPool,
  (pool) =>
    pool.run(({ key }) =>
      key.label === "one" ? Effect.fail(Fault.make("RateLimited", { wait: "2 seconds" })) : Effect.succeed("an answer")
    )
).pipe(Effect.provide(KeyPool.layer(settings)))

const asStream = Effect.gen(function*() {
  yield* Print.title("Every event of a pool and its first call, as the JSON of Telemetry.encode")
  const telemetry = yield* Telemetry.Telemetry
  // `subscribe` listens from here on, before there is a pool; `Telemetry.stream` does so once it runs.
  const events = yield* telemetry.subscribe
  const printing = yield* Effect.fork(events.pipe(
    Stream.takeUntil((event) => event._tag === "call.end"),
    Stream.map(Telemetry.encode),
    Stream.runForEach((event) => Console.log(JSON.stringify(event)))
  ))
  yield* call
  yield* Fiber.join(printing)
}).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))

const asLogs = Effect.zipRight(
  Print.title("The same through Effect's logger: faults are warnings, changes of state info, requests debug"),
  // The layer lives as long as the program: a moment for the last line.
  Effect.zipLeft(call, Effect.sleep("50 millis"))
).pipe(
  Effect.provide(Layer.provideMerge(Telemetry.layerLogger, KeyPool.layerDefaults)),
  Logger.withMinimumLogLevel(LogLevel.Info),
  Effect.provide(Logger.logFmt)
)

Print.main(Effect.zipRight(asStream, asLogs))
