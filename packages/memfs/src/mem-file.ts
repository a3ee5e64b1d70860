/**
 * A memory file: an inode whose blocks are host frames. `bmap(offset)` is its whole point (Y26): KVM resolves a guest
 * page by (file, offset) instead of walking anyone's page tables.
 *
 * Models `fallocate`, `PUNCH_HOLE | KEEP_SIZE`, the block map, first-touch assignment with a huge-page policy, and
 * notification before a block goes away. Leaves out names, seals, leases, sharing and other technologies: their own
 * issue. Offsets and counts are in blocks of 4 KiB; a hole is −1.
 */
import * as machine from '@ebb/machine';
import { assert, err, hfn, ok, ownerOf, type Result } from '@ebb/machine';
import {
  unitOrder,
  type FrameOrder,
  type FrameSource,
  type HugePolicy,
  type InvalidationListener,
} from './backing.ts';

// Local copies: docs/performance.md § Constants.
const { GIGA_PAGES, HUGE_PAGES, USE_RAM } = machine;

export interface MemFileOptions {
  readonly name: string;
  /** Size in 4 KiB blocks. */
  readonly nrBlocks: number;
  /** VM that pays for the frames. */
  readonly vm: number;
  readonly frames: FrameSource;
  readonly huge: HugePolicy;
  /** For `madvise`: whether the file asked for huge pages. */
  readonly hugeAdvised?: boolean;
}

export class MemFile {
  readonly name: string;
  readonly nrBlocks: number;
  readonly vm: number;
  readonly huge: HugePolicy;
  /** Whether a first touch takes 2 MiB where it may. */
  readonly wantsHuge: boolean;
  /** Frame of each block, −1 for a hole. */
  readonly blocks: Int32Array;
  /** Blocks that have a frame (`st_blocks`). */
  assigned = 0;
  readonly #frames: FrameSource;
  readonly #listeners = new Set<InvalidationListener>();
  /** Punches under way: mappers have been told that blocks go, which are still there. */
  #punches = 0;
  readonly #owner: number;

  constructor(options: MemFileOptions) {
    this.name = options.name;
    this.nrBlocks = options.nrBlocks;
    this.vm = options.vm;
    this.huge = options.huge;
    this.blocks = new Int32Array(options.nrBlocks).fill(-1);
    this.#frames = options.frames;
    this.#owner = ownerOf(options.vm, USE_RAM);
    this.wantsHuge =
      options.huge === 'always' ||
      options.huge === 'hugetlb' ||
      options.huge === 'hugetlb-1g' ||
      (options.huge === 'madvise' && options.hugeAdvised === true);
  }

  /** 4 KiB pages of the smallest unit to be had and given back: `hugetlb` 512, `hugetlb-1g` 2¹⁸, `64k` 16, else 1. */
  get granularity(): number {
    return 1 << unitOrder(this.huge);
  }

  /** Registers a mapper once; a second registration has no effect. */
  addListener(listener: InvalidationListener): void {
    this.#listeners.add(listener);
  }

  /** Forgets a mapper that maps no block any more. */
  removeListener(listener: InvalidationListener): void {
    this.#listeners.delete(listener);
  }

  /** Whether blocks are being taken away. Who maps any now, and was not told, would keep what is about to be freed. */
  get punching(): boolean {
    return this.#punches > 0;
  }

  /** Frame of block `index`, −1 for a hole. No effect. */
  bmap(index: number): number {
    return this.blocks[index];
  }

  /**
   * Makes sure block `index` has a zeroed frame and returns it, or −1 when no frame is free (of pages of one size: no such
   * page). A first touch takes 2 MiB where `allowHuge` (the mapper can map it), the policy, the alignment and the
   * host's free memory permit. No yield: a leaf of the fault path.
   */
  assign(index: number, allowHuge: boolean): number {
    const have = this.blocks[index];
    if (have >= 0) return have;
    const unit = unitOrder(this.huge);
    if (unit > 0) return this.#assignBlock(index, unit);
    if (this.wantsHuge && allowHuge) {
      const frame = this.#assignBlock(index, 9);
      if (frame >= 0) return frame;
    }
    const frame = this.#frames.allocZeroed(0, this.#owner);
    if (frame < 0) return -1;
    this.blocks[index] = frame;
    this.assigned++;
    return frame;
  }

