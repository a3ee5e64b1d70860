/** What reclaim does with pages that others let go of while it looks at them. */
import { expect, test } from 'vitest';
import { guestConfig, SMALL, testGuest, type TestGuest } from '../testing-guest.ts';
import { P_REF, P_SHADOW, PG_UPTODATE, SHADOW_ALLOCATED } from './page.ts';

/** A guest with eight clean pages in its cache, and where they are. */
function cached(): { guest: TestGuest; pfns: number[] } {
  const guest = testGuest(guestConfig(SMALL));
  const { alloc, cache } = guest.kernels[0].parts;
  guest.kernels[0].enter();
  const pfns = Array.from({ length: 8 }, (_, index) => {
    const pfn = alloc.alloc(0, 1, 2);
    cache.add(pfn, 1, index, PG_UPTODATE);
    return pfn;
  });
  return { guest, pfns };
}

test('a page truncated away while it is isolated is freed with the isolation’s reference', () => {
  const { guest, pfns } = cached();
  const { alloc, cache, reclaim } = guest.kernels[0].parts;
  const { w, memmap } = guest.arena;
  // The other CPU is faster: by the time reclaim decides, the page has left the cache.
  const freeze = cache.freeze.bind(cache);
  cache.freeze = (pfn) => {
    if (cache.remove(pfn, alloc.stampOf(pfn))) alloc.put(pfn);
    return freeze(pfn);
  };
  reclaim.direct(0);
  for (const pfn of pfns) expect(w[memmap + (pfn << 4) + P_SHADOW]).not.toBe(SHADOW_ALLOCATED);
  expect(guest.log.total).toBe(0);
});

test('a page whose last reference is gone is left to whoever dropped it', () => {
  const { guest, pfns } = cached();
  const { reclaim } = guest.kernels[0].parts;
  const { w, memmap } = guest.arena;
  const [dying] = pfns;
  // Its owner has dropped the last reference and waits for the LRU lock.
  w[memmap + (dying << 4) + P_REF] = 0;
  reclaim.direct(0);
  expect(w[memmap + (dying << 4) + P_REF]).toBe(0);
  expect(w[memmap + (dying << 4) + P_SHADOW]).toBe(SHADOW_ALLOCATED);
});
