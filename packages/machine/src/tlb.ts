/**
 * Where a vCPU's TLB keeps what, and how a checker looks into one. The vCPU alone writes it (`vcpu.ts`). Two kinds of
 * entries, as in hardware (SDM vol. 3C, § 29.4.2):
 *
 * | kind | words | void when |
 * | --- | --- | --- |
 * | guest-physical mapping | read tag, write tag, frame, generation; a tag is page or block number and epoch in one word | the host flushes |
 * | combined mapping, of a guest-virtual page | tag (address space and page), frame, generation, epoch and two bits, gfn | the host or the guest flushes |
 *
 * −1 as tag marks an empty entry.
 */

/** Tag: number in the low 23 bits (32 GiB of guest-physical space in pages), epoch above. Gfns beyond are never cached. */
export const EPOCH_SHIFT = 23;
/** Entries of the table for 2 MiB blocks: 2 GiB of reach. */
export const HUGE_TLB_ENTRIES = 1024;

/** Combined mappings: entries and words of each. */
export const COMBINED_ENTRIES = 256;
export const COMBINED_WORDS = 8;
/** Words of an entry. */
export const CM_TAG = 0;
export const CM_FRAME = 1;
export const CM_GENERATION = 2;
/** Epoch above two bits: stores may use it (guest and host agree, both D bits set); it lies in a large leaf, whose gate counts. */
export const CM_EPOCH = 3;
export const CM_WRITE = 1;
export const CM_LARGE = 2;
export const CM_EPOCH_SHIFT = 2;
/** For messages. */
export const CM_GFN = 4;

/**
 * Words of a kept TLB: epoch, the two cached tables with their frames' generations, then the 2 MiB table, then combined
 * mappings, then the 4 KiB table.
 */
export const TLB_EPOCH = 0;
/** 1 once the vCPU has looked at its requests since it entered guest mode: only then may it use the TLB. */
export const TLB_CHECKED = 1;
export const TLB_GIGA_TABLE = 2;
export const TLB_HUGE_TABLE = 4;
export const TLB_HUGE_BASE = 16;
export const TLB_COMBINED_BASE: number = TLB_HUGE_BASE + 4 * HUGE_TLB_ENTRIES;
export const TLB_BASE: number = TLB_COMBINED_BASE + COMBINED_ENTRIES * COMBINED_WORDS;

/** Bytes of a TLB of 2^bits entries that others may look into. */
export function tlbBytes(bits: number): number {
  return (TLB_BASE + (4 << bits)) * 4;
}

/** Whether the vCPU may use this TLB at once, without looking at its flush requests first. */
export function tlbInUse(tlb: Int32Array): boolean {
  return tlb[TLB_CHECKED] !== 0;
}

/**
 * Whether a kept TLB still reaches `frame`: as a page's or block's frame, or as a cached table. For checkers: at the moment
 * a frame loses its owner no TLB that is in use may reach it (I4).
 */
export function tlbReaches(tlb: Int32Array, frame: number, generation: Int32Array, frames: number): boolean {
  const epoch = tlb[TLB_EPOCH];
  const now = generation[frame];
  // A translation of an earlier life of the frame was somebody else's to flush, then.
  if (tlb[TLB_GIGA_TABLE] === frame && tlb[TLB_GIGA_TABLE + 1] === now) return true;
  if (tlb[TLB_HUGE_TABLE] === frame && tlb[TLB_HUGE_TABLE + 1] === now) return true;
  for (let at = TLB_BASE; at < tlb.length; at += 4)
    if (tlb[at + 2] === frame && tlb[at] >= 0 && tlb[at] >> EPOCH_SHIFT === epoch && tlb[at + 3] === now)
      return true;
  const block = generation[frames + (frame >>> 9)];
  for (let at = TLB_HUGE_BASE; at < TLB_COMBINED_BASE; at += 4)
    if (
      tlb[at] >= 0 &&
      tlb[at] >> EPOCH_SHIFT === epoch &&
      (frame & ~511) === tlb[at + 2] &&
      tlb[at + 3] === block
    )
      return true;
  for (let at = TLB_COMBINED_BASE; at < TLB_BASE; at += COMBINED_WORDS) {
    const bits = tlb[at + CM_EPOCH];
    if (
      tlb[at + CM_TAG] >= 0 &&
      bits >> CM_EPOCH_SHIFT === epoch &&
      tlb[at + CM_FRAME] === frame &&
      tlb[at + CM_GENERATION] === ((bits & CM_LARGE) === 0 ? now : block)
    )
      return true;
  }
  return false;
}

/** Whether a kept TLB has a combined mapping of the guest-physical page `gfn`. For checkers: of a page that is freed. */
export function combinedReaches(tlb: Int32Array, gfn: number): boolean {
  for (let at = TLB_COMBINED_BASE; at < TLB_BASE; at += COMBINED_WORDS)
    if (
      tlb[at + CM_TAG] >= 0 &&
      tlb[at + CM_GFN] === gfn &&
      tlb[at + CM_EPOCH] >> CM_EPOCH_SHIFT === tlb[TLB_EPOCH]
    )
      return true;
  return false;
}
