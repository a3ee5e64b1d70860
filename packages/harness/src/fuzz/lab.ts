/**
 * The small machine that properties run on: its shape and its buffers. They are made once and emptied between executions;
 * host objects (`host-lab.ts`) are built afresh, which is cheap at this size.
 */
import { Arena } from '@ebb/guest-kernel';
import {
  ledgerBytes,
  LOCK_ORDER_BYTES,
  PAGE_SIZE,
  RACE_BYTES,
  RUN_CONTROL_BYTES,
  SCHEDULE_BYTES,
  tlbBytes,
  VCPU_BLOCK_BYTES,
  VIOLATION_BYTES,
} from '@ebb/machine';
import { type HugePolicy } from '@ebb/memfs';
import { SERIES_BYTES } from './series.ts';

export interface LabShape {
  /** Host frames. */
  readonly hostPages: number;
  /** RAM of each VM. */
  readonly ramPages: number;
  readonly vms: number;
  readonly vcpus: number;
  readonly huge: HugePolicy;
}

/** A word of run control per vCPU thread from here: 1 when its program has ended. Written by it, read by the host's loop. */
export const RC_DONE = 640;
export const TLB_BITS = 6;
/** Words for the models of a property, in a buffer of their own. */
const MODEL_WORDS = 16384;

export interface LabBuffers {
  readonly shape: LabShape;
  readonly dram: SharedArrayBuffer;
  readonly ledger: SharedArrayBuffer;
  readonly violations: SharedArrayBuffer;
  readonly control: SharedArrayBuffer;
  readonly runControl: SharedArrayBuffer;
  readonly arenas: readonly SharedArrayBuffer[];
  readonly model: SharedArrayBuffer;
  /** TLBs of the vCPUs, and the race detector's memory. */
  readonly tlbs: readonly SharedArrayBuffer[];
  readonly races: SharedArrayBuffer;
  readonly lockOrder: SharedArrayBuffer;
  readonly schedule: SharedArrayBuffer;
  /** Where the threads of a series of executions meet between two of them; see `series.ts`. */
  readonly series: SharedArrayBuffer;
}

export function labBuffers(shape: LabShape): LabBuffers {
  return {
    shape,
    dram: new SharedArrayBuffer(shape.hostPages * PAGE_SIZE),
    ledger: new SharedArrayBuffer(ledgerBytes(shape.hostPages)),
    violations: new SharedArrayBuffer(VIOLATION_BYTES),
    control: new SharedArrayBuffer(shape.vms * shape.vcpus * VCPU_BLOCK_BYTES),
    runControl: new SharedArrayBuffer(RUN_CONTROL_BYTES),
    arenas: Array.from({ length: shape.vms }, () => Arena.create(shape.ramPages)),
    model: new SharedArrayBuffer(MODEL_WORDS * 4),
    tlbs: Array.from({ length: shape.vms * shape.vcpus }, () => new SharedArrayBuffer(tlbBytes(TLB_BITS))),
    races: new SharedArrayBuffer(RACE_BYTES),
    lockOrder: new SharedArrayBuffer(LOCK_ORDER_BYTES),
    schedule: new SharedArrayBuffer(SCHEDULE_BYTES),
    series: new SharedArrayBuffer(SERIES_BYTES),
  };
}

/** Empties everything but DRAM, which the host zeroes frame by frame. */
export function resetLab(lab: LabBuffers): void {
  for (const buffer of [lab.ledger, lab.violations, lab.control, lab.runControl, lab.model, lab.lockOrder])
    new Uint8Array(buffer).fill(0);
  for (const arena of lab.arenas) new Uint8Array(arena).fill(0);
}
