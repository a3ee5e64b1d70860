/**
 * A virtual CPU's way to memory: TLB, hardware walk, sections, loads, stores and windows by guest-physical address,
 * and exits. Everything a guest kernel does to its RAM goes through here, one page at a time, past the ledger's gate.
 *
 * **Guest section.** A translation may be used only between two checks of the flush request. A check comes at least
 * every 64 single accesses and before each page of a bulk operation; exits, halts and lock waits end a section too. No
 * frame number survives it. If the check finds a new request: drop the TLB, *then* publish the acknowledgement.
 *
 * **TLB.** Two direct-mapped tables, for 4 KiB pages and for 2 MiB blocks (a 1 GiB leaf fills it block by block), and the
 * page of the last load and of the last store before both. An entry is `[read tag, write tag, frame, generation]`, a tag
 * being page or block number and epoch in one word; the write tag is set only if the leaf is writable and its D bit known
 * set. A flush moves the epoch, so it costs one store; the tables are swept once in 256 flushes. Guest-virtual accesses
 * use a third table, of combined mappings (`guest-mmu.ts`).
 */
import { gfn as toGfn, type Gfn, type Hfn } from './address.ts';
import * as costTable from './cost-table.ts';
import { type CostTable } from './cost-table.ts';
import { nudgeSleepingHost } from './doorbell.ts';
import * as ept from './ept.ts';
import { eptWalk, WalkResult } from './ept.ts';
import type { ExitPort } from './exit-port.ts';
import type { GuestMemory } from './guest-memory.ts';
import * as hostMemory from './host-memory.ts';
import { chunkOffset, type HostMemory } from './host-memory.ts';
import * as layout from './layout.ts';
import * as ledgerWords from './ledger.ts';
import { type FrameLedger } from './ledger.ts';
import { freeSchedule, type Schedule } from './schedule.ts';
import { sharedF64, sharedI32 } from './shared-views.ts';
import * as units from './units.ts';
import * as tlbLayout from './tlb.ts';
import type { ViolationLog } from './violations.ts';

// Local copies: docs/performance.md § Constants.
const { COST_TABLE } = costTable;
const { EPT_A, EPT_D, EPT_R, EPT_W } = ept;
const { CHUNK_FRAME_SHIFT } = hostMemory;
const {
  EXIT_REQUEST,
  MODE_GUEST,
  MODE_OUTSIDE,
  VCPU_BLOCK_BYTES,
  VCPU_BLOCK_WORDS,
  VC_CLOCK_F64,
  VC_EPT_ROOT,
  VC_EXIT_ADDR_F64,
  VC_EXIT_COST_F64,
  VC_EXIT_DATA,
  VC_EXIT_RDATA,
  VC_EXIT_REASON,
  VC_EXIT_RESULT,
  VC_EXIT_SIZE,
  VC_EXIT_STATE,
  VC_FLUSH_ACK,
  VC_FLUSH_REQ,
  VC_IRQ,
  VC_IRQ_DUE_F64,
  VC_MODE,
  VC_STALL_BUCKETS,
  VC_STALL_HIST,
  VC_STALL_MAX_F64,
  VC_STALL_TOTAL_F64,
} = layout;
const { FRAME_FREE } = ledgerWords;
const { PAGE_SIZE } = units;

// Local copies: docs/performance.md § Constants.
const {
  CM_EPOCH,
  CM_EPOCH_SHIFT,
  CM_FRAME,
  CM_GENERATION,
  CM_GFN,
  CM_LARGE,
  CM_TAG,
  CM_WRITE,
  COMBINED_ENTRIES,
  COMBINED_WORDS,
  EPOCH_SHIFT,
  HUGE_TLB_ENTRIES,
  TLB_BASE,
  TLB_CHECKED,
  TLB_COMBINED_BASE,
  TLB_EPOCH,
  TLB_GIGA_TABLE,
  TLB_HUGE_BASE,
  TLB_HUGE_TABLE,
} = tlbLayout;

/** Exit reasons in the mailbox. */
export const EXIT_EPT_VIOLATION = 1;
export const EXIT_MMIO_READ = 2;
export const EXIT_MMIO_WRITE = 3;

/** The host's answer. */
export const RESULT_RETRY = 0;
/** The access was not to RAM: a read's data is in the mailbox, a write was taken or dropped. */
export const RESULT_EMULATED = 1;
/** The host has no frame for this VM: it is dead. */
export const RESULT_KILLED = 2;

