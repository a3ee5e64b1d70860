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
