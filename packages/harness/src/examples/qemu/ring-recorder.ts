/**
 * What a driver's queues hold when it notifies, as lines that play without the driver (`M`, `A`: `foreign-guest.test.ts`).
 * Rings are followed by the register writes that set them up. Buffers that the device writes are shown up to 64 bytes.
 */
import { openSync, readSync } from 'node:fs';
import {
  MMIO_QUEUE_DESC_LOW,
  MMIO_QUEUE_DEVICE_LOW,
  MMIO_QUEUE_DRIVER_LOW,
  MMIO_QUEUE_NOTIFY,
  MMIO_QUEUE_NUM,
  MMIO_QUEUE_READY,
  MMIO_QUEUE_SEL,
  MMIO_STATUS,
  STATUS_DRIVER_OK,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
} from '@ebb/virtio/uapi';

/** Longest buffer that is written into a script. */
const MAX_SHOWN = 64;

interface Chain {
  readonly head: number;
  readonly writable: (readonly [addr: number, bytes: number])[];
}

class Ring {
  size = 0;
  isReady = false;
  /** Addresses of the descriptors, the driver's area and the device's. */
  readonly areas: number[] = [0, 0, 0];
  seenAvail = 0;
  seenUsed = 0;
  seenEvent = -1;
  /** Chains that the device has not returned. */
  held: Chain[] = [];
}

export class RingRecorder {
  readonly #fd: number;
  readonly #rings: Ring[][] = [[], []];
  readonly #selected: number[] = [0, 0];

  constructor(ram: string) {
    this.#fd = openSync(ram, 'r');
  }

  #bytes(addr: number, length: number): Buffer {
    const bytes = Buffer.alloc(length);
    readSync(this.#fd, bytes, 0, length, addr);
    return bytes;
  }
  #word(addr: number): number {
    return this.#bytes(addr, 2).readUInt16LE();
  }
  #line(kind: 'M' | 'A', addr: number, length: number): string {
    return `${kind} 0x${addr.toString(16)} ${this.#bytes(addr, length).toString('hex')}`;
  }

  /** Before a register write is made: what the queue holds, at a notification and at DRIVER_OK. */
  before(device: number, offset: number, value: number): string[] {
    const rings = this.#rings[device];
    if (offset === MMIO_QUEUE_SEL) this.#selected[device] = value;
    const ring = (rings[this.#selected[device]] ??= new Ring());
    if (offset === MMIO_QUEUE_NUM) ring.size = value;
    if (offset === MMIO_QUEUE_READY) ring.isReady = value === 1;
    [MMIO_QUEUE_DESC_LOW, MMIO_QUEUE_DRIVER_LOW, MMIO_QUEUE_DEVICE_LOW].forEach((low, i) => {
      const was = ring.areas[i];
      if (offset === low) ring.areas[i] = was - (was % 2 ** 32) + value;
      if (offset === low + 4) ring.areas[i] = (was % 2 ** 32) + value * 2 ** 32;
    });
    if (offset === MMIO_STATUS && value === 0) this.#rings[device] = [];
    if (offset === MMIO_QUEUE_NOTIFY) return this.#arrived(rings[value]);
    const goes = offset === MMIO_STATUS && (value & STATUS_DRIVER_OK) !== 0;
    return goes ? rings.flatMap((r) => this.#arrived(r)) : [];
  }

  #arrived(ring: Ring | undefined): string[] {
    if (ring?.isReady !== true) return [];
    const [desc, driver] = ring.areas;
    const eventAt = driver + 4 + 2 * ring.size;
    const lines: string[] = [];
    for (
      const idx = this.#word(driver + 2);
      ring.seenAvail !== idx;
      ring.seenAvail = (ring.seenAvail + 1) & 0xffff
    ) {
      const slot = driver + 4 + 2 * (ring.seenAvail % ring.size);
      const chain: Chain = { head: this.#word(slot), writable: [] };
      this.#walk(desc, chain.head, chain, lines);
      lines.push(this.#line('M', slot, 2));
      ring.held.push(chain);
    }
    const event = this.#word(eventAt);
    if (event !== ring.seenEvent) lines.push(this.#line('M', eventAt, 2));
    ring.seenEvent = event;
    // Last, flags and index: what publishes the rest.
    return lines.length > 0 ? [...lines, this.#line('M', driver, 4)] : lines;
  }

  #walk(table: number, first: number, chain: Chain, lines: string[]): void {
    for (let index = first, count = 0; count < 1024; count++) {
      const at = table + 16 * index;
      const d = this.#bytes(at, 16);
      const addr = d.readUInt32LE(0) + d.readUInt32LE(4) * 2 ** 32;
      const length = d.readUInt32LE(8);
      const flags = d.readUInt16LE(12);
      lines.push(this.#line('M', at, 16));
      if ((flags & VIRTQ_DESC_F_INDIRECT) !== 0) this.#walk(addr, 0, chain, lines);
      else if ((flags & VIRTQ_DESC_F_WRITE) !== 0) chain.writable.push([addr, length]);
      else if (length <= 4096) lines.push(this.#line('M', addr, length));
      if ((flags & VIRTQ_DESC_F_NEXT) === 0) return;
      index = d.readUInt16LE(14);
    }
  }

  /** After a register write: what the device has returned since, on any queue. */
  after(device: number, offset: number): string[] {
    if (offset !== MMIO_QUEUE_NOTIFY && offset !== MMIO_STATUS) return [];
    return this.#rings[device].flatMap((ring) => (ring.isReady ? this.#returned(ring) : []));
  }

  #returned(ring: Ring): string[] {
    const [, , used] = ring.areas;
    const idx = this.#word(used + 2);
    if (idx === ring.seenUsed) return [];
    const lines: string[] = [];
    for (; ring.seenUsed !== idx; ring.seenUsed = (ring.seenUsed + 1) & 0xffff) {
      const at = used + 4 + 8 * (ring.seenUsed % ring.size);
      const head = this.#bytes(at, 4).readUInt32LE();
      const chain = ring.held.find((c) => c.head === head);
      ring.held = ring.held.filter((c) => c !== chain);
      for (const [addr, length] of chain?.writable ?? [])
        if (length <= MAX_SHOWN) lines.push(this.#line('A', addr, length));
      lines.push(this.#line('A', at, 8));
    }
    return [...lines, this.#line('A', used, 4), this.#line('A', used + 4 + 8 * ring.size, 2)];
  }
}
