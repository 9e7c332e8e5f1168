/** A scripted upstream on the virtual clock, and pools that talk to it. */
import { it } from "@effect/vitest"
import * as Chunk from "effect/Chunk"
import * as Clock from "effect/Clock"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Random from "effect/Random"
import * as Ref from "effect/Ref"
import * as Schedule from "effect/Schedule"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as Fault from "../../src/Fault.js"
import * as KeyPool from "../../src/KeyPool.js"
import * as Outcome from "../../src/Outcome.js"
import type { KeySnapshot } from "../../src/PoolSnapshot.js"
import type * as PoolStore from "../../src/PoolStore.js"
import * as Telemetry from "../../src/Telemetry.js"

/** The caller's own error: the pool reads its `fault`. */
export class Failed extends Data.TaggedError("Failed")<{ readonly fault: Fault.Fault }> {}

/** What the upstream answers, and after how long. */
export interface Reply {
  readonly takes: number
  readonly exit: Exit.Exit<void, Failed>
}

export const ok = (takes = 0): Reply => ({ takes, exit: Exit.void })

export const bad = (kind: Fault.Kind, details: Fault.Details = {}, takes = 0): Reply => ({
  takes,
  exit: Exit.fail(new Failed({ fault: Fault.make(kind, details) }))
})

export const after = (takes: number, reply: Reply): Reply => ({ ...reply, takes })

/** One attempt as the upstream saw it. */
export interface Sent {
  readonly label: string
  readonly at: number
  readonly call: number
  readonly attempt: number
  readonly model: string | undefined
}

/** Answers by key; the last answer of a list repeats. Keys that are not named succeed. */
export type Script =
  | Readonly<Record<string, Reply | ReadonlyArray<Reply>>>
  | ((sent: Sent, index: number) => Reply)

export interface Upstream {
  readonly send: (lease: KeyPool.Lease) => Effect.Effect<string, Failed>
  readonly sent: Effect.Effect<ReadonlyArray<Sent>>
  /** Label and instant of each attempt, such as `a@0`. */
  readonly trace: Effect.Effect<ReadonlyArray<string>>
  /** Attempts that run now. */
  readonly running: Effect.Effect<number>
}

export const upstream = (script: Script = {}): Effect.Effect<Upstream> =>
  Effect.gen(function*() {
    const log = yield* Ref.make<ReadonlyArray<Sent>>([])
    const running = yield* Ref.make(0)
    const replyTo = (sent: Sent, before: ReadonlyArray<Sent>): Reply => {
      if (typeof script === "function") return script(sent, before.length)
      const replies = script[sent.label]
      if (replies === undefined) return ok()
      if ("exit" in replies) return replies
      const index = before.filter((other) => other.label === sent.label).length
      return replies[Math.min(index, replies.length - 1)] ?? ok()
    }
    const send = (lease: KeyPool.Lease) =>
      Effect.gen(function*() {
        const { attempt, call, model } = lease
        const sent: Sent = { label: lease.key.label, at: yield* Clock.currentTimeMillis, call, attempt, model }
        const before = yield* Ref.getAndUpdate(log, (all) => [...all, sent])
        const reply = replyTo(sent, before)
        yield* Effect.acquireUseRelease(
          Ref.update(running, (n) => n + 1),
          () => reply.takes > 0 ? Effect.sleep(reply.takes) : Effect.void,
          () => Ref.update(running, (n) => n - 1)
        )
        yield* reply.exit
        return sent.label
      })
    return {
      send,
      sent: Ref.get(log),
      trace: Effect.map(Ref.get(log), (all) => all.map((sent) => `${sent.label}@${sent.at}`)),
      running: Ref.get(running)
    }
  })

/** Keys named by the letters of a text; their secrets are `secret-a` and so on. */
export const keys = (labels: string, more: Readonly<Record<string, object>> = {}) =>
  [...labels].map((label) => ({ secret: `secret-${label}`, label, ...more[label] }))

/** Settings that take chance and the floor out of a test. */
export const plain = { floor: false, cooldowns: { jitter: 0 } } as const

/** No retries; rotations go on. */
export const once = { retry: Schedule.stop } as const

/** A seeded test with a scope, telemetry and a store. */
export const test = <A, E>(
  title: string,
  body: () => Effect.Effect<A, E, Scope.Scope | Telemetry.Telemetry | PoolStore.PoolStore>,
  options: { readonly random?: Random.Random; readonly timeout?: number } = {}
) =>
  it.scoped(
    title,
    () =>
      Effect.suspend(body).pipe(
        Effect.provide(KeyPool.layerDefaults),
        Effect.withRandom(options.random ?? Random.make("keymesh"))
      ),
    options.timeout
  )

/** Lets everything that can run now run. */
export const calm = TestClock.adjust(0)

/** The key of a label in the pool's snapshot. */
export const keyOf = (pool: KeyPool.Service, label: string): Effect.Effect<KeySnapshot> =>
  Effect.flatMap(pool.snapshot, (snapshot) => {
    const key = snapshot.keys.find((key) => key.label === label)
    return key === undefined ? Effect.dieMessage(`no key ${label}`) : Effect.succeed(key)
  })

export const idOf = (pool: KeyPool.Service, label: string): Effect.Effect<string> =>
  Effect.map(keyOf(pool, label), (key) => key.id)

/** How long a key is still closed, in milliseconds. */
export const closedFor = (pool: KeyPool.Service, label: string): Effect.Effect<number | undefined> =>
  Effect.gen(function*() {
    const { closed } = yield* keyOf(pool, label)
    const now = yield* Clock.currentTimeMillis
    return closed?.until === undefined ? undefined : closed.until - now
  })

/** Lets an attempt of one key say something; the leases of other keys on the way end without a word. */
export const report = (
  pool: KeyPool.Service,
  label: string,
  outcome: Outcome.Outcome | Fault.Kind,
  details: Fault.Details = {}
) =>
  Effect.scoped(Effect.gen(function*() {
    for (let i = 0; i < 64; i++) {
      const lease = yield* pool.lease
      if (lease.key.label !== label) continue
      return yield* lease.commit(typeof outcome === "string" ? Outcome.fault(Fault.make(outcome, details)) : outcome)
    }
    return yield* Effect.dieMessage(`no lease of ${label}`)
  }))

/** Opens the breaker of a key. */
export const trip = (pool: KeyPool.Service, label: string) => Effect.repeatN(report(pool, label, "ServerError"), 2)

/** Gathers the events from now on; read them after `calm`. */
export const watch: Effect.Effect<
  Effect.Effect<ReadonlyArray<Telemetry.Event>>,
  never,
  Scope.Scope | Telemetry.Telemetry
> = Effect.gen(function*() {
  const telemetry = yield* Telemetry.Telemetry
  const seen = yield* Ref.make(Chunk.empty<Telemetry.Event>())
  const events = yield* telemetry.subscribe
  yield* Effect.forkScoped(Stream.runForEach(events, (event) => Ref.update(seen, Chunk.append(event))))
  return Effect.zipRight(calm, Effect.map(Ref.get(seen), Chunk.toReadonlyArray))
})

/** The events of one name. */
export const named = <Tag extends Telemetry.Event["_tag"]>(
  events: ReadonlyArray<Telemetry.Event>,
  tag: Tag
): ReadonlyArray<Extract<Telemetry.Event, { readonly _tag: Tag }>> =>
  events.filter((event): event is Extract<Telemetry.Event, { readonly _tag: Tag }> => event._tag === tag)
