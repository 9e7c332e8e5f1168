/**
 * An immutable tournament of entries that have slots (small whole numbers): the best one is known at once, changing an
 * entry replays the matches on one path, O(log n).
 *
 * Serves the strategies; not part of the public face.
 *
 * @since 0.1.0
 */

/**
 * Entries by slot, and the best of them under `before`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Tournament<A extends Entry> {
  readonly size: number
  /** Slots below this fit; a power of two. */
  readonly capacity: number
  readonly root: Match<A> | undefined
  /** Whether the first is better. A strict total order: of two entries with different slots exactly one is better. */
  readonly before: (a: A, b: A) => boolean
}

/**
 * What the entries must have.
 *
 * @since 0.1.0
 * @category models
 */
export interface Entry {
  readonly slot: number
}

/**
 * The best entry below this point; without `left` and `right`, the entry itself.
 *
 * @since 0.1.0
 * @category models
 */
export interface Match<A> {
  readonly best: A
  readonly left: Match<A> | undefined
  readonly right: Match<A> | undefined
}

/**
 * A tournament with no entries.
 *
 * @since 0.1.0
 * @category constructors
 */
export function empty<A extends Entry>(before: (a: A, b: A) => boolean): Tournament<A> {
  return { size: 0, capacity: 1, root: undefined, before }
}

/**
 * The entry at a slot.
 *
 * @since 0.1.0
 * @category getters
 */
export function get<A extends Entry>(self: Tournament<A>, slot: number): A | undefined {
  if (slot < 0 || slot >= self.capacity) return undefined
  let match = self.root
  for (let half = self.capacity >>> 1; half > 0 && match !== undefined; half >>>= 1) {
    match = (slot & half) === 0 ? match.left : match.right
  }
  return match?.best
}

/**
 * Puts an entry at its slot, which must be a whole number from 0 to 2²⁵ − 1.
 *
 * @since 0.1.0
 * @category combinators
 */
export function set<A extends Entry>(self: Tournament<A>, entry: A): Tournament<A> {
  let { capacity, root } = self
  while (entry.slot >= capacity) {
    if (root !== undefined) root = { best: root.best, left: root, right: undefined }
    capacity *= 2
  }
  const size = get(self, entry.slot) === undefined ? self.size + 1 : self.size
  return { size, capacity, root: setIn(root, capacity >>> 1, entry, self.before), before: self.before }
}

/**
 * Empties a slot. Nothing happens when it is empty already.
 *
 * @since 0.1.0
 * @category combinators
 */
export function remove<A extends Entry>(self: Tournament<A>, slot: number): Tournament<A> {
  if (self.root === undefined || get(self, slot) === undefined) return self
  const root = removeIn(self.root, self.capacity >>> 1, slot, self.before)
  return root === undefined
    ? empty(self.before)
    : { size: self.size - 1, capacity: self.capacity, root, before: self.before }
}

/**
 * The best entry.
 *
 * @since 0.1.0
 * @category getters
 */
export function best<A extends Entry>(self: Tournament<A>): A | undefined {
  return self.root?.best
}

/**
 * The best entry whose slot is not excluded. Looks only below matches that an excluded entry won, hence O(k log n) for
 * k excluded ones.
 *
 * @since 0.1.0
 * @category getters
 */
export function bestExcept<A extends Entry>(
  self: Tournament<A>,
  excluded: (slot: number) => boolean
): A | undefined {
  return self.root === undefined ? undefined : bestIn(self.root, undefined, excluded, self.before)
}

/**
 * All entries changed by `f`, which must keep their slots. O(n).
 *
 * @since 0.1.0
 * @category combinators
 */
export function map<A extends Entry>(self: Tournament<A>, f: (entry: A) => A): Tournament<A> {
  const root = self.root === undefined ? undefined : mapIn(self.root, f, self.before)
  return { size: self.size, capacity: self.capacity, root, before: self.before }
}

function setIn<A extends Entry>(
  match: Match<A> | undefined,
  half: number,
  entry: A,
  before: (a: A, b: A) => boolean
): Match<A> {
  if (half === 0) return { best: entry, left: undefined, right: undefined }
  if ((entry.slot & half) === 0) {
    const left = setIn(match?.left, half >>> 1, entry, before)
    const right = match?.right
    return { best: winner(left, right, before), left, right }
  }
  const left = match?.left
  const right = setIn(match?.right, half >>> 1, entry, before)
  return { best: winner(right, left, before), left, right }
}

/** The slot is known to be taken. */
function removeIn<A extends Entry>(
  match: Match<A> | undefined,
  half: number,
  slot: number,
  before: (a: A, b: A) => boolean
): Match<A> | undefined {
  if (half === 0 || match === undefined) return undefined
  const inLeft = (slot & half) === 0
  const left = inLeft ? removeIn(match.left, half >>> 1, slot, before) : match.left
  const right = inLeft ? match.right : removeIn(match.right, half >>> 1, slot, before)
  return play(left, right, before)
}

function bestIn<A extends Entry>(
  match: Match<A>,
  /** An entry that is known to be excluded already. */
  known: A | undefined,
  excluded: (slot: number) => boolean,
  before: (a: A, b: A) => boolean
): A | undefined {
  const top = match.best
  if (top !== known && !excluded(top.slot)) return top
  const left = match.left === undefined ? undefined : bestIn(match.left, top, excluded, before)
  const right = match.right === undefined ? undefined : bestIn(match.right, top, excluded, before)
  if (left === undefined) return right
  return right === undefined || before(left, right) ? left : right
}

function mapIn<A extends Entry>(match: Match<A>, f: (entry: A) => A, before: (a: A, b: A) => boolean): Match<A> {
  const left = match.left === undefined ? undefined : mapIn(match.left, f, before)
  const right = match.right === undefined ? undefined : mapIn(match.right, f, before)
  return play(left, right, before) ?? { best: f(match.best), left: undefined, right: undefined }
}

function play<A extends Entry>(
  left: Match<A> | undefined,
  right: Match<A> | undefined,
  before: (a: A, b: A) => boolean
): Match<A> | undefined {
  if (left !== undefined) return { best: winner(left, right, before), left, right }
  return right === undefined ? undefined : { best: right.best, left, right }
}

function winner<A extends Entry>(a: Match<A>, b: Match<A> | undefined, before: (a: A, b: A) => boolean): A {
  return b === undefined || before(a.best, b.best) ? a.best : b.best
}
