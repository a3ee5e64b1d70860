/** Each rule of the protocol check: a trace that keeps it, and one that breaks it. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { checkTrace } from './check-trace.ts';
import { readDeviceTrace, type DeviceEvent } from './device-events.ts';
import * as allRules from './rules.ts';

function breachesOf(events: readonly DeviceEvent[]): ReturnType<typeof checkTrace>['breaches'] {
  const lines = events.map((event, i) => ({ line: i + 1, event }));
  return checkTrace({ format: 'jsonl', skipped: 0, events: lines }).breaches;
}
const judge = (...events: DeviceEvent[]): string[] =>
  breachesOf(events).map((b) => `${b.line} ${b.who} ${b.section}`);
const judgeRules = (...events: DeviceEvent[]): string[] => breachesOf(events).map((b) => b.must);

const folder = mkdtempSync(join(tmpdir(), 'ebb-check-'));
afterAll(() => rmSync(folder, { recursive: true }));

function fileOf(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, text);
  return path;
}

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

describe('balloon', () => {
  test('a page taken out that was not in; actual that does not follow', () => {
    expect(
      judge(
        { event: 'inflate', pfns: [1, 2] },
        { event: 'actual', pages: 2 },
        { event: 'deflate', pfns: [2] },
        { event: 'actual', pages: 1 },
      ),
    ).toEqual([]);
    expect(judge({ event: 'inflate', pfns: [1] }, { event: 'deflate', pfns: [9] })).toEqual([
      '2 driver 5.5.6.1',
    ]);
    expect(judge({ event: 'inflate', pfns: [1, 2] }, { event: 'actual', pages: 1 })).toEqual([
      '2 driver 5.5.6.1',
    ]);
  });
});

describe('memory device', () => {
  const M = 2 ** 20;
  const config: DeviceEvent = {
    event: 'mem-config',
    addr: 0x1_4000_0000,
    block_size: 2 * M,
    region_size: 1024 * M,
    usable_region_size: 256 * M,
  };
  const plug = (addr: number, n: number): DeviceEvent => ({ event: 'plug', addr, nb_blocks: n });
  const ack: DeviceEvent = { event: 'response', type: 0 };
  test('plug, unplug, and the same once more', () => {
    expect(
      judge(
        config,
        plug(0x1_4000_0000, 64),
        ack,
        { event: 'unplug', addr: 0x1_4000_0000, nb_blocks: 64 },
        ack,
        plug(0x1_4000_0000, 1),
        ack,
      ),
    ).toEqual([]);
  });
  test('a plug of what is plugged, an unplug of what is not, a range outside, a response too many', () => {
    expect(judge(config, plug(0x1_4000_0000, 1), ack, plug(0x1_4000_0000, 1), ack)).toEqual([
      '5 device 5.15.6.2',
    ]);
    expect(judge(config, { event: 'unplug', addr: 0x1_4000_0000, nb_blocks: 1 }, ack)).toEqual([
      '3 device 5.15.6.4',
    ]);
    expect(judge(config, plug(0x1_4000_0000 + 256 * M, 1), ack)).toEqual(['3 device 5.15.6.2']);
    expect(judge(config, ack)).toEqual(['2 device 5.15.6']);
  });
});

describe('files', () => {
  test("QEMU's log, with the fields that 7.2 prints without a space", () => {
    const trace = readDeviceTrace(
      fileOf(
        'a.log',
        '1@2.3:virtio_mem_resized_usable_region old_size=0x0new_size=0x50000000\n1@2.4:virtio_mem_plug_request addr=0x140000000 nb_blocks=64\n1@2.5:virtio_mem_send_response type=0\nother line\n1@2.6:virtio_balloon_set_config actual: 256 oldactual: 0\n',
      ),
    );
    expect(trace.events.map((e) => e.event)).toEqual([
      { event: 'usable', before: 0, after: 0x50000000 },
      { event: 'plug', addr: 0x140000000, nb_blocks: 64 },
      { event: 'response', type: 0 },
      { event: 'actual', pages: 256, before: 0 },
    ]);
    expect([trace.skipped, checkTrace(trace).breaches]).toEqual([1, []]);
  });
  test('what is malformed is one line with its number and text', () => {
    expect(() =>
      readDeviceTrace(fileOf('b.jsonl', '{"event":"kick","queue":0}\n{"event":"kick"}\n')),
    ).toThrow(/b\.jsonl:2: queue: .*"kick"/);
    expect(() => readDeviceTrace(fileOf('c.jsonl', '{"event":"kick","queue":0}\nnonsense\n'))).toThrow(
      /c\.jsonl:2: not JSON: nonsense/,
    );
    expect(() => readDeviceTrace(fileOf('d.log', 'hello\n'))).toThrow(/no device events/);
    expect(() => readDeviceTrace(fileOf('e.log', '1@2:virtio_mem_plug_request addr=0x1\n'))).toThrow(
      /e\.log:1: fields missing/,
    );
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

/** What is said of each breach: `line who section: what`. */
const tell = (...events: DeviceEvent[]): string[] =>
  breachesOf(events).map((b) => `${b.line} ${b.who} ${b.section}: ${b.what}`);
