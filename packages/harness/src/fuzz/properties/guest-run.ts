/** One vCPU of a guest property: its operations on a real guest kernel, and what it expects of each. */
import { GuestKernel, PerCpuPages, Z_FREE } from '@ebb/guest-kernel';
import { assert, combinedReaches, gfn, NS_PER_MS, NS_PER_S, VmKilled } from '@ebb/machine';
import { allocatedPages } from '../guest-audit.ts';
import type { VcpuLab } from '../vcpu-lab.ts';
import type { Op } from '../property.ts';
import {
  ALL_DONE,
  ALLOCATED_AT_START,
  AREA_PAGES,
  COMMANDS,
  fillsMemory,
  guestConfig,
  FREE_AT_START,
  type GuestKind,
  HELD_AT_END,
  KEPT_PAGES,
  OPS_DONE,
  pattern,
  PROCESSES_ON,
  SET_UP,
  SHARED_PROCESS,
  versionWord,
} from './guest-model.ts';

interface Process {
  readonly id: number;
  /** What its pages hold; a page without an entry holds zeros. */
  readonly values: Map<number, number>;
  /** Pages that the other vCPU's thread may have been storing into during a fork: the first look tells what they hold. */
  readonly unknown: Set<number>;
}

interface Held {
  readonly pfn: number;
  readonly order: number;
  value: number;
}

class GuestRun {
  readonly #kernel: GuestKernel;
  readonly #lab: VcpuLab;
  readonly #id: number;
  readonly #held: Held[] = [];
  readonly #buffer = new Int32Array(1024);
  #sequence = 0;
  /** Processes of this vCPU; the first is shared, with every other page its own. */
  readonly #processes: Process[] = [{ id: SHARED_PROCESS, values: new Map(), unknown: new Set() }];

  constructor(kernel: GuestKernel, lab: VcpuLab, id: number) {
    this.#kernel = kernel;
    this.#lab = lab;
    this.#id = id;
  }

  /** Pages of the allocations it has not freed. */
  get heldPages(): number {
    return this.#held.reduce((sum, { order }) => sum + (1 << order), 0);
  }

