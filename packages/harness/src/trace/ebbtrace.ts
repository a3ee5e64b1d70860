/**
 * The `.ebbtrace` file: a zstd-compressed container with a JSON header and the columns of a `Trace` as raw
 * little-endian arrays. Times are stored as whole-microsecond differences; where one of those or a page index needs more
 * than 31 bits, the upper words of both are two columns more (`wide`).
 *
 * ```
 * 'EBBTRC01' | u32 header length | header (JSON) | columns …     (all inside one zstd frame)
 * ```
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { zstdCompressSync, zstdDecompressSync, constants } from 'node:zlib';
import { z } from 'zod';
import { traceHash, UserError, type Trace, type TraceEvents } from './trace.ts';

const MAGIC = 'EBBTRC01';

const WORD = 0x1_0000_0000;
const whole = z
  .int()
  .min(0)
  .max(WORD - 1);
/** What a reader relies on. */
const headerSchema = z.object({
  trace: z.object({
    name: z.string(),
    hash: z.string(),
    nrCpus: whole.min(1),
    maxPfn: whole.min(1),
    guestMemoryBytes: z.int(),
    e820: z.array(z.object({ start: whole, end: whole })),
    end: z
      .object({ freeByOrder: z.array(whole), freePages: whole, pcpPages: whole, pageCachePages: whole })
      .optional(),
    skipped: z.record(z.string(), z.number()),
    marks: z.array(z.object({ timeUs: z.number(), name: z.string() })),
  }),
  count: whole,
  /** Entries of the start state's two tables; 0 without one. */
  pages: whole,
  pageblocks: whole,
  /** There are two columns more: upper words of time differences and of page indices. */
  wide: z.literal(true).optional(),
});

/** Serialises a trace. */
export function encodeTrace(trace: Trace): Buffer {
  const { events, start, ...rest } = trace;
  const deltas = events.timeUs.map((t, i, all) => Math.round(t) - (i === 0 ? 0 : Math.round(all[i - 1])));
  const wide = [deltas, events.index].some((column) => column.some((v) => v !== (v | 0)));
  const header = {
    trace: rest,
    count: events.count,
    pages: start?.pages.length ?? 0,
    pageblocks: start?.pageblocks.length ?? 0,
    ...(wide ? { wide } : {}),
  };
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(json.length);
  const parts: (Buffer | Uint8Array)[] = [Buffer.from(MAGIC), length, json];
  for (const column of [
    Int32Array.from(deltas),
    events.pfn,
    events.file,
    Int32Array.from(events.index),
    events.gfp,
    events.op,
    events.cpu,
    events.order,
    events.migratetype,
    ...(wide
      ? [deltas, events.index].map((column) => Int32Array.from(column, (v) => Math.floor(v / WORD)))
      : []),
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
  const { trace: told, ...header } = headerOf(bytes.toString('utf8', 12, 12 + headerLength), source);
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
  let index: Float64Array = Float64Array.from(i32());
  const gfp = new Uint16Array(take(n, 2).buffer);
  const op = take(n, 1);
  const cpu = take(n, 1);
  const order = take(n, 1);
  const migratetype = take(n, 1);
  let steps: Float64Array = Float64Array.from(deltas);
  if (header.wide === true) [steps, index] = [steps, index].map((low) => widened(low, i32()));
  const timeUs = new Float64Array(n);
  let t = 0;
  for (let i = 0; i < n; i++) timeUs[i] = t += steps[i];
  const events: TraceEvents = { count: n, timeUs, op, cpu, pfn, order, migratetype, gfp, file, index };
  const start =
    header.pages > 0 ? { pages: take(header.pages, 1), pageblocks: take(header.pageblocks, 1) } : undefined;
  const { end, ...rest } = told;
  const trace = {
    ...rest,
    events,
    ...(start === undefined ? {} : { start }),
    ...(end === undefined ? {} : { end }),
  };
  if (traceHash(trace) !== trace.hash)
    throw new UserError(`${source}: its contents are not those of its hash ${trace.hash}; import it again`);
  return trace;
}

/** Lower words, as int32 has them, and upper words as whole numbers. */
function widened(low: Float64Array, high: Int32Array): Float64Array {
  return low.map((v, i) => (v >>> 0) + high[i] * WORD);
}

function headerOf(json: string, source: string): z.infer<typeof headerSchema> {
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch {
    // Nothing is no header either.
  }
  const parsed = headerSchema.safeParse(value);
  if (!parsed.success)
    throw new UserError(`${source}: its header makes no sense; make it again with 'ebb trace import'`);
  return parsed.data;
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
