/** The balloon as both monitors set it. */
import { baseMemory, type Machine } from './machine.ts';
import type { MonitorError } from './qom.ts';

/** Asks for a logical size in bytes; what is wrong with it, or null. Returns before anything is done. */
export function setBalloon(machine: Machine, bytes: number): MonitorError | null {
  if (machine.balloon === null)
    return { class: 'DeviceNotActive', desc: 'No balloon device has been activated' };
  if (!(bytes > 0)) return { class: 'GenericError', desc: "Parameter 'target' expects a size" };
  machine.balloon.device.setTarget(Math.min(bytes, baseMemory(machine)));
  return null;
}
