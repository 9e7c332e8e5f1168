/**
 * A persistent vector with 32-way branching: reading and replacing one element cost the same for ten keys as for ten
 * thousand, and the old vector stays as it was.
 *
 * @since 0.1.0
 */

/**
 * @since 0.1.0
 * @category models
 */
export interface Slots<A> {
  readonly size: number
  /** Five bits for each level below the root. */
  readonly shift: number
  readonly root: Node<A>
}

/** An inner node holds nodes, a leaf holds elements; `shift` tells which, so that no tag is needed. */
type Node<A> = ReadonlyArray<Node<A> | A>

/**
 * @since 0.1.0
 * @category constructors
 */
export const empty = <A>(): Slots<A> => ({ size: 0, shift: 0, root: [] })

/**
 * The element at an index; `undefined` outside the vector.
 *
 * @since 0.1.0
 * @category getters
 */
export const get = <A>(slots: Slots<A>, index: number): A | undefined => {
  if (index < 0 || index >= slots.size) return undefined
  let node = slots.root
  for (let shift = slots.shift; shift > 0; shift -= 5) {
    // Above the lowest level every entry is a node: `push` builds it so.
    node = node[(index >>> shift) & 31] as Node<A>
  }
  return node[index & 31] as A
}

/**
 * The vector with another element at an index that it has; unchanged for one that it has not.
 *
 * @since 0.1.0
 * @category combinators
 */
export const set = <A>(slots: Slots<A>, index: number, value: A): Slots<A> =>
  index < 0 || index >= slots.size
    ? slots
    : { size: slots.size, shift: slots.shift, root: replace(slots.root, slots.shift, index, value) }

const replace = <A>(node: Node<A>, shift: number, index: number, value: A): Node<A> => {
  const copy = node.slice()
  const at = (index >>> shift) & 31
  copy[at] = shift === 0 ? value : replace((copy[at] ?? []) as Node<A>, shift - 5, index, value)
  return copy
}

/**
 * The vector with one more element.
 *
 * @since 0.1.0
 * @category combinators
 */
export const push = <A>(slots: Slots<A>, value: A): Slots<A> => {
  const full = slots.size === 1 << (slots.shift + 5)
  const shift = full ? slots.shift + 5 : slots.shift
  const root: Node<A> = full ? [slots.root] : slots.root
  return { size: slots.size + 1, shift, root: replace(root, shift, slots.size, value) }
}

/**
 * The elements in order.
 *
 * @since 0.1.0
 * @category getters
 */
export function* values<A>(slots: Slots<A>): Iterable<A> {
  for (let i = 0; i < slots.size; i++) {
    // Every index below the size holds an element.
    yield get(slots, i) as A
  }
}
