// The sampling panel's fields and what of them goes into a request. An empty field is not sent, so the
// server's default holds.

export const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, step: 0.1, hint: "0: greedy" },
  { name: "top_p", label: "Top p", above: 0, max: 1, step: 0.05, hint: "1: off" },
  { name: "top_k", label: "Top k", min: -1, integer: true, hint: "−1: off" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "0: off" },
  { name: "max_tokens", label: "Longest answer", min: 1, integer: true, hint: "tokens" },
  { name: "repetition_penalty", label: "Repetition penalty", above: 0, step: 0.05, hint: "1: off" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, hint: "0: off" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, hint: "0: off" },
  { name: "seed", label: "Seed", integer: true, hint: "any number" },
];

/** What is wrong with the text of one field; null if nothing. */
export function problem(field, text) {
  const value = Number(text);
  if (text.trim() === "") return null;
  if (!Number.isFinite(value)) return "Not a number";
  if (field.integer && !Number.isSafeInteger(value)) return "A whole number, please";
  if (field.min !== undefined && value < field.min) return `At least ${field.min}`;
  if (field.above !== undefined && value <= field.above) return `Greater than ${field.above}`;
  if (field.max !== undefined && value > field.max) return `At most ${field.max}`;
  return null;
}

/** The request's fields from the panel's texts; fields with a problem are left out. */
export function samplingBody(values) {
  const body = {};
  for (const field of FIELDS) {
    const text = values[field.name] ?? "";
    if (text.trim() !== "" && problem(field, text) === null) body[field.name] = Number(text);
  }
  const stop = (values.stop ?? "").split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  return body;
}
