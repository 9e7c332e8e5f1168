/** Four processes that share their keys by Redis: `npm run example:cluster` */
import * as CallOptions from "effect-keymesh/CallOptions"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as RedisPoolStore from "effect-keymesh/RedisPoolStore"
import * as Telemetry from "effect-keymesh/Telemetry"
import * as Data from "effect/Data"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import type { LoggedRequest } from "./support/FakeProvider.js"
import * as Print from "./support/Print.js"
import * as Redis from "./support/Redis.js"
import * as Workers from "./support/Workers.js"

const [limited, free, counted, ailing, healthy] = [
  "sk-fake-limited-0c11",
  "sk-fake-free-1d22",
  "sk-fake-counted-2e33",
  "sk-fake-ailing-3f44",
  "sk-fake-healthy-4a55"
]
const count = 4
const perMinute = 12

// ------------------------------------------------------------------------------------------------- what each process does

/** Where the others are met, and the provider. */
interface Place {
  readonly redis: string
  readonly prefix: string
  readonly baseUrl: string
}

type Order =
  | { readonly _tag: "Calls"; readonly pool: string; readonly calls: number }
  /** Answered as soon as this process knows of what holds a key back. */
  | { readonly _tag: "Notices"; readonly pool: string; readonly label: string }

interface Calls {
  readonly answered: number
  readonly refused: number
}

const pools = (baseUrl: string): ReadonlyArray<OpenAi.Settings> => [
  {
    name: "cooldown",
    keys: [{ secret: limited, label: "limited" }, { secret: free, label: "free" }],
    strategy: "sequential-then-rotate",
    baseUrl
  },
  { name: "limit", keys: [{ secret: counted, limits: { requestsPerMinute: perMinute } }], baseUrl },
  {
    name: "probe",
    keys: [{ secret: ailing, label: "ailing" }, { secret: healthy, label: "healthy" }],
    strategy: "sequential-then-rotate",
    breaker: { threshold: 3, cooldown: "1 second" },
    attribution: "per-key",
    baseUrl
  }
]

const worker = Workers.serve((place: Place) =>
  Effect.gen(function*() {
    // The store is there for as long as the process is.
    const shared = yield* Layer.build(Layer.merge(
      RedisPoolStore.layer({
        url: place.redis,
        prefix: place.prefix,
        // So many processes on a small machine: whoever does not get to run for a while is not away.
        claimTimeout: "2 seconds"
      }),
      Telemetry.layer
    ))
    const services = yield* Effect.forEach(pools(place.baseUrl), OpenAi.make).pipe(Effect.provide(shared))
    const named = new Map(services.map((service) => [service.pool.name, service]))
    return (order: Order) =>
      Effect.gen(function*() {
        const openai = yield* Effect.fromNullable(named.get(order.pool))
        if (order._tag === "Notices") {
          const keyIsClosed = Effect.map(
            openai.pool.snapshot,
            ({ keys }) =>
              keys.some((key) => key.label === order.label && (key.closed ?? key.closedModels[0]) !== undefined)
          )
          return yield* Effect.as(
            Effect.repeat(Effect.zipRight(Effect.sleep(1), keyIsClosed), { until: Boolean }),
            none
          )
        }
        const call = openai.use((client) =>
          client.chat.completions.create({ model: "gpt-5-mini", messages: [{ role: "user", content: "hello" }] })
        )
        const answers = yield* Effect.replicateEffect(Effect.option(call), order.calls, { concurrency: "unbounded" })
        const answered = answers.filter(({ _tag }) => _tag === "Some").length
        return { answered, refused: order.calls - answered }
      }).pipe(CallOptions.withOptions({ maxWait: 0 }))
  })
)

const none: Calls = { answered: 0, refused: 0 }

// ---------------------------------------------------------------------------------------------------------- who starts them

class NotShared extends Data.Error<{ readonly message: string }> {}

/** Prints what is so, or fails. */
const holds = (is: boolean, text: string) => is ? Print.say(text) : new NotShared({ message: `It is not so: ${text}` })

const program = Effect.gen(function*() {
  const redis = yield* Redis.running
  const fake = yield* FakeOpenAi.make({
    keys: {
      [limited]: { limit: { requestsPerMinute: 1, says: "message" } },
      [ailing]: { outage: { status: 500 } }
    }
  })
  const requests = (key: string) => Effect.map(fake.requests, (all) => all.filter((request) => request.key === key))

  yield* Print.title(`${count} processes with the same keys, and Redis at ${redis.where}`)
  const place: Place = {
    redis: redis.url,
    prefix: `keymesh-example-${process.pid}-${Date.now()}`,
    baseUrl: fake.baseUrl
  }
  const all = yield* Workers.start<Place, Order, Calls>(new URL(import.meta.url), count, place)
  const [one, others] = [all.slice(0, 1), all.slice(1)]
  const ask = (workers: typeof all, order: Order) =>
    Effect.map(
      Effect.forEach(workers, (each) => each(order), { concurrency: "unbounded" }),
      (answers) =>
        answers.reduce((a, b) => ({ answered: a.answered + b.answered, refused: a.refused + b.refused }), none)
    )

  yield* Print.title("A cooldown that one process was told")
  yield* ask(one, { _tag: "Calls", pool: "cooldown", calls: 1 })
  yield* ask(one, { _tag: "Calls", pool: "cooldown", calls: 1 })
  const [took] = yield* Effect.timed(ask(others, { _tag: "Notices", pool: "cooldown", label: "limited" }))
  const before = (yield* requests(limited)).length
  const spared = yield* ask(others, { _tag: "Calls", pool: "cooldown", calls: 5 })
  const after = (yield* requests(limited)).length
  yield* Print.say(
    `One process met the limit of a key. ${Print.howLong(Duration.toMillis(took))} later all others knew.`
  )
  yield* holds(
    spared.answered === 15 && after === before,
    `They made ${spared.answered} calls, and asked ${after - before} times with that key.`
  )

  yield* Print.title(`A declared limit: ${perMinute} requests per minute`)
  const { answered, refused } = yield* ask(all, { _tag: "Calls", pool: "limit", calls: 5 })
  yield* holds(
    answered === perMinute && (yield* requests(counted)).length === perMinute,
    `${count} processes made 5 calls each, at once: ${answered} went out, ${refused} were told when.`
  )

  yield* Print.title("One probe")
  yield* ask(one, { _tag: "Calls", pool: "probe", calls: 3 })
  yield* ask(others, { _tag: "Notices", pool: "probe", label: "ailing" })
  const faults = (yield* requests(ailing)).length
  yield* Print.say(`A key failed ${faults} times with one process: its breaker is open in all.`)
  // It recovers, and answers slowly, so that there is time for a second probe.
  yield* fake.set(ailing, { latencyMs: 1_000 })
  yield* Effect.sleep("1200 millis")
  const served = yield* ask(all, { _tag: "Calls", pool: "probe", calls: 5 })
  const probes = atOnce((yield* requests(ailing)).slice(faults))
  yield* holds(
    probes === 1 && served.answered === 20,
    `Half-open, ${count} processes made 5 calls each, at once: ${probes} of the ${served.answered} tried the key, for all.`
  )
})

/** How many were there before the first of them was answered. */
const atOnce = (requests: ReadonlyArray<LoggedRequest>): number => {
  const end = Math.min(...requests.map(({ endedAt }) => endedAt ?? Infinity))
  return requests.filter(({ at }) => at < end).length
}

Print.main(Workers.isOne ? worker : Effect.scoped(program))
