/**
 * One popped buffer: the segments as they were copied and checked, and the device's *lease* on their bytes (I16). A
 * device reads and writes guest memory only through a chain, only within its segments, and not after `end`.
 */
import { PAGE_SIZE, pageOffset, type GuestMemory } from '@ebb/machine';

export class DescriptorChain {
  head = 0;
  /** Segment addresses and lengths; the first `readableSegments` are device-readable. */
  readonly gpas: number[] = [];
  readonly lengths: number[] = [];
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

  /** Starts the lease on the buffer whose first descriptor is `head`; empties what an earlier buffer left. */
  begin(head: number): void {
    this.head = head;
    this.segments = 0;
    this.readableSegments = 0;
    this.readableBytes = 0;
    this.writableBytes = 0;
    this.#live = true;
  }

  get writableSegments(): number {
    return this.segments - this.readableSegments;
  }
  get totalBytes(): number {
    return this.readableBytes + this.writableBytes;
  }

  append(gpa: number, length: number, writable: boolean): void {
    this.gpas[this.segments] = gpa;
    this.lengths[this.segments] = length;
    this.segments++;
    if (writable) this.writableBytes += length;
    else {
      this.readableSegments++;
      this.readableBytes += length;
    }
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
