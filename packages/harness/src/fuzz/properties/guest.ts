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
  LINE_MEM,
  LINUX_HOTPLUG,
  memoryOutcome,
  PLUGGED_SHIFT,
  Z_FREE,
  Z_LOW,
  zoneBases,
  type GuestConfig,
} from '@ebb/guest-kernel';
import {
  BalloonDevice,
  BlockDevice,
  MemoryDevice,
  type DevicePort,
  type MemoryProfile,
  type TaskBody,
  type Vm,
} from '@ebb/host-kvm';
import { gfn, NS_PER_MS, NS_PER_S, PAGE_SIZE, VmKilled } from '@ebb/machine';
import {
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import * as fc from 'fast-check';
import { attachDevice } from '../attach-device.ts';
import {
  addedBlocks,
  allocatedPages,
  auditGuest,
  balloonPages,
  pageInUse,
  pagesInUseWithin,
} from '../guest-audit.ts';
import type { HostLab, LabShape, VcpuLab } from '../lab.ts';
import type { FuzzProgram, Op, Property, Verdict } from '../property.ts';

const PAGES = 1024;
/** Pages of a memory device's region, of a memory block, and of a sub-block. */
const REGION_PAGES = 2048;
const SECTION = 1024;
const SUB_BLOCK = 512;
/** Pages of each vCPU's one file. */
const FILE_PAGES = 6;
/** The last of them is written and dropped from the cache, never read: what it holds is nobody's promise. */
const KEPT_PAGES: number = FILE_PAGES - 1;
/** With a disk, the guest starts with this many pages free, so that reclaim has work. */
const FREE_AT_START = 100;
/** The process that both vCPUs run in, and pages of each. */
const SHARED_PROCESS = 0;
const AREA_PAGES = 8;

interface GuestKind {
  readonly features: readonly number[] | null;
  readonly disk: boolean;
  /** A memory device whose region follows boot memory. */
  readonly memory?: MemoryProfile;
  /** Processes, one of them shared by the vCPUs. */
  readonly processes?: boolean;
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
    maxPfn: pagesOf(kind),
    ...(kind.memory === undefined
      ? {}
      : {
          hotplug: {
            ...LINUX_HOTPLUG,
            devices: 1,
            sectionPages: SECTION,
            // Where pages are to move, nothing that cannot may be in their way.
            policy: kind.disk || kind.processes === true ? ('online_movable' as const) : ('online' as const),
          },
        }),
    nrCpus: vcpus,
    cpuNode: new Array<number>(vcpus).fill(0),
    // A range that is unplugged would be zeroed page by page: thousands of points that no fault hides behind.
    initOnAlloc: kind.memory === undefined,
    pagePoison: false,
    balloon: kind.features !== null,
    reportingOrder: kind.reportingOrder,
    blk: kind.disk,
    blocks: { kind: 'linear', pagesPerFile: FILE_PAGES },
  };
}

function pagesOf(kind: GuestKind): number {
  return kind.memory === undefined ? PAGES : PAGES + REGION_PAGES;
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
  const memory = kind.memory === undefined ? null : attachMemory(lab, vm, port, kind.memory);
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
  program.host.forEach((op, i) => lab.spawn(`${op.op} ${i}`, hostTask(vm, balloon, memory, op, lab.model)));
  return () => {
    const found: string[] = [];
    if (lab.model[0] === 0) return found;
    const arena = new Arena(lab.arena(0), pagesOf(kind));
    found.push(...auditGuest(arena, lab.shape.vcpus));
    let expected = lab.model[ALLOCATED_AT_START] + filePages(arena);
    for (let cpu = 0; cpu < lab.shape.vcpus; cpu++) expected += lab.model[HELD_AT_END + cpu];
    if (memory !== null) expected += addedBlocks(arena, SECTION) * (SECTION / 64);
    const allocated = allocatedPages(arena);
    // What the shared process still maps is its own affair.
    if (allocated !== expected && kind.processes !== true)
      found.push(`leak: ${allocated} pages are allocated, their owners know of ${expected} (I19)`);
    if (balloon !== null) found.push(...balloonVerdict(arena, balloon));
    if (memory !== null) found.push(...memoryVerdict(arena, memory));
    if (kind.disk) found.push(...diskVerdict(lab, disk));
    return found;
  };
}

