/**
 * One popped buffer: the segments as they were copied and checked, and the device's *lease* on their bytes (I16). A
 * device reads and writes guest memory only through a chain, only within its segments, and not after `end`.
 */
import { PAGE_SIZE, pageOffset, type GuestMemory } from '@ebb/machine';

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

  /** Starts the lease on the buffer whose first descriptor is `head` and whose segments have been filled in. */
  begin(
    head: number,
    segments: number,
    readableSegments: number,
    readableBytes: number,
    writableBytes: number,
  ): void {
    this.head = head;
    this.segments = segments;
    this.readableSegments = readableSegments;
    this.readableBytes = readableBytes;
    this.writableBytes = writableBytes;
    this.#live = true;
  }

  /** Room for twice as many segments. */
  grow(): this {
    const { gpas, lengths } = this;
    this.gpas = new Float64Array(2 * gpas.length);
    this.gpas.set(gpas);
    this.lengths = new Uint32Array(2 * lengths.length);
    this.lengths.set(lengths);
    return this;
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
