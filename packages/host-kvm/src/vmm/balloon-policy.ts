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

/** Returns the logical size wanted, in bytes. */
export type BalloonPolicy = (input: BalloonPolicyInput) => number;

/**
 * Keeps an eighth of RAM (at least 32 MiB) free in the guest: takes what is beyond it, at most 256 MiB a step, and gives
 * back as soon as less than half of it is left. Small differences are left alone.
 */
export const keepReserve: BalloonPolicy = ({ stats, ramBytes, actualBytes }) => {
  const free = stats['stat-free-memory'] ?? 0;
  const reserve = Math.max(32 * MiB, ramBytes / 8);
  const size = ramBytes - actualBytes;
  if (free > reserve + 16 * MiB) return size - Math.min(free - reserve, 256 * MiB);
  if (free < reserve / 2) return Math.min(ramBytes, size + (reserve - free));
  return size;
};
