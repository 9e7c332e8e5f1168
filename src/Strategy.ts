/**
 * Selection strategies: which of the eligible keys serves next.
 *
 * Each strategy is an immutable index of the eligible keys, kept up to date key by key, so that a pick costs O(log n)
 * and never walks all keys (a `custom` one may). With k excluded keys in the way it costs O(k log n).
 *
 * @since 0.1.0
 */
import * as Schema from "effect/Schema"
import type { ApiKey } from "./ApiKey.js"
import * as SlotMap from "./SlotMap.js"
import * as Tournament from "./Tournament.js"

/**
 * What a strategy knows of a key. `slot` is its small, dense, reusable number inside the pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface Candidate {
  /** A whole number from 0 on. A slot that a key has left may be given to another one. */
  readonly slot: number
  /** Tells the keys apart that come to have the same slot, one after the other. */
  readonly id: string
  readonly label: string
  /** Relative share, greater than 0 (default 1); only the ratios matter, as far as they lie within 1e-9 to 1e9. */
  readonly weight: number
  /** Position in the sequence; lower first. Ties: slot. */
  readonly order: number
  /** Attempts running now. */
  readonly inFlight: number
  /** Attempts ever started. */
  readonly total: number
  /**
   * How much it was used of late: attempts, each of which counts half as much with every minute that passes. On a scale
   * that does not change with time: the binary logarithm of that sum plus the pool's clock in minutes; -Infinity: never.
   */
  readonly recent: number
  /** When it was last picked, in milliseconds of the pool's clock; -Infinity when never. */
  readonly lastUsed: number
  /** The key itself, with its other attributes: group, models, limits, cost tier. */
  readonly key: ApiKey
}

/**
 * What a pick may use.
 *
 * @since 0.1.0
 * @category models
 */
export interface PickContext {
  /** Keys that this call must not get, by slot (already tried, or barred for this model). */
  readonly excluded: (slot: number) => boolean
  /** Whether the call leaves another key (a rotation); it must not disturb the fairness among first picks. */
  readonly rotation: boolean
  /** A uniform number in [0, 1), drawn from `Random` for this pick; read only when the strategy is `randomised`. */
  readonly random: number
  /** The pool's clock, in milliseconds. */
  readonly now: number
  /**
   * How much a key has left of its tightest limit, as a share from 0 to 1; 1 where no limit is known. Only where the
   * strategy `wants` headroom.
   */
  readonly left?: ((slot: number) => number) | undefined
}

/**
 * What became of an attempt, or that its key was given back.
 *
 * @since 0.1.0
 * @category models
 */
export interface Observation {
  readonly slot: number
  readonly id: string
  /**
   * How long it took until its answer belonged to the caller (for streams: its first content), in milliseconds; if it was
   * not answered, how long it had lasted. Absent: nothing is told of that.
   */
  readonly millis: number | undefined
  readonly answered: boolean
  /** Attempts of the same kind (a model, streams apart) take about the same time. */
  readonly kind: string
  /** The pool's clock, in milliseconds. */
  readonly now: number
}

/**
 * The eligible keys, arranged for one strategy: an immutable value. `pick` decides only; the pool then calls `update`
 * with the key's new numbers. The functions are methods: call them on their index.
 *
 * @since 0.1.0
 * @category models
 */
export interface Index {
  readonly size: number
  /** A key became eligible (new, or back). Inserting a slot that is present updates it. */
  readonly insert: (candidate: Candidate) => Index
  /** A key is no longer eligible (gated, or gone). No-op when absent. */
  readonly remove: (slot: number) => Index
  /** The numbers of a key changed while it stays eligible. No-op when absent. */
  readonly update: (candidate: Candidate) => Index
  /**
   * Something is told of an attempt, before the key's new numbers, and also while the key is not eligible. Asked only
   * where the strategy `wants` latency.
   */
  readonly observe?: ((observation: Observation) => Index) | undefined
  /** The slot to use and the index after the choice; `undefined` when every key is excluded. */
  readonly pick: (context: PickContext) => Picked | undefined
}

/**
 * A choice: the slot of the key that serves, and the index to use from now on.
 *
 * @since 0.1.0
 * @category models
 */
export interface Picked {
  readonly slot: number
  readonly index: Index
}

/**
 * A named way of choosing.
 *
 * @since 0.1.0
 * @category models
 */
export interface Strategy {
  readonly name: string
  /** Whether `pick` reads `random`. */
  readonly randomised: boolean
  /** What it needs beside the numbers of keys: `PickContext.left`, or `Index.observe`. Else that is not gathered. */
  readonly wants?: "headroom" | "latency" | undefined
  /**
   * Whether any key is as good as another to it, so that the pool may use one whose capacity would be lost before the one
   * that is picked; absent: not.
   */
  readonly impartial?: boolean
  /** An index with no keys. */
  readonly empty: Index
}

