/** What every result carries (so that it can be had again): version, seeds, schedule, costs, backing. */
import { COST_TABLE, costTableHash } from '@ebb/machine';
import type { Backing } from './run/spec.ts';
import { EBB_VERSION } from './version.ts';

export interface Provenance {
  readonly schema: 1;
  readonly ebb: string;
  readonly seeds: readonly number[];
  readonly schedule: 'threads' | 'inline' | 'controlled';
  readonly costTable: string;
  readonly backing: Backing;
  /** Whether the host maps 2 MiB where it can. */
  readonly hugePages: 'always' | 'madvise' | 'never';
}

export function provenance(
  schedule: Provenance['schedule'],
  backing: Backing,
  seeds: readonly number[],
): Provenance {
  return {
    schema: 1,
    ebb: EBB_VERSION,
    seeds,
    schedule,
    costTable: costTableHash(COST_TABLE),
    backing,
    hugePages: backing === 'thp' ? 'always' : backing === 'madvise' ? 'madvise' : 'never',
  };
}
