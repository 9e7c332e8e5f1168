/**
 * An adapter as a value: how `createKeymesh` makes the client of one provider.
 *
 * @since 0.1.0
 */
import type * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import type * as Scope from "effect/Scope"
import type { CallError, ConfigurationError } from "../KeymeshError.js"
import type * as KeyPool from "../KeyPool.js"
import type * as PoolStore from "../PoolStore.js"
import * as Checks from "../Settings.js"
import type * as Telemetry from "../Telemetry.js"
import type { ErrorDialect, Provider } from "./Provider.js"

/**
 * Makes clients over a pool. `Own` are the settings that it takes beside those of a pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface Adapter<out Client extends object, in Own> {
  /** The provider's name, such as `openai`. */
  readonly name: string
  /** The names of its own settings: whatever else is not a pool's is refused. */
  readonly settings: ReadonlyArray<string>
  /** Makes a client and its pool, which closes with the scope; `failover` as in `ErrorDialect`. */
  readonly make: (
    pool: KeyPool.Settings,
    own: Own,
    failover: ReadonlyArray<number>
  ) => Effect.Effect<
    Pooled<Client>,
    ConfigurationError,
    Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore
  >
}

/**
 * A client over a pool.
 *
 * @since 0.1.0
 * @category models
 */
export interface Pooled<out Client extends object> {
  readonly client: Client
  readonly pool: KeyPool.Service
  /** The typed error behind one that the client threw. */
  readonly errorOf: (error: unknown) => CallError
}

/**
 * Checks a list of statuses that are to be tried again.
 *
 * @since 0.1.0
 * @category checks
 */
export const failoverStatuses = (statuses: unknown, path: string): Checks.Checked<ReadonlyArray<number>> => {
  if (!Array.isArray(statuses)) return Checks.refuse(path, "must be a list of HTTP statuses")
  const given: ReadonlyArray<unknown> = statuses
  const isStatus = (status: unknown): status is number =>
    typeof status === "number" && Number.isInteger(status) && status >= 400 && status <= 599
  const wrong = given.findIndex((status) => !isStatus(status))
  return wrong === -1
    ? Either.right(given.filter(isStatus))
    : Checks.refuse(`${path}[${wrong}]`, "must be an HTTP status from 400 to 599")
}

/**
 * A dialect after some statuses of which another attempt is always made.
 *
 * @since 0.1.0
 * @category combinators
 */
export const dialectWithFailover = (dialect: ErrorDialect, statuses: ReadonlyArray<number>): ErrorDialect =>
  statuses.length === 0 ? dialect : { ...dialect, failover: [...dialect.failover ?? [], ...statuses] }

/**
 * As `dialectWithFailover`, for a whole provider.
 *
 * @since 0.1.0
 * @category combinators
 */
export const withFailover = (provider: Provider, statuses: ReadonlyArray<number>): Provider => ({
  ...provider,
  dialect: dialectWithFailover(provider.dialect, statuses)
})
