/** `ebb check`. */
import Table from 'cli-table3';
import type { Command } from 'commander';
import { emitJson, jsonToStdout, say } from '../cli-output.ts';
import { EBB_VERSION } from '../version.ts';
import { checkTrace } from './check-trace.ts';
import { readDeviceTrace } from './device-events.ts';

export function addCheckCommand(program: Command): void {
  program
    .command('check')
    .description('check a recorded device trace against the MUSTs of the virtio specification')
    .argument(
      '<file>',
      "JSON lines of device events, or QEMU's virtio_balloon_* and virtio_mem_* log (may be gzipped)",
    )
    .option('--json <file>', 'write the result as JSON; - for standard output')
    .addHelpText(
      'after',
      '\nExamples:\n  ebb check my-driver.jsonl\n  ebb check A-session.qemu-trace.log --json -\n\nThe JSON-lines format is in docs/mechanisms/check.md.',
    )
    .action((file: string, flags: { json?: string }) => {
      jsonToStdout(flags.json);
      const trace = readDeviceTrace(file);
      const verdict = checkTrace(trace);
      if (verdict.breaches.length > 0) {
        const table = new Table({
          style: { head: [], border: [] },
          head: ['line', 'who', 'what', 'breaks (virtio 1.2)'],
          colWidths: [8, 9, 50, 80],
          wordWrap: true,
        });
        for (const b of verdict.breaches.slice(0, 40))
          table.push([b.line, b.who, b.what, `§ ${b.section} ${b.title}: ${b.must}`]);
        say(table.toString());
      }
      const more = verdict.breaches.length > 40 ? ' (40 shown)' : '';
      say(
        `${verdict.events} events of ${verdict.devices.length} device(s), ${verdict.skipped} other lines: ` +
          (verdict.breaches.length === 0
            ? 'no MUST is violated'
            : `${verdict.breaches.length} violations${more}`),
      );
      emitJson(flags.json, { schema: 1, ebb: EBB_VERSION, format: trace.format, ...verdict });
      process.exitCode = verdict.breaches.length > 0 ? 1 : 0;
    });
}
