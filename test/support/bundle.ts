/** A program of tests as one file with all that it imports: many processes of it start in a part of the time. */
import { buildSync } from "esbuild"
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"

export interface Bundle {
  readonly file: string
  readonly remove: () => void
}

/** Makes it of a file in this folder. */
export const make = (name: string): Bundle => {
  const folder = mkdtempSync(join(tmpdir(), "keymesh-bundle-"))
  const file = join(folder, `${name}.cjs`)
  buildSync({
    entryPoints: [fileURLToPath(new URL(`${name}.ts`, import.meta.url))],
    outfile: file,
    bundle: true,
    platform: "node",
    format: "cjs",
    // Less to read at each start; names stay, for whoever reads an error.
    minifySyntax: true,
    minifyWhitespace: true,
    logLevel: "error"
  })
  return { file, remove: () => rmSync(folder, { recursive: true, force: true }) }
}
