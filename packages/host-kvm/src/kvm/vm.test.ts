import { describe, expect, test } from 'vitest';
import { EPT_A, EPT_D, eptWalk, gfn, hfn, MiB, PAGE_SIZE, WalkResult } from '@ebb/machine';
import { MemFile } from '@ebb/memfs';
import { KVM_MEM_READONLY } from './memslots.ts';
import { FRAME_ACCESSED, FRAME_DIRTY } from './tdp-mmu.ts';
import { testHost } from './testing-host.ts';

const page = (n: number): ReturnType<typeof gfn> => gfn(n);

describe('faults', () => {
  test('a first touch maps 2 MiB with one violation; the second access causes no exit (Y18)', () => {
    const { vm, file, vcpus } = testHost();
    vcpus[0].enterGuest();
    vcpus[0].store32(page(700), 3, 42);
    expect(vcpus[0].load32(page(1000), 0)).toBe(0);
    expect(vcpus[0].load32(page(700), 3)).toBe(42);
    expect([vm.counters.eptViolations, vm.mmu.leafLevel(700), file.assigned]).toEqual([1, 2, 512]);
  });
  test('with huge pages off the same touches map two pages', () => {
    const { vm, vcpus } = testHost({ huge: 'never' });
    vcpus[0].enterGuest();
    vcpus[0].store32(page(700), 3, 42);
    vcpus[0].load32(page(1000), 0);
    expect([vm.counters.eptViolations, vm.mmu.leafLevel(700), vm.mmu.leafLevel(701)]).toEqual([2, 1, 0]);
  });
  test('pages mapped before they are touched cause no exit; outside every slot nothing is', () => {
    const { vm, file, vcpus } = testHost({ huge: 'never' });
    expect(vm.preFault(100, 5)).toBe(true);
    vcpus[0].enterGuest();
    for (let p = 100; p < 105; p++) vcpus[0].store32(page(p), 0, p);
    expect([vm.counters.eptViolations, file.assigned, vcpus[0].runFrame(page(104), true)]).toEqual([
      0,
      5,
      file.bmap(104),
    ]);
    expect([vm.preFault(0xfffff, 2), file.assigned]).toEqual([true, 5]);
    const poor = testHost({ hostBytes: 8 * MiB, ramBytes: 16 * MiB, huge: 'never' });
    expect(poor.vm.preFault(0, 4096)).toBe(false);
  });
  test('bmap is the EPT leaf (Y26)', () => {
    const { file, vcpus } = testHost();
    vcpus[0].enterGuest();
    vcpus[0].store32(page(5), 0, 1);
    expect(vcpus[0].runFrame(page(5), false)).toBe(file.bmap(5));
  });
  test('an access outside every slot is emulated: reads give all ones, writes vanish, both are counted', () => {
    const { vm, vcpus } = testHost();
    vcpus[0].enterGuest();
    vcpus[0].store32(page(0xfffff), 0, 7);
    expect(vcpus[0].load32(page(0xfffff), 0)).toBe(-1);
    expect([vm.counters.unclaimedMmio, vcpus[0].counters.unmappedAccesses]).toEqual([2, 2]);
  });
  test('a host without a free frame kills the VM, and no other', () => {
    const host = testHost({ hostBytes: 8 * MiB, ramBytes: 16 * MiB, huge: 'never' });
    const other = host.addVm();
    other.vcpus[0].enterGuest();
    other.vcpus[0].store32(page(1), 0, 5);
    host.vcpus[0].enterGuest();
    expect(() => {
      for (let p = 0; p < 4096; p++) host.vcpus[0].store32(page(p), 0, p);
    }).toThrow(/VM 0: the host has no frame left/);
    expect(other.vcpus[0].load32(page(1), 0)).toBe(5);
    expect(host.log.total).toBe(0);
  });
});

