import * as Deferred from "effect/Deferred"
import * as Either from "effect/Either"
import * as FiberId from "effect/FiberId"
import * as HashMap from "effect/HashMap"
import * as Option from "effect/Option"
import * as RedBlackTree from "effect/RedBlackTree"
import * as Affinity from "../../src/Affinity.js"
import * as ApiKey from "../../src/ApiKey.js"
import * as CircuitBreaker from "../../src/CircuitBreaker.js"
import type * as Fault from "../../src/Fault.js"
import * as Homes from "../../src/Homes.js"
import type * as KeyState from "../../src/KeyState.js"
import * as LearnedConcurrency from "../../src/LearnedConcurrency.js"
import * as Leasing from "../../src/Leasing.js"
import type * as Outcome from "../../src/Outcome.js"
import * as PoolKeys from "../../src/PoolKeys.js"
import * as PoolState from "../../src/PoolState.js"
import * as ProviderHealth from "../../src/ProviderHealth.js"
import * as RateLimit from "../../src/RateLimit.js"
import * as Settling from "../../src/Settling.js"
import * as Strategy from "../../src/Strategy.js"
import * as WaitingLine from "../../src/WaitingLine.js"

/**
 * A pool beside a slow and simple account of what happened to it. `World` takes one command after the other, keeps its
 * own books (leases by hand, waits by maximum, probes and trials by holder, the queue as a list), and throws as soon as
 * the pool and the books disagree.
 */

export const baseConfig: PoolState.Config = {
  pool: "model",
  strategy: Strategy.roundRobin,
  breaker: Either.getOrThrow(
    CircuitBreaker.settings({
      threshold: 2,
      cooldown: 2000,
      maxCooldown: 8000,
      probeTimeout: 3000,
      rate: { faults: 0.5, minimumCalls: 5, window: 6000, siblingFactor: 2 }
    })
  ),
  cooldowns: {
    rateLimited: { firstMillis: 1000, factor: 2, maxMillis: 8000 },
    quotaMillis: 20_000,
    revokedMillis: 60_000,
    unauthorizedMillis: [3000, 10_000],
    forbidden: { firstMillis: 4000, factor: 2, maxMillis: 16_000 },
    guardMillis: 20,
    jitterMillis: 250
  },
  tokens: { perCall: 0.2, perSecond: 1, burst: 10, cap: 100 },
  floorMillis: 1000,
  attemptTimeout: undefined,
  times: false,
  hedging: { share: 0.05, success: 0.9 },
  corroborates: true,
  maxWaiters: 5,
  trialMillis: 3500,
  rampStepMillis: 500,
  rampMillis: 3000
}

export interface KeySpec {
  readonly group: string | undefined
  readonly concurrency: number | undefined
  readonly models: ReadonlyArray<string> | undefined
}

export const makeKey = (n: number, spec: KeySpec): ApiKey.ApiKey =>
  Either.getOrThrow(
    ApiKey.make({
      secret: `secret-${n}`,
      label: `key-${n}`,
      weight: 1 + n % 3,
      order: n,
      quotaGroup: spec.group,
      limits: spec.concurrency === undefined ? {} : { concurrency: spec.concurrency },
      models: spec.models
    })
  )

export interface Setup {
  readonly strategy: Strategy.Strategy
  readonly keys: ReadonlyArray<KeySpec>
  /** How many of the keys are there from the beginning. */
  readonly joined: number
  readonly floor: boolean
}

export type Command =
  | {
    readonly _tag: "lease"
    readonly model: string | undefined
    readonly avoid: ReadonlyArray<number>
    readonly only: boolean
    readonly affinity: number
    readonly random: number
  }
  | {
    readonly _tag: "settle"
    readonly nth: number
    readonly outcome: Outcome.Outcome
    readonly end: boolean
    readonly random: number
  }
  | { readonly _tag: "time"; readonly millis: number }
  | { readonly _tag: "add" | "readd" | "retire" | "disable" | "enable" | "reset"; readonly key: number }
  | {
    readonly _tag: "acquire"
    readonly model: string | undefined
    readonly patience: number
    readonly only: boolean
    readonly affinity: number
    readonly random: number
    readonly priority: PoolState.Priority | undefined
  }
  | { readonly _tag: "abandon"; readonly nth: number }
  | { readonly _tag: "dispatch" }
  | { readonly _tag: "close" }

/** What the books hold of a lease. */
interface Held {
  readonly record: PoolState.LeaseRecord
  phase: "open" | "succeeded" | "decided"
}

const fail = (message: string): never => {
  throw new Error(message)
}

const check = (ok: boolean, message: () => string): void => {
  if (!ok) fail(message())
}

