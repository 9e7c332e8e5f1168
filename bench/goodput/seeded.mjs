/** Numbers that look random and are the same for the same seed. */

/** A text as 32 bits. */
const hashed = (text) => {
  let hash = 0x811c9dc5
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193)
  return hash >>> 0
}

/** A generator of numbers in [0, 1) (mulberry32). */
export const seeded = (seed) => {
  let state = hashed(String(seed))
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296
  }
}

/** Exponentially distributed with mean 1. */
export const exponential = (random) => -Math.log(1 - random())

/** Log-normally distributed with median 1. */
export const lognormal = (random, sigma) =>
  Math.exp(sigma * Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()))
