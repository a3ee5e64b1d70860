/** A guest kernel's shared state: views and layout, constants only. Every vCPU has its own `Arena` over one buffer. */
import { sharedF64, sharedI32 } from '@ebb/machine';
import {
  arenaLayout,
  H_NR_ZONES,
  PAGE_STRUCT_WORDS,
  PLUGGED_SHIFT,
  ZONE_BASE,
  ZONE_WORDS,
  type ArenaLayout,
} from './layout.ts';
import { Z_END } from './mm/zone.ts';

/** One more than the highest page any zone reaches or any memory block has been added for. */
function lastPage(w: Int32Array, layout: ArenaLayout): number {
  let last = 0;
  for (let i = 0; i < w[H_NR_ZONES]; i++) last = Math.max(last, w[ZONE_BASE + i * ZONE_WORDS + Z_END]);
  for (let at = layout.plugged; at < layout.words; at++)
    if (w[at] !== 0) last = Math.max(last, ((at - layout.plugged + 1) * 32) << PLUGGED_SHIFT);
  return Math.min(last, layout.maxPfn);
}

export class Arena {
  readonly w: Int32Array;
  /** Times: the float64 at word `i` (even) is element `i / 2`. */
  readonly f64: Float64Array;
  readonly layout: ArenaLayout;
  /** First word of the memmap: page `pfn` is at `memmap + (pfn << 4)`. */
  readonly memmap: number;
  /** First word of the shadow: page `pfn` is at `shadow + pfn`. */
  readonly shadow: number;
  /** First word of the table of free blocks: page `pfn` is at `free + pfn`. */
  readonly free: number;
  readonly maxPfn: number;

  constructor(buffer: SharedArrayBuffer, maxPfn: number) {
    this.layout = arenaLayout(maxPfn);
    this.w = sharedI32('arena', buffer, 0, this.layout.words);
    this.f64 = sharedF64('arena', buffer, 0, this.layout.memmap / 2);
    this.memmap = this.layout.memmap;
    this.shadow = this.layout.shadow;
    this.free = this.layout.free;
    this.maxPfn = maxPfn;
  }

  /** Empties it for a kernel that boots: all but the memmap of memory that is not there, which nobody has touched. */
  clear(): void {
    const { w, layout } = this;
    const last = lastPage(w, layout);
    w.fill(0, 0, this.memmap + last * PAGE_STRUCT_WORDS);
    w.fill(0, this.shadow, this.shadow + last);
    w.fill(0, this.free, this.free + last);
    w.fill(0, layout.sections, layout.words);
  }

  /** Bytes of an arena for `maxPfn` pages. */
  static bytes(maxPfn: number): number {
    return arenaLayout(maxPfn).words * 4;
  }

  static create(maxPfn: number): SharedArrayBuffer {
    return new SharedArrayBuffer(Arena.bytes(maxPfn));
  }
}
