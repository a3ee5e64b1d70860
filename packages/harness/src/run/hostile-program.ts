/** H33: a guest that writes to every page it has put in its balloon. The balloon enforces nothing; the host's memory grows back. */
import { P_NEXT, T_BALLOON, type GuestKernel } from '@ebb/guest-kernel';
import { gfn } from '@ebb/machine';
import { idle, type Program } from './program.ts';
import type { ProgramSpec } from './spec.ts';

type Spec = Extract<ProgramSpec, { kind: 'hostile-reuse' }>;

export class HostileProgram implements Program {
  failure = '';
  readonly #kernel: GuestKernel;
  readonly #at: number;
  #done = false;
  #events = 0;

  constructor(kernel: GuestKernel, spec: Spec) {
    this.#kernel = kernel;
    this.#at = kernel.vcpu.clock + spec.afterNs;
    // One vCPU is hostile, the others idle.
    if (kernel.vcpu.id !== 0) this.#done = true;
  }

  get ended(): boolean {
    return this.#done;
  }
  nextDue(): number {
    return this.#done ? Number.POSITIVE_INFINITY : this.#at;
  }
  takeEvents(): number {
    const n = this.#events;
    this.#events = 0;
    return n;
  }

  step(untilNs: number): void {
    if (!this.#done && this.#at <= untilNs) {
      idle(this.#kernel, this.#at);
      const { w, memmap } = this.#kernel.arena;
      // The driver's own list, newest first: word 4 of its state.
      for (let pfn = w[T_BALLOON + 4]; pfn >= 0; pfn = w[memmap + (pfn << 4) + P_NEXT]) {
        this.#kernel.vcpu.store32(gfn(pfn), 0, 0xbad);
        this.#events++;
      }
      this.#done = true;
    }
    idle(this.#kernel, untilNs);
  }
}
