/**
 * Files that are replaced as a whole and survive the loss of power: written beside, brought to the disk, renamed over.
 * Whoever reads one finds it as it was before or as it is after, never half of it, whenever a writer was killed.
 *
 * @since 0.1.0
 */
import { sha256 } from "@noble/hashes/sha2.js"
import { bytesToHex, utf8ToBytes } from "@noble/hashes/utils.js"
import * as Effect from "effect/Effect"
import * as MutableRef from "effect/MutableRef"
import * as Option from "effect/Option"
import * as Random from "effect/Random"
import * as MonotonicTime from "./MonotonicTime.js"

/**
 * What is needed of a file system.
 *
 * @since 0.1.0
 * @category models
 */
export interface Files<E> {
  readonly join: (directory: string, name: string) => string
  /** The bytes of a file; none when there is no such file. */
  readonly read: (path: string) => Effect.Effect<Option.Option<Uint8Array>, E>
  /** Makes a new file for its owner alone, and ends when its bytes are on the disk; nothing of it stays when it fails. */
  readonly create: (path: string, bytes: Uint8Array) => Effect.Effect<void, E>
  readonly rename: (from: string, to: string) => Effect.Effect<void, E>
  readonly remove: (path: string) => Effect.Effect<void, E>
  readonly list: (directory: string) => Effect.Effect<ReadonlyArray<string>, E>
  /** When a file was last written, by the clock of the file system, in milliseconds. */
  readonly writtenAt: (path: string) => Effect.Effect<number, E>
  /** Makes a directory for its owner alone, and those above it; one that is there stays as it is. */
  readonly makeDirectory: (path: string) => Effect.Effect<void, E>
  /** Brings to the disk which files a directory has. */
  readonly syncDirectory: (path: string) => Effect.Effect<void, E>
}

/**
 * The files of one directory.
 *
 * @since 0.1.0
 * @category models
 */
export interface Directory<E> {
  /** The bytes of a file; none when there is no such file. */
  readonly read: (name: string) => Effect.Effect<Option.Option<Uint8Array>, E>
  /** Replaces a file. Those who write take turns, and what has begun is not interrupted: the last to come is the last. */
  readonly write: (name: string, bytes: Uint8Array) => Effect.Effect<void, E>
  /** Keeps what cannot be read in a file beside it, in place of an earlier one, and gives that one's name. */
  readonly keepAside: (name: string, bytes: Uint8Array) => Effect.Effect<string>
}

/**
 * The files of a directory, which is made when something is written.
 *
 * @since 0.1.0
 * @category constructors
 */
export const inDirectory = <E>(files: Files<E>, directory: string): Effect.Effect<Directory<E>> =>
  Effect.map(Effect.makeSemaphore(1), (turns) => {
    const sweptAt = MutableRef.make<ReadonlyMap<string, number>>(new Map())
    /** Once when a file is first written, and then each minute that sees it written. */
    const sweepNow = (name: string) =>
      Effect.flatMap(MonotonicTime.now, (now) => {
        const swept = MutableRef.get(sweptAt)
        if (now < (swept.get(name) ?? -Infinity) + sweepMillis) return Effect.void
        MutableRef.set(sweptAt, new Map(swept).set(name, now))
        return Effect.ignore(sweep(files, directory, name))
      })
    const write = (name: string, bytes: Uint8Array) =>
      turns.withPermits(1)(
        Effect.uninterruptible(Effect.zipRight(replace(files, directory, name, bytes), sweepNow(name)))
      )
    return {
      read: (name) => files.read(files.join(directory, name)),
      write,
      keepAside: (name, bytes) => {
        const aside = `${name}.unreadable`
        return Effect.as(Effect.ignore(write(aside, bytes)), aside)
      }
    }
  })

const replace = <E>(files: Files<E>, directory: string, name: string, bytes: Uint8Array): Effect.Effect<void, E> =>
  Effect.gen(function*() {
    yield* files.makeDirectory(directory)
    const written = yield* Effect.retry(createBeside(files, directory, name, bytes), { times: 2 })
    yield* files.rename(written, files.join(directory, name)).pipe(
      Effect.onError(() => Effect.ignore(files.remove(written)))
    )
    // Not every platform can; then the file system does it in its own time.
    yield* Effect.ignore(files.syncDirectory(directory))
  })

/** Under a name that no other writer has: neither of this process nor of another. */
const createBeside = <E>(files: Files<E>, directory: string, name: string, bytes: Uint8Array) =>
  Effect.gen(function*() {
    const part = Effect.map(Random.nextIntBetween(0, 2 ** 32), (n) => n.toString(16).padStart(8, "0"))
    const path = files.join(directory, `${name}.${yield* part}${yield* part}.tmp`)
    yield* files.create(path, bytes)
    return path
  })

/**
 * Removes what killed writers of a file left beside it: what is a minute older than the file itself, by the clock of the
 * file system. Anything younger may be another writer's work.
 */
const sweep = <E>(files: Files<E>, directory: string, name: string): Effect.Effect<void, E> =>
  Effect.gen(function*() {
    const found = yield* files.list(directory)
    const leftovers = found.filter((other) => other.startsWith(`${name}.`) && isTemporary(other.slice(name.length)))
    if (leftovers.length === 0) return
    const now = yield* files.writtenAt(files.join(directory, name))
    for (const leftover of leftovers) {
      const path = files.join(directory, leftover)
      const at = yield* Effect.option(files.writtenAt(path))
      if (Option.isSome(at) && at.value < now - leftoverMillis) yield* Effect.ignore(files.remove(path))
    }
  })

const isTemporary = (ending: string): boolean => /^\.[0-9a-f]{16}\.tmp$/.test(ending)
const leftoverMillis = 60_000
const sweepMillis = 60_000

/**
 * A name as part of a file name: different ones for different names, also where the case of letters makes no difference,
 * and none that leads anywhere else. Letters in lower case, digits, `-` and `_` stay as they are.
 *
 * @since 0.1.0
 * @category naming
 */
export const nameOf = (text: string): string => {
  const plain = text.replaceAll(/[^a-z0-9_-]/g, escape)
  const safe = text === "" ? "%" : isDevice.test(plain) ? plain.replace(/^./, escape) : plain
  return safe.length <= longestName
    ? safe
    : `${safe.slice(0, longestName - 33)}~${bytesToHex(sha256(utf8ToBytes(safe))).slice(0, 32)}`
}

const escape = (unit: string): string => `%${unit.charCodeAt(0).toString(16)}-`
/** Names that some platforms keep for devices, whatever comes after a dot. */
const isDevice = /^(con|prn|aux|nul|com\d|lpt\d)$/
/** With all that is added to it: encrypted file systems allow no more than 143 bytes. */
const longestName = 100