/** Single accesses in one section. */
const SECTION_ACCESSES = 64;
/** The same in a controlled run: long enough that an access without a check occurs, short enough that checks do. */
const CONTROLLED_SECTION = 3;
const MAX_CACHED_GFN: number = 1 << EPOCH_SHIFT;
/** Epochs stay positive, so that no tag is −1, which marks an empty entry. */
const MAX_EPOCH = 0xff;
const ZERO_PAGE = new Uint8Array(PAGE_SIZE);

/** Histogram bucket of a stall: log₂ in quarter steps from 256 ns, without a logarithm. */
function stallBucket(ns: number): number {
  const n = ns < 0x7fff_ffff ? ns | 0 : 0x7fff_ffff;
  if (n < 256) return 0;
  const exponent = 31 - Math.clz32(n);
  const bucket = 4 * (exponent - 8) + ((n >> (exponent - 2)) & 3);
  return bucket < VC_STALL_BUCKETS ? bucket : VC_STALL_BUCKETS - 1;
}

/** The host could not back this VM's memory: its vCPUs stop. */
export class VmKilled extends Error {
  readonly vm: number;
  constructor(vm: number) {
    super(`VM ${vm}: the host has no frame left`);
    this.name = 'VmKilled';
    this.vm = vm;
  }
}

export interface VcpuOptions {
  readonly vm: number;
  readonly id: number;
  readonly memory: HostMemory;
  readonly ledger: FrameLedger;
  readonly violations: ViolationLog;
  /** All control blocks of the run; this vCPU's is number `block`. */
  readonly control: SharedArrayBuffer;
  readonly block: number;
  readonly runControl: Int32Array;
  readonly port: ExitPort;
  readonly schedule?: Schedule;
  readonly costs?: CostTable;
  /** log₂ of TLB entries; 15 by default. */
  readonly tlbBits?: number;
  /** Where to keep the TLB (`tlbBytes`), so that a checker can look into it; private memory by default. */
  readonly tlb?: SharedArrayBuffer;
}

/** Counters of one vCPU, private to its worker. */
export interface VcpuCounters {
  violations: number;
  tlbMisses: number;
  flushes: number;
  exits: number;
  unmappedAccesses: number;
}

export class Vcpu implements GuestMemory {
  readonly vm: number;
  readonly id: number;
  readonly counters: VcpuCounters = {
    violations: 0,
    tlbMisses: 0,
    flushes: 0,
    exits: 0,
    unmappedAccesses: 0,
  };
  readonly port: ExitPort;
  readonly schedule: Schedule;
  readonly costs: CostTable;

  /** The last window (see `GuestMemory`). */
  u8: Uint8Array;
  u16: Uint16Array;
  i32: Int32Array;
  at = 0;
  section = 0;
  /** Virtual nanoseconds; this vCPU's own clock. */
  clock = 0;

  readonly #memory: HostMemory;
  readonly #dram: Int32Array;
  readonly #ledger: FrameLedger;
  readonly #generation: Int32Array;
  readonly #log: ViolationLog;
  readonly #control: Int32Array;
  readonly #controlF64: Float64Array;
  readonly #base: number;
  readonly #baseF64: number;
  readonly #runControl: Int32Array;
  readonly #tlb: Int32Array;
  readonly #mask: number;
  readonly #hugeTlb: Int32Array;
  readonly #combined: Int32Array;
  /** The kept TLB's words that are not entries; null when nobody looks. */
  readonly #kept: Int32Array | null = null;
  /** The last page loaded from and stored to: gfn (−1: none), its first word in DRAM, gate and generation held. */
  #loadPage = -1;
  #loadBase = 0;
  #loadGate = 0;
  #loadGeneration = 0;
  #storePage = -1;
  #storeBase = 0;
  #storeGate = 0;
  #storeGeneration = 0;
  /** What the last lookup found: the gate that the access passed, and the generation held for it. */
  #gate = 0;
  #held = 0;
  /** One page on its way. */
  readonly #page: Uint8Array = new Uint8Array(PAGE_SIZE);
  /** DRAM words of a scatter or gather, for one section, and which of them have no memory behind them. */
  readonly #targets: Int32Array = new Int32Array(SECTION_ACCESSES);
  readonly #absent = new Uint8Array(SECTION_ACCESSES);
  readonly #walk = new WalkResult();
  /** Epoch in tag position; entries of older epochs never match. */
  #epoch = 0;
  #epochNumber = 0;
  readonly #controlled: boolean;
  #seen = 0;
  /**
   * Paging-structure cache: the tables of the last gigabyte and of the last 2 MiB walked. Dropped with the TLB, since table
   * frames obey the same invalidation.
   */
  #pwcGiga = -1;
  #pwcGigaTable = 0;
  #pwcHuge = -1;
  #pwcHugeTable = 0;
  #left = 0;
  /** Set by an emulated read. */
  exitData = 0;

