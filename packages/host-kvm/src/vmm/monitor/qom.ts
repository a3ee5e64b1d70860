/** The object tree as monitors reach it: `/machine/peripheral/ID` and `/objects/ID`, with QEMU's names and errors. */
import { err, ok, type Result } from '@ebb/machine';
import { judgeRequested } from '../../devices/memory-figures.ts';
import type { Machine, MonitoredDimm } from './machine.ts';

export interface MonitorError {
  readonly class: 'GenericError' | 'CommandNotFound' | 'DeviceNotActive' | 'DeviceNotFound' | 'KVMMissingCap';
  readonly desc: string;
}

export type QomValue = number | boolean | string | { readonly [key: string]: QomValue };

interface Property {
  readonly name: string;
  readonly type: string;
  get(): QomValue;
  /** Why the value is refused, or empty. */
  set?(value: QomValue): string;
}

/** Type whose property names errors quote. */
interface QomObject {
  readonly type: string;
  readonly properties: readonly Property[];
}

export function generic(desc: string): MonitorError {
  return { class: 'GenericError', desc };
}

const wrongType = (name: string): string => `Invalid parameter type for '${name}', expected: integer`;

function objectAt(machine: Machine, path: string): QomObject | null {
  const [, root, ...rest] = path.split('/');
  const id = root === 'objects' ? rest[0] : rest[0] === 'peripheral' ? rest[1] : undefined;
  const tooDeep = rest.length !== (root === 'objects' ? 1 : 2);
  if (id === undefined || tooDeep) return null;
  if (root === 'objects') {
    const backend = machine.backends.find((b) => b.id === id);
    if (backend === undefined) return null;
    return {
      type: 'memory-backend-ram',
      properties: [
        { name: 'type', type: 'string', get: () => 'memory-backend-ram' },
        { name: 'size', type: 'int', get: () => backend.bytes },
        { name: 'merge', type: 'bool', get: () => true },
        { name: 'dump', type: 'bool', get: () => true },
        { name: 'prealloc', type: 'bool', get: () => false },
        { name: 'share', type: 'bool', get: () => false },
        { name: 'reserve', type: 'bool', get: () => true },
      ],
    };
  }
  if (root !== 'machine') return null;
  const entry = machine.memoryDevices.find(({ device }) => device.id === id);
  if (entry !== undefined) return memoryDeviceObject(entry.device, entry.memdev);
  const dimm = machine.slots?.dimms.find((d) => d.dimm.id === id);
  if (dimm !== undefined) return dimmObject(dimm);
  if (machine.balloon?.id === id) return balloonObject(machine.balloon.device);
  return null;
}

function memoryDeviceObject(device: Machine['memoryDevices'][number]['device'], memdev: string): QomObject {
  return {
    type: 'virtio-mem',
    properties: [
      { name: 'type', type: 'string', get: () => 'virtio-mem-pci' },
      { name: 'realized', type: 'bool', get: () => true },
      { name: 'hotplugged', type: 'bool', get: () => false },
      { name: 'hotpluggable', type: 'bool', get: () => true },
      { name: 'memaddr', type: 'uint64', get: () => device.addr },
      { name: 'node', type: 'uint32', get: () => device.node },
      { name: 'memdev', type: 'link<memory-backend>', get: () => `/objects/${memdev}` },
      { name: 'size', type: 'size', get: () => device.pluggedBytes },
      {
        name: 'block-size',
        type: 'size',
        get: () => device.blockBytes,
        set: () => "'block-size' cannot be changed",
      },
      {
        name: 'requested-size',
        type: 'size',
        get: () => device.requestedBytes,
        set: (value) => {
          if (typeof value !== 'number') return wrongType('requested-size');
          const why = judgeRequested(device.regionBytes, device.blockBytes, value);
          if (why === '') device.setRequested(value);
          return why;
        },
      },
    ],
  };
}

function dimmObject({ dimm, slot, memdev, hotplugged }: MonitoredDimm): QomObject {
  return {
    type: 'pc-dimm',
    properties: [
      { name: 'type', type: 'string', get: () => 'pc-dimm' },
      { name: 'realized', type: 'bool', get: () => true },
      { name: 'hotplugged', type: 'bool', get: () => hotplugged },
      { name: 'hotpluggable', type: 'bool', get: () => true },
      { name: 'addr', type: 'uint64', get: () => dimm.addr },
      { name: 'slot', type: 'int32', get: () => slot },
      { name: 'node', type: 'uint32', get: () => dimm.node },
      { name: 'memdev', type: 'link<memory-backend>', get: () => `/objects/${memdev}` },
      { name: 'size', type: 'uint64', get: () => dimm.bytes },
    ],
  };
}

function balloonObject(device: NonNullable<Machine['balloon']>['device']): QomObject {
  return {
    type: 'virtio-balloon',
    properties: [
      { name: 'type', type: 'string', get: () => 'virtio-balloon-pci' },
      { name: 'realized', type: 'bool', get: () => true },
      {
        name: 'guest-stats',
        type: 'guest statistics',
        get: () => ({ stats: { ...device.stats }, 'last-update': device.counters.statsUpdates }),
      },
    ],
  };
}

export function qomGet(machine: Machine, path: string, name: string): Result<QomValue, MonitorError> {
  const found = find(machine, path, name);
  return found.ok ? ok(found.value.property.get()) : found;
}

export function qomSet(
  machine: Machine,
  path: string,
  name: string,
  value: QomValue,
): Result<void, MonitorError> {
  const found = find(machine, path, name);
  if (!found.ok) return found;
  const { object, property } = found.value;
  if (property.set === undefined) return err(generic(`Property '${object.type}.${name}' is not writable`));
  const why = property.set(value);
  return why === '' ? ok(undefined) : err(generic(why));
}

function find(
  machine: Machine,
  path: string,
  name: string,
): Result<{ object: QomObject; property: Property }, MonitorError> {
  const object = objectAt(machine, path);
  if (object === null) return err({ class: 'DeviceNotFound', desc: `Device '${path}' not found` });
  const property = object.properties.find((p) => p.name === name);
  if (property === undefined) return err(generic(`Property '${object.type}-pci.${name}' not found`));
  return ok({ object, property });
}

/** Names and types of what is at `path`. */
export function qomList(
  machine: Machine,
  path: string,
): Result<{ name: string; type: string }[], MonitorError> {
  const child = (id: string, type: string): { name: string; type: string } => ({
    name: id,
    type: `child<${type}>`,
  });
  const trimmed = path.replace(/\/+$/, '');
  switch (trimmed) {
    case '':
      return ok([child('machine', 'pc-machine'), child('objects', 'container')]);
    case '/objects':
      return ok(machine.backends.map((b) => child(b.id, 'memory-backend-ram')));
    case '/machine':
      return ok([child('peripheral', 'container')]);
    case '/machine/peripheral':
      return ok([
        ...machine.memoryDevices.map(({ device }) => child(device.id, 'virtio-mem-pci')),
        ...(machine.slots?.dimms ?? []).map(({ dimm }) => child(dimm.id, 'pc-dimm')),
        ...(machine.balloon === null ? [] : [child(machine.balloon.id, 'virtio-balloon-pci')]),
      ]);
    default: {
      const object = objectAt(machine, trimmed);
      if (object === null) return err({ class: 'DeviceNotFound', desc: `Device '${path}' not found` });
      return ok(object.properties.map(({ name, type }) => ({ name, type })));
    }
  }
}
