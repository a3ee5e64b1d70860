/** `ebb fuzz` and `ebb replay`. */
import { relative, resolve } from 'node:path';
import type { Command } from 'commander';
import { checkOutputs, emitJson, jsonToStdout, progressLine, say, writeOut } from '../cli-output.ts';
import { oneOf, wholeNumber } from '../cli-options.ts';
import { UserError } from '../trace/trace.ts';
import { provenance } from '../provenance.ts';
import { caseText, readCase, type FuzzCase } from './case-file.ts';
import { execute, Runs, SEARCHES } from './explore.ts';
import { fuzz, type FuzzFailure } from './fuzz.ts';
import { findProperty, PROPERTIES } from './properties.ts';
import { Stage, type Outcome } from './stage.ts';
import { perfetto, story } from './story.ts';

/** `60s`, `30m`, `1h`, or seconds. */
function duration(option: string, text: string): number {
  const match = /^(\d+(?:\.\d+)?)(ms|s|m|h)?$/.exec(text);
  if (match === null) throw new UserError(`${option} ${text}: not a time; write 60s, 30m or 1h`);
  const unit = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[match[2] ?? 's'] ?? 1000;
  return Number(match[1]) * unit;
}

interface FuzzFlags {
  runs?: string;
  time?: string;
  seed: string;
  strategy: string;
  preemptions: string;
  workers: string;
  keepGoing?: boolean;
  shrink: string;
  out: string;
  json?: string;
}

function addFuzz(program: Command): void {
  program
    .command('fuzz')
    .description('search programs and interleavings for a violation')
    .argument(
      '[property...]',
      `properties to check (default: all): ${PROPERTIES.map((p) => p.name).join(', ')}`,
    )
    .option('--runs <n>', 'executions per property; exhaustive: programs, each in all its schedules')
    .option(
      '--time <time>',
      'stop after this long, as 60s, 30m or 1h (default: 60s without --runs, and if exhaustive)',
    )
    .option('--seed <n>', 'seed of programs and schedules', '1')
    .option('--strategy <name>', `how the next thread is picked: ${SEARCHES.join(', ')}`, 'mixed')
    .option('--preemptions <d>', 'exhaustive: schedules with at most this many preemptions', '2')
    .option('--workers <n>', 'campaigns at once (default: one per core)', '0')
    .option('--keep-going', 'go on after a failure')
    .option('--shrink <time>', 'longest time to make a failure smaller; 0s leaves it as it was found', '15s')
    .option('--out <folder>', 'where failing cases are written', 'out/fuzz')
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb fuzz --time 60s\n  ebb fuzz invalidation --runs 2000 --strategy pct --seed 7\n  ebb fuzz invalidation --strategy exhaustive --preemptions 1 --time 30s',
    )
    .action(async (names: string[], flags: FuzzFlags) => {
      jsonToStdout(flags.json);
      const properties = (names.length === 0 ? PROPERTIES.map((p) => p.name) : names).map(
        (name) => findProperty(name).name,
      );
      const runs = flags.runs === undefined ? 0 : wholeNumber('--runs', flags.runs, 1, 2 ** 31 - 1);
      const seed = wholeNumber('--seed', flags.seed, 0, 2 ** 31 - 1);
      const strategy = oneOf('--strategy', flags.strategy, SEARCHES);
      const time = flags.time ?? (runs === 0 || strategy === 'exhaustive' ? '60s' : '24h');
      checkOutputs(flags.json, `${flags.out}/case.json`);
      const line = progressLine();
      const began = performance.now();
      const result = await fuzz(
        {
          properties,
          runs,
          milliseconds: duration('--time', time),
          seed,
          strategy,
          preemptions: wholeNumber('--preemptions', flags.preemptions, 0, 64),
          workers: wholeNumber('--workers', flags.workers, 0, 64),
          keepGoing: flags.keepGoing === true,
          shrinkMilliseconds: duration('--shrink', flags.shrink),
        },
        (p) => {
          const s = (performance.now() - began) / 1000;
          line.show(
            `${p.property}: ${p.runs} runs (${(p.runs / s).toFixed(0)}/s), ${p.schedules} interleavings, ${p.pairs} pairs of points switched between, ${p.violations} failed`,
          );
        },
      );
      line.end();
      const seconds = (performance.now() - began) / 1000;
      const files = result.failures.map((f) => saveFailure(f, flags.out));
      for (const [i, f] of result.failures.entries()) sayFailure(f, files[i]);
      say(
        `${properties.length} properties, ${result.runs} runs in ${seconds.toFixed(1)} s (${(result.runs / seconds).toFixed(0)}/s), ` +
          `${result.schedules} distinct interleavings, ${result.points} points, ${result.pairs} pairs of points switched between, ${result.failures.length} failed`,
      );
      emitJson(flags.json, {
        ...provenance('controlled', '4k', [seed]),
        properties,
        runs: result.runs,
        schedules: result.schedules,
        points: result.points,
        pairs: result.pairs,
        violations: result.violations,
        failures: files,
        found: result.failures.map((f) => ({
          property: f.case.property,
          run: f.run,
          milliseconds: Math.round(f.milliseconds),
          path: f.case.path,
          found: f.case.found,
        })),
        seconds,
      });
      process.exitCode = result.failures.length > 0 ? 1 : 0;
    });
}

