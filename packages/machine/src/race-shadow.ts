/**
 * What the race detector remembers, in shared memory: a clock per thread, and for each watched unit the last plain write,
 * the last plain reads, and the clock of its atomic operations. Only the thread that runs touches it.
 *
 * A unit is a word in the guest kernel's arena and the vCPU control blocks, and half a word in DRAM, where rings have
 * 16-bit fields. A frame of DRAM is watched from the first atomic operation on it, until it gets another owner: what is
 * synchronised so is a ring or a page table; in other frames a guest may race as it likes.
 */
import { MAX_THREADS } from './controlled-schedule.ts';
import type { SharedRegion } from './shared-views.ts';

const ARENA_UNITS = 1 << 16;
const CONTROL_UNITS = 1 << 13;
/** Clocks of atomic words elsewhere, shared between words: more order than there is, never less. */
const OTHER_UNITS = 1 << 12;
const MAX_WATCHED = 64;
const UNITS_PER_FRAME = 2048;
/** Frames that can be watched at all: 32 MiB. */
const MAX_FRAMES = 8192;

/** Words of a unit: last write (thread + 1 in the high byte, its clock below), then reads, then the atomic clock. */
export const UNIT_READS = 1;
export const UNIT_CLOCK: number = 1 + MAX_THREADS;
const UNIT_WORDS: number = 1 + 2 * MAX_THREADS;

const FREE_COUNT = 0;
const FREE_BASE = 1;
const CLOCKS: number = FREE_BASE + MAX_WATCHED;
/** Per frame: 1 + number of its place among the watched, 0 if none. */
const FRAMES: number = CLOCKS + MAX_THREADS * MAX_THREADS;
const ARENA: number = FRAMES + MAX_FRAMES;
const CONTROL: number = ARENA + ARENA_UNITS * UNIT_WORDS;
const OTHER: number = CONTROL + CONTROL_UNITS * UNIT_WORDS;
const WATCHED: number = OTHER + OTHER_UNITS * UNIT_WORDS;
const WATCHED_WORDS: number = UNITS_PER_FRAME * UNIT_WORDS;

/** Size of its memory, in bytes. */
export const RACE_BYTES: number = (WATCHED + MAX_WATCHED * WATCHED_WORDS) * 4;

/** Empties it between executions. */
export function resetRaces(buffer: SharedArrayBuffer): void {
  const w = new Int32Array(buffer);
  const free = new Set(w.subarray(FREE_BASE, FREE_BASE + w[FREE_COUNT]));
  const fresh = w[CLOCKS] === 0;
  for (let place = 0; place < MAX_WATCHED && !fresh; place++)
    if (!free.has(place)) w.fill(0, WATCHED + place * WATCHED_WORDS, WATCHED + (place + 1) * WATCHED_WORDS);
  w.fill(0, 0, WATCHED);
  w[FREE_COUNT] = MAX_WATCHED;
  for (let place = 0; place < MAX_WATCHED; place++) w[FREE_BASE + place] = MAX_WATCHED - 1 - place;
  for (let t = 0; t < MAX_THREADS; t++) w[CLOCKS + t * MAX_THREADS + t] = 1;
}

export class RaceShadow {
  readonly words: Int32Array;

  constructor(buffer: SharedArrayBuffer) {
    this.words = new Int32Array(buffer);
  }

  /** Where the vector clock of a thread begins. */
  clock(thread: number): number {
    return CLOCKS + thread * MAX_THREADS;
  }

  /** Where the record of the unit at `byte` of a region begins; −1: it is not watched. */
  unit(region: SharedRegion, byte: number): number {
    if (region === 'arena') return byte >> 2 < ARENA_UNITS ? ARENA + (byte >> 2) * UNIT_WORDS : -1;
    if (region === 'vcpu-control') return byte >> 2 < CONTROL_UNITS ? CONTROL + (byte >> 2) * UNIT_WORDS : -1;
    if (region !== 'dram' || byte >> 12 >= MAX_FRAMES) return -1;
    const place = this.words[FRAMES + (byte >> 12)] - 1;
    return place < 0 ? -1 : WATCHED + place * WATCHED_WORDS + ((byte & 0xfff) >> 1) * UNIT_WORDS;
  }

  /** The record that an atomic operation on any other word shares. */
  other(id: number): number {
    return OTHER + ((Math.imul(id, 0x9e3779b1) >>> 0) % OTHER_UNITS) * UNIT_WORDS;
  }

  /** Watches the frame around `byte` of DRAM from now on, if there is a place left. */
  watch(byte: number): void {
    const frame = byte >> 12;
    const w = this.words;
    if (frame >= MAX_FRAMES || w[FRAMES + frame] !== 0 || w[FREE_COUNT] === 0) return;
    w[FREE_COUNT]--;
    w[FRAMES + frame] = 1 + w[FREE_BASE + w[FREE_COUNT]];
  }

  /** Frames that get another owner: what was there before is nothing to what comes. */
  forget(first: number, count: number): void {
    const w = this.words;
    for (let frame = first; frame < Math.min(first + count, MAX_FRAMES); frame++) {
      const place = w[FRAMES + frame] - 1;
      if (place < 0) continue;
      w.fill(0, WATCHED + place * WATCHED_WORDS, WATCHED + (place + 1) * WATCHED_WORDS);
      w[FRAMES + frame] = 0;
      w[FREE_BASE + w[FREE_COUNT]] = place;
      w[FREE_COUNT]++;
    }
  }
}
