/** Where a command line's memory goes: nodes, regions of memory devices, DIMMs; and QEMU's words for what does not fit. */
import {
  judgeMemoryDevice,
  placeDimm,
  type Dimm,
  type Extent,
  type MemoryProfile,
  type MonitoredNode,
} from '@ebb/host-kvm';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import type { MemoryDeviceSpec } from '../run/spec.ts';
import { UserError } from '../trace/trace.ts';
import { onlyKnown, size, whole, type Fields } from './option-fields.ts';

/** What `-device virtio-mem-pci` takes; `bus` and the like mean nothing here. */
const MEMORY_DEVICE = [
  'driver',
  'id',
  'bus',
  'addr',
  'memdev',
  'node',
  'memaddr',
  'requested-size',
  'block-size',
  'unplugged-inaccessible',
  'dynamic-memslots',
  'prealloc',
];

/** `0`, `0-1`, `0,2`. */
function cpuList(text: string | undefined, vcpus: number): number[] {
  if (text === undefined) return [];
  return text.split(/[,:]/).flatMap((part) => {
    const [from, to = from] = part.split('-').map((n) => whole('numa cpus', n));
    if (from > to || to >= vcpus)
      throw new UserError(`-numa cpus=${text}: CPU index (${to}) should be smaller than maxcpus (${vcpus})`);
    return Array.from({ length: to - from + 1 }, (_, i) => from + i);
  });
}

/** Nodes with their boot memory and CPUs. */
export function placeNodes(
  numa: readonly Fields[],
  backends: readonly { readonly id: string; readonly bytes: number }[],
  bootBytes: number,
  vcpus: number,
): MonitoredNode[] {
  const all = Array.from({ length: vcpus }, (_, cpu) => cpu);
  if (numa.length === 0) return [{ id: 0, cpus: all, bootBytes }];
  if (numa.length > 2) throw new UserError(`-numa: ${numa.length} nodes; this guest has at most 2`);
  const taken = new Set<number>();
  const nodes = numa.map((f, i): MonitoredNode => {
    const id = f.has('nodeid') ? whole('numa nodeid', f.get('nodeid')) : i;
    if (id !== i) throw new UserError(`-numa nodeid=${id}: number the nodes from 0 in order`);
    const cpus = cpuList(f.get('cpus'), vcpus);
    for (const cpu of cpus) {
      if (taken.has(cpu)) throw new UserError(`-numa nodeid=${id}: CPU ${cpu} is on another node already`);
      taken.add(cpu);
    }
    const memdev = f.get('memdev');
    const backend = backends.find((b) => b.id === memdev);
    if (memdev !== undefined && backend === undefined)
      throw new UserError(`-numa memdev=${memdev}: object '${memdev}' not found`);
    const mem = f.get('mem');
    const share = mem === undefined ? bootBytes / numa.length : size('numa mem', mem, true);
    return { id, cpus, bootBytes: backend?.bytes ?? share, memdev };
  });
  const sum = nodes.reduce((total, n) => total + n.bootBytes, 0);
  if (sum !== bootBytes)
    throw new UserError(
      `-numa: total memory for NUMA nodes (0x${sum.toString(16)}) should equal RAM size (0x${bootBytes.toString(16)})`,
    );
  // CPUs that no node names belong to the first.
  const rest = all.filter((cpu) => !taken.has(cpu));
  return nodes.map((n, i) => (i === 0 ? { ...n, cpus: [...n.cpus, ...rest].toSorted((a, b) => a - b) } : n));
}

