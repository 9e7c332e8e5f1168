/** The `HttpClient` of a program over a pool, nothing else of it changed: `npx tsx examples/http-client.ts` */
import * as FetchHttpClient from "@effect/platform/FetchHttpClient"
import * as HttpClient from "@effect/platform/HttpClient"
import * as HttpClientRequest from "@effect/platform/HttpClientRequest"
import * as HttpClientResponse from "@effect/platform/HttpClientResponse"
import * as KeymeshError from "effect-keymesh/KeymeshError"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as PooledHttpClient from "effect-keymesh/PooledHttpClient"
import * as Providers from "effect-keymesh/Providers"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import { main, say } from "./support/Print.js"

const [revoked, healthy] = ["sk-fake-revoked-58d1", "sk-fake-healthy-97e2"]

/** A program as it was before: it has never heard of keys. */
const talk = (baseUrl: string) =>
  Effect.gen(function*() {
    const client = (yield* HttpClient.HttpClient).pipe(
      HttpClient.mapRequest(HttpClientRequest.prependUrl(baseUrl)),
      HttpClient.filterStatusOk
    )
    const models = yield* Effect.flatMap(client.get("/models"), (response) => response.text)
    yield* say(`models: ${models.length > 0 ? "an answer" : "nothing"}`)

    const request = HttpClientRequest.post("/chat/completions").pipe(
      HttpClientRequest.bodyUnsafeJson({
        model: "gpt-5-mini",
        messages: [{ role: "user", content: "hi" }],
        stream: true
      })
    )
    const events = yield* HttpClientResponse.stream(client.execute(request)).pipe(
      Stream.decodeText(),
      Stream.splitLines,
      Stream.filter((line) => line.startsWith("data:")),
      Stream.runCount
    )
    yield* say(`stream: ${events > 2 ? "several events" : "cut short"}`)
  })

const program = Effect.gen(function*() {
  const fake = yield* FakeOpenAi.make({ keys: { [revoked]: { refuse: "revoked" } } })
  const Live = PooledHttpClient.layer(Providers.openAi, { baseUrl: fake.baseUrl }).pipe(
    Layer.provide([KeyPool.layer({ keys: [revoked, healthy] }), FetchHttpClient.layer])
  )
  yield* talk(fake.baseUrl).pipe(Effect.provide(Live))

  // With no key left it is the client's usual error, and inside it the pool's own.
  yield* fake.set(healthy, { refuse: "quota" })
  const error = yield* Effect.flip(talk(fake.baseUrl)).pipe(Effect.provide(Live))
  const inside = Option.map(KeymeshError.find(error), ({ _tag }) => _tag)
  yield* say(`${error._tag}, and inside it ${Option.getOrElse(inside, () => "nothing")}`)
})

main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
