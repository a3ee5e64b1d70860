/**
 * A machine as QEMU's command line describes it, in upstream's dialect and in that of the 2017 RFC. Options that mean
 * nothing here (accelerators, kernels, displays) are accepted and named once.
 */
import { LINUX_HOTPLUG, ZONE_DMA32, type GuestConfig } from '@ebb/guest-kernel';
import { judgeMemoryDevice, type Dialect, type MemoryProfile, type MonitoredNode } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE, parseSize } from '@ebb/machine';
import { VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_STATS_VQ } from '@ebb/virtio/uapi';
import { pcMemory } from '../memory-device/pc-memory.ts';
import type { MemoryDeviceSpec, VmSpec } from '../run/spec.ts';
import { UserError } from '../trace/trace.ts';

/** Where a monitor listens. */
interface MonitorPlace {
  readonly mode: 'readline' | 'control';
  /** Path of a unix socket, or standard input and output. */
  readonly socket: string | null;
}

export interface VmDescription {
  readonly name: string;
  readonly dialect: Dialect;
  readonly nodes: readonly MonitoredNode[];
  readonly backends: readonly { readonly id: string; readonly bytes: number }[];
  readonly devices: readonly (MemoryDeviceSpec & { readonly memdev: string })[];
  readonly balloon: string | null;
  readonly monitors: readonly MonitorPlace[];
  /** Standard input is nobody's: `-monitor none`. */
  readonly noStdio: boolean;
  /** Options that were accepted and mean nothing here. */
  readonly ignored: readonly string[];
  readonly vcpus: number;
  readonly vm: VmSpec;
}

/** Options without effect here, and how many values each has. */
const IGNORED: Readonly<Record<string, 0 | 1>> = {
  'enable-kvm': 0,
  nodefaults: 0,
  nographic: 0,
  'no-reboot': 0,
  'no-user-config': 0,
  snapshot: 0,
  S: 0,
  accel: 1,
  append: 1,
  bios: 1,
  boot: 1,
  cpu: 1,
  display: 1,
  drive: 1,
  global: 1,
  initrd: 1,
  kernel: 1,
  machine: 1,
  M: 1,
  netdev: 1,
  nic: 1,
  msg: 1,
  D: 1,
  overcommit: 1,
  pidfile: 1,
  rtc: 1,
  serial: 1,
  trace: 1,
  uuid: 1,
  vga: 1,
};

/** What the guest kernel and its books need to boot at all. */
const MIN_BOOT: number = 64 * MiB;

type Fields = ReadonlyMap<string, string>;

/** `a=b,c=d`; a first word without `=` is the value of `first`. A name without a value is `on`. */
function fields(text: string, first: string): Fields {
  const map = new Map<string, string>();
  text.split(',').forEach((part, i) => {
    const at = part.indexOf('=');
    if (at < 0 && i === 0) map.set(first, part);
    else if (at < 0) map.set(part, 'on');
    // Several `cpus=` of one node add up.
    else {
      const key = part.slice(0, at);
      const had = map.get(key);
      map.set(key, had === undefined || key !== 'cpus' ? part.slice(at + 1) : `${had},${part.slice(at + 1)}`);
    }
  });
  return map;
}

function size(option: string, text: string | undefined, fallbackMiB = false): number {
  const parsed = parseSize(fallbackMiB && /^\d+$/.test(text ?? '') ? `${text}M` : (text ?? ''));
  if (!parsed.ok) throw new UserError(`-${option}: ${parsed.error}`);
  return parsed.value;
}

function whole(option: string, text: string | undefined): number {
  const value = Number(text);
  if (text === undefined || !Number.isInteger(value) || value < 0)
    throw new UserError(`-${option}: '${text ?? ''}' is not a whole number`);
  return value;
}

/** Reads the options after `ebb vm`. */
export function parseCommandLine(args: readonly string[]): VmDescription {
  const given: [name: string, value: string][] = [];
  const ignored: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const name = args[i].replace(/^--?/, '');
    if (!args[i].startsWith('-') || name === '')
      throw new UserError(`${args[i]}: not an option; see ebb vm --help`);
    const values = IGNORED[name] ?? 1;
    const value = values === 0 ? '' : args[++i];
    if (value === undefined) throw new UserError(`-${name}: needs a value`);
    if (name in IGNORED) {
      if (!ignored.includes(`-${name}`)) ignored.push(`-${name}`);
    } else given.push([name, value]);
  }
  return describe(given, ignored);
}

