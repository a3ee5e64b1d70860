/** The allocator's front: which zones a request may use, in which order, and what it does when they are empty. */
import { gfn, MiB } from '@ebb/machine';
import { describe, expect, test } from 'vitest';
import { guestConfig, SMALL, testGuest, twoNodes, type TestGuest } from '../testing-guest.ts';
import { eventSum } from './events.ts';
import {
  GFP_ATOMIC,
  GFP_MEMALLOC,
  GFP_NO_KSWAPD,
  GFP_NORETRY,
  GFP_NOWAIT,
  GFP_THISNODE,
  GFP_ZERO,
  type PageAllocator,
} from './page-alloc.ts';
import {
  MIGRATE_MOVABLE,
  Z_END,
  Z_FLAGS,
  Z_FREE,
  Z_HIGH,
  Z_LOW,
  Z_MIN,
  Z_NODE,
  Z_RESERVE,
  Z_START,
  Z_TYPE,
  ZF_BELOW_HIGH,
} from './zone.ts';

const DMA = 0;
const DMA32 = 1;
const TWO_NODES = { nodes: twoNodes(256 * MiB), cpuNode: [0, 1] };

/** A guest, its zones as `node/type`, and what its first CPU's allocator asks of reclaim. */
function world(over: Parameters<typeof guestConfig>[1] = {}): {
  guest: TestGuest;
  alloc: PageAllocator;
  w: Int32Array;
  asked: string[];
  zone(node: number, type: number): number;
  /** Node and zone type of a page. */
  home(pfn: number): string;
} {
  const guest = testGuest(guestConfig(256 * MiB, over));
  const [kernel] = guest.kernels;
  kernel.enter();
  const { alloc, zones } = kernel.parts;
  const { w } = guest.arena;
  const name = (z: number): string => `${w[z + Z_NODE]}/${w[z + Z_TYPE]}`;
  const asked: string[] = [];
  alloc.pressure = {
    wakeKswapd: (z, highest) => void asked.push(`kswapd ${name(z)} for ${highest}`),
    reclaim: (node) => (asked.push(`reclaim ${node}`), 0),
    outOfMemory: () => (asked.push('oom'), 0),
  };
  return {
    guest,
    alloc,
    w,
    asked,
    zone: (node, type) => zones.find((z) => w[z + Z_NODE] === node && w[z + Z_TYPE] === type) ?? -1,
    home: (pfn) => name(zones.find((z) => pfn >= w[z + Z_START] && pfn < w[z + Z_END]) ?? -1),
  };
}

/** Blocks of 4 MiB from now on until there is none: their zones, each once, in the order in which they served. */
function drained(t: ReturnType<typeof world>, gfp: number, node?: number): string[] {
  const order = new Set<string>();
  for (;;) {
    const pfn = t.alloc.alloc(10, MIGRATE_MOVABLE, gfp | GFP_NOWAIT | GFP_NO_KSWAPD, node);
    if (pfn < 0) return [...order];
    order.add(t.home(pfn));
  }
}

describe('zonelists', () => {
  test('the own node first, its zones from the highest down, then the others (`ZONELIST_FALLBACK`)', () => {
    expect(drained(world(TWO_NODES), DMA32)).toEqual(['0/1', '0/0', '1/1']);
    expect(drained(world(TWO_NODES), DMA32, 1)).toEqual(['1/1', '0/1', '0/0']);
  });
  test('a request for a lower zone is served by none above it', () => {
    expect(drained(world(TWO_NODES), DMA)).toEqual(['0/0']);
  });
  test('GFP_THISNODE: nowhere else (`ZONELIST_NOFALLBACK`)', () => {
    expect(drained(world(TWO_NODES), DMA32 | GFP_THISNODE)).toEqual(['0/1', '0/0']);
    expect(drained(world(TWO_NODES), DMA32 | GFP_THISNODE, 1)).toEqual(['1/1']);
  });
  test('a page of another node than was asked is a miss, and counted', () => {
    const t = world(TWO_NODES);
    drained(t, DMA32 | GFP_THISNODE);
    expect(eventSum(t.guest.arena, 'numa_miss')).toBe(0);
    expect(t.home(t.alloc.alloc(10, MIGRATE_MOVABLE, DMA32))).toBe('1/1');
    expect(eventSum(t.guest.arena, 'numa_miss')).toBe(1);
  });
});

