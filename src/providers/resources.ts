/**
 * What is stored at a provider belongs to the account whose key made it: which of it a request names, and which of it
 * an answer tells of. Whatever is not recognised is left to chance, as if nobody had looked.
 *
 * @since 0.1.0
 */
import * as Option from "effect/Option"
import * as Predicate from "effect/Predicate"
import * as Schema from "effect/Schema"
import * as RequestBody from "../http/RequestBody.js"
import type { AnswerShape, RequestShape, StoredFacts } from "./Provider.js"

// ------------------------------------------------------------------------------------------------------------- OpenAI

/**
 * OpenAI: files, uploads, batches, responses, conversations, vector stores, containers, fine-tuning, assistants and what
 * else has a path of its own; and pages of lists.
 *
 * @since 0.1.0
 * @category requests
 */
export const openAiFacts = ({ form, method, text, url }: RequestShape): StoredFacts => {
  const path = url.pathname
  const inPath = matches(openAiPath, path)
  const isStored = openAiCollection.test(path)
  const { store } = text === undefined || !/\/(?:responses|completions)\/?$/.test(path)
    ? {}
    : RequestBody.topLevel(text, ["store"])
  return {
    resources: some([
      ...inPath,
      ...cursorsIn(url, ["after", "before", "page"]),
      ...(text === undefined ? [] : [...matches(openAiField, text), ...listed(openAiList, text)]),
      ...(form === undefined ? [] : texts([form.get("file_id"), form.get("container_id")]))
    ]),
    storing: method !== "DELETE" && !/\/content\/?$/.test(path) &&
      (isStored ? store !== false : store === true)
  }
}

/**
 * What an answer of OpenAI's tells: the id of what was made, the files of a batch, the page of a list; of a stream, the
 * id of the response.
 *
 * @since 0.1.0
 * @category answers
 */
export const openAiStored = ({ text }: AnswerShape): ReadonlyArray<string> => {
  const fields = RequestBody.topLevel(text, ["type", "object", "has_more", ...openAiIds, ...cursorFields])
  if (typeof fields["type"] === "string" && fields["type"].startsWith("response.")) {
    if (fields["type"] !== "response.created") return none
    const response = property(parsed(text), "response")
    return some(texts([property(response, "id"), property(property(response, "conversation"), "id")]))
  }
  if (fields["object"] === "list" || "has_more" in fields) return pageOf(text, fields)
  return some([...texts(openAiIds.map((name) => fields[name])), ...matches(openAiConversation, text)])
}

const openAiCollection = new RegExp(
  "/(?:files|uploads|batches|responses|conversations|vector_stores|containers|fine_tuning/jobs|assistants|threads" +
    "|evals|videos|skills)(?:/|$)"
)
const openAiPath = new RegExp(
  "/(?:files|uploads|batches|responses|conversations|vector_stores|containers|jobs|assistants|threads|runs|evals|videos" +
    "|skills|chat/completions)/(?!(?:input_tokens|compact|generations|edits|extensions)(?:/|$))([^/]+)",
  "g"
)
/** Names that other things have too (metadata of a caller's own, skills of OpenAI's own) count with an id of its kind. */
const openAiField = new RegExp(
  "\"(?:(?:file_id|previous_response_id|input_file_id|training_file|validation_file)\"\\s*:\\s*\"" +
    "|(?:container|container_id|conversation|assistant_id|vector_store_id|thread_id|skill_id)\"" +
    "\\s*:\\s*(?:\\{\\s*\"id\"\\s*:\\s*)?\"(?=(?:cntr|conv|asst|vs|thread|skill)_))([^\"\\\\]{1,256})\"",
  "g"
)
const openAiList = /"(?:file_ids|vector_store_ids)"\s*:\s*\[([^\]\\]{1,16384})\]/g
const openAiConversation = /"conversation"\s*:\s*\{\s*"id"\s*:\s*"([^"\\]{1,256})"/g
const openAiIds = ["id", "output_file_id", "error_file_id", "vector_store_id", "result_file_id"]

// ---------------------------------------------------------------------------------------------------------- Anthropic

/**
 * Anthropic: files, batches, containers, skills and what else has a path of its own; and pages of lists.
 *
 * @since 0.1.0
 * @category requests
 */