/**
 * The names of the built-in strategies, for configuration.
 *
 * @example
 * ```ts
 * import * as Schema from "effect/Schema"
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const strategy = Strategy.fromName(Schema.decodeSync(Strategy.Name)("least-used"))
 * ```
 *
 * @since 0.1.0
 * @category names
 */
export const Name = Schema.Literal(
  "round-robin",
  "weighted",
  "least-used",
  "sequential-then-rotate",
  "power-of-two-choices",
  "cheapest",
  "headroom",
  "least-latency"
)

/**
 * The name of a built-in strategy.
 *
 * @since 0.1.0
 * @category names
 */
export type Name = typeof Name.Type

/**
 * The built-in strategy of that name.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const strategy = Strategy.fromName("sequential-then-rotate")
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export function fromName(name: Name): Strategy {
  switch (name) {
    case "round-robin":
      return roundRobin
    case "weighted":
      return weighted
    case "least-used":
      return leastUsed
    case "sequential-then-rotate":
      return sequential
    case "power-of-two-choices":
      return powerOfTwoChoices
    case "cheapest":
      return cheapest
    case "headroom":
      return headroom
    case "least-latency":
      return leastLatency
  }
}

// ---------------------------------------------------------------------------------------------------------------------

class RoundRobin implements Index {
  /** The eligible slots. */
  readonly slots: SlotMap.SlotMap<number>
  /** Where the next first pick starts to look. */
  readonly cursor: number
  /**
   * Where the next rotation starts to look. Were there one cursor for both, the neighbour of a failing key would get
   * its share twice: once by rotation, once by its turn.
   */
  readonly rotations: number

  constructor(slots: SlotMap.SlotMap<number>, cursor: number, rotations: number) {
    this.slots = slots
    this.cursor = cursor
    this.rotations = rotations
  }

  get size(): number {
    return this.slots.size
  }

  insert({ slot }: Candidate): Index {
    return SlotMap.get(this.slots, slot) === undefined
      ? new RoundRobin(SlotMap.set(this.slots, slot, slot), this.cursor, this.rotations)
      : this
  }

  remove(slot: number): Index {
    const slots = SlotMap.remove(this.slots, slot)
    return slots === this.slots ? this : new RoundRobin(slots, this.cursor, this.rotations)
  }

  update(_candidate: Candidate): Index {
    return this
  }

  pick(context: PickContext): Picked | undefined {
    const slot = this.from(context.rotation ? this.rotations : this.cursor, context.excluded)
    if (slot === undefined) return undefined
    return {
      slot,
      index: context.rotation
        ? new RoundRobin(this.slots, this.cursor, slot + 1)
        : new RoundRobin(this.slots, slot + 1, this.rotations)
    }
  }

  /** The first slot at or after `start` that is not excluded, going round. */
  private from(start: number, excluded: (slot: number) => boolean): number | undefined {
    let slot = SlotMap.next(this.slots, start)
    while (slot !== undefined && excluded(slot)) slot = SlotMap.next(this.slots, slot + 1)
    if (slot !== undefined || start === 0) return slot
    slot = SlotMap.next(this.slots, 0)
    while (slot !== undefined && slot < start && excluded(slot)) slot = SlotMap.next(this.slots, slot + 1)
    return slot !== undefined && slot < start ? slot : undefined
  }
}

/**
 * Every key in turn, by slot, starting after the last pick. The default.
 *
 * Rotations take turns of their own: they leave the order of the first picks as it is, and spread what a failing key
 * loses evenly over the others.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.roundRobin.name // "round-robin"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const roundRobin: Strategy = {
  name: "round-robin",
  randomised: false,
  impartial: true,
  empty: new RoundRobin(SlotMap.empty(), 0, 0)
}

// ---------------------------------------------------------------------------------------------------------------------

/** A key on the time line of its stride schedule. */
interface Share {
  readonly slot: number
  readonly id: string
  readonly weight: number
  /** When it is due, in virtual time. */
  readonly pass: number
}

/**
 * A stride schedule: the key that is due first serves, and is due again 1 / weight later. Virtual time is when the last
 * pick was due; it grows by about 1 while every key is picked weight times.
 */
interface Stride {
  readonly shares: Tournament.Tournament<Share>
  /** What keys had when they last left: to be away for a moment must not pay. Counts only while they are away. */
  readonly away: SlotMap.SlotMap<Share>
  readonly time: number
}

class Weighted implements Index {
  readonly first: Stride
  /** Rotations have a schedule of their own, so that the first picks keep to the weights exactly. */
  readonly rotations: Stride

  constructor(first: Stride, rotations: Stride) {
    this.first = first
    this.rotations = rotations
  }

  get size(): number {
    return this.first.shares.size
  }

  insert(candidate: Candidate): Index {
    const first = enter(this.first, candidate)
    return first === this.first ? this : new Weighted(first, enter(this.rotations, candidate))
  }

