/**
 * What outlives a process: the port through which a pool keeps its cooldowns, breakers, limits and counters; in memory, in
 * a file, in any `KeyValueStore`. Records hold key ids, never secrets, and nothing that is in flight.
 *
 * A store of your own has two methods; `PoolStoreContract` checks it.
 *
 * @since 0.1.0
 */
import type { PlatformError } from "@effect/platform/Error"
import * as FileSystem from "@effect/platform/FileSystem"
import * as KeyValueStore from "@effect/platform/KeyValueStore"
import * as Path from "@effect/platform/Path"
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
import * as DurableFile from "./DurableFile.js"
import type { ConfigurationError } from "./KeymeshError.js"
import { StoredPool } from "./PoolRecord.js"
import * as Checks from "./Settings.js"
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
 * The port: a place for one record per pool name. A record that is saved replaces the one before as a whole: whoever loads
 * finds one or the other. What cannot be read is `StoreError` with `unreadable`; the pool then starts fresh and says so.
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
 * Reads a record from the text that `toText` made of it.
 *
 * @since 0.1.0
 * @category encoding
 */
export const fromText = (text: string): Effect.Effect<StoredPool, StoreError> =>
  Effect.flatMap(
    Effect.try({
      // The reason would show what the text holds.
      try: (): unknown => JSON.parse(text),
      catch: () => new StoreError({ problem: "unreadable", detail: "it is no JSON" })
    }),
    decode
  )

const fromBytes = (bytes: Uint8Array): Effect.Effect<StoredPool, StoreError> =>
  Effect.flatMap(
    Effect.try({
      try: () => new TextDecoder("utf-8", { fatal: true }).decode(bytes),
      catch: () => new StoreError({ problem: "unreadable", detail: "it is no text" })
    }),
    fromText
  )

/**
 * A record as one line of JSON. A record is its own encoding, with fields written out that may be left out: of many keys
 * this takes a tenth of the time.
 *
 * @since 0.1.0
 * @category encoding
 */
export const toText = (record: typeof StoredPool.Encoded): string => JSON.stringify(record)

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

// ----------------------------------------------------------------------------------------------------------------- files

/**
 * Where records are kept in files.
 *
 * @since 0.1.0
 * @category models
 */
export interface FileSettings {
  /** The directory; it is made when it is needed, for its owner alone. */
  readonly directory: string
}

