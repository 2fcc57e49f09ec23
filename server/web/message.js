// One message of a conversation on the page.

import { copyButton, growWithText, h, iconButton } from "./dom.js";
import { describeStats } from "./format.js";
import { showMarkdown } from "./render.js";

/** The element of a message. `actions`: edit(text) and, for answers, retry(). */
export function messageElement(message, actions) {
  const body = h("div", { class: "body" });
  const element = h("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Answer" }, body);
  if (message.role === "assistant") element.append(h("p", { class: "failure", role: "alert", hidden: true }));
  element.append(h("footer", {}, h("span", { class: "stats" }), buttons(element, message, actions)));
  showMessage(element, message);
  return element;
}

/** Brings the element up to date with its message. */
export function showMessage(element, message) {
  const body = element.querySelector(".body");
  const streaming = message.status === "streaming";
  element.setAttribute("aria-busy", String(streaming));
  element.classList.toggle("streaming", streaming);
  if (message.role === "user") {
    body.textContent = message.content;
    return;
  }
  showMarkdown(body, message.content);
  const failure = element.querySelector(".failure");
  failure.hidden = !message.error;
  if (message.error && failure.textContent !== message.error) failure.textContent = message.error;
  element.querySelector(".stats").textContent = statsLine(message);
}

function statsLine({ status, finish, stats }) {
  const parts = [describeStats(stats)];
  if (status === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut at the longest length");
  return parts.filter(Boolean).join(" · ");
}

function buttons(element, message, actions) {
  const copy = copyButton(() => message.content, "Copy message");
  const edit = iconButton("edit", "Edit message", () => startEdit(element, message, actions));
  const retry = actions.retry ? iconButton("retry", "Retry answer", actions.retry) : null;
  return h("span", { class: "actions" }, copy, edit, retry);
}

function startEdit(element, message, actions) {
  if (element.querySelector(".editor")) return;
  const body = element.querySelector(".body");
  const again = message.role === "user";
  const area = h("textarea", { rows: 1, "aria-label": "Message text" });
  area.value = message.content;
  const close = () => {
    editor.remove();
    element.classList.remove("editing");
    element.querySelector("[aria-label='Edit message']").focus();
  };
  const save = () => {
    const text = area.value.trim();
    close();
    if (text && (again || text !== message.content)) actions.edit(text);
  };
  const editor = h("div", { class: "editor" }, area, h("div", { class: "row" },
    h("button", { type: "button", class: "primary", onclick: save }, again ? "Send" : "Save"),
    h("button", { type: "button", onclick: close }, "Cancel"),
    again ? h("span", { class: "hint" }, "What follows is replaced by a new answer.") : null));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && again) {
      event.preventDefault();
      save();
    }
  });
  element.classList.add("editing");
  body.after(editor);
  const fit = growWithText(area);
  fit();
  area.focus();
}
