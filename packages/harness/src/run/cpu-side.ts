/**
 * The CPU side of a run: the vCPUs of one CPU worker (or all of them, inline), each with its guest kernel's view and its
 * program, stepped a window at a time.
 */
import { GuestKernel } from '@ebb/guest-kernel';
import {
  FrameLedger,
  HostMemory,
  RC_VMS_ON,
  sharedI32,
  Vcpu,
  ViolationLog,
  VmKilled,
  type ExitPort,
  type Schedule,
} from '@ebb/machine';
import { AgentProgram } from './agent-program.ts';
import { HostileProgram } from './hostile-program.ts';
import { BlindReadProgram } from './blind-read-program.ts';
import { HostileUnpluggedProgram } from './hostile-unplugged-program.ts';
import { PressureProgram } from './pressure-program.ts';
import { ProcessProgram } from './process-program.ts';
import type { Program } from './program.ts';
import { ReplayProgram } from './replay-program.ts';
import {
  RC_VM,
  RC_VM_BOOTS,
  RC_VM_EVENTS,
  VM_FAILED,
  VM_KILLED,
  workerOf,
  type RunBuffers,
  type RunSpec,
} from './spec.ts';
import { TouchFreeProgram } from './touch-free-program.ts';
import { REPLAY_BEGINS, TraceWriter, type TraceLine } from './trace-writer.ts';

interface VcpuSeat {
  readonly vm: number;
  readonly id: number;
  readonly vcpu: Vcpu;
  kernel: GuestKernel;
  program: Program | null;
  /** System resets this kernel has seen. */
  boots: number;
}

export class CpuSide {
  readonly #spec: RunSpec;
  readonly #buffers: RunBuffers;
  readonly #runControl: Int32Array;
  readonly #port: ExitPort;
  readonly #schedule: Schedule;
  readonly #memory: HostMemory;
  readonly #ledger: FrameLedger;
  readonly #log: ViolationLog;
  readonly #mine: (vm: number, vcpu: number) => boolean;
  readonly #seats: VcpuSeat[] = [];
  #vmsSeated = 0;
  /** A VM of this side was killed: nothing more is stepped, since it may hold locks for ever. */
  #dead = false;
  /** Allocation events as tracefs text, when asked for: time and line. */
  readonly allocTrace: TraceLine[] = [];

  /** `worker`: number of this worker, or −1 to run every vCPU. */
  constructor(spec: RunSpec, buffers: RunBuffers, worker: number, port: ExitPort, schedule: Schedule) {
    this.#spec = spec;
    this.#buffers = buffers;
    this.#runControl = sharedI32('run-control', buffers.runControl);
    this.#port = port;
    this.#schedule = schedule;
    this.#memory = new HostMemory(buffers.dram);
    this.#ledger = new FrameLedger(buffers.ledger, this.#memory.frames);
    this.#log = new ViolationLog(buffers.violations);
    this.#mine = (vm, vcpu) => worker < 0 || workerOf(spec, vm, vcpu) === worker;
  }

