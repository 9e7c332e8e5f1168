/**
 * A cooldown as an event of telemetry.
 *
 * @since 0.1.0
 */
import type * as Cooldowns from "./Cooldowns.js"
import type * as KeyState from "./KeyState.js"
import type * as Telemetry from "./Telemetry.js"

/**
 * The event of a cooldown that keeps away a key, or its group.
 *
 * @since 0.1.0
 * @category constructors
 */
export const of = (
  pool: string,
  key: KeyState.KeyState,
  target: Cooldowns.Target,
  bench: KeyState.Bench,
  now: number
): Telemetry.Unnumbered => ({
  _tag: "key.cooldown",
  pool,
  at: now,
  keyId: key.id,
  label: key.label,
  scope: target.scope,
  kind: bench.kind,
  provenance: bench.provenance,
  until: bench.until,
  ...(target.model === undefined ? {} : { model: target.model }),
  ...(target.scope === "group" && key.key.quotaGroup !== undefined ? { group: key.key.quotaGroup } : {})
})
