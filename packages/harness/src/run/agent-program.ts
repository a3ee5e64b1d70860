/**
 * A guest that sits idle and does what it is told: holds unmovable memory in given sub-blocks, fills its page cache, for
 * sessions that are driven from outside. Orders come through shared words; vCPU 0 carries them out at the start of its next slice.
 */
import {
  MIGRATE_MOVABLE,
  P_FLAGS,
  PG_CACHED,
  PG_UPTODATE,
  SHADOW_ALLOCATED,
  type GuestKernel,
} from '@ebb/guest-kernel';
import { HUGE_PAGES } from '@ebb/machine';
import { idle, type Program } from './program.ts';

/** Words: orders given (written outside), orders done (written by vCPU 0), number of sub-blocks, their first pages. */
const GIVEN = 0;
const DONE = 1;
const COUNT = 2;
/** Pages of cached files wanted. */
const CACHED = 3;
/** What becomes of the memory drivers: a `DRIVER_ORDERS` number, which the agent clears; and the block's first page. */
const DRIVER = 4;
const BLOCK = 5;
const LIST = 16;
const DRIVER_ORDERS = ['', 'rmmod', 'insmod', 'offline', 'online'] as const;
const MAX_PINS = 65536;
export const AGENT_BYTES: number = (LIST + MAX_PINS) * 4;

/** Orders that exactly the sub-blocks of 2 MiB at `pfns` hold unmovable memory, as far as they are the guest's. */
export function orderPins(words: Int32Array, pfns: readonly number[]): void {
  words[COUNT] = pfns.length;
  words.set(pfns, LIST);
  // Publishes the list. Pairs with the load in `step`.
  Atomics.add(words, GIVEN, 1);
}

/** Orders that `pages` pages of files are cached: movable memory in use. */
export function orderCache(words: Int32Array, pages: number): void {
  words[CACHED] = pages;
  Atomics.add(words, GIVEN, 1);
}

/** Orders what an administrator does: unloads or loads the drivers, or takes the memory block at `pfn` offline or online. */
export function orderDrivers(words: Int32Array, what: (typeof DRIVER_ORDERS)[number], pfn = 0): void {
  words[DRIVER] = DRIVER_ORDERS.indexOf(what);
  words[BLOCK] = pfn;
  Atomics.add(words, GIVEN, 1);
}

/** Whether the last order has been carried out. */
export function ordersDone(words: Int32Array): boolean {
  return Atomics.load(words, DONE) === Atomics.load(words, GIVEN);
}

export class AgentProgram implements Program {
  readonly failure = '';
  readonly #kernel: GuestKernel;
  readonly #words: Int32Array;
  /** Page held in each sub-block, by the sub-block's first page. */
  readonly #pins = new Map<number, number>();
  #cached = 0;
  /** Pins of its own that are to come, soonest first. */
  #planned: readonly (readonly [atNs: number, pfns: readonly number[]])[];

  constructor(
    kernel: GuestKernel,
    words: SharedArrayBuffer,
    planned: readonly (readonly [atNs: number, pfns: readonly number[]])[],
  ) {
    this.#kernel = kernel;
    this.#planned = kernel.vcpu.id === 0 ? planned : [];
    this.#words = new Int32Array(words);
  }

  get ended(): boolean {
    return this.#planned.length === 0;
  }
  nextDue(): number {
    return this.#planned[0]?.[0] ?? Number.POSITIVE_INFINITY;
  }
  takeEvents(): number {
    return 0;
  }

  step(untilNs: number): void {
    const given = Atomics.load(this.#words, GIVEN);
    if (this.#kernel.vcpu.id === 0 && given !== this.#words[DONE]) {
      this.#pin(new Set(this.#words.subarray(LIST, LIST + this.#words[COUNT])));
      this.#cache(this.#words[CACHED]);
      this.#drivers(DRIVER_ORDERS[this.#words[DRIVER]], this.#words[BLOCK]);
      this.#words[DRIVER] = 0;
      Atomics.store(this.#words, DONE, given);
    }
    const [next] = this.#planned;
    if (next !== undefined && next[0] <= this.#kernel.vcpu.clock) {
      this.#planned = this.#planned.slice(1);
      this.#pin(new Set(next[1]));
    }
    idle(this.#kernel, untilNs);
  }

  #pin(wanted: ReadonlySet<number>): void {
    const { alloc } = this.#kernel.parts;
    for (const [block, pfn] of this.#pins) {
      if (wanted.has(block)) continue;
      alloc.free(pfn, 0);
      this.#pins.delete(block);
    }
    for (const block of wanted) {
      if (this.#pins.has(block) || this.#holdsUnmovable(block)) continue;
      for (let pfn = block; pfn < block + HUGE_PAGES; pfn++) {
        if (!alloc.allocExactly(pfn)) continue;
        this.#pins.set(block, pfn);
        break;
      }
    }
  }

  #drivers(what: (typeof DRIVER_ORDERS)[number], pfn: number): void {
    for (const driver of this.#kernel.parts.mem) {
      if (what === 'rmmod') driver.remove();
      if (what === 'insmod') driver.reload();
      if (what === 'offline' || what === 'online') driver.setBlockOnline(pfn, what === 'online');
    }
  }

  /** Pages of one file, clean and up to date, as if they had been read. */
  #cache(wanted: number): void {
    const { alloc, cache } = this.#kernel.parts;
    for (; this.#cached < wanted; this.#cached++) {
      const pfn = alloc.alloc(0, MIGRATE_MOVABLE, 3);
      if (pfn < 0) return;
      alloc.unstamp(pfn);
      cache.add(pfn, 1, this.#cached, PG_UPTODATE);
    }
  }

  /** Something of the kernel's sits there already. */
  #holdsUnmovable(block: number): boolean {
    const { w, memmap, shadow } = this.#kernel.arena;
    for (let pfn = block; pfn < block + HUGE_PAGES; pfn++) {
      const flags = w[memmap + (pfn << 4) + P_FLAGS];
      if (w[shadow + pfn] === SHADOW_ALLOCATED && (flags & PG_CACHED) === 0) return true;
    }
    return false;
  }
}
