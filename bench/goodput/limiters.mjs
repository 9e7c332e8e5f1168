/**
 * The limiters of providers. Each answers when a request of some cost fits, takes it, hears of what was refused, gives
 * back what was estimated too high, and says what a provider announces of it. Times in milliseconds.
 */

/** The limit in force at an instant, where it may change in mid-run. */
const limitAt = ({ changes = [], limit }, now) =>
  changes.reduce((current, change) => (change.at <= now ? change.limit : current), limit)

const nextChange = ({ changes = [] }, now) => changes.find(({ at }) => at > now)?.at ?? Infinity

/** Windows of fixed length, which begin at some phase that nobody is told. */
export const fixedWindow = (spec, phase) => {
  const { per } = spec
  let index
  let used = 0
  const turn = (now) => {
    const current = Math.floor((now - phase) / per)
    if (current !== index) {
      index = current
      used = 0
    }
  }
  const endOf = (now) => (Math.floor((now - phase) / per) + 1) * per + phase
  const fits = (now, cost) => {
    turn(now)
    // A request above the limit passes in an unused window, or it would never.
    return used + cost <= limitAt(spec, now) || (used === 0 && cost > limitAt(spec, now))
  }
  return {
    spec,
    fits,
    take: (now, cost) => {
      turn(now)
      used += cost
    },
    refused: () => {},
    giveBack: (now, cost, takenAt) => {
      turn(now)
      if (Math.floor((takenAt - phase) / per) === index) used = Math.max(0, used - cost)
    },
    next: (now, cost) => {
      if (fits(now, cost)) return now
      return Math.min(endOf(now), nextChange(spec, now))
    },
    /** When capacity that is there now will be lost or useless. */
    wastedAt: (now) => endOf(now),
    announced: (now) => {
      turn(now)
      const limit = limitAt(spec, now)
      return { limit, remaining: Math.max(0, limit - used), fullIn: endOf(now) - now }
    }
  }
}

/** A bucket that fills evenly up to its burst; where refusals count, they are taken too, down to minus the burst. */
export const bucket = (spec, start) => {
  const { burst, penal = false, per } = spec
  let level = burst
  let at = start
  const fill = (now) => {
    while (at < now) {
      const to = Math.min(now, nextChange(spec, at))
      level = Math.min(burst, level + (to - at) * limitAt(spec, at) / per)
      at = to
    }
  }
  // What is filled in small steps may miss a whole by a rounding error.
  const enough = (cost) => level + 1e-6 >= Math.min(cost, burst)
  const until = (now, wanted) => {
    let reached = level
    for (let from = now;;) {
      const rate = limitAt(spec, from) / per
      const to = nextChange(spec, from)
      if (reached + (to - from) * rate >= wanted) return from + (wanted - reached) / rate
      reached += (to - from) * rate
      from = to
    }
  }
  return {
    spec,
    fits: (now, cost) => {
      fill(now)
      return enough(cost)
    },
    take: (now, cost) => {
      fill(now)
      level -= cost
    },
    refused: (now, cost) => {
      fill(now)
      if (penal) level = Math.max(-burst, level - cost)
    },
    giveBack: (now, cost) => {
      fill(now)
      level = Math.min(burst, level + cost)
    },
    next: (now, cost) => {
      fill(now)
      return enough(cost) ? now : until(now, Math.min(cost, burst))
    },
    wastedAt: (now) => {
      fill(now)
      return until(now, burst)
    },
    announced: (now) => {
      fill(now)
      // The size of the bucket is no part of what providers announce: they name the limit.
      const limit = limitAt(spec, now)
      return { limit, remaining: Math.max(0, Math.floor(level)), fullIn: until(now, burst) - now }
    }
  }
}

/** Whatever the phase of a window is, this keeps within its limit: it counts what was taken in any time of its length. */
export const slidingWindow = (spec) => {
  const { per } = spec
  let taken = []
  let used = 0
  const forget = (now) => {
    while (taken.length > 0 && taken[0].at + per <= now) used -= taken.shift().cost
  }
  const fits = (now, cost) => {
    forget(now)
    return used + cost <= limitAt(spec, now) || used === 0
  }
  return {
    spec,
    fits,
    take: (now, cost) => {
      forget(now)
      taken.push({ at: now, cost })
      used += cost
    },
    refused: () => {},
    giveBack: (now, cost, takenAt) => {
      forget(now)
      const entry = taken.find((one) => one.at === takenAt && one.cost >= cost)
      if (entry === undefined) return
      entry.cost -= cost
      used -= cost
    },
    next: (now, cost) => {
      if (fits(now, cost)) return now
      let free = limitAt(spec, now) - used
      for (const entry of taken) {
        free += entry.cost
        if (free >= cost) return Math.min(entry.at + per, nextChange(spec, now))
      }
      return Math.min(taken[taken.length - 1].at + per, nextChange(spec, now))
    },
    wastedAt: () => Infinity
  }
}

/** So many in flight at once: a place is free again when an answer has ended, and nobody can tell when that is. */
export const concurrency = (spec) => {
  let inFlight = 0
  const fits = () => inFlight < spec.limit
  return {
    spec,
    fits,
    take: () => {
      inFlight++
    },
    ended: () => {
      inFlight--
    },
    refused: () => {},
    giveBack: () => {},
    next: (now) => (fits() ? now : Infinity),
    wastedAt: () => Infinity
  }
}

/** Two limiters that must both be kept to. */
const both = (a, b) => ({
  spec: a.spec,
  fits: (now, cost) => a.fits(now, cost) && b.fits(now, cost),
  take: (now, cost) => {
    a.take(now, cost)
    b.take(now, cost)
  },
  refused: () => {},
  giveBack: (now, cost, takenAt) => {
    a.giveBack(now, cost, takenAt)
    b.giveBack(now, cost, takenAt)
  },
  next: (now, cost) => Math.max(a.next(now, cost), b.next(now, cost)),
  wastedAt: (now) => Math.min(a.wastedAt(now), b.wastedAt(now))
})

/** The limiter of a specification; as declared, windows may begin at any time, and none holds more than the limit. */
export const limiterOf = (spec, phase, start, asDeclared) => {
  if (spec.kind === "concurrency") return concurrency(spec)
  if (spec.kind === "bucket") return asDeclared ? both(bucket(spec, start), slidingWindow(spec)) : bucket(spec, start)
  return asDeclared ? slidingWindow(spec) : fixedWindow(spec, phase)
}
