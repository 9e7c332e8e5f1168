/**
 * A value that follows asynchronous code, where the platform has such a thing (Node.js, Deno, Bun); elsewhere it is
 * simply absent.
 *
 * @since 0.1.0
 */

/**
 * @since 0.1.0
 * @category models
 */
export interface AsyncContext<A> {
  /** Runs `f` with the value; what it starts inherits it. */
  readonly run: <B>(value: A, f: () => B) => B
  /** The value at this point, if there is one. */
  readonly get: () => A | undefined
  /** Runs `f` without the value; nor has it what `f` starts. */
  readonly outside: <B>(f: () => B) => B
}

/**
 * @since 0.1.0
 * @category constructors
 */
export const make = <A>(): AsyncContext<A> => {
  const storage = storageHere()
  if (storage === undefined) return { run: (_, f) => f(), get: () => undefined, outside: (f) => f() }
  const own = Symbol()
  const here = (): Values => storage.getStore() ?? none
  return {
    run: (value, f) => storage.run(new Map(here()).set(own, value), f),
    // Only `run` sets what stands under this symbol.
    get: () => here().get(own) as A | undefined,
    outside: (f) => {
      const values = here()
      return values.has(own) ? storage.run(new Map([...values].filter(([key]) => key !== own)), f) : f()
    }
  }
}

/** The values of all contexts, each under its own symbol. */
type Values = ReadonlyMap<symbol, unknown>

const none: Values = new Map()

/**
 * The one storage that all contexts share: before Node.js 24, each storage that was ever used makes every promise of the
 * process dearer, for good, and contexts come with pools.
 */
const storageHere = (): Storage<Values> | undefined => {
  const Storage = platform.process?.getBuiltinModule?.("node:async_hooks")?.AsyncLocalStorage
  if (Storage === undefined) return undefined
  const storage = storages.get(Storage) ?? new Storage<Values>()
  storages.set(Storage, storage)
  return storage
}

const storages = new WeakMap<object, Storage<Values>>()

/** Asked for at run time, so that nothing of Node.js is imported where it is not there. */
const platform = globalThis as {
  readonly process?: {
    readonly getBuiltinModule?: (id: "node:async_hooks") =>
      | { readonly AsyncLocalStorage: new<A>() => Storage<A> }
      | undefined
  }
}

interface Storage<A> {
  run<B>(value: A, f: () => B): B
  getStore(): A | undefined
}
