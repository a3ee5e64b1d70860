/** Event counters (`/proc/vmstat`), one row of words per CPU, written only by that CPU and summed when read. */
import type { Arena } from '../arena.ts';
import { EVENTS_BASE, EVENTS_WORDS, MAX_CPUS } from '../layout.ts';

export const EVENT_NAMES = [
  'pgalloc',
  'pgfree',
  'allocstall',
  'pageoutrun',
  'pgscan_kswapd',
  'pgscan_direct',
  'pgsteal_kswapd',
  'pgsteal_direct',
  'pgactivate',
  'pgdeactivate',
  'pgpgin',
  'pgpgout',
  'oom_kill',
  'oom_notifier',
  'balloon_inflate',
  'balloon_deflate',
  'pcp_refill',
  'pcp_drain',
  'fallback_steal',
  'fallback_claim',
  'alloc_fail',
  'reported_pages',
  'report_requests',
  'kswapd_wake',
  'writeback_pages',
  'out_of_puff',
  'stamp_checked',
  'hinted_pages',
  'numa_miss',
  'remote_drain',
  'poison_checked',
  'memory_added',
  'memory_removed',
  'isolate_fail',
  'pgmigrate_success',
  'pgmigrate_fail',
  'mem_requests',
  'pgfault',
  'cow',
  'fork',
  'tlb_shootdown',
  'balloon_migrate',
] as const;
export type EventName = (typeof EVENT_NAMES)[number];

/** Word offset of each event in a CPU's row. */
export const EV: Record<EventName, number> = Object.fromEntries(
  EVENT_NAMES.map((name, i) => [name, i]),
) as Record<EventName, number>;

/** Word of a CPU's row that counts its allocations, for stamps. */
export const EVENT_STAMP = 63;

/** First word of `cpu`'s row. */
export function eventRow(cpu: number): number {
  return EVENTS_BASE + cpu * EVENTS_WORDS;
}

/** Sum of one event over all CPUs. */
export function eventSum(arena: Arena, name: EventName): number {
  let sum = 0;
  for (let cpu = 0; cpu < MAX_CPUS; cpu++) sum += arena.w[eventRow(cpu) + EV[name]];
  return sum;
}
