/** Clients for plain code: the programs that the original documents, and what each of its settings does. */
import Anthropic from "@anthropic-ai/sdk"
import { assert, describe, it } from "@effect/vitest"
import { GoogleGenAI } from "@google/genai"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import { execFile } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { inspect } from "node:util"
import OpenAI from "openai"
import * as FakeAnthropic from "../examples/support/FakeAnthropic.js"
import * as FakeGemini from "../examples/support/FakeGemini.js"
import * as FakeOpenAi from "../examples/support/FakeOpenAi.js"
import type * as FakeProvider from "../examples/support/FakeProvider.js"
import { createKeymesh, errorOf, type EventName, withOptions } from "../src/Keymesh.js"
import { ConfigurationError } from "../src/KeymeshError.js"
import * as PoolStore from "../src/PoolStore.js"
import { adapter as anthropicAdapter } from "../src/providers/Anthropic.js"
import { adapter as geminiAdapter } from "../src/providers/Gemini.js"
import { adapter as httpAdapter } from "../src/providers/Http.js"
import { adapter as openaiAdapter } from "../src/providers/OpenAi.js"
import * as presets from "../src/providers/presets.js"
import { ResponseError } from "../src/providers/RestClient.js"
import * as SharedPool from "../src/SharedPool.js"
import * as Strategy from "../src/Strategy.js"
import { a, asked, b, c, live, messages, model, said } from "./support/openai.js"

/** A test with a fake OpenAI and a body of promises. */
const plain = (
  title: string,
  options: FakeOpenAi.Options,
  body: (fake: FakeOpenAi.FakeOpenAi) => Promise<void>
) => live(title, () => Effect.flatMap(FakeOpenAi.make(options), (fake) => Effect.promise(() => body(fake))))

const ask = (client: OpenAI) => client.chat.completions.create({ model, messages })
const keysAsked = (fake: FakeProvider.FakeProvider) => Effect.runPromise(asked(fake))
const sent = (fake: FakeProvider.FakeProvider) => Effect.runPromise(fake.requests)
const thrown = async (promise: PromiseLike<unknown>): Promise<unknown> => {
  try {
    await promise
  } catch (error) {
    return error
  }
  throw new Error("expected a failure")
}

/** Retries without waits to speak of. */
const quick = { retry: { max: 3, baseMs: 1, maxMs: 1 }, floor: false, retryTokens: false } as const

