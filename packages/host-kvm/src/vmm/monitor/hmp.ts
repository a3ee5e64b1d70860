/**
 * The human monitor: commands as people type them, answers in the formats QEMU 7.2 prints; and in the dialect of the
 * 2017 RFC (`virtio-mem ID MIB`, `info virtio-mem ID`), which never reached QEMU.
 */
import { MiB, parseSize, type Result } from '@ebb/machine';
import { balloonActual, setBalloon } from './balloon.ts';
import { deviceAdd, deviceDel, objectAdd, objectDel } from './hotplug.ts';
import type { Properties } from './place-dimm.ts';
import {
  baseMemory,
  byAddress,
  pluggedMemory,
  pluggedOn,
  type Machine,
  type MonitoredDimm,
  type MonitoredMemoryDevice,
} from './machine.ts';
import { qomGet, qomList, qomSet, type MonitorError, type QomValue } from './qom.ts';

export type Dialect = 'qemu' | 'rfc-2017';

interface Command {
  readonly name: string;
  readonly params: string;
  readonly help: string;
  readonly dialect?: Dialect;
  /** Least and most arguments. */
  readonly args: readonly [number, number];
  run(args: readonly string[]): string;
}

const hex16 = (n: number): string => n.toString(16).padStart(16, '0');

export class Hmp {
  readonly #machine: Machine;
  readonly #dialect: Dialect;
  readonly #commands: readonly Command[];
  readonly #infos: readonly Command[];

  constructor(machine: Machine, dialect: Dialect = 'qemu') {
    this.#machine = machine;
    this.#dialect = dialect;
    const mine = (c: Command): boolean => c.dialect === undefined || c.dialect === dialect;
    this.#commands = this.#allCommands().filter(mine);
    this.#infos = this.#allInfos().filter(mine);
  }

  /** Carries one line out; the text to print, with its newline, or nothing. Never throws for what a user typed. */
  execute(line: string): string {
    const [name = '', ...args] = words(line);
    if (name === '' || name.startsWith('#')) return '';
    if (name === 'info' && args.length > 0) {
      const info = this.#infos.find((c) => c.name === args[0]);
      if (info === undefined) return `unknown command: 'info ${args[0]}'\n`;
      return this.#run(info, `info ${info.name}`, args.slice(1));
    }
    const command = this.#commands.find((c) => c.name.split('|').includes(name));
    return command === undefined ? `unknown command: '${name}'\n` : this.#run(command, name, args);
  }

