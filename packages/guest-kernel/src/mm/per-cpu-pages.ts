/**
 * Per-CPU page lists: orders 0–3 by migratetype plus one list of huge pages per mobility, with `high` tuned at run time
 * as since Linux 6.7. Counterpart: `mm/page_alloc.c` — `rmqueue_pcplist`, `nr_pcp_alloc`, `nr_pcp_free`,
 * `nr_pcp_high`, `free_pcppages_bulk`, `decay_pcp_high`.
 *
 * Who may touch them: the CPU that holds the *lease* on its lists, which a vCPU takes when it enters a slice and gives
 * back when it leaves. That spares a lock per operation. Linux ≥ 6.0 takes `pcp->lock` instead; the effect users can ask
 * about is the same: another CPU's lists can be drained, by the drainer if their owner is away, else by the owner on request.
 */
import { assert, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import * as layout from '../layout.ts';
import type { Buddy } from './buddy.ts';
import { EV, eventRow } from './events.ts';
import * as page from './page.ts';
import { shadowMove } from './page.ts';
import * as zoneWords from './zone.ts';

// Local copies: docs/performance.md § Constants.
const { MAX_CPUS, PCP_BASE, PCP_WORDS } = layout;
const { P_NEXT, P_PREV, SHADOW_BUDDY, SHADOW_PCP } = page;
const {
  MIGRATE_MOVABLE,
  MIGRATE_RECLAIMABLE,
  PAGEBLOCK_ORDER,
  Z_FLAGS,
  Z_FREE,
  Z_HIGH,
  Z_PCP_BATCH,
  Z_PCP_HIGH_MAX,
  Z_PCP_HIGH_MIN,
  ZF_BELOW_HIGH,
  ZF_RECLAIM_ACTIVE,
} = zoneWords;

/** Words of one (zone, CPU): then head and tail of each list. */
const C_COUNT = 0;
const C_HIGH = 1;
const C_ALLOC_FACTOR = 2;
const C_FREE_COUNT = 3;
const C_FLAGS = 4;
const C_LISTS = 8;
/** On zone 0's block of each CPU: the lease and the drain request. */
const C_LEASE = 48;
const C_DRAIN = 49;

const NR_LISTS = 14;
const COSTLY_ORDER = 3;
/** `CONFIG_PCP_BATCH_SCALE_MAX`. */
const SCALE_MAX = 5;
/** Flag: the last free was of order 1–3. */
const PREV_FREE_HIGH_ORDER = 1;

const LEASE_FREE = 0;
const LEASE_OWNER = 1;
const LEASE_DRAINER = 2;

/** List number of an order and migratetype; −1 if that order is not kept per CPU. High-atomic pages count as movable. */
export function pcpIndex(order: number, migratetype: number): number {
  if (order <= COSTLY_ORDER)
    return order * 3 + (migratetype > MIGRATE_RECLAIMABLE ? MIGRATE_MOVABLE : migratetype);
  return order === 9 ? 12 + (migratetype === MIGRATE_MOVABLE ? 1 : 0) : -1;
}

function listOrder(index: number): number {
  return index < 12 ? (index / 3) | 0 : 9;
}

function clamp(value: number, low: number, high: number): number {
  return value < low ? low : value > high ? high : value;
}

export class PerCpuPages {
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #shadow: number;
  readonly #buddy: Buddy;
  readonly #vcpu: Vcpu;
  readonly #zones: readonly number[];
  /** First word of this CPU's lists, by zone number. */
  readonly #own: readonly number[];
  readonly #events: number;
  readonly #relax: () => void;

  /** `zones` are the first words of the zones, in index order. */
  constructor(arena: Arena, buddy: Buddy, vcpu: Vcpu, zones: readonly number[]) {
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#shadow = arena.shadow;
    this.#buddy = buddy;
    this.#vcpu = vcpu;
    this.#zones = zones;
    this.#own = zones.map((_, zoneIndex) => PerCpuPages.base(zoneIndex, vcpu.id));
    this.#events = eventRow(vcpu.id);
    this.#relax = () => {
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** First word of `cpu`'s lists of zone number `zoneIndex`. */
  static base(zoneIndex: number, cpu: number): number {
    return PCP_BASE + (zoneIndex * MAX_CPUS + cpu) * PCP_WORDS;
  }

  /** Empties the lists of all zones and CPUs. Boot only. */
  static init(w: Int32Array): void {
    for (let at = PCP_BASE; at < PCP_BASE + 8 * MAX_CPUS * PCP_WORDS; at += PCP_WORDS) {
      w.fill(0, at, at + PCP_WORDS);
      w.fill(-1, at + C_LISTS, at + C_LISTS + 2 * NR_LISTS);
    }
  }

  /** Pages on the lists of one zone and CPU (`zoneinfo`: count). */
  static count(w: Int32Array, zoneIndex: number, cpu: number): number {
    return w[PerCpuPages.base(zoneIndex, cpu) + C_COUNT];
  }
  static high(w: Int32Array, zoneIndex: number, cpu: number): number {
    return w[PerCpuPages.base(zoneIndex, cpu) + C_HIGH];
  }

  // ── Lease ────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Whether `cpu` is in a slice: it may use translations, and answers requests. */
  static inSlice(w: Int32Array, cpu: number): boolean {
    return Atomics.load(w, PerCpuPages.base(0, cpu) + C_LEASE) === LEASE_OWNER;
  }

  /** Takes the lease on this CPU's lists for a slice. Pairs with the drainer's compare-exchange. */
  enter(): void {
    const at = PerCpuPages.base(0, this.#vcpu.id) + C_LEASE;
    while (Atomics.compareExchange(this.#w, at, LEASE_FREE, LEASE_OWNER) !== LEASE_FREE) this.#relax();
  }

  /** Gives the lease back; publishes the lists to a later holder. */
  leave(): void {
    Atomics.store(this.#w, PerCpuPages.base(0, this.#vcpu.id) + C_LEASE, LEASE_FREE);
  }

  /** Drains if another CPU asked for it. Between program steps and in waits. */
  serveDrainRequest(): void {
    const at = PerCpuPages.base(0, this.#vcpu.id) + C_DRAIN;
    if (this.#w[at] === 0 && Atomics.load(this.#w, at) === 0) return;
    this.drain(this.#vcpu.id);
    Atomics.store(this.#w, at, 0);
  }

  /** Gives every CPU's pages back to the buddy (`drain_all_pages`). Waits for CPUs that are in a slice, serving ours. */
  drainAll(nrCpus: number): void {
    this.#w[this.#events + EV.remote_drain]++;
    this.drain(this.#vcpu.id);
    for (let cpu = 0; cpu < nrCpus; cpu++) {
      if (cpu === this.#vcpu.id) continue;
      const base = PerCpuPages.base(0, cpu);
      Atomics.store(this.#w, base + C_DRAIN, 1);
      while (Atomics.load(this.#w, base + C_DRAIN) !== 0) {
        if (Atomics.compareExchange(this.#w, base + C_LEASE, LEASE_FREE, LEASE_DRAINER) === LEASE_FREE) {
          this.drain(cpu);
          Atomics.store(this.#w, base + C_DRAIN, 0);
          Atomics.store(this.#w, base + C_LEASE, LEASE_FREE);
          break;
        }
        // Its owner runs and will see the request; it may be waiting for us to serve the like.
        this.serveDrainRequest();
        this.#relax();
      }
    }
  }

  /** Empties `cpu`'s lists into the buddy. Needs the lease. */
  drain(cpu: number): void {
    for (let z = 0; z < this.#zones.length; z++) {
      const pcp = PerCpuPages.base(z, cpu);
      const count = this.#w[pcp + C_COUNT];
      if (count > 0) this.#freeBulk(this.#zones[z], pcp, count, 0);
    }
  }

  // ── Lists ────────────────────────────────────────────────────────────────────────────────────────────────────────

  #pushHead(list: number, pfn: number): void {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    const head = w[list];
    w[page + P_NEXT] = head;
    w[page + P_PREV] = -1;
    if (head >= 0) w[this.#memmap + (head << 4) + P_PREV] = pfn;
    else w[list + 1] = pfn;
    w[list] = pfn;
  }

  /** Appends `count` blocks of `order` that lie side by side. */
  #pushRun(list: number, first: number, count: number, order: number): void {
    const w = this.#w;
    const step = 1 << order;
    const last = first + ((count - 1) << order);
    const tail = w[list + 1];
    for (let pfn = first, prev = tail; pfn <= last; prev = pfn, pfn += step) {
      const page = this.#memmap + (pfn << 4);
      w[page + P_NEXT] = pfn === last ? -1 : pfn + step;
      w[page + P_PREV] = prev;
    }
    if (tail >= 0) w[this.#memmap + (tail << 4) + P_NEXT] = first;
    else w[list] = first;
    w[list + 1] = last;
  }

  /** Puts an order-0 page on `cpu`'s list as a capture found it. Boot only. */
  seed(zoneIndex: number, cpu: number, pfn: number, migratetype: number): void {
    const pcp = PerCpuPages.base(zoneIndex, cpu);
    this.#pushRun(pcp + C_LISTS + 2 * pcpIndex(0, migratetype), pfn, 1, 0);
    this.#w[pcp + C_COUNT]++;
  }

  // ── Allocation ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** Takes a block of `order` from this CPU's list, refilling it from the buddy; −1 if the zone has none. */
  alloc(zoneIndex: number, order: number, migratetype: number): number {
    const w = this.#w;
    const pcp = this.#own[zoneIndex];
    const list = pcp + C_LISTS + 2 * pcpIndex(order, migratetype);
    w[pcp + C_FREE_COUNT] >>= 1;
    const head = w[list];
    if (head >= 0) return this.#popHead(pcp, list, order, head);
    if (this.#refill(zoneIndex, pcp, list, order, migratetype) === 0) return -1;
    return this.#popHead(pcp, list, order, w[list]);
  }

  /** Takes a block that is on this CPU's list already; −1 if none is. */
  take(zoneIndex: number, order: number, migratetype: number): number {
    const pcp = this.#own[zoneIndex];
    const list = pcp + C_LISTS + 2 * pcpIndex(order, migratetype);
    const head = this.#w[list];
    return head < 0 ? -1 : this.#popHead(pcp, list, order, head);
  }

  /** `pfn` is the list's head. */
  #popHead(pcp: number, list: number, order: number, pfn: number): number {
    const w = this.#w;
    const next = w[this.#memmap + (pfn << 4) + P_NEXT];
    w[list] = next;
    if (next >= 0) w[this.#memmap + (next << 4) + P_PREV] = -1;
    else w[list + 1] = -1;
    w[pcp + C_COUNT] -= 1 << order;
    return pfn;
  }

  /** Fills a list from the buddy under the zone lock; returns the blocks moved. */
  #refill(zoneIndex: number, pcp: number, list: number, order: number, migratetype: number): number {
    const zone = this.#zones[zoneIndex];
    const w = this.#w;
    const want = this.#nrAlloc(zone, pcp, order);
    let got = 0;
    this.#buddy.lock(zone);
    while (got < want) {
      const pfn = this.#buddy.rmqueueRun(zone, order, migratetype, want - got);
      if (pfn < 0) break;
      const { taken } = this.#buddy;
      shadowMove(w, this.#shadow, this.#vcpu, pfn, taken << order, SHADOW_BUDDY, SHADOW_PCP);
      this.#pushRun(list, pfn, taken, order);
      got += taken;
    }
    this.#buddy.unlock(zone);
    w[pcp + C_COUNT] += got << order;
    w[this.#events + EV.pcp_refill]++;
    return got;
  }

  /** How many blocks to fetch: doubles with each refill that no free interrupts. */
  #nrAlloc(zone: number, pcp: number, order: number): number {
    const w = this.#w;
    const base = w[zone + Z_PCP_BATCH];
    const min = w[zone + Z_PCP_HIGH_MIN];
    const max = w[zone + Z_PCP_HIGH_MAX];
    let high = clamp(w[pcp + C_HIGH], min, max);
    if (high < base) {
      w[pcp + C_HIGH] = high;
      return 1;
    }
    let batch = order === 0 ? base << w[pcp + C_ALLOC_FACTOR] : base;
    // With a longer list the buddy need not have been asked.
    if (min !== max && (w[zone + Z_FLAGS] & ZF_BELOW_HIGH) === 0) high = Math.min(high + batch, max);
    w[pcp + C_HIGH] = high;
    if (order === 0) {
      const most = Math.max(high - w[pcp + C_COUNT] - base, base);
      if (batch <= most && w[pcp + C_ALLOC_FACTOR] < SCALE_MAX) w[pcp + C_ALLOC_FACTOR]++;
      batch = Math.min(batch, most);
    }
    return batch > 1 ? Math.max(batch >> order, 2) : batch;
  }

  // ── Freeing ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Puts a block on this CPU's list and trims the lists when they exceed `high`. */
  free(zoneIndex: number, pfn: number, order: number, migratetype: number): void {
    const w = this.#w;
    const zone = this.#zones[zoneIndex];
    const pcp = this.#own[zoneIndex];
    const index = pcpIndex(order, migratetype);
    w[pcp + C_ALLOC_FACTOR] >>= 1;
    this.#pushHead(pcp + C_LISTS + 2 * index, pfn);
    const count = (w[pcp + C_COUNT] += 1 << order);
    const batch = w[zone + Z_PCP_BATCH];
    let freeHigh = false;
    if (order > 0 && order <= COSTLY_ORDER) {
      freeHigh =
        w[pcp + C_FREE_COUNT] >= batch && (w[pcp + C_FLAGS] & PREV_FREE_HIGH_ORDER) !== 0 && count >= batch;
      w[pcp + C_FLAGS] |= PREV_FREE_HIGH_ORDER;
    } else w[pcp + C_FLAGS] &= ~PREV_FREE_HIGH_ORDER;
    if (w[pcp + C_FREE_COUNT] < batch << SCALE_MAX) w[pcp + C_FREE_COUNT] += 1 << order;
    // The common case, in which `#nrHigh` changes nothing: nobody reclaims, and the lists are not full.
    const limit = w[pcp + C_HIGH];
    if (!freeHigh && count < limit && w[zone + Z_FLAGS] === 0 && limit <= w[zone + Z_PCP_HIGH_MAX]) return;
    const high = this.#nrHigh(zone, pcp, batch, freeHigh);
    if (count < high) return;
    this.#freeBulk(zone, pcp, this.#nrFree(pcp, batch, high, freeHigh), index);
    if ((w[zone + Z_FLAGS] & ZF_BELOW_HIGH) !== 0 && w[zone + Z_FREE] > w[zone + Z_HIGH]) {
      Atomics.and(w, zone + Z_FLAGS, ~ZF_BELOW_HIGH);
    }
  }

  #nrFree(pcp: number, batch: number, high: number, freeHigh: boolean): number {
    const w = this.#w;
    if (freeHigh) return Math.min(w[pcp + C_COUNT], batch << SCALE_MAX);
    if (high < batch) return 1;
    return clamp(w[pcp + C_FREE_COUNT], batch, Math.max(batch, high - batch));
  }

  #nrHigh(zone: number, pcp: number, batch: number, freeHigh: boolean): number {
    const w = this.#w;
    const min = w[zone + Z_PCP_HIGH_MIN];
    const max = w[zone + Z_PCP_HIGH_MAX];
    const high = clamp(w[pcp + C_HIGH], min, max);
    w[pcp + C_HIGH] = high;
    if (high === 0) return 0;
    if (freeHigh) {
      w[pcp + C_HIGH] = Math.max(high - (batch << SCALE_MAX), min);
      return 0;
    }
    const freeCount = Math.max(w[pcp + C_FREE_COUNT], batch);
    if ((w[zone + Z_FLAGS] & ZF_RECLAIM_ACTIVE) !== 0) {
      w[pcp + C_HIGH] = Math.max(high - freeCount, min);
      return Math.min(batch << 2, w[pcp + C_HIGH]);
    }
    if (min === max) return high;
    if ((w[zone + Z_FLAGS] & ZF_BELOW_HIGH) !== 0) {
      w[pcp + C_HIGH] = Math.max(high - freeCount, min);
      return Math.max(w[pcp + C_COUNT], min);
    }
    if (w[pcp + C_COUNT] >= high) {
      const need = w[pcp + C_FREE_COUNT] + batch;
      if (high < need) w[pcp + C_HIGH] = clamp(need, min, max);
    }
    return high;
  }

  /** Returns `pages` pages to the buddy, oldest first, list by list from `index`. */
  #freeBulk(zone: number, pcp: number, pages: number, index: number): void {
    const w = this.#w;
    let left = Math.min(pages, w[pcp + C_COUNT]);
    let i = index - 1;
    w[this.#events + EV.pcp_drain]++;
    this.#buddy.lock(zone);
    while (left > 0) {
      let list = 0;
      let empty = 0;
      do {
        assert(empty++ < NR_LISTS, 'a per-CPU count is what its lists hold');
        i = i + 1 >= NR_LISTS ? 0 : i + 1;
        list = pcp + C_LISTS + 2 * i;
      } while (w[list + 1] < 0);
      const order = listOrder(i);
      do {
        const pfn = w[list + 1];
        const run = this.#runOrder(pfn, order, left);
        const last = pfn + ((1 << run) - (1 << order));
        const prev = w[this.#memmap + (last << 4) + P_PREV];
        w[list + 1] = prev;
        if (prev >= 0) w[this.#memmap + (prev << 4) + P_NEXT] = -1;
        else w[list] = -1;
        left -= 1 << run;
        w[pcp + C_COUNT] -= 1 << run;
        shadowMove(w, this.#shadow, this.#vcpu, pfn, 1 << run, SHADOW_PCP, SHADOW_BUDDY);
        this.#buddy.freeOne(zone, pfn, run, true);
      } while (left > 0 && w[list + 1] >= 0);
    }
    this.#buddy.unlock(zone);
  }

  /**
   * Order of the largest block, up to a pageblock and `left` pages, that the blocks of `order` at a list's end make up,
   * the last of them being `pfn`. Freed one by one they would merge to that and nothing else, since each one's buddy is
   * among them.
   */
  #runOrder(pfn: number, order: number, left: number): number {
    const w = this.#w;
    const step = 1 << order;
    let run = order;
    let end = pfn + step;
    for (let at = pfn; run < PAGEBLOCK_ORDER && (pfn & (1 << run)) === 0 && 2 << run <= left; run++) {
      const whole = pfn + (2 << run);
      for (; end < whole; end += step, at += step)
        if (w[this.#memmap + (at << 4) + P_PREV] !== end) return run;
    }
    return run;
  }

  /** Lets idle lists shrink, once a second (`decay_pcp_high` in `vmstat_update`). False: none is to shrink any more. */
  decay(): boolean {
    const w = this.#w;
    let more = false;
    for (let z = 0; z < this.#zones.length; z++) {
      const zone = this.#zones[z];
      const pcp = this.#own[z];
      const min = w[zone + Z_PCP_HIGH_MIN];
      const batch = w[zone + Z_PCP_BATCH];
      if (w[pcp + C_HIGH] > min) {
        w[pcp + C_HIGH] = Math.max(
          w[pcp + C_COUNT] - (batch << SCALE_MAX),
          w[pcp + C_HIGH] - (w[pcp + C_HIGH] >> 3),
          min,
        );
        more ||= w[pcp + C_HIGH] > min;
      }
      const excess = w[pcp + C_COUNT] - w[pcp + C_HIGH];
      if (excess > 0 && w[pcp + C_HIGH] > 0) this.#freeBulk(zone, pcp, excess, 0);
    }
    return more;
  }
}
