/** Options of `ebb compare`, checked: what is impossible is the user's one line. */
import { existsSync, statSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { formatBytes, MiB } from '@ebb/machine';
import { hostMemoryOption, oneOf, sizeOption, wholeNumber } from '../cli-options.ts';
import { readCapture } from '../trace/capture.ts';
import { readTrace } from '../trace/ebbtrace.ts';
import { UserError, type Trace } from '../trace/trace.ts';
import type { Backing, Technique } from '../run/spec.ts';

const TECHNIQUES: readonly Technique[] = ['none', 'balloon', 'reporting', 'virtio-mem'];
export const SHIPPED_TRACES = ['build', 'hog', 'reporting'] as const;

export interface CompareOptions {
  readonly trace: Trace;
  readonly techniques: readonly Technique[];
  readonly hostMemory: number;
  readonly guestMemory: number;
  readonly vcpus: number;
  readonly staggerNs: number;
  readonly repeat: number;
  /** Exactly this many VMs instead of a search. */
  readonly vms: number | undefined;
  readonly maxVms: number;
  readonly backing: Backing;
  readonly schedule: 'threads' | 'inline';
  readonly seed: number;
}

/** Raw texts from the command line. */
export interface CompareFlags {
  readonly trace: string;
  readonly technique: string;
  readonly hostMemory: string;
  readonly guestMemory?: string;
  readonly vcpus?: string;
  readonly stagger: string;
  readonly repeat: string;
  readonly vms?: string;
  readonly maxVms: string;
  readonly backing: string;
  readonly schedule: string;
  readonly seed: string;
}

/** A shipped trace's file. */
function shippedTracePath(name: string): string {
  return fileURLToPath(new URL(`../../traces/${name}.ebbtrace`, import.meta.url));
}

/** Loads a trace by shipped name, `.ebbtrace` file, tracefs text or capture folder. */
export function loadTrace(nameOrPath: string): Trace {
  // A shipped name is that trace, whatever lies here under it: a path to that says so by `./`.
  if ((SHIPPED_TRACES as readonly string[]).includes(nameOrPath))
    return readTrace(shippedTracePath(nameOrPath));
  if (!existsSync(nameOrPath)) {
    throw new UserError(
      `trace '${nameOrPath}': neither a file nor a folder nor a shipped trace; shipped are ${SHIPPED_TRACES.join(', ')}`,
    );
  }
  if (nameOrPath.endsWith('.ebbtrace') && statSync(nameOrPath).isFile()) return readTrace(nameOrPath);
  return readCapture(nameOrPath);
}

export function checkCompare(flags: CompareFlags): CompareOptions {
  const hostMemory = hostMemoryOption('--host-memory', flags.hostMemory);
  const named = flags.technique.split(',').map((t) => oneOf('--technique', t.trim(), TECHNIQUES));
  const techniques = [...new Set(named)];
  const staggerS = flags.stagger.trim() === '' ? Number.NaN : Number(flags.stagger);
  if (!(staggerS >= 0 && staggerS <= 3600))
    throw new UserError(`--stagger ${flags.stagger}: give seconds from 0 to 3600`);
  const repeat = wholeNumber('--repeat', flags.repeat, 1, 100);
  const maxVms = wholeNumber('--max-vms', flags.maxVms, 1, 64);
  const vms = flags.vms === undefined ? undefined : wholeNumber('--vms', flags.vms, 1, maxVms);
  const backing = oneOf('--backing', flags.backing, ['thp', '4k'] as const);
  const schedule = oneOf('--schedule', flags.schedule, ['threads', 'inline'] as const);
  const seed = wholeNumber('--seed', flags.seed, 0, 2 ** 31 - 1);
  const trace = loadTrace(flags.trace);
  const vcpus =
    flags.vcpus === undefined ? Math.min(8, trace.nrCpus) : wholeNumber('--vcpus', flags.vcpus, 1, 8);
  const guestMemory =
    flags.guestMemory === undefined
      ? trace.guestMemoryBytes
      : sizeOption('--guest-memory', flags.guestMemory);
  if (guestMemory < trace.guestMemoryBytes) {
    throw new UserError(
      `--guest-memory ${flags.guestMemory}: the trace '${trace.name}' was captured with ${formatBytes(trace.guestMemoryBytes)}; give at least that`,
    );
  }
  if (guestMemory % (2 * MiB) !== 0)
    throw new UserError(`--guest-memory ${flags.guestMemory}: give a multiple of 2 MiB`);
  return {
    trace,
    techniques,
    hostMemory,
    guestMemory,
    vcpus,
    staggerNs: staggerS * 1e9,
    repeat,
    vms,
    maxVms,
    backing,
    schedule,
    seed,
  };
}
