/** Each rule of the protocol check: a trace that keeps it, and one that breaks it. */
import { describe, expect, test } from 'vitest';
import type { DeviceEvent } from './device-events.ts';
import * as allRules from './rules.ts';
import { judge, judgeRules, tell } from './testing-verdicts.ts';

const up: DeviceEvent[] = [
  { event: 'status', value: 1 },
  { event: 'status', value: 3 },
  { event: 'features', offered: [5, 32], accepted: [32] },
  { event: 'status', value: 11 },
  { event: 'queue', queue: 0, size: 4 },
  { event: 'status', value: 15 },
];
const avail = (head: number, out: [number, number][], into: [number, number][] = []): DeviceEvent => ({
  event: 'avail',
  queue: 0,
  head,
  out,
  in: into,
});

describe('status and features', () => {
  test('a bring-up in order breaks nothing', () => {
    expect(judge(...up, { event: 'kick', queue: 0 })).toEqual([]);
  });
  test('The driver MUST NOT clear a device status bit', () => {
    expect(judge(...up, { event: 'status', value: 11 })).toEqual(['7 driver 2.1.1']);
    expect(judge(...up, { event: 'status', value: 0 })).toEqual([]);
  });
  test('The driver MUST NOT accept a feature which the device did not offer', () => {
    expect(judge({ event: 'features', offered: [32], accepted: [32, 28] })).toEqual(['1 driver 2.2.1']);
  });
  test('The driver MUST NOT send any buffer available notifications before DRIVER_OK', () => {
    expect(judge(...up.slice(0, 5), { event: 'kick', queue: 0 })).toEqual(['6 driver 3.1.1']);
  });
});

test('a reset ends what a balloon holds and what a memory device was asked', () => {
  const inflated: DeviceEvent[] = [
    { event: 'inflate', pfns: [1, 2, 3] },
    { event: 'actual', pages: 3, before: 0 },
  ];
  const reset: DeviceEvent = { event: 'status', value: 0 };
  expect(judge(...up, ...inflated, reset, ...up, ...inflated)).toEqual([]);
  const asked: DeviceEvent = { event: 'plug', addr: 0x1_4000_0000, nb_blocks: 1 };
  expect(judge(...up, asked, reset, ...up, asked)).toEqual([]);
});

describe('queues', () => {
  test('a buffer made available, returned, and made available again', () => {
    expect(
      judge(
        ...up,
        avail(0, [[0x1000, 8]], [[0x2000, 4]]),
        { event: 'used', queue: 0, head: 0, length: 4 },
        avail(0, [[0x1000, 8]]),
      ),
    ).toEqual([]);
  });
  test('a buffer returned twice, a length too long, a head that is out, a chain too long', () => {
    expect(judge(...up, { event: 'used', queue: 0, head: 3, length: 0 })).toEqual(['7 device 2.7.8']);
    expect(
      judge(...up, avail(0, [], [[0x2000, 4]]), { event: 'used', queue: 0, head: 0, length: 5 }),
    ).toEqual(['8 device 2.7.8.2']);
    expect(judge(...up, avail(0, [[0, 1]]), avail(0, [[0, 1]]))).toEqual(['8 driver 3.2.1']);
    expect(
      judge(
        ...up,
        avail(0, [
          [0, 1],
          [0, 1],
          [0, 1],
          [0, 1],
          [0, 1],
        ]),
      ),
    ).toEqual(['7 driver 2.7.5.3.1']);
  });
});

/** Every rule there is, by name. */
const rules = { ...allRules };

