// Markdown to a tree of plain objects; render.js makes elements of it. No HTML text is ever made, so
// whatever a model writes can only become text. Work is linear in the text but for bounded factors.
//
// A block: {type, source, ...}. Types: paragraph, heading, code, quote, list, table, rule.

import { parseInline } from "./inline.js";

const MAX_DEPTH = 12;
const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*(\S*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DELIMITER_ROW = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** The blocks of a text. Each block's `source` is its own text: equal source, equal block. */
export function parseMarkdown(text) {
  const lines = text.replaceAll("\t", "    ").split(/\r\n|\r|\n/);
  return parseBlocks(lines, 0);
}

function parseBlocks(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] = parseBlock(lines, at, depth);
    block.source = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

/** The block that starts at the line, and the line after it. */
function parseBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return code(lines, at);
  if (HEADING.test(line)) return heading(line, at);
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function code(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  const indent = indentOf(lines[at]);
  let end = at + 1;
  while (end < lines.length && !closesFence(lines[end], fence)) end += 1;
  const text = lines.slice(at + 1, end).map((line) => dedent(line, indent));
  return [{ type: "code", language, text: text.join("\n") }, Math.min(end + 1, lines.length)];
}

function closesFence(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

function heading(line, at) {
  const [start, marks] = HEADING.exec(line);
  const text = line.slice(start.length).trim().replace(/(?:^|[ \t])#+$/, "").trim();
  return [{ type: "heading", level: marks.length, children: parseInline(text) }, at + 1];
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, end];
}

function list(lines, at, depth) {
  const [, , mark] = ITEM.exec(lines[at]);
  const ordered = mark.length > 1;
  const kind = mark.at(-1);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || match[2].at(-1) !== kind || RULE.test(lines[end])) break;
    const itemEnd = endOfItem(lines, end, match);
    items.push(item(lines.slice(end, itemEnd), match, depth));
    end = itemEnd;
    const next = nextFilled(lines, end);
    const following = next < lines.length && ITEM.exec(lines[next]);
    if (following && following[2].at(-1) === kind) end = next;
  }
  return [{ type: "list", ordered, start: ordered ? parseInt(mark, 10) : null, items }, end];
}

/** The line after an item: what is indented below its marker belongs to it, and lazy paragraph lines. */
function endOfItem(lines, at, [, indent]) {
  const needed = indent.length + 2;
  let end = at + 1;
  while (end < lines.length) {
    if (isBlank(lines[end])) {
      const next = nextFilled(lines, end);
      if (next >= lines.length || indentOf(lines[next]) < needed) break;
      end = next;
    } else if (indentOf(lines[end]) >= needed || !startsBlock(lines, end)) {
      end += 1;
    } else {
      break;
    }
  }
  return end;
}

function item(lines, [start, indent, mark, space], depth) {
  const width = indent.length + mark.length + Math.min(Math.max(space.length, 1), 4);
  const inner = [lines[0].slice(start.length), ...lines.slice(1).map((l) => dedent(l, width))];
  const task = /^\[([ xX])\] /.exec(inner[0]);
  if (task) inner[0] = inner[0].slice(task[0].length);
  return { done: task ? task[1] !== " " : null, blocks: parseBlocks(inner, depth + 1) };
}

function isTable(lines, at) {
  const below = lines[at + 1];
  return (
    below !== undefined &&
    lines[at].includes("|") &&
    DELIMITER_ROW.test(below) &&
    cells(below).length === cells(lines[at]).length
  );
}

function table(lines, at) {
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : "left";
  });
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) end += 1;
  const row = (line) => {
    const found = cells(line);
    return align.map((_, column) => parseInline(found[column] ?? ""));
  };
  return [{ type: "table", align, head: row(lines[at]), rows: lines.slice(at + 2, end).map(row) }, end];
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  const found = [""];
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      found[found.length - 1] += "|";
      i += 1;
    } else if (text[i] === "|") {
      found.push("");
    } else {
      found[found.length - 1] += text[i];
    }
  }
  if (found.length > 1 && found.at(-1).trim() === "") found.pop();
  return found.map((cell) => cell.trim());
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end, depth)) end += 1;
  const text = lines.slice(at, end).map((line) => line.trimStart()).join("\n");
  return [{ type: "paragraph", children: parseInline(text) }, end];
}

/** Whether the line ends the paragraph before it; a number other than 1 does not start a list there. */
function interrupts(lines, at, depth) {
  const match = ITEM.exec(lines[at]);
  if (match && !RULE.test(lines[at])) {
    return depth < MAX_DEPTH && match[3] !== "" && (match[2].length === 1 || /^1[.)]$/.test(match[2]));
  }
  return startsBlock(lines, at) && !(depth >= MAX_DEPTH && QUOTE.test(lines[at]));
}

function startsBlock(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((start) => start.test(line)) || isTable(lines, at);
}

const isBlank = (line) => line.trim() === "";

const indentOf = (line) => line.length - line.trimStart().length;

const dedent = (line, width) => line.slice(Math.min(indentOf(line), width));

function nextFilled(lines, at) {
  while (at < lines.length && isBlank(lines[at])) at += 1;
  return at;
}
