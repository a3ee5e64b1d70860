/**
 * Free page reporting as merged upstream (`mm/page_reporting.c`, `virtballoon_free_page_report`): 2 s after a large
 * block becomes free, and while there is more, walk zone by zone, order 9 then 10, migratetype by migratetype; isolate
 * up to 32 unreported blocks under the zone lock, drop the lock, report them, wait for the acknowledgement, and only
 * then put them back (I3, L25, L28). A budget of two requests per list and pass keeps the passes short.
 *
 * The scatterlist is filled from its end, so the first entry of a full request is the block found last.
 */
import { NS_PER_MS, NS_PER_S, spinUnlock, trySpinLock, type Vcpu } from '@ebb/machine';
import type { Segment } from '@ebb/virtio/driver';
import type { Arena } from '../arena.ts';
import { H_BALLOON_MUTEX, T_REPORTING } from '../layout.ts';
import type { Buddy } from '../mm/buddy.ts';
import { EV, eventRow } from '../mm/events.ts';
import { P_NEXT } from '../mm/page.ts';
import { watermarkOk } from '../mm/page-alloc.ts';
import {
  listAt,
  MAX_ORDER,
  MIGRATE_ISOLATE,
  MIGRATE_TYPES,
  PAGEBLOCK_ORDER,
  Z_LOW,
  Z_NR_FREE,
} from '../mm/zone.ts';
import type { BalloonDriver } from './balloon.ts';
import { PAGE_REPORTING_CAPACITY, Q_REPORTING } from './virtio-guest.ts';

export const PAGE_REPORTING_DELAY: number = 2 * NS_PER_S;

/** States of the one worker. */
const R_STATE = 0;
const IDLE = 0;
const REQUESTED = 1;
const ACTIVE = 2;
/** When the next pass is due, in virtual milliseconds. Any CPU stores it before it asks for a pass. */
const R_DUE_MS = 2;

export class PageReporting {
  readonly #w: Int32Array;
  readonly #memmap: number;
  readonly #vcpu: Vcpu;
  readonly #buddy: Buddy;
  readonly #zones: readonly number[];
  readonly #balloon: BalloonDriver;
  readonly #events: number;
  /** Smallest order reported. */
  readonly #order: number;
  /** The scatterlist: pfn and order, filled from the end. */
  readonly #pfns = new Int32Array(PAGE_REPORTING_CAPACITY);
  readonly #orders = new Int32Array(PAGE_REPORTING_CAPACITY);

  constructor(
    arena: Arena,
    vcpu: Vcpu,
    buddy: Buddy,
    zones: readonly number[],
    balloon: BalloonDriver,
    order: number = PAGEBLOCK_ORDER,
  ) {
    this.#order = order;
    this.#w = arena.w;
    this.#memmap = arena.memmap;
    this.#vcpu = vcpu;
    this.#buddy = buddy;
    this.#zones = zones;
    this.#balloon = balloon;
    this.#events = eventRow(vcpu.id);
  }

