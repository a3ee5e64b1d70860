import { expect, test } from 'vitest';
import { longestCommonSubsequence } from './align.ts';
import { memoryFidelity } from './fidelity.ts';
import { readSession } from './session-file.ts';

test.each(['I-busy', 'E-block-128M', 'A-session'])(
  '%s: our requests and answers are the real ones, in their order',
  (name) => {
    const result = memoryFidelity(readSession(name), () => undefined);
    expect(result.devices.flatMap((d) => d.aligned.filter((a) => a.ebb !== a.real))).toEqual([]);
    expect(result.share).toBe(1);
    expect(result.ledgerViolations).toBe(0);
  },
);

test('two sequences are aligned by their longest common subsequence', () => {
  const rows = longestCommonSubsequence(['a', 'b', 'c', 'e'], ['a', 'c', 'd', 'e']);
  expect(rows.filter((r) => r.ebb === r.real).map((r) => r.ebb)).toEqual(['a', 'c', 'e']);
  expect(rows).toHaveLength(5);
});

test('a capture that is none is named', () => {
  expect(() => readSession('/nowhere.json')).toThrow(/cannot be read; give a CAPTURE/);
});