  remove(slot: number): Index {
    const first = leave(this.first, slot)
    return first === this.first ? this : new Weighted(first, leave(this.rotations, slot))
  }

  update(candidate: Candidate): Index {
    return Tournament.get(this.first.shares, candidate.slot) === undefined ? this : this.insert(candidate)
  }

  pick(context: PickContext): Picked | undefined {
    const stride = context.rotation ? this.rotations : this.first
    const share = Tournament.bestExcept(stride.shares, context.excluded)
    if (share === undefined) return undefined
    const after = serve(stride, share)
    return {
      slot: share.slot,
      index: context.rotation ? new Weighted(this.first, after) : new Weighted(after, this.rotations)
    }
  }
}

/**
 * Every key in proportion to its weight, evenly spread: over as many picks as the weights sum up to, each key is picked
 * `weight` times, and a heavy key does not get its share in one go.
 *
 * A key that comes back goes on where it was, or at the present if that is later: it neither catches up on what it
 * missed nor gets a fresh share. Rotations are shared by weight as well, apart from the first picks.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.weighted.name // "weighted"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const weighted: Strategy = {
  name: "weighted",
  randomised: false,
  empty: new Weighted(emptyStride(), emptyStride())
}

function emptyStride(): Stride {
  return { shares: Tournament.empty<Share>(dueBefore), away: SlotMap.empty<Share>(), time: 0 }
}

function dueBefore(a: Share, b: Share): boolean {
  return a.pass === b.pass ? a.slot < b.slot : a.pass < b.pass
}

function enter(stride: Stride, candidate: Candidate): Stride {
  const { id, slot } = candidate
  const weight = sane(candidate.weight)
  const present = Tournament.get(stride.shares, slot)
  const past = present ?? SlotMap.get(stride.away, slot)
  if (present !== undefined && present.id === id && present.weight === weight) return stride
  const pass = past !== undefined && past.id === id
    ? resumed(past, weight, stride.time)
    : stride.time + phase(slot) / weight
  return {
    shares: Tournament.set(stride.shares, { slot, id, weight, pass }),
    away: stride.away,
    time: stride.time
  }
}

function leave(stride: Stride, slot: number): Stride {
  const share = Tournament.get(stride.shares, slot)
  return share === undefined ? stride : {
    shares: Tournament.remove(stride.shares, slot),
    away: SlotMap.set(stride.away, slot, share),
    time: stride.time
  }
}

/** The share, which was not excluded, serves. */
function serve(stride: Stride, share: Share): Stride {
  // A key that was passed over because it was excluded is overdue; it does not catch up in a burst either.
  const time = Math.max(share.pass, stride.time)
  const step = 1 / share.weight
  // Too late on the time line for a step this small to be exact: move the origin. Rare, because a step is small only
  // in comparison with the steps of far lighter keys.
  if (time > step * 2 ** 40) return serve(rebased(stride, time), { ...share, pass: 0 })
  const next: Share = { slot: share.slot, id: share.id, weight: share.weight, pass: time + step }
  return { shares: Tournament.set(stride.shares, next), away: stride.away, time }
}

function rebased(stride: Stride, origin: number): Stride {
  const earlier = (share: Share): Share => ({ ...share, pass: share.pass - origin })
  let away = stride.away
  for (const share of SlotMap.values(away)) away = SlotMap.set(away, share.slot, earlier(share))
  return { shares: Tournament.map(stride.shares, earlier), away, time: 0 }
}

/** When a known key is due: what it still had to wait counts, at its present weight. */
function resumed(past: Share, weight: number, time: number): number {
  if (past.pass <= time) return time
  return past.weight === weight ? past.pass : time + (past.pass - time) * past.weight / weight
}

/**
 * How much of its first step a new key waits. Neighbouring slots get well separated phases (multiples of the golden
 * ratio), so that many light keys do not come due at the same time and leave a heavy one to run between.
 */
function phase(slot: number): number {
  return (slot * 0.6180339887498949) % 1
}

/** Weights are checked where keys are made; whatever comes here must not stop the schedule. */
function sane(weight: number): number {
  return weight > 1e-9 ? Math.min(weight, 1e9) : 1e-9
}

// ---------------------------------------------------------------------------------------------------------------------

class LeastUsed implements Index {
  readonly keys: Tournament.Tournament<Candidate>

  constructor(keys: Tournament.Tournament<Candidate>) {
    this.keys = keys
  }

  get size(): number {
    return this.keys.size
  }

  insert(candidate: Candidate): Index {
    return new LeastUsed(Tournament.set(this.keys, candidate))
  }

  remove(slot: number): Index {
    const keys = Tournament.remove(this.keys, slot)
    return keys === this.keys ? this : new LeastUsed(keys)
  }

  update(candidate: Candidate): Index {
    return Tournament.get(this.keys, candidate.slot) === undefined ? this : this.insert(candidate)
  }

