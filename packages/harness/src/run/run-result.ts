/** What a run comes to: figures of the host and of each VM, the timeline, the audit of frames, stalls. Reads; changes nothing. */
import { filePages, freePages, pcpPages, type Arena } from '@ebb/guest-kernel';
import type {
  DimmCounters,
  DimmSlots,
  AssignedDevice,
  AssignedDeviceCounters,
  BalloonDevice,
  BlockDevice,
  FramePool,
  MemoryDevice,
  MemoryDeviceCounters,
  RebootPolicy,
  Vm,
} from '@ebb/host-kvm';
import {
  PAGE_SIZE,
  sharedF64,
  sharedI32,
  VC_STALL_BUCKETS,
  VC_STALL_HIST,
  VC_STALL_MAX_F64,
  VC_STALL_TOTAL_F64,
  VCPU_BLOCK_BYTES,
  VCPU_BLOCK_WORDS,
} from '@ebb/machine';
import type { MemFile } from '@ebb/memfs';
import type { MmioTransport } from '@ebb/virtio/device';
import { VM_FAILED, VM_KILLED, type DimmOrder, type VmSpec } from './spec.ts';

/** One point of the timeline: bytes. */
export interface Sample {
  readonly atNs: number;
  readonly hostUsed: number;
  readonly guests: readonly {
    readonly free: number;
    readonly cached: number;
    readonly used: number;
    readonly balloon: number;
    readonly host: number;
  }[];
}

export interface VmResult {
  readonly state: 'off' | 'running' | 'finished' | 'failed' | 'killed';
  readonly events: number;
  readonly guestFreeBytes: number;
  readonly returnedBytes: number;
  readonly eptViolations: number;
  readonly faultRetries: number;
  readonly tlbFlushes: number;
  /** EPT table frames at the end. */
  readonly tables: number;
  /** EPT leaves installed, by size. */
  readonly leaves: { readonly '4k': number; readonly '2m': number; readonly '1g': number };
  /** Accesses to what is no RAM and no device. */
  readonly unclaimedMmio: number;
  readonly kicks: number;
  readonly descriptors: number;
  readonly balloonPages: number;
  readonly ballooned: Readonly<Record<string, number>>;
  readonly block: Readonly<Record<string, number>>;
  /** H33: pages the guest promised in its balloon and yet has memory behind. */
  readonly reusedBalloonPages: number;
  readonly hintedPages: number;
  readonly memoryDevices: readonly MemoryDeviceResult[];
  readonly dimms: DimmResult | null;
  readonly assigned: Readonly<AssignedDeviceCounters> | null;
}

/** What became of the DIMMs. */
interface DimmResult {
  readonly counters: Readonly<DimmCounters>;
  /** Bytes that are in. */
  readonly bytes: number;
  /** Why the VMM refused, in order. */
  readonly refusals: readonly string[];
}

/** What a memory device came to. Bytes. */
interface MemoryDeviceResult {
  readonly id: string;
  readonly requested: number;
  readonly plugged: number;
  readonly usable: number;
  /** Host bytes behind its region; 0 where it has no memory of its own. */
  readonly host: number;
  /** Mappings that the VMM's protection of unplugged memory takes. */
  readonly vmas: number;
  readonly counters: Readonly<MemoryDeviceCounters>;
}

export interface RunResult {
  readonly ok: boolean;
  /** Why the run failed; empty when it did not. */
  readonly why: string;
  readonly endNs: number;
  readonly hostPeakBytes: number;
  readonly hostEndBytes: number;
  readonly zeroedFrames: number;
  readonly ledgerViolations: number;
  readonly violations: readonly string[];
  readonly stall: {
    readonly total: number;
    readonly p50: number;
    readonly p99: number;
    readonly max: number;
  };
  readonly vms: readonly VmResult[];
  readonly samples: readonly Sample[];
  readonly deviceTrace: readonly string[];
}