export class World {
  readonly config: PoolState.Config
  readonly specs: ReadonlyArray<KeySpec>
  state: PoolState.PoolState
  now = 0
  closed = false
  leases = new Map<number, Held>()
  attributes = new Map<string, ApiKey.ApiKey>()
  retiring = new Set<string>()
  disabled = new Set<string>()
  /** Until when nothing may go to a key, group, or model of one, whatever happens: by `place` string. */
  firm = new Map<string, number>()
  /** Who tries a breaker or a bench alone. */
  alone = new Map<string, { readonly lease: number; readonly since: number }>()
  waiters: Array<PoolState.Waiter> = []
  /** The group that each stored resource was found with last. */
  resources = new Map<string, string>()
  floorAt = -Infinity
  calls = 0

  constructor(setup: Setup) {
    this.config = { ...baseConfig, strategy: setup.strategy, floorMillis: setup.floor ? 1000 : undefined }
    this.specs = setup.keys
    const keys = setup.keys.slice(0, setup.joined).map((spec, n) => makeKey(n, spec))
    for (const key of keys) this.attributes.set(key.id, key)
    this.state = PoolKeys.make(this.config, keys, 0)
    this.audit()
  }

  run(command: Command): void {
    switch (command._tag) {
      case "lease": {
        const request = this.request(command, 0)
        const before = this.state
        const leased = Leasing.lease(this.config, before, request, this.now)
        this.state = leased.state
        if (leased.lease === undefined) {
          this.mustBeBarred(before, request)
        } else this.granted(before, leased.lease, request, leased.events)
        this.placesAreCurrent()
        break
      }
      case "settle":
        this.settle(command)
        break
      case "time":
        this.now += command.millis
        break
      case "add":
      case "readd": {
        const spec = this.specs[command.key % this.specs.length]
        if (spec === undefined) break
        // The same key, given again with other attributes.
        const other = command._tag === "add"
          ? spec
          : {
            group: spec.group === "a" ? "b" : "a",
            concurrency: spec.concurrency === undefined ? 2 : undefined,
            models: spec.models === undefined ? ["m1"] : undefined
          }
        const key = makeKey(command.key % this.specs.length, other)
        this.state = PoolKeys.addKey(this.config, this.state, key, this.now)
        this.attributes.set(key.id, key)
        this.retiring.delete(key.id)
        break
      }
      case "retire":
      case "disable":
      case "enable":
        this.control(command._tag, command.key)
        break
      case "reset": {
        const id = this.idOf(command.key)
        const key = id === undefined ? undefined : this.attributes.get(id)
        const changed = id === undefined ? undefined : PoolKeys.resetKey(this.config, this.state, id, this.now)
        check((changed === undefined) === (key === undefined), () => "reset finds exactly the keys that are there")
        if (changed === undefined || key === undefined) break
        this.state = changed.state
        for (const book of [this.firm, this.alone]) {
          for (const at of book.keys()) {
            const [scope, of] = JSON.parse(at) as [string, string]
            const own = (scope === "breaker" || scope === "key") && of === key.id
            if (own || (scope === "group" && of === key.quotaGroup)) book.delete(at)
          }
        }
        break
      }
      case "acquire":
        this.acquire(command)
        break
      case "abandon": {
        const waiter = this.waiters[command.nth % Math.max(1, this.waiters.length)]
        if (waiter === undefined) break
        this.state = WaitingLine.withoutWaiter(this.state, waiter)
        this.waiters = this.waiters.filter((other) => other !== waiter)
        check(!WaitingLine.isWaiting(this.state, waiter), () => "who left waits no more")
        check(WaitingLine.withoutWaiter(this.state, waiter) === this.state, () => "leaving twice changes nothing")
        break
      }
      case "dispatch":
        this.dispatched(this.state, WaitingLine.dispatch(this.config, this.state, this.now))
        break
      case "close":
        this.closed = true
        this.dispatched(
          { ...this.state, rest: { ...this.state.rest, closed: true } },
          WaitingLine.close(this.config, this.state, this.now)
        )
        break
    }
    this.audit()
  }

  /** Ends everything; afterwards nothing may be left over. */
  finish(): void {
    for (const waiter of this.waiters) this.state = WaitingLine.withoutWaiter(this.state, waiter)
    this.waiters = []
    while (this.leases.size > 0) this.settle({ nth: 0, outcome: { _tag: "Ignored" }, end: true, random: 0 })
    this.audit()
    check(this.state.rest.waiting === 0 && HashMap.size(this.state.rest.lanes) === 0, () => "nobody waits at the end")
    for (const key of PoolState.keys(this.state)) check(key.inFlight === 0, () => "nothing in flight at the end")
    // Long after, every key that is enabled serves, for every model it may serve, one call at least.
    this.now += 10_000_000
    for (const key of PoolState.keys(this.state)) {
      const request = { ...plain, only: (other: ApiKey.ApiKey) => other.id === key.id }
      for (const model of [undefined, ...key.key.models ?? ["m1", "m2"]]) {
        const leased = Leasing.lease(this.config, this.state, { ...request, model }, this.now)
        check(
          (leased.lease !== undefined) === !this.disabled.has(key.id),
          () => `long after, ${key.label} serves exactly when it is enabled (model ${model})`
        )
      }
    }
  }

