/**
 * The one factory of views over memory that more than one thread touches. Every shared structure is reached through a
 * view made here, so that a controlled schedule can hand out observed views (each access an event) without a change
 * anywhere else. Private scratch arrays do not come from here.
 */

/** What a shared view covers; the name appears in race reports. */
export type SharedRegion = 'dram' | 'ledger' | 'vcpu-control' | 'run-control' | 'arena' | 'violations';

export function sharedI32(
  _region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Int32Array {
  return new Int32Array(buffer, byteOffset, length);
}

export function sharedU8(
  _region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Uint8Array {
  return new Uint8Array(buffer, byteOffset, length);
}

export function sharedU16(
  _region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Uint16Array {
  return new Uint16Array(buffer, byteOffset, length);
}

export function sharedF64(
  _region: SharedRegion,
  buffer: SharedArrayBuffer,
  byteOffset = 0,
  length?: number,
): Float64Array {
  return new Float64Array(buffer, byteOffset, length);
}
