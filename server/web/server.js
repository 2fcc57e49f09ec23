// What is known of the server: how far its start-up is, which models it has.

import { ApiError, apiKey, call } from "./api.js";
import { $, h } from "./dom.js";
import { describeStartup } from "./format.js";

const POLL_MS = 1000;

/** Fires "change" whenever `state` does: "starting", "ready", "locked" (no valid key), "away". */
export class Server extends EventTarget {
  state = "starting";
  models = [];
  startup = { stage: "process", done: 0, total: 0, eta_s: null };
  #checking = false;

  get model() {
    return $("#model").value;
  }

  /** Asks until the server is ready, or says that it wants a key. Safe to call at any time. */
  async check() {
    if (this.#checking) return;
    this.#checking = true;
    try {
      while (!(await this.#look())) await new Promise((done) => setTimeout(done, POLL_MS));
    } finally {
      this.#checking = false;
    }
  }

  /** To be told of every failed request: some mean that the server must be looked at again. */
  failed(error) {
    if (error instanceof ApiError && [0, 401, 502, 503].includes(error.status)) this.check();
  }

  async #look() {
    try {
      this.startup = await this.#startup();
      if (this.startup.stage === "ready") {
        this.models = (await call("v1/models")).data;
        this.#become("ready");
        return true;
      }
      this.#become("starting");
    } catch (error) {
      const locked = error.status === 401 || error.status === 403;
      this.#become(locked ? "locked" : error.status === 503 ? "starting" : "away");
      return locked;
    }
    return false;
  }

  async #startup() {
    try {
      return await call("startup");
    } catch (error) {
      if (error.status !== 404) throw error;
      return { stage: "ready" };
    }
  }

  #become(state) {
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }
}

/** Keeps the banner, the status light and the list of models as the server is. */
export function showServer(server) {
  const select = $("#model");
  server.addEventListener("change", () => {
    const { state, startup, models } = server;
    document.body.dataset.server = state;
    $("#banner").hidden = state === "ready";
    $("#banner-text").textContent = bannerText(server);
    const known = state === "starting" && startup.total > 0;
    const bar = $("#banner progress");
    bar.hidden = state !== "starting";
    if (known) [bar.max, bar.value] = [startup.total, startup.done];
    else bar.removeAttribute("value");
    if (state === "ready" && [...select.options].map((o) => o.value).join("\n") !== models.map((m) => m.id).join("\n")) {
      const chosen = select.value;
      select.replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)));
      if (models.some(({ id }) => id === chosen)) select.value = chosen;
    }
    select.disabled = models.length < 2;
  });
}

function bannerText({ state, startup }) {
  if (state === "locked") {
    return apiKey.get() ? "The API key is not valid. Enter another in the settings." : "This server wants an API key. Enter it in the settings.";
  }
  if (state === "away") return "The server cannot be reached. Trying again…";
  return `The model is not ready yet: ${describeStartup(startup)}.`;
}
