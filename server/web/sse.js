// Server-sent events, read piece by piece (https://html.spec.whatwg.org/multipage/server-sent-events.html).
// Lines end with LF, CR or CRLF and nothing else; an event ends with an empty line.

export class SSEParser {
  #rest = "";
  #afterCR = false;
  #atStart = true;
  #data = [];
  #event = "";

  /** Takes the next piece of text, cut anywhere; returns the events it completed. */
  push(text) {
    if (this.#atStart && text) {
      this.#atStart = false;
      if (text[0] === "\uFEFF") text = text.slice(1);
    }
    if (this.#afterCR && text) {
      this.#afterCR = false;
      if (text[0] === "\n") text = text.slice(1);
    }
    const events = [];
    const buffer = this.#rest + text;
    const lineEnd = /\r\n|\n|\r/g;
    lineEnd.lastIndex = this.#rest.length;
    let start = 0;
    for (let match; (match = lineEnd.exec(buffer)); start = lineEnd.lastIndex) {
      this.#line(buffer.slice(start, match.index), events);
      this.#afterCR = match[0] === "\r" && lineEnd.lastIndex === buffer.length;
    }
    this.#rest = buffer.slice(start);
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length) {
        events.push({ event: this.#event || "message", data: this.#data.join("\n") });
      }
      this.#data = [];
      this.#event = "";
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value[0] === " ") value = value.slice(1);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
  }
}
