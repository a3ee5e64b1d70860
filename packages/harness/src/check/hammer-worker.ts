/**
 * A vCPU that does nothing but store to random pages of its VM, in its own thread, while the host takes pages away.
 * Each store writes a value that names vCPU and sequence, so a write that lands where it may not can be traced.
 */
import {
  FrameLedger,
  gfn,
  HostMemory,
  Prng,
  RC_STOP,
  RunStopped,
  ThreadExitPort,
  Vcpu,
  ViolationLog,
} from '@ebb/machine';
import { HOT_PAGES } from './hot-pages.ts';
import { exposeToParent, turn } from '../run/worker-port.ts';

export interface HammerSpec {
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
  readonly violations: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly runControl: SharedArrayBuffer;
  readonly pages: number;
  readonly vcpu: number;
  readonly seed: number;
}

export class HammerWorker {
  /** Hammers until `stop`; returns the number of stores. */
  async run(spec: HammerSpec): Promise<number> {
    const memory = new HostMemory(spec.dram);
    const runControl = new Int32Array(spec.runControl);
    const vcpu = new Vcpu({
      vm: 0,
      id: spec.vcpu,
      memory,
      ledger: new FrameLedger(spec.ledger, memory.frames),
      violations: new ViolationLog(spec.violations),
      control: spec.control,
      block: spec.vcpu,
      runControl,
      port: new ThreadExitPort(runControl, 300),
      tlbBits: 12,
    });
    const random = new Prng(spec.seed + spec.vcpu);
    let stores = 0;
    try {
      while (Atomics.load(runControl, RC_STOP) === 0) {
        vcpu.enterGuest();
        for (let i = 0; i < 2000; i++) {
          // Mostly a few hot pages, so that what the host takes is in a TLB at that moment.
          const page = gfn(random.below(random.below(4) > 0 ? HOT_PAGES : spec.pages));
          const word = random.below(1024);
          // Sometimes only a read, so that A without D occurs too.
          if ((stores & 7) === 7) vcpu.load32(page, word);
          else vcpu.store32(page, word, (spec.vcpu << 28) | (stores & 0xfffffff) | 1);
          stores++;
        }
        vcpu.leaveGuest();
        await turn();
      }
    } catch (error) {
      if (!(error instanceof RunStopped)) throw error;
    }
    return stores;
  }
}

exposeToParent(new HammerWorker());
