/** The driver’s free page hinting against a scripted device. */
import { expect, test } from 'vitest';
import { VIRTIO_BALLOON_F_FREE_PAGE_HINT } from '@ebb/virtio/uapi';
import { SHADOW_ALLOCATED } from '../mm/page.ts';
import { freePages, pcpPages } from '../procfs.ts';
import { bring, type Script } from './testing-balloon.ts';

/** The host's command id changes. */
function command(device: Script, id: number): void {
  device.config[2] = id;
  device.host?.configChanged();
}

test('starts with the command id, pages as input buffers, ends with STOP; all output buffers have 4 bytes; pages are released at DONE', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_FREE_PAGE_HINT]);
  const free = freePages(guest.arena) + pcpPages(guest.arena, 2);
  command(device, 0x80000000 | 0);
  run(1);
  const round = device.of(2);
  const ids = round.filter((s) => s.readable.length > 0);
  expect(ids.map((s) => [s.readable.length, new Uint32Array(s.readable.buffer)[0]])).toEqual([
    [4, 0x80000000],
    [4, 0],
  ]);
  expect(round[0].readable.length).toBe(4);
  expect(round.at(-1)?.readable.length).toBe(4);
  const hinted = round.flatMap((s) => s.ranges);
  expect(hinted.length).toBeGreaterThan(10);
  expect(hinted.every(([, pages]) => pages === 1024)).toBe(true);
  // While the round lasts they are the driver's.
  expect(hinted.every(([pfn]) => device.state(pfn) === SHADOW_ALLOCATED)).toBe(true);
  command(device, 1);
  run(1);
  expect(freePages(guest.arena) + pcpPages(guest.arena, 2)).toBe(free);
});

test('what is held for a round is had by who needs memory (`shrink_free_pages`)', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_FREE_PAGE_HINT]);
  const pages = freePages(guest.arena) + pcpPages(guest.arena, 2);
  command(device, 0x80000000 | 0);
  run(1);
  const [kernel] = guest.kernels;
  kernel.enter();
  let got = 0;
  while (kernel.parts.alloc.alloc(0, 0, 2) >= 0) got++;
  kernel.leave();
  expect(got).toBeGreaterThan(pages * 0.9);
  expect(guest.log.total).toBe(0);
});

test('what is held for a round is freed when the driver is unbound (`virtballoon_remove`)', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_FREE_PAGE_HINT]);
  const free = freePages(guest.arena) + pcpPages(guest.arena, 2);
  command(device, 0x80000000 | 0);
  run(1);
  expect(freePages(guest.arena)).toBeLessThan(free / 2);
  const [kernel] = guest.kernels;
  kernel.enter();
  kernel.parts.balloon.remove();
  kernel.leave();
  expect(freePages(guest.arena) + pcpPages(guest.arena, 2)).toBe(free);
});

test('another command id ends the round; the pages it hinted stay the driver’s until the new one is done', () => {
  const { device, guest, run } = bring([VIRTIO_BALLOON_F_FREE_PAGE_HINT]);
  const free = freePages(guest.arena) + pcpPages(guest.arena, 2);
  command(device, 0x80000000 | 0);
  // While the first command is answered the host wants another round.
  device.meanwhile = () => {
    command(device, 0x80000001 | 0);
  };
  run(1);
  const ids = device.of(2).filter((s) => s.readable.length > 0);
  expect(ids.map((s) => new Uint32Array(s.readable.buffer)[0])).toEqual([0x80000000, 0, 0x80000001, 0]);
  expect(device.of(2).findIndex((s) => s.ranges.length > 0)).toBeGreaterThan(2);
  command(device, 1);
  run(1);
  expect(freePages(guest.arena) + pcpPages(guest.arena, 2)).toBe(free);
});
