/** A device with pinned memory: what it holds stays until it lets go, and whoever takes memory away tells it first. */
import { expect, test } from 'vitest';
import { COST_TABLE, gfn, MiB, PAGE_SIZE } from '@ebb/machine';
import { testHost, type TestHost } from '../kvm/testing-host.ts';
import { AssignedDevice } from './assigned-device.ts';
import { MemoryDevice } from './memory-device.ts';
import { wholeRegion } from './region.ts';

const small = (): TestHost => testHost({ ramBytes: 16 * MiB, huge: 'never' });

test('mapping backs and pins every page; DMA reads what the guest stored', () => {
  const host = small();
  const device = new AssignedDevice(host.vm, host.pool);
  expect(device.map(1000, 8)).toBe(true);
  expect(host.file.assigned).toBe(8);
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(1003), 5, 0xbee);
  vcpu.leaveGuest();
  expect([device.read32(1003, 5), device.read32(999, 5)]).toEqual([0xbee, undefined]);
  expect(device.counters).toEqual({ mappedPages: 8, unmappedPages: 0, reads: 1, iommuFaults: 1 });
});

test('what the host has no frames for is not mapped at all', () => {
  const host = small();
  const device = new AssignedDevice(host.vm, host.pool);
  while (host.pool.buddy.free > 4) host.pool.chargeVmm(0, 1);
  expect(device.map(0, 8)).toBe(false);
  expect(device.mapped).toBe(0);
  expect(device.map(5000, 1)).toBe(false);
});

test('a discard behind its back frees nothing until it lets go: what it reads is nobody else’s', () => {
  const host = small();
  const device = new AssignedDevice(host.vm, host.pool);
  device.map(1000, 8);
  const free = host.pool.buddy.free;
  host.finish(host.vm.discard(Int32Array.of(1000, 8), 1));
  expect(host.pool.buddy.free).toBe(free);
  expect([device.read32(1003, 0), host.log.total]).toEqual([0, 0]);
  device.unmap(1000, 8);
  expect(host.pool.buddy.free).toBe(free + 8);
});

/**
 * A memory device that has plugged 2 of 16 MiB at 32 MiB, and an assigned device that it tells of them. `meanwhile` runs
 * before it maps what is plugged.
 */
function memoryBesideAssigned(meanwhile: (host: TestHost) => void = () => undefined): {
  readonly host: TestHost;
  readonly assigned: AssignedDevice;
  readonly device: MemoryDevice;
} {
  const host = testHost({ hostBytes: 96 * MiB, ramBytes: 48 * MiB, huge: 'never' });
  const assigned = new AssignedDevice(host.vm, host.pool);
  const device = new MemoryDevice({
    port: { spawn: (name, body) => void host.tasks.spawn(name, body), now: () => 0, costs: COST_TABLE },
    region: wholeRegion(host.vm, PAGE_SIZE),
    holder: {
      map: (first, count) => {
        meanwhile(host);
        return assigned.map(first, count);
      },
      unmap: (first, count) => assigned.unmap(first, count),
    },
    id: 'vm0',
    addr: 32 * MiB,
    regionBytes: 16 * MiB,
    blockBytes: MiB,
    node: 0,
    requestedBytes: 16 * MiB,
    pluggedBytes: 2 * MiB,
  });
  assigned.map(8192, 512);
  return { host, assigned, device };
}

test('a memory device tells it of blocks that come and go: what is unplugged is free at once (Y19)', () => {
  const { host, assigned, device } = memoryBesideAssigned();
  const free = host.pool.buddy.free;
  host.finish(device.systemReset('virtio-1.2'));
  expect([device.pluggedBytes, assigned.mapped, host.pool.buddy.free - free]).toEqual([0, 0, 512]);
  assigned.readAll();
  expect([assigned.read32(8192, 0), host.log.total]).toEqual([undefined, 0]);
});

test('a system reset that keeps what is plugged maps it anew, so that DMA reaches what CPUs do (Y19, H9)', () => {
  const { host, assigned, device } = memoryBesideAssigned();
  host.finish(device.systemReset('rfc-2017'));
  expect([device.pluggedBytes, assigned.mapped]).toEqual([2 * MiB, 512]);
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(8200), 1, 0xfeed);
  vcpu.leaveGuest();
  expect([assigned.read32(8200, 1), host.log.total]).toEqual([0xfeed, 0]);
});

test('what a system reset would keep and it cannot have again is unplugged', () => {
  const { host, assigned, device } = memoryBesideAssigned(
    ({ pool }) => void pool.chargeVmm(0, pool.buddy.free - 511),
  );
  host.finish(device.systemReset('rfc-2017'));
  expect([device.pluggedBytes, device.requestedBytes, assigned.mapped]).toEqual([0, 2 * MiB, 0]);
  expect(host.log.total).toBe(0);
});