  pick(context: PickContext): Picked | undefined {
    const key = Tournament.bestExcept(this.keys, context.excluded)
    return key === undefined ? undefined : { slot: key.slot, index: this }
  }
}

/**
 * The key with the fewest attempts in flight; of those the one that was used least of late, then the one that was picked
 * the longest time ago, then the lowest slot.
 *
 * What was used counts half as much after a minute. A key that joins, or is reset, begins at the median of the others,
 * so that it does not take all calls until it has caught up.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.leastUsed.name // "least-used"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const leastUsed: Strategy = {
  name: "least-used",
  randomised: false,
  impartial: true,
  empty: new LeastUsed(
    Tournament.empty((a, b) => {
      const order = compareUse(a, b)
      return order === 0 ? a.slot < b.slot : order < 0
    })
  )
}

/** Negative when the first is used less. */
function compareUse(a: Candidate, b: Candidate): number {
  if (a.inFlight !== b.inFlight) return a.inFlight < b.inFlight ? -1 : 1
  return compareRecent(a, b)
}

/** Negative when the first was used less of late. */
function compareRecent(a: Candidate, b: Candidate): number {
  if (a.recent !== b.recent) return a.recent < b.recent ? -1 : 1
  // Not a subtraction: both may be -Infinity.
  return a.lastUsed < b.lastUsed ? -1 : a.lastUsed > b.lastUsed ? 1 : 0
}

// ---------------------------------------------------------------------------------------------------------------------

/** A key's place in the sequence. Places are compared by lap, then `order`, then slot. */
interface Place {
  readonly slot: number
  readonly id: string
  readonly order: number
  /** How many times the sequence has been gone through when it is this key's turn. */
  readonly lap: number
}

class Sequential implements Index {
  /** Places at or after `at` are in its lap, those before it in the next one: the best is the next in sequence. */
  readonly places: Tournament.Tournament<Place>
  /** Where the sequence has got to: the place of the current key when it became that. */
  readonly at: Place

  constructor(places: Tournament.Tournament<Place>, at: Place) {
    this.places = places
    this.at = at
  }

  get size(): number {
    return this.places.size
  }

  insert({ id, order, slot }: Candidate): Index {
    const place = Tournament.get(this.places, slot)
    if (place !== undefined && place.id === id && place.order === order) return this
    const { at } = this
    const passed = order < at.order || (order === at.order && slot < at.slot)
    return new Sequential(Tournament.set(this.places, { slot, id, order, lap: passed ? at.lap + 1 : at.lap }), at)
  }

  remove(slot: number): Index {
    const places = Tournament.remove(this.places, slot)
    return places === this.places ? this : new Sequential(places, this.at)
  }

  update(candidate: Candidate): Index {
    return Tournament.get(this.places, candidate.slot) === undefined ? this : this.insert(candidate)
  }

  pick(context: PickContext): Picked | undefined {
    const { at } = this
    // Not simply the best one: its `order` may have changed meanwhile.
    if (Tournament.get(this.places, at.slot)?.id === at.id && !context.excluded(at.slot)) {
      return { slot: at.slot, index: this }
    }
    const next = Tournament.bestExcept(this.places, context.excluded)
    if (next === undefined) return undefined
    let places = this.places
    let top = Tournament.best(places)
    // Whoever stood before the chosen one has had its turn in this lap.
    while (top !== undefined && top !== next) {
      places = Tournament.set(places, { slot: top.slot, id: top.id, order: top.order, lap: top.lap + 1 })
      top = Tournament.best(places)
    }
    return { slot: next.slot, index: new Sequential(places, next) }
  }
}

