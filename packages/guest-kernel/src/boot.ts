/**
 * Boot: from an e820 map, and for a replay from the exact state a capture began with, to zones, free lists and a memmap.
 * Counterpart: `mm/mm_init.c`, `memblock_free_all`. Runs once, on vCPU 0, before any other vCPU looks at the arena.
 */
import { gfn, type Vcpu } from '@ebb/machine';
import type { Arena } from './arena.ts';
import {
  H_MAX_PFN,
  H_NR_FILE_PAGES,
  H_NR_ZONES,
  H_RESERVED_PAGES,
  H_THP,
  H_TOTAL_PAGES,
  MAX_ZONES,
  SECTION_PAGES,
  ZONE_BASE,
  ZONE_WORDS,
} from './layout.ts';
import { Buddy } from './mm/buddy.ts';
import { Lru } from './mm/lru.ts';
import { PageCache } from './mm/page-cache.ts';
import {
  P_FLAGS,
  P_INODE,
  P_REF,
  P_STAMP,
  P_ZONE,
  PG_CACHED,
  PG_RESERVED,
  PG_STAMPED,
  SHADOW_ABSENT,
  SHADOW_ALLOCATED,
  SHADOW_BUDDY,
  SHADOW_PCP,
} from './mm/page.ts';
import { PerCpuPages } from './mm/per-cpu-pages.ts';
import {
  MIGRATE_MOVABLE,
  PAGEBLOCK_ORDER,
  PAGEBLOCK_PAGES,
  setupWatermarks,
  THP_LEAST_PAGES,
  Z_END,
  Z_MANAGED,
  Z_NODE,
  Z_PRESENT,
  Z_START,
  Z_TYPE,
  ZONE_NORMAL,
  zoneSpans,
} from './mm/zone.ts';

/** State of one page when a capture began; the index in `StartState.pages`. */
export const START_ABSENT = 0;
export const START_FREE = 1;
export const START_UNMOVABLE = 2;
export const START_MOVABLE = 3;
/** Free, on the per-CPU list of CPU 0 (+ n: of CPU n). */
export const START_PCP = 16;
/** Added to a used state: a page-cache page. */
export const START_FILE = 8;
/** Given to the kernel before its allocator existed: in RAM, never managed. */
export const START_RESERVED = 4;

export interface StartState {
  /** One `START_*` code per page. */
  readonly pages: Uint8Array;
  /** Migratetype of each pageblock. */
  readonly pageblocks: Uint8Array;
}

/** What the machine tells the guest at boot, and how its kernel is configured. Plain data: it crosses to workers. */
export interface GuestConfig {
  /** Usable RAM as half-open pfn ranges, ascending. */
  readonly e820: readonly { readonly start: number; readonly end: number }[];
  /** Pfn ranges of the NUMA nodes, covering all RAM. */
  readonly nodes: readonly { readonly start: number; readonly end: number }[];
  /** One more than the highest pfn. */
  readonly maxPfn: number;
  readonly nrCpus: number;
  readonly cpuNode: readonly number[];
  readonly initOnAlloc: boolean;
  readonly pagePoison: boolean;
  readonly balloon: boolean;
  /** Smallest order that is reported (Linux's `page_reporting_order`); pageblock order, 9, by default. */
  readonly reportingOrder?: number;
  readonly blk: boolean;
  /** Memory devices and how their memory is used; without it this guest has no driver for them. */
  readonly hotplug?: HotplugConfig;
  /**
   * Pages in the balloon can be moved (`CONFIG_BALLOON_COMPACTION`); not, without it. `miscounts`: as before Linux
   * 63341ab03706, when zones did not learn of pages that move from one to the other.
   */
  readonly balloonCompaction?: boolean | 'miscounts';
  /** Capture to start from; freshly booted without one. */
  readonly start?: StartState;
  /** Where file pages are on the disk. */
  readonly blocks:
    | { readonly kind: 'hash'; readonly nrBlocks: number }
    | { readonly kind: 'linear'; readonly pagesPerFile: number };
}

