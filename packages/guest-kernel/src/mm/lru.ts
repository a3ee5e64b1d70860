/**
 * Active and inactive lists of file pages, per node. Counterpart: `mm/swap.c`, `mm/vmscan.c` (classic two-list LRU).
 *
 * Simplified: one generation pair per node, file pages only. There is no swap, so anonymous pages are on no list and
 * are never reclaimed; Linux 6.12 with CONFIG_LRU_GEN ages pages in more generations.
 */
import { spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import * as layout from '../layout.ts';
import * as pageWords from './page.ts';

// Local copies: docs/performance.md § Constants.
const { LRU_BASE, LRU_WORDS } = layout;
const { P_FLAGS, P_NEXT, P_PREV, PG_ACTIVE, PG_LRU } = pageWords;

/** Words of a node's LRU. The lock guards both lists and the LRU bits of pages on them. */
export const L_LOCK = 0;
export const L_INACTIVE = 16;
export const L_ACTIVE = 20;
/** Each list: head, tail, length. */
/** Word of a list, after head and tail, that counts its pages. */
export const LENGTH = 2;

export class Lru {
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #vcpu: Vcpu;
  readonly #relax: () => void;

  constructor(arena: Arena, vcpu: Vcpu) {
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#vcpu = vcpu;
    this.#relax = () => {
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** Empties the lists of all nodes. Boot only. */
  static init(w: Int32Array, nrNodes: number): void {
    for (let node = 0; node < nrNodes; node++) {
      const at = LRU_BASE + node * LRU_WORDS;
      w.fill(0, at, at + LRU_WORDS);
      for (const list of [L_INACTIVE, L_ACTIVE]) w.fill(-1, at + list, at + list + 2);
    }
  }

  /** Order: after the page-cache lock, before zone locks. */
  lock(node: number): void {
    spinLock(this.#w, LRU_BASE + node * LRU_WORDS + L_LOCK, this.#vcpu.id, this.#relax);
  }
  unlock(node: number): void {
    spinUnlock(this.#w, LRU_BASE + node * LRU_WORDS + L_LOCK);
  }

  /** Pages on one list of a node. */
  length(node: number, list: number): number {
    return this.#w[LRU_BASE + node * LRU_WORDS + list + LENGTH];
  }

  /** Puts a page at the head. Needs the lock. */
  add(node: number, list: number, pfn: number): void {
    const w = this.#w;
    const at = LRU_BASE + node * LRU_WORDS + list;
    const page = this.#memmap + (pfn << 4);
    const head = w[at];
    w[page + P_NEXT] = head;
    w[page + P_PREV] = -1;
    if (head >= 0) w[this.#memmap + (head << 4) + P_PREV] = pfn;
    else w[at + 1] = pfn;
    w[at] = pfn;
    w[at + LENGTH]++;
    Atomics.or(w, page + P_FLAGS, list === L_ACTIVE ? PG_LRU | PG_ACTIVE : PG_LRU);
  }

  /** Takes a page off its list. Needs the lock. False if it was on none (isolated by a scan). */
  remove(node: number, pfn: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    const flags = w[page + P_FLAGS];
    if ((flags & PG_LRU) === 0) return false;
    const at = LRU_BASE + node * LRU_WORDS + ((flags & PG_ACTIVE) !== 0 ? L_ACTIVE : L_INACTIVE);
    const next = w[page + P_NEXT];
    const prev = w[page + P_PREV];
    if (prev >= 0) w[this.#memmap + (prev << 4) + P_NEXT] = next;
    else w[at] = next;
    if (next >= 0) w[this.#memmap + (next << 4) + P_PREV] = prev;
    else w[at + 1] = prev;
    w[at + LENGTH]--;
    Atomics.and(w, page + P_FLAGS, ~(PG_LRU | PG_ACTIVE));
    return true;
  }

  /** The oldest page of a list, −1 if it is empty. Needs the lock. */
  tail(node: number, list: number): number {
    return this.#w[LRU_BASE + node * LRU_WORDS + list + 1];
  }
}
