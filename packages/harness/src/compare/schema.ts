/** The JSON that `ebb compare` writes, as a schema: contract § ebb compare. Published by `ebb compare --schema`. */
import { z } from 'zod';

const count = z.number().int().nonnegative();

export const compareSchema = z.strictObject({
  schema: z.literal(1),
  ebb: z.string(),
  schedule: z.enum(['threads', 'inline']),
  costTable: z.string(),
  backing: z.enum(['thp', '4k']),
  hugePages: z.enum(['always', 'never']),
  trace: z.strictObject({ name: z.string(), hash: z.string(), events: count, guestMemoryBytes: count }),
  host: z.strictObject({ memoryBytes: count, cpus: count }),
  seeds: z.array(count),
  results: z.array(
    z.strictObject({
      technique: z.enum(['none', 'balloon', 'reporting', 'virtio-mem']),
      vmsFit: count,
      vmsFitRange: z.tuple([count, count]),
      hostPeakBytes: count,
      hostEndBytes: count,
      guestFreeEndBytes: count,
      returnedBytes: count,
      eptViolations: count,
      tlbFlushes: count,
      kicks: count,
      descriptors: count,
      stallVirtualNs: z.strictObject({ total: count, p50: count, p99: count, max: count }),
      ledgerViolations: count,
      events: count,
      lowerBounds: z.array(z.string()),
      wallMs: count,
      failure: z.string(),
    }),
  ),
});

export type CompareJson = z.infer<typeof compareSchema>;
