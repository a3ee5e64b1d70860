/** Taking memory out of use and back: isolation, counts, and what must not move. */
import { expect, test, vi } from 'vitest';
import { gfn, MiB } from '@ebb/machine';
import { LINUX_HOTPLUG, type GuestConfig } from '../boot.ts';
import { H_TOTAL_PAGES, MAX_ZONES, ZONE_BASE, ZONE_WORDS } from '../layout.ts';
import { GuestKernel } from '../kernel.ts';
import { guestConfig, SMALL, testGuest, type TestGuest } from '../testing-guest.ts';
import { L_ACTIVE, L_INACTIVE } from './lru.ts';
import { MemoryHotplug } from './memory-hotplug.ts';
import { P_FLAGS, P_NEXT, P_ZONE, PG_ACTIVE, PG_OFFLINE, PG_UPTODATE } from './page.ts';
import { PerCpuPages } from './per-cpu-pages.ts';
import {
  listAt,
  MAX_ORDER,
  MIGRATE_ISOLATE,
  MIGRATE_MOVABLE,
  MIGRATE_TYPES,
  setupWatermarks,
  Z_FREE,
  Z_LOCK,
  Z_MANAGED,
  Z_MIN,
  Z_TYPE,
  ZONE_MOVABLE,
} from './zone.ts';

/** A pageblock in the upper half of RAM, all of it free. */
const BLOCK = 8192 + 512;
const PAGES = 512;

interface World extends TestGuest {
  readonly kernel: GuestKernel;
  readonly hotplug: MemoryHotplug;
  readonly zone: number;
  flags(pfn: number): number;
  count(word: number): number;
}

function world(over: Partial<GuestConfig> = {}, sectionPages = 1024): World {
  const guest = testGuest(guestConfig(SMALL, over));
  const [kernel] = guest.kernels;
  kernel.enter();
  const { buddy, pcp, alloc, cache, processes, zones } = kernel.parts;
  const config = { ...LINUX_HOTPLUG, devices: 0, sectionPages, adopts: 'in-place' as const };
  const hotplug = new MemoryHotplug(
    guest.arena,
    guest.vcpus[0],
    buddy,
    pcp,
    alloc,
    cache,
    processes,
    zones,
    config,
    [0],
    true,
  );
  // DMA32: all above 16 MiB.
  const [, zone] = zones;
  hotplug.adopt(8192, 0);
  return {
    ...guest,
    kernel,
    hotplug,
    zone,
    flags: (pfn) => guest.arena.w[guest.arena.memmap + (pfn << 4) + P_FLAGS],
    count: (word) => guest.arena.w[zone + word],
  };
}

/** Free pages as the lists have them, isolated ones left out. */
function listed(w: World): number {
  let free = 0;
  for (let pfn = 4096; pfn < w.arena.maxPfn; pfn++) {
    const order = w.kernel.parts.buddy.freeOrder(pfn);
    if (order < 0) continue;
    if (w.kernel.parts.buddy.pageblockType(pfn) !== MIGRATE_ISOLATE) free += 1 << order;
    pfn += (1 << order) - 1;
  }
  return free;
}

test('what is taken out of use is nobody’s, counts nowhere, and comes back whole', () => {
  const w = world();
  const free = w.count(Z_FREE);
  const managed = w.count(Z_MANAGED);
  const total = w.arena.w[H_TOTAL_PAGES];
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, true)).toBe(true);
  expect(w.count(Z_FREE)).toBe(free - PAGES);
  expect(w.count(Z_MANAGED)).toBe(managed - PAGES);
  expect(w.arena.w[H_TOTAL_PAGES]).toBe(total - PAGES);
  for (let pfn = BLOCK; pfn < BLOCK + PAGES; pfn++) expect(w.flags(pfn)).toBe(PG_OFFLINE);
  expect(listed(w)).toBe(w.count(Z_FREE));
  w.hotplug.fakeOnline(BLOCK, PAGES);
  expect(w.count(Z_FREE)).toBe(free);
  expect(w.count(Z_MANAGED)).toBe(managed);
  expect(listed(w)).toBe(free);
  expect(w.log.total).toBe(0);
});

