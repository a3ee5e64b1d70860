/** Allocates a run's shared memory, and turns what cannot be had into the user's one line. */
import { totalmem } from 'node:os';
import { Arena, H_NR_ZONES, MAX_GUEST_PFN } from '@ebb/guest-kernel';
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
import { AGENT_BYTES } from './agent-program.ts';
import { handleBytes } from './replay-program.ts';
import { pageAligned } from './page-aligned.ts';
import type { RunBuffers, RunSpec } from './spec.ts';

function sharedBuffer(
  bytes: number,
  what: string,
  make: (bytes: number) => SharedArrayBuffer = (n) => new SharedArrayBuffer(n),
): SharedArrayBuffer {
  try {
    return make(bytes);
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
  /** Buffers of earlier runs by name, emptied and used again: memory shared with workers is freed only at their leisure. */
  readonly kept: Map<string, SharedArrayBuffer>;
}

/**
 * A zeroed shared buffer, the one an earlier run had under this name if it has the size. `used`: that run wrote to it;
 * one that nobody touched has no memory behind it yet, and must not get any.
 */
function keptBuffer(
  host: HostBuffers,
  name: string,
  bytes: number,
  what: string,
  used: boolean,
): SharedArrayBuffer {
  const have = host.kept.get(name);
  if (have !== undefined && have.byteLength === bytes) {
    if (used) new Uint8Array(have).fill(0);
    return have;
  }
  const fresh = sharedBuffer(bytes, what);
  host.kept.set(name, fresh);
  return fresh;
}

export function hostBuffers(hostBytes: number): HostBuffers {
  if (hostBytes > MAX_HOST_MEMORY) {
    throw new UserError(
      `--host-memory ${formatBytes(hostBytes)}: at most ${formatBytes(MAX_HOST_MEMORY)} can be simulated; see docs/not-modelled.md`,
    );
  }
  const dram = sharedBuffer(hostBytes, 'host memory');
  return { dram, ledger: sharedBuffer(ledgerBytes(hostBytes / PAGE_SIZE), 'frame ledger'), kept: new Map() };
}

/** Bytes of shared memory that a run of `spec` takes in all, where `hostBytes` are the host's. */
function bytesOf(spec: RunSpec, hostBytes: number): number {
  const vms = spec.vms.reduce((sum, vm) => sum + Arena.bytes(vm.guest.maxPfn), 0);
  return hostBytes + ledgerBytes(hostBytes / PAGE_SIZE) + vms;
}

/** Everything else of one run. The ledger is emptied; DRAM keeps its bytes, which nobody may see. */
export function runBuffers(spec: RunSpec, host: HostBuffers, ramBytes: number = totalmem()): RunBuffers {
  for (const { guest } of spec.vms)
    if (guest.maxPfn > MAX_GUEST_PFN)
      throw new UserError(
        `guest memory up to ${formatBytes(guest.maxPfn * PAGE_SIZE)}: a guest's memory ends at ${formatBytes(MAX_GUEST_PFN * PAGE_SIZE)} at the latest`,
      );
  const needed = bytesOf(spec, host.dram.byteLength);
  if (needed > ramBytes)
    throw new UserError(
      `this run may need ${formatBytes(needed)}, this machine has ${formatBytes(ramBytes)}; ask for less memory or fewer VMs`,
    );
  new Int32Array(host.ledger).fill(0);
  // A guest that booted has written its zones' number into its arena.
  const booted = spec.vms.map((_, k) => {
    const arena = host.kept.get(`arena ${k}`);
    return arena !== undefined && new Int32Array(arena, 0, 16)[H_NR_ZONES] !== 0;
  });
  return {
    dram: host.dram,
    ledger: host.ledger,
    violations: sharedBuffer(VIOLATION_BYTES, 'violation log'),
    handles: spec.vms.map((vm, k) =>
      keptBuffer(
        host,
        `handles ${k}`,
        vm.program.kind === 'replay'
          ? handleBytes(vm.program.plan)
          : vm.program.kind === 'agent'
            ? AGENT_BYTES
            : 4,
        'handle table',
        booted[k],
      ),
    ),
    arenas: spec.vms.map((vm, k) =>
      keptBuffer(host, `arena ${k}`, Arena.bytes(vm.guest.maxPfn), 'guest kernel arena', booted[k]),
    ),
    // Last: they take address space that the others may need.
    control: sharedBuffer(
      spec.vms.length * spec.vcpusPerVm * VCPU_BLOCK_BYTES,
      'control blocks',
      pageAligned,
    ),
    runControl: sharedBuffer(RUN_CONTROL_BYTES, 'run control', pageAligned),
  };
}
