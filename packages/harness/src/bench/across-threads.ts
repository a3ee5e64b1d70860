/** Benchmarks between two threads: a split ring, the bare loops beside it, and exits. */
import { MiB } from '@ebb/machine';
import { smallMachine } from '../run/small-machine.ts';
import { spawnWorker } from '../run/worker-endpoint.ts';
import { bootAllocator, type Load } from './allocator.ts';
import type { AllocatorWorker } from './allocator-worker.ts';
import type { BareWorker } from './bare-worker.ts';
import type { ExitHostWorker } from './exit-host-worker.ts';
import type { ExitWorker } from './exit-worker.ts';
import type { RingMode, RingWorker } from './ring-worker.ts';

/** Million buffers per second across two workers. */
export async function ring(batch: number, mode: RingMode, total: number): Promise<number> {
  const buffer = new SharedArrayBuffer(MiB);
  const device = spawnWorker<RingWorker>('../bench/ring-worker', 'ring-device');
  const driver = spawnWorker<RingWorker>('../bench/ring-worker', 'ring-driver');
  try {
    // The driver resets the ring first; both are warm after a short round.
    let rate = 0;
    for (const n of [total / 10, total]) {
      new Uint8Array(buffer).fill(0);
      const sides = Promise.all([
        driver.api.driver(buffer, n, batch, mode),
        device.api.device(buffer, n, batch, mode),
      ]);
      [rate] = await Promise.race([sides, driver.died, device.died]);
    }
    return rate;
  } finally {
    await Promise.all([device.close(), driver.close()]);
  }
}

/** What plain loops over typed arrays reach between two workers: million buffers per second, and nanoseconds a round. */
export async function bare(what: 'ring' | 'words'): Promise<number> {
  const buffer = new SharedArrayBuffer(MiB);
  const one = spawnWorker<BareWorker>('../bench/bare-worker', 'bare-one');
  const other = spawnWorker<BareWorker>('../bench/bare-worker', 'bare-other');
  try {
    let figure = 0;
    for (const n of [128_000, 64 * 125_000]) {
      new Uint8Array(buffer).fill(0);
      const rounds = n / 32;
      const sides =
        what === 'ring'
          ? Promise.all([one.api.driver(buffer, n, 64), other.api.device(buffer, n, 64)])
          : Promise.all([one.api.ping(buffer, rounds), other.api.pong(buffer, rounds)]);
      [figure] = await Promise.race([sides, one.died, other.died]);
    }
    return figure;
  } finally {
    await Promise.all([one.close(), other.close()]);
  }
}

/** Nanoseconds per exit round trip, or per demand fault, between two threads; each time in new ones, since V8 compiles by chance. */
export async function exitThreads(count: number, faults: boolean): Promise<number> {
  const host = spawnWorker<ExitHostWorker>('../bench/exit-host-worker', 'exit-host');
  const cpu = spawnWorker<ExitWorker>('../bench/exit-worker', 'exits');
  try {
    let ns = 0;
    // Both sides are warm after a short round.
    for (const n of [count / 4, count]) {
      const buffers = await Promise.race([host.api.make(faults ? 256 * MiB : MiB), host.died]);
      const sides = Promise.all([cpu.api.run(buffers, n, faults), host.api.serve()]);
      [ns] = await Promise.race([sides, host.died, cpu.died]);
    }
    return ns;
  } finally {
    await Promise.all([host.close(), cpu.close()]);
  }
}

/** Nanoseconds per operation of the guest's allocator on each of two vCPUs that share a zone, in threads of their own. */
export async function buddyOnTwo(load: Load): Promise<number> {
  // Two VMs of which the first is used: a control block for each vCPU.
  const machine = smallMachine({ ramBytes: 256 * MiB, huge: 'always', vms: 2 });
  const arena = bootAllocator(machine.vms[0].vcpu(12), 2);
  const barrier = new SharedArrayBuffer(8);
  const workers = [0, 1].map((cpu) =>
    spawnWorker<AllocatorWorker>('../bench/allocator-worker', `allocator-${cpu}`),
  );
  try {
    const times = Promise.all(workers.map((w, cpu) => w.api.run(machine.buffers, arena, barrier, cpu, load)));
    const [one, other] = await Promise.race([times, ...workers.map((w) => w.died)]);
    return (one + other) / 2;
  } finally {
    await Promise.all(workers.map((w) => w.close()));
  }
}
