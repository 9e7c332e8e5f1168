/**
 * Pools for programs that do not use Effect: the real client of an SDK, at once, with a few functions beside.
 *
 * It takes the settings of the original `createKeymesh`, and the events and snapshots have the original's fields.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Exit from "effect/Exit"
import * as Predicate from "effect/Predicate"
import * as Scope from "effect/Scope"
import type { ApiKey } from "./ApiKey.js"
import * as CallOptions from "./CallOptions.js"
import { type CallError, ConfigurationError } from "./KeymeshError.js"
import * as PlainEvents from "./PlainEvents.js"
import * as PlainSettings from "./PlainSettings.js"
import * as PlainState from "./PlainState.js"
import type { PoolSnapshot } from "./PoolSnapshot.js"
import * as PoolStore from "./PoolStore.js"
import * as PoolUpkeep from "./PoolUpkeep.js"
import type { Adapter } from "./providers/Adapter.js"
import * as Checks from "./Settings.js"
import * as Telemetry from "./Telemetry.js"

export type { EventOf, Handler, Name as EventName } from "./PlainEvents.js"
export type { Breaker, KeyConfig, KeyView, Retry, Selector, Settings } from "./PlainSettings.js"
export type { Backend } from "./PlainState.js"

/**
 * What a client has beside the SDK's own.
 *
 * @since 0.1.0
 * @category models
 */
export interface Keymesh {
  /**
   * Calls a function with each event of a name, at once and in order; what it throws is lost. Gives what takes it off
   * again. Throws a `ConfigurationError` for a name that no event has.
   */
  on<N extends PlainEvents.Name>(event: N, handler: PlainEvents.Handler<N>): () => void
  /** Takes a function off again. */
  off<N extends PlainEvents.Name>(event: N, handler: PlainEvents.Handler<N>): void
  /** The pool at this moment; no secrets. */
  inspect(): Inspection
  /**
   * Closes the pool: requests under way end, calls that wait fail with `PoolClosed`, later ones too, and the state is
   * saved. A program need not call it to come to its end.
   */
  close(): Promise<void>
}

/**
 * A pool as `inspect` shows it: the snapshot of `KeyPool`, with the original's fields.
 *
 * @since 0.1.0
 * @category models
 */
export interface Inspection extends Omit<PoolSnapshot, "keys"> {
  readonly keys: ReadonlyArray<PoolSnapshot["keys"][number] & Omit<PlainSettings.KeyView, "config">>
  /** Calls so far. */
  readonly totalRequests: number
  /** Attempts that failed so far. */
  readonly totalFailures: number
}

/**
 * Makes the client of an SDK over a pool of keys. It is the real client, and it is there at once; its own retries are
 * switched off, for the pool retries. Where the state comes from a store that takes its time, the first requests wait for
 * it, at most a second.
 *
 * Throws a `ConfigurationError`, which names the field, when a setting cannot be used.
 *
 * @example
 * ```ts
 * import { createKeymesh } from "effect-keymesh/Keymesh"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 *
 * const client = createKeymesh({
 *   provider: OpenAi.adapter,
 *   keys: ["sk-one", "sk-two"],
 *   strategy: "least-used",
 *   circuitBreaker: { threshold: 3, cooldownMs: 30_000 },
 *   retry: { max: 5, baseMs: 200 }
 * })
 * client.on("key.rotated", ({ from, reason, to }) => console.log(`${from} -> ${to}: ${reason}`))
 *
 * const answer = await client.chat.completions.create({
 *   model: "gpt-5-mini",
 *   messages: [{ role: "user", content: "Hello" }]
 * })
 * ```
 *
 * @since 0.1.0
 * @category constructors
 */
export const createKeymesh = <Client extends object, Own>(
  settings: PlainSettings.Settings & { readonly provider: Adapter<Client, Own> } & NoInfer<Own>
): Client & Keymesh => {
  const scope = Effect.runSync(Scope.make())
  const made = Effect.runSyncExit(Scope.extend(make<Client, Own>(settings), scope))
  if (Exit.isFailure(made)) {
    Effect.runFork(Scope.close(scope, made))
    throw Cause.squash(made.cause)
  }
  const { client, errorOf, keymesh } = made.value
  let closing: Promise<void> | undefined
  const close = () => closing ??= Effect.runPromise(Scope.close(scope, Exit.void))
  const added: Keymesh = { ...keymesh, close }
  for (const [name, value] of Object.entries(added)) {
    Object.defineProperty(client, name, { value, enumerable: false, writable: false, configurable: false })
  }
  errors.set(client, errorOf)
  // It has them now.
  return client as Client & Keymesh
}

