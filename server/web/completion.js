// The completion tab: raw text in, raw text out, each token coloured by its probability. Pointing at a
// token, or going to it with the arrow keys, shows what else the model thought of.

import { stream } from "./api.js";
import { $, copyButton, h } from "./dom.js";
import { answerStats, describeStats, likelihood, percent, visible } from "./format.js";
import { completionTokens, sortedAlternatives } from "./logprobs.js";

const HIDE_MS = 250;

export class Completion {
  #controller = null;
  #tokens = []; // {text, logprob, top, replaceable}
  #text = "";
  #prompt = "";
  #hideTimer = 0;

  constructor({ server, settings }) {
    this.server = server;
    this.settings = settings;
    this.form = $("#completion form");
    this.prompt = $("#prompt");
    this.output = $("#completion-output");
    this.card = $("#alternatives");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.stop()) this.#run(this.prompt.value);
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
    $("#append").addEventListener("click", () => this.#append());
    $("#completion-tools").append(copyButton(() => this.#text, "Copy completion"));
    this.#listen();
    server.addEventListener("change", () => this.#show());
    this.#show();
  }

  /** Stops the completion under way; false if there is none. */
  stop() {
    this.#controller?.abort();
    return this.#controller !== null;
  }

  async #run(prompt) {
    if (!prompt || this.server.state !== "ready") return;
    this.#prompt = prompt;
    this.#tokens = [];
    this.#text = "";
    this.#hide();
    this.output.replaceChildren();
    const failure = $("#completion-failure");
    failure.hidden = true;
    const controller = new AbortController();
    this.#controller = controller;
    this.#show();
    let note = "";
    const times = { sent: performance.now(), first: null, last: null, usage: null };
    try {
      note = await this.#receive(prompt, times, controller.signal);
    } catch (error) {
      note = controller.signal.aborted ? "stopped" : "";
      failure.hidden = controller.signal.aborted;
      failure.textContent = error.message;
      if (!controller.signal.aborted) this.server.failed(error);
    }
    this.#controller = null;
    $("#completion-stats").textContent = [describeStats(answerStats(times)), note].filter(Boolean).join(" · ");
    this.#show();
  }

  async #receive(prompt, times, signal) {
    const body = {
      model: this.server.model,
      prompt,
      stream_options: { include_usage: true },
      ...this.settings.body(),
      max_tokens: $("#completion-length").valueAsNumber || 64,
      logprobs: $("#completion-alternatives").valueAsNumber || 0,
    };
    let note = "";
    for await (const chunk of stream("v1/completions", body, signal)) {
      if (chunk.usage) times.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (choice.finish_reason === "length") note = "cut at the longest length";
      if (choice.text || choice.logprobs?.tokens?.length) {
        times.last = performance.now();
        times.first ??= times.last;
        this.#add(choice);
      }
    }
    return note;
  }

  #add(choice) {
    this.#text += choice.text ?? "";
    for (const token of completionTokens(choice)) {
      const index = this.#tokens.push(token) - 1;
      const known = typeof token.logprob === "number";
      const element = h("span", {
        class: known ? `token p${likelihood(token.logprob)}` : "token",
        role: "button", tabindex: index ? -1 : 0, "data-index": index,
        "aria-label": known ? `${visible(token.text)}, ${percent(token.logprob)}` : visible(token.text),
      }, token.text);
      this.output.append(element);
    }
  }

  #listen() {
    const shown = (event) => event.target.closest?.(".token");
    this.output.addEventListener("mouseover", (event) => shown(event) && this.#showCard(shown(event)));
    this.output.addEventListener("focusin", (event) => shown(event) && this.#showCard(shown(event)));
    this.output.addEventListener("click", (event) => shown(event)?.focus());
    this.output.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = step && this.output.children[Number(event.target.dataset.index) + step];
      if (event.key === "ArrowDown") $("button", this.card)?.focus();
      else if (next) this.#moveTo(event.target, next);
      else return;
      event.preventDefault();
    });
    for (const element of [this.output, this.card]) {
      element.addEventListener("mouseleave", () => this.#hideSoon());
      element.addEventListener("focusout", () => this.#hideSoon());
    }
    for (const type of ["mouseenter", "focusin"]) {
      this.card.addEventListener(type, () => clearTimeout(this.#hideTimer));
    }
    $("#completion").addEventListener("scroll", () => this.#hide(), { passive: true });
  }

  #moveTo(from, to) {
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }

  #showCard(element) {
    clearTimeout(this.#hideTimer);
    const index = Number(element.dataset.index);
    const token = this.#tokens[index];
    if (typeof token.logprob !== "number") return this.#hide();
    for (const other of this.output.querySelectorAll(".shown")) other.classList.remove("shown");
    element.classList.add("shown");
    this.card.replaceChildren(
      h("p", {}, h("code", {}, visible(token.text)), ` ${percent(token.logprob)}`),
      h("ol", {}, sortedAlternatives(token).map((other) => this.#alternative(other, token, index))));
    this.card.hidden = false;
    this.#place(element);
  }

  #alternative({ text, logprob }, token, index) {
    const bar = h("span", { class: "bar" });
    bar.style.setProperty("--share", Math.exp(logprob));
    const label = [h("code", {}, visible(text)), h("span", {}, percent(logprob)), bar];
    if (text === token.text || !this.#isText(index)) {
      return h("li", { class: text === token.text ? "chosen" : null }, h("div", { class: "alternative" }, label));
    }
    const go = () => this.#continueWith(index, text);
    return h("li", {}, h("button", { type: "button", class: "alternative", title: "Go on with this token instead", onclick: go }, label));
  }

  /** Whether the tokens before the index are exactly the text before it (no bytes, no specials). */
  #isText(index) {
    const before = this.#tokens.slice(0, index).map((token) => token.text).join("");
    return this.#text.startsWith(before);
  }

  #continueWith(index, text) {
    if (this.#controller || text.startsWith("bytes:")) return;
    const before = this.#tokens.slice(0, index).map((token) => token.text).join("");
    this.prompt.value = this.#prompt + before + text;
    this.#run(this.prompt.value);
  }

  #append() {
    this.prompt.value = this.#prompt + this.#text;
    this.prompt.scrollTop = this.prompt.scrollHeight;
    this.prompt.focus();
  }

  #place(element) {
    const at = element.getClientRects()[0];
    const { offsetWidth: width, offsetHeight: height } = this.card;
    const below = at.bottom + height + 8 < innerHeight;
    this.card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
    this.card.style.top = `${below ? at.bottom + 4 : Math.max(8, at.top - height - 4)}px`;
  }

  #hideSoon() {
    clearTimeout(this.#hideTimer);
    this.#hideTimer = setTimeout(() => this.#hide(), HIDE_MS);
  }

  #hide() {
    this.card.hidden = true;
    for (const other of this.output.querySelectorAll(".shown")) other.classList.remove("shown");
  }

  #show() {
    const running = this.#controller !== null;
    const button = $("#complete");
    button.textContent = running ? "Stop" : "Complete";
    button.disabled = !running && this.server.state !== "ready";
    $("#append").disabled = running || !this.#text;
    this.output.setAttribute("aria-busy", String(running));
    $("#completion-result").hidden = !running && !this.#tokens.length && $("#completion-failure").hidden;
    if (running) $("#completion-stats").textContent = "";
  }
}
