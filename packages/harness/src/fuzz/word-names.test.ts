import * as kernel from '@ebb/guest-kernel';
import { expect, test } from 'vitest';
import { describeRace } from './racy.ts';
import { wordName } from './word-names.ts';

const PAGES = 4096;
const at = kernel.arenaLayout(PAGES);

test.each([
  [kernel.H_CACHE_LOCK, 'H_CACHE_LOCK'],
  [kernel.ZONE_BASE + kernel.ZONE_WORDS + kernel.Z_LOCK, 'zone 1, Z_LOCK'],
  [kernel.ZONE_BASE + kernel.Z_NR_FREE + 3, 'zone 0, Z_NR_FREE + 3'],
  [kernel.PCP_BASE + (kernel.MAX_CPUS + 2) * kernel.PCP_WORDS + 8, 'lists of vCPU 2 for zone 1, word 8'],
  [kernel.LRU_BASE + kernel.L_ACTIVE, 'LRU of node 0, L_ACTIVE'],
  [kernel.LRU_BASE + kernel.LRU_WORDS, 'LRU of node 1, L_LOCK'],
  [kernel.GROUP_BASE + kernel.GROUP_WORDS + 3, 'memory group 1, word 3'],
  [kernel.T_MEM + 2, 'T_MEM + 2'],
  [kernel.T_ACPI, 'T_ACPI'],
  [kernel.T_KSWAPD + 1, 'T_KSWAPD + 1'],
  [kernel.PROCESS_BASE + kernel.PROCESS_WORDS + 16, 'process 1, word 16'],
  [at.queues + kernel.QUEUE_WORDS, 'driver of queue 1, word 0'],
  [at.pageblocks + 5, 'type of pageblock 5'],
  [at.memmap + 0x123 * kernel.PAGE_STRUCT_WORDS + kernel.P_PREV, 'page 0x123, P_PREV'],
  [at.shadow + 0x10, 'page 0x10, shadow'],
  [at.free + 0x20, 'page 0x20, free block'],
  [at.words + 1, `arena word ${at.words + 1}`],
])('arena word %i is called %s', (word, name) => {
  expect(wordName('arena', word, PAGES)).toBe(name);
});

test('every word of the header and of the tables behind has a name', () => {
  const used = kernel.CPU_BASE + kernel.MAX_CPUS * kernel.CPU_WORDS;
  const nameless = Array.from({ length: at.words }, (_, word) => word).filter(
    (word) =>
      (word < used || word >= kernel.HEADER_WORDS) && wordName('arena', word, PAGES).startsWith('arena word'),
  );
  expect(nameless).toEqual([]);
});

test('a race names the field, the word, and both threads', () => {
  const race = {
    region: 'arena',
    word: kernel.H_NR_DIRTY,
    kind: 'write after write',
    by: 1,
    other: 2,
  } as const;
  expect(describeRace(race, PAGES)).toBe(
    `race: H_NR_DIRTY (arena word ${kernel.H_NR_DIRTY}): write after write by vcpu0, unordered with vcpu1`,
  );
});
