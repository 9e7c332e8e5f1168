/** A Redis for an example: the one that `REDIS_URL` names, or a `redis-server` of its own, which keeps nothing. */
import * as Config from "effect/Config"
import * as Data from "effect/Data"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import type * as Scope from "effect/Scope"
import { spawn } from "node:child_process"
import { connect, createServer } from "node:net"

/** What to do about it is in the message. */
export class NoRedis extends Data.TaggedError("NoRedis")<{ readonly message: string }> {}

export interface Redis {
  readonly url: string
  /** The same for people, without a password. */
  readonly where: string
}

export const running: Effect.Effect<Redis, NoRedis, Scope.Scope> = Effect.gen(function*() {
  const configured = yield* Effect.orDie(Config.option(Config.nonEmptyString("REDIS_URL")))
  if (Option.isNone(configured)) return yield* own
  if (!URL.canParse(configured.value)) return yield* new NoRedis({ message: "REDIS_URL is no URL: redis://host:port" })
  const { host, hostname, port } = new URL(configured.value)
  yield* reached(hostname, Number(port === "" ? 6_379 : port))
  return { url: configured.value, where: host }
})

const reached = (host: string, port: number): Effect.Effect<void, NoRedis> =>
  Effect.async<void, NoRedis>((resume) => {
    const socket = connect({ host, port }, () => {
      socket.destroy()
      resume(Effect.void)
    })
    socket.once("error", () =>
      resume(new NoRedis({ message: `Nobody answers at ${host}:${port}, which REDIS_URL names` })))
    return Effect.sync(() =>
      socket.destroy()
    )
  }).pipe(
    Effect.timeoutFail({
      duration: "2 seconds",
      onTimeout: () => new NoRedis({ message: `${host}:${port}, which REDIS_URL names, does not answer` })
    })
  )

const own: Effect.Effect<Redis, NoRedis, Scope.Scope> = Effect.gen(function*() {
  const port = yield* freePort
  yield* Effect.acquireRelease(
    Effect.async<{ readonly kill: () => void }, NoRedis>((resume) => {
      const server = spawn(
        "redis-server",
        ["--port", String(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        { stdio: ["ignore", "pipe", "ignore"] }
      )
      server.once("error", () => resume(missing))
      server.once("exit", () => resume(new NoRedis({ message: `redis-server did not start on port ${port}` })))
      server.stdout.on("data", (text: Buffer) => {
        if (text.includes("eady to accept connections")) resume(Effect.succeed({ kill: () => server.kill() }))
      })
    }),
    ({ kill }) => Effect.sync(kill)
  )
  return { url: `redis://127.0.0.1:${port}`, where: `127.0.0.1:${port}, started for this` }
})

const missing = new NoRedis({
  message: "There is no redis-server on PATH. Install one (Debian: apt-get install redis-server; macOS: brew install " +
    "redis), or name one that runs: REDIS_URL=redis://localhost:6379"
})

const freePort: Effect.Effect<number> = Effect.async((resume) => {
  const server = createServer().listen(0, "127.0.0.1", () => {
    const address = server.address()
    const port = typeof address === "object" && address !== null ? address.port : 0
    server.close(() => resume(Effect.succeed(port)))
  })
})
