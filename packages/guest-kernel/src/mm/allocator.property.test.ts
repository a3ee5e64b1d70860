/** Buddy, per-CPU lists and shadow against an independent model: a map of which page belongs to whom (I19). */
import { fc, test } from '@fast-check/vitest';
import { describe, expect, test as example, vi } from 'vitest';
import { gfn as toGfn } from '@ebb/machine';
import { freeByOrder, freePages, pcpPages } from '../procfs.ts';
import { guestConfig, SMALL, testGuest, type TestGuest } from '../testing-guest.ts';
import { eventSum } from './events.ts';
import { watermarkOk } from './page-alloc.ts';
import { PerCpuPages } from './per-cpu-pages.ts';
import { FREE_ORDER, SHADOW_BUDDY } from './page.ts';
import {
  MAX_ORDER,
  MIGRATE_TYPES,
  Z_END,
  Z_FREE,
  Z_MANAGED,
  Z_MIN,
  Z_NR_FREE,
  Z_PCP_HIGH_MAX,
  Z_PCP_HIGH_MIN,
  Z_RESERVE,
  Z_START,
  Z_TYPE,
  listAt,
  minFreePages,
  pcpBatch,
  setupWatermarks,
} from './zone.ts';

/** Walks every list and the whole memmap: counters equal lists, no two buddies unmerged, shadow agrees. */
function audit(guest: TestGuest): void {
  const { w, memmap, layout } = guest.arena;
  const wrong: string[] = [];
  const must = (ok: boolean, what: string): void => {
    if (!ok && wrong.length < 5) wrong.push(what);
  };
  for (const zone of guest.kernels[0].parts.zones) {
    let free = 0;
    const onList = new Set<number>();
    for (let order = 0; order <= MAX_ORDER; order++) {
      let length = 0;
      for (let mt = 0; mt < MIGRATE_TYPES; mt++) {
        let prev = -1;
        for (let pfn = w[zone + listAt(order, mt)]; pfn >= 0; prev = pfn, pfn = w[memmap + (pfn << 4) + 2]) {
          const page = memmap + (pfn << 4);
          must(w[page + 3] === prev, `${pfn}: links`);
          must((w[layout.free + pfn] & FREE_ORDER) === order + 1, `${pfn}: order`);
          must(pfn % (1 << order) === 0, `${pfn}: alignment`);
          must(w[layout.pageblocks + (pfn >> 9)] === mt, `${pfn}: pageblock type`);
          for (let i = 0; i < 1 << order; i++) {
            must(!onList.has(pfn + i), `${pfn + i}: on two lists`);
            onList.add(pfn + i);
            must(w[layout.shadow + pfn + i] === SHADOW_BUDDY, `${pfn + i}: shadow`);
          }
          const buddy = pfn ^ (1 << order);
          if (order < MAX_ORDER && buddy >= w[zone + Z_START] && buddy < w[zone + Z_END]) {
            must((w[layout.free + buddy] & FREE_ORDER) !== order + 1, `${pfn}: unmerged buddy`);
          }
          free += 1 << order;
          length++;
        }
      }
      must(w[zone + Z_NR_FREE + order] === length, `order ${order}: number of blocks`);
    }
    let shadow = 0;
    for (let pfn = w[zone + Z_START]; pfn < w[zone + Z_END]; pfn++)
      if (w[layout.shadow + pfn] === SHADOW_BUDDY) shadow++;
    must(w[zone + Z_FREE] === free, 'free count');
    must(shadow === free, 'shadow count');
  }
  expect(wrong).toEqual([]);
}

const op = fc.record({
  cpu: fc.integer({ min: 0, max: 1 }),
  order: fc.constantFrom(0, 0, 0, 0, 1, 2, 3, 5, 9),
  mt: fc.integer({ min: 0, max: 2 }),
  free: fc.boolean(),
  pick: fc.nat(1000),
});

