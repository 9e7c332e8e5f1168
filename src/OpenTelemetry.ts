/**
 * Metrics and spans of pools, by the names of OpenTelemetry's conventions for generative AI.
 *
 * They are made from the events that pools publish, in a fiber of their own: a call waits for none of it, and knows
 * nothing of it. Metrics go into Effect's registry and spans to Effect's tracer, so that whatever exports these exports
 * them; calls that are lost to a lagging subscriber are missing in both.
 *
 * @since 0.1.0
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as FiberId from "effect/FiberId"
import * as Layer from "effect/Layer"
import * as Metric from "effect/Metric"
import * as MetricBoundaries from "effect/MetricBoundaries"
import * as MetricLabel from "effect/MetricLabel"
import * as Option from "effect/Option"
import * as Tracer from "effect/Tracer"
import * as Telemetry from "./Telemetry.js"

/**
 * Of which provider a pool's keys are, by the pool's name: the value of `gen_ai.provider.name`. By default the name
 * itself, but where the conventions have another word for it (`gemini`: `gcp.gemini`).
 *
 * @example
 * ```ts
 * import { Layer } from "effect"
 * import * as OpenTelemetry from "effect-keymesh/OpenTelemetry"
 *
 * const Observed = OpenTelemetry.layer.pipe(
 *   Layer.provide(Layer.succeed(OpenTelemetry.ProviderName, (pool) => pool.startsWith("chat-") ? "openai" : pool))
 * )
 * ```
 *
 * @since 0.1.0
 * @category references
 */
export class ProviderName extends Context.Reference<ProviderName>()("effect-keymesh/OpenTelemetry/ProviderName", {
  defaultValue: () => (pool: string): string => wellKnown[pool] ?? pool
}) {}

/**
 * Metrics and spans, for as long as the layer lives.
 *
 * @example
 * ```ts
 * import { Layer } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as OpenTelemetry from "effect-keymesh/OpenTelemetry"
 *
 * // Whatever installs a tracer and exports metrics, such as `Otlp.layerJson` of `@effect/opentelemetry`.
 * declare const Exporter: Layer.Layer<never>
 *
 * const Base = OpenTelemetry.layer.pipe(
 *   Layer.provide(Exporter),
 *   Layer.provideMerge(KeyPool.layerDefaults)
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layer: Layer.Layer<never, never, Telemetry.Telemetry> = Layer.suspend(() =>
  Layer.merge(layerMetrics, layerSpans)
)

/**
 * Metrics in Effect's registry:
 *
 * - `gen_ai.client.operation.duration`: how long calls take, in seconds, waits and all attempts included; of a stream
 *   until its first content. By `gen_ai.operation.name`, `gen_ai.provider.name`, `gen_ai.request.model`, `error.type`,
 *   and `keymesh.pool`.
 * - `keymesh.attempt.duration`: the same of single attempts, by `keymesh.pool`, `keymesh.key.label`,
 *   `gen_ai.request.model`, and `error.type`.
 * - `keymesh.events`: how many events there were, by `keymesh.pool` and `event.name`.
 *
 * `error.type` is the kind of the fault or the tag of the pool's error, and `_OTHER` where a call was interrupted or failed
 * by itself.
 *
 * @example
 * ```ts
 * import { Effect, Metric } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as OpenTelemetry from "effect-keymesh/OpenTelemetry"
 *
 * const program = Effect.flatMap(Metric.snapshot, Effect.log).pipe(
 *   Effect.provide(OpenTelemetry.layerMetrics),
 *   Effect.provide(KeyPool.layerDefaults)
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerMetrics: Layer.Layer<never, never, Telemetry.Telemetry> = Telemetry.layerForEach((event) =>
  Effect.flatMap(ProviderName, (providerOf) => measured(event, providerOf))
)

/**
 * A span for each call, named by operation and model (`chat gpt-x`), below the span in which the call was made; and below
 * it one for each attempt, with the key's id and label (never its secret) and how it ended. They are made when the call
 * has ended, with the times at which all that was.
 *
 * @example
 * ```ts
 * import { Effect, Layer } from "effect"
 * import * as KeyPool from "effect-keymesh/KeyPool"
 * import * as OpenTelemetry from "effect-keymesh/OpenTelemetry"
 *
 * const Base = OpenTelemetry.layerSpans.pipe(Layer.provideMerge(KeyPool.layerDefaults))
 *
 * const program = KeyPool.KeyPool.pipe(
 *   Effect.flatMap((pool) => pool.run(() => Effect.succeed("an answer"), { model: "gpt-x" })),
 *   Effect.withSpan("question")
 * )
 * ```
 *
 * @since 0.1.0
 * @category layers
 */
export const layerSpans: Layer.Layer<never, never, Telemetry.Telemetry> = Telemetry.layerForEach((event) =>
  event._tag !== "call.end" ? Effect.void : Effect.flatMap(
    Effect.zip(Effect.tracer, ProviderName),
    ([tracer, providerOf]) => Effect.sync(() => trace(tracer, event, providerOf))
  )
)

/** The names that the conventions have for providers whose pools are called otherwise. */
const wellKnown: Readonly<Record<string, string>> = {
  gemini: "gcp.gemini",
  azure: "azure.ai.openai",
  mistral: "mistral_ai",
  xai: "x_ai"
}

type CallEnd = Extract<Telemetry.Event, { readonly _tag: "call.end" }>

