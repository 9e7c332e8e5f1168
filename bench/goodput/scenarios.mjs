/**
 * The scenarios. Times in seconds unless said otherwise; `rate` is what is offered, per minute. A scenario names in
 * which states of knowledge the pool is tried: `nothing` known, limits `declared` on its keys, limits `announced` in
 * headers, as OpenAI writes them or (`announced-anthropic`) as Anthropic does, or both (`announced-and-declared`).
 * `nothing-anthropic` is `nothing` in Anthropic's words. Further modes are settings of the pool, with nothing known:
 * `least-latency` and `hedged`.
 */
import { exponential, lognormal, seeded } from "./seeded.mjs"

const model = "gpt-4o-mini"
const five = Array.from({ length: 5 }, (_, i) => ({ group: `g${i}` }))
const window120 = { kind: "window", of: "requests", per: 60_000, limit: 120 }
const bucket120 = { kind: "bucket", of: "requests", per: 60_000, limit: 120, burst: 20 }
const known = ["nothing", "declared", "announced"]
const aKey = (kind, from = 40, to = 80, more = {}) => ({ kind, keys: [1], from, to, ...more })
const forGood = 1e6
/** Limits far away: what is tried is something else. */
const roomy = { kind: "window", of: "requests", per: 60_000, limit: 6_000 }

const base = {
  seconds: 120,
  rate: 360,
  keys: five,
  limits: [window120],
  faults: [],
  models: [{ name: model, share: 1 }],
  modes: ["nothing"],
  serviceMillis: 800,
  sigma: 0.5
}

const define = (name, about, more) => ({ ...base, name, about, ...more })
const outage = { rate: 1_800, seconds: 100, limits: [roomy], outage: { from: 30, to: 45 } }
const allDown = (kind) => ({ faults: [{ kind, from: 30, to: 45 }] })
const limited = (seconds) => ({
  seconds: 2,
  rate: 1_200,
  count: 40,
  modes: ["nothing", "announced"],
  learned: 5,
  faults: [{ kind: "limited", from: 0, to: seconds }]
})
const tokens = (limit, more = {}) => ({ kind: "window", of: "tokens", per: 60_000, limit, ...more })
const keysOf = (count) => Array.from({ length: count }, (_, i) => ({ group: `g${i}` }))
const limit = (perMinute) => ({ ...window120, limit: perMinute })
const eightAtOnce = { kind: "concurrency", of: "requests", limit: 8, says: "Too many requests" }
/** Minutes of many small requests, and minutes of few large ones. */
const isSmall = (at) => Math.floor(at / 60) % 2 === 0
/** Most requests are small, some are ten times as large. */
const variedTokens = (random) => {
  const input = Math.round(100 + 400 * lognormal(random, 0.9))
  const maxTokens = [200, 500, 1_000][Math.floor(random() * 3)]
  return { input: Math.min(input, 6_000), maxTokens, output: Math.round(maxTokens * (0.2 + 0.6 * random())) }
}

