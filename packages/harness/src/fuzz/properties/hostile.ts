/**
 * A hostile guest beside an honest one. The hostile VM has a balloon and a disk and does what it likes with them: registers
 * at every offset and width, random bytes in rings and descriptors, requests rewritten while they are served, kicks without
 * buffers, feature games, resets at any moment, reuse of pages it gave away. The host must stay up, its books must add up,
 * no device may touch what it does not hold, and the honest VM's memory must be what it stored.
 */
import { MMIO_BASE, MMIO_STRIDE } from '@ebb/guest-kernel';
import { BalloonDevice, BlockDevice, type DevicePort } from '@ebb/host-kvm';
import { gfn, PAGE_SIZE, VmKilled } from '@ebb/machine';
import {
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
} from '@ebb/virtio/uapi';
import * as fc from 'fast-check';
import { attachDevice } from '../attach-device.ts';
import type { VcpuLab } from '../vcpu-lab.ts';
import type { LabShape } from '../lab.ts';
import type { Op, Property } from '../property.ts';
import { memoryOps, runMemoryOps } from './memory.ts';

const RAM = 32;
/** Guest pages: three ring parts per device, then an indirect table and data. */
const RING_PAGE = 8;
const TABLE_PAGE = 20;
const DATA_PAGE = 21;
const QUEUE_SIZE = 16;

const HOSTILE_OPS = [
  'bring-up',
  'bring-up',
  'submit',
  'submit',
  'submit',
  'indirect',
  'scribble-desc',
  'scribble-avail',
  'rewrite',
  'kick',
  'kick',
  'register-read',
  'register-write',
  'reset',
  'reuse',
  'features',
] as const;

const number = fc.oneof(fc.nat({ max: 40 }), fc.nat({ max: 0x7fff_ffff }));
const hostileOp: fc.Arbitrary<Op> = fc.record({ op: fc.constantFrom(...HOSTILE_OPS), a: number, b: number });

const shape: LabShape = { hostPages: 110, ramPages: RAM, vms: 2, vcpus: 1, huge: 'never' };

class HostileGuest {
  readonly #lab: VcpuLab;
  /** Avail index per device: what a driver would publish. */
  readonly #index = [0, 0];

  constructor(lab: VcpuLab) {
    this.#lab = lab;
  }