describe("the documented programs, with other imports", () => {
  plain("openai: the real client, rotated", { keys: { [a]: { refuse: "revoked" } } }, async (fake) => {
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [a, b],
      strategy: "least-used",
      circuitBreaker: { threshold: 3, cooldownMs: 30_000 },
      retry: { max: 5, baseMs: 200, jitter: true },
      telemetry: { enabled: true },
      providerOptions: { baseURL: fake.baseUrl }
    })
    const lines: Array<string> = []
    client.on("request.start", (e) => lines.push(`${e.keyId} ${e.path.join(".")}`))
    client.on("key.rotated", (e) => lines.push(`${e.from} ${e.to} ${e.reason}`))
    const response = await client.chat.completions.create({ model, messages })
    assert.strictEqual(response.choices[0]?.message?.content, said)
    const [first, second] = client.inspect().keys
    assert.deepStrictEqual(lines, [
      `${first?.id} chat.completions`,
      `${first?.id} ${second?.id} Unauthorized`,
      `${second?.id} chat.completions`
    ])
    assert.isTrue(client instanceof OpenAI)
    // What a deep proxy would break.
    const { response: raw } = await ask(client).withResponse()
    assert.strictEqual(raw.status, 200)
    const stream = client.chat.completions.stream({ model, messages })
    assert.strictEqual(await stream.finalContent(), said)
    await client.close()
  })

  live("openai, anthropic and gemini, one after the other", () =>
    Effect.gen(function*() {
      const openAi = yield* FakeOpenAi.make({ keys: { "*": { refuse: "quota" } } })
      const claude = yield* FakeAnthropic.make({ keys: { [a]: { refuse: "revoked" } } })
      const google = yield* FakeGemini.make({ keys: { [a]: { limit: { requestsPerMinute: 0 } } } })
      yield* Effect.promise(async () => {
        const openai = createKeymesh({ provider: openaiAdapter, keys: [a], baseUrl: openAi.baseUrl, maxWait: 0 })
        const anthropic = createKeymesh({ provider: anthropicAdapter, keys: [a, b], baseUrl: claude.baseUrl })
        const gemini = createKeymesh({ provider: geminiAdapter, keys: [a, b], baseUrl: google.origin })
        assert.isTrue(anthropic instanceof Anthropic && gemini instanceof GoogleGenAI)
        const error = await thrown(ask(openai))
        assert.isTrue(error instanceof OpenAI.RateLimitError)
        assert.strictEqual(errorOf(openai, error)?._tag, "AllKeysExhausted")
        assert.isUndefined(errorOf(new OpenAI({ apiKey: a }), error))
        const message = await anthropic.messages.create({ model: "claude-sonnet-5", max_tokens: 99, messages })
        const [block] = message.content
        assert.strictEqual(block !== undefined && "text" in block ? block.text : "", said)
        const answer = await gemini.models.generateContent({
          model: "gemini-2.5-flash",
          contents: "good morning to you"
        })
        assert.strictEqual(answer.text, said)
        await Promise.all([openai.close(), anthropic.close(), gemini.close()])
      })
      assert.strictEqual(yield* asked(claude), "ab")
    }))

  plain(
    "http: a small client of JSON",
    {
      handler: ({ body, headers, method, path }) => ({
        status: headers["authorization"] === `Bearer ${a}` ? 429 : path === "/v1/none" ? 404 : 200,
        headers: { "content-type": path === "/v1/text" ? "text/plain" : "application/json; charset=utf-8" },
        body: path === "/v1/text"
          ? "plain"
          : JSON.stringify({ method, path, body, type: headers["content-type"] ?? null, own: headers["x-own"] ?? null })
      })
    },
    async (fake) => {
      const search = createKeymesh({
        provider: httpAdapter({
          baseUrl: fake.baseUrl,
          authHeader: (key) => ({ Authorization: `Bearer ${key}` }),
          defaultHeaders: { "x-own": "default" },
          timeoutMs: 15_000
        }),
        keys: [a, b],
        strategy: "round-robin",
        retry: { max: 3, baseMs: 250, jitter: true }
      })
      const json = "application/json"
      interface Found {
        readonly method: string
      }
      const found = await search.post<Found>("/search", { query: "one" })
      assert.deepStrictEqual<unknown>(found, {
        method: "POST",
        path: "/v1/search",
        body: "{\"query\":\"one\"}",
        type: json,
        own: "default"
      })
      const own = { headers: { "x-own": "mine" } }
      const none = { body: "", type: null, path: "/v1/a", own: "mine" }
      assert.deepStrictEqual(await search.get("a", own), { ...none, method: "GET" })
      assert.deepStrictEqual(await search.delete("a", own), { ...none, method: "DELETE" })
      assert.deepStrictEqual(await search.put("a", [1], own), { ...none, method: "PUT", body: "[1]", type: json })
      assert.deepStrictEqual(await search.patch("a", 0, own), { ...none, method: "PATCH", body: "0", type: json })
      const text = { ...none, method: "QUERY", body: "as it is", type: "text/plain;charset=UTF-8" }
      assert.deepStrictEqual(await search.request("QUERY", "/a", { ...own, body: "as it is" }), text)
      assert.strictEqual(await search.get("text"), "plain")
      assert.strictEqual((await search.fetch("text")).status, 200)
      const error = await thrown(search.get("/none"))
      assert.isTrue(error instanceof ResponseError && error.status === 404 && error.bodyText.includes("/v1/none"))
      assert.strictEqual(errorOf(search, error)?._tag, "ProviderError")
      // Nothing but the API's own origin ever sees a key.
      const elsewhere = await search.get<{ own: string }>(
        `${fake.origin.replace("127.0.0.1", "localhost")}/v1/elsewhere`
      )
      assert.strictEqual(elsewhere.own, "default")
      const last = (await sent(fake)).at(-1)
      assert.isUndefined(last?.headers["authorization"])
      await search.close()
    }
  )
})

