/** The store that keeps files: what they are called, who may read them, and what is left of killed writers. */
import { FileSystem, Path } from "@effect/platform"
import { NodeContext } from "@effect/platform-node"
import { SystemError } from "@effect/platform/Error"
import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import * as Either from "effect/Either"
import * as FastCheck from "effect/FastCheck"
import * as Fiber from "effect/Fiber"
import * as Layer from "effect/Layer"
import * as Option from "effect/Option"
import * as Stream from "effect/Stream"
import * as TestClock from "effect/TestClock"
import * as ApiKey from "../src/ApiKey.js"
import * as DurableFile from "../src/DurableFile.js"
import * as Fault from "../src/Fault.js"
import * as KeyPool from "../src/KeyPool.js"
import type { StoredPool } from "../src/PoolRecord.js"
import * as PoolStore from "../src/PoolStore.js"
import * as Telemetry from "../src/Telemetry.js"

const record = (savedAt: number): StoredPool => ({ version: 1, savedAt, keys: [], groups: [], models: [] })
const one = Either.getOrThrow(ApiKey.make("sk-one")).id

/** A new directory, and the store in one below it. */
const home = Effect.gen(function*() {
  const fs = yield* FileSystem.FileSystem
  const path = yield* Path.Path
  const above = yield* fs.makeTempDirectoryScoped({ prefix: "keymesh-" })
  const directory = path.join(above, "state", "keymesh")
  const at = (name: string) => path.join(directory, name)
  return { fs, above, directory, at, store: yield* PoolStore.makeFile({ directory }) }
})
const savedAt = (store: PoolStore.Service, pool: string) =>
  Effect.map(store.load(pool), (found) => Option.getOrThrow(found).savedAt)

/** The file system, but for some of its functions. */
const spoiling = (spoil: (fs: FileSystem.FileSystem) => Partial<FileSystem.FileSystem>) =>
  Effect.updateService(FileSystem.FileSystem, (fs) => ({ ...fs, ...spoil(fs) }))
const full = (method: string) => new SystemError({ reason: "Unknown", module: "FileSystem", method })

