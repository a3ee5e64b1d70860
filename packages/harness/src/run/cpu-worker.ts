/**
 * A CPU worker: a physical CPU that runs vCPUs of any number of VMs, a window at a time. Waits for the next window by a
 * short spin and then a bounded sleep, and turns its event loop at least every 100 ms.
 */
import {
  freeSchedule,
  RC_STOP,
  RC_WINDOW,
  RC_WINDOW_UNTIL_F64,
  RC_WORKER,
  RC_WORKER_DONE,
  RC_WORKER_NEXT_DUE_F64,
  RC_WORKER_STRIDE,
  ringDoorbell,
  RunStopped,
  sharedF64,
  sharedI32,
  ThreadExitPort,
} from '@ebb/machine';
import { CpuSide } from './cpu-side.ts';
import type { RunBuffers, RunSpec } from './spec.ts';
import { exposeToParent, turn } from './worker-port.ts';

const WAIT_MS = 50;
const TURN_EVERY_MS = 100;
const SPINS_SPARE_CORES = 20_000;
const SPINS_CROWDED = 300;

export class CpuWorker {
  /** Runs windows until `stop`. Returns the allocation trace, if the run collects one. */
  async run(
    spec: RunSpec,
    buffers: RunBuffers,
    worker: number,
    crowded: boolean,
  ): Promise<{ atNs: number; line: string }[]> {
    const runControl = sharedI32('run-control', buffers.runControl);
    const runF64 = sharedF64('run-control', buffers.runControl);
    const line = RC_WORKER + worker * RC_WORKER_STRIDE;
    const spins = crowded ? SPINS_CROWDED : SPINS_SPARE_CORES;
    const cpus = new CpuSide(spec, buffers, worker, new ThreadExitPort(runControl, spins), freeSchedule);
    let done = 0;
    let lastTurn = performance.now();
    try {
      for (;;) {
        let window = Atomics.load(runControl, RC_WINDOW);
        for (let i = 0; i < spins && window === done; i++) window = Atomics.load(runControl, RC_WINDOW);
        if (Atomics.load(runControl, RC_STOP) !== 0) break;
        if (window === done) {
          Atomics.wait(runControl, RC_WINDOW, done, WAIT_MS);
        } else {
          const nextDue = cpus.runWindow(runF64[RC_WINDOW_UNTIL_F64]);
          runF64[line / 2 + RC_WORKER_NEXT_DUE_F64] = nextDue;
          done = window;
          // Publishes everything this window wrote. Pairs with the host's load before it opens the next.
          Atomics.store(runControl, line + RC_WORKER_DONE, done);
          ringDoorbell(runControl);
        }
        if (performance.now() - lastTurn > TURN_EVERY_MS) {
          await turn();
          lastTurn = performance.now();
        }
      }
    } catch (error) {
      if (!(error instanceof RunStopped)) throw error;
    }
    return cpus.allocTrace;
  }

  /** For tests of the run protocol: this worker throws where nobody catches. */
  crash(): void {
    setImmediate(() => {
      throw new Error('crashed on request');
    });
  }
}

exposeToParent(new CpuWorker());