export const scenarios = [
  define("tiny", "40 s at 150 % of two keys, some of it in a brownout, for a quick check", {
    seconds: 40,
    rate: 90,
    keys: five.slice(0, 2),
    limits: [{ ...window120, limit: 30 }],
    faults: [{ kind: "500", from: 5, to: 15, share: 0.5 }],
    modes: known,
    unavoidable: 0.4
  }),
  define("over60", "60 % of 5 × 120/min, fixed windows of unknown phase", { rate: 360, modes: known }),
  define("over95", "95 %", { rate: 570, modes: known }),
  define("over120", "120 %", { rate: 720, seconds: 240, modes: [...known, "announced-anthropic"] }),
  define("over150", "150 %", { rate: 900, seconds: 180, modes: known }),
  define("small", "as over120, with a tenth of the limits, for longer", {
    seconds: 480,
    rate: 72,
    limits: [{ ...window120, limit: 12 }],
    modes: known
  }),
  define("bursty80", "token buckets of burst 20; 80 % on average, in bursts of 2.5 times that", {
    seconds: 180,
    rate: 480,
    limits: [bucket120],
    bursts: { on: 12, off: 18 },
    modes: known
  }),
  define("bucket95", "token buckets of burst 20, 95 %", { rate: 570, limits: [bucket120], modes: known }),
  define("bucket120", "token buckets of burst 20, 120 %", {
    seconds: 180,
    rate: 720,
    limits: [bucket120],
    modes: [...known, "announced-anthropic"]
  }),
  define("penal120", "as bucket120, and refused requests are debited too, down to minus the burst", {
    seconds: 180,
    rate: 720,
    limits: [{ ...bucket120, penal: true }],
    modes: known
  }),
  define("hetero", "24, 48, 96, 192 and 384 per minute, 80 %", {
    rate: 595,
    limits: [{ ...window120, limitOf: (group) => [24, 48, 96, 192, 384][group] }],
    modes: known
  }),
  define("revoked", "one key of five is revoked", { faults: [aKey("401", 40, forGood)], faulty: 1 }),
  define("quota", "one key's quota is spent", { faults: [aKey("quota", 40, forGood)], faulty: 1 }),
  define("key500", "one key answers 500 for 40 s", { faults: [aKey("500")], faulty: 1 }),
  define("key529", "one key answers 529 for 40 s", { faults: [aKey("529")], faulty: 1 }),
  define("keyreset", "connections of one key are reset for 40 s", { faults: [aKey("reset")], faulty: 1 }),
  define("keyhang", "one key never answers for 40 s", { faults: [aKey("hang")], faulty: 1 }),
  define("outage", "every key answers 503 for 15 s, 30 calls per second", { ...outage, ...allDown("503") }),
  define("outageNet", "every connection is reset for 15 s", { ...outage, ...allDown("reset") }),
  define("limited20", "all keys are limited for another 20 s, 40 calls in 2 s", limited(20)),
  define("limited45", "all keys are limited for another 45 s", limited(45)),
  define("limited90", "all keys are limited for another 90 s: nothing can be answered in time", limited(90)),
  define("halfopen", "100 calls at once after a breaker's cooldown, one key still failing", {
    seconds: 2,
    rate: 600,
    count: 20,
    burst: { at: 33, count: 100 },
    limits: [roomy],
    faults: [aKey("500", 0, 120, { afterMillis: 1_000 })],
    faulty: 1
  }),

  // Not in the list above: what a judge might think of.
  define("tpm", "tokens per minute, requests of very different sizes, 90 %", {
    rate: 300,
    limits: [tokens(60_000), { ...window120, limit: 600 }],
    tokensOf: variedTokens,
    modes: known
  }),
  define("tpm120", "tokens per minute, 120 %", {
    seconds: 180,
    rate: 400,
    limits: [tokens(60_000)],
    tokensOf: variedTokens,
    modes: [...known, "announced-anthropic"]
  }),
  define("groups", "six keys in two groups that share a limit each, declared as such, 110 %", {
    seconds: 180,
    keys: Array.from({ length: 6 }, (_, i) => ({ group: `g${i % 2}` })),
    limits: [{ ...window120, limit: 240 }],
    rate: 528,
    tellGroups: true,
    modes: known
  }),
  define("groups-untold", "the same, and nobody told the pool of the groups", {
    seconds: 180,
    keys: Array.from({ length: 6 }, (_, i) => ({ group: `g${i % 2}` })),
    limits: [{ ...window120, limit: 240 }],
    rate: 528,
    modes: ["nothing", "announced"]
  }),
  define("models", "limits per model; one of two models is asked for at 160 %", {
    seconds: 180,
    limits: [{ ...window120, limit: 40, models: ["gpt-4o"] }, { ...window120, limit: 200, models: [model] }],
    rate: 640,
    models: [{ name: model, share: 0.5 }, { name: "gpt-4o", share: 0.5 }],
    modes: ["nothing", "announced"]
  }),
  define("model-spent", "one of two models is limited on every key for 30 s, the other is not", {
    limits: [roomy],
    models: [{ name: model, share: 0.5 }, { name: "gpt-4o", share: 0.5 }],
    faults: [{ kind: "limited", models: ["gpt-4o"], from: 20, to: 50 }],
    learned: 5,
    modes: ["nothing", "announced"]
  }),
  define("daily", "two of five keys have 60 requests left for the day", {
    seconds: 180,
    limits: [window120, {
      kind: "window",
      of: "requests",
      per: 86_400_000,
      phase: -0.5,
      limitOf: (group) => (group < 2 ? 60 : 100_000)
    }],
    rate: 300,
    learned: 7,
    modes: known
  }),
  define("brownout", "25 % of all requests fail with 500, whichever the key", {
    faults: [{ kind: "500", from: 0, to: forGood, share: 0.25 }],
    limits: [roomy],
    // What fails is the dice's doing: one call in three needs another attempt, on average.
    unavoidable: 0.36
  }),
  define("slow", "one key takes eight times as long", {
    keys: five.map((key, i) => (i === 1 ? { ...key, slow: 8 } : key))
  }),
  define("slow-key", "one key takes ten times as long; the pool as it is, and with a strategy that goes by latency", {
    keys: five.map((key, i) => (i === 1 ? { ...key, slow: 10 } : key)),
    limits: [roomy],
    modes: ["nothing", "least-latency", "least-latency-hedged"]
  }),
  define("stragglers", "2 of 100 attempts take ten times as long, whichever the key; the pool as it is, and hedged", {
    seconds: 240,
    stragglers: { share: 0.02, times: 10 },
    limits: [roomy],
    modes: ["nothing", "hedged"]
  }),
  define("flapping", "one key answers 500 for 5 s of every 10 s", {
    faults: [aKey("500", 10, 110, { every: 5 })],
    faulty: 1
  }),
  define("staggered", "two models go down one after the other, 15 s each", {
    limits: [roomy],
    rate: 900,
    models: [{ name: model, share: 0.5 }, { name: "gpt-4o", share: 0.5 }],
    faults: [
      { kind: "503", models: [model], from: 30, to: 45 },
      { kind: "503", models: ["gpt-4o"], from: 60, to: 75 }
    ]
  }),
  define("outage-limited", "503 for 15 s, and limits that the pent-up calls run into (80 %)", {
    rate: 480,
    faults: [{ kind: "503", from: 60, to: 75 }],
    outage: { from: 60, to: 75 },
    modes: known
  }),
  define("streams", "half of the calls are streams, 120 %", { rate: 720, streams: 0.5, modes: known }),
  define("burst1000", "1,000 calls at once, ten keys of 120/min", {
    seconds: 1,
    count: 0,
    burst: { at: 0, count: 1_000 },
    keys: Array.from({ length: 10 }, (_, i) => ({ group: `g${i}` })),
    modes: known
  }),
  define("burst300", "300 calls at once on token buckets of burst 20", {
    seconds: 1,
    count: 0,
    burst: { at: 0, count: 300 },
    limits: [bucket120],
    modes: known
  }),
  define("changing", "limits fall to a half after a minute and come back after another, 85 %", {
    rate: 420,
    seconds: 240,
    limits: [{ ...bucket120, changes: [{ at: 80, limit: 60 }, { at: 140, limit: 120 }] }],
    learned: 10,
    modes: known
  }),
  define("seconds-only", "as over120, and Retry-After in whole seconds only", {
    seconds: 180,
    rate: 720,
    retryAfter: "seconds",
    modes: ["nothing", "announced"]
  }),
  define("bucket-seconds", "as bucket120, and Retry-After in whole seconds only", {
    seconds: 180,
    rate: 720,
    limits: [bucket120],
    retryAfter: "seconds",
    modes: ["nothing", "announced"]
  }),
  define("no-hint", "as over120, and refusals say nothing about waiting", {
    seconds: 180,
    rate: 720,
    retryAfter: "none",
    modes: ["nothing", "declared"]
  }),
  define("skew", "as over120, Retry-After as a date of a server whose clock is 5 min ahead", {
    seconds: 180,
    rate: 720,
    retryAfter: "date",
    skewSeconds: 300,
    modes: ["nothing", "announced", "announced-anthropic"]
  }),

  // Other pools, other calls, other providers.
  define("one-key", "a single key, 120 % of it", {
    seconds: 180,
    keys: five.slice(0, 1),
    limits: [{ ...window120, limit: 60 }],
    rate: 72,
    modes: known
  }),
  define("fifty", "50 keys of 12/min, 120 %", { seconds: 150, keys: keysOf(50), limits: [limit(12)], rate: 720, modes: known }),
  define("two-dead", "two keys of which one is refused from the beginning, 90 % of the other", {
    keys: five.slice(0, 2),
    rate: 108,
    faults: [aKey("401", 0, forGood)],
    faulty: 1,
    modes: known
  }),
  define("unequal", "two of five keys have a tenth of the others' limit, 110 %", {
    seconds: 180,
    limits: [{ ...window120, limitOf: (group) => (group < 2 ? 12 : 120) }],
    rate: 422,
    modes: ["nothing", "announced"]
  }),
  define("long", "answers take 20 s, and their headers come with them; 110 % of 5 × 30/min", {
    seconds: 150,
    serviceMillis: 20_000,
    sigma: 0.3,
    limits: [limit(30)],
    rate: 165,
    modes: ["nothing", "announced"]
  }),
  define("short", "answers take 100 ms, 120 % of 5 × 600/min", {
    seconds: 90,
    serviceMillis: 100,
    limits: [limit(600)],
    rate: 3_600,
    modes: ["nothing", "announced"]
  }),
  define("ramp", "the rate rises from 50 % to 150 % and falls again", {
    seconds: 240,
    limits: [limit(60)],
    rate: 450,
    shareAt: (at) => (1 + 2 * (1 - Math.abs(at - 120) / 120)) / 3,
    modes: ["nothing", "announced"]
  }),
  define("told-half", "Retry-After is half of what it should be, 130 %", {
    rate: 780,
    told: (millis) => millis / 2
  }),
  define("told-twice", "Retry-After is twice what it should be, 95 %", {
    seconds: 180,
    rate: 570,
    limits: [bucket120],
    bursts: { on: 20, off: 10 },
    told: (millis) => 2 * millis
  }),
  define("told-second", "Retry-After is one second, however long it takes, 110 %", { rate: 660, told: () => 1_000 }),
  define("in-flight", "a key serves 8 at once and refuses the ninth, without a hint; 85 %", {
    serviceMillis: 4_000,
    limits: [eightAtOnce],
    rate: 450
  }),
  define("in-flight-told", "the same, with Retry-After: 1, 110 %", {
    serviceMillis: 4_000,
    limits: [{ ...eightAtOnce, says: "Too many concurrent requests" }],
    rate: 586,
    told: () => 1_000
  }),
  define("told-and-declared", "limits are declared and announced, 85 %: the same limits", {
    rate: 510,
    modes: ["announced-and-declared"]
  }),
  define("declared-twice", "announced limits are half of what the keys declare, 110 % of them", {
    seconds: 180,
    rate: 660,
    declaredTimes: 2,
    modes: ["announced-and-declared"]
  }),
  define("alternating", "requests and tokens per minute: now the one binds, now the other, 125 %", {
    seconds: 240,
    limits: [window120, tokens(60_000)],
    rate: 750,
    shareAt: (at) => (isSmall(at) ? 1 : 0.25),
    tokensOf: (random, at) =>
      isSmall(at)
        ? { input: 40, maxTokens: 100, output: 40 + Math.round(40 * random()) }
        : { input: 1_000 + Math.round(600 * random()), maxTokens: 800, output: 500 + Math.round(300 * random()) },
    modes: ["nothing", "announced"]
  }),
  define("day-and-minute", "two of five keys have 20 requests left for the day; 90 % of 24/min of the others", {
    seconds: 180,
    limits: [limit(24), {
      kind: "window",
      of: "requests",
      per: 86_400_000,
      phase: -0.5,
      limitOf: (group) => (group < 2 ? 20 : 100_000)
    }],
    rate: 65,
    learned: 7,
    modes: ["nothing", "announced"]
  }),
  define("some-down", "three of ten keys answer 503 for 40 s; 105 % of what the others let through", {
    seconds: 150,
    keys: keysOf(10),
    limits: [limit(60)],
    rate: 441,
    faults: [{ kind: "503", keys: [0, 3, 6], from: 40, to: 80 }],
    faulty: 3,
    modes: ["nothing", "announced"]
  }),
  define("input-output", "input and output tokens per minute, as Anthropic counts them, 125 %", {
    seconds: 180,
    limits: [tokens(50_000, { of: "input-tokens" }), tokens(16_000, { of: "output-tokens" }), limit(120)],
    rate: 300,
    tokensOf: variedTokens,
    modes: ["nothing-anthropic", "announced-anthropic"]
  })
]