/** Regions of virtio-mem devices, one after the other. */
export function placeDevices(
  given: readonly Fields[],
  backends: readonly { readonly id: string; readonly bytes: number; readonly boot: number }[],
  where: { readonly isRfc: boolean; readonly from: number; readonly room: number; readonly nodes: number },
): (MemoryDeviceSpec & { readonly memdev: string })[] {
  const used = new Set<string>();
  let next = where.from;
  let sum = 0;
  return given.map((f, i) => {
    const id = f.get('id') ?? `vm${i}`;
    const option = `device virtio-mem-pci,id=${id}`;
    onlyKnown(option, f, MEMORY_DEVICE);
    const inaccessible = f.get('unplugged-inaccessible') ?? 'auto';
    if (!['on', 'off', 'auto'].includes(inaccessible))
      throw new UserError(
        `-${option}: Parameter 'unplugged-inaccessible' does not accept value '${inaccessible}'`,
      );
    if (used.has(`device ${id}`)) throw new UserError(`-${option}: Duplicate device ID '${id}'`);
    const memdev = f.get('memdev');
    if (memdev === undefined) throw new UserError(`-${option}: 'memdev' property is not set`);
    const backend = backends.find((b) => b.id === memdev);
    if (backend === undefined) throw new UserError(`-${option}: Device '${memdev}' not found`);
    if (used.has(`memdev ${memdev}`))
      throw new UserError(`-${option}: can't use already busy memdev: ${memdev}`);
    used.add(`device ${id}`);
    used.add(`memdev ${memdev}`);
    const node = f.has('node') ? whole(`${option} node`, f.get('node')) : 0;
    if (node >= where.nodes)
      throw new UserError(
        `-${option}: 'node' property has value '${node}', which exceeds the number of numa nodes: ${where.nodes}`,
      );
    const blockBytes = f.has('block-size') ? size(`${option} block-size`, f.get('block-size')) : 2 * MiB;
    const addr = f.has('memaddr') ? Number(f.get('memaddr')) : Math.ceil(next / blockBytes) * blockBytes;
    if (addr < where.from || addr < next)
      throw new UserError(
        `-${option}: address range conflicts with memory that ends at 0x${next.toString(16)}`,
      );
    const requestedBytes = where.isRfc
      ? backend.boot
      : f.has('requested-size')
        ? size(`${option} requested-size`, f.get('requested-size'))
        : 0;
    const profile: MemoryProfile = where.isRfc
      ? 'rfc-write-protect'
      : inaccessible === 'on'
        ? 'inaccessible'
        : 'qemu';
    const spec = { id, addr, regionBytes: backend.bytes, blockBytes, node, requestedBytes, profile, memdev };
    const why = judgeMemoryDevice({ ...spec, region: { pageBytes: PAGE_SIZE } });
    if (why !== '') throw new UserError(`-${option}: ${why}`);
    sum += backend.bytes;
    if (where.room > 0 && sum > where.room)
      throw new UserError(
        `-${option}: not enough space, currently 0x${(sum - backend.bytes).toString(16)} in use of total space for memory devices 0x${where.room.toString(16)}`,
      );
    if (where.room === 0)
      throw new UserError(`-${option}: memory devices are not supported without -m …,maxmem=SIZE`);
    next = addr + backend.bytes;
    return spec;
  });
}

/** DIMMs that are in from the start. */
export function placeDimms(
  given: readonly Fields[],
  backends: readonly { readonly id: string; readonly bytes: number }[],
  where: {
    readonly devices: readonly (MemoryDeviceSpec & { readonly memdev: string })[];
    readonly range: Extent;
    readonly slots: number;
    readonly nodes: readonly MonitoredNode[];
    readonly balloon: string | null;
  },
): { readonly dimm: Dimm; readonly memdev: string }[] {
  const placed: { readonly dimm: Dimm; readonly memdev: string }[] = [];
  for (const f of given) {
    const next = placeDimm(Object.fromEntries(f), {
      backends,
      busy: [...where.nodes, ...where.devices, ...placed].map((user) => user.memdev),
      nodes: where.nodes.length,
      slots: where.slots,
      freeSlots: where.slots - placed.length,
      range: where.range,
      taken: [
        ...where.devices.map((d) => ({ id: d.id, addr: d.addr, bytes: d.regionBytes })),
        ...placed.map((p) => p.dimm),
      ],
      ids: where.balloon === null ? [] : [where.balloon],
    });
    if (!next.ok)
      throw new UserError(`-device pc-dimm${f.has('id') ? `,id=${f.get('id')}` : ''}: ${next.error}`);
    placed.push(next.value);
  }
  return placed;
}
