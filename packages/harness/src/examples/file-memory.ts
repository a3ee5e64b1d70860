/** Guest memory that is a file: someone else's RAM, shared by whoever maps it. Node only. */
import { fstatSync, readSync, writeSync } from 'node:fs';
import { PAGE_SIZE, type DeviceMemory } from '@ebb/machine';

/**
 * Every window is read afresh, and written back when the next is opened or at `flush`: in the order in which a device
 * model writes, which is what its guest relies on. Nothing of an earlier window is kept, so each call moves `section`.
 */
export class FileMemory implements DeviceMemory {
  readonly u8: Uint8Array = new Uint8Array(PAGE_SIZE);
  readonly u16: Uint16Array = new Uint16Array(this.u8.buffer);
  readonly i32: Int32Array = new Int32Array(this.u8.buffer);
  readonly bytes: number;
  at = 0;
  section = 0;
  readonly #fd: number;
  #dirtyAt = -1;
  #dirtyLength = 0;

  constructor(fd: number) {
    this.#fd = fd;
    this.bytes = fstatSync(fd).size;
  }

  contains(gpa: number, length: number, _write: boolean): boolean {
    return gpa >= 0 && length >= 0 && (gpa % PAGE_SIZE) + length <= PAGE_SIZE && gpa + length <= this.bytes;
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

  /** Makes pages read as zeros, as a discard does. */
  zero(gfn: number, count: number): void {
    this.flush();
    const zeros = new Uint8Array(PAGE_SIZE);
    for (let page = gfn; page < gfn + count; page++)
      if ((page + 1) * PAGE_SIZE <= this.bytes) writeSync(this.#fd, zeros, 0, PAGE_SIZE, page * PAGE_SIZE);
  }
}
