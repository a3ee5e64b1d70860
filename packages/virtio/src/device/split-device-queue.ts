/**
 * The device's side of a split virtqueue (virtio 1.2 § 2.7), over guest memory. The guest is hostile until proved
 * otherwise: every descriptor is copied once, the copy is validated, and the ring is never read again for it. What is
 * wrong is a value (`QueueError`), after which the queue is broken until a reset.
 *
 * All state is private to the device. `lastAvail` and `usedIdx` are free-running 16-bit numbers.
 */
import { PAGE_SIZE, pageOffset, type DeviceMemory } from '@ebb/machine';
import {
  AVAIL_IDX,
  AVAIL_RING,
  DESC_BYTES,
  MAX_CHAIN_BYTES,
  MAX_QUEUE_SIZE,
  USED_ELEM_BYTES,
  USED_IDX,
  USED_RING,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_USED_F_NO_NOTIFY,
  availEventOffset,
  isPowerOfTwo,
  needEvent,
  ringDistance,
  usedEventOffset,
} from '../uapi/virtio.ts';
import type { RingAddresses } from '../uapi/virtio.ts';
import { DescriptorChain } from './descriptor-chain.ts';

/** A malformed ring: what is wrong and the offending value. */
export type QueueError =
  | { readonly kind: 'ring-not-in-ram'; readonly gpa: number }
  | { readonly kind: 'avail-index-jump'; readonly by: number }
  | { readonly kind: 'head-out-of-range'; readonly head: number }
  | { readonly kind: 'next-out-of-range'; readonly next: number }
  | { readonly kind: 'chain-too-long'; readonly limit: number }
  | { readonly kind: 'zero-length'; readonly gpa: number }
  | { readonly kind: 'too-many-bytes'; readonly bytes: number }
  | { readonly kind: 'readable-after-writable'; readonly index: number }
  | { readonly kind: 'indirect-not-negotiated' }
  | { readonly kind: 'indirect-with-next' }
  | { readonly kind: 'indirect-nested' }
  | { readonly kind: 'indirect-length'; readonly length: number }
  | { readonly kind: 'buffer-not-in-ram'; readonly gpa: number };

export interface SplitDeviceQueueOptions {
  readonly size: number;
  readonly rings: RingAddresses;
  readonly memory: DeviceMemory;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
  /** Called when a device model touches a buffer it no longer holds (I16). */
  readonly onLeaseBroken?: (gpa: number) => void;
}

export class SplitDeviceQueue {
  readonly size: number;
  readonly rings: RingAddresses;
  readonly memory: DeviceMemory;
  /** Set by the first malformed thing found; the queue then yields nothing. */
  error: QueueError | null = null;
  /** Buffers popped and not yet pushed. */
  inFlight = 0;
  readonly #eventIdx: boolean;
  readonly #indirect: boolean;
  readonly #onLeaseBroken: (gpa: number) => void;
  readonly #spare: DescriptorChain[] = [];
  /** The one descriptor that no window of the guest's memory shows as words. */
  readonly #descriptor: Int32Array = new Int32Array(DESC_BYTES / 4);
  #lastAvail = 0;
  /** The driver's index as last acquired: entries up to it are taken without another atomic load. */
  #availSeen = 0;
  #usedIdx = 0;
  #stopped = false;
  /** usedIdx at the last interrupt decision. */
  #signalled = 0;

  constructor(options: SplitDeviceQueueOptions) {
    this.size = options.size;
    this.rings = options.rings;
    this.memory = options.memory;
    this.#eventIdx = options.eventIdx;
    this.#indirect = options.indirect;
    this.#onLeaseBroken = options.onLeaseBroken ?? (() => undefined);
  }

  /** Whether a driver may make a queue of `size` ready at all. */
  static validSize(size: number, max: number): boolean {
    return isPowerOfTwo(size) && size <= max && size <= MAX_QUEUE_SIZE;
  }