  private request(
    command: {
      readonly model: string | undefined
      readonly only: boolean
      readonly affinity: number
      readonly random: number
      readonly priority?: PoolState.Priority | undefined
    },
    call: number
  ): PoolState.Request {
    const avoid = "avoid" in command ? (command as { avoid: ReadonlyArray<number> }).avoid : []
    const request = this.plainRequest(command, avoid, call)
    if (command.affinity === 0) return request
    // Of a conversation, of a stored resource, or both.
    const resources = command.affinity % 3 === 0 ? [] : [`file-${command.affinity}`]
    const conversation = command.affinity % 3 === 1 ? undefined : `chat-${command.affinity}`
    const known = Homes.within(this.state, resources, this.now)
    for (const resource of resources) {
      const group = this.resources.get(resource)
      const isThere = group !== undefined &&
        PoolState.keys(this.state).some((key) => !key.retiring && ApiKey.groupOf(key.key) === group)
      check((known !== undefined) === isThere, () => `H4: ${resource} is with ${group}`)
      for (const key of PoolState.keys(this.state)) {
        check(known?.only?.(key.key) !== (ApiKey.groupOf(key.key) !== group), () => "H4: the keys of its group only")
      }
    }
    const wish: PoolState.Request = { ...request, ...known, affinity: { conversation, resources } }
    return command.only ? { ...wish, ...Homes.awaited(this.config, this.state, wish, this.now) } : wish
  }

  private plainRequest(
    command: {
      readonly model: string | undefined
      readonly only: boolean
      readonly random: number
      readonly priority?: PoolState.Priority | undefined
    },
    avoid: ReadonlyArray<number>,
    call: number
  ): PoolState.Request {
    return {
      call,
      model: command.model,
      avoid,
      only: command.only && !("affinity" in command && command.affinity !== 0)
        ? (key) => key.quotaGroup === undefined
        : undefined,
      rotation: avoid.length > 0,
      random: command.random,
      priority: command.priority
    }
  }

  private idOf(n: number): string | undefined {
    const spec = this.specs[n % this.specs.length]
    return spec === undefined ? undefined : makeKey(n % this.specs.length, spec).id
  }

  private control(action: "retire" | "disable" | "enable", n: number): void {
    const id = this.idOf(n)
    if (id === undefined) return
    const changed = PoolKeys.updateKey(
      this.config,
      this.state,
      id,
      (key) => action === "retire" ? { ...key, retiring: true } : { ...key, enabled: action === "enable" },
      this.now
    )
    check((changed === undefined) === !this.attributes.has(id), () => `${action} finds exactly the keys that are there`)
    if (changed === undefined) return
    this.state = changed.state
    if (action === "retire") this.retiring.add(id)
    else if (action === "disable") this.disabled.add(id)
    else this.disabled.delete(id)
    this.mayLeave(id, changed.events)
  }

  private mayLeave(id: string, events: PoolState.Changed["events"]): void {
    const leaves = this.retiring.has(id) && this.heldOf(id) === 0 && this.attributes.has(id)
    const told = events.some((event) => event._tag === "key.removed" && event.keyId === id)
    check(leaves === told, () => `a retired key leaves exactly when its last attempt has ended (${id})`)
    if (!leaves) return
    this.attributes.delete(id)
    this.retiring.delete(id)
    this.disabled.delete(id)
    for (const book of [this.firm, this.alone]) {
      for (const at of book.keys()) {
        const [scope, of] = JSON.parse(at) as [string, string]
        if ((scope === "key" || scope === "breaker") && of === id) book.delete(at)
      }
    }
  }

  private heldOf(id: string): number {
    let count = 0
    for (const { record } of this.leases.values()) if (record.key.id === id) count++
    return count
  }

  private settle(
    command: {
      readonly nth: number
      readonly outcome: Outcome.Outcome
      readonly end: boolean
      readonly random: number
    }
  ): void {
    const held = [...this.leases.values()][command.nth % Math.max(1, this.leases.size)]
    if (held === undefined) return
    const { record } = held
    const late = held.phase === "succeeded" && command.outcome._tag === "Fault"
    const outcome = held.phase === "open" || late ? command.outcome : undefined
    if (outcome === undefined && !command.end) return
    const before = this.state
    const key = PoolState.find(before, record.key.id) ?? fail("a key with an attempt in flight has left")
    const changed = Settling.settle(
      this.config,
      before,
      record,
      outcome,
      command.end,
      this.now,
      command.random
    )
    this.state = changed.state
    held.phase = outcome?._tag === "Success" ? "succeeded" : "decided"
    if (outcome !== undefined) {
      for (const [at, one] of this.alone) {
        if (one.lease === record.id) this.alone.delete(at)
      }
    }
    if (command.end) this.leases.delete(record.id)
    if (outcome?._tag === "Success" && record.affinity !== undefined) {
      for (const resource of record.affinity.resources) this.resources.set(resource, ApiKey.groupOf(key.key))
    }
    if (outcome?._tag === "Success") this.successLiftsOnlyWhatIsOver(before, key, record)
    if (outcome?._tag === "Fault") {
      this.remember(key, record, outcome.fault)
      // After a new wait there is a new trial; one that runs still is an attempt like any other.
      const earlier = benchesOf(before, key, record.model)
      for (const [at, bench] of benchesOf(this.state, PoolState.find(this.state, key.id) ?? key, record.model)) {
        if (bench.until !== earlier.get(at)?.until) this.alone.delete(at)
      }
    }
    this.mayLeave(record.key.id, changed.events)
  }

