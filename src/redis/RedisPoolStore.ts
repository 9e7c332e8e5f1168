/**
 * Pools on Redis: records that outlive a process, and everything that several processes must share to be one pool.
 *
 * @since 0.1.0
 */
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import type { ConfigurationError } from "../KeymeshError.js"
import * as PoolStore from "../PoolStore.js"
import * as RedisLink from "./RedisLink.js"
import * as RedisSettings from "./RedisSettings.js"
import * as RedisSharedPool from "./RedisSharedPool.js"
import * as Scripts from "./Scripts.js"
import * as Wording from "./Wording.js"

/**
 * The settings of a store on Redis: `url` or `client`, and whatever else differs from the defaults.
 *
 * @since 0.1.0
 * @category models
 */
export type Settings = RedisSettings.Settings

/**
 * How TLS is spoken.
 *
 * @since 0.1.0
 * @category models
 */
export type Tls = RedisSettings.Tls

/**
 * A store on Redis. It does not wait for Redis, and goes on trying for as long as the scope is open: while Redis is away,
 * pools go on with what they know. Fails with `ConfigurationError`, which names the field, for settings that make no sense.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  settings: Settings
): Effect.Effect<PoolStore.Service, ConfigurationError, Scope.Scope> =>
  Effect.gen(function*() {
    const resolved = yield* RedisSettings.resolve(settings)
    const link = yield* RedisLink.make(resolved, Scripts.all)
    const { commandMillis, prefix, recordMillis } = resolved
    const recordOf = (pool: string) => Wording.namesOf(prefix, pool).record
    const ready = <A>(command: Effect.Effect<A, RedisLink.Unreached>) =>
      Effect.mapError(Effect.zipRight(link.whenReady(commandMillis), command), unreachable)
    return {
      load: (pool) =>
        Effect.flatMap(ready(link.get(recordOf(pool), commandMillis)), (found) =>
          found === undefined
            ? Effect.succeedNone
            : Effect.asSome(Effect.flatMap(parsed(found), PoolStore.decode))),
      save: (pool, record) =>
        ready(link.set(recordOf(pool), JSON.stringify(PoolStore.encode(record)), recordMillis, commandMillis)),
      share: (pool) => RedisSharedPool.make(link, resolved, pool)
    }
  })

/**
 * A store on Redis, as a layer: one value, so that all pools of a program share the connections. Pools of one name in
 * several processes are one pool.
 *
 * @example
 * ```ts
 * import { Layer } from "effect"
 * import * as ApiKey from "effect-keymesh/ApiKey"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 * import * as RedisPoolStore from "effect-keymesh/RedisPoolStore"
 * import * as Telemetry from "effect-keymesh/Telemetry"
 *
 * const Live = OpenAi.layerConfig({ keys: ApiKey.config("OPENAI_API_KEYS") }).pipe(
 *   Layer.provide([RedisPoolStore.layer({ url: "redis://localhost:6379" }), Telemetry.layer])
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = (settings: Settings): Layer.Layer<PoolStore.PoolStore, ConfigurationError> =>
  Layer.scoped(PoolStore.PoolStore, make(settings))

/**
 * As `layer`, with settings from `Config`.
 *
 * @example
 * ```ts
 * import { Config } from "effect"
 * import * as RedisPoolStore from "effect-keymesh/RedisPoolStore"
 *
 * const Store = RedisPoolStore.layerConfig({
 *   url: Config.redacted("REDIS_URL"),
 *   prefix: Config.string("REDIS_PREFIX").pipe(Config.withDefault("keymesh"))
 * })
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<Settings>
): Layer.Layer<PoolStore.PoolStore, ConfigError | ConfigurationError> =>
  Layer.scoped(PoolStore.PoolStore, Effect.flatMap(Config.unwrap(config), make))

const unreachable = ({ problem }: RedisLink.Unreached) =>
  new PoolStore.StoreError({ problem: "unreachable", detail: problem })

const parsed = (text: string): Effect.Effect<unknown, PoolStore.StoreError> =>
  Effect.try({
    try: (): unknown => JSON.parse(text),
    catch: () => new PoolStore.StoreError({ problem: "unreadable", detail: "it is no JSON" })
  })
