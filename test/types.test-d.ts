import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import type * as Either from "effect/Either"
import type * as Layer from "effect/Layer"
import type * as Option from "effect/Option"
import type * as Schedule from "effect/Schedule"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import type OpenAI from "openai"
import { describe, expectTypeOf, test } from "vitest"
import * as ApiKey from "../src/ApiKey.js"
import * as CallOptions from "../src/CallOptions.js"
import type * as CircuitBreaker from "../src/CircuitBreaker.js"
import * as Fault from "../src/Fault.js"
import { createKeymesh, type Keymesh } from "../src/Keymesh.js"
import type * as KeymeshError from "../src/KeymeshError.js"
import * as KeyPool from "../src/KeyPool.js"
import * as Keyring from "../src/Keyring.js"
import * as Outcome from "../src/Outcome.js"
import type * as PoolStore from "../src/PoolStore.js"
import * as Http from "../src/providers/Http.js"
import * as OpenAi from "../src/providers/OpenAi.js"
import type { RestClient } from "../src/providers/RestClient.js"
import type * as RetryPolicy from "../src/RetryPolicy.js"
import * as Telemetry from "../src/Telemetry.js"

class Refused extends Data.TaggedError("Refused")<{ readonly status: number }> {}
class Database extends Context.Tag("test/Database")<Database, { readonly url: string }>() {}

declare const pool: KeyPool.Service
declare const failing: Effect.Effect<number, Refused, Database>
declare const rows: Stream.Stream<string, Refused, Database>
declare const retry: Schedule.Schedule<unknown, RetryPolicy.Retrying>

describe("run", () => {
  test("keeps the caller's value, errors and requirements, and adds the pool's errors", () => {
    expectTypeOf(pool.run(() => failing)).toEqualTypeOf<
      Effect.Effect<number, Refused | KeymeshError.PoolError, Database>
    >()
    expectTypeOf(pool.run(() => Effect.succeed("a" as const))).toEqualTypeOf<
      Effect.Effect<"a", KeymeshError.PoolError>
    >()
    expectTypeOf(pool.run(() => Effect.never)).toEqualTypeOf<Effect.Effect<never, KeymeshError.PoolError>>()
    expectTypeOf(pool.run((lease) => Effect.succeed(lease.key))).toEqualTypeOf<
      Effect.Effect<ApiKey.ApiKey, KeymeshError.PoolError>
    >()
  })

  test("unites the errors of a generator", () => {
    const call = pool.run(() =>
      Effect.gen(function*() {
        const n = yield* failing
        if (n > 1) return yield* Effect.fail("too many" as const)
        return n
      })
    )
    expectTypeOf(call).toEqualTypeOf<Effect.Effect<number, Refused | "too many" | KeymeshError.PoolError, Database>>()
  })

  test("classify sees the exit of the effect", () => {
    const call = pool.run(() => failing, {
      classify: (exit) => {
        expectTypeOf(exit).toEqualTypeOf<import("effect/Exit").Exit<number, Refused>>()
        return Outcome.success
      },
      model: "small",
      replayable: false
    })
    expectTypeOf(call).toEqualTypeOf<Effect.Effect<number, Refused | KeymeshError.PoolError, Database>>()
    // @ts-expect-error a fault alone is no outcome
    void pool.run(() => failing, { classify: () => Fault.make("Timeout") })
    // @ts-expect-error an option that does not exist
    void pool.run(() => failing, { modle: "small" })
  })

  test("takes call options around it without a new requirement", () => {
    const call = pool.run(() => failing).pipe(CallOptions.withOptions({ deadline: "5 seconds", maxWait: 0 }))
    expectTypeOf(call).toEqualTypeOf<Effect.Effect<number, Refused | KeymeshError.PoolError, Database>>()
    expectTypeOf(CallOptions.withDeadline(failing, 5)).toEqualTypeOf<typeof failing>()
  })
})

describe("stream", () => {
  test("keeps the caller's elements, errors and requirements, and adds the pool's errors", () => {
    expectTypeOf(pool.stream(() => rows)).toEqualTypeOf<
      Stream.Stream<string, Refused | KeymeshError.PoolError, Database>
    >()
    expectTypeOf(pool.stream(() => Stream.make(1, 2))).toEqualTypeOf<Stream.Stream<number, KeymeshError.PoolError>>()
  })

  test("its options see the elements and the errors", () => {
    const call = pool.stream(() => rows, {
      commits: (row) => {
        expectTypeOf(row).toEqualTypeOf<string>()
        return row !== ""
      },
      classify: (cause) => {
        expectTypeOf(cause).toEqualTypeOf<import("effect/Cause").Cause<Refused>>()
        return Outcome.ignored
      }
    })
    expectTypeOf(call).toEqualTypeOf<Stream.Stream<string, Refused | KeymeshError.PoolError, Database>>()
  })
})

