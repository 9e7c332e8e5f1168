/**
 * What a provider must tell, so that one machinery serves them all.
 *
 * @since 0.1.0
 */
import type * as Fault from "../Fault.js"
import type * as RateLimit from "../RateLimit.js"

/**
 * How a provider words its errors, as data: which of its codes, phrases and statuses mean which fault.
 *
 * An answer is judged in this order: `codes`, then `rules`, then `words`, then `statuses`, then what the status says by
 * itself (`Fault.fromStatus`). Codes are looked up in lower case.
 *
 * @since 0.1.0
 * @category models
 */
export interface ErrorDialect {
  /** Name of the provider, as in `openai`. */
  readonly name: string
  /** What shares a rate limit at this provider: the keys of a quota group, or each key alone. */
  readonly limitScope: "group" | "key"
  /**
   * What the body of a success may hide. `peek`: some successes are errors, look at each; `recognise`: an error is one
   * when it is seen there (a stream that was answered with JSON), but no need to look; `ignore`: a success is one.
   */
  readonly okBody: "peek" | "recognise" | "ignore"
  /** Codes that decide, whatever the status. */
  readonly codes: Readonly<Record<string, Verdict>>
  /** Phrases and other marks that decide where no code does; the first that holds wins. */
  readonly rules: ReadonlyArray<ErrorRule>
  /** Broad words (`rate_limit_error`): they refine what the status says, or stand in for it, never contradict it. */
  readonly words: Readonly<Record<string, Verdict>>
  /** What a bare status means, where this differs from `Fault.fromStatus`. */
  readonly statuses: Readonly<Record<number, Verdict>>
  /** Statuses that are tried again, as a `ServerError` is, even where they are the fault of the request. */
  readonly failover?: ReadonlyArray<number>
}

/**
 * What an error means. Whatever is left out gets the default of the kind.
 *
 * @since 0.1.0
 * @category models
 */
export interface Verdict {
  readonly kind: Fault.Kind
  readonly scope?: Fault.Scope
  readonly perModel?: boolean
  readonly retryable?: boolean
  readonly failover?: boolean
  /** Whether the cause is certain. Default: true when a code, phrase or word said so, false for a bare status. */
  readonly explicit?: boolean
  readonly unprocessed?: boolean
  /** A code of ours in place of the provider's own, for causes that every provider names differently. */
  readonly code?: string
  /** When a spent quota comes back if the answer does not say it. */
  readonly reset?: "midnight-pacific" | "midnight-utc" | "month-utc"
}

/**
 * A mark of an error that is no code. All conditions given must hold.
 *
 * @since 0.1.0
 * @category models
 */
export interface ErrorRule {
  /** Only with one of these statuses; an error without a status (inside a stream) passes. */
  readonly statuses?: ReadonlyArray<number>
  /** A phrase of the message. */
  readonly message?: RegExp
  /** Any of the codes. */
  readonly code?: RegExp
  /** The id of a violated quota (Google). */
  readonly quota?: RegExp
  /** A field that is there: of the error, or of its `metadata`. */
  readonly field?: string
  /** A response header, by its lower-case name, with a pattern of its value. */
  readonly header?: readonly [name: string, value: RegExp]
  /** Whether the body is a page for people. */
  readonly html?: boolean
  /** The exact wait that the server tells, in milliseconds. */
  readonly waitMillis?: number
  readonly verdict: Verdict
}

/**
 * What an event of a stream is. `content`: the answer has begun (or something unknown, which belongs to the caller);
 * `lifecycle`: nothing of the answer yet, may be held back; `error`: the stream failed; `done`: it ended as it should.
 *
 * @since 0.1.0
 * @category models
 */
export type StreamReading = "content" | "error" | "lifecycle" | "done"

/**
 * How to read the events of a provider's streams.
 *
 * @since 0.1.0
 * @category models
 */
export interface StreamGrammar {
  readonly name: string
  /** Reads one event: its name (`event:` line), and its data, parsed. Must not throw. */
  readonly read: (event: string | undefined, data: unknown) => StreamReading
}

