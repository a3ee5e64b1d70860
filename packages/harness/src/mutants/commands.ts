/** `ebb mutants`. */
import { existsSync } from 'node:fs';
import Table from 'cli-table3';
import type { Command } from 'commander';
import { emitJson, jsonToStdout, progressLine, say } from '../cli-output.ts';
import { UserError } from '../trace/trace.ts';
import { EBB_VERSION } from '../version.ts';
import { EQUIVALENT, MUTANTS } from './catalogue.ts';
import { runMutants } from './run-mutants.ts';

export function addMutantCommand(program: Command): void {
  program
    .command('mutants')
    .description('plant seeded faults in a copy of the sources; each must be caught')
    .argument('[name...]', 'faults of the catalogue (default: all, unless --patch is given)')
    .option('--patch <file...>', 'unified diffs to try as well')
    .option('--list', 'list the catalogue and exit')
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb mutants --list\n  ebb mutants skip-flush no-zeroing\n  ebb mutants --patch my-fault.diff',
    )
    .action(async (names: string[], flags: { patch?: string[]; list?: boolean; json?: string }) => {
      jsonToStdout(flags.json);
      for (const name of names)
        if (!MUTANTS.some((m) => m.name === name))
          throw new UserError(
            `${name}: no such fault; \`ebb mutants --list\` shows the ${MUTANTS.length} there are`,
          );
      for (const patch of flags.patch ?? [])
        if (!existsSync(patch)) throw new UserError(`--patch ${patch}: no such file`);
      if (flags.list === true) {
        const table = new Table({
          style: { head: [], border: [] },
          head: ['fault', 'file', 'stands for', 'caught by'],
        });
        for (const m of MUTANTS)
          table.push([
            m.name,
            m.file.replace('packages/', ''),
            m.stands,
            'test' in m.by ? m.by.test.replace('packages/', '') : m.by.properties.join(', '),
          ]);
        say(table.toString());
        for (const e of EQUIVALENT) say(`equivalent: ${e.name}: ${e.reason}`);
        emitJson(flags.json, {
          schema: 1,
          ebb: EBB_VERSION,
          total: MUTANTS.length,
          faults: MUTANTS.map(({ name, file, stands, by }) => ({ name, file, stands, by })),
          equivalent: EQUIVALENT,
        });
        return;
      }
      const patches = flags.patch ?? [];
      const chosen =
        names.length > 0 ? MUTANTS.filter((m) => names.includes(m.name)) : patches.length > 0 ? [] : MUTANTS;
      const line = progressLine();
      const began = performance.now();
      const results = await runMutants(chosen, patches, (r, done, total) => {
        line.show(
          `${done} of ${total}: ${r.name} ${r.caught ? 'caught' : 'MISSED'} in ${r.seconds.toFixed(1)} s`,
        );
      });
      line.end();
      const table = new Table({
        style: { head: [], border: [] },
        head: ['fault', '', 'by', 'run', 'time', 'how'],
        colWidths: [30, 8, 34, 6, 9, 80],
        wordWrap: true,
      });
      for (const r of results.toSorted((a, b) => Number(a.caught) - Number(b.caught)))
        table.push([
          r.name,
          r.caught ? 'caught' : 'MISSED',
          r.by,
          r.runs || '',
          `${r.seconds.toFixed(1)} s`,
          r.how.slice(0, 150),
        ]);
      say(table.toString());
      const missed = results.filter((r) => !r.caught).map((r) => r.name);
      const caught = results.length - missed.length;
      say(
        `${caught} of ${results.length} caught (${((100 * caught) / Math.max(1, results.length)).toFixed(1)} %) in ${((performance.now() - began) / 1000).toFixed(0)} s`,
      );
      emitJson(flags.json, {
        schema: 1,
        ebb: EBB_VERSION,
        total: results.length,
        caught,
        missed,
        equivalent: EQUIVALENT,
        results,
      });
      process.exitCode = missed.length > 0 ? 1 : 0;
    });
}
