/**
 * What processes share of one pool: the port. Behind it is an engine that all of them reach; where it cannot be reached,
 * each goes on with what it knows.
 *
 * No instant crosses the port, only durations from the moment of crossing, so that the clocks of two processes are never
 * compared: between processes the engine's own clock measures.
 *
 * @since 0.1.0
 */
import type * as Effect from "effect/Effect"
import type * as Stream from "effect/Stream"
import type * as Fault from "./Fault.js"

/**
 * Of whom something is told: of a key or of a quota group, for one model or for all.
 *
 * @since 0.1.0
 * @category models
 */
export interface Subject {
  readonly scope: "key" | "group"
  /** A key's id, or a group's name. */
  readonly of: string
  readonly model?: string | undefined
}

/**
 * A cooldown as processes tell each other of it. Two of one subject merge by the maximum of their ends, firm and not, and
 * `refused` stays.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedCooldown {
  readonly subject: Subject
  readonly kind: Fault.Kind
  /** How much longer it lasts. 0 is worth telling: after a guess the way back is one trial. */
  readonly forMillis: number
  /** Its whole length. */
  readonly waitMillis: number
  /** How much of what remains is more than a guess; absent: nothing. */
  readonly firmMillis?: number | undefined
  readonly provenance: Fault.Provenance
  readonly refused: boolean
  readonly step: number
}

/**
 * Orders the transitions of a key's breaker, whoever made them: by `epoch`, then by `generation`. An engine that lost what
 * it knew begins a larger epoch.
 *
 * @since 0.1.0
 * @category models
 */
export interface Version {
  readonly epoch: number
  readonly generation: number
}

/**
 * Where a breaker stands, as processes tell each other of it. Half-open it is to nobody: who has the probe has claimed it.
 *
 * @since 0.1.0
 * @category models
 */
export type BreakerState =
  | { readonly _tag: "Closed"; readonly trips: number }
  | { readonly _tag: "Open"; readonly forMillis: number; readonly waitMillis: number; readonly trips: number }
  | { readonly _tag: "Isolated"; readonly trips: number }

/**
 * A key's breaker as it stands for all.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedBreaker {
  readonly keyId: string
  readonly version: Version
  readonly state: BreakerState
}

/**
 * What a process tells the others.
 *
 * - `Cooldown`: one was imposed here.
 * - `Lifted`: the cooldown of the subject is over, or was a mistake. It had at most `forMillis` left (negative: it ended so
 *   long ago); one that lasts longer than that by more than a second is another, of which was not known here: it stays.
 * - `Breaker`: a transition that was made here, on the version that was known here (`undefined`: none). It counts only if
 *   no other was made on that version before; a breaker of which the engine knows nothing takes any.
 * - `Reset`: by hand; everything held against the key, and its group, is forgotten everywhere. The breaker is closed with
 *   a new version.
 * - `Taken`: so much of a limit was taken here while the engine was away, or before it lost what it knew; it counts from
 *   now on for one window.
 *
 * @since 0.1.0
 * @category models
 */
export type Notice =
  | { readonly _tag: "Cooldown"; readonly cooldown: SharedCooldown }
  | { readonly _tag: "Lifted"; readonly subject: Subject; readonly forMillis: number }
  | {
    readonly _tag: "Breaker"
    readonly keyId: string
    readonly from: Version | undefined
    readonly to: BreakerState
  }
  | { readonly _tag: "Reset"; readonly keyId: string; readonly group?: string | undefined }
  | {
    readonly _tag: "Taken"
    readonly subject: Subject
    readonly unit: "requests" | "tokens"
    readonly limit: number
    readonly windowMillis: number
    readonly amount: number
  }

/**
 * What a process hears; nobody hears what he told himself.
 *
 * - `Joined`: the engine answers (again). `members` counts the processes that it hears of, this one included; the rest is
 *   all that it knows. `kept` is false when it had lost what it knew, or knows nothing yet: then each process tells again
 *   what it knows.
 * - `Away`: the engine does not answer, once per outage. `members` is how many there were last. `problem` shows no secret.
 * - `Members`: how many there are now.
 * - `Cooldown`, `Lifted`, `Breaker`, `Reset`: what another has told, as far as the engine took it in.
 * - `Freed`: something was given back that another was refused for want of.
 *
 * @since 0.1.0
 * @category models
 */