describe('marks', () => {
  /** Whether a page is to be had when the zones hold `above` pages more than the min watermark of 1,000. */
  const served = (above: number, gfp: number): boolean => {
    const t = world();
    for (const type of [DMA, DMA32]) {
      const z = t.zone(0, type);
      t.w[z + Z_RESERVE + DMA32] = 0;
      t.w[z + Z_MIN] = 1000;
      t.w[z + Z_FREE] = 1000 + above;
      t.w[z + Z_LOW] = 1 << 28;
    }
    return t.alloc.alloc(4, MIGRATE_MOVABLE, DMA32 | gfp | GFP_NOWAIT | GFP_NO_KSWAPD) >= 0;
  };
  test('below the low watermark the min watermark decides', () => {
    expect([served(17, 0), served(15, 0)]).toEqual([true, false]);
  });
  test('GFP_ATOMIC may use half of the reserve', () => {
    expect([served(-480, GFP_ATOMIC), served(-490, GFP_ATOMIC)]).toEqual([true, false]);
  });
  test('GFP_MEMALLOC may use all of it', () => {
    expect([served(-980, GFP_MEMALLOC), served(-990, GFP_MEMALLOC)]).toEqual([true, false]);
  });
  test('a zone that an allocation leaves below its high watermark is marked, so that its lists grow no more', () => {
    const t = world();
    const z = t.zone(0, DMA32);
    t.w[z + Z_HIGH] = t.w[z + Z_FREE];
    t.alloc.alloc(4, MIGRATE_MOVABLE, DMA32);
    expect(t.w[z + Z_FLAGS] & ZF_BELOW_HIGH).toBe(0);
    t.alloc.alloc(4, MIGRATE_MOVABLE, DMA32);
    expect(t.w[z + Z_FLAGS] & ZF_BELOW_HIGH).toBe(ZF_BELOW_HIGH);
  });
});

describe('when nothing is left', () => {
  /** What is asked of reclaim for one block of 4 MiB. */
  const asked = (gfp: number): string[] => {
    const t = world(TWO_NODES);
    drained(t, DMA32);
    t.alloc.alloc(10, MIGRATE_MOVABLE, gfp);
    return t.asked;
  };
  const KSWAPD = ['kswapd 0/1 for 1', 'kswapd 0/0 for 1', 'kswapd 1/1 for 1'];
  test('kswapd of every zone is woken, then reclaim, per-CPU lists, and the OOM path', () => {
    expect(asked(DMA32)).toEqual([...KSWAPD, 'reclaim 0', 'reclaim 0', 'oom']);
  });
  test('GFP_NORETRY does not call the OOM path', () => {
    expect(asked(DMA32 | GFP_NORETRY)).toEqual([...KSWAPD, 'reclaim 0', 'reclaim 0']);
  });
  test.each([GFP_NOWAIT, GFP_ATOMIC, GFP_MEMALLOC])('flags %i do not reclaim', (gfp) => {
    expect(asked(DMA32 | gfp)).toEqual(KSWAPD);
  });
  test('GFP_NO_KSWAPD wakes nobody', () => {
    expect(asked(DMA32 | GFP_NO_KSWAPD | GFP_NOWAIT)).toEqual([]);
  });
  test('a failure is counted', () => {
    const t = world();
    drained(t, DMA32);
    expect(eventSum(t.guest.arena, 'alloc_fail')).toBe(1);
  });
});

test('GFP_ZERO zeroes every page for who asks, though the guest runs with init_on_alloc=0', () => {
  const guest = testGuest(guestConfig(SMALL, { initOnAlloc: false }));
  const [kernel] = guest.kernels;
  kernel.enter();
  const { alloc } = kernel.parts;
  const [vcpu] = guest.vcpus;
  const word = (gfp: number): number[] => {
    const pfn = alloc.alloc(1, 0, DMA32 | gfp);
    const found = [pfn, pfn + 1].map((p) => vcpu.load32(gfn(p), 77));
    for (const p of [pfn, pfn + 1]) vcpu.store32(gfn(p), 77, 5);
    alloc.free(pfn, 1);
    return found;
  };
  word(0);
  expect([word(0), word(GFP_ZERO), word(0)]).toEqual([
    [5, 5],
    [0, 0],
    [5, 5],
  ]);
});

test('page_poison=1: a store to any page of a freed block is told when the block is handed out', () => {
  for (const stray of [0, 1, 3]) {
    const guest = testGuest(guestConfig(SMALL, { pagePoison: true }));
    const [kernel] = guest.kernels;
    kernel.enter();
    const { alloc } = kernel.parts;
    const pfn = alloc.alloc(2, 0, DMA32);
    alloc.free(pfn, 2);
    guest.vcpus[0].store32(gfn(pfn + stray), 8, 1);
    expect(alloc.alloc(2, 0, DMA32)).toBe(pfn);
    expect([guest.log.total, eventSum(guest.arena, 'poison_checked')]).toEqual([1, 4]);
  }
});
