/**
 * A guest's own translation: x86-64 page tables in guest memory, walked through the EPT like any other guest access, and a
 * TLB of guest-virtual pages per vCPU (SDM Vol. 3A § 4.5, 4.10).
 *
 * The TLB is tagged by address space and page, and holds guest-physical pages; the host's translation of those is in the
 * vCPU's other TLB with its own rules. Hardware keeps one combined entry; both invalidations reach both here, so what a
 * guest can observe is the same. Nothing invalidates an entry but its guest (`flush`): a kernel that forgets to tell
 * another vCPU leaves it a stale page, as it would on hardware.
 *
 * Four levels, 4 KiB pages. Addresses are page numbers below 2²⁷ (512 GiB), so the top level has one entry.
 */
import type { Vcpu } from './vcpu.ts';

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

const TLB_ENTRIES = 256;
/** Words of an entry: tag, page, whether stores may use it. */
const ENTRY_WORDS = 4;
const ASID_SHIFT = 27;

export class GuestMmu {
  readonly #vcpu: Vcpu;
  readonly #tlb: Int32Array = new Int32Array(TLB_ENTRIES * ENTRY_WORDS).fill(-1);
  /** Translations that missed, and page faults. */
  misses = 0;

  constructor(vcpu: Vcpu) {
    this.#vcpu = vcpu;
  }

  /** Forgets every translation (a write to CR3, or an IPI that asks for it). */
  flush(): void {
    this.#tlb.fill(-1);
  }

  /**
   * The guest-physical page behind `vpn` of the address space `asid` (below 16) whose root table is page `root`; −1 is a
   * page fault: not present, or a store to a page that is read-only. Sets A, and D for a store.
   */
  translate(root: number, asid: number, vpn: number, write: boolean): number {
    const tag = (asid << ASID_SHIFT) | vpn;
    const at = (vpn & (TLB_ENTRIES - 1)) * ENTRY_WORDS;
    const tlb = this.#tlb;
    if (tlb[at] === tag && (!write || tlb[at + 2] === 1)) return tlb[at + 1];
    this.misses++;
    const pfn = this.#walk(root, vpn, write);
    if (pfn >= 0) {
      tlb[at] = tag;
      tlb[at + 1] = pfn;
      // Only a store has shown that the page is writable and its D bit set.
      tlb[at + 2] = write ? 1 : 0;
    }
    return pfn;
  }

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