function describe(given: readonly [string, string][], alsoIgnored: readonly string[]): VmDescription {
  const ignored = [...alsoIgnored];
  let name = 'ebb';
  let bootBytes = 1024 * MiB;
  let maxBytes = 0;
  let vcpus = 1;
  const numa: Fields[] = [];
  const backends: { id: string; bytes: number; isResizable: boolean; boot: number }[] = [];
  const memDevices: Fields[] = [];
  let balloon: string | null = null;
  const chardevs = new Map<string, Fields>();
  const monitors: MonitorPlace[] = [];
  let noStdio = false;
  const ignore = (what: string): void => {
    if (!ignored.includes(what)) ignored.push(what);
  };
  for (const [option, value] of given) {
    switch (option) {
      case 'name':
        name = fields(value, 'guest').get('guest') ?? name;
        break;
      case 'm': {
        const f = fields(value, 'size');
        bootBytes = size('m', f.get('size'), true);
        if (bootBytes < MIN_BOOT || bootBytes % (2 * MiB) !== 0)
          throw new UserError(`-m ${value}: give 64M or more, in steps of 2 MiB`);
        if (f.has('maxmem')) maxBytes = size('m maxmem', f.get('maxmem'), true);
        break;
      }
      case 'smp': {
        const f = fields(value, 'cpus');
        const count = (key: string): number => (f.has(key) ? whole(`smp ${key}`, f.get(key)) : 1);
        vcpus = f.has('cpus')
          ? whole('smp', f.get('cpus'))
          : count('sockets') * count('dies') * count('cores') * count('threads');
        if (vcpus < 1 || vcpus > 8) throw new UserError(`-smp ${value}: give 1 to 8 vCPUs`);
        break;
      }
      case 'numa': {
        const f = fields(value, 'kind');
        if (f.get('kind') === 'node') numa.push(f);
        else ignore(`-numa ${f.get('kind') ?? ''}`);
        break;
      }
      case 'object': {
        const f = fields(value, 'kind');
        const kind = f.get('kind') ?? '';
        if (!/^memory-backend-(ram|file|memfd)$/.test(kind)) {
          ignore(`-object ${kind}`);
          break;
        }
        const id = f.get('id');
        if (id === undefined) throw new UserError(`-object ${value}: Parameter 'id' is missing`);
        if (backends.some((b) => b.id === id))
          throw new UserError(`-object ${value}: attempt to add duplicate property '${id}' to object`);
        const isResizable = f.has('max-size');
        const boot = size(`object ${id} size`, f.get('size'));
        const bytes = isResizable ? size(`object ${id} max-size`, f.get('max-size')) : boot;
        if (boot > bytes) throw new UserError(`-object ${value}: size exceeds max-size`);
        backends.push({ id, bytes, isResizable, boot });
        break;
      }
      case 'device': {
        const f = fields(value, 'driver');
        const driver = f.get('driver') ?? '';
        if (/^virtio-mem(-pci|-device)?$/.test(driver)) memDevices.push(f);
        else if (driver.startsWith('virtio-balloon')) balloon = f.get('id') ?? 'balloon0';
        else ignore(`-device ${driver}`);
        break;
      }
      case 'chardev': {
        const f = fields(value, 'backend');
        chardevs.set(f.get('id') ?? '', f);
        break;
      }
      case 'mon': {
        const f = fields(value, 'chardev');
        const chardev = chardevs.get(f.get('chardev') ?? '');
        if (chardev === undefined)
          throw new UserError(`-mon ${value}: chardev "${f.get('chardev') ?? ''}" not found`);
        monitors.push({
          mode: f.get('mode') === 'control' ? 'control' : 'readline',
          socket: chardev.get('backend') === 'socket' ? (chardev.get('path') ?? null) : null,
        });
        break;
      }
      case 'qmp':
      case 'monitor': {
        const mode = option === 'qmp' ? 'control' : 'readline';
        const where = fields(value, 'where').get('where') ?? '';
        if (where === 'none') {
          noStdio = true;
          break;
        }
        if (where !== 'stdio' && !where.startsWith('unix:'))
          throw new UserError(`-${option} ${value}: give stdio or unix:PATH`);
        monitors.push({ mode, socket: where === 'stdio' ? null : where.slice(5) });
        break;
      }
      default:
        throw new UserError(`-${option}: unknown option; see ebb vm --help`);
    }
  }
  const isRfc = backends.some((b) => b.isResizable);
  const nodes = placeNodes(numa, backends, bootBytes, vcpus);
  if (balloon !== null && isRfc) ignore('-device virtio-balloon-pci (the RFC has none)');
  const memory = pcMemory(nodes.map((n) => ({ node: n.id, size: n.bootBytes })));
  const devices = placeDevices(memDevices, backends, {
    isRfc,
    from: Math.max(4 * GiB, Math.ceil((memory.end * PAGE_SIZE) / GiB) * GiB),
    room: Math.max(0, maxBytes - bootBytes),
    nodes: nodes.length,
  });
  const end = Math.max(memory.end, ...devices.map((d) => (d.addr + d.regionBytes) / PAGE_SIZE));
  const guest: GuestConfig = {
    e820: memory.e820,
    nodes: memory.nodes,
    maxPfn: end,
    nrCpus: vcpus,
    cpuNode: Array.from({ length: vcpus }, (_, cpu) => nodes.findIndex((n) => n.cpus.includes(cpu))),
    initOnAlloc: true,
    pagePoison: false,
    balloon: balloon !== null,
    blk: false,
    hotplug: {
      ...LINUX_HOTPLUG,
      devices: devices.length,
      adopts: isRfc ? 'adds' : 'no',
      // The RFC's guest keeps what it may not give back apart from where it keeps its books.
      ...(isRfc ? { memmapZone: ZONE_DMA32 } : {}),
    },
    blocks: { kind: 'linear', pagesPerFile: 1024 },
  };
  return {
    name,
    dialect: isRfc ? 'rfc-2017' : 'qemu',
    nodes,
    backends: backends.map(({ id, bytes }) => ({ id, bytes })).toReversed(),
    devices,
    balloon,
    monitors,
    noStdio,
    ignored: [...new Set(ignored)],
    vcpus,
    vm: {
      bootAtNs: 0,
      guest,
      program: { kind: 'agent' },
      memoryDevices: devices,
      ...(balloon === null
        ? {}
        : { balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_DEFLATE_ON_OOM] }),
      diskBytes: 0,
    },
  };
}

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

function placeNodes(
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
    return { id, cpus, bootBytes: backend?.bytes ?? share };
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

function placeDevices(
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
      : f.get('unplugged-inaccessible') === 'on'
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
