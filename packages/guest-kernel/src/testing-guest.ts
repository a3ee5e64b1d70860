/** A guest kernel on a machine whose host maps everything in advance: for tests of this package. Not exported. */
import {
  EPT_A,
  EPT_D,
  EPT_PS,
  EPT_RWX,
  EPT_WB,
  eptHigh,
  eptLow,
  EXIT_DONE,
  EXIT_MMIO_READ,
  EXIT_MMIO_WRITE,
  FrameLedger,
  hfn,
  HostMemory,
  ledgerBytes,
  MiB,
  ownerOf,
  PAGE_SIZE,
  RUN_CONTROL_BYTES,
  Vcpu,
  VCPU_BLOCK_BYTES,
  VC_EPT_ROOT,
  VC_EXIT_ADDR_F64,
  VC_EXIT_COST_F64,
  VC_EXIT_DATA,
  VC_EXIT_RDATA,
  VC_EXIT_REASON,
  VC_EXIT_RESULT,
  VC_EXIT_SIZE,
  VC_EXIT_STATE,
  ViolationLog,
  type ExitPort,
} from '@ebb/machine';
import { Arena } from './arena.ts';
import type { GuestConfig } from './boot.ts';
import { GuestKernel } from './kernel.ts';

/** Answers register accesses; the address is guest-physical. */
export interface Registers {
  read(gpa: number, width: number): number;
  write(gpa: number, width: number, value: number): void;
  /** Runs device work while a vCPU waits. */
  pump(): void;
  /** Interrupt lines to raise: taken at the next look. */
  lines: number;
  /** Called before boot with guest RAM: frame n is at byte n · 4096. */
  onBoot(ram: SharedArrayBuffer, registers: Registers): void;
}

export interface TestGuest {
  readonly kernels: GuestKernel[];
  readonly vcpus: Vcpu[];
  readonly log: ViolationLog;
  readonly arena: Arena;
  readonly memory: HostMemory;
  readonly registers: Registers;
}

export function guestConfig(bytes: number, over: Partial<GuestConfig> = {}): GuestConfig {
  const maxPfn = bytes / PAGE_SIZE;
  return {
    e820: [{ start: 0, end: maxPfn }],
    nodes: [{ start: 0, end: maxPfn }],
    maxPfn,
    nrCpus: 2,
    cpuNode: [0, 0],
    initOnAlloc: true,
    pagePoison: false,
    balloon: false,
    blk: false,
    blocks: { kind: 'linear', pagesPerFile: 1024 },
    ...over,
  };
}

/** Two nodes, half of the memory each. */
export function twoNodes(bytes: number): GuestConfig['nodes'] {
  const half = bytes / PAGE_SIZE / 2;
  return [
    { start: 0, end: half },
    { start: half, end: 2 * half },
  ];
}

/** Boots a guest; guest frame n is host frame n, mapped by 2 MiB leaves with A and D set. */
export function testGuest(config: GuestConfig, registers?: Partial<Registers>): TestGuest {
  const ramPages = Math.ceil(config.maxPfn / 512) * 512;
  const tables = ramPages;
  const memory = new HostMemory(new SharedArrayBuffer((ramPages + 512) * PAGE_SIZE));
  const ledger = new FrameLedger(new SharedArrayBuffer(ledgerBytes(memory.frames)), memory.frames);
  ledger.take(hfn(0), memory.frames, ownerOf(0, 0));
  const put = (table: number, index: number, frame: number, flags: number): void => {
    memory.i32[table * 1024 + index * 2] = eptLow(frame, flags);
    memory.i32[table * 1024 + index * 2 + 1] = eptHigh(frame);
  };
  put(tables, 0, tables + 1, EPT_RWX);
  for (let g = 0; g * 262144 < ramPages; g++) {
    put(tables + 1, g, tables + 2 + g, EPT_RWX);
    for (let m = 0; m < 512 && g * 262144 + m * 512 < ramPages; m++) {
      put(tables + 2 + g, m, g * 262144 + m * 512, EPT_RWX | EPT_WB | EPT_PS | EPT_A | EPT_D);
    }
  }
  const control = new SharedArrayBuffer(VCPU_BLOCK_BYTES * config.nrCpus);
  const words = new Int32Array(control);
  const f64 = new Float64Array(control);
  const log = new ViolationLog(ViolationLog.create());
  const regs: Registers = {
    read: () => 0,
    write: () => undefined,
    pump: () => undefined,
    lines: 0,
    onBoot: () => undefined,
    ...registers,
  };
  const vcpus = Array.from({ length: config.nrCpus }, (_, id) => {
    const base = id * 1024;
    words[base + VC_EPT_ROOT] = tables;
    const raise = (word: number): void => {
      words[word] |= regs.lines;
      regs.lines = 0;
    };
    const port: ExitPort = {
      call() {
        const gpa = f64[id * 512 + VC_EXIT_ADDR_F64];
        const reason = words[base + VC_EXIT_REASON];
        f64[id * 512 + VC_EXIT_COST_F64] = 0;
        words[base + VC_EXIT_RESULT] = 1;
        words[base + VC_EXIT_RDATA] = -1;
        if (reason === EXIT_MMIO_READ)
          words[base + VC_EXIT_RDATA] = regs.read(gpa, words[base + VC_EXIT_SIZE]);
        else if (reason === EXIT_MMIO_WRITE)
          regs.write(gpa, words[base + VC_EXIT_SIZE], words[base + VC_EXIT_DATA]);
        words[base + VC_EXIT_STATE] = EXIT_DONE;
      },
      relax: () => regs.pump(),
      halt(_control, word, seen) {
        for (let i = 0; i < 10_000 && words[word] === seen; i++) {
          regs.pump();
          raise(word);
        }
        if (words[word] === seen) throw new Error('a halted vCPU is never interrupted');
      },
    };
    return new Vcpu({
      vm: 0,
      id,
      memory,
      ledger,
      violations: log,
      control,
      block: id,
      runControl: new Int32Array(new SharedArrayBuffer(RUN_CONTROL_BYTES)),
      port,
      tlbBits: 12,
    });
  });
  const buffer = Arena.create(config.maxPfn);
  const kernels = vcpus.map((vcpu) => new GuestKernel(config, buffer, vcpu));
  regs.onBoot(memory.buffer, regs);
  vcpus[0].enterGuest();
  kernels[0].boot();
  vcpus[0].leaveGuest();
  return { kernels, vcpus, log, arena: kernels[0].arena, memory, registers: regs };
}

export const SMALL: number = 64 * MiB;