/** A VM that has been switched on, as the host's side keeps it. */
export interface RunningVm {
  readonly spec: VmSpec;
  readonly vm: Vm;
  /** Boot memory; the memory devices' regions follow it in `files`. */
  readonly file: MemFile;
  readonly files: readonly MemFile[];
  readonly arena: Arena;
  readonly balloon: BalloonDevice | null;
  readonly block: BlockDevice | null;
  readonly memory: readonly MemoryDevice[];
  /** Their memory, if it is their own. */
  readonly regionFiles: readonly (MemFile | null)[];
  readonly transports: MmioTransport[];
  policyDue: number;
  /** Bytes the policy wanted last; −1 before. */
  policySize: number;
  targets: (readonly [number, number])[];
  resets: (readonly [number, RebootPolicy])[];
  readonly assigned: AssignedDevice | null;
  /** When the assigned device reads next; Infinity without one. */
  assignedDue: number;
  readonly dimms: DimmSlots | null;
  /** What to do with DIMMs, and what could not be done. */
  dimmOrders: (readonly [number, DimmOrder])[];
  readonly dimmRefusals: string[];
  /** Sizes to request of memory devices: time, device, bytes. */
  sizes: (readonly [number, number, number])[];
  hints: { at: number; start: boolean }[];
  hintedPages: number;
}

/** The timeline's point at `now`. */
export function sampleOf(now: number, hostFrames: number, vms: readonly RunningVm[], nrCpus: number): Sample {
  return {
    atNs: now,
    hostUsed: hostFrames * PAGE_SIZE,
    guests: vms.map(({ arena, file, files, memory, balloon: device }) => {
      const free = (freePages(arena) + pcpPages(arena, nrCpus)) * PAGE_SIZE;
      const cached = filePages(arena) * PAGE_SIZE;
      const balloon = (device?.actual ?? 0) * PAGE_SIZE;
      return {
        free,
        cached,
        balloon,
        used:
          file.nrBlocks * PAGE_SIZE +
          memory.reduce((sum, m) => sum + m.pluggedBytes, 0) -
          free -
          cached -
          balloon,
        host: files.reduce((sum, f) => sum + f.assigned, 0) * PAGE_SIZE,
      };
    }),
  };
}

/** What the audit asks of a VM: its files, and how many table frames its MMU holds. */
interface AuditedVm {
  readonly files: readonly MemFile[];
  readonly vm: { readonly mmu: { readonly counters: { readonly tables: number } } };
}

/** Both sums of I9, recounted. An empty string when they hold, else what does not. Only between windows. */
export function auditFrames(pool: FramePool, vms: readonly AuditedVm[]): string {
  const counts = pool.ledger.recount();
  const total = Object.values(counts).reduce((sum, n) => sum + n, 0);
  const outside = pool.ledger.frames - pool.frames;
  if (total !== pool.ledger.frames) return `frames: ${total} accounted of ${pool.ledger.frames}`;
  if (counts.free - outside !== pool.buddy.free)
    return `free frames: ledger ${counts.free - outside}, allocator ${pool.buddy.free}`;
  const files = vms.flatMap((vm) => vm.files);
  const assigned = files.reduce((sum, file) => sum + file.assigned, 0);
  const ram = counts.guestAssigned + counts.memfsUnmapped;
  if (assigned !== ram) return `guest frames: files hold ${assigned}, ledger says ${ram}`;
  const tables = vms.reduce((sum, { vm }) => sum + vm.mmu.counters.tables, 0);
  if (tables !== counts.pageTable)
    return `table frames: MMUs hold ${tables}, ledger says ${counts.pageTable}`;
  for (const file of files) {
    let holes = 0;
    for (const frame of file.blocks) if (frame < 0) holes++;
    if (holes + file.assigned !== file.nrBlocks)
      return `${file.name}: ${holes} holes and ${file.assigned} blocks are not ${file.nrBlocks}`;
  }
  return '';
}

