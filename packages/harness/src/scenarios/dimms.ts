/** Scenarios of plain memory hotplug: DIMMs in slots, and why virtio-mem was made (H58). */
import {
  eventSum,
  LINUX_HOTPLUG,
  Z_FREE,
  Z_TYPE,
  ZONE_DMA32,
  ZONE_MOVABLE,
  zoneBases,
  type Arena,
  type GuestConfig,
  type HotplugConfig,
} from '@ebb/guest-kernel';
import type { Dimm } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_MUST_TELL_HOST } from '@ebb/virtio/uapi';
import type { VmSpec } from '../run/spec.ts';
import { atLeast, clean, exactly, freshGuest, holds, second, spec, type Scenario } from './scenario.ts';

/** Where DIMMs go: above the hole below 4 GiB. */
const DIMMS_ADDR: number = 4 * GiB;

const dimm = (id: string, at: number, bytes: number): Dimm => ({ id, addr: DIMMS_ADDR + at, bytes, node: 0 });

/** A guest of `bytes` that can have 2 GiB more in `slots` slots. */
function guestWithSlots(bytes: number, over: Partial<HotplugConfig> = {}): GuestConfig {
  return {
    ...freshGuest(bytes),
    maxPfn: (DIMMS_ADDR + 2 * GiB) / PAGE_SIZE,
    hotplug: { ...LINUX_HOTPLUG, devices: 0, dimms: 2, ...over },
  };
}

/** Free bytes in a guest's Movable zones. */
function freeMovable({ w }: Arena): number {
  const zones = zoneBases(w).filter((z) => w[z + Z_TYPE] === ZONE_MOVABLE);
  return zones.reduce((sum, z) => sum + w[z + Z_FREE] * PAGE_SIZE, 0);
}

export const DIMM_SCENARIOS: readonly Scenario[] = [
  {
    name: 'dimm-hotplug',
    about:
      'DIMMs in two slots: a size the guest cannot take, a slot too few, memory in use that blocks a whole DIMM, kernel memory that Movable cannot give, requests that fail without a word and are made again; and a DIMM beside virtio-mem, and beside a balloon whose pages lie in it',
    rows: 'H22, H58; I4, I9, I20',
    spec: () => {
      const region = {
        id: 'vm0',
        addr: DIMMS_ADDR + 1 * GiB,
        regionBytes: 256 * MiB,
        blockBytes: 2 * MiB,
        node: 0,
        requestedBytes: 256 * MiB,
        profile: 'qemu' as const,
      };
      return spec(
        1 * GiB,
        [
          {
            bootAtNs: 0,
            guest: guestWithSlots(128 * MiB),
            program: holds(20000, second(2), second(3)),
            dimms: {
              slots: 2,
              orders: [
                // One and a half memory blocks.
                [second(0.5), { plug: dimm('odd', 0, 192 * MiB) }],
                [second(1), { unplug: 'odd' }],
                [second(1.5), { plug: dimm('d0', 0, 128 * MiB) }],
                [second(1.6), { plug: dimm('d1', 256 * MiB, 256 * MiB) }],
                [second(1.7), { plug: dimm('d2', 512 * MiB, 128 * MiB) }],
                [second(3), { unplug: 'd1' }],
                [second(4), { unplug: 'd1' }],
                // Nothing is in use any more, but the memmap of `d1`, which lies in `d0`.
                [second(6), { unplug: 'd0' }],
                [second(7), { unplug: 'd1' }],
                [second(8), { unplug: 'd0' }],
              ],
            },
            diskBytes: 0,
          },
          {
            bootAtNs: 0,
            guest: guestWithSlots(128 * MiB, { devices: 1 }),
            program: holds(4096, second(4), second(1)),
            memoryDevices: [region],
            dimms: {
              slots: 2,
              orders: [
                [second(1), { plug: dimm('d0', 0, 256 * MiB) }],
                [second(3), { unplug: 'd0' }],
              ],
            },
            diskBytes: 0,
          },
          ...[false, true].map(
            (balloonCompaction): VmSpec => ({
              bootAtNs: 0,
              guest: { ...guestWithSlots(128 * MiB), balloon: true, balloonCompaction },
              program: holds(4096, second(4), second(1)),
              balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST],
              balloonTargets: [
                [second(1), 64 * MiB],
                [second(6), 128 * MiB],
              ],
              dimms: {
                slots: 2,
                orders: [
                  [second(0.5), { plug: dimm('d0', 0, 256 * MiB) }],
                  [second(3), { unplug: 'd0' }],
                  [second(7), { unplug: 'd0' }],
                ],
              },
              diskBytes: 0,
            }),
          ),
          {
            bootAtNs: 0,
            // What is added is Movable, so that it can go again; what the kernel needs comes from boot memory alone.
            guest: guestWithSlots(48 * MiB, { policy: 'online_movable', memmapZone: ZONE_DMA32 }),
            program: holds(64, second(4), second(1)),
            dimms: {
              slots: 2,
              orders: [
                [second(1), { plug: dimm('d0', 0, 1 * GiB) }],
                [second(3), { plug: dimm('d1', 1 * GiB, 1 * GiB) }],
              ],
            },
            diskBytes: 0,
          },
        ],
        { graceNs: second(5) },
      );
    },
    checks: (outcome) => {
      const [plain, region, balloon, compacting, ratio] = outcome.result.vms;
      const said = plain.dimms?.refusals.join('; ') ?? '';
      const added = outcome.arenas.map((arena) => eventSum(arena, 'memory_added'));
      return [
        ...clean(outcome),
        { what: 'a slot too few: the VMM says', value: said, ok: said === 'no free slots available' },
        exactly('DIMMs plugged', plain.dimms?.counters.plugged ?? 0, 3),
        // 192 MiB are no whole memory blocks: the guest takes nothing of it.
        exactly('memory blocks the guest added', added[0], 3),
        // One that it could not add, twice memory in use kept a whole DIMM, once the memmap of another did.
        exactly('failures the guest reports', plain.dimms?.counters.failures ?? 0, 4),
        exactly('DIMMs ejected in the end', plain.dimms?.counters.ejected ?? 0, 3),
        exactly('beside virtio-mem: DIMMs ejected', region.dimms?.counters.ejected ?? 0, 1),
        exactly('beside virtio-mem: bytes plugged in its region', region.memoryDevices[0].plugged, 256 * MiB),
        atLeast('beside a balloon: pages it took', balloon.ballooned['inflatedPages'] ?? 0, 16384),
        exactly('beside a balloon: requests that fail', balloon.dimms?.counters.failures ?? 0, 1),
        exactly('once the balloon is empty: DIMMs ejected', balloon.dimms?.counters.ejected ?? 0, 1),
        exactly('with balloon compaction: requests that fail', compacting.dimms?.counters.failures ?? 0, 0),
        atLeast('with balloon compaction: pages moved', eventSum(outcome.arenas[3], 'balloon_migrate'), 1),
        exactly('with balloon compaction: pages left in it', compacting.balloonPages, 0),
        // A sixty-fourth of what is added is kernel memory for its memmap: a gigabyte is free, and of no use for that.
        exactly(
          '48 MiB and a gigabyte of Movable: blocks added, and no more',
          added[4] - eventSum(outcome.arenas[4], 'memory_removed'),
          8,
        ),
        exactly('48 MiB and a gigabyte of Movable: failures', ratio.dimms?.counters.failures ?? 0, 1),
        atLeast(
          '48 MiB and a gigabyte of Movable: bytes free there',
          freeMovable(outcome.arenas[4]),
          900 * MiB,
        ),
      ];
    },
  },
];