describe("events", () => {
  plain("T1: the eight have the original's fields", {}, async (fake) => {
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [{ value: a, label: "a" }, { value: b, label: "b" }],
      strategy: "round-robin",
      circuitBreaker: { threshold: 1, cooldownMs: 60, rate: false },
      ...quick,
      ramp: { length: 0 },
      baseUrl: fake.baseUrl
    })
    const ids = client.inspect().keys.map(({ id }) => id)
    const seen: Array<{ readonly type: EventName; readonly [name: string]: unknown }> = []
    const eight = [
      "request.start",
      "request.success",
      "request.fail",
      "key.rotated",
      "circuit.open",
      "circuit.closed",
      "circuit.half-open",
      "all.exhausted"
    ] as const
    for (const name of eight) client.on(name, (event) => seen.push({ ...event }))
    await Effect.runPromise(fake.set(a, { outage: { status: 500 } }))
    await ask(client)
    const path = ["chat", "completions"]
    const of = (type: EventName) => seen.filter((event) => event.type === type)
    const fields = (type: EventName, names: ReadonlyArray<string>) =>
      of(type).map((event) => Object.fromEntries(names.map((name) => [name, event[name]])))
    assert.deepStrictEqual(fields("request.start", ["keyId", "path"]), [
      { keyId: ids[0], path },
      { keyId: ids[1], path }
    ])
    assert.deepStrictEqual(fields("request.fail", ["keyId", "path", "status", "error"]), [
      { keyId: ids[0], path, status: 500, error: "ServerError (HTTP 500) server_error" }
    ])
    assert.deepStrictEqual(fields("request.success", ["keyId", "path"]), [{ keyId: ids[1], path }])
    for (const event of [...of("request.fail"), ...of("request.success")]) {
      assert.isAtLeast(Number(event["elapsedMs"]), 0)
    }
    assert.deepStrictEqual(fields("key.rotated", ["from", "to", "reason"]), [
      { from: ids[0], to: ids[1], reason: "ServerError" }
    ])
    assert.deepStrictEqual(fields("circuit.open", ["keyId", "consecutiveFailures"]), [
      { keyId: ids[0], consecutiveFailures: 1 }
    ])
    const [opened] = of("circuit.open")
    assert.strictEqual(Number(opened?.["cooldownUntil"]) - Number(opened?.["timestamp"]), 60)
    for (const event of seen) assert.isBelow(Math.abs(Number(event["timestamp"]) - Date.now()), 60_000)

    await Effect.runPromise(fake.set(a, {}))
    while (of("circuit.closed").length === 0) await ask(client)
    assert.deepStrictEqual(fields("circuit.half-open", ["keyId"]), [{ keyId: ids[0] }])
    assert.deepStrictEqual(fields("circuit.closed", ["keyId"]), [{ keyId: ids[0] }])

    for (const key of [a, b]) await Effect.runPromise(fake.set(key, { refuse: "revoked" }))
    await thrown(withOptions({ maxWait: 0 }, () => ask(client)))
    assert.deepStrictEqual(fields("all.exhausted", ["reason"]), [
      { reason: "no key can serve the call: 2 Unauthorized" }
    ])
    const order = seen.map((event) => Number(event["seq"]))
    assert.deepStrictEqual(order, order.toSorted((x, y) => x - y))
    await client.close()
  })

  plain("handlers that throw or reject hurt no call, and each can be taken off", {}, async (fake) => {
    const client = createKeymesh({ provider: openaiAdapter, keys: [a], baseUrl: fake.baseUrl })
    const seen: Array<string> = []
    const first = () => {
      seen.push("first")
      throw new Error("a handler's own")
    }
    client.on("request.success", first)
    const stop = client.on("request.success", async () => {
      seen.push("second")
      throw new Error("a handler's own")
    })
    client.on("request.success", () => void seen.push(`third: ${client.inspect().attempts}`))
    client.on("call.end", ({ outcome }) => seen.push(outcome))
    await ask(client)
    assert.deepStrictEqual(seen, ["first", "second", "third: 1", "success"])
    stop()
    client.off("request.success", first)
    await ask(client)
    assert.deepStrictEqual(seen.slice(4), ["third: 2", "success"])
    await client.close()
  })

  it("K3: a name that no event has is refused", () => {
    const client = createKeymesh({ provider: openaiAdapter, keys: [a] })
    // @ts-expect-error there is no such event
    assert.throws(() => client.on("request.began", () => {}), /there is no such event; there are request.start/)
  })
})

