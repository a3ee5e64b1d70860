/**
 * The buddy allocator of one guest: free lists by order and migratetype in every zone, pageblock fallback, merging.
 * Counterpart: `mm/page_alloc.c` — `__rmqueue_smallest`, `__rmqueue_fallback`, `expand`, `__free_one_page`,
 * `steal_suitable_fallback`, `__isolate_free_page`.
 *
 * Every function here needs the zone's lock held. State is in the arena; fields of this class are constants.
 */
import { assert, spinLock, spinUnlock, type Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import { EV, eventRow } from './events.ts';
import * as page from './page.ts';
import { shadowMove } from './page.ts';
import * as zoneWords from './zone.ts';
import { listAt } from './zone.ts';

// Local copies: docs/performance.md § Constants.
const { FREE_ORDER, FREE_REPORTED, FREE_ZONE_SHIFT, P_NEXT, P_PREV, SHADOW_BUDDY, SHADOW_ISOLATED } = page;
const {
  MAX_ORDER,
  MIGRATE_HIGHATOMIC,
  MIGRATE_ISOLATE,
  MIGRATE_MOVABLE,
  MIGRATE_RECLAIMABLE,
  MIGRATE_TYPES,
  MIGRATE_UNMOVABLE,
  PAGEBLOCK_ORDER,
  PAGEBLOCK_PAGES,
  Z_END,
  Z_FREE,
  Z_LISTS,
  Z_LOCK,
  Z_MIN,
  Z_NR_FREE,
  Z_START,
} = zoneWords;

/** Where an allocation of a type may look when its own lists are empty, in order. */
const FALLBACKS: readonly (readonly number[])[] = [
  [MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE],
  [MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE],
  [MIGRATE_UNMOVABLE, MIGRATE_MOVABLE],
];

export class Buddy {
  readonly w: Int32Array;
  readonly memmap: number;
  readonly #free: number;
  readonly #shadow: number;
  readonly pageblocks: number;
  readonly vcpu: Vcpu;
  readonly #events: number;
  readonly #relax: () => void;
  /** Blocks that the last `rmqueueRun` took. */
  taken = 0;
  /** Smallest order of which `onLargeFree` is told. */
  largeOrder: number = PAGEBLOCK_ORDER;
  /** Called with the order when a free block of `largeOrder` or more appears (`page_reporting_notify_free`). */
  onLargeFree: (order: number) => void = () => undefined;

  constructor(arena: Arena, vcpu: Vcpu) {
    this.w = arena.w;
    this.memmap = arena.memmap;
    this.#free = arena.free;
    this.#shadow = arena.shadow;
    this.pageblocks = arena.layout.pageblocks;
    this.vcpu = vcpu;
    this.#events = eventRow(vcpu.id);
    this.#relax = () => {
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  /** Takes the zone's lock: guards its free lists, counts, and the flags of its free pages. Innermost lock. */
  lock(zone: number): void {
    if (this.vcpu.schedule.controlled) this.vcpu.schedule.point('lock', zone);
    spinLock(this.w, zone + Z_LOCK, this.vcpu.id, this.#relax);
  }

  unlock(zone: number): void {
    spinUnlock(this.w, zone + Z_LOCK);
    if (this.vcpu.schedule.controlled) this.vcpu.schedule.point('unlock', zone);
  }

  pageblockType(pfn: number): number {
    return this.w[this.pageblocks + (pfn >>> PAGEBLOCK_ORDER)];
  }

  setPageblockType(pfn: number, migratetype: number): void {
    this.w[this.pageblocks + (pfn >>> PAGEBLOCK_ORDER)] = migratetype;
  }

  /** Order of the free block that starts at `pfn`, −1 if none does. */
  freeOrder(pfn: number): number {
    return (this.w[this.#free + pfn] & FREE_ORDER) - 1;
  }

  /** Whether the host knows of the free block that starts at `pfn`. */
  isReported(pfn: number): boolean {
    return (this.w[this.#free + pfn] & FREE_REPORTED) !== 0;
  }

  // ── Lists ────────────────────────────────────────────────────────────────────────────────────────────────────────

  #addHead(zone: number, pfn: number, order: number, migratetype: number): void {
    const w = this.w;
    const list = zone + listAt(order, migratetype);
    const page = this.memmap + (pfn << 4);
    const head = w[list];
    w[page + P_NEXT] = head;
    w[page + P_PREV] = -1;
    if (head >= 0) w[this.memmap + (head << 4) + P_PREV] = pfn;
    else w[list + 1] = pfn;
    w[list] = pfn;
    w[this.#free + pfn] = (zone << FREE_ZONE_SHIFT) | (order + 1);
    w[zone + Z_NR_FREE + order]++;
  }

  #addTail(zone: number, pfn: number, order: number, migratetype: number): void {
    const w = this.w;
    const list = zone + listAt(order, migratetype);
    const page = this.memmap + (pfn << 4);
    const tail = w[list + 1];
    w[page + P_NEXT] = -1;
    w[page + P_PREV] = tail;
    if (tail >= 0) w[this.memmap + (tail << 4) + P_NEXT] = pfn;
    else w[list] = pfn;
    w[list + 1] = pfn;
    w[this.#free + pfn] = (zone << FREE_ZONE_SHIFT) | (order + 1);
    w[zone + Z_NR_FREE + order]++;
  }

  #remove(zone: number, pfn: number, order: number, migratetype: number): void {
    const w = this.w;
    const list = zone + listAt(order, migratetype);
    const page = this.memmap + (pfn << 4);
    const next = w[page + P_NEXT];
    const prev = w[page + P_PREV];
    if (prev >= 0) w[this.memmap + (prev << 4) + P_NEXT] = next;
    else w[list] = next;
    if (next >= 0) w[this.memmap + (next << 4) + P_PREV] = prev;
    else w[list + 1] = prev;
    w[this.#free + pfn] = 0;
    w[zone + Z_NR_FREE + order]--;
  }

  /** Makes `pfn` the first of its list by rotating, so that a scan resumes there (`list_rotate_to_front`). */
  rotateToFront(zone: number, pfn: number, order: number, migratetype: number): void {
    const w = this.w;
    const list = zone + listAt(order, migratetype);
    const head = w[list];
    if (head === pfn) return;
    const tail = w[list + 1];
    const prev = w[this.memmap + (pfn << 4) + P_PREV];
    w[this.memmap + (tail << 4) + P_NEXT] = head;
    w[this.memmap + (head << 4) + P_PREV] = tail;
    w[list] = pfn;
    w[list + 1] = prev;
    w[this.memmap + (pfn << 4) + P_PREV] = -1;
    w[this.memmap + (prev << 4) + P_NEXT] = -1;
  }

  // ── Allocation ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** Takes a block of `order` for `migratetype`, falling back to other types' blocks; −1 if the zone has none. */
  rmqueue(zone: number, order: number, migratetype: number): number {
    return this.rmqueueRun(zone, order, migratetype, 1);
  }

  /**
   * Takes up to `most` blocks of `order` that lie side by side (`taken` tells how many) and returns the first, −1 if there
   * is none. They are what `rmqueue` would give one by one, which splits a block from its low end and exhausts it before
   * the next; here a block that is wanted whole is not split.
   */
  rmqueueRun(zone: number, order: number, migratetype: number, most: number): number {
    const pfn = this.#smallest(zone, order, migratetype, most);
    if (pfn >= 0) return pfn;
    this.taken = 1;
    return this.#fallback(zone, order, migratetype);
  }

  #smallest(zone: number, order: number, migratetype: number, most: number): number {
    const w = this.w;
    // The order of the largest run that is wanted.
    const whole = order + 31 - Math.clz32(most);
    for (
      let o = order, list = zone + listAt(order, migratetype);
      o <= MAX_ORDER;
      o++, list += 2 * MIGRATE_TYPES
    ) {
      const pfn = w[list];
      if (pfn < 0) continue;
      const run = o < whole ? o : whole;
      this.#remove(zone, pfn, o, migratetype);
      this.#expand(zone, pfn, run, o, migratetype);
      w[zone + Z_FREE] -= 1 << run;
      this.taken = 1 << (run - order);
      return pfn;
    }
    return -1;
  }

  /** Gives back the upper halves of a block of `high` until `low` is left. */
  #expand(zone: number, pfn: number, low: number, high: number, migratetype: number): void {
    for (let o = high; o > low; ) {
      o--;
      this.#addHead(zone, pfn + (1 << o), o, migratetype);
    }
  }

  /**
   * No block of the right type: takes one of another type. A large one turns its pageblock when at least half of it is
   * free, so that types mix as little as possible. A movable request that may not turn a block takes the smallest that
   * fits. Linux counts allocated pages that are surely of the type asked for as well (`prep_move_freepages_block`); here
   * an allocated page counts as what its pageblock is, which is never that type.
   */
  #fallback(zone: number, order: number, migratetype: number): number {
    if (migratetype >= FALLBACKS.length) return -1;
    const w = this.w;
    for (let o = MAX_ORDER; o >= order; o--) {
      for (const from of FALLBACKS[migratetype]) {
        const pfn = w[zone + listAt(o, from)];
        if (pfn < 0) continue;
        const canSteal = o >= PAGEBLOCK_ORDER >> 1 || migratetype !== MIGRATE_MOVABLE;
        if (canSteal) return this.#steal(zone, pfn, o, order, from, migratetype);
        return this.#stealSmallest(zone, order, migratetype);
      }
    }
    return -1;
  }

  #stealSmallest(zone: number, order: number, migratetype: number): number {
    for (let o = order; o <= MAX_ORDER; o++) {
      for (const from of FALLBACKS[migratetype]) {
        const pfn = this.w[zone + listAt(o, from)];
        if (pfn >= 0) return this.#take(zone, pfn, o, order, from);
      }
    }
    return -1;
  }

  /** Takes a block and leaves its remainder with its own type. */
  #take(zone: number, pfn: number, have: number, want: number, migratetype: number): number {
    this.w[this.#events + EV.fallback_steal]++;
    this.#remove(zone, pfn, have, migratetype);
    this.#expand(zone, pfn, want, have, migratetype);
    this.w[zone + Z_FREE] -= 1 << want;
    return pfn;
  }

  #steal(zone: number, pfn: number, have: number, want: number, from: number, migratetype: number): number {
    const w = this.w;
    if (have >= PAGEBLOCK_ORDER) {
      // Whole pageblocks change hands.
      this.#remove(zone, pfn, have, from);
      for (let p = pfn; p < pfn + (1 << have); p += PAGEBLOCK_PAGES) this.setPageblockType(p, migratetype);
      this.#expand(zone, pfn, want, have, migratetype);
      w[zone + Z_FREE] -= 1 << want;
      w[this.#events + EV.fallback_claim]++;
      return pfn;
    }
    const block = pfn - (pfn % PAGEBLOCK_PAGES);
    if (block < w[zone + Z_START] || block + PAGEBLOCK_PAGES > w[zone + Z_END])
      return this.#take(zone, pfn, have, want, from);
    let free = 0;
    for (let p = block; p < block + PAGEBLOCK_PAGES; ) {
      const order = this.freeOrder(p);
      if (order >= 0) free += 1 << order;
      p += order < 0 ? 1 : 1 << order;
    }
    if (free < PAGEBLOCK_PAGES / 2) return this.#take(zone, pfn, have, want, from);
    this.#moveFreepages(zone, block, from, migratetype);
    this.setPageblockType(block, migratetype);
    w[this.#events + EV.fallback_claim]++;
    return this.#smallest(zone, want, migratetype, 1);
  }

  /** Moves the free blocks inside one pageblock from one type's lists to another's; the pages moved. */
  #moveFreepages(zone: number, block: number, from: number, to: number): number {
    const w = this.w;
    let moved = 0;
    for (let p = block; p < block + PAGEBLOCK_PAGES; ) {
      const order = this.freeOrder(p);
      if (order < 0) {
        p++;
        continue;
      }
      const reported = w[this.#free + p] & FREE_REPORTED;
      this.#remove(zone, p, order, from);
      this.#addHead(zone, p, order, to);
      w[this.#free + p] |= reported;
      p += 1 << order;
      moved += 1 << order;
    }
    return moved;
  }

  /** Takes the one free page `pfn` and gives the rest of its block back (`take_page_off_buddy`). False: it is not free. */
  takeExact(zone: number, pfn: number): boolean {
    const w = this.w;
    for (let o = 0; o <= MAX_ORDER; o++) {
      let head = pfn & ~((1 << o) - 1);
      if (this.freeOrder(head) !== o) continue;
      const migratetype = this.pageblockType(head);
      if (migratetype === MIGRATE_ISOLATE) return false;
      this.#remove(zone, head, o, migratetype);
      for (let half = o - 1; half >= 0; half--) {
        const upper = head + (1 << half);
        this.#addHead(zone, pfn < upper ? upper : head, half, migratetype);
        if (pfn >= upper) head = upper;
      }
      w[zone + Z_FREE] -= 1;
      return true;
    }
    return false;
  }

  // ── Freeing ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Frees a block: merges it with its buddies as far as it goes and puts it on the list of its pageblock's type. At the
   * tail when its buddy of the next order is free too, so that it may merge before it is used again. `notify` false
   * keeps free page reporting quiet (putting back what was just reported). `atTail` (`FPI_TO_TAIL`): so is that, and boot
   * frees ascending memory to the tails, so that low addresses are handed out first.
   */
  freeOne(zone: number, pfn: number, order: number, notify: boolean, atTail = false): void {
    const w = this.w;
    const start = w[zone + Z_START];
    const end = w[zone + Z_END];
    const migratetype = w[this.pageblocks + (pfn >>> PAGEBLOCK_ORDER)];
    // What a buddy's word says if it is a block of this zone; spans of zones may cross, since plugged memory goes to a zone
    // block by block (`page_is_buddy`).
    const own = zone << FREE_ZONE_SHIFT;
    const free = this.#free;
    let at = pfn;
    let o = order;
    // What is being isolated is nobody's to allocate, and does not count as free.
    if (migratetype !== MIGRATE_ISOLATE) w[zone + Z_FREE] += 1 << order;
    while (o < MAX_ORDER) {
      const buddy = at ^ (1 << o);
      if (buddy < start || buddy >= end) break;
      if ((w[free + buddy] & ~FREE_REPORTED) !== (own | (o + 1))) break;
      const buddyType = w[this.pageblocks + (buddy >>> PAGEBLOCK_ORDER)];
      if (buddyType !== migratetype && (migratetype >= MIGRATE_HIGHATOMIC || buddyType >= MIGRATE_HIGHATOMIC))
        break;
      this.#remove(zone, buddy, o, buddyType);
      at &= ~(1 << o);
      o++;
    }
    if (atTail || (o < MAX_ORDER && this.#mergeLikely(zone, at, o, start, end)))
      this.#addTail(zone, at, o, this.#listType(at, o, migratetype));
    else this.#addHead(zone, at, o, this.#listType(at, o, migratetype));
    if (notify && o >= this.largeOrder) this.onLargeFree(o);
  }

  /** Merging across pageblocks of two types: all take the type of the block that was freed. */
  #listType(pfn: number, order: number, migratetype: number): number {
    if (order <= PAGEBLOCK_ORDER) return migratetype;
    for (let p = pfn; p < pfn + (1 << order); p += PAGEBLOCK_PAGES) {
      this.w[this.pageblocks + (p >>> PAGEBLOCK_ORDER)] = migratetype;
    }
    return migratetype;
  }

  #mergeLikely(zone: number, pfn: number, order: number, start: number, end: number): boolean {
    if (order >= MAX_ORDER - 1) return false;
    const combined = pfn & ~(1 << order);
    const higher = combined ^ (1 << (order + 1));
    if (higher < start || higher >= end) return false;
    return (this.w[this.#free + higher] & ~FREE_REPORTED) === ((zone << FREE_ZONE_SHIFT) | (order + 2));
  }

  // ── Isolation for reporting ──────────────────────────────────────────────────────────────────────────────────────

  /**
   * Takes a free block off its list so that nobody can allocate it (L25). Refused unless more than the min watermark is
   * left (L35). What is half a pageblock or more turns its pageblocks Movable, as an allocation of it would leave them. The
   * caller holds the lock and puts the block back with `putBack` after the host has acknowledged.
   */
  isolate(zone: number, pfn: number, order: number): boolean {
    const w = this.w;
    if (w[zone + Z_FREE] - (1 << order) <= w[zone + Z_MIN]) return false;
    assert(this.freeOrder(pfn) === order, 'only a free block is isolated');
    this.#remove(zone, pfn, order, this.pageblockType(pfn));
    w[zone + Z_FREE] -= 1 << order;
    shadowMove(w, this.#shadow, this.vcpu, pfn, 1 << order, SHADOW_BUDDY, SHADOW_ISOLATED);
    if (order >= PAGEBLOCK_ORDER - 1) {
      const end = pfn + (1 << order);
      for (let block = pfn & -PAGEBLOCK_PAGES; block < end; block += PAGEBLOCK_PAGES) {
        const type = this.pageblockType(block);
        const whole = block >= w[zone + Z_START] && block + PAGEBLOCK_PAGES <= w[zone + Z_END];
        if (!whole || type === MIGRATE_MOVABLE || type >= MIGRATE_HIGHATOMIC) continue;
        this.#moveFreepages(zone, block, type, MIGRATE_MOVABLE);
        this.setPageblockType(block, MIGRATE_MOVABLE);
      }
    }
    return true;
  }

  /**
   * Puts an isolated block back, at the tail: what was just reported is the last to be handed out. If it did not merge it
   * is marked reported; a merged one must be reported again.
   */
  putBack(zone: number, pfn: number, order: number, reported: boolean): void {
    const w = this.w;
    shadowMove(w, this.#shadow, this.vcpu, pfn, 1 << order, SHADOW_ISOLATED, SHADOW_BUDDY);
    this.freeOne(zone, pfn, order, false, true);
    if (reported && this.freeOrder(pfn) === order) w[this.#free + pfn] |= FREE_REPORTED;
  }

  // ── Isolation of pageblocks (`mm/page_isolation.c`) ──────────────────────────────────────────────────────────────

  /** Takes a pageblock's free pages out of circulation and keeps what is freed there from being allocated. Needs the lock. */
  isolatePageblock(zone: number, block: number): void {
    const from = this.pageblockType(block);
    this.#splitAcross(zone, block, from);
    this.w[zone + Z_FREE] -= this.#moveFreepages(zone, block, from, MIGRATE_ISOLATE);
    this.setPageblockType(block, MIGRATE_ISOLATE);
  }

  /** Puts an isolated pageblock back into circulation as `migratetype`. Needs the lock. */
  unisolatePageblock(zone: number, block: number, migratetype: number): void {
    this.setPageblockType(block, migratetype);
    for (let p = block; p < block + PAGEBLOCK_PAGES; ) {
      const order = this.freeOrder(p);
      if (order < 0) {
        p++;
        continue;
      }
      this.#remove(zone, p, order, MIGRATE_ISOLATE);
      this.freeOne(zone, p, order, true);
      p += 1 << order;
    }
  }

  /** A free block of the largest order that reaches over a pageblock becomes one per pageblock. */
  #splitAcross(zone: number, block: number, migratetype: number): void {
    const head = block & ~((1 << MAX_ORDER) - 1);
    const w = this.w;
    if (this.freeOrder(head) !== MAX_ORDER) return;
    const reported = w[this.#free + head] & FREE_REPORTED;
    this.#remove(zone, head, MAX_ORDER, migratetype);
    for (let p = head; p < head + (1 << MAX_ORDER); p += PAGEBLOCK_PAGES) {
      this.#addHead(zone, p, PAGEBLOCK_ORDER, migratetype);
      w[this.#free + p] |= reported;
    }
  }

  /**
   * Takes every page of isolated pageblocks `[first, first + count)` off the free lists; false, and nothing taken, if one
   * of them is not free. Needs the lock.
   */
  takeIsolated(zone: number, first: number, count: number): boolean {
    for (let p = first; p < first + count; ) {
      const order = this.freeOrder(p);
      if (order < 0) return false;
      p += 1 << order;
    }
    for (let p = first; p < first + count; ) {
      const order = this.freeOrder(p);
      this.#remove(zone, p, order, MIGRATE_ISOLATE);
      p += 1 << order;
    }
    return true;
  }

  // ── Boot ─────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Empties the lists of a zone. Boot only. */
  initZone(zone: number): void {
    this.w.fill(-1, zone + Z_LISTS, zone + Z_LISTS + 2 * (MAX_ORDER + 1) * MIGRATE_TYPES);
  }
}
