/**
 * Recorded traces of a virtio device, as events: our JSON-lines format (`docs/mechanisms/check.md`), or QEMU's log of
 * `virtio_balloon_*` and `virtio_mem_*` trace events.
 */
import { readFileSync } from 'node:fs';
import { gunzipSync } from 'node:zlib';
import { z } from 'zod';
import { UserError } from '../trace/trace.ts';

const segment = z.tuple([z.number(), z.number()]);
const at = { t: z.number().optional(), device: z.string().optional() };

/** One line of the JSON-lines format. Addresses and lengths are bytes, `pfns` are 4 KiB page numbers. */
const deviceEventSchema = z.discriminatedUnion('event', [
  z.object({
    ...at,
    event: z.literal('features'),
    offered: z.array(z.number()),
    accepted: z.array(z.number()),
  }),
  z.object({ ...at, event: z.literal('status'), value: z.number() }),
  z.object({ ...at, event: z.literal('queue'), queue: z.number(), size: z.number() }),
  z.object({
    ...at,
    event: z.literal('avail'),
    queue: z.number(),
    head: z.number(),
    out: z.array(segment).default([]),
    in: z.array(segment).default([]),
    indirect: z.boolean().optional(),
  }),
  z.object({ ...at, event: z.literal('kick'), queue: z.number() }),
  z.object({ ...at, event: z.literal('used'), queue: z.number(), head: z.number(), length: z.number() }),
  z.object({ ...at, event: z.literal('interrupt'), queue: z.number().optional() }),
  z.object({ ...at, event: z.literal('config-write'), offset: z.number(), value: z.number() }),
  z.object({ ...at, event: z.literal('inflate'), pfns: z.array(z.number()) }),
  z.object({ ...at, event: z.literal('deflate'), pfns: z.array(z.number()) }),
  z.object({ ...at, event: z.literal('report'), ranges: z.array(segment) }),
  z.object({ ...at, event: z.literal('actual'), pages: z.number(), before: z.number().optional() }),
  z.object({ ...at, event: z.literal('target'), pages: z.number() }),
  z.object({
    ...at,
    event: z.literal('mem-config'),
    addr: z.number(),
    block_size: z.number(),
    region_size: z.number(),
    usable_region_size: z.number(),
  }),
  z.object({ ...at, event: z.literal('usable'), before: z.number(), after: z.number() }),
  z.object({ ...at, event: z.literal('plug'), addr: z.number(), nb_blocks: z.number() }),
  z.object({ ...at, event: z.literal('unplug'), addr: z.number(), nb_blocks: z.number() }),
  z.object({ ...at, event: z.literal('unplug-all') }),
  z.object({ ...at, event: z.literal('state'), addr: z.number(), nb_blocks: z.number() }),
  z.object({
    ...at,
    event: z.literal('response'),
    type: z.number(),
    state: z.number().optional(),
  }),
  /** The device's own doing: at a system reset everything is unplugged. */
  z.object({ ...at, event: z.literal('unplugged-all') }),
]);

export type DeviceEvent = z.infer<typeof deviceEventSchema>;

export interface DeviceTrace {
  readonly format: 'jsonl' | 'qemu';
  readonly events: readonly { readonly line: number; readonly event: DeviceEvent }[];
  /** Lines that are no device events: monitor commands, other trace points. */
  readonly skipped: number;
}

/** Reads a trace; what is malformed is the user's one line with its number and text. */
export function readDeviceTrace(path: string): DeviceTrace {
  let bytes: Buffer;
  try {
    bytes = readFileSync(path);
  } catch (error) {
    throw new UserError(`${path}: cannot be read: ${(error as Error).message.split('\n')[0]}`);
  }
  const gzipped = bytes[0] === 0x1f && bytes[1] === 0x8b;
  let text: string;
  try {
    text = (gzipped ? gunzipSync(bytes) : bytes).toString('utf8');
  } catch {
    throw new UserError(`${path}: a truncated or corrupt gzip file`);
  }
  const lines = text.split('\n');
  const first = lines.find((line) => line.trim() !== '' && !line.startsWith('#'));
  return first?.trimStart().startsWith('{') === true ? readJsonLines(path, lines) : readQemu(path, lines);
}

function readJsonLines(path: string, lines: readonly string[]): DeviceTrace {
  const events: { line: number; event: DeviceEvent }[] = [];
  lines.forEach((text, i) => {
    if (text.trim() === '' || text.startsWith('#')) return;
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch {
      throw new UserError(`${path}:${i + 1}: not JSON: ${text.slice(0, 80)}`);
    }
    const parsed = deviceEventSchema.safeParse(value);
    if (!parsed.success) {
      const [issue] = parsed.error.issues;
      throw new UserError(
        `${path}:${i + 1}: ${issue.path.join('.') || 'event'}: ${issue.message}: ${text.slice(0, 80)}`,
      );
    }
    events.push({ line: i + 1, event: parsed.data });
  });
  return { format: 'jsonl', events, skipped: 0 };
}

const QEMU_LINE = /^(?:\S+@[\d.]+:)?(virtio_(?:balloon|mem)_\w+)\s*(.*)$/;

function readQemu(path: string, lines: readonly string[]): DeviceTrace {
  const events: { line: number; event: DeviceEvent }[] = [];
  let skipped = 0;
  lines.forEach((text, i) => {
    const match = QEMU_LINE.exec(text.trim());
    const event = match === null ? null : qemuEvent(match[1], match[2]);
    if (event === undefined) throw new UserError(`${path}:${i + 1}: fields missing: ${text.slice(0, 100)}`);
    if (event !== null) events.push({ line: i + 1, event });
    else if (text.trim() !== '') skipped++;
  });
  if (events.length === 0)
    throw new UserError(
      `${path}: no device events: neither JSON lines nor QEMU's virtio_balloon_* or virtio_mem_* log`,
    );
  return { format: 'qemu', events, skipped };
}

/** One event of QEMU's log; null for those that say nothing here, undefined if a field is missing. */
function qemuEvent(name: string, rest: string): DeviceEvent | null | undefined {
  const field = (key: string): number => {
    const match = new RegExp(`${key}\\s*[=:]?\\s*(0x[0-9a-f]+|\\d+)`, 'i').exec(rest);
    return match === null ? Number.NaN : Number(match[1]);
  };
  const complete = <T extends DeviceEvent>(event: T): T | undefined =>
    Object.values(event).some((v) => Number.isNaN(v)) ? undefined : event;
  switch (name) {
    case 'virtio_mem_plug_request':
      return complete({ event: 'plug', addr: field('addr'), nb_blocks: field('nb_blocks') });
    case 'virtio_mem_unplug_request':
      return complete({ event: 'unplug', addr: field('addr'), nb_blocks: field('nb_blocks') });
    case 'virtio_mem_state_request':
      return complete({ event: 'state', addr: field('addr'), nb_blocks: field('nb_blocks') });
    case 'virtio_mem_unplug_all_request':
      return { event: 'unplug-all' };
    case 'virtio_mem_send_response':
      return complete({ event: 'response', type: field('type') });
    case 'virtio_mem_unplugged_all':
      return { event: 'unplugged-all' };
    case 'virtio_mem_resized_usable_region':
      return complete({ event: 'usable', before: field('old_size'), after: field('new_size') });
    case 'virtio_balloon_set_config':
      return complete({ event: 'actual', pages: field('(?<!old)actual'), before: field('oldactual') });
    case 'virtio_balloon_to_target':
      return complete({ event: 'target', pages: field('num_pages') });
    default:
      return null;
  }
}