  /** F4, F1: what was imposed after the lease, or still holds, is not erased by its success. */
  private successLiftsOnlyWhatIsOver(
    before: PoolState.PoolState,
    key: KeyState.KeyState,
    record: PoolState.LeaseRecord
  ): void {
    for (const [at, bench] of benchesOf(before, key, record.model)) {
      const mayLift = bench.stamp < record.id && (this.now >= bench.until || record.floor)
      const after = benchesOf(this.state, PoolState.find(this.state, key.id) ?? key, record.model).get(at)
      const gone = PoolState.find(this.state, key.id) === undefined
      if (!mayLift && !gone) check(after?.until === bench.until, () => `F4: a success erased the later wait of ${at}`)
      if (mayLift && !gone) check(after === undefined, () => `a success lifts what is over (${at})`)
    }
  }

  private remember(key: KeyState.KeyState, record: PoolState.LeaseRecord, fault: Fault.Fault): void {
    const { cooldowns } = this.config
    const wait = fault.waitMillis === undefined ? 0 : fault.waitMillis + cooldowns.guardMillis
    const floorOf: Partial<Record<Fault.Kind, number>> = {
      RateLimited: fault.provenance === "guessed" ? 0 : wait,
      Overloaded: fault.provenance === "guessed" ? 0 : wait,
      QuotaExhausted: Math.max(wait, fault.resetMillis ?? cooldowns.quotaMillis),
      Unauthorized: Math.max(wait, fault.explicit ? cooldowns.revokedMillis : cooldowns.unauthorizedMillis[0] ?? 0),
      Forbidden: fault.failover ? Math.max(wait, cooldowns.forbidden.firstMillis) : 0
    }
    const least = floorOf[fault.kind] ?? 0
    if (least === 0) return
    const shared = fault.scope === "group" && key.key.quotaGroup !== undefined && fault.kind !== "Overloaded"
    const model = fault.kind === "Unauthorized"
      ? undefined
      : fault.perModel || fault.kind === "Forbidden"
      ? record.model
      : undefined
    const at = shared ? placeOf("group", key.key.quotaGroup ?? "", model) : placeOf("key", key.id, model)
    this.firm.set(at, Math.max(this.firm.get(at) ?? 0, this.now + least))
  }

  private acquire(command: Extract<Command, { readonly _tag: "acquire" }>): void {
    const request = this.request(command, 0)
    const until = this.now + command.patience
    const answer = Deferred.unsafeMake<PoolState.LeaseRecord | undefined>(FiberId.none)
    const before = this.state
    const acquired = WaitingLine.acquire(this.config, before, request, { until, answer }, this.now)
    if (this.closed) {
      check(acquired.outcome === "closed", () => "a closed pool starts nothing")
      return
    }
    const waitedBefore = this.waiters.length
    // Who is served from the queue is served first; the books follow in the same order.
    const { lease, middle } = this.served(before, acquired)
    const { outcome } = acquired
    if (typeof outcome === "object" && "slot" in outcome) {
      check(lease === outcome, () => "the newcomer's lease is the newest")
      // Whoever may not wait a second does not wait for what others find out about keys either.
      const hurry = until < this.now + ProviderHealth.suspectMillis
      this.granted(middle, outcome, { ...request, hurry }, acquired.events)
    } else {
      if (typeof outcome === "object") {
        check(outcome.until === until && outcome.answer === answer, () => "the waiter is the one that asked")
        check(WaitingLine.isWaiting(acquired.state, outcome), () => "who waits is in the queue")
        this.waiters.push(outcome)
      }
      this.state = acquired.state
      const sameLane = this.waiters.some((w) => w.answer !== answer && sameQueue(w.request, request))
      if (!sameLane) this.mustBeBarred(acquired.state, request)
      const { early, soonest } = this.soonest(acquired.state, request)
      if (outcome === "refused") {
        check(
          until <= this.now || soonest > until,
          () => `a call was refused although a key may open at ${soonest}, before ${until} (${early})`
        )
      }
      if (outcome === "full") {
        check(waitedBefore >= 0 && this.waiters.length >= this.config.maxWaiters, () => "full")
        const asked = { request: { ...request, call: acquired.state.calls }, since: this.now }
        check(this.waiters.every((waiter) => comesBefore(waiter, asked)), () => "no place for one who is more urgent")
      }
      check(this.waiters.length <= this.config.maxWaiters, () => "more wait than may")
    }
    this.calls = Math.max(this.calls, acquired.state.calls)
  }