describe("files", () => {
  it.scoped("K1, P1: they are for their owner alone, and so is the directory that was made", () =>
    Effect.gen(function*() {
      const { above, at, directory, fs, store } = yield* home
      yield* store.save("openai", record(1))
      const mode = (path: string) => Effect.map(fs.stat(path), (info) => (info.mode & 0o777).toString(8))
      assert.strictEqual(yield* mode(at("openai.json")), "600")
      assert.strictEqual(yield* mode(directory), "700")
      assert.deepStrictEqual(yield* fs.readDirectory(directory), ["openai.json"])
      // A directory of somebody else's stays as it is.
      yield* fs.chmod(above, 0o755)
      const beside = yield* PoolStore.makeFile({ directory: above })
      yield* beside.save("openai", record(1))
      assert.strictEqual(yield* mode(above), "755")
    }).pipe(Effect.provide(NodeContext.layer)))

  it.scoped("P1: a file is on the disk before it takes the place of the one before", () =>
    Effect.gen(function*() {
      const steps: Array<string> = []
      const note = (step: string) => Effect.sync(() => void steps.push(step.replace(/[0-9a-f]{16}/, "*")))
      const name = (path: string) => path.split("/").at(-1) ?? ""
      yield* Effect.gen(function*() {
        const { store } = yield* home
        yield* store.save("openai", record(1))
      }).pipe(spoiling((fs) => ({
        open: (path, options) =>
          Effect.map(fs.open(path, options), (file) =>
            new Proxy(file, {
              get: (file, member) => {
                const value: unknown = Reflect.get(file, member)
                if (member === "sync") return Effect.zipRight(note(`sync ${name(path)}`), file.sync)
                return typeof value === "function" ? value.bind(file) : value
              }
            })),
        rename: (from, to) => Effect.zipRight(note(`rename ${name(from)} ${name(to)}`), fs.rename(from, to))
      })))
      assert.deepStrictEqual(steps, ["sync openai.json.*.tmp", "rename openai.json.*.tmp openai.json", "sync keymesh"])
    }).pipe(Effect.provide(NodeContext.layer)))

  it.prop("P1: different names are different files, in any file system, and none leads out of the directory", [
    FastCheck.uniqueArray(
      FastCheck.oneof(
        FastCheck.string({ unit: "binary", maxLength: 6 }),
        FastCheck.stringMatching(/^[aA.%/\\-]{0,4}$/),
        FastCheck.string({ minLength: 90, maxLength: 300 })
      ),
      { maxLength: 20 }
    )
  ], ([names]) => {
    const files = names.map(DurableFile.nameOf)
    assert.strictEqual(new Set(files.map((name) => name.toLowerCase().normalize("NFC"))).size, names.length)
    for (const name of files) assert.match(name, /^(?!(con|nul|aux|prn)$)[a-z0-9_%~-]{1,100}$/)
  })

  it("names that need no care are files of that name", () => {
    assert.deepStrictEqual(["openai", "team-2_b", "Open AI", "..", "nul"].map(DurableFile.nameOf), [
      "openai",
      "team-2_b",
      "%4f-pen%20-%41-%49-",
      "%2e-%2e-",
      "%6e-ul"
    ])
  })

  it.scoped("P3: what cannot be read is kept beside, once for each pool, and the error says where", () =>
    Effect.gen(function*() {
      const { at, directory, fs, store } = yield* home
      yield* store.save("openai", record(1))
      for (const text of ["{\"half\":", "{\"version\":2}"]) {
        yield* fs.writeFileString(at("openai.json"), text)
        const error = yield* Effect.flip(store.load("openai"))
        assert.strictEqual(error.problem, "unreadable")
        assert.include(error.detail, "openai.json.unreadable")
        assert.strictEqual(yield* fs.readFileString(at("openai.json.unreadable")), text)
        yield* store.save("openai", record(2))
        assert.strictEqual(yield* savedAt(store, "openai"), 2)
        assert.strictEqual(yield* fs.readFileString(at("openai.json.unreadable")), text, "until the next one")
      }
      yield* fs.writeFile(at("openai.json"), Uint8Array.of(0xff, 0xfe, 0x00))
      assert.strictEqual((yield* Effect.flip(store.load("openai"))).problem, "unreadable")
      assert.deepStrictEqual((yield* fs.readDirectory(directory)).sort(), ["openai.json", "openai.json.unreadable"])
    }).pipe(Effect.provide(NodeContext.layer)))

  it.scoped("P3: a file that cannot be kept beside is still told of, and replaced", () =>
    Effect.gen(function*() {
      const { at, fs, store } = yield* home
      yield* store.save("openai", record(1))
      yield* fs.writeFileString(at("openai.json"), "{\"half\":")
      yield* fs.makeDirectory(at("openai.json.unreadable/in-the-way"), { recursive: true })
      assert.strictEqual((yield* Effect.flip(store.load("openai"))).problem, "unreadable")
      yield* store.save("openai", record(2))
      assert.strictEqual(yield* savedAt(store, "openai"), 2)
    }).pipe(Effect.provide(NodeContext.layer)))

  it.scoped("P1: what killed writers left is removed after a minute, and nothing else", () =>
    Effect.gen(function*() {
      const { at, directory, fs, store } = yield* home
      yield* store.save("openai", record(1))
      const leave = (name: string, age: number) =>
        Effect.gen(function*() {
          yield* fs.writeFileString(at(name), "{\"half\":")
          const then = Date.now() - age
          yield* fs.utimes(at(name), new Date(then), new Date(then))
        })
      const stays = [
        "openai.json.00000000000000aa.tmp",
        "openai.json.mine.tmp",
        "openai.json.00000000000000bb.tmp.txt",
        "anthropic.json.00000000000000cc.tmp",
        "notes.txt"
      ]
      yield* leave("openai.json.00000000000000dd.tmp", 3_600_000)
      yield* leave("openai.json.00000000000000aa.tmp", 1_000)
      yield* Effect.forEach(stays.slice(1), (name) => leave(name, 3_600_000))
      yield* (yield* PoolStore.makeFile({ directory })).save("openai", record(2))
      assert.deepStrictEqual((yield* fs.readDirectory(directory)).sort(), [...stays, "openai.json"].sort())
      // What was too young the first time is found later, by the same store.
      yield* leave("openai.json.00000000000000aa.tmp", 3_600_000)
      yield* store.save("openai", record(3))
      assert.isTrue(yield* fs.exists(at("openai.json.00000000000000aa.tmp")), "not with every record")
      yield* TestClock.adjust("1 minute")
      yield* store.save("openai", record(4))
      assert.isFalse(yield* fs.exists(at("openai.json.00000000000000aa.tmp")))
    }).pipe(Effect.provide(NodeContext.layer)))

  const failing: Readonly<
    Record<string, (fs: FileSystem.FileSystem, fails: () => boolean) => Partial<FileSystem.FileSystem>>
  > = {
    open: ({ open }, fails) => ({ open: (path, options) => fails() ? full("open") : open(path, options) }),
    rename: ({ rename }, fails) => ({ rename: (from, to) => fails() ? full("rename") : rename(from, to) })
  }
  for (const [method, spoil] of Object.entries(failing)) {
    it.scoped(`P2: when ${method} fails the old record stays, nothing is left, and it is tried again`, () =>
      Effect.gen(function*() {
        let fails = false
        const { directory, fs, store } = yield* home.pipe(spoiling((fs) => spoil(fs, () => fails)))
        yield* store.save("openai", record(1))
        fails = true
        const error = yield* Effect.flip(store.save("openai", record(2)))
        assert.deepStrictEqual([error.problem, error.detail], ["unreachable", `${method}: Unknown`])
        fails = false
        assert.strictEqual(yield* savedAt(store, "openai"), 1)
        assert.deepStrictEqual(yield* fs.readDirectory(directory), ["openai.json"])
        yield* store.save("openai", record(3))
        assert.strictEqual(yield* savedAt(store, "openai"), 3)
      }).pipe(Effect.provide(NodeContext.layer)))
  }

  it.scoped("P2: a disk that is full leaves no half file", () =>
    Effect.gen(function*() {
      const { directory, fs, store } = yield* home.pipe(spoiling((fs) => ({
        open: (path, options) =>
          Effect.map(fs.open(path, options), (file) =>
            new Proxy(file, {
              get: (file, member) =>
                member === "writeAll"
                  ? () => Effect.zipRight(file.writeAll(Uint8Array.of(123)), Effect.fail(full("writeAll")))
                  : Reflect.get(file, member)
            }))
      })))
      assert.strictEqual((yield* Effect.flip(store.save("openai", record(1)))).detail, "writeAll: Unknown")
      assert.deepStrictEqual(yield* fs.readDirectory(directory), [])
    }).pipe(Effect.provide(NodeContext.layer)))

  it.scoped("P1: two stores of one file, as in two processes: the last to save wins, and no file is torn", () =>
    Effect.gen(function*() {
      const { directory, fs, store } = yield* home
      const other = yield* PoolStore.makeFile({ directory })
      const many = (store: PoolStore.Service, from: number) =>
        Effect.forEach(Array.from({ length: 100 }, (_, i) => from + i), (n) => store.save("openai", record(n)))
      const reading = yield* Effect.fork(Effect.forever(Effect.zipRight(Effect.yieldNow(), store.load("openai"))))
      yield* Effect.zip(many(store, 0), many(other, 1_000), { concurrent: true })
      // Had a record been torn, reading would have failed.
      assert.isTrue(Option.isNone(yield* Fiber.poll(reading)))
      yield* Fiber.interrupt(reading)
      assert.include([99, 1_099], yield* savedAt(store, "openai"))
      assert.deepStrictEqual(yield* fs.readDirectory(directory), ["openai.json"])
    }).pipe(Effect.provide(NodeContext.layer)))

  it.effect("K3: a directory that is none is refused by name", () =>
    Effect.gen(function*() {
      const wrong: ReadonlyArray<unknown> = [{ directory: " " }, { directory: 5 }, { directory: "x", dir: "y" }, {}]
      for (const settings of wrong) {
        const error = yield* Effect.flip(PoolStore.makeFile(settings as PoolStore.FileSettings))
        assert.strictEqual(error._tag, "ConfigurationError")
        assert.match(error.field, /^dir(ectory)?$/)
      }
    }).pipe(Effect.provide(NodeContext.layer)))
})

