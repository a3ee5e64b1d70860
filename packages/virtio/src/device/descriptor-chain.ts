/**
 * One popped buffer: the segments as they were copied and checked, and the device's *lease* on their bytes (I16). A
 * device reads and writes guest memory only through a chain, only within its segments, and not after `end`.
 */
import { PAGE_SIZE, pageOffset, type GuestMemory } from '@ebb/machine';
import { SEGMENT_WORDS, type ChainBatch } from './chain-batch.ts';

export class DescriptorChain {
  head = 0;
  /** Segment addresses and lengths; the first `readableSegments` are device-readable. */
  gpas: Float64Array = new Float64Array(8);
  lengths: Uint32Array = new Uint32Array(8);
  /** Segments in use; the arrays may hold leftovers of an earlier buffer behind them. */
  segments = 0;
  readableSegments = 0;
  readableBytes = 0;
  writableBytes = 0;
  readonly #memory: GuestMemory;
  readonly #onLeaseBroken: (gpa: number) => void;
  #live = true;

  constructor(memory: GuestMemory, onLeaseBroken: (gpa: number) => void) {
    this.#memory = memory;
    this.#onLeaseBroken = onLeaseBroken;
  }

  /** Starts the lease on the buffer whose first descriptor is `head`; its segments are appended. */
  begin(head: number): void {
    this.head = head;
    this.segments = 0;
    this.readableSegments = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
    this.#live = true;
  }

  /** Adds one segment behind the others; device-readable ones come first. */
  append(gpa: number, length: number, writable: boolean): void {
    const at = this.segments;
    if (at === this.gpas.length) this.#grow(at + 1);
    this.gpas[at] = gpa;
    this.lengths[at] = length;
    this.segments = at + 1;
    if (writable) this.writableBytes += length;
    else {
      this.readableSegments = at + 1;
      this.readableBytes += length;
    }
  }

  /** Starts the lease on the first buffer of `batch`. */
  load(batch: ChainBatch): void {
    const count = batch.end(0);
    if (count > this.gpas.length) this.#grow(count);
    const { segments } = batch;
    const { gpas, lengths } = this;
    this.begin(batch.head(0));
    this.segments = count;
    this.writableBytes = batch.written(0);
    for (let i = 0; i < count; i++) {
      gpas[i] = segments[i * SEGMENT_WORDS];
      const length = segments[i * SEGMENT_WORDS + 1];
      lengths[i] = Math.abs(length);
      if (length < 0) continue;
      this.readableSegments = i + 1;
      this.readableBytes += length;
    }
  }

  /** Room for `count` segments, and as many again. */
  #grow(count: number): void {
    const { gpas, lengths } = this;
    this.gpas = new Float64Array(2 * count);
    this.gpas.set(gpas);
    this.lengths = new Uint32Array(2 * count);
    this.lengths.set(lengths);
  }

  get writableSegments(): number {
    return this.segments - this.readableSegments;
  }
  get totalBytes(): number {
    return this.readableBytes + this.writableBytes;
  }

  /** Ends the lease: the buffer goes back to the driver. */
  end(): void {
    this.#live = false;
  }

  /** False once the buffer was returned. */
  get live(): boolean {
    return this.#live;
  }

  /** Copies `out.length` readable bytes from `offset`; returns how many there were. Bytes that are not RAM end it. */
  read(offset: number, out: Uint8Array): number {
    return this.#copy(0, this.readableSegments, offset, out, false);
  }

  /** Copies `bytes` into the writable part at `offset`; returns how many fitted. */
  write(offset: number, bytes: Uint8Array): number {
    return this.#copy(this.readableSegments, this.segments, offset, bytes, true);
  }

  #copy(first: number, end: number, offset: number, bytes: Uint8Array, toGuest: boolean): number {
    let skip = offset;
    let done = 0;
    for (let i = first; i < end && done < bytes.length; i++) {
      if (skip >= this.lengths[i]) {
        skip -= this.lengths[i];
        continue;
      }
      let gpa = this.gpas[i] + skip;
      let left = Math.min(this.lengths[i] - skip, bytes.length - done);
      skip = 0;
      while (left > 0) {
        const n = Math.min(left, PAGE_SIZE - pageOffset(gpa));
        if (!this.#live) {
          this.#onLeaseBroken(gpa);
          return done;
        }
        if (!this.#memory.window(gpa, n, toGuest)) return done;
        const { u8, at } = this.#memory;
        if (toGuest) u8.set(bytes.subarray(done, done + n), at);
        else bytes.set(u8.subarray(at, at + n), done);
        done += n;
        gpa += n;
        left -= n;
      }
    }
    return done;
  }
}
