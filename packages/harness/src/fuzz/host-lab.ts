/** The host's side of a lab: its tasks, a few VMs, and the audit of everything that must add up. */
import { FRAME_DIRTY, FramePool, HostTasks, Vm, type TaskBody } from '@ebb/host-kvm';
import {
  describeOwner,
  describeViolation,
  EPT_D,
  EPT_W,
  eptWalk,
  FrameLedger,
  gfn,
  hfn,
  HostMemory,
  ownerOf,
  PAGE_SIZE,
  RC_DOORBELL,
  RC_HOST_ASLEEP,
  sharedI32,
  tlbInUse,
  tlbReaches,
  USE_VMM,
  VC_FLUSH_ACK,
  VC_FLUSH_REQ,
  VCPU_BLOCK_WORDS,
  ViolationLog,
  WalkResult,
  type Hfn,
  type Schedule,
} from '@ebb/machine';
import { MemFile, type FrameOrder, type FrameSource } from '@ebb/memfs';

import { RC_DONE, type LabBuffers, type LabShape } from './lab.ts';

/** Frames that the page tables of a lab's VM take at most. */
const TABLES = 8;

export interface LabVm {
  readonly vm: Vm;
  readonly file: MemFile;
}

/** The host's side of a lab. */
export class HostLab {
  readonly tasks: HostTasks;
  readonly pool: FramePool;
  readonly log: ViolationLog;
  readonly vms: LabVm[] = [];
  readonly shape: LabShape;
  readonly model: Int32Array;
  readonly schedule: Schedule;
  readonly ledger: FrameLedger;
  readonly #memory: HostMemory;
  readonly #runControl: Int32Array;
  #running = 0;
  /** What a checker found, in words. */
  readonly found: string[] = [];
  readonly #arenas: readonly SharedArrayBuffer[];
  readonly #control: Int32Array;
  readonly #tlbs: readonly Int32Array[];

  /** `renewed`: told of frames that get another owner. */
  constructor(
    lab: LabBuffers,
    schedule: Schedule,
    renewed: (first: number, count: number) => void = () => undefined,
  ) {
    const { shape } = lab;
    this.#arenas = lab.arenas;
    this.shape = shape;
    this.schedule = schedule;
    this.model = new Int32Array(lab.model);
    this.#memory = new HostMemory(lab.dram);
    this.ledger = new FrameLedger(lab.ledger, this.#memory.frames);
    this.log = new ViolationLog(lab.violations);
    this.#runControl = sharedI32('run-control', lab.runControl);
    this.#control = new Int32Array(lab.control);
    this.#tlbs = lab.tlbs.map((tlb) => new Int32Array(tlb));
    const watch = (first: number, count: number): void => this.#mustBeOutOfReach(first, count);
    this.pool = new (class extends FramePool {
      override allocZeroed(order: FrameOrder, owner: number): number {
        const first = super.allocZeroed(order, owner);
        if (first >= 0) renewed(first, 1 << order);
        return first;
      }
      override free(first: Hfn, count: number): void {
        watch(first, count);
        super.free(first, count);
      }
    })({
      memory: this.#memory,
      ledger: this.ledger,
      violations: this.log,
      frames: this.#memory.frames,
      poison: 'full',
      schedule,
    });
    this.tasks = new HostTasks(schedule);
    const tableLive = new Int32Array(this.#memory.frames);
    for (let id = 0; id < shape.vms; id++) {
      const vm = new Vm({
        id,
        nrVcpus: shape.vcpus,
        control: lab.control,
        firstBlock: id * shape.vcpus,
        pool: this.pool,
        tasks: this.tasks,
        violations: this.log,
        schedule,
        tableLive,
      });
      const file = new MemFile({
        name: `vm${id}`,
        nrBlocks: shape.ramPages,
        vm: id,
        frames: this.#frames(id),
        huge: shape.huge,
      });
      const region = {
        slot: 0,
        flags: 0,
        guestPhysAddr: 0,
        memorySize: shape.ramPages * PAGE_SIZE,
        file,
        fileOffset: 0,
      };
      for (const set = vm.setUserMemoryRegion(region); set.next().done !== true; );
      this.vms.push({ vm, file });
    }
  }

  /** The guest kernel's arena of VM `vm`. */
  arena(vm: number): SharedArrayBuffer {
    return this.#arenas[vm];
  }

  /** Frames of files come and go through this door: zeroed (I1), and with a dirty mark if there is content in them (I18). */
  #frames(vm: number): FrameSource {
    return {
      allocZeroed: (order, owner) => {
        const first = this.pool.allocZeroed(order, owner);
        for (let f = first; first >= 0 && f < first + (1 << order); f++)
          if (this.#hasContent(f))
            this.found.push(
              `not-zeroed: frame 0x${f.toString(16)} is given to VM ${vm} with what its last owner or its time as a free frame left in it (I1)`,
            );
        return first;
      },
      free: (first: Hfn, count: number) => {
        for (let f = first as number; f < first + count; f++)
          if ((this.pool.frameFlags[f] & FRAME_DIRTY) === 0 && this.#hasContent(f)) {
            this.found.push(
              `lost-dirty: frame 0x${f.toString(16)} of VM ${vm} is given back with content that no dirty bit announced`,
            );
          }
        this.pool.free(first, count);
      },
    };
  }

  /**
   * I4 at the moment that matters: a frame loses its owner, so no TLB may reach it, but one that will be flushed before its
   * vCPU uses it again.
   */
  #mustBeOutOfReach(first: number, count: number): void {
    for (const [i, tlb] of this.#tlbs.entries()) {
      const block = i * VCPU_BLOCK_WORDS;
      // Not in use, and told to flush: it will be before it is used again.
      if (!tlbInUse(tlb) && this.#control[block + VC_FLUSH_REQ] !== this.#control[block + VC_FLUSH_ACK])
        continue;
      for (let f = first; f < first + count; f++) {
        if (this.found.length > 8 || !tlbReaches(tlb, f, this.ledger.generation, this.ledger.frames))
          continue;
        const vcpu = `${Math.floor(i / this.shape.vcpus)}/${i % this.shape.vcpus}`;
        this.found.push(
          `reachable: frame 0x${f.toString(16)} of ${describeOwner(this.ledger.owner[f])} is given back while the TLB of vCPU ${vcpu} still reaches it (I4, I17)`,
        );
      }
    }
  }

  #hasContent(frame: number): boolean {
    return !this.#memory.holds(hfn(frame), 0);
  }

  /** Starts a host task that the execution waits for. */
  spawn(name: string, body: TaskBody): void {
    this.#running++;
    this.tasks.spawn(name, this.#counted(body));
  }

  *#counted(body: TaskBody): TaskBody {
    yield* body;
    this.#running--;
  }

  /** The host's loop: serves until every vCPU thread and every spawned task has ended. */
  serve(): void {
    const rc = this.#runControl;
    const done = (): boolean => {
      for (let t = 0; t < this.shape.vms * this.shape.vcpus; t++)
        if (Atomics.load(rc, RC_DONE + t) === 0) return false;
      return this.#running === 0;
    };
    for (;;) {
      if (this.#poll()) {
        this.#checkAccounts();
        continue;
      }
      if (done() && this.tasks.idle) return;
      const bell = Atomics.load(rc, RC_DOORBELL);
      Atomics.store(rc, RC_HOST_ASLEEP, 1);
      if (!this.#poll() && !(done() && this.tasks.idle)) Atomics.wait(rc, RC_DOORBELL, bell, 50);
      Atomics.store(rc, RC_HOST_ASLEEP, 0);
    }
  }

  #poll(): boolean {
    let worked = false;
    for (const { vm } of this.vms) if (vm.scanExits()) worked = true;
    return this.tasks.step() || worked;
  }

  // ── Audit ────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** The first sum of I9 after each step: ledger, allocator, files and tables agree about every frame. */
  #checkAccounts(): void {
    const counts = this.ledger.recount();
    let inFiles = 0;
    let tables = 0;
    for (const { vm, file } of this.vms) {
      inFiles += file.assigned;
      tables += vm.mmu.counters.tables + vm.mmu.detachedTables.length;
    }
    const sums: [string, number, number][] = [
      ['free frames', counts.free, this.pool.buddy.free],
      ['frames in files', counts.guestAssigned + counts.memfsUnmapped, inFiles],
      ['page tables', counts.pageTable, tables],
    ];
    for (const [what, ledger, other] of sums) {
      if (ledger === other || this.found.length > 8) continue;
      this.found.push(`accounting: ${what}: the ledger says ${ledger}, their keeper ${other} (I9)`);
    }
  }

