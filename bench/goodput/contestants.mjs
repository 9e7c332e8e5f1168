/**
 * Those who make the calls: a round robin of bare requests, one of real SDK clients with the retries that they have by
 * themselves, and the pool. Each gets a `fetch` and the secrets, and answers calls by promises.
 */
import * as Anthropic from "effect-keymesh/Anthropic"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as OpenAi from "effect-keymesh/OpenAi"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Layer from "effect/Layer"
import * as Random from "effect/Random"
import * as Runtime from "effect/Runtime"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import OpenAI from "openai"

const address = "https://provider.test/v1"

/** Text of about so many tokens. */
const texts = new Map()
const textOf = (tokens) => {
  if (!texts.has(tokens)) texts.set(tokens, "word".repeat(Math.max(1, tokens)).slice(0, 4 * tokens))
  return texts.get(tokens)
}

const chatOf = (call) => ({
  model: call.model,
  messages: [{ role: "user", content: textOf(call.input) }],
  max_tokens: call.maxTokens,
  user: String(call.id),
  ...(call.stream ? { stream: true } : {})
})

const drain = async (iterable) => {
  for await (const item of iterable) void item
}

/** One request per call, to one key after the other. */
export const naive = ({ fetch, secrets }) => {
  let next = 0
  return {
    call: async (call) => {
      const secret = secrets[next++ % secrets.length]
      const response = await fetch(`${address}/chat/completions`, {
        method: "POST",
        headers: { authorization: `Bearer ${secret}`, "content-type": "application/json" },
        body: JSON.stringify(chatOf(call))
      })
      await response.text()
      if (!response.ok) throw new Error(`http ${response.status}`)
    },
    close: () => Promise.resolve()
  }
}

/** The official SDK as it comes: a client per key, each with its two retries. */
export const sdk = ({ fetch, secrets }) => {
  const clients = secrets.map((apiKey) =>
    new OpenAI({ apiKey, baseURL: address, organization: null, project: null, fetch })
  )
  let next = 0
  return {
    call: async (call) => {
      const answer = await clients[next++ % clients.length].chat.completions.create(chatOf(call))
      if (call.stream) await drain(answer)
    },
    close: () => Promise.resolve()
  }
}

/** What the keys of a scenario may declare of its limits: the numbers that a user finds on the provider's pages. */
const declaredOf = (scenario, key) => {
  const groups = [...new Set(scenario.keys.map(({ group }) => group))]
  const names = {
    "requests 60000": "requestsPerMinute",
    "requests 86400000": "requestsPerDay",
    "tokens 60000": "tokensPerMinute",
    "tokens 86400000": "tokensPerDay"
  }
  return Object.fromEntries(scenario.limits.flatMap((limit) => {
    const own = limit.limitOf === undefined ? limit.limit : limit.limitOf(groups.indexOf(key.group))
    const name = names[`${limit.of} ${limit.per}`]
    return own === undefined || name === undefined || limit.models !== undefined
      ? []
      : [[name, own * (scenario.declaredTimes ?? 1)]]
  }))
}

/** Settings that some modes try beside those that a pool has by itself. */
const settingsOf = (mode = "") => ({
  ...(mode.startsWith("least-latency") ? { strategy: "least-latency" } : {}),
  ...(mode.endsWith("hedged") ? { hedge: true } : {})
})

/** The pool, with the settings that it has by itself unless its mode says more, under the SDK's real client. */
export const pool = async ({ dialect, fetch, mode, scenario, secrets, seed }) => {
  const keys = scenario.keys.map((key, i) => ({
    secret: secrets[i],
    label: `k${i}`,
    ...(scenario.tellGroups === true ? { quotaGroup: key.group } : {}),
    ...(mode.endsWith("declared") ? { limits: declaredOf(scenario, key) } : {})
  }))
  const baseUrl = dialect === "anthropic" ? "https://provider.test" : address
  const settings = { keys, fetch, baseUrl, ...settingsOf(mode) }
  const scope = Effect.runSync(Scope.make())
  const build = Effect.gen(function*() {
    const context = yield* Layer.build(KeyPool.layerDefaults)
    const service = yield* Effect.provide(
      dialect === "anthropic" ? Anthropic.make(settings) : OpenAi.make(settings),
      context
    )
    return { service, runtime: yield* Effect.runtime() }
  })
  const { runtime, service } = await Effect.runPromise(
    build.pipe(Scope.extend(scope), Effect.withRandom(Random.make(`${seed} pool`)))
  )
  const create = (client, call) =>
    dialect === "anthropic"
      ? client.messages.create({
        model: call.model,
        messages: [{ role: "user", content: textOf(call.input) }],
        max_tokens: call.maxTokens,
        metadata: { user_id: String(call.id) },
        ...(call.stream ? { stream: true } : {})
      })
      : client.chat.completions.create(chatOf(call))
  return {
    call: async (call) => {
      const exit = await Runtime.runPromiseExit(runtime)(
        call.stream
          ? Stream.runDrain(service.stream((client) => create(client, call)))
          : service.use((client) => create(client, call))
      )
      if (Exit.isFailure(exit)) throw new Error(nameOf(Cause.squash(exit.cause)))
    },
    close: () => Effect.runPromise(Scope.close(scope, Exit.void)),
    snapshot: () => Effect.runPromise(service.pool.snapshot)
  }
}

const nameOf = (error) =>
  error._tag === "ProviderError" ? `${error._tag} ${error.fault._tag ?? error.fault.kind}` : error._tag ?? String(error)
