/** `ebb litmus`. */
import Table from 'cli-table3';
import type { Command } from 'commander';
import { emitJson, jsonToStdout, say } from '../cli-output.ts';
import { EBB_VERSION } from '../version.ts';
import { enumerate, LITMUS } from './litmus.ts';

export function addLitmusCommand(program: Command): void {
  program
    .command('litmus')
    .description('count the outcomes of the store-then-load pairs under a modelled store buffer')
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .addHelpText('after', '\nExamples:\n  ebb litmus\n  ebb litmus --json -')
    .action((flags: { json?: string }) => {
      jsonToStdout(flags.json);
      const table = new Table({
        style: { head: [], border: [] },
        head: ['pair', 'sides', 'both miss: atomic', 'first plain', 'second plain', 'then'],
        colWidths: [26, 34, 12, 12, 12, 44],
        wordWrap: true,
      });
      const rows = LITMUS.map((litmus) => {
        const [none, first, second] = ([-1, 0, 1] as const).map((w) => enumerate(litmus, w));
        table.push([
          litmus.name,
          litmus.sides.join(' / '),
          `${none.both} of ${none.executions}`,
          `${first.both} of ${first.executions}`,
          `${second.both} of ${second.executions}`,
          litmus.forbidden,
        ]);
        const figures = (o: typeof none): object => ({ executions: o.executions, both: o.both });
        return {
          name: litmus.name,
          atomic: figures(none),
          firstPlain: figures(first),
          secondPlain: figures(second),
        };
      });
      say(table.toString());
      emitJson(flags.json, { schema: 1, ebb: EBB_VERSION, litmus: rows });
      process.exitCode = rows.every((_, i) => enumerate(LITMUS[i], -1).both === 0) ? 0 : 1;
    });
}
