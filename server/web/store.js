// Conversations, kept in a Storage (the browser's localStorage), one entry each.
//
// A conversation: {id, title, system, created, updated, messages}. A message: {role, content} and, for
// an answer, {status: "streaming" | "done" | "stopped" | "error", error, stats, finish}.

const PREFIX = "jaxserve.conversation.";
const ROLES = ["user", "assistant"];

export class ConversationStore {
  constructor(storage) {
    this.storage = storage;
  }

  /** All conversations, the latest first. Entries that cannot be read are passed over. */
  list() {
    const keys = Array.from({ length: this.storage.length }, (_, i) => this.storage.key(i));
    return keys
      .filter((key) => key?.startsWith(PREFIX))
      .map((key) => this.load(key.slice(PREFIX.length)))
      .filter((conversation) => conversation !== null)
      .sort((a, b) => b.updated - a.updated);
  }

  load(id) {
    try {
      const value = JSON.parse(this.storage.getItem(PREFIX + id));
      return isConversation(value) ? { ...value, id } : null;
    } catch {
      return null;
    }
  }

  /** False if the storage is full or switched off. */
  save(conversation) {
    try {
      this.storage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
      return true;
    } catch {
      return false;
    }
  }

  remove(id) {
    this.storage.removeItem(PREFIX + id);
  }
}

function isConversation(value) {
  return (
    typeof value === "object" && value !== null &&
    typeof value.title === "string" && typeof value.system === "string" &&
    Number.isFinite(value.updated) && Array.isArray(value.messages) &&
    value.messages.every((m) => ROLES.includes(m?.role) && typeof m.content === "string")
  );
}

export const isConversationKey = (key) => key === null || key.startsWith(PREFIX);

export function newConversation(id, now) {
  return { id, title: "New conversation", system: "", created: now, updated: now, messages: [] };
}

/** Adds the user's message and the empty answer to it; returns the answer. */
export function ask(conversation, text, now) {
  if (!conversation.messages.length) conversation.title = titleOf(text);
  conversation.messages.push({ role: "user", content: text });
  return addAnswer(conversation, now);
}

/** Drops the answer at the index and what follows; returns the new, empty one. */
export function retry(conversation, index, now) {
  conversation.messages.length = index;
  return addAnswer(conversation, now);
}

/** A user's message changed: what follows no longer answers it. Returns the new, empty answer. */
export function edit(conversation, index, text, now) {
  conversation.messages.length = index;
  return ask(conversation, text, now);
}

function addAnswer(conversation, now) {
  const answer = { role: "assistant", content: "", status: "streaming" };
  conversation.messages.push(answer);
  conversation.updated = now;
  return answer;
}

/** What the model is sent: the system prompt and all messages before the last, empty answer. */
export function requestMessages(conversation) {
  const messages = conversation.messages.slice(0, -1).filter((message) => message.content !== "");
  const system = conversation.system.trim();
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...messages.map(({ role, content }) => ({ role, content })),
  ];
}

export function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  return line.length > 60 ? `${[...line].slice(0, 59).join("")}…` : line || "New conversation";
}

/** The file that "Export" writes. */
export function exportJSON(conversations) {
  return JSON.stringify({ format: "jaxserve-conversations", version: 1, conversations }, null, 2);
}