/**
 * Runs a function with settings for the calls that it makes, with any client of this library: `deadline`, `budget`,
 * `maxWait`, `model`, `replayable`, `affinity`. Only where the platform has asynchronous contexts (Node.js, Deno, Bun). Throws a
 * `ConfigurationError` when a setting cannot be used.
 *
 * @example
 * ```ts
 * import { createKeymesh, withOptions } from "effect-keymesh/Keymesh"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 *
 * const client = createKeymesh({ provider: OpenAi.adapter, keys: ["sk-one", "sk-two"] })
 * const models = await withOptions({ deadline: "5 seconds", maxWait: 0 }, () => client.models.list())
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const withOptions: <A>(settings: CallOptions.Settings, f: () => A) => A = CallOptions.runWith

/**
 * The typed error behind one that a client threw: what the pool says, or how it understood the provider; with the trail
 * of the attempts, and when a key is back. Of a client that is not of `createKeymesh` it gives `undefined`.
 *
 * @example
 * ```ts
 * import { createKeymesh, errorOf } from "effect-keymesh/Keymesh"
 * import * as OpenAi from "effect-keymesh/OpenAi"
 *
 * const client = createKeymesh({ provider: OpenAi.adapter, keys: ["sk-one", "sk-two"] })
 * try {
 *   await client.models.list()
 * } catch (error) {
 *   const known = errorOf(client, error)
 *   if (known?._tag === "AllKeysExhausted") console.log(known.reasons)
 * }
 * ```
 *
 * @since 0.1.0
 * @category getters
 */
export const errorOf = (client: object, error: unknown): CallError | undefined => errors.get(client)?.(error)

const errors = new WeakMap<object, (error: unknown) => CallError>()

/** The client, not yet a `Keymesh`, and what it is to have. */
const make = <Client extends object, Own>(
  settings: PlainSettings.Settings & { readonly provider: Adapter<Client, Own> } & NoInfer<Own>
) =>
  Effect.gen(function*() {
    yield* adapterOf(settings)
    const { provider } = settings
    // A strategy is asked only once there is a pool.
    let views: () => ReadonlyArray<PlainSettings.KeyView> = () => []
    const resolved = yield* PlainSettings.resolve(settings, provider.settings, () => views())
    const store = yield* PlainState.make(settings.state, settings.stateFile)
    const events = PlainEvents.make(resolved)
    const own = ownOf<Own>(settings, provider.settings)
    const { client, errorOf, pool } = yield* provider.make(resolved.pool, own, resolved.failover).pipe(
      Effect.mapError(PlainSettings.renamed(settings)),
      Effect.provideService(PoolStore.PoolStore, store),
      Effect.provideService(Telemetry.Telemetry, events.telemetry),
      Effect.provideService(PoolUpkeep.Upkeep, { loads: "behind", pause })
    )
    for (const name of ["on", "off", "inspect", "close"]) {
      if (name in client) {
        return yield* Checks.refuse(
          "provider",
          `the client has a property \`${name}\` already: it may be one that createKeymesh gave`
        )
      }
    }
    const inspect = () => inspectionOf(Effect.runSync(pool.snapshot), events)
    views = () => viewsOf(inspect(), Effect.runSync(pool.keyring.keys))
    return { client, errorOf, keymesh: { on: events.on, off: events.off, inspect } }
  })

const adapterOf = (settings: unknown): Checks.Checked<void> => {
  const provider = Predicate.hasProperty(settings, "provider") ? settings.provider : undefined
  return Predicate.hasProperty(provider, "make") && Predicate.isFunction(provider.make) &&
      Predicate.hasProperty(provider, "settings") && Array.isArray(provider.settings)
    ? Either.void
    : Either.left(
      new ConfigurationError({
        field: "provider",
        problem: "must be an adapter of this library: `adapter` of effect-keymesh/OpenAi, Anthropic or Gemini, or what "
          + "`adapter` of effect-keymesh/Http gives"
      })
    )
}

/** What of the settings belongs to the adapter. */
const ownOf = <Own>(settings: NoInfer<Own>, names: ReadonlyArray<string>): Own =>
  // All the fields of `Own` are in the settings; those that are none of its are taken out.
  Object.fromEntries(Object.entries(settings as object).filter(([name]) => names.includes(name))) as Own

const viewsOf = ({ keys }: Inspection, declared: ReadonlyArray<ApiKey>): ReadonlyArray<PlainSettings.KeyView> => {
  const byId = new Map(declared.map((key) => [key.id, key]))
  return keys.map((key) => {
    const { costTier = 1 } = byId.get(key.id) ?? {}
    return { ...key, config: { label: key.label, weight: key.weight, costTier } }
  })
}

const inspectionOf = (snapshot: PoolSnapshot, events: PlainEvents.Events): Inspection => ({
  ...snapshot,
  totalRequests: snapshot.calls,
  totalFailures: snapshot.keys.reduce((sum, key) => sum + key.faults, 0),
  keys: snapshot.keys.map((key) => ({
    ...key,
    ...events.health(key.id, snapshot.at),
    circuitState: key.breaker,
    successCount: key.successes,
    failureCount: key.faults,
    cooldownUntil: key.closed?.until ?? key.breakerUntil ?? 0,
    lastUsedAt: key.lastUsed ?? 0
  }))
})

/** Lets time pass, but for nobody's sake: a program that has nothing else to do may end. */
const pause = (millis: number): Effect.Effect<void> =>
  Effect.async((resume) => {
    const timer: unknown = setTimeout(() => resume(Effect.void), millis)
    if (Predicate.hasProperty(timer, "unref") && Predicate.isFunction(timer.unref)) timer.unref()
    // What `setTimeout` gave, whatever that is on this platform.
    return Effect.sync(() => clearTimeout(timer as ReturnType<typeof setTimeout>))
  })
