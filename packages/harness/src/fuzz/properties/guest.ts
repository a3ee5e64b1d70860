/**
 * A whole guest kernel on two vCPUs: allocation, page cache, balloon, hinting and reporting against devices that discard.
 * The guest's own shadow and stamps check each page, the audit its books; a model of the files checks the disk.
 */
import {
  Arena,
  filePages,
  GuestKernel,
  LINE_BALLOON,
  LINE_BLK,
  Z_FREE,
  Z_LOW,
  zoneBases,
  type GuestConfig,
} from '@ebb/guest-kernel';
import { BalloonDevice, BlockDevice, type DevicePort, type TaskBody, type Vm } from '@ebb/host-kvm';
import { gfn, NS_PER_MS, NS_PER_S, VmKilled } from '@ebb/machine';
import {
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import * as fc from 'fast-check';
import { attachDevice } from '../attach-device.ts';
import { allocatedPages, auditGuest, balloonPages } from '../guest-audit.ts';
import type { HostLab, LabShape, VcpuLab } from '../lab.ts';
import type { FuzzProgram, Op, Property, Verdict } from '../property.ts';

const PAGES = 1024;
/** Pages of each vCPU's one file. */
const FILE_PAGES = 6;
/** The last of them is written and dropped from the cache, never read: what it holds is nobody's promise. */
const KEPT_PAGES: number = FILE_PAGES - 1;
/** With a disk, the guest starts with this many pages free, so that reclaim has work. */
const FREE_AT_START = 100;

interface GuestKind {
  readonly features: readonly number[] | null;
  readonly disk: boolean;
  readonly reportingOrder: number;
  readonly cpu: readonly string[];
  readonly host: readonly string[];
}

function programs(kind: GuestKind, vcpus: number): fc.Arbitrary<FuzzProgram> {
  const op = (names: readonly string[]): fc.Arbitrary<Op> =>
    fc.record({ op: fc.constantFrom(...names), a: fc.nat({ max: 63 }), b: fc.nat({ max: 15 }) });
  return fc.record({
    host: kind.host.length === 0 ? fc.constant([]) : fc.array(op(kind.host), { minLength: 1, maxLength: 5 }),
    cpus: fc.tuple(
      ...Array.from({ length: vcpus }, () => fc.array(op(kind.cpu), { minLength: 2, maxLength: 16 })),
    ),
  });
}

function config(kind: GuestKind, vcpus: number): GuestConfig {
  return {
    e820: [{ start: 0, end: PAGES }],
    nodes: [{ start: 0, end: PAGES }],
    maxPfn: PAGES,
    nrCpus: vcpus,
    cpuNode: new Array<number>(vcpus).fill(0),
    initOnAlloc: true,
    pagePoison: false,
    balloon: kind.features !== null,
    reportingOrder: kind.reportingOrder,
    blk: kind.disk,
    blocks: { kind: 'linear', pagesPerFile: FILE_PAGES },
  };
}

// ── Host ─────────────────────────────────────────────────────────────────────────────────────────────────────────

function host(kind: GuestKind, lab: HostLab, program: FuzzProgram): Verdict {
  const [{ vm }] = lab.vms;
  const port: DevicePort = {
    spawn: (name, body) => lab.spawn(name, body),
    now: () => vm.kickTime,
    costs: vm.costs,
  };
  let balloon: BalloonDevice | null = null;
  if (kind.features !== null) {
    balloon = new BalloonDevice({
      port,
      features: kind.features,
      memory: { ramPages: PAGES, unitPages: 1, discard: (runs, n) => vm.discard(runs, n) },
    });
    attachDevice(lab, vm, LINE_BALLOON, balloon);
  }
  const disk = new Uint8Array(lab.shape.vcpus * FILE_PAGES * 4096);
  if (kind.disk) {
    const storage = {
      bytes: disk.length,
      read: (offset: number, out: Uint8Array) => out.set(disk.subarray(offset, offset + out.length)),
      write: (offset: number, bytes: Uint8Array) => disk.set(bytes, offset),
      flush: () => undefined,
    };
    attachDevice(lab, vm, LINE_BLK, new BlockDevice(storage, port));
  }
  lab.model[COMMANDS] = program.host.length;
  program.host.forEach((op, i) => lab.spawn(`${op.op} ${i}`, hostTask(vm, balloon, op, lab.model)));
  return () => {
    const found: string[] = [];
    if (lab.model[0] === 0) return found;
    const arena = new Arena(lab.arena(0), PAGES);
    found.push(...auditGuest(arena, lab.shape.vcpus));
    let expected = lab.model[ALLOCATED_AT_START] + filePages(arena);
    for (let cpu = 0; cpu < lab.shape.vcpus; cpu++) expected += lab.model[HELD_AT_END + cpu];
    const allocated = allocatedPages(arena);
    if (allocated !== expected)
      found.push(`leak: ${allocated} pages are allocated, their owners know of ${expected} (I19)`);
    if (balloon !== null) found.push(...balloonVerdict(arena, balloon));
    if (kind.disk) found.push(...diskVerdict(lab, disk));
    return found;
  };
}

function* hostTask(vm: Vm, balloon: BalloonDevice | null, op: Op, model: Int32Array): TaskBody {
  // Commands arrive while the guest is busy, not before.
  if (model[OPS_DONE] < op.b) yield () => model[OPS_DONE] >= op.b;
  model[COMMANDS]--;
  switch (op.op) {
    case 'target':
      balloon?.setTarget((PAGES - (op.a % 48) * 8) * 4096);
      break;
    case 'stats':
      balloon?.requestStats();
      break;
    case 'hint':
      if (balloon?.startHinting() !== true) break;
      for (let i = 0; i < 10; i++) yield undefined;
      balloon.stopHinting();
      break;
    case 'interrupt':
      vm.interrupt(op.a & 1);
      break;
  }
}

/** Liveness: the balloon has reached its target, or has no page it could take. */
function balloonVerdict(arena: Arena, balloon: BalloonDevice): string[] {
  const pages = balloonPages(arena);
  const spare = zoneBases(arena.w).reduce((s, z) => s + arena.w[z + Z_FREE] - arena.w[z + Z_LOW], 0);
  const found: string[] = [];
  if (pages > balloon.numPages)
    found.push(`liveness: the balloon holds ${pages} pages, its target is ${balloon.numPages} (I24)`);
  if (pages < balloon.numPages && spare > 64)
    found.push(
      `liveness: the balloon stopped at ${pages} of ${balloon.numPages} pages with ${spare} to spare (I24)`,
    );
  const book = balloon.ballooned.count();
  if (book !== pages) found.push(`balloon books: the device counts ${book} pages, the driver ${pages}`);
  return found;
}

/** After a sync the disk holds the newest version of every page written. */
function diskVerdict(lab: HostLab, disk: Uint8Array): string[] {
  const words = new Int32Array(disk.buffer);
  const found: string[] = [];
  for (let cpu = 0; cpu < lab.shape.vcpus; cpu++) {
    for (let index = 0; index < KEPT_PAGES; index++) {
      const version = lab.model[versionWord(cpu, index)];
      const have = words[(cpu * FILE_PAGES + index) * 1024 + 7];
      const want = version === 0 ? 0 : pattern(cpu, index, version, 7);
      if (have !== want)
        found.push(
          `model disk: page ${index} of file ${cpu} is not its version ${version} after the last sync`,
        );
    }
  }
  return found;
}

// ── Guest ────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Model words: 0 is set when the guest has ended in order; then the version of each file page. */
const OPS_DONE = 8;
/** Pages allocated once the guest is up, and those that each vCPU still holds at the end. */
const ALLOCATED_AT_START = 10;
const HELD_AT_END = 11;
/** Host commands not yet given. */
const COMMANDS = 9;
const ALL_DONE = 1 << 20;

function versionWord(cpu: number, index: number): number {
  return 16 + cpu * FILE_PAGES + index;
}
function pattern(cpu: number, index: number, version: number, word: number): number {
  return (Math.imul(version, 0x9e3779b1) ^ (cpu << 24) ^ (index << 16) ^ Math.imul(word, 0x85ebca6b)) | 1;
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
      case 'drain':
        this.#kernel.parts.pcp.drainAll(this.#kernel.config.nrCpus);
        break;
      case 'slice':
        this.#kernel.leave();
        this.#kernel.enter();
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
      if (before !== 0)
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
    for (let i = 0; i < this.#held.length; i++) this.#verify(i);
    if (disk) {
      for (let index = 0; index < KEPT_PAGES; index++) this.#read(index);
      if (!this.#kernel.parts.reclaim.sync()) this.#complain('dirty pages could not be written back');
    }
    if (this.#id !== 0) return;
    while (this.#lab.model[COMMANDS] > 0) {
      this.#kernel.parts.pcp.serveDrainRequest();
      this.#kernel.vcpu.beginSection();
      this.#kernel.vcpu.port.relax();
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

function runGuest(kind: GuestKind, lab: VcpuLab, ops: readonly Op[], id: number): void {
  const { vcpu } = lab;
  const kernel = new GuestKernel(config(kind, lab.shape.vcpus), lab.arena, vcpu);
  try {
    if (id === 0) {
      lab.schedule.quietly(() => {
        vcpu.enterGuest();
        kernel.boot();
        vcpu.leaveGuest();
        if (kind.disk) hog(kernel);
        lab.model[ALLOCATED_AT_START] = allocatedPages(kernel.arena);
      });
    }
    while (!kernel.booted) lab.schedule.spin('spin', 1);
    kernel.enter();
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

function guestProperty(
  name: string,
  about: string,
  rows: string,
  kind: GuestKind,
  hostPages: number = PAGES + 128,
): Property {
  const shape: LabShape = { hostPages, ramPages: PAGES, vms: 1, vcpus: 2, huge: 'never' };
  return {
    name,
    about,
    rows,
    shape,
    steps: 9000,
    program: programs(kind, shape.vcpus),
    host: (lab, program) => host(kind, lab, program),
    cpu: (lab, program, _vm, id) => runGuest(kind, lab, program.cpus[id], id),
  };
}

const MEMORY_OPS = ['alloc', 'alloc', 'free', 'free', 'verify', 'many', 'free-many', 'time', 'slice'];

export const allocator: Property = guestProperty(
  'allocator',
  'two vCPUs allocate and free through per-CPU lists and the buddy',
  'I19 I2',
  { features: null, disk: false, reportingOrder: 9, cpu: [...MEMORY_OPS, 'drain'], host: [] },
);

export const reporting: Property = guestProperty(
  'reporting',
  'free page reporting beside allocation: nothing reported is handed out before the host has answered',
  'I3 I15 L25 L28',
  {
    features: [VIRTIO_BALLOON_F_REPORTING],
    disk: false,
    reportingOrder: 3,
    cpu: [...MEMORY_OPS, 'time', 'time'],
    host: ['interrupt', 'target'],
  },
);

export const balloon: Property = guestProperty(
  'balloon',
  'inflate, deflate, hinting and statistics beside allocation, with MUST_TELL_HOST',
  'I3b I5 I15 I24',
  {
    features: [
      VIRTIO_BALLOON_F_MUST_TELL_HOST,
      VIRTIO_BALLOON_F_STATS_VQ,
      VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
      VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    ],
    disk: false,
    reportingOrder: 9,
    cpu: MEMORY_OPS,
    host: ['target', 'target', 'stats', 'hint', 'interrupt'],
  },
);

export const cache: Property = guestProperty(
  'cache',
  'page cache, write-back and reclaim on two vCPUs against a model disk',
  'I19 I16 G-cache',
  {
    features: null,
    disk: true,
    reportingOrder: 9,
    cpu: [
      'write',
      'write',
      'read',
      'peek',
      'peek',
      'drop',
      'drop',
      'drop',
      'sync',
      'many',
      'free-many',
      'time',
      'slice',
    ],
    host: ['interrupt'],
  },
);
