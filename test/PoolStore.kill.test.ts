/**
 * Processes with a store of files, killed at any moment (SIGKILL). `KEYMESH_KILLS` says how often; each kill meets eight
 * files that are being written.
 */
import { NodeContext } from "@effect/platform-node"
import { afterAll, assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Option from "effect/Option"
import { type ChildProcess, spawn } from "node:child_process"
import { mkdtempSync, readdirSync, rmSync } from "node:fs"
import { createServer } from "node:http"
import { tmpdir } from "node:os"
import { join } from "node:path"
import type { StoredPool } from "../src/PoolRecord.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Bundle from "./support/bundle.js"

const kills = Number(process.env["KEYMESH_KILLS"] ?? 24)
const perKill = 2_000

/** One file, so that a process starts soon. */
const program = Bundle.make("killed")
const children = new Set<ChildProcess>()
afterAll(() => {
  for (const child of children) child.kill("SIGKILL")
  program.remove()
})

/** Starts a process, kills it `after` its output holds what `begins` looks for, and gives all lines that it said. */
const killed = (args: ReadonlyArray<string>, begins: (said: string) => boolean, after: number) =>
  new Promise<ReadonlyArray<string>>((resolve, reject) => {
    const child = spawn(process.execPath, [program.file, ...args], {
      stdio: ["ignore", "pipe", "pipe"]
    })
    children.add(child)
    let said = ""
    let wrong = ""
    let dying = false
    child.stderr.on("data", (text) => wrong += String(text))
    child.stdout.on("data", (text) => {
      said += String(text)
      if (dying || !begins(said)) return
      dying = true
      setTimeout(() => child.kill("SIGKILL"), after)
    })
    child.on("error", reject)
    child.on("close", (code, signal) => {
      children.delete(child)
      if (signal !== "SIGKILL") reject(new Error(`it ended by itself, with ${code}: ${wrong}`))
      // The last line may be half of one.
      else resolve(said.split("\n").slice(0, -1))
    })
  })

const withDirectory = async (use: (directory: string) => Promise<void>) => {
  const directory = mkdtempSync(join(tmpdir(), "keymesh-"))
  try {
    await use(directory)
  } finally {
    rmSync(directory, { recursive: true, force: true })
  }
}

/** The record of a pool: it must be readable, whoever was killed. */
const recordIn = (directory: string, pool: string): Promise<StoredPool | undefined> =>
  PoolStore.makeFile({ directory }).pipe(
    Effect.flatMap((store) => store.load(pool)),
    Effect.map(Option.getOrUndefined),
    Effect.provide(NodeContext.layer),
    Effect.runPromise
  )

const successesOf = (record: StoredPool | undefined) => record?.keys.reduce((sum, key) => sum + key.successes, 0) ?? 0

describe("SIGKILL", () => {
  it(
    "P1, P3: of what is written when a process is killed there is the old or the new, whole, and nothing saved is lost",
    () =>
      withDirectory(async (directory) => {
        // Two processes at a time, each with files of its own.
        const lanes = [0, 1].map((lane) => Array.from({ length: 8 }, (_, i) => `pool-${lane}-${i}`))
        await Promise.all(lanes.map(async (pools) => {
          const last = new Map(pools.map((pool) => [pool, 0]))
          for (let kill = 0; kill < kills / lanes.length; kill++) {
            const all = (said: string) => pools.every((pool) => said.includes(`${pool} `))
            const said = await killed(["writer", directory, pools.join(",")], all, Math.random() * 40)
            for (const line of said) {
              const [pool = "", n] = line.split(" ")
              assert.strictEqual(Number(n), (last.get(pool) ?? Number.NaN) + 1, `${pool} goes on where it was`)
              last.set(pool, Number(n))
            }
            for (const pool of pools) {
              const record = await recordIn(directory, pool)
              const [saved = 0, n = 0] = [last.get(pool), record?.savedAt]
              // What was being saved may be there as well.
              assert.include([saved, saved + 1], n, pool)
              assert.strictEqual(record?.keys.length, 1 + (n * 37) % 300)
              assert.isTrue(record?.keys.every((key) => key.total === n))
              last.set(pool, n)
            }
          }
        }))
        const files = readdirSync(directory)
        assert.deepStrictEqual(
          files.filter((file) => file.endsWith(".json")).sort(),
          lanes.flat().map((pool) => `${pool}.json`)
        )
        assert.isNotEmpty(files.filter((file) => file.endsWith(".tmp")), "somebody was killed in the middle of a file")
        assert.isEmpty(files.filter((file) => file.endsWith(".unreadable")))
      }),
    60_000 + kills * perKill
  )

  it(
    "P1: a pool that is killed in the middle of its calls finds all that it had saved when it starts again",
    () =>
      withDirectory(async (directory) => {
        let answered = 0
        const server = createServer((request, response) => {
          const refused = request.headers["x-api-key"] === "key-two" && Math.random() < 0.2
          if (!refused) answered++
          response.writeHead(refused ? 429 : 200, refused ? { "retry-after": "1" } : {}).end("{}")
        })
        await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
        try {
          const address = server.address()
          const baseUrl = `http://127.0.0.1:${typeof address === "object" ? address?.port : ""}`
          for (let kill = 0; kill < Math.max(4, kills / 10); kill++) {
            const before = await recordIn(directory, "openai")
            const saves = kill % 2
            const ready = (said: string) => said.split("\nsaved ").length > saves && said.includes("loaded ")
            const said = await killed(["pool", directory, "openai", baseUrl], ready, Math.random() * 400)
            const degraded = said.filter((line) => line.startsWith("degraded"))
            // A busy machine may keep a store waiting: its record is then taken up later, and not replaced before.
            const late = degraded.length > 0
            assert.deepStrictEqual(degraded.filter((line) => !line.endsWith("it did not answer in time")), [])
            if (!late) assert.include(said, `loaded ${successesOf(before)}`)
            const record = await recordIn(directory, "openai")
            const saved = said.filter((line) => line.startsWith("saved ")).at(-1)?.split(" ") ?? []
            assert.isAtLeast(record?.savedAt ?? 0, Number(saved[1] ?? before?.savedAt ?? 0))
            assert.isAtLeast(successesOf(record), Number(saved[2] ?? successesOf(before)))
            assert.isAtMost(successesOf(record), answered)
            if (saves > 0 && !late) assert.isAbove(successesOf(record), successesOf(before))
          }
          const record = await recordIn(directory, "openai")
          const uses = record?.limits?.flatMap(({ limits }) => limits.declared ?? []) ?? []
          assert.isNotEmpty(uses, "what is used of a declared limit")
        } finally {
          server.closeAllConnections()
          server.close()
        }
      }),
    60_000 + kills * perKill
  )
})