test('a range with a page in use that cannot move stays as it was', () => {
  const w = world();
  expect(w.kernel.parts.alloc.allocExactly(BLOCK + 77)).toBe(true);
  const free = w.count(Z_FREE);
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, true)).toBe(false);
  expect(w.count(Z_FREE)).toBe(free);
  expect(w.kernel.parts.buddy.pageblockType(BLOCK)).toBe(MIGRATE_MOVABLE);
  w.kernel.parts.alloc.free(BLOCK + 77, 0);
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, true)).toBe(true);
  expect(w.log.total).toBe(0);
});

test('a page that is freed into an isolated pageblock is not free before isolation ends', () => {
  const w = world();
  const { alloc, buddy, pcp } = w.kernel.parts;
  expect(alloc.allocExactly(BLOCK + 5)).toBe(true);
  const before = w.count(Z_FREE);
  buddy.lock(w.zone);
  buddy.isolatePageblock(w.zone, BLOCK);
  buddy.unlock(w.zone);
  expect(w.count(Z_FREE)).toBe(before - (PAGES - 1));
  expect(listed(w)).toBe(w.count(Z_FREE));
  buddy.lock(w.zone);
  expect(buddy.takeIsolated(w.zone, BLOCK, PAGES)).toBe(false);
  buddy.unlock(w.zone);
  alloc.free(BLOCK + 5, 0);
  pcp.drain(0);
  expect(w.count(Z_FREE)).toBe(before - (PAGES - 1));
  buddy.lock(w.zone);
  buddy.unisolatePageblock(w.zone, BLOCK, MIGRATE_MOVABLE);
  buddy.unlock(w.zone);
  expect(buddy.pageblockType(BLOCK)).toBe(MIGRATE_MOVABLE);
  expect(w.count(Z_FREE)).toBe(before + 1);
  expect(listed(w)).toBe(before + 1);
});

test('a process’s page moves out of the range, and the process never knows (H16)', () => {
  const w = world();
  const { processes, alloc } = w.kernel.parts;
  const id = processes.create(4);
  processes.store32(id, 2, 5, 99);
  const page = processes.pageAt(id, 2);
  // Moved into the range first, where the allocator would not have put it.
  expect(alloc.allocExactly(BLOCK + 3)).toBe(true);
  expect(processes.migrate(page, BLOCK + 3)).toBe(true);
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, true)).toBe(true);
  expect(processes.pageAt(id, 2)).not.toBe(BLOCK + 3);
  expect(processes.load32(id, 2, 5)).toBe(99);
});

test('taking memory out of use zeroes it: most of what unplugging costs', () => {
  const w = world();
  w.vcpus[0].store32(gfn(BLOCK + 9), 3, 0x5ec3e7);
  const began = w.vcpus[0].clock;
  w.hotplug.fakeOffline(BLOCK, PAGES, true);
  expect(w.vcpus[0].load32(gfn(BLOCK + 9), 3)).toBe(0);
  expect(w.vcpus[0].clock - began).toBeGreaterThanOrEqual(PAGES * w.vcpus[0].costs.guestZeroPageNs);
});

test('pageblocks leave and join the free lists under the zone lock alone', () => {
  const w = world();
  const { buddy } = w.kernel.parts;
  const held: boolean[] = [];
  const look = (): void => void held.push(w.count(Z_LOCK) !== 0);
  for (const name of ['isolatePageblock', 'takeIsolated', 'unisolatePageblock', 'freeOne'] as const) {
    const original = buddy[name].bind(buddy) as (...args: unknown[]) => unknown;
    vi.spyOn(buddy, name).mockImplementation((...args: unknown[]) => {
      look();
      return original(...args) as never;
    });
  }
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, true)).toBe(true);
  w.hotplug.fakeOnline(BLOCK, PAGES);
  expect(held.length).toBeGreaterThan(2);
  expect(held).not.toContain(false);
});

