/**
 * A machine as QEMU's command line describes it, in upstream's dialect and in that of the 2017 RFC. Options that mean
 * nothing here (accelerators, kernels, displays) are accepted and named once.
 */
import { LINUX_HOTPLUG, MAX_DIMMS, ZONE_DMA32, type GuestConfig } from '@ebb/guest-kernel';
import type { Dialect, Dimm, Extent, MonitoredNode } from '@ebb/host-kvm';
import { GiB, MiB, PAGE_SIZE } from '@ebb/machine';
import { VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_STATS_VQ } from '@ebb/virtio/uapi';
import { pcMemory } from '../memory-device/pc-memory.ts';
import type { MemoryDeviceSpec, VmSpec } from '../run/spec.ts';
import { UserError } from '../trace/trace.ts';
import { fields, onlyKnown, size, whole, type Fields } from './option-fields.ts';
import { placeDevices, placeDimms, placeNodes } from './place-memory.ts';

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
  /** Slots for DIMMs, those that are in from the start, and addresses for memory devices. */
  readonly slots: number;
  readonly dimms: readonly { readonly dimm: Dimm; readonly memdev: string }[];
  readonly deviceRange: Extent;
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

/** DIMMs are plugged no higher than this above the first memory device: the guest's books are made for it at boot. */
const HOTPLUG_WINDOW: number = 16 * GiB;

/** What the guest kernel and its books need to boot at all. */
const MIN_BOOT: number = 64 * MiB;

/** Reads the options after `ebb vm`. */
export function parseCommandLine(args: readonly string[]): VmDescription {
  const given: [name: string, value: string][] = [];
  const ignored: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const name = args[i].replace(/^--?/, '');
    if (!args[i].startsWith('-') || name === '')
      throw new UserError(`${args[i]}: not an option; see ebb vm --help`);
    const isIgnored = Object.hasOwn(IGNORED, name);
    const values = isIgnored ? IGNORED[name] : 1;
    const value = values === 0 ? '' : args[++i];
    if (value === undefined) throw new UserError(`-${name}: needs a value`);
    if (isIgnored) {
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
  let slots = 0;
  let vcpus = 1;
  const numa: Fields[] = [];
  const backends: { id: string; bytes: number; isResizable: boolean; boot: number }[] = [];
  const memDevices: Fields[] = [];
  const dimmDevices: Fields[] = [];
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
        onlyKnown('m', f, ['size', 'maxmem', 'slots']);
        bootBytes = size('m', f.get('size'), true);
        if (bootBytes < MIN_BOOT || bootBytes % (2 * MiB) !== 0)
          throw new UserError(`-m ${value}: give 64M or more, in steps of 2 MiB`);
        if (f.has('maxmem')) maxBytes = size('m maxmem', f.get('maxmem'), true);
        if (f.has('maxmem') && maxBytes < bootBytes)
          throw new UserError(
            `-m ${value}: invalid value of maxmem: maximum memory size (0x${maxBytes.toString(16)}) must be at least the initial memory size (0x${bootBytes.toString(16)})`,
          );
        if (f.has('slots')) slots = whole('m slots', f.get('slots'));
        if (slots > MAX_DIMMS) throw new UserError(`-m ${value}: give at most ${MAX_DIMMS} slots`);
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
        else if (driver === 'pc-dimm') dimmDevices.push(f);
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
        if (where !== 'stdio' && !/^unix:[^,]+/.test(where))
          throw new UserError(`-${option} ${value}: give stdio or unix:PATH`);
        monitors.push({ mode, socket: where === 'stdio' ? null : where.slice(5) });
        break;
      }
      default:
        throw new UserError(`-${option}: unknown option; see ebb vm --help`);
    }
  }
  if (monitors.filter((m) => m.socket === null).length > 1)
    throw new UserError('-monitor, -qmp: cannot use stdio by multiple monitors');
  const isRfc = backends.some((b) => b.isResizable);
  const nodes = placeNodes(numa, backends, bootBytes, vcpus);
  if (balloon !== null && isRfc) ignore('-device virtio-balloon-pci (the RFC has none)');
  const memory = pcMemory(nodes.map((n) => ({ node: n.id, size: n.bootBytes })));
  const from = Math.max(4 * GiB, Math.ceil((memory.end * PAGE_SIZE) / GiB) * GiB);
  const room = Math.max(0, maxBytes - bootBytes);
  const devices = placeDevices(memDevices, backends, { isRfc, from, room, nodes: nodes.length });
  const deviceRange = { addr: from, bytes: Math.min(room, HOTPLUG_WINDOW) };
  const dimms = placeDimms(dimmDevices, backends, {
    devices,
    range: deviceRange,
    slots,
    nodes,
    balloon,
  });
  if (balloon !== null && devices.some((d) => d.id === balloon))
    throw new UserError(`-device: Duplicate device ID '${balloon}'`);
  const ends = [...devices.map((d) => d.addr + d.regionBytes), slots > 0 ? from + deviceRange.bytes : 0];
  const end = Math.max(memory.end, ...ends.map((e) => e / PAGE_SIZE));
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
      dimms: slots,
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
    slots,
    dimms,
    deviceRange,
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
      ...(slots === 0 ? {} : { dimms: { slots, plugged: dimms.map((d) => d.dimm), orders: [] } }),
      ...(balloon === null
        ? {}
        : { balloonFeatures: [VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_DEFLATE_ON_OOM] }),
      diskBytes: 0,
    },
  };
}
