/**
 * The arena: one shared buffer per guest that holds every mutable field of its kernel. Models Linux's virtually
 * contiguous memmap; the guest pages that would back it are charged elsewhere (boot reservations, hot-add).
 *
 * ```
 * word 0        header: globals, zones, per-CPU lists, LRU, kernel threads, event counters   (64 KiB)
 * queues        driver state of the virtqueues
 * pageblocks    one word per 512 pages: migratetype
 * memmap        16 words (64 B, one cache line) per page
 * hash          page-cache buckets
 * shadow, free  one word each per page: its state as checkers see it, the free block that starts there
 * sections      4 words per memory block: state, zone, memmap's page, virtio-mem state
 * plugged       one bit per MiB of guest-physical space
 * ```
 */
import { assert, HUGE_PAGES } from '@ebb/machine';
import { driverQueueWords } from '@ebb/virtio/driver';

export const HEADER_WORDS = 16384;

// ── Globals ──────────────────────────────────────────────────────────────────────────────────────────────────────
/** 1 once vCPU 0 has built the zones. Written by vCPU 0, read by the others before they touch anything. */
export const H_BOOTED = 0;
export const H_NR_ZONES = 1;
export const H_MAX_PFN = 2;
export const H_TOTAL_PAGES = 3;
/** 1 in a guest that booted with memory enough for transparent huge pages: it then keeps more pages free. */
export const H_THP = 4;
/** Page-cache lock: guards hash chains, mapping and index of cached pages. */
export const H_CACHE_LOCK = 16;
export const H_NR_FILE_PAGES = 17;
export const H_NR_DIRTY = 18;
export const H_NR_WRITEBACK = 19;
/** Sleeping mutexes: may be held across a device wait. Order: balloon before blk; both before every spin lock. */
export const H_BALLOON_MUTEX = 32;
export const H_BLK_MUTEX = 48;
/** Reverse maps of processes' pages: taken before every page-table lock. */
export const H_RMAP_LOCK = 80;
/** Pages the kernel gave away at boot: reserved, never free. */
export const H_RESERVED_PAGES = 64;
/** Guards watermarks, totals and memory groups once memory comes and goes. Taken inside no other spin lock. */
export const H_HOTPLUG_LOCK = 96;

// ── Zones ────────────────────────────────────────────────────────────────────────────────────────────────────────
export const MAX_ZONES = 8;
export const MAX_NODES = 2;
export const ZONE_BASE = 256;
export const ZONE_WORDS = 256;

// ── Per-CPU page lists ───────────────────────────────────────────────────────────────────────────────────────────
export const MAX_CPUS = 8;
export const PCP_BASE: number = ZONE_BASE + MAX_ZONES * ZONE_WORDS;
export const PCP_WORDS = 64;

// ── LRU per node ─────────────────────────────────────────────────────────────────────────────────────────────────
export const LRU_BASE: number = PCP_BASE + MAX_ZONES * MAX_CPUS * PCP_WORDS;
export const LRU_WORDS = 64;

// ── Kernel threads: balloon, reporting, kswapd per node ──────────────────────────────────────────────────────────
export const THREAD_WORDS = 128;
export const T_BALLOON: number = LRU_BASE + MAX_NODES * LRU_WORDS;
export const T_REPORTING: number = T_BALLOON + THREAD_WORDS;
export const T_KSWAPD: number = T_BALLOON + 2 * THREAD_WORDS;
export const T_WRITEBACK: number = T_KSWAPD + MAX_NODES * 16;
export const T_BLK: number = T_BALLOON + 4 * THREAD_WORDS;

// ── virtio-mem, one driver per device ────────────────────────────────────────────────────────────────────────────
export const MAX_MEM_DEVICES = 4;
export const MEM_THREAD_WORDS = 64;
export const T_MEM: number = T_BALLOON + 5 * THREAD_WORDS;

/**
 * Memory groups: what a driver added, by kind of zone. One per memory device, whose memory comes and goes (dynamic), then
 * one per DIMM (static). Guarded by `H_HOTPLUG_LOCK`.
 */
