/**
 * A run in real worker threads: one host worker and the CPU workers, each inside one Comlink call. Main only starts
 * them, reports progress and watches for deaths; the death of any sets `stop`, ends the rest and is exit code 3.
 */
import { availableParallelism } from 'node:os';
import { RC_DOORBELL, RC_STOP, RC_WINDOW } from '@ebb/machine';
import type { CpuWorker } from './cpu-worker.ts';
import type { HostProgress, HostWorker } from './host-worker.ts';
import type { RunResult } from './run-result.ts';
import type { RunBuffers, RunSpec } from './spec.ts';
import { causeOf, spawnWorker, WorkerDied, type SpawnedWorker } from './worker-endpoint.ts';

const PROGRESS_MS = 200;

/** Worker threads kept between the runs of one command. */
export class ThreadPool {
  readonly host: SpawnedWorker<HostWorker>;
  readonly cpus: SpawnedWorker<CpuWorker>[];

  constructor(workers: number) {
    this.host = spawnWorker<HostWorker>('./host-worker', 'host');
    this.cpus = Array.from({ length: workers }, (_, i) => spawnWorker<CpuWorker>('./cpu-worker', `cpu${i}`));
  }

  get deaths(): Promise<never> {
    return Promise.race([this.host.died, ...this.cpus.map((cpu) => cpu.died)]);
  }

  async close(): Promise<void> {
    await Promise.all([this.host.close(), ...this.cpus.map((cpu) => cpu.close())]);
  }
}

/** CPU workers for a run: max(vCPUs per VM, cores − 1), even if that exceeds the cores. */
export function workersFor(vcpusPerVm: number): number {
  return Math.max(vcpusPerVm, availableParallelism() - 1);
}

export interface ThreadsRun {
  readonly result: RunResult;
  readonly allocTrace: readonly { readonly atNs: number; readonly line: string }[];
}

/** Runs `spec` on the pool's workers. Rejects with `WorkerDied` if one dies; the others are stopped first. */
export async function runThreads(
  spec: RunSpec,
  buffers: RunBuffers,
  pool: ThreadPool,
  onProgress: (progress: HostProgress) => void = () => undefined,
): Promise<ThreadsRun> {
  const crowded = spec.workers + 1 > availableParallelism();
  const { deaths } = pool;
  let over = false;
  const ask = async (): Promise<void> => {
    while (!over) {
      await new Promise((resolve) => {
        setTimeout(resolve, PROGRESS_MS);
      });
      if (!over) onProgress(await Promise.race([pool.host.api.progress(), deaths]));
    }
  };
  ask().catch(() => undefined);
  try {
    const [result, ...traces] = await Promise.race([
      Promise.all([
        watched(pool.host, pool.host.api.run(spec, buffers, crowded)),
        ...pool.cpus.map((cpu, i) => watched(cpu, cpu.api.run(spec, buffers, i, crowded))),
      ]),
      deaths,
    ]);
    const allocTrace = (traces as { atNs: number; line: string }[][])
      .flat()
      .toSorted((a, b) => a.atNs - b.atNs);
    return { result: result, allocTrace };
  } catch (error) {
    const runControl = new Int32Array(buffers.runControl);
    Atomics.store(runControl, RC_STOP, 1);
    Atomics.notify(runControl, RC_WINDOW);
    Atomics.add(runControl, RC_DOORBELL, 1);
    Atomics.notify(runControl, RC_DOORBELL);
    throw error;
  } finally {
    over = true;
  }
}

/** An exception inside a worker's call counts as its death: the rest could only wait for it. */
async function watched<T>(worker: { name: string }, call: Promise<T>): Promise<T> {
  try {
    return await call;
  } catch (error) {
    throw new WorkerDied(worker.name, causeOf(error));
  }
}
