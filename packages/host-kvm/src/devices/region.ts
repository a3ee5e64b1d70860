/**
 * The platform's end of a memory device's region: in a slot that is always there, or in slots that come with the first
 * plugged block in them and go with the last. With those, the VM has no memory at all where nothing is plugged (QEMU's
 * `dynamic-memslots`, which goes with UNPLUGGED_INACCESSIBLE); inside a slot the device's verdict decides, block by block.
 */
import { assert, PAGE_SIZE } from '@ebb/machine';
import type { MemFile } from '@ebb/memfs';
import type { TaskYield } from '../host-tasks.ts';
import type { Vm } from '../kvm/vm.ts';

/** Pages of a region's backing go and come. Counts are 4 KiB pages from a guest frame number. */
export interface RegionPort {
  /** Largest page of the backing in bytes: a block is at least that (H40). */
  readonly pageBytes: number;
  /** Gives pages back: zapped, flushed and free when it returns. Returns the pages freed. */
  discard(gfn: number, count: number): Generator<TaskYield, number, void>;
  /** Drops every mapping of the pages, so that the next access asks `UnpluggedMemory.verdict` again. */
  unmap(gfn: number, count: number): Generator<TaskYield, void, void>;
  /** Before pages are plugged: what the VM needs to reach them. */
  activate?(gfn: number, count: number): Generator<TaskYield, void, void>;
  /** After pages were unplugged: what of it is needed no more. `anyPlugged`: whether one of some pages is. */
  deactivate?(
    gfn: number,
    count: number,
    anyPlugged: (gfn: number, count: number) => boolean,
  ): Generator<TaskYield, void, void>;
}

/** A region whose slot is always there, in a backing of `pageBytes`. */
export function wholeRegion(vm: Vm, pageBytes: number): RegionPort {
  return {
    pageBytes,
    discard: (gfn, count) => vm.discard(Int32Array.of(gfn, count), 1),
    unmap: (gfn, count) => vm.unmap(gfn, count),
  };
}

/** Bytes of a slot, if blocks are no larger. QEMU's are 1 GiB at the least; regions here are smaller. */
const SLOT_BYTES = 0x800_0000;

/** Pages of a slot for blocks of `blockBytes`. */
export function slotPagesFor(blockBytes: number): number {
  return Math.max(SLOT_BYTES, blockBytes) / PAGE_SIZE;
}

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
  /** A power of two, and whole blocks; each slot has as many, but for the last. */
  readonly slotPages: number;
}

/** A region whose slots come and go. Nobody else may put a slot where it lies. */
export class RegionSlots implements RegionPort {
  readonly pageBytes: number;
  readonly #o: RegionSlotsOptions;

  constructor(options: RegionSlotsOptions) {
    this.pageBytes = options.file.granularity * PAGE_SIZE;
    this.#o = options;
  }

  /** Numbers of the slots that hold any of the pages, from 0. */
  #over(gfn: number, count: number): number[] {
    const { baseGfn, slotPages } = this.#o;
    const first = Math.floor((gfn - baseGfn) / slotPages);
    const last = Math.floor((gfn + count - 1 - baseGfn) / slotPages);
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  }

  #isThere(n: number): boolean {
    const { vm, firstSlot } = this.#o;
    return vm.slots.all.some((slot) => slot.id === firstSlot + n);
  }

  /** Pages of slot `n`: half-open. */
  #range(n: number): { readonly from: number; readonly to: number } {
    const { baseGfn, nrPages, slotPages } = this.#o;
    const from = baseGfn + n * slotPages;
    return { from, to: Math.min(from + slotPages, baseGfn + nrPages) };
  }

  /** Gives slot `n` a size in pages; 0 deletes it. */
  *#set(n: number, pages: number): Generator<TaskYield, void, void> {
    const { vm, file, fileOffset = 0, firstSlot, baseGfn } = this.#o;
    const { from } = this.#range(n);
    const done = yield* vm.setUserMemoryRegion({
      slot: firstSlot + n,
      flags: 0,
      guestPhysAddr: from * PAGE_SIZE,
      memorySize: pages * PAGE_SIZE,
      file,
      fileOffset: fileOffset + from - baseGfn,
    });
    assert(done.ok, 'nobody else has a slot in the region');
  }

  *activate(gfn: number, count: number): Generator<TaskYield, void, void> {
    for (const n of this.#over(gfn, count)) {
      const { from, to } = this.#range(n);
      if (!this.#isThere(n)) yield* this.#set(n, to - from);
    }
  }

  *deactivate(
    gfn: number,
    count: number,
    anyPlugged: (gfn: number, count: number) => boolean,
  ): Generator<TaskYield, void, void> {
    for (const n of this.#over(gfn, count)) {
      const { from, to } = this.#range(n);
      if (this.#isThere(n) && !anyPlugged(from, to - from)) yield* this.#set(n, 0);
    }
  }

  /** Where no slot is there is nothing to give back. */
  *discard(gfn: number, count: number): Generator<TaskYield, number, void> {
    let freed = 0;
    for (const n of this.#over(gfn, count)) {
      if (!this.#isThere(n)) continue;
      const { from, to } = this.#range(n);
      const first = Math.max(gfn, from);
      freed += yield* this.#o.vm.discard(Int32Array.of(first, Math.min(gfn + count, to) - first), 1);
    }
    return freed;
  }

  unmap(gfn: number, count: number): Generator<TaskYield, void, void> {
    return this.#o.vm.unmap(gfn, count);
  }
}
