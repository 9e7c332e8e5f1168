/**
 * The pool: turns an effect that needs a key into one that picks a healthy key, sends, reads the answer for what it says
 * about the key, rotates or waits, and tells what happened.
 *
 * This is its public face; the rooms behind it are `Calls`, `PooledStreams`, `PoolControls` and `PoolUpkeep`, over one
 * `PoolCore`.
 *
 * @since 0.1.0
 */
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Option from "effect/Option"
import type * as Scope from "effect/Scope"
import type * as Stream from "effect/Stream"
import * as Calls from "./Calls.js"
import type { RunOptions } from "./Calls.js"
import type * as CircuitBreaker from "./CircuitBreaker.js"
import type * as Explanation from "./Explanation.js"
import type { Lease } from "./HeldLease.js"
import type { ConfigurationError, PoolError } from "./KeymeshError.js"
import type * as Keyring from "./Keyring.js"
import * as PoolControls from "./PoolControls.js"
import type { ExplainOptions } from "./PoolControls.js"
import * as PoolCore from "./PoolCore.js"
import * as PooledStreams from "./PooledStreams.js"
import type { StreamOptions } from "./PooledStreams.js"
import * as PoolSettings from "./PoolSettings.js"
import type { PoolSnapshot } from "./PoolSnapshot.js"
import * as PoolStore from "./PoolStore.js"
import * as PoolUpkeep from "./PoolUpkeep.js"
import * as Telemetry from "./Telemetry.js"

/** What `run` and `stream` may be told of a call, and what they give to it. */
export type { ExplainOptions, Lease, RunOptions, StreamOptions }

/**
 * A pool of keys.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  readonly name: string
  /**
   * Runs an effect with a leased key, again with another when the attempt fails in a way that another key or a little
   * time can mend. Its own failures come back untouched; beside them, `PoolError`.
   */
  readonly run: <A, E, R>(
    use: (lease: Lease) => Effect.Effect<A, E, R>,
    options?: RunOptions<A, E>
  ) => Effect.Effect<A, E | PoolError, R>
  /**
   * As `run`, for streams: what fails before the first committing element is tried again, later failures pass. The lease
   * is held until the stream ends, is interrupted, or goes unread for `streamIdle`. A deadline is for that first element.
   */
  readonly stream: <A, E, R>(
    use: (lease: Lease) => Stream.Stream<A, E, R>,
    options?: StreamOptions<A, E>
  ) => Stream.Stream<A, E | PoolError, R>
  /** One lease, held until the scope closes; for protocols that `run` does not fit. Waits for a key as `run` does. */
  readonly lease: Effect.Effect<Lease, PoolError, Scope.Scope>
  /** The pool at this moment. */
  readonly snapshot: Effect.Effect<PoolSnapshot>
  /**
   * What a call would meet that began now, key by key: which it would get, and what holds the others back. Nothing is
   * leased. `CallOptions` around it count as around a call. (Of a strategy that draws lots it tells one draw.)
   */
  readonly explain: (options?: ExplainOptions) => Effect.Effect<Explanation.Explanation>
  /** The pool now, and after each change of a key's state (not after each call). */
  readonly changes: Stream.Stream<PoolSnapshot>
  /** Adds, retires and replaces keys; the next pick sees it. */
  readonly keyring: Keyring.Service
  /** The breaker of a key, over the pool's own state; none when there is no key of that id. */
  readonly breaker: (id: string) => Effect.Effect<Option.Option<CircuitBreaker.Service>>
  /** Gives a key no new attempts until `enable`. False when there is none of that id; so for the others. */
  readonly disable: (id: string) => Effect.Effect<boolean>
  readonly enable: (id: string) => Effect.Effect<boolean>
  /** Retires a key and waits until its last attempt has ended. */
  readonly drain: (id: string) => Effect.Effect<boolean>
  /** Forgets everything held against a key: its breaker, its cooldowns, and those of its group. */
  readonly reset: (id: string) => Effect.Effect<boolean>
}

/**
 * A pool as a service.
 *
 * @since 0.1.0
 * @category tags
 */
export class KeyPool extends Context.Tag("effect-keymesh/KeyPool")<KeyPool, Service>() {}

/**
 * The settings of a pool.
 *
 * @since 0.1.0
 * @category models
 */
export type Settings = PoolSettings.Settings

/**
 * Makes a pool; it closes with its scope. Fails with `ConfigurationError`, which names the field, when a setting cannot
 * be used.
 *
 * @example
 * ```ts
 * import { Effect, Redacted } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * declare const fetchReport: (secret: string) => Effect.Effect<string, { readonly status: number }>
 *
 * const program = Effect.gen(function*() {
 *   const pool = yield* KeyPool.make({ keys: ["key-one", "key-two"], strategy: "least-used" })
 *   return yield* pool.run((lease) => fetchReport(Redacted.value(lease.key.secret)))
 * }).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: Settings
): Effect.Effect<Service, ConfigurationError, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore> =>
  Effect.flatMap(PoolSettings.resolve(settings), fromResolved)

/**
 * A pool as a layer, for as long as the layer lives. Fails as `make` does. A second pool goes under a tag of its own:
 * `layerAs`.
 *
 * @example
 * ```ts
 * import { Layer } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * const Live = KeyPool.layer({ keys: ["key-one", "key-two"], strategy: "least-used" }).pipe(
 *   Layer.provide(KeyPool.layerDefaults)
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = (
  settings: Settings
): Layer.Layer<KeyPool, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(KeyPool, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<KeyPool, ConfigError | ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> =>
  Layer.scoped(KeyPool, Effect.flatMap(Config.unwrap(config), make))

/**
 * As `layer`, under a tag of your own: for a second pool beside the first. Give each pool a `name` of its own: pools of
 * the same name share one record in the store, so that each overwrites what the other knew.
 *
 * @example
 * ```ts
 * import { Context } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 *
 * class Maps extends Context.Tag("app/Maps")<Maps, KeyPool.Service>() {}
 *
 * const MapsLive = KeyPool.layerAs(Maps, { name: "maps", keys: ["key-one", "key-two"] })
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerAs = <Self>(
  tag: Context.Tag<Self, Service>,
  settings: Settings
): Layer.Layer<Self, ConfigurationError, Telemetry.Telemetry | PoolStore.PoolStore> => Layer.scoped(tag, make(settings))

/**
 * What pools need, with its defaults: one telemetry, and a store in memory.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerDefaults: Layer.Layer<Telemetry.Telemetry | PoolStore.PoolStore> = Layer.merge(
  Telemetry.layer,
  PoolStore.layerMemory
)

const fromResolved = (
  resolved: PoolSettings.Resolved
): Effect.Effect<Service, never, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore> =>
  Effect.gen(function*() {
    const made = yield* PoolCore.make(resolved)
    const core: PoolCore.PoolCore = { ...made, loaded: yield* PoolUpkeep.start(made) }
    return {
      name: core.config.pool,
      run: (use, options) => Calls.run(core, use, options ?? {}),
      stream: (use, options) => PooledStreams.stream(core, use, options ?? {}),
      lease: Calls.lease(core),
      snapshot: PoolControls.snapshot(core),
      explain: (options) => PoolControls.explain(core, options ?? {}),
      changes: PoolControls.changes(core),
      keyring: PoolControls.keyring(core),
      breaker: (id) => PoolControls.breaker(core, id),
      disable: (id) => PoolControls.disable(core, id),
      enable: (id) => PoolControls.enable(core, id),
      drain: (id) => PoolControls.drain(core, id),
      reset: (id) => PoolControls.reset(core, id)
    }
  })
