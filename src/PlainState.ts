/**
 * Where a pool of plain code keeps what outlives it: memory, a file, an object with two functions, or a `PoolStore`.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import * as Deferred from "effect/Deferred"
import * as Effect from "effect/Effect"
import * as ExecutionStrategy from "effect/ExecutionStrategy"
import * as Exit from "effect/Exit"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as DurableFile from "./DurableFile.js"
import type { ConfigurationError } from "./KeymeshError.js"
import * as PoolCore from "./PoolCore.js"
import * as PoolStore from "./PoolStore.js"
import * as Checks from "./Settings.js"
import type * as SharedPool from "./SharedPool.js"

/**
 * A place for one record per pool name. A record is plain JSON; it holds key ids, never secrets.
 *
 * @since 0.1.0
 * @category models
 */
export interface Backend {
  /** The record of a pool, as it was saved; `null` or `undefined` when there is none. */
  readonly load: (pool: string) => unknown
  /** Replaces the record of a pool. */
  readonly save: (pool: string, record: unknown) => unknown
  /** Called when the client is closed, after the last save. */
  readonly close?: (() => unknown) | undefined
}

/**
 * What `state` may be.
 *
 * @since 0.1.0
 * @category models
 */
export type State =
  | "memory"
  | "file"
  | Backend
  | PoolStore.Service
  | Layer.Layer<PoolStore.PoolStore, unknown>

/**
 * The store for a `state`; what it opens is closed with the scope. Without one, and for `"memory"`, nothing is kept.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  state: unknown,
  file: unknown
): Effect.Effect<PoolStore.Service, ConfigurationError, Scope.Scope> =>
  Effect.gen(function*() {
    if (file !== undefined && state !== "file") {
      return yield* Checks.refuse("stateFile", "goes with `state: \"file\"` only")
    }
    if (state === undefined || state === "memory") return PoolStore.none
    if (state === "file") return yield* inFile(file)
    if (Layer.isLayer(state)) {
      // What it needs and may fail with is in the type of the setting; of another layer the store says so when asked.
      return yield* ofLayer(state as Layer.Layer<PoolStore.PoolStore, unknown>)
    }
    if (!isBackend(state)) {
      return yield* Checks.refuse(
        "state",
        "must be \"memory\", \"file\", an object with the functions `load` and `save`, a PoolStore, or its layer"
      )
    }
    const { close } = state
    if (close !== undefined) {
      yield* Effect.addFinalizer(() => Effect.ignore(Effect.tryPromise(async () => close.call(state))))
    }
    return ofBackend(state)
  })

/** What a `PoolStore` shares goes with it. */
const shareOf = (value: object): Pick<PoolStore.Service, "share"> =>
  "share" in value && Predicate.isFunction(value.share)
    // Of a backend with this function nobody knows more than that it is one: a `PoolStore` has it by its type.
    ? { share: value.share as NonNullable<PoolStore.Service["share"]> }
    : {}

const isBackend = (value: unknown): value is Backend =>
  Predicate.hasProperty(value, "load") && Predicate.isFunction(value.load) &&
  Predicate.hasProperty(value, "save") && Predicate.isFunction(value.save) &&
  (!("close" in value) || value.close === undefined || Predicate.isFunction(value.close))

/**
 * A `PoolStore` answers with effects, anything else with values or promises of them. A record as JSON is a record: all
 * that encoding does is to write out what decoding would fill in.
 */
const ofBackend = (backend: Backend): PoolStore.Service => ({
  load: (pool) =>
    Effect.flatMap(answerOf(() => backend.load(pool)), (found) => {
      if (Option.isOption(found)) return Option.isNone(found) ? Effect.succeedNone : recordOf(found.value)
      return found === null || found === undefined ? Effect.succeedNone : recordOf(found)
    }),
  save: (pool, record) => Effect.asVoid(answerOf(() => backend.save(pool, PoolStore.encode(record)))),
  ...shareOf(backend)
})

const recordOf = (json: unknown) => Effect.asSome(PoolStore.decode(json))

const answerOf = (ask: () => unknown): Effect.Effect<unknown, PoolStore.StoreError> =>
  Effect.suspend(() => {
    const answer = ask()
    // Of an effect that is no store's own nothing is known: what it needs is missing, and what it fails with is told.
    if (Effect.isEffect(answer)) return Effect.mapError(answer as Effect.Effect<unknown, unknown>, unreachable)
    return Predicate.isPromiseLike(answer)
      ? Effect.tryPromise({ try: () => answer, catch: unreachable })
      : Effect.succeed(answer)
  }).pipe(Effect.catchAllDefect((defect) => Effect.fail(unreachable(defect))))

