/**
 * The routes of the fake Anthropic: what it reads from a request, and the shape of its answers, whole and streamed.
 */
import * as Clock from "effect/Clock"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as ParseResult from "effect/ParseResult"
import * as Predicate from "effect/Predicate"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import type * as FakeProvider from "./FakeProvider.js"
import { formOf, json, matched, named, padded, piecesOf, sampleOf, tokensOf, wordsOf } from "./FakeRoutes.js"

/** What was asked. */
export interface Ask {
  readonly key: string | undefined
  readonly model: string
  /** The last thing the user said. */
  readonly prompt: string
  /** The tools that the model may call, none when `tool_choice` is "none". */
  readonly tools: ReadonlyArray<{ readonly name: string; readonly schema: unknown }>
  /** Whether the request ends with the results of tool calls. */
  readonly hasToolResults: boolean
}

/** What the model says: a text, or calls of tools. */
export type Reply = string | { readonly calls: ReadonlyArray<{ readonly name: string; readonly input: unknown }> }

/** Calls the first tool that is offered, else repeats the prompt. */
export const sayBack = (ask: Ask): Reply => {
  const [tool] = ask.tools
  return tool !== undefined && !ask.hasToolResults
    ? { calls: [{ name: tool.name, input: sampleOf(tool.schema) }] }
    : `You said: ${ask.prompt}`
}

/** What all routes share: what is stored, and the model. */
export interface Backstage {
  readonly store: Ref.Ref<Store>
  readonly reply: (ask: Ask) => Reply
}

/** What a route gets: the request, the `:id` of its path, the models that the key may use, and what is backstage. */
export interface Visit extends Backstage {
  readonly request: FakeProvider.Incoming
  readonly id: string
  readonly models: ReadonlyArray<string>
}

/** To fail with a complaint is to answer with it. */
type Routed = Effect.Effect<FakeProvider.Answer, FakeProvider.Complaint>

const routes: ReadonlyArray<readonly [method: string, path: string, handler: (visit: Visit) => Routed]> = [
  ["POST", "/v1/messages", (visit) => createMessage(visit)],
  ["POST", "/v1/messages/count_tokens", (visit) => countTokens(visit)],
  ["POST", "/v1/messages/batches", (visit) => createBatch(visit)],
  ["GET", "/v1/messages/batches", (visit) => list("batch", visit)],
  ["GET", "/v1/messages/batches/:id", (visit) => retrieveBatch(visit)],
  ["GET", "/v1/messages/batches/:id/results", (visit) => batchResults(visit)],
  ["DELETE", "/v1/messages/batches/:id", (visit) => remove("batch", visit)],
  ["POST", "/v1/complete", (visit) => complete(visit)],
  ["GET", "/v1/models", (visit) => listModels(visit)],
  ["GET", "/v1/models/:id", (visit) => retrieveModel(visit)],
  ["POST", "/v1/files", (visit) => uploadFile(visit)],
  ["GET", "/v1/files", (visit) => list("file", visit)],
  ["GET", "/v1/files/:id", (visit) => Effect.map(get("file", visit.id, visit), ({ object }) => json(object))],
  ["GET", "/v1/files/:id/content", (visit) => fileContent(visit)],
  ["DELETE", "/v1/files/:id", (visit) => remove("file", visit)]
]

/** The answer of the route that fits, or the complaint that none does. */
export const answer = (visit: Omit<Visit, "id">): Routed => {
  const { headers, method, path } = visit.request
  if (headers["anthropic-version"] === undefined) return Effect.fail(invalid("anthropic-version: header is required"))
  for (const [routeMethod, pattern, handler] of routes) {
    const id = matched(pattern, path)
    if (routeMethod === method && id !== undefined) return handler({ ...visit, id })
  }
  return Effect.fail(notFound("Not found"))
}

const invalid = (message: string): FakeProvider.Complaint => ({
  status: 400,
  message,
  type: "invalid_request_error",
  code: null,
  param: null
})

/** What is not there, or not for this key. */
export const notFound = (message: string): FakeProvider.Complaint => ({
  ...invalid(message),
  status: 404,
  type: "not_found_error"
})

interface Event {
  readonly type: string
  readonly [field: string]: unknown
}

/** An event, named as its data are. */
export const event = (value: Event, content = false): FakeProvider.Frame => named(value.type, value, content)

// ---------------------------------------------------------------------------------------------------------------------
// Messages
// ---------------------------------------------------------------------------------------------------------------------