// ------------------------------------------------------------------------------------------------------------- metrics

const measured = (event: Telemetry.Event, providerOf: (pool: string) => string): Effect.Effect<void> => {
  const counted = Metric.update(
    Metric.taggedWithLabels(events, labels({ "keymesh.pool": event.pool, "event.name": event._tag })),
    1
  )
  const timed = event._tag === "call.end"
    ? took(operations, event, { ...attributesOf(event, providerOf), "error.type": errorOf(event.outcome) })
    // A late fault is of an attempt that was timed when it was answered.
    : event._tag === "request.success" || (event._tag === "request.fail" && !event.late)
    ? took(attempts, event, {
      "keymesh.pool": event.pool,
      "keymesh.key.label": event.label,
      "gen_ai.request.model": event.model,
      "error.type": event._tag === "request.fail" ? event.fault.kind : undefined
    })
    : Effect.void
  return Effect.zipRight(counted, timed)
}

const took = (
  metric: typeof operations,
  { durationMillis }: { readonly durationMillis: number },
  attributes: Attributes
): Effect.Effect<void> =>
  Metric.update(Metric.taggedWithLabels(metric, labels({ ...attributes, unit: "s" })), durationMillis / 1_000)

type Attributes = Readonly<Record<string, string | undefined>>

const labels = (attributes: Attributes): ReadonlyArray<MetricLabel.MetricLabel> =>
  Object.entries(attributes).flatMap(([key, value]) => value === undefined ? [] : [MetricLabel.make(key, value)])

/** In seconds: those that the conventions give. */
const boundaries = MetricBoundaries.fromIterable(Array.from({ length: 14 }, (_, n) => 2 ** n / 100))

const operations = Metric.histogram("gen_ai.client.operation.duration", boundaries, "GenAI operation duration.")
const attempts = Metric.histogram("keymesh.attempt.duration", boundaries, "How long single attempts take.")
const events = Metric.counter("keymesh.events", {
  description: "What happened in the pools, by the names of their events.",
  incremental: true
})

// --------------------------------------------------------------------------------------------------------------- spans

const trace = (tracer: Tracer.Tracer, event: CallEnd, providerOf: (pool: string) => string): void => {
  const attributes = attributesOf(event, providerOf)
  const span = (
    name: string,
    parent: Option.Option<Tracer.AnySpan>,
    { at, durationMillis, outcome }: { readonly at: number; readonly durationMillis: number; readonly outcome: string },
    attributes: Readonly<Record<string, unknown>>,
    below: (span: Tracer.Span) => void = () => {}
  ): void => {
    const span = tracer.span(name, parent, Context.empty(), [], nanos(at), "client")
    for (const [key, value] of Object.entries(attributes)) if (value !== undefined) span.attribute(key, value)
    const error = errorOf(outcome)
    if (error !== undefined) span.attribute("error.type", error)
    below(span)
    span.end(
      nanos(at + durationMillis),
      error === undefined ? Exit.void : outcome === "ignored" ? Exit.interrupt(FiberId.none) : Exit.fail(outcome)
    )
  }
  const name = [attributes["gen_ai.operation.name"], event.model].filter((word) => word !== undefined).join(" ")
  const parent = Option.map(Option.fromNullable(event.parent), Tracer.externalSpan)
  const { durationMillis, outcome } = event
  const call = { ...attributes, "keymesh.call": event.call, "keymesh.attempts": event.attempts }
  span(name, parent, { at: event.at - durationMillis, durationMillis, outcome }, call, (self) => {
    for (const entry of event.trail.entries) {
      span("attempt", Option.some(self), entry, {
        "keymesh.pool": event.pool,
        "keymesh.attempt": entry.attempt,
        "keymesh.key.id": entry.keyId,
        "keymesh.key.label": entry.label,
        "keymesh.waited": entry.waitedMillis / 1_000,
        "keymesh.code": entry.code,
        "keymesh.lost": entry.lost,
        "http.response.status_code": entry.status
      })
    }
  })
}

/** Milliseconds of the pool's clock as the tracer counts. */
const nanos = (millis: number): bigint => BigInt(Math.floor(millis)) * 1_000_000n

// ---------------------------------------------------------------------------------------------------------------- both

const attributesOf = (
  { model, operation, pool }: CallEnd,
  providerOf: (pool: string) => string
) => ({
  "gen_ai.operation.name": operationOf(operation),
  "gen_ai.provider.name": providerOf(pool),
  "gen_ai.request.model": model,
  "keymesh.pool": pool
})

/** What went wrong, in one of few words. */
const errorOf = (outcome: string): string | undefined =>
  outcome === "success" ? undefined : outcome === "ignored" ? "_OTHER" : outcome

/** What a request asks for, in the words of the conventions; `request` where they have none. */
const operationOf = (operation: string | undefined): string =>
  (operation === undefined ? undefined : paths.find(([path]) => path.test(operation)))?.[1] ?? "request"

const paths: ReadonlyArray<readonly [RegExp, string]> = [
  [/^POST .*(\/chat\/completions|\/responses|\/messages)$/, "chat"],
  [/^POST .*\/completions$/, "text_completion"],
  [/^POST .*(\/embeddings|:(batchE|asyncBatchE|e)mbedContents?)$/, "embeddings"],
  [/^POST .*:(stream)?[gG]enerateContent$/, "generate_content"]
]
