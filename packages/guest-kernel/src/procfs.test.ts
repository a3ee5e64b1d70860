/** `/proc`, read as on Linux 6.12: names, units, and whose figures they are. */
import { expect, test } from 'vitest';
import { MiB } from '@ebb/machine';
import { EV, eventRow } from './mm/events.ts';
import { L_ACTIVE, L_INACTIVE } from './mm/lru.ts';
import { H_NR_DIRTY, H_NR_FILE_PAGES, H_NR_WRITEBACK, LRU_BASE, LRU_WORDS } from './layout.ts';
import { START_FREE, START_RESERVED, zoneBases } from './boot.ts';
import { P_NEXT } from './mm/page.ts';
import { PerCpuPages } from './mm/per-cpu-pages.ts';
import { listAt, Z_END, Z_FREE, Z_HIGH, Z_LOW, Z_MANAGED, Z_MIN, Z_PRESENT, Z_START } from './mm/zone.ts';
import { buddyinfo, meminfo, pagetypeinfo, vmstat, zoneinfo } from './procfs.ts';
import { guestConfig, testGuest } from './testing-guest.ts';

const row = (text: string, name: string): number =>
  Number(new RegExp(`^${name.replace(/[()]/g, '\\$&')}:? +(\\d+)`, 'm').exec(text)?.[1] ?? NaN);

test('vmstat: Linux’s names in Linux’s units, and ours with ebb_ before them', () => {
  const { arena } = testGuest(guestConfig(64 * MiB));
  const { w } = arena;
  for (const [name, n] of [
    ['pgpgin', 3],
    ['pgscan_direct', 5],
    ['stamp_checked', 7],
  ] as const)
    w[eventRow(1) + EV[name]] = n;
  const text = vmstat(arena);
  expect([row(text, 'pgpgin'), row(text, 'pgscan_direct'), row(text, 'ebb_stamp_checked')]).toEqual([
    12, 5, 7,
  ]);
  const names = text
    .trim()
    .split('\n')
    .map((line) => line.split(' ')[0]);
  const own = new Set([
    'allocstall',
    'pgalloc',
    'pcp_refill',
    'fallback_steal',
    'reported_pages',
    'kswapd_wake',
  ]);
  expect(names.filter((name) => own.has(name))).toEqual([]);
});

test('meminfo: the LRU of every node, in KiB; what is available leaves the reserves', () => {
  const half = (64 * MiB) / 4096 / 2;
  const nodes = [
    { start: 0, end: half },
    { start: half, end: 2 * half },
  ];
  const { arena, kernels } = testGuest(guestConfig(64 * MiB, { nodes, cpuNode: [0, 1] }));
  const { w } = arena;
  // The third word of a list is its length.
  for (const [node, active, inactive] of [
    [0, 1, 10],
    [1, 2, 20],
  ]) {
    w[LRU_BASE + node * LRU_WORDS + L_ACTIVE + 2] = active;
    w[LRU_BASE + node * LRU_WORDS + L_INACTIVE + 2] = inactive;
  }
  w[H_NR_FILE_PAGES] = 400;
  const text = meminfo(arena);
  expect([row(text, 'Active(file)'), row(text, 'Inactive(file)')]).toEqual([3 * 4, 30 * 4]);
  const zones = kernels[0].parts.zones;
  const low = zones.reduce((sum, z) => sum + w[z + Z_LOW], 0);
  const spare = zones.reduce((sum, z) => sum + w[z + Z_FREE] - w[z + Z_HIGH], 0);
  expect(row(text, 'MemAvailable') / 4).toBeLessThanOrEqual(spare + 400 - Math.min(200, low));
  expect(row(text, 'MemAvailable') / 4).toBeGreaterThan(0);
  expect(text).not.toMatch(/Balloon/);
});

