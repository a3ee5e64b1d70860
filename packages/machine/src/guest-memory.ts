/**
 * Guest memory as rings, drivers and device models see it: by guest-physical address, a window at a time. The same
 * code runs over a vCPU's translated memory, over the host's view of a VM, and over a plain buffer that is no Ebb VM.
 *
 * A *window* covers bytes of one 4 KiB page. It is valid until the next call that may leave the section: another
 * `window` that faults, an exit, a wait, a task's yield. `section` counts those; compare it after locating several.
 */
export interface GuestMemory {
  /**
   * Locates `length` bytes at `gpa` (all inside one page). True: `at` is their byte offset in `u8`, `u16 (at >> 1)` and
   * `i32 (at >> 2)`. False: not RAM, or `write` and read-only; nothing was touched.
   */
  window(gpa: number, length: number, write: boolean): boolean;
  u8: Uint8Array;
  u16: Uint16Array;
  i32: Int32Array;
  /** Byte offset of the located window; below 2³⁰. */
  at: number;
  /** Moves whenever windows located before become stale. */
  section: number;
}

/** Guest memory as a device has it: it can ask where RAM is without touching it. Answers hold as long as windows do. */
export interface DeviceMemory extends GuestMemory {
  /** Whether `length` bytes at `gpa` (all inside one page) may be touched. Takes no frame and marks nothing. */
  contains(gpa: number, length: number, write: boolean): boolean;
  /**
   * Finds the memory around `gpa` of which every byte may be read and written alike. True: it begins at `from` and ends before
   * `to`. False: there is none, or no more is known of it than `contains` tells.
   */
  extent(gpa: number): boolean;
  from: number;
  to: number;
}

/** Guest memory over one plain buffer at guest-physical 0: tests, benchmarks, foreign guests. */
export class FlatGuestMemory implements DeviceMemory {
  u8: Uint8Array;
  u16: Uint16Array;
  i32: Int32Array;
  at = 0;
  section = 0;
  from = 0;
  to = 0;
  readonly size: number;

  constructor(buffer: ArrayBufferLike) {
    this.size = buffer.byteLength;
    this.u8 = new Uint8Array(buffer);
    this.u16 = new Uint16Array(buffer);
    this.i32 = new Int32Array(buffer);
  }

  contains(gpa: number, length: number, _write: boolean): boolean {
    return gpa >= 0 && gpa + length <= this.size;
  }

  extent(gpa: number): boolean {
    this.to = this.size;
    return gpa >= 0 && gpa < this.size;
  }

  window(gpa: number, length: number, write: boolean): boolean {
    if (!this.contains(gpa, length, write)) return false;
    this.at = gpa;
    return true;
  }
}
