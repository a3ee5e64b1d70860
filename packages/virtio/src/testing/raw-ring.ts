/**
 * A raw split-ring writer over any `GuestMemory`: puts arbitrary descriptors, indices and flags where a driver would,
 * legal or not. For tests, hostile guests and recorded request scripts.
 */
import { assert, type GuestMemory } from '@ebb/machine';
import type { RingAddresses } from '../uapi/virtio.ts';
import {
  AVAIL_IDX,
  AVAIL_RING,
  availEventOffset,
  DESC_BYTES,
  USED_IDX,
  USED_RING,
  usedEventOffset,
} from '../uapi/virtio.ts';

export class RawRing {
  readonly memory: GuestMemory;
  readonly size: number;
  readonly rings: RingAddresses;
  #availIdx = 0;

  constructor(memory: GuestMemory, size: number, rings: RingAddresses) {
    this.memory = memory;
    this.size = size;
    this.rings = rings;
  }

  #at(gpa: number, bytes: number): number {
    assert(this.memory.window(gpa, bytes, true), `0x${gpa.toString(16)} is RAM`);
    return this.memory.at;
  }
  u16(gpa: number, value: number): void {
    const at = this.#at(gpa, 2);
    Atomics.store(this.memory.u16, at >> 1, value);
  }
  readU16(gpa: number): number {
    const at = this.#at(gpa, 2);
    return Atomics.load(this.memory.u16, at >> 1);
  }
  u32(gpa: number, value: number): void {
    const at = this.#at(gpa, 4);
    this.memory.i32[at >> 2] = value;
  }
  readU32(gpa: number): number {
    const at = this.#at(gpa, 4);
    return this.memory.i32[at >> 2] >>> 0;
  }

  /** Writes a descriptor anywhere: index `index` of the table at `table` (default: the ring's). */
  desc(
    index: number,
    gpa: number,
    length: number,
    flags: number,
    next = 0,
    table: number = this.rings.desc,
  ): void {
    const at = table + index * DESC_BYTES;
    this.u32(at, gpa | 0);
    this.u32(at + 4, Math.floor(gpa / 0x1_0000_0000));
    this.u32(at + 8, length);
    this.u16(at + 12, flags);
    this.u16(at + 14, next);
  }

  /** Puts `head` in the next ring slot and publishes the index. */
  avail(head: number): void {
    this.u16(this.rings.driver + AVAIL_RING + 2 * (this.#availIdx % this.size), head);
    this.availIdx((this.#availIdx + 1) & 0xffff);
  }

  /** Publishes an arbitrary available index. */
  availIdx(index: number): void {
    this.#availIdx = index;
    this.u16(this.rings.driver + AVAIL_IDX, index);
  }

  availFlags(flags: number): void {
    this.u16(this.rings.driver, flags);
  }
  usedEvent(index: number): void {
    this.u16(this.rings.driver + usedEventOffset(this.size), index);
  }
  get usedIdx(): number {
    return this.readU16(this.rings.device + USED_IDX);
  }
  get usedFlags(): number {
    return this.readU16(this.rings.device);
  }
  get availEvent(): number {
    return this.readU16(this.rings.device + availEventOffset(this.size));
  }
  /** Used element number `index` (free-running). */
  used(index: number): { id: number; length: number } {
    const at = this.rings.device + USED_RING + 8 * (index % this.size);
    return { id: this.readU32(at), length: this.readU32(at + 4) };
  }
}
