/**
 * Which keys exist now: add, retire and replace them while programs run.
 *
 * Every pool has one (`pool.keyring`), over the pool's own state. It also stands alone, for programs that only need to
 * keep a set of keys.
 *
 * @since 0.1.0
 */
import * as Config from "effect/Config"
import type { ConfigError } from "effect/ConfigError"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import * as SubscriptionRef from "effect/SubscriptionRef"
import * as ApiKey from "./ApiKey.js"
import { ConfigurationError } from "./KeymeshError.js"

/**
 * The service.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  /** The keys that may get new attempts, in the order they joined. */
  readonly keys: Effect.Effect<ReadonlyArray<ApiKey.ApiKey>>
  /** The key of an id. */
  readonly get: (id: string) => Effect.Effect<Option.Option<ApiKey.ApiKey>>
  /** Adds a key; one that is there already stays, with the new attributes. */
  readonly add: (key: ApiKey.Input) => Effect.Effect<ApiKey.ApiKey, ConfigurationError>
  /** Takes a key out: it gets no new attempts, those that run may finish. False when there is none of that id. */
  readonly retire: (id: string) => Effect.Effect<boolean>
  /** Adds a key and retires another in one step. Fails when there is none of that id. */
  readonly replace: (id: string, key: ApiKey.Input) => Effect.Effect<ApiKey.ApiKey, ConfigurationError>
  /** The keys now, and after each change. */
  readonly changes: Stream.Stream<ReadonlyArray<ApiKey.ApiKey>>
}

/**
 * A set of keys as a service.
 *
 * @since 0.1.0
 * @category tags
 */
export class Keyring extends Context.Tag("effect-keymesh/Keyring")<Keyring, Service>() {}

/**
 * Where a keyring keeps its keys.
 *
 * @since 0.1.0
 * @category models
 */
export interface Port {
  readonly keys: Effect.Effect<ReadonlyArray<ApiKey.ApiKey>>
  /**
   * Adds a key and retires another, either or both, in one step; false when the one to retire is not there. A key that
   * replaces itself only gets new attributes.
   */
  readonly change: (add: ApiKey.ApiKey | undefined, retire: string | undefined) => Effect.Effect<boolean>
  readonly changes: Stream.Stream<ReadonlyArray<ApiKey.ApiKey>>
}

/**
 * The service over keys that somebody else keeps.
 *
 * @since 0.1.0
 * @category constructors
 */
export const makeWith = (port: Port): Service => ({
  keys: port.keys,
  get: (id) => Effect.map(port.keys, (keys) => Option.fromNullable(keys.find((key) => key.id === id))),
  add: (input) => Effect.tap(joining(port, input), (key) => port.change(key, undefined)),
  retire: (id) => port.change(undefined, id),
  replace: (id, input) =>
    Effect.flatMap(joining(port, input), (key) =>
      Effect.flatMap(port.change(key, id), (found) =>
        found
          ? Effect.succeed(key)
          : Effect.fail(new ConfigurationError({ field: "id", problem: `there is no key ${id} to replace` })))),
  changes: port.changes
})

/**
 * Whether two lists hold the same keys, with the same attributes.
 *
 * @since 0.1.0
 * @category getters
 */
export const same = (a: ReadonlyArray<ApiKey.ApiKey>, b: ReadonlyArray<ApiKey.ApiKey>): boolean =>
  a.length === b.length && a.every((key, i) => key === b[i])

/** The key of an input; if it has no place in the sequence of its own, it keeps the one it has, or comes last. */
const joining = (port: Port, input: ApiKey.Input): Effect.Effect<ApiKey.ApiKey, ConfigurationError> =>
  Effect.flatMap(port.keys, (keys) =>
    Effect.flatMap(
      ApiKey.make(input, keys.reduce((last, key) => Math.max(last, key.order + 1), 0)),
      (key) => {
        const known = keys.find(({ id }) => id === key.id)
        const placed = typeof input === "object" && "order" in input && input.order !== undefined
        return Effect.succeed(known === undefined || placed ? key : { ...key, order: known.order })
      }
    ))

/**
 * A keyring with keys of its own.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as Keyring from "effect-keymesh/Keyring"
 *
 * const program = Effect.gen(function*() {
 *   const keyring = yield* Keyring.make({ keys: ["sk-one", "sk-two"] })
 *   const [first] = yield* keyring.keys
 *   if (first !== undefined) yield* keyring.replace(first.id, { secret: "sk-three", label: "fresh" })
 * })
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (options: {
  readonly keys: ReadonlyArray<ApiKey.Input>
}): Effect.Effect<Service, ConfigurationError> =>
  Effect.gen(function*() {
    const { keys } = yield* ApiKey.makeAll(options.keys)
    const state = yield* SubscriptionRef.make(keys)
    return makeWith({
      keys: SubscriptionRef.get(state),
      change: (add, retire) =>
        SubscriptionRef.modify(state, (keys) => {
          if (retire !== undefined && !keys.some((key) => key.id === retire)) return [false, keys]
          const left = keys.filter((key) => key.id !== retire || key.id === add?.id)
          if (add === undefined) return [true, left]
          const known = left.some((key) => key.id === add.id)
          return [true, known ? left.map((key) => key.id === add.id ? add : key) : [...left, add]]
        }),
      changes: Stream.changesWith(state.changes, same)
    })
  })

/**
 * A keyring with keys of its own, as a layer. Fails with `ConfigurationError`, which names the field, when there are no
 * keys or one of them cannot be used.
 *
 * @since 0.1.0
 * @category layers
 */
export const layer = (options: {
  readonly keys: ReadonlyArray<ApiKey.Input>
}): Layer.Layer<Keyring, ConfigurationError> => Layer.effect(Keyring, make(options))

/**
 * As `layer`, with keys from `Config`; fails with `ConfigError` too, when they cannot be read.
 *
 * @example
 * ```ts
 * import * as ApiKey from "effect-keymesh/ApiKey"
 * import * as Keyring from "effect-keymesh/Keyring"
 *
 * const Live = Keyring.layerConfig({ keys: ApiKey.config("API_KEYS") })
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerConfig = (
  config: Config.Config.Wrap<{ readonly keys: ReadonlyArray<ApiKey.Input> }>
): Layer.Layer<Keyring, ConfigError | ConfigurationError> =>
  Layer.effect(Keyring, Effect.flatMap(Config.unwrap(config), make))