/** A memory device behind boot memory. What it takes away must be nobody's in the guest (I20). */
function attachMemory(lab: HostLab, vm: Vm, port: DevicePort, profile: MemoryProfile): MemoryDevice {
  const arena = new Arena(lab.arena(0), PAGES + REGION_PAGES);
  const device = new MemoryDevice({
    port,
    id: 'vm0',
    addr: PAGES * PAGE_SIZE,
    regionBytes: REGION_PAGES * PAGE_SIZE,
    blockBytes: SUB_BLOCK * PAGE_SIZE,
    node: 0,
    // Plugged at once, so that there is something to take away.
    requestedBytes: REGION_PAGES * PAGE_SIZE,
    profile,
    region: {
      pageBytes: PAGE_SIZE,
      discard: (first, count) => {
        const user = pageInUse(arena, first, count);
        if (user >= 0)
          lab.found.push(`unplugged: page ${user} goes while the guest has it on a list or in use (I20)`);
        return vm.discard(Int32Array.of(first, count), 1);
      },
      unmap: (first, count) => vm.unmap(first, count),
    },
  });
  vm.addGate(device);
  attachDevice(lab, vm, LINE_MEM, device);
  return device;
}

function* hostTask(
  vm: Vm,
  balloon: BalloonDevice | null,
  memory: MemoryDevice | null,
  op: Op,
  model: Int32Array,
): TaskBody {
  // Commands arrive while the guest is busy, not before.
  if (model[OPS_DONE] < op.b) yield () => model[OPS_DONE] >= op.b;
  switch (op.op) {
    case 'target':
      balloon?.setTarget((PAGES - (op.a % 48) * 8) * 4096);
      break;
    case 'resize':
      // Every other time nothing is left of it.
      memory?.setRequested((op.a % 2) * (1 + (op.b % (REGION_PAGES / SUB_BLOCK))) * SUB_BLOCK * PAGE_SIZE);
      break;
    case 'busy':
      if (memory === null) break;
      memory.busy = true;
      for (let i = 0; i < 10; i++) yield undefined;
      memory.busy = false;
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
      vm.interrupt(op.a % 3);
      break;
  }
  // Only now: a guest that has seen the last command has been told of it.
  model[COMMANDS]--;
}

/** Both books of the region agree, and the size is reached, or the guest has said why not (I20, I24). */
function memoryVerdict(arena: Arena, device: MemoryDevice): string[] {
  const found: string[] = [];
  for (let b = 0; b < REGION_PAGES / SUB_BLOCK; b++) {
    const bit = (PAGES + b * SUB_BLOCK) >>> PLUGGED_SHIFT;
    const guest = ((arena.w[arena.layout.plugged + (bit >>> 5)] >>> (bit & 31)) & 1) !== 0;
    if (guest !== device.plugged.has(b))
      found.push(
        `plugged: block ${b} is ${guest ? '' : 'not '}plugged for the driver, the device differs (I20)`,
      );
  }
  const used = pagesInUseWithin(arena, PAGES, REGION_PAGES, (pfn) =>
    device.plugged.has(Math.floor((pfn - PAGES) / SUB_BLOCK)),
  );
  if (used >= 0) found.push(`unplugged: page ${used} is in use, its block is not plugged (I20)`);
  if (device.pluggedBytes !== device.plugged.count() * device.blockBytes)
    found.push(`plugged_size ${device.pluggedBytes} is not ${device.plugged.count()} blocks`);
  const last = memoryOutcome(arena, 0);
  if (last === 'EINVAL') found.push('protocol: the driver gave the device up (I24)');
  if (device.pluggedBytes !== device.requestedBytes && last === 'ok')
    found.push(
      `liveness: ${device.pluggedBytes} bytes are plugged of ${device.requestedBytes}, and the driver is content (I24)`,
    );
  return found;
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
/** 1 once there is a process that both vCPUs run in. */
const PROCESSES_ON = 13;
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
  /** Processes of this vCPU, and what their pages hold; the first is shared, with every other page its own. */
  readonly #processes: { readonly id: number; readonly values: Map<number, number> }[] = [
    { id: SHARED_PROCESS, values: new Map() },
  ];

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
        this.#store(a, b);
        break;
      case 'load':
        this.#load(a, b);
        break;
      case 'discard':
        this.#discard(a, b);
        break;
      case 'fork':
        this.#fork(a);
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
      case 'slice':
        this.#kernel.leave();
        // Away for a while, so that others may ask for something meanwhile.
        for (let i = 0; i < b; i++) this.#lab.schedule.point('wait', 0);
        this.#kernel.enter();
        // What it was told to forget while it was away must be forgotten now.
        if (this.#lab.model[PROCESSES_ON] !== 0) this.#load(a, b);
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

  #process(which: number): { readonly id: number; readonly values: Map<number, number> } {
    return this.#processes[which % this.#processes.length];
  }

  /** A page of the process that is this vCPU's to use. */
  #page(process: number, which: number): number {
    const page = which % AREA_PAGES;
    return process === SHARED_PROCESS ? page - (page % 2) + this.#id : page;
  }

  #store(a: number, b: number): void {
    const { id, values } = this.#process(a);
    const vpn = this.#page(id, b);
    const value = ((this.#id + 1) << 28) | ++this.#sequence;
    if (this.#kernel.parts.processes.store32(id, vpn, 9, value)) values.set(vpn, value);
  }

  #load(a: number, b: number): void {
    const { id, values } = this.#process(a);
    const vpn = this.#page(id, b);
    const found = this.#kernel.parts.processes.load32(id, vpn, 9);
    const want = values.get(vpn) ?? 0;
    if (found !== undefined && found !== want)
      this.#complain(
        `page ${vpn} of process ${id} holds 0x${(found >>> 0).toString(16)}, its last store was 0x${(want >>> 0).toString(16)} (I22)`,
      );
  }

  #discard(a: number, b: number): void {
    const { id, values } = this.#process(a);
    const vpn = this.#page(id, b);
    this.#kernel.parts.processes.discard(id, vpn);
    values.delete(vpn);
  }

  #fork(a: number): void {
    const parent = this.#processes[1 + (a % Math.max(1, this.#processes.length - 1))];
    const { processes } = this.#kernel.parts;
    if (this.#processes.length > 4) return;
    const id = parent === undefined ? processes.create(AREA_PAGES) : processes.fork(parent.id);
    if (id >= 0) this.#processes.push({ id, values: new Map(parent?.values) });
  }

  #exit(a: number): void {
    if (this.#processes.length < 2) return;
    const [process] = this.#processes.splice(1 + (a % (this.#processes.length - 1)), 1);
    this.#kernel.parts.processes.exit(process.id);
  }

  /** Reads everything back and ends the vCPU's own processes. */
  endProcesses(): void {
    this.#processes.forEach(({ values }, which) => {
      for (const vpn of values.keys()) this.#load(which, vpn);
    });
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

