/** A vCPU that only exits, or only faults, in its own thread. */
import {
  FrameLedger,
  gfn,
  HostMemory,
  RC_WINDOW,
  RC_WORKER,
  RC_WORKER_DONE,
  ringDoorbell,
  ThreadExitPort,
  Vcpu,
  ViolationLog,
} from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';
import { timedInSlices } from './timed.ts';

export interface ExitSpec {
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
  readonly violations: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly runControl: SharedArrayBuffer;
}

export class ExitWorker {
  /** Nanoseconds per exit (a register read nobody answers) or, with `faults`, per first touch of a page; `count` in slices. */
  run(spec: ExitSpec, count: number, faults: boolean): number {
    const memory = new HostMemory(spec.dram);
    const runControl = new Int32Array(spec.runControl);
    const vcpu = new Vcpu({
      vm: 0,
      id: 0,
      memory,
      ledger: new FrameLedger(spec.ledger, memory.frames),
      violations: new ViolationLog(spec.violations),
      control: spec.control,
      block: 0,
      runControl,
      port: new ThreadExitPort(runControl, 20_000),
    });
    // The host stores and notifies when it opens its window, the first.
    Atomics.wait(runControl, RC_WINDOW, 0);
    vcpu.enterGuest();
    const ns = timedInSlices(count, (from, to) => {
      for (let i = from; i < to; i++) {
        if (faults) vcpu.store32(gfn(i), 0, i);
        else vcpu.mmioRead(0xfe_0000_0000, 4);
      }
    });
    vcpu.leaveGuest();
    // Ends the host's window. Pairs with its load of `done`.
    Atomics.store(runControl, RC_WORKER + RC_WORKER_DONE, Atomics.load(runControl, RC_WINDOW));
    ringDoorbell(runControl);
    return ns;
  }
}

exposeToParent(new ExitWorker());