  /**
   * A large block became free (`page_reporting_notify_free`): a pass is due in 2 s unless one is already. One that is under
   * way may have been past the block's list: another follows it. Any vCPU.
   */
  notifyFree(): void {
    for (;;) {
      const state = Atomics.load(this.#w, T_REPORTING + R_STATE);
      if (state === REQUESTED) return;
      // The time before the state: vCPU 0 reads it once it sees the request. A second asker only moves it by a moment.
      if (state === IDLE) this.#dueInTwoSeconds();
      if (Atomics.compareExchange(this.#w, T_REPORTING + R_STATE, state, REQUESTED) === state) return;
    }
  }

  #dueInTwoSeconds(): void {
    const due = Math.ceil((this.#vcpu.clock + PAGE_REPORTING_DELAY) / NS_PER_MS);
    Atomics.store(this.#w, T_REPORTING + R_DUE_MS, due);
  }

  nextDue(): number {
    if (this.#balloon.deviceQueue(Q_REPORTING) < 0 || !this.#balloon.ready) return Number.POSITIVE_INFINITY;
    return Atomics.load(this.#w, T_REPORTING + R_STATE) === REQUESTED
      ? Atomics.load(this.#w, T_REPORTING + R_DUE_MS) * NS_PER_MS
      : Number.POSITIVE_INFINITY;
  }

  /** One pass over all zones. On vCPU 0, when due. */
  pass(): void {
    const w = this.#w;
    if (!this.#balloon.ready || this.#balloon.queue(Q_REPORTING) === null) return;
    if (!trySpinLock(w, H_BALLOON_MUTEX, this.#vcpu.id)) return;
    Atomics.store(w, T_REPORTING + R_STATE, ACTIVE);
    for (const zone of this.#zones) this.#zone(zone);
    spinUnlock(w, H_BALLOON_MUTEX);
    // A request for more (or a free during the pass) stays REQUESTED and comes due in 2 s.
    if (Atomics.compareExchange(w, T_REPORTING + R_STATE, ACTIVE, IDLE) !== ACTIVE) this.#dueInTwoSeconds();
  }

  #zone(zone: number): void {
    const w = this.#w;
    if (!watermarkOk(w, zone, 0, w[zone + Z_LOW] + (PAGE_REPORTING_CAPACITY << this.#order), 0)) return;
    let offset = PAGE_REPORTING_CAPACITY;
    for (let order = this.#order; order <= MAX_ORDER; order++) {
      for (let migratetype = 0; migratetype < MIGRATE_TYPES; migratetype++) {
        if (migratetype !== MIGRATE_ISOLATE) offset = this.#cycle(zone, order, migratetype, offset);
      }
    }
    if (offset < PAGE_REPORTING_CAPACITY) {
      this.#report(offset);
      this.#buddy.lock(zone);
      this.#drain(zone, offset);
      this.#buddy.unlock(zone);
    }
  }

  /** Walks one free list; returns the scatterlist's fill offset. */
  #cycle(zone: number, order: number, migratetype: number, startOffset: number): number {
    const w = this.#w;
    const list = zone + listAt(order, migratetype);
    let offset = startOffset;
    this.#buddy.lock(zone);
    let budget = Math.ceil(w[zone + Z_NR_FREE + order] / (PAGE_REPORTING_CAPACITY * 16));
    let pfn = w[list];
    while (pfn >= 0) {
      const page = this.#memmap + (pfn << 4);
      const next = w[page + P_NEXT];
      if (this.#buddy.isReported(pfn)) {
        pfn = next;
        continue;
      }
      if (budget < 0) {
        Atomics.store(w, T_REPORTING + R_STATE, REQUESTED);
        break;
      }
      if (offset > 0) {
        if (!this.#buddy.isolate(zone, pfn, order)) break;
        offset--;
        this.#pfns[offset] = pfn;
        this.#orders[offset] = order;
        pfn = next;
        continue;
      }
      // The list is full: make this block the first, so that the walk resumes here, and report without the lock.
      this.#buddy.rotateToFront(zone, pfn, order, migratetype);
      this.#buddy.unlock(zone);
      this.#report(0);
      offset = PAGE_REPORTING_CAPACITY;
      budget--;
      this.#buddy.lock(zone);
      this.#drain(zone, 0);
      pfn = w[list];
    }
    if (pfn >= 0 && w[list] !== pfn) this.#buddy.rotateToFront(zone, pfn, order, migratetype);
    this.#buddy.unlock(zone);
    return offset;
  }

  /** Sends entries `from … 31` and waits for the acknowledgement. No lock is held; the blocks are isolated. */
  #report(from: number): void {
    const queue = this.#balloon.queue(Q_REPORTING);
    if (queue === null) return;
    const segments: Segment[] = [];
    let pages = 0;
    for (let i = from; i < PAGE_REPORTING_CAPACITY; i++) {
      segments.push({ gpa: this.#pfns[i] * 4096, length: 4096 << this.#orders[i] });
      pages += 1 << this.#orders[i];
    }
    queue.add(this.#vcpu, [], segments, 0);
    this.#balloon.guest.submitAndWait(queue, this.#balloon.deviceQueue(Q_REPORTING));
    this.#w[this.#events + EV.report_requests]++;
    this.#w[this.#events + EV.reported_pages] += pages;
  }

  /** Puts reported blocks back on their lists. Needs the zone lock; the acknowledgement has come. */
  #drain(zone: number, from: number): void {
    for (let i = from; i < PAGE_REPORTING_CAPACITY; i++)
      this.#buddy.putBack(zone, this.#pfns[i], this.#orders[i], true);
  }
}
