/**
 * The machine protocol (QMP): greeting, capabilities, commands and events, in QEMU 7.2's forms. One object per
 * connection; whoever has the socket feeds it characters and sends what it returns.
 */
import { err, ok, type Result } from '@ebb/machine';
import { balloonActual, setBalloon } from './balloon.ts';
import { Hmp, type Dialect } from './hmp.ts';
import { deviceAdd, deviceDel, objectAdd, objectDel } from './hotplug.ts';
import { JsonStream } from './json-stream.ts';
import {
  baseMemory,
  byAddress,
  pluggedMemory,
  type Machine,
  type MonitoredDimm,
  type MonitoredMemoryDevice,
} from './machine.ts';
import { generic, qomGet, qomList, qomSet, type MonitorError, type QomValue } from './qom.ts';

type Args = Readonly<Record<string, unknown>>;
type Answer = Result<unknown, MonitorError>;

/** What a parameter must be. */
type Kind = 'string' | 'integer' | 'any';

interface Command {
  readonly required: Readonly<Record<string, Kind>>;
  readonly optional?: Readonly<Record<string, Kind>>;
  run(args: Args): Answer;
}

export interface QmpOptions {
  readonly machine: Machine;
  readonly dialect?: Dialect;
  readonly version: string;
}

export class QmpConnection {
  readonly #machine: Machine;
  readonly #hmp: Hmp;
  readonly #version: string;
  readonly #stream = new JsonStream();
  readonly #commands: ReadonlyMap<string, Command>;
  /** Capabilities have been negotiated: commands are taken and events sent. */
  negotiated = false;

  constructor(options: QmpOptions) {
    this.#machine = options.machine;
    this.#hmp = new Hmp(options.machine, options.dialect);
    this.#version = options.version;
    this.#commands = new Map(Object.entries(this.#table()));
  }

  /** What a client is told when it connects. */
  greeting(): string {
    return line({ QMP: { version: this.#qemuVersion(), capabilities: [] } });
  }

  #qemuVersion(): object {
    return { qemu: { micro: 22, minor: 2, major: 7 }, package: `Ebb ${this.#version}` };
  }

  /** Takes characters; the answers to what is complete. */
  feed(text: string): string {
    return this.#stream
      .feed(text)
      .map((piece) =>
        piece.kind === 'value'
          ? this.#value(piece.text)
          : line({ error: generic(`JSON parse error, invalid keyword '${piece.text.slice(0, 64)}'`) }),
      )
      .join('');
  }

  #value(text: string): string {
    let request: unknown;
    try {
      request = JSON.parse(text);
    } catch {
      return line({ error: generic('JSON parse error, expecting value') });
    }
    if (typeof request !== 'object' || request === null || Array.isArray(request))
      return line({ error: generic('QMP input must be a JSON object') });
    const { execute, arguments: given = {}, id, ...rest } = request as Record<string, unknown>;
    const tag = id === undefined ? {} : { id };
    const [extra] = Object.keys(rest);
    const answer =
      extra === undefined
        ? this.#execute(execute, given)
        : err(generic(`QMP input member '${extra}' is unexpected`));
    return line(answer.ok ? { return: answer.value, ...tag } : { ...tag, error: answer.error });
  }

  #execute(name: unknown, given: unknown): Answer {
    if (name === undefined) return err(generic("QMP input lacks member 'execute'"));
    if (typeof name !== 'string') return err(generic("QMP input member 'execute' must be a string"));
    if (typeof given !== 'object' || given === null || Array.isArray(given))
      return err(generic("QMP input member 'arguments' must be an object"));
    if (name === 'qmp_capabilities') {
      if (this.negotiated)
        return err({
          class: 'CommandNotFound',
          desc: 'Capabilities negotiation is already complete, command ignored',
        });
      this.negotiated = true;
      return ok({});
    }
    if (!this.negotiated)
      return err({
        class: 'CommandNotFound',
        desc: "Expecting capabilities negotiation with 'qmp_capabilities'",
      });
    const command = this.#commands.get(name);
    if (command === undefined)
      return err({ class: 'CommandNotFound', desc: `The command ${name} has not been found` });
    const wrong = judge(command, given as Args);
    return wrong === null ? command.run(given as Args) : err(generic(wrong));
  }

