/** Calls that belong together, and what is stored with one account: `npx tsx examples/affinity.ts` */
import * as CallOptions from "effect-keymesh/CallOptions"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Effect from "effect/Effect"
import * as FakeOpenAi from "./support/FakeOpenAi.js"
import * as Print from "./support/Print.js"

// Three accounts: to the fake, as to the real one, what one of them stores is not there for the others.
const labels: Readonly<Record<string, string>> = {
  "sk-fake-north-51aa": "north",
  "sk-fake-south-62bb": "south",
  "sk-fake-west-73cc": "west"
}
const model = "gpt-5-mini"

const program = Effect.gen(function*() {
  const fake = yield* FakeOpenAi.make()
  const openai = yield* OpenAi.make({
    keys: Object.entries(labels).map(([secret, label]) => ({ secret, label })),
    baseUrl: fake.baseUrl
  })

  /** Runs calls, and tells which key each of their requests went with. */
  const shown = <A, E>(what: string, calls: Effect.Effect<A, E>) =>
    Effect.gen(function*() {
      const before = (yield* fake.requests).length
      const result = yield* calls
      const requests = (yield* fake.requests).slice(before)
      yield* Print.say(`${what.padEnd(26)} ${requests.map(({ key = "" }) => labels[key] ?? "?").join(" ")}`)
      return result
    })

  const ask = openai.use((client) =>
    client.chat.completions.create({ model, messages: [{ role: "user", content: "hello" }] })
  )
  const three = Effect.replicateEffect(ask, 3, { discard: true })

  yield* Print.title("Conversations")
  yield* shown("without a name", three)
  for (const name of ["alice", "bob", "carol"]) {
    yield* shown(name, three.pipe(CallOptions.withAffinity(name)))
  }
  const headers = { [CallOptions.affinityHeader]: "bob" }
  yield* shown(
    "bob, by a header",
    Effect.promise(() =>
      openai.client.chat.completions.create({ model, messages: [{ role: "user", content: "hello" }] }, { headers })
    )
  )

  yield* Print.title("Stored resources")
  const file = yield* shown(
    "a file",
    openai.use((client) => client.files.create({ file: new File(["one"], "one.txt"), purpose: "assistants" }))
  )
  yield* shown("read three times", Effect.replicateEffect(openai.use((client) => client.files.retrieve(file.id)), 3))
  const response = yield* shown(
    "a response",
    openai.use((client) => client.responses.create({ model, input: "hello" }))
  )
  yield* shown(
    "and the next turns",
    Effect.replicateEffect(
      openai.use((client) => client.responses.create({ model, input: "and then?", previous_response_id: response.id })),
      3
    )
  )
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
