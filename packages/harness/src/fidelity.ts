/** `ebb trace fidelity`: replays a capture and compares our end state with the real kernel's. */
import { Arena, filePages, freeByOrder, freePages, pcpPages } from '@ebb/guest-kernel';
import { GiB, MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { hostBuffers, runBuffers } from './run/buffers.ts';
import { fileStorage } from './run/file-storage.ts';
import { guestOf, REPLAY_DISK_BYTES } from './run/guest-of.ts';
import { runInline } from './run/inline-run.ts';
import type { RunSpec } from './run/spec.ts';
import { makePlan } from './trace/replay-plan.ts';
import { UserError, type Trace } from './trace/trace.ts';

interface Pair {
  readonly ebb: number;
  readonly real: number;
}

export interface FidelityJson {
  readonly freePages: Pair;
  readonly pcpPages: Pair;
  readonly byOrder: readonly { readonly order: number; readonly ebb: number; readonly real: number }[];
  readonly largeFreeShare: Pair;
  readonly pageCachePages: Pair;
}

export interface Fidelity {
  readonly json: FidelityJson;
  readonly agrees: boolean;
  readonly ledgerViolations: number;
  readonly dropped: Readonly<Record<string, number>>;
}

/** Free and per-CPU pages together within 1 %, page cache within 1 %, large blocks within 0.05 of what is free. */
export function agrees(json: FidelityJson): boolean {
  const off = (ebb: number, real: number): number => Math.abs(ebb - real) / Math.max(1, real);
  return (
    off(json.freePages.ebb + json.pcpPages.ebb, json.freePages.real + json.pcpPages.real) <= 0.01 &&
    off(json.pageCachePages.ebb, json.pageCachePages.real) <= 0.01 &&
    Math.abs(json.largeFreeShare.ebb - json.largeFreeShare.real) <= 0.05
  );
}

/** Replays `trace` on one VM with as many vCPUs as it has CPUs (at most 8), without a balloon. */
export function fidelity(trace: Trace): Fidelity {
  if (trace.end === undefined || trace.start === undefined) {
    const lacks = trace.marks.some((mark) => mark.name === 'SNAP_start_END')
      ? 'import a capture folder that holds start.* and end.*'
      : 'it has no SNAP_start_END mark, which says what of it comes after the start state';
    const states = [trace.start === undefined && 'start', trace.end === undefined && 'end'].filter(
      (s) => s !== false,
    );
    throw new UserError(
      `trace '${trace.name}': has no ${states.join(' and no ')} state to compare with: ${lacks}`,
    );
  }
  const vcpus = Math.min(8, trace.nrCpus);
  const plan = makePlan(trace, vcpus);
  const guest = guestOf(trace, { vcpus, balloon: false });
  const hostBytes = Math.min(8 * GiB, Math.ceil((trace.guestMemoryBytes + 128 * MiB) / (2 * MiB)) * 2 * MiB);
  const spec: RunSpec = {
    hostFrames: hostBytes / PAGE_SIZE,
    backing: 'thp',
    vms: [{ bootAtNs: 0, guest, program: { kind: 'replay', plan }, diskBytes: REPLAY_DISK_BYTES }],
    vcpusPerVm: vcpus,
    workers: 1,
    sampleNs: 10 * NS_PER_S,
    graceNs: 0,
    traceOut: false,
    poison: 'edges',
  };
  const buffers = runBuffers(spec, hostBuffers(hostBytes));
  const { result } = runInline(spec, buffers, (_vm, bytes) => fileStorage(bytes));
  if (!result.ok)
    throw new UserError(`trace '${trace.name}': the replay did not reach its end: ${result.why}`);
  const arena = new Arena(buffers.arenas[0], guest.maxPfn);
  const ebbOrders = freeByOrder(arena);
  const share = (orders: readonly number[]): number => {
    const pages = (from: number): number =>
      orders.reduce((sum, n, order) => sum + (order >= from ? n * 2 ** order : 0), 0);
    return pages(0) === 0 ? 0 : pages(9) / pages(0);
  };
  const { end } = trace;
  const json: FidelityJson = {
    freePages: { ebb: freePages(arena), real: end.freePages },
    pcpPages: { ebb: pcpPages(arena, vcpus), real: end.pcpPages },
    byOrder: ebbOrders.map((ebb, order) => ({ order, ebb, real: end.freeByOrder[order] ?? 0 })),
    largeFreeShare: { ebb: share(ebbOrders), real: share(end.freeByOrder) },
    pageCachePages: { ebb: filePages(arena), real: end.pageCachePages },
  };
  return { json, agrees: agrees(json), ledgerViolations: result.ledgerViolations, dropped: plan.dropped };
}
