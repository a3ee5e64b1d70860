/** The memory device’s requirements: what is just allowed, what breaks them, and what is said then. */
import { expect, test } from 'vitest';
import type { DeviceEvent } from './device-events.ts';
import { judge, tell } from './testing-verdicts.ts';

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

test('plug, unplug, and the same once more', () => {
  expect(judge(config(), plug(0, 64), ack, unplug(0, 64), ack, plug(0, 1), ack)).toEqual([]);
});
test('a plug of what is plugged, an unplug of what is not, a range outside, a response too many', () => {
  expect(judge(config(), plug(0, 1), ack, plug(0, 1), ack)).toEqual(['5 device 5.15.6.2']);
  expect(judge(config(), unplug(0, 1), ack)).toEqual(['3 device 5.15.6.4']);
  expect(judge(config(), plug(128, 1), ack)).toEqual(['3 device 5.15.6.2']);
  expect(judge(config(), ack)).toEqual(['2 device 5.15.6']);
});
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
  const told = { block_size: 2 * M, addr, ...over };
  expect(tell(config(over))).toEqual([
    `1 device 5.15.4.2: block_size ${told.block_size}, addr 0x${told.addr.toString(16)}`,
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
