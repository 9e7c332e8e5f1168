/**
 * What the examples print with: lines that align, tables, colours where a terminal wants them, and a `main` that tells
 * what went wrong in one line.
 */
import type * as Telemetry from "effect-keymesh/Telemetry"
import * as Cause from "effect/Cause"
import * as Console from "effect/Console"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import * as Option from "effect/Option"
import { styleText } from "node:util"

/** `hasColors` knows of NO_COLOR, FORCE_COLOR and dumb terminals; what is no terminal has no such method. */
const coloured = process.stdout.isTTY === true && process.stdout.hasColors()

type Style = Parameters<typeof styleText>[0]

/** A text in a style, where there are styles. */
export const paint = (style: Style, text: string): string => coloured ? styleText(style, text) : text

export const say = (text: string): Effect.Effect<void> => Console.log(text)

export const title = (text: string): Effect.Effect<void> => Console.log(`\n${paint("bold", text)}`)

/** A part of a line, at once; for answers that come word by word. */
export const write = (text: string): Effect.Effect<void> => Effect.sync(() => void process.stdout.write(text))

/** Rows below a head, each column as wide as its widest cell; columns of numbers stand to the right. */
export const table = (head: ReadonlyArray<string>, rows: ReadonlyArray<ReadonlyArray<string | number>>): string => {
  const cells = [head, ...rows.map((row) => row.map(String))]
  const columns = head.map((_, column) => ({
    width: Math.max(...cells.map((row) => row[column]?.length ?? 0)),
    numeric: rows.every((row) => typeof row[column] === "number")
  }))
  return cells.map((row, at) => {
    const line = columns.map(({ numeric, width }, column) =>
      numeric ? (row[column] ?? "").padStart(width) : (row[column] ?? "").padEnd(width)
    )
    return `  ${paint(at === 0 ? "dim" : "reset", line.join("   ").trimEnd())}`
  }).join("\n")
}

/** A length of time for people. */
export const howLong = (millis: number): string => {
  if (millis < 1_000) return `${Math.max(0, Math.round(millis))} ms`
  const [size, unit]: readonly [number, string] = millis < 60_000
    ? [1_000, "s"]
    : millis < 3_600_000
    ? [60_000, "min"]
    : [3_600_000, "h"]
  return `${Math.round(millis / size * 10) / 10} ${unit}`
}

/** An event of the pool as one line, `since` being second 0; nothing for those that only repeat what others say. */
export const event = (event: Telemetry.Event, since: number): string | undefined => {
  const line = (style: Style, mark: string, who: string, what: string) => {
    const call = "call" in event ? `#${event.call}` : ""
    const time = `${((event.at - since) / 1_000).toFixed(2)} s`
    return `${paint("dim", time.padStart(8))}  ${paint(style, mark)} ${call.padEnd(4)} ${who.padEnd(16)} ${what}`
  }
  const left = (until: number | undefined) => until === undefined ? "until further notice" : howLong(until - event.at)
  switch (event._tag) {
    case "key.added":
      return line("cyan", "+", event.label, event.duplicate ? "was given twice" : `is in the pool as ${event.keyId}`)
    case "key.removed":
      return line("cyan", "-", event.label, "has left the pool")
    case "key.disabled":
      return line("yellow", "-", event.label, "is switched off")
    case "request.success":
      return line("green", "✓", event.label, `answered in ${howLong(event.durationMillis)}`)
    case "request.fail": {
      const { code, kind, status } = event.fault
      const answer = kind === "Timeout" || kind === "Network" ? "no answer" : "inside the answer"
      const words = [status === undefined ? answer : `HTTP ${status}`, kind, code ?? ""]
      return line("red", "✗", event.label, words.filter((word) => word !== "").join("  "))
    }
    case "key.rotated":
      return line("yellow", "→", event.label, `takes over: ${event.reason}`)
    case "key.cooldown":
      return line("yellow", "‖", event.label, `rests for ${left(event.until)}, ${sources[event.provenance]}`)
    case "circuit.open": {
      const why = event.from === "HalfOpen" ? "a bad probe" : `${event.failures} faults in a row`
      return line("red", "○", event.label, `breaker open for ${left(event.until)}, after ${why}`)
    }
    case "circuit.half-open":
      return line("yellow", "◐", event.label, "breaker half-open: this one call is the probe")
    case "circuit.closed":
      return line("green", "●", event.label, "breaker closed: back in service")
    case "call.waiting":
      return line("yellow", "…", "", `waits ${left(event.until)} for a key, ${event.waiting} in the queue`)
    case "budget.denied":
      return line("yellow", "…", "", event.reason === "tokens" ? "waits for a retry token" : "has no time for a retry")
    case "all.exhausted":
      return line("red", "✗", "", "no key can serve this call")
    case "pool.floor":
      return line("yellow", "↯", event.label, "is tried although it rests: no other key is left")
    case "store.degraded":
      return line("red", "!", "store", event.problem)
  }
  return undefined
}

const sources = { told: "as the provider asks", measured: "as measured", guessed: "by the pool's own rule" }

/** Runs an example. A failure is told by its message and exit code 1; Ctrl-C interrupts it. */
export const main = <A, E>(program: Effect.Effect<A, E>): void => {
  const fiber = Effect.runFork(program)
  const stop = () => fiber.unsafeInterruptAsFork(fiber.id())
  process.once("SIGINT", stop)
  fiber.addObserver((exit) => {
    process.removeListener("SIGINT", stop)
    if (Exit.isSuccess(exit)) return
    process.exitCode = 1
    if (Cause.isInterruptedOnly(exit.cause)) return
    const text = Option.match(Cause.failureOption(exit.cause), {
      onNone: () => Cause.pretty(exit.cause),
      onSome: (error) => error instanceof Error ? error.message : String(error)
    })
    process.stderr.write(`${paint("red", "Failed:")} ${text}\n`)
  })
}