  constructor(options: VcpuOptions) {
    this.vm = options.vm;
    this.id = options.id;
    this.port = options.port;
    this.schedule = options.schedule ?? freeSchedule;
    this.#controlled = this.schedule.controlled;
    this.costs = options.costs ?? COST_TABLE;
    this.#memory = options.memory;
    this.#dram = options.memory.i32;
    this.#ledger = options.ledger;
    this.#generation = options.ledger.generation;
    this.#log = options.violations;
    this.#control = sharedI32('vcpu-control', options.control);
    this.#controlF64 = sharedF64('vcpu-control', options.control);
    this.#base = options.block * VCPU_BLOCK_WORDS;
    this.#baseF64 = (options.block * VCPU_BLOCK_BYTES) / 8;
    this.#runControl = options.runControl;
    const bits = options.tlbBits ?? 15;
    if (options.tlb === undefined) {
      this.#tlb = new Int32Array(4 << bits).fill(-1);
      this.#hugeTlb = new Int32Array(4 * HUGE_TLB_ENTRIES).fill(-1);
      this.#combined = new Int32Array(COMBINED_WORDS * COMBINED_ENTRIES).fill(-1);
    } else {
      this.#kept = new Int32Array(options.tlb, 0, TLB_HUGE_BASE)
        .fill(0)
        .fill(-1, TLB_GIGA_TABLE, TLB_HUGE_TABLE + 1);
      this.#hugeTlb = new Int32Array(options.tlb, TLB_HUGE_BASE * 4, 4 * HUGE_TLB_ENTRIES).fill(-1);
      this.#combined = new Int32Array(
        options.tlb,
        TLB_COMBINED_BASE * 4,
        COMBINED_WORDS * COMBINED_ENTRIES,
      ).fill(-1);
      this.#tlb = new Int32Array(options.tlb, TLB_BASE * 4, 4 << bits).fill(-1);
    }
    this.#mask = (1 << bits) - 1;
    this.u8 = this.#memory.u8[0];
    this.u16 = this.#memory.u16[0];
    this.i32 = this.#memory.i32Chunks[0];
  }

  // ── Guest mode and sections ──────────────────────────────────────────────────────────────────────────────────────

  /** Enters guest mode: store the mode, *then* load the requests. Pairs with request-then-load-mode in the flusher. */
  enterGuest(): void {
    if (this.#kept !== null) this.#kept[TLB_CHECKED] = 0;
    Atomics.store(this.#control, this.#base + VC_MODE, MODE_GUEST);
    this.section++;
    this.beginSection();
  }

  /** Leaves guest mode. The TLB stays; a request made meanwhile is kept and answered on the next entry. */
  leaveGuest(): void {
    this.#outside();
    nudgeSleepingHost(this.#runControl);
  }

  #outside(): void {
    this.#left = 0;
    this.section++;
    this.#controlF64[this.#baseF64 + VC_CLOCK_F64] = this.clock;
    if (this.#kept !== null) this.#kept[TLB_CHECKED] = 0;
    Atomics.store(this.#control, this.#base + VC_MODE, MODE_OUTSIDE);
  }

  /** Begins a section. Called before accesses, and by every guest spin or wait loop. */
  beginSection(): void {
    if (this.#controlled) this.schedule.point('section', this.id);
    this.#left = (this.#controlled ? CONTROLLED_SECTION : SECTION_ACCESSES) - 1;
    const request = Atomics.load(this.#control, this.#base + VC_FLUSH_REQ);
    if (request !== this.#seen) this.#flush(request);
    if (this.#controlled && this.#kept !== null) this.#kept[TLB_CHECKED] = 1;
  }

  /** Drops every translation, then acknowledges. The order is the promise: nothing old is used after the store. */
  #flush(request: number): void {
    this.#epochNumber++;
    this.#loadPage = -1;
    this.#storePage = -1;
    this.#pwcGiga = -1;
    this.#pwcHuge = -1;
    if (this.#epochNumber === MAX_EPOCH) {
      this.#tlb.fill(-1);
      this.#hugeTlb.fill(-1);
      this.#combined.fill(-1);
      this.#epochNumber = 0;
    }
    this.#epoch = this.#epochNumber << EPOCH_SHIFT;
    this.#keep();
    this.#seen = request;
    this.section++;
    this.counters.flushes++;
    this.schedule.point('flush-ack', this.id);
    // Pairs with the load in the host's wait for acknowledgements.
    Atomics.store(this.#control, this.#base + VC_FLUSH_ACK, request);
    nudgeSleepingHost(this.#runControl);
    this.stall(this.costs.flushPerVcpuNs);
  }

  /** Shows a checker what the arrays of the TLB do not. */
  #keep(): void {
    const kept = this.#kept;
    if (kept === null) return;
    kept[TLB_EPOCH] = this.#epochNumber;
    kept[TLB_GIGA_TABLE] = this.#pwcGiga < 0 ? -1 : this.#pwcGigaTable;
    kept[TLB_GIGA_TABLE + 1] = this.#generation[this.#pwcGigaTable];
    kept[TLB_HUGE_TABLE] = this.#pwcHuge < 0 ? -1 : this.#pwcHugeTable;
    kept[TLB_HUGE_TABLE + 1] = this.#generation[this.#pwcHugeTable];
  }

  /** Charges time in which this vCPU could not run: violations, flushes, requests it waits for. */
  stall(ns: number): void {
    if (ns <= 0) return;
    this.clock += ns;
    const f64 = this.#controlF64;
    const at = this.#baseF64;
    f64[at + VC_STALL_TOTAL_F64] += ns;
    if (ns > f64[at + VC_STALL_MAX_F64]) f64[at + VC_STALL_MAX_F64] = ns;
    this.#control[this.#base + VC_STALL_HIST + stallBucket(ns)]++;
  }

  // ── Single accesses ──────────────────────────────────────────────────────────────────────────────────────────────

  /** Loads word `word` (0 … 1023) of page `gfn`. */
  load32(gfn: Gfn, word: number): number {
    const left = this.#left;
    if (left > 0 && gfn === this.#loadPage) {
      this.#left = (left - 1) | 0;
      if (this.#generation[this.#loadGate] !== this.#loadGeneration) this.#staleWord(gfn, false);
      return this.#dram[(this.#loadBase + word) | 0];
    }
    return this.#load32Slow(gfn, word);
  }

  /** Stores word `word` of page `gfn`. A store to a hole is dropped and counted. */
  store32(gfn: Gfn, word: number, value: number): void {
    const left = this.#left;
    if (left > 0 && gfn === this.#storePage) {
      this.#left = (left - 1) | 0;
      if (this.#generation[this.#storeGate] !== this.#storeGeneration) this.#staleWord(gfn, true);
      this.#dram[(this.#storeBase + word) | 0] = value;
      return;
    }
    this.#store32Slow(gfn, word, value);
  }

  #load32Slow(gfn: Gfn, word: number): number {
    const frame = this.#single(gfn, false);
    if (frame < 0) {
      this.counters.unmappedAccesses++;
      return this.exitData;
    }
    this.#loadPage = this.#controlled ? -1 : gfn;
    this.#loadBase = frame << 10;
    this.#loadGate = this.#gate;
    this.#loadGeneration = this.#held;
    return this.#dram[(frame << 10) + word];
  }

  #store32Slow(gfn: Gfn, word: number, value: number): void {
    const frame = this.#single(gfn, true);
    if (frame < 0) {
      this.counters.unmappedAccesses++;
      return;
    }
    this.#storePage = this.#controlled ? -1 : gfn;
    this.#storeBase = frame << 10;
    this.#storeGate = this.#gate;
    this.#storeGeneration = this.#held;
    this.#dram[(frame << 10) + word] = value;
  }

  /** Translates for one access, in the section that runs if it has accesses left. */
  #single(gfn: Gfn, write: boolean): number {
    if (--this.#left < 0) this.beginSection();
    const frame = this.#lookup(gfn, write);
    return frame >= 0 ? frame : this.#translate(gfn, write);
  }

  /**
   * Stores `values[i]` at guest word `words[i]` (guest-physical address ÷ 4; the first 8 GiB), for `count` words from
   * `from`. A section per 64 words: all are translated, then all are stored, so that cache misses overlap. Returns the
   * words that were not RAM.
   */
  scatter32(words: Int32Array, values: Int32Array, from: number, count: number): number {
    const targets = this.#targets;
    let missing = 0;
    for (let at = from; at < from + count; at += SECTION_ACCESSES) {
      const n = Math.min(SECTION_ACCESSES, from + count - at);
      missing += this.#locate(words, at, n, true);
      const dram = this.#dram;
      for (let i = 0; i < n; i++) {
        const target = targets[i];
        if (target >= 0) dram[target] = values[at + i];
      }
    }
    return missing;
  }

  /** Loads guest words `words[i]` into `out[i]`, as `scatter32` stores them; a word that is not RAM leaves `out` alone. */
  gather32(words: Int32Array, out: Int32Array, from: number, count: number): number {
    const targets = this.#targets;
    let missing = 0;
    for (let at = from; at < from + count; at += SECTION_ACCESSES) {
      const n = Math.min(SECTION_ACCESSES, from + count - at);
      missing += this.#locate(words, at, n, false);
      const dram = this.#dram;
      for (let i = 0; i < n; i++) {
        const target = targets[i];
        if (target >= 0) out[at + i] = dram[target];
      }
    }
    return missing;
  }

  /**
   * Begins a section and translates `n` (≤ 64) words into `#targets`, −1 where there is no RAM. A miss may exit, which ends
   * the section: then all are translated again.
   */
  #locate(words: Int32Array, from: number, n: number, write: boolean): number {
    // What was not RAM is not looked at again: that exits each time, and the search would not end.
    let absent = false;
    for (;;) {
      this.beginSection();
      const { section } = this;
      const targets = this.#targets;
      const huge = this.#hugeTlb;
      const generation = this.#generation;
      const epoch = this.#epoch;
      const frames = this.#memory.frames;
      const tag = write ? 1 : 0;
      const slow = this.#controlled;
      let missing = 0;
      for (let i = 0; i < n; i++) {
        const word = words[from + i];
        const block = word >>> 19;
        const slot = (block & (HUGE_TLB_ENTRIES - 1)) << 2;
        const frame = huge[slot + 2] + ((word >>> 10) & 511);
        if (
          huge[slot + tag] === (block | epoch) &&
          generation[frames + (frame >>> 9)] === huge[slot + 3] &&
          !slow
        ) {
          targets[i] = (frame << 10) + (word & 1023);
          continue;
        }
        const target = absent && this.#absent[i] !== 0 ? -1 : this.#locateSlow(word, write);
        targets[i] = target;
        if (target >= 0) continue;
        missing++;
        if (!absent) this.#absent.fill(0);
        absent = true;
        this.#absent[i] = 1;
      }
      if (this.section === section) return missing;
    }
  }

  #locateSlow(word: number, write: boolean): number {
    const page = toGfn(word >>> 10);
    const found = this.#lookup(page, write);
    const frame = found >= 0 ? found : this.#translate(page, write);
    return frame < 0 ? -1 : (frame << 10) + (word & 1023);
  }

  // ── Combined mappings ────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Frame of the combined mapping in `slot` for one access, in the section that runs if it has accesses left; −1 if there
   * is none with this tag, from before a flush, or for loads only. Valid in this section only.
   */
  combinedFrame(slot: number, tag: number, write: boolean): number {
    if (--this.#left < 0) this.beginSection();
    const combined = this.#combined;
    const at = slot * COMBINED_WORDS;
    const bits = combined[at + CM_EPOCH];
    if (combined[at + CM_TAG] !== tag || bits >> CM_EPOCH_SHIFT !== this.#epochNumber) return -1;
    if (write && (bits & CM_WRITE) === 0) return -1;
    const frame = combined[at + CM_FRAME];
    const gate = (bits & CM_LARGE) === 0 ? frame : this.#memory.frames + (frame >>> 9);
    return this.#pass(combined[at + CM_GFN], frame, gate, combined[at + CM_GENERATION]);
  }

  /**
   * Begins a section, translates the page `gfn` that the guest's tables give, and keeps the whole way as combined mapping;
   * −1 if it is not RAM. Valid in this section only.
   */
  combine(slot: number, tag: number, gfn: Gfn, write: boolean): number {
    const frame = this.runFrame(gfn, write);
    if (frame < 0) return -1;
    const combined = this.#combined;
    const at = slot * COMBINED_WORDS;
    combined[at + CM_TAG] = tag;
    combined[at + CM_FRAME] = frame;
    combined[at + CM_GENERATION] = this.#held;
    // Only a store has shown that both leaves are writable and both D bits set.
    const large = this.#gate === frame ? 0 : CM_LARGE;
    combined[at + CM_EPOCH] = (this.#epochNumber << CM_EPOCH_SHIFT) | large | (write ? CM_WRITE : 0);
    combined[at + CM_GFN] = gfn;
    return frame;
  }

  /** Drops every combined mapping: the guest's own invalidation (CR3, an IPI that asks for it). */
  dropCombined(): void {
    this.#combined.fill(-1);
  }

  /** Loads and stores a word of a frame that this section has translated. */
  loadFrame(frame: number, word: number): number {
    return this.#dram[(frame << 10) + word];
  }
  storeFrame(frame: number, word: number, value: number): void {
    this.#dram[(frame << 10) + word] = value;
  }

  // ── Windows and page runs ────────────────────────────────────────────────────────────────────────────────────────

  window(gpa: number, length: number, write: boolean): boolean {
    const page = Math.floor(gpa * (1 / PAGE_SIZE));
    const offset = gpa - page * PAGE_SIZE;
    if (offset + length > PAGE_SIZE || page < 0 || page > 0x7fff_ffff) return false;
    const frame = this.runFrame(toGfn(page), write);
    if (frame < 0) return false;
    const chunk = frame >>> CHUNK_FRAME_SHIFT;
    this.u8 = this.#memory.u8[chunk];
    this.u16 = this.#memory.u16[chunk];
    this.i32 = this.#memory.i32Chunks[chunk];
    this.at = chunkOffset(frame) + offset;
    return true;
  }

  /** Zeroes `count` pages from `first`; one section and one gate per page. Returns pages that were not RAM. */
  zeroPages(first: Gfn, count: number): number {
    let missing = 0;
    const u8 = this.#memory.u8;
    for (let i = 0; i < count; i++) {
      const frame = this.runFrame(toGfn(first + i), true);
      if (frame < 0) missing++;
      else if (this.#controlled) {
        // Seen by whoever looks for races.
        u8[frame >>> CHUNK_FRAME_SHIFT].set(ZERO_PAGE, chunkOffset(frame));
      } else this.#memory.zeroFrames(frame as Hfn, 1);
    }
    this.clock += count * this.costs.guestZeroPageNs;
    return missing;
  }

  /** Copies a page, by way of a buffer: the two are never translated in one section. False: one of them is not RAM. */
  copyPage(from: Gfn, to: Gfn): boolean {
    if (!this.window(from * PAGE_SIZE, PAGE_SIZE, false)) return false;
    this.#page.set(this.u8.subarray(this.at, this.at + PAGE_SIZE));
    if (!this.window(to * PAGE_SIZE, PAGE_SIZE, true)) return false;
    this.u8.set(this.#page, this.at);
    return true;
  }

  /** Begins a section and translates one page for a bulk operation; −1 if it is not RAM. Valid in this section only. */
  runFrame(gfn: Gfn, write: boolean): number {
    this.beginSection();
    const frame = this.#lookup(gfn, write);
    return frame >= 0 ? frame : this.#translate(gfn, write);
  }

  /** Frame of `gfn` from the TLB, past the gate; −1 on a miss. Leaves gate and generation in `#gate` and `#held`. */
  #lookup(gfn: Gfn, write: boolean): number {
    const tag = write ? 1 : 0;
    const huge = this.#hugeTlb;
    let slot = ((gfn >>> 9) & (HUGE_TLB_ENTRIES - 1)) << 2;
    if (huge[slot + tag] === ((gfn >>> 9) | this.#epoch) && gfn < MAX_CACHED_GFN) {
      const frame = huge[slot + 2] + (gfn & 511);
      return this.#pass(gfn, frame, this.#memory.frames + (frame >>> 9), huge[slot + 3]);
    }
    const tlb = this.#tlb;
    slot = (gfn & this.#mask) << 2;
    if (tlb[slot + tag] === (gfn | this.#epoch) && gfn < MAX_CACHED_GFN) {
      const frame = tlb[slot + 2];
      return this.#pass(gfn, frame, frame, tlb[slot + 3]);
    }
    return -1;
  }

  /** The gate: the generation held for the translation must still be the ledger's. */
  #pass(gfn: number, frame: number, gate: number, held: number): number {
    if (this.#generation[gate] !== held) this.#stale(gfn, frame, gate, held);
    this.#gate = gate;
    this.#held = held;
    if (this.#controlled) this.schedule.point('translated', frame);
    return frame;
  }

  /** TLB miss: walks, sets A (and D), fills, or exits with a violation and tries again. −1: the host emulated it. */
  #translate(gfn: Gfn, write: boolean): number {
    const walk = this.#walk;
    const dram = this.#dram;
    const need = write ? EPT_R | EPT_W : EPT_R;
    const set = write ? EPT_A | EPT_D : EPT_A;
    this.counters.tlbMisses++;
    for (;;) {
      walk.level1Table = 0;
      if (this.#pwcHuge === gfn >>> 9) eptWalk(dram, this.#pwcHugeTable as Hfn, gfn, walk, 1);
      else {
        if (this.#pwcGiga === gfn >>> 18) eptWalk(dram, this.#pwcGigaTable as Hfn, gfn, walk, 2);
        else {
          walk.level2Table = 0;
          eptWalk(dram, this.#control[this.#base + VC_EPT_ROOT] as Hfn, gfn, walk);
          this.#pwcGiga = walk.level2Table > 0 ? gfn >>> 18 : -1;
          this.#pwcGigaTable = walk.level2Table;
        }
        this.#pwcHuge = walk.level1Table > 0 ? gfn >>> 9 : -1;
        this.#pwcHugeTable = walk.level1Table;
        this.#keep();
      }
      if (!walk.present || (walk.low & need) !== need) {
        this.counters.violations++;
        const result = this.exit(EXIT_EPT_VIOLATION, gfn * PAGE_SIZE, write ? 1 : 0, 0);
        if (result === RESULT_EMULATED) return -1;
        continue;
      }
      // A and D by compare-exchange on the entry walked: a blind `or` could revive an entry zapped meanwhile.
      if (
        (walk.low & set) !== set &&
        Atomics.compareExchange(dram, walk.word, walk.low, walk.low | set) !== walk.low
      ) {
        continue;
      }
      return this.#fill(gfn, walk, write);
    }
  }

  /** Puts what the walk found into the TLB. */
  #fill(gfn: Gfn, walk: WalkResult, write: boolean): number {
    const { frame } = walk;
    const large = walk.level > 1;
    const gate = large ? this.#memory.frames + (frame >>> 9) : frame;
    const generation = this.#generation[gate];
    if (gfn < MAX_CACHED_GFN) {
      const table = large ? this.#hugeTlb : this.#tlb;
      const slot = large ? ((gfn >>> 9) & (HUGE_TLB_ENTRIES - 1)) << 2 : (gfn & this.#mask) << 2;
      const tag = (large ? gfn >>> 9 : gfn) | this.#epoch;
      table[slot] = tag;
      table[slot + 1] = write || (walk.low & (EPT_W | EPT_D)) === (EPT_W | EPT_D) ? tag : -1;
      table[slot + 2] = large ? frame - (gfn & 511) : frame;
      table[slot + 3] = generation;
    }
    if (this.#ledger.state[frame] === FRAME_FREE) this.#stale(gfn, frame, gate, generation);
    this.#gate = gate;
    this.#held = generation;
    if (this.#controlled) this.schedule.point('translated', frame);
    return frame;
  }

  #staleWord(gfn: Gfn, write: boolean): void {
    if (write) this.#stale(gfn, this.#storeBase >>> 10, this.#storeGate, this.#storeGeneration);
    else this.#stale(gfn, this.#loadBase >>> 10, this.#loadGate, this.#loadGeneration);
  }

  #stale(gfn: number, frame: number, gate: number, held: number): void {
    const ledger = this.#ledger;
    const found = ledger.generation[gate];
    this.#log.record({
      kind: found === held ? 'use-after-free' : 'stale-tlb',
      actor: 'vcpu',
      vm: this.vm,
      vcpu: this.id,
      gfn,
      hfn: frame,
      expected: held,
      found,
      owner: ledger.owner[frame],
      stepTaken: ledger.stepTaken[frame],
      stepReleased: ledger.stepReleased[frame],
    });
  }

  /** Reports a guest-side violation (page shadow, stamps) seen by this vCPU. */
  report(
    kind: 'reported-reuse' | 'guest-page-state' | 'stamp',
    pfn: number,
    expected: number,
    found: number,
  ): void {
    this.#log.record({
      kind,
      actor: 'vcpu',
      vm: this.vm,
      vcpu: this.id,
      gfn: pfn,
      hfn: -1,
      expected,
      found,
      owner: 0,
      stepTaken: 0,
      stepReleased: 0,
    });
  }

  /**
   * A hostile or broken vCPU's access: writes through whatever the TLB holds for `gfn` without a section check. Only for
   * tests of the ledger and for museum scenarios. Returns the frame hit, or −1 when the TLB holds nothing.
   */
  storeIgnoringFlush(gfn: Gfn, word: number, value: number): number {
    const any = MAX_CACHED_GFN - 1;
    const small = (gfn & this.#mask) << 2;
    const large = ((gfn >>> 9) & (HUGE_TLB_ENTRIES - 1)) << 2;
    let frame = -1;
    if (this.#hugeTlb[large] >= 0 && (this.#hugeTlb[large] & any) === gfn >>> 9) {
      frame = this.#hugeTlb[large + 2] + (gfn & 511);
      this.#pass(gfn, frame, this.#memory.frames + (frame >>> 9), this.#hugeTlb[large + 3]);
    } else if (this.#tlb[small] >= 0 && (this.#tlb[small] & any) === gfn) {
      frame = this.#tlb[small + 2];
      this.#pass(gfn, frame, frame, this.#tlb[small + 3]);
    }
    if (frame >= 0) this.#dram[(frame << 10) + word] = value;
    return frame;
  }

  // ── Exits and interrupts ─────────────────────────────────────────────────────────────────────────────────────────

  /** Reads a device register. */
  mmioRead(gpa: number, size: number): number {
    this.exit(EXIT_MMIO_READ, gpa, size, 0);
    return this.exitData;
  }

  /** Writes a device register; a write to QueueNotify is a kick. */
  mmioWrite(gpa: number, size: number, value: number): void {
    this.exit(EXIT_MMIO_WRITE, gpa, size, value);
  }

  /**
   * Exits to the host and waits for its answer, outside guest mode. Charges the cost the host gives as a stall.
   * Throws `VmKilled` when the host cannot back this VM any more.
   */
  exit(reason: number, address: number, size: number, data: number): number {
    const control = this.#control;
    const base = this.#base;
    if (this.#controlled) this.schedule.point('exit', reason);
    this.counters.exits++;
    control[base + VC_EXIT_REASON] = reason;
    control[base + VC_EXIT_SIZE] = size;
    control[base + VC_EXIT_DATA] = data;
    this.#controlF64[this.#baseF64 + VC_EXIT_ADDR_F64] = address;
    this.#outside();
    // Publishes the request; pairs with the host's load when it scans the mailboxes. The port tells a sleeping host.
    Atomics.store(control, base + VC_EXIT_STATE, EXIT_REQUEST);
    this.port.call(control, base);
    const result = control[base + VC_EXIT_RESULT];
    this.exitData = control[base + VC_EXIT_RDATA];
    if (result === RESULT_KILLED) throw new VmKilled(this.vm);
    this.enterGuest();
    this.stall(this.#controlF64[this.#baseF64 + VC_EXIT_COST_F64]);
    return result;
  }

  /** Takes all pending interrupt lines. Pairs with the host's `or`. */
  takeInterrupts(): number {
    const control = this.#control;
    const at = this.#base + VC_IRQ;
    if (Atomics.load(control, at) === 0) return 0;
    return Atomics.exchange(control, at, 0);
  }

  /** Drops line `line` and returns the lines still pending: call before looking at the device's ring. */
  clearInterrupt(line: number): number {
    return Atomics.and(this.#control, this.#base + VC_IRQ, ~(1 << line)) & ~(1 << line);
  }

  /** Halts outside guest mode until an interrupt changes the pending lines from `seen`. Bounded: look again after. */
  halt(seen: number): void {
    this.schedule.point('device-wait', this.id);
    this.leaveGuest();
    this.port.halt(this.#control, this.#base + VC_IRQ, seen);
    this.enterGuest();
  }

  /** Virtual time at which the newest completion of the device on `line` is due; kept in vCPU 0's block. */
  completionDue(line: number): number {
    return this.#controlF64[this.#baseF64 - (this.id * VCPU_BLOCK_BYTES) / 8 + VC_IRQ_DUE_F64 + line];
  }
}
