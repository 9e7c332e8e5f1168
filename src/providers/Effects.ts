/**
 * The deep Effect view of an SDK: its client's methods at the same paths and with the same arguments, as `Effect`s and
 * `Stream`s instead of promises.
 *
 * @since 0.1.0
 */
import type * as Effect from "effect/Effect"
import * as Predicate from "effect/Predicate"
import type * as Stream from "effect/Stream"
import type { CallError } from "../KeymeshError.js"

/**
 * The methods of a client, as far as their types can be read off it without loss.
 *
 * What a call gives is told by its name and its arguments, here and at run time alike: a `Stream` from a method whose
 * name begins with `list` or ends with `Stream`, from `search`, `results` and `stream`, and where the first object among
 * the arguments says `stream: true`; else an `Effect`. A list is the stream of its items, over all pages.
 *
 * Left out, and within reach of `use` and `stream` all the same: methods with type parameters of their own, which are
 * lost when a type is read; those that say `any` or `unknown`; those that give no promise, such as the SDKs' `.stream()`
 * helpers; overloads that leave open what comes (`stream: boolean`); lists that give nothing to iterate, and what is to
 * be iterated under other names.
 *
 * @since 0.1.0
 * @category models
 */
export type Effects<Client> = {
  readonly [Name in keyof Client as [Member<Client[Name], Name>] extends [never] ? never : Name]: Member<
    Client[Name],
    Name
  >
}

/**
 * The ways to call a client that the view is made of.
 *
 * @since 0.1.0
 * @category models
 */
export interface Calls<Client> {
  /** The real SDK client, pooled underneath: a drop-in replacement. */
  readonly client: Client
  /**
   * Calls the client from Effect: interruption and settings of the effect reach the requests, and failures are typed.
   * For anything that is iterated (streams, pages), use `stream`.
   */
  readonly use: <A>(f: (client: Client, signal: AbortSignal) => PromiseLike<A> | A) => Effect.Effect<A, CallError>
  /** As `use`, for streams of the API, pages, and whatever else of the SDK can be iterated. */
  readonly stream: <A>(
    f: (client: Client, signal: AbortSignal) => PromiseLike<AsyncIterable<A>> | AsyncIterable<A>
  ) => Stream.Stream<A, CallError>
}

/**
 * One call of a method: the object that has it, how many parameters it declares, and what it is called with.
 *
 * @since 0.1.0
 * @category models
 */
export interface Call {
  readonly owner: object
  readonly declared: number
  readonly args: ReadonlyArray<unknown>
}

/**
 * Puts a signal where the method looks for one: gives the arguments to call it with.
 *
 * @since 0.1.0
 * @category models
 */
export type PassSignal = (call: Call, signal: AbortSignal) => ReadonlyArray<unknown>

/**
 * Makes the view. Methods are looked up when they are run, on the client's own objects; what the client does not have,
 * the view has not either.
 *
 * @since 0.1.0
 * @category constructors
 */
export const make = <Client extends object>(calls: Calls<Client>, passSignal: PassSignal): Effects<Client> => {
  const views = new WeakMap<object, object>()
  const methodOf = (owner: object, name: string) => (...args: ReadonlyArray<unknown>) => {
    const invoke = (signal: AbortSignal): unknown => {
      const method: unknown = Reflect.get(owner, name)
      if (!Predicate.isFunction(method)) throw new TypeError(`${name} is not a function`)
      return Reflect.apply(method, owner, passSignal({ owner, declared: method.length, args }, signal))
    }
    return iterates(name, args)
      ? calls.stream(async (_, signal) => iterable(await invoke(signal), name))
      : calls.use((_, signal) => invoke(signal))
  }
  const viewOf = (owner: object): object => {
    const known = views.get(owner)
    if (known !== undefined) return known
    const methods = new Map<string, unknown>()
    const view = new Proxy(Object.freeze({}), {
      get: (target, name) => {
        // Whoever asks what kind of thing this is (printing, JSON) finds a plain, empty object.
        if (typeof name === "symbol" || name in target) return Reflect.get(target, name)
        const member: unknown = Reflect.get(owner, name)
        if (!Predicate.isFunction(member)) return Predicate.isObject(member) ? viewOf(member) : undefined
        const method = methods.get(name) ?? methodOf(owner, name)
        methods.set(name, method)
        return method
      }
    })
    views.set(owner, view)
    return view
  }
  // The type is read off `Client` member by member, as the view is: methods by `Method`, other objects once more.
  return viewOf(calls.client) as Effects<Client>
}

/**
 * For SDKs whose methods take `options` with a `signal` last. A signal that is given there stays.
 *
 * @since 0.1.0
 * @category combinators
 */
