/**
 * What Redis does in one step each. All keys of a pool are in one slot, every script names the keys it touches, and all
 * time is that of Redis.
 *
 * What is kept of a pool:
 *
 * - `meta`: `epoch` (larger whenever Redis had lost it), `seq` (numbers the news), where the last sweep stopped;
 * - `members`: each process, by when it was last heard of;
 * - `cooldowns`, `breakers`: by subject and by key id, with instants of Redis;
 * - `held`: the tickets (`t|`), what they hold of limits (`h|`) and of concurrency (`c|`) in sum, of what somebody was
 *   refused for want (`w|`), and claims that were given up before they came (`x|`). They are one key, so that no part of it can be
 *   lost alone;
 * - `log:…`, one per limit: what was answered and still counts, in order of time;
 * - `probe:…`, one per probe: the ticket that has it.
 *
 * @since 0.1.0
 */
import * as RedisLink from "./RedisLink.js"

const common = `
-- In milliseconds, to the microsecond: a window must not be a part of one too short.
local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
end
local function text(number) return string.format('%.0f', number) end
-- A key lives at least so long; never shorter than it would have.
local function keep(key, millis)
  if redis.call('PTTL', key) < millis then redis.call('PEXPIRE', key, text(millis)) end
end
-- Whether a member was not heard of since: what it held may have been taken back.
local function isGone(members, member, since)
  local score = redis.call('ZSCORE', members, member)
  return not score or tonumber(score) <= since
end
local function publish(meta, channel, from, news)
  if #news == 0 then return end
  local seq = redis.call('HINCRBY', meta, 'seq', 1)
  redis.call('PUBLISH', channel, cjson.encode({ e = redis.call('HGET', meta, 'epoch'), s = seq, f = from, n = news }))
end
`

/** What was answered: a flat list of (since, at, amount). An entry stands for all of about one moment, by the last of it. */
const logs = `
local function load(key, now)
  local raw = redis.call('GET', key)
  local log = raw and cmsgpack.unpack(raw) or {}
  -- A clock that was set back must not make anything count longer than a window from now.
  local last = #log - 1
  if last > 0 and log[last] > now then
    for i = 1, #log, 3 do
      if log[i] > now then log[i] = now end
      if log[i + 1] > now then log[i + 1] = now end
    end
  end
  return log
end
local function used(log, past)
  local sum = 0
  for i = 1, #log, 3 do
    if log[i + 1] > past then sum = sum + log[i + 2] end
  end
  return sum
end
-- After how long so much will have left the window, if it holds so much.
local function opens(log, past, missing)
  local sum = 0
  for i = 1, #log, 3 do
    if log[i + 1] > past then
      sum = sum + log[i + 2]
      if sum >= missing then return log[i + 1] - past end
    end
  end
end
local function save(key, log, window)
  if #log == 0 then redis.call('DEL', key)
  else redis.call('SET', key, cmsgpack.pack(log), 'PX', text(window + 60000)) end
end
-- So much counts for one window from now on.
local function count(key, limit, window, amount, now)
  if amount <= 0 then return end
  local before, past = load(key, now), now - window
  local log, n = {}, 0
  for i = 1, #before, 3 do
    if before[i + 1] > past then
      log[n + 1], log[n + 2], log[n + 3] = before[i], before[i + 1], before[i + 2]
      n = n + 3
    end
  end
  local cell = limit > 256 and window / 256 or 0
  -- The last of the moment counts for all of them: later than need be, never earlier.
  if n > 0 and (now - log[n - 2] < cell or n >= 1536) then
    log[n - 1], log[n] = now, log[n] + amount
  else
    log[n + 1], log[n + 2], log[n + 3] = now, now, amount
  end
  save(key, log, window)
end
`

/** A breaker and a cooldown as they cross the port: with what remains instead of instants. */
const views = `
local function breakerView(keyId, raw, now)
  local b = cjson.decode(raw)
  return { k = keyId, e = b.e, g = b.g, s = b.s, t = b.t, w = b.w,
    r = b.u and math.max(0, math.min(b.w, b.u - now)) or nil }
end
local function cooldownView(subject, c, now)
  return { o = subject, k = c.k, r = math.min(c.w, c.u - now), w = c.w, f = c.f and math.min(c.w, c.f - now) or nil,
    p = c.p, x = c.x, s = c.s }
end
-- A guess is remembered after its end: the way back is one trial.
local function isForgotten(c, now)
  return now >= c.u + ((c.x or c.p == 'guessed') and 86400000 or 0)
end
`

