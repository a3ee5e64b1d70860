/**
 * Unplug of any memory (row H57): a device whose region is all memory that the guest has, boot memory and DIMMs, on every
 * node. It was proposed in 2017 and rejected; the scenario shows each of the six reasons as a figure. The device and driver
 * are the same as ever: what differs is that the region holds what others own.
 */
import { LINUX_HOTPLUG, Z_MANAGED, Z_NODE, zoneBases, type Arena, type GuestConfig } from '@ebb/guest-kernel';
import { judgeMemoryDevice } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import type { MemoryDeviceSpec, VmSpec } from '../run/spec.ts';
import { device } from './hotplug-guest.ts';
import { atLeast, clean, exactly, freshGuest, holds, second, spec, type Scenario } from './scenario.ts';

const MEMORY: number = 768 * MiB;
/** Memory that the device may not take: what the kernel booted in. */
const KEPT: number = 128 * MiB;
/** The lower third of the second node is a DIMM; the node's memmap is at its upper end. */
const DIMM = { id: 'dimm0', addr: 384 * MiB, bytes: 128 * MiB, node: 1 };
/** More than there is above the DIMM. */
const TAKEN: number = 320 * MiB;

function anyMemory(over: Partial<MemoryDeviceSpec> = {}): MemoryDeviceSpec {
  const bytes = MEMORY - KEPT;
  return device({
    addr: KEPT,
    regionBytes: bytes,
    requestedBytes: bytes,
    pluggedBytes: bytes,
    anyMemory: true,
    ...over,
  });
}

function guest(): GuestConfig {
  return {
    ...freshGuest(MEMORY, { nodes: 2 }),
    hotplug: { ...LINUX_HOTPLUG, devices: 1, dimms: 1, adopts: 'in-place' },
  };
}

function vm(region: MemoryDeviceSpec, shrinkTo: number): VmSpec {
  return {
    bootAtNs: 0,
    guest: guest(),
    program: holds(8192, second(4), 0),
    memoryDevices: [region],
    memoryTargets: shrinkTo < region.regionBytes ? [[second(1), 0, shrinkTo]] : [],
    dimms: { slots: 1, plugged: [DIMM], orders: [[second(2), { unplug: DIMM.id }]] },
    diskBytes: 0,
  };
}

/** Bytes that a node's zones manage. */
function managed({ w }: Arena, node: number): number {
  return zoneBases(w)
    .filter((z) => w[z + Z_NODE] === node)
    .reduce((sum, z) => sum + w[z + Z_MANAGED] * PAGE_SIZE, 0);
}

export const ANY_MEMORY_SCENARIOS: readonly Scenario[] = [
  {
    name: 'virtio-mem-any-memory',
    about:
      'a device that may unplug any memory: a DIMM of which it took a part cannot go, one it did not take goes without its knowing, one node gives everything, large pages and mappings are lost over all of RAM, and the books grow with it',
    rows: 'H45, H57; I4, I9',
    spec: () =>
      spec(2 * GiB, [
        vm(anyMemory(), MEMORY - KEPT - TAKEN),
        vm(anyMemory(), MEMORY - KEPT),
        // What must be enforced is enforced over all of RAM, block by block.
        vm(anyMemory({ blockBytes: 1 * MiB, profile: 'rfc-write-protect' }), MEMORY - KEPT),
      ]),
    checks: (outcome) => {
      const [took, untouched, enforced] = outcome.result.vms;
      const [arena, untouchedArena] = outcome.arenas;
      const [{ plugged: believed }] = untouched.memoryDevices;
      const onGiantPages = judgeMemoryDevice({ ...anyMemory(), region: { pageBytes: 1 * GiB } });
      return [
        ...clean(outcome),
        exactly('bytes it took', MEMORY - KEPT - took.memoryDevices[0].plugged, TAKEN),
        exactly('1. the DIMM that it took from: ejected', took.dimms?.counters.ejected ?? -1, 0),
        exactly('1. the DIMM that it left alone: ejected', untouched.dimms?.counters.ejected ?? -1, 1),
        atLeast(
          '2. no huge pages: faults where any block of 1 MiB may be refused, for each where none is',
          Math.round(enforced.eptViolations / untouched.eptViolations),
          50,
        ),
        exactly(
          '3. global state: bytes it believes plugged after the DIMM has gone',
          believed,
          MEMORY - KEPT,
        ),
        atLeast(
          '3. bitmaps that grow: blocks a migration carries; of a device of 128 MiB, 64',
          (MEMORY - KEPT) / anyMemory().blockBytes,
          320,
        ),
        exactly('4. NUMA: bytes that node 0 gave', managed(untouchedArena, 0) - managed(arena, 0), 0),
        atLeast('4. NUMA: bytes that node 1 gave', MEMORY / 2 - managed(arena, 1), TAKEN),
        atLeast(
          '5. userfaultfd everywhere: faults on memory in use that the verdict had to let through',
          enforced.memoryDevices[0].counters.letThrough,
          8192,
        ),
        exactly('6. a DIMM of 1 GiB pages beneath it: the device is refused', onGiantPages === '' ? 0 : 1, 1),
      ];
    },
  },
];