/**
 * One key until it is not eligible any more or a call may not have it; then the next one in sequence (by `order`, then
 * slot; after the last one the first again), for every call, as long as that lasts.
 *
 * A key that comes back does not become the current one before its turn. When the `order` of the current key changes,
 * it stays current, and the sequence goes on from its old place.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.sequential.name // "sequential-then-rotate"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const sequential: Strategy = {
  name: "sequential-then-rotate",
  randomised: false,
  empty: new Sequential(
    Tournament.empty((a, b) => {
      if (a.lap !== b.lap) return a.lap < b.lap
      return a.order === b.order ? a.slot < b.slot : a.order < b.order
    }),
    { slot: -1, id: "", order: -Infinity, lap: 0 }
  )
}

// ---------------------------------------------------------------------------------------------------------------------

class PowerOfTwoChoices implements Index {
  readonly keys: SlotMap.SlotMap<Candidate>

  constructor(keys: SlotMap.SlotMap<Candidate>) {
    this.keys = keys
  }

  get size(): number {
    return this.keys.size
  }

  insert(candidate: Candidate): Index {
    return new PowerOfTwoChoices(SlotMap.set(this.keys, candidate.slot, candidate))
  }

  remove(slot: number): Index {
    const keys = SlotMap.remove(this.keys, slot)
    return keys === this.keys ? this : new PowerOfTwoChoices(keys)
  }

  update(candidate: Candidate): Index {
    return SlotMap.get(this.keys, candidate.slot) === undefined ? this : this.insert(candidate)
  }

  pick(context: PickContext): Picked | undefined {
    const { keys } = this
    const seed = seedOf(context.random)
    if (keys.size > 1) {
      const rank = below(keys.size, seed, 0)
      const other = below(keys.size - 1, seed, 1)
      const a = SlotMap.nth(keys, rank)
      const b = SlotMap.nth(keys, other < rank ? other : other + 1)
      if (a !== undefined && b !== undefined && !context.excluded(a.slot) && !context.excluded(b.slot)) {
        return { slot: lessUsed(a, b).slot, index: this }
      }
    }
    const slot = this.search(context.excluded, seed)
    return slot === undefined ? undefined : { slot, index: this }
  }

  /**
   * Goes through the keys in random order until two are found that are not excluded: a shuffle of which only the part
   * that is looked at takes place. Draws anew, so that what the first two draws have shown biases nothing.
   */
  private search(excluded: (slot: number) => boolean, seed: number): number | undefined {
    const { keys } = this
    const moved = new Map<number, number>()
    let found: Candidate | undefined
    for (let done = 0; done < keys.size; done++) {
      const drawn = done + below(keys.size - done, seed, done + 2)
      const key = SlotMap.nth(keys, moved.get(drawn) ?? drawn)
      moved.set(drawn, moved.get(done) ?? done)
      if (key === undefined || excluded(key.slot)) continue
      if (found !== undefined) return lessUsed(found, key).slot
      found = key
    }
    return found?.slot
  }
}

/**
 * Two different keys at random, and of these the one with fewer attempts in flight (then the less used of late, then the
 * one picked longer ago). Spreads load nearly as well as `leastUsed`, without all processes running to the same key.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.powerOfTwoChoices.name // "power-of-two-choices"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const powerOfTwoChoices: Strategy = {
  name: "power-of-two-choices",
  randomised: true,
  impartial: true,
  empty: new PowerOfTwoChoices(SlotMap.empty())
}

/** On a tie the one drawn first: slots must not matter. */
function lessUsed(first: Candidate, second: Candidate): Candidate {
  return compareUse(first, second) <= 0 ? first : second
}

/** All 53 bits of a number in [0, 1), folded into 32. */
function seedOf(random: number): number {
  const high = Math.floor(random * 2 ** 21)
  return mix(Math.floor((random * 2 ** 21 - high) * 2 ** 32) ^ mix(high))
}

/** The `nth` number of the sequence that a seed begins, as a whole number in [0, n). */
function below(n: number, seed: number, nth: number): number {
  return Math.floor((mix(seed + Math.imul(nth + 1, 0x9e3779b9)) >>> 0) / 2 ** 32 * n)
}

/** Spreads every bit over all 32 of them. */
function mix(bits: number): number {
  let mixed = Math.imul(bits ^ (bits >>> 16), 0x85ebca6b)
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35)
  return mixed ^ (mixed >>> 16)
}

// ---------------------------------------------------------------------------------------------------------------------

/** A key and when it was picked last, as a count of picks. */
interface Turn {
  readonly slot: number
  readonly id: string
  readonly tier: number
  readonly turn: number
}

class Cheapest implements Index {
  readonly keys: Tournament.Tournament<Turn>
  /** The picks so far. */
  readonly turns: number

  constructor(keys: Tournament.Tournament<Turn>, turns: number) {
    this.keys = keys
    this.turns = turns
  }

  get size(): number {
    return this.keys.size
  }

  insert({ id, key: { costTier: tier }, slot }: Candidate): Index {
    const known = Tournament.get(this.keys, slot)
    if (known?.id === id && known.tier === tier) return this
    // Who comes, or comes back, waits its turn.
    return new Cheapest(Tournament.set(this.keys, { slot, id, tier, turn: this.turns }), this.turns)
  }

  remove(slot: number): Index {
    const keys = Tournament.remove(this.keys, slot)
    return keys === this.keys ? this : new Cheapest(keys, this.turns)
  }

  update(candidate: Candidate): Index {
    return Tournament.get(this.keys, candidate.slot) === undefined ? this : this.insert(candidate)
  }

  pick(context: PickContext): Picked | undefined {
    const key = Tournament.bestExcept(this.keys, context.excluded)
    if (key === undefined) return undefined
    const turns = this.turns + 1
    return { slot: key.slot, index: new Cheapest(Tournament.set(this.keys, { ...key, turn: turns }), turns) }
  }
}

/**
 * The keys of the lowest `costTier` that a call may have, each in turn: the one that was picked the longest time ago.
 * Dearer keys serve only while none of the cheaper ones can.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.cheapest.name // "cheapest"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const cheapest: Strategy = {
  name: "cheapest",
  randomised: false,
  empty: new Cheapest(
    Tournament.empty((a, b) => {
      if (a.tier !== b.tier) return a.tier < b.tier
      return a.turn === b.turn ? a.slot < b.slot : a.turn < b.turn
    }),
    0
  )
}

// ---------------------------------------------------------------------------------------------------------------------

/** A key, and what it had left when somebody looked last. */
interface Room {
  readonly slot: number
  readonly left: number
  readonly key: Candidate
}

