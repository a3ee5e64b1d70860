/** The hardware's walk beside a host that writes entries. */
import { afterEach, expect, test, vi } from 'vitest';
import { gfn, hfn } from './address.ts';
import { EPT_R, EPT_W, eptHigh, eptLow, eptWalk, WalkResult } from './ept.ts';

afterEach(() => {
  vi.restoreAllMocks();
});

test('a walk whose entry is replaced between its two words reads it again: high and low are of one entry', () => {
  const dram = new Int32Array(new SharedArrayBuffer(4096));
  // Frames above 4 GiB: their high words differ.
  const [before, after] = [0x0010_0001, 0x0020_0002];
  const write = (frame: number): void => {
    dram[1] = eptHigh(frame);
    dram[0] = eptLow(frame, EPT_R | EPT_W);
  };
  write(before);
  const load = Atomics.load.bind(Atomics);
  let loads = 0;
  vi.spyOn(Atomics, 'load').mockImplementation(((array: Int32Array, index: number) => {
    const value = load(array, index);
    // The low word of the old entry has been read.
    if (++loads === 1) write(after);
    return value;
  }) as typeof Atomics.load);
  const walk = new WalkResult();
  eptWalk(dram, hfn(0), gfn(0), walk, 1);
  expect([walk.present, walk.frame, walk.low]).toEqual([true, after, eptLow(after, EPT_R | EPT_W)]);
});
