/**
 * What a monitor sees of a virtual machine: its memory, the devices that size it, and the switches. Who assembles the
 * machine implements it; the monitor knows neither threads nor sockets.
 */
import type { BalloonDevice } from '../../devices/balloon.ts';
import type { Dimm, DimmSlotStatus } from '../../devices/dimm-slots.ts';
import type { MemoryDevice } from '../../devices/memory-device.ts';
import type { Extent } from './place-dimm.ts';

export interface MonitoredNode {
  readonly id: number;
  readonly cpus: readonly number[];
  /** Boot memory of the node, bytes, and its backend if it has one of its own. */
  readonly bootBytes: number;
  readonly memdev?: string | undefined;
}

export interface MonitoredBackend {
  readonly id: string;
  readonly bytes: number;
}

export interface MonitoredMemoryDevice {
  readonly device: MemoryDevice;
  /** Id of its backend. */
  readonly memdev: string;
}

export interface MonitoredDimm {
  readonly dimm: Dimm;
  readonly slot: number;
  readonly memdev: string;
  /** It came while the machine ran. */
  readonly hotplugged: boolean;
}

/** Slots for DIMMs (`-m …,slots=N`). */
export interface MonitoredSlots {
  readonly dimms: readonly MonitoredDimm[];
  readonly status: readonly DimmSlotStatus[];
  /** Addresses for memory devices of any kind. */
  readonly range: Extent;
  /** Plugs a DIMM that has been judged, but for its slot and its place; why not, or empty. */
  plug(dimm: Dimm, memdev: string): string;
  requestUnplug(id: string): string;
}

/** A range of the flat view of guest-physical memory. */
export interface FlatRange {
  readonly start: number;
  /** Last byte. */
  readonly last: number;
  readonly kind: 'ram' | 'i/o';
  readonly name: string;
  /** Offset of the range in its region. */
  readonly offset: number;
}

export interface Machine {
  readonly name: string;
  readonly nodes: readonly MonitoredNode[];
  /** Newest first, as QEMU lists them. */
  readonly backends: readonly MonitoredBackend[];
  /** RAM blocks in the order of their offsets: boot memory, then the devices'. */
  readonly ramBlocks: readonly MonitoredBackend[];
  readonly memoryDevices: readonly MonitoredMemoryDevice[];
  readonly balloon: { readonly id: string; readonly device: BalloonDevice } | null;
  /** None without slots. */
  readonly slots: MonitoredSlots | null;
  readonly flatView: readonly FlatRange[];
  running: boolean;
  /** The guest has nothing left to do for what was asked of it. */
  readonly settled: boolean;
  addBackend(backend: MonitoredBackend): void;
  removeBackend(id: string): void;
  systemReset(): void;
  quit(): void;
}

/** Bytes of boot memory. */
export function baseMemory(machine: Machine): number {
  return machine.nodes.reduce((sum, node) => sum + node.bootBytes, 0);
}

/** What is plugged: memory devices by their blocks, DIMMs whole. */
function plugged(machine: Machine): { readonly node: number; readonly bytes: number }[] {
  return [
    ...machine.memoryDevices.map(({ device }) => ({ node: device.node, bytes: device.pluggedBytes })),
    ...(machine.slots?.dimms ?? []).map(({ dimm }) => dimm),
  ];
}

/** Bytes plugged into all memory devices. */
export function pluggedMemory(machine: Machine): number {
  return plugged(machine).reduce((sum, { bytes }) => sum + bytes, 0);
}

/** Bytes plugged on one node. */
export function pluggedOn(machine: Machine, node: number): number {
  return plugged(machine).reduce((sum, p) => sum + (p.node === node ? p.bytes : 0), 0);
}

/** Memory devices of both kinds in the order of their addresses, as QEMU lists them. */
export function byAddress(machine: Machine): (MonitoredMemoryDevice | MonitoredDimm)[] {
  const addr = (d: MonitoredMemoryDevice | MonitoredDimm): number =>
    'dimm' in d ? d.dimm.addr : d.device.addr;
  return [...machine.memoryDevices, ...(machine.slots?.dimms ?? [])].toSorted((a, b) => addr(a) - addr(b));
}
