/**
 * The routes of the fake OpenAI: what it reads from a request, and the shape of its answers, whole and streamed.
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

/** What was asked, whichever route it came by. */
export interface Ask {
  readonly route: "chat" | "responses" | "completions" | "transcriptions"
  readonly key: string | undefined
  readonly model: string
  /** The last thing the user said; of a transcription, the name of the file. */
  readonly prompt: string
  /** The tools that the model may call, none when `tool_choice` is "none". */
  readonly tools: ReadonlyArray<{ readonly name: string; readonly parameters: unknown }>
  /** Whether the request ends with the results of tool calls. */
  readonly hasToolResults: boolean
  /** The JSON schema that the answer must match, if there is one. */
  readonly schema: unknown
}

/** What the model says: a text, or calls of tools. */
export type Reply = string | { readonly calls: ReadonlyArray<{ readonly name: string; readonly arguments: unknown }> }

/** Calls the first tool that is offered, else fills in the schema that is asked for, else repeats the prompt. */
export const sayBack = (ask: Ask): Reply => {
  const [tool] = ask.tools
  if (tool !== undefined && !ask.hasToolResults) {
    return { calls: [{ name: tool.name, arguments: sampleOf(tool.parameters) }] }
  }
  return ask.schema === undefined ? `You said: ${ask.prompt}` : JSON.stringify(sampleOf(ask.schema))
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
  ["POST", "/v1/chat/completions", (visit) => chatCompletion(visit)],
  ["POST", "/v1/completions", (visit) => completion(visit)],
  ["POST", "/v1/responses", (visit) => createResponse(visit)],
  ["GET", "/v1/responses/:id", (visit) => retrieve("response", visit)],
  ["POST", "/v1/embeddings", (visit) => embeddings(visit)],
  ["POST", "/v1/moderations", (visit) => moderation(visit)],
  ["POST", "/v1/audio/transcriptions", (visit) => transcription(visit)],
  ["GET", "/v1/models", ({ models }) => Effect.succeed(json({ object: "list", data: models.map(modelObject) }))],
  ["GET", "/v1/models/:id", (visit) => retrieveModel(visit)],
  ["POST", "/v1/files", (visit) => uploadFile(visit)],
  ["GET", "/v1/files", (visit) => listFiles(visit)],
  ["GET", "/v1/files/:id", (visit) => retrieve("file", visit)],
  ["GET", "/v1/files/:id/content", (visit) => fileContent(visit)],
  ["DELETE", "/v1/files/:id", (visit) => deleteFile(visit)],
  ["POST", "/v1/batches", (visit) => createBatch(visit)],
  ["GET", "/v1/batches/:id", (visit) => retrieveBatch(visit)]
]

/** The answer of the route that fits, or the complaint that none does. */
export const answer = (visit: Omit<Visit, "id">): Routed => {
  const { method, path } = visit.request
  for (const [routeMethod, pattern, handler] of routes) {
    const id = matched(pattern, path)
    if (routeMethod === method && id !== undefined) {
      return handler({ ...visit, id })
    }
  }
  return Effect.fail(invalid(404, `Invalid URL (${method} ${path})`))
}

const invalid = (status: number, message: string, param: string | null = null, code: string | null = null) => ({
  status,
  message,
  type: "invalid_request_error",
  code,
  param
})

const stream = (frames: ReadonlyArray<FakeProvider.Frame>): FakeProvider.Answer => ({ status: 200, body: { frames } })

/** An unnamed event, as chat streams have them. */
export const data = (value: unknown, content = false): FakeProvider.Frame => ({
  text: `data: ${JSON.stringify(value)}\n\n`,
  content
})

interface Event {
  readonly type: string
  readonly [field: string]: unknown
}

/** A named event, as Responses streams have them. */
export const event = (value: Event, content = false): FakeProvider.Frame => named(value.type, value, content)

const done: FakeProvider.Frame = { text: "data: [DONE]\n\n" }

// ---------------------------------------------------------------------------------------------------------------------
// Chat completions
// ---------------------------------------------------------------------------------------------------------------------

const maybe = <A, I>(schema: Schema.Schema<A, I>) => Schema.optional(Schema.NullOr(schema))

const ToolChoice = Schema.Union(
  Schema.String,
  Schema.Struct({
    name: Schema.optional(Schema.String),
    function: Schema.optional(Schema.Struct({ name: Schema.String }))
  })
)

