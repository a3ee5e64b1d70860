/** What a run is: plain data that every worker gets. */
import type { GuestConfig } from '@ebb/guest-kernel';
import type { Dimm, MemoryProfile, RebootPolicy } from '@ebb/host-kvm';
import type { ReplayPlan } from '../trace/replay-plan.ts';

export type Backing = 'thp' | 'madvise' | '4k' | 'hugetlb' | 'hugetlb-1g' | '64k';
export type Technique = 'none' | 'balloon' | 'reporting' | 'virtio-mem';

/** The program a VM's vCPUs run. */
export type ProgramSpec =
  | { readonly kind: 'replay'; readonly plan: ReplayPlan }
  /** Streams and rewrites files larger than memory and checks every byte; see `pressure-program.ts`. */
  | {
      readonly kind: 'pressure';
      readonly files: number;
      readonly pagesPerFile: number;
      readonly rounds: number;
      readonly seed: number;
      readonly hogPages: number;
    }
  /** Allocates, touches and frees; then idles. */
  | {
      readonly kind: 'touch-free';
      /** When it begins, absolute; at boot without it. */
      readonly startNs?: number;
      readonly pages: number;
      readonly order: number;
      readonly rounds: number;
      readonly holdNs: number;
      readonly pauseNs: number;
    }
  /** Reads and writes a range that its driver has unplugged; `reads`: what it must find there, anything else is a failure. */
  | {
      readonly kind: 'hostile-unplugged';
      readonly afterNs: number;
      readonly firstGfn: number;
      readonly pages: number;
      readonly rounds: number;
      readonly reads: 'zeros' | 'noise' | 'anything';
    }
  /** Reads a word of every page of a range, whatever is there (a crash kernel's dump). */
  | {
      readonly kind: 'blind-read';
      readonly startNs: number;
      readonly firstGfn: number;
      readonly pages: number;
    }
  /** Processes that map, store, fork, share and exit; each vCPU has up to `processes` of `pages` pages. */
  | {
      readonly kind: 'processes';
      readonly operations: number;
      readonly processes: number;
      readonly pages: number;
      /** Virtual time between operations. */
      readonly pauseNs: number;
      readonly seed: number;
    }
  /** Does what it is told from outside, by the words of `agent.ts`; idle otherwise. */
  | {
      readonly kind: 'agent';
      /** Sub-blocks of 2 MiB, by first page, that hold unmovable memory from a time on; the newest list counts. */
      readonly pins?: readonly (readonly [atNs: number, pfns: readonly number[]])[];
    }
  /** Writes to pages the balloon or reporting holds (H33). */
  | { readonly kind: 'hostile-reuse'; readonly afterNs: number };

export type DimmOrder = { readonly plug: Dimm } | { readonly unplug: string };

/** A memory device of a VM. Sizes in bytes. */
export interface MemoryDeviceSpec {
  readonly id: string;
  readonly addr: number;
  readonly regionBytes: number;
  readonly blockBytes: number;
  readonly node: number;
  readonly requestedBytes: number;
  /** Plugged from the start. */
  readonly pluggedBytes?: number;
  /** The guest may ask for more: it gets all that the region has, or nothing (row H37). It may not without this. */
  readonly grants?: 'all' | 'none';
  /** The guest may trade blocks (row H44). */
  readonly exchanges?: boolean;
  /**
   * It has no memory of its own: its region is boot memory and DIMMs that are there, all of which it may take (row H57). With
   * a guest that adopts in place.
   */
  readonly anyMemory?: boolean;
  readonly profile: MemoryProfile;
  /** How the VMM forbids unplugged memory, and how many mappings it may have; userfaultfd and Linux's limit without it. */
  readonly protection?: 'mprotect' | 'userfaultfd';
  readonly maxMapCount?: number;
}

export interface VmSpec {
  readonly bootAtNs: number;
  /** Whether the VMM asked for huge pages (`MADV_HUGEPAGE`), on a host of `madvise`. */
  readonly hugeAdvised?: boolean;
  readonly guest: GuestConfig;
  readonly program: ProgramSpec;
  /** Balloon features to offer; none: no balloon device. */
  readonly balloonFeatures?: readonly number[];
  /** What the size policy sets once a second, from the guest's statistics: nothing without it. */
  readonly policySets?: 'balloon' | 'memory-device';
  /** Logical sizes to set at given times: `[atNs, bytes]`. */
  readonly balloonTargets?: readonly (readonly [number, number])[];
  readonly memoryDevices?: readonly MemoryDeviceSpec[];
  /** A device with all guest memory mapped and pinned (VFIO), which reads it every so often. */
  readonly assigned?: { readonly everyNs: number };
  /** Slots for DIMMs, those that are in from the start, and when one is plugged or asked to go. */
  readonly dimms?: {
    readonly slots: number;
    readonly plugged?: readonly Dimm[];
    readonly orders: readonly (readonly [atNs: number, order: DimmOrder])[];
  };
  /** System resets at given times, and what becomes of plugged memory. */
  readonly resets?: readonly (readonly [number, RebootPolicy])[];
  /**
   * Frames that the host gives the VM at most, as a Xen domain that populates on demand: one that touches more is
   * killed (H60). As many as it has RAM without it.
   */
  readonly populateLimit?: number;
  /** The kernel that is booted after a reset; the same again without it. */
  readonly guestAfterReset?: GuestConfig;
  /** Sizes to request at given times: `[atNs, device, bytes]`. */
  readonly memoryTargets?: readonly (readonly [number, number, number])[];
  /** Rounds of free page hinting: start and stop times. */
  readonly hintRounds?: readonly (readonly [number, number])[];
  /** Disk size in bytes; 0: no disk. */
  readonly diskBytes: number;
}

export interface RunSpec {
  readonly hostFrames: number;
  readonly backing: Backing;
  readonly vms: readonly VmSpec[];
  readonly vcpusPerVm: number;
  /** CPU workers (threads) the vCPUs are spread over. */
  readonly workers: number;
  readonly sampleNs: number;
  /** Virtual time the run goes on after the last program has ended. */
  readonly graceNs: number;
  /** Collect events as native trace text. */
  readonly traceOut: boolean;
  readonly poison: 'edges' | 'full';
}

/** Worker that runs vCPU `vcpu` of VM `vm`: vCPUs of one VM sit on different workers, VMs are rotated. */
export function workerOf(spec: RunSpec, vm: number, vcpu: number): number {
  return (vm + vcpu) % spec.workers;
}

/** Shared memory of a run; made once by main, sent to every worker. */
export interface RunBuffers {
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
  readonly violations: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly runControl: SharedArrayBuffer;
  /** Per VM. */
  readonly arenas: readonly SharedArrayBuffer[];
  readonly handles: readonly SharedArrayBuffer[];
}

/** Per-VM status words in run control, from word 640: bits. */
export const RC_VM = 640;
/** Bit v: vCPU v's program has ended. */
export const VM_FAILED: number = 1 << 16;
export const VM_KILLED: number = 1 << 17;
/** Events applied per VM, from word 704: each vCPU adds its share when it ends a slice. */
export const RC_VM_EVENTS = 704;
/** System resets of each VM, from word 768: a vCPU whose kernel is older boots anew. Written by the host between windows. */
export const RC_VM_BOOTS = 768;
