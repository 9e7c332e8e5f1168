/** A tracer that keeps what it is told. */
import * as Cause from "effect/Cause"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import * as Tracer from "effect/Tracer"

/** A span that has ended, as it was then; its times in milliseconds. */
export interface Kept {
  readonly name: string
  readonly kind: Tracer.SpanKind
  readonly attributes: Readonly<Record<string, unknown>>
  readonly from: number
  readonly to: number
  readonly ok: boolean
  readonly parent: string | undefined
}

/** Its spans are called `span-1`, `span-2` … in the order in which they begin. */
export const tracing = () => {
  const begun: Array<Tracer.Span> = []
  const ended: Array<Kept> = []
  /** All that was said of any span. */
  const said: Array<unknown> = []
  const tracer = Tracer.make({
    span: (name, parent, context, links, startTime, kind) => {
      const attributes = new Map<string, unknown>()
      const id = `span-${begun.length + 1}`
      const span: Tracer.Span = {
        _tag: "Span",
        name,
        spanId: id,
        traceId: Option.match(parent, { onNone: () => `trace-${id}`, onSome: ({ traceId }) => traceId }),
        parent,
        context,
        status: { _tag: "Started", startTime },
        attributes,
        links,
        sampled: true,
        kind,
        attribute: (key, value) => void attributes.set(key, value),
        event: (...event) => void said.push(event),
        addLinks: (more) => void said.push(more),
        end: (endTime, exit) => {
          said.push(exit)
          ended.push({
            name,
            kind,
            attributes: Object.fromEntries(attributes),
            from: Number(startTime / 1_000_000n),
            to: Number(endTime / 1_000_000n),
            ok: Exit.isSuccess(exit) || Cause.isInterruptedOnly(exit.cause),
            parent: Option.getOrUndefined(Option.map(parent, ({ spanId }) => spanId))
          })
        }
      }
      begun.push(span)
      said.push(name, attributes, links)
      return span
    },
    context: (f) => f()
  })
  return { begun, ended, said, tracer }
}
