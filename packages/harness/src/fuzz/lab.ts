/**
 * The small machine that properties run on: one host with its tasks, a few VMs, and the audit of everything that must
 * add up. The buffers are made once and emptied between executions; host objects are built afresh, which is cheap at
 * this size.
 */
import { Arena } from '@ebb/guest-kernel';
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
  ledgerBytes,
  LOCK_ORDER_BYTES,
  nudgeSleepingHost,
  ownerOf,
  PAGE_SIZE,
  RACE_BYTES,
  RC_DOORBELL,
  RC_HOST_ASLEEP,
  RUN_CONTROL_BYTES,
  SCHEDULE_BYTES,
  sharedI32,
  ThreadExitPort,
  tlbBytes,
  tlbInUse,
  tlbReaches,
  USE_VMM,
  VC_FLUSH_ACK,
  VC_FLUSH_REQ,
  VCPU_BLOCK_WORDS,
  Vcpu,
  VCPU_BLOCK_BYTES,
  ViolationLog,
  VIOLATION_BYTES,
  WalkResult,
  type ControlledSchedule,
  type Hfn,
  type Schedule,
} from '@ebb/machine';
import { MemFile, type FrameSource, type HugePolicy } from '@ebb/memfs';
import { SERIES_BYTES } from './series.ts';

export interface LabShape {
  /** Host frames. */
  readonly hostPages: number;
  /** RAM of each VM. */
  readonly ramPages: number;
  readonly vms: number;
  readonly vcpus: number;
  readonly huge: HugePolicy;
}

/** Words of run control from here belong to the properties: done flags, then a model shared by the threads. */
const RC_DONE = 640;
const TLB_BITS = 6;
/** Frames that the page tables of a lab's VM take at most. */
const TABLES = 8;
/** Words for the models of a property, in a buffer of their own. */
const MODEL_WORDS = 16384;

export interface LabBuffers {
  readonly shape: LabShape;
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
  readonly violations: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly runControl: SharedArrayBuffer;
  readonly arenas: readonly SharedArrayBuffer[];
  readonly model: SharedArrayBuffer;
  /** TLBs of the vCPUs, and the race detector's memory. */
  readonly tlbs: readonly SharedArrayBuffer[];
  readonly races: SharedArrayBuffer;
  readonly lockOrder: SharedArrayBuffer;
  readonly schedule: SharedArrayBuffer;
  /** Where the threads of a series of executions meet between two of them; see `series.ts`. */
  readonly series: SharedArrayBuffer;
}

export function labBuffers(shape: LabShape): LabBuffers {
  return {
    shape,
    dram: new SharedArrayBuffer(shape.hostPages * PAGE_SIZE),
    ledger: new SharedArrayBuffer(ledgerBytes(shape.hostPages)),
    violations: new SharedArrayBuffer(VIOLATION_BYTES),
    control: new SharedArrayBuffer(shape.vms * shape.vcpus * VCPU_BLOCK_BYTES),
    runControl: new SharedArrayBuffer(RUN_CONTROL_BYTES),
    arenas: Array.from({ length: shape.vms }, () => Arena.create(shape.ramPages)),
    model: new SharedArrayBuffer(MODEL_WORDS * 4),
    tlbs: Array.from({ length: shape.vms * shape.vcpus }, () => new SharedArrayBuffer(tlbBytes(TLB_BITS))),
    races: new SharedArrayBuffer(RACE_BYTES),
    lockOrder: new SharedArrayBuffer(LOCK_ORDER_BYTES),
    schedule: new SharedArrayBuffer(SCHEDULE_BYTES),
    series: new SharedArrayBuffer(SERIES_BYTES),
  };
}

/** Empties everything but DRAM, which the host zeroes frame by frame. */
export function resetLab(lab: LabBuffers): void {
  for (const buffer of [lab.ledger, lab.violations, lab.control, lab.runControl, lab.model, lab.lockOrder])
    new Uint8Array(buffer).fill(0);
  for (const arena of lab.arenas) new Uint8Array(arena).fill(0);
}

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
  readonly #frameFlags: Uint8Array;
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
      override allocZeroed(order: 0 | 9, owner: number): number {
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
    this.#frameFlags = new Uint8Array(this.#memory.frames);
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
        frameFlags: this.#frameFlags,
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

  /** Frames go back through this door: content without a dirty mark is a lost dirty bit (I18). */
  #frames(vm: number): FrameSource {
    return {
      allocZeroed: (order, owner) => {
        const first = this.pool.allocZeroed(order, owner);
        if (first >= 0) this.#frameFlags.fill(0, first, first + (1 << order));
        return first;
      },
      free: (first: Hfn, count: number) => {
        for (let f = first as number; f < first + count; f++)
          if ((this.#frameFlags[f] & FRAME_DIRTY) === 0 && this.#hasContent(f)) {
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
          if (
            want < 0 &&
            (walk.low & EPT_W) === 0 &&
            this.ledger.owner[walk.frame] === ownerOf(vm.id, USE_VMM)
          )
            continue; // The page of zeros that reads of unplugged memory map (H11).
          if (walk.frame !== want) {
            this.found.push(
              `stale-ept: VM ${vm.id} gfn 0x${page.toString(16)} maps frame 0x${walk.frame.toString(16)}, its file says ${want}; ` +
                `owner now ${describeOwner(this.ledger.owner[walk.frame])}`,
            );
          } else if (
            (walk.low & EPT_D) === 0 &&
            (this.#frameFlags[want] & FRAME_DIRTY) === 0 &&
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
    const records = this.log.list().map((v) => describeViolation(v, describeOwner));
    return [...records, ...this.found];
  }
}

/** One vCPU of a lab. */
export class VcpuLab {
  readonly vcpu: Vcpu;
  readonly model: Int32Array;
  readonly shape: LabShape;
  readonly schedule: ControlledSchedule;
  /** The guest kernel's arena. */
  readonly arena: SharedArrayBuffer;
  readonly found: string[] = [];
  readonly #runControl: Int32Array;
  readonly #thread: number;

  constructor(lab: LabBuffers, schedule: ControlledSchedule, vm: number, id: number) {
    const memory = new HostMemory(lab.dram);
    this.shape = lab.shape;
    this.schedule = schedule;
    this.arena = lab.arenas[vm];
    this.model = new Int32Array(lab.model);
    this.#runControl = sharedI32('run-control', lab.runControl);
    this.#thread = vm * lab.shape.vcpus + id;
    this.vcpu = new Vcpu({
      vm,
      id,
      memory,
      ledger: new FrameLedger(lab.ledger, memory.frames),
      violations: new ViolationLog(lab.violations),
      control: lab.control,
      block: this.#thread,
      runControl: this.#runControl,
      port: new ThreadExitPort(this.#runControl, 0),
      schedule,
      tlbBits: TLB_BITS,
      tlb: lab.tlbs[this.#thread],
    });
  }

  /** The model has changed in a way that a host task may wait for. */
  tellHost(): void {
    nudgeSleepingHost(this.#runControl);
  }

  /** This thread's program has ended: tells the host's loop. */
  finish(): void {
    Atomics.store(this.#runControl, RC_DONE + this.#thread, 1);
    Atomics.add(this.#runControl, RC_DOORBELL, 1);
    Atomics.notify(this.#runControl, RC_DOORBELL);
  }
}
