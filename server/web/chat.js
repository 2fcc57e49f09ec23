// The chat tab: conversations at the left, messages, and the box to write in. Every conversation may
// have an answer under way; it goes on while another conversation is shown.

import { stream } from "./api.js";
import { $, download, growWithText, h, iconButton, notify } from "./dom.js";
import { answerStats } from "./format.js";
import { messageElement, showMessage } from "./message.js";
import * as conversations from "./store.js";

const SAVE_MS = 2000;
const NEAR_END_PX = 60;

export class Chat {
  #runs = new Map(); // conversation id -> {conversation, answer, controller}
  #current;
  #storageFull = false;

  constructor({ server, settings }) {
    this.server = server;
    this.settings = settings;
    this.store = new conversations.ConversationStore(localStorage);
    this.log = $("#messages");
    this.box = $("#composer textarea");
    this.fitBox = growWithText(this.box);
    $("#composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#runs.has(this.#current.id)) this.stop();
      else this.#send();
    });
    this.box.addEventListener("keydown", (event) => this.#key(event));
    $("#new-chat").addEventListener("click", () => this.open(null));
    $("#export-chat").addEventListener("click", () => this.#export());
    $("#to-end").addEventListener("click", () => this.#toEnd());
    this.log.addEventListener("scroll", () => this.#showToEnd());
    server.addEventListener("change", () => this.#showComposer());
    addEventListener("storage", (event) => conversations.isConversationKey(event.key) && this.#showList());
    this.open(this.store.list()[0]?.id ?? null);
  }

  /** Shows the conversation; null: a new one. */
  open(id) {
    const running = this.#runs.get(id)?.conversation;
    const stored = id === null ? null : running ?? this.store.load(id);
    this.#current = stored ?? conversations.newConversation(crypto.getRandomValues(new Uint32Array(2)).join("-"), Date.now());
    if (!running) {
      for (const message of this.#current.messages) if (message.status === "streaming") message.status = "stopped";
    }
    this.settings.showSystem(this.#current.system);
    this.#showAll();
    if (matchMedia("(max-width: 900px)").matches) document.body.classList.remove("show-list");
    if (matchMedia("(pointer: fine)").matches) this.box.focus();
  }

  setSystem(text) {
    this.#current.system = text;
    if (this.#current.messages.length) this.#save(this.#current);
  }

  /** Stops the answer under way in the shown conversation; false if there is none. */
  stop() {
    const run = this.#runs.get(this.#current.id);
    run?.controller.abort();
    return run !== undefined;
  }

  #send() {
    const text = this.box.value.trim();
    if (!text || this.server.state !== "ready") return;
    this.box.value = "";
    this.fitBox();
    this.#run(conversations.ask(this.#current, text, Date.now()));
  }

  /** Has the answer, the current conversation's last message, written by the model. */
  async #run(answer) {
    const conversation = this.#current;
    const run = { conversation, answer, controller: new AbortController() };
    this.#runs.set(conversation.id, run);
    this.#save(conversation);
    this.#showAll();
    this.#toEnd();
    try {
      await this.#receive(run);
      answer.status = "done";
    } catch (error) {
      answer.status = run.controller.signal.aborted ? "stopped" : "error";
      if (answer.status === "error") answer.error = error.message;
      if (answer.status === "error") this.server.failed(error);
    }
    this.#runs.delete(conversation.id);
    conversation.updated = Date.now();
    if (this.store.load(conversation.id)) this.#save(conversation);
    this.#showAnswer(run);
    this.#showComposer();
    this.#showList();
    if (conversation === this.#current) $("#announce").textContent = answer.status === "done" ? "The answer is complete." : "";
  }

  async #receive({ conversation, answer, controller }) {
    const body = {
      model: this.server.model,
      messages: conversations.requestMessages(conversation),
      stream_options: { include_usage: true },
      ...this.settings.body(),
    };
    const times = { sent: performance.now(), first: null, last: null, usage: null };
    let drawing = false;
    let saved = times.sent;
    try {
      for await (const chunk of stream("v1/chat/completions", body, controller.signal)) {
        const choice = chunk.choices?.[0];
        if (chunk.usage) times.usage = chunk.usage;
        if (choice?.finish_reason) answer.finish = choice.finish_reason;
        if (!choice?.delta?.content) continue;
        answer.content += choice.delta.content;
        times.last = performance.now();
        times.first ??= times.last;
        if (!drawing) {
          drawing = true;
          requestAnimationFrame(() => {
            drawing = false;
            this.#showAnswer({ conversation, answer });
          });
        }
        if (times.last - saved > SAVE_MS) {
          saved = times.last;
          this.#save(conversation);
        }
      }
    } finally {
      answer.stats = answerStats(times);
    }
  }

  #save(conversation) {
    const saved = this.store.save(conversation);
    if (!saved && !this.#storageFull) {
      notify("The browser's storage is full: this conversation is not kept. Export it, or delete old ones.");
    }
    this.#storageFull = !saved;
  }

  #showAll() {
    const { messages } = this.#current;
    this.log.replaceChildren(...messages.map((message, index) => this.#element(message, index)));
    $("#empty").hidden = messages.length > 0;
    this.#showComposer();
    this.#showList();
    this.#toEnd();
  }

  #element(message, index) {
    const conversation = this.#current;
    const idle = (action) => (...args) => {
      if (this.#runs.has(conversation.id)) notify("Stop the answer first (Esc).");
      else action(...args);
    };
    const answered = (action) => idle((...args) => {
      if (this.server.state !== "ready") notify("The server is not ready.");
      else this.#run(action(conversation, index, ...args, Date.now()));
    });
    if (message.role === "user") return messageElement(message, { edit: answered(conversations.edit) });
    const edit = idle((text) => {
      message.content = text;
      delete message.error;
      this.#save(conversation);
      this.#showAll();
    });
    return messageElement(message, { edit, retry: answered(conversations.retry) });
  }

  #showAnswer({ conversation, answer }) {
    if (conversation !== this.#current) return;
    const element = this.log.children[conversation.messages.indexOf(answer)];
    const follow = this.#isAtEnd();
    if (element) showMessage(element, answer);
    if (follow) this.#toEnd();
    else this.#showToEnd();
  }

  #showComposer() {
    const running = this.#runs.has(this.#current.id);
    const button = $("#send");
    button.disabled = !running && this.server.state !== "ready";
    button.classList.toggle("stop", running);
    button.setAttribute("aria-label", running ? "Stop" : "Send");
    button.title = running ? "Stop (Esc)" : "Send (Enter)";
  }

  #showList() {
    const items = this.store.list().map((conversation) => {
      const { id, title } = conversation;
      const open = h("button", { type: "button", class: "open", title, "aria-current": id === this.#current.id ? "true" : null, onclick: () => this.open(id) }, title);
      const running = this.#runs.has(id) ? h("span", { class: "dot", title: "Answering" }) : null;
      return h("li", {}, open, running, iconButton("delete", `Delete ${title}`, () => this.#delete(conversation)));
    });
    $("#conversations").replaceChildren(...items);
  }

  #delete(conversation) {
    this.#runs.get(conversation.id)?.controller.abort();
    const kept = this.store.load(conversation.id);
    this.store.remove(conversation.id);
    if (conversation.id === this.#current.id) this.open(this.store.list()[0]?.id ?? null);
    else this.#showList();
    notify("Conversation deleted.", {
      label: "Undo",
      run: () => {
        this.#save(kept);
        this.open(kept.id);
      },
    });
  }

  #export() {
    const day = new Date().toISOString().slice(0, 10);
    download(`conversations-${day}.json`, conversations.exportJSON(this.store.list()));
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      if (!this.#runs.has(this.#current.id)) this.#send();
    } else if (event.key === "ArrowUp" && this.box.value === "") {
      const mine = this.log.querySelectorAll(".user [aria-label='Edit message']");
      if (mine.length) {
        event.preventDefault();
        mine[mine.length - 1].click();
      }
    }
  }

  #isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_END_PX;
  }

  #toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
    this.#showToEnd();
  }

  #showToEnd() {
    $("#to-end").hidden = this.#isAtEnd();
  }
}
