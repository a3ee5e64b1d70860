/** Slots that change, and memory that goes, while somebody is in the middle of using them. */
import { expect, test } from 'vitest';
import {
  COST_TABLE,
  EXIT_DONE,
  EXIT_EPT_VIOLATION,
  gfn,
  hfn,
  MiB,
  PAGE_SIZE,
  VC_EXIT_COST_F64,
  VC_EXIT_STATE,
  VCPU_BLOCK_WORDS,
  VmKilled,
} from '@ebb/machine';
import type { TaskYield } from '../host-tasks.ts';
import { postExit, testHost, type TestHost } from './testing-host.ts';

const small = (): TestHost => testHost({ ramBytes: 16 * MiB, huge: 'never' });
const settle = (host: TestHost): void => {
  while (host.poll());
};
const ram = (host: TestHost, bytes: number) => ({
  slot: 0,
  flags: 0,
  guestPhysAddr: 0,
  memorySize: bytes,
  file: host.file,
  fileOffset: 0,
});

test('a resize that cannot be leaves the slot as it was', () => {
  const host = small();
  for (const how of ['qemu', 'naive', 'extension'] as const) {
    expect(host.finish(host.vm.resizeSlot(ram(host, 32 * MiB), how)).ok).toBe(false);
    expect(host.vm.slots.all.map((s) => s.nrPages)).toEqual([4096]);
  }
});

test('shrinking at once while the tail is punched: the punch finds what maps it', () => {
  const host = small();
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(4000), 0, 1);
  vcpu.leaveGuest();
  const resize = host.vm.resizeSlot(ram(host, 8 * MiB), 'extension');
  resize.next();
  host.finish(host.file.punchHoles(Int32Array.of(4000, 1), 1));
  expect(host.file.bmap(4000)).toBe(-1);
  host.finish(resize);
  expect(host.vm.slots.all.map((s) => s.nrPages)).toEqual([2048]);
  expect(host.log.total).toBe(0);
});

/** Begins a resize that waits for v1 in guest mode, does `meanwhile`, and lets v1 go. */
function duringResize(meanwhile: (host: TestHost) => void): TestHost {
  const host = small();
  const [v0, v1] = host.vcpus;
  v0.enterGuest();
  v0.store32(gfn(100), 0, 5);
  v0.leaveGuest();
  v1.enterGuest();
  v1.store32(gfn(2000), 0, 1);
  host.tasks.spawn(
    'resize',
    (function* () {
      yield* host.vm.resizeSlot(ram(host, 12 * MiB), 'qemu');
    })(),
  );
  for (let i = 0; i < 5; i++) host.poll();
  expect(host.vm.slots.find(100)?.invalid).toBe(true);
  meanwhile(host);
  v1.leaveGuest();
  const seen: boolean[] = [];
  host.tasks.spawn(
    'device',
    (function* () {
      for (let i = 0; i < 50; i++) {
        seen.push(host.vm.memory.contains(100 * PAGE_SIZE, 4, true));
        yield undefined;
      }
    })(),
  );
  settle(host);
  // Whatever KVM's slots were just then, the VMM's map had the page.
  expect(seen).not.toContain(false);
  expect(host.vm.slots.all.map((s) => s.nrPages)).toEqual([3072]);
  return host;
}

test("a device reads and writes memory while its slot is resized: the VMM's map changes in one step", () => {
  duringResize((host) => {
    expect(host.vm.memory.window(100 * PAGE_SIZE, 4, true)).toBe(true);
    expect(host.vm.memory.i32[host.vm.memory.at >> 2]).toBe(5);
  });
});

test('a discard while a slot is resized is carried out', () => {
  let freed = -1;
  const host = duringResize((h) => {
    h.tasks.spawn(
      'discard',
      (function* () {
        freed = yield* h.vm.discard(Int32Array.of(2000, 1), 1);
      })(),
    );
    for (let i = 0; i < 5; i++) h.poll();
  });
  expect([freed, host.file.bmap(2000)]).toEqual([1, -1]);
});

test('a discard across slots that show a file’s blocks in another order, some of them twice', () => {
  const host = small();
  const { vm, file } = host;
  const show = (slot: number, guestPhysAddr: number, fileOffset: number): void => {
    const shown = host.finish(
      vm.setUserMemoryRegion({ slot, flags: 0, guestPhysAddr, memorySize: 4 * MiB, file, fileOffset }),
    );
    expect(shown.ok).toBe(true);
  };
  host.finish(vm.setUserMemoryRegion({ ...ram(host, 0), memorySize: 0 }));
  show(0, 0, 1024);
  show(1, 4 * MiB, 0);
  show(2, 8 * MiB, 512);
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  for (const page of [0, 1024, 1600]) vcpu.store32(gfn(page), 0, 1);
  vcpu.leaveGuest();
  expect(host.finish(vm.discard(Int32Array.of(0, 3072), 1))).toBe(3);
  expect([file.assigned, host.log.total]).toEqual([0, 0]);
});

