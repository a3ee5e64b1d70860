/** Fuzzing over all cores: one campaign process each, their progress and failures put together. */
import { spawn } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { fileURLToPath } from 'node:url';
import type { CampaignMessage, CampaignOptions, CampaignProgress } from './campaign.ts';
import type { FuzzCase } from './case-file.ts';
import { allowedCores, onCore } from './cores.ts';
import { WorkerDied } from '../run/worker-endpoint.ts';

export interface FuzzFailure {
  readonly case: Omit<FuzzCase, 'schema' | 'ebb'>;
  /** Number of the run, from 1, and when it was found. */
  readonly run: number;
  readonly milliseconds: number;
}

export interface FuzzResult {
  readonly runs: number;
  readonly schedules: number;
  readonly points: number;
  readonly pairs: number;
  readonly violations: number;
  readonly failures: readonly FuzzFailure[];
}

export type FuzzOptions = Omit<CampaignOptions, 'number' | 'of'> & {
  /** Campaigns at once; 0: one per core. */
  readonly workers: number;
};

const EXTENSION = import.meta.url.endsWith('.ts') ? '.ts' : '.js';

export async function fuzz(
  options: FuzzOptions,
  onProgress: (p: CampaignProgress) => void,
): Promise<FuzzResult> {
  const cores = allowedCores();
  const of = options.workers === 0 ? availableParallelism() : options.workers;
  const latest = new Map<number, CampaignProgress>();
  const failures: FuzzFailure[] = [];
  const sum = (): CampaignProgress => {
    const all = [...latest.values()];
    const add = (key: 'runs' | 'schedules' | 'points' | 'violations'): number =>
      all.reduce((s, p) => s + p[key], 0);
    return {
      runs: add('runs'),
      schedules: add('schedules'),
      points: add('points'),
      violations: add('violations'),
      pairs: Math.max(0, ...all.map((p) => p.pairs)),
      property: all.at(-1)?.property ?? '',
    };
  };
  const entry = fileURLToPath(new URL(`./campaign${EXTENSION}`, import.meta.url));
  const children = Array.from({ length: of }, (_, number) => {
    const work: CampaignOptions = { ...options, number, of };
    const [command, ...args] = [
      ...onCore(cores[number % cores.length]),
      process.execPath,
      ...process.execArgv,
      entry,
      JSON.stringify(work),
    ];
    const child = spawn(command, args, { stdio: ['ignore', 'inherit', 'pipe', 'ipc'] });
    let errors = '';
    child.stderr?.on('data', (text: Buffer) => {
      errors += text.toString();
    });
    child.on('message', (message: CampaignMessage) => {
      if (message.kind === 'failure') {
        failures.push({ case: message.failure, run: message.run, milliseconds: message.milliseconds });
        // The first failure ends the search.
        if (!options.keepGoing)
          for (const [i, other] of children.entries()) if (i !== number) other.child.kill();
      } else {
        latest.set(number, message.progress);
        onProgress(sum());
      }
    });
    const ended = new Promise<void>((resolve, reject) => {
      child.on('error', (error) => reject(new WorkerDied(`campaign ${number}`, error.message)));
      child.on('exit', (code, signal) => {
        if (code === 0 || (signal === 'SIGTERM' && failures.length > 0)) resolve();
        else
          reject(
            new WorkerDied(
              `campaign ${number}`,
              errors.trim().split('\n').slice(0, 8).join(' ') || `it ended with ${signal ?? code}`,
            ),
          );
      });
    });
    return { child, ended };
  });
  try {
    await Promise.all(children.map((c) => c.ended));
  } finally {
    for (const { child } of children) child.kill();
  }
  return { ...sum(), failures };
}
