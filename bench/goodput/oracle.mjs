/**
 * What could be had by somebody who knows everything in advance: every limit with its phase and its changes, every
 * fault, and how long each answer takes. First come, first served; who cannot be answered in time is not begun. It never
 * asks for what will be refused. As declared, it keeps to the limits that people declare as well, whenever windows may
 * begin: no pool that goes by declared limits alone can do better.
 */
import { makeRules, networkMillis } from "./upstream.mjs"

export const oracle = ({ calls, deadline, asDeclared, scenario, seed, start }) => {
  const rules = makeRules(scenario, seed, start, asDeclared)
  const results = calls.map(() => ({ ok: false, latency: undefined, error: "the oracle: cannot be in time" }))
  const log = []
  const keys = scenario.keys.map((_, key) => key)
  const waiting = new Map()
  const ends = []
  let arrived = 0
  let now = start
  // Requests in flight when their answer ends give tokens back.
  const settleUntil = (instant) => {
    ends.sort((a, b) => a.at - b.at)
    while (ends.length > 0 && ends[0].at <= instant) {
      const { at, call, key, takenAt } = ends.shift()
      rules.settle(key, call, at, takenAt)
    }
  }
  /** Among the keys that would serve now: a quick one, and of these the one whose capacity is lost soonest. */
  const pick = (call) => {
    let best
    let bestRank
    for (const key of keys) {
      if (rules.certainFault(key, call.model, now) !== undefined || !rules.fits(key, call, now)) continue
      const lost = rules.limitersOf(key, call.model)
        .reduce((at, limiter) => Math.min(at, limiter.wastedAt(now)), Infinity)
      const rank = [rules.serviceOf(key, call), lost, log.length === 0 ? key : (key - log.length) % keys.length]
      if (best === undefined || less(rank, bestRank)) {
        best = key
        bestRank = rank
      }
    }
    return best
  }
  const nextFor = (call) => {
    let at = Infinity
    for (const key of keys) {
      const fault = rules.certainFault(key, call.model, now)
      const free = fault === undefined ? rules.next(key, call, now) : rules.faultEnds(fault, now)
      at = Math.min(at, Math.max(free, now + 1e-3))
    }
    return at
  }
  const serve = () => {
    for (const line of waiting.values()) {
      while (line.length > 0) {
        const call = line[0]
        const quickest = Math.min(...keys.map((key) => rules.serviceOf(key, call)))
        if (now - networkMillis + quickest > start + call.at + deadline) {
          line.shift()
          continue
        }
        const key = pick(call)
        if (key === undefined) break
        line.shift()
        rules.take(key, call, now)
        const service = rules.serviceOf(key, call)
        const latency = now - networkMillis + service - (start + call.at)
        results[call.id] = { ok: true, latency, error: undefined }
        log.push({
          key,
          call,
          sent: now - networkMillis,
          at: now,
          kind: "ok",
          done: now - networkMillis + service
        })
        ends.push({ at: now - networkMillis + service, key, call, takenAt: now })
      }
    }
  }
  for (;;) {
    settleUntil(now)
    while (arrived < calls.length && start + calls[arrived].at + networkMillis <= now) {
      const call = calls[arrived++]
      if (!waiting.has(call.model)) waiting.set(call.model, [])
      waiting.get(call.model).push(call)
    }
    serve()
    let next = arrived < calls.length ? start + calls[arrived].at + networkMillis : Infinity
    for (const line of waiting.values()) if (line.length > 0) next = Math.min(next, nextFor(line[0]))
    const blocked = [...waiting.values()].some((line) => line.length > 0)
    if (blocked && ends.length > 0) next = Math.min(next, ends.reduce((at, end) => Math.min(at, end.at), Infinity))
    if (!Number.isFinite(next)) break
    now = Math.max(now, next)
  }
  return { results, log }
}

const less = (a, b) => {
  for (const [i, value] of a.entries()) if (value !== b[i]) return value < b[i]
  return false
}
