/**
 * A simulated provider: limits, faults and answers, in the words of OpenAI or of Anthropic. What it decides depends on
 * the scenario, the seed and what was asked of it before, on nothing else.
 */
import { limiterOf } from "./limiters.mjs"
import { seeded } from "./seeded.mjs"

/** From the caller to the limiter. A refusal takes as long again on its way back, and a little. */
export const networkMillis = 10
const refusalMillis = 30

/** Rules that hold per key, group and model, with all state of one run. */
export const makeRules = (scenario, seed, start, asDeclared = false) => {
  const random = seeded(`${seed} phases`)
  const phases = new Map()
  const groups = [...new Set(scenario.keys.map(({ group }) => group))]
  for (const group of groups) for (const [i] of scenario.limits.entries()) phases.set(`${group} ${i}`, random())

  const limiters = new Map()
  const limitersOf = (key, model) => {
    const { group } = scenario.keys[key]
    return scenario.limits.flatMap((limit, i) => {
      if (limit.models !== undefined && !limit.models.includes(model)) return []
      const id = `${group} ${i} ${limit.perModel === true ? model : ""}`
      if (!limiters.has(id)) {
        const own = limit.limitOf === undefined ? limit.limit : limit.limitOf(groups.indexOf(group))
        if (own === undefined) return []
        const spec = {
          ...limit,
          limit: own,
          changes: (limit.changes ?? []).map((change) => ({ ...change, at: start + change.at * 1_000 }))
        }
        const phase = limit.phase === undefined ? phases.get(`${group} ${i}`) : limit.phase
        limiters.set(id, limiterOf(spec, start + phase * limit.per, start, asDeclared))
      }
      return [limiters.get(id)]
    })
  }

  const faults = scenario.faults.map((fault) => ({
    ...fault,
    from: start + fault.from * 1_000,
    to: start + fault.to * 1_000
  }))
  const inFault = ({ every, from, models, keys, to }, key, model, now) => {
    if (now < from || now >= to) return false
    if (keys !== undefined && !keys.includes(key)) return false
    if (models !== undefined && !models.includes(model)) return false
    return every === undefined || Math.floor((now - from) / (every * 1_000)) % 2 === 0
  }
  /** What is wrong for good at this instant, whatever the dice say. */
  const certainFault = (key, model, now) =>
    faults.find((fault) => fault.share === undefined && inFault(fault, key, model, now))
  /** The end of what is wrong now. */
  const faultEnds = (fault, now) => {
    if (fault.every === undefined) return fault.to
    const period = fault.every * 1_000
    return Math.min(fault.to, fault.from + (Math.floor((now - fault.from) / period) + 1) * period)
  }

  /** How many times as long a call takes with a key: the dice of each pair of them. */
  const straggling = (key, call) => {
    const { share = 0, times = 1 } = scenario.stragglers ?? {}
    return share > 0 && seeded(`${seed} straggler ${call.id} ${key}`)() < share ? times : 1
  }

  const costOf = ({ spec: { of } }, call, settled) => {
    const output = settled ? call.output : call.maxTokens
    return of === "tokens" ? call.input + output : of === "input-tokens" ? call.input : of === "output-tokens" ? output : 1
  }

  return {
    limitersOf,
    certainFault,
    faultEnds,
    costOf,
    /** The dice of a brownout: the same for the nth attempt of a call, whoever asks. */
    diced: (key, call, attempt, now) =>
      faults.find((fault) =>
        fault.share !== undefined && inFault(fault, key, call.model, now) &&
        seeded(`${seed} dice ${call.id} ${attempt}`)() < fault.share
      ),
    serviceOf: (key, call) =>
      call.service * (scenario.keys[key].slow ?? 1) * straggling(key, call),
    fits: (key, call, now) =>
      limitersOf(key, call.model).every((limiter) => limiter.fits(now, costOf(limiter, call, false))),
    take: (key, call, now) => {
      for (const limiter of limitersOf(key, call.model)) limiter.take(now, costOf(limiter, call, false))
    },
    refuse: (key, call, now) => {
      for (const limiter of limitersOf(key, call.model)) limiter.refused(now, costOf(limiter, call, false))
    },
    /** At the end of an answer its real tokens are known, and one less is in flight. */
    settle: (key, call, now, takenAt) => {
      for (const limiter of limitersOf(key, call.model)) {
        limiter.ended?.()
        const over = costOf(limiter, call, false) - costOf(limiter, call, true)
        if (over > 0) limiter.giveBack(now, over, takenAt)
      }
    },
    /** The next instant at which this key may be worth a look for this call. */
    next: (key, call, now) =>
      limitersOf(key, call.model).reduce(
        (at, limiter) => Math.max(at, limiter.next(now, costOf(limiter, call, false))),
        now
      )
  }
}

