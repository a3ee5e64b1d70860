/** Seeded faults. The guest's allocator. */
import { fault, props, test, type Mutant } from '../mutant.ts';

const BUDDY = 'packages/guest-kernel/src/mm/buddy.ts';
const PCP = 'packages/guest-kernel/src/mm/per-cpu-pages.ts';
const ZONE = 'packages/guest-kernel/src/mm/zone.ts';
const KERNEL = 'packages/guest-kernel/src/kernel.ts';
const PCP_TEST = test('guest-kernel/src/mm/per-cpu-pages.test.ts');
const ALLOC = 'packages/guest-kernel/src/mm/page-alloc.ts';
const ALLOCATOR_PROPERTY_TEST = test('guest-kernel/src/mm/allocator.property.test.ts');
const BOOT = 'packages/guest-kernel/src/boot.ts';
const PROCFS_TEST = test('guest-kernel/src/procfs.test.ts');

export const ALLOCATOR_FAULTS: readonly Mutant[] = [
  fault(
    'buddy-order-unchecked',
    BUDDY,
    'if ((w[page + P_FLAGS] & PG_BUDDY) === 0 || w[page + P_ORDER] !== o) break;',
    'if ((w[page + P_FLAGS] & PG_BUDDY) === 0) break;',
    'I19: merges unequal blocks',
    props('allocator'),
  ),
  fault(
    'buddy-not-free',
    BUDDY,
    'if ((w[page + P_FLAGS] & PG_BUDDY) === 0 || w[page + P_ORDER] !== o) break;',
    'if (w[page + P_ORDER] !== o) break;',
    'I19: merges with a block in use',
    props('allocator'),
  ),
  fault(
    'expand-forgets-half',
    BUDDY,
    '      this.#addHead(zone, pfn + (1 << o), o, migratetype);\n',
    '      if (o > 0) this.#addHead(zone, pfn + (1 << o), o, migratetype);\n',
    'I19: a half is lost when a block is split',
    props('allocator'),
  ),
  fault(
    'free-count-drifts',
    BUDDY,
    '      w[zone + Z_FREE] -= 1 << run;\n',
    '      w[zone + Z_FREE] -= 1;\n',
    'I19: the free count drifts',
    props('allocator'),
  ),
  fault(
    'no-init-on-alloc',
    ALLOC,
    'if (this.#options.initOnAlloc) vcpu.zeroPages(gfn(pfn), count);',
    '',
    'I2: a fresh page shows its old content',
    props('allocator'),
  ),
  fault(
    'pcp-count-drifts',
    PCP,
    '    w[pcp + C_COUNT] -= 1 << order;\n    return pfn;',
    '    w[pcp + C_COUNT] -= 1;\n    return pfn;',
    'I19: the per-CPU count drifts',
    props('allocator'),
  ),
  fault(
    'isolate-keeps-block',
    BUDDY,
    '    this.#remove(zone, pfn, order, this.pageblockType(pfn));\n    w[zone + Z_FREE]',
    '    w[zone + Z_FREE]',
    'L25 I3: a block is reported while it can be allocated',
    props('reporting'),
  ),
  fault(
    'merges-across-zones',
    BUDDY,
    '      if (w[page + P_ZONE] !== pageZone) break;\n',
    '',
    'I19: a zone lists pages of another (`page_is_buddy`)',
    test('guest-kernel/src/mm/memory-hotplug.test.ts'),
  ),
  fault(
    'merged-is-reported',
    BUDDY,
    '    if (reported && (w[page + P_FLAGS] & PG_BUDDY) !== 0 && w[page + P_ORDER] === order)\n',
    '    if (reported && (w[page + P_FLAGS] & PG_BUDDY) !== 0)\n',
    'L28: half of a merged block is never reported',
    test('guest-kernel/src/mm/allocator.property.test.ts'),
  ),
  fault(
    'run-of-strangers',
    PCP,
    '        if (w[this.#memmap + (at << 4) + P_PREV] !== end) return run;\n',
    '        if (w[this.#memmap + (at << 4) + P_PREV] < 0) return run;\n',
    'I19: pages that are not on the list are freed with those that are',
    test('guest-kernel/src/mm/page-runs.property.test.ts'),
  ),
  fault(
    'run-too-long',
    BUDDY,
    '    const whole = order + 31 - Math.clz32(most);\n',
    '    const whole = order + 32 - Math.clz32(most);\n',
    'I19: a refill takes more than was asked for',
    test('guest-kernel/src/mm/page-runs.property.test.ts'),
  ),
  fault(
    'list-grows-by-base',
    PCP,
    'high = Math.min(high + batch, max);',
    'high = Math.min(high + base, max);',
    'the lists of a CPU that only allocates stay short (`nr_pcp_alloc`)',
    PCP_TEST,
  ),
  fault(
    'idle-lists-stay',
    KERNEL,
    'while (pcp.decay() && missed-- > 0);',
    'pcp.decay();',
    'the lists of a CPU that has nothing to do do not shrink (`decay_pcp_high`)',
    PCP_TEST,
  ),
  fault(
    'lists-shared-by-all',
    ZONE,
    'const sharers = own > 0 ? own : cpuNode.length;',
    'const sharers = own > 0 ? cpuNode.length : own;',
    'a zone’s lists are shorter by the CPUs of other nodes (`zone_highsize`)',
    PCP_TEST,
  ),
  fault(
    'poison-short',
    ALLOC,
    'vcpu.u8.fill(0xaa, vcpu.at, vcpu.at + 4096);',
    'vcpu.u8.fill(0xaa, vcpu.at, vcpu.at + 4092);',
    'the last word of a page is not poisoned',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'drain-answered-first',
    PCP,
    '    this.drain(this.#vcpu.id);\n    Atomics.store(this.#w, at, 0);',
    '    Atomics.store(this.#w, at, 0);\n    this.drain(this.#vcpu.id);',
    'a drain is over before its pages are back',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'merged-head-keeps-type',
    BUDDY,
    'for (let p = pfn; p < pfn + (1 << order); p += PAGEBLOCK_PAGES) {\n      this.w',
    'for (let p = pfn + PAGEBLOCK_PAGES; p < pfn + (1 << order); p += PAGEBLOCK_PAGES) {\n      this.w',
    'I19: a block on a list that is not its type’s',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'fallback-order',
    BUDDY,
    '  [MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE],\n',
    '  [MIGRATE_MOVABLE, MIGRATE_RECLAIMABLE],\n',
    'unmovable pages go among movable ones first',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'no-lowmem-reserve',
    ALLOC,
    '<= mark + w[zone + Z_RESERVE + highestType]',
    '<= mark',
    'a low zone is used up by who could do without',
    ALLOCATOR_PROPERTY_TEST,
  ),
  fault(
    'reserved-managed',
    BOOT,
    '      else w[zone + Z_MANAGED]++;',
    '      w[zone + Z_MANAGED]++;',
    'MemTotal and watermarks count what is reserved',
    PROCFS_TEST,
  ),
  fault(
    'pgfree-by-block',
    ALLOC,
    'w[this.#events + EV.pgfree] += count;',
    'w[this.#events + EV.pgfree]++;',
    'vmstat counts a block as a page',
    ALLOCATOR_PROPERTY_TEST,
  ),
];