const unreachable = (cause: unknown): PoolStore.StoreError =>
  cause instanceof PoolStore.StoreError
    ? cause
    : new PoolStore.StoreError({ problem: "unreachable", detail: "it failed", cause })

/**
 * Built when the pool first asks for it, however long that takes; once more, when it failed. It is given up after what
 * is done at the pool's end: its place among the finalizers is taken here.
 */
const ofLayer = (layer: Layer.Layer<PoolStore.PoolStore, unknown>) =>
  Effect.gen(function*() {
    const scope = yield* Effect.flatMap(Effect.scope, (outer) => Scope.fork(outer, ExecutionStrategy.sequential))
    const building = MutableRef.make<Fiber.RuntimeFiber<PoolStore.Service, PoolStore.StoreError> | undefined>(undefined)
    const build = Effect.gen(function*() {
      const own = yield* Scope.fork(scope, ExecutionStrategy.sequential)
      const context = yield* Layer.buildWithScope(layer, own).pipe(
        Effect.onError((cause) => Scope.close(own, Exit.failCause(cause)))
      )
      return Context.get(context, PoolStore.PoolStore)
    }).pipe(Effect.mapError(unreachable))
    // Whoever waits for it may leave: the building goes on.
    const built = Effect.gen(function*() {
      const fiber = MutableRef.get(building) ?? (yield* Effect.forkIn(build, scope))
      MutableRef.set(building, fiber)
      return yield* Effect.onError(Fiber.join(fiber), () =>
        Effect.sync(() => {
          if (fiber.unsafePoll() !== null) MutableRef.set(building, undefined)
        }))
    })
    const store: PoolStore.Service = {
      load: (pool) => Effect.flatMap(built, (store) => store.load(pool)),
      save: (pool, record) => Effect.flatMap(built, (store) => store.save(pool, record)),
      share: (pool) => shareLater(built, pool)
    }
    return store
  })

/** What a store shares that is still to be built, if it does. Until then, and if it does not, nobody else is there. */
const shareLater = (
  built: Effect.Effect<PoolStore.Service, unknown>,
  pool: string
): Effect.Effect<SharedPool.SharedPool, never, Scope.Scope> =>
  Effect.gen(function*() {
    const port = yield* Deferred.make<SharedPool.SharedPool | undefined>()
    const scope = yield* Effect.scope
    yield* Effect.forkIn(
      Effect.flatMap(built, ({ share }) =>
        share === undefined ? Effect.succeed(undefined) : Effect.flatMap(share(pool), PoolCore.bounded)).pipe(
          Effect.orElseSucceed(() =>
            undefined
          ),
          Scope.extend(scope),
          Effect.flatMap((found) => Deferred.succeed(port, found))
        ),
      scope
    )
    const whenThere = <A>(f: (port: SharedPool.SharedPool) => Effect.Effect<A>, otherwise: A): Effect.Effect<A> =>
      Effect.flatMap(Deferred.poll(port), (found) =>
        Option.isNone(found)
          ? Effect.succeed(otherwise)
          : Effect.flatMap(found.value, (port) => port === undefined ? Effect.succeed(otherwise) : f(port)))
    return {
      news: Stream.unwrap(Effect.map(Deferred.await(port), (port) => port === undefined ? Stream.empty : port.news)),
      tell: (notices) => whenThere<SharedPool.Told>((port) => port.tell(notices), { _tag: "Away" }),
      claim: (claim) => whenThere<SharedPool.Answer>((port) => port.claim(claim), { _tag: "Away" }),
      claimTimeout: Infinity,
      settle: (ticket, settled) => whenThere((port) => port.settle(ticket, settled), undefined)
    }
  })

// ----------------------------------------------------------------------------------------------------------------- file

/**
 * One JSON file with the records of all pools that name it, replaced as a whole: see `DurableFile`. It is read on the
 * spot, and written beside what goes on.
 */