const ChatRequest = Schema.Struct({
  model: Schema.String,
  messages: Schema.Array(Schema.Struct({ role: Schema.String, content: Schema.optional(Schema.Unknown) })),
  stream: maybe(Schema.Boolean),
  stream_options: maybe(Schema.Struct({ include_usage: maybe(Schema.Boolean) })),
  tools: maybe(Schema.Array(Schema.Struct({
    function: Schema.optional(Schema.Struct({ name: Schema.String, parameters: Schema.optional(Schema.Unknown) }))
  }))),
  tool_choice: maybe(ToolChoice),
  response_format: maybe(Schema.Struct({
    type: Schema.String,
    json_schema: Schema.optional(Schema.Struct({ schema: Schema.optional(Schema.Unknown) }))
  }))
})

const chatCompletion = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const body = yield* decodeBody(ChatRequest, visit.request)
    const reply = visit.reply({
      route: "chat",
      key: visit.request.key,
      model: body.model,
      prompt: textOf(body.messages.findLast((message) => message.role === "user")?.content),
      tools: offered((body.tools ?? []).map((tool) => tool.function), body.tool_choice),
      hasToolResults: body.messages.at(-1)?.role === "tool",
      schema: body.response_format?.json_schema?.schema
    })
    const usage = usageOf(body.messages.map((message) => textOf(message.content)).join(" "), reply)
    const head = { id: yield* nextId(visit, "chatcmpl-"), created: yield* unixSeconds, model: body.model }
    const calls = typeof reply === "string" ?
      [] :
      yield* Effect.forEach(reply.calls, (call) =>
        Effect.map(nextId(visit, "call_"), (id) => ({
          id,
          type: "function",
          function: { name: call.name, arguments: JSON.stringify(call.arguments) }
        })))
    const text = typeof reply === "string" ? reply : null
    const finish = typeof reply === "string" ? "stop" : "tool_calls"

    if (body.stream !== true) {
      const message = {
        role: "assistant",
        content: text,
        refusal: null,
        annotations: [],
        ...(calls.length > 0 ? { tool_calls: calls } : {})
      }
      return json({
        ...head,
        object: "chat.completion",
        choices: [{ index: 0, message, logprobs: null, finish_reason: finish }],
        usage,
        service_tier: "default",
        system_fingerprint: "fp_fake"
      })
    }

    // With `include_usage`, every chunk has the field, and one more chunk, without choices, has the numbers.
    const withUsage = body.stream_options?.include_usage === true
    const chunk = { ...head, object: "chat.completion.chunk", system_fingerprint: "fp_fake" }
    const delta = (delta: object, finish_reason: string | null = null) => ({
      ...chunk,
      choices: [{ index: 0, delta, logprobs: null, finish_reason }],
      ...(withUsage ? { usage: null } : {})
    })
    return stream([
      data(delta({ role: "assistant", content: text === null ? null : "", refusal: null })),
      ...wordsOf(text ?? "").map((content) => data(delta({ content }), true)),
      ...calls.flatMap((call, index) => [
        data(delta({ tool_calls: [{ index, ...call, function: { ...call.function, arguments: "" } }] }), true),
        ...piecesOf(call.function.arguments).map((piece) =>
          data(delta({ tool_calls: [{ index, function: { arguments: piece } }] }), true)
        )
      ]),
      data(delta({}, finish)),
      ...(withUsage ? [data({ ...chunk, choices: [], usage })] : []),
      done
    ])
  })

// ---------------------------------------------------------------------------------------------------------------------
// Completions, the predecessor of chat
// ---------------------------------------------------------------------------------------------------------------------

const CompletionRequest = Schema.Struct({
  model: Schema.String,
  prompt: maybe(Schema.Union(Schema.String, Schema.Array(Schema.String))),
  stream: maybe(Schema.Boolean)
})

const completion = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { model, prompt, stream: streamed } = yield* decodeBody(CompletionRequest, visit.request)
    const asked = [prompt ?? ""].flat().join(" ")
    const { key } = visit.request
    const reply = visit.reply({
      route: "completions",
      key,
      model,
      prompt: asked,
      tools: [],
      hasToolResults: false,
      schema: undefined
    })
    const text = spoken(reply)
    const head = { id: yield* nextId(visit, "cmpl-"), object: "text_completion", created: yield* unixSeconds, model }
    const choice = (text: string, finish_reason: string | null) => ({
      ...head,
      choices: [{ index: 0, text, logprobs: null, finish_reason }]
    })
    return streamed === true
      ? stream([...wordsOf(text).map((word) => data(choice(word, null), true)), data(choice("", "stop")), done])
      : json({ ...choice(text, "stop"), usage: usageOf(asked, reply) })
  })