/** The provider of one run. `clock` gives the time, `later` runs something after so many milliseconds. */
export const makeUpstream = ({ announces, calls, clock, dialect, later, scenario, secrets, seed, start }) => {
  const rules = makeRules(scenario, seed, start)
  const attempts = new Map()
  const log = []
  const say = dialect === "anthropic" ? anthropic : openAi

  const headersOf = (key, call, now, extra) => {
    const headers = new Headers({ "content-type": "application/json", ...extra })
    headers.set("date", new Date(now + (scenario.skewSeconds ?? 0) * 1_000).toUTCString())
    if (announces) {
      for (const limiter of rules.limitersOf(key, call.model)) {
        if (limiter.announced === undefined || limiter.spec.per > 60_000) continue
        say.announce(headers, limiter.spec.of, limiter.announced(now), now + (scenario.skewSeconds ?? 0) * 1_000)
      }
    }
    return headers
  }

  const waitHeaders = (millis, now) => {
    const { retryAfter = "both" } = scenario
    if (retryAfter === "none" || !Number.isFinite(millis)) return {}
    if (retryAfter === "date") {
      return { "retry-after": new Date(now + (scenario.skewSeconds ?? 0) * 1_000 + millis + 999).toUTCString() }
    }
    const seconds = { "retry-after": String(Math.max(1, Math.ceil(millis / 1_000))) }
    return retryAfter === "seconds" || dialect === "anthropic"
      ? seconds
      : { ...seconds, "retry-after-ms": String(Math.ceil(millis)) }
  }

  /** What the provider does with a request that reaches it now. */
  const decide = (key, call, now) => {
    const attempt = attempts.get(call.id) ?? 0
    attempts.set(call.id, attempt + 1)
    const fault = rules.certainFault(key, call.model, now) ?? rules.diced(key, call, attempt, now)
    if (fault !== undefined) return { kind: fault.kind, fault, after: fault.afterMillis ?? refusalMillis }
    if (!rules.fits(key, call, now)) {
      const needed = rules.next(key, call, now) - now
      const wait = scenario.told === undefined ? needed : scenario.told(needed)
      const blocked = rules.limitersOf(key, call.model)
        .find((limiter) => !limiter.fits(now, rules.costOf(limiter, call, false)))
      rules.refuse(key, call, now)
      return { kind: "limited", wait, blocked, after: refusalMillis }
    }
    rules.take(key, call, now)
    return { kind: "ok", after: rules.serviceOf(key, call) - networkMillis }
  }

  const json = (status, headers, body) => new Response(JSON.stringify(body), { status, headers })

  const answer = (key, call, verdict, now) => {
    switch (verdict.kind) {
      case "limited": {
        const spec = verdict.blocked?.spec ?? { of: "requests", per: 60_000, limit: 120 }
        const wait = verdict.fault === undefined ? verdict.wait : verdict.fault.to - now
        const headers = headersOf(key, call, now, waitHeaders(wait, now))
        if (announces && verdict.fault !== undefined) {
          const gone = { limit: spec.limit, remaining: 0, fullIn: wait }
          say.announce(headers, spec.of, gone, now + (scenario.skewSeconds ?? 0) * 1_000)
        }
        return [429, headers, say.limited(call, spec, wait)]
      }
      case "quota":
        return [dialect === "anthropic" ? 400 : 429, headersOf(key, call, now, {}), say.quota()]
      case "401":
        return [401, headersOf(key, call, now, {}), say.unauthorized()]
      default:
        return [Number(verdict.kind), headersOf(key, call, now, {}), say.broken(Number(verdict.kind))]
    }
  }

  const fetch = (input, init = {}) => {
    const request = new Headers(init.headers)
    const secret = request.get("x-api-key") ?? request.get("authorization")?.replace(/^Bearer /, "")
    const key = secrets.indexOf(secret)
    if (key < 0) return Promise.reject(new Error(`a request without one of the keys: ${String(input)}`))
    const body = JSON.parse(init.body)
    const call = calls[Number(body.user ?? body.metadata.user_id)]
    const entry = { key, call, sent: clock(), at: undefined, kind: "sent", done: undefined }
    log.push(entry)
    return new Promise((resolve, reject) => {
      let stream
      const { signal } = init
      const abort = () => {
        entry.done ??= clock()
        if (entry.kind === "sent" || entry.kind === "hang") entry.kind = "aborted"
        reject(signal.reason)
        stream?.error(signal.reason)
      }
      if (signal?.aborted === true) return abort()
      signal?.addEventListener("abort", abort, { once: true })
      const finish = (kind) => {
        if (entry.done !== undefined) return false
        signal?.removeEventListener("abort", abort)
        entry.done = clock()
        entry.kind = kind
        return true
      }
      later(networkMillis, () => {
        if (entry.done !== undefined) return
        const decidedAt = clock()
        entry.at = decidedAt
        const verdict = decide(key, call, decidedAt)
        entry.kind = verdict.kind
        if (verdict.kind === "hang") return
        if (verdict.kind === "reset") {
          later(networkMillis, () => {
            if (!finish("reset")) return
            reject(Object.assign(new TypeError("fetch failed"), {
              cause: Object.assign(new Error("read ECONNRESET"), { code: "ECONNRESET" })
            }))
          })
          return
        }
        if (verdict.kind !== "ok") {
          const refusal = answer(key, call, verdict, decidedAt)
          later(verdict.after, () => {
            if (finish(verdict.kind)) resolve(json(...refusal))
          })
          return
        }
        const headers = headersOf(key, call, decidedAt, {})
        const settle = () => rules.settle(key, call, clock(), decidedAt)
        if (body.stream !== true) {
          later(verdict.after, () => {
            settle()
            if (finish("ok")) resolve(json(200, headers, say.answer(call)))
          })
          return
        }
        headers.set("content-type", "text/event-stream")
        const events = say.events(call)
        const encoder = new TextEncoder()
        const source = new ReadableStream({
          start: (controller) => {
            stream = controller
          },
          cancel: () => {
            entry.done ??= clock()
            stream = undefined
          }
        })
        for (const [i, event] of events.entries()) {
          // Headers at once with the first event, after a third of the time; the others evenly over the rest.
          const at = verdict.after * (1 / 3 + 2 / 3 * i / Math.max(1, events.length - 1))
          later(at, () => {
            if (i === 0 && entry.done === undefined) resolve(new Response(source, { status: 200, headers }))
            if (i === events.length - 1) settle()
            if (stream === undefined || entry.done !== undefined) return
            stream.enqueue(encoder.encode(event))
            if (i === events.length - 1 && finish("ok")) stream.close()
          })
        }
      })
    })
  }
  return { fetch, log, rules }
}

