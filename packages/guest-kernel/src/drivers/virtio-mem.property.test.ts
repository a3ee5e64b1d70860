/**
 * The virtio-mem driver against an independent model of it: which requests it sends, in which order, the state of every
 * memory block and the retry timer, for any order of resizes, refusals, pages that must not move, blocks that an
 * administrator takes out of use and puts back, and adds that find no memory. Sub-block mode: 8 memory blocks of 4.
 */
import { fc, test } from '@fast-check/vitest';
import { afterAll, expect } from 'vitest';
import { MiB, NS_PER_MS, PAGE_SIZE } from '@ebb/machine';
import {
  VIRTIO_MEM_REQ_PLUG as PLUG,
  VIRTIO_MEM_REQ_UNPLUG as UNPLUG,
  VIRTIO_MEM_RESP_ACK as ACK,
  VIRTIO_MEM_RESP_BUSY as BUSY,
  VIRTIO_MEM_RESP_ERROR as ERROR,
  VIRTIO_MEM_RESP_NACK as NACK,
} from '@ebb/virtio/uapi';
import { SECTION_WORDS } from '../layout.ts';
import { S_DRIVER } from '../mm/memory-hotplug.ts';
import {
  DriverModel,
  SUBS,
  BLOCKS,
  SUB_PAGES,
  BLOCK_MIB,
  STATES,
  type Policy,
} from './testing-driver-model.ts';
import { BLOCK, bring, REGION_ADDR, ScriptedMemory } from './testing-memory-device.ts';
import { memoryOutcome } from './virtio-mem.ts';

interface Op {
  readonly op:
    | 'resize'
    | 'pin'
    | 'unpin'
    | 'offline'
    | 'online'
    | 'busy'
    | 'busy-unplug'
    | 'nack'
    | 'starve'
    | 'wait'
    | 'error';
  readonly n: number;
}

const op: fc.Arbitrary<Op> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({ op: fc.constant('resize' as const), n: fc.nat({ max: BLOCKS * SUBS }) }),
  },
  {
    weight: 3,
    arbitrary: fc.record({ op: fc.constant('pin' as const), n: fc.nat({ max: BLOCKS * SUBS - 1 }) }),
  },
  { weight: 1, arbitrary: fc.record({ op: fc.constant('unpin' as const), n: fc.nat({ max: 31 }) }) },
  {
    weight: 3,
    arbitrary: fc.record({ op: fc.constantFrom('offline', 'online'), n: fc.nat({ max: 2 }) }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      op: fc.constantFrom('busy', 'busy-unplug', 'nack'),
      n: fc.integer({ min: 1, max: 3 }),
    }),
  },
  { weight: 2, arbitrary: fc.record({ op: fc.constantFrom('starve', 'wait', 'wait'), n: fc.constant(0) }) },
);

function program(...lines: string[]): Op[] {
  return lines.map((line) => {
    const [name, n] = line.split(' ');
    return { op: name as Op['op'], n: Number(n) };
  });
}

/** Every change of a block's state that was seen. */
const seen = new Set<string>();