/**
 * KEYS: meta, members, cooldowns, breakers, held.
 * ARGV: member, channel, its epoch, its seq, how long members count, how long keys are kept.
 *
 * Who was taken for gone holds again what was taken back.
 *
 * @since 0.1.0
 * @category scripts
 */
export const join = RedisLink.script(`${common}${views}
local meta, members, cooldowns, breakers, held = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local now = clock()
local known, seen = tonumber(ARGV[3]), tonumber(ARGV[4])
local epoch = tonumber(redis.call('HGET', meta, 'epoch') or '0')
local seq = tonumber(redis.call('HGET', meta, 'seq') or '0')
local kept = 1
if epoch == 0 or epoch < known or (epoch == known and seq < seen) then
  -- Everything or the latest was lost. What is still there gets a version that nobody has seen.
  kept = 0
  epoch = math.max(now, known + 1, epoch + 1)
  redis.call('HSET', meta, 'epoch', text(epoch))
  local all = redis.call('HGETALL', breakers)
  for i = 1, #all, 2 do
    local b = cjson.decode(all[i + 1])
    b.e = epoch
    redis.call('HSET', breakers, all[i], cjson.encode(b))
  end
elseif known > 0 and epoch ~= known then
  kept = 0
end
if known > 0 and isGone(members, ARGV[1], now - tonumber(ARGV[5])) then
  local all = redis.call('HGETALL', held)
  for i = 1, #all, 2 do
    local ticket = string.sub(all[i], 1, 2) == 't|' and cjson.decode(all[i + 1])
    if ticket and ticket.m == ARGV[1] and ticket.r then
      for _, l in ipairs(ticket.l) do
        if not (ticket.a and l.u == 'r') then redis.call('HINCRBY', held, 'h|' .. l.k, text(l.a)) end
      end
      for _, c in ipairs(ticket.c) do redis.call('HINCRBY', held, 'c|' .. c.o, 1) end
      ticket.r = nil
      redis.call('HSET', held, all[i], cjson.encode(ticket))
    end
  end
end
redis.call('ZADD', members, text(now), ARGV[1])
local alive = redis.call('ZCOUNT', members, '(' .. text(now - tonumber(ARGV[5])), '+inf')
publish(meta, ARGV[2], ARGV[1], { { t = 'M', n = alive } })
for i = 1, 5 do keep(KEYS[i], tonumber(ARGV[6])) end
local c, all = {}, redis.call('HGETALL', cooldowns)
for i = 1, #all, 2 do
  local known = cjson.decode(all[i + 1])
  if not isForgotten(known, now) then c[#c + 1] = cooldownView(all[i], known, now) end
end
local b
b, all = {}, redis.call('HGETALL', breakers)
for i = 1, #all, 2 do b[#b + 1] = breakerView(all[i], all[i + 1], now) end
return { text(epoch), redis.call('HGET', meta, 'seq'), alive, kept, cjson.encode(c), cjson.encode(b) }
`)

/**
 * KEYS: meta, members, cooldowns, breakers, held.
 * ARGV: member, how long members count, how long keys are kept.
 *
 * Gives the tickets of members that are gone, to one of those who ask. Who was taken for gone has to join again.
 *
 * @since 0.1.0
 * @category scripts
 */
