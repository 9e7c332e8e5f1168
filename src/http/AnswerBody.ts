/**
 * The body of an answer that is handed on as it arrives, and overheard on its way: never held back, never changed.
 *
 * @since 0.1.0
 */

/**
 * The same body. Its text is told once: when it has been read to its end, or before, when it is left or is longer than
 * `most`; then what there is of it. Whoever reads to the end knows that it was told before.
 *
 * @since 0.1.0
 * @category combinators
 */
export const overheard = (
  body: ReadableStream<Uint8Array>,
  tell: (text: string) => void,
  most: number = 1024 * 1024
): ReadableStream<Uint8Array> => {
  const reader = body.getReader()
  const decoder = new TextDecoder()
  let text: string | undefined = ""
  const told = () => {
    if (text !== undefined) tell(text)
    text = undefined
  }
  return new ReadableStream<Uint8Array>({
    pull: async (controller) => {
      const { done, value } = await reader.read()
      if (done) {
        told()
        controller.close()
        return
      }
      if (text !== undefined) text += decoder.decode(value, { stream: true })
      if (text !== undefined && text.length > most) told()
      controller.enqueue(value)
    },
    cancel: (reason) => {
      told()
      return reader.cancel(reason)
    }
  }, { highWaterMark: 0 })
}
