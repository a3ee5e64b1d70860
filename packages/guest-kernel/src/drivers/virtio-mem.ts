/**
 * The virtio-mem driver, as Linux 6.12 behaves (`drivers/virtio/virtio_mem.c`): a region of guest-physical memory whose
 * blocks are plugged to reach the size the host asks for, and unplugged as far as their content lets them go.
 *
 * **Sub-block mode** where the device's block is smaller than a memory block: a memory block is plugged by sub-blocks of
 * at least a pageblock; a block with some of them missing is *partial*. **Big-block mode** else: whole device blocks.
 *
 * | to plug | to unplug |
 * | --- | --- |
 * | kernel partial, movable partial, offline partial, unused, then new blocks; ascending | offline partial, offline, movable partial, kernel partial, movable, kernel; descending; a full online block first whole, then by sub-blocks from its top |
 *
 * One pass runs to completion on vCPU 0, so its clock may run ahead of the window by what the requests cost. Simplified:
 * added blocks are put online at once (every policy but `offline`), so OFFLINE states arise only when that fails.
 */
import { NS_PER_S, spinLock, spinUnlock, trySpinLock, type Vcpu } from '@ebb/machine';
import type { SplitDriverQueue } from '@ebb/virtio/driver';
import {
  EBB_MEM_F_MORE,
  EBB_MEM_REQ_MORE,
  Features,
  INTERRUPT_CONFIG_CHANGE,
  MEM_CFG_ADDR,
  MEM_CFG_BLOCK_SIZE,
  MEM_CFG_NODE_ID,
  MEM_CFG_PLUGGED_SIZE,
  MEM_CFG_REGION_SIZE,
  MEM_CFG_REQUESTED_SIZE,
  MEM_CFG_USABLE_REGION_SIZE,
  MEM_QUEUE_REQUEST,
  MEM_REQ_BYTES,
  MEM_RESP_BYTES,
  VIRTIO_F_EVENT_IDX,
  VIRTIO_F_INDIRECT_DESC,
  VIRTIO_F_VERSION_1,
  VIRTIO_ID_MEM,
  VIRTIO_MEM_F_ACPI_PXM,
  VIRTIO_MEM_F_PERSISTENT_SUSPEND,
  VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE,
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
  VIRTIO_MEM_RESP_NACK,
} from '@ebb/virtio/uapi';
import type { Arena } from '../arena.ts';
import type { HotplugConfig } from '../boot.ts';
import { MEM_THREAD_WORDS, PLUGGED_SHIFT, T_MEM } from '../layout.ts';
import { EV, eventRow } from '../mm/events.ts';
import { S_DRIVER, type MemoryHotplug } from '../mm/memory-hotplug.ts';
import { PAGEBLOCK_PAGES, ZONE_MOVABLE } from '../mm/zone.ts';
import { LINE_MEM, Q_MEM, VirtioGuest } from './virtio-guest.ts';

// Words of a device's state. Sizes and addresses are in pages.
const M_READY = 0;
const M_FEATURES_LOW = 1;
const M_FEATURES_HIGH = 2;
const M_SIZE = 3;
const M_RINGS = 4;
const M_REQUEST_PAGE = 7;
/** 1 while there is work: a config change, a retry that is due. */
const M_WORK = 8;
/** The device answered what it must not: no further requests. */
const M_BROKEN = 9;
const M_UNPLUG_ALL = 10;
const M_BLOCK = 11;
const M_NODE = 12;
const M_ADDR = 13;
const M_REGION = 14;
const M_USABLE = 15;
const M_PLUGGED = 16;
const M_REQUESTED = 17;
/** First memory block (sub-block mode) or big block that was never prepared. */
const M_NEXT = 18;
/** Why the last pass ended short of its goal: an `Outcome`, for those who look in from outside. */
const M_LAST = 19;
/** Milliseconds of the next retry. */
const M_RETRY_MS = 20;
/** When the retry is due, virtual; 0: none is armed. */
const M_RETRY_F64 = 24;
/** Guards the queue and everything above; held across device waits. Order: balloon, memory devices, blk, spin locks. */
const M_MUTEX = 32;

