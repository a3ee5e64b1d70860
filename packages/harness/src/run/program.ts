/** What a vCPU runs. A program is stepped by its CPU worker, a slice at a time. */
import type { GuestKernel } from '@ebb/guest-kernel';

export interface Program {
  /** Runs until the vCPU's clock reaches `untilNs` (absolute) or the program has ended. In guest mode, lease held. */
  step(untilNs: number): void;
  /** Absolute virtual time of its next event; Infinity when it has ended. */
  nextDue(): number;
  readonly ended: boolean;
  /** Why the run must fail, or empty. */
  readonly failure: string;
  /** Work done since the last call, for progress and results. */
  takeEvents(): number;
}

/** Runs kernel threads and timers of an idle vCPU up to `untilNs`. */
export function idle(kernel: GuestKernel, untilNs: number): void {
  const { vcpu } = kernel;
  kernel.runDue(untilNs);
  for (let due = kernel.nextDue(); due < untilNs; due = kernel.nextDue()) {
    if (vcpu.clock < due) vcpu.clock = due;
    kernel.runDue(untilNs);
    // A thread that could not run (its mutex was taken) tries again in the next slice.
    if (kernel.nextDue() <= vcpu.clock) break;
  }
  if (vcpu.clock < untilNs) vcpu.clock = untilNs;
}
