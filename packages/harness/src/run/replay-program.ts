/**
 * Replays one vCPU's share of a trace against the guest's own allocator (contract § Trace import and replay).
 *
 * Handles live in a table shared by the VM's vCPUs: per allocation the page it got and its stamp. Where events of one
 * allocation come from two CPUs, each waits for the one before it: it is put aside and tried again in the next slice.
 */
import * as guestKernel from '@ebb/guest-kernel';
import { type GuestKernel } from '@ebb/guest-kernel';
import * as machine from '@ebb/machine';
import * as replayPlan from '../trace/replay-plan.ts';
import { type ReplayPlan } from '../trace/replay-plan.ts';
import * as traceWords from '../trace/trace.ts';
import { idle, type Program } from './program.ts';

// Local copies: docs/performance.md § Constants.
const {
  GFP_WRITE,
  GFP_ZERO,
  MIGRATE_MOVABLE,
  P_FLAGS,
  P_NEXT,
  P_ORDER,
  PG_CACHED,
  PG_DIRTY,
  PG_UPTODATE,
  SHADOW_ALLOCATED,
} = guestKernel;
const { HUGE_PAGES, NS_PER_MS } = machine;
const {
  PLAN_ADD,
  PLAN_ALLOC,
  PLAN_DELETE,
  PLAN_DELETE_START,
  PLAN_DIRTY,
  PLAN_FREE,
  PLAN_FREE_START,
  PLAN_SHARED,
} = replayPlan;
const { TG_ATOMIC, TG_NORETRY, TG_NOWAIT, TG_NO_KSWAPD, TG_THISNODE, TG_WRITE, TG_ZERO, TG_ZONE_SHIFT } =
  traceWords;

/**
 * Words of a handle: page + 1 (0: not yet, −1: failed or gone, below: a huge page made of small ones, of which this is −2 −
 * the first; each links the next), stamp, next ordinal.
 */
const HANDLE_WORDS = 3;
const FAILED = -1;
const FIRST_SMALL = -2;
const CACHE_BATCH = 32;
/** How often, in events, interrupts and threads are looked at while events are dense. */
const THREADS_EVERY = 32;
/** gfp bits that the guest's allocator shares with the plan. */
const GFP_BITS: number = TG_ATOMIC | TG_NORETRY | TG_NOWAIT | TG_NO_KSWAPD | TG_THISNODE;
const NEVER_WAITS: number = TG_ATOMIC | TG_NOWAIT;

export function handleBytes(plan: ReplayPlan): number {
  return Math.max(1, plan.nrHandles) * HANDLE_WORDS * 4;
}

export class ReplayProgram implements Program {
  failure = '';
  /** Frees of pages that reclaim had freed already; allocations served by smaller pages. */
  readonly counters = { reclaimedFirst: 0, thpFallback: 0, deferred: 0 };
  readonly #kernel: GuestKernel;
  readonly #plan: ReplayPlan;
  readonly #handles: Int32Array;
  readonly #base: number;
  readonly #end: number;
  #next: number;
  #events = 0;
  #deferred: number[] = [];
  readonly #fill = new Int32Array(CACHE_BATCH);
  #fillCount = 0;

  /** `base`: absolute virtual time of the plan's time 0. */
  constructor(kernel: GuestKernel, plan: ReplayPlan, handles: SharedArrayBuffer, base: number) {
    this.#kernel = kernel;
    this.#plan = plan;
    this.#handles = new Int32Array(handles);
    this.#base = base;
    this.#next = plan.from[kernel.vcpu.id];
    this.#end = plan.from[kernel.vcpu.id + 1];
  }

  get ended(): boolean {
    return this.#next >= this.#end && this.#deferred.length === 0;
  }

  takeEvents(): number {
    const n = this.#events;
    this.#events = 0;
    return n;
  }

