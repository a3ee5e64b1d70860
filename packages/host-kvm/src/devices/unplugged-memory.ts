/**
 * What stands between a guest and the blocks of a memory device that are not plugged. The specification only forbids the
 * access (virtio 1.2 § 5.15.6), so it is a property of the device's profile (H10–H12, H32):
 *
 * | profile | reads of unplugged memory | writes |
 * | --- | --- | --- |
 * | `qemu` | memory, until the next discard | land, and vanish with the next discard |
 * | `inaccessible` | nothing there: all ones, counted; no slot where nothing is plugged (`region.ts`) | dropped, counted |
 * | `rfc-write-protect` | zeros; no frame is taken | dropped, counted |
 * | `scribble` | whatever the device likes | may land, and are overwritten |
 */
import { PAGE_SIZE, type Bitmap } from '@ebb/machine';
import type { RegionGate, Verdict } from '../kvm/region-gate.ts';

export const MEMORY_PROFILES = ['qemu', 'inaccessible', 'rfc-write-protect', 'scribble'] as const;
export type MemoryProfile = (typeof MEMORY_PROFILES)[number];

/** `vm.max_map_count` of Linux. */
const MAX_MAP_COUNT = 65530;

export interface Refusals {
  /** Accesses to unplugged memory that a profile refused. */
  refusedWrites: number;
  refusedReads: number;
  /** Reads that met a page of zeros. */
  zeroReads: number;
  /** Faults on plugged memory, which the verdict let through (H65). */
  letThrough: number;
  /** Requests that would have made more mappings than the VMM's address space may have. */
  mapCountRefusals: number;
}

export class UnpluggedMemory implements RegionGate {
  readonly baseGfn: number;
  readonly nrPages: number;
  readonly unitPages: number;
  readonly #profile: MemoryProfile;
  readonly #mprotect: boolean;
  readonly #maxMapCount: number;
  readonly #plugged: Bitmap;
  readonly #count: Refusals;

  /** `plugged` is the device's bitmap, one bit per block; `count` is counted in. Address and sizes are in bytes. */
  constructor(
    region: {
      readonly addr: number;
      readonly regionBytes: number;
      readonly blockBytes: number;
      readonly profile: MemoryProfile;
      readonly protection?: 'mprotect' | 'userfaultfd';
      readonly maxMapCount?: number;
    },
    plugged: Bitmap,
    count: Refusals,
  ) {
    this.#profile = region.profile;
    this.baseGfn = region.addr / PAGE_SIZE;
    this.nrPages = region.regionBytes / PAGE_SIZE;
    this.unitPages = this.#profile === 'qemu' ? this.nrPages : region.blockBytes / PAGE_SIZE;
    const enforces = this.#profile === 'rfc-write-protect' || this.#profile === 'inaccessible';
    this.#mprotect = enforces && region.protection === 'mprotect';
    this.#maxMapCount = region.maxMapCount ?? MAX_MAP_COUNT;
    this.#plugged = plugged;
    this.#count = count;
  }

  /** What an access to page `gfn` of the region meets. Asked at a violation and before a device touches memory. */
  verdict(gfn: number, write: boolean, touches: boolean): Verdict {
    if (this.#profile === 'qemu') return 'memory';
    const one = touches ? 1 : 0;
    if (this.#plugged.has(Math.floor((gfn - this.baseGfn) / this.unitPages))) {
      this.#count.letThrough += one;
      return 'memory';
    }
    if (this.#profile === 'scribble') return 'scribbled';
    if (write) {
      this.#count.refusedWrites += one;
      return 'nothing';
    }
    if (this.#profile === 'rfc-write-protect') {
      this.#count.zeroReads += one;
      return 'zeros';
    }
    this.#count.refusedReads += one;
    return 'nothing';
  }

  /**
   * Mappings that the VMM's address space has for the region. With `mprotect` each run of plugged and of unplugged blocks
   * is one of its own, so that holes make many (H14); with userfaultfd, or where nothing is enforced, it is one.
   */
  get vmas(): number {
    return this.#vmasIf(0, 0, false);
  }

  /** The same, if blocks `first … first + count − 1` were plugged or not. */
  #vmasIf(first: number, count: number, plugged: boolean): number {
    if (!this.#mprotect) return 1;
    let runs = 0;
    let last: boolean | null = null;
    for (let b = 0; b < this.#plugged.length; b++) {
      const is = b >= first && b < first + count ? plugged : this.#plugged.has(b);
      if (is !== last) runs++;
      last = is;
    }
    return runs;
  }

  /** Whether the address space can hold the mappings that a change of blocks leaves; else `mprotect` fails (H64). */
  fits(first: number, count: number, plugged: boolean): boolean {
    if (this.#vmasIf(first, count, plugged) <= this.#maxMapCount) return true;
    this.#count.mapCountRefusals++;
    return false;
  }
}