/** What the guest asks for when it runs out: 64 MiB at once. */
const MORE_PAGES = 16384;

/** States of a memory block, or of a big block at its first section. */
const UNUSED = 0;
const PLUGGED = 1;
const OFFLINE = 2;
const OFFLINE_PARTIAL = 3;
const KERNEL = 4;
const KERNEL_PARTIAL = 5;
const MOVABLE = 6;
const MOVABLE_PARTIAL = 7;

const PLUG_ORDER = [KERNEL_PARTIAL, MOVABLE_PARTIAL, OFFLINE_PARTIAL] as const;
const UNPLUG_ORDER = [OFFLINE_PARTIAL, OFFLINE, MOVABLE_PARTIAL, KERNEL_PARTIAL, MOVABLE, KERNEL] as const;

export const RETRY_MIN_MS = 50_000;
export const RETRY_MAX_MS = 300_000;

/**
 * What a step came to, by Linux's errno: ETXTBSY the device is busy, EBUSY memory would not go, ENOMEM no memory for the
 * memmap, ENOSPC the usable region is full, EAGAIN the configuration changed, EINVAL the device broke the protocol.
 */
export const MEM_OUTCOMES = ['ok', 'EAGAIN', 'ENOSPC', 'EBUSY', 'ETXTBSY', 'ENOMEM', 'EINVAL'] as const;
export type MemOutcome = (typeof MEM_OUTCOMES)[number];

/** Guest pages the driver of one device needs: three for the queue, one for requests. */
export const MEM_DRIVER_PAGES = 4;

export class VirtioMemDriver {
  readonly guest: VirtioGuest;
  readonly #w: Int32Array;
  readonly #f64: Float64Array;
  readonly #base: number;
  readonly #bits: number;
  readonly #maxPfn: number;
  readonly #vcpu: Vcpu;
  readonly #hotplug: MemoryHotplug;
  readonly #config: HotplugConfig;
  readonly #index: number;
  readonly #events: number;
  readonly #relax: () => void;
  #queue: SplitDriverQueue | null = null;

