/** The benchmarks: each returns figures of one run; `main.ts` repeats them, pairs them with their counterparts, and prints. */
import { arch } from 'node:os';
import { ControlledSchedule, gfn, MiB, NS_PER_S, PAGE_SIZE, ScheduleBuffer } from '@ebb/machine';
import { fuzz } from '../fuzz/fuzz.ts';
import { loadTrace } from '../compare/options.ts';
import { hostBuffers, runBuffers, type HostBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import { guestOf, REPLAY_DISK_BYTES } from '../run/guest-of.ts';
import { runInline } from '../run/inline-run.ts';
import type { RunSpec } from '../run/spec.ts';
import { runThreads, ThreadPool } from '../run/threads-run.ts';
import { makePlan } from '../trace/replay-plan.ts';
import { smallMachine } from '../run/small-machine.ts';
import { allocateAndFree, bootAllocator, type Load } from './allocator.ts';
import { timed, timedInSlices } from './timed.ts';

export * from './across-threads.ts';
export * from './vcpu-access.ts';

export const ARCH: string = arch();

/** Nanoseconds of one EPT violation served inline by an exit nobody answers (cost without a page). */
export function exitInline(count: number): number {
  const vcpu = smallMachine({ ramBytes: 64 * MiB, huge: 'never' }).vms[0].vcpu(15);
  vcpu.enterGuest();
  return timedInSlices(count, (from, to) => {
    for (let i = from; i < to; i++) vcpu.mmioRead(0xfe_0000_0000, 4);
  });
}

/**
 * Nanoseconds per first touch of a page: violation, frame, zeroing, mapping, store. The pages go back to the host between
 * rounds, so that only the guest's touch is the first, not this process's.
 */
export function demandZero(): number {
  const pages = 65536;
  const machine = smallMachine({ ramBytes: pages * PAGE_SIZE, huge: 'never' });
  const vcpu = machine.vms[0].vcpu(15);
  let best = Number.POSITIVE_INFINITY;
  for (let round = 0; round < 5; round++) {
    vcpu.enterGuest();
    best = Math.min(
      best,
      timed(pages, () => {
        for (let p = 0; p < pages; p++) vcpu.store32(gfn(p), 0, p);
      }),
    );
    vcpu.leaveGuest();
    machine.finish(machine.vms[0].vm.discard(Int32Array.of(0, pages), 1));
  }
  return best;
}

/** Nanoseconds per operation of the guest's allocator, one vCPU on this thread. */
export function buddy(load: Load): number {
  const vcpu = smallMachine({ ramBytes: 512 * MiB, huge: 'always' }).vms[0].vcpu(12);
  vcpu.enterGuest();
  return Math.min(...allocateAndFree(bootAllocator(vcpu, 1), vcpu, load, 1, () => {}));
}

let host: HostBuffers | null = null;

/**
 * Kernel events replayed per second (millions), ledger on, two vCPUs: the reporting trace on one VM. The boot, which builds
 * the memmap and touches 160 MiB, is timed by a run without events and taken off.
 */
export async function replay(schedule: 'threads' | 'inline'): Promise<number> {
  const trace = loadTrace('reporting');
  const plan = makePlan(trace, 2);
  host ??= hostBuffers(640 * MiB);
  const pool = schedule === 'threads' ? new ThreadPool(2) : null;
  const time = async (from: Int32Array): Promise<number> => {
    const spec: RunSpec = {
      hostFrames: (640 * MiB) / PAGE_SIZE,
      backing: 'thp',
      vms: [
        {
          bootAtNs: 0,
          guest: guestOf(trace, { vcpus: 2, balloon: false }),
          program: { kind: 'replay', plan: { ...plan, from } },
          diskBytes: REPLAY_DISK_BYTES,
        },
      ],
      vcpusPerVm: 2,
      workers: 2,
      sampleNs: NS_PER_S,
      graceNs: 0,
      traceOut: false,
      poison: 'edges',
    };
    let best = Number.POSITIVE_INFINITY;
    for (let round = 0; round < 4; round++) {
      const buffers = runBuffers(spec, host as HostBuffers);
      const began = performance.now();
      if (pool === null) runInline(spec, buffers, (_vm, bytes) => fileStorage(bytes));
      else await runThreads(spec, buffers, pool);
      best = Math.min(best, performance.now() - began);
    }
    return best;
  };
  try {
    const all = await time(plan.from);
    const boot = await time(new Int32Array(new SharedArrayBuffer(plan.from.byteLength)));
    return plan.count / (all - boot) / 1000;
  } finally {
    await pool?.close();
  }
}

/** Nanoseconds of a schedule point that does not switch. */
export function pointCost(): number {
  const buffer = new ScheduleBuffer();
  let best = Number.POSITIVE_INFINITY;
  for (let round = 0; round < 5; round++) {
    const count = 500_000;
    buffer.prepare({
      threads: 1,
      strategy: 'random',
      seed: 1,
      depth: 0,
      length: 1,
      choices: [],
      limit: 2 * count,
    });
    const schedule = new ControlledSchedule(buffer.buffer, 0);
    schedule.start();
    best = Math.min(
      best,
      timed(count, () => {
        for (let i = 0; i < count; i++) schedule.point('section', i);
      }),
    );
  }
  return best;
}

/** Controlled executions of a property: per second over all cores, and points in each. */
export async function executions(
  property: 'invalidation' | 'queue',
  strategy: 'random' | 'pct',
): Promise<{ perSecond: number; points: number; pointsPerSecond: number }> {
  const milliseconds = 6000;
  const result = await fuzz(
    {
      properties: [property],
      runs: 0,
      milliseconds,
      seed: 1,
      strategy,
      preemptions: 0,
      workers: 0,
      keepGoing: true,
      shrinkMilliseconds: 0,
    },
    () => undefined,
  );
  return {
    perSecond: (result.runs * 1000) / milliseconds,
    points: result.points / result.runs,
    pointsPerSecond: (result.points * 1000) / milliseconds,
  };
}
