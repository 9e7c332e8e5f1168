/**
 * The body of an answer that is no event stream: handed on as it arrives, overheard on its way, and watched for its
 * breaking off.
 *
 * @since 0.1.0
 */
import type * as Fault from "../Fault.js"
import * as Classifier from "./Classifier.js"
import * as Scrub from "./Scrub.js"

/**
 * Who is told what becomes of a body that is handed on.
 *
 * @since 0.1.0
 * @category models
 */
export interface Listener {
  /** It broke off; `error` is what its reader gets. */
  readonly broken: (fault: Fault.Fault, error: unknown) => void
  /** It is over: read to its end, broken, or cancelled. Told once. */
  readonly ended: () => void
  /**
   * Its text, told once: when it has been read to its end, or before, when it is left or is longer than `mostHeard`;
   * then what there is of it. Whoever reads to the end knows that it was told before. Not told of one that breaks off.
   */
  readonly heard?: ((text: string) => void) | undefined
  /** How many characters of the text are kept (default 1,048,576). */
  readonly mostHeard?: number | undefined
}

/**
 * The beginning of a body, and who reads on; all of it, if it `ended`.
 *
 * @since 0.1.0
 * @category models
 */
export interface Begun {
  readonly chunks: ReadonlyArray<Uint8Array>
  readonly reader: ReadableStreamDefaultReader<Uint8Array> | undefined
  readonly ended: boolean
}

/**
 * Reads a body until it ends, or there are more than so many bytes. Rejects with what breaks it.
 *
 * @since 0.1.0
 * @category constructors
 */
export const begin = async (response: Response, most: number): Promise<Begun> => {
  const reader = response.body?.getReader()
  const chunks: Array<Uint8Array> = []
  let bytes = 0
  while (bytes <= most) {
    const read = await reader?.read()
    if (read === undefined || read.done) return { chunks, reader, ended: true }
    chunks.push(read.value)
    bytes += read.value.byteLength
  }
  return { chunks, reader, ended: false }
}

/**
 * The body of a response, unchanged; only what breaks it is clean of the secret. Nothing is opened before it is read,
 * so that one that nobody reads is given up with its response. Of one that was begun already, the beginning comes first.
 *
 * @since 0.1.0
 * @category constructors
 */
export const watched = (
  response: Response,
  secret: string,
  listener: Listener,
  begun?: Begun
): ReadableStream<Uint8Array> | null => {
  // A response that nobody holds is given up by its platform: this one is held by its body.
  const reader = once(() => begun === undefined ? response.body?.getReader() : begun.reader)
  const queue = [...begun?.chunks ?? []]
  if (response.body === null) return null
  const ear = listener.heard === undefined ? undefined : overhearing(listener.heard, listener.mostHeard)
  let over = false
  const end = () => {
    over = true
    listener.ended()
  }
  return new ReadableStream<Uint8Array>({
    pull: async (controller) => {
      try {
        const held = queue.shift()
        const read = held === undefined ? await reader()?.read() : { done: false, value: held }
        // Cancelled meanwhile: that ends a read, and breaks nothing.
        if (over) return
        if (read !== undefined && !read.done) {
          ear?.take(read.value)
          return controller.enqueue(read.value)
        }
        ear?.tell()
        end()
        controller.close()
      } catch (error) {
        if (over) return
        const fault = Classifier.classifyThrown(error)
        const clean = Scrub.error(secret)(error)
        if (fault !== "cancelled") listener.broken(fault, clean)
        end()
        controller.error(clean)
      }
    },
    cancel: (reason) => {
      ear?.tell()
      end()
      return reader()?.cancel(reason)
    }
  }, { highWaterMark: 0 })
}

const overhearing = (heard: (text: string) => void, most = 1024 * 1024) => {
  const decoder = new TextDecoder()
  let text: string | undefined = ""
  const tell = () => {
    if (text !== undefined) heard(text)
    text = undefined
  }
  return {
    take: (chunk: Uint8Array) => {
      if (text === undefined) return
      text += decoder.decode(chunk, { stream: true })
      if (text.length > most) tell()
    },
    tell
  }
}

const once = <A>(make: () => A): () => A => {
  let made: { readonly value: A } | undefined
  return () => (made ??= { value: make() }).value
}
