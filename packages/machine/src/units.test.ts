import { describe, expect, test } from 'vitest';
import { fc, test as prop } from '@fast-check/vitest';
import { Bitmap } from './bitmap.ts';
import { costTableHash, COST_TABLE } from './cost-table.ts';
import { gfnOf, gpa, gpaOf, pageOffset } from './address.ts';
import { hash2, Prng } from './prng.ts';
import { formatBytes, GiB, MiB, parseSize } from './units.ts';

describe('sizes', () => {
  test('parses what people write', () => {
    expect(parseSize('512M')).toEqual({ ok: true, value: 512 * MiB });
    expect(parseSize('1.5G')).toEqual({ ok: true, value: 1.5 * GiB });
    expect(parseSize('4096')).toEqual({ ok: true, value: 4096 });
    expect(parseSize('2GiB')).toEqual({ ok: true, value: 2 * GiB });
  });
  test('names what it cannot parse', () => {
    for (const text of ['', 'lots', '-1G', '2X', '0.3']) {
      const parsed = parseSize(text);
      expect(parsed.ok).toBe(false);
      if (!parsed.ok) expect(parsed.error).toContain(`'${text}'`);
    }
  });
  test('formats round numbers roundly', () =>
    expect([2 * GiB, 1536, 7].map(formatBytes)).toEqual(['2 GiB', '1.5 KiB', '7 B']));
});

test('addresses above 4 GiB keep all their bits', () => {
  const address = gpa(0x340000123);
  expect(gfnOf(address)).toBe(0x340000);
  expect(gpaOf(gfnOf(address)) + pageOffset(address)).toBe(address);
});

test('the random source is the same everywhere, and differs by seed', () => {
  const draw = (seed: number): number[] =>
    Array.from(
      { length: 4 },
      (
        (r) => () =>
          r.nextU32()
      )(new Prng(seed)),
    );
  expect(draw(1)).toEqual(draw(1));
  expect(draw(1)).not.toEqual(draw(2));
  expect(hash2(1, 2)).not.toBe(hash2(2, 1));
});

test('the cost table has one hash, which moves with any entry', () => {
  expect(costTableHash(COST_TABLE)).toBe(costTableHash({ ...COST_TABLE }));
  expect(costTableHash({ ...COST_TABLE, exitNs: 501 })).not.toBe(costTableHash(COST_TABLE));
});

prop.prop([fc.array(fc.integer({ min: 0, max: 199 }))])('a bitmap agrees with a set', (indices) => {
  const bitmap = new Bitmap(200);
  const set = new Set<number>();
  for (const i of indices) {
    const had = set.has(i);
    if (i % 3 === 0) {
      expect(bitmap.delete(i)).toBe(had);
      set.delete(i);
    } else {
      expect(bitmap.add(i)).toBe(!had);
      set.add(i);
    }
    expect(bitmap.has(i)).toBe(set.has(i));
  }
  expect(bitmap.count()).toBe(set.size);
});
