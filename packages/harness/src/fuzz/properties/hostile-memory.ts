/**
 * A hostile guest on a memory device that the host resizes: requests of every kind, rewritten while they are served, access
 * to memory that is not plugged, device resets at any moment, system resets of both policies; beside an honest guest. An
 * independent model of the bitmap follows each answer. In the end no unplugged block has a frame, under the profiles that
 * promise so, and all books agree.
 */
import { LINE_MEM, MMIO_BASE, MMIO_STRIDE } from '@ebb/guest-kernel';
import {
  MEMORY_PROFILES,
  MemoryDevice,
  RegionSlots,
  type DevicePort,
  type MemoryRequest,
  type TaskBody,
} from '@ebb/host-kvm';
import { gfn, PAGE_SIZE, VmKilled } from '@ebb/machine';
import {
  MMIO_DEVICE_FEATURES,
  MMIO_DEVICE_FEATURES_SEL,
  MMIO_DRIVER_FEATURES,
  MMIO_DRIVER_FEATURES_SEL,
  MMIO_QUEUE_DESC_LOW,
  MMIO_QUEUE_DEVICE_LOW,
  MMIO_QUEUE_DRIVER_LOW,
  MMIO_QUEUE_NOTIFY,
  MMIO_QUEUE_NUM,
  MMIO_QUEUE_READY,
  MMIO_QUEUE_SEL,
  MMIO_STATUS,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';
import * as fc from 'fast-check';
import { attachDevice } from '../attach-device.ts';
import type { HostLab, LabShape, VcpuLab } from '../lab.ts';
import type { Op, Property } from '../property.ts';
import { memoryOps, runMemoryOps } from './memory.ts';

/** Pages of a block: QEMU's least, 1 MiB. */
const BLOCK = 256;
const BLOCKS = 3;
/** First page of the region. */
const REGION = BLOCK;
const RING_PAGE = 8;
const DATA_PAGE = 21;
const QUEUE_SIZE = 16;
/** What `scribble` writes (`vm.ts`). */
const NOISE = 0x5c21_bb1e;
/** Top nibble of what this guest stores. */
const MARK = 0xa;
/** Looks at the used ring before the guest gives up waiting: a device that needs a reset answers nothing. */
const PATIENCE = 30;

/** Model words, beside those of the honest guest: operations begun, system resets asked for (policy in the low bit) and done, and whether the guest has ended. */
const OPS_DONE = 200;
const ASKED = 201;
const POLICY = 202;
const DONE = 203;
const ENDED = 204;

const guestOp: fc.Arbitrary<Op> = fc.record({
  op: fc.constantFrom(
    'bring-up',
    'request',
    'request',
    'request',
    'request',
    'request',
    'request',
    'rewrite',
    'kick',
    'wait',
    'wait',
    'store',
    'store',
    'store',
    'store',
    'load',
    'load',
    'register-write',
    'reset',
    'system-reset',
  ),
  a: fc.nat({ max: 255 }),
  b: fc.nat({ max: 255 }),
});
const hostOp: fc.Arbitrary<Op> = fc.record({
  op: fc.constantFrom('resize', 'resize', 'busy'),
  a: fc.nat({ max: BLOCKS }),
  /** Operations of the guest to wait for. */
  b: fc.nat({ max: 20 }),
});
/** The first operation of the host chooses the device's profile. */
const profileOp: fc.Arbitrary<Op> = fc.record({
  op: fc.constant('profile'),
  a: fc.nat({ max: MEMORY_PROFILES.length - 1 }),
  b: fc.constant(0),
});

const shape: LabShape = {
  hostPages: 160,
  ramPages: REGION + BLOCKS * BLOCK,
  vms: 2,
  vcpus: 1,
  huge: 'never',
};

class HostileGuest {
  readonly #lab: VcpuLab;
  #index = 0;
  #block = 0;
  /** Blocks it last asked for: most requests are those that may succeed. */
  readonly #asked = new Set<number>();
  /** It has reset the device, or may have. */
  #down = false;

  constructor(lab: VcpuLab) {
    this.#lab = lab;
  }

  #write(offset: number, value: number): void {
    this.#lab.vcpu.mmioWrite(MMIO_BASE + LINE_MEM * MMIO_STRIDE + offset, 4, value);
  }
  #read(offset: number): number {
    return this.#lab.vcpu.mmioRead(MMIO_BASE + LINE_MEM * MMIO_STRIDE + offset, 4);
  }

  one({ op, a, b }: Op): void {
    const { vcpu } = this.#lab;
    // Mostly in the block it last asked about: the device is at it now.
    const block = (a & 3) === 0 ? (a >> 2) % BLOCKS : this.#block;
    const page = gfn(REGION + block * BLOCK + ((a >> 4) % 3));
    switch (op) {
      case 'bring-up':
        this.bringUp();
        break;
      case 'request':
        this.#request(a, b);
        break;
      case 'rewrite':
        // While it is served: another type, another block, another length.
        vcpu.store32(gfn(DATA_PAGE), a % 6, b);
        vcpu.store32(gfn(RING_PAGE), 2 + 4 * (a & 1), b);
        break;
      case 'kick':
        this.#write(MMIO_QUEUE_NOTIFY, a & 1);
        break;
      case 'wait':
        this.#wait();
        break;
      case 'store':
        vcpu.store32(page, b, (MARK << 28) | (a << 8) | b);
        break;
      case 'load':
        this.#check(page, vcpu.load32(page, b));
        break;
      case 'register-write':
        this.#write((a * 4) % 0x140, b);
        this.#down = true;
        break;
      case 'reset':
        this.#write(MMIO_STATUS, 0);
        this.#down = true;
        break;
      case 'system-reset':
        this.#systemReset(a & 1);
        break;
    }
  }

  /** Nothing but what this guest stored, zeros, the device's noise, or nothing at all (I1, I15). */
  #check(page: number, value: number): void {
    if (value === 0 || value === -1 || value === NOISE || value >>> 28 === MARK) return;
    this.#lab.found.push(
      `foreign content (I1, I15): gfn 0x${page.toString(16)} holds 0x${(value >>> 0).toString(16)}`,
    );
  }

  /** As a driver would: it takes what is offered. */
  bringUp(): void {
    for (const status of [0, 1, 3]) this.#write(MMIO_STATUS, status);
    for (const half of [0, 1]) {
      this.#write(MMIO_DEVICE_FEATURES_SEL, half);
      this.#write(MMIO_DRIVER_FEATURES_SEL, half);
      this.#write(MMIO_DRIVER_FEATURES, this.#read(MMIO_DEVICE_FEATURES));
    }
    this.#write(MMIO_STATUS, 11);
    this.#write(MMIO_QUEUE_SEL, 0);
    this.#write(MMIO_QUEUE_NUM, QUEUE_SIZE);
    [MMIO_QUEUE_DESC_LOW, MMIO_QUEUE_DRIVER_LOW, MMIO_QUEUE_DEVICE_LOW].forEach((offset, i) => {
      this.#write(offset, (RING_PAGE + i) * PAGE_SIZE);
      this.#write(offset + 4, 0);
    });
    for (let word = 0; word < QUEUE_SIZE; word++)
      for (const ring of [1, 2]) this.#lab.vcpu.store32(gfn(RING_PAGE + ring), word, 0);
    this.#write(MMIO_QUEUE_READY, 1);
    this.#write(MMIO_STATUS, 15);
    this.#index = 0;
    this.#down = false;
  }

  /** A request of any type, mostly for blocks that there are; published and kicked. */
  #request(a: number, b: number): void {
    const { vcpu } = this.#lab;
    if (this.#down) this.bringUp();
    const block = (a >> 3) % (BLOCKS + (b % 8 === 0 ? 1 : 0));
    const count = b % 16 === 0 ? 0xffff : b % 13 === 0 ? 0 : b % 7 === 0 ? 2 : 1;
    this.#block = Math.min(block, BLOCKS - 1);
    const flip = this.#asked.has(block) ? VIRTIO_MEM_REQ_UNPLUG : VIRTIO_MEM_REQ_PLUG;
    const type = (a & 7) < 2 ? b % 5 : flip;
    if (type === VIRTIO_MEM_REQ_PLUG) this.#asked.add(block);
    else if (type === VIRTIO_MEM_REQ_UNPLUG) this.#asked.delete(block);
    else if (type === VIRTIO_MEM_REQ_UNPLUG_ALL) this.#asked.clear();
    const header = [type, 0, (REGION + block * BLOCK) * PAGE_SIZE + (b % 17 === 0 ? 512 : 0), 0, count];
    header.forEach((word, i) => vcpu.store32(gfn(DATA_PAGE), i, word));
    const gpa = DATA_PAGE * PAGE_SIZE;
    const descriptors = [
      [gpa, 0, MEM_REQ_BYTES, VIRTQ_DESC_F_NEXT | (1 << 16)],
      [gpa + 64, 0, MEM_RESP_BYTES, VIRTQ_DESC_F_WRITE],
    ];
    descriptors.flat().forEach((word, i) => vcpu.store32(gfn(RING_PAGE), i, word));
    // Each entry of the available ring is descriptor 0; only the index moves.
    this.#index = (this.#index + 1) & 0xffff;
    vcpu.store32(gfn(RING_PAGE + 1), 0, this.#index << 16);
    this.#write(MMIO_QUEUE_NOTIFY, 0);
  }

  #wait(): void {
    const { vcpu } = this.#lab;
    for (let i = 0; i < PATIENCE && vcpu.load32(gfn(RING_PAGE + 2), 0) >>> 16 !== this.#index; i++) {
      vcpu.beginSection();
      vcpu.port.relax();
    }
  }

  /** Asks the host for a reset of the machine, and boots again when it is over. */
  #systemReset(policy: number): void {
    const { vcpu, model } = this.#lab;
    vcpu.leaveGuest();
    model[POLICY] = policy;
    const mine = Atomics.add(model, ASKED, 1) + 1;
    this.#lab.tellHost();
    while (Atomics.load(model, DONE) !== mine) vcpu.port.relax();
    vcpu.enterGuest();
    this.#asked.clear();
    this.bringUp();
  }
}

