// The log probabilities of /v1/completions, token by token. Pure functions.

/** A streamed choice's tokens: {text, logprob, top: {text: logprob}}; without logprobs, its text as one. */
export function completionTokens({ text, logprobs }) {
  if (!logprobs?.tokens?.length) return text ? [{ text, logprob: null, top: {} }] : [];
  return logprobs.tokens.map((token, i) => ({
    text: String(token),
    logprob: logprobs.token_logprobs?.[i] ?? null,
    top: logprobs.top_logprobs?.[i] ?? {},
  }));
}

/** The token and its alternatives, the likeliest first. */
export function sortedAlternatives({ text, logprob, top }) {
  const all = new Map(Object.entries(top).filter(([, value]) => typeof value === "number"));
  if (typeof logprob === "number") all.set(text, logprob);
  return [...all].map(([other, value]) => ({ text: other, logprob: value })).sort((a, b) => b.logprob - a.logprob);
}
