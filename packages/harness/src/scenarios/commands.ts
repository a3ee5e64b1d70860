/** `ebb run` and `ebb list`: scenarios and the museum. */
import Table from 'cli-table3';
import type { Command } from 'commander';
import { formatBytes, NS_PER_S } from '@ebb/machine';
import { checkOutputs, emitJson, jsonToStdout, progressLine, say, writeTraces } from '../cli-output.ts';
import { oneOf, wholeNumber } from '../cli-options.ts';
import { SHIPPED_TRACES } from '../compare/options.ts';
import { PROPERTIES } from '../fuzz/properties.ts';
import { EXHIBITS } from '../museum/exhibits.ts';
import { runExhibit } from '../museum/run-exhibit.ts';
import { provenance } from '../provenance.ts';
import { EBB_VERSION } from '../version.ts';
import { UserError } from '../trace/trace.ts';
import { findScenario, runScenario } from './run-scenario.ts';
import { SCENARIOS } from './scenarios.ts';

export function addScenarioCommands(program: Command): void {
  program
    .command('run')
    .description('run a scenario and evaluate its checks')
    .argument('<scenario>', `one of ${[...SCENARIOS, ...EXHIBITS].map((s) => s.name).join(', ')}`)
    .option('--schedule <kind>', 'threads or inline', 'threads')
    .option('--seed <n>', 'seed of the scenario', '1')
    .option('--profile <kind>', 'of an exhibit of the museum: broken, fixed or both', 'both')
    .option(
      '--trace-out <prefix>',
      'write allocation events (tracefs text) and device events (QEMU trace lines)',
    )
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb run pressure\n  ebb run reporting --schedule inline --trace-out out/reporting\n  ebb run balloon --json -\n  ebb run firecracker-6167 --profile broken',
    )
    .action(
      async (
        name: string,
        flags: { schedule: string; seed: string; profile: string; traceOut?: string; json?: string },
        command: Command,
      ) => {
        jsonToStdout(flags.json);
        const given = (...options: string[]): string[] =>
          options.filter((option) => command.getOptionValueSource(option) === 'cli');
        const schedule = oneOf('--schedule', flags.schedule, ['threads', 'inline'] as const);
        const seed = wholeNumber('--seed', flags.seed, 0, 2 ** 31 - 1);
        const profile = oneOf('--profile', flags.profile, ['both', 'broken', 'fixed'] as const);
        const exhibit = EXHIBITS.find((e) => e.name === name);
        if (exhibit !== undefined) {
          if (given('schedule', 'seed', 'traceOut').length > 0)
            throw new UserError(`${name}: an exhibit of the museum takes --profile and --json, nothing else`);
          checkOutputs(flags.json);
          runExhibit(exhibit, profile, flags.json);
          return;
        }
        const scenario = findScenario(name);
        if (given('profile').length > 0)
          throw new UserError(`${name}: --profile is for exhibits of the museum`);
        checkOutputs(flags.json, flags.traceOut);
        const line = progressLine();
        const run = await runScenario(
          scenario,
          { schedule, seed, traceOut: flags.traceOut !== undefined },
          (p) =>
            line.show(
              `${name}: ${(p.nowNs / NS_PER_S).toFixed(2)} virtual s, host ${formatBytes(p.hostUsedBytes)}`,
            ),
        );
        line.end();
        say(`${scenario.name}: ${scenario.about}`);
        const table = new Table({ style: { head: [], border: [] }, head: ['', 'check', 'value'] });
        for (const check of run.checks)
          table.push([check.ok ? 'ok' : 'FAIL', check.what, String(check.value)]);
        say(table.toString());
        for (const violation of run.outcome.result.violations.slice(0, 8)) say(violation);
        say(`${run.passed ? 'passed' : 'failed'} in ${(run.wallMs / 1000).toFixed(1)} s`);
        if (flags.traceOut !== undefined)
          writeTraces(flags.traceOut, run.allocTrace, run.outcome.result.deviceTrace);
        const { samples, deviceTrace: _deviceTrace, ...figures } = run.outcome.result;
        emitJson(flags.json, {
          ...provenance(schedule, scenario.spec(seed).backing, [seed]),
          scenario: name,
          passed: run.passed,
          checks: run.checks,
          samples: samples.length,
          ...figures,
        });
        process.exitCode = run.passed ? 0 : 1;
      },
    );

  program
    .command('list')
    .description('list scenarios, museum, properties and shipped traces')
    .option('--json <file>', 'as JSON; - for standard output')
    .addHelpText('after', '\nExamples:\n  ebb list\n  ebb list --json -')
    .action((flags: { json?: string }) => {
      jsonToStdout(flags.json);
      const table = new Table({
        style: { head: [], border: [] },
        head: ['scenario', 'shows', 'rows'],
        colWidths: [28, 84, 24],
        wordWrap: true,
      });
      for (const s of SCENARIOS) table.push([s.name, s.about, s.rows]);
      for (const e of EXHIBITS) table.push([e.name, `museum: ${e.about}`, e.rows]);
      for (const p of PROPERTIES) table.push([p.name, `property of \`ebb fuzz\`: ${p.about}`, p.rows]);
      say(table.toString());
      say(`shipped traces: ${SHIPPED_TRACES.join(', ')}`);
      emitJson(flags.json, {
        schema: 1,
        ebb: EBB_VERSION,
        scenarios: SCENARIOS.map(({ name, about, rows }) => ({ name, about, rows })),
        museum: EXHIBITS.map(({ name, about, rows }) => ({ name, about, rows })),
        properties: PROPERTIES.map(({ name, about, rows }) => ({ name, about, rows })),
        traces: SHIPPED_TRACES,
      });
    });
}
