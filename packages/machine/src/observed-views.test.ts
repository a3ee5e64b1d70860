/** The race detector: what is ordered by synchronisation is no race, everything else is. */
import { describe, expect, test } from 'vitest';
import { plainView, RaceDetector } from './observed-views.ts';
import { RACE_BYTES, resetRaces } from './race-shadow.ts';
import { sharedI32, type SharedRegion } from './shared-views.ts';

interface Thread {
  readonly detector: RaceDetector;
  readonly view: Int32Array;
  /** An atomic store, and an atomic load, of a word: what orders. */
  release(word: number): void;
  acquire(word: number): void;
}

/** Two threads that observe the same memory. */
function pair(region: SharedRegion = 'arena'): { a: Thread; b: Thread } {
  const buffer = new SharedArrayBuffer(RACE_BYTES);
  resetRaces(buffer);
  const plain = sharedI32(region, new SharedArrayBuffer(2 * 4096));
  const thread = (id: number): Thread => {
    const detector = new RaceDetector(buffer, id, (_region, word) => word === 99);
    detector.active = true;
    return {
      detector,
      view: detector.observe(region, plain),
      release: (word) => detector.atomic(plain, word, word, false, true),
      acquire: (word) => detector.atomic(plain, word, word, true, false),
    };
  };
  return { a: thread(1), b: thread(2) };
}

describe('races', () => {
  test('a read after another thread’s write, unordered', () => {
    const { a, b } = pair();
    a.view[7] = 1;
    expect(b.view[7]).toBe(1);
    expect(b.detector.races).toEqual([
      { region: 'arena', word: 7, kind: 'read after write', by: 2, other: 1 },
    ]);
  });
  test('write after read and write after write', () => {
    const { a, b } = pair();
    void a.view[3];
    b.view[3] = 1;
    a.view[4] = 1;
    b.view[4] = 2;
    expect(b.detector.races.map((r) => r.kind)).toEqual(['write after read', 'write after write']);
  });
  test('a release and an acquire of one word order what came before and after', () => {
    const { a, b } = pair();
    a.view[7] = 1;
    a.release(50);
    b.acquire(50);
    expect(b.view[7]).toBe(1);
    b.view[7] = 2;
    expect(b.detector.races).toEqual([]);
  });
  test('an acquire of another word orders nothing', () => {
    const { a, b } = pair();
    a.view[7] = 1;
    a.release(50);
    b.acquire(51);
    void b.view[7];
    expect(b.detector.races.length).toBe(1);
  });
  test('a plain store to a word that another thread loads atomically', () => {
    const { a, b } = pair();
    a.view[60] = 1;
    b.acquire(60);
    expect(b.detector.races.map((r) => r.kind)).toEqual(['read after write']);
  });
  test('words that are racy by design are let go; a whole fill counts word by word', () => {
    const { a, b } = pair();
    a.view[99] = 1;
    void b.view[99];
    a.view.fill(0, 10, 12);
    void b.view[11];
    void b.view[12];
    expect(b.detector.races.map((r) => r.word)).toEqual([11]);
  });
  test('what a method of the array reads and writes counts word by word', () => {
    const races = (access: (view: Int32Array) => void): number[] => {
      const { a, b } = pair();
      for (let word = 20; word < 30; word++) a.view[word] = 1;
      access(b.view);
      return b.detector.races.map((r) => r.word);
    };
    expect(races((v) => v.set([1, 2, 3], 27))).toEqual([27, 28, 29]);
    expect(races((v) => v.copyWithin(100, 28, 40))).toEqual([28, 29]);
    expect(races((v) => v.copyWithin(28, 100, 104))).toEqual([28, 29]);
    expect(races((v) => void v.slice(0, 21))).toEqual([20]);
    expect(races((v) => void v.subarray(25, 60)[3])).toEqual([28]);
    expect(races((v) => void v.indexOf(9))).toHaveLength(10);
    expect(races((v) => v.fill(0, -4))).toEqual([]);
    expect(races((v) => v.fill(0, 28 - v.length, 40 - v.length))).toEqual([28, 29]);
    expect(races((v) => v.copyWithin(40, 26, -2020))).toEqual([26, 27]);
    expect(races((v) => void v.at(21))).toEqual([21]);
    // Read out of an observed view into one's own array.
    expect(races((v) => new Int32Array(8).set(v.subarray(25, 33)))).toEqual([25, 26, 27, 28, 29]);
  });
  test('an exit mailbox: what is written after the state is stored is seen by nobody in order', () => {
    const { a, b } = pair('vcpu-control');
    a.view[33] = 5;
    a.release(32);
    a.view[34] = 8;
    b.acquire(32);
    void b.view[33];
    void b.view[34];
    expect(b.detector.races.map((r) => r.word)).toEqual([34]);
  });
});

describe('DRAM', () => {
  test('is watched from the first atomic operation on a frame: what guests store elsewhere is theirs', () => {
    const { a, b } = pair('dram');
    a.view[7] = 1;
    b.view[7] = 2;
    a.release(0);
    a.view[8] = 1;
    b.view[8] = 2;
    b.view[1024 + 8] = 2;
    expect(b.detector.races.map((r) => r.word)).toEqual([8]);
  });
  test('an entry that is published by its index is read in order, one that is not is a race', () => {
    const { a, b } = pair('dram');
    a.release(0);
    a.view[20] = 1;
    a.release(0);
    b.acquire(0);
    void b.view[20];
    a.view[21] = 1;
    void b.view[21];
    expect(b.detector.races.map((r) => [r.word, r.kind])).toEqual([[21, 'read after write']]);
  });
  test('two 16-bit fields of a word are two', () => {
    const { a, b } = pair('dram');
    a.release(0);
    const halves = [a, b].map(({ detector, view }) =>
      detector.observe('dram', new Uint16Array(plainView(view).buffer)),
    );
    halves[0][40] = 1;
    void halves[1][41];
    expect(b.detector.races).toEqual([]);
    void halves[1][40];
    expect(b.detector.races.length).toBe(1);
  });
  test('a frame that gets another owner begins anew', () => {
    const { a, b } = pair('dram');
    a.release(0);
    a.view[7] = 1;
    a.detector.forget(0, 1);
    b.release(0);
    b.view[7] = 2;
    expect(b.detector.races).toEqual([]);
  });
});

test('an observed view is a typed array to those who ask, and knows the one beneath', () => {
  const { view } = pair().a;
  expect([view.length, view.byteOffset, plainView(view) instanceof Int32Array]).toEqual([2048, 0, true]);
  expect(plainView(plainView(view))).toBe(plainView(view));
});

test('what observing does not change: overlapping copies, copies of parts, spreading', () => {
  const { view } = pair().a;
  for (let i = 0; i < 6; i++) view[i] = i;
  view.set(view.subarray(0, 5), 1);
  expect([...view.subarray(0, 6)]).toEqual([0, 0, 1, 2, 3, 4]);
  expect([...new Int32Array(view.subarray(1, 4))]).toEqual([0, 1, 2]);
  const own = new Int32Array(3);
  own.set(view.subarray(3, 6));
  expect([...own]).toEqual([2, 3, 4]);
});

test('bytes of a word count as the word, wherever the range begins', () => {
  const { a, b } = pair();
  a.view[1] = 1;
  const bytes = b.detector.observe('arena', new Uint8Array(plainView(b.view).buffer));
  bytes.fill(0, 7, 9);
  expect(b.detector.races.map((r) => r.word)).toEqual([1]);
});
