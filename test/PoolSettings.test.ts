import { assert, describe, it } from "@effect/vitest"
import * as Chunk from "effect/Chunk"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Redacted from "effect/Redacted"
import * as Schedule from "effect/Schedule"
import { inspect } from "node:util"
import * as KeyPool from "../src/KeyPool.js"
import * as PoolSettings from "../src/PoolSettings.js"
import type * as RetryPolicy from "../src/RetryPolicy.js"
import * as Strategy from "../src/Strategy.js"

const keys = ["sk-one"]

/** What becomes of settings that the types may forbid. */
const resolve = (settings: Readonly<Record<string, unknown>>) =>
  PoolSettings.resolve({ keys, ...settings } as PoolSettings.Settings)
const resolved = (settings: Partial<PoolSettings.Settings>) =>
  Either.getOrThrow(PoolSettings.resolve({ keys, ...settings }))

/** What no duration is, in any form. */
const noDuration: ReadonlyArray<unknown> = [-1, Number.NaN, "soon", "-1 second", true, {}, []]
const noPause: ReadonlyArray<unknown> = [0, "0 millis", Infinity, Duration.infinity, ...noDuration]
const noCount: ReadonlyArray<unknown> = [-1, 1.5, Number.NaN, Infinity, "5", true, {}]
const noNumber: ReadonlyArray<unknown> = [-1, Number.NaN, Infinity, "5", true, {}]
const noRecord: ReadonlyArray<unknown> = [5, "x", true, []]

/** Nests a value under a path such as `cooldowns.rateLimited.first`. */
const at = (path: string, value: unknown): Readonly<Record<string, unknown>> => {
  const [head = "", ...rest] = path.split(".")
  return { [head]: rest.length === 0 ? value : at(rest.join("."), value) }
}

const wrong: Readonly<Record<string, ReadonlyArray<unknown>>> = {
  keys: [undefined, null, [], "sk-one", 5, {}],
  name: ["", "  ", "a\nb", 5, null],
  strategy: ["fastest", "", 5, {}, null, () => 1],
  breaker: noRecord,
  "breaker.threshold": [0, ...noCount],
  "breaker.cooldown": noDuration,
  "breaker.cooldownFactor": [0.5, Number.NaN, Infinity, "2"],
  "breaker.maxCooldown": [...noDuration, "1 second"],
  "breaker.probeTimeout": [0, ...noDuration],
  "breaker.rate": [5, "x", true],
  "breaker.rate.faults": [0, 1.1, -1, Number.NaN, "1"],
  "breaker.rate.minimumCalls": [0, ...noCount],
  "breaker.rate.window": [0, ...noDuration],
  "breaker.rate.siblingFactor": noNumber,
  retry: [5, "exponential", {}, false],
  budget: noDuration,
  // Beyond the longest timer a deadline would never come.
  deadline: ["25 days", 2 ** 31, Duration.days(100), ...noDuration],
  maxWait: noDuration,
  maxWaiters: noCount,
  rotations: noCount,
  rateLimitRotations: noCount,
  retryTokens: [5, "x", true, []],
  "retryTokens.perCall": noNumber,
  "retryTokens.perSecond": noNumber,
  "retryTokens.burst": [-1, Number.NaN, "5", {}],
  "retryTokens.cap": [0, 0.5, -1, Number.NaN, "5"],
  cooldowns: noRecord,
  "cooldowns.rateLimited": noRecord,
  "cooldowns.rateLimited.first": noDuration,
  "cooldowns.rateLimited.factor": [0, 0.5, -1, Number.NaN, Infinity, "2"],
  "cooldowns.rateLimited.max": [...noDuration, "1 millis"],
  "cooldowns.quotaExhausted": noDuration,
  "cooldowns.revoked": noDuration,
  "cooldowns.unauthorized": [[], "1 minute", 5, {}],
  "cooldowns.forbidden": noRecord,
  "cooldowns.forbidden.first": noDuration,
  "cooldowns.forbidden.factor": [0.5, Number.NaN],
  "cooldowns.forbidden.max": [...noDuration, "1 second"],
  "cooldowns.guard": noDuration,
  "cooldowns.jitter": noDuration,
  floor: noPause,
  attribution: ["per-pool", "", 5, true, null, {}],
  trialTimeout: noPause,
  attemptTimeout: ["measured", true, null, ...noPause],
  ramp: noRecord,
  "ramp.step": noPause,
  "ramp.length": [Infinity, "Infinity", ...noDuration],
  hedge: [5, "yes", null, []],
  "hedge.delay": noPause,
  "hedge.share": [0, 1.1, -1, Number.NaN, "1"],
  "hedge.success": [-0.1, 1.1, Number.NaN, "1"],
  streamIdle: noDuration
}