describe('the allocator', () => {
  test.prop([fc.array(op, { minLength: 1, maxLength: 400 })], { numRuns: 25 })(
    'never hands out a page twice and gets every page back',
    (program) => {
      const guest = testGuest(guestConfig(2 * SMALL));
      const total = freePages(guest.arena) + pcpPages(guest.arena, 2);
      const owner = new Map<number, number>();
      const held: { pfn: number; order: number }[] = [];
      let id = 0;
      guest.vcpus.forEach((v) => v.enterGuest());
      for (const { cpu, order, mt, free, pick } of program) {
        const { alloc } = guest.kernels[cpu].parts;
        if (free && held.length > 0) {
          const [block] = held.splice(pick % held.length, 1);
          for (let i = 0; i < 1 << block.order; i++) owner.delete(block.pfn + i);
          alloc.free(block.pfn, block.order);
          continue;
        }
        const pfn = alloc.alloc(order, mt, 3);
        if (pfn < 0) continue;
        expect(pfn % (1 << order)).toBe(0);
        id++;
        for (let i = 0; i < 1 << order; i++) {
          expect(owner.has(pfn + i)).toBe(false);
          owner.set(pfn + i, id);
        }
        held.push({ pfn, order });
      }
      audit(guest);
      expect(freePages(guest.arena) + pcpPages(guest.arena, 2) + owner.size).toBe(total);
      for (const { pfn, order } of held) guest.kernels[pfn & 1].parts.alloc.free(pfn, order);
      expect(freePages(guest.arena) + pcpPages(guest.arena, 2)).toBe(total);
      guest.kernels[0].parts.pcp.drainAll(2);
      audit(guest);
      expect(freePages(guest.arena)).toBe(total);
      expect(guest.log.total).toBe(0);
    },
  );

  example('zeroes and stamps what it hands out, and checks the stamp when it comes back', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { alloc } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const pfn = alloc.alloc(0, 1, 3);
    expect(guest.vcpus[0].load32(pfn as never, 5)).toBe(0);
    guest.vcpus[0].store32(pfn as never, 0, 123);
    alloc.free(pfn, 0);
    const [v] = guest.log.list();
    expect([v.kind, v.gfn, v.found]).toEqual(['stamp', pfn, 123]);
  });

  example('a page freed twice is a violation of the shadow', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { alloc } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const pfn = alloc.alloc(0, 1, 3);
    alloc.free(pfn, 0);
    alloc.free(pfn, 0);
    expect(guest.log.count('guest-page-state')).toBe(1);
  });

  example('a reported page handed out before it was put back is caught: reported-reuse (I3)', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { buddy, zones, alloc } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const zone = zones[1];
    const pfn = guest.arena.w[zone + listAt(10, 1)];
    buddy.lock(zone);
    expect(buddy.isolate(zone, pfn, 10)).toBe(true);
    // The fault: back on the list before the acknowledgement, without telling the shadow.
    buddy.freeOne(zone, pfn, 10, false);
    buddy.unlock(zone);
    const seen = new Set<number>();
    for (let i = 0; i < 14_000; i++) seen.add(alloc.alloc(0, 1, 3));
    expect(seen.has(pfn)).toBe(true);
    expect(guest.log.count('reported-reuse')).toBeGreaterThan(0);
  });

  example('a reported block that merges when it is put back is to be reported again, whole', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { buddy, zones } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const [, zone] = zones;
    buddy.lock(zone);
    // Two halves of a block; only one is reported, and its buddy is freed before it is put back.
    const pair = buddy.rmqueue(zone, 10, 1);
    buddy.freeOne(zone, pair, 9, false);
    expect(buddy.isolate(zone, pair, 9)).toBe(true);
    buddy.freeOne(zone, pair + 512, 9, false);
    buddy.putBack(zone, pair, 9, true);
    expect([buddy.freeOrder(pair), buddy.isReported(pair)]).toEqual([10, false]);
    buddy.unlock(zone);
  });

  example('blocks of two types that merge are of one type then, the first pageblock too', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { buddy, zones } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const [, zone] = zones;
    buddy.lock(zone);
    const pair = buddy.rmqueue(zone, 10, 1);
    buddy.setPageblockType(pair, 0);
    buddy.freeOne(zone, pair, 9, false);
    buddy.freeOne(zone, pair + 512, 9, false);
    buddy.unlock(zone);
    const type = buddy.pageblockType(pair);
    expect(buddy.pageblockType(pair + 512)).toBe(type);
    expect(buddy.freeOrder(pair)).toBe(10);
    audit(guest);
  });

  example(
    'an unmovable request without a block of its own takes a reclaimable one before a movable one',
    () => {
      const guest = testGuest(guestConfig(SMALL));
      const { buddy, zones } = guest.kernels[0].parts;
      guest.vcpus[0].enterGuest();
      const [, zone] = zones;
      const { w } = guest.arena;
      buddy.lock(zone);
      while (w[zone + listAt(10, 0)] >= 0) buddy.rmqueue(zone, 10, 0);
      const reclaimable = buddy.rmqueue(zone, 10, 1);
      for (const block of [reclaimable, reclaimable + 512]) buddy.setPageblockType(block, 2);
      buddy.freeOne(zone, reclaimable, 10, false);
      for (let order = 0; order < 10; order++)
        while (w[zone + listAt(order, 0)] >= 0) buddy.rmqueue(zone, order, 0);
      expect(w[zone + listAt(10, 1)]).toBeGreaterThan(0);
      const got = buddy.rmqueue(zone, 0, 0);
      buddy.unlock(zone);
      expect(got - (got % 1024)).toBe(reclaimable);
    },
  );

  example('what a lower zone keeps for itself is not had by who could be served from a higher one', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { zones } = guest.kernels[0].parts;
    const { w } = guest.arena;
    const [dma] = zones;
    w[dma + Z_RESERVE + 2] = 100;
    const mark = w[dma + Z_FREE] - 50;
    expect([watermarkOk(w, dma, 0, mark, 0), watermarkOk(w, dma, 0, mark, 2)]).toEqual([true, false]);
  });

  example(
    'a block that is freed counts as all of its pages; a poisoned page is poisoned to its last word',
    () => {
      const guest = testGuest(guestConfig(SMALL, { pagePoison: true }));
      const { alloc } = guest.kernels[0].parts;
      const [vcpu] = guest.vcpus;
      vcpu.enterGuest();
      const pfn = alloc.alloc(3, 0, 2);
      const before = eventSum(guest.arena, 'pgfree');
      alloc.free(pfn, 3);
      expect(eventSum(guest.arena, 'pgfree') - before).toBe(8);
      for (let page = pfn; page < pfn + 8; page++)
        for (const word of [0, 1, 8, 1022, 1023]) expect(vcpu.load32(toGfn(page), word)).toBe(0xaaaaaaaa | 0);
    },
  );

  example('a CPU that is asked for its pages says it has given them when it has', () => {
    const guest = testGuest(guestConfig(SMALL));
    const [asker, owner] = guest.kernels;
    asker.enter();
    owner.enter();
    const zone = owner.parts.zones[1];
    for (const limit of [Z_PCP_HIGH_MIN, Z_PCP_HIGH_MAX]) guest.arena.w[zone + limit] = 64;
    owner.parts.alloc.free(owner.parts.alloc.alloc(0, 1, 3), 0);
    expect(PerCpuPages.count(guest.arena.w, 1, 1)).toBeGreaterThan(0);
    const left = new Map<number, number>();
    let request = -1;
    const { store } = Atomics;
    // The first word that is set is the request; what is on the owner's lists when it is cleared?
    vi.spyOn(Atomics, 'store').mockImplementation(((view: Int32Array, index: number, value: number) => {
      if (value === 0) left.set(index, PerCpuPages.count(guest.arena.w, 1, 1));
      else if (request < 0) request = index;
      return store(view, index, value);
    }) as typeof Atomics.store);
    const relax = guest.vcpus[0].port.relax.bind(guest.vcpus[0].port);
    guest.vcpus[0].port.relax = () => {
      owner.parts.pcp.serveDrainRequest();
      relax();
    };
    asker.parts.pcp.drainAll(2);
    vi.restoreAllMocks();
    expect(PerCpuPages.count(guest.arena.w, 1, 1)).toBe(0);
    expect(left.get(request)).toBe(0);
  });

  example('what was reported is the last to be handed out, and its pageblocks are Movable then', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { buddy, zones } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const [, zone] = zones;
    const { w } = guest.arena;
    const reported = w[zone + listAt(10, 1)];
    buddy.setPageblockType(reported + 512, 0);
    buddy.lock(zone);
    expect(buddy.isolate(zone, reported, 10)).toBe(true);
    buddy.putBack(zone, reported, 10, true);
    expect(buddy.pageblockType(reported + 512)).toBe(1);
    const handedOut: number[] = [];
    while (w[zone + listAt(10, 1)] >= 0) handedOut.push(buddy.rmqueue(zone, 10, 1));
    buddy.unlock(zone);
    expect(handedOut.at(-1)).toBe(reported);
    expect(handedOut.length).toBeGreaterThan(8);
  });

  example(
    'isolation is refused below the min watermark (L35) and an isolated page cannot be allocated (L25)',
    () => {
      const guest = testGuest(guestConfig(SMALL));
      const { buddy, zones, alloc } = guest.kernels[0].parts;
      guest.vcpus[0].enterGuest();
      const zone = zones[1];
      const isolated: number[] = [];
      // Six blocks above the watermark, and half of a seventh.
      guest.arena.w[zone + Z_MIN] = guest.arena.w[zone + Z_FREE] - 6 * 1024 - 512;
      for (;;) {
        const pfn = guest.arena.w[zone + listAt(10, 1)];
        if (pfn < 0) break;
        buddy.lock(zone);
        const ok = buddy.isolate(zone, pfn, 10);
        buddy.unlock(zone);
        if (!ok) break;
        isolated.push(pfn);
      }
      expect(isolated.length).toBe(6);
      guest.arena.w[zone + Z_MIN] = 0;
      for (let pfn = alloc.alloc(0, 1, 3); pfn >= 0; pfn = alloc.alloc(0, 1, 3)) {
        for (const block of isolated) expect(pfn >= block && pfn < block + 1024).toBe(false);
      }
      buddy.lock(zone);
      for (const block of isolated) buddy.putBack(zone, block, 10, true);
      buddy.unlock(zone);
      expect(guest.log.total).toBe(0);
    },
  );

  example('isolation leaves more than the min watermark, not just as much (`__isolate_free_page`)', () => {
    const guest = testGuest(guestConfig(SMALL));
    const { buddy, zones } = guest.kernels[0].parts;
    guest.vcpus[0].enterGuest();
    const { w } = guest.arena;
    const zone = zones[1];
    const pfn = w[zone + listAt(10, 1)];
    const left = w[zone + Z_FREE] - 1024;
    const isolates = (min: number): boolean => {
      w[zone + Z_MIN] = min;
      return buddy.isolate(zone, pfn, 10);
    };
    buddy.lock(zone);
    expect([isolates(left), isolates(left - 1)]).toEqual([false, true]);
    buddy.unlock(zone);
  });

  example('another CPU’s list is drained when memory runs out', () => {
    const guest = testGuest(guestConfig(4 * SMALL));
    guest.vcpus.forEach((v) => v.enterGuest());
    const [a, b] = guest.kernels;
    const held: number[] = [];
    for (let i = 0; i < 500; i++) held.push(b.parts.alloc.alloc(0, 1, 3));
    for (const pfn of held) b.parts.alloc.free(pfn, 0);
    const onB = pcpPages(guest.arena, 2);
    expect(onB).toBeGreaterThan(0);
    while (a.parts.alloc.alloc(0, 1, 3) >= 0);
    expect(pcpPages(guest.arena, 2)).toBeLessThan(onB);
  });
});

