/** Address spaces on one vCPU: demand paging, copy on write, exit, and what may move. Races are the fuzzer's. */
import { expect, test } from 'vitest';
import { eventSum } from './events.ts';
import { P_REF } from './page.ts';
import { guestConfig, SMALL, testGuest, type TestGuest } from '../testing-guest.ts';
import type { GuestKernel } from '../kernel.ts';
import type { Processes } from './process.ts';
import { MIGRATE_MOVABLE, Z_FREE } from './zone.ts';

interface World extends TestGuest {
  readonly kernel: GuestKernel;
  readonly processes: Processes;
  pageOf(id: number, vpn: number): number;
  free(): number;
}

function world(): World {
  const guest = testGuest({ ...guestConfig(SMALL), nrCpus: 1, cpuNode: [0] });
  const [kernel] = guest.kernels;
  kernel.enter();
  const { processes, zones, pcp } = kernel.parts;
  return {
    ...guest,
    kernel,
    processes,
    // The root's page is in the process's record; a translation names what is mapped.
    pageOf: (id, vpn) => processes.pageAt(id, vpn),
    free: () => {
      pcp.drain(0);
      return zones.reduce((sum, z) => sum + guest.arena.w[z + Z_FREE], 0);
    },
  };
}

test('a process sees zeros, then what it stored, in pages that come when they are touched', () => {
  const { processes, arena } = world();
  const id = processes.create(16);
  expect(processes.load32(id, 3, 7)).toBe(0);
  expect(processes.store32(id, 3, 7, 42)).toBe(true);
  expect(processes.load32(id, 3, 7)).toBe(42);
  expect(processes.load32(id, 3, 0)).toBe(0);
  expect(eventSum(arena, 'pgfault')).toBe(1);
});

test('fork shares until one side stores; each side keeps its own', () => {
  const w = world();
  const parent = w.processes.create(16);
  w.processes.store32(parent, 1, 0, 10);
  const child = w.processes.fork(parent);
  expect(w.pageOf(child, 1)).toBe(w.pageOf(parent, 1));
  w.processes.store32(child, 1, 0, 20);
  expect(w.pageOf(child, 1)).not.toBe(w.pageOf(parent, 1));
  expect(w.processes.load32(parent, 1, 0)).toBe(10);
  w.processes.store32(parent, 1, 0, 30);
  expect(w.processes.load32(child, 1, 0)).toBe(20);
  expect(eventSum(w.arena, 'cow')).toBe(1);
});

test('exit gives everything back, page tables included', () => {
  const w = world();
  const before = w.free();
  const id = w.processes.create(64);
  for (let vpn = 0; vpn < 64; vpn++) w.processes.store32(id, vpn, 0, vpn);
  const child = w.processes.fork(id);
  w.processes.exit(id);
  expect(w.processes.load32(child, 63, 0)).toBe(63);
  w.processes.exit(child);
  expect(w.free()).toBe(before);
  expect(w.log.total).toBe(0);
});

test('a page that two processes share moves under both (I22)', () => {
  const w = world();
  const parent = w.processes.create(16);
  w.processes.store32(parent, 5, 9, 77);
  const child = w.processes.fork(parent);
  const from = w.pageOf(parent, 5);
  const to = w.kernel.parts.alloc.alloc(0, MIGRATE_MOVABLE, 3);
  expect(w.processes.migrate(from, to)).toBe(true);
  expect([w.pageOf(parent, 5), w.pageOf(child, 5)]).toEqual([to, to]);
  expect(w.processes.load32(child, 5, 9)).toBe(77);
  w.processes.store32(parent, 5, 9, 78);
  expect(w.processes.load32(child, 5, 9)).toBe(77);
});

test('a page that somebody else holds stays where it is', () => {
  const w = world();
  const id = w.processes.create(16);
  w.processes.store32(id, 5, 9, 77);
  const from = w.pageOf(id, 5);
  Atomics.add(w.arena.w, w.arena.memmap + (from << 4) + P_REF, 1);
  const to = w.kernel.parts.alloc.alloc(0, MIGRATE_MOVABLE, 3);
  expect(w.processes.migrate(from, to)).toBe(false);
  expect(w.pageOf(id, 5)).toBe(from);
  expect(w.processes.load32(id, 5, 9)).toBe(77);
});

