/** Scenarios of memory that comes and goes by memory devices (virtio-mem). */
import { eventSum, LINUX_HOTPLUG, type GuestConfig, type HotplugConfig } from '@ebb/guest-kernel';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import type { MemoryDeviceSpec } from '../run/spec.ts';
import { atLeast, clean, exactly, freshGuest, second, spec, type Scenario } from './scenario.ts';

/** Where regions begin: above the hole below 4 GiB. */
const REGION_ADDR: number = 4 * GiB;

function device(over: Partial<MemoryDeviceSpec> = {}): MemoryDeviceSpec {
  return {
    id: 'vm0',
    addr: REGION_ADDR,
    regionBytes: 1 * GiB,
    blockBytes: 2 * MiB,
    node: 0,
    requestedBytes: 0,
    profile: 'qemu',
    ...over,
  };
}

/** A freshly booted guest of `bytes` with drivers for `devices`. */
function hotplugGuest(
  bytes: number,
  devices: readonly MemoryDeviceSpec[],
  over: Partial<HotplugConfig> = {},
): GuestConfig {
  const boot = freshGuest(bytes);
  const end = Math.max(...devices.map((d) => d.addr + d.regionBytes));
  return {
    ...boot,
    maxPfn: end / PAGE_SIZE,
    hotplug: { ...LINUX_HOTPLUG, devices: devices.length, ...over },
  };
}

export const MEMORY_DEVICE_SCENARIOS: readonly Scenario[] = [
  {
    name: 'virtio-mem-resize',
    about:
      'grows a 256 MiB guest by 768 MiB, block by block, uses it, shrinks it to nothing, and grows it again: holes are filled first',
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
];