test('tables that a failed walk left empty are flushed before they are freed', () => {
  const host = small();
  // Frames for the page and two of the three tables.
  while (host.pool.buddy.free > 3) host.pool.chargeVmm(0, 1);
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  expect(() => vcpu.store32(gfn(5), 0, 1)).toThrow(VmKilled);
  const flushes = host.vm.counters.tlbFlushes;
  const free = host.pool.buddy.free;
  host.finish(host.vm.discard(Int32Array.of(0, 512), 1));
  // The page and the two tables.
  expect(host.pool.buddy.free - free).toBe(3);
  expect(host.vm.counters.tlbFlushes).toBeGreaterThan(flushes);
});

test('a leaf that cannot be split for want of a frame goes whole, and its tables with it', () => {
  const host = testHost({ ramBytes: 16 * MiB, huge: 'always' });
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(0), 0, 1);
  vcpu.leaveGuest();
  expect(host.vm.mmu.leafLevel(0)).toBe(2);
  while (host.pool.buddy.free > 0) host.pool.chargeVmm(0, 1);
  host.finish(host.vm.discard(Int32Array.of(7, 1), 1));
  expect([host.vm.mmu.leafLevel(0), host.vm.mmu.counters.tables]).toEqual([0, 1]);
});

test('two faults at once are each charged for what they had zeroed', () => {
  const host = testHost({ ramBytes: 16 * MiB, huge: 'always' });
  const [a] = host.vcpus;
  a.enterGuest();
  a.store32(gfn(512), 0, 1);
  a.leaveGuest();
  host.finish(host.vm.unmap(512, 512));
  a.enterGuest();
  const call = a.port.call.bind(a.port);
  const cost: number[] = [];
  a.port.call = (control, base) => {
    // The second vCPU faults on a page that has its frame, while the first one's 2 MiB are zeroed.
    const f64 = new Float64Array(control.buffer);
    const other = base + VCPU_BLOCK_WORDS;
    postExit(control, other, EXIT_EPT_VIOLATION, 512 * PAGE_SIZE, 1);
    host.tasks.spawn(
      'busy',
      (function* () {
        for (let i = 0; i < 20; i++) yield undefined;
      })(),
    );
    call(control, base);
    while (control[other + VC_EXIT_STATE] !== EXIT_DONE) host.poll();
    cost.push(f64[base / 2 + VC_EXIT_COST_F64], f64[other / 2 + VC_EXIT_COST_F64]);
  };
  a.store32(gfn(1024), 0, 1);
  const { exitNs, faultNs, hostZeroPageNs } = COST_TABLE;
  expect(cost).toEqual([exitNs + faultNs + 512 * hostZeroPageNs, exitNs + faultNs]);
});

test('a frame that a device has pinned keeps its content until the last pin goes', () => {
  const host = small();
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  vcpu.store32(gfn(1000), 0, 0x1234);
  vcpu.leaveGuest();
  const frame = hfn(host.file.bmap(1000));
  host.pool.pin(frame);
  const free = host.pool.buddy.free;
  host.finish(host.vm.discard(Int32Array.of(1000, 1), 1));
  expect(host.pool.memory.i32[frame * 1024]).toBe(0x1234);
  host.pool.unpin(frame);
  expect(host.pool.buddy.free).toBeGreaterThan(free);
  expect(host.pool.memory.i32[frame * 1024]).not.toBe(0x1234);
});

test('a scattered store to a word that is not RAM leaves it out and returns', () => {
  const host = small();
  const [vcpu] = host.vcpus;
  vcpu.enterGuest();
  const words = Int32Array.of(1024, (16 * MiB) / 4, 2048);
  expect(vcpu.scatter32(words, Int32Array.of(1, 2, 3), 0, 3)).toBe(1);
  const out = Int32Array.of(-1, -1, -1);
  expect(vcpu.gather32(words, out, 0, 3)).toBe(1);
  expect([...out]).toEqual([1, -1, 3]);
});

/** Two VMs show one file; the second one's vCPU is in guest mode, so that an invalidation of block 9 waits for it. */
function twoMappers(): { host: TestHost; letGo: () => void } {
  const host = small();
  const other = host.addVm();
  const shown = { slot: 5, flags: 0, guestPhysAddr: 64 * MiB, memorySize: 2 * MiB, fileOffset: 0 };
  expect(host.finish(other.vm.setUserMemoryRegion({ ...shown, file: host.file })).ok).toBe(true);
  const [own] = host.vcpus;
  own.enterGuest();
  own.store32(gfn(9), 0, 1);
  own.leaveGuest();
  const [theirs] = other.vcpus;
  theirs.enterGuest();
  expect(theirs.load32(gfn((64 * MiB) / PAGE_SIZE + 9), 0)).toBe(1);
  return { host, letGo: () => theirs.leaveGuest() };
}
const spawn = (host: TestHost, body: Generator<TaskYield, unknown, void>): void => {
  host.tasks.spawn(
    'task',
    (function* () {
      yield* body;
    })(),
  );
  for (let i = 0; i < 10; i++) host.poll();
};
/** Asks for changes of slots, one task each; what came of them, in the order in which they ended. */
function ask(host: TestHost, ...changes: Generator<TaskYield, { ok: boolean }, void>[]): boolean[] {
  const results: boolean[] = [];
  for (const change of changes)
    spawn(
      host,
      (function* () {
        results.push((yield* change).ok);
      })(),
    );
  return results;
}