class Headroom implements Index {
  readonly rooms: Tournament.Tournament<Room>
  /** The eligible slots, and from which on keys are looked at again. */
  readonly slots: SlotMap.SlotMap<number>
  readonly cursor: number

  constructor(rooms: Tournament.Tournament<Room>, slots: SlotMap.SlotMap<number>, cursor: number) {
    this.rooms = rooms
    this.slots = slots
    this.cursor = cursor
  }

  get size(): number {
    return this.rooms.size
  }

  insert(key: Candidate): Index {
    const { slot } = key
    const known = Tournament.get(this.rooms, slot)
    // Too much does no harm: whoever comes first is looked at before it serves.
    const left = known?.key.id === key.id ? known.left : 1
    return new Headroom(
      Tournament.set(this.rooms, { slot, left, key }),
      known === undefined ? SlotMap.set(this.slots, slot, slot) : this.slots,
      this.cursor
    )
  }

  remove(slot: number): Index {
    const rooms = Tournament.remove(this.rooms, slot)
    return rooms === this.rooms ? this : new Headroom(rooms, SlotMap.remove(this.slots, slot), this.cursor)
  }

  update(key: Candidate): Index {
    return Tournament.get(this.rooms, key.slot) === undefined ? this : this.insert(key)
  }

  pick({ excluded, left = full }: PickContext): Picked | undefined {
    let { cursor, rooms } = this
    const look = (room: Room): boolean => {
      const now = left(room.slot)
      if (now === room.left) return false
      rooms = Tournament.set(rooms, { slot: room.slot, left: now, key: room.key })
      return true
    }
    // What comes back with time comes back unsaid: a few keys are looked at with each pick, all in turn.
    for (let n = Math.min(looks, rooms.size); n > 0; n--) {
      const slot = SlotMap.next(this.slots, cursor) ?? SlotMap.next(this.slots, 0)
      const room = slot === undefined ? undefined : Tournament.get(rooms, slot)
      if (room === undefined) break
      look(room)
      cursor = room.slot + 1
    }
    // What was used goes unsaid too, where keys share a limit: of the first nobody shall be wrong.
    let best = Tournament.bestExcept(rooms, excluded)
    for (let n = corrections; n > 0 && best !== undefined && look(best); n--) {
      best = Tournament.bestExcept(rooms, excluded)
    }
    return best === undefined ? undefined : { slot: best.slot, index: new Headroom(rooms, this.slots, cursor) }
  }
}

/**
 * The key with the most left of its tightest limit, as a share of that limit; of those with as much, the one that was
 * used least of late, then the one picked the longest time ago, then the lowest slot.
 *
 * Limits are those that keys declare, that answers announce, and that refusals teach, for all models and for the model
 * that is asked for. A key of which none is known counts as full. Keys that share a limit have the same left.
 *
 * With each pick 4 keys are looked at again, in turn, so that what comes back with time is seen; of more keys than that,
 * what is known of one may be as old as a quarter as many picks.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.headroom.name // "headroom"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const headroom: Strategy = {
  name: "headroom",
  randomised: false,
  wants: "headroom",
  empty: new Headroom(
    Tournament.empty((a, b) => {
      if (a.left !== b.left) return a.left > b.left
      const order = compareRecent(a.key, b.key)
      return order === 0 ? a.slot < b.slot : order < 0
    }),
    SlotMap.empty(),
    0
  )
}

const full = () => 1
/** How many keys are looked at again with each pick. */
const looks = 4
/** How often what is thought of the first may turn out wrong, until one serves all the same. */
const corrections = 8

// ---------------------------------------------------------------------------------------------------------------------

/** How long a key takes to answer, in multiples of what is usual. */
interface Pace {
  readonly slot: number
  readonly id: string
  readonly inFlight: number
  readonly lastUsed: number
  /** `undefined`: nobody knows. */
  readonly cost: number | undefined
  /** When that was said. While the key has nothing in flight, it halves with every half-life from then on. */
  readonly at: number
}

/** The keys by what is known of them: what is compared within one of these does not change with time. */
interface Paces {
  readonly idle: Tournament.Tournament<Pace>
  readonly busy: Tournament.Tournament<Pace>
  readonly untold: Tournament.Tournament<Pace>
}

class LeastLatency implements Index {
  readonly paces: Paces
  /** What was known of keys when they left. */
  readonly away: SlotMap.SlotMap<Pace>
  /** What is usual for each kind of attempt, in milliseconds. */
  readonly usual: ReadonlyMap<string, number>