  private dispatched(before: PoolState.PoolState, step: WaitingLine.Dispatched): void {
    this.served(before, { ...step, outcome: undefined })
    this.state = step.state
    for (const waiter of this.waiters) {
      check(!this.closed, () => "a closed pool has no waiters")
      check(waiter.until > this.now, () => "who has waited long enough is answered")
      const { soonest } = this.soonest(step.state, waiter.request)
      // Where a told and a guessed wait meet, it may know better.
      const mixed = [...this.firm.values()].some((until) => this.now < until && until <= waiter.until)
      check(soonest <= waiter.until || mixed, () => "who waits in vain is told so")
    }
    for (const head of this.waiters.filter((w) => !this.waiters.some((o) => ahead(o, w)))) {
      this.mustBeBarred(step.state, head.request)
    }
  }

  /** Takes over the answers of a step: their order, and that each was right. */
  private served(
    before: PoolState.PoolState,
    step: WaitingLine.Dispatched & { readonly outcome: unknown }
  ): { readonly lease: PoolState.LeaseRecord | undefined; readonly middle: PoolState.PoolState } {
    const seen = new Set<PoolState.Waiter>()
    let middle = before
    let granted = 0
    for (const answer of step.answers) {
      const { waiter } = answer
      check(this.waiters.includes(waiter) && !seen.has(waiter), () => "each waiter is answered once")
      seen.add(waiter)
      if (answer._tag === "Granted") {
        granted++
        check(!this.closed, () => "a closed pool grants nothing")
        for (const other of this.waiters) {
          if (ahead(other, waiter)) {
            check(
              step.answers.some((a) => a.waiter === other),
              () => `C2: call ${waiter.request.call} was served before call ${other.request.call}`
            )
          }
        }
        // Serving a queue is leasing one by one.
        const leased = Leasing.lease(this.config, middle, waiter.request, this.now)
        check(
          leased.lease?.id === answer.lease.id && leased.lease.key === answer.lease.key,
          () => `call ${waiter.request.call} got another lease than by itself`
        )
        this.state = leased.state
        this.granted(middle, answer.lease, waiter.request, leased.events)
        middle = leased.state
      } else {
        const { soonest } = this.soonest(step.state, waiter.request)
        // The last in a line that is full makes room for one who is more urgent.
        const newcomer = isWaiter(step.outcome) ? step.outcome : undefined
        const makesRoom = newcomer !== undefined && this.waiters.length >= this.config.maxWaiters &&
          comesBefore(newcomer, waiter) &&
          this.waiters.every((other) => other === waiter || seen.has(other) || comesBefore(other, waiter))
        check(
          this.closed || waiter.until <= this.now || soonest > waiter.until || makesRoom,
          () => `a waiter was refused although a key may open at ${soonest}, before ${waiter.until}`
        )
      }
    }
    const order = step.answers.flatMap((a) => a._tag === "Granted" ? [a] : [])
    for (const [i, a] of order.entries()) {
      for (const b of order.slice(i + 1)) {
        check(
          !sameQueue(a.waiter.request, b.waiter.request) || comesBefore(a.waiter, b.waiter),
          () => "C2: the more urgent first, and of those first come, first served"
        )
      }
    }
    this.waiters = this.waiters.filter((waiter) => !seen.has(waiter))
    const outcome = step.outcome
    const lease = typeof outcome === "object" && outcome !== null && "slot" in outcome
      ? (outcome as PoolState.LeaseRecord)
      : undefined
    check(step.state.leases === before.leases + granted + (lease === undefined ? 0 : 1), () => "every lease is told")
    this.state = step.state
    return { lease, middle }
  }

  /** A lease was given; `before` is the state of some time earlier in the same step. */
  private granted(
    before: PoolState.PoolState,
    lease: PoolState.LeaseRecord,
    request: PoolState.Request,
    events: PoolState.Changed["events"]
  ): void {
    const { id } = lease.key
    const key = PoolState.find(before, id) ?? fail("a key that is not there was leased")
    check(this.attributes.get(id) === lease.key, () => "the lease carries the key's newest attributes")
    check(!this.retiring.has(id) && !this.disabled.has(id), () => "a retired or disabled key was leased")
    check(request.model === undefined || lease.key.models?.has(request.model) !== false, () => "not for this model")
    check(request.only?.(lease.key) !== false, () => "an unsuited key was leased")
    const limit = lease.key.limits.concurrency ?? Infinity
    check(this.heldOf(id) < limit, () => `the concurrency limit ${limit} is broken`)
    for (const at of placesOf(lease.key, request.model)) {
      const until = this.firm.get(at) ?? 0
      check(this.now >= until, () => `a wait was broken: ${at} holds until ${until}, leased at ${this.now}`)
    }
    const eligible = this.eligible(before, request)
    const isFloor = events.some((event) => event._tag === "pool.floor" && event.keyId === id) && lease.floor
    check(lease.floor === isFloor, () => "the floor says so")
    this.leases.set(lease.id, { record: lease, phase: "open" })
    this.calls = Math.max(this.calls, lease.call)
    if (lease.floor) {
      check(this.config.floorMillis !== undefined && request.floor !== false, () => "there is no floor")
      check(this.now >= this.floorAt + 1000, () => "F5: the floor opened twice in a second")
      check(eligible.length === 0, () => "F5: the floor opened although a key may serve")
      check(this.nearestIsGuessed(before, request, true), () => "F5: the nearest gate is not a guess")
      this.floorAt = this.now
      return
    }
    // While the pool tries whether a trouble is over, its trials go round the keys.
    const tries = PoolState.trialOf(before, request.model) !== undefined
    if (request.affinity?.conversation !== undefined && !tries) this.seated(before, lease, request)
    check(eligible.some((other) => other.id === id), () => `${key.label} was leased through a closed gate`)
    const others = eligible.filter((other) => !request.avoid.includes(other.slot))
    if (others.length > 0) {
      check(others.some((other) => other.id === id), () => "a key to be avoided was leased although there are others")
    }
    // One at a time, while it is not decided.
    if (lease.probe) this.takeAlone(placeOf("breaker", id, undefined), lease.id, this.config.breaker.probeTimeoutMillis)
    check(lease.probe === (key.breaker._tag !== "Closed"), () => "a lease of a breaker that is not closed is its probe")
    for (const [at, bench] of benchesOf(before, key, request.model)) {
      const single = bench.provenance === "guessed" ||
        ["QuotaExhausted", "Unauthorized", "Forbidden"].includes(bench.kind)
      if (single) this.takeAlone(at, lease.id, this.config.trialMillis)
    }
  }

