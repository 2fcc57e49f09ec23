// Puts the page together: tabs, drawers, keys, and the parts behind them.

import { Chat } from "./chat.js";
import { Completion } from "./completion.js";
import { $ } from "./dom.js";
import { Server, showServer } from "./server.js";
import { Settings } from "./settings.js";
import { TokenizerTab } from "./tokenizer.js";

const server = new Server();
showServer(server);
const settings = new Settings({ onKey: () => server.check(), onSystem: (text) => chat.setSystem(text) });
const chat = new Chat({ server, settings });
const completion = new Completion({ server, settings });
new TokenizerTab({ server });

const tabs = [...document.querySelectorAll("[role=tab]")];

function showTab(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    $(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
  }
  document.body.dataset.tab = tab.getAttribute("aria-controls");
  history.replaceState(null, "", `#${document.body.dataset.tab}`);
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => showTab(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    showTab(next);
    next.focus();
  });
}
showTab(tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? tabs[0]);

/** A button that opens or closes a panel at the side; from the width on it is open at first. */
function drawer(button, name, width) {
  const roomy = matchMedia(`(min-width: ${width}px)`);
  const show = () => button.setAttribute("aria-expanded", String(document.body.classList.contains(name)));
  button.addEventListener("click", () => document.body.classList.toggle(name));
  new MutationObserver(show).observe(document.body, { attributeFilter: ["class"] });
  document.body.classList.toggle(name, roomy.matches);
  roomy.addEventListener("change", () => document.body.classList.toggle(name, roomy.matches));
}

drawer($("#toggle-list"), "show-list", 901);
drawer($("#toggle-settings"), "show-settings", 1400);
const closeDrawers = () => document.body.classList.remove("show-list", "show-settings");
$("#scrim").addEventListener("click", closeDrawers);
$("#close-settings").addEventListener("click", () => document.body.classList.remove("show-settings"));

const help = $("#help");
$("#open-help").addEventListener("click", () => help.showModal());

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (help.open) help.close();
    else help.showModal();
  } else if (event.key === "Escape" && !help.open && !event.isComposing) {
    const stopped = document.body.dataset.tab === "completion" ? completion.stop() : chat.stop();
    if (!stopped && getComputedStyle($("#scrim")).display !== "none") closeDrawers();
  }
});

server.check();
