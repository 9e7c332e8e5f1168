/**
 * How subjects, cooldowns and breakers are written in Redis, and read again. What is read may be anything: it is checked.
 *
 * @since 0.1.0
 */
import type * as Option from "effect/Option"
import * as Schema from "effect/Schema"
import * as Fault from "../Fault.js"
import type * as SharedPool from "../SharedPool.js"

/**
 * The names of a pool's keys. What stands in braces is all that a cluster looks at to place a key. Channels are common to
 * all databases of a server, and no client puts its prefix before them: `place` tells them apart.
 *
 * @since 0.1.0
 * @category models
 */
export interface Names {
  readonly record: string
  readonly meta: string
  readonly members: string
  readonly cooldowns: string
  readonly breakers: string
  readonly held: string
  readonly channel: string
  readonly log: (limit: string) => string
  readonly probe: (subject: string) => string
}

/**
 * @since 0.1.0
 * @category constructors
 */
export const namesOf = (prefix: string, pool: string, place = ""): Names => {
  const tag = `{${prefix}:${escaped(pool)}}`
  return {
    record: `${tag}:record`,
    meta: `${tag}:meta`,
    members: `${tag}:members`,
    cooldowns: `${tag}:cooldowns`,
    breakers: `${tag}:breakers`,
    held: `${tag}:held`,
    channel: `${tag}:news:${place}`,
    log: (limit) => `${tag}:log:${limit}`,
    probe: (subject) => `${tag}:probe:${subject}`
  }
}

/** As in URLs, but of any text: halves of characters, which URLs refuse, are written as their codes. */
const escaped = (text: string): string =>
  text.replace(/[^A-Za-z0-9_.-]/g, (char) => `%${char.charCodeAt(0).toString(16).padStart(4, "0")}`)

const unescaped = (text: string): string =>
  text.replace(/%([0-9a-f]{4})/g, (_, code) => String.fromCharCode(parseInt(code, 16)))

/**
 * A subject as a text.
 *
 * @since 0.1.0
 * @category encoding
 */
export const subject = ({ model, of, scope }: SharedPool.Subject): string =>
  `${scope === "key" ? "k" : "g"}/${escaped(of)}${model === undefined ? "" : `/${escaped(model)}`}`

/**
 * A subject from its text.
 *
 * @since 0.1.0
 * @category decoding
 */
export const toSubject = (text: string): SharedPool.Subject => {
  const [scope, of = "", model] = text.split("/")
  return {
    scope: scope === "g" ? "group" : "key",
    of: unescaped(of),
    ...(model === undefined ? {} : { model: unescaped(model) })
  }
}

const millis = Schema.Number.pipe(Schema.nonNegative())
const count = Schema.Number.pipe(Schema.nonNegative())

const Cooldown = Schema.Struct({
  o: Schema.String,
  k: Fault.Kind,
  r: Schema.Number,
  w: millis,
  f: Schema.optional(Schema.Number),
  p: Fault.Provenance,
  x: Schema.optional(Schema.Boolean),
  s: count
})

/**
 * Whole milliseconds, cut far above all that anybody waits: numbers must stay exact.
 *
 * @since 0.1.0
 * @category encoding
 */
export const cut = (millis: number): number => Math.ceil(Math.min(Math.max(-longest, millis), longest))
const longest = 1e12

/**
 * A cooldown as Redis keeps it, with what remains of it.
 *
 * @since 0.1.0
 * @category encoding
 */
export const cooldown = (told: SharedPool.SharedCooldown): typeof Cooldown.Type => ({
  o: subject(told.subject),
  k: told.kind,
  r: cut(told.forMillis),
  w: Math.max(0, cut(told.waitMillis), cut(told.forMillis)),
  ...(told.firmMillis === undefined ? {} : { f: cut(told.firmMillis) }),
  p: told.provenance,
  x: told.refused,
  s: told.step
})

/**
 * @since 0.1.0
 * @category decoding
 */
export const toCooldown = ({ f, k, o, p, r, s, w, x }: typeof Cooldown.Type): SharedPool.SharedCooldown => ({
  subject: toSubject(o),
  kind: k,
  forMillis: r,
  waitMillis: w,
  ...(f === undefined ? {} : { firmMillis: f }),
  provenance: p,
  refused: x ?? false,
  step: s
})

const Breaker = Schema.Struct({
  k: Schema.String,
  e: Schema.Number,
  g: Schema.Number,
  s: Schema.Literal("C", "O", "I"),
  t: count,
  w: Schema.optional(millis),
  r: Schema.optional(millis)
})

/**
 * The state of a breaker as Redis keeps it, with what remains of it.
 *
 * @since 0.1.0
 * @category encoding
 */
export const breakerState = (state: SharedPool.BreakerState) =>
  state._tag === "Open"
    ? { s: "O", t: state.trips, w: Math.max(0, cut(state.waitMillis), cut(state.forMillis)), r: cut(state.forMillis) }
    : { s: state._tag === "Closed" ? "C" : "I", t: state.trips }

