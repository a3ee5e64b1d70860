/**
 * Lock order in controlled runs (I23): each lock taken while others are held adds an edge from them to it; a cycle is a
 * deadlock that some schedule can reach, whether or not this one did. A try-lock that succeeds holds, but never waits, so
 * no edge leads to it. Edges are shared by the threads of one execution.
 */

/** Locks of one execution that are told apart. */
const MAX_LOCKS = 64;
const COUNT = 0;
const WORDS_BASE = 16;
const EDGES_BASE: number = WORDS_BASE + MAX_LOCKS;

/** Bytes of the shared record: names of locks, then a matrix of edges. */
export const LOCK_ORDER_BYTES: number = (EDGES_BASE + MAX_LOCKS * MAX_LOCKS) * 4;

/** Told of every spin lock that this worker takes and releases. */
export interface LockObserver {
  taken(words: Int32Array, index: number, waited: boolean): void;
  released(words: Int32Array, index: number): void;
}

export class LockOrder implements LockObserver {
  /** Cycles found, as the words of the locks on them. */
  readonly cycles: number[][] = [];
  readonly #w: Int32Array;
  readonly #held: number[] = [];

  constructor(buffer: SharedArrayBuffer) {
    this.#w = new Int32Array(buffer);
  }

  /** Number of the lock at `word`; −1 when there are too many. */
  #id(word: number): number {
    const w = this.#w;
    for (let i = 0; i < w[COUNT]; i++) if (w[WORDS_BASE + i] === word) return i;
    if (w[COUNT] === MAX_LOCKS) return -1;
    w[WORDS_BASE + w[COUNT]] = word;
    return w[COUNT]++;
  }

  taken(_words: Int32Array, index: number, waited: boolean): void {
    const id = this.#id(index);
    if (id < 0) return;
    if (waited) {
      for (const from of this.#held) {
        if (this.#w[EDGES_BASE + from * MAX_LOCKS + id] !== 0) continue;
        this.#w[EDGES_BASE + from * MAX_LOCKS + id] = 1;
        const path = this.#path(id, from, []);
        if (path !== null) this.cycles.push(path.map((lock) => this.#w[WORDS_BASE + lock]));
      }
    }
    this.#held.push(id);
  }

  released(_words: Int32Array, index: number): void {
    const at = this.#held.lastIndexOf(this.#id(index));
    if (at >= 0) this.#held.splice(at, 1);
  }

  /** A way along the edges from one lock to another. */
  #path(from: number, to: number, seen: readonly number[]): number[] | null {
    if (from === to) return [to];
    if (seen.includes(from)) return null;
    for (let next = 0; next < this.#w[COUNT]; next++) {
      if (this.#w[EDGES_BASE + from * MAX_LOCKS + next] === 0) continue;
      const rest = this.#path(next, to, [...seen, from]);
      if (rest !== null) return [from, ...rest];
    }
    return null;
  }
}
