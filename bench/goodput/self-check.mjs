/** Is the simulation right? A measuring stick that nobody checked measures nothing. */
import { bucket, fixedWindow } from "./limiters.mjs"
import { measure } from "./measures.mjs"
import { run } from "./run.mjs"
import { planOf, scenarios } from "./scenarios.mjs"
import { makeRules } from "./upstream.mjs"
import { epoch, now, pass, reset, settleFor } from "./virtual-time.mjs"

export const selfCheck = async () => {
  const failures = []
  const check = (title, holds) => {
    if (!holds) failures.push(title)
  }
  const spec = { of: "requests", per: 60_000, limit: 3 }

  const window = fixedWindow(spec, 10_000)
  for (const at of [0, 1, 9_998]) {
    check(`a window takes what is within its limit, at ${at}`, window.fits(at, 1))
    window.take(at, 1)
  }
  check("a full window refuses", !window.fits(9_999, 1))
  check("a full window says when it ends", window.next(9_999, 1) === 10_000)
  check("a window ends at its phase", window.fits(10_000, 1))
  check("a new window announces all", window.announced(10_000).remaining === 3)
  check("a window announces its end", window.announced(10_000).fullIn === 60_000)

  const changing = fixedWindow({ ...spec, changes: [{ at: 5_000, limit: 1 }] }, 0)
  changing.take(0, 1)
  check("a limit holds until it changes", changing.fits(4_999, 1))
  check("a limit that fell holds at once", !changing.fits(5_000, 1))

  const filling = bucket({ ...spec, limit: 60, burst: 2 }, 0)
  filling.take(0, 2)
  check("an empty bucket says when one fits", filling.next(0, 1) === 1_000)
  check("an empty bucket refuses", !filling.fits(999, 1))
  check("a bucket fills at its rate", filling.fits(1_000, 1))
  check("a bucket holds its burst at most", filling.announced(60_000).remaining === 2)

  const penal = bucket({ ...spec, limit: 60, burst: 2, penal: true }, 0)
  penal.take(0, 2)
  for (let i = 0; i < 9; i++) penal.refused(0, 1)
  check("refusals sink a penal bucket to minus its burst", penal.next(0, 1) === 3_000)

  reset("check")
  const seen = []
  setTimeout(() => seen.push(["b", now()]), 20)
  setTimeout(() => seen.push(["a", now()]), 10)
  clearTimeout(setTimeout(() => seen.push(["never", now()]), 15))
  setTimeout(() => Promise.resolve().then(() => setTimeout(() => seen.push(["c", now()]), 5)), 20)
  const from = now()
  await pass(from + 30, () => false)
  const order = seen.map(([name, at]) => `${name}${at - from}`).join(" ")
  check(`timers run in order, each at its instant: ${order}`, order === "a10 b20 c25" && now() === from + 30)

  for (const scenario of scenarios) {
    const outcome = await run(scenario, "1", { name: "oracle" })
    if (scenario.limits.every(({ kind }) => kind !== "concurrency")) {
      const declared = await run(scenario, "1", { name: "oracle", mode: "as declared" })
      const fits = replay(scenario, declared.log)
      check(`${scenario.name}: what keeps to the limits as declared is never refused`, fits)
    }
    check(`${scenario.name}: the oracle wastes nothing`, outcome.log.every(({ kind }) => kind === "ok"))
    const ids = new Set(outcome.log.map(({ call }) => call.id))
    check(`${scenario.name}: the oracle asks once per call`, ids.size === outcome.log.length)
    const late = outcome.results.some(({ latency, ok }) => ok && latency > 60_000)
    check(`${scenario.name}: the oracle is in time`, !late)
    const impossible = outcome.results.some(({ latency, ok }, id) => ok && latency < outcome.calls[id].service - 0.01)
    check(`${scenario.name}: nobody is quicker than the provider`, !impossible)
    const offered = planOf(scenario, "1")
    check(`${scenario.name}: calls come in order`, offered.every(({ at }, i) => i === 0 || at >= offered[i - 1].at))
  }

  const { naive, pool, sdk } = await import("./contestants.mjs")
  const tiny = scenarios.find(({ name }) => name === "tiny")
  const oracle = measure(tiny, await run(tiny, "1", { name: "oracle" }))
  for (
    const entrant of [
      { name: "naive", contestant: naive },
      { name: "sdk", contestant: sdk },
      ...tiny.modes.map((mode) => ({ name: "pool", mode, contestant: pool }))
    ]
  ) {
    const who = entrant.mode === undefined ? entrant.name : `${entrant.name}, ${entrant.mode}`
    const one = await run(tiny, "1", entrant)
    settleFor(5)
    const other = await run(tiny, "1", entrant)
    settleFor(2)
    const shape = ({ log, results }) => JSON.stringify([results, log.map(({ at, key, kind }) => [at, key, kind])])
    check(`${who}: the same seed gives the same run, however long the loop settles`, shape(one) === shape(other))
    const numbers = measure(tiny, one)
    check(`${who}: every call settled`, numbers.lost["never settled"] === undefined)
    check(`${who}: as many answers upstream as answered calls`,
      one.log.filter(({ kind }) => kind === "ok").length >= one.results.filter(({ ok }) => ok).length)
    check(`${who}: answers no more than the oracle`, numbers.answered <= oracle.answered + 2)
    const accepted = new Map()
    for (const { at, key, kind } of one.log) {
      if (kind === "ok") accepted.set(key, [...accepted.get(key) ?? [], at])
    }
    check(`${who}: no key serves more than two windows' worth in one`,
      [...accepted.values()].every((instants) => instants.every((at, i) => !(instants[i + 60] < at + 60_000))))
  }
  return failures
}

/** Would the provider have taken all of these? */
const replay = (scenario, log) => {
  const rules = makeRules(scenario, "1", epoch)
  const events = log.flatMap((entry) => [
    { at: entry.at, run: () => rules.fits(entry.key, entry.call, entry.at) && take(entry) },
    { at: entry.done, run: () => rules.settle(entry.key, entry.call, entry.done, entry.at) ?? true }
  ])
  const take = ({ at, call, key }) => rules.take(key, call, at) ?? true
  return events.sort((a, b) => a.at - b.at).every(({ run }) => run())
}
