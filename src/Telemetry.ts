/**
 * What happens in the pools, as a stream of events.
 *
 * Publishing never blocks, fails or slows a call, whatever the subscribers do. Changes of state (a breaker opening, a
 * key cooling) are kept apart from what comes with calls, however they end, so that a slow subscriber loses the events
 * of calls before it loses changes; gaps show in `seq`.
 *
 * @since 0.1.0
 */
import * as Chunk from "effect/Chunk"
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as Layer from "effect/Layer"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as PubSub from "effect/PubSub"
import * as Queue from "effect/Queue"
import * as Schema from "effect/Schema"
import type * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as Fault from "./Fault.js"
import type { ConfigurationError } from "./KeymeshError.js"
import * as Checks from "./Settings.js"

const base = {
  /** The pool's name. */
  pool: Schema.String,
  /** When it happened: milliseconds since the epoch, on the pool's clock. */
  at: Schema.Number,
  /** Counts the events of this Telemetry service; a gap means that events were dropped for this subscriber. */
  seq: Schema.Number
}
const ofKey = { keyId: Schema.String, label: Schema.String }
const model = { model: Schema.optionalWith(Schema.String, { exact: true }) }
const ofAttempt = {
  ...ofKey,
  ...model,
  /** The call the attempt belongs to; unique in the pool. */
  call: Schema.Number,
  /** The number of the attempt in its call, from 1. */
  attempt: Schema.Number,
  /** What was asked for, where it is known: such as `POST /chat/completions`, below the API's address. */
  operation: Schema.optionalWith(Schema.String, { exact: true })
}

const ofCircuit = {
  ...ofKey,
  from: Schema.Literal("Closed", "Open", "HalfOpen"),
  /** Grows with every transition of this key's breaker. */
  generation: Schema.Number,
  /** Openings in a row. */
  trips: Schema.Number
}

const TrailEntry = Schema.Struct({
  attempt: Schema.Number,
  ...ofKey,
  at: Schema.Number,
  waitedMillis: Schema.Number,
  durationMillis: Schema.Number,
  outcome: Schema.String,
  status: Schema.optional(Schema.Number),
  code: Schema.optional(Schema.String),
  passedOver: Schema.optional(Schema.Record({ key: Schema.String, value: Schema.Number })),
  lost: Schema.optional(Schema.Boolean)
})
const Trail = Schema.Struct({
  entries: Schema.Array(TrailEntry),
  more: Schema.Record({ key: Schema.String, value: Schema.Number })
})

const KeyReason = Schema.Struct({
  ...ofKey,
  gate: Schema.String,
  fault: Schema.optional(Fault.Kind),
  until: Schema.optional(Schema.Number)
})

/**
 * An attempt is about to be sent.
 *
 * @since 0.1.0
 * @category events
 */
export const RequestStart = Schema.TaggedStruct("request.start", { ...base, ...ofAttempt })

/**
 * An attempt's answer belongs to the caller. `durationMillis` is the time from its start to this moment.
 *
 * @since 0.1.0
 * @category events
 */
export const RequestSuccess = Schema.TaggedStruct("request.success", {
  ...base,
  ...ofAttempt,
  durationMillis: Schema.Number
})

/**
 * An attempt failed. `late`: the fault came after its answer had been handed to the caller (a stream cut in the middle).
 *
 * @since 0.1.0
 * @category events
 */
export const RequestFail = Schema.TaggedStruct("request.fail", {
  ...base,
  ...ofAttempt,
  durationMillis: Schema.Number,
  fault: Fault.Fault,
  late: Schema.Boolean
})

/**
 * The next attempt of a call goes to another key.
 *
 * @since 0.1.0
 * @category events
 */
export const KeyRotated = Schema.TaggedStruct("key.rotated", {
  ...base,
  ...ofAttempt,
  fromKeyId: Schema.String,
  reason: Fault.Kind
})

/**
 * A key's breaker opened; it admits its probe at `until`.
 *
 * @since 0.1.0
 * @category events
 */
export const CircuitOpen = Schema.TaggedStruct("circuit.open", {
  ...base,
  ...ofCircuit,
  until: Schema.optionalWith(Schema.Number, { exact: true }),
  failures: Schema.Number
})

/**
 * A key's breaker closed.
 *
 * @since 0.1.0
 * @category events
 */
export const CircuitClosed = Schema.TaggedStruct("circuit.closed", { ...base, ...ofCircuit })

/**
 * A key's breaker admitted its single probe.
 *
 * @since 0.1.0
 * @category events
 */