const MessageRequest = Schema.Struct({
  model: Schema.String,
  max_tokens: Schema.Int.pipe(Schema.positive()),
  messages: Schema.NonEmptyArray(Schema.Struct({
    role: Schema.Literal("user", "assistant"),
    content: Schema.Union(
      Schema.String,
      Schema.Array(Schema.Struct(
        { type: Schema.String },
        Schema.Record({
          key: Schema.String,
          value: Schema.Unknown
        })
      ))
    )
  })),
  system: Schema.optional(Schema.Unknown),
  stream: Schema.optional(Schema.Boolean),
  tools: Schema.optional(Schema.Array(Schema.Struct({
    name: Schema.String,
    input_schema: Schema.optional(Schema.Unknown)
  }))),
  tool_choice: Schema.optional(Schema.Struct({ type: Schema.String, name: Schema.optional(Schema.String) }))
})

const createMessage = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const body = yield* decodeBody(MessageRequest, visit.request)
    const message = yield* messageOf(body, visit)
    return body.stream === true ? { status: 200, body: { frames: framesOf(message) } } : json(message)
  })

type Message = Effect.Effect.Success<ReturnType<typeof messageOf>>

const messageOf = (body: typeof MessageRequest.Type, visit: Visit) =>
  Effect.gen(function*() {
    const last = body.messages.at(-1)?.content
    const choice = body.tool_choice
    const reply = visit.reply({
      key: visit.request.key,
      model: body.model,
      prompt: textOf(body.messages.findLast(({ role }) => role === "user")?.content),
      tools: (body.tools ?? []).flatMap((tool) =>
        choice?.type === "none" || (choice?.name !== undefined && choice.name !== tool.name)
          ? []
          : [{ name: tool.name, schema: tool.input_schema }]
      ),
      hasToolResults: typeof last === "object" && last.some(({ type }) => type === "tool_result")
    })
    const content = typeof reply === "string"
      ? [{ type: "text" as const, text: reply, citations: null }]
      : yield* Effect.forEach(reply.calls, ({ input, name }) =>
        Effect.map(nextId(visit, "toolu_"), (id) => ({ type: "tool_use" as const, id, name, input })))
    const said = typeof reply === "string" ? reply : JSON.stringify(reply.calls)
    return {
      id: yield* nextId(visit, "msg_"),
      type: "message",
      role: "assistant",
      model: body.model,
      content,
      container: null,
      stop_reason: typeof reply === "string" ? "end_turn" : "tool_use",
      stop_sequence: null,
      usage: {
        input_tokens: promptTokens(body),
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: 0,
        cache_creation: { ephemeral_5m_input_tokens: 0, ephemeral_1h_input_tokens: 0 },
        output_tokens: tokensOf(said),
        server_tool_use: null,
        service_tier: "standard"
      }
    }
  })

/** The stream of a message: it starts, its blocks start, grow by deltas and stop, and it stops. */
const framesOf = (message: Message): ReadonlyArray<FakeProvider.Frame> => {
  const { stop_reason, stop_sequence, usage } = message
  const begun = { ...message, content: [], stop_reason: null, usage: { ...usage, output_tokens: 1 } }
  return [
    event({ type: "message_start", message: begun }),
    ...message.content.flatMap((block, index) => {
      const empty = block.type === "text" ? { ...block, text: "" } : { ...block, input: {} }
      const deltas = block.type === "text"
        ? wordsOf(block.text).map((text) => ({ type: "text_delta", text }))
        : ["", ...piecesOf(JSON.stringify(block.input))].map((partial_json) => ({
          type: "input_json_delta",
          partial_json
        }))
      return [
        event({ type: "content_block_start", index, content_block: empty }, block.type === "tool_use"),
        ...(index === 0 ? [event({ type: "ping" })] : []),
        ...deltas.map((delta) => event({ type: "content_block_delta", index, delta }, true)),
        event({ type: "content_block_stop", index })
      ]
    }),
    event({
      type: "message_delta",
      delta: { stop_reason, stop_sequence },
      usage: { output_tokens: usage.output_tokens }
    }),
    event({ type: "message_stop" })
  ]
}

const TokensRequest = Schema.Struct({ ...MessageRequest.fields, max_tokens: Schema.optional(Schema.Unknown) })

const countTokens = (visit: Visit): Routed =>
  Effect.map(
    decodeBody(TokensRequest, visit.request),
    (body) => json({ input_tokens: promptTokens(body) })
  )

const promptTokens = ({ messages, system }: Pick<typeof TokensRequest.Type, "messages" | "system">): number =>
  tokensOf([textOf(system), ...messages.map(({ content }) => textOf(content))].join(" ").trim())

// ---------------------------------------------------------------------------------------------------------------------
// Text completions, the predecessor of messages
// ---------------------------------------------------------------------------------------------------------------------

