/** A run on one thread: exits pump the host's tasks. Deterministic; the same code as in workers but for the port. */
import type { BlockStorage } from '@ebb/host-kvm';
import { InlineExitPort, inlineSchedule } from '@ebb/machine';
import { CpuSide } from './cpu-side.ts';
import { HostSide } from './host-side.ts';
import type { RunResult } from './run-result.ts';
import type { RunBuffers, RunSpec } from './spec.ts';

export interface InlineRun {
  readonly result: RunResult;
  readonly host: HostSide;
  readonly allocTrace: readonly { readonly atNs: number; readonly line: string }[];
}

/** Runs `spec` to its end. `onWindow` is called after each window with the virtual time. */
export function runInline(
  spec: RunSpec,
  buffers: RunBuffers,
  storage: (vm: number, bytes: number) => BlockStorage,
  onWindow: (nowNs: number, host: HostSide) => void = () => undefined,
): InlineRun {
  const host = new HostSide(spec, buffers, storage, inlineSchedule);
  const cpus = new CpuSide(spec, buffers, -1, new InlineExitPort(() => void host.poll()), inlineSchedule);
  let nextDue = Number.POSITIVE_INFINITY;
  while (host.advance(nextDue)) {
    nextDue = cpus.runWindow(host.windowEnd);
    // What devices still have to do belongs to this window.
    while (host.poll());
    onWindow(host.windowEnd, host);
  }
  const allocTrace = cpus.allocTrace.toSorted((a, b) => a.atNs - b.atNs);
  return { result: host.result(), host, allocTrace };
}
