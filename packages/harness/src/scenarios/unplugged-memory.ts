/** Scenarios of who reaches memory that is not plugged, or not his: hostile guests, crash kernels, assigned devices. */
import { ZONE_DMA32 } from '@ebb/guest-kernel';
import { MEMORY_PROFILES, type MemoryProfile } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_MUST_TELL_HOST } from '@ebb/virtio/uapi';
import type { VmResult } from '../run/run-result.ts';
import type { MemoryDeviceSpec, VmSpec } from '../run/spec.ts';
import { device, hotplugGuest, REGION_ADDR } from './hotplug-guest.ts';
import { atLeast, clean, exactly, holds, second, spec, type Scenario } from './scenario.ts';

export const UNPLUGGED_MEMORY_SCENARIOS: readonly Scenario[] = [
  {
    name: 'virtio-mem-hostile',
    about:
      'four guests write to memory they have unplugged, one per device profile: what each gets, and what the host counts',
    rows: 'H10–H12, H32, H66; I2, I20',
    spec: () =>
      spec(
        1 * GiB,
        MEMORY_PROFILES.map((profile) => {
          const devices = [device({ profile, regionBytes: 256 * MiB })];
          return {
            bootAtNs: 0,
            guest: hotplugGuest(128 * MiB, devices),
            program: {
              kind: 'hostile-unplugged' as const,
              afterNs: second(2),
              firstGfn: (REGION_ADDR + 64 * MiB) / PAGE_SIZE,
              pages: 4096,
              rounds: 2,
              reads:
                profile === 'rfc-write-protect' ? 'zeros' : profile === 'scribble' ? 'noise' : 'anything',
            },
            memoryDevices: devices,
            memoryTargets: [
              [second(0), 0, 256 * MiB],
              [second(1), 0, 0],
            ] as const,
            diskBytes: 0,
          };
        }),
      ),
    checks: (outcome) => {
      const of = (profile: MemoryProfile): VmResult => outcome.result.vms[MEMORY_PROFILES.indexOf(profile)];
      const mem = (profile: MemoryProfile): VmResult['memoryDevices'][number] => of(profile).memoryDevices[0];
      return [
        ...clean(outcome),
        ...MEMORY_PROFILES.map((p) => exactly(`${p}: bytes plugged`, mem(p).plugged, 0)),
        atLeast('qemu: host bytes behind unplugged memory', mem('qemu').host, 4096 * PAGE_SIZE),
        exactly('inaccessible: host bytes behind unplugged memory', mem('inaccessible').host, 0),
        // Nothing is plugged, so there is no slot: what a guest reaches for is nobody's.
        atLeast('inaccessible: accesses that met no memory', of('inaccessible').unclaimedMmio, 8192),
        exactly('rfc-write-protect: host bytes behind unplugged memory', mem('rfc-write-protect').host, 0),
        atLeast('rfc-write-protect: writes refused', mem('rfc-write-protect').counters.refusedWrites, 8192),
        atLeast('rfc-write-protect: reads of zeros', mem('rfc-write-protect').counters.zeroReads, 2048),
        atLeast(
          'rfc-write-protect: page tables that hold nothing but zeros',
          of('rfc-write-protect').tables,
          8,
        ),
        atLeast('scribble: host bytes behind unplugged memory', mem('scribble').host, 4096 * PAGE_SIZE),
      ];
    },
  },
  {
    name: 'virtio-mem-blind-read',
    about:
      'a crash kernel reads all memory without asking what is plugged, under each profile: who lets it, and what it costs the host',
    rows: 'H21, H61, H66; I2, I20',
    spec: () =>
      spec(
        1 * GiB,
        MEMORY_PROFILES.map((profile) => {
          const devices = [device({ profile, regionBytes: 256 * MiB, requestedBytes: 64 * MiB })];
          return {
            bootAtNs: 0,
            guest: hotplugGuest(128 * MiB, devices),
            program: {
              kind: 'blind-read' as const,
              startNs: second(2),
              firstGfn: REGION_ADDR / PAGE_SIZE,
              pages: (256 * MiB) / PAGE_SIZE,
            },
            memoryDevices: devices,
            diskBytes: 0,
          };
        }),
      ),
    checks: (outcome) => {
      const of = (profile: MemoryProfile): VmResult => outcome.result.vms[MEMORY_PROFILES.indexOf(profile)];
      const host = (profile: MemoryProfile): number => of(profile).memoryDevices[0].host;
      const unplugged = (192 * MiB) / PAGE_SIZE;
      return [
        ...clean(outcome),
        ...MEMORY_PROFILES.map((p) => exactly(`${p}: pages read`, of(p).events, (256 * MiB) / PAGE_SIZE)),
        // Reading populates: a file has no page of zeros (H61).
        exactly('qemu: reads that found nothing', of('qemu').unclaimedMmio, 0),
        exactly('qemu: host bytes behind the region', host('qemu'), 256 * MiB),
        exactly('scribble: host bytes behind the region', host('scribble'), 256 * MiB),
        // The RFC's promise: reads give zeros, and cost page tables alone.
        exactly('rfc-write-protect: reads that found nothing', of('rfc-write-protect').unclaimedMmio, 0),
        exactly(
          'rfc-write-protect: reads of zeros',
          of('rfc-write-protect').memoryDevices[0].counters.zeroReads,
          unplugged,
        ),
        exactly('rfc-write-protect: host bytes behind the region', host('rfc-write-protect'), 64 * MiB),
        atLeast(
          'rfc-write-protect: page tables full of zeros, more than with qemu',
          of('rfc-write-protect').tables - of('qemu').tables,
          (192 * MiB) / (2 * MiB) / 2,
        ),
        // Here the dump has to know which blocks are plugged.
        exactly('inaccessible: reads that found nothing', of('inaccessible').unclaimedMmio, unplugged),
        exactly('inaccessible: host bytes behind the region', host('inaccessible'), 64 * MiB),
      ];
    },
  },
  {
    name: 'assigned-device',
    about:
      'a device that reaches guest memory by itself, all of it mapped and pinned: the balloon may discard nothing, virtio-mem tells it of each block that comes and goes; beside the same guest without it',
    rows: 'Y19, G20; I4, I9, I18',
    spec: () => {
      const devices = [device({ regionBytes: 256 * MiB })];
      const vm = (over: Partial<VmSpec>): VmSpec => ({
        bootAtNs: 0,
        guest: { ...hotplugGuest(128 * MiB, devices, { policy: 'online_movable' }), balloon: true },
        program: holds(2048, second(6), 0),
        balloonFeatures: [VIRTIO_BALLOON_F_MUST_TELL_HOST],
        balloonTargets: [[second(4), 96 * MiB]],
        memoryDevices: devices,
        memoryTargets: [
          [second(0), 0, 256 * MiB],
          [second(2), 0, 64 * MiB],
        ],
        diskBytes: 0,
        ...over,
      });
      return spec(1 * GiB, [vm({ assigned: { everyNs: second(0.5) } }), vm({})]);
    },
    checks: (outcome) => {
      const [pinned, free] = outcome.result.vms;
      const region = (vm: VmResult): VmResult['memoryDevices'][number] => vm.memoryDevices[0];
      const pages = (bytes: number): number => bytes / PAGE_SIZE;
      return [
        ...clean(outcome),
        exactly(
          'without it: pages the balloon gave back',
          free.ballooned['discardedPages'] ?? 0,
          pages(32 * MiB),
        ),
        exactly('with it: pages in the balloon', pinned.ballooned['inflatedPages'] ?? 0, pages(32 * MiB)),
        exactly('with it: pages the balloon gave back', pinned.ballooned['discardedPages'] ?? 0, 0),
        // The hole at 640 KiB is not mapped.
        exactly(
          'pages it mapped, boot memory and what was plugged',
          pinned.assigned?.mappedPages ?? 0,
          pages(128 * MiB) - 96 + pages(256 * MiB),
        ),
        exactly(
          'pages it let go of, one block after the other',
          pinned.assigned?.unmappedPages ?? 0,
          pages(192 * MiB),
        ),
        exactly('bytes plugged', region(pinned).plugged, 64 * MiB),
        exactly(
          'host bytes behind the region: all that is plugged, and no more',
          region(pinned).host,
          64 * MiB,
        ),
        atLeast('words it read', pinned.assigned?.reads ?? 0, 100_000),
        exactly('accesses its IOMMU refused', pinned.assigned?.iommuFaults ?? 0, 0),
      ];
    },
  },
  {
    name: 'virtio-mem-vmas',
    about:
      'what forbidding unplugged memory costs in mappings, when a shrink leaves every eighth block: by mprotect two for each, up to the limit, where requests are BUSY; by userfaultfd one in all',
    rows: 'H14, H64; I9, I24',
    spec: () => {
      const every8th = Array.from({ length: 32 }, (_, i) => (REGION_ADDR + 8 * i * 2 * MiB) / PAGE_SIZE);
      const vm = (over: Partial<MemoryDeviceSpec>): VmSpec => {
        const devices = [device({ regionBytes: 512 * MiB, profile: 'rfc-write-protect', ...over })];
        return {
          bootAtNs: 0,
          // Its own books stay in boot memory.
          guest: hotplugGuest(256 * MiB, devices, { memmapZone: ZONE_DMA32 }),
          program: { kind: 'agent', pins: [[second(1), every8th]] },
          memoryDevices: devices,
          memoryTargets: [
            [second(0), 0, 512 * MiB],
            [second(2), 0, 64 * MiB],
          ],
          diskBytes: 0,
        };
      };
      return spec(
        2 * GiB,
        [
          vm({ protection: 'userfaultfd' }),
          vm({ protection: 'mprotect' }),
          vm({ protection: 'mprotect', maxMapCount: 20 }),
        ],
        { graceNs: second(2) },
      );
    },
    checks: (outcome) => {
      const [fault, mprotect, limited] = outcome.result.vms.map((vm) => vm.memoryDevices[0]);
      return [
        ...clean(outcome),
        exactly('userfaultfd: bytes plugged', fault.plugged, 64 * MiB),
        exactly('userfaultfd: mappings', fault.vmas, 1),
        exactly('mprotect: bytes plugged', mprotect.plugged, 64 * MiB),
        atLeast('mprotect: mappings', mprotect.vmas, 64),
        atLeast('at the limit: requests that would have made more', limited.counters.mapCountRefusals, 1),
        { what: 'at the limit: mappings', value: limited.vmas, ok: limited.vmas <= 20 },
        {
          what: 'at the limit: bytes that stay plugged',
          value: limited.plugged,
          ok: limited.plugged > 64 * MiB,
        },
      ];
    },
  },
];
