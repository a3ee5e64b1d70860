/**
 * A trace made ready to replay: each event knows which *allocation* it belongs to, so that our allocator, not the trace,
 * chooses the pages. Contract: a trace pfn is a handle; an alloc writes it, a free clears it. Resolving pfns to
 * allocation numbers here, in total order, gives the same map without its races.
 *
 * One plan in shared memory serves every VM that replays the trace; each VM has a handle table of its own.
 */
import { START_ABSENT, START_FREE, START_PCP } from '@ebb/guest-kernel';
import { OP_ALLOC, OP_CACHE_ADD, OP_CACHE_DELETE, OP_FREE, TG_WRITE, type Trace } from './trace.ts';

/** Plan operations beyond the trace's own. */
export const PLAN_ALLOC = 0;
export const PLAN_FREE = 1;
export const PLAN_ADD = 2;
export const PLAN_DELETE = 3;
/** A free of a page that was in use at the start: the handle is its pfn. */
export const PLAN_FREE_START = 4;
/** A page-cache deletion of such a page. */
export const PLAN_DELETE_START = 5;

/** A handle whose events come from several CPUs: they wait for one another by ordinal. */
export const PLAN_SHARED = 1;
/** `add` of a page written by the guest: dirty, not read from disk. */
export const PLAN_DIRTY = 2;

/** Plain and shared, so that it crosses to workers without a copy. */
export interface ReplayPlan {
  readonly name: string;
  readonly count: number;
  readonly nrHandles: number;
  readonly nrCpus: number;
  /** Nanoseconds since the start mark. */
  readonly timeNs: Float64Array;
  readonly op: Uint8Array;
  readonly flags: Uint8Array;
  readonly order: Uint8Array;
  readonly migratetype: Uint8Array;
  readonly gfp: Uint16Array;
  readonly handle: Int32Array;
  /** Position of the event among those of its handle. */
  readonly ordinal: Int32Array;
  readonly file: Int32Array;
  readonly index: Int32Array;
  /** Rows of each CPU in order, concatenated; CPU c has `rows[from[c]] … rows[from[c + 1] − 1]`. */
  readonly rows: Int32Array;
  readonly from: Int32Array;
  /** Events that could not be resolved, by reason. */
  readonly dropped: Readonly<Record<string, number>>;
  /** Virtual length in nanoseconds. */
  readonly durationNs: number;
}

function shared<T>(make: new (buffer: SharedArrayBuffer) => T, bytes: number): T {
  return new make(new SharedArrayBuffer(bytes));
}

/** Resolves handles and lays the plan out for `nrVcpus`: events of CPU c run on vCPU c mod nrVcpus. */
export function makePlan(trace: Trace, nrVcpus: number): ReplayPlan {
  const { events } = trace;
  const n = events.count;
  const plan = {
    timeNs: shared(Float64Array, n * 8),
    op: shared(Uint8Array, n),
    flags: shared(Uint8Array, n),
    order: shared(Uint8Array, n),
    migratetype: shared(Uint8Array, n),
    gfp: shared(Uint16Array, n * 2),
    handle: shared(Int32Array, n * 4),
    ordinal: shared(Int32Array, n * 4),
    file: shared(Int32Array, n * 4),
    index: shared(Int32Array, n * 4),
  };
  let highest = trace.maxPfn;
  for (const pfn of events.pfn) if (pfn > highest) highest = pfn;
  const live = new Int32Array(highest + 1025).fill(-1);
  const startUsed = new Uint8Array(highest + 1025);
  trace.start?.pages.forEach((state, pfn) => {
    startUsed[pfn] = state !== START_ABSENT && state !== START_FREE && state < START_PCP ? 1 : 0;
  });
  const handles: {
    order: number;
    gfp: number;
    ordinal: number;
    cpu: number;
    shared: boolean;
    rows: number[];
  }[] = [];
  const dropped: Record<string, number> = {};
  const drop = (why: string): void => {
    dropped[why] = (dropped[why] ?? 0) + 1;
  };
  const perCpu: number[][] = Array.from({ length: nrVcpus }, () => []);
  const origin = n > 0 ? events.timeUs[0] : 0;
  let rows = 0;
  const emit = (i: number, op: number, handle: number): number => {
    const row = rows++;
    plan.timeNs[row] = (events.timeUs[i] - origin) * 1000;
    plan.op[row] = op;
    plan.order[row] = events.order[i];
    plan.migratetype[row] = events.migratetype[i];
    plan.gfp[row] = events.gfp[i];
    plan.handle[row] = handle;
    plan.file[row] = events.file[i];
    plan.index[row] = events.index[i];
    perCpu[events.cpu[i] % nrVcpus].push(row);
    return row;
  };
  const use = (i: number, op: number, id: number): number => {
    const handle = handles[id];
    const row = emit(i, op, id);
    plan.ordinal[row] = handle.ordinal++;
    handle.rows.push(row);
    if (events.cpu[i] % nrVcpus !== handle.cpu) handle.shared = true;
    return row;
  };
  for (let i = 0; i < n; i++) {
    const pfn = events.pfn[i];
    switch (events.op[i]) {
      case OP_ALLOC: {
        if (live[pfn] >= 0) drop('allocated twice without a free');
        const id = handles.length;
        handles.push({
          order: events.order[i],
          gfp: events.gfp[i],
          ordinal: 0,
          cpu: events.cpu[i] % nrVcpus,
          shared: false,
          rows: [],
        });
        live[pfn] = id;
        use(i, PLAN_ALLOC, id);
        break;
      }
      case OP_FREE: {
        const id = live[pfn];
        if (id >= 0) {
          live[pfn] = -1;
          if (handles[id].order !== events.order[i]) drop('freed with another order than allocated');
          use(i, PLAN_FREE, id);
          break;
        }
        let used = true;
        for (let p = pfn; p < pfn + (1 << events.order[i]); p++) used = used && startUsed[p] === 1;
        if (!used) {
          drop('free of an unknown page');
          break;
        }
        for (let p = pfn; p < pfn + (1 << events.order[i]); p++) startUsed[p] = 0;
        emit(i, PLAN_FREE_START, pfn);
        break;
      }
      case OP_CACHE_ADD: {
        const id = live[pfn];
        if (id < 0) {
          drop('page cache: page not allocated in the trace');
          break;
        }
        const row = use(i, PLAN_ADD, id);
        if ((handles[id].gfp & TG_WRITE) !== 0) plan.flags[row] |= PLAN_DIRTY;
        break;
      }
      case OP_CACHE_DELETE: {
        const id = live[pfn];
        if (id >= 0) use(i, PLAN_DELETE, id);
        else if (startUsed[pfn] === 1) emit(i, PLAN_DELETE_START, pfn);
        else drop('page cache: deletion of an unknown page');
        break;
      }
    }
  }
  for (const handle of handles)
    if (handle.shared) for (const row of handle.rows) plan.flags[row] |= PLAN_SHARED;
  const order = shared(Int32Array, Math.max(1, rows) * 4);
  const from = shared(Int32Array, (nrVcpus + 1) * 4);
  let at = 0;
  perCpu.forEach((list, cpu) => {
    from[cpu] = at;
    order.set(list, at);
    at += list.length;
  });
  from[nrVcpus] = at;
  return {
    name: trace.name,
    count: rows,
    nrHandles: handles.length,
    nrCpus: nrVcpus,
    ...plan,
    rows: order,
    from,
    dropped,
    durationNs: rows > 0 ? plan.timeNs[rows - 1] : 0,
  };
}
