import { assert, describe, it } from "@effect/vitest"
import * as Cause from "effect/Cause"
import * as Chunk from "effect/Chunk"
import * as ConfigProvider from "effect/ConfigProvider"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Logger from "effect/Logger"
import * as LogLevel from "effect/LogLevel"
import * as Redacted from "effect/Redacted"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import { createHmac } from "node:crypto"
import { readFileSync } from "node:fs"
import { builtinModules, createRequire } from "node:module"
import { dirname, resolve } from "node:path"
import { fileURLToPath } from "node:url"
import { inspect } from "node:util"
import * as ApiKey from "../src/ApiKey.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Outcome from "../src/Outcome.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Telemetry from "../src/Telemetry.js"

const core = "Zq83hTm1PvKx90Lw"
const secret = `sk-live-${core}`

/** Everything a value shows of itself, hidden fields and getters too. */
const shown = (value: unknown): string =>
  [
    String(value),
    `${JSON.stringify(value)}`,
    JSON.stringify(value, (_, part: unknown) => part instanceof Set || part instanceof Map ? [...part] : part),
    inspect(value, { depth: Infinity, showHidden: true, getters: true }),
    inspect(value, { depth: Infinity, customInspect: false }),
    Cause.pretty(Cause.fail(value), { renderErrorCause: true }),
    value instanceof Error ? `${value.message}\n${value.stack}\n${value.name}` : ""
  ].join("\n")

const assertHidden = (value: unknown, what = "") => assert.notInclude(shown(value), core, what)

const made = (input: ApiKey.Input): ApiKey.ApiKey => Either.getOrThrow(ApiKey.make(input))

/** The refusal of an input that the types may forbid: what JSON and untyped programs give. */
const refusal = (input: unknown) => Either.flip(ApiKey.make(input as ApiKey.Input)).pipe(Either.getOrThrow)

const withEnv = (entries: Record<string, string>) =>
  Effect.withConfigProvider(ConfigProvider.fromMap(new Map(Object.entries(entries)), { pathDelim: "_" }))