// ---------------------------------------------------------------------------------------------------------------------
// Responses
// ---------------------------------------------------------------------------------------------------------------------

const InputItem = Schema.Struct({
  type: Schema.optional(Schema.String),
  role: Schema.optional(Schema.String),
  content: Schema.optional(Schema.Unknown)
})

const anythingElse = Schema.Record({ key: Schema.String, value: Schema.Unknown })

const ResponseRequest = Schema.Struct({
  model: Schema.String,
  input: Schema.Union(Schema.String, Schema.Array(InputItem)),
  instructions: maybe(Schema.Unknown),
  metadata: maybe(Schema.Unknown),
  previous_response_id: maybe(Schema.String),
  store: maybe(Schema.Boolean),
  stream: maybe(Schema.Boolean),
  // Both are repeated in the answer, whole.
  tools: maybe(Schema.Array(Schema.Struct({
    name: Schema.optional(Schema.String),
    parameters: Schema.optional(Schema.Unknown)
  }, anythingElse))),
  tool_choice: maybe(ToolChoice),
  text: maybe(Schema.Struct({
    format: maybe(Schema.Struct({ type: Schema.String, schema: Schema.optional(Schema.Unknown) }, anythingElse))
  }))
})

const createResponse = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const body = yield* decodeBody(ResponseRequest, visit.request)
    const previous = body.previous_response_id ?? null
    if (previous !== null && Option.isNone(yield* find("response", previous, visit))) {
      const message = `Previous response with id '${previous}' not found.`
      return yield* Effect.fail(invalid(400, message, "previous_response_id", "previous_response_not_found"))
    }
    const items: ReadonlyArray<typeof InputItem.Type> = typeof body.input === "string"
      ? [{ role: "user", content: body.input }]
      : body.input
    const reply = visit.reply({
      route: "responses",
      key: visit.request.key,
      model: body.model,
      prompt: textOf(items.findLast((item) => item.role === "user")?.content),
      tools: offered(body.tools ?? [], body.tool_choice),
      hasToolResults: items.at(-1)?.type === "function_call_output",
      schema: body.text?.format?.schema
    })
    const usage = usageOf(items.map((item) => textOf(item.content)).join(" "), reply)
    const id = yield* nextId(visit, "resp_")
    const output = yield* outputItems(reply, visit)
    const completed = {
      id,
      object: "response",
      created_at: yield* unixSeconds,
      status: "completed",
      background: false,
      error: null,
      incomplete_details: null,
      instructions: body.instructions ?? null,
      max_output_tokens: null,
      metadata: body.metadata ?? {},
      model: body.model,
      output,
      parallel_tool_calls: true,
      previous_response_id: previous,
      reasoning: { effort: null, summary: null },
      store: body.store ?? true,
      temperature: 1,
      text: { format: body.text?.format ?? { type: "text" } },
      tool_choice: body.tool_choice ?? "auto",
      tools: body.tools ?? [],
      top_p: 1,
      truncation: "disabled",
      usage: {
        input_tokens: usage.prompt_tokens,
        input_tokens_details: { cached_tokens: 0 },
        output_tokens: usage.completion_tokens,
        output_tokens_details: { reasoning_tokens: 0 },
        total_tokens: usage.total_tokens
      },
      user: null
    }
    if (body.store !== false) yield* keep({ kind: "response", id, object: completed }, visit)
    return body.stream === true ? stream(responseEvents(completed)) : json(completed)
  })

type OutputItem = Effect.Effect.Success<ReturnType<typeof outputItems>>[number]

/** A reply is one message, or one item for each call of a tool. */
const outputItems = (reply: Reply, visit: Visit) =>
  typeof reply === "string"
    ? Effect.map(nextId(visit, "msg_"), (id) => [{
      id,
      type: "message" as const,
      status: "completed",
      role: "assistant",
      content: [{ type: "output_text", annotations: [], logprobs: [], text: reply }]
    }])
    : Effect.forEach(reply.calls, (call) =>
      Effect.map(Effect.all([nextId(visit, "fc_"), nextId(visit, "call_")]), ([id, call_id]) => ({
        id,
        type: "function_call" as const,
        status: "completed",
        call_id,
        name: call.name,
        arguments: JSON.stringify(call.arguments)
      })))