  constructor(paces: Paces, away: SlotMap.SlotMap<Pace>, usual: ReadonlyMap<string, number>) {
    this.paces = paces
    this.away = away
    this.usual = usual
  }

  get size(): number {
    const { busy, idle, untold } = this.paces
    return busy.size + idle.size + untold.size
  }

  insert({ id, inFlight, lastUsed, slot }: Candidate): Index {
    const before = this.find(slot) ?? SlotMap.get(this.away, slot)
    const known = before?.id === id ? before : undefined
    // It has come to have something in flight: what it has gained by idling, it keeps.
    const began = known?.cost !== undefined && known.inFlight === 0 && inFlight > 0
    const pace: Pace = {
      slot,
      id,
      inFlight,
      lastUsed,
      cost: began ? costAt(known, lastUsed) : known?.cost,
      at: began ? Math.max(lastUsed, known.at) : known?.at ?? -Infinity
    }
    return new LeastLatency(put(this.paces, pace), this.away, this.usual)
  }

  remove(slot: number): Index {
    const pace = this.find(slot)
    return pace === undefined
      ? this
      : new LeastLatency(without(this.paces, slot), SlotMap.set(this.away, slot, pace), this.usual)
  }

  update(candidate: Candidate): Index {
    return this.find(candidate.slot) === undefined ? this : this.insert(candidate)
  }

  observe({ answered, id, kind, millis, now, slot }: Observation): Index {
    const present = this.find(slot)
    const pace = present ?? SlotMap.get(this.away, slot)
    const known = this.usual.get(kind)
    // A new kind, when there are very many: all are learned anew.
    const usual = !answered || millis === undefined
      ? this.usual
      : new Map(known === undefined && this.usual.size >= mostKinds ? [] : this.usual).set(
        kind,
        known === undefined ? Math.max(1, millis) : Math.max(1, known + (millis - known) / usualOf)
      )
    if (pace?.id !== id) return usual === this.usual ? this : new LeastLatency(this.paces, this.away, usual)
    const took = millis === undefined || (known === undefined && !answered)
      ? undefined
      : millis / (known ?? Math.max(1, millis))
    const cost = took === undefined
      ? pace.cost
      : answered
      ? answeredIn(pace, took, now)
      // It would have taken longer, nobody knows by how much. Of one that failed quickly nothing is known.
      : pace.cost === undefined
      ? took > 1 ? took : undefined
      : Math.max(pace.cost, took)
    const next: Pace = { ...pace, cost, at: now }
    return present === undefined
      ? new LeastLatency(this.paces, SlotMap.set(this.away, slot, next), usual)
      : new LeastLatency(put(this.paces, next), this.away, usual)
  }

  pick({ excluded, now }: PickContext): Picked | undefined {
    const idle = Tournament.bestExcept(this.paces.idle, excluded)
    const busy = Tournament.bestExcept(this.paces.busy, excluded)
    const untold = Tournament.bestExcept(this.paces.untold, excluded)
    const known = idle === undefined || (busy !== undefined && load(busy, now) < load(idle, now)) ? busy : idle
    if (untold === undefined) return known === undefined ? undefined : { slot: known.slot, index: this }
    // Who was never asked is asked once; from then on, until it answers, it counts as good as the best.
    const best = Math.min(idle === undefined ? Infinity : costAt(idle, now), busy?.cost ?? Infinity)
    const chosen = known === undefined || untold.lastUsed === -Infinity ||
        (untold.inFlight + 1) * best < load(known, now) ||
        ((untold.inFlight + 1) * best === load(known, now) && untold.lastUsed < known.lastUsed)
      ? untold
      : known
    return { slot: chosen.slot, index: this }
  }

  private find(slot: number): Pace | undefined {
    const { busy, idle, untold } = this.paces
    return Tournament.get(idle, slot) ?? Tournament.get(busy, slot) ?? Tournament.get(untold, slot)
  }
}

/**
 * The key that answers soonest: by a mean of how long its answers take, which jumps up at once with a slow one and comes
 * down with a half-life of 10 seconds, times its attempts in flight plus one. Of streams the first content counts.
 *
 * Times are taken relative to what is usual for the model (streams apart), so that one key is not thought slow for having
 * been asked for what takes long. The mean of a key that nobody uses halves every 10 seconds, so that a slow one is tried
 * again after a while. One that joins is asked once, and then counts as good as the best until it has answered. Only calls
 * that may be sent again are timed.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const name = Strategy.leastLatency.name // "least-latency"
 * ```
 *
 * @since 0.1.0
 * @category strategies
 */
export const leastLatency: Strategy = {
  name: "least-latency",
  randomised: false,
  wants: "latency",
  empty: new LeastLatency(
    {
      idle: Tournament.empty((a, b) => sooner(a, b, timeless(a) - timeless(b))),
      busy: Tournament.empty((a, b) => sooner(a, b, load(a, 0) - load(b, 0))),
      untold: Tournament.empty((a, b) => sooner(a, b, a.inFlight - b.inFlight))
    },
    SlotMap.empty(),
    new Map()
  )
}

