/** A failing case as a small file: everything that `ebb replay` needs, on any machine. */
import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { UserError } from '../trace/trace.ts';
import { EBB_VERSION } from '../version.ts';

const opSchema = z.object({ op: z.string(), a: z.number(), b: z.number() });

const caseSchema = z.object({
  schema: z.literal(1),
  ebb: z.string(),
  property: z.string(),
  /** The run that found it: `ebb replay --property P --seed S --path N`. */
  seed: z.number(),
  path: z.number(),
  strategy: z.string(),
  program: z.object({ host: z.array(opSchema), cpus: z.array(z.array(opSchema)) }),
  /** Which candidate went on at each choice; 0 (the one that ran) past the end. */
  choices: z.array(z.number()),
  /** Whether races were looked for. */
  observe: z.boolean(),
  found: z.array(z.string()),
});

export type FuzzCase = z.infer<typeof caseSchema>;

export function caseText(c: Omit<FuzzCase, 'schema' | 'ebb'>): string {
  return `${JSON.stringify({ schema: 1, ebb: EBB_VERSION, ...c })}\n`;
}

export function readCase(path: string): FuzzCase {
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(path, 'utf8'));
  } catch (error) {
    throw new UserError(`${path}: not a readable case: ${(error as Error).message.split('\n')[0]}`);
  }
  const parsed = caseSchema.safeParse(value);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    throw new UserError(`${path}: not a case: ${issue.path.join('.')}: ${issue.message}`);
  }
  return parsed.data;
}
