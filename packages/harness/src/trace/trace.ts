/**
 * An allocation trace as Ebb keeps it: events in columns, total order, and the capture's start and end states.
 * Produced by `import.ts` from tracefs text, stored by `ebbtrace.ts`.
 */

export const OP_ALLOC = 0;
export const OP_FREE = 1;
export const OP_CACHE_ADD = 2;
export const OP_CACHE_DELETE = 3;

/** gfp bits that a replay needs, packed beside order and migratetype. */
export const TG_ZERO = 1;
export const TG_WRITE = 2;
export const TG_ATOMIC = 4;
export const TG_NORETRY = 8;
export const TG_NOWAIT = 16;
export const TG_NO_KSWAPD = 32;
export const TG_THISNODE = 64;
/** Highest zone type in bits 8–9. */
export const TG_ZONE_SHIFT = 8;

/** Events as columns; row i of each belongs together. */
export interface TraceEvents {
  readonly count: number;
  /** Microseconds since the first mark of the capture. */
  readonly timeUs: Float64Array;
  readonly op: Uint8Array;
  readonly cpu: Uint8Array;
  readonly pfn: Int32Array;
  readonly order: Uint8Array;
  /** Allocation: migratetype. */
  readonly migratetype: Uint8Array;
  /** Allocation: `TG_*`. */
  readonly gfp: Uint16Array;
  /** Page cache: file number (dense) and page index in the file. */
  readonly file: Int32Array;
  readonly index: Float64Array;
}

/** One page of the capture's start: see `START_*` of the guest kernel. */
export interface TraceStart {
  readonly pages: Uint8Array;
  readonly pageblocks: Uint8Array;
}

/** What the real kernel said at the end. */
export interface TraceEnd {
  /** Free blocks by order, all zones. */
  readonly freeByOrder: readonly number[];
  readonly freePages: number;
  readonly pcpPages: number;
  readonly pageCachePages: number;
}

export interface Trace {
  readonly name: string;
  /** FNV-1a of all that a replay reads (`traceHash`), hex. */
  readonly hash: string;
  readonly nrCpus: number;
  readonly maxPfn: number;
  /** RAM of the captured guest in bytes, rounded up to 64 MiB; holes in its physical memory do not count. */
  readonly guestMemoryBytes: number;
  readonly e820: readonly { readonly start: number; readonly end: number }[];
  readonly events: TraceEvents;
  readonly start?: TraceStart;
  readonly end?: TraceEnd;
  /** Lines of the source that were skipped, by reason. */
  readonly skipped: Readonly<Record<string, number>>;
  /** Workload marks: name and time in microseconds. */
  readonly marks: readonly { readonly timeUs: number; readonly name: string }[];
}

/** What a replay reads: events, start state, memory map. Names and the end state, which is only compared, are left out. */
export function traceHash(trace: Pick<Trace, 'events' | 'start' | 'e820' | 'maxPfn'>): string {
  let h = 0x811c9dc5;
  const mix = (v: number): void => {
    h = Math.imul(h ^ (v & 0xffff), 0x01000193);
    h = Math.imul(h ^ (v >>> 16), 0x01000193);
  };
  /** Upper halves of times, page indices and addresses, each with the number of its field: few have one. */
  const upper: number[] = [];
  let fields = 0;
  const mixLong = (v: number): void => {
    mix(v | 0);
    const high = Math.floor(v / 0x1_0000_0000);
    if (high !== 0) upper.push(fields, high);
    fields++;
  };
  const { events, start, e820, maxPfn } = trace;
  for (let i = 0; i < events.count; i++) {
    mix(events.pfn[i]);
    mix(events.op[i] | (events.order[i] << 4) | (events.cpu[i] << 8) | (events.gfp[i] << 16));
    mix(events.migratetype[i]);
    mixLong(Math.round(events.timeUs[i]));
    mix(events.file[i]);
    mixLong(events.index[i]);
  }
  mix(maxPfn);
  for (const range of e820) {
    mixLong(range.start);
    mixLong(range.end);
  }
  for (const state of start === undefined ? [] : [start.pages, start.pageblocks])
    for (const page of state) mix(page);
  for (const v of upper) mix(v);
  return (h >>> 0).toString(16).padStart(8, '0');
}

/** A user's mistake: one line that names the value and the mend; the command ends with exit code 2. */
export class UserError extends Error {
  constructor(message: string) {
    super(message);
    this.name = 'UserError';
  }
}
