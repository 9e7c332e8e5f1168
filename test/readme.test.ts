/** The README is true: its code compiles, its tables are complete, and what it points to exists. */
import { assert, beforeAll, describe, it } from "@effect/vitest"
import { existsSync, readFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import ts from "typescript"
import * as KeymeshError from "../src/KeymeshError.js"
import * as PoolSettings from "../src/PoolSettings.js"
import * as Strategy from "../src/Strategy.js"
import * as Telemetry from "../src/Telemetry.js"

const root = fileURLToPath(new URL("..", import.meta.url)).replace(/\/$/, "")
const read = (path: string): string => readFileSync(`${root}/${path}`, "utf8")
const readme = read("README.md")
const blocks = [...readme.matchAll(/^```ts\n([^]*?)^```$/gm)].map(([, code]) => code ?? "")

const examples = ts.sys.readDirectory(`${root}/src`, [".ts"]).flatMap((file) =>
  [...readFileSync(file, "utf8").matchAll(/ \* @example\n \* ```ts\n([^]*?) \* ```\n/g)].map(([, code]) =>
    (code ?? "").replaceAll(/^ \* ?/gm, "")
  )
)

/** What stands in a column of the table below a heading; the first is 0. */
const column = (heading: string, index: number): ReadonlyArray<string> => {
  const [, section = ""] = readme.split(`\n## ${heading}\n`)
  const [body = ""] = section.split("\n## ")
  return body.split("\n").filter((line) => line.startsWith("|")).map((line) => line.split("|")[index + 1]?.trim() ?? "")
}
const codes = (texts: ReadonlyArray<string>): ReadonlyArray<string> =>
  texts.flatMap((text) => [...text.matchAll(/`([^`]+)`/g)].map(([, code]) => code ?? ""))

describe("README", () => {
  /** Of all code at once: to read what it imports takes longer than to check it. */
  let said: ReadonlyArray<Problem> = []
  beforeAll(() => {
    said = problems(
      new Map([
        // The first one is wrong, so that a check that looks at nothing fails.
        ...named("README", [
          "import * as KeyPool from \"effect-keymesh/KeyPool\"\nKeyPool.make({ keys: [], kees: [] })",
          ...blocks
        ]),
        ...named("example", examples)
      ])
    )
  }, 120_000)

  it("its code compiles", () => {
    assert.isAtLeast(blocks.length, 10)
    const [problem, ...others] = said.filter(({ name }) => name.startsWith("README"))
    assert.include(problem?.text, "kees")
    assert.deepStrictEqual(others, [])
  })

  it("the examples in the sources compile", () => {
    assert.isAtLeast(examples.length, 20)
    // Unused names are what examples are made of.
    assert.deepStrictEqual(said.filter(({ name, unused }) => name.startsWith("example") && !unused), [])
  })

  it("names every event", () => {
    const tags = Telemetry.Event.members.map((member) => member.fields._tag.ast).map((ast) =>
      ast._tag === "PropertySignatureTransformation" ? ast.to.type : ast.type
    ).map((type) => type._tag === "Literal" ? String(type.literal) : "")
    assert.deepStrictEqual([...codes(column("Telemetry", 0))].sort(), tags.sort())
  })

  it("names every setting", () => {
    const named = codes(column("Defaults", 0)).map((name) => name.split(".")[0])
    assert.deepStrictEqual([...new Set(named)].sort(), [...PoolSettings.names].sort())
  })

  it("names every built-in strategy", () => {
    const named = codes(column("Strategies", 1))
    assert.deepStrictEqual([...named].sort(), [...Strategy.Name.literals].sort())
  })

  it("names errors that exist", () => {
    const named = codes(column("Errors", 0))
    assert.strictEqual(named.length, 7)
    for (const name of named) assert.property(KeymeshError, name)
  })

  it("names scripts, files and versions that exist", () => {
    const manifest: {
      readonly scripts: Readonly<Record<string, string>>
      readonly peerDependencies: Readonly<Record<string, string>>
      readonly devDependencies: Readonly<Record<string, string>>
    } = JSON.parse(read("package.json"))
    const scripts = [...readme.matchAll(/npm run ([\w:]+)/g)].map(([, name]) => name ?? "")
    assert.isAbove(scripts.length, 4)
    for (const script of [...scripts, "start", "test"]) assert.property(manifest.scripts, script)
    for (const text of [readme, read("docs/architecture.md"), read("CHANGELOG.md")]) {
      const links = [...text.matchAll(/\]\((?!https?:)([^)#]+)\)/g)].map(([, path]) => path ?? "")
      for (const link of links) assert.isTrue(existsSync(`${root}/${link}`), link)
    }
    assert.include(readme, `\`${manifest.peerDependencies["openai"]}\``)
    assert.include(readme, `tested with 5.0.0 and ${manifest.devDependencies["openai"]}`)
  })

  it("the architecture names every room", () => {
    const text = read("docs/architecture.md")
    const files = ts.sys.readDirectory(`${root}/src`, [".ts"]).map((file) => file.replace(/^.*\/src\//, ""))
    for (const file of files) {
      const name = file.replace(/\.ts$/, "").split("/").at(-1) ?? ""
      if (name !== "index") assert.match(text, new RegExp(`^\\|.*\\b${name}\``, "m"), name)
    }
  })
})

interface Problem {
  readonly name: string
  readonly line: number
  readonly text: string
  readonly unused: boolean
}

/** What the compiler says of modules in the root of the repository, by name; they exist in memory only. */
const problems = (modules: ReadonlyMap<string, string>): ReadonlyArray<Problem> => {
  const { config } = ts.readConfigFile(`${root}/tsconfig.json`, ts.sys.readFile)
  const { options } = ts.parseJsonConfigFileContent({ ...config, include: [], files: [] }, ts.sys, root)
  const files = new Map([...modules].map(([name, code]) => [`${root}/${name}.ts`, code]))
  const host = ts.createCompilerHost({ ...options, noEmit: true })
  const { fileExists, getSourceFile, readFile } = host
  host.fileExists = (name) => files.has(name) || fileExists(name)
  host.readFile = (name) => files.get(name) ?? readFile(name)
  host.getSourceFile = (name, languageVersion, ...rest) => {
    const code = files.get(name)
    return code === undefined
      ? getSourceFile(name, languageVersion, ...rest)
      : ts.createSourceFile(name, code, languageVersion, true)
  }
  const program = ts.createProgram([...files.keys()], { ...options, noEmit: true, declaration: false }, host)
  // Only the modules: the sources have a check of their own.
  return [...files.keys()].flatMap((path) => {
    const file = program.getSourceFile(path)
    return [...program.getSyntacticDiagnostics(file), ...program.getSemanticDiagnostics(file)].map((problem) => ({
      name: path.slice(root.length + 1),
      line: (file?.getLineAndCharacterOfPosition(problem.start ?? 0).line ?? 0) + 1,
      text: ts.flattenDiagnosticMessageText(problem.messageText, "\n"),
      unused: problem.reportsUnnecessary !== undefined
    }))
  })
}

const named = (what: string, codes: ReadonlyArray<string>) =>
  codes.map((code, index) => [`${what}.block-${index}`, code] as const)
