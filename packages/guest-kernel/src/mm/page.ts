/**
 * `struct page`: one 64-byte line per page frame in the arena's memmap; and two tables of a word per page. In `Arena.free` the
 * first page of a free block says so: order, zone, whether the host knows. Linux keeps that in the page; apart, the buddies
 * that every free looks at share cache lines. In `Arena.shadow` is the guest-page shadow, which checks it all: written by
 * whoever moves the page, read by checkers only.
 *
 * | word | field | guarded by |
 * | --- | --- | --- |
 * | 0 | flags; 0 in a page that is free | owner (allocated), LRU lock (LRU bits) |
 * | 1 | order of the allocation that starts here | as flags |
 * | 2, 3 | list links, as pfn; −1 ends | the list's lock |
 * | 4 | reference count | atomic while cached |
 * | 5 | migratetype kept while on a per-CPU list | the CPU |
 * | 6, 7, 8 | inode, index, next in hash chain | page-cache lock |
 * | 9 | allocation id: the stamp | owner |
 * | 11 | zone index | boot, hotplug |
 */
import type { Vcpu } from '@ebb/machine';

export const P_FLAGS = 0;
export const P_ORDER = 1;
export const P_NEXT = 2;
export const P_PREV = 3;
export const P_REF = 4;
export const P_PCP_MT = 5;
export const P_INODE = 6;
export const P_INDEX = 7;
export const P_HASH_NEXT = 8;
export const P_STAMP = 9;
export const P_ZONE = 11;

/** Ends a list of pages. */
export const PAGE_LIST_END = -1;

export const PG_LRU = 2;
export const PG_ACTIVE = 4;
export const PG_REFERENCED = 8;
export const PG_DIRTY = 16;
export const PG_WRITEBACK = 32;
export const PG_UPTODATE = 64;
export const PG_RESERVED = 128;
/** In the balloon, or in an online block but not plugged (Linux `PageOffline`). */
export const PG_OFFLINE = 256;
/** The page's first word in guest memory holds its stamp. */
export const PG_STAMPED = 1024;
/** In the page cache, or was: its last reference is dropped atomically. */
export const PG_CACHED = 2048;
/** A process's memory: mapped by its page tables, movable. */
export const PG_ANON = 4096;

/**
 * Words of `Arena.free`: 0, or for the first page of a free block its order + 1, a flag, and the first word of its zone. Guarded
 * by the zone's lock.
 */
export const FREE_ORDER = 0xff;
/** Known to the host (`PageReported`). */
export const FREE_REPORTED = 0x100;
export const FREE_ZONE_SHIFT = 12;

/** Where a page is, as the shadow follows it. */
export const SHADOW_ABSENT = 0;
export const SHADOW_BUDDY = 1;
export const SHADOW_PCP = 2;
export const SHADOW_ALLOCATED = 3;
/** Taken off the free lists for a report, until it is put back after the acknowledgement. */
export const SHADOW_ISOLATED = 4;
export const SHADOW_BALLOON = 5;

export const SHADOW_NAMES = [
  'absent',
  'buddy',
  'per-CPU list',
  'allocated',
  'isolated for reporting',
  'balloon',
] as const;

/**
 * Moves `count` pages from `from` to `to` in the shadow, and reports each that was elsewhere. The shadow is not read by
 * the allocator: it is a second book.
 */
export function shadowMove(
  w: Int32Array,
  shadow: number,
  vcpu: Vcpu,
  pfn: number,
  count: number,
  from: number,
  to: number,
): void {
  const first = shadow + pfn;
  for (let at = first; at < first + count; at++) {
    const found = w[at];
    if (found !== from)
      vcpu.report(
        found === SHADOW_ISOLATED ? 'reported-reuse' : 'guest-page-state',
        at - shadow,
        from,
        found,
      );
    w[at] = to;
  }
}
