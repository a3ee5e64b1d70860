/** Allocates a run's shared memory, and turns what cannot be had into the user's one line. */
import { Arena } from '@ebb/guest-kernel';
import {
  ledgerBytes,
  MAX_HOST_MEMORY,
  PAGE_SIZE,
  RUN_CONTROL_BYTES,
  VCPU_BLOCK_BYTES,
  VIOLATION_BYTES,
  formatBytes,
} from '@ebb/machine';
import { UserError } from '../trace/trace.ts';
import { handleBytes } from './replay-program.ts';
import type { RunBuffers, RunSpec } from './spec.ts';

function sharedBuffer(bytes: number, what: string): SharedArrayBuffer {
  try {
    return new SharedArrayBuffer(bytes);
  } catch {
    throw new UserError(
      `${what}: ${formatBytes(bytes)} of shared memory cannot be had on this machine; ask for less`,
    );
  }
}

/** Host memory and its ledger: reused by the runs of one command, since the host zeroes a frame before each first use. */
export interface HostBuffers {
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
}

export function hostBuffers(hostBytes: number): HostBuffers {
  if (hostBytes > MAX_HOST_MEMORY) {
    throw new UserError(
      `--host-memory ${formatBytes(hostBytes)}: at most ${formatBytes(MAX_HOST_MEMORY)} can be simulated; see docs/not-modelled.md`,
    );
  }
  const dram = sharedBuffer(hostBytes, 'host memory');
  return { dram, ledger: sharedBuffer(ledgerBytes(hostBytes / PAGE_SIZE), 'frame ledger') };
}

/** Everything else of one run. The ledger is emptied; DRAM keeps its bytes, which nobody may see. */
export function runBuffers(spec: RunSpec, host: HostBuffers): RunBuffers {
  new Int32Array(host.ledger).fill(0);
  return {
    ...host,
    violations: sharedBuffer(VIOLATION_BYTES, 'violation log'),
    control: sharedBuffer(spec.vms.length * spec.vcpusPerVm * VCPU_BLOCK_BYTES, 'control blocks'),
    runControl: sharedBuffer(RUN_CONTROL_BYTES, 'run control'),
    arenas: spec.vms.map((vm) => sharedBuffer(Arena.bytes(vm.guest.maxPfn), 'guest kernel arena')),
    handles: spec.vms.map((vm) =>
      sharedBuffer(vm.program.kind === 'replay' ? handleBytes(vm.program.plan) : 4, 'handle table'),
    ),
  };
}