describe("the rest of a pool", () => {
  test("a lease needs a scope", () => {
    expectTypeOf(pool.lease).toEqualTypeOf<Effect.Effect<KeyPool.Lease, KeymeshError.PoolError, Scope.Scope>>()
  })

  test("controls cannot fail", () => {
    expectTypeOf(pool.disable("a")).toEqualTypeOf<Effect.Effect<boolean>>()
    expectTypeOf(pool.drain("a")).toEqualTypeOf<Effect.Effect<boolean>>()
    expectTypeOf(pool.breaker("a")).toEqualTypeOf<Effect.Effect<Option.Option<CircuitBreaker.Service>>>()
    expectTypeOf(pool.keyring).toEqualTypeOf<Keyring.Service>()
    expectTypeOf(pool.keyring.add("sk")).toEqualTypeOf<
      Effect.Effect<ApiKey.ApiKey, KeymeshError.ConfigurationError>
    >()
  })
})

describe("catching", () => {
  const call = pool.run(() => failing)

  test("catchTag narrows to each error and leaves the others", () => {
    const exhausted = Effect.catchTag(call, "AllKeysExhausted", (error) => {
      expectTypeOf(error).toEqualTypeOf<KeymeshError.AllKeysExhausted>()
      expectTypeOf(error.nextAvailableAt).toEqualTypeOf<number | undefined>()
      return Effect.succeed(0)
    })
    expectTypeOf(exhausted).toEqualTypeOf<
      Effect.Effect<
        number,
        | Refused
        | KeymeshError.BudgetExceeded
        | KeymeshError.DeadlineExceeded
        | KeymeshError.PoolClosed,
        Database
      >
    >()
  })

  test("catchTags takes every tag, and nothing is left", () => {
    const caught = Effect.catchTags(call, {
      AllKeysExhausted: (error) => Effect.succeed(error._tag),
      BudgetExceeded: (error) => Effect.succeed(error._tag),
      DeadlineExceeded: (error) => Effect.succeed(error._tag),
      PoolClosed: (error) => Effect.succeed(error._tag),
      Refused: (error) => Effect.succeed(error.status)
    })
    expectTypeOf<Effect.Effect.Error<typeof caught>>().toEqualTypeOf<never>()
  })

  test("the tags of the unions", () => {
    expectTypeOf<KeymeshError.PoolError["_tag"]>().toEqualTypeOf<
      "AllKeysExhausted" | "BudgetExceeded" | "DeadlineExceeded" | "PoolClosed"
    >()
    expectTypeOf<Exclude<KeymeshError.CallError["_tag"], KeymeshError.PoolError["_tag"]>>().toEqualTypeOf<
      "ProviderError" | "SdkError"
    >()
    // @ts-expect-error no error has this tag
    Effect.catchTag(call, "NoSuchTag", () => Effect.void)
  })
})

describe("making", () => {
  test("a pool needs a scope, telemetry and a store", () => {
    expectTypeOf(KeyPool.make({ keys: ["a"] })).toEqualTypeOf<
      Effect.Effect<
        KeyPool.Service,
        KeymeshError.ConfigurationError,
        Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore
      >
    >()
    expectTypeOf(KeyPool.layer({ keys: ["a"], retry })).toEqualTypeOf<
      Layer.Layer<KeyPool.KeyPool, KeymeshError.ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore>
    >()
    expectTypeOf(KeyPool.layerDefaults).toEqualTypeOf<Layer.Layer<Telemetry.Telemetry | PoolStore.PoolStore>>()
  })

  test("settings are closed, and only the keys are needed", () => {
    // @ts-expect-error no keys
    void KeyPool.make({})
    // @ts-expect-error a misspelt setting
    void KeyPool.make({ keys: ["a"], stratgey: "weighted" })
    // @ts-expect-error no such strategy
    void KeyPool.make({ keys: ["a"], strategy: "fastest" })
    // @ts-expect-error no duration
    void KeyPool.make({ keys: ["a"], budget: "soon" })
  })

  test("layerConfig takes each setting as a Config, or all of them as one", () => {
    const fromEach = KeyPool.layerConfig({
      keys: ApiKey.config("KEYS"),
      name: Config.string("NAME").pipe(Config.withDefault("openai")),
      strategy: Config.succeed("least-used"),
      budget: Config.duration("BUDGET"),
      breaker: { threshold: Config.integer("THRESHOLD") },
      cooldowns: { quotaExhausted: Config.duration("QUOTA"), rateLimited: { factor: Config.number("FACTOR") } }
    })
    type Expected = Layer.Layer<
      KeyPool.KeyPool,
      ConfigError | KeymeshError.ConfigurationError,
      Telemetry.Telemetry | PoolStore.PoolStore
    >
    expectTypeOf(fromEach).toEqualTypeOf<Expected>()
    const fromOne = KeyPool.layerConfig(Config.map(ApiKey.config("KEYS"), (keys) => ({ keys })))
    expectTypeOf(fromOne).toEqualTypeOf<Expected>()
    // @ts-expect-error a plain value where a Config belongs
    void KeyPool.layerConfig({ keys: ["a"] })
    // @ts-expect-error a Config of the wrong type
    void KeyPool.layerConfig({ keys: ApiKey.config("KEYS"), maxWaiters: Config.string("N") })
  })

  test("keys and keyrings", () => {
    expectTypeOf(ApiKey.make("a")).toEqualTypeOf<Either.Either<ApiKey.ApiKey, KeymeshError.ConfigurationError>>()
    expectTypeOf(ApiKey.config("KEYS")).toEqualTypeOf<Config.Config<ReadonlyArray<ApiKey.Input>>>()
    expectTypeOf(Keyring.layer({ keys: ["a"] })).toEqualTypeOf<
      Layer.Layer<Keyring.Keyring, KeymeshError.ConfigurationError>
    >()
    expectTypeOf(Keyring.layerConfig({ keys: ApiKey.config("KEYS") })).toEqualTypeOf<
      Layer.Layer<Keyring.Keyring, ConfigError | KeymeshError.ConfigurationError>
    >()
  })
})

