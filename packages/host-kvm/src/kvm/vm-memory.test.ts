import { fc, test } from '@fast-check/vitest';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { MemFile } from '@ebb/memfs';
import { ChainBatch, SplitDeviceQueue } from '@ebb/virtio/device';
import { expect } from 'vitest';
import { KVM_MEM_READONLY } from './memslots.ts';
import type { Verdict } from './region-gate.ts';
import { testHost, type TestHost } from './testing-host.ts';
import type { VmMemory } from './vm-memory.ts';

const PAGES = MiB / PAGE_SIZE;
/** Slots from 16 MiB on, `mib` long each, with a hole of a MiB behind some; gates of eight units over some of it. */
const layout = fc.record({
  slots: fc.array(
    fc.record({ mib: fc.integer({ min: 1, max: 4 }), readonly: fc.boolean(), hole: fc.boolean() }),
    { maxLength: 5 },
  ),
  gate: fc.record({
    first: fc.integer({ min: 0, max: 24 * PAGES }),
    unitPages: fc.constantFrom(1, 16, PAGES),
    verdicts: fc.array(fc.constantFrom<Verdict>('memory', 'zeros', 'scribbled', 'nothing'), {
      minLength: 8,
      maxLength: 8,
    }),
  }),
  pages: fc.array(fc.nat(40 * PAGES), { minLength: 20, maxLength: 20 }),
});

test.prop([layout], { numRuns: 200 })(
  'an extent is memory that may be read and written, every page of it; where there is none, the page may not be written',
  ({ slots, gate, pages }) => {
    const host = testHost({ huge: 'never' });
    const { vm, pool } = host;
    let end = 16 * MiB;
    slots.forEach(({ mib, readonly, hole }, i) => {
      const file = new MemFile({
        name: `more${i}`,
        nrBlocks: mib * PAGES,
        vm: 0,
        frames: pool,
        huge: 'never',
      });
      const flags = readonly ? KVM_MEM_READONLY : 0;
      const region = { slot: i + 1, flags, guestPhysAddr: end, memorySize: mib * MiB, file, fileOffset: 0 };
      expect(host.finish(vm.setUserMemoryRegion(region)).ok).toBe(true);
      end += mib * MiB + (hole ? MiB : 0);
    });
    const baseGfn = 4 * PAGES + gate.first;
    vm.addGate({
      baseGfn,
      nrPages: 8 * gate.unitPages,
      unitPages: gate.unitPages,
      verdict: (gfn) => gate.verdicts[Math.floor((gfn - baseGfn) / gate.unitPages)],
    });
    const { memory } = vm;
    for (const gfn of [...pages, baseGfn - 1, baseGfn, baseGfn + 1]) {
      const gpa = gfn * PAGE_SIZE + 7;
      const found = memory.extent(gpa);
      expect(found).toBe(memory.contains(gpa, 1, true));
      if (!found) continue;
      const { from, to } = memory;
      expect([from % PAGE_SIZE, to % PAGE_SIZE, from <= gpa && gpa < to]).toEqual([0, 0, true]);
      for (let at = from; at < to; at += PAGE_SIZE) {
        if (!memory.contains(at, PAGE_SIZE, true))
          expect.fail(`page ${at / PAGE_SIZE} of the extent of ${gfn}`);
      }
    }
    expect(vm.memory.extent(end)).toBe(false);
  },
);

function put(memory: VmMemory, gpa: number, words: number[]): void {
  expect(memory.window(gpa, 4 * words.length, true)).toBe(true);
  memory.i32.set(words, memory.at >> 2);
}

const rings = { desc: 0x1000, driver: 0x2000, device: 0x3000 };

/** A host whose VM has a MiB more at `guestPhysAddr`. */
function withMore(guestPhysAddr: number): TestHost {
  const host = testHost({ huge: 'never' });
  const file = new MemFile({ name: 'more', nrBlocks: PAGES, vm: 0, frames: host.pool, huge: 'never' });
  const slot = { slot: 1, flags: 0, guestPhysAddr, memorySize: MiB, file, fileOffset: 0 };
  expect(host.finish(host.vm.setUserMemoryRegion(slot)).ok).toBe(true);
  return host;
}

test('a table above 4 GiB is looked for there: the page below with the same low bits takes no frame', () => {
  const host = withMore(4 * GiB);
  const { memory } = host.vm;
  put(memory, rings.desc, [0x50000, 1, 16, 4]);
  put(memory, rings.driver, [1 << 16, 0]);
  put(memory, 4 * GiB + 0x50000, [0x6000, 0, 16, 2]);
  const queue = new SplitDeviceQueue({ size: 16, rings, memory, eventIdx: false, indirect: true });
  expect(queue.popChains(new ChainBatch(4, 16), 4)).toBe(0);
  expect([queue.pop()?.gpas[0], queue.error]).toEqual([0x6000, null]);
  expect([host.file.bmap(0x50), host.file.bmap(6)]).toEqual([-1, -1]);
});

test('a batch goes on where buffers lie in two slots by turns', () => {
  const { memory } = withMore(32 * MiB).vm;
  for (const i of [0, 1, 2]) {
    put(memory, rings.desc + 32 * i, [0x6000, 0, 16, 1 | ((2 * i + 1) << 16)]);
    put(memory, rings.desc + 32 * i + 16, [32 * MiB + 0x6000, 0, 512, 2]);
  }
  put(memory, rings.driver, [3 << 16, 2 << 16, 4]);
  const queue = new SplitDeviceQueue({ size: 16, rings, memory, eventIdx: false, indirect: false });
  const batch = new ChainBatch(4, 16);
  expect(queue.popChains(batch, 4)).toBe(3);
  expect([0, 1, 2].map((i) => [batch.gpa(2 * i), batch.gpa(2 * i + 1), batch.written(i)])).toEqual(
    Array.from({ length: 3 }, () => [0x6000, 32 * MiB + 0x6000, 512]),
  );
});
