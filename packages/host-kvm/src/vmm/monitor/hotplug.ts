/**
 * Memory that a monitor adds while the machine runs: backends (`object_add`) and DIMMs on them (`device_add`, `device_del`),
 * judged in QEMU's words (`hw/mem/pc-dimm.c`, `hw/mem/memory-device.c`). What a guest does with them is its own matter: a
 * removal is a request.
 */
import { err, MiB, ok, parseSize, type Result } from '@ebb/machine';
import type { Machine } from './machine.ts';
import { generic, type MonitorError } from './qom.ts';

/** Properties as typed or as sent. */
export type Properties = Readonly<Record<string, unknown>>;
type Done = Result<void, MonitorError>;

/** QEMU's alignment of memory devices on x86. */
const ALIGN: number = 2 * MiB;

/** Bytes at guest-physical addresses. */
export interface Extent {
  readonly addr: number;
  readonly bytes: number;
}

/** The first place in `range` where `bytes` fit beside what is `taken`, aligned as memory devices are; null if there is none. */
export function freeAddress(range: Extent, taken: readonly Extent[], bytes: number): number | null {
  let at = Math.ceil(range.addr / ALIGN) * ALIGN;
  for (const other of taken.toSorted((a, b) => a.addr - b.addr)) {
    if (at + bytes <= other.addr) break;
    at = Math.max(at, Math.ceil((other.addr + other.bytes) / ALIGN) * ALIGN);
  }
  return at + bytes <= range.addr + range.bytes ? at : null;
}

const text = (value: unknown): string | undefined => (typeof value === 'string' ? value : undefined);

/** A number, decimal or hexadecimal, or a size with a suffix. */
function number(value: unknown): number | undefined {
  if (typeof value === 'number') return value;
  if (typeof value === 'string' && /^0x[0-9a-f]+$/i.test(value)) return Number(value);
  const size = typeof value === 'string' ? parseSize(value) : undefined;
  return size?.ok === true ? size.value : undefined;
}

/** Options that a type knows; `bus` and the like mean nothing here. */
const OBJECT_OPTIONS = [
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
const DIMM_OPTIONS = ['driver', 'id', 'memdev', 'node', 'addr', 'bus'];

function unknownOption(type: string, given: Properties, known: readonly string[]): MonitorError | null {
  const other = Object.keys(given).find((name) => !known.includes(name));
  return other === undefined ? null : generic(`Property '${type}.${other}' not found`);
}

const isCount = (n: number | undefined): boolean => n !== undefined && Number.isSafeInteger(n) && n >= 0;

/** What QEMU takes as an id (`id_wellformed`). */
const isIdentifier = (id: string): boolean => /^[A-Za-z][\w.-]*$/.test(id);
const BAD_ID: MonitorError = generic("Parameter 'id' expects an identifier");

export function objectAdd(machine: Machine, given: Properties): Done {
  const type = text(given['qom-type']);
  const id = text(given['id']);
  if (type === undefined) return err(generic("Parameter 'qom-type' is missing"));
  if (id === undefined) return err(generic("Parameter 'id' is missing"));
  if (!/^memory-backend-(ram|file|memfd)$/.test(type))
    return err(generic(`Parameter 'qom-type' does not accept value '${type}'`));
  const unknown = unknownOption(type, given, OBJECT_OPTIONS);
  if (unknown !== null) return err(unknown);
  if (!isIdentifier(id)) return err(BAD_ID);
  if (machine.backends.some((b) => b.id === id))
    return err(generic(`attempt to add duplicate property '${id}' to object (type 'container')`));
  const bytes = number(given['size'] ?? 0);
  if (bytes === undefined)
    return err(generic("Parameter 'size' expects a size, in bytes or with a suffix K, M, G or T"));
  if (!isCount(bytes) || bytes === 0) return err(generic("can't create backend with size 0"));
  machine.addBackend({ id, bytes });
  return ok(undefined);
}

export function objectDel(machine: Machine, id: string): Done {
  if (!machine.backends.some((b) => b.id === id)) return err(generic(`object '${id}' not found`));
  if (isBusy(machine, id)) return err(generic(`object '${id}' is in use, can not be deleted`));
  machine.removeBackend(id);
  return ok(undefined);
}

function isBusy(machine: Machine, memdev: string): boolean {
  return [...machine.nodes, ...machine.memoryDevices, ...(machine.slots?.dimms ?? [])].some(
    (user) => user.memdev === memdev,
  );
}

export function deviceAdd(machine: Machine, given: Properties): Done {
  const driver = text(given['driver']);
  if (driver === undefined) return err(generic("Parameter 'driver' is missing"));
  if (driver.startsWith('virtio-'))
    return err(generic(`Device '${driver}' can not be added here while the machine runs; give it at start`));
  if (driver !== 'pc-dimm') return err(generic(`'${driver}' is not a valid device model name`));
  const unknown = unknownOption(driver, given, DIMM_OPTIONS);
  if (unknown !== null) return err(unknown);
  const wrong = ['node', 'addr'].find((name) => name in given && !isCount(number(given[name])));
  if (wrong !== undefined) return err(generic(`Invalid parameter type for '${wrong}', expected: integer`));
  const { slots } = machine;
  const memdev = text(given['memdev']);
  const backend = machine.backends.find((b) => b.id === memdev);
  if (memdev === undefined) return err(generic("'memdev' property is not set"));
  if (backend === undefined) return err(generic(`Device '${memdev}' not found`));
  if (isBusy(machine, memdev)) return err(generic(`can't use already busy memdev: ${memdev}`));
  const node = number(given['node']) ?? 0;
  if (node >= machine.nodes.length)
    return err(
      generic(
        `'DIMM property node has value ${node}' which exceeds the number of numa nodes: ${machine.nodes.length}`,
      ),
    );
  if (slots === null) return err(generic("no slots where allocated, please specify the 'slots' option"));
  const taken = [
    ...machine.memoryDevices.map(({ device }) => ({ addr: device.addr, bytes: device.regionBytes })),
    ...slots.dimms.map(({ dimm }) => dimm),
  ];
  const used = taken.reduce((sum, t) => sum + t.bytes, 0);
  const { range } = slots;
  const noSpace = `not enough space, currently 0x${used.toString(16)} in use of total space for memory devices 0x${range.bytes.toString(16)}`;
  if (used + backend.bytes > range.bytes) return err(generic(noSpace));
  const addr = number(given['addr']) ?? freeAddress(range, taken, backend.bytes);
  if (addr === null) return err(generic(noSpace));
  if (addr < range.addr || addr + backend.bytes > range.addr + range.bytes)
    return err(generic("can't add memory device beyond the address space for memory devices"));
  const hit = machine.memoryDevices.find(
    ({ device: d }) => addr < d.addr + d.regionBytes && d.addr < addr + backend.bytes,
  );
  if (hit !== undefined)
    return err(generic(`address range conflicts with memory device id='${hit.device.id}'`));
  const id = text(given['id']) ?? `dimm${slots.dimms.length}`;
  if (!isIdentifier(id)) return err(BAD_ID);
  if (machine.memoryDevices.some(({ device }) => device.id === id) || machine.balloon?.id === id)
    return err(generic(`Duplicate device ID '${id}'`));
  const why = slots.plug({ id, addr, bytes: backend.bytes, node }, memdev);
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
