/** `ebb vm` from within: the RFC's session and a QMP conversation, over the session loop on one thread. */
import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, test } from 'vitest';
import { H_BOOTED } from '@ebb/guest-kernel';
import { MiB } from '@ebb/machine';
import { session } from './testing-session.ts';

test('the session of the 2017 RFC answers as printed there (H47–H54)', async () => {
  const text = readFileSync(new URL('../../captures/rfc-session.txt', import.meta.url), 'utf8');
  const command = text.split('\n').find((l) => l.startsWith('--enable-kvm')) ?? '';
  const args = [...command.matchAll(/"([^"]*)"|(\S+)/g)].map((m) => m[1] ?? m[2]);
  const printed = text.slice(text.indexOf('(qemu)'));
  const { loop, run } = session(args, 2048 * MiB);
  let answered = '';
  for (const [, line] of printed.matchAll(/^\(qemu\) (.*)$/gm))
    answered += `(qemu) ${line}\n${await loop.do(() => loop.hmp.execute(line))}`;
  await loop.do(() => loop.hmp.execute('quit'));
  await run;
  expect(answered).toBe(printed);
}, 60_000);

const TWO_BACKENDS =
  '-m 4G -smp 2 -object memory-backend-ram,id=a,size=2G -object memory-backend-ram,id=b,size=2G ' +
  '-numa node,cpus=0,memdev=a -numa node,cpus=1,memdev=b';

test.each([
  [
    '-m 256M -smp 2 -numa node,cpus=0 -numa node,cpus=1',
    [
      '0000000000000000-000000000009ffff (prio 0, ram): pc.ram',
      '0000000000100000-0000000007ffffff (prio 0, ram): pc.ram @0000000000100000',
      '0000000008000000-000000000fffffff (prio 0, ram): pc.ram @0000000008000000',
    ],
  ],
  [
    TWO_BACKENDS,
    [
      '0000000000000000-000000000009ffff (prio 0, ram): a',
      '0000000000100000-000000007fffffff (prio 0, ram): a @0000000000100000',
      '0000000080000000-00000000bfffffff (prio 0, ram): b',
      '0000000100000000-000000013fffffff (prio 0, ram): b @0000000040000000',
    ],
  ],
  [
    '-m 4G,maxmem=8G -object memory-backend-ram,id=m,size=256M -device virtio-mem-pci,id=v,memdev=m',
    [
      '0000000000000000-000000000009ffff (prio 0, ram): pc.ram',
      '0000000000100000-00000000bfffffff (prio 0, ram): pc.ram @0000000000100000',
      '0000000100000000-000000013fffffff (prio 0, ram): pc.ram @00000000c0000000',
      '0000000140000000-000000014fffffff (prio 0, ram): m',
    ],
  ],
])('`info mtree -f` of %s: which bytes of which backend are where', async (line, ranges) => {
  const { loop, run } = session(line.split(' '), 512 * MiB);
  const view = await loop.do(() => loop.hmp.execute('info mtree -f'));
  expect(
    view
      .split('\n')
      .filter((l) => l.includes('prio'))
      .map((l) => l.trim()),
  ).toEqual(ranges);
  await loop.do(() => loop.hmp.execute('quit'));
  await run;
});

const SMALL = [
  '-m',
  '256M,maxmem=4G',
  '-smp',
  '2',
  '-object',
  'memory-backend-ram,id=mem0,size=1G',
  '-device',
  'virtio-mem-pci,id=vm0,memdev=mem0,node=0,requested-size=256M',
  '-device',
  'virtio-balloon-pci,id=balloon0',
];

