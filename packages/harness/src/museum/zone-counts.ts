/** An exhibit with a whole guest kernel: balloon pages that move between zones (Linux 63341ab03706). */
import {
  Arena,
  LINUX_HOTPLUG,
  Z_MANAGED,
  Z_PRESENT,
  Z_TYPE,
  ZONE_NORMAL,
  zoneBases,
} from '@ebb/guest-kernel';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_MUST_TELL_HOST } from '@ebb/virtio/uapi';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { runInline } from '../run/inline-run.ts';
import { fileStorage } from '../run/file-storage.ts';
import { freshGuest, holds, second, spec } from '../scenarios/scenario.ts';
import type { Exhibit } from './exhibits.ts';

const DIMM = { id: 'd0', addr: 4 * GiB, bytes: 128 * MiB, node: 0 };

export const ZONE_COUNTS: Exhibit = {
  name: 'linux-63341ab03706',
  about:
    'balloon pages are moved out of a DIMM that goes: counted in the zone they left, and not in the one they went to, memory that is gone still counts',
  rows: 'H22, H34',
  show(broken) {
    const guest = {
      ...freshGuest(128 * MiB, { balloon: true }),
      maxPfn: (DIMM.addr + DIMM.bytes) / PAGE_SIZE,
      balloonCompaction: broken ? ('miscounts' as const) : true,
      hotplug: { ...LINUX_HOTPLUG, devices: 0, dimms: 1 },
    };
    const run = spec(
      512 * MiB,
      [
        {
          bootAtNs: 0,
          guest,
          program: holds(1, second(4), 0),
          balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST],
          balloonTargets: [[second(1), 96 * MiB]],
          dimms: {
            slots: 1,
            orders: [
              [second(0.5), { plug: DIMM }],
              [second(3), { unplug: DIMM.id }],
            ],
          },
          diskBytes: 0,
        },
      ],
      { graceNs: second(1) },
    );
    const buffers = runBuffers(run, hostBuffers(512 * MiB));
    const { result } = runInline(run, buffers, (_vm, bytes) => fileStorage(bytes));
    const { w } = new Arena(buffers.arenas[0], guest.maxPfn);
    const normal = zoneBases(w).find((z) => w[z + Z_TYPE] === ZONE_NORMAL) ?? 0;
    const [vm] = result.vms;
    return [
      {
        what: 'DIMMs that went',
        value: vm.dimms?.counters.ejected ?? 0,
        ok: vm.dimms?.counters.ejected === 1,
      },
      {
        what: 'pages in the balloon',
        value: vm.balloonPages,
        ok: vm.balloonPages === (32 * MiB) / PAGE_SIZE,
      },
      {
        what: 'pages there are in zone Normal',
        value: w[normal + Z_PRESENT],
        ok: w[normal + Z_PRESENT] === 0,
      },
      {
        what: 'pages zone Normal says it manages',
        value: w[normal + Z_MANAGED],
        ok: (w[normal + Z_MANAGED] === 0) !== broken,
      },
    ];
  },
};
