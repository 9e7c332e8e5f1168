/** Any REST endpoint over a pool, with answers decoded by a schema: `npx tsx examples/http.ts` */
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import * as Http from "effect-keymesh/Http"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import { main, say } from "./support/Print.js"

const [limited, healthy] = ["sk-fake-limited-31a7", "sk-fake-healthy-62c8"]

/** A weather service that takes its key in the query. */
const weatherService = FakeOpenAi.make({
  handler: ({ method, query }) =>
    query.get("key") === limited
      ? { status: 429, headers: { "retry-after": "30" }, body: JSON.stringify({ error: "too many requests" }) }
      : method === "POST"
      ? { status: 500, body: JSON.stringify({ error: "no idea whether that was stored" }) }
      : { status: 200, body: JSON.stringify({ city: query.get("city"), celsius: 24 }) }
})

const Forecast = Schema.Struct({ city: Schema.String, celsius: Schema.Number })

const program = Effect.gen(function*() {
  const service = yield* weatherService
  const weather = yield* Http.make({
    name: "weather",
    baseUrl: `${service.origin}/v2`,
    auth: { query: "key" },
    keys: [{ secret: limited, label: "limited" }, { secret: healthy, label: "healthy" }]
  })

  const forecast = yield* weather.client.get("/forecast", { urlParams: { city: "Vienna" } }).pipe(
    Effect.flatMap(HttpClientResponse.schemaBodyJson(Forecast))
  )
  yield* say(`${forecast.city}: ${forecast.celsius} °C`)

  // What may change something is not sent twice when nobody knows whether it arrived.
  const report = HttpClientRequest.post("/reports").pipe(HttpClientRequest.bodyUnsafeJson({ city: "Vienna" }))
  const { status } = yield* weather.client.execute(report)
  yield* say(`report: HTTP ${status}`)

  const response = yield* Effect.promise(() => weather.fetch(`${service.origin}/v2/forecast?city=Graz`))
  yield* say(`as a fetch: HTTP ${response.status}`)

  for (const { faults, label, successes } of (yield* weather.pool.snapshot).keys) {
    yield* say(`${label}: ${successes} served, ${faults} ${faults === 1 ? "fault" : "faults"}`)
  }
})

main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
