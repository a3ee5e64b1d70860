/** L30's test application: allocates, touches, holds, frees; on every vCPU at once. */
import { MIGRATE_MOVABLE, type GuestKernel } from '@ebb/guest-kernel';
import { idle, type Program } from './program.ts';
import type { ProgramSpec } from './spec.ts';

type Spec = Extract<ProgramSpec, { kind: 'touch-free' }>;

export class TouchFreeProgram implements Program {
  failure = '';
  readonly #kernel: GuestKernel;
  readonly #spec: Spec;
  #round = 0;
  #holding = false;
  #wakeAt: number;
  readonly #pages: number[] = [];
  #events = 0;

  constructor(kernel: GuestKernel, spec: Spec) {
    this.#kernel = kernel;
    this.#spec = spec;
    this.#wakeAt = Math.max(kernel.vcpu.clock, spec.startNs ?? 0);
  }

  get ended(): boolean {
    return this.#round >= this.#spec.rounds;
  }
  nextDue(): number {
    return this.ended ? Number.POSITIVE_INFINITY : this.#wakeAt;
  }
  takeEvents(): number {
    const n = this.#events;
    this.#events = 0;
    return n;
  }

  step(untilNs: number): void {
    const { vcpu } = this.#kernel;
    while (!this.ended && this.#wakeAt <= untilNs) {
      if (this.#wakeAt > vcpu.clock) idle(this.#kernel, this.#wakeAt);
      if (this.#holding) this.#release();
      else this.#take();
      if (this.failure !== '') return;
    }
    idle(this.#kernel, untilNs);
  }

  #take(): void {
    const { alloc } = this.#kernel.parts;
    const { order, pages } = this.#spec;
    for (let n = 0; n < pages; n += 1 << order) {
      const pfn = alloc.alloc(order, MIGRATE_MOVABLE, 3);
      if (pfn < 0) {
        this.failure = `allocation ${n >> order} of order ${order} failed`;
        return;
      }
      this.#pages.push(pfn);
      this.#events++;
      if (n % 4096 === 0) this.#kernel.runDue(this.#kernel.vcpu.clock);
    }
    this.#holding = true;
    this.#wakeAt = this.#kernel.vcpu.clock + this.#spec.holdNs;
  }

  #release(): void {
    const { alloc } = this.#kernel.parts;
    for (const pfn of this.#pages) alloc.free(pfn, this.#spec.order);
    this.#events += this.#pages.length;
    this.#pages.length = 0;
    this.#holding = false;
    this.#round++;
    this.#wakeAt = this.#kernel.vcpu.clock + this.#spec.pauseNs;
  }
}
