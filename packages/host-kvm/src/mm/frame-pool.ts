/**
 * Every frame the host hands out or takes back passes here: buddy allocator, ledger, zeroing and poison in one place,
 * so that accounts cannot drift apart.
 *
 * A freed frame is poisoned (first and last word, or all of it) and the poison is checked when it is taken again: a
 * write that landed in a free frame shows even if no gate saw it.
 */
import * as machine from '@ebb/machine';
import {
  assert,
  freeSchedule,
  hfn,
  ownerOf,
  type FrameLedger,
  type Hfn,
  type HostMemory,
  type Schedule,
  type ViolationLog,
} from '@ebb/machine';
import type { FrameOrder, FrameSource } from '@ebb/memfs';
import { HostBuddy } from './host-buddy.ts';

// Local copies: docs/performance.md § Constants.
const { FRAME_OWNED, USE_PAGE_TABLE, USE_RAM, USE_VMM } = machine;

/** What a free frame holds. */
export const POISON = 0x0bad_f4ee;

export interface FramePoolOptions {
  readonly memory: HostMemory;
  readonly ledger: FrameLedger;
  readonly violations: ViolationLog;
  /** Frames this host has; the rest of the buffer, if any, is left alone. */
  readonly frames: number;
  /** `edges` writes two words per freed frame; `full` the whole frame (tests). */
  readonly poison?: 'edges' | 'full';
  readonly schedule?: Schedule;
}

export class FramePool implements FrameSource {
  readonly memory: HostMemory;
  readonly ledger: FrameLedger;
  readonly buddy: HostBuddy;
  readonly frames: number;
  /** Most frames in use at any time. */
  peak = 0;
  /** Frames zeroed for a new owner. */
  zeroed = 0;
  /** Frames zeroed by the last `allocZeroed`, for the cost of the fault. */
  lastZeroed = 0;
  failures = 0;
  /** What A and D bits said of each frame's present owner (`FRAME_*` in `tdp-mmu.ts`); written by the VMs' MMUs and devices. */
  readonly frameFlags: Uint8Array;
  readonly #log: ViolationLog;
  readonly #full: boolean;
  readonly #schedule: Schedule;
  readonly #poisoned: Uint8Array;

  constructor(options: FramePoolOptions) {
    this.memory = options.memory;
    this.ledger = options.ledger;
    this.frames = options.frames;
    this.buddy = new HostBuddy(options.frames);
    this.#log = options.violations;
    this.#full = options.poison === 'full';
    this.#schedule = options.schedule ?? freeSchedule;
    this.#poisoned = new Uint8Array(options.frames);
    this.frameFlags = new Uint8Array(options.memory.frames);
  }

  get used(): number {
    return this.frames - this.buddy.free;
  }

