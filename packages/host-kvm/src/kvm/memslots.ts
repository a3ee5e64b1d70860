/**
 * Memory slots with the rules of `KVM_SET_USER_MEMORY_REGION` (Linux `virt/kvm/kvm_main.c`, `__kvm_set_memory_region`):
 * which requests are refused, and with which errno. Carrying a change out (zap, flush, MMIO generation) is the VM's.
 *
 * A slot maps guest frames onto a range of a memory file; the file takes the place of the user address (Y26, Y48).
 */
import * as machine from '@ebb/machine';
import { err, ok, type Result } from '@ebb/machine';
import type { MemFile } from '@ebb/memfs';

// Local copies: docs/performance.md § Constants.
const { PAGE_SIZE } = machine;

export const KVM_MEM_LOG_DIRTY_PAGES = 1;
export const KVM_MEM_READONLY = 2;
/** `KVM_USER_MEM_SLOTS` on x86: SHRT_MAX less the internal slots. */
export const KVM_USER_MEM_SLOTS = 32764;

/** The request: sizes and addresses in bytes; size 0 deletes. */
export interface UserMemoryRegion {
  readonly slot: number;
  readonly flags: number;
  readonly guestPhysAddr: number;
  readonly memorySize: number;
  readonly file: MemFile;
  /** Block of `file` that the first page maps. */
  readonly fileOffset: number;
}

export interface Memslot {
  readonly id: number;
  readonly baseGfn: number;
  readonly nrPages: number;
  readonly flags: number;
  readonly file: MemFile;
  readonly fileOffset: number;
  /** A slot being deleted resolves nothing, so faults retry until it is gone. */
  readonly invalid: boolean;
}

export type SlotError = 'EINVAL' | 'EEXIST';
export type SlotChange = {
  readonly kind: 'create' | 'flags' | 'move' | 'delete';
  readonly slot: Memslot;
  readonly old: Memslot | null;
};

export class Memslots {
  #slots: Memslot[] = [];
  /** Bumped by every change; a cached "this is MMIO" is stale when it moved. */
  generation = 0;
  /**
   * A slot that is gone, whose successor is about to come: a fault that finds no slot waits instead of being MMIO.
   * Written by the VM that resizes it.
   */
  replaced: Memslot | null = null;

  /** The slot that holds `gfn`, or null: an access there is MMIO. */
  find(gfn: number): Memslot | null {
    for (const slot of this.#slots) {
      if (gfn >= slot.baseGfn && gfn < slot.baseGfn + slot.nrPages) return slot;
    }
    return null;
  }

  /**
   * The slot as the VMM's own map has it, for devices and discards: it does not change while KVM's slot is invalid, nor
   * between the delete and the create of a resize.
   */
  findForVmm(gfn: number): Memslot | null {
    const slot = this.find(gfn);
    if (slot !== null || this.replaced === null) return slot;
    const { baseGfn, nrPages } = this.replaced;
    return gfn >= baseGfn && gfn < baseGfn + nrPages ? this.replaced : null;
  }

  get all(): readonly Memslot[] {
    return this.#slots;
  }

  /** Judges a request without carrying it out. `replacing`: as if the slot had been deleted before. */
  judge(region: UserMemoryRegion, replacing = false): Result<SlotChange, SlotError> {
    const { slot: id, flags, guestPhysAddr, memorySize } = region;
    const aligned = guestPhysAddr % PAGE_SIZE === 0 && memorySize % PAGE_SIZE === 0;
    if (!aligned || guestPhysAddr < 0 || memorySize < 0) return err('EINVAL');
    // Dirty logging is not modelled yet: a request for it is refused rather than ignored.
    if ((flags & ~KVM_MEM_READONLY) !== 0 || id < 0 || id >= KVM_USER_MEM_SLOTS) return err('EINVAL');
    const old = this.#slots.find((slot) => slot.id === id && !replacing) ?? null;
    if (memorySize === 0) {
      if (old === null) return err('EINVAL');
      return ok({ kind: 'delete', slot: { ...old, invalid: true }, old });
    }
    const nrPages = memorySize / PAGE_SIZE;
    const baseGfn = guestPhysAddr / PAGE_SIZE;
    if (region.fileOffset < 0 || region.fileOffset + nrPages > region.file.nrBlocks) return err('EINVAL');
    const slot: Memslot = {
      id,
      baseGfn,
      nrPages,
      flags,
      file: region.file,
      fileOffset: region.fileOffset,
      invalid: false,
    };
    let kind: SlotChange['kind'] = 'create';
    if (old !== null) {
      // A live slot keeps its size, its backing and its read-only bit; a resize is delete and create.
      const changed = (old.flags ^ flags) & KVM_MEM_READONLY;
      if (
        old.nrPages !== nrPages ||
        old.file !== region.file ||
        old.fileOffset !== region.fileOffset ||
        changed !== 0
      ) {
        return err('EINVAL');
      }
      kind = old.baseGfn === baseGfn ? 'flags' : 'move';
    }
    for (const other of this.#slots) {
      if (other.id !== id && baseGfn < other.baseGfn + other.nrPages && other.baseGfn < baseGfn + nrPages)
        return err('EEXIST');
    }
    return ok({ kind, slot, old });
  }

  /** Replaces the slot with the same id, adds it, or marks it invalid; bumps the generation. */
  install(slot: Memslot): void {
    this.#slots = [...this.#slots.filter((s) => s.id !== slot.id), slot].toSorted(
      (a, b) => a.baseGfn - b.baseGfn,
    );
    this.generation++;
  }

  remove(id: number): void {
    this.#slots = this.#slots.filter((s) => s.id !== id);
    this.generation++;
  }
}