/** How added memory is put to use (`memory_hotplug.online_policy`, `memhp_default_state`). */
export interface HotplugConfig {
  /** Devices on the lines from `LINE_MEM`. */
  readonly devices: number;
  /** Slots for DIMMs behind `LINE_ACPI`; none without it. */
  readonly dimms?: number;
  /** `offline`: an administrator puts each block online (`memhp_default_state=offline`). */
  readonly policy: 'online' | 'online_movable' | 'auto-movable' | 'offline';
  /** `auto_movable_ratio`, in percent. */
  readonly autoMovableRatio: number;
  /** Pages that may be added and not online, or two units (`VIRTIO_MEM_DEFAULT_OFFLINE_THRESHOLD`: 1 GiB). */
  readonly offlinePages: number;
  /** Pages of a memory block: `SECTION_PAGES` for Linux on x86, 512 for a guest that adds 2 MiB at a time. */
  readonly sectionPages: number;
  /** Highest zone type for the memmap of added memory: Normal in Linux, DMA32 keeps it in boot memory. */
  readonly memmapZone: number;
  /**
   * Plugged memory found at probe: unplugged first (`no`, Linux), added as it is (`adds`, the RFC's guest), or in use
   * since boot, with its memmap among the boot pages (`in-place`, a capture whose upper memory becomes a region).
   */
  readonly adopts: 'no' | 'adds' | 'in-place';
}

export const LINUX_HOTPLUG: Omit<HotplugConfig, 'devices'> = {
  policy: 'online',
  autoMovableRatio: 301,
  offlinePages: 262144,
  sectionPages: SECTION_PAGES,
  memmapZone: ZONE_NORMAL,
  adopts: 'no',
};

/** First words of the zones, by index. */
export function zoneBases(w: Int32Array): number[] {
  return Array.from({ length: w[H_NR_ZONES] }, (_, i) => ZONE_BASE + i * ZONE_WORDS);
}

/** Kernel image and early data of a freshly booted guest: 16 MiB at 16 MiB. */
const KERNEL_START = 4096;
const KERNEL_PAGES = 4096;

/** Builds the memmap, zones and free lists. Touches the pages that are in use. */
export function bootMemory(arena: Arena, vcpu: Vcpu, config: GuestConfig): void {
  const { w, memmap } = arena;
  const spans = zoneSpans(config.nodes, config.hotplug !== undefined);
  if (spans.length > MAX_ZONES) throw new Error(`${spans.length} zones do not fit the arena`);
  w[H_NR_ZONES] = spans.length;
  w[H_MAX_PFN] = config.maxPfn;
  const buddy = new Buddy(arena, vcpu);
  const start = config.start ?? freshStart(config);
  spans.forEach((span, i) => {
    const zone = ZONE_BASE + i * ZONE_WORDS;
    w[zone + Z_START] = span.start;
    w[zone + Z_END] = span.end;
    w[zone + Z_NODE] = span.node;
    w[zone + Z_TYPE] = span.type;
    buddy.initZone(zone);
    for (let pfn = span.start; pfn < span.end; pfn++) {
      const page = memmap + (pfn << 4);
      const state = start.pages[pfn];
      w[page + P_ZONE] = i;
      w[page + P_INODE] = -1;
      if (state === START_ABSENT) {
        w[page + P_FLAGS] = PG_RESERVED;
        w[arena.shadow + pfn] = SHADOW_ABSENT;
        continue;
      }
      w[zone + Z_PRESENT]++;
      if (state === START_RESERVED) w[H_RESERVED_PAGES]++;
      else w[zone + Z_MANAGED]++;
    }
  });
  start.pageblocks.forEach((migratetype, block) =>
    buddy.setPageblockType(block << PAGEBLOCK_ORDER, migratetype),
  );
  PerCpuPages.init(w);
  Lru.init(w, config.nodes.length);
  PageCache.init(arena);
  const bases = zoneBases(w);
  w[H_TOTAL_PAGES] = bases.reduce((sum, z) => sum + w[z + Z_MANAGED], 0);
  w[H_THP] = w[H_TOTAL_PAGES] >= THP_LEAST_PAGES ? 1 : 0;
  setupWatermarks(w, bases, config.cpuNode);
  populate(arena, vcpu, buddy, bases, start);
}

