/**
 * Switches a VM on: its RAM as files in slots, its devices behind register windows. What a VMM's command line does in
 * a hypervisor; the guest finds the devices where `guest-kernel` looks for them.
 */
import {
  LINE_ACPI,
  LINE_BALLOON,
  LINE_BLK,
  LINE_MEM,
  MMIO_BASE,
  MMIO_STRIDE,
  type Arena,
} from '@ebb/guest-kernel';
import {
  AssignedDevice,
  attachVirtio,
  BalloonDevice,
  BlockDevice,
  DimmSlots,
  MemoryDevice,
  RegionSlots,
  slotPagesFor,
  Vm,
  wholeRegion,
  type BlockStorage,
  type DevicePort,
  type FramePool,
  type HostTasks,
  type Dimm,
  type DimmNews,
  type MemoryRequest,
  type RegionPort,
  type UserMemoryRegion,
} from '@ebb/host-kvm';
import { assert, PAGE_SIZE, type Schedule, type ViolationLog } from '@ebb/machine';
import { MemFile, unitOrder, type FrameSource } from '@ebb/memfs';
import type { MmioTransport, VirtioDevice } from '@ebb/virtio/device';
import { VGA_HOLE_END, VGA_HOLE_START } from '../trace/vga-hole.ts';
import type { RunningVm } from './run-result.ts';
import type { Backing, MemoryDeviceSpec, VmSpec } from './spec.ts';

/** First slot of the memory devices' regions, and of DIMMs. */
const REGION_SLOT = 16;
const DIMM_SLOT = 32;
/** First slot of regions whose slots come and go, and how many each may have. */
const DYNAMIC_SLOT = 1024;
const SLOTS_PER_REGION = 1024;

export interface PowerOn {
  readonly spec: VmSpec;
  readonly id: number;
  readonly nrVcpus: number;
  readonly backing: Backing;
  readonly control: SharedArrayBuffer;
  readonly arena: Arena;
  readonly pool: FramePool;
  readonly tasks: HostTasks;
  readonly violations: ViolationLog;
  readonly schedule: Schedule;
  readonly tableLive: Int32Array;
  readonly storage: (vm: number, bytes: number) => BlockStorage;
  /** When the balloon policy first acts; Infinity without one. */
  readonly policyDue: number;
  /** Told of device events as QEMU's trace lines name them, and when: virtual ns. */
  readonly trace?: (line: string, atNs: number) => void;
  /** Who watches the memory devices. */
  readonly watch?: MemoryWatch;
}

/** Hears what memory devices, DIMMs and the balloon do. */
export interface MemoryWatch {
  readonly request?: (device: string, request: MemoryRequest) => void;
  readonly size?: (device: string, bytes: number) => void;
  readonly dimm?: (news: DimmNews) => void;
  /** The guest says that its balloon leaves it this many bytes. */
  readonly balloon?: (bytes: number) => void;
}

const HUGE_POLICY = {
  thp: 'always',
  madvise: 'madvise',
  '4k': 'never',
  hugetlb: 'hugetlb',
  'hugetlb-1g': 'hugetlb-1g',
  '64k': '64k',
} as const;

