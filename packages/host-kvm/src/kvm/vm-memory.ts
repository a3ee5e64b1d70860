/**
 * A VM's RAM as its devices see it: guest-physical address → slot → file block → frame, never through anybody's page
 * tables. Each window passes the ledger's gate. A first touch by a device assigns the block, as a guest's would.
 *
 * Windows are valid until the calling task yields: only host tasks take memory away, and none runs in between.
 */
import * as machine from '@ebb/machine';
import { chunkOffset, type DeviceMemory, type HostMemory, type Schedule } from '@ebb/machine';
import type { FramePool } from '../mm/frame-pool.ts';
import * as memslots from './memslots.ts';
import { type Memslot, type Memslots } from './memslots.ts';
import { gateOf, type RegionGate } from './region-gate.ts';
import * as tdpMmu from './tdp-mmu.ts';

// Local copies: docs/performance.md § Constants.
const { CHUNK_FRAME_SHIFT, PAGE_SIZE } = machine;
const { KVM_MEM_READONLY } = memslots;
const { FRAME_DIRTY } = tdpMmu;

export class VmMemory implements DeviceMemory {
  u8: Uint8Array;
  u16: Uint16Array;
  i32: Int32Array;
  at = 0;
  section = 0;
  from = 0;
  to = 0;
  readonly #vm: number;
  readonly #memory: HostMemory;
  readonly #pool: FramePool;
  readonly #slots: Memslots;
  readonly #frameFlags: Uint8Array;
  readonly #schedule: Schedule;
  readonly #gates: readonly RegionGate[];

  /** `gates`: those of the VM, whose devices decide what an access to their regions meets. */
  constructor(
    vm: number,
    pool: FramePool,
    slots: Memslots,
    schedule: Schedule,
    gates: readonly RegionGate[],
  ) {
    this.#gates = gates;
    this.#vm = vm;
    this.#schedule = schedule;
    this.#memory = pool.memory;
    this.#pool = pool;
    this.#slots = slots;
    this.#frameFlags = pool.frameFlags;
    this.u8 = this.#memory.u8[0];
    this.u16 = this.#memory.u16[0];
    this.i32 = this.#memory.i32Chunks[0];
  }

  contains(gpa: number, length: number, write: boolean): boolean {
    return this.#slotOf(gpa, length, write, false) !== null;
  }

  /** The slot behind the bytes; null if they are not for a device. */
  #slotOf(gpa: number, length: number, write: boolean, touches: boolean): Memslot | null {
    const gfn = Math.floor(gpa / PAGE_SIZE);
    if (length < 0 || gpa - gfn * PAGE_SIZE + length > PAGE_SIZE) return null;
    const slot = this.#slots.findForVmm(gfn);
    if (slot === null || (write && (slot.flags & KVM_MEM_READONLY) !== 0)) return null;
    // Unplugged memory is not for DMA, whatever a CPU may read there (§ 5.15.6).
    const verdict = gateOf(this.#gates, gfn)?.verdict(gfn, write, touches);
    return verdict === 'zeros' || verdict === 'nothing' ? null : slot;
  }

  /** The slot, as far as no gate begins, or the pages that share the verdict of their gate. */
  extent(gpa: number): boolean {
    const gfn = Math.floor(gpa / PAGE_SIZE);
    const slot = this.#slotOf(gpa, 1, true, false);
    if (slot === null) return false;
    let from = slot.baseGfn;
    let to = from + slot.nrPages;
    for (const gate of this.#gates) {
      if (gfn < gate.baseGfn) to = Math.min(to, gate.baseGfn);
      else if (gfn >= gate.baseGfn + gate.nrPages) from = Math.max(from, gate.baseGfn + gate.nrPages);
      else {
        const unit = gfn - ((gfn - gate.baseGfn) % gate.unitPages);
        from = Math.max(from, unit);
        to = Math.min(to, unit + gate.unitPages, gate.baseGfn + gate.nrPages);
      }
    }
    this.from = from * PAGE_SIZE;
    this.to = to * PAGE_SIZE;
    return true;
  }

  window(gpa: number, length: number, write: boolean): boolean {
    const slot = this.#slotOf(gpa, length, write, true);
    if (slot === null) return false;
    const gfn = Math.floor(gpa / PAGE_SIZE);
    const offset = gpa - gfn * PAGE_SIZE;
    const frame = slot.file.assign(slot.fileOffset + (gfn - slot.baseGfn), false);
    if (frame < 0) return false;
    this.#pool.deviceReaches(this.#vm, gfn, frame);
    if (this.#schedule.controlled) this.#schedule.point('device-access', gfn);
    // The EPT's D bit knows nothing of device writes.
    if (write) this.#frameFlags[frame] |= FRAME_DIRTY;
    const chunk = frame >>> CHUNK_FRAME_SHIFT;
    this.u8 = this.#memory.u8[chunk];
    this.u16 = this.#memory.u16[chunk];
    this.i32 = this.#memory.i32Chunks[chunk];
    this.at = chunkOffset(frame) + offset;
    return true;
  }
}
