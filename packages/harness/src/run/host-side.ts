/**
 * The host of a run: frame pool, VMs with their devices, host tasks, and the coordinator that moves virtual time on in
 * windows. Platform-neutral: block storage is injected, waiting is its caller's (`inline-run.ts`, `host-worker.ts`).
 *
 * A window ends at the next thing the host has to do (a boot, a sample, a policy step) and at most 10 ms after the next
 * thing a guest has to do, since vCPUs of one VM interact. Between windows every worker has reported `done`.
 */
import { Arena } from '@ebb/guest-kernel';
import {
  FramePool,
  HostTasks,
  keepReserve,
  type BalloonPolicy,
  type BlockStorage,
  type RebootPolicy,
  type TaskYield,
} from '@ebb/host-kvm';
import {
  COST_TABLE,
  FrameLedger,
  freeSchedule,
  HostMemory,
  NS_PER_MS,
  NS_PER_S,
  PAGE_SIZE,
  RC_VMS_ON,
  sharedI32,
  describeOwner,
  describeViolation,
  ViolationLog,
  type Schedule,
} from '@ebb/machine';
import { powerOn, type MemoryWatch } from './power-on.ts';
import {
  auditFrames,
  sampleOf,
  stallsOf,
  vmResult,
  type RunningVm,
  type RunResult,
  type Sample,
} from './run-result.ts';
import { RC_VM, RC_VM_BOOTS, RC_VM_EVENTS, VM_FAILED, type RunBuffers, type RunSpec } from './spec.ts';

/** Longest window while vCPUs that may interact have something to do. */
const WINDOW_NS: number = 10 * NS_PER_MS;
/** Longest window while the vCPUs of only one worker have: what they wake on another waits no longer than this. */
const LONE_WINDOW_NS: number = 100 * NS_PER_MS;
const POLICY_NS: number = NS_PER_S;

export class HostSide {
  readonly tasks: HostTasks;
  readonly pool: FramePool;
  readonly violations: ViolationLog;
  readonly vms: RunningVm[] = [];
  /** End of the window that workers may run, absolute virtual nanoseconds. */
  windowEnd = 0;
  why = '';
  readonly samples: Sample[] = [];
  readonly #spec: RunSpec;
  readonly #buffers: RunBuffers;
  readonly #schedule: Schedule;
  readonly #runControl: Int32Array;
  readonly #storage: (vm: number, bytes: number) => BlockStorage;
  readonly #policy: BalloonPolicy;
  readonly #tableLive: Int32Array;
  readonly #deviceTrace: string[] = [];
  readonly #watch: MemoryWatch;
  #nextSample = 0;
  #finishedAt = -1;

  constructor(
    spec: RunSpec,
    buffers: RunBuffers,
    storage: (vm: number, bytes: number) => BlockStorage,
    schedule: Schedule = freeSchedule,
    policy: BalloonPolicy = keepReserve,
    watch: MemoryWatch = {},
  ) {
    this.#watch = watch;
    this.#spec = spec;
    this.#buffers = buffers;
    this.#schedule = schedule;
    this.#storage = storage;
    this.#policy = policy;
    this.#runControl = sharedI32('run-control', buffers.runControl);
    this.tasks = new HostTasks(schedule);
    this.violations = new ViolationLog(buffers.violations);
    const memory = new HostMemory(buffers.dram);
    this.pool = new FramePool({
      memory,
      ledger: new FrameLedger(buffers.ledger, memory.frames),
      violations: this.violations,
      frames: spec.hostFrames,
      poison: spec.poison,
    });
    this.#tableLive = new Int32Array(memory.frames);
  }

  /** One round: looks for exits, runs ready tasks. True if anything happened. */
  poll(): boolean {
    let worked = false;
    for (let i = 0; i < this.vms.length; i++) if (this.vms[i].vm.scanExits()) worked = true;
    return this.tasks.step() || worked;
  }

  /** True once a VM met a host without a free frame: the run is over, whatever its vCPUs hold. */
  get anyKilled(): boolean {
    for (let i = 0; i < this.vms.length; i++) if (this.vms[i].vm.killed) return true;
    return false;
  }

