/**
 * Time that passes only when nothing is left to do. Imported before anything else, it replaces the timers and clocks of
 * the platform, so that the real SDK and the real default Clock of Effect run unchanged, minutes within milliseconds,
 * and the same seed gives the same run.
 */
import { seeded } from "./seeded.mjs"

const realImmediate = globalThis.setImmediate
const RealDate = globalThis.Date
const realNow = performance.now.bind(performance)

/** Where each run begins: a whole second, so that dates in headers are exact there. */
export const epoch = 1_760_000_000_000

let clock = epoch
let sequence = 0
/** A binary heap by instant, the earlier asked first. */
const timers = []
const before = (a, b) => a.at < b.at || (a.at === b.at && a.sequence < b.sequence)

const push = (timer) => {
  let at = timers.push(timer) - 1
  while (at > 0) {
    const parent = (at - 1) >> 1
    if (!before(timer, timers[parent])) break
    timers[at] = timers[parent]
    at = parent
  }
  timers[at] = timer
}

const pop = () => {
  const first = timers[0]
  const last = timers.pop()
  if (timers.length > 0) {
    let at = 0
    for (;;) {
      let child = 2 * at + 1
      if (child >= timers.length) break
      if (child + 1 < timers.length && before(timers[child + 1], timers[child])) child++
      if (!before(timers[child], last)) break
      timers[at] = timers[child]
      at = child
    }
    timers[at] = last
  }
  return first
}

class Timer {
  constructor(run, delay, every) {
    this.run = run
    this.every = every
    this.cancelled = false
    this.start(delay)
  }
  start(delay) {
    // As the platform does: what is no time at all, or too long for a timer, is no wait.
    const wait = delay > 0 && delay <= 2 ** 31 - 1 ? delay : 0
    this.at = clock + wait
    this.sequence = sequence++
    push(this)
  }
  ref() {
    return this
  }
  unref() {
    return this
  }
  hasRef() {
    return true
  }
}

const cancel = (timer) => {
  if (timer instanceof Timer) timer.cancelled = true
}

globalThis.setTimeout = (run, delay = 0, ...args) => new Timer(() => run(...args), Number(delay), undefined)
globalThis.setInterval = (run, delay = 0, ...args) =>
  new Timer(() => run(...args), Number(delay), Math.max(1, Number(delay)))
globalThis.clearTimeout = cancel
globalThis.clearInterval = cancel
globalThis.Date = class extends RealDate {
  constructor(...args) {
    if (args.length === 0) super(clock)
    else super(...args)
  }
  static now() {
    return Math.floor(clock)
  }
}
performance.now = () => clock - epoch
const elapsedNanos = () => BigInt(Math.round((clock - epoch) * 1e6))
process.hrtime = Object.assign(
  () => {
    const nanos = elapsedNanos()
    return [Number(nanos / 1_000_000_000n), Number(nanos % 1_000_000_000n)]
  },
  { bigint: elapsedNanos }
)

/** The virtual time, in milliseconds since the epoch. */
export const now = () => clock

/** The time on the wall, in milliseconds, to tell how long the bench itself takes. */
export const wall = realNow

/** How many turns of the platform's loop without a timer count as rest; more must change nothing. */
let turns = 2
export const settleFor = (count) => {
  turns = count
}

const settled = async () => {
  for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => realImmediate(resolve))
}

/** Forgets all timers and starts again, at the epoch, with `Math.random` seeded. */
export const reset = (seed) => {
  timers.length = 0
  clock = epoch
  Math.random = seeded(seed)
}

/** Lets time pass, from one timer to the next, until something holds or `until` is reached. */
export const pass = async (until, done) => {
  for (;;) {
    await settled()
    if (done()) return
    while (timers.length > 0 && timers[0].cancelled) pop()
    if (timers.length === 0 || timers[0].at > until) {
      clock = Math.max(clock, until)
      return
    }
    const timer = pop()
    clock = Math.max(clock, timer.at)
    if (timer.every !== undefined) timer.start(timer.every)
    timer.run()
  }
}