  allocZeroed(order: FrameOrder, owner: number): number {
    const count = 1 << order;
    const frame = this.buddy.alloc(order);
    this.lastZeroed = 0;
    if (frame < 0) {
      if (order === 0) this.failures++;
      return -1;
    }
    if (this.#schedule.controlled) this.#schedule.point('owner-change', frame);
    this.#checkPoison(frame, count);
    this.ledger.take(hfn(frame), count, owner);
    // What the owner before did says nothing of this one.
    if (count === 1) this.frameFlags[frame] = 0;
    else this.frameFlags.fill(0, frame, frame + count);
    this.memory.zeroFrames(hfn(frame), count);
    this.zeroed += count;
    this.lastZeroed = count;
    if (this.used > this.peak) this.peak = this.used;
    return frame;
  }

  /** A zeroed frame for a page table of VM `vm`; −1 if none is free. */
  allocTable(vm: number): number {
    return this.allocZeroed(0, ownerOf(vm, USE_PAGE_TABLE));
  }

  /** Charges `count` frames to the VMM of VM `vm`; false (and nothing taken) if the host has too few. */
  chargeVmm(vm: number, count: number): boolean {
    if (this.buddy.free < count) {
      this.failures++;
      return false;
    }
    for (let i = 0; i < count; i++) {
      const frame = this.buddy.alloc(0);
      this.#checkPoison(frame, 1);
      this.ledger.take(hfn(frame), 1, ownerOf(vm, USE_VMM));
    }
    if (this.used > this.peak) this.peak = this.used;
    return true;
  }

  free(first: Hfn, count: number): void {
    if (this.#schedule.controlled) this.#schedule.point('owner-change', first);
    // What a device still has pinned is its data until the last pin goes.
    for (let f = first as number; f < first + count; f++) if (this.ledger.pins[f] === 0) this.#poison(hfn(f));
    if (this.ledger.release(first, count)) {
      this.buddy.freeRun(first, count);
      return;
    }
    // Some are pinned: free the others one by one; `unpin` frees the rest.
    for (let f = first as number; f < first + count; f++) {
      if (this.ledger.pins[f] === 0) this.buddy.freeRun(f, 1);
    }
  }

  /**
   * A device of VM `vm` reaches `frame` for guest page `gfn`: the gate that says whether it is still the VM's RAM. What it
   * has pinned stays so until the last pin goes, even if the VM no longer maps it.
   */
  deviceReaches(vm: number, gfn: number, frame: number): void {
    const { ledger } = this;
    const expected = ownerOf(vm, USE_RAM);
    const held = ledger.state[frame] === FRAME_OWNED || ledger.pins[frame] > 0;
    if (held && ledger.owner[frame] === expected) return;
    this.#log.record({
      kind: ledger.owner[frame] === 0 ? 'use-after-free' : 'foreign-frame',
      actor: 'device',
      vm,
      vcpu: -1,
      gfn,
      hfn: frame,
      expected,
      found: ledger.owner[frame],
      owner: ledger.owner[frame],
      stepTaken: ledger.stepTaken[frame],
      stepReleased: ledger.stepReleased[frame],
    });
  }

  #poison(frame: Hfn): void {
    const i32 = this.memory.i32;
    if (this.#full) this.memory.poisonFrame(frame, POISON);
    else {
      i32[frame * 1024] = POISON;
      i32[frame * 1024 + 1023] = POISON;
    }
    this.#poisoned[frame] = 1;
  }

  pin(frame: Hfn): void {
    this.ledger.pins[frame]++;
  }

  /** Drops a pin; a frame that was taken away meanwhile is freed with its last pin. */
  unpin(frame: Hfn): void {
    assert(this.ledger.pins[frame] > 0, 'an unpinned frame has a pin');
    this.ledger.pins[frame]--;
    if (this.ledger.pins[frame] === 0 && this.ledger.state[frame] === 2) {
      this.#poison(frame);
      this.ledger.release(frame, 1);
      this.buddy.freeRun(frame, 1);
    }
  }

  /** Frames that were freed and not taken again: they must hold their poison. */
  poisonedFrames(): number[] {
    const frames: number[] = [];
    for (let f = 0; f < this.frames; f++) if (this.#poisoned[f] !== 0) frames.push(f);
    return frames;
  }

  /** Reports a freed frame that somebody wrote to. */
  checkPoison(frame: Hfn): void {
    this.#checkPoison(frame, 1);
  }

  #checkPoison(first: number, count: number): void {
    const i32 = this.memory.i32;
    for (let f = first; f < first + count; f++) {
      if (this.#poisoned[f] === 0) continue;
      this.#poisoned[f] = 0;
      const edges = i32[f * 1024] === POISON && i32[f * 1024 + 1023] === POISON;
      if (this.#full ? this.memory.holds(hfn(f), POISON) : edges) continue;
      this.#log.record({
        kind: 'use-after-free',
        actor: 'kvm',
        vm: -1,
        vcpu: -1,
        gfn: -1,
        hfn: f,
        expected: POISON,
        found: i32[f * 1024],
        owner: this.ledger.owner[f],
        stepTaken: this.ledger.stepTaken[f],
        stepReleased: this.ledger.stepReleased[f],
      });
    }
  }
}
