// The Markdown tree as elements. Addresses were checked by inline.js; everything else is text.

import { copyButton, h } from "./dom.js";
import { parseMarkdown } from "./markdown.js";

/** Shows the text in the element. Blocks that did not change since the last call stay as they are. */
export function showMarkdown(element, text) {
  const before = element.blocks ?? [];
  const blocks = parseMarkdown(text);
  blocks.forEach((block, i) => {
    const old = before[i];
    if (old?.source === block.source) return;
    const child = element.children[i];
    if (old?.type === "code" && block.type === "code" && old.language === block.language) {
      child.querySelector("code").textContent = block.text;
    } else if (child) {
      child.replaceWith(blockElement(block));
    } else {
      element.append(blockElement(block));
    }
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
  element.blocks = blocks;
}

function blockElement(block) {
  switch (block.type) {
    case "heading": return h(`h${Math.min(block.level + 2, 6)}`, {}, inline(block.children));
    case "code": return codeElement(block);
    case "quote": return h("blockquote", {}, block.blocks.map(blockElement));
    case "list": return listElement(block);
    case "table": return tableElement(block);
    case "rule": return h("hr");
    default: return h("p", {}, inline(block.children));
  }
}

function codeElement({ language, text }) {
  const code = h("code", {}, text);
  const bar = h("figcaption", {}, h("span", {}, language || "text"), copyButton(() => code.textContent, "Copy code"));
  return h("figure", { class: "code" }, bar, h("pre", { tabindex: 0 }, code));
}

function listElement({ ordered, start, items }) {
  const children = items.map(({ done, blocks }) => {
    const tight = blocks.map((block) => (block.type === "paragraph" ? h("div", {}, inline(block.children)) : blockElement(block)));
    const box = done === null ? null : h("span", { class: "task" }, done ? "☑ " : "☐ ");
    if (box && tight[0]) tight[0].prepend(box);
    return h("li", { class: box ? "has-task" : null }, tight);
  });
  return ordered ? h("ol", { start }, children) : h("ul", {}, children);
}

function tableElement({ align, head, rows }) {
  const row = (tag) => (cells) => h("tr", {}, cells.map((cell, i) => h(tag, { class: `to-${align[i]}` }, inline(cell))));
  const table = h("table", {}, h("thead", {}, row("th")(head)), h("tbody", {}, rows.map(row("td"))));
  return h("div", { class: "table", tabindex: 0 }, table);
}

function inline(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    if (node.type === "break") return h("br");
    if (node.type === "code") return h("code", {}, node.text);
    if (node.type !== "link") return h(node.type, {}, inline(node.children));
    const attributes = { href: node.href, target: "_blank", rel: "noopener noreferrer nofollow", title: node.href };
    return h("a", attributes, inline(node.children));
  });
}
