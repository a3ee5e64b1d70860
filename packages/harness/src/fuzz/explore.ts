/**
 * The search: programs from a seed, each under a schedule from a strategy, until the runs or the time are used up or
 * something is found; then shrinking. Run `n` of a seed is the same program and schedule whoever runs it.
 */
import * as fc from 'fast-check';
import type { Strategy } from '@ebb/machine';
import type { FuzzProgram, Op, Property } from './property.ts';
import type { Outcome, Planned, Stage } from './stage.ts';

export const SEARCHES = ['random', 'pct', 'mixed', 'exhaustive'] as const;
type Search = (typeof SEARCHES)[number];

export interface SearchOptions {
  readonly seed: number;
  /** `mixed`, the default, takes turns between random and PCT with one to three change points. */
  readonly strategy: Search;
  /** Exhaustive: schedules with at most this many preemptions. */
  readonly preemptions: number;
}

/** Programs are drawn in batches, so that drawing costs little and run `n` needs no other run. */
const BATCH = 16;
const OBSERVED_RUN = 2;
/** Schedules tried on a program with fewer operations. */
const RESEARCHES = 12;
const SHARES = [1, 0.5, 0.25];

export interface Run {
  readonly program: FuzzProgram;
  readonly strategy: Strategy;
  readonly seed: number;
  readonly depth: number;
  /** Steps that PCT's change points are spread over, as a share of the property's: early ones are tried more often. */
  readonly share: number;
  /** Whether races are looked for: in every fourth run. */
  readonly observe: boolean;
}

/** Draws runs by number. */
export class Runs {
  readonly #property: Property;
  readonly #options: SearchOptions;
  #batch = -1;
  #programs: readonly FuzzProgram[] = [];

  constructor(property: Property, options: SearchOptions) {
    this.#property = property;
    this.#options = options;
  }

  get(n: number): Run {
    const batch = Math.floor(n / BATCH);
    if (batch !== this.#batch) {
      this.#programs = fc.sample(this.#property.program, {
        seed: Math.imul(this.#options.seed, 0x01000193) ^ batch,
        numRuns: BATCH,
      });
      this.#batch = batch;
    }
    const { strategy } = this.#options;
    const pct = strategy === 'pct' || (strategy === 'mixed' && n % 2 === 1);
    return {
      program: this.#programs[n % BATCH],
      strategy: strategy === 'exhaustive' ? 'none' : pct ? 'pct' : 'random',
      seed: Math.imul(this.#options.seed, 0x9e3779b1) ^ n,
      depth: 1 + (Math.floor(n / 2) % 3),
      share: SHARES[Math.floor(n / 6) % SHARES.length],
      observe: n % 4 === OBSERVED_RUN,
    };
  }
}

/** Executes run `n`: its outcome under the strategy's schedule. */
export function execute(stage: Stage, run: Run, choices: readonly number[] = []): Promise<Outcome> {
  return stage.run(planned(stage, run, choices));
}

/** A run as the stage is to execute it; `choices` to make first. */
export function planned(stage: Stage, run: Run, choices: readonly number[] = []): Planned {
  const { share, ...rest } = run;
  return { ...rest, length: Math.round(stage.property.steps * share), choices };
}

/**
 * Every schedule of one program with at most `preemptions` preemptions, depth first. Alternatives are tried only at
 * accesses that conflict with another thread's in the execution at hand (the test of dynamic partial-order reduction,
 * Flanagan and Godefroid 2005), and at choices between host tasks; elsewhere the order cannot matter. Yields outcomes
 * with the choices that lead to them.
 */
export async function* exhaustive(
  stage: Stage,
  run: Run,
  preemptions: number,
): AsyncGenerator<{ outcome: Outcome; choices: readonly number[] }, void, void> {
  const prefix: number[] = [];
  for (;;) {
    const outcome = await execute(stage, { ...run, strategy: 'none' }, prefix);
    yield { outcome, choices: outcome.choices };
    const matters = conflicting(stage);
    let used = 0;
    const spent = outcome.choices.map((choice, i) => {
      if (choice !== 0 && outcome.preemptive[i]) used++;
      return used;
    });
    let next = -1;
    for (let i = outcome.choices.length - 1; i >= 0 && next < 0; i--) {
      if (outcome.choices[i] + 1 >= outcome.options[i]) continue;
      const before = i === 0 ? 0 : spent[i - 1];
      if (outcome.preemptive[i] && before >= preemptions) continue;
      if (outcome.preemptive[i] && !matters(outcome.at[i])) continue;
      next = i;
    }
    if (next < 0) return;
    prefix.length = 0;
    prefix.push(...outcome.choices.slice(0, next), outcome.choices[next] + 1);
  }
}