export const CircuitHalfOpen = Schema.TaggedStruct("circuit.half-open", { ...base, ...ofCircuit })

/**
 * A call failed because no key could serve it; once per call.
 *
 * @since 0.1.0
 * @category events
 */
export const AllExhausted = Schema.TaggedStruct("all.exhausted", {
  ...base,
  ...model,
  call: Schema.Number,
  nextAvailableAt: Schema.optionalWith(Schema.Number, { exact: true }),
  reasons: Schema.Array(KeyReason),
  reasonCounts: Schema.Record({ key: Schema.String, value: Schema.Number })
})

const ParentSpan = Schema.Struct({ traceId: Schema.String, spanId: Schema.String, sampled: Schema.Boolean })

/**
 * A call has its answer, or its error, with the trail of its attempts. `outcome` is `success`, the kind of the last fault,
 * the tag of the pool's error, or `ignored` (interrupted, or a failure that says nothing of the key). For a stream this is
 * the moment of its first content: what fails later is told by a `request.fail` with `late`. Leases taken by hand
 * (`pool.lease`) are no calls that end.
 *
 * @since 0.1.0
 * @category events
 */
export const CallEnd = Schema.TaggedStruct("call.end", {
  ...base,
  ...model,
  call: Schema.Number,
  /** As in the events of its attempts. */
  operation: Schema.optionalWith(Schema.String, { exact: true }),
  outcome: Schema.String,
  attempts: Schema.Number,
  durationMillis: Schema.Number,
  trail: Trail,
  /** The span in which it was made, if there was one. */
  parent: Schema.optionalWith(ParentSpan, { exact: true })
})

/**
 * A call waits for a key.
 *
 * @since 0.1.0
 * @category events
 */
export const CallWaiting = Schema.TaggedStruct("call.waiting", {
  ...base,
  ...model,
  call: Schema.Number,
  waiting: Schema.Number,
  until: Schema.optionalWith(Schema.Number, { exact: true })
})

/**
 * A key (or its group, or one model of either) is not used until `until`.
 *
 * @since 0.1.0
 * @category events
 */
export const KeyCooldown = Schema.TaggedStruct("key.cooldown", {
  ...base,
  ...ofKey,
  ...model,
  scope: Schema.Literal("key", "group"),
  group: Schema.optionalWith(Schema.String, { exact: true }),
  kind: Fault.Kind,
  provenance: Fault.Provenance,
  until: Schema.Number
})

/**
 * A key was switched off (by hand).
 *
 * @since 0.1.0
 * @category events
 */
export const KeyDisabled = Schema.TaggedStruct("key.disabled", { ...base, ...ofKey })

/**
 * A key joined the pool, or was switched on again.
 *
 * @since 0.1.0
 * @category events
 */
export const KeyAdded = Schema.TaggedStruct("key.added", {
  ...base,
  ...ofKey,
  /** True when the key was given twice: the second one was dropped. */
  duplicate: Schema.Boolean
})

/**
 * A key left the pool; its last attempt has ended.
 *
 * @since 0.1.0
 * @category events
 */
export const KeyRemoved = Schema.TaggedStruct("key.removed", { ...base, ...ofKey })

/**
 * The provider itself is taken for down, for one model or all.
 *
 * @since 0.1.0
 * @category events
 */
export const ProviderOpen = Schema.TaggedStruct("provider.open", { ...base, ...model, origin: Schema.String })

/**
 * The provider answers again; or nobody has asked for long, and it is no longer taken for down.
 *
 * @since 0.1.0
 * @category events
 */
export const ProviderClosed = Schema.TaggedStruct("provider.closed", { ...base, ...model, origin: Schema.String })

/**
 * No key was eligible and only guesses held them back, so one call was let through.
 *
 * @since 0.1.0
 * @category events
 */
export const PoolFloor = Schema.TaggedStruct("pool.floor", { ...base, ...ofKey })

/**
 * Several keys behave as if they shared one limit that nobody declared.
 *
 * @since 0.1.0
 * @category events
 */
export const GroupSuspected = Schema.TaggedStruct("group.suspected", {
  ...base,
  ...model,
  keyIds: Schema.Array(Schema.String)
})

/**
 * A retry had to wait for, or did not get, a retry token.
 *
 * @since 0.1.0
 * @category events
 */
export const BudgetDenied = Schema.TaggedStruct("budget.denied", {
  ...base,
  call: Schema.Number,
  reason: Schema.Literal("tokens", "time")
})

