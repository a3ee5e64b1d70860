import { describe, expect, test } from 'vitest';
import { EXHIBITS } from './exhibits.ts';

describe.each(EXHIBITS.map((e) => [e.name, e] as const))('%s', (_name, exhibit) => {
  test('the broken profile shows the bug', () => {
    expect(exhibit.show(true).filter((c) => !c.ok)).toEqual([]);
  });
  test('the fixed profile does not', () => {
    expect(exhibit.show(false).filter((c) => !c.ok)).toEqual([]);
  });
});
