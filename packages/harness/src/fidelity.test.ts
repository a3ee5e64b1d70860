import { expect, test } from 'vitest';
import { agrees, type FidelityJson } from './fidelity.ts';

const same: FidelityJson = {
  freePages: { ebb: 9000, real: 9000 },
  pcpPages: { ebb: 1000, real: 1000 },
  byOrder: [],
  largeFreeShare: { ebb: 0.9, real: 0.9 },
  pageCachePages: { ebb: 2000, real: 2000 },
};

test('a replay agrees within 1 %, 1 % and 0.05, and differs on either side of that', () => {
  expect(agrees(same)).toBe(true);
  // What is on another list is not lost.
  expect(agrees({ ...same, freePages: { ebb: 9500, real: 9000 }, pcpPages: { ebb: 500, real: 1000 } })).toBe(
    true,
  );
  for (const sign of [-1, 1]) {
    const near: FidelityJson = {
      ...same,
      freePages: { ebb: 9000 + sign * 99, real: 9000 },
      pageCachePages: { ebb: 2000 + sign * 19, real: 2000 },
      largeFreeShare: { ebb: 0.9 + sign * 0.049, real: 0.9 },
    };
    expect(agrees(near)).toBe(true);
    expect(agrees({ ...near, freePages: { ebb: 9000 + sign * 101, real: 9000 } })).toBe(false);
    expect(agrees({ ...near, pageCachePages: { ebb: 2000 + sign * 21, real: 2000 } })).toBe(false);
    expect(agrees({ ...near, largeFreeShare: { ebb: 0.9 + sign * 0.051, real: 0.9 } })).toBe(false);
  }
});
