/**
 * What a property is: a machine, a generator of programs, and what each thread does with its part. Threads are the host
 * (0) and one per vCPU. A program is plain data: it shrinks, and it is saved with a failing case.
 */
import type * as fc from 'fast-check';
import type { HostLab } from './host-lab.ts';
import type { VcpuLab } from './vcpu-lab.ts';
import type { LabShape } from './lab.ts';

/** One operation; what `a` and `b` mean is the property's. */
export interface Op {
  readonly op: string;
  readonly a: number;
  readonly b: number;
}

export interface FuzzProgram {
  readonly host: readonly Op[];
  /** Per vCPU thread: VM 0's vCPUs first. */
  readonly cpus: readonly (readonly Op[])[];
}

/** What a thread did wrong, or saw; empty if nothing. */
export type Verdict = () => readonly string[];

export interface Property {
  readonly name: string;
  readonly about: string;
  /** Invariants and rows of the specification it stands for. */
  readonly rows: string;
  readonly shape: LabShape;
  /** Points of a typical run: PCT spreads its change points over so many. */
  readonly steps: number;
  /** A guest of its rewrites rings while the host reads them: races in DRAM are what it is for. */
  readonly hostileRings?: true;
  readonly program: fc.Arbitrary<FuzzProgram>;
  /** Prepares the host (before the schedule starts): spawns tasks, attaches devices. Its verdict comes after all ended. */
  host(lab: HostLab, program: FuzzProgram): Verdict;
  /** A vCPU thread's whole life, under the schedule. */
  cpu(lab: VcpuLab, program: FuzzProgram, vm: number, id: number): void;
}
