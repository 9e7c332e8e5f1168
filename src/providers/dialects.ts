/**
 * How each provider words its errors, as data.
 *
 * @since 0.1.0
 */
import type { ErrorDialect, ErrorRule, Verdict } from "./Provider.js"

// --- what a cause means ----------------------------------------------------------------------------------------------

const quota: Verdict = { kind: "QuotaExhausted" }
const limited: Verdict = { kind: "RateLimited" }
const limitedPerModel: Verdict = { kind: "RateLimited", perModel: true }
const overloaded: Verdict = { kind: "Overloaded" }
const overloadedModel: Verdict = { kind: "Overloaded", perModel: true }
const serverError: Verdict = { kind: "ServerError" }
const slow: Verdict = { kind: "Timeout", scope: "request" }
const rejected: Verdict = { kind: "Rejected" }
const tooLarge: Verdict = { kind: "TooLarge" }
const unauthorized: Verdict = { kind: "Unauthorized", explicit: false }
const badKey: Verdict = { kind: "Unauthorized", explicit: true }
const deadAccount: Verdict = { kind: "Unauthorized", scope: "group", explicit: true }
const forbidden: Verdict = { kind: "Forbidden" }
const forbiddenGroup: Verdict = { kind: "Forbidden", scope: "group" }
/** Refused for where the call comes from: every key is refused alike. */
const egress: Verdict = { kind: "Forbidden", scope: "provider", failover: false }
/** Limited at the edge by client address, or upstream of the provider: other keys do not help. */
const limitedForAll: Verdict = { kind: "RateLimited", scope: "provider", failover: false }
const limitedUpstream: Verdict = { ...limitedForAll, perModel: true }
/** Stored with another account, for all that one can see: the key is fine, the one that made it can serve. */
const elsewhere: Verdict = { ...rejected, failover: true }
const noModel: Verdict = { kind: "Rejected", scope: "provider", perModel: true, code: "model_not_found" }
/** A conflict or a lock that goes away; nothing was done. */
const conflict: Verdict = { kind: "ServerError", scope: "request", unprocessed: true }

// --- what every provider may say ------------------------------------------------------------------------------------

const commonCodes: Readonly<Record<string, Verdict>> = {
  ...all(quota, [
    "insufficient_quota",
    "credit_balance_exhausted",
    "organization_spend_limit_exceeded",
    "project_spend_limit_exceeded",
    "organization_usage_limit_exceeded",
    "project_usage_limit_exceeded",
    "billing_not_active",
    "billing_hard_limit_reached",
    "billing_disabled",
    "billing_error",
    "payment_required",
    "insufficient_balance",
    "insufficient_credits",
    "contract_spend_limit_reached"
  ]),
  enforced_spend_limit_reached: { ...quota, reset: "month-utc" },
  ...all(badKey, [
    "invalid_api_key",
    "incorrect_api_key",
    "api_key_invalid",
    "api_key_expired",
    "api_key_revoked",
    "api_key_disabled",
    "expired_api_key",
    "revoked_api_key"
  ]),
  ...all(deadAccount, [
    "account_deactivated",
    "account_suspended",
    "organization_deactivated",
    "organization_on_hold",
    "organization_restricted",
    "consumer_suspended"
  ]),
  ...all(forbidden, [
    "mismatched_organization",
    "mismatched_project",
    "no_organization",
    "missing_scope",
    "missing_scopes",
    "insufficient_scope",
    "insufficient_permissions"
  ]),
  previous_response_not_found: elsewhere,
  ip_not_authorized: forbiddenGroup,
  unsupported_country_region_territory: egress,
  ...all(limited, ["slow_down", "ramp_limit_exceeded"]),
  ...all(overloaded, [
    "overloaded_error",
    "server_is_overloaded",
    "engine_overloaded",
    "over_capacity",
    "capacity_exceeded"
  ]),
  service_tier_capacity_exceeded: overloadedModel,
  ...all(tooLarge, ["context_length_exceeded", "request_too_large"]),
  ...all(noModel, [
    "model_not_found",
    "model_not_available",
    "model_not_exist",
    "model_decommissioned",
    "invalid_model",
    "deploymentnotfound"
  ]),
  ...all(rejected, [
    "content_filter",
    "content_policy_violation",
    "moderation_blocked",
    "responsibleaipolicyviolation",
    "image_content_policy_violation",
    "bio_policy",
    "invalid_prompt"
  ])
}

