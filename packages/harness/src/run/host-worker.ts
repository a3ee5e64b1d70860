/**
 * The host worker: serves exits, runs host tasks and coordinates windows until the run is over.
 *
 * Waiting (DESIGN § 2): serve; spin 15,000 polls; then read the doorbell, set `asleep`, scan once more, and await the
 * bell with a bound. With more threads than cores it spins only briefly while guests are at work: they need the core.
 */
import {
  RC_DOORBELL,
  RC_HOST_ASLEEP,
  RC_STOP,
  RC_WINDOW,
  RC_WINDOW_UNTIL_F64,
  RC_WORKER,
  RC_WORKER_DONE,
  RC_WORKER_NEXT_DUE_F64,
  RC_WORKER_STRIDE,
  sharedF64,
  sharedI32,
} from '@ebb/machine';
import { fileStorage } from './file-storage.ts';
import { HostSide } from './host-side.ts';
import type { RunResult } from './run-result.ts';
import type { RunBuffers, RunSpec } from './spec.ts';
import { exposeToParent, turn } from './worker-port.ts';

const WAIT_MS = 50;
const TURN_EVERY_MS = 1;
const SPINS_SPARE_CORES = 15_000;
const SPINS_CROWDED = 300;

export interface HostProgress {
  readonly nowNs: number;
  readonly hostUsedBytes: number;
  readonly vms: number;
  readonly finished: number;
}

export class HostWorker {
  #host: HostSide | null = null;

  /** Runs to the end of the run, or until `stop`. `crowded`: more threads than cores. */
  async run(spec: RunSpec, buffers: RunBuffers, crowded: boolean): Promise<RunResult> {
    const runControl = sharedI32('run-control', buffers.runControl);
    const runF64 = sharedF64('run-control', buffers.runControl);
    const disks: { close(): void }[] = [];
    const host = new HostSide(spec, buffers, (_vm, bytes) => {
      const disk = fileStorage(bytes);
      disks.push(disk);
      return disk;
    });
    this.#host = host;
    const spins = crowded ? SPINS_CROWDED : SPINS_SPARE_CORES;
    let window = 0;
    let nextDue = Number.POSITIVE_INFINITY;
    let othersDue = Number.POSITIVE_INFINITY;
    let lastTurn = performance.now();
    const allDone = (): boolean => {
      for (let w = 0; w < spec.workers; w++) {
        // Pairs with the worker's store of `done`, which follows its `nextDue`.
        if (Atomics.load(runControl, RC_WORKER + w * RC_WORKER_STRIDE + RC_WORKER_DONE) !== window)
          return false;
      }
      return true;
    };
    while (host.advance(nextDue, othersDue)) {
      window++;
      runF64[RC_WINDOW_UNTIL_F64] = host.windowEnd;
      Atomics.store(runControl, RC_WINDOW, window);
      Atomics.notify(runControl, RC_WINDOW);
      for (let idle = 0; ; ) {
        if (host.poll()) idle = 0;
        else if (allDone() && host.tasks.idle) break;
        // A dead VM's locks are held for ever: its siblings are stopped, not waited for.
        else if (host.anyKilled) break;
        else idle++;
        if (Atomics.load(runControl, RC_STOP) !== 0) {
          host.why = 'the run was stopped';
          return host.result();
        }
        if (idle < spins) continue;
        const bell = Atomics.load(runControl, RC_DOORBELL);
        Atomics.store(runControl, RC_HOST_ASLEEP, 1);
        if (!host.poll() && !(allDone() && host.tasks.idle)) await sleep(runControl, bell);
        Atomics.store(runControl, RC_HOST_ASLEEP, 0);
        idle = 0;
        lastTurn = performance.now();
      }
      nextDue = Number.POSITIVE_INFINITY;
      othersDue = Number.POSITIVE_INFINITY;
      for (let w = 0; w < spec.workers; w++) {
        const due = runF64[(RC_WORKER + w * RC_WORKER_STRIDE) / 2 + RC_WORKER_NEXT_DUE_F64];
        if (due < nextDue) {
          othersDue = nextDue;
          nextDue = due;
        } else if (due < othersDue) othersDue = due;
      }
      if (performance.now() - lastTurn > TURN_EVERY_MS) {
        await turn();
        lastTurn = performance.now();
      }
    }
    Atomics.store(runControl, RC_STOP, 1);
    Atomics.notify(runControl, RC_WINDOW);
    for (const disk of disks) disk.close();
    return host.result();
  }

  progress(): HostProgress {
    const host = this.#host;
    if (host === null) return { nowNs: 0, hostUsedBytes: 0, vms: 0, finished: 0 };
    return {
      nowNs: host.windowEnd,
      hostUsedBytes: host.pool.used * 4096,
      vms: host.vms.length,
      finished: host.nrFinished,
    };
  }

  /** For tests of the run protocol: this worker throws where nobody catches. */
  crash(): void {
    setImmediate(() => {
      throw new Error('crashed on request');
    });
  }
}

/** Waits for the bell to move from `seen`, without blocking the event loop. Bounded. */
async function sleep(runControl: Int32Array, seen: number): Promise<void> {
  const waiting = Atomics.waitAsync(runControl, RC_DOORBELL, seen, WAIT_MS);
  if (waiting.async) await waiting.value;
}

exposeToParent(new HostWorker());