  /** When all is over: every leaf points at its file's frame, free frames hold their poison, no D bit is missing. */
  audit(): string[] {
    this.#checkAccounts();
    const { hostPages, ramPages, vms } = this.shape;
    for (const { vm } of this.vms)
      if (vm.killed && hostPages >= vms * (ramPages + TABLES))
        this.found.push(`killed: VM ${vm.id} for want of a frame, though the host has enough for all (I9)`);
    const walk = new WalkResult();
    for (const { vm, file } of this.vms) {
      for (const slot of vm.slots.all) {
        for (let page = slot.baseGfn; page < slot.baseGfn + slot.nrPages; page++) {
          eptWalk(this.#memory.i32, vm.mmu.root, gfn(page), walk);
          if (!walk.present) {
            // A cleared entry is 0: a bit set blindly after the zap would be found by the next owner of the slot.
            if (walk.low !== 0)
              this.found.push(
                `ept: the cleared entry of VM ${vm.id} gfn 0x${page.toString(16)} holds 0x${walk.low.toString(16)}`,
              );
            continue;
          }
          const want = file.bmap(slot.fileOffset + page - slot.baseGfn);
          if (want < 0 && this.#isZeroPage(vm.id, walk)) continue;
          if (walk.frame !== want) {
            this.found.push(
              `stale-ept: VM ${vm.id} gfn 0x${page.toString(16)} maps frame 0x${walk.frame.toString(16)}, its file says ${want}; ` +
                `owner now ${describeOwner(this.ledger.owner[walk.frame])}`,
            );
          } else if (
            (walk.low & EPT_D) === 0 &&
            (this.pool.frameFlags[want] & FRAME_DIRTY) === 0 &&
            this.#hasContent(want)
          ) {
            this.found.push(
              `lost-dirty: VM ${vm.id} gfn 0x${page.toString(16)} has content and D is clear (I18)`,
            );
          }
        }
      }
    }
    // A device's own frame, taken again, shows what was written while it was free.
    for (const frame of this.pool.poisonedFrames()) this.pool.checkPoison(hfn(frame));
    return this.noticed();
  }

  /** What checks said while it ran. */
  noticed(): string[] {
    return [...this.log.list().map((v) => describeViolation(v, describeOwner)), ...this.found];
  }

  /** The read-only page of zeros that reads of unplugged memory map (H11). */
  #isZeroPage(vm: number, { low, frame }: WalkResult): boolean {
    return (low & EPT_W) === 0 && this.ledger.owner[frame] === ownerOf(vm, USE_VMM);
  }
}