/**
 * The store failed, was slow, or held something unreadable; the pool goes on with what it knows.
 *
 * @since 0.1.0
 * @category events
 */
export const StoreDegraded = Schema.TaggedStruct("store.degraded", { ...base, problem: Schema.String })

/**
 * Every event, told apart by `_tag`.
 *
 * @since 0.1.0
 * @category events
 */
export const Event = Schema.Union(
  RequestStart,
  RequestSuccess,
  RequestFail,
  KeyRotated,
  CircuitOpen,
  CircuitClosed,
  CircuitHalfOpen,
  AllExhausted,
  CallEnd,
  CallWaiting,
  KeyCooldown,
  KeyDisabled,
  KeyAdded,
  KeyRemoved,
  ProviderOpen,
  ProviderClosed,
  PoolFloor,
  GroupSuspected,
  BudgetDenied,
  StoreDegraded
)

/**
 * An event, as the streams give it.
 *
 * @since 0.1.0
 * @category events
 */
export type Event = typeof Event.Type

type WithoutSeq<E> = E extends Event ? Omit<E, "seq"> : never

/**
 * An event before it is numbered.
 *
 * @since 0.1.0
 * @category events
 */
export type Unnumbered = WithoutSeq<Event>

/**
 * An event as plain JSON, for logs. It holds key ids and labels, never a secret.
 *
 * @example
 * ```ts
 * import { Effect, Stream } from "effect"
 * import * as Telemetry from "effect-keymesh/Telemetry"
 *
 * const logs = Telemetry.stream.pipe(
 *   Stream.map(Telemetry.encode),
 *   Stream.runForEach((json) => Effect.log(json))
 * )
 * ```
 *
 * @since 0.1.0
 * @category encoding
 */
export const encode: (event: Event) => typeof Event.Encoded = Schema.encodeSync(Event)

/**
 * The event again, from what `encode` made.
 *
 * @since 0.1.0
 * @category encoding
 */
export const decode: (json: unknown) => Event = Schema.decodeUnknownSync(Event)

/**
 * The service.
 *
 * @since 0.1.0
 * @category models
 */
export interface Service {
  /** Numbers and publishes events, in order. Never blocks, never fails, and does nothing once the service is closed. */
  readonly publish: (events: ReadonlyArray<Unnumbered>) => Effect.Effect<void>
  /** Whether anybody listens: pools do not even build the events of requests when nobody does. */
  readonly listened: () => boolean
  /** The events from now on, after the latest changes of state; each run of the stream is a subscription of its own. */
  readonly stream: Stream.Stream<Event>
  /** As `stream`, but subscribed as soon as the effect has run, until its scope closes. */
  readonly subscribe: Effect.Effect<Stream.Stream<Event>, never, Scope.Scope>
}

/**
 * The telemetry of all pools that share it.
 *
 * @since 0.1.0
 * @category tags
 */
export class Telemetry extends Context.Tag("effect-keymesh/Telemetry")<Telemetry, Service>() {}

/**
 * Settings of the service. Changes of state are `circuit.*`, `provider.*`, `key.cooldown`, `key.disabled`, `key.added`,
 * `key.removed`, `group.suspected` and `store.degraded`; every other event belongs to some call.
 *
 * @since 0.1.0
 * @category models
 */
export interface Options {
  /** How many events of any kind a subscriber may lag behind before it loses some (default 4096, at least 1). */
  readonly capacity?: number | undefined
  /** How many changes of state a subscriber may lag behind before it loses some (default 1024, at least 1). */
  readonly changes?: number | undefined
  /** How many past changes of state a new subscriber gets first (default 64; 0: none). */
  readonly replay?: number | undefined
}

