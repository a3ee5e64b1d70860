/** The guest that a trace was captured from, as a configuration. */
import { START_FREE, type GuestConfig, type StartState } from '@ebb/guest-kernel';
import { MiB, PAGE_SIZE, formatBytes } from '@ebb/machine';
import { UserError, type Trace } from '../trace/trace.ts';

/** Blocks of the disk that file pages hash onto: 16 GiB, sparse. */
export const REPLAY_DISK_BYTES: number = 16384 * MiB;

/** What a guest needs to boot and to serve its disk: 16 MiB. */
const LEAST_PAGES: number = (16 * MiB) / PAGE_SIZE;

export interface GuestOptions {
  /** Bytes; at least the capture's. Larger adds free pages on top. */
  readonly guestMemoryBytes?: number;
  readonly vcpus: number;
  readonly balloon: boolean;
}

/** Configures a guest like the captured one. */
export function guestOf(trace: Trace, options: GuestOptions): GuestConfig {
  const wanted = options.guestMemoryBytes ?? trace.guestMemoryBytes;
  if (wanted < trace.guestMemoryBytes) {
    throw new UserError(
      `--guest-memory ${formatBytes(wanted)}: the trace '${trace.name}' was captured with ${formatBytes(trace.guestMemoryBytes)}; give at least that`,
    );
  }
  const extra = (wanted - trace.guestMemoryBytes) / PAGE_SIZE;
  const maxPfn = trace.maxPfn + extra;
  const e820 = [...trace.e820, ...(extra > 0 ? [{ start: trace.maxPfn, end: maxPfn }] : [])];
  const ram = e820.reduce((sum, range) => sum + range.end - range.start, 0);
  if (ram < LEAST_PAGES)
    throw new UserError(
      `the trace '${trace.name}' is of a guest with ${ram} pages of RAM; one boots with ${LEAST_PAGES} at least`,
    );
  return {
    e820,
    nodes: [{ start: 0, end: maxPfn }],
    maxPfn,
    nrCpus: options.vcpus,
    cpuNode: new Array<number>(options.vcpus).fill(0),
    initOnAlloc: true,
    pagePoison: false,
    balloon: options.balloon,
    blk: true,
    ...(trace.start === undefined ? {} : { start: extended(trace.start, maxPfn) }),
    blocks: { kind: 'hash', nrBlocks: REPLAY_DISK_BYTES / PAGE_SIZE },
  };
}

/** The start state with free memory added on top. */
function extended(start: StartState, maxPfn: number): StartState {
  const pages = new Uint8Array(maxPfn).fill(START_FREE);
  pages.set(start.pages);
  const pageblocks = new Uint8Array(Math.ceil(maxPfn / 512)).fill(1);
  pageblocks.set(start.pageblocks);
  return { pages, pageblocks };
}
