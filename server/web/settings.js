// The panel at the right: system prompt of the conversation, sampling, API key, theme.

import { apiKey } from "./api.js";
import { $, h } from "./dom.js";
import { FIELDS, problem, samplingBody } from "./sampling.js";

const SAMPLING = "jaxserve.sampling";
const THEME = "jaxserve.theme";

export class Settings {
  #values = readValues();

  /** `onKey()` is called when the API key was changed, `onSystem(text)` when the system prompt was. */
  constructor({ onKey, onSystem }) {
    const panel = $("#sampling");
    panel.append(...FIELDS.map((field) => this.#field(field)), this.#stopField());
    $("#sampling-reset").addEventListener("click", () => {
      this.#values = {};
      this.#keep();
      for (const input of panel.querySelectorAll("input, textarea")) {
        input.value = "";
        input.dispatchEvent(new Event("input"));
      }
    });
    $("#system").addEventListener("input", (event) => onSystem(event.target.value));
    $("#api-key").value = apiKey.get();
    $("#api-key").addEventListener("change", (event) => {
      apiKey.set(event.target.value.trim());
      onKey();
    });
    this.#themeSwitch();
  }

  /** The sampling fields of a request. */
  body() {
    return samplingBody(this.#values);
  }

  showSystem(text) {
    $("#system").value = text;
  }

  #field(field) {
    const id = `sampling-${field.name}`;
    const error = h("span", { class: "field-error", id: `${id}-error` });
    const input = h("input", {
      id, inputmode: "decimal", autocomplete: "off", placeholder: "default", "aria-describedby": `${id}-error ${id}-hint`,
      oninput: () => {
        const wrong = problem(field, input.value);
        error.textContent = wrong ?? "";
        input.setAttribute("aria-invalid", String(wrong !== null));
        this.#values[field.name] = input.value;
        this.#keep();
      },
    });
    input.value = this.#values[field.name] ?? "";
    const hint = h("span", { class: "hint", id: `${id}-hint` }, field.hint);
    return h("div", { class: "field" }, h("label", { for: id }, field.label, hint), input, error);
  }

  #stopField() {
    const area = h("textarea", { id: "sampling-stop", rows: 2, placeholder: "none", oninput: () => {
      this.#values.stop = area.value;
      this.#keep();
    } });
    area.value = this.#values.stop ?? "";
    return h("div", { class: "field wide" }, h("label", { for: "sampling-stop" }, "Stop at", h("span", { class: "hint" }, "one text a line")), area);
  }

  #keep() {
    try {
      localStorage.setItem(SAMPLING, JSON.stringify(this.#values));
    } catch {
      // Storage full or switched off: the values hold until the page is closed.
    }
  }

  #themeSwitch() {
    const root = document.documentElement;
    for (const input of document.querySelectorAll("input[name=theme]")) {
      input.checked = input.value === (root.dataset.theme ?? "auto");
      input.addEventListener("change", () => {
        if (input.value === "auto") {
          delete root.dataset.theme;
          localStorage.removeItem(THEME);
        } else {
          root.dataset.theme = input.value;
          localStorage.setItem(THEME, input.value);
        }
      });
    }
  }
}

function readValues() {
  try {
    const stored = Object.entries(JSON.parse(localStorage.getItem(SAMPLING)) ?? {});
    return Object.fromEntries(stored.filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}