/**
 * Makes the service; it closes with its scope, which ends every stream. Fails with `ConfigurationError`, which names
 * the field, when a setting is unknown or is no whole number that can be used.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (options: Options = {}): Effect.Effect<Service, ConfigurationError, Scope.Scope> =>
  Effect.flatMap(buffersOf(options), fromBuffers)

type Buffers = { readonly [Name in keyof Options]-?: number }

const defaultBuffers: Buffers = { capacity: 4096, changes: 1024, replay: 64 }

const buffersOf = (options: Options): Checks.Checked<Buffers> =>
  Either.gen(function*() {
    yield* Checks.refuseUnknown(options, Object.keys(defaultBuffers), "")
    return {
      capacity: yield* Checks.integer(options.capacity ?? defaultBuffers.capacity, "capacity", 1),
      changes: yield* Checks.integer(options.changes ?? defaultBuffers.changes, "changes", 1),
      replay: yield* Checks.integer(options.replay ?? defaultBuffers.replay, "replay")
    }
  })

const fromBuffers = (buffers: Buffers): Effect.Effect<Service, never, Scope.Scope> =>
  Effect.gen(function*() {
    // Sliding, with `publish`: under `dropping` a subscriber that never reads would starve one that does.
    const all = yield* Effect.acquireRelease(PubSub.sliding<Event>(buffers.capacity), PubSub.shutdown)
    const changes = yield* Effect.acquireRelease(
      PubSub.sliding<Event>({ capacity: buffers.changes, replay: buffers.replay }),
      PubSub.shutdown
    )
    // A cell rather than a Ref: `listened` is read on the path of every call, outside any effect.
    const counters = MutableRef.make<Counters>({ seq: 0, subscribers: 0, closed: false })
    const subscribers = (by: 1 | -1) =>
      Effect.sync(() => MutableRef.update(counters, (c) => ({ ...c, subscribers: c.subscribers + by })))
    // Publishing to a PubSub that is shut down interrupts the publisher: a late call must not die of its telemetry.
    yield* Effect.addFinalizer(() => Effect.sync(() => MutableRef.update(counters, (c) => ({ ...c, closed: true }))))

    // Numbering and publishing are one step, without a pause in which another fiber could publish: so every subscriber
    // sees the events by number. Sliding hubs never make a publisher wait, so that running them on the spot is safe.
    const publish = (events: ReadonlyArray<Unnumbered>): Effect.Effect<void> =>
      events.length === 0 ? Effect.void : Effect.sync(() => {
        const before = MutableRef.getAndUpdate(counters, (c) => ({ ...c, seq: c.seq + events.length }))
        if (before.closed) return
        // A member of the union without its number, and the number again, is that member.
        const numbered = events.map((event, i) => ({ ...event, seq: before.seq + i + 1 }) as Event)
        const changed = numbered.filter(isChange)
        if (changed.length > 0) Effect.runSync(PubSub.publishAll(changes, changed))
        if (before.subscribers > 0) Effect.runSync(PubSub.publishAll(all, numbered))
      })

    const subscribe = Effect.gen(function*() {
      yield* Effect.acquireRelease(subscribers(1), () => subscribers(-1))
      const ofAll = yield* PubSub.subscribe(all)
      const ofChanges = yield* PubSub.subscribe(changes)
      // Taken now: what comes from here on is in both.
      return inOrder(ofAll, ofChanges, yield* Effect.map(Queue.takeAll(ofChanges), Chunk.toReadonlyArray))
    })

    return {
      publish,
      listened: () => MutableRef.get(counters).subscribers > 0,
      stream: Stream.unwrapScoped(subscribe),
      subscribe
    }
  })

interface Counters {
  readonly seq: number
  readonly subscribers: number
  readonly closed: boolean
}

/**
 * Which events tell of a change of state. The others come with calls, as many as there are calls: were one of them
 * among the changes, a flood of calls would push the changes out. A record, so that no new event goes unsorted.
 */
const changesState: Readonly<Record<Event["_tag"], boolean>> = {
  "request.start": false,
  "request.success": false,
  "request.fail": false,
  "key.rotated": false,
  "circuit.open": true,
  "circuit.closed": true,
  "circuit.half-open": true,
  "all.exhausted": false,
  "call.end": false,
  "call.waiting": false,
  "key.cooldown": true,
  "key.disabled": true,
  "key.added": true,
  "key.removed": true,
  "provider.open": true,
  "provider.closed": true,
  "pool.floor": false,
  "group.suspected": true,
  "budget.denied": false,
  "store.degraded": true
}

const isChange = (event: Event): boolean => changesState[event._tag]

/**
 * One stream from both buffers, by number. Every event goes through `all`; `changes` fills in what `all` lost. So it is
 * enough to wait on `all`, and then to add from `changes` what is not newer than what `all` gave.
 */