const commonWords: Readonly<Record<string, Verdict>> = {
  ...all(limited, [
    "rate_limit_error",
    "rate_limit_exceeded",
    "rate_limit_reached",
    "ratelimitreached",
    "rate_limited",
    "too_many_requests",
    "toomanyrequests",
    "resource_exhausted",
    "requests",
    "tokens"
  ]),
  ...all(serverError, ["server_error", "api_error", "internal_server_error", "internal_error", "internal", "unknown"]),
  ...all(overloaded, ["service_unavailable_error", "service_unavailable", "serviceunavailable", "unavailable"]),
  ...all(slow, ["timeout", "timeout_error", "request_timeout", "deadline_exceeded", "vector_store_timeout"]),
  ...all(unauthorized, ["authentication_error", "unauthorized", "unauthenticated", "invalid_token"]),
  ...all(forbidden, ["permission_error", "permission_denied", "permissiondenied", "forbidden", "access_denied"]),
  ...all(conflict, ["conflict_error", "aborted"]),
  ...all(rejected, [
    "invalid_request_error",
    "invalid_argument",
    "bad_request",
    "validation_error",
    "not_found",
    "not_found_error",
    "failed_precondition",
    "out_of_range",
    "cancelled",
    "data_residency_mismatch",
    "invalid_image",
    "invalid_image_format",
    "invalid_base64_image",
    "invalid_image_url",
    "invalid_image_mode",
    "image_too_small",
    "image_parse_error",
    "unsupported_image_media_type",
    "empty_image_file",
    "failed_to_download_image",
    "image_file_not_found"
  ]),
  ...all(tooLarge, ["image_too_large", "image_file_too_large"])
}

const commonStatuses: Readonly<Record<number, Verdict>> = {
  408: slow,
  409: conflict,
  425: conflict,
  451: egress
}

/** What stands in front of providers: Cloudflare limits and blocks by client address, Envoy says what it sent. */
const edgeRules: ReadonlyArray<ErrorRule> = [
  { statuses: [429], html: true, header: ["server", /cloudflare/i], verdict: limitedForAll },
  { statuses: [429], html: true, message: /\b1015\b/, verdict: limitedForAll },
  { statuses: [429], field: "cloudflare_error", verdict: limitedForAll },
  { statuses: [403], html: true, header: ["server", /cloudflare/i], verdict: egress },
  { statuses: [403], field: "cloudflare_error", verdict: egress },
  {
    statuses: [503],
    message: /reset reason: (?:connection termination|remote reset|local reset|protocol error)/i,
    verdict: { ...overloaded, unprocessed: false }
  }
]

const tooLargeRules: ReadonlyArray<ErrorRule> = [
  {
    statuses: [400, 403, 413, 422],
    message: new RegExp(
      "context[ _](?:length|window|limit)|maximum (?:context|prompt) length|" +
        "(?:prompt|input|request) is too (?:long|large)|too many (?:input |prompt )?tokens|" +
        "(?:input )?token count .{0,40}exceeds|request entity too large|payload too large|" +
        "\\+.{0,60}must be (?:<=|less than)|reduce the length of the (?:messages|prompt|input)",
      "i"
    ),
    verdict: tooLarge
  },
  {
    statuses: [400, 413, 429],
    message: /\brequest too large\b|request is larger than .{0,40}limit/i,
    verdict: tooLarge
  }
]

const accessRules: ReadonlyArray<ErrorRule> = [
  {
    statuses: [401, 403],
    message: new RegExp(
      "(?:country|region|territory|location).{0,40}not supported|unsupported (?:country|region|location)|" +
        "not available in your (?:country|region|location)",
      "i"
    ),
    verdict: egress
  },
  {
    statuses: [400, 401, 403],
    message: new RegExp(
      "(?:organi[sz]ation|account|project|consumer)\\b.{0,80}\\b" +
        "(?:has been|was|is) (?:deactivated|disabled|restricted|suspended|banned|terminated)",
      "i"
    ),
    verdict: deadAccount
  },
  {
    statuses: [400, 401, 403],
    message: new RegExp(
      "(?:invalid|incorrect|expired|revoked) (?:x-)?(?:api[-_ ]?(?:key|token)|bearer token)|" +
        "api[-_ ]?(?:key|token) (?:is |was |has )?(?:been )?" +
        "(?:not valid|not found|invalid|expired|revoked|disabled|deleted)|" +
        "api[-_ ]?key.{0,20} (?:reported as leaked|is invalid)",
      "i"
    ),
    verdict: badKey
  },
  { statuses: [401, 403], message: /\btoken (?:is |was |has been )(?:revoked|disabled|deleted)/i, verdict: badKey },
  {
    statuses: [401, 403],
    message: /\bIP\b(?: address)?.{0,40}\bnot\b.{0,30}(?:allow|authori[sz]ed|permitted)/i,
    verdict: forbiddenGroup
  },
  {
    statuses: [401, 403],
    message: new RegExp(
      "missing scopes?|insufficient permissions?|organi[sz]ation header|mismatched (?:organi[sz]ation|project)|" +
        "member of an organi[sz]ation",
      "i"
    ),
    verdict: forbidden
  }
]

