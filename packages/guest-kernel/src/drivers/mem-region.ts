/**
 * The region of one virtio-mem device as its driver keeps it: geometry, which sub-blocks are plugged, the state of each
 * block, and the requests that change them. Everything lies in the arena; the device's mutex guards it.
 */
import type { Vcpu } from '@ebb/machine';
import type { SplitDriverQueue } from '@ebb/virtio/driver';
import {
  EBB_MEM_REQ_EXCHANGE,
  EBB_MEM_REQ_TO_OFFSET,
  Features,
  INTERRUPT_CONFIG_CHANGE,
  MEM_CFG_PLUGGED_SIZE,
  MEM_CFG_REQUESTED_SIZE,
  MEM_CFG_USABLE_REGION_SIZE,
  MEM_QUEUE_REQUEST,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
  VIRTIO_MEM_RESP_NACK,
} from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import { MEM_THREAD_WORDS, PLUGGED_SHIFT, T_MEM } from '../layout.ts';
import { EV, eventRow } from '../mm/events.ts';
import { S_DRIVER, type MemoryHotplug } from '../mm/memory-hotplug.ts';
import { PAGEBLOCK_PAGES, ZONE_MOVABLE } from '../mm/zone.ts';
import { LINE_MEM, Q_MEM, VirtioGuest } from './virtio-guest.ts';

// Words of a device's state. Sizes and addresses are in pages.
export const M_READY = 0;
export const M_FEATURES_LOW = 1;
export const M_FEATURES_HIGH = 2;
export const M_SIZE = 3;
export const M_RINGS = 4;
export const M_REQUEST_PAGE = 7;
/** 1 while there is work: a config change. Set by the interrupt handler without the mutex, cleared by a pass: atomic. */
export const M_WORK = 8;
/** The device answered what it must not: no further requests. Atomic: looked at without the mutex. */
export const M_BROKEN = 9;
export const M_UNPLUG_ALL = 10;
export const M_BLOCK = 11;
export const M_ADDR = 12;
const M_USABLE = 13;
export const M_PLUGGED = 14;
export const M_REQUESTED = 15;
/** First memory block (sub-block mode) or big block that was never prepared. */
const M_NEXT = 16;
/** Why the last pass ended short of its goal: a `MemOutcome`, for those who look in from outside. */
export const M_LAST = 17;
/** Milliseconds of the next retry. */
export const M_RETRY_MS = 18;
/** When the retry is due, virtual; 0: none is armed. vCPU 0 looks without the mutex: an old value costs it one look. */
export const M_RETRY_F64 = 24;
/** Guards the queue and everything above; held across device waits. Order: balloon, memory devices, blk, spin locks. */
export const M_MUTEX = 32;

/** States of a memory block, or of a big block at its first section. */
export const UNUSED = 0;
export const PLUGGED = 1;
export const OFFLINE = 2;
export const OFFLINE_PARTIAL = 3;
export const KERNEL = 4;
export const KERNEL_PARTIAL = 5;
export const MOVABLE = 6;
export const MOVABLE_PARTIAL = 7;

/**
 * What a step came to, by Linux's errno: ETXTBSY the device is busy, EBUSY memory would not go, ENOMEM no memory for the
 * memmap, ENOSPC the usable region is full, EAGAIN the configuration changed, EINVAL the device broke the protocol.
 */
export const MEM_OUTCOMES = ['ok', 'EAGAIN', 'ENOSPC', 'EBUSY', 'ETXTBSY', 'ENOMEM', 'EINVAL'] as const;
export type MemOutcome = (typeof MEM_OUTCOMES)[number];

export class MemRegion {
  readonly guest: VirtioGuest;
  /** The arena's words, and the first of this device's. */
  readonly w: Int32Array;
  readonly base: number;
  /** Number of the device, from 0: its memory group. */
  readonly index: number;
  readonly #bits: number;
  readonly #maxPfn: number;
  readonly #vcpu: Vcpu;
  readonly #hotplug: MemoryHotplug;
  readonly #events: number;
  #queue: SplitDriverQueue | null = null;

