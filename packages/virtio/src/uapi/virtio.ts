/** Status bits, feature bits and the split ring's wire format (virtio 1.2 § 2.1, § 2.2, § 2.7, § 6). */

/** Device status (§ 2.1). */
export const STATUS_ACKNOWLEDGE = 1;
export const STATUS_DRIVER = 2;
export const STATUS_DRIVER_OK = 4;
export const STATUS_FEATURES_OK = 8;
export const STATUS_DEVICE_NEEDS_RESET = 64;
export const STATUS_FAILED = 128;

/** Reserved feature bits (§ 6). */
export const VIRTIO_F_INDIRECT_DESC = 28;
export const VIRTIO_F_EVENT_IDX = 29;
export const VIRTIO_F_VERSION_1 = 32;
export const VIRTIO_F_ACCESS_PLATFORM = 33;
export const VIRTIO_F_RING_PACKED = 34;
export const VIRTIO_F_IN_ORDER = 35;
export const VIRTIO_F_ORDER_PLATFORM = 36;
export const VIRTIO_F_NOTIFICATION_DATA = 38;

/** Device types (§ 5). */
export const VIRTIO_ID_BLOCK = 2;
export const VIRTIO_ID_BALLOON = 5;
export const VIRTIO_ID_MEM = 24;

/** A set of feature bits, `0 … 63`, as two 32-bit halves; bits above 63 are never offered. */
export class Features {
  readonly low: number;
  readonly high: number;

  constructor(low: number, high: number) {
    this.low = low >>> 0;
    this.high = high >>> 0;
  }

  static of(...bits: readonly number[]): Features {
    let low = 0;
    let high = 0;
    for (const bit of bits) {
      if (bit < 32) low |= 1 << bit;
      else high |= 1 << (bit - 32);
    }
    return new Features(low, high);
  }

  has(bit: number): boolean {
    return ((bit < 32 ? this.low >>> bit : this.high >>> (bit - 32)) & 1) === 1;
  }

  and(other: Features): Features {
    return new Features(this.low & other.low, this.high & other.high);
  }

  without(...bits: readonly number[]): Features {
    const drop = Features.of(...bits);
    return new Features(this.low & ~drop.low, this.high & ~drop.high);
  }

  /** True if every bit of this set is in `other`. */
  within(other: Features): boolean {
    return (this.low & ~other.low) === 0 && (this.high & ~other.high) === 0;
  }
}

/** Descriptor (§ 2.7.5): `le64 addr; le32 len; le16 flags; le16 next`, 16 bytes. */
export const DESC_BYTES = 16;
/** "MUST NOT add a chain longer than 2^32 bytes in total" (§ 2.7.5). */
export const MAX_CHAIN_BYTES = 0x1_0000_0000;
export const VIRTQ_DESC_F_NEXT = 1;
export const VIRTQ_DESC_F_WRITE = 2;
export const VIRTQ_DESC_F_INDIRECT = 4;

/** Available ring (§ 2.7.6): `le16 flags; le16 idx; le16 ring[Q]; le16 used_event`. */
export const VIRTQ_AVAIL_F_NO_INTERRUPT = 1;
export const AVAIL_IDX = 2;
export const AVAIL_RING = 4;
export function availBytes(queueSize: number): number {
  return 6 + 2 * queueSize;
}
/** Byte offset of `used_event` in the available ring. */
export function usedEventOffset(queueSize: number): number {
  return AVAIL_RING + 2 * queueSize;
}

/** Used ring (§ 2.7.8): `le16 flags; le16 idx; {le32 id; le32 len}[Q]; le16 avail_event`. */
export const VIRTQ_USED_F_NO_NOTIFY = 1;
export const USED_IDX = 2;
export const USED_RING = 4;
export const USED_ELEM_BYTES = 8;
export function usedBytes(queueSize: number): number {
  return 6 + USED_ELEM_BYTES * queueSize;
}
/** Byte offset of `avail_event` in the used ring. */
export function availEventOffset(queueSize: number): number {
  return USED_RING + USED_ELEM_BYTES * queueSize;
}

/** Largest split queue (§ 2.7). */
export const MAX_QUEUE_SIZE = 32768;

export function isPowerOfTwo(n: number): boolean {
  return n > 0 && (n & (n - 1)) === 0;
}

/**
 * Whether moving an index from `oldIndex` to `newIndex` passed `event` (§ 2.7.10, `vring_need_event`). All three are
 * free-running 16-bit numbers. The one place where ring indices are compared across a wrap.
 */
export function needEvent(event: number, newIndex: number, oldIndex: number): boolean {
  return ((newIndex - event - 1) & 0xffff) < ((newIndex - oldIndex) & 0xffff);
}

/** How many entries lie between two free-running 16-bit indices. */
export function ringDistance(newIndex: number, oldIndex: number): number {
  return (newIndex - oldIndex) & 0xffff;
}

/** Ring memory of a queue: three guest-physical pages. */
export interface RingAddresses {
  readonly desc: number;
  readonly driver: number;
  readonly device: number;
}
