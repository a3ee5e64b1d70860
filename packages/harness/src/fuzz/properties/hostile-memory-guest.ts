/**
 * The hostile guest of `hostile-memory.ts`: a driver of a memory device that does as it likes, and reaches for memory that
 * is not plugged.
 */
import { LINE_MEM, MMIO_BASE, MMIO_STRIDE } from '@ebb/guest-kernel';
import { SCRIBBLE } from '@ebb/host-kvm';
import { gfn, PAGE_SIZE } from '@ebb/machine';
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
import type { VcpuLab } from '../vcpu-lab.ts';
import type { Op } from '../property.ts';

/** Pages of a block: QEMU's least, 1 MiB. */
export const BLOCK = 256;
export const BLOCKS = 3;
/** First page of the region. */
export const REGION = 256;
const RING_PAGE = 8;
const DATA_PAGE = 21;
const QUEUE_SIZE = 16;
/** Top nibble of what this guest stores. */
const MARK = 0xa;
/** Looks at the used ring before the guest gives up waiting: a device that needs a reset answers nothing. */
const PATIENCE = 30;

/**
 * Model words, beside those of the honest guest. The guest writes how many operations it has begun, how many system resets
 * it has asked for and the policy of the newest, and that it has ended; the host how many resets are done. `ASKED` and
 * `DONE` are atomic, and pair with each other's loads.
 */
export const OPS_DONE = 200;
export const ASKED = 201;
export const POLICY = 202;
export const DONE = 203;
export const ENDED = 204;

export const guestOp: fc.Arbitrary<Op> = fc.record({
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
export class HostileMemoryGuest {
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
    if (value === 0 || value === -1 || value === SCRIBBLE || value >>> 28 === MARK) return;
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