  /** Runs every vCPU to `untilNs`. Returns the earliest virtual time at which one of them has something to do. */
  runWindow(untilNs: number): number {
    this.#seatNewVms();
    for (const seat of this.#seats) this.#rebootIfReset(seat);
    let nextDue = Number.POSITIVE_INFINITY;
    for (const seat of this.#seats) if (!this.#dead) nextDue = Math.min(nextDue, this.#step(seat, untilNs));
    return nextDue;
  }

  #seatNewVms(): void {
    const on = Atomics.load(this.#runControl, RC_VMS_ON);
    for (; this.#vmsSeated < on; this.#vmsSeated++) {
      const vm = this.#vmsSeated;
      for (let id = 0; id < this.#spec.vcpusPerVm; id++) {
        if (!this.#mine(vm, id)) continue;
        const vcpu = new Vcpu({
          vm,
          id,
          memory: this.#memory,
          ledger: this.#ledger,
          violations: this.#log,
          control: this.#buffers.control,
          block: vm * this.#spec.vcpusPerVm + id,
          runControl: this.#runControl,
          port: this.#port,
          schedule: this.#schedule,
        });
        const kernel = new GuestKernel(this.#spec.vms[vm].guest, this.#buffers.arenas[vm], vcpu);
        this.#seats.push({ vm, id, vcpu, kernel, program: null, boots: 0 });
      }
    }
  }

  /** After a system reset a fresh kernel boots over the emptied arena. */
  #rebootIfReset(seat: VcpuSeat): void {
    const boots = Atomics.load(this.#runControl, RC_VM_BOOTS + seat.vm);
    if (boots === seat.boots) return;
    const spec = this.#spec.vms[seat.vm];
    seat.boots = boots;
    seat.kernel = new GuestKernel(
      spec.guestAfterReset ?? spec.guest,
      this.#buffers.arenas[seat.vm],
      seat.vcpu,
    );
    seat.program = null;
  }

  #step(seat: VcpuSeat, untilNs: number): number {
    const { vcpu, kernel, vm, id } = seat;
    try {
      if (!kernel.booted) {
        const { bootAtNs } = this.#spec.vms[vm];
        // The others wait for vCPU 0 to have booted; with their first step they are up.
        if (id !== 0) return Math.max(untilNs, bootAtNs);
        vcpu.clock = Math.max(vcpu.clock, bootAtNs);
        vcpu.enterGuest();
        kernel.boot();
        vcpu.leaveGuest();
      }
      if (seat.program === null) {
        vcpu.clock = Math.max(vcpu.clock, this.#spec.vms[vm].bootAtNs);
        seat.program = this.#program(seat);
        if (this.#spec.traceOut) {
          const writer = new TraceWriter(vcpu, this.allocTrace);
          // A replay begins: what an import applies lies between this and the end's mark, which closes the file.
          const { kind } = this.#spec.vms[vm].program;
          if (id === 0 && kind === 'replay') writer.mark(REPLAY_BEGINS, this.#spec.vms[vm].bootAtNs);
          kernel.parts.alloc.trace = writer;
          kernel.parts.cache.trace = writer;
        }
      }
      const { program } = seat;
      kernel.enter();
      program.step(untilNs);
      kernel.leave();
      Atomics.add(this.#runControl, RC_VM_EVENTS + vm, program.takeEvents());
      if (program.failure !== '') Atomics.or(this.#runControl, RC_VM + vm, VM_FAILED);
      else if (program.ended) Atomics.or(this.#runControl, RC_VM + vm, 1 << id);
      return Math.min(program.nextDue(), kernel.nextDue());
    } catch (error) {
      if (!(error instanceof VmKilled)) throw error;
      // The run ends here: nothing of this guest is unwound.
      this.#dead = true;
      Atomics.or(this.#runControl, RC_VM + vm, VM_KILLED);
      return untilNs;
    }
  }

  #program(seat: VcpuSeat): Program {
    const { program, bootAtNs } = this.#spec.vms[seat.vm];
    switch (program.kind) {
      case 'replay':
        return new ReplayProgram(seat.kernel, program.plan, this.#buffers.handles[seat.vm], bootAtNs);
      case 'pressure':
        return new PressureProgram(seat.kernel, program);
      case 'touch-free':
        return new TouchFreeProgram(seat.kernel, program);
      case 'hostile-unplugged':
        return new HostileUnpluggedProgram(seat.kernel, program);
      case 'blind-read':
        return new BlindReadProgram(seat.kernel, program);
      case 'processes':
        return new ProcessProgram(seat.kernel, program, this.#buffers.handles[seat.vm]);
      case 'agent':
        return new AgentProgram(seat.kernel, this.#buffers.handles[seat.vm], program.pins ?? []);
      case 'hostile-reuse':
        return new HostileProgram(seat.kernel, program);
    }
  }
}