describe("refusals", () => {
  for (const [path, values] of Object.entries(wrong)) {
    it(`K3: ${path} is refused when it is wrong`, () => {
      for (const value of values) {
        const error = Either.getOrThrowWith(
          Either.flip(resolve(at(path, value))),
          () => new Error(`${inspect(value)} was taken for ${path}`)
        )
        assert.strictEqual(error.field, path, inspect(value))
      }
    })
  }

  it("K3: every setting has a row above", () => {
    assert.sameMembers([...new Set(Object.keys(wrong).map((path) => path.split(".")[0] ?? ""))], [
      ...PoolSettings.names
    ])
  })

  it("K3: an unknown setting is refused at its own path, at every level", () => {
    const paths = [
      "stratgey",
      "breaker.treshold",
      "breaker.rate.fault",
      "cooldowns.ratelimited",
      "cooldowns.rateLimited.frist",
      "cooldowns.forbidden.last",
      "retryTokens.rate",
      "ramp.steps"
    ]
    for (const path of paths) {
      assert.strictEqual(Either.getOrThrow(Either.flip(resolve(at(path, 1)))).field, path)
    }
  })

  it("K3: a rest may not end below its beginning, and none is cut by a default", () => {
    const growing = (input: PoolSettings.GrowingSettings) =>
      Either.match(PoolSettings.resolve({ keys, cooldowns: { rateLimited: input } }), {
        onLeft: (error) => error.field,
        onRight: ({ config }) => [config.cooldowns.rateLimited.firstMillis, config.cooldowns.rateLimited.maxMillis]
      })
    assert.deepStrictEqual(growing({ first: 20, max: 10 }), "cooldowns.rateLimited.max")
    assert.deepStrictEqual(growing({ first: Infinity, max: "1 day" }), "cooldowns.rateLimited.max")
    assert.deepStrictEqual(growing({ first: 20, max: 20 }), [20, 20])
    assert.deepStrictEqual(growing({ first: "5 minutes" }), [300_000, 300_000])
  })

  it("K3: a wrong step of the ladder is refused under its number", () => {
    const error = Either.flip(resolve({ cooldowns: { unauthorized: ["1 minute", "soon"] } }))
    assert.strictEqual(Either.getOrThrow(error).field, "cooldowns.unauthorized[1]")
  })

  it("K3: an unknown strategy is answered with the known ones", () => {
    const { message } = Either.getOrThrow(Either.flip(resolve({ strategy: "fastest" })))
    for (const name of Strategy.Name.literals) assert.include(message, name)
  })

  it("K3: what is no record of settings is refused", () => {
    for (const input of [undefined, null, 5, "keys", ["sk-one"]]) {
      const result = PoolSettings.resolve(input as unknown as PoolSettings.Settings)
      assert.strictEqual(Either.isLeft(result) && result.left._tag, "ConfigurationError")
    }
  })

  it.effect("K3: the pool refuses at construction", () =>
    Effect.gen(function*() {
      const error = yield* Effect.flip(Effect.scoped(KeyPool.make({ keys, budget: -5 })))
      assert.deepStrictEqual([error._tag, error.field], ["ConfigurationError", "budget"])
      const wrongKey = yield* Effect.flip(Effect.scoped(KeyPool.make({ keys: ["a", { secret: "b", weight: -1 }] })))
      assert.strictEqual(wrongKey.field, "keys[1].weight")
    }).pipe(Effect.provide(KeyPool.layerDefaults)))
})