describe("telemetry", () => {
  test("events are told apart by their tags", () => {
    expectTypeOf<Extract<Telemetry.Event, { readonly _tag: "circuit.open" }>["until"]>().toEqualTypeOf<
      number | undefined
    >()
    expectTypeOf<Extract<Telemetry.Event, { readonly _tag: "request.fail" }>["fault"]>().toEqualTypeOf<Fault.Fault>()
    expectTypeOf<Telemetry.Unnumbered["_tag"]>().toEqualTypeOf<Telemetry.Event["_tag"]>()
    expectTypeOf<"seq" extends keyof Telemetry.Unnumbered ? true : false>().toEqualTypeOf<false>()
  })

  test("a handler brings its requirements, and must not fail", () => {
    expectTypeOf(Telemetry.layerForEach(() => Effect.asVoid(Database))).toEqualTypeOf<
      Layer.Layer<never, never, Telemetry.Telemetry | Database>
    >()
    expectTypeOf(Telemetry.layerForEach(() => Effect.addFinalizer(() => Effect.void))).toEqualTypeOf<
      Layer.Layer<never, never, Telemetry.Telemetry>
    >()
    // @effect-diagnostics-next-line *:off
    // @ts-expect-error a handler that fails
    void Telemetry.layerForEach(() => Effect.fail("x"))
    expectTypeOf(Telemetry.stream).toEqualTypeOf<Stream.Stream<Telemetry.Event, never, Telemetry.Telemetry>>()
  })
})

describe("createKeymesh", () => {
  const keys = ["key-one"]

  test("gives the client's own type, with four functions beside", () => {
    const openai = createKeymesh({ provider: OpenAi.adapter, keys, providerOptions: { timeout: 1_000 } })
    expectTypeOf(openai).toEqualTypeOf<OpenAI & Keymesh>()
    expectTypeOf(openai.chat.completions.create).toEqualTypeOf<OpenAI["chat"]["completions"]["create"]>()
    expectTypeOf(createKeymesh({ provider: Http.adapter({ baseUrl: "https://a.example" }), keys })).toEqualTypeOf<
      RestClient & Keymesh
    >()
  })

  test("takes the settings of its adapter only", () => {
    // @ts-expect-error credentials are the pool's business
    createKeymesh({ provider: OpenAi.adapter, keys, providerOptions: { apiKey: "key-two" } })
    // @ts-expect-error the HTTP adapter has its options already
    createKeymesh({ provider: Http.adapter({ baseUrl: "https://a.example" }), keys, providerOptions: {} })
    // @ts-expect-error there is no such setting
    createKeymesh({ provider: OpenAi.adapter, keys, stategy: "round-robin" })
  })

  test("types each event by its name", () => {
    const client = createKeymesh({ provider: OpenAi.adapter, keys })
    client.on("request.fail", (event) => {
      expectTypeOf(event.status).toEqualTypeOf<number | undefined>()
      expectTypeOf(event.path).toEqualTypeOf<ReadonlyArray<string>>()
      expectTypeOf(event.type).toEqualTypeOf<"request.fail">()
    })
    client.on("key.rotated", ({ from, reason, to }) => {
      expectTypeOf([from, to]).toEqualTypeOf<Array<string>>()
      expectTypeOf(reason).toEqualTypeOf<Fault.Kind>()
    })
    // @ts-expect-error a success has no error
    client.on("request.success", ({ error }) => error)
  })
})