/** What the answers say the bitmap is, by a model of its own. */
class BitmapModel {
  readonly found: string[] = [];
  plugged = new Set<number>();

  answered({ type, addr, nbBlocks, response }: MemoryRequest): void {
    const first = addr / PAGE_SIZE / BLOCK - 1;
    const blocks = Array.from({ length: Math.min(nbBlocks, BLOCKS + 1) }, (_, i) => first + i);
    const inside = Number.isInteger(first) && first >= 0 && nbBlocks > 0 && first + nbBlocks <= BLOCKS;
    const all = (plugged: boolean): boolean => blocks.every((b) => this.plugged.has(b) === plugged);
    const say = (what: string): void =>
      void this.found.push(
        `model: ${type} of ${nbBlocks} at block ${first} is ${response}: ${what} (5.15.6)`,
      );
    if (response !== 'ACK') return;
    if (type !== 'UNPLUG_ALL' && !inside) say('outside the region');
    if (type === 'PLUG') {
      if (!all(false)) say('some are plugged');
      for (const b of blocks) this.plugged.add(b);
    } else if (type === 'UNPLUG') {
      if (!all(true)) say('some are not plugged');
      for (const b of blocks) this.plugged.delete(b);
    } else if (type === 'UNPLUG_ALL') this.plugged.clear();
  }
}

