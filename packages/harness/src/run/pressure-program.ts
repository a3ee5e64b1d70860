/**
 * A guest with less memory than its files: streams, rewrites and re-reads them so that kswapd, direct reclaim,
 * write-back and the OOM notifier all run, and checks every byte it reads back. Each vCPU has files of its own; the
 * model of what they hold is this program's array of page versions, independent of the kernel.
 *
 * Phases per vCPU: write every page; then rounds of reading everything and rewriting a third of it; then a hog that
 * allocates unmovable memory until the OOM notifier must let the balloon go; then sync and a last full read.
 */
import { MIGRATE_UNMOVABLE, type GuestKernel } from '@ebb/guest-kernel';
import { hash2, Prng } from '@ebb/machine';
import { idle, type Program } from './program.ts';
import type { ProgramSpec } from './spec.ts';

type Spec = Extract<ProgramSpec, { kind: 'pressure' }>;

/** Words of a page; all are written and all are compared. */
const WORDS = 1024;
/** Pages handled between looks at interrupts and threads. */
const THREADS_EVERY = 16;

export class PressureProgram implements Program {
  failure = '';
  readonly #kernel: GuestKernel;
  readonly #spec: Spec;
  readonly #random: Prng;
  /** Version of each page of this vCPU's files; what the disk and the cache must agree on. */
  readonly #versions: Int32Array;
  readonly #buffer = new Int32Array(WORDS);
  readonly #read = new Int32Array(WORDS);
  readonly #hog: number[] = [];
  #phase: 'fill' | 'rounds' | 'hog' | 'sync' | 'verify' | 'done' = 'fill';
  #cursor = 0;
  #round = 0;
  #events = 0;

  constructor(kernel: GuestKernel, spec: Spec) {
    this.#kernel = kernel;
    this.#spec = spec;
    this.#random = new Prng(spec.seed * 1000 + kernel.vcpu.id);
    this.#versions = new Int32Array(spec.files * spec.pagesPerFile);
  }

  get ended(): boolean {
    return this.#phase === 'done';
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
    let n = 0;
    while (!this.ended && this.failure === '' && vcpu.clock < untilNs) {
      if (n++ % THREADS_EVERY === 0) this.#kernel.runDue(untilNs);
      this.#one();
      this.#events++;
      // A page touched costs the program about a microsecond of its own.
      vcpu.clock += 1000;
    }
    idle(this.#kernel, untilNs);
  }

  #inode(page: number): number {
    return this.#kernel.vcpu.id * this.#spec.files + Math.floor(page / this.#spec.pagesPerFile);
  }
  #index(page: number): number {
    return page % this.#spec.pagesPerFile;
  }

  #one(): void {
    const nr = this.#versions.length;
    switch (this.#phase) {
      case 'fill':
        this.#write(this.#cursor);
        this.#next(nr, 'rounds');
        return;
      case 'rounds':
        this.#check(this.#cursor);
        if (this.#random.below(3) === 0) this.#write(this.#random.below(nr));
        if (++this.#cursor < nr) return;
        this.#cursor = 0;
        if (++this.#round >= this.#spec.rounds) this.#phase = 'hog';
        return;
      case 'hog':
        this.#takeOne();
        return;
      case 'sync':
        if (!this.#kernel.parts.reclaim.sync()) this.failure = 'dirty pages could not be written back';
        if (!this.#kernel.parts.blk.flush()) this.failure = 'the disk could not be flushed';
        this.#phase = 'verify';
        return;
      case 'verify':
        this.#check(this.#cursor);
        this.#next(nr, 'done');
        return;
      case 'done':
        return;
    }
  }

  #next(nr: number, phase: 'rounds' | 'done'): void {
    if (++this.#cursor < nr) return;
    this.#cursor = 0;
    this.#phase = phase;
  }

  /** Takes unmovable pages until the share is reached; the balloon's OOM notifier has to help. Then gives them back. */
  #takeOne(): void {
    const { alloc } = this.#kernel.parts;
    // One vCPU takes memory; the other goes on with its files.
    if (this.#kernel.vcpu.id === 0 && this.#hog.length < this.#spec.hogPages) {
      const pfn = alloc.alloc(0, MIGRATE_UNMOVABLE, 2);
      if (pfn >= 0) {
        this.#hog.push(pfn);
        return;
      }
    }
    for (const pfn of this.#hog) alloc.free(pfn, 0);
    if (this.#kernel.vcpu.id === 0 && this.#hog.length < this.#spec.hogPages)
      this.#kernel.count('oom_kill', 1);
    this.#hog.length = 0;
    this.#phase = 'sync';
  }

  #pattern(page: number, version: number): void {
    const seed = hash2(this.#inode(page), this.#index(page)) ^ (version * 0x9e3779b1);
    for (let i = 0; i < WORDS; i++) this.#buffer[i] = Math.imul(seed + i, 0x85ebca6b) ^ i;
  }

  #write(page: number): void {
    this.#versions[page]++;
    this.#pattern(page, this.#versions[page]);
    if (!this.#kernel.parts.cache.write(this.#inode(page), this.#index(page), this.#buffer))
      this.failure = `page ${page} could not be written`;
  }

  #check(page: number): void {
    if (!this.#kernel.parts.cache.read(this.#inode(page), this.#index(page), this.#buffer)) {
      this.failure = `page ${page} could not be read`;
      return;
    }
    this.#read.set(this.#buffer);
    this.#pattern(page, this.#versions[page]);
    for (let i = 0; i < WORDS; i++) {
      if (this.#read[i] === this.#buffer[i]) continue;
      this.failure = `word ${i} of page ${this.#index(page)} of file ${this.#inode(page)} is wrong`;
      this.#kernel.vcpu.report('stamp', page, this.#buffer[i], this.#read[i]);
      return;
    }
  }
}
