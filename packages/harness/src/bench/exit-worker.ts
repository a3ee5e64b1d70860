/** A vCPU that only exits, or only faults, in its own thread. */
import { FrameLedger, gfn, HostMemory, ThreadExitPort, Vcpu, ViolationLog } from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';

export interface ExitSpec {
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
  readonly violations: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly runControl: SharedArrayBuffer;
}

export class ExitWorker {
  /** Nanoseconds per exit (a register read nobody answers) or, with `faults`, per first touch of a page. */
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
    vcpu.enterGuest();
    const began = performance.now();
    for (let i = 0; i < count; i++) {
      if (faults) vcpu.store32(gfn(i), 0, i);
      else vcpu.mmioRead(0xfe_0000_0000, 4);
    }
    const ns = ((performance.now() - began) * 1e6) / count;
    vcpu.leaveGuest();
    return ns;
  }
}

exposeToParent(new ExitWorker());