test('zoneinfo has five protections; what is reserved is present but not managed', () => {
  const pages = new Uint8Array(16_384).fill(START_FREE);
  pages.fill(START_RESERVED, 8000, 8100);
  const pageblocks = new Uint8Array(32).fill(1);
  const { arena, kernels } = testGuest(guestConfig(64 * MiB, { start: { pages, pageblocks } }));
  const zone = kernels[0].parts.zones[1];
  expect(arena.w[zone + Z_PRESENT] - arena.w[zone + Z_MANAGED]).toBe(100);
  expect(zoneinfo(arena, 2)).toMatch(/protection: \(\d+(, \d+){4}\)/);
});

test('pagetypeinfo counts every pageblock, the last one that is only in part memory too', () => {
  const maxPfn = (64 * MiB) / 4096 - 100;
  const e820 = [{ start: 0, end: maxPfn }];
  const { arena } = testGuest(guestConfig(64 * MiB, { e820, nodes: e820, maxPfn }));
  const rows = [...pagetypeinfo(arena).matchAll(/^Node \d+, zone +\w+((?: +\d+){5}) *$/gm)];
  const blocks = rows.flatMap((match) => match[1].trim().split(/ +/).map(Number));
  expect(blocks.reduce((a, b) => a + b, 0)).toBe(32);
  expect(buddyinfo(arena).split('\n')[0]).toMatch(/^Node 0, zone +DMA( +\d+){11} $/);
});

test('zoneinfo and pagetypeinfo: each number in its line, of its zone, type and order', () => {
  const half = (64 * MiB) / 4096 / 2;
  const nodes = [
    { start: 0, end: half },
    { start: half, end: 2 * half },
  ];
  const { arena } = testGuest(guestConfig(64 * MiB, { nodes, cpuNode: [0, 1] }));
  const { w, memmap } = arena;
  const fields = [Z_FREE, Z_MIN, Z_LOW, Z_HIGH, Z_PRESENT, Z_MANAGED] as const;
  const bases = zoneBases(w);
  bases.forEach((z, i) => fields.forEach((field, f) => (w[z + field] = 1000 * (i + 1) + f)));
  const sections = zoneinfo(arena, 2).split(/^(?=Node)/m);
  expect(sections).toHaveLength(bases.length);
  sections.forEach((text, i) => {
    const z = bases[i];
    const found = ['pages free', 'min', 'low', 'high', 'present', 'managed', 'spanned'].map((name) =>
      Number(new RegExp(`^ +${name} +(\\d+)$`, 'm').exec(text)?.[1]),
    );
    expect(found).toEqual([...fields.map((_, f) => 1000 * (i + 1) + f), w[z + Z_END] - w[z + Z_START]]);
    const sets = [0, 1].map((cpu) => [PerCpuPages.count(w, i, cpu), PerCpuPages.high(w, i, cpu)]);
    const told = [...text.matchAll(/count: (\d+)\n +high: +(\d+)/g)].map((m) => [Number(m[1]), Number(m[2])]);
    expect(told).toEqual(sets);
  });
  // One block of one type and order.
  const [zone] = bases;
  const pfn = w[zone + Z_START] + 512;
  for (let order = 0; order <= 10; order++)
    for (let type = 0; type < 5; type++) w[zone + listAt(order, type)] = -1;
  w[zone + listAt(3, 2)] = pfn;
  w[memmap + (pfn << 4) + P_NEXT] = -1;
  const rows = [...pagetypeinfo(arena).matchAll(/^Node +0, zone +\w+, type +(\w+) +([\d ]+)$/gm)].slice(0, 5);
  const counts = rows.map((m) => m[2].trim().split(/ +/).map(Number));
  expect(counts.map((c) => c.reduce((a, b) => a + b, 0))).toEqual([0, 0, 1, 0, 0]);
  expect(counts[2][3]).toBe(1);
});

test('meminfo: what is dirty and what is being written, each in KiB', () => {
  const { arena } = testGuest(guestConfig(64 * MiB));
  const { w } = arena;
  w[H_NR_DIRTY] = 11;
  w[H_NR_WRITEBACK] = 13;
  w[H_NR_FILE_PAGES] = 400;
  const text = meminfo(arena);
  expect(['Dirty', 'Writeback', 'Cached'].map((name) => row(text, name))).toEqual([44, 52, 1600]);
});
