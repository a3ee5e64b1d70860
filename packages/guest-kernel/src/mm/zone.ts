/**
 * Zones: words of a zone in the arena, and watermarks computed as Linux computes them.
 *
 * `min_free_kbytes` = 4·√(lowmem kB) (`calculate_min_free_kbytes`), raised to THP's recommendation where THP is on
 * (`set_recommended_min_free_kbytes`: 512 pages · zones · 11, at most 5 % of memory), Movable left out of both. Per zone (`setup_per_zone_wmarks`):
 * min in proportion to managed pages; low = min + max(min/4, managed · 10/10000); high = low + the same step.
 */

import { H_NR_FILE_PAGES, H_THP } from '../layout.ts';

export const ZONE_DMA = 0;
export const ZONE_DMA32 = 1;
export const ZONE_NORMAL = 2;
export const ZONE_MOVABLE = 3;
export const ZONE_NAMES = ['DMA', 'DMA32', 'Normal', 'Movable'] as const;

export const MIGRATE_UNMOVABLE = 0;
export const MIGRATE_MOVABLE = 1;
export const MIGRATE_RECLAIMABLE = 2;
export const MIGRATE_HIGHATOMIC = 3;
export const MIGRATE_ISOLATE = 4;
export const MIGRATE_TYPES = 5;
export const MIGRATE_NAMES = ['Unmovable', 'Movable', 'Reclaimable', 'HighAtomic', 'Isolate'] as const;

export const MAX_ORDER = 10;
export const PAGEBLOCK_ORDER = 9;
export const PAGEBLOCK_PAGES = 512;

/** Words of a zone. The lock guards free lists, counts and the flags of free pages. */
export const Z_LOCK = 0;
export const Z_START = 1;
export const Z_END = 2;
export const Z_NODE = 3;
export const Z_TYPE = 4;
/** Changed by the balloon and hotplug. */
export const Z_MANAGED = 5;
export const Z_PRESENT = 6;
export const Z_FREE = 7;
export const Z_MIN = 8;
export const Z_LOW = 9;
export const Z_HIGH = 10;
export const Z_FLAGS = 11;
/** Pages kept from allocations that could use a higher zone: by that zone's type. */
export const Z_RESERVE = 12;
export const Z_PCP_BATCH = 16;
export const Z_PCP_HIGH_MIN = 17;
export const Z_PCP_HIGH_MAX = 18;
/** Free blocks by order. */
export const Z_NR_FREE = 20;
/** Head and tail of each free list. */
export const Z_LISTS = 32;

/** Zone flags. */
export const ZF_BELOW_HIGH = 1;
export const ZF_RECLAIM_ACTIVE = 2;

// Local copies: docs/performance.md § Constants.
const LISTS = Z_LISTS;
const TYPES = MIGRATE_TYPES;

/** Offset of the list of (order, migratetype) in a zone: head, then tail. */
export function listAt(order: number, migratetype: number): number {
  return LISTS + ((Math.imul(order, TYPES) + migratetype) << 1);
}

export interface ZoneSpan {
  readonly node: number;
  readonly type: number;
  readonly start: number;
  readonly end: number;
}

const DMA_END = 4096;
const DMA32_END = 0x10_0000;

/**
 * Zones of the nodes' pfn ranges: DMA below 16 MiB, DMA32 below 4 GiB, then Normal; empty ones are left out. `hotplug`:
 * every node also has a Normal and a Movable zone, empty until memory is added.
 */
export function zoneSpans(
  nodes: readonly { readonly start: number; readonly end: number }[],
  hotplug: boolean,
): ZoneSpan[] {
  const spans: ZoneSpan[] = [];
  nodes.forEach(({ start, end }, node) => {
    for (const [type, from, to] of [
      [ZONE_DMA, 0, DMA_END],
      [ZONE_DMA32, DMA_END, DMA32_END],
      [ZONE_NORMAL, DMA32_END, Number.MAX_SAFE_INTEGER],
    ] as const) {
      const a = Math.max(start, from);
      const b = Math.min(end, to);
      if (a < b) spans.push({ node, type, start: a, end: b });
      else if (hotplug && type === ZONE_NORMAL) spans.push({ node, type, start: 0, end: 0 });
    }
    if (hotplug) spans.push({ node, type: ZONE_MOVABLE, start: 0, end: 0 });
  });
  return spans;
}

/** THP is off in a guest that boots with less than 512 MiB (`hugepage_init`). */
export const THP_LEAST_PAGES = 131072;

