/**
 * A host device that was assigned to the VM (VFIO): it reaches guest memory by itself, through IOMMU mappings made
 * beforehand. What is mapped is backed and pinned, all of it; so a balloon beside it must discard nothing, and whoever
 * takes memory away has to tell it first (Y19). Counterpart: `vfio_dma_map`, `RamDiscardListener` of QEMU.
 */
import { hfn } from '@ebb/machine';
import type { Vm } from '../kvm/vm.ts';
import type { FramePool } from '../mm/frame-pool.ts';
import type { PageHolder } from './memory-device.ts';

export interface AssignedDeviceCounters {
  mappedPages: number;
  unmappedPages: number;
  /** Words read by DMA, and accesses that the IOMMU refused. */
  reads: number;
  iommuFaults: number;
}

export class AssignedDevice implements PageHolder {
  readonly counters: AssignedDeviceCounters = { mappedPages: 0, unmappedPages: 0, reads: 0, iommuFaults: 0 };
  readonly #vm: Vm;
  readonly #pool: FramePool;
  /** Frame of each mapped guest page. */
  readonly #iommu = new Map<number, number>();

  constructor(vm: Vm, pool: FramePool) {
    this.#vm = vm;
    this.#pool = pool;
  }

  /** Pages mapped now. */
  get mapped(): number {
    return this.#iommu.size;
  }

  /** Maps guest pages, each backed and pinned. False: the host has no frame, or it is no RAM; then none is mapped. */
  map(gfn: number, count: number): boolean {
    for (let page = gfn; page < gfn + count; page++) {
      const slot = this.#vm.slots.findForVmm(page);
      const frame = slot === null ? -1 : slot.file.assign(slot.fileOffset + (page - slot.baseGfn), false);
      if (frame < 0) {
        this.unmap(gfn, page - gfn);
        return false;
      }
      if (this.#iommu.has(page)) continue;
      this.#pool.pin(hfn(frame));
      this.#iommu.set(page, frame);
      this.counters.mappedPages++;
    }
    return true;
  }

  /** Unmaps guest pages: their pins go, and DMA to them is refused from here on. It always lets go: true. */
  unmap(gfn: number, count: number): boolean {
    for (let page = gfn; page < gfn + count; page++) {
      const frame = this.#iommu.get(page);
      if (frame === undefined) continue;
      this.#iommu.delete(page);
      this.#pool.unpin(hfn(frame));
      this.counters.unmappedPages++;
    }
    return true;
  }

  /** Reads a word by DMA; undefined where the IOMMU refuses. The frame must be the VM's still. */
  read32(gfn: number, word: number): number | undefined {
    const frame = this.#iommu.get(gfn);
    if (frame === undefined) {
      this.counters.iommuFaults++;
      return undefined;
    }
    this.counters.reads++;
    this.#pool.deviceReaches(this.#vm.id, gfn, frame);
    return this.#pool.memory.i32[frame * 1024 + word];
  }

  /** Reads a word of every mapped page: what a busy device would do sooner or later. */
  readAll(): void {
    for (const gfn of this.#iommu.keys()) this.read32(gfn, 0);
  }
}
