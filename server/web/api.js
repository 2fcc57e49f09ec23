// Talking to the server: JSON, streams of server-sent events, and errors that a person can read.
// Addresses are relative, so the page works below a --root-path too.

import { SSEParser } from "./sse.js";

const KEY = "jaxserve.api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  /** `status` is the HTTP status, 0 if no reply came. */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The error of a reply that is not 2xx: OpenAI's error object, or whatever stands there. */
export function errorFromReply(status, body, retryAfter = null) {
  const detail = errorMessage(parseJSON(body)) ?? "";
  const said = detail ? `: ${detail.replace(/[^.!?]$/, "$&.")}` : ".";
  if (status === 401 || status === 403) {
    return new ApiError(`The server wants another API key${said} Enter it in the settings.`, status);
  }
  if (status === 429 || status === 503) {
    const wait = retryAfter && /^\d+$/.test(retryAfter) ? ` Try again in ${retryAfter} s.` : "";
    return new ApiError(`The server is ${status === 429 ? "busy" : "not ready"}${said}${wait}`, status);
  }
  if (status === 413) return new ApiError(`The request is too large for the server${said}`, status);
  return new ApiError(detail || `The server answered with status ${status}.`, status);
}

/** The message of OpenAI's error object, of the flat one of older servers, or null. */
export function errorMessage(value) {
  const error = value?.error;
  if (typeof error === "string") return error;
  if (typeof error?.message === "string") return error.message;
  return value?.object === "error" && typeof value.message === "string" ? value.message : null;
}

function parseJSON(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

async function request(path, { body, signal } = {}) {
  const headers = apiKey.get() ? { Authorization: `Bearer ${apiKey.get()}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  let response;
  try {
    response = await fetch(path, { method, headers, body: JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw errorFromReply(response.status, await response.text(), response.headers.get("Retry-After"));
}

/** GET without a body, POST with one; the reply's JSON. */
export async function call(path, body, signal) {
  const response = await request(path, { body, signal });
  const value = parseJSON(await response.text());
  if (value === null) throw new ApiError("The server's reply is not JSON.", response.status);
  return value;
}

/** The JSON objects of a streamed reply, up to [DONE]. A stream cut short is an error. */
export async function* stream(path, body, signal) {
  const response = await request(path, { body: { ...body, stream: true }, signal });
  yield* readEvents(response.body.getReader(), signal);
}

export async function* readEvents(reader, signal) {
  const parser = new SSEParser();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await read(reader, signal);
      if (done) throw new ApiError("The connection closed before the answer was complete.");
      for (const { data } of parser.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        const object = parseJSON(data);
        if (object === null) throw new ApiError("The server sent something that is not JSON.");
        const message = errorMessage(object);
        if (message !== null) throw new ApiError(message, object.error?.code || 0);
        yield object;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  }
}
