/** EPT entries in the SDM's format, at all three leaf sizes, seen by the hardware walk of `machine`. */
import { describe, expect, test } from 'vitest';
import {
  EPT_A,
  EPT_D,
  EPT_PS,
  EPT_RWX,
  EPT_WB,
  eptWalk,
  FrameLedger,
  gfn,
  GIGA_PAGES,
  HostMemory,
  inlineSchedule,
  ledgerBytes,
  MiB,
  ViolationLog,
  WalkResult,
} from '@ebb/machine';
import { FramePool } from '../mm/frame-pool.ts';
import { FRAME_ACCESSED, FRAME_DIRTY, TdpMmu } from './tdp-mmu.ts';

/** An MMU over a small host. Leaves may point beyond it: only the ledger's counts must reach that far. */
function mmu(frames = (16 * MiB) / 4096): {
  mmu: TdpMmu;
  memory: HostMemory;
  flags: Uint8Array;
  walk: (page: number) => WalkResult;
} {
  const memory = new HostMemory(new SharedArrayBuffer(frames * 4096));
  const ledger = new FrameLedger(new SharedArrayBuffer(ledgerBytes(memory.frames)), memory.frames);
  const pool = new FramePool({
    memory,
    ledger,
    violations: new ViolationLog(ViolationLog.create()),
    frames: memory.frames,
  });
  const flags = pool.frameFlags;
  const tables = new TdpMmu(0, pool, inlineSchedule, new Int32Array(memory.frames));
  return {
    mmu: tables,
    memory,
    flags,
    walk(page) {
      const out = new WalkResult();
      eptWalk(memory.i32, tables.root, gfn(page), out);
      return out;
    },
  };
}

describe('leaves', () => {
  test('4 KiB: four tables, the frame in bits 12 and up, write-back, no PS', () => {
    const m = mmu();
    m.mmu.map(0x12345, 77, 1, true);
    const w = m.walk(0x12345);
    expect([w.present, w.level, w.frame, w.steps]).toEqual([true, 1, 77, 4]);
    expect(w.low).toBe(((77 << 12) | EPT_RWX | EPT_WB) >>> 0);
  });
  test('2 MiB: three tables, PS, and the page inside it', () => {
    const m = mmu();
    m.mmu.map(512 * 9, 1024, 2, true);
    const w = m.walk(512 * 9 + 300);
    expect([w.level, w.frame, w.steps, w.low & EPT_PS]).toEqual([2, 1324, 3, EPT_PS]);
  });
  test('1 GiB: two tables; zapping one page of it splits twice, and every other page stays mapped with its D', () => {
    const m = mmu(GIGA_PAGES + 4096);
    m.mmu.map(GIGA_PAGES, 0, 3, true);
    let w = m.walk(GIGA_PAGES + 1000);
    expect([w.level, w.frame, w.steps]).toEqual([3, 1000, 2]);
    m.memory.i32[w.word] |= EPT_A | EPT_D;
    expect(m.mmu.zapRange(GIGA_PAGES + 1000, 1)).toBe(3);
    expect(m.mmu.counters.splits).toBe(2);
    expect(m.walk(GIGA_PAGES + 1000).present).toBe(false);
    w = m.walk(GIGA_PAGES + 1001);
    expect([w.level, w.frame, w.low & (EPT_A | EPT_D)]).toEqual([1, 1001, EPT_A | EPT_D]);
    // The last page of the block and of the gigabyte are there once, too.
    expect(m.walk((GIGA_PAGES + 1000) | 511).frame).toBe(1000 | 511);
    expect(m.walk(2 * GIGA_PAGES - 1).frame).toBe(GIGA_PAGES - 1);
    w = m.walk(GIGA_PAGES + 200_000);
    expect([w.level, w.frame, w.low & (EPT_A | EPT_D)]).toEqual([2, 200_000, EPT_A | EPT_D]);
    expect(m.flags[1000]).toBe(FRAME_ACCESSED | FRAME_DIRTY);
  });
  test('a large leaf that is split is write-back still, and its table goes with its last page', () => {
    const m = mmu();
    m.mmu.map(512, 1024, 2, true);
    expect(m.mmu.zapRange(512, 1)).toBeGreaterThan(0);
    expect(m.walk(513).low & 0xfff).toBe(EPT_RWX | EPT_WB);
    m.mmu.zapRange(513, 510);
    expect([m.walk(1022).present, m.walk(1023).frame, m.mmu.counters.tables]).toEqual([false, 1535, 4]);
    m.mmu.zapRange(1023, 1);
    expect([m.mmu.counters.tables, m.mmu.detachedTables.length]).toEqual([1, 3]);
  });
  test('what A and D say of a large leaf holds for each of its frames', () => {
    const m = mmu();
    m.mmu.map(512, 1024, 2, true);
    m.memory.i32[m.walk(512).word] |= EPT_A | EPT_D;
    m.mmu.zapRange(512, 512);
    expect(m.flags.subarray(1024, 1536).every((f) => f === (FRAME_ACCESSED | FRAME_DIRTY))).toBe(true);
    expect([m.flags[1023], m.flags[1536]]).toEqual([0, 0]);
  });
  test('a table whose last entry goes is unlinked, and freed only when told that the flush is over', () => {
    const m = mmu();
    m.mmu.map(5, 50, 1, true);
    expect(m.mmu.counters.tables).toBe(4);
    m.mmu.zapRange(5, 1);
    expect([m.mmu.counters.tables, m.mmu.detachedTables.length]).toEqual([1, 3]);
    m.mmu.freeDetachedTables();
    expect(m.mmu.detachedTables.length).toBe(0);
  });
  test('a frame above 4 GiB has its high word, and the frame below that follows it does not', () => {
    const above = (1 << 20) + 7;
    const m = mmu((1 << 20) + 4096);
    m.mmu.map(5, above, 1, true);
    // Keeps the table.
    m.mmu.map(6, 9, 1, true);
    expect(m.walk(5).frame).toBe(above);
    m.mmu.zapRange(5, 1);
    m.mmu.map(5, 7, 1, true);
    expect(m.walk(5).frame).toBe(7);
  });
  test('a read-only leaf is upgraded in place', () => {
    const m = mmu();
    m.mmu.map(5, 50, 1, false);
    expect(m.walk(5).low & 2).toBe(0);
    m.mmu.map(5, 50, 1, true);
    expect(m.walk(5).low & 2).toBe(2);
  });
});