export const beat = RedisLink.script(`${common}${views}
local meta, members, cooldowns, held = KEYS[1], KEYS[2], KEYS[3], KEYS[5]
local now = clock()
if isGone(members, ARGV[1], now - tonumber(ARGV[2])) then return { '0', '0', 0, '[]' } end
redis.call('ZADD', members, text(now), ARGV[1])
-- A clock that was set back must not make anybody live longer.
for _, member in ipairs(redis.call('ZRANGEBYSCORE', members, '(' .. text(now), '+inf')) do
  redis.call('ZADD', members, text(now), member)
end
for i = 1, 5 do keep(KEYS[i], tonumber(ARGV[3])) end
local orphans = {}
local gone = redis.call('ZRANGEBYSCORE', members, '-inf', text(now - tonumber(ARGV[2])))
if #gone > 0 and now - tonumber(redis.call('HGET', meta, 'reclaimedAt') or '0') >= 1000 then
  redis.call('HSET', meta, 'reclaimedAt', text(now))
  local left = {}
  for _, member in ipairs(gone) do left[member] = 0 end
  local all = redis.call('HGETALL', held)
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 2) == 't|' then
      local ticket = cjson.decode(all[i + 1])
      if left[ticket.m] and not ticket.r then
        left[ticket.m] = left[ticket.m] + 1
        if #orphans < 200 then orphans[#orphans + 1] = ticket end
      end
    end
  end
  for member, tickets in pairs(left) do
    if tickets == 0 then redis.call('ZREM', members, member) end
  end
end
-- What nobody will ask for any more is swept a piece at a time.
if now - tonumber(redis.call('HGET', meta, 'sweptAt') or '0') >= 30000 then
  local found = redis.call('HSCAN', held, redis.call('HGET', meta, 'sweptHeld') or '0', 'COUNT', 500)
  for i = 1, #found[2], 2 do
    local field, kind = found[2][i], string.sub(found[2][i], 1, 2)
    local at = kind == 'x|' and tonumber(found[2][i + 1]) or kind == 't|' and cjson.decode(found[2][i + 1]).r
    if at and now - at > 600000 then redis.call('HDEL', held, field) end
  end
  redis.call('HSET', meta, 'sweptHeld', found[1])
  found = redis.call('HSCAN', cooldowns, redis.call('HGET', meta, 'sweptCooldowns') or '0', 'COUNT', 500)
  for i = 1, #found[2], 2 do
    if isForgotten(cjson.decode(found[2][i + 1]), now) then redis.call('HDEL', cooldowns, found[2][i]) end
  end
  redis.call('HSET', meta, 'sweptCooldowns', found[1], 'sweptAt', text(now))
end
return {
  redis.call('HGET', meta, 'epoch') or '0',
  redis.call('HGET', meta, 'seq') or '0',
  redis.call('ZCOUNT', members, '(' .. text(now - tonumber(ARGV[2])), '+inf'),
  cjson.encode(orphans)
}
`)

/**
 * KEYS: meta, members. ARGV: member, channel, how long members count, whether it still holds something.
 *
 * @since 0.1.0
 * @category scripts
 */
export const leave = RedisLink.script(`${common}
if redis.call('EXISTS', KEYS[2]) == 0 then return end
-- Who holds something is gone at once, and what it holds is taken back by the others.
if ARGV[4] == '1' then redis.call('ZADD', KEYS[2], '0', ARGV[1]) else redis.call('ZREM', KEYS[2], ARGV[1]) end
local alive = redis.call('ZCOUNT', KEYS[2], '(' .. text(clock() - tonumber(ARGV[3])), '+inf')
publish(KEYS[1], ARGV[2], ARGV[1], { { t = 'M', n = alive } })
`)

/**
 * KEYS: meta, cooldowns, breakers, then the probes and logs of what is told.
 * ARGV: member, channel, its epoch, how long keys are kept, notices.
 *
 * @since 0.1.0
 * @category scripts
 */
