/**
 * What every `PoolStore` must do, as checks that any test runner can run: for those who write a store of their own.
 *
 * Each check is an effect that fails with a `Violation`, which says what was expected and what was found. It opens the
 * store itself, as often as it needs, and uses pool names of its own; run each on a place where nothing is stored yet.
 *
 * @since 0.1.0
 */
import * as Cause from "effect/Cause"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as Fiber from "effect/Fiber"
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import type * as Scope from "effect/Scope"
import type { StoredPool } from "./PoolRecord.js"
import type * as PoolStore from "./PoolStore.js"
import * as SharedChecks from "./SharedChecks.js"

/**
 * A store does not do what it must.
 *
 * @since 0.1.0
 * @category errors
 */
export class Violation extends Data.TaggedError("Violation")<{
  readonly check: string
  readonly expected: string
  readonly found: string
}> {
  override get message(): string {
    return `${this.check}: expected ${this.expected}, found ${this.found}`
  }
}

/**
 * The store to be checked.
 *
 * @since 0.1.0
 * @category models
 */
export interface Subject {
  /** Opens the store. Opened again after its scope was closed, it must find what it had, unless it ends with the process. */
  readonly open: Effect.Effect<PoolStore.Service, unknown, Scope.Scope>
  /** Whether records outlive its scope (default true). */
  readonly durable?: boolean | undefined
  /** Puts a text in the place of a pool's record, as a crash or a stranger would. Without it, that is not checked. */
  readonly corrupt?: ((pool: string, text: string) => Effect.Effect<void, unknown>) | undefined
  /**
   * Makes what is shared unreachable for all that opened the store, and reachable again, with all that it knew. Without it,
   * that is not checked.
   */
  readonly outage?: {
    readonly begin: Effect.Effect<unknown, unknown>
    readonly end: Effect.Effect<unknown, unknown>
  } | undefined
  /** Makes what is shared forget everything. Without it, that is not checked. */
  readonly loseAll?: Effect.Effect<unknown, unknown> | undefined
}

/**
 * One thing that a store must do.
 *
 * @since 0.1.0
 * @category models
 */
export interface Check {
  /** What it must do, as a sentence. */
  readonly name: string
  readonly run: (subject: Subject) => Effect.Effect<void, Violation>
}

/**
 * What every store must do.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as PoolStore from "effect-keymesh/PoolStore"
 * import * as PoolStoreContract from "effect-keymesh/PoolStoreContract"
 *
 * // In place of the store in memory, your own.
 * const checked = Effect.forEach(PoolStoreContract.checks, (check) =>
 *   Effect.flatMap(PoolStore.makeMemory, (store) => check.run({ open: Effect.succeed(store) })))
 * ```
 *
 * @since 0.1.0
 * @category checks
 */