/** Figures of one VM; `running` is undefined if it never started. */
export function vmResult(
  running: RunningVm | undefined,
  status: number,
  finished: boolean,
  events: number,
): VmResult {
  if (running === undefined) {
    return {
      state: 'off',
      events,
      guestFreeBytes: 0,
      returnedBytes: 0,
      eptViolations: 0,
      faultRetries: 0,
      tlbFlushes: 0,
      tables: 0,
      leaves: { '4k': 0, '2m': 0, '1g': 0 },
      unclaimedMmio: 0,
      kicks: 0,
      descriptors: 0,
      balloonPages: 0,
      ballooned: {},
      block: {},
      reusedBalloonPages: 0,
      hintedPages: 0,
      memoryDevices: [],
      dimms: null,
      assigned: null,
    };
  }
  const { vm, balloon, block, arena, transports, file } = running;
  let reused = 0;
  if (balloon !== null)
    for (let pfn = 0; pfn < file.nrBlocks; pfn++)
      if (balloon.ballooned.has(pfn) && file.blocks[pfn] >= 0) reused++;
  return {
    state:
      vm.killed || (status & VM_KILLED) !== 0
        ? 'killed'
        : (status & VM_FAILED) !== 0
          ? 'failed'
          : finished
            ? 'finished'
            : 'running',
    events,
    guestFreeBytes: freePages(arena) * PAGE_SIZE,
    returnedBytes: vm.counters.returnedBytes,
    eptViolations: vm.counters.eptViolations,
    faultRetries: vm.counters.faultRetries,
    tlbFlushes: vm.counters.tlbFlushes,
    tables: vm.mmu.counters.tables,
    leaves: {
      '4k': vm.mmu.counters.mapped4k,
      '2m': vm.mmu.counters.mapped2m,
      '1g': vm.mmu.counters.mapped1g,
    },
    unclaimedMmio: vm.counters.unclaimedMmio,
    kicks: transports.reduce((sum, t) => sum + t.counters.kicks, 0),
    descriptors:
      (balloon?.counters.descriptors ?? 0) +
      (block === null ? 0 : 3 * (block.counters.reads + block.counters.writes)) +
      2 * running.memory.reduce((sum, { counters: c }) => sum + c.acks + c.nacks + c.busys + c.errors, 0),
    balloonPages: balloon?.actual ?? 0,
    ballooned: balloon === null ? {} : { ...balloon.counters },
    block: block === null ? {} : { ...block.counters },
    reusedBalloonPages: reused,
    hintedPages: running.hintedPages,
    memoryDevices: running.memory.map((device, i) => ({
      id: device.id,
      requested: device.requestedBytes,
      plugged: device.pluggedBytes,
      usable: device.usableBytes,
      host: (running.regionFiles[i]?.assigned ?? 0) * PAGE_SIZE,
      vmas: device.unplugged.vmas,
      counters: { ...device.counters },
    })),
    assigned: running.assigned === null ? null : { ...running.assigned.counters },
    dimms:
      running.dimms === null
        ? null
        : {
            counters: { ...running.dimms.counters },
            bytes: running.dimms.dimms.reduce((sum, d) => sum + d.bytes, 0),
            refusals: [...running.dimmRefusals],
          },
  };
}

/** Stalls of all vCPUs that ran; percentiles from the log₂ histogram (quarter-octave steps). */
export function stallsOf(buffer: SharedArrayBuffer, nrVcpus: number): RunResult['stall'] {
  const control = sharedI32('vcpu-control', buffer);
  const f64 = sharedF64('vcpu-control', buffer);
  const histogram = new Float64Array(VC_STALL_BUCKETS);
  let total = 0;
  let max = 0;
  for (let block = 0; block < nrVcpus; block++) {
    total += f64[(block * VCPU_BLOCK_BYTES) / 8 + VC_STALL_TOTAL_F64];
    max = Math.max(max, f64[(block * VCPU_BLOCK_BYTES) / 8 + VC_STALL_MAX_F64]);
    for (let b = 0; b < VC_STALL_BUCKETS; b++)
      histogram[b] += control[block * VCPU_BLOCK_WORDS + VC_STALL_HIST + b];
  }
  const count = histogram.reduce((sum, n) => sum + n, 0);
  const percentile = (share: number): number => {
    let seen = 0;
    for (let b = 0; b < VC_STALL_BUCKETS; b++) {
      seen += histogram[b];
      if (count > 0 && seen >= share * count) return Math.round(Math.min(max, 2 ** (8 + (b + 1) / 4)));
    }
    return 0;
  };
  return { total: Math.round(total), p50: percentile(0.5), p99: percentile(0.99), max: Math.round(max) };
}
