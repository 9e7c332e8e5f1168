/** What a run was like, in numbers, and which bars it passes. */
import { epoch } from "./virtual-time.mjs"
import { deadline } from "./run.mjs"

const percentile = (sorted, share) =>
  sorted.length === 0 ? undefined : sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]

export const median = (values) => {
  const known = values.filter((value) => value !== undefined).sort((a, b) => a - b)
  return known.length === 0 ? undefined : known[Math.floor((known.length - 1) / 2)]
}

export const measure = (scenario, { calls, log, results }) => {
  const offered = calls.length
  const inTime = results.filter(({ latency, ok }) => ok && latency <= deadline)
  const latencies = results.filter(({ ok }) => ok).map(({ latency }) => latency).sort((a, b) => a - b)
  const lost = {}
  for (const { error, ok } of results) if (!ok) lost[error] = (lost[error] ?? 0) + 1
  const late = results.filter(({ latency, ok }) => ok && latency > deadline).length
  if (late > 0) lost["answered too late"] = late
  const failures = results.filter(({ latency, ok }) => !ok && latency !== undefined).map(({ latency }) => latency)
  const wasted = log.filter(({ kind }) => kind !== "ok").length
  return {
    offered,
    answered: 100 * inTime.length / offered,
    p50: percentile(latencies, 0.5),
    p99: percentile(latencies, 0.99),
    wasted,
    wastedPer100: 100 * wasted / offered,
    sent: log.length,
    errorAfter: median(failures),
    lost,
    ...(scenario.outage === undefined ? {} : { outage: ofOutage(scenario, calls, log) })
  }
}

const ofOutage = ({ outage }, calls, log) => {
  const from = epoch + outage.from * 1_000
  const to = epoch + outage.to * 1_000
  // By when they reach the provider: that is what it sees.
  const at = (entry) => entry.at ?? entry.sent
  const during = log.filter((entry) => at(entry) >= from && at(entry) < to).length
  const first = log
    .filter((entry) => entry.kind === "ok" && at(entry) >= to)
    .reduce((soonest, entry) => Math.min(soonest, at(entry)), Infinity)
  const span = calls[calls.length - 1].at - calls[0].at
  const offered = 200 * calls.length / span
  const busiest = busiestSlice(log.map(at).filter((instant) => instant >= to && instant <= to + 20_000))
  return {
    during,
    first: Number.isFinite(first) ? first - to : undefined,
    busiest,
    offered,
    herd: busiest / offered,
    // Few calls come in clusters by themselves.
    byChance: busiestSlice(calls.map((call) => call.at)) / offered
  }
}

const busiestSlice = (instants) => {
  const slices = new Map()
  for (const instant of instants) {
    const slice = Math.floor(instant / 200)
    slices.set(slice, (slices.get(slice) ?? 0) + 1)
  }
  return Math.max(0, ...slices.values())
}

/**
 * The bars. With `nothing` known a call is spent on each limit of each key that is learned; a faulty key costs four, or
 * what its scenario says is nobody's fault.
 */
export const barsOf = (scenario, mode, row, { naive, oracle, sdk }) => {
  const limits = scenario.keys.length * scenario.limits.length
  const knows = mode === "declared" || mode.startsWith("announced")
  const learned = scenario.learned ?? (knows ? 0 : limits)
  const allowed = 0.02 * row.offered + learned + 4 * (scenario.faulty ?? 0) +
    (scenario.unavoidable ?? 0) * row.offered
  const bars = {
    "answered ≥ 98 % of the oracle's": row.answered >= 0.98 * oracle.answered,
    "answered ≥ naive and SDK": row.answered >= Math.max(naive?.answered ?? 0, sdk?.answered ?? 0) - 1e-9,
    [`wasted ≤ ${Math.floor(allowed)} calls`]: row.wasted <= allowed
  }
  if (knows && oracle.p99 !== undefined) {
    bars["p99 ≤ 1.15 × the oracle's"] = row.p99 !== undefined && row.p99 <= 1.15 * oracle.p99
  }
  if (oracle.answered === 0) bars["errors at once"] = row.errorAfter !== undefined && row.errorAfter <= 100
  if (row.outage !== undefined) {
    bars["first success < 1 s after recovery"] = row.outage.first !== undefined && row.outage.first < 1_000
    bars["no 200 ms slice above 3 × the offered"] = row.outage.herd <= Math.max(3, row.outage.byChance)
  }
  return bars
}

/** Of several seeds: medians, and the lost of all. */
export const together = (rows) => {
  const number = (name) => median(rows.map((row) => row[name]))
  const lost = {}
  for (const row of rows) for (const [error, n] of Object.entries(row.lost)) lost[error] = (lost[error] ?? 0) + n
  const outages = rows.flatMap(({ outage }) => (outage === undefined ? [] : [outage]))
  return {
    ...Object.fromEntries(
      ["offered", "answered", "p50", "p99", "wasted", "wastedPer100", "sent", "errorAfter"]
        .map((name) => [name, number(name)])
    ),
    lost: Object.fromEntries(Object.entries(lost).map(([error, n]) => [error, n / rows.length])),
    ...(outages.length === 0 ? {} : {
      outage: Object.fromEntries(
        Object.keys(outages[0]).map((name) => [name, median(outages.map((outage) => outage[name]))])
      )
    })
  }
}
