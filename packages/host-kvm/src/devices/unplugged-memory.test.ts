/** What a guest can do with unplugged memory, profile by profile, and what it costs the host to forbid it. */
import { describe, expect, test } from 'vitest';
import { gfn, PAGE_SIZE } from '@ebb/machine';
import {
  VIRTIO_MEM_REQ_PLUG,
  VIRTIO_MEM_REQ_UNPLUG,
  VIRTIO_MEM_REQ_UNPLUG_ALL,
  VIRTIO_MEM_RESP_ACK,
  VIRTIO_MEM_RESP_BUSY,
} from '@ebb/virtio/uapi';
import { type TestHost } from '../kvm/testing-host.ts';
import { at, bench, BLOCK, type Bench } from './testing-memory-device.ts';
import type { MemoryProfile } from './unplugged-memory.ts';

describe('what a guest can do with unplugged memory', () => {
  function world(profile: MemoryProfile): Bench & { readonly host: TestHost } {
    const b = bench('a VM of this host', { profile });
    const { host } = b;
    if (host === null) throw new Error('a VM');
    b.request(VIRTIO_MEM_REQ_PLUG, at(0), 2);
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(gfn(at(0) / PAGE_SIZE), 5, 0x1111);
    host.vcpus[0].store32(gfn(at(1) / PAGE_SIZE), 5, 0x2222);
    host.vcpus[0].leaveGuest();
    b.request(VIRTIO_MEM_REQ_UNPLUG, at(1), 1);
    host.vcpus[0].enterGuest();
    return { ...b, host };
  }
  const framesBehind = (b: Bench, block: number): number => {
    let n = 0;
    for (let i = 0; i < BLOCK / PAGE_SIZE; i++)
      if ((b.host?.file.blocks[at(block) / PAGE_SIZE + i] ?? -1) >= 0) n++;
    return n;
  };

  test('rfc-write-protect: reads give zeros and take no frame; writes never land and are counted (H10–H12)', () => {
    const b = world('rfc-write-protect');
    const [vcpu] = b.host.vcpus;
    const page = gfn(at(1) / PAGE_SIZE);
    expect(framesBehind(b, 1)).toBe(0);
    expect(vcpu.load32(page, 5)).toBe(0);
    expect(framesBehind(b, 1)).toBe(0);
    vcpu.store32(page, 5, 0x3333);
    expect(vcpu.load32(page, 5)).toBe(0);
    expect(framesBehind(b, 1)).toBe(0);
    expect(b.device.counters.refusedWrites).toBeGreaterThan(0);
    expect(b.memory.window(at(1), 4, false)).toBe(false);
    expect(vcpu.load32(gfn(at(0) / PAGE_SIZE), 5)).toBe(0x1111);
  });

  test('rfc-write-protect: a block plugged again is memory: the page of zeros is gone from every translation', () => {
    const b = world('rfc-write-protect');
    const [vcpu] = b.host.vcpus;
    const page = gfn(at(1) / PAGE_SIZE);
    expect(vcpu.load32(page, 5)).toBe(0);
    vcpu.leaveGuest();
    b.request(VIRTIO_MEM_REQ_PLUG, at(1), 1);
    vcpu.enterGuest();
    vcpu.store32(page, 5, 0x4444);
    expect(vcpu.load32(page, 5)).toBe(0x4444);
    expect(framesBehind(b, 1)).toBeGreaterThan(0);
    // What was stored is nobody else's zero.
    expect(vcpu.load32(gfn(at(2) / PAGE_SIZE), 5)).toBe(0);
  });

  test('a large page reaches no further than the block that is plugged', () => {
    const b = bench('a VM of this host', { profile: 'rfc-write-protect' });
    const [vcpu] = b.host?.vcpus ?? [];
    b.request(VIRTIO_MEM_REQ_PLUG, at(0), 1);
    vcpu.enterGuest();
    expect(vcpu.load32(gfn(at(1) / PAGE_SIZE), 5)).toBe(0);
    vcpu.store32(gfn(at(0) / PAGE_SIZE), 5, 0x1111);
    vcpu.store32(gfn(at(1) / PAGE_SIZE), 5, 0x2222);
    expect(vcpu.load32(gfn(at(1) / PAGE_SIZE), 5)).toBe(0);
    expect(b.device.counters.refusedWrites).toBeGreaterThan(0);
    expect(framesBehind(b, 1)).toBe(0);
  });

  test('inaccessible: nothing is there, for vCPUs and devices; the refusals are counted', () => {
    const b = world('inaccessible');
    const [vcpu] = b.host.vcpus;
    const page = gfn(at(1) / PAGE_SIZE);
    vcpu.store32(page, 5, 0x3333);
    vcpu.load32(page, 5);
    expect(framesBehind(b, 1)).toBe(0);
    expect(b.device.counters.refusedWrites).toBe(1);
    expect(b.device.counters.refusedReads).toBe(1);
    expect(b.memory.window(at(1), 4, true)).toBe(false);
  });

  test('qemu: writes land, and vanish with the next discard (it enforces nothing)', () => {
    const b = world('qemu');
    const [vcpu] = b.host.vcpus;
    const page = gfn(at(1) / PAGE_SIZE);
    vcpu.store32(page, 5, 0x3333);
    expect(vcpu.load32(page, 5)).toBe(0x3333);
    expect(framesBehind(b, 1)).toBeGreaterThan(0);
    vcpu.leaveGuest();
    b.request(VIRTIO_MEM_REQ_UNPLUG_ALL, 0, 0);
    expect(framesBehind(b, 1)).toBe(0);
  });

  test('scribble: what is read is what the device likes, and nothing of it survives a plug', () => {
    const b = world('scribble');
    const [vcpu] = b.host.vcpus;
    const page = gfn(at(1) / PAGE_SIZE);
    // Its own block was never written to: RAM would be zero.
    expect([0, 0x2222]).not.toContain(vcpu.load32(page, 5));
    vcpu.store32(page, 5, 0x3333);
    vcpu.leaveGuest();
    b.request(VIRTIO_MEM_REQ_PLUG, at(1), 1);
    vcpu.enterGuest();
    expect(vcpu.load32(page, 5)).toBe(0);
  });
});

