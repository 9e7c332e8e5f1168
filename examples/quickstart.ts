/**
 * The pool at work, as it happens: `npm start`.
 *
 * With nothing configured, the official `openai` SDK talks to a make-believe OpenAI on this machine, which revokes a
 * key, limits rates and fails for a while. With OPENAI_API_KEYS (comma-separated) a few small calls go to the real API,
 * with the model OPENAI_MODEL.
 */
import * as ApiKey from "effect-keymesh/ApiKey"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Telemetry from "effect-keymesh/Telemetry"
import * as Clock from "effect/Clock"
import * as Config from "effect/Config"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import * as SubscriptionRef from "effect/SubscriptionRef"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import { everyKey } from "./support/FakeProvider.js"
import * as Print from "./support/Print.js"

const program = Effect.gen(function*() {
  const model = yield* Config.string("OPENAI_MODEL").pipe(Config.withDefault("gpt-5-mini"))
  const keys = yield* Config.option(ApiKey.config("OPENAI_API_KEYS"))
  yield* Option.match(keys, { onNone: () => rehearsal(model), onSome: (keys) => forReal(keys, model) })
})

// ------------------------------------------------------------------------------------- against the fake, on loopback

const alpha = "sk-fake-alpha-7d1f0c52"
const bravo = "sk-fake-bravo-93be4a18"
const charlie = "sk-fake-charlie-5c60e2d7"

const rehearsal = (model: string) =>
  Effect.gen(function*() {
    const fake = yield* FakeOpenAi.make({
      keys: { [alpha]: { latencyMs: 40 }, [bravo]: { latencyMs: 60 }, [charlie]: { refuse: "revoked" } },
      reply: () => answer
    })
    yield* Print.say(`No OPENAI_API_KEYS: the openai SDK talks to a fake OpenAI at ${fake.origin}, not to a provider.`)
    yield* Print.title("Three keys join the pool")
    const { ask, settled, stream, summary, tally } = yield* start(model, {
      keys: [
        { secret: alpha, label: "alpha" },
        { secret: bravo, label: "bravo" },
        { secret: charlie, label: "charlie" }
      ],
      baseUrl: fake.baseUrl,
      // By default a breaker opens for 30 seconds. Nobody wants to watch that.
      breaker: { cooldown: "500 millis" }
    })

    yield* Print.title("One key was revoked: the call moves on, and nobody asks that key again")
    yield* Effect.repeatN(ask, 4)
    yield* settled

    yield* Print.title(
      "bravo fails: its breaker opens, for 0.5 s here (30 s by default), and for twice that after a bad probe"
    )
    const askUntil = (done: (sum: Tally) => boolean) =>
      Effect.zipRight(Effect.delay(ask, "120 millis"), SubscriptionRef.get(tally)).pipe(
        Effect.repeat({ until: done, times: 60 })
      )
    yield* fake.set(bravo, { latencyMs: 60, outage: { status: 500 } })
    yield* askUntil(({ openings }) => openings === 2)
    yield* fake.set(bravo, { latencyMs: 60 })
    yield* askUntil(({ closings }) => closings === 1)
    yield* settled

    yield* Print.title(
      "alpha and bravo take 2 requests a second each, and 6 come at once: 2 wait for the instant a key is free"
    )
    const limited = { latencyMs: 40, limit: { requestsPerMinute: 120, windowMs: 1_000 } }
    yield* fake.set(alpha, limited)
    yield* fake.set(bravo, limited)
    yield* Effect.replicateEffect(ask, 6, { concurrency: "unbounded", discard: true })
    yield* settled

    yield* Print.title("A stream breaks before its first word: another key takes over, and the reader sees one answer")
    yield* fake.set(alpha, { chunkDelayMs: 40 })
    yield* fake.set(bravo, { chunkDelayMs: 40 })
    yield* fake.script(everyKey, [{ streamError: { after: 0, as: "overloaded" } }])
    yield* stream
    yield* summary("fake")
  }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))

const answer = "A key that rests is not a key that is lost. The pool remembers how long to leave it alone,\n  " +
  "asks another one meanwhile, and comes back with one careful question before it sends the crowd."

// ------------------------------------------------------------------------------------------------ against the real API