describe("settings", () => {
  const failing = { keys: { "*": { outage: { status: 500 } } } } as const

  plain("telemetry.enabled: false calls no handler, but inspect goes on", {}, async (fake) => {
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      telemetry: { enabled: false },
      baseUrl: fake.baseUrl
    })
    let called = 0
    client.on("request.start", () => called++)
    await ask(client)
    assert.strictEqual(called, 0)
    assert.strictEqual(client.inspect().totalRequests, 1)
  })

  for (const max of [0, 2]) {
    plain(`retry.max: ${max} retries`, failing, async (fake) => {
      const client = createKeymesh({
        provider: openaiAdapter,
        keys: [a],
        ...quick,
        retry: { max, baseMs: 1 },
        circuitBreaker: { threshold: 9 },
        baseUrl: fake.baseUrl
      })
      assert.isTrue(await thrown(ask(client)) instanceof OpenAI.InternalServerError)
      assert.strictEqual((await sent(fake)).length, max + 1)
    })
  }

  plain("retry.baseMs, maxMs and jitter: false give the delays", failing, async (fake) => {
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      ...quick,
      retry: { max: 3, baseMs: 60, maxMs: 90, jitter: false },
      circuitBreaker: { threshold: 9 },
      baseUrl: fake.baseUrl
    })
    await thrown(ask(client))
    const times: Array<number> = (await sent(fake)).map(({ at }) => at)
    const gaps = times.slice(1).map((at, i) => at - (times[i] ?? 0))
    assert.strictEqual(gaps.length, 3)
    // Timers are never early; how late they are is the machine's business.
    for (const [i, least] of [60, 90, 90].entries()) assert.isAtLeast(gaps[i] ?? 0, least - 2)
  })

  plain("retry.totalBudgetMs is the budget of a call", failing, async (fake) => {
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      ...quick,
      retry: { baseMs: 60_000, jitter: false, totalBudgetMs: 50 },
      baseUrl: fake.baseUrl
    })
    const error = await thrown(ask(client))
    assert.strictEqual(errorOf(client, error)?._tag, "BudgetExceeded")
  })

  plain("circuitBreaker.threshold and cooldownMs", failing, async (fake) => {
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      ...quick,
      retry: { max: 0 },
      circuitBreaker: { threshold: 2, cooldownMs: 12_345, halfOpenMaxCalls: 1 },
      baseUrl: fake.baseUrl
    })
    const state = () =>
      client.inspect().keys.map(({ circuitState, consecutiveFailures }) => [circuitState, consecutiveFailures])
    await thrown(ask(client))
    assert.deepStrictEqual(state(), [["closed", 1]])
    const opened = new Promise<number>((resolve) =>
      client.on("circuit.open", (event) => resolve(event.cooldownUntil - event.timestamp))
    )
    await thrown(ask(client))
    assert.deepStrictEqual(state(), [["open", 2]])
    assert.strictEqual(await opened, 12_345)
    const [key] = client.inspect().keys
    assert.isAbove(key?.cooldownUntil ?? 0, client.inspect().at)
  })

  const choosy: FakeOpenAi.Options = {
    handler: ({ key }) => ({
      status: key === a ? 422 : 200,
      body: JSON.stringify(key === a ? { error: { message: "not with this key" } } : { id: "one", object: "model" })
    })
  }
  plain("failoverStatusCodes: another key is tried where the classifier would give up", choosy, async (fake) => {
    const settings = { provider: openaiAdapter, keys: [a, b], ...quick, baseUrl: fake.baseUrl } as const
    const usual = createKeymesh({ ...settings, failoverStatusCodes: [404] })
    assert.isTrue(await thrown(usual.models.retrieve("one")) instanceof OpenAI.UnprocessableEntityError)
    const other = createKeymesh({ ...settings, failoverStatusCodes: [404, 422] })
    assert.strictEqual((await other.models.retrieve("one")).id, "one")
    const http = createKeymesh({
      provider: httpAdapter({ baseUrl: fake.baseUrl, extraTransientStatuses: [422] }),
      keys: [a, b],
      ...quick
    })
    await http.post("one", {})
    assert.strictEqual(await keysAsked(fake), "aabab")
  })

  plain(
    "failoverStatusCodes leaves alone what other keys or time can mend",
    { keys: { [a]: { refuse: "revoked" } } },
    async (fake) => {
      const client = createKeymesh({
        provider: openaiAdapter,
        keys: [a, b],
        failoverStatusCodes: [401, 408, 425, 429, 500, 502, 503, 504],
        baseUrl: fake.baseUrl
      })
      const reasons: Array<string> = []
      client.on("key.rotated", ({ reason }) => reasons.push(reason))
      await ask(client)
      assert.deepStrictEqual(reasons, ["Unauthorized"])
    }
  )

  const shares = ["round-robin", "weighted", "least-used", "sequential-then-rotate", "cheapest"] as const
  const expected = {
    "round-robin": "abcabc",
    "weighted": "bbbb",
    "least-used": "abcabc",
    "sequential-then-rotate": "aaaaaa",
    cheapest: "cccccc"
  }
  for (const strategy of shares) {
    plain(`strategy: ${strategy}`, {}, async (fake) => {
      const client = createKeymesh({
        provider: openaiAdapter,
        keys: [{ value: a }, { value: b, weight: 10 }, { value: c, costTier: 0 }],
        strategy,
        baseUrl: fake.baseUrl
      })
      for (let i = 0; i < 6; i++) await ask(client)
      assert.strictEqual(client.inspect().strategy, strategy)
      const letters = await keysAsked(fake)
      assert.strictEqual(
        strategy === "weighted" ? letters.replaceAll(/[^b]/g, "").slice(0, 4) : letters,
        expected[strategy]
      )
    })
  }

  plain("strategy: an object with pick, or one of this library", {}, async (fake) => {
    const seen: Array<string> = []
    class Dearest {
      readonly name = "dearest"
      pick(
        eligible: Array<{ id: string; inFlight: number; config: { costTier: number } }>,
        all: Array<{ id: string }>
      ) {
        seen.push(`${eligible.length} of ${all.length}`)
        assert.notInclude(JSON.stringify(all), "sk-test")
        return eligible.sort((x, y) => y.config.costTier - x.config.costTier)[0] ?? null
      }
    }
    const keys = [{ value: a, costTier: 0 }, { value: b, costTier: 7 }, { value: c }]
    const client = createKeymesh({ provider: openaiAdapter, keys, strategy: new Dearest(), baseUrl: fake.baseUrl })
    await ask(client)
    assert.deepStrictEqual([client.inspect().strategy, ...seen], ["dearest", "3 of 3"])
    const last = Strategy.custom("last", (candidates) => candidates.at(-1))
    await ask(createKeymesh({ provider: openaiAdapter, keys, strategy: last, baseUrl: fake.baseUrl }))
    assert.strictEqual(await keysAsked(fake), "bc")
  })

  plain("health.decayHalfLifeMs: the score comes back", { keys: { [a]: { refuse: "revoked" } } }, async (fake) => {
    const score = async (decayHalfLifeMs: number) => {
      const settings = { provider: openaiAdapter, keys: [a, b], baseUrl: fake.baseUrl, health: { decayHalfLifeMs } }
      const client = createKeymesh(settings)
      await ask(client)
      return client.inspect().keys.map(({ healthScore }) => healthScore)
    }
    const [slow, well] = await score(1e9)
    assert.strictEqual(Math.round(slow ?? 0), 75)
    assert.strictEqual(well, 100)
    assert.isAbove((await score(0.01))[0] ?? 0, 99)
  })

  plain("providerOptions, client, fetch and api reach the SDK", {}, async (fake) => {
    const urls: Array<string> = []
    const fetch: typeof globalThis.fetch = (input, init) => {
      urls.push(String(input))
      return globalThis.fetch(input, init)
    }
    const one = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      providerOptions: { baseURL: fake.baseUrl, timeout: 4_321, defaultHeaders: { "x-own": "yes" }, fetch }
    })
    await ask(one)
    assert.strictEqual(one.timeout, 4_321)
    assert.strictEqual((await sent(fake))[0]?.headers["x-own"], "yes")
    const two = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      client: (fetch) => new OpenAI({ apiKey: "unused", baseURL: fake.baseUrl, fetch, timeout: 1_234 }),
      fetch
    })
    await ask(two)
    assert.deepStrictEqual([two.timeout, two.maxRetries, urls.length], [1_234, 0, 2])
    const three = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      api: presets.groq.provider,
      baseUrl: fake.baseUrl
    })
    assert.strictEqual(three.inspect().pool, "groq")
  })

  it("the http adapter sends streams and bytes as they are", async () => {
    const seen: Array<string> = []
    const client = createKeymesh({
      provider: httpAdapter({
        baseUrl: "https://a.example",
        fetch: async (input, init) => {
          seen.push(await new Request(input, init).text())
          return Response.json({})
        }
      }),
      keys: [a]
    })
    const bytes = new TextEncoder().encode("bytes...")
    await client.post("x", new Blob([bytes]).stream())
    await client.post("x", new DataView(bytes.buffer))
    assert.deepStrictEqual(seen, ["bytes...", "bytes..."])
    await client.close()
  })

  plain("the http adapter's timeoutMs bounds each attempt", { keys: { [a]: { hang: true } } }, async (fake) => {
    const client = createKeymesh({
      provider: httpAdapter({ baseUrl: fake.baseUrl, timeoutMs: 1_000 }),
      keys: [a, b],
      strategy: "sequential-then-rotate",
      ...quick
    })
    const models = await client.get<{ object: string }>("models")
    assert.strictEqual(models.object, "list")
    assert.strictEqual(await keysAsked(fake), "ab")
  })

  const refused: ReadonlyArray<readonly [field: string, settings: object]> = [
    ["provider", { provider: undefined }],
    ["provider", { provider: httpAdapter }],
    ["provider", { provider: { name: "openai", createClient: () => ({}), detectError: () => ({}) } }],
    ["keys", { keys: [] }],
    ["keys", { keys: undefined }],
    ["keys[1].value", { keys: [a, { value: "" }] }],
    ["keys[1].secret", { keys: [a, ""] }],
    ["keys[0].value", { keys: [{ value: a, secret: a }] }],
    ["keys[0].weight", { keys: [{ value: a, weight: -1 }] }],
    ["strategy", { strategy: "random" }],
    ["strategy", { strategy: {} }],
    ["stategy", { stategy: "round-robin" }],
    ["circuitBreaker.halfOpenMaxCalls", { circuitBreaker: { halfOpenMaxCalls: 2 } }],
    ["circuitBreaker.cooldownMs", { circuitBreaker: { cooldownMs: -1 } }],
    ["circuitBreaker.cooldown", { circuitBreaker: { cooldown: 1 } }],
    ["circuitBreaker.threshold", { circuitBreaker: { threshold: 0 } }],
    ["retry.max", { retry: { max: 1.5 } }],
    ["retry.baseMs", { retry: { baseMs: Number.NaN } }],
    ["retry.maxMs", { retry: { maxMs: "1" } }],
    ["retry.jitter", { retry: { jitter: "full" } }],
    ["retry.attempts", { retry: { attempts: 3 } }],
    ["retry.totalBudgetMs", { retry: { totalBudgetMs: 1 }, budget: 1 }],
    ["health.decayHalfLifeMs", { health: { decayHalfLifeMs: 0 } }],
    ["telemetry.enabled", { telemetry: { enabled: "yes" } }],
    ["telemetry", { telemetry: true }],
    ["failoverStatusCodes", { failoverStatusCodes: 404 }],
    ["failoverStatusCodes[1]", { failoverStatusCodes: [404, 200] }],
    ["state", { state: "redis" }],
    ["state", { state: { load: () => null } }],
    ["stateFile", { stateFile: "pool.json" }],
    ["stateFile", { state: "file", stateFile: 5 }],
    ["stateFile", { state: "file", stateFile: "a/directory/" }],
    ["providerOptions.apiKey", { providerOptions: { apiKey: a } }],
    ["providerOptions.maxRetries", { providerOptions: { maxRetries: 2 } }],
    ["providerOptions", { providerOptions: {}, client: () => new OpenAI({ apiKey: "unused" }) }],
    ["baseUrl", { baseUrl: "http://example.com" }],
    ["providerOptions.authToken", { provider: anthropicAdapter, providerOptions: { authToken: a } }],
    ["providerOptions.vertexai", { provider: geminiAdapter, providerOptions: { vertexai: true } }],
    [
      "providerOptions.httpOptions.retryOptions",
      { provider: geminiAdapter, providerOptions: { httpOptions: { retryOptions: {} } } }
    ],
    ["providerOptions", { provider: httpAdapter({ baseUrl: "https://a.example" }), providerOptions: {} }],
    ["provider.timeoutMs", { provider: httpAdapter({ baseUrl: "https://a.example", timeoutMs: -1 }) }],
    ["provider.timeoutMs", { provider: httpAdapter({ baseUrl: "https://a.example", timeoutMs: 2 ** 31 }) }],
    ["provider.defaultHeaders", {
      provider: httpAdapter({ baseUrl: "https://a.example", defaultHeaders: { "no name": "x" } })
    }],
    ["providerOptions", { providerOptions: null }],
    ["providerOptions", { providerOptions: 5 }],
    ["providerOptions.httpOptions", { provider: geminiAdapter, providerOptions: { httpOptions: null } }],
    ["hold.evnts", { hold: { evnts: 1 } }],
    ["hold.millis", { hold: { millis: NaN } }],
    ["hold.bytes", { provider: httpAdapter({ baseUrl: "https://a.example", hold: { bytes: -1 } }) }],
    ["provider.authHeader", {
      provider: httpAdapter({ baseUrl: "https://a.example", auth: "bearer", authHeader: () => ({}) })
    }],
    ["baseUrl", { provider: httpAdapter({ baseUrl: "a.example" }) }]
  ]
  for (const [field, settings] of refused) {
    it(`K3: refused at ${field}: ${inspect(settings, { depth: 2, breakLength: Infinity }).slice(0, 70)}`, () => {
      try {
        // Of any type, as JavaScript would give it.
        createKeymesh({ provider: openaiAdapter, keys: [a], ...settings } as Parameters<typeof createKeymesh>[0])
      } catch (error) {
        assert.isTrue(error instanceof ConfigurationError, String(error))
        assert.strictEqual(error instanceof ConfigurationError ? error.field : "", field, String(error))
        assert.notInclude(inspect(error), a)
        return
      }
      throw new Error("it was taken")
    })
  }
})

