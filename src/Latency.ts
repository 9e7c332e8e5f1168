/**
 * How long attempts take until their answers belong to the caller, as seen of late: per model, streams apart from other
 * answers.
 *
 * @since 0.1.0
 */

/**
 * What is answered alike: a model, and whether its answer is a stream.
 *
 * @since 0.1.0
 * @category models
 */
export interface Kind {
  readonly model: string | undefined
  readonly streaming: boolean
}

/**
 * What was seen of one kind: a histogram whose buckets grow by a factor of 2^(1/4).
 *
 * @since 0.1.0
 * @category models
 */
export interface Seen extends Kind {
  /** When it was added to last. */
  readonly at: number
  readonly counts: ReadonlyArray<number>
  readonly total: number
}

/**
 * What was seen of all kinds.
 *
 * @since 0.1.0
 * @category models
 */
export type Latency = ReadonlyArray<Seen>

/**
 * Nothing was seen yet.
 *
 * @since 0.1.0
 * @category constants
 */
export const empty: Latency = []

/**
 * Takes in how long an attempt took, in milliseconds. What came long before counts ever less: at 1,000 samples all counts
 * are halved. The kinds not seen for longest make room beyond 64.
 *
 * @since 0.1.0
 * @category steps
 */
export const add = (self: Latency, kind: Kind, millis: number, now: number): Latency => {
  const at = indexOf(self, kind)
  const before = self[at]
  const counts = before === undefined ? nothing.slice() : before.counts.slice()
  const bucket = bucketOf(millis)
  counts[bucket] = (counts[bucket] ?? 0) + 1
  const total = (before?.total ?? 0) + 1
  const seen = { model: kind.model, streaming: kind.streaming, at: now }
  return put(self, at, total < most ? { ...seen, counts, total } : { ...seen, ...halved(counts) })
}

/**
 * Whether one more attempt should be added: every one up to 100 of a kind; then one of eight tells as much, and costs the
 * others nothing. Which one is told by its number, scattered, so that kinds that take turns are all seen.
 *
 * @since 0.1.0
 * @category getters
 */
export const wants = (self: Latency, kind: Kind, number: number): boolean => {
  const seen = self[indexOf(self, kind)]
  return seen === undefined || seen.total < sampled || (Math.imul(number, 0x9e3779b1) >>> 29) === 0
}

/**
 * How long a share of the attempts took at most, in milliseconds, to within a factor of 2^(1/4) upward; `undefined` while
 * there are fewer than 20 samples.
 *
 * @since 0.1.0
 * @category getters
 */
export const quantile = (self: Latency, kind: Kind, share: number): number | undefined => {
  const seen = self[indexOf(self, kind)]
  if (seen === undefined || seen.total < least) return undefined
  const above = (1 - share) * seen.total
  let count = 0
  for (let bucket = last; bucket > 0; bucket--) {
    count += seen.counts[bucket] ?? 0
    if (count > above) return 2 ** (bucket / perOctave)
  }
  return 1
}

const indexOf = (self: Latency, { model, streaming }: Kind): number => {
  for (let i = 0; i < self.length; i++) {
    const seen = self[i]
    if (seen?.model === model && seen?.streaming === streaming) return i
  }
  return -1
}

const put = (self: Latency, at: number, seen: Seen): Latency => {
  const next = self.slice()
  if (at >= 0) next[at] = seen
  else if (self.length < kinds) next.push(seen)
  else next[self.reduce((oldest, { at }, i) => at < (self[oldest]?.at ?? Infinity) ? i : oldest, 0)] = seen
  return next
}

const bucketOf = (millis: number): number =>
  millis > 1 ? Math.min(last, Math.ceil(perOctave * Math.log2(millis) - 1e-9)) : 0

const halved = (counts: ReadonlyArray<number>): Pick<Seen, "counts" | "total"> => {
  const half = counts.map((count) => count >> 1)
  return { counts: half, total: half.reduce((sum, count) => sum + count, 0) }
}

const perOctave = 4
/** The longest that is told from longer ones: about an hour. */
const last = 87
const nothing: ReadonlyArray<number> = Array.from({ length: last + 1 }, () => 0)
/** How many samples say something, and at how many the older ones begin to count less. */
const least = 20
const most = 1_000
const kinds = 64
/** From how many samples on not all are taken. */
const sampled = 100