/** A duration as Go writes it. */
const goDuration = (millis) => {
  if (millis < 1_000) return `${Math.ceil(millis)}ms`
  const seconds = Math.ceil(millis) / 1_000
  const hours = Math.floor(seconds / 3_600)
  const minutes = Math.floor(seconds / 60) % 60
  const rest = `${Number((seconds % 60).toFixed(3))}s`
  return hours > 0 ? `${hours}h${minutes}m${rest}` : minutes > 0 ? `${minutes}m${rest}` : rest
}

const openAi = {
  announce: (headers, of, { fullIn, limit, remaining }) => {
    headers.set(`x-ratelimit-limit-${of}`, String(limit))
    headers.set(`x-ratelimit-remaining-${of}`, String(remaining))
    headers.set(`x-ratelimit-reset-${of}`, goDuration(fullIn))
  },
  limited: (call, { kind, limit, of, per, says }, wait) => ({
    error: {
      message: kind === "concurrency" ? says : `Rate limit reached for ${call.model} in organization org-sim on ${of} per ${
        per > 60_000 ? "day" : "min"
      } (${of === "tokens" ? "T" : "R"}P${per > 60_000 ? "D" : "M"}): Limit ${limit}, Used ${limit}, Requested ${
        of === "tokens" ? call.input + call.maxTokens : 1
      }.${Number.isFinite(wait) ? ` Please try again in ${goDuration(wait)}.` : ""}`,
      type: of,
      param: null,
      code: "rate_limit_exceeded"
    }
  }),
  quota: () => ({
    error: {
      message: "You exceeded your current quota; check plan and billing details.",
      type: "insufficient_quota",
      param: null,
      code: "insufficient_quota"
    }
  }),
  unauthorized: () => ({
    error: {
      message: "Incorrect API key provided.",
      type: "invalid_request_error",
      param: null,
      code: "invalid_api_key"
    }
  }),
  broken: (status) => ({
    error: {
      message: status === 500 ? "The server had an error while processing your request." : "Overloaded, try later.",
      type: status === 500 ? "server_error" : "service_unavailable_error",
      param: null,
      code: status === 500 ? null : "server_is_overloaded"
    }
  }),
  answer: (call) => ({
    id: `chatcmpl-${call.id}`,
    object: "chat.completion",
    created: 1_760_000_000,
    model: call.model,
    choices: [{ index: 0, message: { role: "assistant", content: "fine" }, finish_reason: "stop" }],
    usage: { prompt_tokens: call.input, completion_tokens: call.output, total_tokens: call.input + call.output }
  }),
  events: (call) => {
    const chunk = (delta, finish) => ({
      id: `chatcmpl-${call.id}`,
      object: "chat.completion.chunk",
      created: 1_760_000_000,
      model: call.model,
      choices: [{ index: 0, delta, finish_reason: finish }]
    })
    const data = [
      chunk({ role: "assistant", content: "" }, null),
      ...Array.from({ length: 4 }, () => chunk({ content: "fine " }, null)),
      {
        ...chunk({}, "stop"),
        usage: { prompt_tokens: call.input, completion_tokens: call.output, total_tokens: call.input + call.output }
      }
    ]
    return [...data.map((item) => `data: ${JSON.stringify(item)}\n\n`), "data: [DONE]\n\n"]
  }
}