describe('watermarks as Linux computes them', () => {
  example('a zone at its mark is not above it; one page more is (`__zone_watermark_ok`)', () => {
    const guest = testGuest(guestConfig(SMALL));
    const [, dma32] = guest.kernels[0].parts.zones;
    const { w } = guest.arena;
    w[dma32 + Z_RESERVE + 2] = 0;
    const free = w[dma32 + Z_FREE];
    expect([free - 1, free].map((mark) => watermarkOk(w, dma32, 0, mark, 2))).toEqual([true, false]);
    // Of a block of eight, seven pages count as taken before the last.
    expect([free - 8, free - 7].map((mark) => watermarkOk(w, dma32, 3, mark, 2))).toEqual([true, false]);
  });
  example(
    'what a zone keeps from requests of higher zones: a 256th of them below 4 GiB, a 32nd for Movable',
    () => {
      const w = new Int32Array(16384);
      const bases = [0, 1, 2, 3].map((type) => {
        const z = 256 + type * 256;
        w[z + Z_TYPE] = type;
        w[z + Z_MANAGED] = [3840, 256_000, 512_000, 1_024_000][type];
        return z;
      });
      setupWatermarks(w, bases, [0]);
      expect(bases.map((z) => [0, 1, 2, 3].map((type) => w[z + Z_RESERVE + type]))).toEqual([
        [0, 1000, 3000, 7000],
        [0, 0, 2000, 6000],
        [0, 0, 0, 32_000],
        [0, 0, 0, 0],
      ]);
    },
  );
  example('a 1 GiB guest: min_free from THP, 11264 pages over two zones (captured: 11263)', () => {
    expect(minFreePages(3840 + 243675, 2, true)).toBe(11264);
  });
  example('a 512 MiB guest has no THP: 4·√kB (captured: 681)', () => {
    expect(Math.abs(minFreePages(3840 + 114843, 2, false) - 681)).toBeLessThan(12);
  });
  example('batch of per-CPU lists: 63 for 243675 pages, 31 for 114843, 1 for DMA (as captured)', () => {
    expect([243675, 114843, 3840].map(pcpBatch)).toEqual([63, 31, 1]);
  });
});

example('freeByOrder is buddyinfo', () => {
  const guest = testGuest(guestConfig(SMALL));
  expect(freeByOrder(guest.arena).reduce((sum, n, o) => sum + n * 2 ** o, 0)).toBe(freePages(guest.arena));
});
