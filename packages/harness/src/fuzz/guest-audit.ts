/** When all is over: the guest's books against each other, and against its page shadow (I19). */
import {
  Arena,
  P_ZONE,
  PAGEBLOCK_ORDER,
  SECTION_WORDS,
  SHADOW_ABSENT,
  SHADOW_ALLOCATED,
  pcpPages,
  SHADOW_BALLOON,
  SHADOW_BUDDY,
  SHADOW_ISOLATED,
  SHADOW_PCP,
  T_BALLOON,
  Z_END,
  Z_FREE,
  Z_LISTS,
  Z_NR_FREE,
  Z_START,
  zoneBases,
  MAX_ORDER,
  MIGRATE_TYPES,
  P_FLAGS,
  P_NEXT,
  FREE_ORDER,
  P_PREV,
} from '@ebb/guest-kernel';
import { plainView } from '@ebb/machine';

/** Word of the balloon driver's state that counts its pages. */
const BALLOON_NR_PAGES: number = T_BALLOON + 3;

/** What does not agree, in words. */
export function auditGuest(arena: Arena, nrCpus: number): string[] {
  const { w, memmap } = arena;
  const found: string[] = [];
  const same = (what: string, a: number, b: number): void => {
    if (a !== b && found.length < 8) found.push(`guest books: ${what}: ${a} against ${b} (I19)`);
  };
  const shadow = new Array<number>(8).fill(0);
  for (const [index, zone] of zoneBases(w).entries()) {
    let free = 0;
    for (let order = 0; order <= MAX_ORDER; order++) {
      let blocks = 0;
      for (let mt = 0; mt < MIGRATE_TYPES; mt++) {
        let prev = -1;
        let steps = 0;
        for (
          let pfn = w[zone + Z_LISTS + 2 * (order * MIGRATE_TYPES + mt)];
          pfn >= 0 && steps < arena.maxPfn;
          pfn = w[memmap + (pfn << 4) + P_NEXT], steps++
        ) {
          const page = memmap + (pfn << 4);
          if (w[page + P_PREV] !== prev) same(`link back from page ${pfn}`, w[page + P_PREV], prev);
          same(`order + 1 of free page ${pfn}`, w[arena.free + pfn] & FREE_ORDER, order + 1);
          const type = w[arena.layout.pageblocks + (pfn >>> PAGEBLOCK_ORDER)];
          same(`type of the pageblock of free page ${pfn}, and of its list`, type, mt);
          const buddy = pfn ^ (1 << order);
          if (order < MAX_ORDER && buddy >= w[zone + Z_START] && buddy < w[zone + Z_END]) {
            const isFree = (w[arena.free + buddy] & FREE_ORDER) === order + 1;
            if (isFree && w[memmap + (buddy << 4) + P_ZONE] === index)
              same(`free page ${pfn} of order ${order} and its buddy are merged`, 0, 1);
          }
          for (let i = 0; i < 1 << order; i++) {
            same(`zone of free page ${pfn + i}`, w[memmap + ((pfn + i) << 4) + P_ZONE], index);
            same(`flags of free page ${pfn + i}`, w[memmap + ((pfn + i) << 4) + P_FLAGS], 0);
            same(`shadow of free page ${pfn + i}`, w[arena.shadow + pfn + i], SHADOW_BUDDY);
          }
          prev = pfn;
          blocks++;
          free += 1 << order;
        }
      }
      same(`free blocks of order ${order}`, w[zone + Z_NR_FREE + order], blocks);
    }
    same('free pages of a zone', w[zone + Z_FREE], free);
    for (let pfn = w[zone + Z_START]; pfn < w[zone + Z_END]; pfn++) shadow[w[arena.shadow + pfn]]++;
  }
  const listed = zoneBases(w).reduce((sum, z) => sum + w[z + Z_FREE], 0);
  same('free pages and shadow', listed, shadow[SHADOW_BUDDY]);
  same('per-CPU pages and shadow', pcpPages(arena, nrCpus), shadow[SHADOW_PCP]);
  same('balloon pages and shadow', w[BALLOON_NR_PAGES], shadow[SHADOW_BALLOON]);
  same('pages still isolated', shadow[SHADOW_ISOLATED], 0);
  return found;
}

/** Pages in the balloon as the driver counts them. */
export function balloonPages(arena: Arena): number {
  return arena.w[BALLOON_NR_PAGES];
}

/** Pages that somebody has allocated, by the shadow. */
export function allocatedPages(arena: Arena): number {
  // An auditor's look is no access of a vCPU's.
  const w = plainView(arena.w);
  let pages = 0;
  for (const zone of zoneBases(w))
    for (let pfn = w[zone + Z_START]; pfn < w[zone + Z_END]; pfn++)
      if (w[arena.shadow + pfn] === SHADOW_ALLOCATED) pages++;
  return pages;
}

/** Memory blocks that have been added and not removed. */
export function addedBlocks(arena: Arena, sectionPages: number): number {
  const { w, layout } = arena;
  let blocks = 0;
  for (let i = 0; i < Math.ceil(arena.maxPfn / sectionPages); i++)
    if (w[layout.sections + i * SECTION_WORDS] !== 0) blocks++;
  return blocks;
}

/** A page of the range that the guest has on a list or in use, by the shadow; −1 if there is none. */
export function pageInUse(arena: Arena, first: number, count: number): number {
  return pagesInUseWithin(arena, first, count, () => false);
}

/** The same, but for pages that `mayBe`. */
export function pagesInUseWithin(
  arena: Arena,
  first: number,
  count: number,
  mayBe: (pfn: number) => boolean,
): number {
  const w = plainView(arena.w);
  for (let pfn = first; pfn < first + count; pfn++) {
    const state = w[arena.shadow + pfn];
    if (state !== SHADOW_ABSENT && !mayBe(pfn)) return pfn;
  }
  return -1;
}
