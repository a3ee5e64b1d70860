/**
 * Memory that a monitor adds while the machine runs: backends (`object_add`) and DIMMs on them (`device_add`, `device_del`),
 * in QEMU's words. What a guest does with them is its own matter: a removal is a request.
 */
import { err, ok, type Result } from '@ebb/machine';
import type { Machine } from './machine.ts';
import {
  isCount,
  judgeId,
  judgeOptions,
  numberOf,
  placeDimm,
  textOf,
  type Properties,
} from './place-dimm.ts';
import { generic, type MonitorError } from './qom.ts';

type Done = Result<void, MonitorError>;

/** Options that a backend has; but for the size they mean nothing here. */
const BACKEND_OPTIONS = [
  'qom-type',
  'id',
  'size',
  'share',
  'merge',
  'dump',
  'prealloc',
  'reserve',
  'mem-path',
];

export function objectAdd(machine: Machine, given: Properties): Done {
  const type = textOf(given['qom-type']);
  const id = textOf(given['id']);
  if (type === undefined) return err(generic("Parameter 'qom-type' is missing"));
  if (id === undefined) return err(generic("Parameter 'id' is missing"));
  if (!/^memory-backend-(ram|file|memfd)$/.test(type))
    return err(generic(`Parameter 'qom-type' does not accept value '${type}'`));
  const why = judgeOptions(type, given, BACKEND_OPTIONS) || judgeId(id);
  if (why !== '') return err(generic(why));
  if (machine.backends.some((b) => b.id === id))
    return err(generic(`attempt to add duplicate property '${id}' to object (type 'container')`));
  const bytes = numberOf(given['size'] ?? 0);
  if (bytes === undefined)
    return err(generic("Parameter 'size' expects a size, in bytes or with a suffix K, M, G or T"));
  if (!isCount(bytes) || bytes === 0) return err(generic("can't create backend with size 0"));
  machine.addBackend({ id, bytes });
  return ok(undefined);
}

export function objectDel(machine: Machine, id: string): Done {
  if (!machine.backends.some((b) => b.id === id)) return err(generic(`object '${id}' not found`));
  if (busyBackends(machine).includes(id)) return err(generic(`object '${id}' is in use, can not be deleted`));
  machine.removeBackend(id);
  return ok(undefined);
}

function busyBackends(machine: Machine): (string | undefined)[] {
  const users = [...machine.nodes, ...machine.memoryDevices, ...(machine.slots?.dimms ?? [])];
  return users.map((user) => user.memdev);
}

export function deviceAdd(machine: Machine, given: Properties): Done {
  const driver = textOf(given['driver']);
  if (driver === undefined) return err(generic("Parameter 'driver' is missing"));
  if (driver.startsWith('virtio-'))
    return err(generic(`Device '${driver}' can not be added here while the machine runs; give it at start`));
  if (driver !== 'pc-dimm') return err(generic(`'${driver}' is not a valid device model name`));
  const { slots } = machine;
  const status = slots?.status ?? [];
  const placed = placeDimm(given, {
    backends: machine.backends,
    busy: busyBackends(machine),
    nodes: machine.nodes.length,
    slots: status.length,
    freeSlots: status.filter((s) => s.dimm === null).length,
    range: slots?.range ?? { addr: 0, bytes: 0 },
    taken: [
      ...machine.memoryDevices.map(({ device: d }) => ({ id: d.id, addr: d.addr, bytes: d.regionBytes })),
      ...(slots?.dimms ?? []).map(({ dimm }) => dimm),
    ],
    ids: machine.balloon === null ? [] : [machine.balloon.id],
  });
  if (!placed.ok) return err(generic(placed.error));
  const why = slots?.plug(placed.value.dimm, placed.value.memdev) ?? '';
  return why === '' ? ok(undefined) : err(generic(why));
}

/** Asks the guest to let a DIMM go. Nothing else can be pulled out of a running machine. */
export function deviceDel(machine: Machine, id: string): Done {
  if (machine.slots?.dimms.some(({ dimm }) => dimm.id === id) === true) {
    const why = machine.slots.requestUnplug(id);
    return why === '' ? ok(undefined) : err({ class: 'DeviceNotFound', desc: why });
  }
  if (machine.memoryDevices.some(({ device }) => device.id === id))
    return err(generic('virtio based memory devices cannot be unplugged.'));
  if (machine.balloon?.id === id)
    return err(generic(`Device '${id}' can not be removed here: its guest holds its pages`));
  return err({ class: 'DeviceNotFound', desc: `Device '${id}' not found` });
}