  #register(device: number, offset: number): number {
    return MMIO_BASE + device * MMIO_STRIDE + offset;
  }
  #write(device: number, offset: number, value: number): void {
    this.#lab.vcpu.mmioWrite(this.#register(device, offset), 4, value);
  }

  one({ op, a, b }: Op): void {
    const { vcpu } = this.#lab;
    const device = a & 1;
    const ring = RING_PAGE + 3 * device;
    switch (op) {
      case 'bring-up':
        this.#bringUp(device, a >> 1, b);
        break;
      case 'submit':
        this.#submit(device, a >> 1, b, false);
        break;
      case 'indirect':
        this.#submit(device, a >> 1, b, true);
        break;
      case 'scribble-desc':
        vcpu.store32(gfn(ring), (a >> 1) % (QUEUE_SIZE * 4), b);
        break;
      case 'scribble-avail':
        vcpu.store32(gfn(ring + 1), (a >> 1) % (QUEUE_SIZE / 2 + 2), b);
        break;
      case 'rewrite':
        // While it is served: another length, another address, another type.
        vcpu.store32(gfn(TABLE_PAGE), (a >> 1) % 12, b);
        vcpu.store32(gfn(DATA_PAGE), (a >> 1) % 16, b);
        vcpu.store32(gfn(ring), 4 * ((a >> 1) % 4) + 2, b);
        break;
      case 'kick':
        this.#write(device, MMIO_QUEUE_NOTIFY, b % 8);
        break;
      case 'register-read':
        vcpu.mmioRead(this.#register(device, a % 0x220), [1, 2, 4, 8][b & 3]);
        break;
      case 'register-write':
        vcpu.mmioWrite(this.#register(device, (a >> 2) % 0x120), [1, 2, 4, 4][a & 3], b);
        break;
      case 'reset':
        this.#write(device, MMIO_STATUS, 0);
        break;
      case 'reuse':
        vcpu.store32(gfn(a % RAM), b % 1024, b);
        break;
      case 'features':
        this.#write(device, MMIO_DRIVER_FEATURES_SEL, a & 3);
        this.#write(device, MMIO_DRIVER_FEATURES, b);
        break;
    }
  }

  /** As a driver would, but for one thing that `twist` may spoil. */
  #bringUp(device: number, queue: number, twist: number): void {
    const ring = RING_PAGE + 3 * device;
    this.#write(device, MMIO_STATUS, 0);
    this.#write(device, MMIO_STATUS, 1);
    this.#write(device, MMIO_STATUS, 3);
    this.#write(device, MMIO_DRIVER_FEATURES_SEL, 0);
    this.#write(device, MMIO_DRIVER_FEATURES, twist === 1 ? -1 : (1 << 28) | 0x27);
    this.#write(device, MMIO_DRIVER_FEATURES_SEL, 1);
    this.#write(device, MMIO_DRIVER_FEATURES, 1);
    this.#write(device, MMIO_STATUS, 11);
    this.#write(device, MMIO_QUEUE_SEL, queue % 5);
    this.#write(device, MMIO_QUEUE_NUM, twist === 2 ? 7 : QUEUE_SIZE);
    const parts = [MMIO_QUEUE_DESC_LOW, MMIO_QUEUE_DRIVER_LOW, MMIO_QUEUE_DEVICE_LOW];
    parts.forEach((offset, i) => {
      const page = twist === 3 + i ? 0x7fff_f000 : (ring + i) * PAGE_SIZE;
      this.#write(device, offset, page);
      this.#write(device, offset + 4, 0);
    });
    this.#write(device, MMIO_QUEUE_READY, 1);
    this.#write(device, MMIO_STATUS, 15);
    for (let word = 0; word < QUEUE_SIZE; word++) this.#lab.vcpu.store32(gfn(ring + 1), word, 0);
    this.#index[device] = 0;
  }

  /** A buffer of one to three descriptors, most of them sound; published and kicked. */
  #submit(device: number, what: number, twist: number, indirect: boolean): void {
    const { vcpu } = this.#lab;
    const ring = RING_PAGE + 3 * device;
    const table = indirect ? TABLE_PAGE : ring;
    const length = twist % 5 === 0 ? twist : 16 + (twist % 512);
    const count = 1 + (what % 3);
    for (let i = 0; i < count; i++) {
      const at = 4 * (indirect ? i : i + 1);
      vcpu.store32(gfn(table), at, DATA_PAGE * PAGE_SIZE + (what % 8) * 512);
      vcpu.store32(gfn(table), at + 1, twist % 11 === 0 ? twist : 0);
      vcpu.store32(gfn(table), at + 2, i === 1 ? length : 16);
      const next = indirect ? i + 1 : i + 2;
      const last = i === count - 1;
      vcpu.store32(gfn(table), at + 3, (last ? 0 : 1) | (last && device === 1 ? 2 : 0) | (next << 16));
    }
    if (indirect) {
      vcpu.store32(gfn(ring), 4, TABLE_PAGE * PAGE_SIZE);
      vcpu.store32(gfn(ring), 5, 0);
      vcpu.store32(gfn(ring), 6, 16 * count);
      vcpu.store32(gfn(ring), 7, 4);
    }
    // PFNs, or a block request's header.
    for (let i = 0; i < 4; i++) vcpu.store32(gfn(DATA_PAGE), i, (what + i * (1 + (twist % 3))) % (RAM + 4));
    const index = this.#index[device];
    const slot = index % QUEUE_SIZE;
    const word = 1 + (slot >> 1);
    const old = vcpu.load32(gfn(ring + 1), word);
    vcpu.store32(gfn(ring + 1), word, (slot & 1) === 0 ? (old & ~0xffff) | 1 : (old & 0xffff) | (1 << 16));
    this.#index[device] = (index + 1) & 0xffff;
    vcpu.store32(gfn(ring + 1), 0, this.#index[device] << 16);
    this.#write(device, MMIO_QUEUE_NOTIFY, what % 5);
  }
}

export const hostile: Property = {
  name: 'hostile',
  about: 'a hostile guest with a balloon and a disk beside an honest one, whose memory is verified',
  rows: 'I1 I15 I16 H33',
  shape,
  hostileRings: true,
  steps: 2000,
  program: fc.record({
    host: fc.constant([]),
    cpus: fc.tuple(
      fc.array(hostileOp, { minLength: 4, maxLength: 30 }),
      fc.array(memoryOps, { minLength: 2, maxLength: 10 }),
    ),
  }),
  host(lab) {
    const [{ vm }] = lab.vms;
    const port: DevicePort = {
      spawn: (n, body) => lab.spawn(n, body),
      now: () => vm.kickTime,
      costs: vm.costs,
    };
    attachDevice(
      lab,
      vm,
      0,
      new BalloonDevice({
        port,
        memory: { ramPages: RAM, unitPages: 1, discard: (runs, n) => vm.discard(runs, n) },
      }),
    );
    const disk = new Uint8Array(8 * PAGE_SIZE);
    attachDevice(
      lab,
      vm,
      1,
      new BlockDevice(
        {
          bytes: disk.length,
          read: (offset, out) => out.set(disk.subarray(offset, offset + out.length)),
          write: (offset, bytes) => disk.set(bytes, offset),
          flush: () => undefined,
        },
        port,
      ),
    );
    return () => [];
  },
  cpu(lab, program, vm, id) {
    if (vm === 1) {
      runMemoryOps(lab, program.cpus[1], vm, id);
      return;
    }
    try {
      const guest = new HostileGuest(lab);
      lab.vcpu.enterGuest();
      for (const op of program.cpus[0]) guest.one(op);
      lab.vcpu.leaveGuest();
    } catch (error) {
      if (!(error instanceof VmKilled)) throw error;
    }
  },
};