  #run(command: Command, typed: string, args: readonly string[]): string {
    if (args.length > command.args[1]) return `${typed}: extraneous characters at the end of line\n`;
    if (args.length < command.args[0])
      return `${typed}: missing argument; usage: ${typed} ${command.params}\n`;
    return command.run(args);
  }

  #allCommands(): Command[] {
    const machine = this.#machine;
    return [
      {
        name: 'help|?',
        params: '[cmd]',
        help: 'show the help',
        args: [0, 2],
        run: ([which]) => this.#help(which),
      },
      {
        name: 'info',
        params: '[subcommand]',
        help: 'show various information about the system state',
        args: [0, 0],
        run: () => this.#help('info'),
      },
      {
        name: 'balloon',
        params: 'target',
        help: 'request VM to change its memory allocation (in MB)',
        args: [1, 1],
        run: ([mib]) => {
          const value = Number(mib);
          if (!Number.isInteger(value)) return `balloon: invalid number '${mib}'\n`;
          const why = setBalloon(machine, value * MiB);
          return why === null ? '' : failed(why);
        },
      },
      {
        name: 'virtio-mem',
        params: 'id size',
        help: 'request the memory device to have a size (in MB)',
        dialect: 'rfc-2017',
        args: [2, 2],
        run: ([id, mib]) => this.#resize(id, mib),
      },
      {
        name: 'qom-set',
        params: '[-j] path property value',
        help: 'set QOM property.\n\t\t\t -j: the value is specified in json format.',
        args: [3, 4],
        run: (args) => {
          const json = args[0] === '-j';
          if (json !== (args.length === 4))
            return `qom-set: ${json ? 'missing argument' : 'extraneous characters at the end of line'}\n`;
          const [path, property, text] = json ? args.slice(1) : args;
          const value = json ? jsonValue(text) : plainValue(text);
          if (value === null) return `qom-set: invalid value '${text}'\n`;
          const done = qomSet(machine, path, property, value);
          return done.ok ? '' : failed(done.error);
        },
      },
      {
        name: 'qom-get',
        params: 'path property',
        help: 'print QOM property',
        args: [2, 2],
        run: ([path, property]) => {
          const got = qomGet(machine, path, property);
          return got.ok ? `${JSON.stringify(got.value, null, 4)}\n` : failed(got.error);
        },
      },
      {
        name: 'qom-list',
        params: 'path',
        help: 'list QOM properties',
        args: [0, 1],
        run: ([path]) => {
          if (path === undefined) return '/\n';
          const list = qomList(machine, path);
          return list.ok ? list.value.map((p) => `${p.name} (${p.type})\n`).join('') : failed(list.error);
        },
      },
      {
        name: 'object_add',
        params: '[qom-type=]type,id=str[,prop=value][,...]',
        help: 'create QOM object',
        args: [1, 1],
        run: ([list]) => outcome(objectAdd(machine, properties(list, 'qom-type'))),
      },
      {
        name: 'object_del',
        params: 'id',
        help: 'destroy QOM object',
        args: [1, 1],
        run: ([id]) => outcome(objectDel(machine, id)),
      },
      {
        name: 'device_add',
        params: 'driver[,prop=value][,...]',
        help: 'add device, like -device on the command line',
        args: [1, 1],
        run: ([list]) => outcome(deviceAdd(machine, properties(list, 'driver'))),
      },
      {
        name: 'device_del',
        params: 'device',
        help: 'remove device',
        args: [1, 1],
        run: ([id]) => outcome(deviceDel(machine, id)),
      },
      {
        name: 'stop|s',
        params: '',
        help: 'stop emulation',
        args: [0, 0],
        run: () => {
          machine.running = false;
          return '';
        },
      },
      {
        name: 'cont|c',
        params: '',
        help: 'resume emulation',
        args: [0, 0],
        run: () => {
          machine.running = true;
          return '';
        },
      },
      {
        name: 'system_reset',
        params: '',
        help: 'reset the system',
        args: [0, 0],
        run: () => {
          machine.systemReset();
          return '';
        },
      },
      {
        name: 'quit|q',
        params: '',
        help: 'quit the emulator',
        args: [0, 0],
        run: () => {
          machine.quit();
          return '';
        },
      },
    ];
  }

  #allInfos(): Command[] {
    const machine = this.#machine;
    return [
      {
        name: 'balloon',
        params: '',
        help: 'show balloon information',
        args: [0, 0],
        run: () => {
          if (machine.balloon === null) return failed(NO_BALLOON);
          return `balloon: actual=${Math.floor(balloonActual(machine, machine.balloon.device.actual) / MiB)}\n`;
        },
      },
      {
        name: 'memdev',
        params: '',
        help: 'show memory backends',
        args: [0, 0],
        run: () => `${machine.backends.map(backend).join('')}\n`,
      },
      {
        name: 'memory-devices',
        params: '',
        help: 'show memory devices',
        args: [0, 0],
        run: () =>
          byAddress(machine)
            .map((d) => ('dimm' in d ? dimmText(d) : this.#device(d)))
            .join(''),
      },
      {
        name: 'memory_size_summary',
        params: '',
        help: 'show the amount of initially allocated and present hotpluggable (if enabled) memory in bytes.',
        args: [0, 0],
        run: () => `base memory: ${baseMemory(machine)}\nplugged memory: ${pluggedMemory(machine)}\n`,
      },
      {
        name: 'mtree',
        params: '[-f]',
        help: 'show memory tree (-f: dump flat view for address spaces)',
        args: [0, 1],
        run: ([flag]) => this.#mtree(flag === '-f'),
      },
      {
        name: 'name',
        params: '',
        help: 'show the current VM name',
        args: [0, 0],
        run: () => `${machine.name}\n`,
      },
      {
        name: 'numa',
        params: '',
        help: 'show NUMA information',
        args: [0, 0],
        run: () => this.#numa(),
      },
      {
        name: 'ramblock',
        params: '',
        help: 'Display system ramblock information',
        args: [0, 0],
        run: () => this.#ramblock(),
      },
      {
        name: 'status',
        params: '',
        help: 'show the current VM status (running|paused)',
        args: [0, 0],
        run: () => `VM status: ${machine.running ? 'running' : 'paused'}\n`,
      },
      {
        name: 'virtio-mem',
        params: 'id',
        help: 'show the state of a memory device',
        dialect: 'rfc-2017',
        args: [1, 1],
        run: ([id]) => this.#state(id),
      },
    ];
  }

  #help(which: string | undefined): string {
    const line = (prefix: string, c: Command): string =>
      `${prefix}${c.name} ${c.params}${c.params === '' ? '' : ' '}-- ${c.help}\n`;
    if (which === undefined) return this.#commands.map((c) => line('', c)).join('');
    if (which === 'info') return this.#infos.map((c) => line('info ', c)).join('');
    return this.#commands
      .filter((c) => c.name.split('|').includes(which))
      .map((c) => line('', c))
      .join('');
  }

  // ── Memory devices ───────────────────────────────────────────────────────────────────────────────────────────────

  #device({ device, memdev }: MonitoredMemoryDevice): string {
    const rows: readonly (readonly [string, string | number])[] =
      this.#dialect === 'rfc-2017'
        ? [
            ['addr', `0x${device.addr.toString(16)}`],
            ['node', device.node],
            ['size', device.pluggedBytes],
            ['max-size', device.regionBytes],
            ['memdev', `/objects/${memdev}`],
          ]
        : [
            ['memaddr', `0x${device.addr.toString(16)}`],
            ['node', device.node],
            ['requested-size', device.requestedBytes],
            ['size', device.pluggedBytes],
            ['max-size', device.regionBytes],
            ['block-size', device.blockBytes],
            ['memdev', `/objects/${memdev}`],
          ];
    return `Memory device [virtio-mem]: "${device.id}"\n${rows.map(([k, v]) => `  ${k}: ${v}\n`).join('')}`;
  }

  #find(id: string): MonitoredMemoryDevice | undefined {
    return this.#machine.memoryDevices.find(({ device }) => device.id === id);
  }

  #resize(id: string, mib: string): string {
    const entry = this.#find(id);
    if (entry === undefined) return `Error: Device '${id}' not found\n`;
    const value = Number(mib);
    if (!Number.isInteger(value)) return `virtio-mem: invalid number '${mib}'\n`;
    const done = qomSet(this.#machine, `/machine/peripheral/${id}`, 'requested-size', value * MiB);
    return done.ok ? '' : failed(done.error);
  }

  #state(id: string): string {
    const entry = this.#find(id);
    if (entry === undefined) return `Error: Device '${id}' not found\n`;
    const { device } = entry;
    const reached = device.pluggedBytes === device.requestedBytes;
    const request = reached ? 'success' : this.#machine.settled ? 'vm-oom' : 'vm-busy';
    return `Status: ready\nRequest status: ${request}\nPage size: ${device.blockBytes} bytes\n`;
  }

  #numa(): string {
    const machine = this.#machine;
    const lines = [`${machine.nodes.length} nodes`];
    for (const node of machine.nodes) {
      const plugged = pluggedOn(machine, node.id);
      lines.push(`node ${node.id} cpus:${node.cpus.map((cpu) => ` ${cpu}`).join('')}`);
      lines.push(`node ${node.id} size: ${Math.floor((node.bootBytes + plugged) / MiB)} MB`);
      if (this.#dialect === 'qemu') lines.push(`node ${node.id} plugged: ${Math.floor(plugged / MiB)} MB`);
    }
    return `${lines.join('\n')}\n`;
  }

  // ── Memory in general ────────────────────────────────────────────────────────────────────────────────────────────

  /** Columns as QEMU prints them; the offset is where a block begins in the space of all blocks. */
  #ramblock(): string {
    const row = (name: string, page: string, ...rest: readonly string[]): string =>
      `${name.padStart(24)} ${page.padStart(8)}  ${rest.map((cell) => cell.padStart(18)).join(' ')}\n`;
    const number = (n: number): string => `0x${hex16(n)}`;
    let offset = 0;
    const lines = this.#machine.ramBlocks
      .map(({ id, bytes }) => {
        const line = row(id, '4 KiB', number(offset), number(bytes), number(bytes));
        offset += bytes;
        return { line, bytes };
      })
      .toSorted((a, b) => b.bytes - a.bytes);
    return row('Block Name', 'PSize', 'Offset', 'Used', 'Total') + lines.map((l) => l.line).join('');
  }

  #mtree(flat: boolean): string {
    const rows = this.#machine.flatView.map(
      (r) =>
        `  ${hex16(r.start)}-${hex16(r.last)} (prio 0, ${r.kind}): ${r.name}${r.offset > 0 ? ` @${hex16(r.offset)}` : ''}\n`,
    );
    const head = flat
      ? 'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'
      : 'address-space: memory\n  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n';
    return `${head}${rows.map((r) => (flat ? r : `  ${r}`)).join('')}\n`;
  }
}

