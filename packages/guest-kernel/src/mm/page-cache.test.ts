/** The page cache over a disk that does as it is told. */
import { expect, test, vi } from 'vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { H_NR_DIRTY } from '../layout.ts';
import { guestConfig, testGuest } from '../testing-guest.ts';
import { P_FLAGS, PG_DIRTY } from './page.ts';

/** A guest with a disk full of sevens, whose next transfers fare as `fares` says: well if it says nothing. */
function world() {
  const guest = testGuest(guestConfig(64 * MiB));
  const [kernel] = guest.kernels;
  const { cache, blk, reclaim } = kernel.parts;
  const fares: boolean[] = [];
  kernel.enter();
  vi.spyOn(blk, 'transfer').mockImplementation((write, pfns, _blocks, count) => {
    if (fares.shift() === false) return false;
    for (let i = 0; !write && i < count; i++) {
      kernel.vcpu.window(pfns[i] * PAGE_SIZE, PAGE_SIZE, true);
      kernel.vcpu.i32.fill(7, kernel.vcpu.at >> 2, (kernel.vcpu.at >> 2) + 1024);
    }
    return true;
  });
  return { guest, kernel, cache, reclaim, fares };
}

test('a write of a part of a page keeps the rest of what is on the disk', () => {
  const { cache, kernel } = world();
  expect(cache.write(1, 0, Int32Array.of(1, 2, 3))).toBe(true);
  const words = new Int32Array(5);
  expect([cache.read(1, 0, words), [...words]]).toEqual([true, [1, 2, 3, 7, 7]]);
  kernel.leave();
});

test('a page that the disk could not read is read again by who asks next', () => {
  const { cache, fares, kernel } = world();
  fares.push(false);
  const words = new Int32Array(2);
  expect([cache.read(1, 0, words), cache.lookup(1, 0)]).toEqual([false, -1]);
  expect([cache.read(1, 0, words), [...words]]).toEqual([true, [7, 7]]);
  kernel.leave();
});

test('what the disk did not take is dirty still, and goes with the next write-back', () => {
  const { guest, cache, reclaim, fares, kernel } = world();
  const { w, memmap } = guest.arena;
  const page = new Int32Array(1024);
  for (let index = 0; index < 4; index++) expect(cache.write(1, index, page)).toBe(true);
  expect(w[H_NR_DIRTY]).toBe(4);
  const pfns = Int32Array.from({ length: 4 }, (_, index) => cache.lookup(1, index));
  fares.push(false);
  expect([cache.writePages(pfns, 4), w[H_NR_DIRTY]]).toEqual([0, 4]);
  for (const pfn of pfns) expect(w[memmap + (pfn << 4) + P_FLAGS] & PG_DIRTY).toBe(PG_DIRTY);
  for (const pfn of pfns) kernel.parts.alloc.put(pfn);
  expect([reclaim.sync(), w[H_NR_DIRTY]]).toEqual([true, 0]);
  kernel.leave();
});
