/** Settings of single calls, and the typed errors: `npx tsx examples/call-options.ts` */
import * as CallOptions from "effect-keymesh/CallOptions"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import * as Print from "./support/Print.js"

const secret = "sk-fake-only-d4f9"

const program = Effect.gen(function*() {
  const fake = yield* FakeOpenAi.make()
  const openai = yield* OpenAi.make({
    keys: [{ secret, label: "only" }],
    baseUrl: fake.baseUrl,
    // So that the troubles below do not open it: each call is to show its own error.
    breaker: { threshold: 100, rate: false }
  })

  /** A call whose every failure is told, each by its tag. */
  const ask = (content: string) =>
    openai.use((client) =>
      client.chat.completions.create({ model: "gpt-5-mini", messages: [{ role: "user", content }] })
    ).pipe(
      Effect.map((answer) => answer.choices[0]?.message.content ?? ""),
      Effect.catchTag("DeadlineExceeded", (error) => Effect.succeed(`DeadlineExceeded: ${error.message}`)),
      Effect.catchTag("AllKeysExhausted", (error) => Effect.succeed(`AllKeysExhausted: ${error.message}`)),
      Effect.catchTag("BudgetExceeded", (error) => Effect.succeed(`BudgetExceeded: ${error.message}`)),
      Effect.catchTag(
        "ProviderError",
        (error) => Effect.succeed(`ProviderError, ${error.fault.kind}: ${error.message}`)
      )
    )
  const tell = (what: string, call: Effect.Effect<string, { readonly message: string }>) =>
    Effect.flatMap(
      Effect.timed(call),
      ([took, text]) =>
        Effect.zipRight(Print.title(`${what} (${Print.howLong(Duration.toMillis(took))})`), Print.say(text))
    )

  yield* tell("An ordinary call", ask("hello"))

  yield* fake.set(secret, { hang: true })
  yield* tell(
    "A deadline of 200 ms, and a server that does not answer",
    ask("hello").pipe(CallOptions.withDeadline("200 millis"))
  )

  yield* fake.set(secret, { outage: { status: 503 } })
  yield* tell("A budget of 300 ms, and an outage", ask("hello").pipe(CallOptions.withOptions({ budget: "300 millis" })))

  yield* fake.set(secret, { limit: { requestsPerMinute: 1 } })
  yield* ask("uses up the minute")
  yield* tell("No waiting at all, and a rate limit", ask("hello").pipe(CallOptions.withOptions({ maxWait: 0 })))
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