/**
 * A store that keeps each pool in a file of its own, as JSON: `openai.json` for a pool named `openai`; characters other
 * than `a-z`, `0-9`, `-`, `_` are escaped. Needs the `FileSystem` and `Path` of your platform (`NodeContext.layer`).
 *
 * A record is written beside, brought to the disk, and renamed over the one before, so that neither a killed process
 * nor the loss of power leaves half of one. Files are readable for their owner alone (0600), as is the directory if it
 * was not there (0700). What killed writers left is removed after a minute.
 *
 * A file that cannot be read (damaged, foreign, or of a newer version) is `StoreError` with `unreadable`: it is kept
 * beside as `openai.json.unreadable`, in place of an earlier one, before the pool's next record replaces it.
 *
 * Several processes may use one directory. Those whose pools have the same name share its file, and the last to save
 * wins; they know nothing of each other while they run.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeFile = (
  settings: FileSettings
): Effect.Effect<Service, ConfigurationError, FileSystem.FileSystem | Path.Path> =>
  Effect.gen(function*() {
    yield* Checks.refuseUnknown(settings, ["directory"], "")
    if (typeof settings.directory !== "string" || settings.directory.trim() === "") {
      return yield* Checks.refuse("directory", "must be the path of a directory")
    }
    const files = yield* DurableFile.inDirectory(
      filesOf(yield* FileSystem.FileSystem, yield* Path.Path),
      settings.directory
    )
    const fileOf = (pool: string) => `${DurableFile.nameOf(pool)}.json`
    return {
      load: (pool) =>
        Effect.flatMap(
          Effect.mapError(files.read(fileOf(pool)), unreachable),
          Option.match({
            onNone: () => Effect.succeedNone,
            onSome: (bytes) => orKeepAside(fromBytes(bytes), files.keepAside(fileOf(pool), bytes))
          })
        ),
      save: (pool, record) =>
        Effect.suspend(() =>
          Effect.mapError(files.write(fileOf(pool), new TextEncoder().encode(toText(record))), unreachable)
        )
    }
  })

/**
 * A store that keeps each pool in a file of its own, as a layer; see `makeFile`.
 *
 * @example
 * ```ts
 * import { NodeContext } from "@effect/platform-node"
 * import { Layer } from "effect"
 * import * as PoolStore from "effect-keymesh/PoolStore"
 * import * as Telemetry from "effect-keymesh/Telemetry"
 *
 * // In place of `KeyPool.layerDefaults`, which keeps records in memory.
 * const Durable = Layer.merge(
 *   Telemetry.layer,
 *   PoolStore.layerFile({ directory: "/var/lib/app/keymesh" }).pipe(Layer.provide(NodeContext.layer))
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerFile = (
  settings: FileSettings
): Layer.Layer<PoolStore, ConfigurationError, FileSystem.FileSystem | Path.Path> =>
  Layer.effect(PoolStore, makeFile(settings))

const filesOf = (fs: FileSystem.FileSystem, path: Path.Path): DurableFile.Files<PlatformError> => ({
  join: (directory, name) => path.join(directory, name),
  read: (file) =>
    Effect.asSome(fs.readFile(file)).pipe(
      Effect.catchIf((error) => error._tag === "SystemError" && error.reason === "NotFound", () => Effect.succeedNone)
    ),
  create: (file, bytes) =>
    Effect.scoped(
      Effect.flatMap(fs.open(file, { flag: "wx", mode: 0o600 }), (opened) =>
        Effect.zipRight(opened.writeAll(bytes), opened.sync).pipe(
          Effect.onError(() =>
            Effect.ignore(fs.remove(file))
          )
        ))
    ),
  rename: fs.rename,
  remove: (file) => fs.remove(file),
  list: (directory) => fs.readDirectory(directory),
  writtenAt: (file) =>
    Effect.map(fs.stat(file), ({ mtime }) => Option.match(mtime, { onNone: () => 0, onSome: (at) => at.getTime() })),
  makeDirectory: (directory) => fs.makeDirectory(directory, { recursive: true, mode: 0o700 }),
  syncDirectory: (directory) =>
    Effect.scoped(Effect.flatMap(fs.open(directory, { flag: "r" }), (opened) => opened.sync))
})

const unreachable = (error: PlatformError): StoreError =>
  new StoreError({
    problem: "unreachable",
    detail: error._tag === "SystemError" ? `${error.method}: ${error.reason}` : error.method,
    cause: error
  })

/** What cannot be read is kept aside, and where is told; a record that can be read is there. */
const orKeepAside = (
  reading: Effect.Effect<StoredPool, StoreError>,
  keepAside: Effect.Effect<string>
): Effect.Effect<Option.Option<StoredPool>, StoreError> =>
  reading.pipe(
    Effect.asSome,
    Effect.catchAll(({ detail, problem }) =>
      Effect.flatMap(keepAside, (aside) => new StoreError({ problem, detail: `${detail}; kept as ${aside}` }))
    )
  )

// ------------------------------------------------------------------------------------------------------ key-value stores

/**
 * A store over a `KeyValueStore` of `@effect/platform`: one value per pool, as JSON, under `keymesh-` and the pool's name,
 * escaped as in `makeFile`. What cannot be read is kept beside, under the same key with `.unreadable`.
 *
 * It is as durable as that store is. `KeyValueStore.layerFileSystem` neither replaces files as a whole nor brings them to
 * the disk: for files, `makeFile` is better.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeKeyValueStore: Effect.Effect<Service, never, KeyValueStore.KeyValueStore> = Effect.map(
  KeyValueStore.KeyValueStore,
  (values): Service => {
    const keyOf = (pool: string) => `keymesh-${DurableFile.nameOf(pool)}`
    return {
      load: (pool) =>
        Effect.flatMap(
          Effect.mapError(values.get(keyOf(pool)), unreachable),
          Option.match({
            onNone: () => Effect.succeedNone,
            onSome: (text) => {
              const aside = `${keyOf(pool)}.unreadable`
              return orKeepAside(fromText(text), Effect.as(Effect.ignore(values.set(aside, text)), aside))
            }
          })
        ),
      save: (pool, record) =>
        Effect.suspend(() => Effect.mapError(values.set(keyOf(pool), toText(record)), unreachable))
    }
  }
)

/**
 * A store over a `KeyValueStore` of `@effect/platform`, as a layer; see `makeKeyValueStore`.
 *
 * @example
 * ```ts
 * import { KeyValueStore } from "@effect/platform"
 * import { Layer } from "effect"
 * import * as PoolStore from "effect-keymesh/PoolStore"
 *
 * const Store = PoolStore.layerKeyValueStore.pipe(Layer.provide(KeyValueStore.layerMemory))
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerKeyValueStore: Layer.Layer<PoolStore, never, KeyValueStore.KeyValueStore> = Layer.effect(
  PoolStore,
  makeKeyValueStore
)