  /** Gives the aligned block of 2^order pages around `index` frames in one run; −1 if it is no hole, or there is none. */
  #assignBlock(index: number, order: FrameOrder): number {
    const count = 1 << order;
    const base = index - (index % count);
    if (base + count > this.nrBlocks || !this.#isHole(base, count)) return -1;
    const first = this.#frames.allocZeroed(order, this.#owner);
    if (first < 0) return -1;
    for (let i = 0; i < count; i++) this.blocks[base + i] = first + i;
    this.assigned += count;
    return first + (index - base);
  }

  /** True if the 512 blocks from `base` lie in one aligned run of frames, so that a 2 MiB leaf may map them. */
  isHuge(base: number): boolean {
    if (!this.wantsHuge) return false;
    const first = this.blocks[base];
    if (first < 0 || first % HUGE_PAGES !== 0 || base + HUGE_PAGES > this.nrBlocks) return false;
    for (let i = 1; i < HUGE_PAGES; i++) if (this.blocks[base + i] !== first + i) return false;
    return true;
  }

  /** True if the 2¹⁸ blocks from `base` are one page, so that a 1 GiB leaf may map them. */
  isGiga(base: number): boolean {
    return this.huge === 'hugetlb-1g' && base % GIGA_PAGES === 0 && this.blocks[base] >= 0;
  }

  #isHole(base: number, count: number): boolean {
    for (let i = 0; i < count; i++) if (this.blocks[base + i] >= 0) return false;
    return true;
  }

  /** `fallocate(first, count)`: gives every hole in the range a frame. ENOSPC leaves what was allocated (Linux does). */
  fallocate(first: number, count: number): Result<number, 'EINVAL' | 'ENOSPC'> {
    if (first < 0 || count <= 0 || first + count > this.nrBlocks) return err('EINVAL');
    let added = 0;
    for (let i = first; i < first + count; i++) {
      if (this.blocks[i] >= 0) continue;
      const before = this.assigned;
      if (this.assign(i, i % HUGE_PAGES === 0 && i + HUGE_PAGES <= first + count) < 0) return err('ENOSPC');
      added += this.assigned - before;
    }
    return ok(added);
  }

  /**
   * `fallocate(PUNCH_HOLE | KEEP_SIZE)` over several runs at once. The order is I4: listeners zap and flush; the blocks
   * become holes; waiting faults are let go; only then are the frames free. Runs outside the file, and parts of a run
   * that are not whole units of `granularity`, are an error and change nothing. Returns the blocks freed.
   */
  *punchHoles(runs: Int32Array, nrRuns: number): Generator<unknown, Result<number, 'EINVAL'>, void> {
    for (let r = 0; r < nrRuns; r++) {
      const first = runs[2 * r];
      const count = runs[2 * r + 1];
      if (first < 0 || count <= 0 || first + count > this.nrBlocks) return err('EINVAL');
      if (first % this.granularity !== 0 || count % this.granularity !== 0) return err('EINVAL');
      assert(r === 0 || first >= runs[2 * r - 2] + runs[2 * r - 1], 'runs ascend');
    }
    this.#punches++;
    // Whoever was told of the beginning is told of the end, even if it leaves meanwhile.
    const told = [...this.#listeners];
    for (const listener of told) yield* listener.begin(runs, nrRuns);
    // Detach first, free last: between the two the frames belong to nobody who could resolve them.
    const freed: number[] = [];
    for (let r = 0; r < nrRuns; r++) this.#detach(runs[2 * r], runs[2 * r + 1], freed);
    for (const listener of told) listener.end(runs, nrRuns);
    this.#punches--;
    let total = 0;
    for (let i = 0; i < freed.length; i += 2) {
      this.#frames.free(hfn(freed[i]), freed[i + 1]);
      total += freed[i + 1];
    }
    return ok(total);
  }

  /** Turns blocks into holes and appends their frames to `out` as contiguous `first, count` runs. */
  #detach(first: number, count: number, out: number[]): void {
    for (let i = first; i < first + count; i++) {
      const frame = this.blocks[i];
      if (frame < 0) continue;
      this.blocks[i] = -1;
      this.assigned--;
      const last = out.length - 2;
      if (last >= 0 && out[last] + out[last + 1] === frame) out[last + 1]++;
      else out.push(frame, 1);
    }
  }
}