describe('every rule can be broken', () => {
  const M = 2 ** 20;
  const config = (over: object = {}): DeviceEvent => ({
    event: 'mem-config',
    addr: 0x1_4000_0000,
    block_size: 2 * M,
    region_size: 1024 * M,
    usable_region_size: 256 * M,
    ...over,
  });
  const plug: DeviceEvent = { event: 'plug', addr: 0x1_4000_0000, nb_blocks: 1 };
  const breaking: Readonly<Record<keyof typeof rules, readonly DeviceEvent[]>> = {
    STATUS: [...up, { event: 'status', value: 11 }],
    CONSUME: [...up.slice(0, 5), { event: 'interrupt', queue: 0 }],
    FEATURES: [{ event: 'features', offered: [32], accepted: [28] }],
    LATE_FEATURES: [...up.slice(0, 4), { event: 'features', offered: [5, 32], accepted: [5, 32] }],
    EARLY_KICK: [...up.slice(0, 5), { event: 'kick', queue: 0 }],
    QUEUE_SIZE: [{ event: 'queue', queue: 0, size: 12 }],
    CHAIN_LENGTH: [
      ...up,
      avail(
        0,
        Array.from({ length: 5 }, () => [0x1000, 8] as [number, number]),
      ),
    ],
    CHAIN_BYTES: [...up, avail(0, [[0x1000, 2 ** 32 + 1]])],
    INDIRECT: [...up, { ...(avail(0, [[0x1000, 16]]) as object), indirect: true } as DeviceEvent],
    EXPOSED: [...up, avail(0, [[0x1000, 8]]), avail(0, [[0x1000, 8]])],
    USED_ID: [...up, { event: 'used', queue: 0, head: 3, length: 0 }],
    USED_LENGTH: [...up, avail(0, [], [[0x2000, 4]]), { event: 'used', queue: 0, head: 0, length: 5 }],
    INFLATED: [
      { event: 'inflate', pfns: [1] },
      { event: 'deflate', pfns: [2] },
    ],
    TELL_HOST: [
      { event: 'inflate', pfns: [1] },
      { event: 'inflate', pfns: [1] },
    ],
    ACTUAL: [
      { event: 'inflate', pfns: [1, 2] },
      { event: 'actual', pages: 1 },
    ],
    ACTUAL_KEPT: [
      { event: 'actual', pages: 1 },
      { event: 'actual', pages: 2, before: 7 },
    ],
    MEM_ERROR: [config(), plug, { event: 'response', type: 0 }, plug, { event: 'response', type: 0 }],
    MEM_UNPLUG_ERROR: [
      config(),
      { event: 'unplug', addr: 0x1_4000_0000, nb_blocks: 1 },
      { event: 'response', type: 0 },
    ],
    MEM_RANGE: [
      config(),
      { event: 'plug', addr: 0x1_4000_0000 + 256 * M, nb_blocks: 1 },
      { event: 'response', type: 0 },
    ],
    MEM_RESPONSE: [config(), { event: 'response', type: 0 }],
    MEM_SHRINK: [
      config(),
      plug,
      { event: 'response', type: 0 },
      { event: 'usable', before: 256 * M, after: 128 * M },
    ],
    MEM_CONFIG: [config({ block_size: 3 * M })],
    MEM_CONFIG_WRITE: [config(), { event: 'config-write', offset: 0, value: 1 }],
  };

  test.each(Object.entries(breaking))('%s', (name, events) => {
    const rule = rules[name as keyof typeof rules];
    expect(judge(...events)).toEqual([
      expect.stringMatching(new RegExp(` ${rule.section.replaceAll('.', '\\.')}$`)),
    ]);
    expect(judgeRules(...events)).toEqual([rule.must]);
    // All but the last event keep every rule.
    expect(judgeRules(...events.slice(0, -1))).toEqual([]);
  });
});

const reset: DeviceEvent = { event: 'status', value: 0 };

