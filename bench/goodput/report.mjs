/** Tables for people. */
import { epoch } from "./virtual-time.mjs"

const table = (rows) => {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => [...row[column]].length)))
  for (const row of rows) {
    console.log("  " + row.map((cell, i) => i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i])).join("  "))
  }
}

const time = (millis) =>
  millis === undefined ? "–" : millis < 1_000 ? `${millis.toFixed(0)} ms` : `${(millis / 1_000).toFixed(1)} s`
const percent = (value) => value.toFixed(1)
const times = (value, of) => value === undefined || !of ? "–" : `×${(value / of).toFixed(2)}`
const lostOf = (lost) =>
  Object.entries(lost).sort(([, a], [, b]) => b - a).map(([error, n]) => `${Number(n.toFixed(1))} ${error}`)
    .join(", ") || "–"

export const printScenario = (scenario, rows, oracle) => {
  console.log(`\n${scenario.name}: ${scenario.about}`)
  const head = ["", "≤60 s %", "of oracle", "p50", "", "p99", "", "wasted/100", "bars"]
  table([
    head,
    ...rows.map((row) => [
      row.contestant + (row.mode === undefined ? "" : `, ${row.mode}`),
      percent(row.answered),
      oracle.answered === 0 ? "–" : percent(100 * row.answered / oracle.answered),
      time(row.p50),
      times(row.p50, oracle.p50),
      time(row.p99),
      times(row.p99, oracle.p99),
      row.wastedPer100.toFixed(1),
      row.bars === undefined ? "" : !Object.values(row.bars).includes(false) ? "✔" : row.passesAsDeclared ? "✘ (✔)" : "✘"
    ])
  ])
  for (const row of rows) {
    const who = row.contestant + (row.mode === undefined ? "" : `, ${row.mode}`)
    if (Object.keys(row.lost).length > 0) {
      console.log(`    ${who} lost: ${lostOf(row.lost)}; errors after ${time(row.errorAfter)} (median)`)
    }
    if (row.outage !== undefined) {
      const { busiest, during, first, herd } = row.outage
      console.log(
        `    ${who}: ${during} calls during the outage, first success ${time(first)} after it, ` +
          `busiest 200 ms ${busiest} (×${herd.toFixed(1)} of the offered)`
      )
    }
    const missed = Object.entries(row.bars ?? {}).filter(([, passed]) => !passed).map(([bar]) => bar)
    if (missed.length > 0) console.log(`    ✘ ${who}: ${missed.join("; ")}`)
  }
}

export const printSummary = (report, missed, seeds) => {
  const pools = report.flatMap(({ rows }) => rows.filter(({ bars }) => bars !== undefined)).length
  if (pools === 0) return
  console.log(`\n${pools - missed.length} of ${pools} rows of the pool pass all bars (${seeds} seeds, medians)`)
  const byBar = new Map()
  for (const { row, scenario } of missed) {
    for (const [bar, passed] of Object.entries(row.bars)) {
      if (passed) continue
      const name = bar.startsWith("wasted") ? "wasted" : bar
      byBar.set(name, [...byBar.get(name) ?? [], `${scenario} (${row.mode})`])
    }
  }
  for (const [bar, where] of byBar) console.log(`  ✘ ${bar}: ${where.join(", ")}`)
  const asDeclared = missed.filter(({ row }) => row.passesAsDeclared).map(({ scenario }) => scenario)
  if (asDeclared.length > 0) {
    console.log(`  (✔) beside the oracle that keeps to what is declared, these pass: ${asDeclared.join(", ")}`)
  }
}

/** Every five seconds: what arrived, what was sent, what it became, who is waiting. */
export const printTrace = (scenario, { mode, name }, seed, { calls, log, results }) => {
  console.log(`\ntrace of ${scenario.name}, seed ${seed}: ${name}${mode === undefined ? "" : `, ${mode}`}`)
  const step = 5_000
  const slices = []
  const slice = (at) => {
    const i = Math.max(0, Math.floor(at / step))
    while (slices.length <= i) slices.push({ arrived: 0, answered: 0, lost: {}, kinds: {}, keys: {} })
    return slices[i]
  }
  for (const call of calls) {
    slice(call.at).arrived++
    const { error, latency, ok } = results[call.id]
    if (latency === undefined) continue
    const end = slice(call.at + latency)
    if (ok) end.answered++
    else end.lost[error] = (end.lost[error] ?? 0) + 1
  }
  for (const { at, key, kind, sent } of log) {
    const { keys, kinds } = slice((at ?? sent) - epoch)
    kinds[kind] = (kinds[kind] ?? 0) + 1
    keys[key] = (keys[key] ?? 0) + (kind === "ok" ? 1 : 0)
  }
  let open = 0
  const words = (counts) => Object.entries(counts).map(([word, n]) => `${word} ${n}`).join(" ") || "–"
  table([
    ["from", "arrived", "answered", "open", "upstream", "ok by key", "lost"],
    ...slices.map(({ answered, arrived, keys, kinds, lost }, i) => {
      open += arrived - answered - Object.values(lost).reduce((sum, n) => sum + n, 0)
      const byKey = scenario.keys.map((_, key) => keys[key] ?? 0).join("/")
      return [`${i * step / 1_000} s`, String(arrived), String(answered), String(open), words(kinds), byKey, words(lost)]
    })
  ])
}
