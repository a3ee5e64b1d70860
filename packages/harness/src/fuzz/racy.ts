/** Words that may be raced for by design, with the reason; everything else observed must be ordered. */
import {
  arenaLayout,
  EVENTS_BASE,
  EVENTS_WORDS,
  H_NR_DIRTY,
  H_NR_FILE_PAGES,
  H_NR_WRITEBACK,
  L_ACTIVE,
  L_INACTIVE,
  LENGTH,
  LRU_BASE,
  LRU_WORDS,
  MAX_CPUS,
  MAX_NODES,
  MAX_ORDER,
  MAX_ZONES,
  Z_FLAGS,
  Z_FREE,
  Z_HIGH,
  Z_LOW,
  Z_MANAGED,
  Z_MIN,
  Z_NR_FREE,
  Z_PCP_BATCH,
  Z_PCP_HIGH_MAX,
  Z_PCP_HIGH_MIN,
  Z_RESERVE,
  ZONE_BASE,
  ZONE_WORDS,
} from '@ebb/guest-kernel';
import type { Race, SharedRegion } from '@ebb/machine';
import { wordName } from './word-names.ts';

/** Zone words that the watermark checks read without the lock, as Linux does: a stale count only moves a decision. */
const PEEKED: ReadonlySet<number> = new Set([
  Z_FREE,
  Z_FLAGS,
  ...Array.from({ length: MAX_ORDER + 1 }, (_, order) => Z_NR_FREE + order),
  // Hotplug sets them anew while others allocate; an old mark decides as it did a moment ago.
  Z_MANAGED,
  Z_MIN,
  Z_LOW,
  Z_HIGH,
  ...[0, 1, 2, 3].map((type) => Z_RESERVE + type),
  Z_PCP_BATCH,
  Z_PCP_HIGH_MIN,
  Z_PCP_HIGH_MAX,
]);

const LRU_LENGTHS: ReadonlySet<number> = new Set([L_INACTIVE + LENGTH, L_ACTIVE + LENGTH]);

/** Whether a word of a region is one of them, for a guest of `maxPfn` pages; `hostileRings`: it rewrites its own rings. */
export function racyByDesign(
  maxPfn: number,
  hostileRings: boolean,
): (region: SharedRegion, word: number) => boolean {
  const { pageblocks, memmap } = arenaLayout(maxPfn);
  return (region, word) =>
    region === 'arena' ? inArena(word, pageblocks, memmap) : region === 'dram' && hostileRings;
}

function inArena(word: number, pageblocks: number, memmap: number): boolean {
  // A free picks its per-CPU list by the pageblock's type without the zone lock; the buddy reads it again under it.
  if (word >= pageblocks && word < memmap) return true;
  if (word >= ZONE_BASE && word < ZONE_BASE + MAX_ZONES * ZONE_WORDS)
    return PEEKED.has((word - ZONE_BASE) % ZONE_WORDS);
  // Lengths of the LRU lists decide which of them reclaim looks at, read without the lock.
  if (word >= LRU_BASE && word < LRU_BASE + MAX_NODES * LRU_WORDS)
    return LRU_LENGTHS.has((word - LRU_BASE) % LRU_WORDS);
  // Each CPU counts in a row of its own; sums for statistics read them all.
  if (word >= EVENTS_BASE && word < EVENTS_BASE + MAX_CPUS * EVENTS_WORDS) return true;
  // Counted under the cache's lock, read without it by statistics and thresholds.
  return word === H_NR_DIRTY || word === H_NR_WRITEBACK || word === H_NR_FILE_PAGES;
}

export function describeRace(race: Race, maxPfn: number): string {
  const what = wordName(race.region, race.word, maxPfn);
  return `race: ${what} (${race.region} word ${race.word}): ${race.kind} by ${who(race.by)}, unordered with ${who(race.other)}`;
}

function who(thread: number): string {
  return thread === 0 ? 'the host' : `vcpu${thread - 1}`;
}
