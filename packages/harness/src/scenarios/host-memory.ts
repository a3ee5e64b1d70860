/** What a host has: pages of 2 MiB and 1 GiB, and room for three guests or, with reporting, for more. */
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_REPORTING } from '@ebb/virtio/uapi';
import type { RunSpec } from '../run/spec.ts';
import {
  atLeast,
  clean,
  exactly,
  freshGuest,
  holds,
  second,
  spec,
  turns,
  type Scenario,
} from './scenario.ts';

const HOST_FOR_THREE: number = 800 * MiB;

/** Four guests, one after the other, each of which uses 192 MiB and gives it back, on a host for three. */
const fourVms = (balloonFeatures: readonly number[]): RunSpec =>
  spec(
    HOST_FOR_THREE,
    Array.from({ length: 4 }, (_, k) => ({
      bootAtNs: second(6 * k),
      guest: freshGuest(256 * MiB, { balloon: true }),
      program: turns(24576, 1, second(0.5), second(1)),
      balloonFeatures,
      diskBytes: 0,
    })),
  );

export const HOST_MEMORY_SCENARIOS: readonly Scenario[] = [
  {
    name: 'huge-policy',
    about:
      'two VMs on a host whose huge pages are for those that ask (`madvise`): the one that asked takes fewer faults and tables',
    rows: 'Y2, Y17, Y22; I9',
    spec: () =>
      spec(
        512 * MiB,
        [true, false].map((hugeAdvised) => ({
          bootAtNs: 0,
          hugeAdvised,
          guest: freshGuest(128 * MiB),
          program: holds(8192, 0, second(0.1)),
          diskBytes: 0,
        })),
        { backing: 'madvise' },
      ),
    checks: (outcome) => {
      const [advised, plain] = outcome.result.vms;
      return [
        ...clean(outcome),
        atLeast('leaves of 2 MiB where asked for', advised.leaves['2m'], 32),
        exactly('leaves of 2 MiB elsewhere', plain.leaves['2m'], 0),
        atLeast('leaves of 4 KiB elsewhere', plain.leaves['4k'], 16384),
        atLeast(
          'faults elsewhere, for each where asked for',
          plain.eptViolations / advised.eptViolations,
          10,
        ),
        atLeast('tables elsewhere, more than where asked for', plain.tables - advised.tables, 16),
      ];
    },
  },
  {
    name: 'huge-1g',
    about:
      'RAM in pages of 1 GiB, had while the host is in one piece: one fault and no table maps a gigabyte; the next VM finds none',
    rows: 'Y2, Y53, G10; I9',
    spec: () =>
      spec(
        3 * GiB,
        [0, second(5)].map((bootAtNs) => ({
          bootAtNs,
          guest: freshGuest(2 * GiB),
          program: holds(65536, 0, second(2)),
          diskBytes: 0,
        })),
        { backing: 'hugetlb-1g', poison: 'edges' },
      ),
    checks: (outcome) => {
      const [first, second] = outcome.result.vms;
      return [
        exactly('ledger violations', outcome.result.ledgerViolations, 0),
        { what: 'first VM', value: first.state, ok: first.state === 'finished' },
        {
          what: 'second VM: no gigabyte in one piece is left',
          value: second.state,
          ok: second.state === 'killed',
        },
        exactly('leaves of 1 GiB', first.leaves['1g'], 1),
        // The gigabyte below has the hole at 640 KiB in it.
        atLeast('leaves of 2 MiB', first.leaves['2m'], 64),
        { what: 'tables', value: first.tables, ok: first.tables <= 5 },
      ];
    },
  },
  {
    name: 'three-vms',
    about: 'three guests use and free memory in turn; without reporting a fourth could not start (L1, L2)',
    rows: 'L1, L2, L9',
    spec: () => fourVms([VIRTIO_BALLOON_F_REPORTING]),
    checks: (outcome) => {
      const { vms, hostPeakBytes, hostEndBytes } = outcome.result;
      const touched = vms.reduce((sum, vm) => sum + vm.returnedBytes, hostEndBytes);
      return [
        ...clean(outcome),
        exactly('VMs finished', vms.filter((vm) => vm.state === 'finished').length, 4),
        atLeast('bytes they touched in all: more than the host has', touched, HOST_FOR_THREE + 1),
        { what: 'host peak', value: hostPeakBytes, ok: hostPeakBytes < touched - 128 * MiB },
      ];
    },
  },
  {
    name: 'three-vms-unreported',
    about:
      'the same without reporting: the fourth finds no memory on the host, though the three hold enough that is free (L2)',
    rows: 'L1, L2; I9, I24',
    spec: () => fourVms([]),
    checks: ({ result }) => {
      const three = result.vms.slice(0, 3);
      const free = three.reduce((sum, vm) => sum + vm.guestFreeBytes, 0);
      return [
        exactly('ledger violations', result.ledgerViolations, 0),
        {
          what: 'the run',
          value: result.why,
          ok: result.why === 'VM 3: no host frame was free',
        },
        exactly('VMs finished', three.filter((vm) => vm.state === 'finished').length, 3),
        atLeast('free in the three: more than the fourth would use', free, 2 * 24576 * PAGE_SIZE),
        exactly(
          'bytes returned',
          result.vms.reduce((sum, vm) => sum + vm.returnedBytes, 0),
          0,
        ),
      ];
    },
  },
];