/** The stream of a response: it is created, its items are added, grow by deltas and are done, and it is completed. */
const responseEvents = (
  completed: { readonly output: ReadonlyArray<OutputItem> }
): ReadonlyArray<FakeProvider.Frame> => {
  const begun = { ...completed, status: "in_progress", output: [], usage: null }
  const events: ReadonlyArray<Event> = [
    { type: "response.created", response: begun },
    { type: "response.in_progress", response: begun },
    ...completed.output.flatMap((item, output_index) => itemEvents(item, { item_id: item.id, output_index })),
    { type: "response.completed", response: completed }
  ]
  return events.map((value, sequence_number) => event({ ...value, sequence_number }, value.type.endsWith(".delta")))
}

const itemEvents = (
  item: OutputItem,
  at: { readonly item_id: string; readonly output_index: number }
): ReadonlyArray<Event> => {
  const { output_index } = at
  const last = { type: "response.output_item.done", output_index, item }
  if (item.type === "function_call") {
    return [
      { type: "response.output_item.added", output_index, item: { ...item, status: "in_progress", arguments: "" } },
      ...piecesOf(item.arguments).map((delta) => ({ type: "response.function_call_arguments.delta", ...at, delta })),
      { type: "response.function_call_arguments.done", ...at, name: item.name, arguments: item.arguments },
      last
    ]
  }
  return [
    { type: "response.output_item.added", output_index, item: { ...item, status: "in_progress", content: [] } },
    ...item.content.flatMap((part, content_index) => [
      { type: "response.content_part.added", ...at, content_index, part: { ...part, text: "" } },
      ...wordsOf(part.text).map((delta) => ({
        type: "response.output_text.delta",
        ...at,
        content_index,
        delta,
        logprobs: []
      })),
      { type: "response.output_text.done", ...at, content_index, text: part.text, logprobs: [] },
      { type: "response.content_part.done", ...at, content_index, part }
    ]),
    last
  ]
}

// ---------------------------------------------------------------------------------------------------------------------
// Embeddings, moderations, transcriptions, models
// ---------------------------------------------------------------------------------------------------------------------

const EmbeddingRequest = Schema.Struct({
  model: Schema.String,
  input: Schema.Union(Schema.String, Schema.Array(Schema.Unknown)),
  dimensions: maybe(Schema.Int.pipe(Schema.between(1, 4096))),
  encoding_format: maybe(Schema.Literal("float", "base64"))
})

/** The SDK asks for base64 unless told otherwise, and decodes it. */
const embeddings = (visit: Visit): Routed =>
  Effect.map(decodeBody(EmbeddingRequest, visit.request), (body) => {
    const inputs = typeof body.input === "string" ? [body.input] : body.input.map((input) => `${input}`)
    const tokens = inputs.reduce((sum, input) => sum + tokensOf(input), 0)
    return json({
      object: "list",
      model: body.model,
      data: inputs.map((input, index) => {
        const vector = vectorOf(input, body.dimensions ?? 8)
        const embedding = body.encoding_format === "base64" ? base64Of(vector) : vector
        return { object: "embedding", index, embedding }
      }),
      usage: { prompt_tokens: tokens, total_tokens: tokens }
    })
  })

/** A vector of length 1, the same for the same text. */
const vectorOf = (text: string, dimensions: number): ReadonlyArray<number> => {
  const seed = Array.from(text).reduce((sum, char) => (sum * 31 + (char.codePointAt(0) ?? 0)) % 65_521, 7)
  const raw = Array.from({ length: dimensions }, (_, index) => Math.sin(seed + index))
  const length = Math.hypot(...raw)
  return raw.map((value) => value / length)
}

const base64Of = (vector: ReadonlyArray<number>): string => {
  const bytes = Buffer.alloc(vector.length * 4)
  vector.forEach((value, index) => bytes.writeFloatLE(value, index * 4))
  return bytes.toString("base64")
}

const moderationCategories = ["harassment", "hate", "illicit", "self-harm", "sexual", "violence"]

const moderation = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const Body = Schema.Struct({
      model: Schema.optional(Schema.String),
      input: Schema.Union(Schema.String, Schema.Array(Schema.Unknown))
    })
    const { input, model = "omni-moderation-latest" } = yield* decodeBody(Body, visit.request)
    const inputs = typeof input === "string" ? [input] : input
    const each = <A>(value: A) => Object.fromEntries(moderationCategories.map((category) => [category, value]))
    const result = {
      flagged: false,
      categories: each(false),
      category_scores: each(0.0001),
      category_applied_input_types: each(["text"])
    }
    return json({ id: yield* nextId(visit, "modr-"), model, results: inputs.map(() => result) })
  })

