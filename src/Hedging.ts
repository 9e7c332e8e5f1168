/**
 * A second attempt for a call whose first one takes long: with a key of another quota group, as long as all is well.
 *
 * @since 0.1.0
 */
import * as ApiKey from "./ApiKey.js"
import * as Benches from "./Benches.js"
import * as HedgeBudget from "./HedgeBudget.js"
import * as KeyState from "./KeyState.js"
import * as Leasing from "./Leasing.js"
import * as PoolState from "./PoolState.js"
import * as ProviderHealth from "./ProviderHealth.js"

/**
 * Leases a key beside an attempt that runs: one of another group that has nothing against it. `undefined`: there is none,
 * or the pool has something better to do: somebody waits, the provider is in trouble, attempts fail, or there were enough
 * of these already.
 *
 * @since 0.1.0
 * @category steps
 */
export const lease = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  first: PoolState.LeaseRecord,
  request: Pick<PoolState.Request, "model" | "operation" | "timed" | "tokens" | "random">,
  now: number
): Leasing.Leased | undefined => {
  const { calls, ended, rest } = state
  if (rest.closed || rest.waiting > 0 || ProviderHealth.isGating(rest.health)) return undefined
  const hedging = HedgeBudget.spend(rest.hedging, config.hedging, { calls, ended }, now)
  if (hedging === undefined) return undefined
  const isOther = others(state, first)
  const leased = Leasing.lease(config, { ...state, rest: { ...rest, hedging } }, {
    ...request,
    call: first.call,
    avoid: [],
    only: (key) => isOther(key) && isWell(state, key, request.model, now),
    floor: false,
    rotation: true
  }, now)
  return leased.lease === undefined ? undefined : leased
}

/**
 * Which keys are of another group than the one that an attempt uses.
 *
 * @since 0.1.0
 * @category getters
 */
export const others = (
  state: PoolState.PoolState,
  { key }: PoolState.LeaseRecord
): (other: ApiKey.ApiKey) => boolean => {
  // It may have been given a group meanwhile.
  const group = ApiKey.groupOf(PoolState.find(state, key.id)?.key ?? key)
  return (other) => other.id !== key.id && ApiKey.groupOf(other) !== group
}

/** Whether a key is as good as any: a trial is not for a call that is in a hurry. */
const isWell = (
  state: PoolState.PoolState,
  { id }: ApiKey.ApiKey,
  model: string | undefined,
  now: number
): boolean => {
  const key = PoolState.find(state, id)
  if (key === undefined) return false
  const isOver = (bench: KeyState.Bench | undefined): boolean =>
    bench === undefined || (now >= bench.until && !KeyState.needsTrial(bench))
  return key.breaker._tag === "Closed" && key.ramp === undefined && key.stall === undefined && isOver(key.bench) &&
    isOver(PoolState.groupBench(state, key)) &&
    (model === undefined || Benches.ofModel(state, key, model).every(isOver))
}