const forReal = (keys: ReadonlyArray<ApiKey.Input>, model: string) =>
  Effect.gen(function*() {
    yield* Print.title("The keys of OPENAI_API_KEYS join the pool")
    const { ask, openai, settled, stream, summary } = yield* start(model, { keys })
    yield* Print.title(`Three small calls and a stream with ${model}, to ${openai.client.baseURL}`)
    yield* Effect.repeatN(ask, 2)
    yield* settled
    yield* stream
    yield* summary(new URL(openai.client.baseURL).host)
  }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))

// ---------------------------------------------------------------------------------------------------------- both alike

/** The service, with its events printed and counted as they come. */
const start = (model: string, settings: OpenAi.Settings) =>
  Effect.gen(function*() {
    const since = yield* Clock.currentTimeMillis
    const tally = yield* SubscriptionRef.make(nothing)
    const telemetry = yield* Telemetry.Telemetry
    // Subscribed before there is a pool, so that it sees the keys join.
    const events = yield* telemetry.subscribe
    yield* Effect.forkScoped(Stream.runForEach(events, (event) => {
      const line = Print.event(event, since)
      return Effect.zipRight(
        line === undefined ? Effect.void : Print.say(line),
        SubscriptionRef.update(tally, counted(event))
      )
    }))

    const openai = yield* OpenAi.make(settings)
    const messages = [{ role: "user" as const, content: "Say in one short sentence what an API key is." }]
    const ask = openai.use((client) => client.chat.completions.create({ model, messages }))
    /** Waits until all that happened so far has been printed. */
    const settled = Effect.flatMap(openai.pool.snapshot, ({ calls, keys }) =>
      tally.changes.pipe(
        Stream.takeUntil((sum) => sum.calls >= calls && sum.keys >= keys.length),
        Stream.runDrain
      ))
    yield* settled

    const words = openai.stream((client) => client.chat.completions.create({ model, messages, stream: true })).pipe(
      Stream.map((chunk) => chunk.choices[0]?.delta.content ?? ""),
      Stream.filter((text) => text !== ""),
      // The first word waits for the lines about how it came to be.
      Stream.zipWithIndex,
      Stream.tap(([, index]) => index === 0 ? Effect.zipRight(settled, Print.write("\n  ")) : Effect.void),
      Stream.runForEach(([text]) => Print.write(Print.paint("cyan", text)))
    )

    const summary = (where: string) =>
      Effect.gen(function*() {
        yield* settled
        const { at, keys, pool } = yield* openai.pool.snapshot
        yield* Print.title(`The pool "${pool}" in the end`)
        const rows = keys.map(({ breaker, closed, faults, id, label, successes, total }) => {
          const state = closed === undefined ?
            "ready" :
            `${closed.fault ?? closed.gate}, ${
              closed.until === undefined ? "for good" : Print.howLong(closed.until - at)
            } left`
          return [label, id, total, successes, faults, breaker, state]
        })
        yield* Print.say(Print.table(["key", "id", "attempts", "served", "faults", "breaker", "state"], rows))
        const { attempts, calls, faults } = yield* SubscriptionRef.get(tally)
        const seen = faults === 0
          ? "no fault at all"
          : `${faults} ${faults === 1 ? "fault" : "faults"}, none of which the caller saw`
        const text = `${calls} calls to the ${
          where === "fake" ? "fake" : `API at ${where}`
        }, ${attempts} attempts, ${seen}.`
        yield* Print.say(`\n${Print.paint("green", text)}`)
      })

    return { openai, ask, settled, summary, tally, stream: Effect.zipRight(words, Print.write("\n")) }
  })

/** How often what happened. */
interface Tally {
  readonly keys: number
  readonly calls: number
  readonly attempts: number
  readonly faults: number
  readonly openings: number
  readonly closings: number
}

const nothing: Tally = { keys: 0, calls: 0, attempts: 0, faults: 0, openings: 0, closings: 0 }

const counted = ({ _tag }: Telemetry.Event) => (sum: Tally): Tally => ({
  keys: sum.keys + (_tag === "key.added" ? 1 : 0),
  calls: sum.calls + (_tag === "call.end" ? 1 : 0),
  attempts: sum.attempts + (_tag === "request.start" ? 1 : 0),
  faults: sum.faults + (_tag === "request.fail" ? 1 : 0),
  openings: sum.openings + (_tag === "circuit.open" ? 1 : 0),
  closings: sum.closings + (_tag === "circuit.closed" ? 1 : 0)
})

Print.main(program)