  constructor(arena: Arena, vcpu: Vcpu, hotplug: MemoryHotplug, index: number, inWait: () => void) {
    this.w = arena.w;
    this.base = T_MEM + index * MEM_THREAD_WORDS;
    this.index = index;
    this.#bits = arena.layout.plugged;
    this.#maxPfn = arena.maxPfn;
    this.#vcpu = vcpu;
    this.#hotplug = hotplug;
    this.#events = eventRow(vcpu.id);
    this.guest = new VirtioGuest(arena, vcpu, LINE_MEM + index, inWait);
  }

  // ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────

  get ready(): boolean {
    return Atomics.load(this.w, this.base + M_READY) !== 0;
  }
  get broken(): boolean {
    return Atomics.load(this.w, this.base + M_BROKEN) !== 0;
  }
  get workPending(): boolean {
    return Atomics.load(this.w, this.base + M_WORK) !== 0;
  }

  get features(): Features {
    return new Features(this.w[this.base + M_FEATURES_LOW], this.w[this.base + M_FEATURES_HIGH]);
  }

  get queue(): SplitDriverQueue {
    this.#queue ??= this.guest.queue(
      Q_MEM + this.index,
      this.w[this.base + M_SIZE],
      this.base + M_RINGS,
      this.features,
    );
    return this.#queue;
  }

  /** A 64-bit field of the configuration, in pages. */
  field(offset: number): number {
    return this.guest.driver.readConfig64(offset) / 4096;
  }

  /** Reads the sizes anew. */
  refresh(): void {
    this.w[this.base + M_USABLE] = this.field(MEM_CFG_USABLE_REGION_SIZE);
    this.w[this.base + M_PLUGGED] = this.field(MEM_CFG_PLUGGED_SIZE);
    this.w[this.base + M_REQUESTED] = this.field(MEM_CFG_REQUESTED_SIZE);
  }

  /** The device's interrupt: the configuration changed. A retry that waits is pointless then. */
  interrupt(): void {
    if (!this.ready) return;
    if ((this.guest.driver.takeInterrupt() & INTERRUPT_CONFIG_CHANGE) !== 0)
      Atomics.store(this.w, this.base + M_WORK, 1);
  }

  #configChanged(): boolean {
    if (this.guest.interruptTaken) {
      this.guest.interruptTaken = false;
      this.interrupt();
    }
    return this.workPending;
  }

  // ── Geometry ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Whether whole device blocks are added and removed. */
  get bigBlocks(): boolean {
    return this.w[this.base + M_BLOCK] >= this.#hotplug.sectionPages;
  }
  /** Pages of what is added at once: a memory block, or a big block. */
  get unit(): number {
    return Math.max(this.w[this.base + M_BLOCK], this.#hotplug.sectionPages);
  }
  /** Pages of a sub-block: a device block, at least a pageblock. */
  get sub(): number {
    return Math.max(this.w[this.base + M_BLOCK], PAGEBLOCK_PAGES);
  }
  /** Number of the first whole unit in the region; units are numbered from address 0. */
  get firstBlock(): number {
    return Math.ceil(this.w[this.base + M_ADDR] / this.unit);
  }
  /** First block that was never prepared. */
  get nextBlock(): number {
    return this.w[this.base + M_NEXT];
  }
  set nextBlock(block: number) {
    this.w[this.base + M_NEXT] = block;
  }
  /** One more than the last unit whose pages all lie in the usable region. */
  get usableEnd(): number {
    const { w, base } = this;
    return Math.floor(Math.min(w[base + M_ADDR] + w[base + M_USABLE], this.#maxPfn) / this.unit);
  }

  // ── Blocks and sub-blocks ────────────────────────────────────────────────────────────────────────────────────────

  state(block: number): number {
    return this.w[this.#hotplug.section(block * this.unit) + S_DRIVER];
  }
  setState(block: number, state: number): void {
    this.w[this.#hotplug.section(block * this.unit) + S_DRIVER] = state;
  }

  /** Sets a block's state from what is plugged of it and where it is online; one memory block online is enough. */
  settle(block: number): void {
    const whole = this.pluggedIn(block) === this.unit / this.sub;
    let pfn = block * this.unit;
    const end = pfn + this.unit;
    while (pfn < end && !this.#hotplug.isOnline(pfn)) pfn += this.#hotplug.sectionPages;
    if (pfn >= end) this.setState(block, whole ? OFFLINE : OFFLINE_PARTIAL);
    else if (this.#hotplug.zoneTypeOf(pfn) === ZONE_MOVABLE)
      this.setState(block, whole ? MOVABLE : MOVABLE_PARTIAL);
    else this.setState(block, whole ? KERNEL : KERNEL_PARTIAL);
  }

  /** Whether the sub-block that holds `pfn` is plugged. */
  isPlugged(pfn: number): boolean {
    const bit = pfn >>> PLUGGED_SHIFT;
    return ((this.w[this.#bits + (bit >>> 5)] >>> (bit & 31)) & 1) !== 0;
  }

  setPlugged(first: number, count: number, plugged: boolean): void {
    for (let bit = first >>> PLUGGED_SHIFT; bit < (first + count) >>> PLUGGED_SHIFT; bit++) {
      // Atomic: another device's region may have bits in the same word.
      if (plugged) Atomics.or(this.w, this.#bits + (bit >>> 5), 1 << (bit & 31));
      else Atomics.and(this.w, this.#bits + (bit >>> 5), ~(1 << (bit & 31)));
    }
  }

  /** Sub-blocks of a unit that are plugged. */
  pluggedIn(block: number): number {
    let n = 0;
    for (let pfn = block * this.unit; pfn < (block + 1) * this.unit; pfn += this.sub)
      if (this.isPlugged(pfn)) n++;
    return n;
  }

  /** Nothing of the region is prepared: what an earlier driver knew to be plugged may not be any more. */
  forget(): void {
    for (let b = this.firstBlock; b < this.nextBlock; b++) {
      this.setPlugged(b * this.unit, this.unit, false);
      this.setState(b, UNUSED);
    }
    this.nextBlock = this.firstBlock;
  }

  /** Whether the unit of `pfn` is one of this device's that was prepared. */
  holds(pfn: number): boolean {
    const block = Math.floor(pfn / this.unit);
    return block >= this.firstBlock && block < this.nextBlock;
  }

  /** Whether a block of the region is added. */
  get anyAdded(): boolean {
    for (let b = this.firstBlock; b < this.nextBlock; b++)
      if (this.state(b) !== UNUSED && this.state(b) !== PLUGGED) return true;
    return false;
  }

  /** Pages of blocks that are added and not online. */
  get offlinePages(): number {
    let pages = 0;
    for (let b = this.firstBlock; b < this.nextBlock; b++)
      if (this.state(b) === OFFLINE || this.state(b) === OFFLINE_PARTIAL) pages += this.unit;
    return pages;
  }

  /**
   * Whether one more unit may be added: memory that nobody puts online must not use up its own memmap
   * (`virtio_mem_could_add_memory`).
   */
  get mayAdd(): boolean {
    return this.offlinePages + this.unit <= this.offlineThreshold;
  }
  get offlineThreshold(): number {
    return Math.max(2 * this.unit, this.#hotplug.config.offlinePages);
  }

  /** Puts an added memory block online, what is plugged of it. */
  online(first: number): void {
    this.#hotplug.online(first, this.index, (p) => this.isPlugged(p));
  }
  /** Takes an online memory block out of use. False: some of its pages cannot go. */
  offline(first: number): boolean {
    return this.#hotplug.offline(first, this.index, (p) => this.isPlugged(p));
  }

  /**
   * Adds the memory blocks of one unit and, but under policy `offline`, puts what is plugged of them to use. All are added
   * before the first is online: nothing of them is in use if one cannot be. False: no memory for a memmap, and none is added.
   */
  addAndOnline(first: number): boolean {
    const { sectionPages } = this.#hotplug;
    const end = first + this.unit;
    for (let pfn = first; pfn < end; pfn += sectionPages) {
      if (this.#hotplug.add(pfn, this.index)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.remove(p, this.index);
      return false;
    }
    for (let pfn = first; this.#hotplug.autoOnline && pfn < end; pfn += sectionPages) this.online(pfn);
    return true;
  }

  // ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Trades plugged pages for unplugged ones of the region. */
  exchange(from: number, to: number, pages: number): MemOutcome {
    const outcome = this.request(EBB_MEM_REQ_EXCHANGE, from, pages, to);
    if (outcome === 'ok') {
      this.setPlugged(from, pages, false);
      this.setPlugged(to, pages, true);
    }
    return outcome;
  }

  /** Sends a request and waits for the answer. Bits and sizes follow an ACK. `to`: what an exchange takes. */
  request(type: number, pfn: number, pages: number, to = 0): MemOutcome {
    const w = this.w;
    const vcpu = this.#vcpu;
    // The host may have changed its mind: look first.
    if ((type < VIRTIO_MEM_REQ_UNPLUG_ALL || to > 0) && this.#configChanged()) return 'EAGAIN';
    const gpa = w[this.base + M_REQUEST_PAGE] * 4096;
    const bytes = new DataView(new ArrayBuffer(MEM_REQ_BYTES));
    bytes.setUint16(0, type, true);
    bytes.setUint32(8, (pfn * 4096) % 0x1_0000_0000, true);
    bytes.setUint32(12, Math.floor((pfn * 4096) / 0x1_0000_0000), true);
    bytes.setUint16(16, pages / w[this.base + M_BLOCK], true);
    if (to > 0)
      bytes.setUint32(EBB_MEM_REQ_TO_OFFSET, (to - w[this.base + M_ADDR]) / w[this.base + M_BLOCK], true);
    vcpu.window(gpa, MEM_REQ_BYTES, true);
    vcpu.u8.set(new Uint8Array(bytes.buffer), vcpu.at);
    this.queue.add(vcpu, [{ gpa, length: MEM_REQ_BYTES }], [{ gpa: gpa + 64, length: MEM_RESP_BYTES }], 0);
    this.guest.submitAndWait(this.queue, MEM_QUEUE_REQUEST);
    w[this.#events + EV.mem_requests]++;
    vcpu.window(gpa + 64, MEM_RESP_BYTES, false);
    const answer = vcpu.u16[vcpu.at >> 1];
    if (answer === VIRTIO_MEM_RESP_ACK) {
      if (type === VIRTIO_MEM_REQ_PLUG) w[this.base + M_PLUGGED] += pages;
      else if (type === VIRTIO_MEM_REQ_UNPLUG) w[this.base + M_PLUGGED] -= pages;
      if (type < VIRTIO_MEM_REQ_UNPLUG_ALL) this.setPlugged(pfn, pages, type === VIRTIO_MEM_REQ_PLUG);
      return 'ok';
    }
    if (answer === VIRTIO_MEM_RESP_NACK && type !== VIRTIO_MEM_REQ_UNPLUG) return 'EAGAIN';
    return answer === VIRTIO_MEM_RESP_BUSY ? 'ETXTBSY' : 'EINVAL';
  }

  /** What was plugged and could not be added goes back first (`virtio_mem_cleanup_pending_mb`). */
  unplugPending(): MemOutcome {
    for (let b = this.firstBlock; b < this.nextBlock; b++) {
      if (this.state(b) !== PLUGGED) continue;
      const outcome = this.request(VIRTIO_MEM_REQ_UNPLUG, b * this.unit, this.pluggedIn(b) * this.sub);
      if (outcome !== 'ok') return outcome;
      this.setState(b, UNUSED);
    }
    return 'ok';
  }

  unplugAll(): MemOutcome {
    const outcome = this.request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0);
    if (outcome === 'ok') this.w[this.base + M_UNPLUG_ALL] = 0;
    return outcome;
  }
}