test('the leaf of a fault has the A and D of the access that faulted (`make_spte`); a later store sets D in the walk (I8)', () => {
  const host = testHost({ huge: 'never' });
  const [vcpu] = host.vcpus;
  const leaf = (gfn: number): number => {
    const walk = new WalkResult();
    eptWalk(host.pool.memory.i32, host.vm.mmu.root, page(gfn), walk);
    return walk.low & (EPT_A | EPT_D);
  };
  // What the host has installed before the vCPU goes on.
  const installed: number[] = [];
  const map = host.vm.mmu.map.bind(host.vm.mmu);
  host.vm.mmu.map = (gfn, ...rest) => {
    const done = map(gfn, ...rest);
    installed.push(leaf(gfn));
    return done;
  };
  vcpu.enterGuest();
  vcpu.load32(page(1), 0);
  vcpu.store32(page(2), 0, 1);
  expect(installed).toEqual([EPT_A, EPT_A | EPT_D]);
  expect(leaf(1)).toBe(EPT_A);
  vcpu.store32(page(1), 0, 1);
  expect(leaf(1)).toBe(EPT_A | EPT_D);
  vcpu.leaveGuest();
});

describe('discard', () => {
  test('really returns frames, and the next touch reads zero (firecracker#6167 is the bug to rule out)', () => {
    const host = testHost();
    host.vcpus[0].enterGuest();
    for (let p = 512; p < 1024; p++) host.vcpus[0].store32(page(p), 0, p);
    const used = host.pool.used;
    host.vcpus[0].leaveGuest();
    expect(host.finish(host.vm.discard(Int32Array.of(512, 512), 1))).toBe(512);
    // 512 pages, and the level-2 and level-1 tables that became empty.
    expect(host.pool.used).toBeLessThanOrEqual(used - 512);
    host.vcpus[0].enterGuest();
    expect(host.vcpus[0].load32(page(600), 0)).toBe(0);
    expect(host.log.total).toBe(0);
  });
  test('of one 4 KiB page splits the leaf and frees one frame; its neighbours keep their bytes and their dirt (I18)', () => {
    const host = testHost();
    host.vcpus[0].enterGuest();
    for (let p = 0; p < 512; p++) host.vcpus[0].store32(page(p), 1, p + 1);
    host.vcpus[0].leaveGuest();
    const gone = host.file.bmap(100);
    expect(host.finish(host.vm.discard(Int32Array.of(100, 1), 1))).toBe(1);
    expect(host.pool.frameFlags[gone] & FRAME_DIRTY).toBe(FRAME_DIRTY);
    expect([host.vm.mmu.leafLevel(99), host.vm.mmu.leafLevel(100), host.vm.mmu.counters.splits]).toEqual([
      1, 0, 1,
    ]);
    host.vcpus[0].enterGuest();
    expect([host.vcpus[0].load32(page(99), 1), host.vcpus[0].load32(page(101), 1)]).toEqual([100, 102]);
    expect(host.vcpus[0].load32(page(100), 1)).toBe(0);
    host.vcpus[0].leaveGuest();
    // The children inherited D: zapping one later still says dirty.
    const child = host.file.bmap(7);
    host.finish(host.vm.discard(Int32Array.of(7, 1), 1));
    expect(host.pool.frameFlags[child] & FRAME_DIRTY).toBe(FRAME_DIRTY);
  });
  test('of a range that is no RAM, or of parts of a fixed 2 MiB page, is skipped, never rounded outward', () => {
    const host = testHost({ huge: 'hugetlb' });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(0), 0, 9);
    host.vcpus[0].leaveGuest();
    expect(host.finish(host.vm.discard(Int32Array.of(0, 511, 0x100000, 512), 2))).toBe(0);
    // From the middle of one page to the end of the next: the next alone goes.
    expect(host.finish(host.vm.discard(Int32Array.of(256, 768), 1))).toBe(0);
    host.vcpus[0].enterGuest();
    expect(host.vcpus[0].load32(page(0), 0)).toBe(9);
  });
  test('keeps both sums of I9 at every step', () => {
    const host = testHost();
    const check = (): void => {
      const c = host.pool.ledger.recount();
      expect(
        c.free + c.guestAssigned + c.memfsUnmapped + c.pageTable + c.vmm + c.revoking + c.pinnedDetached,
      ).toBe(host.pool.frames);
      expect(c.free).toBe(host.pool.buddy.free);
      expect(c.guestAssigned + c.memfsUnmapped).toBe(host.file.assigned);
      expect(c.pageTable).toBe(host.vm.mmu.counters.tables);
    };
    for (let round = 0; round < 40; round++) {
      host.vcpus[0].enterGuest();
      host.vcpus[0].store32(page((round * 97) % 4096), 0, 1);
      host.vcpus[0].leaveGuest();
      check();
      host.finish(host.vm.discard(Int32Array.of((round * 53) % 4000, 1 + (round % 90)), 1));
      check();
    }
  });
  test('a pinned frame stays detached until its last pin is put (Y19, I4)', () => {
    const host = testHost({ huge: 'never' });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(3), 0, 77);
    host.vcpus[0].leaveGuest();
    const frame = hfn(host.file.bmap(3));
    host.pool.pin(frame);
    const free = host.pool.buddy.free;
    host.finish(host.vm.discard(Int32Array.of(3, 1), 1));
    expect(host.pool.ledger.recount().pinnedDetached).toBe(1);
    expect(host.pool.buddy.alloc(0)).not.toBe(frame);
    host.pool.unpin(frame);
    expect(host.pool.ledger.recount().pinnedDetached).toBe(0);
    expect(host.pool.buddy.free).toBeGreaterThanOrEqual(free);
  });
});

