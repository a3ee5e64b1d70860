/** A small host with one VM and vCPUs on the same thread, for tests of this package. Not exported. */
import {
  EXIT_REQUEST,
  FrameLedger,
  HostMemory,
  InlineExitPort,
  inlineSchedule,
  ledgerBytes,
  MiB,
  PAGE_SIZE,
  RUN_CONTROL_BYTES,
  VC_EXIT_ADDR_F64,
  VC_EXIT_REASON,
  VC_EXIT_SIZE,
  VC_EXIT_STATE,
  Vcpu,
  VCPU_BLOCK_BYTES,
  ViolationLog,
} from '@ebb/machine';
import { MemFile, type HugePolicy } from '@ebb/memfs';
import { HostTasks, type TaskBody } from '../host-tasks.ts';
import { FramePool } from '../mm/frame-pool.ts';
import { Vm } from './vm.ts';

/** Has the vCPU whose control block is at `control[base…]` ask, as `Vcpu.exit` does: for tests that hold both mailboxes. */
export function postExit(
  control: Int32Array,
  base: number,
  reason: number,
  address: number,
  size: number,
): void {
  control[base + VC_EXIT_REASON] = reason;
  control[base + VC_EXIT_SIZE] = size;
  new Float64Array(control.buffer)[base / 2 + VC_EXIT_ADDR_F64] = address;
  control[base + VC_EXIT_STATE] = EXIT_REQUEST;
}

export interface TestHost {
  readonly pool: FramePool;
  readonly tasks: HostTasks;
  readonly log: ViolationLog;
  readonly vm: Vm;
  readonly file: MemFile;
  readonly vcpus: Vcpu[];
  poll(): boolean;
  /** Runs a task body to its end, with everything else that is ready. */
  finish<T>(body: Generator<unknown, T, void>): T;
  addVm(): { vm: Vm; file: MemFile; vcpus: Vcpu[] };
}

export function testHost(
  options: { hostBytes?: number; ramBytes?: number; huge?: HugePolicy; vcpus?: number } = {},
): TestHost {
  const hostBytes = options.hostBytes ?? 64 * MiB;
  const ramBytes = options.ramBytes ?? 16 * MiB;
  const nrVcpus = options.vcpus ?? 2;
  const memory = new HostMemory(new SharedArrayBuffer(hostBytes));
  const ledger = new FrameLedger(new SharedArrayBuffer(ledgerBytes(memory.frames)), memory.frames);
  const log = new ViolationLog(ViolationLog.create());
  const pool = new FramePool({ memory, ledger, violations: log, frames: memory.frames, poison: 'full' });
  const tasks = new HostTasks(inlineSchedule);
  const control = new SharedArrayBuffer(VCPU_BLOCK_BYTES * nrVcpus * 4);
  const runControl = new Int32Array(new SharedArrayBuffer(RUN_CONTROL_BYTES));
  const tableLive = new Int32Array(memory.frames);
  const vms: Vm[] = [];
  const poll = (): boolean => {
    for (const vm of vms) vm.scanExits();
    return tasks.step();
  };
  let exits = 0;
  /** The host's turn while a vCPU waits. A fault that is served and comes back for ever fails the test. */
  const serve = (): void => {
    if (++exits > 200_000) throw new Error('a vCPU does not get on');
    poll();
  };
  const finish = <T>(body: Generator<unknown, T, void>): T => {
    let result: { value: T } | null = null;
    tasks.spawn(
      'test',
      (function* (): TaskBody {
        result = { value: yield* body as Generator<undefined, T, void> };
      })(),
    );
    for (let i = 0; result === null; i++) {
      if (i > 100_000) throw new Error('the task does not end');
      poll();
    }
    return (result as { value: T }).value;
  };
  const addVm = (): { vm: Vm; file: MemFile; vcpus: Vcpu[] } => {
    const id = vms.length;
    const vm = new Vm({
      id,
      nrVcpus,
      control,
      firstBlock: id * nrVcpus,
      pool,
      tasks,
      violations: log,
      schedule: inlineSchedule,
      tableLive,
    });
    vms.push(vm);
    const file = new MemFile({
      name: `vm${id}`,
      nrBlocks: ramBytes / PAGE_SIZE,
      vm: id,
      frames: pool,
      huge: options.huge ?? 'always',
    });
    finish(
      vm.setUserMemoryRegion({
        slot: 0,
        flags: 0,
        guestPhysAddr: 0,
        memorySize: ramBytes,
        file,
        fileOffset: 0,
      }),
    );
    const vcpus = Array.from(
      { length: nrVcpus },
      (_, v) =>
        new Vcpu({
          vm: id,
          id: v,
          memory,
          ledger,
          violations: log,
          control,
          block: id * nrVcpus + v,
          runControl,
          port: new InlineExitPort(serve),
          schedule: inlineSchedule,
          tlbBits: 10,
        }),
    );
    return { vm, file, vcpus };
  };
  const first = addVm();
  return { pool, tasks, log, ...first, poll, finish, addVm };
}
