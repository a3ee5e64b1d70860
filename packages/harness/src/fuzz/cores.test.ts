import { expect, test } from 'vitest';
import { coresOf } from './cores.ts';

test.each([
  ['0', [0]],
  [' 0-2,5\n', [0, 1, 2, 5]],
  ['4-5', [4, 5]],
])('the list of cores %j', (list, cores) => {
  expect(coresOf(list)).toEqual(cores);
});
