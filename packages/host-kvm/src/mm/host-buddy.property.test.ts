import { fc, test } from '@fast-check/vitest';
import { expect } from 'vitest';
import { HOST_MAX_ORDER, HostBuddy } from './host-buddy.ts';

test.prop(
  [
    // Small hosts and small orders: blocks of different sizes must meet, or a wrong merge is never possible.
    fc.oneof(fc.integer({ min: 8, max: 64 }), fc.integer({ min: 1, max: 3000 })),
    fc.array(
      fc.tuple(fc.oneof(fc.integer({ min: 0, max: 3 }), fc.integer({ min: 0, max: 10 })), fc.boolean()),
      {
        maxLength: 200,
      },
    ),
  ],
  { numRuns: 300 },
)('blocks never overlap, are aligned, and merge back to the first state', (frames, program) => {
  const buddy = new HostBuddy(frames);
  const fresh = Array.from({ length: 11 }, (_, o) => buddy.blocks(o));
  const taken = new Uint8Array(frames);
  const held: { frame: number; order: number }[] = [];
  for (const [order, free] of program) {
    if (free && held.length > 0) {
      const { frame, order: o } = held.splice(order % held.length, 1)[0];
      taken.fill(0, frame, frame + (1 << o));
      buddy.freeRun(frame, 1 << o);
    } else {
      const frame = buddy.alloc(order);
      if (frame < 0) continue;
      expect(frame % (1 << order)).toBe(0);
      expect(taken.subarray(frame, frame + (1 << order)).every((t) => t === 0)).toBe(true);
      taken.fill(1, frame, frame + (1 << order));
      held.push({ frame, order });
    }
    expect(buddy.free).toBe(taken.filter((t) => t === 0).length);
  }
  for (const { frame, order } of held) buddy.freeRun(frame, 1 << order);
  expect(Array.from({ length: 11 }, (_, o) => buddy.blocks(o))).toEqual(fresh);
});

test('a block does not merge with a free one of another order: what lies between is in use', () => {
  const buddy = new HostBuddy(8);
  for (let i = 0; i < 8; i++) expect(buddy.alloc(0)).toBeGreaterThanOrEqual(0);
  // 0 and 1 become a block of two; its neighbour at 2 is free, but 3 is not.
  for (const frame of [2, 0, 1]) buddy.freeRun(frame, 1);
  expect([buddy.blocks(0), buddy.blocks(1), buddy.blocks(2)]).toEqual([1, 1, 0]);
});

test('a page of 1 GiB is had while its memory is in one piece, and comes back as blocks of the largest order', () => {
  const frames = (1 << 18) + 4096;
  const buddy = new HostBuddy(frames);
  const whole = buddy.blocks(HOST_MAX_ORDER);
  expect([buddy.alloc(18), buddy.alloc(18), buddy.free]).toEqual([0, -1, 4096]);
  // The rest goes on as before.
  expect(buddy.alloc(0)).toBe(1 << 18);
  buddy.freeRun(1 << 18, 1);
  buddy.freeRun(0, 1 << 18);
  expect([buddy.free, buddy.blocks(HOST_MAX_ORDER)]).toEqual([frames, whole]);
  // One frame of it in use, though not its first, and there is no such page.
  const [first, second] = [buddy.alloc(0), buddy.alloc(0)];
  buddy.freeRun(first, 1);
  expect([second < 1 << 18, buddy.alloc(18)]).toEqual([true, -1]);
});
