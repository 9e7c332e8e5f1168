/** The retry policies are ordinary Schedules, for any `Effect.retry`: `npx tsx examples/retry-policy.ts` */
import * as RetryPolicy from "effect-keymesh/RetryPolicy"
import * as Clock from "effect/Clock"
import * as Console from "effect/Console"
import * as Data from "effect/Data"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Random from "effect/Random"
import * as Schedule from "effect/Schedule"
import * as Print from "./support/Print.js"

/** An error that says how long to wait, as servers do by Retry-After. */
class Busy extends Data.TaggedError("Busy")<{ readonly retryAfter?: Duration.Duration }> {}

/** Runs an effect that never succeeds, and tells when each attempt began. */
const watch = (name: string, error: Busy, policy: Schedule.Schedule<unknown, Busy>) =>
  Effect.gen(function*() {
    yield* Print.title(name)
    const started = yield* Clock.currentTimeMillis
    const attempt = Effect.gen(function*() {
      yield* Console.log(`  attempt after ${String((yield* Clock.currentTimeMillis) - started).padStart(4)} ms`)
      return yield* error
    })
    yield* Effect.ignore(Effect.retry(attempt, policy))
  })

const quick = RetryPolicy.fullJitter({ base: "50 millis", max: "200 millis" })

const program = Effect.gen(function*() {
  yield* watch("Full jitter below 50, 100, 200 ms; 4 attempts", new Busy({}), quick.pipe(RetryPolicy.attempts(4)))
  yield* watch(
    "The same, and never before the 150 ms that the server asks for",
    new Busy({ retryAfter: Duration.millis(150) }),
    quick.pipe(RetryPolicy.attempts(4), RetryPolicy.respectRetryAfter())
  )
  yield* watch(
    "The same inside a budget of 400 ms: a retry that would begin later does not take place",
    new Busy({ retryAfter: Duration.millis(150) }),
    quick.pipe(RetryPolicy.attempts(20), RetryPolicy.respectRetryAfter(), RetryPolicy.withBudget("400 millis"))
  )
  yield* watch(
    "Decorrelated jitter, and a combinator of Effect's own: at least 100 ms apart",
    new Busy({}),
    RetryPolicy.decorrelatedJitter({ base: "20 millis" }).pipe(
      RetryPolicy.attempts(3),
      Schedule.modifyDelay((_, delay) => Duration.max(delay, Duration.millis(100)))
    )
  )
})

// A fixed seed: the same delays at every run.
Print.main(Effect.withRandom(program, Random.make("retry-policy")))