  #table(): Record<string, Command> {
    const machine = this.#machine;
    const none = { required: {} };
    return {
      'query-version': { ...none, run: () => ok(this.#qemuVersion()) },
      'query-commands': {
        ...none,
        run: () => ok([...this.#commands.keys(), 'qmp_capabilities'].map((name) => ({ name }))),
      },
      'query-name': { ...none, run: () => ok({ name: machine.name }) },
      'query-status': {
        ...none,
        run: () =>
          ok({
            status: machine.running ? 'running' : 'paused',
            singlestep: false,
            running: machine.running,
          }),
      },
      stop: {
        ...none,
        run: () => {
          machine.running = false;
          return ok({});
        },
      },
      cont: {
        ...none,
        run: () => {
          machine.running = true;
          return ok({});
        },
      },
      system_reset: {
        ...none,
        run: () => {
          machine.systemReset();
          return ok({});
        },
      },
      quit: {
        ...none,
        run: () => {
          machine.quit();
          return ok({});
        },
      },
      'query-memory-devices': {
        ...none,
        run: () => ok(byAddress(machine).map((d) => ('dimm' in d ? dimmInfo(d) : memoryDeviceInfo(d)))),
      },
      'query-acpi-ospm-status': {
        ...none,
        run: () =>
          ok(
            (machine.slots?.status ?? []).map(({ slot, dimm, ostEvent, ostStatus }) => ({
              ...(dimm === null ? {} : { device: dimm.id }),
              slot: String(slot),
              'slot-type': 'DIMM',
              source: ostEvent,
              status: ostStatus,
            })),
          ),
      },
      'query-memory-size-summary': {
        ...none,
        run: () => ok({ 'base-memory': baseMemory(machine), 'plugged-memory': pluggedMemory(machine) }),
      },
      'query-memdev': {
        ...none,
        run: () =>
          ok(
            machine.backends.map(({ id, bytes }) => ({
              share: false,
              reserve: true,
              prealloc: false,
              'host-nodes': [],
              size: bytes,
              merge: true,
              dump: true,
              policy: 'default',
              id,
            })),
          ),
      },
      'qom-get': {
        required: { path: 'string', property: 'string' },
        run: (args) => qomGet(machine, args['path'] as string, args['property'] as string),
      },
      'qom-set': {
        required: { path: 'string', property: 'string', value: 'any' },
        run: (args) => {
          const done = qomSet(
            machine,
            args['path'] as string,
            args['property'] as string,
            args['value'] as QomValue,
          );
          return done.ok ? ok({}) : done;
        },
      },
      'qom-list': { required: { path: 'string' }, run: (args) => qomList(machine, args['path'] as string) },
      balloon: {
        required: { value: 'integer' },
        run: (args) => {
          const wrong = setBalloon(machine, args['value'] as number);
          return wrong === null ? ok({}) : err(wrong);
        },
      },
      'query-balloon': {
        ...none,
        run: () =>
          machine.balloon === null
            ? err({ class: 'DeviceNotActive', desc: 'No balloon device has been activated' })
            : ok({ actual: balloonActual(machine, machine.balloon.device.actual) }),
      },
      device_del: {
        required: { id: 'string' },
        run: (args) => empty(deviceDel(machine, args['id'] as string)),
      },
      device_add: {
        required: { driver: 'string' },
        optional: { id: 'string', memdev: 'string', node: 'integer', addr: 'integer', bus: 'string' },
        run: (args) => empty(deviceAdd(machine, args)),
      },
      'object-add': {
        required: { 'qom-type': 'string', id: 'string' },
        optional: { size: 'integer', share: 'any', merge: 'any', prealloc: 'any', 'mem-path': 'string' },
        run: (args) => empty(objectAdd(machine, args)),
      },
      'object-del': {
        required: { id: 'string' },
        run: (args) => empty(objectDel(machine, args['id'] as string)),
      },
      'human-monitor-command': {
        required: { 'command-line': 'string' },
        optional: { 'cpu-index': 'integer' },
        run: (args) => ok(this.#hmp.execute(args['command-line'] as string).replaceAll('\n', '\r\n')),
      },
    };
  }
}

/** QMP's answer to what returns nothing. */
function empty(done: Result<void, MonitorError>): Answer {
  return done.ok ? ok({}) : done;
}

function memoryDeviceInfo({ device, memdev }: MonitoredMemoryDevice): object {
  return {
    type: 'virtio-mem',
    data: {
      memdev: `/objects/${memdev}`,
      memaddr: device.addr,
      'block-size': device.blockBytes,
      size: device.pluggedBytes,
      node: device.node,
      'max-size': device.regionBytes,
      'requested-size': device.requestedBytes,
      id: device.id,
    },
  };
}

function dimmInfo({ dimm, slot, memdev, hotplugged }: MonitoredDimm): object {
  return {
    type: 'dimm',
    data: {
      memdev: `/objects/${memdev}`,
      hotplugged,
      addr: dimm.addr,
      hotpluggable: true,
      size: dimm.bytes,
      slot,
      node: dimm.node,
      id: dimm.id,
    },
  };
}

/** What is wrong with the arguments, in QEMU's words; null if nothing is. */
function judge(command: Command, given: Args): string | null {
  const known = { ...command.required, ...command.optional };
  for (const [name, kind] of Object.entries(known)) {
    const value = given[name];
    if (value === undefined) {
      if (Object.hasOwn(command.required, name)) return `Parameter '${name}' is missing`;
      continue;
    }
    if (kind === 'string' && typeof value !== 'string')
      return `Invalid parameter type for '${name}', expected: string`;
    if (kind === 'integer' && !Number.isInteger(value))
      return `Invalid parameter type for '${name}', expected: integer`;
  }
  for (const name of Object.keys(given))
    if (!Object.hasOwn(known, name)) return `Parameter '${name}' is unexpected`;
  return null;
}

/** One line of output, as QEMU ends it. */
export function line(value: object): string {
  return `${JSON.stringify(value)}\r\n`;
}
