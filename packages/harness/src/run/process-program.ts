/**
 * Processes at work: they map, store, read back, fork, share, give pages up and exit, on every vCPU at once, while memory
 * comes and goes beneath them. The model of what each page holds is this program's own; every load is compared with it.
 *
 * One process is shared: each vCPU runs a thread in it and owns every n-th page. All others belong to one vCPU.
 */
import type { GuestKernel } from '@ebb/guest-kernel';
import { Prng } from '@ebb/machine';
import { idle, type Program } from './program.ts';
import type { ProgramSpec } from './spec.ts';

type Spec = Extract<ProgramSpec, { kind: 'processes' }>;

/** Pages of the shared process, and of each other. */
const SHARED_PAGES = 256;
/** Operations between looks at interrupts and threads. */
const THREADS_EVERY = 8;

interface Owned {
  readonly id: number;
  /** What was stored last, by page; pages without an entry hold zeros. */
  readonly values: Map<number, number>;
}

export class ProcessProgram implements Program {
  failure = '';
  readonly #kernel: GuestKernel;
  readonly #spec: Spec;
  readonly #random: Prng;
  readonly #words: Int32Array;
  readonly #owned: Owned[] = [];
  #shared: Owned | null = null;
  #done = 0;
  #events = 0;
  #sequence = 0;

  /** `words`: where vCPU 0 tells the others the shared process. */
  constructor(kernel: GuestKernel, spec: Spec, words: SharedArrayBuffer) {
    this.#kernel = kernel;
    this.#spec = spec;
    this.#words = new Int32Array(words);
    this.#random = new Prng(spec.seed * 100 + kernel.vcpu.id);
  }

  get ended(): boolean {
    return this.#done >= this.#spec.operations;
  }
  nextDue(): number {
    return this.ended ? Number.POSITIVE_INFINITY : this.#kernel.vcpu.clock;
  }
  takeEvents(): number {
    const n = this.#events;
    this.#events = 0;
    return n;
  }

  step(untilNs: number): void {
    const { vcpu } = this.#kernel;
    if (this.#shared === null) this.#join();
    while (this.#shared !== null && !this.ended && this.failure === '' && vcpu.clock < untilNs) {
      if (this.#done % THREADS_EVERY === 0) this.#kernel.runDue(untilNs);
      this.#one();
      this.#done++;
      this.#events++;
      vcpu.clock += this.#spec.pauseNs;
      if (this.ended) this.#finish();
    }
    idle(this.#kernel, untilNs);
  }

  /** vCPU 0 makes the shared process; the others find its number. */
  #join(): void {
    if (this.#kernel.vcpu.id === 0) {
      const id = this.#kernel.parts.processes.create(SHARED_PAGES);
      if (id < 0) this.failure = 'no memory for the first process';
      Atomics.store(this.#words, 0, id + 1);
    }
    const id = Atomics.load(this.#words, 0) - 1;
    if (id >= 0) this.#shared = { id, values: new Map() };
  }

  #one(): void {
    const { processes } = this.#kernel.parts;
    const what = this.#random.below(100);
    if (this.#owned.length === 0 || (what < 4 && this.#owned.length < this.#spec.processes)) {
      const id = processes.create(this.#spec.pages);
      if (id >= 0) this.#owned.push({ id, values: new Map() });
      return;
    }
    const mine = this.#owned[this.#random.below(this.#owned.length)];
    if (what < 8) this.#fork(mine);
    else if (what < 12) this.#exit(mine);
    else if (what < 50) this.#store(mine, this.#random.below(this.#spec.pages));
    else if (what < 70) this.#check(mine, this.#random.below(this.#spec.pages));
    else if (what < 75) this.#discard(mine, this.#random.below(this.#spec.pages));
    else this.#inShared(what);
  }

  /** The thread's own pages of the shared process. */
  #inShared(what: number): void {
    const shared = this.#shared;
    if (shared === null) return;
    const { nrCpus } = this.#kernel.config;
    const vpn = this.#random.below(Math.floor(SHARED_PAGES / nrCpus)) * nrCpus + this.#kernel.vcpu.id;
    if (what < 90) this.#store(shared, vpn);
    else if (what < 98) this.#check(shared, vpn);
    else this.#discard(shared, vpn);
  }

  #store(process: Owned, vpn: number): void {
    const value = ((this.#kernel.vcpu.id + 1) << 28) | (++this.#sequence & 0xfffffff);
    if (!this.#kernel.parts.processes.store32(process.id, vpn, 9, value)) {
      this.failure = `no memory for page ${vpn} of process ${process.id}`;
      return;
    }
    process.values.set(vpn, value);
  }

  #check(process: Owned, vpn: number): void {
    const want = process.values.get(vpn) ?? 0;
    const found = this.#kernel.parts.processes.load32(process.id, vpn, 9);
    if (found === want) return;
    if (found === undefined) this.failure = `no memory for page ${vpn} of process ${process.id}`;
    else {
      this.failure = `page ${vpn} of process ${process.id} holds 0x${(found >>> 0).toString(16)}, its last store was 0x${(want >>> 0).toString(16)}`;
      this.#kernel.vcpu.report('stamp', vpn, want, found);
    }
  }

  #discard(process: Owned, vpn: number): void {
    this.#kernel.parts.processes.discard(process.id, vpn);
    process.values.delete(vpn);
  }

  #fork(parent: Owned): void {
    if (this.#owned.length >= this.#spec.processes) return;
    const id = this.#kernel.parts.processes.fork(parent.id);
    if (id >= 0) this.#owned.push({ id, values: new Map(parent.values) });
  }

  #exit(process: Owned): void {
    for (const vpn of process.values.keys()) this.#check(process, vpn);
    this.#kernel.parts.processes.exit(process.id);
    this.#owned.splice(this.#owned.indexOf(process), 1);
  }

  #finish(): void {
    while (this.#owned.length > 0) this.#exit(this.#owned[0]);
    const shared = this.#shared;
    if (shared !== null) for (const vpn of shared.values.keys()) this.#check(shared, vpn);
  }
}
