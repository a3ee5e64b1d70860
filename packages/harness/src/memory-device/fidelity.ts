/**
 * `ebb fidelity virtio-mem`: sets a captured machine up, asks of its devices what was asked then, and compares the requests
 * of our driver, and the answers of our device, with the real pair's.
 *
 * A step is taken when the guest is idle, not before the captured time: the order counts, and the 50 s retry timer sees
 * the time it saw. What a real guest could not give back depends on where its kernel had put things; so before each
 * shrink exactly those sub-blocks that the capture leaves plugged are given a page of unmovable memory.
 */
import { LINUX_HOTPLUG, ZONE_DMA32, type GuestConfig } from '@ebb/guest-kernel';
import { assert, MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { orderDrivers, orderPins, ordersDone } from '../run/agent-program.ts';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import { InlineSession } from '../run/inline-session.ts';
import type { RunSpec } from '../run/spec.ts';
import { longestCommonSubsequence, type Aligned } from './align.ts';
import { pcMemory } from './pc-memory.ts';
import type { Session, SessionRequest } from './session-file.ts';

/**
 * Memory of the simulated host. What is unplugged goes back, so it need not hold all that was ever plugged; but every
 * sub-block that keeps one page in use takes 2 MiB of a host with huge pages.
 */
const HOST_BYTES: number = 4096 * MiB;
/** A silence as long within one shrink is the retry timer's, 50 s or more; and how long before its end pins change. */
const RETRY_GAP_S = 40;
const BEFORE_RETRY_S = 5;
/** Linux's sub-block: a pageblock. */
const SUB_BLOCK: number = 2 * MiB;

interface DeviceFidelity {
  readonly device: string;
  readonly requests: { readonly ebb: number; readonly real: number };
  /** Length of the longest common subsequence. */
  readonly agree: number;
  /** `agree` ÷ the longer of the two. */
  readonly share: number;
  readonly aligned: readonly Aligned[];
}

export interface MemoryFidelity {
  readonly devices: readonly DeviceFidelity[];
  readonly agree: number;
  readonly share: number;
  readonly ledgerViolations: number;
  readonly virtualSeconds: number;
}

type Request = Omit<SessionRequest, 't' | 'type'> & { readonly device: string; readonly type: string };

/** One request as a line: what is compared. */
function line(r: Request): string {
  const range = r.addr === undefined ? '' : ` 0x${r.addr.toString(16)} ${r.nbBlocks ?? 0}`;
  return `${r.type}${r.type === 'UNPLUG_ALL' ? '' : range} ${r.response}`;
}

export function memoryFidelity(session: Session, onStep: (text: string) => void): MemoryFidelity {
  const spec = specOf(session);
  const buffers = runBuffers(spec, hostBuffers(HOST_BYTES));
  const ours: Request[] = [];
  const disks: { close(): void }[] = [];
  const vm = new InlineSession(
    spec,
    buffers,
    (_vm, bytes) => {
      const disk = fileStorage(bytes);
      disks.push(disk);
      return disk;
    },
    { request: (device, request) => ours.push({ device, ...request }) },
  );
  const orders = new Int32Array(buffers.handles[0]);
  vm.settle();
  const pins = new Map<string, readonly number[]>();
  const pin = (device: string, pfns: readonly number[]): void => {
    pins.set(device, pfns);
    orderPins(orders, [...pins.values()].flat());
    while (!ordersDone(orders)) vm.settle();
  };
  for (const { t, step, left } of timeline(session)) {
    vm.passTo(Math.max(vm.now, t * NS_PER_S));
    const [{ memory }] = vm.host.vms;
    if (left !== undefined) pin(left.device, left.plugged);
    switch (step?.action) {
      case 'resize': {
        const device = memory.find((m) => m.id === step.device);
        assert(device !== undefined, 'the session was judged when it was read');
        onStep(`${t.toFixed(1)} s: ${step.device} → ${formatMiB(step.requestedSize)}`);
        device.setRequested(step.requestedSize);
        break;
      }
      case 'migration':
        for (const device of memory) device.busy = step.active;
        break;
      case 'system_reset':
        onStep(`${t.toFixed(1)} s: system_reset`);
        vm.host.systemReset(0, 'virtio-1.2');
        break;
      case 'rmmod':
      case 'insmod':
        onStep(`${t.toFixed(1)} s: ${step.action}`);
        orderDrivers(orders, step.action);
        break;
      case 'offline':
      case 'online':
        onStep(`${t.toFixed(1)} s: ${step.action} 0x${step.addr.toString(16)}`);
        orderDrivers(orders, step.action, step.addr / PAGE_SIZE);
        break;
      case 'note':
      case undefined:
        break;
    }
    vm.settle();
    while (!ordersDone(orders)) vm.settle();
  }
  vm.passTo(Math.max(vm.now, ((session.requests.at(-1)?.t ?? 0) + 1) * NS_PER_S));
  for (const disk of disks) disk.close();
  const result = vm.host.result();
  const devices = session.devices.map(({ id }) => compareDevice(session, ours, id));
  const agree = devices.reduce((sum, d) => sum + d.agree, 0);
  const longer = devices.reduce((sum, d) => sum + Math.max(d.requests.ebb, d.requests.real), 0);
  return {
    devices,
    agree,
    share: longer === 0 ? 1 : agree / longer,
    ledgerViolations: result.ledgerViolations,
    virtualSeconds: vm.now / NS_PER_S,
  };
}

const formatMiB = (bytes: number): string => `${bytes / MiB} MiB`;

function compareDevice(session: Session, ours: readonly Request[], id: string): DeviceFidelity {
  const ebb = ours.filter((r) => r.device === id).map(line);
  const real = session.requests
    .map((r) => ({ ...r, device: deviceOf(session, r) }))
    .filter((r) => r.device === id)
    .map(line);
  const aligned = longestCommonSubsequence(ebb, real);
  const agree = aligned.filter((a) => a.ebb === a.real).length;
  const longer = Math.max(ebb.length, real.length);
  return {
    device: id,
    requests: { ebb: ebb.length, real: real.length },
    agree,
    share: longer === 0 ? 1 : agree / longer,
    aligned,
  };
}

/** The device whose region a request names; one without an address belongs to the first. */
function deviceOf(session: Session, request: SessionRequest): string {
  const { addr } = request;
  const device =
    addr === undefined
      ? session.devices[0]
      : session.devices.find((d) => addr >= d.memaddr && addr < d.memaddr + d.maxSize);
  return device?.id ?? '';
}

/** What the capture says of one device, read pass by pass. */
class DeviceStream {
  readonly plugged = new Set<number>();
  requested: number;
  readonly #device: Session['devices'][number];
  readonly #requests: readonly SessionRequest[];
  #next = 0;

  constructor(session: Session, device: Session['devices'][number]) {
    this.#device = device;
    this.requested = device.requestedSizeAtStart;
    this.#requests = session.requests.filter((r) => deviceOf(session, r) === device.id);
  }

  get left(): { readonly device: string; readonly plugged: readonly number[] } {
    return { device: this.#device.id, plugged: [...this.plugged].toSorted((a, b) => a - b) };
  }

  /** Applies the requests of one pass towards `size`. When the retry timer began another, its time, else null. */
  pass(size: number): number | null {
    this.requested = size;
    const way = size > this.plugged.size * SUB_BLOCK ? 'PLUG' : 'UNPLUG';
    let before: SessionRequest | undefined;
    for (; this.plugged.size * SUB_BLOCK !== size; this.#next++) {
      const request = this.#requests.at(this.#next);
      if (request?.type !== way) break;
      // A device that was busy has not left anything; memory that would not go has.
      if (before?.response === 'ACK' && request.t - before.t > RETRY_GAP_S) return request.t;
      this.#apply(request);
      before = request;
    }
    return null;
  }

  #apply({ type, addr = 0, nbBlocks = 0, response }: SessionRequest): void {
    if (response !== 'ACK') return;
    for (let b = 0; b < nbBlocks * this.#device.blockSize; b += SUB_BLOCK) {
      if (type === 'PLUG') this.plugged.add((addr + b) / PAGE_SIZE);
      else this.plugged.delete((addr + b) / PAGE_SIZE);
    }
  }
}

/** A step of the session, or a moment before a retry; and the sub-blocks that from here on hold unmovable memory. */
interface Moment {
  readonly t: number;
  readonly step?: Session['steps'][number];
  /** What the capture leaves plugged of a device that shrinks, as first pages. */
  readonly left?: { readonly device: string; readonly plugged: readonly number[] };
}

/**
 * The session's steps, each shrink with what the capture left plugged. A real pass may end early, because memory to move
 * pages to had run out, and go on at the retry timer: then what the retry left replaces it shortly before.
 */
function timeline(session: Session): Moment[] {
  const streams = new Map(session.devices.map((d) => [d.id, new DeviceStream(session, d)]));
  for (const s of streams.values()) s.pass(s.requested);
  const moments: Moment[] = [];
  for (const step of session.steps) {
    if (step.action === 'system_reset') {
      // Nothing is plugged any more; the guest that boots plugs what is requested.
      for (const s of streams.values()) {
        s.plugged.clear();
        s.pass(s.requested);
      }
    }
    const s = step.action === 'resize' ? streams.get(step.device) : undefined;
    if (step.action !== 'resize' || s === undefined) {
      moments.push({ t: step.t, step });
      continue;
    }
    const shrinks = step.requestedSize < s.plugged.size * SUB_BLOCK;
    let retry = s.pass(step.requestedSize);
    moments.push({ t: step.t, step, ...(shrinks ? { left: s.left } : {}) });
    while (retry !== null) {
      const t = retry - BEFORE_RETRY_S;
      retry = s.pass(step.requestedSize);
      moments.push({ t, left: s.left });
    }
  }
  return moments.toSorted((a, b) => a.t - b.t);
}

function specOf(session: Session): RunSpec {
  const memory = pcMemory(session.boot);
  const end = Math.max(memory.end, ...session.devices.map((d) => (d.memaddr + d.maxSize) / PAGE_SIZE));
  const guest: GuestConfig = {
    e820: memory.e820,
    nodes: memory.nodes,
    maxPfn: end,
    nrCpus: session.vcpus,
    cpuNode: Array.from({ length: session.vcpus }, (_, cpu) => cpu % memory.nodes.length),
    initOnAlloc: session.initOnAlloc,
    pagePoison: false,
    balloon: false,
    blk: false,
    hotplug: {
      ...LINUX_HOTPLUG,
      devices: session.devices.length,
      policy: session.onlinePolicy,
      sectionPages: session.linuxMemoryBlockSize / PAGE_SIZE,
      // Which sub-blocks cannot go is told by the capture; our memmap must not add any.
      memmapZone: ZONE_DMA32,
    },
    blocks: { kind: 'linear', pagesPerFile: 1024 },
  };
  return {
    hostFrames: HOST_BYTES / PAGE_SIZE,
    backing: 'thp',
    vms: [
      {
        bootAtNs: 0,
        guest,
        program: { kind: 'agent' },
        memoryDevices: session.devices.map((d) => ({
          id: d.id,
          addr: d.memaddr,
          regionBytes: d.maxSize,
          blockBytes: d.blockSize,
          node: d.node,
          requestedBytes: d.requestedSizeAtStart,
          profile: 'qemu',
        })),
        diskBytes: 0,
      },
    ],
    vcpusPerVm: session.vcpus,
    workers: session.vcpus,
    sampleNs: Number.POSITIVE_INFINITY,
    graceNs: Number.POSITIVE_INFINITY,
    traceOut: false,
    poison: 'edges',
  };
}
