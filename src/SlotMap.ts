/**
 * An immutable map from slots (small whole numbers) to entries: a 32-way trie with bitmaps and counts. Changing one
 * entry copies one path of it; finding the next one, or the n-th, costs O(log n).
 *
 * Serves the strategies; not part of the public face.
 *
 * @since 0.1.0
 */

/**
 * Entries by slot. `undefined` is not an entry.
 *
 * @since 0.1.0
 * @category models
 */
export interface SlotMap<A> {
  readonly size: number
  /** How many low bits of a slot lie below the root's digit. */
  readonly shift: number
  readonly root: Node<A>
}

/**
 * A part of the trie. At the lowest level `items` are the entries, above it `children` are the parts; both are packed:
 * they hold only what `bits` announces, in order.
 *
 * @since 0.1.0
 * @category models
 */
export interface Node<A> {
  readonly bits: number
  /** Entries in this part. */
  readonly count: number
  readonly items: ReadonlyArray<A>
  readonly children: ReadonlyArray<Node<A>>
}

/**
 * A map with no entries.
 *
 * @since 0.1.0
 * @category constructors
 */
export function empty<A>(): SlotMap<A> {
  return { size: 0, shift: 0, root: hollow }
}

/**
 * The entry at a slot.
 *
 * @since 0.1.0
 * @category getters
 */
export function get<A>(self: SlotMap<A>, slot: number): A | undefined {
  if (!within(slot, self.shift)) return undefined
  let node = self.root
  for (let shift = self.shift; shift > 0; shift -= 5) {
    const child = node.children[placeOf(node, digit(slot, shift))]
    if (child === undefined) return undefined
    node = child
  }
  return node.items[placeOf(node, digit(slot, 0))]
}

/**
 * Puts an entry at a slot, which must be a whole number from 0 to 2²⁵ − 1.
 *
 * @since 0.1.0
 * @category combinators
 */
export function set<A>(self: SlotMap<A>, slot: number, entry: A): SlotMap<A> {
  let { root, shift } = self
  while (slot >= 32 << shift) {
    if (root.count > 0) root = { bits: 1, count: root.count, items: [], children: [root] }
    shift += 5
  }
  root = setIn(root, shift, slot, entry)
  return { size: root.count, shift, root }
}

/**
 * Empties a slot. Nothing happens when it is empty already.
 *
 * @since 0.1.0
 * @category combinators
 */
export function remove<A>(self: SlotMap<A>, slot: number): SlotMap<A> {
  if (!within(slot, self.shift)) return self
  let root = removeIn(self.root, self.shift, slot)
  if (root === self.root) return self
  let shift = self.shift
  // Shrinks again when only low slots are left.
  while (shift > 0 && (root.bits & ~1) === 0) {
    root = root.children[0] ?? hollow
    shift -= 5
  }
  return { size: root.count, shift, root }
}

/**
 * The entry with the lowest slot that is not below `from`.
 *
 * @since 0.1.0
 * @category getters
 */
export function next<A>(self: SlotMap<A>, from: number): A | undefined {
  if (from <= 0) return nextIn(self.root, self.shift, 0)
  return within(from, self.shift) ? nextIn(self.root, self.shift, from) : undefined
}

/**
 * The entry with `rank` entries at lower slots.
 *
 * @since 0.1.0
 * @category getters
 */
export function nth<A>(self: SlotMap<A>, rank: number): A | undefined {
  let node = self.root
  let left = rank
  for (let shift = self.shift; shift > 0; shift -= 5) {
    let place = 0
    let child = node.children[0]
    while (child !== undefined && left >= child.count) {
      left -= child.count
      place++
      child = node.children[place]
    }
    if (child === undefined) return undefined
    node = child
  }
  return node.items[left]
}

/**
 * All entries, by slot; a new array.
 *
 * @since 0.1.0
 * @category getters
 */
export function values<A>(self: SlotMap<A>): Array<A> {
  const all: Array<A> = []
  collect(self.root, all)
  return all
}

/**
 * The first entry, by slot, that `suits`. Stops there and builds nothing on its way.
 *
 * @since 0.1.0
 * @category getters
 */
export function find<A>(self: SlotMap<A>, suits: (entry: A) => boolean): A | undefined {
  return findIn(self.root, suits)
}

/**
 * The slots whose entries two maps do not share, in order. Parts that both share are not looked at: after a change of
 * one entry it costs O(log n).
 *
 * @since 0.1.0
 * @category getters
 */
export function changes<A>(before: SlotMap<A>, after: SlotMap<A>): Array<number> {
  const found: Array<number> = []
  const shift = Math.max(before.shift, after.shift)
  changesIn(raised(before, shift), raised(after, shift), shift, 0, found)
  return found
}

