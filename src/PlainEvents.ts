/**
 * What happens in a pool, for plain code: handlers by the name of an event, and how healthy each key has been.
 *
 * @since 0.1.0
 */
import * as Effect from "effect/Effect"
import * as HashMap from "effect/HashMap"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Stream from "effect/Stream"
import type * as Fault from "./Fault.js"
import { ConfigurationError } from "./KeymeshError.js"
import * as Telemetry from "./Telemetry.js"

/**
 * The names of the events.
 *
 * @since 0.1.0
 * @category models
 */
export type Name = Telemetry.Event["_tag"]

/**
 * What a handler gets: the event as `Telemetry` tells it, and, for the eight events of the original, its fields.
 *
 * @since 0.1.0
 * @category models
 */
export type EventOf<N extends Name> =
  & Extract<Telemetry.Event, { readonly _tag: N }>
  & { readonly type: N; /** Milliseconds since the epoch. */ readonly timestamp: number }
  & (N extends keyof Fields ? Fields[N] : unknown)

/**
 * The fields that the original's events have, beside `type`, `timestamp` and `keyId`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Fields {
  readonly "request.start": OfRequest
  readonly "request.success": OfRequest & { readonly elapsedMs: number }
  readonly "request.fail": OfRequest & {
    readonly elapsedMs: number
    readonly status: number | undefined
    /** What went wrong, in words: never what the provider wrote, which may hold anything. */
    readonly error: string
  }
  /** `from` and `to` are key ids, `reason` is the kind of the fault. */
  readonly "key.rotated": { readonly from: string; readonly to: string }
  /** `cooldownUntil` is 0 where the breaker is open until it is reset. */
  readonly "circuit.open": { readonly consecutiveFailures: number; readonly cooldownUntil: number }
  readonly "circuit.closed": unknown
  readonly "circuit.half-open": unknown
  readonly "all.exhausted": { readonly reason: string }
}

interface OfRequest {
  /** The path of the request, below the address of the API: `["chat", "completions"]`. */
  readonly path: ReadonlyArray<string>
}

/**
 * A function that is called with each event of one name.
 *
 * @since 0.1.0
 * @category models
 */
export type Handler<N extends Name> = (event: EventOf<N>) => void

/**
 * The handlers of one pool, and the telemetry that calls them.
 *
 * @since 0.1.0
 * @category models
 */
export interface Events {
  readonly telemetry: Telemetry.Service
  readonly on: <N extends Name>(name: N, handler: Handler<N>) => () => void
  readonly off: <N extends Name>(name: N, handler: Handler<N>) => void
  /** What the events so far say of a key, at an instant of the pool's clock. */
  readonly health: (keyId: string, now: number) => Health
}

/**
 * How a key has fared of late.
 *
 * @since 0.1.0
 * @category models
 */
export interface Health {
  /** From 0 to 100: up by 5 with a success, down by 10 with a fault, by 25 with a 401 or 403; comes back with time. */
  readonly healthScore: number
  /** Faults since the last success. */
  readonly consecutiveFailures: number
}

/**
 * Makes them. Handlers are called at once, in order, while the pool goes about its business, so they ought to be quick;
 * what they throw is lost. With `enabled: false` none is ever called.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (options: { readonly enabled: boolean; readonly halfLifeMillis: number }): Events => {
  // Sets are replaced, not changed, so that a handler may take itself or others off.
  const handlers = new Map<Name, ReadonlySet<AnyHandler>>()
  const seq = MutableRef.make(0)
  const healths = MutableRef.make(HashMap.empty<string, Known>())
  const change = (name: Name, f: (known: ReadonlyArray<AnyHandler>) => ReadonlyArray<AnyHandler>): void => {
    if (!names.has(name)) {
      throw new ConfigurationError({
        field: "event",
        problem: `there is no such event; there are ${[...names].join(", ")}`
      })
    }
    handlers.set(name, new Set(f([...handlers.get(name) ?? []])))
  }
  const off: Events["off"] = (name, handler) => change(name, (known) => known.filter((other) => other !== handler))
  return {
    telemetry: {
      // Counters of health are kept whoever listens.
      listened: () => true,
      publish: (events) =>
        Effect.sync(() => {
          for (const event of events) {
            MutableRef.update(seq, (n) => n + 1)
            MutableRef.update(healths, (known) => taken(known, event, options.halfLifeMillis))
            const called = options.enabled ? handlers.get(event._tag) : undefined
            if (called === undefined || called.size === 0) continue
            const told = payloadOf({ ...event, seq: MutableRef.get(seq) })
            for (const handler of called) tell(handler, told)
          }
        }),
      // The handlers are all who listen.
      stream: Stream.empty,
      subscribe: Effect.succeed(Stream.empty)
    },
    on: (name, handler) => {
      if (!Predicate.isFunction(handler)) {
        throw new ConfigurationError({ field: "handler", problem: "must be a function" })
      }
      // What stands under a name gets events of that name only; TypeScript cannot follow it from key to value.
      change(name, (known) => [...known, handler as AnyHandler])
      return () => off(name, handler)
    },
    off,
    health: (keyId, now) => {
      const known = Option.getOrElse(HashMap.get(MutableRef.get(healths), keyId), () => healthy)
      return {
        healthScore: regained(known, now, options.halfLifeMillis),
        consecutiveFailures: known.failures
      }
    }
  }
}

type AnyHandler = (event: EventOf<Name>) => unknown

/** Neither what a handler throws nor what it rejects with may reach a call, or end the process. */
const tell = (handler: AnyHandler, event: EventOf<Name>): void => {
  try {
    const result = handler(event)
    if (Predicate.isPromiseLike(result)) result.then(undefined, () => undefined)
  } catch {
    // Nothing of it is the caller's business.
  }
}

