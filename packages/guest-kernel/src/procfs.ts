/**
 * `/proc` of a guest, read from its arena by anyone: buddyinfo, pagetypeinfo, zoneinfo, meminfo and vmstat in Linux
 * 6.12's formats. Fields that this kernel has no counterpart for are left out. What it counts and Linux does not is in
 * vmstat as well, with `ebb_` before it.
 */
import type { Arena } from './arena.ts';
import { zoneBases } from './boot.ts';
import { H_NR_DIRTY, H_NR_FILE_PAGES, H_NR_WRITEBACK, LRU_BASE, LRU_WORDS } from './layout.ts';
import { EVENT_NAMES, eventSum, type EventName } from './mm/events.ts';
import { L_ACTIVE, L_INACTIVE } from './mm/lru.ts';
import { PerCpuPages } from './mm/per-cpu-pages.ts';
import { P_NEXT } from './mm/page.ts';
import {
  availablePages,
  listAt,
  MAX_ORDER,
  MIGRATE_NAMES,
  MIGRATE_TYPES,
  PAGEBLOCK_ORDER,
  PAGEBLOCK_PAGES,
  Z_END,
  Z_FREE,
  Z_HIGH,
  Z_LOW,
  Z_MANAGED,
  Z_MIN,
  Z_NODE,
  Z_NR_FREE,
  Z_PCP_BATCH,
  Z_PRESENT,
  Z_RESERVE,
  Z_START,
  Z_TYPE,
  ZONE_NAMES,
} from './mm/zone.ts';

/** Orders as columns. */
const ORDERS = Array.from({ length: MAX_ORDER + 1 }, (_, o) => o);

export function buddyinfo(arena: Arena): string {
  const { w } = arena;
  return zoneBases(w)
    .map(
      (z) =>
        `Node ${w[z + Z_NODE]}, zone ${ZONE_NAMES[w[z + Z_TYPE]].padStart(8)} ${ORDERS.map((o) => `${String(w[z + Z_NR_FREE + o]).padStart(6)} `).join('')}\n`,
    )
    .join('');
}

/** Blocks on a free list, counted by walking it, as Linux does for this file. */
function listLength(arena: Arena, list: number): number {
  let length = 0;
  for (let pfn = arena.w[list]; pfn >= 0; pfn = arena.w[arena.memmap + (pfn << 4) + P_NEXT]) length++;
  return length;
}

export function pagetypeinfo(arena: Arena): string {
  const { w } = arena;
  const bases = zoneBases(w);
  const lines = [`Page block order: ${PAGEBLOCK_ORDER}`, `Pages per block:  ${PAGEBLOCK_PAGES}`, ''];
  lines.push(
    `Free pages count per migrate type at order ${ORDERS.map((o) => `${String(o).padStart(6)} `).join('')}`,
  );
  const at = (z: number): string =>
    `Node ${String(w[z + Z_NODE]).padStart(4)}, zone ${ZONE_NAMES[w[z + Z_TYPE]].padStart(8)}`;
  for (const z of bases) {
    for (let m = 0; m < MIGRATE_TYPES; m++) {
      const counts = ORDERS.map((o) => `${String(listLength(arena, z + listAt(o, m))).padStart(6)} `).join(
        '',
      );
      lines.push(`${at(z)}, type ${MIGRATE_NAMES[m].padStart(12)} ${counts}`);
    }
  }
  lines.push('', `Number of blocks type ${MIGRATE_NAMES.map((n) => `${n.padStart(12)} `).join('')}`);
  for (const z of bases) {
    const counts = new Array<number>(MIGRATE_TYPES).fill(0);
    const first = w[z + Z_START] >> PAGEBLOCK_ORDER;
    const last = (w[z + Z_END] - 1) >> PAGEBLOCK_ORDER;
    for (let b = first; b <= last; b++) counts[w[arena.layout.pageblocks + b]]++;
    lines.push(
      `Node ${w[z + Z_NODE]}, zone ${ZONE_NAMES[w[z + Z_TYPE]].padStart(8)} ${counts.map((n) => `${String(n).padStart(12)} `).join('')}`,
    );
  }
  return `${lines.join('\n')}\n`;
}