const CompleteRequest = Schema.Struct({
  model: Schema.String,
  prompt: Schema.String,
  stream: Schema.optional(Schema.Boolean)
})

const complete = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { model, prompt, stream } = yield* decodeBody(CompleteRequest, visit.request)
    const reply = visit.reply({ key: visit.request.key, model, prompt, tools: [], hasToolResults: false })
    const text = typeof reply === "string" ? reply : ""
    const id = yield* nextId(visit, "compl_")
    const completion = (completion: string, stop_reason: string | null) =>
      ({ type: "completion", id, model, completion, stop_reason, stop: null }) as const
    return stream === true
      ? {
        status: 200,
        body: {
          frames: [
            ...wordsOf(text).map((word) => event(completion(word, null), true)),
            event({ type: "ping" }),
            event(completion("", "stop_sequence"))
          ]
        }
      }
      : json(completion(text, "stop_sequence"))
  })

// ---------------------------------------------------------------------------------------------------------------------
// Models
// ---------------------------------------------------------------------------------------------------------------------

/** What `GET /v1/models` lists for a key whose behaviour names no models. Such a key may use any other, too. */
export const knownModels: ReadonlyArray<string> = ["claude-sonnet-5", "claude-haiku-5-5", "claude-opus-5-5"]

const modelObject = (id: string) => ({ type: "model", id, display_name: id, created_at: "2025-09-29T00:00:00Z" })

const listModels = ({ models, request }: Visit): Routed =>
  pageOf(models.map((id) => ({ id, object: modelObject(id) })), request)

const retrieveModel = ({ id, models }: Visit): Routed =>
  models.includes(id) ? Effect.succeed(json(modelObject(id))) : Effect.fail(notFound(`model: ${id}`))

// ---------------------------------------------------------------------------------------------------------------------
// Files and batches: things that stay with whoever made them
// ---------------------------------------------------------------------------------------------------------------------

/** Everything that is kept between requests. */
export interface Store {
  readonly ids: number
  readonly kept: ReadonlyArray<Kept>
}

/** A stored resource. Only keys of the same owner see it. */
interface Kept {
  readonly owner: string
  readonly kind: "file" | "batch"
  readonly id: string
  readonly object: object
  /** Of a file; of a batch, its results. */
  readonly content: Uint8Array
}

/** What is stored before anything is. */
export const emptyStore: Store = { ids: 0, kept: [] }

const nextId = ({ store }: Visit, prefix: string): Effect.Effect<string> =>
  Ref.modify(store, (state) => [`${prefix}fake${padded(state.ids + 1)}`, { ...state, ids: state.ids + 1 }])

const keep = (thing: Omit<Kept, "owner">, { request, store }: Visit): Effect.Effect<void> =>
  Ref.update(store, (state) => ({ ...state, kept: [...state.kept, { ...thing, owner: request.owner }] }))

const mine = (kind: Kept["kind"], { request, store }: Visit): Effect.Effect<ReadonlyArray<Kept>> =>
  Effect.map(Ref.get(store), ({ kept }) => kept.filter((thing) => thing.kind === kind && thing.owner === request.owner))

const get = (kind: Kept["kind"], id: string, visit: Visit): Effect.Effect<Kept, FakeProvider.Complaint> =>
  Effect.flatMap(mine(kind, visit), (things) =>
    Effect.mapError(
      Effect.fromNullable(things.find((thing) => thing.id === id)),
      () => notFound(`${kind === "file" ? "File" : "Message batch"} not found: ${id}`)
    ))

/** Newest first. */
const list = (kind: Kept["kind"], visit: Visit): Routed =>
  Effect.flatMap(mine(kind, visit), (things) => pageOf(things.toReversed(), visit.request))

/** A page begins after the id in `after_id`, the last one of the page before; of files also in `page`, as a cursor. */
const pageOf = (
  things: ReadonlyArray<{ readonly id: string; readonly object: object }>,
  { query }: FakeProvider.Incoming
): Routed => {
  const after = query.get("after_id") ?? query.get("page")
  if (after !== null && !things.some(({ id }) => id === after)) return Effect.fail(invalid("after_id: not found"))
  const start = things.findIndex(({ id }) => id === after) + 1
  const page = things.slice(start, start + Number(query.get("limit") ?? 20))
  const has_more = start + page.length < things.length
  const last_id = page.at(-1)?.id ?? null
  return Effect.succeed(json({
    data: page.map(({ object }) => object),
    has_more,
    first_id: page.at(0)?.id ?? null,
    last_id,
    next_page: has_more ? last_id : null
  }))
}

