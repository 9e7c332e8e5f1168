/**
 * Redis servers of a test's own: a `redis-server` from PATH on a free port, with its files in a folder of its own. And a way
 * in between that can be slow, deaf, or cut.
 */
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import type * as Scope from "effect/Scope"
import { execFileSync, spawn } from "node:child_process"
import { existsSync, mkdtempSync, rmSync } from "node:fs"
import { connect, createServer, type Server, type Socket } from "node:net"
import { tmpdir } from "node:os"
import { delimiter, join } from "node:path"

/** Whether there is a `redis-server` here. */
export const isHere: boolean = (process.env["PATH"] ?? "").split(delimiter).some((folder) =>
  existsSync(join(folder, "redis-server"))
)

if (!isHere) {
  const problem =
    "No redis-server on PATH: the tests of pools on Redis do not run. Debian: apt-get install redis-server"
  // Nobody reads what a build prints.
  if ((process.env["CI"] ?? "") !== "") throw new Error(problem)
  console.warn(problem)
}

export interface RedisServer {
  readonly port: number
  readonly url: string
  /** The server's own answer to a command, by `redis-cli`. */
  readonly cli: (...args: ReadonlyArray<string>) => Effect.Effect<string>
  /** Sets a key to any text. */
  readonly put: (key: string, text: string) => Effect.Effect<void>
  /** Stops it from doing anything, as a machine that hangs. */
  readonly pause: Effect.Effect<void>
  readonly resume: Effect.Effect<void>
  readonly kill: Effect.Effect<void>
  /** Starts it again on the same port, with what it had saved (nothing). */
  readonly start: Effect.Effect<void>
}

/** A server that ends with the scope. */
export const make = (
  options: { readonly args?: ReadonlyArray<string>; readonly password?: string; readonly port?: number } = {}
): Effect.Effect<RedisServer, never, Scope.Scope> =>
  Effect.gen(function*() {
    const folder = yield* Effect.acquireRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "keymesh-redis-"))),
      (folder) => Effect.sync(() => rmSync(folder, { recursive: true, force: true }))
    )
    const port = options.port ?? (yield* freePort)
    let child: ReturnType<typeof spawn> | undefined
    const more = options.password === undefined ? [] : ["--requirepass", options.password]
    const secret = options.password === undefined ? [] : ["-a", options.password, "--no-auth-warning"]
    const run = (...args: ReadonlyArray<string>) =>
      execFileSync("redis-cli", ["-p", String(port), ...secret, ...args], { encoding: "utf8", stdio: "pipe" }).trim()
    const start = Effect.gen(function*() {
      child = spawn("redis-server", [
        "--port",
        String(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        folder,
        "--save",
        "",
        "--daemonize",
        "no",
        ...more,
        ...options.args ?? []
      ], { stdio: "ignore" })
      for (;;) {
        const answer = yield* Effect.option(Effect.try(() => run("ping")))
        if (Option.contains(answer, "PONG")) return
        yield* Effect.sleep(20)
      }
    })
    const kill = Effect.async<void>((resume) => {
      const dying = child
      child = undefined
      if (dying === undefined || dying.exitCode !== null) return resume(Effect.void)
      dying.once("exit", () => resume(Effect.void))
      dying.kill("SIGKILL")
    })
    yield* Effect.acquireRelease(start, () => kill)
    return {
      port,
      url: `redis://${options.password === undefined ? "" : `:${options.password}@`}127.0.0.1:${port}`,
      cli: (...args) => Effect.sync(() => run(...args)),
      put: (key, text) =>
        Effect.sync(() => {
          execFileSync("redis-cli", ["-p", String(port), ...secret, "-x", "set", key], { input: text, stdio: "pipe" })
        }),
      pause: Effect.sync(() => child?.kill("SIGSTOP")),
      resume: Effect.sync(() => child?.kill("SIGCONT")),
      kill,
      start
    }
  })

export const freePort: Effect.Effect<number> = Effect.async((resume) => {
  const server = createServer().listen(0, "127.0.0.1", () => {
    const at = portOf(server)
    server.close(() => resume(Effect.succeed(at)))
  })
})