describe('how a profile is enforced', () => {
  const holes = (b: Bench, n: number): number[] =>
    Array.from({ length: n }, (_, i) => b.request(VIRTIO_MEM_REQ_PLUG, at(2 * i), 1).type);

  test('by mprotect: each hole is a mapping more; at the limit a request is BUSY and changes nothing (H14, H64)', () => {
    const over = { profile: 'rfc-write-protect' as const, protection: 'mprotect' as const, maxMapCount: 9 };
    const b = bench('a VM of this host', over);
    expect(b.device.unplugged.vmas).toBe(1);
    // A plugged block and the gap behind it: two mappings each.
    expect(holes(b, 5)).toEqual([...new Array<number>(4).fill(VIRTIO_MEM_RESP_ACK), VIRTIO_MEM_RESP_BUSY]);
    expect([b.device.unplugged.vmas, b.device.plugged.count(), b.device.counters.mapCountRefusals]).toEqual([
      8, 4, 1,
    ]);
    // What joins two runs makes fewer, and is always possible.
    expect(b.request(VIRTIO_MEM_REQ_PLUG, at(1), 1).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(b.device.unplugged.vmas).toBe(6);
    expect(b.request(VIRTIO_MEM_REQ_UNPLUG, at(1), 1).type).toBe(VIRTIO_MEM_RESP_ACK);
    expect(b.device.unplugged.vmas).toBe(8);
  });

  test('by userfaultfd: one mapping, whatever the holes', () => {
    const b = bench('a VM of this host', { profile: 'rfc-write-protect', maxMapCount: 9 });
    expect(holes(b, 8)).toEqual(new Array<number>(8).fill(VIRTIO_MEM_RESP_ACK));
    expect([b.device.unplugged.vmas, b.device.counters.mapCountRefusals]).toEqual([1, 0]);
  });

  test('a protection fault on memory that is plugged is a false alarm: the access is let through, nothing is lost (H65)', () => {
    const b = bench('a VM of this host', { profile: 'rfc-write-protect' });
    const { host } = b;
    if (host === null) throw new Error('a VM');
    b.request(VIRTIO_MEM_REQ_PLUG, at(0), 2);
    const [vcpu] = host.vcpus;
    const first = at(0) / PAGE_SIZE;
    const before = b.device.counters.refusedWrites;
    for (let round = 0; round < 50; round++) {
      vcpu.enterGuest();
      for (let p = 0; p < 8; p++) {
        if (round > 0) expect(vcpu.load32(gfn(first + p), 3)).toBe(100 * round + p);
        vcpu.store32(gfn(first + p), 3, 100 * (round + 1) + p);
      }
      vcpu.leaveGuest();
      // The kernel protects a page that nobody asked it to protect.
      host.finish(host.vm.unmap(first + (round % 8), 1));
    }
    expect(host.vm.counters.eptViolations).toBeGreaterThanOrEqual(50);
    expect([b.device.counters.refusedWrites - before, host.log.total]).toEqual([0, 0]);
  });
});
