/** The balloon as both monitors set it. */
import { baseMemory, type Machine } from './machine.ts';
import type { MonitorError } from './qom.ts';

/** Asks for a logical size in bytes; what is wrong with it, or null. Returns before anything is done. */
export function setBalloon(machine: Machine, bytes: number): MonitorError | null {
  if (machine.balloon === null)
    return { class: 'DeviceNotActive', desc: 'No balloon device has been activated' };
  if (!(bytes > 0)) return { class: 'GenericError', desc: "Parameter 'target' expects a size" };
  // The device counts from boot memory: what the guest is to have beside its DIMMs, which may be nothing.
  machine.balloon.device.setTarget(Math.max(0, Math.min(bytes, currentRam(machine)) - dimmMemory(machine)));
  return null;
}

/** Bytes that `pages` of balloon leave, of boot memory and DIMMs (`get_current_ram_size`); virtio-mem does not count. */
export function balloonActual(machine: Machine, pages: number): number {
  return currentRam(machine) - pages * 4096;
}

function dimmMemory(machine: Machine): number {
  return (machine.slots?.dimms ?? []).reduce((sum, { dimm }) => sum + dimm.bytes, 0);
}

function currentRam(machine: Machine): number {
  return baseMemory(machine) + dimmMemory(machine);
}
