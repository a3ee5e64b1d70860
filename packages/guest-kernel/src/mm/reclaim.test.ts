/** What reclaim does with pages that others let go of while it looks at them. */
import { expect, test, vi } from 'vitest';
import { H_NR_DIRTY, H_NR_FILE_PAGES, H_NR_WRITEBACK } from '../layout.ts';
import { MiB } from '@ebb/machine';
import { guestConfig, SMALL, testGuest, twoNodes, type TestGuest } from '../testing-guest.ts';
import { eventSum } from './events.ts';
import { P_FLAGS, P_REF, PG_DIRTY, PG_UPTODATE, SHADOW_ALLOCATED } from './page.ts';
import { ZF_BELOW_HIGH, ZF_RECLAIM_ACTIVE, Z_FLAGS, Z_FREE, Z_HIGH, Z_MIN, Z_NODE, Z_TYPE } from './zone.ts';

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
  const { w, shadow } = guest.arena;
  // The other CPU is faster: by the time reclaim decides, the page has left the cache.
  const freeze = cache.freeze.bind(cache);
  cache.freeze = (pfn) => {
    if (cache.remove(pfn, alloc.stampOf(pfn))) alloc.put(pfn);
    return freeze(pfn);
  };
  reclaim.direct(0);
  for (const pfn of pfns) expect(w[shadow + pfn]).not.toBe(SHADOW_ALLOCATED);
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
  expect(w[guest.arena.shadow + dying]).toBe(SHADOW_ALLOCATED);
});

test('kswapd is done when one zone that can serve the request is above its high mark (`pgdat_balanced`)', () => {
  const { guest } = cached();
  const { reclaim, zones } = guest.kernels[0].parts;
  const { w } = guest.arena;
  const [dma, dma32] = zones;
  // All of the DMA zone is somebody's, for good; DMA32 has plenty.
  const { buddy } = guest.kernels[0].parts;
  buddy.lock(dma);
  while (buddy.rmqueue(dma, 0, 1) >= 0);
  buddy.unlock(dma);
  expect([w[dma + Z_FREE] < w[dma + Z_HIGH], w[dma32 + Z_FREE] > 2 * w[dma32 + Z_HIGH]]).toEqual([
    true,
    true,
  ]);
  reclaim.wakeKswapd(dma, w[dma32 + Z_TYPE]);
  reclaim.kswapd(0);
  expect([w[H_NR_FILE_PAGES], eventSum(guest.arena, 'pgsteal_kswapd')]).toEqual([8, 0]);
  // A request that only DMA can serve is another matter.
  reclaim.wakeKswapd(dma, w[dma + Z_TYPE]);
  reclaim.kswapd(0);
  expect(w[H_NR_FILE_PAGES]).toBe(0);
});

test('kswapd gives a node up after sixteen runs in vain, until someone gets a page of that node', () => {
  const nodes = twoNodes(256 * MiB);
  const guest = testGuest(guestConfig(256 * MiB, { nodes, cpuNode: [0, 1] }));
  const [kernel] = guest.kernels;
  kernel.enter();
  const { alloc, cache, reclaim, zones } = kernel.parts;
  const { w } = guest.arena;
  const zoneOf = (node: number): number =>
    zones.find((z) => w[z + Z_NODE] === node && w[z + Z_TYPE] === 1) ?? -1;
  /** Runs of kswapd on a node that could not be balanced. */
  const inVain = (node: number, times: number): number => {
    const runs = eventSum(guest.arena, 'pageoutrun');
    for (let i = 0; i < times; i++) {
      reclaim.wakeKswapd(zoneOf(node), 1);
      reclaim.kswapd(node);
    }
    return eventSum(guest.arena, 'pageoutrun') - runs;
  };
  for (const z of zones) w[z + Z_HIGH] = 1 << 28;
  expect([inVain(0, 20), inVain(1, 20)]).toEqual([16, 16]);
  // A page of node 1, taken by a CPU that asked node 0 first.
  const pfn = nodes[1].start + 4096;
  const page = alloc.allocExactly(pfn) ? pfn : -1;
  alloc.unstamp(page);
  cache.add(page, 1, 0, PG_UPTODATE);
  expect(reclaim.direct(0)).toBe(1);
  expect([inVain(0, 1), inVain(1, 20)]).toEqual([0, 16]);
});

test('a run of kswapd that finds its node balanced forgives no failure', () => {
  const { guest } = cached();
  const { reclaim, zones } = guest.kernels[0].parts;
  const { w } = guest.arena;
  /** Runs of kswapd, of twenty that are asked for, with the high watermark at `high`. */
  const runs = (times: number, high: number): number => {
    for (const z of zones) w[z + Z_HIGH] = high;
    const before = eventSum(guest.arena, 'pageoutrun');
    for (let i = 0; i < times; i++) {
      reclaim.wakeKswapd(zones[1], 1);
      reclaim.kswapd(0);
    }
    return eventSum(guest.arena, 'pageoutrun') - before;
  };
  // Eight pages are freed by the first.
  expect([runs(1, 1 << 28), w[H_NR_FILE_PAGES]]).toEqual([1, 0]);
  expect(runs(5, 1 << 28)).toBe(5);
  expect(runs(1, 0)).toBe(1);
  expect(runs(20, 1 << 28)).toBe(11);
});

