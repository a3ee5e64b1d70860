/**
 * A guest's own translation: x86-64 page tables in guest memory, walked through the EPT like any other guest access, and
 * accesses by guest-virtual address (SDM vol. 3A, § 4.5, 4.10; vol. 3C, § 29.4).
 *
 * The TLB keeps combined mappings, as hardware does: from a page of an address space straight to the host's frame, tagged
 * with address space, page and the epoch of the EPT. The host's flush voids it by epoch, the guest's by `flush`; either is
 * enough. Nothing else does: a kernel that forgets to tell another vCPU leaves it a stale page, and a host that forgets is
 * met by the ledger's gate at each access.
 *
 * Four levels, 4 KiB pages. Addresses are page numbers below 2²⁷ (512 GiB), so the top level has one entry.
 */
import { gfn } from './address.ts';
import * as tlb from './tlb.ts';
import type { Vcpu } from './vcpu.ts';

// Local copies: docs/performance.md § Constants.
const { COMBINED_ENTRIES } = tlb;

export const PTE_P = 1;
export const PTE_W = 2;
export const PTE_U = 4;
export const PTE_A = 0x20;
export const PTE_D = 0x40;
/** Not present, but not empty: the page is being moved (software's; the hardware sees a page fault). */
export const PTE_MIGRATION = 0x200;

export const PT_LEVELS = 4;

/** Low and high word of an entry for page `pfn`. */
export function pteLow(pfn: number, flags: number): number {
  return (pfn << 12) | flags;
}
export function pteHigh(pfn: number): number {
  return pfn >>> 20;
}
export function ptePfn(low: number, high: number): number {
  return ((high & 0xfff) << 20) | (low >>> 12);
}

/** Index of `vpn`'s entry in a table of `level` (4: the root). */
export function ptIndex(vpn: number, level: number): number {
  return Math.floor(vpn / 2 ** (9 * (level - 1))) & 511;
}

const ASID_SHIFT = 27;
/** Instead of a frame. */
const PAGE_FAULT = -2;

export class GuestMmu {
  readonly #vcpu: Vcpu;
  /** Translations that missed, and page faults. */
  misses = 0;
  /** What the last load found. */
  value = 0;

  constructor(vcpu: Vcpu) {
    this.#vcpu = vcpu;
  }

  /** Forgets every translation (a write to CR3, or an IPI that asks for it). */
  flush(): void {
    this.#vcpu.dropCombined();
  }

  /**
   * Loads word `word` of page `vpn` of the address space `asid` (below 16) whose root table is page `root`, into `value`.
   * False is a page fault: not present. Sets A.
   */
  load32(root: number, asid: number, vpn: number, word: number): boolean {
    const frame = this.#frame(root, asid, vpn, false);
    if (frame === PAGE_FAULT) return false;
    this.value = frame < 0 ? this.#absent() : this.#vcpu.loadFrame(frame, word);
    return true;
  }

  /** Stores a word, as `load32` loads one. False is a page fault: not present, or read-only. Sets A and D. */
  store32(root: number, asid: number, vpn: number, word: number, value: number): boolean {
    const frame = this.#frame(root, asid, vpn, true);
    if (frame === PAGE_FAULT) return false;
    if (frame < 0) this.#absent();
    else this.#vcpu.storeFrame(frame, word, value);
    return true;
  }

  /** No RAM behind a page that the guest has mapped: what the host answered. */
  #absent(): number {
    this.#vcpu.counters.unmappedAccesses++;
    return this.#vcpu.exitData;
  }

  /** The frame behind a page, valid in the section that runs; −1 is not RAM. */
  #frame(root: number, asid: number, vpn: number, write: boolean): number {
    const tag = (asid << ASID_SHIFT) | vpn;
    const slot = vpn & (COMBINED_ENTRIES - 1);
    const hit = this.#vcpu.combinedFrame(slot, tag, write);
    if (hit >= 0) return hit;
    this.misses++;
    const pfn = this.#walk(root, vpn, write);
    return pfn < 0 ? PAGE_FAULT : this.#vcpu.combine(slot, tag, gfn(pfn), write);
  }

  /** The guest-physical page by the guest's tables; −1 is a page fault. */
  #walk(root: number, vpn: number, write: boolean): number {
    const vcpu = this.#vcpu;
    let table = root;
    for (let level = PT_LEVELS; level > 1; level--) {
      if (!vcpu.window(table * 4096 + ptIndex(vpn, level) * 8, 8, false)) return -1;
      const word = vcpu.at >> 2;
      const low = Atomics.load(vcpu.i32, word);
      if ((low & PTE_P) === 0) return -1;
      table = ptePfn(low, Atomics.load(vcpu.i32, word + 1));
    }
    for (;;) {
      // With A and D in the leaf a walk is a write to the guest's table.
      if (!vcpu.window(table * 4096 + ptIndex(vpn, 1) * 8, 8, true)) return -1;
      const { i32 } = vcpu;
      const word = vcpu.at >> 2;
      const low = Atomics.load(i32, word);
      const high = Atomics.load(i32, word + 1);
      if ((low & PTE_P) === 0 || (write && (low & PTE_W) === 0)) return -1;
      const set = low | PTE_A | (write ? PTE_D : 0);
      // By compare-exchange, so that an entry that is taken away meanwhile is not revived.
      if (Atomics.compareExchange(i32, word, low, set) === low) return ptePfn(low, high);
    }
  }
}
