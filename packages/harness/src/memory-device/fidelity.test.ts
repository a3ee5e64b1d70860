import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { GiB, MiB } from '@ebb/machine';
import { afterAll, expect, test } from 'vitest';
import { longestCommonSubsequence } from './align.ts';
import { type MemoryFidelity, memoryFidelity } from './fidelity.ts';
import { readSession, unfollowed, type Session } from './session-file.ts';

const folder = mkdtempSync(join(tmpdir(), 'ebb-session-'));
afterAll(() => rmSync(folder, { recursive: true }));

test.each(['I-busy', 'E-block-128M', 'B-movable', 'A-session'])(
  '%s: our requests and answers are the real ones, in their order',
  (name) => {
    const result = memoryFidelity(readSession(name), () => undefined);
    expect(result.devices.flatMap((d) => d.aligned.filter((a) => a.ebb !== a.real))).toEqual([]);
    expect(result.share).toBe(1);
    expect(result.ledgerViolations).toBe(0);
  },
);

test('two sequences are aligned by their longest common subsequence', () => {
  const rows = longestCommonSubsequence(['a', 'b', 'c', 'e'], ['a', 'c', 'd', 'e']);
  expect(rows.filter((r) => r.ebb === r.real).map((r) => r.ebb)).toEqual(['a', 'c', 'e']);
  expect(rows).toHaveLength(5);
});

test('a capture that is none is named', () => {
  expect(() => readSession('/nowhere.json')).toThrow(/cannot be read; give a CAPTURE/);
});

test.each([
  [
    'two devices at one place',
    { device: { memaddr: '0x140000000', id: 'vm1' } },
    /device vm1: memaddr: overlaps device vm0/,
  ],
  ['a device in boot memory', { device: { memaddr: '0x40000000', id: 'vm1' } }, /overlaps boot memory/],
  ['two devices of one name', { device: { memaddr: '0x540000000' } }, /device vm0: is there twice/],
  [
    'a node without memory',
    { boot: [{ node: 0, size: 4 * GiB }], device: { memaddr: '0x540000000', id: 'vm1', node: 1 } },
    /node 1 has no boot memory/,
  ],
  ['a request in no device', { request: { addr: '0x1000' } }, /is in no device/],
  [
    'more blocks than there are',
    { request: { addr: '0x140000000', nbBlocks: 1e9 } },
    /are more than vm0 has/,
  ],
])('%s is one clear line', (_what, over: { device?: object; boot?: object[]; request?: object }, why) => {
  const device = {
    id: 'vm0',
    node: 0,
    memaddr: '0x140000000',
    maxSize: 8 * GiB,
    blockSize: 2 * MiB,
    requestedSizeAtStart: 0,
  };
  const session = {
    capture: 'made up',
    boot: over.boot ?? [0, 1].map((node) => ({ node, size: 2 * GiB })),
    vcpus: 2,
    linuxMemoryBlockSize: 128 * MiB,
    onlinePolicy: 'online',
    initOnAlloc: true,
    devices: [device, ...(over.device === undefined ? [] : [{ ...device, ...over.device }])],
    steps: [{ t: 1, action: 'dance' }],
    requests: over.request === undefined ? [] : [{ t: 1, type: 'PLUG', response: 'ACK', ...over.request }],
  };
  const path = join(folder, 'made-up.session.json');
  const write = (value: object): void => writeFileSync(path, JSON.stringify(value));
  write(session);
  expect(() => readSession(path)).toThrow(why);
  write({ ...session, devices: [device], requests: [], boot: [{ node: 0, size: 2 * GiB }] });
  // What is not followed is named.
  expect(unfollowed(readSession(path))).toEqual(['dance']);
});

/** A machine with 2 GiB on each node and a device of 8 GiB on node 0, through a session. */
function follow(over: Partial<Session>, blockSize = 2 * MiB): MemoryFidelity {
  const session: Session = {
    capture: 'made up',
    boot: [
      { node: 0, size: 2 * GiB },
      { node: 1, size: 2 * GiB },
    ],
    vcpus: 2,
    linuxMemoryBlockSize: 128 * MiB,
    onlinePolicy: 'online',
    initOnAlloc: true,
    devices: [
      {
        id: 'vm0',
        node: 0,
        memaddr: 0x1_4000_0000,
        maxSize: 8 * GiB,
        blockSize,
        requestedSizeAtStart: 0,
      },
    ],
    steps: [],
    requests: [],
    ...over,
  };
  return memoryFidelity(session, () => undefined);
}

/** What its driver asks for. */
const requestsOf = (over: Partial<Session>, blockSize?: number): string[] =>
  follow(over, blockSize).devices[0].aligned.map((a) => a.ebb);

