/**
 * What a monitor sees of a virtual machine: its memory, the devices that size it, and the switches. Who assembles the
 * machine implements it; the monitor knows neither threads nor sockets.
 */
import type { BalloonDevice } from '../../devices/balloon.ts';
import type { MemoryDevice } from '../../devices/memory-device.ts';

export interface MonitoredNode {
  readonly id: number;
  readonly cpus: readonly number[];
  /** Boot memory of the node, bytes. */
  readonly bootBytes: number;
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
  readonly flatView: readonly FlatRange[];
  running: boolean;
  /** The guest has nothing left to do for what was asked of it. */
  readonly settled: boolean;
  systemReset(): void;
  quit(): void;
}

/** Bytes of boot memory. */
export function baseMemory(machine: Machine): number {
  return machine.nodes.reduce((sum, node) => sum + node.bootBytes, 0);
}

/** Bytes plugged into all memory devices. */
export function pluggedMemory(machine: Machine): number {
  return machine.memoryDevices.reduce((sum, { device }) => sum + device.pluggedBytes, 0);
}

/** Bytes plugged on one node. */
export function pluggedOn(machine: Machine, node: number): number {
  return machine.memoryDevices.reduce(
    (sum, { device }) => sum + (device.node === node ? device.pluggedBytes : 0),
    0,
  );
}
