/**
 * The two-dimensional-paging MMU: builds and takes down EPT entries. Counterpart: `arch/x86/kvm/mmu/tdp_mmu.c`.
 *
 * Everything here is a leaf: it runs to completion under the VM's MMU lock and never yields. Writers store entries
 * atomically because vCPU walkers read them and set A and D by compare-exchange at any moment; a zap *exchanges*, so the
 * bits a vCPU set last are in the value returned. Tables taken out of the tree are kept in `detachedTables` until the
 * flush that follows, because a walker may still be inside them.
 */
import * as machine from '@ebb/machine';
import {
  assert,
  eptFrame,
  eptHigh,
  eptIndex,
  eptLow,
  hfn,
  pagesPerEntry,
  type Hfn,
  type Schedule,
} from '@ebb/machine';
import type { FramePool } from '../mm/frame-pool.ts';

// Local copies: docs/performance.md § Constants.
const { EPT_A, EPT_D, EPT_PS, EPT_R, EPT_ROOT_LEVEL, EPT_RWX, EPT_W, EPT_WB } = machine;

/** Software bits of a frame, set from A and D at zap time: dirty state outlives the mapping (I18). */
export const FRAME_ACCESSED = 1;
export const FRAME_DIRTY = 2;

const NON_LEAF: number = EPT_RWX;

export interface MmuCounters {
  mapped4k: number;
  mapped2m: number;
  mapped1g: number;
  zapped: number;
  splits: number;
  tables: number;
}

export class TdpMmu {
  readonly root: Hfn;
  readonly counters: MmuCounters = { mapped4k: 0, mapped2m: 0, mapped1g: 0, zapped: 0, splits: 0, tables: 0 };
  /** Table frames unlinked but not yet safe to free: free them after the flush. */
  readonly detachedTables: number[] = [];
  readonly #vm: number;
  readonly #pool: FramePool;
  readonly #dram: Int32Array;
  readonly #schedule: Schedule;
  /** Present entries in each table frame; host-private. */
  readonly #live: Int32Array;
  /** `FRAME_ACCESSED | FRAME_DIRTY` per frame; the pool's. */
  readonly frameFlags: Uint8Array;

  /** `live` is a per-host array indexed by frame, shared by all MMUs. Throws if no root frame. */
  constructor(vm: number, pool: FramePool, schedule: Schedule, live: Int32Array) {
    this.#vm = vm;
    this.#pool = pool;
    this.#dram = pool.memory.i32;
    this.#schedule = schedule;
    this.#live = live;
    this.frameFlags = pool.frameFlags;
    const root = pool.allocTable(vm);
    assert(root >= 0, 'a frame for the root table');
    this.root = hfn(root);
    this.#live[root] = 0;
    this.counters.tables = 1;
  }

  /** Word index of the entry for `gfn` at `level`, making tables on the way; −1 without a frame, −2 under a large leaf. */
  #entry(gfn: number, level: number): number {
    let table: number = this.root;
    for (let l = EPT_ROOT_LEVEL; l > level; l--) {
      const word = table * 1024 + eptIndex(gfn, l) * 2;
      const low = this.#dram[word];
      if ((low & EPT_R) === 0) {
        const child = this.#pool.allocTable(this.#vm);
        if (child < 0) return -1;
        this.#live[child] = 0;
        this.counters.tables++;
        this.#install(word, child, NON_LEAF);
        this.#live[table]++;
        table = child;
      } else if ((low & EPT_PS) !== 0) return -2;
      else table = eptFrame(low, this.#dram[word + 1]);
    }
    return table * 1024 + eptIndex(gfn, level) * 2;
  }

