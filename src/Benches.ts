/**
 * What is held against a quota group, or for one model only. (What is held against a key alone is in its `KeyState`.)
 *
 * @since 0.1.0
 */
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import type * as Cooldowns from "./Cooldowns.js"
import * as KeyState from "./KeyState.js"
import * as Places from "./Places.js"
import * as PoolState from "./PoolState.js"

/**
 * What is held against a key, or its group, for all models or one.
 *
 * @since 0.1.0
 * @category getters
 */
export const at = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  target: Cooldowns.Target
): KeyState.Bench | undefined => {
  if (target.model === undefined) return target.scope === "key" ? key.bench : PoolState.groupBench(state, key)
  const benches = HashMap.get(state.rest.models, target.model)
  if (benches._tag === "None") return undefined
  return Option.getOrUndefined(
    target.scope === "key"
      ? HashMap.get(benches.value.keys, key.slot)
      : HashMap.get(benches.value.groups, key.key.quotaGroup ?? "")
  )
}

/**
 * What is held against a key and its group for a model.
 *
 * @since 0.1.0
 * @category getters
 */
export const ofModel = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  model: string
): ReadonlyArray<KeyState.Bench | undefined> => [
  at(state, key, { scope: "key", model }),
  at(state, key, { scope: "group", model })
]

/**
 * Replaces what is held against a key's group.
 *
 * @since 0.1.0
 * @category steps
 */
export const withGroup = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  bench: KeyState.Bench | undefined
): PoolState.PoolState => {
  const group = key.key.quotaGroup
  if (group === undefined) return state
  const found = HashMap.get(state.rest.groups, group)
  if (found._tag === "None" || found.value.bench === bench) return state
  return {
    ...state,
    rest: { ...state.rest, groups: HashMap.set(state.rest.groups, group, { ...found.value, bench }) }
  }
}

/**
 * Changes what is held against a key and its group for one model.
 *
 * @since 0.1.0
 * @category steps
 */
export const mapModel = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  model: string | undefined,
  f: (bench: KeyState.Bench) => KeyState.Bench | undefined
): PoolState.PoolState => {
  if (model === undefined) return state
  const found = HashMap.get(state.rest.models, model)
  if (found._tag === "None") return state
  const keys = mapEntry(found.value.keys, key.slot, f)
  const groups = key.key.quotaGroup === undefined
    ? found.value.groups
    : mapEntry(found.value.groups, key.key.quotaGroup, f)
  return keys === found.value.keys && groups === found.value.groups
    ? state
    : withModel(state, model, { keys, groups })
}

/**
 * Changes what is held against a key, or against its group, for one model.
 *
 * @since 0.1.0
 * @category steps
 */
export const mapOne = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  { model, scope }: { readonly scope: "key" | "group"; readonly model: string },
  f: (bench: KeyState.Bench) => KeyState.Bench | undefined
): PoolState.PoolState => {
  const found = HashMap.get(state.rest.models, model)
  const group = key.key.quotaGroup
  if (found._tag === "None" || (scope === "group" && group === undefined)) return state
  const keys = scope === "key" ? mapEntry(found.value.keys, key.slot, f) : found.value.keys
  const groups = scope === "group" && group !== undefined ? mapEntry(found.value.groups, group, f) : found.value.groups
  return keys === found.value.keys && groups === found.value.groups
    ? state
    : withModel(state, model, { keys, groups })
}

const mapEntry = <K>(
  map: HashMap.HashMap<K, KeyState.Bench>,
  at: K,
  f: (bench: KeyState.Bench) => KeyState.Bench | undefined
): HashMap.HashMap<K, KeyState.Bench> => {
  const found = HashMap.get(map, at)
  if (found._tag === "None") return map
  const next = f(found.value)
  return next === undefined ? HashMap.remove(map, at) : next === found.value ? map : HashMap.set(map, at, next)
}

