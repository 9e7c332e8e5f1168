/** Providers that limit requests, and callers in line for keys that obey what is known of their limits; in pure time. */
import * as RateLimit from "../../src/RateLimit.js"

/** Numbers in [0, 1), the same for the same seed (mulberry32). */
export const seeded = (seed: number): () => number => {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

export interface Answer {
  readonly ok: boolean
  readonly waitMillis: number
  readonly limit: number
  readonly remaining: number
  readonly resetMillis: number
}

/** Asked in order of time. */
export type Provider = (now: number) => Answer

/** So many per minute, in windows that begin `phase` before the full minute. */
export const fixedWindow = (perMinute: number, phase: number): Provider => {
  let window = -1
  let used = 0
  return (now) => {
    const current = Math.floor((now + phase) / 60_000)
    if (current !== window) used = 0
    window = current
    const left = (current + 1) * 60_000 - phase - now
    const ok = used < perMinute
    if (ok) used++
    return { ok, waitMillis: left, limit: perMinute, remaining: perMinute - used, resetMillis: left }
  }
}

/** So many in any 60 seconds. */
export const slidingWindow = (perMinute: number): Provider => {
  let log: ReadonlyArray<number> = []
  return (now) => {
    log = log.filter((at) => at > now - 60_000)
    const ok = log.length < perMinute
    if (ok) log = [...log, now]
    const left = Math.max(0, (log[0] ?? now) + 60_000 - now)
    return { ok, waitMillis: left, limit: perMinute, remaining: perMinute - log.length, resetMillis: left }
  }
}

/**
 * A bucket that fills at so many per minute. `penal`: refusals take from it too, down to minus its size; `forgetful`: and
 * the wait that is told does not know of that.
 */
export const bucket = (perMinute: number, burst: number, penal: boolean | "forgetful" = false): Provider => {
  const rate = perMinute / 60_000
  let level = burst
  let at = 0
  return (now) => {
    level = Math.min(burst, level + (now - at) * rate)
    at = now
    const ok = level >= 1
    const waitMillis = Math.max(0, (1 - level) / rate)
    if (ok) level -= 1
    else if (penal !== false) level = Math.max(-burst, level - 1)
    return {
      ok,
      waitMillis: penal === "forgetful" ? waitMillis : Math.max(0, (1 - level) / rate),
      limit: burst,
      remaining: Math.max(0, Math.floor(level)),
      resetMillis: (burst - level) / rate
    }
  }
}

export interface Scenario {
  readonly providers: ReadonlyArray<Provider>
  /** What is known at first. */
  readonly limits: RateLimit.RateLimit
  readonly announces: boolean
  /** How a refusal tells its wait. */
  readonly tells: "millis" | "seconds"
  readonly perMinute: number
  readonly seconds: number
  readonly seed: number
}

export interface Report {
  readonly offered: number
  /** Answered within 60 seconds. */
  readonly inTime: number
  readonly refused: number
}

/** Poisson arrivals, first come first served, over keys in turn; calls take about 0.8 s, refusals 50 ms. */
export const simulate = ({ announces, limits, perMinute, providers, seconds, seed, tells }: Scenario): Report => {
  const random = seeded(seed)
  const keys = providers.map((ask) => ({ ask, limits, bench: 0 }))
  const events: Array<{ readonly at: number; readonly run: (now: number) => void }> = []
  const at = (instant: number, run: (now: number) => void) => {
    let low = 0
    for (let high = events.length; low < high;) {
      const middle = (low + high) >>> 1
      if ((events[middle]?.at ?? Infinity) <= instant) low = middle + 1
      else high = middle
    }
    events.splice(low, 0, { at: instant, run })
  }
  const queue: Array<number> = []
  let turn = 0
  let wake = Infinity
  let inTime = 0
  let refused = 0
  const usual = 60_000 * providers.length / perMinute
  const opens = (key: typeof keys[number], now: number): number => {
    const until = RateLimit.gate(key.limits, undefined, now)?.until ?? now
    return Math.max(until, key.bench, now)
  }
  const serve = (now: number): void => {
    while (queue[0] !== undefined) {
      const order = keys.map((_, i) => keys[(turn + i) % keys.length]).filter((key) => key !== undefined)
      const key = order.find((key) => opens(key, now) <= now)
      if (key === undefined) {
        const next = Math.min(...keys.map((key) => opens(key, now)))
        if (next < wake) {
          wake = next
          at(next, (now) => {
            wake = Infinity
            serve(now)
          })
        }
        return
      }
      turn = keys.indexOf(key) + 1
      send(queue.shift() ?? now, key, now)
    }
  }
  const send = (arrived: number, key: typeof keys[number], now: number): void => {
    const [reserved, reservation] = RateLimit.reserve(key.limits, {}, now)
    key.limits = reserved
    const answer = key.ask(now + 5)
    const normal = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
    at(Math.floor(now + (answer.ok ? 5 + 800 * Math.exp(0.5 * normal) : 50)), (now) => {
      key.limits = RateLimit.answered(key.limits, now)
      if (announces) {
        key.limits = RateLimit.announced(key.limits, reservation.leased, [{ name: "requests", ...answer }], now)
      }
      if (answer.ok) {
        key.limits = RateLimit.accepted(key.limits, reservation, now)
        if (now - arrived <= 60_000) inTime++
      } else {
        refused++
        const wait = tells === "millis" ? Math.ceil(answer.waitMillis) : Math.ceil(answer.waitMillis / 1000) * 1000
        key.limits = RateLimit.refused(key.limits, "requests", reservation, wait, now, usual)
        key.bench = Math.max(key.bench, now + wait + 20)
        queue.unshift(arrived)
      }
      key.limits = RateLimit.spent(key.limits, reservation, undefined, now)
      serve(now)
    })
  }
  let offered = 0
  for (let now = 0; now < seconds * 1000; now += -Math.log(1 - random()) * 60_000 / perMinute) {
    offered++
    at(Math.floor(now), (now) => {
      queue.push(now)
      serve(now)
    })
  }
  for (let event = events.shift(); event !== undefined; event = events.shift()) event.run(event.at)
  return { offered, inTime, refused }
}