/**
 * `min_free_kbytes` in pages, for `managed` pages over `nrZones` populated zones: those below Movable, on which alone the
 * kernel's own allocations depend (`nr_free_buffer_pages`, `set_recommended_min_free_kbytes`).
 */
export function minFreePages(managed: number, nrZones: number, thp: boolean): number {
  const kilobytes = managed * 4;
  const min = Math.max(128, Math.min(262144, Math.floor(Math.sqrt(kilobytes * 16)))) >> 2;
  if (!thp) return min;
  const recommended = Math.min(PAGEBLOCK_PAGES * nrZones * 11, Math.floor(managed / 20));
  return Math.max(min, recommended);
}

/**
 * Pages that could be had without swapping (`si_mem_available`): what is free beyond the reserves, and page cache down to
 * half of it or the low watermarks, whichever leaves more of it.
 */
export function availablePages(w: Int32Array, bases: readonly number[]): number {
  let available = 0;
  let low = 0;
  for (const z of bases) {
    const reserve = Math.max(...[0, 1, 2, 3].map((type) => w[z + Z_RESERVE + type]));
    available += w[z + Z_FREE] - Math.min(w[z + Z_MANAGED], reserve + w[z + Z_HIGH]);
    low += w[z + Z_LOW];
  }
  const cached = w[H_NR_FILE_PAGES];
  return Math.max(0, available + cached - Math.min(cached >> 1, low));
}

/** Batch of a zone's per-CPU lists (`zone_batchsize`): about a thousandth of the zone, 2ⁿ − 1. */
export function pcpBatch(managed: number): number {
  let batch = Math.min(managed >> 10, 256) >> 2;
  if (batch < 1) batch = 1;
  const sum = batch + (batch >> 1);
  let power = 1;
  while (power * 2 <= sum) power *= 2;
  return Math.max(1, power - 1);
}

/**
 * Writes watermarks, reserves and per-CPU limits of all zones. `bases` are the zones' first words, `cpuNode` is the node of
 * each CPU.
 */
export function setupWatermarks(w: Int32Array, bases: readonly number[], cpuNode: readonly number[]): void {
  const kernelZones = bases.filter((z) => w[z + Z_TYPE] !== ZONE_MOVABLE && w[z + Z_MANAGED] > 0);
  const kernel = kernelZones.reduce((sum, z) => sum + w[z + Z_MANAGED], 0);
  const minFree = minFreePages(kernel, kernelZones.length, w[H_THP] !== 0);
  for (const z of bases) {
    const pages = w[z + Z_MANAGED];
    const share = Math.floor((minFree * pages) / Math.max(1, kernel));
    // The Movable zone keeps only a little: no kernel allocation depends on it. Its steps are those of its whole share.
    const min =
      w[z + Z_TYPE] === ZONE_MOVABLE ? Math.min(128, Math.max(pages === 0 ? 0 : 32, pages >> 10)) : share;
    const step = Math.max(share >> 2, Math.floor((pages * 10) / 10000));
    w[z + Z_MIN] = min;
    w[z + Z_LOW] = min + step;
    w[z + Z_HIGH] = min + 2 * step;
    const batch = pcpBatch(pages);
    // A zone's lists are those of its node's CPUs; of all of them if the node has none (`zone_highsize`).
    const own = cpuNode.filter((node) => node === w[z + Z_NODE]).length;
    const sharers = own > 0 ? own : cpuNode.length;
    w[z + Z_PCP_BATCH] = batch;
    w[z + Z_PCP_HIGH_MIN] = batch === 1 ? 0 : Math.max(Math.floor(w[z + Z_LOW] / sharers), batch * 4);
    w[z + Z_PCP_HIGH_MAX] = batch === 1 ? 0 : Math.max(Math.floor((pages >> 3) / sharers), batch * 4);
    // `lowmem_reserve_ratio`: 256 for DMA and DMA32, 32 for Normal.
    for (let type = 0; type < 4; type++) {
      let above = 0;
      for (const other of bases) {
        if (
          w[other + Z_NODE] === w[z + Z_NODE] &&
          w[other + Z_TYPE] > w[z + Z_TYPE] &&
          w[other + Z_TYPE] <= type
        ) {
          above += w[other + Z_MANAGED];
        }
      }
      w[z + Z_RESERVE + type] = Math.floor(above / (w[z + Z_TYPE] === ZONE_NORMAL ? 32 : 256));
    }
  }
}
