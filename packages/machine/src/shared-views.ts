/**
 * The one factory of views over memory that more than one thread touches. Every shared structure is reached through a
 * view made here, so that a controlled schedule can hand out observed views (each access an event) without a change
 * anywhere else. Private scratch arrays do not come from here.
 */

/** What a shared view covers; the name appears in race reports. */
export const SHARED_REGIONS = [
  'dram',
  'ledger',
  'vcpu-control',
  'run-control',
  'arena',
  'violations',
  'tlb',
] as const;
export type SharedRegion = (typeof SHARED_REGIONS)[number];

/** What a controlled worker does with each view that is handed out: returns it, or an observed one in its place. */
export type ViewObserver = <T extends ArrayBufferView>(region: SharedRegion, view: T) => T;
let observer: ViewObserver | null = null;

/** Sets the observer of this worker: controlled runs only, before any view is made. */
export function observeViews(next: ViewObserver): void {
  observer = next;
}

/** Which region a buffer holds, for the events of controlled runs. */
const regions = new WeakMap<ArrayBufferLike, number>();

/** Region code of a buffer that a view was made of; −1 for any other. */
export function regionOf(buffer: ArrayBufferLike): number {
  return regions.get(buffer) ?? -1;
}
function note(region: SharedRegion, buffer: SharedArrayBuffer): void {
  if (!regions.has(buffer)) regions.set(buffer, SHARED_REGIONS.indexOf(region));
}

export function sharedI32(
  region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Int32Array {
  note(region, buffer);
  const view = new Int32Array(buffer, byteOffset, length);
  return observer === null ? view : observer(region, view);
}

export function sharedU8(
  region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Uint8Array {
  note(region, buffer);
  const view = new Uint8Array(buffer, byteOffset, length);
  return observer === null ? view : observer(region, view);
}

export function sharedU16(
  region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Uint16Array {
  note(region, buffer);
  const view = new Uint16Array(buffer, byteOffset, length);
  return observer === null ? view : observer(region, view);
}

export function sharedF64(
  region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Float64Array {
  note(region, buffer);
  const view = new Float64Array(buffer, byteOffset, length);
  return observer === null ? view : observer(region, view);
}