export const anthropicFacts = ({ method, text, url }: RequestShape): StoredFacts => {
  const path = url.pathname
  return {
    resources: some([
      ...matches(anthropicPath, path),
      ...cursorsIn(url, ["after_id", "before_id", "page"]),
      ...(text === undefined ? [] : matches(anthropicField, text))
    ]),
    storing: method !== "DELETE" && !/\/(?:content|results)\/?$/.test(path) &&
      (anthropicCollection.test(path) || (text !== undefined && anthropicTools.test(text)))
  }
}

/**
 * What an answer of Anthropic's tells: the id of what was made, the container that code ran in, the page of a list.
 *
 * @since 0.1.0
 * @category answers
 */
export const anthropicStored = ({ text }: AnswerShape): ReadonlyArray<string> => {
  const fields = RequestBody.topLevel(text, ["id", "type", "has_more", ...cursorFields])
  if ("has_more" in fields || "next_page" in fields) return pageOf(text, fields)
  const isMessage = fields["type"] === "message" || String(fields["type"]).startsWith("message_") &&
      fields["type"] !== "message_batch" ||
    String(fields["type"]).startsWith("content_block")
  return some([...(isMessage ? [] : texts([fields["id"]])), ...matches(anthropicContainer, text)])
}

const anthropicCollection =
  /\/(?:files|messages\/batches|skills|agents|sessions|environments|vaults|memory_stores)(?:\/|$)/
const anthropicPath = /\/(?:files|batches|skills|agents|sessions|environments|vaults|memory_stores)\/([^/]+)/g
/** With an id of its kind only: a tool's input may have such names too, and skills of Anthropic's own belong to nobody. */
const anthropicField = new RegExp(
  "\"(?:file_id|container|skill_id)\"\\s*:\\s*(?:\\{\\s*\"id\"\\s*:\\s*)?" +
    "\"((?:file|container|skill)_[^\"\\\\]{1,256})\"",
  "g"
)
const anthropicContainer = /"container"\s*:\s*\{\s*"id"\s*:\s*"([^"\\]{1,256})"/g
/** Only with these an answer of the model leaves something behind. */
const anthropicTools = /"container"|"code_execution/

// ------------------------------------------------------------------------------------------------------------- Gemini

/**
 * Gemini: files and their uploads, cached contents, batches, operations, stores, tuned models, interactions; and pages
 * of lists. A resource is named as in its `name`, wherever it stands: `files/abc`.
 *
 * @since 0.1.0
 * @category requests
 */
export const geminiFacts = ({ method, text, url }: RequestShape): StoredFacts => {
  const path = url.pathname
  const isInteraction = /\/interactions\/?$/.test(path)
  const own = text === undefined || !isInteraction
    ? {}
    : RequestBody.topLevel(text, ["previous_interaction_id", "store"])
  const upload = url.searchParams.get("upload_id")
  return {
    resources: some([
      ...named(decoded(path)),
      ...(upload === null ? [] : [`upload:${upload}`]),
      ...cursorsIn(url, ["pageToken", "page_token"]),
      ...texts([own["previous_interaction_id"]]).map((id) => `interactions/${id}`),
      ...(text === undefined ? [] : [
        ...matches(geminiField, text).map(withoutHost).flatMap(named),
        ...listed(geminiList, text).flatMap(named)
      ])
    ]),
    storing: method !== "DELETE" && !/:(?:download|generateContent|streamGenerateContent)$/.test(path) &&
      (isInteraction ? own["store"] !== false : geminiStoring.test(path))
  }
}

/**
 * What an answer of Gemini's tells: the names of what was made or listed, where an upload goes on, the next page, the id
 * of an interaction.
 *
 * @since 0.1.0
 * @category answers
 */
export const geminiStored = ({ headers, text }: AnswerShape): ReadonlyArray<string> => {
  const address = headers.get("x-goog-upload-url")
  const upload = address !== null && URL.canParse(address) ? new URL(address).searchParams.get("upload_id") : null
  const fields = RequestBody.topLevel(text, ["object", "id", "event_type", "nextPageToken", "next_page_token"])
  const interaction = fields["object"] === "interaction"
    ? fields["id"]
    : typeof fields["event_type"] === "string" && fields["event_type"].startsWith("interaction.")
    ? property(property(parsed(text), "interaction"), "id")
    : undefined
  return some([
    ...(upload === null ? [] : [`upload:${upload}`]),
    ...texts([interaction]).map((id) => `interactions/${id}`),
    ...texts([fields["nextPageToken"], fields["next_page_token"]]).map(cursor),
    ...(interaction === undefined ? matches(geminiName, text).flatMap(named) : [])
  ])
}

