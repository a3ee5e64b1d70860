import { fc, test } from '@fast-check/vitest';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { MemFile } from '@ebb/memfs';
import { expect } from 'vitest';
import { KVM_MEM_READONLY } from './memslots.ts';
import type { Verdict } from './region-gate.ts';
import { testHost } from './testing-host.ts';

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