describe('what is just allowed', () => {
  test('queues of 1 and of 32768; not of 0, 65536, or 6', () => {
    const size = (n: number): DeviceEvent => ({ event: 'queue', queue: 0, size: n });
    expect([1, 32768, 0, 65536, 6].map((n) => judge(size(n)).length)).toEqual([0, 0, 1, 1, 1]);
  });
  test('a chain as long as its queue, readable and writable descriptors together; 2^32 bytes in all', () => {
    const two: [number, number][] = [
      [0, 1],
      [0, 1],
    ];
    expect(judge(...up, avail(0, two, two))).toEqual([]);
    expect(judge(...up, avail(0, two, [...two, [0, 1]]))).toEqual(['7 driver 2.7.5.3.1']);
    expect(judge(...up, avail(0, [[0, 2 ** 31]], [[0, 2 ** 31]]))).toEqual([]);
  });
  test('an indirect descriptor where it was negotiated, or where the trace does not say', () => {
    const indirect = { ...(avail(0, [[0, 16]]) as object), indirect: true } as DeviceEvent;
    expect(judge({ event: 'features', offered: [28], accepted: [28] }, indirect)).toEqual([]);
    expect(judge(indirect)).toEqual([]);
  });
  test('kicks, interrupts and used buffers in a trace that begins when the device is up already', () => {
    expect(
      judge({ event: 'kick', queue: 0 }, { event: 'interrupt', queue: 0 }, avail(0, [[0, 1]]), {
        event: 'used',
        queue: 0,
        head: 0,
        length: 0,
      }),
    ).toEqual([]);
  });
  test('an interrupt for the configuration before DRIVER_OK', () => {
    expect(judge(...up.slice(0, 5), { event: 'interrupt' })).toEqual([]);
  });
  test('a configuration write before the trace shows a memory device', () => {
    expect(judge({ event: 'config-write', offset: 4, value: 1 })).toEqual([]);
  });
});

describe('a reset', () => {
  test('takes buffers back, forgets sizes and features', () => {
    expect(judge(...up, avail(0, [[0, 1]]), reset, ...up, avail(0, [[0, 1]]))).toEqual([]);
    // A queue of eight now, not of four.
    const eight = up.map((e): DeviceEvent => (e.event === 'queue' ? { ...e, queue: 1, size: 8 } : e));
    const five: [number, number][] = [0, 1, 2, 3, 4].map((gpa) => [gpa, 1]);
    expect(judge(...up, reset, ...eight, avail(0, five))).toEqual([]);
    const accepted: DeviceEvent = { event: 'features', offered: [1], accepted: [1] };
    const behind: DeviceEvent[] = [
      { event: 'inflate', pfns: [1] },
      { event: 'target', pages: 4 },
    ];
    expect(judge(accepted, ...behind)).toEqual([]);
    const must: DeviceEvent = { event: 'features', offered: [0], accepted: [0] };
    expect(judge(must, ...behind)).toEqual(['3 driver 5.5.6.1']);
    expect(judge(must, reset, ...behind)).toEqual([]);
  });
  test('empties the balloon, and a page that comes out later is not known to have been in', () => {
    const known: DeviceEvent[] = [
      { event: 'inflate', pfns: [1] },
      { event: 'actual', pages: 1 },
    ];
    const out: DeviceEvent = { event: 'deflate', pfns: [7] };
    expect(judge(...known, out)).toEqual(['3 driver 5.5.6.1']);
    expect(judge(...known, reset, out)).toEqual([]);
    // Nor is `actual` what it was, nor anything left to be told.
    expect(judge(...known, reset, { event: 'actual', pages: 0, before: 0 })).toEqual([]);
    expect(judge({ event: 'inflate', pfns: [1] }, reset, { event: 'actual', pages: 0 })).toEqual([]);
  });
});

test('what is said of status and queues', () => {
  expect(tell(...up, { event: 'status', value: 11 })).toEqual(['7 driver 2.1.1: cleared 0x4 by writing 0xb']);
  expect(tell({ event: 'status', value: 31 }, { event: 'status', value: 3 })).toEqual([
    '2 driver 2.1.1: cleared 0x1c by writing 0x3',
  ]);
  expect(
    tell(...up.slice(0, 5), avail(0, [[0, 1]]), { event: 'used', queue: 0, head: 0, length: 0 }),
  ).toEqual(['7 device 2.1.2: returned a buffer of queue 0 before DRIVER_OK']);
});
