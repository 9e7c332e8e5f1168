/**
 * A pool of API keys for Effect. Each module is a namespace, and a subpath of its own (`effect-keymesh/KeyPool`);
 * adapters are reached by their subpath only, so that nobody loads an SDK that is not used.
 *
 * @since 0.1.0
 */

/** One credential with its attributes, and how keys are read from configuration. */
export * as ApiKey from "./ApiKey.js"
/** Settings of one call, given around it. */
export * as CallOptions from "./CallOptions.js"
/** The circuit breaker: pure transitions, and a service. */
export * as CircuitBreaker from "./CircuitBreaker.js"
/** What can go wrong with an attempt. */
export * as Explanation from "./Explanation.js"
export * as Fault from "./Fault.js"
/** The typed errors. */
export * as KeymeshError from "./KeymeshError.js"
/** The pool. */
export * as KeyPool from "./KeyPool.js"
/** Which keys exist now. */
export * as Keyring from "./Keyring.js"
/** Metrics and spans. */
export * as OpenTelemetry from "./OpenTelemetry.js"
/** What an attempt says. */
export * as Outcome from "./Outcome.js"
/** What a pool looks like at one moment. */
export * as PoolSnapshot from "./PoolSnapshot.js"
/** What outlives the process. */
export * as PoolStore from "./PoolStore.js"
/** Schedule combinators for retries. */
export * as RetryPolicy from "./RetryPolicy.js"
/** What processes share of one pool. */
export * as SharedPool from "./SharedPool.js"
/** Which key serves next. */
export * as Strategy from "./Strategy.js"
/** What happened, as a stream. */
export * as Telemetry from "./Telemetry.js"
