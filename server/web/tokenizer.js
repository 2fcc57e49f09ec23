// The tokenizer tab: text to ids and back, through /tokenize and /detokenize.

import { call } from "./api.js";
import { $, h } from "./dom.js";
import { visible } from "./format.js";
import { idsOf, tokenPieces } from "./vocabulary.js";

const WAIT_MS = 250;
const MOST_SHOWN = 5000;
const COLOURS = 6;

export class TokenizerTab {
  #timer = 0;
  #controller = null;

  constructor({ server }) {
    this.server = server;
    this.text = $("#tokenizer-text");
    this.ids = $("#tokenizer-ids");
    this.text.addEventListener("input", () => this.#later(() => this.#tokenize()));
    this.ids.addEventListener("input", () => this.#later(() => this.#detokenize()));
    $("#add-special").addEventListener("change", () => this.#later(() => this.#tokenize()));
  }

  /** Asks once no key was pressed for a moment; an older question's reply no longer counts. */
  #later(ask) {
    clearTimeout(this.#timer);
    this.#controller?.abort();
    this.#timer = setTimeout(async () => {
      this.#controller = new AbortController();
      try {
        this.#fail("");
        await ask();
      } catch (error) {
        if (error.name === "AbortError") return;
        this.#fail(error.message);
        this.server.failed(error);
      }
    }, WAIT_MS);
  }

  async #tokenize() {
    const prompt = this.text.value;
    const { tokens, token_strs: strings } = prompt ? await this.#tokens(prompt) : { tokens: [] };
    this.ids.value = tokens.join(", ");
    this.#show(tokens, tokenPieces(strings ?? [], prompt), prompt);
  }

  #tokens(prompt) {
    const special = $("#add-special").checked;
    const body = { model: this.server.model, prompt, add_special_tokens: special, return_token_strs: true };
    return call("tokenize", body, this.#controller.signal);
  }

  async #detokenize() {
    const ids = idsOf(this.ids.value);
    if (ids === null) return this.#fail("Ids are whole numbers, with commas or spaces between.");
    const body = { model: this.server.model, tokens: ids };
    const { prompt } = ids.length ? await call("detokenize", body, this.#controller.signal) : { prompt: "" };
    this.text.value = prompt;
    this.#show(ids, [], prompt);
  }

  /** Tokens without a known text are shown as their ids. */
  #show(ids, pieces, text) {
    const elements = ids.slice(0, MOST_SHOWN).map((id, i) => {
      const piece = pieces[i];
      const label = piece === undefined ? `${id}` : `${visible(piece)}: ${id}`;
      return h("span", { class: `piece c${i % COLOURS}`, title: label }, piece === undefined ? `${id} ` : lineEndsShown(piece));
    });
    $("#pieces").replaceChildren(...elements);
    const characters = [...text].length;
    const rate = ids.length ? `, ${(characters / ids.length).toFixed(2)} characters a token` : "";
    const cut = ids.length > MOST_SHOWN ? ` The first ${MOST_SHOWN} are shown.` : "";
    $("#token-count").textContent = `${ids.length} ${ids.length === 1 ? "token" : "tokens"}, ${characters} characters${rate}.${cut}`;
  }

  #fail(message) {
    $("#tokenizer-failure").textContent = message;
    $("#tokenizer-failure").hidden = !message;
  }
}

const lineEndsShown = (piece) => piece.replaceAll("\n", "↵\n");