const inOrder = (
  all: Queue.Dequeue<Event>,
  changes: Queue.Dequeue<Event>,
  replayed: ReadonlyArray<Event>
): Stream.Stream<Event> => {
  interface Held {
    readonly late: ReadonlyArray<Event>
    readonly seen: number
  }
  const step = (held: Held, batch: ReadonlyArray<Event>, drained: ReadonlyArray<Event>) => {
    const newest = batch.reduce((newest, event) => Math.max(newest, event.seq), 0)
    const candidates = [...held.late, ...drained]
    const bySeq = new Map<number, Event>()
    for (const event of [...batch, ...candidates.filter((event) => event.seq <= newest)]) {
      if (event.seq > held.seen) bySeq.set(event.seq, event)
    }
    const events = [...bySeq.values()].sort((a, b) => a.seq - b.seq)
    const last = events[events.length - 1]
    return {
      events,
      held: { late: candidates.filter((event) => event.seq > newest), seen: last === undefined ? held.seen : last.seq }
    }
  }
  const drain = Effect.map(Queue.takeUpTo(changes, 4096), Chunk.toReadonlyArray)
  const seen = replayed.reduce((newest, event) => Math.max(newest, event.seq), 0)
  return Stream.concat(
    Stream.fromIterable(replayed),
    Stream.unfoldChunkEffect({ late: [], seen } as Held, (held) =>
      Effect.gen(function*() {
        const batch = Chunk.toReadonlyArray(yield* Queue.takeBetween(all, 1, 4096))
        const next = step(held, batch, yield* drain)
        return Option.some([Chunk.unsafeFromArray(next.events), next.held] as const)
      }))
  ).pipe(Stream.interruptWhen(Queue.awaitShutdown(all)))
}

/**
 * The service with its defaults: one value, so that every pool of a program shares it.
 *
 * @since 0.1.0
 * @category layers
 */
export const layer: Layer.Layer<Telemetry> = Layer.scoped(Telemetry, fromBuffers(defaultBuffers))

/**
 * The service with settings. Make it once and share the layer. Fails as `make` does.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerWith = (options: Options): Layer.Layer<Telemetry, ConfigurationError> =>
  Layer.scoped(Telemetry, make(options))

/**
 * The events from now on, after the latest changes of state.
 *
 * @example
 * ```ts
 * import { Console, Stream } from "effect"
 * import * as Telemetry from "effect-keymesh/Telemetry"
 *
 * const watch = Telemetry.stream.pipe(
 *   Stream.filter((event) => event._tag === "circuit.open"),
 *   Stream.runForEach((event) => Console.log(`${event.label} is out until ${event.until}`))
 * )
 * ```
 *
 * @since 0.1.0
 * @category streams
 */
export const stream: Stream.Stream<Event, never, Telemetry> = Stream.unwrap(
  Effect.map(Telemetry, (telemetry) => telemetry.stream)
)

/**
 * Runs an effect for each event, in order, for as long as the layer lives. It is subscribed before the layer is ready.
 * An effect that dies is logged as an error through Effect's logger, and the next event comes all the same.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerForEach = <R>(
  f: (event: Event) => Effect.Effect<void, never, R>
): Layer.Layer<never, never, Telemetry | Exclude<R, Scope.Scope>> =>
  Layer.scopedDiscard(Effect.gen(function*() {
    const events = yield* Effect.flatMap(Telemetry, (telemetry) => telemetry.subscribe)
    const each = (event: Event) =>
      Effect.suspend(() => f(event)).pipe(
        Effect.catchAllCause((cause) =>
          Effect.annotateLogs(Effect.logError(`What should run for the event ${event._tag} died`, cause), {
            pool: event.pool,
            seq: event.seq
          })
        ),
        // Only the logger itself is left to have died, and there is nobody to tell.
        Effect.catchAllCause(() => Effect.void)
      )
    yield* Effect.forkScoped(Stream.runForEach(events, each))
  }))

/**
 * Logs every event through Effect's logger: failures and exhaustion as warnings, changes of state, `pool.floor` and
 * `budget.denied` at info, other events of calls at debug; the event is the log's annotations, its tag the message.
 *
 * @since 0.1.0
 * @category layers
 */
export const layerLogger: Layer.Layer<never, never, Telemetry> = layerForEach((event) => {
  const { _tag, ...fields } = encode(event)
  const log = warned.has(_tag)
    ? Effect.logWarning(_tag)
    : isChange(event) || informed.has(_tag)
    ? Effect.logInfo(_tag)
    : Effect.logDebug(_tag)
  return Effect.annotateLogs(log, { ...fields })
})

const warned: ReadonlySet<Event["_tag"]> = new Set([
  "request.fail",
  "circuit.open",
  "all.exhausted",
  "provider.open",
  "store.degraded",
  "key.disabled"
])

/** What comes with calls, and still is worth a line. */
const informed: ReadonlySet<Event["_tag"]> = new Set(["pool.floor", "budget.denied"])
