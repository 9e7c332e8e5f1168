/**
 * Time that never runs backwards, for whatever measures how long something takes: the wall clock may be set.
 *
 * @since 0.1.0
 */
import type * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"

/**
 * The time of a clock: whole milliseconds that never run backwards, near to those since the epoch.
 *
 * @since 0.1.0
 * @category getters
 */
export const nowOf = (clock: Clock.Clock): number => Math.floor(Number(clock.unsafeCurrentTimeNanos()) / 1e6)

/**
 * The time now.
 *
 * @since 0.1.0
 * @category getters
 */
export const now: Effect.Effect<number> = Effect.clockWith((clock) => Effect.succeed(nowOf(clock)))

/**
 * Timers of the platform overflow after 24.8 days; nobody sleeps longer than this, in milliseconds.
 *
 * @since 0.1.0
 * @category getters
 */
export const longestSleep = 86_400_000