export const tell = RedisLink.script(`${common}${logs}${views}
local meta, cooldowns, breakers = KEYS[1], KEYS[2], KEYS[3]
if redis.call('HGET', meta, 'epoch') ~= ARGV[3] then return { 'epoch' } end
local now, epoch, kept = clock(), tonumber(ARGV[3]), tonumber(ARGV[4])
local news, stands = {}, {}
local function merged(old, new)
  if not old then return new end
  local longer = new.u > old.u and new or old
  local firm = math.max(old.f or 0, new.f or 0)
  local refused = old.x or new.x
  local step = old.k == new.k and math.max(old.s, new.s) or longer.s
  if longer == old and firm == (old.f or 0) and refused == old.x and step == old.s then return old end
  return { k = longer.k, u = longer.u, w = longer.w, f = firm > 0 and firm or nil, p = longer.p, x = refused, s = step }
end
local function transit(keyId, raw, to)
  local after = { e = epoch, g = raw and cjson.decode(raw).g + 1 or 1, s = to.s, t = to.t, w = to.w,
    u = to.r and now + to.r or nil }
  local text = cjson.encode(after)
  redis.call('HSET', breakers, keyId, text)
  keep(breakers, kept + (to.r or 0))
  local view = breakerView(keyId, text, now)
  stands[#stands + 1] = view
  return view
end
for _, n in ipairs(cjson.decode(ARGV[5])) do
  -- What is told of a subject ends its probe.
  if n.t ~= 'T' and n.t ~= 'B' then redis.call('DEL', KEYS[n.i]) end
  if n.t == 'C' then
    local c = n.c
    local raw = redis.call('HGET', cooldowns, c.o)
    local old = raw and cjson.decode(raw) or nil
    if old then old.u = math.min(old.u, now + old.w) end
    local all = merged(old, { k = c.k, u = now + c.r, w = c.w, f = c.f and now + c.f or nil, p = c.p, x = c.x, s = c.s })
    if all ~= old then
      redis.call('HSET', cooldowns, c.o, cjson.encode(all))
      keep(cooldowns, kept + math.max(0, c.r))
      news[#news + 1] = { t = 'C', c = cooldownView(c.o, all, now) }
    end
  elseif n.t == 'L' then
    local raw = redis.call('HGET', cooldowns, n.o)
    -- One that lasts longer by more than instants differ that came by different ways is another.
    if not raw or cjson.decode(raw).u - now <= n.r + 1000 then
      redis.call('HDEL', cooldowns, n.o)
      news[#news + 1] = { t = 'L', o = n.o, r = n.r }
    end
  elseif n.t == 'B' then
    local raw = redis.call('HGET', breakers, n.k)
    local b = raw and cjson.decode(raw)
    if not b or (n.e == b.e and n.g == b.g) then
      redis.call('DEL', KEYS[n.i])
      news[#news + 1] = { t = 'B', b = transit(n.k, raw, n.to) }
    else
      stands[#stands + 1] = breakerView(n.k, raw, now)
    end
  elseif n.t == 'R' then
    for _, subject in ipairs(redis.call('HKEYS', cooldowns)) do
      for _, of in ipairs(n.o) do
        if subject == of or string.sub(subject, 1, #of + 1) == of .. '/' then redis.call('HDEL', cooldowns, subject) end
      end
    end
    local view = transit(n.k, redis.call('HGET', breakers, n.k), { s = 'C', t = 0 })
    news[#news + 1] = { t = 'R', k = n.k, q = n.q, e = view.e, g = view.g }
  elseif n.t == 'T' then
    count(KEYS[n.i], n.n, n.w, n.a, now)
  end
end
publish(meta, ARGV[2], ARGV[1], news)
return { 'ok', cjson.encode(stands) }
`)

/**
 * KEYS: meta, members, held, cooldowns, breakers, then the logs of the limits, then the probes.
 * ARGV: member, its epoch, how long keys are kept, the ticket, how long members count.
 *
 * @since 0.1.0
 * @category scripts
 */
export const claim = RedisLink.script(`${common}${logs}
local meta, members, held, cooldowns, breakers = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
if redis.call('HGET', meta, 'epoch') ~= ARGV[2] then return { 'epoch' } end
local now = clock()
local ticket = cjson.decode(ARGV[4])
if redis.call('HDEL', held, 'x|' .. ticket.t) == 1 then return { 'late' } end
-- Who was taken for gone joins first, and so has what it holds again.
if isGone(members, ARGV[1], now - tonumber(ARGV[5])) then return { 'gone' } end
-- To claim is to be alive; before anything is held, so that nothing is ever held by nobody.
redis.call('ZADD', members, text(now), ARGV[1])
local gate, index, wait, free = nil, 0, 0, 0
-- Of all that does not fit, what fits last; -1 is never by itself. Who gives something back tells those who wanted it.
local function refuse(name, i, subject, millis, mayFree)
  redis.call('HSET', held, 'w|' .. subject, '1')
  if not gate or (wait >= 0 and (millis < 0 or millis > wait)) then
    gate, index, wait, free = name, i, millis, mayFree and 1 or 0
  end
end
if not ticket.h then
  for i, p in ipairs(ticket.p) do
    local left = redis.call('PTTL', KEYS[5 + #ticket.l + i])
    if left > 0 then refuse('probing', i, p.o, left, true) end
    -- Who asks may not have heard yet that the last probe went wrong. If it is only ahead of what it tells, it asks again.
    local breaker = p.b and redis.call('HGET', breakers, p.b)
    left = breaker and cjson.decode(breaker).u or 0
    local cooldown = redis.call('HGET', cooldowns, p.o)
    if cooldown then left = math.max(left, cjson.decode(cooldown).u) end
    if left > now then refuse('probing', i, p.o, math.min(1000, left - now), true) end
  end
  for i, c in ipairs(ticket.c) do
    local taken = tonumber(redis.call('HGET', held, 'c|' .. c.o) or '0')
    if taken >= c.n then refuse('concurrency', i, c.o, -1, true) end
  end
  for i, l in ipairs(ticket.l) do
    local log, past = load(KEYS[5 + i], now), now - l.w
    local taken = tonumber(redis.call('HGET', held, 'h|' .. l.k) or '0')
    local missing = math.min(l.a, l.n) - (l.n - taken - used(log, past))
    -- What is in flight is free again after one window at the earliest.
    if missing > 0 then refuse('limit', i, l.o, opens(log, past, missing) or l.w, taken > 0) end
  end
end
if gate then return { 'no', gate, index, math.ceil(wait), free } end
for _, l in ipairs(ticket.l) do redis.call('HINCRBY', held, 'h|' .. l.k, text(l.a)) end
for _, c in ipairs(ticket.c) do redis.call('HINCRBY', held, 'c|' .. c.o, 1) end
-- In its last millisecond a probe has nothing left, but is still there: it is over, and is replaced.
for i, p in ipairs(ticket.p) do redis.call('SET', KEYS[5 + #ticket.l + i], ticket.t, 'PX', text(p.w)) end
redis.call('HSET', held, 't|' .. ticket.t, ARGV[4])
if redis.call('PTTL', held) < 0 then redis.call('PEXPIRE', held, ARGV[3]) end
return { 'yes' }
`)