export const checks: ReadonlyArray<Check> = [
  check("a pool that was never saved has no record", (open, is) =>
    Effect.scoped(Effect.gen(function*() {
      const store = yield* open
      yield* is("no record", yield* store.load("contract"), Option.none())
      yield* store.save("contract", recordOf(1))
      yield* is("no record of another pool", yield* store.load("contract-2"), Option.none())
    }))),
  check("what is loaded is what was saved, to the last field", (open, is) =>
    Effect.scoped(Effect.gen(function*() {
      const store = yield* open
      yield* store.save("contract", full)
      yield* is("the record", yield* store.load("contract"), Option.some(full))
      yield* is("the record once more", yield* store.load("contract"), Option.some(full))
    }))),
  check("a record replaces the one before as a whole", (open, is) =>
    Effect.scoped(Effect.gen(function*() {
      const store = yield* open
      yield* store.save("contract", full)
      yield* store.save("contract", recordOf(7))
      yield* is("the later record", yield* store.load("contract"), Option.some(recordOf(7)))
      yield* store.save("contract", full)
      yield* is("the latest record", yield* store.load("contract"), Option.some(full))
    }))),
  check(
    "every name is a pool of its own, whatever characters it has",
    (open, is) =>
      Effect.scoped(Effect.gen(function*() {
        const store = yield* open
        yield* Effect.forEach(names, (name, i) => store.save(name, recordOf(i)), { discard: true })
        yield* Effect.forEach(names, (name, i) =>
          Effect.flatMap(
            store.load(name),
            (found) => is(`the record of ${JSON.stringify(name.slice(0, 40))}`, found, Option.some(recordOf(i)))
          ))
      }))
  ),
  check(
    "a store that is opened again has what was saved before",
    (open, is, subject) =>
      subject.durable === false ? Effect.void : Effect.gen(function*() {
        yield* Effect.scoped(
          Effect.flatMap(open, (store) =>
            Effect.zipRight(store.save("contract", recordOf(1)), store.save("contract", full)))
        )
        const found = yield* Effect.scoped(Effect.flatMap(open, (store) =>
          store.load("contract")))
        yield* is("the record", found, Option.some(full))
      })
  ),
  check(
    "of records that are saved at the same time one stays, whole",
    (open, is) =>
      Effect.scoped(Effect.gen(function*() {
        const store = yield* open
        for (let round = 0; round < 5; round++) {
          const records = Array.from({ length: 8 }, (_, i) => recordOf(round * 8 + i, i * 40))
          const saving = Effect.forEach(records, (record) => store.save("contract", record), {
            concurrency: "unbounded"
          })
          const loading = Effect.replicateEffect(store.load("contract"), 8)
          const [, seen] = yield* Effect.zip(saving, loading, { concurrent: true })
          const last = yield* store.load("contract")
          const saved = (found: Option.Option<StoredPool>) =>
            Option.match(found, {
              onNone: () => round === 0,
              onSome: (record) => same(record, recordOf(record.savedAt, record.keys.length))
            })
          yield* is("a record that was saved", Option.isSome(last) && saved(last), true)
          yield* is("whole records while others are saved", seen.every(saved), true)
        }
      }))
  ),
  check("two that are open at once share the records", (open, is) =>
    Effect.scoped(Effect.gen(function*() {
      const [one, two] = yield* Effect.all([open, open])
      yield* one.save("contract", recordOf(1))
      yield* is("what the other saved", yield* two.load("contract"), Option.some(recordOf(1)))
      yield* two.save("contract", recordOf(2))
      yield* is("what the other saved later", yield* one.load("contract"), Option.some(recordOf(2)))
    }))),
  check(
    "saving that is interrupted leaves the old record or the new one, and the store works on",
    (open, is) =>
      Effect.scoped(Effect.gen(function*() {
        const store = yield* open
        yield* store.save("contract", recordOf(1))
        for (let yields = 0; yields < 8; yields++) {
          const fiber = yield* Effect.fork(store.save("contract", recordOf(2, 200)))
          yield* Effect.repeatN(Effect.yieldNow(), yields)
          yield* Fiber.interrupt(fiber)
          const found = yield* store.load("contract")
          const whole = Option.exists(found, (record) => same(record, recordOf(1)) || same(record, recordOf(2, 200)))
          yield* is("one of the two", whole, true)
        }
        yield* store.save("contract", recordOf(3))
        yield* is("what is saved afterwards", yield* store.load("contract"), Option.some(recordOf(3)))
      }))
  ),
  check("a record of many keys is kept", (open, is) =>
    Effect.scoped(Effect.gen(function*() {
      const store = yield* open
      yield* store.save("contract", recordOf(1, 2_000))
      yield* is(
        "all its keys",
        Option.map(yield* store.load("contract"), ({ keys }) => keys.length),
        Option.some(2_000)
      )
    }))),
  check(
    "what cannot be read is a StoreError that says so and shows nothing of it, and the next record replaces it",
    (open, is, { corrupt }) =>
      corrupt === undefined ? Effect.void : Effect.scoped(Effect.gen(function*() {
        const store = yield* open
        for (const [what, text] of unreadable) {
          yield* store.save("contract", full)
          yield* corrupt("contract", text)
          const error = yield* Effect.flip(store.load("contract"))
          yield* is(`an error that ${what} is unreadable`, [error._tag, error.problem], ["StoreError", "unreadable"])
          yield* is("nothing of the text in the error", `${error.message}${error.detail}`.includes("canary"), false)
          yield* store.save("contract", recordOf(1))
          yield* is("the next record", yield* store.load("contract"), Option.some(recordOf(1)))
        }
      }))
  )
]

