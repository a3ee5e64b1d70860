/**
 * The balloon technique's host-side policy, separate and replaceable: from a guest's statistics, which logical size to
 * ask for. A balloon has no policy of its own; any figure for "balloon" is a figure for a policy.
 */
import { MiB } from '@ebb/machine';
import type { BalloonStats } from '../devices/balloon.ts';

export interface BalloonPolicyInput {
  readonly stats: BalloonStats;
  readonly ramBytes: number;
  /** Bytes in the balloon now, as the guest says. */
  readonly actualBytes: number;
}

/** Returns the logical size wanted, in bytes. Asked once a second. */
export type BalloonPolicy = (input: BalloonPolicyInput) => number;

/** Most that is taken in one step. Real auto-ballooners are this careful: Proxmox 100 MiB, oVirt's MoM 5 %, each in 10 s. */
const INFLATE_STEP: number = 16 * MiB;

/**
 * Keeps an eighth of RAM (at least 32 MiB) free in the guest: takes what is beyond it in small steps, and gives back at
 * once, with a reserve on top, when less than half of it is left. Small differences are left alone.
 */
export const keepReserve: BalloonPolicy = ({ stats, ramBytes, actualBytes }) => {
  const free = stats['stat-free-memory'] ?? 0;
  const reserve = Math.max(32 * MiB, ramBytes / 8);
  const size = ramBytes - actualBytes;
  if (free > reserve + INFLATE_STEP) return size - INFLATE_STEP;
  if (free < reserve / 2) return Math.min(ramBytes, size + 2 * reserve - free);
  return size;
};
