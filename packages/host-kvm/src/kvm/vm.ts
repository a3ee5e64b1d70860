/**
 * One virtual machine as KVM knows it: slots, MMU, exits, faults, invalidation.
 *
 * **Invalidation** (DESIGN § 2): under the MMU lock, count it in progress, record the range, exchange the entries; set
 * the flush request of *every* vCPU and wait for those in guest mode; only then drop the lock. The file detaches the
 * blocks, `end` moves the sequence, and the frames go back. A fault samples the sequence before it resolves and retries
 * if the range is in progress or the sequence moved. Counterpart: `kvm_mmu_invalidate_begin/end`, `mmu_invalidate_retry`.
 */
import * as machineWords from '@ebb/machine';
import {
  assert,
  err,
  hfn,
  ok,
  ownerOf,
  type CostTable,
  type Result,
  type Schedule,
  type ViolationLog,
} from '@ebb/machine';
import type { InvalidationListener, MemFile } from '@ebb/memfs';
import { PARK, HostTasks, TaskLock, type HostTask, type TaskBody, type TaskYield } from '../host-tasks.ts';
import type { FramePool } from '../mm/frame-pool.ts';
import * as memslots from './memslots.ts';
import { Memslots, type Memslot, type SlotError, type UserMemoryRegion } from './memslots.ts';
import { gateOf, type RegionGate } from './region-gate.ts';
import * as tdpMmu from './tdp-mmu.ts';
import { TdpMmu } from './tdp-mmu.ts';
import { VcpuBlocks } from './vcpu-blocks.ts';
import { VmMemory } from './vm-memory.ts';

// Local copies: docs/performance.md § Constants.
const {
  COST_TABLE,
  EPT_A,
  EPT_D,
  EXIT_EPT_VIOLATION,
  EXIT_MMIO_READ,
  EXIT_MMIO_WRITE,
  GIGA_PAGES,
  HUGE_PAGES,
  PAGE_SIZE,
  RESULT_EMULATED,
  RESULT_KILLED,
  RESULT_RETRY,
  USE_VMM,
} = machineWords;
const { KVM_MEM_READONLY } = memslots;
const { FRAME_DIRTY } = tdpMmu;

/** A device's registers in guest-physical space. */
export interface MmioRegion {
  readonly base: number;
  readonly bytes: number;
  read(offset: number, width: number): number;
  write(offset: number, width: number, value: number): void;
  /** Whether the vCPU that writes this is to be held until it may; asked again until it may. */
  mustWait?(offset: number, width: number, value: number): boolean;
}

export interface VmOptions {
  readonly id: number;
  readonly nrVcpus: number;
  /** Control blocks of the run and the number of this VM's first. */
  readonly control: SharedArrayBuffer;
  readonly firstBlock: number;
  readonly pool: FramePool;
  readonly tasks: HostTasks;
  readonly violations: ViolationLog;
  readonly schedule: Schedule;
  readonly tableLive: Int32Array;
  readonly costs?: CostTable;
}

export interface VmCounters {
  eptViolations: number;
  faultRetries: number;
  tlbFlushes: number;
  flushWaits: number;
  mmioExits: number;
  unclaimedMmio: number;
  returnedBytes: number;
  discardRequests: number;
}

