/** Scenarios of virtio-mem as it might have been, and on other hosts: requests of our own, a page of 64 KiB. */
import { eventSum, LINUX_HOTPLUG, ZONE_DMA32 } from '@ebb/guest-kernel';
import { judgeMemoryDevice } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_MUST_TELL_HOST } from '@ebb/virtio/uapi';
import type { VmSpec } from '../run/spec.ts';
import { device, hotplugGuest, REGION_ADDR } from './hotplug-guest.ts';
import { atLeast, clean, exactly, freshGuest, holds, second, spec, type Scenario } from './scenario.ts';

/** Of a device, from QEMU's default to a memory block of Linux. */
const BLOCK_SIZES = [2, 4, 8, 16, 128].map((mib) => mib * MiB);

export const MEMORY_DEVICE_VARIANTS: readonly Scenario[] = [
  {
    name: 'virtio-mem-exchange',
    about:
      'a shrink leaves one sub-block in each of four memory blocks: guests that trade it for a hole elsewhere give three memmaps back, one page that cannot move forbids it for its block, and without the request nothing happens',
    rows: 'H24, H31, H44, H63; I9, I20',
    spec: () => {
      const sub = (block: number): number => (REGION_ADDR + block * 128 * MiB + 40 * MiB) / PAGE_SIZE;
      const blocks = [0, 1, 2, 3].map(sub);
      const vm = (exchanges: boolean, stays: readonly number[]): VmSpec => ({
        bootAtNs: 0,
        guest: hotplugGuest(256 * MiB, [device()], { memmapZone: ZONE_DMA32 }),
        program: {
          kind: 'agent',
          pins: [
            [second(1), blocks],
            [second(3), stays],
          ],
        },
        memoryDevices: [device({ exchanges })],
        memoryTargets: [
          [second(0), 0, 512 * MiB],
          [second(2), 0, 8 * MiB],
        ],
        diskBytes: 0,
      });
      return spec(1 * GiB, [vm(false, []), vm(true, []), vm(true, [sub(1), sub(2)])], {
        graceNs: second(120),
      });
    },
    checks: (outcome) => {
      const [without, trades, pinned] = outcome.result.vms.map((vm) => vm.memoryDevices[0]);
      const kept = outcome.arenas.map(
        (arena) => eventSum(arena, 'memory_added') - eventSum(arena, 'memory_removed'),
      );
      return [
        ...clean(outcome),
        exactly('without it: bytes plugged', without.plugged, 8 * MiB),
        exactly('without it: memory blocks, each with a memmap of 2 MiB', kept[0], 4),
        exactly('with it: bytes plugged, the same', trades.plugged, 8 * MiB),
        exactly('with it: memory blocks', kept[1], 1),
        exactly('with it: sub-blocks traded', trades.counters.exchangeRequests, 3),
        // All 512 pages stay where one must; a balloon would have traded the other 511.
        exactly('a page in two of them that cannot move: memory blocks', kept[2], 2),
        exactly('a page in two of them that cannot move: bytes plugged', pinned.plugged, 8 * MiB),
      ];
    },
  },
  {
    name: 'virtio-mem-host-64k',
    about:
      'a guest of 4 KiB pages on a host whose smallest page is 64 KiB (ppc64, arm64): virtio-mem, whose blocks are larger, gives everything back; the balloon frees what it has sixteen of',
    rows: 'H40, H17; I9',
    spec: () => {
      const vm = (over: Partial<VmSpec>): VmSpec => ({
        bootAtNs: 0,
        guest: hotplugGuest(128 * MiB, [device({ regionBytes: 256 * MiB })]),
        program: holds(8192, second(1), second(1)),
        diskBytes: 0,
        ...over,
      });
      const devices = [device({ regionBytes: 256 * MiB })];
      return spec(
        1 * GiB,
        [
          vm({
            memoryDevices: devices,
            memoryTargets: [
              [second(0), 0, 256 * MiB],
              [second(4), 0, 0],
            ],
          }),
          vm({
            guest: freshGuest(256 * MiB, { balloon: true }),
            balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST],
            // 4 KiB pages that are not sixteen side by side are worth nothing yet.
            balloonTargets: [[second(4), 256 * MiB - 100 * 4096]],
          }),
        ],
        { backing: '64k', graceNs: second(4) },
      );
    },
    checks: (outcome) => {
      const [mem, balloon] = outcome.result.vms;
      const blockBelowPage = judgeMemoryDevice({
        ...device({ blockBytes: 1 * MiB }),
        region: { pageBytes: 2 * MiB },
      });
      return [
        ...clean(outcome),
        exactly('virtio-mem: bytes plugged at the end', mem.memoryDevices[0].plugged, 0),
        exactly('virtio-mem: host bytes behind its region', mem.memoryDevices[0].host, 0),
        exactly('balloon: pages in it', balloon.balloonPages, 100),
        exactly('balloon: bytes freed, in pages of 64 KiB', balloon.returnedBytes % (64 * 1024), 0),
        {
          what: 'balloon: bytes freed',
          value: balloon.returnedBytes,
          ok: balloon.returnedBytes < 100 * 4096,
        },
        exactly('a block below the host page: refused', blockBelowPage === '' ? 0 : 1, 1),
      ];
    },
  },
  {
    name: 'virtio-mem-asks',
    about:
      'two guests run out of memory and ask the host for more: one host grants; the other denies, and its guest takes pages back from its balloon',
    rows: 'H34, H37; I9, I24',
    spec: () => {
      const bytes = 256 * MiB;
      // The upper half comes and goes; its memmap is among boot memory, or who has nothing left could not add it (H31).
      const upper = device({
        addr: 128 * MiB,
        regionBytes: 128 * MiB,
        requestedBytes: 128 * MiB,
        pluggedBytes: 128 * MiB,
      });
      const vm = (grants: 'all' | 'none'): VmSpec => ({
        bootAtNs: 0,
        guest: {
          ...freshGuest(bytes, { balloon: true }),
          hotplug: { ...LINUX_HOTPLUG, devices: 1, adopts: 'in-place' },
        },
        // More than is left, less than both have in reserve.
        program: holds(12000, second(2), second(1)),
        memoryDevices: [{ ...upper, grants }],
        memoryTargets: [[second(0.1), 0, 0]],
        balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_DEFLATE_ON_OOM],
        balloonTargets: [[second(1), bytes - 48 * MiB]],
        diskBytes: 0,
      });
      return spec(1 * GiB, [vm('all'), vm('none')], { graceNs: second(1) });
    },
    checks: (outcome) => {
      const [granted, denied] = outcome.result.vms;
      const [grantedMem, deniedMem] = [granted.memoryDevices[0], denied.memoryDevices[0]];
      return [
        ...clean(outcome),
        atLeast('granted: requests for more', grantedMem.counters.moreRequests, 1),
        atLeast('granted: bytes plugged again', grantedMem.plugged, 64 * MiB),
        atLeast('denied: requests for more', deniedMem.counters.moreRequests, 1),
        exactly('denied: bytes the host lets it have', deniedMem.requested, 0),
        // What was taken back, not what is missing at the end: the driver may have filled it again by then.
        atLeast('denied: pages taken back from the balloon', denied.ballooned['deflatedPages'] ?? 0, 1),
      ];
    },
  },
  {
    name: 'virtio-mem-block-size',
    about:
      'one page in every 16 MiB cannot move: what a shrink to nothing gives back, by the size of a block; larger blocks need fewer requests and give less',
    rows: 'H23, H29, H62; I9, I24',
    spec: () => {
      const every16M = Array.from({ length: 32 }, (_, i) => (REGION_ADDR + i * 16 * MiB) / PAGE_SIZE);
      return spec(
        4 * GiB,
        BLOCK_SIZES.map((blockBytes): VmSpec => {
          const devices = [device({ regionBytes: 512 * MiB, blockBytes })];
          return {
            bootAtNs: 0,
            guest: hotplugGuest(256 * MiB, devices, { memmapZone: ZONE_DMA32 }),
            program: { kind: 'agent', pins: [[second(1), every16M]] },
            memoryDevices: devices,
            memoryTargets: [
              [second(0), 0, 512 * MiB],
              [second(2), 0, 0],
            ],
            diskBytes: 0,
          };
        }),
        { graceNs: second(2) },
      );
    },
    checks: (outcome) => [
      ...clean(outcome),
      ...outcome.result.vms.flatMap((vm, i) => {
        const [{ plugged, counters }] = vm.memoryDevices;
        const block = BLOCK_SIZES[i];
        // A block is kept for one page in it.
        const kept = Math.min(512 * MiB, 32 * block);
        return [
          exactly(`blocks of ${block / MiB} MiB: bytes given back`, 512 * MiB - plugged, 512 * MiB - kept),
          atLeast(
            `blocks of ${block / MiB} MiB: UNPLUG requests`,
            counters.unplugRequests,
            kept < 512 * MiB ? 32 : 0,
          ),
        ];
      }),
    ],
  },
];
