/**
 * What a pool knows of what others take of its keys: which limits and concurrency are used up elsewhere, and which part of
 * them is its own while nobody tells.
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as DeclaredLimit from "./DeclaredLimit.js"
import * as KeyState from "./KeyState.js"

/**
 * What is known of the others. A pool that is alone, or knows of nothing that holds it back, has none of it.
 *
 * @since 0.1.0
 * @category models
 */
export interface Elsewhere {
  /** Of limits and concurrency one of so many parts is this pool's; 1: each claim is decided where all meet. */
  readonly parts: number
  /** What is closed, by a key's id, and by a group's name. */
  readonly keys: HashMap.HashMap<string, Closure>
  readonly groups: HashMap.HashMap<string, Closure>
}

/**
 * A key or a group of which others have taken what there is. When it may fit again, few ask first: as many as have asked
 * with success, and one more.
 *
 * @since 0.1.0
 * @category models
 */
export interface Closure {
  readonly gate: "limit" | "concurrency" | "probing"
  readonly until: number
  readonly earliest: number
  /** The leases that ask now, since when the first of them does, and how many may. */
  readonly asking: ReadonlyArray<number>
  readonly askedAt: number
  readonly most: number
}

/**
 * Nothing holds a pool back.
 *
 * @since 0.1.0
 * @category constructors
 */
export const nothing: Elsewhere = { parts: 1, keys: HashMap.empty(), groups: HashMap.empty() }

/**
 * What others hold back of a key.
 *
 * @since 0.1.0
 * @category gates
 */
export const gate = (self: Elsewhere, key: KeyState.KeyState, now: number): KeyState.Closed | undefined => {
  const { limits: { concurrency }, quotaGroup } = key.key
  const isFull = concurrency !== undefined && key.inFlight >= DeclaredLimit.partOf(concurrency, self.parts)
  return KeyState.both(
    isFull ? KeyState.closed("concurrency", Infinity, { earliest: -Infinity }) : undefined,
    KeyState.both(
      closureGate(HashMap.get(self.keys, key.id), now),
      quotaGroup === undefined ? undefined : closureGate(HashMap.get(self.groups, quotaGroup), now)
    )
  )
}

const closureGate = (
  found: { readonly _tag: "None" } | { readonly _tag: "Some"; readonly value: Closure },
  now: number
): KeyState.Closed | undefined => {
  if (found._tag === "None") return undefined
  const { askedAt, asking, earliest, gate, most, until } = found.value
  if (now < until) return KeyState.closed(gate, until, { earliest })
  // Whoever asks is answered long before that.
  return asking.length < most || now >= askedAt + askingMillis
    ? undefined
    : KeyState.closed(gate, askedAt + askingMillis, { earliest: -Infinity })
}

const askingMillis = 1_000
