/**
 * The virtio-balloon driver, as Linux 6.12 behaves (`drivers/virtio/virtio_balloon.c`): bring-up, inflate and deflate in
 * batches of 256, the OOM notifier, unbinding. Its statistics are in `balloon-stats.ts`, free page hinting in `hinting.ts`, free
 * page reporting in `reporting.ts`.
 *
 * Works at steps of vCPU 0 as an explicit state machine whose state is in the arena; the OOM notifier may run on any
 * vCPU. The balloon mutex guards the page list, the queues and the buffer pages, and is held across device waits.
 */
import { NS_PER_MS, spinLock, spinUnlock, trySpinLock, type Vcpu } from '@ebb/machine';
import type { SplitDriverQueue } from '@ebb/virtio/driver';
import {
  BALLOON_CFG_ACTUAL,
  BALLOON_CFG_NUM_PAGES,
  BALLOON_CFG_POISON_VAL,
  Features,
  INTERRUPT_CONFIG_CHANGE,
  VIRTIO_BALLOON_ARRAY_PFNS_MAX,
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
  VIRTIO_F_ACCESS_PLATFORM,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_BALLOON,
} from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import { H_BALLOON_MUTEX, T_BALLOON } from '../layout.ts';
import { EV, eventRow } from '../mm/events.ts';
import {
  PG_OFFLINE,
  P_FLAGS,
  P_NEXT,
  P_PREV,
  P_ZONE,
  SHADOW_ALLOCATED,
  SHADOW_BALLOON,
  shadowMove,
} from '../mm/page.ts';
import { GFP_NORETRY, type PageAllocator } from '../mm/page-alloc.ts';
import { MIGRATE_MOVABLE, Z_MANAGED } from '../mm/zone.ts';
import { balloonStats } from './balloon-stats.ts';
import { FreePageHints } from './hinting.ts';
import {
  LINE_BALLOON,
  PAGE_REPORTING_CAPACITY,
  Q_DEFLATE,
  Q_HINT,
  Q_INFLATE,
  Q_REPORTING,
  Q_STATS,
  VirtioGuest,
} from './virtio-guest.ts';

/** 1 while the driver is bound: vCPU 0 stores it last when it binds and first when it unbinds; any vCPU's `ready` loads it. */
const V_READY = 0;
const V_FEATURES_LOW = 1;
const V_FEATURES_HIGH = 2;
/** Pages in the balloon, and the first of their list (newest first). */
const V_NR_PAGES = 3;
const V_LIST = 4;
/** 1 while there is work: a config change, or a size not reached. */
const V_WORK = 5;
/** 1: an interrupt came while another CPU held the mutex. Both words are vCPU 0's alone. */
const V_MISSED = 8;
const V_PFN_PAGE = 9;
const V_STATS_PAGE = 10;
/** Words 6, 7 and 11 are `hinting.ts`'s. */
/** Not before this virtual time: 200 ms after running out of pages. */
const V_RETRY_F64 = (T_BALLOON + 12) / 2;
/** Device index of each arena queue number, −1 if not negotiated. */
const V_INDEX = 16;
/** Size of each queue: the device's maximum, at most 128. */
const V_SIZE = 24;
const V_RINGS = 32;

const QUEUE_SIZE = 128;
const RETRY_NS: number = 200 * NS_PER_MS;
/** HIGHUSER_MOVABLE | NOMEMALLOC | NORETRY | NOWARN: may reclaim, never calls the OOM path. */
const BALLOON_GFP: number = 3 | GFP_NORETRY;
/** Guest pages the driver needs: three per queue, and one each for PFNs, statistics and the command id. */
export const BALLOON_PAGES = 18;

export class BalloonDriver {
  /** A museum piece: pages that move are counted where they were. */
  miscounts = false;
  readonly #w: Int32Array;
  readonly #f64: Float64Array;
  readonly #arena: Arena;
  readonly #memmap: number;
  readonly #shadow: number;
  readonly #vcpu: Vcpu;
  readonly #alloc: PageAllocator;
  readonly #zones: readonly number[];
  readonly #guest: VirtioGuest;
  readonly #events: number;
  readonly #relax: () => void;
  readonly #queues: (SplitDriverQueue | null)[] = [];
  readonly hints: FreePageHints;
  readonly #poison: boolean;
  #features: Features | null = null;