  /** H4: a conversation stays with its key while that has its share, and nobody gets more than his while others have less. */
  private seated(before: PoolState.PoolState, lease: PoolState.LeaseRecord, request: PoolState.Request): void {
    const fitting = this.eligible(before, request).filter((key) => !request.avoid.includes(key.slot))
    // A provider that is down takes no key out of the mean.
    const all = PoolState.keys(before).filter((key) => this.open(before, key, undefined, false))
    const mean = all.reduce((sum, key) => sum + key.inFlight, 0) / Math.max(1, all.length)
    const bound = Math.max(2, Math.ceil(1.25 * mean))
    const roomy = fitting.filter((key) => key.inFlight < bound)
    const chosen = PoolState.find(before, lease.key.id)
    if (roomy.length > 0) check(roomy.some((key) => key === chosen), () => "H4: beyond its share")
    const from = Affinity.holderOf(before.rest.affinity.conversations, request.affinity?.conversation ?? "", this.now)
    const home = roomy.find((key) => key.id === from)
    if (home !== undefined) check(chosen === home, () => "H4: a conversation stays with its key")
  }

  private takeAlone(at: string, lease: number, patience: number): void {
    const other = this.alone.get(at)
    check(
      other === undefined || !this.leases.has(other.lease) || this.now >= other.since + patience,
      () => `B2: two at once try ${at}`
    )
    this.alone.set(at, { lease, since: this.now })
  }

  /** No lease was given: no key may serve. */
  private mustBeBarred(before: PoolState.PoolState, request: PoolState.Request): void {
    const eligible = this.eligible(before, request)
    check(eligible.length === 0, () => `a call was lost: ${eligible.map((key) => key.label)} could serve it`)
  }

  /** A key stands in the index exactly if its gates are open, after a step that looked. */
  private placesAreCurrent(): void {
    for (const key of PoolState.keys(this.state)) {
      check(
        (key.gatedUntil === undefined) === this.open(this.state, key, undefined, false),
        () => `${key.label} stands in the wrong place after a look: gated until ${key.gatedUntil}`
      )
    }
  }

  private eligible(state: PoolState.PoolState, request: PoolState.Request): ReadonlyArray<KeyState.KeyState> {
    return PoolState.keys(state).filter((key) =>
      request.only?.(key.key) !== false && this.open(state, key, request.model, true, request.hurry)
    )
  }

  private open(
    state: PoolState.PoolState,
    key: KeyState.KeyState,
    model: string | undefined,
    provider = true,
    hurry = false
  ): boolean {
    return this.gates(state, key, model, provider, hurry).every((gate) => gate.soonest <= this.now && !gate.shut)
  }

