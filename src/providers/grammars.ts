/**
 * How each provider's streams read, up to the first content.
 *
 * @since 0.1.0
 */
import * as Predicate from "effect/Predicate"
import type { StreamGrammar, StreamReading } from "./Provider.js"

/**
 * OpenAI and those who speak like it: chat completions, legacy completions and responses.
 *
 * @since 0.1.0
 * @category grammars
 */
export const openAiGrammar: StreamGrammar = {
  name: "openai",
  read: (event, data) => {
    if (!Predicate.isRecord(data)) return "content"
    const type = typeof data.type === "string" ? data.type : event
    if (type === "response.failed" || isFailure(data)) return "error"
    if (type?.startsWith("response.")) return isResponseOverture(type) ? "lifecycle" : "content"
    if (Array.isArray(data.choices)) return choicesReading(data.choices, data.usage)
    return type === "ping" ? "lifecycle" : "content"
  }
}

/**
 * Anthropic: messages.
 *
 * @since 0.1.0
 * @category grammars
 */
export const anthropicGrammar: StreamGrammar = {
  name: "anthropic",
  read: (event, data) => {
    if (!Predicate.isRecord(data)) return "content"
    if (isFailure(data)) return "error"
    switch (data.type ?? event) {
      case "ping":
      case "message_start":
        return "lifecycle"
      case "content_block_start":
        return isEmptyBlock(data.content_block) ? "lifecycle" : "content"
      case "message_stop":
        return "done"
    }
    return "content"
  }
}

/**
 * Gemini: `streamGenerateContent`, and interactions.
 *
 * @since 0.1.0
 * @category grammars
 */
export const geminiGrammar: StreamGrammar = {
  name: "gemini",
  read: (event, data) => {
    const item = Array.isArray(data) ? data.find((one) => Predicate.isRecord(one) && isFailure(one)) ?? data[0] : data
    if (!Predicate.isRecord(item)) return "content"
    if (isFailure(item) || item.event_type === "error") return "error"
    if (item.candidates !== undefined || item.promptFeedback !== undefined) return "content"
    const type = item.event_type ?? event
    return typeof type === "string" &&
        /^(?:interaction\.(?:start|created|status_update)|content\.start|ping)$/.test(type)
      ? "lifecycle"
      : "content"
  }
}

/**
 * Anything else: an error is `{"error": …}`, a ping is a ping, all the rest is content.
 *
 * @since 0.1.0
 * @category grammars
 */
export const genericGrammar: StreamGrammar = {
  name: "generic",
  read: (event, data) => {
    if (!Predicate.isRecord(data)) return event === "ping" ? "lifecycle" : "content"
    if (isFailure(data)) return "error"
    return event === "ping" || data.type === "ping" ? "lifecycle" : "content"
  }
}

/** `{"error": …}`, `{"type": "error"}`, and what Groq and OpenRouter put into a chunk. `"error": null` is none. */
const isFailure = (data: { readonly [name: string]: unknown }): boolean =>
  data.type === "error" || isSaid(data.error) ||
  (Predicate.isRecord(data.x_groq) && isSaid(data.x_groq.error))

const isSaid = (value: unknown): boolean =>
  Predicate.isRecord(value) || Array.isArray(value) || (typeof value === "string" && value !== "")

/** Nothing of the answer yet: it was accepted, or a still empty part of it announced. */
const isResponseOverture = (type: string): boolean =>
  /^response\.(?:created|queued|in_progress)$/.test(type) ||
  /^response\.(?:output_item|content_part|reasoning_summary_part|reasoning_part)\.added$/.test(type)

const choicesReading = (choices: ReadonlyArray<unknown>, usage: unknown): StreamReading => {
  const readings = choices.map(choiceReading)
  if (readings.includes("error")) return "error"
  if (readings.includes("content")) return "content"
  // Azure opens with no choice and its prompt filter; OpenAI closes with no choice and the usage.
  return choices.length === 0 && Predicate.isRecord(usage) ? "content" : "lifecycle"
}

const choiceReading = (choice: unknown): StreamReading => {
  if (!Predicate.isRecord(choice)) return "content"
  if (choice.finish_reason === "error" || isSaid(choice.error)) return "error"
  if (isFilled(choice.finish_reason) || isFilled(choice.text)) return "content"
  const part = choice.delta ?? choice.message
  return Predicate.isRecord(part) && Object.keys(part).some((name) => name !== "role" && isFilled(part[name]))
    ? "content"
    : "lifecycle"
}

const isEmptyBlock = (block: unknown): boolean =>
  Predicate.isRecord(block) && (block.type === "text" || block.type === "thinking") &&
  Object.keys(block).every((name) => name === "type" || !isFilled(block[name]))

const isFilled = (value: unknown): boolean =>
  value !== undefined && value !== null && value !== "" && value !== false &&
  (!Array.isArray(value) || value.length > 0)
