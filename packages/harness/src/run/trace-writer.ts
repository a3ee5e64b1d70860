/** What a guest's tracepoints say, in tracefs text as `trace_pipe` prints it, for `--trace-out`. */
import {
  GFP_ATOMIC,
  GFP_NORETRY,
  GFP_NOWAIT,
  GFP_NO_KSWAPD,
  GFP_THISNODE,
  GFP_WRITE,
  GFP_ZERO,
  GFP_ZONE_MASK,
  type Tracepoints,
} from '@ebb/guest-kernel';
import { NS_PER_S, PAGE_SIZE, type Vcpu } from '@ebb/machine';

/** The captures' own marks: between them lies what is replayed. */
export const REPLAY_BEGINS = 'SNAP_start_END';
export const REPLAY_ENDS = 'SNAP_end_END';

export interface TraceLine {
  readonly atNs: number;
  readonly line: string;
}

/** Flags by Linux's names, such that an import gives the same request again. */
export function gfpNames(gfp: number): string {
  const zone = gfp & GFP_ZONE_MASK;
  const names: string[] = [];
  const waits = (gfp & (GFP_ATOMIC | GFP_NOWAIT)) === 0;
  if (zone === 3 && (gfp & (GFP_NOWAIT | GFP_NO_KSWAPD)) === (GFP_NOWAIT | GFP_NO_KSWAPD))
    names.push('GFP_TRANSHUGE_LIGHT');
  else {
    if (!waits) names.push((gfp & GFP_ATOMIC) !== 0 ? 'GFP_ATOMIC' : 'GFP_NOWAIT');
    if (zone === 3) names.push(waits ? 'GFP_HIGHUSER_MOVABLE' : '__GFP_MOVABLE');
    else if (waits) names.push('GFP_KERNEL');
  }
  if (zone < 2) names.push(zone === 0 ? 'GFP_DMA' : 'GFP_DMA32');
  for (const [bit, name] of [
    [GFP_WRITE, '__GFP_WRITE'],
    [GFP_NORETRY, '__GFP_NORETRY'],
    [GFP_ZERO, '__GFP_ZERO'],
    [GFP_THISNODE, '__GFP_THISNODE'],
  ] as const)
    if ((gfp & bit) !== 0) names.push(name);
  return names.join('|');
}

/** Appends what vCPU `vcpu` does to `out`. Files are those of the trace that is replayed, by their number. */
export class TraceWriter implements Tracepoints {
  readonly #vcpu: Vcpu;
  readonly #out: TraceLine[];
  readonly #task: string;

  constructor(vcpu: Vcpu, out: TraceLine[]) {
    this.#vcpu = vcpu;
    this.#out = out;
    const name = `ebb-vm${vcpu.vm}-${vcpu.id + 1}`.padStart(16);
    this.#task = `${name}  [${String(vcpu.id).padStart(3, '0')}] .....`;
  }

  /** A mark, as somebody who writes to `trace_marker` makes it, at virtual time `atNs`. */
  mark(text: string, atNs: number): void {
    this.#line(`tracing_mark_write: ${text}`, atNs);
  }
  pageAlloc(pfn: number, order: number, migratetype: number, gfp: number): void {
    this.#line(
      `mm_page_alloc: page=${structPage(pfn)} pfn=0x${pfn.toString(16)} order=${order} migratetype=${migratetype} gfp_flags=${gfpNames(gfp)}`,
    );
  }
  pageFree(pfn: number, order: number): void {
    this.#line(`mm_page_free: page=${structPage(pfn)} pfn=0x${pfn.toString(16)} order=${order}`);
  }
  cacheAdd(pfn: number, inode: number, index: number): void {
    this.#line(`mm_filemap_add_to_page_cache: ${cached(pfn, inode, index)}`);
  }
  cacheDelete(pfn: number, inode: number, index: number): void {
    this.#line(`mm_filemap_delete_from_page_cache: ${cached(pfn, inode, index)}`);
  }

  #line(event: string, atNs: number = this.#vcpu.clock): void {
    const time = (atNs / NS_PER_S).toFixed(6).padStart(12);
    this.#out.push({ atNs, line: `${this.#task} ${time}: ${event}` });
  }
}

/** Address of a `struct page`: 64 bytes each, vmemmap without KASLR. */
function structPage(pfn: number): string {
  return (0xffea000000000000n + BigInt(pfn) * 64n).toString(16);
}

function cached(pfn: number, inode: number, index: number): string {
  return `dev 254:0 ino ${inode.toString(16)} pfn=0x${pfn.toString(16)} ofs=${index * PAGE_SIZE} order=0`;
}
