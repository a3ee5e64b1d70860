/** Allocation events in tracefs text, as `trace_pipe` prints them, for `--trace-out`. */
import type { AllocTrace } from '@ebb/guest-kernel';
import { NS_PER_S, type Vcpu } from '@ebb/machine';

const ZONES = ['GFP_KERNEL|GFP_DMA', 'GFP_KERNEL|GFP_DMA32', 'GFP_KERNEL', 'GFP_HIGHUSER_MOVABLE|__GFP_COMP'];

/** A sink that appends `{ atNs, line }` to `out`. */
export function traceWriter(vcpu: Vcpu, out: { atNs: number; line: string }[]): AllocTrace {
  const task = `ebb-vm${vcpu.vm}-${vcpu.id + 1}`.padStart(16);
  const cpu = `[${String(vcpu.id).padStart(3, '0')}]`;
  return (event, pfn, order, migratetype, gfp) => {
    const time = (vcpu.clock / NS_PER_S).toFixed(6).padStart(12);
    // `struct page` is 64 bytes; vmemmap without KASLR.
    const page = (0xffea000000000000n + BigInt(pfn) * 64n).toString(16);
    const fields =
      event === 'alloc'
        ? `mm_page_alloc: page=${page} pfn=0x${pfn.toString(16)} order=${order} migratetype=${migratetype} gfp_flags=${ZONES[gfp & 3]}`
        : `mm_page_free: page=${page} pfn=0x${pfn.toString(16)} order=${order}`;
    out.push({ atNs: vcpu.clock, line: `${task}  ${cpu} ..... ${time}: ${fields}` });
  };
}