const anthropicError = (type, message) => ({ type: "error", error: { type, message, details: null }, request_id: "req" })
const anthropic = {
  announce: (headers, of, { fullIn, limit, remaining }, now) => {
    headers.set(`anthropic-ratelimit-${of}-limit`, String(limit))
    headers.set(`anthropic-ratelimit-${of}-remaining`, String(remaining))
    const reset = new Date(Math.ceil((now + fullIn) / 1_000) * 1_000)
    headers.set(`anthropic-ratelimit-${of}-reset`, reset.toISOString().replace(".000Z", "Z"))
  },
  limited: (_call, { of }) =>
    anthropicError("rate_limit_error", `This request would exceed your organization's rate limit of ${of.replace("-", " ")} per minute.`),
  quota: () => anthropicError("invalid_request_error", "Your credit balance is too low to access the Anthropic API."),
  unauthorized: () => anthropicError("authentication_error", "invalid x-api-key"),
  broken: (status) =>
    status === 500
      ? anthropicError("api_error", "Internal server error")
      : anthropicError("overloaded_error", "Overloaded"),
  answer: (call) => ({
    id: `msg_${call.id}`,
    type: "message",
    role: "assistant",
    model: call.model,
    content: [{ type: "text", text: "fine" }],
    stop_reason: "end_turn",
    stop_sequence: null,
    usage: { input_tokens: call.input, output_tokens: call.output }
  }),
  events: (call) => [
    {
      type: "message_start",
      message: {
        id: `msg_${call.id}`,
        type: "message",
        role: "assistant",
        model: call.model,
        content: [],
        stop_reason: null,
        stop_sequence: null,
        usage: { input_tokens: call.input, output_tokens: 1 }
      }
    },
    { type: "content_block_start", index: 0, content_block: { type: "text", text: "" } },
    { type: "content_block_delta", index: 0, delta: { type: "text_delta", text: "fine" } },
    { type: "content_block_stop", index: 0 },
    {
      type: "message_delta",
      delta: { stop_reason: "end_turn", stop_sequence: null },
      usage: { output_tokens: call.output }
    },
    { type: "message_stop" }
  ].map((event) => `event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`)
}
