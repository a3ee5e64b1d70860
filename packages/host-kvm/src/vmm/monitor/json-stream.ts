/**
 * Cuts a stream of characters into JSON values: QMP's input is not made of lines. Half a value waits for the rest; what
 * can begin no object is garbage up to the end of its line.
 */

/** A value whose end has come, or a stretch of garbage. */
export type JsonPiece =
  | { readonly kind: 'value'; readonly text: string }
  | { readonly kind: 'garbage'; readonly text: string };

/** Longest value taken: a client that never closes its brackets must not fill the memory. */
const MAX_LENGTH = 1 << 20;

export class JsonStream {
  #text = '';
  /** Where the scan goes on, how deep it is, and whether inside a string. */
  #at = 0;
  #depth = 0;
  #inString = false;

  /** Takes more input; what is complete now. */
  feed(more: string): JsonPiece[] {
    this.#text += more;
    const pieces: JsonPiece[] = [];
    for (let piece = this.#next(); piece !== null; piece = this.#next()) pieces.push(piece);
    if (this.#text.length > MAX_LENGTH) {
      pieces.push({ kind: 'garbage', text: this.#text.slice(0, 32) });
      this.#cut(this.#text.length);
    }
    return pieces;
  }

  #cut(length: number): void {
    this.#text = this.#text.slice(length);
    this.#at = 0;
    this.#depth = 0;
    this.#inString = false;
  }

  #next(): JsonPiece | null {
    if (this.#depth === 0) {
      const blank = /^\s*/.exec(this.#text)?.[0].length ?? 0;
      if (blank > 0) this.#cut(blank);
      if (this.#text === '') return null;
      if (this.#text[0] !== '{' && this.#text[0] !== '[') {
        const end = this.#text.indexOf('\n');
        if (end < 0) return null;
        const text = this.#text.slice(0, end).trimEnd();
        this.#cut(end + 1);
        return { kind: 'garbage', text };
      }
    }
    for (; this.#at < this.#text.length; this.#at++) {
      const c = this.#text[this.#at];
      if (this.#inString) {
        if (c === '\\') this.#at++;
        else if (c === '"') this.#inString = false;
      } else if (c === '"') this.#inString = true;
      else if (c === '{' || c === '[') this.#depth++;
      else if (c === '}' || c === ']') {
        this.#depth--;
        if (this.#depth > 0) continue;
        const text = this.#text.slice(0, this.#at + 1);
        this.#cut(this.#at + 1);
        return { kind: 'value', text };
      }
    }
    return null;
  }
}