export class Vm implements InvalidationListener {
  readonly id: number;
  readonly slots: Memslots = new Memslots();
  readonly mmu: TdpMmu;
  readonly memory: VmMemory;
  readonly costs: CostTable;
  readonly counters: VmCounters = {
    eptViolations: 0,
    faultRetries: 0,
    tlbFlushes: 0,
    flushWaits: 0,
    mmioExits: 0,
    unclaimedMmio: 0,
    returnedBytes: 0,
    discardRequests: 0,
  };
  /** Set when the host had no frame for it; its vCPUs stop at their next exit. */
  killed = false;
  /** Virtual time of the newest register write: when a device was kicked. */
  kickTime = 0;
  readonly vcpus: VcpuBlocks;
  readonly #pool: FramePool;
  readonly #tasks: HostTasks;
  readonly #schedule: Schedule;
  readonly #exitTasks: HostTask[] = [];
  readonly #regions: MmioRegion[] = [];
  readonly #gates: RegionGate[] = [];
  /** Frame of zeros that reads of unplugged memory map; −1 until the first. */
  #zeroFrame = -1;
  /** Slots change one request at a time (`slots_lock`). Order: taken inside no other lock. */
  readonly #slotsLock = new TaskLock('slots');
  /** Guards the EPT and the four fields below. Order: after the slots lock, inside no other. */
  readonly #mmuLock = new TaskLock('mmu');
  #inProgress = 0;
  #sequence = 0;
  #rangeFrom = 0;
  #rangeTo = 0;
  /** Frames zeroed for each vCPU's fault, for its cost. */
  readonly #zeroed: number[] = [];

  constructor(options: VmOptions) {
    this.id = options.id;
    this.costs = options.costs ?? COST_TABLE;
    this.#pool = options.pool;
    this.#tasks = options.tasks;
    this.#schedule = options.schedule;
    this.vcpus = new VcpuBlocks(options.control, options.firstBlock, options.nrVcpus, options.schedule);
    this.mmu = new TdpMmu(options.id, options.pool, options.schedule, options.tableLive);
    this.memory = new VmMemory(options.id, options.pool, this.slots, options.schedule, this.#gates);
    this.vcpus.setRoot(this.mmu.root);
    for (let v = 0; v < options.nrVcpus; v++)
      this.#exitTasks.push(options.tasks.spawn(`vm${options.id}/vcpu${v}`, this.#serveExits(v)));
  }

  /** A fault that finds no slot waits for the one to come. */
  get #resizing(): boolean {
    return this.slots.replaced !== null;
  }

  addMmio(region: MmioRegion): void {
    this.#regions.push(region);
  }

  /** From now on `gate` is asked about accesses to its pages. */
  addGate(gate: RegionGate): void {
    this.#gates.push(gate);
  }