/**
 * @since 0.1.0
 * @category decoding
 */
export const toBreaker = ({ e, g, k, r, s, t, w }: typeof Breaker.Type): SharedPool.SharedBreaker => ({
  keyId: k,
  version: { epoch: e, generation: g },
  state: s === "O"
    ? { _tag: "Open", forMillis: r ?? 0, waitMillis: w ?? 0, trips: t }
    : { _tag: s === "C" ? "Closed" : "Isolated", trips: t }
})

/**
 * A ticket as Redis keeps it: who has it, and what it holds.
 *
 * @since 0.1.0
 * @category models
 */
export interface Ticket {
  readonly t: string
  readonly m: string
  /** Limits by name: of whom, how much of how much in how long. */
  readonly l: ReadonlyArray<{
    readonly k: string
    readonly o: string
    readonly n: number
    readonly w: number
    readonly a: number
    readonly u: "r" | "t"
  }>
  readonly c: ReadonlyArray<{ readonly o: string; readonly n: number }>
  readonly p: ReadonlyArray<{ readonly o: string; readonly w: number; readonly b?: string }>
  readonly h?: true
}

/**
 * @since 0.1.0
 * @category encoding
 */
export const ticket = (id: string, member: string, claim: SharedPool.Claim): Ticket => ({
  t: id,
  m: member,
  l: claim.limits.map((limit) => ({
    k: limitName(limit),
    o: subject(limit.subject),
    n: limit.limit,
    w: Math.max(1, cut(limit.windowMillis)),
    a: amount(limit.amount),
    u: limit.unit === "requests" ? "r" : "t"
  })),
  c: claim.concurrency.map(({ most, subject: of }) => ({ o: subject(of), n: most })),
  p: claim.probes.map(({ forMillis, subject: of }) => ({
    o: subject(of),
    w: Math.max(1, cut(forMillis)),
    // What the key's own breaker says decides of its probe as well.
    ...(of.scope === "key" && of.model === undefined ? { b: of.of } : {})
  })),
  ...(claim.held === true ? { h: true } : {})
})

/**
 * The name of a limit's log.
 *
 * @since 0.1.0
 * @category encoding
 */
export const limitName = (
  { subject: of, unit, windowMillis }: Pick<SharedPool.SharedLimit, "subject" | "unit" | "windowMillis">
): string => `${subject(of)}:${unit}:${cut(windowMillis)}`

/**
 * Whole numbers only are counted: more rather than less, but no more than can be counted.
 *
 * @since 0.1.0
 * @category encoding
 */
export const amount = (taken: number): number => Number.isFinite(taken) ? Math.max(0, cut(taken)) : 0

/** A list as scripts write it: an empty one looks like an object. */
const listOf = <A, I>(item: Schema.Schema<A, I>) =>
  Schema.transform(Schema.Union(Schema.Array(item), Schema.Struct({})), Schema.typeSchema(Schema.Array(item)), {
    strict: false,
    decode: (list) => Array.isArray(list) ? list : [],
    encode: (list) => list
  })

const Item = Schema.Union(
  Schema.Struct({ t: Schema.Literal("M"), n: count }),
  Schema.Struct({ t: Schema.Literal("C"), c: Cooldown }),
  Schema.Struct({ t: Schema.Literal("L"), o: Schema.String, r: Schema.Number }),
  Schema.Struct({ t: Schema.Literal("B"), b: Breaker }),
  Schema.Struct({
    t: Schema.Literal("R"),
    k: Schema.String,
    q: Schema.optional(Schema.String),
    e: Schema.Number,
    g: Schema.Number
  }),
  Schema.Struct({ t: Schema.Literal("F"), o: Schema.String })
)

/**
 * One thing that was published.
 *
 * @since 0.1.0
 * @category models
 */
export type Item = typeof Item.Type

/**
 * What was published in one step: in which epoch, the number of it, and by whom.
 *
 * @since 0.1.0
 * @category decoding
 */
export const readPush = Schema.decodeUnknownOption(Schema.parseJson(Schema.Struct({
  e: Schema.NumberFromString,
  s: Schema.Number,
  f: Schema.String,
  n: Schema.Array(Item)
})))

/**
 * @since 0.1.0
 * @category models
 */
export type Push = Option.Option.Value<ReturnType<typeof readPush>>

/**
 * @since 0.1.0
 * @category decoding
 */
export const readCooldowns = Schema.decodeUnknownOption(Schema.parseJson(listOf(Cooldown)))

/**
 * @since 0.1.0
 * @category decoding
 */
export const readBreakers = Schema.decodeUnknownOption(Schema.parseJson(listOf(Breaker)))

/**
 * The tickets of processes that are gone.
 *
 * @since 0.1.0
 * @category decoding
 */
export const readOrphans = Schema.decodeUnknownOption(Schema.parseJson(listOf(Schema.Struct({
  t: Schema.String,
  l: listOf(Schema.Struct({ k: Schema.String })),
  p: listOf(Schema.Struct({ o: Schema.String }))
}))))
