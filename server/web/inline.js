// Inline Markdown: emphasis, code, links, line breaks. The result is a list of strings and nodes
// {type: "em" | "strong" | "del" | "code" | "link" | "break", ...}.
// Emphasis follows CommonMark's delimiter runs (https://spec.commonmark.org/0.31.2/#phase-2-inline-structure).
// A picture becomes a link: fetching it would tell a stranger's server what was asked.

const MAX_DEPTH = 40;
const MAX_URL = 2000;
const SPECIAL = /[\\`*_~[\]!<\nh]/g;
const BARE_URL = /https?:\/\/[^\s<>"'`[\]]+/y;
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BREAK = /<br ?\/?>/iy;
const ESCAPABLE = /[!-/:-@[-`{-~]/;

/** The address if it is one that may be opened from an answer, else null. */
export function safeUrl(url) {
  return /^(?:https?:\/\/|mailto:)[^\s]/i.test(url) ? url : null;
}

/** The nodes of one paragraph's, heading's or cell's text. */
export function parseInline(text) {
  const scanner = { text, at: 0, tokens: [], brackets: [], lastRun: lastBacktickRuns(text) };
  while (scanner.at < text.length) {
    SPECIAL.lastIndex = scanner.at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    if (next > scanner.at) {
      scanner.tokens.push(text.slice(scanner.at, next));
      scanner.at = next;
    } else if (!special(scanner, text[next])) {
      scanner.tokens.push(text[next]);
      scanner.at += 1;
    }
  }
  return build(scanner.tokens);
}

/** Takes what stands at the scanner's place; false if it is plain text after all. */
function special(scanner, character) {
  switch (character) {
    case "\\": return escape(scanner);
    case "`": return codeSpan(scanner);
    case "*": case "_": case "~": return delimiterRun(scanner, character);
    case "[": return bracket(scanner, 1);
    case "!": return scanner.text[scanner.at + 1] === "[" && bracket(scanner, 2);
    case "]": return closeBracket(scanner);
    case "<": return angle(scanner);
    case "h": return bareUrl(scanner);
    default: return lineBreak(scanner);
  }
}

function take(scanner, token, length) {
  scanner.tokens.push(token);
  scanner.at += length;
  return true;
}

function escape(scanner) {
  const next = scanner.text[scanner.at + 1];
  if (next === "\n") {
    scanner.at += 1;
    return lineBreak(scanner);
  }
  return next !== undefined && ESCAPABLE.test(next) && take(scanner, next, 2);
}

function lineBreak(scanner) {
  const last = scanner.tokens.at(-1);
  if (typeof last === "string") scanner.tokens[scanner.tokens.length - 1] = last.trimEnd();
  return take(scanner, { type: "break" }, 1);
}