/**
 * KEYS: meta, held, members, then logs and probes. ARGV: member, channel, how long members count, how long keys are kept,
 * then a list: for each ticket what became of it (`A` answered, `E` ended, `U` unsent, `R` its process is gone), and where
 * among KEYS its logs and probes are. All of it may come twice.
 *
 * @since 0.1.0
 * @category scripts
 */
export const settle = RedisLink.script(`${common}${logs}
local meta, held, members = KEYS[1], KEYS[2], KEYS[3]
local now, news = clock(), {}
local function freed(subject)
  if redis.call('HDEL', held, 'w|' .. subject) == 1 then news[#news + 1] = { t = 'F', o = subject } end
end
local function less(field, amount)
  local left = tonumber(redis.call('HGET', held, field) or '0') - amount
  if left > 0 then redis.call('HSET', held, field, text(left)) else redis.call('HDEL', held, field) end
end
-- What was held of a limit counts for one window from now, or so much instead of it.
local function counted(ticket, at, unit, amount)
  for i, l in ipairs(ticket.l) do
    if l.u == unit then
      if not ticket.r then less('h|' .. l.k, l.a) end
      local used = amount or l.a
      count(KEYS[at.l[i]], l.n, l.w, used, now)
      if used < l.a then freed(l.o) end
    end
  end
end
local function over(ticket, at)
  for _, c in ipairs(ticket.c) do
    less('c|' .. c.o, 1)
    freed(c.o)
  end
  for i, p in ipairs(ticket.p) do
    if redis.call('GET', KEYS[at.p[i]]) == ticket.t then
      redis.call('DEL', KEYS[at.p[i]])
      freed(p.o)
    end
  end
end
for _, at in ipairs(cjson.decode(ARGV[5])) do
  local field = 't|' .. at.t
  local raw = redis.call('HGET', held, field)
  local ticket = raw and cjson.decode(raw)
  if not ticket then
    -- The claim may still be on its way: it comes too late.
    if at.s == 'U' then redis.call('HSET', held, 'x|' .. at.t, text(now)) end
  elseif at.s == 'R' then
    local score = tonumber(redis.call('ZSCORE', members, ticket.m) or '0')
    if not ticket.r and score <= now - tonumber(ARGV[3]) then
      if not ticket.a then counted(ticket, at, 'r') end
      counted(ticket, at, 't')
      over(ticket, at)
      -- Should its process be there after all, what it says of it counts once more.
      ticket.r = now
      redis.call('HSET', held, field, cjson.encode(ticket))
    end
  else
    if at.s == 'U' then
      for _, l in ipairs(ticket.l) do
        if not ticket.r and not (ticket.a and l.u == 'r') then
          less('h|' .. l.k, l.a)
          freed(l.o)
        end
      end
    elseif not ticket.a then
      counted(ticket, at, 'r')
      ticket.a = true
    end
    if at.s == 'A' then
      redis.call('HSET', held, field, cjson.encode(ticket))
    else
      if at.s == 'E' then counted(ticket, at, 't', at.k) end
      if not ticket.r then over(ticket, at) end
      redis.call('HDEL', held, field)
    end
  end
end
if redis.call('PTTL', held) == -1 then redis.call('PEXPIRE', held, ARGV[4]) end
publish(meta, ARGV[2], ARGV[1], news)
`)

/**
 * @since 0.1.0
 * @category scripts
 */
export const all: ReadonlyArray<RedisLink.Script> = [join, beat, leave, tell, claim, settle]
