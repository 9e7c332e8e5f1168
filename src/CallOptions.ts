/**
 * Settings of one call, given around it and read by any pool inside.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import type * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import { dual } from "effect/Function"
import * as MutableRef from "effect/MutableRef"
import * as Predicate from "effect/Predicate"
import * as AsyncContext from "./AsyncContext.js"
import { ConfigurationError, type Trail } from "./KeymeshError.js"
import * as PoolSettings from "./PoolSettings.js"
import * as PoolState from "./PoolState.js"
import type * as RateLimit from "./RateLimit.js"
import * as Checks from "./Settings.js"

/**
 * What can be said of one call; each wins over the pool's own setting.
 *
 * @since 0.1.0
 * @category models
 */
export interface Settings {
  /**
   * When the caller must have an answer, from the start of the call: then it is interrupted. At most 24.8 days;
   * `Infinity` is none (default: the pool's).
   */
  readonly deadline?: Duration.DurationInput | undefined
  /** How long the call may keep starting attempts and waits (default: the pool's; `Infinity` is no bound). */
  readonly budget?: Duration.DurationInput | undefined
  /** How long it may wait for a key; 0 fails at once when no key is free (default: the budget). */
  readonly maxWait?: Duration.DurationInput | undefined
  /** The model it asks for, where the pool cannot read it from the request. */
  readonly model?: string | undefined
  /**
   * The tokens it will use, for keys whose limits count them (default: what the pool can read from the request): those
   * of its input, and the most it may put out.
   */
  readonly tokens?: RateLimit.Estimate | undefined
  /** Whether it may be sent again after a fault that leaves open whether it was processed. */
  readonly replayable?: boolean | undefined
  /**
   * How urgent it is, should it have to wait for a key (default `normal`). `high` counts as having waited 10 seconds
   * longer than it has, `low` 10 seconds less; so nobody is overtaken for ever. In a line that is full (`maxWaiters`), who
   * is more urgent takes the place of the last one.
   */
  readonly priority?: Priority | undefined
  /**
   * A name for calls that belong together, such as the id of a conversation: they go to the same key while that may
   * serve and is not busier than the others, so that what the provider has cached is used again. A key that soon may
   * serve is waited for, 2 seconds at most; then the calls move to another key and stay there.
   */
  readonly affinity?: string | undefined
  /**
   * Whether it may have a second attempt beside its first, when that takes long (default: the pool's `hedge`), and after
   * how long; without a `delay`, after that of the pool (`true`), or when that is learned (`{}`). What bounds such
   * attempts is the pool's.
   */
  readonly hedge?: boolean | { readonly delay?: Duration.DurationInput | undefined } | undefined
  /** A cell to which the trail of each call is added when the call ends, whether it succeeds or not; see `withTrails`. */
  readonly trails?: MutableRef.MutableRef<ReadonlyArray<Trail>> | undefined
}

/**
 * How urgent a call is, should it have to wait.
 *
 * @since 0.1.0
 * @category models
 */
export type Priority = PoolState.Priority

/**
 * The settings of the calls inside; none by default.
 *
 * @since 0.1.0
 * @category references
 */
export class CallOptions extends Context.Reference<CallOptions>()("effect-keymesh/CallOptions", {
  defaultValue: (): Settings => ({})
}) {}

/**
 * Gives settings to the calls of an effect; those given further out hold where these say nothing, or say `undefined`.
 *
 * A setting that is unknown, of the wrong type or no usable duration is a mistake in the program: the effect dies of a
 * `ConfigurationError` that names the field, and nothing inside has begun.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as CallOptions from "effect-keymesh/CallOptions"
 *
 * const urgent = Effect.succeed("a pooled call").pipe(
 *   CallOptions.withOptions({ deadline: "5 seconds", maxWait: 0 })
 * )
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const withOptions: {
  (settings: Settings): <A, E, R>(self: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  <A, E, R>(self: Effect.Effect<A, E, R>, settings: Settings): Effect.Effect<A, E, R>
} = dual(
  2,
  <A, E, R>(self: Effect.Effect<A, E, R>, settings: Settings): Effect.Effect<A, E, R> =>
    Effect.suspend(() => Either.match(check(settings), { onLeft: Effect.die, onRight: () => inside(self, settings) }))
)

/**
 * When the caller must have an answer. Past it, the call fails with `DeadlineExceeded` and its attempt is interrupted.
 * `Infinity` lifts the deadline that a pool has. What is no usable duration is a defect, as with `withOptions`.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withDeadline: {
  (deadline: Duration.DurationInput): <A, E, R>(self: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  <A, E, R>(self: Effect.Effect<A, E, R>, deadline: Duration.DurationInput): Effect.Effect<A, E, R>
} = dual(
  2,
  <A, E, R>(self: Effect.Effect<A, E, R>, deadline: Duration.DurationInput): Effect.Effect<A, E, R> =>
    Effect.suspend(() =>
      Either.match(PoolSettings.deadline(deadline, "deadline"), {
        onLeft: Effect.die,
        onRight: () => inside(self, { deadline })
      })
    )
)

/**
 * Calls that belong together: those of the same name go to the same key while it may serve. An empty name, or one that
 * is no text, is a defect, as with `withOptions`.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as CallOptions from "effect-keymesh/CallOptions"
 *
 * const turn = Effect.succeed("a pooled call").pipe(CallOptions.withAffinity("conversation-42"))
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const withAffinity: {
  (affinity: string): <A, E, R>(self: Effect.Effect<A, E, R>) => Effect.Effect<A, E, R>
  <A, E, R>(self: Effect.Effect<A, E, R>, affinity: string): Effect.Effect<A, E, R>
} = dual(
  2,
  <A, E, R>(self: Effect.Effect<A, E, R>, affinity: string): Effect.Effect<A, E, R> => withOptions(self, { affinity })
)

/**
 * Gives beside the value of an effect the trails of the calls inside, in the order in which they ended: which key each
 * attempt used, why it did not use the others (`others`), how long it waited and took. Of a failure the error tells the
 * trail; for all calls of a pool there is the event `call.end`.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as CallOptions from "effect-keymesh/CallOptions"
 *
 * const program = Effect.gen(function*() {
 *   const [answer, trails] = yield* CallOptions.withTrails(Effect.succeed("a pooled call"))
 *   for (const trail of trails) {
 *     for (const { label, others, waitedMillis } of trail.entries) yield* Effect.log(label, waitedMillis, others)
 *   }
 *   return answer
 * })
 * ```
 *
 * @since 0.1.0
 * @category combinators
 */