test.prop(
  [
    fc.constantFrom<Policy>('online', 'online_movable', 'auto-movable', 'offline'),
    fc.constantFrom(1, 2, 3, BLOCKS),
    fc.array(op, { minLength: 4, maxLength: 30 }),
    fc.boolean(),
  ],
  {
    numRuns: 100,
    // The same programs each time: what they reach is asked for below.
    seed: 20261122,
    examples: [
      ['online_movable', 2, program('resize 10', 'offline 0', 'offline 2', 'online 2', 'online 0'), false],
      ['online', 2, program('resize 10', 'offline 2', 'online 2', 'offline 0', 'resize 4', 'resize 9'), true],
      ['offline', 3, program('resize 20', 'resize 6', 'resize 9', 'resize 5', 'online 0', 'online 1'), false],
      ['online', 2, program('starve 0', 'busy-unplug 1', 'resize 4', 'wait 0', 'wait 0'), false],
    ],
  },
)('driver and model send the same requests and agree on every block', (policy, offlineMax, ops, fails) => {
  const device = new ScriptedMemory(0);
  const guest = bring(
    device,
    {
      sectionPages: SUBS * SUB_PAGES,
      policy,
      autoMovableRatio: 55,
      offlinePages: offlineMax * SUBS * SUB_PAGES,
    },
    false,
  );
  const [kernel] = guest.kernels;
  const { alloc, mem } = kernel.parts;
  const stateOf = (b: number): string => {
    const section = REGION_ADDR / MiB / BLOCK_MIB + b;
    return STATES[guest.arena.w[guest.arena.layout.sections + section * SECTION_WORDS + S_DRIVER]];
  };
  // Both sides are refused the same requests: each counts for itself.
  const refusals = { busy: [0, 0], 'busy-unplug': [0, 0], nack: [0, 0], error: [0, 0] };
  const answers =
    (side: number) =>
    (type: number): number => {
      if (refusals.error[side] > 0) return ERROR;
      if (refusals.busy[side] > 0 && refusals.busy[side]-- > 0) return BUSY;
      if (type === UNPLUG && refusals['busy-unplug'][side] > 0 && refusals['busy-unplug'][side]-- > 0)
        return BUSY;
      if (type === PLUG && refusals.nack[side] > 0 && refusals.nack[side]-- > 0) return NACK;
      return ACK;
    };
  const model = new DriverModel(policy, offlineMax, answers(0));
  device.answer = answers(1);
  const settle = (): void => {
    kernel.vcpu.clock += NS_PER_MS;
    kernel.runDue(kernel.vcpu.clock);
  };
  kernel.enter();
  settle();
  const before = Array.from({ length: BLOCKS }, () => 'UNUSED');
  const agree = (): void => {
    expect(device.seen).toEqual(model.log);
    const states = before.map((_, b) => stateOf(b));
    expect(states).toEqual(before.map((_, b) => model.state(b)));
    expect(device.plugged / BLOCK).toBe(model.total);
    expect(memoryOutcome(guest.arena, 0)).toBe(model.outcome);
    const due = mem[0].nextDue(kernel.vcpu.clock);
    expect(Number.isFinite(due)).toBe(model.armed);
    if (model.armed) expect((due - kernel.vcpu.clock) / NS_PER_MS / model.retryMs).toBeCloseTo(1, 2);
    states.forEach((state, b) => {
      // One pass gives back what is pending and plugs it again.
      if (before[b] === 'PLUGGED' && state !== 'PLUGGED') {
        seen.add('PLUGGED → UNUSED');
        before[b] = 'UNUSED';
      }
      if (state !== before[b]) seen.add(`${before[b]} → ${state}`);
      before[b] = state;
    });
  };
  for (const { op: what, n } of fails
    ? [...ops, { op: 'error' as const, n: 1 }, { op: 'resize' as const, n: 7 }]
    : ops) {
    const pfn = REGION_ADDR / PAGE_SIZE + n * SUB_PAGES;
    const block = REGION_ADDR / PAGE_SIZE + n * SUBS * SUB_PAGES;
    switch (what) {
      case 'resize':
        model.requested = n;
        device.request(n * BLOCK);
        guest.registers.lines = 0;
        mem[0].interrupt();
        model.pass(false);
        break;
      case 'pin': {
        const online = ['KERNEL', 'MOVABLE'].includes(model.where[Math.floor(n / SUBS)]);
        if (online && model.plugged[n] && !model.pinned.has(n)) {
          kernel.parts.pcp.drainAll(2);
          expect(alloc.allocExactly(pfn + 7)).toBe(true);
          model.pinned.add(n);
        }
        break;
      }
      case 'unpin': {
        const pins = [...model.pinned];
        if (pins.length === 0) break;
        const sub = pins[n % pins.length];
        alloc.free(REGION_ADDR / PAGE_SIZE + sub * SUB_PAGES + 7, 0);
        model.pinned.delete(sub);
        break;
      }
      case 'offline':
      case 'online': {
        const done = model.setOnline(n, what === 'online');
        expect(mem[0].setBlockOnline(block, what === 'online')).toBe(done);
        if (done && what === 'online' && model.mayGoOn) model.pass(false);
        break;
      }
      case 'starve':
        alloc.failNext += 2;
        model.starving++;
        break;
      case 'wait': {
        const due = mem[0].nextDue(kernel.vcpu.clock);
        if (Number.isFinite(due)) kernel.vcpu.clock = due;
        if (model.armed) model.pass(true);
        break;
      }
      case 'busy':
      case 'busy-unplug':
      case 'nack':
      case 'error':
        refusals[what][0] += n;
        refusals[what][1] += n;
    }
    settle();
    agree();
  }
  expect(guest.log.total).toBe(0);
});

afterAll(() => {
  // What the states of `formats.md` § 4.10 allow, and all of it was seen; nothing else was.
  const expected = ['KERNEL', 'MOVABLE'].flatMap((zone) => [
    `UNUSED → ${zone}`,
    `UNUSED → ${zone}_PARTIAL`,
    `${zone} → ${zone}_PARTIAL`,
    `${zone} → UNUSED`,
    `${zone} → OFFLINE`,
    `${zone}_PARTIAL → ${zone}`,
    `${zone}_PARTIAL → UNUSED`,
    `${zone}_PARTIAL → OFFLINE_PARTIAL`,
    `OFFLINE → ${zone}`,
    `OFFLINE_PARTIAL → ${zone}_PARTIAL`,
  ]);
  expected.push(
    'UNUSED → OFFLINE',
    'UNUSED → OFFLINE_PARTIAL',
    'UNUSED → PLUGGED',
    'PLUGGED → UNUSED',
    'OFFLINE → OFFLINE_PARTIAL',
    'OFFLINE → UNUSED',
    'OFFLINE_PARTIAL → OFFLINE',
    'OFFLINE_PARTIAL → UNUSED',
  );
  expect([...seen].filter((t) => !expected.includes(t))).toEqual([]);
  expect(expected.filter((t) => !seen.has(t))).toEqual([]);
});
