/**
 * Where a vCPU's TLB keeps what, and how a checker looks into one. An entry is `[read tag, write tag, frame, generation]`; a
 * tag is page or block number and epoch in one word, −1 in an empty entry. The vCPU alone writes it (`vcpu.ts`).
 */

/** Tag: number in the low 23 bits (32 GiB of guest-physical space in pages), epoch above. Gfns beyond are never cached. */
export const EPOCH_SHIFT = 23;
/** Entries of the table for 2 MiB blocks: 2 GiB of reach. */
export const HUGE_TLB_ENTRIES = 1024;

/** Words of a kept TLB: epoch, the two cached tables with their frames' generations, then the 2 MiB table, then the 4 KiB table. */
export const TLB_EPOCH = 0;
/** 1 once the vCPU has looked at its requests since it entered guest mode: only then may it use the TLB. */
export const TLB_CHECKED = 1;
export const TLB_GIGA_TABLE = 2;
export const TLB_HUGE_TABLE = 4;
export const TLB_HUGE_BASE = 16;
export const TLB_BASE: number = TLB_HUGE_BASE + 4 * HUGE_TLB_ENTRIES;

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
  for (let at = TLB_HUGE_BASE; at < TLB_BASE; at += 4)
    if (
      tlb[at] >= 0 &&
      tlb[at] >> EPOCH_SHIFT === epoch &&
      (frame & ~511) === tlb[at + 2] &&
      tlb[at + 3] === block
    )
      return true;
  return false;
}
