/** The machine that a monitor sees, over the host's side of a run. */
import {
  MonitorEvents,
  type Dimm,
  type DimmNews,
  type FlatRange,
  type Machine,
  type MonitoredBackend,
  type MonitoredDimm,
  type MonitoredMemoryDevice,
  type MonitoredSlots,
  type MonitorEvent,
} from '@ebb/host-kvm';
import { PAGE_SIZE } from '@ebb/machine';
import type { HostSide } from '../run/host-side.ts';
import { HIGH_START } from '../memory-device/pc-memory.ts';
import type { VmDescription } from './command-line.ts';

/** QEMU's name of a `pc` machine's own memory. */
const BOOT_RAM = 'pc.ram';

export class VmMachine implements Machine {
  readonly name: string;
  readonly nodes: Machine['nodes'];
  readonly slots: MonitoredSlots | null;
  readonly events: MonitorEvents;
  /** Set by whoever drives the session: nothing is left to do. */
  settled = false;
  quitting = false;
  readonly #description: VmDescription;
  readonly #host: HostSide;
  #backends: readonly MonitoredBackend[];
  /** Backends of the DIMMs, by id of the DIMM; those of the start are not hotplugged. */
  readonly #dimms = new Map<string, { readonly memdev: string; readonly hotplugged: boolean }>();
  #running = true;

  constructor(description: VmDescription, host: HostSide, events: MonitorEvents) {
    this.name = description.name;
    this.nodes = description.nodes;
    this.#backends = description.backends;
    this.events = events;
    this.#description = description;
    this.#host = host;
    for (const { dimm, memdev } of description.dimms) this.#dimms.set(dimm.id, { memdev, hotplugged: false });
    this.slots = description.slots === 0 ? null : this.#monitoredSlots();
  }

  get backends(): Machine['backends'] {
    return this.#backends;
  }
  addBackend(backend: MonitoredBackend): void {
    this.#backends = [backend, ...this.#backends];
  }
  removeBackend(id: string): void {
    this.#backends = this.#backends.filter((b) => b.id !== id);
  }

  #monitoredSlots(): MonitoredSlots {
    // The host's side of the machine is there before anybody asks.
    const host = this.#host;
    const known = this.#dimms;
    const status = (): MonitoredSlots['status'] => host.vms[0].dimms?.status ?? [];
    return {
      range: this.#description.deviceRange,
      get status() {
        return status();
      },
      get dimms() {
        return status().flatMap(({ slot, dimm }): MonitoredDimm[] => {
          const entry = dimm === null ? undefined : known.get(dimm.id);
          return dimm === null || entry === undefined ? [] : [{ dimm, slot, ...entry }];
        });
      },
      plug(dimm: Dimm, memdev: string) {
        const why = host.vms[0].dimms?.plug(dimm) ?? '';
        if (why === '') known.set(dimm.id, { memdev, hotplugged: true });
        return why;
      },
      requestUnplug: (id) => host.vms[0].dimms?.requestUnplug(id) ?? '',
    };
  }

  /** The guest has said how it went, or a DIMM is gone. */
  dimmNews({ kind, slot, dimm, ostEvent, ostStatus }: DimmNews): void {
    if (dimm === null) return;
    if (kind === 'deleted') {
      this.#dimms.delete(dimm.id);
      const data = { device: dimm.id, path: `/machine/peripheral/${dimm.id}` };
      this.emit({ event: 'DEVICE_DELETED', data });
      return;
    }
    const info = {
      device: dimm.id,
      source: ostEvent,
      status: ostStatus,
      slot: String(slot),
      'slot-type': 'DIMM' as const,
    };
    this.emit({ event: 'ACPI_DEVICE_OST', data: { info } });
  }

  get memoryDevices(): readonly MonitoredMemoryDevice[] {
    return this.#host.vms[0].memory.map((device, i) => ({
      device,
      memdev: this.#description.devices[i].memdev,
    }));
  }

  get balloon(): Machine['balloon'] {
    const { balloon } = this.#host.vms[0];
    const id = this.#description.balloon;
    return balloon === null || id === null ? null : { id, device: balloon };
  }

  get ramBlocks(): Machine['backends'] {
    // A node without a backend of its own is a part of the machine's memory.
    const own = this.nodes.flatMap(({ memdev, bootBytes }) =>
      memdev === undefined ? [] : [{ id: memdev, bytes: bootBytes }],
    );
    const rest = this.nodes.reduce((sum, n) => sum + (n.memdev === undefined ? n.bootBytes : 0), 0);
    const boot = rest > 0 ? [{ id: BOOT_RAM, bytes: rest }, ...own] : own;
    // Named after the PCI function that has it: the first free one is 2.
    const devices = this.#description.devices.map((d, i) => ({
      id: `0000:00:${(2 + i).toString(16).padStart(2, '0')}.0/${d.memdev}`,
      bytes: d.regionBytes,
    }));
    const dimms = (this.slots?.dimms ?? []).map(({ dimm, memdev }) => ({ id: memdev, bytes: dimm.bytes }));
    return [...boot, ...devices, ...dimms];
  }

  get flatView(): readonly FlatRange[] {
    const boot = this.#bootRanges();
    const all = [
      ...this.#description.devices.map((d) => ({ name: d.memdev, addr: d.addr, bytes: d.regionBytes })),
      ...(this.slots?.dimms ?? []).map(({ dimm, memdev }) => ({ ...dimm, name: memdev })),
    ];
    const regions = all.map(
      ({ name, addr, bytes }): FlatRange => ({
        start: addr,
        last: addr + bytes - 1,
        kind: 'ram',
        name,
        offset: 0,
      }),
    );
    return [...boot, ...regions.toSorted((x, y) => x.start - y.start)];
  }

  /** Boot memory, node by node; RAM continues above 4 GiB where it ended below. */
  #bootRanges(): FlatRange[] {
    const { e820, nodes } = this.#description.vm.guest;
    const low = e820.findLast((r) => r.start < HIGH_START)?.end ?? 0;
    const linear = (pfn: number): number => (pfn < HIGH_START ? pfn : pfn - HIGH_START + low);
    const backends = nodes.map((_, i) => this.nodes[i]?.memdev ?? BOOT_RAM);
    return nodes.flatMap((node, i) => {
      const name = backends[i];
      const base = linear(nodes[backends.indexOf(name)].start);
      return e820
        .map((r) => ({ start: Math.max(r.start, node.start), end: Math.min(r.end, node.end) }))
        .filter(({ start, end }) => start < end)
        .map(
          ({ start, end }): FlatRange => ({
            start: start * PAGE_SIZE,
            last: end * PAGE_SIZE - 1,
            kind: 'ram',
            name,
            offset: (linear(start) - base) * PAGE_SIZE,
          }),
        );
    });
  }

  get running(): boolean {
    return this.#running;
  }
  set running(value: boolean) {
    if (value === this.#running) return;
    this.#running = value;
    this.emit({ event: value ? 'RESUME' : 'STOP' });
  }

  systemReset(): void {
    this.#host.systemReset(0, this.#description.dialect === 'rfc-2017' ? 'rfc-2017' : 'virtio-1.2');
    this.emit({ event: 'RESET', data: { guest: false, reason: 'host-qmp-system-reset' } });
  }

  quit(): void {
    this.quitting = true;
  }

  /** The news that the machine is off: the last there is. */
  shutDown(): void {
    this.emit({ event: 'SHUTDOWN', data: { guest: false, reason: 'host-qmp-quit' } });
  }

  emit(event: MonitorEvent): void {
    this.events.emit(event, this.#host.windowEnd);
  }
}
