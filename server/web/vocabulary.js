// From a tokenizer's vocabulary strings to the pieces of the text they stand for.

/** GPT-2's byte alphabet: printable bytes are themselves, the others are moved to U+0100 and up. */
function byteAlphabet() {
  const bytes = new Map();
  let moved = 256;
  for (let byte = 0; byte < 256; byte += 1) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    bytes.set(String.fromCharCode(printable ? byte : moved++), byte);
  }
  return bytes;
}

const ALPHABET = byteAlphabet();
const HEX_BYTE = /^<0x([0-9A-F]{2})>$/;

function bytesOfByteLevel(token) {
  const bytes = [...token].map((character) => ALPHABET.get(character));
  return bytes.includes(undefined) ? encode(token) : bytes;
}

function bytesOfSentencePiece(token) {
  const hex = HEX_BYTE.exec(token);
  return hex ? [parseInt(hex[1], 16)] : encode(token.replaceAll("▁", " "));
}

const encode = (text) => [...new TextEncoder().encode(text)];

/** A piece that ends within a character is shown as its bytes: ⟨e2 82⟩. */
function decode(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return `⟨${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩`;
  }
}

/**
 * The text of each token. The strings may be text already, or byte-level or SentencePiece vocabulary
 * entries: the reading that gives back `text` is the right one (specials may stand around it).
 */
export function tokenPieces(strings, text) {
  if (strings.join("").includes(text)) return strings;
  const wanted = encode(text).join(",");
  for (const bytesOf of [bytesOfByteLevel, bytesOfSentencePiece]) {
    const pieces = strings.map(bytesOf);
    if (pieces.flat().join(",").includes(wanted)) return pieces.map(decode);
  }
  return strings;
}

/** The ids in a text such as "1, 2 3" or "[1, 2, 3]"; null if something else stands there. */
export function idsOf(text) {
  const words = text.replace(/^\s*\[|\]\s*$/g, "").split(/[\s,]+/).filter(Boolean);
  return words.every((word) => /^\d{1,9}$/.test(word)) ? words.map(Number) : null;
}