const transcription = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const form = yield* decodeForm(visit.request)
    const { file, model } = { file: form.get("file"), model: form.get("model") }
    if (!(file instanceof File)) return yield* Effect.fail(missing("file"))
    if (typeof model !== "string") return yield* Effect.fail(missing("model"))
    const text = spoken(visit.reply({
      route: "transcriptions",
      key: visit.request.key,
      model,
      prompt: file.name,
      tools: [],
      hasToolResults: false,
      schema: undefined
    }))
    return form.get("response_format") === "text"
      ? { status: 200, headers: { "content-type": "text/plain; charset=utf-8" }, body: `${text}\n` }
      : json({ text, usage: { type: "duration", seconds: 1 } })
  })

/** What `GET /v1/models` lists for a key whose behaviour names no models. Such a key may use any other, too. */
export const knownModels: ReadonlyArray<string> = ["gpt-4o", "gpt-4o-mini", "text-embedding-3-small", "whisper-1"]

const modelObject = (id: string) => ({ id, object: "model", created: 1_715_367_049, owned_by: "system" })

/** What a key hears of a model that it may not use. */
export const modelUnknown = (model: string): FakeProvider.Complaint =>
  invalid(404, `The model \`${model}\` does not exist or you do not have access to it.`, null, "model_not_found")

const retrieveModel = ({ id, models }: Visit): Routed =>
  models.includes(id)
    ? Effect.succeed(json(modelObject(id)))
    : Effect.fail(modelUnknown(id))

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
  readonly kind: "file" | "batch" | "response"
  readonly id: string
  readonly object: object
  readonly content?: Uint8Array
}

/** What is stored before anything is. */
export const emptyStore: Store = { ids: 0, kept: [] }

const nextId = ({ store }: Visit, prefix: string): Effect.Effect<string> =>
  Ref.modify(store, (state) => [`${prefix}fake${padded(state.ids + 1)}`, { ...state, ids: state.ids + 1 }])

const keep = (thing: Omit<Kept, "owner">, { request, store }: Visit): Effect.Effect<void> =>
  Ref.update(store, (state) => ({ ...state, kept: [...state.kept, { ...thing, owner: request.owner }] }))

const mine = (kind: Kept["kind"], { request, store }: Visit): Effect.Effect<ReadonlyArray<Kept>> =>
  Effect.map(Ref.get(store), ({ kept }) => kept.filter((thing) => thing.kind === kind && thing.owner === request.owner))

const find = (kind: Kept["kind"], id: string, visit: Visit): Effect.Effect<Option.Option<Kept>> =>
  Effect.map(mine(kind, visit), (things) => Option.fromNullable(things.find((thing) => thing.id === id)))

const get = (kind: Kept["kind"], id: string, visit: Visit): Effect.Effect<Kept, FakeProvider.Complaint> =>
  Effect.flatMap(find(kind, id, visit), (found) =>
    Effect.mapError(found, () => {
      const name = kind.charAt(0).toUpperCase() + kind.slice(1)
      return invalid(404, `No such ${name} object: ${id}`, "id")
    }))

const retrieve = (kind: Kept["kind"], visit: Visit): Routed =>
  Effect.map(get(kind, visit.id, visit), ({ object }) => json(object))

const uploadFile = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const form = yield* decodeForm(visit.request)
    const { file, purpose } = { file: form.get("file"), purpose: form.get("purpose") }
    if (!(file instanceof File)) return yield* Effect.fail(missing("file"))
    if (typeof purpose !== "string") return yield* Effect.fail(missing("purpose"))
    const content = new Uint8Array(yield* Effect.promise(() => file.arrayBuffer()))
    const object = {
      id: yield* nextId(visit, "file-"),
      object: "file",
      bytes: content.length,
      created_at: yield* unixSeconds,
      filename: file.name,
      purpose,
      status: "processed"
    }
    yield* keep({ kind: "file", id: object.id, object, content }, visit)
    return json(object)
  })

/** Newest first, in pages: a page begins after the id in `after`, which is the last id of the page before it. */
const listFiles = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { query } = visit.request
    const after = query.get("after")
    if (after !== null) yield* get("file", after, visit)
    const uploaded = yield* mine("file", visit)
    const files = query.get("order") === "asc" ? uploaded : uploaded.toReversed()
    const start = files.findIndex((file) => file.id === after) + 1
    const page = files.slice(start, start + Number(query.get("limit") ?? 10_000))
    return json({
      object: "list",
      data: page.map((file) => file.object),
      first_id: page.at(0)?.id ?? null,
      last_id: page.at(-1)?.id ?? null,
      has_more: start + page.length < files.length
    })
  })