describe('a QMP conversation', () => {
  const { loop, run, host } = session(SMALL);
  const { id, greeting } = loop.openQmp();
  const ask = async (text: string): Promise<unknown[]> => {
    const answer = await loop.do(() => loop.feedQmp(id, text));
    return answer.text
      .split('\r\n')
      .filter((l) => l !== '')
      .map((l) => JSON.parse(l) as unknown);
  };
  const command = async (name: string, args?: object): Promise<unknown> =>
    (await ask(JSON.stringify({ execute: name, ...(args === undefined ? {} : { arguments: args }) })))[0];
  const error = (desc: string, kind = 'GenericError'): object => ({ error: { class: kind, desc } });
  const set = (property: string, value: unknown): Promise<unknown> =>
    command('qom-set', { path: '/machine/peripheral/vm0', property, value });

  afterAll(async () => {
    await command('quit');
    await run;
  });

  test('begins with a greeting, and takes no command before capabilities', async () => {
    expect(JSON.parse(greeting)).toHaveProperty('QMP.version.qemu.major', 7);
    expect(await command('query-status')).toEqual(
      error("Expecting capabilities negotiation with 'qmp_capabilities'", 'CommandNotFound'),
    );
    expect(await command('qmp_capabilities')).toEqual({ return: {} });
    expect(await command('qmp_capabilities')).toEqual(
      error('Capabilities negotiation is already complete, command ignored', 'CommandNotFound'),
    );
  });

  test('sizes memory and says what became of it', async () => {
    expect(await set('requested-size', 512 * MiB)).toEqual({ return: {} });
    expect(await command('query-memory-devices')).toEqual({
      return: [
        {
          type: 'virtio-mem',
          data: {
            memdev: '/objects/mem0',
            memaddr: 0x1_0000_0000,
            'block-size': 2 * MiB,
            size: 512 * MiB,
            node: 0,
            'max-size': 1024 * MiB,
            'requested-size': 512 * MiB,
            id: 'vm0',
          },
        },
      ],
    });
    expect(await command('query-memory-size-summary')).toEqual({
      return: { 'base-memory': 256 * MiB, 'plugged-memory': 512 * MiB },
    });
    expect(await loop.nextEvents()).toMatch(/MEMORY_DEVICE_SIZE_CHANGE.*"id":"vm0"/);
  });

  test('the balloon takes a target and reports its size', async () => {
    expect(await command('balloon', { value: 128 * MiB })).toEqual({ return: {} });
    expect(await command('query-balloon')).toEqual({ return: { actual: 128 * MiB } });
    expect(await command('balloon', { value: 0 })).toEqual(error("Parameter 'target' expects a size"));
    expect(await command('balloon', { value: 256 * MiB })).toEqual({ return: {} });
  });

  test.each([
    [1 * MiB, "'requested-size' has to be multiples of 'block-size' (0x200000)"],
    [3 * MiB, "'requested-size' has to be multiples of 'block-size' (0x200000)"],
    [-1, "'requested-size' has to be multiples of 'block-size' (0x200000)"],
    [2048 * MiB, "'requested-size' cannot exceed the memory backend size(0x40000000)"],
  ])('a requested size of %i is refused in QEMU’s words and changes nothing', async (value, desc) => {
    expect(await set('requested-size', value)).toEqual(error(desc));
    expect(await command('qom-get', { path: '/machine/peripheral/vm0', property: 'requested-size' })).toEqual(
      {
        return: 512 * MiB,
      },
    );
  });

  test('read-only properties, unknown ids, properties and commands are refused', async () => {
    expect(await set('block-size', 4 * MiB)).toEqual(error("'block-size' cannot be changed"));
    expect(await set('size', 4 * MiB)).toEqual(error("Property 'virtio-mem.size' is not writable"));
    expect(await set('colour', 1)).toEqual(error("Property 'virtio-mem-pci.colour' not found"));
    expect(await command('qom-get', { path: '/machine/peripheral/vm9', property: 'size' })).toEqual(
      error("Device '/machine/peripheral/vm9' not found", 'DeviceNotFound'),
    );
    expect(await command('device_del', { id: 'vm0' })).toEqual(
      error('virtio based memory devices cannot be unplugged.'),
    );
    expect(await command('frobnicate')).toEqual(
      error('The command frobnicate has not been found', 'CommandNotFound'),
    );
    expect(await command('qom-get', { path: '/' })).toEqual(error("Parameter 'property' is missing"));
    expect(await command('stop', { now: true })).toEqual(error("Parameter 'now' is unexpected"));
    expect(await command('balloon', { value: 'much' })).toEqual(
      error("Invalid parameter type for 'value', expected: integer"),
    );
  });

  test('garbage is answered, half a command waits for its rest, ids come back', async () => {
    expect(await ask('hello\n')).toEqual([error("JSON parse error, invalid keyword 'hello'")]);
    expect(await ask('[1]')).toEqual([error('QMP input must be a JSON object')]);
    expect(await ask('{"execute": "query-')).toEqual([]);
    expect(await ask('name", "id": [1, "x"]} {"execute":"query-name"}')).toEqual([
      { return: { name: 'ebb' }, id: [1, 'x'] },
      { return: { name: 'ebb' } },
    ]);
  });

  test('a line with a word too many changes nothing; JSON keeps its quotes; sizes may be hexadecimal', async () => {
    const before = await command('query-memory-devices');
    const hmp = (line: string): Promise<string> => loop.do(() => loop.hmp.execute(line));
    const path = '/machine/peripheral/vm0 requested-size';
    expect(await hmp(`qom-set ${path} 1G junk`)).toBe('qom-set: extraneous characters at the end of line\n');
    expect(await hmp(`qom-set -j ${path}`)).toBe('qom-set: missing argument\n');
    expect(await hmp(`qom-set -j ${path} "2G"`)).toMatch(/^Error: Invalid parameter type/);
    expect(await command('query-memory-devices')).toEqual(before);
    expect(await hmp(`qom-set ${path} 0x20000000`)).toBe('');
  });

  test('a paused machine stands still, and goes on', async () => {
    await command('stop');
    expect(await command('query-status')).toEqual({
      return: { status: 'paused', singlestep: false, running: false },
    });
    await set('requested-size', 128 * MiB);
    expect(await command('qom-get', { path: '/machine/peripheral/vm0', property: 'size' })).toEqual({
      return: 512 * MiB,
    });
    await command('cont');
    expect(await command('qom-get', { path: '/machine/peripheral/vm0', property: 'size' })).toEqual({
      return: 128 * MiB,
    });
  });

  test('after a system reset the guest has what is requested again, without holes (I10)', async () => {
    const [vm] = host.vms;
    const [device] = vm.memory;
    const { plugRequests } = device.counters;
    await loop.nextEvents();
    await command('system_reset');
    expect(await loop.nextEvents()).toMatch(/"event":"RESET".*host-qmp-system-reset/);
    expect(await command('query-memory-size-summary')).toEqual({
      return: { 'base-memory': 256 * MiB, 'plugged-memory': 128 * MiB },
    });
    // A driver that was brought up anew has plugged one memory block, from the region's start.
    expect(device.counters.plugRequests).toBe(plugRequests + 1);
    expect(Array.from({ length: 65 }, (_, b) => device.plugged.has(b)).lastIndexOf(true)).toBe(63);
    expect(device.plugged.count()).toBe(64);
    expect(vm.arena.w[H_BOOTED]).toBe(1);
  });

  test('the human monitor speaks through it, with its own line ends', async () => {
    expect(await command('human-monitor-command', { 'command-line': 'info balloon' })).toEqual({
      return: 'balloon: actual=256\r\n',
    });
    expect(await command('human-monitor-command', { 'command-line': 'info nonsense' })).toEqual({
      return: "unknown command: 'info nonsense'\r\n",
    });
    expect(await command('human-monitor-command', { 'command-line': 'info numa' })).toEqual({
      return: '1 nodes\r\nnode 0 cpus: 0 1\r\nnode 0 size: 384 MB\r\nnode 0 plugged: 128 MB\r\n',
    });
  });

  test('a second connection has its own state', async () => {
    const other = loop.openQmp();
    const { text } = await loop.do(() => loop.feedQmp(other.id, '{"execute":"query-name"}'));
    expect(text).toMatch(/Expecting capabilities/);
    loop.closeQmp(other.id);
    expect(await command('query-name')).toEqual({ return: { name: 'ebb' } });
  });
});
