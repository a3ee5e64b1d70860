/** Captures of real virtio-mem sessions: a machine, what was asked of its devices, and every request with its answer. */
import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { UserError } from '../trace/trace.ts';

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
  z.object({ t: z.number(), action: z.literal('note'), text: z.string().default('') }),
]);

/** What was done inside the guest, or by a tool we do not know, is a note: it is read past. */
function asNote(raw: unknown): unknown {
  const known = z.object({ action: z.enum(['resize', 'migration', 'system_reset', 'note']) });
  const other = z.object({ t: z.number(), action: z.string() }).safeParse(raw);
  if (!other.success || known.safeParse(raw).success) return raw;
  return { t: other.data.t, action: 'note', text: other.data.action };
}

const sessionSchema = z.object({
  capture: z.string(),
  boot: z.array(z.object({ node: z.int().min(0).max(1), size: z.int().positive() })).min(1),
  vcpus: z.int().min(1).max(8),
  linuxMemoryBlockSize: z.int().positive(),
  onlinePolicy: z.enum(['online', 'online_movable', 'auto-movable']),
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
  const isShipped = (SHIPPED_SESSIONS as readonly string[]).includes(nameOrPath) && !existsSync(nameOrPath);
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
  return parsed.data;
}
