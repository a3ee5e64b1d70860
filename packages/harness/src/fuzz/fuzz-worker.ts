/** One thread of a controlled execution: the host, or a vCPU. Lives through many executions; told of each by Comlink. */
import {
  ControlledSchedule,
  observedAtomics,
  regionOf,
  ScheduleAborted,
  type ViolationLog,
} from '@ebb/machine';
import { exposeToParent } from '../run/worker-port.ts';
import { HostLab, VcpuLab, type LabBuffers } from './lab.ts';
import { findProperty } from './properties.ts';
import type { FuzzProgram } from './property.ts';

/** What a thread found: violations in words, and a crash if it had one. */
export interface ThreadResult {
  readonly found: readonly string[];
  readonly crash: string;
  /** Switches by pair of points; see `ControlledSchedule.switched`. */
  readonly switched: Int32Array;
}

let schedule: ControlledSchedule | null = null;
globalThis.Atomics = observedAtomics(
  () => schedule,
  (words, index) => (regionOf(words.buffer) << 24) | ((words.byteOffset / 4 + index) & 0xff_ffff),
);

export class FuzzWorker {
  #lab: LabBuffers | null = null;
  #property = '';
  #thread = 0;

  /** Gives this worker its thread number and the buffers of a property. */
  open(property: string, lab: LabBuffers, thread: number): void {
    this.#property = property;
    this.#lab = lab;
    this.#thread = thread;
  }

  /** Runs this thread's part of one program under the schedule prepared in the lab's buffer. */
  run(program: FuzzProgram): ThreadResult {
    const lab = this.#lab as LabBuffers;
    const property = findProperty(this.#property);
    const control = new ControlledSchedule(lab.schedule, this.#thread);
    const found: string[] = [];
    let crash = '';
    let log: ViolationLog | null = null;
    try {
      if (this.#thread === 0) {
        const host = new HostLab(lab, control);
        log = host.log;
        const verdict = property.host(host, program);
        schedule = control;
        control.start();
        host.serve();
        control.end();
        schedule = null;
        found.push(...host.audit(), ...verdict());
      } else {
        const vm = Math.floor((this.#thread - 1) / lab.shape.vcpus);
        const id = (this.#thread - 1) % lab.shape.vcpus;
        const cpu = new VcpuLab(lab, control, vm, id);
        schedule = control;
        control.start();
        property.cpu(cpu, program, vm, id);
        cpu.finish();
        control.end();
        schedule = null;
        found.push(...cpu.found);
      }
    } catch (error) {
      schedule = null;
      if (!(error instanceof ScheduleAborted)) {
        crash = error instanceof Error ? `${error.message}\n${error.stack ?? ''}` : String(error);
        control.abandon();
      } else if (log !== null && log.total > 0)
        found.push(`${log.total} violation(s) before it was given up`);
    }
    return { found, crash, switched: control.switched };
  }
}

exposeToParent(new FuzzWorker());
