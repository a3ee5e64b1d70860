/** A guest kernel's shared state: views and layout, constants only. Every vCPU has its own `Arena` over one buffer. */
import { sharedF64, sharedI32 } from '@ebb/machine';
import { arenaLayout, type ArenaLayout } from './layout.ts';

export class Arena {
  readonly w: Int32Array;
  /** Times: the float64 at word `i` (even) is element `i / 2`. */
  readonly f64: Float64Array;
  readonly layout: ArenaLayout;
  /** First word of the memmap: page `pfn` is at `memmap + (pfn << 4)`. */
  readonly memmap: number;
  readonly maxPfn: number;

  constructor(buffer: SharedArrayBuffer, maxPfn: number) {
    this.layout = arenaLayout(maxPfn);
    this.w = sharedI32('arena', buffer, 0, this.layout.words);
    this.f64 = sharedF64('arena', buffer, 0, this.layout.memmap / 2);
    this.memmap = this.layout.memmap;
    this.maxPfn = maxPfn;
  }

  /** Bytes of an arena for `maxPfn` pages. */
  static bytes(maxPfn: number): number {
    return arenaLayout(maxPfn).words * 4;
  }

  static create(maxPfn: number): SharedArrayBuffer {
    return new SharedArrayBuffer(Arena.bytes(maxPfn));
  }
}
