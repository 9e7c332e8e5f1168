/** A pool over an SDK that the library has never heard of: `npx tsx examples/any-effect.ts` */
import * as Fault from "effect-keymesh/Fault"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Outcome from "effect-keymesh/Outcome"
import * as Cause from "effect/Cause"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Redacted from "effect/Redacted"
import * as Print from "./support/Print.js"

/** The SDK: it takes a key, gives promises, and has words of its own for what goes wrong. */
class WeatherClient {
  readonly token: string
  constructor(token: string) {
    this.token = token
  }
  async forecast(city: string): Promise<string> {
    if (this.token.endsWith("spent")) throw Object.assign(new Error("no more calls this hour"), { reason: "SLOW_DOWN" })
    if (this.token.endsWith("gone")) throw Object.assign(new Error("token deleted"), { reason: "BAD_TOKEN" })
    if (city === "Atlantis") throw Object.assign(new Error("no such city"), { reason: "NO_SUCH_CITY" })
    return `${city}: sun after rain`
  }
}

class WeatherError extends Data.TaggedError("WeatherError")<{ readonly reason: unknown; readonly message: string }> {}

/** What its errors mean, in the words of the pool. Everything else is none of the key's business. */
const classify = (exit: Exit.Exit<string, WeatherError>): Outcome.Outcome => {
  if (Exit.isSuccess(exit)) return Outcome.success
  const error = Option.getOrUndefined(Cause.failureOption(exit.cause))
  if (error?.reason === "SLOW_DOWN") return Outcome.fault(Fault.make("RateLimited", { wait: "1 hour" }))
  if (error?.reason === "BAD_TOKEN") return Outcome.fault(Fault.make("Unauthorized", { explicit: true }))
  return Outcome.ignored
}

const program = Effect.gen(function*() {
  const pool = yield* KeyPool.make({
    name: "weather",
    keys: [
      { secret: "sk-fake-weather-spent", label: "spent" },
      { secret: "sk-fake-weather-gone", label: "gone" },
      { secret: "sk-fake-weather-good", label: "good" }
    ]
  })
  const forecast = (city: string) =>
    pool.run(
      ({ attempt, key }) =>
        Effect.tryPromise({
          try: () => new WeatherClient(Redacted.value(key.secret)).forecast(city),
          catch: (e) =>
            new WeatherError({
              message: e instanceof Error ? e.message : "unknown",
              reason: e instanceof Error && "reason" in e ? e.reason : undefined
            })
        }).pipe(Effect.map((text) => `${text} (attempt ${attempt}, key "${key.label}")`)),
      { classify }
    )
  yield* Effect.flatMap(forecast("Vienna"), Print.say)
  yield* Effect.flatMap(forecast("Lisbon"), Print.say)
  // The caller's own error comes back as it is, after one attempt: no key is blamed for it.
  yield* Effect.flatMap(Effect.flip(forecast("Atlantis")), (error) => Print.say(`${error._tag}: ${error.message}`))
  const { keys } = yield* pool.snapshot
  yield* Print.say(Print.table(
    ["key", "attempts", "state"],
    keys.map((key) => [
      key.label,
      key.total,
      key.closed?.fault ?? "ready"
    ])
  ))
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