const remove = (kind: Kept["kind"], visit: Visit): Routed =>
  Effect.gen(function*() {
    const thing = yield* get(kind, visit.id, visit)
    yield* Ref.update(visit.store, (state) => ({ ...state, kept: state.kept.filter((other) => other !== thing) }))
    return json({ id: thing.id, type: kind === "file" ? "file_deleted" : "message_batch_deleted" })
  })

const uploadFile = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const form = yield* decodeForm(visit.request)
    const file = form.get("file")
    if (!(file instanceof File)) return yield* Effect.fail(invalid("file: Field required"))
    const content = new Uint8Array(yield* Effect.promise(() => file.arrayBuffer()))
    const object = {
      type: "file",
      id: yield* nextId(visit, "file_"),
      size_bytes: content.length,
      created_at: yield* now,
      filename: file.name,
      mime_type: file.type || "application/octet-stream",
      downloadable: true
    }
    yield* keep({ kind: "file", id: object.id, object, content }, visit)
    return json(object)
  })

const fileContent = (visit: Visit): Routed =>
  Effect.map(get("file", visit.id, visit), ({ content }) => ({ status: 200, body: content }))

const BatchRequest = Schema.Struct({
  requests: Schema.NonEmptyArray(Schema.Struct({ custom_id: Schema.String, params: MessageRequest }))
})

const createBatch = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { requests } = yield* decodeBody(BatchRequest, visit.request)
    const id = yield* nextId(visit, "msgbatch_")
    const lines = yield* Effect.forEach(requests, ({ custom_id, params }) =>
      Effect.map(messageOf(params, visit), (message) => {
        const line = { custom_id, result: { type: "succeeded", message } }
        return `${JSON.stringify(line)}\n`
      }))
    const created_at = yield* now
    const object = {
      id,
      type: "message_batch",
      processing_status: "in_progress",
      request_counts: { processing: requests.length, succeeded: 0, errored: 0, canceled: 0, expired: 0 },
      ended_at: null,
      created_at,
      expires_at: created_at,
      archived_at: null,
      cancel_initiated_at: null,
      results_url: null
    }
    yield* keep({ kind: "batch", id, object, content: new TextEncoder().encode(lines.join("")) }, visit)
    return json(object)
  })

/** Batches of this server are done by the time that somebody asks. */
const retrieveBatch = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { content, object } = yield* get("batch", visit.id, visit)
    const succeeded = new TextDecoder().decode(content).split("\n").length - 1
    return json({
      ...object,
      processing_status: "ended",
      request_counts: { processing: 0, succeeded, errored: 0, canceled: 0, expired: 0 },
      ended_at: yield* now,
      results_url: `http://${visit.request.headers["host"]}/v1/messages/batches/${visit.id}/results`
    })
  })

const batchResults = (visit: Visit): Routed =>
  Effect.map(get("batch", visit.id, visit), ({ content }) => ({
    status: 200,
    headers: { "content-type": "application/x-jsonl" },
    body: content
  }))

// ---------------------------------------------------------------------------------------------------------------------
// Reading requests
// ---------------------------------------------------------------------------------------------------------------------

const decodeBody = <A, I>(
  schema: Schema.Schema<A, I>,
  request: FakeProvider.Incoming
): Effect.Effect<A, FakeProvider.Complaint> =>
  Effect.gen(function*() {
    const body = yield* Effect.mapError(
      Schema.decodeUnknown(Schema.parseJson())(request.body),
      () => invalid("The request body is not valid JSON")
    )
    return yield* Effect.mapError(Schema.decodeUnknown(schema)(body), (error) => {
      const [issue] = ParseResult.ArrayFormatter.formatErrorSync(error)
      const name = issue?.path.join(".") ?? ""
      return invalid(issue?._tag === "Missing" ? `${name}: Field required` : `${name}: Input is not valid`)
    })
  })

const decodeForm = (request: FakeProvider.Incoming): Effect.Effect<FormData, FakeProvider.Complaint> =>
  Effect.filterOrFail(formOf(request), Predicate.isNotUndefined, () => invalid("Could not parse multipart form"))

/** Content is a text, or a list of blocks of which some are texts. */
const textOf = (content: unknown): string => {
  if (typeof content === "string") return content
  if (!Array.isArray(content)) return ""
  return content.map((part) => Option.getOrElse(decodeText(part), () => ({ text: "" })).text).join("")
}

const decodeText = Schema.decodeUnknownOption(Schema.Struct({ text: Schema.String }))

// ---------------------------------------------------------------------------------------------------------------------
// Making answers up
// ---------------------------------------------------------------------------------------------------------------------

/** An instant as the API writes it, in whole seconds. */
export const instant = (millis: number): string => new Date(millis).toISOString().replace(/\.\d+Z$/, "Z")

const now = Effect.map(Clock.currentTimeMillis, instant)