test('a cached page moves only while nobody but the cache holds it (I22)', () => {
  const w = world();
  const { alloc, cache } = w.kernel.parts;
  const page = alloc.alloc(0, MIGRATE_MOVABLE, 2);
  alloc.unstamp(page);
  w.vcpus[0].store32(gfn(page), 11, 0x60_0d);
  expect(cache.add(page, 7, 3, PG_UPTODATE)).toBe(true);
  const to = alloc.alloc(0, MIGRATE_MOVABLE, 2);
  expect(cache.lookup(7, 3)).toBe(page);
  expect(cache.migrate(page, to)).toBe(false);
  alloc.put(page);
  expect(cache.migrate(page, to)).toBe(true);
  expect(cache.lookup(7, 3)).toBe(to);
  expect(w.vcpus[0].load32(gfn(to), 11)).toBe(0x60_0d);
  expect(w.log.total).toBe(0);
});

test('a cached page moves to the list it was on: what is in use stays active', () => {
  const w = world();
  const { alloc, cache, lru } = w.kernel.parts;
  for (const list of [L_ACTIVE, L_INACTIVE]) {
    const [page, to] = [0, 0].map(() => alloc.alloc(0, MIGRATE_MOVABLE, 2));
    expect(cache.add(page, 7, list, PG_UPTODATE)).toBe(true);
    lru.lock(0);
    lru.remove(0, page);
    lru.add(0, list, page);
    lru.unlock(0);
    const before = [L_ACTIVE, L_INACTIVE].map((l) => lru.length(0, l));
    expect(cache.migrate(page, to)).toBe(true);
    expect([L_ACTIVE, L_INACTIVE].map((l) => lru.length(0, l))).toEqual(before);
    const flags = w.arena.w[w.arena.memmap + (to << 4) + P_FLAGS];
    expect((flags & PG_ACTIVE) !== 0).toBe(list === L_ACTIVE);
  }
});

test('a page freed into an isolated pageblock is on no per-CPU list, from which it would be handed out again', () => {
  const guest = testGuest(guestConfig(256 * MiB));
  const [kernel] = guest.kernels;
  kernel.enter();
  const { alloc, buddy, pcp, zones } = kernel.parts;
  expect(alloc.allocExactly(BLOCK + 5)).toBe(true);
  pcp.drain(0);
  const [, zone] = zones;
  buddy.lock(zone);
  buddy.isolatePageblock(zone, BLOCK);
  buddy.unlock(zone);
  alloc.free(BLOCK + 5, 0);
  expect(PerCpuPages.count(guest.arena.w, 1, 0)).toBe(0);
  for (const migratetype of [0, 1, 2]) expect(alloc.alloc(0, migratetype, 1)).not.toBe(BLOCK + 5);
});

test('a page that the disk could not fill is cached no more', () => {
  const w = world();
  const { alloc, cache } = w.kernel.parts;
  const page = alloc.alloc(0, MIGRATE_MOVABLE, 2);
  alloc.get(page);
  alloc.unstamp(page);
  expect(cache.add(page, 7, 3, 0)).toBe(true);
  // This guest has no disk at all.
  cache.fill(Int32Array.of(page), 1);
  expect(cache.lookup(7, 3)).toBe(-1);
  expect(w.flags(page) & PG_UPTODATE).toBe(0);
  alloc.put(page);
  expect(w.log.total).toBe(0);
});

test('memory that comes as Movable raises no kernel zone’s watermarks: nothing of the kernel’s depends on it', () => {
  const w = world();
  const words = w.arena.w;
  const { zones } = w.kernel.parts;
  const marks = (): number[] => zones.map((z) => words[z + Z_MIN]);
  const before = marks();
  // As if 4 GiB had been added to a Movable zone that shares nothing with the others.
  const movable = ZONE_BASE + (MAX_ZONES - 1) * ZONE_WORDS;
  words[movable + Z_TYPE] = ZONE_MOVABLE;
  words[movable + Z_MANAGED] = 1 << 20;
  setupWatermarks(words, [...zones, movable], [0, 0]);
  expect(marks()).toEqual(before);
  expect(words[movable + Z_MIN]).toBe(128);
});