/**
 * What every store with `share` must do besides, where its pools are told, and asked for, what all share. They take real
 * time: run them on a real clock, one after the other, with an engine that answers within seconds however busy the machine
 * is; members that are gone should be noticed within ten.
 *
 * @example
 * ```ts
 * import { Effect } from "effect"
 * import * as PoolStore from "effect-keymesh/PoolStore"
 * import * as PoolStoreContract from "effect-keymesh/PoolStoreContract"
 * import * as SharedPool from "effect-keymesh/SharedPool"
 *
 * // In place of the engine in memory, your own: each `open` is one more process.
 * const checked = Effect.forEach(PoolStoreContract.sharedChecks, (check) =>
 *   Effect.flatMap(SharedPool.makeMemory, ({ cutOff, loseAll, restore, share }) =>
 *     check.run({
 *       open: Effect.succeed({ ...PoolStore.none, share }),
 *       outage: { begin: cutOff(), end: restore() },
 *       loseAll
 *     })))
 * ```
 *
 * @since 0.1.0
 * @category checks
 */
export const sharedChecks: ReadonlyArray<Check> = SharedChecks.all.map(({ name, run }) =>
  check(name, (_, is, subject) => run(subject, is))
)

// A hoisted function, because the lists of checks need it.
function check(
  name: string,
  body: (
    open: Subject["open"],
    is: (what: string, found: unknown, expected: unknown) => Effect.Effect<void, Violation>,
    subject: Subject
  ) => Effect.Effect<void, unknown>
): Check {
  const is = (what: string, found: unknown, expected: unknown) =>
    same(found, expected)
      ? Effect.void
      : new Violation({ check: name, expected: `${what}: ${shown(expected)}`, found: shown(found) })
  return {
    name,
    run: (subject) =>
      Effect.catchAllCause(body(subject.open, is, subject), (cause) => {
        const failure = Option.getOrUndefined(Cause.failureOption(cause))
        return failure instanceof Violation
          ? failure
          : new Violation({
            check: name,
            expected: "no failure",
            found: failure === undefined ? Cause.pretty(cause) : shown(failure)
          })
      })
  }
}

/** By what is in it: not by the order of its fields, nor by what is `undefined`. */
const same = (a: unknown, b: unknown): boolean => textOf(a) === textOf(b)

const textOf = (value: unknown): string =>
  JSON.stringify(value, (_, field: unknown) =>
    Predicate.isRecord(field)
      ? Object.fromEntries(Object.entries(field).sort(([a], [b]) => a < b ? -1 : 1))
      : field) ?? "nothing"

const shown = (value: unknown): string => {
  const text = value instanceof Error ? `${value.name}: ${value.message}` : textOf(value)
  return text.length <= 500 ? text : `${text.slice(0, 500)} …`
}

/** A small record of its own kind. */
const recordOf = (savedAt: number, keys = 1): StoredPool => ({
  version: 1,
  savedAt,
  keys: Array.from({ length: keys }, (_, i) => ({
    id: `key_${savedAt}_${i}`,
    enabled: true,
    total: i,
    successes: i,
    faults: 0,
    ignored: 0,
    breaker: { _tag: "Closed", failures: 0, trips: 0 }
  })),
  groups: [],
  models: []
})

