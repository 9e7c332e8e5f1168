import { assert, describe, it } from "@effect/vitest"
import * as FastCheck from "effect/FastCheck"
import { inspect } from "node:util"
import * as Scrub from "../../src/http/Scrub.js"
import { emptyTrail, PoolClosed } from "../../src/KeymeshError.js"

const secret = "to/ken+odd=0123 456"

const texts = FastCheck.array(
  FastCheck.oneof(
    FastCheck.constantFrom(...Scrub.forms(secret), secret.slice(0, 5), "?key=", "ü", "—", "𝄞"),
    FastCheck.string({ maxLength: 4 })
  ),
  { maxLength: 12 }
).map((parts) => parts.join(""))

describe("forms", () => {
  it("plain, as in a path, as in a form, as in JSON, and as on a page", () => {
    assert.deepStrictEqual(Scrub.forms(secret), [
      secret,
      "to%2Fken%2Bodd%3D0123%20456",
      "to%2fken%2bodd%3d0123%20456",
      "to%2Fken%2Bodd%3D0123+456",
      "to%2fken%2bodd%3d0123+456",
      "to\\/ken+odd=0123 456"
    ])
    assert.includeMembers([...Scrub.forms("a&\"/b")], ["a&\\\"/b", "a&\\\"\\/b", "a&amp;&quot;/b"])
    assert.deepStrictEqual(Scrub.forms("sk-plain"), ["sk-plain"])
  })
})

describe("text and bytes", () => {
  it.prop("K1: no form of the secret is left, and nothing else is touched", [texts], ([text]) => {
    const clean = Scrub.text(secret)(text)
    for (const form of Scrub.forms(secret)) assert.notInclude(clean, form)
    if (!Scrub.forms(secret).some((form) => text.includes(form))) assert.strictEqual(clean, text)
  })

  it.prop(
    "bytes are scrubbed as their text is, and are the same ones where there is nothing to do",
    [texts],
    ([text]) => {
      const bytes = new TextEncoder().encode(text)
      const clean = Scrub.bytes(secret)(bytes)
      assert.strictEqual(new TextDecoder().decode(clean), Scrub.text(secret)(text))
      if (!Scrub.forms(secret).some((form) => text.includes(form))) assert.strictEqual(clean, bytes)
    }
  )

  it("bytes that are no text stay as they are around it", () => {
    const before = Uint8Array.of(0xff, 0xc3)
    const clean = Scrub.bytes("sk-1")(Uint8Array.of(...before, ...new TextEncoder().encode("sk-1"), 0xa9))
    assert.deepStrictEqual([...clean], [...before, ...new TextEncoder().encode(Scrub.placeholder), 0xa9])
  })
})

describe("headers", () => {
  const echoing = new Headers({
    "x-seen": `Bearer ${secret}`,
    location: "/?key=to%2Fken%2Bodd%3D0123+456&a=1",
    etag: "1"
  })

  it("K1: headers of a rewritten body: clean, and without what describes the old body", () => {
    const headers = new Headers(echoing)
    headers.set("content-length", "7")
    headers.set("content-encoding", "gzip")
    headers.set("x-sk-9", "name")
    assert.deepStrictEqual(Object.fromEntries(Scrub.headers(secret)(headers)), {
      "x-seen": "Bearer [redacted]",
      location: "/?key=[redacted]&a=1",
      etag: "1",
      "x-sk-9": "name"
    })
    assert.notProperty(Object.fromEntries(Scrub.headers("sk-9")(headers)), "x-sk-9")
  })

  it("K1: headers of a body that stays: clean values, all names, several cookies", () => {
    const headers = new Headers(echoing)
    headers.set("content-length", "7")
    headers.append("set-cookie", "a=1")
    headers.append("set-cookie", "b=2")
    const clean = Scrub.values(secret)(headers)
    assert.strictEqual(clean.get("x-seen"), "Bearer [redacted]")
    assert.strictEqual(clean.get("content-length"), "7")
    assert.deepStrictEqual(clean.getSetCookie(), ["a=1", "b=2"])
    assert.strictEqual(headers.get("x-seen"), `Bearer ${secret}`)
    const harmless = new Headers({ etag: "1" })
    assert.strictEqual(Scrub.values(secret)(harmless), harmless)
  })
})

describe("error", () => {
  const scrub = Scrub.error(secret)
  const all = (value: unknown) => inspect(value, { depth: 20, showHidden: true })

  it("K1: an error is copied, with its kind, name, codes and causes, but without the secret", () => {
    const cause = Object.assign(new Error(`connect ${secret}`), {
      code: "ECONNREFUSED",
      errno: -111,
      syscall: "connect"
    })
    const error = Object.assign(new TypeError(`fetch failed ${secret}`, { cause }), {
      request: { headers: { authorization: secret } },
      [secret]: 1
    })
    const clean = scrub(error)
    assert.instanceOf(clean, TypeError)
    assert.deepInclude(clean, { name: "TypeError", message: "fetch failed [redacted]" })
    assert.deepInclude(Object(clean).cause, { code: "ECONNREFUSED", errno: -111, syscall: "connect" })
    assert.notInclude(all(clean), secret)
    assert.include(error.message, secret)
  })

  it("a DOMException stays one, and can be asked for its name", () => {
    const clean = scrub(new DOMException(`left ${secret}`, "AbortError"))
    assert.instanceOf(clean, DOMException)
    assert.deepInclude(clean, { name: "AbortError", message: "left [redacted]", code: 20 })
    assert.notInclude(all(clean), secret)
  })

  it("errors at once, errors in a circle, and errors that are none", () => {
    const several = scrub(new AggregateError([new Error(secret), secret, { secret }], secret))
    assert.strictEqual(Object(several).errors.length, 3)
    assert.notInclude(all(several), secret)
    const circle = new Error(secret)
    circle.cause = circle
    assert.notInclude(all(scrub(circle)), secret)
    assert.strictEqual(scrub(`no ${secret}`), "no [redacted]")
    assert.strictEqual(scrub({ secret }), undefined)
    assert.strictEqual(scrub(7), 7)
    assert.strictEqual(scrub(undefined), undefined)
  })

  it("the pool's own errors pass as they are", () => {
    const closed = new PoolClosed({ pool: "p", trail: emptyTrail })
    assert.strictEqual(scrub(closed), closed)
  })
})