test('a slot that shows blocks which are being taken away waits until they are gone (`mn_active_invalidate_count`)', () => {
  const { host, letGo } = twoMappers();
  const before = host.file.bmap(9);
  spawn(host, host.vm.discard(Int32Array.of(9, 1), 1));
  // The first VM’s mappings are gone, the second one’s are not, nor is the block.
  expect(host.file.bmap(9)).toBe(before);
  const at = (128 * MiB) / PAGE_SIZE;
  const alias = { slot: 1, flags: 0, guestPhysAddr: at * PAGE_SIZE, memorySize: 2 * MiB, fileOffset: 0 };
  spawn(host, host.vm.setUserMemoryRegion({ ...alias, file: host.file }));
  const [own] = host.vcpus;
  own.enterGuest();
  own.store32(gfn(at + 9), 0, 7);
  letGo();
  settle(host);
  expect(host.file.bmap(9)).toBe(-1);
  // Both names of the block are one page again, and nobody else’s.
  own.store32(gfn(at + 9), 0, 42);
  expect([own.load32(gfn(9), 0), host.log.total]).toEqual([42, 0]);
});

test('a slot in another VM, which shows nothing of the file yet, waits as well', () => {
  const host = small();
  const other = host.addVm();
  const [own, busy] = host.vcpus;
  own.enterGuest();
  own.store32(gfn(9), 0, 1);
  own.leaveGuest();
  busy.enterGuest();
  busy.store32(gfn(100), 0, 1);
  spawn(host, host.vm.discard(Int32Array.of(9, 1), 1));
  const at = (64 * MiB) / PAGE_SIZE;
  const shown = { slot: 5, flags: 0, guestPhysAddr: at * PAGE_SIZE, memorySize: 2 * MiB, fileOffset: 0 };
  spawn(host, other.vm.setUserMemoryRegion({ ...shown, file: host.file }));
  const [theirs] = other.vcpus;
  theirs.enterGuest();
  theirs.store32(gfn(at + 9), 0, 7);
  busy.leaveGuest();
  settle(host);
  expect(host.file.bmap(9)).toBe(-1);
  theirs.store32(gfn(at + 9), 0, 42);
  own.enterGuest();
  expect([own.load32(gfn(9), 0), host.log.total]).toEqual([42, 0]);
});

test.each(['qemu', 'naive', 'extension'] as const)(
  'a resize (%s) that comes while its slot is deleted finds none',
  (how) => {
    for (const bytes of [8, 24]) {
      const host = small();
      const [, busy] = host.vcpus;
      busy.enterGuest();
      busy.store32(gfn(8), 0, 1);
      const results = ask(
        host,
        host.vm.setUserMemoryRegion(ram(host, 0)),
        host.vm.resizeSlot(ram(host, bytes * MiB), how),
      );
      expect(results).toEqual([]);
      busy.leaveGuest();
      settle(host);
      expect([results, host.vm.slots.all, host.vm.slots.replaced]).toEqual([[true, false], [], null]);
    }
  },
);

test('slots change one request after the other: one that is deleted while it moves is gone, or has moved', () => {
  for (const first of ['move', 'delete']) {
    const { host, letGo } = twoMappers();
    const own = host.vcpus[1];
    own.enterGuest();
    own.store32(gfn(8), 0, 1);
    const move = { ...ram(host, 16 * MiB), guestPhysAddr: 32 * MiB };
    const requests = [move, { ...move, memorySize: 0 }];
    const inTurn = first === 'move' ? requests : requests.toReversed();
    const results = ask(host, ...inTurn.map((region) => host.vm.setUserMemoryRegion(region)));
    // The first waits for the vCPU.
    expect([results, host.vm.slots.all.map((s) => s.invalid)]).toEqual([[], [true]]);
    own.leaveGuest();
    letGo();
    const moved = (32 * MiB) / PAGE_SIZE;
    const there = (): boolean => host.vm.slots.find(moved)?.invalid === false;
    while (!there() && host.poll());
    // Whoever finds the slot in its new place uses it, at once.
    own.enterGuest();
    own.store32(gfn(moved + 8), 0, 2);
    own.leaveGuest();
    settle(host);
    expect(results).toEqual([true, true]);
    own.enterGuest();
    expect(own.load32(gfn(moved + 8), 0) === 2).toBe(first === 'delete');
    expect(host.vm.slots.all.map((s) => [s.baseGfn, s.invalid])).toEqual(
      first === 'move' ? [] : [[(32 * MiB) / PAGE_SIZE, false]],
    );
  }
});
