/**
 * The routes of the fake Gemini: what it reads from a request, and the shape of its answers, whole and streamed.
 */
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import * as Ref from "effect/Ref"
import * as Schema from "effect/Schema"
import type * as FakeProvider from "./FakeProvider.js"
import { json, named, sampleOf, tokensOf, wordsOf } from "./FakeRoutes.js"

/** What was asked, whichever route it came by. */
export interface Ask {
  readonly route: "generateContent" | "interactions"
  readonly key: string | undefined
  readonly model: string
  /** The last thing the user said. */
  readonly prompt: string
  /** The functions that the model may call, none when the mode is NONE. */
  readonly tools: ReadonlyArray<{ readonly name: string; readonly parameters: unknown }>
  /** Whether the request ends with the results of function calls. */
  readonly hasToolResults: boolean
  /** The schema that the answer must match, if there is one. */
  readonly schema: unknown
}

/** What the model says: a text, or calls of functions. */
export type Reply = string | { readonly calls: ReadonlyArray<{ readonly name: string; readonly args: unknown }> }

/** Calls the first function that is offered, else fills in the schema that is asked for, else repeats the prompt. */
export const sayBack = (ask: Ask): Reply => {
  const [tool] = ask.tools
  if (tool !== undefined && !ask.hasToolResults) {
    return { calls: [{ name: tool.name, args: sampleOf(tool.parameters) }] }
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

/** A complaint with Google's `details`; its `type` is the status by name, its `code` the reason, where there is one. */
export interface Complaint extends FakeProvider.Complaint {
  readonly details?: ReadonlyArray<object>
}

/** To fail with a complaint is to answer with it. */
type Routed = Effect.Effect<FakeProvider.Answer, Complaint>

const routes: ReadonlyArray<readonly [method: string, path: RegExp, handler: (visit: Visit) => Routed]> = [
  ["POST", /^\/models\/([^/]+):(?:generate|streamGenerate)Content$/, (visit) => generateContent(visit)],
  ["POST", /^\/models\/([^/]+):countTokens$/, (visit) => countTokens(visit)],
  ["POST", /^\/models\/([^/]+):embedContent$/, (visit) => embedContent(visit)],
  ["POST", /^\/models\/([^/]+):batchEmbedContents$/, (visit) => batchEmbedContents(visit)],
  ["GET", /^\/models$/, ({ models, request }) => page("models", models.map(modelObject), request)],
  ["GET", /^\/models\/([^/]+)$/, (visit) => getModel(visit)],
  ["POST", /^\/files$/, (visit) => upload(visit)],
  [
    "GET",
    /^\/files$/,
    (visit) =>
      Effect.flatMap(mine("file", visit), (files) => page("files", files.map(({ object }) => object), visit.request))
  ],
  ["GET", /^\/files\/([^/]+)$/, (visit) => Effect.map(get("file", visit), ({ object }) => json(object))],
  ["DELETE", /^\/files\/([^/]+)$/, (visit) => remove("file", visit)],
  ["POST", /^\/cachedContents$/, (visit) => createCache(visit)],
  [
    "GET",
    /^\/cachedContents\/([^/]+)$/,
    (visit) => Effect.map(get("cachedContent", visit), ({ object }) => json(object))
  ],
  ["DELETE", /^\/cachedContents\/([^/]+)$/, (visit) => remove("cachedContent", visit)],
  ["POST", /^\/interactions$/, (visit) => createInteraction(visit)],
  ["GET", /^\/interactions\/([^/]+)$/, (visit) => Effect.map(get("interaction", visit), ({ object }) => json(object))],
  ["DELETE", /^\/interactions\/([^/]+)$/, (visit) => remove("interaction", visit)]
]

/** The answer of the route that fits, or the complaint that none does. */
export const answer = (visit: Omit<Visit, "id">): Routed => {
  const { method, path } = visit.request
  const [, below] = /^(?:\/upload)?\/v1(?:beta|alpha)?(\/.*)$/.exec(path) ?? []
  for (const [routeMethod, pattern, handler] of routes) {
    const match = routeMethod === method && below !== undefined ? pattern.exec(below) : null
    if (match !== null) return handler({ ...visit, id: decodeURIComponent(match[1] ?? "") })
  }
  return Effect.fail(complaint(404, "NOT_FOUND", `The requested URL ${path} was not found on this server.`))
}

export const complaint = (
  status: number,
  type: string,
  message: string,
  code: string | null = null,
  details: ReadonlyArray<object> = []
): Complaint => ({ status, message, type, code, param: null, details })

const data = (value: unknown, content = false): FakeProvider.Frame => ({
  // Google ends its lines with CR and LF.
  text: `data: ${JSON.stringify(value)}\r\n\r\n`,
  content
})

// ---------------------------------------------------------------------------------------------------------------------
// Content
// ---------------------------------------------------------------------------------------------------------------------

const Part = Schema.Struct({
  text: Schema.optional(Schema.String),
  functionResponse: Schema.optional(Schema.Unknown)
})

const Content = Schema.Struct({ role: Schema.optional(Schema.String), parts: Schema.optional(Schema.Array(Part)) })

const Declaration = Schema.Struct({
  name: Schema.String,
  parameters: Schema.optional(Schema.Unknown),
  parametersJsonSchema: Schema.optional(Schema.Unknown)
})

const Tool = Schema.Struct({ functionDeclarations: Schema.optional(Schema.NullOr(Schema.Array(Declaration))) })

const GenerateRequest = Schema.Struct({
  cachedContent: Schema.optional(Schema.NullOr(Schema.String)),
  contents: Schema.Array(Content),
  // As the real one, it takes one thing for a list of one.
  tools: Schema.optional(Schema.NullOr(Schema.Union(Schema.Array(Tool), Tool))),
  toolConfig: Schema.optional(Schema.NullOr(Schema.Struct({
    functionCallingConfig: Schema.optional(Schema.NullOr(Schema.Struct({
      mode: Schema.optional(Schema.String),
      allowedFunctionNames: Schema.optional(Schema.NullOr(Schema.Array(Schema.String)))
    })))
  }))),
  generationConfig: Schema.optional(Schema.NullOr(Schema.Struct({
    responseSchema: Schema.optional(Schema.Unknown),
    responseJsonSchema: Schema.optional(Schema.Unknown)
  })))
})

const generateContent = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const body = yield* decodeBody(GenerateRequest, visit.request)
    if (typeof body.cachedContent === "string") {
      yield* get("cachedContent", { ...visit, id: body.cachedContent.replace(/^cachedContents\//, "") })
    }
    for (const [, id = ""] of visit.request.body.matchAll(/"fileUri":"[^"]*\/files\/([^"/]+)"/g)) {
      yield* get("file", { ...visit, id })
    }
    const last = body.contents.at(-1)
    const calling = body.toolConfig?.functionCallingConfig
    const allowed = calling?.allowedFunctionNames ?? []
    const declared = [body.tools ?? []].flat().flatMap((tool) => tool.functionDeclarations ?? [])
    const prompt = textOf(body.contents.findLast(({ role = "user" }) => role === "user"))
    const reply = visit.reply({
      route: "generateContent",
      key: visit.request.key,
      model: visit.id,
      prompt,
      tools: calling?.mode === "NONE" ? [] : declared
        .filter(({ name }) => allowed.length === 0 || allowed.includes(name))
        .map(({ name, parameters, parametersJsonSchema }) => ({
          name,
          parameters: parametersJsonSchema ?? parameters
        })),
      hasToolResults: last?.parts?.some(({ functionResponse }) => functionResponse !== undefined) === true,
      schema: body.generationConfig?.responseJsonSchema ?? body.generationConfig?.responseSchema ?? undefined
    })
    const usageMetadata = usageOf(body.contents.map(textOf).join(" "), reply)
    const tail = { modelVersion: visit.id, responseId: yield* nextId(visit, "response") }
    const chunk = (parts: ReadonlyArray<object>, finishReason?: string) => ({
      candidates: [{
        content: { parts, role: "model" },
        ...(finishReason === undefined ? {} : { finishReason }),
        index: 0
      }],
      usageMetadata,
      ...tail
    })
    const parts = typeof reply === "string"
      ? [{ text: reply }]
      : reply.calls.map(({ args, name }) => ({ functionCall: { name, args } }))
    if (!visit.request.path.endsWith(":streamGenerateContent")) return json(chunk(parts, "STOP"))
    const pieces = typeof reply === "string" ? wordsOf(reply).map((text) => ({ text })) : parts
    const chunks = pieces.map((part, index) => chunk([part], index === pieces.length - 1 ? "STOP" : undefined))
    return visit.request.query.get("alt") === "sse"
      ? {
        status: 200,
        headers: { "content-type": "text/event-stream" },
        body: { frames: chunks.map((c) => data(c, true)) }
      }
      : json(chunks)
  })

const CountRequest = Schema.Struct({ contents: Schema.optional(Schema.Array(Content)) })

const countTokens = (visit: Visit): Routed =>
  Effect.map(decodeBody(CountRequest, visit.request), ({ contents = [] }) => {
    const totalTokens = tokensOf(contents.map(textOf).join(" "))
    return json({ totalTokens, promptTokensDetails: [{ modality: "TEXT", tokenCount: totalTokens }] })
  })

const EmbedRequest = Schema.Struct({
  content: Content,
  outputDimensionality: Schema.optional(Schema.NullOr(Schema.Int))
})

const embedContent = (visit: Visit): Routed =>
  Effect.map(decodeBody(EmbedRequest, visit.request), (one) => json({ embedding: embedding(one) }))

const batchEmbedContents = (visit: Visit): Routed =>
  Effect.map(
    decodeBody(Schema.Struct({ requests: Schema.Array(EmbedRequest) }), visit.request),
    ({ requests }) => json({ embeddings: requests.map(embedding) })
  )

/** The same text has the same vector. */
const embedding = ({ content, outputDimensionality }: typeof EmbedRequest.Type) => {
  const text = textOf(content)
  const values = Array.from({ length: outputDimensionality ?? 8 }, (_, i) => ((text.charCodeAt(i) || 1) % 97) / 97)
  return { values }
}

/** What is listed for a key whose behaviour names no models. Such a key may use any other, too. */
export const knownModels: ReadonlyArray<string> = ["gemini-2.5-flash", "gemini-2.5-pro", "gemini-embedding-001"]

const modelObject = (id: string) => ({
  name: `models/${id}`,
  version: "001",
  displayName: id,
  inputTokenLimit: 1_048_576,
  outputTokenLimit: 65_536,
  supportedGenerationMethods: ["generateContent", "countTokens"]
})

/** What a key hears of a model that it may not use. */
export const modelUnknown = (model: string): Complaint =>
  complaint(
    404,
    "NOT_FOUND",
    `models/${model} is not found for API version v1beta, or is not supported for generateContent. ` +
      "Call ListModels to see the list of available models and their supported methods."
  )

const getModel = ({ id, models }: Visit): Routed =>
  models.includes(id) ? Effect.succeed(json(modelObject(id))) : Effect.fail(modelUnknown(id))

// ---------------------------------------------------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------------------------------------------------

const FileRequest = Schema.Struct({
  file: Schema.optional(Schema.Struct({
    name: Schema.optional(Schema.String),
    displayName: Schema.optional(Schema.String),
    mimeType: Schema.optional(Schema.String)
  }))
})

/** An upload is begun with what the file is; its bytes follow to the address that the answer gives. */
const upload = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { bytes, headers, query } = visit.request
    const id = query.get("upload_id")
    if (id === null) {
      const { file = {} } = yield* decodeBody(FileRequest, visit.request)
      const name = file.name ?? `files/${yield* nextId(visit, "file")}`
      const object = { ...file, name, sizeBytes: headers["x-goog-upload-header-content-length"] ?? "0" }
      yield* keep({ kind: "upload", id: name, object }, visit)
      const address = `http://${headers["host"]}/upload/v1beta/files?upload_id=${encodeURIComponent(name)}`
      return { status: 200, headers: { "x-goog-upload-url": address, "x-goog-upload-status": "active" }, body: "{}" }
    }
    const { object } = yield* get("upload", { ...visit, id })
    const file = {
      ...object,
      sizeBytes: `${bytes.length}`,
      uri: `https://generativelanguage.googleapis.com/v1beta/${id}`,
      state: "ACTIVE",
      source: "UPLOADED"
    }
    yield* keep({ kind: "file", id: id.replace(/^files\//, ""), object: file }, visit)
    return { ...json({ file }), headers: { "x-goog-upload-status": "final" } }
  })

const CacheRequest = Schema.Struct({ model: Schema.String })

const createCache = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const { model } = yield* decodeBody(CacheRequest, visit.request)
    const id = yield* nextId(visit, "cache")
    const object = { name: `cachedContents/${id}`, model, usageMetadata: { totalTokenCount: 1 } }
    yield* keep({ kind: "cachedContent", id, object }, visit)
    return json(object)
  })

/** A page: the token of the next one is where it starts. */
const page = (name: string, all: ReadonlyArray<object>, { query }: FakeProvider.Incoming): Routed => {
  const start = Number(query.get("pageToken") ?? 0)
  const end = start + Number(query.get("pageSize") ?? 50)
  const next = end < all.length ? { nextPageToken: `${end}` } : {}
  return Effect.succeed(json({ [name]: all.slice(start, end), ...next }))
}

// ---------------------------------------------------------------------------------------------------------------------
// Interactions
// ---------------------------------------------------------------------------------------------------------------------

const InteractionRequest = Schema.Struct({
  model: Schema.optional(Schema.String),
  agent: Schema.optional(Schema.String),
  input: Schema.Unknown,
  stream: Schema.optional(Schema.NullOr(Schema.Boolean)),
  store: Schema.optional(Schema.NullOr(Schema.Boolean)),
  previous_interaction_id: Schema.optional(Schema.NullOr(Schema.String))
})

const createInteraction = (visit: Visit): Routed =>
  Effect.gen(function*() {
    const body = yield* decodeBody(InteractionRequest, visit.request)
    if (typeof body.previous_interaction_id === "string") {
      yield* get("interaction", { ...visit, id: body.previous_interaction_id })
    }
    const model = body.model ?? body.agent
    if (model === undefined) {
      return yield* Effect.fail(complaint(400, "INVALID_ARGUMENT", "One of 'model' and 'agent' is required."))
    }
    const prompt = typeof body.input === "string" ? body.input : JSON.stringify(body.input)
    const { key } = visit.request
    const text = spoken(
      visit.reply({ route: "interactions", key, model, prompt, tools: [], hasToolResults: false, schema: undefined })
    )
    const id = yield* nextId(visit, "interaction")
    const head = { id, object: "interaction", model }
    const steps = [{ type: "model_output", content: [{ type: "text", text }] }]
    const completed = { ...head, status: "completed", steps }
    if (body.store !== false) yield* keep({ kind: "interaction", id, object: completed }, visit)
    if (body.stream !== true) return json(completed)
    const frames = [
      event({ event_type: "interaction.created", interaction: { ...head, status: "in_progress" } }),
      event({ event_type: "step.start", index: 0, step: { type: "model_output" } }),
      ...wordsOf(text).map((text) =>
        event({ event_type: "step.delta", index: 0, delta: { type: "text", text } }, true)
      ),
      event({ event_type: "step.stop", index: 0 }),
      event({ event_type: "interaction.completed", interaction: { ...head, status: "completed" } }),
      { text: "event: done\ndata: [DONE]\n\n" }
    ]
    return { status: 200, body: { frames } }
  })

interface Event {
  readonly event_type: string
  readonly [field: string]: unknown
}

const event = (value: Event, content = false): FakeProvider.Frame => named(value.event_type, value, content)

// ---------------------------------------------------------------------------------------------------------------------
// What is stored
// ---------------------------------------------------------------------------------------------------------------------

/** Everything that is kept between requests. */
export interface Store {
  readonly ids: number
  readonly kept: ReadonlyArray<Kept>
}

/** A stored resource. Only keys of the same owner see it. */
interface Kept {
  readonly owner: string
  readonly kind: "file" | "upload" | "interaction" | "cachedContent"
  readonly id: string
  readonly object: object
}

/** What is stored before anything is. */
export const emptyStore: Store = { ids: 0, kept: [] }

const nextId = ({ store }: Visit, prefix: string): Effect.Effect<string> =>
  Ref.modify(store, (state) => [
    `${prefix}-fake${`${state.ids + 1}`.padStart(4, "0")}`,
    { ...state, ids: state.ids + 1 }
  ])

const keep = (thing: Omit<Kept, "owner">, { request, store }: Visit): Effect.Effect<void> =>
  Ref.update(store, (state) => ({ ...state, kept: [...state.kept, { ...thing, owner: request.owner }] }))

const mine = (kind: Kept["kind"], { request, store }: Visit): Effect.Effect<ReadonlyArray<Kept>> =>
  Effect.map(Ref.get(store), ({ kept }) => kept.filter((thing) => thing.kind === kind && thing.owner === request.owner))

/** Google does not tell a resource of somebody else from one that is not there. */
const get = (kind: Kept["kind"], visit: Visit): Effect.Effect<Kept, Complaint> =>
  Effect.flatMap(mine(kind, visit), (things) =>
    Effect.mapError(
      Option.fromNullable(things.find(({ id }) => id === visit.id)),
      () =>
        kind === "file"
          ? complaint(
            403,
            "PERMISSION_DENIED",
            `You do not have permission to access the File ${visit.id} or it may not exist.`
          )
          : complaint(404, "NOT_FOUND", `Requested entity ${visit.id} was not found.`)
    ))

const remove = (kind: Kept["kind"], visit: Visit): Routed =>
  Effect.flatMap(get(kind, visit), (thing) =>
    Effect.as(
      Ref.update(visit.store, (state) => ({ ...state, kept: state.kept.filter((other) => other !== thing) })),
      json({})
    ))

// ---------------------------------------------------------------------------------------------------------------------
// Reading requests, and making answers up
// ---------------------------------------------------------------------------------------------------------------------

const decodeBody = <A, I>(
  schema: Schema.Schema<A, I>,
  request: FakeProvider.Incoming
): Effect.Effect<A, Complaint> =>
  Effect.mapError(
    Schema.decodeUnknown(Schema.parseJson(schema))(request.body),
    () => complaint(400, "INVALID_ARGUMENT", "Invalid JSON payload received, or a field of it has a wrong value.")
  )

const textOf = (content: typeof Content.Type | undefined): string =>
  (content?.parts ?? []).map(({ text = "" }) => text).join("")

const spoken = (reply: Reply): string => typeof reply === "string" ? reply : JSON.stringify(reply.calls)

const usageOf = (prompt: string, reply: Reply) => {
  const [promptTokenCount, candidatesTokenCount] = [tokensOf(prompt), tokensOf(spoken(reply))]
  return { promptTokenCount, candidatesTokenCount, totalTokenCount: promptTokenCount + candidatesTokenCount }
}
