/** A guest that reads and writes what it has unplugged (H10–H12, H32). What it gets depends on the device's profile. */
import type { GuestKernel } from '@ebb/guest-kernel';
import { gfn, hash2 } from '@ebb/machine';
import { idle, type Program } from './program.ts';
import type { ProgramSpec } from './spec.ts';

type Spec = Extract<ProgramSpec, { kind: 'hostile-unplugged' }>;

export class HostileUnpluggedProgram implements Program {
  failure = '';
  readonly #kernel: GuestKernel;
  readonly #spec: Spec;
  readonly #at: number;
  #round = 0;
  #events = 0;

  constructor(kernel: GuestKernel, spec: Spec) {
    this.#kernel = kernel;
    this.#spec = spec;
    this.#at = kernel.vcpu.clock + spec.afterNs;
  }

  get ended(): boolean {
    return this.#round >= this.#spec.rounds;
  }
  nextDue(): number {
    return this.ended ? Number.POSITIVE_INFINITY : Math.max(this.#at, this.#kernel.vcpu.clock);
  }
  takeEvents(): number {
    const n = this.#events;
    this.#events = 0;
    return n;
  }

  step(untilNs: number): void {
    const { vcpu } = this.#kernel;
    if (this.#at > vcpu.clock) idle(this.#kernel, Math.min(this.#at, untilNs));
    while (!this.ended && vcpu.clock >= this.#at && vcpu.clock < untilNs) {
      this.#sweep();
      this.#round++;
    }
    idle(this.#kernel, untilNs);
  }

  /** Every second page of the range is read, then all are written. */
  #sweep(): void {
    const { vcpu } = this.#kernel;
    for (let page = 0; page < this.#spec.pages; page++) {
      const at = gfn(this.#spec.firstGfn + page);
      if (page % 2 === 0) {
        const found = vcpu.load32(at, 7);
        const { reads } = this.#spec;
        // After the first round a page may hold what we wrote.
        const odd = reads === 'zeros' ? found !== 0 : reads === 'noise' && this.#round === 0 && found === 0;
        if (odd) this.failure = `page ${page} of unplugged memory reads ${found}`;
      }
      vcpu.store32(at, 7, hash2(page, this.#round) | 1);
      this.#events++;
    }
    vcpu.clock += this.#spec.pages * 100;
  }
}