describe("defaults", () => {
  const { config, duplicates, ...calls } = resolved({})

  it("K3: one key is enough", () => {
    assert.deepStrictEqual(calls.keys.map((key) => Redacted.value(key.secret)), keys)
    assert.deepStrictEqual(duplicates, [])
  })

  it("the pool's name and strategy", () => {
    assert.strictEqual(config.pool, "default")
    assert.strictEqual(config.strategy, Strategy.roundRobin)
  })

  it("B1: the breaker opens after 3 faults for 30 s, doubling up to 5 min, and by rate", () => {
    assert.deepStrictEqual(config.breaker, {
      threshold: 3,
      cooldownMillis: 30_000,
      cooldownFactor: 2,
      maxCooldownMillis: 300_000,
      probeTimeoutMillis: 30_000,
      rate: { faults: 0.5, minimumCalls: 10, windowMillis: 30_000, siblingFactor: 3 }
    })
  })

  it("C3: the limits of a call", () => {
    assert.strictEqual(calls.budgetMillis, 60_000)
    assert.strictEqual(calls.deadlineMillis, undefined)
    assert.strictEqual(calls.maxWaitMillis, undefined)
    assert.strictEqual(calls.rotations, 8)
    assert.strictEqual(calls.rateLimitRotations, 4)
    assert.deepStrictEqual(config.tokens, { perCall: 0.2, perSecond: 1, burst: 10, cap: 100 })
  })

  it.effect("C3: 5 retries with full jitter, and told waits respected", () =>
    Effect.gen(function*() {
      const failing = (waitMillis: number | undefined): ReadonlyArray<RetryPolicy.Retrying> =>
        Array.from({ length: 20 }, () => ({ startedAt: 0, waitMillis }))
      const delays = (waitMillis: number | undefined) =>
        Effect.map(
          Schedule.run(Schedule.delays(calls.retry), 0, failing(waitMillis)),
          (delays) => Chunk.toReadonlyArray(delays).map(Duration.toMillis)
        )
      const plain = yield* delays(undefined)
      // The last output of a schedule that ends goes with no retry.
      assert.strictEqual(plain.length - 1, 5)
      const told = (yield* delays(7_000)).slice(0, 5)
      assert.strictEqual(told.length, 5)
      for (const delay of told) assert.isAtLeast(delay, 7_000)
    }))

  it("C2: at most 1,000 waiters", () => assert.strictEqual(config.maxWaiters, 1_000))

  it("the cooldowns of each kind of fault", () => {
    assert.deepStrictEqual(config.cooldowns, {
      rateLimited: { firstMillis: 1_000, factor: 2, maxMillis: 60_000 },
      quotaMillis: 3_600_000,
      revokedMillis: 86_400_000,
      unauthorizedMillis: [60_000, 300_000, 3_600_000, 86_400_000],
      forbidden: { firstMillis: 600_000, factor: 2, maxMillis: 21_600_000 },
      guardMillis: 20,
      jitterMillis: 250
    })
  })

  it("F5: the floor lets one call through each second", () => assert.strictEqual(config.floorMillis, 1_000))

  it("B5: an undecided trial holds a key for 30 s", () => assert.strictEqual(config.trialMillis, 30_000))

  it("A4: the ramp doubles every 500 ms and is over in 3 s", () => {
    assert.deepStrictEqual([config.rampStepMillis, config.rampMillis], [500, 3_000])
  })

  it("C3: how long an attempt may take is learned, fixed or not limited", () => {
    assert.strictEqual(config.attemptTimeout, "learned")
    assert.strictEqual(resolved({ attemptTimeout: "learned" }).config.attemptTimeout, "learned")
    assert.strictEqual(resolved({ attemptTimeout: false }).config.attemptTimeout, undefined)
  })

  it("A6: calls are not hedged; when they are, 5 of 100 and above 90 % success, after a time that is learned", () => {
    const bounds = { share: 0.05, success: 0.9 }
    for (const hedge of [undefined, false]) assert.strictEqual(resolved({ hedge }).hedge, undefined)
    for (const hedge of [true, {}]) assert.deepStrictEqual(resolved({ hedge }).hedge, { delayMillis: undefined })
    assert.deepStrictEqual(config.hedging, bounds)
    assert.deepStrictEqual(resolved({ hedge: true }).config.hedging, bounds)
    const times = (settings: object) => resolved({ attemptTimeout: false, ...settings }).config.times
    assert.deepStrictEqual(
      [times({}), times({ hedge: true }), times({ hedge: { delay: 5 } }), times({ attemptTimeout: "learned" })],
      [false, true, false, true]
    )
  })

  it("S1: a stream may go unread for 300 s", () => assert.strictEqual(calls.streamIdleMillis, 300_000))

  it("what is given as undefined is left out", () => {
    const blank = Object.fromEntries(
      PoolSettings.names.filter((name) => name !== "keys").map((name) => [name, undefined])
    )
    const given = Either.getOrThrow(resolve(blank))
    assert.deepStrictEqual({ ...given, keys: [] }, { config, duplicates, ...calls, keys: [] })
  })
})

