/**
 * The invalidation stress: vCPUs in threads hammer pages while the host takes them away, thousands of times. Checks that
 * no stale write lands in a freed frame (full poison and generation gate) and that no dirty bit is lost: a frame that
 * is given back with content must have been marked dirty by zap or split (I4, I17, I18).
 */
import {
  FrameLedger,
  freeSchedule,
  HostMemory,
  ledgerBytes,
  MiB,
  MODE_OUTSIDE,
  PAGE_SIZE,
  Prng,
  RC_STOP,
  RUN_CONTROL_BYTES,
  VC_MODE,
  VCPU_BLOCK_BYTES,
  VCPU_BLOCK_WORDS,
  ViolationLog,
  type Hfn,
} from '@ebb/machine';
import { MemFile, type FrameSource, type HugePolicy } from '@ebb/memfs';
import { FRAME_DIRTY, FramePool, HostTasks, Vm, type TaskBody } from '@ebb/host-kvm';
import { spawnWorker } from '../run/worker-endpoint.ts';
import { turn } from '../run/worker-port.ts';
import { HOT_PAGES } from './hot-pages.ts';
import type { HammerWorker } from './hammer-worker.ts';

export interface HammerResult {
  readonly discards: number;
  readonly stores: number;
  readonly flushes: number;
  readonly flushWaits: number;
  readonly faultRetries: number;
  readonly splits: number;
  readonly violations: number;
  readonly kinds: readonly string[];
}

/**
 * Runs `discards` invalidations of random ranges against two hammering vCPUs. Every sixteenth waits until a vCPU is in guest
 * mode, so that there is one to be awaited on a machine of any number of cores.
 */
export async function hammer(options: {
  readonly discards: number;
  readonly huge: HugePolicy;
  readonly seed: number;
}): Promise<HammerResult> {
  const memory = new HostMemory(new SharedArrayBuffer(48 * MiB));
  const ledgerBuffer = new SharedArrayBuffer(ledgerBytes(memory.frames));
  const ledger = new FrameLedger(ledgerBuffer, memory.frames);
  const violations = ViolationLog.create();
  const log = new ViolationLog(violations);
  const pool = new FramePool({ memory, ledger, violations: log, frames: memory.frames, poison: 'full' });
  const tasks = new HostTasks(freeSchedule);
  const control = new SharedArrayBuffer(2 * VCPU_BLOCK_BYTES);
  const runControl = new SharedArrayBuffer(RUN_CONTROL_BYTES);
  const vm = new Vm({
    id: 0,
    nrVcpus: 2,
    control,
    firstBlock: 0,
    pool,
    tasks,
    violations: log,
    schedule: freeSchedule,
    tableLive: new Int32Array(memory.frames),
  });
  // Frames go back through this door: content without a dirty mark is a lost dirty bit.
  const frames: FrameSource = {
    allocZeroed: (order, owner) => pool.allocZeroed(order, owner),
    free(first: Hfn, count: number) {
      for (let f = first as number; f < first + count; f++) {
        if ((pool.frameFlags[f] & FRAME_DIRTY) !== 0) continue;
        for (let w = 0; w < 1024; w++) {
          if (memory.i32[f * 1024 + w] === 0) continue;
          log.record({
            kind: 'lost-dirty',
            actor: 'kvm',
            vm: 0,
            vcpu: -1,
            gfn: -1,
            hfn: f,
            expected: 0,
            found: memory.i32[f * 1024 + w],
            owner: ledger.owner[f],
            stepTaken: ledger.stepTaken[f],
            stepReleased: 0,
          });
          break;
        }
      }
      pool.free(first, count);
    },
  };
  const pages = (16 * MiB) / PAGE_SIZE;
  const file = new MemFile({ name: 'ram', nrBlocks: pages, vm: 0, frames, huge: options.huge });
  const random = new Prng(options.seed);
  const blocks = new Int32Array(control);
  const inGuestMode = (): boolean =>
    [0, 1].some((v) => Atomics.load(blocks, v * VCPU_BLOCK_WORDS + VC_MODE) !== MODE_OUTSIDE);
  let done = 0;
  let finished = false;
  const body = function* (): TaskBody {
    yield* vm.setUserMemoryRegion({
      slot: 0,
      flags: 0,
      guestPhysAddr: 0,
      memorySize: 16 * MiB,
      file,
      fileOffset: 0,
    });
    yield () => vm.counters.eptViolations > 5;
    for (; done < options.discards; done++) {
      const hot = random.below(4) > 0;
      const count = !hot && random.below(2) === 0 ? 512 : 1 + random.below(4);
      const first =
        count === 512 ? 512 * random.below(pages / 512) : random.below((hot ? HOT_PAGES : pages) - count);
      if (done % 16 === 0) yield inGuestMode;
      yield* vm.discard(Int32Array.of(first, count), 1);
      // Until a vCPU has touched a hot page again: there is always a mapping to take away, and somebody using it.
      if (hot) yield () => vm.mmu.leafLevel(first) > 0;
    }
    finished = true;
  };
  tasks.spawn('discards', body());
  const words = new Int32Array(runControl);
  const workers = [0, 1].map((i) => spawnWorker<HammerWorker>('../check/hammer-worker', `hammer${i}`));
  const runs = workers.map((worker, vcpu) =>
    Promise.race([
      worker.api.run({
        dram: memory.buffer,
        ledger: ledgerBuffer,
        violations,
        control,
        runControl,
        pages,
        vcpu,
        seed: options.seed,
      }),
      worker.died,
    ]),
  );
  try {
    // The host serves from the first touch on; a discard may wait for a vCPU that is in guest mode.
    while (!finished) {
      for (let i = 0; i < 2000 && !finished; i++) {
        vm.scanExits();
        tasks.step();
      }
      await Promise.race([turn(), ...workers.map((worker) => worker.died)]);
    }
    Atomics.store(words, RC_STOP, 1);
    let ended = false;
    const all = Promise.all(runs).finally(() => {
      ended = true;
    });
    while (!ended) {
      vm.scanExits();
      tasks.step();
      await turn();
    }
    const stores = await all;
    return {
      discards: done,
      stores: stores[0] + stores[1],
      flushes: vm.counters.tlbFlushes,
      flushWaits: vm.counters.flushWaits,
      faultRetries: vm.counters.faultRetries,
      splits: vm.mmu.counters.splits,
      violations: log.total,
      kinds: log.list().map((v) => v.kind),
    };
  } finally {
    await Promise.all(workers.map((worker) => worker.close()));
  }
}
