/** The host's side of the vCPU control blocks, word by word. */
import * as machine from '@ebb/machine';
import { inlineSchedule, VCPU_BLOCK_BYTES, VCPU_BLOCK_WORDS } from '@ebb/machine';
import { describe, expect, test, vi } from 'vitest';
import { VcpuBlocks } from './vcpu-blocks.ts';

/** The blocks of a VM with three vCPUs, behind one of another VM. */
function blocks(): {
  vcpus: VcpuBlocks;
  w: Int32Array;
  f64: Float64Array;
  at: (vcpu: number, word: number) => number;
} {
  const control = new SharedArrayBuffer(4 * VCPU_BLOCK_BYTES);
  return {
    vcpus: new VcpuBlocks(control, 1, 3, inlineSchedule),
    w: new Int32Array(control),
    f64: new Float64Array(control),
    at: (vcpu, word) => (1 + vcpu) * VCPU_BLOCK_WORDS + word,
  };
}
const f64At = (vcpu: number, field: number): number => ((1 + vcpu) * VCPU_BLOCK_BYTES) / 8 + field;

test("a VM's time is that of its latest vCPU", () => {
  const { vcpus, f64 } = blocks();
  f64[f64At(0, machine.VC_CLOCK_F64)] = 5;
  f64[f64At(1, machine.VC_CLOCK_F64)] = 9;
  f64[f64At(2, machine.VC_CLOCK_F64)] = 7;
  // Another VM's clock is nothing to it.
  f64[machine.VC_CLOCK_F64] = 1000;
  expect([vcpus.now(), vcpus.clock(2)]).toEqual([9, 7]);
});

test('the root of the EPT is every vCPU’s', () => {
  const { vcpus, w, at } = blocks();
  vcpus.setRoot(77);
  expect([0, 1, 2].map((v) => w[at(v, machine.VC_EPT_ROOT)])).toEqual([77, 77, 77]);
  expect(w[machine.VC_EPT_ROOT]).toBe(0);
});

describe('exits', () => {
  test('a vCPU asks while its request is not answered, asleep or not', () => {
    const { vcpus, w, at } = blocks();
    const states = [
      machine.EXIT_IDLE,
      machine.EXIT_REQUEST,
      machine.EXIT_REQUEST_SLEEPING,
      machine.EXIT_DONE,
    ];
    expect(
      states.map((state) => {
        w[at(1, machine.VC_EXIT_STATE)] = state;
        return vcpus.asks(1);
      }),
    ).toEqual([false, true, true, false]);
  });
  test.each([
    [machine.EXIT_REQUEST, 0],
    [machine.EXIT_REQUEST_SLEEPING, 1],
  ])('an answer is all there before it is done, and wakes who sleeps (state %i)', (state, wakes) => {
    const { vcpus, w, f64, at } = blocks();
    w[at(2, machine.VC_EXIT_STATE)] = state;
    const notify = vi.spyOn(Atomics, 'notify');
    const { exchange } = Atomics;
    let before: number[] = [];
    vi.spyOn(Atomics, 'exchange').mockImplementation(((view: Int32Array, index: number, value: number) => {
      before = [
        w[at(2, machine.VC_EXIT_RESULT)],
        w[at(2, machine.VC_EXIT_RDATA)],
        f64[f64At(2, machine.VC_EXIT_COST_F64)],
      ];
      return exchange(view, index, value);
    }) as typeof Atomics.exchange);
    vcpus.answer(2, 1, 0x1234, 500);
    const woken = notify.mock.calls.length;
    vi.restoreAllMocks();
    expect([before, w[at(2, machine.VC_EXIT_STATE)], woken]).toEqual([
      [1, 0x1234, 500],
      machine.EXIT_DONE,
      wakes,
    ]);
  });
});

describe('interrupts', () => {
  test('a line is raised on every vCPU, beside those that are pending', () => {
    const { vcpus, w, at } = blocks();
    w[at(1, machine.VC_IRQ)] = 0b100;
    vcpus.interrupt(0);
    vcpus.interrupt(5);
    expect([0, 1, 2].map((v) => w[at(v, machine.VC_IRQ)])).toEqual([0b100001, 0b100101, 0b100001]);
    vcpus.clearInterrupts();
    expect([0, 1, 2].map((v) => w[at(v, machine.VC_IRQ)])).toEqual([0, 0, 0]);
  });
  test('what a line completes is due when the last of it is: a device that was faster later does not move it back', () => {
    const { vcpus, f64 } = blocks();
    const due = (line: number): number => f64[f64At(0, machine.VC_IRQ_DUE_F64 + line)];
    vcpus.completed(1, 500);
    vcpus.completed(1, 300);
    vcpus.completed(2, 100);
    expect([due(1), due(2)]).toEqual([500, 100]);
    vcpus.completed(1, 600);
    expect(due(1)).toBe(600);
  });
});

describe('flushes', () => {
  test('each vCPU gets a request of its own; who is outside keeps it, who is in guest mode owes it until it acknowledges', () => {
    const { vcpus, w, at } = blocks();
    w[at(0, machine.VC_FLUSH_REQ)] = 4;
    w[at(0, machine.VC_MODE)] = machine.MODE_GUEST;
    const want = vcpus.requestFlush();
    expect([want, [0, 1, 2].map((v) => w[at(v, machine.VC_FLUSH_REQ)])]).toEqual([
      [5, 1, 1],
      [5, 1, 1],
    ]);
    const owes = (acknowledged: number): boolean => {
      w[at(0, machine.VC_FLUSH_ACK)] = acknowledged;
      return vcpus.owesFlush(want);
    };
    // What was asked before, or after, counts by its number.
    expect([owes(0), owes(4), owes(5), owes(6)]).toEqual([true, true, false, false]);
    owes(0);
    w[at(0, machine.VC_MODE)] = machine.MODE_OUTSIDE;
    expect(vcpus.owesFlush(want)).toBe(false);
    w[at(2, machine.VC_MODE)] = machine.MODE_GUEST;
    expect(vcpus.owesFlush(want)).toBe(true);
  });
  test('requests go on beyond 2³¹', () => {
    const { vcpus, w, at } = blocks();
    w[at(0, machine.VC_MODE)] = machine.MODE_GUEST;
    w[at(0, machine.VC_FLUSH_REQ)] = 0x7fff_ffff;
    w[at(0, machine.VC_FLUSH_ACK)] = 0x7fff_ffff;
    const want = vcpus.requestFlush();
    expect(vcpus.owesFlush(want)).toBe(true);
    w[at(0, machine.VC_FLUSH_ACK)] = w[at(0, machine.VC_FLUSH_REQ)];
    expect(vcpus.owesFlush(want)).toBe(false);
  });
});