export function powerOn(options: PowerOn): RunningVm {
  const { spec, id, pool, backing } = options;
  const vm = new Vm({
    id,
    nrVcpus: options.nrVcpus,
    control: options.control,
    firstBlock: id * options.nrVcpus,
    pool,
    tasks: options.tasks,
    violations: options.violations,
    schedule: options.schedule,
    tableLive: options.tableLive,
  });
  const huge = HUGE_POLICY[backing];
  const files: MemFile[] = [];
  const frames = spec.populateLimit === undefined ? pool : atMost(spec.populateLimit, pool, files);
  const newFile = (name: string, nrBlocks: number): MemFile =>
    new MemFile({
      name: `vm${id}/${name}`,
      nrBlocks,
      vm: id,
      frames,
      huge,
      hugeAdvised: spec.hugeAdvised === true,
    });
  const addSlot = (slot: number, file: MemFile, gfn: number, first: number, count: number): void => {
    const region = {
      slot,
      flags: 0,
      guestPhysAddr: gfn * PAGE_SIZE,
      memorySize: count * PAGE_SIZE,
      file,
      fileOffset: first,
    };
    assert(runToEnd(vm.setUserMemoryRegion(region)).ok, 'a fresh VM takes its slots');
  };
  const file = newFile('ram0', bootBlocks(spec, backing));
  bootRanges(spec, file.nrBlocks).forEach(([from, to], slot) => addSlot(slot, file, from, from, to - from));

  const ramPages = bootPages(spec, file.nrBlocks);
  const transports: MmioTransport[] = [];
  const port: DevicePort = {
    spawn: (name, body) => void options.tasks.spawn(`vm${id}/${name}`, body),
    now: () => vm.kickTime,
    costs: vm.costs,
  };
  const attach = (line: number, device: VirtioDevice): void => {
    const base = MMIO_BASE + line * MMIO_STRIDE;
    transports.push(attachVirtio(vm, base, line, device, (gpa) => leaseBroken(options.violations, id, gpa)));
  };
  const { trace } = options;
  const tracing = trace === undefined ? {} : { trace: (line: string) => trace(line, vm.vcpus.now()) };

  let balloon: BalloonDevice | null = null;
  if (spec.balloonFeatures !== undefined) {
    balloon = new BalloonDevice({
      port,
      features: spec.balloonFeatures,
      memory: {
        ramPages,
        endPfn: Math.max(file.nrBlocks, spec.guest.maxPfn),
        unitPages: file.granularity,
        discard: (runs, n) => vm.discard(runs, n),
      },
      onActual: (pages) => options.watch?.balloon?.((ramPages - pages) * PAGE_SIZE),
      ...tracing,
    });
    attach(LINE_BALLOON, balloon);
  }
  let block: BlockDevice | null = null;
  if (spec.diskBytes > 0) {
    block = new BlockDevice(options.storage(id, spec.diskBytes), port);
    attach(LINE_BLK, block);
  }
  files.push(file);
  const assigned = spec.assigned === undefined ? null : new AssignedDevice(vm, pool);
  if (assigned !== null) {
    // All of boot memory at once; from then on nobody may take any of it away unheard.
    for (const [from, to] of bootRanges(spec, file.nrBlocks))
      if (!assigned.map(from, to - from)) vm.killed = true;
    if (balloon !== null) balloon.inhibited = true;
  }
  /** In a slot that is always there, or in slots that come and go with what is plugged. */
  const regionPort = (region: MemoryDeviceSpec, i: number, regionFile: MemFile): RegionPort => {
    const baseGfn = region.addr / PAGE_SIZE;
    const nrPages = regionFile.nrBlocks;
    if (region.profile !== 'inaccessible') {
      addSlot(REGION_SLOT + i, regionFile, baseGfn, 0, nrPages);
      return wholeRegion(vm, regionFile.granularity * PAGE_SIZE);
    }
    const firstSlot = DYNAMIC_SLOT + i * SLOTS_PER_REGION;
    const slotPages = slotPagesFor(region.blockBytes);
    const slots = new RegionSlots({ vm, file: regionFile, firstSlot, baseGfn, nrPages, slotPages });
    const plugged = (region.pluggedBytes ?? 0) / PAGE_SIZE;
    if (plugged > 0) runToEnd(slots.activate(baseGfn, plugged));
    return slots;
  };
  const regionFiles: (MemFile | null)[] = [];
  const memory = (spec.memoryDevices ?? []).map((region, i) => {
    const regionFile = region.anyMemory === true ? null : newFile(region.id, region.regionBytes / PAGE_SIZE);
    regionFiles.push(regionFile);
    if (regionFile !== null) files.push(regionFile);
    const device = memoryDevice(
      region,
      vm,
      port,
      regionFile === null ? wholeRegion(vm, file.granularity * PAGE_SIZE) : regionPort(region, i, regionFile),
      assigned,
      tracing,
      options.watch,
    );
    attach(LINE_MEM + i, device);
    return device;
  });
  const dimms = spec.dimms === undefined ? null : dimmSlots(spec.dimms.slots, vm, options, newFile, files);
  if (dimms !== null) vm.addMmio(dimms);
  for (const dimm of spec.dimms?.plugged ?? []) if (dimms !== null) runToEnd(dimms.coldPlug(dimm));
  return {
    spec,
    vm,
    file,
    files,
    arena: options.arena,
    balloon,
    block,
    memory,
    regionFiles,
    transports,
    policyDue: options.policyDue,
    policySize: -1,
    targets: [...(spec.balloonTargets ?? [])],
    resets: [...(spec.resets ?? [])],
    assigned,
    assignedDue: spec.assigned?.everyNs ?? Number.POSITIVE_INFINITY,
    dimms,
    dimmOrders: [...(spec.dimms?.orders ?? [])],
    dimmRefusals: [],
    sizes: [...(spec.memoryTargets ?? [])],
    hints: (spec.hintRounds ?? []).flatMap(([start, stop]) => [
      { at: start, start: true },
      { at: stop, start: false },
    ]),
    hintedPages: 0,
  };
}