function saveFailure(failure: FuzzFailure, folder: string): string {
  const path = `${folder}/${failure.case.property}-${failure.case.seed}-${failure.case.path}.json`;
  writeOut(path, caseText(failure.case));
  return path;
}

function sayFailure(failure: FuzzFailure, file: string): void {
  const { case: c } = failure;
  say(`${c.property} failed in run ${failure.run} (seed ${c.seed}):`);
  for (const what of c.found.slice(0, 4)) say(`  ${what}`);
  const ops = c.program.cpus.reduce((n, list) => n + list.length, c.program.host.length);
  const switches = c.choices.filter((choice) => choice !== 0).length;
  say(`  shrunk to ${ops} operations and ${switches} choices of another thread or task`);
  say(`  again: npx ebb replay ${relative('.', resolve(file))} --story -`);
}

interface ReplayFlags {
  property?: string;
  seed: string;
  path: string;
  strategy: string;
  story?: string;
  perfetto?: string;
  json?: string;
}

function addReplay(program: Command): void {
  program
    .command('replay')
    .description('reproduce a failing case, step by step')
    .argument('[file]', 'a case that `ebb fuzz` wrote')
    .option('--property <name>', 'instead of a file: the property…')
    .option('--seed <n>', '… the seed …', '1')
    .option('--path <n>', '… and the number of the run', '0')
    .option('--strategy <name>', 'the strategy it was found with', 'mixed')
    .option('--story <file>', 'write which thread did what; - for standard output')
    .option('--perfetto <file>', 'write a trace-event file for Perfetto or Chrome')
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb replay out/fuzz/invalidation-1-17.json --story -\n  ebb replay --property invalidation --seed 1 --path 17 --perfetto out/case.perfetto.json',
    )
    .action(async (file: string | undefined, flags: ReplayFlags) => {
      jsonToStdout(flags.json);
      const stored = file === undefined ? null : readCase(file);
      const name = stored?.property ?? flags.property;
      if (name === undefined)
        throw new UserError('replay: name a case file, or --property, --seed and --path');
      const stage = new Stage(findProperty(name).name);
      await stage.open();
      try {
        const { program: what, outcome } =
          stored === null ? await byPath(stage, flags) : await byCase(stage, stored);
        const events = stage.buffer.events();
        const told = (target: string, text: string): void => {
          if (target === '-') say(text.trimEnd());
          else {
            writeOut(target, text);
            say(`written: ${target}`);
          }
        };
        if (flags.story !== undefined)
          told(
            flags.story,
            story(
              { property: name, program: what },
              events,
              outcome.found,
              flags.story === '-' ? 120 : events.length,
            ),
          );
        if (flags.perfetto !== undefined)
          told(flags.perfetto, perfetto(events, outcome.found, stage.threads, stage.property.shape.ramPages));
        if (flags.story !== '-') for (const f of outcome.found) say(f);
        say(
          outcome.found.length > 0
            ? `reproduced: ${outcome.steps} steps, ${outcome.switches} switches, interleaving ${(outcome.hash >>> 0).toString(16)}`
            : `held: ${outcome.steps} steps, interleaving ${(outcome.hash >>> 0).toString(16)}`,
        );
        emitJson(flags.json, {
          ...provenance('controlled', '4k', []),
          property: name,
          found: outcome.found,
          steps: outcome.steps,
          switches: outcome.switches,
          interleaving: (outcome.hash >>> 0).toString(16),
        });
        process.exitCode = outcome.found.length > 0 ? 1 : 0;
      } finally {
        await stage.close();
      }
    });
}

type Replayed = { readonly program: FuzzCase['program']; readonly outcome: Outcome };

async function byCase(stage: Stage, c: FuzzCase): Promise<Replayed> {
  const outcome = await stage.run({
    program: c.program,
    strategy: 'none',
    seed: 1,
    depth: 0,
    length: 1,
    choices: c.choices,
    observe: c.observe,
  });
  return { program: c.program, outcome };
}

async function byPath(stage: Stage, flags: ReplayFlags): Promise<Replayed> {
  const options = {
    seed: wholeNumber('--seed', flags.seed, 0, 2 ** 31 - 1),
    strategy: oneOf('--strategy', flags.strategy, SEARCHES),
    preemptions: 0,
  };
  const run = new Runs(stage.property, options).get(wholeNumber('--path', flags.path, 0, 2 ** 31 - 1));
  return { program: run.program as FuzzCase['program'], outcome: await execute(stage, run) };
}

export function addFuzzCommands(program: Command): void {
  addFuzz(program);
  addReplay(program);
}
