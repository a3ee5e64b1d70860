/**
 * Where a DIMM goes that somebody describes by properties, on a command line or to a monitor, and QEMU's words for why it
 * cannot (`hw/mem/pc-dimm.c`, `hw/mem/memory-device.c`).
 */
import { err, ok, parseSize, type Result } from '@ebb/machine';
import { DIMM_ALIGN, judgeDimm, type Dimm } from '../../devices/dimm-slots.ts';
import type { MonitoredBackend } from './machine.ts';

/** Properties as typed or as sent. */
export type Properties = Readonly<Record<string, unknown>>;

/** Bytes at guest-physical addresses. */
export interface Extent {
  readonly addr: number;
  readonly bytes: number;
}

/** What is there when a DIMM is to come. */
export interface DimmRoom {
  readonly backends: readonly MonitoredBackend[];
  /** Backends that nodes, memory devices and DIMMs are made of. */
  readonly busy: readonly (string | undefined)[];
  /** Nodes that the guest has, and slots in all and free. */
  readonly nodes: number;
  readonly slots: number;
  readonly freeSlots: number;
  /** Addresses for memory devices of any kind, and who is there. */
  readonly range: Extent;
  readonly taken: readonly (Extent & { readonly id: string })[];
  /** Names of other devices. */
  readonly ids: readonly string[];
}

/** Options that a DIMM has; `bus` means nothing here. */
const OPTIONS = ['driver', 'id', 'memdev', 'node', 'addr', 'bus'];

/** The first place in `range` where `bytes` fit beside what is `taken`, aligned as memory devices are; null if there is none. */
export function freeAddress(range: Extent, taken: readonly Extent[], bytes: number): number | null {
  let at = Math.ceil(range.addr / DIMM_ALIGN) * DIMM_ALIGN;
  for (const other of taken.toSorted((a, b) => a.addr - b.addr)) {
    if (at + bytes <= other.addr) break;
    at = Math.max(at, Math.ceil((other.addr + other.bytes) / DIMM_ALIGN) * DIMM_ALIGN);
  }
  return at + bytes <= range.addr + range.bytes ? at : null;
}

export const textOf = (value: unknown): string | undefined => (typeof value === 'string' ? value : undefined);

/** A number, decimal or hexadecimal, or a size with a suffix; undefined is neither. */
export function numberOf(value: unknown): number | undefined {
  if (typeof value === 'number') return value;
  if (typeof value !== 'string') return undefined;
  if (/^0x[0-9a-f]+$/i.test(value)) return Number(value);
  const size = parseSize(value);
  return size.ok ? size.value : undefined;
}

/** A number of bytes or things. */
export function isCount(n: number | undefined): boolean {
  return n !== undefined && Number.isSafeInteger(n) && n >= 0;
}

/** What is wrong with an id (`id_wellformed`), or nothing. */
export function judgeId(id: string): string {
  return /^[A-Za-z][\w.-]*$/.test(id) ? '' : "Parameter 'id' expects an identifier";
}

/** A property that the type does not have, in words, or nothing. */
export function judgeOptions(type: string, given: Properties, known: readonly string[]): string {
  const other = Object.keys(given).find((name) => !known.includes(name));
  return other === undefined ? '' : `Property '${type}.${other}' not found`;
}

/** The DIMM that the properties describe, with its place, and its backend; or why there can be none. */
export function placeDimm(
  given: Properties,
  room: DimmRoom,
): Result<{ readonly dimm: Dimm; readonly memdev: string }, string> {
  const unknown = judgeOptions('pc-dimm', given, OPTIONS);
  if (unknown !== '') return err(unknown);
  const wrong = ['node', 'addr'].find((name) => name in given && !isCount(numberOf(given[name])));
  if (wrong !== undefined) return err(`Invalid parameter type for '${wrong}', expected: integer`);
  const memdev = textOf(given['memdev']);
  if (memdev === undefined) return err("'memdev' property is not set");
  const backend = room.backends.find((b) => b.id === memdev);
  if (backend === undefined) return err(`Device '${memdev}' not found`);
  if (room.busy.includes(memdev)) return err(`can't use already busy memdev: ${memdev}`);
  const node = numberOf(given['node']) ?? 0;
  if (node >= room.nodes)
    return err(
      `'DIMM property node has value ${node}' which exceeds the number of numa nodes: ${room.nodes}`,
    );
  if (room.slots === 0) return err("no slots where allocated, please specify the 'slots' option");
  const { range, taken } = room;
  const { bytes } = backend;
  const used = taken.reduce((sum, t) => sum + t.bytes, 0);
  const addr = numberOf(given['addr']) ?? freeAddress(range, taken, bytes);
  if (used + bytes > range.bytes || addr === null)
    return err(
      `not enough space, currently 0x${used.toString(16)} in use of total space for memory devices 0x${range.bytes.toString(16)}`,
    );
  if (addr < range.addr || addr + bytes > range.addr + range.bytes)
    return err("can't add memory device beyond the address space for memory devices");
  const id = textOf(given['id']) ?? unusedId(room);
  const why = judgeId(id);
  if (why !== '') return err(why);
  if (room.ids.includes(id)) return err(`Duplicate device ID '${id}'`);
  const dimm = { id, addr, bytes, node };
  const judged = judgeDimm(dimm, taken, room.freeSlots > 0);
  return judged === '' ? ok({ dimm, memdev }) : err(judged);
}

/** The first of `dimm0`, `dimm1` … that nobody has. */
function unusedId({ taken, ids }: DimmRoom): string {
  const names = new Set([...ids, ...taken.map((t) => t.id)]);
  let n = 0;
  while (names.has(`dimm${n}`)) n++;
  return `dimm${n}`;
}