  /**
   * Writes an entry that is not present: high, then low. Pairs with the walker's low, high, low. Nobody else writes a high
   * word, so one that is right already is left: below 4 GiB of host memory all are 0.
   */
  #install(word: number, frame: number, flags: number): void {
    this.#schedule.point('ept-write', word);
    const high = eptHigh(frame);
    if (this.#dram[word + 1] !== high) Atomics.store(this.#dram, word + 1, high);
    Atomics.store(this.#dram, word, eptLow(frame, flags));
  }

  /**
   * Maps `gfn` (aligned to the level) to `frame` with a leaf of `level` (1, 2 or 3). False without a frame for a table.
   * A leaf that is present already (another vCPU faulted first) is only upgraded to writable. `bits`: A and D of the access
   * that faulted, which is about to be made (`make_spte` sets them too); the walk then need not.
   */
  map(gfn: number, frame: number, level: number, writable: boolean, bits = 0): boolean {
    const flags = EPT_R | 4 | EPT_WB | (writable ? EPT_W : 0) | (level > 1 ? EPT_PS : 0) | bits;
    const word = this.#entry(gfn, level);
    if (word === -1) return false;
    if (word === -2) return true;
    const low = this.#dram[word];
    if ((low & EPT_R) !== 0) {
      if (level > 1 && (low & EPT_PS) === 0) return this.map4kInstead(gfn, frame, level, writable);
      // Another frame there (the shared page of zeros) does not become writable by this.
      const same = eptFrame(low, this.#dram[word + 1]) === frame;
      if (writable && same && (low & EPT_W) === 0) Atomics.or(this.#dram, word, EPT_W);
      return true;
    }
    const pages = pagesPerEntry(level);
    this.#pool.ledger.ref(hfn(frame), pages, 1);
    this.#install(word, frame, flags);
    this.#live[word >>> 10]++;
    if (level === 1) this.counters.mapped4k++;
    else if (level === 2) this.counters.mapped2m++;
    else this.counters.mapped1g++;
    return true;
  }

  /** Under a table that exists already, maps every absent page of the large range by itself. */
  map4kInstead(gfn: number, frame: number, level: number, writable: boolean): boolean {
    const step = pagesPerEntry(level - 1);
    for (let i = 0; i < 512; i++) {
      if (!this.map(gfn + i * step, frame + i * step, level - 1, writable)) return false;
    }
    return true;
  }

  /** Level of the present leaf that maps `gfn`, 0 if none. */
  leafLevel(gfn: number): number {
    let table: number = this.root;
    for (let l = EPT_ROOT_LEVEL; l > 0; l--) {
      const word = table * 1024 + eptIndex(gfn, l) * 2;
      const low = this.#dram[word];
      if ((low & EPT_R) === 0) return 0;
      if (l === 1 || (low & EPT_PS) !== 0) return l;
      table = eptFrame(low, this.#dram[word + 1]);
    }
    return 0;
  }

  /**
   * Removes every mapping of `[gfn, gfn + count)`. A leaf that covers more is split first; its children inherit A and
   * D. Returns the leaves removed; if it is not 0, or a table was detached, a flush must follow before any frame is reused
   * or the lock dropped.
   */
  zapRange(gfn: number, count: number): number {
    const zapped = this.#zap(this.root, EPT_ROOT_LEVEL, gfn, gfn + count, 0);
    this.counters.zapped += zapped;
    return zapped;
  }

  #zap(table: number, level: number, from: number, to: number, tableBase: number): number {
    const span = pagesPerEntry(level);
    let zapped = 0;
    const first = Math.max(0, Math.floor((from - tableBase) / span));
    const last = Math.min(511, Math.floor((to - 1 - tableBase) / span));
    for (let index = first; index <= last; index++) {
      const word = table * 1024 + index * 2;
      let low = this.#dram[word];
      if ((low & EPT_R) === 0) continue;
      const base = tableBase + index * span;
      const leaf = level === 1 || (low & EPT_PS) !== 0;
      if (leaf && from <= base && base + span <= to) {
        this.#clearLeaf(word, span);
        this.#live[table]--;
        zapped++;
        continue;
      }
      if (leaf) {
        if (!this.#split(word, level)) {
          // No frame for a table: drop the whole leaf; what is kept faults in again.
          this.#clearLeaf(word, span);
          this.#live[table]--;
          zapped++;
          continue;
        }
        zapped++;
        low = this.#dram[word];
      }
      const child = eptFrame(low, this.#dram[word + 1]);
      zapped += this.#zap(child, level - 1, from, to, base);
      if (this.#live[child] === 0) {
        this.#exchange(word);
        this.#live[table]--;
        this.detachedTables.push(child);
        this.counters.tables--;
      }
    }
    return zapped;
  }

  /** Clears an entry: exchanges the low word with 0 first, then the high word. Returns the old low word. */
  #exchange(word: number): number {
    this.#schedule.point('ept-write', word);
    const low = Atomics.exchange(this.#dram, word, 0);
    if (this.#dram[word + 1] !== 0) Atomics.store(this.#dram, word + 1, 0);
    return low;
  }

  /** Zaps one leaf and moves its A and D to the frames. */
  #clearLeaf(word: number, pages: number): void {
    const high = this.#dram[word + 1];
    const low = this.#exchange(word);
    const frame = eptFrame(low, high);
    this.#harvest(frame, pages, low);
    this.#pool.ledger.ref(hfn(frame), pages, -1);
  }

  #harvest(frame: number, pages: number, low: number): void {
    const bits = ((low & EPT_A) !== 0 ? FRAME_ACCESSED : 0) | ((low & EPT_D) !== 0 ? FRAME_DIRTY : 0);
    if (bits === 0) return;
    for (let f = frame; f < frame + pages; f++) this.frameFlags[f] |= bits;
  }

  /** Replaces a large leaf by a table of 512 children with the same frames, permissions, A and D. */
  #split(word: number, level: number): boolean {
    const child = this.#pool.allocTable(this.#vm);
    if (child < 0) return false;
    const high = this.#dram[word + 1];
    // Exchange first: a vCPU may set D until the very last moment, and the children must inherit it.
    const low = this.#exchange(word);
    const frame = eptFrame(low, high);
    const keep = low & (0xfff & ~EPT_PS);
    const step = pagesPerEntry(level - 1);
    for (let i = 0; i < 512; i++) {
      const to = frame + i * step;
      this.#dram[child * 1024 + i * 2] = eptLow(to, keep | (level - 1 > 1 ? EPT_PS : 0));
      this.#dram[child * 1024 + i * 2 + 1] = eptHigh(to);
    }
    this.#live[child] = 512;
    this.counters.splits++;
    this.counters.tables++;
    this.#install(word, child, NON_LEAF);
    return true;
  }

  /** Frees tables unlinked before the flush that has just completed. */
  freeDetachedTables(): void {
    for (const table of this.detachedTables) this.#pool.free(hfn(table), 1);
    this.detachedTables.length = 0;
  }
}
