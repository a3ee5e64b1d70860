/** What the balloon's driver says of its memory, tag by tag (`update_balloon_stats`). */
import { BALLOON_STAT_BYTES } from '@ebb/virtio/uapi';
import { expect, test } from 'vitest';
import { H_NR_FILE_PAGES } from '../layout.ts';
import { EV, eventRow } from '../mm/events.ts';
import { availablePages, Z_FREE, Z_MANAGED } from '../mm/zone.ts';
import { guestConfig, SMALL, testGuest } from '../testing-guest.ts';
import { balloonStats } from './balloon-stats.ts';

test('free, total, available memory and the page cache in bytes, beyond 4 GiB; events as they are', () => {
  const { arena, kernels } = testGuest(guestConfig(SMALL));
  const { zones } = kernels[0].parts;
  const { w } = arena;
  // 9 GiB and a page of 12 GiB and two are free.
  zones.forEach((z, i) => {
    w[z + Z_FREE] = i === 0 ? 1 : 9 << 18;
    w[z + Z_MANAGED] = i === 0 ? 2 : 12 << 18;
  });
  w[H_NR_FILE_PAGES] = (5 << 18) + 3;
  w[eventRow(0) + EV.oom_kill] = 4;
  w[eventRow(1) + EV.allocstall] = 6;
  const bytes = balloonStats(arena, zones);
  const view = new DataView(bytes.buffer);
  const value = (tag: number): bigint => view.getBigUint64(tag * BALLOON_STAT_BYTES + 2, true);
  expect([4, 5, 6, 7].map((tag) => Number(value(tag)))).toEqual([
    9 * 2 ** 30 + 4096,
    12 * 2 ** 30 + 8192,
    availablePages(w, zones) * 4096,
    5 * 2 ** 30 + 3 * 4096,
  ]);
  expect([10, 11].map((tag) => Number(value(tag)))).toEqual([4, 6]);
});