/** For each length of a run of backticks, where the last such run starts. */
function lastBacktickRuns(text) {
  const last = new Map();
  for (const run of text.matchAll(/`+/g)) last.set(run[0].length, run.index);
  return last;
}

function codeSpan(scanner) {
  const { text, at, lastRun } = scanner;
  let length = 1;
  while (text[at + length] === "`") length += 1;
  const fence = "`".repeat(length);
  if (lastRun.get(length) > at) {
    const runs = /`+/g;
    runs.lastIndex = at + length;
    for (let run; (run = runs.exec(text)); ) {
      if (run[0].length !== length) continue;
      let inner = text.slice(at + length, run.index).replaceAll("\n", " ");
      if (/^ .*[^ ].* $/.test(inner)) inner = inner.slice(1, -1);
      return take(scanner, { type: "code", text: inner }, run.index + length - at);
    }
  }
  return take(scanner, fence, length);
}

const isSpace = (character) => character === undefined || /\s/.test(character);
const isPunctuation = (character) => character !== undefined && /[\p{P}\p{S}]/u.test(character);

function delimiterRun(scanner, character) {
  const { text, at } = scanner;
  let length = 1;
  while (text[at + length] === character) length += 1;
  const [before, after] = [text[at - 1], text[at + length]];
  const left = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
  const right = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
  const within = character === "_";
  const canOpen = left && (!within || !right || isPunctuation(before));
  const canClose = right && (!within || !left || isPunctuation(after));
  if (character === "~" && length !== 2) return take(scanner, text.slice(at, at + length), length);
  const token = { type: "run", character, count: length, length, canOpen, canClose, opens: [], closes: [] };
  return take(scanner, token, length);
}

function angle(scanner) {
  const { text, at } = scanner;
  BREAK.lastIndex = at;
  const broken = BREAK.exec(text);
  if (broken) return take(scanner, { type: "break" }, broken[0].length);
  ANGLE_URL.lastIndex = at;
  const found = ANGLE_URL.exec(text);
  return found !== null && take(scanner, link(found[1], [found[1]]), found[0].length);
}

function bareUrl(scanner) {
  const { text, at } = scanner;
  if (/[\p{L}\p{N}_]/u.test(text[at - 1] ?? "")) return false;
  BARE_URL.lastIndex = at;
  const found = BARE_URL.exec(text);
  if (!found) return false;
  let url = found[0];
  let surplus = url.split(")").length - url.split("(").length;
  while (/[.,;:!?*_~]$/.test(url) || (surplus > 0 && url.endsWith(")"))) {
    if (url.endsWith(")")) surplus -= 1;
    url = url.slice(0, -1);
  }
  return /\/\/./.test(url) && take(scanner, link(url, [url]), url.length);
}

/** A node's text alone: a link inside a link's label is only this. */
function textOf(node) {
  if (typeof node === "string") return node;
  return node.text ?? (node.children ?? []).map(textOf).join("");
}

const link = (href, children) => ({ type: "link", href, children });

function bracket(scanner, length) {
  scanner.brackets.push({ index: scanner.tokens.length, image: length === 2 });
  return take(scanner, scanner.text.slice(scanner.at, scanner.at + length), length);
}

function closeBracket(scanner) {
  const opener = scanner.brackets.pop();
  if (!opener) return false;
  const target = destination(scanner.text, scanner.at + 1);
  const url = target && safeUrl(target.url);
  if (!url) return false;
  const label = scanner.tokens.splice(opener.index).slice(1);
  const children = build(label.map((token) => (token.type === "link" ? textOf(token) : token)));
  if (!opener.image) scanner.brackets = scanner.brackets.filter((other) => other.image);
  return take(scanner, link(url, children.length ? children : [url]), target.end - scanner.at);
}

/** What `(url "title")` at the place names, and where it ends; null if it is no such thing. */
function destination(text, start) {
  if (text[start] !== "(") return null;
  let at = start + 1;
  let depth = 0;
  const limit = Math.min(text.length, start + MAX_URL);
  for (; at < limit && depth <= 32; at += 1) {
    if (text[at] === "(") depth += 1;
    else if (text[at] === ")" && depth-- === 0) break;
    else if (/\s/.test(text[at])) break;
  }
  const url = text.slice(start + 1, at).replace(/^<(.*)>$/, "$1");
  const rest = /^\s{0,9}(?:"[^"]{0,999}"|'[^']{0,999}')?\s{0,9}\)/.exec(text.slice(at, at + MAX_URL));
  return rest && depth <= 32 ? { url, end: at + rest[0].length } : null;
}

/** Pairs the delimiter runs; each run then knows which elements it opens and closes. */
function pairRuns(tokens) {
  const openers = [];
  const floor = new Map();
  for (const closer of tokens.filter((token) => token.type === "run")) {
    while (closer.canClose && closer.count > 0) {
      const key = `${closer.character}${closer.canOpen}${closer.length % 3}`;
      const found = findOpener(openers, closer, floor.get(key) ?? 0);
      if (found < 0) {
        floor.set(key, openers.length);
        break;
      }
      const opener = openers[found];
      const used = closer.character === "~" || (opener.count > 1 && closer.count > 1) ? 2 : 1;
      const type = closer.character === "~" ? "del" : used === 2 ? "strong" : "em";
      opener.count -= used;
      closer.count -= used;
      opener.opens.push(type);
      closer.closes.push(type);
      openers.length = opener.count > 0 ? found + 1 : found;
      for (const [name, height] of floor) floor.set(name, Math.min(height, openers.length));
    }
    if (closer.canOpen && closer.count > 0) openers.push(closer);
  }
}

function findOpener(openers, closer, floor) {
  for (let i = openers.length - 1; i >= floor; i -= 1) {
    const opener = openers[i];
    if (opener.character !== closer.character) continue;
    const ruleOfThree =
      (opener.canClose || closer.canOpen) &&
      (opener.length + closer.length) % 3 === 0 &&
      (opener.length % 3 !== 0 || closer.length % 3 !== 0);
    if (!ruleOfThree) return i;
  }
  return -1;
}

/** The tree of a list of tokens. Past the greatest depth, emphasis has no effect. */
function build(tokens) {
  pairRuns(tokens);
  const root = [];
  const stack = [root];
  const add = (node) => {
    const children = stack.at(-1);
    if (typeof node === "string" && typeof children.at(-1) === "string") {
      children[children.length - 1] += node;
    } else if (node !== "") {
      children.push(node);
    }
  };
  for (const token of tokens) {
    if (token.type !== "run") {
      add(token);
      continue;
    }
    for (let i = 0; i < token.closes.length; i += 1) stack.pop();
    add(token.character.repeat(token.count));
    for (const type of token.opens.toReversed()) {
      if (stack.length > MAX_DEPTH) {
        stack.push(stack.at(-1));
        continue;
      }
      const node = { type, children: [] };
      add(node);
      stack.push(node.children);
    }
  }
  return root;
}
