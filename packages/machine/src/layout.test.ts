import { expect, test } from 'vitest';
import * as layout from './layout.ts';

test('control block fields lie inside the block and on lines of their own writer', () => {
  expect(layout.VC_STALL_HIST + layout.VC_STALL_BUCKETS).toBeLessThanOrEqual(layout.VCPU_BLOCK_WORDS);
  // vCPU-written fields: line 0; host-written: line 1.
  for (const field of [layout.VC_MODE, layout.VC_FLUSH_ACK, layout.VC_CLOCK_F64 * 2])
    expect(Math.floor(field / 16)).toBe(0);
  for (const field of [layout.VC_FLUSH_REQ, layout.VC_IRQ, layout.VC_EPT_ROOT])
    expect(Math.floor(field / 16)).toBe(1);
  for (const field of [layout.VC_EXIT_STATE, layout.VC_EXIT_ADDR_F64 * 2, layout.VC_EXIT_COST_F64 * 2])
    expect(Math.floor(field / 16)).toBe(3);
  // Nothing on the line before the mailbox, which both sides fetch ahead.
  for (const [name, field] of Object.entries(layout)) {
    if (!name.startsWith('VC_')) continue;
    expect(Math.floor((name.endsWith('_F64') ? field * 2 : field) / 16), name).not.toBe(2);
  }
  expect(layout.VC_IRQ_DUE_F64 * 2).toBe(64);
  expect((layout.VC_IRQ_DUE_F64 + 32) * 2).toBeLessThanOrEqual(layout.VC_STALL_HIST);
  expect(layout.VC_STALL_TOTAL_F64 * 2).toBe(layout.VC_STALL_HIST + layout.VC_STALL_BUCKETS);
});

test('run control: worker lines end before the VM words of the harness', () => {
  expect(layout.RC_WORKER + layout.RC_MAX_WORKERS * layout.RC_WORKER_STRIDE).toBe(640);
  expect(layout.RC_WINDOW_UNTIL_F64 * 2).toBeGreaterThan(layout.RC_VMS_ON);
});
