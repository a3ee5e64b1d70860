/** The driver’s free page reporting against a scripted device (virtio 1.4 § 5.5.6.7). */
import { expect, test, vi } from 'vitest';
import { gfn, MiB, NS_PER_S } from '@ebb/machine';
import { VIRTIO_BALLOON_F_PAGE_POISON, VIRTIO_BALLOON_F_REPORTING } from '@ebb/virtio/uapi';
import { SHADOW_BUDDY, SHADOW_ISOLATED } from '../mm/page.ts';
import { Z_FREE, Z_LOW } from '../mm/zone.ts';
import { bring } from './testing-balloon.ts';

test('a guest that poisons does not report to a device that does not know of the poison (`virtballoon_validate`)', () => {
  const { device } = bring([VIRTIO_BALLOON_F_REPORTING], true);
  expect(device.features.has(VIRTIO_BALLOON_F_REPORTING)).toBe(false);
});

test('The driver MUST NOT use the reported pages until the device has acknowledged: they are isolated while it holds them (I3)', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_REPORTING]);
  run(1.9);
  expect(device.of(2)).toEqual([]);
  run(8);
  const reports = device.of(2);
  expect(reports.length).toBeGreaterThan(0);
  for (const r of reports) {
    expect(r.ranges.length).toBeLessThanOrEqual(32);
    expect(r.states.every((s) => s === SHADOW_ISOLATED)).toBe(true);
    expect(r.atAnswer.length).toBe(r.ranges.length);
    expect(r.atAnswer.every((s) => s === SHADOW_ISOLATED)).toBe(true);
    expect(r.ranges.every(([pfn, pages]) => pages >= 512 && pfn % pages === 0)).toBe(true);
  }
  expect(reports.flatMap((r) => r.ranges).every(([pfn]) => device.state(pfn) === SHADOW_BUDDY)).toBe(true);
  expect(guest.log.total).toBe(0);
});

test('a zone is left alone unless a full report leaves it above its low watermark', () => {
  const reports = (above: number): number => {
    const { device, guest, run } = bring([VIRTIO_BALLOON_F_REPORTING]);
    const { w } = guest.arena;
    for (const z of guest.kernels[0].parts.zones) w[z + Z_LOW] = w[z + Z_FREE] - (32 << 9) - above;
    run(3);
    return device.of(2).length;
  };
  expect(reports(0)).toBe(0);
  expect(reports(1)).toBeGreaterThan(0);
});

test('two requests per list and pass, a pass every 2 s, while there is more', () => {
  const { device, run } = bring([VIRTIO_BALLOON_F_REPORTING], false, 512 * MiB);
  // Blocks of the requests of each half second: nearly all are in one list.
  const byTime = Array.from({ length: 16 }, () => {
    const before = device.of(2).length;
    run(0.5);
    return device
      .of(2)
      .slice(before)
      .map((r) => r.ranges.length);
  });
  const passes = byTime.flatMap((requests, i) => (requests.length > 0 ? [{ i, requests }] : []));
  expect(passes[0].requests).toEqual([32, 32]);
  expect(passes.length).toBeGreaterThan(1);
  for (let i = 1; i < passes.length; i++) expect(passes[i].i - passes[i - 1].i).toBe(4);
});

test('reported memory is not reported again; memory used and freed is', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_REPORTING]);
  run(10);
  const before = device.of(2).length;
  run(10);
  expect(device.of(2).length).toBe(before);
  const [kernel] = guest.kernels;
  kernel.enter();
  const pfns = Array.from({ length: 8192 }, () => kernel.parts.alloc.alloc(0, 1, 3));
  for (const pfn of pfns) kernel.parts.alloc.free(pfn, 0);
  kernel.parts.pcp.drain(0);
  kernel.leave();
  run(10);
  expect(device.of(2).length).toBeGreaterThan(before);
});

test('memory freed while a pass is under way is reported by the next, 2 s later', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_REPORTING]);
  const [kernel] = guest.kernels;
  kernel.enter();
  const block = kernel.parts.alloc.alloc(10, 1, 3);
  kernel.leave();
  run(10);
  const before = device.of(2).length;
  // Something else asks for a pass; the block is freed while the device holds its last report.
  kernel.enter();
  kernel.parts.alloc.free(kernel.parts.alloc.alloc(10, 1, 3), 10);
  kernel.leave();
  device.meanwhile = () => kernel.parts.alloc.free(block, 10);
  run(10);
  const later = device.of(2).slice(before);
  expect(later.length).toBeGreaterThan(1);
  expect(later.flatMap((r) => r.ranges).some(([pfn, n]) => block >= pfn && block < pfn + n)).toBe(true);
});

test('when a pass is asked for, the time it is due is known already', () => {
  const { guest, run } = bring([VIRTIO_BALLOON_F_REPORTING]);
  run(10);
  const [kernel] = guest.kernels;
  const due: number[] = [];
  const exchange = Atomics.compareExchange.bind(Atomics) as (
    words: Int32Array,
    at: number,
    from: number,
    to: number,
  ) => number;
  const watch = (words: Int32Array, at: number, from: number, to: number): number => {
    const found = exchange(words, at, from, to);
    if (words === guest.arena.w && kernel.parts.reporting.nextDue() < Number.POSITIVE_INFINITY)
      due.push(kernel.parts.reporting.nextDue());
    return found;
  };
  const spy = vi
    .spyOn(Atomics, 'compareExchange')
    .mockImplementation(watch as typeof Atomics.compareExchange);
  kernel.enter();
  const asked = kernel.vcpu.clock;
  kernel.parts.alloc.free(kernel.parts.alloc.alloc(10, 1, 3), 10);
  spy.mockRestore();
  kernel.leave();
  expect(due.length).toBeGreaterThan(0);
  expect(Math.min(...due)).toBeGreaterThan(asked + 1.9 * NS_PER_S);
});

test('If PAGE_POISON has been negotiated, the driver MUST initialize all free pages with poison_val before reporting them', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_REPORTING, VIRTIO_BALLOON_F_PAGE_POISON], true);
  const [kernel] = guest.kernels;
  kernel.enter();
  const pfns = Array.from({ length: 4096 }, () => kernel.parts.alloc.alloc(0, 1, 3));
  for (const pfn of pfns) kernel.parts.alloc.free(pfn, 0);
  kernel.parts.pcp.drain(0);
  kernel.leave();
  run(10);
  const reported = new Set(
    device.of(2).flatMap((r) => r.ranges.flatMap(([pfn, n]) => Array.from({ length: n }, (_, i) => pfn + i))),
  );
  const ours = pfns.filter((pfn) => reported.has(pfn));
  expect(ours.length).toBeGreaterThan(1000);
  kernel.enter();
  for (const pfn of ours) expect(kernel.vcpu.load32(gfn(pfn), 100)).toBe(0xaaaaaaaa | 0);
  kernel.leave();
});