  // ── Coordinator ──────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Every worker has reached `windowEnd`; the earliest thing any vCPU still has to do is at `nextDue`. Does what the
   * host has due and opens the next window. `othersDue`: the same for all workers but the one with the earliest; until
   * then nobody can interact with it. False: the run is over (`why` says whether it failed).
   */
  advance(nextDue: number, othersDue: number = nextDue): boolean {
    const now = this.windowEnd;
    let due = nextDue;
    let others = othersDue;
    const dead = this.vms.find(({ vm }) => vm.killed);
    if (dead !== undefined) return this.#end(`VM ${dead.vm.id}: no host frame was free`);
    for (let k = 0; k < this.vms.length; k++) {
      if ((this.#status(k) & VM_FAILED) !== 0) return this.#end(`VM ${k}: an allocation failed in the guest`);
    }
    if (now >= this.#nextSample) {
      this.samples.push(this.sample(now));
      this.#nextSample = now + this.#spec.sampleNs;
    }
    this.#serveTimers(now);
    while (this.vms.length < this.#spec.vms.length && this.#spec.vms[this.vms.length].bootAtNs <= now) {
      if (!this.#boot(this.vms.length))
        return this.#end(`VM ${this.vms.length}: the host has no memory to start it`);
      // Nobody has asked on behalf of the new VM yet: it has something to do at once.
      due = now;
      others = now;
    }
    const allDone = this.vms.length === this.#spec.vms.length && this.vms.every((_, k) => this.#finished(k));
    if (allDone && this.#finishedAt < 0) this.#finishedAt = now;
    if (allDone && now >= this.#finishedAt + this.#spec.graceNs) return this.#end('');
    let end = this.#nextHostEvent();
    if (due < end) {
      const from = Math.max(due, now);
      end = Math.min(end, Math.max(from + WINDOW_NS, Math.min(others, from + LONE_WINDOW_NS)));
    }
    this.windowEnd = Math.max(end, now + 1);
    Atomics.store(this.#runControl, RC_VMS_ON, this.vms.length);
    return true;
  }

  #end(why: string): false {
    this.why = why;
    this.samples.push(this.sample(this.windowEnd));
    return false;
  }

  #status(k: number): number {
    return Atomics.load(this.#runControl, RC_VM + k);
  }
  #finished(k: number): boolean {
    const all = (1 << this.#spec.vcpusPerVm) - 1;
    return (this.#status(k) & all) === all;
  }

  /** VMs whose programs have ended. */
  get nrFinished(): number {
    return this.vms.filter((_, k) => this.#finished(k)).length;
  }

  #nextHostEvent(): number {
    let at = this.#nextSample;
    const next = this.#spec.vms[this.vms.length];
    if (next !== undefined) at = Math.min(at, next.bootAtNs);
    if (this.#finishedAt >= 0) at = Math.min(at, this.#finishedAt + this.#spec.graceNs);
    for (const vm of this.vms) {
      at = Math.min(
        at,
        vm.policyDue,
        vm.targets[0]?.[0] ?? Number.POSITIVE_INFINITY,
        vm.hints[0]?.at ?? Number.POSITIVE_INFINITY,
        vm.sizes[0]?.[0] ?? Number.POSITIVE_INFINITY,
        vm.resets[0]?.[0] ?? Number.POSITIVE_INFINITY,
        vm.dimmOrders[0]?.[0] ?? Number.POSITIVE_INFINITY,
        vm.assignedDue,
      );
    }
    return at;
  }

  /** Balloon policy, scheduled targets, hinting rounds. */
  #serveTimers(now: number): void {
    for (const vm of this.vms) {
      const { balloon } = vm;
      for (let next = vm.resets[0]; next !== undefined && next[0] <= now; next = vm.resets[0]) {
        vm.resets.shift();
        this.systemReset(vm.vm.id, next[1]);
      }
      for (let next = vm.sizes[0]; next !== undefined && next[0] <= now; next = vm.sizes[0]) {
        vm.sizes.shift();
        vm.memory[next[1]].setRequested(next[2]);
      }
      if (vm.assigned !== null && vm.assignedDue <= now) {
        vm.assigned.readAll();
        vm.assignedDue = now + (vm.spec.assigned?.everyNs ?? Number.POSITIVE_INFINITY);
      }
      for (let next = vm.dimmOrders[0]; next !== undefined && next[0] <= now; next = vm.dimmOrders[0]) {
        vm.dimmOrders.shift();
        const [, order] = next;
        const why = 'plug' in order ? vm.dimms?.plug(order.plug) : vm.dimms?.requestUnplug(order.unplug);
        if (why !== undefined && why !== '') vm.dimmRefusals.push(why);
      }
      if (balloon === null) continue;
      while (vm.targets.length > 0 && vm.targets[0][0] <= now)
        balloon.setTarget((vm.targets.shift() as readonly [number, number])[1]);
      while (vm.hints.length > 0 && vm.hints[0].at <= now) {
        if ((vm.hints.shift() as { start: boolean }).start) balloon.startHinting();
        else vm.hintedPages = balloon.stopHinting().count();
      }
      if (vm.policyDue <= now) {
        vm.policyDue = now + POLICY_NS;
        if (balloon.counters.statsUpdates > 0) this.#applyPolicy(vm);
        balloon.requestStats();
      }
    }
  }

  /** The size that the policy wants, by the balloon or by the first memory device. */
  #applyPolicy(vm: RunningVm): void {
    const { balloon } = vm;
    if (balloon === null) return;
    const ramBytes = vm.file.nrBlocks * PAGE_SIZE;
    const [device] = vm.memory;
    if (vm.spec.policySets === 'memory-device') {
      const actualBytes = device.regionBytes - device.pluggedBytes;
      const size = this.#policy({ stats: balloon.stats, ramBytes, actualBytes });
      const wanted =
        Math.ceil((size - (ramBytes - device.regionBytes)) / device.blockBytes) * device.blockBytes;
      device.setRequested(Math.min(device.regionBytes, Math.max(0, wanted)));
    } else {
      const actualBytes = balloon.actual * PAGE_SIZE;
      const size = this.#policy({ stats: balloon.stats, ramBytes, actualBytes });
      if (size !== vm.policySize) balloon.setTarget(size);
      vm.policySize = size;
    }
  }

  // ── VMs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

  #boot(k: number): boolean {
    const spec = this.#spec.vms[k];
    const id = k;
    // The VMM, the root table, and one frame to begin with must be there.
    if (!this.pool.chargeVmm(id, Math.ceil(COST_TABLE.vmmBytesPerVm / PAGE_SIZE)) || this.pool.buddy.free < 2)
      return false;
    this.vms.push(
      powerOn({
        spec,
        id,
        nrVcpus: this.#spec.vcpusPerVm,
        backing: this.#spec.backing,
        control: this.#buffers.control,
        arena: new Arena(this.#buffers.arenas[k], spec.guest.maxPfn),
        pool: this.pool,
        tasks: this.tasks,
        violations: this.violations,
        schedule: this.#schedule,
        tableLive: this.#tableLive,
        storage: this.#storage,
        watch: this.#watch,
        policyDue: spec.policySets !== undefined ? this.windowEnd + POLICY_NS : Number.POSITIVE_INFINITY,
        ...(this.#spec.traceOut
          ? {
              trace: (line: string, atNs: number) =>
                this.#deviceTrace.push(`${k}@${(atNs / NS_PER_S).toFixed(6)}:${line}`),
            }
          : {}),
      }),
    );
    return true;
  }

  /**
   * System reset of VM `k`: devices forget their queues, memory devices do what the policy says, and the guest boots anew
   * with the RAM it finds. Only between windows: every vCPU is outside.
   */
  systemReset(k: number, policy: RebootPolicy): void {
    const { vm, transports, memory, arena } = this.vms[k];
    for (const transport of transports) transport.reset();
    for (const device of memory) {
      let over = false;
      this.tasks.spawn(
        `vm${k}/reset`,
        resetting(device.systemReset(policy), () => (over = true)),
      );
      while (!over) this.poll();
    }
    vm.vcpus.clearInterrupts();
    arena.clear();
    Atomics.and(this.#runControl, RC_VM + k, 0);
    // Pairs with the load at the start of a window: what was cleared is seen by whoever boots.
    Atomics.add(this.#runControl, RC_VM_BOOTS + k, 1);
  }

  // ── Accounts and results ─────────────────────────────────────────────────────────────────────────────────────────

  sample(now: number): Sample {
    return sampleOf(now, this.pool.used, this.vms, this.#spec.vcpusPerVm);
  }

  /** Both sums of I9, recounted. An empty string when they hold, else what does not. Only between windows. */
  audit(): string {
    return auditFrames(this.pool, this.vms);
  }

  result(): RunResult {
    const audit = this.audit();
    if (audit !== '') {
      this.violations.record({
        kind: 'accounting',
        actor: 'kvm',
        vm: -1,
        vcpu: -1,
        gfn: -1,
        hfn: -1,
        expected: 0,
        found: 1,
        owner: 0,
        stepTaken: 0,
        stepReleased: 0,
      });
    }
    return {
      ok: this.why === '',
      why: this.why,
      endNs: this.windowEnd,
      hostPeakBytes: this.pool.peak * PAGE_SIZE,
      hostEndBytes: this.pool.used * PAGE_SIZE,
      zeroedFrames: this.pool.zeroed,
      ledgerViolations: this.violations.total,
      violations: [
        ...this.violations.list().map((v) => describeViolation(v, describeOwner)),
        ...(audit === '' ? [] : [`accounting: ${audit}`]),
      ],
      stall: stallsOf(this.#buffers.control, this.vms.length * this.#spec.vcpusPerVm),
      vms: this.#spec.vms.map((_, k) =>
        vmResult(
          this.vms[k],
          this.#status(k),
          this.#finished(k),
          Atomics.load(this.#runControl, RC_VM_EVENTS + k),
        ),
      ),
      samples: this.samples,
      deviceTrace: this.#deviceTrace,
    };
  }
}

/** A task body that says when it is over. */
function* resetting(
  body: Generator<TaskYield, void, void>,
  done: () => void,
): Generator<TaskYield, void, void> {
  yield* body;
  done();
}