describe("K1", () => {
  it("K1: a key shows its secret in no form", () => {
    const key = made({ secret, label: "team-a", headers: { "OpenAI-Organization": "org" }, models: ["m"] })
    assertHidden(key)
    assertHidden({ nested: [key] })
    assertHidden(new Error("of a key", { cause: key }))
    assert.strictEqual(Redacted.value(key.secret), secret)
  })

  it("K1: a redacted input and the keys of a pool show none either", () => {
    const all = Either.getOrThrow(ApiKey.makeAll([Redacted.make(secret), { secret: Redacted.make(secret) }, secret]))
    assert.strictEqual(all.keys.length, 1)
    assert.strictEqual(all.duplicates.length, 2)
    assertHidden(all)
  })

  const malformed: ReadonlyArray<readonly [what: string, input: unknown]> = [
    ["a space in the secret", `${secret} x`],
    ["a line break in the secret", { secret: `${secret}\nx` }],
    ["a letter beyond ASCII", { secret: `${secret}\u00e9` }],
    ["a control character", Redacted.make(`${secret}\u0000`)],
    ["a list as the secret", { secret: [secret] }],
    ["a record as the secret", { secret: { value: secret } }],
    ["a list as the key", [secret]],
    ["a blank label beside it", { secret, label: "  " }],
    ["the secret as a label with a control character", { secret, label: `${secret}\u0007` }],
    ["the secret as a weight", { secret, weight: secret }],
    ["the secret as an order", { secret, order: secret }],
    ["the secret as a cost tier", { secret, costTier: secret }],
    ["the secret as a limit", { secret, limits: { requestsPerMinute: secret } }],
    ["the secret as the limits", { secret, limits: secret }],
    ["the secret as a quota group", { secret, quotaGroup: `${secret}\n` }],
    ["the secret as a base URL", { secret, baseUrl: secret }],
    ["the secret in the user part of the base URL", { secret, baseUrl: `https://x:${secret}@example.com` }],
    ["the secret in a clear-text base URL", { secret, baseUrl: `http://example.com/?key=${secret}` }],
    ["the secret in a header's value", { secret, headers: { authorization: `Bearer ${secret}\n` } }],
    ["the secret in a header's name", { secret, headers: { [`authorization: Bearer ${secret}`]: "" } }],
    ["the secret as the models", { secret, models: secret }],
    ["the secret as a model of no list", { secret, models: [secret, ""] }],
    ["the secret as the name of a setting", { [secret]: { weight: 2 } }],
    ["the secret as the name of one more setting", { secret, [secret]: true }],
    ["the secret as the name of a limit", { secret, limits: { [secret]: 1 } }]
  ]
  for (const [what, input] of malformed) {
    it(`K1: no refusal shows ${what}`, () => {
      const error = refusal(input)
      assert.strictEqual(error._tag, "ConfigurationError")
      assertHidden(error, what)
      assertHidden(Cause.fail(error), what)
    })
  }

  const malformedConfig: ReadonlyArray<readonly [what: string, value: string]> = [
    ["JSON that ends too early", `[{"secret":"${secret}"`],
    ["JSON with a stray comma", `["${secret}",]`],
    ["JSON with single quotes", `['${secret}']`],
    ["a wrong weight in JSON", `[{"secret":"${secret}","weight":-1}]`],
    ["a weight that is the secret", `[{"secret":"${secret}","weight":"${secret}"}]`],
    ["a secret with a space in JSON", `["${secret} x"]`],
    ["the secret under another name", `[{"key":"${secret}"}]`],
    ["the secret as a name", `[{"${secret}":{"weight":2}}]`],
    ["the secret as a name beside one", `[{"secret":"${secret}","${secret}":1}]`],
    ["a list in a list", `[["${secret}"]]`],
    ["a number beside it", `["${secret}", 5]`]
  ]
  for (const [what, value] of malformedConfig) {
    it.effect(`K1: no configuration error shows ${what}`, () =>
      Effect.gen(function*() {
        const cause = yield* ApiKey.config("KEYS").pipe(Effect.sandbox, Effect.flip, withEnv({ KEYS: value }))
        assertHidden(cause)
        assertHidden(Cause.squash(cause))
        assert.include(Cause.pretty(cause), "KEYS")
        assert.notInclude(Cause.pretty(cause), core)
      }))
  }

  it.effect("K1: no configuration error of the nested form shows the secret", () =>
    Effect.gen(function*() {
      for (
        const wrong of [
          { "KEYS[0]_weight": "heavy" },
          { "KEYS[0]_limits_concurrency": "1.5" },
          { "KEYS[1]_label": "no secret" }
        ]
      ) {
        const cause = yield* ApiKey.config("KEYS").pipe(
          Effect.sandbox,
          Effect.flip,
          withEnv({ "KEYS[0]_secret": secret, ...wrong })
        )
        assertHidden(cause)
        assertHidden(Cause.squash(cause))
      }
    }))

  it.effect("K1: keys read from configuration are redacted from the moment they are read", () =>
    Effect.gen(function*() {
      const values = [secret, `["${secret}"]`, `[{"secret":"${secret}","label":"a"}]`]
      for (const value of values) {
        const inputs = yield* ApiKey.config("KEYS").pipe(withEnv({ KEYS: value }))
        assertHidden(inputs)
        assert.deepStrictEqual(Either.getOrThrow(ApiKey.makeAll(inputs)).keys.map((key) => key.id), [made(secret).id])
      }
      assertHidden(yield* ApiKey.config("KEYS").pipe(withEnv({ "KEYS[0]_secret": secret })))
    }))

  it.scoped("K1: snapshots, events, records, errors and logs of a failing pool do not show it", () =>
    Effect.gen(function*() {
      const logged: Array<string> = []
      const logger = Logger.make(({ annotations, cause, message }) => {
        logged.push(shown(message), shown([...annotations]), Cause.pretty(cause))
      })
      const telemetry = yield* Telemetry.make()
      const store = yield* PoolStore.makeMemory
      const services = Layer.merge(
        Layer.succeed(Telemetry.Telemetry, telemetry),
        Layer.succeed(PoolStore.PoolStore, store)
      )
      const events: Array<Telemetry.Event> = []
      yield* Layer.build(Telemetry.layerForEach((event) => Effect.sync(() => events.push(event)))).pipe(
        Effect.provide(services)
      )
      yield* Layer.build(Telemetry.layerLogger).pipe(
        Effect.provide(services),
        Effect.provide(Logger.replace(Logger.defaultLogger, logger)),
        Logger.withMinimumLogLevel(LogLevel.All)
      )
      yield* TestClock.adjust("1 millis")
      yield* Effect.scoped(Effect.gen(function*() {
        const pool = yield* KeyPool.make({ keys: [{ secret, label: "a" }, `${secret}2`, secret], maxWait: 0 })
        const kinds: ReadonlyArray<Fault.Kind> = ["Unauthorized", "QuotaExhausted", "RateLimited"]
        for (const kind of kinds) {
          const error = yield* Effect.flip(pool.run(
            () => Effect.fail({ fault: Fault.make(kind, { status: 401, code: "refused" }) })
          ))
          assertHidden(error)
        }
        const lease = yield* Effect.flip(Effect.scoped(pool.lease))
        assertHidden(lease)
        assertHidden(yield* pool.snapshot)
        assertHidden(yield* pool.keyring.keys)
        assertHidden(yield* Effect.flip(pool.keyring.add({ secret: `${secret} x` })))
        yield* pool.keyring.retire(made(secret).id)
        yield* TestClock.adjust("2 seconds")
        assertHidden(pool)
      })).pipe(Effect.provide(services))
      yield* TestClock.adjust("1 millis")
      const tags = new Set(events.map((event) => event._tag))
      for (const tag of ["key.added", "request.fail", "key.cooldown", "all.exhausted", "call.end", "key.removed"]) {
        assert.isTrue(tags.has(tag as Telemetry.Event["_tag"]), `${tag} is among the events`)
      }
      assertHidden(events)
      assertHidden(events.map(Telemetry.encode))
      assert.isNotEmpty(logged)
      assert.notInclude(logged.join("\n"), core)
      assertHidden(yield* store.load("default"))
    }))

  it.effect("K1: the secret is in no lease, not even while it runs", () =>
    Effect.scoped(Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: [secret] })
      yield* pool.run((lease) => Effect.sync(() => assertHidden(lease)))
    })).pipe(Effect.provide(KeyPool.layerDefaults)))
})

