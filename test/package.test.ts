/** The package as it is published: every subpath can be imported from the packed files alone. */
import { assert, describe, it } from "@effect/vitest"
import { execFileSync } from "node:child_process"
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, symlinkSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"

const root = fileURLToPath(new URL("..", import.meta.url))
const { exports, name }: { readonly name: string; readonly exports: Readonly<Record<string, unknown>> } = JSON.parse(
  readFileSync(join(root, "package.json"), "utf8")
)

describe("the package", () => {
  it("every subpath is there when it is packed", () => {
    const home = mkdtempSync(join(tmpdir(), "effect-keymesh-"))
    try {
      const npm = (...args: ReadonlyArray<string>) =>
        execFileSync("npm", [...args], { cwd: root, encoding: "utf8", shell: process.platform === "win32" })
      npm("run", "--silent", "build")
      npm("pack", "--silent", "--ignore-scripts", "--pack-destination", home)
      const [tarball] = readdirSync(home)
      execFileSync("tar", ["-xzf", tarball ?? "", "-C", home], { cwd: home })
      // Beside what it depends on, as an installer would put it.
      const modules = join(home, "node_modules")
      mkdirSync(modules)
      for (const entry of readdirSync(join(root, "node_modules"))) {
        if (!entry.startsWith(".") && entry !== name) {
          symlinkSync(join(root, "node_modules", entry), join(modules, entry), "junction")
        }
      }
      renameSync(join(home, "package"), join(modules, name))
      const subpaths = Object.keys(exports).filter((subpath) => subpath !== "./package.json")
      const specifiers = subpaths.map((subpath) => subpath.replace(/^\./, name))
      assert.isAbove(specifiers.length, 15)
      const script = `
        for (const specifier of ${JSON.stringify(specifiers)}) {
          const module = await import(specifier)
          console.log(specifier, Object.keys(module).length)
        }`
      const said = execFileSync(process.execPath, ["--input-type=module", "--eval", script], {
        cwd: home,
        encoding: "utf8"
      })
      const lines = said.trim().split("\n")
      assert.deepStrictEqual(lines.map((line) => line.split(" ")[0]), specifiers)
      // `Provider` is types only.
      const empty = lines.filter((line) => line.endsWith(" 0")).map((line) => line.split(" ")[0])
      assert.deepStrictEqual(empty, [`${name}/Provider`])
    } finally {
      rmSync(home, { recursive: true, force: true })
    }
  }, 120_000)

  it("nothing of Node.js is imported by the library", () => {
    const files = readdirSync(join(root, "src"), { recursive: true, encoding: "utf8" }).filter((file) =>
      file.endsWith(".ts")
    )
    assert.isAbove(files.length, 30)
    for (const file of files) {
      assert.notMatch(readFileSync(join(root, "src", file), "utf8"), /from "node:|require\(|import\("node:/, file)
    }
  })
})