test('sync waits for what another CPU is writing: what fails there is dirty again, and said to be', () => {
  const guest = testGuest(guestConfig(SMALL));
  const [a, b] = guest.kernels;
  a.enter();
  b.enter();
  const pfns = Int32Array.from({ length: 4 }, (_, index) => {
    const pfn = b.parts.alloc.alloc(0, 1, 2);
    b.parts.alloc.get(pfn);
    b.parts.cache.add(pfn, 1, index, PG_UPTODATE | PG_DIRTY);
    return pfn;
  });
  const { w } = guest.arena;
  let relaxed = 0;
  // While the device has the batch, the other CPU wants all on the disk; then the disk fails.
  vi.spyOn(a.vcpu.port, 'relax').mockImplementation(() => {
    relaxed++;
    w[H_NR_WRITEBACK] = 0;
    w[H_NR_DIRTY] = 4;
    vi.spyOn(a.parts.cache, 'writePages').mockReturnValue(0);
  });
  let synced = true;
  vi.spyOn(b.parts.blk, 'transfer').mockImplementation(() => {
    expect([w[H_NR_DIRTY], w[H_NR_WRITEBACK]]).toEqual([0, 4]);
    synced = a.parts.reclaim.sync();
    return false;
  });
  b.parts.cache.writePages(pfns, 4);
  expect([synced, relaxed > 0]).toEqual([false, true]);
});

test('a page that a scan takes off its list as its last reference goes is freed when the scan has read its links', () => {
  const { guest, pfns } = cached();
  const { alloc, cache } = guest.kernels[0].parts;
  const { w, memmap } = guest.arena;
  const [pfn] = pfns;
  cache.remove(pfn, alloc.stampOf(pfn));
  // What orders the two is the scan's last store to the flags and this look at them: nothing else need be between them.
  const looks: string[] = [];
  const { sub, load } = Atomics;
  const note =
    (name: string, real: (view: Int32Array, index: number, value: number) => number) =>
    (view: Int32Array, index: number, value: number): number => {
      if (index === memmap + (pfn << 4) + P_REF) looks.push(`${name} references`);
      if (index === memmap + (pfn << 4) + P_FLAGS) looks.push(`${name} flags`);
      return real(view, index, value);
    };
  vi.spyOn(Atomics, 'sub').mockImplementation(note('sub', sub) as typeof Atomics.sub);
  vi.spyOn(Atomics, 'load').mockImplementation(note('load', load) as typeof Atomics.load);
  alloc.put(pfn);
  vi.restoreAllMocks();
  expect(looks.slice(0, 2)).toEqual(['sub references', 'load flags']);
  expect(w[guest.arena.shadow + pfn]).not.toBe(SHADOW_ALLOCATED);
});

test('while kswapd runs its zones say so, and no longer: per-CPU lists shrink for it (`ZONE_RECLAIM_ACTIVE`)', () => {
  const { guest } = cached();
  const { reclaim, zones, buddy } = guest.kernels[0].parts;
  const { w } = guest.arena;
  const [, dma32] = zones;
  for (const zone of zones) {
    buddy.lock(zone);
    while (w[zone + Z_FREE] > w[zone + Z_MIN] && buddy.rmqueue(zone, 0, 1) >= 0);
    buddy.unlock(zone);
  }
  const during: boolean[] = [];
  const section = vi.spyOn(guest.kernels[0].vcpu, 'beginSection').mockImplementation(() => {
    during.push((w[dma32 + Z_FLAGS] & ZF_RECLAIM_ACTIVE) !== 0);
  });
  reclaim.wakeKswapd(dma32, 2);
  reclaim.kswapd(0);
  section.mockRestore();
  expect([during.includes(true), w[dma32 + Z_FLAGS] & ZF_RECLAIM_ACTIVE]).toEqual([true, 0]);
});

test('a zone that was seen below its high mark is so until a free finds it above (`ZONE_BELOW_HIGH`)', () => {
  const { guest } = cached();
  const { alloc, zones, pcp } = guest.kernels[0].parts;
  const { w } = guest.arena;
  const [, dma32] = zones;
  const taken: number[] = [];
  while ((w[dma32 + Z_FLAGS] & ZF_BELOW_HIGH) === 0) taken.push(alloc.alloc(0, 1, 2));
  for (const pfn of taken) alloc.free(pfn, 0);
  pcp.drain(0);
  // Lists that are full: a free gives some back and looks at the mark.
  const more = Array.from({ length: 4096 }, () => alloc.alloc(0, 1, 2));
  for (const pfn of more) alloc.free(pfn, 0);
  expect([w[dma32 + Z_FREE] > w[dma32 + Z_HIGH], w[dma32 + Z_FLAGS] & ZF_BELOW_HIGH]).toEqual([true, 0]);
});
