/** The host worker: serves exits, runs host tasks and coordinates windows until the run is over. */
import { fileStorage } from './file-storage.ts';
import { HostSide } from './host-side.ts';
import { HostWindows } from './host-windows.ts';
import type { RunResult } from './run-result.ts';
import type { RunBuffers, RunSpec } from './spec.ts';
import { exposeToParent } from './worker-port.ts';

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
    const disks: { close(): void }[] = [];
    const host = new HostSide(spec, buffers, (_vm, bytes) => {
      const disk = fileStorage(bytes);
      disks.push(disk);
      return disk;
    });
    this.#host = host;
    const windows = new HostWindows(host, spec.workers, buffers.runControl, crowded);
    while (host.advance(windows.nextDue, windows.othersDue)) {
      if (await windows.run()) continue;
      host.why = 'the run was stopped';
      return host.result();
    }
    windows.end();
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

exposeToParent(new HostWorker());