const inFile = (path: unknown): Effect.Effect<PoolStore.Service, ConfigurationError> =>
  Effect.gen(function*() {
    if (path !== undefined && (typeof path !== "string" || path.trim() === "")) {
      return yield* Checks.refuse("stateFile", "must be the path of a file")
    }
    const fs = platform.process?.getBuiltinModule?.("node:fs")
    if (fs === undefined) {
      return yield* Checks.refuse(
        "state",
        "this platform has no files: give an object with the functions `load` and `save`"
      )
    }
    const [, folder = "", name = ""] = /^(.*[/\\])?([^/\\]*)$/s.exec(path ?? ".keymesh-state.json") ?? []
    if (name === "") return yield* Checks.refuse("stateFile", "must be the path of a file")
    const files = yield* DurableFile.inDirectory(filesOf(fs), folder === "" ? "." : folder)
    const read = Effect.mapError(files.read(name), unreachable)
    return {
      load: (pool) =>
        Effect.flatMap(read, (bytes) => {
          if (Option.isNone(bytes)) return Effect.succeedNone
          return Effect.flatMap(
            recordsOf(bytes.value),
            (records) => Object.hasOwn(records, pool) ? recordOf(records[pool]) : Effect.succeedNone
          ).pipe(
            Effect.tapError(() => files.keepAside(name, bytes.value))
          )
        }),
      save: (pool, record) =>
        turns.withPermits(1)(Effect.gen(function*() {
          const bytes = yield* read
          const others = Option.isNone(bytes)
            ? {}
            : yield* Effect.catchAll(recordsOf(bytes.value), () => Effect.as(files.keepAside(name, bytes.value), {}))
          // A name is no more than a name, also where it is `__proto__`.
          const records = Object.fromEntries([...Object.entries(others), [pool, PoolStore.encode(record)]])
          yield* Effect.mapError(
            files.write(name, new TextEncoder().encode(JSON.stringify(records))),
            unreachable
          )
        }))
    }
  })

const recordsOf = (bytes: Uint8Array): Effect.Effect<Record<string, unknown>, PoolStore.StoreError> =>
  Effect.flatMap(
    Effect.try({
      try: (): unknown => JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes)),
      catch: () => new PoolStore.StoreError({ problem: "unreadable", detail: "it is no JSON" })
    }),
    (read) =>
      Predicate.isRecord(read)
        ? Effect.succeed(read)
        : new PoolStore.StoreError({ problem: "unreadable", detail: "it has no records" })
  )

/** Pools of one process take turns, so that none overwrites another's record in the file that they share. */
const turns = Effect.unsafeMakeSemaphore(1)

const filesOf = (fs: NodeFs): DurableFile.Files<unknown> => {
  const files = fs.promises
  const doing = <A>(work: () => Promise<A>) => Effect.tryPromise({ try: work, catch: (cause) => cause })
  const synced = async (path: string, flag: string, mode?: number, bytes?: Uint8Array) => {
    const file = await files.open(path, flag, mode)
    try {
      if (bytes !== undefined) await file.writeFile(bytes)
      await file.sync()
    } finally {
      await file.close()
    }
  }
  return {
    join: (folder, name) => folder === "." ? name : `${folder}${name}`,
    read: (path) =>
      Effect.try({
        try: () => fs.existsSync(path) ? Option.some(fs.readFileSync(path)) : Option.none(),
        catch: (cause) => cause
      }),
    create: (path, bytes) =>
      doing(() => synced(path, "wx", 0o600, bytes)).pipe(
        Effect.tapError((cause) =>
          Predicate.hasProperty(cause, "code") && cause.code === "EEXIST"
            ? Effect.void
            : Effect.ignore(doing(() => files.unlink(path)))
        )
      ),
    rename: (from, to) => doing(() => files.rename(from, to)),
    remove: (path) => doing(() => files.unlink(path)),
    list: (folder) => doing(() => files.readdir(folder)),
    writtenAt: (path) => Effect.map(doing(() => files.stat(path)), ({ mtimeMs }) => mtimeMs),
    makeDirectory: (path) => doing(() => files.mkdir(path, { recursive: true, mode: 0o700 })),
    syncDirectory: (path) => doing(() => synced(path, "r"))
  }
}

/** What is used of `node:fs`, asked for at run time, so that nothing of Node.js is imported where it is not there. */
interface NodeFs {
  existsSync(path: string): boolean
  readFileSync(path: string): Uint8Array
  readonly promises: {
    open(path: string, flag: string, mode?: number): Promise<{
      writeFile(bytes: Uint8Array): Promise<void>
      sync(): Promise<void>
      close(): Promise<void>
    }>
    rename(from: string, to: string): Promise<void>
    unlink(path: string): Promise<void>
    readdir(path: string): Promise<ReadonlyArray<string>>
    stat(path: string): Promise<{ readonly mtimeMs: number }>
    mkdir(path: string, options: { readonly recursive: true; readonly mode: number }): Promise<unknown>
  }
}

const platform = globalThis as {
  readonly process?: { readonly getBuiltinModule?: (id: "node:fs") => NodeFs | undefined }
}