/** Frees what is free, in maximal aligned blocks, and touches what is used. */
function populate(arena: Arena, vcpu: Vcpu, buddy: Buddy, bases: readonly number[], start: StartState): void {
  const { w, memmap, shadow } = arena;
  const pcp = new PerCpuPages(arena, buddy, vcpu, bases);
  for (const zone of bases) {
    const end = w[zone + Z_END];
    for (let pfn = w[zone + Z_START]; pfn < end; ) {
      const state = start.pages[pfn];
      if (state === START_FREE) {
        let run = pfn;
        while (run < end && start.pages[run] === START_FREE) w[shadow + run++] = SHADOW_BUDDY;
        freeRun(buddy, zone, pfn, run);
        pfn = run;
        continue;
      }
      if (state >= START_PCP) {
        w[shadow + pfn] = SHADOW_PCP;
        pcp.seed(w[memmap + (pfn << 4) + P_ZONE], state - START_PCP, pfn, buddy.pageblockType(pfn));
      } else if (state !== START_ABSENT) useAtBoot(arena, vcpu, pfn, state);
      pfn++;
    }
  }
}

/** A page in use since before the capture: at its own pfn, touched, stamped. */
function useAtBoot(arena: Arena, vcpu: Vcpu, pfn: number, state: number): void {
  const { w, memmap, shadow } = arena;
  const page = memmap + (pfn << 4);
  w[shadow + pfn] = SHADOW_ALLOCATED;
  w[page + P_REF] = 1;
  w[page + P_STAMP] = 0x7000_0000 | pfn;
  w[page + P_FLAGS] = PG_STAMPED | (state === START_RESERVED ? PG_RESERVED : 0);
  if ((state & START_FILE) !== 0) {
    w[page + P_FLAGS] |= PG_CACHED;
    w[H_NR_FILE_PAGES]++;
  }
  vcpu.store32(gfn(pfn), 0, 0x7000_0000 | pfn);
}

function freeRun(buddy: Buddy, zone: number, from: number, to: number): void {
  for (let pfn = from; pfn < to; ) {
    let order = 0;
    while (order < 10 && pfn % (2 << order) === 0 && pfn + (2 << order) <= to) order++;
    buddy.freeOne(zone, pfn, order, false, true);
    pfn += 1 << order;
  }
}

/** A guest that has just booted: page 0, the kernel image and the memmap in use, all other RAM free and movable. */
function freshStart(config: GuestConfig): StartState {
  const pages = new Uint8Array(config.maxPfn);
  for (const { start, end } of config.e820) pages.fill(START_FREE, start, end);
  pages[0] = START_ABSENT;
  const reserve = (from: number, count: number): void => {
    for (let pfn = from; pfn < Math.min(from + count, pages.length); pfn++)
      if (pages[pfn] === START_FREE) pages[pfn] = START_RESERVED;
  };
  reserve(KERNEL_START, Math.min(KERNEL_PAGES, config.maxPfn >> 4));
  // The memmap: 64 bytes a page, at the top of each node as Linux allocates it.
  for (const node of config.nodes)
    reserve(node.end - Math.ceil((node.end - node.start) / 64), Math.ceil((node.end - node.start) / 64));
  const pageblocks = new Uint8Array(Math.ceil(config.maxPfn / PAGEBLOCK_PAGES)).fill(MIGRATE_MOVABLE);
  return { pages, pageblocks };
}