export interface Proxy {
  readonly port: number
  readonly url: string
  /** From now on everything takes so many milliseconds on the way to the server. */
  readonly delay: (millis: number) => Effect.Effect<void>
  /** What is sent goes nowhere, in both directions, while the connections stay. */
  readonly swallow: (whether: boolean) => Effect.Effect<void>
  /** Cuts connections: all, or those of which `which` says so by what they sent so far. */
  readonly cut: (which?: (sent: string) => boolean) => Effect.Effect<number>
  /** Cuts all connections once, when a text is sent next, at a moment of its way there and back. */
  readonly cutAt: (text: string, moment: Moment) => Effect.Effect<void>
  /** Whether that has not happened yet. */
  readonly isDue: Effect.Effect<boolean>
  /** Whether connections, of which `which` says so by what they sent first, are cut at once. */
  readonly refuse: (which: ((sent: string) => boolean) | undefined) => Effect.Effect<void>
  /** The connections of which `which` says so by what they sent so far, and only these, hear nothing any more. */
  readonly deafen: (which: (sent: string) => boolean) => Effect.Effect<void>
  /** How many connections were opened. */
  readonly opened: Effect.Effect<number>
}

/** Where a command is: not at the server yet, just there, answered, or answered to him who sent it. */
export const moments = ["asked", "sent", "answered", "heard"] as const
export type Moment = (typeof moments)[number]

/** A way to a port that can be disturbed. */
export const proxy = (to: number): Effect.Effect<Proxy, never, Scope.Scope> =>
  Effect.gen(function*() {
    let millis = 0
    let swallows = false
    let opened = 0
    let refuses: ((sent: string) => boolean) | undefined
    let due: { readonly text: string; readonly moment: Moment } | undefined
    const pairs = new Map<Socket, { readonly out: Socket; sent: string; deaf: boolean; asks: boolean }>()
    const cut = (which: (sent: string) => boolean) => {
      const found = Array.from(pairs).filter(([, { sent }]) => which(sent))
      for (const [socket, { out }] of found) {
        socket.destroy()
        out.destroy()
      }
      return found.length
    }
    const cutAll = () => {
      due = undefined
      cut(() => true)
    }
    const server = createServer((socket) => {
      opened++
      const out = connect(to, "127.0.0.1")
      const pair = { out, sent: "", deaf: false, asks: false }
      pairs.set(socket, pair)
      const end = () => {
        pairs.delete(socket)
        socket.destroy()
        out.destroy()
      }
      socket.on("data", (data) => {
        pair.sent = (pair.sent + data.toString("latin1")).slice(-4_096)
        if (refuses?.(pair.sent) === true) return end()
        if (swallows) return
        if (due !== undefined && data.includes(due.text)) {
          pair.asks = true
          if (due.moment === "asked") return cutAll()
          if (due.moment === "sent") return void out.write(data, cutAll)
        }
        if (millis === 0) out.write(data)
        else setTimeout(() => out.write(data), millis)
      })
      out.on("data", (data) => {
        if (due?.moment === "answered" && pair.asks) return cutAll()
        if (due?.moment === "heard" && pair.asks) return void socket.write(data, cutAll)
        if (!swallows && !pair.deaf) socket.write(data)
      })
      for (const side of [socket, out]) side.on("error", end).on("close", end)
    })
    yield* Effect.acquireRelease(
      Effect.async<void>((resume) => {
        server.listen(0, "127.0.0.1", () => resume(Effect.void))
      }),
      () =>
        Effect.async<void>((resume) => {
          for (const [socket, { out }] of pairs) {
            socket.destroy()
            out.destroy()
          }
          server.close(() => resume(Effect.void))
        })
    )
    const port = portOf(server)
    return {
      port,
      url: `redis://127.0.0.1:${port}`,
      delay: (value) => Effect.sync(() => void (millis = value)),
      swallow: (whether) => Effect.sync(() => void (swallows = whether)),
      cut: (which = () => true) => Effect.sync(() => cut(which)),
      cutAt: (text, moment) => Effect.sync(() => void (due = { text, moment })),
      isDue: Effect.sync(() => due !== undefined),
      deafen: (which) =>
        Effect.sync(() => {
          for (const pair of pairs.values()) pair.deaf = which(pair.sent)
        }),
      refuse: (which) => Effect.sync(() => void (refuses = which)),
      opened: Effect.sync(() => opened)
    }
  })

const portOf = (server: Server): number => {
  const address = server.address()
  return typeof address === "object" && address !== null ? address.port : 0
}

/** Waits until something is so; the test's own timeout is the bound. */
export const until = <A, E, R>(effect: Effect.Effect<A, E, R>, is: (value: A) => boolean): Effect.Effect<A, E, R> =>
  Effect.gen(function*() {
    for (;;) {
      const value = yield* effect
      if (is(value)) return value
      yield* Effect.sleep(10)
    }
  })
