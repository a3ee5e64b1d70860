/** The balloon and what shares its device: inflating, reporting, hinting, poison, and a guest that keeps no promise. */
import { eventSum } from '@ebb/guest-kernel';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import {
  VIRTIO_BALLOON_F_FREE_PAGE_HINT,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_PAGE_POISON,
  VIRTIO_BALLOON_F_REPORTING,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import { atLeast, clean, exactly, freshGuest, second, spec, turns, type Scenario } from './scenario.ts';

export const BALLOON_SCENARIOS: readonly Scenario[] = [
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
          program: turns(49152, 2, second(0.5), second(8)),
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
            program: turns(6144, 160, second(0.004), second(0.004)),
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
    name: 'reporting',
    about: 'touches and frees 256 MiB; free page reporting gives it back within seconds of virtual time (L9)',
    rows: 'L9, L24, L25, L28; I3, I3b',
    spec: () =>
      spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: freshGuest(512 * MiB, { balloon: true }),
          program: turns(32768, 2, second(0.5), second(10)),
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
          program: turns(8192, 3, second(0.5), second(1)),
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
          program: turns(8192, 3, second(0.1), second(3)),
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
            program: turns(4096, 3, second(1), second(1)),
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
];
