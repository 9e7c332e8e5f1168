/**
 * What an SDK threw, as a typed error.
 *
 * @since 0.1.0
 */
import * as Predicate from "effect/Predicate"
import * as Classifier from "../http/Classifier.js"
import * as PooledFetch from "../http/PooledFetch.js"
import { type CallError, emptyTrail, isPoolError, ProviderError, SdkError } from "../KeymeshError.js"
import type { Provider } from "./Provider.js"

/**
 * The typed error for what an SDK threw: the pool's own error, if that is what stands behind it (`failure`); else the
 * provider's, if the SDK speaks of an answer or of the connection; else it is the callback's own.
 *
 * @since 0.1.0
 * @category constructors
 */
export const toCallError = (
  provider: Provider,
  failure: PooledFetch.Failure | undefined,
  error: unknown
): CallError => {
  if (isPoolError(failure)) return failure
  if (failure !== undefined) {
    return new ProviderError({
      provider: provider.name,
      fault: failure.fault,
      status: failure.status,
      body: failure.body ?? bodyOf(error),
      requestId: failure.requestId,
      trail: failure.trail,
      cause: error
    })
  }
  if (!(error instanceof Error)) return new SdkError({ provider: provider.name, cause: error })
  const status = "status" in error && typeof error.status === "number" ? error.status : undefined
  const spoken = status !== undefined || PooledFetch.isOfConnection(error)
  const fault = spoken ? faultOf(provider, status, error) : undefined
  return fault === undefined
    ? new SdkError({ provider: provider.name, cause: error })
    : new ProviderError({
      provider: provider.name,
      fault,
      status,
      body: bodyOf(error),
      requestId: "requestID" in error && typeof error.requestID === "string" ? error.requestID : undefined,
      trail: emptyTrail,
      cause: error
    })
}

const faultOf = (provider: Provider, status: number | undefined, error: Error) => {
  if (status === undefined) {
    const thrown = Classifier.classifyThrown(error)
    return thrown === "cancelled" ? undefined : thrown
  }
  const headers: unknown = "headers" in error ? error.headers : undefined
  return Classifier.classify(provider.dialect, {
    status,
    headers: headers instanceof Headers ? headers : new Headers(),
    body: bodyOf(error),
    now: 0
  })
}

/** The answer's body: some SDKs keep all of it, others only what is below its `error`. */
const bodyOf = (error: unknown): unknown => {
  if (!Predicate.isRecord(error) || error["error"] === undefined) return undefined
  const kept = error["error"]
  return Predicate.isRecord(kept) && kept["type"] === "error" && "error" in kept ? kept : { error: kept }
}
