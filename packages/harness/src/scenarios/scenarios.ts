/**
 * Scenarios of `ebb run`: small runs that drive one mechanism end to end through guest loads and stores, rings and EPT,
 * in real threads or inline, and say what they saw. Each ends in checks; a failed check is exit code 1.
 */
import { eventSum } from '@ebb/guest-kernel';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import {
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import type { RunSpec } from '../run/spec.ts';
import { DIMM_SCENARIOS } from './dimms.ts';
import { ANY_MEMORY_SCENARIOS } from './any-memory.ts';
import { MEMORY_DEVICE_SCENARIOS } from './memory-device.ts';
import { MEMORY_DEVICE_VARIANTS } from './memory-device-variants.ts';
import { REBOOT_SCENARIOS } from './reboot-elsewhere.ts';
import { atLeast, clean, exactly, freshGuest, second, spec, type Scenario } from './scenario.ts';
import { UNPLUGGED_MEMORY_SCENARIOS } from './unplugged-memory.ts';

const HOST_FOR_THREE: number = 800 * MiB;

/** Four guests, one after the other, each of which uses 192 MiB and gives it back, on a host for three. */
const fourVms = (balloonFeatures: readonly number[]): RunSpec =>
  spec(
    HOST_FOR_THREE,
    Array.from({ length: 4 }, (_, k) => ({
      bootAtNs: second(6 * k),
      guest: freshGuest(256 * MiB, { balloon: true }),
      program: {
        kind: 'touch-free',
        pages: 24576,
        order: 0,
        rounds: 1,
        holdNs: second(0.5),
        pauseNs: second(1),
      } as const,
      balloonFeatures,
      diskBytes: 0,
    })),
  );

export const SCENARIOS: readonly Scenario[] = [
  {
    name: 'pressure',
    about:
      'less memory than files, two nodes, two vCPUs: kswapd, direct reclaim, write-back and the OOM notifier; every byte read back',
    rows: 'K7, L43, G7; I15, I19',
    spec: (seed) =>
      spec(256 * MiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(96 * MiB, { nodes: 2, balloon: true, blk: true, pagesPerFile: 2048 }),
          program: { kind: 'pressure', files: 8, pagesPerFile: 2048, rounds: 1, seed, hogPages: 20000 },
          balloonFeatures: [
            VIRTIO_BALLOON_F_STATS_VQ,
            VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
            VIRTIO_BALLOON_F_MUST_TELL_HOST,
          ],
          balloonTargets: [[second(0.05), 80 * MiB]],
          diskBytes: 256 * MiB,
        },
      ]),
    checks: (outcome) => {
      const [arena] = outcome.arenas;
      return [
        ...clean(outcome),
        atLeast('pages scanned by kswapd', eventSum(arena, 'pgscan_kswapd'), 1),
        atLeast('pages freed by kswapd', eventSum(arena, 'pgsteal_kswapd'), 1),
        atLeast('pages freed by direct reclaim', eventSum(arena, 'pgsteal_direct'), 1),
        atLeast('pages written back', eventSum(arena, 'writeback_pages'), 1),
        atLeast('OOM notifier calls', eventSum(arena, 'oom_notifier'), 1),
        atLeast('pages read from disk', eventSum(arena, 'pgpgin'), 1),
        exactly('OOM kills', eventSum(arena, 'oom_kill'), 0),
      ];
    },
  },
  {
    name: 'balloon',
    about:
      'inflates a 512 MiB guest to 256 MiB and back; memory really returns, statistics arrive, deflated pages come back zeroed',
    rows: 'H33, L10; I3b, I5, I9',
    spec: () =>
      spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(512 * MiB, { balloon: true }),
          program: {
            kind: 'touch-free',
            pages: 49152,
            order: 0,
            rounds: 2,
            holdNs: second(0.5),
            pauseNs: second(8),
          },
          balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_STATS_VQ],
          balloonTargets: [
            [second(2), 256 * MiB],
            [second(6), 512 * MiB],
          ],
          diskBytes: 0,
        },
      ]),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      return [
        ...clean(outcome),
        exactly('pages inflated', vm.ballooned['inflatedPages'] ?? 0, 65536),
        exactly('pages deflated', vm.ballooned['deflatedPages'] ?? 0, 65536),
        atLeast('bytes returned to the host', vm.returnedBytes, 64 * MiB),
        atLeast('statistics received', vm.ballooned['statsUpdates'] ?? 0, 1),
        atLeast('TLB flushes', vm.tlbFlushes, 1),
      ];
    },
  },
  {
    name: 'churn',
    about:
      'the balloon goes up and down while both vCPUs allocate, touch and free: faults meet invalidations, and look again (in threads)',
    rows: 'Y16, Y19, K26; I4, I9, I17, I24',
    spec: () =>
      spec(
        512 * MiB,
        [
          {
            bootAtNs: 0,
            guest: freshGuest(256 * MiB, { balloon: true }),
            program: {
              kind: 'touch-free',
              pages: 6144,
              order: 0,
              rounds: 160,
              holdNs: second(0.004),
              pauseNs: second(0.004),
            },
            balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST],
            balloonTargets: Array.from({ length: 40 }, (_, i) => [
              second(0.1 + 0.05 * i),
              (i % 2 === 0 ? 96 : 256) * MiB,
            ]),
            diskBytes: 0,
          },
        ],
        { backing: '4k' },
      ),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      return [
        ...clean(outcome),
        atLeast('bytes returned to the host', vm.returnedBytes, 64 * MiB),
        atLeast('TLB flushes', vm.tlbFlushes, 100),
        // On one thread a fault and an invalidation never overlap.
        atLeast('faults that looked again', vm.faultRetries, outcome.schedule === 'threads' ? 1 : 0),
      ];
    },
  },
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
          program: { kind: 'touch-free', pages: 8192, order: 0, rounds: 1, holdNs: second(0.1), pauseNs: 0 },
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
          program: { kind: 'touch-free', pages: 65536, order: 0, rounds: 1, holdNs: second(2), pauseNs: 0 },
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
    name: 'reporting',
    about: 'touches and frees 256 MiB; free page reporting gives it back within seconds of virtual time (L9)',
    rows: 'L9, L24, L25, L28; I3, I3b',
    spec: () =>
      spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(512 * MiB, { balloon: true }),
          program: {
            kind: 'touch-free',
            pages: 32768,
            order: 0,
            rounds: 2,
            holdNs: second(0.5),
            pauseNs: second(10),
          },
          balloonFeatures: [VIRTIO_BALLOON_F_REPORTING],
          diskBytes: 0,
        },
      ]),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      return [
        ...clean(outcome),
        atLeast('pages reported', vm.ballooned['reportedPages'] ?? 0, 32768),
        atLeast('bytes returned to the host', vm.returnedBytes, 200 * MiB),
        {
          what: 'requests of at most 32 ranges',
          value: vm.ballooned['reportRequests'] ?? 0,
          ok: (vm.ballooned['reportedRanges'] ?? 0) <= 32 * (vm.ballooned['reportRequests'] ?? 0),
        },
      ];
    },
  },
  {
    name: 'hinting',
    about:
      'a round of free page hinting: the host starts it, gets a bitmap of free pages, ends it; the guest keeps every page',
    rows: 'G62; L9',
    spec: () =>
      spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(512 * MiB, { balloon: true }),
          program: {
            kind: 'touch-free',
            pages: 8192,
            order: 0,
            rounds: 3,
            holdNs: second(0.5),
            pauseNs: second(1),
          },
          balloonFeatures: [VIRTIO_BALLOON_F_FREE_PAGE_HINT],
          hintRounds: [[second(0.7), second(1.2)]],
          diskBytes: 0,
        },
      ]),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      return [
        ...clean(outcome),
        atLeast('pages hinted', vm.hintedPages, 32768),
        exactly('bytes returned to the host', vm.returnedBytes, 0),
        exactly('hints under a stale command id', vm.ballooned['staleHints'] ?? 0, 0),
      ];
    },
  },
  {
    name: 'poison',
    about:
      'a guest that poisons freed pages: reporting is negotiated, nothing is discarded, and the poison survives',
    rows: 'L28; poison_val',
    spec: () =>
      spec(512 * MiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(256 * MiB, { balloon: true, poison: true }),
          program: {
            kind: 'touch-free',
            pages: 8192,
            order: 0,
            rounds: 3,
            holdNs: second(0.1),
            pauseNs: second(3),
          },
          balloonFeatures: [VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_PAGE_POISON],
          diskBytes: 0,
        },
      ]),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      return [
        ...clean(outcome),
        atLeast('ranges skipped', vm.ballooned['skippedRanges'] ?? 0, 1),
        exactly('pages discarded', vm.ballooned['discardedPages'] ?? 0, 0),
        atLeast('poison checked', eventSum(outcome.arenas[0], 'poison_checked'), 1),
      ];
    },
  },
  {
    name: 'hostile-balloon',
    about:
      'a guest writes to every page it has put in its balloon: it gets the memory again, and the host counts it (H33)',
    rows: 'H1, H33; I5',
    spec: () =>
      spec(512 * MiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(256 * MiB, { balloon: true }),
          program: { kind: 'hostile-reuse', afterNs: second(3) },
          balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ],
          balloonTargets: [[second(0.5), 192 * MiB]],
          diskBytes: 0,
        },
      ]),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      return [
        ...clean(outcome),
        exactly('pages in the balloon', vm.balloonPages, 16384),
        exactly('balloon pages with memory behind them', vm.reusedBalloonPages, 16384),
      ];
    },
  },
  {
    name: 'large-backing',
    about:
      'a balloon on 2 MiB host pages: a host page is freed only when all of its 4 KiB parts are in the balloon',
    rows: 'G10, H29; partial pages',
    spec: () =>
      spec(
        512 * MiB,
        [
          {
            bootAtNs: 0,
            guest: freshGuest(256 * MiB, { balloon: true }),
            program: {
              kind: 'touch-free',
              pages: 4096,
              order: 0,
              rounds: 3,
              holdNs: second(1),
              pauseNs: second(1),
            },
            balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ],
            balloonTargets: [[second(0.5), 160 * MiB]],
            diskBytes: 0,
          },
        ],
        { backing: 'hugetlb' },
      ),
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      const inflated = vm.ballooned['inflatedPages'] ?? 0;
      return [
        ...clean(outcome),
        exactly('pages inflated', inflated, 24576),
        {
          what: 'bytes returned, in whole 2 MiB pages',
          value: vm.returnedBytes,
          ok: vm.returnedBytes % (2 * MiB) === 0 && vm.returnedBytes <= inflated * PAGE_SIZE,
        },
        atLeast('bytes returned', vm.returnedBytes, 64 * MiB),
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
  ...MEMORY_DEVICE_SCENARIOS,
  ...MEMORY_DEVICE_VARIANTS,
  ...ANY_MEMORY_SCENARIOS,
  ...REBOOT_SCENARIOS,
  ...UNPLUGGED_MEMORY_SCENARIOS,
  ...DIMM_SCENARIOS,
];
