/** Accesses by guest-virtual address: the guest's tables, the host's, and the one entry that remembers both. */
import { afterEach, describe, expect, test, vi } from 'vitest';
import { gfn, hfn } from './address.ts';
import { entryWord, eptLow, EPT_A, EPT_D, EPT_PS, EPT_R, EPT_RWX, EPT_W, EPT_WB } from './ept.ts';
import { GuestMmu, pteHigh, pteLow, ptePfn, PTE_A, PTE_D, PTE_P, PTE_W } from './guest-mmu.ts';
import { HostMemory } from './host-memory.ts';
import {
  VC_EPT_ROOT,
  VC_EXIT_REASON,
  VC_EXIT_SIZE,
  VC_FLUSH_REQ,
  VC_IRQ,
  VC_STALL_BUCKETS,
  VC_STALL_HIST,
  VCPU_BLOCK_BYTES,
  VIOLATION_BYTES,
} from './layout.ts';
import { FrameLedger, ledgerBytes, ownerOf, USE_RAM } from './ledger.ts';
import { tlbBytes, tlbReaches } from './tlb.ts';
import { EXIT_EPT_VIOLATION, Vcpu } from './vcpu.ts';
import { ViolationLog } from './violations.ts';

afterEach(() => {
  vi.restoreAllMocks();
});

const FRAMES = 1024;
/** The host's four tables are frames 1 to 4; guest page p is in frame 16 + p. */
const ROOT = 1;
const GUEST = 16;
/** The guest's tables are its pages 1 to 4; they map page number 3 to page 9. */
const CR3 = 1;
const VPN = 3;
const PAGE = 9;
const MAP = EPT_RWX | EPT_WB;

/** One vCPU, the host's tables and the guest's. `large`: the guest's memory is one 2 MiB leaf at frame 512. */
function machine(options: { flags?: number; large?: boolean } = {}) {
  const memory = new HostMemory(new SharedArrayBuffer(FRAMES * 4096));
  const dram = memory.i32;
  const ledger = new FrameLedger(new SharedArrayBuffer(ledgerBytes(FRAMES)), FRAMES);
  ledger.take(hfn(1), FRAMES - 1, ownerOf(0, USE_RAM));
  const control = new SharedArrayBuffer(VCPU_BLOCK_BYTES);
  const words = new Int32Array(control);
  words[VC_EPT_ROOT] = ROOT;
  for (let level = 0; level < 2; level++)
    dram[entryWord(hfn(ROOT + level), 0)] = eptLow(ROOT + level + 1, EPT_RWX);
  const first = options.large === true ? 512 : GUEST;
  dram[entryWord(hfn(3), 0)] = options.large === true ? eptLow(first, MAP | EPT_PS) : eptLow(4, EPT_RWX);
  for (let page = 0; page < 16; page++) dram[entryWord(hfn(4), page)] = eptLow(first + page, MAP);
  for (let level = 0; level < 3; level++)
    dram[(first + level + CR3) * 1024] = pteLow(level + 2, PTE_P | PTE_W);
  const leaf = (first + 4) * 1024 + VPN * 2;
  dram[leaf] = pteLow(PAGE, options.flags ?? PTE_P | PTE_W);
  const violations = new ViolationLog(new SharedArrayBuffer(VIOLATION_BYTES));
  const exits: number[][] = [];
  const tlb = new SharedArrayBuffer(tlbBytes(4));
  const vcpu = new Vcpu({
    vm: 0,
    id: 0,
    memory,
    ledger,
    violations,
    control,
    block: 0,
    runControl: new Int32Array(new SharedArrayBuffer(4096)),
    tlbBits: 4,
    tlb,
    port: {
      // A host that lets stores through to what it had write-protected.
      call(c, base) {
        exits.push([c[base + VC_EXIT_REASON], c[base + VC_EXIT_SIZE]]);
        dram[entryWord(hfn(4), PAGE)] |= EPT_W;
      },
      relax: () => undefined,
      halt: () => undefined,
    },
  });
  vcpu.enterGuest();
  const store = (frame: number, value: number): void => void (dram[frame * 1024] = value);
  return { mmu: new GuestMmu(vcpu), vcpu, dram, ledger, words, leaf, violations, exits, first, store, tlb };
}