const moneyRules: ReadonlyArray<ErrorRule> = [
  {
    statuses: [400, 402, 403, 429],
    message: new RegExp(
      "credit balance is too low|insufficient (?:account )?(?:balance|credits?|funds)|" +
        "credits? (?:are|is|have been|has been) (?:depleted|exhausted|used up)|" +
        "used all (?:available |of your )?credits|" +
        "(?:no|n[o']t have (?:any|enough)|out of)(?: \\w+)? credits|" +
        "(?:reached|exceeded|crossed|hit|over)\\b.{0,60}\\b(?:usage|spend|spending|billing) (?:limit|threshold)|" +
        "billing hard limit|credit limit (?:exceeded|reached)|not active.{0,40}billing",
      "i"
    ),
    verdict: quota
  },
  {
    statuses: [429],
    message: /(?:calls|requests) ?(?:\/|per) ?month|monthly (?:quota|limit|request limit)/i,
    verdict: quota
  }
]

const modelRules: ReadonlyArray<ErrorRule> = [
  {
    statuses: [400, 403, 404],
    message: new RegExp(
      // Within one sentence; a dot inside a name does not end it.
      "\\b(?:models?|deployment)\\b(?:[^.]|\\.\\S){0,120}?\\b(?:(?:do|does) not exist|not exist\\b|not found|" +
        "has been (?:decommissioned|deprecated|retired))|(?:not have|no) access to (?:the )?model\\b|" +
        "unable to access model|not a valid model|no endpoints found|invalid model(?: name| id)?[:=]",
      "i"
    ),
    verdict: noModel
  }
]

const storedRules: ReadonlyArray<ErrorRule> = [
  {
    statuses: [400, 403],
    message: new RegExp(
      "\\bno such (?:file|batch|upload|response|container|conversation|vector ?store)\\b|" +
        "\\b(?:files?|batch|upload|response|container|conversation|vector store|cached ?content)\\b" +
        "(?:[^.]|\\.\\S){0,120}?\\b(?:not found|not exist|no longer exists)\\b",
      "i"
    ),
    verdict: elsewhere
  }
]

const contentRules: ReadonlyArray<ErrorRule> = [
  {
    statuses: [400, 403, 422],
    message: new RegExp(
      "content (?:management )?policy|safety system|content[ _]filter|requires moderation|input was flagged|" +
        "violates .{0,40}(?:usage|content|safety) (?:guidelines|polic)",
      "i"
    ),
    verdict: rejected
  }
]

const commonRules: ReadonlyArray<ErrorRule> = [
  ...edgeRules,
  ...tooLargeRules,
  ...moneyRules,
  ...contentRules,
  ...accessRules,
  ...modelRules,
  ...storedRules
]

/** A provider in the manner of the others, with what it does differently; its own rules come first. */
const dialect = (
  name: string,
  own: { readonly [K in keyof Omit<ErrorDialect, "name">]?: ErrorDialect[K] }
): ErrorDialect => ({
  name,
  limitScope: own.limitScope ?? "group",
  okBody: own.okBody ?? "recognise",
  codes: { ...commonCodes, ...own.codes },
  rules: [...own.rules ?? [], ...commonRules],
  words: { ...commonWords, ...own.words },
  statuses: { ...commonStatuses, ...own.statuses }
})

const spentQuotaRule: ErrorRule = {
  statuses: [403, 429],
  message: /exceeded your (?:current |monthly )?quota/i,
  verdict: quota
}

// OpenAI and Groq share limits between the keys of an organization, per model.
const openAiWords: Readonly<Record<string, Verdict>> = all(limitedPerModel, [
  "rate_limit_exceeded",
  "requests",
  "tokens"
])

