/**
 * The `.ebbtrace` file: a zstd-compressed container with a JSON header and the columns of a `Trace` as raw
 * little-endian arrays. Times are stored as whole-microsecond differences.
 *
 * ```
 * 'EBBTRC01' | u32 header length | header (JSON) | columns …     (all inside one zstd frame)
 * ```
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { zstdCompressSync, zstdDecompressSync, constants } from 'node:zlib';
import { UserError, type Trace, type TraceEvents } from './trace.ts';

const MAGIC = 'EBBTRC01';

interface Header {
  readonly trace: Omit<Trace, 'events' | 'start'>;
  readonly count: number;
  readonly pages: number;
  readonly pageblocks: number;
}

/** Serialises a trace. */
export function encodeTrace(trace: Trace): Buffer {
  const { events, start, ...rest } = trace;
  const deltas = new Int32Array(events.count);
  let last = 0;
  for (let i = 0; i < events.count; i++) {
    const t = Math.round(events.timeUs[i]);
    deltas[i] = t - last;
    last = t;
  }
  const header: Header = {
    trace: rest,
    count: events.count,
    pages: start?.pages.length ?? 0,
    pageblocks: start?.pageblocks.length ?? 0,
  };
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(json.length);
  const index = Int32Array.from(events.index);
  const parts: (Buffer | Uint8Array)[] = [Buffer.from(MAGIC), length, json];
  for (const column of [
    deltas,
    events.pfn,
    events.file,
    index,
    events.gfp,
    events.op,
    events.cpu,
    events.order,
    events.migratetype,
  ]) {
    parts.push(planes(column));
  }
  if (start !== undefined) parts.push(start.pages, start.pageblocks);
  return zstdCompressSync(Buffer.concat(parts), {
    // With a checksum, so that a damaged file is told from a sound one.
    params: { [constants.ZSTD_c_compressionLevel]: 19, [constants.ZSTD_c_checksumFlag]: 1 },
  });
}

/** Byte planes: all low bytes, then the next …; they compress far better than the numbers themselves. */
function planes(column: Int32Array | Uint16Array | Uint8Array): Uint8Array {
  const bytes = new Uint8Array(column.buffer, column.byteOffset, column.byteLength);
  const width = column.BYTES_PER_ELEMENT;
  const out = new Uint8Array(bytes.length);
  for (let b = 0, at = 0; b < width; b++) for (let i = b; i < bytes.length; i += width) out[at++] = bytes[i];
  return out;
}

function unplane(bytes: Uint8Array, width: number): Uint8Array {
  const out = new Uint8Array(bytes.length);
  for (let b = 0, at = 0; b < width; b++) for (let i = b; i < bytes.length; i += width) out[i] = bytes[at++];
  return out;
}

/** Reads a serialised trace; `source` names it in messages. */
export function decodeTrace(compressed: Uint8Array, source: string): Trace {
  let bytes: Buffer;
  try {
    bytes = zstdDecompressSync(compressed);
  } catch {
    throw new UserError(`${source}: not an .ebbtrace file, or damaged; make one with 'ebb trace import'`);
  }
  if (bytes.toString('latin1', 0, 8) !== MAGIC)
    throw new UserError(`${source}: not an .ebbtrace file; make one with 'ebb trace import'`);
  const headerLength = bytes.readUInt32LE(8);
  const header = JSON.parse(bytes.toString('utf8', 12, 12 + headerLength)) as Header;
  let at = 12 + headerLength;
  const n = header.count;
  const take = (count: number, width: number): Uint8Array => {
    if (at + count * width > bytes.length) throw new UserError(`${source}: truncated; import it again`);
    const out = unplane(bytes.subarray(at, at + count * width), width);
    at += count * width;
    return out;
  };
  const i32 = (): Int32Array => new Int32Array(take(n, 4).buffer);
  const deltas = i32();
  const pfn = i32();
  const file = i32();
  const index = Float64Array.from(i32());
  const gfp = new Uint16Array(take(n, 2).buffer);
  const op = take(n, 1);
  const cpu = take(n, 1);
  const order = take(n, 1);
  const migratetype = take(n, 1);
  const timeUs = new Float64Array(n);
  let t = 0;
  for (let i = 0; i < n; i++) timeUs[i] = t += deltas[i];
  const events: TraceEvents = { count: n, timeUs, op, cpu, pfn, order, migratetype, gfp, file, index };
  const start =
    header.pages > 0 ? { pages: take(header.pages, 1), pageblocks: take(header.pageblocks, 1) } : undefined;
  return { ...header.trace, events, ...(start === undefined ? {} : { start }) };
}

export function writeTrace(path: string, trace: Trace): number {
  const bytes = encodeTrace(trace);
  writeFileSync(path, bytes);
  return bytes.length;
}

export function readTrace(path: string): Trace {
  let bytes: Buffer;
  try {
    bytes = readFileSync(path);
  } catch {
    throw new UserError(`${path}: cannot be read; shipped traces are build, hog, reporting`);
  }
  return decodeTrace(bytes, path);
}