test('an entry carries a page beyond 32 bits of address', () => {
  const pfn = 0x54_3210;
  expect(ptePfn(pteLow(pfn, PTE_P), pteHigh(pfn))).toBe(pfn);
});

test('a load sets A, a store D, in both tables; a store to a read-only page and an empty entry are page faults', () => {
  const { mmu, dram, leaf, first } = machine();
  const ept = entryWord(hfn(4), PAGE);
  expect(mmu.load32(CR3, 0, VPN, 0)).toBe(true);
  expect([dram[leaf] & (PTE_A | PTE_D), dram[ept] & (EPT_A | EPT_D)]).toEqual([PTE_A, EPT_A]);
  expect(mmu.store32(CR3, 0, VPN, 7, 99)).toBe(true);
  expect([dram[leaf] & (PTE_A | PTE_D), dram[ept] & (EPT_A | EPT_D)]).toEqual([PTE_A | PTE_D, EPT_A | EPT_D]);
  expect(dram[(first + PAGE) * 1024 + 7]).toBe(99);
  expect(mmu.load32(CR3, 0, VPN + 1, 0)).toBe(false);
  const readOnly = machine({ flags: PTE_P });
  expect(readOnly.mmu.load32(CR3, 0, VPN, 0)).toBe(true);
  expect(readOnly.mmu.store32(CR3, 0, VPN, 0, 1)).toBe(false);
});

test('an entry that is taken away while it is walked is not revived by its A and D', () => {
  const { mmu, dram, leaf } = machine();
  const { load } = Atomics;
  vi.spyOn(Atomics, 'load').mockImplementation(((view: Int32Array, index: number) => {
    const value = load(view, index);
    if (view.buffer === dram.buffer && view.byteOffset / 4 + index === leaf + 1) dram[leaf] = 0;
    return value;
  }) as typeof Atomics.load);
  expect(mmu.store32(CR3, 0, VPN, 0, 1)).toBe(false);
  expect(dram[leaf]).toBe(0);
});

