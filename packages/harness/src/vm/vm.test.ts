/** `ebb vm` from within: command lines, both monitors, and the RFC's session, over the session loop on one thread. */
import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, test } from 'vitest';
import { H_BOOTED, H_TOTAL_PAGES } from '@ebb/guest-kernel';
import { GiB, InlineExitPort, inlineSchedule, MiB, PAGE_SIZE } from '@ebb/machine';
import { orderPins } from '../run/agent-program.ts';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { CpuSide } from '../run/cpu-side.ts';
import { fileStorage } from '../run/file-storage.ts';
import { HostSide } from '../run/host-side.ts';
import { heldBlocks, sessionSpec } from './commands.ts';
import { parseCommandLine } from './command-line.ts';
import { SessionLoop } from './session-loop.ts';

const HOST = 1024 * MiB;

/** A session on one thread: the loop of `ebb vm` with inline windows. */
function session(
  args: readonly string[],
  hostBytes = HOST,
): { loop: SessionLoop; run: Promise<string>; host: HostSide } {
  const description = parseCommandLine(args);
  const spec = sessionSpec(description, hostBytes);
  const buffers = runBuffers(spec, hostBuffers(hostBytes));
  // Both are made below; devices speak only once the loop runs.
  const holder: { loop: SessionLoop | null } = { loop: null };
  const host = new HostSide(spec, buffers, (_vm, bytes) => fileStorage(bytes), inlineSchedule, undefined, {
    size: (id, bytes) => holder.loop?.sizeChanged(id, bytes),
    balloon: (bytes) => holder.loop?.balloonChanged(bytes),
    dimm: (news) => holder.loop?.dimmNews(news),
  });
  const cpus = new CpuSide(spec, buffers, -1, new InlineExitPort(() => void host.poll()), inlineSchedule);
  const windows = {
    nextDue: Number.POSITIVE_INFINITY,
    othersDue: Number.POSITIVE_INFINITY,
    async run(): Promise<boolean> {
      windows.nextDue = cpus.runWindow(host.windowEnd);
      while (host.poll());
      await Promise.resolve();
      return true;
    },
  };
  const loop = new SessionLoop(description, host, windows);
  holder.loop = loop;
  const held = heldBlocks(description, undefined);
  if (held.length > 0) void loop.do(() => orderPins(new Int32Array(buffers.handles[0]), held));
  return { loop, run: loop.run(), host };
}

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

