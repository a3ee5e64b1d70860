/**
 * Memory hotplug by memory block: add, online, take sub-blocks out of use and back, remove. Counterpart:
 * `mm/memory_hotplug.c`, `mm/page_isolation.c`, `alloc_contig_range`.
 *
 * Runs in a pass of a virtio-mem driver, under its device's mutex; other vCPUs allocate and free meanwhile, or have a pass
 * of another device. What they may touch, free lists, counts and pageblock types, changes under the zone lock; watermarks
 * and memory groups under the hotplug lock; section records are the device's own.
 *
 * Simplified: added memory has its memmap in the arena from the start; the guest pages that would back it are charged
 * when a block is added and freed when it is removed (H31).
 */
import { gfn, plainView, spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import type { HotplugConfig } from '../boot.ts';
import {
  DIMM_GROUPS,
  GROUP_BASE,
  GROUP_WORDS,
  H_HOTPLUG_LOCK,
  H_TOTAL_PAGES,
  NR_GROUPS,
  SECTION_WORDS,
} from '../layout.ts';
import type { Buddy } from './buddy.ts';
import { EV, eventRow } from './events.ts';
import {
  PAGE_LIST_END,
  PG_ANON,
  PG_CACHED,
  PG_OFFLINE,
  PG_RESERVED,
  FREE_ORDER,
  P_FLAGS,
  P_INODE,
  P_NEXT,
  P_ORDER,
  P_STAMP,
  P_ZONE,
  SHADOW_ABSENT,
  SHADOW_BALLOON,
  SHADOW_BUDDY,
  shadowMove,
} from './page.ts';
import { GFP_NORETRY, GFP_NOWAIT, type PageAllocator } from './page-alloc.ts';
import type { PageCache } from './page-cache.ts';
import type { PerCpuPages } from './per-cpu-pages.ts';
import type { Processes } from './process.ts';
import {
  MAX_ORDER,
  MIGRATE_MOVABLE,
  MIGRATE_UNMOVABLE,
  PAGEBLOCK_PAGES,
  setupWatermarks,
  Z_END,
  Z_MANAGED,
  Z_NODE,
  Z_PRESENT,
  Z_START,
  Z_TYPE,
  ZONE_MOVABLE,
  ZONE_NORMAL,
} from './zone.ts';

/** Words of a section's record. */
const S_STATE = 0;
const S_ZONE = 1;
const S_MEMMAP = 2;
/** The fourth word is virtio-mem's. */
export const S_DRIVER = 3;

/** Words of a memory group (`struct memory_group`): its node, pages of a unit, pages online by kind of zone. */
const G_NODE = 0;
const G_UNIT = 1;
const G_KERNEL = 2;
const G_MOVABLE = 3;

const ABSENT = 0;
const ADDED = 1;
const ONLINE = 2;

/** Pages of memmap per page: 64 of 4096 bytes. */
const PAGES_PER_MEMMAP_PAGE = 64;
/** Highest zone a movable page may go to. */
const MOVABLE_GFP: number = 3 | GFP_NORETRY;
const MIGRATE_TRIES = 5;
const ANY_NODE = -1;
/** Id of a freed page that holds poison. */
const POISONED = -1;

export class MemoryHotplug {
  readonly sectionPages: number;
  /** Moves pages of a balloon, in a kernel with balloon compaction; null without. */
  balloon: { migrate(from: number, to: number): boolean } | null = null;
  readonly #w: Int32Array;
  /** Looked at without the lock that guards it, as `data_race()` marks in Linux: decides what to try, never what is true. */
  readonly #peek: Int32Array;
  readonly #memmap: number;
  readonly #shadow: number;
  readonly #free: number;
  readonly #sections: number;
  readonly #vcpu: Vcpu;
  readonly #buddy: Buddy;
  readonly #pcp: PerCpuPages;
  readonly #alloc: PageAllocator;
  readonly #cache: PageCache;
  readonly #processes: Processes;
  readonly #zones: readonly number[];
  readonly config: HotplugConfig;
  readonly #cpuNode: readonly number[];
  readonly #initOnAlloc: boolean;
  readonly #events: number;
  readonly #relax: () => void;

  constructor(
    arena: Arena,
    vcpu: Vcpu,
    buddy: Buddy,
    pcp: PerCpuPages,
    alloc: PageAllocator,
    cache: PageCache,
    processes: Processes,
    zones: readonly number[],
    config: HotplugConfig,
    cpuNode: readonly number[],
    initOnAlloc: boolean,
  ) {
    this.sectionPages = config.sectionPages;
    this.#w = arena.w;
    this.#peek = plainView(arena.w);
    this.#memmap = arena.memmap;
    this.#shadow = arena.shadow;
    this.#free = arena.free;
    this.#sections = arena.layout.sections;
    this.#vcpu = vcpu;
    this.#buddy = buddy;
    this.#pcp = pcp;
    this.#alloc = alloc;
    this.#cache = cache;
    this.#processes = processes;
    this.#zones = zones;
    this.config = config;
    this.#cpuNode = cpuNode;
    this.#initOnAlloc = initOnAlloc;
    this.#events = eventRow(vcpu.id);
    this.#relax = () => {
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** First word of the record of the section that holds `pfn`. */
  section(pfn: number): number {
    return this.#sections + Math.floor(pfn / this.sectionPages) * SECTION_WORDS;
  }

  /** Whether added memory goes online at once. */
  get autoOnline(): boolean {
    return this.config.policy !== 'offline';
  }

  isAdded(pfn: number): boolean {
    return this.#w[this.section(pfn) + S_STATE] !== ABSENT;
  }

  isOnline(pfn: number): boolean {
    return this.#w[this.section(pfn) + S_STATE] === ONLINE;
  }

  /** Zone type of an online section. */
  zoneTypeOf(pfn: number): number {
    return this.#w[this.#zones[this.#w[this.section(pfn) + S_ZONE]] + Z_TYPE];
  }

  // ── Add and remove ───────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * The memory group of a device: memory on `node` that comes and goes `unit` pages at once. Memory that a device says is on a
   * node that the guest does not have is taken as on node 0.
   */
  registerGroup(group: number, node: number, unit: number): void {
    const g = GROUP_BASE + group * GROUP_WORDS;
    this.#w.fill(0, g, g + GROUP_WORDS);
    this.#w[g + G_NODE] = this.#zones.some((z) => this.#w[z + Z_NODE] === node) ? node : 0;
    this.#w[g + G_UNIT] = unit;
  }

  /** A block that has been in use since boot, in the zone that boot put it into. */
  adopt(first: number, group: number): void {
    const record = this.section(first);
    this.#w[record + S_STATE] = ONLINE;
    this.#w[record + S_ZONE] = this.#w[this.#memmap + (first << 4) + P_ZONE];
    this.#w[record + S_MEMMAP] = PAGE_LIST_END;
    this.#account(group, this.zoneTypeOf(first), this.sectionPages);
  }

  /** `add_memory`: charges the block's memmap, on its group's node if it can. False: the guest has no memory for it. */
  add(first: number, group: number): boolean {
    if (this.config.adopts === 'in-place') {
      this.#w[this.section(first) + S_STATE] = ADDED;
      this.#w[this.section(first) + S_MEMMAP] = PAGE_LIST_END;
      return true;
    }
    const pages = Math.max(1, this.sectionPages / PAGES_PER_MEMMAP_PAGE);
    const order = Math.log2(pages);
    const gfp = this.config.memmapZone | GFP_NORETRY;
    const node = this.#w[GROUP_BASE + group * GROUP_WORDS + G_NODE];
    let memmap = this.#alloc.alloc(order, MIGRATE_UNMOVABLE, gfp | GFP_NOWAIT, node);
    if (memmap < 0) memmap = this.#singlePages(pages, gfp, node);
    else this.#w[this.#memmap + (memmap << 4) + P_NEXT] = PAGE_LIST_END;
    if (memmap < 0) return false;
    const record = this.section(first);
    this.#w[record + S_STATE] = ADDED;
    this.#w[record + S_MEMMAP] = memmap;
    this.#w[this.#events + EV.memory_added]++;
    return true;
  }

  /** The memmap of single pages, chained; −1, and nothing taken, if they cannot be had. */
  #singlePages(pages: number, gfp: number, node: number): number {
    let list = PAGE_LIST_END;
    for (let i = 0; i < pages; i++) {
      const pfn = this.#alloc.alloc(0, MIGRATE_UNMOVABLE, gfp, node);
      if (pfn < 0) {
        this.#freeMemmap(list);
        return -1;
      }
      this.#w[this.#memmap + (pfn << 4) + P_NEXT] = list;
      list = pfn;
    }
    return list;
  }

  #freeMemmap(list: number): void {
    for (let pfn = list; pfn >= 0; ) {
      const page = this.#memmap + (pfn << 4);
      const next = this.#w[page + P_NEXT];
      this.#alloc.free(pfn, this.#w[page + P_ORDER]);
      pfn = next;
    }
  }

  /** Removes an offline block of `group`, or one whose every page is out of use, and gives its memmap back. */
  remove(first: number, group: number): void {
    const w = this.#w;
    const record = this.section(first);
    if (w[record + S_STATE] === ONLINE) this.#offline(first, group);
    w[record + S_STATE] = ABSENT;
    this.#freeMemmap(w[record + S_MEMMAP]);
    w[this.#events + EV.memory_removed]++;
  }

  // ── Which zone ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** The kind of zone that the policy puts an added block into. Needs the hotplug lock. */
  #zoneTypeFor(first: number, group: number): number {
    const { policy } = this.config;
    if (policy !== 'auto-movable') return policy === 'online_movable' ? ZONE_MOVABLE : ZONE_NORMAL;
    const w = this.#w;
    const unit = w[GROUP_BASE + group * GROUP_WORDS + G_UNIT];
    // A unit is of one kind: what is online of it decides, and room is asked for all the rest at once.
    let rest = unit;
    const start = first - (first % unit);
    for (let pfn = start; pfn < start + unit; pfn += this.sectionPages) {
      if (!this.isOnline(pfn)) continue;
      if (this.zoneTypeOf(pfn) !== ZONE_MOVABLE) return ZONE_NORMAL;
      rest -= this.sectionPages;
    }
    const node = w[GROUP_BASE + group * GROUP_WORDS + G_NODE];
    return this.#movableFits(ANY_NODE, group, rest) && this.#movableFits(node, group, rest)
      ? ZONE_MOVABLE
      : ZONE_NORMAL;
  }

  /**
   * `auto_movable_can_online_movable`: Movable may be up to a ratio of the kernel memory that was there at boot; kernel
   * memory that a memory device added counts for that device alone, a DIMM's for none. On one node, or on all.
   */
  #movableFits(node: number, group: number, pages: number): boolean {
    const w = this.#w;
    const { autoMovableRatio } = this.config;
    let movable = pages;
    let kernel = 0;
    for (const zone of this.#zones) {
      if (node !== ANY_NODE && w[zone + Z_NODE] !== node) continue;
      if (w[zone + Z_TYPE] === ZONE_MOVABLE) movable += w[zone + Z_PRESENT];
      else kernel += w[zone + Z_PRESENT];
    }
    for (let i = 0; i < NR_GROUPS; i++) {
      const g = GROUP_BASE + i * GROUP_WORDS;
      const isDynamic = i < DIMM_GROUPS;
      if ((i === group && isDynamic) || (node !== ANY_NODE && w[g + G_NODE] !== node)) continue;
      // Not there at boot.
      kernel -= w[g + G_KERNEL];
      if (!isDynamic) continue;
      // What another device's Movable memory needs of boot memory is taken.
      movable -= w[g + G_MOVABLE];
      const needed = Math.floor((w[g + G_MOVABLE] * 100) / autoMovableRatio) - w[g + G_KERNEL];
      kernel -= Math.max(0, needed);
    }
    return kernel > 0 && movable <= Math.floor((autoMovableRatio * kernel) / 100);
  }

  /** Counts pages of a group that went online, or offline if negative. Needs the hotplug lock once the guest is up. */
  #account(group: number, zoneType: number, pages: number): void {
    this.#w[GROUP_BASE + group * GROUP_WORDS + (zoneType === ZONE_MOVABLE ? G_MOVABLE : G_KERNEL)] += pages;
  }

  // ── Online and offline ───────────────────────────────────────────────────────────────────────────────────────────

  /** Puts an added block's plugged pages to use in the zone that the policy says; the others are there, but offline. */
  online(first: number, group: number, plugged: (pfn: number) => boolean): void {
    const w = this.#w;
    const node = w[GROUP_BASE + group * GROUP_WORDS + G_NODE];
    this.#lock();
    const type = this.#zoneTypeFor(first, group);
    this.#account(group, type, this.sectionPages);
    this.#unlock();
    const index = this.#zones.findIndex((z) => w[z + Z_NODE] === node && w[z + Z_TYPE] === type);
    const zone = this.#zones[index];
    const end = first + this.sectionPages;
    const base = this.#memmap + (first << 4);
    w.fill(0, base, base + (this.sectionPages << 4));
    for (let page = base; page < base + (this.sectionPages << 4); page += 16) {
      w[page + P_ZONE] = index;
      w[page + P_INODE] = -1;
    }
    this.#buddy.lock(zone);
    const empty = w[zone + Z_PRESENT] === 0;
    w[zone + Z_START] = empty ? first : Math.min(w[zone + Z_START], first);
    w[zone + Z_END] = empty ? end : Math.max(w[zone + Z_END], end);
    w[zone + Z_PRESENT] += this.sectionPages;
    for (let pfn = first; pfn < end; pfn += PAGEBLOCK_PAGES) {
      this.#buddy.setPageblockType(pfn, MIGRATE_MOVABLE);
      if (plugged(pfn)) this.#release(zone, pfn, PAGEBLOCK_PAGES);
      else this.#mark(pfn, PAGEBLOCK_PAGES, PG_OFFLINE);
    }
    this.#buddy.unlock(zone);
    const record = this.section(first);
    w[record + S_STATE] = ONLINE;
    w[record + S_ZONE] = index;
    this.#newTotals();
  }

  /**
   * Takes an online block out of use, but keeps it (`offline_pages`): what is `plugged` of it must go. False: some page
   * cannot, and all is as before.
   */
  offline(first: number, group: number, plugged: (pfn: number) => boolean): boolean {
    const end = first + this.sectionPages;
    for (let pfn = first; pfn < end; pfn += PAGEBLOCK_PAGES) {
      if (!plugged(pfn) || this.fakeOffline(pfn, PAGEBLOCK_PAGES, false)) continue;
      for (let p = first; p < pfn; p += PAGEBLOCK_PAGES) if (plugged(p)) this.fakeOnline(p, PAGEBLOCK_PAGES);
      return false;
    }
    this.#offline(first, group);
    this.#w[this.section(first) + S_STATE] = ADDED;
    return true;
  }

  /** Everything in it is out of use: the zone forgets it. Its span shrinks only when nothing is left. */
  #offline(first: number, group: number): void {
    const w = this.#w;
    const zone = this.#zones[w[this.section(first) + S_ZONE]];
    this.#lock();
    this.#account(group, w[zone + Z_TYPE], -this.sectionPages);
    this.#unlock();
    this.#buddy.lock(zone);
    w[zone + Z_PRESENT] -= this.sectionPages;
    if (w[zone + Z_PRESENT] === 0) w.fill(0, zone + Z_START, zone + Z_END + 1);
    this.#mark(first, this.sectionPages, 0);
    this.#buddy.unlock(zone);
    this.#newTotals();
  }

  #newTotals(): void {
    const w = this.#w;
    this.#lock();
    setupWatermarks(w, this.#zones, this.#cpuNode);
    w[H_TOTAL_PAGES] = this.#zones.reduce((sum, z) => sum + w[z + Z_MANAGED], 0);
    this.#unlock();
  }

  /** Two devices may have their drivers run on two vCPUs: one in a pass, the other's as OOM notifier. */
  #lock(): void {
    spinLock(this.#w, H_HOTPLUG_LOCK, this.#vcpu.id, this.#relax);
  }
  #unlock(): void {
    spinUnlock(this.#w, H_HOTPLUG_LOCK);
  }

  #mark(first: number, count: number, flags: number): void {
    this.#w.fill(SHADOW_ABSENT, this.#shadow + first, this.#shadow + first + count);
    for (let page = this.#memmap + (first << 4); page < this.#memmap + ((first + count) << 4); page += 16) {
      this.#w[page + P_FLAGS] = flags;
      // Poison goes with the content.
      this.#w[page + P_STAMP] = 0;
    }
  }

  /** Gives pages that are nobody's to the zone's free lists, at their tails. Needs the lock. */
  #release(zone: number, first: number, count: number): void {
    // The balloon changes it as well, without the zone's lock.
    Atomics.add(this.#w, zone + Z_MANAGED, count);
    shadowMove(this.#w, this.#shadow, this.#vcpu, first, count, SHADOW_ABSENT, SHADOW_BUDDY);
    for (let pfn = first; pfn < first + count; pfn++) this.#w[this.#memmap + (pfn << 4) + P_FLAGS] = 0;
    for (let pfn = first; pfn < first + count; ) {
      let order = 0;
      while (order < MAX_ORDER && pfn % (2 << order) === 0 && pfn + (2 << order) <= first + count) order++;
      this.#buddy.freeOne(zone, pfn, order, true, true);
      pfn += 1 << order;
    }
  }

  // ── Sub-blocks of an online block ────────────────────────────────────────────────────────────────────────────────

  /** Puts freshly plugged pages of an online block to use (`virtio_mem_fake_online`). Whole pageblocks. */
  fakeOnline(first: number, count: number): void {
    const zone = this.#zones[this.#w[this.section(first) + S_ZONE]];
    this.#buddy.lock(zone);
    this.#mark(first, count, 0);
    this.#release(zone, first, count);
    this.#buddy.unlock(zone);
    this.#newTotals();
  }

  /**
   * Takes pages of an online block out of use (`virtio_mem_fake_offline`, `alloc_contig_range`): isolates their
   * pageblocks, drains the per-CPU lists, moves what is movable elsewhere, and takes what is then free. False: some page
   * cannot go, and all is as before. Whole pageblocks. `allocates`: the range is an allocation, which `init_on_alloc`
   * zeroes; that is most of what unplugging costs. Where memory goes for good (`offline_pages`), it is none.
   */
  fakeOffline(first: number, count: number, allocates: boolean): boolean {
    const w = this.#w;
    const zone = this.#zones[w[this.section(first) + S_ZONE]];
    const end = first + count;
    if (this.#hasUnmovable(first, end)) return false;
    this.#buddy.lock(zone);
    for (let p = first; p < end; p += PAGEBLOCK_PAGES) this.#buddy.isolatePageblock(zone, p);
    this.#buddy.unlock(zone);
    let taken = false;
    for (let tries = 0; tries < MIGRATE_TRIES && !taken; tries++) {
      this.#pcp.drainAll(this.#cpuNode.length);
      const moved = this.#migrateRange(first, end);
      if (moved === 'no room') break;
      // Held for a moment, or being set up: it may have gone by the next look.
      if (moved === 'busy') continue;
      this.#buddy.lock(zone);
      taken = this.#buddy.takeIsolated(zone, first, count);
      if (taken) {
        shadowMove(w, this.#shadow, this.#vcpu, first, count, SHADOW_BUDDY, SHADOW_ABSENT);
        Atomics.sub(w, zone + Z_MANAGED, count);
        this.#mark(first, count, PG_OFFLINE);
        for (let p = first; p < end; p += PAGEBLOCK_PAGES) this.#buddy.setPageblockType(p, MIGRATE_MOVABLE);
      }
      this.#buddy.unlock(zone);
    }
    if (!taken) {
      this.#buddy.lock(zone);
      for (let p = first; p < end; p += PAGEBLOCK_PAGES)
        this.#buddy.unisolatePageblock(zone, p, MIGRATE_MOVABLE);
      this.#buddy.unlock(zone);
      w[this.#events + EV.isolate_fail]++;
      return false;
    }
    if (allocates && this.#initOnAlloc) this.#vcpu.zeroPages(gfn(first), count);
    this.#newTotals();
    return true;
  }

  /** A quick look before anything is isolated: a page in use that nothing can move. A wrong answer costs a try. */
  #hasUnmovable(first: number, end: number): boolean {
    const peek = this.#peek;
    for (let pfn = first; pfn < end; ) {
      const order = (peek[this.#free + pfn] & FREE_ORDER) - 1;
      if (order >= 0) {
        pfn += 1 << Math.min(MAX_ORDER, order);
        continue;
      }
      const page = this.#memmap + (pfn << 4);
      const flags = peek[page + P_FLAGS];
      if (this.#isBalloons(pfn)) {
        pfn++;
        continue;
      }
      if ((flags & (PG_OFFLINE | PG_RESERVED)) !== 0) return true;
      // Only what a file or a process names can be moved.
      const named = (flags & PG_ANON) !== 0 || ((flags & PG_CACHED) !== 0 && peek[page + P_INODE] >= 0);
      if (this.#inUse(page) && !named) return true;
      pfn++;
    }
    return false;
  }

  /** Whether a page is in a balloon whose pages can be moved. */
  #isBalloons(pfn: number): boolean {
    return this.balloon !== null && this.#peek[this.#shadow + pfn] === SHADOW_BALLOON;
  }

  /** Whether a page belongs to an allocation: free ones, per-CPU lists included, have no id. */
  #inUse(page: number): boolean {
    const id = this.#peek[page + P_STAMP];
    return id !== 0 && id !== POISONED;
  }

  /** Moves every page of the range that can be moved elsewhere. */
  #migrateRange(first: number, end: number): 'moved' | 'busy' | 'no room' {
    for (let pfn = first; pfn < end; pfn++) {
      const page = this.#memmap + (pfn << 4);
      if (!this.#inUse(page)) continue;
      const flags = this.#peek[page + P_FLAGS];
      const isBalloons = this.#isBalloons(pfn);
      if (!isBalloons && (flags & (PG_CACHED | PG_ANON)) === 0) return 'busy';
      const to = this.#alloc.alloc(0, MIGRATE_MOVABLE, MOVABLE_GFP);
      if (to < 0) return 'no room';
      const moved = isBalloons
        ? this.balloon?.migrate(pfn, to) === true
        : (flags & PG_ANON) !== 0
          ? this.#processes.migrate(pfn, to)
          : this.#cache.migrate(pfn, to);
      if (moved) {
        this.#w[this.#events + EV.pgmigrate_success]++;
        continue;
      }
      this.#alloc.free(to, 0);
      this.#w[this.#events + EV.pgmigrate_fail]++;
      if (this.#inUse(page)) return 'busy';
    }
    return 'moved';
  }
}
