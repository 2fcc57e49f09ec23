// Numbers and tokens as people read them. Pure functions.

/** Rates and waits of one answer. Times in ms; `usage` is the server's, null before it came. */
export function answerStats({ sent, first, last, usage }) {
  const tokens = usage?.completion_tokens ?? null;
  const seconds = first === null ? 0 : (last - first) / 1000;
  return {
    firstTokenSeconds: first === null ? null : (first - sent) / 1000,
    // The first token belongs to the wait before it, so one token has no rate.
    tokensPerSecond: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
    tokens,
    promptTokens: usage?.prompt_tokens ?? null,
  };
}

export function describeStats(stats) {
  if (!stats) return "";
  const parts = [];
  if (stats.tokens !== null) parts.push(`${stats.tokens} ${stats.tokens === 1 ? "token" : "tokens"}`);
  if (stats.tokensPerSecond !== null) parts.push(`${significant(stats.tokensPerSecond)} tok/s`);
  if (stats.firstTokenSeconds !== null) {
    parts.push(`first token after ${duration(stats.firstTokenSeconds)}`);
  }
  return parts.join(" · ");
}

/** Three significant digits at most, thousands grouped. */
export function significant(value) {
  if (value >= 100) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}

/** A probability from its natural logarithm, as per cent. */
export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  if (value > 0 && value < 0.01) return "< 0.01 %";
  if (value < 100 && value > 99.99) return "> 99.99 %";
  return `${value >= 10 ? value.toFixed(1) : value.toFixed(2)} %`;
}

/** 0 (unlikely) to 5 (nearly certain), for a colour. */
export function likelihood(logprob) {
  const steps = [0.05, 0.2, 0.4, 0.7, 0.95];
  const probability = Math.exp(logprob);
  return steps.filter((step) => probability >= step).length;
}

/** Spaces and line ends made visible, for a token shown by itself. */
export function visible(token) {
  if (token === "") return "∅";
  return token.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

const STAGES = {
  process: "starting the engine",
  checkpoint: "reading the checkpoint",
  weights: "loading weights",
};

/** What start-up has reached, in one line: "compiling 3 of 12, about 8 s left". */
export function describeStartup({ stage, done, total, eta_s: eta }) {
  const parts = [STAGES[stage] ?? stage];
  if (total > 0) parts[0] += ` ${big(done)} of ${big(total)}`;
  if (typeof eta === "number" && eta > 0) {
    parts.push(`about ${eta < 60 ? `${Math.ceil(eta)} s` : duration(eta)} left`);
  }
  return parts.join(", ");
}

/** Counts stay as they are; what must be bytes is said in MB or GB. */
function big(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)} GB`;
  if (count >= 1e6) return `${(count / 1e6).toFixed(0)} MB`;
  return String(count);
}
