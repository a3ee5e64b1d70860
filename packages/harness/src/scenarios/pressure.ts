/** Less memory than files: reclaim in every form, and every byte read back. */
import { eventSum } from '@ebb/guest-kernel';
import { MiB } from '@ebb/machine';
import {
  VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
  VIRTIO_BALLOON_F_MUST_TELL_HOST,
  VIRTIO_BALLOON_F_STATS_VQ,
} from '@ebb/virtio/uapi';
import { atLeast, clean, exactly, freshGuest, second, spec, type Scenario } from './scenario.ts';

export const PRESSURE: Scenario = {
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
};
