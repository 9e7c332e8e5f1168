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
  const Storage = platform.process?.getBuiltinModule?.("node:async_hooks")?.AsyncLocalStorage
  if (Storage === undefined) return { run: (_, f) => f(), get: () => undefined, outside: (f) => f() }
  const storage = new Storage<A>()
  return {
    run: (value, f) => storage.run(value, f),
    get: () => storage.getStore(),
    outside: (f) => storage.exit(f)
  }
}

/** Asked for at run time, so that nothing of Node.js is imported where it is not there. */
const platform = globalThis as {
  readonly process?: {
    readonly getBuiltinModule?: (id: "node:async_hooks") =>
      | {
        readonly AsyncLocalStorage: new<A>() => {
          run<B>(value: A, f: () => B): B
          getStore(): A | undefined
          exit<B>(f: () => B): B
        }
      }
      | undefined
  }
}
