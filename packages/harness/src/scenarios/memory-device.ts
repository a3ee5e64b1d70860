/** Scenarios of memory that comes and goes by memory devices (virtio-mem). */
import {
  eventSum,
  H_TOTAL_PAGES,
  LINUX_HOTPLUG,
  Z_NODE,
  Z_PRESENT,
  Z_TYPE,
  ZONE_DMA32,
  ZONE_MOVABLE,
  zoneBases,
  type Arena,
  type GuestConfig,
  type HotplugConfig,
} from '@ebb/guest-kernel';
import type { RebootPolicy } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_MUST_TELL_HOST } from '@ebb/virtio/uapi';
import type { VmSpec } from '../run/spec.ts';
import { device, hotplugGuest, REGION_ADDR } from './hotplug-guest.ts';
import { atLeast, clean, exactly, freshGuest, holds, second, spec, type Scenario } from './scenario.ts';

/** Bytes present in a node's Movable zone. */
function movable(arena: Arena, node: number): number {
  const { w } = arena;
  return zoneBases(w)
    .filter((z) => w[z + Z_NODE] === node && w[z + Z_TYPE] === ZONE_MOVABLE)
    .reduce((sum, z) => sum + w[z + Z_PRESENT] * PAGE_SIZE, 0);
}

export const MEMORY_DEVICE_SCENARIOS: readonly Scenario[] = [
  {
    name: 'virtio-mem-resize',
    about:
      'grows a 256 MiB guest by 768 MiB, block by block, shrinks it while it is used, grows it again, holes first, and shrinks it to nothing',
    rows: 'H5–H8, H16, H25, H31; I9, I20',
    spec: () => {
      const devices = [device()];
      return spec(
        1 * GiB,
        [
          {
            bootAtNs: 0,
            guest: hotplugGuest(256 * MiB, devices),
            program: {
              kind: 'touch-free',
              startNs: second(1),
              pages: 65536,
              order: 0,
              rounds: 1,
              holdNs: second(0.5),
              pauseNs: second(1),
            },
            memoryDevices: devices,
            memoryTargets: [
              [second(0), 0, 768 * MiB],
              [second(3), 0, 100 * MiB],
              [second(4), 0, 400 * MiB],
              [second(5), 0, 0],
            ],
            diskBytes: 0,
          },
        ],
        { graceNs: second(5) },
      );
    },
    checks: (outcome) => {
      const [vm] = outcome.result.vms;
      const [mem] = vm.memoryDevices;
      const [arena] = outcome.arenas;
      return [
        ...clean(outcome),
        atLeast('PLUG requests', mem.counters.plugRequests, 7),
        atLeast('UNPLUG requests', mem.counters.unplugRequests, 5),
        exactly('requests refused', mem.counters.errors + mem.counters.nacks, 0),
        exactly('bytes plugged at the end', mem.plugged, 0),
        exactly('host bytes behind the region at the end', mem.host, 0),
        exactly(
          'memory blocks added and removed again',
          eventSum(arena, 'memory_added') - eventSum(arena, 'memory_removed'),
          0,
        ),
        atLeast('bytes returned to the host', vm.returnedBytes, 256 * MiB),
      ];
    },
  },
  {
    name: 'virtio-mem-memmap',
    about:
      'a guest that has not the memory for the memmap of what it is given: the plug is taken back, and tried again when there is',
    rows: 'H24, H31; I20, I24',
    spec: () => {
      const devices = [device({ regionBytes: 2 * GiB })];
      return spec(
        2 * GiB,
        [
          {
            bootAtNs: 0,
            // All of it Movable: what the kernel needs, memmaps too, has to come from boot memory.
            guest: hotplugGuest(64 * MiB, devices, { policy: 'online_movable', memmapZone: ZONE_DMA32 }),
            // Both vCPUs hold most of it when the memory is offered.
            program: holds(4600, second(1), second(20)),
            diskBytes: 0,
            memoryDevices: devices,
            memoryTargets: [[second(2), 0, 1 * GiB]] as const,
          },
        ],
        { graceNs: second(60) },
      );
    },
    checks: (outcome) => {
      const [{ memoryDevices }] = outcome.result.vms;
      const [{ plugged, counters }] = memoryDevices;
      const [arena] = outcome.arenas;
      return [
        ...clean(outcome),
        exactly('bytes plugged in the end', plugged, 1 * GiB),
        // 64 bytes per page: 2 MiB per memory block.
        exactly('memory blocks added', eventSum(arena, 'memory_added'), 8),
        atLeast('UNPLUG requests: plugs taken back', counters.unplugRequests, 1),
        exactly('blocks plugged in vain', counters.pluggedBlocks - 512, counters.unpluggedBlocks),
      ];
    },
  },
  {
    name: 'virtio-mem-reboot',
    about:
      'system reset with memory plugged: unplug all and plug again (virtio 1.2), keep what was plugged (RFC), and a kernel without the driver',
    rows: 'H3, H9, H18, H19, H70; I10',
    spec: () => {
      const guest = (over: Partial<HotplugConfig>): GuestConfig => hotplugGuest(256 * MiB, [device()], over);
      const vm = (policy: RebootPolicy, first: GuestConfig, after: GuestConfig = first): VmSpec => ({
        bootAtNs: 0,
        guest: first,
        guestAfterReset: after,
        program: holds(8192, second(4), 0),
        memoryDevices: [device()],
        memoryTargets: [
          [second(0), 0, 512 * MiB],
          [second(2), 0, 300 * MiB],
        ],
        resets: [[second(3), policy]],
        diskBytes: 0,
      });
      const without = freshGuest(256 * MiB);
      return spec(1 * GiB, [
        vm('virtio-1.2', guest({})),
        vm('rfc-2017', guest({ adopts: 'adds' })),
        vm('virtio-1.2', guest({}), { ...without, maxPfn: guest({}).maxPfn }),
      ]);
    },
    checks: (outcome) => {
      const [upstream, rfc, bare] = outcome.result.vms.map((vm) => vm.memoryDevices[0]);
      const totals = outcome.arenas.map((arena) => arena.w[H_TOTAL_PAGES] * PAGE_SIZE);
      return [
        ...clean(outcome),
        exactly('virtio-1.2: bytes plugged again', upstream.plugged, 300 * MiB),
        exactly('rfc-2017: bytes that stayed plugged', rfc.plugged, 300 * MiB),
        // Before the reset 212 MiB were unplugged, by the reset the 300 MiB that were left.
        exactly('virtio-1.2: blocks unplugged in all', upstream.counters.unpluggedBlocks, 256),
        exactly('virtio-1.2: PLUG requests, before and after', upstream.counters.plugRequests, 4 + 3),
        exactly('rfc-2017: blocks unplugged in all', rfc.counters.unpluggedBlocks, 256),
        exactly('rfc-2017: PLUG requests, none after the reset', rfc.counters.plugRequests, 4),
        exactly('without the driver: bytes plugged', bare.plugged, 0),
        { what: 'without the driver: memory of the guest', value: totals[2], ok: totals[2] < 256 * MiB },
        atLeast('with it: memory of the guest', totals[0], 512 * MiB),
        atLeast('RFC guest: memory of the guest', totals[1], 512 * MiB),
      ];
    },
  },
  {
    name: 'virtio-mem-numa',
    about:
      'two devices on two nodes, by sub-blocks of 2 MiB and by big blocks of 128 MiB, online_movable: both reach every size, each on its node',
    rows: 'H5, H7, H25, H39; I9',
    spec: () => {
      const devices = [
        device(),
        device({ id: 'vm1', addr: REGION_ADDR + 1 * GiB, blockBytes: 128 * MiB, node: 1 }),
      ];
      const boot = freshGuest(256 * MiB, { nodes: 2 });
      return spec(
        1 * GiB,
        [
          {
            bootAtNs: 0,
            guest: {
              ...boot,
              maxPfn: hotplugGuest(256 * MiB, devices).maxPfn,
              hotplug: { ...LINUX_HOTPLUG, devices: 2, policy: 'online_movable' },
            },
            program: {
              kind: 'touch-free',
              startNs: second(1),
              pages: 32768,
              order: 0,
              rounds: 2,
              holdNs: second(0.5),
              pauseNs: second(1.5),
            },
            memoryDevices: devices,
            memoryTargets: [
              [second(0), 0, 384 * MiB],
              [second(0), 1, 512 * MiB],
              [second(2), 0, 64 * MiB],
              [second(2), 1, 128 * MiB],
              [second(6), 0, 0],
              [second(6), 1, 128 * MiB],
            ],
            diskBytes: 0,
          },
        ],
        { graceNs: second(4) },
      );
    },
    checks: (outcome) => {
      const [sub, big] = outcome.result.vms[0].memoryDevices;
      return [
        ...clean(outcome),
        exactly('vm0: blocks plugged, and unplugged again', sub.counters.pluggedBlocks, 192),
        exactly('vm0: bytes plugged at the end', sub.plugged, 0),
        exactly('vm0: host bytes behind its region', sub.host, 0),
        exactly('vm1: PLUG requests, one per big block', big.counters.plugRequests, 4),
        exactly('vm1: bytes plugged at the end', big.plugged, 128 * MiB),
        exactly('node 0: movable memory', movable(outcome.arenas[0], 0), 0),
        exactly('node 1: movable memory', movable(outcome.arenas[0], 1), 128 * MiB),
      ];
    },
  },
  {
    name: 'virtio-mem-migrate',
    about:
      'files are read and written from memory that is being unplugged: cached pages move out of the way, and every byte is right',
    rows: 'H16, H25; I15, I20, I22',
    spec: (seed) => {
      const devices = [device({ requestedBytes: 512 * MiB })];
      return spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: {
            ...hotplugGuest(256 * MiB, devices, { policy: 'online_movable' }),
            blk: true,
            blocks: { kind: 'linear', pagesPerFile: 4096 },
          },
          program: { kind: 'pressure', files: 4, pagesPerFile: 4096, rounds: 4, seed, hogPages: 0 },
          memoryDevices: devices,
          memoryTargets: [
            [second(0.1), 0, 256 * MiB],
            [second(0.2), 0, 512 * MiB],
            [second(0.3), 0, 128 * MiB],
            [second(0.4), 0, 0],
            [second(0.5), 0, 256 * MiB],
            [second(0.6), 0, 0],
          ],
          diskBytes: 256 * MiB,
        },
      ]);
    },
    checks: (outcome) => {
      const [mem] = outcome.result.vms[0].memoryDevices;
      return [
        ...clean(outcome),
        atLeast('pages moved', eventSum(outcome.arenas[0], 'pgmigrate_success'), 256),
        atLeast('UNPLUG requests', mem.counters.unplugRequests, 4),
        exactly('bytes plugged at the end', mem.plugged, 0),
      ];
    },
  },
  {
    name: 'virtio-mem-processes',
    about:
      'processes store, fork, share and exit on two vCPUs while memory is unplugged beneath them: pages move, and no store is lost',
    rows: 'H16, H24, H25; I15, I20, I22',
    spec: (seed) => {
      const devices = [device({ requestedBytes: 256 * MiB })];
      return spec(1 * GiB, [
        {
          bootAtNs: 0,
          guest: hotplugGuest(128 * MiB, devices, { policy: 'online_movable' }),
          program: {
            kind: 'processes',
            operations: 30_000,
            processes: 5,
            pages: 512,
            pauseNs: 70_000,
            seed,
          },
          memoryDevices: devices,
          memoryTargets: Array.from(
            { length: 12 },
            (_, i) => [second(0.1 * (i + 1)), 0, (i % 2 === 0 ? 0 : 256) * MiB] as const,
          ),
          diskBytes: 0,
        },
      ]);
    },
    checks: (outcome) => {
      const [arena] = outcome.arenas;
      const [mem] = outcome.result.vms[0].memoryDevices;
      return [
        ...clean(outcome),
        atLeast('page faults', eventSum(arena, 'pgfault'), 1000),
        atLeast('pages copied on write', eventSum(arena, 'cow'), 100),
        atLeast('forks', eventSum(arena, 'fork'), 100),
        atLeast('TLB shootdowns', eventSum(arena, 'tlb_shootdown'), 1000),
        atLeast('pages moved', eventSum(arena, 'pgmigrate_success'), 256),
        atLeast('UNPLUG requests', mem.counters.unplugRequests, 10),
      ];
    },
  },
  {
    name: 'virtio-mem-granularity',
    about:
      'the same 20 MiB for a guest that adds 128 MiB at a time (by sub-blocks), for one that adds 2 MiB, and for one with a balloon beside it',
    rows: 'H17, H23, H34, H72; I9, I20',
    spec: () => {
      const vm = (over: Partial<HotplugConfig>, balloon: boolean): VmSpec => ({
        bootAtNs: 0,
        guest: { ...hotplugGuest(128 * MiB, [device()], over), balloon },
        program: holds(2048, second(1), 0),
        memoryDevices: [device()],
        memoryTargets: [
          [second(0), 0, 20 * MiB],
          [second(2), 0, 6 * MiB],
        ],
        ...(balloon
          ? {
              balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST],
              balloonTargets: [[second(0.5), 96 * MiB] as const],
            }
          : {}),
        diskBytes: 0,
      });
      return spec(1 * GiB, [vm({}, false), vm({ sectionPages: 512 }, false), vm({}, true)], {
        graceNs: second(3),
      });
    },
    checks: (outcome) => {
      const [linux, windows, both] = outcome.result.vms;
      const added = outcome.arenas.map((arena) => eventSum(arena, 'memory_added'));
      return [
        ...clean(outcome),
        exactly('128 MiB at a time: bytes plugged', linux.memoryDevices[0].plugged, 6 * MiB),
        exactly('2 MiB at a time: bytes plugged', windows.memoryDevices[0].plugged, 6 * MiB),
        // Linux with balloon compaction would move them.
        atLeast(
          'beside a balloon, whose pages do not move: bytes plugged',
          both.memoryDevices[0].plugged,
          8 * MiB,
        ),
        exactly('128 MiB at a time: blocks added', added[0], 1),
        exactly('2 MiB at a time: blocks added', added[1], 10),
        exactly('128 MiB at a time: PLUG requests', linux.memoryDevices[0].counters.plugRequests, 1),
        exactly('2 MiB at a time: PLUG requests', windows.memoryDevices[0].counters.plugRequests, 10),
        exactly('beside a balloon: pages in it', both.balloonPages, (32 * MiB) / PAGE_SIZE),
      ];
    },
  },
];
