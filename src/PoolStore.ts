/**
 * What outlives a process: the port through which a pool keeps its cooldowns, breakers and counters, and the memory
 * implementation. Records hold key ids, never secrets, and nothing that is in flight.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as HashMap from "effect/HashMap"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as ParseResult from "effect/ParseResult"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import { StoredPool } from "./PoolRecord.js"
import type { SharedPool } from "./SharedPool.js"

/**
 * The store could not be reached, or holds something that cannot be read.
 *
 * @since 0.1.0
 * @category errors
 */
export class StoreError extends Data.TaggedError("StoreError")<{
  readonly problem: "unreachable" | "unreadable"
  readonly detail: string
  readonly cause?: unknown
}> {
  override get message(): string {
    return `The pool's store is ${this.problem}: ${this.detail}`
  }
}

/**
 * The port: a place for one record per pool name.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  /** The record of a pool; none when it was never saved. */
  readonly load: (pool: string) => Effect.Effect<Option.Option<StoredPool>, StoreError>
  /** Replaces the record of a pool. */
  readonly save: (pool: string, record: StoredPool) => Effect.Effect<void, StoreError>
  /** What the processes that use this store share of a pool; absent where each is on its own. */
  readonly share?: ((pool: string) => Effect.Effect<SharedPool, never, Scope.Scope>) | undefined
}

/**
 * Where pools keep what outlives them.
 *
 * @since 0.1.0
 * @category tags
 */
export class PoolStore extends Context.Tag("effect-keymesh/PoolStore")<PoolStore, Service>() {}

/**
 * No store: a pool with this one keeps nothing, and spends no time on it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const none: Service = { load: () => Effect.succeedNone, save: () => Effect.void }

/**
 * Reads a record that some store kept as JSON; anything else is `StoreError` with `unreadable`.
 *
 * @since 0.1.0
 * @category encoding
 */
export const decode = (json: unknown): Effect.Effect<StoredPool, StoreError> =>
  Effect.mapError(decodeRecord(json), (error) =>
    new StoreError({
      problem: "unreadable",
      // Where, but not what: a value may be anything.
      detail: ParseResult.ArrayFormatter.formatErrorSync(error)
        .map(({ path }) => path.length === 0 ? "it is no record of a pool" : path.join(".")).join(", ")
    }))

const decodeRecord = Schema.decodeUnknown(StoredPool)

/**
 * A record as JSON.
 *
 * @since 0.1.0
 * @category encoding
 */
export const encode: (record: StoredPool) => typeof StoredPool.Encoded = Schema.encodeSync(StoredPool)

/**
 * A store in memory: pools built later in the same program find what earlier ones knew.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeMemory: Effect.Effect<Service> = Effect.map(
  Ref.make(HashMap.empty<string, StoredPool>()),
  (records): Service => ({
    load: (pool) => Effect.map(Ref.get(records), HashMap.get(pool)),
    save: (pool, record) => Ref.update(records, HashMap.set(pool, record))
  })
)

/**
 * A store in memory, as a layer: one value, so that every pool of a program shares it. It ends with the process. Pools
 * find their record by `name`; two of the same name share it, and the last one to save it wins.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerMemory: Layer.Layer<PoolStore> = Layer.effect(PoolStore, makeMemory)
