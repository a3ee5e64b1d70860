/**
 * The frame ledger: for every host frame an owner, reference and pin counts, a generation, and a state
 * `free → owned → free`, or `owned → revoking → free` for a frame taken away while pinned. Only the host worker writes it;
 * every actor's access passes a gate that reads it.
 *
 * The generation moves when a frame leaves its owner, so a translation made before can never pass the gate after:
 * vCPUs compare the generation kept in their TLB entry at each access.
 *
 * Simplified: one owner per frame. Frames with several owners (shared, merged, zero page) come with the memfs issue;
 * until then nothing shares a frame.
 */
import type { Hfn } from './address.ts';
import { assert } from './assert.ts';
import { sharedI32 } from './shared-views.ts';

export const FRAME_FREE = 0;
export const FRAME_OWNED = 1;
/** Taken from its owner while pinned: detached, and free with its last pin. */
export const FRAME_REVOKING = 2;

// Local copies: docs/performance.md § Constants.
const FREE = FRAME_FREE;
const OWNED = FRAME_OWNED;
const REVOKING = FRAME_REVOKING;

/** What an owner uses a frame for; part of the owner code. */
export const USE_RAM = 0;
export const USE_PAGE_TABLE = 1;
export const USE_VMM = 2;

/** Owner code of VM `vm` (0, 1, …) for one use; 0 is nobody. */
export function ownerOf(vm: number, use: number): number {
  return 4 + vm * 4 + use;
}

export function describeOwner(owner: number): string {
  if (owner === 0) return 'nobody';
  const use = ['RAM', 'page tables', 'VMM'][(owner - 4) & 3] ?? '?';
  return `VM ${(owner - 4) >> 2} (${use})`;
}

const FIELDS = 7;
/** Gates of 2 MiB blocks that follow the frames' own. */
function gateBlocks(frames: number): number {
  return (frames >>> 9) + 1;
}

/** Bytes of a ledger for `frames` frames. */
export function ledgerBytes(frames: number): number {
  return (frames * FIELDS + gateBlocks(frames) + 16) * 4;
}

/** Number of frames by use, kept by the ledger on every transition; the first sum of I9. */
export interface FrameCounts {
  readonly free: number;
  readonly guestAssigned: number;
  readonly memfsUnmapped: number;
  readonly pageTable: number;
  readonly vmm: number;
  readonly revoking: number;
  readonly pinnedDetached: number;
}

export class FrameLedger {
  readonly frames: number;
  readonly state: Int32Array;
  readonly owner: Int32Array;
  /**
   * Gates, read by every vCPU access: element `f` moves whenever frame `f` leaves an owner; element
   * `frames + (f >>> 9)` moves with each frame of that aligned 2 MiB, for translations of large leaves.
   */
  readonly generation: Int32Array;
  /** EPT leaves (and other mappers) that point at the frame. */
  readonly refs: Int32Array;
  readonly pins: Int32Array;
  readonly stepTaken: Int32Array;
  readonly stepReleased: Int32Array;
  /** Global step counter, word 0 of the tail. */
  readonly #tail: Int32Array;

  constructor(buffer: SharedArrayBuffer, frames: number) {
    assert(buffer.byteLength >= ledgerBytes(frames), 'ledger buffer is large enough');
    const field = (i: number): Int32Array => sharedI32('ledger', buffer, i * frames * 4, frames);
    this.frames = frames;
    this.state = field(0);
    this.owner = field(1);
    this.refs = field(2);
    this.pins = field(3);
    this.stepTaken = field(4);
    this.stepReleased = field(5);
    this.generation = sharedI32('ledger', buffer, 6 * frames * 4, frames + gateBlocks(frames));
    this.#tail = sharedI32('ledger', buffer, (FIELDS * frames + gateBlocks(frames)) * 4, 16);
  }

  get step(): number {
    return this.#tail[0];
  }

  #nextStep(): number {
    return ++this.#tail[0];
  }

  /** Gives `count` free frames from `first` to `owner`. Host only. */
  take(first: Hfn, count: number, owner: number): void {
    const end = first + count;
    const step = this.#nextStep();
    if (count === 1) {
      assert(this.state[first] === FREE, 'a frame is taken only when free');
      this.stepTaken[first] = step;
      this.owner[first] = owner;
      this.state[first] = OWNED;
      return;
    }
    for (let f = first as number; f < end; f++) {
      assert(this.state[f] === FREE, 'a frame is taken only when free');
      this.stepTaken[f] = step;
    }
    this.owner.fill(owner, first, end);
    this.state.fill(OWNED, first, end);
  }

  /**
   * Frees frames: their references must be gone and all holders have acknowledged. A pinned frame stays detached
   * (owner kept, not free) until its last pin is put. Returns true if the frames are free now. Host only.
   */
  release(first: Hfn, count: number): boolean {
    const end = first + count;
    const step = this.#nextStep();
    let free = true;
    for (let f = first as number; f < end; f++) {
      assert(this.state[f] !== FREE, 'a frame is released once');
      assert(this.refs[f] === 0, 'a released frame has no references');
      if (this.pins[f] > 0) {
        this.state[f] = REVOKING;
        free = false;
        continue;
      }
      this.stepReleased[f] = step;
      this.generation[f] = (this.generation[f] + 1) | 0;
      const block = this.frames + (f >>> 9);
      this.generation[block] = (this.generation[block] + 1) | 0;
      this.owner[f] = 0;
      this.state[f] = FREE;
    }
    return free;
  }

  /** Adds `delta` references (mappings) to each of `count` frames. Host only. */
  ref(first: Hfn, count: number, delta: number): void {
    for (let f = first as number; f < first + count; f++) this.refs[f] += delta;
  }

  /** Recounts every frame. O(frames): for audits and tests; running totals are the host's accounts. */
  recount(): FrameCounts {
    let free = 0;
    let guestAssigned = 0;
    let memfsUnmapped = 0;
    let pageTable = 0;
    let vmm = 0;
    let revoking = 0;
    let pinnedDetached = 0;
    for (let f = 0; f < this.frames; f++) {
      const state = this.state[f];
      if (state === FRAME_FREE) free++;
      else if (state === FRAME_REVOKING) {
        if (this.pins[f] > 0) pinnedDetached++;
        else revoking++;
      } else {
        const use = (this.owner[f] - 4) & 3;
        if (use === USE_PAGE_TABLE) pageTable++;
        else if (use === USE_VMM) vmm++;
        else if (this.refs[f] > 0) guestAssigned++;
        else memfsUnmapped++;
      }
    }
    return { free, guestAssigned, memfsUnmapped, pageTable, vmm, revoking, pinnedDetached };
  }
}