describe("a pool over files", () => {
  const keys: ReadonlyArray<ApiKey.Input> = ["sk-one", "sk-two"]
  const limited = Fault.make("RateLimited", { wait: "1 minute" })
  /** As a process: a pool with a store of its own, and the problems it tells of. The file system takes real time. */
  const run = <A, E>(
    directory: string,
    use: (pool: KeyPool.Service, problems: ReadonlyArray<string>) => Effect.Effect<A, E>
  ) =>
    Effect.scoped(Effect.gen(function*() {
      const problems: Array<string> = []
      const telemetry = yield* Telemetry.Telemetry
      yield* Effect.forkScoped(Stream.runForEach(telemetry.stream, (event) =>
        Effect.sync(() =>
          event._tag === "store.degraded" && problems.push(event.problem)
        )))
      yield* Effect.yieldNow()
      const pool = yield* KeyPool.make({ keys, name: "openai" })
      yield* Effect.repeatN(Effect.yieldNow(), 5)
      return yield* use(pool, problems)
    })).pipe(
      Effect.provide(Layer.merge(Telemetry.layer, PoolStore.layerFile({ directory }))),
      Effect.provide(NodeContext.layer)
    )
  const cooling = (pool: KeyPool.Service) =>
    Effect.map(
      pool.snapshot,
      ({ keys }) => keys.filter(({ closed }) => closed?.gate === "cooldown").map(({ id }) => id)
    )

  it.scopedLive("P1: a restart keeps the cooldown, before the first pick", () =>
    Effect.gen(function*() {
      const { directory } = yield* home
      yield* run(directory, (pool) => pool.run((lease) => lease.key.id === one ? Effect.fail(limited) : Effect.void))
      yield* run(directory, (pool, problems) =>
        Effect.gen(function*() {
          assert.deepStrictEqual(yield* cooling(pool), [one])
          const used = new Set<string>()
          yield* Effect.repeatN(pool.run((lease) => Effect.sync(() => used.add(lease.key.id))), 5)
          assert.isFalse(used.has(one))
          assert.deepStrictEqual(problems, [])
        }))
    }).pipe(Effect.provide(NodeContext.layer)))

  it.scopedLive("P3: a pool that finds a damaged file starts fresh, says so once, keeps it beside, and saves again", () =>
    Effect.gen(function*() {
      const { at, directory, fs } = yield* home
      yield* fs.makeDirectory(directory, { recursive: true })
      yield* fs.writeFileString(at("openai.json"), "{\"version\":1,\"savedAt\":5,\"ke")
      yield* run(directory, (pool, problems) =>
        Effect.gen(function*() {
          yield* pool.run(() => Effect.void)
          assert.strictEqual(problems.length, 1)
          assert.include(problems[0] ?? "", "openai.json.unreadable")
        }))
      assert.include(yield* fs.readFileString(at("openai.json.unreadable")), "\"ke")
      yield* run(directory, (pool, problems) =>
        Effect.gen(function*() {
          assert.deepStrictEqual((yield* pool.snapshot).keys.map(({ successes }) => successes), [1, 0])
          assert.deepStrictEqual(problems, [])
        }))
    }).pipe(Effect.provide(NodeContext.layer)))
})