/**
 * A request, as far as a provider's data need to know it.
 *
 * @since 0.1.0
 * @category models
 */
export interface RequestShape {
  readonly method: string
  readonly url: URL
  readonly headers: Headers
  /** The body, if it is text. */
  readonly text: string | undefined
  /** The body, if it is a form. */
  readonly form: FormData | undefined
}

/**
 * What a request has to do with what is stored at the provider.
 *
 * @since 0.1.0
 * @category models
 */
export interface StoredFacts {
  /**
   * The stored resources that it names, by the provider's ids: it must go to the account that has them. The first one
   * that is known decides.
   */
  readonly resources: ReadonlyArray<string>
  /** Whether its answer may tell of stored resources: then `Provider.stored` gets to see it. */
  readonly storing: boolean
}

/**
 * An answer that may tell of stored resources.
 *
 * @since 0.1.0
 * @category models
 */
export interface AnswerShape {
  readonly headers: Headers
  /** Its body, if that is JSON, or as much as was read of it; of a stream, the data of one event; else empty. */
  readonly text: string
}

/**
 * What of a request decides how it is pooled.
 *
 * @since 0.1.0
 * @category models
 */
export interface RequestFacts {
  readonly model: string | undefined
  /** Whether the answer is to be a stream of events. */
  readonly streaming: boolean
  /** Whether sending it twice can do harm: it creates something, or nobody knows. */
  readonly creating: boolean
  /** The tokens it will use, as far as it tells: about 4 bytes of its body are one, and it may bound its output. */
  readonly tokens?: RateLimit.Estimate | undefined
}

/**
 * What a pool has to say when it gives up, in place of an answer of the provider.
 *
 * @since 0.1.0
 * @category models
 */
export interface GivenUp {
  readonly status: number
  readonly code: string
  readonly message: string
  readonly id: string
  /** Milliseconds until a key may serve again, where that is known. */
  readonly waitMillis?: number | undefined
}

/**
 * What authenticates one request; replaces what the request has under the same names.
 *
 * @since 0.1.0
 * @category models
 */
export interface Credentials {
  readonly headers?: Readonly<Record<string, string>> | undefined
  readonly query?: Readonly<Record<string, string>> | undefined
}

/**
 * A provider, as data and small pure functions.
 *
 * @since 0.1.0
 * @category models
 */
export interface Provider {
  /** As in errors and events, such as `openai`. */
  readonly name: string
  readonly dialect: ErrorDialect
  readonly grammar: StreamGrammar
  /** Where in a request a key goes, and how; `sent` are the headers of the request as it came in. */
  readonly credentials: (secret: string, sent: Headers) => Credentials
  /** Every header that may carry a credential; what the SDK put there is taken out. Lower-case. */
  readonly credentialHeaders: ReadonlyArray<string>
  /** Every parameter of the query that may carry a credential, likewise (default: none). */
  readonly credentialParams?: ReadonlyArray<string> | undefined
  /**
   * The header by which the SDK announces its own timeout in whole seconds, rounded so (default: none). An SDK that
   * aborts when it said it would has run into it: a `Timeout`, and not the caller's will.
   */
  readonly timeoutHeader?: { readonly name: string; readonly rounded: "down" | "up" } | undefined
  readonly facts: (request: RequestShape) => RequestFacts
  /** What a request has to do with what is stored at the provider; absent: nothing. */
  readonly resources?: ((request: RequestShape) => StoredFacts) | undefined
  /** The stored resources that an answer tells of, by the names that requests use; absent: nobody looks. Must not throw. */
  readonly stored?: ((answer: AnswerShape) => ReadonlyArray<string>) | undefined
  /** Whether an event of a stream is its proper end. */
  readonly ends: (event: string | undefined, data: string) => boolean
  /** The provider's id of an answer. */
  readonly requestId: (headers: Headers) => string | undefined
  /** The body of an error, worded as the provider words its own, so that its SDK understands it. */
  readonly renderError: (error: GivenUp) => unknown
}