  /** `index`: which memory device, from 0. */
  constructor(
    arena: Arena,
    vcpu: Vcpu,
    hotplug: MemoryHotplug,
    config: HotplugConfig,
    index: number,
    inWait: () => void,
  ) {
    this.#w = arena.w;
    this.#f64 = arena.f64;
    this.#base = T_MEM + index * MEM_THREAD_WORDS;
    this.#bits = arena.layout.plugged;
    this.#maxPfn = arena.maxPfn;
    this.#vcpu = vcpu;
    this.#hotplug = hotplug;
    this.#config = config;
    this.#index = index;
    this.#events = eventRow(vcpu.id);
    this.guest = new VirtioGuest(arena, vcpu, LINE_MEM + index, inWait);
    this.#relax = () => {
      inWait();
      vcpu.beginSection();
      vcpu.port.relax();
    };
  }

  // ── Bring-up ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Brings the device up on vCPU 0. `pages`: `MEM_DRIVER_PAGES` zeroed guest pages. False: no such device. */
  probe(pages: readonly number[]): boolean {
    const w = this.#w;
    const base = this.#base;
    const { driver } = this.guest;
    const features = this.guest.negotiate(
      VIRTIO_ID_MEM,
      Features.of(
        VIRTIO_MEM_F_ACPI_PXM,
        VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE,
        VIRTIO_MEM_F_PERSISTENT_SUSPEND,
        EBB_MEM_F_MORE,
        VIRTIO_F_INDIRECT_DESC,
        VIRTIO_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
      ),
    );
    if (features === null) return false;
    w[base + M_FEATURES_LOW] = features.low;
    w[base + M_FEATURES_HIGH] = features.high;
    for (let i = 0; i < 3; i++) w[base + M_RINGS + i] = pages[i];
    w[base + M_REQUEST_PAGE] = pages[3];
    const max = driver.queueMax(MEM_QUEUE_REQUEST);
    if (!max.ok) return false;
    w[base + M_SIZE] = Math.min(128, max.value);
    const queue = this.#view();
    queue.reset(this.#vcpu);
    if (!driver.setupQueue(MEM_QUEUE_REQUEST, queue.size, queue.rings).ok) return false;
    w[base + M_BLOCK] = this.#field(MEM_CFG_BLOCK_SIZE);
    // Without ACPI_PXM the field means nothing.
    w[base + M_NODE] = features.has(VIRTIO_MEM_F_ACPI_PXM)
      ? driver.readConfig32(MEM_CFG_NODE_ID) & 0xffff
      : 0;
    w[base + M_ADDR] = this.#field(MEM_CFG_ADDR);
    w[base + M_REGION] = this.#field(MEM_CFG_REGION_SIZE);
    this.#refresh();
    w[base + M_NEXT] = this.#firstBlock;
    w[base + M_RETRY_MS] = RETRY_MIN_MS;
    driver.driverOk();
    if (this.#config.adopts !== 'no') this.#adopt();
    else if (w[base + M_PLUGGED] > 0) w[base + M_UNPLUG_ALL] = 1;
    w[base + M_WORK] = 1;
    Atomics.store(w, base + M_READY, 1);
    return true;
  }

  /** A 64-bit field of the configuration, in pages. */
  #field(offset: number): number {
    return this.guest.driver.readConfig64(offset) / 4096;
  }

  #refresh(): void {
    const w = this.#w;
    w[this.#base + M_USABLE] = this.#field(MEM_CFG_USABLE_REGION_SIZE);
    w[this.#base + M_PLUGGED] = this.#field(MEM_CFG_PLUGGED_SIZE);
    w[this.#base + M_REQUESTED] = this.#field(MEM_CFG_REQUESTED_SIZE);
  }

  #view(): SplitDriverQueue {
    const w = this.#w;
    this.#queue ??= this.guest.queue(
      Q_MEM + this.#index,
      w[this.#base + M_SIZE],
      this.#base + M_RINGS,
      new Features(w[this.#base + M_FEATURES_LOW], w[this.#base + M_FEATURES_HIGH]),
    );
    return this.#queue;
  }

  get ready(): boolean {
    return Atomics.load(this.#w, this.#base + M_READY) !== 0;
  }

  // ── Geometry ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Whether whole device blocks are added and removed. */
  get bigBlocks(): boolean {
    return this.#w[this.#base + M_BLOCK] >= this.#hotplug.sectionPages;
  }
  /** Pages of what is added at once: a memory block, or a big block. */
  get #unit(): number {
    return Math.max(this.#w[this.#base + M_BLOCK], this.#hotplug.sectionPages);
  }
  /** Pages of a sub-block: a device block, at least a pageblock. */
  get #sub(): number {
    return Math.max(this.#w[this.#base + M_BLOCK], PAGEBLOCK_PAGES);
  }
  /** Number of the first whole unit in the region; units are numbered from address 0. */
  get #firstBlock(): number {
    return Math.ceil(this.#w[this.#base + M_ADDR] / this.#unit);
  }
  /** One more than the last unit whose pages are all in the first `pages` of the region. */
  #blocksIn(pages: number): number {
    return Math.floor(Math.min(this.#w[this.#base + M_ADDR] + pages, this.#maxPfn) / this.#unit);
  }

  #state(block: number): number {
    return this.#w[this.#hotplug.section(block * this.#unit) + S_DRIVER];
  }
  #setState(block: number, state: number): void {
    this.#w[this.#hotplug.section(block * this.#unit) + S_DRIVER] = state;
  }

  // ── Plugged bits ─────────────────────────────────────────────────────────────────────────────────────────────────

  /** Whether the sub-block that holds `pfn` is plugged. */
  isPlugged(pfn: number): boolean {
    const bit = pfn >>> PLUGGED_SHIFT;
    return ((this.#w[this.#bits + (bit >>> 5)] >>> (bit & 31)) & 1) !== 0;
  }

  #setPlugged(first: number, count: number, plugged: boolean): void {
    for (let bit = first >>> PLUGGED_SHIFT; bit < (first + count) >>> PLUGGED_SHIFT; bit++) {
      if (plugged) this.#w[this.#bits + (bit >>> 5)] |= 1 << (bit & 31);
      else this.#w[this.#bits + (bit >>> 5)] &= ~(1 << (bit & 31));
    }
  }

  /** Sub-blocks of a unit that are plugged. */
  #pluggedIn(block: number): number {
    let n = 0;
    for (let pfn = block * this.#unit; pfn < (block + 1) * this.#unit; pfn += this.#sub)
      if (this.isPlugged(pfn)) n++;
    return n;
  }

  // ── Interrupts and timers ────────────────────────────────────────────────────────────────────────────────────────

  /** The device's interrupt: the configuration changed. A retry that waits is pointless then. On vCPU 0. */
  interrupt(): void {
    if (!this.ready) return;
    if ((this.guest.driver.takeInterrupt() & INTERRUPT_CONFIG_CHANGE) !== 0) this.#w[this.#base + M_WORK] = 1;
  }

  /** Virtual time at which there is work; Infinity when there is none. */
  nextDue(now: number): number {
    if (!this.ready || this.#w[this.#base + M_BROKEN] !== 0) return Number.POSITIVE_INFINITY;
    if (this.#w[this.#base + M_WORK] !== 0) return now;
    const at = this.#f64[(this.#base + M_RETRY_F64) / 2];
    return at > 0 ? Math.max(at, now) : Number.POSITIVE_INFINITY;
  }

  #armRetry(): void {
    const w = this.#w;
    this.#f64[(this.#base + M_RETRY_F64) / 2] =
      this.#vcpu.clock + (w[this.#base + M_RETRY_MS] / 1000) * NS_PER_S;
  }

  // ── The worker ───────────────────────────────────────────────────────────────────────────────────────────────────

  /** One pass towards the requested size (`virtio_mem_run_wq`). On vCPU 0, when due. */
  work(): void {
    if (!this.ready || this.#w[this.#base + M_BROKEN] !== 0) return;
    if (!trySpinLock(this.#w, this.#base + M_MUTEX, this.#vcpu.id)) return;
    this.#pass(false);
    spinUnlock(this.#w, this.#base + M_MUTEX);
  }

  /** The OOM notifier: asks the host for more, and plugs what it grants, never less; pages gained. Any vCPU. */
  oomNotify(): number {
    const w = this.#w;
    const base = this.#base;
    const mayAsk = new Features(w[base + M_FEATURES_LOW], w[base + M_FEATURES_HIGH]).has(EBB_MEM_F_MORE);
    if (!this.ready || !mayAsk || w[base + M_BROKEN] !== 0) return 0;
    if (Atomics.load(w, base + M_MUTEX) === this.#vcpu.id + 1) return 0;
    spinLock(w, base + M_MUTEX, this.#vcpu.id, this.#relax);
    const before = w[base + M_PLUGGED];
    if (this.#request(EBB_MEM_REQ_MORE, w[base + M_ADDR], Math.max(MORE_PAGES, w[base + M_BLOCK])) === 'ok')
      this.#pass(true);
    const gained = w[base + M_PLUGGED] - before;
    spinUnlock(w, base + M_MUTEX);
    return Math.max(0, gained);
  }

  #pass(plugOnly: boolean): void {
    const w = this.#w;
    const base = this.#base;
    const timer = (base + M_RETRY_F64) / 2;
    if (w[base + M_WORK] === 0 && this.#f64[timer] > 0)
      w[base + M_RETRY_MS] = Math.min(RETRY_MAX_MS, 2 * w[base + M_RETRY_MS]);
    this.#f64[timer] = 0;
    let outcome: MemOutcome;
    do {
      w[base + M_WORK] = 0;
      outcome = w[base + M_UNPLUG_ALL] === 0 ? 'ok' : this.#unplugAll();
      if (outcome === 'ok') {
        this.#refresh();
        outcome = this.#unplugPending();
      }
      if (outcome === 'ok') {
        const diff = w[base + M_REQUESTED] - w[base + M_PLUGGED];
        if (diff > 0) outcome = this.bigBlocks ? this.#plugBig(diff) : this.#plugSmall(diff);
        else if (diff < 0 && !plugOnly)
          outcome = this.bigBlocks ? this.#unplugBig(-diff) : this.#unplugSmall(-diff);
      }
    } while (outcome === 'EAGAIN');
    w[base + M_LAST] = MEM_OUTCOMES.indexOf(outcome);
    switch (outcome) {
      case 'ok':
        w[base + M_RETRY_MS] = RETRY_MIN_MS;
        break;
      case 'ENOSPC':
        // Nothing to wait for but a larger usable region, which the device announces.
        break;
      case 'EINVAL':
        w[base + M_BROKEN] = 1;
        break;
      case 'EBUSY':
      case 'ETXTBSY':
      case 'ENOMEM':
        this.#armRetry();
    }
  }

  // ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Sends a request and waits for the answer. Bits and sizes follow an ACK. */
  #request(type: number, pfn: number, pages: number): MemOutcome {
    const w = this.#w;
    const vcpu = this.#vcpu;
    // The host may have changed its mind: look first.
    if (type < VIRTIO_MEM_REQ_UNPLUG_ALL && this.#configChanged()) return 'EAGAIN';
    const gpa = w[this.#base + M_REQUEST_PAGE] * 4096;
    const bytes = new DataView(new ArrayBuffer(MEM_REQ_BYTES));
    bytes.setUint16(0, type, true);
    bytes.setUint32(8, (pfn * 4096) % 0x1_0000_0000, true);
    bytes.setUint32(12, Math.floor((pfn * 4096) / 0x1_0000_0000), true);
    bytes.setUint16(16, pages / w[this.#base + M_BLOCK], true);
    vcpu.window(gpa, MEM_REQ_BYTES, true);
    vcpu.u8.set(new Uint8Array(bytes.buffer), vcpu.at);
    const queue = this.#view();
    queue.add(vcpu, [{ gpa, length: MEM_REQ_BYTES }], [{ gpa: gpa + 64, length: MEM_RESP_BYTES }], 0);
    this.guest.submitAndWait(queue, MEM_QUEUE_REQUEST);
    w[this.#events + EV.mem_requests]++;
    vcpu.window(gpa + 64, MEM_RESP_BYTES, false);
    const answer = vcpu.u16[vcpu.at >> 1];
    if (answer === VIRTIO_MEM_RESP_ACK) {
      if (type === VIRTIO_MEM_REQ_PLUG) w[this.#base + M_PLUGGED] += pages;
      else if (type === VIRTIO_MEM_REQ_UNPLUG) w[this.#base + M_PLUGGED] -= pages;
      if (type < VIRTIO_MEM_REQ_UNPLUG_ALL) this.#setPlugged(pfn, pages, type === VIRTIO_MEM_REQ_PLUG);
      return 'ok';
    }
    if (answer === VIRTIO_MEM_RESP_NACK && type !== VIRTIO_MEM_REQ_UNPLUG) return 'EAGAIN';
    return answer === VIRTIO_MEM_RESP_BUSY ? 'ETXTBSY' : 'EINVAL';
  }

  #configChanged(): boolean {
    if (this.guest.interruptTaken) {
      this.guest.interruptTaken = false;
      this.interrupt();
    }
    return this.#w[this.#base + M_WORK] !== 0;
  }

  /** What was plugged and could not be added goes back first (`virtio_mem_cleanup_pending_mb`). */
  #unplugPending(): MemOutcome {
    for (let b = this.#firstBlock; b < this.#w[this.#base + M_NEXT]; b++) {
      if (this.#state(b) !== PLUGGED) continue;
      const pages = this.bigBlocks ? this.#unit : this.#pluggedIn(b) * this.#sub;
      const outcome = this.#request(VIRTIO_MEM_REQ_UNPLUG, b * this.#unit, pages);
      if (outcome !== 'ok') return outcome;
      this.#setState(b, UNUSED);
    }
    return 'ok';
  }

  #unplugAll(): MemOutcome {
    const outcome = this.#request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0);
    if (outcome === 'ok') this.#w[this.#base + M_UNPLUG_ALL] = 0;
    return outcome;
  }

  // ── Sub-block mode: plug ─────────────────────────────────────────────────────────────────────────────────────────

  #plugSmall(diff: number): MemOutcome {
    const w = this.#w;
    let left = Math.floor(diff / this.#sub);
    if (left === 0) return 'ok';
    for (const state of PLUG_ORDER) {
      for (let b = this.#firstBlock; b < w[this.#base + M_NEXT]; b++) {
        if (this.#state(b) !== state) continue;
        const outcome = this.#plugHoles(b, left);
        if (typeof outcome !== 'number') return outcome;
        left = outcome;
        if (left === 0) return 'ok';
      }
    }
    for (let b = this.#firstBlock; b < w[this.#base + M_NEXT]; b++) {
      if (this.#state(b) !== UNUSED) continue;
      const outcome = this.#plugAndAdd(b, left);
      if (typeof outcome !== 'number') return outcome;
      left = outcome;
      if (left === 0) return 'ok';
    }
    while (left > 0) {
      const b = w[this.#base + M_NEXT];
      if (b >= this.#blocksIn(w[this.#base + M_USABLE])) return 'ENOSPC';
      w[this.#base + M_NEXT]++;
      const outcome = this.#plugAndAdd(b, left);
      if (typeof outcome !== 'number') return outcome;
      left = outcome;
    }
    return 'ok';
  }

  /** Plugs up to `left` missing sub-blocks of a partial block, one request per run of them. What is left, or why not. */
  #plugHoles(block: number, count: number): number | MemOutcome {
    let left = count;
    const end = (block + 1) * this.#unit;
    const sub = this.#sub;
    for (let pfn = block * this.#unit; pfn < end && left > 0; ) {
      if (this.isPlugged(pfn)) {
        pfn += sub;
        continue;
      }
      let pages = 0;
      while (pages < left * sub && pfn + pages < end && !this.isPlugged(pfn + pages)) pages += sub;
      const outcome = this.#request(VIRTIO_MEM_REQ_PLUG, pfn, pages);
      if (outcome !== 'ok') return outcome;
      if (this.#hotplug.isOnline(pfn)) this.#hotplug.fakeOnline(pfn, pages);
      left -= pages / sub;
      pfn += pages;
    }
    this.#settle(block);
    return left;
  }

  /** Plugs the first sub-blocks of an unused block, adds it and puts it online. What is left, or why not. */
  #plugAndAdd(block: number, left: number): number | MemOutcome {
    const first = block * this.#unit;
    const pages = Math.min(left * this.#sub, this.#unit);
    const outcome = this.#request(VIRTIO_MEM_REQ_PLUG, first, pages);
    if (outcome !== 'ok') return outcome;
    if (!this.#addAndOnline(first)) {
      // No memory for the memmap: what was plugged goes back (`virtio_mem_sbm_unplug_mb`).
      if (this.#request(VIRTIO_MEM_REQ_UNPLUG, first, pages) !== 'ok') this.#setState(block, PLUGGED);
      return 'ENOMEM';
    }
    this.#settle(block);
    return left - pages / this.#sub;
  }

  #addAndOnline(first: number): boolean {
    const node = this.#w[this.#base + M_NODE];
    if (!this.#hotplug.add(first, node)) return false;
    this.#hotplug.online(first, node, this.#hotplug.zoneFor(node), (pfn) => this.isPlugged(pfn));
    return true;
  }

  /** State of a block from what is plugged of it and where it is online. */
  #settle(block: number): void {
    const first = block * this.#unit;
    const whole = this.#pluggedIn(block) === this.#unit / this.#sub;
    if (!this.#hotplug.isOnline(first)) this.#setState(block, whole ? OFFLINE : OFFLINE_PARTIAL);
    else if (this.#hotplug.zoneTypeOf(first) === ZONE_MOVABLE)
      this.#setState(block, whole ? MOVABLE : MOVABLE_PARTIAL);
    else this.#setState(block, whole ? KERNEL : KERNEL_PARTIAL);
  }

  // ── Sub-block mode: unplug ───────────────────────────────────────────────────────────────────────────────────────

  #unplugSmall(diff: number): MemOutcome {
    const w = this.#w;
    let left = Math.floor(diff / this.#sub);
    if (left === 0) return 'ok';
    for (const state of UNPLUG_ORDER) {
      for (let b = w[this.#base + M_NEXT] - 1; b >= this.#firstBlock && left > 0; b--) {
        if (this.#state(b) !== state) continue;
        const outcome = this.#unplugFrom(b, left);
        if (typeof outcome !== 'number') return outcome;
        left = outcome;
      }
      if (left === 0) return 'ok';
    }
    return 'EBUSY';
  }

  /** Unplugs up to `left` sub-blocks of a block: whole if it may, else from its top. What is left, or why not. */
  #unplugFrom(block: number, count: number): number | MemOutcome {
    const first = block * this.#unit;
    const sub = this.#sub;
    const all = this.#unit / sub;
    let left = count;
    if (left >= all && this.#pluggedIn(block) === all) {
      const outcome = this.#unplugPages(first, this.#unit);
      if (outcome === 'ok') left -= all;
      else if (outcome !== 'EBUSY') return outcome;
    }
    for (let pfn = first + this.#unit - sub; pfn >= first && left > 0; pfn -= sub) {
      if (!this.isPlugged(pfn)) continue;
      const outcome = this.#unplugPages(pfn, sub);
      if (outcome === 'ok') left--;
      else if (outcome !== 'EBUSY') {
        this.#settle(block);
        return outcome;
      }
    }
    if (this.#pluggedIn(block) === 0) {
      this.#hotplug.remove(first);
      this.#setState(block, UNUSED);
    } else this.#settle(block);
    return left;
  }

  /** Takes pages out of use and unplugs them; if the device will not, they are put back to use. */
  #unplugPages(pfn: number, pages: number): MemOutcome {
    const online = this.#hotplug.isOnline(pfn);
    if (online && !this.#hotplug.fakeOffline(pfn, pages)) return 'EBUSY';
    const outcome = this.#request(VIRTIO_MEM_REQ_UNPLUG, pfn, pages);
    if (outcome !== 'ok' && online) this.#hotplug.fakeOnline(pfn, pages);
    return outcome;
  }

  // ── Big-block mode ───────────────────────────────────────────────────────────────────────────────────────────────

  #plugBig(diff: number): MemOutcome {
    const w = this.#w;
    for (let left = Math.floor(diff / this.#unit); left > 0; left--) {
      let b = this.#firstBlock;
      while (b < w[this.#base + M_NEXT] && this.#state(b) !== UNUSED) b++;
      if (b >= this.#blocksIn(w[this.#base + M_USABLE])) return 'ENOSPC';
      w[this.#base + M_NEXT] = Math.max(w[this.#base + M_NEXT], b + 1);
      const outcome = this.#plugBigBlock(b);
      if (outcome !== 'ok') return outcome;
    }
    return 'ok';
  }

  #plugBigBlock(block: number): MemOutcome {
    const w = this.#w;
    const first = block * this.#unit;
    const outcome = this.#request(VIRTIO_MEM_REQ_PLUG, first, this.#unit);
    if (outcome !== 'ok') return outcome;
    const { sectionPages } = this.#hotplug;
    const node = w[this.#base + M_NODE];
    // All memory blocks are added before the first is online: nothing of them is in use if one cannot be.
    for (let pfn = first; pfn < first + this.#unit; pfn += sectionPages) {
      if (this.#hotplug.add(pfn, node)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.remove(p);
      if (this.#request(VIRTIO_MEM_REQ_UNPLUG, first, this.#unit) !== 'ok') this.#setState(block, PLUGGED);
      return 'ENOMEM';
    }
    for (let pfn = first; pfn < first + this.#unit; pfn += sectionPages)
      this.#hotplug.online(pfn, node, this.#hotplug.zoneFor(node), (p) => this.isPlugged(p));
    this.#setState(block, this.#hotplug.zoneTypeOf(first) === ZONE_MOVABLE ? MOVABLE : KERNEL);
    return 'ok';
  }

  #unplugBig(diff: number): MemOutcome {
    const w = this.#w;
    let left = Math.floor(diff / this.#unit);
    for (const state of [OFFLINE, MOVABLE, KERNEL] as const) {
      for (let b = w[this.#base + M_NEXT] - 1; b >= this.#firstBlock && left > 0; b--) {
        if (this.#state(b) !== state) continue;
        const outcome = this.#unplugBigBlock(b);
        if (outcome === 'ok') left--;
        else if (outcome !== 'EBUSY') return outcome;
      }
    }
    return left === 0 ? 'ok' : 'EBUSY';
  }

  #unplugBigBlock(block: number): MemOutcome {
    const first = block * this.#unit;
    const { sectionPages } = this.#hotplug;
    for (let pfn = first; pfn < first + this.#unit; pfn += sectionPages) {
      if (this.#hotplug.fakeOffline(pfn, sectionPages)) continue;
      for (let p = first; p < pfn; p += sectionPages) this.#hotplug.fakeOnline(p, sectionPages);
      return 'EBUSY';
    }
    const outcome = this.#request(VIRTIO_MEM_REQ_UNPLUG, first, this.#unit);
    for (let pfn = first; pfn < first + this.#unit; pfn += sectionPages) {
      if (outcome === 'ok') this.#hotplug.remove(pfn);
      else this.#hotplug.fakeOnline(pfn, sectionPages);
    }
    if (outcome === 'ok') this.#setState(block, UNUSED);
    return outcome;
  }

  // ── Memory that is plugged already ───────────────────────────────────────────────────────────────────────────────

  /** The region begins with what is plugged, without holes; it is used as it is. */
  #adopt(): void {
    const w = this.#w;
    const first = this.#firstBlock * this.#unit;
    const end = w[this.#base + M_ADDR] + w[this.#base + M_PLUGGED];
    if (end > first) this.#setPlugged(first, end - first, true);
    for (let b = this.#firstBlock; b * this.#unit < end; b++) {
      w[this.#base + M_NEXT] = b + 1;
      if (this.#config.adopts === 'in-place') this.#hotplug.adopt(b * this.#unit);
      else if (!this.#addAndOnline(b * this.#unit)) {
        this.#setState(b, PLUGGED);
        continue;
      }
      this.#settle(b);
    }
  }
}

/** Why the last pass of memory device `index` stopped, read from outside. */
export function memoryOutcome(arena: Arena, index: number): MemOutcome {
  return MEM_OUTCOMES[arena.w[T_MEM + index * MEM_THREAD_WORDS + M_LAST]];
}