test('a kernel boots over a cleared arena as over a fresh one', () => {
  const guest = testGuest(guestConfig(SMALL));
  const { w } = guest.arena;
  const first = Array.from(w.subarray(0, 16));
  const [kernel] = guest.kernels;
  const fresh = kernel.parts.zones.map((z) => [w[z + Z_FREE], w[z + Z_MANAGED]]);
  kernel.enter();
  for (let i = 0; i < 50; i++) kernel.parts.alloc.alloc(i % 3, MIGRATE_MOVABLE, 2);
  kernel.leave();
  guest.arena.clear();
  const second = new GuestKernel(kernel.config, w.buffer as SharedArrayBuffer, guest.vcpus[0]);
  guest.vcpus[0].enterGuest();
  second.boot();
  expect(Array.from(w.subarray(0, 16))).toEqual(first);
  expect(second.parts.zones.map((z) => [w[z + Z_FREE], w[z + Z_MANAGED]])).toEqual(fresh);
});

test('memory that goes for good is not zeroed first: an untouched DIMM takes no frames to be ejected', () => {
  const w = world();
  const zero = vi.spyOn(w.vcpus[0], 'zeroPages');
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, false)).toBe(true);
  expect(zero).not.toHaveBeenCalled();
});

test('poison goes with the content: what was taken out of use and comes back is not checked for it', () => {
  const w = world({ pagePoison: true });
  const { alloc, pcp } = w.kernel.parts;
  const pfns = Array.from({ length: 15_000 }, () => alloc.alloc(0, 1, 2)).filter((pfn) => pfn >= 0);
  for (const pfn of pfns) alloc.free(pfn, 0);
  pcp.drainAll(1);
  expect(pfns).toContain(BLOCK);
  expect(w.hotplug.fakeOffline(BLOCK, PAGES, true)).toBe(true);
  w.hotplug.fakeOnline(BLOCK, PAGES);
  while (alloc.alloc(0, 1, 2) >= 0);
  expect(w.log.total).toBe(0);
});

test('blocks of two zones side by side do not merge', () => {
  const w = world({ hotplug: { ...LINUX_HOTPLUG, devices: 0, sectionPages: 512, adopts: 'in-place' } }, 512);
  const { alloc, pcp, zones } = w.kernel.parts;
  const { memmap } = w.arena;
  const words = w.arena.w;
  w.hotplug.registerGroup(0, 0, 512);
  w.hotplug.adopt(8192 + 512, 0);
  // Unplugged and plugged again, a block between others of DMA32 is Normal.
  expect(w.hotplug.fakeOffline(8192 + 512, 512, true)).toBe(true);
  w.hotplug.remove(8192 + 512, 0);
  expect(w.hotplug.add(8192 + 512, 0)).toBe(true);
  w.hotplug.online(8192 + 512, 0, () => true);
  const normal = words[memmap + ((8192 + 512) << 4) + P_ZONE];
  expect(words[memmap + (8192 << 4) + P_ZONE]).not.toBe(normal);
  // All of DMA32 is used and freed, beside a Normal block that is free.
  const pfns = Array.from({ length: 16_384 }, () => alloc.alloc(0, 1, 1)).filter((pfn) => pfn >= 0);
  for (const pfn of pfns) alloc.free(pfn, 0);
  pcp.drainAll(1);
  for (const [index, zone] of zones.entries()) {
    let free = 0;
    for (let order = 0; order <= MAX_ORDER; order++)
      for (let type = 0; type < MIGRATE_TYPES; type++)
        for (
          let pfn = words[zone + listAt(order, type)];
          pfn >= 0;
          pfn = words[memmap + (pfn << 4) + P_NEXT]
        ) {
          free += 1 << order;
          for (let p = pfn; p < pfn + (1 << order); p++)
            expect(words[memmap + (p << 4) + P_ZONE]).toBe(index);
        }
    expect(free).toBe(words[zone + Z_FREE]);
  }
});