/** Frames of `pool`, as long as all `files` together have no more than `limit`. */
function atMost(limit: number, pool: FramePool, files: readonly MemFile[]): FrameSource {
  return {
    allocZeroed: (order, owner) => {
      const assigned = files.reduce((sum, file) => sum + file.assigned, 0);
      return assigned + (1 << order) > limit ? -1 : pool.allocZeroed(order, owner);
    },
    free: (first, count) => pool.free(first, count),
  };
}

/** Slots for DIMMs: each that is plugged is a file of its own in a memory slot of its own. */
export function dimmSlots(
  slots: number,
  vm: Pick<Vm, 'id' | 'vcpus' | 'setUserMemoryRegion' | 'discard'>,
  options: Pick<PowerOn, 'tasks' | 'watch'>,
  newFile: (name: string, nrBlocks: number) => MemFile,
  files: MemFile[],
): DimmSlots {
  const known = new Map<string, { file: MemFile; slot: number }>();
  const region = (dimm: Dimm, slot: number, file: MemFile, bytes: number): UserMemoryRegion => ({
    slot,
    flags: 0,
    guestPhysAddr: dimm.addr,
    memorySize: bytes,
    file,
    fileOffset: 0,
  });
  return new DimmSlots(MMIO_BASE + LINE_ACPI * MMIO_STRIDE, slots, {
    spawn: (name, body) => void options.tasks.spawn(`vm${vm.id}/${name}`, body),
    interrupt: () => vm.vcpus.interrupt(LINE_ACPI),
    news: (news) => options.watch?.dimm?.(news),
    *attach(dimm) {
      const file = newFile(dimm.id, dimm.bytes / PAGE_SIZE);
      let slot = DIMM_SLOT;
      while ([...known.values()].some((k) => k.slot === slot)) slot++;
      // Taken before the wait: another DIMM may come meanwhile.
      known.set(dimm.id, { file, slot });
      const done = yield* vm.setUserMemoryRegion(region(dimm, slot, file, dimm.bytes));
      if (done.ok) files.push(file);
      else known.delete(dimm.id);
      return done.ok;
    },
    *detach(dimm) {
      const found = known.get(dimm.id);
      assert(found !== undefined, 'a DIMM that goes has come');
      const { file, slot } = found;
      // Its frames first, while the slot still tells who maps them.
      yield* vm.discard(Int32Array.of(dimm.addr / PAGE_SIZE, dimm.bytes / PAGE_SIZE), 1);
      yield* vm.setUserMemoryRegion(region(dimm, slot, file, 0));
      known.delete(dimm.id);
      files.splice(files.indexOf(file), 1);
    },
  });
}

