/** DIMMs in a session of `ebb vm`, from the command line and from both monitors (G14, G20, G47). */
import { afterAll, describe, expect, test } from 'vitest';
import { H_TOTAL_PAGES } from '@ebb/guest-kernel';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { parseCommandLine } from './command-line.ts';
import { session } from './testing-session.ts';

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

describe('a DIMM of the command line is judged as one that is added later', () => {
  const BACKENDS =
    '-m 256M,slots=2,maxmem=3G -object memory-backend-ram,id=a,size=128M -object memory-backend-ram,id=b,size=128M';
  const parse = (devices: string): ReturnType<typeof parseCommandLine> =>
    parseCommandLine(`${BACKENDS} ${devices}`.split(' '));

  test('a backend that a virtio-mem device, another DIMM or a node has is busy', () => {
    const busy = /-device pc-dimm.*can't use already busy memdev: a/;
    expect(() => parse('-device virtio-mem-pci,id=v,memdev=a -device pc-dimm,memdev=a')).toThrow(busy);
    expect(() => parse('-device pc-dimm,memdev=a -device pc-dimm,memdev=a')).toThrow(busy);
    expect(() =>
      parseCommandLine(
        (
          '-m 128M,slots=1,maxmem=3G -object memory-backend-ram,id=a,size=128M ' +
          '-numa node,memdev=a -device pc-dimm,memdev=a'
        ).split(' '),
      ),
    ).toThrow(busy);
  });

  test('its address is honoured, and refused when it is no address for it', () => {
    const [placed] = parse('-device pc-dimm,id=d,memdev=a,addr=0x110000000').dimms;
    expect(placed.dimm.addr).toBe(0x1_1000_0000);
    expect(() => parse('-device pc-dimm,id=d,memdev=a,addr=0x110000001')).toThrow(
      /^-device pc-dimm,id=d: address must be aligned to 0x200000 bytes$/,
    );
    expect(() =>
      parse('-device pc-dimm,memdev=a,addr=0x110000000 -device pc-dimm,memdev=b,addr=0x110000000'),
    ).toThrow(/^-device pc-dimm: address range conflicts with memory device id='dimm0'$/);
  });

  test('its id is an identifier that nobody else has', () => {
    expect(() => parse('-device pc-dimm,id=7,memdev=a')).toThrow(/Parameter 'id' expects an identifier/);
    expect(() => parse('-device pc-dimm,id=d,memdev=a -device pc-dimm,id=d,memdev=b')).toThrow(
      /Duplicate device ID 'd'/,
    );
  });
});