describe('the ledger catches', () => {
  test('a vCPU that uses a stale translation after the frame was freed: stale-tlb, with both ends named', () => {
    const host = testHost({ huge: 'never' });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(9), 0, 1);
    host.vcpus[0].leaveGuest();
    host.finish(host.vm.discard(Int32Array.of(9, 1), 1));
    // The broken vCPU skips its section check.
    host.vcpus[0].storeIgnoringFlush(page(9), 0, 666);
    const [v] = host.log.list();
    expect([v.kind, v.gfn, v.vm, v.stepReleased > 0]).toEqual(['stale-tlb', 9, 0, true]);
    expect(host.log.count('stale-tlb')).toBe(1);
  });
  test('a write that lands in a free frame, even past every gate: use-after-free by poison', () => {
    const host = testHost({ huge: 'never' });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(9), 0, 1);
    host.vcpus[0].leaveGuest();
    const frame = host.file.bmap(9);
    host.finish(host.vm.discard(Int32Array.of(9, 1), 1));
    host.pool.memory.i32[frame * 1024 + 500] = 1;
    host.vcpus[0].enterGuest();
    for (let p = 0; p < 4000; p++) host.vcpus[0].store32(page(p), 0, 1);
    for (let i = 0; i < 20_000 && host.log.total === 0; i++) host.pool.allocTable(0);
    expect(host.log.count('use-after-free')).toBe(1);
  });
  test.each(['never', 'always'] as const)(
    'an access to the page of the last one passes the gate as well (huge pages: %s)',
    (huge) => {
      const host = testHost({ huge });
      const [vcpu] = host.vcpus;
      const words = Int32Array.of(9 * 1024);
      vcpu.enterGuest();
      vcpu.store32(page(9), 0, 1);
      vcpu.load32(page(9), 0);
      vcpu.scatter32(words, words, 0, 1);
      const frame = host.file.bmap(9);
      const gate = huge === 'never' ? frame : host.pool.memory.frames + (frame >>> 9);
      // The frame changes hands, and nobody asks the vCPU to flush.
      host.pool.ledger.generation[gate]++;
      vcpu.store32(page(9), 1, 2);
      expect(host.log.count('stale-tlb')).toBe(1);
      vcpu.load32(page(9), 1);
      expect(host.log.count('stale-tlb')).toBe(2);
      vcpu.scatter32(words, words, 0, 1);
      expect(host.log.count('stale-tlb')).toBe(3);
    },
  );
  test('a device that resolves to a frame of somebody else: foreign-frame', () => {
    const host = testHost({ huge: 'never' });
    const other = host.addVm();
    other.vcpus[0].enterGuest();
    other.vcpus[0].store32(page(1), 0, 5);
    host.file.blocks[4] = other.file.bmap(1);
    host.vm.memory.window(4 * PAGE_SIZE, 8, true);
    expect(host.log.count('foreign-frame')).toBe(1);
  });
});