const reset: DeviceEvent = { event: 'status', value: 0 };

describe('what is just allowed', () => {
  test('queues of 1 and of 32768; not of 0, 65536, or 6', () => {
    const size = (n: number): DeviceEvent => ({ event: 'queue', queue: 0, size: n });
    expect([1, 32768, 0, 65536, 6].map((n) => judge(size(n)).length)).toEqual([0, 0, 1, 1, 1]);
  });
  test('a chain as long as its queue, readable and writable descriptors together; 2^32 bytes in all', () => {
    const four: [number, number][] = [
      [0, 1],
      [0, 1],
    ];
    expect(judge(...up, avail(0, four, four))).toEqual([]);
    expect(judge(...up, avail(0, four, [...four, [0, 1]]))).toEqual(['7 driver 2.7.5.3.1']);
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

describe('actual', () => {
  const must: DeviceEvent = { event: 'features', offered: [0], accepted: [0] };
  const inflate: DeviceEvent = { event: 'inflate', pfns: [1, 2] };
  const target: DeviceEvent = { event: 'target', pages: 9 };
  test('is due before the next target, once for each change', () => {
    expect(tell(must, inflate, target)).toEqual([
      '3 driver 5.5.6.1: the balloon holds 2 pages, actual still says -1',
    ]);
    expect(tell(must, inflate, { event: 'actual', pages: 2 }, target)).toEqual([]);
    expect(
      tell(must, inflate, { event: 'actual', pages: 2 }, { event: 'deflate', pfns: [1, 2] }, target),
    ).toEqual(['5 driver 5.5.6.1: the balloon holds 0 pages, actual still says 2']);
  });
  test('may be written without a change; what is read back is what was written, 0 too', () => {
    expect(tell(inflate, { event: 'actual', pages: 2 }, { event: 'actual', pages: 2, before: 2 })).toEqual(
      [],
    );
    expect(tell({ event: 'actual', pages: 0 }, { event: 'actual', pages: 0, before: 3 })).toEqual([
      '2 device 2.5.2: actual was 3, the driver had written 0',
    ]);
  });
  test('an empty balloon is told as any other', () => {
    expect(
      tell(
        inflate,
        { event: 'actual', pages: 2 },
        { event: 'deflate', pfns: [1, 2] },
        { event: 'actual', pages: 1 },
      ),
    ).toEqual(['4 driver 5.5.6.1: wrote 1; the balloon holds 0 pages']);
  });
});

describe('a memory device', () => {
  const M = 2 ** 20;
  const addr = 0x1_4000_0000;
  const config = (over: object = {}): DeviceEvent => ({
    event: 'mem-config',
    addr,
    block_size: 2 * M,
    region_size: 1024 * M,
    usable_region_size: 256 * M,
    ...over,
  });
  const plug = (block: number, n: number): DeviceEvent => ({
    event: 'plug',
    addr: addr + block * 2 * M,
    nb_blocks: n,
  });
  const unplug = (block: number, n: number): DeviceEvent => ({
    event: 'unplug',
    addr: addr + block * 2 * M,
    nb_blocks: n,
  });
  const answer = (type: number): DeviceEvent => ({ event: 'response', type });
  const usable = (before: number, after: number): DeviceEvent => ({
    event: 'usable',
    before: before * M,
    after: after * M,
  });
  const ack = answer(0);

  test('blocks are told apart, and named', () => {
    expect(tell(config(), plug(3, 2), ack, unplug(4, 1), ack, plug(3, 2), ack)).toEqual([
      '7 device 5.15.6.2: acknowledged plug of 0x140600000, which is plugged',
    ]);
    expect(tell(config(), plug(3, 2), ack, unplug(2, 2), ack)).toEqual([
      '5 device 5.15.6.4: acknowledged unplug of 0x140400000, which is not plugged',
    ]);
  });
  test('a request that was refused changed nothing; one for the state neither', () => {
    expect(tell(config(), plug(0, 1), answer(1), plug(0, 1), ack)).toEqual([]);
    expect(tell(config(), { event: 'state', addr, nb_blocks: 1 }, ack, plug(0, 1), ack)).toEqual([]);
  });
  test('all unplugged, by request or by the device itself: each block may be plugged again', () => {
    expect(tell(config(), plug(0, 1), ack, { event: 'unplug-all' }, ack, plug(0, 1), ack)).toEqual([]);
    expect(tell(config(), plug(0, 1), ack, { event: 'unplugged-all' }, plug(0, 1), ack)).toEqual([]);
  });
  test('the last block of the usable region, not the one behind; no block at all; half a block', () => {
    expect(tell(config(), plug(127, 1), ack)).toEqual([]);
    expect(tell(config(), plug(127, 2), ack)).toEqual([
      '3 device 5.15.6.2: acknowledged plug of 2 blocks at 0x14fe00000',
    ]);
    expect(tell(config(), plug(-1, 1), ack)).toHaveLength(1);
    expect(tell(config(), plug(0, 0), ack)).toEqual([
      '3 device 5.15.6.2: acknowledged plug of 0 blocks at 0x140000000',
    ]);
    expect(tell(config(), plug(0.5, 1), ack)).toEqual([
      '3 device 5.15.6.2: acknowledged plug of 1 blocks at 0x140100000',
    ]);
  });
  test('the usable region grows at any time, and shrinks only on a reset or when all is unplugged', () => {
    expect(tell(config(), plug(0, 1), ack, usable(256, 512), plug(200, 1), ack)).toEqual([]);
    expect(tell(config(), plug(0, 1), ack, usable(256, 256))).toEqual([]);
    expect(tell(config(), plug(0, 1), ack, usable(256, 128))).toEqual([
      '4 device 5.15.4.2: from 0x10000000 to 0x8000000',
    ]);
    expect(tell(config(), usable(256, 128))).toEqual([]);
    expect(tell(config(), plug(0, 1), ack, { event: 'unplug-all' }, usable(256, 128), ack)).toEqual([]);
    expect(tell(config(), plug(0, 1), ack, { event: 'unplugged-all' }, usable(256, 128))).toEqual([]);
    // What it shrank to is what counts from then on.
    expect(tell(config(), usable(256, 128), plug(64, 1), ack)).toHaveLength(1);
  });
  test('one request at a time', () => {
    expect(tell(config(), plug(0, 1), unplug(1, 1))).toEqual([
      '3 driver 5.15.6: unplug while plug was not answered',
    ]);
  });
  test.each([
    { block_size: 3 * M },
    { block_size: 0 },
    { block_size: 1.5 },
    { addr: addr + M },
    { region_size: 1023 * M },
    { usable_region_size: M },
  ])('%o is no configuration', (over) => {
    const odd = { ...(config(over) as { block_size: number; addr: number }) };
    expect(tell(config(over))).toEqual([
      `1 device 5.15.4.2: block_size ${odd.block_size}, addr 0x${odd.addr.toString(16)}`,
    ]);
  });
  test('a block of one byte, or of 1 GiB, is one', () => {
    const G = 1024 * M;
    expect(tell(config({ block_size: 1 }))).toEqual([]);
    expect(tell(config({ block_size: G, usable_region_size: G }))).toEqual([]);
  });
  test('without a configuration the largest request of the trace is 128 MiB', () => {
    const bare = (request: 'plug' | 'unplug', block: number, n: number): DeviceEvent => ({
      event: request,
      addr: addr + block * 4 * M,
      nb_blocks: n,
    });
    // 32 blocks: 4 MiB each.
    expect(tell(bare('plug', 0, 32), ack, bare('unplug', 31, 1), ack, bare('plug', 31, 1), ack)).toEqual([]);
    expect(tell(bare('plug', 0, 1), ack, bare('unplug', 0, 1), ack, bare('plug', 0, 32), ack)).toEqual([]);
    expect(tell(bare('plug', 0, 32), ack, bare('plug', 31, 1), ack)).toHaveLength(1);
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