export type News =
  | {
    readonly _tag: "Joined"
    readonly members: number
    readonly kept: boolean
    readonly cooldowns: ReadonlyArray<SharedCooldown>
    readonly breakers: ReadonlyArray<SharedBreaker>
  }
  | { readonly _tag: "Away"; readonly members: number; readonly problem: string }
  | { readonly _tag: "Members"; readonly members: number }
  | { readonly _tag: "Cooldown"; readonly cooldown: SharedCooldown }
  | { readonly _tag: "Lifted"; readonly subject: Subject; readonly forMillis: number }
  | { readonly _tag: "Breaker"; readonly breaker: SharedBreaker }
  | {
    readonly _tag: "Reset"
    readonly keyId: string
    readonly group?: string | undefined
    readonly version: Version
  }
  | { readonly _tag: "Freed"; readonly subject: Subject }

/**
 * One limit that an attempt must fit into, over all processes. What is more than the limit fits when nothing is taken.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedLimit {
  readonly subject: Subject
  readonly unit: "requests" | "tokens"
  readonly limit: number
  readonly windowMillis: number
  /** How much this attempt takes: 1 request, or so many tokens. */
  readonly amount: number
}

/**
 * What an attempt needs of what all processes share. It gets all of it or nothing.
 *
 * @since 0.1.0
 * @category models
 */
export interface Claim {
  readonly limits: ReadonlyArray<SharedLimit>
  readonly concurrency: ReadonlyArray<{ readonly subject: Subject; readonly most: number }>
  /** The one probe of a half-open breaker, or the one trial after a cooldown: nobody else has it for so long. */
  readonly probes: ReadonlyArray<{ readonly subject: Subject; readonly forMillis: number }>
  /** The attempt is under way already, since before the engine answered: limits and concurrency are taken whatever there is. */
  readonly held?: boolean | undefined
}

/**
 * What becomes of a claim.
 *
 * - `Refused`: nothing was taken. `subject` is whose limit, concurrency or probe it was; it does not fit before `forMillis`
 *   are over unless something is given back, of which `Freed` tells. `mayFree` says whether that can be: something is in
 *   flight. Of a limit, what is in flight and not answered yet is free again after one window at the earliest; of
 *   concurrency, `forMillis` is `Infinity`; a probe is over after its own `forMillis`.
 * - `Away`: the engine did not answer in time: local knowledge decides.
 *
 * @since 0.1.0
 * @category models
 */
export type Answer =
  | { readonly _tag: "Granted"; readonly ticket: Ticket }
  | {
    readonly _tag: "Refused"
    readonly gate: "limit" | "concurrency" | "probing"
    readonly subject: Subject
    readonly forMillis: number
    readonly mayFree: boolean
  }
  | { readonly _tag: "Away" }

/**
 * Names a claim that was granted.
 *
 * @since 0.1.0
 * @category models
 */
export interface Ticket {
  readonly id: string
}

/**
 * What became of an attempt with a ticket. `Answered`, at the headers or when it ended without any: its request counts for
 * one window from now. `Ended`: so many tokens count for one window from now (`undefined`: as many as were claimed),
 * concurrency and probes are free. `Unsent`: all is given back. `Ended` without `Answered` before is both.
 *
 * @since 0.1.0
 * @category models
 */
export type Settled =
  | { readonly _tag: "Answered" }
  | { readonly _tag: "Ended"; readonly tokens: number | undefined }
  | { readonly _tag: "Unsent" }

/**
 * What became of notices. `breakers` are, for each `Breaker` and `Reset` among them, how the key's breaker stands for all
 * now: as was told, or as another told before.
 *
 * @since 0.1.0
 * @category models
 */
export type Told =
  | { readonly _tag: "Told"; readonly breakers: ReadonlyArray<SharedBreaker> }
  | { readonly _tag: "Away" }

/**
 * What a pool has of an engine. None of it fails: what cannot be reached is `Away`.
 *
 * @since 0.1.0
 * @category models
 */
export interface SharedPool {
  /** Begins with `Joined` or `Away`. Read by one reader; nothing told by others since `Joined` is missing, or `Joined` comes again. */
  readonly news: Stream.Stream<News>
  /**
   * Tells the others, in this order, in at most one round trip and a bounded time. After `Away` nothing of it is kept: who
   * told it tells it again after `Joined`, if it is still so.
   */
  readonly tell: (notices: ReadonlyArray<Notice>) => Effect.Effect<Told>
  /** At most one round trip, and a bounded time (25 ms by default). A claim that is interrupted, or answered too late, is given back. */
  readonly claim: (claim: Claim) => Effect.Effect<Answer>
  /** Does not wait for the engine. Tickets that it does not know (any more) change nothing. */
  readonly settle: (ticket: Ticket, settled: Settled) => Effect.Effect<void>
}

/**
 * A subject as one text, the same for the same subject and no other.
 *
 * @since 0.1.0
 * @category getters
 */
export const nameOf = ({ model, of, scope }: Subject): string => JSON.stringify([scope, of, model ?? null])
