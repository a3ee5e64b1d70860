/**
 * The page cache: pages by (inode, index) in a hash, on the LRU of their node, filled from and written back to the block
 * device. Counterpart: `mm/filemap.c`, `mm/page-writeback.c`.
 *
 * References: the cache holds the page's first reference; a lookup takes another; reclaim takes one when it isolates a
 * page and frees it only if nobody else has one (`freeze`). Simplified: one lock for all mappings, in place of one
 * XArray lock per inode.
 */
import { gfn, spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import * as layoutWords from '../layout.ts';
import { EV, eventRow } from './events.ts';
import * as lruWords from './lru.ts';
import { type Lru } from './lru.ts';
import * as pageWords from './page.ts';
import type { PageAllocator } from './page-alloc.ts';
import type { Tracepoints } from './tracepoints.ts';
import * as zoneWords from './zone.ts';

// Local copies: docs/performance.md § Constants.
const { H_CACHE_LOCK, H_NR_DIRTY, H_NR_FILE_PAGES, H_NR_WRITEBACK } = layoutWords;
const { L_ACTIVE, L_INACTIVE } = lruWords;
const {
  P_FLAGS,
  P_HASH_NEXT,
  P_INDEX,
  P_INODE,
  P_REF,
  P_STAMP,
  P_ZONE,
  PG_ACTIVE,
  PG_CACHED,
  PG_DIRTY,
  PG_REFERENCED,
  PG_STAMPED,
  PG_UPTODATE,
  PG_WRITEBACK,
} = pageWords;
const { MIGRATE_MOVABLE, Z_NODE } = zoneWords;

/** Where file pages live on the disk: block (4 KiB units) of page `index` of inode `inode`. */
export type BlockMap = (inode: number, index: number) => number;

/** Synchronous batched page I/O: `count` pages at `blocks[i]` ↔ page `pfns[i]`. False if any failed. */
export interface BlockIo {
  transfer(write: boolean, pfns: Int32Array, blocks: Float64Array, count: number): boolean;
  flush(): boolean;
}

const WRITEBACK_BATCH = 32;
/** Highest zone for file pages: Movable (`GFP_HIGHUSER_MOVABLE`). */
const FILE_GFP = 3;

export class PageCache {
  trace: Tracepoints | null = null;
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #hash: number;
  readonly #mask: number;
  readonly #vcpu: Vcpu;
  readonly #lru: Lru;
  readonly #alloc: PageAllocator;
  readonly #zones: readonly number[];
  readonly #io: BlockIo;
  readonly #blockOf: BlockMap;
  readonly #events: number;
  readonly #relax: () => void;
  readonly #pfns = new Int32Array(WRITEBACK_BATCH);
  readonly #blocks = new Float64Array(WRITEBACK_BATCH);

  constructor(
    arena: Arena,
    vcpu: Vcpu,
    lru: Lru,
    alloc: PageAllocator,
    zones: readonly number[],
    io: BlockIo,
    blockOf: BlockMap,
  ) {
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#hash = arena.layout.hash;
    this.#mask = arena.layout.hashBuckets - 1;
    this.#vcpu = vcpu;
    this.#lru = lru;
    this.#alloc = alloc;
    this.#zones = zones;
    this.#io = io;
    this.#blockOf = blockOf;
    this.#events = eventRow(vcpu.id);
    this.#relax = () => {
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** Empties the hash. Boot only. */
  static init(arena: Arena): void {
    arena.w.fill(-1, arena.layout.hash, arena.layout.hash + arena.layout.hashBuckets);
  }

  nodeOf(pfn: number): number {
    return this.#w[this.#zones[this.#w[this.#memmap + (pfn << 4) + P_ZONE]] + Z_NODE];
  }

  #bucket(inode: number, index: number): number {
    return this.#hash + ((Math.imul(inode, 0x9e3779b1) ^ Math.imul(index, 0x85ebca6b)) & this.#mask);
  }

  /** Guards hash chains, `P_INODE`, `P_INDEX` of cached pages and the dirty and file counts. */
  #lock(): void {
    spinLock(this.#w, H_CACHE_LOCK, this.#vcpu.id, this.#relax);
  }
  #unlock(): void {
    spinUnlock(this.#w, H_CACHE_LOCK);
  }

  #find(inode: number, index: number): number {
    const w = this.#w;
    for (
      let pfn = w[this.#bucket(inode, index)];
      pfn >= 0;
      pfn = w[this.#memmap + (pfn << 4) + P_HASH_NEXT]
    ) {
      const page = this.#memmap + (pfn << 4);
      if (w[page + P_INODE] === inode && w[page + P_INDEX] === index) return pfn;
    }
    return -1;
  }

  // ── Lookup, insertion, removal ───────────────────────────────────────────────────────────────────────────────────

  /** The cached page with a reference taken for the caller, or −1. Marks it referenced. */
  lookup(inode: number, index: number): number {
    this.#lock();
    const pfn = this.#find(inode, index);
    if (pfn >= 0) {
      Atomics.add(this.#w, this.#memmap + (pfn << 4) + P_REF, 1);
      Atomics.or(this.#w, this.#memmap + (pfn << 4) + P_FLAGS, PG_REFERENCED);
    }
    this.#unlock();
    return pfn;
  }

  /**
   * Attaches an allocated order-0 page at (inode, index); the allocation's reference becomes the cache's. False if
   * another page is there already: the caller keeps its page.
   */
  add(pfn: number, inode: number, index: number, flags: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    this.#lock();
    if (this.#find(inode, index) >= 0) {
      this.#unlock();
      return false;
    }
    w[page + P_INODE] = inode;
    w[page + P_INDEX] = index;
    const bucket = this.#bucket(inode, index);
    w[page + P_HASH_NEXT] = w[bucket];
    w[bucket] = pfn;
    w[H_NR_FILE_PAGES]++;
    if ((flags & PG_DIRTY) !== 0) w[H_NR_DIRTY]++;
    Atomics.or(w, page + P_FLAGS, flags | PG_CACHED);
    this.#toLru(pfn, L_INACTIVE);
    this.#unlock();
    if (this.trace !== null) this.trace.cacheAdd(pfn, inode, index);
    return true;
  }

  /** Under the cache's lock: who finds the page in the hash finds it on its list as well, or isolated. */
  #toLru(pfn: number, list: number): void {
    const node = this.nodeOf(pfn);
    this.#lru.lock(node);
    this.#lru.add(node, list, pfn);
    this.#lru.unlock(node);
  }

  /**
   * Takes page `pfn` out of the cache if it is still the allocation `stamp` and cached; the cache's reference becomes
   * the caller's. False if reclaim was first.
   */
  remove(pfn: number, stamp: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    this.#lock();
    if (w[page + P_STAMP] !== stamp || w[page + P_INODE] < 0 || (w[page + P_FLAGS] & PG_CACHED) === 0) {
      this.#unlock();
      return false;
    }
    if (this.trace !== null) this.trace.cacheDelete(pfn, w[page + P_INODE], w[page + P_INDEX]);
    this.#unhash(pfn);
    this.#unlock();
    const node = this.nodeOf(pfn);
    this.#lru.lock(node);
    this.#lru.remove(node, pfn);
    this.#lru.unlock(node);
    return true;
  }

  /** Takes a page that was cached when the guest began, of no file that is known, out of the cache. True if it was one. */
  dropStartPage(pfn: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    this.#lock();
    const cached = (w[page + P_FLAGS] & PG_CACHED) !== 0 && w[page + P_INODE] < 0;
    if (cached) {
      Atomics.and(w, page + P_FLAGS, ~PG_CACHED);
      w[H_NR_FILE_PAGES]--;
    }
    this.#unlock();
    return cached;
  }

  #unhash(pfn: number): void {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    const bucket = this.#bucket(w[page + P_INODE], w[page + P_INDEX]);
    let at = bucket;
    while (w[at] !== pfn) at = this.#memmap + (w[at] << 4) + P_HASH_NEXT;
    w[at] = w[page + P_HASH_NEXT];
    w[page + P_INODE] = -1;
    w[H_NR_FILE_PAGES]--;
    if ((Atomics.and(w, page + P_FLAGS, ~PG_DIRTY) & PG_DIRTY) !== 0) w[H_NR_DIRTY]--;
  }

  /**
   * Reclaim's last step: removes the page if it is clean, idle, and only the cache and the caller hold it. Freezing the
   * count and leaving the hash are one step under the lock, so that no lookup can take a page that is being freed.
   */
  freeze(pfn: number): 'freed' | 'gone' | 'busy' {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    this.#lock();
    if (w[page + P_INODE] < 0) {
      this.#unlock();
      return 'gone';
    }
    if (
      (w[page + P_FLAGS] & (PG_DIRTY | PG_WRITEBACK)) !== 0 ||
      Atomics.compareExchange(w, page + P_REF, 2, 1) !== 2
    ) {
      this.#unlock();
      return 'busy';
    }
    if (this.trace !== null) this.trace.cacheDelete(pfn, w[page + P_INODE], w[page + P_INDEX]);
    this.#unhash(pfn);
    this.#unlock();
    return 'freed';
  }

  /**
   * Moves a cached page to the freshly allocated page `to` (`migrate_pages`): content, place in the file, marks. Only
   * while nobody but the cache holds it; the lock keeps lookups out until the file names the new page. False: it is in
   * use or under write-back, and stays; `to` is the caller's.
   */
  migrate(from: number, to: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (from << 4);
    const target = this.#memmap + (to << 4);
    this.#lock();
    const inode = w[page + P_INODE];
    // Before the count is frozen: a scan that takes the page off its list from then on lets it go again.
    const list = (w[page + P_FLAGS] & PG_ACTIVE) !== 0 ? L_ACTIVE : L_INACTIVE;
    if (
      inode < 0 ||
      (w[page + P_FLAGS] & PG_WRITEBACK) !== 0 ||
      Atomics.compareExchange(w, page + P_REF, 1, 0) !== 1
    ) {
      this.#unlock();
      return false;
    }
    const index = w[page + P_INDEX];
    const node = this.nodeOf(from);
    this.#lru.lock(node);
    this.#lru.remove(node, from);
    this.#lru.unlock(node);
    this.#vcpu.copyPage(gfn(from), gfn(to));
    const flags = w[page + P_FLAGS] & (PG_DIRTY | PG_UPTODATE | PG_REFERENCED);
    this.#unhash(from);
    Atomics.and(w, target + P_FLAGS, ~PG_STAMPED);
    w[target + P_INODE] = inode;
    w[target + P_INDEX] = index;
    const bucket = this.#bucket(inode, index);
    w[target + P_HASH_NEXT] = w[bucket];
    w[bucket] = to;
    w[H_NR_FILE_PAGES]++;
    if ((flags & PG_DIRTY) !== 0) w[H_NR_DIRTY]++;
    Atomics.or(w, target + P_FLAGS, flags | PG_CACHED);
    this.#toLru(to, list);
    this.#unlock();
    // The reference that was frozen is the last one.
    w[page + P_REF] = 1;
    this.#alloc.put(from);
    return true;
  }

  // ── File I/O ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Reads words of a file page through the cache into `out`, from the page's start. False when memory or disk failed. */
  read(inode: number, index: number, out: Int32Array): boolean {
    const pfn = this.#get(inode, index, true);
    if (pfn < 0) return false;
    const ok = this.#vcpu.window(pfn * 4096, out.length * 4, false);
    if (ok) {
      const at = this.#vcpu.at >> 2;
      out.set(this.#vcpu.i32.subarray(at, at + out.length));
    }
    this.#alloc.put(pfn);
    return ok;
  }

  /** Writes words at the start of a file page and marks it dirty: content first, mark second, or write-back loses it. */
  write(inode: number, index: number, words: Int32Array): boolean {
    const pfn = this.#get(inode, index, words.length < 1024);
    if (pfn < 0) return false;
    const ok = this.#vcpu.window(pfn * 4096, words.length * 4, true);
    if (ok) this.#vcpu.i32.set(words, this.#vcpu.at >> 2);
    // A page that was not filled is up to date only now: a reader on another CPU waits for its content.
    Atomics.or(this.#w, this.#memmap + (pfn << 4) + P_FLAGS, PG_UPTODATE);
    this.markDirty(pfn);
    this.#alloc.put(pfn);
    return ok;
  }

  markDirty(pfn: number): void {
    this.#lock();
    const page = this.#memmap + (pfn << 4);
    if (this.#w[page + P_INODE] >= 0 && (Atomics.or(this.#w, page + P_FLAGS, PG_DIRTY) & PG_DIRTY) === 0)
      this.#w[H_NR_DIRTY]++;
    this.#unlock();
  }

  /**
   * The page with a reference for the caller; −1 when memory or disk failed. Up to date, unless it is new and not to be
   * filled: then the caller writes all of it.
   */
  #get(inode: number, index: number, fill: boolean): number {
    for (;;) {
      const found = this.lookup(inode, index);
      if (found >= 0) {
        // Another CPU may be reading it in.
        const page = this.#memmap + (found << 4);
        let state = Atomics.load(this.#w, page + P_FLAGS);
        while ((state & PG_UPTODATE) === 0 && Atomics.load(this.#w, page + P_INODE) === inode) {
          this.#relax();
          state = Atomics.load(this.#w, page + P_FLAGS);
        }
        if ((state & PG_UPTODATE) !== 0) return found;
        // Its reader met a disk error and took it out again.
        this.#alloc.put(found);
        continue;
      }
      const pfn = this.#alloc.alloc(0, MIGRATE_MOVABLE, FILE_GFP);
      if (pfn < 0) return -1;
      Atomics.add(this.#w, this.#memmap + (pfn << 4) + P_REF, 1);
      this.#alloc.unstamp(pfn);
      if (!this.add(pfn, inode, index, 0)) {
        Atomics.sub(this.#w, this.#memmap + (pfn << 4) + P_REF, 1);
        this.#alloc.free(pfn, 0);
        continue;
      }
      if (fill) {
        this.#pfns[0] = pfn;
        this.#blocks[0] = this.#blockOf(inode, index);
        if (!this.#io.transfer(false, this.#pfns, this.#blocks, 1)) {
          this.#abandon(pfn);
          this.#alloc.put(pfn);
          return -1;
        }
        this.#w[this.#events + EV.pgpgin]++;
        Atomics.or(this.#w, this.#memmap + (pfn << 4) + P_FLAGS, PG_UPTODATE);
      }
      return pfn;
    }
  }

  /** A page that the disk could not fill leaves the cache: who looks for it reads again. */
  #abandon(pfn: number): void {
    if (this.remove(pfn, this.#alloc.stampOf(pfn))) this.#alloc.put(pfn);
  }

  /**
   * Fills cached pages from the disk in one batch and marks them up to date; after a disk error they are cached no more.
   * The caller holds references.
   */
  fill(pfns: Int32Array, count: number): void {
    const blocks = this.#blocks.length >= count ? this.#blocks : new Float64Array(count);
    for (let i = 0; i < count; i++) {
      const page = this.#memmap + (pfns[i] << 4);
      blocks[i] = this.#blockOf(this.#w[page + P_INODE], this.#w[page + P_INDEX]);
    }
    if (!this.#io.transfer(false, pfns, blocks, count)) {
      for (let i = 0; i < count; i++) this.#abandon(pfns[i]);
      return;
    }
    for (let i = 0; i < count; i++) Atomics.or(this.#w, this.#memmap + (pfns[i] << 4) + P_FLAGS, PG_UPTODATE);
    this.#w[this.#events + EV.pgpgin] += count;
  }

  // ── Write-back ───────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Writes dirty pages among `pfns` (references held by the caller) to the disk. Dirty is cleared *before* the I/O: a
   * store that comes during it marks the page again.
   */
  writePages(pfns: Int32Array, count: number): number {
    const w = this.#w;
    let n = 0;
    this.#lock();
    for (let i = 0; i < count && n < WRITEBACK_BATCH; i++) {
      const page = this.#memmap + (pfns[i] << 4);
      if (w[page + P_INODE] < 0 || (w[page + P_FLAGS] & (PG_DIRTY | PG_WRITEBACK)) !== PG_DIRTY) continue;
      Atomics.and(w, page + P_FLAGS, ~PG_DIRTY);
      Atomics.or(w, page + P_FLAGS, PG_WRITEBACK);
      w[H_NR_DIRTY]--;
      w[H_NR_WRITEBACK]++;
      this.#pfns[n] = pfns[i];
      this.#blocks[n] = this.#blockOf(w[page + P_INODE], w[page + P_INDEX]);
      n++;
    }
    this.#unlock();
    if (n === 0) return 0;
    const ok = this.#io.transfer(true, this.#pfns, this.#blocks, n);
    this.#lock();
    for (let i = 0; i < n; i++) {
      const page = this.#memmap + (this.#pfns[i] << 4);
      Atomics.and(w, page + P_FLAGS, ~PG_WRITEBACK);
      if (!ok && w[page + P_INODE] >= 0 && (Atomics.or(w, page + P_FLAGS, PG_DIRTY) & PG_DIRTY) === 0)
        w[H_NR_DIRTY]++;
    }
    w[H_NR_WRITEBACK] -= n;
    this.#unlock();
    w[this.#events + EV.pgpgout] += n;
    if (ok) w[this.#events + EV.writeback_pages] += n;
    return ok ? n : 0;
  }
}