const hollow: Node<never> = { bits: 0, count: 0, items: [], children: [] }

function within(slot: number, shift: number): boolean {
  return slot >= 0 && slot < 32 << shift
}

function digit(slot: number, shift: number): number {
  return (slot >>> shift) & 31
}

/** Where the part or entry for a digit is among the packed ones; -1 when there is none. */
function placeOf<A>(node: Node<A>, at: number): number {
  const bit = 1 << at
  return (node.bits & bit) === 0 ? -1 : popcount(node.bits & (bit - 1))
}

function setIn<A>(node: Node<A>, shift: number, slot: number, entry: A): Node<A> {
  const bit = 1 << digit(slot, shift)
  const present = (node.bits & bit) !== 0
  const place = popcount(node.bits & (bit - 1))
  const bits = node.bits | bit
  if (shift === 0) {
    const items = withAt(node.items, place, present, entry)
    return { bits, count: items.length, items, children: node.children }
  }
  const old = present ? node.children[place] ?? hollow : hollow
  const child = setIn(old, shift - 5, slot, entry)
  const count = node.count - old.count + child.count
  return { bits, count, items: node.items, children: withAt(node.children, place, present, child) }
}

function removeIn<A>(node: Node<A>, shift: number, slot: number): Node<A> {
  const at = digit(slot, shift)
  const place = placeOf(node, at)
  if (place < 0) return node
  if (shift === 0) {
    const items = node.items.filter((_, index) => index !== place)
    return { bits: node.bits & ~(1 << at), count: items.length, items, children: node.children }
  }
  const old = node.children[place] ?? hollow
  const child = removeIn(old, shift - 5, slot)
  if (child === old) return node
  const count = node.count - 1
  return child.count > 0
    ? { bits: node.bits, count, items: node.items, children: withAt(node.children, place, true, child) }
    : {
      bits: node.bits & ~(1 << at),
      count,
      items: node.items,
      children: node.children.filter((_, index) => index !== place)
    }
}

function nextIn<A>(node: Node<A>, shift: number, from: number): A | undefined {
  const at = digit(from, shift)
  const later = node.bits & (-1 << at)
  if (shift === 0) return later === 0 ? undefined : node.items[popcount(node.bits & (lowest(later) - 1))]
  const place = placeOf(node, at)
  const child = node.children[place]
  const found = child === undefined ? undefined : nextIn(child, shift - 5, from)
  if (found !== undefined) return found
  const beyond = later & ~(1 << at)
  if (beyond === 0) return undefined
  const sibling = node.children[popcount(node.bits & (lowest(beyond) - 1))]
  return sibling === undefined ? undefined : nextIn(sibling, shift - 5, 0)
}

function findIn<A>(node: Node<A>, suits: (entry: A) => boolean): A | undefined {
  for (const item of node.items) if (suits(item)) return item
  for (const child of node.children) {
    const found = findIn(child, suits)
    if (found !== undefined) return found
  }
  return undefined
}

/** The root as it would be with more levels above it. */
function raised<A>(self: SlotMap<A>, shift: number): Node<A> {
  let root = self.root
  for (let at = self.shift; at < shift && root.count > 0; at += 5) {
    root = { bits: 1, count: root.count, items: [], children: [root] }
  }
  return root
}

function changesIn<A>(before: Node<A>, after: Node<A>, shift: number, base: number, into: Array<number>): void {
  if (before === after) return
  let left = before.bits | after.bits
  while (left !== 0) {
    const at = 31 - Math.clz32(lowest(left))
    left &= left - 1
    const old = placeOf(before, at)
    const now = placeOf(after, at)
    if (shift > 0) {
      changesIn(before.children[old] ?? hollow, after.children[now] ?? hollow, shift - 5, base | (at << shift), into)
    } else if (before.items[old] !== after.items[now]) into.push(base | at)
  }
}

function collect<A>(node: Node<A>, into: Array<A>): void {
  for (const item of node.items) into.push(item)
  for (const child of node.children) collect(child, into)
}

function withAt<B>(all: ReadonlyArray<B>, place: number, replace: boolean, one: B): ReadonlyArray<B> {
  const copy = all.slice()
  if (replace) copy[place] = one
  else if (place === copy.length) copy.push(one)
  else copy.splice(place, 0, one)
  return copy
}

function lowest(bits: number): number {
  return bits & -bits
}

function popcount(bits: number): number {
  const pairs = bits - ((bits >>> 1) & 0x55555555)
  const fours = (pairs & 0x33333333) + ((pairs >>> 2) & 0x33333333)
  return Math.imul((fours + (fours >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24
}