describe('isolation', () => {
  test('a frame that moves from one VM to another is zero for its new owner (I1)', () => {
    const host = testHost({ huge: 'never', hostBytes: 4 * MiB, ramBytes: 2 * MiB });
    const other = host.addVm();
    host.vcpus[0].enterGuest();
    for (let p = 0; p < 512; p++)
      for (let w = 0; w < 1024; w += 100) host.vcpus[0].store32(page(p), w, 0x5ec2e7);
    host.vcpus[0].leaveGuest();
    host.finish(host.vm.discard(Int32Array.of(0, 512), 1));
    other.vcpus[0].enterGuest();
    for (let p = 0; p < 512; p++)
      for (let w = 0; w < 1024; w += 100) expect(other.vcpus[0].load32(page(p), w)).toBe(0);
    expect(host.log.total).toBe(0);
  });
});

describe('large leaves', () => {
  test.each([
    [100, 300],
    [300, 100],
  ])(
    'none reaches over the hole between two slots, whose file has a large page there (%i, then %i)',
    (first, second) => {
      const host = testHost();
      const file = new MemFile({ name: 'holed', nrBlocks: 1024, vm: 0, frames: host.pool, huge: 'always' });
      const at = 32 * MiB;
      for (const [slot, from, pages] of [
        [1, 0, 160],
        [2, 256, 768],
      ]) {
        const guestPhysAddr = at + from * PAGE_SIZE;
        const memorySize = pages * PAGE_SIZE;
        const done = host.vm.setUserMemoryRegion({
          slot,
          flags: 0,
          guestPhysAddr,
          memorySize,
          file,
          fileOffset: from,
        });
        expect(host.finish(done).ok).toBe(true);
      }
      const [vcpu] = host.vcpus;
      const base = at / PAGE_SIZE;
      vcpu.enterGuest();
      for (const p of [first, second, 600]) vcpu.store32(page(base + p), 0, 7);
      expect([100, 200, 255, 300, 600].map((p) => vcpu.load32(page(base + p), 0))).toEqual([7, -1, -1, 7, 7]);
      expect([100, 300, 600].map((p) => host.vm.mmu.leafLevel(base + p))).toEqual([1, 1, 2]);
    },
  );
  test('where one was taken apart, its last page comes back as the others do', () => {
    const host = testHost();
    const [vcpu] = host.vcpus;
    vcpu.enterGuest();
    vcpu.store32(page(700), 0, 7);
    vcpu.leaveGuest();
    host.finish(host.vm.unmap(1023, 1));
    vcpu.enterGuest();
    vcpu.store32(page(1023), 0, 8);
    expect([vcpu.load32(page(1023), 0), vcpu.load32(page(700), 0), host.vm.counters.eptViolations]).toEqual([
      8, 7, 2,
    ]);
  });
});

test('a scatter tells of all words that are not RAM, and stores the others, whatever an earlier one met', () => {
  const { vcpus } = testHost({ huge: 'never' });
  const [vcpu] = vcpus;
  vcpu.enterGuest();
  const hole = (0xfffff * PAGE_SIZE) / 4;
  const words = Int32Array.from({ length: 70 }, (_, i) => i * 1024);
  const values = words.map((_, i) => 100 + i);
  expect(vcpu.scatter32(words.with(3, hole), values, 0, 70)).toBe(1);
  expect(vcpu.scatter32(words.with(66, hole).with(2, hole), values, 0, 70)).toBe(2);
  expect(vcpu.scatter32(words, values, 0, 70)).toBe(0);
  const out = new Int32Array(70);
  expect([vcpu.gather32(words, out, 0, 70), [...out]]).toEqual([0, [...values]]);
  vcpu.scatter32(words.with(5, hole), new Int32Array(70).fill(9), 0, 64);
  expect(vcpu.load32(page(3), 0)).toBe(9);
});