function runGuest(kind: GuestKind, lab: VcpuLab, ops: readonly Op[], id: number): void {
  const { vcpu } = lab;
  const kernel = new GuestKernel(config(kind, lab.shape.vcpus), lab.arena, vcpu);
  try {
    if (id === 0) {
      lab.schedule.quietly(() => {
        vcpu.enterGuest();
        kernel.boot();
        vcpu.leaveGuest();
        // A region that goes is pressure enough.
        if (kind.disk && kind.memory === undefined) hog(kernel);
        if (kind.processes === true) {
          kernel.enter();
          kernel.parts.processes.create(AREA_PAGES);
          kernel.leave();
          lab.model[PROCESSES_ON] = 1;
        }
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

function guestProperty(
  name: string,
  about: string,
  rows: string,
  kind: GuestKind,
  hostPages: number = PAGES + 128,
): Property {
  const shape: LabShape = { hostPages, ramPages: pagesOf(kind), vms: 1, vcpus: 2, huge: 'never' };
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

const MEMORY_OPS = [
  'alloc',
  'alloc',
  'free',
  'free',
  'verify',
  'many',
  'free-many',
  'time',
  'slice',
  'starve',
];

export const allocator: Property = guestProperty(
  'allocator',
  'two vCPUs allocate and free through per-CPU lists and the buddy',
  'I19 I2',
  {
    features: null,
    disk: false,
    reportingOrder: 9,
    cpu: [...MEMORY_OPS, 'drain', 'drain', 'drain', 'slice'],
    host: [],
  },
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
      'starve',
    ],
    host: ['interrupt'],
  },
);

const REGION_CPU_OPS = [...MEMORY_OPS, 'drain'];

export const memoryDevice: Property = guestProperty(
  'memory-device',
  'a host that resizes a region while two vCPUs allocate from it: plug, unplug, isolation and busy answers',
  'I9 I15 I20 I24 H5-H8 H16',
  {
    features: null,
    disk: false,
    memory: 'rfc-write-protect',
    reportingOrder: 9,
    cpu: REGION_CPU_OPS,
    host: ['resize', 'resize', 'resize', 'busy', 'interrupt'],
  },
  PAGES + REGION_PAGES + 128,
);

export const migration: Property = guestProperty(
  'migration',
  'cached pages move out of a region that shrinks, while both vCPUs read and write their files',
  'I15 I20 I22 H16',
  {
    features: null,
    disk: true,
    memory: 'qemu',
    reportingOrder: 9,
    cpu: ['write', 'write', 'read', 'read', 'peek', 'peek', 'drop', 'sync', 'time', 'slice', 'starve'],
    host: ['resize', 'resize', 'resize', 'resize', 'interrupt'],
  },
  PAGES + REGION_PAGES + 128,
);

export const processes: Property = guestProperty(
  'processes',
  'processes store, fork, share and exit on two vCPUs while their pages move out of a region that shrinks',
  'I15 I20 I22 H16 H24',
  {
    features: null,
    disk: false,
    memory: 'qemu',
    processes: true,
    reportingOrder: 9,
    cpu: ['store', 'store', 'store', 'store', 'load', 'load', 'discard', 'fork', 'exit', 'slice', 'starve'],
    host: ['resize', 'resize', 'resize', 'resize'],
  },
  PAGES + REGION_PAGES + 128,
);
