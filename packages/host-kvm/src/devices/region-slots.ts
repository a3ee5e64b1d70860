/**
 * Memory slots of a memory device's region that come with the first plugged block in them and go with the last: where
 * nothing is plugged, the VM has no memory at all (QEMU's `dynamic-memslots`, which goes with UNPLUGGED_INACCESSIBLE).
 * Inside a slot the device's verdict decides, block by block.
 */
import { PAGE_SIZE } from '@ebb/machine';
import type { MemFile } from '@ebb/memfs';
import type { TaskYield } from '../host-tasks.ts';
import type { Vm } from '../kvm/vm.ts';

/** Bytes of a slot, if blocks are no larger. QEMU's are 1 GiB at the least; regions here are smaller. */
const SLOT_BYTES = 0x800_0000;

export interface RegionSlotsOptions {
  readonly vm: Vm;
  /** Backs the region, from its block `fileOffset`; 0 without it. */
  readonly file: MemFile;
  readonly fileOffset?: number;
  /** Number of the first slot; the others follow. */
  readonly firstSlot: number;
  /** First page of the region, and how many it has. */
  readonly baseGfn: number;
  readonly nrPages: number;
  /** A power of two of pages; each slot has as many, but for the last. */
  readonly slotPages: number;
}

/** Pages of a slot for blocks of `blockBytes`. */
export function slotPagesFor(blockBytes: number): number {
  return Math.max(SLOT_BYTES, blockBytes) / PAGE_SIZE;
}

export class RegionSlots {
  readonly #o: RegionSlotsOptions;
  readonly #open = new Set<number>();

  constructor(options: RegionSlotsOptions) {
    this.#o = options;
  }

  /** Slots that are there. */
  get open(): number {
    return this.#open.size;
  }

  /** Numbers of the slots that hold any of the pages. */
  #over(gfn: number, count: number): number[] {
    const { baseGfn, slotPages } = this.#o;
    const first = Math.floor((gfn - baseGfn) / slotPages);
    const last = Math.floor((gfn + count - 1 - baseGfn) / slotPages);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  }

  #range(n: number): { readonly from: number; readonly to: number } {
    const { baseGfn, nrPages, slotPages } = this.#o;
    const from = baseGfn + n * slotPages;
    return { from, to: Math.min(from + slotPages, baseGfn + nrPages) };
  }

  *#set(n: number, bytes: number): Generator<TaskYield, void, void> {
    const { vm, file, firstSlot, baseGfn } = this.#o;
    const { from } = this.#range(n);
    yield* vm.setUserMemoryRegion({
      slot: firstSlot + n,
      flags: 0,
      guestPhysAddr: from * PAGE_SIZE,
      memorySize: bytes,
      file,
      fileOffset: (this.#o.fileOffset ?? 0) + from - baseGfn,
    });
  }

  /** Before pages are plugged: the slots that hold them are there. */
  *activate(gfn: number, count: number): Generator<TaskYield, void, void> {
    for (const n of this.#over(gfn, count)) {
      if (this.#open.has(n)) continue;
      const { from, to } = this.#range(n);
      yield* this.#set(n, (to - from) * PAGE_SIZE);
      this.#open.add(n);
    }
  }

  /** After pages were unplugged: slots that hold them go, if nothing is plugged in them any more. */
  *deactivate(
    gfn: number,
    count: number,
    anyPlugged: (gfn: number, count: number) => boolean,
  ): Generator<TaskYield, void, void> {
    for (const n of this.#over(gfn, count)) {
      const { from, to } = this.#range(n);
      if (!this.#open.has(n) || anyPlugged(from, to - from)) continue;
      yield* this.#set(n, 0);
      this.#open.delete(n);
    }
  }

  /** Discards what is in slots that are there: elsewhere there is nothing. Returns the pages freed. */
  *discard(gfn: number, count: number): Generator<TaskYield, number, void> {
    let freed = 0;
    for (const n of this.#over(gfn, count)) {
      if (!this.#open.has(n)) continue;
      const { from, to } = this.#range(n);
      const first = Math.max(gfn, from);
      freed += yield* this.#o.vm.discard(Int32Array.of(first, Math.min(gfn + count, to) - first), 1);
    }
    return freed;
  }
}