const geminiNames =
  /(?:^|\/)((?:files|cachedContents|batches|operations|fileSearchStores|corpora|tunedModels|interactions)\/[^/:?#]+)/g
const named = (text: string): ReadonlyArray<string> => matches(geminiNames, text)
/** An address of Gemini's without its beginning; nothing of one that is somewhere else. */
const withoutHost = (uri: string): string => {
  const path = uri.replace(/^https?:\/\/[^/]+\/(?:[^/?#]+\/)*?v\d\w*\//, "")
  return /^[a-z][a-z0-9+.-]*:/i.test(path) ? "" : path
}
const geminiField =
  /"(?:fileUri|file_uri|uri|cachedContent|cached_content|fileName|file_name)"\s*:\s*"([^"\\]{1,512})"/g
const geminiList = /"(?:fileSearchStoreNames|file_search_store_names)"\s*:\s*\[([^\]\\]{1,16384})\]/g
const geminiName = /"name"\s*:\s*"([^"\\]{1,256})"/g
const geminiStoring = new RegExp(
  "/(?:files|cachedContents|batches|operations|fileSearchStores|corpora|tunedModels)(?:[/:]|$)" +
    "|:(?:batchGenerateContent|asyncBatchEmbedContent|predictLongRunning)$"
)

// -------------------------------------------------------------------------------------------------------------- pages

/** Where a list goes on: apart from the resource of the same id, which a page may be asked for without having it. */
const cursor = (after: string): string => `cursor:${after}`

const cursorsIn = (url: URL, names: ReadonlyArray<string>): ReadonlyArray<string> =>
  url.search === "" ? none : texts(names.map((name) => url.searchParams.get(name))).map(cursor)

/** The ids of a page, and how to go on from it; SDKs go on from the id of its last entry, whatever else it says. */
const pageOf = (text: string, fields: Readonly<Record<string, unknown>>): ReadonlyArray<string> => {
  const data = property(parsed(text), "data")
  const ids = Array.isArray(data) ? texts(data.map((entry) => property(entry, "id"))) : none
  return [
    ...new Set([
      ...texts([...cursorFields.map((name) => fields[name]), ids[0], ids[ids.length - 1]]).map(cursor),
      ...ids.slice(0, longestPage)
    ])
  ]
}

const cursorFields = ["first_id", "last_id", "next_page", "next"]
/** Of a long page the rest is not remembered: it would push out what was made here. */
const longestPage = 100

// -------------------------------------------------------------------------------------------------------------- texts

const none: ReadonlyArray<string> = []

const texts = (values: ReadonlyArray<unknown>): ReadonlyArray<string> =>
  values.filter((value): value is string => typeof value === "string" && value !== "" && value.length <= 512)

const some = (names: ReadonlyArray<string>): ReadonlyArray<string> =>
  names.length === 0 ? none : [...new Set(names)].slice(0, longestPage)

/** The first groups of all matches, 100 at most. */
const matches = (pattern: RegExp, text: string): ReadonlyArray<string> => {
  const found: Array<string> = []
  for (const match of text.matchAll(pattern)) {
    if (match[1] !== undefined) found.push(match[1])
    if (found.length === longestPage) break
  }
  return found
}

/** The texts in JSON lists. */
const listed = (pattern: RegExp, text: string): ReadonlyArray<string> =>
  matches(pattern, text).flatMap((list) => matches(/"([^"\\]{1,256})"/g, list))

const decoded = (path: string): string => {
  try {
    return decodeURIComponent(path)
  } catch {
    return path
  }
}

const parsed = (text: string): unknown => Option.getOrUndefined(parse(text))
const parse = Schema.decodeOption(Schema.parseJson())

const property = (value: unknown, name: string): unknown => Predicate.isRecord(value) ? value[name] : undefined
