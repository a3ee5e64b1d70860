/** How long a CPU's lists may grow, and that they shrink again. */
import { expect, test } from 'vitest';
import { MiB, NS_PER_S } from '@ebb/machine';
import { pcpPages } from '../procfs.ts';
import { guestConfig, testGuest, twoNodes } from '../testing-guest.ts';
import { PerCpuPages } from './per-cpu-pages.ts';
import { Z_LOW, Z_PCP_BATCH, Z_PCP_HIGH_MAX, Z_PCP_HIGH_MIN } from './zone.ts';

const DMA32 = 1;

test('allocations without frees fetch twice as much each time, and the list may grow by what was fetched (`nr_pcp_alloc`)', () => {
  const guest = testGuest(guestConfig(512 * MiB));
  const [kernel] = guest.kernels;
  const { pcp, zones } = kernel.parts;
  const { w } = guest.arena;
  const zone = zones[DMA32];
  const batch = w[zone + Z_PCP_BATCH];
  // Far apart, so that neither limit is reached.
  w[zone + Z_PCP_HIGH_MIN] = 8 * batch;
  w[zone + Z_PCP_HIGH_MAX] = 1000 * batch;
  kernel.enter();
  const fetched: number[] = [];
  while (fetched.length < 4) {
    const before = pcpPages(guest.arena, 1);
    pcp.alloc(DMA32, 0, 1);
    const after = pcpPages(guest.arena, 1);
    if (after > before) fetched.push(after + 1 - before);
  }
  expect(fetched.map((n) => n / batch)).toEqual([1, 2, 4, 8]);
  expect(PerCpuPages.high(w, DMA32, 0)).toBe((8 + 1 + 2 + 4 + 8) * batch);
});

test('the lists of a CPU that has nothing to do shrink by an eighth a second (`decay_pcp_high`)', () => {
  const guest = testGuest(guestConfig(512 * MiB));
  const [kernel] = guest.kernels;
  const { pcp, zones } = kernel.parts;
  const zone = zones[DMA32];
  const { w } = guest.arena;
  w[zone + Z_PCP_HIGH_MIN] = 100;
  w[zone + Z_PCP_HIGH_MAX] = 4096;
  kernel.enter();
  const held = Array.from({ length: 3000 }, () => pcp.alloc(DMA32, 0, 1));
  for (const pfn of held) pcp.free(DMA32, pfn, 0, 1);
  const high = PerCpuPages.high(w, DMA32, 0);
  expect(high).toBeGreaterThan(100);
  /** The limit after `n` seconds' worth of decay. */
  const after = (n: number): number => {
    let limit = high;
    for (let i = 0; i < n; i++) limit = Math.max(limit - (limit >> 3), 100);
    return limit;
  };
  const at = (seconds: number): number => {
    guest.vcpus[0].clock = seconds * NS_PER_S;
    kernel.runDue(Number.POSITIVE_INFINITY);
    return PerCpuPages.high(w, DMA32, 0);
  };
  expect([at(0.5), at(1), at(2)]).toEqual([high, after(1), after(2)]);
  // Nothing wakes it; it does what it has missed when something does.
  expect(kernel.nextDue()).toBe(Number.POSITIVE_INFINITY);
  expect(at(6.5)).toBe(after(6));
  expect([at(100), pcpPages(guest.arena, 1) <= 100]).toEqual([100, true]);
});

test('the lists of a zone share its low watermark among its own node’s CPUs (`zone_highsize`)', () => {
  const nodes = twoNodes(512 * MiB);
  const limits = (cpuNode: readonly number[]): number[] => {
    const { arena, kernels } = testGuest(guestConfig(512 * MiB, { nodes, cpuNode }));
    const zone = kernels[0].parts.zones[DMA32];
    return [arena.w[zone + Z_LOW], arena.w[zone + Z_PCP_HIGH_MIN]];
  };
  const [low, alone] = limits([0, 1]);
  expect(alone).toBe(low);
  expect(limits([0, 0])[1]).toBe(low >> 1);
  // No CPU is near: all share.
  expect(limits([1, 1])[1]).toBe(low >> 1);
});
