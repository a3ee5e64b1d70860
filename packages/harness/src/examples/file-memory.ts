/** Guest memory that is a file: someone else's RAM, shared by whoever maps it. Node only. */
import { spawnSync } from 'node:child_process';
import { fstatSync, readSync, writeSync } from 'node:fs';
import { PAGE_SIZE, type DeviceMemory } from '@ebb/machine';

const CHUNK = 0x20_0000;
const ZEROS = Buffer.alloc(CHUNK);

/**
 * Every window is read afresh, and written back when the next is opened or at `flush`: in the order in which a device
 * model writes, which is what its guest relies on. Nothing of an earlier window is kept, so each call moves `section`.
 */
export class FileMemory implements DeviceMemory {
  readonly u8: Uint8Array = new Uint8Array(PAGE_SIZE);
  readonly u16: Uint16Array = new Uint16Array(this.u8.buffer);
  readonly i32: Int32Array = new Int32Array(this.u8.buffer);
  readonly from = 0;
  readonly to: number;
  at = 0;
  section = 0;
  readonly #fd: number;
  #dirtyAt = -1;
  #dirtyLength = 0;

  constructor(fd: number) {
    this.#fd = fd;
    this.to = fstatSync(fd).size;
  }

  contains(gpa: number, length: number, _write: boolean): boolean {
    return gpa >= 0 && length >= 0 && (gpa % PAGE_SIZE) + length <= PAGE_SIZE && gpa + length <= this.to;
  }

  extent(gpa: number): boolean {
    return gpa >= 0 && gpa < this.to;
  }

  window(gpa: number, length: number, write: boolean): boolean {
    this.flush();
    const offset = gpa % PAGE_SIZE;
    if (!this.contains(gpa, length, write)) return false;
    this.section++;
    this.at = offset;
    readSync(this.#fd, this.u8, offset, length, gpa);
    if (write) {
      this.#dirtyAt = gpa;
      this.#dirtyLength = length;
    }
    return true;
  }

  /** Writes back what was changed: before the guest is told of anything. */
  flush(): void {
    if (this.#dirtyAt < 0) return;
    writeSync(this.#fd, this.u8, this.#dirtyAt % PAGE_SIZE, this.#dirtyLength, this.#dirtyAt);
    this.#dirtyAt = -1;
  }

  /**
   * Makes pages read as zeros and gives what backs them back to the file system, as a discard does. Node cannot punch holes:
   * util-linux's `fallocate` does, one process a run; without it zeros are written, and memory is taken instead of given.
   */
  zero(gfn: number, count: number): void {
    this.flush();
    const from = gfn * PAGE_SIZE;
    const bytes = Math.min(count * PAGE_SIZE, this.to - from);
    // A hole is never made larger than it has to be: most of what a fresh guest reports is one already.
    if (bytes <= 0 || this.#isZero(from, bytes)) return;
    const range = ['--punch-hole', '--offset', String(from), '--length', String(bytes)];
    const punched = spawnSync('fallocate', [...range, `/proc/${process.pid}/fd/${this.#fd}`]);
    if (punched.status === 0) return;
    const zeros = new Uint8Array(PAGE_SIZE);
    for (let at = from; at < from + bytes; at += PAGE_SIZE) writeSync(this.#fd, zeros, 0, PAGE_SIZE, at);
  }

  #isZero(from: number, bytes: number): boolean {
    const chunk = Buffer.alloc(Math.min(bytes, CHUNK));
    for (let at = from; at < from + bytes; at += chunk.length) {
      const length = Math.min(chunk.length, from + bytes - at);
      readSync(this.#fd, chunk, 0, length, at);
      if (chunk.subarray(0, length).compare(ZEROS, 0, length) !== 0) return false;
    }
    return true;
  }
}
