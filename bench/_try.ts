import * as Effect from "effect/Effect"
import * as KeyPool from "../src/KeyPool.js"
import * as Telemetry from "../src/Telemetry.js"
import * as Fault from "../src/Fault.js"
const program = Effect.gen(function*() {
  const pool = yield* KeyPool.make({ keys: ["a1","b2","c3"] })
  yield* Effect.void
  const r = yield* pool.run((l) => l.attempt === 1 ? Effect.fail(Fault.make("RateLimited", {wait: "2 seconds"})) : Effect.succeed(l.key.label))
  console.log(r)
  const sn = yield* pool.snapshot
  console.log(JSON.stringify(sn.keys.map(k=>[k.id,k.closed,k.inFlight,k.total])))
  const one = yield* KeyPool.make({ keys: ["a1"], budget: "1 second" })
  const e = yield* Effect.either(one.run(() => Effect.fail(Fault.make("RateLimited", {wait: "5 seconds"}))))
  console.log(String(e._tag==="Left" && (e.left as any).message))
  const N = 200000
  const use = () => Effect.succeed(1)
  for (let k=0;k<3;k++) for (const p of [pool]) {
    const t=performance.now(); for (let i=0;i<N;i++) yield* use(); const b=performance.now()-t
    const t2=performance.now(); for (let i=0;i<N;i++) yield* p.run(use); const d=performance.now()-t2
    console.log("raw",(b/N*1000).toFixed(2),"pooled",(d/N*1000).toFixed(2))
  }
  for (const n of [10,100,1000,10000]) {
    const p = yield* KeyPool.make({ keys: Array.from({length:n},(_, i)=>"k"+i) })
    for (let i=0;i<20000;i++) yield* p.run(use)
    const t2=performance.now(); for (let i=0;i<N;i++) yield* p.run(use); const d=performance.now()-t2
    console.log(n,"pooled",(d/N*1000).toFixed(2))
  }
}).pipe(Effect.scoped, Effect.provide(KeyPool.layerDefaults))
await Effect.runPromise(program)
