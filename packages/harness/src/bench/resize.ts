/**
 * What it costs to give a guest 1 GiB and to take it back, by virtio-mem and by the balloon: real time of this machine, on
 * one thread, with every frame zapped, flushed, freed and poisoned at its edges; and virtual time by the cost table.
 */
import { LINUX_HOTPLUG, type GuestConfig } from '@ebb/guest-kernel';
import { GiB, MiB, NS_PER_MS, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_STATS_VQ } from '@ebb/virtio/uapi';
import { orderCache, orderPins } from '../run/agent-program.ts';
import { hostBuffers, runBuffers, type HostBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import { InlineSession } from '../run/inline-session.ts';
import type { MemoryWatch } from '../run/power-on.ts';
import type { RunSpec, VmSpec } from '../run/spec.ts';

const BOOT: number = 512 * MiB;
const MOVED: number = 1 * GiB;
const HOST: number = 3 * GiB;
const BLOCK: number = 2 * MiB;

/** What the region is used for when it is to go. */
export type Use = 'idle' | 'half used' | 'fragmented';

export interface ResizeFigures {
  /** GiB per second of real time. */
  readonly grow: number;
  readonly shrink: number;
  /** Virtual seconds per GiB; 0 where they say nothing. */
  readonly growVirtual: number;
  readonly shrinkVirtual: number;
  readonly requestsPerGiB: number;
  /** Virtual milliseconds from the host's request until the first of the memory can be used. */
  readonly firstByteMs: number;
  /** GiB that could not be taken back. */
  readonly left: number;
}

/** Touching fresh host memory costs more than what is measured: it is kept. */
let host: HostBuffers | null = null;

/** The first event since `arm`, in virtual time. */
class FirstEvent {
  #armedAt = -1;
  ms = 0;
  now: () => number = () => 0;
  arm(): void {
    this.#armedAt = this.now();
  }
  happened(): void {
    if (this.#armedAt < 0) return;
    this.ms = (this.now() - this.#armedAt) / NS_PER_MS;
    this.#armedAt = -1;
  }
}

function session(
  vm: VmSpec,
  vcpus: number,
  watch: MemoryWatch = {},
): { vm: InlineSession; orders: Int32Array } {
  host ??= hostBuffers(HOST);
  const spec: RunSpec = {
    hostFrames: HOST / PAGE_SIZE,
    backing: 'thp',
    vms: [vm],
    vcpusPerVm: vcpus,
    workers: vcpus,
    sampleNs: Number.POSITIVE_INFINITY,
    graceNs: Number.POSITIVE_INFINITY,
    traceOut: false,
    poison: 'edges',
  };
  const buffers = runBuffers(spec, host);
  const running = new InlineSession(spec, buffers, (_vm, bytes) => fileStorage(bytes), watch);
  return { vm: running, orders: new Int32Array(buffers.handles[0]) };
}

function guest(bytes: number, vcpus: number, initOnAlloc: boolean): GuestConfig {
  return {
    e820: [
      { start: 0, end: 160 },
      { start: 256, end: bytes / PAGE_SIZE },
    ],
    nodes: [{ start: 0, end: bytes / PAGE_SIZE }],
    maxPfn: bytes / PAGE_SIZE,
    nrCpus: vcpus,
    cpuNode: new Array<number>(vcpus).fill(0),
    initOnAlloc,
    pagePoison: false,
    balloon: false,
    blk: false,
    blocks: { kind: 'linear', pagesPerFile: 1 << 20 },
  };
}

/** Real and virtual time of `act` and what it makes the guest do. */
function timed(vm: InlineSession, act: () => void): { seconds: number; virtual: number } {
  const { vcpus } = vm.host.vms[0].vm;
  const from = vcpus.clock(0);
  const began = performance.now();
  act();
  vm.settle();
  return { seconds: (performance.now() - began) / 1000, virtual: (vcpus.clock(0) - from) / NS_PER_S };
}

export function resizeRegion(use: Use, initOnAlloc: boolean, vcpus: number): ResizeFigures {
  const device = {
    id: 'vm0',
    addr: 4 * GiB,
    regionBytes: MOVED,
    blockBytes: BLOCK,
    node: 0,
    requestedBytes: 0,
    profile: 'qemu',
  } as const;
  const first = new FirstEvent();
  let plugs = 0;
  const { vm, orders } = session(
    {
      bootAtNs: 0,
      guest: {
        ...guest(BOOT, vcpus, initOnAlloc),
        maxPfn: (device.addr + MOVED) / PAGE_SIZE,
        hotplug: { ...LINUX_HOTPLUG, devices: 1, policy: 'online_movable' },
      },
      program: { kind: 'agent' },
      memoryDevices: [device],
      diskBytes: 0,
    },
    vcpus,
    {
      // The driver has added the first memory block and put it online when it asks for the second.
      request: (_device, { type }) => {
        if (type === 'PLUG' && ++plugs === 2) first.happened();
      },
    },
  );
  vm.settle();
  const [{ memory, vm: machine }] = vm.host.vms;
  first.now = () => Math.max(machine.kickTime, machine.vcpus.clock(0));
  first.arm();
  const grow = timed(vm, () => memory[0].setRequested(MOVED));
  const { plugRequests } = memory[0].counters;
  if (use === 'half used') orderCache(orders, MOVED / 2 / PAGE_SIZE);
  if (use === 'fragmented')
    orderPins(
      orders,
      Array.from({ length: MOVED / BLOCK / 8 }, (_, i) => (device.addr + 8 * i * BLOCK) / PAGE_SIZE),
    );
  vm.settle();
  const shrink = timed(vm, () => memory[0].setRequested(0));
  const taken = (MOVED - memory[0].pluggedBytes) / GiB;
  return {
    grow: MOVED / GiB / grow.seconds,
    shrink: taken / shrink.seconds,
    growVirtual: grow.virtual,
    shrinkVirtual: shrink.virtual / taken,
    requestsPerGiB: (plugRequests + memory[0].counters.unplugRequests) / (1 + taken),
    firstByteMs: first.ms,
    left: memory[0].pluggedBytes / GiB,
  };
}

/** The same GiB by the balloon: inflated, and deflated again. */
export function resizeBalloon(initOnAlloc: boolean, vcpus: number): ResizeFigures {
  const first = new FirstEvent();
  const { vm } = session(
    {
      bootAtNs: 0,
      guest: { ...guest(BOOT + MOVED, vcpus, initOnAlloc), balloon: true },
      program: { kind: 'agent' },
      balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ],
      diskBytes: 0,
    },
    vcpus,
    { balloon: () => first.happened() },
  );
  vm.settle();
  const [{ balloon, vm: machine }] = vm.host.vms;
  if (balloon === null) throw new Error('a balloon');
  first.now = () => Math.max(machine.kickTime, machine.vcpus.clock(0));
  const shrink = timed(vm, () => balloon.setTarget(BOOT));
  first.arm();
  const grow = timed(vm, () => balloon.setTarget(BOOT + MOVED));
  return {
    grow: MOVED / GiB / grow.seconds,
    shrink: MOVED / GiB / shrink.seconds,
    growVirtual: grow.virtual,
    shrinkVirtual: shrink.virtual,
    requestsPerGiB: balloon.counters.descriptors / 2,
    firstByteMs: first.ms,
    left: 0,
  };
}

/**
 * The same GiB by reporting: used by the guest, so that the host gives it; freed, and reported. Nobody asks, and the first
 * byte is there at its fault. A request is a range that is reported.
 */
export function resizeReporting(initOnAlloc: boolean, vcpus: number): ResizeFigures {
  const [start, held] = [20 * NS_PER_S, 10 * NS_PER_S];
  const { vm } = session(
    {
      bootAtNs: 0,
      guest: { ...guest(BOOT + MOVED, vcpus, initOnAlloc), balloon: true },
      program: {
        kind: 'touch-free',
        startNs: start,
        pages: MOVED / PAGE_SIZE / vcpus,
        order: 0,
        rounds: 1,
        holdNs: held,
        pauseNs: 0,
      },
      balloonFeatures: [VIRTIO_BALLOON_F_REPORTING],
      diskBytes: 0,
    },
    vcpus,
  );
  vm.settle();
  const [{ balloon, vm: machine, file }] = vm.host.vms;
  if (balloon === null) throw new Error('a balloon');
  const until = (at: number): { seconds: number; virtual: number } => timed(vm, () => vm.passTo(at));
  const before = file.assigned;
  const grow = until(start + held / 2);
  const used = (file.assigned - before) * PAGE_SIZE;
  const { returnedBytes } = machine.counters;
  const { descriptors } = balloon.counters;
  const shrink = until(start + 4 * held);
  const taken = (machine.counters.returnedBytes - returnedBytes) / GiB;
  return {
    grow: used / GiB / grow.seconds,
    shrink: taken / shrink.seconds,
    // Mostly waiting: for the program, and for the delay of a report.
    growVirtual: 0,
    shrinkVirtual: 0,
    requestsPerGiB: (balloon.counters.descriptors - descriptors) / taken,
    firstByteMs: 0,
    left: Math.max(0, used / GiB - taken),
  };
}
