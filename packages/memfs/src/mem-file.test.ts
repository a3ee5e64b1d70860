import { describe, expect, test } from 'vitest';
import type { FrameSource, HugePolicy, InvalidationListener } from './backing.ts';
import { MemFile } from './mem-file.ts';

/** Frames from a counter; remembers what was freed and in which order things happened. */
function source(limit = 100_000): FrameSource & { freed: number[]; log: string[] } {
  let next = 512;
  const log: string[] = [];
  const freed: number[] = [];
  return {
    freed,
    log,
    allocZeroed(order) {
      next = Math.ceil(next / (1 << order)) * (1 << order);
      if (next + (1 << order) > limit) return -1;
      next += 1 << order;
      return next - (1 << order);
    },
    free(first, count) {
      log.push('free');
      for (let i = 0; i < count; i++) freed.push(first + i);
    },
  };
}

const drain = <T>(body: Generator<unknown, T, void>): T => {
  for (;;) {
    const step = body.next();
    if (step.done === true) return step.value;
  }
};
const file = (frames: FrameSource, huge: HugePolicy = 'never', nrBlocks = 2048): MemFile =>
  new MemFile({ name: 'ram0', nrBlocks, vm: 0, frames, huge });

test('a host of 64 KiB pages gives and takes sixteen blocks at once, and maps none of them large (H40)', () => {
  const frames = source();
  const f = file(frames, '64k', 64);
  expect(f.assign(21, true)).toBe(f.bmap(16) + 5);
  expect([f.assigned, f.granularity, f.bmap(15), f.bmap(32), f.isHuge(0)]).toEqual([16, 16, -1, -1, false]);
  expect(drain(f.punchHoles(Int32Array.of(16, 8), 1)).ok).toBe(false);
  expect(drain(f.punchHoles(Int32Array.of(16, 16), 1))).toEqual({ ok: true, value: 16 });
  expect([f.assigned, frames.freed.length]).toEqual([0, 16]);
  // None of that size: nothing, though single frames are left.
  expect(file(source(520), '64k', 64).assign(0, false)).toBe(-1);
});

describe('fallocate', () => {
  test('allocates exactly the missing blocks and is idempotent (Y27)', () => {
    const f = file(source());
    expect(f.fallocate(10, 5)).toEqual({ ok: true, value: 5 });
    expect(f.fallocate(8, 10)).toEqual({ ok: true, value: 5 });
    expect(f.fallocate(8, 10)).toEqual({ ok: true, value: 0 });
    expect(f.assigned).toBe(10);
  });
  test('takes a large frame only where all of it is asked for', () => {
    const f = file(source(), 'always');
    expect(f.fallocate(512, 100)).toEqual({ ok: true, value: 100 });
    expect([f.assigned, f.bmap(612)]).toEqual([100, -1]);
  });
  test('ENOSPC leaves what it has allocated, and the account exact', () => {
    const f = file(source(512 + 3));
    expect(f.fallocate(0, 10)).toEqual({ ok: false, error: 'ENOSPC' });
    expect(f.assigned).toBe(3);
  });
  test('a range outside the file is EINVAL', () =>
    expect(file(source()).fallocate(2040, 9)).toEqual({ ok: false, error: 'EINVAL' }));
});

describe('punch hole', () => {
  test('frees the blocks, keeps neighbours and size (Y28)', () => {
    const frames = source();
    const f = file(frames);
    f.fallocate(0, 20);
    const kept = [f.bmap(4), f.bmap(10)];
    const freed = [5, 6, 7, 8, 9].map((i) => f.bmap(i));
    expect(drain(f.punchHoles(Int32Array.of(5, 5), 1))).toEqual({ ok: true, value: 5 });
    expect([f.bmap(4), f.bmap(10)]).toEqual(kept);
    expect([5, 9].map((i) => f.bmap(i))).toEqual([-1, -1]);
    expect(frames.freed).toEqual(freed);
    expect([f.nrBlocks, f.assigned]).toEqual([2048, 15]);
  });
  test('listeners finish before any frame is freed, and learn of the end before it (Y16, I4)', () => {
    const frames = source();
    const f = file(frames);
    f.fallocate(0, 4);
    const listener: InvalidationListener = {
      *begin() {
        frames.log.push('zap');
        yield undefined;
        frames.log.push('flushed');
        expect(f.bmap(0)).toBeGreaterThanOrEqual(0);
      },
      end() {
        frames.log.push('end');
        expect(f.bmap(0)).toBe(-1);
      },
    };
    f.addListener(listener);
    f.addListener(listener);
    drain(f.punchHoles(Int32Array.of(0, 4), 1));
    expect(frames.log).toEqual(['zap', 'flushed', 'end', 'free']);
  });
  test('a hole is punched again without effect', () => {
    const f = file(source());
    expect(drain(f.punchHoles(Int32Array.of(3, 9), 1))).toEqual({ ok: true, value: 0 });
  });
  test('parts of a fixed 2 MiB page are refused, whole ones freed', () => {
    const f = file(source(), 'hugetlb');
    expect(f.assign(700, false)).toBeGreaterThanOrEqual(0);
    expect(f.assigned).toBe(512);
    expect(drain(f.punchHoles(Int32Array.of(512, 100), 1))).toEqual({ ok: false, error: 'EINVAL' });
    expect(drain(f.punchHoles(Int32Array.of(512, 512), 1))).toEqual({ ok: true, value: 512 });
  });
});

describe('huge-page policy', () => {
  test('always: a first touch takes the aligned 2 MiB; never: one page; madvise: as advised', () => {
    const touch = (huge: 'always' | 'never' | 'madvise', hugeAdvised = false): number => {
      const f = new MemFile({ name: 'r', nrBlocks: 2048, vm: 0, frames: source(), huge, hugeAdvised });
      f.assign(1000, true);
      return f.assigned;
    };
    expect([touch('always'), touch('never'), touch('madvise'), touch('madvise', true)]).toEqual([
      512, 1, 1, 512,
    ]);
  });
  test('a range with one page in it is no longer huge, and a mapper that cannot map 2 MiB gets one page', () => {
    const f = file(source(), 'always');
    f.assign(512, false);
    f.assign(513, true);
    expect(f.assigned).toBe(2);
    expect(f.isHuge(512)).toBe(false);
  });
  test('the last, partial 2 MiB of a file is filled page by page', () => {
    const f = file(source(), 'always', 700);
    f.assign(600, true);
    expect(f.assigned).toBe(1);
  });
});

test.each([0, 511])('a large range that has block %i already gets single frames, and keeps it', (has) => {
  const frames = source();
  const f = file(frames, 'always');
  const kept = f.assign(512 + has, false);
  f.assign(512 + 100, true);
  expect([f.bmap(512 + has), f.assigned, frames.freed.length]).toEqual([kept, 2, 0]);
});

test.each([0, 1, 511])('no large leaf may map a range whose block %i is another frame', (odd) => {
  const f = file(source(), 'always');
  f.assign(512, true);
  expect(f.isHuge(512)).toBe(true);
  drain(f.punchHoles(Int32Array.of(512 + odd, 1), 1));
  expect(f.isHuge(512)).toBe(false);
  f.assign(512 + odd, false);
  expect(f.isHuge(512)).toBe(false);
});

test('nor frames in a row that do not begin at a multiple of 2 MiB', () => {
  const f = file(source(), 'always');
  // One frame first, then 512 in a row behind it, one by one.
  f.assign(0, false);
  for (let i = 512; i < 1024; i++) f.assign(i, false);
  expect([f.bmap(1023) - f.bmap(512), f.isHuge(512)]).toEqual([511, false]);
});
