/**
 * How much of what is asked of it the pool gets answered, beside an oracle, a naive client and the SDK's own retries:
 * seeded arrivals, simulated providers, virtual time, everything else real. Nothing is asserted, unless `--strict`.
 *
 *   npm run bench:goodput                                     all scenarios
 *   npm run bench:goodput -- --scenario over120,outage        some of them
 *   npm run bench:goodput -- --contestant oracle,pool         some contestants (oracle, naive, sdk, pool)
 *   npm run bench:goodput -- --mode declared                  one state of knowledge (nothing, declared, announced, …)
 *   npm run bench:goodput -- --seeds 5                        medians of five seeds
 *   npm run bench:goodput -- --jobs 2                         as many processes at once
 *   npm run bench:goodput -- --json                           the numbers, for programs: a line per scenario
 *   npm run bench:goodput -- --trace                          what happened, every five seconds
 *   npm run bench:goodput -- --self-check                     is the simulation itself right?
 *   npm run bench:goodput -- --strict                         exit with 1 if a bar is missed
 */
import { settleFor, wall } from "./virtual-time.mjs"
import { execFile } from "node:child_process"
import { fileURLToPath } from "node:url"
import { promisify } from "node:util"
import { barsOf, measure, together } from "./measures.mjs"
import { printScenario, printSummary, printTrace } from "./report.mjs"
import { run } from "./run.mjs"
import { scenarios } from "./scenarios.mjs"
import { selfCheck } from "./self-check.mjs"

const flags = new Set(["self-check", "json", "trace", "strict"])
const settings = new Set(["scenario", "contestant", "mode", "seeds", "settle", "jobs"])
const given = new Map()
for (let i = 2; i < process.argv.length; i++) {
  const name = process.argv[i].replace(/^--/, "")
  if (flags.has(name)) given.set(name, "true")
  else if (settings.has(name) && process.argv[i + 1] !== undefined) given.set(name, process.argv[++i])
  else {
    console.error(`unknown: ${process.argv[i]}; there are --${[...settings, ...flags].join(", --")}`)
    process.exit(2)
  }
}
const listed = (name) => given.get(name)?.split(",")
const unknown = (name, values) => {
  for (const value of listed(name) ?? []) {
    if (!values.includes(value)) {
      console.error(`no ${name} is called ${value}; there are ${values.join(", ")}`)
      process.exit(2)
    }
  }
}
const names = ["oracle", "naive", "sdk", "pool"]
unknown("scenario", scenarios.map(({ name }) => name))
unknown("contestant", names)
const wanted = listed("contestant") ?? names
const seeds = Array.from({ length: Number(given.get("seeds") ?? 1) }, (_, i) => String(i + 1))
// The quick check is for people in a hurry; it says nothing that the others do not.
const chosen = scenarios.filter(({ name }) => listed("scenario")?.includes(name) ?? name !== "tiny")
if (given.has("settle")) settleFor(Number(given.get("settle")))

if (given.has("self-check")) {
  const failures = await selfCheck()
  for (const failure of failures) console.error(`✘ ${failure}`)
  console.log(failures.length === 0 ? "self-check: all is well" : `self-check: ${failures.length} failed`)
  process.exit(failures.length === 0 ? 0 : 1)
}

const startedAt = wall()
const report = []
/** One scenario in a process of its own; the table is the same, since nothing passes from one to the next. */
const apart = async (scenario) => {
  const args = ["--json", "--scenario", scenario.name]
  for (const name of ["contestant", "mode", "seeds", "settle"]) if (given.has(name)) args.push(`--${name}`, given.get(name))
  const { stdout } = await promisify(execFile)(
    process.execPath,
    [...process.execArgv, fileURLToPath(import.meta.url), ...args],
    { maxBuffer: 2 ** 26 }
  )
  return JSON.parse(stdout)
}
const here = async (scenario) => {
  const contestants = await import("./contestants.mjs")
  const entrants = [
    { name: "oracle" },
    ...(scenario.modes.includes("declared") ? [{ name: "oracle", mode: "as declared" }] : []),
    ...["naive", "sdk"].filter((name) => wanted.includes(name))
      .map((name) => ({ name, contestant: contestants[name] })),
    ...(wanted.includes("pool") ? scenario.modes : [])
      .filter((mode) => listed("mode")?.includes(mode) ?? true)
      .map((mode) => ({ name: "pool", mode, contestant: contestants.pool }))
  ]
  const rows = []
  for (const entrant of entrants) {
    const measured = []
    for (const seed of seeds) {
      const outcome = await run(scenario, seed, entrant)
      measured.push(measure(scenario, outcome))
      if (given.has("trace")) printTrace(scenario, entrant, seed, outcome)
    }
    rows.push({ contestant: entrant.name, mode: entrant.mode, ...together(measured) })
  }
  const beside = Object.fromEntries(["oracle", "naive", "sdk"].map((name) => [
    name,
    rows.find(({ contestant }) => contestant === name)
  ]))
  const asDeclared = rows.find(({ mode }) => mode === "as declared")
  for (const row of rows) {
    if (row.contestant !== "pool") continue
    row.bars = barsOf(scenario, row.mode, row, beside)
    if (row.mode !== "declared") continue
    row.passesAsDeclared = !Object.values(barsOf(scenario, row.mode, row, { ...beside, oracle: asDeclared })).includes(false)
  }
  return { scenario: scenario.name, about: scenario.about, rows }
}

const jobs = Number(given.get("jobs") ?? 1)
const running = []
for (const [i, scenario] of chosen.entries()) {
  // With several jobs, as many are begun ahead of the one that is printed next.
  while (jobs > 1 && running.length < chosen.length && running.length < i + jobs) {
    running.push(apart(chosen[running.length]))
  }
  const done = await (running[i] ?? here(scenario))
  report.push(done)
  if (given.has("json")) console.log(JSON.stringify(done))
  else printScenario(scenario, done.rows, done.rows[0])
}
const missed = report.flatMap(({ rows, scenario }) =>
  rows.filter(({ bars }) => bars !== undefined && Object.values(bars).includes(false)).map((row) => ({ scenario, row }))
)
if (!given.has("json")) printSummary(report, missed, seeds.length)
console.error(`${((wall() - startedAt) / 1_000).toFixed(0)} s`)
process.exitCode = given.has("strict") && missed.length > 0 ? 1 : 0
