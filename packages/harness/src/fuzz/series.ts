/**
 * Where the threads of a series of executions meet: thread 0 prepares each and lets the others go; all tell when theirs is
 * over. So a series costs main one message per thread, not one per execution.
 *
 * | word | written by | pairs with |
 * | --- | --- | --- |
 * | `GO`: number of the execution that may begin, −1 when the series is over | thread 0 | the others' wait |
 * | `ENDED`: threads that have ended, over all executions | each | thread 0's wait |
 * | `FOUND`: some thread found something | each, before `ENDED` | thread 0's load after its wait |
 */
const GO = 0;
const ENDED = 16;
const FOUND = 32;
export const SERIES_BYTES = 256;

/** Before a controlled worker replaces `Atomics`: what happens between executions is no event of one. */
const { add, load, notify, store, wait } = Atomics;

export class Series {
  readonly #w: Int32Array;
  readonly #threads: number;

  constructor(buffer: SharedArrayBuffer, threads: number) {
    this.#w = new Int32Array(buffer);
    this.#threads = threads;
  }

  /** Main: before the threads are told of a series. */
  reset(): void {
    this.#w.fill(0);
  }

  /** Thread 0: execution `n`, from 1, is prepared. */
  begin(n: number): void {
    store(this.#w, GO, n);
    notify(this.#w, GO);
  }

  /** Thread 0: there is none after this. */
  over(): void {
    this.begin(-1);
  }

  /** The others: waits for execution `n`; false if the series is over. */
  awaitBegin(n: number): boolean {
    for (let go = load(this.#w, GO); go !== n; go = load(this.#w, GO)) {
      if (go < 0) return false;
      wait(this.#w, GO, go);
    }
    return true;
  }

  /** This thread's part is over; `found`: it found something. */
  end(found: boolean): void {
    if (found) store(this.#w, FOUND, 1);
    add(this.#w, ENDED, 1);
    notify(this.#w, ENDED);
  }

  /** Thread 0: waits until every thread has ended execution `n`; true if one found something. */
  awaitEnd(n: number): boolean {
    const all = n * this.#threads;
    for (let ended = load(this.#w, ENDED); ended < all; ended = load(this.#w, ENDED))
      wait(this.#w, ENDED, ended);
    return load(this.#w, FOUND) !== 0;
  }
}
