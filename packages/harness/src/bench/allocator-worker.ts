/** A vCPU that only allocates and frees, in its own thread, beside another in the same zone. */
import { FrameLedger, HostMemory, ThreadExitPort, Vcpu, ViolationLog } from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';
import { allocateAndFree, type Load } from './allocator.ts';
import type { ExitSpec } from './exit-worker.ts';
import { median } from './timed.ts';

/**
 * Words of the barrier, written by both: how many have come, and how often both had. Who comes first waits for `TURN` to move.
 */
const COME = 0;
const TURN = 1;

export class AllocatorWorker {
  /** Nanoseconds per operation of vCPU `cpu` of two, in the middle one of its rounds: in some the other was late. */
  run(spec: ExitSpec, arena: SharedArrayBuffer, barrier: SharedArrayBuffer, cpu: number, load: Load): number {
    const memory = new HostMemory(spec.dram);
    const runControl = new Int32Array(spec.runControl);
    const vcpu = new Vcpu({
      vm: 0,
      id: cpu,
      memory,
      ledger: new FrameLedger(spec.ledger, memory.frames),
      violations: new ViolationLog(spec.violations),
      control: spec.control,
      block: cpu,
      runControl,
      port: new ThreadExitPort(runControl, 20_000),
    });
    const words = new Int32Array(barrier);
    const together = (): void => {
      const turn = Atomics.load(words, TURN);
      if (Atomics.add(words, COME, 1) === 1) {
        Atomics.store(words, COME, 0);
        Atomics.add(words, TURN, 1);
      } else while (Atomics.load(words, TURN) === turn) Atomics.pause();
    };
    vcpu.enterGuest();
    const ns = median(allocateAndFree(arena, vcpu, load, 0.5, together));
    vcpu.leaveGuest();
    return ns;
  }
}

exposeToParent(new AllocatorWorker());