  /**
   * Every gate of a key that is shut: when it opens by time alone, and when it may open if all that runs ended now.
   */
  private gates(
    state: PoolState.PoolState,
    key: KeyState.KeyState,
    model: string | undefined,
    provider = true,
    hurry = false
  ): ReadonlyArray<{
    readonly shut: boolean
    readonly soonest: number
    readonly until: number
    readonly guess: boolean
  }> {
    const { now } = this
    const shut: Array<{ shut: boolean; soonest: number; until: number; guess: boolean }> = []
    const never = () => shut.push({ shut: true, soonest: Infinity, until: Infinity, guess: false })
    const event = (until: number) => shut.push({ shut: true, soonest: now, until, guess: false })
    const time = (until: number, guess: boolean) => shut.push({ shut: true, soonest: until, until, guess })
    if (key.retiring || !key.enabled) never()
    // Outages keep no books here: they have properties of their own.
    const held = provider ? PoolState.providerGate(this.config, state, key, model, now, hurry) : undefined
    if (held !== undefined) event(held.until)
    if (model !== undefined && key.key.models?.has(model) === false) never()
    if (key.inFlight >= (key.key.limits.concurrency ?? Infinity)) event(Infinity)
    // What is learned of it has tests of its own.
    const learned = key.concurrency
    if (learned !== undefined && key.inFlight >= LearnedConcurrency.most(learned, now)) {
      event(LearnedConcurrency.forgottenAt(learned))
    }
    const { breaker, ramp } = key
    if (breaker._tag === "Open" && now < breaker.until) time(breaker.until, breaker.until !== Infinity)
    if (breaker._tag === "HalfOpen" && breaker.probe !== undefined) {
      const until = breaker.probe.since + this.config.breaker.probeTimeoutMillis
      if (now < until) event(until)
    }
    for (const [at, bench] of benchesOf(state, key, model)) {
      const hard = ["QuotaExhausted", "Unauthorized", "Forbidden"].includes(bench.kind)
      // A guess on top of a told wait is no guess before that is over.
      const guess = bench.provenance === "guessed" && !hard && now >= (this.firm.get(at) ?? 0)
      if (now < bench.until) time(bench.until, guess)
      else if (bench.trial !== undefined && now < bench.trial.since + this.config.trialMillis) {
        event(bench.trial.since + this.config.trialMillis)
      }
    }
    if (ramp !== undefined && now < ramp.since + this.config.rampMillis) {
      const steps = Math.floor((now - ramp.since) / this.config.rampStepMillis)
      if (key.inFlight >= 2 ** (ramp.successes + steps)) event(ramp.since + (steps + 1) * this.config.rampStepMillis)
    }
    // When limits open has its own model.
    for (const limits of [PoolState.partyLimits(state, key), PoolState.modelLimits(state, key, model)]) {
      const full = limits === undefined ? undefined : RateLimit.gate(limits, undefined, now)
      if (full !== undefined) {
        shut.push({ shut: true, soonest: Math.max(now, full.earliest), until: full.until, guess: false })
      }
    }
    return shut
  }

  /** The soonest instant at which a request may be served, events and floor included. */
  private soonest(
    state: PoolState.PoolState,
    request: PoolState.Request
  ): { readonly soonest: number; readonly early: boolean } {
    let soonest = Infinity
    let early = false
    for (const key of PoolState.keys(state)) {
      if (request.only?.(key.key) === false) continue
      const gates = this.gates(state, key, request.model)
      const own = Math.max(this.now, ...gates.map((gate) => gate.soonest))
      early = early || Math.max(this.now, ...gates.map((gate) => gate.until)) > own
      soonest = Math.min(soonest, own)
    }
    const floor = request.floor !== false && this.config.floorMillis !== undefined &&
      this.nearestIsGuessed(state, request, false)
    return {
      soonest: floor ? Math.min(soonest, Math.max(this.now, state.rest.floorAt + 1000)) : soonest,
      early
    }
  }

  /** Of two gates that open at the same time either may be the nearest: `tie` says how to take it. */
  private nearestIsGuessed(state: PoolState.PoolState, request: PoolState.Request, tie: boolean): boolean {
    let at = Infinity
    let guessed = false
    for (const key of PoolState.keys(state)) {
      if (request.only?.(key.key) === false) continue
      const gates = this.gates(state, key, request.model)
      if (gates.length === 0) return false
      const until = Math.max(...gates.map((gate) => gate.until))
      const guess = gates.every((gate) => gate.guess)
      if (until < at || (until === at && guess === tie)) {
        guessed = guess
        at = until
      }
    }
    return guessed
  }

