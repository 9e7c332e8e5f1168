/** Who gets which share of the calls: `npx tsx examples/strategies.ts` */
import * as KeyPool from "effect-keymesh/KeyPool"
import * as Strategy from "effect-keymesh/Strategy"
import * as Effect from "effect/Effect"
import * as Print from "./support/Print.js"

const keys = [
  { secret: "sk-fake-light-11e0", label: "light", weight: 1, limits: { requestsPerMinute: 200 } },
  { secret: "sk-fake-heavy-22f1", label: "heavy", weight: 3 },
  { secret: "sk-fake-slow-33a2", label: "slow", weight: 2 }
]

/** One key answers ten times as slowly as the others. */
const call = ({ key }: KeyPool.Lease) => Effect.sleep(key.label === "slow" ? "20 millis" : "2 millis")

/** A strategy of your own: a pure function. This one keeps "light" for when both others have 3 calls in flight. */
const lastResort = Strategy.custom("last-resort", (candidates) => {
  const [first, ...others] = candidates.filter((key) => key.label !== "light" && key.inFlight < 3)
  if (first === undefined) return candidates.find((key) => key.label === "light") ?? candidates[0]
  return others.reduce((least, key) => key.inFlight < least.inFlight ? key : least, first)
})

const strategies = [
  Strategy.roundRobin,
  Strategy.weighted,
  Strategy.leastUsed,
  Strategy.powerOfTwoChoices,
  Strategy.sequential,
  Strategy.headroom,
  Strategy.leastLatency,
  lastResort
]

const share = (strategy: Strategy.Strategy) =>
  Effect.gen(function*() {
    const pool = yield* KeyPool.make({ name: strategy.name, keys, strategy })
    yield* Effect.replicateEffect(pool.run(call), 120, { concurrency: 8, discard: true })
    const snapshot = yield* pool.snapshot
    return [strategy.name, ...snapshot.keys.map((key) => key.total)]
  })

const program = Effect.gen(function*() {
  yield* Print.title(
    "120 calls, 8 at a time: light (weight 1, 200 per minute), heavy (weight 3), slow (weight 2, ten times as slow)"
  )
  const rows = yield* Effect.forEach(strategies, share)
  yield* Print.say(Print.table(["strategy", ...keys.map((key) => key.label)], rows))
})

Print.main(program.pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults)))