  /** Whether a 2 MiB leaf around the page reaches no further than the slot and the verdict do. */
  #mayBeHuge(slot: Memslot, gfn: number): boolean {
    return slot.file.wantsHuge && this.#mayBe(slot, gfn, HUGE_PAGES);
  }

  #mayBe(slot: Memslot, gfn: number, pages: number): boolean {
    return leafFits(slot, gfn, pages) && (gateOf(this.#gates, gfn)?.unitPages ?? pages) >= pages;
  }

  /** Level of the largest leaf that may map a page: 2 MiB or 1 GiB where slot, verdict and frames allow it. */
  #leafLevel(slot: Memslot, gfn: number): 1 | 2 | 3 {
    if (!this.#mayBeHuge(slot, gfn)) return 1;
    const block = (pages: number): number => slot.fileOffset + (gfn - (gfn & (pages - 1)) - slot.baseGfn);
    if (this.#mayBe(slot, gfn, GIGA_PAGES) && slot.file.isGiga(block(GIGA_PAGES))) return 3;
    return slot.file.isHuge(block(HUGE_PAGES)) ? 2 : 1;
  }

  // ── Exits ────────────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Scans the mailboxes and answers each vCPU that asks: at once where nothing stands in the way, else by waking its task.
   * With no other task ready a task's yields are points and nothing more, so both ways do the same.
   */
  scanExits(): boolean {
    let found = false;
    let alone = !this.#schedule.controlled && !this.#tasks.anyReady;
    for (let v = 0; v < this.vcpus.count; v++) {
      if (this.#exitTasks[v].state !== 'parked' || !this.vcpus.asks(v)) continue;
      found = true;
      if (alone && this.#serveNow(v)) alone = !this.#tasks.anyReady;
      else {
        this.#tasks.wake(this.#exitTasks[v]);
        alone = false;
      }
    }
    return found;
  }

  *#serveExits(vcpu: number): TaskBody {
    for (;;) {
      yield PARK;
      if (!this.vcpus.asks(vcpu)) continue;
      const address = this.vcpus.exitAddress(vcpu);
      if (this.killed) this.vcpus.answer(vcpu, RESULT_KILLED, 0, 0);
      else if (this.vcpus.exitReason(vcpu) === EXIT_EPT_VIOLATION)
        yield* this.#violation(vcpu, Math.floor(address / PAGE_SIZE), this.vcpus.exitSize(vcpu) !== 0);
      else {
        const region = this.#region(address);
        if (this.#mustWait(vcpu, region, address)) yield () => !this.#mustWait(vcpu, region, address);
        this.#register(vcpu, region, address);
      }
    }
  }

  /** Serves an exit without a task; false if it has to wait for something. */
  #serveNow(vcpu: number): boolean {
    if (this.killed) {
      this.vcpus.answer(vcpu, RESULT_KILLED, 0, 0);
      return true;
    }
    if (this.vcpus.exitReason(vcpu) === EXIT_EPT_VIOLATION) return this.#violationNow(vcpu);
    const address = this.vcpus.exitAddress(vcpu);
    const region = this.#region(address);
    if (this.#mustWait(vcpu, region, address)) return false;
    this.#register(vcpu, region, address);
    return true;
  }

  /** The same for an EPT violation. */
  #violationNow(vcpu: number): boolean {
    if (this.#mmuLock.held || this.#inProgress > 0 || this.#resizing) return false;
    const gfn = Math.floor(this.vcpus.exitAddress(vcpu) / PAGE_SIZE);
    const write = this.vcpus.exitSize(vcpu) !== 0;
    const slot = this.#resolve(vcpu, gfn, write);
    if (slot === null) return true;
    if (slot.invalid) return false;
    this.counters.eptViolations++;
    const frame = this.#populate(vcpu, slot, gfn, write);
    if (frame >= 0) this.#install(vcpu, slot, gfn, frame, write);
    return true;
  }

  /** Whether a register write has to wait: a device that is to be reset carries out what it has taken. */
  #mustWait(vcpu: number, region: MmioRegion | undefined, address: number): boolean {
    if (region?.mustWait === undefined || this.vcpus.exitReason(vcpu) !== EXIT_MMIO_WRITE) return false;
    return region.mustWait(address - region.base, this.vcpus.exitSize(vcpu), this.vcpus.exitData(vcpu));
  }

  /** A register access: to a device, or to nothing (all ones). */
  #register(vcpu: number, region: MmioRegion | undefined, address: number): void {
    const reason = this.vcpus.exitReason(vcpu);
    let value = 0;
    if (reason === EXIT_MMIO_READ) {
      value = region === undefined ? -1 : region.read(address - region.base, this.vcpus.exitSize(vcpu));
    } else {
      assert(reason === EXIT_MMIO_WRITE, `exit reason ${reason}`);
      this.kickTime = this.vcpus.clock(vcpu);
      region?.write(address - region.base, this.vcpus.exitSize(vcpu), this.vcpus.exitData(vcpu));
    }
    this.vcpus.answer(vcpu, RESULT_EMULATED, value, this.costs.exitNs);
    this.counters.mmioExits++;
    if (region === undefined) this.counters.unclaimedMmio++;
  }

  #region(address: number): MmioRegion | undefined {
    for (let i = 0; i < this.#regions.length; i++) {
      const region = this.#regions[i];
      if (address >= region.base && address < region.base + region.bytes) return region;
    }
    return undefined;
  }

  // ── Faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Serves one EPT violation: maps the page, or finds that it is not RAM, or that the host has no frame. */
  *#violation(vcpu: number, gfn: number, write: boolean): Generator<TaskYield, void, void> {
    this.counters.eptViolations++;
    for (;;) {
      if (this.#resizing && this.slots.find(gfn) === null) yield () => !this.#resizing;
      const sequence = this.#sequence;
      const slot = this.#resolve(vcpu, gfn, write);
      if (slot === null) return;
      if (slot.invalid) {
        // Waits for the slot's removal; polling would starve the vCPU whose flush that removal waits for.
        yield () => this.slots.find(gfn) !== slot;
        continue;
      }
      yield undefined;
      const frame = this.#populate(vcpu, slot, gfn, write);
      if (frame < 0) return;
      yield undefined;
      while (!this.#mmuLock.tryAcquire()) yield () => !this.#mmuLock.held;
      if (this.#mustRetry(gfn, sequence)) {
        this.#mmuLock.release();
        this.counters.faultRetries++;
        if (this.#inProgress > 0) yield () => this.#inProgress === 0;
        continue;
      }
      this.#install(vcpu, slot, gfn, frame, write);
      this.#mmuLock.release();
      return;
    }
  }

  /** The slot that backs `gfn`; null if an access there is not to RAM, which is answered here. */
  #resolve(vcpu: number, gfn: number, write: boolean): Memslot | null {
    const slot = this.slots.find(gfn);
    if (slot !== null && (!write || (slot.flags & KVM_MEM_READONLY) === 0)) return slot;
    this.counters.unclaimedMmio++;
    this.vcpus.answer(vcpu, RESULT_EMULATED, -1, this.costs.exitNs);
    return null;
  }

  /**
   * Frame of a page of `slot`, assigned at its first touch. −1: answered already, because the page is not to be touched
   * now, or because the host has no frame, which kills the VM. Asks the gate and assigns in one step, so that a page
   * unplugged meanwhile gets none.
   */
  #populate(vcpu: number, slot: Memslot, gfn: number, write: boolean): number {
    this.#pool.lastZeroed = 0;
    const verdict = gateOf(this.#gates, gfn)?.verdict(gfn, write, true) ?? 'memory';
    if (verdict === 'nothing') {
      this.counters.unclaimedMmio++;
      this.vcpus.answer(vcpu, RESULT_EMULATED, -1, this.costs.exitNs);
      return -1;
    }
    if (verdict === 'zeros') return this.#zeros(vcpu);
    const frame = slot.file.assign(slot.fileOffset + (gfn - slot.baseGfn), this.#mayBeHuge(slot, gfn));
    this.#zeroed[vcpu] = this.#pool.lastZeroed;
    if (frame < 0) this.#kill(vcpu);
    else if (verdict === 'scribbled') this.#scribble(frame, slot, gfn);
    return frame;
  }

  /** Fills what was just taken for page `gfn`, a frame or the 2 MiB around it, with noise. */
  #scribble(frame: number, slot: Memslot, gfn: number): void {
    const taken = this.#pool.lastZeroed;
    const first = frame - ((slot.fileOffset + gfn - slot.baseGfn) & (taken - 1));
    for (let f = first; f < first + taken; f++) {
      this.#pool.memory.poisonFrame(hfn(f), SCRIBBLE);
      // Written by the device: no D bit tells of it.
      this.mmu.frameFlags[f] |= FRAME_DIRTY;
    }
  }

  /** The frame of zeros, taken for the VMM at the first read that needs it. */
  #zeros(vcpu: number): number {
    if (this.#zeroFrame < 0) this.#zeroFrame = this.#pool.allocZeroed(0, ownerOf(this.id, USE_VMM));
    this.#zeroed[vcpu] = 0;
    if (this.#zeroFrame < 0) this.#kill(vcpu);
    return this.#zeroFrame;
  }

  /** Maps a resolved page and answers the violation. Under the MMU lock, or with nobody else to take it. */
  #install(vcpu: number, slot: Memslot, gfn: number, frame: number, write: boolean): void {
    const zeros = frame === this.#zeroFrame;
    const writable = (slot.flags & KVM_MEM_READONLY) === 0 && !zeros;
    const level = zeros ? 1 : this.#leafLevel(slot, gfn);
    const offset = level === 1 ? 0 : gfn & ((level === 2 ? HUGE_PAGES : GIGA_PAGES) - 1);
    const bits = write && writable ? EPT_A | EPT_D : EPT_A;
    if (!this.mmu.map(gfn - offset, frame - offset, level, writable, bits)) {
      this.#kill(vcpu);
      return;
    }
    const { exitNs, faultNs, hostZeroPageNs } = this.costs;
    this.vcpus.answer(vcpu, RESULT_RETRY, 0, exitNs + faultNs + this.#zeroed[vcpu] * hostZeroPageNs);
  }

  /**
   * Maps what backs pages of RAM before a vCPU touches them (`KVM_PRE_FAULT_MEMORY`), by 4 KiB leaves. While no vCPU runs.
   * False: the host has no frame.
   */
  preFault(gfn: number, count: number): boolean {
    for (let page = gfn; page < gfn + count; page++) {
      const slot = this.slots.find(page);
      if (slot === null) continue;
      const frame = slot.file.assign(slot.fileOffset + (page - slot.baseGfn), false);
      const writable = (slot.flags & KVM_MEM_READONLY) === 0;
      if (frame < 0 || !this.mmu.map(page, frame, 1, writable)) return false;
    }
    return true;
  }

  #kill(vcpu: number): void {
    this.killed = true;
    this.vcpus.answer(vcpu, RESULT_KILLED, 0, 0);
  }

  /** A resolved frame may be stale: an invalidation covers it now, or one ended since the sample. Under the MMU lock. */
  #mustRetry(gfn: number, sequence: number): boolean {
    if (this.#inProgress > 0 && gfn >= this.#rangeFrom && gfn < this.#rangeTo) return true;
    return this.#sequence !== sequence;
  }

  // ── Invalidation ─────────────────────────────────────────────────────────────────────────────────────────────────

  /** Steps 1 and 2: zap under the lock, flush, wait; block runs are translated through every slot of the file. */
  *begin(runs: Int32Array, nrRuns: number): Generator<TaskYield, void, void> {
    yield* this.#mmuLock.acquire();
    this.#inProgress++;
    let zapped = 0;
    for (let r = 0; r < nrRuns; r++) zapped += this.#zapBlocks(runs[2 * r], runs[2 * r + 1]);
    yield* this.#finishZap(zapped);
    this.#mmuLock.release();
  }

  /** Step 4: the blocks are gone; faults that sampled before must look again. */
  end(_runs: Int32Array, _nrRuns: number): void {
    this.#sequence++;
    this.#inProgress--;
    if (this.#inProgress === 0) {
      this.#rangeFrom = 0;
      this.#rangeTo = 0;
    }
  }

  #zapBlocks(first: number, count: number): number {
    let zapped = 0;
    for (const slot of this.slots.all) {
      const from = Math.max(first, slot.fileOffset);
      const to = Math.min(first + count, slot.fileOffset + slot.nrPages);
      if (from >= to) continue;
      const gfn = slot.baseGfn + (from - slot.fileOffset);
      this.#coverRange(gfn, gfn + (to - from));
      zapped += this.mmu.zapRange(gfn, to - from);
    }
    return zapped;
  }

  /** Widens the range in progress; several invalidations at once share one range, as in KVM. */
  #coverRange(from: number, to: number): void {
    if (this.#rangeFrom === this.#rangeTo) {
      this.#rangeFrom = from;
      this.#rangeTo = to;
      return;
    }
    this.#rangeFrom = Math.min(this.#rangeFrom, from);
    this.#rangeTo = Math.max(this.#rangeTo, to);
  }

  /**
   * After `zapped` leaves went, under the lock, which is never dropped with a flush owed: another holder could hand out
   * what a TLB still reaches. Tables are freed when no walk can be in them.
   */
  *#finishZap(zapped: number): Generator<TaskYield, void, void> {
    if (zapped > 0 || this.mmu.detachedTables.length > 0) yield* this.#flushAll();
    this.mmu.freeDetachedTables();
  }

  /** Asks every vCPU to drop its translations and waits for those in guest mode. */
  *#flushAll(): Generator<TaskYield, void, void> {
    this.counters.tlbFlushes++;
    const want = this.vcpus.requestFlush();
    if (!this.vcpus.owesFlush(want)) return;
    this.counters.flushWaits++;
    yield () => !this.vcpus.owesFlush(want);
  }

  /**
   * Drops every mapping of the pages and waits for the flush; the blocks stay. The next access faults. `then` runs under
   * the lock, when nothing maps them any more and no fault has.
   */
  *unmap(gfn: number, count: number, then?: () => void): Generator<TaskYield, void, void> {
    yield* this.#mmuLock.acquire();
    this.#inProgress++;
    this.#coverRange(gfn, gfn + count);
    yield* this.#finishZap(this.mmu.zapRange(gfn, count));
    then?.();
    this.#mmuLock.release();
    this.end(EMPTY, 0);
  }

  // ── Slots and discards ───────────────────────────────────────────────────────────────────────────────────────────

  /** `KVM_SET_USER_MEMORY_REGION`. A delete or move marks the slot invalid, zaps and flushes, and only then removes it. */
  *setUserMemoryRegion(region: UserMemoryRegion): Generator<TaskYield, Result<void, SlotError>, void> {
    return yield* this.#oneAtATime(this.#setRegion(region));
  }

  /**
   * Gives a slot another size, which KVM has no call for: a live slot keeps its own. `qemu`: delete and create while no
   * vCPU may fault in between. `naive`: the same without holding anybody back, so that an access in between is MMIO
   * (the RFC's random crashes, H52). `extension`: one step, as a call that KVM does not have would do it (I11).
   */
  *resizeSlot(
    region: UserMemoryRegion,
    how: 'qemu' | 'naive' | 'extension',
  ): Generator<TaskYield, Result<void, SlotError>, void> {
    return yield* this.#oneAtATime(this.#resize(region, how));
  }

  /** Carries a change of slots out when the one before is: nothing is judged before that. */
  *#oneAtATime<T>(change: Generator<TaskYield, T, void>): Generator<TaskYield, T, void> {
    while (!this.#slotsLock.tryAcquire()) yield () => !this.#slotsLock.held;
    try {
      return yield* change;
    } finally {
      this.#slotsLock.release();
    }
  }

  /**
   * Waits while blocks of the file are being taken away: a slot that shows them now would map what is about to be freed.
   * KVM waits for invalidations of its own VM (`mn_active_invalidate_count`); other mappers are the kernel's to find.
   */
  *#punched(file: MemFile): Generator<TaskYield, void, void> {
    while (file.punching) yield () => !file.punching;
  }

  *#setRegion(region: UserMemoryRegion): Generator<TaskYield, Result<void, SlotError>, void> {
    const judged = this.slots.judge(region);
    if (!judged.ok) return err(judged.error);
    const { kind, slot, old } = judged.value;
    if (old !== null && kind !== 'flags') {
      this.slots.install({ ...old, invalid: true });
      yield* this.unmap(old.baseGfn, old.nrPages);
    }
    if (kind === 'delete') {
      this.slots.remove(slot.id);
      if (!this.slots.all.some((s) => s.file === slot.file)) slot.file.removeListener(this);
      return ok(undefined);
    }
    if (kind !== 'flags') yield* this.#punched(slot.file);
    if (kind === 'create') slot.file.addListener(this);
    this.slots.install(slot);
    return ok(undefined);
  }

  *#resize(
    region: UserMemoryRegion,
    how: 'qemu' | 'naive' | 'extension',
  ): Generator<TaskYield, Result<void, SlotError>, void> {
    const old = this.slots.all.find((slot) => slot.id === region.slot);
    if (old === undefined || region.memorySize === 0) return err('EINVAL');
    if (how === 'extension') return yield* this.#resizeAtOnce(region, old);
    // What cannot be created afterwards is not deleted first.
    const judged = this.slots.judge(region, true);
    if (!judged.ok) return err(judged.error);
    // The VMM’s own map, which devices go by, changes in one step.
    this.slots.replaced = how === 'qemu' ? old : null;
    let done = yield* this.#setRegion({ ...region, memorySize: 0 });
    yield undefined;
    if (done.ok) done = yield* this.#setRegion(region);
    this.slots.replaced = null;
    return done;
  }

  *#resizeAtOnce(
    region: UserMemoryRegion,
    old: Memslot,
  ): Generator<TaskYield, Result<void, SlotError>, void> {
    const nrPages = region.memorySize / PAGE_SIZE;
    const { guestPhysAddr, file, fileOffset } = region;
    if (guestPhysAddr !== old.baseGfn * PAGE_SIZE || file !== old.file || fileOffset !== old.fileOffset)
      return err('EINVAL');
    const judged = this.slots.judge(region, true);
    if (!judged.ok) return err(judged.error);
    const resize = (): void => this.slots.install({ ...old, nrPages });
    // The pages go before the slot that tells which they are: an invalidation in between must still find them.
    if (nrPages < old.nrPages) yield* this.unmap(old.baseGfn + nrPages, old.nrPages - nrPages, resize);
    else {
      yield* this.#punched(file);
      resize();
    }
    return ok(undefined);
  }

  /**
   * Gives guest pages back to the host (`MADV_DONTNEED` / punch hole): returns when every mapping is gone, flushed, and
   * the frames are free. `runs` are ascending, disjoint `[gfn, count]` pairs. What is not RAM ends a run; parts that are not
   * whole units of the backing are skipped, never rounded outward. Returns the pages freed.
   */
  *discard(runs: Int32Array, nrRuns: number): Generator<TaskYield, number, void> {
    this.counters.discardRequests++;
    const perFile = new Map<MemFile, [first: number, count: number][]>();
    for (let r = 0; r < nrRuns; r++) {
      const end = runs[2 * r] + runs[2 * r + 1];
      // A run may cross from one slot into the next.
      for (let gfn = runs[2 * r]; gfn < end; ) {
        const slot = this.slots.findForVmm(gfn);
        if (slot === null) break;
        const stop = Math.min(end, slot.baseGfn + slot.nrPages);
        const first = slot.fileOffset + (gfn - slot.baseGfn);
        const unit = slot.file.granularity;
        const from = Math.ceil(first / unit) * unit;
        const to = Math.floor((first + (stop - gfn)) / unit) * unit;
        gfn = stop;
        if (from >= to) continue;
        const list = perFile.get(slot.file) ?? [];
        list.push([from, to - from]);
        perFile.set(slot.file, list);
      }
    }
    let freed = 0;
    for (const [file, list] of perFile) {
      const blocks = ascendingRuns(list);
      const result = yield* file.punchHoles(blocks, blocks.length / 2) as Generator<
        TaskYield,
        Result<number, 'EINVAL'>,
        void
      >;
      if (result.ok) freed += result.value;
    }
    this.counters.returnedBytes += freed * PAGE_SIZE;
    return freed;
  }
}

const EMPTY = new Int32Array(0);
/** What a device of the profile `scribble` leaves in unplugged memory. */
export const SCRIBBLE = 0x5c21_bb1e;

/** Sorted, what touches or overlaps joined: slots may show a file's blocks in any order, and some of them twice. */
function ascendingRuns(runs: [first: number, count: number][]): Int32Array {
  runs.sort((a, b) => a[0] - b[0]);
  const joined: number[] = [];
  for (const [first, count] of runs) {
    const last = joined.length - 2;
    if (last >= 0 && joined[last] + joined[last + 1] >= first)
      joined[last + 1] = Math.max(joined[last + 1], first + count - joined[last]);
    else joined.push(first, count);
  }
  return Int32Array.from(joined);
}

/** Whether the aligned `pages` (2ⁿ) around `gfn` lie in the slot and are aligned alike in the file. */
function leafFits(slot: Memslot, gfn: number, pages: number): boolean {
  const base = gfn - (gfn & (pages - 1));
  return (
    base >= slot.baseGfn &&
    base + pages <= slot.baseGfn + slot.nrPages &&
    ((slot.fileOffset - slot.baseGfn) & (pages - 1)) === 0
  );
}
