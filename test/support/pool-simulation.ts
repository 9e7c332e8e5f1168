import * as Clock from "effect/Clock"
import * as Duration from "effect/Duration"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Fiber from "effect/Fiber"
import * as FiberId from "effect/FiberId"
import * as Random from "effect/Random"
import type * as Scheduler from "effect/Scheduler"

/**
 * Fibers on a clock and a scheduler that only move when they are told. One operation of a fiber is one step; something
 * may strike between any two of them, and a fiber gives way to the others after `ops` of them. The same programs and
 * the same strikes give the same run, always.
 */
export class Simulation {
  readonly clock: Clock.Clock
  now = 0
  steps = 0
  private readonly tasks: Array<() => void> = []
  private readonly sleeps: Array<{ readonly at: number; readonly wake: () => void }> = []
  private readonly scheduler: Scheduler.Scheduler
  private readonly strikes = new Map<number, Array<() => void>>()
  private readonly seed: string
  private readonly ops: number
  private readonly limit: number

  constructor(seed: string, ops: number, limit = 1_000_000) {
    this.seed = seed
    this.ops = ops
    this.limit = limit
    this.scheduler = {
      shouldYield: (fiber) => {
        this.steps++
        for (const action of this.strikes.get(this.steps) ?? []) action()
        return fiber.currentOpCount > this.ops ? 0 : false
      },
      scheduleTask: (task) => {
        this.tasks.push(task)
      }
    }
    const live = Clock.make()
    this.clock = {
      [Clock.ClockTypeId]: live[Clock.ClockTypeId],
      unsafeCurrentTimeMillis: () => this.now,
      unsafeCurrentTimeNanos: () => BigInt(Math.round(this.now * 1e6)),
      currentTimeMillis: Effect.sync(() => this.now),
      currentTimeNanos: Effect.sync(() => BigInt(Math.round(this.now * 1e6))),
      sleep: (duration) =>
        Effect.async<void>((resume) => {
          const entry = { at: this.now + Duration.toMillis(duration), wake: () => resume(Effect.void) }
          // In order of their instants, the earlier asked first.
          const later = this.sleeps.findIndex((other) => other.at > entry.at)
          this.sleeps.splice(later < 0 ? this.sleeps.length : later, 0, entry)
          return Effect.sync(() => {
            const at = this.sleeps.indexOf(entry)
            if (at >= 0) this.sleeps.splice(at, 1)
          })
        })
    }
  }

  fork<A, E>(effect: Effect.Effect<A, E>): Fiber.RuntimeFiber<A, E> {
    const placed = Effect.withRandom(Effect.withClock(effect, this.clock), Random.make(this.seed))
    return Effect.runFork(placed, { scheduler: this.scheduler, immediate: false })
  }

  /** Does something after so many steps. */
  strike(step: number, action: () => void): void {
    this.strikes.set(step, [...this.strikes.get(step) ?? [], action])
  }

  interrupt(fiber: Fiber.RuntimeFiber<unknown, unknown>): void {
    fiber.unsafeInterruptAsFork(FiberId.none)
  }

  /** Runs what can run, and lets time pass up to an instant, from one sleep to the next. */
  runUntil(instant: number): void {
    for (;;) {
      this.settle()
      const next = this.sleeps[0]
      if (next === undefined || next.at > instant) break
      this.sleeps.shift()
      this.now = Math.max(this.now, next.at)
      next.wake()
    }
    this.now = Math.max(this.now, instant)
  }

  /** Runs what can run now. */
  settle(): void {
    for (let task = this.tasks.shift(); task !== undefined; task = this.tasks.shift()) {
      task()
      if (this.steps > this.limit) throw new Error("it does not come to rest")
    }
  }

  /** Runs an effect to its end, now. */
  get<A, E>(effect: Effect.Effect<A, E>): A {
    const fiber = this.fork(effect)
    this.settle()
    const exit = fiber.unsafePoll()
    if (exit === null) throw new Error("it did not end at once")
    if (Exit.isFailure(exit)) throw new Error(`it failed: ${String(exit.cause)}`)
    return exit.value
  }
}
