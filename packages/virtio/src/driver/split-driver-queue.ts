/**
 * The driver's side of a split virtqueue (virtio 1.2 § 2.7), over guest memory by guest-physical address.
 *
 * The driver's own state (free list, tokens, shadow indices) lies in words it is given, never in the ring, and is never
 * read back from the ring: the device may scribble there. For a guest kernel those words are in the arena, guarded by
 * the lock of the driver that owns the queue.
 *
 * Free descriptors stand on a stack, where Linux links them: a batch then knows all of its descriptors at once. One word a
 * descriptor tells its state: of a head that is out, twice its token, plus one for a chain of several, whose length and
 * second descriptor then stand in two more words; of the others of such a chain, the complement of the next.
 *
 * Departures from Linux: the ring parts each start on a page of their own and fit in it, so a queue has at most 256
 * entries; Linux prefers larger queues for block devices.
 */
import * as machine from '@ebb/machine';
import { assert, type GuestMemory } from '@ebb/machine';
import * as virtioWords from '../uapi/virtio.ts';
import {
  availBytes,
  availEventOffset,
  isPowerOfTwo,
  needEvent,
  ringDistance,
  type RingAddresses,
  usedEventOffset,
} from '../uapi/virtio.ts';

// Local copies: docs/performance.md § Constants.
const { PAGE_SIZE } = machine;
const {
  AVAIL_IDX,
  AVAIL_RING,
  DESC_BYTES,
  MAX_CHAIN_BYTES,
  USED_IDX,
  USED_RING,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_DESC_F_INDIRECT,
  VIRTQ_DESC_F_NEXT,
  VIRTQ_DESC_F_WRITE,
  VIRTQ_USED_F_NO_NOTIFY,
} = virtioWords;

export const DRIVER_QUEUE_MAX = 256;

/**
 * Words of driver state for a queue of `size`: a header, then per descriptor a state, a chain's length, its second part, and a
 * place on the stack.
 */
export function driverQueueWords(size: number): number {
  return 16 + 4 * size;
}

/** Tokens are below this. */
const MAX_TOKEN = 0x4000_0000;

/** State of a descriptor that is free. */
const FREE = -1;

/** How many are free: the stack's height. */
const S_FREE = 0;
/** Free-running index of the next available entry, not yet published beyond `S_PUBLISHED`. */
const S_AVAIL = 1;
const S_PUBLISHED = 2;
const S_LAST_USED = 3;
const S_LAST_LEN = 4;
/** Index at the last kick decision. */
const S_KICKED = 5;
const S_BROKEN = 6;
/** The device's index as last acquired by `popUsed`. */
const S_USED_SEEN = 7;

export interface SplitDriverQueueOptions {
  readonly size: number;
  readonly rings: RingAddresses;
  /** State words and where they start; zeroed by `reset`. */
  readonly state: Int32Array;
  readonly stateBase: number;
  readonly eventIdx: boolean;
  readonly indirect: boolean;
}

/** One element of a buffer: half-open byte range `[gpa, gpa + length)`. */
export interface Segment {
  readonly gpa: number;
  readonly length: number;
}

export class SplitDriverQueue {
  readonly size: number;
  readonly rings: RingAddresses;
  readonly #state: Int32Array;
  readonly #base: number;
  /** First word of the descriptors' states. */
  readonly #word: number;
  /** Descriptors of the chain of several that starts at each head, and its second one. */
  readonly #count: number;
  readonly #second: number;
  /** First word of the stack of free descriptors. */
  readonly #stack: number;
  readonly #eventIdx: boolean;
  readonly #indirect: boolean;

  constructor(options: SplitDriverQueueOptions) {
    assert(
      isPowerOfTwo(options.size) && options.size <= DRIVER_QUEUE_MAX,
      'queue size is a power of two up to 256',
    );
    for (const at of [options.rings.desc, options.rings.driver, options.rings.device]) {
      assert(at % PAGE_SIZE === 0, 'each ring part has a page of its own');
    }
    this.size = options.size;
    this.rings = options.rings;
    this.#state = options.state;
    this.#base = options.stateBase;
    this.#word = options.stateBase + 16;
    this.#count = options.stateBase + 16 + options.size;
    this.#second = options.stateBase + 16 + 2 * options.size;
    this.#stack = options.stateBase + 16 + 3 * options.size;
    this.#eventIdx = options.eventIdx;
    this.#indirect = options.indirect;
  }

