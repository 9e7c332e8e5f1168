/** The bench that judges the pool is itself checked: limiters, clock, oracle, and that a seed gives one and the same run. */
import { assert, describe, it } from "@effect/vitest"
import { execFile } from "node:child_process"
import { fileURLToPath } from "node:url"

const root = fileURLToPath(new URL("..", import.meta.url))

/** A process of its own, since it replaces the clocks of the platform; the pool is the one in `src`. */
const goodput = (...args: ReadonlyArray<string>) =>
  new Promise<{ readonly code: unknown; readonly stdout: string; readonly stderr: string }>((resolve) =>
    execFile(
      process.execPath,
      ["--import", "tsx", "bench/goodput/main.mjs", ...args],
      { cwd: root },
      (error, stdout, stderr) => resolve({ code: error === null ? 0 : error.code, stdout, stderr })
    )
  )

describe("the goodput bench", () => {
  it("its self-check passes: limiters, virtual time, oracle, one small scenario with every contestant", async () => {
    const { code, stderr, stdout } = await goodput("--self-check")
    assert.strictEqual(stderr, "")
    assert.strictEqual(stdout, "self-check: all is well\n")
    assert.strictEqual(code, 0)
  })

  it("a scenario it does not know is refused, not skipped", async () => {
    const { code, stderr } = await goodput("--scenario", "nowhere")
    assert.include(stderr, "no scenario is called nowhere")
    assert.strictEqual(code, 2)
  })
})
