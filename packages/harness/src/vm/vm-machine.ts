/** The machine that a monitor sees, over the host's side of a run. */
import {
  MonitorEvents,
  type FlatRange,
  type Machine,
  type MonitoredMemoryDevice,
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
  readonly backends: Machine['backends'];
  readonly events: MonitorEvents;
  /** Set by whoever drives the session: nothing is left to do. */
  settled = false;
  quitting = false;
  readonly #description: VmDescription;
  readonly #host: HostSide;
  #running = true;

  constructor(description: VmDescription, host: HostSide, events: MonitorEvents) {
    this.name = description.name;
    this.nodes = description.nodes;
    this.backends = description.backends;
    this.events = events;
    this.#description = description;
    this.#host = host;
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
    const bytes = this.nodes.reduce((sum, node) => sum + node.bootBytes, 0);
    const devices = this.#description.devices.map((d) => ({ id: d.memdev, bytes: d.regionBytes }));
    return [{ id: BOOT_RAM, bytes }, ...devices];
  }

  get flatView(): readonly FlatRange[] {
    const { e820 } = this.#description.vm.guest;
    // RAM continues above 4 GiB where it ended below.
    const low = e820.findLast((r) => r.start < HIGH_START)?.end ?? 0;
    const boot = e820.map(
      ({ start, end }): FlatRange => ({
        start: start * PAGE_SIZE,
        last: end * PAGE_SIZE - 1,
        kind: 'ram',
        name: BOOT_RAM,
        offset: (start < HIGH_START ? start : start - HIGH_START + low) * PAGE_SIZE,
      }),
    );
    const regions = this.#description.devices.map(
      (d): FlatRange => ({
        start: d.addr,
        last: d.addr + d.regionBytes - 1,
        kind: 'ram',
        name: d.memdev,
        offset: 0,
      }),
    );
    return [...boot, ...regions];
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
