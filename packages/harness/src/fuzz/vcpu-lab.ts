/** One vCPU of a lab, in a thread of its own. */
import {
  FrameLedger,
  HostMemory,
  nudgeSleepingHost,
  RC_DOORBELL,
  sharedI32,
  ThreadExitPort,
  Vcpu,
  ViolationLog,
  type ControlledSchedule,
} from '@ebb/machine';

import { RC_DONE, TLB_BITS, type LabBuffers, type LabShape } from './lab.ts';

export class VcpuLab {
  readonly vcpu: Vcpu;
  readonly model: Int32Array;
  readonly shape: LabShape;
  readonly schedule: ControlledSchedule;
  /** The guest kernel's arena. */
  readonly arena: SharedArrayBuffer;
  readonly found: string[] = [];
  /** The TLBs of this VM's vCPUs. */
  readonly tlbs: readonly Int32Array[];
  readonly #runControl: Int32Array;
  readonly #thread: number;

  constructor(lab: LabBuffers, schedule: ControlledSchedule, vm: number, id: number) {
    const memory = new HostMemory(lab.dram);
    this.shape = lab.shape;
    this.tlbs = lab.tlbs
      .slice(vm * lab.shape.vcpus, (vm + 1) * lab.shape.vcpus)
      .map((tlb) => new Int32Array(tlb));
    this.schedule = schedule;
    this.arena = lab.arenas[vm];
    this.model = new Int32Array(lab.model);
    this.#runControl = sharedI32('run-control', lab.runControl);
    this.#thread = vm * lab.shape.vcpus + id;
    this.vcpu = new Vcpu({
      vm,
      id,
      memory,
      ledger: new FrameLedger(lab.ledger, memory.frames),
      violations: new ViolationLog(lab.violations),
      control: lab.control,
      block: this.#thread,
      runControl: this.#runControl,
      port: new ThreadExitPort(this.#runControl, 0),
      schedule,
      tlbBits: TLB_BITS,
      tlb: lab.tlbs[this.#thread],
    });
  }

  /** The model has changed in a way that a host task may wait for. */
  tellHost(): void {
    nudgeSleepingHost(this.#runControl);
  }

  /** This thread's program has ended: tells the host's loop. */
  finish(): void {
    Atomics.store(this.#runControl, RC_DONE + this.#thread, 1);
    Atomics.add(this.#runControl, RC_DOORBELL, 1);
    Atomics.notify(this.#runControl, RC_DOORBELL);
  }
}
