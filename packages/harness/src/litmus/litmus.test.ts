import { describe, expect, test } from 'vitest';
import { enumerate, LITMUS } from './litmus.ts';

describe.each(LITMUS.map((l) => [l.name, l] as const))('%s', (_name, litmus) => {
  test('with both stores atomic, at least one side sees the other', () => {
    const { both, executions } = enumerate(litmus, -1);
    expect([both, executions > 3]).toEqual([0, true]);
  });
  test.each([0, 1] as const)('with store %i plain, both may miss', (side) => {
    expect(enumerate(litmus, side).both).toBeGreaterThan(0);
  });
});

test('every outcome but the forbidden one occurs', () => {
  expect([...enumerate(LITMUS[0], -1).outcomes.keys()].toSorted()).toEqual(['0 1', '1 0', '1 1']);
});