describe('DIMMs while the machine runs (G14, G20, G47)', () => {
  const { loop, run, host } = session(
    (
      '-m 256M,slots=3,maxmem=3G -smp 1 ' +
      '-object memory-backend-ram,id=cold,size=128M -device pc-dimm,id=dimm0,memdev=cold ' +
      '-object memory-backend-ram,id=mem0,size=512M ' +
      '-device virtio-mem-pci,id=vm0,memdev=mem0,requested-size=128M'
    ).split(' '),
    2048 * MiB,
  );
  const ask = (line: string): Promise<string> => loop.do(() => loop.hmp.execute(line));
  const total = (): number => (host.vms[0].arena.w[H_TOTAL_PAGES] * PAGE_SIZE) / MiB;
  const { id } = loop.openQmp();
  const qmp = async (execute: string, args: object = {}): Promise<unknown> => {
    const answer = await loop.do(() => loop.feedQmp(id, JSON.stringify({ execute, arguments: args })));
    return JSON.parse(answer.text) as unknown;
  };

  afterAll(async () => {
    await ask('quit');
    await run;
  });

  test('one that is in from the start is found by the guest as it boots, beside virtio-mem', async () => {
    await qmp('qmp_capabilities');
    expect(await ask('info memory-devices')).toBe(
      [
        'Memory device [virtio-mem]: "vm0"',
        '  memaddr: 0x100000000',
        '  node: 0',
        '  requested-size: 134217728',
        '  size: 134217728',
        '  max-size: 536870912',
        '  block-size: 2097152',
        '  memdev: /objects/mem0',
        'Memory device [dimm]: "dimm0"',
        '  addr: 0x120000000',
        '  slot: 0',
        '  node: 0',
        '  size: 134217728',
        '  memdev: /objects/cold',
        '  hotplugged: false',
        '  hotpluggable: true',
        '',
      ].join('\n'),
    );
    expect(await qmp('query-memory-size-summary')).toEqual({
      return: { 'base-memory': 256 * MiB, 'plugged-memory': 256 * MiB },
    });
    // But for the kernel itself.
    expect(total()).toBeGreaterThan(480);
  });

  test('one is added, used, asked to go and gone; its backend with it', async () => {
    const before = total();
    expect(await ask('object_add memory-backend-ram,id=mem1,size=256M')).toBe('');
    expect(await ask('device_add pc-dimm,id=dimm1,memdev=mem1')).toBe('');
    expect(await qmp('query-memory-devices')).toMatchObject({
      return: [
        { type: 'virtio-mem' },
        { type: 'dimm' },
        { data: { id: 'dimm1', slot: 1, hotplugged: true } },
      ],
    });
    // Its memmap is in its own memory or in other memory: it gives all but that.
    expect(total() - before).toBe(256);
    expect(await ask('object_del mem1')).toBe("Error: object 'mem1' is in use, can not be deleted\n");
    expect(await ask('device_del dimm1')).toBe('');
    expect(await ask('object_del mem1')).toBe('');
    expect(await ask('device_del dimm1')).toBe("Error: Device 'dimm1' not found\n");
    expect(total()).toBe(before);
    expect(host.audit()).toBe('');
    const events = (await loop.nextEvents())
      .split('\r\n')
      .filter((l) => /DEVICE/.test(l) && !/MEMORY/.test(l));
    expect(events.map((l) => JSON.parse(l) as unknown)).toMatchObject([
      { event: 'ACPI_DEVICE_OST', data: { info: { device: 'dimm1', source: 0x200, status: 0, slot: '1' } } },
      { event: 'DEVICE_DELETED', data: { device: 'dimm1', path: '/machine/peripheral/dimm1' } },
    ]);
  });

  test('what cannot be is said in one line and changes nothing', async () => {
    const before = await ask('info memory-devices');
    await ask('object_add memory-backend-ram,id=spare,size=128M');
    const lines: [string, string][] = [
      [
        'object_add memory-backend-ram,id=spare,size=1G',
        "attempt to add duplicate property 'spare' to object (type 'container')",
      ],
      ['object_add memory-backend-ram,id=none', "can't create backend with size 0"],
      ['object_add rng-random,id=r0', "Parameter 'qom-type' does not accept value 'rng-random'"],
      ['object_del nobody', "object 'nobody' not found"],
      ['device_add pc-dimm,id=d', "'memdev' property is not set"],
      ['device_add pc-dimm,id=d,memdev=nobody', "Device 'nobody' not found"],
      ['device_add pc-dimm,id=d,memdev=cold', "can't use already busy memdev: cold"],
      ['device_add pc-dimm,id=dimm0,memdev=spare', "Duplicate device ID 'dimm0'"],
      ['device_add pc-dimm,id=vm0,memdev=spare', "Duplicate device ID 'vm0'"],
      [
        'device_add pc-dimm,id=d,memdev=spare,node=3',
        "'DIMM property node has value 3' which exceeds the number of numa nodes: 1",
      ],
      [
        'device_add pc-dimm,id=d,memdev=spare,addr=0x100000000',
        "address range conflicts with memory device id='vm0'",
      ],
      [
        'device_add pc-dimm,id=d,memdev=spare,node=one',
        "Invalid parameter type for 'node', expected: integer",
      ],
      ['device_add pc-dimm,id=d,memdev=spare,size=1G', "Property 'pc-dimm.size' not found"],
      [
        'object_add memory-backend-ram,id=o,size=1G,colour=red',
        "Property 'memory-backend-ram.colour' not found",
      ],
      [
        'device_add pc-dimm,id=d,memdev=spare,addr=0x110000000',
        "address range conflicts with memory device id='vm0'",
      ],
      [
        'device_add pc-dimm,id=d,memdev=spare,node=-1',
        "Invalid parameter type for 'node', expected: integer",
      ],
      ['device_add pc-dimm,id=7,memdev=spare', "Parameter 'id' expects an identifier"],
      ['device_add floppy,id=d', "'floppy' is not a valid device model name"],
      ['device_del vm0', 'virtio based memory devices cannot be unplugged.'],
    ];
    for (const [line, why] of lines) expect(await ask(line)).toBe(`Error: ${why}\n`);
    await ask('object_add memory-backend-ram,id=huge,size=3G');
    expect(await ask('device_add pc-dimm,memdev=huge')).toMatch(
      /^Error: not enough space, currently 0x28000000 /,
    );
    expect(await ask('info memory-devices')).toBe(before);
  });

  test('a node that is none is refused in QMP, too; the guest lives on', async () => {
    const dimm = { driver: 'pc-dimm', id: 'd', memdev: 'spare' };
    const wrong = { error: { desc: "Invalid parameter type for 'node', expected: integer" } };
    expect(await qmp('device_add', { ...dimm, node: -1 })).toMatchObject(wrong);
    expect(await qmp('device_add', { ...dimm, toString: 1 })).toMatchObject({
      error: { desc: "Parameter 'toString' is unexpected" },
    });
    expect(await ask('info status')).toBe('VM status: running\n');
  });

  test('the fourth of three slots is refused', async () => {
    for (const i of [1, 2, 3]) await ask(`object_add memory-backend-ram,id=m${i},size=128M`);
    expect(await ask('device_add pc-dimm,id=d1,memdev=m1')).toBe('');
    expect(await ask('device_add pc-dimm,id=d2,memdev=m2')).toBe('');
    expect(await ask('device_add pc-dimm,id=d3,memdev=m3')).toBe('Error: no free slots available\n');
  });

  test('a system reset keeps DIMMs, and the next kernel finds them', async () => {
    const before = total();
    await ask('system_reset');
    expect(await ask('info memory_size_summary')).toBe(
      `base memory: ${256 * MiB}\nplugged memory: ${512 * MiB}\n`,
    );
    expect(total()).toBe(before);
    expect(host.audit()).toBe('');
  });
});

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