export const inLastOptions: PassSignal = ({ args, declared }, signal) => {
  // Declared are only the parameters before the first with a default. That one, if there is any, is the object before
  // the options, and those before it are texts; else the options are the last of the declared ones.
  const at = declared === 0 || typeof args[declared - 1] === "string" ? declared + 1 : declared - 1
  const options = args[at] ?? {}
  if (!isPlain(options)) return args
  return Array.from(
    { length: Math.max(args.length, at + 1) },
    (_, index) => index === at ? { signal, ...options } : args[index]
  )
}

/**
 * Whether something is an object as one writes it down, of which nothing is lost when its fields are copied.
 *
 * @since 0.1.0
 * @category guards
 */
export const isPlain = (value: unknown): value is Readonly<Record<string, unknown>> => {
  if (!Predicate.isRecord(value)) return false
  const above: unknown = Object.getPrototypeOf(value)
  // Also that of another realm.
  return above === null || Object.getPrototypeOf(above) === null
}

// ------------------------------------------------------------------------------------------- what a call gives, by name

/** The names of methods that give a stream whatever they are called with. */
type Iterated = `list${string}` | `${string}Stream` | "search" | "results" | "stream"

const iterated = /^list|Stream$|^(?:search|results|stream)$/

type Iterates<Name, Args extends ReadonlyArray<unknown>> = Name extends Iterated ? true
  : [Extract<Args[number], { readonly stream: true }>] extends [never] ? false
  : true

const iterates = (name: string, args: ReadonlyArray<unknown>): boolean => {
  const parameters = args.find(Predicate.isRecord)
  return iterated.test(name) || parameters?.["stream"] === true
}

const iterable = (value: unknown, name: string): AsyncIterable<unknown> => {
  if (Predicate.isObject(value) && Symbol.asyncIterator in value) return value as AsyncIterable<unknown>
  throw new TypeError(`${name} gave nothing to iterate`)
}

// --------------------------------------------------------------------------------------------------- types, read off

/** A member of a client as the view has it; `never` if it has not. */
type Member<Value, Name> = [Value] extends [(...args: never) => unknown] ? Method<Value, Name>
  : [Value] extends [ReadonlyArray<unknown>] ? never
  // Settings that may be absent are none of the client's parts.
  : [Value] extends [object] ? [Callable<Value>] extends [never] ? never : Effects<Value>
  : never

/** What makes an object a part of the client. It is not looked at deeply: the compiler reads what a program names. */
type Callable<Value> = {
  readonly [Name in keyof Value]: Value[Name] extends (...args: never) => infer Result
    ? Result extends PromiseLike<unknown> ? Name : never
    : Value[Name] extends ReadonlyArray<unknown> ? never
    : Value[Name] extends object ? Name
    : never
}[keyof Value]

/**
 * The overloads of a method, up to seven. Where there are fewer, the first one is read again, which changes nothing. The
 * check is whether those that were read make up the method: they do not if type parameters were lost.
 */
type Method<F, Name> = F extends {
  (...args: infer A1): infer R1
  (...args: infer A2): infer R2
  (...args: infer A3): infer R3
  (...args: infer A4): infer R4
  (...args: infer A5): infer R5
  (...args: infer A6): infer R6
  (...args: infer A7): infer R7
} ? [
    & ((...args: A1) => R1)
    & ((...args: A2) => R2)
    & ((...args: A3) => R3)
    & ((...args: A4) => R4)
    & ((...args: A5) => R5)
    & ((...args: A6) => R6)
    & ((...args: A7) => R7)
  ] extends [F] ? Kept<
      & Overload<A1, R1, Name>
      & Overload<A2, R2, Name>
      & Overload<A3, R3, Name>
      & Overload<A4, R4, Name>
      & Overload<A5, R5, Name>
      & Overload<A6, R6, Name>
      & Overload<A7, R7, Name>
    >
  : never
  : never

type Kept<Overloads> = unknown extends Overloads ? never : Overloads

/** One overload as the view has it; `unknown`, which adds nothing to the others, if it has not. */
type Overload<Args extends ReadonlyArray<unknown>, Result, Name> = [Result] extends [PromiseLike<infer A>]
  ? Iterates<Name, Args> extends true
    ? [A] extends [AsyncIterable<infer Item>]
      ? unknown extends Item ? unknown : (...args: Args) => Stream.Stream<Item, CallError>
    : unknown
  : unknown extends A ? unknown
  : [Extract<A, AsyncIterable<unknown>>] extends [never] ? (...args: Args) => Effect.Effect<A, CallError>
  : unknown
  : unknown
