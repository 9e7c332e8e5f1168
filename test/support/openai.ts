/** Pools of the OpenAI adapter against the fake provider, in real time. */
import { it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Ref from "effect/Ref"
import * as Schedule from "effect/Schedule"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import OpenAI from "openai"
import OldestOpenAI from "openai-oldest"
import * as FakeOpenAi from "../../examples/support/FakeOpenAi.js"
import type { Transport } from "../../src/http/Attempt.js"
import * as KeyPool from "../../src/KeyPool.js"
import type * as PoolStore from "../../src/PoolStore.js"
import * as OpenAi from "../../src/providers/OpenAi.js"
import * as Telemetry from "../../src/Telemetry.js"

export const model = "gpt-4o-mini"
export const messages = [{ role: "user" as const, content: "good morning to you" }]
export const said = "You said: good morning to you"

export const a = "sk-test-alpha-0123456789"
export const b = "sk-test-bravo-0123456789"
export const c = "sk-test-carol-0123456789"

/** The two ends of the range of SDKs. The calls made in tests are the same in both, although their classes are not. */
export const sdks: ReadonlyArray<readonly [version: string, Sdk: typeof OpenAI]> = [
  ["6.49", OpenAI],
  ["5.0", OldestOpenAI as unknown as typeof OpenAI]
]

/** No retries: a provider's failure is the call's. Leaving dead keys goes on. */
export const once = { retry: Schedule.stop } as const

/** Retries without waits, so many. */
export const atOnce = (times: number) => ({ retry: Schedule.recurs(times), retryTokens: false }) as const

/** The service over the keys a, b, c … as many as are named, labelled by their letter. */
export const service = (
  fake: FakeOpenAi.FakeOpenAi,
  labels: string,
  settings: Partial<OpenAi.Settings> = {},
  Sdk: typeof OpenAI = OpenAI
) =>
  OpenAi.make({
    keys: [...labels].map((label) => ({ secret: secretOf(label), label })),
    client: (fetch) => new Sdk({ apiKey: "unused", baseURL: fake.baseUrl, organization: null, project: null, fetch }),
    floor: false,
    cooldowns: { jitter: 0 },
    ...settings
  })

export const secretOf = (label: string): string => {
  const secret = { a, b, c }[label]
  if (secret === undefined) throw new Error(`no key ${label}`)
  return secret
}

/** A fake, and the service over its keys. */
export const both = (
  labels: string,
  options: FakeOpenAi.Options = {},
  settings: Partial<OpenAi.Settings> = {}
) =>
  Effect.gen(function*() {
    const fake = yield* FakeOpenAi.make(options)
    return { fake, openai: yield* service(fake, labels, settings) }
  })

export const bare = (fake: FakeOpenAi.FakeOpenAi, Sdk: typeof OpenAI = OpenAI, options: { timeout?: number } = {}) =>
  new Sdk({ apiKey: a, baseURL: fake.baseUrl, maxRetries: 0, organization: null, project: null, ...options })

export const chat = (client: OpenAI, options?: OpenAI.RequestOptions) =>
  client.chat.completions.create({ model, messages }, options)

export const chatStream = (client: OpenAI, options?: OpenAI.RequestOptions) =>
  client.chat.completions.create({ model, messages, stream: true }, options)

/** What a promise fails with. */
export const failure = (promise: () => PromiseLike<unknown>): Effect.Effect<unknown> =>
  Effect.flip(Effect.tryPromise({ try: promise, catch: (error) => error })).pipe(
    Effect.catchAll((value) => Effect.dieMessage(`expected a failure, got ${JSON.stringify(value)}`))
  )

/** Everything an iterable gives until it ends or throws. */
export const drained = async <A>(open: () => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>) => {
  const items: Array<A> = []
  try {
    for await (const item of await open()) items.push(item)
    return { items, error: undefined }
  } catch (error) {
    return { items, error }
  }
}

export const textIn = (chunks: Iterable<OpenAI.ChatCompletionChunk>): string =>
  Array.from(chunks, (chunk) => chunk.choices[0]?.delta.content ?? "").join("")

/** The letters of the keys of all requests so far, in order of arrival. */
export const asked = (fake: FakeOpenAi.FakeOpenAi): Effect.Effect<string> =>
  Effect.map(fake.requests, (requests) => requests.map(({ key }) => letters[key ?? ""] ?? "?").join(""))

const letters: Readonly<Record<string, string>> = { [a]: "a", [b]: "b", [c]: "c" }

/** In flight, over all keys of the pool. */
export const inFlight = ({ pool }: OpenAi.Service): Effect.Effect<number> =>
  Effect.map(pool.snapshot, (snapshot) => snapshot.inFlight)

/** Waits, in real time, until something holds; it is looked at often, and a test's own time limit ends it. */
export const until = <E, R>(condition: Effect.Effect<boolean, E, R>): Effect.Effect<void, E, R> =>
  Effect.asVoid(Effect.repeat(condition, { until: (holds) => holds, schedule: Schedule.spaced(5) }))

/** A transport that counts what passes, and can look at it. */
export const spied = (look: (url: string, init: RequestInit | undefined) => void): Transport => (input, init) => {
  look(input instanceof Request ? input.url : String(input), init)
  return globalThis.fetch(input, init)
}

/** A test in real time, with a scope, telemetry and a store. */
export const live = <A, E>(
  title: string,
  body: () => Effect.Effect<A, E, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore>
) => it.scopedLive(title, () => Effect.provide(Effect.suspend(body), KeyPool.layerDefaults))

/** Gathers the events from now on; whoever asks gets all that were published before, without a wait. */
export const watched: Effect.Effect<
  Effect.Effect<ReadonlyArray<Telemetry.Event>>,
  never,
  Scope.Scope | Telemetry.Telemetry
> = Effect.gen(function*() {
  const telemetry = yield* Telemetry.Telemetry
  const seen = yield* Ref.make<ReadonlyArray<Telemetry.Event>>([])
  const events = yield* telemetry.subscribe
  yield* Effect.forkScoped(Stream.runForEach(events, (event) => Ref.update(seen, (all) => [...all, event])))
  yield* Effect.yieldNow()
  const ofPools = Effect.map(Ref.get(seen), (all) => all.filter(({ pool }) => pool !== nobody))
  const marks = Effect.map(Ref.get(seen), (all) => all.filter(({ pool }) => pool === nobody).length)
  return Effect.gen(function*() {
    const before = yield* marks
    // Events come in order: when this one is here, so is everything before it.
    yield* telemetry.publish([{ _tag: "store.degraded", pool: nobody, at: 0, problem: "none: somebody asks" }])
    yield* Effect.repeat(Effect.zipRight(Effect.yieldNow(), marks), { until: (count) => count > before })
    return yield* ofPools
  })
})

/** No pool has this name. */
const nobody = "nobody's"