  #complain(what: string): void {
    this.#lab.found.push(`vCPU ${this.#id}: ${what}`);
  }

  one({ op, a, b }: Op): void {
    const { vcpu } = this.#kernel;
    switch (op) {
      case 'alloc':
        this.#alloc(a % 4, b % 3);
        break;
      case 'many':
        for (let i = 0; i < a; i++) this.#alloc(0, 1);
        break;
      case 'free':
        this.#free(a);
        break;
      case 'free-many':
        for (let i = 0; i < a; i++) this.#free(a * 7 + i);
        break;
      case 'verify':
        this.#verify(a);
        break;
      case 'time':
        vcpu.clock += (a & 1) === 0 ? 2.2 * NS_PER_S : 250 * NS_PER_MS;
        this.due();
        break;
      case 'write':
        this.#write(a % KEPT_PAGES);
        break;
      case 'read':
        this.#read(a % KEPT_PAGES);
        break;
      case 'peek':
        this.#peek(a % KEPT_PAGES);
        break;
      case 'drop':
        this.#drop();
        break;
      case 'sync':
        this.#kernel.parts.reclaim.sync();
        break;
      case 'store':
        this.#store(this.#process(a), b);
        break;
      case 'load':
        this.#load(this.#process(a), b);
        break;
      case 'hammer':
        // Through one translation, as long as it lasts: what moves its page meanwhile must tell it.
        for (let i = 0; i < 6; i++) {
          this.#store(this.#processes[0], b);
          this.#load(this.#processes[0], b);
        }
        break;
      case 'discard':
        this.#discard(this.#process(a), b);
        break;
      case 'fork':
        this.#fork(a, b);
        break;
      case 'exit':
        this.#exit(a);
        break;
      case 'starve':
        this.#kernel.parts.alloc.failNext = 1 + (a % 3);
        break;
      case 'drain':
        this.#kernel.parts.pcp.drainAll(this.#kernel.config.nrCpus);
        break;
      case 'rebind':
        this.#rebind();
        break;
      case 'slice':
        this.#kernel.leave();
        // Away for a while, so that others may ask for something meanwhile.
        for (let i = 0; i < b; i++) this.#lab.schedule.point('wait', 0);
        this.#kernel.enter();
        // What it was told to forget while it was away must be forgotten now.
        if (this.#lab.model[PROCESSES_ON] !== 0) this.#load(this.#process(a), b);
        break;
    }
  }

  due(): void {
    this.#kernel.runDue(this.#kernel.vcpu.clock + NS_PER_MS);
  }

  #alloc(order: number, migratetype: number): void {
    const { alloc } = this.#kernel.parts;
    const pfn = alloc.alloc(order, migratetype, 2);
    if (pfn < 0) return;
    const value = (this.#id << 24) | ++this.#sequence;
    for (let i = 0; i < 1 << order; i++) {
      // `init_on_alloc`: nobody sees what was there before.
      const before = this.#kernel.vcpu.load32(gfn(pfn + i), 5);
      if (before !== 0 && this.#kernel.config.initOnAlloc)
        this.#complain(`fresh page ${pfn + i} holds 0x${(before >>> 0).toString(16)}, not zero (I2)`);
      this.#kernel.vcpu.store32(gfn(pfn + i), 5, value);
    }
    this.#held.push({ pfn, order, value });
  }

  #verify(which: number): void {
    if (this.#held.length === 0) return;
    const { pfn, order, value } = this.#held[which % this.#held.length];
    for (let i = 0; i < 1 << order; i++) {
      const found = this.#kernel.vcpu.load32(gfn(pfn + i), 5);
      if (found !== value)
        this.#complain(
          `page ${pfn + i} holds 0x${(found >>> 0).toString(16)}, its owner stored 0x${value.toString(16)} (I15)`,
        );
    }
  }

  #free(which: number): void {
    if (this.#held.length === 0) return;
    const index = which % this.#held.length;
    this.#verify(index);
    const [{ pfn, order }] = this.#held.splice(index, 1);
    this.#kernel.parts.alloc.free(pfn, order);
  }

  #write(index: number): void {
    const version = this.#lab.model[versionWord(this.#id, index)] + 1;
    for (let i = 0; i < 1024; i++) this.#buffer[i] = pattern(this.#id, index, version, i);
    if (this.#kernel.parts.cache.write(this.#id, index, this.#buffer))
      this.#lab.model[versionWord(this.#id, index)] = version;
  }

  #read(index: number): void {
    if (!this.#kernel.parts.cache.read(this.#id, index, this.#buffer)) return;
    const version = this.#lab.model[versionWord(this.#id, index)];
    for (const word of [0, 7, 1023]) {
      const want = version === 0 ? 0 : pattern(this.#id, index, version, word);
      if (this.#buffer[word] !== want) {
        this.#complain(`word ${word} of file page ${index} is not that of version ${version}`);
        return;
      }
    }
  }

  // ── Processes ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Every other time the one that both vCPUs work in: there a move meets a thread elsewhere. */
  #process(which: number): Process {
    return this.#processes[(which & 1) === 0 ? 0 : (which >> 1) % this.#processes.length];
  }

  /** A page of the process that is this vCPU's to use. */
  #page(process: number, which: number): number {
    const page = which % AREA_PAGES;
    return process === SHARED_PROCESS ? page - (page % 2) + this.#id : page;
  }

  #store({ id, values, unknown }: Process, b: number): void {
    const vpn = this.#page(id, b);
    const value = ((this.#id + 1) << 28) | ++this.#sequence;
    if (!this.#kernel.parts.processes.store32(id, vpn, 9, value)) return;
    values.set(vpn, value);
    unknown.delete(vpn);
  }

  #load({ id, values, unknown }: Process, b: number): void {
    const vpn = this.#page(id, b);
    const found = this.#kernel.parts.processes.load32(id, vpn, 9);
    if (found === undefined) return;
    // From now on it must stay what it is: the parent's stores are not the child's.
    if (unknown.delete(vpn) && (found === 0 || found >>> 28 === 2 - this.#id)) values.set(vpn, found);
    const want = values.get(vpn) ?? 0;
    if (found !== want)
      this.#complain(
        `page ${vpn} of process ${id} holds 0x${(found >>> 0).toString(16)}, its last store was 0x${(want >>> 0).toString(16)} (I22)`,
      );
  }

  #discard({ id, values, unknown }: Process, b: number): void {
    const vpn = this.#page(id, b);
    this.#kernel.parts.processes.discard(id, vpn);
    values.delete(vpn);
    unknown.delete(vpn);
  }

  /** The balloon's driver is unbound and bound again, on vCPU 0, while the other CPU goes on. */
  #rebind(): void {
    const { balloon } = this.#kernel.parts;
    if (this.#kernel.vcpu.id !== 0 || !balloon.ready) return;
    balloon.remove();
    assert(balloon.reload(), 'a device that was there is there again');
  }

  /** A process, or a copy of one, with a store of the parent before and after and a look from the child, as `b` says. */
  #fork(a: number, b: number): void {
    const { processes } = this.#kernel.parts;
    if (this.#processes.length > 4) return;
    if (this.#processes.length === 1 && (a & 2) === 0) {
      const id = processes.create(AREA_PAGES);
      if (id >= 0) this.#processes.push({ id, values: new Map(), unknown: new Set() });
      return;
    }
    const parent = this.#process(a);
    if ((b & 1) !== 0) this.#store(parent, b);
    const id = processes.fork(parent.id);
    if (id < 0) return;
    const unknown = new Set(parent.unknown);
    if (parent.id === SHARED_PROCESS)
      for (let vpn = 1 - this.#id; vpn < AREA_PAGES; vpn += 2) unknown.add(vpn);
    const values = new Map(parent.values);
    if ((b & 2) !== 0) this.#store(parent, b);
    const child = { id, values, unknown };
    this.#processes.push(child);
    if ((b & 4) !== 0) this.#load(child, this.#page(parent.id, b));
  }

  #exit(a: number): void {
    if (this.#processes.length < 2) return;
    const [process] = this.#processes.splice(1 + (a % (this.#processes.length - 1)), 1);
    this.#kernel.parts.processes.exit(process.id);
  }

  /** Reads everything back and ends the vCPU's own processes. */
  endProcesses(): void {
    for (const process of this.#processes)
      for (const vpn of [...process.values.keys(), ...process.unknown]) this.#load(process, vpn);
    while (this.#processes.length > 1) this.#exit(0);
  }

  /** Truncates the last page away if it is cached, else writes it. */
  #drop(): void {
    const { cache, alloc } = this.#kernel.parts;
    const pfn = cache.lookup(this.#id, KEPT_PAGES);
    if (pfn < 0) {
      this.#write(KEPT_PAGES);
      return;
    }
    if (cache.remove(pfn, alloc.stampOf(pfn))) alloc.put(pfn);
    alloc.put(pfn);
  }

  /** Reads another CPU's file: whole pages of one version, no older than the newest before the read. */
  #peek(index: number): void {
    const owner = (this.#id + 1) % this.#lab.shape.vcpus;
    const before = this.#lab.model[versionWord(owner, index)];
    if (!this.#kernel.parts.cache.read(owner, index, this.#buffer)) return;
    const after = this.#lab.model[versionWord(owner, index)] + 1;
    for (let version = before; version <= after; version++) {
      const want = (word: number): number => (version === 0 ? 0 : pattern(owner, index, version, word));
      if ([0, 7, 1023].every((word) => this.#buffer[word] === want(word))) return;
    }
    this.#complain(`page ${index} of file ${owner} is of none of the versions ${before} to ${after}`);
  }

  /** The liveness phase: no more operations; timers come due until everything has settled. */
  settle(disk: boolean, reporting: boolean): void {
    // Faults are off: from here on everything must come to its end.
    this.#kernel.parts.alloc.failNext = 0;
    for (let i = 0; i < this.#held.length; i++) this.#verify(i);
    if (disk) {
      for (let index = 0; index < KEPT_PAGES; index++) this.#read(index);
      if (!this.#kernel.parts.reclaim.sync()) this.#complain('dirty pages could not be written back');
    }
    if (this.#id !== 0) return;
    while (this.#lab.model[COMMANDS] > 0) {
      this.#kernel.parts.pcp.serveDrainRequest();
      this.#kernel.parts.processes.shootdown.serve();
      this.#kernel.vcpu.beginSection();
      this.#kernel.vcpu.port.relax();
    }
    // A retry that waits 50 s has its turn, too.
    if (this.#kernel.parts.mem.length > 0) {
      this.#kernel.vcpu.clock += 60 * NS_PER_S;
      this.due();
    }
    for (let i = 0; i < 12; i++) {
      // Blocks used and freed again are to be reported again.
      if (reporting && i < 4) {
        for (let n = 0; n < 3; n++) this.#alloc(3, 1);
        while (this.#held.length > 0) this.#free(0);
        this.#kernel.parts.pcp.drain(0);
      }
      this.#kernel.vcpu.clock += 1.1 * NS_PER_S;
      this.due();
    }
  }
}

/** Takes pages for good until few are free. */
function hog(kernel: GuestKernel): void {
  kernel.enter();
  const { alloc, zones } = kernel.parts;
  while (zones.reduce((sum, z) => sum + kernel.arena.w[z + Z_FREE], 0) > FREE_AT_START)
    if (alloc.alloc(0, 0, 2) < 0) break;
  kernel.leave();
}

/** A page that is freed must be in nobody's TLB, but of who is away and will be told before it uses one (I22). */
function watchFrees(kernel: GuestKernel, lab: VcpuLab): void {
  const { alloc } = kernel.parts;
  const free = alloc.free.bind(alloc);
  alloc.free = (pfn, order) => {
    for (const [cpu, tlb] of lab.tlbs.entries())
      if (PerCpuPages.inSlice(kernel.arena.w, cpu) && combinedReaches(tlb, pfn))
        lab.found.push(`page ${pfn} is freed while vCPU ${cpu} still reaches it through its TLB (I22)`);
    free(pfn, order);
  };
}

export function runGuest(kind: GuestKind, lab: VcpuLab, ops: readonly Op[], id: number): void {
  const { vcpu } = lab;
  const kernel = new GuestKernel(guestConfig(kind, lab.shape.vcpus), lab.arena, vcpu);
  try {
    if (id === 0) {
      lab.schedule.quietly(() => {
        vcpu.enterGuest();
        kernel.boot();
        vcpu.leaveGuest();
        if (fillsMemory(kind)) hog(kernel);
        if (kind.processes === true) {
          kernel.enter();
          kernel.parts.processes.create(AREA_PAGES);
          kernel.leave();
          lab.model[PROCESSES_ON] = 1;
        }
        lab.model[ALLOCATED_AT_START] = allocatedPages(kernel.arena);
      });
      // All of the above, not only the boot, comes before what the other vCPU does.
      Atomics.store(lab.model, SET_UP, 1);
    }
    while (Atomics.load(lab.model, SET_UP) === 0) lab.schedule.spin('spin', 1);
    kernel.enter();
    if (kind.processes === true) watchFrees(kernel, lab);
    const run = new GuestRun(kernel, lab, id);
    for (const op of ops) {
      lab.model[OPS_DONE]++;
      lab.tellHost();
      run.one(op);
      run.due();
    }
    lab.model[OPS_DONE] += ALL_DONE;
    lab.tellHost();
    run.settle(kind.disk, kind.reportingOrder < 9);
    if (kind.processes === true) run.endProcesses();
    kernel.leave();
    lab.model[HELD_AT_END + id] = run.heldPages;
    lab.model[1 + id] = 1;
    lab.model[0] = 1;
    for (let c = 0; c < lab.shape.vcpus; c++) if (lab.model[1 + c] === 0) lab.model[0] = 0;
  } catch (error) {
    if (!(error instanceof VmKilled)) throw error;
    lab.model[OPS_DONE] += ALL_DONE;
    lab.tellHost();
  }
}