export const MAX_DIMMS = 32;
export const NR_GROUPS: number = MAX_MEM_DEVICES + MAX_DIMMS;
/** First of the DIMMs' groups. */
export const DIMM_GROUPS: number = NR_GROUPS - MAX_DIMMS;
export const GROUP_WORDS = 16;
export const GROUP_BASE: number = T_MEM + MAX_MEM_DEVICES * MEM_THREAD_WORDS;
/** The ACPI memory driver's words. */
export const T_ACPI: number = GROUP_BASE + NR_GROUPS * GROUP_WORDS;

// ── Processes, and what vCPUs ask of each other's TLBs ───────────────────────────────────────────────────────────
export const MAX_PROCESSES = 16;
export const PROCESS_WORDS = 32;
export const PROCESS_BASE: number = T_ACPI + 16;
export const SHOOTDOWN_WORDS = 32;
export const SHOOTDOWN_BASE: number = PROCESS_BASE + MAX_PROCESSES * PROCESS_WORDS;

// ── Event counters per CPU, each written by its CPU only ─────────────────────────────────────────────────────────
export const EVENTS_BASE: number = SHOOTDOWN_BASE + MAX_CPUS * SHOOTDOWN_WORDS;
export const EVENTS_WORDS = 64;

// ── What a CPU keeps to itself between its slices ────────────────────────────────────────────────────────────────
export const CPU_BASE: number = EVENTS_BASE + MAX_CPUS * EVENTS_WORDS;
export const CPU_WORDS = 16;
/** Interrupt lines that a wait took, by bit, whose handlers are still to run. */
export const CPU_LINES_TAKEN = 0;
/** Virtual time of the next `vmstat_update`, float64. */
export const CPU_NEXT_VMSTAT_F64 = 2;

// ── Queues ───────────────────────────────────────────────────────────────────────────────────────────────────────
/** Inflate, deflate, stats, hint, reporting, blk, and one per memory device. */
export const NR_QUEUES: number = 6 + MAX_MEM_DEVICES;
export const QUEUE_WORDS: number = driverQueueWords(256);

export const PAGE_STRUCT_WORDS = 16;
export const PAGE_STRUCT_SHIFT = 4;

export interface ArenaLayout {
  readonly maxPfn: number;
  readonly queues: number;
  readonly pageblocks: number;
  readonly memmap: number;
  readonly hash: number;
  /** Power of two. */
  readonly hashBuckets: number;
  /** One word per page, apart from the memmap: the states of a block's pages share cache lines. */
  readonly shadow: number;
  /** One word per page: the free block that starts there. */
  readonly free: number;
  readonly sections: number;
  readonly plugged: number;
  readonly words: number;
}

/** Words of a memory block's record. */
export const SECTION_WORDS = 4;
/** Pages of Linux's memory block on x86: 128 MiB. */
export const SECTION_PAGES = 32768;
/** Pages per bit of `plugged`: 1 MiB, the smallest block of a memory device. */
export const PLUGGED_SHIFT = 8;
/** The smallest memory block of any profile is 2 MiB. */
const MIN_SECTION_PAGES = 512;

/** Word numbers of the memmap fit 31 bits up to here: 256 GiB. */
export const MAX_GUEST_PFN: number = 2 ** 26;

/** Lays out an arena for pages `0 … maxPfn − 1`, hot-pluggable ones included. */
export function arenaLayout(maxPfn: number): ArenaLayout {
  assert(maxPfn <= MAX_GUEST_PFN, 'a guest whose memmap has 31-bit word numbers');
  assert(CPU_BASE + MAX_CPUS * CPU_WORDS <= HEADER_WORDS, 'the header holds everything');
  const queues = HEADER_WORDS;
  const pageblocks = queues + NR_QUEUES * QUEUE_WORDS;
  // The memmap starts on a cache line.
  const memmap = Math.ceil((pageblocks + Math.ceil(maxPfn / HUGE_PAGES) + 1) / 16) * 16;
  const hash = memmap + maxPfn * PAGE_STRUCT_WORDS;
  let hashBuckets = 1024;
  while (hashBuckets < maxPfn / 4) hashBuckets *= 2;
  const shadow = hash + hashBuckets;
  const free = shadow + maxPfn;
  const sections = free + maxPfn;
  const plugged = sections + Math.ceil(maxPfn / MIN_SECTION_PAGES) * SECTION_WORDS;
  const words = plugged + Math.ceil(maxPfn / (1 << PLUGGED_SHIFT) / 32);
  return { maxPfn, queues, pageblocks, memmap, hash, hashBuckets, shadow, free, sections, plugged, words };
}
