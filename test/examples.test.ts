/**
 * Every example runs in a process of its own, with nothing configured. Those that have a script in package.json run as their
 * reader runs them, TypeScript through a loader; the others were made JavaScript before, all at once, which leaves the
 * packages that they import as they are.
 */
import { afterAll, assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import { buildSync } from "esbuild"
import { execFile } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import * as FakeOpenAi from "../examples/support/FakeOpenAi.js"
import * as RedisServer from "./support/RedisServer.js"

const root = fileURLToPath(new URL("..", import.meta.url))

/** What the output must say, by example. */
const examples: Readonly<Record<string, ReadonlyArray<string | RegExp>>> = {
  "quickstart": [
    "the openai SDK talks to a fake OpenAI",
    /✗ #\d+ +charlie +HTTP 401 {2}Unauthorized/,
    /→ #\d+ +alpha +takes over: Unauthorized/,
    /bravo +breaker open for 500 ms, after 3 faults in a row/,
    /bravo +breaker half-open/,
    /bravo +breaker open for 1 s, after a bad probe/,
    /bravo +breaker closed/,
    /HTTP 429 {2}RateLimited/,
    /… #\d+ +waits \d+ ms for a key/,
    /✗ #\d+ +\w+ +inside the answer {2}Overloaded/,
    "one careful question before it sends the crowd.",
    /key +id +attempts +served +faults +breaker +state/,
    /\d+ calls to the fake, \d+ attempts, \d+ faults, none of which the caller saw\.\n$/
  ],
  "anthropic": [
    "create:      You said: hello",
    "stream:      You said: hello",
    "NotFoundError req_fake",
    "as Stream:   You said: hello",
    /catchTag: +.*max_tokens/
  ],
  "affinity": [
    /without a name +north south west/,
    /alice +(\w+) \1 \1\n/,
    /bob +(\w+) \1 \1\n(?:.*\n)*bob, by a header +\1\n/,
    /read three times +(\w+) \1 \1\n/,
    /and the next turns +(\w+) \1 \1/
  ],
  "any-effect": ["Vienna: sun after rain (attempt 3, key \"good\")", "(attempt 1, key \"good\")", "WeatherError"],
  "call-options": ["You said: hello", "DeadlineExceeded: ", "BudgetExceeded: ", /AllKeysExhausted: .*1 limit/],
  "cluster": [
    /\d+ ms later all others knew/,
    "They made 15 calls, and asked 0 times with that key.",
    "4 processes made 5 calls each, at once: 12 went out, 8 were told when.",
    "Half-open, 4 processes made 5 calls each, at once: 1 of the 20 tried the key, for all."
  ],
  "drop-in": [
    "You said: hello",
    /withResponse: 200/,
    /stream: +You said: hello/,
    "NotFoundError model_not_found",
    "5 calls, 6 attempts"
  ],
  "effect-ai": ["You said: three", "limited: 1 served, 0 fault"],
  "effects": [
    "openai:    You said: hello",
    "anthropic: You said: hello",
    "gemini:    You said: hello",
    /You said: hello\nYou said: hello\n\d+ models/,
    "Rejected: 404 from openai"
  ],
  "fallback": ["one key revoked: OpenAI here.", /no key left: +Groq here\./],
  "gemini": [
    "You said: good morning",
    "You said: word by word",
    "ApiError 404",
    /revoked +0 +1 +Unauthorized/,
    /healthy +3 +1 +ready/
  ],
  "http": ["Vienna: 24 °C", "report: HTTP 500", "limited: 0 served, 1 fault"],
  "http-client": ["several events", "RequestError, and inside it AllKeysExhausted"],
  "keymesh": [
    "revoked -> healthy: Unauthorized",
    "You said: hello",
    /stream: +You said: hello/,
    "AllKeysExhausted",
    "Vienna: 24 °C",
    /revoked +closed +1 failed/
  ],
  "keys-at-run-time": [
    /one key +(first ?){6}\n/,
    /a second one added .*second/,
    /switched off +(first ?){6}\n/,
    /replaced by a third .*third/,
    /drained +(first ?){6}\n/,
    "ConfigurationError: key.weight"
  ],
  "retry-policy": [/(attempt after +\d+ ms\n\s*){4}/, "inside a budget of 400 ms"],
  "strategies": [/round-robin +40 +40 +40/, /weighted +20 +60 +40/, /sequential-then-rotate +120 +0 +0/, "last-resort"],
  "streaming": [/(One two three[^]*){3}/, /limited +0 +[12]/, "0 in flight"],
  "telemetry": ["\"_tag\":\"request.fail\"", "\"_tag\":\"key.rotated\"", /level=WARN .*message=request\.fail/]
}

/** These two have a script. */
const asRead: ReadonlySet<string> = new Set(["quickstart", "cluster"])

/** Where the others are: below the packages that they import. */
const built = mkdtempSync(join(root, "node_modules", ".examples-"))
buildSync({
  entryPoints: Object.keys(examples).filter((name) => !asRead.has(name)).map((name) =>
    join(root, "examples", `${name}.ts`)
  ),
  absWorkingDir: root,
  outdir: built,
  outExtension: { ".js": ".mjs" },
  bundle: true,
  platform: "node",
  format: "esm",
  packages: "external",
  logLevel: "error"
})
afterAll(() => rmSync(built, { recursive: true, force: true }))

describe.concurrent("examples", () => {
  it("are all here", () => {
    const files = readdirSync(new URL("../examples", import.meta.url)).filter((name) => name.endsWith(".ts"))
    assert.deepStrictEqual(files.map((name) => name.slice(0, -3)).sort(), Object.keys(examples).sort())
  })

  for (const [name, words] of Object.entries(examples)) {
    // Without a redis-server there is a warning, and a failure where nobody reads those.
    it.skipIf(name === "cluster" && !RedisServer.isHere)(name, async () => {
      // Only the one that starts another program needs to find it.
      const { code, stderr, stdout } = await run(name, name === "cluster" ? { PATH: process.env["PATH"] ?? "" } : {})
      assert.deepStrictEqual({ code, stderr }, { code: 0, stderr: "" }, stdout)
      const source = readFileSync(new URL(`../examples/${name}.ts`, import.meta.url), "utf8")
      const secrets = source.match(/sk-fake-[\w-]+/g) ?? []
      assert.isTrue(secrets.length > 0 || name === "retry-policy", "an example without a secret proves nothing")
      for (const secret of secrets) assert.notInclude(stdout, secret)
      for (const word of words) {
        assert.isTrue(typeof word === "string" ? stdout.includes(word) : word.test(stdout), `${word} in:\n${stdout}`)
      }
      assert.notInclude(stdout, "\u001b", "colours, though nobody looks at a terminal")
    }, 60_000)
  }

  it("cluster tells what is missing, and exits with 1", async () => {
    const missing = await run("cluster", { PATH: "/nowhere" })
    assert.deepStrictEqual([missing.code, missing.stdout], [1, ""])
    assert.match(missing.stderr, /no redis-server on PATH[^]*apt-get install redis-server[^]*REDIS_URL=/)
    const secret = "sk-fake-redis-password"
    const gone = await run("cluster", { REDIS_URL: `redis://:${secret}@127.0.0.1:1` })
    assert.deepStrictEqual([gone.code, gone.stdout], [1, ""])
    assert.include(gone.stderr, "Nobody answers at 127.0.0.1:1")
    assert.notInclude(gone.stderr, secret)
  }, 60_000)

  const secrets = ["sk-fake-configured-4e9c1a", "sk-fake-configured-b07d55"] as const

  it("quickstart calls what is configured, and does not call it a fake", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ strict: true, keys: { [secrets[0]]: {} } })
      const { code, stderr, stdout } = yield* Effect.promise(() =>
        run("quickstart", {
          OPENAI_API_KEYS: secrets.join(","),
          OPENAI_BASE_URL: fake.baseUrl,
          OPENAI_MODEL: "gpt-4o-mini"
        })
      )
      assert.deepStrictEqual({ code, stderr }, { code: 0, stderr: "" }, stdout)
      assert.include(stdout, `Three small calls and a stream with gpt-4o-mini, to ${fake.baseUrl}`)
      assert.match(stdout, /4 calls to the API at 127\.0\.0\.1:\d+, 5 attempts, 1 fault, none of which/)
      assert.notMatch(stdout, /\bfake\b/)
      for (const secret of secrets) assert.notInclude(stdout, secret)
      const requests = yield* fake.requests
      assert.strictEqual(requests.length, 5)
      for (const { body } of requests) assert.include(body, "\"model\":\"gpt-4o-mini\"")
    }).pipe(Effect.scoped, Effect.runPromise), 60_000)

  it("quickstart tells what went wrong, and exits with 1", () =>
    Effect.gen(function*() {
      const fake = yield* FakeOpenAi.make({ strict: true })
      const refused = yield* Effect.promise(() =>
        run("quickstart", { OPENAI_API_KEYS: secrets.join(","), OPENAI_BASE_URL: fake.baseUrl })
      )
      assert.strictEqual(refused.code, 1)
      assert.include(refused.stderr, "Failed: No key of pool \"openai\" can serve this call (2 Unauthorized)")
      for (const secret of secrets) assert.notInclude(refused.stdout + refused.stderr, secret)

      const wrong = yield* Effect.promise(() => run("quickstart", { OPENAI_API_KEYS: `[{"secret":"${secrets[0]}",` }))
      assert.strictEqual(wrong.code, 1)
      assert.include(wrong.stderr, "OPENAI_API_KEYS")
      assert.notInclude(wrong.stderr, secrets[0])
      assert.strictEqual(wrong.stdout, "")
    }).pipe(Effect.scoped, Effect.runPromise), 60_000)
})

const run = (
  name: string,
  env: Readonly<Record<string, string>> = {}
): Promise<{ readonly code: number; readonly stdout: string; readonly stderr: string }> =>
  new Promise((resolve) => {
    const child = execFile(
      process.execPath,
      asRead.has(name) ? ["node_modules/tsx/dist/cli.mjs", `examples/${name}.ts`] : [join(built, `${name}.mjs`)],
      // Nothing of the surroundings: no keys of whoever runs the tests, and no wish for colours.
      { cwd: root, env, timeout: 50_000 },
      (_, stdout, stderr) => resolve({ code: child.exitCode ?? -1, stdout, stderr })
    )
  })
