/** A process among several that share a pool, without a pool: it tells, claims, and writes down what it hears. */
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Ref from "effect/Ref"
import * as Scope from "effect/Scope"
import * as Stream from "effect/Stream"
import * as RedisPoolStore from "../../src/redis/RedisPoolStore.js"
import type * as SharedPool from "../../src/SharedPool.js"
import { until } from "./RedisServer.js"

export {
  answered,
  cooldown,
  ended,
  group,
  key,
  limited,
  nothing,
  open,
  places,
  probe,
  unsent
} from "../../src/SharedChecks.js"

export interface Member extends SharedPool.SharedPool {
  readonly heard: Effect.Effect<ReadonlyArray<SharedPool.News>>
  /** Waits for the first of a kind that was not heard of before the last `forget`. */
  readonly hears: <Tag extends SharedPool.News["_tag"]>(
    tag: Tag,
    is?: (news: Extract<SharedPool.News, { readonly _tag: Tag }>) => boolean
  ) => Effect.Effect<Extract<SharedPool.News, { readonly _tag: Tag }>>
  readonly forget: Effect.Effect<void>
  readonly leave: Effect.Effect<void>
}

/** Quick enough for tests, and slow enough for busy machines: nobody is away for being busy. */
export const patient: RedisPoolStore.Settings = { claimTimeout: "3 seconds", commandTimeout: "5 seconds" }

/** Joins, and has joined. */
export const make = (settings: RedisPoolStore.Settings, pool = "test") =>
  Effect.tap(begin(settings, pool), (member) => member.hears("Joined"))

/** Begins to join. */
export const begin = (
  settings: RedisPoolStore.Settings,
  pool = "test"
): Effect.Effect<Member, never, Scope.Scope> =>
  Effect.gen(function*() {
    const scope = yield* Scope.fork(yield* Effect.scope, { _tag: "Sequential" })
    const store = yield* Effect.orDie(Scope.extend(RedisPoolStore.make(settings), scope))
    if (store.share === undefined) return yield* Effect.dieMessage("it shares nothing")
    const shared = yield* Scope.extend(store.share(pool), scope)
    const log = yield* Ref.make<ReadonlyArray<SharedPool.News>>([])
    yield* Effect.forkIn(Stream.runForEach(shared.news, (news) => Ref.update(log, (all) => [...all, news])), scope)
    const hears: Member["hears"] = (tag, is = () => true) => {
      const matches = (news: SharedPool.News): news is Extract<SharedPool.News, { readonly _tag: typeof tag }> =>
        news._tag === tag && is(news as Extract<SharedPool.News, { readonly _tag: typeof tag }>)
      const found = Effect.map(Ref.get(log), (all) => all.find(matches))
      return Effect.flatMap(until(found, (news) => news !== undefined), (news) =>
        news === undefined ? Effect.dieMessage("unheard of") : Effect.succeed(news))
    }
    return { ...shared, heard: Ref.get(log), hears, forget: Ref.set(log, []), leave: Scope.close(scope, Exit.void) }
  })

/** A claim that must be granted. */
export const granted = (member: SharedPool.SharedPool, claim: SharedPool.Claim): Effect.Effect<SharedPool.Ticket> =>
  Effect.flatMap(
    member.claim(claim),
    (answer) => answer._tag === "Granted" ? Effect.succeed(answer.ticket) : Effect.dieMessage(JSON.stringify(answer))
  )

/** A claim that must be refused. */
export const refused = (member: SharedPool.SharedPool, claim: SharedPool.Claim) =>
  Effect.flatMap(
    member.claim(claim),
    (answer) => answer._tag === "Refused" ? Effect.succeed(answer) : Effect.dieMessage(JSON.stringify(answer))
  )