/**
 * Holds something against a key or its group for one model.
 *
 * @since 0.1.0
 * @category steps
 */
export const imposeOnModel = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  scope: "key" | "group",
  model: string,
  bench: KeyState.Bench,
  now: number
): PoolState.PoolState => {
  const kept = forgetModels(state, now)
  const hasRoom = HashMap.size(kept.rest.models) < mostModels || HashMap.has(kept.rest.models, model)
  const pruned = hasRoom ? kept : withoutFirstOver(kept)
  const found = Option.getOrElse(
    HashMap.get(pruned.rest.models, model),
    (): PoolState.ModelBenches => ({ keys: HashMap.empty(), groups: HashMap.empty() })
  )
  return withModel(
    pruned,
    model,
    scope === "key"
      ? { ...found, keys: HashMap.set(found.keys, key.slot, bench) }
      : { ...found, groups: HashMap.set(found.groups, key.key.quotaGroup ?? "", bench) }
  )
}

/**
 * Replaces what is held against a key or its group, for all models.
 *
 * @since 0.1.0
 * @category steps
 */
export const withBench = (
  config: PoolState.Config,
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  scope: "key" | "group",
  bench: KeyState.Bench,
  now: number
): PoolState.PoolState =>
  scope === "key"
    ? Places.place(config, state, { ...key, bench }, now)
    : Places.placeGroup(config, withGroup(state, key, bench), key.key.quotaGroup, now)

/**
 * Forgets what is held against a key for single models.
 *
 * @since 0.1.0
 * @category steps
 */
export const forgetKey = (state: PoolState.PoolState, slot: number): PoolState.PoolState => ({
  ...state,
  rest: {
    ...state.rest,
    models: HashMap.filterMap(state.rest.models, ({ groups, keys }) => {
      const left = HashMap.remove(keys, slot)
      return HashMap.size(left) === 0 && HashMap.size(groups) === 0
        ? Option.none()
        : Option.some({ groups, keys: left })
    })
  }
})

const withModel = (
  state: PoolState.PoolState,
  model: string,
  benches: PoolState.ModelBenches
): PoolState.PoolState => ({
  ...state,
  rest: {
    ...state.rest,
    models: HashMap.size(benches.keys) === 0 && HashMap.size(benches.groups) === 0
      ? HashMap.remove(state.rest.models, model)
      : HashMap.set(state.rest.models, model, benches)
  }
})

/** Drops the models of which nothing is to be remembered: told waits that are over, guesses that are long over. */
const forgetModels = (state: PoolState.PoolState, now: number): PoolState.PoolState => {
  const over = (bench: KeyState.Bench) => now >= bench.until + (KeyState.needsTrial(bench) ? rememberedMillis : 0)
  const models = HashMap.filter(
    state.rest.models,
    ({ groups, keys }) => !HashMap.every(keys, over) || !HashMap.every(groups, over)
  )
  return HashMap.size(models) === HashMap.size(state.rest.models)
    ? state
    : { ...state, rest: { ...state.rest, models } }
}

/** Drops the model that may be used again before all others: its waits matter least. */
const withoutFirstOver = (state: PoolState.PoolState): PoolState.PoolState => {
  let first: string | undefined
  let firstEnd = Infinity
  for (const [model, { groups, keys }] of state.rest.models) {
    let end = -Infinity
    for (const bench of HashMap.values(keys)) end = Math.max(end, bench.until)
    for (const bench of HashMap.values(groups)) end = Math.max(end, bench.until)
    if (end < firstEnd) [first, firstEnd] = [model, end]
  }
  return first === undefined
    ? state
    : { ...state, rest: { ...state.rest, models: HashMap.remove(state.rest.models, first) } }
}

/** Of more models than this, whatever callers may call them, nothing is remembered. */
const mostModels = 1_000

/** How long the end of a guessed wait for one model is remembered, if nobody asks for the model. */
const rememberedMillis = 86_400_000
