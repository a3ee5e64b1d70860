import { describe, expect, test } from 'vitest';
import { hammer } from './hammer.ts';

describe('vCPUs hammer pages while the host takes them away, in threads', () => {
  test.each(['never', 'always'] as const)(
    'huge pages %s: no stale write lands in a freed frame, no dirty bit is lost',
    async (huge) => {
      const result = await hammer({ discards: 2000, huge, seed: 7 });
      expect(result.kinds).toEqual([]);
      expect(result.violations).toBe(0);
      expect(result.discards).toBe(2000);
      expect(result.flushWaits).toBeGreaterThan(10);
      expect(result.stores).toBeGreaterThan(10_000);
    },
  );
});