export function zoneinfo(arena: Arena, nrCpus: number): string {
  const { w } = arena;
  return zoneBases(w)
    .map((z, i) => {
      const lines = [
        `Node ${w[z + Z_NODE]}, zone ${ZONE_NAMES[w[z + Z_TYPE]].padStart(8)}`,
        `  pages free     ${w[z + Z_FREE]}`,
        `        min      ${w[z + Z_MIN]}`,
        `        low      ${w[z + Z_LOW]}`,
        `        high     ${w[z + Z_HIGH]}`,
        `        spanned  ${w[z + Z_END] - w[z + Z_START]}`,
        `        present  ${w[z + Z_PRESENT]}`,
        `        managed  ${w[z + Z_MANAGED]}`,
        // The zone of device memory, which this kernel has not, is the fifth; nothing of it adds to Movable's.
        `        protection: (${[0, 1, 2, 3, 3].map((t) => w[z + Z_RESERVE + t]).join(', ')})`,
        '  pagesets',
      ];
      for (let cpu = 0; cpu < nrCpus; cpu++) {
        lines.push(
          `    cpu: ${cpu}`,
          `              count: ${PerCpuPages.count(w, i, cpu)}`,
          `              high:  ${PerCpuPages.high(w, i, cpu)}`,
          `              batch: ${w[z + Z_PCP_BATCH]}`,
        );
      }
      lines.push(`  start_pfn:           ${w[z + Z_START]}`);
      return `${lines.join('\n')}\n`;
    })
    .join('');
}

function lruPages(arena: Arena, list: number): number {
  return arena.w[LRU_BASE + list + 2] + arena.w[LRU_BASE + LRU_WORDS + list + 2];
}

function sumZones(arena: Arena, field: number): number {
  return zoneBases(arena.w).reduce((sum, z) => sum + arena.w[z + field], 0);
}

/** Pages on all per-CPU lists. */
export function pcpPages(arena: Arena, nrCpus: number): number {
  let sum = 0;
  for (let i = 0; i < zoneBases(arena.w).length; i++)
    for (let cpu = 0; cpu < nrCpus; cpu++) sum += PerCpuPages.count(arena.w, i, cpu);
  return sum;
}

/** Free pages in the buddy, by order. */
export function freeByOrder(arena: Arena): number[] {
  return ORDERS.map((o) => zoneBases(arena.w).reduce((sum, z) => sum + arena.w[z + Z_NR_FREE + o], 0));
}

export function freePages(arena: Arena): number {
  return sumZones(arena, Z_FREE);
}

export function filePages(arena: Arena): number {
  return arena.w[H_NR_FILE_PAGES];
}

export function meminfo(arena: Arena): string {
  const { w } = arena;
  const rows: [string, number][] = [
    ['MemTotal', sumZones(arena, Z_MANAGED)],
    ['MemFree', sumZones(arena, Z_FREE)],
    ['MemAvailable', availablePages(w, zoneBases(w))],
    ['Cached', w[H_NR_FILE_PAGES]],
    ['Active(file)', lruPages(arena, L_ACTIVE)],
    ['Inactive(file)', lruPages(arena, L_INACTIVE)],
    ['Dirty', w[H_NR_DIRTY]],
    ['Writeback', w[H_NR_WRITEBACK]],
  ];
  return rows
    .map(([name, pages]) => `${`${name}:`.padEnd(15)} ${String(pages * 4).padStart(8)} kB\n`)
    .join('');
}

/** Of our events those that Linux counts under the same name, and what one of ours is there: pages of I/O are KiB. */
const LINUX_EVENTS: Partial<Record<EventName, number>> = {
  pgpgin: 4,
  pgpgout: 4,
  pgfree: 1,
  pgactivate: 1,
  pgdeactivate: 1,
  pgfault: 1,
  pgsteal_kswapd: 1,
  pgsteal_direct: 1,
  pgscan_kswapd: 1,
  pgscan_direct: 1,
  pageoutrun: 1,
  oom_kill: 1,
  numa_miss: 1,
  pgmigrate_success: 1,
  pgmigrate_fail: 1,
  balloon_inflate: 1,
  balloon_deflate: 1,
  balloon_migrate: 1,
};

export function vmstat(arena: Arena): string {
  const rows: [string, number][] = [
    ['nr_free_pages', sumZones(arena, Z_FREE)],
    ['nr_inactive_file', lruPages(arena, L_INACTIVE)],
    ['nr_active_file', lruPages(arena, L_ACTIVE)],
    ['nr_file_pages', arena.w[H_NR_FILE_PAGES]],
    ['nr_dirty', arena.w[H_NR_DIRTY]],
    ['nr_writeback', arena.w[H_NR_WRITEBACK]],
    ...EVENT_NAMES.map((name): [string, number] => {
      const unit = LINUX_EVENTS[name];
      const sum = eventSum(arena, name);
      return unit === undefined ? [`ebb_${name}`, sum] : [name, sum * unit];
    }),
  ];
  return rows.map(([name, value]) => `${name} ${value}\n`).join('');
}
