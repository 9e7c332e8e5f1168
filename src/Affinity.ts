/**
 * What is remembered of calls that belong together: which key a conversation stays with, and which group made a stored
 * resource. Pure and bounded: the most recent names are kept, and none for longer than its time.
 *
 * @since 0.1.0
 */
import * as Hash from "effect/Hash"
import * as HashMap from "effect/HashMap"
import * as RedBlackTree from "effect/RedBlackTree"

/**
 * The two books of a pool. They are apart so that many conversations do not push stored resources out.
 *
 * @since 0.1.0
 * @category models
 */
export interface Affinity {
  /** By the caller's name for what belongs together: the id of the key that served it last. */
  readonly conversations: Book
  /** By the provider's id: the group that made it, or found it. */
  readonly resources: Book
}

/**
 * Who holds what, by name.
 *
 * @since 0.1.0
 * @category models
 */
export interface Book {
  readonly entries: HashMap.HashMap<string, Entry>
  /** The names, in order of their last use. */
  readonly order: RedBlackTree.RedBlackTree<number, string>
  readonly uses: number
  /** Counts the changes of who holds what, for those that keep it: mere uses do not count. */
  readonly changes: number
}

/**
 * @since 0.1.0
 * @category models
 */
export interface Entry {
  readonly holder: string
  /** When it was used last, and which use of the book that was. */
  readonly at: number
  readonly use: number
}

/**
 * What a call wants: to be where its conversation is, and where the stored resources are that it names.
 *
 * @since 0.1.0
 * @category models
 */
export interface Wish {
  readonly conversation: string | undefined
  readonly resources: ReadonlyArray<string>
}

/**
 * What the success of a lease is remembered for. `from` is where the conversation was when the lease began; one that has
 * moved meanwhile stays where it is. Without `conversation` the lease was only a guest.
 *
 * @since 0.1.0
 * @category models
 */
export interface Bond extends Wish {
  readonly from: string | undefined
}

/**
 * How many names a book keeps, and for how long after their last use: 100,000 and 30 days. Uses within a minute are one,
 * so that a busy conversation costs no more than a look.
 *
 * @since 0.1.0
 * @category constants
 */
export const limits = { names: 100_000, millis: 30 * 24 * 3_600_000, oneUseMillis: 60_000 } as const

/**
 * A book without entries.
 *
 * @since 0.1.0
 * @category constructors
 */
export const emptyBook: Book = {
  entries: HashMap.empty(),
  order: RedBlackTree.empty((a: number, b: number) => a < b ? -1 : a > b ? 1 : 0),
  uses: 0,
  changes: 0
}

/**
 * Nothing is remembered.
 *
 * @since 0.1.0
 * @category constructors
 */
export const empty: Affinity = { conversations: emptyBook, resources: emptyBook }

/**
 * A caller's name for what belongs together, or a provider's for what it stores, as the book keeps it: a long one is cut,
 * and told apart by a hash.
 *
 * @since 0.1.0
 * @category constructors
 */
export const nameOf = (text: string): string =>
  text.length <= longestName ? text : `${text.slice(0, longestName)}…${text.length}.${Hash.string(text).toString(36)}`

const longestName = 200

/**
 * Who holds what has this name; `undefined` when that is not known, or too long ago.
 *
 * @since 0.1.0
 * @category getters
 */
export const holderOf = (book: Book, name: string, now: number): string | undefined => {
  const entry = HashMap.get(book.entries, name)
  return entry._tag === "Some" && now < entry.value.at + limits.millis ? entry.value.holder : undefined
}

/**
 * How many names a book has.
 *
 * @since 0.1.0
 * @category getters
 */
export const size = (book: Book): number => HashMap.size(book.entries)

/**
 * Remembers who holds these names, as of `now`. Where there are too many, those longest unused make room.
 *
 * @since 0.1.0
 * @category steps
 */
export const remember = (
  book: Book,
  names: ReadonlyArray<string>,
  holder: string,
  now: number,
  most: number = limits.names
): Book => names.reduce((next, name) => noted(next, name, holder, now, most), book)

const noted = (book: Book, name: string, holder: string, now: number, most: number): Book => {
  const before = HashMap.get(book.entries, name)
  const isNew = before._tag === "None" || before.value.holder !== holder
  if (!isNew && now < before.value.at + limits.oneUseMillis) return book
  const use = book.uses + 1
  let { entries, order } = book
  if (before._tag === "Some") order = RedBlackTree.removeFirst(order, before.value.use)
  entries = HashMap.set(entries, name, { holder, at: now, use })
  order = RedBlackTree.insert(order, use, name)
  // One came, so that one goes at most; and one more while what is oldest is over.
  for (let left = 2; left > 0; left--) {
    const oldest = RedBlackTree.first(order)
    if (oldest._tag === "None") break
    const [oldestUse, oldestName] = oldest.value
    const entry = HashMap.get(entries, oldestName)
    const isOver = entry._tag === "None" || now >= entry.value.at + limits.millis
    if (HashMap.size(entries) <= most && !isOver) break
    entries = HashMap.remove(entries, oldestName)
    order = RedBlackTree.removeFirst(order, oldestUse)
  }
  return { entries, order, uses: use, changes: isNew ? book.changes + 1 : book.changes }
}

/**
 * A book with what another, later one knows beside.
 *
 * @since 0.1.0
 * @category steps
 */
export const merged = (book: Book, later: Book): Book => {
  let next: Book = { ...book, changes: book.changes + later.changes }
  for (const name of RedBlackTree.values(later.order)) {
    const entry = HashMap.get(later.entries, name)
    if (entry._tag === "Some") next = remember(next, [name], entry.value.holder, entry.value.at)
  }
  return next
}

/**
 * Forgets names.
 *
 * @since 0.1.0
 * @category steps
 */
export const forget = (book: Book, names: ReadonlyArray<string>): Book =>
  names.reduce((next, name) => {
    const entry = HashMap.get(next.entries, name)
    return entry._tag === "None" ? next : {
      ...next,
      entries: HashMap.remove(next.entries, name),
      order: RedBlackTree.removeFirst(next.order, entry.value.use),
      changes: next.changes + 1
    }
  }, book)

/**
 * How well a key suits a name, by weighted rendezvous: whoever knows the same keys finds the same order of them, without
 * a word between processes; and a key that comes or goes changes the place of its own share only.
 *
 * @since 0.1.0
 * @category placement
 */
export const score = (name: string, keyId: string, weight: number): number => {
  const drawn = (mixed(Hash.string(name) ^ mixed(Hash.string(keyId))) + 0.5) / 2 ** 32
  return -weight / Math.log(drawn)
}

/** Spreads what differs in a few bits over all of them (the finalizer of MurmurHash3). */
const mixed = (hash: number): number => {
  let bits = hash ^ (hash >>> 16)
  bits = Math.imul(bits, 0x85ebca6b)
  bits ^= bits >>> 13
  bits = Math.imul(bits, 0xc2b2ae35)
  return (bits ^ (bits >>> 16)) >>> 0
}
