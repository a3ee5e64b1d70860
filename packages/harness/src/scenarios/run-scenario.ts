/** Runs one scenario on either schedule and evaluates its checks. */
import { EXHIBITS } from '../museum/exhibits.ts';
import { Arena } from '@ebb/guest-kernel';
import { PAGE_SIZE } from '@ebb/machine';
import { hostBuffers, runBuffers } from '../run/buffers.ts';
import { fileStorage } from '../run/file-storage.ts';
import type { HostProgress } from '../run/host-worker.ts';
import { runInline } from '../run/inline-run.ts';
import { runThreads, ThreadPool, workersFor } from '../run/threads-run.ts';
import { UserError } from '../trace/trace.ts';
import type { Check, Scenario, ScenarioOutcome } from './scenario.ts';
import { SCENARIOS } from './scenarios.ts';

export interface ScenarioRun {
  readonly scenario: Scenario;
  readonly outcome: ScenarioOutcome;
  readonly checks: readonly Check[];
  readonly passed: boolean;
  readonly wallMs: number;
  readonly allocTrace: readonly string[];
}

export function findScenario(name: string): Scenario {
  const scenario = SCENARIOS.find((s) => s.name === name);
  if (scenario === undefined)
    throw new UserError(
      `'${name}': no such scenario or exhibit; there are ${[...SCENARIOS, ...EXHIBITS].map((s) => s.name).join(', ')}`,
    );
  return scenario;
}

export async function runScenario(
  scenario: Scenario,
  options: { readonly schedule: 'threads' | 'inline'; readonly seed: number; readonly traceOut: boolean },
  onProgress: (progress: HostProgress) => void = () => undefined,
): Promise<ScenarioRun> {
  const began = performance.now();
  const spec = { ...scenario.spec(options.seed), traceOut: options.traceOut, workers: workersFor(2) };
  const buffers = runBuffers(spec, hostBuffers(spec.hostFrames * PAGE_SIZE));
  const arenas = spec.vms.map((vm, k) => new Arena(buffers.arenas[k], vm.guest.maxPfn));
  let outcome: ScenarioOutcome;
  let allocTrace: string[];
  if (options.schedule === 'threads') {
    const pool = new ThreadPool(spec.workers);
    try {
      const run = await runThreads(spec, buffers, pool, onProgress);
      outcome = { result: run.result, arenas, schedule: options.schedule };
      allocTrace = run.allocTrace.map((e) => e.line);
    } finally {
      await pool.close();
    }
  } else {
    const disks: { close(): void }[] = [];
    const run = runInline(spec, buffers, (_vm, bytes) => {
      const disk = fileStorage(bytes);
      disks.push(disk);
      return disk;
    });
    for (const disk of disks) disk.close();
    outcome = { result: run.result, arenas, schedule: options.schedule };
    allocTrace = run.allocTrace.map((e) => e.line);
  }
  const checks = scenario.checks(outcome);
  return {
    scenario,
    outcome,
    checks,
    passed: checks.every((c) => c.ok),
    wallMs: Math.round(performance.now() - began),
    allocTrace,
  };
}
