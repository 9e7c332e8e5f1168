/** One run: a scenario, a seed, a contestant, on a clock of its own. */
import { epoch, now, pass, reset } from "./virtual-time.mjs"
import { oracle } from "./oracle.mjs"
import { planOf } from "./scenarios.mjs"
import { makeUpstream } from "./upstream.mjs"

/** When a caller stops caring, in milliseconds. */
export const deadline = 60_000

/** How the pool's callers may write to the provider, by what the mode says. */
const dialectOf = (mode) => (mode?.endsWith("anthropic") ? "anthropic" : "openai")

/** What the calls of one contestant became, and what reached the provider. */
export const run = async (scenario, seed, { contestant, mode, name }) => {
  const calls = planOf(scenario, seed)
  if (name === "oracle") {
    const asDeclared = mode === "as declared"
    return { calls, ...oracle({ calls, deadline, asDeclared, scenario, seed, start: epoch }) }
  }
  reset(`${seed} ${scenario.name} platform`)
  const dialect = dialectOf(mode)
  const secrets = scenario.keys.map((_, i) => `sk-sim-${String(i).padStart(4, "0")}-abcdefghijklmnop`)
  const upstream = makeUpstream({
    announces: mode?.startsWith("announced") ?? false,
    calls,
    clock: now,
    dialect,
    later: (millis, task) => setTimeout(task, millis),
    scenario,
    secrets,
    seed,
    start: epoch
  })
  const results = calls.map(() => ({ ok: false, latency: undefined, error: "never settled" }))
  const made = await contestant({ dialect, fetch: upstream.fetch, mode, scenario, secrets, seed })
  let open = calls.length
  for (const call of calls) {
    setTimeout(() => {
      const startedAt = now()
      const end = (ok, error) => {
        results[call.id] = { ok, latency: now() - startedAt, error }
        open--
      }
      made.call(call).then(
        () => end(true, undefined),
        (error) => end(false, error.status === undefined ? error.message : `${error.constructor.name} ${error.status}`)
      )
    }, call.at)
  }
  const last = calls.reduce((at, call) => Math.max(at, call.at), 0)
  await pass(epoch + last + 2 * deadline, () => open === 0)
  let closed = false
  const closing = made.close().then(() => {
    closed = true
  })
  await pass(now() + deadline, () => closed)
  await closing
  return { calls, results, log: upstream.log }
}