  /** What holds between any two steps. */
  private audit(): void {
    const { rest, slots: _slots, index, leases, nextOpening } = this.state
    const keys = PoolState.keys(this.state)
    check(keys.length === this.attributes.size, () => "the keys are those that joined and have not left")
    check(new Set(keys.map((key) => key.slot)).size === keys.length, () => "no two keys share a slot")
    check(HashMap.size(rest.ids) === keys.length, () => "as many ids as keys")
    for (const key of keys) {
      check(PoolState.find(this.state, key.id) === key, () => "a key is found by its id")
      const given = this.attributes.get(key.id)
      check(given === key.key, () => "the key has the attributes that were given last")
      check(
        key.weight === key.key.weight && key.order === key.key.order && key.label === key.key.label,
        () => "what the strategy sees are the key's attributes"
      )
      check(key.inFlight === this.heldOf(key.id), () => `C6: ${key.label} has ${key.inFlight} in flight`)
      check(key.retiring === this.retiring.has(key.id), () => "retiring as asked")
      check(key.enabled === !this.disabled.has(key.id), () => "enabled as asked")
      const listed = index.pick({
        excluded: (slot) => slot !== key.slot,
        rotation: false,
        random: 0.5,
        now: this.now
      }) !== undefined
      check(listed === (key.gatedUntil === undefined), () => `${key.label} is in the index or gated, not both`)
      const group = key.key.quotaGroup
      if (group !== undefined) {
        const members = Option.getOrUndefined(HashMap.get(rest.groups, group))?.members ?? []
        check(members.filter((slot) => slot === key.slot).length === 1, () => `${key.label} is once in its group`)
      }
    }
    for (const [group, { members }] of rest.groups) {
      for (const slot of members) {
        const key = keys.find((key) => key.slot === slot)
        check(key?.key.quotaGroup === group, () => `slot ${slot} is in group ${group}, whose it is not`)
      }
    }
    for (const [model, benches] of rest.models) {
      for (const slot of HashMap.keys(benches.keys)) {
        check(keys.some((key) => key.slot === slot), () => `model ${model} remembers slot ${slot}, which is free`)
      }
    }
    check(index.size === keys.filter((key) => key.gatedUntil === undefined).length, () => "the index has no others")
    const load = keys.reduce((sum, key) => key.gatedUntil === undefined ? sum + key.inFlight : sum, 0)
    check(this.state.load === load, () => `the load is ${this.state.load}, and not ${load}`)
    const gated = keys.map((key) => key.gatedUntil ?? Infinity)
    check(nextOpening === Math.min(Infinity, ...gated), () => `nextOpening is ${nextOpening}, gates: ${gated}`)
    const open = keys.filter((key) => key.breaker._tag !== "Closed").length
    check(rest.breakersOpen === open, () => `${open} breakers are open, counted ${rest.breakersOpen}`)
    let waiting = 0
    for (const [, lane] of rest.lanes) {
      waiting += RedBlackTree.size(lane)
      check(RedBlackTree.size(lane) > 0, () => "no lane is empty")
      const turns = [...RedBlackTree.keys(lane)]
      check(turns.every((turn, i) => i === 0 || (turns[i - 1] ?? 0n) < turn), () => "a lane is in order")
    }
    check(waiting === rest.waiting, () => `${rest.waiting} wait, the lanes hold ${waiting}`)
    check(waiting === this.waiters.length, () => `${this.waiters.length} should wait, the lanes hold ${waiting}`)
    for (const waiter of this.waiters) check(WaitingLine.isWaiting(this.state, waiter), () => "a waiter got lost")
    check(leases >= this.leases.size, () => "leases count up")
  }
}

export const plain: PoolState.Request = {
  call: 0,
  model: undefined,
  avoid: [],
  only: undefined,
  rotation: false,
  random: 0.5
}

const placeOf = (scope: string, of: string, model: string | undefined): string =>
  JSON.stringify([scope, of, model ?? null])

const placesOf = (key: ApiKey.ApiKey, model: string | undefined): ReadonlyArray<string> => {
  const models = model === undefined ? [undefined] : [undefined, model]
  return models.flatMap((model) => [
    placeOf("key", key.id, model),
    ...(key.quotaGroup === undefined ? [] : [placeOf("group", key.quotaGroup, model)])
  ])
}

/** The cooldowns that bind a key now, for a model, by place. */
export const benchesOf = (
  state: PoolState.PoolState,
  key: KeyState.KeyState,
  model: string | undefined
): ReadonlyMap<string, KeyState.Bench> => {
  const found = new Map<string, KeyState.Bench>()
  const group = key.key.quotaGroup
  const put = (at: string, bench: KeyState.Bench | undefined) => bench === undefined || found.set(at, bench)
  put(placeOf("key", key.id, undefined), key.bench)
  if (group !== undefined) {
    put(placeOf("group", group, undefined), Option.getOrUndefined(HashMap.get(state.rest.groups, group))?.bench)
  }
  const benches = model === undefined ? undefined : Option.getOrUndefined(HashMap.get(state.rest.models, model))
  if (benches !== undefined) {
    put(placeOf("key", key.id, model), Option.getOrUndefined(HashMap.get(benches.keys, key.slot)))
    if (group !== undefined) {
      put(placeOf("group", group, model), Option.getOrUndefined(HashMap.get(benches.groups, group)))
    }
  }
  return found
}

const sameQueue = (a: PoolState.Request, b: PoolState.Request): boolean =>
  a.model === b.model &&
  (a.only === undefined ? b.only === undefined : a.lane !== undefined && a.lane === b.lane)

const ahead = (a: PoolState.Waiter, b: PoolState.Waiter): boolean =>
  sameQueue(a.request, b.request) && comesBefore(a, b)

type Standing = Pick<PoolState.Waiter, "request" | "since">

/** Urgent calls count as having come 10 s before they did, and those that can wait as 10 s after. */
const comesBefore = (a: Standing, b: Standing): boolean => {
  const [from, other] = [a, b].map(({ request: { priority }, since }) =>
    since - (priority === "high" ? 10_000 : priority === "low" ? -10_000 : 0)
  )
  if (from === undefined || other === undefined) return false
  return from < other || (from === other && a.request.call < b.request.call)
}

const isWaiter = (outcome: unknown): outcome is PoolState.Waiter =>
  typeof outcome === "object" && outcome !== null && "since" in outcome
