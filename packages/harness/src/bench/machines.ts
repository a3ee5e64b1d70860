/** Small machines for benchmarks: one VM with its memory file, served on this thread. */
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
import { FramePool, HostTasks, Vm } from '@ebb/host-kvm';
import { MemFile, type HugePolicy } from '@ebb/memfs';

export interface BenchMachine {
  readonly memory: HostMemory;
  readonly buffers: {
    dram: SharedArrayBuffer;
    ledger: SharedArrayBuffer;
    violations: SharedArrayBuffer;
    control: SharedArrayBuffer;
    runControl: SharedArrayBuffer;
  };
  readonly vm: Vm;
  readonly tasks: HostTasks;
  poll(): boolean;
  /** A vCPU on this thread. */
  vcpu(tlbBits: number): Vcpu;
}

/** DRAM is reused between machines of one process: touching fresh host memory costs more than most of what is measured. */
let dram: SharedArrayBuffer | null = null;

export function benchMachine(ramBytes: number, huge: HugePolicy): BenchMachine {
  const bytes = ramBytes + 64 * 1024 * 1024;
  if (dram === null || dram.byteLength < bytes) {
    dram = new SharedArrayBuffer(bytes);
    new Uint8Array(dram).fill(1);
  }
  const memory = new HostMemory(dram);
  const ledgerBuffer = new SharedArrayBuffer(ledgerBytes(memory.frames));
  const violations = ViolationLog.create();
  const log = new ViolationLog(violations);
  const ledger = new FrameLedger(ledgerBuffer, memory.frames);
  const pool = new FramePool({ memory, ledger, violations: log, frames: memory.frames });
  const tasks = new HostTasks(inlineSchedule);
  const control = new SharedArrayBuffer(VCPU_BLOCK_BYTES);
  const runControl = new SharedArrayBuffer(RUN_CONTROL_BYTES);
  const vm = new Vm({
    id: 0,
    nrVcpus: 1,
    control,
    firstBlock: 0,
    pool,
    tasks,
    violations: log,
    schedule: freeSchedule,
    tableLive: new Int32Array(memory.frames),
    frameFlags: new Uint8Array(memory.frames),
  });
  const file = new MemFile({ name: 'ram', nrBlocks: ramBytes / PAGE_SIZE, vm: 0, frames: pool, huge });
  const setup = vm.setUserMemoryRegion({
    slot: 0,
    flags: 0,
    guestPhysAddr: 0,
    memorySize: ramBytes,
    file,
    fileOffset: 0,
  });
  while (setup.next().done !== true);
  const poll = (): boolean => {
    const found = vm.scanExits();
    return tasks.step() || found;
  };
  return {
    memory,
    buffers: { dram, ledger: ledgerBuffer, violations, control, runControl },
    vm,
    tasks,
    poll,
    vcpu: (tlbBits) =>
      new Vcpu({
        vm: 0,
        id: 0,
        memory,
        ledger,
        violations: log,
        control,
        block: 0,
        runControl: new Int32Array(runControl),
        port: new InlineExitPort(() => void poll()),
        schedule: inlineSchedule,
        tlbBits,
      }),
  };
}
