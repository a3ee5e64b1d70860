/** Figures that make no memory device, in QEMU's words. */
import { expect, test } from 'vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { judgeMemoryDevice } from './memory-figures.ts';
import { ADDR, BLOCK, REGION } from './testing-memory-device.ts';

test.each([
  ['a block below QEMU’s least', { blockBytes: 0x80000 }, /at least 0x100000/],
  ['a block that is no power of two', { blockBytes: 3 * MiB }, /power of two/],
  [
    'a block smaller than the backing page (H40)',
    { region: { pageBytes: 2 * MiB } },
    /at least the page size/,
  ],
  ['a region of no whole blocks', { regionBytes: REGION + 4096 }, /multiples of 'block-size'/],
  ['an address of no whole blocks', { addr: ADDR + 4096 }, /'memaddr' property has to be multiples/],
  ['a request above the region', { requestedBytes: REGION + BLOCK }, /cannot exceed the memory backend size/],
])('%s makes no memory device', (_what, over, message) => {
  const figures = {
    addr: ADDR,
    regionBytes: REGION,
    blockBytes: BLOCK,
    requestedBytes: 0,
    region: { pageBytes: PAGE_SIZE },
    ...over,
  };
  expect(judgeMemoryDevice(figures)).toMatch(message);
});