/** The one that is less, or was used the longest time ago. */
function sooner(a: Pace, b: Pace, difference: number): boolean {
  if (difference !== 0) return difference < 0
  return a.lastUsed === b.lastUsed ? a.slot < b.slot : a.lastUsed < b.lastUsed
}

/** The cost of a key at an instant: what it was told to be while it has something in flight, less and less while not. */
function costAt({ at, cost = 0, inFlight }: Pace, now: number): number {
  return inFlight > 0 ? cost : cost * 2 ** (-Math.max(0, now - at) / paceHalfLifeMillis)
}

function load(pace: Pace, now: number): number {
  return costAt(pace, now) * (pace.inFlight + 1)
}

/** The cost of an idle key on a scale on which all idle keys stay in order as time passes. */
function timeless({ at, cost = 0 }: Pace): number {
  return Math.log2(cost) + at / paceHalfLifeMillis
}

function answeredIn({ at, cost }: Pace, took: number, now: number): number {
  if (cost === undefined || took >= cost) return took
  return took + (cost - took) * 2 ** (-Math.max(0, now - at) / paceHalfLifeMillis)
}

function put(paces: Paces, pace: Pace): Paces {
  const place = pace.cost === undefined ? "untold" : pace.inFlight > 0 ? "busy" : "idle"
  const left = Tournament.get(paces[place], pace.slot) === undefined ? without(paces, pace.slot) : paces
  return { ...left, [place]: Tournament.set(left[place], pace) }
}

function without({ busy, idle, untold }: Paces, slot: number): Paces {
  return {
    idle: Tournament.remove(idle, slot),
    busy: Tournament.remove(busy, slot),
    untold: Tournament.remove(untold, slot)
  }
}

const paceHalfLifeMillis = 10_000
/** Over about so many answers it is learned what is usual. */
const usualOf = 32
const mostKinds = 64

// ---------------------------------------------------------------------------------------------------------------------

class Custom implements Index {
  readonly keys: SlotMap.SlotMap<Candidate>
  readonly choose: Choose

  constructor(keys: SlotMap.SlotMap<Candidate>, choose: Choose) {
    this.keys = keys
    this.choose = choose
  }

  get size(): number {
    return this.keys.size
  }

  insert(candidate: Candidate): Index {
    // A copy that nobody can change: the pool's own values never get into the hands of `choose`.
    return new Custom(SlotMap.set(this.keys, candidate.slot, Object.freeze({ ...candidate })), this.choose)
  }

  remove(slot: number): Index {
    const keys = SlotMap.remove(this.keys, slot)
    return keys === this.keys ? this : new Custom(keys, this.choose)
  }

  update(candidate: Candidate): Index {
    return SlotMap.get(this.keys, candidate.slot) === undefined ? this : this.insert(candidate)
  }

  pick({ excluded, now, random, rotation }: PickContext): Picked | undefined {
    const candidates = SlotMap.values(this.keys).filter((key) => !excluded(key.slot))
    const [first] = candidates
    if (first === undefined) return undefined
    const chosen = tried(() => this.choose(candidates, { now, random, rotation })) ?? first
    const key = SlotMap.get(this.keys, chosen.slot)
    const known = key?.slot === chosen.slot && key.id === chosen.id && !excluded(chosen.slot)
    return { slot: known ? chosen.slot : first.slot, index: this }
  }
}

/** A choice that fails is none: no call is lost to it. */
const tried = (choose: () => Candidate | undefined): Candidate | undefined => {
  try {
    return choose()
  } catch {
    return undefined
  }
}

/**
 * What a `custom` strategy may use: the pool's clock in milliseconds, a uniform number in [0, 1) drawn for this pick,
 * and whether the call leaves another key.
 *
 * @since 0.1.0
 * @category models
 */
export type ChooseContext = Pick<PickContext, "now" | "random" | "rotation">

/**
 * Chooses among the keys that a call may have, which come by slot; at least one. See `custom`.
 *
 * @since 0.1.0
 * @category models
 */
export type Choose = (candidates: ReadonlyArray<Candidate>, context: ChooseContext) => Candidate | undefined

/**
 * A strategy of your own: a pure function from the keys that a call may have to one of them.
 *
 * It sees every such key at every pick, hence costs O(n). When it gives `undefined` or something that is not among the
 * candidates, or throws, the first candidate serves: no call is lost to a strategy.
 *
 * @example
 * ```ts
 * import * as Strategy from "effect-keymesh/Strategy"
 *
 * const lastResort = Strategy.custom("last-resort", (candidates) =>
 *   candidates.find((key) => key.label !== "expensive") ?? candidates[0])
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export function custom(name: string, choose: Choose): Strategy {
  return { name, randomised: true, empty: new Custom(SlotMap.empty(), choose) }
}