// --- the providers ---------------------------------------------------------------------------------------------------

/**
 * Any REST endpoint: nothing is known of what its keys share, and a success is a success.
 *
 * @since 0.1.0
 * @category dialects
 */
export const generic: ErrorDialect = dialect("generic", {
  limitScope: "key",
  okBody: "ignore",
  rules: [spentQuotaRule]
})

/**
 * @since 0.1.0
 * @category dialects
 */
export const openai: ErrorDialect = dialect("openai", { rules: [spentQuotaRule], words: openAiWords })

/**
 * Azure OpenAI. A wait of a day means that this one request is larger than the limit per minute.
 *
 * @since 0.1.0
 * @category dialects
 */
export const azure: ErrorDialect = dialect("azure", {
  rules: [
    { statuses: [429], message: /high demand|no capacity|temporarily unable/i, verdict: overloadedModel },
    { statuses: [429], waitMillis: 86_400_000, verdict: { ...tooLarge, code: "request_too_large" } },
    // The endpoint of another resource says the same, so the key may be fine.
    { statuses: [401], message: /wrong API endpoint/i, verdict: unauthorized },
    { statuses: [401, 403], message: /lacks? the required|principal/i, verdict: forbidden },
    { statuses: [403], message: /out of call volume quota/i, verdict: quota },
    { statuses: [403], message: /virtual network|firewall|private endpoint/i, verdict: forbiddenGroup },
    spentQuotaRule
  ],
  words: {
    ...openAiWords,
    ...all(limitedPerModel, ["ratelimitreached", "toomanyrequests", "too_many_requests"])
  },
  statuses: { 429: limitedPerModel }
})

/**
 * @since 0.1.0
 * @category dialects
 */
export const anthropic: ErrorDialect = dialect("anthropic", {
  rules: [
    { statuses: [404], message: /^model:/i, verdict: noModel },
    { statuses: [403], message: /^request not allowed/i, verdict: egress }
  ],
  words: { rate_limit_error: limitedPerModel }
})

// Google words every 429 as "current quota … billing details": only the id of the quota tells which it is.
const geminiRules: ReadonlyArray<ErrorRule> = [
  { statuses: [429], quota: /^limit:0$/, verdict: { ...quota, perModel: true } },
  { statuses: [429], message: /\blimit: 0\b(?![.,]\d)/, verdict: { ...quota, perModel: true } },
  { statuses: [429], quota: /per_?day/i, verdict: { ...quota, perModel: true, reset: "midnight-pacific" } },
  { statuses: [429], quota: /per_?minute/i, verdict: limitedPerModel },
  {
    statuses: [429],
    message: /daily (?:quota|limit)|quota .{0,40}per day\b/i,
    verdict: { ...quota, reset: "midnight-pacific" }
  },
  { statuses: [429], message: /prepay\w* credits|credits? .{0,20}depleted/i, verdict: quota },
  {
    statuses: [400],
    message: /free tier is not available|(?:location|country|region)\b.{0,40}not supported|your country/i,
    verdict: egress
  },
  {
    statuses: [403],
    message: /project has been denied access|has not been used in project/i,
    verdict: forbiddenGroup
  },
  // A file or a cache of another project: the key is fine, this request needs the key that made it.
  {
    statuses: [403],
    message: /permission to access the (?:file|cached)|cached ?content not found|may not exist/i,
    verdict: elsewhere
  }
]

const geminiCodes: Readonly<Record<string, Verdict>> = {
  ...all(forbiddenGroup, ["service_disabled", "consumer_invalid", "account_state_invalid"]),
  ...all(forbidden, [
    "api_key_service_blocked",
    "api_key_http_referrer_blocked",
    "api_key_ip_address_blocked",
    "api_key_android_app_blocked",
    "api_key_ios_app_blocked",
    "access_token_scope_insufficient",
    "iam_permission_denied"
  ]),
  quota_exceeded: { ...quota, reset: "midnight-pacific" }
}

/**
 * The Gemini API of AI Studio. Limits belong to the project and the model.
 *
 * @since 0.1.0
 * @category dialects
 */
export const gemini: ErrorDialect = dialect("gemini", {
  codes: geminiCodes,
  rules: geminiRules,
  words: { resource_exhausted: limitedPerModel, unavailable: overloadedModel, rate_limit_exceeded: limitedPerModel },
  statuses: { 429: limitedPerModel }
})