  /** Empties the queue: state and ring memory. Only before the queue is made ready or after a device reset. */
  reset(memory: GuestMemory): void {
    const s = this.#state;
    s.fill(0, this.#base, this.#base + 16);
    s[this.#base + S_FREE] = this.size;
    s.fill(FREE, this.#word, this.#word + this.size);
    // The first on top.
    for (let i = 0; i < this.size; i++) s[this.#stack + i] = this.size - 1 - i;
    for (const [at, bytes] of [
      [this.rings.desc, DESC_BYTES * this.size],
      [this.rings.driver, availBytes(this.size)],
      [this.rings.device, availEventOffset(this.size) + 2],
    ] as const) {
      assert(memory.window(at, bytes, true), 'ring memory is RAM');
      memory.u8.fill(0, memory.at, memory.at + bytes);
    }
  }

  /** Descriptors not in use. */
  get free(): number {
    return this.#state[this.#base + S_FREE];
  }
  /** True after the device broke the ring: an id that was not out, or an index that jumped. */
  get broken(): boolean {
    return this.#state[this.#base + S_BROKEN] !== 0;
  }
  /** Bytes the device wrote into the buffer returned last by `popUsed`. */
  get usedLength(): number {
    return this.#state[this.#base + S_LAST_LEN];
  }

  /**
   * Adds one buffer: device-readable segments, then device-writable ones (§ 2.7.4.2). `token` (0 … 2³⁰ − 1) comes back from
   * `popUsed`. False when the ring is full; nothing was written. Not visible to the device before `publish`.
   */
  add(memory: GuestMemory, out: readonly Segment[], into: readonly Segment[], token: number): boolean {
    const total = out.length + into.length;
    assert(total > 0, 'a buffer has at least one segment');
    const s = this.#state;
    const left = s[this.#base + S_FREE] - total;
    if (left < 0) return false;
    // The chain's descriptors, the last one first.
    const own = this.#stack + left;
    const head = s[own + total - 1];
    this.#window(memory, this.rings.desc, DESC_BYTES * this.size);
    const i32 = memory.i32;
    const desc = memory.at >> 2;
    let bytes = 0;
    for (let i = 0; i < total; i++) {
      const writable = i >= out.length;
      const last = i === total - 1;
      const segment = writable ? into[i - out.length] : out[i];
      bytes += segment.length;
      const index = s[own + total - 1 - i];
      const next = last ? 0 : s[own + total - 2 - i];
      const flags = (writable ? VIRTQ_DESC_F_WRITE : 0) | (last ? 0 : VIRTQ_DESC_F_NEXT);
      const at = desc + index * 4;
      i32[at] = segment.gpa | 0;
      i32[at + 1] = Math.floor(segment.gpa / 0x1_0000_0000);
      i32[at + 2] = segment.length;
      i32[at + 3] = flags | (next << 16);
      s[this.#word + index] = ~next;
    }
    assert(bytes <= MAX_CHAIN_BYTES, 'a buffer has at most 2³² bytes');
    s[this.#base + S_FREE] = left;
    if (total > 1) {
      s[this.#count + head] = total;
      s[this.#second + head] = s[own + total - 2];
    }
    this.#takeOut(head, token, total > 1);
    this.#pushAvail(memory, head);
    return true;
  }

  #takeOut(head: number, token: number, several: boolean): void {
    assert(token >= 0 && token < MAX_TOKEN, 'a token has 30 bits');
    this.#state[this.#word + head] = 2 * token + (several ? 1 : 0);
  }

  /**
   * Adds up to `count` single-descriptor buffers of `length` bytes at `gpas[i]` with the tokens `tokens[i]`, and publishes
   * them with one index store. Returns how many fitted. The batch path of `add`: one window per ring part.
   */
  addSingles(
    memory: GuestMemory,
    gpas: Float64Array,
    tokens: Int32Array,
    count: number,
    length: number,
    writable: boolean,
  ): number {
    return this.#addBatch(memory, gpas, tokens, count, length, writable ? VIRTQ_DESC_F_WRITE : 0);
  }

  /**
   * Adds up to `count` buffers through indirect tables of `descriptors` each, which the caller has written at `tables[i]`
   * (§ 2.7.5.3), and publishes them. A buffer takes one ring entry. Returns how many fitted.
   */
  addTables(
    memory: GuestMemory,
    tables: Float64Array,
    tokens: Int32Array,
    count: number,
    descriptors: number,
  ): number {
    this.#checkTable(descriptors);
    return this.#addBatch(memory, tables, tokens, count, descriptors * DESC_BYTES, VIRTQ_DESC_F_INDIRECT);
  }

  #checkTable(descriptors: number): void {
    assert(this.#indirect, 'INDIRECT_DESC was negotiated');
    assert(descriptors > 0 && descriptors <= this.size, 'a chain is no longer than the queue');
  }

  #addBatch(
    memory: GuestMemory,
    gpas: Float64Array,
    tokens: Int32Array,
    count: number,
    length: number,
    flags: number,
  ): number {
    const s = this.#state;
    const base = this.#base;
    const free = s[base + S_FREE] | 0;
    const n = Math.min(count, free) | 0;
    if (n === 0) return 0;
    // Table and available ring in one section: each with its own view, since they may lie in different parts of the host.
    let i32: Int32Array;
    let desc: number;
    let section: number;
    do {
      this.#window(memory, this.rings.desc, DESC_BYTES * this.size);
      ({ i32, section } = memory);
      desc = memory.at >> 2;
      this.#window(memory, this.rings.driver, availBytes(this.size));
    } while (memory.section !== section);
    const ring = (memory.at + AVAIL_RING) >> 1;
    const { u16 } = memory;
    // `| 0`: a field is a tagged number, which V8 would untag at each use in the loop.
    const bytes = length | 0;
    const bits = flags | 0;
    const mask = (this.size - 1) | 0;
    const word = this.#word | 0;
    const idx = s[base + S_AVAIL] | 0;
    const top = (this.#stack + free - 1) | 0;
    // Touched before the loop: docs/performance.md § Loops. What is written is nobody's yet.
    void (gpas[0] + tokens[0]);
    u16[ring + (idx & mask)] = 0;
    // The device's core has these lines: asked for together, they come together (docs/performance.md § Lines).
    for (let i = 0; i < n; i = (i + 4) | 0) i32[(desc + (s[(top - i) | 0] << 2)) | 0] = 0;
    for (let i = 0; i < n; i++) {
      const head = s[(top - i) | 0];
      const at = (desc + (head << 2)) | 0;
      const gpa = gpas[i];
      const token = tokens[i];
      assert((token & ~(MAX_TOKEN - 1)) === 0, 'a token has 30 bits');
      i32[at] = gpa;
      // An element keeps the whole part: the upper half.
      i32[(at + 1) | 0] = gpa / 0x1_0000_0000;
      i32[(at + 2) | 0] = bytes;
      i32[(at + 3) | 0] = bits;
      u16[(ring + ((idx + i) & mask)) | 0] = head;
      s[(word + head) | 0] = token << 1;
    }
    s[base + S_FREE] = free - n;
    const published = (idx + n) & 0xffff;
    s[base + S_AVAIL] = published;
    // Publishes descriptors and ring entries. Pairs with `Atomics.load` of avail.idx in `SplitDeviceQueue`.
    Atomics.store(u16, (memory.at + AVAIL_IDX) >> 1, published);
    s[base + S_PUBLISHED] = published;
    return n;
  }

  #pushAvail(memory: GuestMemory, head: number): void {
    const s = this.#state;
    this.#window(memory, this.rings.driver, availBytes(this.size));
    const idx = s[this.#base + S_AVAIL];
    memory.u16[((memory.at + AVAIL_RING) >> 1) + (idx & (this.size - 1))] = head;
    s[this.#base + S_AVAIL] = (idx + 1) & 0xffff;
  }

  /**
   * Makes every added buffer visible: stores avail.idx once. Pairs with `Atomics.load` in `SplitDeviceQueue.pop`.
   * Returns true if the device wants a kick; the event is read after the store (a Dekker pair, so both are atomic).
   */
  publish(memory: GuestMemory): boolean {
    const s = this.#state;
    const idx = s[this.#base + S_AVAIL];
    this.#window(memory, this.rings.driver, availBytes(this.size));
    Atomics.store(memory.u16, (memory.at + AVAIL_IDX) >> 1, idx);
    s[this.#base + S_PUBLISHED] = idx;
    return this.needsKick(memory);
  }

  /** Whether the device asked to be told of what was published since the last call (§ 2.7.7, § 2.7.10). */
  needsKick(memory: GuestMemory): boolean {
    const s = this.#state;
    const idx = s[this.#base + S_PUBLISHED];
    const old = s[this.#base + S_KICKED];
    if (idx === old) return false;
    s[this.#base + S_KICKED] = idx;
    this.#window(memory, this.rings.device, availEventOffset(this.size) + 2);
    if (this.#eventIdx) {
      return needEvent(Atomics.load(memory.u16, (memory.at + availEventOffset(this.size)) >> 1), idx, old);
    }
    return (Atomics.load(memory.u16, memory.at >> 1) & VIRTQ_USED_F_NO_NOTIFY) === 0;
  }

  /** True if the device has returned a buffer that was not popped yet. */
  hasUsed(memory: GuestMemory): boolean {
    this.#window(memory, this.rings.device, availEventOffset(this.size) + 2);
    return Atomics.load(memory.u16, (memory.at + USED_IDX) >> 1) !== this.#state[this.#base + S_LAST_USED];
  }

  /**
   * Takes the next returned buffer: its token, or −1 if there is none. `usedLength` then tells what was written. A
   * device that returns an id that is not out, or more than the ring holds, breaks the queue (`broken`).
   */
  popUsed(memory: GuestMemory): number {
    const s = this.#state;
    const last = s[this.#base + S_LAST_USED];
    this.#window(memory, this.rings.device, availEventOffset(this.size) + 2);
    if (s[this.#base + S_BROKEN] !== 0) return -1;
    if (s[this.#base + S_USED_SEEN] === last) {
      // Acquires the used entries. Pairs with `Atomics.store` in `SplitDeviceQueue.publish`.
      const usedIdx = Atomics.load(memory.u16, (memory.at + USED_IDX) >> 1);
      if (usedIdx === last) return -1;
      if (ringDistance(usedIdx, last) > this.size) {
        s[this.#base + S_BROKEN] = 1;
        return -1;
      }
      s[this.#base + S_USED_SEEN] = usedIdx;
    }
    const at = ((memory.at + USED_RING) >> 2) + 2 * (last & (this.size - 1));
    const head = memory.i32[at];
    const length = memory.i32[at + 1];
    const token = this.#takeBack(head);
    if (token < 0) {
      s[this.#base + S_BROKEN] = 1;
      return -1;
    }
    s[this.#base + S_LAST_LEN] = length;
    s[this.#base + S_LAST_USED] = (last + 1) & 0xffff;
    return token;
  }

  /**
   * Reaps up to `max` returned buffers: their tokens into `tokens`, whose other elements mean nothing then. The batch path of
   * `popUsed`, for who knows without the device what was written. One that breaks the ring is not among them.
   */
  popUsedBatch(memory: GuestMemory, tokens: Int32Array, max: number): number {
    const s = this.#state;
    const base = this.#base;
    this.#window(memory, this.rings.device, availEventOffset(this.size) + 2);
    if (s[base + S_BROKEN] !== 0) return 0;
    const usedIdx = Atomics.load(memory.u16, (memory.at + USED_IDX) >> 1);
    const last = s[base + S_LAST_USED] | 0;
    const size = this.size | 0;
    const there = ringDistance(usedIdx, last);
    if (there > size) {
      s[base + S_BROKEN] = 1;
      return 0;
    }
    const n = Math.min(there, max) | 0;
    if (n === 0) return 0;
    let done = 0;
    while (done < n) {
      done += this.#reapSingles(memory, tokens, last, done, n);
      if (done === n) break;
      // A chain of several, or what breaks the ring.
      const head = memory.i32[((memory.at + USED_RING) >> 2) + 2 * ((last + done) & (size - 1))];
      const token = this.#takeBack(head);
      if (token < 0) {
        s[base + S_BROKEN] = 1;
        break;
      }
      tokens[done++] = token;
    }
    s[base + S_LAST_USED] = (last + done) & 0xffff;
    s[base + S_USED_SEEN] = s[base + S_LAST_USED];
    return done;
  }

  /**
   * Puts the buffers of used entries `last + from … last + end − 1` back, up to the first that is not a single descriptor that
   * is out: how many. Calls nothing in its loop.
   */
  #reapSingles(memory: GuestMemory, tokens: Int32Array, last: number, from: number, end: number): number {
    const s = this.#state;
    const { i32 } = memory;
    const ring = (memory.at + USED_RING) >> 2;
    const size = this.size | 0;
    const mask = (size - 1) | 0;
    const word = this.#word | 0;
    const first = last | 0;
    let i = from | 0;
    // Where the first of them goes.
    const top = (this.#stack + s[this.#base + S_FREE] - i) | 0;
    // Touched before the loop: docs/performance.md § Loops.
    void i32[ring + (((first + i) & mask) << 1)];
    tokens[i] = 0;
    for (; i < end; i++) {
      const head = i32[ring + (((first + i) & mask) << 1)];
      if (head >>> 0 >= size) break;
      const own = (word + head) | 0;
      const state = s[own];
      // Not out, or a chain of several.
      if ((state & 0x8000_0001) !== 0) break;
      tokens[i] = state >> 1;
      s[own] = FREE;
      s[(top + i) | 0] = head;
    }
    s[this.#base + S_FREE] += i - from;
    return i - from;
  }

  /**
   * Puts the descriptors of the buffer at `head` back onto the stack: its token, or −1 if no such buffer is out. Length and
   * links of a chain are the driver's own knowledge, not the ring's.
   */
  #takeBack(head: number): number {
    const s = this.#state;
    if (head < 0 || head >= this.size || s[this.#word + head] < 0) return -1;
    const state = s[this.#word + head];
    const count = (state & 1) === 0 ? 1 : s[this.#count + head];
    // On top again, in the order in which they were taken.
    const top = this.#stack + s[this.#base + S_FREE] + count - 1;
    let index = head;
    let next = count > 1 ? s[this.#second + head] : 0;
    for (let i = 0; i < count; i++) {
      s[top - i] = index;
      s[this.#word + index] = FREE;
      index = next;
      next = ~s[this.#word + index];
    }
    s[this.#base + S_FREE] += count;
    return state >> 1;
  }

  /** Asks for no interrupts; the device may still send one (§ 2.7.7). */
  disableInterrupts(memory: GuestMemory): void {
    this.#window(memory, this.rings.driver, availBytes(this.size));
    if (!this.#eventIdx) Atomics.store(memory.u16, memory.at >> 1, VIRTQ_AVAIL_F_NO_INTERRUPT);
  }

  /**
   * Asks for an interrupt at the next returned buffer, then looks again: true if one has arrived meanwhile. Store, then
   * load, both atomic: pairs with store idx, load event in `SplitDeviceQueue.needsInterrupt`.
   */
  enableInterrupts(memory: GuestMemory): boolean {
    this.#window(memory, this.rings.driver, availBytes(this.size));
    if (this.#eventIdx) {
      Atomics.store(
        memory.u16,
        (memory.at + usedEventOffset(this.size)) >> 1,
        this.#state[this.#base + S_LAST_USED],
      );
    } else {
      Atomics.store(memory.u16, memory.at >> 1, 0);
    }
    return this.hasUsed(memory);
  }

  #window(memory: GuestMemory, gpa: number, bytes: number): void {
    assert(memory.window(gpa, bytes, true), 'ring memory is RAM');
  }
}