const NO_BALLOON: MonitorError = {
  class: 'DeviceNotActive',
  desc: 'No balloon device has been activated',
};

function backend({ id, bytes }: { id: string; bytes: number }): string {
  return `memory backend: ${id}\n  size:  ${bytes}\n  merge: true\n  dump: true\n  prealloc: false\n  share: false\n  reserve: true\n  policy: default\n  host nodes: \n`;
}

function dimmText({ dimm, slot, memdev, hotplugged }: MonitoredDimm): string {
  const rows = [
    ['addr', `0x${dimm.addr.toString(16)}`],
    ['slot', slot],
    ['node', dimm.node],
    ['size', dimm.bytes],
    ['memdev', `/objects/${memdev}`],
    ['hotplugged', hotplugged],
    ['hotpluggable', true],
  ];
  return `Memory device [dimm]: "${dimm.id}"\n${rows.map(([k, v]) => `  ${k}: ${v}\n`).join('')}`;
}

/** `first,a=b,c=d`. */
function properties(list: string, first: string): Properties {
  return Object.fromEntries(
    list.split(',').map((part, i) => {
      const at = part.indexOf('=');
      if (at >= 0) return [part.slice(0, at), part.slice(at + 1)];
      return i === 0 ? [first, part] : [part, 'on'];
    }),
  );
}

function outcome(done: Result<void, MonitorError>): string {
  return done.ok ? '' : failed(done.error);
}

function failed(error: MonitorError): string {
  return `Error: ${error.desc}\n`;
}

/** Splits a line at blanks; quotes keep blanks together, and stay where a word is JSON. */
function words(line: string): string[] {
  const json = /^\s*qom-set\s+-j\s/.test(line);
  return [...line.matchAll(/"([^"]*)"|(\S+)/g)].map((m) => (json ? m[0] : (m[1] ?? m[2])));
}

/** A size with suffix, a number, a switch, or text. */
function plainValue(text: string): QomValue | null {
  if (text === 'on' || text === 'off') return text === 'on';
  if (/^-?\d+$/.test(text) || /^0x[0-9a-f]+$/i.test(text)) return Number(text);
  const size = parseSize(text);
  return size.ok ? size.value : text;
}

function jsonValue(text: string): QomValue | null {
  try {
    return JSON.parse(text) as QomValue;
  } catch {
    return null;
  }
}