test.each([
  [['-m', '1G'], ['-device', 'virtio-mem-pci,id=a,memdev=none'], /Device 'none' not found/],
  [['-m', '1G,maxmem=4G'], ['-device', 'virtio-mem-pci,id=a'], /'memdev' property is not set/],
  [['-m', 'lots'], [], /'lots' is not a size/],
  [['-smp', '99'], [], /give 1 to 8 vCPUs/],
  [['-frob', '1'], [], /-frob: unknown option/],
  [['oops'], [], /oops: not an option/],
  [['-m'], [], /-m: needs a value/],
  [['-numa', 'node,nodeid=0,cpus=0-9'], [], /CPU index \(9\) should be smaller than maxcpus/],
  [
    ['-smp', '2', '-numa', 'node,nodeid=0,cpus=0', '-numa', 'node,nodeid=1,cpus=0'],
    [],
    /CPU 0 is on another node already/,
  ],
  [['-mon', 'chardev=nope,mode=readline'], [], /chardev "nope" not found/],
  [['-m', '1G,maxmem=512M'], [], /must be at least the initial memory size/],
  [['-m', '1G,foo=bar'], [], /Property 'foo' not found/],
  [['-constructor', 'x'], [], /unknown option/],
  [['-qmp', 'unix:'], [], /give stdio or unix:PATH/],
  [['-qmp', 'stdio', '-monitor', 'stdio'], [], /cannot use stdio by multiple monitors/],
  [
    ['-m', '1G,maxmem=4G', '-object', 'memory-backend-ram,id=m,size=1G'],
    ['-device', 'virtio-mem-pci,id=a,memdev=m,unplugged-inaccessible=maybe'],
    /does not accept value 'maybe'/,
  ],
])('the command line %j %j is one clear line', (args, more, message) => {
  expect(() => parseCommandLine([...args, ...more])).toThrow(message);
});

test('a device whose figures are impossible is refused in QEMU’s words', () => {
  const backend = ['-m', '1G,maxmem=4G', '-object', 'memory-backend-ram,id=mem0,size=1G', '-device'];
  const line =
    (fields: string): (() => unknown) =>
    () =>
      parseCommandLine([...backend, `virtio-mem-pci,id=vm0,memdev=mem0${fields}`]);
  expect(line(',requested-size=3M')).toThrow(/has to be multiples of 'block-size'/);
  expect(line(',requested-size=2G')).toThrow(/cannot exceed the memory backend size/);
  expect(line(',block-size=3M')).toThrow(/power of two/);
  expect(line(',node=1')).toThrow(/exceeds the number of numa nodes: 1/);
  expect(line('')).not.toThrow();
});

test('addresses of regions follow boot memory, each by its largest size (H48)', () => {
  const place = (boot: string): number[] => {
    const regions = ['3G', '1G'].flatMap((size, i) => [
      '-object',
      `memory-backend-ram,id=mem${i},size=${size}`,
      '-device',
      `virtio-mem-pci,id=vm${i},memdev=mem${i},requested-size=256M`,
    ]);
    return parseCommandLine(['-m', `${boot},maxmem=32G`, ...regions]).devices.map((d) => d.addr);
  };
  // Boot memory that ends below 4 GiB, and 3 GiB below the hole with the rest above it.
  expect(place('1G')).toEqual([4 * GiB, 7 * GiB]);
  expect(place('6G')).toEqual([7 * GiB, 10 * GiB]);
});