const resize = (t: number, requestedSize: number): Session['steps'][number] => ({
  t,
  action: 'resize',
  device: 'vm0',
  requestedSize,
});
/** The memory block of a request, from the start of the region. */
const blockOf = (request: string): number =>
  (Number.parseInt(request.split(' ')[1], 16) - 0x1_4000_0000) / (128 * MiB);

test('requests that only we make count against us', () => {
  const { devices, share } = follow({ steps: [resize(2, 256 * MiB)] });
  expect(devices[0].requests.ebb).toBeGreaterThan(0);
  expect([devices[0].requests.real, devices[0].share, share]).toEqual([0, 0, 0]);
});

test('auto-movable: three times the boot memory is Movable, then each kernel block of the device backs three more', () => {
  const requests = requestsOf({
    onlinePolicy: 'auto-movable',
    steps: [resize(6, 8 * GiB), resize(10, 1 * GiB)],
  });
  const unplugged = requests.filter((r) => r.startsWith('UNPLUG')).map(blockOf);
  // Movable blocks go first, from the top; these four are Normal, and 301 % of node 0 is 48 blocks.
  expect([60, 56, 52, 48].filter((b) => unplugged.includes(b))).toEqual([]);
  expect(unplugged).toHaveLength(56);
  expect(unplugged.slice(0, 7)).toEqual([63, 62, 61, 59, 58, 57, 55]);
});

test('auto-movable: a big block is of one kind', () => {
  const requests = requestsOf(
    { onlinePolicy: 'auto-movable', steps: [resize(6, 8 * GiB), resize(10, 6 * GiB)] },
    1 * GiB,
  );
  // 6 GiB of 1 GiB blocks fit the ratio whole; the seventh is Normal and backs the eighth.
  expect(requests.filter((r) => r.startsWith('UNPLUG')).map(blockOf)).toEqual([56, 40]);
});

test('after a system reset the guest plugs again what is requested', () => {
  const requests = requestsOf({
    steps: [resize(6, 256 * MiB), { t: 10, action: 'system_reset' }, resize(20, 0)],
  });
  expect(requests.map((r) => r.replace(/ 0x\S+/, ''))).toEqual([
    'PLUG 64 ACK',
    'PLUG 64 ACK',
    'PLUG 64 ACK',
    'PLUG 64 ACK',
    'UNPLUG 64 ACK',
    'UNPLUG 64 ACK',
  ]);
});

test('what the retry timer could give back is held until then', () => {
  const request = (t: number, type: 'PLUG' | 'UNPLUG', subBlock: number, nbBlocks: number) => ({
    t,
    type,
    addr: 0x1_4000_0000 + subBlock * 2 * MiB,
    nbBlocks,
    response: 'ACK' as const,
  });
  const highest = Array.from({ length: 64 }, (_, i) => 63 - i);
  const real = [
    request(6, 'PLUG', 0, 64),
    ...highest.filter((b) => b !== 3).map((b) => request(10, 'UNPLUG', b, 1)),
    request(60, 'UNPLUG', 3, 1),
  ];
  const requests = requestsOf({ steps: [resize(6, 128 * MiB), resize(10, 0)], requests: real });
  expect(requests).toHaveLength(real.length);
  expect(requests.at(-1)).toBe('UNPLUG 0x140600000 1 ACK');
});

test('without its driver a device asks for nothing; it comes back only where nothing is added (F, G)', () => {
  const step = (t: number, action: 'rmmod' | 'insmod'): Session['steps'][number] => ({ t, action });
  // As observed: with memory plugged the module does not come back, and sizes have no effect.
  const stuck = requestsOf({
    steps: [
      resize(6, 256 * MiB),
      step(10, 'rmmod'),
      resize(12, 0),
      step(14, 'insmod'),
      resize(16, 512 * MiB),
    ],
  });
  expect(stuck.map((r) => r.split(' ')[0])).toEqual(['PLUG', 'PLUG']);
  const empty = requestsOf({
    steps: [resize(6, 128 * MiB), resize(8, 0), step(10, 'rmmod'), resize(12, 256 * MiB), step(14, 'insmod')],
  });
  expect(empty.map((r) => r.split(' ')[0])).toEqual(['PLUG', 'UNPLUG', 'PLUG', 'PLUG']);
});

test('a block that an administrator took offline is the first to go (G)', () => {
  const addr = 0x1_4000_0000 + 128 * MiB;
  const requests = requestsOf({
    steps: [
      resize(6, 512 * MiB),
      { t: 10, action: 'offline', addr },
      resize(12, 384 * MiB),
      { t: 14, action: 'online', addr },
      resize(16, 256 * MiB),
    ],
  });
  const unplugged = requests.filter((r) => r.startsWith('UNPLUG'));
  // A block that is offline goes by sub-blocks or whole; either way it goes before the highest.
  expect([...new Set(unplugged.map(blockOf).map(Math.floor))]).toEqual([1, 3]);
});