function memoryDevice(
  spec: MemoryDeviceSpec,
  vm: Vm,
  port: DevicePort,
  region: RegionPort,
  assigned: AssignedDevice | null,
  tracing: { readonly trace?: (line: string) => void },
  watch: MemoryWatch | undefined,
): MemoryDevice {
  const device = new MemoryDevice({
    ...spec,
    port,
    region,
    ...(assigned === null ? {} : { holder: assigned }),
    exchanges: spec.exchanges === true,
    ...(spec.grants === undefined ? {} : { grant: (bytes: number) => (spec.grants === 'all' ? bytes : 0) }),
    ...tracing,
    onRequest: (request) => watch?.request?.(spec.id, request),
    onSize: (bytes) => watch?.size?.(spec.id, bytes),
  });
  vm.addGate(device.unplugged);
  return device;
}

/** Blocks of the boot memory's file: up to the last page that the firmware's map names. */
function bootBlocks(spec: VmSpec, backing: Backing): number {
  const end =
    spec.guest.hotplug === undefined || spec.guest.hotplug.adopts === 'in-place'
      ? spec.guest.maxPfn
      : Math.max(...spec.guest.e820.map((r) => r.end));
  const unit = 1 << unitOrder(HUGE_POLICY[backing]);
  return Math.ceil(end / unit) * unit;
}

/**
 * Where boot memory is. A capture touches pages its map does not name, so all but the hole at 640 KiB is memory; a guest
 * with memory devices has the firmware's map, with the hole below 4 GiB; one whose upper memory is a region has the rest. DIMMs
 * are never part of it.
 */
function bootRanges(spec: VmSpec, nrBlocks: number): (readonly [number, number])[] {
  const [region] = spec.memoryDevices ?? [];
  if (region?.anyMemory !== true && region !== undefined && spec.guest.hotplug?.adopts === 'in-place') {
    const [from, to] = [region.addr / PAGE_SIZE, (region.addr + region.regionBytes) / PAGE_SIZE];
    return (
      [
        [0, VGA_HOLE_START],
        [VGA_HOLE_END, from],
        [to, nrBlocks],
      ] as const
    ).filter(([a, b]) => a < b);
  }
  if (spec.guest.hotplug !== undefined) {
    // What the firmware's map names beside DIMMs, which are in slots of their own.
    let ranges = spec.guest.e820.map(({ start, end }) => [start, end] as const);
    for (const { addr, bytes } of spec.dimms?.plugged ?? []) {
      const [from, to] = [addr / PAGE_SIZE, (addr + bytes) / PAGE_SIZE];
      const beside = ranges.flatMap(([a, b]) => [
        [a, Math.min(b, from)] as const,
        [Math.max(a, to), b] as const,
      ]);
      ranges = beside.filter(([a, b]) => a < b);
    }
    return ranges;
  }
  return (
    [
      [0, Math.min(VGA_HOLE_START, nrBlocks)],
      [VGA_HOLE_END, nrBlocks],
    ] as const
  ).filter(([from, to]) => from < to);
}

/** Pages of boot memory as a VMM counts them: the holes below 1 MiB are backed, the one below 4 GiB is not. */
function bootPages(spec: VmSpec, nrBlocks: number): number {
  if (spec.guest.hotplug === undefined || spec.guest.hotplug.adopts === 'in-place') return nrBlocks;
  return spec.guest.e820.reduce((sum, r) => sum + r.end - r.start, VGA_HOLE_END - VGA_HOLE_START);
}

function leaseBroken(violations: ViolationLog, vm: number, gpa: number): void {
  violations.record({
    kind: 'device-lease',
    actor: 'device',
    vm,
    vcpu: -1,
    gfn: Math.floor(gpa / PAGE_SIZE),
    hfn: -1,
    expected: 0,
    found: 0,
    owner: 0,
    stepTaken: 0,
    stepReleased: 0,
  });
}

/** Drives a generator that has nobody to wait for. */
function runToEnd<T>(body: Generator<unknown, T, void>): T {
  for (;;) {
    const step = body.next();
    if (step.done === true) return step.value;
  }
}
