/**
 * The page allocator's front: zonelists, watermarks, the slow path. Counterpart: `mm/page_alloc.c` —
 * `get_page_from_freelist`, `__alloc_pages_slowpath`, `zone_watermark_ok`, `free_unref_page`.
 *
 * Simplified: no compaction, so a high-order request fails where Linux might have compacted; the retry loop is bounded
 * by progress alone.
 */
import { gfn, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import type { Buddy } from './buddy.ts';
import { EV, EVENT_STAMP, eventRow } from './events.ts';
import * as page from './page.ts';
import { shadowMove } from './page.ts';
import { pcpIndex, type PerCpuPages } from './per-cpu-pages.ts';
import type { Tracepoints } from './tracepoints.ts';
import * as zoneWords from './zone.ts';

// Local copies: docs/performance.md § Constants.
const {
  P_FLAGS,
  P_INODE,
  P_ORDER,
  P_REF,
  P_STAMP,
  P_ZONE,
  PG_CACHED,
  PG_LRU,
  PG_STAMPED,
  SHADOW_ALLOCATED,
  SHADOW_BUDDY,
  SHADOW_PCP,
} = page;
const {
  MAX_ORDER,
  Z_FLAGS,
  Z_FREE,
  Z_HIGH,
  Z_LOW,
  Z_MIN,
  Z_NODE,
  Z_NR_FREE,
  Z_RESERVE,
  Z_TYPE,
  ZF_BELOW_HIGH,
  MIGRATE_ISOLATE,
} = zoneWords;

/** Request flags: the highest zone type in bits 0–1, then behaviour. Names follow Linux's gfp flags. */
export const GFP_ZONE_MASK = 3;
/** May use a part of the min reserve, never waits. */
export const GFP_ATOMIC = 4;
/** Never calls the OOM path. */
export const GFP_NORETRY = 8;
/** Never reclaims by itself. */
export const GFP_NOWAIT = 16;
/** Does not even wake kswapd. */
export const GFP_NO_KSWAPD = 32;
export const GFP_THISNODE = 64;
/** May empty the reserves: reclaim itself. */
export const GFP_MEMALLOC = 128;
/** Zeroed for who asks, whatever `init_on_alloc` says. */
export const GFP_ZERO = 256;
/** Will be written: the allocator of this guest does nothing else with it. */
export const GFP_WRITE = 512;

const MAX_RECLAIM_RETRIES = 16;
/** Beyond it a guest word has no 32-bit number, which `scatter32` takes. */
const MAX_WORD_PFN: number = 1 << 22;
const POISON_FREE = 0xaaaaaaaa | 0;

/** What the slow path may call upon; filled in by the kernel once reclaim and drivers exist. */
export interface MemoryPressure {
  /** `highest`: type of the highest zone that may serve the request. */
  wakeKswapd(zone: number, highest: number): void;
  /** Direct reclaim for `node`; returns pages freed. */
  reclaim(node: number): number;
  /** OOM notifiers; returns pages freed. */
  outOfMemory(): number;
}

export interface AllocatorOptions {
  /** Zeroes each allocated page (`init_on_alloc`). */
  readonly initOnAlloc: boolean;
  /** Fills freed pages with 0xaa and checks it on allocation (`page_poison=1`). */
  readonly pagePoison: boolean;
  readonly nrCpus: number;
  /** Node of each CPU. */
  readonly cpuNode: readonly number[];
}

export class PageAllocator {
  trace: Tracepoints | null = null;
  /** Allocations of this vCPU that are to fail, as if there were no memory (`fail_page_alloc`); for fault injection. */
  failNext = 0;
  /** Takes a cached page off the LRU when its last reference goes (`__page_cache_release`). */
  onLastPut: (pfn: number) => void = () => undefined;
  pressure: MemoryPressure = { wakeKswapd: () => undefined, reclaim: () => 0, outOfMemory: () => 0 };
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #shadow: number;
  readonly #vcpu: Vcpu;
  readonly #buddy: Buddy;
  readonly #pcp: PerCpuPages;
  readonly #zones: readonly number[];
  /** Zone numbers in the order to try, by node to begin with and highest zone type wanted. */
  readonly #zonelists: readonly (readonly (readonly number[])[])[];
  readonly #node: number;
  readonly #options: AllocatorOptions;
  readonly #events: number;
  /** Guest words where the stamps of one allocation go, and the stamps. */
  readonly #firstWords: Int32Array = new Int32Array(1 << MAX_ORDER);
  readonly #stamps: Int32Array = new Int32Array(1 << MAX_ORDER);

  constructor(
    arena: Arena,
    vcpu: Vcpu,
    buddy: Buddy,
    pcp: PerCpuPages,
    zones: readonly number[],
    options: AllocatorOptions,
  ) {
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#shadow = arena.shadow;
    this.#vcpu = vcpu;
    this.#buddy = buddy;
    this.#pcp = pcp;
    this.#zones = zones;
    this.#options = options;
    this.#events = eventRow(vcpu.id);
    this.#node = options.cpuNode[vcpu.id] ?? 0;
    const nodes = Math.max(...zones.map((z) => arena.w[z + Z_NODE])) + 1;
    this.#zonelists = Array.from({ length: nodes }, (_, node) =>
      [0, 1, 2, 3].map((highest) =>
        zones
          .map((__, i) => i)
          .filter((i) => arena.w[zones[i] + Z_TYPE] <= highest)
          .toSorted((x, y) => {
            const local = (i: number): number => (arena.w[zones[i] + Z_NODE] === node ? 0 : 1);
            return local(x) - local(y) || arena.w[zones[y] + Z_TYPE] - arena.w[zones[x] + Z_TYPE];
          }),
      ),
    );
  }

  /**
   * Allocates 2^order pages, zeroes and stamps them; −1 when reclaim and notifiers could not help. `gfp` holds the
   * highest zone type and `GFP_*` flags; `node` is tried first.
   */
  alloc(order: number, migratetype: number, gfp: number, node: number = this.#node): number {
    if (this.failNext > 0) {
      this.failNext--;
      this.#w[this.#events + EV.alloc_fail]++;
      return -1;
    }
    const zonelist = this.#zonelists[node][gfp & GFP_ZONE_MASK];
    let pfn = this.#fromFreelists(order, migratetype, gfp, Z_LOW, zonelist);
    if (pfn < 0) pfn = this.#slowPath(order, migratetype, gfp, zonelist);
    const w = this.#w;
    if (pfn < 0) {
      w[this.#events + EV.alloc_fail]++;
      return -1;
    }
    const page = this.#memmap + (pfn << 4);
    w[page + P_ORDER] = order;
    w[page + P_REF] = 1;
    w[this.#events + EV.pgalloc] += 1 << order;
    this.#prepare(pfn, order, (gfp & GFP_ZERO) !== 0);
    if (this.trace !== null) this.trace.pageAlloc(pfn, order, migratetype, gfp);
    return pfn;
  }

  /** Allocates exactly page `pfn`, if the buddy has it: unmovable memory at a place that a capture names. */
  allocExactly(pfn: number): boolean {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    const zone = this.#zones[w[page + P_ZONE]];
    this.#buddy.lock(zone);
    const taken = this.#buddy.takeExact(zone, pfn);
    this.#buddy.unlock(zone);
    if (!taken) return false;
    shadowMove(w, this.#shadow, this.#vcpu, pfn, 1, SHADOW_BUDDY, SHADOW_ALLOCATED);
    w[page + P_ORDER] = 0;
    w[page + P_REF] = 1;
    w[this.#events + EV.pgalloc]++;
    this.#prepare(pfn, 0, false);
    return true;
  }

  /** Zeroes (host memory is touched here) and stamps the pages of a fresh allocation. */
  #prepare(pfn: number, order: number, zero: boolean): void {
    const w = this.#w;
    const vcpu = this.#vcpu;
    const count = 1 << order;
    vcpu.clock += vcpu.costs.allocNs;
    if (this.#options.pagePoison) this.#checkPoison(pfn, count);
    if (zero || this.#options.initOnAlloc) vcpu.zeroPages(gfn(pfn), count);
    // Ids of different CPUs differ modulo their number; never 0, which means free.
    const stamp = (w[this.#events + EVENT_STAMP] * this.#options.nrCpus + vcpu.id + 1) & 0x7fff_ffff;
    w[this.#events + EVENT_STAMP]++;
    let page = this.#memmap + (pfn << 4);
    for (let i = 0; i < count; i++, page += 16) {
      w[page + P_STAMP] = stamp;
      w[page + P_FLAGS] = PG_STAMPED;
      this.#firstWords[i] = (pfn + i) << 10;
    }
    if (count === 1 || pfn >= MAX_WORD_PFN)
      for (let i = 0; i < count; i++) vcpu.store32(gfn(pfn + i), 0, stamp);
    else vcpu.scatter32(this.#firstWords, this.#stamps.fill(stamp, 0, count), 0, count);
  }

  #checkPoison(pfn: number, count: number): void {
    for (let i = 0; i < count; i++) {
      if (this.#w[this.#memmap + ((pfn + i) << 4) + P_STAMP] !== -1) continue;
      this.#w[this.#events + EV.poison_checked]++;
      const found = this.#vcpu.load32(gfn(pfn + i), 8);
      if (found !== POISON_FREE) this.#vcpu.report('stamp', pfn + i, POISON_FREE, found);
    }
  }

  // ── Fast path ────────────────────────────────────────────────────────────────────────────────────────────────────

  #fromFreelists(
    order: number,
    migratetype: number,
    gfp: number,
    mark: number,
    list: readonly number[],
  ): number {
    const w = this.#w;
    const highest = gfp & GFP_ZONE_MASK;
    const firstNode = w[this.#zones[list[0]] + Z_NODE];
    for (let i = 0; i < list.length; i++) {
      const zoneIndex = list[i];
      const zone = this.#zones[zoneIndex];
      if ((gfp & GFP_THISNODE) !== 0 && w[zone + Z_NODE] !== firstNode) continue;
      let pages = w[zone + mark];
      if (mark === Z_MIN && (gfp & GFP_ATOMIC) !== 0) pages -= pages >> 1;
      if ((gfp & GFP_MEMALLOC) !== 0) pages = 0;
      if (!watermarkOk(w, zone, order, pages, highest)) continue;
      if ((w[zone + Z_FLAGS] & ZF_BELOW_HIGH) === 0 && w[zone + Z_FREE] < w[zone + Z_HIGH]) {
        Atomics.or(w, zone + Z_FLAGS, ZF_BELOW_HIGH);
      }
      const pfn = this.#rmqueue(zoneIndex, order, migratetype);
      if (pfn >= 0) {
        if (w[zone + Z_NODE] !== firstNode) w[this.#events + EV.numa_miss]++;
        return pfn;
      }
    }
    return -1;
  }

  /**
   * What this CPU's lists hold has left the zone's free count already: below the min watermark it is used up before
   * anything is drained or reclaimed. Linux drains first; near exhaustion that costs a drain per page for no other result.
   */
  #fromOwnLists(order: number, migratetype: number, zonelist: readonly number[]): number {
    if (pcpIndex(order, migratetype) < 0) return -1;
    for (const zoneIndex of zonelist) {
      const pfn = this.#pcp.take(zoneIndex, order, migratetype);
      if (pfn < 0) continue;
      shadowMove(this.#w, this.#shadow, this.#vcpu, pfn, 1 << order, SHADOW_PCP, SHADOW_ALLOCATED);
      return pfn;
    }
    return -1;
  }

  #rmqueue(zoneIndex: number, order: number, migratetype: number): number {
    const w = this.#w;
    if (pcpIndex(order, migratetype) >= 0) {
      const pfn = this.#pcp.alloc(zoneIndex, order, migratetype);
      if (pfn >= 0) shadowMove(w, this.#shadow, this.#vcpu, pfn, 1 << order, SHADOW_PCP, SHADOW_ALLOCATED);
      return pfn;
    }
    const zone = this.#zones[zoneIndex];
    this.#buddy.lock(zone);
    const pfn = this.#buddy.rmqueue(zone, order, migratetype);
    this.#buddy.unlock(zone);
    if (pfn >= 0) shadowMove(w, this.#shadow, this.#vcpu, pfn, 1 << order, SHADOW_BUDDY, SHADOW_ALLOCATED);
    return pfn;
  }

  // ── Slow path ────────────────────────────────────────────────────────────────────────────────────────────────────

  #slowPath(order: number, migratetype: number, gfp: number, zonelist: readonly number[]): number {
    if ((gfp & GFP_NO_KSWAPD) === 0)
      for (const i of zonelist) this.pressure.wakeKswapd(this.#zones[i], gfp & 3);
    let pfn = this.#fromFreelists(order, migratetype, gfp, Z_MIN, zonelist);
    if (pfn >= 0 || (gfp & (GFP_NOWAIT | GFP_ATOMIC | GFP_MEMALLOC)) !== 0) return pfn;
    const w = this.#w;
    pfn = this.#fromOwnLists(order, migratetype, zonelist);
    if (pfn >= 0) return pfn;
    const node = w[this.#zones[zonelist[0]] + Z_NODE];
    let drained = false;
    for (let tries = 0; tries < MAX_RECLAIM_RETRIES; tries++) {
      w[this.#events + EV.allocstall]++;
      const progress = this.pressure.reclaim(node);
      pfn = this.#fromFreelists(order, migratetype, gfp, Z_MIN, zonelist);
      if (pfn >= 0) return pfn;
      if (!drained) {
        // Pages on per-CPU lists are free, but not for us until they are drained.
        drained = true;
        this.#pcp.drainAll(this.#options.nrCpus);
        pfn = this.#fromFreelists(order, migratetype, gfp, Z_MIN, zonelist);
        if (pfn >= 0) return pfn;
        continue;
      }
      if (progress > 0) continue;
      if ((gfp & GFP_NORETRY) !== 0 || this.pressure.outOfMemory() === 0) return -1;
      this.#pcp.drain(this.#vcpu.id);
    }
    return -1;
  }

  // ── Freeing ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Drops one reference of an order-0 page that may be shared with page cache or reclaim; frees it with the last. */
  put(pfn: number): boolean {
    const page = this.#memmap + (pfn << 4);
    if (Atomics.sub(this.#w, page + P_REF, 1) !== 1) return false;
    // Pairs with the `and` that ends `Lru.remove`: who finds the page off its list knows that nobody reads its links any more.
    if ((Atomics.load(this.#w, page + P_FLAGS) & PG_LRU) !== 0) this.onLastPut(pfn);
    this.#release(pfn, 0);
    return true;
  }

  /** Takes one more reference of a page that the caller may keep alive. */
  get(pfn: number): void {
    Atomics.add(this.#w, this.#memmap + (pfn << 4) + P_REF, 1);
  }

  /** Frees 2^order pages. Cached pages go through `put`. Checks the stamps first. */
  free(pfn: number, order: number): void {
    const flags = this.#w[this.#memmap + (pfn << 4) + P_FLAGS];
    if ((flags & PG_CACHED) !== 0) this.put(pfn);
    else this.#release(pfn, order);
  }

  /** The last reference is gone: checks stamps and gives the pages to the per-CPU list or the buddy. */
  #release(pfn: number, order: number): void {
    const w = this.#w;
    const vcpu = this.#vcpu;
    const count = 1 << order;
    let page = this.#memmap + (pfn << 4);
    vcpu.clock += vcpu.costs.allocNs;
    if (this.trace !== null) this.trace.pageFree(pfn, order);
    // Never touches a page that was not stamped, so not touched: the host may have no frame for it.
    const together = count > 1 && pfn < MAX_WORD_PFN && (w[page + P_FLAGS] & PG_STAMPED) !== 0;
    if (together) {
      for (let i = 0; i < count; i++) this.#firstWords[i] = (pfn + i) << 10;
      vcpu.gather32(this.#firstWords, this.#stamps, 0, count);
    }
    for (let i = 0; i < count; i++, page += 16) {
      const flags = w[page + P_FLAGS];
      if ((flags & PG_STAMPED) !== 0) {
        const found = together ? this.#stamps[i] : vcpu.load32(gfn(pfn + i), 0);
        if (found !== w[page + P_STAMP]) vcpu.report('stamp', pfn + i, w[page + P_STAMP], found);
        w[this.#events + EV.stamp_checked]++;
      }
      w[page + P_STAMP] = 0;
      w[page + P_INODE] = -1;
      w[page + P_FLAGS] = 0;
      if (this.#options.pagePoison) {
        const frame = vcpu.window((pfn + i) * 4096, 4096, true);
        if (frame) vcpu.u8.fill(0xaa, vcpu.at, vcpu.at + 4096);
        w[page + P_STAMP] = -1;
      }
    }
    w[this.#events + EV.pgfree] += count;
    const zoneIndex = w[this.#memmap + (pfn << 4) + P_ZONE];
    const migratetype = this.#buddy.pageblockType(pfn);
    // A page of an isolated block goes straight back: on a per-CPU list it would be handed out again.
    if (migratetype !== MIGRATE_ISOLATE && pcpIndex(order, migratetype) >= 0) {
      shadowMove(w, this.#shadow, vcpu, pfn, count, SHADOW_ALLOCATED, SHADOW_PCP);
      this.#pcp.free(zoneIndex, pfn, order, migratetype);
      return;
    }
    const zone = this.#zones[zoneIndex];
    this.#buddy.lock(zone);
    shadowMove(w, this.#shadow, vcpu, pfn, count, SHADOW_ALLOCATED, SHADOW_BUDDY);
    this.#buddy.freeOne(zone, pfn, order, true);
    this.#buddy.unlock(zone);
  }

  /** The page's content is about to be the device's: its stamp is no longer in it. */
  unstamp(pfn: number): void {
    this.#w[this.#memmap + (pfn << 4) + P_FLAGS] &= ~PG_STAMPED;
  }

  /** The id that the allocation of `pfn` was given; 0 when it is free. */
  stampOf(pfn: number): number {
    return this.#w[this.#memmap + (pfn << 4) + P_STAMP];
  }
}

/**
 * Whether taking 2^order pages leaves `zone` above `mark` plus what it keeps for requests of lower zones, with a block
 * large enough on its lists (`__zone_watermark_ok`). Read without the lock: a stale count only moves the decision.
 */
export function watermarkOk(
  w: Int32Array,
  zone: number,
  order: number,
  mark: number,
  highestType: number,
): boolean {
  if (w[zone + Z_FREE] - (1 << order) + 1 <= mark + w[zone + Z_RESERVE + highestType]) return false;
  if (order === 0) return true;
  for (let o = order; o <= MAX_ORDER; o++) if (w[zone + Z_NR_FREE + o] > 0) return true;
  return false;
}