  /** The driver takes the queue away: nothing of its rings is read or written any more (§ 4.2.2.1). */
  stop(): void {
    this.#stopped = true;
  }

  #fail(error: QueueError): null {
    this.error = error;
    return null;
  }

  /** True if a buffer is available. Malformed indices break the queue. */
  hasAvail(): boolean {
    return this.#available() > 0;
  }

  /** Entries between our last index and the driver's; acquires them. Pairs with the store in the driver's `publish`. */
  #available(): number {
    if (this.error !== null || this.#stopped) return 0;
    const memory = this.memory;
    if (!memory.window(this.rings.driver + AVAIL_IDX, 2, false)) {
      this.#fail({ kind: 'ring-not-in-ram', gpa: this.rings.driver });
      return 0;
    }
    const idx = Atomics.load(memory.u16, memory.at >> 1);
    const n = ringDistance(idx, this.#lastAvail);
    if (n > this.size) {
      this.#fail({ kind: 'avail-index-jump', by: n });
      return 0;
    }
    this.#availSeen = idx;
    return n;
  }

  /** Takes the next available chain, or null: empty, or `error` is set. Copies and checks each descriptor once. */
  pop(): DescriptorChain | null {
    const known = this.#availSeen !== this.#lastAvail && this.error === null && !this.#stopped;
    if (!known && this.#available() === 0) return null;
    const memory = this.memory;
    const slot = this.rings.driver + AVAIL_RING + 2 * (this.#lastAvail & (this.size - 1));
    if (!memory.window(slot, 2, false)) return this.#fail({ kind: 'ring-not-in-ram', gpa: slot });
    const head = memory.u16[memory.at >> 1];
    if (head >= this.size) return this.#fail({ kind: 'head-out-of-range', head });
    const chain = this.#spare.pop() ?? new DescriptorChain(memory, this.#onLeaseBroken);
    const bad = this.#readChain(chain, head);
    if (bad !== null) return this.#fail(bad);
    this.#lastAvail = (this.#lastAvail + 1) & 0xffff;
    this.inFlight++;
    return chain;
  }

  /**
   * Copies and checks the descriptors of the chain that starts at `head`: those in the ring's table, then those of an
   * indirect table, with which a chain may end (§ 2.7.5.3.2). What is wrong with it, if anything.
   */
  #readChain(chain: DescriptorChain, head: number): QueueError | null {
    const memory = this.memory;
    const size = this.size | 0;
    let { gpas, lengths } = chain;
    let table = this.rings.desc;
    let limit = size;
    // Descriptors that may still come: a loop is a chain that is too long.
    let left = size;
    let nested = false;
    let index = head | 0;
    // A window reaches to the end of the table's page; descriptors inside it need no other.
    let { i32 } = memory;
    let words = 0;
    let windowFirst = 0;
    let windowEnd = 0;
    let segments = 0;
    let readableSegments = 0;
    let readableBytes = 0;
    let writableBytes = 0;
    for (;;) {
      if (left === 0) return { kind: 'chain-too-long', limit: Math.min(limit, size) };
      left--;
      if (index >= windowEnd || index < windowFirst) {
        const at = table + index * DESC_BYTES;
        const offset = pageOffset(at);
        const whole = ((PAGE_SIZE - offset) / DESC_BYTES) | 0;
        const covered = whole < limit - index ? whole : limit - index;
        windowFirst = index;
        if (whole < 1 || (offset & 3) !== 0) {
          // Only the ring's own table is aligned (§ 2.7): an indirect one may have a descriptor across two pages.
          if (!this.#copyDescriptor(at)) return { kind: 'ring-not-in-ram', gpa: at };
          i32 = this.#descriptor;
          words = 0;
          windowEnd = index + 1;
        } else {
          if (!memory.window(at, covered * DESC_BYTES, false)) return { kind: 'ring-not-in-ram', gpa: at };
          i32 = memory.i32;
          words = memory.at >> 2;
          windowEnd = index + covered;
        }
      }
      const d = words + ((index - windowFirst) << 2);
      const low = i32[d];
      const high = i32[d + 1];
      const length = i32[d + 2];
      const word = i32[d + 3];
      const writable = (word & VIRTQ_DESC_F_WRITE) !== 0;
      let gpa = low;
      // The common segment, within a page below 2 GiB, needs no arithmetic on doubles.
      const common =
        (word & VIRTQ_DESC_F_INDIRECT) === 0 &&
        high === 0 &&
        low >= 0 &&
        length > 0 &&
        (low & (PAGE_SIZE - 1)) + length <= PAGE_SIZE &&
        (writable || readableSegments === segments) &&
        readableBytes + writableBytes <= MAX_CHAIN_BYTES - PAGE_SIZE &&
        memory.contains(low, length, writable);
      if (!common) {
        gpa = (high >>> 0) * 0x1_0000_0000 + (low >>> 0);
        if ((word & VIRTQ_DESC_F_INDIRECT) !== 0) {
          const bad = this.#badIndirect(nested, word, length >>> 0);
          if (bad !== null) return bad;
          nested = true;
          table = gpa;
          limit = (length >>> 0) / DESC_BYTES;
          left = Math.min(limit, size - segments);
          index = 0;
          windowEnd = 0;
          continue;
        }
        const bytes = readableBytes + writableBytes;
        const afterWritable = readableSegments < segments;
        const bad = this.#badSegment(gpa, length >>> 0, writable, afterWritable, bytes, index);
        if (bad !== null) return bad;
      }
      if (segments === gpas.length) ({ gpas, lengths } = chain.grow());
      gpas[segments] = gpa;
      lengths[segments] = length;
      segments++;
      if (writable) writableBytes += length >>> 0;
      else {
        readableSegments++;
        readableBytes += length >>> 0;
      }
      if ((word & VIRTQ_DESC_F_NEXT) === 0) break;
      index = word >>> 16;
      if (index >= limit) return { kind: 'next-out-of-range', next: index };
    }
    chain.begin(head, segments, readableSegments, readableBytes, writableBytes);
    return null;
  }

  /** Copies the descriptor at `at`, wherever it lies, into `#descriptor`. False: not RAM. */
  #copyDescriptor(at: number): boolean {
    const memory = this.memory;
    const bytes = new Uint8Array(this.#descriptor.buffer);
    for (let done = 0; done < DESC_BYTES; ) {
      const n = Math.min(DESC_BYTES - done, PAGE_SIZE - pageOffset(at + done));
      if (!memory.window(at + done, n, false)) return false;
      for (let i = 0; i < n; i++) bytes[done + i] = memory.u8[memory.at + i];
      done += n;
    }
    return true;
  }

  /** What is wrong with an indirect descriptor, if anything (§ 2.7.5.3). */
  #badIndirect(nested: boolean, flags: number, length: number): QueueError | null {
    if (!this.#indirect) return { kind: 'indirect-not-negotiated' };
    if (nested) return { kind: 'indirect-nested' };
    if ((flags & VIRTQ_DESC_F_NEXT) !== 0) return { kind: 'indirect-with-next' };
    if (length === 0 || (length & (DESC_BYTES - 1)) !== 0 || length / DESC_BYTES > MAX_QUEUE_SIZE)
      return { kind: 'indirect-length', length };
    return null;
  }

  /** What is wrong with a segment, if anything, after `bytes` others of the chain. */
  #badSegment(
    gpa: number,
    length: number,
    writable: boolean,
    afterWritable: boolean,
    bytes: number,
    index: number,
  ): QueueError | null {
    if (length === 0) return { kind: 'zero-length', gpa };
    if (!writable && afterWritable) return { kind: 'readable-after-writable', index };
    if (bytes + length > MAX_CHAIN_BYTES) return { kind: 'too-many-bytes', bytes: bytes + length };
    // First and last byte suffice to refuse wild addresses; each page is checked again when it is touched. Only looked at:
    // a buffer that is given back or hinted may never have been touched, and is not to be.
    const onePage = pageOffset(gpa) + length <= PAGE_SIZE;
    if (
      onePage
        ? !this.memory.contains(gpa, length, writable)
        : !this.memory.contains(gpa, 1, writable) || !this.memory.contains(gpa + length - 1, 1, writable)
    ) {
      return { kind: 'buffer-not-in-ram', gpa };
    }
    return null;
  }

  /**
   * Takes up to `max` available buffers of one descriptor each: heads, addresses, lengths (negative when writable).
   * Stops before the first chain that is longer; take that with `pop`. The batch path: indices, flags and lengths are
   * checked here, addresses where the buffer is touched (`window`).
   */
  popSingles(heads: Int32Array, gpas: Float64Array, lengths: Int32Array, max: number): number {
    const n = Math.min(this.#available(), max);
    if (n === 0) return 0;
    const memory = this.memory;
    const size = this.size;
    const mask = size - 1;
    if (
      pageOffset(this.rings.desc) + size * DESC_BYTES > PAGE_SIZE ||
      pageOffset(this.rings.driver) + availEventOffset(0) + 2 * size > PAGE_SIZE
    ) {
      return 0;
    }
    if (!memory.window(this.rings.driver, AVAIL_RING + 2 * size, false)) return 0;
    const u16 = memory.u16;
    const ring = (memory.at + AVAIL_RING) >> 1;
    if (!memory.window(this.rings.desc, size * DESC_BYTES, false)) return 0;
    const i32 = memory.i32;
    const desc = memory.at >> 2;
    let idx = this.#lastAvail;
    let taken = 0;
    for (; taken < n; taken++) {
      const head = u16[ring + (idx & mask)];
      if (head >= size) {
        this.#fail({ kind: 'head-out-of-range', head });
        break;
      }
      const d = desc + head * 4;
      const length = i32[d + 2];
      const flags = i32[d + 3] & 0xffff;
      if ((flags & (VIRTQ_DESC_F_NEXT | VIRTQ_DESC_F_INDIRECT)) !== 0 || length <= 0) break;
      heads[taken] = head;
      const low = i32[d];
      const high = i32[d + 1];
      // Addresses below 2 GiB, nearly all of them, need no arithmetic on doubles.
      gpas[taken] = high === 0 && low >= 0 ? low : (high >>> 0) * 0x1_0000_0000 + (low >>> 0);
      lengths[taken] = (flags & VIRTQ_DESC_F_WRITE) !== 0 ? -length : length;
      idx = (idx + 1) & 0xffff;
    }
    this.#lastAvail = idx;
    this.inFlight += taken;
    return taken;
  }

  /**
   * Takes a returned chain's object back for reuse. Only for callers that keep no reference: a chain kept and touched
   * after that could not be told from its successor.
   */
  recycle(chain: DescriptorChain): void {
    if (this.#spare.length < 64) this.#spare.push(chain);
  }

  /** Returns one chain with `written` bytes written into its writable part (≤ their sum). Visible at once. */
  push(chain: DescriptorChain, written: number): void {
    if (this.fill(chain, written)) this.publish();
  }

  /** Returns a chain as `push` does, visible to the driver with the next `publish`. False if the ring is not RAM. */
  fill(chain: DescriptorChain, written: number): boolean {
    chain.end();
    if (this.#stopped) return false;
    const most = chain.writableBytes;
    return this.#writeUsed(chain.head, written < most ? written : most);
  }

  /** Returns `count` buffers of `popSingles` with one index store; `written` is no more than the shortest of them holds. */
  pushSingles(heads: Int32Array, count: number, written: number): void {
    if (this.#stopped) return;
    const memory = this.memory;
    const mask = this.size - 1;
    if (pageOffset(this.rings.device) + USED_RING + this.size * USED_ELEM_BYTES > PAGE_SIZE) {
      for (let i = 0; i < count; i++) this.#writeUsed(heads[i], written);
    } else {
      if (!memory.window(this.rings.device, USED_RING + this.size * USED_ELEM_BYTES, true)) {
        this.#fail({ kind: 'ring-not-in-ram', gpa: this.rings.device });
        return;
      }
      const i32 = memory.i32;
      const ring = (memory.at + USED_RING) >> 2;
      let idx = this.#usedIdx;
      for (let i = 0; i < count; i++) {
        const at = ring + 2 * (idx & mask);
        i32[at] = heads[i];
        i32[at + 1] = written;
        idx = (idx + 1) & 0xffff;
      }
      this.#usedIdx = idx;
      this.inFlight -= count;
    }
    this.publish();
  }

  #writeUsed(head: number, written: number): boolean {
    const at = this.rings.device + USED_RING + USED_ELEM_BYTES * (this.#usedIdx & (this.size - 1));
    const memory = this.memory;
    if (pageOffset(at) + USED_ELEM_BYTES <= PAGE_SIZE) {
      if (!memory.window(at, USED_ELEM_BYTES, true)) {
        this.#fail({ kind: 'ring-not-in-ram', gpa: at });
        return false;
      }
      memory.i32[memory.at >> 2] = head;
      memory.i32[(memory.at >> 2) + 1] = written;
    } else {
      // The ring is 4-byte aligned, so an entry may straddle a page: two words, two windows.
      if (!memory.window(at, 4, true)) {
        this.#fail({ kind: 'ring-not-in-ram', gpa: at });
        return false;
      }
      memory.i32[memory.at >> 2] = head;
      if (!memory.window(at + 4, 4, true)) {
        this.#fail({ kind: 'ring-not-in-ram', gpa: at + 4 });
        return false;
      }
      memory.i32[memory.at >> 2] = written;
    }
    this.#usedIdx = (this.#usedIdx + 1) & 0xffff;
    this.inFlight--;
    return true;
  }

  /** Publishes what was filled with one index store. Pairs with `Atomics.load` of used.idx in `SplitDriverQueue.popUsed`. */
  publish(): void {
    if (!this.memory.window(this.rings.device + USED_IDX, 2, true)) {
      this.#fail({ kind: 'ring-not-in-ram', gpa: this.rings.device });
      return;
    }
    Atomics.store(this.memory.u16, this.memory.at >> 1, this.#usedIdx);
  }

  /** Whether the driver wants to be interrupted for what was pushed since the last call. Read after the index store. */
  needsInterrupt(): boolean {
    const memory = this.memory;
    const old = this.#signalled;
    const idx = this.#usedIdx;
    if (idx === old || this.#stopped) return false;
    this.#signalled = idx;
    if (this.#eventIdx) {
      if (!memory.window(this.rings.driver + usedEventOffset(this.size), 2, false)) return false;
      return needEvent(Atomics.load(memory.u16, memory.at >> 1), idx, old);
    }
    if (!memory.window(this.rings.driver, 2, false)) return false;
    return (Atomics.load(memory.u16, memory.at >> 1) & VIRTQ_AVAIL_F_NO_INTERRUPT) === 0;
  }

  /** Asks for no kicks while the device polls. With EVENT_IDX a stale event does that by itself. */
  disableKicks(): void {
    if (this.#eventIdx || this.#stopped || !this.memory.window(this.rings.device, 2, true)) return;
    Atomics.store(this.memory.u16, this.memory.at >> 1, VIRTQ_USED_F_NO_NOTIFY);
  }

  /** Asks for a kick at the next buffer, then looks again: true if one has arrived. Pairs with `needsKick`. */
  enableKicks(): boolean {
    if (this.#stopped) return false;
    const memory = this.memory;
    if (this.#eventIdx) {
      if (!memory.window(this.rings.device + availEventOffset(this.size), 2, true)) return false;
      Atomics.store(memory.u16, memory.at >> 1, this.#lastAvail);
    } else {
      if (!memory.window(this.rings.device, 2, true)) return false;
      Atomics.store(memory.u16, memory.at >> 1, 0);
    }
    return this.hasAvail();
  }
}