describe('KVM_SET_USER_MEMORY_REGION', () => {
  const region = (host: ReturnType<typeof testHost>, over: object): unknown =>
    host.finish(
      host.vm.setUserMemoryRegion({
        slot: 1,
        flags: 0,
        guestPhysAddr: 32 * MiB,
        memorySize: MiB,
        file: host.file,
        fileOffset: 0,
        ...over,
      }),
    );
  test('refuses what KVM refuses: alignment, overlap, unknown flags, slot numbers, deleting nothing, ranges outside the backing', () => {
    const host = testHost();
    expect(region(host, { guestPhysAddr: 100 })).toEqual({ ok: false, error: 'EINVAL' });
    expect(region(host, { memorySize: 100 })).toEqual({ ok: false, error: 'EINVAL' });
    expect(region(host, { guestPhysAddr: 15 * MiB, memorySize: 2 * MiB })).toEqual({
      ok: false,
      error: 'EEXIST',
    });
    expect(region(host, { flags: 8 })).toEqual({ ok: false, error: 'EINVAL' });
    expect(region(host, { slot: 32764 })).toEqual({ ok: false, error: 'EINVAL' });
    expect(region(host, { memorySize: 0 })).toEqual({ ok: false, error: 'EINVAL' });
    expect(region(host, { fileOffset: 4000 })).toEqual({ ok: false, error: 'EINVAL' });
  });
  test('nor can where in its file it begins', () => {
    const host = testHost();
    expect(region(host, {})).toEqual({ ok: true, value: undefined });
    expect(region(host, { fileOffset: 256 })).toEqual({ ok: false, error: 'EINVAL' });
  });
  test('nor can whether it is read-only: its leaves would have to go first', () => {
    const host = testHost();
    expect(region(host, {})).toEqual({ ok: true, value: undefined });
    expect(region(host, { flags: KVM_MEM_READONLY })).toEqual({ ok: false, error: 'EINVAL' });
  });
  test('a device writes no read-only slot, and what it writes elsewhere is dirty', () => {
    const host = testHost();
    const file = new MemFile({ name: 'rom', nrBlocks: 256, vm: 0, frames: host.pool, huge: 'never' });
    expect(region(host, { file, flags: KVM_MEM_READONLY })).toEqual({ ok: true, value: undefined });
    const { memory } = host.vm;
    expect([memory.window(32 * MiB, 4, false), memory.window(32 * MiB, 4, true)]).toEqual([true, false]);
    expect(memory.window(5 * PAGE_SIZE, 4, false)).toBe(true);
    expect(host.pool.frameFlags[host.file.bmap(5)] & FRAME_DIRTY).toBe(0);
    expect(memory.window(5 * PAGE_SIZE, 4, true)).toBe(true);
    expect(host.pool.frameFlags[host.file.bmap(5)] & FRAME_DIRTY).toBe(FRAME_DIRTY);
  });
  test('what A and D said of a frame does not outlive its owner', () => {
    const host = testHost({ huge: 'never' });
    const [vcpu] = host.vcpus;
    vcpu.enterGuest();
    vcpu.store32(page(5), 0, 1);
    vcpu.leaveGuest();
    const frame = host.file.bmap(5);
    host.finish(host.vm.discard(Int32Array.of(5, 1), 1));
    expect(host.pool.frameFlags[frame]).toBe(FRAME_ACCESSED | FRAME_DIRTY);
    vcpu.enterGuest();
    vcpu.load32(page(6), 0);
    vcpu.leaveGuest();
    expect([host.file.bmap(6), host.pool.frameFlags[frame]]).toEqual([frame, 0]);
  });
  test('the size of a live slot cannot change; delete and create can change it', () => {
    const host = testHost();
    expect(region(host, {})).toEqual({ ok: true, value: undefined });
    expect(region(host, { memorySize: 2 * MiB })).toEqual({ ok: false, error: 'EINVAL' });
    expect(region(host, { memorySize: 0 })).toEqual({ ok: true, value: undefined });
    expect(region(host, { memorySize: 2 * MiB })).toEqual({ ok: true, value: undefined });
  });
  test('a new slot is visible at once (K4), a deleted one is MMIO, and every change bumps the generation', () => {
    const host = testHost();
    const file = new MemFile({ name: 'dimm', nrBlocks: 512, vm: 0, frames: host.pool, huge: 'never' });
    const before = host.vm.slots.generation;
    region(host, { file, memorySize: 2 * MiB });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(8192), 0, 3);
    expect(host.vcpus[0].load32(page(8192), 0)).toBe(3);
    host.vcpus[0].leaveGuest();
    region(host, { file, memorySize: 0 });
    host.vcpus[0].enterGuest();
    expect(host.vcpus[0].load32(page(8192), 0)).toBe(-1);
    expect(host.vm.slots.generation).toBeGreaterThan(before + 1);
    // The file still has the page: deleting a slot unmaps, it does not discard.
    expect(file.assigned).toBe(1);
  });
  test('a moved slot shows the same memory at its new place', () => {
    const host = testHost();
    const file = new MemFile({ name: 'dimm', nrBlocks: 512, vm: 0, frames: host.pool, huge: 'never' });
    region(host, { file, memorySize: 2 * MiB });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(8192), 0, 3);
    host.vcpus[0].leaveGuest();
    expect(region(host, { file, memorySize: 2 * MiB, guestPhysAddr: 64 * MiB })).toEqual({
      ok: true,
      value: undefined,
    });
    host.vcpus[0].enterGuest();
    expect([host.vcpus[0].load32(page(8192), 0), host.vcpus[0].load32(page(16384), 0)]).toEqual([-1, 3]);
  });
  test('a read-only slot reads memory and drops writes', () => {
    const host = testHost();
    region(host, { flags: 2 });
    host.vcpus[0].enterGuest();
    host.vcpus[0].store32(page(8192), 0, 3);
    expect(host.vcpus[0].load32(page(8192), 0)).toBe(0);
    // Mapped by now: a store still faults, since the leaf is read-only.
    host.vcpus[0].store32(page(8192), 0, 3);
    expect(host.vcpus[0].load32(page(8192), 0)).toBe(0);
    expect(host.vcpus[0].counters.unmappedAccesses).toBe(2);
  });
});