describe("state", () => {
  const revoked = { keys: { [a]: { refuse: "revoked" } } } as const
  const inOrder = { provider: openaiAdapter, keys: [a, b], strategy: "sequential-then-rotate" } as const

  plain("P1: a backend of promises gives the record back before the first pick", revoked, async (fake) => {
    const kept = new Map<string, string>()
    let closed = 0
    const state = {
      load: async (pool: string) => {
        await new Promise((resolve) => setTimeout(resolve, 30))
        return JSON.parse(kept.get(pool) ?? "null")
      },
      save: async (pool: string, record: unknown) => void kept.set(pool, JSON.stringify(record)),
      close: () => closed++
    }
    const first = createKeymesh({ ...inOrder, state, baseUrl: fake.baseUrl })
    await ask(first)
    await first.close()
    assert.strictEqual(closed, 1)
    assert.deepStrictEqual([...kept.keys()], ["openai"])
    assert.notInclude(kept.get("openai") ?? "", "sk-test")
    const second = createKeymesh({ ...inOrder, state, baseUrl: fake.baseUrl })
    await ask(second)
    await second.close()
    assert.strictEqual(await keysAsked(fake), "abb")
  })

  plain(
    "P2: a backend that hangs holds up the first request only so long, and one that fails not at all",
    {},
    async (fake) => {
      const fails = createKeymesh({
        ...inOrder,
        state: { load: () => Promise.reject(new Error(a)), save: () => Promise.reject(new Error(a)) },
        baseUrl: fake.baseUrl
      })
      const problems: Array<unknown> = []
      fails.on("store.degraded", (event) => problems.push(event))
      await ask(fails)
      assert.strictEqual(problems.length, 1)
      assert.notInclude(inspect(problems, { depth: 9 }), a)
      const hangs = createKeymesh({
        ...inOrder,
        state: { load: () => new Promise(() => {}), save: () => undefined },
        baseUrl: fake.baseUrl
      })
      await ask(hangs)
      await Promise.all([fails.close(), hangs.close()])
    }
  )

  plain("a file: pools side by side, a restart, and a file that cannot be read", revoked, async (fake) => {
    const home = mkdtempSync(join(tmpdir(), "effect-keymesh-"))
    try {
      const stateFile = join(home, "below", "state.json")
      const settings = { ...inOrder, state: "file", stateFile, baseUrl: fake.baseUrl } as const
      const pools = () => ["one", "two"].map((name) => createKeymesh({ ...settings, name }))
      for (let run = 0; run < 2; run++) {
        for (const client of pools()) {
          await ask(client)
          await client.close()
        }
      }
      assert.strictEqual(await keysAsked(fake), "ababbb")
      assert.deepStrictEqual(Object.keys(JSON.parse(readFileSync(stateFile, "utf8"))), ["one", "two"])
      assert.strictEqual(statSync(stateFile).mode & 0o777, 0o600)
      assert.notInclude(readFileSync(stateFile, "utf8"), "sk-test")
      writeFileSync(stateFile, "{\"half\":")
      const client = createKeymesh({ ...settings, name: "one" })
      assert.strictEqual((await ask(client)).choices[0]?.message.content, said)
      await client.close()
      assert.deepStrictEqual(Object.keys(JSON.parse(readFileSync(stateFile, "utf8"))), ["one"])
      assert.strictEqual(readFileSync(`${stateFile}.unreadable`, "utf8"), "{\"half\":")
      assert.deepStrictEqual(readdirSync(join(home, "below")), ["state.json", "state.json.unreadable"])
      // Saved at the same time: none overwrites another's.
      const names = Array.from({ length: 8 }, (_, i) => `pool-${i}`)
      const clients = names.map((name) => createKeymesh({ ...settings, name }))
      await Promise.all(clients.map((client) => client.close()))
      assert.deepStrictEqual(Object.keys(JSON.parse(readFileSync(stateFile, "utf8"))).sort(), ["one", ...names])
    } finally {
      rmSync(home, { recursive: true, force: true })
    }
  })

  plain("a PoolStore, and a layer of one that takes its time", revoked, async (fake) => {
    const store = await Effect.runPromise(PoolStore.makeMemory)
    const states = [store, store, Layer.effect(PoolStore.PoolStore, Effect.as(Effect.sleep(20), store))]
    for (const state of states) {
      const client = createKeymesh({ ...inOrder, state, baseUrl: fake.baseUrl })
      await ask(client)
      await client.close()
    }
    assert.strictEqual(await keysAsked(fake), "abbb")
  })

  plain("P4: what a PoolStore shares is shared, also by a layer of one that takes its time", revoked, async (fake) => {
    const { share } = await Effect.runPromise(SharedPool.makeMemory)
    const store = { ...PoolStore.none, share }
    const states = [store, store, Layer.effect(PoolStore.PoolStore, Effect.as(Effect.sleep(20), store))]
    const clients = states.map((state) => createKeymesh({ ...inOrder, state, baseUrl: fake.baseUrl }))
    for (const client of clients) await ask(client)
    for (const client of clients) await client.close()
    assert.strictEqual(await keysAsked(fake), "abbb")
  })

  plain("P2: a layer that takes too long for the first calls serves the later ones", {}, async (fake) => {
    let open = () => {}
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    const saved: Array<string> = []
    const store = { ...PoolStore.none, save: (pool: string) => Effect.sync(() => void saved.push(pool)) }
    const state = Layer.effect(PoolStore.PoolStore, Effect.as(Effect.promise(() => gate), store))
    const client = createKeymesh({ ...inOrder, state, baseUrl: fake.baseUrl })
    const degraded = new Promise<void>((resolve) => client.on("store.degraded", () => resolve()))
    await Promise.all([ask(client), degraded])
    open()
    await client.close()
    assert.deepStrictEqual(saved, ["openai"])
  })

  plain("P2: a layer that failed is built again, and is there until the last save", {}, async (fake) => {
    const log: Array<string> = []
    const made = Effect.gen(function*() {
      yield* Effect.acquireRelease(
        Effect.sync(() => log.push("acquired")),
        () => Effect.sync(() => log.push("released"))
      )
      if (log.length === 1) return yield* Effect.fail("not yet")
      return { ...PoolStore.none, save: () => Effect.sync(() => void log.push("saved")) }
    })
    const client = createKeymesh({
      ...inOrder,
      state: Layer.scoped(PoolStore.PoolStore, made),
      baseUrl: fake.baseUrl
    })
    await ask(client)
    await client.close()
    assert.deepStrictEqual(log, ["acquired", "released", "acquired", "saved", "released"])
  })

  it("K1: a key that the provider gives as the id of something stored is not saved", async () => {
    const saved: Array<string> = []
    const client = createKeymesh({
      provider: openaiAdapter,
      keys: [a],
      state: { load: () => null, save: (_: string, record: unknown) => saved.push(JSON.stringify(record)) },
      fetch: () => Promise.resolve(Response.json({ id: a, object: "batch", output_file_id: "file-out" }))
    })
    await client.batches.retrieve("batch-one")
    await client.close()
    assert.include(saved.at(-1), "file-out")
    assert.notInclude(saved.join(), a)
  })

  plain("\"memory\", the default, keeps nothing", revoked, async (fake) => {
    for (const state of ["memory", undefined] as const) {
      const client = createKeymesh({ ...inOrder, state, baseUrl: fake.baseUrl })
      await ask(client)
      await client.close()
    }
    assert.strictEqual(await keysAsked(fake), "abab")
  })
})