/** Who calls when, for what: the same for every contestant. */
export const planOf = (scenario, seed) => {
  const random = seeded(`${seed} ${scenario.name} arrivals`)
  const service = seeded(`${seed} ${scenario.name} service`)
  const arrivals = []
  const perMilli = scenario.rate / 60_000
  const { bursts } = scenario
  const cycle = bursts === undefined ? 0 : bursts.on + bursts.off
  // With bursts, time only counts while they last, at a rate that keeps the average.
  const real = (at) => {
    if (bursts === undefined) return at
    const on = bursts.on * 1_000
    return Math.floor(at / on) * cycle * 1_000 + at % on
  }
  const speed = bursts === undefined ? perMilli : perMilli * cycle / bursts.on
  for (let at = exponential(random) / speed; ; at += exponential(random) / speed) {
    if (scenario.count === undefined ? real(at) >= scenario.seconds * 1_000 : arrivals.length >= scenario.count) break
    // Where the rate changes with time, what is above it is left out.
    if (scenario.shareAt === undefined || random() < scenario.shareAt(at / 1_000)) arrivals.push(real(at))
  }
  if (scenario.burst !== undefined) {
    for (let i = 0; i < scenario.burst.count; i++) arrivals.push(scenario.burst.at * 1_000)
  }
  return arrivals.map((at, id) => {
    let dice = service()
    const chosen = scenario.models.find(({ share }) => (dice -= share) < 0) ?? scenario.models[0]
    return {
      id,
      at,
      model: chosen.name,
      service: Math.max(60, scenario.serviceMillis * lognormal(service, scenario.sigma)),
      stream: service() < (scenario.streams ?? 0),
      ...(scenario.tokensOf?.(service, at / 1_000) ?? { input: 20, maxTokens: 100, output: 40 })
    }
  })
}