// ------------------------------------------------------------------------------------------------------------- payloads

const names: ReadonlySet<string> = new Set(
  Telemetry.Event.members.flatMap((member) => [
    ...member.fields._tag.ast._tag === "PropertySignatureTransformation"
      ? literals(member.fields._tag.ast.to.type)
      : literals(member.fields._tag.ast.type)
  ])
)

function literals(ast: { readonly _tag: string; readonly literal?: unknown }): ReadonlyArray<string> {
  return typeof ast.literal === "string" ? [ast.literal] : []
}

const payloadOf = (event: Telemetry.Unnumbered & { readonly seq: number }): EventOf<Name> => {
  const common = { ...event, type: event._tag, timestamp: event.at }
  // Each case below gives the fields that `Fields` says of its name.
  return { ...common, ...fieldsOf(event) } as EventOf<Name>
}

const fieldsOf = (event: Telemetry.Unnumbered): object => {
  switch (event._tag) {
    case "request.start":
      return { path: pathOf(event.operation) }
    case "request.success":
      return { path: pathOf(event.operation), elapsedMs: event.durationMillis }
    case "request.fail":
      return {
        path: pathOf(event.operation),
        elapsedMs: event.durationMillis,
        status: event.fault.status,
        error: wordsOf(event.fault)
      }
    case "key.rotated":
      return { from: event.fromKeyId, to: event.keyId }
    case "circuit.open":
      return { consecutiveFailures: event.failures, cooldownUntil: event.until ?? 0 }
    case "all.exhausted":
      return { reason: reasonOf(event.reasonCounts) }
    default:
      return {}
  }
}

const pathOf = (operation: string | undefined): ReadonlyArray<string> =>
  operation === undefined ? [] : operation.slice(operation.indexOf(" ") + 1).split("/").filter((part) => part !== "")

const wordsOf = ({ code, kind, status }: Fault.Fault): string =>
  [kind, status === undefined ? undefined : `(HTTP ${status})`, code].filter(Predicate.isNotUndefined).join(" ")

const reasonOf = (counts: Readonly<Record<string, number>>): string => {
  const reasons = Object.entries(counts).map(([reason, count]) => `${count} ${reason}`)
  return `no key can serve the call${reasons.length === 0 ? "" : `: ${reasons.join(", ")}`}`
}

// --------------------------------------------------------------------------------------------------------------- health

interface Known {
  readonly score: number
  readonly at: number
  readonly failures: number
}

const healthy: Known = { score: 100, at: 0, failures: 0 }

const taken = (
  known: HashMap.HashMap<string, Known>,
  event: Telemetry.Unnumbered,
  halfLifeMillis: number
): HashMap.HashMap<string, Known> => {
  if (event._tag === "key.removed") return HashMap.remove(known, event.keyId)
  if (event._tag !== "request.success" && event._tag !== "request.fail") return known
  const before = Option.getOrElse(HashMap.get(known, event.keyId), () => healthy)
  const score = regained(before, event.at, halfLifeMillis)
  // A key that is as well as can be stays out of the map.
  if (event._tag === "request.success") {
    return score + 5 >= 100
      ? HashMap.remove(known, event.keyId)
      : HashMap.set(known, event.keyId, { score: score + 5, at: event.at, failures: 0 })
  }
  const { status } = event.fault
  const penalty = status === 401 || status === 403 ? 25 : 10
  return HashMap.set(known, event.keyId, {
    score: Math.max(0, score - penalty),
    at: event.at,
    failures: before.failures + 1
  })
}

/** The gap to 100 halves with each half-life. */
const regained = ({ at, score }: Known, now: number, halfLifeMillis: number): number =>
  100 - (100 - score) * 2 ** (-Math.max(0, now - at) / halfLifeMillis)