describe("K2", () => {
  it("K2: ids are what they were: HMAC-SHA-256 of the secret, 96 bits, domain-separated", () => {
    assert.strictEqual(made("sk-one").id, "key_11854ef07c6d34799f66fb76")
    assert.strictEqual(
      made({ secret: "sk-one", baseUrl: "https://eastus.example.com/v1" }).id,
      "key_8f9ea22b5f6ac2a3787556e3"
    )
  })

  it.prop(
    "K2: an id is 96 bits of the secret alone",
    [FastCheck.stringMatching(/^[\x21-\x7e]{1,80}$/)],
    ([text]) => {
      const hmac = createHmac("sha256", "effect-keymesh/ApiKey/id/1").update(text).digest("hex")
      assert.strictEqual(made(text).id, `key_${hmac.slice(0, 24)}`)
      assert.strictEqual(made({ secret: ` ${text}\n`, label: "x", weight: 3, quotaGroup: "g" }).id, made(text).id)
      assert.strictEqual(made(Redacted.make(text)).id, made(text).id)
    }
  )

  it("K2: the same secret at another address is another key", () => {
    const ids = [
      made("sk-one"),
      made({ secret: "sk-one", baseUrl: "https://a.example.com" }),
      made({ secret: "sk-one", baseUrl: "https://b.example.com" }),
      made({ secret: "sk-two", baseUrl: "https://a.example.com" })
    ].map((key) => key.id)
    assert.strictEqual(new Set(ids).size, ids.length)
    assert.strictEqual(
      made({ secret: "sk-one", baseUrl: "https://a.example.com/" }).id,
      made({ secret: "sk-one", baseUrl: "https://A.example.com" }).id
    )
  })

  it("K2: reading and naming keys imports no Node.js built-in", () => {
    const seen = new Set<string>()
    const builtins = new Set(builtinModules)
    const visit = (file: string): void => {
      if (seen.has(file)) return
      seen.add(file)
      for (
        const [, specifier = ""] of readFileSync(file, "utf8").matchAll(/(?:from|import)\s*\(?\s*["']([^"']+)["']/g)
      ) {
        // The examples in comments name the package itself.
        if (specifier.startsWith("effect")) continue
        assert.isFalse(specifier.startsWith("node:") || builtins.has(specifier), `${file} imports ${specifier}`)
        if (specifier.startsWith(".")) {
          const target = resolve(dirname(file), specifier)
          visit(file.endsWith(".ts") ? target.replace(/\.js$/, ".ts") : target)
        } else visit(createRequire(import.meta.url).resolve(specifier))
      }
    }
    visit(fileURLToPath(new URL("../src/ApiKey.ts", import.meta.url)))
    assert.isTrue([...seen].some((file) => file.includes("@noble/hashes")))
  })
})

describe("K3", () => {
  const refused: ReadonlyArray<readonly [field: string, input: unknown]> = [
    ["key", null],
    ["key", undefined],
    ["key", 5],
    ["key", ["sk-one"]],
    ["key.secret", ""],
    ["key.secret", "   "],
    ["key.secret", Redacted.make("\t")],
    ["key.secret", {}],
    ["key.secret", { secret: "" }],
    ["key.secret", { secret: "sk one" }],
    ["key.secret", { secret: "sk\u0000one" }],
    ["key.secret", { secret: "sk\u007fone" }],
    ["key.secret", { secret: 7 }],
    ["key.wieght", { secret: "sk-one", wieght: 2 }],
    ["key.label", { secret: "sk-one", label: "" }],
    ["key.label", { secret: "sk-one", label: "a\u001b[31m" }],
    ["key.label", { secret: "sk-one", label: 5 }],
    ["key.weight", { secret: "sk-one", weight: Number.NaN }],
    ["key.weight", { secret: "sk-one", weight: -1 }],
    ["key.weight", { secret: "sk-one", weight: 0 }],
    ["key.weight", { secret: "sk-one", weight: Infinity }],
    ["key.weight", { secret: "sk-one", weight: "2" }],
    ["key.order", { secret: "sk-one", order: Number.NaN }],
    ["key.order", { secret: "sk-one", order: -Infinity }],
    ["key.quotaGroup", { secret: "sk-one", quotaGroup: " " }],
    ["key.quotaGroup", { secret: "sk-one", quotaGroup: "a\nb" }],
    ["key.limits", { secret: "sk-one", limits: 60 }],
    ["key.limits.rpm", { secret: "sk-one", limits: { rpm: 60 } }],
    ["key.limits.requestsPerMinute", { secret: "sk-one", limits: { requestsPerMinute: 0 } }],
    ["key.limits.requestsPerDay", { secret: "sk-one", limits: { requestsPerDay: 1.5 } }],
    ["key.limits.tokensPerMinute", { secret: "sk-one", limits: { tokensPerMinute: -1 } }],
    ["key.limits.tokensPerDay", { secret: "sk-one", limits: { tokensPerDay: Infinity } }],
    ["key.limits.concurrency", { secret: "sk-one", limits: { concurrency: Number.NaN } }],
    ["key.headers.x y", { secret: "sk-one", headers: { "x y": "1" } }],
    ["key.headers.x", { secret: "sk-one", headers: { x: "a\r\nb: c" } }],
    ["key.headers.x", { secret: "sk-one", headers: { x: 1 } }],
    ["key.headers", { secret: "sk-one", headers: "x: 1" }],
    ["key.headers", { secret: "sk-one", headers: 5 }],
    ["key.headers", { secret: "sk-one", headers: new Headers({ x: "1" }) }],
    ["key.headers", { secret: "sk-one", headers: new Map([["x", "1"]]) }],
    ["key.models", { secret: "sk-one", models: [] }],
    ["key.models", { secret: "sk-one", models: [""] }],
    ["key.models", { secret: "sk-one", models: [" "] }],
    ["key.models", { secret: "sk-one", models: "gpt" }],
    ["key.models", { secret: "sk-one", models: [5] }],
    ["key.costTier", { secret: "sk-one", costTier: -1 }],
    ["key.costTier", { secret: "sk-one", costTier: Number.NaN }],
    ["key.allowInsecureBaseUrl", { secret: "sk-one", allowInsecureBaseUrl: "yes" }]
  ]
  for (const [field, input] of refused) {
    it(`K3: ${inspect(input)} is refused at ${field}`, () => {
      const error = refusal(input)
      // A header's name may hold anything: it may be left out of the path.
      assert.include(field === "key.headers.x y" ? ["key.headers", field] : [field], error.field)
      assert.isNotEmpty(error.problem)
      assert.strictEqual(error.message, `${error.field}: ${error.problem}`)
    })
  }

  it("K3: an unknown option is answered with the known ones", () => {
    assert.include(refusal({ secret: "sk-one", wieght: 2 }).message, "weight")
  })

  it("K3: an empty pool, and what is no list, is refused", () => {
    for (const keys of [[], undefined, null, "sk-one", {}, new Set(["sk-one"])]) {
      const result = ApiKey.makeAll(keys as unknown as ReadonlyArray<string>)
      assert.strictEqual(Either.getOrThrow(Either.flip(result)).field, "keys")
    }
  })

  it("K3: a refusal in a list names the position", () => {
    const error = Either.getOrThrow(Either.flip(ApiKey.makeAll(["a", "b", { secret: "c", weight: Number.NaN }])))
    assert.strictEqual(error.field, "keys[2].weight")
  })

  const addresses: ReadonlyArray<readonly [url: string, taken: string | undefined]> = [
    ["https://example.com", "https://example.com"],
    ["https://example.com/v1/", "https://example.com/v1"],
    ["https://example.com:8443/v1//", "https://example.com:8443/v1"],
    ["http://localhost:8080", "http://localhost:8080"],
    ["http://LOCALHOST", "http://localhost"],
    ["http://api.localhost/v1", "http://api.localhost/v1"],
    ["http://127.0.0.1:1", "http://127.0.0.1:1"],
    ["http://127.9.8.7", "http://127.9.8.7"],
    ["http://127.1", "http://127.0.0.1"],
    ["http://[::1]:3000", "http://[::1]:3000"],
    ["http://example.com", undefined],
    ["http://10.0.0.1", undefined],
    ["http://0.0.0.0", undefined],
    ["http://localhost.example.com", undefined],
    ["http://127.0.0.1.example.com", undefined],
    ["http://evil-localhost", undefined],
    ["http://localhost@example.com", undefined],
    ["http://[::2]", undefined],
    ["ftp://example.com", undefined],
    ["file:///etc/passwd", undefined],
    ["javascript:alert(1)", undefined],
    ["example.com", undefined],
    ["https://", undefined],
    ["", undefined],
    ["https://user@example.com", undefined],
    ["https://user:pass@example.com", undefined],
    ["https://:pass@example.com", undefined]
  ]
  for (const [url, taken] of addresses) {
    it(`K3: the base URL ${JSON.stringify(url)} is ${taken === undefined ? "refused" : "taken"}`, () => {
      const key = ApiKey.make({ secret: "sk-one", baseUrl: url })
      assert.deepStrictEqual(
        Either.match(key, { onLeft: (error) => error.field, onRight: (key) => key.baseUrl }),
        taken ?? "key.baseUrl"
      )
    })
  }

  it("K3: an address in the clear needs an explicit permission, and the refusal names it", () => {
    assert.include(refusal({ secret: "sk-one", baseUrl: "http://10.0.0.1" }).message, "allowInsecureBaseUrl")
    const key = made({ secret: "sk-one", baseUrl: "http://10.0.0.1/v1", allowInsecureBaseUrl: true })
    assert.strictEqual(key.baseUrl, "http://10.0.0.1/v1")
    assert.strictEqual(
      refusal({ secret: "sk-one", baseUrl: "http://u:p@10.0.0.1", allowInsecureBaseUrl: true }).field,
      "key.baseUrl"
    )
  })

  it("K3: duplicates collapse into the first; the same secret elsewhere is none", () => {
    const { duplicates, keys } = Either.getOrThrow(ApiKey.makeAll([
      { secret: "sk-one", label: "first" },
      { secret: "sk-two", label: "two" },
      { secret: " sk-one ", label: "again" },
      { secret: "sk-one", label: "elsewhere", baseUrl: "https://a.example.com" },
      { secret: "sk-one", label: "elsewhere again", baseUrl: "https://a.example.com/" }
    ]))
    assert.deepStrictEqual(keys.map((key) => key.label), ["first", "two", "elsewhere"])
    assert.deepStrictEqual(duplicates.map((key) => key.label), ["again", "elsewhere again"])
  })

  it.scoped("K3: a duplicate is told by an event", () =>
    Effect.gen(function*() {
      yield* KeyPool.make({ keys: ["sk-one", "sk-two", { secret: "sk-one", label: "twice" }] })
      const events = yield* Telemetry.stream.pipe(
        Stream.filter((event) => event._tag === "key.added"),
        Stream.take(3),
        Stream.runCollect
      )
      assert.deepStrictEqual(
        Chunk.toReadonlyArray(events).map((event) => [event.keyId, event.label, event.duplicate]),
        [
          [made("sk-one").id, made("sk-one").id, false],
          [made("sk-two").id, made("sk-two").id, false],
          [made("sk-one").id, "twice", true]
        ]
      )
    }).pipe(Effect.provide(KeyPool.layerDefaults)))
})

describe("K4", () => {
  const everything: ApiKey.Options = {
    secret: "sk-one",
    label: "team-a",
    weight: 2.5,
    order: -3,
    quotaGroup: "org-a",
    limits: { requestsPerMinute: 60, requestsPerDay: 1_000, tokensPerMinute: 90_000, tokensPerDay: 5, concurrency: 4 },
    headers: { "OpenAI-Organization": "org-1", "openai-project": "p" },
    baseUrl: "https://eastus.example.com/v1",
    models: ["gpt-a", "gpt-b"],
    costTier: 0.5
  }
  const attributes = (key: ApiKey.ApiKey) => ({ ...key, secret: Redacted.value(key.secret) })
  const expected = {
    ...everything,
    id: "key_8f9ea22b5f6ac2a3787556e3",
    headers: { "openai-organization": "org-1", "openai-project": "p" },
    models: new Set(["gpt-a", "gpt-b"])
  }

  it("K4: a key has every attribute that it was given, header names in lower case", () => {
    assert.deepStrictEqual<unknown>(attributes(made(everything)), expected)
  })

  it("K4: what is left out has its default", () => {
    const [, key] = Either.getOrThrow(ApiKey.makeAll(["sk-zero", "sk-one"])).keys
    assert.deepStrictEqual<unknown>(key === undefined ? undefined : attributes(key), {
      id: made("sk-one").id,
      label: made("sk-one").id,
      secret: "sk-one",
      weight: 1,
      order: 1,
      quotaGroup: undefined,
      limits: {},
      headers: {},
      baseUrl: undefined,
      models: undefined,
      costTier: 1
    })
  })

  it("K4: changing what was given does not change the key", () => {
    const limits = { concurrency: 1 }
    const headers: Record<string, string> = { a: "1" }
    const models = ["m"]
    const key = made({ secret: "sk-one", limits, headers, models })
    limits.concurrency = 9
    headers["a"] = "2"
    models.push("n")
    assert.deepStrictEqual([key.limits, key.headers, key.models], [{ concurrency: 1 }, { a: "1" }, new Set(["m"])])
  })

  it.effect("K4: the comma form gives the secrets, in order", () =>
    Effect.gen(function*() {
      for (const value of ["sk-one,sk-two", " sk-one , sk-two ,", ",sk-one,,\nsk-two\n"]) {
        const inputs = yield* ApiKey.config("KEYS").pipe(withEnv({ KEYS: value }))
        const { keys } = Either.getOrThrow(ApiKey.makeAll(inputs))
        assert.deepStrictEqual(keys.map((key) => Redacted.value(key.secret)), ["sk-one", "sk-two"])
        assert.deepStrictEqual(keys.map((key) => key.order), [0, 1])
      }
    }))

  it.effect("K4: the JSON form gives every attribute", () =>
    Effect.gen(function*() {
      const json = JSON.stringify([everything, "sk-two", { secret: "sk-three" }])
      const inputs = yield* ApiKey.config("KEYS").pipe(withEnv({ KEYS: `  ${json}\n` }))
      const { keys } = Either.getOrThrow(ApiKey.makeAll(inputs))
      assert.deepStrictEqual<unknown>(keys.slice(0, 1).map(attributes), [expected])
      assert.deepStrictEqual(keys.map((key) => Redacted.value(key.secret)), ["sk-one", "sk-two", "sk-three"])
    }))

  const nested: Record<string, string> = {
    "KEYS[0]_secret": "sk-one",
    "KEYS[0]_label": "team-a",
    "KEYS[0]_weight": "2.5",
    "KEYS[0]_order": "-3",
    "KEYS[0]_quotaGroup": "org-a",
    "KEYS[0]_limits_requestsPerMinute": "60",
    "KEYS[0]_limits_requestsPerDay": "1000",
    "KEYS[0]_limits_tokensPerMinute": "90000",
    "KEYS[0]_limits_tokensPerDay": "5",
    "KEYS[0]_limits_concurrency": "4",
    "KEYS[0]_headers_OpenAI-Organization": "org-1",
    "KEYS[0]_headers_openai-project": "p",
    "KEYS[0]_baseUrl": "https://eastus.example.com/v1",
    "KEYS[0]_models": "gpt-a, gpt-b",
    "KEYS[0]_costTier": "0.5",
    "KEYS[1]_secret": "sk-two"
  }

  it.effect("K4: the nested form gives every attribute", () =>
    Effect.gen(function*() {
      const inputs = yield* ApiKey.config("KEYS").pipe(withEnv(nested))
      const { keys } = Either.getOrThrow(ApiKey.makeAll(inputs))
      assert.deepStrictEqual<unknown>(keys.slice(0, 1).map(attributes), [expected])
      assert.deepStrictEqual(keys.map((key) => Redacted.value(key.secret)), ["sk-one", "sk-two"])
    }))

  it.effect("K4: the nested form comes from a JSON provider as well", () =>
    Effect.gen(function*() {
      const inputs = yield* ApiKey.config("KEYS").pipe(
        Effect.withConfigProvider(ConfigProvider.fromJson({
          KEYS: [{ secret: "sk-one", label: "team-a", models: ["gpt-a", "gpt-b"] }, { secret: "sk-two", weight: 2 }]
        }))
      )
      const { keys } = Either.getOrThrow(ApiKey.makeAll(inputs))
      assert.deepStrictEqual(keys.map((key) => [key.label, key.weight]), [["team-a", 1], [made("sk-two").id, 2]])
      assert.deepStrictEqual(keys[0]?.models, new Set(["gpt-a", "gpt-b"]))
    }))

  it.effect("K1: a comma in the nested form is an error that does not show the secret", () =>
    Effect.gen(function*() {
      for (
        const wrong of [{ "KEYS[0]_secret": `${secret},x` }, { "KEYS[0]_secret": secret, "KEYS[0]_label": "a, b" }]
      ) {
        const cause = yield* ApiKey.config("KEYS").pipe(Effect.sandbox, Effect.flip, withEnv(wrong))
        assertHidden(cause)
        assertHidden(Cause.squash(cause))
      }
    }))

  const wrong: ReadonlyArray<readonly [value: string, named: string]> = [
    ["", "KEYS"],
    [" , ,", "KEYS"],
    ["[", "KEYS"],
    ["[5]", "item 0"],
    ["[\"sk-one\", {}]", "item 1"],
    ["[\"sk-one\", {\"secret\":\"sk-two\",\"weight\":-1}]", "KEYS[1].weight"],
    ["[{\"secret\":\"sk-two\",\"wieght\":1}]", "KEYS[0]"],
    ["[\"sk-one\", \" \"]", "KEYS[1].secret"],
    ["[{\"secret\":\"sk-two\",\"limits\":{\"rpm\":1}}]", "KEYS[0].limits"],
    // Without its brackets, JSON would pass as a secret, or as several.
    ["{\"secret\":\"sk-one\"}", "KEYS"],
    ["{\"secret\":\"sk-one\",\"weight\":2}", "KEYS"],
    ["\"sk-one\"", "KEYS"]
  ]
  for (const [value, named] of wrong) {
    it.effect(`K3: KEYS=${value} is a configuration error that names ${named}`, () =>
      Effect.gen(function*() {
        const error = yield* Effect.either(ApiKey.config("KEYS")).pipe(withEnv({ KEYS: value }))
        assert.include(Either.match(error, { onLeft: String, onRight: () => "no error" }), named)
      }))
  }

  it.effect("K3: keys that are not configured at all are an error that names them", () =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(ApiKey.config("KEYS")).pipe(withEnv({}))
      assert.include(String(error), "KEYS")
    }))

  for (
    const [form, entries] of [
      ["comma", { KEYS: "sk-one,sk-two" }],
      ["JSON", { KEYS: "[{\"secret\":\"sk-one\",\"quotaGroup\":\"org-a\"},\"sk-two\"]" }],
      ["nested", nested]
    ] as const
  ) {
    it.effect(`K4: the ${form} form works through KeyPool.layerConfig`, () =>
      Effect.gen(function*() {
        const pool = yield* KeyPool.KeyPool
        assert.deepStrictEqual(
          (yield* pool.keyring.keys).map((key) => Redacted.value(key.secret)),
          ["sk-one", "sk-two"]
        )
        const used = yield* pool.run((lease) => Effect.succeed(Redacted.value(lease.key.secret)))
        assert.strictEqual(used, "sk-one")
      }).pipe(
        Effect.provide(
          KeyPool.layerConfig({ keys: ApiKey.config("KEYS") }).pipe(Layer.provide(KeyPool.layerDefaults))
        ),
        withEnv(entries)
      ))
  }

  it.effect("K3: a wrong key in the comma form fails KeyPool.layerConfig under its path, without the secret", () =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(Effect.scoped(Layer.build(
        KeyPool.layerConfig({ keys: ApiKey.config("KEYS") }).pipe(Layer.provide(KeyPool.layerDefaults))
      )))
      assert.strictEqual(error._tag === "ConfigurationError" ? error.field : String(error), "keys[1].secret")
      assertHidden(error)
    }).pipe(withEnv({ KEYS: `sk-one, ${secret} x` })))

  it.effect("K4: limits: a key with one place in flight serves one call at a time", () =>
    Effect.scoped(Effect.gen(function*() {
      const pool = yield* KeyPool.make({ keys: [{ secret: "sk-one", limits: { concurrency: 1 } }] })
      const first = yield* Effect.fork(pool.run(() => Effect.sleep("1 second")))
      const second = yield* Effect.fork(pool.run(() => Effect.sleep("1 second")))
      yield* TestClock.adjust("500 millis")
      const { inFlight, waiting } = yield* pool.snapshot
      assert.deepStrictEqual([inFlight, waiting], [1, 1])
      yield* TestClock.adjust("2 seconds")
      yield* Fiber.join(first)
      yield* Fiber.join(second)
      assert.strictEqual((yield* pool.snapshot).keys[0]?.successes, 2)
    })).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.effect("K4: models: a call goes to a key that serves its model", () =>
    Effect.scoped(Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: [{ secret: "sk-one", models: ["small"] }, { secret: "sk-two", models: ["large"] }],
        maxWait: 0
      })
      for (const [model, used] of [["large", "sk-two"], ["small", "sk-one"], ["large", "sk-two"]] as const) {
        const key = yield* pool.run((lease) => Effect.succeed(Redacted.value(lease.key.secret)), { model })
        assert.strictEqual(key, used)
      }
      const error = yield* Effect.flip(pool.run(() => Effect.void, { model: "huge" }))
      assert.strictEqual(error._tag, "AllKeysExhausted")
    })).pipe(Effect.provide(KeyPool.layerDefaults)))

  it.effect("K4: quota group: what one key of it was told holds for the others", () =>
    Effect.scoped(Effect.gen(function*() {
      const pool = yield* KeyPool.make({
        keys: [
          { secret: "sk-one", quotaGroup: "org" },
          { secret: "sk-two", quotaGroup: "org" },
          { secret: "sk-three" }
        ]
      })
      const used: Array<string> = []
      yield* pool.run((lease) => {
        used.push(Redacted.value(lease.key.secret))
        return used.length === 1
          ? Effect.fail(Fault.make("RateLimited", { scope: "group", wait: "1 minute" }))
          : Effect.void
      }, { classify: Outcome.fromExit })
      assert.deepStrictEqual(used, ["sk-one", "sk-three"])
    })).pipe(Effect.provide(KeyPool.layerDefaults)))
})