  nextDue(): number {
    if (this.#deferred.length > 0) return this.#kernel.vcpu.clock;
    return this.#next >= this.#end
      ? Number.POSITIVE_INFINITY
      : this.#base + this.#plan.timeNs[this.#plan.rows[this.#next]];
  }

  step(untilNs: number): void {
    const { vcpu } = this.#kernel;
    const { timeNs, rows } = this.#plan;
    this.#retryDeferred();
    let untilThreads = 0;
    while (this.#next < this.#end && this.failure === '') {
      const row = rows[this.#next];
      const at = this.#base + timeNs[row];
      if (at > untilNs) break;
      if (at > vcpu.clock + NS_PER_MS) {
        this.#flushFill();
        idle(this.#kernel, at);
        untilThreads = THREADS_EVERY;
      } else if (--untilThreads < 0) {
        this.#kernel.runDue(untilNs);
        untilThreads = THREADS_EVERY;
      }
      if (vcpu.clock < at) vcpu.clock = at;
      this.#next++;
      if (!this.#apply(row)) {
        this.counters.deferred++;
        this.#deferred.push(row);
      }
    }
    this.#flushFill();
    idle(this.#kernel, untilNs);
  }

  #retryDeferred(): void {
    if (this.#deferred.length === 0) return;
    const waiting = this.#deferred;
    this.#deferred = [];
    for (const row of waiting) if (!this.#apply(row)) this.#deferred.push(row);
  }

  /** Applies one event; false if one of its handle's earlier events, on another CPU, has not run yet. */
  #apply(row: number): boolean {
    const plan = this.#plan;
    const isShared = (plan.flags[row] & PLAN_SHARED) !== 0;
    const at = plan.handle[row] * HANDLE_WORDS;
    // Pairs with the store below on the other CPU: acquires the page and stamp it wrote.
    if (isShared && Atomics.load(this.#handles, at + 2) !== plan.ordinal[row]) return false;
    switch (plan.op[row]) {
      case PLAN_ALLOC:
        this.#alloc(row, at);
        break;
      case PLAN_FREE:
        this.#free(at);
        break;
      case PLAN_ADD:
        this.#add(row, at);
        break;
      case PLAN_DELETE:
        this.#delete(at);
        break;
      case PLAN_FREE_START:
        this.#freeStart(plan.handle[row], plan.order[row]);
        break;
      case PLAN_DELETE_START:
        this.#kernel.parts.cache.dropStartPage(plan.handle[row]);
        break;
    }
    if (isShared) Atomics.store(this.#handles, at + 2, plan.ordinal[row] + 1);
    this.#events++;
    return true;
  }

  #alloc(row: number, at: number): void {
    const plan = this.#plan;
    const { alloc } = this.#kernel.parts;
    const order = plan.order[row];
    const migratetype = plan.migratetype[row];
    const bits = plan.gfp[row];
    const gfp =
      (bits & GFP_BITS) |
      (bits >> TG_ZONE_SHIFT) |
      ((bits & TG_ZERO) === 0 ? 0 : GFP_ZERO) |
      ((bits & TG_WRITE) === 0 ? 0 : GFP_WRITE);
    let pfn = alloc.alloc(order, migratetype, gfp);
    if (pfn < 0 && order === 9) {
      this.#handles[at] = FIRST_SMALL - this.#allocSplit(gfp);
      return;
    }
    // The capture says this request succeeded: what does not wait there may wait here before it counts as failed.
    if (pfn < 0 && (gfp & (NEVER_WAITS | TG_NORETRY)) !== 0)
      pfn = alloc.alloc(order, migratetype, gfp & ~(NEVER_WAITS | TG_NORETRY | TG_NO_KSWAPD));
    if (pfn < 0) {
      this.#handles[at] = FAILED;
      this.failure = `allocation of order ${order} failed`;
      return;
    }
    this.#handles[at] = pfn + 1;
    this.#handles[at + 1] = alloc.stampOf(pfn);
  }

  /** A huge page that could not be had becomes 512 small ones, as Linux's fault handler falls back: the first, −1 without any. */
  #allocSplit(gfp: number): number {
    const { w, memmap } = this.#kernel.arena;
    this.counters.thpFallback++;
    let first = -1;
    for (let i = 0; i < HUGE_PAGES; i++) {
      const pfn = this.#kernel.parts.alloc.alloc(
        0,
        MIGRATE_MOVABLE,
        gfp & ~(NEVER_WAITS | TG_NORETRY | TG_NO_KSWAPD | TG_THISNODE),
      );
      if (pfn < 0) {
        this.failure = 'allocation of a huge page, and of small ones in its place, failed';
        break;
      }
      w[memmap + (pfn << 4) + P_NEXT] = first;
      first = pfn;
    }
    return first;
  }

  /** The page of a handle if its allocation is still alive, else −1. */
  #alive(at: number): number {
    const pfn = this.#handles[at] - 1;
    if (pfn < 0) return -1;
    const { w, shadow } = this.#kernel.arena;
    const ours =
      this.#kernel.parts.alloc.stampOf(pfn) === this.#handles[at + 1] && w[shadow + pfn] === SHADOW_ALLOCATED;
    return ours ? pfn : -1;
  }

  #free(at: number): void {
    const { alloc } = this.#kernel.parts;
    const { w, memmap } = this.#kernel.arena;
    if (this.#fillCount > 0) this.#flushFill();
    const handle = this.#handles[at];
    const pfn = this.#alive(at);
    this.#handles[at] = FAILED;
    if (handle <= FIRST_SMALL) {
      for (let small = FIRST_SMALL - handle; small >= 0; ) {
        const next = w[memmap + (small << 4) + P_NEXT];
        alloc.free(small, 0);
        small = next;
      }
      return;
    }
    if (pfn < 0) {
      this.counters.reclaimedFirst++;
      return;
    }
    // A page freed without a deletion event leaves the cache first.
    if ((w[memmap + (pfn << 4) + P_FLAGS] & PG_CACHED) !== 0)
      this.#kernel.parts.cache.remove(pfn, this.#handles[at + 1]);
    alloc.free(pfn, w[memmap + (pfn << 4) + P_ORDER]);
  }

  /** Attaches the page to the cache; without `__GFP_WRITE` it is read from the disk, in batches. */
  #add(row: number, at: number): void {
    const pfn = this.#alive(at);
    if (pfn < 0 || this.#plan.order[row] > 0) return;
    const { alloc, cache } = this.#kernel.parts;
    const dirty = (this.#plan.flags[row] & PLAN_DIRTY) !== 0;
    alloc.unstamp(pfn);
    // Held before others can find it: it is filled later.
    if (!dirty) alloc.get(pfn);
    if (!cache.add(pfn, this.#plan.file[row], this.#plan.index[row], dirty ? PG_DIRTY | PG_UPTODATE : 0)) {
      if (!dirty) alloc.put(pfn);
      return;
    }
    if (dirty) return;
    this.#fill[this.#fillCount++] = pfn;
    if (this.#fillCount === CACHE_BATCH) this.#flushFill();
  }

  #flushFill(): void {
    const n = this.#fillCount;
    if (n === 0) return;
    this.#fillCount = 0;
    const { alloc, cache } = this.#kernel.parts;
    cache.fill(this.#fill, n);
    for (let i = 0; i < n; i++) alloc.put(this.#fill[i]);
  }

  #delete(at: number): void {
    if (this.#fillCount > 0) this.#flushFill();
    const pfn = this.#alive(at);
    if (pfn < 0 || !this.#kernel.parts.cache.remove(pfn, this.#handles[at + 1]))
      this.counters.reclaimedFirst++;
  }

  #freeStart(pfn: number, order: number): void {
    const { alloc } = this.#kernel.parts;
    this.#kernel.parts.cache.dropStartPage(pfn);
    alloc.free(pfn, order);
  }
}
