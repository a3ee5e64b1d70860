/** A system reset at any moment of a resize: nothing leaks, nobody waits for ever, and the last size is reached. */
import * as fc from 'fast-check';
import { MEMORY_PROFILES } from '@ebb/host-kvm';
import { MiB, NS_PER_MS, PAGE_SIZE } from '@ebb/machine';
import { expect, test } from 'vitest';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import { runInline } from '../run/inline-run.ts';
import type { VmSpec } from '../run/spec.ts';
import { device, hotplugGuest } from './hotplug-guest.ts';
import { second, spec } from './scenario.ts';

const REGION = 512 * MiB;
const block = fc.integer({ min: 0, max: REGION / (2 * MiB) }).map((n) => n * 2 * MiB);
/** Within the two seconds in which everything happens. */
const moment = fc.integer({ min: 0, max: 2000 }).map((n) => n * NS_PER_MS);

const story = fc.record({
  profile: fc.constantFrom(...MEMORY_PROFILES),
  policy: fc.constantFrom('virtio-1.2' as const, 'rfc-2017' as const),
  targets: fc.array(fc.tuple(moment, block), { minLength: 1, maxLength: 6 }),
  resets: fc.array(moment, { minLength: 1, maxLength: 3 }),
  last: block,
});

test('a system reset at any moment (I4, I9, I10, I20)', () => {
  let plugs = 0;
  fc.assert(
    fc.property(story, ({ profile, policy, targets, resets, last }) => {
      const mem = device({ regionBytes: REGION, profile });
      const vm: VmSpec = {
        bootAtNs: 0,
        guest: hotplugGuest(128 * MiB, [mem], policy === 'rfc-2017' ? { adopts: 'adds' } : {}),
        program: {
          kind: 'touch-free',
          startNs: second(0.5),
          pages: 4096,
          order: 0,
          rounds: 4,
          holdNs: second(0.2),
          pauseNs: second(0.2),
        },
        memoryDevices: [mem],
        memoryTargets: [
          ...targets.sort(([a], [b]) => a - b).map(([at, bytes]) => [at, 0, bytes] as const),
          [second(5.5), 0, last],
        ],
        resets: resets.sort((a, b) => a - b).map((at) => [at, policy] as const),
        diskBytes: 0,
      };
      const run = spec(REGION + 256 * MiB, [vm], { graceNs: second(5) });
      const buffers = runBuffers(run, hostBuffers(run.hostFrames * PAGE_SIZE));
      const { result } = runInline(run, buffers, (_vm, bytes) => fileStorage(bytes));
      const [{ plugged, requested, counters }] = result.vms[0].memoryDevices;
      expect([result.why, result.ledgerViolations]).toEqual(['', 0]);
      expect([plugged, requested]).toEqual([last, last]);
      plugs += counters.plugRequests;
    }),
    { numRuns: 10, seed: 20_261_121 },
  );
  expect(plugs).toBeGreaterThan(10);
});
