/**
 * The host's buddy allocator: blocks of 2⁰ … 2¹⁰ frames, split on demand, merged on free. One thread owns it (the host
 * worker), so it has no lock, and no migratetypes: everything it hands out is movable or short-lived. Pages of 1 GiB are had
 * while the memory is not in pieces.
 * Counterpart: `mm/page_alloc.c` (`__rmqueue_smallest`, `__free_one_page`).
 */
import { assert } from '@ebb/machine';

export const HOST_MAX_ORDER = 10;

export class HostBuddy {
  readonly frames: number;
  #free = 0;
  /** Order of the free block that starts at a frame, −1 if none does. */
  readonly #order: Int8Array;
  readonly #next: Int32Array;
  readonly #prev: Int32Array;
  readonly #heads: Int32Array;
  readonly #counts: Int32Array;

  /** All `frames` frames start free. */
  constructor(frames: number) {
    this.frames = frames;
    this.#order = new Int8Array(frames).fill(-1);
    this.#next = new Int32Array(frames);
    this.#prev = new Int32Array(frames);
    this.#heads = new Int32Array(HOST_MAX_ORDER + 1).fill(-1);
    this.#counts = new Int32Array(HOST_MAX_ORDER + 1);
    // From the top down, so that the lists hand out low frames first.
    for (let at = frames; at > 0; ) {
      let order = 0;
      while (order < HOST_MAX_ORDER && at % (2 << order) === 0 && at - (2 << order) >= 0) order++;
      at -= 1 << order;
      this.#push(at, order);
      this.#free += 1 << order;
    }
  }

  get free(): number {
    return this.#free;
  }

  /** Free blocks of one order, as `/proc/buddyinfo` counts them. */
  blocks(order: number): number {
    return this.#counts[order];
  }

  #push(frame: number, order: number): void {
    const head = this.#heads[order];
    this.#order[frame] = order;
    this.#next[frame] = head;
    this.#prev[frame] = -1;
    if (head >= 0) this.#prev[head] = frame;
    this.#heads[order] = frame;
    this.#counts[order]++;
  }

  #remove(frame: number, order: number): void {
    const next = this.#next[frame];
    const prev = this.#prev[frame];
    if (prev >= 0) this.#next[prev] = next;
    else this.#heads[order] = next;
    if (next >= 0) this.#prev[next] = prev;
    this.#order[frame] = -1;
    this.#counts[order]--;
  }

  /** Takes an aligned block of 2^order frames, order 0–10 or 18; −1 if none is free. */
  alloc(order: number): number {
    if (order > HOST_MAX_ORDER) return this.#allocGiga(order);
    let o = order;
    while (o <= HOST_MAX_ORDER && this.#heads[o] < 0) o++;
    if (o > HOST_MAX_ORDER) return -1;
    const frame = this.#heads[o];
    this.#remove(frame, o);
    while (o > order) {
      o--;
      this.#push(frame + (1 << o), o);
    }
    this.#free -= 1 << order;
    return frame;
  }

  /**
   * Takes a block beyond the largest order: as many of those as it needs, side by side and all free (`alloc_contig_range`, but
   * none is moved).
   */
  #allocGiga(order: number): number {
    const count = 1 << order;
    const step = 1 << HOST_MAX_ORDER;
    for (let first = 0; first + count <= this.frames; first += count) {
      let at = first;
      while (at < first + count && this.#order[at] === HOST_MAX_ORDER) at += step;
      if (at < first + count) continue;
      for (at = first; at < first + count; at += step) this.#remove(at, HOST_MAX_ORDER);
      this.#free -= count;
      return first;
    }
    return -1;
  }

  /** Frees a run of frames of any length: as the largest aligned blocks, each merged with its buddy. */
  freeRun(first: number, count: number): void {
    let at = first;
    let left = count;
    while (left > 0) {
      let order = 0;
      while (order < HOST_MAX_ORDER && at % (2 << order) === 0 && 2 << order <= left) order++;
      this.#freeBlock(at, order);
      at += 1 << order;
      left -= 1 << order;
    }
  }

  #freeBlock(frame: number, order: number): void {
    assert(this.#order[frame] < 0, 'a free block is not freed again');
    this.#free += 1 << order;
    let at = frame;
    let o = order;
    while (o < HOST_MAX_ORDER) {
      const buddy = at ^ (1 << o);
      if (buddy + (1 << o) > this.frames || this.#order[buddy] !== o) break;
      this.#remove(buddy, o);
      at = Math.min(at, buddy);
      o++;
    }
    this.#push(at, o);
  }
}
