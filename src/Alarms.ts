/**
 * What is to be done at an instant, unless it is called off before: one timer for all of it, because most is called off.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as MutableRef from "effect/MutableRef"
import * as Queue from "effect/Queue"
import * as MonotonicTime from "./MonotonicTime.js"

/**
 * The alarms that are set, and when they are looked at next.
 *
 * @since 0.1.0
 * @category models
 */
export interface Alarms {
  /** Each of them comes and goes. */
  readonly pending: Set<Alarm>
  /** `Infinity`: not before one is set. */
  readonly wakesAt: MutableRef.MutableRef<number>
  /** Says that one was set which is due before that. */
  readonly sooner: Queue.Queue<void>
}

/**
 * Something to do at an instant of the pool's clock. It must not throw.
 *
 * @since 0.1.0
 * @category models
 */
export interface Alarm {
  readonly at: number
  readonly ring: () => void
}

/**
 * No alarms yet.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make: Effect.Effect<Alarms> = Effect.map(Queue.sliding<void>(1), (sooner) => ({
  pending: new Set<Alarm>(),
  wakesAt: MutableRef.make(Infinity),
  sooner
}))

/**
 * Sets an alarm.
 *
 * @since 0.1.0
 * @category setters
 */
export const set = ({ pending, sooner, wakesAt }: Alarms, alarm: Alarm): void => {
  pending.add(alarm)
  if (alarm.at >= MutableRef.get(wakesAt)) return
  MutableRef.set(wakesAt, alarm.at)
  sooner.unsafeOffer(undefined)
}

/**
 * Calls an alarm off, if it has not rung.
 *
 * @since 0.1.0
 * @category setters
 */
export const callOff = ({ pending }: Alarms, alarm: Alarm): void => {
  pending.delete(alarm)
}

/**
 * Rings each alarm when it is due. It does not look whether what it was woken for has been called off since: of many that
 * come and go, it is woken by the first one only, and looks at them when that one would be due.
 *
 * @since 0.1.0
 * @category fibers
 */
export const keep = (
  { pending, sooner, wakesAt }: Alarms,
  pause: (millis: number) => Effect.Effect<void>
): Effect.Effect<never> =>
  Effect.forever(Effect.gen(function*() {
    const at = MutableRef.get(wakesAt)
    if (at === Infinity) return yield* Queue.take(sooner)
    const now = yield* MonotonicTime.now
    if (at > now) {
      const millis = Math.ceil(Math.min(at - now, MonotonicTime.longestSleep))
      return yield* Effect.raceFirst(pause(millis), Queue.take(sooner))
    }
    let next = Infinity
    for (const alarm of pending) {
      if (alarm.at > now) next = Math.min(next, alarm.at)
      else {
        pending.delete(alarm)
        alarm.ring()
      }
    }
    MutableRef.set(wakesAt, next)
  }))
