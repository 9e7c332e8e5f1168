/**
 * A small client of JSON over a `fetch`, for plain code.
 *
 * @since 0.1.0
 */
import type * as Attempt from "../http/Attempt.js"

/**
 * What a request takes beside its method, path and body: as `fetch` does.
 *
 * @since 0.1.0
 * @category models
 */
export type Init = Omit<RequestInit, "body" | "method">

/**
 * Requests are relative to the base URL. A body that is no text and no bytes is sent as JSON; an answer in JSON is parsed,
 * any other one is text. An answer that is no success is thrown as a `ResponseError`.
 *
 * @since 0.1.0
 * @category models
 */
export interface RestClient {
  readonly get: <A = unknown>(path: string, init?: Init) => Promise<A>
  readonly post: <A = unknown>(path: string, body?: unknown, init?: Init) => Promise<A>
  readonly put: <A = unknown>(path: string, body?: unknown, init?: Init) => Promise<A>
  readonly patch: <A = unknown>(path: string, body?: unknown, init?: Init) => Promise<A>
  readonly delete: <A = unknown>(path: string, init?: Init) => Promise<A>
  readonly request: <A = unknown>(method: string, path: string, init?: Init & { readonly body?: unknown }) => Promise<A>
  /** As the global `fetch`: for streams, forms, and what else is not JSON. Takes paths too. */
  readonly fetch: Attempt.Transport
}

/**
 * An answer that is no success; `bodyText` is its body.
 *
 * @since 0.1.0
 * @category errors
 */
export class ResponseError extends Error {
  override readonly name = "ResponseError"
  readonly status: number
  readonly headers: Headers
  readonly bodyText: string
  constructor(status: number, headers: Headers, bodyText: string) {
    super(`HTTP ${status}${bodyText === "" ? "" : `: ${bodyText.slice(0, shownChars)}`}`)
    this.status = status
    this.headers = headers
    this.bodyText = bodyText
  }
}

const shownChars = 200

/**
 * Makes the client. `headers` go with every request, below those of a request itself.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = (
  fetch: Attempt.Transport,
  baseUrl: string,
  headers: Readonly<Record<string, string>> = {}
): RestClient => {
  const at = baseUrl.replace(/\/+$/, "")
  const addressOf = (path: string) => /^https?:/i.test(path) ? path : `${at}/${path.replace(/^\/+/, "")}`
  const withHeaders = (own: RequestInit["headers"], json: boolean): Headers => {
    const all = new Headers(headers)
    if (json) all.set("content-type", "application/json")
    for (const [name, value] of new Headers(own)) all.set(name, value)
    return all
  }
  // What is generic is said by the caller: nothing here can know what an API answers.
  const request = async <A>(
    method: string,
    path: string,
    { body, ...init }: Init & { readonly body?: unknown } = {}
  ) => {
    const sent = bodyOf(body)
    const response = await fetch(addressOf(path), {
      ...init,
      method,
      headers: withHeaders(init.headers, sent !== undefined && sent !== body),
      ...(sent === undefined ? {} : { body: sent }),
      // Else a stream is refused.
      ...(sent instanceof ReadableStream ? { duplex: "half" } : {})
    })
    const text = await response.text()
    if (!response.ok) throw new ResponseError(response.status, response.headers, text)
    const isJson = /\bjson\b/i.test(response.headers.get("content-type") ?? "") && text !== ""
    return (isJson ? JSON.parse(text) : text) as A
  }
  return {
    get: (path, init) => request("GET", path, init),
    post: (path, body, init) => request("POST", path, { ...init, body }),
    put: (path, body, init) => request("PUT", path, { ...init, body }),
    patch: (path, body, init) => request("PATCH", path, { ...init, body }),
    delete: (path, init) => request("DELETE", path, init),
    request,
    fetch: async (input, init) =>
      fetch(typeof input === "string" ? addressOf(input) : input, {
        ...init,
        headers: withHeaders(init?.headers ?? (input instanceof Request ? input.headers : undefined), false)
      })
  }
}

/** As `fetch` takes it: what it knows as it is, the rest as JSON. */
const bodyOf = (body: unknown): RequestInit["body"] | undefined => {
  if (body === undefined || body === null) return undefined
  const known = typeof body === "string" || ArrayBuffer.isView(body) || body instanceof ArrayBuffer ||
    body instanceof FormData || body instanceof URLSearchParams || body instanceof Blob ||
    body instanceof ReadableStream
  // TypeScript tells bytes over shared memory apart, `fetch` refuses those by itself.
  return known ? body as RequestInit["body"] & {} : JSON.stringify(body)
}
