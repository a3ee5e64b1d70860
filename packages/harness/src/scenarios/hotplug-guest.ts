/** Guests with memory devices, of which the scenarios of virtio-mem are built. */
import { LINUX_HOTPLUG, type GuestConfig, type HotplugConfig } from '@ebb/guest-kernel';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import type { MemoryDeviceSpec } from '../run/spec.ts';
import { freshGuest } from './scenario.ts';

/** Where regions begin: above the hole below 4 GiB. */
export const REGION_ADDR: number = 4 * GiB;

/** A memory device of 1 GiB, blocks of 2 MiB, as QEMU would have it. */
export function device(over: Partial<MemoryDeviceSpec> = {}): MemoryDeviceSpec {
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
export function hotplugGuest(
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