describe('a combined mapping', () => {
  test('stays until the guest flushes it, and belongs to its address space', () => {
    const { mmu, dram, leaf, first, store } = machine();
    store(first + PAGE, 1111);
    store(first + 10, 2222);
    const load = (asid: number): number => (mmu.load32(CR3, asid, VPN, 0) ? mmu.value : -1);
    expect(load(0)).toBe(1111);
    dram[leaf] = pteLow(10, PTE_P | PTE_W);
    expect(load(0)).toBe(1111);
    expect(load(1)).toBe(2222);
    mmu.flush();
    expect(load(0)).toBe(2222);
  });

  test('is void after as many flushes as there are epochs: an old number that comes again means nothing', () => {
    const { mmu, dram, store, words, first, vcpu } = machine();
    store(first + PAGE, 1111);
    store(20 + GUEST, 3333);
    mmu.load32(CR3, 0, VPN, 0);
    expect(mmu.value).toBe(1111);
    dram[entryWord(hfn(4), PAGE)] = eptLow(20 + GUEST, MAP);
    for (let flush = 0; flush < 255; flush++) {
      words[VC_FLUSH_REQ]++;
      vcpu.beginSection();
    }
    mmu.load32(CR3, 0, VPN, 0);
    expect(mmu.value).toBe(3333);
  });

  test('is void after a flush by the host, though the guest changed nothing', () => {
    const { mmu, dram, first, store, words } = machine();
    store(first + PAGE, 1111);
    store(20 + GUEST, 3333);
    mmu.load32(CR3, 0, VPN, 0);
    dram[entryWord(hfn(4), PAGE)] = eptLow(20 + GUEST, MAP);
    mmu.load32(CR3, 0, VPN, 0);
    expect(mmu.value).toBe(1111);
    words[VC_FLUSH_REQ]++;
    for (let i = 0; i < 64; i++) mmu.load32(CR3, 0, VPN, 0);
    expect(mmu.value).toBe(3333);
  });

  test('made by a load is not used by a store: the host may have the page write-protected', () => {
    const { mmu, dram, exits } = machine();
    dram[entryWord(hfn(4), PAGE)] = eptLow(GUEST + PAGE, EPT_R | EPT_WB);
    mmu.load32(CR3, 0, VPN, 0);
    expect(exits).toEqual([]);
    expect(mmu.store32(CR3, 0, VPN, 0, 5)).toBe(true);
    expect(exits).toEqual([[EXIT_EPT_VIOLATION, 1]]);
  });

  test.each([false, true])(
    'is met by the gate when the frame has another owner by now (large leaf: %s)',
    (large) => {
      const { mmu, ledger, violations, first, tlb } = machine({ large });
      const reaches = (): boolean =>
        tlbReaches(new Int32Array(tlb), first + PAGE, ledger.generation, ledger.frames);
      mmu.load32(CR3, 0, VPN, 0);
      expect([violations.count('stale-tlb'), reaches()]).toEqual([0, true]);
      // A host that frees the frame without a flush.
      ledger.release(hfn(first + PAGE), 1);
      mmu.load32(CR3, 0, VPN, 0);
      expect(violations.list().map((v) => [v.kind, v.gfn, v.hfn])).toEqual([
        ['stale-tlb', gfn(PAGE), first + PAGE],
      ]);
      expect(reaches()).toBe(false);
    },
  );

  test('alone is found by who looks whether a frame is still in reach', () => {
    const { mmu, vcpu, ledger, first, tlb, words } = machine();
    mmu.load32(CR3, 0, VPN, 0);
    const words32 = new Int32Array(tlb);
    const reaches = (): boolean => tlbReaches(words32, first + PAGE, ledger.generation, ledger.frames);
    // The guest-physical mapping goes as another page takes its place.
    words32.fill(-1, words32.length - (4 << 4));
    expect(reaches()).toBe(true);
    words[VC_FLUSH_REQ]++;
    vcpu.beginSection();
    expect(reaches()).toBe(false);
  });
});

test('an interrupt line that is raised while the others are taken is taken or still pending', () => {
  const { vcpu, words } = machine();
  const raised: number[] = [];
  const { load } = Atomics;
  words[VC_IRQ] = 1;
  // Whenever the vCPU has looked, the host raises one more.
  vi.spyOn(Atomics, 'load').mockImplementation(((view: Int32Array, index: number) => {
    const value = load(view, index);
    if (view.buffer === words.buffer && index === VC_IRQ) {
      raised.push(2 << raised.length);
      words[VC_IRQ] |= raised[raised.length - 1];
    }
    return value;
  }) as typeof Atomics.load);
  const taken = vcpu.takeInterrupts();
  vi.restoreAllMocks();
  expect(raised.length).toBeGreaterThan(0);
  expect(taken | words[VC_IRQ]).toBe(raised.reduce((all, bit) => all | bit, 1));
});

test('a stall is counted in the bucket of its length: quarter powers of two from 256 ns', () => {
  const { vcpu, words } = machine();
  const bucketOf = (ns: number): number => {
    const before = Array.from(words.subarray(VC_STALL_HIST, VC_STALL_HIST + VC_STALL_BUCKETS));
    vcpu.stall(ns);
    return before.findIndex((count, b) => words[VC_STALL_HIST + b] === count + 1);
  };
  expect([255, 256, 319, 320, 512, 1024, 1 << 20].map(bucketOf)).toEqual([0, 0, 0, 1, 4, 8, 48]);
});