  constructor(
    arena: Arena,
    vcpu: Vcpu,
    alloc: PageAllocator,
    zones: readonly number[],
    poison: boolean,
    inWait: () => void,
  ) {
    this.#w = arena.w;
    this.#f64 = arena.f64;
    this.#arena = arena;
    this.#memmap = arena.memmap;
    this.#shadow = arena.shadow;
    this.#vcpu = vcpu;
    this.#alloc = alloc;
    this.#zones = zones;
    this.#poison = poison;
    this.#guest = new VirtioGuest(arena, vcpu, LINE_BALLOON, inWait);
    this.#events = eventRow(vcpu.id);
    this.#relax = () => {
      inWait();
      vcpu.beginSection();
      vcpu.port.relax();
    };
    this.hints = new FreePageHints(arena, vcpu, alloc, this);
  }

  // ── Bring-up ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Brings the device up on vCPU 0. `pages`: `BALLOON_PAGES` zeroed guest pages. False: no such device. */
  probe(pages: readonly number[]): boolean {
    const w = this.#w;
    const { driver } = this.#guest;
    if (!driver.begin(VIRTIO_ID_BALLOON).ok) return false;
    // Linux's balloon declines INDIRECT_DESC, and writes its features twice: first all, then what it really wants.
    const all = driver
      .readFeatures()
      .and(
        Features.of(
          VIRTIO_BALLOON_F_MUST_TELL_HOST,
          VIRTIO_BALLOON_F_STATS_VQ,
          VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
          VIRTIO_BALLOON_F_FREE_PAGE_HINT,
          VIRTIO_BALLOON_F_PAGE_POISON,
          VIRTIO_BALLOON_F_REPORTING,
          VIRTIO_F_EVENT_IDX,
          VIRTIO_F_VERSION_1,
          VIRTIO_F_ACCESS_PLATFORM,
        ),
      );
    driver.writeFeatures(all);
    // A device that does not know of the poison would take it away with what is reported (`virtballoon_validate`).
    const poisonLost = this.#poison && !all.has(VIRTIO_BALLOON_F_PAGE_POISON);
    const features = all.without(
      VIRTIO_F_ACCESS_PLATFORM,
      ...(this.#poison ? [] : [VIRTIO_BALLOON_F_PAGE_POISON]),
      ...(poisonLost ? [VIRTIO_BALLOON_F_REPORTING] : []),
    );
    driver.writeFeatures(features);
    if (!driver.acceptFeatures(features).ok) return false;
    w[T_BALLOON + V_FEATURES_LOW] = features.low;
    w[T_BALLOON + V_FEATURES_HIGH] = features.high;
    w[T_BALLOON + V_LIST] = -1;
    for (let i = 0; i < 15; i++) w[T_BALLOON + V_RINGS + i] = pages[i];
    w[T_BALLOON + V_PFN_PAGE] = pages[15];
    w[T_BALLOON + V_STATS_PAGE] = pages[16];
    this.hints.begin(pages[17]);
    // Queue indices are compacted: an optional queue that was not negotiated has none.
    let index = 0;
    for (const [number, bit] of [
      [Q_INFLATE, -1],
      [Q_DEFLATE, -1],
      [Q_STATS, VIRTIO_BALLOON_F_STATS_VQ],
      [Q_HINT, VIRTIO_BALLOON_F_FREE_PAGE_HINT],
      [Q_REPORTING, VIRTIO_BALLOON_F_REPORTING],
    ] as const) {
      const wanted = bit < 0 || features.has(bit);
      w[T_BALLOON + V_INDEX + number] = wanted ? index : -1;
      if (!wanted) continue;
      const max = driver.queueMax(index);
      if (!max.ok) return false;
      w[T_BALLOON + V_SIZE + number] = Math.min(QUEUE_SIZE, max.value);
      // A report needs a chain of 32 (Linux fails the probe with ENOSPC).
      if (number === Q_REPORTING && max.value < PAGE_REPORTING_CAPACITY) return false;
      const queue = this.queue(number);
      if (queue === null) return false;
      queue.reset(this.#vcpu);
      if (!driver.setupQueue(index, queue.size, queue.rings).ok) return false;
      index++;
    }
    if (features.has(VIRTIO_BALLOON_F_PAGE_POISON)) driver.writeConfig32(BALLOON_CFG_POISON_VAL, 0xaaaaaaaa);
    // Linux primes and kicks the stats queue before DRIVER_OK; the device finds it there.
    if (features.has(VIRTIO_BALLOON_F_STATS_VQ)) this.#sendStats();
    driver.driverOk();
    w[T_BALLOON + V_WORK] = 1;
    Atomics.store(w, T_BALLOON + V_READY, 1);
    return true;
  }

  get ready(): boolean {
    return Atomics.load(this.#w, T_BALLOON + V_READY) !== 0;
  }

  /**
   * The driver is unbound (`virtballoon_remove`): the balloon is emptied, the device told so once, hinted pages are released
   * and the device is reset. On vCPU 0. With the mutex: who waits for an answer has it first.
   */
  remove(): void {
    const w = this.#w;
    if (!this.ready) return;
    spinLock(w, H_BALLOON_MUTEX, this.#vcpu.id, this.#relax);
    Atomics.store(w, T_BALLOON + V_READY, 0);
    while (w[T_BALLOON + V_NR_PAGES] > 0) this.#leak(VIRTIO_BALLOON_ARRAY_PFNS_MAX);
    this.#guest.driver.writeConfig32(BALLOON_CFG_ACTUAL, 0);
    this.hints.release();
    this.#guest.driver.reset();
    spinUnlock(w, H_BALLOON_MUTEX);
  }

  /** The driver is bound again, with the pages it had. On vCPU 0. */
  reload(): boolean {
    if (this.ready) return false;
    const w = this.#w;
    this.#features = null;
    this.#queues.length = 0;
    const rings = Array.from({ length: 15 }, (_, i) => w[T_BALLOON + V_RINGS + i]);
    return this.probe([...rings, w[T_BALLOON + V_PFN_PAGE], w[T_BALLOON + V_STATS_PAGE], this.hints.page]);
  }

  get features(): Features {
    this.#features ??= new Features(
      this.#w[T_BALLOON + V_FEATURES_LOW],
      this.#w[T_BALLOON + V_FEATURES_HIGH],
    );
    return this.#features;
  }

  /** This vCPU's view of an arena queue; null when it was not negotiated. */
  queue(number: number): SplitDriverQueue | null {
    if (this.#w[T_BALLOON + V_INDEX + number] < 0) return null;
    const cached = this.#queues[number];
    if (cached !== undefined && cached !== null) return cached;
    const features = new Features(this.#w[T_BALLOON + V_FEATURES_LOW], this.#w[T_BALLOON + V_FEATURES_HIGH]);
    const queue = this.#guest.queue(
      number,
      this.#w[T_BALLOON + V_SIZE + number],
      T_BALLOON + V_RINGS + 3 * number,
      features,
    );
    this.#queues[number] = queue;
    return queue;
  }

  get guest(): VirtioGuest {
    return this.#guest;
  }
  deviceQueue(number: number): number {
    return this.#w[T_BALLOON + V_INDEX + number];
  }
  get nrPages(): number {
    return Atomics.load(this.#w, T_BALLOON + V_NR_PAGES);
  }

  // ── Interrupts and work ──────────────────────────────────────────────────────────────────────────────────────────

  /** The device's interrupt: notes a config change, answers a request for statistics. On vCPU 0, between steps. */
  interrupt(): void {
    if (!this.ready) return;
    if (!trySpinLock(this.#w, H_BALLOON_MUTEX, this.#vcpu.id)) {
      // Another CPU is in its OOM notifier: `work` looks at what this was about.
      this.#w[T_BALLOON + V_MISSED] = 1;
      this.#w[T_BALLOON + V_WORK] = 1;
      return;
    }
    this.#handleInterrupt();
    spinUnlock(this.#w, H_BALLOON_MUTEX);
  }

  /** Under the mutex. */
  #handleInterrupt(): void {
    this.#w[T_BALLOON + V_MISSED] = 0;
    const status = this.#guest.driver.takeInterrupt();
    if ((status & INTERRUPT_CONFIG_CHANGE) !== 0) this.#w[T_BALLOON + V_WORK] = 1;
    const stats = this.queue(Q_STATS);
    if (stats !== null) {
      do {
        while (stats.popUsed(this.#vcpu) >= 0) this.#sendStats();
      } while (stats.enableInterrupts(this.#vcpu));
    }
  }

  /** Virtual time at which the balloon has work; Infinity when it has none. */
  nextDue(now: number): number {
    if (!this.ready || this.#w[T_BALLOON + V_WORK] === 0) return Number.POSITIVE_INFINITY;
    return Math.max(now, this.#f64[V_RETRY_F64]);
  }

  /** Works towards the size asked for, a batch at a time, until it is reached or `until` has passed. */
  work(until: number): void {
    const w = this.#w;
    if (!this.ready) return;
    while (
      w[T_BALLOON + V_WORK] !== 0 &&
      this.#vcpu.clock < until &&
      this.#f64[V_RETRY_F64] <= this.#vcpu.clock
    ) {
      if (!trySpinLock(w, H_BALLOON_MUTEX, this.#vcpu.id)) return;
      if (w[T_BALLOON + V_MISSED] !== 0) this.#handleInterrupt();
      w[T_BALLOON + V_WORK] = 0;
      this.hints.follow();
      const target = this.#guest.driver.readConfig32(BALLOON_CFG_NUM_PAGES);
      const diff = target - w[T_BALLOON + V_NR_PAGES];
      if (diff > 0) {
        const got = this.#fill(Math.min(diff, VIRTIO_BALLOON_ARRAY_PFNS_MAX));
        if (got < Math.min(diff, VIRTIO_BALLOON_ARRAY_PFNS_MAX)) {
          w[this.#events + EV.out_of_puff]++;
          this.#f64[V_RETRY_F64] = this.#vcpu.clock + RETRY_NS;
        }
        w[T_BALLOON + V_WORK] = got < diff ? 1 : 0;
      } else if (diff < 0) {
        const put = this.#leak(Math.min(-diff, VIRTIO_BALLOON_ARRAY_PFNS_MAX));
        w[T_BALLOON + V_WORK] = put < -diff ? 1 : 0;
      }
      if (diff !== 0) this.#guest.driver.writeConfig32(BALLOON_CFG_ACTUAL, w[T_BALLOON + V_NR_PAGES]);
      spinUnlock(w, H_BALLOON_MUTEX);
    }
  }

  // ── Inflate and deflate ──────────────────────────────────────────────────────────────────────────────────────────

  /** Takes up to `n` pages into the balloon; returns how many it got. Sent newest first, so PFNs descend in a buffer. */
  #fill(n: number): number {
    const w = this.#w;
    const taken: number[] = [];
    for (let i = 0; i < n; i++) {
      const pfn = this.#alloc.alloc(0, MIGRATE_MOVABLE, BALLOON_GFP);
      if (pfn < 0) break;
      taken.push(pfn);
    }
    if (taken.length === 0) return 0;
    taken.reverse();
    for (const pfn of taken) this.#putIn(pfn);
    w[T_BALLOON + V_NR_PAGES] += taken.length;
    w[this.#events + EV.balloon_inflate] += taken.length;
    this.#tellHost(Q_INFLATE, taken);
    return taken.length;
  }

  /** Gives up to `n` pages back: tells the host first and frees them only after it has answered. */
  #leak(n: number): number {
    const w = this.#w;
    const pages: number[] = [];
    while (pages.length < n && w[T_BALLOON + V_LIST] >= 0) {
      const pfn = w[T_BALLOON + V_LIST];
      this.#unlist(pfn);
      pages.push(pfn);
    }
    if (pages.length === 0) return 0;
    w[T_BALLOON + V_NR_PAGES] -= pages.length;
    w[this.#events + EV.balloon_deflate] += pages.length;
    this.#tellHost(Q_DEFLATE, pages);
    for (const pfn of pages) this.#release(pfn);
    return pages.length;
  }

  /** A page is the balloon's from here on: at the front of its list, offline, not counted. */
  #putIn(pfn: number): void {
    const w = this.#w;
    const page = this.#memmap + (pfn << 4);
    const first = w[T_BALLOON + V_LIST];
    w[page + P_FLAGS] = PG_OFFLINE;
    w[page + P_NEXT] = first;
    w[page + P_PREV] = -1;
    if (first >= 0) w[this.#memmap + (first << 4) + P_PREV] = pfn;
    w[T_BALLOON + V_LIST] = pfn;
    shadowMove(w, this.#shadow, this.#vcpu, pfn, 1, SHADOW_ALLOCATED, SHADOW_BALLOON);
    this.#adjustManaged(pfn, -1);
  }

  #unlist(pfn: number): void {
    const w = this.#w;
    const next = w[this.#memmap + (pfn << 4) + P_NEXT];
    const prev = w[this.#memmap + (pfn << 4) + P_PREV];
    if (prev >= 0) w[this.#memmap + (prev << 4) + P_NEXT] = next;
    else w[T_BALLOON + V_LIST] = next;
    if (next >= 0) w[this.#memmap + (next << 4) + P_PREV] = prev;
  }

  /** A page that the host has been told of is the guest's again. */
  #release(pfn: number): void {
    this.#w[this.#memmap + (pfn << 4) + P_FLAGS] = 0;
    shadowMove(this.#w, this.#shadow, this.#vcpu, pfn, 1, SHADOW_BALLOON, SHADOW_ALLOCATED);
    this.#adjustManaged(pfn, 1);
    this.#alloc.free(pfn, 0);
  }

  /**
   * Balloon compaction (`virtballoon_migratepage`): `to` takes the place of `from`, which somebody wants out of the way.
   * The host is told of the new page before it is told of the old. Each page is counted where it lies: the two may be in
   * different zones. False: the balloon is busy, or `from` has left it; `to` stays the caller's. No spin lock is held.
   */
  migrate(from: number, to: number): boolean {
    const w = this.#w;
    if (!this.ready || !trySpinLock(w, H_BALLOON_MUTEX, this.#vcpu.id)) return false;
    const isOurs = w[this.#shadow + from] === SHADOW_BALLOON;
    if (isOurs) {
      this.#putIn(to);
      this.#tellHost(Q_INFLATE, [to]);
      this.#unlist(from);
      this.#tellHost(Q_DEFLATE, [from]);
      this.#release(from);
      w[this.#events + EV.balloon_migrate]++;
      if (this.miscounts) {
        this.#adjustManaged(to, 1);
        this.#adjustManaged(from, -1);
      }
    }
    spinUnlock(w, H_BALLOON_MUTEX);
    return isOurs;
  }

  /** Without DEFLATE_ON_OOM, balloon pages no longer count as the guest's (`adjust_managed_page_count`). */
  #adjustManaged(pfn: number, delta: number): void {
    if (this.features.has(VIRTIO_BALLOON_F_DEFLATE_ON_OOM)) return;
    Atomics.add(this.#w, this.#zones[this.#w[this.#memmap + (pfn << 4) + P_ZONE]] + Z_MANAGED, delta);
  }

  /** Sends PFNs in one buffer and waits for the host's answer. */
  #tellHost(number: number, pfns: readonly number[]): void {
    const queue = this.queue(number);
    if (queue === null) return;
    const gpa = this.#w[T_BALLOON + V_PFN_PAGE] * 4096;
    this.#vcpu.window(gpa, pfns.length * 4, true);
    this.#vcpu.i32.set(pfns, this.#vcpu.at >> 2);
    queue.add(this.#vcpu, [{ gpa, length: pfns.length * 4 }], [], 0);
    this.#guest.submitAndWait(queue, this.deviceQueue(number));
  }

  /** The OOM notifier: releases one batch; returns pages freed. Any vCPU. */
  oomNotify(): number {
    if (!this.ready || !this.features.has(VIRTIO_BALLOON_F_DEFLATE_ON_OOM) || this.nrPages === 0) return 0;
    if (!this.lockForMemory()) return 0;
    // It may have been unbound while we waited for the mutex.
    let freed = 0;
    if (this.ready) {
      freed = this.#leak(VIRTIO_BALLOON_ARRAY_PFNS_MAX);
      this.#guest.driver.writeConfig32(BALLOON_CFG_ACTUAL, this.#w[T_BALLOON + V_NR_PAGES]);
      this.#w[this.#events + EV.oom_notifier]++;
    }
    this.unlock();
    return freed;
  }

  /** Takes the mutex for an allocation that needs memory; false if the allocation is the holder's own. */
  lockForMemory(): boolean {
    if (Atomics.load(this.#w, H_BALLOON_MUTEX) === this.#vcpu.id + 1) return false;
    spinLock(this.#w, H_BALLOON_MUTEX, this.#vcpu.id, this.#relax);
    return true;
  }
  unlock(): void {
    spinUnlock(this.#w, H_BALLOON_MUTEX);
  }

  // ── Statistics ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** Writes the figures into the stats page and hands it to the device. */
  #sendStats(): void {
    const queue = this.queue(Q_STATS);
    if (queue === null) return;
    const gpa = this.#w[T_BALLOON + V_STATS_PAGE] * 4096;
    const bytes = balloonStats(this.#arena, this.#zones);
    this.#vcpu.window(gpa, bytes.length, true);
    this.#vcpu.u8.set(bytes, this.#vcpu.at);
    queue.add(this.#vcpu, [{ gpa, length: bytes.length }], [], 0);
    this.#guest.submit(queue, this.deviceQueue(Q_STATS));
  }
}
