/** A small machine on this thread: a host and its VMs, each with one slot over one memory file. Benchmarks and the museum. */
import { FramePool, HostTasks, Vm, type TaskYield } from '@ebb/host-kvm';
import {
  FrameLedger,
  freeSchedule,
  HostMemory,
  InlineExitPort,
  inlineSchedule,
  ledgerBytes,
  PAGE_SIZE,
  RUN_CONTROL_BYTES,
  Vcpu,
  VCPU_BLOCK_BYTES,
  ViolationLog,
} from '@ebb/machine';
import { MemFile, type HugePolicy } from '@ebb/memfs';
import { pageAligned } from './page-aligned.ts';

interface SmallVm {
  readonly vm: Vm;
  readonly file: MemFile;
  /** Its one vCPU on this thread. */
  vcpu(tlbBits: number): Vcpu;
}

export interface SmallMachine {
  readonly memory: HostMemory;
  readonly pool: FramePool;
  readonly log: ViolationLog;
  readonly ledger: FrameLedger;
  readonly buffers: {
    dram: SharedArrayBuffer;
    ledger: SharedArrayBuffer;
    violations: SharedArrayBuffer;
    control: SharedArrayBuffer;
    runControl: SharedArrayBuffer;
  };
  readonly tasks: HostTasks;
  readonly vms: readonly SmallVm[];
  readonly poll: () => boolean;
  /** Runs host work to its end. */
  finish<T>(work: Generator<TaskYield, T, void>): T;
}

export interface SmallMachineOptions {
  readonly ramBytes: number;
  readonly huge: HugePolicy;
  readonly vms?: number;
  /** Makes the frame pool; the ordinary one by default. */
  readonly pool?: (options: ConstructorParameters<typeof FramePool>[0]) => FramePool;
}

/** DRAM is reused between machines of one process: touching fresh host memory costs more than most of what is measured. */
let dram: SharedArrayBuffer | null = null;

export function smallMachine(options: SmallMachineOptions): SmallMachine {
  const nrVms = options.vms ?? 1;
  const bytes = options.ramBytes * nrVms + 64 * 1024 * 1024;
  if (dram === null || dram.byteLength < bytes) {
    dram = new SharedArrayBuffer(bytes);
    new Uint8Array(dram).fill(1);
  }
  const memory = new HostMemory(dram);
  const ledgerBuffer = new SharedArrayBuffer(ledgerBytes(memory.frames));
  const violations = ViolationLog.create();
  const log = new ViolationLog(violations);
  const ledger = new FrameLedger(ledgerBuffer, memory.frames);
  const poolOptions = { memory, ledger, violations: log, frames: memory.frames };
  const pool = options.pool?.(poolOptions) ?? new FramePool(poolOptions);
  const tasks = new HostTasks(inlineSchedule);
  const control = pageAligned(VCPU_BLOCK_BYTES * nrVms);
  const runControl = pageAligned(RUN_CONTROL_BYTES);
  const tableLive = new Int32Array(memory.frames);
  const vms: SmallVm[] = [];
  const poll = (): boolean => {
    let found = false;
    for (let i = 0; i < vms.length; i++) if (vms[i].vm.scanExits()) found = true;
    return tasks.step() || found;
  };
  for (let id = 0; id < nrVms; id++) {
    const vm = new Vm({
      id,
      nrVcpus: 1,
      control,
      firstBlock: id,
      pool,
      tasks,
      violations: log,
      schedule: freeSchedule,
      tableLive,
    });
    const file = new MemFile({
      name: `vm${id}`,
      nrBlocks: options.ramBytes / PAGE_SIZE,
      vm: id,
      frames: pool,
      huge: options.huge,
    });
    const setup = vm.setUserMemoryRegion({
      slot: 0,
      flags: 0,
      guestPhysAddr: 0,
      memorySize: options.ramBytes,
      file,
      fileOffset: 0,
    });
    while (setup.next().done !== true);
    vms.push({
      vm,
      file,
      vcpu: (tlbBits) =>
        new Vcpu({
          vm: id,
          id: 0,
          memory,
          ledger,
          violations: log,
          control,
          block: id,
          runControl: new Int32Array(runControl),
          port: new InlineExitPort(() => void poll()),
          schedule: inlineSchedule,
          tlbBits,
        }),
    });
  }
  return {
    memory,
    pool,
    log,
    ledger,
    buffers: { dram, ledger: ledgerBuffer, violations, control, runControl },
    tasks,
    vms,
    poll,
    finish(work) {
      for (;;) {
        const step = work.next();
        if (step.done === true) return step.value;
        // What it waits for is somebody else's work.
        while (typeof step.value === 'function' && !step.value())
          if (!poll()) throw new Error('nobody can go on');
      }
    },
  };
}
