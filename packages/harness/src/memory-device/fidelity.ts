/**
 * `ebb fidelity virtio-mem`: sets a captured machine up, asks of its devices what was asked then, and compares the requests
 * of our driver, and the answers of our device, with the real pair's.
 *
 * A step is taken when the guest is idle, not before the captured time: the order counts, and the 50 s retry timer sees
 * the time it saw. What a real guest could not give back depends on where its kernel had put things; so before each
 * shrink exactly those sub-blocks that the capture leaves plugged are given a page of unmovable memory.
 */
import { LINUX_HOTPLUG, ZONE_DMA32, type GuestConfig } from '@ebb/guest-kernel';
import { MiB, NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import { orderPins, ordersDone } from '../run/agent-program.ts';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import { InlineSession } from '../run/inline-session.ts';
import type { RunSpec } from '../run/spec.ts';
import { UserError } from '../trace/trace.ts';
import { longestCommonSubsequence, type Aligned } from './align.ts';
import { pcMemory } from './pc-memory.ts';
import type { Session, SessionRequest } from './session-file.ts';

/**
 * Memory of the simulated host. What is unplugged goes back, so it need not hold all that was ever plugged; but every
 * sub-block that keeps one page in use takes 2 MiB of a host with huge pages.
 */
const HOST_BYTES: number = 4096 * MiB;
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
  const leftovers = pinsPerStep(session);
  session.steps.forEach((step, i) => {
    vm.passTo(Math.max(vm.now, step.t * NS_PER_S));
    const [{ memory }] = vm.host.vms;
    switch (step.action) {
      case 'resize': {
        const device = memory.find((m) => m.id === step.device);
        if (device === undefined) throw new UserError(`step ${i}: no device '${step.device}'`);
        onStep(`${step.t.toFixed(1)} s: ${step.device} → ${formatMiB(step.requestedSize)}`);
        if (step.requestedSize < device.pluggedBytes) {
          orderPins(orders, leftovers[i]);
          while (!ordersDone(orders)) vm.settle();
        }
        device.setRequested(step.requestedSize);
        break;
      }
      case 'migration':
        for (const device of memory) device.busy = step.active;
        break;
      case 'system_reset':
        throw new UserError(`step ${i}: system_reset is not modelled`);
      case 'note':
        break;
    }
    vm.settle();
  });
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

/**
 * For each step the sub-blocks of all devices that hold unmovable memory, as first pages: after a shrink, what the
 * capture left plugged of that device; nothing else.
 */
function pinsPerStep(session: Session): number[][] {
  const streams = new Map(
    session.devices.map((d) => [
      d.id,
      {
        device: d,
        plugged: new Set<number>(),
        next: 0,
        list: session.requests.filter((r) => deviceOf(session, r) === d.id),
      },
    ]),
  );
  type Stream = typeof streams extends Map<string, infer S> ? S : never;
  const apply = (s: Stream): void => {
    const { type, addr = 0, nbBlocks = 0, response } = s.list[s.next++];
    if (response !== 'ACK') return;
    if (type === 'UNPLUG_ALL') s.plugged.clear();
    for (let b = 0; b < nbBlocks * s.device.blockSize; b += SUB_BLOCK) {
      if (type === 'PLUG') s.plugged.add((addr + b) / PAGE_SIZE);
      else if (type === 'UNPLUG') s.plugged.delete((addr + b) / PAGE_SIZE);
    }
  };
  const towards = (s: Stream, size: number): void => {
    const way = size > s.plugged.size * SUB_BLOCK ? 'PLUG' : 'UNPLUG';
    while (s.next < s.list.length && s.plugged.size * SUB_BLOCK !== size && s.list[s.next].type === way)
      apply(s);
  };
  for (const s of streams.values()) towards(s, s.device.requestedSizeAtStart);
  return session.steps.map((step) => {
    if (step.action !== 'resize') return [];
    const s = streams.get(step.device);
    if (s === undefined) return [];
    const shrinks = step.requestedSize < s.plugged.size * SUB_BLOCK;
    towards(s, step.requestedSize);
    return shrinks ? [...s.plugged].toSorted((a, b) => a - b) : [];
  });
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
