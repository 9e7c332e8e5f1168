/**
 * What a pooled success costs over the same effect without a pool, for pools of 1 to 10,000 keys.
 *
 * Every round runs each contestant once, in turn, so that a slow moment of the machine hits all of them; the figures are
 * medians over the rounds. Nothing is asserted here: the numbers are for people.
 *
 *   npm run bench                 the default table
 *   npm run bench -- --rounds 31  more rounds
 */
import * as Effect from "effect/Effect"
import * as Redacted from "effect/Redacted"
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Strategy from "effect-keymesh/Strategy"

const argument = (name, otherwise) => {
  const at = process.argv.indexOf(`--${name}`)
  return at < 0 ? otherwise : Number(process.argv[at + 1])
}
const rounds = argument("rounds", 15)
const calls = argument("calls", 4_000)
const sizes = [1, 3, 10, 100, 1_000, 10_000]

const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b)
  return sorted[Math.floor(sorted.length / 2)]
}

const resolved = Promise.resolve(1)
const works = {
  "a value (Effect.succeed)": () => Effect.succeed(1),
  "a resolved promise (Effect.promise)": () => Effect.promise(() => resolved)
}

/** Microseconds per run of `effect`, inside one fiber. */
const timed = (effect) =>
  Effect.gen(function*() {
    const from = performance.now()
    for (let i = 0; i < calls; i++) yield* effect()
    return (performance.now() - from) * 1_000 / calls
  })

const keys = (n) => Array.from({ length: n }, (_, i) => `bench-key-${i}`)

const table = (title, head, rows) => {
  const all = [head, ...rows]
  const widths = head.map((_, column) => Math.max(...all.map((row) => row[column].length)))
  console.log(`\n${title}`)
  for (const row of all) console.log("  " + row.map((cell, column) => cell.padStart(widths[column])).join("   "))
}

const µs = (value) => value.toFixed(2)

const compare = (contestants, work) =>
  Effect.gen(function*() {
    const raw = []
    const pooled = contestants.map(() => [])
    for (let round = -2; round < rounds; round++) {
      const base = yield* timed(work)
      if (round >= 0) raw.push(base)
      for (const [i, { pool }] of contestants.entries()) {
        const cost = yield* timed(() => pool.run(work))
        if (round >= 0) pooled[i].push(cost)
      }
    }
    return contestants.map(({ name }, i) => [
      name,
      µs(median(raw)),
      µs(median(pooled[i])),
      µs(median(pooled[i].map((cost, round) => cost - raw[round]))),
      `×${median(pooled[i].map((cost, round) => cost / raw[round])).toFixed(1)}`
    ])
  })

const program = Effect.gen(function*() {
  console.log(`Node.js ${process.version}, ${rounds} interleaved rounds of ${calls} calls, medians in µs per call`)
  const head = ["keys", "without a pool", "pooled", "added", "ratio"]
  const bySize = []
  for (const size of sizes) {
    bySize.push({ name: size.toLocaleString("en"), pool: yield* KeyPool.make({ name: `n${size}`, keys: keys(size) }) })
  }
  for (const [name, work] of Object.entries(works)) {
    const rows = yield* compare(bySize, work)
    table(`Round-robin over ${name}`, head, rows)
    const added = (row) => Number(row[3])
    console.log(`  10,000 keys cost ×${(added(rows[5]) / added(rows[2])).toFixed(2)} of what 10 keys cost`)
  }
  const strategies = [
    Strategy.roundRobin,
    Strategy.weighted,
    Strategy.leastUsed,
    Strategy.sequential,
    Strategy.powerOfTwoChoices,
    Strategy.headroom,
    Strategy.leastLatency
  ]
  for (const size of [3, 10_000]) {
    const byStrategy = []
    for (const strategy of strategies) {
      const pool = yield* KeyPool.make({ name: `${strategy.name}-${size}`, keys: keys(size), strategy })
      byStrategy.push({ name: strategy.name, pool })
    }
    const rows = yield* compare(byStrategy, works["a value (Effect.succeed)"])
    table(`Strategies, ${size.toLocaleString("en")} keys`, ["strategy", ...head.slice(1)], rows)
  }
  const limited = [
    ["none", {}],
    ["concurrency", { limits: { concurrency: 1e6 } }],
    ["requests", { limits: { requestsPerMinute: 1e9 } }],
    ["requests and tokens", { limits: { requestsPerMinute: 1e9, tokensPerMinute: 1e12 } }],
    ["requests, one group", { limits: { requestsPerMinute: 1e9 }, quotaGroup: "all" }]
  ]
  const byLimits = []
  for (const [name, attributes] of limited) {
    const declared = keys(3).map((secret) => ({ secret: Redacted.make(secret), ...attributes }))
    byLimits.push({ name, pool: yield* KeyPool.make({ name: `limits: ${name}`, keys: declared }) })
  }
  const rows = yield* compare(byLimits, works["a value (Effect.succeed)"])
  table("Declared limits, 3 keys", ["limits", ...head.slice(1)], rows)
  console.log(`  the dearest limits cost ×${(Math.max(...rows.map((row) => row[3])) / rows[0][3]).toFixed(2)} of none`)
})

await Effect.runPromise(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