export const withTrails = <A, E, R>(
  self: Effect.Effect<A, E, R>
): Effect.Effect<readonly [value: A, trails: ReadonlyArray<Trail>], E, R> =>
  Effect.suspend(() => {
    const trails = MutableRef.make<ReadonlyArray<Trail>>([])
    return Effect.map(withOptions(self, { trails }), (value) => [value, MutableRef.get(trails)] as const)
  })

/**
 * The header by which a single request says its affinity, where there is no effect to say it: programs that use an SDK
 * or `fetch` as they are. It wins over what is said around the call, and is not sent to the provider.
 *
 * @since 0.1.0
 * @category constants
 */
export const affinityHeader = "x-keymesh-affinity"

/**
 * Runs a function of plain code; the settings hold for the pooled requests that it makes, for as long as what it has
 * started runs, and win over what is given further out. Only where the platform has asynchronous contexts (Node.js,
 * Deno, Bun). Throws the `ConfigurationError` that `withOptions` dies of, and one where there are no such contexts.
 *
 * @since 0.1.0
 * @category combinators
 */
export const runWith = <A>(settings: Settings, f: () => A): A => {
  const checked = check(settings)
  if (Either.isLeft(checked)) throw checked.left
  const outer = around.get()
  return around.run({ ...outer, ...given(settings) }, () => {
    if (around.get() !== undefined) return f()
    throw new ConfigurationError({ field: "options", problem: "this platform has no asynchronous contexts" })
  })
}

/**
 * The settings that plain code runs with.
 *
 * @since 0.1.0
 * @category references
 */
export const around: AsyncContext.AsyncContext<Settings> = AsyncContext.make()

const inside = <A, E, R>(self: Effect.Effect<A, E, R>, settings: Settings): Effect.Effect<A, E, R> =>
  Effect.flatMap(CallOptions, (outer) => Effect.provideService(self, CallOptions, { ...outer, ...given(settings) }))

const given = (settings: Settings): Settings =>
  Object.fromEntries(Object.entries(settings).filter(([, value]) => value !== undefined))

/** The check of each setting, by its name. */
const checks: { readonly [Name in keyof Settings]-?: (value: unknown, path: string) => Checks.Checked<unknown> } = {
  deadline: PoolSettings.deadline,
  budget: Checks.millis,
  maxWait: Checks.millis,
  model: Checks.text,
  tokens: (value, path) =>
    Either.gen(function*() {
      if (!Predicate.isRecord(value)) return yield* Checks.refuse(path, "must be an object")
      yield* Checks.refuseUnknown(value, ["input", "maxOutput"], path)
      for (const name of ["input", "maxOutput"]) {
        if (value[name] !== undefined) yield* Checks.nonNegative(value[name], `${path}.${name}`)
      }
    }),
  affinity: Checks.text,
  hedge: PoolSettings.hedgeOfCall,
  priority: (value, path) =>
    Predicate.isString(value) && Object.hasOwn(PoolState.headStartMillis, value)
      ? Either.right(value)
      : Checks.refuse(path, "must be \"high\", \"normal\" or \"low\""),
  trails: (value, path) =>
    Predicate.hasProperty(value, "current") && Array.isArray(value.current)
      ? Either.right(value)
      : Checks.refuse(path, "must be a MutableRef of trails"),
  replayable: (value, path) =>
    Predicate.isBoolean(value) ? Either.right(value) : Checks.refuse(path, "must be true or false")
}

const check = (settings: Settings): Either.Either<void, ConfigurationError> =>
  Either.gen(function*() {
    if (!Predicate.isRecord(settings)) return yield* Checks.refuse("options", "must be an object")
    yield* Checks.refuseUnknown(settings, Object.keys(checks), "")
    for (const [name, checked] of Object.entries(checks)) {
      const value: unknown = settings[name]
      if (value !== undefined) yield* checked(value, name)
    }
  })
