/** A device with pinned memory: what it holds stays until it lets go, and whoever takes memory away tells it first. */
import { expect, test } from 'vitest';
import { COST_TABLE, gfn, MiB, PAGE_SIZE } from '@ebb/machine';
import { testHost, type TestHost } from '../kvm/testing-host.ts';
import { AssignedDevice } from './assigned-device.ts';
import { MemoryDevice } from './memory-device.ts';

const small = (): TestHost => testHost({ ramBytes: 16 * MiB, huge: 'never' });

test('mapping backs and pins every page; DMA reads what the guest stored', () => {
  const host = small();
  const device = new AssignedDevice(host.vm, host.pool, host.log);
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
  const device = new AssignedDevice(host.vm, host.pool, host.log);
  while (host.pool.buddy.free > 4) host.pool.chargeVmm(0, 1);
  expect(device.map(0, 8)).toBe(false);
  expect(device.mappedPages).toBe(0);
  expect(device.map(5000, 1)).toBe(false);
});

test('a discard behind its back frees nothing until it lets go: what it reads is nobody else’s', () => {
  const host = small();
  const device = new AssignedDevice(host.vm, host.pool, host.log);
  device.map(1000, 8);
  const free = host.pool.buddy.free;
  host.finish(host.vm.discard(Int32Array.of(1000, 8), 1));
  expect(host.pool.buddy.free).toBe(free);
  expect([device.read32(1003, 0), host.log.total]).toEqual([0, 0]);
  device.unmap(1000, 8);
  expect(host.pool.buddy.free).toBe(free + 8);
});

test('a memory device tells it of blocks that come and go: what is unplugged is free at once (Y19)', () => {
  const host = testHost({ hostBytes: 96 * MiB, ramBytes: 48 * MiB, huge: 'never' });
  const assigned = new AssignedDevice(host.vm, host.pool, host.log);
  const device = new MemoryDevice({
    port: { spawn: (name, body) => void host.tasks.spawn(name, body), now: () => 0, costs: COST_TABLE },
    region: {
      pageBytes: PAGE_SIZE,
      discard: (first, count) => host.vm.discard(Int32Array.of(first, count), 1),
      unmap: (first, count) => host.vm.unmap(first, count),
      notifyPlug: (first, count) => assigned.map(first, count),
      notifyUnplug: (first, count) => {
        assigned.unmap(first, count);
        return true;
      },
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
  const free = host.pool.buddy.free;
  host.finish(device.systemReset('virtio-1.2'));
  expect([device.pluggedBytes, assigned.mappedPages, host.pool.buddy.free - free]).toEqual([0, 0, 512]);
  assigned.readAll();
  expect([assigned.read32(8192, 0), host.log.total]).toEqual([undefined, 0]);
});