/** Serves system resets until the guest has ended. */
function* resets(
  lab: HostLab,
  device: MemoryDevice,
  resetTransport: () => void,
  bitmap: BitmapModel,
): TaskBody {
  const { model } = lab;
  for (;;) {
    yield () => Atomics.load(model, ASKED) !== model[DONE] || model[ENDED] !== 0;
    if (Atomics.load(model, ASKED) === model[DONE]) return;
    resetTransport();
    const policy = model[POLICY] === 0 ? 'virtio-1.2' : 'rfc-2017';
    // What a request began before is carried out first: the model hears of it only now.
    if (!device.idle) yield () => device.idle;
    const { size } = bitmap.plugged;
    yield* device.systemReset(policy);
    // I10: no holes, and not a block more or less.
    bitmap.plugged = new Set(Array.from({ length: policy === 'rfc-2017' ? size : 0 }, (_, b) => b));
    Atomics.store(model, DONE, Atomics.load(model, ASKED));
  }
}

function* hostTask(lab: HostLab, device: MemoryDevice, op: Op): TaskBody {
  const { model } = lab;
  if (model[OPS_DONE] < op.b) yield () => model[OPS_DONE] >= op.b || model[ENDED] !== 0;
  if (op.op === 'resize') device.setRequested(op.a * BLOCK * PAGE_SIZE);
  else {
    device.busy = true;
    for (let i = 0; i < 6; i++) yield undefined;
    device.busy = false;
  }
}

