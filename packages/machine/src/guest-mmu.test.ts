import { afterEach, expect, test, vi } from 'vitest';
import { GuestMmu, pteHigh, pteLow, ptePfn, PTE_A, PTE_D, PTE_P, PTE_W } from './guest-mmu.ts';
import type { Vcpu } from './vcpu.ts';

afterEach(() => {
  vi.restoreAllMocks();
});

/** Guest memory of a few pages, with tables at pages 1–4 that map page number 3 to page 9. */
function tables(flags: number): { mmu: GuestMmu; words: Int32Array; leaf: number } {
  const words = new Int32Array(new SharedArrayBuffer(16 * 4096));
  const vcpu = {
    i32: words,
    at: 0,
    window(gpa: number): boolean {
      vcpu.at = gpa;
      return gpa < words.byteLength;
    },
  };
  for (let level = 0; level < 3; level++) words[(level + 1) * 1024] = pteLow(level + 2, PTE_P | PTE_W);
  const leaf = 4 * 1024 + 3 * 2;
  words[leaf] = pteLow(9, flags);
  return { mmu: new GuestMmu(vcpu as unknown as Vcpu), words, leaf };
}

test('an entry carries a page beyond 32 bits of address', () => {
  const pfn = 0x54_3210;
  expect(ptePfn(pteLow(pfn, PTE_P), pteHigh(pfn))).toBe(pfn);
});

test('a load sets A, a store D; a store to a read-only page and an empty entry are faults', () => {
  const { mmu, words, leaf } = tables(PTE_P | PTE_W);
  expect(mmu.translate(1, 0, 3, false)).toBe(9);
  expect(words[leaf] & (PTE_A | PTE_D)).toBe(PTE_A);
  expect(mmu.translate(1, 0, 3, true)).toBe(9);
  expect(words[leaf] & (PTE_A | PTE_D)).toBe(PTE_A | PTE_D);
  expect(mmu.translate(1, 0, 4, false)).toBe(-1);
  const readOnly = tables(PTE_P);
  expect(readOnly.mmu.translate(1, 0, 3, false)).toBe(9);
  expect(readOnly.mmu.translate(1, 0, 3, true)).toBe(-1);
});

test('a translation stays until it is flushed, and belongs to its address space', () => {
  const { mmu, words, leaf } = tables(PTE_P | PTE_W);
  mmu.translate(1, 0, 3, true);
  words[leaf] = pteLow(10, PTE_P | PTE_W);
  expect(mmu.translate(1, 0, 3, true)).toBe(9);
  expect(mmu.translate(1, 1, 3, true)).toBe(10);
  mmu.flush();
  expect(mmu.translate(1, 0, 3, true)).toBe(10);
});

test('an entry that is taken away while it is walked is not revived by its A and D', () => {
  const { mmu, words, leaf } = tables(PTE_P | PTE_W);
  const { load } = Atomics;
  vi.spyOn(Atomics, 'load').mockImplementation(((view: Int32Array, index: number) => {
    const value = load(view, index);
    if (view === words && index === leaf + 1) words[leaf] = 0;
    return value;
  }) as typeof Atomics.load);
  expect(mmu.translate(1, 0, 3, true)).toBe(-1);
  expect(words[leaf]).toBe(0);
});