test('a fault that resolved before an invalidation ended looks again (mmu_invalidate_retry)', () => {
  const host = testHost({ huge: 'never' });
  // Start an invalidation and hold it open after its flush; a fault of the same page must wait for the end.
  const begin = host.vm.begin(Int32Array.of(50, 1), 1);
  for (let step = begin.next(); step.done !== true; step = begin.next());
  let ended = false;
  host.tasks.spawn(
    'end',
    (function* () {
      for (let i = 0; i < 5; i++) yield undefined;
      ended = true;
      host.vm.end(Int32Array.of(50, 1), 1);
    })(),
  );
  host.vcpus[0].enterGuest();
  host.vcpus[0].store32(page(50), 0, 1);
  expect([ended, host.vm.counters.faultRetries > 0]).toEqual([true, true]);
});

describe('a slot of another size (I11)', () => {
  test.each(['qemu', 'naive', 'extension'] as const)(
    '%s: what both sizes have is kept, the rest is gone',
    (how) => {
      const host = testHost({ huge: 'never' });
      const [vcpu] = host.vcpus;
      const region = { slot: 0, flags: 0, guestPhysAddr: 0, file: host.file, fileOffset: 0 };
      vcpu.enterGuest();
      vcpu.store32(page(3), 1, 33);
      vcpu.store32(page(700), 1, 77);
      vcpu.leaveGuest();
      expect(host.finish(host.vm.resizeSlot({ ...region, memorySize: 2 * MiB }, how))).toMatchObject({
        ok: true,
      });
      vcpu.enterGuest();
      expect(vcpu.load32(page(3), 1)).toBe(33);
      const before = host.vm.counters.unclaimedMmio;
      vcpu.load32(page(700), 1);
      expect(host.vm.counters.unclaimedMmio).toBe(before + 1);
      vcpu.leaveGuest();
      expect(host.finish(host.vm.resizeSlot({ ...region, memorySize: 4 * MiB }, how))).toMatchObject({
        ok: true,
      });
      vcpu.enterGuest();
      expect(vcpu.load32(page(700), 1)).toBe(77);
      vcpu.leaveGuest();
      expect(host.finish(host.vm.resizeSlot({ ...region, slot: 9, memorySize: MiB }, how))).toMatchObject({
        ok: false,
      });
    },
  );
});
