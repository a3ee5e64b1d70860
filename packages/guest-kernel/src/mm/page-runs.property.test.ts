/** Runs of blocks that move between the buddy and a per-CPU list at once, against the same moves one by one. */
import { fc, test } from '@fast-check/vitest';
import { describe, expect } from 'vitest';
import { pcpPages } from '../procfs.ts';
import { guestConfig, SMALL, testGuest, type TestGuest } from '../testing-guest.ts';
import { FREE_ORDER, P_NEXT } from './page.ts';
import {
  listAt,
  MAX_ORDER,
  MIGRATE_TYPES,
  PAGEBLOCK_ORDER,
  Z_FREE,
  Z_NR_FREE,
  Z_PCP_HIGH_MAX,
  Z_PCP_HIGH_MIN,
} from './zone.ts';

/** Every free list of the zone from head to tail, and its counts. */
function lists(guest: TestGuest, zone: number): string {
  const { w, memmap } = guest.arena;
  let text = `${w[zone + Z_FREE]} free`;
  for (let order = 0; order <= MAX_ORDER; order++) {
    text += `\n${order}: ${w[zone + Z_NR_FREE + order]}`;
    for (let mt = 0; mt < MIGRATE_TYPES; mt++)
      for (let pfn = w[zone + listAt(order, mt)]; pfn >= 0; pfn = w[memmap + (pfn << 4) + P_NEXT])
        text += ` ${mt}/${pfn}/${w[guest.arena.free + pfn] & FREE_ORDER}`;
  }
  return text;
}

const fragments = fc.array(
  fc.record({
    order: fc.integer({ min: 0, max: 4 }),
    mt: fc.integer({ min: 0, max: 2 }),
    keep: fc.boolean(),
  }),
  { maxLength: 200 },
);

/** A guest whose zone has holes where `program` leaves them; its zone, and the pages that are held. */
function fragmented(program: readonly { order: number; mt: number; keep: boolean }[]): {
  guest: TestGuest;
  zone: number;
} {
  const guest = testGuest(guestConfig(SMALL));
  const { buddy, zones } = guest.kernels[0].parts;
  const [, zone] = zones;
  guest.vcpus[0].enterGuest();
  const taken = program.map(({ order, mt }) => buddy.rmqueue(zone, order, mt));
  program.forEach(({ order, keep }, i) => {
    if (!keep && taken[i] >= 0) buddy.freeOne(zone, taken[i], order, true);
  });
  return { guest, zone };
}

describe('a run of blocks', () => {
  test.prop(
    [
      fragments,
      fc.integer({ min: 0, max: 3 }),
      fc.integer({ min: 0, max: 2 }),
      fc.integer({ min: 1, max: 700 }),
    ],
    { numRuns: 60 },
  )('is what the buddy would give one by one, in the same order', (program, order, mt, want) => {
    const runs = fragmented(program);
    const singles = fragmented(program);
    const one = singles.guest.kernels[0].parts.buddy;
    const many = runs.guest.kernels[0].parts.buddy;
    const got: number[] = [];
    while (got.length < want) {
      const first = many.rmqueueRun(runs.zone, order, mt, want - got.length);
      if (first < 0) break;
      for (let i = 0; i < many.taken; i++) got.push(first + (i << order));
    }
    const expected: number[] = [];
    while (expected.length < want) {
      const pfn = one.rmqueue(singles.zone, order, mt);
      if (pfn < 0) break;
      expected.push(pfn);
    }
    expect(got).toEqual(expected);
    expect(lists(runs.guest, runs.zone)).toBe(lists(singles.guest, singles.zone));
  });

  test.prop(
    [fragments, fc.integer({ min: 0, max: 3 }), fc.integer({ min: 0, max: PAGEBLOCK_ORDER }), fc.nat(4)],
    { numRuns: 60 },
  )(
    'that makes up a larger block leaves the lists as its blocks would one by one',
    (program, order, larger, skip) => {
      const run = Math.max(order, larger);
      const whole = fragmented(program);
      const singles = fragmented(program);
      const take = ({ guest, zone }: typeof whole): number => {
        const { buddy } = guest.kernels[0].parts;
        // Some neighbours are taken as well, so that it is not always the next block that is free.
        for (let i = 0; i < skip; i++) buddy.rmqueue(zone, run, 1);
        return buddy.rmqueue(zone, run, 1);
      };
      const pfn = take(whole);
      expect(take(singles)).toBe(pfn);
      if (pfn < 0) return;
      whole.guest.kernels[0].parts.buddy.freeOne(whole.zone, pfn, run, true);
      for (let at = pfn; at < pfn + (1 << run); at += 1 << order)
        singles.guest.kernels[0].parts.buddy.freeOne(singles.zone, at, order, true);
      expect(lists(whole.guest, whole.zone)).toBe(lists(singles.guest, singles.zone));
    },
  );

  test.prop([fc.array(fc.nat(1000), { minLength: 1, maxLength: 300 }), fc.integer({ min: 0, max: 3 })], {
    numRuns: 40,
  })('on a per-CPU list is drained as its blocks would be one by one', (swaps, order) => {
    const drained = fragmented([]);
    const singles = fragmented([]);
    // Long lists here, so that what is freed waits for the drain.
    for (const limit of [Z_PCP_HIGH_MIN, Z_PCP_HIGH_MAX]) drained.guest.arena.w[drained.zone + limit] = 4096;
    const pages = (guest: TestGuest): number[] => {
      const held = Array.from({ length: 300 }, () => guest.kernels[0].parts.pcp.alloc(1, order, 1));
      // Mostly ascending, here and there not.
      swaps.forEach((s, i) => {
        const a = i % held.length;
        const b = (a + (s % 7 === 0 ? s : 0)) % held.length;
        [held[a], held[b]] = [held[b], held[a]];
      });
      return held.filter((pfn) => pfn >= 0);
    };
    const mine = pages(drained.guest);
    expect(pages(singles.guest)).toEqual(mine);
    drained.guest.kernels[0].parts.pcp.drain(0);
    singles.guest.kernels[0].parts.pcp.drain(0);
    const before = lists(drained.guest, drained.zone);
    expect(lists(singles.guest, singles.zone)).toBe(before);
    for (const pfn of mine) {
      drained.guest.kernels[0].parts.pcp.free(1, pfn, order, 1);
      singles.guest.kernels[0].parts.pcp.free(1, pfn, order, 1);
      // One by one: never more than one block on the list.
      singles.guest.kernels[0].parts.pcp.drain(0);
    }
    // Larger blocks that come in a row are not kept.
    if (order === 0) expect(pcpPages(drained.guest.arena, 1)).toBe(mine.length);
    drained.guest.kernels[0].parts.pcp.drain(0);
    expect(lists(drained.guest, drained.zone)).toBe(lists(singles.guest, singles.zone));
    expect(drained.guest.log.total).toBe(0);
  });
});