/** Whether the access at an event is of a word that another thread touches too, one of the two writing. */
function conflicting(stage: Stage): (event: number) => boolean {
  const events = stage.buffer.events();
  const readers = new Map<number, number>();
  const writers = new Map<number, number>();
  const isWrite = (p: string): boolean => p === 'store' || p === 'rmw' || p === 'ept-write' || p === 'notify';
  for (const { thread, point, detail } of events) {
    const map = isWrite(point) ? writers : readers;
    map.set(detail, (map.get(detail) ?? 0) | (1 << thread));
  }
  return (at) => {
    const event = events[at];
    if (event === undefined || event.point === 'task-choice' || event.point === 'translated') return true;
    const others = ~(1 << event.thread);
    const w = (writers.get(event.detail) ?? 0) & others;
    const r = (readers.get(event.detail) ?? 0) & others;
    return w !== 0 || (isWrite(event.point) && r !== 0);
  };
}

/**
 * Shrinks a failing run, program and schedule together, by fast-check: fewer operations, and fewer choices that are not
 * "go on". Stops at `milliseconds`. The result fails too.
 */
export async function shrink(
  stage: Stage,
  program: FuzzProgram,
  outcome: Outcome,
  observe: boolean,
  milliseconds: number,
): Promise<{ program: FuzzProgram; choices: number[]; found: readonly string[] }> {
  let best = { program, choices: [...outcome.choices], found: outcome.found };
  if (milliseconds === 0) return best;
  const kind = kindOf(outcome);
  const replayed = async (p: FuzzProgram, choices: readonly number[]): Promise<Outcome> =>
    stage.run({ program: p, strategy: 'none', seed: 1, depth: 0, length: 1, choices, observe });
  const first = await replayed(program, best.choices);
  if (kindOf(first) !== kind) return best;
  const until = performance.now() + milliseconds;
  const holds = async (p: FuzzProgram, choices: readonly number[]): Promise<boolean> => {
    if (performance.now() > until) return true;
    const again = await replayed(p, choices);
    // Another failure is another case: a schedule cut short may well spin for ever.
    if (kindOf(again) !== kind) return true;
    best = { program: p, choices: trimmed(choices), found: again.found };
    return false;
  };
  // Operations first, in runs that halve: each time under the schedule at hand, then under a few others, since with fewer
  // operations the same choices mean something else.
  const failsWithout = async (p: FuzzProgram): Promise<boolean> => {
    if (!(await holds(p, best.choices))) return true;
    for (let seed = 1; seed <= RESEARCHES && performance.now() < until; seed++) {
      const strategy = seed % 2 === 0 ? 'random' : 'pct';
      const length = Math.max(1, Math.floor(first.steps / 2));
      const again = await stage.run({
        program: p,
        strategy,
        seed,
        depth: 1 + (seed % 3),
        length,
        choices: [],
        observe,
      });
      if (kindOf(again) !== kind) continue;
      best = { program: p, choices: [...again.choices], found: again.found };
      return true;
    }
    return false;
  };
  for (let list = 0; list <= program.cpus.length; list++)
    for (let size = Math.ceil(opsOf(best.program, list).length / 2); size >= 1; size = Math.floor(size / 2))
      for (let at = opsOf(best.program, list).length - size; at >= 0; at -= size)
        if (performance.now() < until) await failsWithout(without(best.program, list, at, size));
  // Then the schedule, in large steps: what lies past the failure, then runs of choices, become "go on".
  for (let size = best.choices.length; size >= 1 && performance.now() < until; size = Math.floor(size / 2)) {
    for (let at = best.choices.length - size; at >= 0; at -= size) {
      if (best.choices.slice(at, at + size).every((c) => c === 0)) continue;
      await holds(best.program, [
        ...best.choices.slice(0, at),
        ...new Array<number>(size).fill(0),
        ...best.choices.slice(at + size),
      ]);
    }
  }
  await fc.check(fc.asyncProperty(stage.property.program, fc.array(fc.nat({ max: 7 })), holds), {
    examples: [[best.program, best.choices]],
    numRuns: 1,
    interruptAfterTimeLimit: milliseconds,
  });
  return best;
}

/** Operations of the host (list 0) or of a vCPU. */
function opsOf(program: FuzzProgram, list: number): readonly Op[] {
  return list === 0 ? program.host : program.cpus[list - 1];
}

/** The program without some operations of one list. */
function without(program: FuzzProgram, list: number, at: number, count: number): FuzzProgram {
  const rest = opsOf(program, list).filter((_, i) => i < at || i >= at + count);
  if (list === 0) return { ...program, host: rest };
  return { ...program, cpus: program.cpus.map((ops, cpu) => (cpu === list - 1 ? rest : ops)) };
}

/** How an execution failed: it never ended, in one of two ways; a race; or something that is wrong in what it left. */
function kindOf({ found }: Outcome): string {
  if (found.length === 0) return '';
  return /^(?:deadlock|livelock|race)/.exec(found[0])?.[0] ?? 'wrong';
}

/** Without the zeros at its end, which mean nothing. */
function trimmed(choices: readonly number[]): number[] {
  let end = choices.length;
  while (end > 0 && choices[end - 1] === 0) end--;
  return choices.slice(0, end);
}