/** What may be learned alike of requests and of tokens. */
const learned = {
  since: 12,
  end: 1_700_000_000_000,
  told: true,
  barren: 1,
  doubts: 2,
  owes: 20,
  usual: 750,
  leased: 2,
  accepted: 1,
  refused: 0,
  measured: { shape: "bucket", count: 10, since: 1_699_999_990_000, millis: 10_000 },
  due: 1_700_000_000_100,
  window: { since: 1_700_000_000_000, leased: 2, accepted: 1 },
  leasedAt: 1_700_000_000_050,
  idle: 0,
  steady: 4,
  at: 1_700_000_000_050
} as const

/** A record with all that there can be in one. */
const full: StoredPool = {
  version: 1,
  savedAt: 1_700_000_000_000.25,
  keys: [
    {
      id: "key_open",
      enabled: false,
      total: 9_007_199_254_740_991,
      successes: 3,
      faults: 2,
      ignored: 1,
      answeredAt: 1_699_999_999_000.5,
      breaker: { _tag: "Open", until: 1_700_000_030_000, waitMillis: 30_000, trips: 2, generation: 7 },
      bench: {
        kind: "RateLimited",
        until: 1_700_000_060_000.125,
        waitMillis: 60_000,
        provenance: "told",
        firmMillis: 60_000,
        refused: false,
        step: 1
      }
    },
    {
      id: "key_isolated \u{1f511}",
      enabled: true,
      total: 0,
      successes: 0,
      faults: 0,
      ignored: 0,
      breaker: { _tag: "Isolated", trips: 0, generation: 1 }
    }
  ],
  groups: [{
    group: "org \"one\"",
    bench: {
      kind: "QuotaExhausted",
      until: 1_700_003_600_000,
      waitMillis: 3_600_000,
      provenance: "guessed",
      refused: true,
      step: 0
    }
  }],
  models: [{
    model: "model/one",
    scope: "group",
    of: "org \"one\"",
    bench: {
      kind: "Forbidden",
      until: 1_700_000_600_000,
      waitMillis: 600_000,
      provenance: "guessed",
      refused: true,
      step: 1
    }
  }],
  limits: [{
    scope: "key",
    of: "key_open",
    model: "model/one",
    limits: {
      declared: [{ unit: "requests", windowMillis: 86_400_000, used: "rs*2a 5k 0" }],
      announced: [{
        name: "requests",
        limit: 100,
        remaining: -1,
        most: 20,
        at: 1_700_000_000_000,
        resetAt: 1_700_000_010_000,
        fullAt: 1_700_000_010_500,
        told: true,
        longest: 10_000,
        fill: 0.01,
        since: 3,
        votes: 2
      }],
      learned: { ...learned, size: 1, cost: 1 },
      learnedTokens: { ...learned, size: 812.5, cost: 1_000 },
      typical: { output: 812.5, step: 8 }
    }
  }],
  resources: [{ group: "org \"one\"", names: "file-1 s44we8\nfile-2 s44we8" }]
}

/** Names that are none of a file, or mean something somewhere. */
const names: ReadonlyArray<string> = [
  "openai",
  "OpenAI",
  "openai.json",
  ".",
  "..",
  "../openai",
  "/etc/openai",
  "a/b",
  "a\\b",
  "a:b",
  "a b",
  " ",
  "%2f",
  "*",
  "con",
  "__proto__",
  "constructor",
  "ä",
  "a\u0308",
  "\u{1f511}",
  "line\nbreak",
  "nul\u0000",
  "n".repeat(400),
  `${"n".repeat(400)}2`
]

/** What may stand in a record's place; none of it is one. */
const unreadable: ReadonlyArray<readonly [what: string, text: string]> = [
  ["nothing at all", ""],
  ["half a record", "{\"version\":1,\"savedAt\":5,\"keys\":[{\"id\":\"canary"],
  ["no JSON", "canary\u0000\u0001"],
  ["something else", "[\"canary\"]"],
  ["a record of a newer version", "{\"version\":2,\"savedAt\":5,\"keys\":[],\"groups\":[],\"models\":[],\"canary\":1}"],
  ["a field of another kind", "{\"version\":1,\"savedAt\":\"canary\",\"keys\":[],\"groups\":[],\"models\":[]}"]
]
