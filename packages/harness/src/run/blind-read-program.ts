/**
 * A kernel that reads all of physical memory without asking what of it there is, as a crash kernel that dumps its
 * predecessor does (H21). Each vCPU reads one word of every page of its share. Whether it gets through, and what that
 * costs the host, is the device profile's doing.
 */
import type { GuestKernel } from '@ebb/guest-kernel';
import { gfn } from '@ebb/machine';
import { idle, type Program } from './program.ts';
import type { ProgramSpec } from './spec.ts';

type Spec = Extract<ProgramSpec, { kind: 'blind-read' }>;

/** Pages between looks at the clock. */
const BATCH = 256;
const READ_NS = 100;

export class BlindReadProgram implements Program {
  failure = '';
  readonly #kernel: GuestKernel;
  readonly #spec: Spec;
  #next: number;
  #events = 0;

  constructor(kernel: GuestKernel, spec: Spec) {
    this.#kernel = kernel;
    this.#spec = spec;
    this.#next = kernel.vcpu.id;
  }

  get ended(): boolean {
    return this.#next >= this.#spec.pages;
  }
  nextDue(): number {
    return this.ended ? Number.POSITIVE_INFINITY : Math.max(this.#spec.startNs, this.#kernel.vcpu.clock);
  }
  takeEvents(): number {
    const n = this.#events;
    this.#events = 0;
    return n;
  }

  step(untilNs: number): void {
    const { vcpu } = this.#kernel;
    if (this.#spec.startNs > vcpu.clock) idle(this.#kernel, Math.min(this.#spec.startNs, untilNs));
    while (!this.ended && vcpu.clock >= this.#spec.startNs && vcpu.clock < untilNs) {
      for (let i = 0; i < BATCH && !this.ended; i++) {
        vcpu.load32(gfn(this.#spec.firstGfn + this.#next), 9);
        this.#next += this.#kernel.config.nrCpus;
        this.#events++;
      }
      vcpu.clock += BATCH * READ_NS;
    }
    idle(this.#kernel, untilNs);
  }
}