/**
 * Gemini on Vertex AI: a bare refusal is contention in a pool that all customers share.
 *
 * @since 0.1.0
 * @category dialects
 */
export const vertex: ErrorDialect = dialect("vertex", {
  codes: geminiCodes,
  rules: [
    ...geminiRules,
    { statuses: [429], message: /quota exceeded for/i, verdict: limitedPerModel },
    { statuses: [429], code: /^rate_limit_exceeded$/i, verdict: limitedPerModel },
    { statuses: [429], code: /^resource_exhausted$/i, verdict: overloadedModel }
  ],
  words: { resource_exhausted: overloadedModel, unavailable: overloadedModel },
  statuses: { 429: overloadedModel }
})

/**
 * OpenRouter: budgets come as 402, 403 and 429, and what the hosts behind it say comes through.
 *
 * @since 0.1.0
 * @category dialects
 */
export const openrouter: ErrorDialect = dialect("openrouter", {
  okBody: "peek",
  codes: {
    openrouter_in_flight_budget: limited,
    in_flight_budget_exhausted: limited,
    openrouter_credits: quota,
    openrouter_key_limit: { ...quota, scope: "key" }
  },
  rules: [
    { code: /key_(?:limit|budget)/i, verdict: { ...quota, scope: "key" } },
    { statuses: [402], header: ["retry-after", /\d/], verdict: limited },
    { statuses: [402, 403], field: "limit_source", verdict: quota },
    { statuses: [429], message: /per-day\b|limit_rpd/i, verdict: { ...quota, reset: "midnight-utc" } },
    { statuses: [429], message: /per-min|limit_rpm/i, verdict: limited },
    { statuses: [429], field: "provider_name", verdict: limitedUpstream },
    { statuses: [429], message: /upstream/i, verdict: limitedUpstream },
    { statuses: [400, 403], field: "flagged_input", verdict: { ...rejected, code: "moderation" } },
    { statuses: [400, 403], field: "reasons", verdict: { ...rejected, code: "moderation" } },
    spentQuotaRule
  ],
  statuses: {
    500: { ...serverError, perModel: true },
    502: { ...serverError, perModel: true },
    503: overloadedModel,
    529: overloadedModel
  }
})

/**
 * @since 0.1.0
 * @category dialects
 */
export const groq: ErrorDialect = dialect("groq", {
  rules: [spentQuotaRule],
  words: openAiWords,
  statuses: { 498: overloaded }
})

/**
 * @since 0.1.0
 * @category dialects
 */
export const mistral: ErrorDialect = dialect("mistral", {
  codes: { "3505": overloadedModel, "1500": noModel },
  words: { "1300": limited },
  rules: [
    { statuses: [429, 503], message: /capacity exceeded/i, verdict: overloadedModel },
    spentQuotaRule
  ]
})

/**
 * @since 0.1.0
 * @category dialects
 */
export const deepseek: ErrorDialect = dialect("deepseek", { rules: [spentQuotaRule] })

/**
 * Together: a 403 may be a request that is too long, and the type `credit_limit` a limit per minute.
 *
 * @since 0.1.0
 * @category dialects
 */
export const together: ErrorDialect = dialect("together", { rules: [spentQuotaRule] })

/**
 * Cohere: nothing but a message. Trial limits belong to the key.
 *
 * @since 0.1.0
 * @category dialects
 */
export const cohere: ErrorDialect = dialect("cohere", {
  limitScope: "key",
  rules: [{ statuses: [429], message: /trial key.{0,80}month/i, verdict: { ...quota, scope: "key" } }, spentQuotaRule]
})

/**
 * xAI: a bad key is a 400, spent credits are 403 or 429, and `error` is text.
 *
 * @since 0.1.0
 * @category dialects
 */
export const xai: ErrorDialect = dialect("xai", { rules: [spentQuotaRule] })

/**
 * Every dialect by its name.
 *
 * @since 0.1.0
 * @category dialects
 */
export const dialects: { readonly [name: string]: ErrorDialect } = {
  anthropic,
  azure,
  cohere,
  deepseek,
  gemini,
  generic,
  groq,
  mistral,
  openai,
  openrouter,
  together,
  vertex,
  xai
}

function all(verdict: Verdict, names: ReadonlyArray<string>): Readonly<Record<string, Verdict>> {
  return Object.fromEntries(names.map((name) => [name, verdict]))
}
