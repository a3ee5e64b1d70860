/**
 * Page reclaim: kswapd, direct reclaim and the flusher over the file LRU. Counterpart: `mm/vmscan.c`
 * (`shrink_inactive_list`, `shrink_active_list`, `balance_pgdat`) and `mm/page-writeback.c`.
 *
 * A scan isolates up to 32 pages from the tail of the inactive list, taking a reference on each, and then decides about
 * each without the LRU lock: referenced goes to the active list, dirty is written back, clean and idle is freed.
 * Simplified: kswapd writes dirty pages itself, in batches; Linux leaves most of that to the flushers.
 */
import type { Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import * as layout from '../layout.ts';
import { EV, eventRow } from './events.ts';
import * as lruWords from './lru.ts';
import { type Lru } from './lru.ts';
import * as pageWords from './page.ts';
import type { PageAllocator } from './page-alloc.ts';
import type { PageCache } from './page-cache.ts';
import { watermarkOk } from './page-alloc.ts';
import * as zoneWords from './zone.ts';

// Local copies: docs/performance.md § Constants.
const { H_NR_DIRTY, H_NR_WRITEBACK, T_KSWAPD, T_WRITEBACK } = layout;
const { L_ACTIVE, L_INACTIVE } = lruWords;
const { P_FLAGS, P_REF, PG_DIRTY, PG_REFERENCED, PG_WRITEBACK } = pageWords;
const { Z_FLAGS, Z_HIGH, Z_MANAGED, Z_NODE, Z_TYPE, ZF_RECLAIM_ACTIVE } = zoneWords;

/** `SWAP_CLUSTER_MAX`. */
const CLUSTER = 32;
/** `dirty_background_ratio`, percent of managed pages. */
const DIRTY_BACKGROUND = 10;

/** kswapd's words per node. */
const K_WAKE = 0;
const K_FAILURES = 1;
/** Highest zone type that a waker wanted pages of. */
const K_HIGHEST = 2;
const MAX_KSWAPD_FAILURES = 16;

export class Reclaim {
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #vcpu: Vcpu;
  readonly #lru: Lru;
  readonly #cache: PageCache;
  readonly #alloc: PageAllocator;
  readonly #zones: readonly number[];
  readonly #events: number;
  readonly #batch = new Int32Array(CLUSTER);
  readonly #dirty = new Int32Array(CLUSTER);
  /** Reclaim does not enter itself (`PF_MEMALLOC`). */
  #inside = false;

  constructor(
    arena: Arena,
    vcpu: Vcpu,
    lru: Lru,
    cache: PageCache,
    alloc: PageAllocator,
    zones: readonly number[],
  ) {
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#vcpu = vcpu;
    this.#lru = lru;
    this.#cache = cache;
    this.#alloc = alloc;
    this.#zones = zones;
    this.#events = eventRow(vcpu.id);
  }

  // ── Entry points ─────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Marks kswapd of the zone's node to run, for a request that zones up to type `highest` can serve; it does at the next
   * step of a vCPU of that node. The highest is stored first: `kswapd` takes the wake, then it. Of two CPUs that raise it
   * at once the lower may win; who still lacks pages wakes kswapd again.
   */
  wakeKswapd(zone: number, highest: number): void {
    const at = T_KSWAPD + this.#w[zone + Z_NODE] * 16;
    if (Atomics.load(this.#w, at + K_HIGHEST) < highest) Atomics.store(this.#w, at + K_HIGHEST, highest);
    if (
      Atomics.load(this.#w, at + K_WAKE) === 0 &&
      Atomics.load(this.#w, at + K_FAILURES) < MAX_KSWAPD_FAILURES
    ) {
      Atomics.store(this.#w, at + K_WAKE, 1);
      this.#w[this.#events + EV.kswapd_wake]++;
    }
  }

  /** Whether kswapd of `node` has been woken. */
  kswapdPending(node: number): boolean {
    return Atomics.load(this.#w, T_KSWAPD + node * 16 + K_WAKE) !== 0;
  }

  /** Direct reclaim: one cluster from `node`, then from the others. Returns pages freed. */
  direct(node: number): number {
    if (this.#inside) return 0;
    let freed = this.#shrink(node, CLUSTER * 2, EV.pgscan_direct, EV.pgsteal_direct);
    for (const other of this.#nodes()) {
      if (freed === 0 && other !== node)
        freed = this.#shrink(other, CLUSTER * 2, EV.pgscan_direct, EV.pgsteal_direct);
    }
    return freed;
  }

  /**
   * kswapd of one node: reclaims until a zone that can serve the wakers is above its high watermark (`pgdat_balanced`), or
   * nothing more comes.
   */
  kswapd(node: number): void {
    const w = this.#w;
    const at = T_KSWAPD + node * 16;
    if (this.#inside || Atomics.exchange(w, at + K_WAKE, 0) === 0) return;
    w[this.#events + EV.pageoutrun]++;
    const highest = Atomics.exchange(w, at + K_HIGHEST, 0);
    const zones = this.#zones.filter(
      (z) => w[z + Z_NODE] === node && w[z + Z_TYPE] <= highest && w[z + Z_MANAGED] > 0,
    );
    const balanced = (): boolean => zones.some((z) => watermarkOk(w, z, 0, w[z + Z_HIGH], highest));
    for (const z of zones) Atomics.or(w, z + Z_FLAGS, ZF_RECLAIM_ACTIVE);
    let idle = 0;
    let reclaimed = 0;
    while (!balanced() && idle < 3) {
      const freed = this.#shrink(node, CLUSTER, EV.pgscan_kswapd, EV.pgsteal_kswapd);
      reclaimed += freed;
      idle = freed === 0 ? idle + 1 : 0;
      this.#vcpu.beginSection();
    }
    // A run that freed nothing at all is a failure.
    if (idle >= 3 && reclaimed === 0) Atomics.add(w, at + K_FAILURES, 1);
    for (const z of zones) Atomics.and(w, z + Z_FLAGS, ~ZF_RECLAIM_ACTIVE);
  }

  /** The flusher: writes dirty pages back while they exceed the background ratio. */
  flusher(): void {
    const w = this.#w;
    const managed = this.#zones.reduce((sum, z) => sum + w[z + Z_MANAGED], 0);
    if (this.#inside || w[H_NR_DIRTY] * 100 <= managed * DIRTY_BACKGROUND) return;
    // One flusher at a time.
    if (Atomics.compareExchange(w, T_WRITEBACK, 0, 1) !== 0) return;
    let rounds = 0;
    while (w[H_NR_DIRTY] * 200 > managed * DIRTY_BACKGROUND && rounds++ < 64) {
      let wrote = 0;
      for (const node of this.#nodes()) wrote += this.#writeOldest(node);
      if (wrote === 0) break;
    }
    Atomics.store(w, T_WRITEBACK, 0);
  }

  /** Writes every dirty page back, and waits for what others are writing (`sync`). False: some could not be written. */
  sync(): boolean {
    const w = this.#w;
    for (let rounds = 0; w[H_NR_DIRTY] + w[H_NR_WRITEBACK] > 0 && rounds < 100_000; rounds++) {
      let wrote = 0;
      for (const node of this.#nodes()) wrote += this.#writeOldest(node);
      if (wrote === 0) this.#vcpu.port.relax();
      this.#vcpu.beginSection();
    }
    return w[H_NR_DIRTY] === 0;
  }

  #nodes(): number[] {
    return [...new Set(this.#zones.map((z) => this.#w[z + Z_NODE]))];
  }

  // ── Scanning ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Isolates up to `CLUSTER` pages from the tail of a list, with a reference on each. Returns how many. */
  #isolate(node: number, list: number, out: Int32Array): number {
    const w = this.#w;
    this.#lru.lock(node);
    let n = 0;
    while (n < CLUSTER) {
      const pfn = this.#lru.tail(node, list);
      if (pfn < 0) break;
      this.#lru.remove(node, pfn);
      // A page whose last reference is gone is being freed by whoever dropped it, who waits for this lock to take it off
      // the list: it must not be revived (`folio_try_get`).
      if (tryGet(w, this.#memmap + (pfn << 4) + P_REF)) out[n++] = pfn;
    }
    this.#lru.unlock(node);
    return n;
  }

  /** Puts an isolated page back on a list and drops the isolation's reference. */
  #putBack(node: number, list: number, pfn: number): void {
    this.#lru.lock(node);
    this.#lru.add(node, list, pfn);
    this.#lru.unlock(node);
    this.#alloc.put(pfn);
  }

  /** Scans about `nr` pages of `node`; returns pages freed. */
  #shrink(node: number, nr: number, scanEvent: number, stealEvent: number): number {
    const w = this.#w;
    this.#inside = true;
    let freed = 0;
    for (let scanned = 0; scanned < nr; ) {
      if (this.#lru.length(node, L_INACTIVE) < this.#lru.length(node, L_ACTIVE)) this.#deactivate(node);
      const n = this.#isolate(node, L_INACTIVE, this.#batch);
      if (n === 0) break;
      scanned += n;
      w[this.#events + scanEvent] += n;
      let dirty = 0;
      for (let i = 0; i < n; i++) {
        const flags = Atomics.load(w, this.#memmap + (this.#batch[i] << 4) + P_FLAGS);
        if ((flags & (PG_DIRTY | PG_WRITEBACK)) === PG_DIRTY && (flags & PG_REFERENCED) === 0)
          this.#dirty[dirty++] = this.#batch[i];
      }
      if (dirty > 0) this.#cache.writePages(this.#dirty, dirty);
      for (let i = 0; i < n; i++) if (this.#decide(node, this.#batch[i])) freed++;
    }
    w[this.#events + stealEvent] += freed;
    // Whoever gets a page of a node, its kswapd may try again.
    if (freed > 0) Atomics.store(w, T_KSWAPD + node * 16 + K_FAILURES, 0);
    this.#inside = false;
    return freed;
  }

  /** Frees, activates or puts back one isolated page. True if it was freed. */
  #decide(node: number, pfn: number): boolean {
    const w = this.#w;
    const flags = Atomics.and(w, this.#memmap + (pfn << 4) + P_FLAGS, ~PG_REFERENCED);
    if ((flags & PG_REFERENCED) !== 0) {
      w[this.#events + EV.pgactivate]++;
      this.#putBack(node, L_ACTIVE, pfn);
      return false;
    }
    switch (this.#cache.freeze(pfn)) {
      case 'freed':
        this.#alloc.put(pfn);
        return true;
      case 'gone':
        this.#alloc.put(pfn);
        return false;
      case 'busy':
        this.#putBack(node, L_INACTIVE, pfn);
        return false;
    }
  }

  /** Moves a cluster from the active tail to the inactive head. */
  #deactivate(node: number): void {
    const w = this.#w;
    this.#lru.lock(node);
    for (let i = 0; i < CLUSTER; i++) {
      const pfn = this.#lru.tail(node, L_ACTIVE);
      if (pfn < 0) break;
      this.#lru.remove(node, pfn);
      Atomics.and(w, this.#memmap + (pfn << 4) + P_FLAGS, ~PG_REFERENCED);
      this.#lru.add(node, L_INACTIVE, pfn);
      w[this.#events + EV.pgdeactivate]++;
    }
    this.#lru.unlock(node);
  }

  /** Writes the dirty pages of one cluster of each list back; the pages rotate to the head of their list. */
  #writeOldest(node: number): number {
    this.#inside = true;
    let wrote = 0;
    for (const list of [L_INACTIVE, L_ACTIVE]) {
      const n = this.#isolate(node, list, this.#batch);
      wrote += this.#cache.writePages(this.#batch, n);
      for (let i = 0; i < n; i++) this.#putBack(node, list, this.#batch[i]);
    }
    this.#inside = false;
    return wrote;
  }
}

/** Takes a reference unless there is none left. */
function tryGet(w: Int32Array, ref: number): boolean {
  for (;;) {
    const count = Atomics.load(w, ref);
    if (count === 0) return false;
    if (Atomics.compareExchange(w, ref, count, count + 1) === count) return true;
  }
}
