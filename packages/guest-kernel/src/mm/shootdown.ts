/**
 * TLB shootdown between vCPUs (`flush_tlb_others`): asks every other vCPU to forget its translations and waits. A vCPU
 * answers between program steps and in its waits. One that is between slices need not be waited for: it looks at the
 * request when it begins the next, before it uses a translation.
 */
import type { GuestMmu, Vcpu } from '@ebb/machine';
import type { Arena } from '../arena.ts';
import { MAX_CPUS, SHOOTDOWN_BASE, SHOOTDOWN_WORDS } from '../layout.ts';
import { EV, eventRow } from './events.ts';
import { PerCpuPages } from './per-cpu-pages.ts';

/** Words of a vCPU: requests (anyone adds), requests answered (its own). */
const REQUESTED = 0;
const ANSWERED = 16;

export class TlbShootdown {
  readonly #w: Int32Array;
  readonly #vcpu: Vcpu;
  readonly #mmu: GuestMmu;
  readonly #nrCpus: number;
  readonly #relax: () => void;

  /** `relax`: run while waiting; it serves what other vCPUs ask of this one, this included. */
  constructor(arena: Arena, vcpu: Vcpu, mmu: GuestMmu, nrCpus: number, relax: () => void) {
    this.#w = arena.w;
    this.#vcpu = vcpu;
    this.#mmu = mmu;
    this.#nrCpus = Math.min(nrCpus, MAX_CPUS);
    this.#relax = relax;
  }

  /** Answers requests: flush first, then say so. At the start of a slice, between steps, and in waits. */
  serve(): void {
    const at = SHOOTDOWN_BASE + this.#vcpu.id * SHOOTDOWN_WORDS;
    // Pairs with the requester's add: whoever reads the answer knows that nothing older is in this TLB.
    const requested = Atomics.load(this.#w, at + REQUESTED);
    if (requested === Atomics.load(this.#w, at + ANSWERED)) return;
    this.#mmu.flush();
    Atomics.store(this.#w, at + ANSWERED, requested);
  }

  /** Returns when no vCPU holds a translation from before the call. */
  flushAll(): void {
    const w = this.#w;
    this.#mmu.flush();
    w[eventRow(this.#vcpu.id) + EV.tlb_shootdown]++;
    const want: number[] = [];
    for (let cpu = 0; cpu < this.#nrCpus; cpu++) {
      const at = SHOOTDOWN_BASE + cpu * SHOOTDOWN_WORDS;
      want.push(cpu === this.#vcpu.id ? 0 : Atomics.add(w, at + REQUESTED, 1) + 1);
    }
    for (let cpu = 0; cpu < this.#nrCpus; cpu++) {
      if (cpu === this.#vcpu.id) continue;
      const at = SHOOTDOWN_BASE + cpu * SHOOTDOWN_WORDS;
      // Request, then look whether it is in a slice: pairs with lease, then request in `PerCpuPages.enter` and `serve`.
      while (((Atomics.load(w, at + ANSWERED) - want[cpu]) | 0) < 0 && PerCpuPages.inSlice(w, cpu))
        this.#relax();
    }
  }
}
