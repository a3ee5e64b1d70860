/** The race detector: what is ordered by synchronisation is no race, everything else is. */
import { describe, expect, test } from 'vitest';
import { plainView, RACE_BYTES, RaceDetector, resetRaces } from './observed-views.ts';

const ARENA = 4 << 24;

function pair(): { a: RaceDetector; b: RaceDetector; va: Int32Array; vb: Int32Array } {
  const buffer = new SharedArrayBuffer(RACE_BYTES);
  resetRaces(buffer);
  const memory = new SharedArrayBuffer(4096);
  const make = (thread: number): RaceDetector => {
    const detector = new RaceDetector(buffer, thread, (_region, word) => word === 99);
    detector.active = true;
    return detector;
  };
  const a = make(1);
  const b = make(2);
  return {
    a,
    b,
    va: a.observe('arena', new Int32Array(memory)),
    vb: b.observe('arena', new Int32Array(memory)),
  };
}

describe('races', () => {
  test('a read after another thread’s write, unordered', () => {
    const { b, va, vb } = pair();
    va[7] = 1;
    expect(vb[7]).toBe(1);
    expect(b.races).toEqual([{ region: 'arena', word: 7, kind: 'read after write', by: 2, other: 1 }]);
  });
  test('write after read and write after write', () => {
    const { b, va, vb } = pair();
    void va[3];
    vb[3] = 1;
    va[4] = 1;
    vb[4] = 2;
    expect(b.races.map((r) => r.kind)).toEqual(['write after read', 'write after write']);
  });
  test('a release and an acquire of one word order what came before and after', () => {
    const { a, b, va, vb } = pair();
    va[7] = 1;
    a.atomic(ARENA | 50, false, true);
    b.atomic(ARENA | 50, true, false);
    expect(vb[7]).toBe(1);
    vb[7] = 2;
    expect(b.races).toEqual([]);
  });
  test('an acquire of another word orders nothing', () => {
    const { a, b, va, vb } = pair();
    va[7] = 1;
    a.atomic(ARENA | 50, false, true);
    b.atomic(ARENA | 51, true, false);
    void vb[7];
    expect(b.races.length).toBe(1);
  });
  test('a plain store to a word that another thread loads atomically', () => {
    const { b, va } = pair();
    va[60] = 1;
    b.atomic(ARENA | 60, true, false);
    expect(b.races.map((r) => r.kind)).toEqual(['read after write']);
  });
  test('words that are racy by design are let go; a whole fill counts word by word', () => {
    const { b, va, vb } = pair();
    va[99] = 1;
    void vb[99];
    va.fill(0, 10, 12);
    void vb[11];
    void vb[12];
    expect(b.races.map((r) => r.word)).toEqual([11]);
  });
});

test('an observed view is a typed array to those who ask, and knows the one beneath', () => {
  const { va } = pair();
  expect([va.length, va.byteOffset, plainView(va) instanceof Int32Array]).toEqual([1024, 0, true]);
  expect(plainView(plainView(va))).toBe(plainView(va));
});
