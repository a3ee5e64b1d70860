/** Captures of real virtio-mem sessions: a machine, what was asked of its devices, and every request with its answer. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { judgeMemoryDevice, judgeRequested } from '@ebb/host-kvm';
import { MiB, PAGE_SIZE } from '@ebb/machine';
import { z } from 'zod';
import { UserError } from '../trace/trace.ts';
import { pcMemory } from './pc-memory.ts';

const address = z.union([
  z.number(),
  z
    .string()
    .regex(/^0x[0-9a-f]+$/i)
    .transform((text) => Number.parseInt(text, 16)),
]);

const step = z.discriminatedUnion('action', [
  z.object({
    t: z.number(),
    action: z.literal('resize'),
    device: z.string(),
    requestedSize: z.int().min(0),
  }),
  z.object({ t: z.number(), action: z.literal('migration'), active: z.boolean() }),
  z.object({ t: z.number(), action: z.literal('system_reset') }),
  // Inside the guest: the driver's module goes and comes, a memory block by its address.
  z.object({ t: z.number(), action: z.literal('rmmod') }),
  z.object({ t: z.number(), action: z.literal('insmod') }),
  z.object({ t: z.number(), action: z.literal('offline'), addr: address }),
  z.object({ t: z.number(), action: z.literal('online'), addr: address }),
  z.object({ t: z.number(), action: z.literal('note'), text: z.string().default('') }),
]);

/** What was done by a tool that we do not know is a note: it is read past, and named. */
function asNote(raw: unknown): unknown {
  const other = z.object({ t: z.number(), action: z.string() }).safeParse(raw);
  if (!other.success || step.options.some((o) => o.shape.action.value === other.data.action)) return raw;
  return { t: other.data.t, action: 'note', text: other.data.action };
}

const sessionSchema = z.object({
  capture: z.string(),
  boot: z.array(z.object({ node: z.int().min(0).max(1), size: z.int().positive() })).min(1),
  vcpus: z.int().min(1).max(8),
  linuxMemoryBlockSize: z.int().positive(),
  onlinePolicy: z.enum(['online', 'online_movable', 'auto-movable', 'offline']),
  initOnAlloc: z.boolean(),
  devices: z
    .array(
      z.object({
        id: z.string(),
        node: z.int().min(0).max(1),
        memaddr: address,
        maxSize: z.int().positive(),
        blockSize: z.int().positive(),
        requestedSizeAtStart: z.int().min(0),
      }),
    )
    .min(1)
    .max(4),
  steps: z.array(z.preprocess(asNote, step)),
  requests: z.array(
    z.object({
      t: z.number(),
      type: z.enum(['PLUG', 'UNPLUG', 'UNPLUG_ALL', 'STATE']),
      addr: address.optional(),
      nbBlocks: z.int().optional(),
      response: z.enum(['ACK', 'NACK', 'BUSY', 'ERROR']),
    }),
  ),
});

export type Session = z.output<typeof sessionSchema>;
export type SessionRequest = Session['requests'][number];

/** Captures that the project ships. */
export const SHIPPED_SESSIONS = ['A-session', 'B-movable', 'E-block-128M', 'I-busy'] as const;

/** Reads and checks a `CAPTURE.session.json`, or a shipped capture by its name. */
export function readSession(nameOrPath: string): Session {
  const isShipped = (SHIPPED_SESSIONS as readonly string[]).includes(nameOrPath);
  const path = isShipped
    ? fileURLToPath(new URL(`../../captures/${nameOrPath}.session.json`, import.meta.url))
    : nameOrPath;
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch {
    throw new UserError(
      `${path}: cannot be read; give a CAPTURE.session.json or one of ${SHIPPED_SESSIONS.join(', ')}`,
    );
  }
  let raw: unknown;
  try {
    raw = JSON.parse(text);
  } catch (error) {
    throw new UserError(`${path}: is not JSON: ${(error as Error).message}`);
  }
  const parsed = sessionSchema.safeParse(raw);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new UserError(`${path}: ${issue.path.join('.') || 'top level'}: ${issue.message}`);
  }
  const why = judgeSession(parsed.data);
  if (why !== '') throw new UserError(`${path}: ${why}`);
  return parsed.data;
}

/** What is wrong with the figures of a session, if anything. */
function judgeSession(session: Session): string {
  const block = session.linuxMemoryBlockSize;
  for (const { node, size } of session.boot)
    if (size % (2 * MiB) !== 0) return `boot node ${node}: ${size} bytes are no multiple of 2 MiB`;
  if (!Number.isInteger(Math.log2(block)) || block < 2 * MiB)
    return `linuxMemoryBlockSize: ${block} is no power of two from 2 MiB`;
  const memory = pcMemory(session.boot);
  const taken = memory.e820.map(({ start, end }) => ({
    what: 'boot memory',
    from: start * PAGE_SIZE,
    to: end * PAGE_SIZE,
  }));
  for (const d of session.devices) {
    const end = d.memaddr + d.maxSize;
    const hit = taken.find((t) => d.memaddr < t.to && t.from < end);
    if (hit !== undefined) return `device ${d.id}: memaddr: overlaps ${hit.what}`;
    taken.push({ what: `device ${d.id}`, from: d.memaddr, to: end });
    if (session.devices.filter((o) => o.id === d.id).length > 1) return `device ${d.id}: is there twice`;
    if (!session.boot.some((b) => b.node === d.node))
      return `device ${d.id}: node ${d.node} has no boot memory`;
    const { memaddr: addr, maxSize: regionBytes, blockSize: blockBytes, requestedSizeAtStart } = d;
    const options = { addr, regionBytes, blockBytes, requestedBytes: requestedSizeAtStart };
    const why = judgeMemoryDevice({ ...options, region: { pageBytes: PAGE_SIZE } });
    if (why !== '') return `device ${d.id}: ${why}`;
  }
  for (const { t, ...step } of session.steps) {
    if (step.action !== 'resize') continue;
    const device = session.devices.find((d) => d.id === step.device);
    if (device === undefined) return `step at ${t} s: no device '${step.device}'`;
    const why = judgeRequested(device.maxSize, device.blockSize, step.requestedSize);
    if (why !== '') return `step at ${t} s: ${why}`;
  }
  for (const { t, type, addr, nbBlocks = 0 } of session.requests) {
    if (addr === undefined) continue;
    const device = session.devices.find((d) => addr >= d.memaddr && addr < d.memaddr + d.maxSize);
    if (device === undefined) return `request at ${t} s: ${type} at 0x${addr.toString(16)} is in no device`;
    if (addr + nbBlocks * device.blockSize > device.memaddr + device.maxSize)
      return `request at ${t} s: ${nbBlocks} blocks from 0x${addr.toString(16)} are more than ${device.id} has`;
  }
  return '';
}

/** Actions that are not followed, each named once. */
export function unfollowed(session: Session): string[] {
  const names = session.steps.flatMap((s) => (s.action === 'note' && s.text !== '' ? [s.text] : []));
  return [...new Set(names)];
}
