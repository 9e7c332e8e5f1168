/**
 * What an answer says it used, found in its text as it passes: nothing is parsed.
 *
 * @since 0.1.0
 */

/**
 * Tokens of the input and of the output.
 *
 * @since 0.1.0
 * @category models
 */
export interface Usage {
  readonly input: number
  readonly output: number
}

/**
 * Whether a text may say something of usage.
 *
 * @since 0.1.0
 * @category getters
 */
export const mentions = (text: string): boolean => text.includes("\"usage") || text.includes("_tokens\"")

/**
 * What a text says of usage, in the words of OpenAI, Anthropic or Gemini; what it leaves out is as it was `before`. The
 * last word of each counts, because streams count upwards. A name inside a content cannot deceive it: quotes are escaped
 * there.
 *
 * @since 0.1.0
 * @category getters
 */
export const read = (text: string, before?: Usage): Usage | undefined => {
  const input = last(text, inputs) ?? before?.input
  const output = last(text, outputs) ?? before?.output
  return input === undefined && output === undefined ? undefined : { input: input ?? 0, output: output ?? 0 }
}

const inputs = /"(?:prompt_tokens|input_tokens|promptTokenCount|total_input_tokens)"\s{0,4}:\s{0,4}(\d{1,12})/g
const outputs =
  /"(?:completion_tokens|output_tokens|candidatesTokenCount|total_output_tokens)"\s{0,4}:\s{0,4}(\d{1,12})/g

const last = (text: string, pattern: RegExp): number | undefined => {
  let found: number | undefined
  for (const [, digits] of text.matchAll(pattern)) found = Number(digits)
  return found
}
