/** The account of host frames (I9): each of its sums is shown to fail when what it sums is wrong. */
import { FramePool } from '@ebb/host-kvm';
import { FrameLedger, hfn, HostMemory, ledgerBytes, MiB, ViolationLog } from '@ebb/machine';
import { MemFile } from '@ebb/memfs';
import { describe, expect, test } from 'vitest';
import { auditFrames } from './run-result.ts';

/** A host of 4 MiB with one VM: a file of 8 blocks, 3 of them assigned, and two table frames. */
function host() {
  const memory = new HostMemory(new SharedArrayBuffer(4 * MiB));
  const ledger = new FrameLedger(new SharedArrayBuffer(ledgerBytes(memory.frames)), memory.frames);
  const violations = new ViolationLog(ViolationLog.create());
  const pool = new FramePool({ memory, ledger, violations, frames: memory.frames, poison: 'edges' });
  const file = new MemFile({ name: 'ram0', nrBlocks: 8, vm: 0, huge: 'never', frames: pool });
  for (const index of [0, 3, 7]) file.assign(index, false);
  pool.allocTable(0);
  pool.allocTable(0);
  const vm = { mmu: { counters: { tables: 2 } } };
  return { pool, ledger, file, vm, audit: () => auditFrames(pool, [{ files: [file], vm }]) };
}

describe('the audit of frames', () => {
  test('holds for a host that only allocated', () => {
    expect(host().audit()).toBe('');
  });

  test('a frame that the allocator has lost', () => {
    const { pool, audit } = host();
    pool.buddy.alloc(0);
    expect(audit()).toBe('free frames: ledger 1019, allocator 1018');
  });

  test('a frame that a file keeps after it was given back', () => {
    const { pool, file, audit } = host();
    pool.free(hfn(file.blocks[3]), 1);
    expect(audit()).toBe('guest frames: files hold 3, ledger says 2');
  });

  test('a table frame that no MMU holds', () => {
    const { vm, audit } = host();
    vm.mmu.counters.tables--;
    expect(audit()).toBe('table frames: MMUs hold 1, ledger says 2');
  });

  test('a block that is neither a hole nor counted', () => {
    const { file, audit } = host();
    file.blocks[5] = file.blocks[3];
    expect(audit()).toBe('ram0: 4 holes and 3 blocks are not 8');
  });
});