describe("the client", () => {
  plain("close ends what waits and what comes later, and can be called again", {
    keys: { [a]: { limit: { requestsPerMinute: 1 } } }
  }, async (fake) => {
    const client = createKeymesh({ provider: openaiAdapter, keys: [a], budget: "10 minutes", baseUrl: fake.baseUrl })
    await ask(client)
    const waits = new Promise<void>((resolve) => client.on("call.waiting", () => resolve()))
    const waiting = thrown(ask(client))
    await waits
    await Promise.all([client.close(), client.close()])
    assert.strictEqual(errorOf(client, await waiting)?._tag, "PoolClosed")
    assert.strictEqual(errorOf(client, await thrown(ask(client)))?._tag, "PoolClosed")
    assert.isTrue(client.inspect().closed)
  })

  plain("two of them do not know each other", { keys: { [a]: { refuse: "revoked" } } }, async (fake) => {
    const one = createKeymesh({ provider: openaiAdapter, keys: [a, b], baseUrl: fake.baseUrl })
    const two = createKeymesh({ provider: openaiAdapter, keys: [b, c], baseUrl: fake.baseUrl })
    let heard = 0
    two.on("request.start", () => heard++)
    await ask(one)
    await one.close()
    assert.deepStrictEqual([heard, two.inspect().totalRequests, two.inspect().closed], [0, 0, false])
    await ask(two)
    assert.strictEqual(heard, 1)
    await two.close()
  })

  it("is not pooled twice", () => {
    const client = createKeymesh({ provider: openaiAdapter, keys: [a] })
    assert.throws(() => createKeymesh({ provider: openaiAdapter, keys: [a], client: () => client }), /`on` already/)
  })

  plain("K1: shows no key, and nothing of the pool among its own fields", {}, async (fake) => {
    const client = createKeymesh({ provider: openaiAdapter, keys: [a], baseUrl: fake.baseUrl })
    await ask(client)
    const bare = new OpenAI({ apiKey: "unused", baseURL: fake.baseUrl })
    assert.deepStrictEqual(Object.keys(client), Object.keys(bare))
    for (const shown of [client, client.inspect(), client.on, client.close]) {
      assert.notInclude(inspect(shown, { depth: 12, showHidden: true }), a)
    }
    assert.notInclude(JSON.stringify(client.inspect()), a)
  })

  plain("withOptions: the settings hold for the calls inside, and for no others", {
    keys: { [a]: { limit: { requestsPerMinute: 1 } } }
  }, async (fake) => {
    const client = createKeymesh({ provider: openaiAdapter, keys: [a], budget: "10 minutes", baseUrl: fake.baseUrl })
    await ask(client)
    const error = await withOptions({ maxWait: 0 }, async () => {
      await Promise.resolve()
      // An inner one wins, an outer one holds where it says nothing.
      return await thrown(withOptions({ deadline: "5 seconds" }, () => ask(client)))
    })
    assert.strictEqual(errorOf(client, error)?._tag, "AllKeysExhausted")
    const late = await withOptions({ deadline: 30 }, () => thrown(ask(client)))
    // No key comes back before its end, as is known: without the setting, the call would wait, as the next one does.
    assert.strictEqual(errorOf(client, late)?._tag, "AllKeysExhausted")
    const waits = new Promise<void>((resolve) => client.on("call.waiting", () => resolve()))
    const outside = thrown(ask(client))
    await waits
    await client.close()
    assert.strictEqual(errorOf(client, await outside)?._tag, "PoolClosed")
    // @ts-expect-error there is no such setting
    assert.throws(() => withOptions({ dedline: 1 }, () => 1), /dedline: unknown setting/)
  })

  for (
    const [what, code] of [
      ["is only made", ""],
      ["has made a call", "await client.models.list();"],
      [
        "has a store that fails",
        "await client.models.list(); await client.chat.completions.create({ model: 'gpt-4o', messages: [] }).catch(() => 0);"
      ]
    ] as const
  ) {
    plain(`a program whose client ${what} comes to its end`, { keys: { [a]: { refuse: "revoked" } } }, async (fake) => {
      const state = what === "has a store that fails"
        ? "{ load: () => null, save: () => { throw new Error('no') } }"
        : "undefined"
      const script = `
        import { createKeymesh } from "./src/Keymesh.ts"
        import { adapter } from "./src/providers/OpenAi.ts"
        const client = createKeymesh({
          provider: adapter, keys: ["${a}", "${b}"], baseUrl: "${fake.baseUrl}", state: ${state}
        })
        client.on("request.start", () => {})
        ${code}
        console.log("done")
        // Nobody would wait for this timer; it tells what does.
        const started = Date.now()
        process.on("exit", () => console.log(Date.now() - started < 5_000 ? "soon" : "late"))`
      const said = await new Promise<string>((resolve) => {
        execFile(
          process.execPath,
          ["--import", "tsx", "--input-type=module", "--eval", script],
          { timeout: 50_000 },
          (error, stdout, stderr) => resolve(`${error === null ? "" : "killed "}${stdout}${stderr}`)
        )
      })
      assert.strictEqual(said, "done\nsoon\n")
    })
  }
})