describe("what is set", () => {
  it("K3: every setting has an effect on what the pool uses", () => {
    const retry = Schedule.recurs(1)
    const { config, duplicates, keys: made, ...calls } = resolved({
      keys: ["sk-one", "sk-one"],
      name: "openai",
      strategy: "least-used",
      breaker: {
        threshold: 5,
        cooldown: "1 second",
        cooldownFactor: 1,
        maxCooldown: "2 seconds",
        probeTimeout: 7,
        rate: { faults: 1, minimumCalls: 2, window: "1 minute", siblingFactor: 0 }
      },
      retry,
      budget: "10 seconds",
      deadline: "20 seconds",
      maxWait: 0,
      maxWaiters: 3,
      rotations: 0,
      rateLimitRotations: 1,
      retryTokens: { perCall: 0, perSecond: 2, burst: 1, cap: 5 },
      cooldowns: {
        rateLimited: { first: 10, factor: 3, max: 20 },
        quotaExhausted: "2 hours",
        revoked: "1 hour",
        unauthorized: [1, "2 seconds"],
        forbidden: { first: 30, factor: 1, max: 40 },
        guard: 5,
        jitter: 0
      },
      floor: "5 seconds",
      attribution: "per-key",
      trialTimeout: 8,
      attemptTimeout: "10 seconds",
      hedge: { delay: "1 second", share: 0.1, success: 0.5 },
      ramp: { step: 100, length: 200 },
      streamIdle: "1 minute"
    })
    assert.deepStrictEqual([made.length, duplicates.length], [1, 1])
    assert.deepStrictEqual<unknown>(config, {
      pool: "openai",
      strategy: Strategy.leastUsed,
      breaker: {
        threshold: 5,
        cooldownMillis: 1_000,
        cooldownFactor: 1,
        maxCooldownMillis: 2_000,
        probeTimeoutMillis: 7,
        rate: { faults: 1, minimumCalls: 2, windowMillis: 60_000, siblingFactor: 0 }
      },
      cooldowns: {
        rateLimited: { firstMillis: 10, factor: 3, maxMillis: 20 },
        quotaMillis: 7_200_000,
        revokedMillis: 3_600_000,
        unauthorizedMillis: [1, 2_000],
        forbidden: { firstMillis: 30, factor: 1, maxMillis: 40 },
        guardMillis: 5,
        jitterMillis: 0
      },
      tokens: { perCall: 0, perSecond: 2, burst: 1, cap: 5 },
      floorMillis: 5_000,
      attemptTimeout: 10_000,
      times: false,
      hedging: { share: 0.1, success: 0.5 },
      corroborates: false,
      maxWaiters: 3,
      trialMillis: 8,
      rampStepMillis: 100,
      rampMillis: 200
    })
    assert.deepStrictEqual<unknown>(calls, {
      retry,
      budgetMillis: 10_000,
      deadlineMillis: 20_000,
      maxWaitMillis: 0,
      rotations: 0,
      rateLimitRotations: 1,
      hedge: { delayMillis: 1_000 },
      streamIdleMillis: 60_000
    })
  })

  it("a deadline may be as long as a timer; without an end it is none, as a budget may be", () => {
    assert.strictEqual(resolved({ deadline: 2 ** 31 - 1 }).deadlineMillis, 2 ** 31 - 1)
    assert.strictEqual(resolved({ deadline: Infinity }).deadlineMillis, undefined)
    assert.strictEqual(resolved({ budget: Infinity }).budgetMillis, Infinity)
    assert.strictEqual(resolved({ budget: "100 days" }).budgetMillis, 8_640_000_000)
  })

  it("faults are corroborated unless it is said otherwise", () => {
    assert.strictEqual(resolved({}).config.corroborates, true)
    assert.strictEqual(resolved({ attribution: "corroborated" }).config.corroborates, true)
  })

  it("every strategy goes by its name, or as itself", () => {
    for (const name of Strategy.Name.literals) {
      assert.strictEqual(resolved({ strategy: name }).config.strategy, Strategy.fromName(name))
      assert.strictEqual(resolved({ strategy: Strategy.fromName(name) }).config.strategy, Strategy.fromName(name))
    }
  })

  it("the floor, the retry tokens and the trip by rate can be switched off", () => {
    const { config } = resolved({ floor: false, retryTokens: false, breaker: { rate: false } })
    assert.strictEqual(config.floorMillis, undefined)
    assert.strictEqual(config.tokens.burst, Infinity)
    assert.strictEqual(config.tokens.cap, Infinity)
    assert.strictEqual(config.breaker.rate, undefined)
  })

  it.prop(
    "the longest breaker cooldown is never below the first one",
    [FastCheck.nat({ max: 10_000_000 })],
    ([cooldown]) => {
      const { breaker } = resolved({ breaker: { cooldown } }).config
      assert.strictEqual(breaker.cooldownMillis, cooldown)
      assert.strictEqual(breaker.maxCooldownMillis, Math.max(300_000, cooldown))
    }
  )
})
