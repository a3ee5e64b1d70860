/**
 * Extended page tables in the format of the Intel SDM (vol. 3C, § 29.3.2, tables 29-1 to 29-7), held in host frames.
 *
 * ```
 *  63  62            52 51                       12 11 10  9   8   7    6    5  3  2 1 0
 * [#VE|   ignored      |        frame number       | ign | D | A | PS |IPAT| MT | X W R ]
 * ```
 * An entry is two 32-bit words, low first. *Present* means R is set in the low word. Writers: install stores high then
 * low; zap exchanges low with 0, then clears high. Readers: low, high, low again, until both lows agree.
 */
import type { Gfn, Hfn } from './address.ts';

export const EPT_R: number = 1 << 0;
export const EPT_W: number = 1 << 1;
export const EPT_X: number = 1 << 2;
export const EPT_RWX = 7;
/** Memory type write-back in bits 3–5. */
export const EPT_WB: number = 6 << 3;
/** Large page (2 MiB at level 2, 1 GiB at level 3). */
export const EPT_PS: number = 1 << 7;
export const EPT_A: number = 1 << 8;
export const EPT_D: number = 1 << 9;

/** Levels as KVM counts them: 1 = 4 KiB leaf table … 4 = root. */
export const EPT_ROOT_LEVEL = 4;

// Local copies: docs/performance.md § Constants.
const R = EPT_R;
const PS = EPT_PS;

/** Index of `gfn` in the table of `level`. */
export function eptIndex(gfn: number, level: number): number {
  return (gfn >>> (9 * (level - 1))) & 511;
}

/** 4 KiB pages that one entry of `level` maps. */
export function pagesPerEntry(level: number): number {
  return 1 << (9 * (level - 1));
}

/** Low word of an entry that points at `frame`. */
export function eptLow(frame: number, flags: number): number {
  return ((frame & 0xfffff) << 12) | flags;
}
/** High word of an entry that points at `frame`. */
export function eptHigh(frame: number): number {
  return frame >>> 20;
}
/** Frame number held in an entry. */
export function eptFrame(low: number, high: number): number {
  return (low >>> 12) | ((high & 0xff) << 20);
}

/** Word index in DRAM of entry `index` of the table in `table`. */
export function entryWord(table: Hfn, index: number): number {
  return table * 1024 + index * 2;
}

/** What a walk found. Reused by its owner: a walk allocates nothing. */
export class WalkResult {
  /** Level of the leaf, or of the first entry that is not present. */
  level = 0;
  present = false;
  /** DRAM word index of that entry. */
  word = 0;
  /** Low word as read. */
  low = 0;
  /** Frame of the 4 KiB page asked for (leaf frame plus offset within a large leaf). */
  frame = 0;
  /** Tables visited. */
  steps = 0;
  /** The level-2 table passed through; 0 if the walk ended above. */
  level2Table = 0;
  /** The level-1 table whose entry was read; 0 if the walk ended above. */
  level1Table = 0;
}

/**
 * Walks the tables under `root` for `gfn`, as the hardware does. Atomic loads pair with the host's exchange and stores
 * in `TdpMmu`; a torn pair of words is read again. A walk may start at `fromLevel` in a table that a paging-structure
 * cache holds: `root` is that table then.
 */
export function eptWalk(
  dram: Int32Array,
  root: Hfn,
  gfn: Gfn,
  out: WalkResult,
  fromLevel: number = EPT_ROOT_LEVEL,
): void {
  let table: number = root;
  let steps = 0;
  for (let level = fromLevel; ; level--) {
    if (level === 2) out.level2Table = table;
    else if (level === 1) out.level1Table = table;
    const word = table * 1024 + ((gfn >>> (9 * (level - 1))) & 511) * 2;
    let low = Atomics.load(dram, word);
    let high = 0;
    while ((low & R) !== 0) {
      high = Atomics.load(dram, word + 1);
      const again = Atomics.load(dram, word);
      if (again === low) break;
      low = again;
    }
    steps++;
    const present = (low & R) !== 0;
    if (!present || level === 1 || (low & PS) !== 0) {
      out.level = level;
      out.present = present;
      out.word = word;
      out.low = low;
      out.steps = steps;
      out.frame = present ? eptFrame(low, high) + (gfn & ((1 << (9 * (level - 1))) - 1)) : -1;
      return;
    }
    table = eptFrame(low, high);
  }
}