/** Books, and what stands behind unplugged blocks. */
function verdict(lab: HostLab, device: MemoryDevice, bitmap: BitmapModel): string[] {
  const { found } = bitmap;
  if (device.pluggedBytes !== device.plugged.count() * device.blockBytes)
    found.push(`plugged_size ${device.pluggedBytes} is not ${device.plugged.count()} blocks`);
  const enforces = device.profile === 'rfc-write-protect' || device.profile === 'inaccessible';
  const [{ file }] = lab.vms;
  for (let b = 0; b < BLOCKS; b++) {
    const plugged = device.plugged.has(b);
    if (plugged !== bitmap.plugged.has(b))
      found.push(`model: block ${b} is ${plugged ? '' : 'not '}plugged, the answers say otherwise (5.15.6)`);
    if (plugged || !enforces) continue;
    for (let p = REGION + b * BLOCK; p < REGION + (b + 1) * BLOCK; p++)
      if (file.bmap(p) >= 0) found.push(`unplugged: page ${p} of block ${b} has a frame (I2, H10)`);
  }
  return found;
}

/** Boot memory alone in the lab's slot, and a slot for each block of the region, which comes and goes with it. */
function slotPerBlock(lab: HostLab): RegionSlots {
  const [{ vm, file }] = lab.vms;
  const boot = { slot: 0, flags: 0, guestPhysAddr: 0, file, fileOffset: 0 };
  for (const memorySize of [0, REGION * PAGE_SIZE])
    for (const set = vm.setUserMemoryRegion({ ...boot, memorySize }); set.next().done !== true; );
  return new RegionSlots({
    vm,
    file,
    fileOffset: REGION,
    firstSlot: 1,
    baseGfn: REGION,
    nrPages: BLOCKS * BLOCK,
    slotPages: BLOCK,
  });
}

export const hostileMemory: Property = {
  name: 'hostile-memory',
  about: 'a hostile guest on a memory device that the host resizes, with resets of device and system',
  rows: 'I1 I2 I4 I9 I10 I15 I16 I17 H10 H11 H12 H32',
  shape,
  hostileRings: true,
  steps: 2500,
  program: fc.record({
    host: fc
      .tuple(profileOp, fc.array(hostOp, { minLength: 1, maxLength: 5 }))
      .map(([profile, ops]) => [profile, ...ops]),
    cpus: fc.tuple(
      fc.array(guestOp, { minLength: 8, maxLength: 40 }),
      fc.array(memoryOps, { minLength: 2, maxLength: 8 }),
    ),
  }),
  host(lab, program) {
    const [{ vm }] = lab.vms;
    const port: DevicePort = {
      spawn: (n, body) => lab.spawn(n, body),
      now: () => vm.kickTime,
      costs: vm.costs,
    };
    const bitmap = new BitmapModel();
    const [first, ...ops] = program.host;
    const profile = MEMORY_PROFILES[first?.a ?? 0];
    const slots = profile === 'inaccessible' ? slotPerBlock(lab) : null;
    const device = new MemoryDevice({
      port,
      id: 'vm0',
      addr: REGION * PAGE_SIZE,
      regionBytes: BLOCKS * BLOCK * PAGE_SIZE,
      blockBytes: BLOCK * PAGE_SIZE,
      node: 0,
      requestedBytes: BLOCKS * BLOCK * PAGE_SIZE,
      profile,
      onRequest: (request) => bitmap.answered(request),
      region: {
        pageBytes: PAGE_SIZE,
        discard: (gfn, count) =>
          slots === null ? vm.discard(Int32Array.of(gfn, count), 1) : slots.discard(gfn, count),
        unmap: (gfn, count) => vm.unmap(gfn, count),
        ...(slots === null
          ? {}
          : {
              activate: (gfn: number, count: number) => slots.activate(gfn, count),
              deactivate: (...pages: Parameters<RegionSlots['deactivate']>) => slots.deactivate(...pages),
            }),
      },
    });
    vm.addGate(device.unplugged);
    const transport = attachDevice(lab, vm, LINE_MEM, device);
    ops.forEach((op, i) => lab.spawn(`${op.op} ${i}`, hostTask(lab, device, op)));
    lab.spawn(
      'resets',
      resets(lab, device, () => transport.reset(), bitmap),
    );
    return () => verdict(lab, device, bitmap);
  },
  cpu(lab, program, vm, id) {
    if (vm === 1) {
      runMemoryOps(lab, program.cpus[1], vm, id);
      return;
    }
    try {
      const guest = new HostileGuest(lab);
      lab.vcpu.enterGuest();
      guest.bringUp();
      for (const op of program.cpus[0]) {
        lab.model[OPS_DONE]++;
        lab.tellHost();
        guest.one(op);
      }
      lab.vcpu.leaveGuest();
    } catch (error) {
      if (!(error instanceof VmKilled)) throw error;
    } finally {
      lab.model[ENDED] = 1;
      lab.tellHost();
    }
  },
};
