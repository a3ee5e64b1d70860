/**
 * What a memory file asks of the technology that holds its blocks. One adapter per technology; this issue ships one,
 * anonymous host frames, in three page-size policies.
 */
import type { Hfn } from '@ebb/machine';

/** One frame, 64 KiB, 2 MiB, 1 GiB. */
export type FrameOrder = 0 | 4 | 9 | 18;

/** Where frames come from: the host's buddy allocator, the ledger and the zeroing behind one face. */
export interface FrameSource {
  /** Takes an aligned block of 2^order frames, owned by `owner` and zeroed. −1: none is free. */
  allocZeroed(order: FrameOrder, owner: number): number;
  /** Gives frames back. Their mappings must be gone and flushed. */
  free(first: Hfn, count: number): void;
}

/**
 * Transparent-huge-page policy of a file (Linux `transparent_hugepage/enabled`); or pages of one size: 2 MiB (`hugetlb`), 1 GiB
 * (`hugetlb-1g`, which a host has while its memory is not in pieces, Y53), or the 64 KiB of a host that has no smaller (`64k`,
 * as ppc64 and arm64 are configured). The guest's are 4 KiB all the same.
 */
export type HugePolicy = 'always' | 'madvise' | 'never' | 'hugetlb' | 'hugetlb-1g' | '64k';

/** Order of the smallest block that a file of this policy can have and give back. */
export function unitOrder(policy: HugePolicy): FrameOrder {
  return policy === 'hugetlb-1g' ? 18 : policy === 'hugetlb' ? 9 : policy === '64k' ? 4 : 0;
}

/** Told before a file's blocks go away, and after. KVM is one; sharers and pinned devices will be others. */
export interface InvalidationListener {
  /**
   * Removes every mapping of the given block runs and returns when no access through one can still happen. Runs are
   * `[first, count]` pairs in blocks of 4 KiB, ascending and disjoint; `nrRuns` pairs are valid.
   */
  begin(runs: Int32Array, nrRuns: number): Generator<unknown, void, void>;
  /** The blocks are unresolvable now: faults that waited may look again. */
  end(runs: Int32Array, nrRuns: number): void;
}
