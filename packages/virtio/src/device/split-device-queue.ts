/**
 * The device's side of a split virtqueue (virtio 1.2 § 2.7), over guest memory: indices, events, and what is out. What the
 * descriptors say is read in `chain-reader.ts`. The guest is hostile until proved otherwise: what is wrong is a value
 * (`QueueError`), after which the queue is broken until a reset.
 *
 * All state is private to the device. `lastAvail` and `usedIdx` are free-running 16-bit numbers.
 */
import * as machine from '@ebb/machine';
import { pageOffset, type DeviceMemory } from '@ebb/machine';
import * as virtioWords from '../uapi/virtio.ts';
import { availEventOffset, isPowerOfTwo, needEvent, ringDistance, usedEventOffset } from '../uapi/virtio.ts';
import type { RingAddresses } from '../uapi/virtio.ts';
import * as chainBatch from './chain-batch.ts';
import { ChainBatch } from './chain-batch.ts';
import { ChainReader } from './chain-reader.ts';
import { DescriptorChain } from './descriptor-chain.ts';
import type { QueueError } from './queue-error.ts';

// Local copies: docs/performance.md § Constants.
const { PAGE_SIZE } = machine;
const {
  AVAIL_IDX,
  AVAIL_RING,
  MAX_QUEUE_SIZE,
  USED_ELEM_BYTES,
  USED_IDX,
  USED_RING,
  VIRTQ_AVAIL_F_NO_INTERRUPT,
  VIRTQ_USED_F_NO_NOTIFY,
} = virtioWords;
const { C_HEAD, C_WRITTEN, CHAIN_WORDS } = chainBatch;

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
  readonly #reader: ChainReader;
  /** Whether the used ring lies in one page; otherwise buffers are popped and pushed one by one. */
  readonly #batched: boolean;
  /** One buffer on its way into a `DescriptorChain`. */
  readonly #one: ChainBatch;
  readonly #onLeaseBroken: (gpa: number) => void;
  readonly #spare: DescriptorChain[] = [];
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
    this.#reader = new ChainReader(options.size, options.rings, options.memory, options.indirect);
    this.#one = new ChainBatch(1, options.size);
    this.#batched =
      pageOffset(options.rings.device) + USED_RING + options.size * USED_ELEM_BYTES <= PAGE_SIZE;
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

  /**
   * At least `max` entries if so many are known already, else what there is: an index is read once for several batches.
   * Entries up to `#availSeen` were acquired when it was loaded.
   */
  #ready(max: number): number {
    const known = ringDistance(this.#availSeen, this.#lastAvail);
    return known >= max && this.error === null && !this.#stopped ? known : this.#available();
  }

  /** Takes the next available chain, or null: empty, or `error` is set. Copies and checks each descriptor once. */
  pop(): DescriptorChain | null {
    if (this.#ready(1) === 0) return null;
    const chain = this.#spare.pop() ?? new DescriptorChain(this.memory, this.#onLeaseBroken);
    if (this.#reader.readCommon(this.#one, this.#lastAvail, 1) === 1) chain.load(this.#one);
    else {
      const bad = this.#readUncommon(chain);
      if (bad !== null) return this.#fail(bad);
    }
    this.#lastAvail = (this.#lastAvail + 1) & 0xffff;
    this.inFlight++;
    return chain;
  }

  /** Reads the next available buffer, whatever it is. */
  #readUncommon(chain: DescriptorChain): QueueError | null {
    const { memory } = this;
    const slot = this.rings.driver + AVAIL_RING + 2 * (this.#lastAvail & (this.size - 1));
    if (!memory.window(slot, 2, false)) return { kind: 'ring-not-in-ram', gpa: slot };
    const head = memory.u16[memory.at >> 1];
    if (head >= this.size) return { kind: 'head-out-of-range', head };
    return this.#reader.read(chain, head);
  }

  /**
   * Takes up to `max` available buffers, as many as `batch` has room for, copied and checked as by `pop`. Stops before the
   * first that is not of the common form (`ChainBatch`); take that with `pop`, which says what is wrong with it, if it is.
   * The batch path, for devices that serve a buffer at once: no lease is kept, and the next call overwrites the batch.
   */
  popChains(batch: ChainBatch, max: number): number {
    const most = Math.min(max, batch.room);
    const n = this.#batched ? Math.min(this.#ready(most), most) : 0;
    return this.#taken(this.#reader.readCommon(batch, this.#lastAvail, n));
  }

  /**
   * Takes up to `max` available buffers of one descriptor each: heads, addresses, lengths (negative when writable).
   * Stops before the first chain that is longer, or malformed; take that with `pop`. The addresses are checked where the
   * buffer is touched (`window`). The next call overwrites the arrays, even if it takes nothing.
   */
  popSingles(heads: Int32Array, gpas: Float64Array, lengths: Int32Array, max: number): number {
    const n = this.#batched ? Math.min(this.#ready(max), max) : 0;
    return this.#taken(this.#reader.readSingles(heads, gpas, lengths, this.#lastAvail, n));
  }

  #taken(count: number): number {
    this.#lastAvail = (this.#lastAvail + count) & 0xffff;
    this.inFlight += count;
    return count;
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

  /** Returns the buffers of `popChains` with one index store, each with its `C_WRITTEN` bytes written; empties the batch. */
  pushChains(batch: ChainBatch): void {
    const { chains, count } = batch;
    batch.count = 0;
    const ring = this.#usedWindow(count);
    if (ring < 0) return;
    const { i32 } = this.memory;
    const mask = (this.size - 1) | 0;
    const idx = this.#usedIdx | 0;
    // Touched before the loop: docs/performance.md § Loops.
    void (i32[ring + ((idx & mask) << 1)] + chains[0]);
    for (let i = 0; i < count; i++) {
      const at = (ring + (((idx + i) & mask) << 1)) | 0;
      const chain = i * CHAIN_WORDS;
      i32[at] = chains[chain + C_HEAD];
      i32[at + 1] = chains[chain + C_WRITTEN];
    }
    this.#returned(count);
  }

  /** Returns `count` buffers of `popSingles` with one index store; `written` is no more than the shortest of them holds. */
  pushSingles(heads: Int32Array, count: number, written: number): void {
    const ring = this.#usedWindow(count);
    if (ring < 0) return;
    const { i32 } = this.memory;
    const mask = (this.size - 1) | 0;
    const idx = this.#usedIdx | 0;
    const bytes = written | 0;
    // Touched before the loop: docs/performance.md § Loops.
    void (i32[ring + ((idx & mask) << 1)] + heads[0]);
    for (let i = 0; i < count; i++) {
      const at = (ring + (((idx + i) & mask) << 1)) | 0;
      i32[at] = heads[i];
      i32[at + 1] = bytes;
    }
    this.#returned(count);
  }

  /** First word of the used ring, for `count` entries; −1: there is nothing to write, or nowhere. */
  #usedWindow(count: number): number {
    if (this.#stopped || count === 0) return -1;
    const { memory } = this;
    if (!memory.window(this.rings.device, USED_RING + this.size * USED_ELEM_BYTES, true)) {
      this.#fail({ kind: 'ring-not-in-ram', gpa: this.rings.device });
      return -1;
    }
    return (memory.at + USED_RING) >> 2;
  }

  #returned(count: number): void {
    this.#usedIdx = (this.#usedIdx + count) & 0xffff;
    this.inFlight -= count;
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
