/** What a scenario is, and the small parts they are built of. */
import type { Arena, GuestConfig } from '@ebb/guest-kernel';
import { NS_PER_S, PAGE_SIZE } from '@ebb/machine';
import type { RunResult } from '../run/run-result.ts';
import type { ProgramSpec, RunSpec, VmSpec } from '../run/spec.ts';

export interface ScenarioOutcome {
  readonly result: RunResult;
  readonly arenas: readonly Arena[];
  readonly schedule: 'threads' | 'inline';
}

/** A figure that a scenario shows, and whether it is as it must be. */
export interface Check {
  readonly what: string;
  readonly value: number | string;
  readonly ok: boolean;
}

export interface Scenario {
  readonly name: string;
  readonly about: string;
  /** Rows and invariants it shows. */
  readonly rows: string;
  spec(seed: number): RunSpec;
  checks(outcome: ScenarioOutcome): Check[];
}

export const second = (n: number): number => n * NS_PER_S;

/** A freshly booted two-vCPU guest of `bytes`, on one node or two. */
export function freshGuest(
  bytes: number,
  options: { nodes?: 1 | 2; balloon?: boolean; blk?: boolean; poison?: boolean; pagesPerFile?: number } = {},
): GuestConfig {
  const maxPfn = bytes / PAGE_SIZE;
  const half = Math.floor(maxPfn / 2 / 1024) * 1024;
  const two = options.nodes === 2;
  return {
    e820: [
      { start: 0, end: 160 },
      { start: 256, end: maxPfn },
    ],
    nodes: two
      ? [
          { start: 0, end: half },
          { start: half, end: maxPfn },
        ]
      : [{ start: 0, end: maxPfn }],
    maxPfn,
    nrCpus: 2,
    cpuNode: two ? [0, 1] : [0, 0],
    initOnAlloc: true,
    pagePoison: options.poison ?? false,
    balloon: options.balloon ?? false,
    blk: options.blk ?? false,
    blocks: { kind: 'linear', pagesPerFile: options.pagesPerFile ?? 1024 },
  };
}

/** Each vCPU, `rounds` times: takes `pages` pages, gives them back after `holdNs` (virtual), and waits `pauseNs`. */
export const turns = (
  pages: number,
  rounds: number,
  holdNs: number,
  pauseNs: number,
  startNs: number = 0,
): ProgramSpec => ({ kind: 'touch-free', startNs, pages, order: 0, rounds, holdNs, pauseNs });

/** Each vCPU takes `pages` pages at `startNs` (virtual), and gives them back `holdNs` later. */
export const holds = (pages: number, startNs: number, holdNs: number): ProgramSpec =>
  turns(pages, 1, holdNs, 0, startNs);

export function spec(hostBytes: number, vms: readonly VmSpec[], over: Partial<RunSpec> = {}): RunSpec {
  return {
    hostFrames: hostBytes / PAGE_SIZE,
    backing: 'thp',
    vms,
    vcpusPerVm: 2,
    workers: 2,
    sampleNs: NS_PER_S / 4,
    graceNs: 0,
    traceOut: false,
    poison: 'full',
    ...over,
  };
}

export const atLeast = (what: string, value: number, min: number): Check => ({
  what,
  value,
  ok: value >= min,
});
export const exactly = (what: string, value: number, want: number): Check => ({
  what,
  value,
  ok: value === want,
});
export const clean = ({ result }: ScenarioOutcome): Check[] => [
  { what: 'run', value: result.ok ? 'finished' : result.why, ok: result.ok },
  exactly('ledger violations', result.ledgerViolations, 0),
];
