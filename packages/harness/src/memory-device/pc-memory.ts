/** Where QEMU's `pc` machine puts boot memory: below 3 GiB, and what is more from 4 GiB; nodes in order. */
import { GiB, PAGE_SIZE } from '@ebb/machine';
import { VGA_HOLE_END, VGA_HOLE_START } from '../trace/vga-hole.ts';

/** Memory above this starts at 4 GiB: the hole is for devices. */
const LOW_END: number = (3 * GiB) / PAGE_SIZE;
/** Pages of boot memory that do not fit below the hole begin here. */
export const HIGH_START: number = (4 * GiB) / PAGE_SIZE;

interface PfnRange {
  readonly start: number;
  readonly end: number;
}

export interface PcMemory {
  readonly e820: readonly PfnRange[];
  /** One range per node, the hole included where a node reaches over it. */
  readonly nodes: readonly PfnRange[];
  /** One more than the highest page. */
  readonly end: number;
}

/** Lays out the nodes' memory, in bytes. */
export function pcMemory(boot: readonly { readonly node: number; readonly size: number }[]): PcMemory {
  const total = boot.reduce((sum, { size }) => sum + size, 0) / PAGE_SIZE;
  // 3.5 GiB or less fits below the hole whole.
  const low = total <= (3.5 * GiB) / PAGE_SIZE ? total : LOW_END;
  const place = (page: number): number => (page < low ? page : page - low + HIGH_START);
  const nodes: PfnRange[] = [];
  let at = 0;
  for (const { size } of boot) {
    const pages = size / PAGE_SIZE;
    nodes.push({ start: place(at), end: place(at + pages - 1) + 1 });
    at += pages;
  }
  const e820 = [
    { start: 0, end: VGA_HOLE_START },
    { start: VGA_HOLE_END, end: low },
    ...(total > low ? [{ start: HIGH_START, end: place(total - 1) + 1 }] : []),
  ];
  return { e820, nodes, end: place(total - 1) + 1 };
}
