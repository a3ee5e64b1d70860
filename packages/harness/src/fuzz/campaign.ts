/**
 * One campaign: a process of its own, pinned to a core where the platform can, that searches its share of the runs.
 * Its parent gives it the work as an argument and hears of progress and failures by messages.
 */
import { exhaustive, planned, Runs, shrink, type SearchOptions } from './explore.ts';
import type { FuzzCase } from './case-file.ts';
import { Stage, type Outcome } from './stage.ts';

export interface CampaignOptions extends SearchOptions {
  readonly properties: readonly string[];
  /** This campaign's number, and how many there are: run `n` is ours if n mod `of` is `number`. */
  readonly number: number;
  readonly of: number;
  /** Runs per property over all campaigns; 0: until the time is up. */
  readonly runs: number;
  readonly milliseconds: number;
  readonly keepGoing: boolean;
  /** Longest time to shrink a failure; 0: it is told as it was found. */
  readonly shrinkMilliseconds: number;
}

export interface CampaignProgress {
  readonly runs: number;
  readonly schedules: number;
  /** Points passed, and pairs of points between which a switch was seen. */
  readonly points: number;
  readonly pairs: number;
  readonly violations: number;
  readonly property: string;
}

export type CampaignMessage =
  | { readonly kind: 'progress'; readonly progress: CampaignProgress }
  | {
      readonly kind: 'failure';
      readonly failure: Omit<FuzzCase, 'schema' | 'ebb'>;
      readonly run: number;
      readonly milliseconds: number;
    }
  | { readonly kind: 'done'; readonly progress: CampaignProgress };

const REPORT_MS = 500;
/** Runs of one property before the next has its turn. */
const TURN = 16;

/** Searches; `tell` hears of progress and of each failure. */
async function campaign(options: CampaignOptions, tell: (message: CampaignMessage) => void): Promise<void> {
  const began = performance.now();
  const stages = new Map<string, Stage>();
  const hashes = new Set<string>();
  const next = new Map<string, number>(options.properties.map((p) => [p, options.number]));
  let runs = 0;
  let points = 0;
  let violations = 0;
  let property = options.properties[0];
  let reported = 0;
  const progress = (): CampaignProgress => {
    const pairs = new Set<number>();
    for (const stage of stages.values())
      stage.switched.forEach((n, pair) => {
        if (n > 0) pairs.add(pair);
      });
    return { runs, schedules: hashes.size, points, pairs: pairs.size, violations, property };
  };
  const spent = (): boolean => performance.now() - began > options.milliseconds;
  const note = (outcome: Pick<Outcome, 'steps' | 'hash'>): void => {
    runs++;
    points += outcome.steps;
    hashes.add(`${property} ${outcome.hash}`);
    if (performance.now() - reported > REPORT_MS) {
      reported = performance.now();
      tell({ kind: 'progress', progress: progress() });
    }
  };
  /** Whether the search is over: this run failed, and the first failure stops it. */
  const over = async (stage: Stage, draw: Runs, n: number, outcome: Outcome): Promise<boolean> => {
    if (outcome.found.length === 0) return false;
    violations++;
    const at = performance.now() - began;
    const run = draw.get(n);
    const small = await shrink(stage, run.program, outcome, run.observe, options.shrinkMilliseconds);
    tell({
      kind: 'failure',
      run: n + 1,
      milliseconds: at,
      failure: {
        property: stage.property.name,
        seed: options.seed,
        path: n,
        strategy: options.strategy,
        program: small.program as FuzzCase['program'],
        choices: small.choices,
        observe: run.observe,
        found: [...small.found],
      },
    });
    return !options.keepGoing;
  };
  try {
    search: for (let open = options.properties.length; open > 0 && !spent(); ) {
      open = 0;
      for (const name of options.properties) {
        property = name;
        let stage = stages.get(name);
        if (stage === undefined) {
          stage = new Stage(name);
          stages.set(name, stage);
          await stage.open();
        }
        const draw = new Runs(stage.property, options);
        const first = next.get(name) ?? 0;
        const turn = Array.from({ length: TURN }, (_, i) => first + i * options.of).filter(
          (n) => options.runs === 0 || n < options.runs,
        );
        next.set(name, first + TURN * options.of);
        if (turn.length > 0) open++;
        for (let at = 0; at < turn.length && !spent(); at++) {
          const n = turn[at];
          if (options.strategy === 'exhaustive') {
            for await (const { outcome } of exhaustive(stage, draw.get(n), options.preemptions)) {
              note(outcome);
              if (await over(stage, draw, n, outcome)) break search;
              if (outcome.found.length > 0 || spent()) break;
            }
            continue;
          }
          const ahead = turn.slice(at).map((m) => planned(stage, draw.get(m)));
          const { held, last } = await stage.runSeries(ahead);
          for (const outcome of held) note(outcome);
          at += held.length;
          if (at === turn.length) break;
          note(last);
          if (await over(stage, draw, turn[at], last)) break search;
        }
      }
    }
  } finally {
    await Promise.all([...stages.values()].map((stage) => stage.close()));
  }
  tell({ kind: 'done', progress: progress() });
}

const work = process.argv[2] ?? '';
if (process.send !== undefined && work.startsWith('{')) {
  const options = JSON.parse(work) as CampaignOptions;
  await campaign(options, (message) => process.send?.(message));
  process.disconnect?.();
}