interface TwoCpus {
  readonly first: GuestKernel;
  readonly second: GuestKernel;
  /** What the second vCPU does when the first waits for it. */
  meanwhile: () => void;
}

function twoCpus(): TwoCpus {
  const holder: { world: TwoCpus | null } = { world: null };
  const guest = testGuest(guestConfig(SMALL), { pump: () => holder.world?.meanwhile() });
  const [first, second] = guest.kernels;
  const world: TwoCpus = { first, second, meanwhile: () => undefined };
  holder.world = world;
  first.enter();
  return world;
}

test('a vCPU between slices forgets before its next access what it was told to forget', () => {
  const { first, second } = twoCpus();
  const id = first.parts.processes.create(4);
  second.enter();
  second.parts.processes.store32(id, 1, 0, 5);
  second.leave();
  const from = first.parts.processes.pageAt(id, 1);
  const to = first.parts.alloc.alloc(0, MIGRATE_MOVABLE, 3);
  expect(first.parts.processes.migrate(from, to)).toBe(true);
  first.parts.processes.store32(id, 1, 0, 6);
  second.enter();
  expect(second.parts.processes.load32(id, 1, 0)).toBe(6);
});

test('a store that another vCPU makes before it answers is in the page that has moved (I22)', () => {
  const world = twoCpus();
  const { first, second } = world;
  const id = first.parts.processes.create(4);
  second.enter();
  second.parts.processes.store32(id, 1, 0, 5);
  world.meanwhile = () => {
    second.parts.processes.store32(id, 1, 0, 55);
    second.parts.processes.shootdown.serve();
  };
  const from = first.parts.processes.pageAt(id, 1);
  const to = first.parts.alloc.alloc(0, MIGRATE_MOVABLE, 3);
  expect(first.parts.processes.migrate(from, to)).toBe(true);
  expect(first.parts.processes.load32(id, 1, 0)).toBe(55);
  // And from now on both use the new page.
  world.meanwhile = () => second.parts.processes.shootdown.serve();
  second.parts.processes.store32(id, 1, 0, 66);
  expect(first.parts.processes.load32(id, 1, 0)).toBe(66);
});

test('after a fork a thread of the parent stores into a page of its own, not into what the child shares', () => {
  const world = twoCpus();
  const { first, second } = world;
  world.meanwhile = () => first.parts.processes.shootdown.serve();
  const id = first.parts.processes.create(4);
  second.enter();
  second.parts.processes.store32(id, 1, 0, 5);
  second.leave();
  const child = first.parts.processes.fork(id);
  second.enter();
  second.parts.processes.store32(id, 1, 0, 6);
  second.leave();
  expect(first.parts.processes.load32(child, 1, 0)).toBe(5);
  expect(first.parts.processes.load32(id, 1, 0)).toBe(6);
});

test('after a copy on write the other threads of the process read the copy', () => {
  const { first, second } = twoCpus();
  const id = first.parts.processes.create(4);
  first.parts.processes.store32(id, 1, 0, 5);
  first.parts.processes.fork(id);
  second.enter();
  expect(second.parts.processes.load32(id, 1, 0)).toBe(5);
  second.leave();
  first.parts.processes.store32(id, 1, 0, 6);
  second.enter();
  expect(second.parts.processes.load32(id, 1, 0)).toBe(6);
});

test('a fault that finds the page there already gives back the one it took', () => {
  const w = world();
  const before = w.free();
  const id = w.processes.create(4);
  // Another thread maps the page while this one has allocated for it.
  const { alloc } = w.kernel.parts;
  const take = alloc.alloc.bind(alloc);
  let again = true;
  alloc.alloc = (...args) => {
    const pfn = take(...args);
    if (again && args[1] === MIGRATE_MOVABLE) {
      again = false;
      w.processes.store32(id, 1, 0, 7);
    }
    return pfn;
  };
  expect(w.processes.load32(id, 1, 0)).toBe(7);
  w.processes.exit(id);
  expect(w.free()).toBe(before);
});