const fileContent = (visit: Visit): Routed =>
  Effect.map(get("file", visit.id, visit), ({ content = new Uint8Array() }) => ({ status: 200, body: content }))

const deleteFile = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const file = yield* get("file", visit.id, visit)
    yield* Ref.update(visit.store, (state) => ({ ...state, kept: state.kept.filter((thing) => thing !== file) }))
    return json({ id: file.id, object: "file", deleted: true })
  })

const BatchRequest = Schema.Struct({
  input_file_id: Schema.String,
  endpoint: Schema.String,
  completion_window: Schema.String,
  metadata: maybe(Schema.Unknown)
})

const createBatch = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const body = yield* decodeBody(BatchRequest, visit.request)
    yield* get("file", body.input_file_id, visit)
    const created_at = yield* unixSeconds
    const object = {
      id: yield* nextId(visit, "batch_"),
      object: "batch",
      endpoint: body.endpoint,
      errors: null,
      input_file_id: body.input_file_id,
      completion_window: body.completion_window,
      status: "validating",
      output_file_id: null,
      error_file_id: null,
      created_at,
      expires_at: created_at + 86_400,
      completed_at: null,
      request_counts: { total: 0, completed: 0, failed: 0 },
      metadata: body.metadata ?? null
    }
    yield* keep({ kind: "batch", id: object.id, object }, visit)
    return json(object)
  })

/** Batches of this server are done by the time that somebody asks. */
const retrieveBatch = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { object } = yield* get("batch", visit.id, visit)
    const request_counts = { total: 1, completed: 1, failed: 0 }
    return json({ ...object, status: "completed", completed_at: yield* unixSeconds, request_counts })
  })

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
      () => invalid(400, "We could not parse the JSON body of your request.")
    )
    return yield* Effect.mapError(Schema.decodeUnknown(schema)(body), (error) => {
      const [issue] = ParseResult.ArrayFormatter.formatErrorSync(error)
      const name = issue?.path.join(".") ?? ""
      return issue?._tag === "Missing" ? missing(name) : invalid(400, `Invalid value: '${name}'.`, name)
    })
  })

const missing = (name: string): FakeProvider.Complaint =>
  invalid(400, `Missing required parameter: '${name}'.`, name, "missing_required_parameter")

const decodeForm = (request: FakeProvider.Incoming): Effect.Effect<FormData, FakeProvider.Complaint> =>
  Effect.filterOrFail(formOf(request), Predicate.isNotUndefined, () => invalid(400, "Could not parse multipart form"))

/** Content is a text, or a list of parts of which some are texts. */
const textOf = (content: unknown): string => {
  if (typeof content === "string") return content
  if (!Array.isArray(content)) return ""
  return content.map((part) => Option.getOrElse(decodeText(part), () => ({ text: "" })).text).join("")
}

const decodeText = Schema.decodeUnknownOption(Schema.Struct({ text: Schema.String }))

/** The tools that `tool_choice` leaves: all of them, none, or the one that it names. */
const offered = (
  tools: ReadonlyArray<{ readonly name?: string | undefined; readonly parameters?: unknown } | undefined>,
  choice: typeof ToolChoice.Type | null | undefined
): Ask["tools"] => {
  const forced = typeof choice === "object" ? choice?.name ?? choice?.function?.name : undefined
  return tools.flatMap((tool) =>
    tool?.name === undefined || choice === "none" || (forced !== undefined && forced !== tool.name)
      ? []
      : [{ name: tool.name, parameters: tool.parameters }]
  )
}

// ---------------------------------------------------------------------------------------------------------------------
// Making answers up
// ---------------------------------------------------------------------------------------------------------------------

const spoken = (reply: Reply): string => typeof reply === "string" ? reply : JSON.stringify(reply.calls)

const usageOf = (prompt: string, reply: Reply) => {
  const [prompt_tokens, completion_tokens] = [tokensOf(prompt), tokensOf(spoken(reply))]
  return {
    prompt_tokens,
    completion_tokens,
    total_tokens: prompt_tokens + completion_tokens,
    prompt_tokens_details: { cached_tokens: 0, audio_tokens: 0 },
    completion_tokens_details: { reasoning_tokens: 0, audio_tokens: 0 }
  }
}

const unixSeconds = Effect.map(Clock.currentTimeMillis, (millis) => Math.floor(millis / 1000))
